"""What may stand in the way of a technique that reads or exchanges layers: a LoRA, hooks, another format."""

from __future__ import annotations

import contextlib
import functools
import importlib
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from fluxnb.errors import UserError
from fluxnb.technique import Changes, Unavailable, networks

LOADING = ("load_lora_adapter", "add_adapter")
_OPTIONS = ("use_dora", "lora_bias", "modules_to_save")  # of a LoRA, that not every layer has
ADAPTERS = ("LORA", *_OPTIONS, "LOHA", "LOKR", "IA3", "OFT", "BOFT")  # peft's types and options that were tried
_METHODS = (
    *LOADING, "set_adapter", "set_adapters", "enable_adapters", "disable_adapters", "enable_lora", "disable_lora",
    "delete_adapters", "delete_adapter", "fuse_lora", "unfuse_lora", "unload_lora",
)  # fmt: skip


def plain(layer: nn.Module) -> bool:
    """Whether it is an ordinary linear layer with an ordinary weight."""
    weight = getattr(layer, "weight", None)
    return type(layer) is nn.Linear and type(weight.data) is torch.Tensor and weight.is_floating_point()


def blocks(network) -> list[nn.Module]:
    """A network's blocks of both kinds. Raises Unavailable where it isn't made of them."""
    lists = [getattr(network, name, None) for name in ("transformer_blocks", "single_transformer_blocks")]
    if None in lists:
        raise Unavailable(f"needs a transformer of blocks as FLUX has them, and this is {type(network).__name__}")
    return [block for blocks in lists for block in blocks]


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


def check_whole(network) -> None:
    """Raises Unavailable if hooks offload or cast single layers or blocks of a network."""
    if any(hooked(module) for module in network.modules() if module is not network):
        raise Unavailable("needs layers that nothing offloads or casts in groups or one by one: offload whole models")


def check_groups(networks: list) -> None:
    """Raises Unavailable if diffusers offloads networks in groups, whose tensors it knows by what they were then."""
    for module in (module for network in networks for module in network.modules()):
        if "group_offloading" in getattr(vars(module).get("_diffusers_hook"), "hooks", ()):
            raise Unavailable("needs layers that aren't offloaded in groups yet: offload them afterwards")


def refuse_loras(pipe, changes: Changes) -> None:
    """A LoRA can't be loaded meanwhile: a sentence says so before anything changes."""
    why = (
        f"A LoRA can't be loaded while {changes.name} is on, because the layers that it is for aren't there: take "
        f"{changes.name} off and load it first."
    )
    changes.refuse(pipe.transformer, LOADING, why)
    _watch_loading(pipe.transformer, why, changes)
    _watch_peft([pipe.transformer], changes, lambda config: why)


def check_adapters(pipe, changes: Changes, first: Collection[str], later: Collection[str]) -> None:
    """What of peft's goes around layers; other kinds are refused. Both are of `ADAPTERS`, those that were tried.

    Args:
        first: kinds that may be there.
        later: kinds that may come.
    """

    name = changes.name  # peft keeps what looks at it: not the changes, which keep the originals

    def strange(config, kinds) -> str | None:
        given = [option for option in _OPTIONS if getattr(config, option, None)]
        return next((kind for kind in (config.peft_type.value, *given) if kind not in kinds), None)

    def refused(config) -> str | None:
        if (kind := strange(config, later)) is None:
            return None
        can = "can't go" if kind in ADAPTERS else "wasn't tried"
        return f"peft's {kind} {can} around layers that are {name}: take that off and load it first."

    for network in networks(pipe):
        for config in getattr(network, "peft_config", {}).values():
            if (kind := strange(config, first)) is not None:
                tried = "can go" if kind in ADAPTERS else "were tried"
                raise Unavailable(f"needs adapters of peft's that {tried} around its layers, and finds {kind}")
    _watch_peft(networks(pipe), changes, refused)


def _watch_loading(network, why: str, changes: Changes) -> None:
    """Whichever pipeline loads a LoRA: diffusers changes the network's shapes before it looks at its layers."""
    from diffusers.loaders import FluxLoraLoaderMixin

    def check(*_, **__):
        raise UserError(why)

    _watch(FluxLoraLoaderMixin, "load_lora_weights", [network], check, changes, lambda pipe, *_, **__: pipe.transformer)


def _watch_peft(networks: list, changes: Changes, refused: Callable[[Any], str | None]) -> None:
    """`refused(config)` says why an adapter of peft's can't go into networks, whichever way it comes."""

    def check(tuner, model, adapter_name, *args, **kwargs):
        if why := refused(tuner.peft_config[adapter_name]):
            if not hasattr(model, "peft_config"):
                vars(model).pop("_hf_peft_config_loaded", None)  # diffusers says so too early
            raise UserError(why)

    with contextlib.suppress(ImportError):
        from peft.tuners.tuners_utils import BaseTuner

        _watch(BaseTuner, "inject_adapter", networks, check, changes)


_WATCHED: dict[tuple[type, str], weakref.WeakKeyDictionary] = {}  # method of a class -> network -> its checks


