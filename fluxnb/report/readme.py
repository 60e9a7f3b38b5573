"""The README's tables, written between marks: what to switch on, from the committed rows, and the techniques."""

from __future__ import annotations

import os
from pathlib import Path

from fluxnb import families, notebooks
from fluxnb.findings import ledger, published
from fluxnb.findings.recommend import Choice, stands_in
from fluxnb.findings.rows import is_baseline, peak_gib
from fluxnb.findings.words import sureness
from fluxnb.report import charts, html, write_changed
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.report.front import answers, soonest, takes_few, unanswered
from fluxnb.report.ledger import entries
from fluxnb.study.row import Row

MARKS = {
    "results": ("<!-- results: written by `make site` -->", "<!-- end of results -->"),
    "schnell": ("<!-- schnell: written by `make site` -->", "<!-- end of schnell -->"),
}


def write(root: Path) -> bool:
    """Puts the tables between the README's marks; whether the README has them."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not all(mark in text for marks in MARKS.values() for mark in marks):
        return False
    found = configurations(root)
    for name, made in (("results", results_table(found, root)), ("schnell", schnell_tables(found, root))):
        begin, end = MARKS[name]
        text = f"{text.split(begin, 1)[0]}{begin}\n{made}\n{end}{text.split(end, 1)[1]}"
    write_changed(path, text)
    picture(found, root)
    return True


def picture(found: list[Configuration], root: Path) -> Path | None:
    """The README's picture: speed against the worst image of the caches and of fewer steps, embedded model, CPU.

    None where there are no such rows.
    """
    own = [r for c in found if c.name == "cpu" for r in c.ok if r.notebook == notebooks.COMBINED and r.batch == 1]
    rows = charts.on_frontier([r for r in own if r.weights == "trained" and r.model == own[0].model])
    if sum(not is_baseline(r) for r in rows) < 3:
        return None
    drawn = html.svg(charts.frontier(rows, marks=tuple(f for f in families.ALL if f.control)))
    write_changed(root / charts.PICTURE, drawn.decode("utf-8"))
    return root / charts.PICTURE


def schnell_tables(found: list[Configuration], root: Path) -> str:
    """The plans' marks for FLUX.1-schnell with the verdict of four-step rows, and what to choose for four steps."""
    head = "mark", "set by", "ours", "verdict", "row"
    lines = [list(head), ["---"] * len(head)]
    for e in entries(found):
        if e.claim.model == ledger.SCHNELL and e.claim.kind == published.CRITERION:
            why = f"{e.verdict}: {e.reason}" if e.reason else e.verdict
            lines.append([f"{e.claim.technique}: {e.claim.text}", e.claim.source.partition(":")[0], e.text, why,
                          f"`{e.row.id}`" if e.row else "–"])  # fmt: skip
    chosen = results_table(found, root, few=True)
    return _markdown(lines) + (f"\n\n{chosen}" if chosen else "")


def results_table(found: list[Configuration], root: Path, few: bool = False) -> str:
    """For each configuration the best choice for each goal, as Markdown; where there is none, a line that says so.

    Args:
        few: for models of four steps instead of for all others; "" where there is none.
    """
    head = "configuration", "goal", "choose", "speedup", "per image", "memory", "worst image", "row"
    lines, notes = [list(head), ["---"] * len(head)], []
    for c in found:
        if not few and (missing := unanswered(c)) is not None:
            said, page = missing
            where = Path(os.path.relpath(c.folder / page.href, root)).as_posix()
            lines.append([c.name, said, f"[what was measured]({where})"])
        if not few and (row := soonest(c)) is not None:
            goal = f"one image on {row.gpus} GPUs, over the same on one"
            lines.append([c.name, goal, row.label, *_figures(row), "–", f"`{row.id}`"])
        for choices in (own for own in answers(c) if takes_few(own[0].base.model) == few):
            for choice in choices:
                figures = _figures(choice.row) if not is_baseline(choice.row) else ["–"] * 3
                lines.append([c.name, choice.goal.text, choice.label, *figures, _quality(choice), f"`{choice.row.id}`"])
            notes += [f"On `{c.name}` {said}." for said in [stands_in(choices)] if said]
    if few and len(lines) == 2:
        return ""
    return "\n".join([_markdown([line + [""] * (len(head) - len(line)) for line in lines]), *(f"\n{n}" for n in notes)])


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
