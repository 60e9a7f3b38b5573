"""progress.md and the table of documents: every line has the rows that answer it, or the reason."""

import csv
import re
from dataclasses import replace
from pathlib import Path

from measured import cached, row, stacked

from fluxnb import families, notebooks, params, stacks
from fluxnb.findings import documents, published
from fluxnb.models import embedded, pipelines
from fluxnb.report import configurations, progress
from fluxnb.report import rows as tables
from fluxnb.study.row import FIELDS

ROOT = Path(__file__).resolve().parents[1]
FP8 = {"family": families.QUANTIZATION.name, "technique": "TorchAO FP8 per row", "weights": "random"}
FP8 |= {"settings": {"quantization": "torchao fp8 row"}, "notebook": notebooks.QUANTIZATION}


def answer(rows, item, document="plan 1"):
    """What is said of the first line of a document that has this text."""
    found = documents.answers(rows)
    return next(a for a in found if a.line.document.startswith(document) and item in a.line.item)


def test_progress_is_ticked_by_rows():
    nothing = progress.progress_md("cpu", [], [])
    ticked = re.findall(r"- \[x\] .*\((.*)\)", nothing)
    assert ticked and all((ROOT / by).exists() or by.startswith("make ") for by in ticked)  # by what the project has
    few = {"steps": 4, "total_steps": 4, "model": embedded.SCHNELL}
    rows = [replace(cached(t, 2.5, 30, 8.0), id=f"row{t}", psnr_min_db=28.0, **few) for t in (0.05, 0.12, 0.2)]
    some = progress.progress_md("cpu", rows, [])
    item = "FBCache testing completed (row0.05, row0.12, row0.2: 3 rows of 05_first_block_cache)"
    assert (
        f"- [x] {item}" in some
        and "- [ ] TeaCache testing completed (no row yet: it takes `make report GPU=cpu ONLY=06" in some
    )
    assert answer(rows, "Conservative 0.05").state == documents.MET
    assert answer(rows[:2], "Conservative 0.05").said == "no threshold 0.2 in 05_first_block_cache"
    assert answer(rows[:2], "FBCache testing completed").said == "only 2 of 3 in 05_first_block_cache"
    assert answer([replace(r, steps=28, model="embedded") for r in rows], "FBCache testing completed").rows == ()


def test_a_pass_mark_of_the_plans_is_answered_by_the_ledgers_rules():
    own = {"notebook": notebooks.FIRST_BLOCK, "gpu": "h100", "n": 10, "steps": 4, "width": 1024, "height": 1024}
    own |= {"model": "black-forest-labs/FLUX.1-schnell", "settings": {"dtype": "bfloat16"}}
    first = {"family": families.FIRST_BLOCK.name, "baseline": "b", "speedup": 2.5, "speedup_ci_low": 2.3, "id": "c"}
    first |= {"settings": {"dtype": "bfloat16", "threshold": 0.3}, "label": "FBCache 0.3", "speedup_ci_high": 2.7}
    base, mark = row(**own, id="b"), "FBCache achieving 2x+"
    met = answer([base, row(**own | first)], mark)
    assert met.state == documents.MET and met.ids == "c" and "2.50× [2.30, 2.70]" in met.said
    slow = {"speedup": 1.1, "speedup_ci_low": 1.05, "speedup_ci_high": 1.15}
    missed = answer([base, row(**own | first | slow)], mark)
    assert missed.state == documents.NOT_MET and missed.said.startswith("not reproduced")
    text = progress.progress_md("h100", [base, row(**own | first | slow)], [])
    assert f"- [ ] {mark} speedup (c: not reproduced" in text  # answered, but no tick
    assert answer([base, row(**own | first | {"n": 3})], mark).said.startswith("undecided: n = 3")
    small = answer([row(notebook=notebooks.FIRST_BLOCK), cached(0.1, 2.5, 30, 8.0)], mark)
    assert small.state == documents.OPEN and small.said.startswith("not run: it takes") and not small.rows


def test_what_no_machine_here_can_have_is_said_as_such():
    reasons = {a.line.item: a.said for a in documents.answers([]) if a.line.part == "Hardware configurations"}
    assert reasons["Single A100 (80GB)"] == "no A100 was to be had; `make report GPU=a100` is ready for one"
    assert "no machine with so many H100s" in reasons["8x H100 (80GB)"]
    assert "`make report GPU=h100x2 ONLY=11 THOROUGH=1`" in reasons["2x H100 (80GB)"]  # it can be had
    assert answer([stacked(None, gpu="a100")], "Single A100", "plan 4").state == documents.MET


