"""What notebooks show, one line each: captions, units, alternative texts and what is missing come from the rows.

    show.frontier(rows)
    show.grid(s, subject, baseline, candidates, rows)
    show.table(rows, columns)

Each displays one figure, table, grid or callout. What wasn't measured has no bar or point, and
the caption names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image

from fluxnb import families, findings
from fluxnb.errors import UserError
from fluxnb.families import Family
from fluxnb.findings.table import Column
from fluxnb.findings.table import table as made
from fluxnb.measure import telemetry
from fluxnb.models import pipelines
from fluxnb.report import charts, html
from fluxnb.report.captions import about, conditions, left_out, number, sentences, valued, with_unit
from fluxnb.report.decisions import fired, fit, polynomial, spread, steps  # noqa: F401  notebooks take them from here
from fluxnb.report.series import lines
from fluxnb.study.row import Row
from fluxnb.technique import Unavailable

STAGES = {"text encoding": "text_s", "denoising": "denoise_s", "VAE decoding": "vae_s"}
QUARTILES = "Whiskers: from the 25th to the 90th percentile of its samples."
ENDS = {"latency_p50": ("latency_p25", "latency_p90"), "speedup": ("speedup_ci_low", "speedup_ci_high")}  # of whiskers
INTERVALS = "Whiskers: 95 % interval of the speedup."


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


def not_measured(subjects: list, what: str = "") -> bool:
    """Whether there is no subject of full size; then it says that nothing was measured at it, or what wasn't."""
    if not subjects:
        said = f"{what or 'FLUX at its full size'} was not measured here: this configuration has no model of full size"
        say(f"{said} (`study.models`).", "not-measured")
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
    frame(data, sentences(title, about(rows), note, data.attrs.get("note", "")))


def frame(data, caption: str, **options) -> None:
    """A data frame that isn't one of rows; units and formats are its attrs."""
    html.table(data, caption, **{"formats": data.attrs.get("formats"), **options})


# --- charts of rows ---------------------------------------------------------------------------------------


def frontier(
    rows: list[Row],
    x: str = "speedup",
    quality: str = "psnr_db",
    marks: tuple[Family, ...] | None = None,
    note: str = "",
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
    edge = "Points at the top edge: all images identical to the baseline's."
    text = sentences(
        f"{title}, by {across[0].lower()}{across[1:]}: higher is nearer to the baseline, {better}",
        about(shown),
        f"At the points: {', '.join(f'{name} ({of})' for name, of in dials.items())}" if dials else "",
        INTERVALS if x == "speedup" else "",
        edge if quality == "psnr_db" and any(map(charts.identical, shown)) else "",
        left_out(rows, shown),
        note,
    )
    named = []
    for (family, words), line in lines(shown).items():
        points = (f"{r.label} {valued(r, x)}, {valued(r, quality)}" for r in line)
        named.append(f"{', '.join(filter(None, [family.name, words]))}: {'; '.join(points)}.")
    html.figure(charts.frontier(shown, quality, x, marks), " ".join([f"{across} and {title}.", *named]), text)


def bars(rows: list[Row], column: str | Column = "latency_p50", note: str = "") -> None:
    """A bar for each row, in its family's colour."""
    (column,), title = _columns([column])
    shown, (values,) = _known(rows, [column], all)
    if not shown:
        _nothing(rows)
        return
    ends = [[getattr(r, end) for r in shown] for end in ENDS.get(str(column.value), ())]
    errors = None
    if ends and not any(None in of for of in ends):
        pairs = zip(ends, (-1, 1), strict=True)
        errors = [[max(0, sign * (e - v)) for e, v in zip(of, values, strict=True)] for of, sign in pairs]
    said = "" if errors is None else INTERVALS if column.value == "speedup" else QUARTILES
    figure = charts.bars([r.label for r in shown], values, title, [families.named(r.family) for r in shown], errors)
    html.figure(
        figure,
        _alt(title, shown, [column], [values]),
        sentences(title[:1].upper() + title[1:], about(shown), said, left_out(rows, shown), note),
    )


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
        f"{r.label} {valued(r, 'latency_p50')}, {valued(r, 'memory_peak_gib')}"
        + ("" if db is None else f", {with_unit(db, 'psnr_db')}")
        for r, db in phases
    )
    figure = charts.waterfall(
        [r.stack or r.label for r in shown],
        [r.latency_p50 for r in shown],
        [r.memory_peak_gib for r in shown],
        decibels,
    )
    caption = sentences(
        "Each phase has all that the one before it has; below its seconds stands its gain over that one",
        about(shown),
        f"PSNR is of trained weights: {about(judged)}" if judged else "",
        "A phase without a point changes no arithmetic, or wasn't judged",
        left_out(rows, shown),
        note,
    )
    html.figure(figure, f"Seconds, peak memory and PSNR after each phase: {alt}.", caption)


