"""Pages of an earlier edition that can't be made anew: what a reader has to know of them, at their top."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fluxnb.measure import stats
from fluxnb.report import Place, write_changed
from fluxnb.report.html import callout_html
from fluxnb.report.pages import Page
from fluxnb.study.row import Row

BEGIN, END = "<!-- of an earlier edition -->", "<!-- end of what is said of it -->"
_BANNER = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def mark(place: Place, pages: Sequence[Page], ledger: str) -> None:
    """Says so at the top of each such page, once however often it is called.

    Args:
        pages: of this place.
        ledger: the address of the ledger, relative to the pages.
    """
    from fluxnb.study.results import Results

    there = [page for page in pages if page.earlier and (place.reports / page.href).is_file()]
    rows = Results(place.table).rows() if there and place.table.is_file() else []
    link = f'<p><a href="{ledger}">The ledger of claims</a> is judged by today\'s rules.</p>'
    for page in there:
        path = place.reports / page.href
        text = _BANNER.sub("", path.read_text(encoding="utf-8"))
        said = callout_html(sentence(page, [r for r in rows if r.notebook == page.stem]), "warning")
        if main := re.search(r"<main\b[^>]*>", text):
            write_changed(path, f"{text[: main.end()]}{BEGIN}{said}{link}{END}{text[main.end() :]}")


def sentence(page: Page, rows: Sequence[Row]) -> str:
    """What is known of a page of an earlier edition and of the rows of its notebook."""
    commit, finished = page.state.get("provenance", {}).get("commit"), (page.state.get("finished") or "")[:10]
    where = ", ".join(filter(None, [commit and f"commit {str(commit)[:10]}", finished]))
    said = [f"This page is of an earlier edition{f' ({where})' if where else ''}, whose rules weren't today's"]
    facts = [r for r in rows if r.adherence is not None and r.images is None]
    if facts:
        full = [r for r in facts if r.adherence == 1]
        worst = min((r.psnr_db for r in full if r.psnr_db is not None), default=None)
        said.append(
            f"Its adherence is of a probe that passed ruins: {len(full)} of {len(facts)} rows have 100 %"
            + (f", one at {worst:.1f} dB" if worst is not None else "")
        )
        said.append("How many images were judged isn't noted, and the prompts that judge were among those trained on")
    few = [r.n for r in rows if r.speedup_ci_low is not None and r.n and r.n < stats.LEAST and r.baseline is None]
    if few:
        covers = f"{stats.coverage(min(few)):.0%} where n = {min(few)}"
        said.append(f"What it calls a 95 % interval covers {covers} ({len(few)} rows have so few samples)")
    if any(r.session is None for r in rows):
        said.append("Rows of several sessions may stand in one table")
    return f"{'. '.join(said)}. README, “Limits”, and the ledger say what stands."
