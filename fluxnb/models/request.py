"""What is asked of a pipeline, looked at before anything runs: a sentence where it doesn't fit."""

from __future__ import annotations

import math
import numbers
import operator

from PIL import Image

from fluxnb import adapters
from fluxnb.errors import UserError
from fluxnb.models.use_cases import CONTROLNET_TXT2IMG, TXT2IMG, USE_CASES

_MODES = {"edges": 0, "depth": 2}  # control_mode of the published ControlNet for each kind of condition
_OUTPUTS = ("pil", "np", "pt", "latent")


def use_case(pipe) -> str:
    """The use case that a pipeline is of. Raises UserError if it is of none, or has a transformer for another one."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    found = next((case for case, name in USE_CASES.items() if name in names), None)
    if names[0] in adapters.FLUX2.pipelines:
        found = TXT2IMG
    if found is None:
        raise UserError(
            f"{names[0]} isn't a pipeline of these use cases: {', '.join(USE_CASES)}; call it by itself, or make "
            "one of them with fluxnb.models.pipelines.as_use_case."
        )
    check_channels(pipe.transformer.config, f"The {names[0]}")
    return found


def check_channels(config, what: str) -> None:
    """Raises UserError if a transformer takes something else than what it gives, as those of Fill and Control do."""
    taken = config.get("in_channels", 64)
    given = config.get("out_channels") or taken
    if taken != given:
        raise UserError(
            f"{what} has a transformer that takes {taken} channels and gives {given}, as FLUX's Fill and Control "
            "models do, which aren't among the use cases here: give one that takes as many as it gives, such as "
            "FLUX.1-dev."
        )


def check(prompts, seeds, steps, guidance, width, height, output_type) -> None:
    """Raises UserError unless there is one seed for each prompt and everything else is what it may be."""
    texts = isinstance(prompts, list | tuple) and prompts and all(isinstance(text, str) for text in prompts)
    if not texts:
        raise UserError(f"The prompts are {prompts!r:.80}: give a list of at least one text.")
    if not isinstance(seeds, list | tuple) or len(seeds) != len(prompts) or not all(map(_whole, seeds)):
        raise UserError(
            f"The seeds are {seeds!r:.80}: give a list of one whole number for each prompt, {len(prompts)}."
        )
    if not _whole(steps) or steps < 1:
        raise UserError(f"{steps!r:.80} steps: give a whole number from 1 up.")
    if not _number(guidance):
        raise UserError(f"A guidance of {guidance!r:.80}: give a number, such as 3.5.")
    if not all(_whole(side) and side >= 16 and side % 16 == 0 for side in (width, height)):
        raise UserError(
            f"An image of {width}×{height} pixels: FLUX's tokens are 16 pixels wide, use multiples of 16 from 16 up."
        )
    if output_type not in _OUTPUTS:
        raise UserError(f"An output of type {output_type!r:.80}: choose one of {', '.join(_OUTPUTS)}.")


def check_strength(strength, steps: int) -> None:
    """Raises UserError unless it is a share of the steps that leaves at least one."""
    if not _number(strength) or not 0 < strength <= 1:
        raise UserError(
            f"A strength of {strength!r:.80}: allowed is more than 0 up to 1, the share of steps that are run."
        )
    if steps * strength < 1:
        raise UserError(
            f"A strength of {strength:g} leaves none of {steps} steps: use at least {1 / steps:.2g}, or more steps."
        )


def _number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def pictures(given, count: int, size: tuple[int, int], missing: str, what: str) -> list[Image.Image]:
    """`given` as one RGB picture of that size for each prompt. Raises UserError if it isn't."""
    if given is None:
        raise UserError(f"{missing}: give a PIL image, or one for each prompt.")
    several = list(given) if isinstance(given, list | tuple) else [given] * count
    if len(several) != count:
        raise UserError(f"There are {len(several)} {what}s for {count} prompts: give one, or one for each.")
    for picture in several:
        if not isinstance(picture, Image.Image):
            raise UserError(f"The {what} is a {type(picture).__name__}: give a PIL image, or one for each prompt.")
        if picture.size != size:
            raise UserError(
                f"The {what} is {picture.width}×{picture.height} pixels and what is made {size[0]}×{size[1]}: "
                "image, mask, condition and result have to be of one size."
            )
    return [picture if picture.mode == "RGB" else picture.convert("RGB") for picture in several]


def conditions(pipe, case: str, condition, kind, count: int, size: tuple[int, int]) -> dict:
    """What a pipeline of one or several ControlNets is given. Raises UserError if it doesn't fit them."""
    nets = getattr(pipe.controlnet, "nets", None)
    if nets is None:
        image, mode = _one(pipe.controlnet, condition, kind, count, size)
        # diffusers repeats the mode for a batch in the first of the three pipelines only
        return {
            "control_image": image,
            "control_mode": mode if case == CONTROLNET_TXT2IMG or mode is None else [mode] * count,
        }
    each = list(condition) if isinstance(condition, list | tuple) else [condition]
    kinds = list(kind) if isinstance(kind, list | tuple) else [kind] * len(each)
    if len({len(each), len(kinds), len(nets)}) > 1:
        raise UserError(
            f"There are {len(each)} conditions of {len(kinds)} kinds for {len(nets)} ControlNets: give a list with one "
            "of each for each ControlNet."
        )
    if count > 1 and case != CONTROLNET_TXT2IMG:
        raise UserError(f"Several ControlNets take one prompt at a time in {case}: make the {count} images one by one.")
    found = [_one(net, own, k, count, size) for net, own, k in zip(nets, each, kinds, strict=True)]
    return {
        "control_image": [image for image, _ in found],
        "control_mode": [mode for _, mode in found],
        "controlnet_conditioning_scale": [1.0] * len(nets),
    }


def _one(controlnet, condition, kind, count, size) -> tuple[list, int | None]:
    """(pictures, control_mode) of one ControlNet."""
    from fluxnb.models import control  # brings numpy along, which a model's facts don't need

    found = pictures(condition, count, size, "A ControlNet needs a condition", "condition")
    for picture in found:
        control.check(picture, kind)
    modes = controlnet.config.num_mode
    return found, None if modes is None else (control.MODES if modes == len(control.MODES) else _MODES)[kind]
