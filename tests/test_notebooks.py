"""The notebooks as they are committed, and a whole report made from them with the small parameter set."""

import ast
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import test_browser

from fluxnb import families, notebooks, params, stacks, study
from fluxnb.families import FEWER_STEPS, FIRST_BLOCK
from fluxnb.study.results import KEY, Results

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = notebooks.sources(ROOT)  # those that make reports
CODE_LINES, CELL_LINES = 90, 20
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
by_source = pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


def code_of(path):
    return [text(cell) for cell in cells(path) if cell["cell_type"] == "code"]


# --- as committed -------------------------------------------------------------------------------------------


def test_every_notebook_that_the_library_names_is_there_and_no_other():
    named = {value for name, value in vars(notebooks).items() if name.isupper() and isinstance(value, str)}
    assert {path.stem for path in NOTEBOOKS} == named | {"explore"}  # by hand only
    assert {path.stem for path in SOURCES} == set(params.NOTEBOOKS) == named - {"explore"}


@by_notebook
def test_nothing_that_a_run_leaves_is_committed(path):
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"tags"}
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


@by_notebook
def test_it_begins_with_its_title_and_question(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n\n\S", text(first))
    assert sum(len(re.findall(r"^# ", text(c), re.M)) for c in cells(path) if c["cell_type"] == "markdown") == 1


@by_source
def test_its_only_parameter_is_the_configuration_and_a_comment_says_where_the_rest_is(path):
    (cell,) = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert text(cell) == code_of(path)[0]
    assignment, comment = text(cell).splitlines()
    assert assignment == 'gpu: str = "cpu"  # the configuration: a file in params/'
    assert comment.startswith("# ") and "`python -m fluxnb params`" in comment
    example = re.search(rf'study\.begin\(gpu, "{path.stem}", (\w+)=', comment)
    assert example[1] in params.NOTEBOOKS[path.stem]


@by_source
def test_it_asks_for_parameters_that_there_are_and_for_all_of_them(path):
    trees = [ast.parse(source) for source in code_of(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {"given"} | {  # given, or g = s.given
        target.id
        for node in nodes
        if isinstance(node, ast.Assign)
        for targets, value in _pairs(node)
        for target in targets
        if isinstance(target, ast.Name) and isinstance(value, ast.Attribute) and value.attr == "given"
    }
    asked = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "id", None) in names or getattr(node.value, "attr", None) == "given")
    }
    assert asked == set(params.NOTEBOOKS[path.stem])


