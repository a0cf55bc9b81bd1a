"""The processes of one training run, as torchrun and accelerate start them."""

from __future__ import annotations

import os


def count_processes() -> int:
    """Returns the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """True in the one process that writes files and speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def find_local_place() -> int:
    """Returns the number of this process among those on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def uses_fsdp() -> bool:
    """True if accelerate shards the model over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
