"""The ledger of claims: every published figure that the study is about, beside ours, with a verdict by rule.

A claim is a ratio: a published time over its own published baseline, a speedup or a share that was promised. Ours is
the same ratio from committed rows. The rule (`verdict`):

    reproduced      ours is within 15 % of theirs, or on the promised side of a bound (15 % short of an "up to")
    not reproduced  it isn't
    not comparable  theirs has no baseline of its own, or ours measures something else; the reason says what
    not run         no committed row stands for it; the reason says what would make one
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxnb import findings
from fluxnb.findings import published
from fluxnb.study.results import Results

STACK = "13_final_stack"
VERDICTS = ("reproduced", "not reproduced", "not comparable", "not run")
TOLERANCE = 0.15
SOURCES = {  # file names and titles in published.csv -> what a reader recognises
    "000_430f73f4282af4a0.txt": "plan 1: FBCache, TeaCache and both",
    "001_de02caf251e2be3b.txt": "Nunchaku FB-Cache experiment",
    "002_46725f5dd467bd2f.txt": "plan 2: TorchAO FP8",
    "003_8eb875c055ba60c5.txt": "plan 3: table of techniques",
}
# published GPU -> configurations whose hardware is alike enough for a ratio
ALIKE = {
    "H100": ("h200", "h100"),
    "H100 80GB": ("h200", "h100"),
    "H200": ("h200", "h100"),
    "A100 80GB": ("a100",),
    "A6000": ("a6000",),
}
ANYWHERE = ("h200", "h100", "a100", "a6000", "cpu")  # where the ratio is one of decisions, not of hardware
BASELINES = {  # source -> technique that its others are compared with
    "003_8eb875c055ba60c5.txt": "Baseline (FP16)",
    "001_de02caf251e2be3b.txt": "FBCache (0)",
    "diffusers-torchao README": "bf16 eager",
    "xDiT docs/performance/flux.md": "bf16 eager",
    "sglang PR 19673": "diffusers bf16 SDPA eager",
    "ParaAttention doc/fastest_flux.md": "baseline",
}


@dataclass(frozen=True)
class Claim:
    """What was published: `value` is a ratio (times faster) or a share (of time, memory or quality)."""

    technique: str
    source: str
    gpu: str
    gpus: int
    model: str
    kind: str  # measured, expected or criterion
    metric: str
    value: float | None
    side: str = ""  # "least", "most" or "up to" where the figure is a bound

    @property
    def setting(self) -> str:
        """Their setting, as a reader wants to see it."""
        count = f"{self.gpus} × " if self.gpus > 1 else ""
        return ", ".join(part for part in (self.model, f"{count}{self.gpu}" if self.gpu else "") if part)

    @property
    def text(self) -> str:
        """Their figure with its unit."""
        if self.value is None:
            return "–"
        bound = {"least": "≥ ", "most": "≤ ", "up to": "up to "}.get(self.side, "")
        return f"{bound}{self.value:.0%}" if self.metric == "share" else f"{bound}{self.value:.2f}×"


@dataclass(frozen=True)
class Entry:
    """A claim with ours beside it."""

    claim: Claim
    ours: float | None
    setting: str
    verdict: str
    reason: str

    @property
    def text(self) -> str:
        """Our figure with its unit."""
        if self.ours is None:
            return "–"
        return f"{self.ours:.0%}" if self.claim.metric == "share" else f"{self.ours:.2f}×"


@dataclass(frozen=True)
class Found:
    """Our counterpart of a claim; without `value` it is a reason why there is none."""

    value: float | None
    setting: str = ""
    reason: str = ""
    comparable: bool = True


# --- the claims -------------------------------------------------------------------------------------------


def claims() -> list[Claim]:
    """One claim for every technique, source and machine in published.csv that isn't itself the baseline."""
    found = []
    table = published.table().fillna({"gpu": "", "note": ""})
    for (source, gpu, gpus, technique), rows in table.groupby(["source", "gpu", "gpus", "technique"], sort=False):
        common = {
            "technique": technique,
            "source": source,
            "gpu": gpu,
            "gpus": int(gpus),
            "model": rows.model.iloc[0],
            "kind": rows.kind.iloc[0],
        }
        values = dict(zip(rows.metric, rows.value, strict=True))
        if technique != BASELINES.get(source) and (seconds := _seconds(values)) is not None:
            same = table[(table.source == source) & (table.gpu == gpu)]
            first = same[same.technique == BASELINES.get(source)]
            over = _seconds(dict(zip(first.metric, first.value, strict=True)))
            found.append(Claim(**common, metric="ratio", value=over / seconds if over else None))
        for metric, (kind, side, convert) in _PROMISES.items():
            if metric in values:
                found.append(Claim(**common, metric=kind, value=convert(values[metric]), side=side))
    return found


