"""Candidates on several ranks, started from here; what each rank does is `fluxnb.study.scaling`."""

from __future__ import annotations

from pathlib import Path

from fluxnb import families
from fluxnb.measure import ranks
from fluxnb.study.candidate import Candidate
from fluxnb.study.comparison import failure
from fluxnb.study.loop import Rows, Task
from fluxnb.study.subject import Subject


def measure(rows: Rows, subject: Subject, due: dict[Task, Candidate], limit_s: float, log: Path) -> None:
    """Appends a row for each task, and one of what a rank makes of its techniques by itself.

    Args:
        due: all on the same number of GPUs.
        limit_s: for one candidate; ranks that take longer are ended, and the next ones are measured by new ranks.
        log: a file that what the ranks print is added to.
    """
    left = list(due)
    while left:
        given = [due[task] for task in left]
        (world,) = {candidate.gpus for candidate in given}
        try:
            found = ranks.run("fluxnb.study.scaling:measure", world, subject, given, limit_s=limit_s, log=log)
            for by_one, measured in found:
                task = left.pop(0)
                base = {"baseline": rows.append(_alone(task), by_one).id} if by_one else {}
                rows.append(task, measured | base)
            return
        except ranks.RankError as error:
            if left:
                rows.append(left.pop(0), failure(error))


def _alone(task: Task) -> Task:
    """The row of what one rank makes of a task's techniques by itself."""
    family, label = families.BASELINE.name, f"{task.meaning['label']}: one of the GPUs alone"
    key = task.key | {"technique": family, "gpus": 1, "settings": {**task.key["settings"], "ranks": task.key["gpus"]}}
    return Task(key, task.meaning | {"family": family, "technique": family, "label": label, "mark": "1"}, task.code)
