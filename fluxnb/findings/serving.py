"""What rows of a server under load say, and of a stack that is run for minutes; a load's table is table.LOAD."""

from __future__ import annotations

import itertools

from fluxnb import recipes, study
from fluxnb.findings.recommend import choices, references
from fluxnb.findings.rows import LEAST_PEAK, alike, finished, is_baseline
from fluxnb.findings.table import LEAST_SAMPLES, listed
from fluxnb.measure import stats, telemetry
from fluxnb.study.results import Results
from fluxnb.study.row import Row
from fluxnb.study.soak import PARTS, SOAK

DRIFT = 0.02  # what two images in a row may differ by at the end of a warm-up, too


def load_sentence(rows: list[Row]) -> str:
    """What more users do to the rate and to the wait, and whether making requests together pays."""
    users = [r for r in rows if r.ok and "arrivals" not in r.settings]
    if not users:
        return "no load was measured here."
    one_by_one = [r for r in users if r.setting("batching") == 1 and r.images_each == users[0].images_each]
    if not one_by_one:
        return "every load here is made together, so there is nothing to compare it with."
    most = max(one_by_one, key=lambda r: r.users)
    first = min((r for r in one_by_one if r.session == most.session), key=lambda r: r.users)
    said = (
        f"{_users(most)} get{'s' * (most.users == 1)} {most.images_per_s:.3g} images a second ({most.n} requests, once)"
    )
    if first is not most:
        said += f", {most.images_per_s / first.images_per_s:.0%} of what {_users(first)} get{'s' * (first.users == 1)}"
    few = min(most.n, first.n) < LEAST_SAMPLES  # most of them come while the queue is still filling
    wait = "latency_avg" if few else "latency_p50"
    said += ", and a request takes " if few else ", and half of the requests take longer than "
    said += f"**{getattr(most, wait):.3g} s**{' on average' * few}"
    if first is not most:
        said += f" instead of {getattr(first, wait):.3g} s"
    said += f", {most.shown('queued_s') / most.latency_avg:.0%} of it in the queue"
    if few:
        said += f" (too few for percentiles, and the queue is filling for the first {most.users})"
    same = (r for r in users if r.setting("batching") > 1 and r.users == most.users and r.session == most.session)
    if together := next((r for r in same if r.images_each == most.images_each), None):
        said += f"; {_made_together(together, together.images_per_s / most.images_per_s)}"
    return said + "."


def _users(row: Row) -> str:
    return f"{row.users} user{'s' * (row.users > 1)}"


def _made_together(row: Row, ratio: float) -> str:
    """What making waiting requests together does to the rate, if any were made together."""
    batch, most = row.shown("batch"), row.setting("batching")
    if batch is not None and batch < 1.05:
        return f"allowed to make up to {most} together, the server made one at a time ({batch:.2f} on average)"
    average = "" if batch is None else f" ({batch:.3g} on average)"
    return f"made up to {most} together{average}, {ratio:.2f} times as many images are made"


def percentiles_words(rows: list[Row]) -> str:
    """Which percentiles loads of so few requests have, for a caption."""
    few = [r.n for r in finished(rows) if r.n < stats.P99_NEEDS]
    said = f"Percentiles need {LEAST_SAMPLES} requests, the 99th {stats.P99_NEEDS}"
    if not few:
        return said
    counts = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{few[0]}"
    which = "these loads" if len(few) == len(finished(rows)) else f"{len(few)} of these loads"
    return f"{said}: {which} had time for {counts}, and have no p99"


# --- minutes on end ---------------------------------------------------------------------------------------


def to_soak(s: study.Study, subject: study.Subject) -> tuple[study.Candidate, str]:
    """What is recommended for a model by this run's rows, else by the committed ones; in words where it is from."""
    committed = Results(s.root / s.params.report_dir / "results.csv")
    places = {"by the rows of this run": s.results, "by the committed rows": committed}
    for origin, results in places.items():
        rows = results.rows()
        for choice in (c for base in references(rows) if base.model == subject.model.name for c in choices(rows, base)):
            if choice.goal.key == recipes.GOAL:
                steps = choice.row.steps
                own = study.plain(steps) if is_baseline(choice.row) else study.stacked(choice.stack, steps)
                return own, f"recommended as {choice.goal.text} {origin}"
    return study.plain(s.steps(subject)), "the plain pipeline, since no rows recommend anything here yet"


