"""The study's one way to measure: quality and speed of candidates against a baseline, one row each.

A notebook opens it, names its baseline and candidates, and reads the rows:

    s = study.begin(gpu, "05_first_block_cache")
    subject = s.subject("embedded")
    rows = s.compare(subject, plain(28), [using(first_block(0.12), 28), fewer_steps(12)])

Quality first, for every prompt and seed; then speed, interleaved with the baseline. A finished row is never
measured again on the same machine with the same inputs; images and traces are kept beside the rows.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import math
import os
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fluxnb import params
from fluxnb.errors import UserError
from fluxnb.measure import latency, load, quality, ranks, telemetry
from fluxnb.models import control, material, pipelines
from fluxnb.study.results import Results, now
from fluxnb.technique import Technique, Unavailable, applied, attribute
from fluxnb.techniques import compilation
from fluxnb.world import probe

RUN_IT = "run this notebook without REPLAY=1, on the GPU that it is about."
ABOUT = "about.json"  # beside kept images: what they are of
SLOW_S = 20.0  # an image that takes longer than this warms up by itself
CONTROL = "fewer steps"
BASELINE = "baseline"
Made = dict[tuple[str, int], tuple[Image.Image, dict | None]]  # (prompt, seed): its image and its cache's trace


@dataclass(frozen=True)
class Candidate:
    """One thing to measure: techniques on a pipeline, at a number of steps."""

    name: str  # the technique column: what decides the colour
    label: str  # what a reader sees
    steps: int
    techniques: tuple[Technique, ...] = ()
    settings: dict = field(default_factory=dict)
    subject: Subject | None = None  # another pipeline than the baseline's, say in another number format
    batch: int = 1  # images made at once
    gpus: int = 1  # that it runs on
    patience_s: float = math.inf  # until its first image; then it is given up


def plain(
    steps: int, name: str = BASELINE, label: str = "", under: tuple[Technique, ...] = (), batch: int = 1
) -> Candidate:
    """The pipeline as it is, or with techniques that whatever is compared with it has too."""
    label = label or ", ".join([f"{steps} steps", *(t.label for t in under)])
    return Candidate(name, label, steps, under, _settings(*under), batch=batch)


def fewer_steps(steps: int, solver: Technique | None = None) -> Candidate:
    """The control that every technique has to beat: fewer steps, with the pipeline's own solver or another."""
    if solver is None:
        return plain(steps, CONTROL)
    return Candidate(solver.name, f"{solver.label} {steps} steps", steps, (solver,), solver.settings)


def using(technique: Technique, steps: int, under: tuple[Technique, ...] = ()) -> Candidate:
    """The pipeline with one technique, on top of those that its baseline has too."""
    label = ", ".join([technique.label, *(t.label for t in under)])
    return Candidate(technique.name, label, steps, (*under, technique), _settings(*under, technique))


def built(
    subject: Subject,
    *techniques: Technique,
    steps: int,
    name: str = "",
    label: str = "",
    batch: int = 1,
    patience_s: float = math.inf,
) -> Candidate:
    """The same model with techniques built in, in a pipeline of its own; the first one names it."""
    return Candidate(
        name or techniques[0].name,
        label or ", ".join(t.label for t in techniques),
        steps,
        subject=subject.having(*techniques),
        batch=batch,
        patience_s=patience_s,
    )


def on_top(candidate: Candidate, *techniques: Technique, name: str = "", label: str = "") -> Candidate:
    """A candidate's own pipeline, not another one like it, with more techniques around every image."""
    return replace(
        candidate,
        name=name or techniques[0].name,
        label=label or ", ".join([candidate.label, *(t.label for t in techniques)]),
        techniques=(*candidate.techniques, *techniques),
        settings=_together(candidate.settings, _settings(*techniques)),
    )


def on_ranks(
    subject: Subject, gpus: int, *techniques: Technique, steps: int, name: str = "", label: str = ""
) -> Candidate:
    """Techniques on so many ranks (`Study.spread`), on a subject that may have others built in."""
    return Candidate(
        name or techniques[0].name,
        label or ", ".join(t.label for t in techniques),
        steps,
        techniques,
        _settings(*techniques),
        subject,
        gpus=gpus,
    )


