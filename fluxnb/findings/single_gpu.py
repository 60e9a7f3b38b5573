"""What rows of one GPU say: number formats, kernels, compilation, quantization, the VAE, the stack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fluxnb.findings import published
from fluxnb.findings.rows import (
    LOSS,
    beyond_noise,
    fastest,
    finished,
    gigabytes,
    keeps_adherence,
    over,
    psnr_or_infinite,
    step_ms,
    teraflops,
)
from fluxnb.findings.table import (
    APPLIED,
    BATCH,
    LEAST_PEAK,
    LOADED,
    MILLISECONDS,
    P50,
    PEAK,
    PER_STEP,
    SIDE,
    SPEEDUP,
    WHAT_RAN,
    Column,
    Columns,
    listed,
    proved,
    table,
)
from fluxnb.findings.words import interval, psnr
from fluxnb.study.row import Row

CARDS = (16, 24, 48, 80)  # GiB
SPARE = 0.05  # share of a card that isn't counted on
NUMBERS = {  # quantization -> the number format that products are done in; weight-only ones compute in the model's own
    "torchao fp8 row": "fp8",
    "torchao fp8 tensor": "fp8",
    "torchao int8": "int8",
    "torchao fp8 row, 2:4 sparse": None,  # no ceiling stands for sparse products
    "int8, 2:4 sparse": None,
}


def number(row: Row) -> str | None:
    """The number format that a row's matrix products are done in; None where no ceiling stands for it."""
    return NUMBERS.get(row.setting("quantization"), row.setting("dtype"))


# --- the limit ----------------------------------------------------------------------------------------------


def of_limit(row: Row, ceilings, work) -> float | None:
    """Share of the limit that denoising reaches: what its computed steps take at least, by what they took.

    Args:
        ceilings, work: of fluxnb.measure.ceilings.
    """
    if not row.ok or not row.denoise_s or row.batch != 1:
        return None
    step_s = ceilings.step_s(work, number(row))
    return step_s and row.computed_steps * step_s / row.denoise_s


def limited(columns: Columns, ceilings, work) -> Columns:
    """The columns and, behind the time per step, which share of the machine's limit it reaches."""
    share = Column("of the limit", lambda r: of_limit(r, ceilings, work), share=True)
    return tuple(c for column in columns for c in ((column, share) if column is PER_STEP else (column,)))


def step_parts(rows: list[Row], ceilings, work):
    """Where one step goes, by kind of kernel, with the limits of products and attention; None without profiles."""
    profiled = [r for r in finished(rows) if r.shown("step_ms")]
    if not profiled:
        return None

    def products(row):
        reached = ceilings.products.get(number(row))
        return reached and 1e3 * work.products / reached

    columns = (
        Column("one step", step_ms, "ms"),
        proved("products", "step_ms", "matrix products", unit="ms"),
        Column("products at least", products, "ms"),
        proved("attention", "step_ms", "attention", unit="ms"),
        Column("attention at least", lambda r: 1e3 * work.attention / ceilings.attention, "ms"),
        proved("the rest", "step_ms", "the rest", unit="ms"),
        Column("no kernel", lambda r: max(0.0, step_ms(r) - sum(r.shown("step_ms").values())), "ms"),
    )
    return table(profiled, columns)


def ceilings_sentence(rows: list[Row]) -> str:
    """The fastest arithmetic that was measured by itself, and how fast memory is."""
    best = max((r for r in rows if teraflops(r)), key=teraflops, default=None)
    if best is None:
        return "no ceiling was measured."
    memory = "".join(f"; memory moves {gigabytes(r):.3g} GB/s, reads and writes counted" for r in rows if gigabytes(r))
    return f"the fastest arithmetic measured is {teraflops(best):.3g} TFLOP/s ({best.label}){memory}."


def kernels_sentence(rows: list[Row]) -> str:
    """What the first kernel, the default, runs and reaches, and which is fastest."""
    default, best = rows[0], max((r for r in rows if teraflops(r)), key=teraflops)
    said = f"{default.label} runs **{default.shown('kernels')[0]}** and reaches {teraflops(default):.3g} TFLOP/s"
    return f"{said}; the fastest is {best.label} with {teraflops(best):.3g} TFLOP/s."


# --- speed --------------------------------------------------------------------------------------------------


