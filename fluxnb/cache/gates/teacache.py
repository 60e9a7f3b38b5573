"""TeaCache: the change of the modulated input, rescaled and summed up, says when to compute again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fluxnb.cache import teacache
from fluxnb.cache.gates.base import INPUT, Accumulating, change
from fluxnb.errors import UserError
from fluxnb.families import TEACACHE

FITTED, PUBLISHED, NOT_RESCALED = "fitted", "published polynomial", "not rescaled"


class TeaCache(Accumulating):
    """Reuses while the accumulated, rescaled change of the modulated input stays below the threshold.

    The relative change of the first block's timestep-modulated input from one step to the next is passed
    through a polynomial, fitted so that it estimates the change of the output, and summed until the sum
    reaches the threshold; then the step is computed and the sum starts again. First and last step are always
    computed. A reused step runs no block at all. Source: TeaCache (Liu et al., 2024), TeaCache4FLUX.

    Args:
        coefficients: of the polynomial, highest power first; None for those of the model that it is put on, fitted to
            it or published for its architecture (`fluxnb.cache.teacache`).
        polynomial: what they are, where they aren't the model's own: PUBLISHED, NOT_RESCALED.
    """

    family = TEACACHE
    name = "TeaCache"
    terms = {
        PUBLISHED: "TeaCache4FLUX's polynomial for FLUX.1-dev instead of one fitted to the model",
        NOT_RESCALED: "the change of the input is summed up as it is",
    }
    point = INPUT
    looks_at_input = True

    def __init__(
        self, threshold: float, coefficients: Sequence[float] | None = None, polynomial: str = FITTED, **options
    ):
        super().__init__(threshold, **options)
        if coefficients is None:
            coefficients = {PUBLISHED: teacache.FLUX_DEV, NOT_RESCALED: (1.0, 0.0)}.get(polynomial)
        self.coefficients = None if coefficients is None else tuple(map(float, coefficients))
        self.polynomial = polynomial
        if self.coefficients == () or not all(map(math.isfinite, self.coefficients or ())):
            raise UserError("TeaCache needs the coefficients of a polynomial: a list of finite numbers.")
        self._used = self.coefficients  # or, once it was put on a model, that model's

    @classmethod
    def at(cls, value, model, **options):
        return cls(value, teacache.coefficients(model), **options)

    @property
    def settings(self) -> dict:
        own = {} if self.polynomial == FITTED else {"polynomial": self.polynomial}
        return {"threshold": self.threshold, **own, **self.options}

    @property
    def rule(self) -> str:
        return super().rule + ("" if self.polynomial == FITTED else f", {self.polynomial}")

    def meet(self, pipe) -> None:
        if self.coefficients is None:
            found = teacache.of(pipe)
            if self._used not in (None, found):
                raise UserError("This TeaCache was put on another model before: make a TeaCache for each model.")
            self._used = found

    def rescaled(self, change: float) -> float:
        """The polynomial: the estimated change of the output."""
        result = 0.0
        for c in self._used:
            result = result * change + c
        return result

    def new_state(self, total=None):
        return {"modulated": None, "indicator": None, "accumulated": 0.0}

    def measure(self, state, index, seen):
        before, state["modulated"] = state["modulated"], seen
        return None if before is None or self.threshold == 0 else change(seen, before)
