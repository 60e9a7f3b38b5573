"""Damage to a part of an image: one thing destroyed, missing, doubled or exchanged, the rest as it was drawn.

A part is found by drawing the scene without it, so there is no list of boxes; `CONTENT` is what its place is filled
with. `altered` draws what the grammar doesn't know: wrong words on a sign, things that nobody holds. Images are float
(n, 3, h, w) in [0, 1] where not said otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fluxnb.world import damage, probe, scenes
from fluxnb.world.damage import Luck
from fluxnb.world.scenes import Scene

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
UNSEEN = ("pixels", "stripes")  # of CONTENT: not trained with
SOFT = {"blur", "smear", "melted", "pixels", "shuffle"}  # of CONTENT: a colour may still be made out
SHAPES = ("outline", "box", "ellipse")


class Without(scenes.Canvas):
    """A canvas on which some layers are not drawn, counted from the first nearer than the background's."""

    def __init__(self, left_out: tuple[int, ...], background: float, side: int, light=(1.0, 1.0, 1.0)):
        super().__init__(side, light)
        self.left_out, self.background, self.at = left_out, background, -1
        self.shown, self.hidden = (self.image, self.pen), scenes.Canvas(side)

    def layer(self, nearness: float) -> None:
        self.at += nearness >= self.background
        hidden = self.at in self.left_out
        self.image, self.pen = (self.hidden.image, self.hidden.pen) if hidden else self.shown


def parts(scene: Scene) -> dict[str, tuple[str, ...]]:
    """The parts of a scene that can be destroyed, and the facts that go with each."""
    facts = dict(scene.facts)
    found = {name: tuple(f for f in lost if f in facts) for name, (_, lost) in PARTS[facts["family"]].items()}
    return {name: lost for name, lost in found.items() if lost}


def drawn(scene: Scene, seed: int, **instead: str) -> np.ndarray:
    """The drawing, uint8 (h, w, 3), with some facts exchanged for others."""
    return np.asarray(scenes.draw(replace(scene, facts=tuple((dict(scene.facts) | instead).items())), seed))


def erased(scene: Scene, seed: int, part: str) -> np.ndarray:
    """The drawing without one of its `parts`, uint8 (h, w, 3): what stood behind it is seen."""
    if part == "sign":  # the plate stays, blank
        return drawn(scene, seed, sign="")
    family = dict(scene.facts)["family"]
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
    how, letters = rng.randrange(4), "abcdefghijklmnopqrstuvwxyz"
    if how == 2:
        wrong = " ".join(word[::-1] for word in words.split())
    elif how:
        mixed = rng.sample(words.replace(" ", ""), len(words.replace(" ", "")))
        wrong = "".join(
            letter if letter == " " else rng.choice(letters) if how == 1 else mixed.pop() for letter in words
        )
    same = not how or sum(a == b for a, b in zip(wrong, words, strict=True)) > len(words) / 2 or wrong in scenes.SIGNS
    return rng.choice(_WORDS) if same else wrong


def altered(scene: Scene, seed: int) -> tuple[np.ndarray, list[int]]:
    """A drawing of what the grammar doesn't know, uint8 (h, w, 3), and its labels."""
    rng, facts = random.Random(f"altered {seed}"), dict(scene.facts)
    family, target = facts["family"], dict(zip(probe.ANSWERS, probe.labels(scene), strict=True))
    if family == "animal":
        gone, picture = ["sign"], drawn(scene, seed, sign=_wrong_words(facts["sign"], rng))
    elif family == "portrait":
        if facts["held"] == "camera":
            target["held colour"] = probe.LEFT_OUT
        things = [kind for kind in scenes.KINDS if kind not in scenes.HELD]
        gone, picture = ["held"], drawn(scene, seed, held=rng.choice(things))
    elif family == "city":  # half one age, half another
        target["neon lights"] = probe.LEFT_OUT
        second = drawn(scene, seed, city=rng.choice([c for c in scenes.CITIES if c != facts["city"]]))
        left = np.arange(scenes.SIZE)[:, None] < scenes.SIZE // 2
        gone, picture = ["city"], np.where(left, drawn(scene, seed), second)
    else:
        i = rng.randrange(int(facts["count"]))
        gone, picture = [f"kind{i}", f"colour{i}"], drawn(scene, seed, **{f"kind{i}": "camera"})
    return picture, list((target | {name: len(scenes.FACTS[name]) for name in gone}).values())


