"""What gates saw and decided, as notebooks show it: charts of traces, and in words; `show` has them too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fluxnb import families, findings
from fluxnb.cache import teacache
from fluxnb.errors import UserError
from fluxnb.measure import telemetry
from fluxnb.report import charts, html
from fluxnb.report.captions import conditions, masks, sentences


def steps(s, subject, candidates: list, note: str = "") -> None:
    """What the gates of caches saw at each step of the first prompt and seed, all of one family."""
    if decisions := _decisions(s, subject, candidates):
        family = families.named(candidates[0].meaning["family"])
        summed = "The threshold is of the accumulated, rescaled change, so no stem is compared with it by itself"
        html.figure(
            charts.trace(decisions, family),
            f"What {family.name} saw at each denoising step: {masks(decisions)}.",
            sentences(
                f"{conditions(subject, candidates[0])}, `{subject.inputs[0][0]}`: relative change at each step",
                summed if family is families.TEACACHE else "",
                note,
            ),
        )


def fired(s, subject, candidates: list, note: str = "") -> None:
    """Which steps each candidate computed, reused at the input or after the first block; first prompt and seed."""
    if decisions := _decisions(s, subject, candidates):
        html.figure(
            charts.fired(decisions),
            f"Which gate reused each step: {masks(decisions)}.",
            sentences(
                f"{conditions(subject, candidates[0])}, `{subject.inputs[0][0]}`",
                "Reused at the input: no block ran; after the first block: one did",
                note,
            ),
        )


def spread(s, subject, candidates: list) -> None:
    """How far the decisions of each candidate differ between the subject's images."""
    traces = _here(subject, lambda: {c.meaning["label"]: s.traces(subject, c) for c in candidates})
    if traces:
        html.callout(f"`{subject.model.name}`: {findings.spread_sentence(traces)}", "note")


def fit(s, subject) -> None:
    """TeaCache's polynomial, fitted to every uncached image of the subject, beside the one published for FLUX.1-dev."""
    found = _here(subject, lambda: teacache.fit(s.loaded(subject), s.steps(subject)))
    if found is None:
        return
    x, y = np.array(found.changes).T
    inside, name = np.linspace(x.min(), x.max(), 200), f"`{subject.model.name}`"
    curves = {"fitted": found.coefficients, "published": teacache.FLUX_DEV}
    html.callout(f"{name}: {findings.polynomial_sentence(found, teacache.FLUX_DEV)}", "note")
    polynomial(
        x, y, {label: (inside, np.polyval(of, inside)) for label, of in curves.items()},
        f"{name}: what the polynomial is fitted to, and the published one beside it.",
    )  # fmt: skip


def polynomial(x, y, fits: dict, caption: str) -> None:
    """Points (change of input, change of output) and polynomials through them, name -> (xs, ys)."""
    alt = f"Change of the output against change of the modulated input at {len(x)} steps, with {' and '.join(fits)}."
    html.figure(charts.polynomial(x, y, fits), alt, caption)


def _decisions(s, subject, candidates: list) -> list[tuple[str, dict]]:
    """(label, trace) of the first input; nothing in a replay without what was kept."""
    found = _here(subject, lambda: [(c.meaning["label"], s.traces(subject, c)[0]) for c in candidates])
    return [(label, trace) for label, trace in found or [] if trace]


def _here(subject, of: Callable):
    """What `of` returns; in a replay without what was kept a note that says so, and None."""
    try:
        return of()
    except UserError as error:
        if not telemetry.replayed():
            raise
        html.callout(f"What the gates saw on `{subject.model.name}` is not here: {error}", "not-measured")
        return None
