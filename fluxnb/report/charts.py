"""The figures. One colour per family of techniques everywhere, units in axis titles, bars from zero."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from fluxnb.families import BASELINE, PUBLISHED, Family
from fluxnb.findings.caches import LEVELS
from fluxnb.findings.rows import ends
from fluxnb.installed import need
from fluxnb.report import labels as words_at
from fluxnb.report.series import OTHERS, lines
from fluxnb.study.row import Row

sns = need("seaborn", "A chart")
matplotlib = need("matplotlib", "A chart")
matplotlib.use("agg")
plt = matplotlib.pyplot
PICTURE = "reports/analysis/charts/frontier.svg"  # the README's
WORST = "psnr_min_db"  # what floors are asked of, so what a frontier shows
_PALETTE = sns.color_palette("colorblind").as_hex()
AXES = {  # column -> what it says at an axis, and the unit of a value
    "speedup": ("Speedup over the baseline (wall clock, times)", "times"),
    "computed_steps": ("Computed steps", "steps"),
    "psnr_db": ("Mean PSNR against the baseline's images (dB)", "dB"),
    WORST: ("PSNR of the worst image (dB)", "dB"),
    "ssim": ("SSIM", ""),
    "adherence": ("Prompt adherence", ""),
    "agreement": ("Agreement with the condition", ""),
    "latency_p50": ("Seconds per image (median)", "s"),
    "text_s": ("Seconds of the text encoders (median)", "s"),
    "vae_s": ("Seconds of the VAE (median)", "s"),
    "denoise_s": ("Seconds of denoising (median)", "s"),
    "first_s": ("Seconds until the first image", "s"),
    "load_s": ("Seconds until it is loaded", "s"),
    "images_per_s": ("Images per second", "images/s"),
    "memory_load_gib": ("GiB of the weights", "GiB"),
    "memory_peak_gib": ("GiB at the peak", "GiB"),
}


def style() -> None:
    """The look of every chart."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "figure.figsize": (7.2, 4.2),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
        },
    )


def identical(row: Row) -> bool:
    """Whether every judged image of a row is its baseline's: its PSNR is infinite and has no place on a scale."""
    return row.psnr_db is None and bool(row.psnr_identical)


def on_frontier(rows: list[Row], x: str = "speedup", quality: str = WORST) -> list[Row]:
    """The rows that have both: what wasn't timed or judged has no place between speed and quality."""
    judged = (r for r in rows if getattr(r, quality) is not None or (quality in ("psnr_db", WORST) and identical(r)))
    return [r for r in judged if r.ok and r.weights != "random" and getattr(r, x) is not None]


