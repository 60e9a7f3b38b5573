"""What a run for a model of the user's ends with: what to switch on, and scripts that do it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from fluxnb import findings, recipes
from fluxnb.cache import teacache
from fluxnb.findings.rows import is_baseline
from fluxnb.report import Place, front, write_changed
from fluxnb.report.configurations import read
from fluxnb.report.recipes import recipe


def words(place: Place, model: str) -> str:
    """The recommendation for each goal, and the script of one of them; those of all are written beside the pages."""
    c = read(place.root, place.table)
    found = next(iter(front.answers(c)), [])
    said = f"What to switch on for {model}: {findings.recommendation_sentence(found, c.ok)}"
    scripts = {choice.goal.key: _script(c, choice, place) for choice in found if not is_baseline(choice.row)}
    for goal, script in scripts.items():
        write_changed(place.reports / f"recipe-{goal}.py", script)
    if not scripts:
        return said
    goal = recipes.GOAL if recipes.GOAL in scripts else next(iter(scripts))
    files = ", ".join(f"recipe-{name}.py" for name in scripts)
    return f"{said}\n\n{scripts[goal]}\nthis and the other goals' scripts: {files} in {place.reports}"


def _script(c, choice, place: Place) -> str:
    made = recipes.Recipe(name=f"{c.name}/{choice.goal.key}", **recipe(c, choice))
    local = Path(os.path.expanduser(made.model))
    script = recipes.script(replace(made, load=str(local)) if local.is_dir() else made)
    fits = sorted(place.reports.glob(f"teacache/*/{teacache.FILE}"), key=lambda path: path.stat().st_mtime)
    if fits and not (local / teacache.FILE).is_file():  # the study's fit, which nobody else knows
        own = teacache.coefficients(str(fits[-1].parent))
        script = re.sub(r"\bTeaCache\((\d[\d.]*)", lambda match: f"TeaCache({match[1]}, {own}", script)
    return script
