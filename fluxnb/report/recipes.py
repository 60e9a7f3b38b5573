"""`fluxnb/recipes.json`, made from rows: for each goal what is recommended on each GPU, or why nothing is."""

from __future__ import annotations

import json
from pathlib import Path

from fluxnb import findings, notebooks, params, recipes
from fluxnb.findings.recommend import GOALS, Choice, quality_words, speed_words
from fluxnb.findings.rows import is_baseline
from fluxnb.models import facts, pipelines
from fluxnb.report import machine_of, write_changed
from fluxnb.report.choices import named, takes_few
from fluxnb.report.configurations import Configuration, configurations


def write(root: Path) -> Path:
    """Writes the recipes of the committed rows where the package has them."""
    found = {c.name: of(c) for c in configurations(root) if "single_gpu" in c.folder.parts}
    path = root / "fluxnb" / recipes.FILE.name
    write_changed(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def of(c: Configuration) -> dict:
    """The words in a GPU's name that the configuration is for, and for each goal a recipe or why there is none."""
    return {"match": params.load(c.name).gpu.match} | {key: _by_goal(c, few) for few, key in recipes.OF.items()}


def _by_goal(c: Configuration, few: bool) -> dict:
    found = {choice.goal.key: choice for choice in named(c, few)}
    own = [r for r in c.ok if r.notebook == notebooks.FINAL_STACK and takes_few(r.model) == few]
    untimed = findings.no_headline(own) if own else "no shortlist of one was timed"
    nothing = "no memory that counts was measured" if found else untimed
    said = {key: choice.label if is_baseline(choice.row) else recipe(c, choice) for key, choice in found.items()}
    return {goal.key: said.get(goal.key, nothing) for goal in GOALS}


def recipe(c: Configuration, choice: Choice) -> dict:
    """Of a choice that isn't the baseline all that `recipes.Recipe` has besides its name."""
    row, seen, model = choice.row, choice.seen, pipelines.describe(choice.row.model)
    other = ", a stand-in" if seen is not None and seen.model != row.model else ""
    return {
        "goal": choice.goal.text,
        "stack": choice.stack.name,
        "technique": row.technique,
        "settings": choice.settings,
        "steps": row.steps,
        "plain_steps": choice.base.steps,
        "computed_steps": row.computed_steps,
        "model": row.model,
        "load": None if model.small else facts.STAND_FOR.get(row.model, row.model),
        "width": row.width,
        "height": row.height,
        "tokens": model.tokens,
        "dtype": row.setting("dtype"),
        "machine": machine_of(c.run),
        "cuda": bool((c.run.get("machine") or {}).get("gpus")),
        "speedup": round(row.speedup, 4),
        "interval": [round(end, 4) for end in findings.ends(row)],
        "n": row.n,
        "speed": speed_words(row),
        "quality": quality_words(choice) + other,
        "guided": model.guided,
        **({"pipeline": model.pipeline} if model.pipeline != recipes.Recipe.pipeline else {}),
        "rows": list(dict.fromkeys(r.id for r in (row, choice.base, seen) if r is not None)),
    }
