"""The pages of one configuration: what their headers, their neighbours and the indexes say of each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fluxnb import notebooks
from fluxnb.report import (
    PAGES,
    Place,
    count_rows,
    describe_failure,
    executed_notebook,
    measured,
    read_json,
    read_state,
    write_changed,
)

STATUS = {  # in words
    "ok": "done",
    "failed": "failed",
    "interrupted": "interrupted",
    "missing": "not run",
    "unshown": "rows only",
    "unrendered": "not rendered",
}
WITH_PAGE = ("ok", "failed", "interrupted")


@dataclass
class Page:
    """One report: what its navigation, its header and the index say about it."""

    stem: str
    title: str
    status: str  # a key of STATUS
    state: dict = field(default_factory=dict)
    rows: int = 0
    finding: str = ""  # the sentence of the first result callout, plain text
    problem: str = ""  # why the page isn't ok, plain text
    notebook: Path | None = None  # the executed notebook to render it from; None where the page stands already
    measured: dict | None = None  # when its rows were measured, and of which commits; None: of an earlier edition

    @property
    def href(self) -> str:
        """Its file."""
        return f"{self.stem}.html"

    @property
    def earlier(self) -> bool:
        """Whether it stands there as an earlier edition made it."""
        return self.measured is None and self.notebook is None and self.status in WITH_PAGE

    @property
    def link(self) -> str:
        """Where its neighbours lead: to it, or to its line in the index while there is none."""
        return self.href if self.status in WITH_PAGE else f"index.html#{self.stem}"

    @property
    def short_title(self) -> str:
        """Its title without what follows a colon."""
        return self.title.removeprefix("Appendix: ").split(":")[0]

    @property
    def number(self) -> str:
        """Of the notebook, in reading order."""
        return self.stem.partition("_")[0]


def read(place: Place) -> list[Page]:
    """A page for every notebook: executed here, rendered before and kept with the reports, or missing."""
    rows, kept, found = count_rows(place.table), read_json(place.reports / PAGES), []
    for source in notebooks.sources(place.root, place.gpus, place.model):
        stem = source.stem
        page = _executed(place, stem, rows.get(stem, 0)) or without(source, rows.get(stem, 0))
        if page.status == "unshown" and read_state(place.build, stem).get("status") in ("running", "interrupted"):
            page.problem = "its rows are being measured, or were when the run was stopped"
        facts = kept.get(stem)
        if facts and (place.reports / page.href).is_file() and _is_later(facts.get("state") or {}, page):
            page.notebook = None
            for name, value in facts.items():
                setattr(page, name, value)
        found.append(page)
    return found


def without(source: Path, rows: int) -> Page:
    """A notebook that there is no page of, whether or not its rows are kept."""
    if rows:
        return Page(source.stem, title_of(source), "unshown", rows=rows, problem="measured, but no page of it is kept")
    return Page(source.stem, title_of(source), "missing", problem="not run yet")


def remember(pages: list[Page], place: Place) -> None:
    """Writes what the indexes say of each page beside the pages, for clones that have the pages only."""
    kept = {}
    for page in pages:
        if page.status in WITH_PAGE:
            commit = page.state.get("provenance", {}).get("commit")
            state = {name: page.state.get(name) for name in ("seconds", "started", "finished")}
            state |= {name: page.state[name] for name in ("thorough", "left_out") if page.state.get(name)}
            facts = {name: getattr(page, name) for name in ("title", "status", "finding", "problem")}
            facts |= {} if page.measured is None else {"measured": page.measured}
            kept[page.stem] = facts | {"state": state | {"provenance": {"commit": commit}}}
    write_remembered(kept, place)


def write_remembered(kept: dict, place: Place) -> None:
    """Writes the facts of pages, by their stems."""
    write_changed(place.reports / PAGES, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def title_of(source: Path) -> str:
    """The title of a notebook: its first heading."""
    return _title(read_json(source), source.stem)


def _executed(place: Place, stem: str, rows: int) -> Page | None:
    """The page of a notebook that was executed here."""
    notebook, state = executed_notebook(place.build, stem), read_state(place.build, stem)
    if notebook is None:
        return None
    content = read_json(notebook)
    page = Page(stem, _title(content, stem), "ok", state, rows, _finding(content), notebook=notebook)
    page.measured = measured(place.table, stem, notebook.read_text(encoding="utf-8"))
    if notebook.name.endswith(".failed.ipynb"):
        page.status, page.problem = "failed", describe_failure(state)
    elif state.get("status") != "ok":
        page.status = "interrupted"
        page.problem = "the last run was interrupted; this page is from the run before it"
    return page


def _is_later(state: dict, page: Page) -> bool:
    """Whether a page of this state was executed after the one here, if there is one here."""
    when = "started" if state.get("started") else "finished"  # a page made anew finished when its rows were measured
    now = datetime.now(UTC).isoformat()  # a page from the future was made before the clock was set back
    return page.notebook is None or (page.state.get(when) or "") < (state.get(when) or "") <= now


def _title(content: dict, stem: str) -> str:
    for cell in content.get("cells", []):
        if cell.get("cell_type") == "markdown":
            heading = re.search(r"^#\s+(.+?)\s*#*$", "".join(cell.get("source", "")), flags=re.MULTILINE)
            if heading:
                return re.sub(r"[`*_]{1,2}(?=\S)(.+?)[`*_]{1,2}", r"\1", heading.group(1))
    return stem.partition("_")[2].replace("_", " ").capitalize() or stem


def _finding(content: dict) -> str:
    """The first sentence that a notebook set apart as its result: fluxnb.report.html.callout says so beside it."""
    outputs = (output for cell in content.get("cells", []) for output in cell.get("outputs", []))
    said = (output.get("metadata", {}).get("fluxnb", {}).get("finding") for output in outputs)
    return next(filter(None, said), "")
