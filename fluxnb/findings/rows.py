"""Which row: chosen from several and asked for what it says, so that a sentence, a table and a chart mean the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fluxnb import families, notebooks
from fluxnb.families import Family
from fluxnb.measure import stats, telemetry
from fluxnb.study.row import Row
from fluxnb.technique import IDENTICAL, ROUNDING

LOSS_ALLOWED = 0.05  # the plans' criterion: quality within 5 % of the uncached model
LOSSLESS_DB, NEAR_LOSSLESS_DB, BALANCED_DB = 40.0, 35.0, 28.0  # floors: PSNR of the worst of all judged images
LEAST_PEAK = 0.1  # GiB: what lies below is chance
CACHES = (*(f for f in families.ALL if f.cache), families.COMBINED)
SAME = (IDENTICAL, ROUNDING)  # the baseline's image, as far as arithmetic goes

# proofs with a column of their own, or that only other figures are computed from
_ELSEWHERE = (
    "layers", "of", "weight", "kernels", "step_ms", "steps_ms", "alone_s", "alone_stages", "alone_steps_ms",
    "communication", "decisions", "error", "each",
)  # fmt: skip


def of(rows: Iterable[Row], *which: Family | str) -> list[Row]:
    """The rows of one or more families, or of stacks by name."""
    names = {w for w in which if isinstance(w, str)}
    own = {w.name for w in which if isinstance(w, Family)}
    return [r for r in rows if r.family in own or r.stack in names]


def baseline_of(rows: Iterable[Row]) -> Row:
    """The row of the baseline."""
    return next(r for r in rows if is_baseline(r))


def is_baseline(row: Row) -> bool:
    """Whether the others are compared with it."""
    return row.family == families.BASELINE.name


def finished(rows: Iterable[Row]) -> list[Row]:
    """Those that were measured."""
    return [r for r in rows if r.ok]


def divided(rows: Iterable[Row]) -> list[Row]:
    """One image over several GPUs at full size: finished rows of random weights, without what one GPU makes alone."""
    own = [r for r in rows if r.notebook == notebooks.PARALLEL and r.weights == "random" and r.ok]
    return [r for r in own if not is_baseline(r)]


def fastest(rows: Iterable[Row]) -> Row | None:
    """The highest speedup; None where no row has one."""
    return max((r for r in rows if r.speedup is not None), key=lambda r: r.speedup, default=None)


def same_image(row: Row) -> bool:
    """Whether nothing but the order of operations differs from the baseline. False where it isn't known."""
    return is_baseline(row) or row.exact in SAME


def keeps_adherence(row: Row, baseline: Row) -> bool:
    """Whether adherence is within `LOSS_ALLOWED` of the baseline's (relative); True where it can't be measured."""
    if row.adherence is None or baseline.adherence is None:
        return True
    return row.adherence >= (1 - LOSS_ALLOWED) * baseline.adherence


def worst_db(row: Row) -> float | None:
    """PSNR of its worst judged image in dB: infinite where all are identical, None where it isn't known."""
    if row.psnr_min_db is None and row.psnr_db is None and (row.psnr_identical or 0) >= (row.images or 1):
        return math.inf
    return row.psnr_min_db


def above(row: Row, floor_db: float) -> bool:
    """Whether its worst judged image is at least this near to the uncached one; False where none was judged."""
    return judged(row) and (worst_db(row) or -math.inf) >= floor_db


def ends(row: Row) -> tuple[float, float] | None:
    """Where its speedup's interval, or of fewer than `stats.LEAST` rounds its range, begins and ends.

    None where there is none: a row of an earlier format has one only from as many rounds as an interval needs.
    """
    if row.speedup_ci_low is None or row.speedup_ci_high is None:
        return None
    kept = row.baseline is not None or row.again is not None  # the baseline's samples are there
    return (row.speedup_ci_low, row.speedup_ci_high) if kept or (row.n or 0) >= stats.LEAST else None


def within_noise(one: Row, other: Row, baseline: Row) -> bool:
    """Whether two rows of one baseline are equally fast as far as can be told: the one definition of the noise.

    Their intervals overlap, or what the faster one gains over the other is below the baseline's spread against itself.
    What has no interval can't be told from anything.
    """
    mine, others, own = ends(one), ends(other), ends(baseline)
    if mine is None or others is None or own is None or overlap(mine, others):
        return True
    slower, faster = sorted((one.speedup, other.speedup))
    return faster / slower - 1 <= max(own[1], 1 / own[0]) - 1


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two intervals do: then what they are of can't be told apart."""
    return one[0] <= other[1] and other[0] <= one[1]


def beyond_noise(row: Row, baseline: Row) -> bool:
    """Whether it is faster than its baseline by more than the noise."""
    return (row.speedup or 0.0) > (baseline.speedup or 1.0) and not within_noise(row, baseline, baseline)


