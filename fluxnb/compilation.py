"""torch.compile, block by block."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluxnb.technique import Unavailable


@dataclass
class Regional:
    """Compiles every transformer block by itself, without graph breaks; a technique.

    All blocks of a kind share one compiled graph, so it takes seconds instead of minutes, and whatever stands
    between the blocks (a cache, say) stays plain Python. Source: PyTorch's regional compilation recipe.
    """

    name: str = "torch.compile"
    label: str = "compiled blocks"
    settings: dict = field(default_factory=lambda: {"compile": "blocks"})

    def apply(self, pipe):
        """Compiles the blocks at their first call; returns the function that makes them eager again."""
        import torch

        if not hasattr(torch, "compile"):
            raise Unavailable("needs a PyTorch with torch.compile")
        transformer = pipe.transformer
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in blocks:
            block.compile(fullgraph=True)

        def undo():
            for block in blocks:
                block._compiled_call_impl = None

        return undo
