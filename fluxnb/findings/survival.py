"""What became of an image in every case of use: the matrix, its sentence, and what was compiled anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fluxnb.findings.table import listed
from fluxnb.study.row import Row
from fluxnb.study.survival import CASE, PUT_ON, RAW, RECOMPILED, RIGHT, SENTENCE, WRONG

AT_FAULT = (WRONG, RAW)


def verdict(row: Row) -> str | None:
    """What became of the image; None where nothing was tried."""
    return row.shown("verdict")


def can_run(rows: Sequence[Row]) -> bool:
    """Whether what these rows are of can be put on here at all."""
    return not any(r.setting(CASE) == PUT_ON.name and r.status == "unavailable" for r in rows)


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label of a technique or recipe -> its rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.label or "", []).append(row)
    return found


def survival_sentence(rows: Sequence[Row]) -> str:
    """How many cells have the right image, a sentence, a wrong image or a raw error; of faults which."""
    groups = by_label(rows)
    tried = [r for own in groups.values() if can_run(own) for r in own if verdict(r)]
    count = Counter(verdict(r) for r in tried)
    running = sum(map(can_run, groups.values()))
    cells = f"{len(tried)} cells of {running} techniques and recipes that run here"
    said = f"{cells}: the right image in {count[RIGHT] + count[RECOMPILED]}"
    said += f", in {count[RECOMPILED]} of them after compiling anew" if count[RECOMPILED] else ""
    said += f", a sentence that says what can't work in {count[SENTENCE]}"
    faults = [r for r in tried if verdict(r) in AT_FAULT]
    if not faults:
        return f"**No wrong image and no raw error** in {said}."
    named = "; ".join(f"{r.label}, {r.setting(CASE)}: {verdict(r)} ({r.reason})" for r in faults)
    return f"**Wrong images: {count[WRONG]}, raw errors: {count[RAW]}** in {said}. They are {named}."


def compiled_anew(rows: Sequence[Row]):
    """How often what was compiled is compiled again in each case, and how long that takes; None without any."""
    lines = [
        {"technique": r.label, "case": r.setting(CASE), "graphs": r.shown("recompiles"), "lost": r.shown("lost_s")}
        for r in rows
        if r.shown("recompiles")
    ]
    return listed(lines, "technique", {"lost": "s"}) if lines else None
