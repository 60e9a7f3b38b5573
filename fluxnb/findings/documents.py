"""Every line of the five documents that the study is about, and which rows answer it.

documents.csv has a line for each: the rows that it takes (`rows`: column or setting = value, where `a|b` is either and
`a&b` both, each in a row; a name alone is any value), how many (`least`), which columns have to be filled (`shows`), or
the claim of the ledger that judges it, or what of the project is there for it (`by`). `why` is what keeps it open on
the machines that there were.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fluxnb.findings import ledger, published
from fluxnb.study.row import FIELDS, Row

FILE = Path(__file__).parent / "documents.csv"
SAID = 3  # rows that are named for a line, of all that it has
MET, NOT_MET, OPEN = "met", "answered, not met", "open"


@dataclass(frozen=True)
class Line:
    """A line of a document; see the module's text."""

    document: str
    part: str
    item: str
    notebook: str
    rows: str
    least: str
    shows: str
    claim: str
    by: str
    why: str

    @property
    def selected(self) -> dict[str, list[list[str]]]:
        """Column or setting -> for each row that there has to be, the values that it may have; none: any."""
        pairs = (part.strip().partition("=") for part in self.rows.split(";") if part.strip())
        return {name: [one.split("|") for one in values.split("&")] if values else [[]] for name, _, values in pairs}

    @property
    def gpus(self) -> list[str]:
        """The configurations that it asks for by name."""
        return [value for one in self.selected.get("gpu", []) for value in one]

    @property
    def claimed(self) -> published.Claim | None:
        """The claim that judges it: by technique, and where there are several by metric, GPU, what it is over."""
        if not self.claim:
            return None
        technique, *more = self.claim.split(" | ")
        same = [c for c in published.claims() if c.technique == technique]
        for name, value in zip(("metric", "gpu", "over"), more, strict=False):
            same = [c for c in same if str(getattr(c, name)).startswith(value)]
        return same[0]


@dataclass(frozen=True)
class Answer:
    """What rows say of a line: the first of those that show it, of how many, and in words."""

    line: Line
    state: str
    said: str
    rows: tuple[Row, ...] = ()

    @property
    def ids(self) -> str:
        """The rows by their ids: the first few, and how many more."""
        more = f" and {len(self.rows) - SAID} more" if len(self.rows) > SAID else ""
        return ", ".join(str(r.id) for r in self.rows[:SAID]) + more


@lru_cache(maxsize=1)
def lines() -> tuple[Line, ...]:
    """Every line of the documents, in their order."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(Line(**line) for line in csv.DictReader(file))


def answers(rows: Sequence[Row], gpu: str = "h100", notebooks: Iterable[str] | None = None) -> list[Answer]:
    """What the rows say of every line.

    Args:
        gpu: the configuration that would make what lacks, where a line doesn't say it.
        notebooks: those that a configuration runs, to leave out lines that another one answers; None for all.
    """
    entries = {id(e.claim): e for e in ledger.entries(rows)}
    own = [x for x in lines() if notebooks is None or x.notebook in notebooks]
    return [_answer(line, rows, entries, gpu) for line in own]


def sentence(found: Sequence[Answer]) -> str:
    """How many of the lines are answered."""
    counted = {state: sum(a.state == state for a in found) for state in (MET, NOT_MET, OPEN)}
    never = sum(a.state == OPEN and bool(a.line.why) for a in found)
    return (
        f"Of {len(found)} lines of the documents {counted[MET] + counted[NOT_MET]} are answered: {counted[MET]} are "
        f"met and {counted[NOT_MET]} are not. {counted[OPEN]} are open, {never} of them on machines or weights that "
        "weren't to be had."
    )


def tables(found: Sequence[Answer]) -> dict[str, Any]:
    """For each document a table of its lines: whether each is met, by which rows, or the reason."""
    from fluxnb.findings.table import listed

    made: dict[str, list[dict]] = {}
    for a in found:
        own = {"item": a.line.item, "part": a.line.part, "state": a.state, "rows": a.ids, "how, or why not": a.said}
        made.setdefault(a.line.document, []).append(own)
    return {document: listed(lines, "item") for document, lines in made.items()}


def _answer(line: Line, rows: Sequence[Row], entries: dict[int, ledger.Entry], gpu: str) -> Answer:
    if line.by:
        return Answer(line, MET, line.by)
    if line.claim:
        return _judged(line, entries[id(line.claimed)])
    fitting = [r for r in rows if r.notebook == line.notebook and _fits(r, line.selected)]
    shown = [r for r in fitting if r.ok and all(_shown(r, name) is not None for name in line.shows.split())]
    if len(shown) >= int(line.least or 1) and not (lacking := _lacking(shown, line.selected)):
        words = f"{len(shown)} row{'s' * (len(shown) > 1)} of {line.notebook}"
        return Answer(line, MET, words, tuple(sorted(shown, key=_first)))
    if reason := next((r for r in reversed(fitting) if r.reason and not shown), None):
        return Answer(line, OPEN, f"can't run here: {reason.reason}", (reason,))
    if shown and not line.why:
        few = (
            f"only {len(shown)} of {line.least}" if len(shown) < int(line.least or 1) else f"no {', no '.join(lacking)}"
        )
        return Answer(line, OPEN, f"{few} in {line.notebook}", tuple(shown))
    return Answer(line, OPEN, line.why or _taken(line, gpu))


def _judged(line: Line, entry: ledger.Entry) -> Answer:
    """By the ledger's rules."""
    state = {ledger.REPRODUCED: MET, ledger.NOT_REPRODUCED: NOT_MET}.get(entry.verdict, OPEN)
    if state == OPEN and line.why:
        return Answer(line, OPEN, line.why)
    ours = f"{entry.text}, {entry.setting}" if entry.row else ""
    said = "; ".join(filter(None, [f"{entry.verdict}: {entry.reason}" if entry.reason else entry.verdict, ours]))
    return Answer(line, state, said, (entry.row,) if entry.row else ())


def _taken(line: Line, gpu: str) -> str:
    """What would make rows for it."""
    number = line.notebook.partition("_")[0]
    return f"no row yet: it takes `make report GPU={(line.gpus or [gpu])[0]} ONLY={number} THOROUGH=1`"


def _first(row: Row) -> tuple:
    """The row that is named first: of an H100, then of the newest session."""
    return (row.gpu or "").partition("x")[0] != "h100", row.session is None, -(row.n or 0)


def _fits(row: Row, selected: dict[str, list[list[str]]]) -> bool:
    """Whether a row has all that is asked of every row."""
    return all(any(_has(row, name, one) for one in values) for name, values in selected.items())


def _has(row: Row, name: str, values: list[str]) -> bool:
    value = getattr(row, name) if name in FIELDS else row.setting(name)
    return value is not None and (not values or _text(value) in values)


def _lacking(rows: Sequence[Row], selected: dict[str, list[list[str]]]) -> list[str]:
    """What no row has, of values that each have to be there."""
    return [
        f"{name} {' or '.join(one)}"
        for name, values in selected.items()
        for one in values
        if one and not any(_has(r, name, one) for r in rows)
    ]


def _shown(row: Row, names: str) -> Any:
    """The first of `a|b` that is there: a column, or telemetry.x or proof.x."""
    for name in names.split("|"):
        column, _, part = name.partition(".")
        value = getattr(row, column)
        if (value := (value or {}).get(part) if part else value) is not None:
            return value
    return None


def _text(value) -> str:
    """As it stands in the table."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value)
