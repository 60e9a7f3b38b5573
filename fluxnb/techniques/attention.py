"""Attention kernels: one chosen instead of the one that PyTorch would take, and how far each is from FP32."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from fluxnb import adapters
from fluxnb.errors import lacks_memory
from fluxnb.families import ATTENTION
from fluxnb.measure import ceilings, latency
from fluxnb.technique import ANOTHER, IDENTICAL, ROUNDING, Changes, Technique, Unavailable, networks
from fluxnb.techniques.kinds import ATTENTION as KINDS
from fluxnb.techniques.kinds import FLASH_3
from fluxnb.techniques.layers import refuse_converting

_CHOICE = threading.RLock()  # PyTorch chooses for the whole process: two threads would leave theirs behind
_LOCKED: set = set()  # kernels whose function in diffusers waits for it, too
ANY_FORMAT = ("default", "math", "efficient")  # on a GPU the others have kernels for 16 bits only
SAGE_WIDTHS = (64, 96, 128)  # widths of a head that SageAttention's kernels are written for


@dataclass
class Attention(Technique):
    """One attention kernel for the whole transformer and its ControlNet.

    Source: FlashAttention 2 to 4 (Dao et al.), SageAttention (Zhang et al., 2024), cuDNN and PyTorch's own.

    Args:
        kind: a key of `fluxnb.techniques.kinds.ATTENTION`.
    """

    family, term = ATTENTION, "attention kernels"
    KINDS = KINDS

    kind: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"attention {self.kind!r}: choose one of {', '.join(KINDS)}")

    @property
    def name(self) -> str:
        return KINDS[self.kind][0]

    label = name

    @property
    def exact(self) -> str:
        return {"default": IDENTICAL, "sage 1": ANOTHER, "sage 2": ANOTHER}.get(self.kind, ROUNDING)

    @property
    def settings(self) -> dict:
        return {"attention": self.kind}

    def apply(self, pipe):
        """Chooses the kernel; returns the function that gives the choice back."""
        transformer = pipe.transformer
        _check(self.kind, transformer.device, transformer.dtype)
        width = transformer.config.attention_head_dim
        if self.kind.startswith("sage") and width not in SAGE_WIDTHS:
            raise Unavailable(f"needs heads of width {', '.join(map(str, SAGE_WIDTHS))}, and this model's have {width}")
        with Changes(self.label) as changes:
            if self.kind == "flash 4":
                changes.callback(_flash_4())
            backend = KINDS[self.kind][1]
            if backend is None:
                flux = importlib.import_module(adapters.of(transformer).module)
                changes.put(flux, "dispatch_attention_fn", _sage, yields=True)
            else:
                _choose(networks(pipe), backend, changes)
            if transformer.device.type == "cuda" and self.kind not in ANY_FORMAT:
                refuse_converting(pipe, changes)
            self.proof = {"attention": backend or "sageattention.sageattn"}
        return changes.take_back


def _choose(chosen: list, backend: str, changes: Changes) -> None:
    """Makes it the kernel of networks, and of those only: diffusers would make it every other model's as well."""
    dispatch = importlib.import_module("diffusers.models.attention_dispatch")
    kernel = dispatch.AttentionBackendName(backend)
    if kernel is dispatch.AttentionBackendName._FLASH_3 and dispatch.flash_attn_3_func is None:
        # diffusers looks for another package's module only; for good, since it takes no other kernel's place
        vars(dispatch).update(flash_attn_3_func=flash_3().flash_attn_func, _CAN_USE_FLASH_ATTN_3=True)
    processors = [m.processor for n in chosen for m in n.modules() if hasattr(m, "processor")]
    divided = any(getattr(processor, "_parallel_config", None) is not None for processor in processors)
    if divided and not dispatch._AttentionBackendRegistry._is_context_parallel_available(kernel):
        raise Unavailable("needs to be put on before diffusers' context parallelism, which this kernel has no part in")
    try:
        dispatch._check_attention_backend_requirements(kernel)
        dispatch._maybe_download_kernel_for_backend(kernel)
    except (ImportError, RuntimeError, ValueError) as error:
        raise Unavailable(f"needs what diffusers asks for: {_first_line(error)}") from error
    _one_at_a_time(dispatch._AttentionBackendRegistry._backends, kernel)
    for processor in processors:
        changes.put(processor, "_attention_backend", kernel, yields=True)


def _one_at_a_time(functions: dict, kernel) -> None:
    """diffusers' function of a kernel switches PyTorch to it: from now on in one thread at a time, like ours."""
    if kernel not in _LOCKED:
        _LOCKED.add(kernel)
        original = functions[kernel]

        @functools.wraps(original)
        def locked(*args, **kwargs):
            with contextlib.nullcontext() if torch.compiler.is_compiling() else _CHOICE:
                return original(*args, **kwargs)

        functions[kernel] = locked


