"""Execute the notebooks of one configuration, each in its own kernel.

Every notebook gets a fresh process (so a clean CUDA context), is written to build/<gpu>/ and is skipped next
time if nothing it depends on has changed. A failing one stays on disk and doesn't stop the others. papermill
is imported only when something has to be executed, and torch never is.
"""

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.report import (
    PAGES,
    build_dir,
    count_rows,
    last_measured,
    read_json,
    read_state,
    report_dir,
    sources,
    write_atomic,
)

KERNEL = "fluxnb-report"
COMPILED = "torch-compile"  # what torch.compile has made, in build/
PACKAGE = Path(__file__).resolve().parents[1]
# What can change a measurement or a report without any file of the project changing.
VERSIONED = (
    "torch diffusers transformers tokenizers safetensors accelerate torchao para-attn triton numpy pandas "
    "pillow matplotlib seaborn papermill ipykernel nvidia-ml-py"
).split()
LINE_EVERY_S = 10.0  # where the progress line can't be updated in place


def run(
    params,
    *,
    provenance: dict | Callable[[], dict],
    only: list[str] | None = None,
    force: bool = False,
    replay: bool = False,
    root: Path = Path("."),
    stream=None,
    jobs: Callable[[list[str]], object] | None = None,
) -> int:
    """Execute the notebooks that changed since their last success; 0 if all of them succeeded, else 1.

    params      fluxnb.params.Params of the configuration
    provenance  what telemetry.provenance(params) says, or a function returning it that is called only if
                something has to be executed; kept with each notebook and in run.json
    only        stems ("05_first_block_cache") or their numbers ("05"); None means all
    force       execute also what hasn't changed
    replay      nothing is measured: a notebook that would have to keeps its page, and run.json stays as it is
    stream      where progress is printed, sys.stdout by default
    jobs        runs the notebooks that are due, by their stems, instead of one after the other here

    Raises UserError before anything starts if a notebook is unknown or lacks a parameter it would be given,
    or if another run of the same configuration is going on.
    """
    root = Path(root).resolve()
    notebooks = _select(sources(root), only) if only else _select(sources(root, params.gpu.count), None)
    for notebook in notebooks:
        check_parameters(notebook, params.for_notebook(notebook.stem))
    build, reports = build_dir(params, root), report_dir(params, root)
    build.mkdir(parents=True, exist_ok=True)
    reports.mkdir(parents=True, exist_ok=True)
    with _only_run(build, params.name):
        shared = _shared_digest(params)
        rows = count_rows(reports / "results.csv")
        prints = {n.stem: fingerprint(n, params, shared=shared) for n in notebooks}
        due = [n for n in notebooks if force or not _unchanged(n.stem, prints[n.stem], build, reports, rows)]
        progress = Progress(notebooks, stream or sys.stdout, build)
        progress.skipped([n.stem for n in notebooks if n not in due])
        if not due:
            return 0
        if callable(provenance):
            provenance = provenance()
        try:
            if jobs:
                jobs([notebook.stem for notebook in due])
                return 1 if any(read_state(build, n.stem).get("status") != "ok" for n in notebooks) else 0
            failed = 0
            for notebook in due:
                failed += _execute(notebook, params, prints[notebook.stem], provenance, root, progress, replay)
            if replay:
                return 1 if failed else 0
        finally:
            progress.close()
            if not replay:
                _write_run_json(provenance, build, reports, root)
    failed = [n.stem for n in notebooks if read_state(build, n.stem).get("status") != "ok"]
    return 1 if failed else 0


