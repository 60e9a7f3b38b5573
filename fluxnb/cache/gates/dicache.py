"""DiCache: the first block as a probe, whose accumulated change says when to compute again."""

from __future__ import annotations

from fluxnb.cache.gates.base import INPUT, RESIDUAL, Accumulating, change, read
from fluxnb.errors import UserError
from fluxnb.families import DICACHE

RETENTION = 0.2


class DiCache(Accumulating):
    """Reuses while the accumulated change of what comes out of the first block stays below the threshold.

    The relative change from one step to the next, mean |y - y_before| / mean |y_before|, y the image tokens behind the
    first block, is summed until the sum reaches the threshold. The first steps and the last are always computed. Its
    authors' predictor is `Aligned`. Source: DiCache (Bu et al., ICLR 2026, arXiv 2508.17356; Bujiazi/DiCache), which
    recommends 0.4 so, and 0.08 with the `difference` and no retention.

    Args:
        difference: what is summed is how much that change differs from the change of what goes into the block.
        retention: share of the steps at the start that are computed.
    """

    family = DICACHE
    name = "DiCache"
    terms = {
        "against the input": "what DiCache sums up is the change behind the first block minus the change before it",
    }
    point = RESIDUAL
    alone = True

    def __init__(self, threshold: float, difference: bool = False, retention: float = RETENTION, **options):
        super().__init__(threshold, **options)
        if isinstance(retention, bool) or not isinstance(retention, int | float) or not 0 <= retention <= 1:
            raise UserError(f"DiCache's retention is {retention!r}: give the share of the first steps, from 0 to 1.")
        self.difference, self.retention = bool(difference), retention

    @property
    def settings(self) -> dict:
        own: dict = {"difference": True} if self.difference else {}
        own |= {"retention": self.retention} if self.retention != RETENTION else {}
        return {"threshold": self.threshold, **own, **self.options}

    @property
    def rule(self) -> str:
        kept = f", first {self.retention:.0%} computed" if self.retention != RETENTION else ""
        return super().rule + ", against the input" * self.difference + kept

    def new_state(self, total=None):
        return {"before": None, "input": None, "probe": None, "indicator": None, "accumulated": 0.0}

    def ask(self, state, index, point, seen):
        if point == INPUT:
            state["before"], state["input"] = state["input"], seen
            return None
        measured = [self.measure(state, index, seen)]
        if self.difference and measured[0] is not None:
            measured.append(change(state["input"], state["before"]))
        changes = read(measured, self.group)
        return self.decide(state, index, abs(changes[0] - changes[1]) if len(changes) > 1 else changes[0])

    def measure(self, state, index, seen):
        before, state["probe"] = state["probe"], state["input"] + seen
        return None if before is None or self.threshold == 0 else change(state["probe"], before)

    def forced(self, index, total, run):
        return (total is not None and index <= int(self.retention * total)) or super().forced(index, total, run)
