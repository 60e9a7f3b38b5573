"""The answer first: what the recommendation needs comes before the rest, is on the index, and time is what was seen."""

import io
import json
import subprocess
import sys
import time

import pytest
from test_report import FakeParams, cell, run, write_notebook

from fluxnb import notebooks, recipes
from fluxnb.cache import Both, Cache, FirstBlock, TeaCache
from fluxnb.report import count_rows, durations, own, publish, read_json, read_state
from fluxnb.report.run import _say_how_long

TABLE = "reports/own/single_gpu/cpu/results.csv"
GO_ON = """
    import json, os, pathlib
    with open("order", "a") as file:
        file.write("{stem} ")
    index = pathlib.Path("reports/own/single_gpu/cpu/index.html")
    if index.exists():
        pathlib.Path("index at {stem}").write_text(index.read_text())
"""
ANSWER = """
    import sys
    sys.path.insert(0, {tests!r})
    import json, os
    from test_recommend import SEEN, TIMED
    from fluxnb.study.results import Results
    table = Results({table!r})
    there = len(table.rows())
    for row in [] if there else [*TIMED, *SEEN]:
        table.append({{name: value for name, value in row.as_dict().items() if value is not None}})
    with open(os.environ["FLUXNB_PROGRESS"], "a") as file:
        file.write(json.dumps({{"done": 12, "found": min(there, 12), "total": 12}}) + "\\n")
"""
PROVENANCE = {"commit": "0123456789abcdef", "machine": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}}
LEFT_OUT = "requests of one measurement (`requests`): 20 instead of 100"


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """(folder, what was printed) of a run whose second notebook in reading order is the one that answers."""
    root = tmp_path_factory.mktemp("answered")
    tests = str(publish.Path(__file__).parent)
    for stem in ("12_load", notebooks.FINAL_STACK, "15_embedded_model"):
        extra = [cell(ANSWER.format(tests=tests, table=TABLE))] if stem == notebooks.FINAL_STACK else []
        write_notebook(root, stem, cell(GO_ON.format(stem=stem)), *extra)
    output, params = io.StringIO(), FakeParams(left_out=(LEFT_OUT,))
    place = own(params, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(publish.Path(__file__).parents[1]))
        given = {"stream": output, "after": lambda stem: publish.publish_so_far(place, stem)}
        assert run(params, root, PROVENANCE, **given) == 0
    publish.publish(place)
    return root, output.getvalue()


def test_what_the_answer_needs_comes_first_and_once_more_with_the_rows_of_all(answered):
    root, output = answered
    first = notebooks.FINAL_STACK
    assert (root / "order").read_text().split() == [first, "12_load", "15_embedded_model", first]
    assert f"[1/3] {first} done in" in output and output.count("read what there is so far: ") == 1
    assert f"[1/3] {first} started" in output and "12 rows, all found" in output
    state = read_state(root / "build/cpu", first)
    assert (state["asked"], state["found"], state.get("early")) == (12, 12, None)
    assert state["seconds"] > state["measuring_s"]  # both executions, of which one measured
    assert count_rows(root / TABLE)[first] == 12


def test_the_index_has_the_answer_while_the_second_notebook_runs(answered):
    root, _ = answered
    text = (root / "index at 12_load").read_text()
    assert "lean, cached" in text and "What to choose on cpu, by goal" in text
    assert "FluxPipeline.from_pretrained(" in text and 'href="recipe-near-lossless.py"' in text
    assert (
        "Not complete: 2 of 3 reports" in text
        and "Still to come (not run yet; <code>make report GPU=cpu</code>" in text
    )
    assert "Report 12_load; Report 15" in text
    assert f'<a href="{notebooks.FINAL_STACK}.html">' in text and "12_load.html" not in text
    later = (root / "index at 15_embedded_model").read_text()
    assert "Not complete: 1 of 3 reports" in later and '<a href="12_load.html">' in later
    last = (root / TABLE).with_name("index.html").read_text()
    assert "Not complete" not in last and "lean, cached" in last


def test_the_recipe_beside_the_index_is_a_program(answered):
    root, _ = answered
    (script,) = (root / TABLE).parent.glob("recipe-near-lossless.py")
    text = script.read_text()
    compile(text, str(script), "exec")
    assert "cpu/near-lossless" in text and "NVIDIA H100 80GB HBM3" in text


