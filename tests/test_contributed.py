"""Other people's rows: packed without a word of who or where, checked when they come, and shown as theirs."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from measured import cached, row

from fluxnb import params
from fluxnb.__main__ import main
from fluxnb.errors import UserError
from fluxnb.report import contributed, own, publish
from fluxnb.report.configurations import configurations
from fluxnb.study.results import Results

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "a1B2" * 8
HOST = "anna-laptop"


def rows_of(host, speedup=1.9, when="2026-11-20", n=12, **changed):
    """A baseline and First Block Cache on a machine, as a run appends them."""
    common = {
        "host": host,
        "session": f"of {host}",
        "n": n,
        "measured_at": f"{when}T00:00:00+00:00",
        "run_id": f"r{when}",
    }
    yield row(**common, psnr_identical=24, images=24).as_dict()
    ends = {"speedup_ci_low": speedup - 0.1, "speedup_ci_high": speedup + 0.1}
    yield cached(0.2, speedup, 36.0, 12.0, **common, **ends, **changed).as_dict()


def fill(table, *groups):
    results = Results(table)
    for group in groups:
        base, *others = group
        base = results.append({k: v for k, v in base.items() if k != "id"})
        for one in others:
            results.append({k: v for k, v in one.items() if k != "id"} | {"baseline": base.id})
    return results.rows()


@pytest.fixture
def root(user_root):
    """A project with a reference of one machine."""
    fill(user_root / "reports/single_gpu/cpu/results.csv", rows_of("ours"))
    return user_root


def packed(root, host="theirs", name="Anna", run=None, **changed):
    """The file that somebody with a clone of their own packs."""
    clone = root / f"clone-{host}-{name}-{len(list(root.glob('clone-*')))}"
    (clone / "params").mkdir(parents=True)
    place = own(params.load("cpu"), clone)
    fill(place.table, rows_of(host, **changed))
    (place.reports / "run.json").write_text(json.dumps(run or {"machine": {"cpu": "a CPU", "gpus": []}}))
    return contributed.contribute(place, name, clone / "packed.json", yes=True)


def merged(capsys, *files):
    capsys.readouterr()
    assert [main(["merge", str(file)]) for file in files] == [0] * len(files)
    return capsys.readouterr().out


def refused(capsys, file):
    """The one sentence on a bad contribution, after which everything is as it was."""
    before = {p: p.read_bytes() for p in Path("reports").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["merge", str(file)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fluxnb: ") and err.count("\n") == 1 and err.endswith(".\n") and "Traceback" not in err, err
    assert {p: p.read_bytes() for p in Path("reports").rglob("*") if p.is_file()} == before
    return err


def changed_file(file, change, seal=True):
    """The file with its content changed, its digest that of the new content."""
    whole = json.loads(file.read_text())
    change(whole)
    if seal:
        whole["digest"] = contributed._digest(whole)
    file.write_text(json.dumps(whole))
    return file


# --- packing ---


def test_what_is_packed_says_nothing_of_who_or_where(root, capsys, monkeypatch):
    monkeypatch.setenv("USER", "annabel")
    monkeypatch.setenv("FLUXNB_HOST", HOST)
    monkeypatch.setenv("SOME_TOKEN", "sesame-open-1234")
    place = own(params.load("cpu"), root)
    reason = (
        f"{HOST}: /home/annabel/x.py and C:\\Users\\annabel\\x, ~/models/y, \\\\server\\share, https://host.example/a?b"
        f", 10.1.2.3 annabel@mail.example {TOKEN} sesame-open-1234 annabel"
    )
    settings = {"settings": {"dtype": "float32", "folder": "/home/annabel/model", "threshold": 0.2}}
    failed = [{**cached(0.3, 1.0, 30.0, 9.0).as_dict(), "status": "unavailable", "reason": reason, "host": HOST}]
    fill(place.table, rows_of(HOST, **settings), [next(rows_of(HOST, when="2026-11-21")), *failed])
    about = {
        "machine": {"cpu": "a CPU", "gpus": [], "hostname": HOST},
        "commit": "abc",
        "environment": {"A": "/home/x"},
    }
    (place.reports / "run.json").write_text(json.dumps(about | {"params": {"study": {"prompts": ["/home/annabel"]}}}))
    said = []
    path = contributed.contribute(place, ask=lambda question: said.append(question) or "y")
    told, text = capsys.readouterr().out, path.read_text()
    for word in (HOST, "annabel", "/home", "Users", "server", "example", "10.1.2.3", TOKEN, "sesame", "~/", str(root)):
        assert word not in text, word
    assert "machine 1" in text and "0.2" in text and "a CPU" in text
    assert "4 rows of cpu" in told and "a CPU" in told and "no path" in told and said == ["Write it? [y/N] "]
    assert path.is_relative_to(root / "reports/own")  # which git ignores
    assert contributed.read(path).rows


def test_nothing_is_written_before_a_yes(root, capsys):
    place = own(params.load("cpu"), root)
    fill(place.table, rows_of("a"))
    assert contributed.contribute(place, ask=lambda _: "") is None
    assert not list((root / "reports/own").glob("*.json")) and "Nothing was written" in capsys.readouterr().out

    def at_the_end(_):
        raise EOFError

    with pytest.raises(UserError, match="add --yes"):
        contributed.contribute(place, ask=at_the_end)
    contributed.contribute(place, yes=True)
    with pytest.raises(UserError, match="is there already"):
        contributed.contribute(place, yes=True)
    for name in ("<b>", "a" * 100, "x\ny"):
        with pytest.raises(UserError, match="--name .* allowed"):
            contributed.contribute(place, name, root / "b.json", yes=True)


def test_without_rows_there_is_nothing_to_pack(root, capsys):
    assert main(["contribute"]) == 2
    assert "run 'make report GPU=cpu' first" in capsys.readouterr().err


# --- merging ---


def test_what_comes_stands_beside_ours_marked_as_theirs_and_counts(root, capsys):
    publish.for_programs(root)
    assert "Independent reproductions: 0." in (root / "reports/contributed/index.html").read_text()
    ours = (root / "reports/single_gpu/cpu/results.csv").read_bytes()
    assert "Independent reproductions: 1, of 1" in merged(capsys, packed(root, speedup=1.95))
    page = (root / "reports/contributed/index.html").read_text()
    assert "Theirs, 1: Anna, cpu: a CPU" in page and "agrees" in page and "1.9×" in page and "1.95×" in page
    assert "Independent reproductions: 1" in (root / "reports/ledger.html").read_text()
    said = merged(capsys, packed(root, "other", "Bob", speedup=4.0))
    assert "Independent reproductions: 1, of 2" in said and "1 differ" in said
    assert "1 are of too few rounds" in merged(capsys, packed(root, "third", "Carl", n=4))
    assert (root / "reports/single_gpu/cpu/results.csv").read_bytes() == ours
    assert len(configurations(root)[0].rows) == 2  # no recommendation sees theirs


def test_merging_twice_is_merging_once(root, capsys):
    file = packed(root)
    merged(capsys, file)
    before = {p: p.read_bytes() for p in (root / "reports").rglob("*") if p.is_file()}
    shutil.copy(file, root / "again.json")
    assert "is here already" in merged(capsys, root / "again.json")
    assert {p: p.read_bytes() for p in (root / "reports").rglob("*") if p.is_file()} == before


def test_two_contributors_with_one_host_name_are_two(root, capsys):
    assert "of 2 that" in merged(capsys, packed(root, "same"), packed(root, "same", "Bob", when="2026-11-22"))
    assert len(list((root / "reports/contributed").glob("*.json"))) == 2


def test_two_files_of_one_run_are_one_reproduction(root, capsys):
    first = packed(root)
    second = changed_file(packed(root), lambda whole: whole.update(name="Somebody else"))
    assert "Independent reproductions: 1, of 1" in merged(capsys, first, second)


def test_our_own_rows_are_no_reproduction(root, capsys):
    place = own(params.load("cpu"), root)
    place.reports.mkdir(parents=True)
    shutil.copy(root / "reports/single_gpu/cpu/results.csv", place.table)
    assert "nothing but rows of the reference itself" in refused(capsys, contributed.contribute(place, yes=True))


# --- hostile files ---


def first(**values):
    return lambda whole: whole["rows"][0].update(values)


BAD = {
    "of another format": (lambda whole: whole.update(format=2), "update fluxnb"),
    "of no format": (lambda whole: whole.update(format="1"), "is of format"),
    "with more in it": (lambda whole: whole.update(script="rm"), "and nothing else"),
    "with a path for its configuration": (lambda whole: whole.update(gpu="../../etc"), "its gpu is"),
    "with markup for its name": (lambda whole: whole.update(name="<script>"), "its name is"),
    "with more about its run": (lambda whole: whole.update(run={"environment": {"HOME": "/x"}}), "its part run"),
    "with a run that is none": (
        lambda whole: whole.update(run={"machine": {"gpus": [{"name": []}, 3]}}),
        "its part run",
    ),
    "without rows": (lambda whole: whole.update(rows=[]), "aren't a list of 1 to"),
    "with rows that are none": (lambda whole: whole.update(rows=[1]), "aren't a list of 1 to"),
    "of another configuration": (first(gpu="h100"), "row 1: it is of gpu h100"),
    "with an unknown column": (first(strange=1), "unknown column strange"),
    "with text for a number": (first(latency_p50="fast"), "row 1: latency_p50"),
    "with a huge number": (first(latency_p50=1e300), "larger than any measurement"),
    "with a huge whole number": (first(steps=10**40), "larger than any measurement"),
    "with a huge number in its settings": (first(settings={"threshold": 10**400}), "larger than any measurement"),
    "with no time at all": (first(latency_p50=0.0), "allowed is what is above 0"),
    "with a speedup out of its interval": (first(speedup=9.0), "outside of its interval"),
    "with an id that is none": (first(id="<b>"), "10 hex digits"),
    "with one id twice": (lambda whole: whole["rows"][1].update(id=whole["rows"][0]["id"]), "have one id"),
    "with a baseline that isn't there": (first(baseline="f" * 10), "its baseline ffffffffff isn't there"),
    "with a host's name": (first(host="anna-laptop"), "its host isn't numbered"),
    "with two machines of one name": (first(kind="other"), "of another kind than before"),
    "with a long text": (first(label="x" * 5000), "longer than"),
    "with a character that can't be seen": (first(label="a\u202eb"), "U+202E"),
    "with a line break": (first(label="a\nb"), "U+000A"),
    "nested deeply": (first(settings={"a": json.loads("[" * 40 + "]" * 40)}), "nested too deeply"),
    "without a status": (first(status="fine"), "row 1: status"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_contribution_is_refused(root, capsys, bad):
    change, said = BAD[bad]
    assert said in refused(capsys, changed_file(packed(root), change))


def test_a_changed_file_is_refused(root, capsys):
    file = changed_file(packed(root), first(latency_p50=0.01), seal=False)
    assert "was changed since it was packed" in refused(capsys, file)


def test_a_file_with_a_token_is_refused(root, capsys):
    assert "looks like a token" in refused(capsys, changed_file(packed(root), first(label=TOKEN)))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\x03\x04\xff", b"\x1f\x8b\x08\x00", b"\xff\xfe{}", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1, "a": 2}',
        b"null", b"3", b'"text"', b'{"format": ' + b"9" * 5000 + b"}", b"id,label\n1,2\n", b'{"format": Infinity}',
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_contribution_is_refused(root, capsys, content):
    (root / "bad.json").write_bytes(content)
    assert "bad.json" in refused(capsys, root / "bad.json")


def test_an_archive_is_never_opened(root, capsys):
    with zipfile.ZipFile(root / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil.json", "0" * 10_000_000)
    assert "never an archive" in refused(capsys, root / "bad.zip")
    assert not (root.parent / "evil.json").exists() and not (root.parent.parent / "evil.json").exists()


def test_what_is_no_file_or_too_large_is_refused(root, capsys, monkeypatch):
    for name in ("gone.json", "reports"):
        assert "is no file" in refused(capsys, root / name)
    refused(capsys, root / ("x" * 300))
    os.mkfifo(root / "pipe")
    assert "is no file" in refused(capsys, root / "pipe")
    monkeypatch.setattr(contributed, "MOST_BYTES", 100)
    assert "MB where" in refused(capsys, packed(root))


def test_a_link_in_the_place_of_the_folder_is_not_followed(root, capsys, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (root / "reports/contributed").symlink_to(elsewhere)
    assert "is a link" in refused(capsys, packed(root)) and not list(elsewhere.iterdir())


def test_markup_in_a_cell_is_text_on_the_page(root, capsys):
    label = "<script>alert(1)</script>`**x**"
    change = lambda whole: [r.update(label=label, technique=r["technique"]) for r in whole["rows"]]  # noqa: E731
    merged(capsys, changed_file(packed(root, run={"machine": {"cpu": "<img src=x onerror=y>"}}), change))
    page = (root / "reports/contributed/index.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;img src=x" in page


def test_a_kept_file_that_was_damaged_is_said(root, capsys):
    merged(capsys, packed(root))
    (kept,) = (root / "reports/contributed").glob("*.json")
    kept.write_text(kept.read_text().replace("0.4", "0.1"))
    with pytest.raises(UserError, match="was changed since it was packed"):
        publish.for_programs(root)
