"""How a latency is taken: warm up until steady, take candidates in turn, report spread and ratio.

Times are wall-clock seconds around a synchronised call. Clocks are never locked: interleaving lets a slow
drift hit the baseline and every candidate alike. torch is imported where it is needed only.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import re
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from fluxnb.measure import telemetry

GIB = 2**30


def synchronize() -> None:
    """Waits until the current CUDA device has done its work; does nothing where CUDA is not in use."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Gives back what nobody holds any more, the CUDA allocator's reserve too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def interleave(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], None] = synchronize,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, int], None] | None = None,
    around: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, list[float]]:
    """Times each of `runs` once per round, in an order drawn at random for each round, the same for equal names.

    -> {name: [seconds of round 0, seconds of round 1, ...]}. `around` has what a run is made inside, and `progress`
    is called as progress(name, round) after each: both outside the time taken. What a run raises, out of memory say,
    is passed on.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, at least 1 is needed")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with _settled_heap():
        for i in range(rounds):
            for name in random.Random(f"round {i}").sample(list(runs), len(runs)):
                with (around or {}).get(name, nullcontext)():
                    samples[name].append(timed(runs[name], synchronize, clock))
                if progress:
                    progress(name, i)
    return samples


@contextmanager
def _settled_heap():
    """Garbage collection leaves alone what was there before: what earlier measurements compiled costs no time here."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(
    run: Callable[[], object],
    synchronize: Callable[[], None] = synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize()
    start = clock()
    run()
    synchronize()
    return clock() - start


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Seconds and calls of every kernel (on a CPU: operator) in one call, by its short name."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time_us > 0:
            before, calls = spent.get(name := _short_kernel(event.key), (0.0, 0))
            spent[name] = (before + 1e-6 * time_us, calls + event.count)
    return spent


def longest(spent: dict[str, tuple[float, int]], top: int = 3) -> list[str]:
    """The kernels that took the most time, such as "addmm ×104 62 %"."""
    total = sum(time_s for time_s, _ in spent.values())
    first = sorted(spent, key=lambda name: -spent[name][0])[:top]
    return [f"{name} ×{spent[name][1]:.0f} {spent[name][0] / total:.0%}" for name in first]


def kernels(run: Callable[[], object], top: int = 3) -> list[str]:
    """The kernels that took the most time in one call."""
    return longest(kernel_times(run), top)


KERNEL_KINDS = {
    "communication": re.compile(
        r"nccl|c10d|gloo|all_gather|all_to_all|allgather|alltoall|memcpy ptop|barrier_kernel", re.IGNORECASE
    ),
    "attention": re.compile(r"sdpa|flash|fmha|attention|attn", re.IGNORECASE),
    "matrix products": re.compile(r"gemm|gemv|nvjet|cutlass|cublas|linear|mm$|mm_|_mm|splitk|marlin", re.IGNORECASE),
}


