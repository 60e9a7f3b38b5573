"""What notebooks show, one line each: captions, units, alternative texts and what is missing come from the rows.

    show.frontier(rows)
    show.grid(s, subject, baseline, candidates, rows)
    show.table(rows, columns)

Each displays one figure, table, grid or callout. What wasn't measured has no bar or point, and
the caption names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fluxnb import families, findings
from fluxnb.errors import UserError
from fluxnb.families import Family
from fluxnb.findings.rows import is_baseline
from fluxnb.findings.table import Column
from fluxnb.findings.table import table as made
from fluxnb.measure import telemetry
from fluxnb.report import charts, html
from fluxnb.report.captions import about, floors, left_out, number, sentences, valued, with_unit
from fluxnb.report.decisions import fired, fit, polynomial, spread, steps  # noqa: F401  notebooks take them from here
from fluxnb.report.grids import both, grid  # noqa: F401
from fluxnb.report.series import lines
from fluxnb.study.row import Row

STAGES = {"text encoding": "text_s", "denoising": "denoise_s", "VAE decoding": "vae_s"}
SAMPLES = "from the fastest to the slowest of its samples"


def say(sentence: str, kind: str = "result") -> None:
    """A sentence set apart: "result", "note", "not-measured" or "warning"."""
    html.callout(sentence, kind)


@contextmanager
def if_kept(what: str) -> Iterator[None]:
    """In a replay, says that what is shown inside isn't here if it needs rows or images that weren't kept."""
    try:
        yield
    except UserError as error:
        if not telemetry.replayed():
            raise
        say(f"{what}: not here. {error}", "not-measured")


def not_measured(subjects: list, what: str = "", why: str = "") -> bool:
    """Whether there is no subject of full size; then it says what wasn't measured at it, and why."""
    if not subjects:
        because = why or "this configuration measures none (`study.models`; weights of yours: `study.full_size.own`)"
        say(f"{what or 'FLUX at its full size'} was not measured here: {because}.", "not-measured")
    return not subjects


# --- tables -----------------------------------------------------------------------------------------------


def table(rows: list[Row], columns: tuple[Column, ...], note: str = "", title: str = "", index="setting") -> None:
    """A line for each row, in columns such as `fluxnb.findings.table.CACHE`; says which conditions the rows share."""
    if not rows:
        say(f"{title or 'What this table shows'} was not measured here.", "not-measured")
        return
    if len(reasons := {r.reason for r in rows}) == 1 and not any(r.ok for r in rows):  # the same in every line
        say(f"{title or f'{len(rows)} settings'}: {reasons.pop()}.", "not-measured")
        return
    data = made(rows, columns, index)
    frame(data, sentences(title, about(rows), note))


def frame(data, caption: str, **options) -> None:
    """A data frame; units, formats and what is to be noted below it are its attrs."""
    caption = sentences(caption, data.attrs.get("note", ""))
    html.table(data, caption, **{"formats": data.attrs.get("formats"), **options})


# --- charts of rows ---------------------------------------------------------------------------------------


def frontier(
    rows: list[Row],
    x: str = "speedup",
    quality: str = charts.WORST,
    marks: tuple[Family, ...] | None = None,
) -> None:
    """Speed against quality, with the baseline's row among them; `marks`: families whose points are labelled."""
    shown = charts.on_frontier(rows, x, quality)
    if not shown:
        say("No setting was both timed and judged here: quality needs trained weights.", "not-measured")
        return
    title, across = (charts.AXES[name][0].split(" (")[0] for name in (quality, x))
    marked = [f for f, _ in lines(shown) if f.dial and (marks is None or f in marks)]
    dials = {f.dial: ", ".join(dict.fromkeys(g.name for g in marked if g.dial == f.dial)) for f in marked}
    better = "further left is less work" if x == "computed_steps" else "further right is faster"
    edge = "Points at the top edge: all images identical to the baseline's"
    text = sentences(
        f"{title}, by {across[0].lower()}{across[1:]}: higher is nearer to the baseline, {better}",
        about(shown),
        f"At the points: {', '.join(f'{name} ({of})' for name, of in dials.items())}" if dials else "",
        f"Whiskers: {said}" if x == "speedup" and (said := findings.whiskers(shown)) else "",
        floors() if quality == charts.WORST else "",
        edge if quality in ("psnr_db", charts.WORST) and any(map(charts.identical, shown)) else "",
        left_out(rows, shown),
    )
    named = []
    for (family, words), line in lines(shown).items():
        points = (f"{r.label} {valued(r, x)}, {valued(r, quality)}" for r in line)
        named.append(f"{', '.join(filter(None, [family.name, words]))}: {'; '.join(points)}.")
    html.figure(charts.frontier(shown, quality, x, marks), " ".join([f"{across} and {title}.", *named]), text)


