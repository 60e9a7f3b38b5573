"""torch.compile, CUDA graphs and TensorRT: the same arithmetic with fewer, larger kernels and no gaps."""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass

from fluxnb.families import COMPILATION, FUSION
from fluxnb.technique import AHEAD, BLOCKS, RECORDED, ROUNDING, Technique, Unavailable, attribute, networks

COMPILED_VARIANTS = 64  # of one block's code that a process may hold; PyTorch gives up at 8, a study has more


@dataclass
class Regional(Technique):
    """Compiles every block of transformer and ControlNet by itself, without graph breaks.

    All blocks of a kind share one compiled graph, so it takes seconds instead of minutes, and whatever stands
    between the blocks (a cache, say) stays plain Python. Source: PyTorch's regional compilation recipe.

    Args:
        mode: torch.compile's; None for its default.
    """

    family, exact = COMPILATION, ROUNDING
    name = "torch.compile"

    mode: str | None = None

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
        self.proof = {"compiled": f"{len(blocks)} blocks"}
        return _compile(blocks, self.mode)


@dataclass
class TextEncoders(Technique):
    """Compiles every block of the text encoders by itself, or records each encoder in a CUDA graph.

    They run once for each image, in a thousand small kernels: eager, they wait for a slow host; recorded, they don't.
    Source: torch.compile and torch.cuda.CUDAGraph.

    Args:
        record: record the eager kernels instead of compiling, for each shape of token ids (`CudaGraph`).
    """

    family, exact = COMPILATION, ROUNDING
    term = "text encoders compiled or recorded"

    record: bool = False

    @property
    def name(self) -> str:
        return "text encoders, CUDA graph" if self.record else "text encoders compiled"

    label = name

    @property
    def settings(self) -> dict:
        return {"text": "CUDA graph" if self.record else "compiled"}

    def apply(self, pipe):
        """Compiles or records at the first call; returns the function that makes them eager again."""
        encoders = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        self.proof = {}
        if self.record:
            with contextlib.ExitStack() as stack:
                for name, encoder in encoders.items():
                    self._record(name, encoder, stack)
                return stack.pop_all().close
        _let_compile()
        blocks = [block for encoder in encoders.values() for block in _repeated(encoder)]
        self.proof = {"text encoders": f"{len(blocks)} blocks compiled"}
        return _compile(blocks)

    def _record(self, name, encoder, stack) -> None:
        _check_recordable(encoder)
        original = encoder.forward
        names = list(inspect.signature(original).parameters)
        recorded = _Recorded(original, self.proof, f"{name} recorded")

        @functools.wraps(original)
        def forward(*args, **given):
            return recorded(**dict(zip(names, args, strict=False)), **given)

        stack.callback(recorded.graphs.clear)
        stack.enter_context(attribute(encoder, "forward", forward))


def _repeated(network) -> list:
    """The blocks that a network is a sequence of: the items of its outermost list of modules."""
    import torch

    lists = (module for module in network.modules() if isinstance(module, torch.nn.ModuleList))
    return list(next(lists, ()))


def _compile(blocks: list, mode: str | None = None):
    """Compiles modules at their first call, without graph breaks; returns the function that makes them eager again."""
    for block in blocks:
        block.compile(fullgraph=True, mode=mode)

    def undo():
        for block in blocks:
            block._compiled_call_impl = None

    return undo


@dataclass
class Whole(Technique):
    """Compiles the transformer as one graph: slower to compile, and no cache can go in between. Source: torch.compile.

    Args:
        mode: torch.compile's; `reduce-overhead` is Inductor's own use of CUDA graphs.
    """

    family, exact = COMPILATION, ROUNDING
    name = "torch.compile"

    mode: str | None = None

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
class CudaGraph(Technique):
    """Records the transformer's kernels of one step and replays them: no launch gaps.

    One graph for each shape of inputs, recorded when the shape is first seen, whatever is inside: eager or compiled
    blocks, quantized or not. Source: torch.cuda.CUDAGraph.

    Args:
        blocks: record what comes after the first block instead of the whole step. A cache, which decides before or
            after the first block, can then go on top; what decides inside what is recorded can't.
    """

    family, exact = COMPILATION, ROUNDING
    name = "CUDA graph"

    blocks: bool = False

    @property
    def label(self) -> str:
        return "CUDA graph of the blocks" if self.blocks else "CUDA graph"

    @property
    def settings(self) -> dict:
        return {"cuda_graph": "blocks" if self.blocks else True}

    def apply(self, pipe):
        """Records at the first call; returns the function that takes it back and frees the graphs."""
        transformer, self.proof = pipe.transformer, {}
        _check_recordable(transformer)
        if transformer._compiled_call_impl is not None:
            raise Unavailable("needs the blocks compiled (Regional), not the transformer as a whole")
        if hasattr(transformer, AHEAD):
            raise Unavailable("needs to be put on before ModulationAhead, which acts between two replays")
        if self.blocks and len(networks(pipe)) > 1:
            raise Unavailable("needs a pipeline without ControlNet, whose residuals are added between the blocks")
        with contextlib.ExitStack() as stack:
            recorded = (self._record_blocks if self.blocks else self._record_steps)(transformer, stack)
            stack.callback(recorded.graphs.clear)
            return stack.pop_all().close

    def _record_steps(self, transformer, stack) -> _Recorded:
        recorded = _Recorded(transformer.forward, self.proof)
        stack.enter_context(attribute(transformer, "forward", functools.wraps(transformer.forward)(recorded)))
        stack.enter_context(attribute(transformer, RECORDED, True))
        return recorded

    def _record_blocks(self, transformer, stack) -> _Recorded:
        first, *others = transformer.transformer_blocks
        recorded = _Recorded(_chain([*others, *transformer.single_transformer_blocks]), self.proof)
        stack.enter_context(attribute(transformer, BLOCKS, ([first], [recorded])))
        stack.enter_context(attribute(transformer, "forward", _with_blocks(transformer)))
        return recorded


