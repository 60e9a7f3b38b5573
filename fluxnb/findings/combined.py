"""What a grid of two gates says: what a search finds of it, and what is kept in memory."""

from __future__ import annotations

from typing import Any

from fluxnb.cache import Cache
from fluxnb.findings.table import listed
from fluxnb.models import pipelines
from fluxnb.study import search
from fluxnb.study.subject import Subject

FULL_SIZE = 4096 * 3072 * 2  # bytes of FLUX's image tokens at 1024², in bfloat16


def search_sentence(found: dict[Any, search.Value], every: dict[Any, search.Value], steps: int, images: int) -> str:
    """How many settings a search asked for, and how much of the whole grid's front it has.

    Args:
        found, every: setting -> (cost, quality) of what was asked for, and of all.
        steps: the cost that nothing exceeds.
        images: that each was judged on.
    """
    worst = (float(steps), min(quality for _, quality in every.values()))
    whole, own = search.front(every), search.front(found)
    return (
        f"The search evaluated {len(found)} of {len(every)} settings ({len(found) / len(every):.0%}), each judged on "
        f"{images} image{'s' * (images != 1)}, and reached "
        f"{search.reached(found, every, worst):.1%} of the full grid's front (hypervolume), "
        f"{len(set(own) & set(whole))} of its {len(whole)} settings."
    )


def kept_table(caches: list[Cache], subject: Subject):
    """What each cache keeps for reuse, in MiB: of this subject, and of FLUX at 1024² in bfloat16."""
    config = pipelines.transformer_config(subject.model.name)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = (subject.width // 16) * (subject.height // 16)
    here, there = f"here, {subject.dtype}", "FLUX at 1024², bfloat16"
    lines = []
    for cache in caches:
        kept = len(cache.gate.points) * cache.predictor.keeps
        size = tokens * width * pipelines.DTYPES[subject.dtype].itemsize
        of = {here: kept * size / 2**20, there: kept * FULL_SIZE / 2**20}
        lines.append({"cache": f"{cache.gate.rule}, {cache.predictor.name}", "kept tensors": kept, **of})
    return listed(lines, "cache", {here: "MiB", there: "MiB"})


def block_count(subject: Subject) -> int:
    """How many blocks the subject's transformer has."""
    config = pipelines.transformer_config(subject.model.name)
    return config["num_layers"] + config["num_single_layers"]
