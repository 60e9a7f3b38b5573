"""The front page's answer: a GPU, a goal, and what to switch on for them; all of it computed from rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from fluxnb import families, findings, notebooks, params, recipes, stacks
from fluxnb.errors import UserError
from fluxnb.findings import documents
from fluxnb.findings.caches import LEVELS
from fluxnb.findings.ledger import latest
from fluxnb.findings.recommend import GOALS, STAND_IN, Choice, Goal, options, quality_words
from fluxnb.findings.rows import is_baseline, peak_gib, same_image, within_noise, worst_db
from fluxnb.findings.words import unsettled
from fluxnb.measure import stats
from fluxnb.report import html, machine_of
from fluxnb.report.choices import named, soonest, takes_few
from fluxnb.report.configurations import SMOKE, Configuration
from fluxnb.report.pages import WITH_PAGE
from fluxnb.report.pairs import Pair, of_choice, pairs
from fluxnb.report.recipes import recipe
from fluxnb.study.row import Row

SLOWER = 1.1  # times the baseline's seconds: what is slower stands in the list only
MOST_DB = 50  # of the chart: nearer than this nobody sees a difference
MOST = 8  # switches in the list
WIDTH, HEIGHT, LEFT, BELOW = 560, 360, 44, 40  # of the chart
BALANCED = list(LEVELS)[-1]  # the floor that a switch has to keep
SEVERAL = "one image on all of them"  # what a configuration of several GPUs is for


def names(found: Sequence[Configuration], root: Path) -> list[str]:
    """Every GPU that can be chosen: those measured and those of params/; one GPU first, the CPU last of these."""
    folder = root / "params"
    known = dict.fromkeys([c.name for c in found] + (params.choices(folder) if folder.is_dir() else []))
    return sorted(
        (n for n in known if n != SMOKE), key=lambda n: (params.parted(n)[1] > 1, n == "cpu", *params.parted(n))
    )


def gpus(found: list[Configuration], root: Path, folder: Path) -> list[dict]:
    """A section for each GPU, that of the best answer first: goals with their panels, the options and the switches."""
    by_name = {c.name: c for c in found}
    made = [_gpu(name, by_name.get(name), root, folder) for name in names(found, root)]
    first = max(made, key=lambda g: (g["full"], g["answered"]), default=None)
    return [g | {"first": g is first} for g in made]


def _gpu(name: str, c: Configuration | None, root: Path, folder: Path) -> dict:
    choices = {} if c is None else {choice.goal.key: choice for choice in named(c)}
    kept = pairs(c) if c is not None and choices else []
    goals = GOALS if params.parted(name)[1] == 1 else (Goal(SEVERAL, -math.inf),)
    panels = []
    for goal in goals:
        choice, row = choices.get(goal.key), None if c is None or params.parted(name)[1] == 1 else soonest(c)
        if choice is not None:
            panel = _panel(c, choice, kept, folder)
        elif row is not None:
            panel = _divided(c, row, folder)
        else:
            panel = {"missing": missing(name, goal, c, folder), "command": f"make report GPU={name}"}
        short = (
            goal.name if params.parted(name)[1] > 1 else f"smallest memory, {goal.name}" if goal.smallest else goal.text
        )
        of = {"key": goal.key.replace(" ", "-"), "goal": short}
        panels.append(of | panel)
    shown = [] if c is None else _options(c, folder)
    return {
        "name": name,
        "title": name.upper()
        if params.parted(name)[1] == 1
        else f"{params.parted(name)[1]} × {params.parted(name)[0].upper()}",
        "several": params.parted(name)[1] > 1,
        "machine": machine_of(c.run) if c is not None else "",
        "href": _link(folder, c, "index.html") if c is not None else None,
        "measured": c is not None,
        "answered": sum("missing" not in p for p in panels),
        "full": any(choice.row.weights == "random" or c.model for choice in choices.values()),
        "panels": panels,
        "first_goal": next((p["key"] for p in panels if p["key"] == recipes.GOAL), panels[0]["key"]),
        "options": shown,
        "chart": chart(shown, name),
        "slower": sum(o["beyond"] for o in shown),
        "sessions": "" if c is None else sessions(shown),
        "switches": [] if c is None else switches(c, folder),
    }


def missing(name: str, goal: Goal, c: Configuration | None, folder: Path) -> str:
    """One sentence on why nothing is recommended, for a GPU that wasn't measured or a goal that nothing stands for."""
    if c is None:
        why = next((line.why.partition(";")[0] for line in documents.lines() if name in line.gpus), "")
        return f"Nothing was measured on {name} yet{f': {why}' if why else ''}; this fills it in:"
    if named(c):
        return f"On {name} nothing is recommended for {goal.text}: no memory that counts was measured; this measures:"
    own = (
        [r for r in c.ok if r.notebook == notebooks.FINAL_STACK]
        if params.parted(name)[1] == 1
        else findings.divided(c.rows)
    )
    stem = notebooks.FINAL_STACK if params.parted(name)[1] == 1 else notebooks.PARALLEL
    page = next((p for p in c.pages if p.stem == stem and p.status in WITH_PAGE), None)
    there = ""
    if page is not None:
        there = f' What there is stands in <a href="{_link(folder, c, page.href)}">{html.inline(page.title)}</a>.'
    said = findings.no_headline(own)
    return f"{said[:1].upper()}{said[1:]}.{there} This fills it in:"


