"""What can be asked of the front page: a line for each answer, computed from rows, with the page that it stands on."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fluxnb import families, findings, notebooks, params
from fluxnb.findings import ledger
from fluxnb.findings.recommend import has_only
from fluxnb.findings.rows import alike, is_baseline, judged, same_image, worst_db
from fluxnb.findings.words import unsettled
from fluxnb.measure import stats
from fluxnb.report import analysis, catalogue, terms
from fluxnb.report.choosing import page_of
from fluxnb.report.configurations import Configuration
from fluxnb.report.pages import WITH_PAGE
from fluxnb.study.row import Row

EXACT = "same image up to rounding"


@dataclass(frozen=True)
class Line:
    """An answer: its subject and what is said of it; `words` are what a question for it has besides."""

    kind: str
    subject: str
    said: str
    href: str
    words: str
    verdict: str = ""
    setting: str = ""  # its label, where a setting has nothing but a cache's dial
    settled: bool = True  # there is a recommendation, or rounds enough for a result


def lines(found: list[Configuration], gpus: list[dict], claims: list[ledger.Entry], folder: Path) -> list[Line]:
    """Every answer: what to switch on, each setting, each claim, several GPUs, own weights, each term and page.

    What rests on enough rounds stands before what doesn't, and so it is found before it, too.
    """
    made = [_goal(gpu, panel) for gpu in gpus for panel in gpu["panels"]]
    for c in found:
        made += settings(c, folder) if params.parted(c.name)[1] == 1 else quantized(c, folder) + divided(c, folder)
    made += [_claim(entry) for entry in claims]
    own = "make report GPU=… MODEL=… measures, judges and recommends on a hub id or folder; accelerate(pipe) puts it on"
    made.append(Line("how", "On your own weights", f"{own}.", "#own-weights", "run my model use weights how finetune"))
    known = techniques(found, folder)
    for word, meaning in (terms.EVERY | catalogue.glossary()).items():
        if any(word == line.subject for line in known):
            continue
        made.append(Line("term", word, f"{meaning}.", f"glossary.html#{catalogue.place(word)}", "means meaning term"))
    return sorted([*made, *known, *pages(found, folder)], key=lambda line: not line.settled)


def techniques(found: list[Configuration], folder: Path) -> list[Line]:
    """What each technique does, by its name, its class and what it is called elsewhere."""
    made = []
    for e in catalogue.techniques():
        where = next((_page(c, e.notebook, folder) for c in found if _has(c, e.notebook)), "glossary.html")
        words = f"technique {e.made.__name__} {e.family.name if e.family else 'cache'} {' '.join(e.kinds)} {e.source}"
        does = e.family.about.rstrip(".") if e.family and e.family.name == e.term else e.does
        made.append(Line("technique", e.term, f"{does}. Image: {e.exact}. `{e.call}`", where, words))
    return made


def pages(found: list[Configuration], folder: Path) -> list[Line]:
    """Each report, and each thing that may happen to a pipeline with a technique on."""
    from fluxnb.report.survive import EVERY

    made = []
    titles = {page.stem: page.title for c in found for page in c.pages}
    for stem, title in sorted(titles.items()):
        own = [c for c in found if _has(c, stem)]
        if not own:
            continue
        where = _page(own[0], stem, folder)
        made.append(Line("page", title, f"the report of {', '.join(c.name for c in own)}.", where, "page report"))
        if stem == notebooks.SURVIVAL:
            words = "survive survives lora adapter happens work works with"
            said = "{}. Which technique survives it stands there."
            made += [Line("survives", c.name, said.format(c.about), where, words) for c in EVERY]
    return made


def _page(c: Configuration, stem: str, folder: Path) -> str:
    return Path(os.path.relpath(c.folder / f"{stem}.html", folder)).as_posix()


def _has(c: Configuration, stem: str) -> bool:
    return any(page.stem == stem and page.status in WITH_PAGE for page in c.pages)


def examples(made: list[Line]) -> list[tuple[str, Line]]:
    """A question of each kind with its answer: what there is most of, or what is said soonest."""
    asked: dict[str, tuple[str, Line]] = {}
    common = Counter(line.setting for line in made if line.setting)
    most = common.most_common(1)[0][0] if common else ""
    for line in made:
        if line.kind == "goal" and " → " in line.said:
            asked.setdefault("goal", (f"What for {line.subject}?", line))
        if most and line.setting == most:
            asked.setdefault("setting", (f"What does {most} cost?", line))
        if line.kind == "how":
            asked["how"] = ("How do I run it on my weights?", line)
        if line.kind == "worth":
            asked.setdefault("worth", (f"Is {line.subject} worth it?", line))
    put = [
        line for line in made if line.kind == "claim" and "cache" in line.words and line.verdict in ledger.VERDICTS[:-1]
    ]
    if put:
        best = min(put, key=lambda line: ledger.VERDICTS.index(line.verdict))
        asked["claim"] = (f"Does {best.subject} hold?", best)
    return list(asked.values())


def _goal(gpu: dict, panel: dict) -> Line:
    if "missing" in panel:
        said = f"no recommendation yet; `{panel['command']}` fills it in."
    else:
        gain = f", {panel['times']} ({panel['sure']})" if panel["times"] else ""
        said = f"{panel['label']}: {panel['before']} → {panel['after']}{gain}; {panel['quality']}."
    subject, href = f"{gpu['title']}, {panel['goal']}", f"#{gpu['name']}-{panel['key']}"
    return Line("goal", subject, said, href, f"{gpu['name']} goal switch", settled="missing" not in panel)


def settings(c: Configuration, folder: Path) -> list[Line]:
    """What each setting costs, of one image from text; the newest row of each."""
    known: dict[tuple, Row] = {}
    for r in ledger.latest(c.ok):
        alone = (r.use_case, r.batch, r.gpus, r.users) == ("txt2img", 1, 1, 1)
        if alone and r.speedup and r.latency_p50 and r.label and not is_baseline(r) and page_of(c, r, folder):
            known[r.label, r.model, r.steps] = r
    return [_setting(c, r, folder) for r in known.values()]


def _setting(c: Configuration, r: Row, folder: Path) -> Line:
    unseen = "random weights, so nothing of images" if r.weights == "random" else "images not judged by today's rules"
    worst = worst_db(r) if judged(r) else None
    quality = f"{r.images} images identical" if worst == math.inf else f"worst of {r.images} images {worst or 0:.1f} dB"
    quality = (EXACT if same_image(r) else unseen) if worst is None else quality
    said = f"{_gain(r)}, {r.latency_p50:.3g} s, {quality}; `{r.model}`, {r.total_steps or r.steps} steps."
    family = families.named(r.family)
    alone = r.label if family.cache and has_only(r, "threshold") else ""
    words = f"cost costs gain setting {family.name}"
    known = not unsettled(r)
    return Line("setting", f"{r.label} on {c.name}", said, page_of(c, r, folder), words, setting=alone, settled=known)


def _hint(row: Row) -> str:
    """What stands before a figure that too few rounds are behind."""
    return f"{few[:1].upper()}{few[1:]}: " if (few := unsettled(row)) else ""


def _gain(row: Row, of: str = "") -> str:
    """Its speedup with what its rounds say of it."""
    sure = "" if unsettled(row) and findings.ends(row) is None else f" ({findings.sureness(row)})"
    return f"{_hint(row)}{row.speedup:.2f}×{of}{sure}"


def _claim(e: ledger.Entry) -> Line:
    said = f"**{e.verdict}**. Ours: {e.text}{f' ({e.setting})' if e.setting else ''}. {e.reason}"
    cache = " cache" * bool(e.claim.family and any(f.cache and f.name == e.claim.family for f in families.ALL))
    subject = f"{e.claim.technique}: {e.claim.text}"
    return Line(
        "claim", subject, said, f"ledger.html#{e.claim.id}", f"claim hold holds true {e.claim.source}{cache}", e.verdict
    )


def quantized(c: Configuration, folder: Path) -> list[Line]:
    """Of several GPUs: what quantization adds to one image that is divided over them, in the same session."""
    rows = [r for r in findings.divided(c.rows) if r.speedup is not None and r.latency_p50]
    best = {}
    for series in (analysis.BF16, analysis.FP8):
        own = sorted(findings.of(rows, *analysis.SERIES[series]), key=lambda r: -r.latency_p50)
        best[series] = {r.session: r for r in own}
    made = []
    for session in [s for s in best[analysis.BF16] if s in best[analysis.FP8]]:
        plain, other = (best[series][session] for series in (analysis.BF16, analysis.FP8))
        gain, fewest = plain.latency_p50 / other.latency_p50, min(plain, other, key=lambda r: r.n)
        noise = " within the noise" * alike(plain, other)
        said = f"{_hint(fewest)}{gain:.2f}× as fast{noise} as without it: {other.latency_p50:.3g} s ({other.label}) "
        said += f"instead of {plain.latency_p50:.3g} s ({plain.label}), in one session"
        said += "." if judged(other) else "; its images weren't judged on them."
        kind = str(other.setting(families.QUANTIZATION.name) or analysis.FP8)
        subject = f"{kind} on {params.parted(c.name)[1]} GPUs ({c.name})"
        where, words = page_of(c, other, folder) or "", "worth quantization quantized"
        made.append(Line("worth", subject, said, where, words, settled=fewest.n >= stats.HEADLINE))
    return made


def divided(c: Configuration, folder: Path) -> list[Line]:
    """Of several GPUs: each way of dividing one image."""
    rows = {r.label: r for r in findings.divided(c.rows) if r.speedup and r.latency_p50}
    made = []
    for r in rows.values():
        said = f"{_gain(r, ' the same on one')}, {r.latency_p50:.3g} s."
        subject = f"{r.label} on {r.gpus} GPUs ({c.name})"
        where, words = page_of(c, r, folder) or "", "worth parallel several divided"
        made.append(Line("several", subject, said, where, words, settled=not unsettled(r)))
    return made
