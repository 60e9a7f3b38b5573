"""Attention whose products are in FP8 (e4m3), on Hopper by FlashAttention 3.

The rounding has to cost nothing, or it costs more than the products gain: query and key are rounded by the kernel that
normalises and turns them (`fused.norm_rope`), value in what a compiled block does to it anyway. Query and key need no
scale, since their norm keeps them within the format's range, and a floating-point format has the same relative step
everywhere in it; value has one scale per head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fluxnb.families import ATTENTION
from fluxnb.technique import ANOTHER, Changes, Technique, Unavailable
from fluxnb.techniques import attention, layers
from fluxnb.techniques.fused import rounded_positions
from fluxnb.techniques.processor import fill
from fluxnb.techniques.rounded import FP8_MAX, to_fp8

WIDTH = 64  # of the narrowest head that the kernel is written for; zeros beside a narrower one change no product
WEIGHT = 256  # what the largest weight of a row is before it is rounded, as in FlashAttention 3


@dataclass
class FP8Attention(Technique):
    """Query, key, value and the softmax's weights in FP8, for the whole transformer.

    Apply it before compilation, beside or in place of the fused norm and positions. Source: FlashAttention 3 (Shah et
    al., 2024); rounding within the norm's kernel is this study's.

    Args:
        simulated: the same arithmetic in PyTorch, for a machine without a Hopper GPU: what it does to an image, slowly.
    """

    family, exact, term = ATTENTION, ANOTHER, "FP8 attention"

    simulated: bool = False

    @property
    def name(self) -> str:
        return "FP8 attention, simulated" if self.simulated else "FP8 attention"

    label = name

    @property
    def settings(self) -> dict:
        return {"fp8_attention": "simulated" if self.simulated else True}

    def apply(self, pipe):
        """Exchanges the attention processors; returns the function that undoes it."""
        transformer = pipe.transformer
        if not self.simulated:
            _check(transformer)
        with Changes(self.label) as changes:
            if transformer.dtype == torch.bfloat16 or not self.simulated:
                layers.refuse_converting(pipe, changes)
            why = f"{self.label} is on, and an IP-Adapter exchanges what attends: take the one off first."
            changes.refuse(pipe, ("load_ip_adapter", "unload_ip_adapter"), why[0].upper() + why[1:])
            fill(transformer, "_positions", rounded_positions, changes)
            count = fill(transformer, "_attend", simulated if self.simulated else _flash_3(), changes)
            what = "PyTorch" if self.simulated else "FlashAttention 3"
            self.proof = {"attention": f"of {count} layers in FP8 by {what}"}
        return changes.take_back


def _check(transformer) -> None:
    if transformer.device.type != "cuda" or torch.cuda.get_device_capability(transformer.device)[0] != 9:
        raise Unavailable("needs a Hopper GPU (H100, H200); `simulated=True` does the same arithmetic elsewhere")
    if transformer.dtype != torch.bfloat16:
        raise Unavailable(f"needs the model in bfloat16, and it is in {transformer.dtype}")
    attention.flash_3()


def rounded_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x, (batch, tokens, heads, width), in FP8 and the scale of each head, (batch, heads) in float32."""
    scale = x.abs().amax(dim=(1, 3)).float().clamp(min=1e-12) / FP8_MAX
    return to_fp8(x.float() / scale[:, None, :, None]), scale


def _operands(query, key, value) -> tuple:
    """What the kernel takes: all three in FP8, and value's scales. Another technique may have made query and key."""
    query, key = (x if x.dtype is torch.float8_e4m3fn else to_fp8(x) for x in (query, key))
    return query, key, *rounded_heads(value)


def simulated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """FlashAttention 3's arithmetic in FP8, rounding for rounding, but for the order in which it sums.

    Args:
        query, key, value: (batch, tokens, heads, width); query and key may be in FP8 already.

    Returns:
        (batch, tokens, heads, width) in value's number format.
    """
    width = value.shape[-1]
    q, k, v, scale = _operands(query, key, value)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * width**-0.5
    weights = WEIGHT * (scores - scores.amax(-1, keepdim=True)).exp()
    out = to_fp8(weights).float() @ v / weights.sum(-1, keepdim=True)
    return (out * scale[:, :, None, None]).transpose(1, 2).to(torch.bfloat16).to(value.dtype)


def _flash_3():
    return functools.partial(by_flash_3, attention.flash_3().flash_attn_func)


def by_flash_3(attend, query, key, value) -> torch.Tensor:
    """As of `simulated`, by `attend`, FlashAttention 3's function, on a Hopper GPU."""
    width = value.shape[-1]
    q, k, v, scale = _operands(query, key, value)
    if width < WIDTH:
        q, k, v = (torch.nn.functional.pad(x.view(torch.uint8), (0, WIDTH - width)).view(x.dtype) for x in (q, k, v))
    out = attend(q, k, v, softmax_scale=width**-0.5, v_descale=scale)
    out = out[0] if isinstance(out, tuple) else out
    return out[..., :width].to(value.dtype)
