"""fluxnb: a reproducible study of how to make FLUX text-to-image inference fast.

`from fluxnb import accelerate` puts what it recommends on a pipeline. Importing this imports no PyTorch: what a name
needs is imported when it is asked for.
"""

import ast as _ast
import importlib as _importlib
from pathlib import Path as _Path

__version__ = "0.1.0"

_STUB = _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))  # the one list of public names
_OWNERS = {a.name: node.module for node in _STUB.body if isinstance(node, _ast.ImportFrom) for a in node.names}
__all__ = list(_OWNERS)


def __getattr__(name: str):
    if name not in _OWNERS:
        raise AttributeError(f"fluxnb has no {name}; it has {', '.join(_OWNERS)}")
    return getattr(_importlib.import_module(_OWNERS[name]), name)


def __dir__():
    return sorted({*globals(), *_OWNERS})
