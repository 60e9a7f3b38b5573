"""Damaged files and odd command lines: one sentence each, soon, and never a traceback."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import hostile
import pytest

from fluxnb import params
from fluxnb.__main__ import main
from fluxnb.cache import planning, teacache
from fluxnb.errors import UserError, lacks_memory
from fluxnb.models import facts, folders
from fluxnb.report import contributed, count_rows, measured
from fluxnb.study.results import Results, canonical, key_of
from fluxnb.study.row import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
TABLE = next(p for p in sorted((ROOT / "reports").glob("single_gpu/*/results.csv")))
SLOW_S = 2.0


def outcome(use) -> str:
    """ "loaded" or "sentence" of what is used within `SLOW_S`; an alarm ends what takes longer."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 10 * SLOW_S)  # of CPU time less, on a busy machine
    begun = time.process_time()
    try:
        use()
        said = "loaded"
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 3000 and text.isprintable(), text[:300]
        text.encode()
        said = "sentence"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begun < SLOW_S
    return said


def fuzz_params(folder: Path, count: int, seed: int) -> Counter:
    shutil.copy(ROOT / "params" / "base.yaml", folder)
    whole, keys = (ROOT / "params" / "h100.yaml").read_text(), [key.path for key in params.describe()]
    rng, found = random.Random(seed), Counter()
    for n in range(count):
        data = hostile.params_file(rng, whole, keys)
        (folder / "mine.yaml").write_bytes(data)
        try:
            found[outcome(lambda: params.load("mine", folder).digest)] += 1
        except Exception as error:
            raise AssertionError(f"file {n} of seed {seed}: {data[:500]!r}") from error
    return found


def fuzz_tables(folder: Path, count: int, seed: int) -> Counter:
    with open(TABLE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:40]
    for row in rows:
        row["baseline"] = ""
    rng, found, path = random.Random(seed), Counter(), folder / "results.csv"

    def use() -> None:
        count_rows(path)
        measured(path, rows[0]["notebook"], "")
        for row in Results(path).rows():
            key_of(row)
            canonical(row.settings)
            canonical(row.proof or {})

    for n in range(count):
        data = hostile.table(rng, list(COLUMNS), rows)
        path.write_bytes(data)
        try:
            said = outcome(use)
        except Exception as error:
            raise AssertionError(f"table {n} of seed {seed}: {data[:500]!r}") from error
        assert said == "loaded" or path.read_bytes() == data  # nothing was changed
        found[said] += 1
    return found


def fuzz_commands(count: int, seed: int, capsys) -> Counter:
    rng, found = random.Random(seed), Counter()
    for n in range(count):
        words = hostile.command_line(rng)
        try:
            status = main(words)
        except SystemExit as end:  # argparse's own
            status = end.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "shouldn't happen" not in said.err, (n, words, said.err[-500:])
        found[status] += 1
    return found


def test_damaged_parameters_are_a_sentence_within_two_seconds(tmp_path):
    found = fuzz_params(tmp_path, 150, 1)
    assert found["sentence"] > 100


def test_damaged_tables_are_a_sentence_within_two_seconds(tmp_path):
    found = fuzz_tables(tmp_path, 150, 1)
    assert found["sentence"] > 50 and found["loaded"] > 10


def use_plans(path: Path, whole: list) -> None:
    for plan in planning.read(path, len(whole[0]["mask"])).values():
        plan.cache()
        assert all(abs(w) < 1e9 for own in plan.weights.values() for w in own.values())


def use_fit(path: Path, whole: dict) -> None:
    assert path.rename(path.with_name(teacache.FILE)) and teacache.coefficients(str(path.parent))


def use_pack(path: Path, whole: dict) -> None:
    with contextlib.suppress(
        ValueError, TypeError, KeyError, AttributeError, RecursionError
    ):  # the digest is right, so more is read
        found = json.loads(path.read_bytes())
        path.write_text(json.dumps(found | {"digest": contributed._digest(found)}))
    assert contributed.read(path).title


def pack() -> dict:
    """What a contribution of three rows holds."""
    rows = [row for row in Results(ROOT / "reports/single_gpu/cpu/results.csv").rows() if row.ok][:3]
    run = json.loads((ROOT / "reports/single_gpu/cpu/run.json").read_text())
    return {
        "format": 1,
        "gpu": "cpu",
        "name": "me",
        "run": contributed._about(run),
        "rows": contributed._packed(rows)[0],
    }