def leaders(rows: Iterable[Row], baseline: Row) -> list[Row]:
    """The fastest and what is equally fast within the noise, fastest first; empty if none is faster than the baseline.

    Beyond the noise, and of the session that most of them are of: others can't be ranked with these.
    """
    told = [r for r in rows if r.speedup is not None and ends(r) is not None]
    faster = [r for r in of_one_session(told) if beyond_noise(r, baseline)]
    best = fastest(faster)
    return sorted((r for r in faster if within_noise(r, best, baseline)), key=lambda r: -r.speedup)


def of_one_session(rows: Sequence[Row]) -> list[Row]:
    """Those of the session that most of them are of: only these may be compared second by second."""
    most = Counter(r.session for r in rows).most_common(1)
    return [r for r in rows if r.session == most[0][0]]


def alike(one: Row, other: Row) -> bool:
    """Whether two that have no baseline take equally long as far as can be told: their medians' intervals overlap.

    Of fewer than `stats.LEAST` samples their ranges. Rows of two sessions can't be told apart.
    """
    if one.session != other.session or not one.samples or not other.samples:
        return True
    spans = [
        (s[left], s[-1 - left]) for s in map(sorted, (one.samples, other.samples)) for left in [stats.left_out(len(s))]
    ]
    return overlap(*spans)


def unlike_itself(row: Row, base: Row | None = None) -> str:
    """Why its times don't stand for what it takes for hours: heat held the clocks down, or they still changed.

    A warm-up that ended by its limit says nothing by itself; that no later round was like an earlier one does. A
    machine that goes faster or slower as a whole does so for the baseline in the same rounds, too, and says nothing.

    Args:
        base: the baseline that was timed in turn with it; None for a baseline, which was timed twice.
    """
    if heat := sorted(set((row.telemetry or {}).get("throttle_reasons") or ()) - telemetry.POWER):
        return f"clocks held down by {', '.join(heat)}"
    own, beside = row.samples or [], (row.again if base is None else base.samples) or []
    if len(own) == len(beside):
        own = [mine / theirs for mine, theirs in zip(own, beside, strict=True)]
    half = len(own) // 2
    halves = [replace(row, samples=own[part]) for part in (slice(half), slice(half, None))]
    known = row.stable == 0 and len(own) >= stats.HEADLINE  # else halves are apart by chance
    return "" if not known or alike(*halves) else "not steady: its later rounds are told from its earlier ones"


def judged(row: Row) -> bool:
    """Whether its images were judged by today's rules: rows of an earlier format don't say how many there were."""
    return row.images is not None


def baseline_s(row: Row) -> float | None:
    """Median seconds of the baseline of its session: its own, if it is one."""
    return row.latency_p50 if is_baseline(row) else row.baseline_s


def over(row: Row, before: Sequence[Row]) -> float | None:
    """Its gain over the fastest of those before it in its session, which a slowdown isn't; None if there is none.

    Both are taken over the baselines that were timed in turn with them.
    """
    own = [1.0 if is_baseline(b) else b.speedup for b in before if b.speedup and b.session == row.session]
    return row.speedup / max(1.0, *own) if own and row.speedup else None


def peak_gib(row: Row) -> float | None:
    """GiB at the peak of its pipeline alone; None where there are so few that it is chance."""
    return row.memory_peak_gib if (row.memory_peak_gib or 0.0) >= LEAST_PEAK else None


def thousand(value: float | None) -> float | None:
    """Seconds in milliseconds; nothing of nothing."""
    return None if value is None else 1e3 * value


def step_ms(row: Row) -> float | None:
    """Milliseconds of denoising for each step that is run."""
    steps = row.total_steps or row.steps
    return 1e3 * row.denoise_s / steps if row.denoise_s and steps else None


def teraflops(row: Row) -> float | None:
    """TFLOP/s of a product of square matrices or of an attention that was timed by itself; None of anything else."""
    if not row.latency_p50:
        return None
    if size := row.setting("size"):
        return 2 * size**3 / row.latency_p50 / 1e12
    if shape := row.setting("shape"):
        images, heads, tokens, width = shape
        return 4 * images * heads * tokens**2 * width / row.latency_p50 / 1e12
    return None


def gigabytes(row: Row) -> float | None:
    """GB/s of a copy that was timed by itself, reads and writes counted; None of anything else."""
    moved = row.setting("bytes")
    return moved / row.latency_p50 / 1e9 if moved and row.latency_p50 else None


def what_ran(row: Row, most: int = 2) -> str | None:
    """The kernels that took longest."""
    return "; ".join(row.shown("kernels", [])[:most]) or None


def applied(row: Row) -> str | None:
    """What shows that it did something, in words."""
    proof = row.proof or {}
    words = [f"{proof['layers']} of {proof['of']} layers: {proof['weight']}"] if "layers" in proof else []
    words += [f"{name} {value}" for name, value in proof.items() if name not in _ELSEWHERE]
    return "; ".join(words + proof.get("kernels", [])) or None
