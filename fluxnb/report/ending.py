"""What a run leads to: what to switch on, and scripts that do it, printed and on the configuration's index."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from html import escape
from pathlib import Path

from fluxnb import findings, recipes
from fluxnb.cache import teacache
from fluxnb.findings.recommend import Choice
from fluxnb.findings.rows import is_baseline
from fluxnb.report import Place, front, html, write_changed
from fluxnb.report.configurations import Configuration, read
from fluxnb.report.recipes import recipe


def words(place: Place, model: str) -> str:
    """The recommendation for each goal, and the script of one of them; those of all are written beside the pages."""
    c = read(place.root, place.table)
    found = next(iter(front.answers(c)), [])
    said = f"What to switch on for {model}: {findings.recommendation_sentence(found, c.ok)}"
    written = _write(c, found, place)
    if not written:
        return said
    first, *_ = written
    files = ", ".join(path.name for path in written)
    script = first.read_text(encoding="utf-8")
    return f"{said}\n\n{script}\nthis and the other goals' scripts: {files} in {place.reports}"


def blocks(place: Place) -> list[str]:
    """What a configuration's index begins with, as HTML: the recommendation and its recipe; [] while there is none."""
    if not place.table.is_file():
        return []
    c = read(place.root, place.table)
    made = [html.callout_html(sentence) for sentence in front.headlines([c])]
    scripts = {path for path in place.reports.glob("recipe-*.py")} if place.own else set()
    for i, found in enumerate(front.answers(c)):
        of = re.sub(r"[^\w.-]+", "-", f"{found[0].row.model}-") * (i > 0)  # the first is what most ask for
        made.append(front.goals(c, found))
        if not place.own:
            made.append(front.snippet(c.name, found, own=not front.has_recipes(c, found)))
        elif written := _write(c, found, place, of):
            links = ", ".join(f'<a href="{path.name}">{path.name}</a>' for path in written)
            label = f"The recipe as a script, {written[0].stem.removeprefix('recipe-')}"
            script = escape(written[0].read_text(encoding="utf-8"))
            region = f'<div class="fx-scroll" role="region" tabindex="0" aria-label="{label}">'
            made.append(f"<h2>{label}</h2>{region}<pre><code>{script}</code></pre></div><p>As files: {links}.</p>")
            scripts -= set(written)
    for path in scripts:  # of an earlier recommendation
        path.unlink()
    return made


def _write(c: Configuration, found: list[Choice], place: Place, of: str = "") -> list[Path]:
    """Writes the script of each goal beside the pages; their paths, the one to begin with first."""
    made = {choice.goal.key: choice for choice in found if not is_baseline(choice.row)}
    written = []
    for goal in sorted(made, key=lambda key: key != recipes.GOAL):
        written.append(place.reports / f"recipe-{of}{goal}.py")
        write_changed(written[-1], _script(c, made[goal], place))
    return written


def _script(c: Configuration, choice: Choice, place: Place) -> str:
    made = recipes.Recipe(name=f"{c.name}/{choice.goal.key}", **recipe(c, choice))
    local = Path(os.path.expanduser(made.model))
    if local.is_dir():
        made = replace(made, load=str(local))
    fits = sorted(place.reports.glob(f"teacache/*/{teacache.FILE}"), key=lambda path: path.stat().st_mtime)
    own = bool(fits) and not (local / teacache.FILE).is_file()  # the study's fit, which nobody else knows
    return recipes.script(made, coefficients=teacache.coefficients(str(fits[-1].parent)) if own else None)
