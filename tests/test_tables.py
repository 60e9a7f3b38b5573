"""What the tables of a finished page get, on rows made here."""

from dataclasses import replace

import pandas as pd
import pytest
from measured import row

from fluxnb import families
from fluxnb.findings.table import P50, SPEEDUP, Column, table
from fluxnb.report.html import table_html
from fluxnb.report.render import anew
from fluxnb.report.tables import dress

IDS = [f"{i:010x}" for i in range(4)]


@pytest.fixture
def rows():
    common = {"baseline": IDS[0], "n": 10, "session": "a"}
    base = replace(row(label="28 steps", family=families.BASELINE.name, technique=families.BASELINE.name), **common)
    base = replace(base, id=IDS[0], speedup=1.0, speedup_ci_low=0.98, speedup_ci_high=1.02)
    made = [
        replace(base, id=i, label=label, family="compilation", speedup=x, speedup_ci_low=x - w, speedup_ci_high=x + w)
        for i, label, x, w in ((IDS[1], "fast", 2.0, 0.1), (IDS[2], "hardly", 1.01, 0.02))
    ]
    failed = replace(
        base, id=IDS[3], label="large", family="compilation", status="oom", speedup=None, reason="12 GiB <8>"
    )
    return [base, *made, failed]


def page(rows):
    shown = table_html(table(rows, (P50, *SPEEDUP)), "A table", units={})
    return f"<html><style>\nold\n</style><body><main>{shown}{shown}</main></body></html>"


def test_a_table_gets_links_reasons_and_what_is_within_the_noise(rows):
    text = dress(page(rows), rows, "make report GPU=cpu ONLY=05")
    for i in IDS:
        assert text.count(f'<tr id="row-{i}"') == 1  # of two tables the first is led to
        assert text.count(f'<a href="#row-{i}" title="python -m fluxnb rows {i}">') == 2
    assert text.count('class="fx-noise"><th scope="row">hardly') == 2 == text.count('class="fx-noise"')
    assert "≈ 1.01" in text and "≈ 2.00" not in text
    assert '<tr class="fx-why"><td colspan="8"><span><b>why not</b> 12 GiB &lt;8&gt;</span></td></tr>' in text
    assert ">why not</th>" not in text and "<code>make report GPU=cpu ONLY=05</code>" in text
    assert text.count("<script") == 1 and text.index("<script") > text.index("</main>")


def test_a_page_is_dressed_once_however_often_it_is_done(rows):
    once = anew(page(rows), rows, "make report")
    assert anew(once, rows, "make report") == once == anew(once)
    assert "\nold\n" not in once and "--page" in once
    assert dress("<body>no table</body>") == "<body>no table</body>"


def test_words_stand_beneath_their_rows_only_where_there_are_many_columns():
    words = "a sentence that is much longer than a column of figures has room for"
    few = pd.DataFrame({"name": ["a"], "x": [1], "remark": [words]}).set_index("name")
    many = pd.DataFrame({"name": ["a"], **{f"x{i}": [i] for i in range(9)}, "remark": [words]}).set_index("name")
    assert 'class="fx-why"' not in dress(f"<body>{table_html(few, 'Few.')}</body>")
    assert f"<b>remark</b> {words}</span>" in dress(f"<body>{table_html(many, 'Many.')}</body>")


def test_rows_that_no_table_of_their_page_has_get_one_at_its_end(rows):
    own = [replace(r, notebook="05_x", settings={"x": i}) for i, r in enumerate(rows)]
    (other,) = [replace(rows[0], id="f" * 10, notebook="06_y")]
    text = page(own[:2]).replace("</main>", "<p>last</p></main>")
    once = dress(text, [*own, other], "make report", "05_x")
    for i in IDS:
        assert once.count(f'<tr id="row-{i}"') == 1
    assert other.id not in once and "2 rows of this report that no table above has" in once
    rest = once[once.index('<details class="fx-rest">') :]
    assert once.index("<p>last</p>") < once.index(rest) and rest.index("</details>") < rest.index("</main>")
    assert "12 GiB &lt;8&gt;" in rest
    assert dress(once, [*own, other], "make report", "05_x") == once
    assert "fx-rest" not in dress(once, [*own[:2], other], "make report", "05_x").partition("<script")[0]


def test_nothing_is_said_of_the_noise_of_what_has_no_interval(rows):
    unsure = [replace(r, speedup_ci_low=None, speedup_ci_high=None) for r in rows]
    assert "fx-noise" not in dress(page(unsure), unsure).partition("<script")[0]
    assert "fx-noise" not in dress(page(rows), []).partition("<script")[0]  # rows that aren't known
    odd = table([*rows, replace(rows[1], id="short", label="odd")], (P50, Column("setting of it", lambda r: None)))
    assert 'id="row-short"' not in dress(f"<body>{table_html(odd, 'Odd.')}</body>", rows)
