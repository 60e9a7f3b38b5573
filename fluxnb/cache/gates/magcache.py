"""MagCache: how the size of the residual is known to change from step to step says when to compute again."""

from __future__ import annotations

from collections.abc import Sequence

from fluxnb.cache.gates.base import INPUT, Thresholded
from fluxnb.errors import UserError
from fluxnb.families import MAGCACHE

# Mean size of the residual over that of the step before, of FLUX.1-dev at 28 steps; as published.
FLUX_RATIOS = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
)  # fmt: skip

LONGEST_RUN = 3  # reused steps in a row


class MagCache(Thresholded):
    """Reuses while the error that the ratios of the residual's sizes foretell stays at or below the threshold.

    The ratios since the last computed step are multiplied; how far each product is from 1 is summed. It never looks at
    the image: for one threshold and number of steps it is one mask. A reused step runs no block. Source: MagCache
    (Ma et al., 2025, arXiv 2506.09045), with the defaults of diffusers' `MagCacheConfig`.

    Args:
        ratios: of the model; FLUX.1-dev's published ones by default. For other numbers of steps the nearest are taken.
        retention: share of the steps at the start that are computed.
    """

    family = MAGCACHE
    name = "MagCache"
    point = INPUT

    def __init__(self, threshold: float, ratios: Sequence[float] = FLUX_RATIOS, retention: float = 0.2, **options):
        super().__init__(threshold, **{"longest_run": LONGEST_RUN, **options})
        if not ratios or not 0 <= retention <= 1:
            raise UserError(f"MagCache needs the ratios of its model and a retention from 0 to 1, not {retention!r}.")
        self.ratios, self.retention = tuple(ratios), retention

    @property
    def options(self) -> dict:
        return {name: value for name, value in super().options.items() if (name, value) != ("longest_run", LONGEST_RUN)}

    @property
    def settings(self) -> dict:
        own = {"retention": self.retention} if self.retention != 0.2 else {}
        return {"threshold": self.threshold, **own, **self.options}

    def ratio(self, index: int, total: int) -> float:
        """The ratio of a step of so many, of the nearest one known."""
        last = len(self.ratios) - 1
        return self.ratios[min(last, round(index * last / (total - 1)))] if total > 1 else self.ratios[-1]

    def new_state(self, total=None):
        return {"product": 1.0, "error": 0.0, "total": total or len(self.ratios)}

    def decide(self, state, index, change):
        state["product"] *= self.ratio(index, state["total"])
        state["error"] += abs(1.0 - state["product"])
        return state["error"] <= self.threshold and self.threshold > 0

    def computed(self, state, index, residual):
        state.update(product=1.0, error=0.0)

    def seen(self, state):
        return {"indicator": state["error"], "threshold": self.threshold}

    def forced(self, index, total, run):
        return index < int(self.retention * (total or len(self.ratios)) + 0.5) or super().forced(index, total, run)
