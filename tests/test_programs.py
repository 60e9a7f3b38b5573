"""What programs read: every row as JSON, what changed since, the feed, llms.txt, and how the project is cited."""

import importlib.util
import json
import math
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import test_recommend
from measured import row

from fluxnb.errors import UserError
from fluxnb.report import data, history, publish
from fluxnb.report.audit import check_page
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.study.results import Results
from fluxnb.study.row import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
SECRET = "hf_" + "a1B2" * 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small reference: one GPU's rows, and what programs get of it."""
    root = tmp_path_factory.mktemp("programs")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    place = root / "reports/multi_gpu/8gpu/h200"
    shutil.copytree(ROOT / "reports/multi_gpu/8gpu/h200", place)
    publish.for_programs(root)
    return root


def read(path):
    """JSON as a strict reader takes it: no NaN."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def test_every_committed_row_is_in_the_data_with_its_id_and_all_that_it_has(made):
    rows = Results(made / "reports/multi_gpu/8gpu/h200/results.csv").rows()
    found = read(made / "reports" / data.DATA)
    assert [r["id"] for r in found["rows"]] == [r.id for r in rows] and len(rows) > 5
    for one, own in zip(found["rows"], rows, strict=True):
        assert {k: v for k, v in one.items() if k in COLUMNS} == {
            k: v for k, v in own.as_dict().items() if v is not None
        }
        assert one["configuration"] == "h200x8"
    assert found["configurations"]["h200x8"]["folder"] == "multi_gpu/8gpu/h200"


def test_the_data_are_what_their_schema_says(made):
    jsonschema = pytest.importorskip("jsonschema")
    schema = read(made / "reports" / data.SCHEMA)
    whole = read(made / "reports" / data.DATA)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(whole, schema)
    for broken in ({"speedup": "fast"}, {"status": "fine"}, {"id": "x"}, {"strange": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**whole, "rows": [whole["rows"][0] | broken]}, schema)
    described = schema["properties"]["rows"]["items"]["properties"]
    assert set(COLUMNS) <= set(described) and all(one["description"] for one in described.values())


def test_made_again_they_are_the_same_bytes(made):
    names = (data.DATA, data.SCHEMA, data.LLMS, history.PAGE, history.TEXT, history.FEED, "contributed/index.html")
    before = [(made / "reports" / name).read_bytes() for name in names]
    for name in names:
        (made / "reports" / name).unlink()
    publish.for_programs(made)
    assert [(made / "reports" / name).read_bytes() for name in names] == before


def test_no_number_that_json_lacks_is_written():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError):
            data.as_json({"rows": [{"speedup": value}]})


def test_a_token_in_a_row_is_in_nothing_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "sesame-open-1234")
    place = tmp_path / "reports/single_gpu/cpu"
    (tmp_path / "notebooks").mkdir()
    place.mkdir(parents=True)
    rows = Results(place / "results.csv")
    rows.append(row(status="error", reason=f"no access with {SECRET}", label="a").as_dict())
    text = (place / "results.csv").read_text().replace("[token removed]", f"{SECRET} sesame-open-1234")
    (place / "results.csv").write_text(text)
    publish.for_programs(tmp_path)
    for path in (tmp_path / "reports").glob("*.*"):
        assert SECRET not in path.read_text() and "sesame" not in path.read_text(), path.name
    assert "no access with" in (tmp_path / "reports" / data.DATA).read_text()


# --- what changed since ---


def state(speedup=1.9, low=1.8, high=2.0, label="FBCache 0.2", row="a", at="2026-11-20T10:00:00+00:00", **more):
    figure = {"label": label, "row": row, "speedup": speedup, "low": low, "high": high}
    return {
        "at": at,
        "rows": {"cpu": 10},
        "figures": {"cpu, balanced": figure},
        "verdicts": {"TeaCache": "not run"},
    } | more


def test_what_changed_is_said_with_both_figures_and_whether_it_is_noise():
    assert history.changes(state(), state()) == []
    assert history.changes(state(), state(row="b")) == []  # measured again, with the same figures
    (said,) = history.changes(state(), state(speedup=1.95, low=1.9, high=2.1, row="b"))
    assert said == (
        "cpu, balanced: FBCache 0.2 (1.95×, row `b`); it was FBCache 0.2 (1.9×, row `a`), within the noise."
    )
    (said,) = history.changes(state(), state(speedup=2.5, low=2.4, high=2.6))
    assert said.endswith("beyond the noise.")
    (said,) = history.changes(state(), state(label="TeaCache 0.4", speedup=2.5, low=2.4, high=2.6))
    assert "TeaCache 0.4 (2.5×" in said and "noise" not in said  # two techniques are no measurement of one thing
    assert history.changes(state(), state(verdicts={"TeaCache": "reproduced"})) == [
        "Claim TeaCache: reproduced; it was not run."
    ]
    assert history.changes(state(), state(figures={})) == [
        "cpu, balanced: no longer said; it was FBCache 0.2 (1.9×, row `a`)."
    ]
    assert history.changes(state(), state(rows={"cpu": 10, "h100": 5})) == ["h100: 5 rows on the pages; there were 0."]


def test_the_timeline_has_what_was_kept_and_what_is_new_since():
    kept, today = [state()], state(speedup=2.5, low=2.4, high=2.6, at="2026-11-21T10:00:00+00:00")
    newest, first = history.timeline(kept, today)
    assert newest[0].startswith("2026-11-21") and len(newest[2]) == 1
    assert first[2] == ["cpu, balanced: FBCache 0.2 (1.9×, row `a`)."]
    assert len(history.timeline(kept, kept[0])) == 1  # nothing is new
    assert history.timeline([], {"at": None, "rows": {}, "figures": {}, "verdicts": {}}) == []


def measured(speedup):
    """An H100 whose lean stack is so fast."""
    lean = test_recommend.timed("lean", speedup, test_recommend.BLOCKS, test_recommend.BASE)
    rows = [lean if r.label == "lean" and r.speedup else r for r in (*test_recommend.TIMED, *test_recommend.SEEN)]
    return Configuration("h100", Path("/reports/single_gpu/h100"), {}, [], rows)


def test_headline_figures_are_kept_once_for_every_state(tmp_path):
    for speedup, kept in ((1.4, 1), (1.4, 1), (1.6, 2)):
        history.keep(tmp_path, [measured(speedup)])
        assert len(history.read(tmp_path)) == kept
    first, last = history.read(tmp_path)
    assert set(first) == {"at", "rows", "figures", "verdicts"} and first["figures"]
    changed = [said for said in history.changes(first, last) if "lean (1.6×" in said]
    assert changed and all("it was lean (1.4×" in said and said.endswith("beyond the noise.") for said in changed)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "snapshots": [3]}'])
def test_a_damaged_history_is_one_sentence(tmp_path, text):
    (tmp_path / history.FILE).write_text(text)
    with pytest.raises(UserError, match="is no history of figures: restore it from git"):
        history.read(tmp_path)


def test_the_committed_history_can_be_read_and_holds_figures_of_rows():
    kept = history.read(ROOT / "reports")
    assert kept and all(state["figures"] for state in kept)
    assert [s["at"] for s in kept] == sorted(s["at"] for s in kept)


def test_the_feed_has_an_entry_for_every_change(made, tmp_path):
    atom = "{http://www.w3.org/2005/Atom}"
    (tmp_path / history.FILE).write_text(json.dumps({"format": 1, "snapshots": [state(label="<b>&"), state(row="c")]}))
    history.write(tmp_path, [])
    feed = ET.parse(tmp_path / history.FEED).getroot()
    entries = feed.findall(f"{atom}entry")
    assert len(entries) == 2 and len({e.find(f"{atom}id").text for e in entries}) == 2
    assert feed.find(f"{atom}updated").text == max(e.find(f"{atom}updated").text for e in entries)
    page = (tmp_path / history.PAGE).read_text()
    check_page(page, history.PAGE)
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_llms_txt_leads_to_what_is_there(made):
    text = (made / "reports" / data.LLMS).read_text()
    assert "Independent reproductions: 0" in text and "data.json" in text and "h200x8" in text


@pytest.mark.skipif(importlib.util.find_spec("nbstripout") is None, reason="needs nbstripout")
def test_the_commit_hooks_run_the_tools_of_the_environment():
    import yaml

    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["entry"].split()[0] for hook in repo["hooks"]} == {".venv/bin/ruff", ".venv/bin/nbstripout"}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": ".ci/run"}


def test_the_reference_keeps_its_figures_when_it_is_taken_over(made):
    assert len(configurations(made)) == 1  # of a configuration with rows, as `make reference` leaves it
    history.keep(made / "reports", configurations(made))
    assert len(history.read(made / "reports")) == 1
    (made / "reports" / history.FILE).unlink()
