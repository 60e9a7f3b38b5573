"""A FLUX pipeline small enough to try everything on: embedded encoders and VAE, a transformer of 2 + 2 blocks."""

import copy
import functools

import torch

from fluxnb import techniques as t
from fluxnb.cache import Cache, Interval, Taylor, first_block
from fluxnb.cache.para_attn import ParaAttention
from fluxnb.models import pipelines

MODEL = pipelines.describe("embedded")

# every technique that runs on a CPU, as users put it on
TECHNIQUES = {
    "FusedQKV": t.FusedQKV,
    "FusedQKV of single blocks": lambda: t.FusedQKV(double=False),
    "FusedGELU": t.FusedGELU,
    "FusedRoPE": t.FusedRoPE,
    "ModulationAhead": t.ModulationAhead,
    "Attention": lambda: t.Attention("math"),
    "FP8Attention": lambda: t.FP8Attention(simulated=True),
    "TorchAO int8": lambda: t.TorchAO("int8"),
    "TorchAO int8 weight-only": lambda: t.TorchAO("int8 weight-only"),
    "TorchAO fp8 weight-only": lambda: t.TorchAO("fp8 weight-only"),
    "GGUF": lambda: t.GGUF("Q8_0"),
    "NF4": lambda: t.BitsAndBytes("nf4"),
    "Quanto": lambda: t.Quanto("int8"),
    "SVDQuant": lambda: t.SimulatedSVDQuant(4),
    "ChannelsLast": t.ChannelsLast,
    "Sliced": t.Sliced,
    "Tiled": lambda: t.Tiled(64),
    "BytesOnDevice": t.BytesOnDevice,
    "NoHookSearch": t.NoHookSearch,
    "DPMSolver": t.DPMSolver,
    "Interval": lambda: Cache(Interval(2), Taylor(1)),
    "First Block Cache": lambda: first_block(0.1),
    "para-attn": lambda: ParaAttention(0.1),
    "Replicas": t.Replicas,
    "Progressive": lambda: t.Progressive(1),
}
COMPILED = {"Regional": t.Regional, "Whole": t.Whole, "TextEncoders": t.TextEncoders, "Compiled": t.Compiled}
QUANTIZED = ("TorchAO int8", "TorchAO int8 weight-only", "TorchAO fp8 weight-only", "GGUF", "NF4", "Quanto", "SVDQuant")
CACHES = ("Interval", "First Block Cache", "para-attn")

EVERY = ["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "proj_mlp", "proj_out", "net.0.proj", "net.2", "norm.linear",
         "norm1.linear"]  # fmt: skip


def load(blocks: int = 2):
    """A pipeline of its own, the same every time, with so many double blocks and so many single ones."""
    return copy.deepcopy(_loaded(blocks))  # a fifth of the time that loading takes


@functools.cache
def _loaded(blocks: int):
    from diffusers import FluxTransformer2DModel

    pipe = pipelines.load("embedded", "float32", "cpu")
    config = dict(pipe.transformer.config) | {"num_layers": blocks, "num_single_layers": blocks}
    pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in pipe.transformer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return pipe


def image(pipe, steps=4, seed=1, **options):
    """Latents."""
    options = {"model": MODEL, "steps": steps, "output_type": "latent"} | options
    return pipelines.generate(pipe, ["a red ball"], [seed], **options)


def lora(pipe, rank=4, targets=EVERY, seed=1) -> dict:
    """A LoRA's weights as a file has them, large enough to change the image."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = FluxTransformer2DModel.from_config(pipe.transformer.config)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    made = get_peft_model_state_dict(model)
    return {f"transformer.{k}": torch.randn(v.shape, generator=generator) * rank**-0.5 * 0.2 for k, v in made.items()}


def state(pipe, copied=True) -> dict:
    """Everything about a pipeline that a technique could leave behind: modules, classes, attributes, hooks, weights.

    To be compared at once it need not be copied.
    """
    found: dict = {"": _plain({k: v for k, v in vars(pipe).items() if k[0] != "_"}), "config": _plain(pipe.config)}
    for part, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            _look(network, part, found, set(), copied)
    found["image_processor"] = _plain(vars(pipe.image_processor))
    return found


def _look(module, name: str, found: dict, seen: set[int], copied: bool) -> None:
    """Adds what a module is, and those in it. (torch's own ways through a network take three times as long.)"""
    seen.add(id(module))
    own = dict(vars(module))
    tensors, buffers, children = own.pop("_parameters"), own.pop("_buffers"), own.pop("_modules")
    found[name] = (type(module), _plain(own), {k: id(child) for k, child in children.items()})
    if (processor := own.get("processor")) is not None:
        found[f"{name} processor"] = (type(processor), _plain(vars(processor)))
    for key, tensor in (*tensors.items(), *buffers.items()):
        if tensor is not None:
            value = tensor.detach() if type(tensor.data) is torch.Tensor else torch.empty(0)
            stride = value.stride()  # a copy's may be another
            found[f"{name}.{key} weight"] = (id(tensor), tensor.dtype, stride, value.clone() if copied else value)
    for key, child in children.items():
        if child is not None and id(child) not in seen:
            _look(child, f"{name}.{key}", found, seen, copied)


SIMPLE = (str, int, float, bool, type(None), tuple)


def _plain(own: dict) -> dict:
    """Attributes as what can be compared: containers by their contents, everything else by what it is."""
    return {k: v if type(v) in SIMPLE else _value(v) for k, v in own.items()}


def _value(value):
    if isinstance(value, dict):
        return _plain(value)
    return value if isinstance(value, SIMPLE) else id(value)


def differences(before: dict, pipe) -> list[str]:
    """The names of what isn't the same any more in a pipeline."""
    after = state(pipe, copied=False)
    return [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]


def _same(one, other) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == 4 and isinstance(one[3], torch.Tensor):
        return one[:3] == other[:3] and torch.equal(one[3], other[3])
    return one == other
