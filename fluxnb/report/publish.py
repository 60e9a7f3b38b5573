"""On top of the reports: makes the pages and indexes of a configuration, and what lies above all of them.

A user's own run is published below reports/own/, the committed reference beside it; the one is never written by the
other's commands.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fluxnb import params as parameters
from fluxnb.errors import UserError
from fluxnb.report import (
    PAGES,
    RUN,
    TABLE,
    Place,
    copy,
    count_rows,
    durations,
    own,
    read_json,
    reference,
    write_atomic,
    write_changed,
)
from fluxnb.report.pages import Page, read, remember, write_remembered

INDEX, EXPLORER, LEDGER, PROGRESS = "index.html", "explorer.html", "ledger.html", "progress.md"
GLOSSARY, LIMITS = "glossary.html", "limits.html"
STAMP = ".published"  # in build/<gpu>/: a digest of what the pages were made from


def report(chosen, root: Path, only=None, force: bool = False, replay: bool = False, launch: str = "here") -> int:
    """`make report`: runs the notebooks that changed and publishes what is new; 0, or 1 if one failed.

    Args:
        chosen: fluxnb.params.Params of the configuration.
        only, force: see fluxnb.report.run.run.
        replay: makes the pages of the committed reference anew from its rows, on any machine.
        launch: one of fluxnb.report.sweep.LAUNCHES.
    """
    from fluxnb.report.run import run

    if replay and chosen.model:
        raise UserError("The reference is about the study's own models: leave MODEL out, or REPLAY.")
    place = reference(chosen, root) if replay else own(chosen, root)
    if replay:
        _replay(place)
        chosen = _as_committed(chosen, place)
    if force:
        os.environ["FLUXNB_FORCE"] = "1"
        os.environ["FLUXNB_AFRESH"] = "0" if replay else str(sum(count_rows(place.table).values()))
    status = run(
        chosen,
        place,
        prepare=lambda: _prepare(chosen, place, force, launch),
        only=only,
        force=force,
        jobs=None if replay else lambda stems, ended: _as_jobs(chosen, place, stems, force, launch, ended),
        after=None if replay else lambda stem: publish_so_far(place, stem),
    )
    if not _is_published(place):
        publish(place)
    if chosen.model:
        from fluxnb.report import ending

        print(ending.words(place, chosen.model.name))
    print(f"read it: {place.reports / INDEX}")
    return status


def render(chosen, root: Path) -> Path:
    """`make render`: a user's own pages again, from the notebooks last run; the path of their index."""
    place = own(chosen, root)
    if not any(place.build.glob("[0-9]*.ipynb")):
        raise UserError(f"No notebook of {place.title} has been executed yet; run '{_command(place)}' first.")
    return publish(place)[-1]


def site(root: Path) -> Path:
    """`make site`: indexes, progress files, front page, ledger, README's tables and recipes from what is committed."""
    from fluxnb.report import analysis, catalogue, readme, recipes, unrun
    from fluxnb.report.configurations import configurations

    for found in configurations(root):
        place = Place(found.name, 1, root, root / "build" / found.name / "reference", found.folder, own=False)
        _mark_earlier(place, found.pages)
        _lead_to_what_is_there(place, found.pages)
        _write_explorer(place)
        _dress(place, found.pages)
        _write_index(place, found.pages)
        _write_progress(place, found.pages)
    readme.write(root)
    recipes.write(root)
    catalogue.write(root)
    unrun.write(root)
    with suppress(UserError):  # nothing to set side by side yet
        analysis.write(root, [])
    if (root / "reports" / "own").is_dir():
        front(root, own=True)
    for_programs(root)
    return front(root)[0]


def for_programs(root: Path) -> None:
    """Every row as data, what changed since, and what others contributed."""
    from fluxnb.report import contributed, data, history
    from fluxnb.report.configurations import configurations

    found = configurations(root)
    data.write(root, found)
    history.write(root / "reports", found)
    contributed.write(root, found)


