"""How far a notebook is that somebody runs by hand: a line beneath the cell that measures, replaced as it goes on.

`make report` follows its kernels by a file instead, whose name is in FLUXNB_PROGRESS: there nothing is shown.
"""

from __future__ import annotations

import os
import sys
import time

PROGRESS = "FLUXNB_PROGRESS"  # the file that a kernel of `make report` tells how far it is
EVERY_S = 0.5  # between two changes of the line


class Line:
    """The line of the cell that runs now."""

    def __init__(self) -> None:
        self._cell, self._shown, self._rows = -1, None, ""
        self._began = self._said = 0.0

    def rows(self, words: str) -> None:
        """Shows how many rows are there, of how many."""
        self._rows = words
        self._show("", now=True)

    def doing(self, words: str) -> None:
        """Shows what is being done for the next row; not between two images whose time counts."""
        self._show(words, now=False)

    def _show(self, words: str, now: bool) -> None:
        shell = _shell()
        if shell is None:
            return
        at = time.monotonic()
        if shell.execution_count != self._cell:
            self._cell, self._shown, self._began = shell.execution_count, None, at
        elif not now and at - self._said < EVERY_S:
            return
        self._said = at
        minutes, seconds = divmod(round(at - self._began), 60)
        text = " · ".join(filter(None, [self._rows, words, f"{minutes}:{seconds:02d} min"]))
        from IPython.display import display

        data = {"text/plain": text}
        if self._shown is None:
            self._shown = display(data, raw=True, display_id=True)
        else:
            self._shown.update(data, raw=True)


def _shell():
    """The notebook's shell; None in a run of `make report` and outside of notebooks."""
    if os.environ.get(PROGRESS) or "IPython" not in sys.modules:
        return None
    shell = sys.modules["IPython"].get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


LINE = Line()
