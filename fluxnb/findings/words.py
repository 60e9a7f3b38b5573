"""Figures in words: what stands in a sentence and under an image."""

from __future__ import annotations

from fluxnb.findings.rows import ends
from fluxnb.measure import quality, stats
from fluxnb.study.row import Row
from fluxnb.world import probe

_COUNTED = {2: "two", 3: "three", 4: "four", 5: "five"}


def share(value: float | None) -> str:
    """A share as percent, or a dash."""
    return "–" if value is None else f"{value:.0%}"


def psnr(row: Row) -> str:
    """Its PSNR, or that its images are identical."""
    return quality.format_psnr(row.psnr_db, row.psnr_identical or 0)


def interval(row: Row) -> str:
    """The interval of its speedup."""
    return f"[{row.speedup_ci_low:.2f}, {row.speedup_ci_high:.2f}]"


def sureness(row: Row) -> str:
    """What its rounds say of its speedup: 95 % interval [2.40, 2.60], n = 10; a range below six; n where none holds."""
    n, found = f"n = {row.n}", ends(row)
    if found is None:
        return n
    kind = "95 % interval" if row.n >= stats.LEAST else f"range of {_COUNTED.get(row.n, row.n)} rounds"
    return f"{kind} [{found[0]:.2f}, {found[1]:.2f}]" + (f", {n}" if row.n >= stats.LEAST else "")


def under_image(reference, image, prompt: str | None) -> str:
    """The caption of an image in a grid: PSNR against the reference, and adherence to the prompt if one is given."""
    words = quality.format_psnr(quality.psnr(reference, image))
    found = prompt and adherence_of(prompt, image)
    return f"{words}, {found}" if found else words


def adherence_of(prompt: str, image) -> str | None:
    """The share of a prompt's facts that an image has; None for a prompt that states no known fact."""
    (found,) = probe.adherence([prompt], [image])
    return None if found is None else share(found)
