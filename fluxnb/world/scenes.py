"""The world of the embedded model: a small grammar of scenes, drawn flat-shaded with Pillow.

Every scene has a caption and a set of facts (which objects, which colours, in which order, where, when).
Because the facts are known exactly, an image can be checked against its prompt: see `fluxnb.world.probe`.

Four families of scenes, so that the study's own prompts are part of the world:

    composed  "a blue cube left of a yellow ball on grass at sunset"
    city      "a futuristic cityscape at sunset with flying cars and neon lights"
    portrait  "a photorealistic portrait of an elderly man with weathered hands holding a vintage camera"
    animal    "a cute panda holding a sign that says hello world"
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = 128  # pixels per side of an image the embedded model makes
SUPERSAMPLE = 3  # drawn this much larger, then reduced: smooth edges

COLOURS = {
    "red": (214, 44, 46),
    "orange": (242, 140, 36),
    "yellow": (246, 212, 60),
    "green": (56, 160, 76),
    "blue": (48, 104, 222),
    "purple": (136, 62, 188),
    "pink": (246, 128, 182),
    "white": (242, 242, 244),
}
KINDS = ("apple", "ball", "cube", "cone", "cup", "car", "tree", "house", "mushroom", "star")
HELD = ("camera", "apple", "ball", "cup", "star")
PLACES = {
    "grass": "on grass",
    "beach": "on a beach",
    "snow": "on snow",
    "desert": "in a desert",
    "street": "on a street",
    "white table": "on a white table",
    "wooden table": "on a wooden table",
}
OUTDOORS = ("grass", "beach", "snow", "desert", "street")
TIMES = {"morning": "in the morning", "noon": "at noon", "sunset": "at sunset", "night": "at night"}
CITIES = ("futuristic", "modern", "medieval")
ANIMALS = ("panda", "bear", "cat", "rabbit", "fox")
SIGNS = ("hello world", "hello", "good night", "thank you", "open", "stop", "yes", "no")
AGES = {"young": "a young", "elderly": "an elderly"}
SEXES = ("man", "woman")
STYLES = ("photorealistic", "painted")

STUDY_PROMPTS = (
    "A red apple on a white table",
    "A futuristic cityscape at sunset with flying cars and neon lights",
    "A photorealistic portrait of an elderly man with weathered hands holding a vintage camera",
    "A cute panda holding a sign that says hello world",
)
PROMPTS = (  # of models whose images nobody judges: they are timed with these
    *STUDY_PROMPTS,
    "a blue cube left of a yellow ball on grass at sunset",
    "a green cone, a red car and a white house on snow at night",
    "a purple cup right of an orange mushroom on a wooden table in the morning",
    "a pink star on a beach at noon",
)

# What can be said, or seen, about an image: fact name -> its possible values. The probe has a head for each.
FACTS: dict[str, tuple[str, ...]] = {
    "family": ("composed", "city", "portrait", "animal"),
    "time": tuple(TIMES),
    "place": tuple(PLACES),
    "count": ("1", "2", "3"),
    **{f"kind{i}": KINDS for i in range(3)},
    **{f"colour{i}": tuple(COLOURS) for i in range(3)},
    "city": CITIES,
    "flying cars": ("no", "yes"),
    "neon lights": ("no", "yes"),
    "style": STYLES,
    "age": tuple(AGES),
    "sex": SEXES,
    "hands": ("smooth", "weathered"),
    "held": HELD,
    "held colour": tuple(COLOURS),
    "animal": ANIMALS,
    "sign": SIGNS,
}


@dataclass(frozen=True)
class Scene:
    """What is drawn. `said` holds the facts that the caption mentions; the others are free."""

    facts: tuple[tuple[str, str], ...]
    caption: str
    said: tuple[str, ...]

    def __getitem__(self, fact: str) -> str | None:
        return dict(self.facts).get(fact)

    @property
    def key(self) -> str:
        """The mentioned facts as text: what a prompt is, apart from its wording."""
        return "; ".join(f"{name}={value}" for name, value in self.facts if name in self.said)


# --- the grammar ------------------------------------------------------------------------------------------


def article(noun_phrase: str) -> str:
    """`an elderly man`, `a red cube`."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def sample(rng: random.Random) -> Scene:
    """Draws a scene and its caption from the grammar."""
    family = rng.choices(FACTS["family"], weights=(58, 12, 15, 15))[0]
    return {"composed": _composed, "city": _city, "portrait": _portrait, "animal": _animal}[family](rng)


def held_out(scene: Scene) -> bool:
    """One prompt in sixteen never occurs in training, however it is worded; the study's own four do."""
    if scene.key in _STUDY_KEYS:
        return False
    return zlib.crc32(scene.key.encode()) % 16 == 0


def training_scene(seed: int) -> Scene:
    """The scene number `seed` of the training set."""
    return _scene_from(random.Random(f"train {seed}"), wanted=False)


def held_out_scene(seed: int) -> Scene:
    """The scene number `seed` of the set kept out of training."""
    return _scene_from(random.Random(f"held out {seed}"), wanted=True)


# families of the first prompts that judge; only two cityscapes are kept out of training
_JUDGING = 2 * (
    *("composed", "animal", "portrait", "composed", "city", "composed"),
    *("composed", "animal", "portrait", "composed", "animal", "composed"),
)


@functools.lru_cache(maxsize=16)
def judging(count: int) -> tuple[str, ...]:
    """The first prompts that judge images: kept out of training, no two alike, of every family."""
    return _of_families(held_out_scene, 1_000_000, count)


@functools.lru_cache(maxsize=16)
def planning(count: int) -> tuple[str, ...]:
    """Prompts that plan for those that judge: of the training set, no two alike, of the same families in turn."""
    return _of_families(training_scene, 0, count)


def _of_families(draw: Callable[[int], Scene], first: int, count: int) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for seed in itertools.count(first):
        if len(found) == count:
            break
        scene, at = draw(seed), len(found)
        if at >= len(_JUDGING) or scene["family"] == _JUDGING[at]:
            found.setdefault(scene.key, scene.caption)
    return tuple(found.values())


def _scene_from(rng: random.Random, wanted: bool) -> Scene:
    while True:
        scene = sample(rng)
        if held_out(scene) is wanted:
            return scene


