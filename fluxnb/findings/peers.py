"""The field's methods at equal computed steps: which is ahead, by how much, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fluxnb.errors import UserError
from fluxnb.families import FEWER_STEPS, SECOND_ORDER
from fluxnb.findings.rows import baseline_of, finished, is_baseline, judged, of, overlap, within_noise
from fluxnb.findings.table import COMPUTED, Column, table
from fluxnb.findings.words import labels
from fluxnb.measure import stats
from fluxnb.study.row import Row
from fluxnb.techniques import peers

PREDICTED_DB = 2.0  # as far as a prediction of quality may be off
PER_IMAGE = {"psnr_db": ("PSNR", "dB", np.min), "st_lpips": ("ST-LPIPS", "", np.max)}  # with what takes the worst image


def spread_of(row: Row, figure: str, worst: bool = False) -> tuple[float, float, float] | None:
    """(value, low, high) of a figure over a row's images: its mean with its interval, or its worst, which has none.

    Of PSNR the images that differ count. None where none does, or the row doesn't have every image's.

    Args:
        figure: a key of `PER_IMAGE`.
    """
    values = [v for v in (row.shown("each") or {}).get(figure, ()) if v is not None]
    if not values or row.weights == "random":
        return None
    if worst:
        return (float(PER_IMAGE[figure][2](values)),) * 3
    return (float(np.mean(values)), *stats.of_mean(values))


def at_steps(rows: Iterable[Row], count: int) -> list[Row]:
    """What was judged and computes so many steps, rounded over its images: the highest mean PSNR first."""
    own = [r for r in finished(rows) if judged(r) and not is_baseline(r) and r.computed_steps is not None]
    own = [r for r in own if round(r.computed_steps) == count and spread_of(r, "psnr_db")]
    return sorted(own, key=lambda r: -_mean(r))


def level_with(one: Row, other: Row) -> bool:
    """Whether the mean PSNR of two rows can't be told apart: their intervals overlap, as everywhere."""
    return overlap(spread_of(one, "psnr_db")[1:], spread_of(other, "psnr_db")[1:])


def is_control(row: Row) -> bool:
    """Whether it is what every method has to beat."""
    return row.family in (FEWER_STEPS.name, SECOND_ORDER.name)


def whose(row: Row) -> str:
    """Whose a method is, as a table says it."""
    return peers.origin(row.technique) or "control"


def equal_steps_table(rows: Sequence[Row], counts: Sequence[int]):
    """At each number of computed steps every method, and how far it is behind the best."""
    found = [(count, r, own[0]) for count in counts for own in [at_steps(rows, count)] for r in own]

    def ends(figure: str, worst: bool) -> list:
        spreads = [spread_of(r, figure, worst) for _, r, _ in found]
        within = "" if worst else " [{1:.3g}, {2:.3g}]"
        return [None if s is None else ("{0:.3g}" + within).format(*s) for s in spreads]

    quality = (
        Column(f"{how} {name}", ends(figure, how == "worst"), unit)
        for figure, (name, unit, _) in PER_IMAGE.items() for how in ("mean", "worst")
    )  # fmt: skip
    columns = (
        Column("whose", [whose(r) for _, r, _ in found]),
        Column("images", "images", format=".0f"),
        *quality,
        Column("behind the best", [_mean(best) - _mean(r) for _, r, best in found], "dB", format=".1f"),
        Column("within noise", ["–" if r is best else "yes" if level_with(r, best) else "no" for _, r, best in found]),
        COMPUTED,
        Column("setting", "label"),
    )
    names = [f"{count}: {r.technique}" for count, r, _ in found]
    return table([r for _, r, _ in found], columns, Column("steps: method", names))


def equal_steps_sentence(rows: list[Row], counts: Sequence[int]) -> str:
    """At each number of computed steps, a line each, what is ahead, what is level, and the best of a library."""
    parts, images = [], set[int]()
    for count in counts:
        own = at_steps(rows, count)
        if not own:
            continue
        images |= {r.images for r in own if r.images}
        best, shipped = own[0], [r for r in own if whose(r) == peers.SHIPPED]
        said = f"{count} steps: {best.technique} ({whose(best)}), {_words(best)}"
        level = [r.technique for r in own[1:] if level_with(r, best)]
        said += f", level within the noise with {_listed(level)}" if level else ""
        if shipped and shipped[0] is not best:
            said += f"; the best of a library is {shipped[0].technique}, {_behind(shipped[0], best)}"
        parts.append(said)
    if not parts:
        return "no method was judged image by image at any of these numbers of computed steps."
    each = " to ".join(f"{n:.0f}" for n in sorted({min(images), max(images)})) if images else "an unknown number of"
    return "\n".join([f"the best at equal computed steps, judged on {each} images", *parts])


def new_here_sentence(rows: list[Row], counts: Sequence[int]) -> str:
    """Whether what is new here helped: at each number of steps its best beside the best of everybody else's."""
    parts, ahead, told = [], 0, 0
    for count in counts:
        own = at_steps(rows, count)
        new = [r for r in own if whose(r) == peers.OWN]
        others = [r for r in own if whose(r) in (peers.SHIPPED, peers.PUBLISHED)]
        if not new or not others:
            continue
        told, gain = told + 1, _mean(new[0]) - _mean(others[0])
        noise = level_with(new[0], others[0])
        ahead += gain > 0 and not noise
        worst = spread_of(new[0], "psnr_db", True)[0] - spread_of(others[0], "psnr_db", True)[0]
        parts.append(
            f"at {count} steps {new[0].technique} is {gain:+.1f} dB beside {others[0].technique}"
            f"{' (within the noise)' if noise else ''}, its worst image {worst:+.1f} dB"
        )
    if not parts:
        return "nothing that is new here was judged beside what others ship or publish at these numbers of steps."
    head = f"What is new here is ahead beyond the noise at {ahead} of {told} number{'s' * (told != 1)} of steps"
    return f"{head}: {'; '.join(parts)}."


