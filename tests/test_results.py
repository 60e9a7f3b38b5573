import csv
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from fluxnb.errors import UserError
from fluxnb.study import results
from fluxnb.study.results import Results
from fluxnb.study.row import COLUMNS, KEY, Row, row_id

KEY_OF_ROW = {
    "notebook": "05_first_block_cache",
    "technique": "first_block_cache",
    "settings": {"threshold": 0.2},
    "model": "embedded",
    "weights": "trained",
    "use_case": "txt2img",
    "gpu": "cpu",
    "gpus": 0,
    "width": 128,
    "height": 128,
    "steps": 28,
    "batch": 1,
    "users": 1,
    "images_each": 16,
    "seed": 0,
    "host": "0123456789ab",
    "versions": "torch 2.13.0 diffusers 0.42.1",
}
ROW = {
    **KEY_OF_ROW,
    "status": "ok",
    "n": 3,
    "latency_p50": 0.1 + 0.2,
    "computed_steps": 6.5,
    "total_steps": 28,
    "psnr_identical": 0,
    "samples": [0.1, 0.2, 1 / 3],
    "measured_at": "2026-11-20T12:00:00+00:00",
    "run_id": "run-1",
}


def row(**changes):
    return {**ROW, **changes}


def settings(threshold):
    return {"settings": {"threshold": threshold}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reports" / "single_gpu" / "cpu" / "results.csv"


@pytest.fixture
def table(path):
    return Results(path)


@pytest.fixture
def filled(table):
    """A table with three rows, thresholds 0, 1 and 2."""
    for i in range(3):
        table.append(row(**settings(i), latency_avg=i + 0.5))
    return table


def test_the_columns_and_their_order():
    assert ",".join(COLUMNS) == (
        "id,label,mark,notebook,family,technique,stack,exact,settings,model,weights,use_case,gpu,gpus,width,height,"
        "steps,batch,users,images_each,seed,status,reason,n,latency_min,latency_p25,latency_p50,latency_p90,"
        "latency_p99,latency_avg,load_s,warmup_s,first_s,stable,text_s,denoise_s,vae_s,images_per_s,memory_load_gib,"
        "memory_avg_gib,memory_peak_gib,gpu_util_avg,gpu_memory_avg_pct,speedup,speedup_ci_low,speedup_ci_high,baseline_p50,"
        "computed_steps,total_steps,images,psnr_db,psnr_min_db,psnr_identical,ssim,ssim_min,st_lpips,st_lpips_max,flip,"
        "flip_max,clip_score,clip_score_min,adherence,adherence_min,"
        "psnr_inside_db,psnr_outside_db,kept_db,kept_vae_db,agreement,telemetry,samples,again,proof,baseline,session,"
        "host,kind,commit,code,versions,measured_at,run_id"
    )
    assert ",".join(KEY) == (
        "notebook,technique,stack,settings,model,weights,use_case,gpu,gpus,width,height,steps,batch,users,images_each,"
        "seed,host,versions"
    )


def without(data: bytes, *gone: str) -> bytes:
    """A table without these columns: what an earlier version wrote."""
    parsed = list(csv.reader(data.decode().splitlines()))
    places = [i for i, name in enumerate(parsed[0]) if name not in gone]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[cells[i] for i in places] for cells in parsed])
    return text.getvalue().encode()


def test_a_table_of_an_earlier_version_is_brought_up_to_date(table, path):
    table.append(row(**settings(0), latency_avg=1.25))
    lines = path.read_text().splitlines()
    path.write_bytes(without(path.read_bytes(), "proof", "memory_load_gib", "id"))
    reader = Results(path)
    assert reader.rows() == [dataclasses.replace(table.rows()[0], id=reader.rows()[0].id)]
    assert reader.rows()[0].latency_avg == 1.25 and reader.rows()[0].id == row_id(reader.rows()[0].as_dict())
    assert path.read_text().splitlines() == [line.replace(table.rows()[0].id, reader.rows()[0].id) for line in lines]
    assert Results(path).rows() == reader.rows()
    reader.append(row(**settings(1)))
    assert len(Results(path).rows()) == 2 and os.listdir(path.parent) == ["results.csv"]


