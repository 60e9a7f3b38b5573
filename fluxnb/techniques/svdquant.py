"""SVDQuant's arithmetic, simulated: what 4-bit weights and activations do to the image, not to the speed.

W = L1 L2 + R: a low-rank part in 16 bits takes up the outliers, the rest R is rounded to 4 bits in groups, and so
are the activations that it is multiplied with. Nunchaku's kernels do this in INT4; here the rounded values are
multiplied in the model's own number format. Source: SVDQuant (Li et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fluxnb.notebooks import QUANTIZED_CACHE
from fluxnb.techniques.precision import Quantizer

GROUP = 64
EXACT = 1024  # rows or columns up to which the decomposition is exact; FLUX's own matrices would take minutes


def rounded(x: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """x, rounded to signed 4-bit values (-7 to 7) times one scale per group along the last dimension."""
    size = x.shape[-1]
    group = group if size % group == 0 else size
    parts = x.reshape(*x.shape[:-1], size // group, group)
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 7
    return ((parts / scale).round() * scale).reshape(x.shape)


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, rank) and (rank, columns), whose product is nearest to `weight` (rows, columns).

    Large matrices are decomposed by random projection (Halko, Martinsson and Tropp, 2011), the same one every time.
    """
    if min(weight.shape) <= EXACT:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, q=2 * rank, niter=4)
    return u[:, :rank] * s[:rank], v[:, :rank].T


class SimulatedLinear(nn.Module):
    """A linear layer in SVDQuant's arithmetic; the same interface as nn.Linear."""

    up: torch.Tensor
    down: torch.Tensor
    rest: torch.Tensor  # the 4-bit part

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        weight = linear.weight.detach().float()
        up, down = low_rank(weight, rank)
        kind = linear.weight.dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("up", up.to(kind))
        self.register_buffer("down", down.to(kind))
        self.register_buffer("rest", rounded(weight - up @ down).to(kind))
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """Both parts, in the model's own number format: DoRA, LoHa and others read it."""
        return torch.addmm(self.rest, self.up, self.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)
        return low + nn.functional.linear(rounded(x), self.rest)


@dataclass
class SimulatedSVDQuant(Quantizer):
    """Every linear layer of the transformer's blocks in SVDQuant's arithmetic. Source: SVDQuant (Li et al., 2024).

    Args:
        rank: of the 16-bit part.
    """

    name = "SVDQuant INT4 (simulated)"
    notebook = QUANTIZED_CACHE
    takes_loras = False

    rank: int = 16

    @property
    def settings(self) -> dict:
        return {"quantization": "svdquant int4, simulated", "rank": self.rank}

    @property
    def label(self) -> str:
        return f"SVDQuant INT4 of rank {self.rank} (simulated)"

    def convert(self, linear, modulation):
        return SimulatedLinear(linear, self.rank)
