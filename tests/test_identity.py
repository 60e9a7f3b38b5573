"""Which machine it is, of what kind, and which rows may be compared second by second."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import GPU

from fluxnb import families, notebooks, params, study
from fluxnb.errors import UserError
from fluxnb.measure import identity, telemetry
from fluxnb.report import run
from fluxnb.study import session
from fluxnb.study.results import Results
from fluxnb.study.row import Row
from fluxnb.study.session import Session, apart

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4


@pytest.fixture(autouse=True)
def no_name(monkeypatch):
    for name in (identity.HOST, *identity.THREADS):
        monkeypatch.delenv(name, raising=False)


# --- kind and host ------------------------------------------------------------------------------------------


def test_a_kind_is_the_same_for_the_same_hardware_only(monkeypatch):
    facts = telemetry.machine()
    monkeypatch.setattr(telemetry, "machine", lambda: facts)
    first = identity.kind()
    assert first == identity.kind() and len(first) == 12 and int(first, 16) >= 0
    facts["driver"] = "another"
    assert identity.kind() == first
    for name, value in (("cpu", "another"), ("usable_threads", 99), ("ram_gib", 9999)):
        monkeypatch.setattr(telemetry, "machine", lambda name=name, value=value: {**facts, name: value})
        assert identity.kind() != first, name
    gpu = {"name": "NVIDIA H100", "memory_gib": 80, "compute_capability": "9.0", "power_limit_w": 700}
    kinds = []
    for gpus in ([gpu], [gpu, gpu], [{**gpu, "name": "NVIDIA H200"}], [{**gpu, "power_limit_w": None}]):
        monkeypatch.setattr(telemetry, "machine", lambda gpus=gpus: {**facts, "gpus": gpus})
        kinds.append(identity.kind())
    assert len({first, *kinds[:3]}) == 4 and kinds[3] == kinds[0]


@pytest.mark.parametrize("name", identity.THREADS)
def test_with_another_number_of_threads_a_machine_has_another_kind_and_name(tmp_path, monkeypatch, name):
    """Rows of one aren't found for the other, and no page sets them side by side as of one machine."""
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: [])
    kind, host = identity.kind(), identity.host(tmp_path)
    usable = telemetry.machine()["usable_threads"]
    monkeypatch.setenv(name, str(usable))
    assert (identity.kind(), identity.host(tmp_path)) == (kind, host)
    monkeypatch.setenv(name, str(usable + 1))
    assert identity.kind() != kind and identity.host(tmp_path) != host
    print_ = run._shared_digest(params.load("cpu"))
    monkeypatch.delenv(name)
    assert identity.host(tmp_path) == host and run._shared_digest(params.load("cpu")) != print_  # so it runs again


def test_two_checkouts_on_machines_of_one_specification_are_two_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: [])
    here, there = tmp_path / "here", tmp_path / "there"
    first = identity.host(here)
    assert len(first) == 12 and identity.host(here) == first != identity.host(there)
    assert json.loads((here / identity.HOSTS).read_text()) == {identity.kind(): first}


def test_a_checkout_has_a_host_for_each_kind_of_machine_that_works_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: [])
    first = identity.host(tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(identity, "kind", lambda: "another")
        assert identity.host(tmp_path) != first
    assert identity.host(tmp_path) == first


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"%s": 7}'])
def test_a_damaged_file_of_hosts_is_made_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: [])
    (tmp_path / identity.HOSTS).write_text(content.replace("%s", identity.kind()))
    first = identity.host(tmp_path)
    assert len(first) == 12 and identity.host(tmp_path) == first


def asked(folder, found):
    found.put(identity.host(folder))


def test_processes_that_begin_at_once_have_one_host(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=asked, args=(tmp_path / "own", found)) for _ in range(6)]
    for process in processes:
        process.start()
    names = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(names) == 1


def test_a_name_that_cannot_be_kept_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: [])
    (tmp_path / "own").write_text("a file")
    with pytest.raises(UserError, match=r"^This machine's name cannot be kept in .*hosts\.json: .* HOST=name\.$"):
        identity.host(tmp_path / "own")


def test_a_machine_with_gpus_is_known_by_their_uuids(tmp_path, monkeypatch):
    facts = telemetry.machine() | {"gpus": [{"name": "H100", "memory_gib": 80, "compute_capability": "9.0"}] * 2}
    monkeypatch.setattr(telemetry, "machine", lambda: facts)
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: ["GPU-a", "GPU-b"])
    first = identity.host(tmp_path / "here")
    assert len(first) == 12 and identity.host(tmp_path / "there") == first  # wherever the checkout lies
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: ["GPU-b", "GPU-a"])
    assert identity.host(tmp_path) == first
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: ["GPU-a", "GPU-c"])
    assert identity.host(tmp_path) != first
    assert list(tmp_path.iterdir()) == []  # nothing has to be kept
    # a job with other shares of it is of another kind, and no table has two kinds of one name
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: ["GPU-a", "GPU-b"])
    monkeypatch.setattr(telemetry, "machine", lambda: facts | {"usable_threads": 4})
    assert identity.host(tmp_path) != first


