"""Runs a gate and a predictor inside a transformer (fluxnb.adapters), without touching its modules.

While `transformer.forward` runs, and only then, the transformer sees lists of callables in place of its
lists of blocks: the first one runs block 0 and asks the gate, the others run their block or pass through, the
last one stores what the blocks added or puts the prediction in its place. So

- blocks may be compiled, quantized or wrapped: the decision stands outside them, nothing is traced twice;
- the outer forward stays diffusers' own. ControlNet residuals, which it adds between blocks, are part of what
  is stored, and the one it adds behind the last block is added on hits too: exactly once;
- state dict, device moves and saving never see the cache.

`fluxnb.cache.passes` says which image and which of its passes a call belongs to.
"""

from __future__ import annotations

import functools
import itertools
import threading
from contextlib import ExitStack
from typing import Any

import torch

from fluxnb import adapters
from fluxnb.adapters import APART, JOINED, Adapter
from fluxnb.cache.gates.base import INPUT, RESIDUAL, Gate
from fluxnb.cache.gates.first_block import FirstBlock
from fluxnb.cache.gates.schedule import Schedule
from fluxnb.cache.linear import Linear
from fluxnb.cache.passes import Image, Pass, around
from fluxnb.cache.predictors import Hold
from fluxnb.cache.trace import Step, Trace
from fluxnb.errors import UserError
from fluxnb.families import Family
from fluxnb.technique import ANOTHER, BLOCKS, CACHED, HALVED, IDENTICAL, RECORDED, SHARED, Changes, Technique, attribute

ALREADY = "The transformer has a cache already: remove that one first, two can't share it."


class Cache(Technique):
    """A gate and a predictor: reuses what the transformer's blocks added at an earlier step.

    A gate is enough: `Cache(FirstBlock(0.1))`, `Cache(TeaCache(0.4))`. What reuses many steps in a row, such as
    `Interval(4)`, needs the first ones and the last computed for a good image, and a predictor:
    `Cache(Interval(4, warm_up=6, compute_last=True), Taylor(2))`.

    Source: First Block Cache (Cheng, 2024), TeaCache (Liu et al., 2024); see the gates and the predictors.

    Args:
        gate: when to reuse.
        predictor: how; by default Hold, which adds what the last computed step added.
        hold_controlnet: a ControlNet is run when its residuals are needed, and not at all on a reused step: the one
            that is added behind the last block is that of the last computed step. Without a ControlNet it changes
            nothing.

    Raises:
        UserError: the predictor needs the first block, and the gate may reuse a step before it has run.
    """

    def __init__(self, gate: Gate, predictor: Linear | None = None, hold_controlnet: bool = False):
        self.gate, self.predictor, self.hold_controlnet = gate, predictor or Hold(), hold_controlnet
        if self.predictor.probes and gate.points != {RESIDUAL}:
            raise UserError(
                f"The predictor {self.predictor.name!r} looks at the first block, and {gate.label} reuses steps before "
                "it has run: take a gate that runs it, such as FirstBlock or DiCache."
            )
        self.trace = Trace()  # what was decided in the image that began last, in its first pass

    terms = {"ControlNet held": "on a reused step the ControlNet isn't run: its last residuals are used again"}

    @property
    def family(self) -> Family:
        return self.gate.family

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def exact(self) -> str:
        return ANOTHER if self.gate.reuses else IDENTICAL

    @property
    def settings(self) -> dict:
        held = {"hold_controlnet": True} if self.hold_controlnet else {}
        return {**self.gate.settings, **self.predictor.settings, **held}

    @property
    def label(self) -> str:
        how = "" if isinstance(self.predictor, Hold) else f" + {self.predictor.name}"
        return self.gate.label + how + (", ControlNet held" if self.hold_controlnet else "")

    @property
    def mark(self) -> str:
        return self.gate.mark

    def apply(self, pipe):
        """Puts the cache into the pipeline's transformer; returns the function that takes it out.

        Raises:
            UserError: the pipeline's transformer isn't known (fluxnb.adapters), or has a cache already.
        """
        transformer, running = cacheable(pipe), threading.local()
        self.gate.meet(pipe)
        self.trace = Trace()
        with Changes(self.label) as changes:
            around(pipe, self._run(transformer, running), self._new, changes)
            changes.put(transformer, CACHED, self)
            changes.refuse(transformer, ("enable_cache",), ALREADY)  # diffusers' own
            controlnet = getattr(pipe, "controlnet", None)
            (first, *_) = getattr(controlnet, "nets", [controlnet])
            if self.hold_controlnet and hasattr(first, "controlnet_blocks"):
                counts = (len(first.controlnet_blocks), len(first.controlnet_single_blocks))
                changes.wrap(controlnet, functools.partial(_hold, counts=counts, running=running))
        return changes.take_back

    def _new(self, image: Image) -> dict:
        """The memory of one pass of an image."""
        state: dict[str, Any] = {
            "gate": self.gate.new_state(image.total),
            "predictors": {point: self.predictor.new_state(image.total) for point in self.gate.points},
            "trace": Trace(),
            "run": 0,
            "residuals": None,  # of the ControlNet
        }
        if image.passes and all(one.step < image.step for one in image.passes):
            state["trace"] = self.trace  # of the same image, whose tokens are more from this step on
        elif not image.passes:
            self.trace = state["trace"]
        return state

    def _share(self, group) -> None:
        """Decides and predicts with the ranks of a process group that have the other tokens; None: alone."""
        if group is not None and (self.gate.whole or self.predictor.whole):
            raise UserError(
                f"{self.label} needs all tokens of an image on one rank, and they are divided: take another cache, or "
                "one rank for an image."
            )
        self.gate.share(group)
        self.predictor.group = group

    def _run(self, transformer, running):
        adapter = adapters.of(transformer)

        def run(image: Image, mine: Pass, given: dict, call):
            lists = [list(own) for own in getattr(transformer, BLOCKS, None) or adapter.lists(transformer)]
            blocks = [(block, own.streams) for own, some in zip(adapter.blocks, lists, strict=True) for block in some]
            if not all(lists) or len(blocks) < 2:
                raise UserError("The transformer needs blocks of every kind, and two in all, for them to be cached.")
            for name, why in adapter.refused.items():
                if given.get(name) is not None:
                    raise UserError(f"A cache can't be on {type(transformer).__name__} while it {why}: take it off.")
            self._share(getattr(transformer, SHARED, None))
            self.gate.called(mine.state["gate"], image, given)
            for own in mine.state["predictors"].values():
                self.predictor.called(own, given)
            step = _StepRun(self, adapter, image.total, mine)
            runs = iter([step.first(*blocks[0]), *(step.middle(*one) for one in blocks[1:-1]), step.last(*blocks[-1])])
            with ExitStack() as stack:
                stack.enter_context(attribute(running, "step", step))
                # An instance attribute stands before the module list of the same name, and leaves it alone.
                for own, some in zip(adapter.blocks, lists, strict=True):
                    stack.enter_context(attribute(transformer, own.where, list(itertools.islice(runs, len(some)))))
                return call()

        return run


