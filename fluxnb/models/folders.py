"""A model in a folder of diffusers' format: what is wrong with it is said before or while it is loaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from fluxnb import adapters
from fluxnb.errors import LacksMemory, UserError, lacks_memory
from fluxnb.models.request import check_channels

SAFE = {"use_safetensors": True}  # of every from_pretrained: a pickle may run whatever it holds
_WEIGHTS = re.compile(r"[^.]+?(-\d+-of-\d+)?(\.(?P<variant>[^.]+?)(-\d+-of-\d+)?)?\.(safetensors|bin)")

PARTS = {  # of a model with a transformer of this class
    adapters.FLUX1.name: ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    adapters.FLUX2.name: ("text_encoder", "tokenizer", "transformer", "vae"),
}
_NUMBERS = {  # settings that images are made with
    "vae/config.json": ("scaling_factor", "shift_factor", "batch_norm_eps"),
    "scheduler/scheduler_config.json": (
        *("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "num_train_timesteps"),
    ),
}
_TOKENIZERS = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))  # any of these is a tokenizer


def written(name: str | Path) -> Path:
    """The path that a user writes; that of ~somebody who isn't there is taken as it is. Raises UserError for none."""
    path = Path(os.path.expanduser(name))
    try:
        path.exists()
    except OSError as error:  # too long, or in a folder that nobody may look into
        raise UserError(f"{path} is no path that can be used: {error.strerror}.") from None
    return path


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
    named = index.get("transformer")
    flux2 = isinstance(named, list) and named[-1:] == [adapters.FLUX2.name]
    for name in ("scheduler", *PARTS[(adapters.FLUX2 if flux2 else adapters.FLUX1).name]):
        kind = index.get(name)
        if not (isinstance(kind, list) and len(kind) == 2 and all(isinstance(text, str) and text for text in kind)):
            raise UserError(
                f"The model in {folder} has no {name} in its model_index.json, which names a library and a class for "
                "it: copy or save it again."
            )
    for name in (name for name in parts if name.startswith("tokenizer")):
        if not any(all((folder / name / file).is_file() for file in files) for files in _TOKENIZERS):
            raise UserError(f"The model in {folder} has no words in its {name}: copy or save it again.")
    if (kind := index["transformer"][1]) not in PARTS:
        raise UserError(
            f"The model in {folder} has {kind}, not FLUX.1's {adapters.FLUX1.name} or FLUX.2's {adapters.FLUX2.name}: "
            "give another folder, or copy or save it again."
        )
    if flux2:
        check_pipeline(index, f"The model in {folder}")
    config = read(folder, "transformer/config.json", f"The transformer's configuration of {folder}")
    check_channels(config, f"The model in {folder}")
    for part, names in _NUMBERS.items():
        settings = read(folder, part)
        for name in (name for name in names if name in settings):
            if isinstance(settings[name], bool) or not _is_number(settings[name]):
                raise UserError(f"The model in {folder} has no number as {name} in {part}: copy or save it again.")


def check_pipeline(index: dict, what: str) -> None:
    """Raises UserError unless a FLUX.2 model's model_index.json names a pipeline that makes images from text."""
    if (kind := index.get("_class_name")) not in adapters.FLUX2.pipelines:
        raise UserError(
            f"{what} is of {kind or 'no pipeline'}, not of FLUX.2's {' or '.join(adapters.FLUX2.pipelines)}: give one "
            "of these, or copy or save it again."
        )


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
    import diffusers
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    whole, own = rest or folder, dict[str, object]()
    _check_layers(folder)
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
        kind = read(whole, "model_index.json").get("_class_name")
        made = getattr(diffusers, kind) if kind in adapters.FLUX2.pipelines else FluxPipeline
        pipe = made.from_pretrained(whole, dtype=dtype, **given, **own)
    except Exception as error:  # whatever a damaged folder makes diffusers raise, it is the folder's fault
        raise unread(f"The model in {folder}", error, "copy or save it again") from error
    check_tokenizers(pipe, f"The model in {folder}")
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            check_complete(part, (folder if name in own else whole) / name)
    return pipe


def unread(what: str, error: Exception, advice: str) -> UserError:
    """What is said of a model that can't be loaded: memory that lacks isn't the model's fault, nor is a full disk."""
    if lacks_memory(error):
        return LacksMemory(
            f"There is too little memory to load {what[0].lower()}{what[1:]}: free some, or use another."
        )
    said = str(error)
    if "weights_only" in said or "UnpicklingError" in type(error).__name__ or "pickle" in said.lower():
        return UserError(
            f"{what} has weights as a pickle that isn't loaded, as it could run code: save it as safetensors "
            "(save_pretrained does)."
        )
    return UserError(f"{what} cannot be read ({first_line(error)}): {advice}.")