def _seconds(values: dict[str, float]) -> float | None:
    return next((values[m] for m in ("latency_second", "latency_p50", "latency_avg") if m in values), None)


_PROMISES: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "speedup": ("ratio", "", lambda v: v),
    "speedup_min": ("ratio", "least", lambda v: v),
    "speedup_max": ("ratio", "up to", lambda v: v),
    "latency_reduction": ("ratio", "", lambda v: 1 / (1 - v / 100)),
    "latency_gain_vs_fp16": ("ratio", "", lambda v: 1 / (1 - v / 100)),
    "memory_change": ("share", "most", lambda v: v / 100),
    "quality_loss_max": ("share", "most", lambda v: v / 100),
    "speedup_h100_over_a100": ("ratio", "", lambda v: v),
}


# --- ours -------------------------------------------------------------------------------------------------


def tables(root: Path) -> dict[str, list[dict]]:
    """Configuration -> its finished rows, of every results.csv below reports/ (smoke tests left out)."""
    found = {}
    for path in sorted((root / "reports").glob("*/**/results.csv")):
        if path.parent.name != "smoke":
            found[configuration(path.parent)] = latest(Results(path).rows())
    return found


def latest(rows: list[dict]) -> list[dict]:
    """The rows that a reader of the pages finds there.

    Those of the machine that a notebook was last run on, as figures of two machines aren't mixed. And of a stack's part
    that is now built of other techniques, what was measured last.
    """
    last: dict[str, tuple[str, str]] = {}  # notebook -> when and on which machine
    for row in rows:
        run = (str(row["measured_at"] or ""), row["machine"])
        last[row["notebook"]] = max(run, last.get(row["notebook"], run), key=lambda r: r[0])  # the later of two alike
    here = [row for row in rows if row["machine"] == last[row["notebook"]][1]]
    stack = sorted((r for r in here if r["notebook"] == STACK), key=lambda r: str(r["measured_at"] or ""))
    now = {_part(row): row for row in stack}
    return [row for row in here if row["notebook"] != STACK or now[_part(row)] is row]


def _part(row: dict) -> tuple:
    """What a row of the final stack is called, and made at: not its settings."""
    return tuple(row[name] for name in ("technique", "model", "use_case", "width", "height", "steps", "batch"))


def configuration(folder: Path) -> str:
    """The name of the configuration whose reports are in a folder: h200, or h200x2 for two of them."""
    count = folder.parent.name.removesuffix("gpu")
    return f"{folder.name}x{count}" if count.isdigit() else folder.name


def entries(rows: dict[str, list[dict]]) -> list[Entry]:
    """Every claim with its verdict, in the order of published.csv."""
    return [_entry(claim, rows) for claim in claims()]


def _entry(claim: Claim, rows: dict[str, list[dict]]) -> Entry:
    found = _counterpart(claim, rows)
    if found.value is None:
        return Entry(claim, None, found.setting, "not run", found.reason)
    if claim.value is None:
        reason = "theirs is a time without a baseline of its own, and ours was measured on another machine"
        return Entry(claim, found.value, found.setting, "not comparable", reason)
    if not found.comparable:
        return Entry(claim, found.value, found.setting, "not comparable", found.reason)
    said = verdict(claim, found.value)
    return Entry(claim, found.value, found.setting, said, found.reason if said == "not reproduced" else "")


