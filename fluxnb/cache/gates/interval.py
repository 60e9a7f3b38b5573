"""A fixed interval: the control for gates that look."""

from __future__ import annotations

from fluxnb.cache.gates.base import INPUT, RESIDUAL, Gate, first_steps
from fluxnb.errors import UserError
from fluxnb.families import INTERVAL


class Interval(Gate):
    """Computes every n-th step, whatever the image: the control for gates that look. Source: the usual control.

    Args:
        every: 1 computes all steps.
        first_block: whether a reused step runs the first block, as FBCache's do, or none, as TeaCache's.
    """

    family = INTERVAL
    name = "every"
    terms = {"first block run": "a reused step runs the first block all the same, as First Block Cache has to"}

    def __init__(self, every: int, first_block: bool = False, **options):
        super().__init__(**options)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(f"An interval of {every!r} makes no sense: compute every 1st, 2nd, 3rd … step.")
        self.every, self.first_block = every, first_block
        self.point = RESIDUAL if first_block else INPUT

    @classmethod
    def at(cls, value, model, **options):
        return cls(int(value), **options)

    @property
    def settings(self) -> dict:
        return {"every": self.every, **({"first_block": True} if self.first_block else {}), **self.options}

    @property
    def reuses(self) -> bool:
        return self.every > 1

    @property
    def label(self) -> str:
        said = f"every {ordinal(self.every)} step" if self.reuses else "every step"
        if self.warm_up:
            said += f" after the {first_steps(self.warm_up)}"
        if self.compute_last:
            said += ", and the last" if self.warm_up else " and the last"
        return said + (", first block run" if self.first_block else "") + self.run_limit

    def decide(self, state, index, change):
        return index % self.every != 0


def ordinal(n: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st …"""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
