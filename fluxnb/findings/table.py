"""Tables: columns are said once, with their units, and every table is `table(rows, columns)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fluxnb.findings.rows import applied, baseline_s, gigabytes, step_ms, teraflops, thousand, what_ran
from fluxnb.study.row import Row

LEAST_PEAK = 0.1  # GiB: what lies below is chance
EARLIER = "Rows of an earlier format: their sessions aren't known"


@dataclass(frozen=True)
class Column:
    """One column of a table, or one figure of a chart.

    Args:
        title: its header.
        value: a column of the row, a function of the row, or the values themselves, one for each row.
        unit: shown beside the title.
        share: a part of 1, shown in percent.
        format: a format specification instead of three significant figures.
    """

    title: str
    value: str | Callable[[Row], object] | Sequence
    unit: str = ""
    share: bool = False
    format: str = ""

    def of(self, rows: Sequence[Row]) -> list:
        """Its value for each row."""
        if isinstance(self.value, str):
            return [getattr(r, self.value) for r in rows]
        return [self.value(r) for r in rows] if callable(self.value) else list(self.value)


Columns = tuple[Column, ...]


def table(rows: Sequence[Row], columns: Iterable[Column], index: str | Column = "setting"):
    """A data frame with a line for each row; `attrs` has its units, formats, the rows' ids and what is to be noted.

    Columns that say nothing here are left out. Where rows aren't ok it says why, where they are of several sessions
    it says which, and what each session's baseline took.

    Args:
        index: the first column, or its title: then it has the labels.
    """
    import pandas as pd

    first = index if isinstance(index, Column) else Column(index, "label")
    if any(r.status not in ("ok", None) for r in rows):
        columns = (Column("status", "status"), *columns, Column("why not", "reason"))
    columns = (*columns, *_sessions(rows), Column("row", "id"))
    shown = [c for c in columns if _says_something(c, rows)]
    frame = pd.DataFrame({c.title: c.of(rows) for c in (first, *shown)}).set_index(first.title)
    frame.attrs["units"] = {c.title: c.unit for c in shown if c.unit}
    frame.attrs["formats"] = {c.title: c.format or ".1%" for c in shown if c.format or c.share}
    frame.attrs["ids"] = [r.id for r in rows]
    if any(r.session is None for r in rows if r.status):
        frame.attrs["note"] = EARLIER
    return frame


def proved(title: str, *path: str, unit: str = "", share: bool = False) -> Column:
    """A column from the rows' proof, by the names on the way to it; the title if none are given."""

    def value(row: Row):
        found = row.proof
        for name in path or (title,):
            found = (found or {}).get(name)
        return found

    return Column(title, value, unit, share)


def listed(lines: Iterable[Mapping], index: str, units: Mapping | None = None):
    """A data frame of what isn't measured rows, one mapping of title to value for each line."""
    import pandas as pd

    frame = pd.DataFrame(list(lines)).set_index(index)
    frame.attrs["units"] = dict(units or {})
    return frame


def pairs(facts: Mapping, index: str, title: str = "value"):
    """A data frame of names and values."""
    return listed(({index: name, title: value} for name, value in facts.items()), index)


def _sessions(rows: Sequence[Row]) -> Columns:
    """Which session each row is of, and what its baseline took, where they are of several."""
    several = len({r.session for r in rows if r.status}) > 1
    return (Column("session", "session"), Column("its baseline", baseline_s, "s")) if several else ()


def _says_something(column: Column, rows: Sequence[Row]) -> bool:
    """Not where it is empty, where a peak is chance, or where every step is computed."""
    values = [v for v in column.of(rows) if v is not None and v == v]
    if column.value == PEAK.value:
        return max(values, default=0.0) >= LEAST_PEAK
    if column.value == COMPUTED.value:
        return any(r.computed_steps is not None and r.computed_steps < (r.total_steps or 0) for r in rows)
    return bool(values)


def _judged(column: str) -> Callable[[Row], object]:
    """A figure of quality, which random weights don't have."""
    return lambda r: getattr(r, column) if r.weights != "random" else None


# --- columns ------------------------------------------------------------------------------------------------

