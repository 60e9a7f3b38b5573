"""What the tables of a finished page get: permanent links, reasons beneath their rows, ≈ within the noise, sorting.

All of it is done to the page's HTML, so that pages that were committed get it without being run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fluxnb.report.html import FEW, LONG, inline

if TYPE_CHECKING:  # a run that finds all done imports no PyTorch
    from fluxnb.study.row import Row

SCRIPT = Path(__file__).parent / "templates" / "fluxnb" / "page.js"
_PLACE = re.compile(r'<script data-of="page">.*?</script>\n', re.DOTALL)
_TABLE = re.compile(
    r'<table class="fx-table"><caption><span>(.*?)</span></caption><thead><tr>(.*?)</tr></thead>\s*'
    r"<tbody>(.*?)</tbody>",
    re.DOTALL,
)
_REST = re.compile(r'<details class="fx-rest">.*?</details>\n', re.DOTALL)
_LINE = re.compile(r"<tr>(.*?)</tr>", re.DOTALL)
_CELL = re.compile(r"<(th|td)([^>]*)>(.*?)</\1>", re.DOTALL)
_ID = re.compile(r"[0-9a-f]{10}")
_NONE = "–"
LATER = ' data-later="1"'
NOISE = ' class="fx-noise"'


def dress(page: str, rows: Iterable[Row] = (), command: str = "", stem: str = "") -> str:
    """The page with its tables as they are to be read, and the script that sorts them; the same if it has been done.

    Args:
        rows: those that its tables may show, for what is within the noise of its baseline.
        command: that measures the rows of this page.
        stem: its notebook: rows of that one which no table shows get a table at the end, so that each has its address.
    """
    rows, page = list(rows), _REST.sub("", page)
    known = {r.id: r for r in rows}
    noise = {r.id for r in known.values() if _is_noise(r, known.get(r.baseline))}
    used = set(re.findall(r'<tr id="row-([0-9a-f]{10})"', page))
    page = _PLACE.sub("", _TABLE.sub(lambda m: _dressed(m[1], m[2], m[3], noise, used, command), page))
    if "</main>" in page and (rest := _rest(rows, stem, used)):
        own = _TABLE.sub(lambda m: _dressed(m[1], m[2], m[3], noise, used, command), rest)
        before, end, after = page.rpartition("</main>")
        page = f"{before}{own}{end}{after}"
    if re.search('class="fx-(?:table|chart)', page):
        script = f'<script data-of="page">\n{SCRIPT.read_text(encoding="utf-8")}</script>\n'
        before, end, after = page.rpartition("</body>")
        page = f"{before}{script}{end}{after}"
    return page


def _rest(rows: list[Row], stem: str, used: set[str]) -> str:
    """The rows of a notebook that no table of its page has, in one that is closed; "" without any."""
    from fluxnb.findings import ledger
    from fluxnb.findings.rows import judged
    from fluxnb.findings.table import COMPUTED, P50, SPEEDUP, Column, table
    from fluxnb.report.html import table_html

    left = [r for r in ledger.latest(rows) if r.notebook == stem and r.id not in used]
    if not stem or not left:
        return ""
    worst = Column("worst PSNR", lambda r: r.psnr_min_db if judged(r) else None, "dB")
    frame = table(left, (Column("model", "model"), Column("of", "use_case"), P50, *SPEEDUP, COMPUTED, worst))
    many = f"{len(left)} row{'s' if len(left) > 1 else ''} of this report that no table above has"
    shown = table_html(frame, "What was measured of each.", frame.attrs["formats"], frame.attrs["units"])
    return f'<details class="fx-rest"><summary>{many[:1].upper()}{many[1:]}</summary>{shown}</details>\n'


def _is_noise(row: Row, baseline: Row | None) -> bool:
    """Whether it can't be told from its baseline; of what has no interval or is the baseline itself nothing is said."""
    from fluxnb.findings.rows import ends, is_baseline, within_noise  # which has PyTorch imported

    if row.speedup is None or is_baseline(row) or (own := ends(row)) is None:
        return False
    if baseline is None or ends(baseline) is None:
        return own[0] <= 1 <= own[1]
    return within_noise(row, baseline, baseline)


def _dressed(caption: str, head: str, body: str, noise: set[str], used: set[str], command: str) -> str:
    from fluxnb.findings.table import SECOND

    heads = _CELL.findall(head)
    names = [re.sub(r"\s*<[^>]*>.*", "", inner) for _, _, inner in heads]
    lines = [_CELL.findall(line) for line in _LINE.findall(body)]
    beneath = [i for i, name in enumerate(names) if i and _is_beneath(i, name, lines, len(names))]
    kept = [i for i in range(len(names)) if i not in beneath]
    made, grey, linked = [], False, False
    for cells in lines:
        own = next((inner for i, (_, _, inner) in enumerate(cells) if names[i] == "row" and _ID.fullmatch(inner)), "")
        faint = own in noise
        shown = ""
        for i in kept:
            tag, attributes, inner = cells[i]
            if own and names[i] == "row":
                inner = f'<a href="#row-{own}" title="python -m fluxnb rows {own}">{own}</a>'
            if faint and names[i] == "speedup":
                inner = f"≈ {inner}"
            shown += f"<{tag}{attributes}>{inner}</{tag}>"
        anchor = f' id="row-{own}"' if own and own not in used else ""
        used.add(own)
        grey, linked = grey or faint, linked or bool(own)
        made.append(f"<tr{anchor}{NOISE if faint else ''}>{shown}</tr>\n")
        if said := [f"<b>{names[i]}</b> {cells[i][2]}" for i in beneath if cells[i][2] != _NONE]:
            spans = "".join(f"<span>{words}</span>" for words in said)
            made.append(f'<tr class="fx-why"><td colspan="{len(kept)}">{spans}</td></tr>\n')
    measures = f", `{command}` measures it" if command else ""
    how = "Grey, ≈: within the noise of its baseline. " if grey else ""
    how += "A click on a column's head (or Enter) sorts. " if len(lines) > 2 else ""
    how += f"The id of a row is its permanent link; `python -m fluxnb rows ID` prints all of it{measures}." * linked
    more = f'<span class="fx-how">{inline(how)}</span>' if how else ""
    top = "".join(f"<th{heads[i][1]}{LATER if names[i] in SECOND else ''}>{heads[i][2]}</th>" for i in kept)
    return (
        f'<table class="fx-table" data-dressed="1"><caption><span>{caption}</span>{more}</caption><thead><tr>{top}</tr>'
        f"</thead>\n<tbody>{''.join(made)}</tbody>"
    )


def _is_beneath(place: int, name: str, lines: list, columns: int) -> bool:
    """Whether a column's words stand beneath the rows: reasons, and what is long where there are many columns.

    What a row is about stays beside its name.
    """
    if name in ("why not", "why"):
        return columns > FEW or name == "why not"
    return columns > FEW and place > 1 and any(len(cells[place][2]) > LONG for cells in lines)
