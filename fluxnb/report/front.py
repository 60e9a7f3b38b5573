"""What the front page says: the best choices, what is missing, and a section for each configuration; and the ledger."""

from __future__ import annotations

import os
from pathlib import Path

from fluxnb import families, findings, notebooks, recipes
from fluxnb.findings import ledger
from fluxnb.findings.recommend import Choice
from fluxnb.findings.rows import is_baseline
from fluxnb.measure import stats
from fluxnb.report import choosing, html, machine_of
from fluxnb.report.choices import answers, named, soonest, takes_few
from fluxnb.report.configurations import Configuration
from fluxnb.report.index import line
from fluxnb.report.ledger import entries
from fluxnb.report.pages import WITH_PAGE, Page
from fluxnb.report.progress import cannot_run

CONTROLS = tuple(f.name for f in families.ALL if f.control)


def front(folder: Path, found: list[Configuration], reference: list[Configuration] | None = None) -> dict:
    """The values of the template site.html.j2.

    Args:
        folder: where the page goes.
        found: the configurations that it is about.
        reference: of a user's own front page, the committed ones that it shows beside.
    """
    judged = found if reference is None else reference
    return {
        "headlines": [html.callout_html(sentence) for sentence in headlines(found)],
        "not_measured": not_measured(found),
        "configurations": [_section(folder, c, reference is not None) for c in found],
        "reference": None if reference is None else [
            {"name": c.name, "href": _link(folder, c, "index.html"), "machine": machine(c), "rows": len(c.ok)}
            for c in reference
        ],
        "ledger_sentence": ledger.sentence(entries(judged)),
        "ledger": "../ledger.html" if reference is not None else "ledger.html",
    }  # fmt: skip


def site(root: Path, folder: Path, found: list[Configuration]) -> dict:
    """The values of the template front.html.j2: the front page of the committed reference."""
    from fluxnb.report import asked  # every technique is imported there
    from fluxnb.report.render import TEMPLATES

    claims, shown = entries(found), choosing.gpus(found, root, folder)
    made = asked.lines(found, shown, claims, folder)
    for gpu in shown:
        gpu["keys"] = [panel["key"] for panel in gpu["panels"]]
    first = next((gpu for gpu in shown if gpu["first"]), None)
    said = [(q, vars(a) | {"said": html.inline(a.said)}) for q, a in asked.examples(made)]
    return {
        "gpus": shown,
        "floor": findings.LEVELS[choosing.BALANCED],
        "rounds": stats.HEADLINE,
        "examples": said,
        "lines": [vars(line) | {"said": html.inline(line.said)} for line in made],
        "unmeasured": [gpu for gpu in shown if not gpu["measured"]],
        "own_gpu": first["name"] if first else "",
        "goal": first["first_goal"] if first else "",
        "ledger_sentence": html.plain(ledger.sentence(claims)),
        "onward": onward(folder, found),
        "reports": [_section(folder, c, False, brief=True) for c in found],
        "sheet": (TEMPLATES / "fluxnb" / "front.css").read_text(encoding="utf-8"),
        "script": (TEMPLATES / "fluxnb" / "front.js").read_text(encoding="utf-8"),
    }


def limits(found: list[Configuration]) -> dict:
    """The values of blocks.html.j2: what isn't measured, and what can't be had, for a page of its own."""
    items = "".join(f"<li>{html.inline(line)}</li>" for line in not_measured(found))
    return {"title": "Limits: what these figures are not", "blocks": [f"<ul>{items}</ul>"]}


def onward(folder: Path, found: list[Configuration]) -> list[tuple[str, str]]:
    """(address, title) of what lies behind the front page, as far as it is there."""
    there = [(f"Explore {c.name}", c.folder / "explorer.html") for c in found]
    there += [("Compare GPUs", folder / "analysis" / "index.html")]
    there += [(f"Survives? {c.name}", c.folder / f"{notebooks.SURVIVAL}.html") for c in found]
    kept = [(_link(folder, path.parent, path.name), text) for text, path in there if path.is_file()]
    always = (
        ("ledger.html", "Claims"),
        ("changes.html", "What changed"),
        ("contributed/index.html", "Other people’s rows"),
        ("data.json", "Data"),
    )
    return [*kept, ("glossary.html", "Glossary"), ("limits.html", "Limits"), *always]


def headlines(found: list[Configuration]) -> list[str]:
    """What to choose on each configuration that has an answer: one sentence for each model."""
    return [f"On {c.name}: {said}" for c in found for said in _answers(c)]


def has_recipes(c: Configuration, found: list[Choice]) -> bool:
    """Whether the package's recipes are of this answer."""
    first = named(c, takes_few(found[0].base.model))
    return bool(first) and found[0].base.model == first[0].base.model


def unanswered(c: Configuration) -> tuple[str, Page] | None:
    """Why a configuration has no headline, and the page that shows what was measured; None where it has one."""
    stem = notebooks.PARALLEL if _several(c) else notebooks.FINAL_STACK
    page = next((p for p in c.pages if p.stem == stem and p.status in WITH_PAGE), None)
    if page is None or answers(c) or soonest(c) is not None:
        return None
    own = findings.divided(c.rows) if _several(c) else [r for r in c.ok if r.notebook == stem]
    return findings.no_headline(own), page


def _several(c: Configuration) -> bool:
    return any((r.gpus or 1) > 1 for r in c.ok) and not findings.references(c.rows)


def _answers(c: Configuration) -> list[str]:
    if (row := soonest(c)) is not None:
        over = f"**{row.speedup:.2f}×** the same on one of them ({findings.sureness(row)})"
        return [f"one image on {row.gpus} GPUs with {row.label}: {over}, {row.latency_p50:.3g} s."]
    found = answers(c)
    of = [f"at {own[0].base.label} (`{own[0].base.model}`): " if len(found) > 1 else "" for own in found]
    return [said + findings.recommendation_sentence(own, c.ok) for said, own in zip(of, found, strict=True)]


