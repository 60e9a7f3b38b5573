"""The VAE by itself, without the steps before it: a row for each way of decoding, and of making pictures of pixels."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from fluxnb.families import HOST, VAE
from fluxnb.measure import latency
from fluxnb.study.row import Row
from fluxnb.study.study import Study
from fluxnb.study.subject import Subject
from fluxnb.technique import Technique, applied
from fluxnb.techniques import vae

PLAIN = "eager", {"vae": "eager"}  # as the pipeline has it: the row's technique and settings
NUMBERS = "numbers to the host", {"pixels": "numbers to the host"}


def decodings(
    s: Study, subject: Subject, options: list[Technique], sides: list[int], batch: int, repeats: int
) -> list[Row]:
    """Decoding one image and a batch of each side in pixels, by the VAE as it is and with each of the options."""
    own = [option for option in options if option.family is VAE]
    return [
        _decoding(s, subject, option, side, count, repeats)
        for side in sides
        for count in (1, batch)
        for option in (None, *own)
        if _useful(option, side, count, sides[0])
    ]


def conversions(s: Study, subject: Subject, options: list[Technique], sides: list[int], repeats: int) -> list[Row]:
    """Making a picture of decoded pixels, as diffusers does and with each of the options."""
    own = [option for option in options if option.family is HOST]
    return [_conversion(s, subject, o, side, repeats) for side in sides for o in (None, *own) if own]


def _useful(option: Technique | None, side: int, count: int, first: int) -> bool:
    """Not where there is nothing to cut; and every shape compiles anew, so one of them has to do."""
    if isinstance(option, vae.Sliced):
        return count > 1
    if isinstance(option, vae.Tiled):
        return option.side < side
    return not isinstance(option, vae.Compiled) or (count == 1 and side == first)


def _decoding(s: Study, subject: Subject, option: Technique | None, side: int, count: int, repeats: int) -> Row:
    def draw(pipe):
        of, small = pipe.vae.config.latent_channels, side // pipe.vae_scale_factor
        latents = torch.randn((count, of, small, small), generator=torch.Generator().manual_seed(0))
        return latents.to(pipe.vae.device, pipe.vae.dtype)

    def also(pipe, run):
        with latency.memory(pipe.vae.device) as used:
            run()
        return {"memory_peak_gib": used.peak_gib, "proof": {"kernels": latency.kernels(run, top=2)}}

    return _timed(s, subject, option, side, repeats, PLAIN, draw, vae.decode, also, family=VAE, batch=count)


def _conversion(s: Study, subject: Subject, option: Technique | None, side: int, repeats: int) -> Row:
    def draw(pipe):
        pixels = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1
        return pixels.to(pipe.vae.device, pipe.vae.dtype)

    def convert(pipe, pixels):
        pipe.image_processor.postprocess(pixels)

    return _timed(s, subject, option, side, repeats, NUMBERS, draw, convert, family=HOST)


def _timed(s, subject, option, side, repeats, plain, draw, work, also=None, **columns) -> Row:
    """A row of `work(pipe, draw(pipe))` with the option on; nothing is loaded if the row is there."""
    name, settings = (option.label, option.settings) if option else plain
    own: dict = {}

    def prepare() -> None:
        own["pipe"] = s.pipe(subject)
        stack.enter_context(applied(own["pipe"], *([option] if option else [])))
        own["given"] = draw(own["pipe"])

    def run() -> None:
        work(own["pipe"], own["given"])

    def prove() -> dict:
        return also(own["pipe"], run) if also else {}

    with ExitStack() as stack:
        return s.time(
            name, {**settings, "side": side}, run, repeats, before=prepare, also=prove, model=subject.model.name,
            weights=subject.model.weights, width=side, height=side, **columns,
        )  # fmt: skip
