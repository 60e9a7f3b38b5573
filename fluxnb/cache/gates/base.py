"""The rules that every gate has, and how what gates measure is read.

A gate looks at one of two points. At INPUT it sees the modulated input of the first double block, before any
block has run: a step reused there runs none of them. At RESIDUAL it sees what the first block added: a step
reused there has run one. What a gate measures stays on the device until its decision is due, so that one
read, one host synchronisation, serves all that is due at a point.
"""

from __future__ import annotations

import math

import torch

from fluxnb.cache.passes import Image
from fluxnb.errors import UserError
from fluxnb.families import Family

INPUT, RESIDUAL = "input", "residual"
Pair = tuple[torch.Tensor, torch.Tensor]  # mean change and mean size, 0-d, on the device


class Gate:
    """The rules that every gate has, whatever it looks at. Left out, none of them holds: the gate alone decides.

    Args:
        warm_up: so many steps at the start are computed, whatever the gate sees.
        compute_last: the last step is computed.
        longest_run: at most so many steps in a row are reused; None for no limit.
    """

    family: Family  # of techniques
    name: str  # short, for labels
    terms: dict = {}  # made-up words of its label, each with half a sentence
    point = RESIDUAL  # where it looks and decides
    looks_at_input = False  # whether the modulated input has to be worked out for it, else it is shown the tokens
    whole = False  # whether it needs all tokens of the image
    alone = False  # whether it can't be one of a pair
    group = None  # the ranks that have the other tokens of the same image

    def __init__(self, warm_up: int = 0, compute_last: bool = False, longest_run: int | None = None):
        if warm_up < 0 or (longest_run is not None and longest_run < 1):
            raise UserError(
                f"warm_up is {warm_up} and longest_run is {longest_run}: allowed are 0 or more and 1 or more (or None)."
            )
        self.warm_up, self.compute_last, self.longest_run = warm_up, compute_last, longest_run

    @property
    def points(self) -> frozenset[str]:
        """Where this gate may decide to reuse."""
        return frozenset({self.point})

    @property
    def options(self) -> dict:
        """The rules that aren't at their default, so that rows stay readable."""
        chosen = {"warm_up": self.warm_up, "compute_last": self.compute_last, "longest_run": self.longest_run}
        return {name: value for name, value in chosen.items() if value}

    @property
    def settings(self) -> dict:
        """Plain values that distinguish this gate from others of its kind."""
        return self.options

    @classmethod
    def at(cls, value, model: str, **options) -> Gate:
        """The gate with its family's dial turned to `value`, for a model by name. UserError if it can't be had."""
        return cls(value, **options)

    @property
    def reuses(self) -> bool:
        """Whether it can reuse a step at all."""
        return True

    @property
    def rule(self) -> str:
        """The rule without its options, as a reader wants to see it."""
        return self.name

    @property
    def label(self) -> str:
        """What a reader sees: the rule, and the options that aren't at their default."""
        computed = [first_steps(self.warm_up)] if self.warm_up else []
        computed += ["the last"] if self.options.get("compute_last") else []
        return self.rule + (f", {' and '.join(computed)} computed" if computed else "") + self.run_limit

    @property
    def run_limit(self) -> str:
        """The end of the label: how many steps in a row may be reused."""
        return f", at most {self.longest_run} reused in a row" if self.longest_run else ""

    @property
    def mark(self) -> str:
        """What a chart writes at its point."""
        return f"{self.settings[self.family.dial]:g}"

    def meet(self, pipe) -> None:
        """Looks at the pipeline that it is being put on, before anything changes. UserError if it can't serve it."""

    def share(self, group) -> None:
        """From now on each rank of the process group has some of the tokens, and all decide together; None: alone."""
        self.group = group

    def new_state(self, total: int | None = None) -> dict:
        """The memory of one trajectory of an image of `total` steps (None: unknown); each pass has its own.

        Raises UserError if the gate can't serve so many.
        """
        return {}

    def called(self, state: dict, image: Image, given: dict) -> None:
        """A step of an image begins: what the transformer is given, by name."""

    def measure(self, state: dict, index: int, seen: torch.Tensor) -> Pair | None:
        """What has to be read to decide step `index`, None for nothing; `seen` is (n, image tokens, width)."""
        return None

    def decide(self, state: dict, index: int, change: float | None) -> bool:
        """Whether step `index` is reused; `change` is the relative change that was measured."""
        return False

    def ask(self, state: dict, index: int, point: str, seen: torch.Tensor | None) -> bool | None:
        """True: reuse, False: compute, None: ask again at the next point."""
        if point != self.point:
            return None
        return self.decide(state, index, *read([self.measure(state, index, seen)], self.group))

    def computed(self, state: dict, index: int, residual: torch.Tensor) -> None:
        """The step was computed in full; `residual` is what the first block added."""

    def seen(self, state: dict) -> dict:
        """What the gate saw at the latest step, for the trace: indicator, accumulated, threshold, said."""
        return {}

    def forced(self, index: int, total: int | None, run: int) -> bool:
        """Whether this step has to be computed whatever the gate sees; `run` reused ones came just before."""
        return (
            index < self.warm_up
            or (self.compute_last and total is not None and index == total - 1)
            or (self.longest_run is not None and run >= self.longest_run)
        )


