"""Progressive resolution: the first steps of an image at half its width and height.

While noise is loud only the low frequencies of an image are decided, and a quarter of the tokens holds these. What a
pipeline sees keeps its size: the low frequencies of its latents are those of the small image, the high ones are the
noise that they began with, as loud as the step says. So its loop and its scheduler stay as they are, and no other noise
has to be drawn.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from fluxnb import adapters
from fluxnb.cache.passes import CONTROL, Image, Pass, around
from fluxnb.cache.predictors import L2P
from fluxnb.errors import UserError
from fluxnb.families import PROGRESSIVE
from fluxnb.technique import AHEAD, ANOTHER, CACHED, HALVED, RECORDED, SHARED, Changes, Technique, Unavailable

FLUX_SPECTRUM = (203.615097, 1.915461)  # A and β of the power A·f^-β of FLUX.1's latents, as SGLang fitted it


@dataclass
class Progressive(Technique):
    """The first steps at half the width and height; then the latents are enlarged, and the next step is rewound.

    Enlarged by their discrete cosine transform, whose high frequencies are noise of the step's level; the enlarged
    image has half the amplitude over the same noise, so both are scaled and the step's noise level becomes
    2σ/(1+σ). A cache goes on first, and keeps the small steps apart from the others: the first large one is computed.
    Source: Spectral Progressive Diffusion (Xiao et al., 2026), there and in SGLang as "dct_rewind".

    Args:
        coarse: so many steps are small, 1 or more; an image of as many steps or fewer is refused.
    """

    family, exact = PROGRESSIVE, ANOTHER
    needed = ("transformer", "scheduler")
    name = "progressive resolution"
    terms = {"at half size": "the transformer sees a quarter of the image tokens, of half the width and height"}

    coarse: int

    def __post_init__(self):
        if isinstance(self.coarse, bool) or not isinstance(self.coarse, int) or self.coarse < 1:
            raise UserError(f"{self.coarse!r} steps at half size make no sense: give a whole number of 1 or more.")

    @property
    def settings(self) -> dict:
        return {"coarse": self.coarse}

    @property
    def label(self) -> str:
        return f"{self.name}, the first {self.coarse} at half size"

    def apply(self, pipe):
        """Runs the first steps at half size; returns the function that undoes it.

        Raises:
            Unavailable: something is on the transformer that knows one size of image or one schedule.
            UserError: the pipeline isn't text-to-image, or has another solver than Euler's.
        """
        adapters.check(pipe.transformer, adapters.PACKED)
        _check_kind(type(pipe))
        _check_solver(pipe.scheduler)
        transformer = pipe.transformer
        if getattr(transformer, HALVED, False):
            raise UserError("The first steps are at half size already: take that back first.")
        for mark, what in ((RECORDED, "a CUDA graph"), (AHEAD, "modulation ahead"), (SHARED, "divided tokens")):
            if getattr(transformer, mark, None):
                raise Unavailable(f"needs the transformer without {what}, which knows one size and schedule of steps")
        if isinstance(getattr(getattr(transformer, CACHED, None), "predictor", None), L2P):
            raise UserError(
                "The cache's weights are of steps at both sizes, which can't be mixed: take another predictor."
            )
        theirs = "needs the transformer without a cache of diffusers' (disable_cache), which keeps steps of one size"
        if getattr(transformer, "is_cache_enabled", False):
            raise Unavailable(theirs)
        with Changes(self.label) as changes:
            around(pipe, functools.partial(_run, self.coarse, pipe), lambda image: {}, changes)
            changes.put(transformer, HALVED, True)
            changes.refuse(transformer, ("enable_cache",), f"{self.name.capitalize()} {theirs}: take one of them off.")
        return changes.take_back


def activation(delta: float, side: int, spectrum: tuple[float, float] = FLUX_SPECTRUM) -> float:
    """The noise level below which frequencies of half a small image's side count, in (0, 1).

    Source: Spectral Progressive Diffusion, its activation time.

    Args:
        delta: what may be lost of the power: 0.01 careful, 0.05 fast.
        side: of the whole latents, 128 for an image of 1024².
        spectrum: A and β of the latents' power A·f^-β.
    """
    size, falls = spectrum
    power = size * (side // 4) ** -falls
    if not 0 < delta < 1 + power:
        raise UserError(f"A loss of {delta!r} makes no sense: give a share above 0, such as 0.01 or 0.05.")
    return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))


def _run(coarse: int, pipe, image: Image, mine: Pass, given: dict, call):
    """One step of the transformer, at the size that it has."""
    _check(coarse, pipe, image, given)
    if image.step > coarse:
        return call()
    now, after = pipe.scheduler.sigmas[image.step : image.step + 2].tolist()
    latents, dtype = given["hidden_states"], given["hidden_states"].dtype
    if image.step == coarse:  # the first large one, rewound; what Euler makes of what is returned is its step
        rewound = 2 * now / (1 + now)
        large = latents.float() * 2 / (1 + now)
        timestep = torch.full_like(given["timestep"], rewound)
        change = _velocity(call, given, large.to(dtype), given["img_ids"], timestep) * (after - rewound)
        return (((large + change - latents.float()) / (after - now)).to(dtype),)
    height, width = _grid(given["img_ids"])
    if "ids" not in mine.state:
        ids = given["img_ids"].unflatten(-2, (height, width))[..., : height // 2, : width // 2, :]
        mine.state["ids"] = ids.flatten(-3, -2)
    whole = cosine(_unpacked(latents.float(), height, width))
    low = _packed(cosine(whole[..., :height, :width], back=True)).to(dtype)
    # the noise that the high frequencies are grows quieter as the steps' noise does
    whole = whole / now
    velocity = _velocity(call, given, low, mine.state["ids"], given["timestep"])
    whole[..., :height, :width] = cosine(_unpacked(velocity, height // 2, width // 2))
    return (_packed(cosine(whole, back=True)).to(dtype),)


def _velocity(call, given: dict, latents, ids, timestep) -> torch.Tensor:
    """What the transformer gives for other latents, in float32."""
    other = {"hidden_states": latents, "img_ids": ids, "timestep": timestep, "return_dict": False}
    return call.func(**given | other)[0].float()


def _check(coarse: int, pipe, image: Image, given: dict) -> None:
    """Raises UserError for a call that can't be at two sizes."""
    scheduler = pipe.scheduler
    if image.total is None or image.clock.timesteps is not scheduler.timesteps or (kind := image.clock.caller) is None:
        raise UserError(
            "Progressive resolution needs the loop of the pipeline that it is on, which knows its steps: call that."
        )
    if not any(given.get(name) is not None for name in CONTROL):  # which have a sentence of their own
        _check_kind(kind)
    _check_solver(scheduler)
    if image.total <= coarse:
        raise UserError(
            f"{coarse} steps at half size leave none of {image.total} at full size: give fewer, or make more steps."
        )
    if any(given.get(name) is not None for name in CONTROL):
        raise UserError("A ControlNet's residuals have one size, so no step can be at half size: take one of them off.")
    height, width = _grid(given["img_ids"])
    if given["img_ids"][..., 0].any() or given["img_ids"].shape[-2] != height * width:
        raise UserError(
            "Another image's tokens follow this one's, as Kontext's do, and no step can be at half size with these: "
            "take progressive resolution off first."
        )
    if height % 2 or width % 2:
        raise UserError(
            f"An image of {width} × {height} tokens can't be halved: give a width and height that 32 pixels divide."
        )


