"""The command line says what is wrong in one sentence, ends with status 2, and shows no traceback."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxnb import installed, notebooks, params
from fluxnb.__main__ import main
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.report import kernel, own, preflight, publish, zygote
from fluxnb.report.run import fingerprint
from fluxnb.study.results import Results

ROOT = Path(__file__).resolve().parents[1]
SMOKE = (ROOT / "params/smoke.yaml").read_text(encoding="utf-8")


def configure(root, text, name="mine"):
    """A configuration of the user's: any device, and these lines."""
    (root / f"params/{name}.yaml").write_text("gpu:\n  match: any\n" + text, encoding="utf-8")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    """A sentence comes before anything starts."""

    def execute(*_, **__):
        raise AssertionError("a notebook was run")

    monkeypatch.setattr(kernel, "execute", execute)
    for names in ("IMPORTED", "FOR_MODELS"):
        monkeypatch.setattr(zygote, names, [])


def refused(capsys, *arguments):
    """The one line on stderr of a command that ends with status 2 before anything is measured."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert "started" not in out and "Traceback" not in err
    assert err.startswith("fluxnb: ") and err.count("\n") == 1 and err.endswith(".\n"), err
    return err


def test_a_misspelled_key(user_root, capsys):
    configure(user_root, "study:\n  step: 20\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "params/mine.yaml" in text and "study.step" in text and "did you mean steps?" in text


def test_a_misspelled_section(user_root, capsys):
    configure(user_root, "05_first_block_cach:\n  thresholds: [0]\n")
    assert "did you mean 05_first_block_cache?" in refused(capsys, "report", "--gpu", "mine")


@pytest.mark.parametrize(
    "line, parts",
    [
        ("study:\n  steps: many\n", ["study.steps", '"many"', "a whole number from 1 to 200"]),
        ("study:\n  steps: true\n", ["study.steps", "true", "a whole number"]),
        ("study:\n  guidance_scale: 99\n", ["study.guidance_scale", "99", "from 0 to 30"]),
        ("study:\n  prompts: a cat\n", ["study.prompts", '"a cat"', "list"]),
    ],
)
def test_a_wrong_type_or_value(user_root, capsys, line, parts):
    configure(user_root, line)
    text = refused(capsys, "report", "--gpu", "mine")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("command", ["report", "render"])
def test_an_unknown_gpu(user_root, capsys, command):
    text = refused(capsys, command, "--gpu", "h10")
    assert "GPU=h10" in text and "did you mean h100?" in text and "h200x8" in text


def test_the_wrong_gpu(user_root, capsys, on_cpu):
    text = refused(capsys, "report", "--gpu", "h100")
    assert "H100" in text and "no CUDA device" in text and "FORCE=1" in text and "GPU=cpu" in text


@pytest.fixture
def given(monkeypatch):
    """What a notebook's kernel would be given, by its name; it fails at once."""
    found = {}
    for name in ("FLUXNB_FORCE", "FLUXNB_REPLAY"):
        monkeypatch.setenv(name, "")  # so that they are put back afterwards

    def execute(notebook, target, parameters, root, *, log, zygote, progress):
        found[notebook.stem] = {name: os.environ[name] for name in ("FLUXNB_FORCE", "FLUXNB_REPLAY")}
        return {"status": "failed", "error": "not run in a test"}

    monkeypatch.setattr(kernel, "execute", execute)
    monkeypatch.setattr(publish, "publish", lambda place: [])
    return found


def test_the_wrong_gpu_by_force(user_root, on_cpu, given, capsys):
    assert main(["report", "--gpu", "h100", "--force", "--only", "05", "--only", "01"]) == 1
    assert list(given) == ["01_baseline", "05_first_block_cache"]
    assert given["01_baseline"]["FLUXNB_FORCE"] == "1"  # what the notebooks' processes go by
    assert "reports/own/single_gpu/h100/index.html" in capsys.readouterr().out


def test_a_replay_needs_no_gpu_but_something_that_was_measured(user_root, capsys, on_cpu, given):
    assert "no committed reference for GPU=h100x2" in refused(capsys, "report", "--gpu", "h100x2", "--replay")
    folder = user_root / "reports/single_gpu/h100"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    assert main(["report", "--gpu", "h100", "--replay", "--only", "05"]) == 1
    assert given["05_first_block_cache"]["FLUXNB_REPLAY"] == str(folder / "run.json")
    assert "reports/single_gpu/h100/index.html" in capsys.readouterr().out


def test_a_reference_of_what_was_not_run(user_root, capsys):
    assert "no run of yours to take over" in refused(capsys, "reference", "--gpu", "h100")


