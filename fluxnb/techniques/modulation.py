"""The modulations of all steps at once: FLUX's largest matrices read once per image instead of once per step.

Every block scales and shifts its inputs by numbers that depend on the timestep, the guidance and the pooled prompt:
one row times a matrix, 3.2 billion parameters in all at FLUX.1-dev's size, read from memory in every step and met by a
single row. The timesteps are known before the first step, so the rows of all steps go through each matrix together, in
the time that one takes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass

import torch
from torch import nn

from fluxnb.errors import UserError
from fluxnb.families import FUSION
from fluxnb.technique import AHEAD, ROUNDING, Technique, Unavailable, attribute


@dataclass
class ModulationAhead(Technique):
    """Computes every step's modulations at the first step of an image.

    Steps are those that the pipeline gives its scheduler. A transformer called outside of such a loop computes its
    modulations at every call. Over a CUDA graph it goes on top: what is recorded reads what is filled in between.
    Source: this study's own.
    """

    family, exact = FUSION, ROUNDING
    name = label = "modulation ahead"
    settings = {"modulation": "ahead"}
    terms = {name: "the scales and shifts that depend on the timestep are computed for all steps at once"}

    def apply(self, pipe):
        """Replaces the modulations' layers by what looks them up; returns the function that undoes it."""
        transformer, scheduler = pipe.transformer, pipe.scheduler
        if hasattr(transformer, AHEAD):
            raise UserError("The modulations are computed ahead already: take that back first.")
        if transformer._compiled_call_impl is not None:
            raise Unavailable("needs the blocks compiled (Regional), not the transformer as a whole")
        table = _Table(transformer)
        with contextlib.ExitStack() as stack:
            for owner, looked in zip(_owners(transformer), table.layers, strict=True):
                stack.callback(setattr, owner, "linear", owner.linear)
                owner.linear = looked
            stack.enter_context(attribute(transformer, AHEAD, True))
            stack.enter_context(attribute(transformer, "forward", table.forward(transformer.forward)))
            for name, skipped in (
                ("set_timesteps", lambda *_, **__: 0),
                ("set_begin_index", lambda begin_index=0: begin_index),
            ):
                original = getattr(scheduler, name)
                stack.enter_context(attribute(scheduler, name, table.begin(scheduler, original, skipped)))
            self.proof = {"modulations": f"of {len(table.layers)} layers, all steps at once"}
            return stack.pop_all().close


def _owners(transformer) -> list[nn.Module]:
    """The layers that have a modulation."""
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    return [*(n for b in double for n in (b.norm1, b.norm1_context)), *(b.norm for b in single), transformer.norm_out]


class _Looked(nn.Module):
    """In place of a modulation's matrix: (batch, in) of whatever is asked, (batch, out) of what was filled in."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.now: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.now


@dataclass
class _Stream:
    """One prompt's way through the steps of an image."""

    steps: torch.Tensor
    rows: torch.Tensor  # (steps, batch, all outputs)
    left: int


class _Table:
    """The modulations of all layers side by side: of all steps of an image, and of the step that is to run.

    What a step reads keeps its place in memory, one for each batch size: a recorded step may read it.
    """

    def __init__(self, transformer):
        self.transformer = transformer
        self.layers = [_Looked(owner.linear) for owner in _owners(transformer)]
        self.names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._timesteps: torch.Tensor | None = None
        self._streams: dict[int, _Stream] = {}  # one for each prompt of the image: conditional, unconditional
        self._now: dict[int, torch.Tensor] = {}  # batch size -> (batch, all outputs)

    def begin(self, scheduler, original, skipped):
        """A scheduler's method that begins an image, noticed."""

        @functools.wraps(original)
        def begins(*args, **kwargs):
            result = original(*args, **kwargs)
            self._timesteps, self._streams = scheduler.timesteps[skipped(*args, **kwargs) :], {}
            return result

        return begins

    def forward(self, original):
        """The transformer's forward with its modulations in place."""

        @functools.wraps(original)
        def forward(*args, **given):
            given = {**dict(zip(self.names, args, strict=False)), **given}
            self._fill(given["timestep"], given.get("guidance"), given["pooled_projections"])
            return original(**given)

        return forward

    @torch.no_grad()
    def _fill(self, timestep, guidance, pooled) -> None:
        row, batch = self._row(timestep, guidance, pooled), len(pooled)
        if batch not in self._now:
            self._now[batch] = torch.empty_like(row)
        self._now[batch].copy_(row)
        start = 0
        for layer in self.layers:
            layer.now = self._now[batch][:, start : start + layer.linear.out_features]
            start += layer.linear.out_features

    def _row(self, timestep, guidance, pooled) -> torch.Tensor:
        """(batch, all outputs) for this call: looked up in an image's steps, computed outside of them."""
        name = pooled.data_ptr()
        stream = self._streams.get(name)
        if stream is None:
            if (steps := self._coming(timestep)) is None:
                return self._rows(timestep, guidance, pooled)
            stream = self._streams[name] = _Stream(steps, self._ahead(steps, guidance, pooled), len(steps))
        stream.left -= 1
        if not stream.left:
            del self._streams[name]
        # looked up by its value, on the device; a step that nobody announced becomes NaN instead of a wrong image
        found = stream.steps == timestep[:1]
        row = stream.rows.index_select(0, found.int().argmax(keepdim=True))[0]
        return torch.where(found.any(), row, torch.nan)

    def _coming(self, timestep) -> torch.Tensor | None:
        """The steps of the image that begins with this call, as its pipeline scales them; None if none does."""
        if self._timesteps is None or not len(self._timesteps):
            return None
        steps = self._timesteps.to(timestep.device, timestep.dtype) / 1000
        return steps if torch.equal(steps[:1].expand_as(timestep), timestep) else None

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
        return torch.cat([layer.linear(activated) for layer in self.layers], dim=1)
