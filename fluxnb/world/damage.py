"""Damaged images: what a judge of images has to fail. The probe's negative controls, and the tests'.

`WHOLE` damages all of an image, by a strength from 0 (little) to 1 (nothing is left). `CONTENT` fills a part of it;
the parts are found by drawing the scene without them (`PARTS`), so there is no list of boxes. `altered` draws what
the grammar doesn't know: wrong words on a sign, things that nobody holds. Images are float (n, 3, h, w) in [0, 1].
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fluxnb.world import probe, scenes
from fluxnb.world.scenes import Scene

RUINED_DB = 18.0  # PSNR to the undamaged drawing at and below which nothing counts as found
UNSEEN = ("motion", "pixels", "hue")  # damages that the probe isn't trained with: does it know others of their like?
UNSEEN_CONTENT = ("pixels", "stripes")


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


# --- all of an image: f(images, strength, luck, other images) -> images ---------------------------------------


def _smooth(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Convolves rows with `across` and columns with `down` (1-D kernels of odd length), edges repeated."""
    return _band(down, x.shape[-2]).to(x) @ x @ _band(across, x.shape[-1]).to(x).T


def _band(kernel: Tensor, side: int) -> Tensor:
    """A convolution as a matrix (side, side)."""
    reach = len(kernel) // 2
    at = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, at, kernel.expand(side, -1))


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels."""
    reach = min(math.ceil(2.5 * sigma), 60)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return _smooth(x, kernel / kernel.sum(), kernel / kernel.sum())


def _flat_kernel(length: int) -> Tensor:
    return torch.full((length,), 1 / length)


def _moved(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Every pixel taken from (across, down) pixels away, each (n or 1, h or 1, w or 1); edges repeated."""
    n, _, h, w = x.shape
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    grid = torch.stack(
        torch.broadcast_tensors(
            (columns + across + 0.5) * 2 / w - 1 + 0 * rows, (rows + down + 0.5) * 2 / h - 1 + 0 * columns
        ),
        -1,
    )
    return F.grid_sample(x, grid.expand(n, h, w, 2), padding_mode="border", align_corners=False)


def _resized(x: Tensor, side: int, up: str) -> Tensor:
    small = F.interpolate(x, (side, side), mode="area")
    return F.interpolate(small, x.shape[-2:], mode=up, align_corners=None if up == "nearest" else False)


def _noise(x, k, luck, _):
    return x + (0.03 + 0.8 * k) * luck.normal(x)


def _uniform(x, k, luck, _):
    return torch.lerp(x, luck.uniform(x), 0.1 + 0.9 * k)


def _salt(x, k, luck, _):
    channels, share = luck.rng.choice((1, 3)), 0.02 + 0.7 * k
    u = luck.uniform(x, len(x), channels, *x.shape[2:])
    return x.masked_fill(u < share / 2, 0.0).masked_fill(u > 1 - share / 2, 1.0)


def _speckle(x, k, luck, _):
    return x * (1 + (0.1 + 2 * k) * luck.normal(x))


def _grain(x, k, luck, _):
    side, channels = luck.rng.choice((4, 8, 16, 32, 64)), luck.rng.choice((1, 3))
    grain = luck.normal(x, len(x), channels, side, side)
    return x + (0.05 + 0.7 * k) * F.interpolate(grain, x.shape[-2:], mode=luck.rng.choice(("nearest", "bilinear")))


def _stripes(x, k, luck, _):
    angle, period = luck.rng.uniform(0, math.pi), luck.rng.uniform(3, 24)
    along = torch.arange(x.shape[-1], device=x.device)
    wave = torch.sin((math.cos(angle) * along + math.sin(angle) * along[:, None]) * 2 * math.pi / period)
    wave = wave.sign() if luck.rng.random() < 0.5 else wave
    return x + (0.05 + 0.7 * k) * wave


def _gaussian(x, k, luck, _):
    return gaussian(x, 0.8 + 24 * k**1.5)


def _box(x, k, luck, _):
    return _smooth(x, *(_flat_kernel(2 * int(1 + 30 * k * luck.rng.uniform(0.7, 1)) + 1) for _ in range(2)))


def _motion(x, k, luck, _):
    angle, length = luck.rng.uniform(0, math.pi), 4 + 80 * k
    steps = torch.linspace(-length / 2, length / 2, 25).tolist()
    across, down = ([x.new_tensor(f(angle) * s).reshape(1, 1, 1) for s in steps] for f in (math.cos, math.sin))
    return torch.stack([_moved(x, a, d) for a, d in zip(across, down, strict=True)]).mean(0)


