"""Predictors that add a weighted sum of what was added at computed steps: the weights are worked out on the host."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch


class Linear:
    """Adds the sum of what the blocks added at the last computed steps, each times a weight of its own.

    The weights follow from the numbers of the steps alone, so they are float64 on the host and nothing is read from a
    GPU; the sum is in float32 at least. A subclass says what they are.
    """

    name: str  # for labels
    kind: str  # for settings
    terms: dict = {}  # made-up words of its name, each with half a sentence
    keeps = 1  # so many tensors of the size of the image tokens, for each point where a gate may decide
    probes = False  # whether it needs what the first block adds at the step itself
    whole = False  # whether it needs all tokens of the image
    group = None  # the ranks that have the other tokens of the same image

    @property
    def settings(self) -> dict:
        """Plain values that distinguish this predictor; empty for the usual one."""
        chosen = {p.name: (getattr(self, p.name), p.default) for p in inspect.signature(type(self)).parameters.values()}
        return {"predictor": self.kind, **{name: own for name, (own, usual) in chosen.items() if own != usual}}

    def weights(self, at: Sequence[int], index: int, total: int | None = None) -> np.ndarray:
        """The weights of the computed steps `at`, in their order, for step `index` of `total`."""
        raise NotImplementedError

    def new_state(self, total: int | None = None) -> dict:
        """The memory of one trajectory of an image of `total` steps (None: unknown) at one point."""
        return {"at": [], "residuals": [], "total": total}

    def called(self, state: dict, given: dict) -> None:
        """A step begins: what the transformer is given, by name."""

    def probed(self, state: dict, first: torch.Tensor) -> None:
        """The first block was run at this step and added `first`, (n, image tokens, width)."""

    def computed(self, state: dict, index: int, residual: torch.Tensor) -> None:
        """The blocks were run at step `index` and added `residual`, (n, image tokens, width)."""
        state["at"] = [*state["at"], index][-self.keeps :]
        state["residuals"] = [*state["residuals"], residual][-self.keeps :]

    def predict(self, state: dict, index: int) -> torch.Tensor:
        """What the blocks would add at step `index`."""
        return weighted(state["residuals"], self.weights(state["at"], index, state["total"]))


def weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float] | np.ndarray) -> torch.Tensor:
    """Their sum, each times its weight, in their number format; one of weight 1 by itself is given as it is."""
    used = [(tensor, float(weight)) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    found = torch.zeros_like(tensors[0], dtype=exact)
    for tensor, weight in used:
        found.add_(tensor, alpha=weight)
    return found.to(tensors[0].dtype)


def units(at: Sequence[int]) -> list[np.ndarray]:
    """The weights of what was added at each of these steps by itself: what a formula does to them are its weights."""
    return list(np.eye(len(at)))


def differences(at: Sequence[int], order: int) -> list[np.ndarray]:
    """Weights of the finite differences at the last of these steps, of order 0 up to `order` or as many as are known.

    Each is that of the order below, now minus at the computed step before, over the gap between them: TaylorSeer's.
    """
    known: list[np.ndarray] = []
    for i, unit in enumerate(units(at)):
        now = [unit]
        for before in known[:order]:
            now.append((now[-1] - before) / (at[i] - at[i - 1]))
        known = now
    return known