def frontier(rows: list[Row], quality: str = WORST, x: str = "speedup", marks: tuple[Family, ...] | None = None):
    """Speed against quality, a line along each family's dial; rows that `on_frontier` leaves out aren't drawn.

    The worst image's PSNR has the mean above it, and the floors that settings have to keep.

    Args:
        rows: those identical to the baseline are drawn at the top edge.
        quality: psnr_min_db, psnr_db, ssim or adherence.
        x: speedup or computed_steps.
        marks: families whose points are labelled; None for all.
    """
    style()
    figure, axes = plt.subplots(figsize=(8.4, 5.0))
    shown = on_frontier(rows, x, quality)
    drawn = (quality, "psnr_db") if quality == WORST else (quality,)
    finite = [value for r in shown for name in drawn if (value := getattr(r, name)) is not None]
    top = max(finite) + (0.06 * (max(finite) - min(finite)) or 1) if finite else 1
    words: list[tuple] = []
    names: list[tuple] = []
    points: list[tuple] = []
    for (family, more), line in _drawn(shown).items():
        xs = [getattr(r, x) for r in line]
        ys = [top if getattr(r, quality) is None else getattr(r, quality) for r in line]
        joined = family.dial is not None and more != OTHERS
        look: dict[str, Any] = {"color": family.colour, "mfc": family.colour if not more else "white", "lw": 1.5}
        look |= {"ls": (":" if more else "--" if family.control else "-") if joined else "none"}
        errors: dict[str, Any] = {"xerr": _interval(line)} if x == "speedup" else {}
        name = f"{family.name}, twice" if family is BASELINE else ", ".join(filter(None, [family.name, more]))
        size = 13 if family is BASELINE else 6
        axes.errorbar(xs, ys, marker=family.marker, ms=size, capsize=2, label=name, **look, **errors)
        for a, b, row in zip(xs, ys, line, strict=True) if quality == WORST else ():
            if row.psnr_db is not None:
                axes.vlines(a, b, row.psnr_db, color=family.colour, lw=0.8, alpha=0.45)
                axes.scatter(a, row.psnr_db, marker="_", s=45, color=family.colour, alpha=0.8, gid="mean")
        points += zip(xs, ys, strict=True)
        words_at.tell(axes, xs, ys, [_said(r, x, quality) for r in line])
        if family is BASELINE or (marks is not None and family not in marks):
            continue
        look = {"fontsize": 8, "color": words_at.ink(family.colour)}
        words += [
            (r.mark, [p], look | {"gid": r.id}) for p, r in zip(zip(xs, ys, strict=True), line, strict=True) if r.mark
        ]
        names.append((name, list(zip(xs, ys, strict=True))[::-1], look | {"weight": "bold"}))
    floors = []
    for level, floor in LEVELS.items() if quality == WORST else ():
        axes.axhline(floor, color="#767676", lw=1, ls=":", gid="floor")
        floors.append(
            axes.text(
                0.005, floor, f"{level}: {floor:g} dB", transform=axes.get_yaxis_transform(), ha="left", va="bottom",
                fontsize=8, color="#595959",
            )
        )  # fmt: skip
    if x == "speedup":
        axes.axvline(1, color="#bbbbbb", lw=1, zorder=0)
        axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))
    axes.set(xlabel=AXES[x][0], ylabel=AXES[quality][0])
    _legend_below(axes)
    words_at.write(axes, [*words, *names], floors, points)
    return figure


def _said(row: Row, x: str, quality: str) -> str:
    """What a point of a frontier says of its row."""
    seen = {x: getattr(row, x), quality: getattr(row, quality)} | ({"psnr_db": row.psnr_db} if quality == WORST else {})
    figures = (
        f"{AXES[name][0].split(' (')[0]} {v:.3g} {AXES[name][1]}".strip() for name, v in seen.items() if v is not None
    )
    return "; ".join(
        [row.label or row.id, *figures, *(["images identical"] if identical(row) else []), f"row {row.id}"]
    )


