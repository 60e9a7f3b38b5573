"""Images for many users: a server with one process per GPU and a bounded queue, and users who ask it.

    with Server(subject, queue=16) as server:
        requests = closed_loop(server, users=4, images=1, total=100, steps=28)
        print(figures(requests))

The clock of a request starts when its user asks and stops when the images are there; waiting in the queue is kept apart
from being served. A full queue refuses at once, a request that is cancelled while it waits leaves its place to the next
one, and a request that fails, or takes its process with it, fails alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import random
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fluxnb.errors import UserError
from fluxnb.measure import stats

START_S = 600.0  # until a process has to be ready: it loads, compiles and warms up


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
    """

    def __init__(self, subject, workers: int = 1, queue: int = 16, batch: int = 1, images: tuple[int, ...] = (1,)):
        if min(workers, queue, batch) < 1:
            raise UserError(f"{workers} workers, {queue} places and batches of {batch}: each has to be 1 or more.")
        self.subject, self.places, self.batch = subject, queue, batch
        self._waiting: deque[Request] = deque()
        self._change = threading.Condition()
        self._closed = False
        counts = sorted({n * together for n in images for together in range(1, batch + 1)})
        self._workers = [_Worker(self.subject, i, counts) for i in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]

    def __enter__(self) -> Server:
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.ready()
        except BaseException:
            self._stop()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Serves what is running, cancels what waits, and ends the processes."""
        self._close("the server was closed")
        for thread in self._threads:
            thread.join()
        self._stop()

    def _close(self, why: str) -> None:
        with self._change:
            self._closed = True
            for request in self._waiting:
                request._end("cancelled", error=why)
            self._waiting.clear()
            self._change.notify_all()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def ask(self, prompt: str, seed: int, steps: int, images: int = 1, asked: float | None = None) -> Request:
        """Puts a request into the queue and returns at once.

        Args:
            images: made together, from as many seeds in a row.
            asked: when its user wanted it, if that was before now.

        Raises:
            QueueFull: every place is taken; the message says how many there are.
            UserError: the server is closed.
        """
        request = Request(prompt, seed, steps, images)
        if asked is not None:
            request.asked = asked
        with self._change:
            if self._closed:
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
            for request in together:
                request.begun, request.state, request.batch = time.perf_counter(), "running", len(together)
            try:
                answer = worker.make(together)
                if not isinstance(answer, str) or len(together) == 1:
                    _settle(together, answer)
                    continue
                for request in together:  # one of them is to blame: each by itself
                    request.batch = 1
                    _settle([request], worker.make([request]))
            except UserError as error:  # there is no process to serve with any more
                _settle([r for r in together if not r.over.is_set()], str(error))
                self._close(str(error))

    def _next(self) -> list[Request]:
        """The request that has waited longest and those that can be made with it; none when the server is closed."""
        with self._change:
            while not self._waiting and not self._closed:
                self._change.wait()
            if self._closed:
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
            return together


def _settle(requests: list[Request], answer) -> None:
    if isinstance(answer, str):
        for request in requests:
            request._end("failed", error=answer)
        return
    start = 0
    for request in requests:
        request._end("done", answer[start : start + request.images])
        start += request.images


class _Worker:
    """A process with a pipeline; started again if it dies."""

    def __init__(self, subject, index: int, counts: list[int]):
        self.subject, self.index, self.counts = subject, index, counts
        self.process: BaseProcess | None = None
        self.pipe: Connection | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.subject, self.index, self.counts), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        if not self.pipe.poll(START_S):
            raise UserError(f"Worker {self.index} was not ready after {START_S:.0f} s.")
        try:
            said = self.pipe.recv()
        except EOFError:
            said = "it ended while it was starting"
        if said != "ready":
            raise UserError(f"Worker {self.index} could not start: {said}")

    def make(self, requests: list[Request]):
        """The images of all requests in a row, or a sentence on what went wrong."""
        inputs = [(r.prompt, r.seed + i) for r in requests for i in range(r.images)]
        try:
            self.pipe.send((inputs, requests[0].steps))
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            how = self.process.exitcode
            self.start()
            self.ready()
            return f"the process that served it ended ({how}); another one is in its place"

    def stop(self) -> None:
        if self.process is None:
            return
        try:
            self.pipe.send(None)
        except OSError:
            pass
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe, subject, index: int, counts: list[int]) -> None:
    """A worker's process: loads, makes so many images at once, then serves until it is told to end."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    try:
        loaded = subject.load()
        for count in counts:
            loaded.batch(list(itertools.islice(itertools.cycle(subject.inputs), count)), 2)
    except Exception as error:  # noqa: BLE001  the server says it
        pipe.send(_said(error))
        return
    pipe.send("ready")
    while (given := pipe.recv()) is not None:
        try:
            answer = loaded.batch(*given)
        except Exception as error:  # noqa: BLE001  it is the request's, and the next one may be fine
            answer = _said(error)
        pipe.send(answer)


def _said(error: Exception) -> str:
    first = (str(error).splitlines() or ["no message"])[0]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


# --- users ------------------------------------------------------------------------------------------------


def closed_loop(server: Server, users: int, total: int, steps: int, images: int = 1) -> list[Request]:
    """So many users, each asking again when it has been answered, until `total` requests were made.

    Returns:
        All requests, of the subject's inputs in turn, in the order in which they were asked.
    """
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

    Returns:
        All requests; those that found the queue full are `refused`.
    """
    generator, inputs = random.Random(seed), server.subject.inputs
    made, due = [], time.perf_counter()
    for n in range(total):
        due += generator.expovariate(rate)
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        made.append(_asked(server, inputs[n % len(inputs)], steps, images, due))
    return [request.wait() for request in made]


def _asked(server: Server, given: tuple[str, int], steps: int, images: int, due: float | None) -> Request:
    """A request, also where it is refused."""
    try:
        return server.ask(*given, steps, images, due)
    except QueueFull as full:
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
        raise UserError(f"None of {len(requests)} requests was done: {requests[0].error or requests[0].state}.")
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
