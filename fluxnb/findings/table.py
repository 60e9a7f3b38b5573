"""Tables: columns are said once, with their units, and every table is `table(rows, columns)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxnb.findings.rows import (
    applied,
    baseline_s,
    ends,
    gigabytes,
    judged,
    peak_gib,
    step_ms,
    teraflops,
    thousand,
    what_ran,
)
from fluxnb.findings.words import under_limit, whiskers
from fluxnb.installed import need
from fluxnb.study.row import Row

LEAST_SAMPLES = 10  # of a percentile besides the median, and of any of a load, where requests are few
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
        note: what a reader has to know about it, said once below the table.
    """

    title: str
    value: str | Callable[[Row], object] | Sequence
    unit: str = ""
    share: bool = False
    format: str = ""
    note: str = ""

    def of(self, rows: Sequence[Row]) -> list:
        """Its value for each row."""
        if isinstance(self.value, str):
            return [getattr(r, self.value) for r in rows]
        return [self.value(r) for r in rows] if callable(self.value) else list(self.value)


Columns = tuple[Column, ...]


def table(rows: Sequence[Row], columns: Iterable[Column], index: str | Column = "setting"):
    """A data frame with a line for each row; `attrs` has its units, formats, the rows' ids and what is to be noted.

    Columns that say nothing here are left out. Where rows aren't ok it says why, where one didn't get steady it says
    which, where they are of several sessions it says which, and where not all are over one baseline what theirs took.

    Args:
        index: the first column, or its title: then it has the labels.
    """
    pd = need("pandas", "A table")
    first, columns = index if isinstance(index, Column) else Column(index, "label"), tuple(columns)
    if any(r.status not in ("ok", None) for r in rows):
        columns = (Column("status", "status"), *columns, Column("why not", "reason"))
    columns = (*columns, *_unsteady(rows), *_sessions(rows, columns), Column("row", "id"))
    shown = [c for c in columns if _says_something(c, rows)]
    frame = pd.DataFrame({c.title: c.of(rows) for c in (first, *shown)}).set_index(first.title)
    frame.attrs["units"] = {c.title: c.unit for c in shown if c.unit}
    frame.attrs["formats"] = {c.title: c.format or ".1%" for c in shown if c.format or c.share}
    frame.attrs["ids"] = [r.id for r in rows]
    words = whiskers(rows) if LOW in shown else ""
    earlier = EARLIER if any(r.session is None for r in rows if r.status) else ""
    notes = [*(c.note for c in shown), words and f"low and high: {words}", under_limit(rows), earlier]
    if said := dict.fromkeys(note[:1].upper() + note[1:] for note in notes if note):
        frame.attrs["note"] = ". ".join(said)
    return frame


def proved(title: str, *path: str, unit: str = "", share: bool = False, format: str = "") -> Column:
    """A column from the rows' proof, by the names on the way to it; the title if none are given."""

    def value(row: Row):
        found = row.proof
        for name in path or (title,):
            found = (found or {}).get(name)
        return found

    return Column(title, value, unit, share, format)


def listed(lines: Iterable[Mapping], index: str, units: Mapping | None = None):
    """A data frame of what isn't measured rows, one mapping of title to value for each line."""
    frame = need("pandas", "A table").DataFrame(list(lines)).set_index(index)
    frame.attrs["units"] = dict(units or {})
    return frame


def pairs(facts: Mapping, index: str, title: str = "value"):
    """A data frame of names and values."""
    return listed(({index: name, title: value} for name, value in facts.items()), index)


def _sessions(rows: Sequence[Row], columns: Columns) -> Columns:
    """Which session rows are of, if of several, and what the baseline of each took, where the table shows another."""
    several = len({r.session for r in rows if r.status}) > 1
    elsewhere = {r.baseline for r in rows if r.baseline} - {r.id for r in rows}  # timed again, later in the session
    timed = (Column("its baseline", baseline_s, "s"),) if (several or elsewhere) and ALONE not in columns else ()
    return (Column("session", "session"), *timed) if several else timed


def _unsteady(rows: Sequence[Row]) -> Columns:
    return (STEADY,) if any(r.stable == 0 for r in rows) else ()


def _says_something(column: Column, rows: Sequence[Row]) -> bool:
    """Not where it is empty, or where every step is computed."""
    if column.value == COMPUTED.value:
        return any(r.computed_steps is not None and r.computed_steps < (r.total_steps or 0) for r in rows)
    return any(v is not None and v == v for v in column.of(rows))