def _pairs(node):
    """(targets, value) of an assignment, also of a, b = c, d."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from (([one], value) for one, value in zip(target.elts, node.value.elts, strict=True))
        else:
            yield [target], node.value


@by_notebook
def test_its_code_is_short(path):
    lines = [line.strip() for source in code_of(path) for line in source.splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) <= CODE_LINES
    for source in code_of(path):
        assert len(source.splitlines()) <= CELL_LINES, source


@by_notebook
def test_it_has_no_plumbing(path):
    for source in code_of(path):
        assert not re.search(r"^\s*class ", source, re.M)  # techniques are the library's
        assert not re.search(r"^\s*%|^\s*!", source, re.M)  # plain Python, no shell
        assert not re.search(r"\bDataFrame\b|\.release\(|\balt=|\bunits=", source)


@by_source
def test_a_cell_ends_without_an_answer_that_nobody_asked_for(path):
    """The value of a last expression is displayed: what is shown is shown by `show`."""
    for source in code_of(path):
        last = ast.parse(source).body[-1]
        if isinstance(last, ast.Expr):
            assert isinstance(last.value, ast.Call) and "not_measured" not in ast.unparse(last.value), source


@by_source
def test_it_opens_the_study_under_its_own_name(path):
    assert f'study.begin(gpu, "{path.stem}")' in "\n".join(code_of(path))


@by_source
def test_it_spells_no_technique_stack_or_notebook(path):
    tables = (stacks.COMPILED, stacks.PHASES, stacks.WAYS, stacks.DIVIDED)
    names = {name for table in tables for name in table if not name.isalpha()}  # "all" may mean anything
    names |= {family.name for family in families.ALL}
    names |= set(params.NOTEBOOKS) - {path.stem}
    for source in code_of(path):
        for node in ast.walk(ast.parse(source)):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{node.value!r} in {source}"


@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_committed_rows_are_of_the_prompts_and_weights_that_are_committed(gpu):
    """Else nothing could be shown again, and nobody would find a row of theirs after an update."""
    s = study.Study(params.load(gpu, ROOT / "params"), notebooks.FIRST_BLOCK, ROOT)
    reference = Results(ROOT / s.params.report_dir / "results.csv").rows()
    (subject,) = s.judged
    assert subject.digest in {row.setting("inputs") for row in reference if row.notebook == s.notebook}
    first = subject.part(len(subject.prompts))
    assert first.digest in {row.setting("inputs") for row in reference if row.notebook == notebooks.FINAL_STACK}


# --- a whole report -----------------------------------------------------------------------------------------


def environment(root):
    """As `make report` sets it in a fresh terminal."""
    ours = ("FLUXNB_FORCE", "FLUXNB_PROGRESS", "HF_TOKEN")
    return {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONPATH": str(root)}


def report(root, *arguments):
    command = [sys.executable, "-m", "fluxnb", "report", "--gpu", "smoke", *arguments]
    return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, copy_project):
    """A copy of the project after its first report."""
    root = copy_project(tmp_path_factory.mktemp("whole"))
    done = report(root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root, done


@pytest.fixture(scope="module")
def folder(whole):
    return whole[0] / "reports/own/single_gpu/smoke"


@pytest.fixture(scope="module")
def rows(folder):
    return Results(folder / "results.csv").rows()


def test_the_report_has_every_page_the_rows_and_the_provenance(folder):
    made = {path.name for path in folder.iterdir()}
    beside = {"index.html", "explorer.html", "pages.json", "progress.md", "results.csv", "run.json", "durations.json"}
    assert made == beside | {f"{path.stem}.html" for path in SOURCES}
    about = json.loads((folder / "run.json").read_text())
    assert {"versions", "machine", "params", "commit", "started_at"} <= set(about)
    assert {name: state["status"] for name, state in about["notebooks"].items()} == {
        path.stem: "ok" for path in SOURCES
    }


def test_the_report_says_where_it_is_and_how_far_it_got(whole):
    root, done = whole
    lines = done.stdout.splitlines()
    assert lines[-1] == f"read it: {root / 'reports/own/single_gpu/smoke/index.html'}"
    for path in SOURCES:
        assert any(line.startswith("[") and f"] {path.stem} done in" in line for line in lines)
    assert "Traceback" not in done.stdout + done.stderr


def test_every_row_says_what_its_weights_are_and_every_failure_why(rows):
    assert {row.notebook for row in rows} >= {path.stem for path in SOURCES} - {notebooks.EMBEDDED}
    for row in rows:
        assert row.status in ("ok", "unavailable")
        assert bool(row.reason) == (row.status != "ok")
        assert row.weights in (("trained", "random") if row.model else ("random",))
        if row.status == "ok" and row.samples:
            assert row.n == len(row.samples) and row.latency_p50 > 0
        elif row.notebook == notebooks.SURVIVAL:  # right or not
            assert row.shown("verdict")
        elif row.status == "ok":  # a setting of a survey: judged, not timed
            assert row.images and row.model
            assert row.n is None and row.latency_p50 is None and 0 < row.ssim <= 1


def test_the_cache_was_compared_with_fewer_steps(rows):
    own = [row for row in rows if row.notebook == notebooks.FIRST_BLOCK and row.model == "embedded"]
    own = [row for row in own if row.setting("inferences") is None]  # which are compared with nothing
    wanted = params.load("smoke", ROOT / "params").notebooks[notebooks.FIRST_BLOCK]
    thresholds = [row.setting("threshold") for row in own if row.family == FIRST_BLOCK.name]
    assert set(wanted["thresholds"]) <= set(thresholds)
    assert [row.steps for row in own if row.family == FEWER_STEPS.name] == wanted["fewer_steps"]
    floors = [row for row in own if row.family == families.BASELINE.name]  # one for each group that it was timed with
    assert floors and all(floor.psnr_identical == 2 for floor in floors)  # a prompt is a prompt: the noise floor
    assert {row.baseline for row in own if row not in floors} <= {floor.id for floor in floors}
    for row in own:
        assert row.adherence is not None and row.ssim is not None
        assert row.psnr_db is not None or row.psnr_identical == 2
        assert 0 < row.computed_steps <= row.total_steps


def test_the_page_of_the_cache_shows_chart_images_and_table(folder):
    page = (folder / f"{notebooks.FIRST_BLOCK}.html").read_text(encoding="utf-8")
    pictures = re.findall(r"<img[^>]*>", page)
    assert len(pictures) >= 2 * 4 + 2  # two prompts by four columns, and the charts
    assert all(re.search(r'alt="[^"]+"', picture) for picture in pictures)
    assert sum("data:image/webp" in picture for picture in pictures) >= 2 * 4
    assert "near-lossless (worst image 35 dB or more)" in page and "fewer steps" in page


def test_pages_load_nothing_and_name_no_secret_or_home(folder):
    for page in folder.glob("*.html"):
        words = page.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|srcset|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", words), page.name
        assert not re.search(r"""<link[^>]*href\s*=\s*["']?\s*(?:https?:)?//""", words), page.name
        assert not re.search(r"""@import|url\(\s*["']?\s*(?:https?:)?//""", words), page.name
        assert not re.search(r"\bhf_[A-Za-z0-9]{20,}", words), page.name
        assert str(Path.home()) + "/" not in words, page.name


