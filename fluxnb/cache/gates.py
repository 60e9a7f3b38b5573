"""When to reuse: a gate looks at a step and says whether the transformer's blocks may be skipped.

A gate looks at one of two points. At INPUT it sees the modulated input of the first double block, before any
block has run: a step reused there runs none of them. At RESIDUAL it sees what the first block added: a step
reused there has run one. What a gate measures stays on the device until its decision is due, so that one
read, one host synchronisation, serves all that is due at a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fluxnb.errors import UserError

INPUT, RESIDUAL = "input", "residual"
Pair = tuple[torch.Tensor, torch.Tensor]  # mean change and mean size, 0-d, on the device


class Gate:
    """The rules that every gate has, whatever it looks at.

    Args:
        warm_up: so many steps at the start are computed, whatever the gate sees.
        compute_last: the last step is computed.
        longest_run: at most so many steps in a row are reused; None for no limit.
    """

    name = "gate"
    point = RESIDUAL  # where it looks and decides
    looks_at_input = False  # whether the modulated input has to be worked out for it
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

    @property
    def label(self) -> str:
        """What a reader sees."""
        return f"{self.name} {', '.join(map(_short, self.settings.values()))}".strip()

    def start(self, total: int | None) -> None:
        """A generation of `total` steps begins (None: unknown). Raises UserError if the gate can't serve it."""

    def share(self, group) -> None:
        """From now on each rank of the process group has some of the tokens, and all decide together; None: alone."""
        self.group = group

    def new_state(self) -> dict:
        """The memory of one trajectory; the conditional and the unconditional pass have one each."""
        return {}

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


class _Thresholded(Gate):
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


class FirstBlock(_Thresholded):
    """Reuses while the first block's residual has changed little since the last computed step.

    indicator = mean |r_now - r_computed| / mean |r_computed|, reused below `threshold`; 0 never reuses.
    One decision for the whole batch; averaged over the ranks that share an image, so that they can't
    disagree. Source: First Block Cache of ParaAttention (Cheng, 2024), after TeaCache (Liu et al., 2024).
    """

    name = "FBCache"

    def new_state(self):
        return {"residual": None, "indicator": None}

    def measure(self, state, index, seen):
        if self.threshold == 0 or state["residual"] is None:
            return None
        return change(seen, state["residual"])

    def decide(self, state, index, change):
        state["indicator"] = change
        return change is not None and change < self.threshold

    def computed(self, state, index, residual):
        state["residual"] = residual

    def seen(self, state):
        return {"indicator": state["indicator"], "threshold": self.threshold}


class TeaCache(_Thresholded):
    """Reuses while the accumulated, rescaled change of the modulated input stays below `threshold`.

    The relative change of the first block's timestep-modulated input from one step to the next is passed
    through a polynomial, fitted so that it estimates the change of the output, and summed until the sum
    reaches the threshold; then the step is computed and the sum starts again. First and last step are always
    computed. A reused step runs no block at all. Source: TeaCache (Liu et al., 2024), TeaCache4FLUX.

    Args:
        coefficients: of the polynomial, highest power first; `fluxnb.cache.teacache` has those of models.
    """

    name = "TeaCache"
    point = INPUT
    looks_at_input = True

    def __init__(self, threshold: float, coefficients: Sequence[float], **options):
        super().__init__(threshold, **{"compute_last": True, **options})
        self.coefficients = tuple(float(c) for c in coefficients)
        if not self.coefficients or not all(map(math.isfinite, self.coefficients)):
            raise UserError("TeaCache needs the coefficients of a polynomial: a list of finite numbers.")

    @property
    def options(self) -> dict:
        return {name: value for name, value in super().options.items() if name != "compute_last"}

    def rescaled(self, change: float) -> float:
        """The polynomial: the estimated change of the output."""
        result = 0.0
        for c in self.coefficients:
            result = result * change + c
        return result

    def new_state(self):
        return {"modulated": None, "indicator": None, "accumulated": 0.0}

    def measure(self, state, index, seen):
        before, state["modulated"] = state["modulated"], seen
        return None if before is None or self.threshold == 0 else change(seen, before)

    def decide(self, state, index, change):
        state["indicator"] = change
        if change is None:
            return False
        state["accumulated"] += self.rescaled(change)
        return state["accumulated"] < self.threshold

    def computed(self, state, index, residual):
        state["accumulated"] = 0.0

    def seen(self, state):
        return {
            "indicator": state["indicator"],
            "accumulated": state["accumulated"],
            "threshold": self.threshold,
        }


class Interval(Gate):
    """Computes every n-th step, whatever the image: the control for gates that look.

    Args:
        every: 1 computes all steps.
        first_block: whether a reused step runs the first block, as FBCache's do, or none, as TeaCache's.
    """

    name = "every"

    def __init__(self, every: int, first_block: bool = False, **options):
        super().__init__(**options)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(f"An interval of {every!r} makes no sense: compute every 1st, 2nd, 3rd … step.")
        self.every, self.first_block = every, first_block
        self.point = RESIDUAL if first_block else INPUT

    @property
    def settings(self) -> dict:
        return {"every": self.every, **({"first_block": True} if self.first_block else {}), **self.options}

    def decide(self, state, index, change):
        return index % self.every != 0


