"""What rows of several use cases say: what pays where, what a mask and a condition ask for.

`cases` is use case -> its rows, the baseline first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from fluxnb.families import BASELINE, Family
from fluxnb.findings.rows import LOSS, finished, keeps_adherence, of
from fluxnb.findings.table import P50, PEAK, Column, Columns, table
from fluxnb.findings.words import share
from fluxnb.study.results import canonical
from fluxnb.study.row import Row

_OF_THE_CASE = ("inputs", "hold_controlnet")  # settings that differ between use cases of one acceleration
Cases = Mapping[str, list[Row]]


def use_cases_sentence(cases: Cases, which: Family | str) -> str:
    """What a family, or a named stack, gives in each use case, and whether adherence holds in all of them."""
    found = {case: own[0] for case, rows in cases.items() if (own := of(finished(rows), which))}
    if not found:
        return f"{which if isinstance(which, str) else which.name} could not be measured in any use case."
    slowest, fastest = (pick(found, key=lambda case: found[case].speedup) for pick in (min, max))
    labels = {r.stack or r.label for r in found.values()}
    label = labels.pop() if len(labels) == 1 or isinstance(which, str) else which.name
    said = f"{label} makes every one of {len(found)} use cases faster: " if len(found) > 1 else f"{label}: "
    if found[slowest].speedup <= 1:
        said = f"{label} doesn't pay in every use case: "
    said += f"from **{found[slowest].speedup:.2f}×** ({slowest}) to **{found[fastest].speedup:.2f}×** ({fastest})"
    judged = {case: r for case, r in found.items() if r.adherence is not None}
    if not judged:
        return said + "."
    if lost := [case for case, r in judged.items() if not keeps_adherence(r, cases[case][0])]:
        return said + f"; adherence is lost by more than {LOSS} in {', '.join(lost)}."
    return said + f", with adherence within {LOSS} of the uncached image in all of them."


def use_case_table(cases: Cases):
    """A line for each use case, a column for each acceleration: the speedup over the use case's own baseline."""
    columns = (
        Column("steps run", "total_steps"),
        Column(BASELINE.name, P50.value, "s"),
        *(
            Column(name, [own[case].speedup if case in own else None for case in cases])
            for name, own in _accelerations(cases).items()
        ),
        PEAK,
    )
    return table([rows[0] for rows in cases.values()], columns, Column("use case", list(cases)))


def pays_differently(cases: Cases, beyond: float = 1.15) -> list[str]:
    """For each acceleration one sentence: where it gives most and least, if that differs beyond the noise.

    Args:
        beyond: ratio of the highest to the lowest speedup from which they count as different.
    """
    said = []
    found: dict[str, dict[str, Row]] = {}
    for case, rows in cases.items():
        for r in finished(rows[1:]):
            found.setdefault(r.stack or r.label, {})[case] = r
    for name, own in found.items():
        if len(own) < 2:
            continue
        low, high = (pick(own, key=lambda case: own[case].speedup) for pick in (min, max))
        a, b = own[low].speedup, own[high].speedup
        apart = own[high].speedup_ci_low > own[low].speedup_ci_high
        if b >= beyond * a and apart:
            said.append(f"{name} pays most in {high} ({b:.2f}×) and least in {low} ({a:.2f}×).")
        else:
            why = f"less than {beyond - 1:.0%} apart" if apart else "within the noise"
            said.append(f"{name} pays alike in all of them, {a:.2f}× to {b:.2f}×, {why}.")
    return said


def _accelerations(cases: Cases) -> dict[str, dict[str, Row]]:
    """Name -> use case -> its finished row: a stack's, or that of one setting.

    With a ControlNet or without is one setting; of two in one use case, with it held and not, each stands for itself.
    """
    names: dict[tuple[str, int], str] = {}
    found: dict[str, dict[str, Row]] = {}
    for case, rows in cases.items():
        seen: Counter[str] = Counter()
        for row in finished(rows[1:]):
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


def kept_sentence(cases: Cases, slack_db: float = 0.5) -> str:
    """Whether what lies outside the mask is as the VAE alone would leave it."""
    ok = [r for rows in cases.values() for r in finished(rows) if r.kept_db is not None]
    if not ok:
        return "Nothing was inpainted here."
    worst = min(ok, key=lambda r: r.kept_db - r.kept_vae_db)
    apart = worst.kept_vae_db - worst.kept_db
    said = f"outside the mask the picture is kept at {worst.kept_db:.1f} dB at worst ({worst.label}), "
    said += f"where the VAE alone keeps {worst.kept_vae_db:.1f} dB: "
    return said + ("nothing but the VAE's own error." if apart <= slack_db else f"{apart:.1f} dB are lost on the way.")


def mean_agreement(images: list, conditions: list, kind: str) -> float:
    """Mean agreement of images with conditions (fluxnb.models.control)."""
    from fluxnb.models import control

    return sum(control.agreement(i, c, kind) for i, c in zip(images, conditions, strict=True)) / len(images)


def agreement_with_condition(cases: Cases, free: Mapping[str, float], kind: str) -> str:
    """Whether images follow the condition better than without a ControlNet, and whether accelerated ones still do.

    Args:
        cases: the first one made from noise, as those of `free`.
        free: model -> mean agreement of the same prompts and seeds without a ControlNet.
    """
    rows = next(iter(cases.values()))
    worst, own = min(finished(rows), key=lambda r: r.agreement), free.get(rows[0].model)
    said = f"images agree with the given {kind} to {share(rows[0].agreement)}"
    if own is not None:
        said += f", to {share(own)} without a ControlNet"
    return said + f"; of the accelerated ones {worst.label} agrees least, to {share(worst.agreement)}."
