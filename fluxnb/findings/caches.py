"""What rows of caches say: against fewer steps, against each other, against what was published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fluxnb import families
from fluxnb.families import COMBINED, FEWER_STEPS, FIRST_BLOCK, INTERVAL, SECOND_ORDER, TEACACHE, Family
from fluxnb.findings.rows import (
    CACHES,
    LOSS,
    against_control,
    baseline_of,
    fastest,
    keeps_adherence,
    of,
    psnr_or_infinite,
)
from fluxnb.findings.table import Column, table
from fluxnb.findings.words import interval, psnr
from fluxnb.study.row import Row

GOOD = 30.0  # dB of mean PSNR from which an image looks like the uncached one
PRESETS = {  # name -> (least mean PSNR in dB, the plan's threshold, the plan's expected speedup)
    "conservative": (40.0, 0.05, 1.5),
    "balanced": (30.0, 0.12, 2.0),
    "aggressive": (0.0, 0.2, 2.5),
}
CRITERIA = {FIRST_BLOCK: 2.0, TEACACHE: 1.3, COMBINED: 3.0}  # the plan's least speedups


def cache_sentence(rows: list[Row], family: Family) -> str:
    """The result in one breath: the fastest setting that keeps quality, and how it stands to fewer steps."""
    baseline, cached = baseline_of(rows), of(rows, family)
    kept = [r for r in cached if keeps_adherence(r, baseline) and psnr_or_infinite(r) >= GOOD]
    best = fastest(kept or cached)
    sentence = (
        f"{best.label} makes an image **{best.speedup:.2f} times** faster ({interval(best)}, n = {best.n}), computing "
        f"{best.computed_steps:.1f} of {best.total_steps} steps, "
        + ("with identical images" if best.psnr_identical and best.psnr_db is None else f"at {psnr(best)}")
    )
    if best.adherence is not None:
        sentence += f" and {best.adherence:.1%} adherence (uncached {baseline.adherence:.1%})"
    sentence += f" — the fastest setting above {GOOD:g} dB that keeps adherence within {LOSS}." if kept else "."
    for at, words in (("computed_steps", "computed steps"), ("speedup", "time")):
        if gaps := against_control(rows, family, at):
            mean = sum(gaps) / len(gaps)
            sentence += (
                f" At equal {words} it is {abs(mean):.1f} dB {'above' if mean >= 0 else 'below'} simply using fewer "
                f"steps, on average over its settings ({min(gaps):+.1f} to {max(gaps):+.1f} dB)."
            )
    return sentence


def interval_sentence(rows: list[Row], family: Family) -> str:
    """Whether looking beats not looking: a gate beside a fixed interval at equal hit rate."""
    gaps = against_control(rows, family, "computed_steps", INTERVAL)
    if not gaps:
        return f"no setting of {family.name} computes as many steps as a fixed interval here."
    mean = sum(gaps) / len(gaps)
    where = "level with" if abs(mean) < 0.05 else f"{abs(mean):.1f} dB {'above' if mean > 0 else 'below'}"
    return (
        f"at equal hit rate, {family.name} is {where} a fixed interval, which doesn't look ({min(gaps):+.1f} to "
        f"{max(gaps):+.1f} dB over {len(gaps)} setting{'s' * (len(gaps) > 1)})."
    )


def presets(rows: list[Row], family: Family):
    """The plan's three presets, derived: the fastest setting that keeps the preset's quality."""
    baseline, own = baseline_of(rows), of(rows, family)
    best, at_plan = [], []
    for floor, planned, _ in PRESETS.values():
        fitting = (r for r in own if psnr_or_infinite(r) >= floor and keeps_adherence(r, baseline))
        best.append(fastest(fitting) or Row())
        at_plan.append(next((r.speedup for r in own if r.setting("threshold") == planned), None))
    columns = (
        Column("threshold", lambda r: r.setting("threshold")),
        *_BRIEFLY,
        Column("plan's threshold", [planned for _, planned, _ in PRESETS.values()]),
        Column("plan's expectation", [expected for *_, expected in PRESETS.values()]),
        Column("measured there", at_plan),
    )
    return table(best, columns, Column("preset", list(PRESETS)))


_BRIEFLY = (
    Column("speedup", "speedup"),
    Column("computed steps", "computed_steps"),
    Column("PSNR", "psnr_db", "dB"),
    Column("adherence", "adherence", share=True),
)


def best_at_equal_steps(rows: list[Row]):
    """For each number of steps of the control: the best cache setting that computes at most one step more."""
    caches = [r for r in of(rows, *CACHES) if r.psnr_db is not None]
    second = {r.steps: r.psnr_db for r in of(rows, SECOND_ORDER)}
    found = []
    for control in sorted(of(rows, FEWER_STEPS), key=lambda r: -r.steps):
        near = (r for r in caches if r.computed_steps <= control.steps)
        best = max(near, key=lambda r: r.psnr_db, default=None)
        if best is not None and control.psnr_db is not None:
            found.append((control, best))
    controls, caches = [c for c, _ in found], [b for _, b in found]
    columns = (
        Column("best cache", "label"),
        Column("computed", "computed_steps"),
        Column("cache PSNR", "psnr_db", "dB"),
        Column("cache worst", "psnr_min_db", "dB"),
        Column("Euler PSNR", [c.psnr_db for c in controls], "dB"),
        Column("Euler worst", [c.psnr_min_db for c in controls], "dB"),
        Column("gain", [b.psnr_db - c.psnr_db for c, b in found], "dB"),
        Column("gain, worst", [b.psnr_min_db - c.psnr_min_db for c, b in found], "dB"),
        Column("DPM-Solver++ PSNR", [second.get(c.steps) for c in controls], "dB"),
    )
    return table(caches, columns, Column("steps", [c.steps for c in controls]))


def criteria_sentence(rows: list[Row]) -> str:
    """The plan's criteria for speed at kept adherence, each met or not, in one run."""
    baseline, parts = baseline_of(rows), []
    for family, least in CRITERIA.items():
        best = fastest(r for r in of(rows, family) if keeps_adherence(r, baseline))
        if best is None:
            parts.append(f"{family.name}: no setting keeps adherence within {LOSS}")
            continue
        verdict = "met" if best.speedup >= least else "not met"
        asked = f"asked: {least:g}×, {verdict}; {best.label}, {psnr(best)}"
        parts.append(f"{family.name} {best.speedup:.2f}× ({asked})")
    return f"Fastest settings with adherence within {LOSS} of the uncached model: {'; '.join(parts)}."