def test_a_short_run_says_on_its_pages_what_it_leaves_out(answered):
    root, _ = answered
    page = (root / TABLE).with_name("12_load.html").read_text()
    said = "<li>requests of one measurement (<code>requests</code>): 20 instead of 100</li>"
    assert "What this short run leaves out" in page and said in page
    index = (root / TABLE).with_name("index.html").read_text()
    assert "the pages of 12, 13, 15 say what: <code>make report THOROUGH=1</code>" in index


def test_a_run_that_was_killed_before_the_answer_came_again_brings_it_up_to_date(answered):
    root, _ = answered
    state = root / f"build/cpu/{notebooks.FINAL_STACK}.json"
    before = state.read_text()
    state.write_text(json.dumps(json.loads(before) | {"early": True}))
    output = io.StringIO()
    try:
        assert run(FakeParams(left_out=(LEFT_OUT,)), root, PROVENANCE, stream=output) == 0
        assert "2 of 3 notebooks unchanged" in output.getvalue() and "12 rows, all found" in output.getvalue()
        assert not json.loads(state.read_text()).get("early")
    finally:
        state.write_text(before)


def test_on_a_gpu_the_answer_is_shown_while_its_notebook_still_runs(tmp_path, monkeypatch):
    from fluxnb.report import run as running

    monkeypatch.setattr(running, "LIVE_S", 0.05)
    place, shown = own(FakeParams(), tmp_path), []
    place.reports.mkdir(parents=True)
    with running._shown_live(place, lambda: shown.append(count_rows(place.table))):
        time.sleep(0.2)
        assert not shown
        place.table.write_text("notebook\na\n")
        time.sleep(0.5)
    assert shown == [{"a": 1}]  # once, for nothing more was added


def test_of_a_notebook_that_is_being_measured_the_index_says_so(answered):
    root, _ = answered
    copy, stem = root / "copy", notebooks.FINAL_STACK
    (copy / "build/cpu").mkdir(parents=True)
    (copy / "notebooks").symlink_to(root / "notebooks")
    (copy / TABLE).parent.mkdir(parents=True)
    (copy / TABLE).write_bytes((root / TABLE).read_bytes())
    (copy / f"build/cpu/{stem}.json").write_text('{"status": "running"}')
    text = publish.publish_so_far(own(FakeParams(), copy), stem).read_text()
    assert "being measured" in text and "lean, cached" in text and "Not complete: 3 of 3 reports" in text


# --- how long -----------------------------------------------------------------------------------------------

H100 = {"machine": "NVIDIA H100 80GB HBM3", "finished": "2026-11-26T10:00:00+00:00"}


def said(tmp_path, mine, theirs, stems, rows=None, **changed):
    """What is said of a run's length beside planted records, and the seconds that its progress goes by."""
    from fluxnb.report.console import Progress

    params = FakeParams(**changed)
    place = own(params, tmp_path)
    for folder, records in ((place.reports, mine), (tmp_path / params.report_dir, theirs)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / durations.FILE).write_text(json.dumps(records))
    output = io.StringIO()
    progress = Progress(stems, output, {})
    _say_how_long(stems, params, place, PROVENANCE, rows or {}, progress)
    return output.getvalue().strip(), progress.before


def test_how_long_it_takes_in_all_is_what_was_recorded(tmp_path):
    theirs = {"a": {"short": {"seconds": 3000.0, **H100}}, "b": {"short": {"seconds": 660.0, **H100}}}
    text, seconds = said(tmp_path, {}, theirs, ["a", "b"])
    assert text == "about 1:01 h in all, as measured on NVIDIA H100 80GB HBM3"
    assert seconds == {"a": {"seconds": 3000.0}, "b": {"seconds": 660.0}}
    mine = {"a": {"short": {"seconds": 60.0, **H100}}}  # one's own comes first
    assert said(tmp_path, mine, theirs, ["a", "b"])[0].startswith("about 12:00 min in all")


def test_what_is_not_recorded_is_not_made_up(tmp_path):
    assert said(tmp_path, {}, {}, ["a", "b"]) == (
        "how long it takes in all isn't known: no run of it is recorded yet",
        {},
    )
    slow = {"short": {"seconds": 60.0, **H100, "machine": "A slow CPU"}}
    text, seconds = said(tmp_path, {}, {"a": slow}, ["a", "b"], rows={"a": 3})
    assert text == (
        "about 1:00 min for 1 of 2 notebooks, as measured on A slow CPU (another machine), less for 3 rows that are "
        "there already; how long b takes isn't recorded"
    )
    assert seconds == {}  # of another machine they say nothing of what is left