# --- images ------------------------------------------------------------------------------------


def grid(
    s, subject, baseline, candidates: list, rows: list[Row] | None = None, *, prompts: int | None = None,
    width: int | None = None, by: str = "prompt", difference: bool = False,
) -> None:  # fmt: skip
    """Images of the baseline and of candidates, prompt by prompt, PSNR and adherence under each.

    Args:
        s: the study that made or kept them.
        rows: of the candidates; their speedups go into the heads.
        prompts: so many of the subject's, with its first seed; all by default.
        width: of an image in CSS pixels.
        by: "prompt", a line for each prompt, or "setting", a line for each setting.
        difference: beside each candidate's image four times its difference from the baseline's.
    """
    shown, measured = list(subject.prompts)[:prompts], {r.label: r for r in rows or []}
    try:
        reference = s.images(subject, baseline)
        columns = [*_started(subject, shown), ("baseline", [(image, "") for image in reference[: len(shown)]])]
        for head, candidate in zip(_heads(candidates, rows), candidates, strict=True):
            images = _column(s, subject, candidate, measured.get(candidate.meaning["label"]))
            if isinstance(images, str):
                columns.append((head, [images] * len(shown)))
                continue
            columns.append((head, _judged(subject, reference, images, shown)))
            if difference:
                pairs = zip(reference, images, shown, strict=False)
                columns.append((f"{head}: difference × 4", [(_apart(a, b), "") for a, b, _ in pairs]))
    except UserError as error:
        if not telemetry.replayed():
            raise
        say(f"Images of `{subject.model.name}` are not here: {error}", "not-measured")
        return
    caption = sentences(
        conditions(subject, baseline),
        "Under each image: PSNR against the baseline's"
        + (", and the share of the prompt's facts that are there" if subject.checked else ""),
        "In the heads: speedup over the baseline" if rows else "",
    )
    setting, heads = _dial(candidates) or "setting", [head for head, _ in columns]
    turned = [cells for _, cells in columns]
    if by == "prompt":
        by_prompt = [list(line) for line in zip(*turned, strict=True)]
        html.image_grid(shown, heads, by_prompt, caption=caption, corner=f"prompt \\ {setting}", width=width)
    else:
        html.image_grid(heads, shown, turned, caption=caption, corner=f"{setting} \\ prompt", width=width)


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


def _family(candidate) -> Family:
    return families.named(candidate.meaning["family"])


def _dial(candidates: list) -> str | None:
    """The dial that tells candidates of one family from each other; None where something else does, or one is alone."""
    marks = {c.meaning["mark"] for c in candidates}
    one = len({_family(c) for c in candidates}) == 1 and len(marks) == len(candidates) > 1
    return _family(candidates[0]).dial if one else None


def _heads(candidates: list, rows: list[Row] | None) -> list[str]:
    """What stands over each setting's images: its place on the dial where that tells them apart, and its speedup."""
    name, fast = "mark" if _dial(candidates) else "label", {r.label: r.speedup for r in rows or []}
    speeds = (fast.get(c.meaning["label"]) for c in candidates)
    return [c.meaning[name] + (f" ({x:.2f}×)" if x else "") for c, x in zip(candidates, speeds, strict=True)]


def _column(s, subject, candidate, row: Row | None) -> list | str:
    """A candidate's images, or why there are none."""
    if row is not None and not row.ok:
        return f"{row.status}: {row.reason or 'no reason was noted'}"
    try:
        return s.images(subject, candidate)
    except Unavailable as reason:
        return f"unavailable: {reason}"


def _started(subject, prompts: list[str]) -> list[tuple[str, list]]:
    """What a use case starts from, as (name, its cell for each prompt)."""
    takes = {
        "input": (pipelines.takes_image(subject.use_case), lambda m: m.image),
        "mask": ("inpainting" in subject.use_case, lambda m: m.mask.convert("RGB")),
        subject.kind: (pipelines.takes_condition(subject.use_case), lambda m: m.condition(subject.kind)),
    }
    if subject.use_case == "txt2img":
        return []
    given = [subject.material(prompt, subject.inputs[0][1]) for prompt in prompts]
    return [(name, [(picture(m), "") for m in given]) for name, (taken, picture) in takes.items() if taken]


def _judged(subject, reference: list, images: list, prompts: list[str]) -> list[tuple]:
    named = [prompt if subject.checked else None for prompt in prompts]
    pairs = zip(reference, images, named, strict=False)  # the first seed's come first
    return [(image, findings.under_image(plain, image, prompt)) for plain, image, prompt in pairs]


def _apart(a, b):
    """Four times the absolute difference of two images, so that it can be seen."""
    apart = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
    return Image.fromarray(np.clip(4 * apart, 0, 255).astype(np.uint8))


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
