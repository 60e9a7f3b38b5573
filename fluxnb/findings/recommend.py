"""What to choose: for each goal the row that it rests on, of all that was timed in turn with one plain baseline.

A row can be recommended if its speedup follows from `stats.HEADLINE` rounds or more of one session, which neither heat
nor a warm-up that wasn't over made another (`unlike_itself`), if the very same was judged on trained weights (the worst
image decides, and nothing is put together from parts), and if its settings say how to put it on again: a choice is a
stack of `fluxnb.stacks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from fluxnb import notebooks, rebuilt, stacks
from fluxnb.findings.ledger import latest
from fluxnb.findings.rows import (
    BALANCED_DB,
    LOSSLESS_DB,
    NEAR_LOSSLESS_DB,
    above,
    fastest,
    finished,
    is_baseline,
    judged,
    keeps_adherence,
    peak_gib,
    same_image,
    unlike_itself,
    within_noise,
    worst_db,
)
from fluxnb.findings.table import COMPUTED, P50, PEAK, SPEEDUP, Column, table
from fluxnb.findings.words import sureness
from fluxnb.measure import stats
from fluxnb.study.row import Row

ABOUT = 1.02  # times as much memory is about as much
# ST-LPIPS that no judged image may exceed. PSNR hardly sees a small thing that is gone: of 125 drawings with one part
# erased 15 keep 28 dB, and 8 of these are above this; of images that caches and fewer steps leave 28 dB, 2 in 46 are.
LEAST_ALIKE = 0.05
STAND_IN = (  # for FLUX's own weights
    "time and memory are of random weights at full size, and quality is that of the very same on trained weights of "
    "`{}`: a stand-in whose order of methods is a hypothesis about FLUX"
)
_OF_IMAGES = ("model", "inputs")  # settings that say of what, not how


@dataclass(frozen=True)
class Goal:
    """What is wanted: speed, or the smallest memory, with no judged image below a floor."""

    name: str
    floor_db: float
    exact: bool = False  # nothing but the order of operations may differ
    smallest: bool = False

    @property
    def key(self) -> str:
        """The goal as a user asks for it: `smallest-memory-balanced`."""
        return f"{'smallest-memory-' if self.smallest else ''}{self.name}"

    @property
    def text(self) -> str:
        """The goal as a reader sees it."""
        return f"{'smallest memory, ' if self.smallest else ''}{self.name} ({self.floor_db:g} dB)"


GOALS = tuple(
    Goal(name, floor_db, exact, smallest)
    for smallest in (False, True)
    for name, floor_db, exact in (
        ("lossless", LOSSLESS_DB, True), ("near-lossless", NEAR_LOSSLESS_DB, False), ("balanced", BALANCED_DB, False),
    )
)  # fmt: skip


ANY = Goal("any", -math.inf)


@dataclass(frozen=True)
class Choice:
    """A goal's answer.

    Args:
        row: the baseline's where nothing else reaches the goal.
        seen: the same on trained weights; None if only the order of operations differs and nobody judged it.
        base: the row of the baseline that was timed in turn with it.
        waiting: what would be better, if its rows were enough for a recommendation.
    """

    goal: Goal
    row: Row
    seen: Row | None
    base: Row
    waiting: Row | None = None

    @property
    def settings(self) -> dict:
        """What the row has more than its baseline."""
        return _own(self.row, self.base)

    @property
    def stack(self) -> stacks.Stack:
        """What to put on, by the row's own name for it."""
        return stack_of(self.row, self.base)

    @property
    def label(self) -> str:
        """What to choose; in words where nothing is."""
        if not is_baseline(self.row):
            return self.row.label
        better = "needs less memory" if self.goal.smallest else "is faster beyond the noise"
        kept = "makes the same image, up to rounding," if self.goal.exact else f"reaches {self.goal.floor_db:g} dB"
        return f"{self.row.label} as they are: nothing timed in {stats.HEADLINE} rounds or more that {kept} {better}"

    @property
    def worst(self) -> str:
        """PSNR of the worst judged image."""
        if self.seen is None:
            return "not judged"
        return "identical" if worst_db(self.seen) == math.inf else f"{worst_db(self.seen):.1f} dB"

    @property
    def unconfirmed(self) -> str | None:
        """What would be better, and why it isn't recommended."""
        row = self.waiting
        if row is None:
            return None
        figure = f"{row.memory_peak_gib:.1f} GiB" if self.goal.smallest else f"{row.speedup:.2f}×"
        steps = "" if row.total_steps == self.row.total_steps or not self.goal.smallest else f", {row.steps} steps"
        why = _unsteady(row, self.base)
        return f"{row.label}: {figure}, n = {row.n}{steps}{f', {why}' if why else ''}"


