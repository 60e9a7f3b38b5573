"""One image again and again for minutes: whether it gets slower, memory grows, clocks fall, or an image changes."""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import replace

import torch

from fluxnb.families import SERVING
from fluxnb.measure import latency, stats, telemetry
from fluxnb.study.candidate import Candidate
from fluxnb.study.comparison import FAILURES, SLOW_S, failure, watched
from fluxnb.study.loop import Task
from fluxnb.study.row import Row
from fluxnb.study.study import Study
from fluxnb.study.subject import Loaded, Subject
from fluxnb.technique import Unavailable, applied

SOAK = "soak"  # the technique of its rows
PARTS = 10  # of its time, which are looked at one by one: of ten minutes each


def soak(s: Study, subject: Subject, candidate: Candidate, seconds: float, origin: str = "") -> Row:
    """Makes a subject's first image for so many seconds, after a warm-up; one row, found again like any other.

    Args:
        origin: why this candidate, in words; a replay shows whichever was run.
    """
    rows = [r for r in s.results.rows() if (r.technique, r.model) == (SOAK, subject.model.name)]
    if rows and telemetry.replayed():
        return rows[-1]
    own = candidate.of(subject)
    key = s.key(subject, candidate) | {"technique": SOAK}
    key["settings"] |= {"soak_s": seconds}
    label = f"{candidate.stack or candidate.meaning['label']}, {seconds:g} s"
    meaning = candidate.meaning | {"family": SERVING.name, "technique": SOAK, "label": label, "mark": f"{seconds:g} s"}

    def timer(_) -> None:
        try:
            columns = _soaked(s.loaded(own), candidate, seconds)
            columns["proof"]["origin"] = origin
        except (Unavailable, *FAILURES) as error:
            columns = failure(error)
        s.append(task, columns)

    task = Task(key, meaning, replace(candidate, built=own.built).code)
    return s.measured([task], timer)[0]


def _soaked(loaded: Loaded, candidate: Candidate, seconds: float) -> dict:
    """The columns of the row; in `proof` what each part of the time was like, and how many images were others."""
    device = loaded.pipe.transformer.device
    latest: list = []
    seen: list[tuple] = []  # of each image: when it was there, seconds, digest, GiB of the GPU, GiB of the process

    def run() -> None:
        latest[:] = loaded.batch(loaded.inputs[:1], candidate.steps)

    host = telemetry.Host()
    with applied(loaded.pipe, *candidate.above):
        warm = latency.warm_up(run, enough_s=SLOW_S)
        begun = time.perf_counter()
        with telemetry.Sampler() as sampler, host.during():
            while not seen or time.perf_counter() - begun < seconds:
                took = latency.timed(run)
                digest = hashlib.sha256(latest[0].tobytes()).digest()
                seen.append((time.perf_counter(), took, digest, *_memory(device)))
    ends = [begun + seconds * (i + 1) / PARTS for i in range(PARTS - 1)] + [seen[-1][0]]
    parts = []
    for start, end in zip([begun, *ends], ends, strict=False):
        if inside := [each for each in seen if start < each[0] <= end]:
            machine = sampler.within([(start, end)]) or {}
            parts.append(
                {
                    "images": len(inside),
                    "p50": statistics.median(took for _, took, *_ in inside),
                    "device_gib": max((each[3] for each in inside if each[3] is not None), default=None),
                    "host_gib": max(each[4] for each in inside),
                    **{name: machine.get(name) for name in ("sm_clock_avg_mhz", "temperature_peak_c")},
                }
            )
    return {
        "status": "ok",
        **stats.summary([took for _, took, *_ in seen]),
        "images_per_s": len(seen) / sum(took for _, took, *_ in seen),
        "total_steps": loaded.subject.runs(candidate.steps),
        "stable": int(warm.stable),
        "first_s": warm.first_s,
        "warmup_s": warm.total_s,
        "memory_load_gib": loaded.load_gib,
        "proof": {"parts": parts, "others": sum(digest != seen[0][2] for _, _, digest, *_ in seen)},
        **watched(sampler.result, host),
    }


def _memory(device: torch.device) -> tuple[float | None, float]:
    """(GiB that PyTorch keeps on a GPU, GiB of the process)."""
    import psutil

    reserved = torch.cuda.memory_reserved(device) / latency.GIB if device.type == "cuda" else None
    return reserved, psutil.Process().memory_info().rss / latency.GIB
