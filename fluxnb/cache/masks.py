"""Masks by the field's ways to choose them: which steps a prescribed schedule computes, known before the first.

A mask has one sign for each step, 1 computed and 0 reused, as `Schedule` takes it. `planning` makes this study's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

from fluxnb.errors import UserError


def spectrum(steps: int, alpha: float = 0.75, warm_up: int = 5, interval: float = 2.0) -> str:
    """Computes the first steps, then ever fewer: the interval grows by `alpha` each time. Source: Spectrum, 2026.

    Raises UserError for what is no schedule.
    """
    if steps < 1 or warm_up < 1 or alpha < 0 or interval < 1:
        raise UserError(
            f"Spectrum's schedule of {steps} steps, the first {warm_up} computed, every {interval:g}, growing by "
            f"{alpha:g}, makes no sense: give 1 step or more, 1 or more computed first, an interval of 1 or more that "
            "doesn't shrink."
        )
    mask, reused = "", 0
    for index in range(steps):
        computed = index < warm_up or (reused + 1) % math.floor(interval) == 0
        if index >= warm_up and computed:
            interval = round(interval + alpha, 3)
        reused = 0 if computed else reused + 1
        mask += "1" if computed else "0"
    return mask


def annealed(loss: Callable[[str], float], steps: int, computed: int, seed: int = 0, iterations: int = 200) -> str:
    """Searches the mask of least loss: simulated annealing, then the best neighbour until none is better.

    A quarter of the computed steps are the first ones. Source: BudCache (2026), there for the mean squared error of
    the last latents with what the last computed step added.

    Args:
        loss: of a mask; asked once for each.
        iterations: of the annealing.
    """
    _check_budget(computed, steps)
    draw, known = random.Random(seed), dict[frozenset[int], float]()
    fixed = max(1, computed // 4)

    def of(chosen: frozenset[int]) -> float:
        if chosen not in known:
            known[chosen] = loss(_mask(chosen, steps))
        return known[chosen]

    free = range(fixed, steps)
    now = best = frozenset([*range(fixed), *draw.sample(free, computed - fixed)])
    hottest, coldest = 0.05, 1e-5
    for i in range(iterations if fixed < computed < steps else 0):
        other = _moved(now, free, draw)
        worse = of(other) - of(now)
        if worse < 0 or draw.random() < math.exp(-worse / (hottest * (coldest / hottest) ** (i / iterations))):
            now, best = other, min(best, other, key=of)
    for _ in range(20):
        found = min(_neighbours(now, free, draw), key=of, default=now)
        if of(found) >= of(now):
            break
        now, best = found, min(best, found, key=of)
    return _mask(best, steps)


def _moved(chosen: frozenset[int], free: range, draw: random.Random) -> frozenset[int]:
    """Nine times of ten one computed step moved, rather nearby; else two of them, anywhere."""
    computed, reused = [i for i in free if i in chosen], [i for i in free if i not in chosen]
    if draw.random() < 0.9 or min(len(computed), len(reused)) < 2:
        start = draw.choice(computed)
        near = [i for i in reused if abs(i - start) <= 3] if draw.random() < 0.7 else []
        return chosen - {start} | {draw.choice(near or reused)}
    return chosen - {*draw.sample(computed, 2)} | {*draw.sample(reused, 2)}


def _neighbours(chosen: frozenset[int], free: range, draw: random.Random) -> list[frozenset[int]]:
    """Each computed step moved by up to three, and to two places anywhere."""
    computed = sorted(chosen & {*free})
    near = [(start, place) for start in computed for place in range(start - 3, start + 4)]
    moves = near + [(start, draw.choice(free)) for start in computed for _ in range(2)]
    return list(dict.fromkeys(chosen - {a} | {b} for a, b in moves if b in free and b not in chosen))


def programmed(cost: np.ndarray, computed: int) -> str:
    """The mask of least total cost, by dynamic programming. Source: DPCache (2026), its path-aware cost.

    Args:
        cost: [i, j, k], (steps + 1) each way: of reusing the steps between j and k, computed, where i was computed
            before j (i = j: none was); k = steps is the end.
    """
    steps = len(cost) - 1
    _check_budget(computed, steps)
    # the last two computed -> the least cost so far, all computed
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}
    for _ in range(computed - 1):
        further: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (i, j), (spent, path) in best.items():
            for k in range(j + 1, steps):
                total = spent + float(cost[i, j, k])
                if (j, k) not in further or total < further[j, k][0]:
                    further[j, k] = total, (*path, k)
        best = further
    _, path = min((spent + float(cost[i, j, steps]), path) for (i, j), (spent, path) in best.items())
    return _mask(frozenset(path), steps)


def _mask(chosen: frozenset[int], steps: int) -> str:
    return "".join("1" if i in chosen else "0" for i in range(steps))


def _check_budget(computed: int, steps: int) -> None:
    if not 1 <= computed <= steps:
        raise UserError(f"{computed} of {steps} steps can't be computed: at least the first, at most all.")