def merge(root: Path, path: Path) -> Path:
    """Takes in what somebody else has measured, as theirs; the page that shows it beside ours."""
    from fluxnb.report import contributed
    from fluxnb.report.configurations import configurations

    found = configurations(root)
    new = contributed.merge(root, path, found)
    print(contributed.sentence(root / "reports", found) if new else "It is here already; nothing was changed.")
    for_programs(root)
    front(root)
    return root / "reports" / contributed.FOLDER / contributed.PAGE


def to_reference(chosen, root: Path) -> Path:
    """`make reference`: takes a user's own run over into the committed reference; the path of its index."""
    from fluxnb.report import history
    from fluxnb.report.configurations import configurations
    from fluxnb.study.results import Results

    if chosen.model:
        raise UserError("The reference is about the study's own models: leave MODEL out.")
    mine, theirs = own(chosen, root), reference(chosen, root)
    if not mine.table.is_file():
        raise UserError(f"There is no run of yours to take over: run 'make report GPU={mine.gpu}' first.")
    theirs.reports.mkdir(parents=True, exist_ok=True)
    Results(theirs.table).merge(mine.table)
    kept = read_json(mine.reports / PAGES)
    for name in (*(f"{stem}.html" for stem in kept), RUN):
        if (mine.reports / name).is_file():
            copy(mine.reports / name, theirs.reports / name)
    _write_explorer(theirs, mine.reports / EXPLORER)
    write_remembered(read_json(theirs.reports / PAGES) | kept, theirs)
    durations.merge(mine.reports, theirs.reports)
    history.keep(root / "reports", configurations(root))
    site(root)
    return theirs.reports / INDEX


# --- one configuration ------------------------------------------------------------------------------------


def publish(place: Place, max_page_mb: float | None = None) -> list[Path]:
    """Renders every executed notebook, the explorer, the index and the front page; the paths written, index last.

    Needs no GPU and executes nothing. All pages that can be rendered are, then a UserError names those that
    can't: an image without a description, something loaded from elsewhere, a page over `max_page_mb` MB. The
    older version of such a page is removed, so that it isn't taken for the new one.
    """
    before, found = _made_from(place), read(place)
    written, problems = _render_pages(place, found, max_page_mb)
    remember(found, place)
    _mark_earlier(place, found)
    _write_explorer(place)
    index = _write_index(place, found)
    _write_progress(place, found)
    front(place.root, place.own)
    if problems:
        raise UserError(" ".join(problems))
    write_atomic(place.build / STAMP, before)
    return [*written, index]


def publish_so_far(place: Place, stem: str) -> Path:
    """The page of a notebook that has just ended and the index, in the middle of a run; the path of the index."""
    found = read(place)
    _render_pages(place, found, None, only=stem)
    remember(found, place)
    if not (_top(place.root, True) / INDEX).is_file():
        front(place.root, own=True)
    _write_progress(place, found)
    return _write_index(place, found)


def _render_pages(
    place: Place, found: list[Page], max_page_mb: float | None, only: str = ""
) -> tuple[list[Path], list[str]]:
    from fluxnb.report.audit import MAX_PAGE_MB
    from fluxnb.report.render import page_html
    from fluxnb.report.tables import dress

    run, rows, written, problems = read_json(place.reports / RUN), _all_rows(place), [], []
    for page, previous, following in zip(found, [None, *found], [*found[1:], None], strict=False):
        target = place.reports / page.href
        if page.notebook is None or (only not in ("", page.stem) and target.is_file()):
            continue
        try:
            text = page_html(page, run, place.title, place.root, (previous, following), max_page_mb or MAX_PAGE_MB)
        except UserError as error:
            page.status, page.problem = "unrendered", str(error)
            problems.append(str(error))
            target.unlink(missing_ok=True)
            continue
        write_changed(target, dress(text, rows, _measures(place, page), page.stem))
        written.append(target)
    return written, problems


def _mark_earlier(place: Place, found: list[Page]) -> None:
    from fluxnb.report import earlier

    earlier.mark(place, found, _relative(_top(place.root, False) / LEDGER, place.reports))


