"""A prescribed schedule: which steps are computed is known before the first one."""

from __future__ import annotations

from fluxnb.cache.gates.base import INPUT, RESIDUAL, Gate
from fluxnb.errors import UserError
from fluxnb.families import SCHEDULE


class Schedule(Gate):
    """Computes exactly the steps that a mask prescribes: `1` computed, `0` reused. Source: this study's own.

    With random weights a gate that looks says nothing; a mask recorded on trained weights makes their latency
    measurable. The first step can't be reused.

    Args:
        mask: one sign for each step.
        first_block: whether a reused step runs the first block, as FBCache's do, or none, as TeaCache's.
        origin: where the mask is from, for the label.
    """

    family = SCHEDULE
    name = "schedule"
    terms = {"no block run": "a reused step doesn't even run the first block"}

    def __init__(self, mask: str, first_block: bool = True, origin: str = "", **options):
        super().__init__(**options)
        if not isinstance(mask, str) or not mask or set(mask) - {"0", "1"} or mask[0] != "1":
            raise UserError(
                f"The schedule {mask!r} is not a mask: write one 1 (computed) or 0 (reused) per step, the first "
                "of them 1."
            )
        self.mask, self.first_block, self.origin = mask, first_block, origin
        self.point = RESIDUAL if first_block else INPUT

    @property
    def settings(self) -> dict:
        return {"mask": self.mask, **({} if self.first_block else {"first_block": False}), **self.options}

    @property
    def reuses(self) -> bool:
        return "0" in self.mask

    @property
    def rule(self) -> str:
        whole = f"{self.origin}: {self.mark}" if self.origin else f"schedule {self.mark}"
        return whole + ("" if self.first_block else ", no block run")

    @property
    def mark(self) -> str:
        return f"{self.mask.count('1')} of {len(self.mask)}"

    def new_state(self, total=None):
        if total is not None and total != len(self.mask):
            raise UserError(
                f"The schedule has {len(self.mask)} steps but the generation has {total}: give a 1 or a 0 for "
                "each step."
            )
        return {}

    def decide(self, state, index, change):
        if index >= len(self.mask):
            self.new_state(index + 1)  # which says so
        return self.mask[index] == "0"


def even_mask(computed: int, steps: int) -> str:
    """A mask of `steps` that computes so many of them, the first and then as evenly as steps allow."""
    if not 1 <= computed <= steps:
        raise UserError(f"{computed} of {steps} steps can't be computed: at least the first, at most all.")
    chosen = {i * steps // computed for i in range(computed)}
    return "".join("1" if i in chosen else "0" for i in range(steps))