def predicted_sentence(rows: list[Row], counts: Sequence[int]) -> str:
    """How near the quality that a model's plans predict, from other prompts, is to what was measured."""
    from fluxnb.cache import planning

    own = [(count, r) for count in counts for r in at_steps(rows, count) if r.technique == peers.PLANNED]
    try:
        plans = planning.of(own[0][1].model, own[0][1].total_steps) if own else {}
    except UserError:
        plans = {}
    told = [
        (plan, plan.expected(len(r.shown("each")["psnr_db"])), _mean(r))
        for count, r in own
        if (plan := plans.get(count)) and r.setting("mask") == plan.mask
    ]
    if not told:
        return "no planned cache that there still is was judged here, so nothing is said of what a plan predicts."
    near = sum(abs(plan.predicted_db - found) <= PREDICTED_DB for plan, _, found in told)
    likely = sum(ends is not None and ends[0] <= found <= ends[1] for _, ends, found in told)
    words = "; ".join(
        f"at {plan.computed} steps {plan.predicted_db:.1f} dB "
        + (f"[{ends[0]:.1f}, {ends[1]:.1f}] " if ends else "")
        + f"predicted, {found:.1f} dB measured"
        for plan, ends, found in told
    )
    formats = sorted({r.setting("dtype") for _, r in own} - {None, "float32"})
    rounded = f" These are images of {' and '.join(formats)}, whose rounding no plan foretells." if formats else ""
    return (
        f"The predicted frontier is within {PREDICTED_DB:g} dB of the measured one at {near} of {len(told)} "
        f"number{'s' * (len(told) != 1)} of steps, and what was measured lies within two standard errors of the mean "
        f"of as many other images, in brackets, at {likely}: {words} (mean PSNR).{rounded}"
    )


def controls_sentence(rows: list[Row], counts: Sequence[int]) -> str:
    """Where simply taking fewer steps is level with the best method or ahead of it."""
    said = []
    for count in counts:
        own = at_steps(rows, count)
        for control in of(own, FEWER_STEPS, SECOND_ORDER)[:1]:
            place = own.index(control) + 1
            said.append(f"at {count} {control.technique} is {place}. of {len(own)}, {_behind(control, own[0])}")
    if not said:
        return "fewer steps weren't judged at these numbers of steps."
    return f"Fewer steps, by the better of two solvers: {'; '.join(said)}."


def libraries_sentence(rows: list[Row]) -> str:
    """At full size and one mask: how the fastest of this study stands to the fastest of a library, and what failed."""
    timed = [r for r in finished(rows) if not is_baseline(r) and r.speedup is not None]
    failed = [r for r in rows if not r.ok]
    lost = f"; not to be had: {labels(failed)}" if failed else ""
    shipped = [r for r in timed if whose(r) == peers.SHIPPED]
    own = [r for r in timed if whose(r) != peers.SHIPPED]
    if not shipped or not own:
        return f"no library was timed beside the study's own here{lost}."
    ours, theirs = (max(some, key=lambda r: r.speedup) for some in (own, shipped))
    ratio, base = ours.speedup / theirs.speedup, baseline_of(rows)
    noise = " (within the noise)" if within_noise(ours, theirs, base) else ""
    waits = [f"{r.first_s:.3g} s" for r in (ours, theirs) if r.first_s is not None]
    first = f", the first image after {waits[0]} against {waits[1]}" if len(waits) == 2 else ""
    return (
        f"{ours.label} takes {ours.latency_p50:.3g} s and {theirs.label} {theirs.latency_p50:.3g} s: "
        f"{ratio:.2f} times as fast{noise}{first}{lost}."
    )


def drawn(rows: Sequence[Row], counts: Sequence[int], most: int = 3) -> dict[str, list[Row]]:
    """Method -> its rows at these numbers of steps, for a chart: all controls, and of each origin the few nearest.

    Nearest by the mean of how far they are behind the best where they are.
    """
    own = {count: at_steps(rows, count) for count in counts}
    behind: dict[str, list[float]] = {}
    found: dict[str, dict[int, Row]] = {}
    for count, ranked in own.items():
        for r in reversed(ranked):  # of several settings at one number the best stays
            found.setdefault(r.technique, {})[count] = r
            behind.setdefault(r.technique, []).append(_mean(ranked[0]) - _mean(r))
    names = sorted(found, key=lambda name: (sum(behind[name]) / len(behind[name]), -len(found[name])))
    kept = [n for place, n in enumerate(names) if _before(names[:place], n) < most or peers.origin(n) is None]
    return {name: [found[name][count] for count in sorted(found[name])] for name in kept}


def _before(names: list[str], name: str) -> int:
    return sum(peers.origin(other) == peers.origin(name) for other in names)


def _mean(row: Row) -> float:
    found = spread_of(row, "psnr_db")
    return -math.inf if found is None else found[0]


def _words(row: Row) -> str:
    mean, worst = spread_of(row, "psnr_db"), spread_of(row, "psnr_db", worst=True)
    return f"mean {mean[0]:.1f} dB [{mean[1]:.1f}, {mean[2]:.1f}], worst {worst[0]:.1f} dB"


def _behind(row: Row, best: Row) -> str:
    if row is best:
        return f"ahead with {_words(row)}"
    noise = " (within the noise)" if level_with(row, best) else ""
    return f"{_mean(best) - _mean(row):.1f} dB behind{noise}, worst {spread_of(row, 'psnr_db', True)[0]:.1f} dB"


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
