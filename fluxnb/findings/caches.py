"""What rows of caches say: against fewer steps, against each other, against what was published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from fluxnb import families
from fluxnb.cache import teacache
from fluxnb.families import COMBINED, FEWER_STEPS, FIRST_BLOCK, INTERVAL, SECOND_ORDER, TEACACHE, Family
from fluxnb.findings import published
from fluxnb.findings.rows import (
    BALANCED_DB,
    CACHES,
    NEAR_LOSSLESS_DB,
    above,
    baseline_of,
    ends,
    is_baseline,
    judged,
    leaders,
    of,
    of_one_session,
    within_noise,
    worst_db,
)
from fluxnb.findings.table import ADHERENCE, COMPUTED, JUDGED, PSNR, SPEEDUP, THRESHOLD, WORST_PSNR, Column, table
from fluxnb.findings.words import labels, sureness
from fluxnb.measure import stats
from fluxnb.study.row import Row

LEVELS = {"near-lossless": NEAR_LOSSLESS_DB, "balanced": BALANCED_DB}
PRESETS = {  # name -> (least PSNR of the worst image in dB, the plan's threshold, the plan's expected speedup)
    "conservative": (NEAR_LOSSLESS_DB, 0.05, 1.5),
    "balanced": (BALANCED_DB, 0.12, 2.0),
    "aggressive": (-math.inf, 0.2, 2.5),
}
NEAR = 0.1  # of the uncached run: shares that are no further apart are called near
UNJUDGED = "These rows don't say how many images were judged, so nothing is chosen from them."


# --- which, and how good ------------------------------------------------------------------------------------


def told(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The baseline, and what may be ranked: timed and judged by today's rules, of the session that most are of."""
    ranked = of_one_session([r for r in rows if r.speedup is not None and judged(r) and not is_baseline(r)])
    session = ranked[0].session if ranked else None
    own = (r for r in rows if is_baseline(r) and r.session == session)
    return next(own, baseline_of(rows)), ranked


def unranked(rows: Sequence[Row]) -> str:
    """Why nothing may be ranked."""
    timed = any(r.speedup is not None and not is_baseline(r) for r in rows)
    return UNJUDGED if timed else "no setting was timed here, so nothing is chosen."


def fastest_near(rows: Iterable[Row], baseline: Row, floor_db: float = -math.inf) -> list[Row]:
    """The fastest whose worst image keeps a floor, and behind it what is as fast within the noise.

    Empty where nothing that keeps the floor is faster than the baseline beyond the noise.
    """
    return leaders([r for r in rows if above(r, floor_db)], baseline)


def images_words(row: Row) -> str:
    """How near its images are to the uncached ones: the worst beside the mean."""
    count = f"{row.images} image{'s' * (row.images != 1)}"
    if worst_db(row) == math.inf:
        return f"{count} identical"
    if row.psnr_min_db is None:
        return "images not judged"
    same = f" ({row.psnr_identical} identical)" if row.psnr_identical else ""
    words = f"worst of {count}{same} {row.psnr_min_db:.1f} dB, mean {row.psnr_db:.1f} dB"
    if row.st_lpips is None:
        return words
    return f"{words}, ST-LPIPS {row.st_lpips_max:.2g} at worst, mean {row.st_lpips:.2g}"


def words_of(row: Row) -> str:
    """A setting with its speedup, how sure that is, its computed steps and its images."""
    steps = f"{row.computed_steps:.1f} of {row.total_steps} steps computed"
    steps = f"{row.total_steps} steps" if row.computed_steps == row.total_steps else steps
    return f"{row.label} **{row.speedup:.2f}×** ({sureness(row)}; {steps}; {images_words(row)})"


def words_of_fastest(found: list[Row]) -> str:
    """The first of `fastest_near`, and which of the others is nearest to its images."""
    near = max(found, key=worst_db)
    also = (
        "" if worst_db(near) == worst_db(found[0]) else f"; {near.label} as fast within the noise, {images_words(near)}"
    )
    return words_of(found[0]) + also


