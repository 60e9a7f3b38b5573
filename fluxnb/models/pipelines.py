"""Builds the pipeline for a model name and a use case. No technique in here.

A name is `embedded` (shipped with the package, trained) or `embedded-schnell` (the same distilled to four steps),
`flux-dev-random` or `flux-schnell-random` (FLUX's full size, seeded random weights: for latency and memory, never for
quality), one of `flux2.NAMES` (the same of FLUX.2, and of a few blocks to try things on a CPU), a hub id such as
`black-forest-labs/FLUX.1-dev`, or a local folder in diffusers' format. A use case is a key of `USE_CASES`: each is a
pipeline of diffusers, made from the same components.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from fluxnb import adapters
from fluxnb.errors import UserError
from fluxnb.models import control, embedded, facts, flux2, folders, full_size, request
from fluxnb.models.folders import first_line
from fluxnb.models.use_cases import (
    NUMBER_FORMATS,
    TXT2IMG,
    USE_CASES,
    steps_run,
    takes_condition,
    takes_image,
)

__all__ = ["USE_CASES", "steps_run", "takes_condition", "takes_image"]  # of `use_cases`, for those who have this

RANDOM, RANDOM_2 = full_size.NAMES, flux2.NAMES
DTYPES = {name: getattr(torch, name) for name in NUMBER_FORMATS}
CONTROLNET = "InstantX/FLUX.1-dev-Controlnet-Union"  # of FLUX.1-dev itself
_CONTROLNET = {"num_layers": 5, "num_single_layers": 10, "num_mode": 10}  # its size


@dataclass(frozen=True)
class Model:
    """What the study has to know of a model besides its pipeline."""

    name: str
    weights: str  # trained | random
    width: int  # pixels of the image it makes by default
    height: int
    tokens: int  # T5 tokens of a prompt
    steps: int | None = None  # that an image takes, where that is the model's own and not params/'s
    guided: bool = True  # whether it takes guidance
    pipeline: str = USE_CASES[TXT2IMG]  # of diffusers, for images from text

    @property
    def judged(self) -> bool:
        """Whether its images mean anything."""
        return self.weights == "trained"

    @property
    def small(self) -> bool:
        """Whether it is one of those that are shipped."""
        return self.name in embedded.FOLDERS

    @property
    def own(self) -> bool:
        """Whether it is a model of the user's."""
        return self.judged and not self.small

    @property
    def adapter(self) -> adapters.Adapter:
        """What is known of its class of transformers."""
        return adapters.FLUX2 if self.pipeline in adapters.FLUX2.pipelines else adapters.FLUX1

    @property
    def few(self) -> bool:
        """Whether it takes a few steps without guidance, as FLUX.1-schnell does."""
        return facts.takes_few(self.steps, self.guided)

    @property
    def checked(self) -> bool:
        """Whether adherence can be read off its images: fluxnb.world.probe knows the embedded world only."""
        return self.small


def describe(name: str) -> Model:
    """The facts of a model by name, without loading it. Raises UserError if they can't be had."""
    if name in embedded.FOLDERS:
        schnell, tokens = name == embedded.SCHNELL, embedded.TOKENS
        return Model(name, "trained", 128, 128, tokens, embedded.SCHNELL_STEPS if schnell else None, not schnell)
    if name in RANDOM:
        guided = full_size.guided(name)
        tokens, steps = (facts.MOST_TOKENS, None) if guided else (facts.SCHNELL_TOKENS, facts.SCHNELL_STEPS)
        return Model(name, "random", 1024, 1024, tokens, steps, guided)
    own = facts.asked()
    if name in RANDOM_2:
        size = flux2.SIZES[name]
        steps = own.steps if own is not None and own.name == name else size.steps
        return Model(name, "random", 1024, 1024, flux2.TOKENS, steps, not size.distilled, size.pipeline)
    if own is None or name != own.name:
        own = facts.read(name)
    return Model(name, "trained", own.width, own.height, own.tokens, own.steps, own.guided, own.pipeline)


def check(name: str) -> None:
    """Raises UserError when it is clear, without loading anything, that `name` can't be loaded."""
    if name in embedded.FOLDERS:
        folders.check(embedded.FOLDER)
        folders.read(embedded.FOLDERS[name], "transformer/config.json")
    elif facts.is_folder(name):
        folders.check(folders.written(name))
    elif name not in (*RANDOM, *RANDOM_2):
        if name.count("/") != 1:
            raise UserError(
                f"There is no model {name!r}: choose {', '.join([*embedded.FOLDERS, *RANDOM, *RANDOM_2])}, a hub id "
                "such as black-forest-labs/FLUX.1-dev, or a local folder."
            )
        facts.check_id(name)


