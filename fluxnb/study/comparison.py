"""Candidates timed in turn with their baseline: warm-up, rounds, images, one row each.

As many pipelines as the memory has room for are loaded together. One that doesn't fit beside the baseline takes turns
with it: half of the baseline's rounds, all of the candidate's, the other half, each with the card to itself.
"""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from fluxnb.errors import LacksMemory, UserError, lacks_memory
from fluxnb.measure import latency, stats, telemetry
from fluxnb.study.by_hand import LINE
from fluxnb.study.candidate import Candidate
from fluxnb.study.judging import judge, trace_of
from fluxnb.study.pool import Pool
from fluxnb.study.row import Row
from fluxnb.study.subject import Loaded, Subject
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques import compilation

SLOW_S = 20.0  # of images that take longer than this two are warm-up enough
FAILURES = (RuntimeError, MemoryError, LacksMemory)  # what is the row's and not the study's
Append = Callable[[Candidate, dict], Row]


@dataclass
class Prepared:
    """A candidate that is warm: its pipeline, the columns that don't come from timing, and the last image it made."""

    candidate: Candidate
    loaded: Loaded
    columns: dict
    made: dict = field(default_factory=dict)  # input -> (image, trace)


@dataclass
class Taken:
    """What a candidate's rounds took, and the other columns of its row; it holds no pipeline."""

    candidate: Candidate
    columns: dict
    seconds: list[float]