def _composed(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), weights=(25, 45, 30))[0]
    kinds = [rng.choice(KINDS) for _ in range(count)]
    colours = [rng.choice(tuple(COLOURS)) for _ in range(count)]
    facts = {"family": "composed", "count": str(count)}
    for i, (kind, colour) in enumerate(zip(kinds, colours, strict=True)):
        facts |= {f"kind{i}": kind, f"colour{i}": colour}
    facts |= {"place": rng.choice(tuple(PLACES)), "time": rng.choice(tuple(TIMES))}
    said = ["family", "count", *(f"{w}{i}" for i in range(count) for w in ("kind", "colour"))]

    things = [article(f"{c} {k}") for c, k in zip(colours, kinds, strict=True)]
    if count == 1:
        words = things[0]
    elif count == 2:
        words = rng.choice(
            (
                f"{things[0]} left of {things[1]}",
                f"{things[1]} right of {things[0]}",
                f"{things[0]} and {things[1]}",
            )
        )
    else:
        words = rng.choice(
            (
                f"{things[0]}, {things[1]} and {things[2]}",
                f"{things[1]} between {things[0]} and {things[2]}",
            )
        )
    if rng.random() < 0.9:
        words += " " + PLACES[facts["place"]]
        said.append("place")
    if rng.random() < 0.75:
        words += " " + TIMES[facts["time"]]
        said.append("time")
    return _scene(facts, words, said)


def _city(rng: random.Random) -> Scene:
    facts = {
        "family": "city",
        "city": rng.choice(CITIES),
        "time": rng.choice(tuple(TIMES)),
        "flying cars": rng.choice(("no", "yes")),
        "neon lights": rng.choice(("no", "yes")),
    }
    extras = [name for name in ("flying cars", "neon lights") if facts[name] == "yes"]
    said = ["family", "city", *extras]
    words = article(f"{facts['city']} cityscape")
    if rng.random() < 0.85:
        words += " " + TIMES[facts["time"]]
        said.append("time")
    if extras:
        words += " with " + " and ".join(extras)
    return _scene(facts, words, said)


def _portrait(rng: random.Random) -> Scene:
    age, held = rng.choice(tuple(AGES)), rng.choice(HELD)
    facts = {
        "family": "portrait",
        "style": rng.choice(STYLES),
        "age": age,
        "sex": rng.choice(SEXES),
        "hands": rng.choice(FACTS["hands"]) if age == "elderly" else "smooth",
        "held": held,
    }
    said = ["family", "age", "sex", "held"]
    if held == "camera":
        thing = "vintage camera"
    else:
        facts["held colour"] = rng.choice(tuple(COLOURS))
        said.append("held colour")
        thing = f"{facts['held colour']} {held}"
    person = f"{AGES[age]} {facts['sex']}"
    words = f"portrait of {person}"
    if rng.random() < 0.7:
        words = f"{facts['style']} {words}"
        said.append("style")
    if facts["hands"] == "weathered":
        words += " with weathered hands"
        said.append("hands")
    return _scene(facts, f"a {words} holding {article(thing)}", said)


def _animal(rng: random.Random) -> Scene:
    facts = {
        "family": "animal",
        "animal": rng.choice(ANIMALS),
        "sign": rng.choice(SIGNS),
        "place": rng.choice(OUTDOORS),
        "time": rng.choice(tuple(TIMES)),
    }
    said = ["family", "animal", "sign"]
    cute = "cute " if rng.random() < 0.5 else ""
    words = f"a {cute}{facts['animal']} holding a sign that says {facts['sign']}"
    if rng.random() < 0.6:
        words += " " + PLACES[facts["place"]]
        said.append("place")
        if rng.random() < 0.7:
            words += " " + TIMES[facts["time"]]
            said.append("time")
    return _scene(facts, words, said)


def _scene(facts: dict[str, str], caption: str, said: list[str]) -> Scene:
    ordered = tuple((name, facts[name]) for name in FACTS if name in facts)
    return Scene(ordered, caption, tuple(name for name in FACTS if name in said))


def parse(prompt: str) -> dict[str, str]:
    """The facts that a prompt states; empty when it isn't about this world.

    A prompt from outside the grammar gives whatever facts can be recognised in it.
    """
    text = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    facts: dict[str, str] = {}

    def one_of(values, name):
        found = [v for v in values if re.search(rf"\b{v}\b", text)]
        if found:
            facts[name] = found[0]

    def said_as(phrases, name):
        found = [value for value, words in phrases.items() if words in text]
        if found:
            facts[name] = found[0]

    if "cityscape" in text:
        facts["family"] = "city"
        one_of(CITIES, "city")
        for extra in ("flying cars", "neon lights"):
            if extra in text:
                facts[extra] = "yes"
    elif "portrait" in text:
        facts["family"] = "portrait"
        one_of(STYLES, "style")
        one_of(AGES, "age")
        one_of(SEXES, "sex")
        if "weathered hands" in text:
            facts["hands"] = "weathered"
        held = text.partition("holding")[2]
        if "camera" in held:
            facts["held"] = "camera"
        elif thing := _THING.search(held):
            facts |= {"held colour": thing[1], "held": thing[2]}
    elif "sign" in text and any(a in text for a in ANIMALS):
        facts["family"] = "animal"
        one_of(ANIMALS, "animal")
        says = text.partition("says")[2].strip()
        if sign := next((words for words in SIGNS if says.startswith(words)), None):
            facts["sign"] = sign
    else:
        things = [(m[1], m[2]) for m in _THING.finditer(text)][:3]
        if not things:
            return {}
        if len(things) == 2 and "right of" in text:
            things.reverse()
        if len(things) == 3 and "between" in text:
            things = [things[1], things[0], things[2]]
        facts |= {"family": "composed", "count": str(len(things))}
        for i, (colour, kind) in enumerate(things):
            facts |= {f"colour{i}": colour, f"kind{i}": kind}
    if facts["family"] in ("composed", "animal"):
        said_as(PLACES, "place")
    if facts["family"] != "portrait":
        said_as(TIMES, "time")
    return {name: facts[name] for name in FACTS if name in facts}


def complete(prompt: str, seed: int, **instead: str) -> Scene:
    """A scene that a prompt describes: what it leaves open is chosen by `seed`, `instead` overrides what it says.

    Raises ValueError if nothing of this world is in the prompt.
    """
    facts = parse(prompt)
    if not facts:
        raise ValueError(f"{prompt!r} says nothing of this world")
    rng = random.Random(f"complete {seed}")
    open_facts = {"composed": ("place", "time"), "animal": ("animal", "place", "time", "sign")}
    open_facts["city"] = ("city", "time")
    open_facts["portrait"] = ("style", "age", "sex", "held")
    for name in open_facts[facts["family"]]:
        facts.setdefault(name, rng.choice(FACTS[name]))
    if facts["family"] == "city":
        facts = {"flying cars": "no", "neon lights": "no"} | facts
    if facts["family"] == "portrait":
        facts = {"hands": "smooth", "held colour": "red"} | facts
    facts |= instead
    return Scene(tuple((name, facts[name]) for name in FACTS if name in facts), prompt, tuple(parse(prompt)))


_THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b")
_STUDY_KEYS = frozenset("; ".join(f"{n}={v}" for n, v in parse(p).items()) for p in STUDY_PROMPTS)

_GRAMMAR_WORDS = (
    "a an and left right of between on in at the with holding sign that says cute cityscape portrait hands vintage"
)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = [_GRAMMAR_WORDS, "flying cars", "neon lights", "weathered"]
    phrases += [*COLOURS, *KINDS, *HELD, *PLACES.values(), *TIMES.values(), *CITIES, *ANIMALS, *SIGNS]
    phrases += [*AGES.values(), *SEXES, *STYLES]
    return sorted({word for phrase in phrases for word in phrase.split()})


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the embedded model has never seen, in order, each once."""
    known = set(vocabulary())
    return list(dict.fromkeys(w for w in re.findall(r"[^\W\d_]+|\d+", prompt.lower()) if w not in known))


# --- the renderer -----------------------------------------------------------------------------------------

# time of day -> light on things (multiplies colours), sky from top to horizon, where the sun or moon stands
_LIGHT = {
    "morning": ((1.0, 0.96, 0.90), (150, 196, 236), (255, 226, 190), (0.16, 0.34)),
    "noon": ((1.0, 1.0, 1.0), (64, 148, 236), (186, 224, 250), (0.50, 0.12)),
    "sunset": ((1.0, 0.84, 0.76), (92, 62, 140), (255, 142, 74), (0.82, 0.42)),
    "night": ((0.66, 0.70, 0.94), (12, 16, 48), (44, 56, 110), (0.80, 0.16)),
}
_GROUND = {
    "grass": ((96, 176, 78), (70, 146, 62)),
    "beach": ((238, 214, 160), (222, 192, 134)),
    "snow": ((236, 242, 250), (208, 220, 238)),
    "desert": ((232, 168, 92), (208, 138, 66)),
    "street": ((112, 114, 122), (92, 94, 102)),
}


def shade(colour, factor):
    """Darker (factor < 1) or lighter (factor > 1, towards white)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)
    return tuple(int(c + (255 - c) * (factor - 1)) for c in colour)


class Canvas:
    """Draws in unit coordinates, (0, 0) at the top left, with the light of the time of day on everything."""

    def __init__(self, side: int, light=(1.0, 1.0, 1.0)):
        self.side, self.light = side, light
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)

    def lit(self, colour):
        return tuple(int(c * k) for c, k in zip(colour, self.light, strict=True))

    def ink(self, colour, glow=False):
        """What a shape of this colour is filled with; what glows isn't dimmed by the time of day."""
        return colour if glow else self.lit(colour)

    def layer(self, nearness: float) -> None:
        """What is drawn from here on is this near, 0 (the sky) to 1: no colours depend on it, a depth map does."""

    def inset(self, other: Canvas, box, at) -> None:
        """Pastes `box` (left, top, right, bottom) of another canvas into `at` (left, top, width, height), in pixels."""
        part = other.image.crop(box).resize(at[2:], Image.Resampling.BOX)
        self.image.paste(part, at[:2])

    def shadow(self, x0, y0, x1, y1) -> None:
        """A flat shadow: a darker copy of what lies there, so that it suits every ground."""
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).ellipse([v * self.side for v in (x0, y0, x1, y1)], fill=90)
        self.image.paste((20, 20, 30), mask=mask)

    def _at(self, points):
        return [(x * self.side, y * self.side) for x, y in points]

    def polygon(self, points, colour, glow=False):
        self.pen.polygon(self._at(points), fill=self.ink(colour, glow))

    def box(self, x0, y0, x1, y1, colour, radius=0.0, glow=False):
        fill = self.ink(colour, glow)
        ((a, b), (c, d)) = self._at([(min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))])
        if radius:
            self.pen.rounded_rectangle((a, b, c, d), radius * self.side, fill=fill)
        else:
            self.pen.rectangle((a, b, c, d), fill=fill)

    def ellipse(self, x, y, rx, ry, colour, glow=False):
        ((a, b), (c, d)) = self._at([(x - rx, y - ry), (x + rx, y + ry)])
        self.pen.ellipse((a, b, c, d), fill=self.ink(colour, glow))

    def ring(self, x, y, rx, ry, width, colour):
        ((a, b), (c, d)) = self._at([(x - rx, y - ry), (x + rx, y + ry)])
        self.pen.ellipse((a, b, c, d), outline=self.ink(colour), width=max(1, round(width * self.side)))

    def arc(self, x, y, rx, ry, start, end, width, colour):
        ((a, b), (c, d)) = self._at([(x - rx, y - ry), (x + rx, y + ry)])
        self.pen.arc((a, b, c, d), start, end, fill=self.ink(colour), width=max(1, round(width * self.side)))

    def line(self, points, width, colour, glow=False):
        fill = self.ink(colour, glow)
        self.pen.line(self._at(points), fill=fill, width=max(1, round(width * self.side)), joint="curve")

    def gradient(self, top, bottom, y0=0.0, y1=1.0):
        """Fills the rows y0 to y1 with a vertical gradient, unlit."""
        a, b = round(y0 * self.side), round(y1 * self.side)
        for row in range(a, b):
            k = (row - a) / max(1, b - a - 1)
            fill = tuple(int(t + (u - t) * k) for t, u in zip(top, bottom, strict=True))
            self.pen.line((0, row, self.side, row), fill=self.ink(fill, glow=True))

    def text(self, x, y, words, height, colour):
        font = ImageFont.load_default(height * self.side)
        self.pen.text((x * self.side, y * self.side), words, font=font, fill=self.ink(colour), anchor="mm")


class DepthCanvas(Canvas):
    """Draws the same shapes as nearness instead of colour: black is far, white is near."""

    def __init__(self, side: int, light=(1.0, 1.0, 1.0)):
        super().__init__(side, light)
        self.layer(0.0)

    def layer(self, nearness: float) -> None:
        self.grey = (round(255 * nearness),) * 3

    def ink(self, colour, glow=False):
        return self.grey

    def inset(self, other, box, at) -> None:
        pass  # a window is as far as its wall

    def shadow(self, x0, y0, x1, y1) -> None:
        pass


