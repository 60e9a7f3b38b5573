"""What lies above the reports: the front page of all configurations, the ledger of claims, the progress files.

Everything is computed from the committed tables (results.csv, run.json, pages.json) of every configuration, so it can
be made again from a clone without executing anything.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fluxnb import findings
from fluxnb.findings import ledger
from fluxnb.report import html, read_json, sources, write_atomic
from fluxnb.report.index import STATUS, index_html
from fluxnb.report.progress import cannot_run, progress_md
from fluxnb.report.render import PAGES, TEMPLATES, Page, check_page, render_template, title_of
from fluxnb.report.run import duration
from fluxnb.study.results import Results

CRUMBS = [("index.html", "fluxnb"), ("ledger.html", "Ledger of claims")]
LEDGER_COLUMNS = [
    ("technique", "text"),
    ("verdict", "text"),
    ("theirs", "number"),
    ("ours", "number"),
    ("reason", "text"),
    ("their setting", "text"),
    ("our setting", "text"),
    ("source", "text"),
]
EXPLORER = "explorer.html"
DIVIDED = "11_parallel"


@dataclass
class Configuration:
    """The committed results of one GPU configuration."""

    name: str
    folder: Path
    run: dict
    pages: list[Page]
    rows: list[dict]

    @property
    def ok(self) -> list[dict]:
        return [r for r in self.rows if r["status"] == "ok"]


def configurations(root: Path) -> list[Configuration]:
    """Every folder below reports/ that holds results, those on a GPU first; smoke tests left out."""
    found = []
    for path in sorted((root / "reports").glob("*/**/results.csv")):
        folder = path.parent
        if folder.name == "smoke":
            continue
        kept, every = read_json(folder / PAGES), Results(path).rows()
        rows, counts, pages = ledger.latest(every), Counter(r["notebook"] for r in every), []
        gpus = 1 if folder.parent.name == "single_gpu" else 2
        for source in sources(root, gpus):
            if facts := kept.get(source.stem):
                page = Page(source.stem, facts.get("title", source.stem), facts["status"], facts["state"])
                page.finding, page.problem = facts["finding"], facts["problem"]
            else:
                page = Page(source.stem, title_of(source), "missing", problem="not run yet")
            page.rows = counts[source.stem]
            pages.append(page)
        name = ledger.configuration(folder)
        found.append(Configuration(name, folder, read_json(folder / "run.json"), pages, rows))
    return sorted(found, key=lambda c: (c.name == "cpu", c.name))


def write_progress(gpu: str, folder: Path, pages: list[Page]) -> None:
    """progress.md of one configuration."""
    rows = ledger.latest(Results(folder / "results.csv").rows()) if (folder / "results.csv").is_file() else []
    write_atomic(folder / "progress.md", progress_md(gpu, rows, pages, folder.parent.name != "single_gpu"))


def write_site(root: Path) -> list[Path]:
    """reports/index.html and reports/ledger.html; returns their paths."""
    found = configurations(root)
    if not found:
        return []
    claims = ledger.entries({c.name: c.rows for c in found})
    script = (TEMPLATES / "fluxnb" / "ledger.js").read_text(encoding="utf-8")
    pages = {
        "index.html": render_template("site.html.j2", "index.html", CRUMBS, **front(root, found, claims)),
        "ledger.html": render_template(
            "ledger.html.j2",
            "ledger.html",
            CRUMBS,
            entries=claims,
            counts=ledger.counts(claims),
            sources=ledger.SOURCES,
            columns=LEDGER_COLUMNS,
            sentence=ledger_sentence(claims),
            script=script,
        ),
    }
    written = []
    for name, text in pages.items():
        check_page(text, name)
        write_atomic(root / "reports" / name, text)
        written.append(root / "reports" / name)
    return written


def write_index(root: Path, c: Configuration) -> None:
    """The index of one configuration, from what is remembered of its pages."""
    above = "../" * len(c.folder.relative_to(root / "reports").parts) + "index.html"
    explorer = EXPLORER if (c.folder / EXPLORER).is_file() else None
    text = index_html(c.pages, c.run, c.name, above, explorer)
    check_page(text, "index")
    write_atomic(c.folder / "index.html", text)


def write_explorer(gpu: str, folder: Path, build: Path) -> Path | None:
    """explorer.html of a configuration; an older one stays where the images aren't here to make it again."""
    from fluxnb.report.explorer import explorer_html, kept

    table = folder / "results.csv"
    rows = [r for r in Results(table).rows() if r["status"] == "ok"] if table.is_file() else []
    text = explorer_html(gpu, rows, kept(build / "images"), [("index.html", f"fluxnb {gpu}"), (EXPLORER, "Explorer")])
    if text is None:
        return None
    check_page(text, EXPLORER)
    write_atomic(folder / EXPLORER, text)
    return folder / EXPLORER