def briefly(found: list[Row]) -> str:
    """The same in a list of several: speedup with its interval or range, and the worst image."""
    first, near = found[0], max(found, key=worst_db)
    low, high = ends(first) or (None, None)
    sure = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    also = "" if near is first else f" ({near.label} as fast within the noise, worst {worst_db(near):.1f} dB)"
    return f"{first.label} **{first.speedup:.2f}×**{sure}, worst {worst_db(first):.1f} dB{also}"


def standing(one: Row, other: Row, baseline: Row) -> str:
    """How the speed of one row stands to another's, as far as can be told."""
    if within_noise(one, other, baseline):
        return "as fast within the noise as"
    return "faster than" if one.speedup > other.speedup else "slower than"


def met(row: Row, least: float) -> str:
    """Whether its speedup reaches a mark: a verdict takes `stats.HEADLINE` rounds that are all on one side of it."""
    found = ends(row)
    if found is None or row.n < stats.HEADLINE or found[0] < least <= found[1]:
        return "can't be told"
    return "met" if found[0] >= least else "not met"


def cache_sentence(rows: list[Row], family: Family) -> str:
    """At each floor the fastest setting of a cache and the fastest control, and how they stand at equal steps."""
    (baseline, ranked), parts = told(rows), []
    if not ranked:
        return unranked(rows)
    controls = FEWER_STEPS, SECOND_ORDER
    there = of(ranked, *controls)
    none = f"no fewer steps timed here ({labels(there)})" if there else "fewer steps weren't timed here"
    for name, floor in LEVELS.items():
        best, control = (fastest_near(of(ranked, *kind), baseline, floor) for kind in ((family,), controls))
        said, also = f"{name} (worst image {floor:g} dB or more): ", f"; {none}"
        if not best:
            said += f"no setting of {family.name} here is that near and faster than the baseline beyond the noise"
            also += " are, either" * bool(there)
            parts.append(said + (f"; fewer steps are: {words_of_fastest(control)}" if control else also))
        elif not control:
            also += " are that near and faster beyond the noise" * bool(there)
            parts.append(f"{said}{words_of_fastest(best)}{also}")
        else:
            stands = standing(best[0], control[0], baseline)
            parts.append(
                f"{said}{words_of_fastest(best)}. That is {stands} the fastest of fewer steps here: "
                f"{words_of_fastest(control)}"
            )
    solvers = zip(controls, ("fewer Euler steps", "fewer steps of the second-order solver"), strict=True)
    gaps = {what: against_control(ranked, family, control) for control, what in solvers}
    if equal := "; ".join(gaps_words(found, what) for what, found in gaps.items() if found):
        parts.append(f"At equal computed steps its worst image is {equal}")
    return sentences(parts)


def sentences(parts: Sequence[str]) -> str:
    """Parts as sentences; the first may stand behind a colon, so it begins as it is."""
    first, *others = parts
    return ". ".join([first, *(part[:1].upper() + part[1:] for part in others)]) + "."


def interval_sentence(rows: list[Row], family: Family) -> str:
    """Whether looking beats not looking: a gate beside a fixed interval at equal hit rate."""
    gaps = against_control(rows, family, INTERVAL)
    if not gaps:
        return f"no setting of {family.name} computes as many steps as a fixed interval here."
    said = gaps_words(gaps, "a fixed interval, which does not look")
    return f"at equal hit rate, the worst image of {family.name} is {said}."


def control_psnr(rows: Iterable[Row], steps: float, control: Family = FEWER_STEPS) -> float | None:
    """PSNR of the worst image of a control that computes so many steps.

    Between its two nearest rows, linearly; None outside them.
    """
    points = sorted((r.computed_steps, r.psnr_min_db) for r in of(rows, control) if r.psnr_min_db is not None)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= steps <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (steps - x0) / (x1 - x0)
    return None