@dataclass(frozen=True)
class Load:
    """What a server is put under: users who wait for each answer, or arrivals at random.

    Args:
        users: who ask again when they have been answered; with arrivals, 1.
        images: of each request.
        total: requests.
        arrivals: the rate at which requests arrive instead, as a share of what all processes make for users like the
            first load's; None for waiting users.
    """

    users: int
    images: int
    total: int
    arrivals: float | None = None

    @property
    def name(self) -> str:
        return "arrivals" if self.arrivals else "users"

    @property
    def label(self) -> str:
        who = f"arrivals at {self.arrivals:.0%}" if self.arrivals else f"{self.users} user{'s' * (self.users > 1)}"
        return f"{who}, {self.images} image{'s' * (self.images > 1)} each"

    def put_on(self, server: load.Server, steps: int, capacity: float | None = None) -> list[load.Request]:
        """All requests, when all are over; `capacity` in requests per second is needed for arrivals."""
        if self.arrivals:
            return load.open_loop(server, self.arrivals * capacity, self.total, steps, self.images)
        return load.closed_loop(server, self.users, self.total, steps, self.images)


def _settings(*techniques: Technique) -> dict:
    return _together(*(technique.settings for technique in techniques))


def _together(*settings: dict) -> dict:
    """All settings; of two that set the same, both values."""
    found = {}
    for name, value in (item for some in settings for item in some.items()):
        found[name] = value if found.get(name, value) == value else f"{found[name]} + {value}"
    return found


