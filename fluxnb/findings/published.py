"""Published figures, as data (published.csv), and their claims: each counted once, impossible ones flagged.

The table keeps every figure as it was published. Its column `settings` is the configuration that the source names, in
the settings of our rows ("any": every setting of the family; empty: fluxnb has no counterpart, or only the method that
`family` names); `over` is what of the
same source a figure is compared with; `repeats` names the claim that a figure only says again; `unstated` is what the
source leaves open and decides; `flag` is what is wrong with it, where that isn't computed here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fluxnb import families

FILE = Path(__file__).parent / "published.csv"
SPEEDUP, SECONDS, MEMORY, GIB, QUALITY, WORDS = "speedup", "seconds", "memory", "GiB", "quality", "words"
ANY = "any"  # setting of the family
CRITERION = "criterion"  # the kind of a plan's pass mark
LEAST, MOST, UP_TO = "≥ ", "≤ ", "up to "  # the sides of a bound
MARGIN = 0.15  # of the effect, which is a ratio less one; of seconds themselves
LEAST_MARGIN = 0.01  # of a ratio: finer than 1 % nothing here is told apart
TIMES = ("latency_second", "latency_p50", "latency_avg")  # which of them stands for a configuration: the first there is
_ORDER = ("latency_min", "latency_p50", "latency_p90", "latency_p99")  # as samples have it


@dataclass(frozen=True)
class Figure:
    """A line of the table; numbers are None where the source gives none."""

    source: str
    kind: str
    gpu: str
    gpus: int
    model: str
    steps: int | None
    width: int | None
    height: int | None
    batch: int
    technique: str
    over: str
    family: str
    settings: str
    metric: str
    value: float | None
    most: float | None  # the upper end, where `value` is the lower
    unit: str
    words: str
    repeats: str
    unstated: str
    flag: str
    note: str


@dataclass(frozen=True)
class Claim(Figure):
    """What a figure claims: a ratio, seconds or GiB (`about`) between `low` and `high`, where one may be open.

    Memory and quality are the share that is left. `configuration` is what its source names, in the settings of our
    rows: None where fluxnb has no counterpart, empty with `anything` where every setting of the family stands for it.
    """

    configuration: dict | None
    anything: bool
    over_configuration: dict
    over_family: str
    about: str
    side: str
    low: float | None
    high: float | None
    copies: tuple[str, ...] = ()  # where the same claim stands again

    @property
    def id(self) -> str:
        """Permanent: of what is claimed, by whom and of what; other claims may come and go."""
        what = (self.source, self.kind, self.metric, self.technique, self.over, self.settings, self.setting, self.text)
        return f"claim-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]}"

    @property
    def setting(self) -> str:
        """Their setting, as a reader wants to see it."""
        gpu = f"{f'{self.gpus} × ' * (self.gpus > 1)}{self.gpu}"
        parts = (self.model, self.steps and f"{self.steps} steps", f"batch {self.batch}" * (self.batch > 1), gpu)
        return ", ".join(part for part in parts if part)

    @property
    def size(self) -> float | None:
        """What claims are sorted by."""
        return self.high if self.low is None else self.low

    @property
    def text(self) -> str:
        """Their figure with its unit, or what they say without one."""
        if self.words or self.size is None:
            return self.words
        if None not in (self.low, self.high) and self.low != self.high:
            return f"{self.said(self.low)} to {self.said(self.high)}"
        return (MOST if self.about == QUALITY else self.side) + self.said(self.size)

    def said(self, value: float) -> str:
        """A figure of this claim's kind with its unit."""
        return {
            SPEEDUP: f"{value:.2f}×",
            SECONDS: f"{value:.3g} s",
            MEMORY: f"{value - 1:+.0%}",
            GIB: f"{value:.3g} GiB",
            QUALITY: f"{1 - value:.0%} lost",
        }[self.about]

    @property
    def agreeing(self) -> tuple[float, float]:
        """From which figure to which ours agrees: a bound as it stands, another with a margin of its effect.

        The margin is 15 % of what a ratio has beyond one, at least 0.01, and never reaches to the other sign: 2× may be
        1.85× to 2.15×, and 1.005× is no slowdown. “Up to” is a figure that is reached, not one that may be passed.
        """
        low = -math.inf if self.low is None else self.low if self.side == LEAST else self._moved(self.low, -1)
        high = math.inf if self.high is None else self.high if self.side == MOST else self._moved(self.high, 1)
        return low, high

    def _moved(self, value: float, sign: int) -> float:
        if self.about == SECONDS:
            return value * (1 + MARGIN) ** sign
        effect = value - 1
        moved = effect + sign * max(MARGIN * abs(effect), LEAST_MARGIN)
        return 1.0 if moved * effect < 0 else 1 + moved