def _hold(original, counts: tuple[int, int], running):
    """A ControlNet's forward that runs it when its residuals are needed, and not at all on a reused step."""

    @functools.wraps(original)
    def forward(*args, **kwargs):
        fresh: list[tuple] = []

        def residuals():
            step = getattr(running, "step", None)
            if not fresh and step and step.hit and step.state["residuals"] is not None:
                return step.state["residuals"]
            if not fresh:
                fresh.append(original(*args, **kwargs))
            if step:
                step.state["residuals"] = fresh[0]
            return fresh[0]

        return tuple(_Later(residuals, kind, n) if n else None for kind, n in enumerate(counts))

    return forward


class _Later:
    """One kind of a ControlNet's residuals, which it works out when the first of them is needed.

    diffusers asks for their number before the first block and for each of them behind a block.
    """

    def __init__(self, residuals, kind: int, count: int):
        self.residuals, self.kind, self.count = residuals, kind, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.residuals()[self.kind][i]


class _StepRun:
    """The blocks of one step: diffusers calls them with hidden_states, encoder_hidden_states and more.

    `hidden_states` are the image tokens, (n, image tokens, width), `encoder_hidden_states` the text tokens; or the
    former are both, text first, or there is nothing but the former, as the adapter says (`streams`).
    """

    def __init__(self, cache: Cache, adapter: Adapter, total: int | None, mine: Pass):
        self.cache, self.adapter, self.state, self.index = cache, adapter, mine.state, mine.step
        self.forced = not mine.sure or cache.gate.forced(self.index, total, self.state["run"])
        self.hit: str | None = None  # the point where the step was reused
        self.image: dict[str, torch.Tensor] = {}  # the image tokens at each point
        self.residual = None  # what the first block added to them
        self.text = 0  # text tokens, where the image's have any before them

    def _ask(self, point: str, seen) -> bool:
        """Asks the gate, which also has to see steps that are computed anyway; True if the step is reused."""
        said = self.cache.gate.ask(self.state["gate"], self.index, point, seen)
        self.hit = point if said and not self.forced else None
        return self.hit is not None

    def _image(self, streams: str, made) -> torch.Tensor:
        """The image tokens of what a block gives."""
        if streams == APART:
            return made[1]
        return made[:, self.text :] if streams == JOINED else made

    def _through(self, streams: str, given: dict):
        """What a block that isn't run gives: what it was given."""
        image = given["hidden_states"]
        return (given["encoder_hidden_states"], image) if streams == APART else image

    def first(self, block, streams: str):
        def run(*args, **given):
            given = adapters.named(block, args, given)
            self.image[INPUT] = hidden_states = given["hidden_states"]
            if streams == APART:
                self.text = given["encoder_hidden_states"].shape[1]
            looks = self.cache.gate.looks_at_input
            if self._ask(INPUT, self.adapter.modulated(block, hidden_states, given) if looks else hidden_states):
                return self._through(streams, given)
            made = block(**given)
            self.image[RESIDUAL] = image = self._image(streams, made)
            self.residual = (image - hidden_states).detach()
            for own in self.state["predictors"].values():
                self.cache.predictor.probed(own, self.residual)
            self._ask(RESIDUAL, self.residual)
            return made

        return run

    def middle(self, block, streams: str):
        def run(*args, **given):
            given = adapters.named(block, args, given)
            return self._through(streams, given) if self.hit else block(**given)

        return run

    def last(self, block, streams: str):
        def run(*args, **given):
            given = adapters.named(block, args, given)
            cache, state = self.cache, self.state
            if self.hit:
                image = cache.predictor.predict(state["predictors"][self.hit], self.index) + self.image[self.hit]
                self._done()
                if streams == JOINED:
                    return torch.cat([given["hidden_states"][:, : self.text], image], dim=1)
                return self._through(streams, {**given, "hidden_states": image})
            made = block(**given)
            image = self._image(streams, made)
            cache.gate.computed(state["gate"], self.index, self.residual)
            for point, own in state["predictors"].items():
                cache.predictor.computed(own, self.index, (image - self.image[point]).detach())
            self._done()
            return made

        return run

    def _done(self) -> None:
        state = self.state
        state["trace"].steps.append(Step(self.index, self.hit, **self.cache.gate.seen(state["gate"])))
        state["run"] = state["run"] + 1 if self.hit else 0