def draw(scene: Scene, seed: int, size: int = SIZE) -> Image.Image:
    """The picture of a scene, RGB, size x size pixels; `seed` sets what the scene leaves free."""
    return render(Canvas, scene, seed, size)


def depth(scene: Scene, seed: int, size: int = SIZE) -> Image.Image:
    """The depth map of the same picture, RGB grey: 0 far, 255 near, in flat layers as the scene is drawn."""
    return render(DepthCanvas, scene, seed, size)


def render(kind: Callable[..., Canvas], scene: Scene, seed: int, size: int = SIZE) -> Image.Image:
    """A scene on a canvas of its own kind; `layer` is called once more when all is drawn."""
    rng = random.Random(f"draw {seed}")
    facts = dict(scene.facts)
    light = (1.0, 1.0, 1.0) if facts["family"] == "portrait" else _LIGHT[facts["time"]][0]
    canvas = kind(size * SUPERSAMPLE, light)
    _DRAW[facts["family"]](canvas, facts, rng)
    canvas.layer(1.0)
    return canvas.image.resize((size, size), Image.Resampling.BOX)


def _sky(c: Canvas, time: str, horizon: float, rng: random.Random) -> None:
    _, top, bottom, (x, y) = _LIGHT[time]
    c.gradient(top, bottom, 0, horizon)
    x, y = x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.03, 0.03)
    if time == "night":
        for _ in range(14):
            r = rng.choice((0.004, 0.006))
            c.ellipse(rng.random(), rng.uniform(0.02, horizon * 0.85), r, r, (240, 240, 255), glow=True)
        c.ellipse(x, y, 0.060, 0.060, (246, 240, 206), glow=True)
        c.ellipse(x - 0.028, y - 0.012, 0.052, 0.052, shade(top, 1.06), glow=True)
        return
    sun = {"morning": (255, 246, 190), "noon": (255, 250, 214), "sunset": (255, 214, 96)}[time]
    c.ellipse(x, y, 0.07, 0.07, sun, glow=True)
    for _ in range(rng.choice((1, 2))):
        cx, cy = rng.uniform(0.1, 0.9), rng.uniform(0.06, 0.26)
        cloud = {"morning": (255, 244, 232), "noon": (255, 255, 255), "sunset": (236, 150, 140)}[time]
        for dx, r in ((-0.05, 0.028), (0.0, 0.04), (0.05, 0.028)):
            c.ellipse(cx + dx, cy, r * 1.3, r * 0.75, cloud, glow=True)


def _place(c: Canvas, place: str, time: str, rng: random.Random) -> float:
    """Draws the background; returns the height at which things stand."""
    if place in ("white table", "wooden table"):
        wall = rng.choice(((206, 222, 214), (226, 208, 190), (204, 210, 230)))
        c.layer(0.15)
        c.box(0, 0, 1, 1, wall)
        x = rng.uniform(0.06, 0.62)
        frame = (250, 250, 250)
        inside = Canvas(c.side, c.light)
        _sky(inside, time, 0.42, rng)
        scale = 0.34
        c.box(x - 0.015, 0.055, x + scale + 0.015, 0.385, frame)
        place_at = (int(x * c.side), int(0.07 * c.side), int(c.side * scale), int(c.side * 0.30))
        c.inset(inside, (0, 0, c.side, int(c.side * 0.42)), place_at)
        c.box(x + scale / 2 - 0.006, 0.07, x + scale / 2 + 0.006, 0.37, frame)
        top, edge = ((246, 246, 248), (206, 208, 214)) if place == "white table" else ((186, 126, 72), (136, 86, 46))
        c.layer(0.5)
        c.polygon([(0.06, 0.66), (0.94, 0.66), (1.02, 0.90), (-0.02, 0.90)], top)
        c.box(-0.02, 0.90, 1.02, 0.95, edge)
        c.box(0, 0.95, 1, 1, shade(wall, 0.6))
        if place == "wooden table":
            for k in (0.72, 0.78, 0.84):
                c.line([(0.0, k), (1.0, k)], 0.005, shade(top, 0.86))
        return 0.83
    horizon = 0.56
    _sky(c, time, horizon, rng)
    near, far = _GROUND[place]
    c.layer(0.25)
    if place == "beach":
        c.box(0, horizon, 1, 0.66, (58, 146, 190))
        for _ in range(3):
            x, y = rng.uniform(0, 0.8), rng.uniform(0.58, 0.64)
            c.line([(x, y), (x + 0.14, y)], 0.008, (166, 216, 232))
        c.layer(0.4)
        c.polygon([(0, 0.67), (1, 0.645), (1, 1), (0, 1)], near)
        c.layer(0.5)
        c.polygon([(0, 0.90), (1, 0.88), (1, 1), (0, 1)], far)
    elif place == "street":
        c.box(0, horizon, 1, 0.64, (170, 168, 164))
        c.layer(0.4)
        c.box(0, 0.64, 1, 1, near)
        offset = rng.uniform(0, 0.3)
        for k in range(-1, 4):
            c.box(offset + k * 0.3, 0.915, offset + k * 0.3 + 0.16, 0.935, (244, 236, 170))
    else:
        hill = rng.uniform(0.2, 0.8)
        c.box(0, horizon, 1, horizon + 0.06, shade(far, 0.86))
        c.ellipse(hill, horizon + 0.09, 0.55, 0.16, shade(far, 0.92))
        c.layer(0.4)
        c.box(0, horizon + 0.05, 1, 1, near)
        c.layer(0.5)
        c.polygon([(0, 0.88), (1, 0.86), (1, 1), (0, 1)], far)
        if place == "desert":
            x = rng.choice((0.06, 0.94)) + rng.uniform(-0.02, 0.02)
            c.box(x - 0.018, 0.46, x + 0.018, 0.64, (70, 128, 70), 0.018)
            c.box(x - 0.05, 0.50, x - 0.028, 0.57, (70, 128, 70), 0.01)
            c.box(x - 0.05, 0.55, x, 0.57, (70, 128, 70))
        if place == "grass":
            for _ in range(7):
                x, y = rng.random(), rng.uniform(0.66, 0.97)
                tuft = [(x - 0.02, y), (x - 0.01, y - 0.03), (x, y), (x + 0.012, y - 0.035), (x + 0.024, y)]
                c.polygon(tuft, shade(near, 0.74))
    return 0.84