def test_again_unchanged_it_executes_nothing_within_seconds(whole, folder):
    root, _ = whole
    build = root / "build/smoke"
    kept = [p for p in (*folder.iterdir(), *build.glob("*.ipynb"), *build.glob("*.json"))]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}
    started = time.monotonic()
    done = report(root)
    took = time.monotonic() - started
    assert done.returncode == 0
    assert f"{len(SOURCES)} of {len(SOURCES)} notebooks unchanged" in done.stdout
    assert "started" not in done.stdout
    for path, (_, content) in before.items():
        assert path.read_bytes() == content, path.name
    for path in kept:
        if path.suffix in (".ipynb", ".csv") or path.parent == build:
            assert path.stat().st_mtime_ns == before[path][0], f"{path.name} was written again"
    assert took <= 20  # ten on an idle machine


@pytest.mark.skipif(test_browser.BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")
def test_pages_open_offline_without_a_request_or_a_complaint(folder):
    async def steps(tab):
        for page in sorted(folder.glob("*.html")):
            await tab.open(page.as_uri())
            assert tab.requests() == [page.as_uri()]
            assert tab.complaints() == []
            broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
            assert await tab.value(broken) == 0, page.name

    test_browser.drive(steps)


# --- killed half-way ----------------------------------------------------------------------------------------


def keys(path):
    return [json.dumps([getattr(row, name) for name in KEY], sort_keys=True) for row in Results(path).rows()]


@pytest.mark.thorough
def test_a_killed_report_does_not_measure_twice(tmp_path, copy_project):
    """kill -9 of the command, as a user does it: its kernel has to go away by itself, and finished rows stay."""
    root = copy_project(tmp_path)
    table = root / "reports/own/single_gpu/smoke/results.csv"
    command = [sys.executable, "-m", "fluxnb", "report", "--gpu", "smoke", "--only", "05"]
    process = subprocess.Popen(
        command, cwd=root, env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kernels = []
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            # complete lines: the header and two rows
            if table.exists() and table.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        kernels = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(kernels, timeout=20)
        assert not alive, "the notebook's process outlived the command"
    finally:
        for orphan in (process, *kernels):
            if orphan.poll() is None if isinstance(orphan, subprocess.Popen) else orphan.is_running():
                orphan.kill()
    before = table.read_bytes()
    whole_lines = before[: before.rfind(b"\n") + 1]
    finished = len(Results(table).rows())
    everything = 18  # every setting of 28 and of four steps, and what is made right after loading
    assert 2 <= finished < everything

    done = report(root, "--only", "05")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    after = table.read_bytes()
    assert after.startswith(whole_lines)
    found = Counter(keys(table))
    assert len(found) == everything
    # only the baseline is timed again, beside what was still to be measured
    again = {row.family for row, key in zip(Results(table).rows(), keys(table), strict=True) if found[key] > 1}
    assert again <= {families.BASELINE.name}
    with table.open(newline="") as file:
        runs = [row["run_id"] for row in csv.DictReader(file)]
    assert len(set(runs)) == 2 and runs[:finished] == [runs[0]] * finished


# --- a notebook that fails ----------------------------------------------------------------------------------


def test_a_model_that_turns_out_unreadable_fails_its_notebook_with_the_sentence(tmp_path, copy_project):
    root = copy_project(tmp_path)
    model = root / "model"
    (root / "fluxnb/models/weights/embedded").rename(model)  # moved and linked, not copied: it is large
    (root / "fluxnb/models/weights/embedded").symlink_to(model, target_is_directory=True)
    broken = root / "broken"
    broken.mkdir()
    for part in model.iterdir():
        (broken / part.name).symlink_to(part, target_is_directory=part.is_dir())
    (broken / "transformer").unlink()
    (broken / "transformer").mkdir()
    (broken / "transformer/config.json").write_bytes((model / "transformer/config.json").read_bytes())
    (broken / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"half a file")
    smoke = (root / "params/smoke.yaml").read_text(encoding="utf-8")
    smoke = smoke.replace("study:\n", f"study:\n  models: ['{broken}']\n", 1)
    (root / "params/smoke.yaml").write_text(smoke, encoding="utf-8")
    done = report(root, "--only", "01")
    assert done.returncode == 1
    assert re.search(r"01_baseline FAILED at cell \d+: UserError: .*broken.* cannot be read", done.stdout), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert (root / "build/smoke/01_baseline.failed.ipynb").exists()
    assert "cannot be read" in (root / "reports/own/single_gpu/smoke/01_baseline.html").read_text(encoding="utf-8")
