"""Notebooks as jobs: in folders of their own, side by side, and their rows in one table."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from fluxnb import params
from fluxnb.errors import UserError
from fluxnb.report import own, read_state, sweep
from fluxnb.study.results import Results

ROOT = Path(__file__).resolve().parents[1]
ROW = """
import os
from fluxnb.study.results import Results
table = Results("reports/own/single_gpu/cpu/results.csv")
table.append(dict(notebook={stem!r}, technique=os.environ.get("CUDA_VISIBLE_DEVICES", "none"), settings={{}}, gpu="cpu",
                  weights="random", status="ok", host="m", versions="v", n=len(table.rows())))
"""
MEET = """
import time, pathlib
pathlib.Path("{root}/{own}").touch()
for _ in range(600):
    time.sleep(0.1)
    if pathlib.Path("{root}/{other}").exists():
        break
else:
    raise TimeoutError("alone")
"""


@pytest.fixture
def root(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "build" / "cpu").mkdir(parents=True)
    return tmp_path


def write(root, stem, *sources):
    given = new_code_cell(
        "gpu = 'cpu'\nmatmul_size = repeats = dtypes = full_size_steps = None", metadata={"tags": ["parameters"]}
    )
    nbformat.write(new_notebook(cells=[given, *map(new_code_cell, sources)]), root / "notebooks" / f"{stem}.ipynb")


def run(root, *stems, **more):
    said = []
    chosen = params.load("cpu", root / "params")
    found = sweep.sweep(chosen, own(chosen, root), list(stems), "here", False, said.append, **more)
    return found, said


def test_jobs_run_side_by_side_and_their_rows_are_in_one_table(root, monkeypatch):
    monkeypatch.setattr(sweep, "places", lambda chosen: [[0], [1]])
    table = Results(root / "reports/own/single_gpu/cpu/results.csv")
    table.append(
        dict(notebook="before", technique="t", gpu="cpu", weights="random", status="ok", host="m", versions="v")
    )
    write(root, "00_environment", MEET.format(root=root, own="a", other="b"), ROW.format(stem="00_environment"))
    write(root, "01_baseline", MEET.format(root=root, own="b", other="a"), ROW.format(stem="01_baseline"), "1 / 0")
    found, said = run(root, "00_environment", "01_baseline")
    assert found == {"00_environment": "", "01_baseline": ""} and len(said) == 2
    rows = table.rows()
    assert [r.notebook for r in rows][0] == "before" and len(rows) == 3
    assert {r.technique for r in rows[1:]} == {"0", "1"}  # a GPU each
    assert {r.n for r in rows[1:]} == {1}  # each began with what was there before
    build = root / "build" / "cpu"
    assert read_state(build, "00_environment")["status"] == "ok" and (build / "00_environment.ipynb").is_file()
    failed = read_state(build, "01_baseline")
    assert failed["status"] == "failed" and failed["error"] == "ZeroDivisionError: division by zero"
    assert (build / "01_baseline.failed.ipynb").is_file() and not (build / "01_baseline.ipynb").exists()


def test_a_job_that_dies_is_a_failed_notebook_and_what_it_measured_is_kept(root):
    write(
        root,
        "00_environment",
        ROW.format(stem="00_environment"),
        "import os, psutil; psutil.Process(os.getppid()).parent().kill()",  # beyond the zygote
    )
    found, _ = run(root, "00_environment")
    assert found["00_environment"].startswith("its process was ended by signal 9")
    state = read_state(root / "build" / "cpu", "00_environment")
    assert state["status"] == "failed" and "signal 9" in state["error"]
    assert [r.notebook for r in Results(root / "reports/own/single_gpu/cpu/results.csv").rows()] == ["00_environment"]


@pytest.mark.thorough
def test_jobs_call_the_machine_by_one_name(root):
    """A job has a table of its own; the name made up for a machine without GPUs is everybody's."""
    asks = "from pathlib import Path\nfrom fluxnb.measure import identity\nname = identity.host(Path('reports/own'))\n"
    for stem in ("00_environment", "01_baseline"):
        write(root, stem, asks + ROW.format(stem=stem).replace('host="m"', "host=name"))
        assert run(root, stem)[0] == {stem: ""}
    assert len({r.host for r in Results(root / "reports/own/single_gpu/cpu/results.csv").rows()}) == 1
    assert (root / "reports/own/hosts.json").is_file()


def test_a_way_that_is_not_there(root):
    with pytest.raises(UserError, match="^LAUNCH=cloud is no way to run notebooks: choose one of here, slurm"):
        sweep.sweep(params.load("cpu"), own(params.load("cpu"), root), [], "cloud", False)


def test_slurm_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="^LAUNCH=slurm needs Slurm's commands"):
        sweep.check_slurm()


@pytest.mark.parametrize(
    ("sinfo", "said"),
    [("echo Unable to contact slurm controller >&2; exit 1", "Unable to contact"), ("sleep 60", "within 0 s")],
)
def test_slurm_that_does_not_answer(monkeypatch, tmp_path, sinfo, said):
    for name, script in (("sbatch", "exit 0"), ("sinfo", sinfo)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sweep, "ANSWER_S", 0.4 if "sleep" in sinfo else 20)
    with pytest.raises(UserError, match=f"^Slurm doesn't answer.*{said}"):
        sweep.check_slurm()