def test_a_table_that_could_not_be_replaced_is_whole(filled, path, monkeypatch):
    """As after a kill between writing the new table beside the old one and putting it in its place."""
    older = without(path.read_bytes(), "proof", "telemetry")
    path.write_bytes(older)
    seen = []

    def killed(beside, place):
        seen.append((beside.read_bytes().count(b"\n"), place))
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Results(path).rows()
    assert seen == [(4, path)] and path.read_bytes() == older
    monkeypatch.undo()
    assert len(Results(path).rows()) == 3 and path.read_bytes().startswith(",".join(COLUMNS).encode())


def test_a_folder_that_may_not_be_written_in_has_its_earlier_table_read(filled, path, monkeypatch):
    older = without(path.read_bytes(), "proof")
    path.write_bytes(older)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results.os, "replace", refused)
    assert len(Results(path).rows()) == 3
    assert path.read_bytes() == older and os.listdir(path.parent) == ["results.csv"]


def test_what_is_appended_while_the_table_is_upgraded_is_not_lost(filled, path, monkeypatch):
    """Another process waits for the old file's lock, and has to see that it isn't the table any more."""
    path.write_bytes(without(path.read_bytes(), "proof"))
    replaced, other = os.replace, Results(path)
    writer = threading.Thread(target=lambda: other.append(row(**settings(9))))

    def beside(new, place):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()  # the old table is locked
        replaced(new, place)
        writer.join(0.3)
        assert writer.is_alive()  # and so is the new one

    monkeypatch.setattr(results.os, "replace", beside)
    assert len(Results(path).rows()) == 3
    writer.join(10)
    assert [r.settings["threshold"] for r in Results(path).rows()] == [0, 1, 2, 9]


def test_a_row_that_was_written_and_read_is_the_same(table, path):
    written = table.append(row(again=[0.1, 0.2, 0.3], label="FBCache 0.2", stable=1, telemetry={"throttled": False}))
    (read,) = Results(path).rows()
    assert read == written and dataclasses.asdict(read) == dataclasses.asdict(written)
    assert isinstance(read, Row) and read.ok and read.setting("threshold") == 0.2 and read.setting("none") is None
    assert (read.shown("kernels"), read.shown("kernels", 1)) == (None, 1)


def test_an_id_is_that_of_what_determines_the_row(table, path):
    first = table.append(ROW)
    assert re.fullmatch("[0-9a-f]{10}", first.id) and first.id == row_id(first.as_dict())
    assert Results(path).rows()[0].id == first.id
    for name, value in {"steps": 27, "measured_at": "2026-11-20T12:00:01+00:00", "run_id": "r", "commit": "c"}.items():
        assert row_id({**first.as_dict(), name: value}) != first.id
    assert row_id({**first.as_dict(), "latency_p50": 9.0, "label": "another"}) == first.id
    same = [table.append({**ROW, "settings": {"threshold": np.float64(0.2)}}) for _ in range(3)]
    assert len({first.id, *(r.id for r in same)}) == 4  # of two in one second, too
    assert [r.id for r in Results(path).rows()] == [first.id, *(r.id for r in same)]


@pytest.mark.parametrize("column", ["proof", "telemetry"])
def test_what_has_parts_is_kept(table, column):
    table.append(row(**settings(0), **{column: {"layers": 104, "of": 120}}))
    found = getattr(table.rows()[0], column)
    assert found == {"layers": 104, "of": 120}
    with pytest.raises(ValueError, match="allowed is a dict"):
        table.append(row(**settings(1), **{column: [1]}))


def test_what_is_appended_is_found_unrounded(table, path):
    table.append(ROW)
    for reader in (table, Results(path)):  # from memory and from the file
        found = reader.find(KEY_OF_ROW)
        assert list(found.as_dict()) == list(COLUMNS)
        assert {k: v for k, v in found.as_dict().items() if v is not None and k != "id"} == ROW
        assert found.samples[2] == 1 / 3 and found.latency_p50 == 0.1 + 0.2
        assert found.latency_p99 is None


def test_a_table_without_a_file_is_empty(table, path):
    assert table.find(KEY_OF_ROW) is None and table.rows() == []
    assert not path.parent.exists()  # looking makes nothing


