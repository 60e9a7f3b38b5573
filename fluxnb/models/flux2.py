"""FLUX.2 with random weights, of the published sizes and of a tiny one: for latency and memory, never for quality.

Importing this imports no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fluxnb.adapters import FLUX2
from fluxnb.models import embedded

TOKENS = 512  # of a prompt, in every size
STEPS, DISTILLED_STEPS = 50, 4  # of an image, as published


@dataclass(frozen=True)
class Size:
    """A published configuration, as far as it determines shapes; what isn't named is diffusers' default.

    As other projects' sources give them; klein's heads and its text encoder's sizes weren't seen in the hub's files.

    Args:
        transformer: of Flux2Transformer2DModel.
        numbers: weights in all.
        steps: of an image, as published.
        encoder: of Qwen3ForCausalLM. None: FLUX.2-dev's Mistral Small 3 has 24 thousand million weights, which don't
            fit beside the transformer's 32 on a card of 80 GB; a table of embeddings stands for it, so a prompt's
            encoding isn't in the latency, and what the transformer is given has the right shape.
        distilled: no guidance at all; else the transformer takes it, or runs twice a step (FLUX.2-klein-base).
        vae: of AutoencoderKLFlux2, whose defaults are the published ones.
    """

    transformer: dict[str, Any]
    numbers: float
    steps: int
    encoder: dict[str, Any] | None = None
    distilled: bool = False
    vae: dict[str, Any] = field(default_factory=dict)

    @property
    def klein(self) -> bool:
        return self.encoder is not None

    @property
    def pipeline(self) -> str:
        """Of diffusers."""
        return FLUX2.pipelines[self.klein]

    @property
    def config(self) -> dict:
        """The transformer's, with what diffusers needs to know of the guidance."""
        return {**self.transformer, "guidance_embeds": not self.klein}


DEV: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 3 * 5120,
}
KLEIN = DEV | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
_TINY = DEV | {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 32,
               "axes_dims_rope": (8, 8, 8, 8), "joint_attention_dim": 3 * 32}  # fmt: skip
_TINY_QWEN3 = QWEN3_4B | {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
                          "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 28}  # fmt: skip
_TINY_VAE = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "sample_size": 64}
SIZES = {
    "flux2-klein-random": Size(KLEIN, 8.0e9, DISTILLED_STEPS, QWEN3_4B, distilled=True),
    "flux2-klein-base-random": Size(KLEIN, 8.0e9, STEPS, QWEN3_4B),
    "flux2-dev-random": Size(DEV, 33e9, STEPS),
    "flux2-klein-tiny": Size(_TINY, 1e6, 4, _TINY_QWEN3, distilled=True, vae=_TINY_VAE),
    "flux2-klein-base-tiny": Size(_TINY, 1e6, 8, _TINY_QWEN3, vae=_TINY_VAE),
    "flux2-dev-tiny": Size(_TINY, 1e6, 8, vae=_TINY_VAE),
}
NAMES = tuple(SIZES)
_TEMPLATE = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"


def usual_steps(distilled: bool) -> int:
    """Steps of an image, as published."""
    return DISTILLED_STEPS if distilled else STEPS


def _token_table(tokens: int, width: int):
    """In place of a text encoder: every hidden state is the tokens' embedding."""
    import torch

    class TokenTable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(tokens, width)

        dtype = property(lambda self: self.table.weight.dtype)
        device = property(lambda self: self.table.weight.device)

        def forward(self, input_ids, **_):
            return SimpleNamespace(hidden_states=(self.table(input_ids),) * 31)  # the pipeline takes 10, 20 and 30

    return TokenTable()


def load(name: str, dtype, device: str, seed: int):
    """The pipeline of one of `NAMES`, made where it will be used. The tokenizer is the embedded model's."""
    import diffusers
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from fluxnb.models.full_size import randomize

    size, tokenizer = SIZES[name], embedded.t5_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = diffusers.Flux2Transformer2DModel(**size.config)
            parts: dict[str, Any] = {
                "vae": diffusers.AutoencoderKLFlux2(**size.vae),
                "transformer": transformer,
                "text_encoder": _token_table(len(tokenizer), size.transformer["joint_attention_dim"] // 3)
                if size.encoder is None
                else Qwen3ForCausalLM(Qwen3Config(**size.encoder, pad_token_id=tokenizer.pad_token_id)),
            }
    finally:
        torch.set_default_dtype(default)
    for part in parts.values():
        randomize(part.to(dtype).eval(), seed)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**embedded.SCHEDULER)
    more = {"is_distilled": size.distilled} if size.klein else {}
    return getattr(diffusers, size.pipeline)(scheduler=scheduler, tokenizer=tokenizer, **parts, **more)


def noise(pipe, seeds: list[int], width: int, height: int):
    """Initial latents (n, channels, height / 16, width / 16) as FLUX.2's pipelines take them."""
    import torch

    shape = (1, pipe.transformer.config.in_channels, *(side // (2 * pipe.vae_scale_factor) for side in (height, width)))
    drawn = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return drawn.to(pipe._execution_device, pipe.transformer.dtype)


def decoded(pipe, latents, width: int, height: int):
    """Pixels of latents (n, tokens, channels) as the loop has them."""
    rows, columns = (side // (2 * pipe.vae_scale_factor) for side in (height, width))
    latents, norm = latents.unflatten(1, (rows, columns)).permute(0, 3, 1, 2), pipe.vae.bn
    deviation = (norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).sqrt()
    latents = latents * deviation.to(latents) + norm.running_mean.view(1, -1, 1, 1).to(latents)
    return pipe.vae.decode(pipe._unpatchify_latents(latents).to(pipe.vae.dtype)).sample
