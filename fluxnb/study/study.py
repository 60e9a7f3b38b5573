"""The study's one way to measure: what has no row yet is measured by a timer, and appended row by row."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from fluxnb import families, params
from fluxnb.errors import UserError
from fluxnb.families import Family
from fluxnb.measure import identity, latency, load, ranks, telemetry
from fluxnb.models import embedded, pipelines
from fluxnb.study import kept
from fluxnb.study.candidate import Candidate
from fluxnb.study.comparison import SLOW_S, Comparison, failure
from fluxnb.study.judging import judge, trace_of
from fluxnb.study.pool import Pool
from fluxnb.study.results import Results, key_of, now
from fluxnb.study.row import KEY, Row
from fluxnb.study.serving import Load
from fluxnb.study.session import Session
from fluxnb.study.subject import Subject
from fluxnb.technique import Unavailable, applied

RUN_IT = "run this notebook without REPLAY=1, on the GPU that it is about."
PROGRESS, FORCE = "FLUXNB_PROGRESS", "FLUXNB_FORCE"  # variables of a kernel that `make report` started


@dataclass(frozen=True, eq=False)
class Task:
    """A row to be: its key, what it means, and which row that is there is enough."""

    key: dict
    meaning: dict
    code: str | None = None
    enough: Callable[[Row], bool] = lambda row: True


def begin(gpu: str, notebook: str, **overrides) -> Study:
    """Opens the study for a notebook. Raises UserError if the parameters or the machine don't fit.

    Args:
        overrides: of the notebook's own parameters, checked as those of params/ are.
    """
    chosen = params.overridden(params.load(gpu), notebook, overrides)
    if not telemetry.replayed():
        name, count = params.detect_gpu()
        params.check_gpu(chosen, name, force=os.environ.get(FORCE) == "1", detected_count=count)
    return Study(chosen, notebook, params.find_folder().parent)


class Study:
    """The rows, images and traces of one notebook on one GPU configuration."""

    def __init__(self, chosen: params.Params, notebook: str, root: Path):
        self.params, self.notebook, self.root = chosen, notebook, root
        place = chosen.report_dir if telemetry.replayed() else chosen.own_dir
        self.results = Results(root / place / "results.csv")
        self.images_dir = root / "build" / chosen.name / "images"
        self.ranks_log = root / "build" / chosen.name / "ranks.log"
        self.run_id = uuid.uuid4().hex[:12]
        self.pool = Pool()
        self._done = self._found = self._total = 0

    @property
    def given(self) -> SimpleNamespace:
        """The values of the notebook's own parameters."""
        return self.params.given(self.notebook)

    @cached_property
    def host(self) -> str:
        """This machine's name; a replay shows rows of any."""
        return "any" if telemetry.replayed() else identity.host(self.root / "reports" / "own")

    @cached_property
    def session(self) -> Session:
        """The session that this process measures in."""
        return Session(self.host, self.run_id)

    @cached_property
    def _origin(self) -> dict:
        return {"kind": identity.kind(), "commit": telemetry.commit(self.root), "run_id": self.run_id}

    # --- what is run ------------------------------------------------------------------------------------------

    @cached_property
    def subjects(self) -> list[Subject]:
        """Every model of this configuration, in the order of study.models."""
        return [self.subject(name) for name in self.params.study.models]

    @property
    def judged(self) -> list[Subject]:
        """Those whose images mean something."""
        return [subject for subject in self.subjects if subject.model.judged]

    @property
    def full_size(self) -> list[Subject]:
        """Those of FLUX's size whose weights are random: for time and memory."""
        return [subject for subject in self.subjects if not subject.model.judged]

    def subject(self, name: str, dtype: str | None = None) -> Subject:
        """A model by name with this configuration's prompts, seeds and size."""
        model, given = pipelines.describe(name), self.params.study
        full, small = given.full_size, name == embedded.NAME
        return Subject(
            model=model,
            dtype=dtype or ("bfloat16" if telemetry.machine()["gpus"] else "float32"),
            prompts=tuple(given.prompts),
            seeds=tuple(given.seeds),
            guidance=given.guidance_scale,
            width=(given.width or model.side) if small else full.width,
            height=(given.height or model.side) if small else full.height,
            rounds=given.rounds if small else full.rounds,
        )

    def first_judged(self) -> Subject:
        """The first of the study's models whose images mean something. Raises UserError if there is none."""
        if self.judged:
            return self.judged[0]
        raise UserError(
            f"{self.notebook} judges images, and no model of study.models has trained weights: add `{embedded.NAME}`, "
            f"or a hub id or folder with real weights, to study.models in params/{self.params.name}.yaml."
        )

    def steps(self, subject: Subject) -> int:
        """The full number of denoising steps for this model."""
        given = self.params.study
        return given.steps if subject.model.name == embedded.NAME else given.full_size.steps

    def pipe(self, subject: Subject):
        """The subject's pipeline, ready to run."""
        return self.loaded(subject).pipe

    def loaded(self, subject: Subject):
        """The subject with its pipeline. Raises UserError in a replay."""
        if telemetry.replayed():
            raise UserError(f"A replay measures nothing, and this needs {subject.model.name} loaded: {RUN_IT}")
        return self.pool.get(subject)

    # --- what is measured -------------------------------------------------------------------------------------

    def key(self, subject: Subject, candidate: Candidate) -> dict:
        """What determines a row."""
        own = candidate.of(subject)
        settings = replace(candidate, built=own.built).settings | {"dtype": own.dtype, "inputs": own.digest}
        return {
            "notebook": self.notebook,
            "technique": candidate.meaning["technique"],
            "stack": candidate.stack,
            "settings": settings,
            "model": own.model.name,
            "weights": own.model.weights,
            "use_case": own.use_case,
            "gpu": self.params.name,
            "gpus": candidate.gpus,
            "width": own.width,
            "height": own.height,
            "steps": candidate.steps,
            "batch": candidate.batch,
            "users": 1,
            "images_each": 1,
            "host": self.host,
            "versions": telemetry.versions_short(),
        }

    def compare(
        self, subject: Subject, baseline: Candidate, candidates: list[Candidate], judge=True, profile=False
    ) -> list[Row]:
        """Measures what has no finished row yet, in turn with the baseline, which is measured against itself, too.

        Args:
            judge: compare images too (for trained weights; random ones are never judged).
            profile: note in the row's proof which kernels took the most time, and each kind's share of a step; a row
                without is measured again.

        Returns:
            The baseline's row and those of the candidates. What failed for lack of memory or otherwise is a row, too;
            a baseline that fails otherwise raises.
        """
        everything = [baseline, *candidates]
        tasks = [self._task(subject, c, profile) for c in everything]

        def timer(due: list[Task]) -> None:
            of = {task: c for task, c in zip(tasks, everything, strict=True)}
            comparison = Comparison(
                self.pool, subject, baseline, lambda c, made: self._images(subject, c, made),
                judge and subject.model.judged, profile, self.params.study.warmup,
                lambda seconds: self._settle(tasks[0], seconds),
                lambda c, columns: self._append(tasks[everything.index(c)], columns),
            )  # fmt: skip
            comparison.measure([of[task] for task in due], self.params.study.group)

        rows = self._measured(tasks, timer)
        return [self._noise_floor(rows[0]), *rows[1:]]

    def survey(self, subject: Subject, baseline: Candidate, candidates: list[Candidate]) -> list[Row]:
        """Quality and computed steps of candidates, untimed: rows without latencies, found again like any other."""
        tasks = [self._task(subject, c) for c in candidates]

        def timer(due: list[Task]) -> None:
            references, _ = self._images(subject, baseline)
            for task, candidate in zip(tasks, candidates, strict=True):
                if task in due:
                    own = candidate.of(subject)
                    row = dict.fromkeys(("total_steps", "computed_steps"), own.runs(candidate.steps))
                    try:
                        images, traces = self._images(subject, candidate)
                        row |= {"status": "ok", **judge(own, references, images, traces, self.pool.get(own))}
                    except Unavailable as reason:
                        row = {"status": "unavailable", "reason": str(reason)}
                    except RuntimeError as error:
                        row = failure(error)
                    self._append(task, row)

        return self._measured(tasks, timer)

    def spread(self, subject: Subject, candidates: list[Candidate], limit_s: float = 300.0) -> list[Row]:
        """Measures candidates on several ranks, each beside the same on one of them alone (`study.scaling`).

        A rank that fails is an error row of the candidate that ran, and the ones after it are measured by new ranks.
        What the ranks print is added to build/<gpu>/ranks.log.

        Args:
            candidates: all on the same number of GPUs, `Candidate.gpus`.
            limit_s: for one candidate; ranks that take longer are ended.
        """
        tasks = [self._task(subject, c) for c in candidates]

        def timer(due: list[Task]) -> None:
            self.pool.release()  # the ranks need the memory
            while due:
                given = [candidates[tasks.index(task)] for task in due]
                (world,) = {c.gpus for c in given}
                try:
                    for by_one, measured in ranks.run(
                        "fluxnb.study.scaling:measure", world, subject, given, limit_s=limit_s, log=self.ranks_log
                    ):
                        task = due.pop(0)
                        base = by_one and self._append(_alone(task), by_one)
                        self._append(task, measured | ({"baseline": base.id} if base else {}))
                    return
                except ranks.RankError as error:
                    if due:
                        self._append(due.pop(0), failure(error))

        return self._measured(tasks, timer)

    def serve(self, subject: Subject, loads: list[Load], steps: int, batch: int = 1, places: int = 64) -> list[Row]:
        """Measures a server of the subject (`measure.load`), one process per GPU, under several loads in turn.

        Args:
            batch: waiting requests that are made together.
            places: of the queue.
        """
        processes = self.params.gpu.count
        shape, tasks = self.key(subject, Candidate(steps, gpus=processes)), []
        for each in loads:
            meaning = each.meaning(batch)
            key = shape | {"technique": meaning["technique"], "users": each.users, "images_each": each.images}
            key["settings"] = shape["settings"] | each.settings(batch, places, processes)
            # one of fewer requests than asked for has no 99th percentile, say
            tasks.append(Task(key, meaning, enough=lambda r, total=each.total: (r.shown("requests") or 0) >= total))

        def timer(due: list[Task]) -> None:
            self.pool.release()
            images = tuple({task.key["images_each"] for task in due})
            with load.Server(subject, processes, places, batch, images) as server:
                for task, each in zip(tasks, loads, strict=True):
                    if task in due:
                        first = self._find(tasks[0])
                        rate = first and first.images_per_s / first.images_each * processes
                        self._append(task, each.put_on(server, steps, rate))

        return self._measured(tasks, timer)

    def time(
        self, technique: str, settings: dict, run, repeats: int, *, family: Family = families.CEILING, label: str = "",
        also=None, before=None, warm=True, **columns,
    ) -> Row:  # fmt: skip
        """Times a function by itself, say a matrix product; one row, found again like any other.

        Args:
            also: called after a successful run for further columns of the row, such as an error or a proof.
            before: called before anything is timed; not at all if the row is there already.
            warm: False times the very first call: what a user waits for.
            columns: of the key, such as model and weights; random weights by default, say of matrices.
        """
        key = {"notebook": self.notebook, "technique": technique, "settings": settings, "weights": "random", **columns}
        key |= {"gpu": self.params.name, "gpus": 1, "host": self.host, "versions": telemetry.versions_short()}
        label = label or technique
        task = Task(key, {"family": family.name, "technique": technique, "label": label, "mark": label})

        def timer(due: list[Task]) -> None:
            try:
                if before:
                    before()
                warmed = latency.warm_up(run, limit=3, enough_s=SLOW_S) if warm else None
                samples = [latency.timed(run) for _ in range(repeats)]
                measured = {"status": "ok", **latency.summary(samples), **(also() if also else {})}
                measured["stable"] = warmed and int(warmed.stable)
            except Unavailable as reason:
                measured = {"status": "unavailable", "reason": str(reason)}
            except RuntimeError as error:
                measured = failure(error)
            self._append(task, measured)

        return self._measured([task], timer)[0]

    # --- the one loop -----------------------------------------------------------------------------------------

    def _task(self, subject: Subject, candidate: Candidate, profile: bool = False) -> Task:
        def enough(row: Row) -> bool:
            if profile and row.ok and telemetry.machine()["gpus"] and row.computed_steps == row.total_steps:
                return row.shown("step_ms") is not None
            return candidate.patience_s <= row.shown("patience_s", math.inf)  # the more patient try again

        return Task(self.key(subject, candidate), candidate.meaning, self._code(subject, candidate), enough)

    @staticmethod
    def _code(subject: Subject, candidate: Candidate) -> str | None:
        return replace(candidate, built=candidate.of(subject).built).code

    def _measured(self, tasks: list[Task], timer: Callable[[list[Task]], None]) -> list[Row]:
        """The tasks' rows: those that are there, and those that the timer appends for the tasks it is given."""
        self._total += len(tasks)
        due = [task for task in tasks if self._find(task) is None]
        self._progress(len(tasks) - len(due), "found in the results", found=len(tasks) - len(due))
        if due:
            timer(due)
        return [self._find(task, shown=True) for task in tasks]

    def _find(self, task: Task, shown: bool = False) -> Row | None:
        """A row that is enough; to be shown also an error. In a replay what isn't there raises."""
        if not telemetry.replayed():
            row = self.results.find(task.key, task.code, errors=shown)
            return row if row is None or shown or task.enough(row) else None
        row = self.results.find(task.key, errors=True, anywhere=True)
        if row is None:
            raise UserError(
                f"A replay measures nothing, and {self.notebook} has no row {task.meaning['label']!r}: {RUN_IT}"
            )
        return row

    def _noise_floor(self, row: Row) -> Row:
        """The baseline's row that was timed against itself, of the same session if there is one."""
        same = (r for r in reversed(self.results.rows()) if r.again and r.session == row.session)
        return row if row.again else next((r for r in same if key_of(r) == key_of(row)), row)

    def _append(self, task: Task, columns: dict) -> Row:
        session = self.session.current(self.results.rows())
        own = {"code": task.code, "session": session, "measured_at": now()}
        row = self.results.append({**task.key, **task.meaning, **self._origin, **own, **columns})
        self._progress(1, f"{row.model}: {row.label}" if row.model else row.label)
        return row

    def _settle(self, task: Task, seconds: list[float]) -> None:
        """Begins another session where the baseline isn't what other processes of this one measured."""
        key = {name: task.key.get(name) for name in KEY if name not in ("notebook", "gpu")}
        self.session.check(self.results.rows(), key, seconds)

    def _progress(self, finished: int, label: str, found: int = 0) -> None:
        self._done, self._found = self._done + finished, self._found + found
        if finished and (path := os.environ.get(PROGRESS)):
            counts = {"done": self._done, "found": self._found, "total": self._total}
            line = {"notebook": self.notebook, **counts, "label": label}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    # --- images and traces ------------------------------------------------------------------------------------

    def images(self, subject: Subject, candidate: Candidate) -> list:
        """The candidate's image for each of `subject.inputs`; made again if they aren't on the disk."""
        return self._images(subject, candidate)[0]

    def traces(self, subject: Subject, candidate: Candidate) -> list[dict | None]:
        """What a cache decided for each of `subject.inputs`: mask, indicator, threshold; None without one."""
        return self._images(subject, candidate)[1]

    def _images(self, subject: Subject, candidate: Candidate, made: dict | None = None) -> tuple[list, list]:
        """The images and traces of all inputs: from the disk, else those in `made`, the rest made here."""
        made, own = dict(made or {}), candidate.of(subject)
        key = kept.key_of(self.key(subject, candidate), self._code(subject, candidate))
        if found := kept.find(self.images_dir, key):
            return [found.image(i) for i in range(len(own.inputs))], found.traces
        if telemetry.replayed():
            label = candidate.meaning["label"]
            raise UserError(f"A replay makes no images, and those of {label!r} are not in build/: {RUN_IT}")
        if missing := [given for given in own.inputs if given not in made]:
            loaded = self.pool.get(own)
            with applied(loaded.pipe, *candidate.above):
                for given in missing:
                    made[given] = loaded.generate(*given, candidate.steps), trace_of(candidate)
        images, traces = (list(column) for column in zip(*(made[given] for given in own.inputs), strict=True))
        kept.keep(self.images_dir, key, candidate.meaning["label"], own.inputs, images, traces)
        return images, traces


def _alone(task: Task) -> Task:
    """The row of what one rank makes of a task's techniques by itself."""
    family, label = families.BASELINE.name, f"{task.meaning['label']}: one of the GPUs alone"
    key = task.key | {"technique": family, "gpus": 1, "settings": {**task.key["settings"], "ranks": task.key["gpus"]}}
    return Task(key, task.meaning | {"family": family, "technique": family, "label": label, "mark": "1"}, task.code)


def need(rows: list[Row], **equals) -> list[Row]:
    """The rows with status ok and these values. Raises UserError when there is none: nothing to report."""
    found = [r for r in rows if r.ok and all(getattr(r, k) == v for k, v in equals.items())]
    if not found:
        raise UserError(f"No finished measurement with {equals}: the rows say why in their reason.")
    return found
