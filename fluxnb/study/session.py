"""One stay on one machine: rows of one session may be compared second by second."""

from __future__ import annotations

import hashlib
import statistics
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from fluxnb.study.row import Row

GAP = timedelta(hours=1)  # without a row: then the machine may have been given back, or did something else


class Session:
    """The session that this process measures in, joined or begun when its first row is written.

    Args:
        host: of fluxnb.measure.identity.
        run_id: of this process.
    """

    def __init__(self, host: str, run_id: str):
        self.host, self.run_id = host, run_id
        self.id: str | None = None

    def current(self, rows: list[Row]) -> str:
        """Its id: of this machine's newest row, if that is of this boot and less than an hour old, else a new one."""
        if self.id is None:
            own = [r for r in rows if r.host == self.host and r.session and r.measured_at]
            # what was measured before the clock was set back says nothing of now
            own = [r for r in own if datetime.fromisoformat(r.measured_at) <= datetime.now(UTC)]
            newest = max(own, key=lambda r: r.measured_at, default=None)
            since = max(_booted(), datetime.now(UTC) - GAP)
            joined = newest is not None and datetime.fromisoformat(newest.measured_at) > since
            self.id = newest.session if joined else self._new()
        return self.id

    def check(self, rows: list[Row], alike: Callable[[Row], bool], samples: list[float]) -> None:
        """Begins another session if a baseline's samples differ from those of the session's other processes.

        Args:
            alike: whether a row is one of this baseline.
            samples: its seconds in this process.
        """
        session = self.current(rows)
        for row in reversed(rows):
            if row.session == session and row.run_id != self.run_id and row.samples and alike(row):
                if apart(row.samples, samples):
                    self.id = self._new()
                return

    def _new(self) -> str:
        text = f"{self.host} {self.run_id} {datetime.now(UTC).isoformat()} {uuid.uuid4().hex}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def apart(a: list[float], b: list[float]) -> bool:
    """Whether two runs of the same differ by more than the noise: their ranges, without a quarter at each end."""
    (low_a, high_a), (low_b, high_b) = _middle(a), _middle(b)
    return low_a > high_b or low_b > high_a


def _middle(samples: list[float]) -> tuple[float, float]:
    if len(samples) < 4:
        return min(samples), max(samples)
    low, _, high = statistics.quantiles(samples, n=4)
    return low, high


def _booted() -> datetime:
    import psutil

    return datetime.fromtimestamp(psutil.boot_time(), UTC)