def fingerprint(notebook: Path, params, shared: str | None = None) -> str:
    """sha256 of all that an executed notebook depends on.

    That is the source and tags of its cells, the parameters given to it, the gpu and study sections, every
    file of the package (code and embedded weights), the interpreter and the versions of the libraries.
    `shared` is the part that is the same for all notebooks, when it is at hand already.
    """
    cells = _cells(notebook)
    own = [[c.get("cell_type"), _source(c), sorted(c.get("metadata", {}).get("tags", []))] for c in cells]
    values = params.for_notebook(notebook.stem)
    text = json.dumps([own, values, shared or _shared_digest(params)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_parameters(notebook: Path, values: dict) -> None:
    """Raise UserError unless the notebook's parameters cell defines every name in `values`.

    papermill only logs a warning for a name it doesn't find, and the notebook then runs with its default.
    """
    tagged = [c for c in _cells(notebook) if "parameters" in c.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise UserError(
            f"{notebook.name} has no cell tagged 'parameters'; tag its first code cell so that it can be run."
        )
    defined = _assigned_names(_source(tagged[0]), notebook.name)
    unknown = sorted(set(values) - defined)
    if unknown:
        raise UserError(
            f"{notebook.name} is given {', '.join(unknown)}, which its parameters cell doesn't define "
            f"(it defines {', '.join(sorted(defined)) or 'nothing'}); add it there or remove it from params/."
        )


def describe_failure(state: dict) -> str:
    """ "FAILED at cell 5: ValueError: …" from the state of a failed notebook."""
    where = f" at cell {state['failed_cell']}" if state.get("failed_cell") else ""
    return f"FAILED{where}: {state.get('error') or 'unknown error'}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3:07 min, 1:02 h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


# --- what is due -----------------------------------------------------------------------------------------


def _select(notebooks: list[Path], only: list[str] | None) -> list[Path]:
    if not notebooks:
        raise UserError("There is no notebook in notebooks/; run this from the project's own folder.")
    if not only:
        return notebooks
    chosen = set()
    for name in only:
        wanted = Path(name).name.removesuffix(".ipynb")
        found = [n for n in notebooks if n.stem == wanted or n.stem.split("_")[0] == wanted]
        if not found:
            choices = ", ".join(n.stem for n in notebooks)
            raise UserError(f"There is no notebook {name!r}; choose from {choices}.")
        chosen.update(found)
    return [n for n in notebooks if n in chosen]


def _unchanged(stem: str, print_: str, build: Path, reports: Path, rows: dict[str, int]) -> bool:
    state = read_state(build, stem)
    kept = (build / f"{stem}.ipynb", reports / f"{stem}.html", reports / "results.csv", reports / "run.json")
    return (
        state.get("status") == "ok"
        and state.get("fingerprint") == print_
        and all(path.exists() for path in kept)
        # a page must not outlive the rows it was made from
        and rows.get(stem, 0) >= state.get("rows", 0)
    )


def _shared_digest(params) -> str:
    digest = hashlib.sha256()
    resolved = params.resolved()
    sections = {name: resolved.get(name) for name in ("gpu", "study")}
    versions = {name: _version(name) for name in VERSIONED}
    digest.update(json.dumps([sections, versions, sys.version, sys.executable], sort_keys=True, default=str).encode())
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            digest.update(str(path.relative_to(PACKAGE)).encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cells(notebook: Path) -> list[dict]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{notebook.name} can't be read as a notebook ({error}); restore it from git.") from None


def _source(cell: dict) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _assigned_names(source: str, where: str) -> set[str]:
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise UserError(f"The parameters cell of {where} isn't valid Python ({error}); correct it.") from None
    names = set()
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names.update(t.id for t in targets if isinstance(t, ast.Name))
    return names


@contextlib.contextmanager
def _only_run(build: Path, name: str) -> Iterator[None]:
    """Hold the configuration's lock: two runs at once would disturb each other's timings."""
    with open(build / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"Another run of {name} is going on, and two at once would disturb each other's timings; "
                "wait until it has ended or stop it."
            ) from None
        yield


# --- one notebook ----------------------------------------------------------------------------------------


def _execute(
    notebook: Path, params, print_: str, provenance: dict, root: Path, progress: "Progress", replay: bool = False
) -> bool:  # fmt: skip
    """Execute one notebook and record how it went; whether it failed. Only a kill or Ctrl-C leaves it at "running".

    A replay that fails leaves what is known of the notebook as it was.
    """
    papermill = _import_papermill()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # failures are reported here, once
    stem, build = notebook.stem, build_dir(params, root)
    temporary = build / f"{stem}.tmp.ipynb"
    temporary.unlink(missing_ok=True)
    if replay:
        provenance = provenance | {"measured_at": last_measured(report_dir(params, root) / "results.csv", stem)}
    state = {"status": "running", "fingerprint": print_, "started": _now(), "provenance": provenance}
    if not replay:
        _write_json(build / f"{stem}.json", state)
    log = build / f"{stem}.kernel.log"
    start = time.monotonic()
    compiled = build.parent / COMPILED
    with tempfile.TemporaryDirectory(prefix="fluxnb-") as folder, _kernel(Path(folder), log, compiled) as events:
        progress.start(stem, events)
        error = None
        try:
            papermill.execute_notebook(
                str(notebook),
                str(temporary),
                parameters=params.for_notebook(stem),
                kernel_name=KERNEL,
                language="python",  # a stripped notebook doesn't say
                progress_bar=False,
                cwd=str(root),
                start_timeout=300,  # a busy laptop's first kernel start
            )
        except Exception as caught:  # a failing cell, a dead kernel, one that didn't start
            error = caught
        finally:
            progress.stop()
    spent = round(time.monotonic() - start, 2)
    state |= {"seconds": spent, "finished": _now()}
    if replay:  # how long measuring took, and when that was, stays true
        kept = read_json(report_dir(params, root) / PAGES).get(stem, {}).get("state", {})
        state |= {name: kept[name] for name in ("seconds", "finished") if name in kept} | {"provenance": provenance}
    state |= {"status": "failed" if error else "ok", **_outcome(temporary, error, log)}
    state["rows"] = count_rows(report_dir(params, root) / "results.csv").get(stem, 0)
    if not (replay and error):
        _keep(notebook, temporary, build, failed=error is not None)
        _write_json(build / f"{stem}.json", state)
    progress.finished(stem, state | {"seconds": spent})
    return error is not None


def _import_papermill():
    """Import papermill, also beside xfuser: its wheel (0.7.0) has a package `entrypoints`, which hides the module."""
    import entrypoints

    if not hasattr(entrypoints, "get_group_all"):
        file = importlib.metadata.distribution("entrypoints").locate_file("entrypoints.py")
        spec = importlib.util.spec_from_file_location("entrypoints", file)
        sys.modules["entrypoints"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    import papermill

    return papermill


@contextlib.contextmanager
def _kernel(folder: Path, log: Path, compiled: Path) -> Iterator[Path]:
    """Make a kernel of this very interpreter known to Jupyter, through files in `folder` only.

    Yields the path of the progress file that the kernel finds in FLUXNB_PROGRESS. What the process itself
    prints (a crash, a C library) goes to `log` instead of the middle of the progress line. What torch.compile
    makes is kept in `compiled`, so that the next run needn't wait for it again.
    """
    events = folder / "progress.jsonl"
    events.touch()
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True)
    launch = (
        f"import os; log = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644); "
        "os.dup2(log, 1); os.dup2(log, 2); from ipykernel.kernelapp import launch_new_instance as go; go()"
    )
    kernel = {
        "argv": [sys.executable, "-Xfrozen_modules=off", "-c", launch, "-f", "{connection_file}"],
        "display_name": KERNEL,
        "language": "python",
        # Waiting threads that spin for long get in each other's way where cores are shared: seen to cost a factor of
        # 7 with a second process on two cores. Spinning briefly costs 3 % where they are not.
        "env": {
            "FLUXNB_PROGRESS": str(events),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)),
        },
    }
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


def _keep(notebook: Path, temporary: Path, build: Path, failed: bool) -> None:
    """Give the executed notebook its final name and remove the counterpart of an earlier run."""
    if not temporary.exists():  # it failed before papermill wrote anything
        temporary.write_bytes(notebook.read_bytes())
    good, bad = build / f"{notebook.stem}.ipynb", build / f"{notebook.stem}.failed.ipynb"
    os.replace(temporary, bad if failed else good)
    (good if failed else bad).unlink(missing_ok=True)


def _plain(text: str) -> str:
    """The first line with anything on it, without terminal colours, at most 300 characters."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def _write_run_json(provenance: dict, build: Path, reports: Path, root: Path) -> None:
    """run.json: the provenance of this run, and what is known of each notebook's last execution."""
    rows = count_rows(reports / "results.csv")
    kept = ("status", "error", "failed_cell", "seconds", "cells", "executed_cells", "started", "finished")
    notebooks = {}
    for source in sources(root):
        state = read_state(build, source.stem)
        if state:
            notebooks[source.stem] = {name: state[name] for name in kept if name in state}
            notebooks[source.stem]["rows"] = rows.get(source.stem, 0)
            notebooks[source.stem]["commit"] = state.get("provenance", {}).get("commit")
    _write_json(reports / "run.json", {**provenance, "notebooks": notebooks})


def _write_json(path: Path, value: dict) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- progress --------------------------------------------------------------------------------------------


class Progress:
    """Prints which notebook of how many, which row of how many, time elapsed and time left.

    One line that updates on a terminal; elsewhere a line per start and end, and at most one per 10 s between.
    The kernel's side appends JSON lines such as {"notebook": "05_…", "done": 3, "total": 12, "label": "…"}.
    """

    def __init__(self, notebooks: list[Path], stream, build: Path | None = None):
        self.stems = [n.stem for n in notebooks]
        self.stream = stream
        self.live = bool(getattr(stream, "isatty", lambda: False)())
        # What a notebook took last time is the only thing known of those still to come.
        states = {s: read_state(build, s) if build else {} for s in self.stems}
        self.expected = {s: state.get("seconds") for s, state in states.items()}
        self.pending = list(self.stems)
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._width = 0

    def skipped(self, stems: list[str]) -> None:
        """Say what needn't be executed."""
        self.pending = [s for s in self.pending if s not in stems]
        if stems:
            self._line(f"{len(stems)} of {len(self.stems)} notebooks unchanged since their last run")

    def start(self, stem: str, events: Path) -> None:
        """Begin to follow the progress file of one notebook."""
        self.stem, self.events, self.began = stem, events, time.monotonic()
        self.pending = [s for s in self.pending if s != stem]
        self.first = self.last = None  # (time, event) of the first and the newest progress event
        self._offset = 0
        self._end.clear()
        if not self.live:
            self._line(f"{self._which(stem)} started")
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following. Called also when the notebook was interrupted."""
        self._end.set()
        if self._thread:
            self._thread.join()
            self._thread = None
        self._read()

    def finished(self, stem: str, state: dict) -> None:
        """Print how a notebook ended."""
        took = duration(state["seconds"])
        if state["status"] == "ok":
            rows = f", {state['rows']} rows" if state.get("rows") else ""
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
            parts.append(f"row {min(event['done'] + 1, event['total'])} of {event['total']}")
            if event.get("label"):
                parts.append(str(event["label"]))
        parts.append(f"{duration(now - self.began)} so far")
        left = self._left(now)
        if left:
            parts.append(left)
        return " · ".join(parts)

    def _left(self, now: float) -> str | None:
        """Time left: from the rate of rows in this notebook, and for the others from their last execution."""
        remaining = None
        if self.first and self.last and self.last[1]["done"] > self.first[1]["done"]:
            # counted from the first event, because rows resumed from an earlier run take no time
            rate = (self.last[0] - self.first[0]) / (self.last[1]["done"] - self.first[1]["done"])
            remaining = rate * (self.last[1]["total"] - self.last[1]["done"]) - (now - self.last[0])
        elif self.expected.get(self.stem):
            remaining = self.expected[self.stem] - (now - self.began)
        if remaining is None:
            return None
        remaining = max(remaining, 0.0)
        others = [self.expected.get(s) for s in self.pending]
        if all(others):  # also when there are none
            return f"about {duration(remaining + sum(others))} left"
        return f"about {duration(remaining)} left in this notebook"

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
        except (OSError, AttributeError):  # removed with the kernel's folder, or nothing was started
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
                event["done"], event["total"] = int(event["done"]), int(event["total"])
            except (ValueError, TypeError, KeyError):
                continue
            self.last = (time.monotonic(), event)
            self.first = self.first or self.last

    def _update(self, text: str) -> None:
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 80
        text = text[: max(columns - 1, 20)]
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)

    def _line(self, text: str) -> None:
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self.stream.write(text + "\n")
        self.stream.flush()
