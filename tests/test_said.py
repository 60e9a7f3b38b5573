"""What a hostile reader looks for in prose and tables: typed findings, wrong names, means of nobody knows how many."""

import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from measured import cached, row

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
    for columns in (findings.QUALITY, findings.MATRIX, findings.CACHE, findings.AGREEMENT):
        shown = findings.table([random], columns)
        assert not [n for n in shown if re.search("PSNR|SSIM|LPIPS|FLIP|adherence|judged", n)], list(shown)
    assert charts.on_frontier([random]) == []


# --- sentences of rows of odd shape ---

BASE = row(id="b", session="s", samples=[0.4, 0.41, 0.39], again=[0.4, 0.4, 0.41], denoise_s=0.3, first_s=0.5)
SEEN = {"images": 6, "psnr_min_db": 28.5, "psnr_identical": 0, "denoise_s": 0.15, "first_s": 0.3, "id": "c"}
ONE = cached(0.2, 2.0, 30.0, 9.0, session="s", baseline="b", samples=[0.2, 0.2, 0.21], **SEEN)
UNJUDGED = replace(ONE, psnr_db=None, psnr_min_db=None, psnr_identical=None, images=None, ssim=None, adherence=None)
FAILED = replace(UNJUDGED, status="oom", reason="memory", speedup=None, latency_p50=None, samples=None, denoise_s=None)
SHAPES = {
    "the baseline alone": [BASE],
    "one setting, of three rounds": [BASE, ONE],
    "one that failed": [BASE, FAILED],
    "all failed": [replace(BASE, status="oom", speedup=None, latency_p50=None, samples=None), FAILED],
    "none judged": [BASE, UNJUDGED],
    "random weights": [replace(BASE, weights="random"), replace(UNJUDGED, weights="random", model="flux-dev-random")],
    "two sessions": [BASE, ONE, replace(ONE, session="t", baseline="q", id="o")],
    "a tie": [BASE, ONE, replace(ONE, id="d", label="the same again")],
    "no interval": [BASE, replace(ONE, speedup_ci_low=None, speedup_ci_high=None)],
    "all identical": [BASE, replace(ONE, psnr_db=None, psnr_min_db=None, psnr_identical=6)],
}
GIVEN = {
    "cache_sentence": (families.FIRST_BLOCK,),
    "interval_sentence": (families.FIRST_BLOCK,),
    "skipping_sentence": (families.FIRST_BLOCK,),
    "waits_sentence": ({},),
    "few_steps_sentence": ([BASE],),
    "equal_steps_sentence": ((12, 9),),
    "new_here_sentence": ((12, 9),),
    "predicted_sentence": ((12, 9),),
    "controls_sentence": ((12, 9),),
}
OF_ROWS = [
    name for name in dir(findings)
    if name.endswith("_sentence") and next(iter(inspect.signature(getattr(findings, name)).parameters)) == "rows"
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in OF_ROWS if n not in ("judge_sentence", "recommendation_sentence", "survival_sentence")]
)
def test_a_sentence_of_rows_of_any_shape_is_one(name):
    for shape, rows in SHAPES.items():
        said = getattr(findings, name)(rows, *GIVEN.get(name, ()))
        assert said is None or (said.strip() == said and not re.search(r"\bNone\b|\bnan\b|\binf\b", said)), (
            shape,
            said,
        )
        if said and shape in ("none judged", "random weights", "all failed", "one that failed"):
            assert "identical" not in said and "to the last bit" not in said, (shape, said)


def test_divided_images_that_are_others_are_not_called_the_picture_of_one_rank():
    far, exact = replace(ONE, psnr_db=24.0, label="far"), replace(ONE, psnr_db=None, psnr_identical=1)
    assert findings.same_everywhere_sentence([far, exact]) == (
        "1 way of dividing makes the picture of one rank (one compared); far makes another (24.0 dB)."
    )
    assert findings.same_everywhere_sentence([UNJUDGED]).startswith("no picture of several ranks was compared")
