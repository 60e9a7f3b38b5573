"""FLUX at full size with random weights: for latency and memory, never for quality."""

from __future__ import annotations

from typing import Any

import torch

from fluxnb.models import embedded

NAMES = ("flux-dev-random", "flux-schnell-random")

# black-forest-labs/FLUX.1-dev's configuration files, as far as they determine shapes
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
NUMBERS = 16.9e9  # weights of FLUX.1: transformer 11.9, T5 4.8, CLIP and VAE 0.2 thousand million


def guided(name: str) -> bool:
    """Whether guidance is an input of the transformer of one of `NAMES`: of FLUX.1-dev's, not of FLUX.1-schnell's."""
    return "dev" in name


def transformer(name: str) -> dict:
    """The configuration of the transformer of one of `NAMES`."""
    return {**TRANSFORMER, "guidance_embeds": guided(name)}


def load(name: str, dtype, device: str, seed: int):
    """FLUX at full size with random weights, made where they will be used, in seconds.

    Every matrix is normal with variance 1 / fan-in, which keeps activations near unit scale through all 57
    blocks. The tokenizers are the embedded model's: only the number of tokens matters here.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer = embedded.clip_tokenizer()
    clip_tokenizer.model_max_length = 77
    clip_config = CLIPTextConfig(
        **CLIP_L,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts: dict[str, Any] = {
                "vae": AutoencoderKL(**VAE),
                "text_encoder": CLIPTextModel(clip_config),
                "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
                "transformer": FluxTransformer2DModel(**transformer(name)),
            }
    finally:
        torch.set_default_dtype(default)
    for part in parts.values():
        randomize(part.to(dtype).eval(), seed)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            **(embedded.SCHEDULER if guided(name) else embedded.SCHNELL_SCHEDULER)
        ),
        tokenizer=clip_tokenizer,
        tokenizer_2=embedded.t5_tokenizer(),
        **parts,
    )


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int) -> None:
    """Seeded weights of a sane scale: matrices normal with variance 1 / fan-in, biases 0, norms 1."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, weight in module.named_parameters():
        if weight.ndim >= 2:
            weight.normal_(0, (weight.shape[0] / weight.numel()) ** 0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
