"""Pages of an earlier edition say so, and pages say when and of which commits their rows were measured."""

import json
import re
import shutil
from pathlib import Path

import measured
import pytest

from fluxnb import notebooks
from fluxnb.report import Place, earlier, html, index, pages, publish
from fluxnb.report import measured as of_rows
from fluxnb.study.results import Results

ROOT = Path(__file__).resolve().parents[1]
STEM = notebooks.FIRST_BLOCK


@pytest.fixture
def place(tmp_path):
    """A configuration with one page of an earlier edition and the rows that it shows, of two sessions."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    folder = tmp_path / "reports/single_gpu/h200"
    table = Results(folder / "results.csv")
    early = {"notebook": STEM, "adherence": 1.0, "images": None, "session": None, "n": 3}
    table.append(measured.cached(0.2, 2.0, 30.0, 10, **early).as_dict())
    table.append(measured.cached(0.8, 4.0, 16.3, 3, **early).as_dict())
    late = {"images": 24, "session": "s", "baseline": None, "commit": "abcdef0123+"}
    late |= {"measured_at": "2026-12-01T09:00:00+00:00", "n": 10}
    table.append(measured.cached(0.1, 1.5, 40.0, 20, **late).as_dict())
    (folder / f"{STEM}.html").write_text('<body><main id="content" tabindex="-1"><h1>A page</h1></main></body>')
    facts = {"title": "A page", "status": "ok", "finding": "", "problem": ""}
    facts["state"] = {"finished": "2026-11-21T22:00:00+00:00", "provenance": {"commit": "804f4ac0a436"}}
    (folder / "pages.json").write_text(json.dumps({STEM: facts}))
    return Place("h200", 1, tmp_path, tmp_path / "build/h200", folder, own=False)


def test_a_page_of_an_earlier_edition_says_what_is_known_of_it_once(place):
    found, path = pages.read(place), place.reports / f"{STEM}.html"
    (page,) = [p for p in found if p.earlier]
    assert page.stem == STEM and index.line(page)["status_text"] == "done, by an earlier edition"
    page.finding = "17 keep adherence within 5 %"
    assert index.line(page)["finding"] == ""  # by rules that aren't today's, so it isn't repeated elsewhere
    for _ in range(2):
        earlier.mark(place, found, "../../ledger.html")
        text = path.read_text()
        assert text.count(earlier.BEGIN) == text.count('href="../../ledger.html"') == 1
    assert text.index("<main") < text.index(earlier.BEGIN) < text.index("<h1>")
    for said in (
        "commit 804f4ac0a4, 2026-11-21", "2 of 2 rows have 100 %, one at 16.3 dB", "covers 75% where n = 3 (2 rows",
        "Rows of several sessions",
    ):  # fmt: skip
        assert said in text


def test_a_page_made_by_this_edition_is_not_marked(place):
    kept = json.loads((place.reports / "pages.json").read_text())
    kept[STEM]["measured"] = {}
    (place.reports / "pages.json").write_text(json.dumps(kept))
    before = (place.reports / f"{STEM}.html").read_bytes()
    found = pages.read(place)
    earlier.mark(place, found, "ledger.html")
    assert not any(page.earlier for page in found) and (place.reports / f"{STEM}.html").read_bytes() == before


def test_a_page_says_when_the_rows_that_it_shows_were_measured_not_when_it_was_made(place):
    *_, late = Results(place.table).rows()
    every, one = of_rows(place.table, STEM, ""), of_rows(place.table, STEM, f"<td>{late.id}</td>")
    assert (every["from"][:10], every["to"][:10]) == ("2026-11-20", "2026-12-01")
    assert one == {"from": late.measured_at, "to": late.measured_at, "commits": ["abcdef0123+"]}
    assert of_rows(place.table, "99_none", "") == {}
    about = {"started_at": "2026-12-24T00:00:00+00:00", "commit": "1" * 40}
    strip = html.provenance_html(about | {"measured": every})
    assert "<dt>Measured</dt><dd>2026-11-20 00:00 UTC to 2026-12-01 09:00 UTC</dd>" in strip
    assert "<dt>Commits of the rows</dt><dd>abcdef0123+</dd>" in strip and "<dt>Date</dt>" not in strip
    assert "<dt>Page made</dt><dd>2026-12-24 00:00 UTC</dd>" in strip and "<dt>Commit of the page</dt>" in strip
    assert "<dt>Date</dt>" in html.provenance_html(about) and "Measured" not in html.provenance_html(about)


def test_what_was_measured_and_has_no_page_is_not_called_not_run(place):
    (place.reports / f"{STEM}.html").unlink()
    (place.reports / "pages.json").unlink()
    found = {page.stem: page for page in pages.read(place)}
    assert found[STEM].status == "unshown" and index.line(found[STEM])["status_text"] == "rows only"
    assert found[STEM].rows == 3 and "no page of it is kept" in found[STEM].problem
    assert {page.problem for stem, page in found.items() if stem != STEM} == {"not run yet"}


def test_a_page_leads_to_the_index_where_its_neighbours_page_is_gone(place):
    other = notebooks.COMBINED
    page = place.reports / f"{STEM}.html"
    page.write_text(f'<main id="content"><a href="{other}.html">next</a> <a href="{STEM}.html">this</a></main>')
    publish._lead_to_what_is_there(place, pages.read(place))
    assert f'href="index.html#{other}"' in page.read_text() and f'href="{STEM}.html"' in page.read_text()


COMMITTED = sorted(path for kind in ("single_gpu", "multi_gpu") for path in (ROOT / "reports" / kind).rglob("*.html"))


def test_no_committed_page_was_made_from_uncommitted_code():
    assert COMMITTED
    assert not [str(path) for path in COMMITTED if "uncommitted changes" in path.read_text(encoding="utf-8")]


def test_every_link_of_a_committed_page_leads_somewhere():
    links = {(p, h) for p in COMMITTED for h in re.findall(r'href="([^"#?:]+)[#"]', p.read_text(encoding="utf-8"))}
    assert len(links) > 100
    assert not [f"{page}: {href}" for page, href in links if not (page.parent / href).exists()]
