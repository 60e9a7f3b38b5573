"""What is written about the project: docstrings, the README, and nothing that belongs to one machine only."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    from fluxnb import pipelines

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