@dataclass
class Subject:
    """A model as this study uses it; its pipeline is loaded when it is first needed."""

    model: pipelines.Model
    dtype: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float
    width: int
    height: int
    rounds: int
    fingerprint: str
    built: tuple[Technique, ...] = ()  # what its pipeline has from the moment it is loaded
    use_case: str = "txt2img"  # a key of pipelines.USE_CASES
    kind: str = "edges"  # of a ControlNet's condition
    strength: float = 0.8  # of image-to-image and inpainting
    controlnet: str | None = None  # a hub id or folder instead of the one that belongs to the model
    load_s: float | None = None
    load_gib: float | None = None  # memory of its weights
    _pipe: object = None
    _missing: Unavailable | None = None

    @property
    def pipe(self):
        """The pipeline, ready to run. Raises Unavailable if one of `built` can't run here, UserError in a replay."""
        if telemetry.replayed():
            raise UserError(f"A replay measures nothing, and this needs {self.model.name} loaded: {RUN_IT}")
        if self._missing:
            raise self._missing
        if self._pipe is None:
            started = time.perf_counter()
            pipe = pipelines.load(self.model.name, self.dtype)
            if self.use_case != "txt2img":
                pipe = pipelines.as_use_case(pipe, self.use_case, self._load_controlnet())
            try:
                for technique in self.built:
                    technique.apply(pipe)
            except Unavailable as reason:
                self._missing = reason
                raise
            latency.synchronize()
            self._pipe, self.load_s, self.load_gib = pipe, time.perf_counter() - started, _gib(pipe)
        return self._pipe

    def having(self, *techniques: Technique) -> Subject:
        """The same model in a pipeline of its own, with techniques built in: for those too slow to put on and off."""
        return replace(self, built=(*self.built, *techniques), load_s=None, load_gib=None, _pipe=None, _missing=None)

    def _load_controlnet(self):
        if not pipelines.takes_condition(self.use_case):
            return None
        return pipelines.load_controlnet(self.model.name, self.dtype, source=self.controlnet)

    def for_use_case(self, use_case: str, kind: str = "edges", strength: float = 0.8) -> Subject:
        """The same weights in the pipeline of another use case."""
        assert not self.built, "what is built in has to be built into the pipeline that it is for"
        new = replace(self, use_case=use_case, kind=kind, strength=strength)
        if telemetry.replayed():
            return new
        new._pipe = pipelines.as_use_case(self.pipe, use_case, new._load_controlnet())
        new.load_gib = _gib(new._pipe)
        return new

    def material(self, prompt: str, seed: int) -> material.Material:
        """What the use case starts from: image, mask, conditions."""
        return _material(prompt, seed, self.width, self.height)

    def runs(self, steps: int) -> int:
        """How many of `steps` are run: fewer where an image is the start."""
        return pipelines.steps_run(self.use_case, steps, self.strength)

    def part(self, prompts: int, rounds: int | None = None) -> Subject:
        """The same pipeline with the first few prompts and the first seed, and fewer rounds: for wide surveys."""
        if not telemetry.replayed():
            _ = self.pipe  # now, so that both have it
        return replace(self, prompts=self.prompts[:prompts], seeds=self.seeds[:1], rounds=rounds or self.rounds)

    def release(self) -> None:
        """Frees the pipeline's memory."""
        self._pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def checked(self) -> bool:
        """Whether prompt adherence can be read off the images: the probe knows one world at one size."""
        return self.model.checked and self.width == self.height == self.model.side

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Every prompt with every seed, the first seed's first."""
        return [(prompt, seed) for seed in self.seeds for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """Changes when prompts, seeds, guidance, weights or what the use case starts from do."""
        determines = [self.prompts, self.seeds, self.guidance, self.fingerprint]
        if pipelines.takes_condition(self.use_case):
            own = control.FOLDER if self.model.name == "embedded" else self.model.name
            determines += [self.kind, _fingerprint(str(self.controlnet or own))]
        if pipelines.takes_image(self.use_case):
            determines.append(self.strength)
        text = json.dumps(determines)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def generate(self, prompt: str, seed: int, steps: int) -> Image.Image:
        """One image."""
        return self.batch([(prompt, seed)], steps)[0]

    def batch(self, inputs: list[tuple[str, int]], steps: int) -> list[Image.Image]:
        """One image for each prompt and seed, made at once."""
        prompts, seeds = map(list, zip(*inputs, strict=True))
        return pipelines.generate(
            self.pipe,
            prompts,
            seeds,
            model=self.model,
            steps=steps,
            guidance=self.guidance,
            width=self.width,
            height=self.height,
            **self._start(inputs),
        )

    def _start(self, inputs: list[tuple[str, int]]) -> dict:
        if self.use_case == "txt2img":
            return {}
        found = [self.material(prompt, seed) for prompt, seed in inputs]
        return {
            "image": [m.image for m in found],
            "mask": [m.mask for m in found],
            "condition": [m.condition(self.kind) for m in found],
            "kind": self.kind,
            "strength": self.strength,
        }


@functools.lru_cache(maxsize=64)
def _material(prompt: str, seed: int, width: int, height: int) -> material.Material:
    return material.of(prompt, seed, width, height)


def begin(gpu: str, notebook: str) -> Study:
    """Opens the study for a notebook. Raises UserError if the parameters or the machine don't fit."""
    chosen = params.load(gpu)
    if not telemetry.replayed():
        name, count = params.detect_gpu()
        params.check_gpu(chosen, name, force=os.environ.get("FLUXNB_FORCE") == "1", detected_count=count)
    return Study(chosen, notebook, params.find_folder().parent)


class Study:
    """The rows, images and traces of one notebook on one GPU configuration."""

    def __init__(self, chosen: params.Params, notebook: str, root: Path):
        self.params, self.notebook, self.root = chosen, notebook, root
        self.results = Results(root / chosen.report_dir / "results.csv")
        self.images_dir = root / "build" / chosen.name / "images"
        self.ranks_log = root / "build" / chosen.name / "ranks.log"
        self.run_id = uuid.uuid4().hex[:12]
        self._done = self._total = 0

    @cached_property
    def machine(self) -> str:
        return telemetry.machine_id()

    @cached_property
    def versions(self) -> str:
        return telemetry.versions_short()

    def _find(self, key: dict, label: str) -> dict | None:
        """A row that is there already. In a replay there is no other: an error is shown, what is missing raises."""
        row = self.results.find(key, errors=bool(telemetry.replayed()))
        if row is None and telemetry.replayed():
            raise UserError(f"A replay measures nothing, and {key['notebook']} has no row {label!r}: {RUN_IT}")
        return row

    # --- what is measured ---------------------------------------------------------------------------------

    def subject(self, name: str, dtype: str | None = None) -> Subject:
        """A model by name with this configuration's prompts, seeds and size."""
        model, given = pipelines.describe(name), self.params.study
        full, small = given.full_size, name == "embedded"
        return Subject(
            model=model,
            dtype=dtype or ("bfloat16" if telemetry.machine()["gpus"] else "float32"),
            prompts=tuple(given.prompts),
            seeds=tuple(given.seeds),
            guidance=given.guidance_scale,
            width=(given.width or model.side) if small else full.width,
            height=(given.height or model.side) if small else full.height,
            rounds=given.rounds if small else full.rounds,
            fingerprint=_fingerprint(name),
        )

    def first_judged(self) -> Subject:
        """The first of the study's models whose images mean something. Raises UserError if there is none."""
        for subject in map(self.subject, self.params.study.models):
            if subject.model.judged:
                return subject
        raise UserError(
            f"{self.notebook} judges images, and no model of study.models has trained weights: add `embedded`, or "
            f"a hub id or folder with real weights, to study.models in params/{self.params.name}.yaml."
        )

    def time(
        self, technique: str, settings: dict, run, repeats: int, also=None, before=None, warm=True, **columns
    ) -> dict:
        """Times a function by itself, say a matrix product; one row, found again like any other.

        Args:
            also: called after a successful run for further columns of the row, such as an error or a proof.
            before: called before anything is timed; not at all if the row is there already.
            warm: False times the very first call: what a user waits for.
            columns: of the key, such as model and weights; random weights by default, say of matrices.
        """
        key = {
            "notebook": self.notebook,
            "technique": technique,
            "settings": settings,
            "weights": "random",
            **columns,
            "gpu": self.params.name,
            "gpus": 1,
            "machine": self.machine,
            "versions": self.versions,
        }
        self._total += 1
        if not self._find(key, technique):
            try:
                if before:
                    before()
                if warm:
                    latency.warm_up(run, limit=3, enough_s=SLOW_S)
                samples = [latency.timed(run) for _ in range(repeats)]
                measured = {"status": "ok", **latency.summary(samples), **(also() if also else {})}
            except Unavailable as reason:
                measured = {"status": "unavailable", "reason": str(reason)}
            except RuntimeError as error:
                measured = _failure(error)
            self.results.append({**key, **measured, "measured_at": now(), "run_id": self.run_id})
        self._progress(1, technique)
        return self.results.find(key, errors=True)

    def steps(self, subject: Subject) -> int:
        """The full number of denoising steps for this model."""
        given = self.params.study
        return given.steps if subject.model.name == "embedded" else given.full_size.steps

    def key(self, subject: Subject, candidate: Candidate) -> dict:
        """What determines a row."""
        own = candidate.subject or subject
        return {
            "notebook": self.notebook,
            "technique": candidate.name,
            "settings": {
                **_together(_settings(*own.built), candidate.settings),
                "dtype": own.dtype,
                "inputs": own.digest,
            },
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
            "images": 1,
            "machine": self.machine,
            "versions": self.versions,
        }

    def compare(
        self, subject: Subject, baseline: Candidate, candidates: list[Candidate], judge=True, profile=False
    ) -> list[dict]:
        """Measures what has no finished row yet; the baseline is measured against itself: the noise floor.

        Args:
            judge: compare images too (for trained weights; random ones are never judged).
            profile: note in the row's proof which kernels took the most time, and each kind's share of a step; a row
                without is measured again.

        Returns:
            The rows of these candidates as a list of dicts, the baseline's first, each with its `label`; columns as
            in study.results. What failed for lack of memory or otherwise is a row too; a baseline that fails raises.
        """
        everything = [baseline, *candidates]
        self._total += len(everything)
        todo = [c for c in everything if not self._is_there(subject, c, profile)]
        if len(todo) < len(everything):
            self._progress(len(everything) - len(todo), "found in the results")
        judge = judge and subject.model.judged
        size = self.params.study.group
        for start in range(0, len(todo), size):
            self._measure_group(subject, baseline, todo[start : start + size], judge, profile)
        rows = [self.results.find(self.key(subject, c), errors=True) for c in everything]
        return [{**row, "label": c.label} for row, c in zip(rows, everything, strict=True)]

    def _is_there(self, subject: Subject, candidate: Candidate, profile: bool) -> bool:
        row = self._find(self.key(subject, candidate), candidate.label)
        if row and profile and row["status"] == "ok" and torch.cuda.is_available() and not telemetry.replayed():
            return row["computed_steps"] != row["total_steps"] or "step_ms" in (row["proof"] or {})
        if row and not telemetry.replayed():  # what was given up is tried again by the more patient
            return candidate.patience_s <= (row["proof"] or {}).get("patience_s", math.inf)
        return bool(row)

    def compare_built(
        self, subject: Subject, baseline: Candidate, candidates: list[Candidate], judge=True, profile=False
    ) -> list[dict]:
        """As `compare`, for candidates with pipelines of their own, which are freed once they have been measured.

        As many as the memory has room for are measured together, so that the baseline is timed once for all of them.
        """
        rows: list[dict] = []
        missing = any(not self._is_there(subject, c, profile) for c in candidates)
        small = subject.model.name == "embedded"
        at_once = self._room_beside(subject) if missing and not small else len(candidates)
        for part in _in_parts(candidates, at_once):
            found = self.compare(subject, baseline, part, judge, profile)
            rows += found[1:] if rows else found
            later = _pipelines(candidates[len(rows) - 1 :])
            for own in _pipelines(part):
                if not any(own is other for other in later):
                    own.release()
        return rows or self.compare(subject, baseline, [], judge, profile)

    def _room_beside(self, subject: Subject) -> int:
        """How many more pipelines of this size fit on the GPU, at least 1; a quarter of it is left to the images."""
        try:
            size = subject.pipe and subject.load_gib
        except torch.cuda.OutOfMemoryError:
            return 1  # the comparison says so
        if not torch.cuda.is_available():
            return 1
        free = 0.75 * torch.cuda.get_device_properties(0).total_memory - torch.cuda.memory_allocated()
        return max(1, int(free / latency.GIB / size))

    def spread(self, subject: Subject, candidates: list[Candidate], limit_s: float = 300.0) -> list[dict]:
        """Measures candidates on several ranks, each beside the same on one of them alone (`fluxnb.study.scaling`).

        A rank that fails is an error row of the candidate that ran, and the ones after it are measured by new ranks.
        What the ranks print is added to build/<gpu>/ranks.log.

        Args:
            candidates: all on the same number of GPUs, `Candidate.gpus`.
            limit_s: for one candidate; ranks that take longer are ended.

        Returns:
            Their rows, each with its `label`.
        """
        self._total += len(candidates)
        todo = [c for c in candidates if not self._find(self.key(subject, c), c.label)]
        if len(todo) < len(candidates):
            self._progress(len(candidates) - len(todo), "found in the results")
        unloaded = {id(c.subject): c.subject and replace(c.subject, _pipe=None) for c in todo}  # ranks load their own
        while todo:
            (world,) = {c.gpus for c in todo}
            given = [replace(c, subject=unloaded[id(c.subject)]) for c in todo]
            try:
                parts = (replace(subject, _pipe=None), given)
                for measured in ranks.run(
                    "fluxnb.study.scaling:measure", world, *parts, limit_s=limit_s, log=self.ranks_log
                ):
                    self._append(subject, todo.pop(0), measured)
            except ranks.RankError as error:
                if not todo:
                    break
                self._append(subject, todo.pop(0), _failure(error))
        rows = [self.results.find(self.key(subject, c), errors=True) for c in candidates]
        return [{**row, "label": c.label} for row, c in zip(rows, candidates, strict=True)]

    def serve(
        self, subject: Subject, loads: list[Load], steps: int, batch: int = 1, places: int = 64, **more
    ) -> list[dict]:
        """Measures a server of the subject (`fluxnb.measure.load`), one process per GPU, under several loads in turn.

        Args:
            batch: waiting requests that are made together.
            places: of the queue.
            more: further settings of the rows.

        Returns:
            Their rows, each with its `label`.
        """
        self._total += len(loads)
        settings = {"batching": batch, "queue": places, **more}
        if batch > 1 and self.params.gpu.count > 1:
            settings["taken"] = "in shares"  # unlike in rows of before, when one process took all that waited
        keys = [self._key_of_load(subject, each, steps, settings) for each in loads]
        todo = [(key, each) for key, each in zip(keys, loads, strict=True) if self._requests(key, each) < each.total]
        if len(todo) < len(loads):
            self._progress(len(loads) - len(todo), "found in the results")
        if todo:
            images = tuple({each.images for _, each in todo})
            with load.Server(subject, self.params.gpu.count, places, batch, images) as server:
                for key, each in todo:
                    with telemetry.Sampler() as sampler:
                        first = self.results.find(keys[0])
                        rate = first and first["images_per_s"] / first["images"] * self.params.gpu.count
                        requests = each.put_on(server, steps, rate)
                    row = {"status": "ok", **load.figures(requests), "total_steps": steps, "computed_steps": steps}
                    if sampler.result:
                        names = ("gpu_util_avg", "gpu_memory_avg_pct", "memory_avg_gib", "memory_peak_gib")
                        row |= {name: sampler.result[name] for name in names} | {"telemetry": sampler.result}
                    self.results.append({**key, **row, "measured_at": now(), "run_id": self.run_id})
                    self._progress(1, f"{subject.use_case}: {each.label}")
        return [
            {**self.results.find(key, errors=True), "label": each.label} for key, each in zip(keys, loads, strict=True)
        ]

    def _requests(self, key: dict, each: Load) -> float:
        """Of how many requests there is a row; one of fewer than asked for has no 99th percentile, say."""
        row = self._find(key, each.label)
        if telemetry.replayed():
            return math.inf
        return row["proof"].get("requests", 0) if row else 0

    def _key_of_load(self, subject: Subject, each: Load, steps: int, settings: dict) -> dict:
        candidate = Candidate(each.name, each.label, steps, (), settings, gpus=self.params.gpu.count)
        key = self.key(subject, candidate) | {"users": each.users, "images": each.images}
        if each.arrivals:
            key["settings"] |= {"arrivals": each.arrivals}
            if self.params.gpu.count > 1:
                key["settings"] |= {"arrivals_of": "all processes"}  # in rows of before: of what one process makes
        return key

    def survey(self, subject: Subject, baseline: Candidate, candidate: Candidate) -> dict:
        """Quality and computed steps of one setting, untimed: a row without latencies, found again like any other."""
        key = self.key(subject, candidate)
        self._total += 1
        if not self._find(key, candidate.label):
            row = dict.fromkeys(("total_steps", "computed_steps"), subject.runs(candidate.steps))
            self._append(subject, candidate, {"status": "ok", **row, **self._judge(subject, baseline, candidate)})
        else:
            self._progress(1, candidate.label)
        return {**self.results.find(key), "label": candidate.label}

    def _measure_group(self, subject, baseline, group, judge: bool, profile: bool) -> None:
        runnable: list[tuple[Candidate, dict]] = []
        for candidate in group:
            try:
                runnable.append((candidate, self._prepare(subject, candidate, profile)))
            except Unavailable as reason:
                self._append(subject, candidate, {"status": "unavailable", "reason": str(reason)})
            except latency.TooLate:
                said = f"no image after {candidate.patience_s:g} s, so its compilation was given up; allow it more"
                proof = {"patience_s": candidate.patience_s}
                self._append(subject, candidate, {"status": "unavailable", "reason": said, "proof": proof})
            except RuntimeError as error:
                self._failed(subject, baseline, candidate, error)
        if not runnable:
            return
        runners = [self._runner(subject, candidate) for candidate, _ in runnable]
        named = {BASELINE: self._runner(subject, baseline)}
        named |= {f"candidate {i}": runner for i, runner in enumerate(runners)}
        runs, around = ({n: getattr(r, part) for n, r in named.items()} for part in ("run", "ready"))
        try:
            samples = latency.interleave(runs, subject.rounds, around=around)
        except RuntimeError as error:
            for candidate, _ in runnable:
                self._failed(subject, baseline, candidate, error)
            return
        for i, (candidate, prepared) in enumerate(runnable):
            if judge and candidate.batch == 1:
                try:
                    prepared |= self._judge(subject, baseline, candidate, named[BASELINE].made, runners[i].made)
                except RuntimeError as error:
                    self._failed(subject, baseline, candidate, error)
                    continue
            taken = samples[f"candidate {i}"]
            ratio, low, high = latency.speedup(samples[BASELINE], taken)
            measured = {
                "status": "ok",
                **prepared,
                **latency.summary(taken),
                **latency.median_stages(runners[i].stages),
                "images_per_s": candidate.batch * len(taken) / sum(taken),
                "speedup": ratio,
                "speedup_ci_low": low,
                "speedup_ci_high": high,
            }
            self._append(subject, candidate, measured)

    def _failed(self, subject, baseline, candidate, error: RuntimeError) -> None:
        """A row for what PyTorch or a library refused to run; without its baseline a comparison is nothing."""
        self._append(subject, candidate, _failure(error))
        if candidate is baseline and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise error

    def _prepare(self, subject, candidate, profile: bool) -> dict:
        """Warm-up and memory of one candidate, and what proves it: the untimed part of its row."""
        own = candidate.subject or subject
        pipe = own.pipe
        runs = own.runs(candidate.steps)
        row = {"load_s": own.load_s, "total_steps": runs, "computed_steps": runs}
        allocated = torch.cuda.memory_allocated() / latency.GIB if pipe.transformer.device.type == "cuda" else 0.0
        beside = max(0.0, allocated - (own.load_gib or 0.0))  # other pipelines
        inputs = list(itertools.islice(itertools.cycle(own.inputs), candidate.batch))
        before = compilation.counters()
        with (
            applied(pipe, *candidate.techniques),
            telemetry.Sampler() as sampler,
            latency.memory(pipe.transformer.device) as memory,
        ):
            warm = latency.warm_up(
                lambda: own.batch(inputs, candidate.steps),
                limit=self.params.study.warmup,
                least=2,
                enough_s=SLOW_S,
                patience_s=candidate.patience_s,
            )
            if trace := _trace(candidate):
                row["computed_steps"] = trace["mask"].count("1")
        row |= {
            "first_s": warm.first_s,
            "warmup_s": warm.total_s,
            "memory_load_gib": own.load_gib,
            "memory_peak_gib": memory.peak_gib - beside,
            "memory_avg_gib": memory.average_gib - beside,
        }
        row["proof"] = self._proof(own, candidate, before, profile) or None
        if sampler.result:
            row |= {name: sampler.result[name] for name in ("gpu_util_avg", "gpu_memory_avg_pct")}
            row["telemetry"] = sampler.result
        return row

    def _proof(self, own: Subject, candidate: Candidate, before: dict[str, int], profile: bool) -> dict:
        """What shows that the techniques did something: what they say, what was compiled, which kernels ran."""
        techniques = (*own.built, *candidate.techniques)
        proof = {k: v for t in techniques for k, v in getattr(t, "proof", {}).items()}
        if "compiled" in proof:
            proof |= {name: count - before[name] for name, count in compilation.counters().items()}
        if profile and not _trace(candidate):  # a cache may prescribe the number of steps
            given = transformer_inputs(own, candidate.batch)
            with applied(own.pipe, *candidate.techniques), torch.no_grad():
                own.pipe.transformer(**given)
                spent = latency.kernel_times(lambda: own.pipe.transformer(**given))
            proof["kernels"] = latency.longest(spent)
            proof["step_ms"] = {kind: round(time_ms, 3) for kind, time_ms in latency.by_kind(spent).items()}
        return proof

    def _judge(self, subject, baseline, candidate, references=None, images=None) -> dict:
        """The columns of a row that come from its images; those that were timed needn't be made again."""
        own = candidate.subject or subject
        references, _ = self._images(subject, baseline, references)
        images, traces = self._images(subject, candidate, images, keep=candidate is not baseline)
        row = quality.compare(references, images)
        if own.checked:
            found = probe.adherence([prompt for prompt, _ in own.inputs], images)
            found = [share for share in found if share is not None]
            if found:
                row |= {"adherence": sum(found) / len(found), "adherence_min": min(found)}
        if traces and all(traces):
            row["computed_steps"] = sum(t["mask"].count("1") for t in traces) / len(traces)
        return row | self._judge_use_case(own, references, images)

    def _judge_use_case(self, own: Subject, references: list, images: list) -> dict:
        """What only some use cases have: both sides of a mask, agreement with a condition."""
        row, started = {}, [own.material(*given) if own.use_case != "txt2img" else None for given in own.inputs]
        if "inpainting" in own.use_case:
            inside = [np.asarray(m.mask) > 127 for m in started]
            through = [pipelines.through_vae(own.pipe, m.image) for m in started]
            outside = [m.outside() for m in started]
            given = [m.image for m in started]
            pairs = {
                "psnr_inside_db": zip(references, images, inside, strict=True),
                "psnr_outside_db": zip(references, images, outside, strict=True),
                "kept_db": zip(given, images, outside, strict=True),
                "kept_vae_db": zip(given, through, outside, strict=True),
            }
            for name, found in pairs.items():
                finite = [d for d in (quality.psnr(*pair) for pair in found) if d != math.inf]
                row[name] = statistics.fmean(finite) if finite else None
        if pipelines.takes_condition(own.use_case):
            row["agreement"] = statistics.fmean(
                control.agreement(i, m.condition(own.kind), own.kind) for i, m in zip(images, started, strict=True)
            )
        return row

    def _runner(self, subject, candidate) -> _Runner:
        own = candidate.subject or subject
        return _Runner(own, candidate, itertools.cycle(own.inputs))

    def _append(self, subject, candidate, measured: dict) -> None:
        own = candidate.subject or subject
        key = self.key(subject, candidate)
        row = {**key, **measured, "measured_at": now(), "run_id": self.run_id}
        self.results.append(row)
        self._progress(1, f"{own.model.name}: {candidate.label}")

    # --- images and traces --------------------------------------------------------------------------------

    def images(self, subject: Subject, candidate: Candidate) -> list[Image.Image]:
        """The candidate's image for each of `subject.inputs`; made again if they aren't on the disk."""
        return self._images(subject, candidate)[0]

    def traces(self, subject: Subject, candidate: Candidate) -> list[dict | None]:
        """What a cache decided for each of `subject.inputs`: mask, indicator, threshold; None without one."""
        return self._images(subject, candidate)[1]

    def _images(self, subject: Subject, candidate: Candidate, made: Made | None = None, keep: bool = True):
        """The images and traces of all inputs: from the disk, else those in `made`, the rest made here."""
        made = dict(made or {})
        own = candidate.subject or subject
        key = {k: v for k, v in self.key(subject, candidate).items() if k not in ("notebook", "gpu")}
        folder = self.images_dir / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        done = folder / "traces.json"
        count = len(own.inputs)
        if keep and done.is_file():
            return [_read_image(folder / f"{i}.png") for i in range(count)], json.loads(done.read_text())
        if telemetry.replayed():
            raise UserError(f"A replay makes no images, and those of {candidate.label!r} are not in build/: {RUN_IT}")
        if missing := [given for given in own.inputs if given not in made]:
            with applied(own.pipe, *candidate.techniques):
                for given in missing:
                    made[given] = own.generate(*given, candidate.steps), _trace(candidate)
        images, traces = (list(column) for column in zip(*(made[given] for given in own.inputs), strict=True))
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                image.save(folder / f"{i}.png")
            about = {"key": key, "label": candidate.label, "inputs": own.inputs}
            (folder / ABOUT).write_text(json.dumps(about))
            done.write_text(json.dumps(traces))
        return images, traces

    # --- for the reader -----------------------------------------------------------------------------------

    def _progress(self, finished: int, label: str) -> None:
        self._done += finished
        if path := os.environ.get("FLUXNB_PROGRESS"):
            line = {"notebook": self.notebook, "done": self._done, "total": self._total, "label": label}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def transformer_inputs(subject: Subject, batch: int) -> dict:
    """What the pipeline gives its transformer at the first of two steps, as keyword arguments."""
    inputs = list(itertools.islice(itertools.cycle(subject.inputs), batch))
    transformer, given = subject.pipe.transformer, {}

    def note(*args, **kwargs):
        assert not args, "diffusers' FLUX pipelines name every argument"
        given.update({} if given else kwargs)
        return original(**kwargs)

    original = transformer.forward
    with attribute(transformer, "forward", note):
        subject.batch(inputs, 2)
    return given


@dataclass
class _Runner:
    """Makes the next image of the order that the baseline and every candidate go through alike."""

    subject: Subject
    candidate: Candidate
    order: Iterator
    stages: list[latency.Stages] = field(default_factory=list)
    latest: tuple[list, list] = ((), ())  # inputs and images
    made: Made = field(default_factory=dict)  # with a batch of 1

    @contextmanager
    def ready(self):
        """The pipeline with the techniques on, which takes no time of an image's, for one run inside."""
        with applied(self.subject.pipe, *self.candidate.techniques), latency.stages(self.subject.pipe) as stages:
            yield
        self.stages.append(stages)
        (given, *others), (image, *_) = self.latest
        if not others:
            self.made[given] = image, _trace(self.candidate)

    def run(self) -> None:
        inputs = list(itertools.islice(self.order, self.candidate.batch))
        self.latest = inputs, self.subject.batch(inputs, self.candidate.steps)


def _pipelines(candidates: list[Candidate]) -> list[Subject]:
    """The pipelines that the candidates have to themselves, each once."""
    return list({id(c.subject): c.subject for c in candidates if c.subject}.values())


def _in_parts(candidates: list[Candidate], at_once: int) -> Iterator[list[Candidate]]:
    """The candidates in their order, as many together as have `at_once` pipelines of their own, at least 1.

    One in 32 bits counts twice.
    """
    part: list[Candidate] = []
    for candidate in candidates:
        if part and sum(1 + (own.dtype == "float32") for own in _pipelines([*part, candidate])) > max(1, at_once):
            yield part
            part = []
        part.append(candidate)
    if part:
        yield part


def _trace(candidate: Candidate) -> dict | None:
    """The latest decisions of the candidate's cache, rounded to what a chart shows."""
    for technique in candidate.techniques:
        trace = getattr(technique, "trace", None)
        if trace and trace.steps:
            seen = [None if s.indicator is None else float(f"{s.indicator:.4g}") for s in trace.steps]
            where = [step.reused_at for step in trace.steps]
            return {"mask": trace.mask, "indicator": seen, "threshold": trace.steps[0].threshold, "reused_at": where}
    return None


def _gib(pipe) -> float:
    """Memory of a pipeline's weights in GiB."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(t): t for part in parts for t in itertools.chain(part.parameters(), part.buffers())}
    return sum(map(_bytes, tensors.values())) / 2**30


def _bytes(tensor: torch.Tensor) -> int:
    """What a tensor holds in memory; a quantized one holds it in the tensors that it is made of."""
    if hasattr(tensor, "to_local"):  # a share of a tensor that is divided over ranks
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _fingerprint(name: str) -> str:
    """What identifies a model's weights: a digest of the files of a folder, the name of anything else."""
    from fluxnb.models import embedded

    folder = embedded.FOLDER if name == "embedded" else Path(name).expanduser()
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if path.stat().st_size < 2**28 else str(path.stat().st_size).encode())
    return digest.hexdigest()[:16]


def _failure(error: RuntimeError) -> dict:
    """The columns of what went wrong, with the line of the message that says most."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return {"status": "oom", "reason": str(error).splitlines()[0]}
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    # torch.compile puts the name of the backend first and what happened behind it
    said = lines[1] if len(lines) > 1 and lines[0].endswith("raised:") else lines[0]
    more = [line.partition("context:")[2].strip() for line in lines if line.startswith("Developer debug context:")]
    return {"status": "error", "reason": ": ".join([type(error).__name__, said, *more])}


def need(rows: list[dict], **equals) -> list[dict]:
    """The rows with status ok and these values. Raises UserError when there is none: nothing to report."""
    found = [r for r in rows if r["status"] == "ok" and all(r[k] == v for k, v in equals.items())]
    if not found:
        raise UserError(f"No finished measurement with {equals}: the rows say why in their reason.")
    return found
