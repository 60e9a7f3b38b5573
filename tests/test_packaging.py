"""What is installed: the wheel has what it needs, an image needs few packages, and what is missing is named."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fluxnb
from fluxnb import installed

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def names(lines) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def brought(wanted) -> set[str]:
    """Packages, and all that they depend on here."""
    found, ahead = set(), {canonicalize_name(name) for name in wanted}
    while ahead:
        found.add(name := ahead.pop())
        try:
            lines = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        ahead |= {canonicalize_name(r.name) for r in lines if not r.marker or r.marker.evaluate({"extra": ""})} - found
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy without what builds and runs leave behind."""
    copy, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "fluxnb", copy / "fluxnb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, str(made)], cwd=copy, check=True, capture_output=True)
    return next(made.glob("fluxnb-*.whl"))


@pytest.fixture(scope="module")
def anywhere(wheel, tmp_path_factory):
    """A function (code, *arguments) -> the ended process, outside the project, with the wheel and what it requires.

    Of the packages of this interpreter it sees those that the wheel's requirements bring, and no others.
    """
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(site)
    core = brought(names(PROJECT["dependencies"])) | {"fluxnb"}
    modules = metadata.packages_distributions().items()
    hidden = [m for m, packages in modules if m[0] != "_" and not core & set(map(canonicalize_name, packages))]
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"

    def run(code, *arguments):
        env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", hide + code, *arguments]
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=500
        )

    return run


def test_the_wheel_has_all_of_the_library_and_nothing_else(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fluxnb").rglob("*") if p.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert {name for name in files if ".dist-info/" not in name} == ours
    weights = "fluxnb/models/weights/embedded/transformer/diffusion_pytorch_model.safetensors"
    assert {"fluxnb/findings/published.csv", "fluxnb/measure/st_lpips.LICENSE", weights} <= ours
    licenses = {name.split("/licenses/")[1] for name in files if "/licenses/" in name}
    assert licenses == set(PROJECT["license-files"]) == {"LICENSE", "fluxnb/measure/st_lpips.LICENSE"}


def test_weights_come_with_a_licence_and_a_model_card():
    folders = {path.parent for path in (ROOT / "fluxnb").rglob("*.safetensors")}
    weights = ROOT / "fluxnb/models/weights"
    tops = {weights / f.relative_to(weights).parts[0] if f.is_relative_to(weights) else f for f in folders}
    assert len(tops) == 5
    for folder in tops:
        card = (folder / "README.md").read_text(encoding="utf-8")
        about = yaml.safe_load(card.split("---")[1])
        assert about["license"] in ("apache-2.0", "bsd-2-clause") and "\nUse: " in card and "\nLicense: " in card
        if "weights" in folder.parts:
            assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
            assert "\nTraining: " in card and "\nEvaluation: " in card and "\nData: " in card


def test_who_is_cited_and_which_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == fluxnb.__version__ and cited["authors"] == [{"name": "The fluxnb authors"}]
    assert cited["title"] == f"fluxnb: {PROJECT['description'][0].lower()}{PROJECT['description'][1:]}"


def test_the_readme_names_every_extra():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [extra for extra in PROJECT["optional-dependencies"] if f"`{extra}`" not in text] == []


def test_what_a_missing_package_is_said_to_be_in_is_what_the_project_declares():
    extras = PROJECT["optional-dependencies"]
    assert set(installed.CORE.values()) == names(PROJECT["dependencies"])
    assert {extra: set(packages.values()) for extra, packages in installed.EXTRAS.items()} == {
        extra: names(lines) for extra, lines in extras.items() if extra not in ("test", "dev")
    }


def test_jupyter_and_the_packages_of_single_techniques_come_with_extras_only():
    core = brought(names(PROJECT["dependencies"]))
    assert not core & {name for packages in installed.EXTRAS.values() for name in packages.values()}
    assert not core & {"ipython", "jupyter-client", "nbformat", "peft", "pytest"}


def test_the_command_fits_where_the_library_is(monkeypatch, tmp_path):
    assert installed.command("study") == "pip install -e '.[study]'"
    assert installed.command("reference").startswith("uv pip install ")
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "fluxnb" / "installed.py"))
    assert installed.command("study") == "pip install 'fluxnb[study]'"


