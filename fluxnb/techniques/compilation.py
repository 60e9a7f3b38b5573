"""torch.compile, CUDA graphs and TensorRT: the same arithmetic with fewer, larger kernels and no gaps."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from dataclasses import dataclass

from fluxnb import adapters
from fluxnb.families import COMPILATION, FUSION
from fluxnb.technique import (
    AHEAD,
    BLOCKS,
    CACHED,
    RECORDED,
    ROUNDING,
    Changes,
    Technique,
    Unavailable,
    attribute,
    check_parts,
    networks,
)
from fluxnb.techniques import layers

COMPILED_VARIANTS = 64  # of one block's code that a process may hold; PyTorch gives up at 8, a study has more


@dataclass
class Regional(Technique):
    """Compiles every block of transformer and ControlNet by itself, without graph breaks.

    All blocks of a kind share one graph: seconds instead of minutes, and what stands between them, say a cache, stays
    plain Python. Source: PyTorch's regional compilation recipe.

    Args:
        mode: torch.compile's; None for its default.
        breaks: graph breaks are allowed, for what stands inside the blocks.
    """

    family, exact, name = COMPILATION, ROUNDING, "torch.compile"

    mode: str | None = None
    breaks: bool = False

    @property
    def label(self) -> str:
        return "compiled blocks" + (f", {self.mode}" if self.mode else "") + ", graph breaks allowed" * self.breaks

    @property
    def settings(self) -> dict:
        return {"compile": "blocks"} | {k: v for k, v in (("mode", self.mode), ("breaks", self.breaks)) if v}

    def apply(self, pipe):
        """Compiles the blocks at their first call; returns the function that makes them eager again."""
        blocks = [block for network in networks(pipe) for block in layers.blocks(network)]
        with Changes(self.label) as changes:
            compile_each(blocks, changes, self.mode, not self.breaks)
            self.proof = {"compiled": f"{len(blocks)} blocks"}
        return changes.take_back


@dataclass
class TextEncoders(Technique):
    """Compiles every block of the text encoders by itself, or records each encoder in a CUDA graph.

    They run once for each image, in a thousand small kernels: eager, they wait for a slow host; recorded, they don't.
    Source: torch.compile and torch.cuda.CUDAGraph.

    Args:
        record: record the eager kernels instead of compiling, for each shape of token ids (`CudaGraph`).
    """

    family, exact = COMPILATION, ROUNDING
    part = adapters.TEXTS
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
        adapters.check(pipe.transformer, self.part)
        check_parts(pipe, ("text_encoder", "text_encoder_2"))
        encoders = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        self.proof = {}
        with Changes(self.label) as changes:
            if self.record:
                for name, encoder in encoders.items():
                    _check_recordable(encoder)
                    _record_calls(pipe, encoder, changes, self.proof, f"{name} recorded")
            else:
                blocks = [block for encoder in encoders.values() for block in _repeated(encoder)]
                compile_each(blocks, changes)
                self.proof["text encoders"] = f"{len(blocks)} blocks compiled"
        return changes.take_back


def _repeated(network) -> list:
    """The blocks that a network is a sequence of: the items of its outermost list of modules."""
    import torch

    lists = (module for module in network.modules() if isinstance(module, torch.nn.ModuleList))
    return list(next(lists, ()))


def compile_each(modules: list, changes: Changes, mode: str | None = None, fullgraph=True, **options) -> None:
    """Compiles modules at their first call, without graph breaks, in place of what may have been compiled before."""
    import torch

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, COMPILED_VARIANTS)
    for module in modules:
        compiled = torch.compile(module._call_impl, fullgraph=fullgraph, mode=mode, **options)
        changes.put(module, "_compiled_call_impl", compiled, yields=True)


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
        transformer = pipe.transformer
        if self.mode in ("reduce-overhead", "max-autotune") and transformer.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU: this mode of torch.compile is about CUDA graphs")
        _check_whole(transformer)
        with Changes(self.label) as changes:
            compile_each([transformer], changes, self.mode)
            changes.put(transformer, "_compiled_call_impl", _may_break(transformer, self.mode), yields=True)
            self.proof = {"compiled": "1 transformer"}
        return changes.take_back


def _may_break(transformer, mode: str | None):
    """The compiled transformer; with a LoRA in it, one whose graph may break: PyTorch 2.11's did, on a GPU."""
    import torch

    whole, broken = transformer._compiled_call_impl, torch.compile(transformer._call_impl, mode=mode)
    return lambda *args, **given: (broken if hasattr(transformer, "peft_config") else whole)(*args, **given)


