"""SeaCache: the change of the modulated input, seen through a filter that follows the noise."""

from __future__ import annotations

import math

import torch

from fluxnb.cache.gates.base import INPUT, Accumulating, change
from fluxnb.cache.passes import grid
from fluxnb.errors import UserError
from fluxnb.families import SEACACHE

POWER = 2.0


class SeaCache(Accumulating):
    """Reuses while the accumulated change of the filtered modulated input stays below the threshold.

    The first block's modulated input, on the tokens' grid, passes a Wiener filter: along each axis the gain
    (1 - σ) S / ((1 - σ)² S + σ²) with S = 1 / frequency^power, both multiplied and scaled to a mean of 1, so that early
    steps are compared in what is not noise. The relative change from step to step is summed until the sum reaches the
    threshold; nothing is fitted. First and last step are always computed, and a reused step runs no block. σ stays on
    the device. Source: SeaCache (CVPR 2026, arXiv 2602.18993), as in diffusers' `SeaCacheConfig`, which knows no FLUX.

    Args:
        power: of the images' spectrum: 2 for images, 3 for video.
    """

    family = SEACACHE
    name = "SeaCache"
    point = INPUT
    looks_at_input = whole = True

    def __init__(self, threshold: float, power: float = POWER, **options):
        super().__init__(threshold, **options)
        if isinstance(power, bool) or not isinstance(power, int | float) or not 0 < power < math.inf:
            raise UserError(f"SeaCache's power is {power!r}: give a number above 0, such as 2.")
        self.power = power

    @property
    def settings(self) -> dict:
        own = {"power": self.power} if self.power != POWER else {}
        return {"threshold": self.threshold, **own, **self.options}

    @property
    def rule(self) -> str:
        return super().rule + (f", power {self.power:g}" if self.power != POWER else "")

    def new_state(self, total=None):
        return {"grid": None, "sigma": None, "filtered": None, "indicator": None, "accumulated": 0.0}

    def called(self, state, image, given):
        state["grid"] = state["grid"] or grid(given, self.name)
        coming = image.coming
        state["sigma"] = given["timestep"].flatten()[0] if coming is None else coming[0] / 1000

    def measure(self, state, index, seen):
        if self.threshold == 0:
            return None
        before = state["filtered"]
        state["filtered"] = filtered(seen.unflatten(1, state["grid"]), state["sigma"], self.power)
        return None if before is None else change(state["filtered"], before)


def filtered(seen: torch.Tensor, sigma: torch.Tensor, power: float) -> torch.Tensor:
    """`seen`, (n, rows, columns, width), without what noise of 0-d `sigma` hides; in float32."""
    sigma = sigma.to(seen.device, torch.float32).clamp(1e-6, 1 - 1e-6)
    gains = []
    for size in seen.shape[1:3]:
        spectrum = 1 / (torch.fft.fftfreq(size, device=seen.device).abs() ** power + 1e-16)
        gains.append((1 - sigma) * spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2 + 1e-16))
    gain = gains[0][:, None] * gains[1]
    frequencies = torch.fft.fftn(seen.float(), dim=(1, 2)) * (gain / gain.mean())[..., None]
    return torch.fft.ifftn(frequencies, dim=(1, 2)).real
