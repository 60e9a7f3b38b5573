"""pyproject.toml, requirements.lock and environment.yml agree, and the set-up script does what it says."""

import ast
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fluxnb import _setup

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]


def requirements(*extras: str) -> list[Requirement]:
    listed = PYPROJECT["project"]["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [Requirement(line) for line in listed]


def locked() -> dict[str, str]:
    """Package -> version, from the lock; fails on a line that is not one exact pin."""
    pins: dict[str, str] = {}
    for line in LOCK.splitlines():
        if line.startswith("#"):
            continue
        if re.fullmatch(r"    (--hash=sha256:[0-9a-f]{64}( \\)?|# via .+)", line):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([^\s;+]+)( ; .+?)?( \\)?", line)
        assert match, f"not one exact pin: {line}"
        assert match[1] not in pins, f"pinned twice: {match[1]}"
        pins[match[1]] = match[2]
    return pins


@pytest.mark.parametrize("wanted", requirements(*EXTRAS), ids=lambda r: r.name)
def test_lock_holds_every_direct_dependency(wanted):
    version = locked()[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version, prereleases=True), f"{wanted} is locked at {version}"


def test_lock_holds_the_versions_of_the_study():
    for held in map(Requirement, PYPROJECT["tool"]["uv"]["constraint-dependencies"]):
        assert held.specifier.contains(locked()[held.name])


def test_every_package_of_the_lock_but_torch_has_hashes():
    without = re.findall(r"^([\w-]+)==.*[^\\]$", LOCK, re.MULTILINE)
    assert without == ["torch"] and LOCK.count("--hash=sha256:") > len(locked())


def test_lock_leaves_the_cuda_libraries_to_torch():
    for name in locked():
        assert name == "nvidia-ml-py" or not re.search(r"nvidia|cuda|triton", name), name


def test_a_file_that_another_location_offers_in_the_place_of_a_locked_one_is_not_installed(tmp_path, monkeypatch):
    wheel = tmp_path / "comm-0.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("comm.py", "raise SystemExit('another one')")
        about = "comm-0.2.3.dist-info/"
        file.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: comm\nVersion: 0.2.3\n")
        file.writestr(about + "WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(about + "RECORD", "")
    (tmp_path / "lock").write_text(_setup.locked("comm"))
    for name in [name for name in os.environ if name.startswith("UV_")]:
        monkeypatch.delenv(name)
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-index", "--find-links", str(tmp_path)]
    command += ["--target", str(tmp_path / "there"), "--cache-dir", str(tmp_path / "cache"), "-r"]
    done = subprocess.run([*command, str(tmp_path / "lock")], capture_output=True, text=True)
    assert done.returncode != 0 and "Hash mismatch" in done.stderr
    (tmp_path / "lock").write_text("comm==0.2.3")
    assert subprocess.run([*command, str(tmp_path / "lock")], capture_output=True).returncode == 0  # else it would be


@pytest.mark.parametrize("file", ["requirements.lock", "environment.yml", "pyproject.toml", "Makefile"])
def test_no_package_location_is_committed(file):
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        assert "://" not in line and not re.search(r"\b\w+\.(org|com|io|net)\b", line), line
        assert not re.search(r"--(find-links|(extra-)?index-url|trusted-host)", line), line
        if file != "Makefile":
            assert not re.search(r"(^|[\s\"'=])/\w", line), line


def test_conda_environment_has_the_locked_versions():
    (pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    pins = dict(line.split("==") for line in pip if not line.startswith("-"))
    direct = {canonicalize_name(r.name) for r in requirements(*EXTRAS)}
    assert pins == {name: locked()[name] for name in direct}


def test_conda_brings_a_pip_that_takes_all_of_it():
    """26.3 is the first that refuses a direct URL in a package's metadata, even in an extra that nobody asks for."""
    (pip,) = [Requirement(entry) for entry in CONDA if isinstance(entry, str) and entry.split()[0] == "pip"]
    assert pip.specifier.contains("26.2.1") and not pip.specifier.contains("26.3")


def test_conda_python_is_one_the_project_takes():
    (python,) = [entry for entry in CONDA if isinstance(entry, str) and entry.startswith("python ")]
    offered = SpecifierSet(python.removeprefix("python "))
    taken = SpecifierSet(PYPROJECT["project"]["requires-python"])
    minors = [f"3.{minor}.0" for minor in range(8, 20)]
    assert {m for m in minors if m in offered} <= {m for m in minors if m in taken}
    assert {"3.11.0", "3.12.0", "3.13.0"} <= {m for m in minors if m in offered}
    assert PYPROJECT["project"]["requires-python"] == ">={}.{}".format(*_setup.OLDEST)


# The set-up script


def test_setup_can_be_read_by_an_old_python():
    ast.parse(Path(_setup.__file__).read_text(encoding="utf-8"), feature_version=(3, 6))


def test_setup_imports_only_the_standard_library():
    import sys

    for node in ast.walk(ast.parse(Path(_setup.__file__).read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


def test_old_python_gets_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(_setup.sys, "version_info", (3, 9, 18, "final", 0))
    assert _setup.main([]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "3.9.18" in message and "3.11 or newer" in message
    assert "BASE_PYTHON=" in message


def test_python_without_venv_gets_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(_setup.sys.modules, "ensurepip", None)
    assert _setup.main([]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "python3-venv" in message


def test_pip_settings_are_ranked_as_pip_ranks_them():
    listing = "\n".join([
        ":env:.find-links='/a /b'",
        "global.find-links='/c'",
        "global.cert='/ca.pem'",
        ":env:.cert=''",
        "global.index-url='https://global.invalid/simple'",
        "install.index-url='https://install.invalid/simple'",
        "global.extra-index-url='\\nhttps://one.invalid/simple\\nhttps://two.invalid/simple'",
        "freeze.timeout='10'",
    ])  # fmt: skip
    assert _setup.pip_settings(listing) == {
        "find-links": "/a /b",
        "cert": "/ca.pem",
        "index-url": "https://install.invalid/simple",
        "extra-index-url": "\nhttps://one.invalid/simple\nhttps://two.invalid/simple",
    }


def test_uv_gets_the_locations_that_pip_has(tmp_path):
    wheels, certificate = tmp_path / "wheels", tmp_path / "ca.pem"
    wheels.mkdir()
    certificate.touch()
    settings = {
        "index-url": "https://user:secret@mirror.invalid/simple",
        "extra-index-url": f"\nhttps://one.invalid/simple\n{wheels.as_uri()}",
        "find-links": f"{wheels} https://two.invalid/wheels.html",
        "cert": str(certificate),
        "trusted-host": "one.invalid\ntwo.invalid",
        "timeout": "60",
    }
    assert _setup.uv_settings(settings, {}) == {
        "UV_DEFAULT_INDEX": "https://user:secret@mirror.invalid/simple",
        "UV_INDEX": f"https://one.invalid/simple {wheels.as_uri()}",
        "UV_INDEX_STRATEGY": "unsafe-first-match",
        "UV_FIND_LINKS": f"{wheels},https://two.invalid/wheels.html",
        "SSL_CERT_FILE": str(certificate),
        "UV_INSECURE_HOST": "one.invalid two.invalid",
        "UV_HTTP_TIMEOUT": "60",
    }


def test_uv_is_spared_locations_that_do_not_exist(tmp_path):
    gone = tmp_path / "gone"
    settings = {"find-links": f"{gone} {gone.as_uri()}", "extra-index-url": gone.as_uri(), "cert": str(gone)}
    assert _setup.uv_settings(settings, {}) == {}


def test_what_the_user_has_set_for_uv_stays():
    settings = {"index-url": "https://pip.invalid/simple", "extra-index-url": "https://more.invalid/simple"}
    env = {"UV_INDEX_URL": "https://uv.invalid/simple", "UV_INDEX_STRATEGY": "first-index"}
    assert _setup.uv_settings(settings, env) == {"UV_INDEX": "https://more.invalid/simple"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder whose commands are recorded instead of run; a command named in `failing` fails."""
    (tmp_path / "fluxnb").mkdir()
    for name in ("requirements.lock", "pyproject.toml", "fluxnb/_setup.py"):
        (tmp_path / name).write_text("uv==1.0\n")
        os.utime(tmp_path / name, (1000, 1000))
    ran, failing = [], []

    def run(command, env, capture=False):
        ran.append(command)
        if any(word in command for word in failing):
            raise _setup.SetupError("it failed")
        if "venv" in command:
            (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / ".venv/bin/python").touch()
            (tmp_path / ".venv" / _setup.STAMP).unlink(missing_ok=True)
        return ":env:.index-url='https://user:secret@mirror.invalid/simple'\n"

    monkeypatch.setattr(_setup, "ROOT", str(tmp_path))
    monkeypatch.setattr(_setup, "run", run)
    return tmp_path, ran, failing


def test_environment_is_made_once(project):
    folder, ran, _ = project
    assert _setup.main([]) == 0
    assert (folder / ".venv" / _setup.STAMP).exists()
    assert ran[0][-4:] == ["-m", "venv", "--clear", str(folder / ".venv")]
    ran.clear()
    assert _setup.main([]) == 0 and not ran


def test_changed_lock_updates_the_environment(project):
    folder, ran, _ = project
    _setup.main([])
    ran.clear()
    (folder / "requirements.lock").write_text("uv==2.0\n")
    os.utime(folder / ".venv" / _setup.STAMP, (500, 500))
    assert _setup.main([]) == 0
    assert ran[0][-2:] == ["-r", str(folder / ".venv/uv.txt")] and (folder / ".venv/uv.txt").read_text() == "uv==2.0\n"
    assert not any("venv" in command for command in ran)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with one notebook, and git in it."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "notebooks").mkdir()
    for name in (".gitattributes", "notebooks/02_attention.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.invalid", "commit", "-qm", "a")
    monkeypatch.setattr(_setup, "ROOT", str(tmp_path))
    return tmp_path / "notebooks/02_attention.ipynb", git


def run_by_hand(path):
    """The notebook as JupyterLab saves it after Run All."""
    import nbformat

    notebook = nbformat.read(path, 4)
    notebook.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    notebook.metadata.language_info |= {name: "a" for name in ("codemirror_mode", "file_extension", "version")}
    for i, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = i
        cell.outputs = [nbformat.v4.new_output("stream", text="done")]
        cell.metadata["execution"] = {"iopub.execute_input": "2026-11-25T00:00:00Z"}
    nbformat.write(notebook, path)


def test_a_notebook_run_by_hand_is_no_change_to_git(clone, monkeypatch):
    path, git = clone
    run_by_hand(path)
    assert git("status", "--short") == "M notebooks/02_attention.ipynb"
    _setup.clean_notebooks(sys.executable)
    assert git("diff") == ""  # of a file of another length `status` looks no further until it is added
    git("add", "--update")
    assert git("status", "--short") == ""
    path.write_text(path.read_text().replace("import ", "import os, ", 1))
    assert git("status", "--short") == "M notebooks/02_attention.ipynb"
    assert "+" in git("diff") and "done" not in git("diff") and "ipykernel" not in git("diff")
    path.write_text("no notebook")
    assert "+no notebook" in git("diff")


def test_git_looks_at_a_notebook_in_a_moment(clone):
    _setup.clean_notebooks(sys.executable)
    clone[0].touch()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert clone[1]("status", "--short") == ""  # of 18 notebooks, and a report waits for it
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.5


@pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="needs JupyterLab")
def test_a_notebook_that_is_run_and_saved_in_make_explore_stays_as_it_was(clone):
    from jupyter_server.services.contents.largefilemanager import LargeFileManager

    from fluxnb.report import saving

    path, git = clone
    before = path.read_bytes()
    hook = f"{saving.__name__}.{saving.before_saving.__name__}"
    manager = LargeFileManager(root_dir=str(path.parents[1]), pre_save_hook=hook)
    run_by_hand(path)
    ran = json.dumps(manager.get("notebooks/02_attention.ipynb")["content"])
    for name, kept in (("notebooks/02_attention.ipynb", False), ("mine.ipynb", True)):
        manager.save({"type": "notebook", "format": "json", "content": json.loads(ran)}, name)
        saved = (path.parents[1] / name).read_text()
        assert ("done" in saved) == ("ipykernel" in saved) == kept
    assert path.read_bytes() == before and git("status", "--short", str(path)) == ""
    within = LargeFileManager(root_dir=str(path.parent), pre_save_hook=hook)  # as where a notebook's path is given
    within.save({"type": "notebook", "format": "json", "content": json.loads(ran)}, path.name)
    assert path.read_bytes() == before


def test_outside_a_clone_nothing_is_set_up(tmp_path, monkeypatch):
    monkeypatch.setattr(_setup, "ROOT", str(tmp_path))
    monkeypatch.setattr(_setup.subprocess, "run", None)
    _setup.clean_notebooks(sys.executable)


def test_interrupted_environment_does_not_count(project):
    folder, ran, failing = project
    _setup.main([])
    os.utime(folder / ".venv" / _setup.STAMP, (500, 500))
    failing.append("--compile-bytecode")
    assert _setup.main([]) == 2
    assert not (folder / ".venv" / _setup.STAMP).exists()
    failing.clear()
    ran.clear()
    assert _setup.main([]) == 0
    assert "--clear" in ran[0]


def test_credentials_stay_off_the_command_line(project, capfd):
    _, ran, failing = project
    failing.append("--compile-bytecode")
    _setup.main([])
    assert "secret" not in str(ran) and "secret" not in "".join(capfd.readouterr())


def test_failed_command_is_named_in_one_sentence(capfd):
    with pytest.raises(_setup.SetupError, match=r"`false` failed with status 1: .* run make again"):
        _setup.run(["false"], dict(os.environ))