def test_a_missing_token(user_root, capsys, no_hub):
    configure(user_root, "study:\n  models: [black-forest-labs/FLUX.1-dev]\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "HF_TOKEN" in text and "https://huggingface.co/black-forest-labs/FLUX.1-dev" in text


@pytest.mark.parametrize("key", ["models", "distilled"])
def test_an_unknown_model(user_root, capsys, key):
    configure(user_root, f"study:\n  {key}: [embeded]\n")
    assert "There is no model 'embeded'" in refused(capsys, "report", "--gpu", "mine")


def test_an_unreadable_model_folder(user_root, capsys):
    (user_root / "model").mkdir()
    configure(user_root, "study:\n  models: [./model]\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "model is not a model folder" in text and "model_index.json" in text


def test_a_corrupted_table(user_root, capsys):
    configure(user_root, "")
    table = user_root / "reports/own/single_gpu/mine/results.csv"
    table.parent.mkdir(parents=True)
    table.write_text("this is no table\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "results.csv line 1" in text and "restore it from git" in text
    assert table.read_text() == "this is no table\n"


def test_nothing_to_render(user_root, capsys):
    assert "make report" in refused(capsys, "render", "--gpu", "smoke")


def test_an_unknown_notebook(user_root, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(user_root)
    text = refused(capsys, "report", "--gpu", "smoke", "--only", "77")
    assert "'77'" in text and "05_first_block_cache" in text


def test_no_project(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "site/fluxnb/installed.py"))
    assert "params/base.yaml" in refused(capsys, "report")


def test_the_list_of_parameters(user_root, capsys):
    assert main(["params"]) == 0
    text = capsys.readouterr().out
    for path in ("study.steps", "gpu.match", "05_first_block_cache.thresholds", "study.full_size.width"):
        assert f"{path}: " in text
    assert "allowed: a whole number from 1 to 200" in text


def test_ctrl_c_is_no_traceback(user_root, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "check", interrupted)
    assert main(["report", "--gpu", "smoke"]) == 130
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["report", "--gpus", "cpu"]])
def test_a_misspelled_command_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: fluxnb" in capsys.readouterr().err


# --- as a user sees it --------------------------------------------------------------------------------------


def process(folder, *arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "FLUXNB_FORCE")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def command(folder, *arguments):
    return process(folder, "-m", "fluxnb", *arguments)


@pytest.mark.parametrize(
    "lines, part",
    [("study:\n  sedes: [1]\n", "did you mean seeds?"), ("study:\n  models: [someone/else/x]\n", "There is no model")],
    ids=["key", "model"],
)
def test_a_mistake_in_a_process_of_its_own(user_root, lines, part):
    configure(user_root, lines)
    done = command(user_root, "report", "--gpu", "mine")
    assert done.returncode == 2
    assert "started" not in done.stdout and part in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


UNCHANGED = """
import sys
from fluxnb.__main__ import main
status = main(["report", "--gpu", "smoke"])
loaded = {"torch", "numpy", "diffusers", "papermill", "nbconvert", "pandas", "matplotlib"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else status)
"""


def test_nothing_to_do_is_quick_and_loads_nothing_heavy(user_root):
    """All notebooks were executed and published: then it is said, and that is all."""
    chosen = params.load("smoke")
    place = own(chosen, user_root)
    place.build.mkdir(parents=True)
    place.reports.mkdir(parents=True)
    for path in (place.table, place.reports / "run.json", place.reports / "index.html"):
        path.write_text("")
    prints = {p.stem: fingerprint(p, chosen) for p in notebooks.sources(user_root)}
    for stem, print_ in prints.items():
        (place.build / f"{stem}.ipynb").write_text("{}")
        (place.build / f"{stem}.json").write_text(json.dumps({"status": "ok", "fingerprint": print_}))
        (place.reports / f"{stem}.html").write_text("")
    (place.build / publish.STAMP).write_text(publish._made_from(place))
    start = time.monotonic()
    done = process(user_root, "-c", UNCHANGED)
    assert done.returncode == 0, done.stderr
    assert f"{len(prints)} of {len(prints)} notebooks unchanged" in done.stdout and "read it: " in done.stdout
    assert time.monotonic() - start < 10


# --- what a run needs ---------------------------------------------------------------------------------------


@pytest.fixture
def lacking(monkeypatch):
    """A function that makes this interpreter lack packages."""
    find = importlib.util.find_spec

    def lack(*modules):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find(name))

    return lack


