"""Running and rendering notebooks, on small ones made here; kernels are real, so there are few of them."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fluxnb import report
from fluxnb.errors import UserError
from fluxnb.report import html, kernel, publish, read_state, zygote
from fluxnb.report.audit import MAX_PAGE_MB, check_page
from fluxnb.report.clean import clean
from fluxnb.report.console import Progress
from fluxnb.report.render import prepare
from fluxnb.report.run import check_parameters, fingerprint
from fluxnb.report.run import run as run_notebooks

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = zygote.IMPORTED + zygote.FOR_MODELS
zygote.IMPORTED, zygote.FOR_MODELS = ["ipykernel.kernelapp"], []  # the notebooks made here need no more
PROVENANCE = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "started_at": "2026-11-20T10:00:00+00:00",
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
    "machine": {"cpu": "A fast CPU", "cores": 2, "ram_gib": 16, "gpus": []},
}


@dataclasses.dataclass(frozen=True)
class FakeParams:
    """What the report machinery uses of fluxnb.params.Params."""

    name: str = "cpu"
    steps: int = 28
    extra: tuple = ()  # what papermill puts into every notebook
    values: tuple = ()  # what the notebook 01_good asks for
    thorough: bool = False
    left_out: tuple = ()  # of every notebook

    @property
    def gpu(self):
        return SimpleNamespace(count=1)

    @property
    def report_dir(self):
        return Path("reports/single_gpu") / self.name

    model = None

    @property
    def build_dir(self):
        return Path("build") / self.name

    @property
    def own_dir(self):
        return Path("reports/own/single_gpu") / self.name

    @property
    def notebooks(self):
        return {"01_good": dict(self.values)}

    def resolved(self):
        return {"gpu": {"match": "cpu"}, "study": {"steps": self.steps}}

    def added(self, stem):
        return list(self.left_out)

    def lacks(self, stem):
        return [] if self.thorough else self.added(stem)

    def for_notebook(self, stem):
        return {"gpu": self.name, **dict(self.extra)}


OWN = "reports/own/single_gpu/cpu"  # where a run of one's own goes
ROW = {"technique": "baseline", "family": "baseline", "gpu": "cpu", "host": "h", "versions": "v", "weights": "random"}
ROW |= {"status": "ok", "run_id": "r"}


def run(params, root, provenance=None, replay=False, **options):
    """Runs what is due in a project, as `make report` does."""
    place = report.reference(params, root) if replay else report.own(params, root)
    return run_notebooks(params, place, prepare=lambda: provenance or {}, **{"stream": io.StringIO()} | options)


def render(params, root, max_page_mb=None, replay=False):
    """The pages that `make render` writes."""
    place = report.reference(params, root) if replay else report.own(params, root)
    return publish.publish(place, max_page_mb)


def cell(source, *tags):
    return new_code_cell(textwrap.dedent(source).strip(), metadata={"tags": list(tags)})


def write_notebook(root, stem, *cells):
    """A notebook of the form all of ours have: a parameters cell after the introduction."""
    first = [
        new_markdown_cell(f"# Report {stem}\n\nWhat it is about."),
        cell('gpu: str = "cpu"  # name', "parameters"),
    ]
    path = root / "notebooks" / f"{stem}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[*first, *cells]), path)
    return path


GOOD = """
    import json, os, sys
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    from fluxnb.report import html

    html.callout("Threshold `0.2` is **2.1×** as fast <on average>.", "result")
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot([0, 0.1, 0.2], [1, 1.5, 2.1], marker="o")
    html.figure(figure, alt="Speedup rises from 1 to 2.1 as the threshold grows to 0.2", caption="Speedup")
    html.table(pd.DataFrame({"threshold": [0.1, 0.2], "speedup": [1.5, 2.1]}), "Speed per threshold")
    image = np.zeros((32, 32, 3), np.uint8)
    html.image_grid(["apple"], ["0", "0.2"], [[(image, "baseline"), (image, "2.1×")]], caption="Images")
    with open(os.environ["FLUXNB_PROGRESS"], "a") as file:
        event = {"notebook": "01_good", "done": 2, "found": 1, "total": 2, "label": "FBCache 0.1"}
        file.write(json.dumps(event) + "\\n")
    from fluxnb.study.results import Results
    for technique in ("baseline", "fbcache"):
        key = {"notebook": "01_good", "technique": technique, "gpu": "cpu", "host": "m", "versions": "v"}
        row = {**key, "family": "baseline", "weights": "random", "status": "ok", "run_id": "r"}
        Results("reports/own/single_gpu/cpu/results.csv").append(row)
