"""Executing the notebooks, rendering them, and the pieces of HTML they show.

Where a configuration keeps things, relative to the project root:

    notebooks/NN_name.ipynb               sources, outputs stripped
    build/<gpu>/NN_name.ipynb             executed (NN_name.failed.ipynb when a cell failed)
    build/<gpu>/NN_name.json              its last execution: status, fingerprint, seconds, provenance
    <params.report_dir>/NN_name.html      rendered, beside index.html, results.csv and run.json

This module holds only what running, rendering and the index share, and imports nothing heavy: an unchanged
run has to be over in a moment.
"""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PAGES = "pages.json"  # what the index says of each page
STATUSES = ("ok", "failed", "running")


SEVERAL_GPUS = ("00", "11", "12")  # what a configuration of several GPUs is for; the rest needs only one


def sources(root: Path, gpus: int = 1) -> list[Path]:
    """The notebooks of the project in reading order; on several GPUs those that use them."""
    found = sorted(p for p in (root / "notebooks").glob("*.ipynb") if not p.name.startswith("."))
    return [p for p in found if gpus == 1 or p.name.startswith(SEVERAL_GPUS)]


def build_dir(params, root: Path) -> Path:
    """The folder of executed notebooks of one configuration."""
    return root / "build" / params.name


def report_dir(params, root: Path) -> Path:
    """The folder people read, of one configuration."""
    return root / params.report_dir


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader, and a run killed meanwhile, has the old file or the new, never half."""
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


def read_json(path: Path) -> dict:
    """The mapping in a JSON file, or {} when there is no such file or it isn't a mapping."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_state(build: Path, stem: str) -> dict:
    """The state of a notebook's last execution, {} when it was never started."""
    return read_json(build / f"{stem}.json")


def executed_notebook(build: Path, stem: str) -> Path | None:
    """The executed notebook to read: the successful one, else the failed one, else None."""
    for path in (build / f"{stem}.ipynb", build / f"{stem}.failed.ipynb"):
        if path.exists():
            return path
    return None


def count_rows(results: Path) -> dict[str, int]:
    """Rows of results.csv per notebook; {} without a table. Checking the table is not done here."""
    return dict(Counter(row["notebook"] for row in _rows(results)))


def last_measured(results: Path, stem: str) -> str | None:
    """When the newest row of a notebook was measured."""
    moments = [row["measured_at"] for row in _rows(results) if row["notebook"] == stem and row.get("measured_at")]
    return max(moments, default=None)


def _rows(results: Path) -> Iterator[dict]:
    """The table's lines as far as they can be read."""
    # the column of single latencies may be longer than csv's default field limit of 128 KiB
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with open(results, newline="", encoding="utf-8", errors="replace") as file:
            yield from (row for row in csv.DictReader(file) if row.get("notebook"))
    except (OSError, csv.Error):
        pass
