"""What can be done to the VAE and what comes after it: layout, compilation, slices, tiles, bytes on the device.

Image-to-image encodes with it, too.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch

from fluxnb.families import HOST, VAE
from fluxnb.technique import ANOTHER, IDENTICAL, ROUNDING, Changes, Technique
from fluxnb.techniques import kinds
from fluxnb.techniques.compilation import compile_each


@dataclass
class ChannelsLast(Technique):
    """Convolutions on channels-last memory, which GPU kernels prefer. Source: PyTorch's memory formats."""

    family, exact = VAE, ROUNDING
    needed = ("vae",)
    name = label = "VAE channels-last"
    settings = {"vae": "channels-last"}

    def apply(self, pipe):
        """Changes the layout of the weights; returns the function that changes it back."""
        with Changes(self.label) as changes:
            _lay_out(pipe.vae, changes)
        return changes.take_back


def _lay_out(vae, changes: Changes) -> None:
    for module in vae.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                changes.callback(_with_layout, module, name, torch.contiguous_format)
                _with_layout(module, name, torch.channels_last)


def _with_layout(module, name: str, layout) -> None:
    weight = getattr(module, name)
    weight.data = weight.data.contiguous(memory_format=layout)


@dataclass
class Compiled(Technique):
    """Decoder and encoder, each compiled as one graph, on channels-last memory. Source: torch.compile.

    The encoder is compiled when an image is first encoded: text-to-image never waits for it.

    Args:
        mode: torch.compile's; None for its default.
    """

    family, exact = VAE, ROUNDING
    needed = ("vae",)
    name = "VAE compiled"

    mode: str | None = None

    @property
    def label(self) -> str:
        return "VAE compiled" + (f", {self.mode}" if self.mode else "")

    @property
    def settings(self) -> dict:
        return {"vae": "compiled", **({"vae_mode": self.mode} if self.mode else {})}

    def apply(self, pipe):
        """Compiles at the first call; returns the function that makes it eager again."""
        with Changes(self.label) as changes:
            _lay_out(pipe.vae, changes)
            compile_each([pipe.vae.decoder, pipe.vae.encoder], changes, self.mode)
        return changes.take_back


@dataclass
class Sliced(Technique):
    """One image of a batch at a time: less memory for batches, nothing for one image. Source: diffusers."""

    family, exact = VAE, ROUNDING  # a batch of another size is rounded elsewhere
    needed = ("vae",)
    name = label = "VAE sliced"
    settings = {"vae": "sliced"}

    def apply(self, pipe):
        """Turns slicing on; returns the function that turns it off."""
        with Changes(self.label) as changes:
            changes.put(pipe.vae, "use_slicing", True, yields=True)
        return changes.take_back


@dataclass
class Tiled(Technique):
    """The image in overlapping tiles, blended where they meet. Source: diffusers' AutoencoderKL.

    diffusers' default tile is the size that the VAE was made for, 1024 pixels for FLUX, and an image of that size
    isn't tiled at all: the side has to be given.

    Args:
        side: of a tile in pixels, a multiple of 16.
    """

    family, exact = VAE, ANOTHER
    needed = ("vae",)
    name = "VAE tiled"

    side: int

    def __post_init__(self):
        if self.side < 16 or self.side % 16:
            raise ValueError(f"a VAE tile of {self.side} pixels: choose a multiple of 16")

    @property
    def label(self) -> str:
        return f"VAE tiles of {self.side}"

    @property
    def settings(self) -> dict:
        return {"vae": "tiled", "tile": self.side}

    def apply(self, pipe):
        """Turns tiling on; returns the function that puts sizes and switch back."""
        latents = self.side // pipe.vae_scale_factor
        with Changes(self.label) as changes:
            for name, value in (
                ("tile_sample_min_size", self.side),
                ("tile_latent_min_size", latents),
                ("use_tiling", True),
            ):
                changes.put(pipe.vae, name, value, yields=True)
        return changes.take_back


@dataclass
class BytesOnDevice(Technique):
    """Pixels become bytes where they were decoded, and only bytes go to the host.

    diffusers copies numbers of two or four bytes to the host and rounds them there, on one core while the GPU is idle.
    The picture is the same to the bit. Source: this study's own.
    """

    family, exact = HOST, IDENTICAL
    needed = ("image_processor",)
    notebook = VAE.notebook
    name = label = "bytes on the device"
    settings = {"pixels": "bytes on the device"}
    terms = {name: "pixels are rounded to bytes on the GPU instead of by one core of the host"}

    def apply(self, pipe):
        """Replaces the conversion to PIL images; returns the function that puts it back."""
        from PIL import Image

        processor = pipe.image_processor
        original = processor.postprocess

        @functools.wraps(original)
        def postprocess(image, output_type="pil", do_denormalize=None):
            if output_type != "pil":
                return original(image, output_type, do_denormalize)
            shares = original(image, "pt", do_denormalize).permute(0, 2, 3, 1).float()  # of 0 to 1
            if shares.isnan().any():  # as NumPy says it where it rounds
                warnings.warn("invalid value encountered in cast", RuntimeWarning, stacklevel=2)
            pictures = (shares * 255).round().to(torch.uint8).contiguous().cpu().numpy()  # as PIL has them in memory
            return [Image.fromarray(picture) for picture in pictures]

        with Changes(self.label) as changes:
            changes.put(processor, "postprocess", postprocess)
        return changes.take_back


def chosen(names: list[str], tiles: list[int]) -> list[Technique]:
    """The techniques that parameters name (`kinds.VAE`), tiles once for each side in pixels."""
    found: list[Technique] = []
    for name in names:
        made = globals()[kinds.VAE[name]]
        found += [made(side) for side in tiles] if made is Tiled else [made()]
    return found


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, height, width) around -1 to 1 from latents (n, 16, height / 8, width / 8) as the VAE takes them."""
    return pipe.vae.decode(latents, return_dict=False)[0]