def _watch(
    kind: type, name: str, networks: list, check: Callable, changes: Changes, of=lambda _, module, *__, **___: module
) -> None:
    """`check` comes before a method, with its arguments; `of` says of which module, which has to do with the networks.

    The method is exchanged once for the whole process: what is put on a thousand pipelines, and never taken off, would
    make a chain as long. `check` mustn't hold a network.
    """
    if (kind, name) not in _WATCHED:
        watched = _WATCHED[kind, name] = weakref.WeakKeyDictionary()
        setattr(kind, name, _checked(getattr(kind, name), watched, of))
    for network in networks:
        checks = _WATCHED[kind, name].setdefault(network, [])
        checks.append(check)
        changes.callback(checks.remove, check)


def _checked(original: Callable, watched: weakref.WeakKeyDictionary, of: Callable) -> Callable:
    @functools.wraps(original)
    def method(*args, **kwargs):
        module = of(*args, **kwargs)
        for network, checks in list(watched.items()):
            if checks and module is not None and (_inside(network, module) or _inside(module, network)):
                for check in list(checks):
                    check(*args, **kwargs)
        return original(*args, **kwargs)

    return method


def _inside(part: nn.Module, whole: nn.Module) -> bool:
    return any(module is part for module in whole.modules())


def refuse_state(networks: list, layers: Iterable[nn.Module], changes: Changes) -> None:
    """Weights can't be loaded into layers that aren't the model's own, but a LoRA's can go beside them."""
    why = f"Weights can't be loaded while {changes.name} is on: take that off, load them, and put it on again."
    theirs = set(layers)
    for network in networks:
        own = {name.replace(".base_layer", "") for name, module in network.named_modules() if module in theirs}
        changes.put(network, "load_state_dict", functools.partial(_load_state, network.load_state_dict, own, why))


def _load_state(original, own: set[str], why: str, state_dict, *args, **kwargs):
    if any(name.rpartition(".")[0].replace(".base_layer", "") in own for name in state_dict):
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
    refused = functools.partial(_check_floats, f"Weights can't be trained {doing}.")
    _watch(nn.Module, "requires_grad_", networks(pipe), refused, changes, lambda module, *_, **__: module)
    why = f"What is quantized can't be saved {doing}: take that off, save it, and quantize what is loaded again."
    for owner in (pipe, *networks(pipe)):
        changes.refuse(owner, ("save_pretrained",), why)


def _check_floats(why: str, module, requires_grad: bool = True) -> None:
    if requires_grad and not all(parameter.is_floating_point() for parameter in module.parameters()):
        raise UserError(why)


def refuse_sequential(pipe, changes: Changes) -> None:
    """Layers that accelerate can't take apart say so before it has begun, whichever way it comes."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    why = (
        f"Layers can't be offloaded one by one while {changes.name} is on: offload whole models "
        "(enable_model_cpu_offload), or take it off."
    )
    changes.refuse(pipe, ("enable_sequential_cpu_offload",), why)

    def check(hook, module):
        hooks = getattr(hook, "hooks", (hook,))
        if any(isinstance(one, AlignDevicesHook) for one in hooks):
            own = vars(module)
            if "_hf_hook" not in own:  # as it was before accelerate began
                own.pop("_old_forward", None)
                if len(hooks) > 1:
                    importlib.import_module("accelerate.hooks").add_hook_to_module(module, hooks[0])
            raise UserError(why)

    for kind in (AlignDevicesHook, SequentialHook):
        _watch(kind, "init_hook", networks(pipe), check, changes)


def refuse_groups(pipe, changes: Changes) -> None:
    """Layers whose tensors diffusers can't exchange for moved or cast ones say so first, whichever way it comes.

    It sets their `data`, which leaves what a package keeps inside a tensor of its own where that was.
    """
    from diffusers.hooks.group_offloading import GroupOffloadingHook
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    def check(why, hook, module):
        if not module._diffusers_hook.hooks:  # as it was before diffusers began
            del module._diffusers_hook
        raise UserError(why)

    for kind, method, what, instead in (
        (GroupOffloadingHook, "enable_group_offload", "offloaded in groups", "offload whole models "
         "(enable_model_cpu_offload)"),
        (LayerwiseCastingHook, "enable_layerwise_casting", "cast one by one", "leave them as they are"),
    ):  # fmt: skip
        why = f"Layers can't be {what} while {changes.name} is on: {instead}, or take it off."
        for owner in (pipe, *networks(pipe)):
            changes.refuse(owner, (method,), why)
        _watch(kind, "initialize_hook", networks(pipe), functools.partial(check, why), changes)


def refuse_copying(pipe, changes: Changes) -> None:
    """Layers whose package can't copy or pickle them say so."""
    why = f"Layers that are {changes.name} can't be copied or pickled: take that off, copy, and put it on each."
    for network in networks(pipe):
        for owner in (network, *blocks(network)):
            changes.refuse(owner, ("__reduce_ex__",), why)


def refuse_converting(pipe, changes: Changes) -> None:
    """What can't change its number format says so before a part of the pipeline has changed its own."""
    kind = pipe.transformer.dtype
    why = (
        f"A pipeline can't be converted from {kind} while {changes.name} is on it: take that off, convert, and put it "
        "on again."
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

    for owner, name in (*((network, name) for name in _METHODS), (pipe, "unfuse_lora")):
        if hasattr(owner, name):
            changes.put(owner, name, functools.partial(watched, getattr(owner, name)))
