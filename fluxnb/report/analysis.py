"""`make analysis`: configurations beside each other, from their committed tables. What does an image cost where?"""

from __future__ import annotations

from pathlib import Path

from fluxnb import families, notebooks, stacks
from fluxnb.errors import UserError
from fluxnb.findings import documents
from fluxnb.findings.rows import divided, ends, is_baseline, of, peak_gib
from fluxnb.installed import need
from fluxnb.measure import stats
from fluxnb.report import charts, html, write_atomic
from fluxnb.report.audit import check_page
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.report.render import render_template
from fluxnb.study.row import Row
from fluxnb.techniques import kinds

FOLDER, SUMMARIES = "reports/analysis", "summaries"
CRUMBS = [("../index.html", "fluxnb"), ("index.html", "Analysis")]
BF16, BY_HOST = "BF16", "BF16, set off by the host"
FP8, CACHED = "with quantization", "with quantization and a schedule"
SAID = (  # of what stands at a stack's speedup
    "each over its own configuration's baseline; random weights show time and memory only, and the steps that a cache "
    "computes are prescribed there, not decided by looking at an image"
)
WHISKERS = f"Whiskers: the speedup's interval, or of fewer than {stats.LEAST} rounds their range, where it is known"
FEW = f" Where n stands, there are too few rounds for a result, which takes {stats.HEADLINE}."
SERIES = {  # of one image on several GPUs -> its stacks
    BF16: stacks.recorded(quantized=False),
    FP8: stacks.recorded(quantized=True),
    CACHED: stacks.recorded(quantized=True, cached=True),
    BY_HOST: stacks.SET_OFF,
}


CUMULATIVE, ALONE = "part by part", "by itself"  # what a bar has more: all above it, or nothing
PHASES = {stack.name for stack in stacks.phases(next(iter(kinds.TORCHAO)), list(stacks.AROUND))}


def prices(given: list[str]) -> dict[str, float]:
    """["h200=3.5"] as {"h200": 3.5}: what a GPU hour costs. Raises UserError for anything else."""
    found = {}
    for pair in given:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if not name or not 0 <= found[name] < 1e6:
            raise UserError(f"A price of {pair!r}: write configuration=price of an hour, such as h200=3.5.")
    return found


def table(found: list[Configuration], price: dict[str, float]):
    """A row for every stack at full size (the embedded model where there is none) on every configuration."""
    pd = need("pandas", "The analysis")

    lines = []
    for c in found:
        for r in _today(c):
            on_gpu = bool((c.run.get("machine") or {}).get("gpus"))
            per_image = r.latency_p50 * (r.gpus or 1)
            low, high = ends(r) or (None, None)
            lines.append(
                {
                    "technique": r.label,
                    "part": CUMULATIVE if r.stack in PHASES else ALONE,
                    "configuration": c.name,
                    "model": r.model,
                    "weights": r.weights,
                    "computed": f"{r.computed_steps:.3g} of {r.total_steps}" if r.computed_steps else None,
                    "GPUs": r.gpus if on_gpu else 0,
                    "p50": r.latency_p50,
                    "speedup": r.speedup,
                    "low": low,
                    "high": high,
                    "n": r.n,
                    "session": r.session,
                    "peak": peak_gib(r),
                    "images per GPU hour": 3600 / per_image if on_gpu else None,
                    "per 1,000 images": _cost(price.get(c.name), r),
                }
            )
    return pd.DataFrame(lines)


def _cost(hourly: float | None, row: Row) -> float | None:
    """Of 1,000 images one after the other, where it is known what an hour of a GPU costs."""
    return None if hourly is None else 1000 * row.latency_p50 * (row.gpus or 1) / 3600 * hourly


def _today(c: Configuration) -> list[Row]:
    """The rows of the final stack as it is today, at full size if there are any: parts that left it are no choice."""
    rows = [r for r in c.ok if r.notebook == notebooks.FINAL_STACK and r.latency_p50 and r.batch == 1 and r.model]
    if full := [r for r in rows if r.weights == "random"]:
        kind, around = next(iter(kinds.TORCHAO)), list(stacks.AROUND)  # names don't depend on them, nor on steps
        every = (
            *stacks.phases(kind, around),
            *stacks.cached(kind, around, 28, 12),
            *stacks.advanced(28, around, 0.5, 0.5),
        )
        names = {*stacks.SHORTLIST, *(stack.name for stack in every)}
        known = [r for r in full if (r.stack or "").partition(", cached")[0] in names]
        return [r for r in full if r in known or is_baseline(r) or families.named(r.family).control]
    return [r for r in rows if r.session] or rows


