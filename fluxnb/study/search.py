"""Finding the cheapest setting whose worst image keeps a floor, without making every image of every setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Point = tuple[int, int]  # which line, and which place on it
Value = tuple[float, float]  # (cost, quality): less cost and more quality are better


def dominates(a: Value, b: Value) -> bool:
    """Whether a is at least as good as b in both and better in one."""
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def front(values: dict[Any, Value]) -> list:
    """The points that no other dominates, cheapest first."""
    kept = [p for p, v in values.items() if not any(dominates(w, v) for w in values.values())]
    return sorted(kept, key=lambda p: values[p])


def overall(images: Sequence[Value]) -> Value:
    """Of a setting's images: what they cost on average, and the worst quality."""
    return statistics.fmean(cost for cost, _ in images), min(quality for _, quality in images)


@dataclass
class Found:
    """What a search asked for, and the cheapest point that keeps its floor; None if it found none."""

    best: Point | None = None
    asked: dict[Point, list[Value]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images were made for it."""
        return sum(map(len, self.asked.values()))


def cheapest(lines: Sequence[int], ask: Callable[[Point, int], Value], images: int, floor: float) -> Found:
    """Bisects every line for its cheapest point whose worst image keeps the floor, the most promising line first.

    An image of the middle of each line puts them in order. A point is given up at its first image below the floor, and
    as soon as it costs no less than the best one so far. It finds the grid's own cheapest where, along each line, cost
    and quality fall and every image costs alike. Source: bisection, and racing (Maron and Moore, 1994) on a minimum.

    Args:
        lines: how many points each line has, from the dearest to the cheapest.
        ask: makes an image of a point, the i-th of `images`.
    """
    found, least = Found(), math.inf

    def made(point: Point, i: int) -> Value:
        own = found.asked.setdefault(point, [])
        if len(own) == i:
            own.append(ask(point, i))
        return own[i]

    def keeps(point: Point) -> bool | None:
        """Whether it is the best so far; None: it keeps the floor as far as was seen, and costs no less."""
        for i in range(images):
            if made(point, i)[1] < floor:
                return False
            if overall(found.asked[point])[0] >= least:
                return None
        return True

    def promise(line: int) -> tuple[bool, float]:
        cost, quality = made((line, lines[line] // 2), 0)
        return quality < floor, cost

    for line in sorted(range(len(lines)), key=promise):
        low, high = 0, lines[line] - 1
        while low <= high:
            point = line, (low + high) // 2
            kept = keeps(point)
            if kept:
                found.best, least = point, overall(found.asked[point])[0]
            low, high = (low, point[1] - 1) if kept is False else (point[1] + 1, high)
    return found


def spread(points: list, most: int) -> list:
    """At most so many of the points, evenly, the first among them."""
    return points[:: max(1, -(-len(points) // most))]
