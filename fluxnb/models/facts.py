"""A model with weights of its own, before it is loaded: its size, tokens and steps, as its files say or as was asked.

`make report MODEL=… SIZE=… TOKENS=… STEPS=…` puts what it was given into the environment, where everything that runs
for it finds it. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxnb import adapters
from fluxnb.errors import UserError, lacks_memory
from fluxnb.models import flux2, folders
from fluxnb.models.request import check_channels
from fluxnb.models.use_cases import TXT2IMG, USE_CASES

MODEL, SIZE, TOKENS, STEPS = GIVEN = ("FLUXNB_MODEL", "FLUXNB_SIZE", "FLUXNB_TOKENS", "FLUXNB_STEPS")
MOST_TOKENS, MOST_STEPS, SIDES = 512, 200, (64, 4096)  # diffusers' limit for FLUX; ours, as in params/
DEV_STEPS, SCHNELL_STEPS, SCHNELL_TOKENS = 28, 4, 256  # FLUX's makers' own
FEW_STEPS = 8  # the most that a model distilled as FLUX.1-schnell takes
STAND_FOR = {  # random weights -> the hub's of that size
    "flux-dev-random": "black-forest-labs/FLUX.1-dev",
    "flux-schnell-random": "black-forest-labs/FLUX.1-schnell",
    "flux2-klein-random": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-base-random": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-dev-random": "black-forest-labs/FLUX.2-dev",
}
_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "tokenizer": "tokenizer_2/tokenizer_config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_INDEX = "model_index.json"


@dataclass(frozen=True)
class Facts:
    """What a model with weights of its own is run with.

    Args:
        name: a hub id, or the whole path of a folder, from ~ where that is above it: pages name nobody's home.
    """

    name: str
    width: int  # pixels
    height: int
    tokens: int  # of a prompt, FLUX.1's T5's
    steps: int
    guided: bool  # whether it takes guidance, as FLUX.1-dev does
    pipeline: str = USE_CASES[TXT2IMG]  # of diffusers

    @property
    def random(self) -> bool:
        """Whether its weights are random: then it shows time only."""
        return self.name in flux2.NAMES

    @property
    def few(self) -> bool:
        """Whether it takes a few steps without guidance, as FLUX.1-schnell does."""
        return takes_few(self.steps, self.guided)

    @property
    def adapter(self) -> adapters.Adapter:
        """What is known of its class of transformers."""
        return adapters.FLUX2 if self.pipeline in adapters.FLUX2.pipelines else adapters.FLUX1

    @property
    def load(self) -> str | None:
        """What has its weights: of random ones the model of that size, None where there is none."""
        return STAND_FOR.get(self.name) if self.random else self.name

    @property
    def folder(self) -> str:
        """A name for folders of its own: of a folder with a digest of where it lies, for others may be called alike."""
        local = self.name.startswith(("/", "~"))
        safe = re.sub(r"[^A-Za-z0-9._]+", "-", Path(self.name).name if local else self.name).strip("-.")[:60]
        return f"{safe or 'model'}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}" if local else safe


def asked() -> Facts | None:
    """What `make report MODEL=…` asks for; None if it asks for no model. Raises UserError if it can't be had."""
    name, size, tokens, steps = (os.environ.get(variable, "").strip() for variable in GIVEN)
    if name in flux2.NAMES:
        return random(name, steps, **{key: value for key, value in (("SIZE", size), ("TOKENS", tokens)) if value})
    if name:
        return read(name, size, tokens, steps)
    for variable, value in zip(GIVEN, (name, size, tokens, steps), strict=True):
        if value:
            short = variable.removeprefix("FLUXNB_")
            raise UserError(f"{short}={value} is about a model of yours: give MODEL=… as well, or leave {short} out.")
    return None


def of(name: str) -> Facts:
    """One of `flux2.NAMES`, or as `read`."""
    return random(name, "") if name in flux2.NAMES else read(name)


def random(name: str, steps: str, **others: str) -> Facts:
    """The facts of one of `flux2.NAMES`. Raises UserError where more than its steps is chosen."""
    if others:
        raise UserError(f"{name} has a size and tokens of its own: leave {' and '.join(others)} out.")
    size = flux2.SIZES[name]
    most = _number(name, STEPS, steps, size.steps, MOST_STEPS, "steps an image takes")
    return Facts(name, 1024, 1024, flux2.TOKENS, most, not size.distilled, size.pipeline)


