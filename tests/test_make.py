"""The Makefile's promises. Nothing here makes an environment or runs a notebook."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxnb.report import preflight

ROOT = Path(__file__).parent.parent
TARGETS = "help report render site reference analysis params explore test soak lint train-embedded lock clean"
TARGETS = f"{TARGETS} clean-caches".split()

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make(*arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run make as from a fresh terminal: without what the make that runs these tests has handed down."""
    ours = "MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES MAKEFILES PYTHON BASE_PYTHON GPU ONLY FORCE REPLAY HOST".split()
    ours += "FLUXNB_HOST FLUXNB_GPU FLUXNB_MODEL ARGS UPGRADE PRICES MODEL SIZE TOKENS STEPS".split()
    env = {k: v for k, v in os.environ.items() if k not in ours} | variables
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def fresh(tmp_path):
    """A checkout without an environment, and with two GPU choices."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml", "fluxnb/_setup.py",
                 "params/base.yaml", "params/cpu.yaml", "params/h100.yaml"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_help_is_the_default_and_lists_everything():
    shown = make()
    assert shown.returncode == 0 and shown.stdout == make("help").stdout
    assert re.findall(r"^  ([a-z-]+)  +\w", shown.stdout, re.MULTILINE) == TARGETS
    (choices,) = re.findall(r"GPU=.*one of: (.*)", shown.stdout)
    assert choices.split() == sorted(p.stem for p in (ROOT / "params").glob("*.yaml") if p.stem != "base")


def test_every_target_is_documented():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)
    assert phony.split() == TARGETS == re.findall(r"^([a-z-]+):.* ## \S", text, re.MULTILINE)


@pytest.mark.parametrize("gpu", ["nonsense", "base", "", "%", "h%", "cpu h100", "../params/cpu"])
@pytest.mark.parametrize("target", ["report", "render", "reference"])
def test_unknown_gpu_lists_the_choices(fresh, target, gpu):
    answer = make(target, f"GPU={gpu}", folder=fresh)
    assert answer.returncode != 0 and answer.stdout == ""
    assert answer.stderr.strip().count("\n") == 0
    assert f"GPU={gpu} has no file in params/: choose one of cpu h100, or have one written for" in answer.stderr
    assert "make params GPU=…" in answer.stderr
    assert not (fresh / ".venv").exists()


def test_plan_is_quick(fresh):
    start = time.perf_counter()
    plan = make("-n", "report", "GPU=h100", folder=fresh)
    assert time.perf_counter() - start < 2
    assert plan.stdout.splitlines() == [
        "'python3' -I fluxnb/_setup.py",
        ".venv/bin/python -m fluxnb report --gpu h100",
    ]


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("help", "clean")])
def test_targets_make_the_environment_when_it_is_missing(fresh, target):
    commands = make("-n", target, "BASE_PYTHON=/some/python3", folder=fresh).stdout.splitlines()
    assert commands[0] == "'/some/python3' -I fluxnb/_setup.py" and len(commands) == 2


def test_environment_follows_the_lock(fresh):
    (fresh / ".venv").mkdir()
    (fresh / ".venv/.ready").touch()
    assert "_setup" not in make("-n", "test", folder=fresh).stdout
    os.utime(fresh / ".venv/.ready", (500, 500))
    assert "_setup" in make("-n", "test", folder=fresh).stdout


def test_python_installs_nothing(fresh):
    for given in ({"PYTHON": "/some/python"}, {}):
        arguments = [] if given else ["PYTHON=/some/python"]
        assert make("-n", "report", *arguments, folder=fresh, **given).stdout.splitlines() == [
            "'/some/python' -m fluxnb report --gpu cpu"
        ]


def test_python_runs_with_the_project_on_its_path(fresh):
    (fresh / "spy").write_text('#!/bin/sh\necho "$PYTHONPATH $*"\n')
    (fresh / "spy").chmod(0o755)
    answer = make("-s", "report", "PYTHON=./spy", "GPU=h100", folder=fresh, PYTHONPATH="/mine")
    assert answer.stdout == f"{fresh}:/mine -m fluxnb report --gpu h100\n"
    assert not (fresh / ".venv").exists()


def test_variables_become_options(fresh):
    plan = make("-n", "report", "ONLY=05", "FORCE=1", "PYTHON=p", folder=fresh).stdout
    assert plan == "'p' -m fluxnb report --gpu cpu --only='05' --force\n"
    replayed = make("-n", "report", "GPU=h100", "REPLAY=1", "PYTHON=p", folder=fresh).stdout
    assert replayed == "'p' -m fluxnb report --gpu h100 --replay\n"
    taken = make("-n", "reference", "GPU=h100", "PYTHON=p", folder=fresh).stdout
    assert taken == "'p' -m fluxnb reference --gpu h100\n"
    assert "--force" not in make("-n", "report", "FORCE=0", "PYTHON=p", folder=fresh).stdout
    tests = make("-n", "test", "ARGS=-k make", "PYTHON=p", folder=fresh).stdout
    assert tests == "'p' -m fluxnb.report.preflight test -m pytest -n 2 --dist loadfile --no-loadscope-reorder\n"
    written = make("-n", "params", "GPU=4090", "PYTHON=p", folder=fresh).stdout
    assert written == "'p' -m fluxnb params --new='4090'\n"
    priced = make("-n", "analysis", "PRICES=h200=3.5 cpu=0.1", "PYTHON=p", folder=fresh).stdout
    assert priced == "'p' -m fluxnb analysis 'h200=3.5' 'cpu=0.1'\n"


def test_the_name_of_the_machine_is_passed_on_only_as_it_is_given_to_make(fresh):
    (fresh / "spy").write_text('#!/bin/sh\necho "host: $FLUXNB_HOST"\n')
    (fresh / "spy").chmod(0o755)
    named = make("-s", "report", "PYTHON=./spy", "HOST=lab-3", folder=fresh)
    assert named.stdout == "host: lab-3\n"
    assert make("-s", "report", "PYTHON=./spy", folder=fresh, HOST="shell").stdout == "host: \n"  # as tcsh sets it
    assert make("-s", "report", "PYTHON=./spy", folder=fresh, FLUXNB_HOST="lab-4").stdout == "host: lab-4\n"


@pytest.mark.parametrize("given", ["MODELS=x", "STEP=4", "GPUS=h100", "model=x", "ONLY_=05"])
@pytest.mark.parametrize("target", ["report", "explore", "help"])
def test_a_variable_that_nothing_reads_is_a_misspelled_one(fresh, target, given):
    answer = make(target, given, folder=fresh)
    assert (answer.returncode, answer.stdout, answer.stderr.strip().count("\n")) == (2, "", 0)
    assert f"{given.split('=')[0]}= is no variable of this Makefile: choose from GPU" in answer.stderr
    assert not (fresh / ".venv").exists()


def test_variables_of_the_tools_are_none_of_ours(fresh):
    given = ["UV_TORCH_BACKEND=cpu", "PIP_INDEX_URL=x", "HF_HOME=y", "CUDA_VISIBLE_DEVICES=1", "SLURM_OPTIONS=time=1"]
    assert make("-n", "report", "PYTHON=p", *given, folder=fresh).returncode == 0


@pytest.mark.parametrize("model", ["nope", "./nope", "/nope/at all", "~/nope-at-all", "."])
@pytest.mark.parametrize("target", ["report", "render", "explore"])
def test_a_folder_without_a_model_is_said_before_an_environment_is_made(fresh, target, model):
    answer = make(target, f"MODEL={model}", "PYTHON=true", folder=fresh)
    if " " in model:  # the command looks at it
        assert answer.returncode == 0
        return
    assert (answer.returncode, answer.stdout, answer.stderr.strip().count("\n")) == (2, "", 0)
    assert f"MODEL={model} is no folder with a model_index.json" in answer.stderr


@pytest.mark.parametrize("variable", ["SIZE", "TOKENS", "STEPS"])
def test_what_is_about_a_model_needs_one(fresh, variable):
    answer = make("report", f"{variable}=64", folder=fresh)
    assert answer.returncode == 2 and f"{variable}= is about a model of yours: give MODEL=" in answer.stderr


def test_thorough_is_handed_on_and_is_yes_or_no(fresh):
    (fresh / "spy").write_text('#!/bin/sh\necho "thorough: $FLUXNB_THOROUGH"\n')
    (fresh / "spy").chmod(0o755)
    for given in ("1", "0", ""):
        assert make("-s", "report", "PYTHON=./spy", f"THOROUGH={given}", folder=fresh).stdout == f"thorough: {given}\n"
    answer = make("report", "PYTHON=./spy", "THOROUGH=yes", folder=fresh)
    assert (answer.returncode, answer.stdout, answer.stderr.strip().count("\n")) == (2, "", 0)
    assert "THOROUGH=yes isn't allowed: give 1" in answer.stderr


def test_a_model_is_handed_on_as_it_was_written(fresh):
    (fresh / "spy").write_text(
        '#!/bin/sh\necho "$FLUXNB_GPU|$FLUXNB_MODEL|$FLUXNB_SIZE|$FLUXNB_TOKENS|$FLUXNB_STEPS"\n'
    )
    (fresh / "spy").chmod(0o755)
    (fresh / "my model ü").mkdir()
    (fresh / "my model ü/model_index.json").touch()
    about = ["SIZE=64x96", "TOKENS=8", "STEPS=3"]
    for model in ("someone/flux", "./my model ü", "a/$(touch pwned)`touch pwned`;x"):
        given = model.replace("$", "$$")
        answer = make("-s", "report", "PYTHON=./spy", "GPU=h100", f"MODEL={given}", *about, folder=fresh)
        assert answer.stdout == f"h100|{given}|64x96|8|3\n"
    assert make("-s", "report", "PYTHON=./spy", folder=fresh, STEPS="3").stdout == "cpu||||\n"  # a shell's own
    assert not (fresh / "pwned").exists()


HARMS = [
    "{cmd}",
    "x; {cmd}",
    "x && {cmd}",
    "x | {cmd}",
    "x > {file}",
    "x\n{cmd}",
    "$({cmd})",
    "$$({cmd})",
    "$(shell {cmd})",
    "$$(shell {cmd})",
    "${{shell {cmd}}}",
    "`{cmd}`",
    "'; {cmd}; '",
    '"; {cmd}; "',
    "'\"; {cmd} #",
    "x #'; {cmd}",
    "\\'; {cmd}",
    "$(eval x := $(shell {cmd}))",
    "$(file >{file},x)",
    "--only=x; {cmd}",
    "-x $({cmd})",
    "cpu {cmd}",
    "x\r{cmd}",
    " ; {cmd} ",
    "a,b),$(shell {cmd})",
    "$(foreach v,1,$(shell {cmd}))",
    "&{cmd}&",
    "((\n{cmd}\n))",
    "x\\\n{cmd}",
    "日'`{cmd}`",
]


def injections(folder: Path, each: int):
    """(arguments of make, whether they come from the environment) in which every variable tries to run a command."""
    named = "GPU ONLY FORCE THOROUGH REPLAY LAUNCH SLURM_OPTIONS MODEL SIZE TOKENS HOST PYTHON BASE_PYTHON ARGS PRICES"
    for i, (name, harm) in enumerate(itertools.product([*named.split(), "UPGRADE", "UV_X"], HARMS)):
        if i % each == 0:
            harmful = harm.format(cmd="touch pwned", file="pwned")
            target = {
                "ARGS": ["test", "explore"],
                "PRICES": ["analysis"],
                "UPGRADE": ["lock"],
                "GPU": ["help", "report"],
            }
            for goal in target.get(name, ["report"]):
                yield [goal, f"{name}={harmful}", *["PYTHON=./spy"] * (name not in ("PYTHON", "BASE_PYTHON"))]


def inject(folder: Path, each: int) -> int:
    """Tries them on the command line and in the environment; how many were tried. None may run anything but the spy."""
    (folder / "spy").write_text("#!/bin/sh\n")
    (folder / "spy").chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(folder / "spy", folder / ".venv/bin/python")
    count = 0
    for goal, given, *rest in injections(folder, each):
        name, _, value = given.partition("=")
        for done in (make(goal, given, *rest, folder=folder), make(goal, *rest, folder=folder, **{name: value})):
            count += 1
            assert not list(folder.glob("pwned*")), given
            assert "Traceback" not in done.stderr and "Syntax error" not in done.stderr, given
    return count


def test_what_is_given_runs_nothing(fresh):
    assert inject(fresh, 11) > 90


OWN_NAMES = (  # of the Makefile and of make; MAKEFLAGS and GNUMAKEFLAGS of the environment make itself reads first
    "FLUXNB_MODEL FLUXNB_THOROUGH FLUXNB_SIZE GPUS TAKEN GIVEN STRANGE GOALS NEWLINE quoted PY READY FIT ABOUT v "
    "CURDIR PYTHONPATH MAKECMDGOALS MAKEOVERRIDES VPATH GPATH MFLAGS MAKE MAKEFILE_LIST .SHELLFLAGS SUFFIXES"
).split()


@pytest.mark.parametrize("way", ["the environment", "make -e", "the command line"])
def test_names_of_the_makefile_itself_run_nothing_either(fresh, way):
    (fresh / "spy").write_text("#!/bin/sh\n")
    (fresh / "spy").chmod(0o755)
    for name in OWN_NAMES:
        harm = "$(shell touch pwned)"
        given = [f"{name}={harm}"] if way == "the command line" else ["-e"] * (way == "make -e")
        make("test", "PYTHON=./spy", *given, folder=fresh, **({} if way == "the command line" else {name: harm}))
        assert not (fresh / "pwned").exists(), name


@pytest.mark.soak
def test_what_is_given_runs_nothing_however_it_is_written(fresh):
    assert inject(fresh, 1) > 1000


def test_arguments_are_divided_as_a_shell_does_and_handed_on(fresh):
    command = [sys.executable, "-m", "fluxnb.report.preflight", "test", "-c", "import sys; print(sys.argv[1:])"]
    for given, shown in (("-k 'a or b' \"$(touch pwned)\"", ["-k", "a or b", "$(touch pwned)"]), ("", [])):
        environment = os.environ | {"ARGS": given, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=fresh)
        assert done.stdout == f"{shown}\n"
    done = subprocess.run(command, env=environment | {"ARGS": "'"}, capture_output=True, text=True, cwd=fresh)
    assert done.returncode == 2 and "ARGS opens a quotation mark" in done.stderr


def test_explore_says_to_root_what_to_do(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("ARGS", raising=False)
    assert "doesn't start as root (be another user, or give ARGS=--allow-root" in preflight.without_tools("explore")
    monkeypatch.setenv("ARGS", "--allow-root --port=1")
    assert "root" not in preflight.without_tools("explore")


def test_lint_looks_at_everything(fresh):
    (plan,) = make("-n", "lint", "PYTHON=p", folder=fresh).stdout.splitlines()
    assert (
        plan == "'p' -m fluxnb.report.preflight lint && 'p' -m ruff check . && 'p' -m ruff format --check . "
        "&& 'p' -m mypy fluxnb"
    )
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "make lint &" in script and script.endswith('make test\nwait "$lint"\n')  # which fails where that did


def test_a_run_is_no_change_to_the_repository(tmp_path):
    if not shutil.which("git"):
        pytest.skip("needs git")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    own, reference = (tmp_path / f"reports/{name}/results.csv" for name in ("own/single_gpu/cpu", "single_gpu/cpu"))
    for path in (own, own.with_name("index.html"), tmp_path / "reports/own/hosts.json", reference):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    status = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=tmp_path, capture_output=True, text=True)
    assert status.stdout.splitlines() == ["?? .gitignore", "?? reports/single_gpu/cpu/results.csv"]


def test_failure_is_passed_on(fresh):
    assert make("report", "PYTHON=false", folder=fresh).returncode != 0


def test_clean_keeps_results(fresh):
    (fresh / "build/cpu").mkdir(parents=True)
    (fresh / "reports/own/single_gpu/cpu").mkdir(parents=True)
    kept = [fresh / "reports/own" / name for name in ("single_gpu/cpu/results.csv", "hosts.json")]
    for path in kept:
        path.touch()
    assert make("clean", folder=fresh).returncode == 0
    assert not (fresh / "build").exists() and all(path.exists() for path in kept)
