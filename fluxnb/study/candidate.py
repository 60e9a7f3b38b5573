"""One thing to measure: techniques on a pipeline, at a number of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxnb import families
from fluxnb.families import Family
from fluxnb.models.pipelines import Model
from fluxnb.stacks import Stack
from fluxnb.study import code
from fluxnb.study.subject import Subject
from fluxnb.technique import ANOTHER, Technique, least_exact
from fluxnb.techniques import DPMSolver


@dataclass(frozen=True)
class Candidate:
    """What is measured on a subject, and what its row says of it.

    Args:
        steps: denoising steps asked for.
        above: techniques put around every image.
        built: techniques built into a pipeline of its own, for those too slow to put on and off.
        family: of its row; that of its last technique by default.
        technique: the row's; the name of its last technique by default.
        label: what a reader sees; everything that is switched on by default.
        mark: what a chart writes at its point; its last technique's by default.
        stack: its name in fluxnb.stacks.
        dtype: another number format than the subject's.
        changes: whether it makes other images than the baseline, whatever its techniques: fewer steps do.
        batch: images made at once.
        gpus: that it runs on.
        patience_s: until its first image; then it is given up.
    """

    steps: int
    above: tuple[Technique, ...] = ()
    built: tuple[Technique, ...] = ()
    family: Family | None = None
    technique: str = ""
    label: str = ""
    mark: str = ""
    stack: str | None = None
    dtype: str | None = None
    changes: bool = False
    batch: int = 1
    gpus: int = 1
    patience_s: float = math.inf

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """All of its own, in the order in which they go on."""
        return (*self.built, *self.above)

    def of(self, subject: Subject) -> Subject:
        """The subject that it runs on: with what it has built in."""
        return subject.having(*self.built, dtype=self.dtype)

    @property
    def settings(self) -> dict:
        """Of all its techniques; of two that set the same, both values."""
        found: dict = {}
        for name, value in (item for t in self.techniques for item in t.settings.items()):
            found[name] = value if found.get(name, value) == value else f"{found[name]} + {value}"
        return found

    @property
    def meaning(self) -> dict:
        """The columns of its row that say what it is."""
        last = self.techniques[-1] if self.techniques else None
        family = self.family or (last.family if last else families.BASELINE)
        different = self.changes or self.dtype is not None
        return {
            "family": family.name,
            "technique": self.technique or (last.name if last else family.name),
            "label": self.label or ", ".join(t.label for t in reversed(self.techniques)),
            "mark": self.mark or (last.mark if last else str(self.steps)),
            "stack": self.stack,
            "exact": ANOTHER if different else least_exact(*self.techniques),
        }

    @property
    def code(self) -> str | None:
        """A digest of its techniques' own code; None without a technique."""
        return code.digest(tuple(sorted({module for t in self.techniques for module in _modules(t)})))


def plain(steps: int, under: tuple[Technique, ...] = (), label: str = "", batch: int = 1) -> Candidate:
    """The pipeline as it is, or with techniques that whatever is compared with it has too."""
    label = label or ", ".join([f"{steps} steps", *(t.label for t in under)])
    return Candidate(steps, under, (), families.BASELINE, families.BASELINE.name, label, str(steps), batch=batch)


def fewer_steps(
    steps: int, solver: Technique | None = None, on: Stack | None = None, batch: int = 1
) -> Candidate:  # fmt: skip
    """The control that every technique has to beat: fewer steps, with the pipeline's own solver or another.

    Args:
        on: a stack that it is put on.
    """
    family = solver.family if solver else families.FEWER_STEPS
    above, built = (*(on.above if on else ()), *([solver] if solver else [])), on.built if on else ()
    label = ", ".join([*(part.label for part in (*built, *above)), f"{steps} steps"])
    return Candidate(steps, above, built, family, family.name, label, str(steps), changes=True, batch=batch)


def controls(counts: Iterable[int], steps: int, batch: int = 1) -> list[Candidate]:
    """Fewer steps than `steps`, each count with the pipeline's own solver and then with one of second order.

    Where no count is below, half of the steps.
    """
    less = [n for n in counts if n < steps] or [max(1, steps // 2)]
    return [fewer_steps(n, solver, batch=batch) for solver in (None, DPMSolver()) for n in less]


def using(
    technique: Technique, steps: int, under: tuple[Technique, ...] = (), label: str = "", batch: int = 1
) -> Candidate:
    """The pipeline with one technique, on top of those that its baseline has too."""
    label = label or ", ".join(t.label for t in (technique, *under))
    return Candidate(steps, (*under, technique), label=label, batch=batch)


def methods(
    found: Mapping[str, list[Technique]], steps: int, built: tuple[Technique, ...] = (), **options
) -> list[Candidate]:
    """Several techniques under each of some names; `built` is what all of them are put on, `options` a candidate's."""
    return [Candidate(steps, (one,), built, technique=name, **options) for name, ones in found.items() for one in ones]


def built(
    *techniques: Technique,
    steps: int,
    above: tuple[Technique, ...] = (),
    label: str = "",
    batch: int = 1,
    patience_s: float = math.inf,
) -> Candidate:
    """The same model with techniques built in, in a pipeline of its own; `above` goes around every image."""
    label = label or ", ".join(t.label for t in (*techniques, *above))
    first = techniques[0]  # what it is about; compilation that comes with it is not
    about: dict[str, Any] = {} if above else {"family": first.family, "technique": first.name, "mark": first.mark}
    return Candidate(steps, above, techniques, label=label, batch=batch, patience_s=patience_s, **about)


def in_format(dtype: str, steps: int, patience_s: float = math.inf) -> Candidate:
    """The same model in another number format; a processor may lack its arithmetic, and take minutes for an image."""
    family, label = families.NUMBER_FORMAT, f"{dtype}, {steps} steps"
    return Candidate(steps, (), (), family, family.name, label, dtype, dtype=dtype, patience_s=patience_s)


def fitting(found: Iterable[Stack], model: Model) -> list[Stack]:
    """Stacks for a model: without the techniques that its transformer has nothing for, and each only once."""
    made: dict[str, Stack] = {}
    for stack in found:
        built, above = (
            tuple(part for part in parts if not part.part or part.part in model.adapter.parts)
            for parts in (stack.built, stack.above)
        )
        if (built, above) != (stack.built, stack.above):
            stack = Stack(stack.name, built, above, ", ".join(part.label for part in (*built, *above)))
        made.setdefault(repr([(part.name, part.settings) for part in stack.techniques]), stack)
    return list(made.values())


def stacked(
    stack: Stack, steps: int, batch: int = 1, gpus: int = 1, patience_s: float = math.inf, label: str = ""
) -> Candidate:
    """A named stack; one of a single technique is a row of that technique's family."""
    family = families.STACK if len(stack.techniques) > 1 else None
    return Candidate(
        steps, stack.above, stack.built, family, stack.techniques[-1].name, label or stack.label or stack.name,
        stack.name, stack.name, batch=batch, gpus=gpus, patience_s=patience_s,
    )  # fmt: skip


def _modules(part) -> set[str]:
    """The modules that a technique's class, and those of the parts that it is made of, stand in."""
    held = [v for value in vars(part).values() for v in (value if isinstance(value, tuple) else (value,))]
    own = (v for v in held if type(v).__module__.startswith(("fluxnb.techniques.", "fluxnb.cache.")))
    return {type(part).__module__}.union(*map(_modules, own))