def formats_sentence(rows: list[Row]) -> str:
    """What an image takes, which number format is fastest beyond the noise, and how large the noise is."""
    ok = finished(rows)
    compared = [r for r in ok if r.steps == ok[-1].steps]
    first, best = compared[0], fastest(compared)
    said = f"{ok[0].label} at {ok[0].width}×{ok[0].height} take {ok[0].latency_p50:.3g} s per image. "
    if best is first or not beyond_noise(best, first):
        said += "No other number format is faster here beyond the noise. "
    else:
        said += f"The fastest format is {best.label}: {best.speedup:.2f} times {first.label} ({interval(best)}). "
    return said + f"Two runs of the same baseline differ by {abs(ok[0].speedup - 1):.1%}."


def fastest_sentence(rows: list[Row]) -> str:
    """The fastest of several techniques, if it is faster than the baseline beyond the noise."""
    ok = finished(rows)
    missing = len(rows) - len(ok)
    words = f" {missing} of {len(rows) - 1} can't run here; the table says why." if missing else ""
    best = fastest(ok[1:])
    if best is None or not beyond_noise(best, ok[0]):
        return f"nothing is faster than the baseline, {ok[0].label}, beyond the noise.{words}"
    return (
        f"{best.label} is the fastest, **{best.speedup:.2f} times** the baseline, {ok[0].label} "
        f"({interval(best)}, n = {best.n}), {best.latency_p50:.3g} s per image.{words}"
    )


def compile_table(rows: list[Row], warm: Mapping[str, Row], ceilings, work):
    """Every variant with its first image, cold and with the cache of an earlier run, its steady state and its graphs.

    Args:
        warm: label -> the row of its first image with that cache.
        ceilings, work: of fluxnb.measure.ceilings.
    """

    columns = (
        *first_images(warm),
        Column("steady", "latency_p50", "s"),
        PER_STEP,
        *SPEEDUP,
        proved("graphs"),
        proved("breaks"),
        proved("recompiles"),
        WHAT_RAN,
    )
    return table(rows, limited(columns, ceilings, work), "variant")


def first_images(warm: Mapping[str, Row]) -> Columns:
    """Seconds until the first image: with nothing compiled before, and with the cache of an earlier run."""

    def again(row: Row) -> float | None:
        return warm[row.label].latency_p50 if row.label in warm else None

    return Column("cold", "first_s", "s"), Column("warm", again, "s")


def plainest_sentence(rows: list[Row]) -> str:
    """What the first variant gains for its wait, beside the fastest one."""
    ok = [r for r in finished(rows[1:]) if r.speedup is not None]
    if not ok:
        return "no variant can run here; the table says why."
    first, best = ok[0], fastest(ok)

    def words(row: Row) -> str:
        return f"{row.speedup:.2f}× ({interval(row)}) after a first image in {row.first_s:.0f} s"

    if best is first:
        return f"no variant is faster than {first.label}: {words(first)}."
    return f"{first.label}: {words(first)}; the fastest, {best.label}: {words(best)}."


def work_sentence(work) -> str:
    """How much arithmetic one step is."""
    return f"One step is {work.products / 1e12:.3g} TFLOP of products and {work.attention / 1e12:.3g} of attention."


def waits_sentence(rows: list[Row], warm: Mapping[str, Row]) -> str:
    """The longest wait for a first image, cold and warm."""
    slowest = max((r for r in rows if r.label in warm), key=lambda r: r.first_s)
    longest = max(r.latency_p50 for r in warm.values())
    cold = f"{slowest.first_s:.0f} s cold ({slowest.label})"
    return f"the longest wait for a first image is {cold} and {longest:.0f} s warm."


# --- what changes images ------------------------------------------------------------------------------------


def changes_sentence(rows: list[Row]) -> str:
    """Which technique changes the images most, and whether adherence holds under all of them."""
    ok = finished(rows[1:])
    if not ok:
        return "no variant can run here; the table says why."
    worst = min(ok, key=psnr_or_infinite)
    if math.isinf(psnr_or_infinite(worst)):
        return "every variant makes the eager images, to the last bit."
    lost = [r.label for r in ok if not keeps_adherence(r, rows[0])]
    kept = f"adherence is lost by more than {LOSS} with {', '.join(lost)}" if lost else "adherence is kept"
    return f"of {len(ok)} variants {worst.label} changes images most, to {worst.psnr_db:.1f} dB; {kept}."