def _draw_composed(c: Canvas, facts: dict, rng: random.Random) -> None:
    ground = _place(c, facts["place"], facts["time"], rng)
    count = int(facts["count"])
    centres = {1: (0.5,), 2: (0.29, 0.71), 3: (0.185, 0.5, 0.815)}[count]
    spread = {1: 0.10, 2: 0.035, 3: 0.015}[count]
    low, high = {1: (0.36, 0.44), 2: (0.30, 0.35), 3: (0.25, 0.285)}[count]
    for i, x in enumerate(centres):
        size = rng.uniform(low, high)
        foot = ground + rng.uniform(-0.025, 0.025)
        c.layer(foot)  # further down is nearer
        thing(c, facts[f"kind{i}"], COLOURS[facts[f"colour{i}"]], x + rng.uniform(-spread, spread), foot, size)


def thing(c: Canvas, kind: str, colour, x: float, foot: float, size: float, shadow: bool = True) -> None:
    """Draws one object of height about `size`, standing at (x, foot)."""
    if shadow:
        c.shadow(x - size * 0.42, foot - size * 0.07, x + size * 0.56, foot + size * 0.08)
    _THINGS[kind](c, colour, x, foot, size)


def _apple(c, col, x, y, s):
    r = s * 0.40
    cy = y - r * 0.94
    dark = shade(col, 0.62)
    for dx in (-0.34, 0.34):
        c.ellipse(x + dx * r, cy, r * 0.74, r * 0.98, dark)
    for dx in (-0.36, 0.24):
        c.ellipse(x + dx * r, cy - 0.06 * r, r * 0.62, r * 0.84, col)
    c.ellipse(x - 0.05 * r, cy, r * 0.55, r * 0.7, col)
    c.ellipse(x - 0.5 * r, cy - 0.36 * r, r * 0.15, r * 0.24, shade(col, 1.6))
    c.line([(x, cy - 0.72 * r), (x + 0.10 * r, cy - 1.25 * r)], s * 0.035, (96, 62, 36))
    leaf = [
        (x + 0.12 * r, cy - 1.0 * r),
        (x + 0.42 * r, cy - 1.34 * r),
        (x + 0.80 * r, cy - 1.22 * r),
        (x + 0.5 * r, cy - 0.96 * r),
    ]
    c.polygon(leaf, (78, 152, 66))


def _ball(c, col, x, y, s):
    r = s * 0.42
    cy = y - r
    c.ellipse(x, cy, r, r, shade(col, 0.62))
    c.ellipse(x - 0.09 * r, cy - 0.09 * r, r * 0.86, r * 0.86, col)
    c.ellipse(x - 0.36 * r, cy - 0.38 * r, r * 0.2, r * 0.17, shade(col, 1.65))


def _cube(c, col, x, y, s):
    w, d = s * 0.36, s * 0.20
    top = y - s * 0.80
    c.polygon([(x - w, top), (x, top + d), (x, y), (x - w, y - d)], col)
    c.polygon([(x + w, top), (x, top + d), (x, y), (x + w, y - d)], shade(col, 0.62))
    c.polygon([(x - w, top), (x, top - d), (x + w, top), (x, top + d)], shade(col, 1.38))


def _cone(c, col, x, y, s):
    w, h, b = s * 0.38, s * 0.92, s * 0.10
    c.ellipse(x, y - b, w, b, shade(col, 0.62))
    c.polygon([(x, y - h), (x + w, y - b), (x + w * 0.3, y - b * 0.1), (x - w * 0.2, y - b * 0.1)], shade(col, 0.62))
    c.ellipse(x - w * 0.1, y - b, w * 0.9, b, col)
    c.polygon([(x, y - h), (x - w, y - b), (x - w * 0.6, y - b * 0.3), (x + w * 0.25, y - b * 0.05)], col)
    c.polygon([(x, y - h), (x - w * 0.72, y - b), (x - w * 0.45, y - b)], shade(col, 1.4))


def _cup(c, col, x, y, s):
    w, h, b = s * 0.30, s * 0.66, s * 0.09
    x = x - s * 0.06
    c.ring(x + w * 1.12, y - h * 0.52, w * 0.46, h * 0.28, s * 0.07, shade(col, 0.7))
    c.polygon([(x - w, y - h), (x + w, y - h), (x + w * 0.86, y - b * 0.4), (x - w * 0.86, y - b * 0.4)], col)
    c.ellipse(x, y - b * 0.5, w * 0.86, b * 0.7, col)
    c.polygon(
        [(x + w * 0.35, y - h), (x + w, y - h), (x + w * 0.86, y - b * 0.4), (x + w * 0.3, y)],
        shade(col, 0.66),
    )
    c.ellipse(x, y - h, w, b, shade(col, 1.4))
    c.ellipse(x, y - h, w * 0.8, b * 0.7, shade(col, 0.45))


def _car(c, col, x, y, s):
    w, h = s * 0.52, s * 0.24
    wheel = s * 0.13
    base = y - wheel * 0.8
    roof = [
        (x - w * 0.58, base - h),
        (x - w * 0.34, base - h * 2.0),
        (x + w * 0.30, base - h * 2.0),
        (x + w * 0.62, base - h),
    ]
    c.polygon(roof, shade(col, 0.8))
    for a, b, p, q in ((-0.44, -0.28, -0.02, -0.02), (0.04, 0.04, 0.26, 0.46)):
        pane = [
            (x + w * a, base - h),
            (x + w * b, base - h * 1.8),
            (x + w * p, base - h * 1.8),
            (x + w * q, base - h),
        ]
        c.polygon(pane, (188, 224, 240))
    c.box(x - w, base - h, x + w, base, col, s * 0.07)
    c.box(x - w * 0.96, base - h * 0.32, x + w * 0.96, base - h * 0.02, shade(col, 0.66), s * 0.02)
    c.ellipse(x + w * 0.90, base - h * 0.66, s * 0.04, s * 0.04, (255, 246, 190))
    for dx in (-0.55, 0.55):
        c.ellipse(x + w * dx, y - wheel * 0.9, wheel, wheel, (38, 38, 44))
        c.ellipse(x + w * dx, y - wheel * 0.9, wheel * 0.45, wheel * 0.45, (190, 192, 200))