def against_control(rows: Iterable[Row], family: Family, control: Family = FEWER_STEPS) -> list[float]:
    """How many dB of PSNR the worst image of each setting of a family is above a control's, at equal computed steps."""
    pairs = [(r.psnr_min_db, control_psnr(rows, r.computed_steps, control)) for r in of(rows, family)]
    return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def gaps_words(gaps: list[float], what: str) -> str:
    """Differences of the worst images' PSNR to a control's, in words that hold for all of them."""
    low, high, mean = min(gaps), max(gaps), sum(gaps) / len(gaps)
    if max(-low, high) < 0.05:
        return f"level with that of {what} ({len(gaps)} setting{'s' * (len(gaps) > 1)})"
    where = "above" if low > -0.05 else "below" if high < 0.05 else "above at some settings and below at others"
    where = f"{where}, compared with that of {what}" if " " in where else f"{where} that of {what}"
    if len(gaps) == 1:
        return f"{where}: {mean:+.1f} dB (1 setting)"
    return f"{where}: {mean:+.1f} dB on average ({low:+.1f} to {high:+.1f} dB, {len(gaps)} settings)"


def presets(rows: list[Row], family: Family):
    """The plan's three presets, derived: of the fastest whose worst image keeps its floor, all alike, the nearest."""
    baseline, ranked = told(rows)
    own = of(ranked, family)
    best = [max(fastest_near(own, baseline, floor), key=worst_db, default=Row()) for floor, *_ in PRESETS.values()]
    there = [next((r for r in own if r.setting("threshold") == planned), Row()) for _, planned, _ in PRESETS.values()]
    expected = [least for *_, least in PRESETS.values()]
    columns = (
        Column("worst image at least", [None if f == -math.inf else f for f, *_ in PRESETS.values()], "dB"),
        THRESHOLD,
        *SPEEDUP,
        COMPUTED,
        JUDGED,
        PSNR,
        WORST_PSNR,
        ADHERENCE,
        Column("plan's threshold", [planned for _, planned, _ in PRESETS.values()]),
        Column("plan's expectation", expected, "×"),
        Column("measured there", [r.speedup for r in there], "×"),
        Column("worst PSNR there", [r.psnr_min_db for r in there], "dB"),
        Column("expected there", [met(r, x) if r.status else None for r, x in zip(there, expected, strict=True)]),
    )
    return table(best, columns, Column("preset", list(PRESETS)))


def best_at_equal_steps(rows: list[Row]):
    """For each number of steps of the control: the cache that computes no more and is nearest at its worst image."""
    caches = [r for r in of(rows, *CACHES) if r.psnr_min_db is not None]
    second = {r.steps: r for r in of(rows, SECOND_ORDER)}
    found = []
    for control in sorted(of(rows, FEWER_STEPS), key=lambda r: -r.steps):
        near = (r for r in caches if r.computed_steps <= control.steps)
        best = max(near, key=lambda r: r.psnr_min_db, default=None)
        if best is not None and control.psnr_min_db is not None:
            found.append((control, best, second.get(control.steps, Row())))
    columns = (
        Column("best cache", "label"),
        Column("computed", "computed_steps"),
        JUDGED,
        Column("cache mean PSNR", "psnr_db", "dB"),
        Column("cache worst PSNR", "psnr_min_db", "dB"),
        Column("Euler mean PSNR", [c.psnr_db for c, *_ in found], "dB"),
        Column("Euler worst PSNR", [c.psnr_min_db for c, *_ in found], "dB"),
        Column("gain, mean", [b.psnr_db - c.psnr_db for c, b, _ in found], "dB"),
        Column("gain, worst", [b.psnr_min_db - c.psnr_min_db for c, b, _ in found], "dB"),
        Column("DPM-Solver++ mean PSNR", [s.psnr_db for *_, s in found], "dB"),
        Column("DPM-Solver++ worst PSNR", [s.psnr_min_db for *_, s in found], "dB"),
    )
    return table([b for _, b, _ in found], columns, Column("steps", [c.steps for c, *_ in found]))


