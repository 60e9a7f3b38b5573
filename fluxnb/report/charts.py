"""The figures. One colour per technique everywhere, units in axis titles, bars from zero."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import seaborn as sns

_PALETTE = sns.color_palette("colorblind").as_hex()
COLOURS = {
    "baseline": "#444444",
    "fewer steps": "#8c8c8c",
    "First Block Cache": _PALETTE[0],
    "TeaCache": _PALETTE[1],
    "combined cache": _PALETTE[2],
    "prescribed cache schedule": _PALETTE[4],
    "TeaCache, published polynomial": _PALETTE[8],
    "fixed interval": _PALETTE[5],
    "fewer steps, DPM-Solver++": _PALETTE[6],
    "engine": _PALETTE[9],
    "published": _PALETTE[3],
}
MARKERS = {
    "fewer steps": "s",
    "fewer steps, DPM-Solver++": "x",
    "fixed interval": "v",
    "combined cache": "P",
    "First Block Cache": "o",
    "TeaCache": "^",
    "published": "D",
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


def _colour(name: str) -> str:
    return COLOURS.get(name, _PALETTE[7])


def frontier(rows: list[dict], quality: str = "psnr_db", x: str = "speedup", annotate: tuple | None = None):
    """Speed against quality, one line for each technique, thresholds or steps written at the points.

    Args:
        rows: results rows with `label`; those identical to the baseline are drawn at the top edge.
        quality: psnr_db, ssim or adherence.
        x: speedup or computed_steps.
        annotate: techniques whose points are labelled; None for all.
    """
    style()
    figure, axes = plt.subplots(figsize=(8.4, 5.0))
    names = {"psnr_db": "PSNR against the uncached image (dB)", "ssim": "SSIM", "adherence": "Prompt adherence"}
    along = {"speedup": "Speedup over the baseline (wall clock, times)", "computed_steps": "Computed steps"}
    finite = [r[quality] for r in rows if r[quality] is not None]
    top = max(finite) + (0.06 * (max(finite) - min(finite)) or 1) if finite else 1
    for name in dict.fromkeys(r["technique"] for r in rows):
        line = sorted((r for r in rows if r["technique"] == name), key=lambda r: r[x])
        xs, ys = [r[x] for r in line], [top if r[quality] is None else r[quality] for r in line]
        colour, marker = _colour(name), MARKERS.get(name, "o")
        errors = {"xerr": _interval(line)} if x == "speedup" else {}
        if name == "baseline":
            axes.errorbar(xs, ys, fmt="*", color=colour, ms=13, label="baseline, twice", **errors)
            continue
        control = name.startswith("fewer steps")
        fmt = marker + ("--" if control else "-")
        axes.errorbar(xs, ys, fmt=fmt, color=colour, ms=6, lw=1.5, capsize=2, label=name, **errors)
        for a, b, row in zip(xs, ys, line, strict=True):
            if annotate is not None and name not in annotate:
                continue
            words = str(row["steps"]) if control else row["label"].split()[-1]
            place = (0, -13 if control else 8)
            axes.annotate(
                words, (a, b), textcoords="offset points", xytext=place, ha="center", fontsize=8, color=colour
            )
    if x == "speedup":
        axes.axvline(1, color="#bbbbbb", lw=1, zorder=0)
        axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))
    axes.set(xlabel=along[x], ylabel=names[quality])
    axes.legend(frameon=False)
    return figure


def _interval(rows: list[dict]) -> list[list[float]]:
    low = [max(0, r["speedup"] - r["speedup_ci_low"]) for r in rows]
    return [low, [max(0, r["speedup_ci_high"] - r["speedup"]) for r in rows]]


def shares(ours: dict[float, float], theirs: dict[float, float], ours_label: str, theirs_label: str):
    """Threshold against the share of work left, 0 to 1, ours beside a published curve."""
    style()
    figure, axes = plt.subplots()
    for curve, label, name in ((ours, ours_label, "First Block Cache"), (theirs, theirs_label, "published")):
        places = range(len(curve))
        axes.plot(places, [100 * y for y in curve.values()], MARKERS[name] + "-", color=_colour(name), label=label)
        for x, y in zip(places, curve.values(), strict=True):
            side = 8 if name == "First Block Cache" else -14
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


def trace(decisions: list[tuple[str, dict]]):
    """What the gate saw at each step; `decisions` is (label, trace) as in fluxnb.study.Study.traces."""
    style()
    figure, all_axes = plt.subplots(
        len(decisions), 1, figsize=(8.4, 1.9 * len(decisions) + 0.6), sharex=True, squeeze=False
    )
    colour = _colour("First Block Cache")
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


def bars(labels: list[str], values: list[float], unit: str, names: list[str] | None = None, errors=None):
    """Horizontal bars from zero, the value written at each end; `names` choose the colours."""
    style()
    figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(labels) + 1.2))
    colours = [_colour(name) for name in names] if names else _PALETTE[0]
    axes.barh(labels, values, color=colours, xerr=errors, error_kw={"lw": 1, "capsize": 2})
    for i, value in enumerate(values):
        axes.annotate(f" {value:.3g}", (value, i), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, max(values) * 1.15))
    axes.grid(axis="y", visible=False)
    return figure


def stacked(labels: list[str], parts: dict[str, list[float]], unit: str):
    """Horizontal stacked bars: each part of a whole, in order."""
    style()
    figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(labels) + 1.6))
    left = [0.0] * len(labels)
    for i, (name, values) in enumerate(parts.items()):
        axes.barh(labels, values, left=left, color=_PALETTE[(0, 2, 1, 4)[i % 4]], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for i, total in enumerate(left):
        axes.annotate(f" {total:.3g}", (total, i), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, max(left) * 1.15))
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, ncols=len(parts), loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def grouped(labels: list[str], parts: dict[str, list[float]], unit: str):
    """Horizontal bars from zero, several for each label, the value written at each end."""
    style()
    figure, axes = plt.subplots(figsize=(7.6, 0.3 * len(labels) * len(parts) + 1.4))
    height = 0.8 / len(parts)
    for i, (name, values) in enumerate(parts.items()):
        places = [y + (i - (len(parts) - 1) / 2) * height for y in range(len(labels))]
        axes.barh(places, values, height=height, color=_PALETTE[(0, 1, 2, 4)[i % 4]], label=name)
        for y, value in zip(places, values, strict=True):
            axes.annotate(f" {value:.3g}", (value, y), va="center", fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.15 * max(v for values in parts.values() for v in values) or 1))
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, ncols=len(parts), loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def waterfall(phases: list[str], seconds: list[float], gib: list[float], psnr: list[float | None]):
    """Time, memory and quality after each phase, over the same x axis; a phase without its own quality has no point.

    Below a time stands its gain over the phase before.
    """
    style()
    figure, (time, memory, quality) = plt.subplots(3, 1, figsize=(max(8.4, 0.68 * len(phases)), 8.2), sharex=True)
    places = range(len(phases))
    for i, value in enumerate(seconds):
        before = seconds[i - 1] if i else value
        time.bar(i, value, color=_PALETTE[0], width=0.6)
        if i:
            time.plot([i - 1, i], [before, before], color="#888888", lw=0.8, ls=":")
        gain = f"\n{before / value:.2f}×" if i else ""
        time.annotate(f"{value:.2f}{gain}", (i, value), ha="center", va="bottom", fontsize=8)
    time.set(ylabel="Seconds per image", ylim=(0, 1.25 * max(seconds)))
    memory.bar(places, gib, color=_PALETTE[1], width=0.6)
    for i, value in enumerate(gib):
        memory.annotate(f"{value:.1f}", (i, value), ha="center", va="bottom", fontsize=8)
    memory.set(ylabel="Peak memory (GiB)", ylim=(0, 1.18 * max(gib)))
    known = [(i, value) for i, value in enumerate(psnr) if value is not None]
    quality.plot([i for i, _ in known], [v for _, v in known], "o", color=_PALETTE[2])
    for i, value in known:
        quality.annotate(f"{value:.1f}", (i, value), ha="center", xytext=(0, 6), textcoords="offset points", fontsize=8)
    quality.set(ylabel="PSNR, embedded (dB)", xlim=(-0.6, len(phases) - 0.4))
    quality.set_ylim(bottom=0, top=1.25 * max((v for _, v in known), default=1))
    quality.set_xticks(places, phases, rotation=30, ha="right", rotation_mode="anchor")
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
    several = frame["kind"].nunique() > 1
    for i, ((kind, series), part) in enumerate(frame.groupby(["kind", "series"], sort=False)):
        line = part.sort_values("GPUs")
        xs, ys = [1, *line["GPUs"]], [1.0, *line["speedup"]]
        errors = [[0.0, *(line["speedup"] - line["low"]).clip(0)], [0.0, *(line["high"] - line["speedup"]).clip(0)]]
        label = f"{kind}: {series}" if several else series
        axes.errorbar(xs, ys, errors, fmt="o-", color=_PALETTE[i % 8], ms=6, lw=1.5, capsize=2, label=label)
        axes.annotate(f"{ys[-1]:.2f}×", (xs[-1], ys[-1]), textcoords="offset points", xytext=(8, -3), fontsize=8)
    axes.set(xlabel="GPUs that share an image", ylabel="Speedup over one of them (wall clock, times)")
    axes.set_xticks(sorted({1, *frame["GPUs"]}))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
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
