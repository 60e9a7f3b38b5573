"""Many notebooks at once: one per free GPU of this machine, or as jobs of Slurm, and all rows in one table.

Every notebook is run in a folder of its own below build/<gpu>/jobs/, with the results so far, so jobs on different
machines never write to one file. When a job has ended, its rows are appended to the configuration's table, and what it
executed is put where a run without jobs would have left it: rendering and resuming know no difference.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from fluxnb import leftovers, params, scrub
from fluxnb.errors import UserError
from fluxnb.installed import need
from fluxnb.measure.identity import HOSTS
from fluxnb.params.reading import plain
from fluxnb.report import Place, copy, durations, own, read_state, write_json

MACHINES = Path("reports", "own", HOSTS)
LAUNCHES = ("here", "slurm")
SLURM_NAME = "slurm-name"  # a file: what Slurm calls the job of this folder, while it may have one
CALLER = "FLUXNB_CALLER"  # the process that a job of this machine ends with
ANSWER_S = 20.0  # for a command of Slurm's
POLL_S = 2.0
HOURS = 12  # of a Slurm job, unless SLURM_OPTIONS says otherwise


@dataclass(frozen=True)
class Job:
    """One notebook in its own folder."""

    gpu: str
    stem: str
    folder: Path
    force: bool

    @property
    def command(self) -> list[str]:
        """What runs it, wherever that is."""
        force = ["force"] if self.force else []
        return [sys.executable, "-m", "fluxnb.report.sweep", str(self.folder), self.gpu, self.stem, *force]


def places(chosen: params.Params) -> list[list[int] | None]:
    """The GPUs of every notebook that can run here at the same time; [None] where there is one place only."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    each = chosen.gpu.count
    return [list(range(i, i + each)) for i in range(0, count - each + 1, each)] if count >= 2 * each else [None]


def sweep(
    chosen: params.Params, place: Place, stems: list[str], launch: str, force: bool, say=print, ended=lambda stem: None
) -> dict[str, str]:
    """Runs notebooks as jobs and collects what they made; stem -> what kept a job from running, empty if nothing did.

    Args:
        place: where it all ends.
        stems: notebooks, by name.
        launch: one of `LAUNCHES`.
        say: called with a line of progress.
        ended: called with each that has ended and is collected.

    Raises UserError if they can't be started at all.
    """
    if launch not in LAUNCHES:
        raise UserError(f"LAUNCH={launch} is no way to run notebooks: choose one of {', '.join(LAUNCHES)}.")
    if launch == "slurm":
        _slurm_options()
        check_slurm()
    jobs = [_prepare(chosen, place, stem, force) for stem in stems]
    run = _on_slurm if launch == "slurm" else _here
    troubles = {}
    with contextlib.closing(run(chosen, jobs)) as went:  # whatever ends this ends the jobs
        for job, trouble in went:
            rows = _collect(chosen, place, job, trouble)
            troubles[job.stem] = trouble
            status = read_state(place.build, job.stem).get("status", "lost")
            say(f"[{len(troubles)}/{len(jobs)}] {job.stem} {status}, {rows} new rows {trouble}".rstrip())
            ended(job.stem)
    return troubles


# --- a job's folder ---------------------------------------------------------------------------------------


def _prepare(chosen: params.Params, place: Place, stem: str, force: bool) -> Job:
    from fluxnb.report.run import only_run
    from fluxnb.study.results import Results

    folder = place.build / "jobs" / stem
    there = own(chosen, folder)
    if folder.is_dir():  # of a run that was killed
        _cancel([Job(chosen.name, stem, folder, force)])
        there.build.mkdir(parents=True, exist_ok=True)
        with only_run(there):
            if there.table.is_file():
                Results(place.table).merge(there.table)
        shutil.rmtree(folder, ignore_errors=True)
    there.reports.mkdir(parents=True)
    if place.table.is_file():
        shutil.copy2(place.table, there.table)
    for name in ("notebooks", "params"):
        (folder / name).symlink_to(place.root / name, target_is_directory=True)
    # the names of machines; what is kept by what it is of, so safe to share
    (folder / MACHINES).symlink_to(place.root / MACHINES)
    fitted = [place.reports / "teacache"] if place.model else []
    for shared in (place.images, place.root / "build" / "torch-compile", *fitted):
        shared.mkdir(parents=True, exist_ok=True)
        link = folder / shared.relative_to(place.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shared, target_is_directory=True)
    return Job(chosen.name, stem, folder, force)