def soak_sentence(rows: list[Row]) -> str:
    """Whether what was run for minutes stayed as it was: its latency, its memory, the clocks, every image."""
    own = [r for r in finished(rows) if r.technique == SOAK]
    if not own or min(r.n for r in own) < 2 * PARTS:
        few = f": {own[0].n} of {own[0].label} are too few images to tell" if own else ""
        failed = next((r for r in rows if r.technique == SOAK), None)
        return f"nothing was run for minutes{few or (f': {failed.reason}' if failed else '')}."
    return "; ".join(map(_soaked, own)) + "."


def _soaked(row: Row) -> str:
    drift, slower, beyond = _drift(row)
    grown = {where: _grown(row, name) for where, name in (("the GPU", "device_gib"), ("the process", "host_gib"))}
    held = set((row.telemetry or {}).get("throttle_reasons", ())) - telemetry.POWER
    others, minutes = row.shown("others", 0), row.setting("soak_s", 0) / 60 / PARTS
    wrong = [beyond and abs(slower) > DRIFT, any(g > LEAST_PEAK for g in grown.values()), held, others]
    said = f"**{'not ' * any(wrong)}stable** for {sum(row.samples):,.0f} s and {row.n} images of {row.label}"
    said += f" ({row.shown('origin')})" * bool(row.shown("origin"))
    window = "minute" if minutes == 1 else "tenth"
    said += f": those of the last {window} take {drift}"
    for where, g in grown.items():
        if g > LEAST_PEAK:
            said += f", memory of {where} grew by {g:.2f} GiB"
    if not any(g > LEAST_PEAK for g in grown.values()):
        said += f", memory grew by less than {LEAST_PEAK:g} GiB"
    if (row.telemetry or {}).get("throttle_reasons") is not None:
        by_power = row.telemetry.get("power_limited") or 0
        said += f", {'clocks were held down by ' + ', '.join(sorted(held)) if held else 'no heat held the clocks down'}"
        said += f" (the power limit for {by_power:.0%} of the time)" * bool(by_power)
    differ = f"{others} of them differ{'s' * (others == 1)} from the first"
    return f"{said}, and {differ if others else 'every image is the same'}"


def _drift(row: Row) -> tuple[str, float, bool]:
    """How much longer the last tenth's images take than the first's: in words, as a share, and if beyond the noise."""
    ends = list(itertools.accumulate(row.samples))
    tenth = ends[-1] / PARTS
    first = [s for s, end in zip(row.samples, ends, strict=True) if end <= tenth] or row.samples[:1]
    last = [s for s, end in zip(row.samples, ends, strict=True) if end > ends[-1] - tenth]
    medians = [stats.percentiles(of)["p50"] for of in (first, last)]
    slower = medians[1] / medians[0] - 1
    beyond = not alike(*(Row(session=row.session, samples=of) for of in (first, last)))
    said = f"{medians[1]:.3g} s instead of {medians[0]:.3g} s ({slower:+.1%}"
    return f"{said}{')' if beyond else ', within the noise)'}", slower, beyond


def _grown(row: Row, name: str) -> float:
    """GiB that the last tenth holds more than the first, which may still fill what is kept for images to come."""
    parts = [part for part in row.shown("parts", []) if part[name] is not None]
    return parts[-1][name] - parts[0][name] if parts else 0.0


def soak_table(row: Row):
    """A line for each tenth of a soak: what its images took, what was held, at which clock and temperature."""
    columns = {
        "images": ("images", ""), "p50": ("p50", "s"), "GPU": ("device_gib", "GiB"), "process": ("host_gib", "GiB"),
        "SM clock": ("sm_clock_avg_mhz", "MHz"), "temperature": ("temperature_peak_c", "°C"),
    }  # fmt: skip
    parts = row.shown("parts", [])
    shown = {title: of for title, of in columns.items() if any(part[of[0]] is not None for part in parts)}
    seconds, units = row.setting("soak_s", 0) / PARTS, {title: unit for title, (_, unit) in shown.items() if unit}
    lines = ({title: part[name] for title, (name, _) in shown.items()} for part in parts)
    return listed(({"until (s)": f"{(i + 1) * seconds:g}", **line} for i, line in enumerate(lines)), "until (s)", units)
