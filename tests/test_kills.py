"""Killed anywhere: no row is lost or doubled, no page is half, and the next run goes on by itself.

Most deaths are planned: a forked process kills itself at its n-th step that touches a file, for every n. `make soak`
runs them in great number, and whole runs that are killed at any moment.
"""

import builtins
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_output
from test_report import OWN, REPOSITORY, FakeParams, cell, ended, executed, render, write_notebook
from test_results import row, settings, without

from fluxnb import leftovers, report
from fluxnb.report import publish, read_state, tidy
from fluxnb.study.results import Results

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.chmod", "fcntl.flock")  # that Python audits


def killed(work, at: int) -> bool:
    """Whether `work`, in a process of its own, came to its step number `at`, and was killed there. A write is cut."""
    pid = os.fork()
    if pid == 0:
        count = itertools.count(1)

        def step(*_):
            if next(count) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def cut(fd, data, write=os.write):
            if next(count) == at:
                write(fd, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(fd, data)

        def synced(fd, sync=os.fsync):
            step()
            sync(fd)

        def to_write(file, mode="r", *rest, opened=builtins.open, **options):
            """What is written to a file is there in part."""
            made = opened(file, mode, *rest, **options)
            if set("wxa") & set(mode) and "b" not in mode:
                made.reconfigure(write_through=True)
                made.write, write = (
                    (lambda text: (write(text[: len(text) // 2]), step(), write(text[len(text) // 2 :]))),
                    made.write,
                )
            return made

        with contextlib.suppress(BaseException):
            sys.addaudithook(lambda name, given: step() if name in STEPS and _writes(name, given) else None)
            os.write, os.fsync = cut, synced
            if at % 2:
                builtins.open = to_write
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0 or os.WIFSIGNALED(status), "it failed by itself"
    return os.WIFSIGNALED(status)


def _writes(name, given):
    """Whether an opening may write; files that are only read don't matter."""
    return name != "open" or (given[2] or 0) & (os.O_WRONLY | os.O_RDWR) or set("wxa+") & set(given[1] or "")


def killed_everywhere(work, check, begin, most=10_000) -> int:
    """Kills `work` at its first step, then at its second, until it comes to its end; the number of kills.

    Args:
        begin: makes anew what it works on.
        check: looks at what is left.
    """
    for at in range(1, most):
        begin()
        if not killed(work, at):
            return at - 1
        check()
    return most


def thresholds(path) -> list:
    return [r.settings["threshold"] for r in Results(path).rows()]


@pytest.fixture
def old(tmp_path):
    """(path, bytes) of a table of nine rows of an earlier version."""
    path = tmp_path / "results.csv"
    for i in range(9):
        Results(path).append(row(**settings(i)))
    return path, without(path.read_bytes(), "proof", "telemetry")


def test_a_kill_while_a_table_is_brought_up_to_date(old):
    path, data = old

    def begin():
        path.write_bytes(data)

    def check():
        assert thresholds(path) == list(range(9))
        Results(path).append(row(**settings(9)))
        assert thresholds(path) == list(range(10)) and os.listdir(path.parent) == ["results.csv"]

    assert killed_everywhere(lambda: Results(path).rows(), check, begin) >= 4


@pytest.mark.parametrize("left", [0, 0.3, 0.7])
def test_what_an_earlier_version_lost_when_it_was_killed_is_read(old, left):
    """It wrote the table again in its place, with a copy of the old one beside it."""
    path, data = old
    older = path.with_name("results.csv.older")

    def begin():
        Results(path).rows()
        older.write_bytes(data)
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])

    def check():
        assert sorted(thresholds(path)) == list(range(9))

    path.write_bytes(data)
    assert killed_everywhere(lambda: Results(path).rows(), check, begin) >= 4
    begin()
    check()


def test_an_older_copy_of_a_whole_table_brings_nothing_back(old):
    path, data = old
    path.with_name("results.csv.older").write_bytes(data)
    path.write_bytes(b"\n".join(data.split(b"\n")[:3]) + b"\n")  # rows that somebody took out
    assert thresholds(path) == [0, 1]


def test_a_linked_table_stays_linked_and_what_it_may(old, tmp_path):
    path, data = old
    path.write_bytes(data)
    path.chmod(0o664)
    (link := tmp_path / "link.csv").symlink_to(path)
    assert thresholds(link) == list(range(9)) and link.is_symlink() and path.stat().st_mode & 0o777 == 0o664
    assert b"telemetry" in path.read_bytes()


def test_a_kill_while_a_row_is_appended_or_tables_are_merged(old, tmp_path):
    path, data = old
    other = tmp_path / "other.csv"
    Results(path).rows()
    for i in range(7, 12):  # two are in both
        Results(other).append(row(**settings(i)))
    both = [row(**settings(i)) for i in range(12)]

    def begin():
        path.write_bytes(data)

    def work():
        Results(path).merge(other)
        Results(path).append(row(**settings(12)))

    def check():
        before = thresholds(path)
        assert before == list(range(len(before))) and len(before) >= 9
        Results(path).merge(other)
        assert thresholds(path)[: len(both)] == list(range(12))

    assert killed_everywhere(work, check, begin) >= 15


class Site:
    """A project with two executed notebooks, whose pages are made."""

    def __init__(self, root):
        self.root = root
        shown = new_output("display_data", data={"text/html": "<p>" + "x" * 5000 + "</p>"})
        executed(root, new_code_cell("1", outputs=[shown]))
        self.place = report.own(FakeParams(), root)
        self.place.reports.mkdir(parents=True)
        for i in range(3):
            Results(self.place.table).append(row(**settings(i), notebook="01_good"))
        render(FakeParams(), root)
        self.whole = self.pages()

    def pages(self):
        return {p.relative_to(self.root): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}

    def begin(self):
        """As if nothing had been published, or something else."""
        for name in (f"{OWN}/index.html", f"{OWN}/progress.md", "reports/own/index.html"):
            (self.root / name).unlink()
        (self.root / OWN / "01_good.html").write_text("an earlier one")

    def check(self):
        for path in (path for path in self.root.rglob("*.html") if path.read_text() != "an earlier one"):
            assert path.read_bytes() == self.whole[path.relative_to(self.root)]  # whole, or the one before
        render(FakeParams(), self.root)
        tidy(self.place)
        assert self.pages() == self.whole


def test_a_kill_while_pages_are_made_and_published(tmp_path):
    site = Site(tmp_path)
    assert killed_everywhere(lambda: render(FakeParams(), tmp_path), site.check, site.begin, most=8) >= 7


@pytest.mark.soak
def test_a_kill_at_every_step_of_publishing_and_of_taking_over(tmp_path):
    site = Site(tmp_path)
    kills = killed_everywhere(lambda: render(FakeParams(), tmp_path), site.check, site.begin)
    theirs = tmp_path / "reports/single_gpu/cpu"
    publish.to_reference(FakeParams(), tmp_path)
    whole = {p: p.read_bytes() for p in (tmp_path / "reports").rglob("*") if p.is_file()}

    def begin():
        for path in [p for p in theirs.iterdir() if p.is_file()]:
            path.unlink()  # with an unfinished line that was put aside

    def check():
        publish.to_reference(FakeParams(), tmp_path)
        leftovers.clean(*{p.parent for p in whole})
        left = [p for p in (tmp_path / "reports").rglob("*") if p.is_file() and p.suffix != ".partial"]
        assert {p: p.read_bytes() for p in left} == whole

    kills += killed_everywhere(lambda: publish.to_reference(FakeParams(), tmp_path), check, begin)
    print(kills, "kills")
    assert kills >= 50


APPENDS = """
    import time
    from fluxnb.study.results import Results
    table = Results("reports/own/single_gpu/cpu/results.csv")
    for i in range({rows}):
        key = {{"notebook": "01_rows", "technique": "t", "gpu": "cpu", "host": "m", "versions": "v", "seed": i}}
        key["weights"] = "random"
        if table.find(key) is None:
            table.append({{**key, "family": "baseline", "status": "ok", "run_id": "r"}})
            time.sleep({pause})
"""


class Runs:
    """A project whose notebook appends rows, run in processes that are killed; temporary files have a folder."""

    def __init__(self, root, rows, pause):
        self.root, self.rows, self.temporary = root, rows, root / "temporary"
        self.temporary.mkdir()
        write_notebook(root, "01_rows", cell(APPENDS.format(rows=rows, pause=pause)))
        self.place = report.own(FakeParams(), root)

    def start(self) -> subprocess.Popen:
        """A run, that prints and ends as `make report` does."""
        code = (
            f"import sys; sys.path[:0] = [{str(REPOSITORY / 'tests')!r}, {str(REPOSITORY)!r}]\n"
            "from pathlib import Path\nfrom fluxnb import __main__ as line\n"
            "from test_report import FakeParams, render, run\n"
            f"root = Path({str(self.root)!r})\n"
            "from fluxnb.report import publish\n"
            "publish.site = lambda _: run(FakeParams(), root, stream=sys.stdout) or render(FakeParams(), root)[-1]\n"
            "line._root = lambda: root\n"
            "sys.exit(line.main(['site']))"
        )
        environment = os.environ | {"TMPDIR": str(self.temporary)}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def count(self) -> int:
        return len(Results(self.place.table).rows())

    def until(self, rows: int, process) -> None:
        """Waits until so many rows are there."""
        deadline = time.monotonic() + 120
        while self.count() < rows and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self, process, number: int) -> str:
        """Sends a signal; what the run has printed when all of it has ended."""
        family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        said = process.communicate(timeout=60)[0]
        assert all(ended(pid) for pid in family)
        return said

    def check(self) -> None:
        """No row is lost or doubled, of those that are there."""
        seeds = [r.seed for r in Results(self.place.table).rows()]
        assert seeds == list(range(len(seeds)))

    def finish(self) -> str:
        said = self.start().communicate(timeout=300)[0]
        assert self.count() == self.rows and read_state(self.place.build, "01_rows")["status"] == "ok", said
        self.check()
        assert not list(self.temporary.iterdir()) and not list(self.root.rglob("*.tmp*"))
        return said


def test_a_run_that_is_ended_says_so_leaves_nothing_and_goes_on(tmp_path):
    runs = Runs(tmp_path, rows=30, pause=0.1)
    for name in ("SIGKILL", "SIGTERM", "SIGHUP"):
        number, before = getattr(signal, name), runs.count()
        runs.until(before + 3, process := runs.start())
        said = runs.stop(process, number)
        runs.check()
        assert before + 3 <= runs.count() < 30
        state = read_state(runs.place.build, "01_rows")["status"]
        if number == signal.SIGKILL:
            assert state == "running" and list(runs.temporary.iterdir())  # nobody was left to say it
            tidy(runs.place)
            assert read_state(runs.place.build, "01_rows")["status"] == "interrupted"
        else:
            assert state == "interrupted" and not list(runs.temporary.iterdir())  # nor what the kill left
            assert f"fluxnb: interrupted by {name}; what was finished is kept, and the same command goes on" in said
            assert process.returncode == 128 + number and "Traceback" not in said
            assert not list(runs.place.build.glob("*.tmp*"))
    runs.finish()


@pytest.mark.soak
def test_runs_that_are_killed_at_any_moment_lose_and_double_no_row(tmp_path):
    """Each goes on where the last was killed, until all rows are there; then anew. For eight minutes, or 60 kills."""
    chance, deadline, kills = random.Random(0), time.monotonic() + 480, Counter()
    for number in itertools.count():
        (root := tmp_path / str(number)).mkdir()
        runs = Runs(root, rows=40, pause=0.02)
        while runs.count() < 36 and time.monotonic() < deadline and sum(kills.values()) < 60:
            process = runs.start()
            if chance.random() < 0.3:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, 6))
            else:
                runs.until(runs.count() + chance.randint(1, 6), process)
            if process.poll() is None:
                kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
                runs.stop(process, kind)
                kills[kind.name] += 1
            runs.check()
        runs.finish()
        if time.monotonic() > deadline or sum(kills.values()) >= 60:
            break
    print(dict(kills))
    assert sum(kills.values()) >= 15


