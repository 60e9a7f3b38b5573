"""Prescribed schedules on random weights: what so many computed steps take, eager and over compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator

from fluxnb.study.candidate import plain, using
from fluxnb.study.row import Row
from fluxnb.study.study import Study
from fluxnb.study.subject import Subject
from fluxnb.technique import Technique
from fluxnb.techniques import Regional


def replays(s: Study, subject: Subject, caches: list[Technique]) -> Iterator[tuple[str, list[Row]]]:
    """(what is under them, rows): the caches beside the plain pipeline, eager and then with compiled blocks."""
    steps = s.steps(subject)
    for under in ((), (Regional(),)):
        rows = s.compare(subject, plain(steps, under), [using(cache, steps, under) for cache in caches])
        yield ", ".join(technique.label for technique in under) or "eager", rows
