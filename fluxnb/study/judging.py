"""How near a candidate's images are to the baseline's, as columns of its row."""

from __future__ import annotations

import math
import statistics

import numpy as np

from fluxnb.measure import clip, quality
from fluxnb.models import control, pipelines
from fluxnb.study.candidate import Candidate
from fluxnb.study.subject import Loaded, Subject
from fluxnb.world import probe


def trace_of(candidate: Candidate) -> dict | None:
    """The latest decisions of the candidate's cache, rounded to what a chart shows."""
    for technique in candidate.techniques:
        trace = getattr(technique, "trace", None)
        if trace and trace.steps:
            seen = [None if s.indicator is None else float(f"{s.indicator:.4g}") for s in trace.steps]
            where = [step.reused_at for step in trace.steps]
            return {"mask": trace.mask, "indicator": seen, "threshold": trace.steps[0].threshold, "reused_at": where}
    return None


def judge(
    subject: Subject, references: list, images: list, traces: list, loaded: Loaded | None, each: bool = False
) -> dict:
    """The columns that come from images: their number, and the mean and the worst of every figure.

    Args:
        subject: whose inputs the images are of, in their order.
        references: the baseline's images.
        loaded: the pipeline, where its VAE is needed: in inpainting.
        each: with PSNR and ST-LPIPS of every image, in `proof`.
    """
    row = {"images": len(images), **quality.compare(references, images, each=each)}
    row |= {"proof": {"each": row.pop("each")}} if each else {}
    if subject.checked:
        found = [s for s in probe.adherence([p for p, _ in subject.inputs], images) if s is not None]
        if found:
            row |= {"adherence": statistics.fmean(found), "adherence_min": min(found)}
    if subject.clip:
        fits = clip.scores(subject.clip, [p for p, _ in subject.inputs], images)
        row |= {"clip_score": statistics.fmean(fits), "clip_score_min": min(fits)}
    if traces and all(traces):
        row["computed_steps"] = statistics.fmean(t["mask"].count("1") for t in traces)
    started = [subject.material(*given) for given in subject.inputs] if subject.use_case != "txt2img" else []
    if "inpainting" in subject.use_case:
        row |= _sides(started, references, images, loaded)
    if pipelines.takes_condition(subject.use_case):
        pairs = zip(images, started, strict=True)
        row["agreement"] = statistics.fmean(
            control.agreement(i, m.condition(subject.kind), subject.kind) for i, m in pairs
        )
    return row


def _sides(started: list, references: list, images: list, loaded: Loaded) -> dict:
    """Both sides of an inpainting mask."""
    inside = [np.asarray(m.mask) > 127 for m in started]
    outside = [m.outside() for m in started]
    given = [m.image for m in started]
    through = [pipelines.through_vae(loaded.pipe, image) for image in given]
    pairs = {
        "psnr_inside_db": zip(references, images, inside, strict=True),
        "psnr_outside_db": zip(references, images, outside, strict=True),
        "kept_db": zip(given, images, outside, strict=True),
        "kept_vae_db": zip(given, through, outside, strict=True),
    }
    row = {}
    for name, found in pairs.items():
        finite = [d for d in (quality.psnr(*pair) for pair in found) if d != math.inf]
        row[name] = statistics.fmean(finite) if finite else None
    return row
