"""Finding the settings that aren't dominated, without trying them all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

Point = tuple[int, ...]  # one index into each axis
Value = tuple[float, float]  # (cost, quality): less cost and more quality are better


def dominates(a: Value, b: Value) -> bool:
    """Whether a is at least as good as b in both and better in one."""
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def front(values: dict[Any, Value]) -> list:
    """The points that no other dominates, cheapest first."""
    kept = [p for p, v in values.items() if not any(dominates(w, v) for w in values.values())]
    return sorted(kept, key=lambda p: values[p])


def starts(axes: list[list], ordered: list[bool]) -> list[Point]:
    """The middle of the ordered axes, with every combination of values of the unordered ones."""
    places = [[len(axis) // 2] if steps else range(len(axis)) for axis, steps in zip(axes, ordered, strict=True)]
    return list(itertools.product(*places))


def neighbours(point: Point, axes: list[list], ordered: list[bool]) -> list[Point]:
    """One step along an ordered axis, up or down."""
    found = []
    for i, (axis, steps) in enumerate(zip(axes, ordered, strict=True)):
        if steps:
            found += [point[:i] + (k,) + point[i + 1 :] for k in (point[i] - 1, point[i] + 1) if 0 <= k < len(axis)]
    return found


def pareto_local_search(
    axes: list[list], ordered: list[bool], evaluate: Callable[[Point], Value], limit: int
) -> dict[Point, Value]:
    """Explores the neighbours of undominated points until there are none left, or `limit` were evaluated.

    It begins with every combination of the unordered axes at the middle of the ordered ones, which sorts out the
    combinations that don't pay before their thresholds are tried. Source: Pareto local search (Paquete, Chiarandini
    and Stützle, 2004).
    """
    values: dict[Point, Value] = {}
    for p in starts(axes, ordered)[:limit]:
        values[p] = evaluate(p)
    explored: set[Point] = set()
    while len(values) < limit:
        waiting = [p for p in front(values) if p not in explored]
        if not waiting:
            break
        explored.add(waiting[-1])  # the best first: good settings tend to be near each other
        for p in neighbours(waiting[-1], axes, ordered):
            if p not in values and len(values) < limit:
                values[p] = evaluate(p)
    return values


def hypervolume(values: list[Value], worst: Value) -> float:
    """Area between a front and the point `worst` (most cost, least quality): how good a front is, in one figure."""
    area, quality = 0.0, worst[1]
    for cost, reached in sorted(values):
        if reached > quality and cost < worst[0]:
            area += (worst[0] - cost) * (reached - quality)
            quality = reached
    return area


def reached(found: dict[Any, Value], every: dict[Any, Value], worst: Value) -> float:
    """Share of the whole front's area that the front of what was found has."""
    own, whole = ([values[p] for p in front(values)] for values in (found, every))
    return hypervolume(own, worst) / hypervolume(whole, worst)


def spread(points: list, most: int) -> list:
    """At most so many of the points, evenly, the first among them."""
    return points[:: max(1, -(-len(points) // most))]
