"""What can be asked of the front page: a line for each answer, computed from rows, with the page that it stands on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fluxnb import families, findings, params
from fluxnb.findings import ledger
from fluxnb.findings.recommend import has_only
from fluxnb.findings.rows import alike, is_baseline, judged, same_image, worst_db
from fluxnb.report import analysis, catalogue
from fluxnb.report.choosing import page_of
from fluxnb.report.configurations import Configuration
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


def lines(found: list[Configuration], gpus: list[dict], claims: list[ledger.Entry], folder: Path) -> list[Line]:
    """Every answer: what to switch on, each setting, each claim, several GPUs, own weights, each term."""
    made = [_goal(gpu, panel) for gpu in gpus for panel in gpu["panels"]]
    for c in found:
        made += settings(c, folder) if params.parted(c.name)[1] == 1 else quantized(c, folder) + divided(c, folder)
    made += [_claim(entry, i) for i, entry in enumerate(claims, 1)]
    own = "make report GPU=… MODEL=… measures, judges and recommends on a hub id or folder; accelerate(pipe) puts it on"
    made.append(Line("how", "On your own weights", f"{own}.", "#own-weights", "run my model use weights how finetune"))
    for word, meaning in catalogue.glossary().items():
        made.append(Line("term", word, f"{meaning}.", "glossary.html", "means meaning term"))
    return made


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
    return Line("goal", subject, said, href, f"{gpu['name']} goal switch")


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
    speed = f"{r.speedup:.2f}× ({findings.sureness(r)}), {r.latency_p50:.3g} s"
    said = f"{speed}, {quality}; `{r.model}`, {r.total_steps or r.steps} steps."
    family = families.named(r.family)
    alone = r.label if family.cache and has_only(r, "threshold") else ""
    words = f"cost costs gain setting {family.name}"
    return Line("setting", f"{r.label} on {c.name}", said, page_of(c, r, folder), words, setting=alone)


def _claim(e: ledger.Entry, i: int) -> Line:
    said = f"**{e.verdict}**. Ours: {e.text}{f' ({e.setting})' if e.setting else ''}. {e.reason}"
    cache = " cache" * bool(e.claim.family and any(f.cache and f.name == e.claim.family for f in families.ALL))
    subject = f"{e.claim.technique}: {e.claim.text}"
    return Line(
        "claim", subject, said, f"ledger.html#claim-{i}", f"claim hold holds true {e.claim.source}{cache}", e.verdict
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
        gain, fewest = plain.latency_p50 / other.latency_p50, min(plain.n, other.n)
        noise = " within the noise" * alike(plain, other)
        said = f"{gain:.2f}× as fast{noise} as without it: {other.latency_p50:.3g} s ({other.label}) instead of "
        said += f"{plain.latency_p50:.3g} s ({plain.label}), n = {fewest}, in one session"
        said += "." if judged(other) else "; its images weren't judged on them."
        kind = str(other.setting(families.QUANTIZATION.name) or analysis.FP8)
        subject = f"{kind} on {params.parted(c.name)[1]} GPUs ({c.name})"
        made.append(Line("worth", subject, said, page_of(c, other, folder) or "", "worth quantization quantized"))
    return made


def divided(c: Configuration, folder: Path) -> list[Line]:
    """Of several GPUs: each way of dividing one image."""
    rows = {r.label: r for r in findings.divided(c.rows) if r.speedup and r.latency_p50}
    made = []
    for r in rows.values():
        said = f"{r.speedup:.2f}× the same on one ({findings.sureness(r)}), {r.latency_p50:.3g} s."
        subject = f"{r.label} on {r.gpus} GPUs ({c.name})"
        made.append(Line("several", subject, said, page_of(c, r, folder) or "", "worth parallel several divided"))
    return made
