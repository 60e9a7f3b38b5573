"""The matrix of what happens to techniques in use: a table for eyes, keyboards and ears, on wide and narrow screens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fluxnb import families, findings
from fluxnb.findings.survival import by_label, can_run, verdict
from fluxnb.report.html import inline, three_figures
from fluxnb.report.show import frame, say
from fluxnb.study.row import Row
from fluxnb.study.survival import CASE, CASES, PUT_ON, RAW, RECOMPILED, RIGHT, SENTENCE, VERDICTS, WRONG

SHORT = {RIGHT: "right", RECOMPILED: "right", SENTENCE: "says", WRONG: "wrong", RAW: "raw"}  # in a narrow cell
EVERY = (PUT_ON, *CASES)


def matrix(rows: Sequence[Row], note: str = "") -> None:
    """Displays a line for each technique and recipe, a column for each case; sentences and cases are below."""
    if not any(map(verdict, rows)):
        say("What happens to techniques in use was not tried here.", "not-measured")
        return
    from IPython.display import HTML, display

    display(HTML(matrix_html(rows, note)))


def left_out(cases, compiled, kernels, techniques) -> None:
    """Says what this configuration leaves out, by the notebook's parameters."""
    said = [
        cases and f"nothing happens but {', '.join(cases)}",
        compiled and f"where something is compiled, nothing but {', '.join(compiled)}",
        f"kernels are compiled for {', '.join(kernels)}" if kernels else "no kernels are compiled: Dynamo counts",
        techniques and f"not tried are {', '.join(techniques)}",
    ]
    say(f"In this configuration {'; '.join(filter(None, said))}.", "note")


def compiled_anew(rows: Sequence[Row]) -> None:
    """Displays what was compiled anew."""
    found = findings.compiled_anew(rows)
    if found is None:
        say("Nothing was compiled here, or nothing anew.", "not-measured")
    else:
        frame(found, "Graphs that were compiled after the first image, and the seconds that images waited for them")


def matrix_html(rows: Sequence[Row], note: str = "") -> str:
    """The matrix, the sentences that its cells refer to, and what happens in each case."""
    said: dict[str, int] = {}  # a sentence -> its number
    shown = [case for case in EVERY if any(r.setting(CASE) == case.name for r in rows)]
    head = "".join(
        f'<th scope="col" role="columnheader"><a href="#case-{EVERY.index(case)}">{escape(case.name)}</a></th>'
        for case in shown
    )
    lines = ""
    for label, own in by_label(rows).items():
        about = families.named(own[0].family).name if own[0].family else ""
        name = f'<th scope="row" role="rowheader">{escape(label)} <small>{escape(about)}</small></th>'
        if can_run(own):
            found = {r.setting(CASE): r for r in own}
            cells = "".join(_cell(case.name, found.get(case.name), said) for case in shown)
        else:
            why = escape(f"can’t run here: it {own[0].reason}")
            cells = f'<td role="cell" class="fx-cannot" colspan="{len(shown)}">{why}</td>'
        lines += f'<tr role="row">{name}{cells}</tr>\n'
    caption = "What becomes of the image of a pipeline that has a technique on. " + note
    table = (
        f'<table class="fx-table fx-survive" role="table"><caption><span>{inline(caption)}</span></caption>'
        f'<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">technique or recipe</th>{head}</tr>'
        f'</thead>\n<tbody role="rowgroup">{lines}</tbody></table>'
    )
    region = f'<div class="fx-scroll" role="region" tabindex="0" aria-label="{escape(caption)}">{table}</div>'
    return region + _legend() + _sentences(said) + _cases(shown)


def _cell(case: str, row: Row | None, said: dict[str, int]) -> str:
    where, what = f'role="cell" data-case="{escape(case)}"', verdict(row) if row else None
    if row is None or what is None:
        words = '<span aria-hidden="true">–</span><span class="fx-heard">not tried</span>'
        return f'<td {where} class="fx-untried">{words}</td>'
    text, kind = SHORT[what], what.partition(" ")[0]
    if what == RECOMPILED:
        seconds = f", {three_figures(row.shown('lost_s'))} s" if row.shown("lost_s") else ""
        text += f" <small>{row.shown('recompiles')} anew{seconds}</small>"
    if row.reason:
        when = "" if row.shown("when") == PUT_ON.name else f"{row.shown('when')}: "
        number = said.setdefault(f"{when}{row.reason}", len(said) + 1)
        text = f'<a href="#said-{number}" title="{escape(when + row.reason)}">{text} {number}</a>'
    return f'<td {where} class="fx-{kind}">{text}</td>'


def _legend() -> str:
    words = {SHORT[name] + (" … anew" if name == RECOMPILED else ""): about for name, about in VERDICTS.items()}
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(about)}</dd>" for name, about in words.items())
    return f'<dl class="fx-legend">{items}<dt>–</dt><dd>not tried in this configuration</dd></dl>'


def _sentences(said: dict[str, int]) -> str:
    items = "".join(f'<li id="said-{number}">{inline(text)}</li>' for text, number in said.items())
    return f'<details class="fx-said" open><summary>What they say</summary><ol>{items}</ol></details>' if said else ""


def _cases(shown) -> str:
    items = "".join(f'<dt id="case-{EVERY.index(c)}">{escape(c.name)}</dt><dd>{escape(c.about)}</dd>' for c in shown)
    return f'<details class="fx-said" open><summary>What happens</summary><dl class="fx-legend">{items}</dl></details>'
