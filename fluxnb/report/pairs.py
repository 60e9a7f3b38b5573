"""Before and after: of the images that explorers keep on their pages, the ones that the front page shows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from fluxnb.findings.recommend import Choice, same_settings
from fluxnb.findings.rows import worst_db
from fluxnb.report.configurations import Configuration

_DATA = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)
_FIGURE = re.compile(r'<img id="f(\d+)" src="(data:image/[^"]+)"')


@dataclass(frozen=True)
class Pair:
    """A baseline's image and the same with a setting on, as data URIs, and how far they are apart."""

    before: str
    after: str
    row: str  # id
    label: str
    decibels: float
    prompt: str
    seed: int
    kept: int  # images of the setting on the page, of which this is the worst


def pairs(c: Configuration) -> list[Pair]:
    """The worst kept image of each setting that the configuration's explorer shows; [] without one."""
    try:
        text = (c.folder / "explorer.html").read_text(encoding="utf-8")
    except OSError:
        return []
    data = _DATA.search(text)
    return list(_read(json.loads(data[1]), dict(_FIGURE.findall(text)))) if data else []


def of_choice(choice: Choice, found: list[Pair], c: Configuration) -> tuple[Pair, bool] | None:
    """(a pair, whether it is of the very setting); else the nearest that is further apart than the choice's worst."""
    seen, rows = choice.seen, {r.id: r for r in c.rows}
    if seen is None:
        return None
    own = [p for p in found if (r := rows.get(p.row)) is not None and r.model == seen.model]
    for pair in own:
        if same_settings(rows[pair.row], seen):
            return pair, True
    worst = worst_db(seen) or math.inf
    worse = [p for p in own if p.decibels < worst - 0.1]  # further apart as it reads, too
    return (max(worse, key=lambda p: p.decibels), False) if worse else None


def _read(data: dict, figures: dict[str, str]) -> Iterator[Pair]:
    for case in data["cases"]:
        for point in (p for method in case["methods"] for p in method["points"]):
            known = [(i, one) for i, one in point["images"].items() if one.get("psnr") is not None]
            if not known:
                continue
            i, worst = min(known, key=lambda one: one[1]["psnr"])
            prompt, seed = case["inputs"][int(i)]
            with suppress(KeyError):
                uris = figures[str(worst["base"])], figures[str(worst["figure"])]
                yield Pair(*uris, point["id"], point["label"], worst["psnr"], prompt, seed, len(known))