def _legend_below(axes) -> None:
    """The names of the lines, beneath the chart: there nothing is drawn that they could cover."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, ncols=3, fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.08, -0.13))


def equal_steps(panels: dict[str, dict[str, list[tuple]]], dashed: list[str]):
    """A panel for each figure, quality over computed steps, with a line and whiskers for each method.

    Args:
        panels: title -> method -> (computed steps, value, low, high) in the order of the steps.
        dashed: methods that are controls.
    """
    style()
    figure, all_axes = plt.subplots(2, -(-len(panels) // 2), figsize=(10.4, 7.4), sharex=True, squeeze=False)
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    for axes, (title, methods) in zip(all_axes.T.flat, panels.items(), strict=True):
        for name, line in methods.items():
            i = names.index(name)
            xs = [point[0] + 0.05 * (i - len(names) / 2) for point in line]  # or whiskers hide whiskers
            ys = [point[1] for point in line]
            below = [max(0, y - low) for _, y, low, _ in line]
            above = [max(0, high - y) for _, y, _, high in line]
            look = {"ls": "--", "color": "#8c8c8c"} if name in dashed else {"ls": "-", "color": _PALETTE[i % 10]}
            marker = "osv^DPXph*"[i % 10]
            axes.errorbar(xs, ys, [below, above], marker=marker, ms=5, lw=1.3, capsize=2, label=name, **look)
            said = (f"{name}, {x} steps: {y:.3g} [{low:.3g}, {high:.3g}]; {title}" for x, y, low, high in line)
            words_at.tell(axes, xs, ys, said)
        axes.set(ylabel=title)
    for axes in all_axes[-1]:
        axes.set(xlabel=AXES["computed_steps"][0])
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 0.76, 1))
    figure.legend(handles, labels, frameon=False, loc="center right", fontsize=9)
    return figure


def _drawn(rows: list[Row]) -> dict[tuple[Family, str], list[Row]]:
    """The lines of the rows, with single settings that no line is drawn through put together."""
    found: dict[tuple[Family, str], list[Row]] = {}
    for (family, words), line in lines(rows).items():
        found.setdefault((family, OTHERS if words and len(line) == 1 else words), []).extend(line)
    return found


def _interval(rows: list[Row]) -> list[list[float]]:
    found = [ends(r) or (r.speedup, r.speedup) for r in rows]
    low = [max(0, r.speedup - below) for r, (below, _) in zip(rows, found, strict=True)]
    return [low, [max(0, above - r.speedup) for r, (_, above) in zip(rows, found, strict=True)]]


def shares(ours: dict[float, float], theirs: dict[float, float], ours_label: str, theirs_label: str, family: Family):
    """Threshold against the share of work left, 0 to 1, ours in its family's colour beside a published curve."""
    style()
    figure, axes = plt.subplots()
    for curve, label, kind, side in ((ours, ours_label, family, 8), (theirs, theirs_label, PUBLISHED, -14)):
        places = range(len(curve))
        axes.plot(places, [100 * y for y in curve.values()], kind.marker + "-", color=kind.colour, label=label)
        heights = [100 * y for y in curve.values()]
        words_at.tell(axes, places, heights, [f"{label}, threshold {t:g}: {100 * y:.0f} %" for t, y in curve.items()])
        for x, y in zip(places, curve.values(), strict=True):
            axes.annotate(
                f"{100 * y:.0f}",
                (x, 100 * y),
                textcoords="offset points",
                xytext=(0, side),
                ha="center",
                fontsize=8,
            )
    axes.set_xticks(range(len(theirs)), [f"{t:g}" for t in theirs])
    axes.set(xlabel="Threshold", ylabel="Share of the uncached run (%)", ylim=(0, 112))
    axes.legend(frameon=False)
    return figure


def trace(decisions: list[tuple[str, dict]], family: Family):
    """What a gate of the family saw at each step; `decisions` is (label, trace) as in fluxnb.study.Study.traces."""
    style()
    figure, all_axes = plt.subplots(
        len(decisions), 1, figsize=(8.4, 1.9 * len(decisions) + 0.6), sharex=True, squeeze=False
    )
    colour = family.colour
    for axes, (label, trace) in zip(all_axes[:, 0], decisions, strict=True):
        for i, (seen, computed) in enumerate(zip(trace["indicator"], trace["mask"], strict=True)):
            if seen is None:
                axes.plot(i, 0, "o", color=colour)
                continue
            axes.vlines(i, 0, seen, color=colour, lw=1, alpha=0.6)
            axes.plot(i, seen, "o", color=colour, mfc=colour if computed == "1" else "white", ms=5)
        if trace["threshold"]:
            axes.axhline(trace["threshold"], color=_PALETTE[3], lw=1, ls="--")
        axes.set(
            ylabel="Change",
            title=f"{label}: {trace['mask'].count('1')} of {len(trace['mask'])} steps computed",
        )
        axes.set_ylim(bottom=0)
    all_axes[-1, 0].set_xlabel("Denoising step (filled: computed, hollow: reused; dashed line: threshold)")
    figure.tight_layout()
    return figure


def bars(labels: list[str], values: list[float], unit: str, families: list[Family] | None = None, errors=None):
    """Horizontal bars from zero, the value written at each end; `families` choose the colours.

    Args:
        errors: (below, above) of each value, drawn as whiskers.
    """
    style()
    figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(labels) + 1.2))
    colours = [family.colour for family in families] if families else _PALETTE[0]
    axes.barh(range(len(labels)), values, color=colours, xerr=errors, error_kw={"lw": 1, "capsize": 2})
    for i, value in enumerate(values):
        end = value + (errors[1][i] if errors else 0)
        axes.annotate(f" {value:.3g}", (end, i), va="center", fontsize=9)
    _horizontal(axes, labels, unit, max(v + (errors[1][i] if errors else 0) for i, v in enumerate(values)))
    return figure


