"""Which classes of transformers a cache and the techniques know, and all that they have to know of each.

FLUX.1 and FLUX.2 are in here; FLUX.3, Qwen-Image, SD3 or Wan take an `Adapter` each, and nothing else in the engine.

Add a model
1. See in diffusers' source which lists of blocks `forward` of the class runs, in which order, and what a block takes
   and returns: text and image tokens apart, as (text, image), is `APART`; one tensor with the text's tokens first is
   `JOINED`; the image's tokens alone, with the text only looked at, is `ALONE`. The arguments' names have to be
   diffusers' usual ones, `hidden_states` and `encoder_hidden_states`.
2. Say what the first block's attention sees of the image tokens before any weight of its own: `modulated(block,
   hidden_states, given)`, where `given` has all of the call's arguments by name. It is as wide as the tokens are.
3. `add(Adapter("ClassName", "what people call it", (Blocks("transformer_blocks"),), modulated))`. What a technique
   needs besides is in `PARTS`: name those that the class has; of the others a technique says that it can't run.
4. Test that a cache at threshold 0 gives the plain image bit for bit, and that `Interval(2)` gives what a loop gives
   that adds the last computed step's residual, as tests/test_adapters.py does for a class of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fluxnb.errors import UserError
from fluxnb.technique import Unavailable

# What blocks take and return.
APART, JOINED, ALONE = "text and image apart", "text and image in one tensor", "the image alone"

# What some techniques need of a class of transformers.
GELU, PROCESSORS, MODULATIONS, BLOCKS, PACKED, TEXTS = (
    "gelu",
    "processors",
    "modulations",
    "own blocks",
    "packed",
    "texts",
)
PARTS = {
    GELU: "feed-forward layers with a GELU",
    PROCESSORS: "FLUX.1's attention processors",
    MODULATIONS: "modulations of each block's own",
    BLOCKS: "FLUX.1's blocks",
    PACKED: "FLUX.1's packed latents",
    TEXTS: "text encoders of which nothing but the last state is taken",
}


@dataclass(frozen=True)
class Blocks:
    """One list of a transformer's blocks, which are run one after the other.

    Args:
        where: the transformer's attribute.
        streams: APART, JOINED or ALONE.
    """

    where: str
    streams: str = APART


@dataclass(frozen=True)
class Adapter:
    """A class of transformers.

    Args:
        name: of the class in diffusers; those made from it count as well.
        title: what people call it.
        blocks: its lists, in the order in which they run. The first one's blocks have text and image apart, or the
            image alone.
        modulated: (first block, hidden_states, all arguments of the call by name) -> the modulated input of that
            block, (n, image tokens, width): what gates of TeaCache's kind look at.
        parts: those of `PARTS` that it has.
        pipelines: diffusers' classes that load a model of its kind, for images from text.
        refused: arguments of a call with which no step can stand for another -> why.
    """

    name: str
    title: str
    blocks: tuple[Blocks, ...]
    modulated: Callable[[Any, Any, dict], Any]
    parts: frozenset[str] = frozenset()
    pipelines: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Where diffusers has the class, and looks up what runs its attention."""
        import diffusers

        return getattr(diffusers, self.name).__module__

    def lists(self, transformer) -> list[list]:
        """The blocks of each list."""
        return [list(getattr(transformer, own.where)) for own in self.blocks]

    def chain(self, transformer) -> tuple[list, Callable]:
        """The blocks of two lists as a few of the first and one function in place of the second: all of the others.

        Where the lists' blocks take other things, what runs between the lists stands between them: the first are all
        of the first list.
        """
        doubles, singles = self.lists(transformer)
        joined = self.blocks[1].streams == JOINED
        apart = doubles if joined else doubles[:1]
        blocks = [*doubles[len(apart) :], *singles]

        def run(hidden_states, encoder_hidden_states, **rest):
            for block in blocks:
                made = block(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **rest)
                encoder_hidden_states, hidden_states = (None, made) if joined else made
            return hidden_states if joined else (encoder_hidden_states, hidden_states)

        return apart, run


ADAPTERS: dict[str, Adapter] = {}


def add(adapter: Adapter) -> Adapter:
    """Makes a class of transformers known; one of the same name gives way."""
    if not adapter.blocks or adapter.blocks[0].streams == JOINED:
        raise UserError(f"The first blocks of {adapter.name} have to be {APART!r} or {ALONE!r}: say which they are.")
    ADAPTERS[adapter.name] = adapter
    return adapter


def find(transformer) -> Adapter | None:
    """The adapter of a transformer, compiled or not; None where there is none."""
    names = [kind.__name__ for kind in type(getattr(transformer, "_orig_mod", transformer)).__mro__]
    return next((ADAPTERS[name] for name in names if name in ADAPTERS), None)


def of(transformer) -> Adapter:
    """The adapter of a transformer. Raises Unavailable where there is none."""
    if (found := find(transformer)) is None:
        raise Unavailable(f"needs a transformer of {known()}, and this is {type(transformer).__name__}")
    return found


def known() -> str:
    """The classes that are known, for messages."""
    *others, last = ADAPTERS
    return f"{', '.join(others)} or {last}"


def check(transformer, part: str) -> None:
    """Raises Unavailable where a transformer's class is known to lack one of `PARTS`."""
    found = of(transformer)
    if part not in found.parts:
        raise Unavailable(f"needs {PARTS[part]}, which {found.title} ({found.name}) doesn't have")


def named(block, args: tuple, given: dict) -> dict:
    """All arguments of a block's call by name."""
    if not args:
        return given
    return {**dict(zip(inspect.signature(block.forward).parameters, args, strict=False)), **given}


def _flux2_modulated(block, hidden_states, given):
    """As diffusers' Flux2TransformerBlock: shift and scale are the first two of six parts, shared by all blocks."""
    modulation = given["temb_mod_img"]
    shift, scale, *_ = (modulation.unsqueeze(1) if modulation.ndim == 2 else modulation).chunk(6, dim=-1)
    return (1 + scale) * block.norm1(hidden_states) + shift


FLUX1 = add(
    Adapter(
        name="FluxTransformer2DModel",
        title="FLUX.1",
        blocks=(Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
        modulated=lambda block, hidden_states, given: block.norm1(hidden_states, emb=given["temb"])[0],
        parts=frozenset(PARTS),
        pipelines=("FluxPipeline",),
    )
)
FLUX2 = add(
    Adapter(
        name="Flux2Transformer2DModel",
        title="FLUX.2",
        blocks=(Blocks("transformer_blocks"), Blocks("single_transformer_blocks", JOINED)),
        modulated=_flux2_modulated,
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        refused={"kv_cache_mode": "keeps keys and values of its reference images from the first step"},
    )
)