def _of_images(column: str) -> Callable[[Row], object]:
    """A figure of quality, which random weights don't have."""
    return lambda r: getattr(r, column) if r.weights != "random" else None


def _with_worst(title: str, column: str, worst: str) -> Columns:
    """A mean over images, and the worst of them."""
    mean = Column(f"mean {title}", _of_images(column), format=".3f")
    return mean, Column(f"worst {title}", _of_images(worst), format=".3f")


def _of_facts(column: str) -> Callable[[Row], object]:
    """A figure of the probe, which earlier rows don't have: theirs passed ruins."""
    return lambda r: getattr(r, column) if r.weights != "random" and judged(r) else None


def _from(least: int, column: str) -> Callable[[Row], float | None]:
    """A percentile, of so many samples or more."""
    return lambda r: getattr(r, column) if (r.n or 0) >= least else None


def _end(which: int) -> Callable[[Row], float | None]:
    return lambda r: (ends(r) or (None, None))[which]


def _meanwhile(name: str) -> Callable[[Row], Any]:
    """What was noted in the timed window."""
    return lambda r: (r.telemetry or {}).get(name)


def _of_cpus(name: str) -> Callable[[Row], Any]:
    """What was noted of the CPU in the timed window, where nothing else computed."""
    return lambda r: None if r.gpu_util_avg is not None else _meanwhile(name)(r)


def _throttled(row: Row) -> str | None:
    """What held the clocks down in the timed window, and for which share of it the power limit did."""
    if (reasons := _meanwhile("throttle_reasons")(row)) is None:
        return None
    share = _meanwhile("power_limited")(row)
    return ", ".join([*reasons, *([f"by power {share:.0%}"] if share else [])]) or "no"


# --- columns ------------------------------------------------------------------------------------------------

# fmt: off
FIRST = Column("first", "first_s", "s", note="first: the first image of its warm-up")
P25, P50 = Column("p25", _from(LEAST_SAMPLES, "latency_p25"), "s"), Column("p50", "latency_p50", "s")
P90, P99 = Column("p90", _from(LEAST_SAMPLES, "latency_p90"), "s"), Column("p99", "latency_p99", "s")
N, IMAGES, BATCH = Column("n", "n", format=".0f"), Column("images/s", "images_per_s"), Column("batch", "batch")
MILLISECONDS, PER_STEP = Column("time", lambda r: thousand(r.latency_p50), "ms"), Column("per step", step_ms, "ms")
SIDE, THRESHOLD = Column("side", "width", "pixels"), Column("threshold", lambda r: r.setting("threshold"))
LOW, HIGH = Column("low", _end(0), "×"), Column("high", _end(1), "×")
ALONE = Column("alone", lambda r: r.baseline_s or r.shown("alone_s"), "s", note="alone: on one GPU, in turn with it")
SPEEDUP = Column("speedup", "speedup", "×"), LOW, HIGH, N
COMPUTED, STEPS = Column("computed steps", "computed_steps"), Column("steps", "total_steps")
LOADED = Column("load", "memory_load_gib", "GiB")
PEAK = Column("peak", peak_gib, "GiB", note="peak: what this pipeline allocates, measured alone (on a CPU, by how much "
              "the process grows); what PyTorch keeps in reserve and CUDA's context come on top")
STEADY = Column("steady", lambda r: None if r.stable is None else "yes" if r.stable else "no",
                note="steady: whether warm-up ended because two images in a row took the same time, to 2 %; "
                "where it says no, the first of the timed images may still be slower")
PSNR = Column("mean PSNR", _of_images("psnr_db"), "dB")
WORST_PSNR = Column("worst PSNR", _of_images("psnr_min_db"), "dB")
JUDGED = Column("judged", _of_images("images"), "images", format=".0f")
ADHERENCE = Column("mean adherence", _of_facts("adherence"), share=True)
WORST_ADHERENCE = Column("worst adherence", _of_facts("adherence_min"), share=True)
APPLIED, WHAT_RAN = Column("applied", applied), Column("what ran", what_ran)

# --- presets: one for each kind of table --------------------------------------------------------------------

