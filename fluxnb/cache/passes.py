"""Which image a call of the transformer belongs to, and which of its passes: looked at, never guessed.

A transformer isn't told. What is kept from another image or for another prompt would make a wrong picture that nobody
notices, so this is what tells:

- Image: the pipeline whose `__call__` is running is found on the stack. The scheduler that it has now gets new
  timesteps for every image and counts its steps on the host, so nothing is read from a GPU. Where a transformer is
  called by hand its timestep is read: lower is the next step, higher is a new image, and so is the same one again.
- Pass: with true guidance a step has one for each prompt. It is known by all that it is given and that stays the same
  from step to step: by the tensors themselves in a pipeline, which keeps them, by their values where they are new.
- Doubt: what a call could be mistaken for isn't used; the call is computed.

Every thread has images of its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from fluxnb.errors import UserError
from fluxnb.technique import Changes

# Arguments of a transformer that are others at every step.
CONTROL = ("controlnet_block_samples", "controlnet_single_block_samples")
CHANGING = {"hidden_states", "timestep", "return_dict", *CONTROL}
PROMPT = ("encoder_hidden_states", "pooled_projections")
MOST = 8  # passes that are kept of an image; an older one begins anew


@dataclass(frozen=True, eq=False)
class _Clock:
    """Where the scheduler is that the pipeline has now."""

    caller: type | None  # the pipeline whose loop it is, None where the transformer is called by hand
    timesteps: torch.Tensor | None  # the scheduler's own object, which tells an image from the next
    start: int  # index of the first that is run: image-to-image leaves some out
    at: int  # index of the one that runs
    fresh: bool  # it has been set, and none has been run

    @classmethod
    def of(cls, pipe) -> _Clock:
        inner = _calling()
        scheduler = getattr(inner or pipe, "scheduler", None)
        start = getattr(scheduler, "begin_index", None) or 0
        index = getattr(scheduler, "step_index", None)
        at = start if index is None else index
        fresh = index is None and getattr(scheduler, "num_inference_steps", None) is not None
        return cls(inner and type(inner), getattr(scheduler, "timesteps", None), start, at, fresh)

    @property
    def called(self) -> bool:
        return self.caller is not None

    def follows(self, before: _Clock) -> bool:
        """Whether it may be the same image still."""
        return self.caller is before.caller and self.timesteps is before.timesteps and self.at >= before.at

    def total(self, timestep) -> int | None:
        """Steps of the image that begins. By hand they are the scheduler's if it is fresh and begins with this one."""
        if self.timesteps is None or len(self.timesteps) <= self.start:
            return None
        mine = self.called or self.fresh and abs(_value(self.timesteps[self.start]) / 1000 - _value(timestep)) < 0.01
        return len(self.timesteps) - self.start if mine else None


@dataclass(eq=False)
class Image:
    """An image in the making."""

    clock: _Clock
    total: int | None  # steps; None: unknown
    step: int  # the one that runs, counted from 0
    timestep: torch.Tensor | float  # of the latest call
    passes: list[Pass] = field(default_factory=list)

    @property
    def coming(self) -> torch.Tensor | None:
        """The scheduler's timesteps from this step on; None by hand."""
        clock = self.clock
        return clock.timesteps[clock.start + self.step :] if clock.called else None


@dataclass(eq=False)
class Pass:
    """One trajectory of an image, and what is kept for it."""

    told: _Told
    values: list[torch.Tensor]  # copies, because a tensor may be filled anew
    step: int = -1  # of the image, where it ran last
    doubts: int = 1  # so many calls are computed whatever is kept
    sure: bool = False  # whether this call may use what is kept
    state: Any = None


