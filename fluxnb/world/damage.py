"""Damage to all of an image: what a judge of images has to fail. To parts of it: `fluxnb.world.parts`.

`WHOLE` is kind -> f(images, strength, luck, other images) -> images: float (n, 3, h, w) in [0, 1], strength from 0
(little) to 1 (nothing is left). The probe is trained with all but `UNSEEN`, and evaluated with all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RUINED_DB = 18.0  # PSNR to the undamaged drawing at and below which nothing counts as found
UNSEEN = ("motion", "pixels", "hue")  # not trained with: does the probe know others of their like?


@dataclass
class Luck:
    """Where a damage gets its chance from: one number for a batch from `rng`, one for each pixel from `generator`."""

    rng: random.Random
    generator: torch.Generator

    @staticmethod
    def of(seed: int, device: str | torch.device = "cpu") -> Luck:
        return Luck(random.Random(seed), torch.Generator(device).manual_seed(seed))

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape or like.shape, device=like.device, generator=self.generator)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        return torch.rand(shape or like.shape, device=like.device, generator=self.generator)


# --- what damages are made of ---------------------------------------------------------------------------------


def smooth(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Convolves rows with `across` and columns with `down` (1-D kernels of odd length), edges repeated."""
    return _band(down, x.shape[-2]).to(x) @ x @ _band(across, x.shape[-1]).to(x).T


def _band(kernel: Tensor, side: int) -> Tensor:
    """A convolution as a matrix (side, side)."""
    reach = len(kernel) // 2
    at = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, at, kernel.expand(side, -1))


def flat(reach: int) -> Tensor:
    """The kernel of a mean over 2 * reach + 1 pixels."""
    return torch.full((2 * reach + 1,), 1 / (2 * reach + 1))


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels."""
    reach = min(math.ceil(2.5 * sigma), 60)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return smooth(x, kernel / kernel.sum(), kernel / kernel.sum())


def _moved(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Every pixel taken from (across, down) pixels away, each (n or 1, h or 1, w or 1); edges repeated."""
    n, _, h, w = x.shape
    columns = (torch.arange(w, device=x.device) + across + 0.5) * 2 / w - 1
    rows = (torch.arange(h, device=x.device)[:, None] + down + 0.5) * 2 / h - 1
    grid = torch.stack(torch.broadcast_tensors(columns, rows), -1).expand(n, h, w, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def resized(x: Tensor, side: int, up: str) -> Tensor:
    """Made `side` pixels wide and high, and as large as before again."""
    small = F.interpolate(x, (max(2, side), max(2, side)), mode="area")
    return F.interpolate(small, x.shape[-2:], mode=up, align_corners=None if up == "nearest" else False)


def grain(x: Tensor, luck: Luck, side: int, channels: int, up: str = "nearest", draw=Luck.normal) -> Tensor:
    """Noise in `side` x `side` patches, of the size of `x`."""
    return F.interpolate(draw(luck, x, len(x), channels, side, side), x.shape[-2:], mode=up)


def _tiles(x: Tensor, side: int) -> Tensor:
    """(n, c, h, w) to (n, c, rows, columns, side, side)."""
    return x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)


def _together(tiles: Tensor) -> Tensor:
    return tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def factors(x: Tensor, *values: float) -> Tensor:
    """A number for each channel."""
    return x.new_tensor(values).reshape(3, 1, 1)


# --- the kinds that take more than a line ---------------------------------------------------------------------


def _salt(x, k, luck, _):
    channels, share = luck.rng.choice((1, 3)), 0.02 + 0.7 * k
    u = luck.uniform(x, len(x), channels, *x.shape[2:])
    return x.masked_fill(u < share / 2, 0.0).masked_fill(u > 1 - share / 2, 1.0)


def _grain(x, k, luck, _):
    side, channels = luck.rng.choice((4, 8, 16, 32, 64)), luck.rng.choice((1, 3))
    return x + (0.05 + 0.7 * k) * grain(x, luck, side, channels, luck.rng.choice(("nearest", "bilinear")))


def _stripes(x, k, luck, _):
    angle, period = luck.rng.uniform(0, math.pi), luck.rng.uniform(3, 24)
    along = torch.arange(x.shape[-1], device=x.device)
    wave = torch.sin((math.cos(angle) * along + math.sin(angle) * along[:, None]) * 2 * math.pi / period)
    return x + (0.05 + 0.7 * k) * (wave.sign() if luck.rng.random() < 0.5 else wave)


def _motion(x, k, luck, _):
    angle, length = luck.rng.uniform(0, math.pi), 4 + 80 * k
    steps = x.new_tensor([i / 24 - 0.5 for i in range(25)]).reshape(-1, 1, 1, 1) * length
    return torch.stack([_moved(x, math.cos(angle) * s, math.sin(angle) * s) for s in steps]).mean(0)


