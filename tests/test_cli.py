"""The command line says what is wrong in one sentence, ends with status 2, and shows no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxnb import params
from fluxnb.__main__ import main
from fluxnb.models import pipelines

ROOT = Path(__file__).resolve().parents[1]
SMOKE = (ROOT / "params/smoke.yaml").read_text(encoding="utf-8")


def own(root, text, name="mine"):
    """A configuration of the user's: any device, and these lines."""
    (root / f"params/{name}.yaml").write_text("gpu:\n  match: any\n" + text, encoding="utf-8")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    """A sentence comes before anything starts."""
    import fluxnb.report.run

    def run(*_, **__):
        raise AssertionError("a notebook was run")

    monkeypatch.setattr(fluxnb.report.run, "run", run)


def refused(capsys, *arguments):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("fluxnb: ") and err.count("\n") == 1 and err.endswith(".\n"), err
    return err


def test_a_misspelled_key(user_root, capsys):
    own(user_root, "study:\n  step: 20\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "params/mine.yaml" in text and "study.step" in text and "did you mean steps?" in text


def test_a_misspelled_section(user_root, capsys):
    own(user_root, "05_first_block_cach:\n  thresholds: [0]\n")
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
    own(user_root, line)
    text = refused(capsys, "report", "--gpu", "mine")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("command", ["report", "render"])
def test_an_unknown_gpu(user_root, capsys, command):
    text = refused(capsys, command, "--gpu", "h10")
    assert "GPU=h10" in text and "did you mean h100?" in text and "h200x8" in text


def test_the_wrong_gpu(user_root, capsys, on_cpu):
    text = refused(capsys, "report", "--gpu", "h100")
    assert "H100" in text and "no CUDA device" in text and "FORCE=1" in text and "GPU=cpu" in text


def test_the_wrong_gpu_by_force(user_root, on_cpu, monkeypatch):
    import fluxnb.report.run

    monkeypatch.setenv("FLUXNB_FORCE", "")  # so that it is put back afterwards
    given = {}
    monkeypatch.setattr(
        fluxnb.report.run, "run", lambda chosen, **options: given.update(options, name=chosen.name) or 0
    )
    monkeypatch.setattr("fluxnb.report.render.render", lambda *_: [])
    assert main(["report", "--gpu", "h100", "--force", "--only", "05", "--only", "01"]) == 0
    assert given["name"] == "h100" and given["force"] and given["only"] == ["05", "01"]
    assert os.environ["FLUXNB_FORCE"] == "1"  # what the notebooks' processes go by


def test_a_replay_needs_no_gpu_but_something_that_was_measured(user_root, capsys, on_cpu, monkeypatch):
    import fluxnb.report.run

    assert "Nothing was measured for GPU=h100x2 yet" in refused(capsys, "report", "--gpu", "h100x2", "--replay")
    folder, given = user_root / "reports/single_gpu/h100", {}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    monkeypatch.setenv("FLUXNB_REPLAY", "")  # so that it is put back afterwards
    monkeypatch.setattr(fluxnb.report.run, "run", lambda chosen, **options: given.update(options) or 0)
    monkeypatch.setattr("fluxnb.report.render.render", lambda *_: [])
    assert main(["report", "--gpu", "h100", "--replay", "--only", "05"]) == 0
    assert given["replay"] and given["force"] and os.environ["FLUXNB_REPLAY"] == str(folder / "run.json")


def test_a_missing_token(user_root, capsys, no_hub):
    own(user_root, "study:\n  models: [black-forest-labs/FLUX.1-dev]\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "HF_TOKEN" in text and "https://huggingface.co/black-forest-labs/FLUX.1-dev" in text


def test_an_unknown_model(user_root, capsys):
    own(user_root, "study:\n  models: [embeded]\n")
    assert "There is no model 'embeded'" in refused(capsys, "report", "--gpu", "mine")


def test_an_unreadable_model_folder(user_root, capsys):
    (user_root / "model").mkdir()
    own(user_root, "study:\n  models: [./model]\n")
    text = refused(capsys, "report", "--gpu", "mine")
    assert "model is not a model folder" in text and "model_index.json" in text


def test_a_corrupted_table(user_root, capsys):
    own(user_root, "")
    table = user_root / "reports/single_gpu/mine/results.csv"
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
    monkeypatch.setattr(params, "__file__", str(tmp_path / "site/fluxnb/params.py"))
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


def command(folder, *arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "FLUXNB_FORCE")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-m", "fluxnb", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "lines, part",
    [("study:\n  sedes: [1]\n", "did you mean seeds?"), ("study:\n  models: [someone/else/x]\n", "There is no model")],
    ids=["key", "model"],
)
def test_a_mistake_in_a_process_of_its_own(user_root, lines, part):
    own(user_root, lines)
    done = command(user_root, "report", "--gpu", "mine")
    assert done.returncode == 2
    assert done.stdout == "" and part in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