"""
NOISY = """
    import os
    print("seen by readers, run for", gpu)
    print("\\r 10%|#         | 1/10 [00:01<00:09, 1.0it/s]", file=sys.stderr)
    print("a warning worth keeping from", os.path.join(os.getcwd(), "somewhere.py"), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose second of three notebooks fails, run and rendered once with this checkout."""
    root = tmp_path_factory.mktemp("project")
    write_notebook(root, "01_good", new_markdown_cell("## Chart\n\n### Detail\n\n## Chart"), cell(GOOD), cell(NOISY))
    write_notebook(
        root,
        "02_fails",
        cell("print('before')"),
        cell("raise ValueError('no such threshold')"),
        cell("print('never')"),
    )
    write_notebook(root, "03_after", cell("print('still here')"), cell("print('secret')", "hide"))
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        status = run(FakeParams(), root, PROVENANCE, stream=output)
        written = render(FakeParams(), root)
        yield {"root": root, "status": status, "output": output.getvalue(), "written": written}


def page(project, name):
    return (project["root"] / OWN / name).read_text(encoding="utf-8")


# --- running ---------------------------------------------------------------------------------------------


def test_failing_notebook_fails_the_run_and_is_kept_while_the_others_run(project):
    build = project["root"] / "build/cpu"
    assert project["status"] == 1
    assert sorted(p.name for p in build.glob("*.ipynb")) == [
        "01_good.ipynb",
        "02_fails.failed.ipynb",
        "03_after.ipynb",
    ]
    assert "[2/3] 02_fails FAILED at cell 4: ValueError: no such threshold" in project["output"]
    assert "[3/3] 03_after done in" in project["output"]


def test_run_json_has_the_provenance_and_how_each_notebook_went(project):
    record = json.loads((project["root"] / OWN / "run.json").read_text())
    assert record["commit"] == PROVENANCE["commit"]
    assert record["notebooks"]["01_good"]["rows"] == 2
    assert record["notebooks"]["01_good"]["executed_cells"] == record["notebooks"]["01_good"]["cells"] == 4
    failed = record["notebooks"]["02_fails"]
    assert (failed["status"], failed["failed_cell"], failed["executed_cells"]) == ("failed", 4, 3)


def appended(table, stem, day):
    """A row that was measured on that day of the month."""
    from fluxnb.study.results import Results  # here, for a second run must do without what it imports

    Results(table).append(ROW | {"notebook": stem, "measured_at": f"2026-11-{day}T10:00:00+00:00"})


def test_a_replay_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    write_notebook(tmp_path, "01_once", cell("import os; assert not os.environ.get('FLUXNB_REPLAY')"))
    assert run(FakeParams(), tmp_path, PROVENANCE) == 0
    render(FakeParams(), tmp_path)
    appended(tmp_path / OWN / "results.csv", "01_once", "01")
    publish.to_reference(FakeParams(), tmp_path)
    folder = tmp_path / "reports/single_gpu/cpu"
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file() and p.suffix != ".log"}
    monkeypatch.setenv("FLUXNB_REPLAY", str(folder / "run.json"))
    output, later = io.StringIO(), PROVENANCE | {"commit": "fedcba9876543210", "replayed": True}
    again = {"provenance": later, "root": tmp_path, "stream": output, "replay": True}
    assert run(FakeParams(), **again) == 1 and "01_once FAILED at cell 3: AssertionError" in output.getvalue()
    render(FakeParams(), tmp_path, replay=True)
    assert {p: p.read_bytes() for p in kept} == kept
    write_notebook(tmp_path, "01_once", cell("print('shown again')"))
    appended(folder / "results.csv", "02_other", "09")
    before = json.loads((folder / "pages.json").read_text())["01_once"]["state"]
    assert run(FakeParams(), **again) == 0
    render(FakeParams(), tmp_path, replay=True)
    page = (folder / "01_once.html").read_text()
    assert "shown again" in page and "fedcba9876" in page and "Page made anew" in page and "2026-11-01 10:00" in page
    state = json.loads((folder / "pages.json").read_text())["01_once"]["state"]
    assert (state["seconds"], state["finished"]) == (before["seconds"], before["finished"])  # of the measuring
    assert (folder / "run.json").read_bytes() == kept[folder / "run.json"]  # of the run that measured
    mine = {p: data for p, data in kept.items() if p.is_relative_to(tmp_path / OWN) or p.parent.name == "cpu"}
    assert {p: p.read_bytes() for p in mine if p.parent != folder} == {p: mine[p] for p in mine if p.parent != folder}


def test_a_run_of_ones_own_leaves_the_reference_alone_and_shows_it_beside(tmp_path):
    write_notebook(tmp_path, "01_once", cell("1"))
    write_notebook(tmp_path, "02_never", cell("2"))
    theirs = tmp_path / "reports/single_gpu/cpu"
    appended(theirs / "results.csv", "01_once", "01")
    (theirs / "01_once.html").write_text("theirs")
    (theirs / "pages.json").write_text("{}")
    publish.site(tmp_path)
    kept = {p: p.read_bytes() for p in (tmp_path / "reports").rglob("*.*")}
    assert run(FakeParams(), tmp_path, only=["01"]) == 0
    appended(tmp_path / OWN / "results.csv", "01_once", "02")
    render(FakeParams(), tmp_path)
    assert {p: p.read_bytes() for p in kept} == kept
    index = (tmp_path / OWN / "index.html").read_text()
    for address in ("../../../single_gpu/cpu/index.html", "../../../single_gpu/cpu/01_once.html", "../../index.html"):
        assert f'href="{address}"' in index and (tmp_path / OWN / address).is_file(), address
    front = (tmp_path / "reports/own/index.html").read_text()
    for address in ("single_gpu/cpu/index.html", "../single_gpu/cpu/index.html"):
        assert f'href="{address}"' in front, address


def test_what_is_taken_over_into_the_reference_is_beside_what_was_there(tmp_path):
    write_notebook(tmp_path, "01_once", cell("1"))
    write_notebook(tmp_path, "02_theirs", cell("2"))
    with pytest.raises(UserError, match="run 'make report GPU=cpu' first"):
        publish.to_reference(FakeParams(), tmp_path)
    theirs = tmp_path / "reports/single_gpu/cpu"
    appended(theirs / "results.csv", "02_theirs", "01")
    (theirs / "02_theirs.html").write_text("theirs")
    facts = {"title": "Theirs", "status": "ok", "finding": "", "problem": "", "state": {"started": "2026-11-01"}}
    (theirs / "pages.json").write_text(json.dumps({"02_theirs": facts}))
    assert run(FakeParams(), tmp_path, PROVENANCE, only=["01"]) == 0
    appended(tmp_path / OWN / "results.csv", "01_once", "02")
    render(FakeParams(), tmp_path)
    index = publish.to_reference(FakeParams(), tmp_path)
    assert index == theirs / "index.html"
    rows = list(csv.DictReader((theirs / "results.csv").open(encoding="utf-8")))
    assert [r["notebook"] for r in rows] == ["02_theirs", "01_once"]
    assert "Report 01_once" in (theirs / "01_once.html").read_text() and (theirs / "02_theirs.html").exists()
    assert 'href="01_once.html"' in index.read_text() and 'href="02_theirs.html"' in index.read_text()
    assert json.loads((theirs / "run.json").read_text())["commit"] == PROVENANCE["commit"]
    assert 'href="single_gpu/cpu/index.html"' in (tmp_path / "reports/index.html").read_text()


def test_kernel_is_not_installed_for_other_programs(project):
    from jupyter_client.kernelspec import KernelSpecManager

    assert kernel.KERNEL not in KernelSpecManager().find_kernel_specs()
    assert "JUPYTER_PATH" not in os.environ or "fluxnb-" not in os.environ["JUPYTER_PATH"]


def test_second_run_skips_what_succeeded_and_imports_no_torch(project):
    code = """
        import sys, time
        sys.path.insert(0, {tests!r})
        from pathlib import Path
        import test_report
        for name in ("torch", "diffusers", "papermill", "matplotlib", "nbconvert"):
            assert name not in sys.modules, name
            sys.modules[name] = None  # importing it from here on is an error
        def prepare():
            raise AssertionError("nothing has to be prepared")
        params = test_report.FakeParams()
        place = test_report.report.own(params, Path({root!r}))
        sys.exit(test_report.run_notebooks(params, place, prepare=prepare, only=["01", "03_after"]))
    """
    before = (project["root"] / OWN / "run.json").read_bytes()
    start = time.monotonic()
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(code.format(tests=str(REPOSITORY / "tests"), root=str(project["root"]))),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "2 of 2 notebooks unchanged" in again.stdout
    assert time.monotonic() - start < 10
    assert (project["root"] / OWN / "run.json").read_bytes() == before


def test_notebooks_run_beside_a_package_that_hides_what_papermill_imports(tmp_path):
    write_notebook(tmp_path, "01_one", cell("print('it ran')"))
    (tmp_path / "site/entrypoints").mkdir(parents=True)  # as xfuser 0.7.0 has it
    (tmp_path / "site/entrypoints/__init__.py").touch()
    code = (
        "import entrypoints; assert not hasattr(entrypoints, 'get_group_all')\n"
        "from pathlib import Path\nfrom test_report import FakeParams, run\n"
        f"raise SystemExit(run(FakeParams(), Path({str(tmp_path)!r})))"
    )
    path = os.pathsep.join(str(folder) for folder in (tmp_path / "site", REPOSITORY / "tests", REPOSITORY))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "it ran" in (tmp_path / "build/cpu/01_one.ipynb").read_text()


def test_killed_run_leaves_nothing_that_counts_as_success(tmp_path):
    from fluxnb.study.row import COLUMNS

    write_notebook(
        tmp_path,
        "01_slow",
        cell("import os, time; open('started', 'w').write(f'{os.getpid()} {os.getppid()}'); time.sleep(120)"),
    )
    (tmp_path / OWN).mkdir(parents=True)
    (tmp_path / OWN / "results.csv").write_text(",".join(COLUMNS) + "\n")
    (tmp_path / OWN / "01_slow.html").write_text("from an earlier run")
    params = FakeParams()
    # even an earlier success with the same fingerprint doesn't count once a new execution has begun
    build = tmp_path / "build/cpu"
    build.mkdir(parents=True)
    source = tmp_path / "notebooks/01_slow.ipynb"
    (build / "01_slow.ipynb").write_bytes(source.read_bytes())
    state = {"status": "ok", "fingerprint": fingerprint(source, params)}
    (build / "01_slow.json").write_text(json.dumps(state))
    code = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY / 'tests')!r}, {str(REPOSITORY)!r}]\n"
        "from pathlib import Path\nfrom test_report import FakeParams, run\n"
        f"run(FakeParams(), Path({str(tmp_path)!r}), force=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "started").exists() and (tmp_path / "started").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(UserError, match="Another run of cpu"):
        run(params, root=tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(ended(int(pid)) for pid in (tmp_path / "started").read_text().split())  # no orphans
    assert read_state(build, "01_slow")["status"] == "running"
    assert not (build / "01_slow.failed.ipynb").exists()
    (index,) = [p for p in render(params, tmp_path) if p.name == "index.html"]
    assert "the last run was interrupted" in index.read_text()
    # repaired and run again, it is executed although its page and an executed notebook are there
    write_notebook(tmp_path, "01_slow", cell("print('quick now')"))
    assert run(params, root=tmp_path) == 0
    assert "quick now" in (build / "01_slow.ipynb").read_text()
    assert not (build / "01_slow.tmp.ipynb").exists()


def test_dead_kernel_is_a_failure_with_a_sentence(tmp_path):
    write_notebook(tmp_path, "01_dies", cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    output = io.StringIO()
    assert run(FakeParams(), root=tmp_path, stream=output) == 1
    assert "FAILED at cell 3: DeadKernelError: the notebook's process died" in output.getvalue()
    render(FakeParams(), tmp_path)
    assert "process died" in (tmp_path / OWN / "01_dies.html").read_text()


# --- kernels ---------------------------------------------------------------------------------------------


def ended(pid: int) -> bool:
    """Whether a process has ended within ten seconds."""
    for _ in range(100):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return True
    return False


FACTS = """
    import json, os, numpy
    facts = {"pid": os.getpid(), "parent": os.getppid(), "folder": os.getcwd(), "drawn": numpy.random.rand()}
    facts |= {"events": os.environ["FLUXNB_PROGRESS"], "left": [os.environ.pop("LEFT", ""), getattr(json, "left", "")]}
    os.environ["LEFT"] = json.left = "behind"
    open(f"facts-{len(os.listdir('.'))}.json", "w").write(json.dumps(facts))
"""


def facts_of(root):
    return [json.loads(p.read_text()) for p in sorted(root.glob("facts-*"), key=lambda p: p.stat().st_mtime_ns)]


def test_notebooks_run_in_processes_of_their_own_and_no_crash_reaches_the_next(tmp_path):
    write_notebook(tmp_path, "01_one", cell(FACTS))
    write_notebook(tmp_path, "02_leaves", cell("import os; os._exit(3)"))
    write_notebook(tmp_path, "03_dies", cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    write_notebook(tmp_path, "04_two", cell(FACTS))
    write_notebook(tmp_path, "05_kills", cell("import os, time; os.kill(os.getppid(), 9); time.sleep(60)"))
    write_notebook(tmp_path, "06_alone", cell(FACTS))
    output = io.StringIO()
    assert run(FakeParams(), tmp_path, stream=output) == 1
    assert output.getvalue().count("DeadKernelError") == 3 and output.getvalue().count(" done in ") == 3
    one, two, alone = facts = facts_of(tmp_path)
    for name in ("pid", "events", "drawn"):
        assert len({f[name] for f in facts}) == 3, name
    assert all(f["folder"] == str(tmp_path) and f["left"] == ["", ""] for f in facts)
    assert one["parent"] == two["parent"] != os.getpid() == alone["parent"]  # the zygote; then there was none any more
    assert all(ended(f[name]) for f, name in ((one, "parent"), (one, "pid"), (two, "pid"), (alone, "pid")))


def test_where_a_process_can_not_be_forked_kernels_are_started_and_it_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(zygote, "sys", SimpleNamespace(platform="darwin"))
    for stem in ("01_one", "02_two"):
        write_notebook(tmp_path, stem, cell(FACTS))
    output = io.StringIO()
    assert run(FakeParams(), tmp_path, stream=output) == 0
    assert {f["parent"] for f in facts_of(tmp_path)} == {os.getpid()}
    assert output.getvalue().count("every notebook imports for itself: only Linux forks") == 1


@pytest.fixture
def zygote_of(tmp_path, monkeypatch):
    """Starts the zygote that imports these modules."""
    (tmp_path / "build").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with contextlib.ExitStack() as stack:

        def start(modules):
            monkeypatch.setattr(zygote, "IMPORTED", modules)
            return stack.enter_context(zygote.Zygote(tmp_path, {}))

        yield start


def test_what_notebooks_import_leaves_nothing_that_a_fork_would_lose(tmp_path, zygote_of):
    code = """if True:
        import json, os, sys
        loaded = [name for name in json.loads(sys.argv[1]) if name not in sys.modules]
        import torch
        threads, started = len(os.listdir("/proc/self/task")), torch.cuda.is_initialized()
        ones = torch.ones(512, 512)
        print(torch.get_num_threads(), bool(ones.matmul(ones).sum() == 512**3), flush=True)
        json.dump([loaded, threads, started, torch.initial_seed()], open(sys.argv[2], "w"))
        os._exit(7)
    """
    source = zygote_of(NEEDED)
    assert source.trouble() == ""
    seeds = set()
    for name in ("one", "two"):
        pid = source.ask("fork", code, [json.dumps(NEEDED), name], dict(os.environ), str(tmp_path))
        assert zygote.Kernel(source, pid).wait() == 7
        *facts, seed = json.loads((tmp_path / name).read_text())
        assert facts == [[], 1, False]
        seeds.add(seed)
    assert len(seeds) == 2
    fresh = [sys.executable, "-c", "import torch; print(torch.get_num_threads(), True)"]
    said = (tmp_path / "build/imports.log").read_text().splitlines()[-2:]
    assert said == subprocess.run(fresh, capture_output=True, text=True).stdout.splitlines() * 2


def test_a_thread_that_an_import_has_started_makes_every_notebook_import_for_itself(tmp_path, zygote_of):
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    (tmp_path / "threaded.py").write_text(code)
    assert zygote_of(["threaded"]).trouble() == "imports have left 2 threads running"


def test_parameters_the_notebook_does_not_define_are_refused(tmp_path):
    path = write_notebook(tmp_path, "01_good")
    check_parameters(path, {"gpu": "cpu"})
    with pytest.raises(UserError, match="thresold.*it defines gpu"):
        run(FakeParams(extra=(("thresold", 0.2),)), root=tmp_path)
    assert not (tmp_path / "build").exists()


def test_notebook_without_parameters_cell_and_unknown_notebook_are_refused(tmp_path):
    path = write_notebook(tmp_path, "01_good")
    with pytest.raises(UserError, match="choose from 01_good"):
        run(FakeParams(), root=tmp_path, only=["07"])
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1")]), path)
    with pytest.raises(UserError, match="no cell tagged 'parameters'"):
        run(FakeParams(), root=tmp_path)


def test_fingerprint_follows_source_tags_and_params_but_not_outputs(tmp_path):
    path = write_notebook(tmp_path, "01_good", cell("1 + 1"))
    before = fingerprint(path, FakeParams())
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].outputs = [new_output("stream", text="2")]
    nbformat.write(notebook, path)
    assert fingerprint(path, FakeParams()) == before
    changed = {fingerprint(path, FakeParams(steps=8)), fingerprint(path, FakeParams(values=(("n", 1),)))}
    notebook.cells[-1].source = "1 + 2"
    nbformat.write(notebook, path)
    changed.add(fingerprint(path, FakeParams()))
    assert before not in changed and len(changed) == 3


# --- progress --------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def follow(stream, tmp_path, *events, before=None):
    progress = Progress(["01_a", "02_b"], stream, before)
    file = tmp_path / "progress.jsonl"
    file.write_text("")
    progress.start("01_a", file)
    for event in events:
        with open(file, "a") as out:
            out.write(json.dumps(event) + "\n")
        time.sleep(0.6)
    text = progress.text()
    last = progress.stop()
    state = {"status": "ok", "seconds": 75, "asked": last.get("done"), "found": last.get("found", 0)}
    progress.finished("01_a", state)
    progress.close()
    return text


def test_progress_on_a_terminal_is_one_line_that_updates(tmp_path):
    stream = Terminal()
    events = [{"done": n, "total": 12, "label": f"FBCache {n}"} for n in (2, 3)]
    text = follow(stream, tmp_path, *events, before={"01_a": {"rows": 12}})
    assert text.startswith("[1/2] 01_a · 3 of 12 rows · FBCache 3 · ") and "left in this notebook" in text
    written = stream.getvalue()
    assert written.count("\r") >= 4
    assert written.endswith("[1/2] 01_a done in 1:15 min, 3 rows\n")


def test_progress_elsewhere_is_plain_lines(tmp_path):
    stream = io.StringIO()
    follow(stream, tmp_path, {"done": 1, "total": 12}, {"done": 2, "total": 12})
    assert stream.getvalue() == "[1/2] 01_a started\n[1/2] 01_a done in 1:15 min, 2 rows\n"


def test_progress_says_of_rows_and_time_only_what_is_known(tmp_path):
    all_asked = {"done": 3, "total": 3, "label": "a"}  # so far: the notebook may ask for more
    assert follow(Terminal(), tmp_path, all_asked) == "[1/2] 01_a · 3 rows · a · 1 s so far"
    more = follow(Terminal(), tmp_path, {"done": 2, "total": 13}, before={"01_a": {"rows": 12}})
    assert more == "[1/2] 01_a · 2 rows · 1 s so far"  # it wasn't the same after all
    over = follow(Terminal(), tmp_path, {"done": 2, "total": 3}, before={"01_a": {"seconds": 0.4}})
    assert "left" not in over  # it takes longer than last time, nobody knows how much
    known = follow(Terminal(), tmp_path, {"done": 2, "total": 3}, before={"01_a": {"seconds": 60}, "02_b": {}})
    assert known.endswith(" · about 59 s left in this notebook")
    both = {"01_a": {"seconds": 60}, "02_b": {"seconds": 30}}
    assert follow(Terminal(), tmp_path, {"done": 2, "total": 3}, before=both).endswith(" · about 1:29 min left")
    last = [{"done": n, "total": 3} for n in (2, 3)]
    assert "left" not in follow(Terminal(), tmp_path, *last, before={"01_a": {"rows": 3}})


def test_progress_counts_found_rows_as_found(tmp_path):
    found = {"done": 3, "found": 3, "total": 3, "label": "found in the results"}
    stream, before = Terminal(), {"01_a": {"rows": 12, "seconds": 60}}
    text = follow(stream, tmp_path, found, before=before)
    assert text == "[1/2] 01_a · 3 of 12 rows, all found · found in the results · 1 s so far"  # how long is not known
    assert stream.getvalue().endswith("done in 1:15 min, 3 rows, all found\n")
    text = follow(Terminal(), tmp_path, found, {"done": 4, "found": 3, "total": 12}, before=before)
    assert "4 of 12 rows, 3 of them found" in text and "left in this notebook" in text  # by the one that was measured


def test_rows_in_all_are_known_from_a_run_of_the_very_same_notebook(project):
    from fluxnb.report.run import _before

    state = read_state(project["root"] / "build/cpu", "01_good")
    assert (state["asked"], state["found"]) == (2, 1)
    assert _before(state, state["fingerprint"]) == {"rows": 2}  # its seconds are of fewer rows than will be measured
    assert _before(state | {"found": 0}, "another") == {"seconds": state["seconds"]}
    running = {"status": "running", "before": {"fingerprint": "f", "asked": 7, "seconds": 3}}
    assert _before(running, "f") == {"rows": 7, "seconds": 3} and _before({}, "f") == {"seconds": None}


# --- rendering -------------------------------------------------------------------------------------------


def test_every_notebook_is_rendered_also_the_failed_one(project):
    assert [p.name for p in project["written"]] == [
        "01_good.html",
        "02_fails.html",
        "03_after.html",
        "index.html",
    ]


def test_pages_load_nothing(project):
    for path in project["written"]:
        check_page(path.read_text(encoding="utf-8"), path.stem)
        scripts = re.findall(r"<script[^>]*>", path.read_text(encoding="utf-8"))
        assert set(scripts) <= {'<script data-of="page">'}  # the study's own, in the page


def test_page_has_title_navigation_contents_and_folded_code(project):
    text = page(project, "01_good.html")
    assert '<html lang="en">' in text and "<title>Report 01_good · cpu · fluxnb</title>" in text
    assert text.count("<h1>") == 1
    assert 'href="#chart"' in text and 'href="#chart-2"' in text and 'id="chart-2"' in text
    assert 'rel="next" href="02_fails.html"' in text and 'rel="prev"' not in text
    assert text.count('<details class="code">') == 4 and "<details open" not in text
    assert "Parameters of this run" in text
    assert "0123456789" in text and "A fast CPU, 2 cores, 16 GiB" in text and "<dd>2</dd>" in text


def test_page_shows_outputs_with_descriptions_and_folds_messages(project):
    text = page(project, "01_good.html")
    assert 'alt="Speedup rises from 1 to 2.1 as the threshold grows to 0.2"' in text
    assert text.count("data:image/svg+xml") == 1 and text.count("data:image/webp") == 2
    assert 'alt="apple, 0.2: 2.1×"' in text
    assert "<code>0.2</code> is <strong>2.1×</strong> as fast &lt;on average&gt;" in text
    assert '<pre class="printed">seen by readers, run for cpu</pre>' in text
    assert "a warning worth keeping from somewhere.py" in text and text.count("10%|") == 1  # in the code only
    assert "still here" in page(project, "03_after.html") and "secret" not in page(project, "03_after.html")


def test_failed_page_has_a_banner_and_a_plain_traceback(project):
    text = page(project, "02_fails.html")
    assert '<div class="failed" role="alert"><strong>FAILED at cell 4: ValueError: no such threshold</strong>' in text
    assert 'href="#cell-4"' in text and 'id="cell-4"' in text
    assert "Traceback" in text and "\x1b" not in text and "papermill-error" not in text


def test_index_lists_status_time_rows_and_what_failed(project):
    text = page(project, "index.html")
    assert '<a href="01_good.html">Report 01_good</a>' in text and '<a href="02_fails.html">' in text
    assert "Not complete: 1 of 3 reports" in text
    assert "Report 02_fails: FAILED at cell 4: ValueError: no such threshold" in text
    assert "Threshold 0.2 is 2.1× as fast &lt;on average&gt;." in text
    assert '<a href="results.csv">' in text and '<a href="run.json">' in text


def test_rendering_again_changes_no_file(project):
    stamps = [p.stat().st_mtime_ns for p in project["written"]]
    assert [p.stat().st_mtime_ns for p in render(FakeParams(), project["root"])] == stamps


def test_a_page_that_is_there_stays_as_it_is_and_linked(tmp_path):
    target = executed(tmp_path, new_code_cell("1"))
    write_notebook(tmp_path, "02_other")
    render(FakeParams(), tmp_path)
    before = target.read_text()
    assert before.count('rel="next" href="index.html#02_other"') == 2  # until it has a page: its line in the index
    shutil.rmtree(tmp_path / "build")  # `make clean`
    build = tmp_path / "build/cpu"
    build.mkdir(parents=True)
    nbformat.write(nbformat.read(tmp_path / "notebooks/02_other.ipynb", 4), build / "02_other.ipynb")
    (build / "02_other.json").write_text('{"status": "ok"}')
    render(FakeParams(), tmp_path)
    index = (target.parent / "index.html").read_text()
    assert '<a href="01_good.html">' in index and '<a href="02_other.html">' in index and "not run" not in index
    assert 'id="02_other"' in index and target.read_text() == before
    assert (target.parent / "02_other.html").read_text().count('rel="prev" href="01_good.html"') == 2
    target.unlink()
    render(FakeParams(), tmp_path)
    assert "not run yet" in (target.parent / "index.html").read_text()


def test_a_page_is_published_when_a_run_was_killed_before_that(tmp_path):
    target, place = executed(tmp_path, new_code_cell("1")), report.own(FakeParams(), tmp_path)
    assert not publish._is_published(place)
    render(FakeParams(), tmp_path)
    assert publish._is_published(place)
    (tmp_path / "build/cpu/01_good.json").write_text('{"status": "ok", "started": "2026-11-26"}')
    assert not publish._is_published(place)
    render(FakeParams(), tmp_path)
    (target.parent / "index.html").unlink()
    assert not publish._is_published(place)


def test_a_later_page_that_came_with_the_repository_is_not_replaced_by_an_earlier_one(tmp_path):
    target, state = executed(tmp_path, new_code_cell("1")), tmp_path / "build/cpu/01_good.json"

    def made(here, there):
        state.write_text(json.dumps({"status": "ok", **here}))
        (target.parent / "pages.json").unlink(missing_ok=True)
        render(FakeParams(), tmp_path)
        kept = json.loads((target.parent / "pages.json").read_text())
        kept["01_good"]["state"] |= there
        (target.parent / "pages.json").write_text(json.dumps(kept))
        target.write_text(target.read_text().replace("<main", "<!-- pulled --><main", 1))
        render(FakeParams(), tmp_path)
        return "<!-- pulled -->" in target.read_text()

    early, late = "2026-11-21T10:00:00+00:00", "2026-11-22T10:00:00+00:00"
    assert made({"started": early, "finished": early}, {"started": late})  # made anew from the same rows, say
    assert not made({"started": late, "finished": early}, {"started": early})
    assert made({"finished": early}, {"finished": late}) and not made({"finished": late}, {"finished": late})


def executed(root, *cells):
    """An executed notebook as papermill would leave it, without running it."""
    path = write_notebook(root, "01_good")
    build = root / "build/cpu"
    build.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(path, 4)
    notebook.cells.extend(cells)
    nbformat.write(notebook, build / "01_good.ipynb")
    (build / "01_good.json").write_text('{"status": "ok"}')
    return root / OWN / "01_good.html"


def shown(data, **metadata):
    return new_code_cell("show()", outputs=[new_output("display_data", data=data, metadata=metadata)])


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def test_image_without_alt_is_refused_naming_the_cell_and_its_old_page_goes(tmp_path):
    target = executed(tmp_path, shown({"image/png": PIXEL}))
    target.parent.mkdir(parents=True)
    target.write_text("old")
    with pytest.raises(UserError, match="01_good has an image without alt text in cell 2"):
        render(FakeParams(), tmp_path)
    assert not target.exists()
    assert "not rendered" in (target.parent / "index.html").read_text()
    executed(tmp_path, shown({"image/png": PIXEL}, **{"image/png": {"alt": 'A "red" pixel'}}))
    render(FakeParams(), tmp_path)
    assert 'alt="A &quot;red&quot; pixel"' in target.read_text()


@pytest.mark.parametrize(
    "markup",
    [
        "<img alt='a' src='https://example.org/a.png'>",
        "<img alt='a' src='images/a.png'>",
        "<script src='//example.org/a.js'></script>",
        "<link rel='stylesheet' href='http://example.org/a.css'>",
        "<style>@import 'https://example.org/a.css';</style>",
        "<p style=\"background: url('https://example.org/a.png')\">a</p>",
        "<iframe src='https://example.org'></iframe>",
    ],
)
def test_nothing_is_loaded_from_elsewhere(tmp_path, monkeypatch, markup):
    target = executed(tmp_path, shown({"text/html": markup}))
    render(FakeParams(), tmp_path)
    assert "example.org" not in target.read_text() and "images/a.png" not in target.read_text()
    monkeypatch.setattr("fluxnb.report.render.clean", lambda markup: markup)  # nor published where it isn't cleaned
    with pytest.raises(UserError, match="would load .* in cell 2"):
        render(FakeParams(), tmp_path)


def test_links_are_allowed(tmp_path):
    target = executed(tmp_path, new_markdown_cell("See [the paper](https://example.org/paper)."))
    render(FakeParams(), tmp_path)
    assert 'href="https://example.org/paper"' in target.read_text()


def test_widgets_scripts_and_tokens_do_not_reach_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-a-real-token-42")
    widget = "application/vnd.jupyter.widget-view+json"
    target = executed(
        tmp_path,
        shown({widget: {"model_id": "abc"}, "text/plain": "HBox(children=())"}),
        shown({widget: {"model_id": "abc"}, "text/html": "<p>static form</p>"}),
        shown({"application/javascript": "alert(1)"}),
        shown({"text/plain": "token not-a-real-token-42 and hf_abcdefghijklmnopqrstu"}),
    )
    render(FakeParams(), tmp_path)
    text = target.read_text()
    assert "HBox" not in text and "alert(1)" not in text and "model_id" not in text
    assert "static form" in text
    assert "token [HF_TOKEN] and [token removed]" in text


HOSTILE = [
    "<script>pwned()</script>",
    "<img alt='x' src=x onerror=pwned()>",
    "<a href='javascript:pwned()'>x</a>",
    "<svg/onload=pwned()>",
    "<iframe src=//pwned></iframe>",
    "<table><tr><td onclick='pwned()'>1</td></tr></table>",
    "<math><mtext><table><mglyph><style><img alt='x' src onerror=pwned()>",
    "<style>@import '//pwned'</style>",
    "<form action=//pwned><button>x</button></form>",
    "<a href='data:text/html,<script>pwned()</script>'>x</a>",
]


@pytest.mark.parametrize("kind", ["text/html", "text/markdown"])
def test_what_a_cell_displays_runs_and_loads_nothing(tmp_path, kind):
    target = executed(tmp_path, *(shown({kind: f"before {markup} after"}) for markup in HOSTILE))
    render(FakeParams(), tmp_path)
    text = target.read_text()
    text = text[text.index("<h1") :]  # behind the style sheet
    assert text.count("before ") == len(HOSTILE) and "pwned" not in re.sub(r"&lt;.*?&gt;", "", text)


def test_what_this_project_displays_is_published_as_it_is():
    frame = pd.DataFrame({"a": [1.5], "<b>": ["<i>"]})
    made = [html.table_html(frame, "A <caption>", units={"a": "s"}), html.callout_html("`0.2` is **2x**", "result")]
    made += [html.image_grid_html(["r"], ["c"], [[(np.zeros((8, 8, 3), np.uint8), "x & <y>")]], caption="C")]
    assert [clean(markup) for markup in made] == made


def test_stream_output_reads_as_a_terminal_leaves_it(tmp_path):
    text = "one\rtwo\n\x1b[31mred\x1b[0m\n 50%|█████     | 14/28 [00:01<00:01]\n" + f"{tmp_path}/fluxnb/a.py\n"
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[new_output("stream", name="stderr", text=text)])])
    prepare(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text == "two\nred\nfluxnb/a.py"


def test_page_over_the_limit_is_refused_naming_its_size(tmp_path):
    executed(tmp_path, shown({"text/html": "x" * 300_000}))
    with pytest.raises(UserError, match=r"01_good is 0\.3 MB, more than the 0\.2 MB allowed"):
        render(FakeParams(), tmp_path, max_page_mb=0.2)
    assert MAX_PAGE_MB == 15


def test_render_without_executed_notebooks_says_what_to_do(tmp_path):
    write_notebook(tmp_path, "01_good")
    with pytest.raises(UserError, match="run 'make report GPU=cpu' first"):
        publish.render(FakeParams(), tmp_path)


# --- pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (1.2, "1.20"),
        (9.999, "10.0"),
        (45.67, "45.7"),
        (-123.4, "−123"),
        (1234.5, "1230"),
        (4.56e-7, "4.56×10⁻⁷"),
        (float("inf"), "∞"),
    ],
)
def test_three_figures(value, text):
    assert html.three_figures(value) == text


def test_table_has_scopes_units_and_right_aligned_numbers():
    frame = pd.DataFrame({"technique": ["a<b", "c"], "p50": [0.12345, np.nan], "n": [12, 8], "share": [0.5, 0.25]})
    text = html.table_html(frame, "Latency", formats={"share": ".0%"}, units={"p50": "s"})
    assert '<th scope="col">technique</th>' in text
    assert '<th scope="col" class="fx-number">p50 <span class="fx-unit">(s)</span></th>' in text
    wide = html.table_html(pd.DataFrame({"a": ["x"], "every 3rd step after the first 6, and the last": [1.2]}), "Wide")
    assert '<th scope="col" class="fx-number fx-name">every 3rd' in wide  # it is given lines, not a screen's width
    assert '<th scope="row">a&lt;b</th><td class="fx-number">0.123</td><td class="fx-number">12</td>' in text
    assert (
        '<td class="fx-number">–</td>' in text and "50%" in text and "<caption><span>Latency</span></caption>" in text
    )
    assert '<th scope="row">first</th>' in html.table_html(frame.head(1).set_axis(["first"]), "With an index")
    with pytest.raises(ValueError, match="no column 'speed'"):
        html.table_html(frame, "Latency", units={"speed": "s"})


def test_figure_needs_a_description_is_closed_and_is_the_same_bytes_again():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def draw():
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        return figure

    with pytest.raises(ValueError, match="alt must say something"):
        html.figure_html(draw(), alt=" ")
    plt.close("all")
    first, second = (hashlib.sha256(html.figure_html(draw(), alt="A line").encode()).digest() for _ in range(2))
    assert first == second and not plt.get_fignums()


def test_image_grid_keeps_small_images_exact_and_names_what_is_absent():
    import base64

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    uri, size = html.webp_uri(image)
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
    assert size == (48, 40) and np.array_equal(decoded, image)
    assert html.webp_uri(np.zeros((64, 1024, 3), np.uint8))[1] == (512, 32)
    text = html.image_grid_html(["p"], ["0", "1", "2"], [[(image, "c", "own words"), "out of memory", None]])
    assert 'alt="own words"' in text and "out of memory" in text and "<td></td>" in text
    with pytest.raises(ValueError, match="1 rows of 2 cells"):
        html.image_grid_html(["p"], ["0", "1"], [[None]])


def test_a_finding_is_said_beside_the_result_that_is_shown(monkeypatch):
    import IPython.display

    given = []
    monkeypatch.setattr(IPython.display, "display", lambda shown, metadata=None: given.append(metadata))
    html.callout("Threshold `0.2` is **2.1×** as fast; 2 * 3 <is> 6.")
    html.callout("careful", "warning")
    assert given == [{"fluxnb": {"finding": "Threshold 0.2 is 2.1× as fast; 2 * 3 <is> 6."}}, None]


def test_callout_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="choose from result, note"):
        html.callout_html("text", "results")


def test_long_words_get_the_room_that_the_columns_leave():
    words = "why it cannot run here, and what would make it run here"
    few, many = ({"name": ["a"], **{str(i): [i] for i in range(n)}, "why": [words]} for n in (2, 9))
    assert 'class="fx-words"' in html.table_html(pd.DataFrame(few), "few columns")
    assert 'class="fx-long"' in html.table_html(pd.DataFrame(many), "many columns")


def test_provenance_leaves_out_what_is_not_known():
    assert html.provenance_html({}) == ""
    replayed = html.provenance_html({"started_at": "2026-11-22T02:50:00+00:00", "replayed": True})  # of no rows
    assert "Page made anew" in replayed and "Measured" not in replayed and "CUDA_VISIBLE_DEVICES" not in replayed
    four = html.provenance_html({"environment": {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}})
    assert "CUDA_VISIBLE_DEVICES" in four and "4,5,6,7" in four
    text = html.provenance_html(
        {"machine": {"gpus": [{"name": "NVIDIA H200"}] * 2}, "commit": "a" * 40, "dirty": True}, n=5
    )
    assert "2 × NVIDIA H200" in text and "aaaaaaaaaa + uncommitted changes" in text and "<dt>CPU</dt>" not in text


def test_written_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    report.write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_no_page_says_where_an_environment_is(tmp_path, monkeypatch):
    from fluxnb.report.render import _clean_text

    monkeypatch.syspath_prepend("/mnt/wheels")  # PYTHONPATH
    assert _clean_text("/mnt/wheels/anything/api.py:1: c", tmp_path) == "anything/api.py:1: c"
    elsewhere = "/mnt/others/torchao/api.py:1: c, /mnt/others/optimum/torch/x.py, /mnt/torchao.md"
    assert _clean_text(elsewhere, tmp_path) == "torchao/api.py:1: c, torch/x.py, /mnt/torchao.md"
    said = f"{tmp_path}/notebooks/x.py and /opt/some where/else "
    said += "/home/me/.venv/lib/python3.11/site-packages/other/a.py:7: b"
    cleaned = _clean_text(said, tmp_path)
    assert cleaned == "notebooks/x.py and /opt/some where/else site-packages/other/a.py:7: b"


def test_importing_what_executes_notebooks_compiles_no_grammars():
    """Those of IRIs: jsonschema would make them in a second of every run."""
    program = "import sys; from fluxnb.report import kernel; kernel._import_papermill(); print('lark' in sys.modules)"
    here = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True).stdout == b"False\n"
