"""Runs a function on several ranks, one process each, from a notebook or a script; nothing is left running.

    for result in ranks.run("fluxnb.techniques.parallel:check", 2, limit_s=120):
        ...

The processes are started by torch's own elastic launcher, in a process of its own, so the caller needs no torchrun and
may have used CUDA already. What a function says with `rank.emit` reaches the caller at once. The first rank that fails
ends the run with its message, a run that says nothing for too long is ended too, and so is one whose caller is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from fluxnb import leftovers
from fluxnb.errors import UserError
from fluxnb.scrub import scrub

RESULTS, CALL, DIED, PRINTED = "results.jsonl", "call.pickle", "died.json", "driver.log"
MARK = "FLUXNB_RANKS"  # of all processes of a run, also of those that a rank starts
GRACE_S = 3.0  # between asking processes to end and ending them


class RankError(RuntimeError):
    """A rank failed, or all took too long; the message says which and why."""


@dataclass(frozen=True)
class Rank:
    """What a function that runs on ranks is given first."""

    rank: int
    world: int
    device: str
    folder: Path

    def emit(self, result: dict) -> None:
        """Hands a result to the caller of `run`, from the first rank; what the others say is not heard."""
        if self.rank == 0:
            with open(self.folder / RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def run(
    function: str, world: int, *arguments, limit_s: float = 600.0, log: Path | None = None
) -> Iterator[dict]:  # fmt: skip
    """Calls function(rank, *arguments) on `world` ranks and yields what rank 0 emits, as it comes.

    Args:
        function: "module:name"; it and the arguments have to be picklable.
        limit_s: a run that says nothing for so many seconds is ended.
        log: a file that what the ranks print is added to, with the whole traceback of one that fails.

    Raises:
        UserError: more ranks are asked for than there are GPUs.
        RankError: a rank failed or died, or the time is up; what was yielded before stays valid.
    """
    import torch

    if torch.cuda.is_available() and world > torch.cuda.device_count():
        raise UserError(
            f"{world} GPUs are asked for and {torch.cuda.device_count()} are here: choose a configuration with as many "
            "as there are, or fewer."
        )
    with leftovers.folder("ranks") as folder:
        try:
            (folder / CALL).write_bytes(pickle.dumps((function, arguments, limit_s)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(f"Ranks can't be given these arguments ({error}): use what pickle takes.") from None
        (folder / RESULTS).touch()
        driver = _start(folder, world)
        deadline, read = time.monotonic() + limit_s, 0
        try:
            while True:
                over = driver.poll() is not None
                lines = (folder / RESULTS).read_text("utf-8", "replace").splitlines(keepends=True)
                while read < len(lines) and lines[read].endswith("\n"):
                    yield _result(lines[read], world)
                    read += 1
                    deadline = time.monotonic() + limit_s
                if over:
                    break
                if time.monotonic() > deadline:
                    raise RankError(f"The {world} ranks said nothing for {limit_s:.0f} s and were ended.")
                time.sleep(0.05)
            if driver.returncode:
                raise RankError(_why(folder, world, driver.returncode))
        finally:
            _end(driver, folder.name)
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(scrub((folder / PRINTED).read_text(encoding="utf-8", errors="replace")))


def _result(line: str, world: int) -> dict:
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        result = None
    if result is None or isinstance(result, int | float | str):
        raise RankError(f"The first of {world} ranks gave a result that can't be read: {line.strip()[:80]!r}.")
    return result


def _start(folder: Path, world: int) -> subprocess.Popen:
    threads = str(max(1, (os.cpu_count() or 1) // world))
    environment = {"OMP_NUM_THREADS": threads, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", **os.environ, MARK: folder.name}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    with open(folder / PRINTED, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fluxnb.measure.ranks", str(folder), str(world), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _end(driver: subprocess.Popen, mark: str) -> None:
    """Ends the driver, the ranks, and what a rank has started."""
    if driver.poll() is None:
        driver.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(GRACE_S)
    _kill_all(mark)
    driver.wait()


def _kill_all(mark: str) -> None:
    """Kills every other process of a run, whoever its parent is by now."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()


def _why(folder: Path, world: int, code: int) -> str:
    """One sentence on the rank that failed first."""
    said = [json.loads(path.read_text()) for path in folder.glob("error.*.json")]
    codes = json.loads((folder / DIED).read_text()) if (folder / DIED).is_file() else {}
    codes = {int(rank): code for rank, code in codes.items()}
    # a rank that is killed says nothing, and the others complain of its silence
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, number = next(iter(killed.items()))
        return f"Rank {rank} of {world} was killed by signal {number}; the others were ended with it."
    first: dict = min(said, key=lambda error: error["time"], default={})
    for rank in first.get("gone", []):  # whose silence that one complains of
        status = f" with exit status {codes[rank]}" if rank in codes else ""
        return f"Rank {rank} of {world} ended{status} before its work was done; the others were ended with it."
    if said:
        return f"Rank {first['rank']} of {world} failed: {first['message']}; the others were ended with it."
    if codes:
        rank, code = next(iter(codes.items()))
        return f"Rank {rank} of {world} ended with exit status {code}; the others were ended with it."
    tail = (folder / PRINTED).read_text(errors="replace").strip().splitlines()
    return f"The {world} ranks could not be started (exit status {code}): {tail[-1] if tail else 'no message'}"


# --- in the launcher's process ----------------------------------------------------------------------------


def _drive(folder: Path, world: int, caller: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def take_all_along() -> None:
        _kill_all(folder.name)
        shutil.rmtree(folder, ignore_errors=True)

    leftovers.ends_with(caller, take_all_along)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),  # by default a folder that nobody removes
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fluxnb.measure.ranks", str(folder))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (folder / DIED).write_text(json.dumps(codes))
        return 1
    return 0


# --- in each rank -----------------------------------------------------------------------------------------


def _be_one(folder: Path) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    try:
        _call(folder, rank, world)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, the caller has to hear of it
        said = {"rank": rank, "time": time.time(), "gone": [other for other in range(world) if _is_gone(folder, other)]}
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        message = lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"
        said["message"] = message.rstrip(".")
        (folder / f"error.{rank}.json").write_text(json.dumps(said))
        # past the interpreter's own end: a process group whose peers wait may never be taken down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 0


def _is_gone(folder: Path, rank: int) -> bool:
    """Whether a rank has ended and said nothing."""
    import psutil

    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        ended = psutil.Process(int((folder / f"pid.{rank}").read_text())).status() == psutil.STATUS_ZOMBIE
        return ended and not (folder / f"error.{rank}.json").exists()
    return (folder / f"pid.{rank}").exists() and not (folder / f"error.{rank}.json").exists()


def _call(folder: Path, rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist

    function, arguments, limit_s = pickle.loads((folder / CALL).read_bytes())
    cuda = torch.cuda.is_available()
    device = f"cuda:{int(os.environ['LOCAL_RANK'])}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=limit_s))
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(Rank(rank, world, device, folder), *arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) == 4:
        sys.exit(_drive(place, int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(_be_one(place))
