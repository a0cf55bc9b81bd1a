"""Attacks edgelora with hostile files made from a bundle, and prints what became of each: python -m tests.attacks BUNDLE."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.attacks.listing import list_attacks
from tests.attacks.run import run_attacks


def main() -> int:
    """Returns 1 if an attack was not refused as it should be."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m tests.attacks BUNDLE [PART]", file=sys.stderr)
        return 2
    bundle, part = Path(sys.argv[1]), "".join(sys.argv[2:3])
    attacks = list_attacks(bundle)
    chosen = [number for number, attack in enumerate(attacks) if attack.part.startswith(part)]
    if not chosen:
        parts = ", ".join(dict.fromkeys(attack.part for attack in attacks))
        print(f"no attack's part starts with {part}; there are {parts}", file=sys.stderr)
        return 2
    failed = 0
    for number, outcome in run_attacks(bundle, chosen):
        faults = outcome.faults
        failed += bool(faults)
        verdict = f"FAILED: {'; '.join(faults)}" if faults else f"{outcome.error}: {outcome.message}"
        print(f"{attacks[number].label:<60.60} {outcome.seconds:5.2f} s {outcome.bytes >> 20:5} MiB  {verdict}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} attacks were refused as they should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