def load(name: str, dtype: str | None = None, device: str | None = None, seed: int = 0):
    """A FLUX pipeline, ready to run.

    Args:
        name: see the module's docstring.
        dtype: float32, float16 or bfloat16; bfloat16 on a GPU and float32 on a CPU by default.
        device: a torch device; the first GPU if there is one by default.
        seed: of random weights.

    Raises:
        UserError: the name is unknown, the folder unreadable, the hub out of reach, the licence not accepted.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f"{dtype} is not a number format here: choose one of {', '.join(DTYPES)}.")
    check(name)
    _quiet()
    if name in RANDOM:
        pipe = full_size.load(name, DTYPES[dtype], device, seed)
    elif name in RANDOM_2:
        pipe = flux2.load(name, DTYPES[dtype], device, seed)
    elif name == embedded.NAME:
        pipe = folders.load(embedded.FOLDER, DTYPES[dtype])
    elif name == embedded.SCHNELL:
        pipe = folders.load(embedded.SCHNELL_FOLDER, DTYPES[dtype], embedded.FOLDER)
    elif facts.is_folder(name):
        pipe = folders.load(folders.written(name), DTYPES[dtype])
    else:
        pipe = _from_hub(name, DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device)
    if name not in (*RANDOM, *RANDOM_2):
        folders.check_numbers(pipe, f"The model {name}")
    return pipe


def weights_gib(name: str, dtype: str) -> float:
    """About how many GiB a pipeline's weights take; a model of the hub is taken for one of FLUX's size."""
    local = embedded.FOLDER if name in embedded.FOLDERS else folders.written(name)
    if local.is_dir():  # saved in 16 bits, as FLUX's are
        numbers = sum(path.stat().st_size for path in local.rglob("*.safetensors")) / 2
    else:
        numbers = flux2.SIZES[name].numbers if name in RANDOM_2 else full_size.NUMBERS
    return numbers * DTYPES[dtype].itemsize / 2**30


def transformer_config(name: str) -> dict:
    """The configuration of a model's transformer, its weights not loaded. Raises UserError if it can't be read."""
    from diffusers import FluxTransformer2DModel

    check(name)
    if name in RANDOM:
        return full_size.transformer(name)
    if name in RANDOM_2:
        return flux2.SIZES[name].config
    local = name in embedded.FOLDERS or facts.is_folder(name)
    source = embedded.FOLDERS.get(name) or (folders.written(name) if local else name)
    try:
        return FluxTransformer2DModel.load_config(source, subfolder="transformer", local_files_only=local)
    except OSError as error:
        raise UserError(
            f"The transformer's configuration of {name} cannot be read ({first_line(error)}): check the folder, or "
            "the id and the connection to the hub."
        ) from error


def as_use_case(pipe, use_case: str, controlnet=None):
    """The pipeline of another use case with the same components: nothing is loaded or held twice.

    Args:
        use_case: a key of `USE_CASES`.
        controlnet: of `load_controlnet`, for those that need one.
    """
    if use_case not in USE_CASES:
        raise UserError(f"There is no use case {use_case!r}: choose one of {', '.join(USE_CASES)}.")
    if type(pipe).__name__ in adapters.FLUX2.pipelines:
        raise UserError(f"FLUX.2 has {TXT2IMG} here, and {use_case} is of FLUX.1: give a pipeline of FLUX.1.")
    if takes_condition(use_case) and controlnet is None:
        raise UserError(f"{use_case} needs a ControlNet: give one of fluxnb.models.pipelines.load_controlnet.")
    return of_kind(pipe, USE_CASES[use_case], controlnet)


def of_kind(pipe, kind: str, controlnet=None):
    """diffusers' pipeline of that name with the same components."""
    import diffusers

    made_of = inspect.signature(getattr(diffusers, kind).__init__).parameters
    parts = {**pipe.components, "controlnet": controlnet}
    made = getattr(diffusers, kind)(**{name: part for name, part in parts.items() if name in made_of})
    made.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
    made.set_progress_bar_config(disable=True)
    return made


