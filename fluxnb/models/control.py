"""What a ControlNet is told: edges or depth of a picture, and whether its image follows them.

The embedded ControlNet (weights/controlnet, trained by `fluxnb.training.train_control`) is a union ControlNet: one
model, told by `control_mode` which kind of condition it gets, as the published ones for FLUX.1-dev are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fluxnb.errors import UserError
from fluxnb.installed import need

FOLDER = Path(__file__).parent / "weights" / "controlnet"
MODES = {"edges": 0, "depth": 1}  # kind of condition -> control_mode
SIGMA = 1.0  # pixels: Canny's smoothing


def _edge_mask(image: Image.Image) -> np.ndarray:
    """(height, width) booleans."""
    canny = need("skimage", "Canny's edge detector").feature.canny
    grey = np.asarray(image.convert("L"), dtype=float) / 255
    return canny(grey, sigma=SIGMA, low_threshold=0.05, high_threshold=0.12)


def edges(image: Image.Image) -> Image.Image:
    """White edges on black, RGB (Canny, 1986; scikit-image's)."""
    return Image.fromarray(np.where(_edge_mask(image), 255, 0).astype(np.uint8)).convert("RGB")


def agreement(image: Image.Image, condition: Image.Image, kind: str, within: int = 1) -> float:
    """How well an image follows its condition, 0 to 1.

    Edges: the F1 score of its own Canny edges against the condition's. Depth: the share of the depth map's steps
    where the image has an edge; inside a layer an image may have any edges it likes.

    Args:
        condition: what `edges` returned, or a depth map (0 far, 255 near), of the image's size.
        kind: edges or depth.
        within: pixels that two edges may be apart and still be the same.
    """
    _check_kind(kind)
    _check_same_size(image, condition)
    own = _edge_mask(image)
    given = np.asarray(condition.convert("L")) > 127 if kind == "edges" else _edge_mask(condition)
    if not given.any():
        return 1.0 if kind == "depth" or not own.any() else 0.0
    recall = (_grown(own, within) & given).sum() / given.sum()
    if kind == "depth":
        return float(recall)
    precision = (_grown(given, within) & own).sum() / max(1, own.sum())
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    morphology = need("skimage", "Widening edges").morphology
    return morphology.dilation(mask, morphology.disk(by))


def check(condition: Image.Image, kind: str) -> None:
    """Raises UserError if a picture can't be a condition of that kind: edges are black or white, depth is grey."""
    _check_kind(kind)
    pixels = np.asarray(condition.convert("RGB")).astype(int)
    if np.ptp(pixels, axis=-1).max() > 8:
        raise UserError(
            f"A condition of kind {kind} has no colours: give edges "
            "(fluxnb.models.control.edges) or a depth map in grey."
        )
    if kind == "edges" and np.mean((pixels > 64) & (pixels < 192)) > 0.2:
        raise UserError(
            "Edges are white lines on black, and this picture is grey: use fluxnb.models.control.edges on it."
        )


def _check_kind(kind: str) -> None:
    if kind not in MODES:
        raise UserError(f"A condition of kind {kind!r}: choose one of {', '.join(MODES)}.")


def _check_same_size(image: Image.Image, condition: Image.Image) -> None:
    if image.size != condition.size:
        raise UserError(
            f"The condition is {condition.width}×{condition.height} pixels and the image {image.width}×{image.height}: "
            "give both in one size."
        )
