"""How different a person would find two images: ST-LPIPS (AlexNet) and FLIP; 0 for identical ones, more is worse.

ST-LPIPS's weights are the authors' (`st_lpips.safetensors`, BSD 2-Clause: `st_lpips.LICENSE`), the code here is our
own and equal to theirs bit for bit. FLIP comes from the package flip-evaluator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fluxnb.errors import UserError
from fluxnb.installed import need

WEIGHTS = Path(__file__).with_name("st_lpips.safetensors")
SHA256 = "2b7c3af78ac2d1d4f97542442fa894e8d190b617c5c18edc49508698ea8bf8b4"
SMALLEST = 21  # pixels of a side: below, AlexNet's third stage has nothing left to reflect
PIXELS = 2**20  # of the images that go through the network at once: about 2 GiB of activations
FEW = 16  # of so many at once an image is small enough for its features to be kept: 11 MiB at most


def st_lpips(references: Sequence, candidates: Sequence) -> list[float]:
    """Shift-tolerant LPIPS (AlexNet) of uint8 HxWx3 images of one size, pair by pair.

    Ghildyal, Liu 2022 (ECCV), in float32 on the CUDA device if there is one with room for it. Raises ValueError for a
    side below 21 pixels, UserError if the shipped weights are damaged.
    """
    height, width = np.shape(references[0])[:2] if len(references) else (SMALLEST, SMALLEST)
    if min(height, width) < SMALLEST:
        raise ValueError(f"ST-LPIPS needs sides of at least {SMALLEST} pixels, got {width}x{height}")
    if torch.cuda.is_available():
        try:
            return _distances("cuda", references, candidates, max(1, PIXELS // (height * width)))
        except torch.cuda.OutOfMemoryError:  # beside a large model: then more slowly
            pass
        finally:
            torch.cuda.empty_cache()
    return _distances("cpu", references, candidates, max(1, PIXELS // (height * width)))


def flip(reference, candidate) -> tuple[float, Image.Image]:
    """Mean FLIP error (0 to 1) of two uint8 HxWx3 images of one size, and its heat map: black is none, white is 1.

    Andersson et al. 2020, for low dynamic range, at its authors' viewing conditions: 67 pixels per degree. Raises
    UserError without the package flip-evaluator.
    """
    flip_evaluator = need("flip_evaluator", "FLIP")
    a, b = (np.asarray(image, dtype=np.float32) / 255 for image in (reference, candidate))
    colours, mean, _ = flip_evaluator.evaluate(a, b, "LDR")
    return float(mean), Image.fromarray(np.rint(255 * colours.clip(0, 1)).astype(np.uint8))


@torch.inference_mode()
def _distances(device: str, references: Sequence, candidates: Sequence, at_once: int) -> list[float]:
    weights, found = {name: w.to(device) for name, w in _weights().items()}, []
    # TF32 would round the products to ten bits
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for start in range(0, len(references), at_once):
            pairs = (images[start : start + at_once] for images in (references, candidates))
            if device == "cpu" and at_once >= FEW:  # small ones: what an image is compared with stays the same
                found += [_distance(weights, *map(_kept, pair)).item() for pair in zip(*pairs, strict=True)]
            else:
                found += _distance(weights, *(_features(weights, _tensor(images, device)) for images in pairs)).tolist()
    return found


def _kept(image) -> list[torch.Tensor]:
    pixels = np.ascontiguousarray(image)
    return _features_of(pixels.tobytes(), pixels.shape)


@lru_cache(maxsize=16)
def _features_of(pixels: bytes, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The features of one small image, which several others are compared with in turn."""
    return _features(_weights(), _tensor([np.frombuffer(pixels, np.uint8).reshape(shape)], "cpu"))


def _tensor(images: Sequence, device: str) -> torch.Tensor:
    """(n, 3, h, w) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _features(weights: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """[n, 3, h, w] -> the features of five stages, those of a pixel of length 1."""
    return [_unit(stage) for stage in _stages(weights, x)]


def _distance(weights: dict, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """Features of n images twice -> [n]: what they differ in, weighted by channel, meant over pixels."""
    total = torch.zeros(len(a[0]), device=a[0].device)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        apart = (p - q).square()
        total = total + F.conv2d(apart, weights[f"lin{i}.model.1.weight"]).mean((2, 3)).flatten()
    return total


def _stages(w: dict, x: torch.Tensor):
    """The features of AlexNet's five stages, each convolution's stride taken after a blur (Zhang 2019)."""

    def conv(x, name, padding):
        return F.conv2d(x, w[f"net.{name}.weight"], w[f"net.{name}.bias"], padding=padding)

    def blur(x, name):
        return F.conv2d(F.pad(x, [2] * 4, mode="reflect"), w[f"net.{name}.filt"], stride=2, groups=x.shape[1])

    x = F.relu(blur(conv((x - w["scaling_layer.shift"]) / w["scaling_layer.scale"], "slice1.0", 2), "slice1.1"))
    yield x
    x = F.relu(conv(blur(F.max_pool2d(x, 3, 1), "slice2.4"), "slice2.5", 2))
    yield x
    x = F.relu(conv(blur(F.max_pool2d(x, 3, 1), "slice3.8"), "slice3.9", 1))
    yield x
    x = F.relu(conv(x, "slice4.11", 1))
    yield x
    yield F.relu(conv(x, "slice5.13", 1))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


@lru_cache(maxsize=1)
def _weights(path: Path = WEIGHTS) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{path} is missing or isn't ST-LPIPS's weights any more: install fluxnb again.")
    return load(data)