def references(rows: Iterable[Row]) -> list[Row]:
    """The plain baselines that recommendations are over, of every model that of most steps; the most come first.

    Of models that take as many steps only those of full size, where there is one: the others are for its images.
    """
    own = [r for r in finished(rows) if r.notebook == notebooks.FINAL_STACK and is_baseline(r) and _one_image(r)]
    last = {r.model: r for r in sorted(own, key=lambda r: (r.steps or 0, r.measured_at or "")) if r.n}
    found = sorted(last.values(), key=lambda r: -(r.steps or 0))
    full = {r.steps for r in found if r.weights == "random"}
    return [r for r in found if r.weights == "random" or r.steps not in full]


def stack_of(row: Row, base: Row) -> stacks.Stack | None:
    """What a row has more than its baseline, as a stack; None where its settings don't say how to make it."""
    return rebuilt.stack(_own(row, base), row.technique, row.stack or row.label)


def choices(rows: Iterable[Row], reference: Row) -> list[Choice]:
    """The best row for each goal; empty where no row rests on enough rounds.

    Of rows within the noise of the fastest the simplest is chosen, of rows with about as little memory the fastest.

    Args:
        rows: of all notebooks of one configuration, failed ones and earlier ones among them.
        reference: the plain baseline: only what was timed in turn with one like it competes.
    """
    rows = finished(latest(list(rows)))
    timed, seen = _beside(rows, reference)
    own = [r for r in rows if r.id in timed]
    whole = [r for r in own if timed[r.id].steps == reference.steps]
    sure = [r for r in whole if r.n >= stats.HEADLINE and stack_of(r, timed[r.id]) is not None]
    sure = [r for r in sure if not _unsteady(r, timed[r.id])]
    if not any(map(is_baseline, sure)):
        return []

    def reaching(goal: Goal, of: Sequence[Row]) -> list[Row]:
        return [r for r in of if reaches(goal, r, seen[r.id], rows)]

    found = []
    for goal in GOALS:
        pool, others = reaching(goal, sure), reaching(goal, [r for r in own if r not in sure])
        if goal.smallest:
            pool = [r for r in pool if peak_gib(r)]
            least = min(map(peak_gib, pool), default=0.0) * ABOUT
            pool = [r for r in pool if peak_gib(r) <= least]
            others = [r for r in others if (peak_gib(r) or math.inf) * ABOUT < least / ABOUT]
            waiting = min(others, key=peak_gib, default=None)
        else:
            best = fastest(pool)
            waiting = fastest(r for r in others if r in whole and r.speedup > best.speedup)
        if pool:
            row = simplest(pool, timed, sure)
            found.append(Choice(goal, row, seen[row.id], timed[row.id], waiting))
    return found


def _beside(rows: list[Row], reference: Row) -> tuple[dict[str, Row], dict[str, Row | None]]:
    """By id, of all that was timed in turn with a baseline like the reference: that baseline; what shows its images.

    Args:
        rows: finished ones, the latest of each.
    """
    bases = {r.id: r for r in rows if is_baseline(r)}
    timed = {r.id: base for r in rows if (base := _base(r, bases)) is not None and _competes(r, base, reference)}
    own = [r for r in rows if r.id in timed]
    seen = {r.id: quality_of(r, rows, reference, reference.steps if _full(r, timed[r.id]) else r.steps) for r in own}
    return timed, seen


def options(rows: Iterable[Row], reference: Row) -> list[Choice]:
    """Everything of as many steps as the reference, or fewer, that was timed with it and judged: the soonest first.

    Of one setting that was timed several times that of the most rounds. No goal is asked of them.
    """
    rows = finished(latest(list(rows)))
    timed, seen = _beside(rows, reference)
    found: dict[tuple, Row] = {}
    for row in sorted((r for r in rows if seen.get(r.id) is not None), key=lambda r: r.n):
        if timed[row.id].steps == reference.steps and worst_db(seen[row.id]) is not None:
            found[row.steps, frozenset(_set(row)), is_baseline(row)] = row
    own = sorted(found.values(), key=lambda r: r.latency_p50)
    return [Choice(ANY, r, seen[r.id], timed[r.id]) for r in own]


def same_settings(one: Row, other: Row) -> bool:
    """Whether two rows are of one setting at as many steps."""
    return (one.steps, is_baseline(one), _set(one)) == (other.steps, is_baseline(other), _set(other))


