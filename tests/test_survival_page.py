"""The page of what survives: its matrix, its sentence, and that its rows are nobody else's."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import measured
import pytest

from fluxnb import notebooks, params
from fluxnb.errors import UserError
from fluxnb.findings import compiled_anew, survival_sentence
from fluxnb.report import configurations, survive
from fluxnb.study import survival, trials
from fluxnb.study.results import COLUMNS, Results
from fluxnb.study.row import Row

ROOT = Path(__file__).parents[1]
LABELS = {stack.name for stack in trials.techniques()}


def row(label, case, verdict, reason=None, **proof):
    status = {survival.RIGHT: "ok", survival.RECOMPILED: "ok", survival.SENTENCE: "unavailable"}.get(verdict, "error")
    own = {"verdict": verdict, "when": case, **proof}
    return Row(
        label=label, settings={"case": case}, status=status, reason=reason, proof=own, notebook=notebooks.SURVIVAL
    )


GOOD = [
    row("fused", "put on", survival.RIGHT),
    row("fused", "LoRA", survival.SENTENCE, "Take <it> off."),
    row("fused", "size", survival.RIGHT),
    row("compiled", "put on", survival.RIGHT),
    row("compiled", "size", survival.RECOMPILED, recompiles=2, lost_s=12.34),
    row("graph", "put on", survival.SENTENCE, "needs a CUDA GPU"),
]


def test_the_sentence_counts_what_runs_and_names_what_is_at_fault():
    assert survival_sentence(GOOD) == (
        "**No wrong image and no raw error** in 5 cells of 2 techniques and recipes that run here: the right image in "
        "4, in 1 of them after compiling anew, a sentence that says what can't work in 1."
    )
    bad = survival_sentence([*GOOD, row("fused", "save", survival.WRONG, "the image is 0.3 of its norm off")])
    assert bad.startswith("**Wrong images: 1, raw errors: 0**")
    assert bad.endswith("They are fused, save: wrong image (the image is 0.3 of its norm off).")


def test_the_matrix_is_a_table_whose_cells_say_in_words_what_became_of_the_image():
    page = survive.matrix_html(GOOD)
    assert page.count("<table") == 1 and page.count('role="row"') == 1 + 3
    cells = re.findall(r'<td role="cell" data-case="([^"]+)" class="fx-(\w+)">(.*?)</td>', page)
    assert {name: kind for name, kind, _ in cells[:3]} == {"put on": "right", "LoRA": "sentence", "size": "right"}
    assert '<a href="#said-1" title="LoRA: Take &lt;it&gt; off.">says 1</a>' in page
    assert '<li id="said-1">LoRA: Take &lt;it&gt; off.</li>' in page
    assert "2 anew, 12.3 s" in page and "not tried" in page
    assert "can’t run here: it needs a CUDA GPU" in page and "colspan" in page
    assert all(f'id="{target}"' in page for target in re.findall(r'href="#([^"]+)"', page))


def test_what_is_compiled_anew_has_a_line_with_its_seconds():
    frame = compiled_anew(GOOD)
    assert frame.loc["compiled"].to_dict() == {"case": "size", "graphs": 2, "lost": 12.34}
    assert compiled_anew(GOOD[:3]) is None


def test_what_a_configuration_leaves_out_is_something_that_there_is():
    names = [case.name for case in survival.CASES]
    for gpu in params.choices():
        given = params.load(gpu).given(notebooks.SURVIVAL)
        assert set(given.left_out or ()) <= LABELS, gpu
        for chosen in (given.cases, given.compiled, given.kernels):
            assert set(chosen or ()) <= set(names), gpu
    with pytest.raises(UserError, match="There is no case 'LoRAs': choose one of LoRA, "):
        trials.tried(SimpleNamespace(params=SimpleNamespace(name="cpu")), 4, cases=["LoRAs"])


def test_what_survives_is_counted_and_never_timed_compared_or_recommended(tmp_path):
    """Even a row that would win if it were of a measurement."""
    table = tmp_path / "reports" / "single_gpu" / "cpu" / "results.csv"
    table.parent.mkdir(parents=True)
    timed, fast = measured.row(id="a"), measured.cached(0.1, 9.0, 60.0, 3.0, notebook=notebooks.SURVIVAL)
    for one in (timed, replace(fast, settings={**fast.settings, "case": "LoRA"}, proof={"verdict": survival.RIGHT})):
        Results(table).append({name: value for name in COLUMNS if (value := getattr(one, name)) is not None})
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    found = configurations.read(tmp_path, table)
    assert [r.notebook for r in found.rows] == [timed.notebook]
    (page,) = [page for page in found.pages if page.stem == notebooks.SURVIVAL]
    assert page.rows == 1
