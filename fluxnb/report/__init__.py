"""Executing the notebooks, rendering them, and publishing what people read.

Where a configuration keeps things, relative to the project root:

    notebooks/NN_name.ipynb               sources, outputs stripped
    build/<gpu>/NN_name.ipynb             executed (NN_name.failed.ipynb when a cell failed)
    build/<gpu>/NN_name.json              its last execution: status, fingerprint, seconds, rows, provenance
    <params.own_dir>/NN_name.html         a user's own run, beside index.html, results.csv and run.json
    <params.report_dir>/NN_name.html      the committed reference, alike
    build/<gpu>/reference/                executed by a replay of the reference
    build/<gpu>/models/<model>/           executed for a model of the user's, whose reports lie in <own_dir>/<model>/

This module holds only what running, rendering and the indexes share, and imports nothing heavy: an unchanged
run has to be over in a moment.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fluxnb import leftovers
from fluxnb.scrub import scrub, scrub_file

PAGES = "pages.json"  # what the indexes say of each page
RUN = "run.json"  # the provenance of the last run, and how each notebook went
TABLE = "results.csv"


def import_jsonschema() -> None:
    """Imports what Jupyter's libraries check notebooks with, less the grammars of IRIs, which take a second to make."""
    name = "rfc3987_syntax"
    if lacking := name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]  # it can't be imported, and jsonschema goes without
    with suppress(ImportError):  # nor is nbformat here then, whose import says so
        import jsonschema  # noqa: F401
    if lacking:
        del sys.modules[name]


@dataclass(frozen=True)
class Place:
    """Where one configuration's notebooks, rows and pages lie: a user's own, or those of the committed reference.

    Args:
        model: of the user's, that all of it is about; "" for the study's own.
    """

    gpu: str
    gpus: int
    root: Path
    build: Path
    reports: Path
    own: bool = True
    model: str = ""

    @property
    def title(self) -> str:
        """What readers see of it."""
        return ", ".join(filter(None, [self.gpu, self.model]))

    @property
    def images(self) -> Path:
        """Those that were kept, which a replay of the reference shares with a user's own runs."""
        return (self.build if self.own else self.build.parent) / "images"

    @property
    def table(self) -> Path:
        """The rows."""
        return self.reports / TABLE


def own(params, root: Path) -> Place:
    """Where `make report` writes."""
    root = Path(root).resolve()
    model = params.model.folder if params.model else ""
    return Place(params.name, params.gpu.count, root, root / params.build_dir, root / params.own_dir, model=model)


def reference(params, root: Path) -> Place:
    """Where the committed results of a configuration lie, which only `REPLAY=1` and `make reference` write to."""
    root = Path(root).resolve()
    build = root / "build" / params.name / "reference"
    return Place(params.name, params.gpu.count, root, build, root / params.report_dir, own=False)


def write_atomic(path: Path, text: str) -> None:
    """Write `text`, less secrets, so that a reader, and a run killed meanwhile, has the old file or the new."""
    text = scrub(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_changed(path: Path, text: str) -> None:
    """Write a page, but leave the file alone when it says the same already."""
    text = scrub(text)
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass
    write_atomic(path, text)


def write_json(path: Path, value: dict) -> None:
    """A mapping as a JSON file."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict:
    """The mapping in a JSON file, or {} when there is no such file or it isn't a mapping."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_state(build: Path, stem: str) -> dict:
    """The state of a notebook's last execution, {} when it was never started."""
    return read_json(build / f"{stem}.json")


def tidy(place: Place) -> None:
    """Removes what a run that was killed has left, and says of what it was at that it was interrupted."""
    leftovers.clean(place.build, place.reports, place.root / "reports", place.root / "reports" / "own")
    for path in place.build.glob("*.tmp.ipynb"):
        path.unlink(missing_ok=True)
    for path in (*place.build.glob("*.kernel.log"), place.root / "build" / "imports.log"):
        scrub_file(path)
    for path in place.build.glob("[0-9]*.json"):
        if (state := read_json(path)).get("status") == "running":
            write_json(path, state | {"status": "interrupted"})


def copy(path: Path, target: Path) -> None:
    """Copies a file so that whoever is killed meanwhile leaves the old one or the new."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copy2(path, beside)
    os.replace(beside, target)


def executed_notebook(build: Path, stem: str) -> Path | None:
    """The executed notebook to read: the successful one, else the failed one, else None."""
    for path in (build / f"{stem}.ipynb", build / f"{stem}.failed.ipynb"):
        if path.exists():
            return path
    return None


def count_rows(table: Path) -> dict[str, int]:
    """Rows of results.csv per notebook; {} without a table. Checking the table is not done here."""
    return dict(Counter(row["notebook"] for row in _rows(table)))


def measured(table: Path, stem: str, shown: str) -> dict:
    """When the rows that a page shows were measured ("from", "to") and of which "commits"; {} where it has none.

    Args:
        stem: of its notebook.
        shown: its text, which names rows by their ids; where it names none all of the notebook's count.
    """
    own = [row for row in _rows(table) if row["notebook"] == stem and row.get("measured_at")]
    named = set(re.findall(r"\b[0-9a-f]{10}\b", shown))
    own = [row for row in own if row.get("id") in named] or own
    if not own:
        return {}
    moments = [row["measured_at"] for row in own]
    commits = dict.fromkeys(row["commit"] for row in own if row.get("commit"))
    return {"from": min(moments), "to": max(moments), "commits": list(commits)}


def newest_row(table: Path, stem: str) -> str | None:
    """When the last row of a notebook was measured; None without any."""
    return max(
        (row["measured_at"] for row in _rows(table) if row["notebook"] == stem and row.get("measured_at")), default=None
    )


def machine_of(run: dict) -> str:
    """What a run was measured on, by its provenance."""
    machine = run.get("machine") or {}
    gpus = machine.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]['name']}" if len(gpus) > 1 else str(gpus[0]["name"])
    return str(machine.get("cpu") or "no GPU")


def describe_failure(state: dict) -> str:
    """ "FAILED at cell 5: ValueError: …" from the state of a failed notebook."""
    where = f" at cell {state['failed_cell']}" if state.get("failed_cell") else ""
    return f"FAILED{where}: {state.get('error') or 'unknown error'}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3:07 min, 1:02 h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


def _rows(table: Path) -> Iterator[dict]:
    """The table's lines as far as they can be read."""
    # the column of single latencies may be longer than csv's default field limit of 128 KiB
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    if not table.is_file():
        return
    try:
        with open(table, newline="", encoding="utf-8", errors="replace") as file:
            yield from (row for row in csv.DictReader(file) if row.get("notebook"))
    except (OSError, csv.Error):
        pass