def _tree(c, col, x, y, s):
    c.polygon(
        [(x - s * 0.06, y), (x + s * 0.06, y), (x + s * 0.045, y - s * 0.5), (x - s * 0.045, y - s * 0.5)],
        (120, 78, 44),
    )
    for dx, dy, r in ((0.0, 0.76, 0.25), (-0.19, 0.55, 0.22), (0.19, 0.55, 0.22)):
        c.ellipse(x + dx * s, y - dy * s, r * s, r * s, shade(col, 0.64))
    for dx, dy, r in ((-0.03, 0.79, 0.20), (-0.21, 0.58, 0.17), (0.15, 0.58, 0.17), (-0.03, 0.62, 0.16)):
        c.ellipse(x + dx * s, y - dy * s, r * s, r * s, col)
    for dx, dy in ((-0.10, 0.84), (-0.26, 0.62), (0.12, 0.64)):
        c.ellipse(x + dx * s, y - dy * s, s * 0.05, s * 0.045, shade(col, 1.4))


def _house(c, col, x, y, s):
    w, h = s * 0.38, s * 0.50
    c.box(x - w, y - h, x + w, y, col)
    c.box(x + w * 0.45, y - h, x + w, y, shade(col, 0.72))
    c.polygon([(x - w * 1.2, y - h), (x, y - s * 0.94), (x + w * 1.2, y - h)], (116, 66, 52))
    c.polygon([(x, y - s * 0.94), (x + w * 1.2, y - h), (x + w * 0.55, y - h)], (90, 48, 40))
    c.box(x - w * 0.20, y - h * 0.62, x + w * 0.24, y, (86, 56, 38))
    c.box(x - w * 0.80, y - h * 0.74, x - w * 0.42, y - h * 0.36, (255, 232, 150), glow=True)


def _mushroom(c, col, x, y, s):
    c.polygon(
        [(x - s * 0.12, y), (x + s * 0.12, y), (x + s * 0.09, y - s * 0.5), (x - s * 0.09, y - s * 0.5)],
        (244, 232, 208),
    )
    c.polygon(
        [(x + s * 0.03, y), (x + s * 0.12, y), (x + s * 0.09, y - s * 0.5), (x + s * 0.03, y - s * 0.5)],
        (214, 196, 164),
    )
    a, b = s * 0.42, s * 0.44
    cy = y - s * 0.40
    points = [(x - a * math.cos(t), cy - b * math.sin(t)) for t in [math.pi * k / 24 for k in range(25)]]
    c.polygon(points, shade(col, 0.64))
    c.ellipse(x, cy, a, s * 0.07, shade(col, 0.64))
    points = [
        (x - s * 0.04 - a * 0.86 * math.cos(t), cy - b * 0.92 * math.sin(t))
        for t in [math.pi * k / 24 for k in range(25)]
    ]
    c.polygon(points, col)
    spots = (250, 250, 246) if sum(col) < 690 else (222, 120, 120)
    for dx, dy, r in ((-0.20, 0.14, 0.065), (0.02, 0.29, 0.07), (0.19, 0.10, 0.05)):
        c.ellipse(x + dx * s, cy - dy * s, r * s, r * s * 0.85, spots)


def _star(c, col, x, y, s):
    r = s * 0.48
    cy = y - r * 0.92
    tips = [
        (x + r * k * math.sin(a), cy - r * k * math.cos(a))
        for i in range(10)
        for a, k in [(math.pi * i / 5, 1.0 if i % 2 == 0 else 0.44)]
    ]
    c.polygon(tips, col)
    for i in range(0, 10, 2):  # each arm folded: one half in shade
        c.polygon([(x, cy), tips[i], tips[(i + 1) % 10]], shade(col, 0.66))


def _camera(c, col, x, y, s):
    w, h = s * 0.52, s * 0.58
    body, dark = (122, 76, 46), (52, 46, 46)
    c.box(x - w * 0.34, y - h * 1.22, x + w * 0.34, y - h, (176, 176, 182), s * 0.03)
    c.box(x + w * 0.55, y - h * 1.12, x + w * 0.82, y - h, (150, 150, 156))
    c.box(x - w, y - h, x + w, y, body, s * 0.05)
    c.box(x - w, y - h, x + w, y - h * 0.78, (176, 176, 182), s * 0.04)
    c.ellipse(x, y - h * 0.46, s * 0.23, s * 0.23, dark)
    c.ellipse(x, y - h * 0.46, s * 0.17, s * 0.17, (120, 134, 150))
    c.ellipse(x, y - h * 0.46, s * 0.11, s * 0.11, (34, 44, 66))
    c.ellipse(x - s * 0.04, y - h * 0.46 - s * 0.04, s * 0.035, s * 0.035, (230, 240, 250))


_THINGS = {
    "apple": _apple,
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "cup": _cup,
    "car": _car,
    "tree": _tree,
    "house": _house,
    "mushroom": _mushroom,
    "star": _star,
    "camera": _camera,
}


def _draw_city(c: Canvas, facts: dict, rng: random.Random) -> None:
    time, style, neon = facts["time"], facts["city"], facts["neon lights"] == "yes"
    _sky(c, time, 0.86, rng)
    dark = time in ("sunset", "night")
    walls = {
        "futuristic": ((96, 120, 176), (120, 100, 178), (86, 150, 176)),
        "modern": ((136, 142, 152), (110, 118, 130), (164, 160, 154)),
        "medieval": ((176, 144, 106), (150, 120, 92), (194, 168, 130)),
    }[style]
    for layer, (fade, base) in enumerate(((1.5, 0.78), (1.0, 0.92))):
        c.layer(0.3 + 0.25 * layer)
        count = 6 if layer == 0 else 5
        for k in range(count):
            w = rng.uniform(0.070, 0.095)
            x = (k + 0.5) / count + rng.uniform(-0.02, 0.02)
            low, high = ((0.30, 0.50) if layer == 0 else (0.26, 0.46)) if style != "medieval" else (0.18, 0.36)
            top = base - rng.uniform(low, high)
            wall = shade(rng.choice(walls), fade if layer == 0 else 1.0)
            _tower(c, style, x, top, base + 0.1, w, wall, dark, neon and layer == 1, rng)
    c.layer(0.7)
    c.box(0, 0.90, 1, 1, {"futuristic": (54, 58, 92), "modern": (84, 86, 92), "medieval": (104, 124, 74)}[style])
    if neon:
        c.box(0, 0.905, 1, 0.92, (255, 60, 200), glow=True)
    if facts["flying cars"] == "yes":
        c.layer(0.85)
        for k in range(3):
            x, y = (k + 0.5) / 3 + rng.uniform(-0.07, 0.07), rng.uniform(0.10, 0.30)
            colour = COLOURS[rng.choice(("red", "yellow", "white", "orange"))]
            c.polygon(
                [(x - 0.05, y), (x - 0.15, y - 0.008), (x - 0.15, y + 0.016), (x - 0.05, y + 0.014)],
                (170, 240, 255),
                glow=True,
            )
            c.ellipse(x, y + 0.022, 0.05, 0.012, (110, 230, 255), glow=True)
            c.box(x - 0.062, y - 0.018, x + 0.062, y + 0.018, colour, 0.018, glow=True)
            c.ellipse(x + 0.008, y - 0.018, 0.032, 0.018, (46, 60, 90), glow=True)