def verdict(claim: Claim, ours: float) -> str:
    """reproduced or not reproduced, by the rule above."""
    if claim.side == "least":
        return "reproduced" if ours >= claim.value else "not reproduced"
    if claim.side == "most":
        return "reproduced" if ours <= claim.value else "not reproduced"
    if claim.side == "up to":
        return "reproduced" if ours >= (1 - TOLERANCE) * claim.value else "not reproduced"
    return "reproduced" if abs(ours / claim.value - 1) <= TOLERANCE else "not reproduced"


def _counterpart(claim: Claim, rows: dict[str, list[dict]]) -> Found:
    if claim.gpus > 1:
        return _on_several(claim, rows)
    if claim.metric == "share":
        return _quality(rows) if "quality" in _promised(claim) else _memory(claim, rows)
    if claim.kind != "measured" and (found := _best(claim, rows)):
        return found
    for pattern, finder in _FINDERS:
        if match := re.fullmatch(pattern, claim.technique):
            return finder(claim, match, rows)
    return Found(None, reason="no technique of the study stands for it")


def _promised(claim: Claim) -> str:
    table = published.table()
    own = table[(table.source == claim.source) & (table.technique == claim.technique)]
    return " ".join(own.metric)


def _first(rows: dict[str, list[dict]], configurations, wanted: Callable[[dict], bool]) -> tuple[str, dict] | None:
    """The first finished row that is wanted, in the order of configurations."""
    for name in configurations:
        for row in rows.get(name, []):
            if row["status"] == "ok" and wanted(row):
                return name, row
    return None


def _alike(claim: Claim) -> tuple[str, ...]:
    """The configurations whose hardware is alike enough for a claim's, with as many GPUs."""
    count = f"x{claim.gpus}" if claim.gpus > 1 else ""
    return tuple(f"{name}{count}" for name in ALIKE.get(claim.gpu, ()))


def _missing(claim: Claim, notebook: str) -> Found:
    alike = _alike(claim)
    on = f" on {' or '.join(alike)}" if alike else f": there is no configuration for {claim.gpu}" if claim.gpu else ""
    return Found(None, reason=f"no committed row of {notebook}{on}")


_CACHES = {"FBCache": ("First Block Cache", "05_first_block_cache"), "TeaCache": ("TeaCache", "06_teacache")}


def _cache(claim: Claim, match: re.Match, rows) -> Found:
    technique, notebook = _CACHES[match["cache"]]
    threshold = float(match["threshold"])
    quantized = claim.source.startswith("001")  # the Nunchaku experiment: a 4-bit transformer
    notebook = "08_quantized_cache" if quantized else notebook

    def wanted(row):
        return (
            row["notebook"] == notebook
            and row["model"] == "embedded"
            and row["technique"] == technique
            and row["settings"].get("threshold") == threshold
            and row["speedup"] is not None
        )

    found = _first(rows, ANYWHERE, wanted)
    if not found:
        return Found(None, reason=f"no committed row of {notebook} at the threshold {threshold:g}")
    name, row = found
    setting = f"embedded model{', 4-bit' if quantized else ''}, {name}: computes {row['computed_steps']:.3g} of "
    reason = "the same threshold on another trained model: how many steps it computes depends on the model's weights"
    return Found(row["speedup"], setting + f"{row['total_steps']} steps", reason, comparable=False)


def _stack(claim: Claim, match: re.Match, rows) -> Found:
    """A row of 13_final_stack at full size, by published.COUNTERPARTS."""
    own = (claim.source, claim.gpu, claim.technique)
    pairs = ((c, c.ours.removeprefix("+ ")) for c in published.COUNTERPARTS)
    counterpart, technique = next(((c, t) for c, t in pairs if (c.source, c.gpu, c.technique) == own), (None, ""))

    def wanted(row):
        stack = row["notebook"] == STACK and row["weights"] == "random"
        return stack and row["technique"] == technique

    found = _first(rows, ALIKE.get(claim.gpu, ()), wanted) if counterpart else None
    if not found:
        return _missing(claim, STACK)
    name, row = found
    return Found(row["speedup"], f"{row['model']}, {name}, {row['steps']} steps: {technique}", counterpart.why)


