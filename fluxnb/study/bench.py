"""Small FLUX pipelines of random weights, all alike, for what happens to a pipeline in use (`study.survival`)."""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch

from fluxnb import adapters
from fluxnb.models import embedded, pipelines

SIDE, TOKENS = 64, 16  # pixels of an image, tokens of a prompt
FLUX2 = "flux2-klein-tiny"
PROMPTS = ("a red ball", "a blue house at night", "two green trees")


@dataclass(frozen=True)
class Ask:
    """One call of a pipeline.

    Args:
        which: of the prompts, with its noise, picture and condition; a batch goes on from there.
        each: images of each prompt.
        true: the scale of true guidance.
        fewer: steps less than usual.
        picture: whether an IP-Adapter is given one, too.
        seen: tokens of a picture behind those of the prompt, as Redux makes them.
    """

    which: int = 0
    width: int = SIDE
    height: int = SIDE
    batch: int = 1
    each: int = 1
    true: float | None = None
    strength: float = 0.75
    fewer: int = 0
    picture: bool = False
    seen: int = 0


class Bench:
    """Fresh pipelines, what they are given, and the images that they make.

    Args:
        device, dtype: as in `pipelines.load`.
        steps: of an image.
    """

    def __init__(self, device: str | None = None, dtype: str | None = None, steps: int = 4):
        from diffusers import FluxTransformer2DModel

        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)  # which remarks on what isn't in a LoRA
        self.steps, self.pixels, self.texts = steps, False, False
        self._pipe = pipe = pipelines.load(embedded.NAME, dtype, device)
        pipe.transformer = random(FluxTransformer2DModel, pipe, num_layers=1, num_single_layers=1)
        self.device, self.dtype = pipe.device, pipe.transformer.dtype
        self._pipe2: Any = None
        self._nets: dict[int, torch.nn.Module] = {}
        with torch.no_grad():
            self.words = [pipe.encode_prompt(p, p, max_sequence_length=TOKENS)[:2] for p in PROMPTS]

    def fresh(self, whole: bool = False):
        """A pipeline of its own; encoders and VAE are shared unless what is tried touches them."""
        return self._of(self._pipe, whole)

    def flux2(self):
        """The same of FLUX.2."""
        if self._pipe2 is None:
            self._pipe2 = pipelines.load(FLUX2, str(self.dtype).removeprefix("torch."), str(self.device))
        return self._of(self._pipe2, False)

    def _of(self, pipe, whole: bool):
        own, parts = ["transformer", "scheduler"], pipe.components
        own += ["vae", "text_encoder", "text_encoder_2"] if whole or self.pixels or self.texts else []
        more = {"is_distilled": True} if pipe is self._pipe2 else {}
        made = type(pipe)(**parts | {name: copy.deepcopy(parts[name]) for name in own if name in parts}, **more)
        made.set_progress_bar_config(disable=True)
        return made

    def drawn(self, *shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
        """Random numbers on the device."""
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
        return made.to(self.device, self.dtype)

    def lora(self, seed: int) -> dict:
        """A LoRA's weights as a file has them, large enough to change the image."""
        config, made = self._pipe.transformer.config, {}
        inner = config.num_attention_heads * config.attention_head_dim
        shapes = {f"attn.{name}": (inner, inner) for name in ("to_q", "to_k", "to_v")}
        double = shapes | {"ff.net.0.proj": (inner, 4 * inner), "norm1.linear": (inner, 6 * inner)}
        single = shapes | {"proj_mlp": (inner, 4 * inner), "proj_out": (5 * inner, inner)}
        for blocks, layers in (("transformer_blocks", double), ("single_transformer_blocks", single)):
            for i, (name, (taken, given)) in enumerate(layers.items()):
                of = f"transformer.{blocks}.0.{name}"
                made[f"{of}.lora_A.weight"] = self.drawn(4, taken, seed=100 * seed + i, size=0.1)
                made[f"{of}.lora_B.weight"] = self.drawn(given, 4, seed=100 * seed + i + 50, size=0.1)
        return made

    def ip_adapter(self) -> dict:
        """An IP-Adapter's weights as a file has them."""
        config = self._pipe.transformer.config
        text, inner = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
        shapes = {"proj.weight": (4 * text, 8), "proj.bias": (4 * text,), "norm.weight": (text,), "norm.bias": (text,)}
        own = {
            f"0.to_{name}_ip.{kind}": (inner, text)[: 2 - (kind == "bias")]
            for name in "kv"
            for kind in ("weight", "bias")
        }
        return {
            "image_proj": {name: self.drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())},
            "ip_adapter": {
                name: self.drawn(*shape, seed=9 + i, size=0.1) for i, (name, shape) in enumerate(own.items())
            },
        }

    def controlnets(self, count: int) -> list:
        """So many ControlNets with a block of each kind."""
        from diffusers import FluxControlNetModel

        for seed in range(len(self._nets), count):
            self._nets[seed] = random(FluxControlNetModel, self._pipe, seed + 1, num_layers=1, num_single_layers=1)
        return [copy.deepcopy(self._nets[seed]) for seed in range(count)]

    def image(self, pipe, ask: Ask = Ask(), **more) -> torch.Tensor:
        """The latents that a call of the pipeline makes, or its pictures' bytes; on the CPU."""
        order = [(ask.which + i) % len(PROMPTS) for i in range(ask.batch)]
        takes, given = inspect.signature(type(pipe).__call__).parameters, dict(more)
        given |= {"width": ask.width, "height": ask.height, "num_inference_steps": self.steps - ask.fewer}
        given |= {"num_images_per_prompt": ask.each, "output_type": "pil" if self.pixels else "latent"}
        given["generator"] = [torch.Generator().manual_seed(i) for i in order for _ in range(ask.each)]
        given |= self._prompts(order, pipe, seen=ask.seen)
        if ask.true:
            others = self._prompts([(i + 1) % len(PROMPTS) for i in order], pipe, "negative_", ask.seen)
            given |= {**others, "true_cfg_scale": ask.true}
        pictures = torch.cat([self._picture(i, ask) for i in order])
        two = type(pipe).__name__ in adapters.FLUX2.pipelines  # which looks at pictures where it is given some
        given |= {"image": pictures} if "image" in takes and not two else {}
        given |= {"strength": ask.strength} if "strength" in takes else {}
        given |= {"max_area": ask.width * ask.height, "_auto_resize": False} if "max_area" in takes else {}
        given |= {"mask_image": (pictures[:, :1] > 0.5).float()} if "mask_image" in takes else {}
        given |= {"control_image": pictures} if "control_image" in takes else {}
        given |= {"controlnet_conditioning_scale": 0.7} if "controlnet_conditioning_scale" in takes else {}
        if hasattr(getattr(pipe, "controlnet", None), "nets"):
            given |= {"control_image": [pictures, 1 - pictures], "controlnet_conditioning_scale": [0.7, 0.4]}
        if ask.picture:
            given["ip_adapter_image_embeds"] = [self.drawn(1, 1, 8, seed=ask.which)]
            given["negative_ip_adapter_image_embeds"] = [self.drawn(1, 1, 8, seed=9)]
        images = pipe(**given).images
        if self.pixels:  # in the transformer's number format, which holds them and says how much is rounded
            images = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images])
            images = images.to(pipe.transformer.dtype)
        return images.detach().cpu().clone()

    def _picture(self, which: int, ask: Ask) -> torch.Tensor:
        generator = torch.Generator().manual_seed(which)
        return torch.rand(1, 3, ask.height, ask.width, generator=generator).to(self.device)

    def _prompts(self, order: list[int], pipe, kind: str = "", seen: int = 0) -> dict:
        if type(pipe).__name__ in adapters.FLUX2.pipelines:
            width = pipe.transformer.config.joint_attention_dim
            text = torch.cat([self.drawn(1, TOKENS, width, seed=i) for i in order])
            return {"prompt_embeds": text, "guidance_scale": 1.0}
        if self.texts and not seen:
            own = {f"{kind}prompt": [PROMPTS[i] for i in order]}
            return own if kind else {**own, "max_sequence_length": TOKENS}
        text, pooled = (torch.cat([self.words[i][j] for i in order]).to(pipe.transformer.dtype) for j in (0, 1))
        if seen:
            text = torch.cat([text, self.drawn(len(order), seen, text.shape[-1], seed=order[0]).to(text)], 1)
        return {f"{kind}prompt_embeds": text, f"{kind}pooled_prompt_embeds": pooled}


def random(kind, pipe, seed: int = 0, **size):
    """A network of the transformer's widths with weights that are drawn anew, the same every time."""
    config, takes = {**pipe.transformer.config, **size}, inspect.signature(kind.__init__).parameters
    made = kind(**{name: value for name, value in config.items() if name in takes}).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return made.to(pipe.transformer.device, pipe.transformer.dtype)
