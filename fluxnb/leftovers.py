"""What a killed process leaves: the next run finds and removes it. TERM and HUP leave nothing, as Ctrl-C does."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: what is left stays there
    fcntl = None

PREFIX, LOCK = "fluxnb-", ".lock"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
YOUNG_S = 60.0  # an empty temporary folder of this age may be about to be locked


@contextlib.contextmanager
def folder(what: str) -> Iterator[Path]:
    """A temporary folder, which `clean` removes where this process is killed."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{what}-") as name, _held(Path(name)):
        yield Path(name)


def clean(*places: Path) -> None:
    """Removes temporary folders that nobody holds, and half-written files in `places` whose process is no more.

    A folder that only has such a name, say a clone of the project, has no lock, and stays.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            about = path.lstat()
            if not path.is_dir() or path.is_symlink() or about.st_uid != os.getuid():
                continue
            if (path / LOCK).is_file():
                with _held(path):
                    shutil.rmtree(path, ignore_errors=True)
            elif time.time() - about.st_mtime > YOUNG_S:
                path.rmdir()  # which only an empty one lets happen: killed before it was locked
    for path in (path for place in places for path in place.glob(".*.tmp")):
        if (match := re.search(r"\.(\d+)\.tmp$", path.name)) and not _lives(int(match[1])):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Meanwhile TERM and HUP end the process as Ctrl-C does: by KeyboardInterrupt, which has the signal's number."""

    def interrupt(number, _):
        for each in before:  # once is enough: what is under way is brought to an end
            signal.signal(each, signal.SIG_IGN)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # which tells of the kernel that ended with it
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # others are sent no signals; nohup's are not taken back
        before = {each: signal.SIG_DFL for each in SIGNALS if signal.getsignal(each) is signal.SIG_DFL}
    for each in before:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Meanwhile neither Ctrl-C nor TERM nor HUP ends what has to come to its end, and soon does."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, signal.SIG_IGN) or signal.SIG_DFL for each in (signal.SIGINT, *SIGNALS)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def ends_with(caller: int, before_that=lambda: None) -> None:
    """Ends this process, by TERM, when its parent `caller` is gone; looks from a thread."""

    def follow() -> None:
        while os.getppid() == caller:
            time.sleep(0.5)
        before_that()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A folder's lock. Raises OSError where another process has it."""
    with open(path / LOCK, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
