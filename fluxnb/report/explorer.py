"""The static explorer: a slider over measured settings, the image beside it, its steps, the frontier.

One page for each configuration, made from its rows and the images that the notebooks kept in build/. It needs no
server: without JavaScript the page is a plain grid of the same images.
"""

from __future__ import annotations

import json
import math

from PIL import Image

from fluxnb import families, findings
from fluxnb.families import Family
from fluxnb.measure import perceptual, quality
from fluxnb.report import html
from fluxnb.report.render import TEMPLATES, render_template
from fluxnb.report.series import OTHERS, dial, lines
from fluxnb.study import kept
from fluxnb.study.kept import Kept
from fluxnb.study.row import Row

SHOWN_PX = 256  # sides of the images on the page
HEAT_PX, HEAT_QUALITY = 128, 75  # of FLIP's heat maps: two kilobytes each
INPUTS = 4  # prompts and seeds on the page, of those that judge: ninety settings make nine megabytes


class _Figures:
    """Every image once, in the order in which it is first asked for."""

    def __init__(self):
        self.all: list[dict] = []
        self._places: dict[tuple, int] = {}

    def add(self, own: Kept, i: int, caption: str) -> int:
        """The place of a candidate's i-th image on the page."""
        if (own.name, i) not in self._places:
            self._places[own.name, i] = len(self.all)
            uri, size = html.webp_uri(own.image(i), SHOWN_PX)
            prompt, seed = own.inputs[i]
            self.all.append({"uri": uri, "size": size, "caption": caption, "alt": f"{prompt}, seed {seed}: {caption}"})
        return self._places[own.name, i]


def collect(rows: list[Row], images: list[Kept]) -> tuple[dict, list[dict]]:
    """(data, figures): what the page's script needs, and every image once.

    Args:
        rows: of a configuration; shown are those that were timed, where their images and their baseline's were kept.
        images: of `kept.every`.
    """
    by_name = {k.name: k for k in images}
    found: dict[tuple, dict] = {}
    baselines = {r.id: by_name.get(kept.digest(r)) for r in rows if r.family == families.BASELINE.name}
    for row in rows:
        own, first = by_name.get(kept.digest(row)), baselines.get(row.baseline)
        if own and first and row.ok and row.speedup and row.batch == 1 and on_a_slider(families.named(row.family)):
            found.setdefault((row.model, row.use_case), {})[own.name] = (row, own, first)  # the newest of a setting
    several, figures = len({model for model, _ in found}) > 1, _Figures()
    cases = [
        {
            "name": f"{model}, {use_case}" if several else use_case,
            "model": model,
            **_case(list(settings.values()), figures),
        }
        for (model, use_case), settings in found.items()
    ]
    return {"cases": cases, "floors": findings.LEVELS}, figures.all


def on_a_slider(family: Family) -> bool:
    """Whether settings of a family are places on one slider: along its dial, or by the steps that a rule computes."""
    return family.dial is not None or family is families.COMBINED


def _case(settings: list[tuple[Row, Kept, Kept]], figures: _Figures) -> dict:
    """One use case: its inputs, the baseline's images, and a slider for each method."""
    inputs: list[tuple] = []
    baseline, points = {}, {}
    for row, own, first in settings:
        for i, given in enumerate(first.inputs[:INPUTS]):
            if given not in inputs:
                inputs.append(given)
                baseline[len(inputs) - 1] = figures.add(first, i, "baseline")
        points[row.id] = _point(row) | {"images": _images(own, first, inputs, figures)}
    methods: dict[str, dict] = {}
    rows = [row for row, _, _ in settings]
    for (family, beside), line in lines(sorted(rows, key=_order)).items():
        name, joined = (f"{family.name}, {OTHERS}", False) if beside else (family.name, family.dial is not None)
        made = methods.setdefault(name, {"name": name, "joined": joined, "points": []})
        made["points"] += [points[row.id] for row in line]
    for method in methods.values():
        method["points"].sort(key=lambda p: (-p["steps"], p["dial"] or 0.0, p["speedup"]))
    return {"inputs": inputs, "baseline": baseline, "methods": list(methods.values())}


def _order(row: Row) -> int:
    """Caches first, then what they have to beat."""
    family = families.named(row.family)
    return families.ALL.index(family) + len(families.ALL) * family.control


def _point(row: Row) -> dict:
    return {
        "id": row.id,
        "label": row.label,
        "mark": row.mark,
        "dial": dial(row),
        "speedup": round(row.speedup, 3),
        "steps": row.computed_steps,
        "total": row.total_steps,
        "psnr": row.psnr_min_db,  # of the worst image, which floors are asked of
        "quality": _quality(row),
    }


def _quality(row: Row) -> str:
    """Mean and worst figures of all images that were judged; "" of earlier rows, which don't say how many."""
    if not findings.judged(row):
        return ""
    figures = {
        "PSNR": (row.psnr_db, row.psnr_min_db, "{:.1f} dB"),
        "ST-LPIPS": (row.st_lpips, row.st_lpips_max, "{:.3f}"),
        "FLIP": (row.flip, row.flip_max, "{:.3f}"),
        "adherence": (row.adherence, row.adherence_min, "{:.0%}"),
    }
    said = [
        f"{name} {as_.format(mean)} (worst {as_.format(worst)})"
        for name, (mean, worst, as_) in figures.items()
        if None not in (mean, worst)
    ]
    same = f", {row.psnr_identical} identical" if row.psnr_identical else ""
    return f"Of {row.images} images{same}: {', '.join(said)}" if said else ""


def _images(own: Kept, first: Kept, inputs: list[tuple], figures: _Figures) -> dict[int, dict]:
    """Input -> its image, how far it is from the baseline's, and what the cache decided."""
    shown = {}
    for i, given in enumerate(own.inputs):
        if given not in inputs or given not in first.inputs:
            continue
        pair = first.image(first.inputs.index(given)), own.image(i)
        decibels, (apart, heat) = quality.psnr(*pair), perceptual.flip(*map(_as_shown, pair))
        trace = own.traces[i] or {}
        shown[inputs.index(given)] = {
            "figure": figures.add(own, i, own.label),
            "psnr": None if math.isinf(decibels) else round(decibels, 1),
            "flip": round(apart, 3),
            "heat": html.webp_uri(heat, HEAT_PX, HEAT_QUALITY)[0],
            **{name: trace.get(name) for name in ("mask", "indicator", "threshold")},
        }
    return shown


def _as_shown(image: Image.Image) -> Image.Image:
    image.thumbnail((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
    return image


def explorer_html(gpu: str, rows: list[Row], images: list[Kept], crumbs: list) -> str | None:
    """The page; None where no method has two settings whose images were kept: a slider goes from one to another."""
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
        models=" and ".join(dict.fromkeys(case["model"] for case in data["cases"])),
        figures=figures,
        grid=grid,
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c"),  # of a prompt, too
        script=(TEMPLATES / "fluxnb" / "explorer.js").read_text(encoding="utf-8"),
    )
