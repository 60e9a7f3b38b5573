"""Quantized transformers: what a 4-bit transformer needs, and what it is when it is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata

import torch
from torch import nn

from fluxnb.technique import Unavailable


@dataclass
class TorchAOInt4:
    """W4A16: block weights in INT4 groups of 128, multiplied in bfloat16 by torchao's tiled kernel; a technique.

    Source: torchao's Int4WeightOnlyConfig (format tile_packed_to_4d, which PyTorch itself has the kernel for).
    """

    name: str = "TorchAO INT4"
    label: str = "TorchAO INT4"
    settings: dict = field(default_factory=lambda: {"quantization": "torchao int4 weight-only"})
    applied_to: int = field(default=0, init=False)  # layers whose weight is a quantized tensor

    def apply(self, pipe):
        """Quantizes the blocks' linear layers in place; returns the function that puts the weights back."""
        transformer = pipe.transformer
        if transformer.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 0):
            raise Unavailable("needs a CUDA GPU of compute capability 8.0 or more, for the INT4 matrix kernel")
        if transformer.dtype != torch.bfloat16:
            raise Unavailable(f"needs the model in bfloat16, and it is in {transformer.dtype}")
        try:
            metadata.version("torchao")
        except metadata.PackageNotFoundError:
            raise Unavailable("needs the package torchao: `pip install torchao`") from None
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        layers = [m for b in blocks for m in b.modules() if type(m) is nn.Linear and m.in_features % 128 == 0]
        if not layers:
            raise Unavailable("needs layers whose width is a multiple of 128")
        before = [layer.weight for layer in layers]

        def undo():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight = weight

        chosen = set(map(id, layers))
        config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        try:
            quantize_(transformer, config, filter_fn=lambda module, _: id(module) in chosen)
        except (ImportError, NotImplementedError, AssertionError, RuntimeError) as error:
            undo()
            raise Unavailable(f"needs another torchao or PyTorch: {(str(error).splitlines() or ['?'])[0]}") from error
        self.applied_to = sum(type(layer.weight) is not nn.Parameter for layer in layers)
        return undo


@dataclass
class Nunchaku:
    """SVDQuant's own INT4 kernels; a technique."""

    name: str = "Nunchaku INT4"
    label: str = "Nunchaku INT4"
    settings: dict = field(default_factory=lambda: {"quantization": "nunchaku int4"})

    def apply(self, pipe):
        """Always Unavailable so far: the engine's weights can't be made from ours, only downloaded."""
        raise Unavailable(
            "needs the Nunchaku engine and its own quantized FLUX weights from a model hub (the package named nunchaku "
            "on the Python index is an unrelated one); its arithmetic is simulated instead"
        )
