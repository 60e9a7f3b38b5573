"""What to choose: the best row for each goal, with the quality that the same change has on trained weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from fluxnb import families
from fluxnb import techniques as t
from fluxnb.findings.rows import LOSS, SAME, finished, is_baseline, keeps_adherence, psnr_or_infinite, same_image
from fluxnb.findings.table import LEAST_PEAK, P50, PEAK, Column, table
from fluxnb.study.row import Row

LOSSLESS = 40.0  # dB of mean PSNR from which a difference is taken as lossless
ABOUT = 1.02  # times as much memory is about as much
_CONTROLS = tuple(f.name for f in families.ALL if f.control)
_GIVEN = ("model", "dtype", "inputs")  # settings that every row has, of what it was measured on


def quality_of(row: Row, judged: Iterable[Row]) -> Row | None:
    """The row on trained weights that shows what `row` does to images; None if none was judged.

    The same stack or the same settings; never a control, which changes the steps. Else, where only the order of
    operations is another, that part of it which changes images most; otherwise the same apart from how it is
    compiled and from what those of `judged` set that change nothing else.
    """
    others = [o for o in finished(judged) if not is_baseline(o) and o.family not in _CONTROLS]
    same = [o for o in others if _same_stack(o, row)] or [o for o in others if _set(o) == _set(row) != set()]
    if same:
        return same[0]
    if same_image(row):
        parts = [o for o in others if same_image(o) and _set(o) and _set(o) <= _set(row)]
        return min(parts, key=psnr_or_infinite, default=None)
    unseen = _compiled().union(*(_set(o) for o in others if same_image(o)))
    change = _set(row) - unseen
    return next((o for o in others if change and _set(o) - unseen == change), None)


def quality_of_phases(rows: list[Row], judged: list[Row]) -> list[float | None]:
    """PSNR on trained weights for each phase; None where a phase only reorders operations or made identical images."""
    found = [None if same_image(r) else quality_of(r, judged) for r in rows]
    return [None if other is None else other.psnr_db for other in found]


def recommendations(rows: list[Row], judged: list[Row]):
    """The best row for each goal: fastest lossless, fastest that keeps adherence, smallest memory.

    Of rows whose memory differs by 2 % or less, the fastest is the smallest one's equal. A goal that no row reaches
    is left out.

    Args:
        rows: time and memory; quality too if they are of trained weights.
        judged: rows of trained weights that quality is looked up in.
    """
    baseline = next(filter(is_baseline, judged), Row())  # a study may have no trained weights
    ok = [r for r in finished(rows) if r.speedup is not None]
    looked_up = [(r, quality_of(r, judged) if r.weights == "random" else r) for r in ok]

    def lossless(r: Row, seen: Row | None) -> bool:
        return same_image(r) if seen is None else psnr_or_infinite(seen) >= LOSSLESS

    def kept(r: Row, seen: Row | None) -> bool:
        return same_image(r) if seen is None else keeps_adherence(seen, baseline)

    within = [pair for pair in looked_up if kept(*pair)]
    goals = {
        f"fastest, lossless ({LOSSLESS:g} dB or more)": [pair for pair in looked_up if lossless(*pair)],
        f"fastest, adherence within {LOSS}": within,
    }
    if max((r.memory_peak_gib or 0.0 for r in ok), default=0.0) >= LEAST_PEAK:
        least = min((r.memory_peak_gib for r, _ in within if r.memory_peak_gib), default=0.0) * ABOUT
        small = [pair for pair in within if (pair[0].memory_peak_gib or math.inf) <= least]
        goals[f"smallest memory (to {ABOUT - 1:.0%}), adherence within {LOSS}"] = small
    best = {goal: max(own, key=lambda pair: pair[0].speedup) for goal, own in goals.items() if own}
    columns = (
        P50,
        Column("speedup", "speedup"),
        PEAK,
        Column("PSNR", [seen and seen.psnr_db for _, seen in best.values()], "dB"),
        Column("adherence", [seen and seen.adherence for _, seen in best.values()], share=True),
        Column("choose", "label"),
    )
    return table([r for r, _ in best.values()], columns, Column("goal", list(best)))


def recommendation_sentence(frame) -> str:
    """The recommendation in one breath."""
    parts = [f"{goal}: {row['choose']} ({row['speedup']:.2f}×)" for goal, row in frame.iterrows()]
    return "; ".join(parts) + "."


@functools.cache
def _compiled() -> frozenset[tuple[str, str]]:
    """What is set by compiling and recording, which is seldom judged, where that says to change no image."""
    every = [t.Regional(), t.TextEncoders(), t.TextEncoders(record=True), t.Compiled()]
    every += [t.CudaGraph(), t.CudaGraph(blocks=True)]
    return frozenset().union(*(_set(Row(settings=one.settings)) for one in every if one.exact in SAME))


def _set(row: Row) -> set[tuple[str, str]]:
    """A row's settings without those that every row has."""
    return {(name, str(value)) for name, value in row.settings.items() if name not in _GIVEN}


def _same_stack(one: Row, other: Row) -> bool:
    """Whether both are the same named stack, with the same number format."""
    return (
        one.stack is not None
        and one.stack == other.stack
        and one.setting("quantization") == other.setting("quantization")
    )
