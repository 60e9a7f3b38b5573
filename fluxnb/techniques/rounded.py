"""Rows in FP8 that a kernel has rounded already, and layers that take them as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Rounded(NamedTuple):
    """A layer's input in FP8 (e4m3), each row with its own scale: what layers that round would make of it.

    Args:
        rows: (batch * tokens, width) in float8_e4m3fn.
        scale: (batch * tokens, 1) in float32; `rows * scale` is what was rounded.
        shape: (batch, tokens, width).
    """

    rows: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, ...]


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x in float8_e4m3fn; what lies beyond its range becomes its end, as on the GPU."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of x, (rows, width), in FP8 and their scales, (rows, 1) in float32, as torchao rounds them."""
    scale = (x.abs().amax(dim=1, keepdim=True) / FP8_MAX).float()
    return to_fp8(x.float() / scale), scale


def empty_rows(count: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what `rows` gives."""
    rounded = torch.empty((count, width), dtype=torch.float8_e4m3fn, device=device)
    return rounded, torch.empty((count, 1), dtype=torch.float32, device=device)


def rounds(linear) -> bool:
    """Whether the layer's weight is torchao's FP8 with one scale per row, and its input is rounded to that too."""
    weight = linear.weight
    return (
        type(linear) is nn.Linear
        and type(weight).__name__ == "Float8Tensor"
        and weight.act_quant_kwargs is not None
        and weight.scale.numel() == weight.shape[0] > 1
    )


def product(rounded: torch.Tensor, scale: torch.Tensor, linear, late: bool = False) -> torch.Tensor:
    """The product of rows already in FP8 with a torchao FP8 layer, by torchao's own kernel.

    Args:
        rounded, scale: (rows, in) and (rows, 1), as of `rows`.
        linear: an nn.Linear whose weight is torchao's.
        late: the matrices are multiplied as they are, and scales and bias follow: compiled, in what reads the result.

    Returns:
        (rows, out) in the layer's high-precision format.
    """
    from torchao.float8.inference import addmm_float8_unwrapped_inference

    weight = linear.weight
    if late:  # at most 448² times the inner size, which bfloat16 has room for
        one, fast = scale.new_ones(()), weight.mm_config.use_fast_accum
        plain = torch._scaled_mm(rounded, weight.qdata.t(), one, one, out_dtype=weight.dtype, use_fast_accum=fast)
        scaled = plain.float() * scale * weight.scale.t()
        return (scaled if linear.bias is None else scaled + linear.bias).to(weight.dtype)
    return addmm_float8_unwrapped_inference(
        rounded,
        scale,
        weight.qdata.t(),
        weight.scale.t(),
        output_dtype=weight.dtype,
        bias=linear.bias,
        use_fast_accum=weight.mm_config.use_fast_accum,
    )


def project(layer, x) -> torch.Tensor:
    """What a layer makes of x, (batch, tokens, width), or of what is `Rounded` already: (batch, tokens, out)."""
    if isinstance(x, Rounded):
        return product(x.rows, x.scale, layer).unflatten(0, x.shape[:-1])
    return layer(x)
