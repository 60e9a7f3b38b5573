"""A page for each configuration that has no rows: that it wasn't run, and the command that would."""

from __future__ import annotations

import os
from pathlib import Path

from fluxnb import params
from fluxnb.findings import documents
from fluxnb.report import TABLE, html, write_changed
from fluxnb.report.audit import check_page
from fluxnb.report.configurations import SMOKE
from fluxnb.report.render import render_template

INDEX = "index.html"


def write(root: Path) -> list[Path]:
    """The pages of all configurations in params/ without a committed table; their paths."""
    folder, written = root / "params", []
    reasons = {gpu: line.why.partition(";")[0] for line in documents.lines() for gpu in line.gpus}
    for name in params.choices(folder) if folder.is_dir() else ():
        chosen = params.load(name, folder)
        place = root / chosen.report_dir
        if name == SMOKE or (place / TABLE).is_file():
            continue
        said = f"Not run: {reasons.get(name) or 'no rows of it yet'}. `make report GPU={name}` on such a machine makes "
        said += f"its pages below reports/own, and `make reference GPU={name}` puts them here."
        crumbs = [
            (INDEX, f"fluxnb {name}"),
            (Path(os.path.relpath(root / "reports" / INDEX, place)).as_posix(), "fluxnb"),
        ]
        blocks = [html.callout_html(said, "not-measured")]
        text = render_template("blocks.html.j2", INDEX, crumbs, title=f"Reports for {name}", blocks=blocks)
        check_page(text, name)
        write_changed(place / INDEX, text)
        written.append(place / INDEX)
    return written