MARKS = ("<!-- results: written by `make site` -->", "<!-- end of results -->")


def results_table(found: list[Configuration]) -> str:
    """The README's table: for each configuration the best choice for each goal, as Markdown."""
    import pandas as pd

    lines = [
        "| configuration | goal | choose | speedup | per image | PSNR | adherence |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found:
        if (divided := soonest(c)) is not None:
            goal = f"one image on {divided['gpus']} GPUs, over the same on one"
            chosen = f"{_stack_label(divided['settings'])} | {divided['speedup']:.2f}× | {divided['latency_p50']:.2f} s"
            lines.append(f"| {c.name} | {goal} | {chosen} | same arithmetic | – |")
        table = recipes(c)
        if table is None:
            continue
        for goal, row in table.iterrows():
            kept = "–" if pd.isna(row["adherence"]) else f"{row['adherence']:.0%}"
            # without a judged image there is none to call identical: it is the order of operations that differs
            psnr = (
                ("same arithmetic" if kept == "–" else "identical") if pd.isna(row["PSNR"]) else f"{row['PSNR']:.1f} dB"
            )
            seconds = f"{row['p50']:.2f} s"
            lines.append(
                f"| {c.name} | {goal} | {row['choose']} | {row['speedup']:.2f}× | {seconds} | {psnr} | {kept} |"
            )
    return "\n".join(lines)


def write_readme(root: Path) -> bool:
    """Puts the table between the README's marks; whether the README has them."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not all(mark in text for mark in MARKS):
        return False
    before, rest = text.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    write_atomic(path, f"{before}{MARKS[0]}\n{results_table(configurations(root))}\n{MARKS[1]}{after}")
    return True


# --- the front page ---------------------------------------------------------------------------------------


def front(root: Path, found: list[Configuration], claims: list[ledger.Entry]) -> dict:
    """What the front page shows: headlines, what is missing, and a section for each configuration."""
    parts = []
    for c in found:
        table = recipes(c)
        blocks = [html.table_html(table, f"What to choose on {c.name}, by goal.")] if table is not None else []
        if (chart := frontier(c)) is not None:
            blocks.append(chart)
        parts.append(
            {
                "name": c.name,
                "href": _link(root, c, "index.html"),
                "explorer": _link(root, c, EXPLORER) if (c.folder / EXPLORER).is_file() else None,
                "progress": _link(root, c, "progress.md"),
                "machine": _machine(c),
                "rows": len(c.ok),
                "pages": len(c.pages),
                "done": sum(p.status == "ok" for p in c.pages),
                "blocks": blocks,
                "reports": _reports(root, c),
            }
        )
    return {
        "headlines": [html.callout_html(sentence) for sentence in headlines(found)],
        "not_measured": not_measured(found),
        "configurations": parts,
        "ledger_sentence": ledger_sentence(claims),
    }


def headlines(found: list[Configuration]) -> list[str]:
    """One sentence for each configuration: the fastest lossless choice and the fastest that keeps adherence.

    Of several GPUs, what the report on dividing an image found.
    """
    said = []
    for c in found:
        divided = next((p for p in c.pages if p.stem == DIVIDED and p.finding), None)
        if soonest(c) is not None and divided:
            said.append(f"On {c.name}: {divided.finding}")
        if (table := recipes(c)) is not None:
            chosen = [f"{goal}: **{row['speedup']:.2f}×** with {row['choose']}" for goal, row in table.iterrows()]
            said.append(f"On {c.name}, {'; '.join(chosen[:2])}.")
    return said


def _labelled(row: dict) -> dict:
    """A row with words for its setting: the technique, and what the settings say beyond number format and inputs."""
    settings = {k: v for k, v in row["settings"].items() if k not in ("dtype", "inputs")}
    if row["technique"] in ("First Block Cache", "TeaCache", "combined cache", "fixed interval"):
        return {**row, "label": _cache_label(row["technique"], settings)}
    if row["technique"].startswith("fewer steps"):
        return {**row, "label": f"{row['technique']}: {row['steps']}"}
    if row["notebook"] == "13_final_stack" and row["technique"] != "baseline":
        return {**row, "label": _stack_label(settings) or row["technique"]}
    return {**row, "label": row["technique"]}


_SAID = {  # setting of a stack -> words for its value
    "quantization": lambda v: v.replace("torchao", "TorchAO"),
    "compile": lambda v: f"compiled {v}",
    "fused_qkv": lambda v: "fused QKV of single blocks" if v == "single" else "fused QKV",
    "fused_gelu": lambda v: "fused GELU",
    "fused_rope": lambda v: "fused RoPE",
    "modulation": lambda v: f"modulation {v}",
    "attention": lambda v: f"{v} attention",
    "vae": lambda v: f"VAE {v}",
    "text": lambda v: "text encoders compiled" if v == "compiled" else f"text encoders in a {v}",
    "pixels": lambda v: v,
    "hooks": lambda v: "no search for hooks",
    "cuda_graph": lambda v: "CUDA graph of the blocks" if v == "blocks" else "CUDA graph",
    "mask": lambda v: f"{v.count('1')} of {len(v)} steps computed",
    "every": lambda v: f"every {v} steps computed",
    "order": lambda v: f"Taylor {v}",
    "ulysses": lambda v: f"Ulysses {v}" if v > 1 else "",
    "gather": lambda v: f"keys and values of {v} GPUs gathered" if v > 1 else "",
    "pull": lambda v: "by copy engines",
}


def _stack_label(settings: dict) -> str:
    """What is switched on, in words."""
    return ", ".join(filter(None, (say(settings[name]) for name, say in _SAID.items() if settings.get(name))))


def _cache_label(technique: str, settings: dict) -> str:
    how = f" + Taylor {settings['order']}" if "order" in settings else ""
    if technique == "fixed interval":
        return f"every {settings['every']}{how}"
    if technique == "combined cache":
        gates = (settings["first"], settings["second"])
        return f"{settings['rule']} {'/'.join(format(g['threshold'], 'g') for g in gates)}{how}"
    short = {"First Block Cache": "FBCache"}.get(technique, technique)
    return f"{short} {settings['threshold']:g}{how}"


def recipes(c: Configuration):
    """The best row for each goal as a table; None where nothing was judged.

    Where a full-size stack was measured it is chosen from, with the quality of the same arithmetic on the embedded
    model; otherwise from what the embedded model was measured with.
    """
    stack = [_labelled(r) for r in c.ok if r["notebook"] == "13_final_stack" and r["speedup"] is not None]
    judged = [r for r in stack if r["weights"] == "trained"]
    full = [r for r in stack if r["weights"] == "random"]
    if not full:
        judged = [_labelled(r) for r in _judged_caches(c)]
    if not any(r["technique"] == "baseline" for r in judged):
        return None
    return findings.recommendations(full or judged, judged)


def soonest(c: Configuration) -> dict | None:
    """The row of one image divided over GPUs that is there first, at full size and unquantized, without a cache."""
    own = [r for r in findings.divided(c.rows) if r["technique"] == "context parallel" and r["speedup"] is not None]
    return min(own, key=lambda r: r["latency_p50"], default=None)


def _judged_caches(c: Configuration) -> list[dict]:
    notebook, steps = "07_combined_cache", 28
    own = [r for r in c.ok if r["notebook"] == notebook and r["model"] == "embedded" and r["speedup"] is not None]
    return [
        r for r in own if (r["steps"] == steps or r["technique"].startswith("fewer")) and r["batch"] == 1 and _judged(r)
    ]


def _judged(row: dict) -> bool:
    return row["technique"] == "baseline" or (row["psnr_db"] is not None and row["adherence"] is not None)


def frontier(c: Configuration) -> str | None:
    """Speed against quality of the caches and of their controls, as a figure; None without rows."""
    from fluxnb.report import charts

    rows = [_labelled(r) for r in _judged_caches(c)]
    rows = [r for r in rows if not (r["technique"] == "baseline" and r["steps"] != 28)]
    if sum(r["technique"] != "baseline" for r in rows) < 3:
        return None
    shown = (
        findings.frontier_alt(rows, "combined cache") if findings.of(rows, "combined cache") else "Speed against PSNR."
    )
    return html.figure_html(
        charts.frontier(rows, annotate=("fewer steps",)),
        alt=f"{c.name}: {shown}",
        caption="The embedded model: wall clock against quality. Further right is faster, further up is nearer to the "
        "uncached image; a technique has to lie above the dashed lines, which just use fewer steps.",
    )


def not_measured(found: list[Configuration]) -> list[str]:
    """What a reader should know is missing, first."""
    lines = [
        "FLUX.1's own weights: full-size figures are of random weights (time and memory), quality is that of the "
        "embedded model."
    ]
    if not any(r["gpus"] and r["gpus"] > 1 for c in found if c.name != "cpu" for r in c.ok):
        lines.append("More than one GPU.")
    for c in found:
        for page in c.pages:
            if page.status != "ok":
                lines.append(f"{c.name}, {page.title}: {page.problem or page.status}")
        cannot = [t for t in cannot_run(c.rows) if not t.startswith(("ceiling", "attention kernel"))]  # not techniques
        if cannot:
            lines.append(f"{c.name} can't run {'; '.join(sorted(cannot))}: the reports say why.")
    return lines


def ledger_sentence(claims: list[ledger.Entry]) -> str:
    """How many claims hold."""
    n = ledger.counts(claims)
    tried = n["reproduced"] + n["not reproduced"]
    return (
        f"Of {len(claims)} published claims {tried} could be put to the test: {n['reproduced']} are reproduced, "
        f"{n['not reproduced']} are not. {n['not comparable']} are not comparable, {n['not run']} were not run."
    )


def _reports(root: Path, c: Configuration) -> list[dict]:
    return [
        {
            "href": _link(root, c, page.href) if (c.folder / page.href).is_file() else None,
            "title": page.title,
            "status": page.status,
            "status_text": STATUS[page.status],
            "finding": page.finding,
            "time": duration(page.state["seconds"]) if page.state.get("seconds") is not None else "–",
            "rows": page.rows,
            "date": (page.state.get("finished") or "–")[:10],
        }
        for page in sorted(c.pages, key=lambda p: p.stem)
    ]


def _machine(c: Configuration) -> str:
    machine = c.run.get("machine") or {}
    gpus = machine.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]['name']}" if len(gpus) > 1 else str(gpus[0]["name"])
    return str(machine.get("cpu") or "no GPU")


def _link(root: Path, c: Configuration, name: str) -> str:
    return (c.folder / name).relative_to(root / "reports").as_posix()
