"""The index of a bundle's variants and the pages that it leads to, from figures given here."""

from __future__ import annotations

from dataclasses import replace

from edgelora.inspection import BundleDescription, TextsDescription, VariantDescription
from edgelora.report.fidelity_pages import name_files, render_fidelity
from edgelora_runtime.bundle.manifest import (
    BaseEntry,
    CalibrationEntry,
    FidelityEntry,
    ModelEntry,
    ProductFidelity,
    QuantizationEntry,
)
from tests.edgelora.report.parsed_page import Node, check_page

HOSTILE = """"><script>alert('1')</script><img src=x onerror=alert(1)> &amp; </td></table></style>"""


def fidelity(products: dict[str, ProductFidelity] | None = None) -> FidelityEntry:
    return FidelityEntry("passed", "onnxruntime", 105, 0.075, 0.366, 3.3, 0.9772, 0.962, 6.258, 6.704, products or {}, 0.012)


def variant(name: str, found: FidelityEntry | None, **changes: object) -> VariantDescription:
    """A merged variant of one adapter, 1000 bytes in all and 100 of its own."""
    given = VariantDescription(
        name, "merged", {"sql": 1.0}, {}, "linear", None, None, 1000, 100, "float", None, {}, (), None, found
    )
    return replace(given, **changes)  # type: ignore[arg-type]


PRODUCTS = {
    "layers.10.mlp.down": ProductFidelity(8, 0.5, 0.25, 2.0),
    "layers.2.mlp.down": ProductFidelity(4, 0.875, 0.5, 0.125),
    "layers.2.attention.qkv": ProductFidelity(4, 1.0, 0.75, 0.0),
}
BARE = FidelityEntry("measured", "onnxruntime", 105, 0.053, 0.19, 0.0, None, 0.689, 632.0, 678.2)
VARIANTS = (
    variant("base", BARE, mix={}, private_bytes=0),
    variant(
        "sql",
        fidelity(PRODUCTS),
        int8=("layers.10.mlp.down",),
        merge_losses={"float": 1.9026, "trained": 1.8038},
        merge_base="trained",
        trained_on="nf4",
    ),
    variant("clinic", None, mix={"sql": 0.7, "law": 0.5}, method="ties", density=0.3),
    variant("alive", replace(fidelity(), outcome="live"), kind="live"),
)
BUNDLE = BundleDescription(
    2048,
    1000,
    "base",
    BaseEntry("LFM2-1.2B", "0" * 64),
    ModelEntry("lfm2", 64, 12, 2, 16, 300, 1024),
    QuantizationEntry(4, 32, True, "gptq"),
    VARIANTS,
    None,
    TextsDescription((), {1: "</s>"}),
)


def read(bundle: str, described: BundleDescription) -> dict[str, Node]:
    pages = render_fidelity(bundle, described)
    return {file: check_page(html, {*pages}) for file, html in pages.items()}


def find_map(page: Node, title: str) -> Node:
    return next(figure.one("table") for figure in page.all("figure") if figure.one("h3").text == title)


def test_the_index_lists_every_variant_and_links_the_measured() -> None:
    pages = read("clinic-bundle", BUNDLE)
    assert pages.keys() == {"index.html", "base.html", "sql.html", "alive.html"}
    table = pages["index.html"].all("table")[0]
    assert table.rows == [
        ["variant", "mix", "outcome", "adapter kept", "KL mean", "KL p99", "same top token", "size", "of its own"],
        ["basedefault", "bare basemerged", "measured", "–", "0.0530", "0.1900", "0.6890", "1000 B", "0 B"],
        ["sql", "1 sqlmerged", "passed", "0.9772", "0.0750", "0.3660", "0.9620", "1000 B", "100 B"],
        ["clinic", "0.7 sql + 0.5 law by tiesmerged", "not measured", "–", "–", "–", "–", "1000 B", "100 B"],
        ["alive", "1 sqllive", "live", "0.9772", "0.0750", "0.3660", "0.9620", "1000 B", "100 B"],
    ]
    assert [link.attributes["href"] for link in table.all("a")] == ["base.html", "sql.html", "alive.html"]
    assert "clinic-bundle" in pages["index.html"].one("h1").text
    assert "3 of 4 variants were measured" in pages["index.html"].one("header").text


def test_the_bytes_of_the_index_add_up() -> None:
    page = read("b", BUNDLE)["index.html"]
    rows = page.one("section", **{"aria-labelledby": "bytes"}).one("table").rows
    assert [(row[0], row[2]) for row in rows[1:-1]] == [
        ("shared by variants", "1000 B"),
        ("base alone", "0 B"),
        ("sql alone", "100 B"),
        ("clinic alone", "100 B"),
        ("alive alone", "100 B"),
        ("other files", "748 B"),
    ]
    assert "2.0 KiB in all" in page.text


