"""The kinds that techniques come in, by the names that parameters, stacks and rows use. It imports no PyTorch."""

from __future__ import annotations

# modules that have FlashAttention 3, the first that is there; the second is the package fa3-fwd's
FLASH_3 = ("flash_attn_interface", "fa3_fwd_interface")

# kind -> (label, diffusers' backend or None where diffusers has none, module it needs)
ATTENTION = {
    "default": ("SDPA, PyTorch's choice", "native", None),
    "cudnn": ("SDPA cuDNN", "_native_cudnn", None),
    "flash": ("SDPA FlashAttention 2", "_native_flash", None),
    "efficient": ("SDPA memory-efficient", "_native_efficient", None),
    "math": ("SDPA math", "_native_math", None),
    "flash 3": ("FlashAttention 3", "_flash_3", None),
    "flash 4": ("FlashAttention 4", "_native_flash", "flash_attn.cute"),
    "sage 1": ("SageAttention 1", None, "sageattention"),
    "sage 2": ("SageAttention 2", "sage", "sageattention"),
}

# kind -> (label, least compute capability, the model has to be in bfloat16)
TORCHAO = {
    "fp8 row": ("TorchAO FP8 per row", (8, 9), True),
    "fp8 tensor": ("TorchAO FP8 per tensor", (8, 9), True),
    "fp8 weight-only": ("TorchAO FP8 weight-only", (0, 0), False),
    "int8": ("TorchAO INT8", (0, 0), False),
    "int8 weight-only": ("TorchAO INT8 weight-only", (0, 0), False),
    "int4 weight-only": ("TorchAO INT4 weight-only", (8, 0), True),
    "fp8 row, 2:4 sparse": ("TorchAO FP8 per row, 2:4 sparse", (9, 0), True),
}
SPARSE_INT8 = "int8, 2:4 sparse"  # which torchao has no more
BITSANDBYTES = ("nf4", "fp4", "int8")
GGUF = ("Q8_0", "Q5_0", "Q4_0")  # the K formats can't be written by the gguf package
QUANTO = {"int8": "qint8", "fp8": "qfloat8", "int4": "qint4"}  # kind -> Quanto's type

VAE = {  # what is done to the VAE and what follows it -> class in `fluxnb.techniques`
    "channels-last": "ChannelsLast",
    "compiled": "Compiled",
    "sliced": "Sliced",
    "tiled": "Tiled",
    "bytes": "BytesOnDevice",
}

# kind -> (label, what its documentation sets, the interval that reuses nothing: 0 where a threshold is set)
FIRST, MAG, SEA, TAYLOR, TAYLOR_LITE = "first block", "mag", "sea", "taylorseer", "taylorseer lite"
FASTER, PYRAMID = "fastercache", "pyramid"
DIFFUSERS_CACHES = {
    FIRST: ("FirstBlockCache", 0.2, 0),
    MAG: ("MagCache", 0.06, 0),
    SEA: ("SeaCache", 0.25, 0),
    TAYLOR: ("TaylorSeer of attention", 5, 1),
    TAYLOR_LITE: ("TaylorSeer lite", 5, 1),
    FASTER: ("FasterCache", 2, 1),
    PYRAMID: ("Pyramid Attention Broadcast", 2, 1),
}
CALIBRATORS = {"hold": "", TAYLOR: "TaylorSeer {}", "foca": "FoCa", "dmd": "DMD"}  # cache-dit's, by what a label says
