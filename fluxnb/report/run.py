"""Execute the notebooks of one configuration that have changed, each in its own kernel.

An executed notebook is kept in build/ and is skipped next time if nothing it depends on has changed. A failing one
stays on disk and doesn't stop the others. papermill is imported only when something has to be executed, and torch
never is.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fluxnb import notebooks
from fluxnb.errors import UserError
from fluxnb.measure.identity import HOST, THREADS
from fluxnb.report import (
    PAGES,
    RUN,
    Place,
    count_rows,
    durations,
    machine_of,
    read_json,
    read_state,
    reference,
    tidy,
    write_json,
)
from fluxnb.report.console import Progress

COMPILED = "torch-compile"  # what torch.compile has made, in build/
LIVE_S = 20.0  # between two looks at whether there are new rows
PACKAGE = Path(__file__).resolve().parents[1]
# What can change a measurement or a report without any file of the project changing.
VERSIONED = (
    "torch diffusers transformers tokenizers safetensors accelerate torchao para-attn triton numpy pandas "
    "pillow matplotlib seaborn papermill ipykernel nvidia-ml-py"
).split()
VARIABLES = (HOST, *THREADS)  # and without any version changing


def run(
    params,
    place: Place,
    *,
    prepare: Callable[[], dict],
    only: list[str] | None = None,
    force: bool = False,
    stream=None,
    jobs: Callable[[list[str], Callable[[str], None]], bool] | None = None,
    after: Callable[[str], Path] | None = None,
) -> int:
    """Execute the notebooks that changed since their last success; 0 if all of them succeeded, else 1.

    What the recommendation rests on comes first, and once more after the others: it reads the rows of all of them, and
    finds its own.

    params   fluxnb.params.Params of the configuration
    place    where it writes; the committed reference means a replay: nothing is measured, all are executed, one that
             would have to measure keeps its page, and run.json stays as it is
    prepare  called once, and only if something has to be executed, before anything is: raises UserError if something
             is missing, and gives the provenance, which is kept with each notebook and in run.json
    only     stems ("05_first_block_cache") or their numbers ("05"); None means all
    force    execute also what hasn't changed
    stream   where progress is printed, sys.stdout by default
    jobs     may run the notebooks that are due, by their stems, instead of one after the other, and call what it is
             given with each that has ended; says whether it did
    after    called with the stem of a notebook that has ended while others are still to come, and on a GPU while rows
             of the first are added; gives what to read

    Raises UserError before anything starts if a notebook is unknown or lacks a parameter it would be given,
    or if another run of the same configuration is going on.
    """
    chosen = _select(notebooks.sources(place.root, 1 if only else place.gpus, place.model), only)
    random = bool(params.model and params.model.random and not only)
    chosen = [source for source in chosen if not (random and source.stem in notebooks.JUDGING)]
    chosen.sort(key=lambda n: n.stem != notebooks.first(place.gpus))
    for notebook in chosen:
        check_parameters(notebook, params.for_notebook(notebook.stem))
    place.build.mkdir(parents=True, exist_ok=True)
    with only_run(place):
        tidy(place)
        shared, rows = _shared_digest(params), count_rows(place.table)
        prints = {n.stem: fingerprint(n, params, shared=shared) for n in chosen}
        always = force or not place.own
        due = [n for n in chosen if always or not _unchanged(n.stem, prints[n.stem], place, rows)]
        due += [n for n in chosen if n not in due and read_state(place.build, n.stem).get("early")]
        early = [n for n in due[:-1] if place.own and n.stem == notebooks.first(place.gpus)]
        before = {n.stem: _before(read_state(place.build, n.stem), prints[n.stem]) for n in chosen}
        progress = Progress([n.stem for n in chosen], stream or sys.stdout, before)
        progress.skipped([n.stem for n in chosen if n not in due])
        if place.model and due:
            judging = notebooks.JUDGING if random else ()
            left_out = ", ".join((*notebooks.OF_EMBEDDED, *judging))
            what = "what is about the study's own models" + " or judges images" * random
            progress.note(f"about {params.model.name}, so without {what}: {left_out}")
        if not due:
            return 0
        from fluxnb.report import kernel
        from fluxnb.report.zygote import Zygote

        failed = 0
        with Zygote(place.root, kernel.environment(place.root / "build" / COMPILED)) as zygote:
            provenance = prepare()  # while it imports
            place.reports.mkdir(parents=True, exist_ok=True)
            if place.own:
                _say_how_long([n.stem for n in due], params, place, provenance, rows, progress)

            def show(stem: str) -> None:
                if place.own:
                    _write_run_json(provenance, place)
                if after and len(due) > 1:
                    try:
                        said = f"read what there is so far: {after(stem)}"
                    except UserError as error:  # a page that can't be made stops no measuring
                        said = str(error)
                    progress.once(said)

            try:
                if jobs and jobs([n.stem for n in due], show):
                    if early:
                        jobs([n.stem for n in early], show)
                else:
                    if trouble := zygote.trouble():
                        progress.note(f"every notebook imports for itself: {trouble}")
                    for notebook, before_others in [*((n, n in early) for n in due), *((n, False) for n in early)]:
                        stem = notebook.stem
                        if (
                            before_others
                            or read_state(place.build, stem).get("status") == "ok"
                            or notebook not in early
                        ):
                            given = (params, prints[stem], provenance, place, zygote, progress)
                            live = before_others and (provenance.get("machine") or {}).get("gpus")
                            with _shown_live(place, partial(show, stem)) if live else contextlib.nullcontext():
                                failed += _execute(notebook, *given, early=before_others)
                            show(stem)
            finally:
                progress.close()
                if place.own:
                    _write_run_json(provenance, place)
    if place.own:
        failed = sum(read_state(place.build, n.stem).get("status") != "ok" for n in chosen)
    return 1 if failed else 0


def fingerprint(notebook: Path, params, shared: str | None = None) -> str:
    """sha256 of all that an executed notebook depends on.

    That is the source and tags of its cells, the parameters given to it and left out, the gpu and study sections, every
    file of the package (code and embedded weights), the interpreter, the versions of the libraries and the name that
    the user gives to the machine. `shared` is the part that is the same for all notebooks, when it is at hand already.
    """
    cells = _cells(notebook)
    own = [[c.get("cell_type"), _source(c), sorted(c.get("metadata", {}).get("tags", []))] for c in cells]
    values = params.notebooks.get(notebook.stem, {})
    said = [own, values, params.lacks(notebook.stem), shared or _shared_digest(params)]
    text = json.dumps(said, sort_keys=True, default=str)
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


# --- what is due -----------------------------------------------------------------------------------------


def _select(found: list[Path], only: list[str] | None) -> list[Path]:
    if not found:
        raise UserError("There is no notebook in notebooks/; run this from the project's own folder.")
    if not only:
        return found
    chosen = set()
    for name in only:
        wanted = Path(name).name.removesuffix(".ipynb")
        fitting = [n for n in found if n.stem == wanted or n.stem.split("_")[0] == wanted]
        if not fitting:
            choices = ", ".join(n.stem for n in found)
            raise UserError(f"There is no notebook {name!r}; choose from {choices}.")
        chosen.update(fitting)
    return [n for n in found if n in chosen]


def _unchanged(stem: str, print_: str, place: Place, rows: dict[str, int]) -> bool:
    state = read_state(place.build, stem)
    kept = (place.build / f"{stem}.ipynb", place.reports / f"{stem}.html", place.table, place.reports / RUN)
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
    sections = {name: resolved.get(name) for name in ("gpu", "study", "model")}
    versions = {name: _version(name) for name in VERSIONED}
    variables = {name: os.environ.get(name) or None for name in VARIABLES}
    facts = [sections, versions, variables, sys.version, sys.executable]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
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
    names: set[str] = set()
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names.update(t.id for t in targets if isinstance(t, ast.Name))
    return names


@contextlib.contextmanager
def only_run(place: Place) -> Iterator[None]:
    """Hold the configuration's lock: two runs at once would disturb each other's timings."""
    with open(place.build / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"Another run of {place.title} is going on, and two at once would disturb each other's timings; "
                "wait until it has ended or stop it."
            ) from None
        yield


# --- one notebook ----------------------------------------------------------------------------------------


def _execute(
    notebook: Path, params, print_: str, provenance: dict, place: Place, zygote, progress: Progress, early: bool
) -> bool:
    """Execute one notebook and record how it went; whether it failed. A kill alone leaves it at "running".

    A replay that fails leaves what is known of the notebook as it was. One that is `early` has to be executed again.
    """
    from fluxnb.report import kernel

    stem, build, replay = notebook.stem, place.build, not place.own
    state: dict = {"status": "running", "fingerprint": print_, "started": _now(), "provenance": provenance}
    state |= {"thorough": params.thorough, "left_out": params.lacks(stem)}
    before = read_state(build, stem)
    earlier = durations.carried(before, place, stem)
    if not replay:
        write_json(build / f"{stem}.json", state | {"before": _last(before), "measuring_s": earlier})
    start, temporary = time.monotonic(), build / f"{stem}.tmp.ipynb"
    given = {"log": build / f"{stem}.kernel.log", "zygote": zygote, "progress": progress}
    try:
        went = kernel.execute(notebook, temporary, params.for_notebook(stem), place.root, **given)
    except BaseException:  # Ctrl-C, TERM or HUP
        temporary.unlink(missing_ok=True)
        if not replay:
            write_json(build / f"{stem}.json", read_state(build, stem) | {"status": "interrupted"})
        raise
    spent, failed = round(time.monotonic() - start, 2), went["status"] == "failed"
    state |= {"seconds": spent, "finished": _now()}
    if replay:  # how long measuring took, and when that was, stays true
        kept = read_json(place.reports / PAGES).get(stem, {}).get("state", {})
        state |= {name: kept[name] for name in ("seconds", "finished") if name in kept}
    state |= {**went, "rows": count_rows(place.table).get(stem, 0)}
    state |= {"measuring_s": durations.measuring(state, before, earlier)} | ({"early": True} if early else {})
    if before.get("early") and not (failed or replay):  # the page is of both
        state["seconds"] = round(spent + before["seconds"], 2)
    if not (replay and failed):
        _keep(notebook, temporary, build, failed)
        write_json(build / f"{stem}.json", state)
    if not (replay or failed):
        durations.record(place, stem, state)
    progress.finished(stem, state | {"seconds": spent})
    return failed


@contextlib.contextmanager
def _shown_live(place: Place, show: Callable[[], None]) -> Iterator[None]:
    """Show what there is whenever rows have been added, in a thread; not on a CPU, whose timings it would disturb."""
    end = threading.Event()

    def follow() -> None:
        shown = count_rows(place.table)
        while not end.wait(LIVE_S):
            if (now := count_rows(place.table)) != shown:
                shown = now
                show()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _say_how_long(stems: list[str], params, place: Place, provenance: dict, rows: dict, progress: Progress) -> None:
    folders, here = [place.reports, reference(params, place.root).reports], machine_of(provenance)
    records = durations.known(stems, folders, params)
    for stem, took in records.items():  # of another machine they say nothing of what is left
        if took["machine"] == here and not took.get("most"):
            progress.before.setdefault(stem, {})["seconds"] = took["seconds"]
    progress.note(durations.sentence(stems, records, here, sum(rows.get(stem, 0) for stem in stems)))


def _last(state: dict) -> dict:
    """What is kept of a notebook's last complete run while it is run again."""
    if state.get("status") != "ok":
        return state.get("before", {})
    return {name: state[name] for name in ("fingerprint", "seconds", "asked", "found") if name in state}