@functools.lru_cache(maxsize=16)
def read(name: str, size: str = "", tokens: str = "", steps: str = "") -> Facts:
    """The facts of a model of the hub or in a folder.

    Args:
        name: a hub id or a folder.
        size: WIDTHxHEIGHT in pixels, or one number for both; "" for what the files say, as the others.

    Raises:
        UserError: there is no such model, it isn't FLUX's text-to-image model, or its files don't say something that
            wasn't given.
    """
    path = folders.written(name)
    if local := is_folder(name):
        folders.check(path)
        path, home = path.resolve(), Path.home().resolve()
        name = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
    else:
        check_id(name)
    found = {part: config(name, file, local) for part, file in _FILES.items()}
    if (kind := found["transformer"].get("_class_name")) not in folders.PARTS:
        raise UserError(
            f"{name} has {kind or 'no transformer in the format of diffusers'}, not FLUX.1's {adapters.FLUX1.name} or "
            f"FLUX.2's {adapters.FLUX2.name}: give FLUX.1-dev, FLUX.1-schnell, FLUX.2-dev, FLUX.2-klein, or a model "
            "made from one of them, as diffusers saves it."
        )
    check_channels(found["transformer"], f"The model {name}")
    guided = bool(found["transformer"].get("guidance_embeds"))
    width, height = _sides(size) if size else _own_sides(name, found["vae"])
    if kind == adapters.FLUX2.name:
        index = config(name, _INDEX, local)
        folders.check_pipeline(index, name)
        pipeline = index["_class_name"]
        told, distilled = flux2.TOKENS, not guided and bool(index.get("is_distilled"))
        usual, guided = flux2.usual_steps(distilled), not distilled  # without an input for it in two passes a step
    else:
        pipeline, usual = Facts.pipeline, usual_steps(found["transformer"], found["scheduler"])
        told = found["tokenizer"].get("model_max_length")
        most = SCHNELL_TOKENS if usual == SCHNELL_STEPS else MOST_TOKENS
        told = min(told, most) if isinstance(told, int) and 0 < told <= MOST_TOKENS else None
    return Facts(
        name, width, height,
        _number(name, TOKENS, tokens, told, MOST_TOKENS, "tokens a prompt has (T5's, max_sequence_length)"),
        _number(name, STEPS, steps, usual, MOST_STEPS, "steps an image takes"),
        guided, pipeline,
    )  # fmt: skip


def usual_steps(transformer: Mapping, scheduler: Mapping) -> int | None:
    """Steps that a model takes, as the configurations of its transformer and scheduler say; None where they don't.

    FLUX.1-dev's with guidance; FLUX.1-schnell's without guidance and without a shift by size.
    """
    if transformer.get("guidance_embeds"):
        return DEV_STEPS
    return None if scheduler.get("use_dynamic_shifting") else SCHNELL_STEPS


def takes_few(steps: int | None, guided: bool) -> bool:
    """Whether a model that takes so many steps is one like FLUX.1-schnell: few of them, and no guidance."""
    return steps is not None and steps <= FEW_STEPS and not guided


def adapter_of(pipe) -> adapters.Adapter | None:
    """What is known of the class of a pipeline's transformer; None for what nobody knows, or no pipeline."""
    return adapters.find(getattr(pipe, "transformer", None))


def loaded_takes_few(pipe) -> bool:
    """The same of a pipeline's model, as far as its configurations say."""
    with contextlib.suppress(AttributeError):
        config, scheduler = pipe.transformer.config, pipe.scheduler.config
        if type(pipe).__name__ in adapters.FLUX2.pipelines:
            return bool(pipe.config.get("is_distilled"))
        return takes_few(usual_steps(config, scheduler), bool(config.get("guidance_embeds")))
    return False


def is_folder(name: str) -> bool:
    """Whether a name is meant as a path."""
    return folders.written(name).exists() or name.startswith((".", "/", "~"))


def check_id(name: str) -> None:
    """Raises UserError unless a name can be a model's of the hub that may be had from here."""
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"There is no model {name!r}: give a hub id such as black-forest-labs/FLUX.1-dev, or a local folder that "
            "diffusers' save_pretrained wrote."
        )
    # FLUX's makers publish behind a licence: without a token or a copy on this machine there is no way in.
    cached = isinstance(huggingface_hub.try_to_load_from_cache(name, "model_index.json"), str)
    if name.startswith("black-forest-labs/") and not cached and not huggingface_hub.get_token():
        raise gated(name)


def gated(name: str) -> UserError:
    """What to do about a model behind a licence."""
    return UserError(
        f"{name} is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN to a token of "
        "the account that accepted it."
    )


def refused(name: str, error: Exception) -> UserError:
    """What the hub's answer means."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return gated(name)
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"The hub has no model {name}, or HF_TOKEN may not see it: check the id.")
    if lacks_memory(error):
        return folders.unread(f"The model {name}", error, "")
    return UserError(
        f"{name} could not be loaded ({folders.first_line(error)}): check the id and the connection to the hub, "
        "or give a local folder."
    )


def config(name: str, file: str, local: bool) -> dict:
    """A file of settings; {} where the model has none."""
    path = folders.written(name) / file
    if not local:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(name, file))
        except (OSError, ValueError) as error:  # so are all of the hub's
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return {}
            raise refused(name, error) from error
    return folders.read(path.parent, path.name) if path.is_file() else {}


def _sides(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})(?:[x×*]([0-9]{1,5}))?", size.lower())
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(SIDES[0] <= side <= SIDES[1] and side % 16 == 0 for side in sides):
        raise UserError(
            f"SIZE={size[:40]} is no size: give width and height in pixels, multiples of 16 from {SIDES[0]} to "
            f"{SIDES[1]}, such as SIZE=1024x1024."
        )
    return sides


def _own_sides(name: str, vae: dict) -> tuple[int, int]:
    side = vae.get("sample_size")  # of FLUX's VAE it is what the pipeline draws; 32 is diffusers' default for any VAE
    if not isinstance(side, int) or not SIDES[0] <= side <= SIDES[1] or side % 16:
        raise UserError(f"{name} doesn't say how large its images are: give SIZE=1024x1024, or what it was made for.")
    return side, side


def _number(name: str, variable: str, given: str, told: int | None, most: int, what: str) -> int:
    short = variable.removeprefix("FLUXNB_")
    if given and not (re.fullmatch("[0-9]{1,9}", given) and 1 <= int(given) <= most):
        raise UserError(f"{short}={given[:80]} isn't allowed: give a whole number from 1 to {most}.")
    if not given and told is None:
        raise UserError(f"{name} doesn't say how many {what}: give {short}=…, a whole number from 1 to {most}.")
    return int(given or told or 0)
