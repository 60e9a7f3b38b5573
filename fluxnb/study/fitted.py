"""What is fitted to a model of the user's before caches are measured on it: TeaCache's polynomial, and plans."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fluxnb import notebooks
from fluxnb.cache import planning, teacache
from fluxnb.errors import UserError, lacks_memory
from fluxnb.study.subject import Input, Loaded, Subject
from fluxnb.world import scenes

IMAGES = 3  # whose trajectories it is fitted to, as far as they have steps enough


def know(s) -> None:
    """Lets `teacache.coefficients` and `planning.of` have what is fitted to the user's models, when it is asked for."""
    names = [*s.params.study.models, *(s.params.study.distilled or [])]
    for name in [name for name in names if s.subject(name).model.own]:
        teacache.FITS[name] = functools.partial(polynomial, s, name)
        planning.MADE[name] = functools.partial(plans, s, name)


def enough(subject: Subject, steps: int, images: int = IMAGES) -> Subject:
    """The subject with so many prompts, or as many more as a fit needs, which judge nothing."""
    count = max(images, math.ceil((teacache.DEGREE + 1) / max(1, steps - 1)))
    return replace(subject, prompts=scenes.planning(count), seeds=subject.seeds[:1])


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


def plans(s, name: str) -> Path:
    """The file of a model's plans at its size and steps: made once, for what is compared, and kept beside its rows.

    Raises UserError where they can't be made.
    """
    subject = s.subject(name)
    steps = s.steps(subject)
    path = s.results.path.parent / "plans" / f"{subject.digest}-{subject.width}x{subject.height}-{steps}.json"
    if not path.is_file():
        counts = [n for n in s.params.given(notebooks.PEERS).computed if n < steps] or [max(1, steps // 2)]
        made = planned(s.loaded(subject), steps, counts)
        path.parent.mkdir(parents=True, exist_ok=True)
        planning.save(made, path)
    return path


def planned(loaded: Loaded, steps: int, counts: Sequence[int], annealing: int = 0) -> list[planning.Plan]:
    """Plans of so many computed steps, by prompts that judge nothing: the large models' by few, and one mask each.

    Args:
        annealing: as in `planning.make`.

    Raises UserError where they can't be made.
    """
    small = loaded.subject.model.small
    plan, others = planning.PROMPTS if small else planning.FEW
    inputs: list[Input] = [(prompt, seed) for seed, prompt in enumerate(scenes.planning(plan + others))]
    early = planning.EARLY[: None if small else 1]
    try:
        return planning.make(loaded, inputs[:plan], steps, counts, early, annealing, inputs[plan:])
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
    raise UserError(f"A plan of {loaded.subject.model.name} takes more memory than is free here: run it where more is.")
