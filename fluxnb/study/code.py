"""A digest of what techniques do: a row whose techniques' code has changed since is stale."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import fluxnb

ROOT = Path(fluxnb.__file__).parent


@functools.lru_cache(maxsize=256)
def digest(modules: tuple[str, ...]) -> str | None:
    """A digest of what modules of techniques do: of their code and that of those they import, comments left out."""
    seen: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen or not name.startswith(("fluxnb.techniques.", "fluxnb.cache.")):
            continue
        if (file := _file(name)) is None:
            continue
        seen[name], imported = _read(file)
        waiting += imported
    if not seen:
        return None
    return hashlib.sha256("\n".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:10]


@functools.cache
def _read(file: Path) -> tuple[str, list[str]]:
    """What a module does and the modules that it imports; kept, as most techniques share theirs."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return ast.dump(_without_docstrings(tree)), _imported(tree)


def _imported(tree: ast.AST) -> list[str]:
    """The modules of fluxnb that a module names in its imports; of `from package import name` both readings."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fluxnb."):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[:] = body[1:] or [ast.Pass()]
    return tree


def _file(name: str) -> Path | None:
    """The file of a module by name; None where the name is none's."""
    place = ROOT.joinpath(*name.split(".")[1:])
    found = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in found if file.is_file()), None)
