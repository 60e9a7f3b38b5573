"""What the use cases start from: for a prompt, a picture that is nearly right, what to repaint, edges and depth.

The picture shows the prompt's scene with one thing changed (another object, another sign, no flying cars). The mask
covers where the two differ, so inpainting has to put right what is wrong and to leave the rest alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fluxnb.errors import UserError
from fluxnb.models import control
from fluxnb.world import scenes

MARGIN = 0.03  # of the side: how far the mask reaches beyond what differs
REACH = 16  # pixels, one token: masks are reduced to latents, and the decoder looks at its neighbours


@dataclass(frozen=True)
class Material:
    """Pictures of one size: `image` to change, `mask` (white is repainted), conditions of the scene as prompted."""

    image: Image.Image
    mask: Image.Image
    edges: Image.Image
    depth: Image.Image

    def outside(self, reach: int = REACH) -> np.ndarray:
        """(height, width) booleans: what the mask leaves alone, less a border that the VAE's kernels reach across."""
        return np.asarray(self.mask.filter(ImageFilter.MaxFilter(2 * reach + 1))) <= 127

    def condition(self, kind: str) -> Image.Image:
        """The condition of a kind of fluxnb.models.control.MODES."""
        return {"edges": self.edges, "depth": self.depth}[kind]

    def arguments(self, kind: str) -> dict:
        """All of it as `pipelines.generate` takes it."""
        return {"image": self.image, "mask": self.mask, "condition": self.condition(kind), "kind": kind}


def of(prompt: str, seed: int, width: int = scenes.SIZE, height: int = scenes.SIZE) -> Material:
    """The material for a prompt; the same for the same prompt and seed, at any size.

    Args:
        width, height: pixels; the scene is square and stretched to them.

    Raises:
        UserError: the prompt says nothing of the embedded world, so nothing can be drawn for it.
    """
    try:
        wanted = scenes.complete(prompt, seed)
    except ValueError:
        raise UserError(
            f"No picture can be drawn for {prompt!r}: use words of the embedded world (fluxnb.world.scenes.vocabulary)."
        ) from None
    other = scenes.complete(prompt, seed, **_other(dict(wanted.facts)))
    side = max(width, height)
    pictures = [scenes.draw(scene, seed, side) for scene in (wanted, other)]
    parts = [pictures[1], _mask(*pictures), control.edges(pictures[0]), scenes.depth(wanted, seed, side)]
    return Material(*(part if part.size == (width, height) else part.resize((width, height)) for part in parts))


def _other(facts: dict[str, str]) -> dict[str, str]:
    """The facts that the picture shows instead: one thing is wrong."""

    def following(name: str) -> str:
        values = scenes.FACTS[name]
        return values[(values.index(facts[name]) + 1) % len(values)]

    if facts["family"] == "composed":
        return {name: following(name) for name in ("kind0", "colour0")}
    name = {"city": "flying cars", "portrait": "held", "animal": "sign"}[facts["family"]]
    return {name: following(name)}


def _mask(one: Image.Image, other: Image.Image) -> Image.Image:
    """White in the box around whatever differs between two pictures, with a margin."""
    differs = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max(-1) > 8
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    margin = round(MARGIN * one.width)
    mask = Image.new("L", one.size, 0)
    if len(rows):
        box = (columns[0] - margin, rows[0] - margin, columns[-1] + margin, rows[-1] + margin)
        ImageDraw.Draw(mask).rectangle([int(v) for v in box], fill=255)
    return mask