@dataclass(eq=False)
class _Told:
    """What tells a call's pass from another: everything that it is given but what changes from step to step."""

    form: tuple  # the plain values, and the tensors' shapes
    tensors: list[torch.Tensor]
    marks: list[tuple[int, int]]  # which tensors these are, as long as they are held
    prompt: list[tuple[int, int]]

    @classmethod
    def of(cls, name: str, given: dict) -> _Told:
        kept = {key: given[key] for key in sorted(given) if key not in CHANGING and given[key] is not None}
        leaves, structure = tree_flatten(kept)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        plain = [(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        controlled = [key for key in CONTROL if given.get(key) is not None]
        form = (name, given["hidden_states"].shape, controlled, structure, plain)
        return cls(form, tensors, list(map(_mark, tensors)), [_mark(given[k]) for k in PROMPT if k in given])


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written to (an inference tensor doesn't know)."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


class _Thread(threading.local):
    """What one thread is at."""

    image: Image | None = None
    name = "cond"  # diffusers' name of the pass


class Passes:
    """The images and passes of a pipeline's transformer.

    Args:
        new: what is kept for a pass of an image that begins.
    """

    def __init__(self, pipe, new: Callable[[Image], Any]):
        self._pipe, self._new, self._now = pipe, new, _Thread()
        self._names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]

    def forget(self) -> None:
        """Frees what is kept, of all threads."""
        self._now = _Thread()

    def given(self, args: tuple, kwargs: dict) -> dict:
        """A call's arguments by their names."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def named(self, original):
        """The transformer's `cache_context`, which names a pass."""

        @contextlib.contextmanager
        @functools.wraps(original)
        def cache_context(name, **more):
            before, self._now.name = self._now.name, name
            try:
                with original(name, **more):
                    yield
            finally:
                self._now.name = before

        return cache_context

    def of(self, given: dict) -> tuple[Image, Pass]:
        """The image and its pass that a call with these arguments belongs to."""
        image, stepped = self._image(given["timestep"])
        told, doubts = _Told.of(self._now.name, given), 1
        alike = _alike(image, told)
        mine = next((one for one in alike if one.step < image.step), None)
        if mine is None and alike:  # it has run at this step
            change = _change(given["timestep"], image.timestep)
            if change < 0 or stepped:  # the next one, which the scheduler doesn't count or rounding hides
                mine, image.step = alike[0], image.step + 1
                mine.doubts += change == 0
            elif change > 0 or not image.clock.called:
                image, doubts = self._begin(image.clock, given["timestep"]), 1 + (change == 0)
        if mine is None:
            mine = Pass(told, [x.detach().clone() for x in told.tensors], doubts=doubts, state=self._new(image))
            image.passes = [*image.passes[1 - MOST :], mine]
        image.timestep = given["timestep"] if image.clock.called else _value(given["timestep"])
        mine.told, mine.step, mine.sure = told, image.step, not mine.doubts and len(alike) < 2
        mine.doubts -= mine.doubts > 0
        return image, mine

    def _image(self, timestep) -> tuple[Image, bool]:
        """The image that a call belongs to, at its step, and whether the scheduler has been stepped since the last."""
        image, clock = self._now.image, _Clock.of(self._pipe)
        if image is None or not clock.follows(image.clock):
            return self._begin(clock, timestep), False
        stepped, image.clock = clock.at - image.clock.at, clock
        if clock.called:
            image.step += stepped
        elif (change := _change(timestep, image.timestep)) > 0:
            return self._begin(clock, timestep), False
        else:
            image.step += change < 0
        return image, stepped > 0

    def _begin(self, clock: _Clock, timestep) -> Image:
        self._now.image = Image(clock, clock.total(timestep), clock.at - clock.start if clock.called else 0, timestep)
        return self._now.image


def around(pipe, run: Callable, new: Callable[[Image], Any], changes: Changes) -> None:
    """Puts `run` around the transformer's forward; what is kept is freed when it is taken off.

    One call runs at a time, so `run` may change the transformer meanwhile; what is taken off waits for it.

    Args:
        run: gets the call's image and pass, its arguments by name and the function that runs it as it is; gives what
            the call gives.
        new: what a pass of an image keeps, as its `state`.
    """
    transformer, passes = pipe.transformer, Passes(pipe, new)
    changes.lock = lock = threading.RLock()  # type: ignore[assignment]

    def make(original):
        @functools.wraps(original)
        def forward(*args, **kwargs):
            if transformer.training and torch.is_grad_enabled():
                raise UserError(f"A transformer can't be trained while {changes.name} is on it: take it off first.")
            with lock:
                given = passes.given(args, kwargs)
                return run(*passes.of(given), given, functools.partial(original, *args, **kwargs))

        return forward

    changes.callback(passes.forget)
    changes.wrap(transformer, make)
    changes.put(transformer, "cache_context", passes.named(transformer.cache_context))
    copying = (
        f"A pipeline can't be copied or pickled while {changes.name} is on it, because the copy would run the "
        "original's weights: take it off, copy, and put it on each."
    )
    changes.refuse(transformer, ("__reduce_ex__",), copying)
    compiling = (
        f"A transformer can't be compiled as a whole while {changes.name} is on it, which decides between two steps or "
        "blocks: compile its blocks (compile_repeated_blocks)."
    )
    changes.refuse(transformer, ("compile",), compiling)


def grid(given: dict, asking: str) -> tuple[int, int]:
    """Rows and columns of the image tokens that a call is given: one read from the device.

    Raises:
        UserError: they are more than one image's, so that `asking` can't use them.
    """
    ids = given["img_ids"].flatten(0, -2)  # FLUX.1's: (tokens, 3), of time, row, column; FLUX.2's are (n, tokens, 4)
    rows, columns = (int(n) + 1 for n in ids[:, 1:3].amax(0).tolist())
    if rows * columns != (tokens := given["hidden_states"].shape[1]):
        raise UserError(
            f"{asking} needs the tokens of one image as a grid, and {tokens} aren't {rows} × {columns}: take another "
            "cache for images that are made beside others."
        )
    return rows, columns


def _calling():
    """The pipeline whose `__call__` is running in this thread, None where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            if isinstance(getattr(getattr(pipe, "scheduler", None), "timesteps", None), torch.Tensor):
                return pipe
        frame = frame.f_back
    return None


def _alike(image: Image, told: _Told) -> list[Pass]:
    """The passes that a call may belong to. In a pipeline the tensors are only read where they don't tell."""
    alike = [one for one in image.passes if one.told.form == told.form]
    if image.clock.called:
        if same := [one for one in alike if one.told.marks == told.marks]:
            return same
        prompt = [one for one in alike if one.told.prompt == told.prompt]
        if len(prompt) == 1:
            return prompt
    return [one for one in alike if all(map(torch.equal, one.values, told.tensors))]


def _change(timestep, before) -> float:
    return _value(timestep) - _value(before)


def _value(timestep) -> float:
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else timestep