class Schedule(Gate):
    """Computes exactly the steps that a mask prescribes: `1` computed, `0` reused.

    With random weights a gate that looks says nothing; a mask recorded on trained weights makes their latency
    measurable. The first step can't be reused.
    """

    name = "schedule"

    def __init__(self, mask: str, first_block: bool = True, **options):
        super().__init__(**options)
        if not isinstance(mask, str) or not mask or set(mask) - {"0", "1"} or mask[0] != "1":
            raise UserError(
                f"The schedule {mask!r} is not a mask: write one 1 (computed) or 0 (reused) per step, the first "
                "of them 1."
            )
        self.mask, self.first_block = mask, first_block
        self.point = RESIDUAL if first_block else INPUT

    @property
    def settings(self) -> dict:
        return {"mask": self.mask, **({} if self.first_block else {"first_block": False}), **self.options}

    @property
    def label(self) -> str:
        return f"schedule {self.mask.count('1')} of {len(self.mask)}"

    def start(self, total):
        if total is not None and total != len(self.mask):
            raise UserError(
                f"The schedule has {len(self.mask)} steps but the generation has {total}: give a 1 or a 0 for "
                "each step."
            )

    def decide(self, state, index, change):
        return self.mask[index] == "0"


def even_mask(computed: int, steps: int) -> str:
    """A mask of `steps` that computes so many of them, the first and then as evenly as steps allow."""
    if not 1 <= computed <= steps:
        raise UserError(f"{computed} of {steps} steps can't be computed: at least the first, at most all.")
    chosen = {i * steps // computed for i in range(computed)}
    return "".join("1" if i in chosen else "0" for i in range(steps))


class _Two(Gate):
    """Two gates on the same steps; each keeps its own memory."""

    word = ""

    def __init__(self, first: Gate, second: Gate, **options):
        super().__init__(**options)
        if isinstance(first, _Two) or isinstance(second, _Two):
            raise UserError("Gates are combined two at a time: give two single gates, such as TeaCache and FirstBlock.")
        self.gates = (first, second)
        self.looks_at_input = first.looks_at_input or second.looks_at_input

    @property
    def settings(self) -> dict:
        first, second = ({"gate": g.name, **g.settings} for g in self.gates)
        return {"rule": type(self).__name__, "first": first, "second": second, **self.options}

    @property
    def label(self) -> str:
        return f"{self.gates[0].label} {self.word} {self.gates[1].label}"

    def start(self, total):
        for gate in self.gates:
            gate.start(total)

    def share(self, group):
        super().share(group)
        for gate in self.gates:
            gate.share(group)

    def new_state(self):
        return {"states": tuple(gate.new_state() for gate in self.gates), "said": [None, None], "due": {}}

    def computed(self, state, index, residual):
        for gate, own in zip(self.gates, state["states"], strict=True):
            gate.computed(own, index, residual)

    def seen(self, state):
        seen = [gate.seen(own) for gate, own in zip(self.gates, state["states"], strict=True)]
        return {**seen[1], "said": tuple(state["said"]), "first": seen[0]}

    def forced(self, index, total, run):
        return super().forced(index, total, run) or any(g.forced(index, total, run) for g in self.gates)


class Cascade(_Two):
    """The first gate that says reuse wins; the second is asked only about steps that the first would compute.

    With TeaCache first, a step is reused before any block has run if TeaCache allows it, and after the first
    block if First Block Cache does. The one gate that reads twice in a step: TeaCache's answer is needed
    before the first block, FirstBlock's after it. This study's own combination; none was found published.
    """

    word = "then"

    @property
    def points(self):
        return self.gates[0].points | self.gates[1].points

    def ask(self, state, index, point, seen):
        if point == INPUT:
            state["said"] = [None, None]
        for i, (gate, own) in enumerate(zip(self.gates, state["states"], strict=True)):
            if state["said"][i] is None:
                state["said"][i] = gate.ask(own, index, point, seen)
            if state["said"][i]:
                return True
        return None if point == INPUT and None in state["said"] else False


class _Together(_Two):
    """Both gates look, what they measured is read at once, then the rule decides."""

    rule = staticmethod(any)

    @property
    def point(self):
        return RESIDUAL if RESIDUAL in (g.point for g in self.gates) else INPUT

    def ask(self, state, index, point, seen):
        for i, (gate, own) in enumerate(zip(self.gates, state["states"], strict=True)):
            if gate.point == point:
                state["due"][i] = gate.measure(own, index, seen)
        if point != self.point:
            return None
        changes = read([state["due"][0], state["due"][1]], self.group)
        state["due"] = {}
        pairs = zip(self.gates, state["states"], changes, strict=True)
        state["said"] = [gate.decide(own, index, change) for gate, own, change in pairs]
        return self.rule(state["said"])


class Either(_Together):
    """Reuses if one of the two gates would; both look at every step, so a reused one has run the first block."""

    word = "or"


class Both(_Together):
    """Reuses only if both gates would."""

    word = "and"
    rule = staticmethod(all)


def checked_threshold(value: float) -> float:
    """The threshold as a float. Raises UserError unless it is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"A cache threshold of {value!r} makes no sense: give a number of 0 (off) or more.")
    return float(value)


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


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