def test_packages_that_are_missing_are_named_together_with_what_installs_them(user_root, capsys, lacking):
    lacking("papermill", "yaml", "skimage")
    text = refused(capsys, "report", "--gpu", "cpu")
    assert "lacks pyyaml, scikit-image, papermill" in text
    assert f"install with: {sys.executable} -m pip install -e '.[study]'" in text


def test_templates_that_are_not_found(user_root, capsys, monkeypatch):
    """As where packages were installed in a folder of PYTHONPATH."""
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_: ["/nowhere"])
    assert "set JUPYTER_PATH=" in refused(capsys, "report", "--gpu", "cpu")


def test_a_full_or_unwritable_disk(user_root, capsys, monkeypatch, lacking):
    usage = shutil.disk_usage(user_root)._replace(free=2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    lacking("papermill")
    text = refused(capsys, "report", "--gpu", "cpu")
    assert f"{user_root} has 0.5 GiB free and 2 are needed" in text and "lacks papermill" in text  # all of it
    assert text.count("GiB free") == 1
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"{user_root} can't be written to" in refused(capsys, "report", "--gpu", "cpu")


def test_an_old_python(user_root, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "OLDEST", (4, 0))
    assert "is Python 3" in refused(capsys, "report", "--gpu", "cpu")


@pytest.mark.parametrize("free, refuses", [(["80000", "81000"], False), (["80000", "12288"], True), ([], False)])
def test_a_gpu_without_room(user_root, monkeypatch, free, refuses):
    """nvidia-smi is pretended; where it says nothing, nothing is refused."""
    smi = user_root / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in free))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    chosen = params.load("h100x2")
    if not refuses:
        preflight.check_memory(chosen)
        return
    with pytest.raises(UserError, match="^GPU 1 has 12 GiB free and flux-dev-random needs 38: end what else runs"):
        preflight.check_memory(chosen)
    preflight.check_memory(params.load("cpu"))


def test_an_interpreter_without_any_package(user_root):
    """-I -S: as a system's own Python, which has the standard library only."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from fluxnb.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["report"], ["render"], ["site"], ["rows"]):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, *arguments], cwd=user_root, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert "pyyaml" in done.stderr and "torch" in done.stderr and "pip install" in done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tables(user_root):
    """A reference and an own table: ids of the baseline and of a cached row."""
    key = {"notebook": "05_first_block_cache", "gpu": "cpu", "host": "h", "versions": "v", "weights": "trained"}
    key |= {"model": "embedded", "status": "ok", "session": "s1", "run_id": "r"}
    base = {"technique": "baseline", "family": "baseline", "label": "28 steps", "latency_p50": 0.4, "n": 3}
    cache = {"technique": "First Block Cache", "family": "First Block Cache", "label": "FBCache 0.12"}
    ids = []
    for folder in ("reports/single_gpu/cpu", "reports/own/single_gpu/cpu"):
        table = Results(user_root / folder / "results.csv")
        samples = {"samples": [0.4, 0.41, 0.39], "again": [0.4, 0.4, 0.4]}
        first = table.append(key | base | samples | {"host": folder[:9]})
        settings = {"settings": {"threshold": 0.12}, "latency_p50": 0.2, "speedup": 2.0, "baseline": first.id}
        ids.append((first.id, table.append(key | cache | settings | {"host": folder[:9]}).id))
    return dict(zip(("reference", "own"), ids, strict=True))


def test_a_row_is_printed_with_everything_about_it(tables, capsys):
    first, cached = tables["own"]
    assert main(["rows", cached]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"row {cached}, own: reports/own/single_gpu/cpu/results.csv\n")
    for part in (
        "FBCache 0.12",
        '{"threshold": 0.12}',
        "speedup",
        "s1",
        f"baseline {first}: 28 steps",
        "0.4 0.41 0.39",
    ):
        assert part in text, part
    assert "psnr_db" not in text  # what wasn't measured
    assert main(["rows", tables["reference"][0][:8]]) == 0
    assert capsys.readouterr().out.startswith(f"row {tables['reference'][0]}, reference: reports/single_gpu/cpu/")


def test_rows_are_listed(tables, capsys):
    assert main(["rows", "--notebook", "05", "--technique", "first block"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["id", "whose"] and len(lines) == 2
    assert lines[0].split()[:5] == [tables["own"][1], "own", "cpu", "s1", "0.2"]
    assert "2.00×" in lines[1] and "reference" in lines[1] and lines[1].endswith("FBCache 0.12")


def test_rows_that_are_not_there(tables, capsys):
    assert "There is no row 1234567890" in refused(capsys, "rows", "1234567890")
    assert "There is no notebook '77'" in refused(capsys, "rows", "--notebook", "77")
    assert "No row fits" in refused(capsys, "rows", "--gpu", "h200")