def quality_of(row: Row, rows: Iterable[Row], reference: Row, steps: int | None = None) -> Row | None:
    """The row on trained weights that shows what the very same does to images; None if it wasn't judged.

    The same settings in the same number format at as many steps, on a model that takes as many as the row's own; judged
    on as many images as any other of its model, of the prompts, seeds and size that its baseline was judged on last; of
    several the one with the worst image. A row of trained weights shows it itself.

    Args:
        reference: the plain baseline, which has all steps of its model: four of a model distilled to four.
        steps: that the judged images have; as many as the row's by default.
    """
    if row.weights == "trained":
        return row if judged(row) else None
    seen = [r for r in finished(rows) if r.weights == "trained" and judged(r) and _one_image(r)]
    steps = steps or row.steps
    of = {model: [r for r in seen if r.model == model] for model in {r.model for r in seen}}
    most = {model: max(r.images for r in own) for model, own in of.items()}
    takes = {model: max(r.steps or 0 for r in own) for model, own in of.items()}
    # of fewer images the worst may be missing, and other prompts, seeds or sizes are other images
    seen = [r for r in seen if r.images == most[r.model] and takes[r.model] == reference.steps]
    plain = {r.model: _inputs(r) for r in sorted(seen, key=lambda r: r.measured_at or "") if is_baseline(r)}
    seen = [r for r in seen if _inputs(r) == plain.get(r.model, _inputs(r))]
    same = [r for r in seen if (is_baseline(r), r.steps, _set(r)) == (is_baseline(row), steps, _set(row))]
    return min(same, key=lambda r: worst_db(r) or 0.0, default=None)


def quality_of_phases(rows: list[Row], judged_rows: list[Row]) -> list[float | None]:
    """PSNR of each phase's worst image on trained weights; None where it wasn't judged or all are identical."""
    found = (quality_of(r, judged_rows, rows[0]) for r in rows)
    return [None if seen is None else seen.psnr_min_db for seen in found]


def recommendations(found: Sequence[Choice]):
    """A line for each goal: what to choose, and all that it rests on."""
    seen = [c.seen or Row() for c in found]
    columns = (
        Column("choose", [c.label for c in found]),
        Column("worst PSNR", [c.worst for c in found]),
        Column("judged", [r.images for r in seen], "images", format=".0f"),
        *SPEEDUP,
        P50,
        PEAK,
        Column("worst ST-LPIPS", [r.st_lpips_max for r in seen]),
        COMPUTED,
        Column("better, not confirmed", [c.unconfirmed for c in found]),
        Column("quality from", [r.id for r in seen]),
        Column("measured", lambda r: (r.measured_at or "")[:10] or None),
        Column("session", "session"),
    )
    return table([c.row for c in found], columns, Column("goal", [c.goal.text for c in found]))


def recommendation_sentence(found: Sequence[Choice], rows: Iterable[Row]) -> str:
    """The recommendation in one breath; that there is none, where too few rounds were measured."""
    if not found:
        return no_headline(rows)
    goals: dict[str, list[Choice]] = {}
    for choice in found:
        goals.setdefault(f"{choice.label} {choice.row.id}", []).append(choice)
    return "; ".join(map(_said, goals.values())) + "."


def no_headline(rows: Iterable[Row]) -> str:
    """Why nothing is recommended: how many rounds its rows have, those at full size where there are any."""
    own = [r for r in rows if r.n and r.speedup is not None]
    own = [r for r in own if r.weights == "random"] or own
    if (most := max((r.n for r in own), default=0)) >= stats.HEADLINE:
        bases = {r.id: r for r in own if is_baseline(r)}
        why = next(filter(None, (_unsteady(r, bases.get(r.baseline, r)) for r in own)), "")
        why = why or "no plain baseline was timed in turn with so many"
        return f"no headline: n = {most}, but {why}"
    return f"no headline: n = {most}, and {stats.HEADLINE} rounds in one session are needed"


def stands_in(found: Sequence[Choice]) -> str:
    """Whose images quality is read off, where it isn't the model that was timed; "" where it is."""
    models = dict.fromkeys(c.seen.model for c in found if c.seen is not None and c.seen.model != c.row.model)
    return STAND_IN.format("`, `".join(models)) if models else ""


# --- what they are made of ---


def _own(row: Row, base: Row) -> dict:
    return {k: v for k, v in row.settings.items() if k not in _OF_IMAGES and base.settings.get(k) != v}


def _said(alike: list[Choice]) -> str:
    """One sentence for the goals of one answer."""
    first, row = alike[0], alike[0].row
    names = ", ".join(c.goal.text for c in alike)
    if is_baseline(row):
        return f"{names}: {first.label}"
    times, rest = speed_words(row).split("×", 1)
    return f"{names}: {first.label}, **{times}×**{rest}, {quality_words(first)}"