def _number_format(claim: Claim, match: re.Match, rows) -> Found:
    found = _first(
        rows,
        ALIKE.get(claim.gpu, ()),
        lambda row: (
            row["notebook"] == "01_baseline"
            and row["weights"] == "random"
            and row["technique"] == "number format"
            and row["settings"]["dtype"] == "float16"
        ),
    )
    if not found:
        return _missing(claim, "01_baseline")
    name, row = found
    return Found(
        1 / row["speedup"], f"{row['model']}, {name}: BF16 over FP16", "both formats run on the same units here"
    )


def _attention(claim: Claim, match: re.Match, rows) -> Found:
    found = _first(
        rows,
        ALIKE.get(claim.gpu, ()),
        lambda row: (
            row["notebook"] == "02_attention"
            and row["technique"] == "SDPA FlashAttention 2"
            and row["weights"] == "random"
        ),
    )
    if not found:
        return _missing(claim, "02_attention")
    name, row = found
    reason = "our baseline runs PyTorch's own choice, which is cuDNN's faster kernel; theirs ran an older one"
    return Found(row["speedup"], f"{row['model']}, {name}: flash over PyTorch's choice", reason)


# source of claims on several GPUs -> our technique, its settings for a degree, and theirs on one GPU, compiled
_SEVERAL = {
    "xDiT docs/performance/flux.md": ("xDiT", {"ulysses": "xdit_ulysses", "ring": "xdit_ring"}, "bf16 compile"),
    "sglang PR 19673": ("context parallel", {"ulysses": "ulysses"}, "SGLang native FA3 compile"),
}
_EAGER = ("FSDP", "PipeFusion")  # techniques of 11_parallel that nothing is built in with: alone, one GPU is eager


def _on_several(claim: Claim, rows) -> Found:
    """The fastest row of 11_parallel with the claim's degree, over one eager GPU of its kind, alone."""
    match = re.search(r"(?P<way>ulysses|ring) (?P<degree>\d+)$", claim.technique)
    if claim.source not in _SEVERAL or not match:
        return _missing(claim, "11_parallel")
    technique, names, compiled = _SEVERAL[claim.source]

    def wanted(row):
        return row["technique"] == technique and row["settings"].get(names.get(match["way"])) == int(match["degree"])

    for name in _alike(claim):
        kind = name.removesuffix(f"x{claim.gpus}")
        eager = {
            other: row["proof"]["alone_s"]
            for other, theirs in rows.items()
            if re.fullmatch(rf"{kind}(x\d+)?", other)
            for row in findings.divided(theirs)
            if row["technique"] in _EAGER
        }
        own = findings.divided(rows.get(name, []))
        if eager and (found := [r for r in own if wanted(r)]):
            of = name if name in eager else min(eager)
            row = min(found, key=lambda r: r["latency_p50"])
            theirs = {c.technique: c.value for c in claims() if c.source == claim.source}
            reason = (
                "one eager GPU is faster here, where PyTorch chooses cuDNN's attention; over one compiled GPU theirs "
                f"is {claim.value / theirs[compiled]:.2f}×, ours {row['speedup']:.2f}×, with "
                f"{row['proof']['communication']:.0%} of a step's kernels moving data{_waited(row)}"
            )
            recorded = [r for r in own if _recorded_alike(r, match["way"], int(match["degree"]))]
            if best := min(recorded, key=lambda r: r["latency_p50"], default=None):
                times = eager[of] / best["latency_p50"]
                reason += f"; the study's own {match['way']} {match['degree']} in a CUDA graph: {times:.2f}×"
            setting = f"{row['model']}, {name}, {row['steps']} steps: {technique}, {match['way']} {match['degree']}"
            setting += f", over one eager GPU of {of}" if of != name else ""
            return Found(eager[of] / row["latency_p50"], setting, reason)
    return _missing(claim, "11_parallel")