def combined_sentence(rows: list[Row], floor: float = 35.0) -> str:
    """Whether combining the two gates pays: the fastest setting above a floor of quality, of each kind."""
    kinds = (*CACHES, FEWER_STEPS)
    kept = [r for r in rows if psnr_or_infinite(r) >= floor]
    best = {family: r for family in kinds if (r := fastest(of(kept, family)))}
    together = best.pop(COMBINED, None)
    if together is None:
        return f"No combined setting stays above {floor:g} dB."
    faster = [family for family, r in best.items() if r.speedup >= together.speedup]
    if not faster:
        verdict = "combining pays"
    elif {FIRST_BLOCK, TEACACHE} & set(faster):
        verdict = "combining doesn't pay"
    else:
        beat = " and ".join(f.name for f in faster)
        verdict = f"combining beats either cache alone, and {beat} beat{'s' * (len(faster) == 1)} it"
    words = ", ".join(f"{family.name} {r.speedup:.2f}× ({r.label})" for family, r in best.items())
    return (
        f"{verdict}: above {floor:g} dB, {together.label} is the fastest combination with **{together.speedup:.2f}×** "
        f"({interval(together)}, {together.computed_steps:.1f} of {together.total_steps} steps, {psnr(together)}); "
        f"alone or as controls: {words or 'nothing stays above it'}."
    )


