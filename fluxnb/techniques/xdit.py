"""xDiT (the package xfuser), to compare with: its attention over several GPUs, and its pipeline of blocks.

    USP          every rank has all weights and some of the tokens: Ulysses inside groups, ring attention between them
    PipeFusion   every rank has some of the blocks, and the image's patches pass through the ranks one behind the other;
                 a patch attends to what the patches behind it were a step ago, so the image isn't the same

Sources: Fang & Zhao, USP, 2024; Fang et al., PipeFusion, 2024. Both are techniques, applied on every rank alike.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput

from fluxnb import adapters
from fluxnb.errors import UserError
from fluxnb.families import PARALLEL
from fluxnb.technique import ANOTHER, ROUNDING, Changes, Technique, Unavailable, networks
from fluxnb.techniques import vae
from fluxnb.techniques.parallel import check_group, check_heads, degrees_label, divide
from fluxnb.techniques.processor import Exchange


@dataclass
class XDiT(Technique):
    """xDiT's attention (USP) in our division of the tokens. Source: xDiT; USP (Fang & Zhao, 2024).

    Args:
        ulysses, ring: degrees; their product is the number of ranks, and `ulysses` divides the heads.

    xDiT chooses the attention kernel; `proof` says which.
    """

    family, exact = PARALLEL, ROUNDING
    name = "xDiT"

    ulysses: int = 1
    ring: int = 1

    @property
    def label(self) -> str:
        return "xDiT " + degrees_label({"Ulysses": self.ulysses, "ring": self.ring})

    @property
    def settings(self) -> dict:
        return {"xdit_ulysses": self.ulysses, "xdit_ring": self.ring}

    def apply(self, pipe):
        """Divides from the next call on; returns the function that undoes it."""
        transformer, degree = pipe.transformer, self.ulysses * self.ring
        adapters.check(pipe.transformer, adapters.BLOCKS)
        check_group(degree, self.label)
        _check_xfuser(transformer)
        check_heads(transformer, self.ulysses)
        kernel, _ = _begun(pipe, ulysses_degree=self.ulysses, ring_degree=self.ring)
        from xfuser.model_executor.layers.usp import USP

        with Changes(self.label) as changes:
            count = divide(transformer, _Usp(_usp if self.ring > 1 else USP), changes)
            self.proof = {"divided": f"{count} attention layers over {degree} ranks", "attention": f"xDiT's {kernel}"}
        return changes.take_back


class _Usp(Exchange):
    """xDiT's exchange and its attention in one; there is nothing to begin."""

    def __init__(self, usp):
        self.usp = usp

    def end(self, attend, backend, query, key, value):
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return self.usp(query, key, value, combine_qkv_a2a=True).transpose(1, 2)


@torch.library.custom_op("fluxnb::usp", mutates_args=())
def _usp(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, combine_qkv_a2a: bool) -> torch.Tensor:
    """xDiT's attention, (batch, heads, tokens, width), as one operation: Dynamo (2.11) can't look into its ring."""
    from xfuser.model_executor.layers.usp import USP

    return USP(query, key, value, combine_qkv_a2a=combine_qkv_a2a).contiguous()


@_usp.register_fake
def _(query, key, value, combine_qkv_a2a):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@dataclass
class PipeFusion(Technique):
    """The blocks divided over the ranks, the image's patches in a pipeline through them. Source: Fang et al., 2024.

    Args:
        stages: ranks.
        warm_up: steps at the beginning in which the image stays whole.

    Only txt2img, and nothing else that acts in a step: xDiT has its own denoising loop. It can't be taken back.
    """

    family, exact = PARALLEL, ANOTHER
    name = "PipeFusion"

    stages: int
    warm_up: int = 1

    @property
    def label(self) -> str:
        whole = "" if self.warm_up == 1 else f", the image whole in the first {self.warm_up} steps"
        return f"PipeFusion {self.stages}{whole}"

    @property
    def settings(self) -> dict:
        return {"pipefusion": self.stages, "warm_up": self.warm_up}

    def apply(self, pipe):
        """Divides the blocks; what it returns raises, because every rank has given its other blocks away."""
        adapters.check(pipe.transformer, adapters.BLOCKS)
        check_group(self.stages, self.label)
        _check_xfuser(pipe.transformer)
        if type(pipe).__name__ != "FluxPipeline" or len(networks(pipe)) > 1:
            raise Unavailable("needs txt2img without ControlNet: xDiT has no PipeFusion for other FLUX pipelines")
        kernel, engine = _begun(pipe, pipefusion_parallel_degree=self.stages, warmup_steps=self.warm_up)
        from xfuser import xFuserFluxPipeline

        loop, last, kind = xFuserFluxPipeline(pipe, engine), self.stages - 1, type(pipe)

        @torch.no_grad()
        def call(own, prompt, *, width, height, latents, output_type="pil", **given):
            like = torch.empty(latents.shape, dtype=own.vae.dtype, device=own.vae.device)
            made = loop(prompt=prompt, width=width, height=height, latents=latents, output_type="latent", **given)
            latents = like if made is None else made.images.to(like).contiguous()  # the last stage alone has them
            dist.broadcast(latents, last)
            if output_type == "latent":
                return FluxPipelineOutput(images=latents)
            latents = own._unpack_latents(latents, height, width, own.vae_scale_factor)
            pixels = vae.decode(own, latents / own.vae.config.scaling_factor + own.vae.config.shift_factor)
            return FluxPipelineOutput(images=own.image_processor.postprocess(pixels, output_type=output_type))

        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
        self.proof = {"blocks": f"{blocks} on the first of {self.stages} ranks", "attention": f"xDiT's {kernel}"}

        def undo():
            raise UserError("PipeFusion can't be taken off a pipeline: load it again.")

        return undo


def _check_xfuser(transformer) -> None:
    if transformer.device.type != "cuda":
        raise Unavailable("needs GPUs: xDiT can't be imported without one")
    if missing := [name for name in ("xfuser", "distvae", "yunchang", "einops") if not importlib.util.find_spec(name)]:
        raise Unavailable(f"needs the packages {', '.join(missing)}: `pip install {' '.join(missing)}`")


_held: dict = {}


def _begun(pipe, **degrees):
    """xDiT's process groups and state for these degrees -> (the attention kernel it chose, its configuration).

    It has one of each for the whole process, so they are made anew only when something else is asked for.
    """
    from xfuser.config.args import xFuserArgs
    from xfuser.core.distributed import (
        get_runtime_state,
        init_distributed_environment,
        initialize_runtime_state,
        parallel_state,
    )

    key = (pipe.transformer.dtype, degrees)
    if _held.get("key") != key:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        init_distributed_environment()
        engine, _ = xFuserArgs(**degrees).create_config()
        engine.runtime_config.dtype = pipe.transformer.dtype
        initialize_runtime_state(pipe, engine)
        _held.update(key=key, engine=engine)
    return get_runtime_state().attention_backend.name, _held["engine"]