def _before(state: dict, print_: str) -> dict:
    """What the progress line may go by: rows in all of the very same, seconds of a run that measured every row."""
    last = _last(state)
    facts = {"rows": last.get("asked")} if last.get("fingerprint") == print_ else {}
    return facts | ({} if last.get("found") else {"seconds": last.get("seconds")})


def _keep(notebook: Path, temporary: Path, build: Path, failed: bool) -> None:
    """Give the executed notebook its final name and remove the counterpart of an earlier run."""
    if not temporary.exists():  # it failed before papermill wrote anything
        temporary.write_bytes(notebook.read_bytes())
    good, bad = build / f"{notebook.stem}.ipynb", build / f"{notebook.stem}.failed.ipynb"
    os.replace(temporary, bad if failed else good)
    (good if failed else bad).unlink(missing_ok=True)


def _write_run_json(provenance: dict, place: Place) -> None:
    """run.json: the provenance of this run, and what is known of each notebook's last execution."""
    rows = count_rows(place.table)
    kept = ("status", "error", "failed_cell", "seconds", "cells", "executed_cells", "started", "finished")
    went = {}
    for source in notebooks.sources(place.root, model=place.model):
        state = read_state(place.build, source.stem)
        if state:
            went[source.stem] = {name: state[name] for name in kept if name in state}
            went[source.stem]["rows"] = rows.get(source.stem, 0)
            went[source.stem]["commit"] = state.get("provenance", {}).get("commit")
    write_json(place.reports / RUN, {**provenance, "notebooks": went})


def _now() -> str:  # as fluxnb.study.results.now, whose import would load PyTorch
    return datetime.now(UTC).isoformat(timespec="seconds")
