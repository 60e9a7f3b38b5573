"""What rows of one GPU say: number formats, kernels, compilation, quantization, the VAE, the stack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fluxnb.findings.caches import images_words
from fluxnb.findings.rows import (
    BALANCED_DB,
    LEAST_PEAK,
    NEAR_LOSSLESS_DB,
    above,
    alike,
    finished,
    gigabytes,
    judged,
    leaders,
    step_ms,
    teraflops,
    worst_db,
)
from fluxnb.findings.table import (
    BATCH,
    CLOCKS,
    MILLISECONDS,
    P50,
    PEAK,
    PER_STEP,
    SIDE,
    SPEEDUP,
    WHAT_RAN,
    Column,
    Columns,
    N,
    proved,
    table,
)
from fluxnb.findings.words import fastest_words, labels, sureness
from fluxnb.study.row import Row

CARDS = (16, 24, 48, 80)  # GiB
SPARE = 0.1  # share of a card that isn't counted on: PyTorch's reserve, CUDA's context
FLOORS = (NEAR_LOSSLESS_DB, BALANCED_DB)
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
    note = "of the limit: what products and attention take at the ceilings, by the time taken"
    if said := ceilings_words(ceilings):
        note += f" ({said})"
    share = Column("of the limit", lambda r: of_limit(r, ceilings, work), share=True, note=note)
    return tuple(c for column in columns for c in ((column, share) if column is PER_STEP else (column,)))


def ceilings_words(ceilings) -> str:
    """For how long ceilings were held, at which clock, and in which session; rows may be of another."""
    said = []
    if ceilings.timed_s:
        said.append(f"ceilings held for {ceilings.timed_s:.2g} s each")
    if ceilings.clock_mhz:
        said.append(f"at a mean of {ceilings.clock_mhz:,.0f} MHz")
    if ceilings.session:
        said.append(f"in session {ceilings.session}")
    return " ".join(said)


def step_parts(rows: list[Row], ceilings, work):
    """Where one step goes, by kind of kernel, with the limits of products and attention; None without profiles."""
    profiled = [r for r in finished(rows) if r.shown("step_ms")]
    if not profiled:
        return None

    def products(row):
        reached = ceilings.products.get(number(row))
        return reached and 1e3 * work.products / reached

    reached = ceilings.attention
    columns = (
        Column("one step", step_ms, "ms"),
        proved("products", "step_ms", "matrix products", unit="ms"),
        Column("products at least", products, "ms", note=ceilings_words(ceilings)),
        proved("attention", "step_ms", "attention", unit="ms"),
        Column("attention at least", lambda r: reached and 1e3 * work.attention / reached, "ms"),
        proved("the rest", "step_ms", "the rest", unit="ms"),
        Column("no kernel", lambda r: max(0.0, step_ms(r) - sum(r.shown("step_ms").values())), "ms"),
    )
    return table(profiled, columns)


def ceilings_sentence(rows: list[Row]) -> str:
    """The fastest arithmetic that was measured by itself, for how long it was held, and how fast memory is."""
    told = sorted((r for r in rows if teraflops(r)), key=teraflops, reverse=True)
    if not told:
        return "no ceiling was measured."
    best, clock = told[0], (told[0].telemetry or {}).get("sm_clock_avg_mhz")
    memory = "".join(f"; memory moves {gigabytes(r):.3g} GB/s, reads and writes counted" for r in rows if gigabytes(r))
    held = f", held for {best.shown('timed_s'):.2g} s" if best.shown("timed_s") else ", in a burst of milliseconds"
    held += f" at {clock:,.0f} MHz" if clock else ""
    return f"the fastest arithmetic measured is {teraflops(best):.3g} TFLOP/s ({best.label}{held}){memory}."


def kernels_sentence(rows: list[Row]) -> str:
    """What the first kernel, the default, runs and reaches, and which is fastest beyond the spread of its samples."""
    default = rows[0]
    told = sorted((r for r in rows if teraflops(r)), key=teraflops, reverse=True)
    ran = next(iter(default.shown("kernels", [])), "a kernel that no profile names")
    if default not in told:
        return f"{default.label} can't run here; the table says why."
    said = f"{default.label} runs **{ran}** and reaches {teraflops(default):.3g} TFLOP/s"
    first = [r for r in told if r is told[0] or alike(r, told[0])]
    if default in first:
        others = [r for r in first if r is not default]
        return f"{said}; {f'{labels(others)} can not be told from it' if others else 'none is faster'}."
    if len(first) > 1:
        return f"{said}; {labels(first)} are equally fast within the noise, with {teraflops(told[0]):.3g} TFLOP/s."
    return f"{said}; the fastest is {told[0].label} with {teraflops(told[0]):.3g} TFLOP/s."


# --- speed --------------------------------------------------------------------------------------------------


def baseline_sentence(rows: list[Row]) -> str:
    """What an image takes, which number format is fastest beyond the noise, and how large the noise is."""
    ok = finished(rows)
    compared = [r for r in ok if r.steps == ok[-1].steps]
    if not ok:
        return "no format can run here; the table says why."
    said = f"{ok[0].label} at {ok[0].width}×{ok[0].height} take {ok[0].latency_p50:.3g} s per image"
    if compared[1:]:
        said += f"; {fastest_words(compared[1:], compared[0])}"
    if (own := compared[0]).speedup:
        said += f". The baseline over itself, timed twice in turn: {own.speedup:.3f} times ({sureness(own)})"
    return f"{said}."


def few_steps_sentence(rows: list[Row], many: list[Row]) -> str:
    """What an image takes that is made for a few steps, and what it shows, beside the model of many steps.

    Args:
        many: rows of that model, the baseline first; not timed in turn with these.
    """
    if not finished(rows[:1]) or not finished(many[:1]):
        return "what a few steps gain can't be said: a baseline can't run here; the table says why."

    def words(row: Row) -> str:
        facts = ""
        if row.adherence is not None and row.adherence_min is not None and judged(row):
            mean, worst = f"{row.adherence:.0%}", f"{row.adherence_min:.0%}"
            facts = f" ({mean} of the prompts' facts, {worst} in the worst of {row.images} images)"
        return f"`{row.model}` takes {row.latency_p50:.3g} s per image in {row.steps} steps{facts}"

    few, full = rows[0], many[0]
    times = f"{full.latency_p50 / few.latency_p50:.3g} times as long, not timed in turn"
    return f"{words(few)}; {words(full)}: {times}."


def batches_sentence(rows: list[Row]) -> str:
    """Which batch makes the most images per second, and which as many within the noise, beside the smallest of it."""
    timed = [r for r in finished(rows) if r.images_per_s and r.batch]
    if not timed:
        return "no batch was timed here; the table says why."

    def each(row: Row) -> Row:
        return replace(row, samples=[s / row.batch for s in row.samples or []])

    best = max(timed, key=lambda r: r.images_per_s)
    least = min((r for r in timed if r.label == best.label), key=lambda r: r.batch)
    said = f"most images per second come from {best.label} {best.batch} at once, {best.images_per_s:.3g}"
    others = [r for r in timed if r is not best and r is not least]
    if level := [f"{r.label} {r.batch}" for r in others if alike(each(r), each(best))]:
        said += f" (no more, beyond the noise, than from {', '.join(level)})"
    if least.batch < best.batch:
        times = best.images_per_s / least.images_per_s
        noise = ", within the noise" * alike(each(least), each(best))
        said += f", {times:.2f} times as many as {least.batch} at once (not timed in turn{noise})"
    return f"{said}."


def fastest_sentence(rows: list[Row]) -> str:
    """The fastest of several techniques, if it is faster than the baseline beyond the noise."""
    ok = finished(rows)
    if not ok:
        return "nothing can run here; the table says why."
    missing = len(rows) - len(ok)
    words = f" {missing} of {len(rows) - 1} can't run here; the table says why." if missing else ""
    return f"{fastest_words(ok[1:], ok[0])}.{words}"


def compile_table(rows: list[Row], warm: Mapping[str, Row], ceilings, work):
    """Every variant with its first image, cold and with the cache of an earlier run, its steady state and its graphs.

    Args:
        warm: label -> the row of its first image with that cache.
        ceilings, work: of fluxnb.measure.ceilings.
    """

    columns = (
        *first_images(warm),
        P50,
        PER_STEP,
        *SPEEDUP,
        *(proved(count, format=".0f") for count in ("graphs", "breaks", "recompiles")),
        WHAT_RAN,
    )
    return table(rows, limited(columns, ceilings, work), "variant")


def first_images(warm: Mapping[str, Row]) -> Columns:
    """Seconds until the first image: with nothing compiled before, and with the cache of an earlier run."""

    def again(row: Row) -> float | None:
        return warm[row.label].latency_p50 if row.label in warm else None

    cold = "cold: the first image with nothing compiled before, warm: with what the last run compiled; each once"
    return Column("cold", "first_s", "s", note=cold), Column("warm", again, "s")


def plainest_sentence(rows: list[Row]) -> str:
    """What the first variant gains for its wait, beside the fastest one, if that is faster beyond the noise."""
    ok = [r for r in finished(rows[1:]) if r.speedup is not None]
    if not ok:
        return "no variant can run here; the table says why."

    def words(row: Row) -> str:
        return f"{row.label}: {row.speedup:.2f}× ({sureness(row)}) after a first image in {row.first_s:.0f} s"

    plain, first = ok[0], leaders(ok, rows[0])
    if not first:
        return f"{words(plain)}; no variant is faster than the baseline beyond the noise."
    if plain not in first:
        return f"{words(plain)}; faster beyond the noise, {words(first[0])}."
    return f"{words(plain)}; no other variant is faster than that beyond the noise."


def work_sentence(work) -> str:
    """How much arithmetic one step is."""
    return f"One step is {work.products / 1e12:.3g} TFLOP of products and {work.attention / 1e12:.3g} of attention."


def waits_sentence(rows: list[Row], warm: Mapping[str, Row]) -> str:
    """The longest wait for a first image, cold and warm."""
    if not any(r.label in warm for r in rows):
        return "no wait for a first image was measured here."
    slowest = max((r for r in rows if r.label in warm), key=lambda r: r.first_s)
    longest = max(warm, key=lambda label: warm[label].latency_p50)
    cold = f"{slowest.first_s:.0f} s cold ({slowest.label})"
    return f"the longest wait for a first image is {cold} and {warm[longest].latency_p50:.0f} s warm ({longest})."


# --- what changes images ------------------------------------------------------------------------------------


def changes_sentence(rows: list[Row]) -> str:
    """Which technique changes the images most, and which keep every image near the eager one."""
    ok = _nearest_first(rows)
    if not ok:
        return _unseen(rows, "variant")
    if worst_db(ok[-1]) == math.inf:
        return f"every variant makes the eager images, to the last bit ({_between([r.images for r in ok])} each)."
    said = "images" if len(ok) == 1 else f"images most, of {len(ok)} variants"
    return f"{ok[-1].label} changes {said}: {images_words(ok[-1])}; {_floors(ok)}."


def quality_sentence(rows: list[Row]) -> str:
    """Which format changes the images least and which most, at their worst, and how many keep every image near."""
    ok = _nearest_first(rows)
    if not ok:
        return _unseen(rows, "quantized format")
    least, most, missing = ok[0], ok[-1], len(rows) - len(finished(rows))
    said = f"{least.label} changes images least ({images_words(least)})"
    if len(ok) > 1:
        said = f"of {len(ok)} formats, {said} and {most.label} most ({images_words(most)})"
    return f"{said}; {_floors(ok)}." + (f" {missing} can't run here; the table says why." if missing else "")


def _nearest_first(rows: list[Row]) -> list[Row]:
    """The judged ones but the first, by their worst image."""
    return sorted((r for r in finished(rows[1:]) if worst_db(r) is not None), key=lambda r: -worst_db(r))


def _unseen(rows: list[Row], what: str) -> str:
    return f"no {what} was judged here." if finished(rows[1:]) else f"no {what} can run here; the table says why."


def _floors(rows: list[Row]) -> str:
    """How many keep the worst of their judged images above each floor, and what the probe finds of its facts."""
    known = [r for r in rows if judged(r)]
    if not known:
        return "their worst images aren't counted: how many were judged isn't known"
    counts = (f"{floor:g} dB or more with {sum(above(r, floor) for r in known)} of {len(known)}" for floor in FLOORS)
    said = f"the worst of {_between([r.images for r in known])} images stays at {' and at '.join(counts)}"
    facts = [f"{r.adherence:.0%}" for r in sorted(known, key=lambda r: r.adherence or 0) if r.adherence is not None]
    return said + (f" (adherence {' to '.join(dict.fromkeys((facts[0], facts[-1])))})" if facts else "")


def _between(values: list) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def fits(rows: list[Row]):
    """Which cards hold each setting: what it allocates and some to spare."""

    def holds(card: int) -> Column:
        def said(r: Row) -> str | None:
            if r.memory_peak_gib is None:
                return None
            return "yes" if r.memory_peak_gib / (1 - SPARE) <= card else "no"

        return Column(f"{card} GiB", said)

    return table(rows, (PEAK, *map(holds, CARDS)))


# --- the VAE by itself --------------------------------------------------------------------------------------


def decoding_table(rows: list[Row]):
    """Every way of decoding beside the first of its size and batch, if that was timed in the same session."""
    note = "over the first: over the VAE as it is, at the same size and batch, in the same session"
    over_first = Column("over the first", _over_first(rows), "×", note=note)
    columns = (SIDE, BATCH, MILLISECONDS, over_first, N, PEAK, *CLOCKS, WHAT_RAN)
    return table(rows, columns, "option")


def decoding_sentence(rows: list[Row]) -> str:
    """Which option decodes one image of the first size fastest, and which needs least memory at the largest."""
    one = [r for r, times in zip(rows, _over_first(rows), strict=True) if times and r.batch == 1]
    plain = rows[0]
    same = [r for r in one if (r.width, r.session) == (plain.width, plain.session)]
    if not same:
        return "no way of decoding was timed here."
    best = min(same, key=lambda r: r.latency_p50)
    first = [r for r in same if alike(r, best)]
    if plain in first:
        said = f"nothing decodes one image of {plain.width}² faster than {plain.label} beyond the noise"
    elif len(first) > 1:
        said = f"{labels(first)} decode one image of {plain.width}² equally fast within the noise"
    else:
        said = f"{best.label} decodes one image of {plain.width}² fastest"
    if plain not in first:
        times, whose = plain.latency_p50 / best.latency_p50, f"{best.label} " * (len(first) > 1)
        said += f", {whose}in {1e3 * best.latency_p50:.3g} ms ({times:.2f}× {plain.label}, n = {best.n})"
    side = max(r.width for r in one)
    peaks = {r.label: r.memory_peak_gib for r in one if r.width == side and r.memory_peak_gib}
    least = min(peaks, key=peaks.get, default=None)
    if least and (saved := peaks.get(plain.label, 0.0) - peaks[least]) >= LEAST_PEAK:
        said += f"; at {side}² {least} needs least memory, {peaks[least]:.2f} GiB, {saved:.2f} GiB less"
    return said + "."


def _over_first(rows: Sequence[Row]) -> list[float | None]:
    first: dict[tuple, float] = {}
    for r in rows:
        first.setdefault((r.width, r.batch, r.session), r.latency_p50)
    plain = [first[r.width, r.batch, r.session] for r in rows]
    return [p / r.latency_p50 if p and r.latency_p50 else None for p, r in zip(plain, rows, strict=True)]
