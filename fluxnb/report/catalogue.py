"""What there is to switch on, and what made-up names mean: read off the classes themselves.

`python -m fluxnb techniques`, the README's tables and the glossary are made of this.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from fluxnb import cache, families, stacks
from fluxnb import techniques as switched
from fluxnb.cache import gates, para_attn, predictors
from fluxnb.families import Family
from fluxnb.report import html, terms, write_atomic
from fluxnb.technique import ANOTHER, EXACT_TERMS, EXACTNESS
from fluxnb.techniques import libraries

MARKS = {  # of what is written into the README
    "techniques": ("<!-- techniques: written by `make site` -->", "<!-- end of techniques -->"),
    "glossary": ("<!-- glossary: written by `make site` -->", "<!-- end of glossary -->"),
}


@dataclass(frozen=True)
class Entry:
    """One technique, or one part that a cache is put together from, as its class says."""

    made: type
    family: Family | None  # None: of any cache
    term: str
    does: str
    exact: str
    source: str
    notebook: str

    @property
    def call(self) -> str:
        """How it is written down: the class with what can be chosen."""
        chosen = [name for name in inspect.signature(self.made).parameters if name != "options"]
        return f"{self.made.__name__}({', '.join(chosen)})"

    @property
    def path(self) -> str:
        """Where it is imported from, below `fluxnb`."""
        for place in (switched, cache):
            if hasattr(place, self.made.__name__):
                return f"{place.__name__.removeprefix('fluxnb.')}.{self.made.__name__}"
        return f"{self.made.__module__.removeprefix('fluxnb.')}.{self.made.__name__}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its `kind` may be."""
        return tuple(getattr(self.made, "KINDS", ()))


def classes() -> list[type]:
    """Every technique, gate and predictor, in the order in which modules have them."""
    found = [getattr(switched, name) for name in switched.__all__] + [cache.Cache, para_attn.ParaAttention]
    found += [libraries.DiffusersCache, libraries.CacheDiT]
    for module in pkgutil.iter_modules(gates.__path__, f"{gates.__name__}."):
        found += _own(importlib.import_module(module.name), "family")
    return found + _own(predictors, "predict")


def _own(module, having: str) -> list[type]:
    """The public classes that a module defines itself and that have an attribute of that name."""
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in own if hasattr(c, having) and not c.__name__.startswith("_")]


def techniques() -> list[Entry]:
    """An entry for each, by family in the families' own order; what belongs to any cache stands last."""
    entries = [_entry(made) for made in classes()]
    return sorted(entries, key=lambda e: len(families.ALL) if e.family is None else families.ALL.index(e.family))


def _entry(made: type) -> Entry:
    family = getattr(made, "family", None)
    family = family if isinstance(family, Family) else None
    home = family or families.COMBINED
    text = inspect.getdoc(made) or ""
    source = re.search(r"\bSource: (.+?)(?:\n\s*\n|\Z)", text, re.S)
    name = getattr(made, "term", None) or getattr(made, "name", None)
    if family is not None and family.cache and made is family.gate_class():
        name = family.name
    return Entry(
        made,
        family,
        name if isinstance(name, str) else made.__name__,
        " ".join(re.split(r"\.(?:\s|$)", text, maxsplit=1)[0].split()),
        _exact(made),
        " ".join(source[1].split()).removesuffix(".") if source else "",
        getattr(made, "notebook", home.notebook),
    )


def _exact(made: type) -> str:
    """How far from the plain image it is: of a class whose kinds differ, from the nearest to the furthest."""
    exact = getattr(made, "exact", ANOTHER)
    if isinstance(exact, str):
        return exact
    of_kinds = {made(kind).exact for kind in getattr(made, "KINDS", ())} or {ANOTHER}
    return " or ".join(sorted(of_kinds, key=EXACTNESS.index))


def glossary() -> dict[str, str]:
    """Word -> what it means: of families, of how exact an image is, and of names that were made up here."""
    made_up = {word: said for made in classes() for word, said in getattr(made, "terms", {}).items()}
    return {f.name: f.about.rstrip(".") for f in families.ALL} | made_up | stacks.TERMS | EXACT_TERMS


def text() -> str:
    """All techniques for a terminal, family by family."""
    lines: list[str] = []
    before: object = ""
    for entry in techniques():
        if entry.family is not before:
            before = entry.family
            about = f"{before.name}: {before.about}" if before else "of any cache: when a step is reused, and how."
            lines += ["", about] if lines else [about]
        lines.append(f"  {entry.call}")
        said = [f"{entry.does}.", f"Image: {entry.exact}.", f"Notebook {entry.notebook}."]
        said += [f"Kinds: {', '.join(entry.kinds)}."] * bool(entry.kinds) + [f"Source: {entry.source}."]
        lines += textwrap.wrap(" ".join(said), 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def markdown() -> str:
    """The README's table of techniques."""
    lines = ["| technique | class | what it does | image | notebook |", "|---|---|---|---|---|"]
    for e in techniques():
        lines.append(f"| {e.term} | `{e.path}` | {e.does} | {e.exact} | `{e.notebook}` |")
    return "\n".join(lines)


def glossary_markdown() -> str:
    """The README's glossary."""
    return "\n".join(f"- **{word}**: {said}" for word, said in glossary().items())


def place(word: str) -> str:
    """Where a word stands on the glossary's page."""
    return "word-" + (re.sub(r"\W+", "-", word.lower()).strip("-") or "none")


def page() -> dict:
    """The glossary as a page: the values of blocks.html.j2."""
    every: dict[str, tuple[str, str]] = {}  # of two words with one place the first
    for word, said in (terms.EVERY | glossary()).items():
        every.setdefault(place(word), (word, said))
    lines = [
        f'<dt id="{at}">{html.inline(word)}</dt><dd>{html.inline(said)}.</dd>'
        for at, (word, said) in sorted(every.items(), key=lambda one: one[1][0].lower())
    ]
    return {"title": "Glossary", "blocks": [f'<dl class="glossary">{"".join(lines)}</dl>']}


def write(root: Path) -> bool:
    """Puts table and glossary between the README's marks; whether it has them all."""
    path = Path(root) / "README.md"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not all(mark in before for marks in MARKS.values() for mark in marks):
        return False
    after = before
    for name, made in (("techniques", markdown()), ("glossary", glossary_markdown())):
        begin, end = MARKS[name]
        after = f"{after.split(begin)[0]}{begin}\n{made}\n{end}{after.split(end, 1)[1]}"
    if after != before:
        write_atomic(path, after)
    return True
