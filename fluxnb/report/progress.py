"""progress.md of one configuration: every line of the documents, ticked by its rows, and what is still to do."""

from __future__ import annotations

import itertools
import re

from fluxnb import families, notebooks, stacks
from fluxnb.findings import documents
from fluxnb.findings.rows import finished
from fluxnb.study.row import Row

OWN_DIVISIONS = (*stacks.SET_OFF, *stacks.recorded(quantized=False))  # the study's ways, unquantized


def cannot_run(rows: list[Row]) -> dict[str, str]:
    """Techniques and stacks that no row of a configuration shows to run, each with the reason of the last that tried.

    What the small model can't have (5 heads on 4 GPUs, say) is not counted where a full-size one was measured.
    """
    large = any(r.model and r.weights == "random" for r in rows)
    ran = {_called(r) for r in finished(rows)}
    failed = [r for r in rows if not r.ok and not (large and r.weights == "trained")]
    return {_called(r): r.reason for r in failed if _called(r) not in ran}


def _called(row: Row) -> str:
    """What can run or not: a technique, or several together by their name."""
    return (row.family == families.STACK.name and row.stack) or row.technique


def progress_md(gpu: str, rows: list[Row], pages: list, several: bool = False) -> str:
    """The file's text.

    Args:
        gpu: name of the configuration.
        several: it has several GPUs, and lines of its own.
        rows: of its results.csv.
        pages: fluxnb.report.pages.Page of every notebook.
    """
    found = documents.answers(rows, gpu, notebooks.SEVERAL_GPUS if several else None)
    reached = sum(a.state != documents.OPEN for a in found) / len(found)
    lines = [f"# Progress: {gpu}", "", f"## Overall progress: {reached:.0%}", "", documents.sentence(found), ""]
    lines += [
        "Written by `make report` from results.csv: a box is ticked when rows of it, named by their ids, show it.",
        "",
    ]
    for (document, part), own in itertools.groupby(found, key=lambda a: (a.line.document, a.line.part)):
        lines += [f"### {document}: {part}", ""]
        for a in own:
            said = ": ".join(filter(None, [a.ids, a.said]))
            lines.append(f"- [{'x' if a.state == documents.MET else ' '}] {a.line.item} ({said})")
        lines.append("")
    troubled = [f"- {page.title}: {page.problem}" for page in pages if page.status in ("failed", "interrupted")]
    lines += ["### Issues and blockers", ""]
    lines += troubled + [f"- {technique}: {reason}" for technique, reason in cannot_run(rows).items()] or ["- none"]
    lines += ["", "### Next steps", ""]
    again = {"missing": "run", "unshown": "make the page again of"}
    lines += [f"- {again[p.status]} {p.stem}" for p in pages if p.status in again] or ["- every notebook has run"]
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", "\n".join(lines)) + "\n"  # a row's words are no HTML
