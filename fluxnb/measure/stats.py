"""What samples say: percentiles, and how much faster one thing is than another, with an interval that covers.

Baseline and candidate are timed in the same rounds, so every round gives one ratio. The speedup is the median of these
ratios, and its interval lies between two of them: the narrowest pair of order statistics that holds the median of
whatever distribution they come from with 95 % probability or more (David & Nagaraja, Order Statistics, 2003, section
7.1). Fewer than six rounds have no such pair: their ends are a range, and pages call it that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

P99_NEEDS = 100  # fewer samples can't hold a 99th percentile
NOMINAL = 0.95
LEAST = 6  # rounds that an interval needs; fewer give a range
HEADLINE = 10  # rounds that a recommendation, a headline or a verdict rests on


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """min, p25, p50, p90, p99 and avg of latencies in seconds, interpolated; p99 is None below n = 100.

    Raises ValueError when there is no sample or one that is not a finite number.
    """
    values = _samples(samples)
    p25, p50, p90, p99 = (float(v) for v in np.percentile(values, [25, 50, 90, 99]))
    return {
        "min": float(values.min()),
        "p25": p25,
        "p50": p50,
        "p90": p90,
        "p99": p99 if len(values) >= P99_NEEDS else None,
        "avg": float(values.mean()),
    }


def summary(samples: Sequence[float]) -> dict:
    """The columns of a results row that follow from its latencies: n, latency_min to latency_avg, samples."""
    latencies = {f"latency_{name}": value for name, value in percentiles(samples).items()}
    return {"n": len(samples), **latencies, "samples": [float(s) for s in samples]}


def speedup(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, float, float]:
    """(ratio, low, high): the median ratio of seconds of the baseline over the candidate's, round by round.

    low and high are the ends of its 95 % interval; of fewer than six rounds they are the smallest and the largest
    ratio. Drift that hits both in a round cancels out. Raises ValueError for unequal lengths, fewer than two rounds,
    or a latency that isn't above zero.
    """
    base, cand = _samples(baseline), _samples(candidate)
    if len(base) != len(cand):
        raise ValueError(f"paired samples are needed, got {len(base)} of the baseline and {len(cand)} of the candidate")
    if len(base) < 2:
        raise ValueError("an interval needs at least two pairs of samples")
    if base.min() <= 0 or cand.min() <= 0:
        raise ValueError("a latency must be above zero")
    ratios = np.sort(base / cand)
    left = left_out(len(ratios))
    return float(np.median(ratios)), float(ratios[left]), float(ratios[-1 - left])


def compared(baseline: Sequence[float], candidate: Sequence[float]) -> dict:
    """The columns of a results row that follow from its rounds with its baseline."""
    ratio, low, high = speedup(baseline, candidate)
    ends = {"speedup_ci_low": low, "speedup_ci_high": high}
    return {"speedup": ratio, **ends, "baseline_p50": float(np.median(_samples(baseline)))}


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, say over images, by Student's t; below `LEAST` their range.

    The percentile bootstrap covers 86 % at six values. The quantile is an expansion about the normal one (Abramowitz
    and Stegun, 26.7.5), within 0.003 from six values on. Raises ValueError for no value or one that isn't finite.
    """
    found = _samples(values)
    if (n := len(found)) < LEAST:
        return float(found.min()), float(found.max())
    z, freedom = NormalDist().inv_cdf((1 + NOMINAL) / 2), n - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    mean, half = float(found.mean()), t * float(found.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def left_out(n: int) -> int:
    """How many of n ordered samples lie outside the interval of their median, at each end."""
    below, left = 2.0**-n, 0  # the chance that fewer than left + 1 samples lie below the median
    while left + 1 < n / 2 and 1 - 2 * (below := below + math.comb(n, left + 1) * 2.0**-n) >= NOMINAL:
        left += 1
    return left


def coverage(n: int) -> float:
    """How often the interval, or of fewer than six the range, of n rounds holds the median: 0.75 of three."""
    return 1 - 2 * sum(math.comb(n, k) for k in range(left_out(n) + 1)) * 2.0**-n


def _samples(samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError("at least one sample is needed")
    if not np.isfinite(values).all():
        raise ValueError("a sample is not a finite number")
    return values
