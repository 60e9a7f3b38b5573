"""What the hardware can do: matrix products, attention and memory traffic. A speed is set against these.

A ceiling is held for seconds, at the clocks that the power limit allows: a burst of milliseconds runs at others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from fluxnb.errors import lacks_memory
from fluxnb.measure import telemetry
from fluxnb.models import pipelines
from fluxnb.technique import Unavailable

# batch, heads, 512 text + 4096 image tokens, width of a head: FLUX at 1024 x 1024
FLUX_ATTENTION = (1, 24, 4608, 128)
ONE_HEAD = (1, 1, 1152, 128)  # stands for it on a CPU
BACKENDS = ("default", "cudnn", "flash", "efficient", "math")
HELD_S, HELD_S_ON_A_CPU = 2.0, 0.1  # seconds of calls in a row, after as many to warm up


def device() -> str:
    """The device that ceilings are measured on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def matmul(size: int, dtype: str):
    """(function, FLOPs): one product of two size x size matrices of random numbers.

    Args:
        dtype: a torch dtype's name; "fp8" is e4m3 with one scale per row and column, "int8" sums in 32 bits. The
            function raises Unavailable where PyTorch has no such product.

    The matrices are made by the function's first call, which belongs to its warm-up.
    """
    flop = 2 * size**3
    if dtype in ("fp8", "int8"):
        return _small_matmul(size, dtype), flop

    @functools.cache
    def made():
        a, b = (torch.randn(size, size, device=device()).to(getattr(torch, dtype)) for _ in range(2))
        return a, b, torch.empty_like(a)

    def run():
        a, b, out = made()
        return torch.matmul(a, b, out=out)

    return run, flop


