"""Measures on several ranks: a candidate spread over them beside the same on one rank alone.

`measure` runs on every rank, started by `fluxnb.measure.ranks`; `Study.spread` calls it and keeps what it emits.
While a candidate is timed alone, every rank makes an image of its own: that is the replicas' throughput as well. What
several candidates are alone is timed once, in turn with the first of them.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fluxnb.measure import latency as timing
from fluxnb.measure import quality, telemetry
from fluxnb.study.results import canonical
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques.parallel import ContextParallel, DiffusersParallel, FullyShard, Replicas
from fluxnb.techniques.parallel_vae import ParallelVAE
from fluxnb.techniques.xdit import PipeFusion, XDiT

STEP_SPREADING = (ContextParallel, DiffusersParallel, XDiT, FullyShard)  # whose steps can be looked at one by one
SPREADING = (*STEP_SPREADING, PipeFusion, ParallelVAE)
WARM_UP = 2


def alone(techniques: tuple) -> tuple:
    """What of the techniques one rank can have by itself."""
    return tuple(t for t in techniques if not isinstance(t, SPREADING))


@dataclass(frozen=True)
class _Alone:
    """What one rank makes by itself: the slowest rank's seconds, round by round; this one's stages, steps, picture."""

    samples: list[float]
    stages: dict
    steps: dict
    image: object


def measure(rank, subject, candidates: list) -> None:
    """Emits one row's columns for each candidate, in their order.

    Args:
        subject: a study.Subject whose pipeline isn't loaded yet.
        candidates: study.Candidate; those that share a subject share its pipeline.
    """
    owners = [candidate.subject or subject for candidate in candidates]
    timed: dict[str, _Alone] = {}
    for i, (own, candidate) in enumerate(zip(owners, candidates, strict=True)):
        try:
            row = {"status": "ok", **_measured(rank, own, candidate, timed)}
        except Unavailable as reason:  # every rank has the same, so all come here
            row = {"status": "unavailable", "reason": str(reason)}
        rank.emit(row)
        if not any(later is own for later in owners[i + 1 :]):
            own.release()


def _measured(rank, own, candidate, timed: dict[str, _Alone]) -> dict:
    """One candidate's columns. `timed` holds, and is given, what one rank by itself makes of the same techniques."""
    single = own if alone(own.built) == own.built else replace(own, built=alone(own.built), _pipe=None)
    pipe, steps = own.pipe, candidate.steps
    given = own.inputs[rank.rank % len(own.inputs)]

    replicas = any(isinstance(t, Replicas) for t in candidate.techniques)
    others = [t for t in alone((*own.built, *candidate.techniques)) if not isinstance(t, Replicas)]
    by_itself = canonical({"steps": steps, "techniques": [[t.name, t.settings] for t in others]})
    around = {
        "together": functools.partial(_ready, own, candidate.techniques),
        "alone": functools.partial(_ready, single, alone(candidate.techniques)),
    }
    runs = {
        "together": lambda: own.generate(*own.inputs[0], steps),
        "alone": lambda: single.generate(*given, steps),
    }
    if replicas:
        del runs["together"]
    elif by_itself in timed:
        del runs["alone"]
    with timing.memory(pipe.transformer.device) as memory:  # before another pipeline is loaded beside it
        first = next(iter(runs))
        with around[first]():
            for _ in range(WARM_UP):
                runs[first]()
    masks = [t.trace.mask for t in candidate.techniques if getattr(t, "trace", None)]  # of the first run's images
    mask, made = masks[0] if masks else "1" * steps, {}
    with telemetry.Sampler() as sampler:
        for name, run in runs.items():
            with around[name]():
                for _ in range(WARM_UP - 1):
                    made[name] = run()
        stages = {name: [] for name in runs}
        watched = {name: functools.partial(around[name], stages[name]) for name in runs}
        samples = timing.interleave(runs, own.rounds, synchronize=_meet, around=watched)
    taken = {name: _slowest(values) for name, values in samples.items()}
    if "alone" in taken:
        with around["alone"]():
            times = timing.step_times(single.pipe, runs["alone"])
        parts = timing.median_stages(stages["alone"])
        timed[by_itself] = _Alone(taken["alone"], parts, _steps(times, mask), made["alone"])
    by_one = timed[by_itself]
    of = taken["alone" if replicas else "together"]
    images = rank.world if replicas else 1
    row = {
        **timing.summary(of),
        **timing.median_stages(stages["alone" if replicas else "together"]),
        "images_per_s": images * len(of) / sum(of),
        "total_steps": steps,
        "computed_steps": steps,
        "load_s": own.load_s,
        "memory_load_gib": own.load_gib,
        "memory_peak_gib": max(_from_all(memory.peak_gib)),
    }
    if not replicas:
        ratio, low, high = timing.speedup(by_one.samples, of)
        row |= {"speedup": ratio, "speedup_ci_low": low, "speedup_ci_high": high}
    if sampler.result:
        row |= {name: sampler.result[name] for name in ("gpu_util_avg", "gpu_memory_avg_pct")}
        row["telemetry"] = sampler.result
    proof = {k: v for t in (*own.built, *candidate.techniques) for k, v in getattr(t, "proof", {}).items()}
    proof |= {
        "alone_s": statistics.median(by_one.samples),
        "alone_stages": by_one.stages,
        "alone_steps_ms": by_one.steps,
    }
    if replicas:
        return row | {"proof": proof}
    by_step = any(isinstance(t, STEP_SPREADING) for t in (*own.built, *candidate.techniques))
    if by_step:
        with around["together"]():
            proof["steps_ms"] = _steps(timing.step_times(pipe, runs["together"]), mask)
    if masks:
        everywhere = _from_all(masks[0])
        proof["decisions"] = "identical on all ranks" if len(set(everywhere)) == 1 else everywhere
        row["computed_steps"] = masks[0].count("1")
    elif by_step:
        proof |= _profile(own, candidate)
    pictures = by_one.image, made["together"]  # of one prompt on the first rank, whose row it is
    if own.model.judged:
        row |= quality.compare(*([picture] for picture in pictures))
    else:
        proof["picture beside one rank's"] = quality.format_psnr(quality.psnr(*pictures))
    return row | {"proof": proof}