def _recorded_alike(row: dict, way: str, degree: int) -> bool:
    """Whether it is the study's own division of this way, unquantized, its kernels recorded."""
    own = row["technique"] == "context parallel" and "cuda_graph" in row["settings"]
    return own and row["settings"].get(way) == degree


def _waited(row: dict) -> str:
    """Of a step in which a GPU waits for its host, how much its kernels take; nothing of others."""
    step = row["proof"].get("steps_ms", {}).get("computed")
    kernels = sum((row["proof"].get("step_ms") or {}).values())
    if not step or kernels > 0.75 * step:
        return ""
    return f", and its kernels take {kernels:.0f} of a step's {step:.0f} ms: the GPU waits for its host"


_THRESHOLD = r" ?\((?P<threshold>[0-9.]+)\)"
_FINDERS = (
    (r"(?P<cache>FBCache|TeaCache)" + _THRESHOLD, _cache),
    (r"BF16", _number_format),
    (r"FlashAttention2", _attention),
    (r"all", lambda claim, match, rows: Found(None, reason="a ratio of two GPUs: rows of both are needed")),
    (r".+", _stack),
)


def _judged(row: dict) -> bool:
    return row["model"] == "embedded" and row["adherence"] is not None and row["speedup"] is not None


def _best(claim: Claim, rows) -> Found | None:
    """The fastest setting that keeps adherence, for what the plans promise of a cache; None for anything else."""
    promised = {
        "FBCache": ("First Block Cache", "05_first_block_cache"),
        "TeaCache": ("TeaCache", "06_teacache"),
        "FBCache + TeaCache": ("combined cache", "07_combined_cache"),
    }
    if claim.technique not in promised:
        return None
    technique, notebook = promised[claim.technique]
    found = []
    for name in ANYWHERE:
        own = [r for r in rows.get(name, []) if r["status"] == "ok" and r["notebook"] == notebook and r["steps"] == 28]
        baseline = next((r for r in own if r["technique"] == "baseline" and _judged(r)), None)
        kept = [r for r in own if r["technique"] == technique and _judged(r)]
        found += [(r["speedup"], name, r) for r in kept if baseline and findings.keeps_adherence(r, baseline)]
    if not found:
        return Found(None, reason=f"no committed row of {notebook}")
    speedup, name, best = max(found, key=lambda f: f[0])
    setting = f"embedded model, {name}: the fastest setting that keeps adherence, {best['psnr_db']:.3g} dB"
    return Found(speedup, setting, "ours is the fastest setting within 5 % of adherence, on the embedded model")


def _memory(claim: Claim, rows) -> Found:
    for name in ALIKE.get(claim.gpu, ()):
        own = [r for r in rows.get(name, []) if r["notebook"] == STACK and r["weights"] == "random"]
        by_name = {r["technique"]: r for r in own if r["status"] == "ok"}
        if {"baseline", "VAE compiled"} <= by_name.keys():
            change = by_name["VAE compiled"]["memory_peak_gib"] / by_name["baseline"]["memory_peak_gib"] - 1
            return Found(change, f"flux-dev-random, {name}: peak of the FP8 stack against BF16", "")
    return _missing(claim, STACK)


def _quality(rows) -> Found:
    """The loss of adherence of the fastest recommended setting: what the plans allow 5 % of."""
    for name in ANYWHERE:
        own = [r for r in rows.get(name, []) if r["status"] == "ok" and r["notebook"] == "07_combined_cache"]
        baseline = next((r for r in own if r["technique"] == "baseline" and _judged(r) and r["steps"] == 28), None)
        kept = [r for r in own if r["technique"] == "combined cache" and _judged(r) and r["steps"] == 28]
        if baseline and kept:
            fastest = max(kept, key=lambda r: r["speedup"])
            loss = 1 - fastest["adherence"] / baseline["adherence"]
            return Found(max(0.0, loss), f"embedded model, {name}: adherence lost at {fastest['speedup']:.2f}×", "")
    return Found(None, reason="no committed row of 07_combined_cache")


def counts(found: list[Entry]) -> dict[str, int]:
    """How many entries have each verdict."""
    return {name: sum(e.verdict == name for e in found) for name in VERDICTS}