@pytest.mark.parametrize("column", KEY)
def test_every_key_column_tells_rows_apart(table, column):
    table.append(ROW)
    other = {"settings": {"threshold": 0.3}, "weights": "random"}.get(column)
    if other is None:
        own = ROW.get(column, "")
        other = own + (1 if isinstance(own, int) else "x")
    assert table.find({**KEY_OF_ROW, column: other}) is None
    table.append(row(**{column: other}))
    assert table.find({**KEY_OF_ROW, column: other}).as_dict()[column] == other


def test_a_row_of_another_machine_or_version_is_not_found(table):
    table.append(ROW)
    assert table.find({**KEY_OF_ROW, "host": "ffffffffffff"}) is None
    assert table.find({**KEY_OF_ROW, "versions": "torch 2.14.0 diffusers 0.42.1"}) is None
    assert table.find(KEY_OF_ROW) is not None


def test_settings_are_compared_by_value(table):
    table.append(row(settings={"b": 1, "a": {"y": 0.0, "x": np.float64(0.1)}}))
    assert table.find({**KEY_OF_ROW, "settings": {"a": {"x": 0.1, "y": 0}, "b": 1.0}}) is not None
    assert table.find({**KEY_OF_ROW, "settings": {"a": {"x": 0.1, "y": 0}, "b": True}}) is None


def test_columns_left_out_of_the_key_are_empty_in_both(table):
    short = {k: KEY_OF_ROW[k] for k in ("notebook", "technique", "gpu", "host", "versions")}
    short["weights"] = "random"
    table.append({**short, "status": "ok"})
    assert table.find(short).settings == {}
    assert table.find({**short, "seed": 0}) is None


@pytest.mark.parametrize("column", ["notebook", "technique", "gpu", "host", "versions"])
def test_a_key_without_its_machine_would_find_strangers(table, column):
    with pytest.raises(ValueError, match=f"{column} is empty"):
        table.find({k: v for k, v in KEY_OF_ROW.items() if k != column})
    if column != "host":  # the reference's rows of before have none
        with pytest.raises(ValueError, match=f"{column} is empty"):
            table.append(row(**{column: ""}))


def test_find_takes_key_columns_only(table):
    with pytest.raises(ValueError, match="not part of the key: run_id"):
        table.find({**KEY_OF_ROW, "run_id": "run-1"})


def test_the_newest_finished_row_is_found(table, path):
    table.append(row(run_id="1"))
    table.append(row(run_id="2"))
    table.append(row(run_id="3", status="error", reason="a crash"))
    for reader in (table, Results(path)):
        assert reader.find(KEY_OF_ROW).run_id == "2"


@pytest.mark.parametrize("status, done", [("ok", True), ("oom", True), ("unavailable", True), ("error", False)])
def test_an_error_is_measured_again(table, status, done):
    table.append(row(status=status, reason="needs more memory"))
    assert (table.find(KEY_OF_ROW) is not None) == done


def test_what_is_found_cannot_be_changed(table):
    table.append(ROW)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.find(KEY_OF_ROW).status = "oom"
    assert dataclasses.replace(table.find(KEY_OF_ROW), status="oom") != table.find(KEY_OF_ROW)


def test_an_error_is_shown_where_there_is_nothing_else(table):
    table.append(row(status="error", reason="first"))
    table.append(row(status="error", reason="second"))
    assert table.find(KEY_OF_ROW) is None and table.find(KEY_OF_ROW, errors=True).reason == "second"
    table.append(ROW)
    table.append(row(status="error", reason="third"))
    assert table.find(KEY_OF_ROW, errors=True).ok


def test_a_row_of_changed_code_is_found_by_those_only_who_do_not_mind(table):
    table.append(row(code="before", run_id="1"))
    assert table.find(KEY_OF_ROW, code="after") is None and table.find(KEY_OF_ROW).run_id == "1"
    table.append(row(code="after", run_id="2"))
    assert table.find(KEY_OF_ROW, code="after").run_id == "2" and table.find(KEY_OF_ROW, code="before").run_id == "1"