@contextlib.contextmanager
def _ready(subject, techniques: tuple, stages: list | None = None):
    """A subject's pipeline with techniques on; adds the stages of the one image made inside to `stages`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(applied(subject.pipe, *techniques))
        times = None if stages is None else stack.enter_context(timing.stages(subject.pipe))
        yield
    if stages is not None:
        stages.append(times)


def _steps(times: list[timing.StepTime], mask: str) -> dict:
    """Medians of the computed and of the skipped steps after the first, and until the host has set them off."""
    found = {}
    for kind, sign in (("computed", "1"), ("skipped", "0")):
        chosen = [t for t, said in zip(times, mask[1:], strict=True) if said == sign]
        if chosen:
            found[kind] = round(statistics.median(t.device_ms for t in chosen), 3)
            found[f"{kind}, set off in"] = round(statistics.median(t.host_ms for t in chosen), 3)
    return found


def _profile(own, candidate) -> dict:
    """One step's kernels by kind on the first rank, and the share of them that moves data between ranks."""
    from fluxnb.study import transformer_inputs

    with applied(own.pipe, *candidate.techniques), torch.no_grad():
        given = transformer_inputs(own, candidate.batch)
        own.pipe.transformer(**given)
        _meet()
        spent = timing.kernel_times(lambda: own.pipe.transformer(**given))
    parts = timing.by_kind(spent)
    share = parts["communication"] / sum(parts.values())
    rounded = {kind: round(time_ms, 3) for kind, time_ms in parts.items()}
    return {"step_ms": rounded, "communication": share, "kernels": timing.longest(spent)}


def _meet() -> None:
    """All ranks are here, and their devices are done."""
    timing.synchronize()
    dist.barrier()
    timing.synchronize()


def _slowest(samples: list[float]) -> list[float]:
    """Round by round what the slowest rank took: the image is there when the last one is done."""
    return [max(values) for values in zip(*_from_all(samples), strict=True)]


def _from_all(value) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
