"""The one loop: what has no row yet is given to a timer, which appends a row for each as soon as it is measured."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fluxnb import families
from fluxnb.errors import UserError
from fluxnb.measure import identity, telemetry
from fluxnb.study.by_hand import LINE, PROGRESS
from fluxnb.study.results import Results, key_of, now
from fluxnb.study.row import KEY, Row
from fluxnb.study.session import Session

RUN_IT = "run this notebook without REPLAY=1, on the GPU that it is about."
AFRESH = "FLUXNB_AFRESH"  # variable of `make report FORCE=1`: so many rows were there before, and count no more
NOT_THERE = "not in the table that this page was made from, with these settings"


@dataclass(frozen=True, eq=False)
class Task:
    """A row to be: its key, what it means, and which row that is there is enough."""

    key: dict
    meaning: dict
    code: str | None = None
    enough: Callable[..., bool] = lambda row: True


class Rows:
    """The rows of one notebook: found in the results, or measured now.

    Args:
        results: the table that they are in.
        root: the project's folder.
    """

    def __init__(self, results: Results, notebook: str, root: Path):
        self.results, self.notebook, self.root = results, notebook, root
        self.run_id = uuid.uuid4().hex[:12]
        self._due: set[Task] = set()
        self._done = self._found = self._total = 0

    @cached_property
    def host(self) -> str:
        """This machine's name; a replay shows rows of any."""
        return "any" if telemetry.replayed() else identity.host(self.root / "reports" / "own")

    @cached_property
    def session(self) -> Session:
        """The session that this process measures in."""
        return Session(self.host, self.run_id)

    @cached_property
    def _origin(self) -> dict:
        return {"kind": identity.kind(), "commit": telemetry.commit(self.root), "run_id": self.run_id}

    def measured(self, tasks: list[Task], timer: Callable[[list[Task]], object]) -> list[Row]:
        """The tasks' rows: those that are there, and those that the timer appends for the tasks it is given."""
        due = [task for task in tasks if self.find(task) is None]
        self._total, self._due = self._total + len(tasks), set(due)
        found = len(tasks) - len(due)
        self._progress(found, "found in the results", found)
        if due:
            timer(due)
        return [self.find(task, shown=True) for task in tasks]

    def find(self, task: Task, shown: bool = False) -> Row | None:
        """A row that is enough; to be shown also an error. In a replay what isn't there raises."""
        if not telemetry.replayed():
            row = self.results.find(task.key, task.code, errors=shown, after=int(os.environ.get(AFRESH) or 0))
            return row if row is None or shown or task.enough(row) else None
        row = self.results.find(task.key, errors=True, anywhere=True)
        if row is None and task.meaning["family"] == families.BASELINE.name:  # there is nothing to set others beside
            raise UserError(
                f"A replay measures nothing, and {self.notebook} has no row {task.meaning['label']!r}: {RUN_IT}"
            )
        return row or Row(**task.key | task.meaning, status="unavailable", reason=NOT_THERE)

    def append(self, task: Task, columns: dict) -> Row:
        """The task's row with what came out."""
        session = self.session.current(self.results.rows())
        own = {"code": task.code, "session": session, "measured_at": now()}
        row = self.results.append({**task.key, **task.meaning, **self._origin, **own, **columns})
        if task in self._due:  # a baseline may be timed several times
            self._due.remove(task)
            self._progress(1, f"{row.model}: {row.label}" if row.model else row.label)
        return row

    def settle(self, task: Task, seconds: list[float]) -> None:
        """Begins another session where the baseline isn't what other processes of this one measured."""
        names = tuple(name for name in KEY if name not in ("notebook", "gpu"))
        wanted = key_of(task.key, names)
        self.session.check(self.results.rows(), lambda row: key_of(row, names) == wanted, seconds)

    def noise_floor(self, row: Row) -> Row:
        """The baseline's row that was timed against itself, of the same session if there is one."""
        same = (r for r in reversed(self.results.rows()) if r.again and r.session == row.session)
        return row if row.again else next((r for r in same if key_of(r) == key_of(row)), row)

    def _progress(self, finished: int, label: str, found: int = 0) -> None:
        self._done, self._found = self._done + finished, self._found + found
        if finished and (path := os.environ.get(PROGRESS)):
            counts = {"done": self._done, "found": self._found, "total": self._total}
            line = {"notebook": self.notebook, **counts, "label": label}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        there = f", {self._found} of them from before" if self._found else ""
        LINE.rows(f"{self._done} of {self._total} rows{there}" + f" · {label}" * bool(finished and not found))
