"""Published figures, as data (published.csv): what the reports set ours beside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).parent / "published.csv"


@lru_cache(maxsize=1)
def table():
    """Every published figure: source, kind, gpu, model, steps, size, batch, technique, metric, value, unit."""
    import pandas as pd

    return pd.read_csv(FILE)


def time_shares(technique: str, gpu: str) -> dict[float, float]:
    """Threshold -> share of the uncached time that a cache left, as published for one GPU.

    Args:
        technique: FBCache or TeaCache.
        gpu: A6000 (the Nunchaku FB-Cache experiment), A100 80GB or H100 80GB (the plan's own table).

    Raises:
        KeyError: nothing is published for this pair.
    """
    experiment = gpu == "A6000"
    rows = table()
    rows = rows[(rows.gpu == gpu) & (rows.metric == ("latency_second" if experiment else "latency_p50"))]
    seconds = rows.groupby("technique").value.mean()
    uncached = seconds["FBCache (0)" if experiment else "Baseline (FP16)"]
    found = {
        float(name.split("(")[1].rstrip(")")): value / uncached
        for name, value in seconds.items()
        if re.fullmatch(rf"{technique} \([0-9.]+\)", name)
    }
    if not found:
        raise KeyError(f"nothing is published for {technique} on {gpu}")
    return dict(sorted(found.items()))


def first_block_shares() -> dict[float, float]:
    """Threshold -> share of the uncached time, in the Nunchaku FB-Cache experiment (second inference)."""
    return time_shares("FBCache", "A6000")


@dataclass(frozen=True)
class Claim:
    """A published speedup over its own baseline, and the label of our row that is set beside it."""

    text: str
    source: str
    gpu: str
    technique: str  # as in the table
    baseline: str  # empty where a reduction was published instead of two times
    ours: str  # label of our row
    over: str = "baseline"  # label of our row that ours is compared with
    why: str = ""  # what explains a difference of more than 15 %

    def ratio(self) -> float:
        """The published speedup."""
        rows = table()
        rows = rows[(rows.source == self.source) & (rows.gpu == self.gpu)]
        own = rows[rows.technique == self.technique]
        if not self.baseline:  # published as a reduction of the time, in percent
            return 1 / (1 - own[own.metric == "latency_reduction"].value.iloc[0] / 100)
        rows = rows[rows.metric.isin(["latency_p50", "latency_avg"])].sort_values("metric", ascending=False)
        seconds = {name: rows[rows.technique == name].value.iloc[0] for name in (self.technique, self.baseline)}
        return seconds[self.baseline] / seconds[self.technique]


_PLAN, _PLAN_2, _AO, _XDIT, _SGLANG = (
    "003_8eb875c055ba60c5.txt",
    "002_46725f5dd467bd2f.txt",
    "diffusers-torchao README",
    "xDiT docs/performance/flux.md",
    "sglang PR 19673",
)
_EAGER = "PyTorch chooses cuDNN attention in eager mode here, where older versions ran FlashAttention 2"
_FA2 = "our baseline runs cuDNN's attention, and the FlashAttention 2 that this row names is slower (report 02)"
_EAGER_FP8 = (
    "not compiled, rounding the activations takes a pass of its own before every product; the published row loses "
    "nothing to it and does not say how it was run"
)
_UNCOMPILED = "the published row gains nothing from FP8: it was not compiled; ours has compiled blocks"
COUNTERPARTS = (
    Claim("BF16 compiled", _AO, "H100", "bf16 compile", "bf16 eager", "BF16 compiled", why=_EAGER),
    Claim("BF16 compiled", _XDIT, "H100", "bf16 compile", "bf16 eager", "BF16 compiled", why=_EAGER),
    Claim(
        "BF16 compiled",
        _SGLANG,
        "H200",
        "diffusers bf16 SDPA compile",
        "diffusers bf16 SDPA eager",
        "BF16 compiled",
        why=_EAGER,
    ),
    Claim(
        "FP8 per row, fused QKV, VAE compiled",
        _AO,
        "H100",
        "fp8dqrow + fuse_qkv + compile + compiled VAE",
        "bf16 eager",
        "+ VAE compiled",
        why=_EAGER,
    ),
    Claim("TorchAO FP8 per row", _PLAN_2, "H100 80GB", "TorchAO fp8dqrow", "", "+ VAE compiled", why=_EAGER),
    Claim("TorchAO FP8", _PLAN, "H100 80GB", "TorchAO FP8", "Baseline (FP16)", "+ quantization", why=_EAGER_FP8),
    *(
        Claim(name, _PLAN, "H100 80GB", name, "Baseline (FP16)", name, why=why)
        for name, why in (
            ("BF16+FA2+TeaCache (0.6)", _FA2),
            ("BF16+FA2+FBCache (0.3)", _FA2),
            ("BF16+FA2+TeaCache (0.6)+TorchAO FP8", _UNCOMPILED),
            ("BF16+FA2+FBCache (0.3)+TorchAO FP8", _UNCOMPILED),
            ("BF16+FA2+FBCache (0.3)+TorchAO INT8", _UNCOMPILED),
        )
    ),
)