def check_complete(network, folder: Path | str) -> None:
    """Raises UserError if weights of a network were not in its folder, or those in the folder are no part of it."""
    own = network.state_dict(keep_vars=True)
    lacking, extra = [name for name, tensor in own.items() if tensor.is_meta], []
    found = _names(Path(folder))
    if not lacking and found:
        there = {name for name, ends in _ends(own).items() if ends & found} | (_endings(found) & set(own))
        held = {own[name].data_ptr() for name in there}  # some share a tensor, which is saved once
        lacking = [name for name in own if name not in there and own[name].data_ptr() not in held]
        if not getattr(network.config, "quantization_config", None):
            known = _endings(own)
            extra = [name for name, ends in _ends(found).items() if not (name in known or ends & set(own))]
            if hasattr(network, "get_input_embeddings"):  # published text encoders have decoders and buffers beside
                extra = [name for name in extra if _BLOCK.search(name) and not name.startswith("decoder.")]
    for names, what in (
        (lacking, "has no weights for"),
        (sorted(extra), "has weights that its config.json has no place for,"),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{folder} {what} {shown}: copy or save the model again.")


def check_numbers(pipe, what: str) -> None:
    """Raises UserError if a weight of a pipeline is no number, as NaN and infinity: its images would be black."""
    import torch

    for part, network in pipe.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for name, tensor in network.named_parameters():
            if (
                type(tensor) not in (torch.Tensor, torch.nn.Parameter)
                or not tensor.is_floating_point()
                or tensor.is_meta
            ):
                continue
            values = tensor.detach().to(torch.bfloat16) if tensor.itemsize == 1 else tensor.detach()
            if values.numel() and not all(map(torch.isfinite, values.aminmax())):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(
                    f"{what} has weights in its {part} that are no numbers in {kind} (NaN or infinite), {name}: copy "
                    "or save it again, or use another number format."
                )


def check_tokenizers(pipe, what: str) -> None:
    """Raises UserError unless each tokenizer has about as many words as its text encoder knows."""
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if name not in pipe.config:  # FLUX.2 has one
            continue
        if getattr(pipe, name, None) is None or getattr(pipe, encoder, None) is None:
            raise UserError(f"{what} has no {name} or no {encoder}: copy or save it again.")
        own = getattr(pipe, name)  # FLUX.2-dev's also takes pictures, and holds its tokenizer
        words, known = len(getattr(own, "tokenizer", own)), getattr(pipe, encoder).get_input_embeddings().num_embeddings
        if not known * 0.9 <= words <= known:
            raise UserError(
                f"{what} has a {name} of {words} words and a {encoder} that knows {known}: they don't belong together; "
                "copy or save it again."
            )


_BLOCK = re.compile(r"(^|\.)(layers?|blocks?|transformer_blocks|single_transformer_blocks)\.\d+\.")
# a part -> the setting in its config.json, and a pattern of its weights' names before a block's number
_LAYERS = {
    "transformer": {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"},
    "text_encoder": {"num_hidden_layers": r"(?:encoder|model)\.layers"},  # CLIP's or Qwen3's
    "text_encoder_2": {"num_layers": r"encoder\.block"},
}


def _names(folder: Path) -> set[str]:
    """The names of the weights in a folder's safetensors, by their headers; none where there are no such files."""
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                found |= set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise unread(str(file), error, "copy or save it again") from None
    return found


def _check_layers(folder: Path) -> None:
    """Raises UserError, before anything is built, where a configuration has another number of blocks than weights."""
    for part, settings in _LAYERS.items():
        names = _names(folder / part)
        if not names or not (folder / part / "config.json").is_file():
            continue
        config = read(folder, f"{part}/config.json")
        for setting, before in settings.items():
            matches = (re.search(rf"(?:^|\.){before}\.(\d+)\.", name) for name in names)
            count = max((int(match[1]) + 1 for match in matches if match), default=0)
            told = config.get(setting, count)
            if told != count:
                raise UserError(
                    f"The model in {folder} has weights of {count} {before.rpartition('.')[2]} in its {part} and "
                    f"{setting} {told!r:.20} in the configuration: copy or save it again."
                )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9


def _ends(names) -> dict[str, set[str]]:
    """Each name with all that is left of it without prefixes, which libraries add and drop."""
    return {name: {name} | {name[i + 1 :] for i, letter in enumerate(name) if letter == "."} for name in names}


def _endings(names) -> set[str]:
    return set().union(*_ends(names).values())


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
        if (folder / name).is_fifo():  # reading would wait for ever
            raise ValueError("it is no file")
        found = json.loads((folder / name).read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("it is no list of settings")
        return found
    except (OSError, ValueError, RecursionError) as error:
        what = what or f"{folder}/{name}"
        raise UserError(f"{what} cannot be read ({first_line(error)}): copy or save it again.") from None


def first_line(error: Exception) -> str:
    """An error's own words, as part of a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