def cacheable(pipe):
    """The pipeline's transformer, if a cache can go in. Raises UserError if not, saying why."""
    transformer = getattr(pipe, "transformer", None)
    inner = getattr(transformer, "_orig_mod", transformer)
    if adapters.find(transformer) is None:
        raise UserError(
            f"A cache needs a transformer that it knows ({adapters.known()}), and {type(pipe).__name__} has "
            f"{'none' if inner is None else type(inner).__name__}: another one takes an adapter, which says where its "
            "blocks are, what they return and what the first one's modulated input is (fluxnb.adapters)."
        )
    if getattr(transformer, RECORDED, False):
        raise UserError(
            "The transformer's steps are replayed from a CUDA graph, so its blocks can't be skipped: take the CUDA "
            "graph off before a cache goes in, or record the blocks only (CudaGraph(blocks=True))."
        )
    if inner is not transformer or transformer._compiled_call_impl is not None:
        raise UserError(
            "The transformer is compiled as a whole, so its blocks can't be skipped: compile its blocks instead "
            "(transformer.compile_repeated_blocks())."
        )
    if getattr(transformer, HALVED, False):
        raise UserError(
            "The first steps are at half size, which a cache has to see: put the cache on first, then those."
        )
    if getattr(transformer, CACHED, None) or getattr(transformer, "is_cache_enabled", False):
        raise UserError(ALREADY)
    return transformer


def first_block(threshold: float, **options) -> Cache:
    """First Block Cache at a threshold; options as in `Gate`."""
    return Cache(FirstBlock(threshold, **options))


def prescribed(mask: str, origin: str, first_block: bool = True) -> Cache:
    """A prescribed schedule of computed steps; `origin` says where the mask is from."""
    return Cache(Schedule(mask, first_block, origin))