def _check_whole(transformer) -> None:
    """Raises Unavailable if something decides between two steps or blocks, which one graph has no room for."""
    if hasattr(transformer, AHEAD):
        raise Unavailable("needs a transformer without ModulationAhead, which decides between two steps")
    if hasattr(transformer, CACHED):
        raise Unavailable("needs a transformer without a cache, which decides between blocks: compile those (Regional)")


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
        layers.check_whole(transformer)
        if transformer._compiled_call_impl is not None:
            raise Unavailable("needs the blocks compiled (Regional), not the transformer as a whole")
        if hasattr(transformer, AHEAD):
            raise Unavailable("needs to be put on before ModulationAhead, which acts between two replays")
        if self.blocks and len(networks(pipe)) > 1:
            raise Unavailable("needs a pipeline without ControlNet, whose residuals are added between the blocks")
        with Changes(self.label) as changes:
            if self.blocks:
                apart, chained = adapters.of(transformer).chain(transformer)
                recorded = _Recorded(chained, self.proof)
                recorded.follow(pipe, transformer, changes)
                changes.put(transformer, BLOCKS, (apart, [recorded]))
                changes.wrap(transformer, functools.partial(_with_blocks, transformer))
            else:
                _record_calls(pipe, transformer, changes, self.proof)
                changes.put(transformer, RECORDED, True)
        return changes.take_back


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
        self.lock = threading.RLock()  # two threads would write their inputs to the same memory

    def follow(self, pipe, network, changes: Changes) -> None:
        """What was recorded is dropped when the network's weights move or its LoRAs change, and in the end.

        A recording reads the weights where they were: a network that is copied, or offloaded layer by layer, says so.
        """
        copying = (
            f"A pipeline can't be copied or pickled while {changes.name} is on it, because the copy would replay the "
            "original's weights: take it off, copy, and put it on each."
        )
        changes.refuse(network, ("__reduce_ex__",), copying)
        layers.refuse_groups(pipe, changes)
        if isinstance(changes.lock, contextlib.nullcontext):
            changes.lock = self.lock  # type: ignore[assignment]
        self.lock = changes.lock  # type: ignore[assignment]
        changes.callback(self.graphs.clear)
        changes.moved(network, lambda function: self.graphs.clear())
        layers.watch_loras(pipe, network, changes, self.graphs.clear)

    def __call__(self, **given):
        import torch
        from torch.utils._pytree import tree_flatten, tree_map_only

        leaves, form = tree_flatten(dict(sorted(given.items())))
        key = (str(form), *(leaf.shape if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in leaves))
        with self.lock:
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


def _record_calls(pipe, network, changes: Changes, proof: dict, said: str = "recorded") -> None:
    """Records a network's calls and replays them."""

    def recording(original):
        recorded, names = _Recorded(original, proof, said), list(inspect.signature(original).parameters)
        recorded.follow(pipe, network, changes)

        @functools.wraps(original)
        def forward(*args, **given):
            return recorded(**dict(zip(names, args, strict=False)), **given)

        return forward

    changes.wrap(network, recording)


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
    graph = torch.cuda.CUDAGraph()
    # what other threads do, NCCL's or a second pipeline's, would count as a fault of the recording in the strict mode
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(**given)
    return graph.replay, inputs, outputs


