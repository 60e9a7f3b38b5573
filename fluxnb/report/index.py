"""The index page of one configuration: which reports there are, how they went, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence

from fluxnb.findings import machine
from fluxnb.report import duration
from fluxnb.report.html import provenance_html, table_html
from fluxnb.report.pages import STATUS, WITH_PAGE, Page
from fluxnb.report.render import render_template
from fluxnb.study.row import Row


def index_html(
    pages: list[Page],
    run: dict,
    gpu: str,
    above: str,
    explorer: str | None = None,
    model: str = "",
    reference: tuple[str, set[str]] | None = None,
    rows: Sequence[Row] = (),
    answer: list[str] | None = None,
    command: str = "",
) -> str:
    """The page as HTML.

    Args:
        pages: of every notebook, in reading order.
        run: the content of run.json.
        gpu: name of the configuration.
        above: address of the front page of all configurations, relative to this page.
        explorer: address of the explorer, where there is one.
        model: of the user's, that all of it is about.
        reference: of a user's own reports, the address of the folder of the committed reference and its pages' files.
        rows: of its results.csv, for what was out of the ordinary.
        answer: the recommendation, as blocks of HTML.
        command: that makes what isn't there yet, of a user's own reports.
    """
    folder, there = reference or ("", set())
    missing = [page.short_title for page in pages if page.status == "missing"]
    odd = machine.anomalies(rows)
    return render_template(
        "configuration.html.j2",
        "index.html",
        [("index.html", f"fluxnb {gpu}"), (above, "All configurations")],
        gpu=gpu,
        explorer=explorer,
        model=model,
        reference=folder,
        provenance=provenance_html(run, sum(page.rows for page in pages) or None),
        answer=answer or [],
        command=command,
        troubled=[page for page in pages if page.status not in ("ok", "missing")],
        missing=missing,
        short=[page.number for page in pages if page.state.get("left_out")],
        odd=0 if odd is None else int(odd["rows"].sum()),
        anomalies="" if odd is None else table_html(odd, f"By rule, the furthest of each. {machine.RULES}."),
        pages=[line(p) | {"reference": f"{folder}/{p.href}" if p.href in there else None} for p in pages],
    )


def line(page: Page) -> dict:
    """What a table of reports says of a page."""
    seconds = page.state.get("seconds")
    commit = page.state.get("provenance", {}).get("commit")
    return {
        "stem": page.stem,
        "title": page.title,
        "number": page.number,
        "href": page.href if page.status in WITH_PAGE else None,
        "status": page.status,
        "status_text": STATUS[page.status] + ", by an earlier edition" * page.earlier,
        "finding": "" if page.earlier else page.finding,  # whose rules weren't today's
        "time": duration(seconds) if seconds is not None else "–",
        "rows": page.rows or "–",
        "date": ((page.measured or {}).get("to") or page.state.get("finished") or "")[:10] or "–",
        "commit": str(commit)[:10] if commit else "–",
    }