def _lead_to_what_is_there(place: Place, found: list[Page]) -> None:
    """Pages made while their neighbours had pages lead to the neighbours' lines in the index where those are gone."""
    gone = {f'href="{page.href}"': f'href="{page.link}"' for page in found if page.link != page.href}
    for path in (place.reports / page.href for page in found if page.link == page.href):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            for old, new in gone.items():
                text = text.replace(old, new)
            write_changed(path, text)


def _dress(place: Place, found: list[Page]) -> None:
    """Pages that stand already get today's style and tables."""
    from fluxnb.report.render import anew

    rows = _all_rows(place)
    for path, command, stem in [
        *((place.reports / page.href, _measures(place, page), page.stem) for page in found if page.link == page.href),
        (place.reports / EXPLORER, "", ""),
    ]:
        if path.is_file():
            write_changed(path, anew(path.read_text(encoding="utf-8"), rows, command, stem))


def _write_index(place: Place, found: list[Page]) -> Path:
    from fluxnb.report import ending
    from fluxnb.report.audit import check_page
    from fluxnb.report.index import index_html

    within = place.reports.relative_to(_top(place.root, place.own))
    theirs, reference = _top(place.root, False) / within, None
    if place.own and not place.model and (theirs / TABLE).is_file():
        reference = (_relative(theirs, place.reports), {path.name for path in theirs.glob("*.html")})
    text = index_html(
        found,
        read_json(place.reports / RUN),
        place.title,
        above=f"{'../' * len(within.parts)}{INDEX}",
        explorer=EXPLORER if (place.reports / EXPLORER).is_file() else None,
        model=place.model,
        reference=reference,
        rows=_rows(place),
        answer=ending.blocks(place),
        command=_command(place) if place.own else "",
    )
    check_page(text, INDEX)
    write_changed(place.reports / INDEX, text)
    return place.reports / INDEX


def _write_explorer(place: Place, *others: Path) -> None:
    """explorer.html: images that aren't here any more are those of other explorers, or of the one that is there."""
    from fluxnb.report.audit import check_page
    from fluxnb.report.explorer import earlier, explorer_html
    from fluxnb.study import kept
    from fluxnb.study.results import Results

    rows = Results(place.table).rows() if place.table.is_file() else []
    pages = [path for path in (*others, place.reports / EXPLORER) if path.is_file()]
    before = earlier([path.read_text(encoding="utf-8") for path in pages], rows)
    crumbs = [(INDEX, f"fluxnb {place.title}"), (EXPLORER, "Explorer")]
    text = explorer_html(place.title, [r for r in rows if r.ok], kept.every(place.images), crumbs, before)
    if text is not None:
        check_page(text, EXPLORER)
        write_changed(place.reports / EXPLORER, text)


def _write_progress(place: Place, found: list[Page]) -> None:
    from fluxnb.report.progress import progress_md

    if not place.model:  # the documents are about the study's own
        write_changed(place.reports / PROGRESS, progress_md(place.title, _rows(place), found, _several(place)))


def _all_rows(place: Place) -> list:
    from fluxnb.study.results import Results

    return Results(place.table).rows() if place.table.is_file() else []


def _rows(place: Place) -> list:
    """The rows that a reader of its pages finds there."""
    from fluxnb.findings import ledger

    return ledger.latest(_all_rows(place))


# --- above all configurations -----------------------------------------------------------------------------


