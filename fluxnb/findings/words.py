"""Figures in words: what stands in a sentence, under an image and in an alt text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fluxnb.findings.table import Column
from fluxnb.measure import quality
from fluxnb.study.row import Row
from fluxnb.world import probe


def share(value: float | None) -> str:
    """A share as percent, or a dash."""
    return "–" if value is None else f"{value:.0%}"


def psnr(row: Row) -> str:
    """Its PSNR, or that its images are identical."""
    return quality.format_psnr(row.psnr_db, row.psnr_identical or 0)


def interval(row: Row) -> str:
    """The interval of its speedup."""
    return f"[{row.speedup_ci_low:.2f}, {row.speedup_ci_high:.2f}]"


SPEED_AND_QUALITY = (Column("speedup", "speedup", "times", format=".2f"), Column("PSNR", psnr))


def alt(rows: Sequence[Row], what: str, columns: Iterable[Column] = SPEED_AND_QUALITY) -> str:
    """What a chart shows, in words: each row's label and its figures."""
    columns = list(columns)
    values = zip(*(c.of(rows) for c in columns), strict=True)
    points = (
        f"{r.label}: {', '.join(_figure(v, c) for v, c in zip(own, columns, strict=True))}"
        for r, own in zip(rows, values, strict=True)
    )
    return f"{what}. {'; '.join(points)}."


def under_image(reference, image, prompt: str | None) -> str:
    """The caption of an image in a grid: PSNR against the reference, and adherence to the prompt if one is given."""
    words = quality.format_psnr(quality.psnr(reference, image))
    found = probe.adherence([prompt], [image])[0] if prompt else None
    return words if found is None else f"{words}, {share(found)}"


def _figure(value, column: Column) -> str:
    if value is None:
        return f"no {column.title}"
    if isinstance(value, str):
        return value
    how = column.format or (".1%" if column.share else ".3g")
    return f"{value:{how}} {column.unit}".rstrip()