def combined_sentence(rows: list[Row]) -> str:
    """Whether combining the two gates pays: at each floor the fastest combination beside every other kind.

    Beside a combination stands what is faster than the baseline beyond the noise, or can't be told from the first.
    """
    (baseline, ranked), parts = told(rows), []
    if not ranked:
        return unranked(rows)
    others = [family for family in (*CACHES, FEWER_STEPS, SECOND_ORDER) if family is not COMBINED]
    for name, floor in LEVELS.items():
        said, together = (
            f"{name} (worst image {floor:g} dB or more): ",
            fastest_near(of(ranked, COMBINED), baseline, floor),
        )
        best = {family: found for family in others if (found := fastest_near(of(ranked, family), baseline, floor))}
        if not together:
            words = "; ".join(f"{family.name}: {briefly(found)}" for family, found in best.items())
            said += "no combination timed here is that near and faster beyond the noise"
            parts.append(f"{said}; {words or 'nor is anything else'}")
            continue
        for family in set(others) - set(best):
            near = [r for r in of(ranked, family) if above(r, floor) and within_noise(r, together[0], baseline)]
            best |= {family: [max(near, key=worst_db)]} if near else {}
        stands = {f: standing(together[0], best[f][0], baseline) for f in others if f in best}
        alone = {stands[f] for f in (FIRST_BLOCK, TEACACHE) if f in stands}
        besides = [f.name for f, how in stands.items() if f not in (FIRST_BLOCK, TEACACHE) and how != "faster than"]
        if "slower than" in alone:
            verdict = "combining doesn't pay"
        elif alone - {"faster than"}:
            verdict = "whether combining pays can't be told, one cache alone is as fast within the noise"
        else:
            verdict = "combining pays over either cache alone, as they are timed here"
        verdict += f" (it is no faster, beyond the noise, than {', '.join(besides)})" if besides else ""
        words = "; ".join(f"{f.name}: {briefly(best[f])}" for f in stands)
        parts.append(
            f"{said}{verdict}: {words_of_fastest(together)}; {words or 'nothing else is that near and faster'}"
        )
    return sentences(parts)


def strategies_sentence(rows: list[Row]) -> str:
    """Which way of reusing is nearest at its worst image: of all, and of those that compute no more than the first."""
    found = [r for r in rows if not is_baseline(r) and judged(r) and worst_db(r) is not None]
    if not found:
        return UNJUDGED
    first, best = found[0], max(found, key=worst_db)
    as_many = max((r for r in found if r.computed_steps <= first.computed_steps), key=worst_db)
    said = f"nearest to the uncached image at its worst is {words_of(best)}"
    if best is not as_many:
        said += f"; of those that compute no more steps than {first.label}, "
        said += f"none is nearer than it: {words_of(first)}" if as_many is first else words_of(as_many)
    return f"{said}." if first in (best, as_many) else f"{said}; {first.label} itself: {words_of(first)}."


# --- what a step costs --------------------------------------------------------------------------------------


def replay_sentence(rows: list[Row]) -> str:
    """What the shortest of prescribed schedules takes, and what a reused step costs."""
    best = min((r for r in rows if not is_baseline(r) and r.speedup), key=lambda r: r.computed_steps, default=None)
    if best is None:
        return "no prescribed schedule was timed here."
    said = (
        f"a prescribed schedule of {best.computed_steps:.0f} of {best.total_steps} steps ({best.weights} weights, so "
        f"time only) takes {best.latency_p50:.3g} s, where all steps take {best.baseline_s:.3g} s: "
        f"**{best.speedup:.2f}×** ({sureness(best)}). "
    )
    return (said + hit_cost_sentence(rows)).rstrip()


