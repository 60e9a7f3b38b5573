"""A model in a folder of diffusers' format: what is wrong with it is said before or while it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.models.request import check_channels

SAFE = {"use_safetensors": True}  # of every from_pretrained: a pickle may run whatever it holds
_WEIGHTS = re.compile(r"[^.]+?(-\d+-of-\d+)?(\.(?P<variant>[^.]+?)(-\d+-of-\d+)?)?\.(safetensors|bin)")


def check(folder: Path) -> None:
    """Raises UserError when it is clear, without loading anything, that a folder has no FLUX model in it."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is not a model folder: it has no model_index.json; give a folder saved by diffusers' "
            "save_pretrained."
        )
    index = read(folder, "model_index.json")
    parts = _parts(index)
    missing = [name for name in parts if not (folder / name).is_dir() or not any((folder / name).iterdir())]
    if missing:
        raise UserError(f"The model in {folder} has no {', '.join(missing)}: copy or save it again.")
    check_safe(folder, *parts)
    kind = [*(index.get("transformer") or []), None, None][1]
    if kind != "FluxTransformer2DModel":
        raise UserError(
            f"The model in {folder} has {kind or 'no transformer'}, not FLUX.1's FluxTransformer2DModel: give another "
            "folder, or copy or save it again."
        )
    config = read(folder, "transformer/config.json", f"The transformer's configuration of {folder}")
    check_channels(config, f"The model in {folder}")


def check_safe(folder: Path, *parts: str) -> None:
    """Raises UserError where weights are there as a pickle only, which may run whatever it holds when it is read."""
    for place in (folder / part for part in parts or ("",)):
        pickles = sorted(path.name for end in ("bin", "pt", "pth", "ckpt", "pkl") for path in place.glob(f"*.{end}"))
        if pickles and not any(place.glob("*.safetensors")):
            raise UserError(
                f"{place} has its weights in {pickles[0]}, a pickle, which may run anything when it is read: where you "
                "trust it, convert it once (load it with the library that it is of, and save it with "
                "save_pretrained(…, safe_serialization=True)) and give that folder."
            )


def load(folder: Path, dtype, rest: Path | None = None):
    """The FLUX pipeline in a folder, on the CPU. Raises UserError if it can't be read or weights are missing.

    Args:
        rest: the folder of a whole model whose VAE and text encoders it shares; then it has no others.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    whole, own = rest or folder, dict[str, object]()
    variants = _variants(whole)
    if len(variants) > 1:
        raise UserError(
            f"The model in {folder} has weights in several variants ({', '.join(sorted(variants))}): save it as one."
        )
    try:
        local = {"local_files_only": True}
        if rest:
            own["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", **local)
            own["transformer"] = FluxTransformer2DModel.from_pretrained(
                folder, subfolder="transformer", dtype=dtype, **local, **SAFE
            )
        given = local | SAFE | ({"variant": variants.pop()} if variants else {})
        pipe = FluxPipeline.from_pretrained(whole, dtype=dtype, **given, **own)
    except Exception as error:  # whatever a damaged folder makes diffusers raise, it is the folder's fault
        raise UserError(
            f"The model in {folder} cannot be read ({first_line(error)}): copy or save it again."
        ) from error
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            check_complete(part, (folder if name in own else whole) / name)
    return pipe


def check_complete(network, folder: Path | str) -> None:
    """Raises UserError if weights of a network were not in its folder, and are nowhere or made up."""
    own = network.state_dict(keep_vars=True)
    lacking = [name for name, tensor in own.items() if tensor.is_meta]
    files = [*Path(folder).glob("*.safetensors")]
    if not lacking and files:
        from safetensors import safe_open

        found: set[str] = set()
        for file in files:
            with safe_open(file, "pt") as tensors:
                found |= set(tensors.keys())
        there = {name for name in own if name in found or any(_same(name, other) for other in found)}
        held = {own[name].data_ptr() for name in there}  # some share a tensor, which is saved once
        lacking = [name for name in own if name not in there and own[name].data_ptr() not in held]
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise UserError(f"{folder} has no weights for {shown}: copy or save the model again.")


def _same(name: str, other: str) -> bool:
    """Whether two names differ by a prefix only, which libraries add and drop."""
    return name.endswith(f".{other}") or other.endswith(f".{name}")


def _variants(folder: Path) -> set[str]:
    """The variants, such as fp16, of the parts that have weights in a variant only."""
    found: set[str] = set()
    for name in _parts(read(folder, "model_index.json")):
        matches = [match for file in (folder / name).iterdir() if (match := _WEIGHTS.fullmatch(file.name))]
        variants = {match["variant"] for match in matches}
        if variants and None not in variants:
            found |= {sorted(variants)[0]}
    return found


def _parts(index: dict) -> list[str]:
    return [name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0]]


def read(folder: Path, name: str, what: str = "") -> dict:
    """The settings in a JSON file of a folder. Raises UserError that begins with `what` if they can't be read."""
    try:
        found = json.loads((folder / name).read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no list of settings")
        return found
    except (OSError, ValueError, RecursionError) as error:
        what = what or f"{folder}/{name}"
        raise UserError(f"{what} cannot be read ({first_line(error)}): copy or save it again.") from None


def first_line(error: Exception) -> str:
    """An error's own words, as part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