def equal_steps(rows: list[Row], counts: Sequence[int]) -> None:
    """Mean and worst image over computed steps: controls, and of libraries, published and own methods the nearest."""
    shown = findings.drawn(rows, counts)
    if not shown:
        say("No method was judged image by image at any of these numbers of computed steps.", "not-measured")
        return
    panels: dict[str, dict[str, list[tuple]]] = {}
    for figure, (name, unit, _) in findings.PER_IMAGE.items():
        for how in ("mean", "worst"):
            panels[f"{how.capitalize()} {name}" + (f" ({unit})" if unit else "")] = {
                method: [(round(r.computed_steps), *findings.spread_of(r, figure, how == "worst")) for r in line]
                for method, line in shown.items()
            }
    first, own = next(iter(panels)), [r for line in shown.values() for r in line]
    said = "; ".join(
        f"{method}: {', '.join(f'{x} steps {number(y)} [{number(low)}, {number(high)}]' for x, y, low, high in line)}"
        for method, line in panels[first].items()
    )
    html.figure(
        charts.equal_steps(panels, [method for method, line in shown.items() if findings.is_control(line[0])]),
        f"{first} by computed steps. {said}.",
        sentences(
            "Mean and worst image by computed steps: of PSNR higher is nearer to the uncached image, of ST-LPIPS lower",
            about(own),
            "Whiskers: 95 % intervals of the mean over images, by Student's t",
            "Of libraries, of published methods and of those new here the three that are nearest are drawn, and the "
            "controls, dashed; the table has all",
        ),
    )


def bars(rows: list[Row], column: str | Column = "latency_p50", note: str = "") -> None:
    """A bar for each row, in its family's colour, the best first: the least time or memory, else the most."""
    (column,), title = _columns([column])
    shown, (values,) = _known(rows, [column], all)
    if not shown:
        _nothing(rows)
        return
    pairs = sorted(zip(values, shown, strict=True), key=lambda p: p[0], reverse=column.unit not in ("s", "ms", "GiB"))
    values, shown = [v for v, _ in pairs], [r for _, r in pairs]
    errors, said = _whiskers(shown, column.value, values)
    figure = charts.bars([r.label for r in shown], values, title, [families.named(r.family) for r in shown], errors)
    html.figure(
        figure,
        _alt(title, shown, [column], [values]),
        sentences(title[:1].upper() + title[1:], about(shown), said, left_out(rows, shown), note),
    )


def _whiskers(rows: list[Row], column, values: list[float]) -> tuple[list[list[float]] | None, str]:
    """How far whiskers go (below, above) each value, and what they are; (None, "") for what has none."""
    if column == "speedup":
        found = [findings.ends(r) or (v, v) for r, v in zip(rows, values, strict=True)]
        words = findings.whiskers(rows)
    elif column == "latency_p50" and all(r.samples for r in rows):
        found, words = [(min(r.samples), max(r.samples)) for r in rows], SAMPLES
    else:
        return None, ""
    below = [max(0, v - low) for (low, _), v in zip(found, values, strict=True)]
    above = [max(0, high - v) for (_, high), v in zip(found, values, strict=True)]
    return ([below, above], f"Whiskers: {words}") if words else (None, "")


def grouped(rows: list[Row], columns: dict[str, str] | Sequence[Column], note: str = "", axis: str = "") -> None:
    """Several bars for each row, of columns in one unit: title -> column of the row, or columns as in tables."""
    _parts(charts.grouped, rows, columns, note, axis, any)


def parts(rows: list[Row], columns: dict[str, str] | Sequence[Column], note: str = "", axis: str = "") -> None:
    """One bar for each row, made up of columns in one unit, as `grouped` takes them."""
    _parts(charts.stacked, rows, columns, note, axis, all)


def stages(rows: list[Row], note: str = "") -> None:
    """Where the time of one image goes: text encoding, denoising, VAE decoding."""
    parts(rows, STAGES, note, "Seconds per image (median of each stage)")


def _parts(chart, rows: list[Row], columns, note: str, axis: str, needs: Callable) -> None:
    columns, title = _columns(columns)
    title = axis or title
    shown, values = _known(rows, columns, needs)
    if not shown:
        _nothing(rows)
        return
    named = {c.title: of for c, of in zip(columns, values, strict=True)}
    caption = sentences(f"{title}: {', '.join(named)}", about(shown), left_out(rows, shown), note)
    html.figure(chart([r.label for r in shown], named, title), _alt(title, shown, columns, values), caption)