@pytest.mark.soak
def test_two_who_append_to_one_table_are_killed(tmp_path):
    chance, path, said = random.Random(1), tmp_path / "results.csv", tmp_path / "said"
    for trial in range(120):
        pids = []
        for who in range(2):
            if (pid := os.fork()) == 0:
                with contextlib.suppress(BaseException), open(said, "ab", buffering=0) as file:
                    for i in itertools.count():
                        Results(path).append(row(seed=1000 * trial + 500 * who + i))
                        file.write(f"{1000 * trial + 500 * who + i}\n".encode())
                os._exit(0)
            pids.append(pid)
        time.sleep(chance.uniform(0.005, 0.2))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    seeds = [r.seed for r in Results(path).rows()]
    acknowledged = [int(line) for line in said.read_text().split()]
    print(240, "kills", len(acknowledged), "rows")
    assert len(set(seeds)) == len(seeds) and set(acknowledged) <= set(seeds) and len(acknowledged) > 40


def test_a_temporary_folder_that_is_held_stays_and_one_that_nobody_holds_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(tmp_path))
    with leftovers.folder("kept") as kept:
        (gone := tmp_path / "fluxnb-ranks-1").mkdir()
        (gone / leftovers.LOCK).touch()
        (fresh := tmp_path / "fluxnb-kernel-2").mkdir()  # about to be locked
        (old := tmp_path / "fluxnb-kernel-3").mkdir()  # killed before it was
        (clone := tmp_path / "fluxnb-mine").mkdir()
        (clone / "README.md").touch()
        for path in (old, clone):
            os.utime(path, (0, 0))
        (strange := tmp_path / "another").mkdir()
        (tmp_path / ".a.html.999999999.tmp").touch()
        (mine := tmp_path / f".b.html.{os.getpid()}.tmp").touch()
        leftovers.clean(tmp_path)
        assert kept.is_dir() and not gone.exists() and not old.exists() and (clone / "README.md").exists()
    assert {path.name for path in tmp_path.iterdir()} == {fresh.name, clone.name, strange.name, mine.name}
    assert not Path(kept).exists()
