"""What a search for the best cache may choose from: every way to decide when to reuse, with every way how."""

from __future__ import annotations

from collections.abc import Sequence

from fluxnb.cache import planning, predictors
from fluxnb.cache.engine import Cache
from fluxnb.cache.gates.dicache import DiCache
from fluxnb.cache.gates.first_block import FirstBlock
from fluxnb.cache.gates.interval import Interval
from fluxnb.cache.gates.pairs import Both, Cascade, Either
from fluxnb.cache.gates.schedule import Schedule, even_mask
from fluxnb.cache.gates.seacache import SeaCache
from fluxnb.cache.gates.teacache import TeaCache
from fluxnb.errors import UserError


def lines(
    model: str, steps: int, hows: Sequence[str], warm_up: int, *, tea: Sequence[float], first_block: Sequence[float],
    sea: Sequence[float], di: Sequence[float], intervals: Sequence[int], computed: Sequence[int],
) -> list[list[Cache]]:  # fmt: skip
    """Caches in lines: on each one dial is turned, from what reuses the least to what reuses the most.

    Args:
        model: by name, which TeaCache's polynomial is of.
        hows: predictors by name; those that extrapolate compute `warm_up` steps first, and so do intervals.
        tea, first_block, sea, di: thresholds of the gates; the first two are combined by every rule.
        intervals, computed: of the masks: every n-th step, and counts of evenly spread ones. Of the counts for which
            the model has plans, their masks, too: with their own weights and with every predictor.
    """
    counts = sorted((n for n in computed if n < steps), reverse=True)
    plans = _plans(model, steps, counts)
    found = [
        [Cache(gate, predictors.Aligned()) for gate in line]  # which asks for the first block
        for line in (list(map(DiCache, sorted(di))), [_even(n, steps, True) for n in counts])
    ]
    found.append([plan.cache() for plan in plans])
    for name in hows:
        first: dict = {"warm_up": 0 if name == predictors.Hold.name else warm_up}
        gates: list[list] = [
            [rule(TeaCache.at(t, model), FirstBlock(own), **first) for own in sorted(first_block)]
            for rule in (Cascade, Either, Both)
            for t in tea
        ]
        gates += [[SeaCache(t, **first) for t in sorted(sea)], [DiCache(t, **first) for t in sorted(di)]]
        gates += [[Interval(n, warm_up=warm_up, compute_last=True) for n in sorted(intervals)]]
        gates += [[_even(n, steps, False) for n in counts]]
        gates += [[planning.Planned(plan.mask, plan.signature) for plan in plans]]
        found += [[Cache(gate, predictors.named(name)) for gate in line] for line in gates]
    return [line for line in found if line]


def _plans(model: str, steps: int, counts: Sequence[int]) -> list[planning.Plan]:
    try:
        made = planning.of(model, steps)
    except UserError:  # none was made of it
        return []
    return [made[n] for n in counts if n in made]


def _even(computed: int, steps: int, first_block: bool) -> Schedule:
    return Schedule(even_mask(computed, steps), first_block, "evenly spread")
