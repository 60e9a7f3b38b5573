"""Work in the background that answers to Stop within a layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


class Stopped(Exception):
    """Its job was stopped."""


@dataclass
class Job:
    """Something in the background. `stop()` ends it before the next layer of whatever network is running."""

    doing: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def stop(self) -> None:
        """Ends it before the next layer; nothing is made."""
        self.stopped.set()

    def wait(self, timeout: float = 60.0) -> None:
        """Returns when it has ended."""
        if self.thread:
            self.thread.join(timeout)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Raises `Stopped` in this thread before a layer runs: a step takes half a minute at 1024 px on a CPU."""
        me = threading.get_ident()

        def look(*_):
            if self.stopped.is_set() and threading.get_ident() == me:
                raise Stopped

        hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()