def hit_cost_sentence(rows: list[Row]) -> str:
    """What a reused step costs as a share of a computed one: least squares of the denoising time.

    The time is taken as computed steps times one cost plus reused steps times another, in the session that most rows
    are of; nothing for fewer than three schedules, or where sessions aren't known.
    """
    import numpy as np

    rows = of_one_session([r for r in rows if r.denoise_s])
    computed = np.array([r.computed_steps for r in rows], dtype=float)
    reused = np.array([r.total_steps for r in rows], dtype=float) - computed
    if len(rows) < 3 or rows[0].session is None or not reused.any():
        return ""
    times = np.array([r.denoise_s for r in rows])
    (step, hit), *_ = np.linalg.lstsq(np.stack((computed, reused), axis=1), times, rcond=None)
    return (
        f"A computed step takes {1e3 * step:.3g} ms and a reused one {hit / step:.1%} of that "
        f"(least squares over {len(rows)} schedules)."
    )


def engine_sentence(rows: list[Row]) -> str:
    """What the engine costs on a computed step, and what a reused step costs, as shares of a computed step.

    Args:
        rows: uncached; looking at every step; reusing all steps but one, with and without a block.
    """
    if len(rows) != 4 or not all(r.ok and r.session == rows[0].session is not None for r in rows):
        return "what the engine costs can't be told: one of four rows is missing, or not known to be of their session."
    plain, looks, first, none = (r.denoise_s for r in rows)
    n = rows[0].steps
    step = plain / n
    reused = {"with the first block": first, "without any block": none}
    words = ", ".join(f"{name} {(seconds - step) / (n - 1) / step:.1%}" for name, seconds in reused.items())
    costs = f"costs {(looks - plain) / plain:+.1%}"
    if within_noise(rows[1], rows[0], rows[0]):
        costs = f"costs nothing beyond the noise (×{rows[1].speedup:.3f} as fast, {sureness(rows[1])})"
    return f"a computed step takes {1e3 * step:.3g} ms; looking at it {costs}; a reused step costs {words} of it."


def polynomial_sentence(fit, coefficients: Sequence[float]) -> str:
    """What a fitted polynomial explains, and what the least value of a published one means for its thresholds.

    Args:
        fit: of fluxnb.cache.teacache.
        coefficients: the published ones, highest power first.
    """
    import numpy as np

    least = np.polyval(coefficients, np.linspace(0, 0.5, 501)).min()
    return (
        f"the fitted polynomial explains R² = {fit.r2:.2f} of the output's change ({len(fit.changes)} steps of "
        f"{fit.images} image{'s' * (fit.images != 1)}). FLUX.1-dev's published one never falls below {least:.2f} for "
        f"changes up to 0.5: a threshold T then allows at most T / {least:.2f} reused steps in a row, whatever the "
        "image."
    )


def shipped_sentence(model: str) -> str:
    """What a model's shipped polynomial was fitted to, and how much of the output's change it explains."""
    if (fit := teacache.shipped(model)) is None:
        return "no polynomial is shipped with this model."
    whose = f" of {fit.prompts} prompts" * bool(fit.prompts)
    return (
        f"the polynomial that is shipped with it explains R² = {fit.r2:.2f} of the output's change, over "
        f"{len(fit.changes)} steps of {fit.images} images{whose}, {fit.steps} steps each."
    )


def steps_of_work(traces: list[dict], blocks: int) -> float:
    """The blocks that ran for an image, on average, in steps of `blocks` each: a reused step may have run one."""
    ran = [sum(1.0 if at is None else at == "residual" and 1 / blocks for at in t["reused_at"]) for t in traces]
    return sum(ran) / len(ran)


# --- what gates decide --------------------------------------------------------------------------------------


