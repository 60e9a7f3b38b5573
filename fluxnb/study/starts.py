"""What a user waits for before the first image: with nothing compiled yet, and with what an earlier run left."""

from __future__ import annotations

import torch

from fluxnb.families import COMPILATION
from fluxnb.study.candidate import Candidate
from fluxnb.study.row import Row
from fluxnb.study.study import Study
from fluxnb.study.subject import Subject
from fluxnb.technique import applied
from fluxnb.techniques import compilation

WARM = "first image, warm cache"  # the technique of its rows


def compare_starts(
    s: Study, subject: Subject, baseline: Candidate, candidates: list[Candidate], profile: bool = False
) -> tuple[list[Row], dict[str, Row]]:
    """Compares candidates that are compiled, each in a compile cache of its own that is empty at first.

    After a candidate's measurement the process forgets what was compiled, and the first image is made again from the
    cache on the disk.

    Returns:
        The rows of the baseline and the candidates, as `Study.compare` gives them, and label -> the row of the first
        image with the cache, for those that ran.
    """
    rows, warm = [] if candidates else s.compare(subject, baseline, [], profile=profile), {}
    for candidate in candidates:
        with compilation.fresh():
            own, row = s.compare(subject, baseline, [candidate], profile=profile)
            rows += [row] if rows else [own, row]
            if row.ok:
                warm[row.label] = warm_start(s, subject, candidate)
            s.pool.release(candidate.of(subject))
    return rows, warm


def warm_start(s: Study, subject: Subject, candidate: Candidate) -> Row:
    """The time of a candidate's first image when the compile cache has all it needs but the process has nothing."""
    own = candidate.of(subject)

    def first() -> None:
        loaded = s.loaded(own)
        with applied(loaded.pipe, *candidate.above):
            loaded.generate(*own.inputs[0], candidate.steps)

    def begin_again() -> None:
        first()  # what an earlier run leaves on the disk, whether or not it was this process
        torch.compiler.reset()
        s.pool.release(own)
        s.loaded(own)  # loading isn't compiling

    named = candidate.stack or candidate.meaning["label"]
    return s.time(
        WARM, {"variant": named, "steps": candidate.steps}, first, 1, family=COMPILATION, label=f"{named}: {WARM}",
        before=begin_again, warm=False, model=own.model.name, weights=own.model.weights,
    )  # fmt: skip
