"""`make analysis`: configurations beside each other, from their committed tables. What does an image cost where?"""

from __future__ import annotations

from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.report import html, site, write_atomic
from fluxnb.report.render import check_page, render_template

FOLDER = "reports/analysis"
CRUMBS = [("../index.html", "fluxnb"), ("index.html", "Analysis")]


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


def table(found: list[site.Configuration], price: dict[str, float]):
    """A row for every technique at full size (the embedded model where there is none) on every configuration."""
    import pandas as pd

    lines = []
    for c in found:
        rows = [r for r in c.ok if r["notebook"] == "13_final_stack" and r["latency_p50"] and r["batch"] == 1]
        full = [r for r in rows if r["weights"] == "random"] or rows
        for r in full:
            hourly = price.get(c.name)
            per_image = r["latency_p50"] * (r["gpus"] or 1)
            lines.append(
                {
                    "configuration": c.name,
                    "model": r["model"],
                    "technique": r["technique"],
                    "GPUs": r["gpus"],
                    "p50": r["latency_p50"],
                    "speedup": r["speedup"],
                    "low": r["speedup_ci_low"],
                    "high": r["speedup_ci_high"],
                    "peak": r["memory_peak_gib"],
                    "images per GPU hour": 3600 / per_image,
                    "per 1,000 images": None if hourly is None else 1000 * per_image / 3600 * hourly,
                }
            )
    return pd.DataFrame(lines)


def write(root: Path, given: list[str]) -> list[Path]:
    """reports/analysis: index.html, summary.csv and a chart for each model; returns their paths, index last."""
    from fluxnb import charts

    found, price = site.configurations(root), prices(given)
    unknown = sorted(set(price) - {c.name for c in found})
    if unknown:
        names = ", ".join(c.name for c in found) or "none"
        raise UserError(f"A price for {', '.join(unknown)}, which has no results: there are {names}.")
    frame = table(found, price)
    if frame.empty:
        raise UserError("No configuration has finished 13_final_stack: run `make report` first.")
    folder = root / FOLDER
    (folder / "charts").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "summary.csv", frame.to_csv(index=False, lineterminator="\n"))
    written, blocks = [folder / "summary.csv"], []
    for model, rows in frame.groupby("model", sort=False):
        labels = [f"{c}: {t}" for c, t in zip(rows.configuration, rows.technique, strict=True)]
        figure = charts.bars(labels, list(rows.speedup), "Speedup over the configuration's own baseline")
        path = folder / "charts" / f"{model.replace('/', '_')}.svg"
        write_atomic(path, html.svg(figure).decode())
        written.append(path)
        said = "; ".join(f"{label} {speedup:.2f}×" for label, speedup in zip(labels, rows.speedup, strict=True))
        blocks.append(html.figure_html(figure, alt=f"Speedups of {model}: {said}.", caption=f"`{model}`"))
    units = {"p50": "s", "peak": "GiB"}
    shown = frame.dropna(axis=1, how="all").set_index("configuration")
    blocks.append(
        html.table_html(
            shown,
            'Every step of the final stack. The price is yours: `make analysis PRICES="h200=3.5"`, in your currency.',
            units={k: v for k, v in units.items() if k in shown},
        )
    )
    text = render_template("blocks.html.j2", "index.html", CRUMBS, title="Configurations side by side", blocks=blocks)
    check_page(text, "analysis")
    write_atomic(folder / "index.html", text)
    return [*written, folder / "index.html"]