def frontier(c: Configuration) -> str | None:
    """Speed against quality of the caches and of their controls, as a figure; None without rows."""
    from fluxnb.report import charts
    from fluxnb.report.captions import about, floors, valued

    own = [r for r in c.ok if r.notebook == notebooks.COMBINED and r.weights == "trained" and r.batch == 1]
    first = max((r.steps or 0 for r in own), default=0)  # of the baseline that the others are over
    models = {r.model for r in own if r.steps == first}  # a model of four steps has controls of its own
    rows = [r for r in own if r.steps == first or (r.family in CONTROLS and r.model in models)]
    rows = charts.on_frontier(rows)
    if sum(not is_baseline(r) for r in rows) < 3:
        return None
    points = "; ".join(f"{r.label} {valued(r, 'speedup')}, {valued(r, charts.WORST)}" for r in rows)
    return html.figure_html(
        charts.frontier(rows, marks=tuple(f for f in families.ALL if f.control)),
        alt=f"{c.name}, speedup and PSNR of the worst image: {points}.",
        caption=f"{about(rows)}: wall clock against quality. Further right is faster, further up is nearer to the "
        f"uncached image; a technique has to lie above the dashed lines, which just use fewer steps. {floors()}.",
    )


def not_measured(found: list[Configuration]) -> list[str]:
    """What a reader should know is missing, first."""
    lines = []
    if not any(r.model for c in found if c.model for r in c.ok):
        lines.append(
            "FLUX.1's own weights: full-size figures are of random weights (time and memory), quality is that of the "
            "embedded model."
        )
    if not any((r.gpus or 1) > 1 for c in found if c.name != "cpu" for r in c.ok):
        lines.append("More than one GPU.")
    for c in found:
        missing: dict[str, list[str]] = {}
        for page in (page for page in c.pages if page.status != "ok"):
            missing.setdefault(page.problem or page.status, []).append(page.short_title)
        lines += [f"{c.name}, {why}: {', '.join(titles)}." for why, titles in missing.items()]
        cannot = cannot_run([r for r in c.rows if r.model])  # without a model it is no technique: a kernel by itself
        if cannot:
            lines.append(f"{c.name} can't run {'; '.join(sorted(cannot))}: the reports say why.")
    return lines


def _section(folder: Path, c: Configuration, own: bool, brief: bool = False) -> dict:
    facts = {
        "name": c.name,
        "href": _link(folder, c, "index.html"),
        "machine": machine(c),
        "rows": len(c.ok),
        "pages": len(c.pages),
        "done": sum(p.status == "ok" for p in c.pages),
    }
    if brief:
        return facts
    chart, blocks = frontier(c), []
    if (missing := unanswered(c)) is not None:
        said, page = missing
        where = f'<a href="{_link(folder, c, page.href)}">{html.inline(page.title)}</a>'
        blocks.append(f"<p>{said[:1].upper()}{said[1:]}: what there is stands in {where}.</p>")
    for found in answers(c):
        blocks += [goals(c, found), snippet(c.name, found, own or not has_recipes(c, found))]
    reports = [line(page) for page in sorted(c.pages, key=lambda p: p.stem)]
    for report in reports:
        there = report["href"] and (c.folder / report["href"]).is_file()
        report["href"] = _link(folder, c, report["href"]) if there else None
    return facts | {
        "explorer": _link(folder, c, "explorer.html") if (c.folder / "explorer.html").is_file() else None,
        "progress": _link(folder, c, "progress.md") if (c.folder / "progress.md").is_file() else None,
        "blocks": [*blocks, *([chart] if chart is not None else [])],
        "reports": reports,
    }


def goals(c: Configuration, found: list[Choice]) -> str:
    """The table of what to choose for each goal."""
    table, about = findings.recommendations(found), findings.stands_in(found)
    caption = ": ".join(filter(None, [f"What to choose on {c.name}, by goal", about]))
    return html.table_html(table, f"{caption}.", table.attrs["formats"])


def snippet(name: str, found: list[Choice], own: bool) -> str:
    """How to put what is recommended on a pipeline: near-lossless where there is something; "" without any.

    Args:
        own: it is a user's own configuration, which the package has no recipes of.
    """
    made = {choice.goal.key: choice for choice in found if not is_baseline(choice.row)}
    if not made:
        return ""
    key = recipes.GOAL if recipes.GOAL in made else next(iter(made))
    code, after, few = recipes.code(made[key].stack.techniques), "", takes_few(found[0].base.model)
    if not own:
        by_name = f"{name}/{recipes.SCHNELL}/{key}" if few else f"{name}/{key}"
        code = f'from fluxnb import accelerate\n\nundo = accelerate(pipe, "{by_name}")'
        call = f"python -m fluxnb recipe --gpu {name} --goal {key}{' --schnell' * few}"
        after = (
            f"<p><code>{call}</code> prints it as a script, <code>--diffusers</code> without fluxnb. Goals: "
            f"{', '.join(f'<code>{k}</code>' for k in made)}.</p>"
        )
    label = f"In your own pipeline{f' {recipes.FEW}' * few}, {name}, {key}"
    region = f'<div class="fx-scroll" role="region" tabindex="0" aria-label="{label}">'
    return f"{region}<pre><code>{html.inline(code)}</code></pre></div>{after}"


def machine(c: Configuration) -> str:
    """What it was measured on."""
    return machine_of(c.run)


def _link(folder: Path, c: Configuration | Path, name: str) -> str:
    own = c if isinstance(c, Path) else c.folder
    return Path(os.path.relpath(own / name, folder)).as_posix()
