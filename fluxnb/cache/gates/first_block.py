"""First Block Cache: what the first block adds says whether the others are needed."""

from __future__ import annotations

from fluxnb.cache.gates.base import Thresholded, change
from fluxnb.families import FIRST_BLOCK


class FirstBlock(Thresholded):
    """Reuses while the first block's residual has changed little since the last computed step.

    indicator = mean |r_now - r_computed| / mean |r_computed|, reused below `threshold`; 0 never reuses.
    One decision for the whole batch; averaged over the ranks that share an image, so that they can't
    disagree. Source: First Block Cache of ParaAttention (Cheng, 2024), after TeaCache (Liu et al., 2024).
    """

    family = FIRST_BLOCK
    name = "FBCache"

    def new_state(self, total=None):
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
