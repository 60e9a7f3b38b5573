"""The index page of one configuration: which reports there are, how they went, and where they come from."""

from fluxnb.report.html import provenance_html
from fluxnb.report.run import duration

STATUS = {
    "ok": "done",
    "failed": "failed",
    "interrupted": "interrupted",
    "missing": "not run",
    "unrendered": "not rendered",
}


def index_html(pages: list, run: dict, gpu: str, above: str = "", explorer: str | None = None) -> str:
    """The page as HTML.

    pages     fluxnb.report.render.Page of every notebook, in reading order
    run       the content of run.json
    gpu       name of the configuration
    above     address of the front page of all configurations, relative to this page
    explorer  address of the explorer, where there is one
    """
    from fluxnb.report.render import render_template

    crumbs = [("index.html", f"fluxnb {gpu}"), *([(above, "All configurations")] if above else [])]
    return render_template(
        "configuration.html.j2",
        "index.html",
        crumbs,
        gpu=gpu,
        explorer=explorer,
        provenance=provenance_html(run, sum(page.rows for page in pages) or None),
        troubled=[page for page in pages if page.status != "ok"],
        pages=[_line(page) for page in pages],
    )


def _line(page) -> dict:
    seconds = page.state.get("seconds")
    commit = page.state.get("provenance", {}).get("commit")
    return {
        "title": page.title,
        "number": page.stem.partition("_")[0],
        "href": page.href if page.status in ("ok", "failed", "interrupted") else None,
        "status": page.status,
        "status_text": STATUS[page.status],
        "problem": page.problem,
        "finding": page.finding,
        "time": duration(seconds) if seconds is not None else "–",
        "rows": page.rows or "–",
        "date": (page.state.get("finished") or "")[:10] or "–",
        "commit": str(commit)[:10] if commit else "–",
    }