def _blocks(x, k, luck, _):
    """8 x 8 cosine transform, coefficients rounded to multiples of a step, as JPEG does."""
    n, c, h, w = x.shape
    i = torch.arange(8, device=x.device)
    cosines = torch.cos((2 * i + 1) * i[:, None] * math.pi / 16) * torch.where(i[:, None] == 0, 0.125, 0.25).sqrt()
    tiles = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    step = (0.1 + 2.5 * k) * (1 + luck.rng.choice((0.0, 0.15)) * (i + i[:, None]))
    coarse = ((cosines @ (tiles - 0.5) @ cosines.T) / step).round() * step
    return (cosines.T @ coarse @ cosines + 0.5).transpose(3, 4).reshape(n, c, h, w)


def _pixels(x, k, luck, _):
    return _resized(x, max(2, round(x.shape[-1] / (2 + 30 * k))), "nearest")


def _small(x, k, luck, _):
    return _resized(x, max(2, round(64 * (1 - k) ** 1.5)), luck.rng.choice(("bilinear", "bicubic")))


def _shuffle(x, k, luck, _):
    """Square tiles change places."""
    n, c, h, w = x.shape
    tile = luck.rng.choice((4, 8, 16, 32))
    tiles = x.reshape(n, c, h // tile, tile, w // tile, tile).transpose(3, 4).flatten(2, 3)
    count = tiles.shape[2]
    chosen = luck.rng.sample(range(count), max(2, round(count * (0.05 + 0.95 * k))))
    order = list(range(count))
    for to, source in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        order[to] = source
    tiles = tiles[:, :, torch.tensor(order, device=x.device)].unflatten(2, (h // tile, w // tile))
    return tiles.transpose(3, 4).reshape(n, c, h, w)


def _poster(x, k, luck, _):
    levels = 5 - 4 * k
    return (x * levels + luck.rng.uniform(-0.4, 0.4)).round() / levels


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
    turn = x.new_tensor([[c, -s, s], [s, c, -s], [-s, s, c]]) + third
    return torch.einsum("oc,nchw->nohw", turn, x)


def _tint(x, k, luck, _):
    """One channel lost or drowned, or every colour multiplied."""
    factors = [luck.rng.uniform(1 - 1.2 * k, 1 + 1.2 * k) for _ in range(3)]
    return x * x.new_tensor(factors).reshape(3, 1, 1) + (0.5 * k * luck.rng.uniform(-1, 1) if k > 0.3 else 0)


def _invert(x, k, luck, _):
    if luck.rng.random() < 0.5:
        return torch.lerp(x, 1 - x, 0.1 + 0.9 * k)
    return torch.where(x > 1 - 0.9 * k, 1 - x, x)  # solarised


def _grey(x, k, luck, _):
    grey = x.mean(1, keepdim=True) * x.new_tensor(luck.rng.choice(((1, 1, 1), (1.1, 0.95, 0.75)))).reshape(3, 1, 1)
    return torch.lerp(x, grey, 0.2 + 0.8 * k)


def _ghost(x, k, luck, others):
    how = luck.rng.randrange(4)
    if how == 0:
        return torch.maximum(x, others * (0.3 + 0.7 * k))
    if how == 1:
        return torch.minimum(x, 1 - (1 - others) * (0.3 + 0.7 * k))
    return torch.lerp(x, others, 0.08 + 0.62 * k)


def _patchwork(x, k, luck, others):
    """Parts of another image: a mosaic of both."""
    side = luck.rng.choice((2, 4, 8, 16))
    taken = F.interpolate(luck.uniform(x, len(x), 1, side, side), x.shape[-2:], mode="nearest") < 0.1 + 0.5 * k
    return torch.where(taken, others, x)


def _wave(x, k, luck, _):
    along, reach = torch.arange(x.shape[-1], device=x.device), 1.5 + 24 * k
    a, b = (torch.sin(along * 2 * math.pi / luck.rng.uniform(6, 50) + luck.rng.uniform(0, 7)) for _ in range(2))
    return _moved(x, reach * a[None, :, None], reach * b[None, None] * luck.rng.choice((0, 1)))


def _scatter(x, k, luck, _):
    """Every pixel taken from somewhere near, or every patch."""
    side = luck.rng.choice((8, 16, 32, 128))
    moved = [F.interpolate(luck.normal(x, len(x), 1, side, side), x.shape[-2:], mode="bicubic")[:, 0] for _ in range(2)]
    return _moved(x, *((1 + 20 * k) * m for m in moved))


def _glitch(x, k, luck, _):
    """Bands of rows, or of columns, moved sideways."""
    bands = luck.rng.choice((8, 16, 32, 64))
    moved = F.interpolate(luck.normal(x, len(x), 1, bands, 1), (x.shape[-2], 1), mode="nearest")[:, 0]
    moved = (2 + 50 * k) * moved
    return _moved(x, moved, moved * 0) if luck.rng.random() < 0.5 else _moved(x, moved.mT * 0, moved.mT)


def _missing(x, k, luck, others):
    """A large part of the image is lost."""
    share, side = 0.1 + 0.9 * k, x.shape[-1]
    h, w = (max(4, round(side * math.sqrt(share) ** luck.rng.uniform(0.6, 1.4))) for _ in range(2))
    h, w = min(h, side), min(w, side)
    top, left = luck.rng.randint(0, side - h), luck.rng.randint(0, side - w)
    grey = x.new_full((1, 3, 1, 1), luck.rng.random())
    fill = luck.rng.choice((grey, luck.uniform(x), luck.uniform(x, len(x), 3, 1, 1)))
    lost = torch.zeros_like(x[:, :1], dtype=torch.bool)
    lost[:, :, top : top + h, left : left + w] = True
    return torch.where(lost, fill, x)


def _turned(x, k, luck, _):
    """Upside down, or lying on its side."""
    return luck.rng.choice((lambda y: y.flip(2), lambda y: y.mT, lambda y: y.mT.flip(3), lambda y: y.flip(2, 3)))(x)


def _sharp(x, k, luck, _):
    fine = x - gaussian(x, luck.rng.uniform(0.7, 3))
    return fine * (1 + 9 * k) + (0.5 if luck.rng.random() < 0.5 else x)


WHOLE = {
    "noise": _noise,
    "uniform noise": _uniform,
    "salt and pepper": _salt,
    "speckle": _speckle,
    "grain": _grain,
    "stripes": _stripes,
    "blur": _gaussian,
    "box blur": _box,
    "motion": _motion,
    "blocks": _blocks,
    "pixels": _pixels,
    "low resolution": _small,
    "shuffle": _shuffle,
    "poster": _poster,
    "fade": _fade,
    "swap": _swap,
    "hue": _hue,
    "tint": _tint,
    "invert": _invert,
    "grey": _grey,
    "ghost": _ghost,
    "patchwork": _patchwork,
    "wave": _wave,
    "scatter": _scatter,
    "glitch": _glitch,
    "missing": _missing,
    "turned": _turned,
    "sharp": _sharp,
}


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
        luck = Luck.of(seed + step, device)
        now = rounded(whole(kind, clean[left], step / (steps - 1), luck, others[left]))
        done = psnr(now, clean[left]) <= RUINED_DB
        damaged[left[done]] = now[done]
        left = left[~done]
        if not len(left):
            break
    reached = torch.ones(len(clean), dtype=torch.bool, device=device)
    reached[left] = False
    return to_bytes(damaged[reached]), reached.nonzero()[:, 0].tolist()


def from_bytes(images) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [0, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> np.ndarray:
    """float (n, 3, h, w) in [0, 1] to uint8 (n, h, w, 3)."""
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def rounded(images: Tensor) -> Tensor:
    """As the pixels of an 8-bit image."""
    return (images * 255).round().clamp(0, 255) / 255


# --- a part of an image ---------------------------------------------------------------------------------------

# family -> part -> (which of the layers from the first that stands before the background, facts that it carries)
PARTS: dict[str, dict[str, tuple[tuple[int, ...], tuple[str, ...]]]] = {
    "composed": {f"object {i}": ((i,), (f"kind{i}", f"colour{i}")) for i in range(3)},
    "city": {"towers": ((0, 1), ("city",))},
    "portrait": {
        "face": ((1,), ("age", "sex")),
        "held": ((2,), ("held", "held colour")),
        "hands": ((3,), ("hands",)),
    },
    "animal": {"face": ((1,), ("animal",)), "sign": ((2,), ("sign",))},
}


class Without(scenes.Canvas):
    """A canvas on which some layers are not drawn, counted from the first nearer than the background's."""

    def __init__(self, left_out: tuple[int, ...], background: float, side: int, light=(1.0, 1.0, 1.0)):
        super().__init__(side, light)
        self.left_out, self.background, self.at = left_out, background, -1
        self.shown, self.hidden = (self.image, self.pen), scenes.Canvas(side)

    def layer(self, nearness: float) -> None:
        self.at += nearness >= self.background
        self.image, self.pen = self.shown
        if self.at in self.left_out:
            self.image, self.pen = self.hidden.image, self.hidden.pen


def parts(scene: Scene) -> dict[str, tuple[str, ...]]:
    """The parts of a scene that can be destroyed, and the facts that go with each."""
    facts = dict(scene.facts)
    found = {name: tuple(f for f in lost if f in facts) for name, (_, lost) in PARTS[facts["family"]].items()}
    return {name: lost for name, lost in found.items() if lost}


def erased(scene: Scene, seed: int, part: str) -> np.ndarray:
    """The drawing without one of its `parts`, uint8 (h, w, 3): what stood behind it is seen."""
    family = scene["family"] or ""
    if part == "sign":  # the plate stays, blank
        return _drawn(scene, seed, sign="")
    layers, background = PARTS[family][part][0], 0.25 if family == "city" else 0.6
    return np.asarray(scenes.render(lambda *given: Without(layers, background, *given), scene, seed))


def lost_labels(scene: Scene, part: str) -> list[int]:
    """Labels for the probe of a drawing whose `part` is destroyed: its facts are none, the others stay."""
    facts, names = dict(scene.facts), list(probe.ANSWERS)
    kept = tuple((name, value) for name, value in scene.facts if name not in parts(scene)[part])
    found = probe.labels(replace(scene, facts=kept))
    if part.startswith("object"):  # an honest reading may count one less
        found[names.index("count")] = -1 - scenes.FACTS["count"].index(facts["count"])
    if part in ("face", "towers"):  # what is a portrait without a face?
        found[names.index("family")] = probe.LEFT_OUT
    if part == "towers":
        found[names.index("neon lights")] = probe.LEFT_OUT
    return found


_WORDS = (
    *("closed", "enter", "welcome", "help", "sale", "bread", "please", "wait", "danger", "exit", "love", "peace"),
    *("good morning", "fresh fish", "keep out", "no entry", "happy new year", "free hugs", "hi", "bye", "left", "menu"),
)


def _wrong_words(words: str, rng: random.Random) -> str:
    """Something else on a sign: other words, or letters that say nothing."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    how = rng.randrange(4)
    if how == 0:
        return rng.choice(_WORDS)
    if how == 1:
        wrong = "".join(rng.choice(letters) if letter != " " else " " for letter in words)
    elif how == 2:
        wrong = words[::-1] if " " not in words else " ".join(word[::-1] for word in words.split())
    else:
        shuffled = rng.sample(words.replace(" ", ""), len(words.replace(" ", "")))
        wrong = "".join(shuffled.pop() if letter != " " else " " for letter in words)
    same = sum(a == b for a, b in zip(wrong, words, strict=True))
    return wrong if same <= len(words) / 2 and wrong not in scenes.SIGNS else rng.choice(_WORDS)


def altered(scene: Scene, seed: int) -> tuple[np.ndarray, list[int]]:
    """A drawing of what the grammar doesn't know, uint8 (h, w, 3), and its labels."""
    rng, facts, names = random.Random(f"altered {seed}"), dict(scene.facts), list(probe.ANSWERS)
    family, target = facts["family"], probe.labels(scene)

    def none(*facts):
        for name in facts:
            target[names.index(name)] = len(scenes.FACTS[name])

    if family == "animal":
        none("sign")
        return _drawn(scene, seed, sign=_wrong_words(facts["sign"], rng)), target
    if family == "portrait":
        none("held")
        if facts["held"] == "camera":
            target[names.index("held colour")] = probe.LEFT_OUT
        things = [kind for kind in scenes.KINDS if kind not in scenes.HELD]
        return _drawn(scene, seed, held=rng.choice(things)), target
    if family == "city":  # half one age, half another
        none("city")
        target[names.index("neon lights")] = probe.LEFT_OUT
        picture = _drawn(scene, seed).copy()
        second = _drawn(scene, seed, city=rng.choice([c for c in scenes.CITIES if c != facts["city"]]))
        picture[:, scenes.SIZE // 2 :] = second[:, scenes.SIZE // 2 :]
        return picture, target
    i = rng.randrange(int(facts["count"]))
    none(f"kind{i}", f"colour{i}")
    return _drawn(scene, seed, **{f"kind{i}": "camera"}), target


def _drawn(scene: Scene, seed: int, **instead: str) -> np.ndarray:
    facts = dict(scene.facts) | instead
    return np.asarray(scenes.draw(replace(scene, facts=tuple(facts.items())), seed))


def _flat(x, luck, others, erased):
    how = luck.rng.randrange(3)
    if how == 0:
        return luck.uniform(x, len(x), 3, 1, 1).expand_as(x)
    return x.mean((2, 3), keepdim=True).expand_as(x) if how == 1 else torch.full_like(x, luck.rng.choice((0, 0.5, 1)))


def _static(x, luck, others, erased):
    side = luck.rng.choice((16, 32, 64, 128))
    grain = luck.uniform(x, len(x), luck.rng.choice((1, 3)), side, side)
    return F.interpolate(grain, x.shape[-2:], mode="nearest").expand_as(x)


def _smear(x, luck, others, erased):
    long, short = _flat_kernel(2 * luck.rng.randint(18, 32) + 1), _flat_kernel(3)
    return _smooth(x, *((long, short) if luck.rng.random() < 0.5 else (short, long)))


# f(images, luck, other images, images without the part) -> what fills the part
CONTENT: dict[str, Callable[..., Tensor]] = {
    "erased": lambda x, luck, others, without: without,
    "flat": _flat,
    "static": _static,
    "noise": lambda x, luck, others, _: _noise(x, luck.rng.uniform(0.8, 1.0), luck, others),
    "other": lambda x, luck, others, _: others.flip(2).roll(luck.rng.randint(-40, 40), 3),
    "shuffle": lambda x, luck, others, _: _shuffle(x, 1.0, luck, others),
    "blur": lambda x, luck, *_: gaussian(x, luck.rng.uniform(7, 16)),
    "smear": _smear,
    "melted": lambda x, luck, others, _: _scatter(x, luck.rng.uniform(0.4, 0.8), luck, others),
    "pixels": lambda x, luck, *_: _resized(x, luck.rng.choice((8, 10, 12)), "nearest"),
    "stripes": lambda x, luck, others, _: _stripes(x * 0 + 0.5, 1.0, luck, others),
}
SOFT = {"blur", "smear", "melted", "pixels", "shuffle"}  # of these a colour may still be made out
SHAPES = ("outline", "box", "ellipse")


def region(clean: Tensor, without: Tensor, shape: str = "outline", margin: int = 2) -> Tensor:
    """Where a part is: the pixels (n, 1, h, w) that change without it, or the box or ellipse around them."""
    changed = ((clean - without).abs().amax(1, keepdim=True) > 0.02).float()
    changed = F.max_pool2d(changed, 2 * margin + 1, 1, margin) > 0
    if shape == "outline":
        return changed
    inside, distance = torch.ones_like(changed), torch.zeros_like(changed, dtype=clean.dtype)
    for along, across in ((2, 3), (3, 2)):
        line = changed.any(across, keepdim=True).to(clean.dtype)
        length = clean.shape[along]
        first = line.argmax(along, keepdim=True)
        last = length - 1 - line.flip(along).argmax(along, keepdim=True)
        place = torch.arange(length, device=clean.device).reshape((-1, 1) if along == 2 else (1, -1))
        inside = inside & (place >= first) & (place <= last)
        distance = distance + ((2 * place - first - last) / (last - first + 1)).pow(2)
    inside = inside & changed.any(-1, keepdim=True).any(-2, keepdim=True)
    return inside & (distance <= 1.15) if shape == "ellipse" else inside


def local(content: str, clean: Tensor, without: Tensor, shape: str, luck: Luck, others: Tensor) -> Tensor:
    """The part that `without` lacks is destroyed: its region filled with `content`, a key of CONTENT."""
    fill = CONTENT[content](clean, luck, others, without).clamp(0, 1)
    return torch.where(region(clean, without, shape, luck.rng.randint(1, 3)), fill, clean)


def doubled(clean: Tensor, without: Tensor, across: int, down: int) -> Tensor:
    """The part that `without` lacks a second time, moved by (across, down) pixels."""
    copy, there = (t.roll((down, across), (2, 3)) for t in (clean, region(clean, without, margin=0)))
    return torch.where(there, copy, clean)
