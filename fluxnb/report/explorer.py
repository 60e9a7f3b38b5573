"""The static explorer: a slider over measured settings, the image beside it, its steps, the frontier.

One page for each configuration, made from its rows and the images that the notebooks kept in build/. It needs no
server: without JavaScript the page is a plain grid of the same images. A page also carries its small images on: where
build/ has them no longer, they and what was found between them are taken from the page that is there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

from fluxnb import families, findings, rebuilt, recipes
from fluxnb.families import Family
from fluxnb.measure import perceptual, quality
from fluxnb.report import html
from fluxnb.report.audit import MAX_PAGE_MB
from fluxnb.report.render import TEMPLATES, render_template
from fluxnb.report.series import OTHERS, dial, lines
from fluxnb.study import kept
from fluxnb.study.kept import Kept
from fluxnb.study.results import canonical
from fluxnb.study.row import Row
from fluxnb.study.subject import Input

SHOWN_PX = 256  # sides of the images on the page
HEAT_PX, HEAT_QUALITY = 128, 75  # of FLIP's heat maps: two kilobytes each
INPUTS = 4  # prompts and seeds on the page, of those that judge, and fewer where they don't fit
INPUTS_BESIDE = 1  # of settings that are on no slider
ROOM = 0.95 * MAX_PAGE_MB * 1e6  # bytes
_OF_THE_PAIR = ("psnr", "flip", "heat", "mask", "indicator", "threshold")


@dataclass
class Earlier:
    """What a page that was made earlier has: a candidate's images, and what was found between two of them."""

    images: dict[tuple[str, Input], dict] = field(default_factory=dict)  # (digest, input) -> uri, size
    pairs: dict[tuple[str, str, Input], dict] = field(default_factory=dict)  # (own digest, baseline's, input)

    def inputs(self, name: str) -> list[Input]:
        """Those that a candidate has images of."""
        return [given for own, given in self.images if own == name]


def earlier(pages: list[str], rows: list[Row]) -> Earlier:
    """What is on pages of this module, the first page's before the others', as far as their rows are still there."""
    found, by_id = Earlier(), {r.id: r for r in rows}
    for text in pages:
        page = _Read()
        page.feed(text)
        for case in json.loads(page.data or "{}").get("cases", []):
            inputs = [(prompt, seed) for prompt, seed in case["inputs"]]
            for point in (p for method in case["methods"] for p in method["points"]):
                row = by_id.get(point["id"])
                base = by_id.get(row.baseline) if row else None
                if row is None or base is None:
                    continue
                own, first = kept.digest(row), kept.digest(base)
                for i, shown in point["images"].items():
                    of = shown.get("base", case.get("baseline", {}).get(i)), shown["figure"]
                    if all(figure in page.figures for figure in of) and "heat" in shown:
                        found.images.setdefault((first, inputs[int(i)]), page.figures[of[0]])
                        found.images.setdefault((own, inputs[int(i)]), page.figures[of[1]])
                        pair = {name: shown.get(name) for name in _OF_THE_PAIR}
                        found.pairs.setdefault((own, first, inputs[int(i)]), pair)
    return found


