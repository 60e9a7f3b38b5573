"""The README's tables, written between marks: what to switch on, from the committed rows, and the techniques."""

from __future__ import annotations

import os
from pathlib import Path

from fluxnb.findings.recommend import Choice, stands_in
from fluxnb.findings.rows import is_baseline, peak_gib
from fluxnb.findings.words import sureness
from fluxnb.report import write_changed
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.report.front import answers, soonest, unanswered
from fluxnb.study.row import Row

MARKS = ("<!-- results: written by `make site` -->", "<!-- end of results -->")


def write(root: Path) -> bool:
    """Puts the table between the README's marks; whether the README has them."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not all(mark in text for mark in MARKS):
        return False
    before, rest = text.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    write_changed(path, f"{before}{MARKS[0]}\n{results_table(configurations(root), root)}\n{MARKS[1]}{after}")
    return True


def results_table(found: list[Configuration], root: Path) -> str:
    """For each configuration the best choice for each goal, as Markdown; where there is none, a line that says so."""
    head = "configuration", "goal", "choose", "speedup", "per image", "memory", "worst image", "row"
    lines, notes = [list(head), ["---"] * len(head)], []
    for c in found:
        if (missing := unanswered(c)) is not None:
            said, page = missing
            where = Path(os.path.relpath(c.folder / page.href, root)).as_posix()
            lines.append([c.name, said, f"[what was measured]({where})"])
        if (row := soonest(c)) is not None:
            goal = f"one image on {row.gpus} GPUs, over the same on one"
            lines.append([c.name, goal, row.label, *_figures(row), "–", f"`{row.id}`"])
        for choices in answers(c):
            for choice in choices:
                figures = _figures(choice.row) if not is_baseline(choice.row) else ["–"] * 3
                lines.append([c.name, choice.goal.text, choice.label, *figures, _quality(choice), f"`{choice.row.id}`"])
            notes += [f"On `{c.name}` {said}." for said in [stands_in(choices)] if said]
    table = (f"| {' | '.join(line + [''] * (len(head) - len(line)))} |" for line in lines)
    return "\n".join([*table, *(f"\n{note}" for note in notes)])


def _figures(row: Row) -> list[str]:
    memory = f"{row.memory_peak_gib:.1f} GiB" if peak_gib(row) else "–"
    return [f"{row.speedup:.2f}× ({sureness(row)})", f"{row.latency_p50:.3g} s", memory]


def _quality(choice: Choice) -> str:
    """PSNR and ST-LPIPS of the worst judged image, and of how many."""
    seen = choice.seen
    if seen is None:
        return choice.worst
    lpips = "" if seen.st_lpips_max is None else f", ST-LPIPS {seen.st_lpips_max:.2g}"
    return f"{choice.worst}{lpips} (of {seen.images})"
