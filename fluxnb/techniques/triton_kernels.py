"""The study's own GPU kernels, in Triton. Imported only where there is a CUDA GPU (or Triton's interpreter)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluxnb.techniques.rounded import FP8_MAX, empty_rows

# --- GELU, concatenation and rounding to FP8 --------------------------------------------------------------


@triton.jit
def _gelu(x):
    """The tanh approximation in float32, with the GPU's own tanh (11 bits, more than bfloat16 has)."""
    inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1)
    half = 0.5 * x
    return half * tanh + half


@triton.jit
def _activated(source, at, m):
    x = tl.load(source + at, mask=at < m, other=0.0)
    return _gelu(x.to(tl.float32)).to(source.dtype.element_ty).to(tl.float32)  # rounded as it would be in memory


@triton.jit
def _given(source, at, n):
    return tl.load(source + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit
def _round(target, x, at, end, inverse):
    tl.store(target + at, (x * inverse).to(tl.float8e4nv), mask=at < end)  # the conversion saturates


@triton.jit
def _gelu_round(
    plain, mlp, rounded, scales, plain_stride, mlp_stride, n, m, limit,
    N1: tl.constexpr, N2: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """One program per row, which stays in registers between finding its largest value and rounding.

    Each part is cut into two powers of two, so that few lanes are idle (3,072 = 2,048 + 1,024).
    """
    row = tl.program_id(0).to(tl.int64)
    plain, mlp, rounded = plain + row * plain_stride, mlp + row * mlp_stride, rounded + row * (n + m)
    at1 = tl.arange(0, M1)
    x1 = _activated(mlp, at1, m)
    largest = tl.max(tl.abs(x1))
    if M2 > 0:
        at2 = M1 + tl.arange(0, M2)
        x2 = _activated(mlp, at2, m)
        largest = tl.maximum(largest, tl.max(tl.abs(x2)))
    if N1 > 0:
        before1 = tl.arange(0, N1)
        y1 = _given(plain, before1, n)
        largest = tl.maximum(largest, tl.max(tl.abs(y1)))
    if N2 > 0:
        before2 = N1 + tl.arange(0, N2)
        y2 = _given(plain, before2, n)
        largest = tl.maximum(largest, tl.max(tl.abs(y2)))
    # torchao divides in the activations' own format
    scale = (largest / limit).to(mlp.dtype.element_ty).to(tl.float32)
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    if N1 > 0:
        _round(rounded, y1, before1, n, inverse)
    if N2 > 0:
        _round(rounded, y2, before2, n, inverse)
    _round(rounded + n, x1, at1, m, inverse)
    if M2 > 0:
        _round(rounded + n, x2, at2, m, inverse)


def gelu_round(plain: torch.Tensor, mlp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fluxnb.techniques.fused.gelu_round`. Multiplies by the scale's reciprocal where PyTorch divides."""
    rows, n, m = mlp.shape[0], plain.shape[1], mlp.shape[1]
    if plain.stride(1) != 1:
        plain = plain.contiguous()
    if mlp.stride(1) != 1:
        mlp = mlp.contiguous()
    rounded, scales = empty_rows(rows, n + m, mlp.device)
    _gelu_round[(rows,)](
        plain, mlp, rounded, scales, plain.stride(0), mlp.stride(0), n, m, FP8_MAX, *_cut(n), *_cut(m), num_warps=16
    )
    return rounded, scales


def _cut(length: int) -> tuple[int, int]:
    """Two powers of two (or zeros) that cover a length."""
    if length == 0:
        return 0, 0
    first = 1 << (length.bit_length() - 1)
    return first, triton.next_power_of_2(length - first) if length > first else 0


# --- RMS norm and rotary positions ------------------------------------------------------------------------


@triton.jit
def _low(pairs):
    """The first bfloat16 of each pair that was read as one int32, in float32."""
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pairs):
    return (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _pair(low, high):
    low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _norm_rope(
    source, weight, cos, sin, target, heads, tokens, image_stride, token_stride, angle_stride, before, after, eps,
    limit, PAIRS: tl.constexpr, HEADS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One token of one image: every head normalised, its pairs of numbers turned, written where they belong."""
    image, token = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = head < heads
    at = head * PAIRS + pair
    x = tl.load(source + image * image_stride + token * token_stride + at, mask=inside, other=0)
    low, high = _low(x), _high(x)
    norm = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * PAIRS) + eps)[:, None]
    w = tl.load(weight + pair)
    low, high = _rounded(low * norm * _low(w)), _rounded(high * norm * _high(w))  # as the norm gives them
    place = token + before
    angle = place * angle_stride + 2 * pair
    c0, c1 = tl.load(cos + angle), tl.load(cos + angle + 1)
    s0, s1 = tl.load(sin + angle), tl.load(sin + angle + 1)
    first, second = low * c0 - high * s0, high * c1 + low * s1
    to = (image * (before + tokens + after) + place) * heads * PAIRS
    if FP8:  # number by number: a store of what lies side by side in a thread is one store anyway
        each = head * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.interleave(first, second)
        tl.store(target + 2 * to + each, tl.clamp(both, -limit, limit).to(tl.float8e4nv), mask=inside)
    else:
        tl.store(target + to + at, _pair(first, second), mask=inside)


def norm_rope(x, weight, text, text_weight, cos, sin, eps: float, rounded: bool = False) -> torch.Tensor:
    """See `fluxnb.techniques.fused.norm_rope`. Of bfloat16 only: a pair of numbers is read, and written, as one."""
    n, tokens, heads, width = x.shape
    first = 0 if text is None else text.shape[1]
    shape = (n, first + tokens, heads, width)
    target = torch.empty(shape, dtype=torch.float8_e4m3fn if rounded else x.dtype, device=x.device)
    written = target if rounded else target.view(torch.int32)
    parts = [(x, weight, first, 0)] + ([] if text is None else [(text, text_weight, 0, tokens)])
    for part, scale, before, after in parts:
        if part.stride()[2:] != (width, 1):
            part = part.contiguous()
        pairs = part.view(torch.int32)
        _norm_rope[(n * part.shape[1],)](
            pairs, scale.view(torch.int32), cos, sin, written, heads, part.shape[1],
            pairs.stride(0), pairs.stride(1), cos.stride(0), before, after, eps, FP8_MAX,
            PAIRS=width // 2, HEADS=triton.next_power_of_2(heads), FP8=rounded, num_warps=4,
        )  # fmt: skip
    return target


# --- layer norm, modulation and rounding to FP8 -----------------------------------------------------------


@triton.jit
def _norm_round(
    before, x, added, gate, scale, shift, summed, rounded, scales, first, tokens, before_image, before_token,
    x_image, x_token, added_image, added_token, gate_image, scale_image, shift_image, width, eps, limit,
    ADD: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token: read once, written once (twice where a residual is added), in float32 in between."""
    row = tl.program_id(0).to(tl.int64)
    image, token = row // (first + tokens), row % (first + tokens)
    at = tl.arange(0, WIDTH)
    inside = at < width
    text = inside & (token < first)
    of_text = tl.load(before + image * before_image + token * before_token + at, mask=text, other=0.0)
    here = token - first
    of_image = tl.load(x + image * x_image + here * x_token + at, mask=inside & (token >= first), other=0.0)
    y = of_text.to(tl.float32) + of_image.to(tl.float32)  # one of them is zeros that nobody reads
    if ADD:
        more = tl.load(added + image * added_image + token * added_token + at, mask=inside, other=0.0)
        y += tl.load(gate + image * gate_image + at, mask=inside, other=0.0).to(tl.float32) * more.to(tl.float32)
        kept = y.to(x.dtype.element_ty)
        tl.store(summed + row * width + at, kept, mask=inside)
        y = kept.to(tl.float32)
    if NORM:
        y = tl.where(inside, y - tl.sum(y) / width, 0.0)
        y *= tl.rsqrt(tl.sum(y * y) / width + eps)
        up = tl.load(scale + image * scale_image + at, mask=inside, other=0.0).to(tl.float32)
        y = y * (1.0 + up) + tl.load(shift + image * shift_image + at, mask=inside, other=0.0).to(tl.float32)
        y = y.to(x.dtype.element_ty).to(tl.float32)  # as it would be in memory
    largest = (tl.max(tl.abs(y)) / limit).to(x.dtype.element_ty).to(tl.float32)  # torchao divides in that format
    tl.store(scales + row, largest)
    _round(rounded + row * width, y, at, width, 1.0 / largest)


def norm_round(x, before, added, gate, scale, shift, eps: float, warps: int = 4) -> tuple:
    """See `fluxnb.techniques.norms`: `add_norm_round` if something is `added`, else `norm_round` with None before it.

    Without scale and shift it is `round_rows`.
    """
    x, before, added = (t if t is None or t.stride(2) == 1 else t.contiguous() for t in (x, before, added))
    gate, scale, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (gate, scale, shift))
    n, tokens, width = x.shape
    first = 0 if before is None else before.shape[1]
    rounded, scales = empty_rows(n * (first + tokens), width, x.device)
    summed = None if added is None else torch.empty((n, tokens, width), dtype=x.dtype, device=x.device)
    given = (x if t is None else t for t in (before, added, gate, scale, shift, summed))  # read or written by nobody
    text, more, gates, scale, shift, kept = given
    _norm_round[(rounded.shape[0],)](
        text, x, more, gates, scale, shift, kept, rounded, scales, first, tokens, text.stride(0), text.stride(1),
        x.stride(0), x.stride(1), more.stride(0), more.stride(1), gates.stride(0), scale.stride(0), shift.stride(0),
        width, eps, FP8_MAX, ADD=added is not None, NORM=scale is not x, WIDTH=triton.next_power_of_2(width),
        num_warps=warps,
    )  # fmt: skip
    return summed, rounded, scales
