import csv
import json
import math
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from fluxnb.errors import UserError
from fluxnb.study import results
from fluxnb.study.results import COLUMNS, KEY, Results

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
    "images": 16,
    "seed": 0,
    "machine": "0123456789ab",
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
        "notebook,technique,settings,model,weights,use_case,gpu,gpus,width,height,steps,batch,users,images,status,"
        "reason,n,latency_min,latency_p25,latency_p50,latency_p90,latency_p99,latency_avg,load_s,warmup_s,first_s,"
        "text_s,denoise_s,vae_s,images_per_s,memory_load_gib,memory_avg_gib,memory_peak_gib,gpu_util_avg,gpu_memory_avg_pct,"
        "speedup,speedup_ci_low,speedup_ci_high,computed_steps,total_steps,psnr_db,psnr_min_db,psnr_identical,ssim,ssim_min,"
        "adherence,adherence_min,psnr_inside_db,psnr_outside_db,kept_db,kept_vae_db,agreement,telemetry,"
        "seed,samples,proof,machine,versions,measured_at,run_id"
    )


def test_a_table_of_an_earlier_version_is_brought_up_to_date(table, path):
    table.append(row(**settings(0), latency_avg=1.25))
    gone = [i for i, name in enumerate(COLUMNS) if name in ("proof", "memory_load_gib")]
    lines = path.read_text().splitlines()
    parsed = [next(csv.reader([line])) for line in lines]
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[c for i, c in enumerate(p) if i not in gone] for p in parsed])
    before = path.read_bytes()
    reader = Results(path)
    assert reader.rows() == table.rows() and reader.rows()[0]["latency_avg"] == 1.25
    assert path.read_text().splitlines() == lines
    assert path.with_name(path.name + ".older").read_bytes() == before
    reader.append(row(**settings(1)))
    assert len(Results(path).rows()) == 2


@pytest.mark.parametrize("column", ["proof", "telemetry"])
def test_what_has_parts_is_kept(table, column):
    table.append(row(**settings(0), **{column: {"layers": 104, "of": 120}}))
    found = table.rows()[0][column]
    assert found == {"layers": 104, "of": 120}
    with pytest.raises(ValueError, match="allowed is a dict"):
        table.append(row(**settings(1), **{column: [1]}))


def test_what_is_appended_is_found_unrounded(table, path):
    table.append(ROW)
    for reader in (table, Results(path)):  # from memory and from the file
        found = reader.find(KEY_OF_ROW)
        assert list(found) == list(COLUMNS)
        assert {k: v for k, v in found.items() if v is not None} == ROW
        assert found["samples"][2] == 1 / 3 and found["latency_p50"] == 0.1 + 0.2
        assert found["latency_p99"] is None


def test_a_table_without_a_file_is_empty(table, path):
    assert table.find(KEY_OF_ROW) is None and table.rows() == [] and len(table.frame()) == 0
    assert list(table.frame().columns) == list(COLUMNS)
    assert not path.parent.exists()  # looking makes nothing


@pytest.mark.parametrize("column", KEY)
def test_every_key_column_tells_rows_apart(table, column):
    table.append(ROW)
    other = {"settings": {"threshold": 0.3}, "weights": "random"}.get(column)
    if other is None:
        other = ROW[column] + (1 if isinstance(ROW[column], int) else "x")
    assert table.find({**KEY_OF_ROW, column: other}) is None
    table.append(row(**{column: other}))
    assert table.find({**KEY_OF_ROW, column: other})[column] == other


def test_a_row_of_another_machine_or_version_is_not_found(table):
    table.append(ROW)
    assert table.find({**KEY_OF_ROW, "machine": "ffffffffffff"}) is None
    assert table.find({**KEY_OF_ROW, "versions": "torch 2.14.0 diffusers 0.42.1"}) is None
    assert table.find(KEY_OF_ROW) is not None


