"""Which schedules a model of random weights is given: recorded on trained weights, or made from published times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fluxnb.cache import Cache, even_mask, prescribed
from fluxnb.errors import UserError
from fluxnb.families import SCHEDULE
from fluxnb.measure import telemetry

PRESCRIBED = f"{SCHEDULE.name}, random weights"  # so that no name reads like a cache's speedup on trained ones


def recorded(s, subject, candidates: list, steps: int) -> dict[str, str]:
    """Where it is from -> what the gate of each candidate decided on the first prompt and seed, for so many steps.

    Settings that decided the same stand together. In a replay without what was kept, the masks of the notebook's rows.
    Raises UserError where they are neither kept nor to be made.

    Args:
        s: the study that made or kept the decisions.
        candidates: caches with a dial; one that reused nothing is left out.
    """
    try:
        masks = {c.meaning["mark"]: s.traces(subject, c)[0]["mask"] for c in candidates}
    except UserError:
        if not telemetry.replayed():
            raise
        rows = (r for r in s.results.rows() if r.notebook == s.notebook and r.family == SCHEDULE.name)
        return {r.label: r.setting("mask") for r in rows if r.steps == steps and not r.setting("compile")}
    together: dict[str, list[str]] = {}
    for value, mask in masks.items():
        if len(mask) == steps and "0" in mask:
            together.setdefault(mask, []).append(value)
    where = f"as threshold{{}} {{}} decided on {subject.model.name}"
    return {where.format("s" * (len(values) > 1), " and ".join(values)): mask for mask, values in together.items()}


def even_schedules(steps: int, first_blocks: Iterable[bool] = (True, False)) -> list[Cache]:
    """Every count of computed steps below all, evenly spread: reused with the first block run, and without any."""
    masks = {f"{count} of {steps}": even_mask(count, steps) for count in range(steps - 1, 0, -1)}
    return [cache for block in first_blocks for cache in schedules(masks, {}, steps, block)]


def schedules(
    recorded: Mapping[str, str], shares: Mapping[float, float], steps: int, first_block: bool = True
) -> list[Cache]:
    """Prescribed schedules: the recorded masks, and masks that compute a published share of the steps, evenly spread.

    Their labels say what they are, of which weights, and where the mask is from.

    Args:
        recorded: where it is from -> mask.
        shares: threshold -> share of the uncached time that was published; 1 and more have nothing to reuse.
        first_block: whether a reused step runs the first block.
    """
    masks: dict[str, str] = {}
    for origin, mask in recorded.items():
        masks.setdefault(mask, origin)
    for threshold, share in shares.items():
        if threshold > 0 and share < 1:
            mask = even_mask(max(1, round(share * steps)), steps)
            masks.setdefault(mask, f"as many as the share of time published for {threshold:g}")
    return [prescribed(mask, f"{PRESCRIBED}, {origin}", first_block) for mask, origin in masks.items()]