def _collect(chosen: params.Params, place: Place, job: Job, trouble: str) -> int:
    """Takes over a job's rows and its executed notebook; gives the number of rows."""
    from fluxnb.study.results import Results

    there, build = own(chosen, job.folder), place.build
    rows = Results(place.table).merge(there.table) if there.table.is_file() else 0
    durations.merge(there.reports, place.reports)
    # how it went comes last: it stands for the others
    for path in sorted(there.build.glob(f"{job.stem}.*"), key=lambda path: path.suffix == ".json"):
        if path.is_file() and not path.name.endswith(".tmp.ipynb"):
            copy(path, build / path.name)
    ended = "failed" if (there.build / f"{job.stem}.failed.ipynb").exists() else "good"
    for path in (build / f"{job.stem}.failed.ipynb", build / f"{job.stem}.ipynb"):
        if path.name.endswith(".failed.ipynb") != (ended == "failed") and (there.build / f"{job.stem}.json").exists():
            path.unlink(missing_ok=True)  # of an earlier run
    if trouble and read_state(build, job.stem).get("status") != "ok":
        write_json(build / f"{job.stem}.json", read_state(build, job.stem) | {"status": "failed", "error": trouble})
    if not trouble:
        shutil.rmtree(job.folder, ignore_errors=True)
    return rows


def work(folder: Path, gpu: str, stem: str, force: bool) -> int:
    """What a job does: the notebook alone, in its folder. The status of `fluxnb.report.run.run`."""
    from fluxnb.measure import telemetry
    from fluxnb.report.run import run

    os.chdir(folder)
    if caller := os.environ.pop(CALLER, ""):
        leftovers.ends_with(int(caller))
    chosen = params.chosen(gpu)
    return run(
        chosen,
        own(chosen, folder),
        prepare=lambda: telemetry.provenance(chosen, Path(__file__).resolve().parents[2]),
        only=[stem],
        force=force,
    )


# --- where jobs run ---------------------------------------------------------------------------------------


def _here(chosen: params.Params, jobs: list[Job]):
    """Processes of this machine, one for each group of GPUs; yields each job and its trouble when it has ended."""
    free, running = places(chosen), set[subprocess.Popen]()

    def one(job: Job):
        gpus = free.pop()
        visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        given = {**_environment(), **visible, CALLER: str(os.getpid())}
        try:
            log = job.folder / "job.log"
            with open(log, "wb") as out:
                running.add(process := subprocess.Popen(job.command, env=given, stdout=out, stderr=out))
                code = process.wait()
            scrub.scrub_file(log)
            return job, f"{ended} (see {log})" if (ended := _ended(code)) else ""
        finally:
            free.append(gpus)

    with ThreadPoolExecutor(len(free)) as pool:
        try:
            for future in as_completed([pool.submit(one, job) for job in jobs]):
                yield future.result()
        except BaseException:  # interrupted: they are, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


def _ended(code: int) -> str:
    """What is wrong with the exit status of a job's process; 1 is a notebook that failed, which its state says."""
    if code < 0:
        return f"its process was ended by signal {-code}"
    return "" if code in (0, 1) else f"its process ended with status {code}"


def check_slurm() -> None:
    """Raises UserError unless Slurm is here and answers."""
    if not shutil.which("sbatch"):
        raise UserError(
            "LAUNCH=slurm needs Slurm's commands (sbatch): run it where jobs are submitted, or leave LAUNCH out."
        )
    try:
        answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm doesn't answer within {ANSWER_S:.0f} s (sinfo): see whether it is up.") from None
    if answer.returncode:
        said = (answer.stderr.strip().splitlines() or ["no message"])[0]
        raise UserError(f"Slurm doesn't answer (sinfo: {said}): see whether it is up.")


