"""The study's one way to measure: what has no row yet is measured by a timer, and appended row by row."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from fluxnb import families, params
from fluxnb.errors import UserError, lacks_memory
from fluxnb.families import Family
from fluxnb.measure import clip, telemetry
from fluxnb.study import fitted, kept, serving, spreading
from fluxnb.study.candidate import Candidate
from fluxnb.study.comparison import FAILURES, Comparison, by_itself, failure
from fluxnb.study.judging import judge, trace_of
from fluxnb.study.loop import AFRESH, RUN_IT, Rows, Task
from fluxnb.study.pool import Pool
from fluxnb.study.results import Results
from fluxnb.study.row import Row
from fluxnb.study.serving import Load
from fluxnb.study.subject import Subject
from fluxnb.study.subjects import Subjects
from fluxnb.technique import Unavailable, applied

FORCE = "FLUXNB_FORCE"  # variable of a kernel that `make report` started: on any GPU


def begin(gpu: str, notebook: str, **overrides) -> Study:
    """Opens the study for a notebook. Raises UserError if the parameters or the machine don't fit.

    Args:
        overrides: of the notebook's own parameters, checked as those of params/ are.
    """
    chosen = params.overridden(params.chosen(gpu), notebook, overrides)
    if not telemetry.replayed():
        name, count = params.detect_gpu()
        params.check_gpu(chosen, name, force=os.environ.get(FORCE) == "1", detected_count=count)
        if chosen.study.clip:
            clip.load(chosen.study.clip)  # what isn't one is said now
    s = Study(chosen, notebook, params.find_folder().parent)
    fitted.know(s)
    return s


class Study(Subjects, Rows):
    """The rows, images and traces of one notebook on one GPU configuration."""

    def __init__(self, chosen: params.Params, notebook: str, root: Path):
        place = chosen.report_dir if telemetry.replayed() else chosen.own_dir
        super().__init__(Results(root / place / "results.csv"), notebook, root)
        self.params, self.pool, self._kept = chosen, Pool(), set[Path]()  # folders of images that were made here
        self.images_dir, self.ranks_log = (root / chosen.build_dir / name for name in ("images", "ranks.log"))

    @property
    def given(self) -> SimpleNamespace:
        """The values of the notebook's own parameters."""
        return self.params.given(self.notebook)

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
        settings = replace(candidate, built=own.built).settings | own.said
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
        judge, everything = judge and subject.model.judged, [baseline, *candidates]
        tasks = [self._task(subject, c, timed=True, judged=judge, profiled=profile) for c in everything]

        def timer(due: list[Task]) -> None:
            of = {id(candidate): task for candidate, task in zip(everything, tasks, strict=True)}
            comparison = Comparison(
                self.pool, subject, baseline, partial(self._images, subject), judge, profile,
                self.params.study.warmup, partial(self.settle, tasks[0]), lambda c, took: self.append(of[id(c)], took),
            )  # fmt: skip
            comparison.measure([c for c in everything if of[id(c)] in due], self.params.study.group)

        rows = self.measured(tasks, timer)
        return [self.noise_floor(rows[0]), *rows[1:]]

    def survey(self, subject: Subject, baseline: Candidate, candidates: list[Candidate]) -> list[Row]:
        """Quality and computed steps of candidates, untimed: rows without latencies, found again like any other."""
        tasks = [self._task(subject, c, judged=True) for c in candidates]

        def timer(due: list[Task]) -> None:
            try:
                references, lacking = self._images(subject, baseline)[0], None
            except FAILURES as error:
                if not lacks_memory(error):
                    raise
                references, lacking = [], failure(error)
            for task, candidate in zip(tasks, candidates, strict=True):
                if task in due:
                    self.append(task, lacking or self._judged(subject, candidate, references))

        return self.measured(tasks, timer)

    def _judged(self, subject: Subject, candidate: Candidate, references: list) -> dict:
        own = candidate.of(subject)
        row: dict = dict.fromkeys(("total_steps", "computed_steps"), own.runs(candidate.steps))
        try:
            images, traces = self._images(subject, candidate)
            return row | {"status": "ok", **judge(own, references, images, traces, self.pool.get(own), each=True)}
        except (Unavailable, *FAILURES) as error:
            return failure(error)

    def spread(self, subject: Subject, candidates: list[Candidate], limit_s: float = 300.0) -> list[Row]:
        """Measures candidates on several ranks, each beside the same on one of them alone (`study.spreading`).

        A rank that fails is an error row of the candidate that ran, and the ones after it are measured by new ranks.
        What the ranks print is added to build/<gpu>/ranks.log.

        Args:
            candidates: all on the same number of GPUs, `Candidate.gpus`.
            limit_s: for one candidate; ranks that take longer are ended.
        """
        of = {self._task(subject, c): c for c in candidates}

        def timer(due: list[Task]) -> None:
            self.pool.release()  # the ranks need the memory
            spreading.measure(self, subject, {task: of[task] for task in due}, limit_s, self.ranks_log)

        return self.measured(list(of), timer)

    def serve(self, subject: Subject, loads: list[Load], steps: int, batch: int = 1) -> list[Row]:
        """Measures a server of the subject (`measure.load`), one process per GPU, under several loads in turn.

        Args:
            batch: at most so many waiting requests are made together.
        """
        shape = self.key(subject, Candidate(steps, gpus=self.params.gpu.count))
        of = {Task(*each.row(shape, batch), enough=each.enough): each for each in loads}

        def timer(due: list[Task]) -> None:
            self.pool.release()
            serving.measure(self, subject, of, due, batch)

        return self.measured(list(of), timer)

    def time(
        self, technique: str, settings: dict, run, repeats: int, *, family: Family = families.CEILING, label: str = "",
        also=None, before=None, warm=True, held_s: float = 0.0, **columns,
    ) -> Row:  # fmt: skip
        """Times a function by itself, say a matrix product; one row, found again like any other.

        Args:
            also: called after a successful run for further columns of the row, such as an error or a proof.
            before: called before anything is timed; not at all if the row is there already.
            warm: False times the very first call: what a user waits for.
            held_s: seconds of calls in a row that the samples are of, after as many to warm up: under load.
            columns: of the key, such as model and weights; random weights by default, say of matrices.
        """
        settings = settings | {"held_s": held_s} if held_s else settings
        key = {"notebook": self.notebook, "technique": technique, "settings": settings, "weights": "random", **columns}
        key |= {"gpu": self.params.name, "gpus": 1, "host": self.host, "versions": telemetry.versions_short()}
        label = label or technique
        task = Task(key, {"family": family.name, "technique": technique, "label": label, "mark": label})
        timer = lambda _: self.append(task, by_itself(run, repeats, also, before, warm, held_s))  # noqa: E731
        return self.measured([task], timer)[0]

    def _task(
        self, subject: Subject, candidate: Candidate, timed: bool = False, judged: bool = False, profiled: bool = False
    ) -> Task:
        def enough(row: Row) -> bool:
            if not row.ok:
                return candidate.patience_s <= row.shown("patience_s", math.inf)  # the more patient try again
            if (timed and (row.n or 0) < subject.rounds) or (judged and row.images is None):
                return False  # surveyed before, timed in fewer rounds, or without a look at its images
            seen = not profiled or not telemetry.machine()["gpus"] or row.computed_steps != row.total_steps
            return seen or row.shown("step_ms") is not None

        return Task(self.key(subject, candidate), candidate.meaning, self._code(subject, candidate), enough)

    @staticmethod
    def _code(subject: Subject, candidate: Candidate) -> str | None:
        return replace(candidate, built=candidate.of(subject).built).code

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
        name = kept.folder(self.images_dir, key)
        afresh = os.environ.get(AFRESH, "0") not in ("", "0") and name not in self._kept
        if not afresh and (found := kept.find(self.images_dir, key)):
            return [found.image(i) for i in range(len(own.inputs))], found.traces
        if telemetry.replayed():
            label = candidate.meaning["label"]
            raise UserError(f"A replay makes no images, and those of {label!r} are not in build/: {RUN_IT}")
        if missing := [given for given in own.inputs if given not in made]:
            loaded = self.pool.get(own)
            with applied(loaded.pipe, *candidate.above):
                for at in range(0, len(missing), candidate.batch):
                    batch = list(itertools.islice(itertools.cycle(missing[at:]), candidate.batch))
                    images = loaded.batch(batch, candidate.steps)
                    made |= {given: (image, trace_of(candidate)) for given, image in zip(batch, images, strict=True)}
        images, traces = (list(column) for column in zip(*(made[given] for given in own.inputs), strict=True))
        self._kept.add(name)
        kept.keep(self.images_dir, key, candidate.meaning["label"], own.inputs, images, traces)
        return images, traces


def need(rows: list[Row], **equals) -> list[Row]:
    """The rows with status ok and these values. Raises UserError when there is none: nothing to report.

    Where all of it lacks memory, that is what there is to report: the rows as they are.
    """
    found = [r for r in rows if r.ok and all(getattr(r, k) == v for k, v in equals.items())]
    if not found and not equals and any(r.status == "oom" for r in rows):
        return list(rows)
    if not found:
        raise UserError(f"No finished measurement with {equals}: the rows say why in their reason.")
    return found