@dataclass
class Comparison:
    """What is timed against one baseline.

    Args:
        images: makes sure of a candidate's images and traces: (candidate, made) -> (images, traces).
        judged: whether images are compared.
        profile: whether the kernels of a step are noted in `proof`.
        warmup: most images made to warm up.
        settle: is told the baseline's samples, once they are taken.
    """

    pool: Pool
    subject: Subject
    baseline: Candidate
    images: Callable[[Candidate, dict], tuple[list, list]]
    judged: bool
    profile: bool
    warmup: int
    settle: Callable[[list[float]], None]
    append: Append
    _warm_pipe: Callable[[], object] = lambda: None  # the baseline's pipeline, if it is still loaded
    _baseline_columns: dict = field(default_factory=dict)  # of the first time that it was warm
    _left: list[Candidate] = field(default_factory=list)  # what was to be measured and has no row yet
    _lacking: str = ""  # why the baseline can't run
    _again: bool = True  # whether the baseline has yet to be timed against itself

    def measure(self, due: list[Candidate], size: int) -> None:
        """Appends a row for each candidate; the baseline's, too, each time that it is timed, first against itself.

        Args:
            due: what has no row yet.
            size: candidates that share a baseline in a round.
        """
        self._left, others = list(due), [c for c in due if c is not self.baseline]
        if not others or not self._fit(others[:1]):
            self._together([])
        while others and not self._lacking:
            part = self._part(others, size)
            others = others[len(part) :]
            if self._fit(part):
                self._together(part)
            else:
                self._in_turns(part[0])
        for candidate in self._left:
            said = f"{self.baseline.meaning['label']} can't run here, so there is nothing to compare it with"
            self.append(candidate, {"status": "unavailable", "reason": f"{said}: {self._lacking}"})

    def _fit(self, candidates: list[Candidate]) -> bool:
        """Whether there is room for the pipelines of the baseline and of these."""
        return self.pool.fit([c.of(self.subject) for c in (self.baseline, *candidates)])

    def _part(self, candidates: list[Candidate], size: int) -> list[Candidate]:
        """As many of the first candidates as fit beside the baseline, at least one."""
        count = 1
        while count < min(size, len(candidates)) and self._fit(candidates[: count + 1]):
            count += 1
        return candidates[:count]

    def _append(self, candidate: Candidate, columns: dict) -> Row:
        self._left = [c for c in self._left if c is not candidate]
        return self.append(candidate, columns)

    # --- together ---------------------------------------------------------------------------------------------

    def _together(self, candidates: list[Candidate]) -> None:
        """One group in one go; what then has no room, with the card to itself."""
        with self.pool.holding([c.of(self.subject) for c in (self.baseline, *candidates)]):
            if (base := self._baseline_prepared()) is None:
                return
            ready, alone = [], []
            for candidate in candidates:
                try:
                    if prepared := self._prepared(candidate):
                        ready.append(prepared)
                    continue
                except torch.cuda.OutOfMemoryError:
                    alone.append(candidate)
                self._forget(candidate, [base, *ready])
            due = any(c is self.baseline for c in self._left) or (not candidates and self._again)
            if (ready or due) and not self._time(base, ready):
                alone += [prepared.candidate for prepared in ready]
                self._time(base, [])
            del base, ready
        for candidate in alone:  # beside others it had no room: by itself it may
            self._in_turns(candidate)

    def _baseline_prepared(self) -> Prepared | None:
        with suppress(torch.cuda.OutOfMemoryError):
            return self._prepared(self.baseline)
        self.pool.release_others(self.baseline.of(self.subject))  # an earlier comparison's are in its way
        return self._prepared(self.baseline)

    def _forget(self, candidate: Candidate, others: list[Prepared]) -> None:
        """Frees a pipeline that nothing else in this group uses, so that the next one has its room."""
        own = candidate.of(self.subject)
        if all(own.pipeline != other.loaded.subject.pipeline for other in others):
            self.pool.release(own)

    def _time(self, base: Prepared, ready: list[Prepared]) -> bool:
        """Rounds of the baseline and of all that is ready, then their rows; False if together they lack memory."""
        again = self._again or not ready
        runners = [Runner(p) for p in (base, *([base] if again else []), *ready)]
        runs = {str(i): runner.run for i, runner in enumerate(runners)}
        around = {str(i): runner.ready for i, runner in enumerate(runners)}
        try:
            with telemetry.Sampler() as sampler:
                samples = list(latency.interleave(runs, self.subject.rounds, around=around).values())
        except FAILURES as error:
            if ready and isinstance(error, torch.cuda.OutOfMemoryError):
                return False
            for prepared in ready:
                self._append(prepared.candidate, failure(error))
            if again:
                self._refuse(self.baseline, failure(error), error)
            return True
        self.settle(samples[0])
        self._again = False
        row = self._row(self._taken(runners[0], samples[0], sampler), again=samples[1] if again else None)
        for runner, seconds in zip(runners[1 + again :], samples[1 + again :], strict=True):
            try:
                self._row(self._taken(runner, seconds, sampler), row)
            except FAILURES as error:
                self._append(runner.prepared.candidate, failure(error))
        return True

    def _taken(self, runner: Runner, seconds: list[float], sampler: telemetry.Sampler) -> Taken:
        """What a runner took, with the columns that come from its images and from what the machine did meanwhile."""
        candidate, loaded = runner.prepared.candidate, runner.prepared.loaded
        columns = {**runner.prepared.columns, **latency.median_stages(runner.stages)}
        if self.judged:
            baseline = candidate is self.baseline
            LINE.doing(f"judging {candidate.meaning['label']}")
            references, _ = self.images(self.baseline, runner.made if baseline else {})
            images, traces = (references, []) if baseline else self.images(candidate, runner.made)
            columns |= judge(loaded.subject, references, images, traces, loaded)
        return Taken(candidate, columns | watched(sampler.within(runner.windows), runner.host), seconds)

    def _row(self, taken: Taken, base: Row | None = None, again: list[float] | None = None) -> Row:
        """Appends a row: over the baseline's row `base`, or the baseline's own, over the same a second time."""
        seconds, columns = taken.seconds, {"status": "ok", **taken.columns, **stats.summary(taken.seconds)}
        columns["images_per_s"] = taken.candidate.batch * len(seconds) / sum(seconds)
        if pair := (base.samples, seconds) if base else (seconds, again) if again else None:
            columns |= stats.compared(*pair)
        return self._append(taken.candidate, columns | {"again": again, "baseline": base and base.id})

    # --- in turns ---------------------------------------------------------------------------------------------

    def _in_turns(self, candidate: Candidate) -> None:
        """The baseline's first rounds, all of the candidate's, the baseline's other rounds: one pipeline at a time."""
        rounds, half = self.subject.rounds, -(-self.subject.rounds // 2)
        before = self._visit(self.baseline, half)
        own = before and self._visit(candidate, rounds)
        after = own and self._visit(self.baseline, rounds - half)
        if not after:
            return
        before.seconds += after.seconds
        self.settle(before.seconds)
        self._row(own, self._row(before))

    def _visit(self, candidate: Candidate, rounds: int) -> Taken | None:
        """Some rounds with the card to itself; None for what can't run, which then has a row."""
        self.pool.release_others(candidate.of(self.subject))
        if (prepared := self._prepared(candidate)) is None:
            return None
        try:
            runner = Runner(prepared)
            with telemetry.Sampler() as sampler:
                samples = latency.interleave({"": runner.run}, rounds, around={"": runner.ready})
            return self._taken(runner, samples[""], sampler)
        except FAILURES as error:
            self._refuse(candidate, failure(error), error)
            return None

    # --- one candidate ----------------------------------------------------------------------------------------

    def _prepared(self, candidate: Candidate) -> Prepared | None:
        """The candidate, warm; None if it can't run, which then has a row.

        Raises OutOfMemoryError where other pipelines are loaded: without them it may run.
        """
        subject = candidate.of(self.subject)
        LINE.doing(f"warming up {candidate.meaning['label']}")
        try:
            loaded = self.pool.get(subject)
            if candidate is self.baseline and self._warm_pipe() is loaded.pipe:
                return Prepared(candidate, loaded, self._baseline_columns)
            columns, made = self._warm(candidate, loaded)
        except Unavailable as reason:
            self._refuse(candidate, failure(reason), reason)
            return None
        except latency.TooLate:
            said = f"no image after {candidate.patience_s:g} s, so it was given up; allow it more"
            proof = {"patience_s": candidate.patience_s}
            self._refuse(candidate, {"status": "unavailable", "reason": said, "proof": proof})
            return None
        except FAILURES as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) and self.pool.beside(subject):
                raise
            self._refuse(candidate, failure(error), error)
            return None
        if candidate is self.baseline:
            self._warm_pipe = weakref.ref(loaded.pipe)
            self._baseline_columns = self._baseline_columns or columns
        return Prepared(candidate, loaded, columns, made)

    def _refuse(self, candidate: Candidate, columns: dict, error: Exception | None = None) -> None:
        """A row for what can't run; a comparison without its baseline is nothing, unless it lacks memory."""
        self._append(candidate, columns)
        if candidate is self.baseline:
            if not lacks_memory(error):
                raise error or UserError(columns["reason"])
            self._lacking = columns["reason"]

    def _warm(self, candidate: Candidate, loaded: Loaded) -> tuple[dict, dict]:
        """Warm-up and memory of one candidate, and what proves it: the untimed part of its row; and its last image."""
        pipe, device = loaded.pipe, loaded.pipe.transformer.device
        runs = loaded.subject.runs(candidate.steps)
        row: dict = {"load_s": loaded.load_s, "total_steps": runs, "computed_steps": runs}
        allocated = torch.cuda.memory_allocated() / latency.GIB if device.type == "cuda" else 0.0
        beside = max(0.0, allocated - loaded.load_gib)  # other pipelines
        first = self.subject.rounds  # the first input that no round may be about: its image needn't be made again
        inputs = list(itertools.islice(itertools.cycle(loaded.inputs), first, first + candidate.batch))
        latest: list = []

        def run() -> None:
            latest[:] = loaded.batch(inputs, candidate.steps)

        before = compilation.counters()
        with applied(pipe, *candidate.above), latency.memory(device) as memory:
            warm = latency.warm_up(
                run,
                limit=self.warmup,
                least=2,
                enough_s=SLOW_S,
                patience_s=candidate.patience_s,
            )
            trace = trace_of(candidate)
            if trace:
                row["computed_steps"] = trace["mask"].count("1")
        row |= {
            "first_s": warm.first_s,
            "warmup_s": warm.total_s,
            "stable": int(warm.stable),
            "memory_load_gib": loaded.load_gib,
            "memory_peak_gib": memory.peak_gib - beside,
            "memory_avg_gib": memory.average_gib - beside,
            "proof": self._proof(candidate, loaded, before) or None,
        }
        return row, {given: (image, trace) for given, image in zip(inputs, latest, strict=True)}

    def _proof(self, candidate: Candidate, loaded: Loaded, before: dict[str, int]) -> dict:
        """What shows that the techniques did something: what they say, what was compiled, which kernels ran."""
        techniques = (*loaded.subject.built, *candidate.above)
        proof = {k: v for t in techniques for k, v in getattr(t, "proof", {}).items()}
        if "compiled" in proof:
            proof |= {name: count - before[name] for name, count in compilation.counters().items()}
        if self.profile and not trace_of(candidate):  # a cache may prescribe the number of steps
            given = loaded.transformer_inputs(candidate.batch)
            with applied(loaded.pipe, *candidate.above), torch.no_grad():
                loaded.pipe.transformer(**given)
                spent = latency.kernel_times(lambda: loaded.pipe.transformer(**given))
            proof["kernels"] = latency.longest(spent)
            proof["step_ms"] = {kind: round(time_ms, 3) for kind, time_ms in latency.by_kind(spent).items()}
        return proof