def _cosines(x, k, luck, _):
    """8 x 8 cosine transform, coefficients rounded to multiples of a step, as JPEG does."""
    i = torch.arange(8, device=x.device)
    basis = torch.cos((2 * i + 1) * i[:, None] * math.pi / 16) * torch.where(i[:, None] == 0, 0.125, 0.25).sqrt()
    step = (0.1 + 2.5 * k) * (1 + luck.rng.choice((0.0, 0.15)) * (i + i[:, None]))
    coarse = ((basis @ (_tiles(x, 8) - 0.5) @ basis.T) / step).round() * step
    return _together(basis.T @ coarse @ basis + 0.5)


def shuffle(x, k, luck, _):
    """Square tiles change places."""
    tiles = _tiles(x, luck.rng.choice((4, 8, 16, 32)))
    flat, count = tiles.flatten(2, 3), tiles.shape[2] * tiles.shape[3]
    chosen = luck.rng.sample(range(count), max(2, round(count * (0.05 + 0.95 * k))))
    order = torch.arange(count)
    order[chosen] = torch.tensor(chosen[1:] + chosen[:1])
    return _together(flat[:, :, order.to(x.device)].unflatten(2, tiles.shape[2:4]))


def _fade(x, k, luck, _):
    """Contrast lost towards a grey level, or brightness moved, or a gamma."""
    how, level = luck.rng.randrange(4), luck.rng.random()
    if how == 0:
        return torch.lerp(x, torch.full_like(x, level), 0.1 + 0.9 * k)
    if how == 1:
        return x + luck.rng.choice((-1, 1)) * (0.05 + 0.8 * k)
    if how == 2:
        return x * luck.rng.choice((1 - 0.95 * k, 1 + 5 * k))
    return x.clamp(1e-3, 1) ** luck.rng.choice((1 + 6 * k, 1 / (1 + 6 * k)))


def _swap(x, k, luck, _):
    order = luck.rng.choice(((0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)))
    return torch.lerp(x, x[:, order], 0.2 + 0.8 * k)


def _hue(x, k, luck, _):
    """Colours turned around the grey axis."""
    angle = luck.rng.choice((-1, 1)) * math.pi * (0.05 + 0.95 * k)
    c, s, third = math.cos(angle), math.sin(angle) / math.sqrt(3), (1 - math.cos(angle)) / 3
    return torch.einsum("oc,nchw->nohw", x.new_tensor([[c, -s, s], [s, c, -s], [-s, s, c]]) + third, x)


def _tint(x, k, luck, _):
    """One channel lost or drowned, or every colour multiplied."""
    by = factors(x, *(luck.rng.uniform(1 - 1.2 * k, 1 + 1.2 * k) for _ in range(3)))
    return x * by + (0.5 * k * luck.rng.uniform(-1, 1) if k > 0.3 else 0)


def _invert(x, k, luck, _):
    if luck.rng.random() < 0.5:
        return torch.lerp(x, 1 - x, 0.1 + 0.9 * k)
    return torch.where(x > 1 - 0.9 * k, 1 - x, x)  # solarised


def _grey(x, k, luck, _):
    grey = x.mean(1, keepdim=True) * factors(x, *luck.rng.choice(((1, 1, 1), (1.1, 0.95, 0.75))))
    return torch.lerp(x, grey, 0.2 + 0.8 * k)


def _ghost(x, k, luck, others):
    how = luck.rng.randrange(4)
    if how == 0:
        return torch.maximum(x, others * (0.3 + 0.7 * k))
    if how == 1:
        return torch.minimum(x, 1 - (1 - others) * (0.3 + 0.7 * k))
    return torch.lerp(x, others, 0.08 + 0.62 * k)


def _wave(x, k, luck, _):
    along, reach = torch.arange(x.shape[-1], device=x.device), 1.5 + 24 * k
    a, b = (torch.sin(along * 2 * math.pi / luck.rng.uniform(6, 50) + luck.rng.uniform(0, 7)) for _ in range(2))
    return _moved(x, reach * a[None, :, None], reach * b[None, None] * luck.rng.choice((0, 1)))


def scatter(x, k, luck, _):
    """Every pixel taken from somewhere near, or every patch."""
    side = luck.rng.choice((8, 16, 32, 128))
    return _moved(x, *((1 + 20 * k) * grain(x, luck, side, 1, "bicubic")[:, 0] for _ in range(2)))


def _glitch(x, k, luck, _):
    """Bands of rows, or of columns, moved sideways."""
    bands = luck.normal(x, len(x), 1, luck.rng.choice((8, 16, 32, 64)), 1)
    by = (2 + 50 * k) * F.interpolate(bands, (x.shape[-2], 1), mode="nearest")[:, 0]
    return _moved(x, by, by * 0) if luck.rng.random() < 0.5 else _moved(x, by.mT * 0, by.mT)


