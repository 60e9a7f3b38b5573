"""`python -m fluxnb rows`: a row with everything about it, or a list of them, of all tables below reports/."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxnb import notebooks
from fluxnb.errors import UserError
from fluxnb.report import TABLE
from fluxnb.study.results import Results
from fluxnb.study.row import FIELDS, Row

PARTS = {"meaning": "label", "figures": "status", "origin": "baseline"}  # part of a row -> its first column
FIGURES = 4  # of a number, in the list


@dataclass(frozen=True)
class Found:
    """A row, and where it lies."""

    row: Row
    table: Path
    own: bool

    @property
    def whose(self) -> str:
        """Which of the two trees it is in."""
        return "own" if self.own else "reference"


def every(root: Path) -> Iterator[Found]:
    """The rows of a user's own tables, then those of the committed reference."""
    reports = root / "reports"
    for above, own in ((reports / "own", True), (reports, False)):
        for table in itertools.chain(*(sorted((above / f"{n}_gpu").rglob(TABLE)) for n in ("single", "multi"))):
            yield from (Found(row, table, own) for row in Results(table).rows())


def one(root: Path, id: str) -> str:
    """Everything about the row of an id, or of its beginning. Raises UserError unless exactly one row has it."""
    rows = list(every(root))
    fitting = {f.row.id: f for f in reversed(rows) if f.row.id and f.row.id.startswith(id.lower())} if id else {}
    if len(fitting) != 1:
        close = difflib.get_close_matches(id, [str(f.row.id) for f in rows], n=1) or ["python -m fluxnb rows"]
        what = f"{len(fitting)} rows have ids that begin with {id}" if fitting else f"There is no row {id}"
        raise UserError(f"{what}: its id has 10 hex digits, as pages and `python -m fluxnb rows` show it "
                        f"(nearest: {close[0]}).")  # fmt: skip
    (found,) = fitting.values()
    baseline = next((f.row for f in rows if f.row.id == found.row.baseline), None)
    return "\n".join(_described(root, found, baseline))


def listed(root: Path, notebook: str | None = None, gpu: str | None = None, technique: str | None = None) -> str:
    """The rows that fit, one a line: id, own or reference, configuration, session, median, speedup, label.

    Args:
        notebook: by name or number.
        gpu: a configuration.
        technique: a part of the technique's, family's or stack's name.
    """
    stems = [p.stem for p in notebooks.sources(root)]
    if notebook and not any(notebook in (stem, stem.partition("_")[0]) for stem in stems):
        raise UserError(f"There is no notebook {notebook!r}; choose from {', '.join(stems)}.")
    wanted = (technique or "").lower()
    lines = [
        _line(f)
        for f in every(root)
        if (not notebook or notebook in (f.row.notebook, str(f.row.notebook).partition("_")[0]))
        and (not gpu or f.row.gpu == gpu)
        and any(wanted in str(name).lower() for name in (f.row.technique, f.row.family, f.row.stack) if name)
    ]
    if not lines:
        raise UserError("No row fits: leave --notebook, --gpu or --technique out, or run `make report` first.")
    heads = ("id", "whose", "gpu", "session", "p50 (s)", "speedup", "label")
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in (heads, *lines))


def of_documents(root: Path) -> str:
    """Every line of the documents with the ids of the committed rows that answer it, or the reason."""
    from fluxnb.findings import documents
    from fluxnb.report.configurations import configurations

    found, lines = documents.answers([r for c in configurations(root) for r in c.rows]), []
    for (document, part), own in itertools.groupby(found, key=lambda a: (a.line.document, a.line.part)):
        lines += ["", f"{document}: {part}"]
        lines += [f"  {a.state}: {a.line.item}: {': '.join(filter(None, [a.ids, a.said]))}" for a in own]
    return "\n".join([documents.sentence(found), *lines])


def _line(found: Found) -> tuple[str, ...]:
    row = found.row
    speedup = "–" if row.speedup is None else f"{row.speedup:.2f}×"
    seconds = row.status if row.latency_p50 is None else f"{row.latency_p50:.{FIGURES}g}"
    return tuple(
        str(value) if value is not None else "–"
        for value in (row.id, found.whose, row.gpu, row.session, seconds, speedup, row.label or row.technique)
    )


def _described(root: Path, found: Found, baseline: Row | None) -> Iterator[str]:
    """The lines of one row: its columns with their values and what they are."""
    row, heads = found.row, {first: part for part, first in PARTS.items()}
    yield f"row {row.id}, {found.whose}: {found.table.relative_to(root)}"
    for name, column in FIELDS.items():
        if name in heads:
            yield f"\n{heads[name]}"
        value = getattr(row, name)
        if name != "id" and value not in (None, {}):
            yield f"  {name:<18} {_shown(value)}  ({column.metadata['help']})"
    if row.baseline is None:
        return
    if baseline is None:
        yield "\nbaseline\n  its row is not in any table here"
        return
    yield f"\nbaseline {baseline.id}: {baseline.label or baseline.technique}"
    for name in ("latency_p50", "n", "samples", "again", "stable"):
        if (value := getattr(baseline, name)) is not None:
            yield f"  {name:<18} {_shown(value)}"


def _shown(value) -> str:
    if isinstance(value, list):
        return " ".join(_shown(v) for v in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