def _check_kind(kind: type) -> None:
    from diffusers import FluxPipeline

    if kind is not FluxPipeline:
        raise UserError(
            f"Progressive resolution begins with noise alone, and {kind.__name__} begins with or follows an image: use "
            "it with text-to-image (FluxPipeline)."
        )


def _check_solver(scheduler) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:  # type: ignore[attr-defined]
        raise UserError(
            f"Progressive resolution rewinds one of Euler's steps, and {type(scheduler).__name__} makes others now:"
            " take that solver off first."
        )


def _grid(ids: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of tokens, by their positions (tokens, 3)."""
    height, width = (ids[..., 1:].amax(-2).reshape(-1, 2)[0] + 1).tolist()
    return int(height), int(width)


def _unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(n, tokens, 4 channels) as (n, channels, 2 height, 2 width), as diffusers' pipelines unpack latents."""
    parts = tokens.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """(n, channels, height, width) as (n, tokens, 4 channels)."""
    parts = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def cosine(x: torch.Tensor, back: bool = False) -> torch.Tensor:
    """The orthonormal discrete cosine transform (DCT-II) of the last two dimensions, or what undoes it."""
    rows, columns = (_cosines(n, x.device) for n in x.shape[-2:])
    return rows.T @ x @ columns if back else rows @ x @ columns.T


@functools.lru_cache(maxsize=8)
def _cosines(n: int, device: torch.device) -> torch.Tensor:
    """(frequency, place), each row of length 1, in float32."""
    at = torch.arange(n, dtype=torch.float64)
    table = torch.cos(torch.pi * at[:, None] * (at + 0.5) / n) * math.sqrt(2 / n)
    table[0] /= math.sqrt(2)
    return table.to(device, torch.float32)