def _panel(c: Configuration, choice: Choice, kept: list[Pair], folder: Path) -> dict:
    row, base, nothing = choice.row, choice.base, is_baseline(choice.row)
    shown, peaks = None if nothing else of_choice(choice, kept, c), [peak_gib(base), peak_gib(row)]
    return {
        "label": choice.label,
        "times": "" if nothing else f"{row.speedup:.2f}×",
        "sure": "" if nothing else findings.sureness(row),
        "before": f"{(base.latency_p50 if nothing else row.baseline_s):.3g} s",
        "after": f"{row.latency_p50:.3g} s",
        "memory": None if None in peaks else [f"{gib:.1f}" for gib in peaks],
        "quality": quality_words(choice),
        "worst": choice.worst,
        "weights": html.inline(weights(choice)),
        "pair": None if shown is None else shown[0],
        "own": shown is not None and shown[1],
        "seen": None if choice.seen is None else _words(choice),
        "rows": {r.id: page_of(c, r, folder) for r in (row, base, choice.seen) if r is not None},
        "codes": [] if nothing else codes(c, choice),
    }


def _divided(c: Configuration, row: Row, folder: Path) -> dict:
    """Of one image over several GPUs: no recipe of a single call, so the command that runs it."""
    return {
        "label": row.label,
        "times": f"{row.speedup:.2f}×",
        "sure": findings.sureness(row),
        "before": f"{row.baseline_s:.3g} s",
        "after": f"{row.latency_p50:.3g} s",
        "memory": None,
        "worst": None,
        "quality": "the same image up to the order of operations" if same_image(row) else "not judged",
        "weights": html.inline(_of(row)),
        "pair": None, "own": False, "seen": None, "rows": {row.id: page_of(c, row, folder)},
        "codes": [("Command", f"make report GPU={c.name}\npython -m fluxnb rows {row.id}")],
    }  # fmt: skip


def weights(choice: Choice) -> str:
    """One line that says what the weights are."""
    seen = choice.seen
    if seen is not None and seen.model != choice.row.model:
        said = STAND_IN.format(seen.model)
        return f"{said[:1].upper()}{said[1:]}."
    return _of(choice.row)


def _of(row: Row) -> str:
    kind = f"{row.weights} weights" if row.weights else "weights of unknown origin"
    alone = ": time and memory only, nothing of quality" if row.weights == "random" else ""
    of = f"`{row.model}`, {kind}, at {row.width}×{row.height} and {row.total_steps or row.steps} steps"
    return f"All of it is of {of}{alone}."


def codes(c: Configuration, choice: Choice) -> list[tuple[str, str]]:
    """(title, text) of what can be copied: through fluxnb, plain diffusers where there is one, command and YAML."""
    key, single = choice.goal.key, f"{c.name}/{choice.goal.key}"
    call = f'from fluxnb import accelerate\n\nundo = accelerate(pipe, "{single}")'
    parts = recipes.code(choice.stack.techniques).replace("accelerate(\n", "undo = accelerate(\n")
    found = [("Through fluxnb", f"{call}\n\n# or part by part\n{parts}" if parts else call)]
    try:
        found.append(("Plain diffusers", recipes.script(_recipe(c, choice), plain_diffusers=True)))
    except UserError:
        pass  # nothing of it is in diffusers
    lines = [f"python -m fluxnb recipe --gpu {c.name} --goal {key} > fast.py && python fast.py"]
    lines += ["# on your weights: measured, judged and recommended anew", f"make report GPU={c.name} MODEL=…"]
    lines += ["# the rows that it rests on", f"python -m fluxnb rows {choice.row.id}"]
    if choice.row.stack in stacks.SHORTLIST:
        lines += [f"# params/{c.name}.yaml", f"{notebooks.FINAL_STACK}:", "  shortlist:", f"    - {choice.row.stack}"]
    return [*found, ("Command and YAML", "\n".join(lines))]


