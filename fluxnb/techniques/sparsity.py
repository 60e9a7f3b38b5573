"""2:4 sparsity with INT8: two of every four weights kept, the rest dropped, on the GPU's sparse matrix units.

torchao once had a configuration for it and dropped it; this is the arithmetic by itself, with cuSPARSELt's kernel in
PyTorch. Source: diffusers-torchao's "int8dq + semi-structured" rows; magnitude pruning without retraining.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fluxnb.technique import Unavailable
from fluxnb.techniques import kinds
from fluxnb.techniques.precision import Quantizer

ROWS = 32  # cuSPARSELt's INT8 kernels want a multiple of it


def pruned(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns) weights with the two smallest of every four columns set to zero."""
    fours = weight.reshape(-1, 4)
    kept = fours.abs().topk(2, dim=1).indices
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, kept, True)
    return (fours * mask).reshape(weight.shape)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as INT8 with one scale for each row, symmetric: (int8 values, float32 scales (rows, 1))."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127
    return (x.float() / scale).round().to(torch.int8), scale


class SparseInt8Linear(nn.Module):
    """A linear layer with 2:4 sparse INT8 weights and activations rounded row by row."""

    weight: torch.Tensor  # compressed
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        values, scale = rounded(pruned(linear.weight.detach()))
        self.register_buffer("weight", torch._cslt_compress(values))
        self.register_buffer("scale", scale.flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = rounded(x.reshape(-1, self.in_features))
        rows = len(values)
        values = nn.functional.pad(values, (0, 0, 0, -rows % ROWS)).contiguous()  # the kernel knows no other layout
        out = torch._cslt_sparse_mm(self.weight, values.t(), alpha=self.scale, out_dtype=torch.bfloat16).t()
        out = (out[:rows] * scale).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


@dataclass
class SparseInt8(Quantizer):
    """2:4 sparse INT8 in every linear layer of the blocks that has many rows. Source: diffusers-torchao; cuSPARSELt."""

    name = label = "INT8, 2:4 sparse"
    settings = {"quantization": kinds.SPARSE_INT8}
    takes_loras = False
    adapters_first = ("LORA", "lora_bias", "IA3")  # which don't read the weights

    def check(self, pipe):
        if pipe.transformer.device.type != "cuda" or not torch.backends.cusparselt.is_available():
            raise Unavailable("needs a CUDA GPU of compute capability 8.0 or more and a PyTorch with cuSPARSELt")
        if pipe.transformer.dtype != torch.bfloat16:
            raise Unavailable(f"needs the model in bfloat16, and it is in {pipe.transformer.dtype}")

    def convert(self, linear, modulation):
        if modulation or linear.in_features % 32 or linear.out_features % 32:
            return None
        return SparseInt8Linear(linear)
