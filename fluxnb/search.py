"""Finding the settings that aren't dominated, without trying them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable

Point = tuple[int, ...]  # one index into each axis
Value = tuple[float, float]  # (cost, quality): less cost and more quality are better


def dominates(a: Value, b: Value) -> bool:
    """Whether a is at least as good as b in both and better in one."""
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def front(values: dict[Hashable, Value]) -> list:
    """The points that no other dominates, cheapest first."""
    kept = [p for p, v in values.items() if not any(dominates(w, v) for w in values.values())]
    return sorted(kept, key=lambda p: values[p])


def neighbours(point: Point, axes: list[list], ordered: list[bool]) -> list[Point]:
    """One step along an ordered axis; any other value of an unordered one."""
    found = []
    for i, (axis, steps) in enumerate(zip(axes, ordered, strict=True)):
        places = (point[i] - 1, point[i] + 1) if steps else range(len(axis))
        found += [point[:i] + (k,) + point[i + 1 :] for k in places if 0 <= k < len(axis) and k != point[i]]
    return found


def pareto_local_search(
    axes: list[list], ordered: list[bool], evaluate: Callable[[Point], Value], starts: list[Point], limit: int
) -> dict[Point, Value]:
    """Explores the neighbours of undominated points until there are none left, or `limit` were evaluated.

    Source: Pareto local search (Paquete, Chiarandini and Stützle, 2004).
    """
    values = {p: evaluate(p) for p in dict.fromkeys(starts)}
    explored: set[Point] = set()
    while len(values) < limit:
        waiting = [p for p in front(values) if p not in explored]
        if not waiting:
            break
        explored.add(waiting[0])
        for p in neighbours(waiting[0], axes, ordered):
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