class Thresholded(Gate):
    """A gate with a threshold that may be changed between two images."""

    def __init__(self, threshold: float, **options):
        super().__init__(**options)
        self.threshold = threshold

    @property
    def threshold(self) -> float:
        """0 never reuses."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = checked_threshold(value)

    @property
    def settings(self) -> dict:
        return {"threshold": self.threshold, **self.options}

    @property
    def reuses(self) -> bool:
        return self.threshold > 0

    @property
    def rule(self) -> str:
        return f"{self.name} {self.threshold:g}"


class Accumulating(Thresholded):
    """A gate that sums up changes from step to step and reuses while the sum stays below the threshold.

    A computed step starts the sum again; the last step is always computed. Its state has `indicator`, the latest
    change, and `accumulated`.
    """

    def __init__(self, threshold: float, **options):
        super().__init__(threshold, **{"compute_last": True, **options})

    @property
    def options(self) -> dict:
        return {name: value for name, value in super().options.items() if name != "compute_last"}

    def rescaled(self, change: float) -> float:
        """What a change adds to the sum."""
        return change

    def decide(self, state, index, change):
        state["indicator"] = change
        if change is None:
            return False
        state["accumulated"] += self.rescaled(change)
        return state["accumulated"] < self.threshold

    def computed(self, state, index, residual):
        state["accumulated"] = 0.0

    def seen(self, state):
        return {name: state[name] for name in ("indicator", "accumulated")} | {"threshold": self.threshold}


def checked_threshold(value: float) -> float:
    """The threshold as a float. Raises UserError unless it is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"A cache threshold of {value!r} makes no sense: give a number of 0 (off) or more.")
    return float(value)


def first_steps(n: int) -> str:
    """ "first", "first 6": of steps, for labels."""
    return "first" if n == 1 else f"first {n}"


def change(now: torch.Tensor, before: torch.Tensor) -> Pair:
    """(mean |now - before|, mean |before|), still on the device."""
    return (now - before).abs().mean(), before.abs().mean()


def read(measured: list[Pair | None], group=None) -> list[float | None]:
    """The relative changes, averaged over the ranks of a process group: one host synchronisation in all."""
    pairs = [pair for pair in measured if pair is not None]
    if not pairs:
        return [None] * len(measured)
    if group is not None:
        together = torch.stack([torch.stack(pair) for pair in pairs])
        torch.distributed.all_reduce(together, group=group)
        pairs = list(together)
    ratios = iter(torch.stack([size_of / of for size_of, of in pairs]).tolist())
    return [None if pair is None else next(ratios) for pair in measured]