def _with_blocks(transformer, original):
    """The transformer's forward with `BLOCKS` in place of its own, unless a cache has put them there already."""
    doubles, singles = getattr(transformer, BLOCKS)

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

    _PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}

    @property
    def label(self) -> str:
        return "fused QKV" if self.double else "fused QKV of single blocks"

    @property
    def settings(self) -> dict:
        return {"fused_qkv": True if self.double else "single"}

    def apply(self, pipe):
        """Fuses what isn't fused already; returns the function that puts the separate layers back."""
        transformer = pipe.transformer
        chosen = layers.blocks(transformer)[0 if self.double else len(transformer.transformer_blocks) :]
        attentions = [block.attn for block in chosen if block.attn._supports_qkv_fusion]
        if not attentions:  # FLUX.2's single blocks
            raise Unavailable("needs queries, keys and values apart, and these blocks have one product for all of them")
        apart = [attention for attention in attentions if not attention.fused_projections]
        separate = [getattr(a, name) for a in apart for part in _parts(a) for name in self._PARTS[part]]
        layers.check(separate)
        layers.check_groups([transformer] if apart else [])
        with Changes(self.label) as changes:
            if apart:
                layers.refuse_state([transformer], separate, changes)
            for attention in apart:
                _fuse(attention, changes)
            self.proof = {"fused": f"{len(apart)} attention layers"}
            if apart:
                layers.refuse_loras(pipe, changes)
                layers.refuse_sequential(pipe, changes)
                changes.refuse(
                    transformer,
                    ("fuse_qkv_projections", "unfuse_qkv_projections"),
                    f"The projections are fused by {self.label}: take that off to fuse or separate them yourself.",
                )
        return changes.take_back


def _parts(attention) -> list[str]:
    """Which fused layers an attention layer can have."""
    parts = FusedQKV._PARTS
    return [part for part in parts if getattr(attention, parts[part][0], None) is not None]


def _fuse(attention, changes: Changes) -> None:
    """Puts one layer in place of three, which get their weights back from it in the end: it may have been moved."""
    import torch

    for part in _parts(attention):
        names = FusedQKV._PARTS[part]
        apart = [getattr(attention, name) for name in names]
        with torch.inference_mode(False), torch.no_grad():
            fused = torch.nn.Linear(apart[0].in_features, 1, bias=apart[0].bias is not None, device="meta")
            for kind, one in apart[0].named_parameters():
                whole = torch.cat([getattr(layer, kind) for layer in apart])
                setattr(fused, kind, torch.nn.Parameter(whole, requires_grad=one.requires_grad))
            fused.out_features = len(fused.weight)
            saved = functools.partial(_save_apart, fused, names)
            fused._save_to_state_dict = saved  # type: ignore[method-assign]
            changes.callback(_give_back, fused, apart)
            _share(fused, apart)
        changes.check(functools.partial(_on_top_of, fused))
        changes.put(attention, part, fused.train(apart[0].training))
        for name in names:
            changes.put(attention, name, torch.nn.Identity())
    changes.put(attention, "fused_projections", True)


def _share(fused, apart: list, copy: bool = False) -> None:
    """Gives three layers their parts of a fused one's weights: views, so that nothing is held twice, or copies."""
    for kind, whole in fused.named_parameters():
        rows = [len(getattr(layer, kind)) for layer in apart]
        for layer, part in zip(apart, whole.data.split(rows), strict=True):
            getattr(layer, kind).data = part.clone() if copy else part


def _give_back(fused, apart: list) -> None:
    import torch

    with torch.inference_mode(False), torch.no_grad():
        _share(fused, apart, copy=True)


def _on_top_of(fused) -> str | None:
    if layers.plain(fused) and not layers.hooked(fused):
        return None
    return "what has quantized, offloaded or cast its layers since"


def _save_apart(fused, names: tuple[str, ...], destination: dict, prefix: str, keep_vars: bool) -> None:
    """Into a state dict as the layers that it stands for: what is saved meanwhile can be loaded."""
    above = prefix[: prefix.rfind(".", 0, -1) + 1]
    for kind, whole in fused.named_parameters():
        for name, rows in zip(names, whole.chunk(len(names)), strict=True):
            destination[f"{above}{name}.{kind}"] = rows if keep_vars else rows.detach().clone()


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
        if pipe.transformer.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU")
        _check_whole(pipe.transformer)
        with Changes(self.label) as changes:
            compile_each([pipe.transformer], changes, fullgraph=False, backend="torch_tensorrt")
        return changes.take_back


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
