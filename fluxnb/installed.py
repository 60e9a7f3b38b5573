"""What of fluxnb is installed: its packages, those of the extras, and the folder that the study runs in.

Imports the standard library only: it has to answer on an interpreter that lacks every package.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from fluxnb.errors import UserError

# Module -> what pip calls it. An accelerated image needs no more; pyproject.toml has the versions.
CORE = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "PIL": "pillow",
    "numpy": "numpy",
    "psutil": "psutil",
    "yaml": "pyyaml",
}
EXTRAS = {
    "study": {
        "skimage": "scikit-image",
        "flip_evaluator": "flip-evaluator",
        "pandas": "pandas",
        "matplotlib": "matplotlib",
        "seaborn": "seaborn",
        "papermill": "papermill",
        "nbconvert": "nbconvert",
        "nbclient": "nbclient",
        "ipykernel": "ipykernel",
        "jupyterlab": "jupyterlab",
        "ipywidgets": "ipywidgets",
        "pynvml": "nvidia-ml-py",
        "peft": "peft",
    },
    "quantization": {
        "torchao": "torchao",
        "bitsandbytes": "bitsandbytes",
        "optimum.quanto": "optimum-quanto",
        "gguf": "gguf",
    },
    "slurm": {"submitit": "submitit"},
    "reference": {"para_attn": "para-attn", "cache_dit": "cache-dit"},
}


def command(extra: str) -> str:
    """What installs an extra: from the clone where this runs in one."""
    clone = (Path(__file__).resolve().parents[1] / "pyproject.toml").is_file()
    installer = "uv pip" if extra == "reference" else "pip"  # pip 26.3 and newer refuse para-attn's metadata
    return f"{installer} install -e '.[{extra}]'" if clone else f"{installer} install 'fluxnb[{extra}]'"


def needs(module: str, error: ImportError | None = None) -> str:
    """'needs the package …', its extra and the command; with why it doesn't load where it is there and doesn't."""
    extra, package = next((e, names[module]) for e, names in EXTRAS.items() if module in names)
    why = "" if error is None or isinstance(error, ModuleNotFoundError) else f" (it doesn't load: {error})"
    return f"needs the package {package}, of the extra {extra}: `{command(extra)}`{why}"


def need(module: str, whose: str = "This") -> ModuleType:
    """An optional module. Raises UserError, which names the package, its extra and the command, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{whose} {needs(module, error)}.") from error


def project() -> Path:
    """The folder that the project was cloned into, around the working directory, else around this package.

    Raises UserError where there is none.
    """
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (root / "params" / "base.yaml").is_file():
            return root
    raise UserError(
        "There is no params/base.yaml here: the study runs in the folder that the project was cloned into, and an "
        "installed fluxnb has the library only; change to that folder."
    )
