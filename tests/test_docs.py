"""What is written about the project: docstrings, the README, and nothing that belongs to one machine only."""

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import nn

from fluxnb import params
from fluxnb.cache import Gate, Hold, Taylor
from fluxnb.technique import Technique
from fluxnb.techniques.precision import Quantizer

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "fluxnb").rglob("*.py"))
by_module = pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])


@by_module
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@by_module
def test_public_functions_and_classes_say_what_they_do(path):
    silent = [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent, f"{path.name}: {', '.join(silent)}"


# --- the README ---------------------------------------------------------------------------------------------


def techniques():
    """(module, class) of everything with `apply(pipe)`, and of the parts that a cache is put together from."""
    found = {}
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if {"train", "report", "_setup", "triton_kernels"} & set(module.split(".")):
            continue
        for value in vars(importlib.import_module(module.removesuffix(".__init__"))).values():
            if isinstance(value, type) and value.__module__ == module and not value.__name__.startswith("_"):
                found[value] = module
    parts = [c for c in found if issubclass(c, Gate) or c in (Hold, Taylor)]
    whole = [c for c in found if hasattr(c, "apply") and not issubclass(c, nn.Module)]
    abstract = (Gate, Quantizer, Technique)
    return sorted({c for c in parts + whole if c not in abstract}, key=lambda c: c.__name__)


@pytest.mark.parametrize("technique", techniques(), ids=lambda c: c.__name__)
def test_a_technique_has_a_docstring_a_readme_row_a_notebook_and_a_parameter(technique):
    assert technique.__doc__ and not technique.__doc__.startswith(f"{technique.__name__}(")  # dataclasses write those
    row = re.search(rf"^\|[^|]+\| `[a-z_.]*\.{technique.__name__}` \| `(\w+)` \| `(\w+)` \|$", readme(), re.M)
    assert row, f"{technique.__name__} has no row in the README's table of techniques"
    notebook, key = row.groups()
    assert key in params.NOTEBOOKS[notebook]
    helpers = {"FirstBlock": "first_block"}  # what the notebook calls
    source = (ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8")
    assert technique.__name__ in source or helpers.get(technique.__name__, "?") in source


def test_the_table_of_techniques_names_nothing_that_is_not_there():
    named = set(re.findall(r"^\|[^|]+\| `[a-z_.]*\.([A-Za-z0-9]+)` \|", readme(), re.M))
    assert named == {c.__name__ for c in techniques()}


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_every_target_and_notebook():
    targets = re.findall(r"^([a-z-]+):.* ## \S", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert len(targets) >= 8
    for target in targets:
        assert f"make {target}" in readme(), target
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert notebook.stem in readme(), notebook.stem


def test_the_readme_names_no_target_that_is_not_there():
    targets = re.findall(r"^([a-z-]+):.* ## \S", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"`make ([a-z-]+)", readme())) <= set(targets)


def test_what_the_readme_shows_and_links_to_is_there():
    linked = re.findall(r"\]\(([^)#]+)\)", readme())
    assert linked
    for target in linked:
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target).exists(), target


def test_the_models_of_the_readme_are_the_models_of_the_code():
    from fluxnb.models import pipelines

    for name in ("embedded", *pipelines.RANDOM):
        assert f"`{name}`" in readme()


def test_the_python_examples_of_the_readme_are_python():
    examples = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert examples
    for example in examples:
        ast.parse(example)


# --- nothing of one machine ---------------------------------------------------------------------------------

# Put together from parts, so that this file doesn't hold what it looks for.
STRANGE = [
    *("/".join(("", part, "")) for part in ("work", "root", "home/user")),
    *(".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))),
    *(".".join(parts) for parts in (("anaconda", "org"), ("npmjs", "org"), ("artifactory", ""))),
]
MEDIA = {".safetensors", ".webp", ".png"}


def committed():
    """The text files that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in MEDIA]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_no_file_holds_a_path_or_a_package_location_of_one_machine():
    files = committed()
    assert len(files) > 30
    found = []
    for path in files:
        # inside a page, base64 may spell anything
        words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}: {strange}" for strange in STRANGE if strange in words]
    assert not found


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_no_file_is_larger_than_a_repository_should_hold():
    for path in committed():
        assert path.stat().st_size < 10_000_000, path.name
