"""What the final stack's rows say: phase by phase, and beside published figures."""

from __future__ import annotations

from fluxnb.findings import ledger, published
from fluxnb.findings.rows import fastest, over, peak_gib, within_noise
from fluxnb.findings.single_gpu import limited
from fluxnb.findings.table import APPLIED, LOADED, P50, PEAK, PER_STEP, SPEEDUP, Column, listed, table
from fluxnb.findings.words import sureness
from fluxnb.study.row import Row


def gains(rows: list[Row], ceilings, work):
    """Every phase with its gain over the fastest before it in its session, and whether that is beyond the noise."""
    steps = [_step(rows, i) for i in range(len(rows))]
    columns = (
        P50,
        PER_STEP,
        Column("own gain", [step and step[0] for step in steps], "×"),
        Column("beyond the noise", [step and ("yes" if step[1] else "no") for step in steps]),
        *SPEEDUP,
        LOADED,
        PEAK,
        APPLIED,
    )
    return table(rows, limited(columns, ceilings, work), "phase")


def stack_sentence(rows: list[Row]) -> str:
    """From the baseline to the last phase, in that phase's own session, and the largest gain of one phase."""
    first, last = rows[0], rows[-1]
    if last.speedup is None or last is first:
        return "no phase can run here; the table says why."
    said = f"the last phase takes **{last.latency_p50:.2f} s** instead of {last.baseline_s:.2f} s, "
    said += f"{last.speedup:.2f}× ({sureness(last)})"
    if peak_gib(first) and peak_gib(last):
        said += f", at {peak_gib(last):.1f} GiB instead of {peak_gib(first):.1f}"
    steps = ((step, r.label) for i, r in enumerate(rows) if (step := _step(rows, i)))
    gain, label = max(((gain, label) for (gain, sure), label in steps if gain > 1 and sure), default=(None, ""))
    if gain is None:
        return f"{said}; no phase gains anything over the fastest before it beyond the noise."
    return f"{said}; the largest gain of one phase is that of “{label}”, {gain:.2f}× the fastest before it."


def _step(rows: list[Row], i: int) -> tuple[float, bool] | None:
    """A phase's gain over the fastest before it in its session, and whether that is beyond the noise."""
    row, before = rows[i], [r for r in rows[:i] if r.session == rows[i].session]
    if (gain := over(row, before)) is None:
        return None
    best = fastest(before)
    return gain, not within_noise(row, best if best and best.speedup > 1 else rows[0], rows[0])


def beside_published(rows: list[Row]):
    """Published speedups beside those of the rows that have their configuration, with the ledger's verdicts."""
    found = [e for e in ledger.entries(rows) if e.row is not None and e.claim.about == published.SPEEDUP]
    lines = [
        {
            "claim": e.claim.technique,
            "GPU": e.claim.gpu,
            "theirs": e.claim.text,
            "ours": e.text,
            "verdict": e.verdict,
            "why": e.reason,
            "row": e.row.id,
        }
        for e in found
    ]
    return listed(lines or [{"claim": "none", "why": "no row has the configuration of a published figure"}], "claim")