# --- what its place is filled with ----------------------------------------------------------------------------


def _flat(x, luck, *_):
    how = luck.rng.randrange(3)
    if how == 0:
        return luck.uniform(x, len(x), 3, 1, 1).expand_as(x)
    return x.mean((2, 3), keepdim=True).expand_as(x) if how == 1 else torch.full_like(x, luck.rng.choice((0, 0.5, 1)))


def _static(x, luck, *_):
    side, channels = luck.rng.choice((16, 32, 64, 128)), luck.rng.choice((1, 3))
    return damage.grain(x, luck, side, channels, draw=Luck.uniform).expand_as(x)


def _smear(x, luck, *_):
    long, short = damage.flat(luck.rng.randint(18, 32)), damage.flat(1)
    return damage.smooth(x, *((long, short) if luck.rng.random() < 0.5 else (short, long)))


# f(images, luck, other images, images without the part) -> what fills the part
CONTENT: dict[str, Callable[..., Tensor]] = {
    "erased": lambda x, luck, others, without: without,
    "flat": _flat,
    "static": _static,
    "noise": lambda x, luck, others, _: damage.WHOLE["noise"](x, luck.rng.uniform(0.8, 1.0), luck, others),
    "other": lambda x, luck, others, _: others.flip(2).roll(luck.rng.randint(-40, 40), 3),
    "shuffle": lambda x, luck, others, _: damage.shuffle(x, 1.0, luck, others),
    "blur": lambda x, luck, *_: damage.gaussian(x, luck.rng.uniform(7, 16)),
    "smear": _smear,
    "melted": lambda x, luck, others, _: damage.scatter(x, luck.rng.uniform(0.4, 0.8), luck, others),
    "pixels": lambda x, luck, *_: damage.resized(x, luck.rng.choice((8, 10, 12)), "nearest"),
    "stripes": lambda x, luck, others, _: damage.WHOLE["stripes"](x * 0 + 0.5, 1.0, luck, others),
}


def region(clean: Tensor, without: Tensor, shape: str = "outline", margin: int = 2) -> Tensor:
    """Where a part is: the pixels (n, 1, h, w) that change without it, or the box or ellipse around them."""
    changed = ((clean - without).abs().amax(1, keepdim=True) > 0.02).float()
    changed = F.max_pool2d(changed, 2 * margin + 1, 1, margin) > 0
    if shape == "outline":
        return changed
    inside, distance = torch.ones_like(changed), torch.zeros_like(clean[:, :1])
    for along, across in ((2, 3), (3, 2)):
        line = changed.any(across, keepdim=True)
        begun = line.cumsum(along) > 0
        between = begun & (line.flip(along).cumsum(along).flip(along) > 0)
        length = between.sum(along, keepdim=True).clamp(min=1)
        distance = distance + ((2 * begun.cumsum(along) - 1 - length) / length).pow(2)
        inside = inside & between
    return inside & (distance <= 1.15) if shape == "ellipse" else inside


def local(content: str, clean: Tensor, without: Tensor, shape: str, luck: Luck, others: Tensor) -> Tensor:
    """The part that `without` lacks is destroyed: its region filled with `content`, a key of CONTENT."""
    fill = CONTENT[content](clean, luck, others, without).clamp(0, 1)
    return torch.where(region(clean, without, shape, luck.rng.randint(1, 3)), fill, clean)


def doubled(clean: Tensor, without: Tensor, across: int, down: int) -> Tensor:
    """The part that `without` lacks a second time, moved by (across, down) pixels: beside it, or on another one."""
    copy, there = (t.roll((down, across), (2, 3)) for t in (clean, region(clean, without, margin=0)))
    return torch.where(there, copy, clean)