def _on_slurm(chosen: params.Params, jobs: list[Job]):
    """Jobs of Slurm through submitit, all submitted at once; cancelled if this is interrupted."""
    submitit = need("submitit", "LAUNCH=slurm")

    logs = jobs[0].folder.parent / "slurm"
    executor = submitit.AutoExecutor(logs, cluster="slurm")
    given = {"timeout_min": 60 * HOURS, "nodes": 1, "tasks_per_node": 1}
    if chosen.gpu.match == "cpu":
        given["slurm_exclusive"] = True  # neighbours would disturb the timings
    else:
        given["gpus_per_node"] = chosen.gpu.count
    executor.update_parameters(**given | _slurm_options())
    os.environ["PYTHONPATH"] = _environment()["PYTHONPATH"]
    waiting, gone = {}, set[str]()
    try:
        for job in jobs:
            name = f"fluxnb-{chosen.name}-{job.stem}"[:50] + f"-{secrets.token_hex(4)}"  # nobody else's
            (job.folder / SLURM_NAME).write_text(name, encoding="utf-8")  # before it is one
            executor.update_parameters(name=name)
            try:
                waiting[executor.submit(subprocess.run, job.command, check=False)] = job
            except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
                said = plain((str(error).strip().splitlines() or ["no message"])[-1], 200)
                raise UserError(f"Slurm takes no job (sbatch: {said}): see SLURM_OPTIONS.") from None
        while waiting:
            listed = _listed()
            for sent, job in list(waiting.items()):
                if sent.paths.result_pickle.exists():  # asking submitit needs accounting, which not every Slurm has
                    trouble = _trouble(sent)
                elif listed is None or sent.job_id in listed or sent.job_id not in gone:
                    gone -= {sent.job_id}
                    gone |= {sent.job_id} if listed is not None and sent.job_id not in listed else set()
                    continue  # its result may be a moment behind
                else:
                    trouble = (
                        f"Slurm's job {sent.job_id} ended without a result: cancelled, out of time, or its node died"
                    )
                del waiting[sent]
                (job.folder / SLURM_NAME).unlink(missing_ok=True)
                for log in (sent.paths.stdout, sent.paths.stderr):
                    scrub.scrub_file(log)
                yield job, trouble
            time.sleep(POLL_S)
    finally:
        with leftovers.uninterrupted():
            _cancel(jobs)


def _cancel(jobs: list[Job]) -> None:
    """Cancels what Slurm still has of these jobs, by their names: one may have been submitted without an answer yet."""
    for job in jobs:
        with contextlib.suppress(FileNotFoundError):
            name = (job.folder / SLURM_NAME).read_text(encoding="utf-8")
            try:
                subprocess.run(["scancel", f"--name={name}"], capture_output=True, timeout=ANSWER_S, check=True)
            except (OSError, subprocess.SubprocessError):
                print(f"Slurm doesn't answer: cancel what may be left with `scancel --name={name}`", file=sys.stderr)
                continue
            (job.folder / SLURM_NAME).unlink()


def _listed() -> set[str] | None:
    """The jobs that Slurm waits for or runs; None if it doesn't answer just now."""
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--format=%i"], capture_output=True, text=True, timeout=ANSWER_S
        )
    except subprocess.TimeoutExpired:
        return None
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def _trouble(sent) -> str:
    failed = sent.exception()
    if failed:
        return f"Slurm's job {sent.job_id} failed: {str(failed).splitlines()[0]}"
    return _ended(sent.result().returncode)


def _slurm_options() -> dict:
    """SLURM_OPTIONS="partition=gpu account=me time=600" as submitit wants them; time in minutes."""
    given: dict[str, int | str] = {}
    written = os.environ.get("SLURM_OPTIONS", "")
    allowed = 'write name=value, such as "partition=gpu time=600"'
    try:
        parts = shlex.split(written)
    except ValueError as error:
        raise UserError(f"SLURM_OPTIONS={written!r:.80} can't be read ({error}): {allowed}.") from None
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or not value.isprintable():
            raise UserError(f"SLURM_OPTIONS has {part!r:.80}: {allowed}.")
        if name == "time" and not (re.fullmatch(r"[0-9]{1,6}", value) and int(value)):
            raise UserError(f"SLURM_OPTIONS has time={value!r:.80}: give whole minutes, such as time=600.")
        number = re.fullmatch(r"[0-9]{1,15}", value)
        given["timeout_min" if name == "time" else f"slurm_{name.replace('-', '_')}"] = int(value) if number else value
    return given


def _environment() -> dict[str, str]:
    """This environment, with this package found by any folder's Python."""
    package = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


if __name__ == "__main__":
    place, name, notebook, *rest = sys.argv[1:]
    sys.excepthook = scrub.excepthook
    with leftovers.interrupts(), scrub.terminal():
        sys.exit(work(Path(place).resolve(), name, notebook, rest == ["force"]))
