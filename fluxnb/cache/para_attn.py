"""ParaAttention's own First Block Cache on current diffusers, as a second backend and as the reference.

para-attn 0.3.38 calls FLUX's single blocks as diffusers did before 0.35, and has no way to be removed. This
adapter runs its decision and its buffers (`para_attn.first_block_cache.utils`) unchanged, and replaces the one
method that calls the blocks. The blocks are put in place only while the transformer runs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib import metadata

import torch

from fluxnb import adapters
from fluxnb.cache.engine import ALREADY, cacheable
from fluxnb.cache.gates.base import RESIDUAL, checked_threshold
from fluxnb.cache.passes import CONTROL, around
from fluxnb.cache.trace import Step, Trace
from fluxnb.errors import UserError
from fluxnb.families import FIRST_BLOCK
from fluxnb.installed import needs
from fluxnb.technique import ANOTHER, CACHED, IDENTICAL, Changes, Technique, Unavailable, attribute

VERSION = "0.3.38"
_CONTROL = "adds a ControlNet's residuals elsewhere than diffusers does"
_ONE_AT_A_TIME = threading.RLock()  # the context is a variable of para-attn's module


@dataclass
class ParaAttention(Technique):
    """First Block Cache by the package para-attn, as the reference. Source: ParaAttention (Cheng, 2024)."""

    family = FIRST_BLOCK
    name = "First Block Cache (para-attn)"

    threshold: float

    def __post_init__(self):
        self.threshold = checked_threshold(self.threshold)
        self.trace = Trace()  # what was decided in the image that began last, in its first pass

    @property
    def exact(self) -> str:
        return ANOTHER if self.threshold else IDENTICAL

    @property
    def settings(self) -> dict:
        return {"threshold": self.threshold, "backend": "para-attn"}

    @property
    def label(self) -> str:
        return f"para-attn FBCache {self.threshold:g}"

    def apply(self, pipe):
        """Puts para-attn's cache into the pipeline's transformer; returns the function that takes it out.

        Raises:
            Unavailable: para-attn isn't installed, isn't the version that this fits, or can't call the blocks.
            UserError: the pipeline's transformer isn't known, or has a cache already.
        """
        utils, ran = _utils(), threading.local()
        transformer = cacheable(pipe)
        adapters.check(transformer, adapters.BLOCKS)
        if getattr(pipe, "controlnet", None) is not None:
            raise Unavailable(f"needs a pipeline without ControlNet: it {_CONTROL} (Cache(FirstBlock(…)) doesn't)")

        class Blocks(utils.CachedTransformerBlocks):
            """para-attn's decision, around single blocks that take and return text and image apart."""

            def call_remaining_transformer_blocks(self, image, text, *args, **kwargs):
                image_before, text_before, ran.computed = image, text, True
                for block in (*self.transformer_blocks[1:], *self.single_transformer_blocks):
                    text, image = block(image, text, *args, **kwargs)
                image, text = image.contiguous(), text.contiguous()
                return image, text, image - image_before, text - text_before

        blocks = Blocks(
            transformer.transformer_blocks,
            transformer.single_transformer_blocks,
            transformer=None,
            return_hidden_states_first=False,
        )

        def run(image, mine, given, call):
            if any(given.get(key) is not None for key in CONTROL):
                raise UserError(f"{self.label} {_CONTROL}: take it off, or use Cache(FirstBlock({self.threshold:g})).")
            context, trace = mine.state
            if not mine.sure:
                context.clear_buffers()
            with (
                _ONE_AT_A_TIME,
                utils.cache_context(context),
                attribute(ran, "computed", False),
                attribute(transformer, "transformer_blocks", torch.nn.ModuleList([blocks])),
                attribute(transformer, "single_transformer_blocks", torch.nn.ModuleList()),
            ):
                made = call()
                trace.steps.append(Step(mine.step, None if ran.computed else RESIDUAL, threshold=self.threshold))
            return made

        def new(image):
            trace = Trace()
            if not image.passes:
                self.trace = trace
            return utils.create_cache_context(residual_diff_threshold=self.threshold), trace

        self.trace = Trace()
        with Changes(self.label) as changes:
            around(pipe, run, new, changes)
            changes.put(transformer, CACHED, self)
            changes.refuse(transformer, ("enable_cache",), ALREADY)
        return changes.take_back


def _utils():
    try:
        from para_attn.first_block_cache import utils
    except ImportError as error:
        raise Unavailable(needs("para_attn", error)) from error
    if (found := metadata.version("para-attn")) != VERSION:
        raise Unavailable(f"needs para-attn {VERSION}, and {found} is installed: the adapter fits that version only")
    return utils