def test_uuids_are_of_all_gpus_of_the_machine(nvml, monkeypatch):
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda i: i
    nvml.nvmlDeviceGetUUID = lambda handle: [b"GPU-abc", "GPU-def"][handle]
    monkeypatch.setattr(telemetry, "_devices", lambda: [GPU])  # the others aren't visible to PyTorch
    assert telemetry.gpu_uuids() == ["GPU-abc", "GPU-def"] and nvml.opened == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry.gpu_uuids() == ["abc"]


def test_a_user_may_name_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: ["GPU-a"])
    monkeypatch.setenv(identity.HOST, "lab-3.left_2")
    assert identity.host(tmp_path) == "lab-3.left_2"


@pytest.mark.parametrize("name", ["two words", "-x", "a/b", "ü", "x" * 64, "a,b", '"'])
def test_a_name_that_a_machine_cannot_have_is_a_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setenv(identity.HOST, name)
    with pytest.raises(UserError, match=r"^HOST=.* can't be a machine's name: use up to 63 letters, .*\.$") as caught:
        identity.host(tmp_path)
    assert "\n" not in str(caught.value)


def test_make_clean_leaves_the_names_of_machines(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "cpu.yaml").touch()
    (tmp_path / "build").mkdir()
    first = identity.host(tmp_path / "reports" / "own")
    subprocess.run(["make", "clean", "PYTHON=true"], cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / "build").exists() and identity.host(tmp_path / "reports" / "own") == first


# --- sessions -----------------------------------------------------------------------------------------------

NOW = datetime.now(UTC)


def row(minutes_ago, host="here", id="s1", **changed):
    at = (NOW - timedelta(minutes=minutes_ago)).isoformat(timespec="seconds")
    return Row(host=host, session=id, measured_at=at, **{"run_id": "first", "status": "ok"} | changed)


class Clock(datetime):
    """Time stands still while these tests are run."""

    @classmethod
    def now(cls, zone=None):
        return NOW


@pytest.fixture
def up_for_days(monkeypatch):
    monkeypatch.setattr(session, "datetime", Clock)
    monkeypatch.setattr(session, "_booted", lambda: NOW - timedelta(days=9))


@pytest.mark.parametrize(
    "rows, joined",
    [
        ([], False),
        ([row(5)], True),
        ([row(59)], True),
        ([row(61)], False),  # the machine may have been given back meanwhile
        ([row(61), row(5, id="s2")], False),
        ([row(5), row(61, id="s2")], True),  # whatever their order: of merged tables, say
        ([row(5, host="there")], False),
        ([row(5), row(1, host="there", id="s2")], True),
        ([row(5, id=None)], False),  # of before there were sessions
    ],
)
def test_a_process_joins_the_session_of_the_last_hour(up_for_days, rows, joined):
    own = Session("here", "second")
    assert (own.current(rows) == "s1") == joined
    assert own.current([]) == own.current([row(0, id="s9")]) == own.id  # and stays in it


def test_after_a_reboot_it_is_another_session(up_for_days, monkeypatch):
    monkeypatch.setattr(session, "_booted", lambda: NOW - timedelta(minutes=10))
    assert Session("here", "second").current([row(5)]) == "s1"
    assert Session("here", "second").current([row(15)]) != "s1"


def test_the_moment_of_the_last_boot_is_in_the_past():
    assert session._booted() < datetime.now(UTC)


BASE = [1.00, 1.01, 1.02, 1.03, 1.04]


@pytest.mark.parametrize(
    "rows, samples, stays",
    [
        ([row(5, samples=BASE)], [1.01, 1.02, 1.03, 1.03, 1.05], True),
        ([row(5, samples=BASE)], [1.20, 1.21, 1.22, 1.23, 1.24], False),
        ([row(5, samples=BASE)], [0.90, 0.91, 0.92, 0.90, 0.91], False),
        ([row(5, samples=BASE, run_id="second")], [2.0] * 5, True),  # of this process itself: drift, not another stay
        ([row(5, samples=BASE, technique="other")], [2.0] * 5, True),
        ([row(5)], [2.0] * 5, True),
        ([row(5, samples=[9.0] * 5), row(4, samples=BASE)], BASE, True),  # the newest counts
    ],
)
def test_a_baseline_that_differs_by_more_than_the_noise_begins_another_session(up_for_days, rows, samples, stays):
    own = Session("here", "second")
    own.check(rows, lambda r: r.technique is None, samples)
    assert (own.id == "s1") == stays


