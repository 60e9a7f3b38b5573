"""Loads that a server of the study is put under."""

from __future__ import annotations

from dataclasses import dataclass

from fluxnb import families
from fluxnb.measure import load, telemetry
from fluxnb.study.comparison import watched


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

    def meaning(self, batch: int) -> dict:
        """The columns of its row that say what it is; `batch` waiting requests are made together."""
        who = f"arrivals at {self.arrivals:.0%}" if self.arrivals else f"{self.users} user{'s' * (self.users > 1)}"
        label = f"{who}, {self.images} image{'s' * (self.images > 1)} each"
        return {
            "family": families.SERVING.name,
            "technique": "arrivals" if self.arrivals else "users",
            "label": f"{label}, made {batch} together" if batch > 1 else label,
            "mark": f"{self.arrivals:.0%}" if self.arrivals else str(self.users),
        }

    def settings(self, batch: int, places: int, processes: int) -> dict:
        """What else distinguishes its row."""
        found: dict = {"batching": batch, "queue": places}
        if batch > 1 and processes > 1:
            found["taken"] = "in shares"  # a process takes no more of what waits than its share
        if self.arrivals:
            found["arrivals"] = self.arrivals
            if processes > 1:
                found["arrivals_of"] = "all processes"
        return found

    def put_on(self, server: load.Server, steps: int, capacity: float | None) -> dict:
        """The columns of what became of all requests; `capacity` in requests per second is needed for arrivals."""
        with telemetry.Sampler() as sampler:
            if self.arrivals:
                requests = load.open_loop(server, self.arrivals * capacity, self.total, steps, self.images)
            else:
                requests = load.closed_loop(server, self.users, self.total, steps, self.images)
        row = {"status": "ok", **load.figures(requests), "total_steps": steps, "computed_steps": steps}
        if result := sampler.result:
            row |= {name: result[name] for name in ("memory_avg_gib", "memory_peak_gib")}
        return row | watched(sampler.result)