def scaling(found: list[Configuration], price: dict[str, float] | None = None):
    """One image on 2, 4, 8 GPUs at full size: each configuration's soonest row of each series, over the same on one.

    Series: BF16 and quantized, both in CUDA graphs; quantized under a schedule; BF16 whose kernels the host sets off.
    """
    pd = need("pandas", "The analysis")

    lines = []
    for c in found:
        rows = divided(c.rows)
        copies = next((r.images_per_s for r in reversed(of(rows, families.REPLICAS, stacks.REPLICAS))), None)
        for series, names in SERIES.items():
            own = (r for r in of(rows, *names) if r.speedup is not None)
            if r := min(own, key=lambda r: r.latency_p50, default=None):
                lines.append(
                    {
                        "configuration": c.name,
                        "kind": c.folder.name,
                        "series": series,
                        "GPUs": r.gpus,
                        "p50": r.latency_p50,
                        "alone": r.baseline_s or r.shown("alone_s"),
                        "speedup": r.speedup,
                        **dict(zip(("low", "high"), ends(r) or (None, None), strict=True)),
                        "n": r.n,
                        "session": r.session,
                        "efficiency": r.speedup / r.gpus,
                        "per 1,000 images": _cost((price or {}).get(c.name), r),
                        "communication": r.shown("communication"),
                        "images/s": r.images_per_s,
                        "images/s of copies": copies if series in (BF16, BY_HOST) else None,
                    }
                )
    return pd.DataFrame(lines)


def scaling_sentence(frame) -> str:
    """How much sooner an image is there on more GPUs, and on how many it is sooner still when quantized."""
    sentences = []
    for kind, own in frame.groupby("kind", sort=False):
        plain, quantized = (own[own.series == name].set_index("GPUs").sort_index() for name in (BF16, FP8))
        if plain.empty:
            continue
        said = ", ".join(f"**{r.speedup:.2f}×** on {on} ({r.p50:.3g} s, n = {r.n})" for on, r in plain.iterrows())
        sentences.append(f"An image of one {kind} is there sooner on several, in BF16: {said}.")
        if both := [n for n in plain.index if n in quantized.index and plain.session[n] == quantized.session[n]]:
            gains = {n: plain.p50[n] / quantized.p50[n] for n in both}
            sooner = ", ".join(f"{gain:.2f}× on {n}" for n, gain in gains.items() if gain > 1)
            later = ", ".join(f"on {n} ({gain:.2f}×)" for n, gain in gains.items() if gain <= 1)
            how = [f"sooner by another {sooner}"] * bool(sooner) + [f"no sooner {later}"] * bool(later)
            sentences.append(f"Quantized, too, it is there {', and '.join(how)}, in the same session.")
    if sentences and (frame.n < stats.HEADLINE).any():
        sentences.append(f"Of fewer than {stats.HEADLINE} rounds (n) that is no result yet.")
    return " ".join(sentences) or "No image was divided with its kernels recorded."


def _scaling_blocks(found: list[Configuration], folder: Path, price: dict) -> tuple[list[str], list[Path]]:
    frame = scaling(found, price)
    if frame.empty:
        return [], []
    said = "; ".join(f"{r.series} {r.speedup:.2f}× on {r.GPUs}" for r in frame.itertuples())
    figure, path = charts.scaling(frame), folder / "charts" / "scaling.svg"
    write_atomic(path, html.svg(figure).decode())
    write_atomic(folder / SUMMARIES / "scaling.csv", frame.to_csv(index=False, lineterminator="\n"))
    blocks = [
        "<h2>One image on several GPUs</h2>",
        html.callout_html(scaling_sentence(frame), "result" if (frame.n >= stats.HEADLINE).all() else "note"),
        html.figure_html(
            figure,
            alt=f"Speedups of one divided image: {said}.",
            caption="One image divided over GPUs, at full size: each line over the same pipeline alone on one of them. "
            "Dashed: nothing lost.",
        ),
        html.table_html(
            frame.drop(columns="kind").dropna(axis=1, how="all").set_index("configuration"),
            "The soonest image of each kind, over the same alone on one GPU of that machine. Communication: its share "
            "of a step's kernels; kernels that run at the same time count each. Copies: as many that share nothing. "
            "Efficiency: the speedup over the number of GPUs.",
            units={"p50": "s", "alone": "s", "speedup": "×"},
        ),
    ]
    return blocks, [folder / SUMMARIES / "scaling.csv", path]


