"""Published figures, as data (published.csv): what was claimed where, and which of our stacks stands for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fluxnb import families, stacks

FILE = Path(__file__).parent / "published.csv"
PLAN_CACHES, NUNCHAKU, PLAN_FP8, PLAN_TABLE = "plan-caches", "nunchaku", "plan-fp8", "plan-table"
TORCHAO, XDIT, SGLANG, FLUX_FAST, PARA_ATTENTION = "torchao", "xdit", "sglang", "flux-fast", "paraattention"
SOURCES = {  # the column `source` -> what a reader recognises
    PLAN_CACHES: "plan 1: FBCache, TeaCache and both",
    NUNCHAKU: "Nunchaku FB-Cache experiment",
    PLAN_FP8: "plan 2: TorchAO FP8",
    PLAN_TABLE: "plan 3: table of techniques",
    XDIT: "xDiT docs/performance/flux.md",
    SGLANG: "sglang PR 19673",
    TORCHAO: "diffusers-torchao README",
    FLUX_FAST: "flux-fast log.txt (commit 0bf4357)",
    PARA_ATTENTION: "ParaAttention doc/fastest_flux.md",
}
SPEEDUP, MACHINES, MEMORY, QUALITY = "speedup", "speedup of a machine", "memory", "quality"  # what a claim is about
LEAST, MOST, UP_TO = "least", "most", "up to"  # the sides of a bound
ULYSSES, RING = "ulysses", "ring"  # the column `way`


@dataclass(frozen=True)
class Claim:
    """What was published: `value` is a ratio (times faster), or a share of memory or quality.

    `family` is that of the technique by itself, empty for several together and for what fluxnb has none of; `threshold`
    is a cache's and `way` that of dividing an image.
    """

    technique: str
    source: str
    gpu: str
    gpus: int
    model: str
    kind: str  # measured, expected or criterion
    metric: str
    value: float | None  # None where no baseline of its own was published
    side: str = ""  # where the figure is a bound
    family: str = ""
    threshold: float | None = None
    way: str = ""

    @property
    def setting(self) -> str:
        """Their setting, as a reader wants to see it."""
        count = f"{self.gpus} × " if self.gpus > 1 else ""
        return ", ".join(part for part in (self.model, f"{count}{self.gpu}" if self.gpu else "") if part)

    @property
    def text(self) -> str:
        """Their figure with its unit."""
        return {LEAST: "≥ ", MOST: "≤ ", UP_TO: "up to "}.get(self.side, "") + self.said(self.value)

    def said(self, value: float | None) -> str:
        """A figure of this claim's kind with its unit."""
        if value is None:
            return "–"
        return f"{value:.0%}" if self.metric in (MEMORY, QUALITY) else f"{value:.2f}×"


@lru_cache(maxsize=1)
def table():
    """Every published figure: source, kind, gpu, model, steps, size, batch, technique, metric, value, unit.

    `over` is the technique of the same source that a time is compared with. `family`, `threshold` and `way` are as in
    `Claim`.
    """
    import pandas as pd

    text = ("gpu", "note", "over", "family", "way")
    return pd.read_csv(FILE).fillna(dict.fromkeys(text, ""))


_PROMISES: dict[str, tuple[str, str, Callable[[float], float]]] = {  # metric -> about what, side, as a ratio or share
    "speedup": (SPEEDUP, "", lambda v: v),
    "speedup_min": (SPEEDUP, LEAST, lambda v: v),
    "speedup_max": (SPEEDUP, UP_TO, lambda v: v),
    "latency_reduction": (SPEEDUP, "", lambda v: 1 / (1 - v / 100)),
    "latency_gain_vs_fp16": (SPEEDUP, "", lambda v: 1 / (1 - v / 100)),
    "memory_change": (MEMORY, MOST, lambda v: v / 100),
    "quality_loss_max": (QUALITY, MOST, lambda v: v / 100),
    "speedup_h100_over_a100": (MACHINES, "", lambda v: v),
}


@lru_cache(maxsize=1)
def claims() -> tuple[Claim, ...]:
    """One claim for every technique, source and machine of the table that isn't itself the baseline."""
    found = []
    for (source, gpu, gpus, technique), rows in table().groupby(["source", "gpu", "gpus", "technique"], sort=False):
        first = rows.iloc[0]
        common = {"technique": technique, "source": source, "gpu": gpu, "gpus": int(gpus)}
        common |= {name: first[name] for name in ("model", "kind", "family", "way")}
        common["threshold"] = None if rows.threshold.isna().all() else float(first.threshold)
        if technique != first.over and (seconds := _seconds(rows)):
            over = _baseline_seconds(rows)
            found.append(Claim(**common, metric=SPEEDUP, value=over and float(over / seconds)))
        values = dict(zip(rows.metric, rows.value, strict=True))
        for metric, (about, side, convert) in _PROMISES.items():
            if metric in values:
                found.append(Claim(**common, metric=about, value=convert(values[metric]), side=side))
    return tuple(found)