def quality_sentence(rows: list[Row]) -> str:
    """The order of formats by what they change, from the least to the most."""
    ok = sorted(finished(rows[1:]), key=psnr_or_infinite)
    if not ok:
        return "no quantized format can run here; the table says why."
    worst, best, missing = ok[0], ok[-1], len(rows) - 1 - len(ok)
    return (
        f"of {len(ok)} formats, {best.label} changes the image least ({psnr(best)}) and {worst.label} most "
        f"({psnr(worst)}); {sum(keeps_adherence(r, rows[0]) for r in ok)} keep adherence within {LOSS}."
        + (f" {missing} can't run here; the table says why." if missing else "")
    )


def fits(rows: list[Row]):
    """Which cards hold each setting: its peak and some to spare."""

    def holds(card: int) -> Column:
        return Column(f"{card} GiB", lambda r: "yes" if r.memory_peak_gib / (1 - SPARE) <= card else "no")

    return table(rows, map(holds, CARDS))


# --- the VAE by itself --------------------------------------------------------------------------------------


def decoding_table(rows: list[Row]):
    """Every way of decoding beside the first of its size and batch, if that was timed in the same session."""
    columns = (SIDE, BATCH, MILLISECONDS, Column("over the first", _over_first(rows)), PEAK, WHAT_RAN)
    return table(rows, columns, "option")


def decoding_sentence(rows: list[Row]) -> str:
    """Which option decodes one image of the first size fastest, and which needs least memory at the largest."""
    one = [(r, times) for r, times in zip(rows, _over_first(rows), strict=True) if times and r.batch == 1]
    best, times = max((pair for pair in one if pair[0].width == rows[0].width), key=lambda pair: pair[1])
    said = (
        f"{best.label} decodes {best.width}² fastest, in {1e3 * best.latency_p50:.3g} ms ({times:.2f}× {rows[0].label})"
    )
    side = max(r.width for r, _ in one)
    peaks = {r.label: r.memory_peak_gib for r, _ in one if r.width == side and r.memory_peak_gib}
    least = min(peaks, key=peaks.get, default=None)
    if least and (saved := peaks.get(rows[0].label, 0.0) - peaks[least]) >= LEAST_PEAK:
        said += f"; at {side}² {least} needs least memory, {peaks[least]:.2f} GiB, {saved:.2f} GiB less"
    return said + "."


def _over_first(rows: Sequence[Row]) -> list[float | None]:
    first: dict[tuple, float] = {}
    for r in rows:
        first.setdefault((r.width, r.batch, r.session), r.latency_p50)
    plain = [first[r.width, r.batch, r.session] for r in rows]
    return [p / r.latency_p50 if p and r.latency_p50 else None for p, r in zip(plain, rows, strict=True)]


# --- the stack ----------------------------------------------------------------------------------------------


def gains(rows: list[Row], ceilings=None, work=None):
    """Every phase with its gain over the fastest before it and over the baseline; its share of the limit if known."""
    own = Column("own gain", [over(r, rows[:i]) for i, r in enumerate(rows)])
    columns = (P50, PER_STEP, own, *SPEEDUP, LOADED, PEAK, APPLIED)
    return table(rows, limited(columns, ceilings, work) if ceilings else columns, "phase")


def stack_sentence(rows: list[Row]) -> str:
    """From the baseline to the whole stack, and what the largest single step was."""
    first, last = rows[0], rows[-1]
    said = (
        f"the whole stack takes **{last.latency_p50:.2f} s** instead of {last.baseline_s:.2f} s, {last.speedup:.2f}× "
        f"({interval(last)}), at {last.memory_peak_gib:.1f} GiB instead of {first.memory_peak_gib:.1f}"
    )
    gained = [(gain, r.label) for i, r in enumerate(rows) if (gain := over(r, rows[:i]))]
    if gained:
        gain, label = max(gained)
        said += f"; the largest single step is “{label}”, {gain:.2f}× the fastest before it"
    return said + "."


def beside_published(rows: list[Row], most: float = 0.15):
    """Published speedups, each over its own baseline, beside those of our stacks, each over its own.

    Where they differ by more than `most`, the reason that fluxnb.findings.published has for it stands beside them.
    """
    stacks = {r.stack: r for r in rows if r.stack}
    lines = []
    for claim in published.COUNTERPARTS:
        ours, ratio = stacks.get(claim.ours), claim.ratio()
        difference = None if ours is None else ours.speedup / ratio - 1
        close = difference is not None and abs(difference) <= most
        lines.append(
            {
                "claim": claim.text,
                "GPU": claim.gpu,
                "published": ratio,
                "ours": ours and ours.speedup,
                "difference": difference,
                "why": "not run here" if ours is None else "" if close else claim.why,
                "row": ours and ours.id,
            }
        )
    return listed(lines, "claim")
