"""What diffusers does on the host for every image besides making it: it looks for hooks."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch

from fluxnb.families import HOST
from fluxnb.technique import IDENTICAL, Changes, Technique, Unavailable


@dataclass
class NoHookSearch(Technique):
    """Looks through the modules for hooks in a fraction of the time that diffusers takes.

    For every image diffusers goes through all modules of all networks, several times: is one offloaded, does one keep a
    state? FLUX has 2,000 modules, and the GPU is idle meanwhile. The picture is the same to the bit, and a hook that
    comes later is seen. Source: diffusers
    0.42, `DiffusionPipeline._execution_device`, `ModelMixin.device` and `CacheMixin._reset_stateful_cache`.
    """

    family, exact = HOST, IDENTICAL
    needed = ("components",)
    name = label = "no search for hooks"
    settings = {"hooks": "none"}
    terms = {
        name: "whether one of 2,000 modules is offloaded isn't looked for, for every image, in diffusers' slow way"
    }

    def apply(self, pipe):
        """Looks in diffusers' place; returns the function that undoes it. Unavailable if there is a hook."""
        networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        if any(map(_hooked, networks)):
            raise Unavailable("needs a pipeline without hooks: nothing offloaded, no cache of diffusers' own")
        _diffusers_own()
        with Changes(self.label) as changes:
            for network in networks:
                _known[network] = _known.get(network, 0) + 1
                changes.callback(_forget, network)
                if hasattr(network, "_reset_stateful_cache"):
                    # not a function of its own: of a copied pipeline it is the copy's
                    reset = functools.partial(_reset, network, network._reset_stateful_cache)
                    changes.put(network, "_reset_stateful_cache", reset)
            self.proof = {"without a hook": f"all of {sum(1 for n in networks for _ in n.modules()):,} modules"}
        return changes.take_back


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # network -> how often it is put on it


@functools.cache  # once for the process: of many pipelines it would be a chain
def _diffusers_own():
    """diffusers' function, from now on behind `_onload_device`."""
    from diffusers.hooks import group_offloading as offloading

    original, offloading._get_group_onload_device = offloading._get_group_onload_device, _onload_device
    return original


def _onload_device(module):
    """In place of diffusers' function, which looks through the whole module."""
    if _known.get(module) and not _hooked(module):
        raise ValueError("Group offloading is not enabled for the provided module.")
    return _diffusers_own()(module)


def _forget(network: torch.nn.Module) -> None:
    _known[network] -= 1


def _reset(network: torch.nn.Module, original, recurse: bool = True) -> None:
    if _hooked(network):
        original(recurse)


def _hooked(network: torch.nn.Module) -> bool:
    """Whether a module has a hook of diffusers' or accelerate's by now; a registry without hooks is none.

    Half a millisecond for 2,000 modules, where diffusers needs 15: it puts their names together as well.
    """
    waiting = [network]
    while waiting:
        own = vars(waiting.pop())
        registry = own.get("_diffusers_hook")
        if "_hf_hook" in own or (registry is not None and registry.hooks):
            return True
        waiting += filter(None, own["_modules"].values())
    return False
