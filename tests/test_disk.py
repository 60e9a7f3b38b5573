"""A disk that is really full: rows stay, one sentence says it, and with room the same command goes on."""

import contextlib
import os
import shutil
import subprocess

import pytest
from test_kills import Runs
from test_results import row

from fluxnb.errors import UserError
from fluxnb.study.results import Results


@contextlib.contextmanager
def disk(place, kib: int):
    """A file system of so many KiB at `place`; a function that gives it more room. Skips where nobody may mount one."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and shutil.which("mount") and _mount(place, f"size={kib}k")
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield lambda: _mount(place, "remount,size=64m")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _mount(place, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("kib", [8, 12])
def test_rows_on_a_full_disk_stay_and_with_room_it_goes_on(tmp_path, kib):
    with disk(tmp_path / "small", kib) as enlarge:
        table, kept = Results(tmp_path / "small" / "results.csv"), 0
        with pytest.raises(UserError, match="cannot be written: No space left on device; make it writable"):
            for kept in range(1000):
                table.append(row(seed=kept))
        assert [r.seed for r in Results(table.path).rows()] == list(range(kept)) and kept > 3
        enlarge()
        table.append(row(seed=kept))
        assert [r.seed for r in Results(table.path).rows()] == list(range(kept + 1))


@pytest.mark.soak
@pytest.mark.parametrize("kib", [4, 20])
@pytest.mark.parametrize("where", ["reports/own/single_gpu/cpu", "build/cpu", "temporary"])
def test_a_run_on_a_full_disk_says_so_loses_nothing_and_goes_on(tmp_path, where, kib):
    runs = Runs(tmp_path, rows=40, pause=0)
    with disk(tmp_path / where, kib) as enlarge:
        said = (process := runs.start()).communicate(timeout=120)[0]
        before = runs.count()
        runs.check()
        assert "shouldn't happen" not in said and "Traceback" not in said, said
        if process.returncode == 2:
            assert said.splitlines()[-1].startswith("fluxnb: "), said
            assert "No space left" in said, said
        elif process.returncode:
            assert "No space left" in said, said
        enlarge()
        runs.finish()
        print(where, kib, process.returncode, before, said.splitlines()[-1:])
