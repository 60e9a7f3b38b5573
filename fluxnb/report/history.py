"""What changed since: the headline figures as they were at every release of the reference, and as they are.

`reports/history.json` keeps them: `python -m fluxnb reference` appends what the tables say then. So neither git's
history nor an older table is needed to say what changed.
"""

from __future__ import annotations

import html as markup
import json
import math
import uuid
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.findings.rows import ends, is_baseline, overlap, peak_gib, worst_db
from fluxnb.params.reading import plain
from fluxnb.report import html, read_json, write_atomic, write_changed
from fluxnb.report.configurations import Configuration
from fluxnb.report.front import answers, soonest, takes_few
from fluxnb.report.ledger import entries
from fluxnb.study.row import Row

FILE, PAGE, TEXT, FEED = "history.json", "changes.html", "changes.md", "feed.atom"
FORMAT = 1
NOTHING = "Nothing that a headline or a verdict rests on."


def snapshot(found: list[Configuration]) -> dict:
    """The headline figures of committed rows: what is chosen for each goal, how many rows, every claim's verdict."""
    figures, rows = {}, {c.name: len(c.rows) for c in found}
    for c in found:
        if (row := soonest(c)) is not None:
            figures[f"{c.name}, one image on {row.gpus} GPUs"] = _figure(row, row.label)
        for choice in (choice for own in answers(c) for choice in own):
            few = ", four steps" * takes_few(choice.base.model)
            figures[f"{c.name}{few}, {choice.goal.text}"] = _figure(choice.row, choice.label)
    moments = [r.measured_at for c in found for r in c.rows if r.measured_at]
    verdicts: dict[str, str] = {}
    for e in entries(found):
        name = f"{e.claim.technique}, {e.claim.text} ({e.claim.source})"
        verdicts[name if name not in verdicts else f"{name}, {e.claim.setting}"] = e.verdict
    return {"at": max(moments, default=None), "rows": rows, "figures": figures, "verdicts": verdicts}


def read(folder: Path) -> list[dict]:
    """The kept snapshots, oldest first. Raises UserError for a file that is there and isn't a history."""
    path = folder / FILE
    kept = read_json(path)
    parts = {"at": str, "rows": dict, "figures": dict, "verdicts": dict}
    snapshots = kept.get("snapshots") if kept.get("format") == FORMAT else None
    if path.exists() and not (
        isinstance(snapshots, list)
        and all(isinstance(s, dict) and all(isinstance(s.get(n), t) for n, t in parts.items()) for s in snapshots)
        and all(isinstance(f, dict) and "row" in f and "label" in f for s in snapshots for f in s["figures"].values())
    ):
        raise UserError(f"{plain(path, 300)} is no history of figures: restore it from git.")
    return snapshots or []


def keep(folder: Path, found: list[Configuration]) -> None:
    """Appends today's figures, unless they are what was kept last."""
    before, today = read(folder), snapshot(found)
    if found and today["at"] and (not before or before[-1] != today):
        text = json.dumps({"format": FORMAT, "snapshots": [*before, today]}, indent=1, ensure_ascii=False)
        write_atomic(folder / FILE, text + "\n")


def changes(before: dict, after: dict) -> list[str]:
    """What a later snapshot says otherwise than an earlier one, in sentences."""
    said = []
    for name in dict.fromkeys([*before["figures"], *after["figures"]]):
        old, new = before["figures"].get(name), after["figures"].get(name)
        if old is None or new is None:
            said.append(f"{name}: {f'new: {_shown(new)}' if old is None else f'no longer said; it was {_shown(old)}'}.")
        elif {**old, "row": ""} != {**new, "row": ""}:
            told = "" if old["label"] != new["label"] else _told(old, new)
            said.append(f"{name}: {_shown(new)}; it was {_shown(old)}{told}.")
    for name in dict.fromkeys([*before["verdicts"], *after["verdicts"]]):
        old, new = before["verdicts"].get(name, "not in the ledger"), after["verdicts"].get(name, "not in the ledger")
        if old != new:
            said.append(f"Claim {name}: {new}; it was {old}.")
    for name in dict.fromkeys([*before["rows"], *after["rows"]]):
        old, new = before["rows"].get(name, 0), after["rows"].get(name, 0)
        if old != new:
            said.append(f"{name}: {new:,} rows on the pages; there were {old:,}.")
    return said