def _missing(x, k, luck, _):
    """A large part of the image is lost."""
    share, side = 0.1 + 0.9 * k, x.shape[-1]
    h, w = (min(side, max(4, round(side * math.sqrt(share) ** luck.rng.uniform(0.6, 1.4)))) for _ in range(2))
    top, left = luck.rng.randint(0, side - h), luck.rng.randint(0, side - w)
    grey = x.new_full((1, 3, 1, 1), luck.rng.random())
    fill = luck.rng.choice((grey, luck.uniform(x), luck.uniform(x, len(x), 3, 1, 1)))
    lost = torch.zeros_like(x[:, :1], dtype=torch.bool)
    lost[:, :, top : top + h, left : left + w] = True
    return torch.where(lost, fill, x)


def _sharp(x, k, luck, _):
    fine = x - gaussian(x, luck.rng.uniform(0.7, 3))
    return fine * (1 + 9 * k) + (0.5 if luck.rng.random() < 0.5 else x)


_TURNS = (lambda y: y.flip(2), lambda y: y.mT, lambda y: y.mT.flip(3), lambda y: y.flip(2, 3))
WHOLE: dict[str, Callable[[Tensor, float, Luck, Tensor], Tensor]] = {
    "noise": lambda x, k, luck, _: x + (0.03 + 0.8 * k) * luck.normal(x),
    "uniform noise": lambda x, k, luck, _: torch.lerp(x, luck.uniform(x), 0.1 + 0.9 * k),
    "salt and pepper": _salt,
    "speckle": lambda x, k, luck, _: x * (1 + (0.1 + 2 * k) * luck.normal(x)),
    "grain": _grain,
    "stripes": _stripes,
    "blur": lambda x, k, *_: gaussian(x, 0.8 + 24 * k**1.5),
    "box blur": lambda x, k, luck, _: smooth(x, *(flat(int(1 + 30 * k * luck.rng.uniform(0.7, 1))) for _ in range(2))),
    "motion": _motion,
    "coarse cosines": _cosines,
    "pixels": lambda x, k, *_: resized(x, round(x.shape[-1] / (2 + 30 * k)), "nearest"),
    "low resolution": lambda x, k, luck, _: resized(
        x, round(64 * (1 - k) ** 1.5), luck.rng.choice(("bilinear", "bicubic"))
    ),
    "shuffle": shuffle,
    "poster": lambda x, k, luck, _: (x * (5 - 4 * k) + luck.rng.uniform(-0.4, 0.4)).round() / (5 - 4 * k),
    "fade": _fade,
    "swap": _swap,
    "hue": _hue,
    "tint": _tint,
    "invert": _invert,
    "grey": _grey,
    "ghost": _ghost,
    "patchwork": lambda x, k, luck, others: torch.where(
        grain(x, luck, luck.rng.choice((2, 4, 8, 16)), 1, draw=Luck.uniform) < 0.1 + 0.5 * k, others, x
    ),
    "wave": _wave,
    "scatter": scatter,
    "glitch": _glitch,
    "missing": _missing,
    "turned": lambda x, k, luck, _: luck.rng.choice(_TURNS)(x),  # upside down, or lying on its side
    "sharp": _sharp,
}


# --- how much of it ---------------------------------------------------------------------------------------------


def whole(kind: str, images: Tensor, strength: float, luck: Luck, others: Tensor) -> Tensor:
    """All of each image damaged; `others` are images to mix in, as many."""
    return WHOLE[kind](images, strength, luck, others).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Of each image of two batches, in dB (n,); 100 at most."""
    return -10 * (one - other).pow(2).mean((1, 2, 3)).clamp(min=1e-10).log10()


def ruined(kind: str, images: np.ndarray, seed: int, device: str | torch.device = "cpu", steps: int = 25):
    """The mildest damage of a kind that takes each image to RUINED_DB or less.

    `images` are uint8 (n, h, w, 3), at least two. Returns uint8 images (m, h, w, 3) and the indices (m,) they belong
    to: an image that no strength of this kind takes so far is left out.
    """
    clean = from_bytes(images).to(device)
    damaged, others, left = clean.clone(), clean.roll(1, 0), torch.arange(len(clean), device=device)
    for step in range(steps):
        now = whole(kind, clean[left], step / (steps - 1), Luck.of(seed + step, device), others[left])
        now = (now * 255).round() / 255
        done = psnr(now, clean[left]) <= RUINED_DB
        damaged[left[done]], left = now[done], left[~done]
        if not len(left):
            break
    reached = [i for i in range(len(clean)) if i not in set(left.tolist())]
    return to_bytes(damaged[reached]), reached


def from_bytes(images: np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> np.ndarray:
    """float (n, 3, h, w) in [0, 1] to uint8 (n, h, w, 3)."""
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
