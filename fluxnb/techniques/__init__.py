"""What is switched on: each module holds techniques (see fluxnb.technique) of one kind.

`from fluxnb.techniques import Regional` imports just the module that has it, and PyTorch only then.
"""

from __future__ import annotations

import importlib

MODULES = {  # module -> its techniques, in the order in which they are listed
    "schedulers": ("DPMSolver",),
    "progressive": ("Progressive",),
    "attention": ("Attention",),
    "compilation": ("Regional", "TextEncoders", "Whole", "CudaGraph", "FusedQKV", "TensorRT"),
    "fused": ("FusedGELU", "LateScales", "FusedRoPE"),
    "norms": ("FusedNorm",),
    "fp8_attention": ("FP8Attention",),
    "modulation": ("ModulationAhead",),
    "precision": ("TorchAO", "BitsAndBytes", "GGUF", "Quanto", "Nunchaku"),
    "sparsity": ("SparseInt8",),
    "svdquant": ("SimulatedSVDQuant",),
    "vae": ("ChannelsLast", "Compiled", "Sliced", "Tiled", "BytesOnDevice"),
    "hook_search": ("NoHookSearch",),
    "parallel": ("Replicas", "ContextParallel", "FullyShard", "DiffusersParallel"),
    "parallel_vae": ("ParallelVAE",),
    "xdit": ("XDiT", "PipeFusion"),
}
_OWNERS = {name: module for module, names in MODULES.items() for name in names}
__all__ = list(_OWNERS)


def __getattr__(name: str):
    if name not in _OWNERS:
        raise AttributeError(f"fluxnb.techniques has no {name}; it has {', '.join(_OWNERS)}")
    return getattr(importlib.import_module(f"{__name__}.{_OWNERS[name]}"), name)


def matrix(kind: str):
    """The quantizer of a kind whose products are fast enough to be worth compiling, dense or sparse."""
    from fluxnb.techniques import kinds, precision, sparsity

    return sparsity.SparseInt8() if kind == kinds.SPARSE_INT8 else precision.TorchAO(kind)


def quantizers() -> list:
    """Every format that weights can be quantized to, one technique each."""
    from fluxnb.techniques import kinds, precision, sparsity, svdquant

    return [
        *map(precision.TorchAO, kinds.TORCHAO),
        sparsity.SparseInt8(),
        *map(precision.BitsAndBytes, kinds.BITSANDBYTES),
        *map(precision.GGUF, kinds.GGUF),
        *map(precision.Quanto, kinds.QUANTO),
        svdquant.SimulatedSVDQuant(),
        precision.Nunchaku(),
    ]