def test_settings_are_compared_by_value(table):
    table.append(row(settings={"b": 1, "a": {"y": 0.0, "x": np.float64(0.1)}}))
    assert table.find({**KEY_OF_ROW, "settings": {"a": {"x": 0.1, "y": 0}, "b": 1.0}}) is not None
    assert table.find({**KEY_OF_ROW, "settings": '{"a": {"x": 0.1, "y": 0}, "b": 1}'}) is not None
    assert table.find({**KEY_OF_ROW, "settings": {"a": {"x": 0.1, "y": 0}, "b": True}}) is None


def test_columns_left_out_of_the_key_are_empty_in_both(table):
    short = {k: KEY_OF_ROW[k] for k in ("notebook", "technique", "gpu", "machine", "versions")}
    short["weights"] = "random"
    table.append({**short, "status": "ok"})
    assert table.find(short)["settings"] == {}
    assert table.find({**short, "seed": 0}) is None


@pytest.mark.parametrize("column", ["notebook", "technique", "gpu", "machine", "versions"])
def test_a_key_without_its_machine_would_find_strangers(table, column):
    with pytest.raises(ValueError, match=f"{column} is empty"):
        table.find({k: v for k, v in KEY_OF_ROW.items() if k != column})
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
        assert reader.find(KEY_OF_ROW)["run_id"] == "2"


@pytest.mark.parametrize("status, done", [("ok", True), ("oom", True), ("unavailable", True), ("error", False)])
def test_an_error_is_measured_again(table, status, done):
    table.append(row(status=status, reason="needs more memory"))
    assert (table.find(KEY_OF_ROW) is not None) == done


def test_what_is_found_may_be_changed(table):
    table.append(ROW)
    found = table.find(KEY_OF_ROW)
    found["settings"]["threshold"] = 9
    found["samples"].clear()
    assert table.find(KEY_OF_ROW)["settings"] == {"threshold": 0.2}
    assert len(table.find(KEY_OF_ROW)["samples"]) == 3


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
    assert (found["psnr_db"], found["psnr_min_db"], found["psnr_identical"]) == (None, None, 16)
    assert "inf" not in path.read_text().split("\n")[1]


def test_numpy_numbers_are_written_as_numbers(table, path):
    table.append(row(steps=np.int64(28), ssim=np.float64(0.1), samples=np.array([0.1, 0.2])))
    found = Results(path).find(KEY_OF_ROW)
    assert found["ssim"] == 0.1 and found["samples"] == [0.1, 0.2] and "np." not in path.read_text()


def test_text_of_several_lines_becomes_one(table, path):
    reason = 'first, "quoted"\r\nsecond; ünï 😀\u2028third\x00'
    table.append(row(status="error", reason=reason))
    assert path.read_bytes().count(b"\n") == 2
    assert Results(path).rows()[0]["reason"] == 'first, "quoted" second; ünï 😀 third'


def test_many_samples_fit_into_one_row(table, path):
    samples = [1 / (i + 3) for i in range(20_000)]  # longer than the csv module's usual limit of a field
    table.append(row(samples=samples))
    assert Results(path).find(KEY_OF_ROW)["samples"] == samples


def test_time_is_taken_as_datetime_too(table):
    moment = datetime(2026, 11, 20, 13, tzinfo=timezone(timedelta(hours=1)))
    table.append(row(measured_at=moment))
    assert table.frame()["measured_at"][0] == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert datetime.fromisoformat(results.now()).tzinfo is not None


def test_frame_has_proper_types(filled):
    frame = filled.frame()
    assert len(frame) == 3 and list(frame.columns) == list(COLUMNS)
    assert str(frame["steps"].dtype) == "Int64" and str(frame["latency_p50"].dtype) == "float64"
    assert str(frame["measured_at"].dtype).startswith("datetime64[") and "UTC" in str(frame["measured_at"].dtype)
    assert frame["reason"].isna().all() and frame["latency_p99"].isna().all()
    assert frame["settings"].tolist() == ['{"threshold":0}', '{"threshold":1}', '{"threshold":2}']
    assert json.loads(frame["samples"][0]) == ROW["samples"]
    assert results.setting(frame, "threshold").tolist() == [0, 1, 2]
    assert results.setting(frame, "order").isna().all()


