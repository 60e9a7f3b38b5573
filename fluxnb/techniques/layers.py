"""What may stand in the way of a technique that reads or exchanges layers: a LoRA, hooks, another format."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fluxnb.errors import UserError
from fluxnb.technique import Changes, Unavailable, networks

LOADING = ("load_lora_adapter", "add_adapter")
_ADAPTERS = (
    *LOADING, "set_adapter", "set_adapters", "enable_adapters", "disable_adapters", "enable_lora", "disable_lora",
    "delete_adapters", "delete_adapter", "fuse_lora", "unfuse_lora", "unload_lora",
)  # fmt: skip


def plain(layer: nn.Module) -> bool:
    """Whether it is an ordinary linear layer with an ordinary weight."""
    weight = getattr(layer, "weight", None)
    return type(layer) is nn.Linear and type(weight.data) is torch.Tensor and weight.is_floating_point()


def adapted(layer: nn.Module) -> bool:
    """Whether it is peft's: a layer with LoRAs around it, which have a weight to show as well."""
    return hasattr(layer, "base_layer")


def hooked(module: nn.Module) -> bool:
    """Whether a hook of accelerate's or diffusers' offloads or casts it by itself."""
    own = vars(module)
    registry = own.get("_diffusers_hook")
    return "_hf_hook" in own or bool(registry is not None and registry.hooks)


def check(layers: list[nn.Module], lora: bool = False, other: str = "") -> None:
    """Raises Unavailable unless layers are plain.

    Args:
        lora: they may have a LoRA around them.
        other: format that they may have instead, for the message.
    """
    for layer in layers:
        if adapted(layer) and not lora:
            raise Unavailable(
                "needs layers without a LoRA: make it part of the weights (pipe.fuse_lora(), then "
                "pipe.unload_lora_weights()), or take it off"
            )
        base: Any = layer.base_layer if adapted(layer) else layer
        if hooked(layer) or hooked(base) or (base.weight is not None and base.weight.is_meta):
            raise Unavailable(
                "needs layers that nothing offloads or casts one by one (sequential or leaf-level offloading, "
                "layerwise casting): offload whole models or blocks, and afterwards"
            )
        if not plain(base):
            raise Unavailable(
                f"needs unquantized matrices{other and f' or {other}'}, and finds {type(base).__name__} of "
                f"{type(base.weight.data).__name__}"
            )


def refuse_loras(pipe, changes: Changes) -> None:
    """A LoRA can't be loaded meanwhile: a sentence says so before anything changes."""
    why = (
        f"A LoRA can't be loaded while {changes.name} is on, because the layers that it is for aren't there: take "
        f"{changes.name} off and load it first."
    )
    changes.refuse(pipe, ("load_lora_weights",), why)
    changes.refuse(pipe.transformer, LOADING, why)
    with contextlib.suppress(ImportError):
        from peft.tuners.tuners_utils import BaseTuner

        changes.put(BaseTuner, "inject_adapter", _injecting(BaseTuner.inject_adapter, pipe, why, changes), yields=True)


def _injecting(original, pipe, why: str, changes: Changes):
    """peft's own way into a model, which refuses models that have a pipeline's transformer in them."""
    refusing = weakref.WeakSet([pipe.transformer])
    changes.callback(refusing.clear)  # what came later may go on calling this

    @functools.wraps(original)
    def inject_adapter(tuner, model, *args, **kwargs):
        if refusing and any(module in refusing for module in model.modules()):
            raise UserError(why)
        return original(tuner, model, *args, **kwargs)

    return inject_adapter


def refuse_state(networks: list, changes: Changes) -> None:
    """Weights can't be loaded into layers that aren't the model's own, but a LoRA's can go beside them."""
    why = f"Weights can't be loaded while {changes.name} is on: take that off, load them, and put it on again."
    for network in networks:
        own = {name.replace(".base_layer.", ".") for name in network.state_dict() if ".lora_" not in name}
        checked = functools.partial(_load_state, network.load_state_dict, own, why)
        changes.put(network, "load_state_dict", checked)


def _load_state(original, own: set[str], why: str, state_dict, *args, **kwargs):
    if any(name.replace(".base_layer.", ".") in own for name in state_dict):
        raise UserError(why)
    return original(state_dict, *args, **kwargs)


def refuse_merging(pipe, changes: Changes) -> None:
    """Quantized weights can't take a LoRA up, and can't be saved as the model's: a sentence says so."""
    doing = f"while its layers are {changes.name}"
    why = f"A LoRA can't become part of the weights, or be taken out of them, {doing}: take that off first."
    changes.refuse(pipe, ("fuse_lora", "unfuse_lora"), why)
    fusing = f"Projections can't be fused or separated {doing}: take that off first."
    for network in networks(pipe):
        changes.refuse(network, ("fuse_lora", "unfuse_lora"), why)
        changes.refuse(network, ("fuse_qkv_projections", "unfuse_qkv_projections"), fusing)
    why = f"What is quantized can't be saved {doing}: take that off, save it, and quantize what is loaded again."
    for owner in (pipe, *networks(pipe)):
        changes.refuse(owner, ("save_pretrained",), why)


def refuse_sequential(pipe, changes: Changes) -> None:
    """Layers that accelerate can't take apart say so before it has begun."""
    why = (
        f"Layers can't be offloaded one by one while {changes.name} is on: offload whole models "
        "(enable_model_cpu_offload), or take it off."
    )
    changes.refuse(pipe, ("enable_sequential_cpu_offload",), why)


def refuse_copying(pipe, changes: Changes) -> None:
    """Layers whose package can't copy or pickle them say so."""
    why = f"Layers that are {changes.name} can't be copied or pickled: take that off, copy, and put it on each."
    for network in networks(pipe):
        for owner in (network, *network.transformer_blocks, *network.single_transformer_blocks):
            changes.refuse(owner, ("__reduce_ex__",), why)


def refuse_converting(pipe, changes: Changes) -> None:
    """Layers that can't change their number format say so before a part of the pipeline has changed its own."""
    kind = pipe.transformer.dtype
    why = (
        f"A pipeline can't be converted from {kind} while its layers are {changes.name}: take that off, convert, and "
        "put it on again."
    )

    for owner in (pipe, *networks(pipe)):  # accelerate takes it away
        changes.put(owner, "to", functools.partial(_in_format, kind, why, owner.to), yields=True)
        changes.refuse(owner, ("half", "float", "double", "bfloat16"), why)


def _in_format(kind: torch.dtype, why: str, original: Callable, *args, **kwargs):
    if any(isinstance(given, torch.dtype) and given != kind for given in (*args, *kwargs.values())):
        raise UserError(why)
    return original(*args, **kwargs)


def watch_loras(pipe, network, changes: Changes, then: Callable[[], None]) -> None:
    """`then` follows whatever is done to the LoRAs of one of a pipeline's networks."""

    def watched(original, *args, **kwargs):
        try:
            return original(*args, **kwargs)
        finally:
            then()

    for owner, name in (*((network, name) for name in _ADAPTERS), (pipe, "unfuse_lora")):
        if hasattr(owner, name):
            changes.put(owner, name, functools.partial(watched, getattr(owner, name)))
