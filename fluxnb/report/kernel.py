"""One notebook in a kernel of its own, through papermill: a fresh process, so a clean CUDA context."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fluxnb import leftovers
from fluxnb.report import import_jsonschema, read_json
from fluxnb.report.zygote import FLAGS, Zygote
from fluxnb.scrub import scrub, scrub_file

KERNEL = "fluxnb-report"


def environment(compiled: Path) -> dict[str, str]:
    """Variables of every kernel's; `compiled` keeps what torch.compile makes, so that the next run needn't wait."""
    # Waiting threads that spin for long get in each other's way where cores are shared: seen to cost a factor of
    # 7 with a second process on two cores. Spinning briefly costs 3 % where they are not.
    return {
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)),
    }


def execute(notebook: Path, target: Path, parameters: dict, root: Path, log: Path, zygote: Zygote, progress) -> dict:
    """Executes a notebook and says how it went; only a kill or Ctrl-C is not caught.

    Args:
        target: where the executed notebook is written.
        root: the folder that it runs in.
        log: takes what the process itself prints (a crash, a C library), instead of the middle of the progress line.
        zygote: forks the kernel.
        progress: a fluxnb.report.console.Progress.

    The result has status ("ok" or "failed"), cells, executed_cells and, of a failure, failed_cell and error; asked and
    found count the rows that it asked for and those that were there.
    """
    papermill = _import_papermill()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # failures are reported here, once
    target.unlink(missing_ok=True)
    with leftovers.folder("kernel") as folder, _temporary(folder), _kernel(folder, log, zygote) as events:
        progress.start(notebook.stem, events)
        error = None
        try:
            papermill.execute_notebook(
                str(notebook),
                str(target),
                parameters=parameters,
                kernel_name=KERNEL,
                language="python",  # a stripped notebook doesn't say
                progress_bar=False,
                cwd=str(root),
                start_timeout=300,  # a busy laptop's first kernel start
            )
        except Exception as caught:  # a failing cell, a dead kernel, one that didn't start
            error = caught
        finally:
            last = progress.stop()
    rows = {"asked": last["done"], "found": last["found"]} if last else {}
    return {"status": "failed" if error else "ok", **_outcome(target, error, log), **rows}


@functools.cache
def _import_papermill():
    """Import papermill, made to write no secrets.

    Also beside xfuser: its wheel (0.7.0) has a package `entrypoints`, which hides the module.
    """
    import entrypoints

    if not hasattr(entrypoints, "get_group_all"):
        file = importlib.metadata.distribution("entrypoints").locate_file("entrypoints.py")
        spec = importlib.util.spec_from_file_location("entrypoints", str(file))
        sys.modules["entrypoints"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    import_jsonschema()
    import papermill
    from papermill.iorw import LocalHandler, papermill_io

    class Scrubbing(LocalHandler):
        def write(self, buf, path):
            super().write(scrub(buf), path)

    papermill_io.register("/", Scrubbing())  # of every absolute path
    return papermill


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Temporary files of this process, such as the one that tells how to reach the kernel, are made in a folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _kernel(folder: Path, log: Path, zygote: Zygote) -> Iterator[Path]:
    """Make a kernel of this very interpreter known to Jupyter, through files in `folder` only.

    Yields the path of the progress file that the kernel finds in FLUXNB_PROGRESS.
    """
    events = folder / "progress.jsonl"
    events.touch()
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True)
    launch = (
        f"import os; log = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644); "
        "os.dup2(log, 1); os.dup2(log, 2); from ipykernel.kernelapp import launch_new_instance as go; go(); "
        "import atexit; atexit._run_exitfuncs(); os._exit(0)"  # taking every module apart takes a second
    )
    kernel = {
        "argv": [sys.executable, *FLAGS, "-c", launch, "-f", "{connection_file}"],
        "display_name": KERNEL,
        "language": "python",
        "env": {"FLUXNB_PROGRESS": str(events), **zygote.environment},
        "metadata": {"kernel_provisioner": {"provisioner_name": KERNEL}},
    }
    zygote.provide(KERNEL)
    (spec / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    try:
        yield events
    finally:
        if before is None:
            del os.environ["JUPYTER_PATH"]
        else:
            os.environ["JUPYTER_PATH"] = before
        if log.exists() and not log.stat().st_size:
            log.unlink()
        scrub_file(log)


def _outcome(executed: Path, error: Exception | None, log: Path) -> dict:
    """How far the notebook got, and, of a failure, the cell and the last line of the error."""
    # Cells are numbered as the report does: code cells only, from 1.
    cells = [c for c in read_json(executed).get("cells", []) if c.get("cell_type") == "code"]
    failed = [n for n, c in enumerate(cells, 1) if any(o["output_type"] == "error" for o in c["outputs"])]
    ended = [n for n, c in enumerate(cells, 1) if c["metadata"].get("papermill", {}).get("status") == "completed"]
    if error is None:
        return {"cells": len(cells), "executed_cells": len(ended)}
    if failed:
        output = next(o for o in cells[failed[0] - 1]["outputs"] if o["output_type"] == "error")
        message = f"{output.get('ename')}: {_plain(output.get('evalue', ''))}"
    else:  # no cell says so: the kernel itself went away, or never came
        failed = ended[-1:]  # papermill calls also the cell completed in which it died
        message = f"{type(error).__name__}: {_plain(str(error)) or 'no message'}"
        if type(error).__name__ == "DeadKernelError":
            seen = f" (see {log.name})" if log.exists() else ""
            message = f"DeadKernelError: the notebook's process died, mostly for lack of memory{seen}"
    return {
        "cells": len(cells),
        "executed_cells": len(set(ended) - set(failed)),
        "failed_cell": failed[0] if failed else None,
        "error": message,
    }


def _plain(text: str) -> str:
    """The first line with anything on it, without terminal colours, at most 300 characters."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