def waterfall(rows: list[Row], judged: list[Row], note: str = "") -> None:
    """Time and memory phase by phase, each row with all that the one before has; quality is that of `judged` rows."""
    shown = [r for r in rows if r.ok and r.latency_p50 is not None]
    if not shown:
        _nothing(rows)
        return
    decibels = findings.quality_of_phases(shown, judged)
    phases = zip(shown, decibels, strict=True)
    alt = "; ".join(
        f"{r.stack or r.label} {valued(r, 'latency_p50')}, {valued(r, 'memory_peak_gib')}"
        + ("" if db is None else f", {with_unit(db, 'psnr_db')}")
        for r, db in phases
    )
    figure = charts.waterfall(
        [r.stack or r.label for r in shown],
        [r.latency_p50 for r in shown],
        _gains(shown),
        [r.memory_peak_gib for r in shown],
        decibels,
    )
    caption = sentences(
        "Each phase has all that the one before it has; below its seconds stands its gain over that one where both are "
        "of one session, and ≈ where it is within the noise",
        about(shown),
        f"PSNR is of trained weights: {about(judged)}" if judged else "",
        "It is that of the worst image; a phase without a point makes identical images, or wasn't judged",
        left_out(rows, shown),
        note,
    )
    html.figure(figure, f"Seconds, peak memory and PSNR after each phase: {alt}.", caption)


def _gains(rows: list[Row]) -> list[str]:
    """What each row gains over the one before, "" for the first and across sessions."""
    said = [""]
    for before, row in itertools.pairwise(rows):
        own, same = [1.0 if is_baseline(r) else r.speedup for r in (before, row)], before.session == row.session
        noise = "≈ " if findings.within_noise(row, before, rows[0]) else ""
        said.append(f"{noise}{own[1] / own[0]:.2f}×" if same and None not in own else "")
    return said


# --- charts of other figures ------------------------------------------------------------------------------


def shares(
    ours: dict[float, float], theirs: dict[float, float], ours_label: str, theirs_label: str,
    family: Family = families.FIRST_BLOCK,
) -> None:  # fmt: skip
    """Threshold -> share of the uncached run that is left, ours beside a published curve."""
    said = "; ".join(f"{t:g}: ours {100 * ours[t]:.0f} %, published {100 * theirs[t]:.0f} %" for t in theirs)
    html.figure(
        charts.shares(ours, theirs, ours_label, theirs_label, family),
        f"Share of the uncached run by threshold: {said}.",
        f"{ours_label}, beside {theirs_label}.",
    )


def curves(data, panels: list[str], caption: str, **columns) -> None:
    """A panel for each stage of a training run; `columns`: x, y and by, as in charts.curves."""
    by, y = columns.get("by", "stage"), columns.get("y", "loss")
    ends = ((p, data[data[by] == p][y]) for p in panels)
    said = "; ".join(f"{p} from {number(v.iloc[0])} to {number(v.iloc[-1])}" for p, v in ends if len(v))
    html.figure(charts.curves(data, panels, **columns), f"Curves of {y}: {said}.", caption)


# --- what they are made of ---


def _columns(columns) -> tuple[list[Column], str]:
    """Columns as tables have them, and the axis' title. ValueError for several units: one axis can't show them."""
    if isinstance(columns, dict):
        columns = [Column(title, name, charts.AXES[name][1]) for title, name in columns.items()]
    found = [Column(charts.AXES[c][0], c, charts.AXES[c][1]) if isinstance(c, str) else c for c in columns]
    if len({c.unit for c in found}) != 1:
        raise ValueError(f"one axis has one unit, and {', '.join(f'{c.title} is in {c.unit}' for c in found)}")
    (first, *more), unit = found, found[0].unit
    return found, unit if more else first.title if isinstance(columns[0], str) else f"{first.title} ({unit})"


def _known(rows: list[Row], columns: list[Column], needs: Callable) -> tuple[list[Row], list[list]]:
    """The measured rows that have all (or any) of the columns, and each column's values."""
    values = zip(*(c.of(rows) for c in columns), strict=True)
    kept = [(r, v) for r, v in zip(rows, values, strict=True) if r.ok and needs(x is not None for x in v)]
    return [r for r, _ in kept], [list(of) for of in zip(*(v for _, v in kept), strict=True)] or [[] for _ in columns]


def _alt(title: str, rows: list[Row], columns: list[Column], values: list[list]) -> str:
    """Bars in words: each row's label, and each value with its unit."""
    lines = []
    for row, of in zip(rows, zip(*values, strict=True), strict=True):
        names = [f"{c.title} " if len(columns) > 1 else "" for c in columns]
        said = (f"{n}{number(v)} {c.unit}".strip() for n, v, c in zip(names, of, columns, strict=True))
        lines.append(f"{row.label}: {', '.join(said)}")
    return f"Bars. {title}. {'; '.join(lines)}."


def _nothing(rows: list[Row]) -> None:
    reasons = "; ".join(f"{r.label}: {r.reason or r.status}" for r in rows)
    say(f"None of it could be measured here. {reasons}".strip(), "not-measured")
