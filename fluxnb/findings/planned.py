"""What the plans ask of caches in so many words: their speedups, four steps, the package's own, two images, memory."""

from __future__ import annotations

from collections.abc import Sequence

from fluxnb.families import COMBINED, FEWER_STEPS, FIRST_BLOCK, TEACACHE, Family
from fluxnb.findings import published
from fluxnb.findings.caches import (
    against_control,
    briefly,
    fastest_near,
    gaps_words,
    images_words,
    met,
    sentences,
    standing,
    told,
    unranked,
    words_of,
)
from fluxnb.findings.rows import BALANCED_DB, above, baseline_of, finished, leaders, of, worst_db
from fluxnb.findings.table import COMPUTED, Column, table
from fluxnb.findings.words import labels, share
from fluxnb.measure import stats
from fluxnb.study.row import Row

CRITERIA = {FIRST_BLOCK: 2.0, TEACACHE: 1.3, COMBINED: 3.0}  # the plan's least speedups
MIB = 1024  # of a GiB


def _criterion(ranked: list[Row], baseline: Row, family: Family) -> tuple[Row | None, str]:
    """The fastest that keeps the balanced floor, if anything does, and whether the plan's speedup is met."""
    kept, least = [r for r in of(ranked, family) if above(r, BALANCED_DB)], CRITERIA[family]
    if (best := next(iter(leaders(kept, baseline)), None)) is None:
        return None, "no setting here is that near and faster beyond the noise"
    marks = {met(r, least) for r in kept}  # one that may reach it keeps the others from saying no
    return best, "met" if met(best, least) == "met" else "not met" if marks == {"not met"} else "can't be told"


def _too_few(ranked: list[Row]) -> str:
    few = min(r.n for r in ranked)
    return f" A verdict takes {stats.HEADLINE} rounds, and these have {few}." if few < stats.HEADLINE else ""


def criteria_sentence(rows: list[Row]) -> str:
    """The plan's criteria for speed, each met, not met or not to be told by settings that keep the balanced floor."""
    (baseline, ranked), parts = told(rows), []
    if not ranked:
        return unranked(rows)
    for family, least in CRITERIA.items():
        best, verdict = _criterion(ranked, baseline, family)
        parts.append(f"{family.name} (asked: {least:g}×): {verdict}" + (f"; {words_of(best)}" if best else ""))
    asked = f"The plan's speedups, asked of settings whose worst image keeps {BALANCED_DB:g} dB"
    return sentences([f"{asked}, on `{baseline.model}` over {baseline.label}", *parts]) + _too_few(ranked)


# --- a model of few steps -----------------------------------------------------------------------------------


def skipping_sentence(rows: list[Row], family: Family) -> str:
    """What a cache gives a model that takes few steps, beside fewer of them, and whether it is what the plan asks."""
    baseline, ranked = told(rows)
    own = [r for r in of(ranked, family) if worst_db(r) is not None]
    if not own:
        return unranked(rows) if not ranked else f"no setting of {family.name} was timed and judged here."
    skipping, n = [r for r in own if r.computed_steps < r.total_steps], baseline.total_steps
    if not skipping:
        return f"no setting of {family.name} timed here skips any of {n} steps ({labels(own)}), so none gains a thing."
    floor = f"a worst image of {BALANCED_DB:g} dB"
    best, control = (fastest_near(r, baseline, BALANCED_DB) for r in (skipping, of(ranked, FEWER_STEPS)))
    many = (
        f"of {len(own)} settings of {family.name}, {len(skipping)} skip{'s' * (len(skipping) == 1)} some of {n} steps"
    )
    some = many if len(own) > 1 else f"the one setting of {family.name} here skips some of {n} steps"
    if best:
        said = f"{some}, and the fastest that keeps {floor} is {briefly(best)}{_facts(best[0], baseline)}"
        said += (
            f"; that is {standing(best[0], control[0], baseline)} fewer steps, {briefly(control)}" if control else ""
        )
    else:
        near = max(skipping, key=worst_db)
        said = f"{some}, but none that does keeps {floor} and is faster beyond the noise"
        said += f"; nearest is {near.label}, {near.speedup:.2f}× at {images_words(near)}"
        said += f"; fewer steps do both, {briefly(control)}" if control else ""
    if of(ranked, FEWER_STEPS) and not control:
        said += f"; no fewer steps keep {floor} and are faster beyond the noise"
    gaps = against_control(ranked, family)
    equal = (
        [f"Where it computes as many steps, its worst image is {gaps_words(gaps, FEWER_STEPS.name)}"] if gaps else []
    )
    verdict = _criterion(ranked, baseline, family)[1]
    asked = f"The plan's {CRITERIA[family]:g}× at {BALANCED_DB:g} dB: {verdict}"
    return sentences([said, *equal, asked]) + _too_few(ranked)


def _facts(row: Row, baseline: Row) -> str:
    """How many of the prompts' facts are found, beside the baseline's; "" where they can't be."""
    if row.adherence is None or baseline.adherence is None:
        return ""
    return f", {share(row.adherence)} of the prompts' facts found (all steps: {share(baseline.adherence)})"


# --- the package's own --------------------------------------------------------------------------------------