def stacked(labels: list[str], parts: dict[str, list[float]], unit: str):
    """Horizontal stacked bars: each part of a whole, in order."""
    style()
    figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(labels) + 1.6))
    left = [0.0] * len(labels)
    for i, (name, values) in enumerate(parts.items()):
        axes.barh(range(len(labels)), values, left=left, color=_PALETTE[(0, 2, 1, 4)[i % 4]], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for i, total in enumerate(left):
        axes.annotate(f" {total:.3g}", (total, i), va="center", fontsize=9)
    _horizontal(axes, labels, unit, max(left), parts)
    return figure


def grouped(labels: list[str], parts: dict[str, list[float | None]], unit: str):
    """Horizontal bars from zero, several for each label, the value written at each end; None has no bar."""
    style()
    figure, axes = plt.subplots(figsize=(7.6, 0.3 * len(labels) * len(parts) + 1.4))
    height = 0.8 / len(parts)
    for i, (name, values) in enumerate(parts.items()):
        known = [(y + (i - (len(parts) - 1) / 2) * height, v) for y, v in enumerate(values) if v is not None]
        places, lengths = zip(*known, strict=True) if known else ((), ())
        axes.barh(places, lengths, height=height, color=_PALETTE[(0, 1, 2, 4)[i % 4]], label=name)
        for y, value in known:
            axes.annotate(f" {value:.3g}", (value, y), va="center", fontsize=8)
    _horizontal(axes, labels, unit, max(v or 0 for values in parts.values() for v in values), parts)
    return figure


def _horizontal(axes, labels: list[str], unit: str, most: float, parts: dict | None = None) -> None:
    """Names beside the bars, from the top; room for the values; a legend above where bars have parts."""
    axes.set_yticks(range(len(labels)), labels)  # by place: two rows of one label are two bars
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.15 * most or 1))
    axes.grid(axis="y", visible=False)
    if parts:
        axes.legend(frameon=False, ncols=len(parts), loc="lower right", bbox_to_anchor=(1, 1))


def waterfall(
    phases: list[str], seconds: list[float], gains: list[str], gib: list[float | None], psnr: list[float | None]
):
    """Time with each phase's gain in words, memory and quality, over the same x axis; None has no bar or point."""
    style()
    figure, (time, memory, quality) = plt.subplots(3, 1, figsize=(max(8.4, 0.68 * len(phases)), 8.2), sharex=True)
    for i, value in enumerate(seconds):
        before = seconds[i - 1] if i else value
        time.bar(i, value, color=_PALETTE[0], width=0.6)
        if i:
            time.plot([i - 1, i], [before, before], color="#888888", lw=0.8, ls=":")
        time.annotate(f"{value:.2f}\n{gains[i]}".strip(), (i, value), ha="center", va="bottom", fontsize=8)
    time.set(ylabel="Seconds per image", ylim=(0, 1.25 * max(seconds)))
    known = [(i, value) for i, value in enumerate(gib) if value is not None]
    for i, value in known:
        memory.bar(i, value, color=_PALETTE[1], width=0.6)
        memory.annotate(f"{value:.1f}", (i, value), ha="center", va="bottom", fontsize=8)
    memory.set(ylabel="Peak memory (GiB)", ylim=(0, 1.18 * max((v for _, v in known), default=1)))
    known = [(i, value) for i, value in enumerate(psnr) if value is not None]
    quality.plot([i for i, _ in known], [v for _, v in known], "o", color=_PALETTE[2])
    for i, value in known:
        quality.annotate(f"{value:.1f}", (i, value), ha="center", xytext=(0, 6), textcoords="offset points", fontsize=8)
    quality.set(ylabel="PSNR, trained (dB)", xlim=(-0.6, len(phases) - 0.4))
    quality.set_ylim(bottom=0, top=1.25 * max((v for _, v in known), default=1))
    names = [textwrap.fill(phase, 34) for phase in phases]  # a long name would leave the bars no height
    quality.set_xticks(range(len(phases)), names, rotation=30, ha="right", rotation_mode="anchor")
    figure.tight_layout()
    return figure