class _Read(HTMLParser):
    """The figures and the data of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.figures: dict[int, dict] = {}
        self.data, self._in_data = "", False

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self._in_data = tag == "script" and values.get("id") == "data"
        number = (values.get("id") or "").removeprefix("f")
        if tag == "img" and number.isdigit():
            size = int(values["width"]), int(values["height"])
            self.figures[int(number)] = {"uri": values["src"], "size": size}

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        if self._in_data:
            self.data += data


class _Figures:
    """Every image once, in the order in which it is first asked for."""

    def __init__(self, images: list[Kept], before: Earlier):
        self.all: list[dict] = []
        self._kept, self._before = {k.name: k for k in images}, before
        self._places: dict[tuple, int] = {}

    def has(self, name: str) -> bool:
        """Whether there are images of a candidate."""
        return name in self._kept or bool(self._before.inputs(name))

    def inputs(self, name: str) -> list[Input]:
        """What they are of, in the order of the study where it is known."""
        own = self._kept.get(name)
        return list(own.inputs) if own else self._before.inputs(name)

    def add(self, name: str, given: Input, caption: str) -> int:
        """The place of a candidate's image of an input on the page."""
        if (name, given) not in self._places:
            self._places[name, given] = len(self.all)
            own, prompt, seed = self._kept.get(name), *given
            if (found := self._before.images.get((name, given))) is None or own is not None:
                uri, size = html.webp_uri(own.image(own.inputs.index(given)), SHOWN_PX)
                found = {"uri": uri, "size": size}
            self.all.append({**found, "caption": caption, "alt": f"{prompt}, seed {seed}: {caption}"})
        return self._places[name, given]

    def pair(self, name: str, first: str, given: Input) -> dict | None:
        """How far a candidate's image is from its baseline's, and what its cache decided; None where it isn't known."""
        found = self._before.pairs.get((name, first, given))
        if found or name not in self._kept or first not in self._kept:
            return found
        own, base = self._kept[name], self._kept[first]
        i = own.inputs.index(given)
        pair = base.image(base.inputs.index(given)), own.image(i)
        decibels = quality.psnr(*pair)
        apart, heat = perceptual.flip(*map(_as_shown, pair))
        trace = own.traces[i] or {}
        return {
            "psnr": None if math.isinf(decibels) else round(decibels, 1),
            "flip": round(apart, 3),
            "heat": html.webp_uri(heat, HEAT_PX, HEAT_QUALITY)[0],
            **{name: trace.get(name) for name in ("mask", "indicator", "threshold")},
        }


def collect(
    rows: list[Row], images: list[Kept], before: Earlier | None = None, most: int = INPUTS
) -> tuple[dict, list[dict]]:
    """(data, figures): what the page's script needs, and every image once.

    Args:
        rows: of a configuration; shown are those that were timed, where their images and their baseline's were kept.
        images: of `kept.every`.
        before: what an earlier page has.
        most: prompts and seeds of each use case.
    """
    figures = _Figures(images, before or Earlier())
    found: dict[tuple, dict] = {}
    baselines = {r.id: kept.digest(r) for r in rows if r.family == families.BASELINE.name}
    for row in rows:
        own, first = kept.digest(row), baselines.get(row.baseline)
        timed = row.ok and row.speedup and row.batch == 1 and row.family != families.BASELINE.name
        if timed and first and figures.has(own) and figures.has(first):
            of_case = found.setdefault((row.model, row.use_case), {})
            setting = kept.key_of(row.as_dict() | {"settings": {**row.settings, "inputs": None}}, None)
            before_it = of_case.get(key := canonical(setting))
            if before_it is None or (row.images or 0) >= (before_it[0].images or 0):  # the best judged, then the newest
                of_case.pop(key, None)  # its place is the chosen row's, whatever else there are images of
                of_case[key] = (row, own, first)
    several = len({model for model, _ in found}) > 1
    cases = [
        {
            "name": f"{model}, {use_case}" if several else use_case,
            "model": model,
            **_case(list(settings.values()), figures, most),
        }
        for (model, use_case), settings in found.items()
    ]
    return {"cases": [case for case in cases if case["methods"]], "floors": findings.LEVELS}, figures.all


def on_a_slider(family: Family) -> bool:
    """Whether settings of a family are places on one slider: along its dial, or by the steps that a rule computes."""
    return family.dial is not None or family is families.COMBINED


def _case(settings: list[tuple[Row, str, str]], figures: _Figures, most: int) -> dict:
    """One use case: its inputs, and a slider for each method."""
    sliders = [s for s in settings if on_a_slider(families.named(s[0].family))] or settings
    made_of = Counter(
        given for _, own, first in sliders for given in figures.inputs(first) if given in figures.inputs(own)
    )
    inputs = [given for given, _ in made_of.most_common(most)]  # what most settings can be compared on
    points, shown = {}, []
    for row, own, first in settings:
        few = most if on_a_slider(families.named(row.family)) else INPUTS_BESIDE
        if images := _images(row, own, first, inputs[:few], figures):
            points[row.id] = _point(row) | {"images": images}
            shown.append(row)
    methods: dict[str, dict] = {}
    for (family, beside), line in lines(sorted(shown, key=_order)).items():
        name, joined = (f"{family.name}, {OTHERS}", False) if beside else (family.name, family.dial is not None)
        looks = {"colour": family.colour, "marker": family.marker, "family": family.name}
        made = methods.setdefault(name, {"name": name, "joined": joined, **looks, "points": []})
        made["points"] += [points[row.id] for row in line]
    for method in methods.values():
        method["points"].sort(key=lambda p: (-p["steps"], p["dial"] or 0.0, p["speedup"]))
    return {"inputs": inputs, "methods": list(methods.values())}


