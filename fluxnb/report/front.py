"""What the front page says: the best choices, what is missing, and a section for each configuration; and the ledger."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fluxnb import families, findings, notebooks
from fluxnb.findings import ledger, published
from fluxnb.findings.rows import is_baseline
from fluxnb.report import html
from fluxnb.report.configurations import Configuration
from fluxnb.report.index import line
from fluxnb.report.progress import OWN_DIVISIONS, cannot_run
from fluxnb.study.row import Row

CONTROLS = tuple(f.name for f in families.ALL if f.control)
LEDGER_COLUMNS = [
    ("technique", "text"),
    ("verdict", "text"),
    ("theirs", "number"),
    ("ours", "number"),
    ("reason", "text"),
    ("their setting", "text"),
    ("our setting", "text"),
    ("source", "text"),
]


def front(folder: Path, found: list[Configuration], reference: list[Configuration] | None = None) -> dict:
    """The values of the template site.html.j2.

    Args:
        folder: where the page goes.
        found: the configurations that it is about.
        reference: of a user's own front page, the committed ones that it shows beside.
    """
    judged = found if reference is None else reference
    return {
        "headlines": [html.callout_html(sentence) for sentence in headlines(found)],
        "not_measured": not_measured(found),
        "configurations": [_section(folder, c) for c in found],
        "reference": None if reference is None else [
            {"name": c.name, "href": _link(folder, c, "index.html"), "machine": _machine(c), "rows": len(c.ok)}
            for c in reference
        ],
        "ledger_sentence": ledger_sentence(ledger.entries({c.name: c.rows for c in judged})),
        "ledger": "../ledger.html" if reference is not None else "ledger.html",
    }  # fmt: skip


def ledger_page(found: list[Configuration]) -> dict:
    """The values of the template ledger.html.j2."""
    from fluxnb.report.render import TEMPLATES

    claims = ledger.entries({c.name: c.rows for c in found})
    return {
        "entries": claims,
        "counts": ledger.counts(claims),
        "sources": published.SOURCES,
        "columns": LEDGER_COLUMNS,
        "sentence": ledger_sentence(claims),
        "script": (TEMPLATES / "fluxnb" / "ledger.js").read_text(encoding="utf-8"),
    }


def headlines(found: list[Configuration]) -> list[str]:
    """One sentence for each configuration: the fastest lossless choice and the fastest that keeps adherence.

    Of several GPUs, what the report on dividing an image found.
    """
    said = []
    for c in found:
        divided = next((p for p in c.pages if p.stem == notebooks.PARALLEL and p.finding), None)
        if soonest(c) is not None and divided:
            said.append(f"On {c.name}: {divided.finding}")
        if (table := recipes(c)) is not None:
            chosen = [f"{goal}: **{row['speedup']:.2f}×** with {row['choose']}" for goal, row in table.iterrows()]
            said.append(f"On {c.name}, {'; '.join(chosen[:2])}.")
    return said


def recipes(c: Configuration):
    """The best row for each goal as a table; None where nothing was judged.

    Where a full-size stack was measured it is chosen from, with the quality of the same arithmetic on the embedded
    model; otherwise from what the embedded model was measured with.
    """
    stack = [r for r in c.ok if r.notebook == notebooks.FINAL_STACK and r.speedup is not None]
    judged = [r for r in stack if r.weights == "trained"]
    full = [r for r in stack if r.weights == "random"]
    if not full:
        judged = judged_caches(c)
    if not any(map(is_baseline, judged)):
        return None
    return findings.recommendations(full or judged, judged)


def soonest(c: Configuration) -> Row | None:
    """The row of one image divided over GPUs that is there first, at full size, in BF16 and without a cache."""
    own = (r for r in findings.of(findings.divided(c.rows), *OWN_DIVISIONS) if r.speedup is not None)
    return min(own, key=lambda r: r.latency_p50 or math.inf, default=None)


def judged_caches(c: Configuration) -> list[Row]:
    """The rows of the comparison of all caches whose images were judged, with their baseline and controls."""
    own = [r for r in c.ok if r.notebook == notebooks.COMBINED and r.weights == "trained" and r.batch == 1]
    own = [r for r in own if r.speedup is not None]
    first = max((r.steps or 0 for r in own), default=0)  # of the baseline that the others are over
    return [r for r in own if (r.steps == first or r.family in CONTROLS) and _judged(r)]


def frontier(c: Configuration) -> str | None:
    """Speed against quality of the caches and of their controls, as a figure; None without rows."""
    from fluxnb.report import charts
    from fluxnb.report.captions import about, valued

    rows = charts.on_frontier(judged_caches(c))
    if sum(not is_baseline(r) for r in rows) < 3:
        return None
    points = "; ".join(f"{r.label} {valued(r, 'speedup')}, {valued(r, 'psnr_db')}" for r in rows)
    return html.figure_html(
        charts.frontier(rows, marks=tuple(f for f in families.ALL if f.control)),
        alt=f"{c.name}, speedup and PSNR: {points}.",
        caption=f"{about(rows)}: wall clock against quality. Further right is faster, further up is nearer to the "
        "uncached image; a technique has to lie above the dashed lines, which just use fewer steps.",
    )


def not_measured(found: list[Configuration]) -> list[str]:
    """What a reader should know is missing, first."""
    lines = [
        "FLUX.1's own weights: full-size figures are of random weights (time and memory), quality is that of the "
        "embedded model."
    ]
    if not any((r.gpus or 1) > 1 for c in found if c.name != "cpu" for r in c.ok):
        lines.append("More than one GPU.")
    for c in found:
        for page in c.pages:
            if page.status != "ok":
                lines.append(f"{c.name}, {page.title}: {page.problem or page.status}")
        cannot = cannot_run([r for r in c.rows if r.model])  # without a model it is no technique: a kernel by itself
        if cannot:
            lines.append(f"{c.name} can't run {'; '.join(sorted(cannot))}: the reports say why.")
    return lines


def ledger_sentence(claims: list[ledger.Entry]) -> str:
    """How many claims hold."""
    n = ledger.counts(claims)
    tried = n["reproduced"] + n["not reproduced"]
    return (
        f"Of {len(claims)} published claims {tried} could be put to the test: {n['reproduced']} are reproduced, "
        f"{n['not reproduced']} are not. {n['not comparable']} are not comparable, {n['not run']} were not run."
    )


def _judged(row: Row) -> bool:
    return is_baseline(row) or (row.psnr_db is not None and row.adherence is not None)


def _section(folder: Path, c: Configuration) -> dict:
    table, chart = recipes(c), frontier(c)
    blocks = [html.table_html(table, f"What to choose on {c.name}, by goal.")] if table is not None else []
    reports = [line(page) for page in sorted(c.pages, key=lambda p: p.stem)]
    for report in reports:
        there = report["href"] and (c.folder / report["href"]).is_file()
        report["href"] = _link(folder, c, report["href"]) if there else None
    return {
        "name": c.name,
        "href": _link(folder, c, "index.html"),
        "explorer": _link(folder, c, "explorer.html") if (c.folder / "explorer.html").is_file() else None,
        "progress": _link(folder, c, "progress.md"),
        "machine": _machine(c),
        "rows": len(c.ok),
        "pages": len(c.pages),
        "done": sum(p.status == "ok" for p in c.pages),
        "blocks": [*blocks, *([chart] if chart is not None else [])],
        "reports": reports,
    }


def _machine(c: Configuration) -> str:
    machine = c.run.get("machine") or {}
    gpus = machine.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]['name']}" if len(gpus) > 1 else str(gpus[0]["name"])
    return str(machine.get("cpu") or "no GPU")


def _link(folder: Path, c: Configuration, name: str) -> str:
    return Path(os.path.relpath(c.folder / name, folder)).as_posix()