def spread_sentence(traces: Mapping[str, list[dict]]) -> str:
    """How far the decisions of a gate differ between images: a gate that doesn't, acts like a schedule."""
    parts = []
    for label, found in traces.items():
        counts = [t["mask"].count("1") for t in found]
        masks = len({t["mask"] for t in found})
        hit_rate = 1 - sum(counts) / sum(len(t["mask"]) for t in found)
        computed = " to ".join(map(str, dict.fromkeys((min(counts), max(counts)))))
        one = "one mask for all" if masks == 1 else f"{masks} different masks"
        parts.append(f"{label}: hit rate {hit_rate:.0%}, {computed} computed, {one}")
    count = len(next(iter(traces.values())))
    return f"over {count} image{'s' * (count != 1)}, {'; '.join(parts)}."


def computed_shares(rows: Sequence[Row]) -> dict[float, float]:
    """Threshold -> share of steps computed."""
    return {r.setting("threshold"): r.computed_steps / r.total_steps for r in rows}


def beside(ours: Mapping[float, float], theirs: Mapping[float, float]) -> tuple[dict, dict]:
    """Two curves of shares at the thresholds that both have."""
    common = [t for t in theirs if t in ours]
    return {t: ours[t] for t in common}, {t: theirs[t] for t in common}


def shares_table(rows: Sequence[Row], gpu: str = ""):
    """Every threshold of a cache that was also published: steps computed here beside the share of time there.

    Args:
        rows: of one family, each with its threshold.
        gpu: that it was published for; every one by default.
    """
    pairs = _published(rows, gpu)
    columns = (
        Column("published for", [where for _, where, _ in pairs]),
        Column("steps computed here", lambda r: r.computed_steps / r.total_steps, format=".0%"),
        Column("time left here", lambda r: r.speedup and 1 / r.speedup, format=".0%"),
        Column("time left, published", [theirs for *_, theirs in pairs], format=".0%"),
        Column("steps here − time published", [100 * _apart(pair) for pair in pairs], "points", format="+.0f"),
    )
    return table([r for r, *_ in pairs], columns, THRESHOLD)


def shares_sentence(rows: Sequence[Row], gpu: str = "") -> str:
    """How far the shares of `shares_table` are apart, in percentage points: where most, and how many are near."""
    if not (pairs := _published(rows, gpu)):
        return "no threshold of this page was published with its time."
    row, where, theirs = worst = max(pairs, key=lambda pair: abs(_apart(pair)))
    near = sum(abs(_apart(pair)) <= NEAR for pair in pairs)
    alike = "about the same share" if near == len(pairs) else "another share than was published"
    return (
        f"the same threshold leaves {alike}: furthest apart at {row.setting('threshold'):g}, where "
        f"**{row.computed_steps / row.total_steps:.0%}** of the steps are computed here and **{theirs:.0%}** of the "
        f"time was left on {where}, {100 * abs(_apart(worst)):.0f} points; {near} of {len(pairs)} published shares "
        f"{'is' if near == 1 else 'are'} within {100 * NEAR:.0f} points."
    )


def _published(rows: Sequence[Row], gpu: str) -> list[tuple[Row, str, float]]:
    """(row, GPU, published share of time) for every threshold above 0 that both have."""
    ours, found = {r.setting("threshold"): r for r in rows}, []
    for family in {families.named(r.family) for r in rows}:
        gpus = [gpu] if gpu else dict.fromkeys(f.gpu for f in published.table() if f.family == family.name)
        for where in gpus:
            with suppress(KeyError):  # a claim without a time
                shares = published.time_shares(family, where)
                found += [(ours[t], where, share) for t, share in shares.items() if t and t in ours]
    return sorted(found, key=lambda pair: pair[0].setting("threshold"))


def _apart(pair: tuple[Row, str, float]) -> float:
    """Share of steps computed minus the published share of time."""
    return pair[0].computed_steps / pair[0].total_steps - pair[2]