def load_controlnet(name: str, dtype: str | None = None, device: str | None = None, seed: int = 0, source=None):
    """The ControlNet that belongs to a model: the embedded one, a random one of the published size, or that one.

    Args:
        name, dtype, device, seed: as in `load`.
        source: a hub id or a local folder instead.

    Raises:
        UserError: it can't be read.
    """
    from diffusers import FluxControlNetModel

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = DTYPES[dtype or ("float32" if device == "cpu" else "bfloat16")]
    _quiet()
    if name in RANDOM and source is None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            with torch.device(device):
                made: Any = FluxControlNetModel(**{**full_size.TRANSFORMER, **_CONTROLNET, "guidance_embeds": True})
        finally:
            torch.set_default_dtype(default)
        full_size.randomize(made.to(kind), seed + 1)
        return made.eval()
    if source is None and (why := lacks_controlnet(name)):
        raise UserError(f"{why}: give a ControlNet of its own.")
    source = source or (control.FOLDER if name == embedded.NAME else CONTROLNET)
    try:
        local = {"local_files_only": True} if facts.is_folder(str(source)) else {}
        if local:
            folders.check_safe(folders.written(source))
        made = FluxControlNetModel.from_pretrained(source, torch_dtype=kind, **local, **folders.SAFE)
        folders.check_complete(made, source)
        return made.to(device).eval()
    except UserError:
        raise
    except Exception as error:  # whatever a damaged folder or an absent hub makes diffusers raise
        advice = "check the folder, or the id and the connection to the hub"
        raise folders.unread(f"The ControlNet {source}", error, advice) from error


def lacks(name: str, use_case: str) -> str:
    """Why a model can't be used for a use case here; "" where it can, as far as can be said without loading it."""
    if use_case != TXT2IMG and describe(name).adapter is not adapters.FLUX1:
        return f"FLUX.2 has {TXT2IMG} here, and {use_case} is of FLUX.1"
    return lacks_controlnet(name) if takes_condition(use_case) else ""


def lacks_controlnet(name: str) -> str:
    """Why a model has no ControlNet here; "" where it has one, as far as can be said without loading it."""
    if name == embedded.NAME or name in RANDOM:
        return ""
    if name in RANDOM_2:
        return f"the ControlNets here belong to FLUX.1, and {name} is FLUX.2"
    if name == embedded.SCHNELL:
        return f"the ControlNet here belongs to {embedded.NAME}, and {name} is distilled to other steps"
    config, sizes = transformer_config(name), ("num_attention_heads", "attention_head_dim", "joint_attention_dim")
    if any(config.get(size) != full_size.TRANSFORMER[size] for size in sizes):
        return f"{CONTROLNET} belongs to FLUX.1-dev, and {name} is built otherwise"
    try:
        facts.config(CONTROLNET, "config.json", local=False)
    except UserError as error:
        return str(error).rstrip(".")
    return ""


def generate(
    pipe,
    prompts: list[str],
    seeds: list[int],
    *,
    model: Model,
    steps: int | None = None,
    guidance: float = embedded.GUIDANCE,
    width: int | None = None,
    height: int | None = None,
    output_type: str = "pil",
    image=None,
    mask=None,
    condition=None,
    kind: str = "edges",
    strength: float = 0.8,
    on_step=None,
):
    """One image for each prompt, from its own seed.

    The noise is drawn on the CPU, so an image depends neither on the device nor on what else is in the batch; where
    nothing but noise is drawn (txt2img, with ControlNet or without), in float32 whatever the pipeline's number format.

    Args:
        pipe: of any use case; it takes what the others ignore.
        steps: the model's own by default, else 28.
        guidance: ignored where the model takes none.
        image, mask: PIL images, or one for each prompt; white in the mask is repainted.
        condition: edges or depth (fluxnb.models.control), one PIL image or one for each prompt; for several ControlNets
            a list of that for each of them.
        kind: of the condition, a key of fluxnb.models.control.MODES; for several ControlNets a list of them.
        strength: share of the steps that image-to-image and inpainting run, in (0, 1].
        on_step: called as on_step(step, latents) after every step.

    Returns:
        A list of PIL images, or latents (n, tokens, 64) with output_type="latent".

    Raises:
        UserError: something that the use case needs is missing or doesn't fit, before anything runs.
    """
    width, height = model.width if width is None else width, model.height if height is None else height
    steps = (model.steps or facts.DEV_STEPS) if steps is None else steps
    request.check(prompts, seeds, steps, guidance, width, height, output_type)
    case, seeds, steps = request.use_case(pipe), list(map(int, seeds)), int(steps)
    if model.small:
        _warn_of_unknown_words(prompts)
    takes = inspect.signature(type(pipe).__call__).parameters
    given = {
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance if model.guided else 0.0,
        "max_sequence_length": model.tokens,
        "output_type": output_type,
    }
    if "image" in takes and case != TXT2IMG:  # FLUX.2's pipelines may be given pictures to look at
        request.check_strength(strength, steps)
        images = request.pictures(image, len(prompts), (width, height), f"{case} needs an image", "image")
        given |= {"image": images, "strength": strength}
    else:
        given["latents"] = noise(pipe, seeds, width, height)
    if "mask_image" in takes:
        masks = request.pictures(mask, len(prompts), (width, height), f"{case} needs a mask", "mask")
        given["mask_image"] = masks
    if "control_image" in takes:
        given |= request.conditions(pipe, case, condition, kind, len(prompts), (width, height))
    if case != TXT2IMG:  # what the VAE encodes is drawn from a distribution
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if on_step is not None:

        def after_step(_, step, __, tensors):
            on_step(step, tensors["latents"])
            return tensors

        given["callback_on_step_end"] = after_step
    return pipe(prompt=list(prompts), **given).images