def _summaries(found: list[Configuration], frame, folder: Path) -> list[Path]:
    """The final stack's table, and every line of the documents with the rows that answer it, as a table and a page."""
    folder.mkdir(parents=True, exist_ok=True)
    answered = documents.answers([r for c in found for r in c.rows])
    lines = documents.tables(answered)
    whole = need("pandas", "The analysis").concat(lines, names=["document"])
    for name, table_ in (("summary.csv", frame), ("documents.csv", whole.reset_index())):
        write_atomic(folder / name, table_.to_csv(index=False, lineterminator="\n"))
    blocks = [html.callout_html(documents.sentence(answered))]
    for document, own in lines.items():
        title = document[:1].upper() + document[1:]
        blocks += [f"<h2>{html.inline(title)}</h2>", html.table_html(own.replace("`", "", regex=True), f"{title}.")]
    crumbs = [("documents.html", "Documents"), *((f"../{address}", title) for address, title in reversed(CRUMBS))]
    title = "The five documents, line by line"
    text = render_template("blocks.html.j2", "documents.html", crumbs, title=title, blocks=blocks)
    check_page(text, "documents")
    write_atomic(folder / "documents.html", text)
    return [folder / name for name in ("summary.csv", "documents.csv", "documents.html")]


def _panel(part: str, rows) -> tuple:
    """(chart, alt text, caption) of one configuration: phases in their order, single settings the fastest first."""
    rows = rows if part == CUMULATIVE else rows.sort_values("speedup", ascending=False, kind="stable")
    rows = rows.drop_duplicates("technique")  # of two sessions' baselines one
    names = [f"{r.technique} (n = {r.n})" if r.n < stats.HEADLINE else r.technique for r in rows.itertuples()]
    low, high = (rows[end].astype(float).fillna(rows.speedup) for end in ("low", "high"))
    errors = [list((rows.speedup - low).clip(0)), list((high - rows.speedup).clip(0))]
    model, said = rows.model.iloc[0], "; ".join(f"{r.technique} {r.speedup:.2f}×" for r in rows.itertuples())
    what = "Each bar has all that stands above it" if part == CUMULATIVE else "Each bar by itself, the fastest first"
    figure = charts.bars(names, list(rows.speedup), "Speedup over the plain baseline", None, errors)
    few = FEW * bool((rows.n < stats.HEADLINE).any())
    return figure, f"Speedups of {model}, {part}: {said}.", f"{what}: `{model}`, {SAID}. {WHISKERS}.{few}"


def write(root: Path, given: list[str]) -> list[Path]:
    """reports/analysis: index.html, the tables and the charts; returns their paths, index last."""
    found, price = configurations(root), prices(given)
    unknown = sorted(set(price) - {c.name for c in found})
    if unknown:
        names = ", ".join(c.name for c in found) or "none"
        raise UserError(f"A price for {', '.join(unknown)}, which has no results: there are {names}.")
    frame = table(found, price)
    if frame.empty:
        raise UserError(f"No configuration has finished {notebooks.FINAL_STACK}: run `make report` first.")
    folder = root / FOLDER
    (folder / "charts").mkdir(parents=True, exist_ok=True)
    written = _summaries(found, frame, folder / SUMMARIES)
    blocks = []
    for (name, model), rows in frame.dropna(subset="speedup").groupby(["configuration", "model"], sort=False):
        blocks.append(f"<h2>{html.inline(name)}: {html.inline(model)}</h2>")
        for part, own in rows.groupby("part", sort=False):
            figure, file = _panel(part, own), f"{name} {model} {part}".replace("/", "_").replace(" ", "_")
            path = folder / "charts" / f"{file}.svg"
            write_atomic(path, html.svg(figure[0]).decode())
            written.append(path)
            blocks.append(html.figure_html(*figure))
    units = {"p50": "s", "peak": "GiB", "computed": "steps", "speedup": "×", "low": "×", "high": "×"}
    shown = frame.dropna(axis=1, how="all").set_index("technique")
    blocks.append(
        html.table_html(
            shown,
            f"Every step of the final stack, {SAID}. Low and high: of the speedup's interval, or of fewer than "
            f"{stats.LEAST} rounds (n) their range; a dash where a row of an earlier format has neither. The price is "
            'yours: `make analysis PRICES="h200=3.5"`, in your currency.',
            units={k: v for k, v in units.items() if k in shown},
        )
    )
    blocks.append(f'<p><a href="{SUMMARIES}/documents.html">Every line of the five documents</a>, with its rows.</p>')
    more, files = _scaling_blocks(found, folder, price)
    blocks, written = [*blocks, *more], [*written, *files]
    for old in {*(folder / "charts").glob("*.svg")} - {
        *written,
        folder / "charts" / Path(charts.PICTURE).name,
    }:  # of what there isn't any more
        old.unlink()
    text = render_template("blocks.html.j2", "index.html", CRUMBS, title="Configurations side by side", blocks=blocks)
    check_page(text, "analysis")
    write_atomic(folder / "index.html", text)
    return [*written, folder / "index.html"]
