"""How to reuse: a predictor estimates what the skipped blocks would have added to the image tokens.

The text tokens need no estimate: behind the last block FLUX uses the image tokens only.
"""

from __future__ import annotations

import torch

from fluxnb.errors import UserError


class Hold:
    """Adds what the skipped blocks added at the last computed step. Source: First Block Cache, TeaCache."""

    name = "hold"
    terms = {name: "a reused step adds what the blocks added at the last computed one"}
    keeps = 1  # tensors of the size of the image tokens, for each point where a gate may decide

    @property
    def settings(self) -> dict:
        """Plain values that distinguish this predictor; empty for the usual one."""
        return {}

    def new_state(self) -> dict:
        """The memory of one trajectory at one point."""
        return {"residual": None}

    def computed(self, state: dict, index: int, residual: torch.Tensor) -> None:
        """The blocks were run at step `index` and added `residual`, (n, image tokens, width)."""
        state["residual"] = residual

    def predict(self, state: dict, index: int) -> torch.Tensor:
        """What the blocks would add at step `index`."""
        return state["residual"]


class Taylor:
    """Extrapolates what the skipped blocks added, as a Taylor series over the step number.

    Derivatives are finite differences of the computed steps, as many as are known so far: the first one holds.
    Source: TaylorSeer (Liu et al., 2025), there for the output of each module, here for all blocks at once.

    Args:
        order: 1 (linear) or 2 (quadratic).
    """

    terms = {
        "Taylor 1": "a reused step adds what the last two computed ones say on a straight line",
        "Taylor 2": "the same on a parabola through the last three",
    }

    def __init__(self, order: int):
        if order not in (1, 2):
            raise UserError(f"A Taylor predictor of order {order!r} doesn't exist here: choose 1 or 2.")
        self.order = order
        self.name = f"Taylor {order}"
        self.keeps = order + 1

    @property
    def settings(self) -> dict:
        return {"predictor": "taylor", "order": self.order}

    def new_state(self):
        return {"at": None, "derivatives": []}

    def computed(self, state, index, residual):
        derivatives = [residual]
        if state["at"] is not None:
            gap = index - state["at"]
            for before in state["derivatives"][: self.order]:
                derivatives.append((derivatives[-1] - before) / gap)
        state["at"], state["derivatives"] = index, derivatives

    def predict(self, state, index):
        gap, scale = index - state["at"], 1.0
        result = state["derivatives"][0]
        for i, derivative in enumerate(state["derivatives"][1:], start=1):
            scale *= gap / i
            result = result + scale * derivative
        return result