CLOCKS = (
    Column("SM clock", _meanwhile("sm_clock_avg_mhz"), "MHz"), Column("power", _meanwhile("power_avg_w"), "W"),
    Column("temperature", _meanwhile("temperature_avg_c"), "°C"), Column("throttled", _throttled),
    Column("GPU busy", lambda r: None if r.gpu_util_avg is None else r.gpu_util_avg / 100, share=True),
    Column("CPU clock", _of_cpus("cpu_clock_avg_mhz"), "MHz"), Column("load average", _of_cpus("load_average")),
    Column("other load", _meanwhile("other_load_cores"), "cores", note="other load: cores that other processes used"),
)
CARD = (  # what documents ask for of every load
    Column("memory in use", lambda r: r.gpu_memory_avg_pct and r.gpu_memory_avg_pct / 100, share=True,
           note="memory in use: of the card, by all that is loaded on it"),
    Column("at its peak", lambda r: (_meanwhile("gpu_memory_peak_pct")(r) or 0) / 100 or None, share=True),
)
QUALITY = (
    JUDGED, PSNR, WORST_PSNR, Column("identical", _of_images("psnr_identical"), "images", format=".0f",
           note="mean PSNR: of the images that differ"),
    *_with_worst("SSIM", "ssim", "ssim_min"), *_with_worst("ST-LPIPS", "st_lpips", "st_lpips_max"),
    *_with_worst("FLIP", "flip", "flip_max"), *_with_worst("CLIP score", "clip_score", "clip_score_min"),
    ADHERENCE, WORST_ADHERENCE,
)
LATENCY = (
    Column("load", "load_s", "s"), FIRST, Column("warm-up", "warmup_s", "s"), Column("min", "latency_min", "s"),
    P25, P50, P90, P99, Column("mean", "latency_avg", "s"), IMAGES, PEAK, *CARD, *SPEEDUP, *CLOCKS,
)
CACHE = (P50, P90, *SPEEDUP, COMPUTED, STEPS, *QUALITY, *CLOCKS)
MATRIX = (FIRST, P50, PER_STEP, *SPEEDUP, COMPUTED, LOADED, PEAK, *QUALITY, *CLOCKS, APPLIED)
BATCHES = (BATCH, P50, IMAGES, PEAK, *SPEEDUP, *CLOCKS)
KERNELS = (
    MILLISECONDS, N, Column("rate", teraflops, "TFLOP/s"), Column("error", lambda r: r.shown("error"), format=".1e"),
    WHAT_RAN,
)
ARITHMETIC = Column("arithmetic", teraflops, "TFLOP/s")
CEILINGS = (
    MILLISECONDS, ARITHMETIC, Column("memory", gigabytes, "GB/s"), proved("timed for", "timed_s", unit="s"), *CLOCKS,
)
CONVERSION = (SIDE, MILLISECONDS, N)
MASK = (
    Column("inside", "psnr_inside_db", "dB"), Column("outside", "psnr_outside_db", "dB"),
    Column("kept", "kept_db", "dB"), Column("VAE alone", "kept_vae_db", "dB"), ADHERENCE, WORST_ADHERENCE, JUDGED,
)
AGREEMENT = (Column("agreement", "agreement", share=True), ADHERENCE, WORST_ADHERENCE, JUDGED)
LOAD = (
    Column("requests", "n", format=".0f"),
    Column("together", lambda r: r.shown("batch") if r.setting("batching", 1) > 1 else None,
           note="together: requests made at once, on average"),
    P25, Column("p50", _from(LEAST_SAMPLES, "latency_p50"), "s"), P90, P99, Column("average", "latency_avg", "s"),
    proved("queued", "queued_s", unit="s"), proved("served", "service_s", unit="s"), IMAGES, proved("refused"),
    proved("failed"),
    Column("memory", "memory_peak_gib", "GiB", note="memory: of all that ran on the fullest GPU, by NVML"),
    *CARD, *CLOCKS,
)
# What is there to be looked up: where a page hasn't room for all columns these wait until they are asked for.
SECOND = frozenset(
    said
    for c in (*CLOCKS, *CARD, *QUALITY[3:6], *QUALITY[8:], *LATENCY[:5], P25, P90, P99, STEADY, APPLIED, PER_STEP)
    for said in (c.title, c.title.removeprefix("mean "))
) | {"second", "session", "its baseline", "steps", "computed", "of the card"}
