"""What rows of several use cases say: what pays where, what a mask and a condition ask for.

`cases` is use case -> its rows, the baseline first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from statistics import fmean

from fluxnb.families import BASELINE, Family
from fluxnb.findings.caches import LEVELS, UNJUDGED, images_words
from fluxnb.findings.recommend import GOALS, reaches, simplest
from fluxnb.findings.rows import above, beyond_noise, ends, finished, judged, of, of_one_session, within_noise, worst_db
from fluxnb.findings.table import P50, PEAK, SPEEDUP, Column, Columns, listed, table
from fluxnb.findings.words import share, sureness
from fluxnb.measure import stats
from fluxnb.models import control
from fluxnb.models.use_cases import takes_condition
from fluxnb.study import Study, Subject, candidate
from fluxnb.study.results import canonical
from fluxnb.study.row import Row

_OF_THE_CASE = ("inputs", "hold_controlnet", "condition")  # settings that differ between use cases of one acceleration
FORMATS = (P50, *SPEEDUP, PEAK)
Cases = Mapping[str, list[Row]]


def use_cases_sentence(cases: Cases, which: Family | str) -> str:
    """Where a family, or a named stack, is faster beyond the noise, where it pays differently, and its worst image."""
    found = {case: own[0] for case, rows in cases.items() if (own := of(_timed(rows), which))}
    name = which if isinstance(which, str) else which.name
    if not found:
        return f"{name} could not be measured in any use case."
    labels = {r.label for r in found.values()}
    label = labels.pop() if len(labels) == 1 and not isinstance(which, str) else name
    stands: dict[str, list[str]] = {}
    for case, r in found.items():
        stands.setdefault(_beside(r, cases[case][0]), []).append(case)
    said = f"{label} is " + ", ".join(f"{how} in {' and '.join(own)}" for how, own in stands.items())
    said += f"; {_between(found, cases)}"
    seen = {case: r for case, r in found.items() if judged(r) and worst_db(r) is not None}
    if not seen:
        return f"{said}. " + (UNJUDGED if any(r.ssim is not None for r in found.values()) else "This is time only.")
    worst = min(seen, key=lambda case: worst_db(seen[case]))
    said += f". Images are furthest from the uncached ones in {worst}: {images_words(seen[worst])}"
    for floor, least in LEVELS.items():
        kept = [case for case, r in seen.items() if above(r, least)]
        where = "all of them" if len(kept) == len(seen) > 1 else ", ".join(kept) or "none"
        said += f"; {floor} (worst image {least:g} dB or more) in {where}"
    return f"{said}."


def use_case_table(cases: Cases):
    """A line for each use case, a column for each acceleration: the speedup over the use case's own baseline."""
    columns = (
        Column("steps run", "total_steps"),
        Column(BASELINE.name, P50.value, "s"),
        *(
            Column(name, [own[case].speedup if case in own else None for case in cases], "×")
            for name, own in _accelerations(cases).items()
        ),
        PEAK,
    )
    return table([rows[0] for rows in cases.values()], columns, Column("use case", list(cases)))


def pays_differently(cases: Cases) -> list[str]:
    """For each acceleration one sentence: whether it pays more in one use case than in another, beyond the noise."""
    found = {name: own for name, own in _accelerations(cases).items() if len(own) > 1}
    return [f"{name}: {_between(own, cases)}." for name, own in found.items()]


def _between(found: Mapping[str, Row], cases: Cases) -> str:
    """Of one acceleration in one session, the two use cases that differ most beyond the noise; or that no two do."""
    own = of_one_session(list(found.values()))
    found = {case: r for case, r in found.items() if r in own}

    def words(case: str) -> str:
        return f"{case}, {found[case].speedup:.2f}× ({sureness(found[case])})"

    def ratio(pair) -> float:
        return found[pair[0]].speedup / found[pair[1]].speedup

    if len(found) == 1:
        return f"**{words(*found)}**"
    pairs = [sorted(pair, key=lambda case: -found[case].speedup) for pair in combinations(found, 2)]
    apart = [(a, b) for a, b in pairs if not any(within_noise(found[a], found[b], cases[case][0]) for case in (a, b))]
    if apart:
        most, least = max(apart, key=ratio)
        return f"it pays more in **{words(most)}** than in **{words(least)}**"
    low, high = (pick(r.speedup for r in found.values()) for pick in (min, max))
    return f"**{low:.2f}× to {high:.2f}×**, and no two use cases can be told apart beyond the noise"


