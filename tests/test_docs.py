"""What is written about the project: docstrings, the README, and nothing that belongs to one machine only."""

import ast
import functools
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import nn

from fluxnb import families, params, stacks
from fluxnb.cache import FirstBlock, Gate
from fluxnb.cache.gates.base import Accumulating, Thresholded
from fluxnb.cache.linear import Linear
from fluxnb.report import catalogue
from fluxnb.technique import EXACTNESS, Technique
from fluxnb.techniques.precision import Quantizer

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "fluxnb").rglob("*.py"))
ENTRIES = catalogue.techniques()
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


def defined():
    """Every class with `apply(pipe)`, and every gate and predictor, wherever the package has one."""
    found = set()
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not module.startswith("fluxnb.techniques") and not module.startswith("fluxnb.cache"):
            if not re.search(r"^    def apply\(self, pipe", path.read_text(encoding="utf-8"), re.M):
                continue
        if module.endswith(".triton_kernels"):
            continue
        for value in vars(importlib.import_module(module.removesuffix(".__init__"))).values():
            if isinstance(value, type) and value.__module__ == module and not value.__name__.startswith("_"):
                found.add(value)
    parts = {c for c in found if issubclass(c, Gate) or hasattr(c, "predict")}
    whole = {c for c in found if hasattr(c, "apply") and not issubclass(c, nn.Module)}
    return (parts | whole) - {Accumulating, Gate, Linear, Thresholded, Quantizer, Technique}


def test_every_technique_gate_and_predictor_is_in_the_catalogue():
    assert {entry.made for entry in ENTRIES} == defined()
    assert len(ENTRIES) == len(defined())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.made.__name__)
def test_a_technique_says_what_it_is_where_it_is_from_and_where_it_is_measured(entry):
    assert not entry.made.__doc__.startswith(f"{entry.made.__name__}(")  # dataclasses write those
    assert 20 < len(entry.does) < 140 and entry.source and entry.term
    assert entry.notebook in params.NOTEBOOKS
    if entry.family is not None:
        assert entry.family in families.ALL
    for word, said in getattr(entry.made, "terms", {}).items():
        assert word and 20 < len(said) < 140 and not said.endswith(".")


@pytest.mark.parametrize("made", [e.made for e in ENTRIES if issubclass(e.made, Technique)], ids=lambda c: c.__name__)
def test_a_technique_has_all_that_a_row_takes_from_it(made):
    needed = {"kind": getattr(made, "KINDS", [None]), "side": [64], "stages": [2], "threshold": [0.1], "coarse": [4]}
    needed["gate"] = [FirstBlock(0.1)]
    asked = inspect.signature(made).parameters.values()
    without = {p.name: needed[p.name] for p in asked if p.default is p.empty}
    for values in itertools.product(*without.values()):
        technique = made(**dict(zip(without, values, strict=True)))
        assert technique.family in families.ALL and technique.exact in EXACTNESS
        assert technique.name and technique.label and technique.mark
        assert json.loads(json.dumps(technique.settings)) == technique.settings
        assert not re.search(r"True|False|None|_", technique.label.replace("Q8_0", "").replace("_0", ""))


@functools.cache
def notebook_and_what_it_calls(stem):
    """A notebook, the functions of the library that it calls, and the tables of names that these read."""
    cells = json.loads((ROOT / f"notebooks/{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    known = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fluxnb"):
            for alias in node.names:
                try:
                    known[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    known[alias.asname or alias.name] = getattr(importlib.import_module(node.module), alias.name)
    called = [value for value in known.values() if inspect.isfunction(value)]
    for owner, name in re.findall(r"\b(\w+)\.(\w+)\(", code):
        called += [value] if inspect.isfunction(value := getattr(known.get(owner), name, None)) else []
    text = ["".join(cell["source"]) for cell in cells]
    named = "\n".join([*text, *map(inspect.getsource, dict.fromkeys(called))])
    tables = {"stacks": "stacks.py", "kinds": "techniques/kinds.py", "peers": "techniques/peers.py"}
    return named + "".join((ROOT / "fluxnb" / tables[t]).read_text(encoding="utf-8") for t in tables if t in named)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.made.__name__)
def test_a_notebook_measures_it(entry):
    helpers = {"FirstBlock": "first_block", "Schedule": "prescribed"}  # what the notebook calls
    named = {entry.made.__name__, helpers.get(entry.made.__name__, entry.made.__name__)}
    assert named & set(re.findall(r"\w+", notebook_and_what_it_calls(entry.notebook)))


def test_the_readme_s_tables_are_those_of_the_classes(tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path)
    assert catalogue.write(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme()
    (tmp_path / "README.md").write_text("without marks\n", encoding="utf-8")
    assert not catalogue.write(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "without marks\n"


def test_made_up_names_are_explained():
    words = catalogue.glossary()
    made_up = (
        "pulled",
        "queries apart",
        "modulation ahead",
        "no search for hooks",
        "everything",
        "bytes on the device",
    )
    assert set(made_up) <= set(words)
    assert {family.name for family in families.ALL} | set(EXACTNESS) <= set(words)
    for way in stacks.WAYS:
        assert any(word in way for word in words) or way in (e.term for e in ENTRIES), way


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
