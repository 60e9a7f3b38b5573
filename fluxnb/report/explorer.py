"""The static explorer: a threshold slider over measured settings, the image beside it, its steps, the frontier.

One page for each configuration, made from the committed rows and the images that the notebooks kept in build/. It needs
no server: without JavaScript the page is a plain grid of the same images.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from fluxnb.measure import quality
from fluxnb.report import html, read_json

METHODS = (  # the techniques that have a slider, in this order
    "First Block Cache",
    "TeaCache",
    "combined cache",
    "fixed interval",
    "fewer steps",
    "fewer steps, DPM-Solver++",
)
SHOWN_PX = 256  # sides of the images on the page


@dataclass
class Kept:
    """Images that a notebook kept: one for each input, with their traces."""

    key: dict
    label: str
    inputs: list[tuple[str, int]]
    folder: Path
    traces: list[dict | None]

    def image(self, i: int):
        """The i-th image as it was made."""
        from PIL import Image

        with Image.open(self.folder / f"{i}.png") as image:
            return image.convert("RGB")


def kept(images_dir: Path) -> list[Kept]:
    """Everything that was kept below a folder."""
    from fluxnb.study import ABOUT

    found = []
    for path in sorted(images_dir.glob(f"*/{ABOUT}")):
        about, traces = read_json(path), path.parent / "traces.json"
        if about and traces.is_file():
            inputs = [tuple(pair) for pair in about["inputs"]]
            found.append(Kept(about["key"], about["label"], inputs, path.parent, json.loads(traces.read_text())))
    return found


def collect(rows: list[dict], images: list[Kept]) -> tuple[dict, list[dict]]:
    """(data, figures): what the page's script needs, and every image once.

    Args:
        rows: finished rows of a configuration.
        images: of `kept`.
    """
    by_key = {_name(k.key): k for k in images}
    cases: dict[str, dict] = {}
    figures: list[dict] = []
    shown: dict[tuple, int] = {}

    def figure(own: Kept, i: int, caption: str) -> int:
        place = (own.folder.name, i)
        if place not in shown:
            shown[place] = len(figures)
            uri, size = html.webp_uri(own.image(i), SHOWN_PX)
            prompt, seed = own.inputs[i]
            figures.append({"uri": uri, "size": size, "caption": caption, "alt": f"{prompt}, seed {seed}: {caption}"})
        return shown[place]

    for row in rows:
        own = by_key.get(_name(row))
        if own is None or row["technique"] not in (*METHODS, "baseline") or row["speedup"] is None:
            continue
        if row["model"] != "embedded" or row["batch"] != 1 or not _comparable(row, rows, by_key):
            continue
        case = cases.setdefault(row["use_case"], {"inputs": [], "baseline": {}, "methods": {}})
        first = by_key[_name(_baseline(row, rows, by_key))]
        for i, (prompt, seed) in enumerate(first.inputs):
            case["baseline"][_input(case, prompt, seed)] = figure(first, i, "baseline")
        if row["technique"] == "baseline":
            continue
        points = case["methods"].setdefault(_method(row, own), {})
        point = points.setdefault(own.label, _point(row, own))
        for i, (prompt, seed) in enumerate(own.inputs):
            if (prompt, seed) not in first.inputs:
                continue
            reference = first.image(first.inputs.index((prompt, seed)))
            decibels = quality.psnr(reference, own.image(i))
            trace = own.traces[i] or {}
            point["images"][_input(case, prompt, seed)] = {
                "figure": figure(own, i, own.label),
                "psnr": None if math.isinf(decibels) else round(decibels, 1),
                "mask": trace.get("mask"),
                "indicator": trace.get("indicator"),
                "threshold": trace.get("threshold"),
            }
    return _ordered(cases), figures


def _name(row: dict) -> str:
    """What kept images and rows share: the key without notebook and configuration."""
    from fluxnb.study.results import KEY

    parts = {k: row.get(k) for k in KEY if k not in ("notebook", "gpu")}
    return json.dumps(_whole({k: v for k, v in parts.items() if v is not None}), sort_keys=True)


def _whole(value):
    """Whole floats as integers: the table writes 0.0 and 0 alike."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _baseline(row: dict, rows: list[dict], by_key: dict) -> dict | None:
    """The baseline that a row was compared with: same inputs, use case and notebook, full steps."""
    found = [
        r
        for r in rows
        if r["technique"] == "baseline"
        and all(r[k] == row[k] for k in ("notebook", "model", "use_case", "machine", "batch"))
        and all(r["settings"].get(k) == row["settings"].get(k) for k in ("dtype", "inputs"))
        and _name(r) in by_key
    ]
    return max(found, key=lambda r: r["steps"], default=None)