class Runner:
    """Makes the next image of the order that the baseline and every candidate go through alike."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.stages: list[latency.Stages] = []
        self.made: dict = dict(prepared.made)  # input -> (image, trace)
        self.windows: list[tuple[float, float]] = []
        self.host = telemetry.Host()
        self._order: Iterator = itertools.cycle(prepared.loaded.inputs)
        self._latest: tuple[list, list] = ([], [])

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The pipeline with the techniques on, which takes no time of an image's, for one run inside."""
        candidate, loaded = self.prepared.candidate, self.prepared.loaded
        with applied(loaded.pipe, *candidate.above), latency.stages(loaded.pipe) as stages, self.host.during():
            start = time.perf_counter()
            yield
            self.windows.append((start, time.perf_counter()))
        self.stages.append(stages)
        LINE.doing(f"timing {candidate.meaning['label']}, round {len(self.stages)} of {loaded.subject.rounds}")
        trace = trace_of(candidate)  # one for a whole batch
        self.made |= {given: (image, trace) for given, image in zip(*self._latest, strict=True)}

    def run(self) -> None:
        """One image, or one batch."""
        candidate, loaded = self.prepared.candidate, self.prepared.loaded
        inputs = list(itertools.islice(self._order, candidate.batch))
        self._latest = inputs, loaded.batch(inputs, candidate.steps)


