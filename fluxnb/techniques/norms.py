"""What FP8 products read, made by the norm before them: layer norm, modulation and rounding as one kernel.

At FLUX's size the tokens of one image are 28 MB in bfloat16 and 14 MB in FP8. Compiled, a block joins text and image
(one read, one write), and goes over the rows again for the mean, the modulation, the largest value and the rounding; in
a block of two streams the residual is a pass, too, and the attention's output is rounded in two. Here each is one read
and one write. What is left of a block, its end, PyTorch's compiler joins, adds and scales in one pass by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import nn
from torch.nn import functional

from fluxnb import adapters
from fluxnb.families import FUSION
from fluxnb.technique import ROUNDING, Changes, Technique, Unavailable
from fluxnb.techniques import layers
from fluxnb.techniques.fused import _RoundingSingleBlock
from fluxnb.techniques.processor import Processor, fill
from fluxnb.techniques.rounded import Rounded, empty_rows, rounds
from fluxnb.techniques.rounded import rows as rounded_rows


@dataclass
class FusedNorm(Technique):
    """Layer norm, modulation and rounding to FP8 as one kernel, with the residual before it in blocks of two streams.

    Apply it after TorchAO's FP8 per row and the fused GELU, before compilation. Source: this study's own kernel.
    """

    family, exact = FUSION, ROUNDING
    part = adapters.PROCESSORS
    name = label = "fused norm"
    settings = {"fused_norm": True}

    def apply(self, pipe):
        """Exchanges the classes of the blocks; returns the function that undoes it."""
        transformer = pipe.transformer
        adapters.check(transformer, self.part)
        layers.check_whole(transformer)
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        readers = [layer for block in blocks for layer in _readers(block)]
        if {type(block) for block in blocks} - set(_NORMING) or not all(map(rounds, readers)):
            raise Unavailable(
                "needs TorchAO FP8 per row and the fused GELU before it, and no LoRA: it makes their rows"
            )
        for kind, ours in _NORMING.items():  # for caches of diffusers' own, which ask there
            TransformerBlockRegistry.register(ours, TransformerBlockRegistry.get(kind))
        with Changes(self.label) as changes:
            layers.refuse_groups(pipe, changes)
            layers.refuse_sequential(pipe, changes)
            fill(transformer, "_rounded", _given, changes)
            for block in blocks:
                changes.put(block, "__class__", _NORMING[type(block)])
            self.proof = {"norms": f"of {len(blocks)} blocks in fluxnb::norm_round"}
        return changes.take_back


def _readers(block) -> list[nn.Module]:
    """The layers that read what a norm gives."""
    attn = block.attn
    double = attn.added_kv_proj_dim is not None
    if attn.fused_projections:
        names: tuple = ("to_qkv", "to_added_qkv")[: 1 + double]
    else:
        names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")[: 3 + 3 * double]
    feeds = [block.ff.net[0].proj, block.ff_context.net[0].proj] if double else [block.proj_mlp]
    return [*(getattr(attn, name) for name in names), *feeds]


def _takes(block) -> bool:
    """Whether they all take it rounded, here and now: with a LoRA around one it doesn't."""
    processor = block.attn.processor
    return isinstance(processor, Processor) and processor._rounded is not None and all(map(rounds, _readers(block)))


def _given(x, layer):
    """What a layer is to read of x, (batch, tokens, width), a part of something larger."""
    return Rounded(*round_rows(x), tuple(x.shape)) if rounds(layer) else x.contiguous()


