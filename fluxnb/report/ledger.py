"""The ledger of claims as a page."""

from __future__ import annotations

from pathlib import Path

from fluxnb.findings import ledger
from fluxnb.findings.published import LEAST_MARGIN, MARGIN
from fluxnb.measure import stats
from fluxnb.report.choosing import page_of
from fluxnb.report.configurations import Configuration

COLUMNS = (("technique", "text"), ("verdict", "text"), ("theirs", "number"), ("ours", "number"), ("why", "text"))


def entries(found: list[Configuration]) -> list[ledger.Entry]:
    """Every claim with its verdict, from the rows of all configurations."""
    return ledger.entries([row for c in found for row in c.rows])


def page(found: list[Configuration], folder: Path) -> dict:
    """The values of the template ledger.html.j2, of a page in a folder."""
    from fluxnb.report.render import TEMPLATES

    claims, of = entries(found), {r.id: c for c in found for r in c.rows}
    return {
        "entries": claims,
        "pages": {r.id: page_of(of[r.id], r, folder) for e in claims if (r := e.row) is not None},
        "counts": ledger.counts(claims),
        "flagged": sum(bool(e.claim.flag) for e in claims),
        "columns": COLUMNS,
        "sentence": ledger.sentence(claims),
        "rounds": stats.HEADLINE,
        "least": stats.LEAST,
        "margin": f"{MARGIN:.0%}".replace("%", " %"),
        "least_margin": LEAST_MARGIN,
        "script": (TEMPLATES / "fluxnb" / "ledger.js").read_text(encoding="utf-8"),
    }