def _beside(row: Row, baseline: Row) -> str:
    """How it stands to its own baseline, as far as its rounds tell."""
    if ends(row) is None or ends(baseline) is None:
        return "without an interval, so not told from its baseline,"
    if within_noise(row, baseline, baseline):
        return "within the noise of its baseline"
    return "faster than its baseline" if beyond_noise(row, baseline) else "slower than its baseline"


def _timed(rows: list[Row]) -> list[Row]:
    return [r for r in finished(rows[1:]) if r.speedup]


def _accelerations(cases: Cases) -> dict[str, dict[str, Row]]:
    """Name -> use case -> its finished row: a stack's, or that of one setting.

    With a ControlNet or without is one setting; of two in one use case, with it held and not, each stands for itself.
    """
    names: dict[tuple[str, int], str] = {}
    found: dict[str, dict[str, Row]] = {}
    for case, rows in cases.items():
        seen: Counter[str] = Counter()
        for row in _timed(rows):
            what = row.stack or canonical({k: v for k, v in row.settings.items() if k not in _OF_THE_CASE})
            label = row.stack or row.label
            name = names.setdefault((what, seen[what]), f"{label} (2)" if label in names.values() else label)
            found.setdefault(name, {})[case] = row
            seen[what] += 1
    return found


def of_cases(cases: Cases, columns: Columns):
    """A line for each row of every use case, named by both: MASK, AGREEMENT, FORMATS; of what failed, why."""
    return table([replace(r, label=f"{case}: {r.label}") for case, own in cases.items() for r in own], columns)


# --- number formats, quantized ones among them ------------------------------------------------------------


def formats_sentence(cases: Cases) -> str:
    """How many times as long other number formats take as the use case's own, and where they can't run."""
    taken: dict[str, list[Row]] = {}
    failed: dict[str, list[str]] = {}
    for case, (_, *others) in cases.items():
        for r in others:
            if r.ok and r.speedup:
                taken.setdefault(r.label, []).append(r)
            else:
                failed.setdefault(f"{r.label} can't be measured", []).append(f"{case} ({r.reason or r.status})")
    said = []
    for label, own in taken.items():
        times, n = sorted(1 / r.speedup for r in own), min(r.n for r in own)
        range_ = f"{times[0]:.2f} to {times[-1]:.2f}" if len(own) > 1 else f"{times[0]:.2f}"
        rounds = f"{n} images of each" + ("" if n >= stats.LEAST else ": a range, not an interval")
        said.append(f"{label} takes **{range_} times** as long as {next(iter(cases.values()))[0].label} ({rounds})")
    said += [f"{what} in {', '.join(where)}" for what, where in failed.items()]
    return "; ".join(said) + "." if said else "no other number format was measured here."


def best_formats(cases: Cases, seen: Cases) -> list[dict]:
    """For each use case what to quantize to, by the rule of recommendations: {use case, goal, choose, speedup, …}.

    Of the plain pipeline and what computes every step, quantized or not: the fastest whose worst judged image reaches
    the goal's floor, and within the noise the simplest.

    Args:
        seen: the same on trained weights, where those of `cases` are random.
    """
    lines = []
    for case, (base, *_) in cases.items():
        if not base.ok:
            continue
        base = replace(base, speedup=base.speedup or 1.0)  # one of an earlier format wasn't timed against itself
        known = [*cases[case], *seen.get(case, [])]
        pool = [base, *(r for r in _timed(cases[case]) if r.computed_steps == r.total_steps)]
        for goal in (g for g in GOALS if not g.smallest):
            reaching = [r for r in pool if r is base or reaches(goal, r, _judged_as(r, known), known)]
            row = simplest(reaching, {r.id: base for r in pool}, [base])
            quality, chosen = _judged_as(row, known), f"{row.label}{', as it is' * (row is base)}"
            lines.append(
                {
                    "use case": case, "goal": goal.text, "choose": chosen, "speedup": row.speedup, "n": row.n,
                    "peak": row.memory_peak_gib, "judged": quality and quality.images, "row": row.id,
                    "worst PSNR": quality and worst_db(quality),
                }
            )  # fmt: skip
    return lines