def time_shares(family: families.Family, gpu: str) -> dict[float, float]:
    """Threshold -> share of the uncached time that a cache left, as published for one GPU.

    Args:
        gpu: A6000 (the Nunchaku FB-Cache experiment), A100 80GB or H100 80GB (the plan's own table).

    Raises:
        KeyError: nothing is published for this pair.
    """
    rows = table()
    rows = rows[(rows.family == family.name) & (rows.gpu == gpu)]
    found = {threshold: float(_seconds(own) / _baseline_seconds(own)) for threshold, own in rows.groupby("threshold")}
    if not found:
        raise KeyError(f"nothing is published for {family.name} on {gpu}")
    return found


def first_block_shares() -> dict[float, float]:
    """Threshold -> share of the uncached time, in the Nunchaku FB-Cache experiment (second inference)."""
    return time_shares(families.FIRST_BLOCK, "A6000")


def _baseline_seconds(rows) -> float | None:
    """The time that the rows of one technique are compared with: their source's on the same GPU."""
    every, first = table(), rows.iloc[0]
    return _seconds(every[(every.source == first.source) & (every.gpu == first.gpu) & (every.technique == first.over)])


def _seconds(rows) -> float | None:
    """The time of one technique; of two figures for the same, their mean."""
    values = rows.groupby("metric").value.mean()
    return next((values[m] for m in ("latency_second", "latency_p50", "latency_avg") if m in values), None)


@dataclass(frozen=True)
class Counterpart:
    """Which of our stacks stands for a published technique, over the baseline in both."""

    text: str
    source: str
    gpu: str
    technique: str  # as in the table
    ours: str  # a name in fluxnb.stacks
    why: str = ""  # what explains a difference of more than 15 %

    def of(self, claim: Claim) -> bool:
        """Whether the claim is about it."""
        return (claim.source, claim.gpu, claim.technique) == (self.source, self.gpu, self.technique)

    def ratio(self) -> float:
        """The published speedup."""
        return next(c.value for c in claims() if self.of(c) and c.metric == SPEEDUP and c.value is not None)


_EAGER = "PyTorch chooses cuDNN attention in eager mode here, where older versions ran FlashAttention 2"
_FA2 = "our baseline runs cuDNN's attention, and the FlashAttention 2 that this row names is slower (report 02)"
_EAGER_FP8 = (
    "not compiled, rounding the activations takes a pass of its own before every product; the published row loses "
    "nothing to it and does not say how it was run"
)
_UNCOMPILED = "the published row gains nothing from FP8: it was not compiled; ours has compiled blocks"
_FUSED = "fp8dqrow + fuse_qkv + compile + compiled VAE"
COUNTERPARTS = (
    *(
        Counterpart(stacks.BF16_COMPILED, source, gpu, technique, stacks.BF16_COMPILED, _EAGER)
        for source, gpu, technique in (
            (TORCHAO, "H100", "bf16 compile"),
            (XDIT, "H100", "bf16 compile"),
            (SGLANG, "H200", "diffusers bf16 SDPA compile"),
        )
    ),
    Counterpart("FP8 per row, fused QKV, VAE compiled", TORCHAO, "H100", _FUSED, stacks.VAE_COMPILED, _EAGER),
    Counterpart("TorchAO FP8 per row", PLAN_FP8, "H100 80GB", "TorchAO fp8dqrow", stacks.VAE_COMPILED, _EAGER),
    Counterpart("TorchAO FP8", PLAN_TABLE, "H100 80GB", "TorchAO FP8", stacks.QUANTIZED, _EAGER_FP8),
    *(
        Counterpart(name, PLAN_TABLE, "H100 80GB", name, name, why)  # the plan's names are ours
        for name, why in (
            (stacks.FLASH_TEACACHE, _FA2),
            (stacks.FLASH_FIRST_BLOCK, _FA2),
            (stacks.FLASH_TEACACHE_FP8, _UNCOMPILED),
            (stacks.FLASH_FIRST_BLOCK_FP8, _UNCOMPILED),
            (stacks.FLASH_FIRST_BLOCK_INT8, _UNCOMPILED),
        )
    ),
)