def watched(result: dict | None, host: telemetry.Host) -> dict:
    """The columns of what the machine did in the timed window: its GPUs, where it has some, and its CPU."""
    result = {**(result or {}), **host.result}
    own = {name: result[name] for name in ("gpu_util_avg", "gpu_memory_avg_pct") if name in result}
    return own | ({"telemetry": result} if result else {})


def by_itself(
    run: Callable, repeats: int, also: Callable | None, before: Callable | None, warm: bool, held_s: float = 0.0
) -> dict:
    """The columns of a function that is timed by itself, as `Study.time` describes them."""
    try:
        if before:
            before()
        if held_s:
            return {"status": "ok", **held(run, repeats, held_s), **(also() if also else {})}
        warmed = latency.warm_up(run, limit=3, enough_s=SLOW_S) if warm else None
        host = telemetry.Host()
        with telemetry.Sampler() as sampler, host.during():
            taken = stats.summary([latency.timed(run) for _ in range(repeats)])
        steady = {"stable": int(warmed.stable)} if warmed else {}
        return {"status": "ok", **taken, **steady, **watched(sampler.result, host), **(also() if also else {})}
    except (Unavailable, *FAILURES) as error:
        return failure(error)


def held(run: Callable, repeats: int, held_s: float) -> dict:
    """The columns of a function under load: after as long a warm-up, seconds of a call among many in a row.

    Args:
        repeats: samples, each of as many calls as fill its share of the time; of what is too slow for them fewer.
        held_s: seconds that they take together.
    """
    run()
    begun, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begun < held_s:
        latency.timed(run)
        count += 1
    once = (time.perf_counter() - begun) / count
    repeats = min(repeats, max(3, int(held_s / once)))
    calls = max(1, round(held_s / repeats / once))

    def several() -> None:
        for _ in range(calls):
            run()

    host = telemetry.Host()
    with telemetry.Sampler() as sampler, host.during():
        taken = [latency.timed(several) for _ in range(repeats)]
    samples = [seconds / calls for seconds in taken]
    return {**stats.summary(samples), **watched(sampler.result, host), "proof": {"timed_s": round(sum(taken), 3)}}


def failure(error: Exception) -> dict:
    """The columns of what went wrong, with the line of the message that says most."""
    if isinstance(error, Unavailable):
        return {"status": "unavailable", "reason": str(error)}
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if lacks_memory(error):
        latency.free_memory()
        return {"status": "oom", "reason": lines[0] if str(error).strip() else "too little memory"}
    # torch.compile puts the name of the backend first and what happened behind it
    said = lines[1] if len(lines) > 1 and lines[0].endswith("raised:") else lines[0]
    more = [line.partition("context:")[2].strip() for line in lines if line.startswith("Developer debug context:")]
    dynamo = sys.modules.get("torch._dynamo.exc")
    if dynamo and isinstance(error, dynamo.Unsupported):  # a fact about the technique, not a fault
        return {"status": "unavailable", "reason": ": ".join(["can't be compiled as one graph", said, *more])}
    return {"status": "error", "reason": ": ".join([type(error).__name__, said, *more])}