@torch.no_grad()
def preview(pipe, latents: torch.Tensor, model: Model):
    """The first of half-made latents (n, tokens, 64) as a PIL image of the model's own size."""
    if type(pipe).__name__ in adapters.FLUX2.pipelines:
        pixels = flux2.decoded(pipe, latents[:1], model.width, model.height)
        return pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]
    unpacked = pipe._unpack_latents(latents[:1], model.height, model.width, pipe.vae_scale_factor)
    unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(unpacked.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]


def noise(pipe, seeds: list[int], width: int, height: int) -> torch.Tensor:
    """Initial latents (n, width * height / 256, 64) as FLUX packs them: 2 x 2 patches, row by row (not FLUX.2's)."""
    if type(pipe).__name__ in adapters.FLUX2.pipelines:
        return flux2.noise(pipe, seeds, width, height)
    channels = pipe.transformer.config.in_channels // 4
    rows, columns = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    drawn = [torch.randn((1, channels, rows, columns), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = pack(torch.cat(drawn))
    return latents.to(pipe._execution_device, pipe.transformer.dtype)  # weights that are offloaded are nowhere


@torch.no_grad()
def through_vae(pipe, image):
    """A PIL image encoded and decoded: what the VAE alone changes."""
    pixels = pipe.image_processor.preprocess(image).to(pipe.vae.device, pipe.vae.dtype)
    back = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    return pipe.image_processor.postprocess(back.float(), output_type="pil")[0]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) latents to FLUX's (n, h * w / 4, 4 * c) tokens."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def _warn_of_unknown_words(prompts: list[str]) -> None:
    from fluxnb.world.scenes import unknown_words

    for prompt in prompts:
        if unknown := unknown_words(prompt):
            warnings.warn(
                f"the embedded model has never seen {', '.join(map(repr, unknown))} in {prompt!r}: "
                "it draws what it knows of the rest (fluxnb.world.scenes.vocabulary lists its words)",
                stacklevel=3,
            )


# --- trained weights --------------------------------------------------------------------------------------


def _from_hub(name: str, dtype):
    import diffusers
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with contextlib.suppress(OSError, ValueError):  # which loading will say better
        request.check_channels(FluxTransformer2DModel.load_config(name, subfolder="transformer"), name)
    try:
        kind = facts.config(name, "model_index.json", local=False).get("_class_name")
        made = getattr(diffusers, kind) if kind in adapters.FLUX2.pipelines else FluxPipeline
        pipe = made.from_pretrained(name, dtype=dtype, **folders.SAFE)
    except UserError:
        raise
    except Exception as error:  # whatever the hub's answer or a damaged cache makes diffusers raise
        raise facts.refused(name, error) from error
    folders.check_tokenizers(pipe, f"The model {name}")
    return pipe


def _quiet() -> None:
    """No progress bars while a model is loaded, and none of the libraries' remarks on what else could be installed."""
    for name in (
        "torchao",
        "torch.utils._pytree",
        "diffusers.quantizers.torchao.torchao_quantizer",
        "diffusers.models.modeling_utils",
        "bitsandbytes.backends.cpu.ops",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
