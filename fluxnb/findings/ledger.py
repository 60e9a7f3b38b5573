"""The ledger of claims: every published figure that the study is about, beside ours, with a verdict by rule.

A claim is a ratio: a published time over its own published baseline, a speedup or a share that was promised. Ours is
the same ratio from committed rows. The rule (`verdict`):

    reproduced      ours is within 15 % of theirs, or on the promised side of a bound (15 % short of an "up to")
    not reproduced  it isn't
    not comparable  theirs has no baseline of its own, or ours measures something else; the reason says what
    not run         no committed row stands for it; the reason says what would make one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxnb import families, notebooks, stacks
from fluxnb.findings import published
from fluxnb.findings.published import Claim
from fluxnb.findings.rows import LOSS, divided, is_baseline, keeps_adherence
from fluxnb.study.results import canonical
from fluxnb.study.row import FINISHED, Row

REPRODUCED, NOT_REPRODUCED, NOT_COMPARABLE, NOT_RUN = "reproduced", "not reproduced", "not comparable", "not run"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_COMPARABLE, NOT_RUN)
TOLERANCE = 0.15
EMBEDDED = "embedded"  # the model whose images are judged
# published GPU -> configurations whose hardware is alike enough for a ratio
ALIKE = {
    "H100": ("h200", "h100"),
    "H100 80GB": ("h200", "h100"),
    "H200": ("h200", "h100"),
    "A100 80GB": ("a100",),
    "A6000": ("a6000",),
}
ANYWHERE = ("h200", "h100", "a100", "a6000", "cpu")  # where the ratio is one of decisions, not of hardware

Tables = dict[str, list[Row]]  # configuration -> the rows that a reader finds


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
        return self.claim.said(self.ours)


@dataclass(frozen=True)
class Found:
    """What we have for a claim; without `value` it is a reason why there is nothing."""

    value: float | None
    setting: str = ""
    reason: str = ""
    comparable: bool = True


def latest(rows: list[Row]) -> list[Row]:
    """The rows that a reader of the pages finds there.

    Those of the machine that a notebook was last run on, as figures of two machines aren't mixed; rows of the earlier
    format know no host, and machines of one kind count as one. Of what was measured again the newest: a stack by its
    name, whatever it is built of now; anything else by its settings. A baseline stays while rows were timed with it. A
    stack of full size without a name is one that nothing builds any more.
    """
    last: dict[str, Row] = {}  # the newest row of each notebook; of two alike the later one
    for row in rows:
        if row.notebook not in last or _when(row) >= _when(last[row.notebook]):
            last[row.notebook] = row
    here = [r for r in rows if (r.host, r.kind) == (last[r.notebook].host, last[r.notebook].kind)]
    here = [r for r in here if r.stack or r.weights != "random" or r.family != families.STACK.name]
    newest = {_part(row): row for row in sorted(here, key=lambda r: (r.status in FINISHED, _when(r)))}
    referred = {r.baseline for r in newest.values() if r.baseline}
    return [r for r in here if newest[_part(r)] is r or r.id in referred]


def _when(row: Row) -> str:
    return row.measured_at or ""


def _part(row: Row) -> tuple:
    """What is replaced when it is measured again."""
    name = (row.stack,) if row.stack else (row.technique, canonical(row.settings))
    at = (row.notebook, row.model, row.use_case, row.gpus, row.width, row.height, row.steps, row.batch)
    return (*name, *at, row.users, row.images_each, row.seed)


# --- verdicts ---------------------------------------------------------------------------------------------


def entries(rows: Tables) -> list[Entry]:
    """Every claim with its verdict, in the order of published.csv."""
    return [_entry(claim, rows) for claim in published.claims()]


def counts(found: list[Entry]) -> dict[str, int]:
    """How many entries have each verdict."""
    return {name: sum(e.verdict == name for e in found) for name in VERDICTS}


def _entry(claim: Claim, rows: Tables) -> Entry:
    found = _found(claim, rows)
    if found.value is None:
        return Entry(claim, None, found.setting, NOT_RUN, found.reason)
    if claim.value is None:
        reason = "theirs is a time without a baseline of its own, and ours was measured on another machine"
        return Entry(claim, found.value, found.setting, NOT_COMPARABLE, reason)
    if not found.comparable:
        return Entry(claim, found.value, found.setting, NOT_COMPARABLE, found.reason)
    said = verdict(claim, found.value)
    return Entry(claim, found.value, found.setting, said, found.reason if said == NOT_REPRODUCED else "")


def verdict(claim: Claim, ours: float) -> str:
    """reproduced or not reproduced, by the rule above."""
    holds = {
        published.LEAST: ours >= claim.value,
        published.MOST: ours <= claim.value,
        published.UP_TO: ours >= (1 - TOLERANCE) * claim.value,
    }.get(claim.side, abs(ours / claim.value - 1) <= TOLERANCE)
    return REPRODUCED if holds else NOT_REPRODUCED


# --- ours -------------------------------------------------------------------------------------------------


def _found(claim: Claim, rows: Tables) -> Found:
    if claim.gpus > 1:
        return _on_several(claim, rows)
    if claim.metric in _ABOUT:
        return _ABOUT[claim.metric](claim, rows)
    if claim.family in _CACHES and claim.threshold is None:
        return _best(claim, rows)
    return _OF_FAMILY.get(claim.family, _stack)(claim, rows)


def _alike(claim: Claim) -> tuple[str, ...]:
    """The configurations whose hardware is alike enough for a claim's, with as many GPUs."""
    count = f"x{claim.gpus}" if claim.gpus > 1 else ""
    return tuple(f"{name}{count}" for name in ALIKE.get(claim.gpu, ()))