def _small_matmul(size: int, dtype: str):
    @functools.cache
    def product():
        a, b = (torch.randn(size, size, device=device()) for _ in range(2))
        if dtype == "int8":
            return functools.partial(torch._int_mm, a.to(torch.int8), b.to(torch.int8).t())
        a, b, ones = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones(size, 1, device=device())
        scales = {"scale_a": ones, "scale_b": ones.t()}
        return functools.partial(torch._scaled_mm, a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    def run():
        if device() == "cpu":
            raise Unavailable("needs a GPU: a CPU's products of these are emulated or of another kind")
        multiply = product()  # what runs out of memory here is no missing kernel
        try:
            multiply()
        except (RuntimeError, NotImplementedError) as error:
            if lacks_memory(error):
                raise
            raise Unavailable(f"needs a GPU with matrix units for {dtype}: {str(error).splitlines()[0]}") from error

    return run


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

    @functools.cache
    def made():
        return tuple(torch.randn(shape, device=device(), dtype=getattr(torch, dtype)) for _ in range(3))

    def run():
        q, k, v = made()
        if backend == "default":
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return
        try:
            with sdpa_kernel(kinds[backend]):
                torch.nn.functional.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            raise Unavailable(
                f"needs a GPU, PyTorch build and shape that {backend} attention supports: {str(error).splitlines()[0]}"
            ) from error

    return run, 4 * batch * heads * tokens**2 * width


def copy(gib: float):
    """(function, bytes moved): a copy from device memory to device memory; read and write are counted.

    The memory is taken by the function's first call, which belongs to its warm-up.
    """
    size = int(gib * 2**30)

    @functools.cache
    def made():
        source = torch.empty(size, dtype=torch.uint8, device=device())
        return torch.empty_like(source), source

    def run():
        target, source = made()
        return target.copy_(source)

    return run, 2 * size


# --- what a step could take at best -----------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """FLOPs of one transformer step for one image."""

    products: float
    attention: float


def step_work(subject) -> Work:
    """Counts one step of a subject's unquantized transformer for one image; its weights are not needed.

    Products are counted as they are called, attention by its formula. Raises UserError if the model can't be read.
    """
    import diffusers
    from torch.utils.flop_counter import FlopCounterMode

    image, text = (subject.width // 16) * (subject.height // 16), subject.model.tokens
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        config, ids = pipelines.transformer_config(subject.model.name), 3
        kind: Any = diffusers.Flux2Transformer2DModel
        more: dict = {}
        if "pooled_projection_dim" in config:
            kind, more = diffusers.FluxTransformer2DModel, {"pooled_projections": config["pooled_projection_dim"]}
        else:
            ids = 4
        transformer = kind.from_config(config)
        config = transformer.config
        transformer(
            hidden_states=torch.empty(1, image, config.in_channels),
            encoder_hidden_states=torch.empty(1, text, config.joint_attention_dim),
            timestep=torch.empty(1),
            guidance=torch.empty(1) if config.guidance_embeds else None,
            img_ids=torch.empty(image, ids),
            txt_ids=torch.empty(text, ids),
            **{name: torch.empty(1, width) for name, width in more.items()},
        )
    counts = counter.get_flop_counts()["Global"]
    products = sum(flop for op, flop in counts.items() if op.__name__ in ("mm", "addmm"))
    blocks = config.num_layers + config.num_single_layers
    width = config.num_attention_heads * config.attention_head_dim
    return Work(products, 4 * blocks * (text + image) ** 2 * width)


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s this machine reaches under load: products by number format, attention in its default format.

    Args:
        timed_s: seconds that each was timed for, at least.
        clock_mhz: of the GPU meanwhile, on average.
        session: that they were measured in.
    """

    products: dict[str, float]
    attention: float | None
    timed_s: float | None = None
    clock_mhz: float | None = None
    session: str | None = None

    def step_s(self, work: Work, number: str) -> float | None:
        """Seconds that one step takes at least with products in `number`; None if that wasn't measured.

        Everything that is neither a product nor attention counts as nothing.
        """
        if number not in self.products or not self.attention:
            return None
        return work.products / self.products[number] + work.attention / self.attention


def measured(study, size: int = 8192, repeats: int = 5) -> Ceilings:
    """Measures the ceilings, as rows of the study's own notebook."""
    size = size if _on_gpu() else 1024
    numbers = ("bfloat16", "float32", "fp8", "int8") if _on_gpu() else ("float32", "fp8", "int8")
    rows = {number: _product(study, size, number, repeats) for number in numbers}
    attention = _attention(study, BACKENDS[0], repeats)
    batch, heads, tokens, width = attention.setting("shape")
    ok = [row for row in (*rows.values(), attention) if row.ok]
    clocks = [mhz for row in ok if (mhz := (row.telemetry or {}).get("sm_clock_avg_mhz"))]
    return Ceilings(
        {number: 2 * size**3 / row.latency_p50 for number, row in rows.items() if row.ok},
        4 * batch * heads * tokens**2 * width / attention.latency_p50 if attention.ok else None,
        min((row.shown("timed_s", 0.0) for row in ok), default=None),
        sum(clocks) / len(clocks) if clocks else None,
        ok[-1].session if ok else None,
    )


def sweep(study, size: int, repeats: int) -> list:
    """A row for each ceiling: products in every number format, attention by every backend, a copy.

    Args:
        size: rows and columns of the matrices.
    """
    numbers = ("float32", "float16", "bfloat16") if _on_gpu() else ("float32", "bfloat16")
    rows = [_product(study, size, number, repeats) for number in (*numbers, "fp8", "int8")]
    rows += [_attention(study, backend, repeats) for backend in BACKENDS]
    run, moved = copy(4 if _on_gpu() else 0.5)
    label = "copy in device memory"
    return [*rows, study.time("ceiling: copy", {"bytes": moved}, run, repeats, label=label, held_s=_held_s())]


def _product(study, size: int, number: str, repeats: int):
    settings, label = {"size": size, "dtype": number}, f"matrix product {size}³, {number}"
    run, _ = matmul(size, number)
    return study.time("ceiling: matrix product", settings, run, repeats, label=label, held_s=_held_s())


def _attention(study, backend: str, repeats: int):
    shape, dtype = (FLUX_ATTENTION, "bfloat16") if _on_gpu() else (ONE_HEAD, "float32")
    settings = {"shape": list(shape), "dtype": dtype, "backend": backend}
    run, _ = attention(shape, dtype, backend)
    label = f"attention, {backend}, {dtype}"
    return study.time("ceiling: attention", settings, run, repeats, label=label, held_s=_held_s())


def _held_s() -> float:
    return HELD_S if _on_gpu() else HELD_S_ON_A_CPU


def _on_gpu() -> bool:
    """Whether the machine whose rows they are has a GPU: in a replay, not this one."""
    return bool(telemetry.machine()["gpus"])
