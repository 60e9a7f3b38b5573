"""What the hardware can do: matrix products, attention and memory traffic. A speed is set against these."""

from __future__ import annotations

import torch

from fluxnb.technique import Unavailable

# batch, heads, 512 text + 4096 image tokens, width of a head: FLUX at 1024 x 1024
FLUX_ATTENTION = (1, 24, 4608, 128)
BACKENDS = ("default", "cudnn", "flash", "efficient", "math")


def device() -> str:
    """The device that ceilings are measured on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def matmul(size: int, dtype: str):
    """(function, FLOPs): one product of two size x size matrices of random numbers."""
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device()).to(kind) for _ in range(2))
    out = torch.empty(size, size, device=device(), dtype=kind)
    return lambda: torch.matmul(a, b, out=out), 2 * size**3


def attention(shape: tuple[int, int, int, int], dtype: str, backend: str):
    """(function, FLOPs): one scaled dot-product attention of shape (batch, heads, tokens, head width).

    The function raises Unavailable where PyTorch can't run the backend here; it never falls back to another.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    batch, heads, tokens, width = shape
    q, k, v = (torch.randn(shape, device=device(), dtype=getattr(torch, dtype)) for _ in range(3))

    def run():
        if backend == "default":
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return
        try:
            with sdpa_kernel(kinds[backend]):
                torch.nn.functional.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            raise Unavailable(
                f"needs a GPU, PyTorch build and shape that {backend} attention supports: {str(error).splitlines()[0]}"
            ) from error

    return run, 4 * batch * heads * tokens**2 * width


def copy(gib: float):
    """(function, bytes moved): a copy from device memory to device memory; read and write are counted."""
    source = torch.empty(int(gib * 2**30), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel()
