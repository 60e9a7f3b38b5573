"""Passes over memory that a compiled block needn't make: GELU, rounding to FP8, norm and rotary positions.

At FLUX's size the feed-forward activations of one block are 113 MB (4,608 tokens of 12,288 numbers of 2 bytes).
Compiled, they are written by a matrix product, read and written again by GELU and a concatenation and, with FP8, read
twice more for the largest value and for the rounding. Two ways to spare that, chosen by what the layers are:

    bfloat16          GELU in the epilogue of the product before it (cuBLASLt's), and no concatenation: a single
                      block's last product is done in two parts
    TorchAO FP8 row   GELU, concatenation, largest value and rounding as one kernel: one read, one write

Query and key are normalised, turned by their positions and, in a double block, put behind the text's: `FusedRoPE` does
it in one kernel that reads and writes each number once.

The arithmetic is that of the layers as they were, which tests assert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn
from torch.nn import functional

from fluxnb import adapters
from fluxnb.families import FUSION
from fluxnb.technique import ROUNDING, Changes, Technique, Unavailable
from fluxnb.techniques import layers
from fluxnb.techniques.processor import Processor, fill, positions
from fluxnb.techniques.rounded import empty_rows, product, project, rounds, to_fp8
from fluxnb.techniques.rounded import rows as rounded_rows


@dataclass
class FusedGELU(Technique):
    """GELU fused into the matrix product before it or, with FP8, into the rounding after it.

    Apply it after the quantization, before compilation. Source: cuBLASLt's epilogues; the FP8 kernel is this study's.
    """

    family, exact = FUSION, ROUNDING
    part = adapters.GELU
    name = label = "fused GELU"
    settings = {"fused_gelu": True}

    def apply(self, pipe):
        """Exchanges the classes of the layers that contain a GELU; returns the function that undoes it."""
        transformer = pipe.transformer
        adapters.check(transformer, self.part)
        if transformer.dtype not in (torch.bfloat16, torch.float32):
            raise Unavailable(f"needs the model in bfloat16, and it is in {transformer.dtype}")
        parts: list[nn.Module] = [*transformer.single_transformer_blocks]
        for block in transformer.transformer_blocks:
            parts += [block.ff, block.ff_context]
        if strange := {type(part).__name__ for part in parts if type(part) not in _EPILOGUE}:
            raise Unavailable(f"needs diffusers' own blocks, and finds {', '.join(sorted(strange))}")
        rounding = all(rounds(_base(_last(part))) for part in parts)
        if not rounding:
            layers.check([layer for part in parts for layer in _linears(part)], True, "TorchAO FP8 per row")
        kinds = _ROUNDING if rounding else _EPILOGUE
        for block in (_EpilogueSingleBlock, _RoundingSingleBlock):  # for caches of diffusers' own, which ask there
            TransformerBlockRegistry.register(block, TransformerBlockRegistry.get(FluxSingleTransformerBlock))
        with Changes(self.label) as changes:
            for part in parts:
                changes.put(part, "__class__", kinds[type(part)])
            kernel = "fluxnb::gelu_round" if rounding else "aten::_addmm_activation"
            self.proof = {"gelu": f"of {len(parts)} layers in {kernel}"}
        return changes.take_back


def _linears(part) -> tuple[nn.Linear, nn.Linear]:
    """The product before the GELU and the one after it."""
    if isinstance(part, FluxSingleTransformerBlock):
        return part.proj_mlp, part.proj_out
    return part.net[0].proj, part.net[-1]


def _last(part) -> nn.Linear:
    return _linears(part)[1]


def _base(layer: nn.Module) -> nn.Module:
    """The layer without the LoRA around it."""
    return layer.base_layer if layers.adapted(layer) else layer  # type: ignore[return-value]


def _matches(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether the layer is nothing but its weight, here and now; with a LoRA or cast by a hook it has to be called."""
    if type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor:  # quantized since
        return False
    return linear.weight.dtype == x.dtype and linear.weight.device == x.device


# --- bfloat16: in the epilogue ----------------------------------------------------------------------------


def gelu_linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """gelu(x @ W.T + b), tanh approximation, as one matrix product where cuBLASLt is used.

    Args:
        x: (..., in).

    Returns:
        (..., out), in x's number format.
    """
    if x.device.type != "cuda" or not _matches(linear, x):  # elsewhere `_addmm_activation` means the other GELU
        return functional.gelu(linear(x), approximate="tanh")
    flat = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