class _NormingBlock(FluxTransformerBlock):
    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        more = joint_attention_kwargs or {}
        if not _takes(self):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, more)
        given = (
            (hidden_states, self.norm1, self.norm2, self.ff),
            (encoder_hidden_states, self.norm1_context, self.norm2_context, self.ff_context),
        )
        numbers = [norm.linear(norm.silu(temb)).chunk(6, dim=1) for _, norm, _, _ in given]
        image, text = (
            _normed(x, None, shift, scale, norm.norm.eps)
            for (x, norm, _, _), (shift, scale, *_) in zip(given, numbers, strict=True)
        )
        attended = self.attn(image, text, image_rotary_emb=image_rotary_emb, **more)
        out = []
        for (x, _, norm, feed), (_, _, gate, shift, scale, last), made in zip(given, numbers, attended, strict=True):
            x, rows, scales = add_norm_round(x, made, gate, scale, shift, norm.eps)
            out.append(x + last.unsqueeze(1) * feed(Rounded(rows, scales, x.shape)))
        return out[1], out[0]


class _NormingSingleBlock(_RoundingSingleBlock):
    def normed(self, both, text, image, temb):
        if not _takes(self):
            return super().normed(both, text, image, temb)
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        return _normed(image, text, shift, scale, self.norm.norm.eps), gate


_NORMING = {FluxTransformerBlock: _NormingBlock, _RoundingSingleBlock: _NormingSingleBlock}


def _normed(x, before, shift, scale, eps) -> Rounded:
    tokens = x.shape[1] + (0 if before is None else before.shape[1])
    rows, scales = norm_round(x, before, scale, shift, eps)
    return Rounded(rows, scales, (x.shape[0], tokens, x.shape[2]))


@torch.library.custom_op("fluxnb::norm_round", mutates_args=())
def norm_round(
    x: torch.Tensor, before: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens normalised, times 1 + scale, plus shift, as rows in FP8 (e4m3), each with its own scale.

    Args:
        x: (batch, tokens, width).
        before: (batch, more tokens, width) of the text, which stand first; or None.
        scale, shift: (batch, width) of the modulation.
        eps: of the norm.

    Returns:
        (batch * all tokens, width) in float8_e4m3fn, and (batch * all tokens, 1) float32 scales.
    """
    return _rounded(x if before is None else torch.cat([before, x], dim=1), scale, shift, eps)


def _rounded(x, scale, shift, eps):
    normed = functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    return rounded_rows(normed.flatten(0, 1))


@norm_round.register_fake
def _(x, before, scale, shift, eps):
    return empty_rows(x.shape[0] * (x.shape[1] + (0 if before is None else before.shape[1])), x.shape[2], x.device)


@norm_round.register_kernel("cuda")
def _(x, before, scale, shift, eps):
    from fluxnb.techniques import triton_kernels

    return triton_kernels.norm_round(x, before, None, None, scale, shift, eps)[1:]


@torch.library.custom_op("fluxnb::add_norm_round", mutates_args=())
def add_norm_round(
    x: torch.Tensor, added: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + gate * added, and the rows that `norm_round` makes of that.

    Args:
        x, added: (batch, tokens, width).
        gate, scale, shift: (batch, width) of the modulation.
        eps: of the norm.

    Returns:
        (batch, tokens, width) in x's number format, and as of `norm_round`.
    """
    summed = x + gate[:, None] * added
    return summed, *_rounded(summed, scale, shift, eps)


@add_norm_round.register_fake
def _(x, added, gate, scale, shift, eps):
    return x.new_empty(x.shape), *empty_rows(x.shape[0] * x.shape[1], x.shape[2], x.device)


@add_norm_round.register_kernel("cuda")
def _(x, added, gate, scale, shift, eps):
    from fluxnb.techniques import triton_kernels

    return triton_kernels.norm_round(x, None, added, gate, scale, shift, eps)


@torch.library.custom_op("fluxnb::round_rows", mutates_args=())
def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x, (batch, tokens, width), as rows in FP8, as of `norm_round` without the norm."""
    return rounded_rows(x.flatten(0, 1))


@round_rows.register_fake
def _(x):
    return empty_rows(x.shape[0] * x.shape[1], x.shape[2], x.device)


@round_rows.register_kernel("cuda")
def _(x):
    from fluxnb.techniques import triton_kernels

    return triton_kernels.norm_round(x, None, None, None, None, None, 0.0)[1:]