def by_kind(spent: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Milliseconds of the kernels of each kind: between GPUs, attention, matrix products, whatever else runs."""
    parts = {**dict.fromkeys(KERNEL_KINDS, 0.0), "the rest": 0.0}
    for name, (time_s, _) in spent.items():
        kind = next((kind for kind, pattern in KERNEL_KINDS.items() if pattern.search(name)), "the rest")
        parts[kind] += 1e3 * time_s
    return parts


def _short_kernel(name: str) -> str:
    """A kernel's name without its C++ types: long template arguments say little to a reader."""
    name = name.removeprefix("void ").replace("aten::", "")
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    name = re.sub(r"^## Call CompiledFxGraph .*", "a compiled graph", name)
    return name.split("<")[0].split("(")[0][:70]


@dataclass(frozen=True)
class WarmUp:
    """How it got steady: seconds of the first call and of all, their number, whether it did."""

    first_s: float
    total_s: float
    count: int
    stable: bool


def warm_up(
    run: Callable[[], object],
    synchronize: Callable[[], None] = synchronize,
    limit: int = 8,
    tolerance: float = 0.02,
    least: int = 3,
    enough_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    patience_s: float = math.inf,
) -> WarmUp:
    """Calls `run` until two calls in a row take the same time within `tolerance`, `least` to `limit` times.

    Two calls end it where the second takes longer than `enough_s`. One doesn't: a first call may have compiled, and
    say nothing of the next. A first call that takes longer than `patience_s` raises TooLate (`limited`).

    The first call of a pipeline loads kernels or compiles; a fixed number of warm-up calls hides whether that
    is over, this rule says it (`stable`). `total_s` is the sum of the calls.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}, at least 1 is needed")
    times: list[float] = []
    stable = False
    while len(times) < limit and not stable:
        with limited(math.inf if times else patience_s):
            times.append(timed(run, synchronize, clock))
        slow = len(times) > 1 and times[-1] > enough_s
        if slow or len(times) >= max(2, least):
            stable = abs(times[-1] - times[-2]) <= tolerance * times[-2]
        if slow:
            break
    return WarmUp(times[0], sum(times), len(times), stable)


class TooLate(TimeoutError):
    """What was done inside `limited` took too long."""


class _Over(BaseException):
    """Not an Exception: what compiles catches those, and goes on."""


@contextmanager
def limited(seconds: float):
    """Raises TooLate inside once so many seconds are over, infinity for never.

    In the main thread of a process only: signals, which it is done with, reach no other. Raises ValueError elsewhere.
    """
    if math.isinf(seconds):
        yield
        return

    def end(*_):
        raise _Over

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again, should something have swallowed it
    try:
        yield
    except _Over:
        raise TooLate(f"not done after {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Stages:
    """Seconds of the stages of one image, None for one that did not run; `total_s` has all the rest in it."""

    text_s: float | None = None
    denoise_s: float | None = None
    vae_s: float | None = None
    total_s: float | None = None


@contextmanager
def stages(pipe, synchronize: Callable[[], None] = synchronize, clock: Callable[[], float] = time.perf_counter):
    """Times text encoding, denoising and the VAE's work of the one call of `pipe` made inside; yields `Stages`.

    Denoising is the time from the end of `pipe.encode_prompt` to the start of `pipe.vae.decode` (to the end
    of the block when no image is decoded), less what encoding of images takes in between; so it has the making of
    the latents in it. The VAE's time is that of decoding and of encoding. The device is
    synchronised at these borders only, never between steps. `pipe` is put back as it was, whatever happens
    inside; the fields are filled in when the block ends well. Raises RuntimeError for a second call inside.
    """
    times = Stages()
    marks = {"text": 0.0, "vae": 0.0, "encode": 0.0, "texts": 0, "vaes": 0, "text_end": None, "vae_start": None}

    def border() -> float:
        synchronize()
        return clock()

    def encode_prompt(original):
        def wrapped(*args, **kwargs):
            if marks["vaes"]:
                raise RuntimeError("measure.stages times one pipeline call; use one block for each call")
            start = border()
            result = original(*args, **kwargs)
            marks["text_end"] = border()
            marks["text"] += marks["text_end"] - start
            marks["texts"] += 1  # twice with true classifier-free guidance
            return result

        return wrapped

    def decode(original):
        def wrapped(*args, **kwargs):
            start = border()
            if marks["vae_start"] is None:
                marks["vae_start"] = start
            result = original(*args, **kwargs)
            marks["vae"] += border() - start
            marks["vaes"] += 1
            return result

        return wrapped

    def encode(original):
        def wrapped(*args, **kwargs):
            start = border()
            result = original(*args, **kwargs)
            spent = border() - start
            marks["vae"] += spent
            if marks["text_end"] is not None:  # some pipelines encode their image before the prompt
                marks["encode"] += spent
            marks["encoded"] = True
            return result

        return wrapped

    with (
        _replaced(pipe, "encode_prompt", encode_prompt),
        _replaced(pipe.vae, "decode", decode),
        _replaced(pipe.vae, "encode", encode),
    ):
        start = border()
        yield times
        end = border()
    times.text_s = marks["text"] if marks["texts"] else None
    times.vae_s = marks["vae"] if marks["vaes"] or "encoded" in marks else None
    first = start if marks["text_end"] is None else marks["text_end"]
    times.denoise_s = (end if marks["vae_start"] is None else marks["vae_start"]) - first - marks["encode"]
    times.total_s = end - start


def median_stages(images: list[Stages]) -> dict[str, float | None]:
    """Median seconds of text encoding, denoising and the VAE's work over images; None for what did not run."""
    medians = {}
    for name in ("text_s", "denoise_s", "vae_s"):
        values = [getattr(image, name) for image in images]
        medians[name] = None if None in values or not values else statistics.median(values)
    return medians


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one denoising step: between the device's ends of two steps, and between the host's."""

    device_ms: float
    host_ms: float


def step_times(pipe, run: Callable[[], object]) -> list[StepTime]:
    """The steps of the one image that `run` makes, from the second on; nothing is waited for between them.

    Of a host and a device that take the same time either may wait for the other: the kernels' times tell which. A CPU
    is both.
    """
    device, marks = _cuda(pipe.transformer.device), []

    def mark(original):
        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            event = device and device.cuda.Event(enable_timing=True)
            if event:
                event.record()
            marks.append((event, time.perf_counter()))
            return result

        return wrapped

    with _replaced(pipe.scheduler, "step", mark):
        run()
    synchronize()
    times = []
    for (event, host), (next_event, next_host) in itertools.pairwise(marks):
        host_ms = 1e3 * (next_host - host)
        times.append(StepTime(event.elapsed_time(next_event) if event else host_ms, host_ms))
    return times


@contextmanager
def _replaced(owner, name: str, wrap: Callable):
    """`owner.name` is `wrap(owner.name)` inside; afterwards the instance has it only if it had it before."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@dataclass
class MemoryUse:
    """Memory in GiB. On CUDA: what torch has allocated (and reserved). On a CPU: growth of the process."""

    peak_gib: float | None = None
    average_gib: float | None = None
    reserved_gib: float | None = None
    device: str = field(default="cpu")


@contextmanager
def memory(device=None, rate_hz: float = 20.0):
    """Memory used by what runs inside; yields a `MemoryUse`, filled in when the block ends, well or not.

    `device` is a torch device or None for CUDA where there is any. On CUDA the peak is exact
    (max_memory_allocated, one device); the average is over samples at `rate_hz`. On a CPU both are the growth
    of the resident set since the start, sampled, so a peak shorter than a sample may be missed.
    """
    use = MemoryUse()
    torch = _cuda(device)
    if torch:
        use.device = "cuda"
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        read = lambda: torch.cuda.memory_allocated(device) / GIB  # noqa: E731
    else:
        import psutil

        process = psutil.Process()
        start = process.memory_info().rss
        read = lambda: max(0, process.memory_info().rss - start) / GIB  # noqa: E731
    ticker = telemetry.Ticker(read, rate_hz)
    try:
        with ticker:
            yield use
    finally:
        use.average_gib = sum(ticker.readings) / len(ticker.readings) if ticker.readings else None
        use.peak_gib = max(ticker.readings, default=None)
        if torch:
            use.peak_gib = torch.cuda.max_memory_allocated(device) / GIB
            use.reserved_gib = torch.cuda.max_memory_reserved(device) / GIB


def _cuda(device):
    """torch when `device` is on CUDA (None: when there is a CUDA device), else None."""
    import torch

    kind = torch.device(device).type if device is not None else "cuda"
    return torch if kind == "cuda" and torch.cuda.is_available() else None
