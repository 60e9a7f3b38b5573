"""Measures on several ranks: a candidate spread over them, in turn with the same on one rank alone.

`measure` runs on every rank, started by `fluxnb.measure.ranks`; `Study.spread` calls it and keeps what it emits.
While a candidate is timed alone, every rank makes an image of its own: that is the replicas' throughput as well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from fluxnb.measure import latency as timing
from fluxnb.measure import quality, stats, telemetry
from fluxnb.study.comparison import SLOW_S, watched
from fluxnb.study.pool import Pool
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques.parallel import ContextParallel, DiffusersParallel, FullyShard, Replicas
from fluxnb.techniques.parallel_vae import ParallelVAE
from fluxnb.techniques.xdit import PipeFusion, XDiT

STEP_SPREADING = (ContextParallel, DiffusersParallel, XDiT, FullyShard)  # whose steps can be looked at one by one
SPREADING = (*STEP_SPREADING, PipeFusion, ParallelVAE)
MOST_WARM_UP = 3  # images, if two in a row don't take the same time before
TOGETHER, ALONE = "together", "alone"


def alone(techniques: tuple) -> tuple:
    """What of the techniques one rank can have by itself."""
    return tuple(t for t in techniques if not isinstance(t, SPREADING))


def measure(rank, subject, candidates: list) -> None:
    """Emits, for each candidate in their order, (columns of one rank by itself or None, columns of all together).

    Args:
        subject: a study.subject.Subject, which every rank loads for itself.
        candidates: study.candidate.Candidate; those that build in the same share a pipeline.
    """
    pool = Pool()
    for candidate in candidates:
        try:
            rank.emit(_Spread(rank, pool, subject, candidate).measured())
        except Unavailable as reason:  # every rank has the same, so all come here
            rank.emit((None, {"status": "unavailable", "reason": str(reason)}))


class _Spread:
    """One candidate on all ranks, and what one rank makes of the same techniques by itself."""

    def __init__(self, rank, pool: Pool, subject, candidate):
        own = candidate.of(subject)
        single = replace(own, built=alone(own.built))
        self.rank, self.candidate, self.steps = rank, candidate, candidate.steps
        self.techniques = (*own.built, *candidate.above)
        self.replicas = any(isinstance(t, Replicas) for t in candidate.above)
        self.parts = (ALONE,) if self.replicas else (TOGETHER, ALONE)
        self.above = {TOGETHER: candidate.above, ALONE: alone(candidate.above)}
        pool.release_others(own)
        with pool.holding([own, single]):
            self.loaded = {self.parts[0]: pool.get(single if self.replicas else own)}
            with timing.memory(self.loaded[self.parts[0]].pipe.transformer.device) as self.memory:
                self.warm = {self.parts[0]: self._warm(self.parts[0])}  # before another pipeline is loaded beside it
            self.masks = [t.trace.mask for t in candidate.above if getattr(t, "trace", None)]
            self.loaded |= {ALONE: pool.get(single)}
            self.warm |= {ALONE: self.warm.get(ALONE) or self._warm(ALONE)}

    def measured(self) -> tuple[dict | None, dict]:
        """The columns of one rank by itself and of all together; None and all alone for replicas."""
        host = telemetry.Host(os.getppid())
        with telemetry.Sampler() as sampler, host.during():
            made = {part: self._run_inside(part) for part in self.parts}
            stages: dict[str, list] = {part: [] for part in self.parts}
            samples = timing.interleave(
                {part: functools.partial(self._run, part) for part in self.parts},
                self.loaded[ALONE].subject.rounds,
                synchronize=_meet,
                around={part: self._around(part, stages[part]) for part in self.parts},
            )
        taken = {part: _slowest(values) for part, values in samples.items()}
        columns = {part: self._columns(part, taken[part], stages[part]) for part in self.parts}
        by_one = {
            "alone_s": statistics.median(taken[ALONE]),
            "alone_stages": timing.median_stages(stages[ALONE]),
            "alone_steps_ms": self._steps(ALONE),
        }
        if self.replicas:
            return None, columns[ALONE] | watched(sampler.result, host) | {"proof": self._said() | by_one}
        noted = watched(sampler.result, host)
        row = columns[TOGETHER] | noted | stats.compared(taken[ALONE], taken[TOGETHER])
        return columns[ALONE] | noted, row | self._proved(by_one, made)

    def _warm(self, part: str) -> timing.WarmUp:
        """Until two images take the same time, by one clock: all ranks have to stop after the same image."""
        with self._around(part)():
            run = functools.partial(self._run, part)
            return timing.warm_up(run, _meet, limit=MOST_WARM_UP, least=2, enough_s=SLOW_S, clock=_first_clock)

    def _around(self, part: str, stages: list | None = None):
        return functools.partial(_ready, self.loaded[part], self.above[part], stages)

    def _run(self, part: str):
        """All ranks make the first input's image together; alone each makes one of its own."""
        loaded = self.loaded[part]
        index = 0 if part == TOGETHER else self.rank.rank % len(loaded.inputs)
        return loaded.generate(*loaded.inputs[index], self.steps)

    def _run_inside(self, part: str):
        with self._around(part)():
            return self._run(part)

    def _steps(self, part: str) -> dict:
        """Medians of the computed and of the skipped steps after the first, and until the host has set them off."""
        with self._around(part)():
            times = timing.step_times(self.loaded[part].pipe, lambda: self._run(part))
        mask, found = self.masks[0] if self.masks else "1" * self.steps, {}
        for kind, sign in (("computed", "1"), ("skipped", "0")):
            chosen = [t for t, said in zip(times, mask[1:], strict=True) if said == sign]
            if chosen:
                found[kind] = round(statistics.median(t.device_ms for t in chosen), 3)
                found[f"{kind}, set off in"] = round(statistics.median(t.host_ms for t in chosen), 3)
        return found

    def _columns(self, part: str, seconds: list[float], stages: list) -> dict:
        loaded, images = self.loaded[part], self.rank.world if part == ALONE else 1
        return {
            "status": "ok",
            **stats.summary(seconds),
            **timing.median_stages(stages),
            "images_per_s": images * len(seconds) / sum(seconds),
            "total_steps": self.steps,
            "computed_steps": self.masks[0].count("1") if self.masks else self.steps,
            "load_s": loaded.load_s,
            "first_s": self.warm[part].first_s,
            "warmup_s": self.warm[part].total_s,
            "stable": int(all(warm.stable for warm in self.warm.values())),
            "memory_load_gib": loaded.load_gib,
            "memory_peak_gib": max(_from_all(self.memory.peak_gib)) if part == self.parts[0] else None,
        }

    def _said(self) -> dict:
        return {k: v for t in self.techniques for k, v in getattr(t, "proof", {}).items()}

    def _proved(self, by_one: dict, made: dict) -> dict:
        """What shows that it did something, and how far its picture is from one rank's."""
        proof = self._said() | by_one
        by_step = any(isinstance(t, STEP_SPREADING) for t in self.techniques)
        if by_step:
            proof["steps_ms"] = self._steps(TOGETHER)
        if self.masks:
            everywhere = _from_all(self.masks[0])
            proof["decisions"] = "identical on all ranks" if len(set(everywhere)) == 1 else everywhere
        elif by_step:
            proof |= _profile(self.loaded[TOGETHER], self.candidate)
        pictures = made[ALONE], made[TOGETHER]  # of one prompt on the first rank, whose row it is
        if self.loaded[TOGETHER].subject.model.judged:
            return {"proof": proof, "images": 1, **quality.compare(*([picture] for picture in pictures))}
        proof["picture beside one rank's"] = quality.format_psnr(quality.psnr(*pictures))
        return {"proof": proof}


