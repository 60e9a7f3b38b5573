"""What is known of each configuration from its table and what is remembered of its pages; nothing is executed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fluxnb import notebooks
from fluxnb.findings import ledger
from fluxnb.report import PAGES, read_json
from fluxnb.report.pages import Page, without
from fluxnb.study.results import Results
from fluxnb.study.row import Row

OWN, SMOKE = "own", "smoke"  # folders below reports/ that aren't the committed reference


@dataclass
class Configuration:
    """The results of one GPU configuration: the committed reference's, or a user's own."""

    name: str
    folder: Path
    run: dict
    pages: list[Page]
    rows: list[Row]
    model: str = ""  # of the user's, that all of it is about

    @property
    def ok(self) -> list[Row]:
        """The rows that were measured."""
        return [r for r in self.rows if r.ok]


def name_of(folder: Path) -> str:
    """The name of the configuration whose reports are in a folder: h200, or h200x2 for two of them; with its model."""
    if model_of(folder):
        return f"{name_of(folder.parent)}, {folder.name}"
    count = folder.parent.name.removesuffix("gpu")
    return f"{folder.name}x{count}" if count.isdigit() else folder.name


def model_of(folder: Path) -> str:
    """The model of the user's that the reports in a folder are about; "" for the study's own."""
    return folder.name if re.fullmatch(r"single_gpu|\d+gpu", folder.parent.parent.name) else ""


def configurations(root: Path, own: bool = False) -> list[Configuration]:
    """Every folder with results below reports/, or with `own` below reports/own/; smoke tests left out, CPU last."""
    above = root / "reports" / OWN if own else root / "reports"
    tables = (p for p in sorted(above.glob("*/**/results.csv")) if p.parent.name != SMOKE)
    found = [read(root, p) for p in tables if p.relative_to(above).parts[0] != OWN]
    return sorted(found, key=lambda c: (c.name == "cpu", c.name))


def read(root: Path, table: Path) -> Configuration:
    """The configuration that a table is of."""
    folder, every, pages = table.parent, Results(table).rows(), []
    kept, counts = read_json(folder / PAGES), Counter(r.notebook for r in every)
    model = model_of(folder)
    several = "single_gpu" not in (folder.parent.name, folder.parent.parent.name)
    for source in notebooks.sources(root, 2 if several else 1, model):
        if facts := kept.get(source.stem):
            page = Page(source.stem, facts.get("title", source.stem), facts["status"], facts["state"])
            page.finding, page.problem, page.measured = facts["finding"], facts["problem"], facts.get("measured")
        else:
            page = without(source, counts[source.stem])
        page.rows = counts[source.stem]
        pages.append(page)
    timed = [r for r in every if r.notebook != notebooks.SURVIVAL]  # whose rows are right or wrong, not fast or slow
    return Configuration(name_of(folder), folder, read_json(folder / "run.json"), pages, ledger.latest(timed), model)
