"""Images for many users: a server with one process per GPU and a bounded queue, and users who ask it.

    with Server(subject, queue=16) as server:
        requests = closed_loop(server, users=4, images=1, total=100, steps=28)
        print(figures(requests))

The clock of a request starts when its user asks and stops when the images are there; waiting in the queue is kept apart
from being served. A full queue refuses at once, a request that is cancelled while it waits leaves its place to the next
one, and a request that fails, or takes its process with it, fails alone. A process that is gone, stopped, or silent for
too long is ended and another one takes its place; a server that is closed is closed after `CLOSE_S` at most.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import multiprocessing.connection
import queue
import random
import signal
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fluxnb.errors import UserError
from fluxnb.measure import stats
from fluxnb.models import facts

START_S = 600.0  # until a process has to be ready: it loads, compiles and warms up
CLOSE_S = 10.0  # until a server is closed, whatever its processes do
STOPPED_S = 3.0  # a process that is stopped (by a signal, a debugger) for so long is given up
STARTS = 3  # attempts to put another process in the place of one that is gone
MOST_IMAGES, MOST_LETTERS = 64, 10_000  # of a request


class QueueFull(UserError):
    """A request was refused: there is no place in the queue."""


@dataclass(eq=False)
class Request:
    """What a user asks for, and what became of it.

    `state` is waiting, running, done, failed, cancelled or refused; the times are seconds of time.perf_counter.
    """

    prompt: str
    seed: int
    steps: int
    images: int = 1
    asked: float = field(default_factory=time.perf_counter)
    begun: float | None = None
    ended: float | None = None
    state: str = "waiting"
    result: list | None = None
    error: str | None = None
    batch: int = 0  # how many requests were served together
    over: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def latency_s(self) -> float:
        """From asking to having."""
        return self.ended - self.asked

    @property
    def queued_s(self) -> float:
        """From asking to being served."""
        return self.begun - self.asked

    @property
    def service_s(self) -> float:
        """From being served to having."""
        return self.ended - self.begun

    def wait(self, timeout: float | None = None) -> Request:
        """Returns when it is over, whatever the end."""
        if not self.over.wait(timeout):
            raise TimeoutError(f"the request for {self.prompt!r} is still {self.state}")
        return self

    def _end(self, state: str, result=None, error: str | None = None) -> None:
        if self.over.is_set():
            return
        self.ended, self.result, self.error, self.state = time.perf_counter(), result, error, state
        self.over.set()


class Server:
    """One process per GPU, each with the whole pipeline, behind one bounded queue.

    Args:
        subject: a fluxnb.study.subject.Subject, which every process loads for itself.
        workers: processes; on GPUs each has its own.
        queue: requests that may wait, those being served not counted.
        batch: at most so many waiting requests of equal steps and images are made together, and no more than one
            process's share of those that wait: the others will be free soon, too.
        images: what requests will ask for; every number of images that can come together is made once before the
            server is open, so that no request waits for a compilation. Others may be asked for.
        limit_s: a process that says nothing for so long while it serves is ended, and its request fails.
    """

    def __init__(
        self, subject, workers: int = 1, queue: int = 16, batch: int = 1, images: tuple[int, ...] = (1,),
        limit_s: float = 600.0,
    ):  # fmt: skip
        if min(workers, queue, batch) < 1:
            raise UserError(f"{workers} workers, {queue} places and batches of {batch}: each has to be 1 or more.")
        self.subject, self.places, self.batch = subject, queue, batch
        self._waiting: deque[Request] = deque()
        self._running: set[Request] = set()
        self._change = threading.Condition()
        self._closed, self._left = threading.Event(), workers
        counts = sorted({n * together for n in images for together in range(1, batch + 1)})
        self._workers = [_Worker(self.subject, i, counts, limit_s, self._closed) for i in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]

    def __enter__(self) -> Server:
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.ready()
        except BaseException:
            self._close("the server could not be opened")
            self._stop(time.monotonic() + CLOSE_S / 4)
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Serves what is running if that is soon done, cancels what waits, and ends the processes."""
        begun = time.monotonic()
        self._close("the server was closed")
        for share, stop in ((0.5, self._stop), (0.9, lambda deadline: None)):
            for thread in self._threads:
                thread.join(max(0.0, begun + share * CLOSE_S - time.monotonic()))
            stop(begun + 0.75 * CLOSE_S)
        with self._change:
            for request in self._running:
                request._end("cancelled", error="the server was closed before it was done")

    def _close(self, why: str) -> None:
        with self._change:
            self._closed.set()
            for request in self._waiting:
                request._end("cancelled", error=why)
            self._waiting.clear()
            self._change.notify_all()

    def _stop(self, deadline: float) -> None:
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.end(deadline)

    def ask(self, prompt: str, seed: int, steps: int, images: int = 1, asked: float | None = None) -> Request:
        """Puts a request into the queue and returns at once.

        Args:
            images: made together, from as many seeds in a row.
            asked: when its user wanted it, if that was before now.

        Raises:
            QueueFull: every place is taken; the message says how many there are.
            UserError: the server is closed, or something asked for isn't what it may be.
        """
        _check(prompt, seed, steps, images, asked)
        request = Request(prompt, seed, steps, images)
        if asked is not None:
            request.asked = asked
        with self._change:
            if self._closed.is_set():
                raise UserError("The server is closed: open another one.")
            if len(self._waiting) >= self.places:
                raise QueueFull(
                    f"All {self.places} places of the queue are taken: ask again later, or give the server more places."
                )
            self._waiting.append(request)
            self._change.notify()
        return request

    def cancel(self, request: Request) -> bool:
        """Takes a request that still waits out of the queue; False if it is too late."""
        with self._change:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            request._end("cancelled")
            return True

    def _serve(self, worker: _Worker) -> None:
        while together := self._next():
            try:
                for request in together:
                    request.begun, request.state, request.batch = time.perf_counter(), "running", len(together)
                answer = worker.make(together)
                if not isinstance(answer, str) or len(together) == 1:
                    _settle(together, answer)
                    continue
                for request in together:  # one of them is to blame: each by itself
                    request.batch = 1
                    _settle([request], worker.make([request]))
            except _Gone as error:  # there is no process to serve with any more: the others go on
                _settle(together, str(error))
                self._left -= 1
                if not self._left:
                    self._close(str(error))
                return
            except Exception as error:  # noqa: BLE001  the next request may be fine
                _settle(together, _said(error))
            finally:
                with self._change:
                    self._running -= set(together)

    def _next(self) -> list[Request]:
        """The request that has waited longest and those that can be made with it; none when the server is closed."""
        with self._change:
            while not self._waiting and not self._closed.is_set():
                self._change.wait()
            if self._closed.is_set():
                return []
            share = -(-len(self._waiting) // len(self._workers))
            first = self._waiting.popleft()
            together = [first]
            for request in list(self._waiting):
                if len(together) == min(self.batch, share):
                    break
                if (request.steps, request.images) == (first.steps, first.images):
                    self._waiting.remove(request)
                    together.append(request)
            self._running |= set(together)
            return together


def _check(prompt, seed, steps, images, asked) -> None:
    """Raises UserError unless a request can be served: what its process is given breaks nothing."""
    if not isinstance(prompt, str) or not 0 < len(prompt.strip()) <= len(prompt) <= MOST_LETTERS:
        raise UserError(f"A prompt of {prompt!r:.80}: give a text of at most {MOST_LETTERS} letters.")
    limits = {
        "seed": (seed, -math.inf, math.inf),
        "steps": (steps, 1, facts.MOST_STEPS),
        "images": (images, 1, MOST_IMAGES),
    }
    for name, (value, low, high) in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            allowed = "" if name == "seed" else f" from {low} to {high}"
            raise UserError(f"{name} is {value!r:.80}: give a whole number{allowed}.")
    if asked is not None and not (isinstance(asked, int | float) and math.isfinite(asked)):
        raise UserError(f"asked is {asked!r:.80}: give seconds of time.perf_counter.")


def _settle(requests: list[Request], answer) -> None:
    images = sum(request.images for request in requests)
    if not isinstance(answer, str) and not (isinstance(answer, list) and len(answer) == images):
        answer = f"the process that served it gave something else than {images} images"
    if isinstance(answer, str):
        for request in requests:
            request._end("failed", error=answer)
        return
    start = 0
    for request in requests:
        request._end("done", answer[start : start + request.images])
        start += request.images


class _Gone(UserError):
    """There is no process, and none can be started."""


class _Worker:
    """A process with a pipeline; started again if it dies, stops or says nothing for too long."""

    def __init__(self, subject, index: int, counts: list[int], limit_s: float, closed: threading.Event):
        self.subject, self.index, self.counts, self.limit_s, self.closed = subject, index, counts, limit_s, closed
        self.process: BaseProcess | None = None
        self.pipe: Connection | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        try:
            self.pipe, theirs = context.Pipe()
            given = (theirs, self.subject, self.index, self.counts)
            self.process = context.Process(target=_work, args=given, daemon=True)
            self.process.start()
            theirs.close()
        except OSError as error:
            raise _Gone(f"Worker {self.index} could not start: {error.strerror or error}") from None

    def ready(self) -> None:
        said, why = self._heard(START_S)
        if why or said != "ready":
            raise _Gone(f"Worker {self.index} could not start: {f'it {why}' if why else said}")

    def make(self, requests: list[Request]):
        """The images of all requests in a row, or a sentence on what went wrong. Raises _Gone without a process."""
        inputs = [(r.prompt, r.seed + i) for r in requests for i in range(r.images)]
        if not self.process.is_alive():  # it died while it had nothing to do
            self._again()
        watch = threading.Timer(self.limit_s + STOPPED_S, self.process.kill)  # whatever is waited for then ends
        watch.daemon = True
        watch.start()
        try:
            self.pipe.send((inputs, requests[0].steps))
            answer, why = self._heard(self.limit_s)
        except OSError:  # it died meanwhile
            answer, why = None, "ended"
        finally:
            watch.cancel()
        if why is None:
            return answer
        self.end(time.monotonic() + (CLOSE_S / 4 if why == "ended" else 0))
        how = f"ended ({self.process.exitcode})" if why == "ended" else f"{why}, and was ended"
        self._again()
        return f"the process that served it {how}; another one is in its place"

    def _again(self) -> None:
        for attempt in range(STARTS):
            if self.closed.is_set():
                raise _Gone("the server was closed before it was done")
            self.end(time.monotonic())
            try:
                self.start()
                return self.ready()
            except _Gone:
                if attempt == STARTS - 1:
                    raise

    def _heard(self, limit_s: float) -> tuple:
        """(what the process said, None), or (None, what it did instead)."""
        import psutil

        deadline, stopped = time.monotonic() + limit_s, None
        while True:
            there = multiprocessing.connection.wait([self.pipe, self.process.sentinel], 0.5)
            try:
                if self.pipe in there:
                    return self.pipe.recv(), None
            except (EOFError, OSError):
                return None, "ended"
            if there:
                return None, "ended"
            if (now := time.monotonic()) > deadline:
                return None, f"said nothing for {limit_s:.0f} s"
            with contextlib.suppress(psutil.Error):
                halted = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
                stopped = (stopped or now) if halted else None
                if stopped and now - stopped > STOPPED_S:
                    return None, "was stopped"

    def ask_to_end(self) -> None:
        if self.process is not None and self.process.is_alive():
            with contextlib.suppress(OSError, ValueError):
                self.pipe.send(None)

    def end(self, deadline: float) -> None:
        """Ends the process, by force from `deadline` on."""
        if self.process is None or self.process.pid is None:
            return
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join(CLOSE_S / 4)


def _work(pipe, subject, index: int, counts: list[int]) -> None:
    """A worker's process: loads, makes so many images at once, then serves until it is told to end."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which closes
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    try:
        loaded = subject.load()
        for count in counts:
            loaded.batch(list(itertools.islice(itertools.cycle(subject.inputs), count)), 2)
    except Exception as error:  # noqa: BLE001  the server says it
        pipe.send(_said(error))
        return
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        pipe.send("ready")
        while (given := pipe.recv()) is not None:
            try:
                answer = loaded.batch(*given)
            except Exception as error:  # noqa: BLE001  it is the request's, and the next one may be fine
                answer = _said(error)
            pipe.send(answer)


def _said(error: Exception) -> str:
    try:
        first = (str(error).splitlines() or ["no message"])[0]
    except Exception:  # noqa: BLE001  some can't even be written
        first = "no message"
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


# --- users ------------------------------------------------------------------------------------------------


def closed_loop(server: Server, users: int, total: int, steps: int, images: int = 1) -> list[Request]:
    """So many users, each asking again when it has been answered, until `total` requests were made.

    Returns all requests, of the subject's inputs in turn, in the order in which they were asked.
    """
    _check_users(users=users, total=total)
    inputs = server.subject.inputs
    numbers: queue.SimpleQueue = queue.SimpleQueue()
    for n in range(total):
        numbers.put(n)
    made: list[Request] = []

    def user() -> None:
        while True:
            try:
                n = numbers.get_nowait()
            except queue.Empty:
                return
            made.append(_asked(server, inputs[n % len(inputs)], steps, images, None).wait())

    threads = [threading.Thread(target=user) for _ in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(made, key=lambda r: r.asked)


def open_loop(
    server: Server, rate: float, total: int, steps: int, images: int = 1, seed: int = 0
) -> list[Request]:  # fmt: skip
    """Requests that arrive at random (a Poisson process), whether or not earlier ones have been answered.

    Args:
        rate: requests per second.

    Returns all requests; those that found the queue full are `refused`.
    """
    _check_users(rate=rate, total=total)
    generator, inputs = random.Random(seed), server.subject.inputs
    made, due = [], time.perf_counter()
    for n in range(total):
        due += generator.expovariate(rate)
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        made.append(_asked(server, inputs[n % len(inputs)], steps, images, due))
    return [request.wait() for request in made]


def _check_users(**given: float) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{name} is {value!r:.80}: give a number above 0.")


def _asked(server: Server, given: tuple[str, int], steps: int, images: int, due: float | None) -> Request:
    """A request, also where it is refused."""
    _check(*given, steps, images, due)
    try:
        return server.ask(*given, steps, images, due)
    except UserError as full:
        request = Request(*given, steps, images)
        request.asked = request.asked if due is None else due
        request._end("refused", error=str(full))
        return request


# --- figures ----------------------------------------------------------------------------------------------


def figures(requests: list[Request]) -> dict:
    """The columns of a row: latencies of what was done, images per second, and in `proof` what became of the rest.

    Raises UserError when nothing was done.
    """
    done = [r for r in requests if r.state == "done"]
    if not done:
        why = (requests[0].error or requests[0].state) if requests else "none was made"
        raise UserError(f"None of {len(requests)} requests was done: {why}.")
    took = max(r.ended for r in done) - min(r.asked for r in requests)
    counts = {state: sum(r.state == state for r in requests) for state in ("failed", "cancelled", "refused")}
    return {
        **stats.summary([r.latency_s for r in done]),
        "images_per_s": sum(r.images for r in done) / took,
        "proof": {
            "requests": len(requests),
            "queued_s": statistics.fmean(r.queued_s for r in done),
            "service_s": statistics.fmean(r.service_s for r in done),
            "batch": statistics.fmean(r.batch for r in done),
            **{state: count for state, count in counts.items() if count},
        },
    }