def _recipe(c: Configuration, choice: Choice) -> recipes.Recipe:
    return recipes.Recipe(name=f"{c.name}/{choice.goal.key}", **recipe(c, choice))


# --- every option ---------------------------------------------------------------------------------------------


def _options(c: Configuration, folder: Path) -> list[dict]:
    base = next(iter(findings.references(c.rows)), None)
    found = [] if base is None else options(c.rows, base)
    return [_option(c, choice, i, folder) for i, choice in enumerate(found, 1)]


def sessions(shown: list[dict]) -> str:
    """That options are of several sessions, and how long the plain pipeline took in these; "" of one."""
    plain = {o["session"]: o["plain_s"] for o in shown}
    if len(plain) < 2:
        return ""
    took = " to ".join(dict.fromkeys(f"{s:.3g}" for s in (min(plain.values()), max(plain.values()))))
    return f"Of {len(plain)} sessions, in which the plain pipeline took {took} s: nearer than that nothing is ranked."


def _option(c: Configuration, choice: Choice, i: int, folder: Path) -> dict:
    row, steps = choice.row, choice.row.steps
    parts = recipes.code(choice.stack.techniques) if choice.stack is not None else None
    asked = f"image = pipe(prompt, num_inference_steps={steps}).images[0]"
    alone = f"# it can't be put on from its settings alone\npython -m fluxnb rows {row.id}"
    worst, few = worst_db(choice.seen), unsettled(row)
    return {
        "number": i,
        "id": f"{c.name}-{row.id}",
        "label": row.label,
        "seconds": row.latency_p50,
        "session": row.session,
        "plain_s": choice.base.latency_p50,
        "worst": worst,
        "said": f"{row.latency_p50:.3g} s, {_words(choice)}, n = {row.n}{f': {few}' * bool(few)}",
        "colour": families.named(row.family).colour,
        "control": families.named(row.family).control,
        "few": bool(few),
        "beyond": row.latency_p50 > SLOWER * choice.base.latency_p50,
        "code": alone if parts is None else "\n".join(filter(None, [parts, asked])),
        "page": page_of(c, row, folder),
    }