_NUMBERS = ("gpus", "steps", "width", "height", "batch", "value", "most")


@lru_cache(maxsize=1)
def table() -> tuple[Figure, ...]:
    """Every published figure, one a line."""
    with FILE.open(encoding="utf-8", newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    numbers = ({name: json.loads(line[name]) if line[name] else None for name in _NUMBERS} for line in lines)
    return tuple(Figure(**line | own) for line, own in zip(lines, numbers, strict=True))


def _less(percent: float) -> float:
    return 1 - percent / 100


_PROMISES: dict[str, tuple[str, str, Callable[[float], float]]] = {  # metric -> about what, side, as a ratio or share
    "speedup": (SPEEDUP, "", float),
    "speedup_least": (SPEEDUP, LEAST, float),
    "speedup_up_to": (SPEEDUP, UP_TO, float),
    "latency_reduction": (SPEEDUP, "", lambda v: 1 / _less(v)),
    "seconds": (SECONDS, "", float),
    "memory_change": (MEMORY, "", lambda v: _less(-v)),
    "memory_less": (MEMORY, MOST, lambda v: _less(-v)),
    "memory_gib_most": (GIB, MOST, float),
    "quality_loss_most": (QUALITY, LEAST, _less),
    "comparison": (WORDS, "", float),
}


@lru_cache(maxsize=1)
def claims() -> tuple[Claim, ...]:
    """Every claim of the table once, with what repeats it; a technique that is only compared with makes none."""
    groups: dict[tuple, list[Figure]] = {}
    for f in table():
        groups.setdefault((f.source, f.gpu, f.gpus, f.technique, f.over, f.repeats), []).append(f)
    found = []
    for figures in groups.values():
        times = {f.metric: f.value for f in figures if f.metric not in _PROMISES}
        if times and figures[0].technique != figures[0].over:
            found.append(_of_times(figures[0], times))
        found += [_of_promise(f) for f in figures if f.metric in _PROMISES]
    return _counted_once(_contradicted(found))


def _claim(figure: Figure, **fields) -> Claim:
    """A claim with what its figure's line says."""
    settings = figure.settings
    over = (f for f in table() if (f.source, f.technique) == (figure.source, figure.over) and f.settings)
    plain = "" if settings == ANY else settings.split("; ")[0]  # what plans compare with has no figure of its own
    theirs = next(((f.settings, f.family) for f in over), (plain, ""))
    configuration = None if not settings else read(settings)  # empty of any setting
    over_settings = {"over_configuration": read(theirs[0]), "over_family": theirs[1]}
    own = vars(figure) | {"configuration": configuration, "anything": settings == ANY} | over_settings
    return Claim(**own | fields)


def _of_promise(figure: Figure) -> Claim:
    about, side, convert = _PROMISES[figure.metric]
    least = None if figure.value is None else convert(figure.value)
    most = least if figure.most is None else convert(figure.most)
    low, high = None if side == MOST else least, None if side == LEAST else most
    claim = _claim(figure, about=about, side=side, low=low, high=high)
    own = _own_ratio(figure) if about == SPEEDUP else None
    if own is None or claim.agreeing[0] <= own <= claim.agreeing[1]:
        return claim
    return replace(claim, flag=_joined([claim.flag, f"its own table has {own:.2f}×"]))


def _of_times(first: Figure, times: dict[str, float]) -> Claim:
    """Over what the source compares it with, or in seconds where that is nothing."""
    over, copies = _times(first, first.over), tuple[str, ...]()
    value = _seconds(over) / _seconds(times) if over else _seconds(times)
    if over and "latency_total" in times:
        both = over["latency_total"] / times["latency_total"]
        copies = (f"{both:.2f}× of the first and the second image together",)
    flag, about = _joined([first.flag, _impossible(times)]), SPEEDUP if over else SECONDS
    return _claim(first, about=about, side="", low=value, high=value, flag=flag, copies=copies)


def _times(figure: Figure, technique: str) -> dict[str, float]:
    """The times of a technique, by metric, in a figure's source on GPUs of the same name; of two tables the first."""
    same = [f for f in table() if (f.source, f.gpu, f.technique) == (figure.source, figure.gpu, technique)]
    return {f.metric: f.value for f in same if f.metric not in _PROMISES and not f.repeats}


def _seconds(times: dict[str, float]) -> float:
    return next(times[metric] for metric in TIMES if metric in times)


def _impossible(times: dict[str, float]) -> str:
    """What no samples can have: an average below the minimum, a percentile below a smaller one; "" if there is none."""
    least, average = times.get("latency_min"), times.get("latency_avg")
    if least and average and average < least:
        return f"impossible: its average of {average:g} s is below its minimum of {least:g} s"
    ordered = [times[name] for name in _ORDER if name in times]
    return "" if ordered == sorted(ordered) else "impossible: a percentile is below a smaller one"


def _own_ratio(figure: Figure) -> float | None:
    """The same ratio from the times that the source itself gives; None where it gives none."""
    own, over = _times(figure, figure.technique), _times(figure, figure.over)
    return _seconds(over) / _seconds(own) if own and over else None


def _contradicted(found: list[Claim]) -> list[Claim]:
    """Flags a figure that its own document gives twice and differently."""

    def others(claim: Claim) -> list[str]:
        if claim.about != SPEEDUP or claim.side or claim.low is None:
            return []
        about = (claim.source, claim.setting, claim.technique, claim.over)
        same = [o for o in found if o.about == SPEEDUP and not o.side and o.low and o is not claim]
        same = [o for o in same if (o.source, o.setting, o.technique, o.over) == about]
        return [o.text for o in same if abs(math.log(o.low / claim.low)) > 0.05]

    return [
        replace(c, flag=_joined([c.flag, f"the same document has {', '.join(said)}"])) if (said := others(c)) else c
        for c in found
    ]


def _counted_once(found: list[Claim]) -> tuple[Claim, ...]:
    """The claims without those that repeat one, which is told of them."""
    own = [c for c in found if not c.repeats]
    copies: dict[int, list[str]] = {}
    for copy in (c for c in found if c.repeats):
        source, technique = copy.repeats.split(" | ")
        said = [c for c in own if (c.source, c.technique, c.gpu[:4]) == (source, technique, copy.gpu[:4])]
        first = max(said, key=lambda c: (c.side == copy.side, c.about == copy.about))
        flags = [copy.flag]
        if (first.model, first.steps) != (copy.model, copy.steps):
            flags.append(f"it says so of {copy.model}, {copy.steps} steps")
        where = f"{copy.text} in {copy.source}" if copy.source != source else copy.text
        words = _joined([", ".join(filter(None, [where, copy.note])), *flags])
        copies.setdefault(id(first), []).append(words)
    return tuple(replace(c, copies=(*c.copies, *copies.get(id(c), ()))) for c in own)


def _joined(words: list[str]) -> str:
    return "; ".join(filter(None, words))


def read(settings: str) -> dict:
    """The column `settings`: "threshold=0.2; attention=flash" as a row has them."""
    pairs = (part.split("=", 1) for part in settings.split("; ") if "=" in part)
    return {name: _value(text) for name, text in pairs}


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def time_shares(family: families.Family, gpu: str) -> dict[float, float]:
    """Threshold -> share of the uncached time that a cache by itself left, as published for one GPU.

    Args:
        gpu: A6000 (the Nunchaku FB-Cache experiment), A100 80GB or H100 80GB (the plan's own table).

    Raises:
        KeyError: nothing is published for this pair.
    """
    found = {}
    for f in table():
        set_ = read(f.settings) if f.family == family.name and f.gpu == gpu and f.metric in TIMES else {}
        if "threshold" in set_ and "attention" not in set_ and (over := _times(f, f.over)):
            found[float(set_["threshold"])] = _seconds(_times(f, f.technique)) / _seconds(over)
    if not found:
        raise KeyError(f"nothing is published for {family.name} on {gpu}")
    return found


def first_block_shares() -> dict[float, float]:
    """Threshold -> share of the uncached time, in the Nunchaku FB-Cache experiment (second inference)."""
    return time_shares(families.FIRST_BLOCK, "A6000")


def inference_seconds() -> dict[float, dict[str, float]]:
    """Threshold -> latency_first, latency_second and latency_total in seconds, in the Nunchaku FB-Cache experiment."""
    found = (f for f in table() if f.metric == "latency_second")
    return {float(read(f.settings)["threshold"]): _times(f, f.technique) for f in found}