def speed_words(row: Row) -> str:
    """How much faster, how sure that is, seconds and memory."""
    memory = f", {row.memory_peak_gib:.1f} GiB" if peak_gib(row) else ""
    seconds = f"{row.latency_p50:.3g} s instead of {row.baseline_s:.3g} s"
    return f"{row.speedup:.2f}× ({sureness(row)}), {seconds}{memory}"


def quality_words(choice: Choice) -> str:
    """PSNR of the worst image, of how many it is, and of which model, where that isn't the one that was timed."""
    if (seen := choice.seen) is None:
        return choice.worst
    whose = f" of `{seen.model}`" * (seen.model != choice.row.model)
    return f"worst of {seen.images} images{whose} {choice.worst}"


def has_only(row: Row, name: str) -> bool:
    """Whether nothing but one setting, such as a threshold, was chosen beside the number format."""
    return {key for key, _ in _set(row)} - {"dtype"} == {name}


def _set(row: Row) -> set[tuple[str, str]]:
    """What is set, number format among it."""
    return {(name, str(value)) for name, value in row.settings.items() if name not in _OF_IMAGES}


def _inputs(row: Row) -> tuple:
    """What its images are of."""
    return row.setting("inputs"), row.width, row.height


def _unsteady(row: Row, base: Row) -> str:
    """Why its times or those of the baseline that was timed in turn with it don't stand for others."""
    return unlike_itself(base) or ("" if row.id == base.id else unlike_itself(row, base))


def _one_image(row: Row) -> bool:
    """One image from text on one GPU, for one user."""
    return (row.use_case, row.batch, row.gpus, row.users, row.images_each) == ("txt2img", 1, 1, 1, 1)


def _base(row: Row, bases: dict[str, Row]) -> Row | None:
    """The baseline's row that it was timed in turn with: itself, if it is one."""
    return row if is_baseline(row) else bases.get(row.baseline)


def _full(row: Row, base: Row) -> bool:
    """Whether it runs as many steps as its baseline: what doesn't is a control."""
    return row.steps == base.steps


def _competes(row: Row, base: Row, reference: Row) -> bool:
    """Whether its speedup follows from the samples of one session, over a baseline like the reference."""
    alike = ("model", "weights", "width", "height")
    if not _one_image(row) or _set(base) != _set(reference):
        return False
    if any(getattr(r, name) != getattr(reference, name) for r in (row, base) for name in alike):
        return False
    theirs = row.again if is_baseline(row) else row.samples
    if row.session is None or row.session != base.session or not theirs or not base.samples or row.speedup is None:
        return False
    if not row.n == len(theirs) == len(base.samples) >= 2:
        return False
    told = (*stats.speedup(base.samples, theirs), stats.percentiles(row.samples or theirs)["p50"])
    shown = (row.speedup, row.speedup_ci_low, row.speedup_ci_high, row.latency_p50)
    return None not in shown and all(map(partial(math.isclose, rel_tol=1e-6), told, shown))


def reaches(goal: Goal, row: Row, seen: Row | None, rows: list[Row]) -> bool:
    """Whether no judged image is below a goal's floor; `seen`: the same on trained weights, `rows`: the baselines."""
    if seen is None:  # where nobody looked, what is computed has to be the same
        return same_image(row)
    plain = (r for r in rows if is_baseline(r) and judged(r) and r.model == seen.model)
    inputs = seen.setting("inputs")
    before = max((r for r in plain if r.setting("inputs") == inputs), key=lambda r: r.steps, default=Row())
    worst = (Row(adherence=r.adherence_min) for r in (seen, before))  # one lost object hardly moves a mean
    near = 0.0 if worst_db(seen) == math.inf else math.inf  # of what has no ST-LPIPS nobody knows
    near = near if seen.st_lpips_max is None else seen.st_lpips_max
    kept = keeps_adherence(seen, before) and keeps_adherence(*worst) and near <= LEAST_ALIKE
    return above(seen, goal.floor_db) and kept and (same_image(row) or not goal.exact)


def simplest(pool: list[Row], timed: dict[str, Row], sure: list[Row]) -> Row:
    """Of the fastest and what is within its noise, the one that differs in the fewest settings from its baseline."""
    best = fastest(pool)
    floors = [r for r in sure if is_baseline(r)]
    own = max(floors, key=lambda r: (r.session == best.session, r.measured_at or ""))
    equal = [r for r in pool if r is best or within_noise(r, best, own)]
    return min(equal, key=lambda r: (_settings(r, timed[r.id]), -r.speedup))


def _settings(row: Row, base: Row) -> int:
    """How many settings differ from its baseline's: the one measure of simplicity."""
    return len(_set(row) - _set(base)) + (not _full(row, base))