def strategies_sentence(rows: list[Row]) -> str:
    """Which way of reusing is nearest to the uncached image, beside the first of them."""
    first, *others = [r for r in rows if r.family != families.BASELINE.name]

    def words(row):
        return f"{psnr(row)} at {row.computed_steps:.1f} steps, {row.speedup:.2f}×"

    best = max((first, *others), key=psnr_or_infinite)
    if best is first:
        return f"nearest to the uncached image is **{first.label}** ({words(first)})."
    return f"nearest to the uncached image is **{best.label}** ({words(best)}); {first.label} reaches {words(first)}."


# --- what a step costs --------------------------------------------------------------------------------------


def replay_sentence(rows: list[Row]) -> str:
    """What leaving steps out saves of an image, and what a reused step costs."""
    best = fastest(rows)
    return (
        f"computing {best.computed_steps:.0f} of {best.total_steps} steps takes {best.latency_p50:.3g} s, where all of "
        f"them take {best.baseline_s:.3g} s: **{best.speedup:.2f}×** ({interval(best)}). {hit_cost_sentence(rows)}"
    ).rstrip()


def hit_cost_sentence(rows: list[Row]) -> str:
    """What a reused step costs as a share of a computed one: least squares of the denoising time.

    The time is taken as computed steps times one cost plus reused steps times another, in the session that most rows
    are of; nothing for fewer than three schedules.
    """
    import numpy as np

    most = Counter(r.session for r in rows).most_common(1)[0][0]
    rows = [r for r in rows if r.session == most]
    computed = np.array([r.computed_steps for r in rows], dtype=float)
    reused = np.array([r.total_steps for r in rows], dtype=float) - computed
    if len(rows) < 3 or not reused.any():
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
        rows: of one session: uncached; looking at every step; reusing all steps but one, with and without a block.
    """
    plain, looks, first, none = (r.denoise_s for r in rows)
    n = rows[0].steps
    step = plain / n
    reused = {"with the first block": first, "without any block": none}
    words = ", ".join(f"{name} {(seconds - step) / (n - 1) / step:.1%}" for name, seconds in reused.items())
    return (
        f"a computed step takes {1e3 * step:.3g} ms; looking at it costs {(looks - plain) / plain:+.1%}; "
        f"a reused step costs {words} of a computed one."
    )


def polynomial_sentence(fit, published: Sequence[float]) -> str:
    """What a fitted polynomial explains, and what the least value of a published one means for its thresholds.

    Args:
        fit: of fluxnb.cache.teacache.
        published: coefficients, highest power first.
    """
    import numpy as np

    least = np.polyval(published, np.linspace(0, 0.5, 501)).min()
    return (
        f"the fitted polynomial explains R² = {fit.r2:.2f} of the output's change ({len(fit.changes)} steps of "
        f"{fit.images} image{'s' * (fit.images != 1)}). FLUX.1-dev's published one never falls below {least:.2f}: a "
        f"threshold T then allows at most T / {least:.2f} reused steps in a row, whatever the image."
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
    return f"over {len(next(iter(traces.values())))} images, {'; '.join(parts)}."


def computed_shares(rows: Sequence[Row]) -> dict[float, float]:
    """Threshold -> share of steps computed."""
    return {r.setting("threshold"): r.computed_steps / r.total_steps for r in rows}


def beside(ours: Mapping[float, float], theirs: Mapping[float, float]) -> tuple[dict, dict]:
    """Two curves of shares at the thresholds that both have."""
    common = [t for t in theirs if t in ours]
    return {t: ours[t] for t in common}, {t: theirs[t] for t in common}


def agreement_sentence(ours: Mapping[float, float], theirs: Mapping[float, float]) -> str:
    """How far two curves of shares are apart, in percentage points."""
    gaps = {t: 100 * (ours[t] - theirs[t]) for t in theirs}
    worst = max(gaps, key=lambda t: abs(gaps[t]))
    mean = sum(map(abs, gaps.values())) / len(gaps)
    here, there = (", ".join(f"{100 * curve[t]:.0f}" for t in theirs) for curve in (ours, theirs))
    return (
        f"share of steps computed {here} % at thresholds {', '.join(f'{t:g}' for t in theirs)}, beside a published "
        f"{there} % of the time: {mean:.0f} points apart on average, at most {abs(gaps[worst]):.0f} (at {worst:g})."
    )