def test_a_package_that_does_not_load_is_told_apart_from_one_that_is_missing(monkeypatch):
    def broken(name):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(installed.importlib, "import_module", broken)
    with pytest.raises(installed.UserError, match=r"extra slurm: .* \(it doesn't load: libcuda"):
        installed.need("submitit")


EVERYTHING = """
from pathlib import Path
import fluxnb
assert "torch" not in sys.modules
from diffusers import FluxPipeline
from fluxnb import accelerate

weights = Path(fluxnb.__file__).parent / "models" / "weights" / "embedded"
pipe = FluxPipeline.from_pretrained(weights)

import contextlib, importlib, io, json
from PIL import Image
from fluxnb.__main__ import main
from fluxnb.cache.para_attn import ParaAttention
from fluxnb.findings.table import listed
from fluxnb.measure import perceptual
from fluxnb.models import control
from fluxnb.report import sweep
from fluxnb import explore, techniques

said = {}
picture = Image.new("RGB", (32, 32))
prompt = "a blue cube left of a yellow ball on grass at sunset"
undo = accelerate(pipe, "cpu/near-lossless")
image = pipe(prompt, height=128, width=128, max_sequence_length=24, num_inference_steps=28).images[0]
undo()
said["image"] = str(image.size)
uses = {
    "torchao": lambda: techniques.TorchAO("int8").apply(pipe),
    "bitsandbytes": lambda: techniques.BitsAndBytes("nf4").apply(pipe),
    "gguf": lambda: techniques.GGUF("Q8_0").apply(pipe),
    "optimum-quanto": lambda: techniques.Quanto("int8").apply(pipe),
    "para-attn": lambda: ParaAttention(0.1).apply(pipe),
    "scikit-image": lambda: control.edges(picture),
    "flip-evaluator": lambda: perceptual.flip(picture, picture),
    "pandas": lambda: listed([{"a": 1}], "a"),
    "seaborn": lambda: importlib.import_module("fluxnb.report.charts"),
    "ipywidgets": explore.Explorer,
    "submitit": lambda: next(sweep._on_slurm(None, [])),
}
for name, use in uses.items():
    try:
        said[name] = repr(use())
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
for line in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(line.split())
    said[line] = f"{status} {out.getvalue()}"
print(json.dumps(said))
"""
NEED_THE_PROJECT = ("report", "render", "reference", "site", "analysis", "rows", "clean-caches", "fit-teacache", "plan")
ALONE = ("techniques", "recipe --gpu h100 --goal balanced")


@pytest.fixture(scope="module")
def said(anywhere) -> dict[str, str]:
    """What each use of an optional package and each command says where the wheel alone is installed."""
    done = anywhere(EVERYTHING, *NEED_THE_PROJECT, *ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_accelerated_image_needs_the_core_only(said):
    assert said["image"] == "(128, 128)"


EXTRA_OF = {package: extra for extra, packages in installed.EXTRAS.items() for package in packages.values()}


@pytest.mark.parametrize("package", [
    "torchao", "bitsandbytes", "gguf", "optimum-quanto", "para-attn",
    "scikit-image", "flip-evaluator", "pandas", "seaborn", "ipywidgets", "submitit",
])  # fmt: skip
def test_a_missing_package_is_named_with_its_extra_and_the_command(said, package):
    extra = EXTRA_OF[package]
    words = rf"needs the package {package}, of the extra {extra}: `(uv )?pip install 'fluxnb\[{extra}\]'`"
    assert re.fullmatch(rf"(UserError: [\w=' -]+|Unavailable:) {words}\.?", said[package]), said[package]


@pytest.mark.parametrize("command", NEED_THE_PROJECT)
def test_the_study_s_commands_say_that_they_need_the_project(said, command):
    assert said[command].startswith("2 fluxnb: There is no params/base.yaml here"), said[command]
    assert said[command].count("\n") == 1


@pytest.mark.parametrize("command", ALONE)
def test_other_commands_work_without_the_project(said, command):
    assert said[command].startswith("0 ")