def _missing(claim: Claim, notebook: str) -> Found:
    alike = _alike(claim)
    on = f" on {' or '.join(alike)}" if alike else f": there is no configuration for {claim.gpu}" if claim.gpu else ""
    return Found(None, reason=f"no committed row of {notebook}{on}")


def _full_size(claim: Claim, rows: Tables, notebook: str, wanted: Callable[[Row], bool]) -> tuple[str, Row | None]:
    """The first row of a notebook at full size that is wanted, on hardware that is alike, and where that is."""
    for name in _alike(claim):
        for row in rows.get(name, []):
            if row.ok and (row.notebook, row.weights) == (notebook, "random") and wanted(row):
                return name, row
    return "", None


_CACHES = {  # family -> the notebook that measures it
    families.FIRST_BLOCK.name: notebooks.FIRST_BLOCK,
    families.TEACACHE.name: notebooks.TEACACHE,
    families.COMBINED.name: notebooks.COMBINED,
}


_FOUR_BIT = {"quantization", "rank"}  # settings of the transformer that a cache runs on
_OTHER_WEIGHTS = (
    "the same threshold on another trained model: how many steps it computes depends on the model's weights"
)


def _cache(claim: Claim, rows: Tables) -> Found:
    """A cache at the claim's threshold with as little else set as was measured."""
    quantized = claim.source == published.NUNCHAKU
    notebook = notebooks.QUANTIZED_CACHE if quantized else _CACHES[claim.family]
    for name in ANYWHERE:
        own = [r for r in rows.get(name, []) if r.ok and (r.notebook, r.model) == (notebook, EMBEDDED)]
        own = [r for r in own if r.family == claim.family and r.speedup is not None]
        at = [r for r in own if r.setting("threshold") == claim.threshold]
        if row := min(at, key=lambda r: len(r.settings.keys() - _FOUR_BIT), default=None):
            setting = f"embedded model{', 4-bit' if quantized else ''}, {name}: computes {row.computed_steps:.3g} of "
            return Found(row.speedup, f"{setting}{row.total_steps} steps", _OTHER_WEIGHTS, comparable=False)
    return Found(None, reason=f"no committed row of {notebook} at the threshold {claim.threshold:g}")


