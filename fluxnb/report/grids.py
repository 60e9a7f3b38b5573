"""Images beside each other, as notebooks show them: the prompts that are shown, and the worst that was judged."""

from __future__ import annotations

import math

from fluxnb import families, findings
from fluxnb.errors import UserError
from fluxnb.families import Family
from fluxnb.measure import perceptual, quality, telemetry
from fluxnb.models import pipelines
from fluxnb.report import html
from fluxnb.report.captions import conditions, sentences, taken
from fluxnb.study.inferences import both_images
from fluxnb.study.row import Row
from fluxnb.technique import Unavailable
from fluxnb.world import scenes

HEAT = "FLIP: where a person would see a difference from the baseline's image; black is none, white the most there is"
LAST = "baseline, where the setting is worst", "the setting's worst"


def grid(
    s, subject, baseline, candidates: list, rows: list[Row] | None = None, *, width: int | None = None,
    by: str = "prompt", difference: bool = False,
) -> None:  # fmt: skip
    """Images of the prompts that are shown (`subject.showing`), and of those that judge each candidate's worst.

    Args:
        s: the study that made or kept them.
        rows: of the candidates; their speedups go into the heads.
        width: of an image in CSS pixels.
        by: "prompt", a line for each prompt, or "setting", a line for each setting.
        difference: beside each candidate's image the heat map of its FLIP from the baseline's.
    """
    shown, measured = subject.showing, {r.label: r for r in rows or []}
    try:
        reference, judged = s.images(shown, baseline), s.images(subject, baseline)
        columns = [*_started(shown), ("baseline", [(image, "") for image in reference])]
        columns = [(head, [*cells, None, None]) for head, cells in columns]
        for head, candidate in zip(_heads(candidates, rows), candidates, strict=True):
            made = _made(s, (shown, subject), candidate, measured.get(candidate.meaning["label"]))
            if isinstance(made, str):
                columns.append((head, [made] * len(reference) + [None, None]))
            else:
                pairs = [*zip(reference, made[0], shown.inputs, strict=True), _worst(subject, judged, made[1])]
                columns += _columns(subject, head, pairs, difference)
    except UserError as error:
        if not telemetry.replayed():
            raise
        html.callout(f"Images of `{subject.model.name}` are not here: {error}", "not-measured")
        return
    caption = sentences(
        conditions(shown, baseline),
        _known(subject),
        f"Last, for each setting: its worst image of the {len(judged)} that judge it, by PSNR, and the baseline's",
        "Under each image: PSNR, ST-LPIPS and FLIP against the baseline's"
        + (", and adherence: the share of the prompt's facts that are found in it" if subject.checked else ""),
        HEAT if difference else "",
        f"In the heads: speedup over the baseline, {taken(rows)}" if rows else "",
    )
    _show(columns, [*shown.prompts, *LAST], _dial(candidates) or "setting", by, caption=caption, width=width)


def both(s, rows: list[Row]) -> None:
    """The first and the second image of rows of `study.first_and_second`, below each other for each setting."""
    made = [both_images(s, row) for row in rows]
    if not any(made):
        html.callout("The first and the second images are not here: they were not kept with the rows.", "not-measured")
        return
    cells: list[list] = [[], []]
    for row, images in zip(rows, made, strict=True):
        for i, line in enumerate(cells):
            line.append((images[i], f"{row.samples[i]:.3g} s") if images else row.reason or "not kept")
    heads = [row.label for row in rows]
    caption = "One prompt and seed, made twice with a pipeline that was loaded for it. Under each image: what it took"
    html.image_grid(["first", "second"], heads, cells, corner="image \\ setting", caption=f"{caption}.")


def _columns(subject, head: str, pairs: list[tuple], difference: bool) -> list[tuple[str, list]]:
    """A candidate's cells, and those of its heat maps, of (reference, image, input); the last pair is its worst."""
    same = [quality.psnr(a, b) == math.inf for a, b, _ in pairs]
    cells = [(b, findings.under_image(a, b, prompt if subject.checked else None)) for a, b, (prompt, _) in pairs]
    reference, _, (prompt, seed) = pairs[-1]
    worst = [None, "all are identical"] if same[-1] else [(reference, f"{prompt}, seed {seed}"), cells[-1]]
    found = [(head, [*cells[:-1], *worst])]
    if difference:
        heat = ["identical" if s else (perceptual.flip(a, b)[1], "") for s, (a, b, _) in zip(same, pairs, strict=True)]
        found.append((f"{head}: FLIP", [*heat[:-1], None, heat[-1]]))
    return found


def _show(columns: list[tuple[str, list]], lines: list[str], setting: str, by: str, **options) -> None:
    """Columns of settings with a line for each prompt, or turned."""
    heads, cells = [head for head, _ in columns], [cells for _, cells in columns]
    if by == "prompt":
        turned = [list(line) for line in zip(*cells, strict=True)]
        html.image_grid(lines, heads, turned, corner=f"prompt \\ {setting}", **options)
    else:
        html.image_grid(heads, lines, cells, corner=f"{setting} \\ prompt", **options)


def _known(subject) -> str:
    """Whether the prompts that are shown count, and whose they are."""
    shown = set(subject.showing.prompts)
    if shown & set(subject.prompts):
        return ""
    whose = "the documents' own" if shown <= set(scenes.STUDY_PROMPTS) else "to be looked at"
    return f"The prompts shown are {whose}, and counted in no mean"


def _worst(subject, references: list, images: list) -> tuple:
    """(reference, image, input) where the PSNR is lowest; the first of identical ones."""
    pairs = zip(references, images, subject.inputs, strict=True)
    return min(pairs, key=lambda pair: quality.psnr(*pair[:2]))


def _made(s, subjects: tuple, candidate, row: Row | None) -> list[list] | str:
    """A candidate's images of each subject, or why there are none."""
    if row is not None and not row.ok:
        return f"{row.status}: {row.reason or 'no reason was noted'}"
    try:
        return [s.images(subject, candidate) for subject in subjects]
    except Unavailable as reason:
        return f"unavailable: {reason}"


def _family(candidate) -> Family:
    return families.named(candidate.meaning["family"])


def _dial(candidates: list) -> str | None:
    """The dial that tells candidates of one family from each other; None where something else does, or one is alone."""
    marks = {c.meaning["mark"] for c in candidates}
    one = len({_family(c) for c in candidates}) == 1 and len(marks) == len(candidates) > 1
    return _family(candidates[0]).dial if one else None


def _heads(candidates: list, rows: list[Row] | None) -> list[str]:
    """What stands over each setting's images: its place on the dial where that tells them apart, and its speedup."""
    name, fast = "mark" if _dial(candidates) else "label", {r.label: r.speedup for r in rows or []}
    speeds = (fast.get(c.meaning["label"]) for c in candidates)
    return [c.meaning[name] + (f" ({x:.2f}×)" if x else "") for c, x in zip(candidates, speeds, strict=True)]


def _started(subject) -> list[tuple[str, list]]:
    """What a use case starts from, as (name, its cell for each input)."""
    takes = {
        "input": (pipelines.takes_image(subject.use_case), lambda m: m.image),
        "mask": ("inpainting" in subject.use_case, lambda m: m.mask.convert("RGB")),
        subject.kind: (pipelines.takes_condition(subject.use_case), lambda m: m.condition(subject.kind)),
    }
    if subject.use_case == "txt2img":
        return []
    given = [subject.material(*each) for each in subject.inputs]
    return [(name, [(picture(m), "") for m in given]) for name, (taken, picture) in takes.items() if taken]
