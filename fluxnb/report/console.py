"""What a run prints while it goes on: which notebook of how many, its rows, and how long; nothing that isn't known."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from fluxnb.report import describe_failure, duration

LINE_EVERY_S = 10.0  # where the progress line can't be updated in place


class Progress:
    """One line that updates on a terminal; elsewhere a line per start and end, and at most one per 10 s between.

    The kernel's side appends JSON lines such as {"notebook": "05_…", "done": 3, "found": 1, "total": 12, "label": "…"}:
    `done` rows are there, `found` of them were there before, `total` is what the notebook has asked for so far. How
    many rows there will be in all is known only from a run of the very same notebook.

    Args:
        stems: the notebooks, in their order.
        stream: where it is printed.
        before: stem -> what is known of its last complete run: "rows" in all, if it would be the same again, and the
            "seconds" that it took if it measured all of them.
    """

    def __init__(self, stems: list[str], stream, before: dict[str, dict] | None = None):
        self.stems, self.stream, self.before = list(stems), stream, before or {}
        self.live = bool(getattr(stream, "isatty", lambda: False)())
        self.pending = list(stems)
        self.first: tuple[float, dict] | None = None  # (time, event) of the first and the newest progress event
        self.last: tuple[float, dict] | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._width = 0
        self.said: set[str] = set()

    def skipped(self, stems: list[str]) -> None:
        """Say what needn't be executed."""
        self.pending = [s for s in self.pending if s not in stems]
        if stems:
            self._line(f"{len(stems)} of {len(self.stems)} notebooks unchanged since their last run")

    def note(self, text: str) -> None:
        """Say something that is true of the whole run."""
        self._line(text)

    def once(self, text: str) -> None:
        """Say something the first time."""
        if text not in self.said:
            self.said.add(text)
            self._line(text)

    def start(self, stem: str, events: Path) -> None:
        """Begin to follow the progress file of one notebook."""
        self.stem, self.events, self.began = stem, events, time.monotonic()
        self.pending = [s for s in self.pending if s != stem]
        self.first = self.last = None
        self._offset = 0
        self._end.clear()
        if not self.live:
            self._line(f"{self._which(stem)} started")
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> dict:
        """Stop following, also when the notebook was interrupted; its last event."""
        self._end.set()
        if self._thread:
            self._thread.join()
            self._thread = None
            self._read()
        return self.last[1] if self.last else {}

    def finished(self, stem: str, state: dict) -> None:
        """Print how a notebook ended."""
        took = duration(state["seconds"])
        if state["status"] == "ok":
            rows = f", {_counted(state['asked'], state.get('found', 0))}" if state.get("asked") else ""
            self._line(f"{self._which(stem)} done in {took}{rows}")
        else:
            self._line(f"{self._which(stem)} {describe_failure(state)} (after {took})")

    def close(self) -> None:
        """Leave the cursor on a line of its own, also after Ctrl-C."""
        self.stop()
        if self._width:
            self._line(f"{self._which(self.stem)} interrupted")

    def text(self) -> str:
        """The progress line as it stands."""
        now = time.monotonic()
        parts = [self._which(self.stem)]
        if self.last:
            event = self.last[1]
            parts.append(_counted(event["done"], event["found"], self._in_all()))
            parts += [str(event["label"])] if event.get("label") else []
        parts.append(f"{duration(now - self.began)} so far")
        if left := self._left(now):
            parts.append(left)
        return " · ".join(parts)

    def _in_all(self) -> int | None:
        """Rows of the whole notebook, where a run like this one told; None where it was wrong."""
        rows = self.before.get(self.stem, {}).get("rows")
        return rows if rows and (not self.last or self.last[1]["total"] <= rows) else None

    def _left(self, now: float) -> str | None:
        """Time left, where something is known of it, and never none while it goes on."""
        remaining = self._left_here(now)
        if remaining is None or remaining < 1:
            return None
        others = [self.before.get(s, {}).get("seconds") or 0.0 for s in self.pending]
        if all(others):  # also when there are none
            return f"about {duration(remaining + sum(others))} left"
        return f"about {duration(remaining)} left in this notebook"

    def _left_here(self, now: float) -> float | None:
        """Seconds left in this notebook, by the rate of its rows or by what it took last time."""
        rows, measured = self._in_all(), self._measured()
        if self.last and rows and measured:
            seconds, count = measured
            return seconds / count * (rows - self.last[1]["done"]) - (now - self.last[0])
        took = self.before.get(self.stem, {}).get("seconds")
        if took is None or (self.last and self.last[1]["found"]):  # what is found takes no time: the rest isn't known
            return None
        return took - (now - self.began)

    def _measured(self) -> tuple[float, int] | None:
        """(seconds, rows) measured since the first event; rows found again are left out, for they take no time."""
        if not (self.first and self.last):
            return None
        (start, first), (end, last) = self.first, self.last
        count = (last["done"] - last["found"]) - (first["done"] - first["found"])
        return (end - start, count) if count > 0 else None

    def _which(self, stem: str) -> str:
        return f"[{self.stems.index(stem) + 1}/{len(self.stems)}] {stem}"

    def _follow(self) -> None:
        printed_at, printed = time.monotonic(), None
        while not self._end.wait(0.25):
            self._read()
            if self.live:
                self._update(self.text())
            elif self.last and self.last[1] != printed and time.monotonic() - printed_at >= LINE_EVERY_S:
                printed_at, printed = time.monotonic(), self.last[1]
                self._line(self.text())

    def _read(self) -> None:
        """Take in the complete lines appended since the last look."""
        try:
            with open(self.events, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:  # removed with the kernel's folder
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
                event |= {name: int(event.get(name, 0)) for name in ("done", "found", "total")}
            except (ValueError, TypeError, AttributeError):
                continue
            self.last = (time.monotonic(), event)
            self.first = self.first or self.last

    def _update(self, text: str) -> None:
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 80
        text = text[: max(columns - 1, 20)]
        self._print("\r" + text.ljust(self._width))
        self._width = len(text)

    def _line(self, text: str) -> None:
        erased, self._width = "\r" + " " * self._width + "\r" if self._width else "", 0
        self._print(f"{erased}{text}\n")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone stops no measuring
            self.stream.write(text)
            self.stream.flush()


def _counted(done: int, found: int, of: int | None = None) -> str:
    """ "3 of 12 rows", "3 rows", "3 rows, 2 of them found"."""
    total = of or done
    rows = f"{f'{done} of ' if of else ''}{total} row{'s' * (total != 1)}"
    return f"{rows}, {'all' if found == done else f'{found} of them'} found" if found else rows