def _stack(claim: Claim, rows: Tables) -> Found:
    """A row of the final stack at full size, by published.COUNTERPARTS."""
    counterpart = next((c for c in published.COUNTERPARTS if c.of(claim)), None)
    if counterpart is None:
        return _missing(claim, notebooks.FINAL_STACK)
    name, row = _full_size(claim, rows, notebooks.FINAL_STACK, lambda r: r.stack == counterpart.ours)
    if row is None:
        return _missing(claim, notebooks.FINAL_STACK)
    return Found(row.speedup, f"{row.model}, {name}, {row.steps} steps: {row.label}", counterpart.why)


def _number_format(claim: Claim, rows: Tables) -> Found:
    def wanted(row):
        return row.family == families.NUMBER_FORMAT.name and row.setting("dtype") == "float16"

    name, row = _full_size(claim, rows, notebooks.NUMBER_FORMATS, wanted)
    if row is None:
        return _missing(claim, notebooks.NUMBER_FORMATS)
    reason = "both formats run on the same units here"
    return Found(1 / row.speedup, f"{row.model}, {name}: BF16 over FP16", reason)


def _attention(claim: Claim, rows: Tables) -> Found:
    def wanted(row):
        return row.family == families.ATTENTION.name and row.setting("attention") == "flash"

    name, row = _full_size(claim, rows, notebooks.ATTENTION, wanted)
    if row is None:
        return _missing(claim, notebooks.ATTENTION)
    reason = "our baseline runs PyTorch's own choice, which is cuDNN's faster kernel; theirs ran an older one"
    return Found(row.speedup, f"{row.model}, {name}: flash over PyTorch's choice", reason)


def _memory(claim: Claim, rows: Tables) -> Found:
    """What the FP8 stack changes of the peak of memory."""
    name, after = _full_size(claim, rows, notebooks.FINAL_STACK, lambda r: r.stack == stacks.VAE_COMPILED)
    here = {name: rows.get(name, [])}
    _, before = _full_size(claim, here, notebooks.FINAL_STACK, is_baseline)
    if before is None or after is None:
        return _missing(claim, notebooks.FINAL_STACK)
    change = after.memory_peak_gib / before.memory_peak_gib - 1
    return Found(change, f"{after.model}, {name}: peak of the FP8 stack against BF16")


def _judged(rows: list[Row], family: str, notebook: str) -> tuple[Row | None, list[Row]]:
    """What was judged of a family, and its baseline: that of the most steps, and what has as many."""
    own = [r for r in rows if r.ok and (r.notebook, r.model) == (notebook, EMBEDDED) and r.adherence is not None]
    baselines = filter(is_baseline, own)
    baseline = max(baselines, key=lambda r: r.steps, default=None)
    own = [r for r in own if r.family == family and r.speedup is not None]
    return baseline, [r for r in own if baseline and r.steps == baseline.steps]


def _best(claim: Claim, rows: Tables) -> Found:
    """The fastest setting that keeps adherence, for what the plans promise of a cache."""
    notebook, found = _CACHES[claim.family], []
    for name in ANYWHERE:
        baseline, own = _judged(rows.get(name, []), claim.family, notebook)
        found += [(name, r) for r in own if keeps_adherence(r, baseline)]
    if not found:
        return Found(None, reason=f"no committed row of {notebook}")
    name, best = max(found, key=lambda f: f[1].speedup)
    psnr = "identical" if best.psnr_db is None else f"{best.psnr_db:.3g} dB"
    setting = f"embedded model, {name}: the fastest setting that keeps adherence, {psnr}"
    return Found(
        best.speedup, setting, f"ours is the fastest setting within {LOSS} of adherence, on the embedded model"
    )


def _quality(claim: Claim, rows: Tables) -> Found:
    """The loss of adherence of the fastest combined setting: what the plans allow 5 % of."""
    for name in ANYWHERE:
        baseline, own = _judged(rows.get(name, []), families.COMBINED.name, notebooks.COMBINED)
        if own:
            fastest = max(own, key=lambda r: r.speedup)
            loss = 1 - fastest.adherence / baseline.adherence
            return Found(max(0.0, loss), f"embedded model, {name}: adherence lost at {fastest.speedup:.2f}×")
    return Found(None, reason=f"no committed row of {notebooks.COMBINED}")