def chart(shown: list[dict], name: str) -> str:
    """Seconds against the worst image of every option, as SVG whose points lead to its code; "" of fewer than 2."""
    if sum(not o["beyond"] for o in shown) < 2:
        return ""
    shown = [o for o in shown if not o["beyond"]]
    finite = [min(o["worst"], MOST_DB) for o in shown]
    low, high = min([*finite, *LEVELS.values()]) - 2, max([*finite, *LEVELS.values()])
    most = 1.08 * max(o["seconds"] for o in shown)
    top, floor = 14, HEIGHT - BELOW

    def across(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - 14) * seconds / most

    def up(decibels: float) -> float:
        return floor - (floor - top) * (min(decibels, high) - low) / (high - low)

    lines = [f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="0" y2="{floor}"/>']
    lines.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{floor}" y2="{floor}"/>')
    step = 10 ** math.floor(math.log10(most / 2))
    step *= next(k for k in (1, 2, 5, 10) if most / (step * k) <= 7)
    for i in range(int(most / step) + 1):
        at = f'x="{across(i * step):.1f}" y="{floor + 16}"'
        lines.append(f'<text {at} text-anchor="middle">{i * step:.3g}</text>')
    for value in range(10 * math.ceil(low / 10), int(high) + 1, 10):
        lines.append(
            f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{"≥ " * (value == MOST_DB)}{value}</text>'
        )
    for level, decibels in LEVELS.items():
        level_y = f"{up(decibels):.1f}"
        lines.append(f'<line class="floor" x1="{LEFT}" x2="{WIDTH}" y1="{level_y}" y2="{level_y}"/>')
        lines.append(f'<text x="{WIDTH}" y="{up(decibels) - 4:.1f}" text-anchor="end">{level}</text>')
    lines.append(f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">seconds per image →</text>')
    lines.append(f'<text x="{LEFT + 6}" y="{floor - 8}">↑ dB of the worst image</text>')
    placed: list[tuple[float, float]] = []
    for o in shown:
        true = x, y = across(o["seconds"]), up(o["worst"])
        for i in range(200):  # beside what is there, on a spiral: a number stays readable
            inside = LEFT + 9 <= x <= WIDTH - 9 and 9 <= y <= floor - 9
            if inside and all(math.hypot(x - a, y - b) >= 19 for a, b in placed):
                break
            x, y = true[0] + 1.2 * i * math.cos(0.7 * i), true[1] + 1.2 * i * math.sin(0.7 * i)
        placed.append((x, y))
        said, dashed = html.inline(f"{o['label']}: {o['said']}"), ' stroke-dasharray="3 2"' * o["control"]
        few = ' class="few"' * bool(o.get("few"))
        lines.append(
            f'<a href="#{o["id"]}" data-option="{o["id"]}"{few} aria-label="{said}"><title>{said}</title>'
            f'<line class="to" x1="{true[0]:.1f}" y1="{true[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" stroke="{o["colour"]}"{dashed}/>'
            f'<text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="middle">{o["number"]}</text></a>'
        )
    about = f'role="group" aria-label="{name}: seconds per image against the worst image"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {about}>{"".join(lines)}</svg>'


# --- which switches matter ------------------------------------------------------------------------------------


def switches(c: Configuration, folder: Path) -> list[dict]:
    """The fastest setting of each family by itself that keeps the balanced floor, by the lower end of its interval.

    Of full size where its images were judged or can't differ, else of the trained model; sorted by what they gain. What
    was timed in as many rounds as a headline needs goes before what wasn't, in a family and among them.
    """
    rows = [r for r in findings.finished(latest(c.ok)) if _by_itself(r) and not takes_few(r.model)]
    bases = {r.id: r for r in rows if is_baseline(r)}
    best: dict[str, tuple[tuple, Row, bool]] = {}
    for row in (r for r in rows if not is_baseline(r)):
        full, floor = row.weights == "random", findings.above(row, LEVELS[BALANCED]) if findings.judged(row) else False
        base = bases.get(row.baseline)
        if not (floor or (full and same_image(row))) or row.n < 3 or (row.baseline and base is None):
            continue
        noise = base is not None and within_noise(row, base, base)
        if not noise and row.speedup <= 1:
            continue
        rank = row.n >= stats.HEADLINE, full, (findings.ends(row) or (0.0,))[0], row.speedup
        if row.family not in best or rank > best[row.family][0]:
            best[row.family] = rank, row, noise
    found = []
    for _, row, noise in sorted(best.values(), key=lambda one: (not one[0][0], -one[1].speedup))[:MOST]:
        worst = "same image, up to rounding" if same_image(row) else f"worst {findings.worst_db(row):.1f} dB"
        found.append(
            {
                "label": row.label,
                "family": row.family,
                "times": f"{row.speedup:.2f}×",
                "sure": findings.sureness(row),
                "worst": worst,
                "model": row.model,
                "noise": noise,
                "few": bool(unsettled(row)),
                "page": page_of(c, row, folder),
            }
        )
    return found


def _by_itself(row: Row) -> bool:
    """Of one image, and no stack: what one switch gains."""
    alone = (row.use_case, row.batch, row.gpus, row.users) == ("txt2img", 1, 1, 1)
    known = row.speedup is not None and row.model and row.family not in (families.CEILING.name, families.STACK.name)
    return bool(alone and known and row.latency_p50)


# --- words ----------------------------------------------------------------------------------------------------


def _words(choice: Choice) -> str:
    seen = choice.seen
    worst = "all identical" if worst_db(seen) == math.inf else f"worst {worst_db(seen):.1f} dB"
    return f"{worst} of {seen.images} images"


def page_of(c: Configuration, row: Row, folder: Path) -> str | None:
    """The address of a row's line on its page, from a folder: of the page where it has none, None without a page."""
    page = c.folder / f"{row.notebook}.html"
    if not page.is_file():
        return None
    line = f"#row-{row.id}" if row.id in _lines_of(page, page.stat().st_mtime_ns) else ""
    return _link(folder, c, page.name) + line


@lru_cache(maxsize=256)
def _lines_of(page: Path, made: int) -> frozenset[str]:
    """The ids of the rows that a page has a line of; `made` tells its versions apart."""
    return frozenset(re.findall(r'<tr id="row-([0-9a-f]{10})"', page.read_text(encoding="utf-8")))


def _link(folder: Path, c: Configuration, name: str) -> str:
    return Path(os.path.relpath(c.folder / name, folder)).as_posix()
