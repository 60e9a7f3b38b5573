"""What a run will need, looked at before anything is measured: one sentence names all that is missing.

Imports the standard library only: it has to answer on an interpreter that lacks every package.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from fluxnb import _setup
from fluxnb.errors import UserError
from fluxnb.installed import CORE, EXTRAS, command, project
from fluxnb.models import flux2
from fluxnb.report import saving

OLDEST = (3, 11)
# A run does without what shows widgets, reads a GPU's clocks or loads a LoRA.
SPARED = ("jupyterlab", "ipywidgets", "pynvml", "peft")
NEEDED = {m: name for m, name in (CORE | EXTRAS["study"]).items() if m not in SPARED}  # module -> what pip calls it
FREE_GIB = 2.0  # of disk: pages, kept images, compiled kernels
FULL_SIZE_GIB = 38.0  # of a GPU: FLUX.1 in bfloat16 with its text encoders, and one image
DOWNLOAD_GIB = 32.0  # of disk: its weights
EXPLORE = "explore"
TOOLS = {  # of a target of the Makefile: module -> what pip calls it, and the extra that has them
    EXPLORE: ({"jupyterlab": "jupyterlab"}, "study"),
    "test": (RUNNER := {"pytest": "pytest", "xdist": "pytest-xdist"}, "test"),
    "soak": (RUNNER, "test"),
    "lint": ({"ruff": "ruff", "mypy": "mypy"}, "dev"),
}
TEMPLATE = Path("base", "display_priority.j2")  # of nbconvert's, that ours starts from


def check(root: Path | None = None) -> None:
    """Raises UserError unless the interpreter, its packages, nbconvert's templates and the disk are fit for a run."""
    root = root or project()
    problems = [*_version(), *_packages(), *_templates(), *_disk(root)]
    if problems:
        raise UserError(f"Nothing was measured, because {'; and '.join(problems)}.")


def missing() -> list[str]:
    """The needed packages that this interpreter lacks, as pip calls them."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def check_memory(chosen) -> None:
    """Raises UserError unless every GPU that a run uses has room for the configuration's models of full size."""
    large = {name: size for name in chosen.study.models if (size := _needed_gib(name)) > 1}
    if not large or chosen.gpu.match == "cpu":
        return
    leave = f", leave the model out of study.models in params/{chosen.name}.yaml" * (chosen.model is None)
    for index, free in enumerate(_free_gib()[: chosen.gpu.count]):
        if free < (most := max(large.values())):
            raise UserError(
                f"GPU {index} has {free:.0f} GiB free and {', '.join(large)} needs {most:.0f}: end what else runs "
                f"there{leave}, or set FORCE=1 to go on anyway."
            )


def check_download(model: str) -> None:
    """Raises UserError where the disk has no room for the weights of a model that have to come from the hub."""
    from huggingface_hub import constants

    if model in flux2.NAMES:
        return
    own = Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    if Path(os.path.expanduser(model)).is_dir() or any(own.glob("snapshots/*/transformer/*.safetensors")):
        return
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free / 2**30) < DOWNLOAD_GIB:
        raise UserError(
            f"{place} has {free:.0f} GiB free, and {model} is about {DOWNLOAD_GIB:.0f} to download: make room, or set "
            "HF_HOME to a folder on another disk."
        )


def _needed_gib(model: str) -> float:
    """Memory of a GPU that a model needs in bfloat16; 0 for the embedded ones."""
    folder = Path(os.path.expanduser(model))
    if model in flux2.NAMES:
        return 2 * flux2.SIZES[model].numbers / 2**30 + (FULL_SIZE_GIB - DOWNLOAD_GIB)
    if not folder.is_dir():
        return 0.0 if model.startswith("embedded") else FULL_SIZE_GIB
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**30
    return weights * FULL_SIZE_GIB / DOWNLOAD_GIB


def without_tools(target: str) -> str:
    """What keeps a target of the Makefile's from running on this interpreter; empty if nothing."""
    tools, extra = TOOLS[target]
    lacks = [name for module, name in tools.items() if importlib.util.find_spec(module) is None]
    install = f"{sys.executable} -m {command(extra)}"
    said = [f"{sys.executable} lacks {', '.join(lacks)} (install with: {install})"] if lacks else []
    if target == "explore" and os.geteuid() == 0 and "--allow-root" not in os.environ.get("ARGS", ""):
        said.append("JupyterLab doesn't start as root (be another user, or give ARGS=--allow-root where you are alone)")
    return "; and ".join(_version() + said)


def lacking() -> str:
    """What packages are missing and how they are installed, to follow "because"; empty if none is."""
    names = missing()
    if not names:
        return ""
    return f"{sys.executable} lacks {', '.join(names)} (install with: {sys.executable} -m {command('study')})"


def _version() -> list[str]:
    if sys.version_info[:2] >= OLDEST:
        return []
    return [f"{sys.executable} is Python {sys.version.split()[0]} and 3.11 or newer is needed"]


def _packages() -> list[str]:
    return [said] if (said := lacking()) else []


def _templates() -> list[str]:
    """nbconvert looks for them in Jupyter's folders, which a package installed beside an interpreter may not be in."""
    if importlib.util.find_spec("jupyter_core") is None or importlib.util.find_spec("nbconvert") is None:
        return []  # said already
    from jupyter_core.paths import jupyter_path

    searched = [Path(folder) for folder in jupyter_path("nbconvert", "templates")]
    if any((folder / TEMPLATE).is_file() for folder in searched):
        return []
    package = Path(importlib.util.find_spec("nbconvert").origin).parent  # type: ignore[union-attr, arg-type]
    near = [place / "share" / "jupyter" for place in package.parents]
    found = next((place for place in near if (place / "nbconvert" / "templates" / TEMPLATE).is_file()), None)
    how = f"set JUPYTER_PATH={found}" if found else "install nbconvert again, or set JUPYTER_PATH to its share/jupyter"
    return [f"nbconvert's templates are in none of Jupyter's folders ({how})"]


def _disk(root: Path) -> list[str]:
    found: dict[str, None] = {}  # once, where both are in one folder
    for name in ("build", "reports"):
        place = root / name
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            found[f"{place} can't be written to (make it writable)"] = None
        elif (free := shutil.disk_usage(place).free / 2**30) < FREE_GIB:
            found[f"{place} has {free:.1f} GiB free and {FREE_GIB:.0f} are needed (make room)"] = None
    return list(found)


def _free_gib() -> list[float]:
    """Free memory of the GPUs that a run would see, in their order; [] where nvidia-smi doesn't tell."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", seen]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return [float(line) / 1024 for line in answer.stdout.split()] if answer.returncode == 0 else []
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _go(target: str, *command: str) -> int:
    """Runs a command of this interpreter's with ARGS, which no shell reads; 2 where its tools are lacking."""
    try:
        command += tuple(shlex.split(os.environ.get("ARGS", "") if command else ""))
        trouble = without_tools(target)
    except ValueError:
        trouble = "ARGS opens a quotation mark and doesn't close it"
    if trouble:
        print(f"fluxnb: `make {target}` can't run: {trouble}.", file=sys.stderr)
        return 2
    if target == EXPLORE:
        _setup.clean_notebooks(sys.executable)
        command += (f"--ContentsManager.pre_save_hook={saving.__name__}.{saving.before_saving.__name__}",)
    if command:
        os.execv(sys.executable, [sys.executable, *command])
    return 0


if __name__ == "__main__":
    sys.exit(_go(*sys.argv[1:]))
