"""What diffusers does on the host for every image besides making it: it looks for hooks."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass

import torch

from fluxnb.families import HOST
from fluxnb.technique import IDENTICAL, Technique, Unavailable, attribute


@dataclass
class NoHookSearch(Technique):
    """Tells diffusers once that no network is offloaded, where it would look for every image.

    For every image diffusers goes through all modules of all networks, several times: is one offloaded, does one keep a
    state? FLUX has 2,000 modules, and the GPU is idle meanwhile. The picture is the same to the bit. Source: diffusers
    0.42, `DiffusionPipeline._execution_device`, `ModelMixin.device` and `CacheMixin._reset_stateful_cache`.
    """

    family, exact = HOST, IDENTICAL
    name = label = "no search for hooks"
    settings = {"hooks": "none"}
    terms = {name: "diffusers no longer looks, for every image, whether one of 2,000 modules is offloaded"}

    def apply(self, pipe):
        """Looks once; returns the function that lets diffusers look again. Unavailable if there is a hook."""
        from diffusers.hooks import group_offloading as offloading

        networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        modules = [module for network in networks for module in network.modules()]
        if any(_hooked(module) for module in modules):
            raise Unavailable("needs a pipeline without hooks: nothing offloaded, no cache of diffusers' own")
        known, original = weakref.WeakSet(networks), offloading._get_group_onload_device

        def onload_device(module):
            if module in known:
                raise ValueError("Group offloading is not enabled for the provided module.")
            return original(module)

        with contextlib.ExitStack() as stack:
            stack.enter_context(attribute(offloading, "_get_group_onload_device", onload_device))
            for network in networks:
                if hasattr(network, "_reset_stateful_cache"):
                    stack.enter_context(attribute(network, "_reset_stateful_cache", lambda recurse=True: None))
            self.proof = {"without a hook": f"all of {len(modules):,} modules"}
            return stack.pop_all().close


def _hooked(module: torch.nn.Module) -> bool:
    """Whether diffusers or accelerate has put a hook on a module; a registry without hooks is none."""
    registry = vars(module).get("_diffusers_hook")
    return "_hf_hook" in vars(module) or bool(registry and registry.hooks)