def test_a_thorough_run_is_the_most_that_a_short_one_takes(tmp_path):
    theirs = {"a": {"thorough": {"seconds": 600.0, **H100}}}
    more = {"left_out": (LEFT_OUT,)}
    assert said(tmp_path, {}, theirs, ["a"], **more)[0].startswith("at most 10:00 min in all")
    assert said(tmp_path, {}, theirs, ["a"], thorough=True, **more)[0].startswith("about 10:00 min in all")
    short = {"a": {"short": {"seconds": 60.0, **H100}}}
    assert "isn't known" in said(tmp_path, short, {}, ["a"], thorough=True, **more)[0]
    for thorough in (True, False):  # where there is nothing more to do they are the same
        assert said(tmp_path, {}, theirs, ["a"], thorough=thorough)[0].startswith("about 10:00 min in all")
        assert said(tmp_path, short, {}, ["a"], thorough=thorough)[0].startswith("about 1:00 min in all")


def test_a_run_records_how_long_all_of_it_took(answered):
    root, _ = answered
    kept = read_json((root / TABLE).with_name(durations.FILE))
    state = read_state(root / "build/cpu", notebooks.FINAL_STACK)
    (took,) = kept.values()  # the others measured nothing
    assert took["short"]["seconds"] == round(state["measuring_s"], 1) and took["short"]["machine"] == H100["machine"]


OK = {"status": "ok", "asked": 12, "found": 0, "seconds": 100.0, "thorough": False, "measuring_s": 100.0}


@pytest.mark.parametrize(
    "state, before, took",
    [
        ({}, {}, 100.0),
        ({"found": 12, "seconds": 4.0}, OK, 90.0),  # nothing new
        ({"asked": 20, "found": 12, "thorough": True}, OK, 190.0),  # a thorough run after a short one
        ({"found": 5}, {"status": "running"}, 190.0),  # killed, and gone on with
        ({"found": 5}, {"status": "failed"}, 190.0),
        ({"found": 5}, OK | {"thorough": True, "asked": 20}, None),
    ],
)
def test_rows_that_are_found_took_their_time_before(state, before, took):
    assert durations.measuring(OK | {"measuring_s": None} | state, before, 90.0) == took
    assert durations.measuring(OK | state, before, None) == (100.0 if not state.get("found") else None)


def test_a_killed_run_took_until_its_last_row(answered):
    root, _ = answered
    place, stem = own(FakeParams(), root), notebooks.FINAL_STACK  # rows of 2026-11-20, midnight
    running = {"status": "running", "started": "2026-11-19T23:59:00+00:00", "measuring_s": 5.0}
    assert durations.carried(running, place, stem) == 65.0
    assert durations.carried(running | {"measuring_s": None}, place, stem) is None
    assert durations.carried(OK, place, stem) == 100.0 and durations.carried({}, place, "05") == 0.0


# --- what stands on its own -----------------------------------------------------------------------------------


def test_a_script_gets_the_polynomial_that_nobody_else_knows():
    gates = [TeaCache(0.4), Both(TeaCache(0.2), FirstBlock(0.3)), TeaCache(0.4, [1, 2])]
    made = [recipes.with_coefficients((Cache(gate),), (1.5, -2.0)) for gate in gates]
    one, two, kept = (recipes.code(parts) for parts in made)
    assert "TeaCache(0.4, coefficients=(1.5, -2.0))" in one and "TeaCache(0.2, coefficients=(1.5, -2.0))" in two
    assert "coefficients=(1.0, 2.0)" in kept


@pytest.mark.parametrize("target, tool", [("test", "pytest"), ("lint", "ruff, mypy"), ("explore", "jupyterlab")])
def test_a_target_says_in_a_sentence_what_its_tools_lack(target, tool):
    code = (
        "import importlib.util, sys, runpy\n"
        "importlib.util.find_spec, there = (lambda n, *r: None if n in "
        "('pytest', 'xdist', 'ruff', 'mypy', 'jupyterlab') else there(n, *r)), importlib.util.find_spec\n"
        f"sys.argv[1:] = [{target!r}]\nrunpy.run_module('fluxnb.report.preflight', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"fluxnb: `make {target}` can't run: ") and f" lacks {tool}" in done.stderr
