"""What a grid of two gates says: what a search finds of it, and what is kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxnb.cache import Cache, Cascade, FirstBlock, Hold, Taylor, TeaCache
from fluxnb.findings.caches import images_words
from fluxnb.findings.masks import schedules
from fluxnb.findings.rows import finished, is_baseline
from fluxnb.findings.table import BATCH, COMPUTED, IMAGES, P50, PEAK, QUALITY, SPEEDUP, Column, listed, table
from fluxnb.findings.words import sureness
from fluxnb.models import pipelines
from fluxnb.study import search
from fluxnb.study.candidate import Candidate, using
from fluxnb.study.row import Row
from fluxnb.study.subject import Subject
from fluxnb.technique import Technique

NEVER = 1e-9  # a threshold that no change is below
FULL_SIZE = 4096 * 3072 * 2  # bytes of FLUX's image tokens at 1024², in bfloat16


def search_sentence(found: dict[Any, search.Value], every: dict[Any, search.Value], steps: int, images: int) -> str:
    """How many settings a search asked for, and how much of the whole grid's front it has.

    Args:
        found, every: setting -> (cost, quality) of what was asked for, and of all.
        steps: the cost that nothing exceeds.
        images: that each was judged on.
    """
    worst = (float(steps), min(quality for _, quality in every.values()))
    whole, own = search.front(every), search.front(found)
    return (
        f"The search evaluated {len(found)} of {len(every)} settings ({len(found) / len(every):.0%}), each judged on "
        f"{images} image{'s' * (images != 1)}, and reached "
        f"{search.reached(found, every, worst):.1%} of the full grid's front (hypervolume), "
        f"{len(set(own) & set(whole))} of its {len(whole)} settings."
    )


def watching(model: str) -> list[Cache]:
    """TeaCache, First Block Cache and both, held and extrapolated, that look at every step of a model and reuse none.

    So they keep all that they ever keep.
    """
    pair = TeaCache.at(NEVER, model), FirstBlock(NEVER)
    return [Cache(gate, how) for gate in (*pair, Cascade(*pair)) for how in (Hold(), Taylor(2))]


def engine_parts(steps: int, under: tuple[Technique, ...]) -> list[Candidate]:
    """What `engine_sentence` compares: a gate that never reuses; all reused but one step, with and without a block.

    Args:
        under: techniques that all of them have.
    """
    looks = ", ".join(["looks, never reuses", *(part.label for part in under)])
    masks = {"one step computed, the others reused": "1" + "0" * (steps - 1)}
    reuses = [schedules(masks, {}, steps, block)[0] for block in (True, False)]
    return [using(Cache(FirstBlock(NEVER)), steps, under, looks), *(using(cache, steps, under) for cache in reuses)]


def one_decision_table(rows: list[Row]):
    """Time, hit rate and images of batches, uncached and cached: a batch has one decision, made from all its images."""
    hit_rate = Column("hit rate", lambda r: 1 - r.computed_steps / r.total_steps, share=True)
    return table(rows, (BATCH, P50, IMAGES, *SPEEDUP, COMPUTED, hit_rate, PEAK, *QUALITY))


def one_decision_sentence(rows: list[Row]) -> str:
    """What the largest batch's one decision costs or spares beside that of single images.

    Args:
        rows: of each size the uncached batch and the cached one.
    """
    made = sorted((r for r in finished(rows) if not is_baseline(r) and r.speedup), key=lambda r: r.batch)
    if not made or made[0].batch == made[-1].batch:
        return "batches of one size only were timed here."

    def words(row: Row) -> str:
        of = f"{row.computed_steps:.1f} of {row.total_steps} steps computed, {row.images_per_s:.3g} images/s"
        return f"{of}, **{row.speedup:.2f}×** the same uncached ({sureness(row)}), {images_words(row)}"

    one, many = made[0], made[-1]
    return f"{many.label} in batches of {many.batch}: {words(many)}; one at a time: {words(one)}."


def kept_table(caches: list[Cache], subject: Subject, rows: Sequence[Row] = ()):
    """What each cache keeps for reuse, in MiB: of this subject, and of FLUX at 1024² in bfloat16.

    Args:
        rows: of `study.first_and_second`, uncached and then of each cache: what it takes at the peak is measured.
    """
    peaks = [row.memory_peak_gib for row in rows] or [None] * (1 + len(caches))
    measured = [None if None in (one, peaks[0]) else 1024 * (one - peaks[0]) for one in peaks[1:]]
    config = pipelines.transformer_config(subject.model.name)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = (subject.width // 16) * (subject.height // 16)
    here, there, peak = f"here, {subject.dtype}", "FLUX at 1024², bfloat16", "peak over uncached, measured"
    lines = []
    for cache, extra in zip(caches, measured, strict=True):
        kept = len(cache.gate.points) * cache.predictor.keeps
        size = tokens * width * pipelines.DTYPES[subject.dtype].itemsize
        of = {here: kept * size / 2**20, there: kept * FULL_SIZE / 2**20}
        of |= {} if extra is None else {peak: extra}
        word = f" {getattr(cache.gate, 'word', '')} "
        gates = word.join(gate.name for gate in getattr(cache.gate, "gates", [cache.gate]))  # whatever their thresholds
        lines.append({"cache": f"{gates}, {cache.predictor.name}", "kept tensors": kept, **of})
    return listed(lines, "cache", {title: "MiB" for title in (here, there, peak) if any(title in one for one in lines)})


def block_count(subject: Subject) -> int:
    """How many blocks the subject's transformer has."""
    config = pipelines.transformer_config(subject.model.name)
    return config["num_layers"] + config["num_single_layers"]