def function(kind: str):
    """(q, k, v) -> output, all (n, heads, tokens, width): a kernel by itself, never another in its place.

    Raises Unavailable, now or when called, where it can't run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check(kind, device, torch.bfloat16)
    if kind == "default":
        return scaled_dot_product_attention
    if kind == "sage 1":
        import sageattention

        # it subtracts the mean from k in place
        return lambda q, k, v: sageattention.sageattn(q, k.clone(), v, tensor_layout="HND")
    if kind == "sage 2":
        import sageattention

        return lambda q, k, v: sageattention.sageattn(q, k, v, tensor_layout="HND")
    if kind == "flash 3":
        module = flash_3()
        return lambda q, k, v: _first(module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "flash 4": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[kind]

    def run(q, k, v):
        try:
            with contextlib.ExitStack() as stack:
                if not torch.compiler.is_compiling():  # which decides once, for all calls
                    stack.enter_context(_CHOICE)
                if kind == "flash 4":
                    stack.callback(_flash_4())
                stack.enter_context(sdpa_kernel(chosen))
                return scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            raise Unavailable(
                f"needs a GPU, PyTorch build and shape that {kind} attention supports: {_first_line(error)}"
            ) from error

    return run


def error(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> float:
    """Relative error ‖out − exact‖ / ‖exact‖ against FP32 arithmetic, on seeded random inputs of a shape.

    The inputs are rounded to `dtype` first, so what is counted is the kernel's own error.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))
    out = function(kind)(q, k, v).float()
    heads = range(shape[1])  # one head at a time: the score matrix of all of them is large in FP32
    exact = torch.cat([_exact(*(x[:, h : h + 1].float() for x in (q, k, v))) for h in heads], 1)
    return ((out - exact).norm() / exact.norm()).item()


def timed(study, tokens: int, repeats: int) -> list:
    """A row for each kernel by itself: FLUX's heads at so many tokens in bfloat16, its error, and what ran."""
    batch, heads, _, width = ceilings.FLUX_ATTENTION
    shape = (batch, heads, tokens, width)

    @functools.cache
    def inputs():
        generator = torch.Generator(ceilings.device()).manual_seed(0)
        made = (torch.randn(shape, device=ceilings.device(), generator=generator) for _ in range(3))
        return tuple(x.to(torch.bfloat16) for x in made)

    def row(kind: str, label: str):
        def run():
            return function(kind)(*inputs())

        def also():
            return {"proof": {"error": error(kind, shape), "kernels": latency.kernels(run, top=1)}}

        settings = {"kernel": kind, "shape": list(shape)}
        return study.time(ATTENTION.name, settings, run, repeats, family=ATTENTION, label=label, also=also)

    return [row(kind, label) for kind, (label, *_) in KINDS.items()]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["?"])[0]


def _exact(q, k, v):
    """Attention written out, in the inputs' own number format."""
    return torch.matmul((torch.matmul(q, k.mT) / q.shape[-1] ** 0.5).softmax(-1), v)


def _first(result):
    return result[0] if isinstance(result, tuple) else result


def _check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises Unavailable where it is clear, before anything runs, that a kernel can't."""
    label, _, package = KINDS[kind]
    if kind not in ("default", "math", "flash") and device.type != "cuda":
        raise Unavailable(f"needs a CUDA GPU: {label} has kernels for nothing else")
    if kind not in ANY_FORMAT and device.type == "cuda" and dtype == torch.float32:
        raise Unavailable(f"needs the model in bfloat16 or float16, and it is in {dtype}")
    if kind == "flash 3":
        flash_3()
        if torch.cuda.get_device_capability()[0] != 9:
            raise Unavailable(f"needs a Hopper GPU (H100, H200): {label} has kernels for nothing else")
    elif package:
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise Unavailable(f"needs the package that has the module {package} ({error})") from error
        if kind == "sage 2" and not hasattr(module, "sageattn_qk_int8_pv_fp8_cuda"):
            raise Unavailable(
                "needs SageAttention 2, built from its makers' source: the Python index has version 1 only"
            )


def flash_3():
    """The module that has FlashAttention 3's functions. Raises Unavailable where there is none."""
    for name in FLASH_3:
        with contextlib.suppress(ModuleNotFoundError):
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError:
                raise
            except (ImportError, OSError) as error:
                raise Unavailable(f"needs a {name} that loads, and {_first_line(error)}") from error
    raise Unavailable(f"needs a package that has the module {' or '.join(FLASH_3)}: `pip install --no-deps fa3-fwd`")


def _flash_4():
    """FlashAttention 4 goes in PyTorch's place of FlashAttention 2, process-wide; returns what takes it out."""
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA4")
    return attention.restore_flash_attention_impl


def _sage(query, key, value, attn_mask=None, **_):
    """In place of diffusers' dispatch: query, key and value are (n, tokens, heads, width)."""
    import sageattention

    if attn_mask is not None:
        raise ValueError("SageAttention takes no mask")
    # it subtracts the mean from the key in place
    return sageattention.sageattn(query, key.clone(), value, tensor_layout="NHD")
