"""The first and the second image of a pipeline that was loaded for them, as document 001's table has them."""

from __future__ import annotations

from dataclasses import replace

import torch

from fluxnb.measure import latency, stats, telemetry
from fluxnb.study import kept
from fluxnb.study.candidate import Candidate
from fluxnb.study.comparison import FAILURES, failure, watched
from fluxnb.study.judging import trace_of
from fluxnb.study.loop import Task
from fluxnb.study.row import Row
from fluxnb.study.study import Study
from fluxnb.study.subject import Subject
from fluxnb.technique import Unavailable, applied

COUNT = 2  # images of one prompt and seed, one right after the other


def first_and_second(s: Study, subject: Subject, candidates: list[Candidate], anew: bool = True) -> list[Row]:
    """A row for each candidate: its samples are the first and the second image after it was put on, in seconds.

    Both are of the last prompt that is shown, and of one seed. The memory is that of the second one, as what a
    pipeline needs for its very first image is no candidate's; of a CPU, where only the process is known, there is none.

    Args:
        anew: whether the pipeline is loaded again for each candidate, so that nothing was made with it before.
    """
    one = replace(subject, prompts=subject.showing.prompts[-1:], seeds=subject.seeds[:1])
    of = {_task(s, one, c, anew): c for c in candidates}

    def timer(due: list[Task]) -> None:
        for task in due:
            try:
                s.append(task, _measured(s, one, of[task], anew, task))
            except (Unavailable, *FAILURES) as error:
                s.append(task, failure(error))

    return s.measured(list(of), timer)


def both_images(s: Study, row: Row) -> list:
    """The two images of a row of `first_and_second`; none where they weren't kept."""
    found = kept.find(s.images_dir, kept.key_of(row.as_dict(), row.code))
    return [found.image(i) for i in range(COUNT)] if found else []


def _task(s: Study, subject: Subject, candidate: Candidate, anew: bool) -> Task:
    key = s.key(subject, candidate)
    key["settings"] |= {"inferences": COUNT, "loaded": "for them" if anew else "before"}
    return Task(key, candidate.meaning, replace(candidate, built=candidate.of(subject).built).code)


def _measured(s: Study, subject: Subject, candidate: Candidate, anew: bool, task: Task) -> dict:
    """The columns of a candidate's row; its images are kept."""
    if anew:
        s.pool.release()
    loaded = s.loaded(candidate.of(subject))
    given, device = loaded.inputs[0], loaded.pipe.transformer.device
    images: list = []
    seconds, traces, host = [], [], telemetry.Host()
    allocated = torch.cuda.memory_allocated(device) / latency.GIB if device.type == "cuda" else 0.0
    with applied(loaded.pipe, *candidate.above), telemetry.Sampler() as sampler, host.during():
        for _ in range(COUNT):
            with latency.memory(device) as memory:
                seconds.append(latency.timed(lambda: images.append(loaded.generate(*given, candidate.steps))))
            traces.append(trace_of(candidate))
    runs = subject.runs(candidate.steps)
    kept.keep(
        s.images_dir, kept.key_of(task.key, task.code), candidate.meaning["label"], [given] * COUNT, images, traces
    )
    return {
        "status": "ok",
        **stats.summary(seconds),
        "first_s": seconds[0],
        "load_s": loaded.load_s,
        "total_steps": runs,
        "computed_steps": traces[0]["mask"].count("1") if traces[0] else runs,
        "memory_load_gib": loaded.load_gib,
        "memory_peak_gib": memory.peak_gib - max(0.0, allocated - loaded.load_gib) if device.type == "cuda" else None,
        "proof": {"both alike": images[0].tobytes() == images[1].tobytes()},
        **watched(sampler.result, host),
    }