def test_options_of_slurm(monkeypatch):
    monkeypatch.setenv("SLURM_OPTIONS", "partition=gpu time=600 account='my group'")
    assert sweep._slurm_options() == {"slurm_partition": "gpu", "timeout_min": 600, "slurm_account": "my group"}
    monkeypatch.setenv("SLURM_OPTIONS", "gpu")
    with pytest.raises(UserError, match="^SLURM_OPTIONS has 'gpu': write name=value"):
        sweep._slurm_options()


def test_one_place_for_each_group_of_gpus(monkeypatch):
    import torch

    one, two = params.load("h200"), params.load("h200x2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, chosen, expected in (
        (1, one, [None]),
        (3, one, [[0], [1], [2]]),
        (4, two, [[0, 1], [2, 3]]),
        (2, two, [None]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert sweep.places(chosen) == expected


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
def test_the_slurm_script_is_valid():
    assert subprocess.run(["sh", "-n", str(ROOT / "tests/slurm.sh")]).returncode == 0


@pytest.mark.parametrize(
    "options",
    ["partition='", "partition=a\\\nb", "'comment=a\nb'", "time=nan", "time=0", "time=-5", "__class__=x", "=x", "gpu"],
)
def test_options_of_slurm_that_no_script_may_hold_are_refused(monkeypatch, options):
    monkeypatch.setenv("SLURM_OPTIONS", options)
    with pytest.raises(UserError, match="^SLURM_OPTIONS") as error:
        sweep._slurm_options()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_options_of_slurm_are_taken_as_they_are_written(monkeypatch):
    monkeypatch.setenv("SLURM_OPTIONS", "partition=gpu time=600 mem-per-cpu=4G comment='two words'")
    wanted = {"slurm_partition": "gpu", "timeout_min": 600, "slurm_mem_per_cpu": "4G", "slurm_comment": "two words"}
    assert sweep._slurm_options() == wanted


SLURM = {  # a Slurm whose jobs wait for ever
    "sinfo": "exit 0",
    "srun": "exit 0",
    "sbatch": """[ "$(wc -l < jobs)" -lt "$(cat room)" ] || { echo "sbatch: error: invalid account" >&2; exit 1; }
        echo "$(wc -l < jobs) $(sed -n 's/#SBATCH --job-name=//p' "$1")" >> jobs
        echo "Submitted batch job $(wc -l < jobs)" """,
    "squeue": "cut -d' ' -f1 jobs",
    "scancel": """echo "$1" >> cancelled; grep -v -- " ${1#--name=}$" jobs > left; mv left jobs""",
}


@pytest.fixture
def slurm(root, monkeypatch):
    """A folder with the commands of a Slurm that never begins a job; `jobs` has a line for each that it holds."""
    (place := root / "slurm").mkdir()
    for name, script in SLURM.items():
        (place / name).write_text(f"#!/bin/sh\ncd {place}\n{script}\n")
        (place / name).chmod(0o755)
    (place / "jobs").touch()
    (place / "room").write_text("9")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    for stem in ("00_environment", "01_baseline"):
        write(root, stem, "1")
    return place


def launched(root) -> subprocess.Popen:
    """A process that runs two notebooks as jobs of Slurm."""
    code = (
        "import pathlib, sys\nfrom fluxnb import leftovers, params\nfrom fluxnb.report import own, sweep\n"
        f"root = pathlib.Path({str(root)!r})\nchosen = params.load('cpu', root / 'params')\n"
        "with leftovers.interrupts():\n"
        "    sweep.sweep(chosen, own(chosen, root), ['00_environment', '01_baseline'], 'slurm', False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
    )  # fmt: skip
    until(lambda: len(held(root / "slurm")) >= 2)
    return process


def held(slurm) -> list[str]:
    return (slurm / "jobs").read_text().splitlines()


def until(true) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_jobs_of_slurm_end_with_what_submitted_them(root, slurm, name):
    process = launched(root)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode and held(slurm) == []


def test_jobs_of_slurm_whose_launcher_was_killed_are_cancelled_by_the_next_whose_own_end_with_it(root, slurm):
    process = launched(root)
    process.kill()
    process.communicate(timeout=60)
    orphans = set(held(slurm))
    process = launched(root)
    until(lambda: len(held(slurm)) == 2 and not orphans & set(held(slurm)))
    process.terminate()
    process.communicate(timeout=60)
    assert len(orphans) == 2 and held(slurm) == []


def test_a_job_that_slurm_refuses_is_a_sentence_and_the_others_are_cancelled(root, slurm):
    (slurm / "room").write_text("1")
    with pytest.raises(UserError, match="^Slurm takes no job .sbatch: sbatch: error: invalid account.: see SLURM_OPT"):
        sweep.sweep(
            chosen := params.load("cpu", root / "params"), own(chosen, root), ["00_environment", "01_baseline"],
            "slurm", False,
        )  # fmt: skip
    assert held(slurm) == [] and (slurm / "cancelled").read_text().startswith("--name=fluxnb-cpu-00_environment-")


def test_a_slurm_that_cancels_nothing_is_said_with_what_to_do(root, slurm, capsys):
    (root / "job").mkdir()
    (root / "job" / sweep.SLURM_NAME).write_text("fluxnb-cpu-x-1")
    (slurm / "scancel").write_text("#!/bin/sh\nexit 1\n")
    sweep._cancel([sweep.Job("cpu", "x", root / "job", False)])
    assert "cancel what may be left with `scancel --name=fluxnb-cpu-x-1`" in capsys.readouterr().err
