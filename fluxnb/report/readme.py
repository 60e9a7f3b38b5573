"""The README's tables, written between marks: what to switch on, from the committed rows, and the techniques."""

from __future__ import annotations

from pathlib import Path

from fluxnb.report import write_changed
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.report.front import recipes, soonest

MARKS = ("<!-- results: written by `make site` -->", "<!-- end of results -->")


def write(root: Path) -> bool:
    """Puts the table between the README's marks; whether the README has them."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not all(mark in text for mark in MARKS):
        return False
    before, rest = text.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    write_changed(path, f"{before}{MARKS[0]}\n{results_table(configurations(root))}\n{MARKS[1]}{after}")
    return True


def results_table(found: list[Configuration]) -> str:
    """For each configuration the best choice for each goal, as Markdown."""
    import pandas as pd

    lines = [
        "| configuration | goal | choose | speedup | per image | PSNR | adherence |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found:
        if (divided := soonest(c)) is not None:
            goal = f"one image on {divided.gpus} GPUs, over the same on one"
            figures = f"{divided.speedup:.2f}× | {divided.latency_p50:.2f} s"
            lines.append(f"| {c.name} | {goal} | {divided.label} | {figures} | same arithmetic | – |")
        table = recipes(c)
        if table is None:
            continue
        for goal, row in table.iterrows():
            kept = "–" if pd.isna(row["adherence"]) else f"{row['adherence']:.0%}"
            # without a judged image there is none to call identical: it is the order of operations that differs
            psnr = (
                ("same arithmetic" if kept == "–" else "identical") if pd.isna(row["PSNR"]) else f"{row['PSNR']:.1f} dB"
            )
            seconds = f"{row['p50']:.2f} s"
            lines.append(
                f"| {c.name} | {goal} | {row['choose']} | {row['speedup']:.2f}× | {seconds} | {psnr} | {kept} |"
            )
    return "\n".join(lines)
