"""Which machine this is, and what kind: a name that no other has, and a digest of its specification."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.measure import telemetry

try:
    import fcntl
except ImportError:  # Windows has no flock: one process at a time there
    fcntl = None

HOST = "FLUXNB_HOST"  # the name that a user gives to the machine: make report HOST=name
THREADS = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS")  # variables: on how many threads PyTorch runs
HOSTS = "hosts.json"  # kind -> the name made up for the machine of this checkout that is of this kind


def kind() -> str:
    """A digest of the hardware (12 hex digits): CPU, threads in use, memory, GPUs. What may be compared.

    What may change between two runs on one machine (driver, clocks, power limit) is not in it, nor is
    anything that NVML alone knows.
    """
    facts = telemetry.machine()
    same = [facts["cpu"], facts["usable_threads"], facts["ram_gib"], facts["os"]]
    same += [[g["name"], g["compute_capability"], round(g["memory_gib"])] for g in facts["gpus"]]
    given = {name: os.environ.get(name) for name in THREADS}  # as many as are usable: as if nothing were said
    if fewer := {name: said for name, said in given.items() if said and said != str(facts["usable_threads"])}:
        same.append(fewer)
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]


def host(folder: Path) -> str:
    """A name that no other machine has, 12 hex digits or what the user says with HOST=name.

    A digest of its GPUs' UUIDs and of its kind; without GPUs made once at random and kept in `folder`, one for each
    kind of machine that works there: a machine-id would not do, since clones of an image share it and containers have
    none. So a machine of which a job has other shares from day to day has a name for each.
    Raises UserError for a name that can't be one.
    """
    if given := os.environ.get(HOST):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", given):
            raise UserError(
                f"HOST={given!r} can't be a machine's name: use up to 63 letters, digits, dots, dashes, underscores."
            )
        return given
    if uuids := telemetry.gpu_uuids():
        return hashlib.sha256(json.dumps([*sorted(uuids), kind()]).encode()).hexdigest()[:12]
    path = (folder / HOSTS).resolve()  # the folder of a job has a link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            return _made_up(path, kind())
    except OSError as error:
        raise UserError(
            f"This machine's name cannot be kept in {path}: {error.strerror}; make the folder writable, or give "
            "the machine a name with HOST=name."
        ) from None


@contextmanager
def _alone(folder: Path):
    """No other process makes up a name meanwhile: two notebooks that begin at once have one machine."""
    if fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _made_up(path: Path, of: str) -> str:
    """The random name kept in a file for a kind of machine; made, and kept, when there is none."""
    known = {}
    with suppress(FileNotFoundError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) else {}
    if not isinstance(known.get(of), str):
        known[of] = secrets.token_hex(6)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    return known[of]
