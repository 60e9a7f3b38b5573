"""The words below figures and in their alternative texts, made from the rows: nothing in them is typed by hand."""

from __future__ import annotations

from fluxnb import families
from fluxnb.findings.caches import LEVELS
from fluxnb.report import charts
from fluxnb.report.html import three_figures
from fluxnb.study.row import Row


def about(rows: list[Row]) -> str:
    """The conditions of rows, as a caption says them: model, weights, size, steps, samples, images and sessions."""
    models = dict.fromkeys((r.model, r.weights, r.width, r.height) for r in rows if r.model)
    named = ", ".join(f"`{m}` ({weights} weights)" + (f" at {w}×{h}" if w else "") for m, weights, w, h in models)
    asked = [r.steps for r in rows if r.family == families.BASELINE.name] or [r.steps for r in rows]
    return ", ".join(filter(None, [named, _range(asked, "steps"), taken(rows)]))


def taken(rows: list[Row]) -> str:
    """How many samples, judged images and sessions rows are of."""
    sessions = {r.session for r in rows}
    unknown = "some from before sessions were noted" if len(sessions) > 1 else "from before sessions were noted"
    said = [
        _range([r.n for r in rows], "samples each"),
        _judged(rows),
        unknown if None in sessions else f"{len(sessions)} session{'s' * (len(sessions) != 1)}",
    ]
    return ", ".join(filter(None, said))


def conditions(subject, candidate) -> str:
    """What the images of one candidate are of, as a caption says it."""
    model, size = subject.model, f"{subject.width}×{subject.height}"
    use_case = "" if subject.use_case == "txt2img" else f", {subject.use_case}"
    what = f"`{model.name}` ({model.weights} weights){use_case}"
    return f"{what} at {size}, {candidate.steps} steps, seed {subject.inputs[0][1]}"


def left_out(rows: list[Row], shown: list[Row]) -> str:
    """The rows that have no place in a chart, and why."""
    drawn = {id(r) for r in shown}
    missing = [f"{r.label} ({'no such value' if r.ok else r.status})" for r in rows if id(r) not in drawn]
    return f"Without {', '.join(missing)}" if missing else ""


def masks(decisions: list[tuple[str, dict]]) -> str:
    """The steps that were computed, of each (label, trace)."""
    return "; ".join(f"{label}, steps {trace['mask']}" for label, trace in decisions) + " (1 computed, 0 reused)"


def valued(row: Row, column: str) -> str:
    """A column's value with its unit, as an alternative text says it."""
    if column in ("psnr_db", charts.WORST) and charts.identical(row):
        return "identical"
    if column == charts.WORST:
        return f"worst {with_unit(row.psnr_min_db, column)}, mean {with_unit(row.psnr_db, column)}"
    return with_unit(getattr(row, column), column)


def floors() -> str:
    """What a chart of worst images shows besides them."""
    said = ", ".join(f"{floor:g} dB for {level}" for level, floor in LEVELS.items())
    return f"Points: the worst of the judged images; dashes above them: the mean. Dotted: the floors, {said}"


def with_unit(value: float | None, column: str) -> str:
    """A value of a row's column, and its unit."""
    return f"{number(value)} {charts.AXES[column][1]}".strip()


def number(value: float | None) -> str:
    """Three significant figures, an en dash for nothing."""
    return "–" if value is None else three_figures(value)


def _judged(rows: list[Row]) -> str:
    judged = [r.images for r in rows if r.ssim is not None]
    return (_range(judged, "images judged") or "how many images were judged isn't noted") if judged else ""


def _range(values: list, what: str) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    if high == 1:
        first, *others = what.split()
        what = " ".join([first.removesuffix("s"), *others])
    return f"{low} {what}" if low == high else f"{low} to {high} {what}"


def sentences(*parts: str) -> str:
    """Sentences one after the other, each with its full stop; empty ones are left out."""
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part)