def best_formats_table(lines: list[dict]):
    """A line for each use case and goal, as `best_formats` found them."""
    frame = listed(({k: v for k, v in line.items() if k != "row"} for line in lines), "use case")
    frame.attrs |= {"units": {"speedup": "×", "peak": "GiB", "judged": "images", "worst PSNR": "dB"}}
    frame.attrs["formats"] = {"n": ".0f", "judged": ".0f"}
    frame.attrs["ids"] = [line["row"] for line in lines]
    few = min((line["n"] or 0 for line in lines), default=0)
    if few < stats.HEADLINE:
        frame.attrs["note"] = f"A recommendation rests on {stats.HEADLINE} rounds, and here are {few}: a shortlist"
    return frame


def best_formats_sentence(lines: list[dict]) -> str:
    """What is best for each goal, and in which use cases it is that; goals of one answer together."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        found.setdefault(line["goal"], {}).setdefault(line["choose"], []).append(line["use case"])
    alike: dict[str, list[str]] = {}
    for goal, own in found.items():
        where = (f"{what} in {'every use case' if len(own) == 1 else ', '.join(of)}" for what, of in own.items())
        alike.setdefault("; ".join(where), []).append(goal)
    said = ". ".join(f"**{', '.join(goals)}**: {what}" for what, goals in alike.items())
    return f"{said}." if said else "no use case was measured quantized."


def _judged_as(row: Row, rows: list[Row]) -> Row | None:
    """The row on trained weights with the same settings at as many steps; itself, where its weights are."""
    if row.weights == "trained":
        return row if judged(row) else None

    def what(r: Row) -> tuple:
        settings = {k: str(v) for k, v in r.settings.items() if k != "inputs"}
        return r.steps, r.family == BASELINE.name, canonical(settings)

    same = (r for r in finished(rows) if r.weights == "trained" and judged(r) and what(r) == what(row))
    return next(same, None)


def kept_sentence(cases: Cases) -> str:
    """How much of what lies outside the mask is kept, beside what the VAE alone keeps."""
    ok = [r for rows in cases.values() for r in finished(rows) if None not in (r.kept_db, r.kept_vae_db)]
    if not ok:
        return "Nothing was inpainted here."
    worst = min(ok, key=lambda r: r.kept_db - r.kept_vae_db)
    return (
        f"outside the mask the picture is kept at {worst.kept_db:.1f} dB where most is lost ({worst.label}), and the "
        f"VAE alone keeps {worst.kept_vae_db:.1f} dB: {worst.kept_db - worst.kept_vae_db:+.1f} dB."
    )


def agreement_without(s: Study, plain: Subject, kind: str) -> dict[str, float]:
    """Model -> mean agreement of images without a ControlNet with the conditions of their prompts.

    Empty where what is plain has a ControlNet itself.
    """
    if takes_condition(plain.use_case):
        return {}
    wanted = [plain.material(*given).condition(kind) for given in plain.inputs]
    images = s.images(plain, candidate.plain(s.steps(plain)))
    return {plain.model.name: fmean(map(control.agreement, images, wanted, [kind] * len(images)))}


def agreement_with_condition(cases: Cases, free: Mapping[str, float], kind: str) -> str:
    """How far images agree with the condition, in the first use case: with a ControlNet, without, and accelerated.

    Args:
        cases: the first one made from noise, as those of `free`.
        free: model -> mean agreement of the same prompts and seeds without a ControlNet.
    """
    case, (baseline, *others) = next(iter(cases.items()))
    said = f"{case}: images agree with the given {kind} to {share(baseline.agreement)}"
    if (own := free.get(baseline.model)) is not None:
        said += f", to {share(own)} without a ControlNet"
    least = min((r for r in finished(others) if r.agreement is not None), key=lambda r: r.agreement, default=None)
    if least is None:
        return f"{said}."
    if share(least.agreement) == share(baseline.agreement):
        return f"{said}; none of the accelerated ones agrees less."
    return f"{said}; of the accelerated ones {least.label} agrees least, to {share(least.agreement)}."