def front(root: Path, own: bool = False) -> list[Path]:
    """The front page of the committed reference and what lies beside it, or the front page of a user's own runs."""
    from fluxnb.report import front as contents
    from fluxnb.report.audit import check_page
    from fluxnb.report.configurations import configurations
    from fluxnb.report.render import render_template

    folder, found = _top(root, own), configurations(root, own)
    if not found and not own:
        return []
    crumbs = [(INDEX, "fluxnb, own runs" if own else "fluxnb"), (f"../{LEDGER}" if own else LEDGER, "Ledger of claims")]
    if own:
        pages = {INDEX: ("site.html.j2", contents.front(folder, found, configurations(root)))}
    else:
        from fluxnb.report import catalogue, contributed, ledger  # every technique is imported there

        others = {"reproductions": contributed.sentence(folder, found)}
        pages = {
            INDEX: ("front.html.j2", contents.site(root, folder, found) | others),
            LEDGER: ("ledger.html.j2", ledger.page(found, folder) | others),
            GLOSSARY: ("blocks.html.j2", catalogue.page()),
            LIMITS: ("blocks.html.j2", contents.limits(found)),
        }
    for name, (template, values) in pages.items():
        here = [(name, values["title"])] if "title" in values else []
        text = render_template(template, name, [*crumbs, *here], **values)
        check_page(text, name)
        write_changed(folder / name, text)
    return [folder / name for name in pages]


# --- running ----------------------------------------------------------------------------------------------


def _prepare(chosen, place: Place, force: bool, launch: str) -> dict:
    """Checks what is only worth checking when something will be executed; gives the provenance."""
    from fluxnb.measure import telemetry
    from fluxnb.models import pipelines
    from fluxnb.report import preflight
    from fluxnb.study.results import Results

    Results(place.table).rows()  # a damaged table is said before anything starts
    if place.own:
        if launch == "here":  # a job looks by itself what it was given
            name, count = parameters.detect_gpu()
            parameters.check_gpu(chosen, name, force=force, detected_count=count)
            if not force:
                preflight.check_memory(chosen)
        for model in [*chosen.study.models, *(chosen.study.distilled or [])]:
            pipelines.check(model)
        if chosen.model:
            preflight.check_download(chosen.model.name)
    return telemetry.provenance(chosen, place.root)


def _as_jobs(chosen, place: Place, stems: list[str], force: bool, launch: str, ended) -> bool:
    """Runs notebooks side by side where there is room for several; whether there is."""
    from fluxnb.report import sweep

    if launch == "here" and sweep.places(chosen) == [None]:
        return False
    sweep.sweep(chosen, place, stems, launch, force, ended=ended)
    return True


def _replay(place: Place) -> None:
    from fluxnb.measure import telemetry

    if not (place.reports / RUN).is_file():
        raise UserError(
            f"There is no committed reference for GPU={place.gpu}, so there is nothing to replay: measure on its GPU "
            "and take that over with `make reference` first."
        )
    os.environ[telemetry.REPLAY] = str(place.reports / RUN)


def _as_committed(chosen, place: Place):
    """The parameters that the committed pages were made with: of a thorough run where one of them was."""
    if chosen.thorough or not any(page["state"].get("thorough") for page in read_json(place.reports / PAGES).values()):
        return chosen
    os.environ[parameters.THOROUGH] = "1"
    return parameters.chosen(chosen.name)


def _is_published(place: Place) -> bool:
    """Whether the pages were made from what there is now."""
    try:
        stamp = (place.build / STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    return stamp == _made_from(place) and (place.reports / INDEX).is_file()


def _made_from(place: Place) -> str:
    """A digest of how each notebook's last execution went, and of the reference that the indexes link to."""
    digest = hashlib.sha256()
    for path in sorted([*place.build.glob("*.json"), *_top(place.root, False).glob(f"*_gpu/**/{PAGES}")]):
        digest.update(str(path.relative_to(place.root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _several(place: Place) -> bool:
    """Whether it is of several GPUs; what is committed says so by its folder."""
    return place.gpus > 1 or place.reports.parent.parent.name == "multi_gpu"


def _measures(place: Place, page: Page) -> str:
    """The command that measures a page's rows."""
    return f"{_command(place)} ONLY={page.number}"


def _command(place: Place) -> str:
    return f"make report GPU={place.gpu}{' MODEL=…' if place.model else ''}"


def _top(root: Path, own: bool) -> Path:
    return root / "reports" / "own" if own else root / "reports"


def _relative(target: Path, start: Path) -> str:
    return Path(os.path.relpath(target, start)).as_posix()