def test_every_line_names_what_there_is():
    """A selector with a wrong name would keep its line open for ever."""
    stems, ways = {p.stem for p in notebooks.sources(ROOT)}, {f.name for f in families.ALL}
    committed = [r for c in configurations.configurations(ROOT) for r in c.rows]
    settings = {name for r in committed for name in r.settings} | {"backend", "soak_s", "condition", "loaded"}
    configured = {p.stem for p in (ROOT / "params").glob("*.yaml")}
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in documents.lines():
        assert bool(line.notebook) == bool(line.rows) and (line.rows or line.claim or line.by), line
        assert not line.notebook or line.notebook in stems, line
        for name, each in line.selected.items():
            values = {value for one in each for value in one}
            assert name in FIELDS or name in settings, (line.item, name)
            known = {"family": ways, "gpu": configured, "use_case": set(pipelines.USE_CASES)}
            assert values <= known.get(name, values), (line.item, values)
            if name == "model":
                assert all(pipelines.describe(value) for value in values)
        for name in line.shows.replace("|", " ").split():
            assert name.partition(".")[0] in FIELDS, (line.item, name)
        assert not line.claim or line.claimed in published.claims(), line.item
        made = line.by.startswith("make ") and f"\n{line.by.removeprefix('make ')}:" in targets
        assert not line.by or made or (ROOT / line.by).exists(), line.by


def test_the_documents_are_whole():
    found = documents.lines()
    assert len({line.document for line in found}) == 5 and len(found) > 250
    assert len({(line.document, line.part, line.item) for line in found}) == len(found)
    with documents.FILE.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == list(vars(found[0]))
    hardware = [line.selected["gpu"][0][0] for line in found if line.part == "Hardware configurations"]
    assert hardware == [f"{gpu}{of}" for of in ("", "x2", "x4", "x8") for gpu in ("a100", "h100")]
    assert {name for name in hardware if not params.load(name, ROOT / "params")} == set()


def test_no_line_is_without_rows_or_a_reason_and_every_id_exists():
    rows = [r for c in configurations.configurations(ROOT) for r in c.rows]
    known = {r.id for r in rows}
    for a in documents.answers(rows):
        assert a.said and (a.state == documents.MET or a.state == documents.NOT_MET or a.said), a
        assert all(r.id in known for r in a.rows), a
        assert a.rows or a.line.by or a.state == documents.OPEN or a.line.claim, a.line.item
    text = tables.of_documents(ROOT)
    assert all(line.item in text for line in documents.lines()) and "plan 4" in text


def test_what_cannot_run_is_open_with_its_reason():
    refused = answer(
        [row(**FP8, status="unavailable", reason="needs a GPU", id="r")], "FP8 quantization impl", "plan 2"
    )
    assert (refused.state, refused.said, refused.ids) == (documents.OPEN, "can't run here: needs a GPU", "r")
    assert answer([row(**FP8)], "FP8 quantization impl", "plan 2").state == documents.MET


def test_progress_names_what_cannot_run():
    text = progress.progress_md("cpu", [row(**FP8, status="unavailable", reason="needs a GPU")], [])
    assert "- TorchAO FP8 per row: needs a GPU" in text


def test_a_stack_that_cannot_run_is_called_by_its_name():
    failed = {"status": "oom", "reason": "too little memory"}
    rows = [stacked(stacks.BF16_STACK, technique="no search for hooks", **failed), row(technique="no search for hooks")]
    assert progress.cannot_run(rows) == {stacks.BF16_STACK: "too little memory"}
    assert progress.cannot_run([*rows, stacked(stacks.BF16_STACK)]) == {}


def test_progress_of_several_gpus_is_that_of_their_notebooks():
    rows = [stacked(stacks.ULYSSES, notebooks.PARALLEL, gpus=4, speedup=2.99, id="u")]
    text = progress.progress_md("h200x4", rows, [], several=True)
    assert "- [x] Test scaling efficiency across multiple GPUs (u: 1 row of 11_parallel)" in text
    assert "TeaCache testing" not in text and "- [ ] ParallelVAE" in text
    rows += [stacked("pulled, everything", notebooks.PARALLEL, gpus=4, settings={"vae": "parallel + compiled"}, id="v")]
    assert "- [x] ParallelVAE (v: 1 row of 11_parallel)" in progress.progress_md("h200x4", rows, [], several=True)