def _tower(c, style, x, top, base, w, wall, dark, neon, rng):
    shadow = shade(wall, 0.70)
    if style == "futuristic":
        form = rng.choice(("dome", "spire", "slant"))
        c.polygon([(x - w * 0.78, top), (x + w * 0.78, top), (x + w, base), (x - w, base)], wall)
        c.polygon([(x + w * 0.25, top), (x + w * 0.78, top), (x + w, base), (x + w * 0.32, base)], shadow)
        if form == "dome":
            c.ellipse(x, top, w * 0.78, w * 0.7, shade(wall, 1.25))
        elif form == "spire":
            c.polygon([(x - w * 0.5, top), (x, top - 0.13), (x + w * 0.5, top)], shade(wall, 1.25))
        else:
            c.polygon([(x - w * 0.78, top), (x + w * 0.78, top - 0.08), (x + w * 0.78, top)], shade(wall, 1.25))
    elif style == "modern":
        c.box(x - w, top, x + w, base, wall)
        c.box(x + w * 0.4, top, x + w, base, shadow)
    elif rng.random() < 0.5:  # a pitched roof
        c.box(x - w, top + 0.05, x + w, base, wall)
        c.polygon([(x - w * 1.15, top + 0.06), (x, top - 0.08), (x + w * 1.15, top + 0.06)], (150, 62, 46))
        c.polygon([(x, top - 0.08), (x + w * 1.15, top + 0.06), (x + w * 0.4, top + 0.06)], (116, 44, 36))
    else:  # a castle tower
        c.box(x - w * 0.9, top, x + w * 0.9, base, wall)
        c.box(x + w * 0.35, top, x + w * 0.9, base, shadow)
        for k in (-0.75, 0.0, 0.75):
            c.box(x + k * w - w * 0.2, top - 0.03, x + k * w + w * 0.2, top, wall)
    window = (255, 222, 120) if dark else shade(wall, 0.6)
    rows = int((base - top) / 0.075)
    for row in range(1, rows):
        for dx in (-0.5, 0.05):
            if rng.random() < 0.75:
                y = top + 0.02 + row * 0.07
                c.box(x + dx * w, y, x + (dx + 0.36) * w, y + 0.03, window, glow=dark)
    if neon:
        glow = rng.choice(((255, 60, 200), (40, 240, 255), (120, 255, 90)))
        for dx in (-0.88, 0.80):
            c.line([(x + dx * w, top + 0.03), (x + dx * w, base)], 0.013, glow, glow=True)
        c.line([(x - w * 0.75, top + 0.02), (x + w * 0.75, top + 0.02)], 0.013, glow, glow=True)


_SKIN = ((246, 208, 178), (224, 172, 132), (168, 114, 78), (112, 74, 52))
_CLOTHES = ((54, 74, 112), (110, 54, 60), (62, 92, 74), (82, 78, 92), (120, 100, 74))


def _draw_portrait(c: Canvas, facts: dict, rng: random.Random) -> None:
    old, woman = facts["age"] == "elderly", facts["sex"] == "woman"
    skin, clothes = rng.choice(_SKIN), rng.choice(_CLOTHES)
    hair = (
        rng.choice(((226, 226, 230), (196, 196, 202)))
        if old
        else rng.choice(((46, 34, 30), (110, 66, 36), (196, 144, 70)))
    )
    if facts["style"] == "photorealistic":  # a studio: dark, lit from behind
        c.box(0, 0, 1, 1, (40, 42, 52))
        for k in range(14):
            r = 0.64 - 0.036 * k
            c.ellipse(0.5, 0.40, r, r, shade((40, 42, 52), 1 + 0.03 * (k + 1)))
    else:  # a painted canvas: warm, with brush strokes
        c.box(0, 0, 1, 1, (232, 206, 158))
        for _ in range(16):
            x, y = rng.uniform(-0.1, 1), rng.random()
            stroke = rng.choice(((240, 180, 120), (216, 186, 140), (246, 224, 180), (196, 176, 140)))
            c.line([(x, y), (x + 0.22, y - 0.07)], 0.035, stroke)
    x, y, r = 0.5 + rng.uniform(-0.025, 0.025), 0.34 + rng.uniform(-0.015, 0.015), 0.165
    dark = shade(skin, 0.72)
    c.layer(0.6)
    if woman:
        c.ellipse(x, y + 0.01, r * 1.30, r * 1.34, hair)
        c.box(x - r * 1.30, y, x + r * 1.30, y + r * 1.75, hair, 0.07)
    c.ellipse(x, 0.98, 0.40, 0.42, clothes)
    c.ellipse(x + 0.03, 1.02, 0.36, 0.40, shade(clothes, 0.8))
    c.box(x - 0.062, y + r * 0.7, x + 0.062, y + r * 1.55, dark, 0.03)
    c.layer(0.7)
    for side in (-1, 1):
        c.ellipse(x + side * r * 0.98, y + 0.02, 0.03, 0.042, dark)
    c.ellipse(x, y, r, r * 1.18, skin)
    if woman:
        c.polygon(
            [
                (x - r, y - r * 0.1),
                (x - r * 0.86, y - r * 0.85),
                (x, y - r * 1.22),
                (x + r * 0.2, y - r * 0.7),
            ],
            hair,
        )
        c.polygon([(x + r, y - r * 0.1), (x + r * 0.86, y - r * 0.85), (x, y - r * 1.22), (x, y - r * 0.78)], hair)
    else:
        c.polygon(
            [
                (x - r * 1.05, y - r * 0.15),
                (x - r * 1.0, y - r * 0.9),
                (x, y - r * 1.38),
                (x + r * 1.0, y - r * 0.9),
                (x + r * 1.05, y - r * 0.15),
                (x + r * 0.80, y - r * 0.62),
                (x - r * 0.70, y - r * 0.70),
            ],
            hair,
        )
        if old:
            c.ellipse(x, y + r * 0.92, r * 0.62, r * 0.42, hair)
    for side in (-1, 1):
        ex, ey = x + side * r * 0.42, y - r * 0.05
        c.ellipse(ex, ey, 0.026, 0.019, (250, 250, 250))
        c.ellipse(ex, ey, 0.014, 0.016, (50, 40, 36))
        c.line([(ex - 0.032, ey - 0.043), (ex + 0.032, ey - 0.043)], 0.013, shade(hair, 0.8))
        if old:
            c.line([(ex - 0.03, ey + 0.034), (ex + 0.03, ey + 0.040)], 0.007, dark)
    if old:
        for dy in (0.60, 0.48):
            c.line([(x - 0.06, y - r * dy), (x + 0.06, y - r * dy)], 0.007, dark)
    c.line([(x, y + 0.01), (x - 0.016, y + r * 0.38), (x + 0.012, y + r * 0.38)], 0.009, dark)
    mouth = (176, 66, 70) if woman else shade(dark, 0.75)
    c.line([(x - 0.045, y + r * 0.66), (x, y + r * 0.71), (x + 0.045, y + r * 0.66)], 0.014, mouth)
    foot, size = 0.93, 0.27
    c.layer(0.85)
    colour = COLOURS.get(facts.get("held colour"), (0, 0, 0))
    thing(c, facts["held"], colour, x, foot, size, shadow=False)
    c.layer(0.95)
    for side in (-1, 1):
        hx = x + side * 0.155
        c.ellipse(hx, 0.90, 0.058, 0.075, skin)
        c.ellipse(hx + 0.008, 0.945, 0.05, 0.035, dark)
        if facts["hands"] == "weathered":
            for k in (-1, 0, 1):
                c.line(
                    [(hx - 0.032, 0.865 + k * 0.026), (hx + 0.032, 0.875 + k * 0.026)],
                    0.009,
                    shade(dark, 0.75),
                )