def test_pages_of_variants_lead_back() -> None:
    pages = read("clinic-bundle", BUNDLE)
    for file, page in pages.items():
        if file != "index.html":
            assert [link.attributes["href"] for link in page.one("header").all("a")] == ["index.html"]
            assert "clinic-bundle" in page.one("header").text


def test_products_are_laid_out_by_kind_and_layer() -> None:
    page = read("b", BUNDLE)["sql.html"]
    projection = find_map(page, "Projection on the adapter's change")
    assert projection.rows[1:] == [
        ["2", "10"],
        ["mlp.down", "0.88", "0.50 (stored in 8 bits)"],
        ["attention.qkv", "1.00", "–"],
    ]
    assert find_map(page, "Error of the outputs").rows[2] == ["mlp.down", "0.12", "2.00 (stored in 8 bits)"]
    assert find_map(page, "Codes changed").rows[2] == ["mlp.down", "0.50", "0.25 (stored in 8 bits)"]


def test_products_outside_of_layers_have_a_column_of_their_own() -> None:
    products = {"head": ProductFidelity(4, 0.25, 0.5, 0.5), **PRODUCTS}
    page = read("b", replace(BUNDLE, variants=(variant("sql", fidelity(products)),)))["sql.html"]
    assert find_map(page, "Projection on the adapter's change").rows[1:3] == [["2", "10", "–"], ["head", "–", "–", "0.25"]]


def test_the_two_kinds_of_kept_have_two_names() -> None:
    page = read("b", BUNDLE)["sql.html"]
    facts = dict(row for row in page.one("section", **{"aria-labelledby": "figures"}).one("table").rows)
    assert facts["Adapter kept"] == "0.9772"
    assert facts["Merged into"] == "the trained base, held as nf4"
    assert facts["Held-out loss by base"] == "float 1.9026, trained 1.8038 nats per token"
    assert facts["KL on the trained base"] == "0.012 nats per token"
    assert "retention" not in page.one("body").text.lower()


def test_pages_leave_out_what_a_variant_does_not_have() -> None:
    pages = read("b", BUNDLE)
    base, alive = (pages[file].one("body") for file in ("base.html", "alive.html"))
    facts = {file: [row[0] for row in page.all("table")[-1].rows] for file, page in (("base", base), ("alive", alive))}
    assert "A live variant's adapters are not quantized" in alive.text and "Merged into" not in facts["alive"]
    assert "No product of this variant was measured" in base.text and "Adapter kept" not in base.text
    assert "Adapter kept" in [name.text for name in alive.all("dt")]
    assert "Perplexity of the float base" in facts["base"] and "unmerged" not in base.text


def test_a_bundle_that_was_not_measured_has_an_index_alone() -> None:
    bundle = replace(BUNDLE, variants=tuple(replace(item, fidelity=None) for item in VARIANTS))
    pages = read("b", bundle)
    assert pages.keys() == {"index.html"}
    assert "No variant was measured" in pages["index.html"].text
    assert not pages["index.html"].all("a")


def test_pages_never_share_a_file() -> None:
    files = name_files(["index", "Index", "index-2", "sql", "SQL", "a.b", "../a.b"])
    assert files == {
        "index": "index-2.html",
        "Index": "Index-3.html",
        "index-2": "index-2-2.html",
        "sql": "sql.html",
        "SQL": "SQL-2.html",
        "a.b": "a.b.html",
        "../a.b": ".._a.b.html",
    }


def test_hostile_names_stay_text() -> None:
    """Names, methods and paths of a bundle come from strangers; the manifest's own checks are not relied on."""
    products = {f"layers.0.{HOSTILE}": ProductFidelity(4, 1.0, 0.0, 0.0), HOSTILE: ProductFidelity(8, 1.0, 0.0, 0.0)}
    hostile = variant(
        HOSTILE,
        fidelity(products),
        mix={HOSTILE: 1.0},
        method=HOSTILE,
        merge_base=HOSTILE,
        merge_losses={HOSTILE: 1.0},
        int8=(HOSTILE,),
        calibration=CalibrationEntry({HOSTILE: "0" * 64}, 9),
        weights={HOSTILE: {HOSTILE: 0.5}},
    )
    away = variant("javascript:alert(1)", fidelity())
    bundle = replace(
        BUNDLE,
        base=BaseEntry(HOSTILE, HOSTILE),
        model=replace(BUNDLE.model, architecture=HOSTILE),
        quantization=QuantizationEntry(4, 32, True, HOSTILE),
        default_variant=HOSTILE,
        variants=(hostile, away),
    )
    pages = read(HOSTILE, bundle)
    index = pages["index.html"]
    assert {link.attributes["href"] for link in index.all("a")} == pages.keys() - {"index.html"}
    assert index.text.count(HOSTILE) >= 6
    assert pages[name_files([HOSTILE])[HOSTILE]].text.count(HOSTILE) >= 12
