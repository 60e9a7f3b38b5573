"""Loads that a server of the study is put under."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fluxnb import families
from fluxnb.errors import UserError, lacks_memory
from fluxnb.measure import load, telemetry
from fluxnb.study.comparison import failure, watched
from fluxnb.study.loop import Rows, Task
from fluxnb.study.row import Row
from fluxnb.study.subject import Subject

PLACES = 64  # of a server's queue


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

    def meaning(self, batch: int, processes: int) -> dict:
        """The columns of its row that say what it is; `batch` waiting requests may be made together."""
        who = f"{self.users} user{'s' * (self.users > 1)}"
        if self.arrivals:
            of = "the process makes" if processes == 1 else f"all {processes} processes make"
            who = f"arrivals at {self.arrivals:.0%} of what {of}"
        label = f"{who}, {self.images} image{'s' * (self.images > 1)} each"
        return {
            "family": families.SERVING.name,
            "technique": "arrivals" if self.arrivals else "users",
            "label": f"{label}, up to {batch} made together" if batch > 1 else label,
            "mark": f"{self.arrivals:.0%}" if self.arrivals else str(self.users),
        }

    def row(self, shape: dict, batch: int) -> tuple[dict, dict]:
        """(key, meaning) of its row; `shape` is the key of a candidate of the server's steps on its GPUs."""
        processes = shape["gpus"]
        meaning = self.meaning(batch, processes)
        settings = shape["settings"] | {"batching": batch, "queue": PLACES}
        if batch > 1 and processes > 1:
            settings["taken"] = "in shares"  # a process takes no more of what waits than its share
        if self.arrivals:
            settings["arrivals"] = self.arrivals
            if processes > 1:
                settings["arrivals_of"] = "all processes"
        own = {"technique": meaning["technique"], "users": self.users, "images_each": self.images}
        return shape | own | {"settings": settings}, meaning

    def enough(self, row: Row) -> bool:
        """Whether a row is of so many requests: one of fewer has no 99th percentile, say."""
        return (row.shown("requests") or 0) >= self.total

    def put_on(self, server: load.Server, steps: int, capacity: float | None) -> dict:
        """The columns of what became of all requests; `capacity` in requests per second is needed for arrivals."""
        host = telemetry.Host(os.getpid())
        with telemetry.Sampler() as sampler, host.during():
            if self.arrivals:
                requests = load.open_loop(server, self.arrivals * capacity, self.total, steps, self.images)
            else:
                requests = load.closed_loop(server, self.users, self.total, steps, self.images)
        row = {"status": "ok", **load.figures(requests), "total_steps": steps, "computed_steps": steps}
        if result := sampler.result:
            row |= {name: result[name] for name in ("memory_avg_gib", "memory_peak_gib")}
        return row | watched(sampler.result, host)


def measure(rows: Rows, subject: Subject, loads: dict[Task, Load], due: list[Task], batch: int) -> None:
    """Appends a row for each task that is due, all of one server, one process per GPU.

    Args:
        loads: of all tasks; arrivals are a share of what the first one's users get.
        batch: at most so many waiting requests are made together.
    """
    first, *_ = loads
    processes, steps = first.key["gpus"], first.key["steps"]
    images = tuple({loads[task].images for task in due})
    left = list(due)
    try:
        with load.Server(subject, processes, PLACES, batch, images) as server:
            while left:
                found = rows.find(first)
                capacity = found.images_per_s / found.images_each * processes if found and found.ok else None
                rows.append(left[0], loads[left[0]].put_on(server, steps, capacity))
                left.pop(0)
    except UserError as error:  # nothing was done, or there was nobody to do it
        if not lacks_memory(error):
            raise
        for task in left:
            rows.append(task, failure(error))
