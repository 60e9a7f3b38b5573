"""Use cases of FLUX.1 that no model here is trained for: their pipelines, for time and memory.

The weights are the given model's. What it lacks is drawn, of the published sizes: the embedding of Fill's and Control's
wider latents, an IP-Adapter, and the tokens that Redux makes of a picture. Who makes those, SigLIP and CLIP, isn't run.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from fluxnb.models.use_cases import CONTROL, FILL, IP_ADAPTER, KONTEXT, REDUX, TIME_ONLY

REDUX_TOKENS = 729  # SigLIP's of a picture
_CHANNELS = {FILL: 6, CONTROL: 2}  # times as many as the latents have: Fill's masked picture and mask, a condition
_EMBEDDING = 768  # CLIP's


def tokens(case: str, model_tokens: int, width: int, height: int) -> int:
    """Tokens of a step, the text's and all pictures'."""
    image = width * height // 256
    return model_tokens + image * (2 if case == KONTEXT else 1) + (REDUX_TOKENS if case == REDUX else 0)


def made(pipe, case: str):
    """The pipeline of a use case with the same components; an IP-Adapter is put into the pipeline itself."""
    from fluxnb.models.pipelines import of_kind

    if case == IP_ADAPTER:
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)  # which remarks on what isn't in it
        pipe.load_ip_adapter(
            _ip_adapter(pipe.transformer), weight_name="", image_encoder_pretrained_model_name_or_path=None
        )
        return pipe
    other = of_kind(pipe, TIME_ONLY[case])
    if case in _CHANNELS:
        other.transformer = _wider(pipe.transformer, _CHANNELS[case])
    return other


def given(pipe, case: str, prompts: list[str], model_tokens: int, images: list, masks: list) -> dict[str, Any]:
    """What its call is given besides the usual: pictures, or what is made of one, and the prompt."""
    if case == REDUX:
        text, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=model_tokens)
        seen = torch.ones((len(prompts), REDUX_TOKENS, text.shape[-1])).to(text)
        return {"prompt_embeds": torch.cat([text, seen], 1), "pooled_prompt_embeds": pooled}
    own: dict[str, Any] = {"prompt": prompts}
    if case == KONTEXT:  # of the size that is asked for
        width, height = images[0].size
        own |= {"image": images, "max_area": width * height, "_auto_resize": False}
    if case == FILL:
        own |= {"image": images, "mask_image": masks}
    if case == CONTROL:
        own |= {"control_image": images}
    if case == IP_ADAPTER:
        one = torch.ones(len(prompts), 1, _EMBEDDING, device=pipe._execution_device, dtype=pipe.transformer.dtype)
        own |= {"ip_adapter_image_embeds": [one], "negative_ip_adapter_image_embeds": [one]}  # both, or CLIP is run
    return own


def _wider(transformer, times: int):
    """The transformer with another first layer; all others are the same."""
    from diffusers.configuration_utils import FrozenDict

    first, config = transformer.x_embedder, transformer.config
    made = copy.copy(transformer)
    made._modules = dict(transformer._modules)
    made.x_embedder = torch.nn.Linear(times * first.in_features, first.out_features).to(first.weight)
    channels = {"in_channels": times * config.in_channels, "out_channels": config.in_channels}
    made._internal_dict = FrozenDict({**config, **channels})
    return made


def _ip_adapter(transformer) -> dict[str, dict[str, torch.Tensor]]:
    """Drawn weights of an IP-Adapter as a file has them."""
    config, weight = transformer.config, transformer.x_embedder.weight
    text, inner = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
    seen = 16 if text == 4096 else 4  # tokens of a picture, as diffusers finds them
    shapes = {"proj.weight": (seen * text, _EMBEDDING), "proj.bias": (seen * text,)}
    shapes |= {"norm.weight": (text,), "norm.bias": (text,)}
    own = {
        f"{i}.to_{name}_ip.{kind}": (inner, text)[: 2 - (kind == "bias")]
        for i in range(config.num_layers)
        for name in "kv"
        for kind in ("weight", "bias")
    }
    draw = lambda shape: torch.randn(shape, device=weight.device).to(weight.dtype) * 0.02  # noqa: E731
    return {
        "image_proj": {name: draw(shape) for name, shape in shapes.items()},
        "ip_adapter": {name: draw(shape) for name, shape in own.items()},
    }
