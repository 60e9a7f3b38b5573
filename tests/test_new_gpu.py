"""A GPU that has no file in params/: how to add one, written from the card that is here or from what is said of it."""

import re
import shlex
from pathlib import Path

import pytest

from fluxnb import params
from fluxnb.__main__ import main
from fluxnb.params import new

ROOT = Path(__file__).resolve().parents[1]


def here(monkeypatch, name, memory, count=1):
    """A machine with so many of this card."""
    monkeypatch.setattr(new, "found", lambda: (name, memory, count))


def refused(capsys, *arguments):
    assert main(["params", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith(".\n"), err
    return err


@pytest.mark.parametrize(
    ("name", "card", "memory", "count", "match", "full"),
    [
        ("4090", "NVIDIA GeForce RTX 4090", 24, 1, "RTX 4090", False),
        ("l40s", "NVIDIA L40S", 45, 1, "L40S", True),
        ("h20x2", "NVIDIA H20", 96, 4, "H20", True),
        ("a100", "NVIDIA A100-SXM4-80GB", 80, 1, "A100", True),
        ("rtx6000", "NVIDIA RTX 6000 Ada Generation", 48, 1, "RTX 6000 Ada Generation", True),
        ("mi300x", "AMD Instinct MI300X", 192, 1, "MI300X", True),
    ],
)
def test_a_file_is_written_from_the_card(user_root, monkeypatch, name, card, memory, count, match, full):
    here(monkeypatch, card, memory, count)
    (user_root / f"params/{name}.yaml").unlink(missing_ok=True)
    assert main(["params", "--new", name]) == 0
    made = params.load(name)
    assert (made.gpu.match, made.gpu.memory_gib) == (match, memory)
    assert made.gpu.count == (2 if name.endswith("x2") else 1)
    assert ("flux-dev-random" in made.study.models) == full
    params.check_gpu(made, card, detected_count=count)  # the card that it was written from fits


def test_without_the_card_its_figures_are_asked_for_in_one_sentence(user_root, monkeypatch, capsys):
    here(monkeypatch, "", 0.0, 0)
    said = refused(capsys, "--new", "4090")
    (command,) = re.findall(r"`python -m fluxnb (params [^`]*)`", said)
    assert command == 'params --new 4090 --match "RTX 4090" --memory 24'
    assert main(["params", "--new", "4090", "--match", "RTX 4090", "--memory", "24"]) == 0  # which is what it says
    assert params.load("4090").gpu.memory_gib == 24


@pytest.mark.parametrize("name", ["", "../x", "A B", "4090.yaml", "x" * 40, "4090x0", "-x", "a\nb", "base/../x"])
def test_a_name_that_is_none_is_refused(user_root, monkeypatch, capsys, name):
    here(monkeypatch, "NVIDIA GeForce RTX 4090", 24)
    before = sorted(user_root.rglob("*"))
    assert "can't be a file's name" in refused(capsys, f"--new={name}")
    assert sorted(user_root.rglob("*")) == before


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (["--match", "RTX", "--memory", "nan"], "gpu.memory_gib"),
        (["--match", "RTX", "--memory", "0"], "gpu.memory_gib"),
        (["--match", "RTX", "--memory", "1e300"], "gpu.memory_gib"),
        (["--match", " ", "--memory", "24"], "gpu.match"),
    ],
)
def test_figures_that_cannot_be_leave_no_file(user_root, capsys, figures, said):
    assert said in refused(capsys, "--new", "4090", *figures)
    assert not (user_root / "params/4090.yaml").exists()


def test_a_file_that_is_there_and_a_card_of_another_name_stay_what_they_are(user_root, monkeypatch, capsys):
    before = (user_root / "params/h100.yaml").read_text()
    here(monkeypatch, "NVIDIA H100 80GB HBM3", 80)
    assert "is there already" in refused(capsys, "--new", "h100")
    assert (user_root / "params/h100.yaml").read_text() == before
    assert "1 × NVIDIA H100 80GB HBM3, no 4090" in refused(capsys, "--new", "4090")
    (user_root / "params/h100x2.yaml").unlink()
    assert "h100x2 is for 2" in refused(capsys, "--new", "h100x2")


def test_the_card_is_asked_for_by_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nprintf "NVIDIA GeForce RTX 4090, 24564\\nNVIDIA GeForce RTX 4090, 24564\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert new.found() == ("NVIDIA GeForce RTX 4090", 24, 2)
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))
    assert new.found() == ("", 0.0, 0)


def test_a_gpu_without_a_file_is_told_how_to_add_one(user_root, capsys):
    assert main(["report", "--gpu", "4090"]) == 2
    assert "`python -m fluxnb params --new NAME` writes one" in capsys.readouterr().err


def test_the_steps_of_contributing_for_a_gpu_do_what_they_say(user_root, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Add a GPU\n\n```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert lines[0] == "make params GPU=4090" and lines[2] == "make report GPU=4090"
    assert main(shlex.split(lines[1])[3:]) == 0
    assert params.load("4090").gpu.match == "RTX 4090"


def test_what_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:fluxnb|params|\.ci|\.github)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):.* ## \S", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets) | {"has"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [("h100", ("h100", 1)), ("h100x2", ("h100", 2)), ("rtx6000", ("rtx6000", 1)), ("rtx6000x4", ("rtx6000", 4))],
)
def test_how_many_gpus_a_name_is_of(name, parts):
    assert params.parted(name) == parts