def _check_recordable(transformer) -> None:
    if transformer.device.type != "cuda":
        raise Unavailable("needs a CUDA GPU: CUDA graphs are recordings of its kernels")


class _Recorded:
    """A function of keywords, its kernels recorded for each shape of its arguments and replayed.

    What it gives is a copy: the next replay writes to the same memory.
    """

    def __init__(self, function, proof: dict, said: str = "recorded"):
        self.function, self.proof, self.said = function, proof, said
        self.graphs: dict[tuple, tuple] = {}

    def __call__(self, **given):
        import torch
        from torch.utils._pytree import tree_flatten, tree_map_only

        leaves, form = tree_flatten(dict(sorted(given.items())))
        key = (str(form), *(leaf.shape if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in leaves))
        if key not in self.graphs:
            self.graphs[key] = _record(self.function, leaves, form)
            count = len(self.graphs)
            self.proof[self.said] = f"{count} graph{'s' * (count > 1)}"
        replay, inputs, outputs = self.graphs[key]
        for own, leaf in zip(inputs, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                own.copy_(leaf)
        replay()
        return tree_map_only(torch.Tensor, torch.clone, outputs)


def _record(function, leaves: list, form) -> tuple:
    """(replay, inputs, outputs): the kernels of a function of these arguments, and the memory that they work on."""
    import torch
    from torch.utils._pytree import tree_unflatten

    inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    given = tree_unflatten(inputs, form)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles and settles what may not be recorded
            function(**given)
    torch.cuda.current_stream().wait_stream(side)
    # NCCL's own thread may look at what it did before, which the strict mode takes for a fault of the recording
    mode = "thread_local" if torch.distributed.is_initialized() else "global"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        outputs = function(**given)
    return graph.replay, inputs, outputs


def _chain(blocks: list):
    """The blocks one after the other as a single one."""

    def run(hidden_states, encoder_hidden_states, **rest):
        for block in blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **rest
            )
        return encoder_hidden_states, hidden_states

    return run


def _with_blocks(transformer):
    """The transformer's forward with `BLOCKS` in place of its own, unless a cache has put them there already."""
    original, (doubles, singles) = transformer.forward, getattr(transformer, BLOCKS)

    @functools.wraps(original)
    def forward(*args, **given):
        if "transformer_blocks" in vars(transformer):
            return original(*args, **given)
        with (
            attribute(transformer, "transformer_blocks", doubles),
            attribute(transformer, "single_transformer_blocks", singles),
        ):
            return original(*args, **given)

    return forward


@dataclass
class FusedQKV(Technique):
    """One matrix product for query, key and value instead of three. Source: diffusers' fuse_projections.

    The three layers are put aside while it is applied, so that nothing is held twice once it is built in.

    Args:
        double: in the blocks of two streams, too. Where their tokens are divided over GPUs it may pay not to: keys and
            values are on their way while queries are computed. The blocks of one stream have their feed-forward part
            for that.
    """

    family, exact = FUSION, ROUNDING
    name = "fused QKV"
    terms = {"queries apart": "QKV fused in single blocks only, so that keys and values go ahead of the queries"}

    double: bool = True

    _PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

    @property
    def label(self) -> str:
        return "fused QKV" if self.double else "fused QKV of single blocks"

    @property
    def settings(self) -> dict:
        return {"fused_qkv": True if self.double else "single"}

    def apply(self, pipe):
        """Fuses; returns the function that puts the separate layers back."""
        import torch

        double = pipe.transformer.transformer_blocks if self.double else ()
        blocks = (*double, *pipe.transformer.single_transformer_blocks)
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
class TensorRT(Technique):
    """The transformer as a TensorRT engine, through a backend of torch.compile. Source: torch-tensorrt."""

    family, exact = COMPILATION, ROUNDING
    name = label = "TensorRT"
    settings = {"compile": "tensorrt"}

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