def scaling(frame):
    """Speedup over one GPU against the number of GPUs, a line for each series, and the line where nothing is lost.

    Args:
        frame: kind (of GPU), GPUs, series, speedup, low, high.
    """
    style()
    figure, axes = plt.subplots()
    most = int(frame["GPUs"].max())
    axes.plot([1, most], [1, most], "--", color="#8c8c8c", lw=1, label="nothing lost")
    several, said = frame["kind"].nunique() > 1, []
    for i, ((kind, series), part) in enumerate(frame.groupby(["kind", "series"], sort=False)):
        line = part.sort_values("GPUs")
        xs, ys = [1, *line["GPUs"]], [1.0, *line["speedup"]]
        low, high = (line[end].astype(float).fillna(line["speedup"]) for end in ("low", "high"))
        errors = [[0.0, *(line["speedup"] - low).clip(0)], [0.0, *(high - line["speedup"]).clip(0)]]
        label = f"{kind}: {series}" if several else series
        axes.errorbar(xs, ys, errors, fmt="o-", color=_PALETTE[i % 8], ms=6, lw=1.5, capsize=2, label=label)
        words_at.tell(axes, xs, ys, [f"{label}, {x} GPUs: {y:.2f}×" for x, y in zip(xs, ys, strict=True)])
        said.append((f"{ys[-1]:.2f}×", [(xs[-1], ys[-1])], {"fontsize": 8, "color": words_at.ink(_PALETTE[i % 8])}))
    axes.set(xlabel="GPUs that share an image", ylabel="Speedup over one of them (wall clock, times)")
    axes.set_xticks(sorted({1, *frame["GPUs"]}))
    axes.set_ylim(bottom=0)
    _legend_below(axes)
    words_at.write(axes, said)
    return figure


def curves(frame, panels: list[str], x: str = "step", y: str = "loss", by: str = "stage"):
    """One small panel for each stage of a training run, logarithmic loss."""
    style()
    figure, (all_axes,) = plt.subplots(1, len(panels), squeeze=False, figsize=(3.1 * len(panels), 2.9))
    for axes, panel in zip(all_axes, panels, strict=True):
        part = frame[frame[by] == panel]
        axes.plot(part[x], part[y], color=_PALETTE[0], lw=1.2)
        axes.set(title=panel, xlabel=x, ylabel=y if axes is all_axes[0] else "")
        if (part[y] > 0).all() and len(part) and math.log10(part[y].max() / part[y].min()) > 0.5:
            axes.set_yscale("log")
    figure.tight_layout()
    return figure


def polynomial(x, y, lines: dict):
    """Points (change of input, change of output) and polynomials through them, name -> (xs, ys)."""
    style()
    figure, axes = plt.subplots()
    axes.plot(x, y, ".", color=_PALETTE[7], ms=4, label="steps")
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        axes.plot(xs, ys, color=_PALETTE[(0, 3)[i % 2]], label=name)
    axes.set(xlabel="Change of the modulated input (relative)", ylabel="Change of the output (relative)")
    axes.set_ylim(0, 1.25 * max(y))
    axes.legend(frameon=False)
    return figure


def fired(decisions: list[tuple[str, dict]]):
    """For each rule and step: computed, reused at the input, or reused after the first block."""
    style()
    figure, axes = plt.subplots(figsize=(8.4, 0.6 * len(decisions) + 1.3))
    looks = {
        None: (_PALETTE[7], "computed"),
        "input": (_PALETTE[1], "reused, no block"),
        "residual": (_PALETTE[0], "reused, one block"),
    }
    for row, (_, trace) in enumerate(decisions):
        for step, point in enumerate(trace["reused_at"]):
            axes.barh(row, 0.9, left=step - 0.45, color=looks[point][0], height=0.7)
    axes.set_yticks(range(len(decisions)), [rule for rule, _ in decisions])
    axes.invert_yaxis()
    axes.set(xlabel="Denoising step")
    axes.grid(visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in looks.values()]
    axes.legend(
        handles, [name for _, name in looks.values()], frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1)
    )
    return figure