def test_frame_keeps_the_rows_that_are_asked_for(filled):
    filled.append(row(gpu="h200", users=None))
    assert len(filled.frame(gpu="cpu")) == 3
    assert filled.frame(settings={"threshold": 1.0})["latency_avg"].tolist() == [1.5]
    assert filled.frame(users=None)["gpu"].tolist() == ["h200"]
    assert len(filled.frame(gpu="cpu", steps=50)) == 0
    with pytest.raises(ValueError, match="unknown column thresold"):
        filled.frame(thresold=1)


def test_frame_shows_the_newest_row_of_each_key(filled):
    filled.append(row(**settings(1), latency_avg=9.0))
    assert filled.frame()["latency_avg"].tolist() == [0.5, 2.5, 9.0]
    filled.append(row(**settings(1), status="error", reason="a crash"))
    assert filled.frame(status="ok")["latency_avg"].tolist() == [0.5, 2.5, 9.0]
    filled.append(row(**settings(7), status="error", reason="first crash"))
    filled.append(row(**settings(7), status="error", reason="second crash"))
    assert filled.frame(status="error")["reason"].tolist() == ["second crash"]
    filled.append(row(**settings(7), latency_avg=7.5))
    assert len(filled.frame(status="error")) == 0 and len(filled.frame()) == 4
    assert len(filled.rows()) == 8  # the file keeps them all


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
        (
            damage(1, lambda header: header.replace(b",steps,", b",", 1)),
            ["line 1 is not the header", "lacks steps"],
        ),
        (damage(1, lambda header: header + b",lpips"), ["line 1 is not the header", "does not know lpips"]),
        (damage(1, lambda header: b"\xff\xfe" + header), ["line 1 is not the header"]),
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
        (lambda data: b"\x89PNG garbage without an end of line", ["line 1 is not the header"]),
        (lambda data: b"<<<<<<< HEAD\n" + data, ["line 1 is not the header"]),
    ],
)
def test_a_damaged_file_is_named_with_its_line_and_left_alone(filled, path, damaged, parts):
    data = damaged(path.read_bytes())
    path.write_bytes(data)
    for use in (
        lambda: Results(path).find(KEY_OF_ROW),
        lambda: Results(path).frame(),
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
    assert sorted((r["run_id"], r["seed"]) for r in rows) == [(n, i) for n in "AB" for i in range(60)]
    assert path.read_text().count("notebook,technique") == 1


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
    table.append(ROW)
    header, line = path.read_text().splitlines()
    needle = ",28,1,1,16,ok"
    assert line.count(needle) == 1
    lines = [line.replace(needle, f",{i},1,1,16,ok") for i in range(10_000)]
    path.write_text("\n".join([header, *lines]) + "\n")
    reader = Results(path)
    start = time.perf_counter()
    assert reader.find({**KEY_OF_ROW, "steps": 9_999}) is not None
    first = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(100):
        assert reader.find({**KEY_OF_ROW, "steps": i})["steps"] == i
    again = time.perf_counter() - start
    assert first < 10 and again < 1  # about 1 s and 10 ms on an idle machine; this one may be busy
    assert len(reader.frame()) == 10_000


def test_tables_of_several_machines_merge_without_loss(tmp_path):
    here, there = Results(tmp_path / "here.csv"), Results(tmp_path / "there.csv")
    shared = row(technique="shared")
    for table in (here, there):
        table.append(shared)
    there.append(row(technique="other", machine="another"))
    there.append(row(technique="failed", status="error", reason="no"))
    assert here.merge(there.path) == 2 and here.merge(there.path) == 0
    assert [r["technique"] for r in here.rows()] == ["shared", "other", "failed"]
    assert here.rows()[1:] == there.rows()[1:]