_ABOUT: dict[str, Callable[[Claim, Tables], Found]] = {
    published.MEMORY: _memory,
    published.QUALITY: _quality,
    published.MACHINES: lambda claim, rows: Found(None, reason="a ratio of two GPUs: rows of both are needed"),
}
_OF_FAMILY: dict[str, Callable[[Claim, Tables], Found]] = {
    families.FIRST_BLOCK.name: _cache,
    families.TEACACHE.name: _cache,
    families.NUMBER_FORMAT.name: _number_format,
    families.ATTENTION.name: _attention,
}

# --- ours on several GPUs ---------------------------------------------------------------------------------

# source -> our stacks by the claim's way, and theirs on one GPU, compiled
_SEVERAL: dict[str, tuple[dict[str, tuple[str, ...]], str]] = {
    published.XDIT: (
        {published.ULYSSES: (stacks.XDIT_ULYSSES,), published.RING: (stacks.XDIT_RING,)},
        "bf16 compile",
    ),
    published.SGLANG: (
        {published.ULYSSES: (stacks.ULYSSES, stacks.ULYSSES_RECORDED)},
        "SGLang native FA3 compile",
    ),
}
_RECORDED = {published.ULYSSES: (stacks.ULYSSES_RECORDED,)}  # the study's own in a CUDA graph
COUNTS = (2, 4, 8)  # GPUs of a configuration


def _on_several(claim: Claim, rows: Tables) -> Found:
    """The fastest row of 11_parallel with the claim's way, over one eager GPU of its kind, alone."""
    ours, _ = _SEVERAL.get(claim.source, ({}, ""))
    for kind in ALIKE.get(claim.gpu, ()):
        name = f"{kind}x{claim.gpus}"
        own = divided(rows.get(name, []))
        eager, row = _eager_alone(rows, kind), _soonest(own, ours.get(claim.way, ()))
        if eager and row:
            of = name if name in eager else min(eager)
            reason = _compiled(claim, row)
            if recorded := _soonest(own, _RECORDED.get(claim.way, ())):
                times = eager[of] / recorded.latency_p50
                reason += f"; the study's own {claim.way} {claim.gpus} in a CUDA graph: {times:.2f}×"
            setting = f"{row.model}, {name}, {row.steps} steps: {row.label}"
            setting += f", over one eager GPU of {of}" if of != name else ""
            return Found(eager[of] / row.latency_p50, setting, reason)
    return _missing(claim, notebooks.PARALLEL)


def _eager_alone(rows: Tables, kind: str) -> dict[str, float]:
    """Configuration -> seconds of one eager GPU of a kind, from the ways that nothing is built in with."""
    return {
        name: row.shown("alone_s")
        for name in (kind, *(f"{kind}x{count}" for count in COUNTS))
        for row in divided(rows.get(name, []))
        if row.stack in stacks.FOR_GOOD
    }


def _soonest(rows: list[Row], names: tuple[str, ...]) -> Row | None:
    return min((r for r in rows if r.stack in names), key=lambda r: r.latency_p50, default=None)


def _compiled(claim: Claim, row: Row) -> str:
    """Why a ratio over one eager GPU differs: what both are over one compiled GPU, and what a step waits for."""
    compiled = next(
        c for c in published.claims() if (c.source, c.technique) == (claim.source, _SEVERAL[claim.source][1])
    )
    said = (
        "one eager GPU is faster here, where PyTorch chooses cuDNN's attention; over one compiled GPU theirs is "
        f"{claim.value / compiled.value:.2f}×, ours {row.speedup:.2f}×, with {row.shown('communication'):.0%} of a "
        "step's kernels moving data"
    )
    step = row.shown("steps_ms", {}).get("computed")
    kernels = sum((row.shown("step_ms") or {}).values())
    if step and kernels <= 0.75 * step:
        said += f", and its kernels take {kernels:.0f} of a step's {step:.0f} ms: the GPU waits for its host"
    return said
