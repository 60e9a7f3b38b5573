"""Prescribed schedules on random weights: what so many computed steps take, eager and over compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator

from fluxnb.cache import even_mask, prescribed
from fluxnb.models import time_only
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


def timed_cases(s: Study, use_cases: list[str], steps: int, origin: str) -> dict[Subject, dict[str, list[Row]]]:
    """Use cases that no model here is trained for, each with its tokens -> rows: plain, and every second step computed.

    Args:
        origin: of the schedule, in words.
    """
    return {subject: _timed(s, subject, use_cases, steps, origin) for subject in s.full_size or s.judged}


def _timed(s: Study, subject: Subject, use_cases: list[str], steps: int, origin: str) -> dict[str, list[Row]]:
    n, found = min(s.steps(subject), steps), {}
    half = prescribed(even_mask((n + 1) // 2, n), origin, first_block=False)
    for case in subject.able(use_cases):
        count = time_only.tokens(case, subject.model.tokens, subject.width, subject.height)
        rows = s.compare(subject.part(1).for_time(case), plain(n), [using(half, n)])
        found[f"{case}, {count:,} tokens"] = rows
    return found
