"""The modulations of all steps at once: FLUX's largest matrices read once per image instead of once per step.

Every block scales and shifts its inputs by numbers that depend on the timestep, the guidance and the pooled prompt:
one row times a matrix, 3.2 billion parameters in all at FLUX.1-dev's size, read from memory in every step and met by a
single row. The timesteps are known before the first step, so the rows of all steps go through each matrix together, in
the time that one takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from fluxnb import adapters
from fluxnb.cache.passes import Image, Pass, around
from fluxnb.errors import UserError
from fluxnb.families import FUSION
from fluxnb.technique import AHEAD, ROUNDING, Changes, Technique, Unavailable


@dataclass
class ModulationAhead(Technique):
    """Computes every step's modulations at the first step of an image.

    Steps are those that the pipeline gives its scheduler. A transformer called outside of such a loop computes its
    modulations at every call. Over a CUDA graph it goes on top: what is recorded reads what is filled in between.
    Source: this study's own.
    """

    family, exact = FUSION, ROUNDING
    part = adapters.MODULATIONS
    name = label = "modulation ahead"
    settings = {"modulation": "ahead"}
    terms = {name: "the scales and shifts that depend on the timestep are computed for all steps at once"}

    def apply(self, pipe):
        """Makes the modulations' layers look up what they give; returns the function that undoes it."""
        transformer = pipe.transformer
        adapters.check(transformer, self.part)
        if hasattr(transformer, AHEAD):
            raise UserError("The modulations are computed ahead already: take that back first.")
        if transformer._compiled_call_impl is not None:
            raise Unavailable("needs the blocks compiled (Regional), not the transformer as a whole")
        table = _Table(transformer)
        with Changes(self.label) as changes:
            around(pipe, table.run, lambda image: {}, changes)
            changes.put(transformer, AHEAD, True)
            for layer in table.layers:
                changes.callback(vars(layer).pop, "now", None)
                changes.put(layer, "__class__", _looking(type(layer)))
            self.proof = {"modulations": f"of {len(table.layers)} layers, all steps at once"}
        return changes.take_back


def _layers(transformer) -> list[nn.Module]:
    """The modulations' matrices."""
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    norms = [*(n for b in double for n in (b.norm1, b.norm1_context)), *(b.norm for b in single), transformer.norm_out]
    return [getattr(norm.linear, "base_layer", norm.linear) for norm in norms]  # a LoRA goes around it, and comes off


@functools.lru_cache
def _looking(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of layer that gives `now` where that is filled in: (batch, out) whatever is asked.

    The layer stays the one that it is, with its weights: it can be saved, and a LoRA can go around it or come off.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return kind.forward(self, x, *args, **kwargs) if self.now is None else self.now

    def copied(self, _):  # of a block, say: the layer as it was
        return kind.__new__, (kind,), {name: value for name, value in vars(self).items() if name != "now"}

    own = {"forward": forward, "now": None, "__reduce_ex__": copied}
    return type(f"Looking{kind.__name__}", (kind,), own)


class _Table:
    """The modulations of all layers side by side: of all steps of an image, and of the step that is to run.

    What a step reads keeps its place in memory, one for each batch size: a recorded step may read it.
    """

    def __init__(self, transformer):
        self.transformer = transformer
        self.layers = _layers(transformer)
        self._now: dict[int, torch.Tensor] = {}  # batch size -> (batch, all outputs)

    def run(self, image: Image, mine: Pass, given: dict, call):
        """The transformer's forward with its modulations in place."""
        timestep, pooled = given["timestep"], given["pooled_projections"]
        pooled = pooled.expand(max(len(timestep), len(pooled)), -1)  # one for all images of a batch
        try:
            self._fill(image, mine.state, timestep, given.get("guidance"), pooled)
            return call()
        finally:
            for layer in self.layers:
                layer.now = None  # whatever calls them next, it isn't this step

    @torch.no_grad()
    def _fill(self, image, kept, timestep, guidance, pooled) -> None:
        row, batch = self._row(image, kept, timestep, guidance, pooled), len(pooled)
        now = self._now.get(batch)
        if now is None or (now.dtype, now.device) != (row.dtype, row.device):
            with torch.inference_mode(False):  # what is made in that mode can't be filled outside of it
                now = self._now[batch] = torch.empty(row.shape, dtype=row.dtype, device=row.device)
        now.copy_(row)
        start = 0
        for layer in self.layers:
            layer.now = now[:, start : start + layer.out_features]
            start += layer.out_features

    def _row(self, image, kept, timestep, guidance, pooled) -> torch.Tensor:
        """(batch, all outputs) for this call: looked up in its image's steps, computed outside of them."""
        if not kept:
            steps = _coming(image, timestep)
            rows = None if steps is None else self._ahead(steps, guidance, pooled)
            kept.update(steps=steps, rows=rows, guidance=guidance)
        steps, rows = kept["steps"], kept["rows"]
        if steps is None or steps.dtype != timestep.dtype:  # autocast converts latents, and timesteps with them
            return self._rows(timestep, guidance, pooled)
        if image.step + 1 == image.total:
            kept.update(steps=None, rows=None)  # room for what comes behind the transformer
        # looked up by its value, on the device; a step that nobody announced becomes NaN instead of a wrong image
        found = steps[:, None] == timestep
        row = rows[found.int().argmax(0).expand(len(pooled)), torch.arange(len(pooled), device=rows.device)]
        if guidance is not kept["guidance"]:
            found = found & (guidance == kept["guidance"])
        return torch.where(found.any(0)[:, None], row, torch.nan)

    def _ahead(self, steps, guidance, pooled) -> torch.Tensor:
        """(steps, batch, all outputs)."""
        count, batch = len(steps), len(pooled)
        given = None if guidance is None else guidance.expand(batch).repeat(count)
        rows = self._rows(steps.repeat_interleave(batch), given, pooled.repeat(count, 1))
        return rows.unflatten(0, (count, batch))

    def _rows(self, timestep, guidance, pooled) -> torch.Tensor:
        """(rows, all outputs): as the transformer's own forward and its layers compute them."""
        given = [timestep] if guidance is None else [timestep, guidance]
        kind = self.transformer.dtype
        embedded = self.transformer.time_text_embed(*(value.to(kind) * 1000 for value in given), pooled)
        activated = nn.functional.silu(embedded)
        # past the user's forward hooks, which see each step's
        return torch.cat([layer.forward(activated) for layer in self.layers], dim=1)


def _coming(image: Image, timestep) -> torch.Tensor | None:
    """The steps of an image from this call on, as its pipeline scales them; None if they aren't known."""
    if image.coming is None or not len(image.coming):
        return None
    steps = image.coming.to(timestep.device, timestep.dtype) / 1000
    return steps if torch.equal(steps[:1].expand_as(timestep), timestep) else None
