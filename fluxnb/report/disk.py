"""What can be deleted to free the disk: downloaded models and what was compiled. Results are never among it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cache:
    """A folder that will be made again when it is needed."""

    what: str
    path: Path
    size: int  # bytes


def found(root: Path) -> list[Cache]:
    """The caches that exist: the model hub's, PyTorch's, Triton's. None that is in the project or around it.

    What is compiled for the reports is in build/, which `make clean` removes.
    """
    from huggingface_hub import constants

    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "root"
    places = {
        "models downloaded from the hub": Path(constants.HF_HUB_CACHE),
        "what torch.compile made": Path(
            os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / f"torchinductor_{user}")
        ),
        "kernels that Triton compiled": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
    }
    return [
        Cache(what, path, size_of(path))
        for what, path in places.items()
        if path.is_dir() and not path.is_symlink() and not _holds_more(path.resolve(), root.resolve())
    ]


def _holds_more(path: Path, root: Path) -> bool:
    """Whether a folder is in the project, or is, or is around, the project or somebody's home."""
    return path.is_relative_to(root) or root.is_relative_to(path) or Path.home().resolve().is_relative_to(path)


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; links are not followed."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def clean(root: Path, ask: Callable[[str], str] = input, say: Callable[[str], None] = print) -> list[Path]:
    """Lists the caches with their sizes, asks for each, deletes those answered with y or yes; returns their paths."""
    caches, deleted = found(root), []
    if not caches:
        say("There is no cache to delete.")
    for cache in caches:
        say(f"{cache.what}: {cache.path}, {cache.size / 2**30:.2f} GiB")
    for cache in caches:
        if ask(f"Delete {cache.path} ({cache.size / 2**30:.2f} GiB)? [y/N] ").strip().lower() in ("y", "yes"):
            shutil.rmtree(cache.path)
            deleted.append(cache.path)
    say(f"{len(deleted)} of {len(caches)} deleted; results and reports are as they were.")
    return deleted