@contextlib.contextmanager
def _ready(loaded, techniques: tuple, stages: list | None = None):
    """A loaded pipeline with techniques on; adds the stages of the one image made inside to `stages`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(applied(loaded.pipe, *techniques))
        times = None if stages is None else stack.enter_context(timing.stages(loaded.pipe))
        yield
    if stages is not None:
        stages.append(times)


def _profile(loaded, candidate) -> dict:
    """One step's kernels by kind on the first rank, and the share of them that moves data between ranks."""
    with applied(loaded.pipe, *candidate.above), torch.no_grad():
        given = loaded.transformer_inputs(candidate.batch)
        loaded.pipe.transformer(**given)
        _meet()
        spent = timing.kernel_times(lambda: loaded.pipe.transformer(**given))
    parts = timing.by_kind(spent)
    share = parts["communication"] / sum(parts.values())
    rounded = {kind: round(time_ms, 3) for kind, time_ms in parts.items()}
    return {"step_ms": rounded, "communication": share, "kernels": timing.longest(spent)}


def _meet() -> None:
    """All ranks are here, and their devices are done."""
    timing.synchronize()
    dist.barrier()
    timing.synchronize()


def _first_clock() -> float:
    """Seconds of the first rank's clock."""
    return _from_all(time.perf_counter())[0]


def _slowest(samples: list[float]) -> list[float]:
    """Round by round what the slowest rank took: the image is there when the last one is done."""
    return [max(values) for values in zip(*_from_all(samples), strict=True)]


def _from_all(value) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