def _order(row: Row) -> tuple:
    """Caches first, then what they have to beat, then what is on no slider."""
    family = families.named(row.family)
    return not on_a_slider(family), family.control, families.ALL.index(family)


def _point(row: Row) -> dict:
    ends = findings.ends(row)
    return {
        "id": row.id,
        "label": row.label,
        "mark": row.mark or row.label,
        "dial": dial(row),
        "speedup": round(row.speedup, 3),
        "between": [round(end, 2) for end in ends] if ends else None,
        "steps": row.computed_steps or row.steps,
        "total": row.total_steps or row.steps,
        "psnr": row.psnr_min_db,  # of the worst image, which floors are asked of
        "quality": _quality(row),
        "how": _how(row),
    }


def _how(row: Row) -> str:
    """The code that switches a setting on, and the commands that measure it again and show its row."""
    subject = ("dtype", "inputs", "condition")
    own = {name: value for name, value in row.settings.items() if name not in subject}
    made = rebuilt.stack(own, row.technique or "", row.stack or row.label or "") if own else None
    code = recipes.code(made.techniques) if made else ""
    lines = [code, "" if code else "# its settings don't say how it is made: " + json.dumps(own)] if own else []
    asked = f"{row.setting('dtype')}, {row.width}×{row.height}"
    lines += [f"pipe(prompt, num_inference_steps={row.steps})  # {row.model}, {asked}"]
    only = f" --only {row.notebook}" if row.notebook else ""
    lines += ["", f"$ python -m fluxnb report --gpu {row.gpu}{only}", f"$ python -m fluxnb rows {row.id}"]
    return "\n".join(lines).strip()


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
        f"{name} mean {as_.format(mean)}, worst {as_.format(worst)}"
        for name, (mean, worst, as_) in figures.items()
        if None not in (mean, worst)
    ]
    same = f" ({row.psnr_identical} identical)" if row.psnr_identical else ""
    return f"All {row.images} images{same}: {'; '.join(said)}" if said else ""


def _images(row: Row, own: str, first: str, inputs: list[Input], figures: _Figures) -> dict[int, dict]:
    """Input -> its image and its baseline's, how far they are apart, and what the cache decided."""
    shown = {}
    of, theirs = figures.inputs(own), figures.inputs(first)
    seen = (row.shown("each") or {}).get("st_lpips", ())  # of every image that was judged, where all were kept
    for i, given in enumerate(inputs):
        if given in of and given in theirs and (pair := figures.pair(own, first, given)):
            base = figures.add(first, given, "baseline")
            shown[i] = {"figure": figures.add(own, given, row.label), "base": base, **pair}
            if len(seen) == len(of):
                shown[i]["st_lpips"] = seen[of.index(given)]
    return shown


def _as_shown(image: Image.Image) -> Image.Image:
    image.thumbnail((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
    return image


def explorer_html(
    gpu: str, rows: list[Row], images: list[Kept], crumbs: list, before: Earlier | None = None
) -> str | None:
    """The page; None where no method has two settings whose images were kept: a slider goes from one to another.

    As many inputs are on it as its size allows.
    """
    for most in range(INPUTS, 0, -1):
        data, figures = collect(rows, images, before, most)
        if not any(len(method["points"]) > 1 for case in data["cases"] for method in case["methods"]):
            return None
        text = _page(gpu, data, figures, crumbs)
        if len(text.encode()) < ROOM:
            break
    return text


def _page(gpu: str, data: dict, figures: list[dict], crumbs: list) -> str:
    grid = []
    for case in data["cases"]:
        for index, (prompt, seed) in enumerate(case["inputs"]):
            shown = [p["images"][index] for m in case["methods"] for p in m["points"] if index in p["images"]]
            ids = [*(one["base"] for one in shown), *(one["figure"] for one in shown)]
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
