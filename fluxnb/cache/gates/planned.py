"""A planned mask: which steps are computed was chosen from the uncached steps of the very model."""

from __future__ import annotations

import numpy as np
import torch

from fluxnb import notebooks as nb
from fluxnb.cache.gates.schedule import Schedule
from fluxnb.errors import UserError


class Planned(Schedule):
    """The mask of a plan, on the model that it was made for. Source: this study's own."""

    terms = {
        "planned": "which steps are computed was chosen from the model's uncached steps",
        "planned weights": "a reused step adds a weighted sum of the last computed ones, fitted to the model",
    }
    notebook = nb.PEERS

    def __init__(self, mask: str, signature: tuple[float, ...], first_block: bool = False, **options):
        super().__init__(mask, first_block, origin="planned", **options)
        self.signature = signature

    def new_state(self, total=None):
        if total not in (None, len(self.mask)):
            raise UserError(
                f"This plan has {len(self.mask)} steps but the generation has {total}: ask for {len(self.mask)}, or "
                f"make one of {total} with `python -m fluxnb plan --model … --steps {total}`."
            )
        return {}

    def meet(self, pipe):
        found = signature(pipe.transformer)
        if found is not None and not np.allclose(found, self.signature, rtol=0.1, atol=2e-3):  # as far as 8 bits round
            raise UserError(
                "This plan was made for another model: make one for this with `python -m fluxnb plan --model …`, and "
                "give its file as `plan=`."
            )


def signature(transformer) -> tuple[float, ...] | None:
    """Sixteen weights of its last layer; None where they are offloaded, divided over ranks or packed in fewer bits."""
    weight = getattr(transformer.proj_out, "base_layer", transformer.proj_out).weight  # a LoRA goes around it
    if weight.is_meta or type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        return None
    flat = weight.detach().flatten()
    return tuple(float(f"{value:.4g}") for value in flat[:: len(flat) // 16][:16].float().tolist())