def package_sentence(rows: list[Row]) -> str:
    """How the package's own First Block Cache stands to ours at the same thresholds: steps, images, speed."""
    theirs, ours = ([r for r in of(rows, FIRST_BLOCK) if bool(r.setting("backend")) is own] for own in (True, False))
    by_threshold = {r.setting("threshold"): r for r in finished(ours)}
    pairs = [(r, own) for r in finished(theirs) if (own := by_threshold.get(r.setting("threshold")))]
    if not pairs:
        reason = next((r.reason for r in theirs if r.reason), "no threshold was measured with both")
        return f"ParaAttention's own First Block Cache can't be set beside ours: {reason}."
    baseline, counts = (
        baseline_of(rows),
        dict.fromkeys(("as fast within the noise as", "faster than", "slower than"), 0),
    )
    for one, other in pairs:
        counts[standing(one, other, baseline)] += 1
    alike = sum(_same_images(*pair) for pair in pairs)
    speeds = "; ".join(f"{one.label} **{one.speedup:.2f}×**, ours {other.speedup:.2f}×" for one, other in pairs)
    how = ", ".join(f"{how} ours at {k}" for how, k in counts.items() if k)
    return (
        f"ParaAttention's own First Block Cache computes as many steps as ours, and its images are as near to the "
        f"uncached ones, at {alike} of {len(pairs)} thresholds; it is {how} ({speeds})."
    )


def _same_images(one: Row, other: Row) -> bool:
    """Whether two rows computed as many steps, and every figure of their images is alike to a hundredth of a dB."""
    if one.computed_steps != other.computed_steps or one.psnr_identical != other.psnr_identical:
        return False
    pairs = ((one.psnr_db, other.psnr_db), (one.psnr_min_db, other.psnr_min_db))
    return all(a == b or (None not in (a, b) and abs(a - b) < 0.01) for a, b in pairs)


# --- two images, and memory ---------------------------------------------------------------------------------


def _nth(i: int):
    return lambda r: r.samples[i] if r.samples and len(r.samples) > i else None


FIRST_OF_TWO = Column(
    "first", _nth(0), "s",
    note="first and second: two images of one prompt and seed, one right after the other, with a pipeline that was "
    "loaded for them; loading isn't counted",
)  # fmt: skip
TWO = (
    FIRST_OF_TWO,
    Column("second", _nth(1), "s"),
    Column("total", lambda r: sum(r.samples) if r.samples else None, "s"),
)


def inferences_table(rows: Sequence[Row]):
    """First and second image and their total at each threshold, beside what was published, and the memory it takes.

    Args:
        rows: of `study.first_and_second`, the first uncached.
    """
    theirs = published.inference_seconds()
    extra = [None if (gib := _extra_gib(r, rows[0])) is None else MIB * gib for r in rows]
    known = [theirs.get(r.setting("threshold"), {}) for r in rows]
    names = ("first", "second", "total")
    columns = (
        *TWO,
        Column("time left", [_left(r, rows) for r in rows], format=".0%"),
        COMPUTED,
        *(Column(f"{name}, published", [k.get(f"latency_{name}") for k in known], "s") for name in names),
        Column(
            "time left, published",
            [k["latency_total"] / theirs[0]["latency_total"] if k else None for k in known],
            format=".0%",
        ),
        Column("peak over uncached", extra, "MiB", format="+.3g"),
    )
    return table(rows, columns)


def _left(row: Row, rows: Sequence[Row]) -> float | None:
    """The share of the first row's total, the uncached one's."""
    return sum(row.samples) / sum(rows[0].samples) if row.samples and rows[0].samples else None


def inferences_sentence(rows: Sequence[Row]) -> str:
    """Whether the second image is any faster than the first, as was published, and whether both are the same."""
    pairs = [r for r in rows if r.samples and len(r.samples) > 1]
    if not pairs:
        return "no setting made a first and a second image here."
    ours, theirs = ([b / a for a, b in found] for found in ([r.samples[:2] for r in pairs], _published_pairs()))
    alike = sum(bool(r.shown("both alike")) for r in pairs)
    return (
        f"the second image takes {min(ours):.1%} to {max(ours):.1%} of the first one's time over {len(pairs)} settings "
        f"(published: {min(theirs):.0%} to {max(theirs):.0%}), and both are the same image at {alike} of them."
    )


def _published_pairs() -> list[tuple[float, float]]:
    return [(t["latency_first"], t["latency_second"]) for t in published.inference_seconds().values()]


def memory_sentence(rows: Sequence[Row]) -> str:
    """What caches take at the peak beyond what the uncached pipeline does, each with the second of two images.

    Args:
        rows: of `study.first_and_second`, the first uncached.
    """
    found = [(r, extra) for r in rows[1:] if (extra := _extra_gib(r, rows[0])) is not None]
    if not found:
        return (
            "the memory of a cache was not measured here: of a processor only the growth of the whole process is known."
        )
    words = "; ".join(f"{r.label} {MIB * extra:+.3g} MiB" for r, extra in found)
    return f"beyond the peak of the uncached pipeline, {rows[0].memory_peak_gib:.4g} GiB: {words}."


def _extra_gib(row: Row, uncached: Row) -> float | None:
    known = (row.memory_peak_gib, uncached.memory_peak_gib)
    return None if None in known or row is uncached else known[0] - known[1]
