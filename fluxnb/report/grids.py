"""Images beside each other, as notebooks show them: the prompts that are shown, and the worst that was judged."""

from __future__ import annotations

from fluxnb import families, findings
from fluxnb.errors import UserError
from fluxnb.families import Family
from fluxnb.measure import perceptual, quality, telemetry
from fluxnb.models import pipelines
from fluxnb.report import html
from fluxnb.report.captions import about, conditions, sentences
from fluxnb.study.row import Row
from fluxnb.technique import Unavailable
from fluxnb.world import scenes

HEAT = "FLIP: where a person would see a difference from the baseline's image; black is none, white the most there is"


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
                continue
            pairs = [*zip(reference, made[0], shown.inputs, strict=True), _worst(subject, judged, made[1])]
            cells = [(b, _under(subject, a, b, prompt)) for a, b, (prompt, _) in pairs]
            a, _, (prompt, seed) = pairs[-1]
            columns.append((head, [*cells[:-1], (a, f"{prompt}, seed {seed}"), cells[-1]]))
            if difference:
                heat = [(perceptual.flip(a, b)[1], "") for a, b, _ in pairs]
                columns.append((f"{head}: FLIP", [*heat[:-1], None, heat[-1]]))
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
        + (", and the share of the prompt's facts that are there" if subject.checked else ""),
        HEAT if difference else "",
        f"In the heads: speedup over the baseline. {about(rows)}" if rows else "",
    )
    lines, setting = [*shown.prompts, "baseline, where the setting is worst", "the setting's worst"], _dial(candidates)
    heads, turned = [head for head, _ in columns], [cells for _, cells in columns]
    if by == "prompt":
        by_prompt = [list(line) for line in zip(*turned, strict=True)]
        corner = f"prompt \\ {setting or 'setting'}"
        html.image_grid(lines, heads, by_prompt, caption=caption, corner=corner, width=width)
    else:
        corner = f"{setting or 'setting'} \\ prompt"
        html.image_grid(heads, lines, turned, caption=caption, corner=corner, width=width)


def _known(subject) -> str:
    """Whether the prompts that are shown count, and whose they are."""
    shown = set(subject.showing.prompts)
    if shown & set(subject.prompts):
        return ""
    whose = "the documents' own" if shown <= set(scenes.STUDY_PROMPTS) else "to be looked at"
    return f"The prompts shown are {whose}, and counted in no mean"


def _under(subject, reference, image, prompt: str) -> str:
    return findings.under_image(reference, image, prompt if subject.checked else None)


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
