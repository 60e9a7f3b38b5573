"""What a grid of two gates says: what a search finds of it, and what is kept in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fluxnb.cache import Cache, Cascade, FirstBlock, Hold, Taylor, TeaCache
from fluxnb.families import Family
from fluxnb.findings.caches import LEVELS, images_words, sentences, steps_of_work
from fluxnb.findings.masks import schedules
from fluxnb.findings.rows import finished, is_baseline
from fluxnb.findings.table import BATCH, COMPUTED, IMAGES, P50, PEAK, QUALITY, SPEEDUP, Column, listed, table
from fluxnb.findings.words import sureness
from fluxnb.measure import quality
from fluxnb.models import pipelines
from fluxnb.study import search
from fluxnb.study.candidate import Candidate, using
from fluxnb.study.row import Row
from fluxnb.study.subject import Subject
from fluxnb.technique import Technique

NEVER = 1e-9  # a threshold that no change is below
FULL_SIZE = 4096 * 3072 * 2  # bytes of FLUX's image tokens at 1024², in bfloat16


@dataclass
class Searched:
    """A grid of settings, all judged, and what a search for the cheapest at each floor needed of it."""

    lines: list[list[Candidate]]
    values: dict[search.Point, list[search.Value]]  # of each image: (steps of work, dB)
    found: dict[float, search.Found]  # floor -> what the search did

    def label(self, point: search.Point) -> str:
        """What a reader calls a point."""
        return self.lines[point[0]][point[1]].meaning["label"]

    def best(self, floor: float) -> list[Candidate]:
        """What the search found at a floor; empty if it found nothing."""
        point = self.found[floor].best
        return [] if point is None else [self.lines[point[0]][point[1]]]

    def front(self, family: Family) -> list[Candidate]:
        """The undominated settings of a family, cheapest first."""
        of = {p: self.lines[p[0]][p[1]] for p in self.values}
        own = {p: search.overall(v) for p, v in self.values.items() if of[p].meaning["family"] == family.name}
        return [of[p] for p in search.front(own)]


def searched(s, subject: Subject, baseline: Candidate, caches: list[list[Cache]]) -> Searched:
    """Judges every cache of the lines on the subject's images, untimed, and searches the same lines for both floors.

    Cost is the blocks that ran, counted in steps; quality each image's PSNR against the baseline's. What can't run
    keeps no floor.
    """
    lines = [[using(cache, baseline.steps) for cache in line] for line in caches]
    every = {(n, i): candidate for n, line in enumerate(lines) for i, candidate in enumerate(line)}
    rows = s.survey(subject, baseline, list(every.values()))
    references, blocks = s.images(subject, baseline), block_count(subject)
    values = {}
    for (point, candidate), row in zip(every.items(), rows, strict=True):
        if row.ok:
            images, traces = s.images(subject, candidate), s.traces(subject, candidate)
            seen = zip(references, images, traces, strict=True)
            values[point] = [(steps_of_work([trace], blocks), quality.psnr(a, b)) for a, b, trace in seen]
    never = [(float(baseline.steps), -math.inf)] * len(references)
    sizes, count = list(map(len, lines)), len(references)

    def ask(point: search.Point, i: int) -> search.Value:
        return values.get(point, never)[i]

    return Searched(lines, values, {floor: search.cheapest(sizes, ask, count, floor) for floor in LEVELS.values()})


def search_sentence(result: Searched) -> str:
    """What the search found at each floor and of how many images, beside the cheapest of the whole grid."""
    if not result.values:
        return "no setting of the grid was judged here."
    each = len(next(iter(result.values.values())))
    whole, parts = each * len(result.values), []
    values = {p: search.overall(own) for p, own in result.values.items()}

    def words(point) -> str:
        cost, worst = values[point]
        near = "identical" if worst == math.inf else f"{worst:.1f} dB at worst"
        return f"{result.label(point)} ({cost:.1f} steps of work, {near})"

    for floor, found in result.found.items():
        kept = [p for p, (_, worst) in values.items() if worst >= floor]
        least = min(kept, key=lambda p: (values[p][0], -values[p][1]), default=None)
        said = f"at {floor:g} dB {found.images} of the grid's {whole} images ({found.images / whole:.0%}) "
        if least is None:
            said += "found what the whole grid says: no setting keeps it"
        elif found.best is None:
            said += f"found nothing, where the grid has {words(least)}"
        else:
            same = values[found.best][0] <= values[least][0]
            said += f"found {words(found.best)}, "
            said += "and the whole grid has nothing cheaper" if same else f"where the grid has {words(least)}"
        parts.append(said)
    return f"A search for the cheapest setting whose worst image of {each} keeps a floor: {sentences(parts)}"


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