def model_file(name: str):
    return json.loads((ROOT / "fluxnb/models/weights/embedded" / name).read_text())


# what a user may be given by somebody else: how to read it, and what a right one holds
GIVEN = {
    "plans": (use_plans, lambda: model_file(planning.FILE)[:2]),
    "TeaCache's fit": (use_fit, lambda: model_file(teacache.FILE)),
    "a contribution": (use_pack, pack),
}


def fuzz_json(folder: Path, what: str, count: int, seed: int) -> Counter:
    (use, make), rng, found = GIVEN[what], random.Random(seed), Counter()
    whole, path = make(), folder / "given.json"
    for n in range(count):
        path.write_bytes(data := hostile.json_file(rng, whole))
        try:
            found[outcome(lambda: use(path, whole))] += 1
        except Exception as error:
            raise AssertionError(f"file {n} of seed {seed}: {data[:500]!r}") from error
    return found


@pytest.mark.parametrize("what", GIVEN)
def test_damaged_files_that_somebody_gives_are_a_sentence_within_two_seconds(tmp_path, what):
    assert fuzz_json(tmp_path, what, 60, 1)["sentence"] > 10


@pytest.mark.soak
@pytest.mark.parametrize("what", GIVEN)
def test_a_thousand_damaged_files_of_every_kind(tmp_path, what):
    print(what, fuzz_json(tmp_path, what, 1000, 100))


@pytest.mark.parametrize("name", ["~nobody/x", "x" * 5000, "a\0b", "/dev/stdin", "/proc/self/mem"])
def test_paths_that_lead_nowhere_are_a_sentence(name):
    for use in (lambda: planning.read(folders.written(name), 28), lambda: contributed.read(folders.written(name)),
                lambda: facts.read(name), lambda: planning.of(name, 28),
                lambda: teacache.coefficients(name)):  # fmt: skip
        assert outcome(use) == "sentence"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of what command lines could change, and nobody who answers a question."""
    for name in ("params", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    return tmp_path


def test_odd_command_lines_are_a_sentence(elsewhere, capsys):
    assert not {1, 3} & set(fuzz_commands(40, 1, capsys)) and not list(elsewhere.glob("**/f"))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_damaged_parameters(tmp_path, seed):
    print(fuzz_params(tmp_path, 1000, 100 + seed))


@pytest.mark.soak
def test_two_thousand_damaged_tables(tmp_path):
    print(fuzz_tables(tmp_path, 2000, 100))


@pytest.mark.soak
def test_three_hundred_command_lines(elsewhere, capsys):
    found = fuzz_commands(300, 100, capsys)
    assert not list(elsewhere.glob("**/f"))
    print(found)


@pytest.mark.parametrize("name", ["params", "table"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path, name):
    shutil.copy(ROOT / "params" / "base.yaml", tmp_path)
    os.mkfifo(tmp_path / {"params": "mine.yaml", "table": "results.csv"}[name])
    use = {"params": lambda: params.load("mine", tmp_path), "table": lambda: Results(tmp_path / "results.csv").rows()}
    assert outcome(use[name]) == "sentence"


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device", "build/x"), "build/x: No space left on device: make room"),
        (PermissionError(13, "Permission denied", "reports/x"), "reports/x: Permission denied: make room and writable"),
        (MemoryError(), "there is too little memory: free some"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "there is too little memory"),
        (ZeroDivisionError("division by zero\nmore"), "ZeroDivisionError: division by zero: that shouldn't happen"),
    ],
)
def test_what_nothing_foresaw_is_one_sentence_and_a_log_file(elsewhere, monkeypatch, capsys, error, said):
    from fluxnb import __main__ as commands

    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "list_params", fail)
    assert main(["params"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fluxnb: {said}") and printed.count("\n") == 1 and printed.endswith(".\n")
    assert type(error).__name__ in (elsewhere / "build" / "fluxnb-error.log").read_text()


def test_what_lacks_memory_is_told_from_what_does_not():
    try:
        try:
            raise OSError(12, "Cannot allocate memory")
        except OSError as inner:
            raise ValueError("cannot be read") from inner
    except ValueError as outer:
        assert lacks_memory(outer)
    assert not lacks_memory(OSError(28, "No space left on device")) and not lacks_memory(ValueError("no"))
