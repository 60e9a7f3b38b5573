"""torch.compile, CUDA graphs and TensorRT: the same arithmetic with fewer, larger kernels and no gaps."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field

from fluxnb.cache.engine import RECORDED, attribute
from fluxnb.modulation import AHEAD
from fluxnb.technique import Unavailable, networks

MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune")
COMPILED_VARIANTS = 64  # of one block's code that a process may hold; PyTorch gives up at 8, a study has more


@dataclass
class Regional:
    """Compiles every block of transformer and ControlNet by itself, without graph breaks; a technique.

    All blocks of a kind share one compiled graph, so it takes seconds instead of minutes, and whatever stands
    between the blocks (a cache, say) stays plain Python. Source: PyTorch's regional compilation recipe.

    Args:
        mode: torch.compile's; None for its default.
    """

    mode: str | None = None
    name: str = "torch.compile"
    proof: dict = field(default_factory=dict, init=False)

    @property
    def label(self) -> str:
        return "compiled blocks" + (f", {self.mode}" if self.mode else "")

    @property
    def settings(self) -> dict:
        return {"compile": "blocks", **({"mode": self.mode} if self.mode else {})}

    def apply(self, pipe):
        """Compiles the blocks at their first call; returns the function that makes them eager again."""
        _let_compile()
        blocks = [b for n in networks(pipe) for b in (*n.transformer_blocks, *n.single_transformer_blocks)]
        for block in blocks:
            block.compile(fullgraph=True, mode=self.mode)
        self.proof = {"compiled": f"{len(blocks)} blocks"}

        def undo():
            for block in blocks:
                block._compiled_call_impl = None

        return undo


@dataclass
class Whole:
    """Compiles the transformer as one graph; a technique. Slower to compile, and no cache can go in between.

    Args:
        mode: torch.compile's; `reduce-overhead` is Inductor's own use of CUDA graphs.
    """

    mode: str | None = None
    name: str = "torch.compile"
    proof: dict = field(default_factory=dict, init=False)

    @property
    def label(self) -> str:
        return "compiled transformer" + (f", {self.mode}" if self.mode else "")

    @property
    def settings(self) -> dict:
        return {"compile": "transformer", **({"mode": self.mode} if self.mode else {})}

    def apply(self, pipe):
        """Compiles at the first call; returns the function that makes the transformer eager again."""
        _let_compile()
        transformer = pipe.transformer
        if self.mode in ("reduce-overhead", "max-autotune") and transformer.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU: this mode of torch.compile is about CUDA graphs")
        if hasattr(transformer, AHEAD):
            raise Unavailable("needs a transformer without ModulationAhead, which decides between two steps")
        transformer.compile(fullgraph=True, mode=self.mode)
        self.proof = {"compiled": "1 transformer"}

        def undo():
            transformer._compiled_call_impl = None

        return undo


@dataclass
class CudaGraph:
    """Records the transformer's kernels of one step and replays them: no launch gaps; a technique.

    One graph for each shape of inputs, recorded when the shape is first seen, whatever is inside: eager or compiled
    blocks, quantized or not. What decides step by step (a cache) can't be recorded. Source: torch.cuda.CUDAGraph.
    """

    name: str = "CUDA graph"
    label: str = "CUDA graph"
    settings: dict = field(default_factory=lambda: {"cuda_graph": True})
    proof: dict = field(default_factory=dict, init=False)

    def apply(self, pipe):
        """Records at the first call; returns the function that takes it back and frees the graphs."""
        import torch

        transformer = pipe.transformer
        if transformer.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU: CUDA graphs are recordings of its kernels")
        if transformer._compiled_call_impl is not None:
            raise Unavailable("needs the blocks compiled (Regional), not the transformer as a whole")
        if hasattr(transformer, AHEAD):
            raise Unavailable("needs to be put on before ModulationAhead, which acts between two replays")
        original = transformer.forward
        graphs: dict[tuple, tuple] = {}

        def record(given):
            inputs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles and settles what may not be recorded
                    original(**inputs)
            torch.cuda.current_stream().wait_stream(side)
            # NCCL's own thread may look at what it did before, which the strict mode takes for a fault of the recording
            mode = "thread_local" if torch.distributed.is_initialized() else "global"
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode=mode):
                outputs = original(**inputs)
            self.proof = {"recorded": f"{len(graphs) + 1} graph{'s' if graphs else ''}"}
            return graph, inputs, outputs

        @functools.wraps(original)
        def forward(**given):
            key = tuple((n, v.shape if isinstance(v, torch.Tensor) else str(v)) for n, v in sorted(given.items()))
            if key not in graphs:
                graphs[key] = record(given)
            graph, inputs, outputs = graphs[key]
            for name, value in given.items():
                if isinstance(value, torch.Tensor):
                    inputs[name].copy_(value)
            graph.replay()
            return tuple(o.clone() for o in outputs)

        with contextlib.ExitStack() as stack:
            stack.callback(graphs.clear)
            stack.enter_context(attribute(transformer, "forward", forward))
            stack.enter_context(attribute(transformer, RECORDED, True))
            return stack.pop_all().close


@dataclass
class FusedQKV:
    """One matrix product for query, key and value instead of three; a technique. Source: diffusers' fuse_projections.

    The three layers are put aside while it is applied, so that nothing is held twice once it is built in.
    """

    name: str = "fused QKV"
    label: str = "fused QKV"
    settings: dict = field(default_factory=lambda: {"fused_qkv": True})
    proof: dict = field(default_factory=dict, init=False)

    _PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

    def apply(self, pipe):
        """Fuses; returns the function that puts the separate layers back."""
        import torch

        blocks = (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)
        aside = []
        for attention in (block.attn for block in blocks):
            attention.fuse_projections()
            aside += [(attention, n, getattr(attention, n)) for n in self._PARTS if hasattr(attention, n)]
        for attention, name, layer in aside:
            if layer is not None:
                setattr(attention, name, torch.nn.Identity())
        self.proof = {"fused": f"{len(blocks)} attention layers"}

        def undo():
            for attention, name, layer in aside:
                setattr(attention, name, layer)
            for attention in (block.attn for block in blocks):
                attention.unfuse_projections()

        return undo


@dataclass
class TensorRT:
    """The transformer as a TensorRT engine, through torch-tensorrt's backend of torch.compile; a technique."""

    name: str = "TensorRT"
    label: str = "TensorRT"
    settings: dict = field(default_factory=lambda: {"compile": "tensorrt"})
    proof: dict = field(default_factory=dict, init=False)

    def apply(self, pipe):
        """Builds the engine at the first call; returns the function that takes it back."""
        try:
            import torch_tensorrt  # noqa: F401
        except (ImportError, OSError) as error:
            raise Unavailable(
                "needs the package torch-tensorrt for this PyTorch, with TensorRT's libraries from NVIDIA "
                f"({(str(error).splitlines() or ['?'])[0]})"
            ) from error
        transformer = pipe.transformer
        if transformer.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU")
        transformer.compile(backend="torch_tensorrt")

        def undo():
            transformer._compiled_call_impl = None

        return undo


def _let_compile() -> None:
    import torch

    if not hasattr(torch, "compile"):
        raise Unavailable("needs a PyTorch with torch.compile")
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, COMPILED_VARIANTS)


def counters() -> dict[str, int]:
    """Graphs that Dynamo made, graph breaks, and compilations because an earlier graph didn't fit, so far."""
    import torch._dynamo.utils as dynamo

    return {
        "graphs": dynamo.counters["stats"]["unique_graphs"],
        "breaks": sum(dynamo.counters["graph_break"].values()),
        "recompiles": sum(bool(m.recompile_reason) for m in dynamo.get_compilation_metrics()),
    }


@contextlib.contextmanager
def fresh():
    """Nothing compiled before is found inside: neither in memory nor on the disk, where a new folder is used."""
    import torch
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    with fresh_cache():
        yield
    torch.compiler.reset()