def test_a_replay_finds_rows_of_any_machine_and_versions(table):
    table.append(row(host="elsewhere", versions="torch 1.0"))
    assert table.find(KEY_OF_ROW) is None
    assert table.find(KEY_OF_ROW, anywhere=True).host == "elsewhere"
    assert table.find({**KEY_OF_ROW, "steps": 27}, anywhere=True) is None


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"latency": 1.0}, "unknown column latency"),
        ({"status": "failed"}, "status is 'failed'"),
        ({"status": None}, "status is None"),
        ({"status": "oom"}, "oom needs a reason"),
        ({"status": "error", "reason": " \n"}, "error needs a reason"),
        ({"weights": "real"}, "weights is 'real'"),
        ({"weights": None}, "weights is None"),
        ({"steps": 28.5}, "steps is 28.5"),
        ({"steps": "28"}, "steps is '28'"),
        ({"steps": True}, "steps is True"),
        ({"steps": math.inf}, "steps is inf"),
        ({"ssim": math.nan}, "ssim is nan"),
        ({"latency_p50": math.inf}, "latency_p50 is inf"),
        ({"latency_p50": "0.3"}, "latency_p50 is '0.3'"),
        ({"psnr_db": math.nan}, "psnr_db is nan"),
        ({"psnr_db": -math.inf, "psnr_identical": 1}, "psnr_db is -inf"),
        ({"psnr_db": math.inf}, "count the identical images in psnr_identical"),
        ({"psnr_min_db": np.float64("inf")}, "count the identical images in psnr_identical"),
        ({"samples": [0.1, math.nan]}, "samples is nan"),
        ({"settings": {"a": math.nan}}, "not JSON compliant"),
        ({"settings": {"a": {1, 2}}}, "cannot be written as JSON"),
        ({"settings": {1: 2}}, "names of settings are text"),
        ({"settings": [1]}, "allowed is a dict"),
        ({"measured_at": "2026-11-20T12:00:00"}, "with its zone"),
        ({"measured_at": "yesterday"}, "yesterday"),
        ({"gpu": 7}, "gpu is 7"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_and_nothing_is_written(table, path, changes, part):
    with pytest.raises(ValueError, match=part):
        table.append(row(**changes))
    assert not path.exists()


def test_infinite_psnr_is_never_written(table, path):
    table.append(row(psnr_db=math.inf, psnr_min_db=math.inf, psnr_identical=16))
    found = Results(path).find(KEY_OF_ROW)
    assert (found.psnr_db, found.psnr_min_db, found.psnr_identical) == (None, None, 16)
    assert "inf" not in path.read_text().split("\n")[1]


def test_numpy_numbers_are_written_as_numbers(table, path):
    table.append(row(steps=np.int64(28), ssim=np.float64(0.1), samples=np.array([0.1, 0.2])))
    found = Results(path).find(KEY_OF_ROW)
    assert found.ssim == 0.1 and found.samples == [0.1, 0.2] and "np." not in path.read_text()


def test_text_of_several_lines_becomes_one(table, path):
    reason = 'first, "quoted"\r\nsecond; ünï 😀\u2028third\x00'
    table.append(row(status="error", reason=reason))
    assert path.read_bytes().count(b"\n") == 2
    assert Results(path).rows()[0].reason == 'first, "quoted" second; ünï 😀 third'


def test_many_samples_fit_into_one_row(table, path):
    samples = [1 / (i + 3) for i in range(20_000)]  # longer than the csv module's usual limit of a field
    table.append(row(samples=samples))
    assert Results(path).find(KEY_OF_ROW).samples == samples


def test_time_is_taken_as_datetime_too(table):
    moment = datetime(2026, 11, 20, 13, tzinfo=timezone(timedelta(hours=1)))
    written = table.append(row(measured_at=moment))
    assert datetime.fromisoformat(written.measured_at) == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert datetime.fromisoformat(results.now()).tzinfo is not None


def test_an_unfinished_last_line_is_moved_away_and_measuring_goes_on(filled, path):
    whole = path.read_bytes()
    partial = whole.split(b"\n")[1][:40]
    path.write_bytes(whole + partial)
    again = Results(path)
    assert len(again.rows()) == 3
    assert path.read_bytes() == whole
    assert path.with_name("results.csv.partial").read_bytes() == partial + b"\n"
    path.write_bytes(whole + b'"another')
    filled.append(row(**settings(9)))  # found by append as well, in a table that was open before
    assert len(Results(path).rows()) == 4
    assert path.with_name("results.csv.partial").read_bytes() == partial + b'\n"another\n'


def test_an_unfinished_line_cut_inside_a_letter(table, path):
    table.append(ROW)
    whole = path.read_bytes()
    path.write_bytes(whole + "ünï".encode()[:1])
    assert len(Results(path).rows()) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize("length", [0, 1, 40, len(",".join(COLUMNS))])
def test_an_unfinished_header_is_written_again(table, path, length):
    path.parent.mkdir(parents=True)
    path.write_text(",".join(COLUMNS)[:length])
    table.append(ROW)
    assert path.read_text().split("\n")[0] == ",".join(COLUMNS)
    assert len(Results(path).rows()) == 1


def damage(line, change):
    def damaged(data):
        lines = data.split(b"\n")
        lines[line - 1] = change(lines[line - 1])
        return b"\n".join(lines)

    return damaged


@pytest.mark.parametrize(
    "damaged, parts",
    [
        (damage(1, lambda header: b"x" + header), ["line 1 is not the header"]),
        (damage(1, lambda header: header.replace(b",steps,", b",", 1)), ["line 1 is not the header"]),
        (damage(1, lambda header: header.replace(b"n,latency_min", b"latency_min,n", 1)), ["line 1 is not the header"]),
        (damage(1, lambda header: header.replace(b"kind,", b"kind,kind,", 1)), ["line 1 is not the header"]),
        (damage(1, lambda header: b"\xff\xfe" + header), ["line 1 begins with UTF-16's mark"]),
        (
            damage(3, lambda row: row.rsplit(b",", 1)[0]),
            [f"line 3 has {len(COLUMNS) - 1} fields instead of {len(COLUMNS)}"],
        ),
        (damage(3, lambda row: row + b",x"), [f"line 3 has {len(COLUMNS) + 1} fields instead of {len(COLUMNS)}"]),
        (damage(3, lambda row: b""), ["line 3 has 0 fields"]),
        (damage(3, lambda row: row[:50]), ["line 3 "]),
        (damage(2, lambda row: row.replace(b",run-1", b',"run-1')), ["line 2 has a quotation mark"]),
        (damage(3, lambda row: row.replace(b",128,", b",12x8,", 1)), ["line 3", "width is '12x8'"]),
        (damage(3, lambda row: row.replace(b",1.5,", b",nan,", 1)), ["line 3", "latency_avg is 'nan'"]),
        (damage(3, lambda row: row.replace(b",1.5,", b",inf,", 1)), ["line 3", "latency_avg is 'inf'"]),
        (damage(3, lambda row: row.replace(b",ok,", b",fine,", 1)), ["line 3", "status is 'fine'"]),
        (damage(3, lambda row: row.replace(b"trained", b"traint", 1)), ["line 3", "weights is 'traint'"]),
        (
            damage(3, lambda row: row.replace(b'""threshold"":', b'""threshold""', 1)),
            ["line 3", "settings is"],
        ),
        (damage(3, lambda row: row.replace(b"2026-11-20", b"2026-13-20")), ["line 3", "measured_at is"]),
        (damage(3, lambda row: row.replace(b"run-1", b"run\0-1")), ["line 3", "run_id has a zero byte"]),
        (damage(3, lambda row: row[:10] + b"\x80\x81" + row[12:]), ["line 3 is not text"]),
        (damage(4, lambda row: row + b"\n" + bytes(4096)[:100] + b"\n"), ["line 5 has 1 fields"]),
        (lambda data: bytes(range(256)) * 20, ["line 1 is not the header"]),
        (lambda data: b"\xef\xbb\xbf" + data, ["line 1 begins with a byte order mark (save it as UTF-8 without one)"]),
        (lambda data: data.replace(b"\n", b"\r"), ["line 1 ends with a carriage return alone"]),
        (
            damage(3, lambda row: row.replace(b'""threshold"":', b'""a"":1e400,""threshold"":', 1)),
            ["line 3", "settings is"],
        ),
        (
            damage(3, lambda row: row.replace(b'""threshold"":', b'""a"":NaN,""threshold"":', 1)),
            ["line 3", "settings is"],
        ),
        (
            damage(
                3,
                lambda row: row.replace(b'""threshold"":', b'""a"":' + b"[" * 900 + b"]" * 900 + b',""threshold"":', 1),
            ),
            ["line 3", "settings is"],
        ),
        (
            damage(3, lambda row: row.replace(b'""threshold"":', b'""a"":""\\ud800"",""threshold"":', 1)),
            ["line 3", "settings is"],
        ),
        (damage(2, lambda row: row.replace(b",128,", b",1_28,", 1)), ["line 2", "width is '1_28'"]),
        (lambda data: b"\x89PNG garbage without an end of line", ["line 1 is not the header"]),
        (lambda data: b"<<<<<<< HEAD\n" + data, ["line 1 is not the header"]),
    ],
)
def test_a_damaged_file_is_named_with_its_line_and_left_alone(filled, path, damaged, parts):
    data = damaged(path.read_bytes())
    path.write_bytes(data)
    for use in (
        lambda: Results(path).find(KEY_OF_ROW),
        lambda: Results(path).rows(),
        lambda: Results(path).append(row()),
        lambda: filled.append(row()),  # damaged while it was open
    ):
        with pytest.raises(UserError) as caught:
            use()
        sentence = str(caught.value)
        for part in (str(path), *parts, "move the file away or restore it from git; nothing was changed."):
            assert part in sentence
        assert "\n" not in sentence
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["results.csv"]


def test_a_damaged_file_with_an_unfinished_line_is_left_alone_too(filled, path):
    data = path.read_bytes().replace(b",ok,", b",fine,", 1) + b"unfinished"
    path.write_bytes(data)
    with pytest.raises(UserError, match="line 2"):
        Results(path).rows()
    assert path.read_bytes() == data and os.listdir(path.parent) == ["results.csv"]


def test_line_ends_of_windows_are_read(filled, path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(Results(path).rows()) == 3


def test_a_folder_in_place_of_the_file(table, path):
    path.mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        table.rows()
    with pytest.raises(UserError, match="cannot be written"):
        table.append(ROW)


def test_a_full_disk_leaves_no_half_line(filled, path, monkeypatch):
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(results.os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(UserError, match="cannot be written: No space left"):
        filled.append(row(**settings(9)))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert filled.find({**KEY_OF_ROW, **settings(9)}) is None


def test_a_file_that_may_only_be_read_is_read(filled, path, monkeypatch):
    path.write_bytes(path.read_bytes() + b"unfinished")
    data = path.read_bytes()
    opened = os.open

    def read_only(name, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(name, flags, *mode)

    monkeypatch.setattr(results.os, "open", read_only)
    assert len(Results(path).rows()) == 3
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        Results(path).append(ROW)
    assert path.read_bytes() == data


def test_what_another_process_appends_is_found(filled, path):
    assert filled.find({**KEY_OF_ROW, **settings(9)}) is None
    Results(path).append(row(**settings(9)))
    assert filled.find({**KEY_OF_ROW, **settings(9)}) is not None
    path.unlink()
    assert filled.rows() == []


WRITER = """
import json, sys
from fluxnb.study.results import Results
table, row = Results(sys.argv[1]), json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
    table.append({**row, "seed": i, "run_id": sys.argv[3], "reason": sys.argv[3] * 3000})
"""


def test_two_processes_append_whole_lines(path):
    command = [sys.executable, "-c", WRITER, str(path), json.dumps(ROW)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "AB"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both start at once
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    rows = Results(path).rows()
    assert sorted((r.run_id, r.seed) for r in rows) == [(n, i) for n in "AB" for i in range(60)]
    assert path.read_text().count("id,label,mark") == 1


def test_a_writer_waits_for_the_lock(filled, path):
    fcntl = pytest.importorskip("fcntl")
    before = path.read_bytes()
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=filled.append, args=[row(**settings(9))])
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and path.read_bytes() == before
    writer.join(10)
    assert len(Results(path).rows()) == 4


def test_appending_does_not_read_the_file_again(table, monkeypatch):
    parsed = []
    parse = table._parsed
    monkeypatch.setattr(table, "_parsed", lambda *args: parsed.append(1) or parse(*args))
    for i in range(5):
        table.append(row(seed=i))
        assert table.find({**KEY_OF_ROW, "seed": i}) is not None
    assert len(parsed) == 1


def test_each_row_is_synced_to_the_disk_in_one_write(table, monkeypatch):
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(results.os, "write", lambda fd, data: calls.append(bytes(data)) or write(fd, data))
    monkeypatch.setattr(results.os, "fsync", lambda fd: calls.append("sync") or fsync(fd))
    table.append(ROW)
    table.append(row(seed=1))
    assert [c if c == "sync" else c.count(b"\n") for c in calls] == [2, "sync", 1, "sync"]


def test_ten_thousand_rows_are_read_fast(table, path):
    first = table.append(ROW)
    header, line = path.read_text().splitlines()
    needle = ",28,1,1,16,0,ok"
    assert line.count(needle) == 1
    lines = [line.replace(needle, f",{i},1,1,16,0,ok").replace(first.id, f"{i:010}") for i in range(10_000)]
    path.write_text("\n".join([header, *lines]) + "\n")
    reader = Results(path)
    start = time.perf_counter()
    assert reader.find({**KEY_OF_ROW, "steps": 9_999}) is not None
    took = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(100):
        assert reader.find({**KEY_OF_ROW, "steps": i}).steps == i
    again = time.perf_counter() - start
    assert took < 10 and again < 1  # about 1 s and 0.1 s on an idle machine; this one may be busy


def test_tables_of_several_machines_merge_without_loss(tmp_path):
    here, there = Results(tmp_path / "here.csv"), Results(tmp_path / "there.csv")
    shared = here.append(row(technique="shared"))
    there.append(shared.as_dict())
    base = there.append(row(technique="other", host="another"))
    there.append(row(technique="over it", host="another", baseline=base.id))
    there.append(row(technique="failed", status="error", reason="no"))
    assert here.merge(there.path) == 3 and here.merge(there.path) == 0
    assert [r.technique for r in here.rows()] == ["shared", "other", "over it", "failed"]
    assert here.rows() == there.rows() == Results(here.path).rows()


# --- tables that don't fit --------------------------------------------------------------------------------------

FIRST_FORMAT = "notebook,technique,settings,model,weights,gpu,status,samples,machine,versions,measured_at,run_id\n"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda data: FIRST_FORMAT.encode() + b"05,x,{},embedded,trained,cpu,ok,[],m,v,,r\n",
         "is a table of fluxnb's first format, which this version does not read: move it away"),
        (damage(1, lambda header: header + b",lpips"),
         "was written by a newer fluxnb, with columns this one does not know (lpips): update fluxnb"),
        (lambda data: data.replace(b",run-2", b",run-2", 1).replace(b",aaaaaaaaaa,", b",bbbbbbbbbb,"),
         "line 4 has a speedup over the baseline bbbbbbbbbb, which isn't there"),
        (lambda data: data.replace(b",kind-1,", b",kind-2,", 1),
         "line 3 has a machine called 0123456789ab of another kind than the one of that name before it"),
    ],
    ids=["first format", "newer", "no baseline", "two machines of one name"],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_one_sentence_and_nothing_is_lost(table, path, change, said):
    table.append(row(id="aaaaaaaaaa", kind="kind-1"))
    table.append(row(seed=1, kind="kind-1"))
    table.append(row(seed=2, kind="kind-1", run_id="run-2", baseline="aaaaaaaaaa"))
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    for use in (
        lambda: Results(path).rows(),
        lambda: Results(path).append(ROW),
        lambda: Results(path).find(KEY_OF_ROW),
    ):
        with pytest.raises(UserError) as caught:
            use()
        assert said in str(caught.value) and str(caught.value).endswith("nothing was changed.")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == data and os.listdir(path.parent) == ["results.csv"]


def test_a_second_machine_of_one_name_is_refused_before_anything_is_written(table, path, tmp_path):
    table.append(row(host="lab", kind="laptop"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="^Another kind of machine has the name lab in .* HOST=name; nothing was"):
        table.append(row(host="lab", kind="workstation", seed=1))
    other = Results(tmp_path / "other.csv")
    other.append(row(host="another", kind="laptop", seed=1))
    other.append(row(host="lab", kind="workstation", seed=1))
    with pytest.raises(UserError, match="Another kind of machine has the name lab"):
        table.merge(other.path)
    assert path.read_bytes() == before and len(Results(path).rows()) == 1


def test_a_row_over_a_baseline_that_is_not_there_is_not_written(table, path):
    with pytest.raises(ValueError, match="baseline 0000000000 is no row of"):
        table.append(row(baseline="0000000000"))
    assert Results(path).rows() == []