def test_noise_is_what_lies_in_the_middle():
    assert not apart([1.0, 1.1], [1.1, 1.2]) and apart([1.0, 1.1], [1.2, 1.3])
    assert not apart([1.0] * 4 + [1.5] * 4, [1.4] * 8)
    assert apart([1.0] * 7 + [9.0], [2.0] * 7 + [0.1])  # one outlier at each end is none of it


# --- in a study ---------------------------------------------------------------------------------------------


def compared(begin, *steps):
    s, subject = begin()
    return s.compare(subject, study.plain(STEPS), [study.fewer_steps(n) for n in steps])


def test_processes_within_an_hour_share_a_session_and_each_has_its_baseline(begin, made, monkeypatch):
    monkeypatch.setattr(session, "apart", lambda *_: False)  # the machine that this runs on may be busy
    one, two = compared(begin, 3), compared(begin, 3, 2)
    base, *others = two
    assert len({r.session for r in (*one, *two)}) == 1 == len({r.host for r in (*one, *two)})
    assert base.run_id == others[1].run_id != one[0].run_id and others[1].baseline == base.id != one[0].id


def test_after_a_gap_the_rows_are_of_another_session(begin, made, monkeypatch):
    one = compared(begin, 3)
    monkeypatch.setattr(session, "GAP", timedelta(seconds=-5))
    base, three, two = compared(begin, 3, 2)
    assert three == one[1] and two.session == base.session != three.session
    assert base.host == three.host


def test_a_machine_that_has_become_slower_is_in_another_session(begin, made, monkeypatch):
    from fluxnb.measure import latency

    one, timed = compared(begin, 3), latency.timed
    monkeypatch.setattr(latency, "timed", lambda *given: 10.0 + timed(*given))
    base, three, two = compared(begin, 3, 2)
    assert three == one[1] and base.latency_p50 > 10
    assert two.session == base.session != three.session
    assert base.speedup == pytest.approx(1, abs=0.1) and two.baseline == base.id


def test_a_fresh_clone_measures_for_itself_whatever_is_committed(begin, made, study_root, monkeypatch):
    """The committed rows are of a machine of the very same kind; its name is not in a clone."""
    monkeypatch.setattr(telemetry, "gpu_uuids", lambda: [])
    first = compared(begin, 3)
    committed = study_root / "reports" / "single_gpu" / "smoke"
    committed.mkdir(parents=True)
    own = study_root / "reports" / "own"
    shutil.move(own / "single_gpu" / "smoke" / "results.csv", committed)
    reference = (committed / "results.csv").read_bytes()
    shutil.rmtree(own)
    made.clear()
    again = compared(begin, 3)
    assert made and {r.host for r in again}.isdisjoint({r.host for r in first})
    assert {r.kind for r in again} == {r.kind for r in first} and again[0].session != first[0].session
    assert (committed / "results.csv").read_bytes() == reference
    # not even if the rows of both lie in one table
    Results(own / "single_gpu" / "smoke" / "results.csv").merge(committed / "results.csv")
    made.clear()
    assert compared(begin, 3) == again and made == []


def test_a_machine_with_a_name_finds_its_rows_again_wherever_the_checkout_lies(begin, made, study_root, monkeypatch):
    monkeypatch.setenv(identity.HOST, "lab")
    first = compared(begin, 3)
    assert {r.host for r in first} == {"lab"} and not (study_root / "reports" / "own" / identity.HOSTS).exists()
    made.clear()
    assert compared(begin, 3) == first and made == []
    monkeypatch.setenv(identity.HOST, "another")
    assert compared(begin, 3)[0].host == "another" and made


def test_another_kind_of_machine_with_the_same_name_is_told_before_it_measures_on(begin, made, monkeypatch):
    monkeypatch.setenv(identity.HOST, "lab")
    compared(begin, 3)
    s, _ = begin()
    before = s.results.path.read_bytes()
    monkeypatch.setattr(identity, "kind", lambda: "another")
    with pytest.raises(UserError, match="^Another kind of machine has the name lab .* nothing was changed"):
        compared(begin, 2)
    assert s.results.path.read_bytes() == before


def test_a_table_shows_where_each_row_comes_from(begin, made):
    for found in compared(begin, 3):
        assert found.commit is None  # a folder that no git knows
        assert found.kind == identity.kind() and found.gpu == "smoke" and found.notebook == notebooks.FIRST_BLOCK
        assert datetime.fromisoformat(found.measured_at).tzinfo is not None
        assert families.named(found.family).name == found.family
