"""How near an image comes to its reference: PSNR and SSIM from 8-bit pixels in float64, ST-LPIPS and FLIP beside them.

Two identical images have an infinite PSNR. It is kept out of every mean and counted instead, since no finite
figure stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fluxnb.errors import UserError
from fluxnb.measure import perceptual

BLACK = "the image to compare with is black"
_TAPS = 11  # the window of Wang et al. 2004: 11 x 11 Gaussian, sigma 1.5


def psnr(a, b, where=None) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 HxWx3 images; inf when they are identical.

    Takes arrays or PIL images. Peak 255, mean squared error over all channels of all pixels, or of those `where`
    (HxW booleans) is true. Raises ValueError for another type, unequal sizes, or no pixel.
    """
    a, b = _pair(a, b)
    error = np.mean(np.square(a - b)) if where is None else _error_where(a, b, np.asarray(where))
    return math.inf if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a, b) -> float:
    """Structural similarity of two uint8 HxWx3 images, 1 when they are identical.

    Wang, Bovik, Sheikh, Simoncelli 2004: Gaussian window (11 taps, sigma 1.5), K1 = 0.01, K2 = 0.03,
    population covariance, mean over the three channels and over the pixels whose window lies inside the
    image. Raises ValueError for another type, unequal sizes, or a side below 11 pixels.
    """
    a, b = _pair(a, b)
    if min(a.shape[:2]) < _TAPS:
        raise ValueError(f"SSIM needs sides of at least {_TAPS} pixels, got {a.shape[1]}x{a.shape[0]}")
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a = _blurred(a * a) - mean_a**2
    var_b = _blurred(b * b) - mean_b**2
    cov = _blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return float(np.mean(likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def compare(references: Sequence, candidates: Sequence, *, each: bool = False) -> dict:
    """Columns of a results row, of images pair by pair: the mean and the worst of PSNR, SSIM, ST-LPIPS and FLIP.

    psnr_db is the mean of the decibels over the pairs that differ, psnr_min_db the worst of them; both are
    None when all pairs are identical. psnr_identical counts the identical pairs. The others are means over all
    pairs, whose images are of one size. Raises ValueError for no images, unequal numbers, or a size too small, and
    UserError for a black reference: what isn't a number ends as black, and two of these aren't alike.

    Args:
        each: with `each`, PSNR (None where identical) and ST-LPIPS of every pair in their order.
    """
    if len(references) != len(candidates) or not len(references):
        raise ValueError(f"pairs of images are needed, got {len(references)} references, {len(candidates)} candidates")
    pairs = list(zip(references, candidates, strict=True))
    if not all(np.asarray(a).any() for a in references):
        raise UserError(f"{BLACK.capitalize()}, as what is no number ends: use another number format or model.")
    decibels = [psnr(a, b) for a, b in pairs]
    likeness = [ssim(a, b) for a, b in pairs]
    apart = [pair for pair, d in zip(pairs, decibels, strict=True) if d != math.inf]
    seen = perceptual.st_lpips([a for a, _ in apart], [b for _, b in apart])
    errors = [perceptual.flip(a, b)[0] for a, b in apart]
    finite = [d for d in decibels if d != math.inf]
    near = iter(seen)
    every = {
        "psnr_db": [None if d == math.inf else round(d, 3) for d in decibels],
        "st_lpips": [0.0 if d == math.inf else round(next(near), 5) for d in decibels],
    }
    return {
        **({"each": every} if each else {}),
        "psnr_db": sum(finite) / len(finite) if finite else None,
        "psnr_min_db": min(finite, default=None),
        "psnr_identical": len(pairs) - len(finite),
        "ssim": sum(likeness) / len(pairs),
        "ssim_min": min(likeness),
        "st_lpips": sum(seen) / len(pairs),  # identical pairs are 0
        "st_lpips_max": max(seen, default=0.0),
        "flip": sum(errors) / len(pairs),
        "flip_max": max(errors, default=0.0),
    }


def format_psnr(psnr_db: float | None, identical: int = 0) -> str:
    """PSNR as text: "33.2 dB", "identical" (inf, or None with `identical` pairs), or "not measured"."""
    if psnr_db == math.inf or (psnr_db is None and identical):
        return "identical"
    if psnr_db is None or math.isnan(psnr_db):
        return "not measured"
    return f"{psnr_db:.1f} dB"


def in_words(reference, image) -> str:
    """What a pair of images differs in: "33.2 dB, ST-LPIPS 0.012, FLIP 0.034", or "identical"."""
    if not np.asarray(reference).any():
        return BLACK
    found = compare([reference], [image])
    words = format_psnr(found["psnr_db"], found["psnr_identical"])
    return words if found["psnr_identical"] else f"{words}, ST-LPIPS {found['st_lpips']:.3f}, FLIP {found['flip']:.3f}"


def _error_where(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    if where.shape != a.shape[:2] or not where.any():
        raise ValueError(f"a mask of {a.shape[:2]} with pixels in it is needed, got {where.shape} with {where.sum()}")
    return float(np.mean(np.square(a - b)[where]))


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    for image in (a, b):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"a uint8 HxWx3 image is needed, got {image.dtype} {image.shape}")
    if a.shape != b.shape:
        raise ValueError(f"images of one size are needed, got {a.shape} and {b.shape}")
    return a.astype(np.float64), b.astype(np.float64)


def _blurred(x: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H-10, W-10, 3]: Gaussian-weighted means over the windows that lie inside."""
    offsets = np.arange(_TAPS) - _TAPS // 2
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    height, width = x.shape[0] - _TAPS + 1, x.shape[1] - _TAPS + 1
    rows = sum(w * x[i : i + height] for i, w in enumerate(weights))
    return sum(w * rows[:, i : i + width] for i, w in enumerate(weights))
