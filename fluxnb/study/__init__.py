"""The study's one way to measure: quality and speed of candidates against a baseline, one row each.

A notebook opens it, names its baseline and candidates, and reads the rows:

    s = study.begin(gpu, "05_first_block_cache")
    for subject in s.judged:
        rows = s.compare(subject, plain(28), [using(first_block(0.12), 28), fewer_steps(12)])

Quality is that of every prompt and seed; speed is taken in turn with the baseline. A finished row is never measured
again on the same machine with the same inputs; images and traces are kept beside the rows.
"""

from fluxnb.study.candidate import (
    Candidate,
    built,
    controls,
    fewer_steps,
    fitting,
    in_format,
    methods,
    plain,
    stacked,
    using,
)
from fluxnb.study.inferences import first_and_second
from fluxnb.study.replays import replays, timed_cases
from fluxnb.study.row import Row
from fluxnb.study.serving import Load
from fluxnb.study.study import Study, begin, need
from fluxnb.study.subject import Subject

__all__ = [
    "Candidate",
    "Load",
    "Row",
    "Study",
    "Subject",
    "begin",
    "built",
    "controls",
    "fewer_steps",
    "first_and_second",
    "fitting",
    "in_format",
    "methods",
    "need",
    "plain",
    "replays",
    "timed_cases",
    "stacked",
    "using",
]
