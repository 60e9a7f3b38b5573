"""The study's own GPU kernels, in Triton. Imported only where there is a CUDA GPU (or Triton's interpreter)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@triton.jit
def _gelu(x):
    """The tanh approximation in float32: x (1 + tanh(u)) / 2 = x sigmoid(2 u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_round(plain, mlp, rounded, scales, plain_stride, mlp_stride, n, m, limit, N: tl.constexpr, M: tl.constexpr):
    """One program per row: both parts stay in registers between finding the largest value and rounding."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, M)
    x = tl.load(mlp + row * mlp_stride + at, mask=at < m, other=0.0)
    x = _gelu(x.to(tl.float32)).to(mlp.dtype.element_ty)  # rounded as it would be in memory
    largest = tl.max(tl.abs(x.to(tl.float32)))
    out = rounded + row * (n + m)
    if N > 0:
        before = tl.arange(0, N)
        y = tl.load(plain + row * plain_stride + before, mask=before < n, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(y.to(tl.float32))))
    # torchao divides in the activations' own format
    scale = (largest / limit).to(mlp.dtype.element_ty).to(tl.float32)
    tl.store(scales + row, scale)
    if N > 0:
        y = tl.clamp(tl.div_rn(y.to(tl.float32), scale), -limit, limit)
        tl.store(out + before, y.to(tl.float8e4nv), mask=before < n)
    x = tl.clamp(tl.div_rn(x.to(tl.float32), scale), -limit, limit)
    tl.store(out + n + at, x.to(tl.float8e4nv), mask=at < m)


def gelu_round(plain: torch.Tensor, mlp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fluxnb.fused.gelu_round`. Rows have to be contiguous in themselves."""
    rows, n, m = mlp.shape[0], plain.shape[1], mlp.shape[1]
    if plain.stride(1) != 1:
        plain = plain.contiguous()
    if mlp.stride(1) != 1:
        mlp = mlp.contiguous()
    rounded = torch.empty((rows, n + m), dtype=torch.float8_e4m3fn, device=mlp.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=mlp.device)
    power = triton.next_power_of_2
    _gelu_round[(rows,)](
        plain,
        mlp,
        rounded,
        scales,
        plain.stride(0),
        mlp.stride(0),
        n,
        m,
        FP8_MAX,
        N=power(n) if n else 0,
        M=power(m),
        num_warps=16,
    )
    return rounded, scales
