"""What is fitted to a model of the user's before caches are measured on it: TeaCache's polynomial."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from fluxnb.cache import teacache
from fluxnb.study.subject import Subject

IMAGES = 3  # whose trajectories it is fitted to, as far as they have steps enough


def know(s) -> None:
    """Lets `teacache.coefficients` find what is fitted to the study's models of the user's, when it is asked for."""
    names = [*s.params.study.models, *(s.params.study.distilled or [])]
    for name in [name for name in names if s.subject(name).model.own]:
        teacache.FITS[name] = functools.partial(polynomial, s, name)


def enough(subject: Subject, steps: int, images: int = IMAGES) -> Subject:
    """The subject with so many prompts, or as many more as a fit needs: those that are shown come last."""
    every = replace(subject, prompts=tuple(dict.fromkeys((*subject.prompts, *subject.shown))))
    return every.part(max(images, math.ceil((teacache.DEGREE + 1) / max(1, steps - 1))))


def polynomial(s, name: str) -> tuple[float, ...]:
    """The coefficients, highest power first: fitted once to a model at its size and steps, and kept beside its rows."""
    subject = s.subject(name)
    steps = s.steps(subject)
    few = enough(subject, steps)
    folder = s.results.path.parent / "teacache" / f"{few.digest}-{few.width}x{few.height}-{steps}"
    if not (folder / teacache.FILE).is_file():
        found = teacache.fit(s.loaded(few), steps)
        folder.mkdir(parents=True, exist_ok=True)
        teacache.save(found, folder)
    return teacache.coefficients(str(folder))