# fmt: off
FIRST, SECOND = Column("first", "first_s", "s"), Column("second", lambda r: (r.samples or [None])[0], "s")
P25, P50 = Column("p25", "latency_p25", "s"), Column("p50", "latency_p50", "s")
P90, P99 = Column("p90", "latency_p90", "s"), Column("p99", "latency_p99", "s")
N, IMAGES, BATCH = Column("n", "n"), Column("images/s", "images_per_s"), Column("batch", "batch")
MILLISECONDS, PER_STEP = Column("time", lambda r: thousand(r.latency_p50), "ms"), Column("per step", step_ms, "ms")
SIDE, THRESHOLD = Column("side", "width", "pixels"), Column("threshold", lambda r: r.setting("threshold"))
SPEEDUP = Column("speedup", "speedup"), Column("low", "speedup_ci_low"), Column("high", "speedup_ci_high")
COMPUTED, STEPS = Column("computed steps", "computed_steps"), Column("steps", "total_steps")
LOADED, PEAK = Column("load", "memory_load_gib", "GiB"), Column("peak", "memory_peak_gib", "GiB")
OF_CARD = Column("of the card", lambda r: r.gpu_memory_avg_pct and r.gpu_memory_avg_pct / 100, share=True)
PSNR, SSIM = Column("PSNR", _judged("psnr_db"), "dB"), Column("SSIM", _judged("ssim"))
ADHERENCE = Column("adherence", _judged("adherence"), share=True)
APPLIED, WHAT_RAN = Column("applied", applied), Column("what ran", what_ran)

# --- presets: one for each kind of table --------------------------------------------------------------------

QUALITY = (
    PSNR, Column("worst", _judged("psnr_min_db"), "dB"), Column("identical", _judged("psnr_identical")), SSIM,
    ADHERENCE, Column("worst adherence", _judged("adherence_min"), share=True), Column("judged", _judged("images")),
)
LATENCY = (
    Column("load", "load_s", "s"), FIRST, Column("warm-up", "warmup_s", "s"), Column("min", "latency_min", "s"),
    P25, P50, P90, P99, Column("mean", "latency_avg", "s"), N, IMAGES, PEAK, *SPEEDUP,
)
CACHE = (FIRST, SECOND, P50, P90, N, *SPEEDUP, COMPUTED, STEPS, *QUALITY)
MATRIX = (FIRST, P50, PER_STEP, *SPEEDUP, COMPUTED, LOADED, PEAK, OF_CARD, PSNR, SSIM, ADHERENCE, APPLIED)
CHANGES = (PSNR, SSIM, ADHERENCE)
BATCHES = (BATCH, P50, IMAGES, PEAK, *SPEEDUP)
TOTAL = Column("total", lambda r: r.first_s + r.samples[0] if r.first_s and r.samples else None, "s")
SHAPE = (FIRST, SECOND, TOTAL, COMPUTED, PSNR, ADHERENCE)  # of the published table of one cache
KERNELS = (
    MILLISECONDS, Column("rate", teraflops, "TFLOP/s"), Column("error", lambda r: r.shown("error"), format=".1e"),
    WHAT_RAN,
)
ARITHMETIC = Column("arithmetic", teraflops, "TFLOP/s")
CEILINGS = (MILLISECONDS, ARITHMETIC, Column("memory", gigabytes, "GB/s"))
CONVERSION = (SIDE, MILLISECONDS)
MASK = (
    Column("inside", "psnr_inside_db", "dB"), Column("outside", "psnr_outside_db", "dB"),
    Column("kept", "kept_db", "dB"), Column("VAE alone", "kept_vae_db", "dB"), ADHERENCE,
)
AGREEMENT = (Column("agreement", "agreement", share=True), ADHERENCE)
LOAD = (
    Column("requests", "n"), Column("together", lambda r: r.shown("batch") if r.setting("batching", 1) > 1 else None),
    P25, P50, P90, P99, Column("average", "latency_avg", "s"), proved("queued", "queued_s", unit="s"),
    proved("served", "service_s", unit="s"), IMAGES, proved("refused"), proved("failed"),
    Column("GPU busy", lambda r: r.gpu_util_avg and r.gpu_util_avg / 100, share=True),
    Column("memory", "memory_peak_gib", "GiB"),
)
