"""What a hostile reader looks for in prose and tables: typed findings, wrong names, means of nobody knows how many."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from measured import row

from fluxnb import families, findings
from fluxnb.report import charts

tables = importlib.import_module("fluxnb.findings.table")  # the package has a function of that name
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURE = re.compile(r"\d ?(×|dB|images/s|TFLOP)|\d (times (as|faster|slower)|% (faster|slower|less|more|of the time))")
TYPED = re.compile(
    r"\b(is|are|was|were) (the )?(fastest|slowest|best|faster|slower)\b(?! than these)|\bshown a gain\b|\b(pays|wins)\b"
)


def prose(path):
    """The sentences of a notebook, or of the README without what is computed into it, code left out."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"<!-- (\w+): written by.*?<!-- end of \1 -->|```.*?```|^\|.*?$", "", text, flags=re.S | re.M)
    return [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.:;?])\s", text)]


def typed(sentence):
    """Whether it claims what only rows can say: not where it asks, or says which rows decide."""
    if sentence.endswith("?") or re.search(r"\b(where|whether|what|if|when|which|can be|says? that)\b", sentence, re.I):
        return False
    return bool(TYPED.search(sentence))


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda p: p.stem)
def test_nobody_types_a_finding(path):
    said = [s for s in prose(path) if FIGURE.search(s) or typed(s)]
    assert not said, said


@pytest.mark.parametrize(
    "sentence",
    ["Caching is faster.", "It takes 2.1× less.", "This one keeps 35 dB.", "Lean stacks have each shown a gain."],
)
def test_a_typed_finding_is_found(sentence):
    assert FIGURE.search(sentence) or typed(sentence)


def test_what_is_not_lpips_is_not_called_so():
    """The weights are ST-LPIPS's: another metric with other values."""
    places = [ROOT / "README.md", *NOTEBOOKS]
    places += [p for p in (ROOT / "fluxnb").rglob("*") if p.suffix in (".py", ".j2", ".js", ".yaml")]
    places += [*(ROOT / "params").glob("*.yaml"), *(ROOT / "reports").glob("**/*.html")]
    for path in places:
        text = re.sub(r"data:[^\"']*|shift-tolerant LPIPS", "", path.read_text(encoding="utf-8"), flags=re.I)
        assert not re.search(r"(?<!ST-)(?<!not )\bLPIPS\b", text), path


def test_no_mean_stands_without_the_number_of_images():
    presets = {n: v for n, v in vars(tables).items() if isinstance(v, tuple) and n.isupper()}
    presets = {n: v for n, v in presets.items() if all(isinstance(c, tables.Column) for c in v)}
    means = {n: v for n, v in presets.items() if any(c in (tables.PSNR, tables.ADHERENCE) for c in v)}
    assert len(means) > 4 and all(tables.JUDGED in v for v in means.values()), list(means)
    titled = [c.title for v in presets.values() for c in v]
    assert not {"PSNR", "SSIM", "adherence"} & set(titled)  # a mean is called one
    one = row(psnr_db=30.0, psnr_min_db=28.0, psnr_identical=0, images=6, session="a")
    cache = replace(one, family=families.FIRST_BLOCK.name, settings={"threshold": 0.2}, label="FBCache 0.2")
    control = replace(one, family=families.FEWER_STEPS.name, label="28 steps again")
    for made in (
        findings.presets([one, cache], families.FIRST_BLOCK), findings.best_at_equal_steps([one, cache, control]),
    ):  # fmt: skip
        assert "judged" in made or not [name for name in made if "mean" in name], list(made)


def test_random_weights_have_no_quality_in_any_table_or_chart():
    """Should such a row ever carry figures: what random weights draw means nothing."""
    figures = {"psnr_db": 50.0, "psnr_min_db": 49.0, "ssim": 1.0, "ssim_min": 1.0, "st_lpips": 0.0, "flip": 0.0}
    random = row(weights="random", model="flux-dev-random", psnr_identical=0, session="a", **figures)
    for columns in (findings.QUALITY, findings.MATRIX, findings.CACHE, findings.SHAPE, findings.AGREEMENT):
        shown = findings.table([random], columns)
        assert not [n for n in shown if re.search("PSNR|SSIM|LPIPS|FLIP|adherence|judged", n)], list(shown)
    assert charts.on_frontier([random]) == []