class _EpilogueFeedForward(FeedForward):
    def forward(self, hidden_states):
        before, after = _linears(self)
        return after(gelu_linear(hidden_states, before))


class _SingleBlock(FluxSingleTransformerBlock):
    """diffusers' single block with its feed-forward part in one method."""

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        text = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.normed(both, encoder_hidden_states, hidden_states, temb)
        processor, more = self.attn.processor, joint_attention_kwargs or {}
        if isinstance(processor, Processor) and not more:
            begun = processor.begin(self.attn, normed, None, image_rotary_emb)
            mlp = self.feed(normed)  # while keys and values are on their way
            attended = processor.end(begun)
        else:
            attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **more)
            mlp = self.feed(normed)
        both = both + gate.unsqueeze(1) * self.project(attended, mlp)
        if both.dtype == torch.float16:
            both = both.clip(-65504, 65504)
        return both[:, :text], both[:, text:]

    def normed(self, both, text, image, temb) -> tuple:
        """The projections' input and the gate: `both` is the text's tokens and the image's, normalised and shifted."""
        return self.norm(both, emb=temb)

    def feed(self, normed) -> torch.Tensor:
        """The feed-forward part's activations, as `project` takes them, (batch, tokens, 4 × width)."""
        return project(self.proj_mlp, normed)

    def project(self, attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
        """proj_out([attended, gelu(proj_mlp(normed))]), (batch, tokens, width)."""
        raise NotImplementedError


class _EpilogueSingleBlock(_SingleBlock):
    def feed(self, normed):
        return gelu_linear(normed, self.proj_mlp)

    def project(self, attended, mlp):
        if not _matches(self.proj_out, mlp):
            return self.proj_out(torch.cat([attended, mlp], dim=2))
        width = attended.shape[-1]
        weight = self.proj_out.weight.t()
        first = torch.addmm(self.proj_out.bias, attended.flatten(0, -2), weight[:width])
        return torch.addmm(first, mlp.flatten(0, -2), weight[width:]).unflatten(0, attended.shape[:-1])


_EPILOGUE = {FeedForward: _EpilogueFeedForward, FluxSingleTransformerBlock: _EpilogueSingleBlock}


# --- FP8: in the rounding ---------------------------------------------------------------------------------


@torch.library.custom_op("fluxnb::gelu_round", mutates_args=())
def gelu_round(plain: torch.Tensor, mlp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [plain, gelu(mlp)] in FP8 (e4m3), each with its own scale, as torchao rounds them.

    Args:
        plain: (rows, n) what stands before the activations, n may be 0.
        mlp: (rows, m) activations before GELU (tanh approximation).

    Returns:
        (rows, n + m) in float8_e4m3fn, and (rows, 1) float32 scales.
    """
    return rounded_rows(torch.cat([plain, functional.gelu(mlp, approximate="tanh")], dim=1))


@gelu_round.register_fake
def _(plain, mlp):
    return empty_rows(mlp.shape[0], plain.shape[1] + mlp.shape[1], mlp.device)


@gelu_round.register_kernel("cuda")
def _(plain, mlp):
    from fluxnb.techniques import triton_kernels

    return triton_kernels.gelu_round(plain, mlp)


class _RoundingFeedForward(FeedForward):
    late = False

    def forward(self, hidden_states):
        before, after = _linears(self)
        if not rounds(after):
            return after(functional.gelu(project(before, hidden_states), approximate="tanh"))
        mlp = project(before, hidden_states).flatten(0, -2)
        return product(*gelu_round(mlp[:, :0], mlp), after, self.late).unflatten(0, hidden_states.shape[:-1])


class _RoundingSingleBlock(_SingleBlock):
    late = False

    def project(self, attended, mlp):
        if not rounds(self.proj_out):
            return self.proj_out(torch.cat([attended, functional.gelu(mlp, approximate="tanh")], dim=2))
        rows = gelu_round(attended.flatten(0, -2), mlp.flatten(0, -2))
        return product(*rows, self.proj_out, self.late).unflatten(0, attended.shape[:-1])


_ROUNDING = {FeedForward: _RoundingFeedForward, FluxSingleTransformerBlock: _RoundingSingleBlock}


@dataclass
class LateScales(Technique):
    """Scales and bias of the longest FP8 products applied by what adds them to the residual, not by the product.

    With a scale for each row and column cuBLASLt has one tile of 128 × 128 for Hopper; with one for all it has larger
    ones, which suit the few columns of a product that ends a feed-forward part. Apply it after the fused GELU, before
    compilation. Source: this study's own.
    """

    family, exact = FUSION, ROUNDING
    part = adapters.GELU
    name = label = "late scales"
    settings = {"late_scales": True}
    terms = {name: "FP8's scales multiplied in after the matrix product instead of within it"}

    def apply(self, pipe):
        """Tells the layers that `FusedGELU` has exchanged; returns the function that undoes it."""
        adapters.check(pipe.transformer, self.part)
        kinds = tuple(_ROUNDING.values())
        parts = [module for module in pipe.transformer.modules() if isinstance(module, kinds)]
        if not parts:
            raise Unavailable("needs TorchAO FP8 per row and the fused GELU before it, whose products it is about")
        with Changes(self.label) as changes:
            for part in parts:
                changes.put(part, "late", True)
            self.proof = {"scales": f"of {len(parts)} products applied after them"}
        return changes.take_back


# --- norm and rotary positions ----------------------------------------------------------------------------


@dataclass
class FusedRoPE(Technique):
    """RMS norm, rotary positions and the joining of text and image as one kernel for query and key.

    Compiled by PyTorch they are a reduction and further passes. Apply it before compilation; an attention kernel may
    be chosen before or after. Source: this study's own kernel.
    """

    family, exact = FUSION, ROUNDING
    part = adapters.PROCESSORS
    name = label = "fused RoPE"
    settings = {"fused_rope": True}

    def apply(self, pipe):
        """Exchanges the attention processors; returns the function that undoes it."""
        transformer = pipe.transformer
        if transformer.device.type == "cuda" and transformer.dtype != torch.bfloat16:
            raise Unavailable(f"needs the model in bfloat16, and it is in {transformer.dtype}")
        with Changes(self.label) as changes:
            count = fill(transformer, "_positions", _norm_rope, changes)
            if transformer.device.type == "cuda":  # the kernel reads two numbers of 16 bits as one
                layers.refuse_converting(pipe, changes)
            self.proof = {"norm and rope": f"of {count} layers in fluxnb::norm_rope"}
        return changes.take_back


def _norm_rope(x, norm, text, text_norm, rotary, rounded: bool = False):
    # offloaded by itself it has to be called; and the kernel has no gradient
    if norm.weight.device != x.device or (torch.is_grad_enabled() and x.requires_grad):
        return positions(x, norm, text, text_norm, rotary)
    return norm_rope(x, norm.weight, text, None if text is None else text_norm.weight, *rotary, norm.eps, rounded)


rounded_positions = functools.partial(_norm_rope, rounded=True)  # what FP8 attention puts in the same place


@torch.library.custom_op("fluxnb::norm_rope", mutates_args=())
def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    text: torch.Tensor | None,
    text_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    rounded: bool = False,
) -> torch.Tensor:
    """Queries or keys normalised and turned by their positions, the text's before the image's.

    Args:
        x: (batch, tokens, heads, width) as the projection gives them.
        weight: (width,) of the RMS norm over each head.
        text, text_weight: the same for the text's tokens, which stand first; or None.
        cos, sin: (all tokens, width) float32, of diffusers' FluxPosEmbed.
        eps: of the norm.
        rounded: to FP8 (e4m3), without a scale: what is normalised lies within its range.

    Returns:
        (batch, all tokens, heads, width), contiguous, in x's number format or in float8_e4m3fn.
    """
    normed = functional.rms_norm(x, weight.shape, weight, eps)
    if text is not None:
        normed = torch.cat([functional.rms_norm(text, text_weight.shape, text_weight, eps), normed], dim=1)
    turned: Any = apply_rotary_emb(normed, cast(Any, (cos, sin)), sequence_dim=1)  # diffusers' own annotations are off
    return to_fp8(turned).contiguous() if rounded else turned.contiguous()


@norm_rope.register_fake
def _(x, weight, text, text_weight, cos, sin, eps, rounded=False):
    n, tokens, heads, width = x.shape
    shape = (n, tokens + (0 if text is None else text.shape[1]), heads, width)
    return x.new_empty(shape, dtype=torch.float8_e4m3fn if rounded else x.dtype)


@norm_rope.register_kernel("cuda")
def _(x, weight, text, text_weight, cos, sin, eps, rounded=False):
    from fluxnb.techniques import triton_kernels

    return triton_kernels.norm_rope(x, weight, text, text_weight, cos, sin, eps, rounded)
