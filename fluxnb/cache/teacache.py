"""TeaCache's polynomial: the published one for FLUX.1-dev, and how to fit one for any model.

The change of a step's modulated input is cheap to see; what matters is the change of the transformer's output.
The polynomial estimates the one from the other. Source: TeaCache (Liu et al., 2024), TeaCache4FLUX.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fluxnb import adapters
from fluxnb.errors import UserError
from fluxnb.models import folders

FLUX_DEV = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)  # TeaCache4FLUX, highest power first
FILE = "teacache.json"
DEGREE = 4
PROMPTS = 40  # of its training, that a shipped model's polynomial is fitted to
FITS: dict[str, Callable[[], tuple[float, ...]]] = {}  # models without any that a study fits them to, and how


@dataclass(frozen=True)
class Fit:
    """A fitted polynomial and what it was fitted to."""

    coefficients: tuple[float, ...]  # highest power first
    r2: float  # share of the variance of the output changes that it explains
    steps: int
    images: int
    changes: tuple[tuple[float, float], ...]  # (of the modulated input, of the output), relative, step by step
    prompts: str = ""  # training or the study's, where that is known


def shipped(model: str) -> Fit | None:
    """The fit in a model's folder, by the model's name or its folder; None where there is none."""
    from fluxnb.models import embedded

    file = (embedded.FOLDERS.get(model) or folders.written(model)) / FILE
    if not file.is_file():
        return None
    try:
        found = Fit(**json.loads(file.read_text(encoding="utf-8")))
        if not all(math.isfinite(c) for c in (*found.coefficients, found.r2)) or not found.coefficients:
            raise ValueError("a coefficient is no finite number")
        return found
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{file} can't be read ({folders.first_line(error)}): delete it, and fit it again.") from None


def coefficients(model: str) -> tuple[float, ...]:
    """The coefficients for a model by name: shipped, published, fitted by the study, or none.

    Raises:
        UserError: there are none for this model.
    """
    from fluxnb.models import flux2, full_size

    if found := shipped(model):
        return tuple(found.coefficients)
    if "FLUX.1-dev" in model or model in (*full_size.NAMES, *flux2.NAMES):  # random ones show time only
        return FLUX_DEV
    if model in FITS:
        return FITS[model]()
    raise _none(model)


def of(pipe) -> tuple[float, ...]:
    """The coefficients for a pipeline's transformer: fitted to the model in its folder, or FLUX.1-dev's if built so.

    Raises:
        UserError: there are none; how to fit them.
    """
    from fluxnb.models import full_size

    config = pipe.transformer.config
    source = Path(config.get("_name_or_path") or "")
    for folder in (source, source.parent):  # a transformer's own folder is in its pipeline's
        if (folder / FILE).is_file():
            return coefficients(str(folder))
    dev = {**full_size.TRANSFORMER, "guidance_embeds": True}
    if all(_plain(config.get(name)) == _plain(value) for name, value in dev.items()):
        return FLUX_DEV
    raise _none(str(pipe.config.get("_name_or_path") or "this model"))


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def _none(model: str) -> UserError:
    return UserError(
        f"TeaCache has no coefficients for {model}: fit them with `python -m fluxnb fit-teacache --model {model}`, or "
        "give your own, TeaCache(0.4, [...])."
    )


def fit(loaded, steps: int, degree: int = DEGREE) -> Fit:
    """Fits the polynomial to the uncached trajectories of every prompt and seed of a subject that is loaded."""
    import numpy as np

    if (least := math.ceil((degree + 1) / len(loaded.inputs)) + 1) > steps:
        raise UserError(
            f"A polynomial can't be fitted to {steps} steps of {len(loaded.inputs)} images: give {least} steps or more."
        )
    changes: list[tuple[float, float]] = []
    for prompt, seed in loaded.inputs:
        inputs, outputs = _trajectory(loaded, prompt, seed, steps)
        changes += zip(_changes(inputs), _changes(outputs), strict=True)
    x, y = np.array(changes).T
    found = np.polyfit(x, y, degree)
    left = y - np.polyval(found, x)
    return Fit(
        coefficients=tuple(float(c) for c in found),
        r2=float(1 - (left**2).sum() / ((y - y.mean()) ** 2).sum()),
        steps=steps,
        images=len(loaded.inputs),
        changes=tuple((float(f"{a:.5g}"), float(f"{b:.5g}")) for a, b in changes),
    )


def save(result: Fit, folder: Path) -> Path:
    """Writes a fit where `coefficients` finds it."""
    path = folder / FILE
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(asdict(result)) + "\n")
    os.replace(beside, path)
    return path


@torch.no_grad()
def _trajectory(loaded, prompt: str, seed: int, steps: int) -> tuple[list, list]:
    """The modulated inputs and the outputs of every step of one uncached image."""
    transformer = loaded.pipe.transformer
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with ExitStack() as stack:
        adapter = adapters.of(transformer)
        first, *_ = adapter.lists(transformer)[0]

        def see(block, args, given):
            given = adapters.named(block, args, given)
            inputs.append(adapter.modulated(block, given["hidden_states"], given).float())

        stack.callback(first.register_forward_pre_hook(see, with_kwargs=True).remove)
        stack.callback(transformer.register_forward_hook(lambda m, i, o: outputs.append(o[0].float())).remove)
        loaded.generate(prompt, seed, steps)
    return inputs, outputs


def _changes(tensors: list[torch.Tensor]) -> list[float]:
    """Relative change from each tensor to the next: mean |b - a| / mean |a|."""
    pairs = zip(tensors, tensors[1:], strict=False)
    return [((b - a).abs().mean() / a.abs().mean()).item() for a, b in pairs]
