"""What rows of several use cases say: what pays where, what a mask and a condition ask for.

`cases` is use case -> its rows, the baseline first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

from fluxnb.families import BASELINE, Family
from fluxnb.findings.caches import LEVELS, UNJUDGED, images_words
from fluxnb.findings.rows import above, beyond_noise, ends, finished, judged, of, of_one_session, within_noise, worst_db
from fluxnb.findings.table import P50, PEAK, Column, Columns, table
from fluxnb.findings.words import share, sureness
from fluxnb.study.results import canonical
from fluxnb.study.row import Row

_OF_THE_CASE = ("inputs", "hold_controlnet")  # settings that differ between use cases of one acceleration
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
    """A line for each finished row of every use case, named by both: MASK, AGREEMENT."""
    rows = [replace(r, label=f"{case}: {r.label}") for case, own in cases.items() for r in finished(own)]
    return table(rows, columns)


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


def mean_agreement(images: list, conditions: list, kind: str) -> float:
    """Mean agreement of images with conditions (fluxnb.models.control)."""
    from fluxnb.models import control

    return sum(control.agreement(i, c, kind) for i, c in zip(images, conditions, strict=True)) / len(images)


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