def timeline(snapshots: list[dict], today: dict) -> list[tuple[str, str, list[str]]]:
    """(time of the newest row, title, sentences) of every change, the newest first; the first one is the beginning."""
    states = [*snapshots, *([today] if today["at"] and (not snapshots or snapshots[-1] != today) else [])]
    found = [
        (after["at"], f"Rows up to {_day(after['at'])}, before them up to {_day(before['at'])}", changes(before, after))
        for before, after in zip(states, states[1:], strict=False)
    ]
    begun = [(s["at"], f"Rows up to {_day(s['at'])}", [f"{n}: {_shown(f)}." for n, f in s["figures"].items()])
             for s in states[:1]]  # fmt: skip
    return [*begun, *found][::-1]


def write(folder: Path, found: list[Configuration]) -> list[Path]:
    """The changelog as a page, as Markdown and as an Atom feed; their paths."""
    from fluxnb.report.audit import check_page
    from fluxnb.report.render import render_template

    lines = timeline(read(folder), snapshot(found))
    also = f'as <a href="{TEXT}">Markdown</a> and as a <a href="{FEED}">feed</a>'
    about = "Computed from the rows: what is recommended, its figures, and the verdicts of the ledger"
    blocks = [f"<p>{about}; {also}.</p>"]
    for _, title, said in lines:
        items = "".join(f"<li>{html.inline(one)}</li>" for one in said or [NOTHING])
        blocks.append(f"<h2>{html.inline(title)}</h2><ul>{items}</ul>")
    crumbs = [(PAGE, "What changed"), ("index.html", "fluxnb")]
    page = render_template("blocks.html.j2", PAGE, crumbs, title="What changed since", blocks=blocks)
    check_page(page, PAGE)
    text = "\n\n".join(["# What changed since", *(f"## {title}\n\n" + "\n".join(f"- {s}" for s in said or [NOTHING])
                                                 for _, title, said in lines)])  # fmt: skip
    for name, content in ((PAGE, page), (TEXT, text + "\n"), (FEED, _feed(lines))):
        write_changed(folder / name, content)
    return [folder / name for name in (PAGE, TEXT, FEED)]


def _feed(lines: list[tuple[str, str, list[str]]]) -> str:
    def named(*parts: str) -> str:
        return f"<id>urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, ' '.join(('fluxnb', *parts)))}</id>"

    def entry(at: str, title: str, said: list[str]) -> str:
        content = markup.escape("".join(f"<li>{html.inline(one)}</li>" for one in said or [NOTHING]))
        head = f"{named(title, *said)}<title>{markup.escape(title)}</title><updated>{at}</updated>"
        body = f'<link href="{PAGE}"/><content type="html">&lt;ul&gt;{content}&lt;/ul&gt;</content>'
        return f"<entry>{head}{body}</entry>\n"

    head = '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">\n<title>fluxnb: what '
    head += f"changed</title><author><name>The fluxnb authors</name></author>{named()}"
    newest = max((at for at, _, _ in lines), default="1970-01-01T00:00:00+00:00")
    return f"{head}<updated>{newest}</updated>\n{''.join(entry(*line) for line in lines)}</feed>\n"


def _figure(row: Row, label: str) -> dict:
    """What a headline says of a row, as plain values."""
    found = {"label": label, "row": row.id}
    if is_baseline(row):
        return found
    low, high = ends(row) or (None, None)
    worst = worst_db(row) or math.inf
    numbers = {"speedup": row.speedup, "low": low, "high": high, "seconds": row.latency_p50,
               "memory_gib": peak_gib(row), "worst_db": None if math.isinf(worst) else worst}  # fmt: skip
    return found | {name: float(f"{value:.4g}") for name, value in numbers.items() if value is not None}


def _shown(figure: dict) -> str:
    units = {"speedup": "×", "seconds": " s", "memory_gib": " GiB", "worst_db": " dB worst image"}
    parts = [f"{figure[name]:.3g}{unit}" for name, unit in units.items() if name in figure]
    row = f"row `{figure['row']}`"
    return f"{figure['label']} ({', '.join([*parts, row])})"


def _told(old: dict, new: dict) -> str:
    """Whether two speedups of the same thing can be told apart."""
    if not {"low", "high"} <= old.keys() & new.keys():
        return ""
    alike = overlap((old["low"], old["high"]), (new["low"], new["high"]))
    return ", within the noise" if alike else ", beyond the noise"


def _day(at: str) -> str:
    return at[:16].replace("T", " ")