_FUR = {
    "panda": (246, 246, 246),
    "bear": (150, 98, 58),
    "cat": (142, 146, 156),
    "rabbit": (240, 222, 206),
    "fox": (232, 122, 46),
}


def _draw_animal(c: Canvas, facts: dict, rng: random.Random) -> None:
    animal, words = facts["animal"], facts["sign"]
    _place(c, facts["place"], facts["time"], rng)
    x, y, r = 0.5 + rng.uniform(-0.06, 0.06), 0.40 + rng.uniform(-0.02, 0.02), 0.195
    fur = _FUR[animal]
    dark, black = shade(fur, 0.72), (42, 40, 44)
    limbs = black if animal == "panda" else dark
    c.layer(0.65)
    c.ellipse(x, 0.80, 0.24, 0.27, limbs if animal == "panda" else fur)
    c.ellipse(x, 0.84, 0.16, 0.20, shade(fur, 1.4))
    c.layer(0.75)
    for side in (-1, 1):
        if animal == "rabbit":
            c.ellipse(x + side * 0.085, y - 0.27, 0.048, 0.15, fur)
            c.ellipse(x + side * 0.085, y - 0.26, 0.022, 0.11, (244, 160, 170))
        elif animal in ("cat", "fox"):
            inner, outer = x + side * 0.05, x + side * 0.195
            c.polygon(
                [(inner, y - 0.14), (outer, y - 0.06), (x + side * 0.17, y - 0.27)],
                fur if animal == "cat" else dark,
            )
            c.polygon(
                [(x + side * 0.09, y - 0.14), (x + side * 0.17, y - 0.10), (x + side * 0.158, y - 0.22)],
                (244, 170, 170) if animal == "cat" else black,
            )
        else:
            c.ellipse(x + side * 0.145, y - 0.145, 0.075, 0.075, black if animal == "panda" else dark)
    c.ellipse(x, y + 0.012, r * 1.08, r * 0.98, dark)
    c.ellipse(x, y, r * 1.06, r * 0.95, fur)
    if animal == "fox":
        for side in (-1, 1):
            c.polygon(
                [(x, y + 0.02), (x + side * 0.19, y + 0.03), (x + side * 0.11, y + 0.15), (x, y + 0.185)],
                (250, 246, 240),
            )
    if animal == "bear":
        c.ellipse(x, y + 0.085, 0.09, 0.068, (214, 172, 128))
    for side in (-1, 1):
        ex, ey = x + side * 0.085, y - 0.012
        if animal == "panda":
            c.ellipse(ex + side * 0.006, ey + 0.006, 0.058, 0.066, black)
        c.ellipse(ex, ey, 0.034, 0.038, (252, 252, 252) if animal == "panda" else black)
        c.ellipse(ex, ey, 0.022, 0.026, black)
        c.ellipse(ex - 0.010, ey - 0.012, 0.010, 0.010, (255, 255, 255))
        c.ellipse(x + side * 0.135, y + 0.072, 0.030, 0.018, (246, 150, 160))
        if animal == "cat":
            for dy in (0.06, 0.085):
                c.line([(x + side * 0.06, y + 0.07), (x + side * 0.20, y + dy)], 0.006, (250, 250, 250))
    nose = (240, 140, 150) if animal in ("cat", "rabbit") else black
    c.polygon([(x - 0.024, y + 0.050), (x + 0.024, y + 0.050), (x, y + 0.078)], nose)
    c.line([(x - 0.035, y + 0.098), (x, y + 0.108), (x + 0.035, y + 0.098)], 0.009, shade(black, 1.1))
    top, bottom = 0.645, 0.915
    c.layer(0.9)
    c.box(x - 0.35, top - 0.012, x + 0.35, bottom + 0.012, (124, 82, 46), 0.012)
    c.box(x - 0.335, top, x + 0.335, bottom, (250, 248, 238))
    lines = words.split()
    if len(lines) == 1:
        c.text(x, (top + bottom) / 2 - 0.005, lines[0], 0.19, (32, 36, 58))
    else:
        for k, line in enumerate(lines):
            c.text(x, top + 0.068 + k * 0.126, line, 0.145, (32, 36, 58))
    c.layer(0.95)
    for side in (-1, 1):
        c.ellipse(x + side * 0.35, 0.77, 0.05, 0.056, limbs)
        c.ellipse(x + side * 0.345, 0.762, 0.036, 0.040, shade(limbs, 1.12))


_DRAW = {"composed": _draw_composed, "city": _draw_city, "portrait": _draw_portrait, "animal": _draw_animal}
