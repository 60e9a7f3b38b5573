"""Figures in words: what stands in a sentence and under an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fluxnb.findings.rows import ends, leaders
from fluxnb.measure import quality, stats, telemetry
from fluxnb.study.row import Row
from fluxnb.world import probe

_COUNTED = {2: "two", 3: "three", 4: "four", 5: "five"}


def share(value: float | None) -> str:
    """A share as percent, or a dash."""
    return "–" if value is None else f"{value:.0%}"


def interval(row: Row) -> str:
    """The interval of its speedup."""
    return f"[{row.speedup_ci_low:.2f}, {row.speedup_ci_high:.2f}]"


def sureness(row: Row) -> str:
    """What its rounds say of its speedup: 95 % interval [2.40, 2.60], n = 10; a range below six; n where none holds."""
    n, found = f"n = {row.n}", ends(row)
    if found is None:
        return n
    kind = "95 % interval" if row.n >= stats.LEAST else f"range of {_COUNTED.get(row.n, row.n)} rounds"
    return f"{kind} [{found[0]:.2f}, {found[1]:.2f}]" + (f", {n}" if row.n >= stats.LEAST else "")


def unsettled(row: Row) -> str:
    """That too few rounds are behind a row for a headline, in a few words; "" where there are enough."""
    return "" if (row.n or 0) >= stats.HEADLINE else f"no result yet, n = {row.n or 0} of {stats.HEADLINE} rounds"


def whiskers(rows: Iterable[Row]) -> str:
    """What the ends of the rows' speedups are: intervals, or of few rounds their range; "" where no row has any."""
    known = [r.n for r in rows if r.speedup is not None and ends(r)]
    if not known:
        return ""
    if min(known) >= stats.LEAST:
        return "95 % interval of the speedup"
    few = f"range of the speedup over so few rounds (fewer than {stats.LEAST})"
    return few if max(known) < stats.LEAST else f"95 % interval of the speedup; below n = {stats.LEAST} its range"


def fastest_words(rows: Sequence[Row], baseline: Row) -> str:
    """Which is the fastest beyond the noise, or which are equally fast within it, over the baseline timed in turn."""
    told = [r for r in rows if r.speedup is not None]
    first = leaders(told, baseline)
    base = f"the baseline, “{baseline.label}”"
    if not first:
        if told and (ends(baseline) is None or not any(map(ends, told))):
            best = max(told, key=lambda r: r.speedup)
            said = f"the largest ratio is {best.speedup:.2f} times, of {best.label} (n = {best.n})"
            return f"whether anything is faster than {base}, can't be told: these rows have no interval; {said}"
        return f"nothing is faster than {base}, beyond the noise"
    best, *others = first
    said = f"**{best.speedup:.2f} times** as fast as {base} ({sureness(best)})"
    said += f", {best.latency_p50:.3g} s instead of {best.baseline_s:.3g} s per image"
    if not others:
        return f"{best.label} is the fastest, {said}"
    return f"{labels(first)} are equally fast within the noise: {best.label} is {said}"


def labels(rows: Sequence[Row], most: int = 4) -> str:
    """The labels of rows, the first few of many."""
    names = [r.label for r in rows[:most]]
    last = f"{len(rows) - most} more" if len(rows) > most else names.pop() if len(names) > 1 else ""
    return f"{', '.join(names)} and {last}" if last else names[0]


def under_limit(rows: Iterable[Row]) -> str:
    """How many rows ran under the power limit, and at which clock; "" where none did, or none says."""
    known = [r for r in rows if "throttle_reasons" in (r.telemetry or {})]
    held = [r for r in known if telemetry.POWER & set(r.telemetry["throttle_reasons"])]
    if not held:
        return ""
    clocks = [mhz for r in held if (mhz := r.telemetry.get("sm_clock_avg_mhz"))]
    at = f" at a mean of {sum(clocks) / len(clocks):,.0f} MHz" if clocks else ""
    whole = ", warm-up included" * any(r.session is None for r in held)  # so they were watched then
    return f"{len(held)} of {len(known)} rows ran under the power limit{at}{whole}"


def under_image(reference, image, prompt: str | None) -> str:
    """The caption of an image in a grid: what it differs in from the reference, and adherence to a given prompt."""
    words, found = quality.in_words(reference, image), prompt and adherence_of(prompt, image)
    return f"{words}, adherence {found}" if found else words


def adherence_of(prompt: str, image) -> str | None:
    """The share of a prompt's facts that an image has; None for a prompt that states no known fact."""
    (found,) = probe.adherence([prompt], [image])
    return None if found is None else share(found)