def _comparable(row: dict, rows: list[dict], by_key: dict) -> bool:
    baseline = _baseline(row, rows, by_key)
    fewer = row["technique"].startswith("fewer steps")
    return baseline is not None and (fewer or row["steps"] == baseline["steps"])


def _input(case: dict, prompt: str, seed: int) -> int:
    pair = [prompt, seed]
    if pair not in case["inputs"]:
        case["inputs"].append(pair)
    return case["inputs"].index(pair)


def _method(row: dict, own: Kept) -> str:
    """The slider that a setting is on: what varies more than the threshold has one of its own."""
    plain = own.label.split(" ")[0] in ("FBCache", "TeaCache") and "+" not in own.label and "," not in own.label
    return row["technique"] if plain or row["technique"] not in METHODS[:2] else f"{row['technique']}, strategies"


def _point(row: dict, own: Kept) -> dict:
    return {
        "label": own.label,
        "threshold": row["settings"].get("threshold"),
        "speedup": round(row["speedup"], 3),
        "low": row["speedup_ci_low"],
        "high": row["speedup_ci_high"],
        "steps": row["computed_steps"],
        "total": row["total_steps"],
        "psnr": row["psnr_db"],
        "adherence": row["adherence"],
        "images": {},
    }


def _ordered(cases: dict[str, dict]) -> dict:
    """Use cases with their methods as lists, each from the most computed steps to the fewest."""
    made = []
    for name, case in cases.items():
        names = [name for m in METHODS for name in (m, f"{m}, strategies") if name in case["methods"]]
        methods = [{"name": m, "points": sorted(case["methods"][m].values(), key=_place)} for m in names]
        if methods:
            made.append({"name": name, "inputs": case["inputs"], "baseline": case["baseline"], "methods": methods})
    return {"cases": made}


def _place(point: dict) -> tuple:
    """Along the slider: from the most computed steps to the fewest, thresholds upwards where steps are alike."""
    return -point["steps"], point["threshold"] or 0.0, point["speedup"]


def explorer_html(gpu: str, rows: list[dict], images: list[Kept], crumbs: list) -> str | None:
    """The page; None where no method has two settings whose images were kept: a slider goes from one to another."""
    from fluxnb.report.render import TEMPLATES, render_template

    data, figures = collect(rows, images)
    if not any(len(method["points"]) > 1 for case in data["cases"] for method in case["methods"]):
        return None
    grid = []
    for case in data["cases"]:
        for index, (prompt, seed) in enumerate(case["inputs"]):
            ids = [case["baseline"][index]]
            ids += [p["images"][index]["figure"] for m in case["methods"] for p in m["points"] if index in p["images"]]
            grid.append({"title": f"{case['name']}: {prompt}, seed {seed}", "ids": list(dict.fromkeys(ids))})
    return render_template(
        "explorer.html.j2",
        "explorer.html",
        crumbs,
        gpu=gpu,
        figures=figures,
        grid=grid,
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("</", "<\\/"),
        script=(TEMPLATES / "fluxnb" / "explorer.js").read_text(encoding="utf-8"),
    )
