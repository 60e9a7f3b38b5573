"""Named stacks: several techniques in the order in which they go on. Notebooks, ledger and users name the same ones.

Importing this imports no PyTorch: the techniques are made when a stack is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from fluxnb import techniques as t
from fluxnb.errors import UserError
from fluxnb.technique import Technique


@dataclass(frozen=True)
class Stack:
    """Techniques that are measured, recommended and put on together.

    Args:
        name: permanent: what rows, params, ledger and recipes call it.
        built: put into a pipeline of its own when it is loaded, in this order.
        above: put around every image, on top of these.
        label: what a reader sees; the name by default.
    """

    name: str
    built: tuple[Technique, ...] = ()
    above: tuple[Technique, ...] = ()
    label: str = ""

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """All of them, in the order in which they go on."""
        return (*self.built, *self.above)


Parts = Callable[..., tuple]
TERMS = {  # made-up words in the names of stacks
    "everything": "fused and compiled blocks, the VAE's rows divided and compiled, text encoders recorded, no search "
    "for hooks, bytes on the device",
    "phase": "one more technique on all that the phase before has",
}

# --- what is compiled how (notebook 03) ----------------------------------------------------------------------

COMPILED: dict[str, Parts] = {
    "blocks": lambda: (t.Regional(),),
    "fused QKV": lambda: (t.FusedQKV(), t.Regional()),
    "fused GELU": lambda: (t.FusedGELU(), t.Regional()),
    "fused RoPE": lambda: (t.FusedRoPE(), t.Regional()),
    "fused norm": lambda: (t.FusedGELU(), t.FusedNorm(), t.Regional()),
    "late scales": lambda: (t.FusedGELU(), t.LateScales(), t.Regional()),
    "modulation ahead": lambda: (t.Regional(), t.ModulationAhead()),
    "text encoders": lambda: (t.Regional(), t.TextEncoders()),
    "text encoders, CUDA graph": lambda: (t.Regional(), t.TextEncoders(record=True)),
    "CUDA graph": lambda: (t.Regional(), t.CudaGraph()),
    "all": lambda: (t.FusedGELU(), t.FusedRoPE(), t.Regional(), t.CudaGraph(), t.ModulationAhead()),
    "max-autotune": lambda: (t.Regional("max-autotune-no-cudagraphs"),),
    "transformer": lambda: (t.Whole(),),
    "transformer, CUDA graphs": lambda: (t.Whole("reduce-overhead"),),
    "transformer, max-autotune": lambda: (t.Whole("max-autotune-no-cudagraphs"),),
    "TensorRT": lambda: (t.TensorRT(),),
}


def compiled(name: str, quantization: str | None = None) -> Stack:
    """A way of compiling, on a quantized transformer where a torchao kind is given."""
    parts = _of(COMPILED, name)()
    if quantization is None:
        return Stack(name, parts)
    return Stack(f"{quantization}, {name}", ordered((t.TorchAO(quantization), *parts)))


# --- the final stack, phase by phase (notebook 13) -----------------------------------------------------------

QUANTIZED, VAE_COMPILED = "quantized", "+ VAE compiled"  # phases that published figures are compared with


def _blocks(kind: str) -> tuple:
    gelu = (t.FusedGELU(),) if kind == "fp8 row" else ()  # other formats have no kernel for it
    return (t.FusedQKV(), t.TorchAO(kind), *gelu, t.FusedRoPE(), t.Regional())


AROUND: dict[str, Parts] = {  # what is spared before and after the steps
    "hooks": lambda: (t.NoHookSearch(),),
    "bytes": lambda: (t.BytesOnDevice(),),
}
PHASES: dict[str, Parts] = {  # each with all that the one before has
    QUANTIZED: lambda kind: (t.TorchAO(kind),),
    "+ compiled blocks": lambda kind: (t.TorchAO(kind), t.Regional()),
    "+ fused QKV": lambda kind: (t.FusedQKV(), t.TorchAO(kind), t.Regional()),
    "+ fused GELU": lambda kind: (t.FusedQKV(), t.TorchAO(kind), t.FusedGELU(), t.Regional()),
    "+ fused RoPE": _blocks,
    VAE_COMPILED: lambda kind: (*_blocks(kind), t.Compiled()),
    "+ modulation ahead": lambda kind: (*_blocks(kind), t.Compiled(), t.ModulationAhead()),
    "+ CUDA graph": lambda kind: (*_blocks(kind), t.Compiled(), t.CudaGraph(), t.ModulationAhead()),
    "+ text encoders in a CUDA graph": lambda kind: (
        *_blocks(kind), t.Compiled(), t.CudaGraph(), t.TextEncoders(record=True), t.ModulationAhead(),
    ),
}  # fmt: skip


def phases(kind: str, around: list[str]) -> list[Stack]:
    """The final stack, phase by phase: a torchao kind, then one technique more each.

    Args:
        around: keys of `AROUND`, put around every image after the last phase.
    """
    found = [spelled(name, parts(kind)) for name, parts in PHASES.items()]
    above: tuple = ()
    for part in around:
        above += (technique := _of(AROUND, part)())
        found.append(spelled(f"+ {technique[0].label}", found[len(PHASES) - 1].built, above))
    return found


def spelled(name: str, built: tuple, above: tuple = (), before: str = "") -> Stack:
    """A stack whose label leaves none of its techniques out."""
    return Stack(name, built, above, before + ", ".join(part.label for part in (*built, *above)))


def cache(steps: int, computed: int):
    """The stack's cache: six computed steps, then every n-th and the last, about `computed` in all. It doesn't look.

    Of eight steps or fewer, where six leave nothing to reuse, it computes the first, every second and the last.
    """
    from fluxnb.cache import Cache, Interval, Taylor

    warm_up = 6 if steps > 8 else 1
    every = max(2, -(-(steps - 6) // max(1, computed - 6)))
    return Cache(Interval(every, warm_up=warm_up, compute_last=True), Taylor(2))


def caches(steps: int, computed: Iterable[int]) -> list:
    """The stack's cache for several counts of computed steps; what comes to the same rule once."""
    found = {made.gate.every: made for made in (cache(steps, count) for count in computed)}
    return list(found.values())


def planned(model: str, steps: int, computed: Iterable[int]) -> list:
    """Planned caches that compute so many steps: those of a model's plans, by name or folder.

    A model without any, as one of random weights, gets the embedded model's masks and Taylor 2: weights are one model's
    own, masks are tried on others. None of another number of steps than plans are of.
    """
    from fluxnb.cache import Cache, Schedule, Taylor, planning
    from fluxnb.models import embedded

    def plans(of: str) -> list[planning.Plan]:
        with suppress(UserError):  # there are none, or none of as many steps
            known = planning.of(of, steps)
            return [known[n] for n in computed if n in known]
        return []

    own = [plan.cache() for plan in plans(model)]
    masks = [] if own else [plan.mask for plan in plans(embedded.NAME)]
    return own + [Cache(Schedule(mask, first_block=False, origin="planned mask"), Taylor(2)) for mask in masks]


CACHED, CACHED_RECORDED = "quantized stack and cache", "quantized stack and cache, CUDA graph of the blocks"


def cached(kind: str, around: list[str], steps: int, computed: int) -> list[Stack]:
    """The quantized stack under its cache: blocks set off by the host, and recorded in a CUDA graph of their own."""
    above = (*(part for name in around for part in _of(AROUND, name)()), cache(steps, computed))
    blocks = (*_blocks(kind), t.Compiled())
    graphs = (t.CudaGraph(blocks=True), t.TextEncoders(record=True))
    return [
        spelled(CACHED, (*blocks, t.ModulationAhead()), above),
        spelled(CACHED_RECORDED, (*blocks, *graphs, t.ModulationAhead()), above),
    ]


# --- without quantization, and the plan's advanced configurations (notebook 13) ------------------------------

BF16_COMPILED, BF16_STACK = "BF16 compiled", "BF16 stack"
FLASH_TEACACHE, FLASH_FIRST_BLOCK = "BF16+FA2+TeaCache (0.6)", "BF16+FA2+FBCache (0.3)"
FLASH_TEACACHE_FP8, FLASH_TEACACHE_INT8 = f"{FLASH_TEACACHE}+TorchAO FP8", f"{FLASH_TEACACHE}+TorchAO INT8"
FLASH_FIRST_BLOCK_FP8 = f"{FLASH_FIRST_BLOCK}+TorchAO FP8"
FLASH_FIRST_BLOCK_INT8 = f"{FLASH_FIRST_BLOCK}+TorchAO INT8"


def advanced(steps: int, around: list[str], teacache_share: float, first_block_share: float) -> list[Stack]:
    """BF16 compiled, the whole stack without quantization, and the plan's advanced configurations.

    Random weights decide nothing: the caches replay as many computed steps, evenly, as the published shares of time at
    their thresholds leave room for, and their labels say so.
    """
    from fluxnb.cache import even_mask, prescribed

    def replayed(share: float, first_block: bool):
        return prescribed(even_mask(max(1, round(share * steps)), steps), "as published", first_block)

    tea, first = replayed(teacache_share, False), replayed(first_block_share, True)
    flash = t.Attention("flash")
    fp8, int8 = ((flash, t.TorchAO(kind), t.Regional()) for kind in ("fp8 row", "int8"))
    return [
        spelled(BF16_COMPILED, (t.Regional(),)),
        _whole(around),
        *(
            spelled(name, built, (above,), f"{name}: ")
            for name, built, above in (
                (FLASH_TEACACHE, (flash,), tea),
                (FLASH_FIRST_BLOCK, (flash,), first),
                (FLASH_TEACACHE_FP8, fp8, tea),
                (FLASH_FIRST_BLOCK_FP8, fp8, first),
                (FLASH_TEACACHE_INT8, int8, tea),
                (FLASH_FIRST_BLOCK_INT8, int8, first),
            )
        ),
    ]


def _whole(around: list[str]) -> Stack:
    after = tuple(part for name in around for part in _of(AROUND, name)())
    parts = (
        t.FusedQKV(), t.FusedGELU(), t.FusedRoPE(), t.Regional(), t.Compiled(), t.CudaGraph(),
        t.TextEncoders(record=True), t.ModulationAhead(), *after,
    )  # fmt: skip
    return spelled(BF16_STACK, parts)


# --- the shortlist that recommendations are computed from (notebook 13) ---------------------------------------

LEAN: dict[str, Parts] = {  # nothing but what has shown a gain by itself
    "BF16, lean": lambda: (t.FusedGELU(), t.FusedRoPE(), t.Regional(), t.Compiled()),
    "FP8, lean": lambda: (t.TorchAO("fp8 row"), t.FusedGELU(), t.FusedRoPE(), t.Regional(), t.Compiled()),
    "INT8 weight-only, lean": lambda: (t.TorchAO("int8 weight-only"), t.FusedRoPE(), t.Regional(), t.Compiled()),
    "BF16, FlashAttention 3, lean": lambda: (
        t.Attention("flash 3"), t.FusedGELU(), t.FusedRoPE(), t.Regional(), t.Compiled(),
    ),
    "FP8, FP8 attention, lean": lambda: (
        t.TorchAO("fp8 row"), t.FusedGELU(), t.FP8Attention(), t.Regional(), t.Compiled(),
    ),
}  # fmt: skip


def _fewest(positions: Technique, attention: tuple = ()) -> tuple:
    """FP8 with as few passes, products and launches as there can be."""
    blocks = (*attention, t.FusedQKV(), t.TorchAO("fp8 row"), t.FusedGELU(), t.LateScales(), t.FusedNorm(), positions)
    graphs = (t.CudaGraph(blocks=True), t.TextEncoders(record=True), t.ModulationAhead())
    return (*blocks, t.Regional(), t.Compiled(), *graphs, t.NoHookSearch(), t.BytesOnDevice())


FEWEST: dict[str, Parts] = {
    "FP8, FlashAttention 3, fewest passes": lambda: _fewest(t.FusedRoPE(), (t.Attention("flash 3"),)),
    "FP8, FP8 attention, fewest passes": lambda: _fewest(t.FP8Attention()),
}
AS_PUBLISHED: dict[str, Parts] = {  # what torchao's own figures are of, no more and no less
    BF16_COMPILED: lambda: (t.Regional(),),
    "fp8dqrow, fused QKV, compiled": lambda: (t.FusedQKV(), t.TorchAO("fp8 row"), t.Regional(), t.Compiled()),
    "int8dq, fused QKV, compiled": lambda: (t.FusedQKV(), t.TorchAO("int8"), t.Regional()),
}
SHORTLIST = (*LEAN, BF16_STACK, CACHED_RECORDED, *AS_PUBLISHED, *FEWEST)


def shortlist(
    names: list[str], kind: str, around: list[str], steps: int, computed: list[int], gentler: Iterable[str] = (),
    planned: Iterable = (),
) -> list[Stack]:  # fmt: skip
    """Stacks by name, the lean ones and those of fewest passes also under the stack's cache.

    Args:
        kind, around: of those that have everything, as in `cached`.
        computed: steps of the cache; the first is that of all stacks.
        gentler: lean stacks that get the others, too, and planned caches.
    """
    known = {stack.name: [stack] for stack in (*cached(kind, around, steps, computed[0]), _whole(around))}
    known |= {name: [spelled(name, parts())] for name, parts in AS_PUBLISHED.items()}
    for name, parts in (LEAN | FEWEST).items():
        above = caches(steps, computed if name in gentler else computed[:1])
        known[name] = [spelled(name, parts())]
        for one in above:  # the first that there was has no number in its name
            number = "" if one.gate.every == 4 else f", every {one.gate.every}"
            known[name].append(spelled(f"{name}, cached{number}", parts(), (one,)))
        for one in planned if name in gentler else ():
            known[name].append(spelled(f"{name}, planned {one.gate.mark}", parts(), (one,)))
    return [stack for name in names for stack in _of(known, name)]


# --- use cases at full size (notebook 10) ---------------------------------------------------------------------

CASE_COMPILED, CASE_CACHED = "compiled", "quantized, compiled and cached"


def of_use_case(kinds: list[str], schedule: Technique, compiled: bool = True) -> list[Stack]:
    """What a use case is measured with: compiled blocks and VAE, quantized as well, the first under a schedule on top.

    Args:
        kinds: torchao's.
        compiled: False leaves blocks and VAE as they are: compiling takes minutes on a CPU.
    """
    blocks: tuple[Technique, ...] = (t.Regional(), t.Compiled()) if compiled else ()
    found: list[tuple[str, tuple[Technique, ...], tuple[Technique, ...]]]
    found = [(CASE_COMPILED, blocks, ())] if compiled else []
    found += [(", ".join([kind, CASE_COMPILED][: 1 + compiled]), (t.TorchAO(kind), *blocks), ()) for kind in kinds]
    found += [(CASE_CACHED, (t.TorchAO(kind), *blocks), (schedule,)) for kind in kinds[:1]]
    return [
        Stack(name, built, above, f"{name}: {', '.join(part.label for part in (*built, *above))}")
        for name, built, above in found
    ]


# --- several GPUs (notebook 11) -------------------------------------------------------------------------------

REPLICAS, ALL_GATHER, ULYSSES, PULLED, BOTH = "replicas", "all-gather", "Ulysses", "pulled", "both"
DIFFUSERS_ULYSSES, DIFFUSERS_RING = "diffusers Ulysses", "diffusers ring"
XDIT_ULYSSES, XDIT_RING = "xDiT Ulysses", "xDiT ring"
FSDP, PIPEFUSION, PARALLEL_VAE = "FSDP", "PipeFusion", "parallel VAE"
WAYS: dict[str, Callable[[int], Technique]] = {  # of dividing one image over so many GPUs
    REPLICAS: lambda world: t.Replicas(),
    ALL_GATHER: lambda world: t.ContextParallel(gather=world),
    ULYSSES: lambda world: t.ContextParallel(ulysses=world),
    PULLED: lambda world: t.ContextParallel(gather=world, pull=True),
    BOTH: lambda world: t.ContextParallel(ulysses=_pairs(world), gather=world // _pairs(world)),
    PARALLEL_VAE: lambda world: t.ParallelVAE(),
    DIFFUSERS_ULYSSES: lambda world: t.DiffusersParallel(ulysses=world),
    DIFFUSERS_RING: lambda world: t.DiffusersParallel(ring=world),
    XDIT_ULYSSES: lambda world: t.XDiT(ulysses=world),
    XDIT_RING: lambda world: t.XDiT(ring=world),
    FSDP: lambda world: t.FullyShard(),
    PIPEFUSION: lambda world: t.PipeFusion(world),
}
FOR_GOOD = (FSDP, PIPEFUSION)  # what can't be taken off again has a pipeline of its own
SET_OFF = (ALL_GATHER, ULYSSES, PULLED, BOTH)  # the study's own ways by themselves: the host sets off every kernel


def _pairs(world: int) -> int:
    return next((n for n in (2, 4) if 1 < n < world and world % n == 0), world)


def ways(names: list[str], world: int) -> list[str]:
    """Those of the names that so many GPUs can have: heads and tokens are exchanged both from four on."""
    return [name for name in names if name != BOTH or 1 < _pairs(world) < world]


def way(name: str, world: int) -> Stack:
    """A way of dividing by itself, on the pipeline as it is."""
    technique = _of(WAYS, name)(world)
    return (
        Stack(name, (technique,), label=technique.label)
        if name in FOR_GOOD
        else Stack(name, above=(technique,), label=technique.label)
    )


def way_at_full_size(name: str, world: int, overlap: bool = True) -> Stack:
    """A way of dividing with what it can have beside it: the study's with fused and compiled blocks."""
    technique = _of(WAYS, name)(world)
    if name in FOR_GOOD:
        return way(name, world)
    if name in (DIFFUSERS_ULYSSES, DIFFUSERS_RING):  # what diffusers' own ring can run on
        return Stack(name, (t.Attention("cudnn"), t.Regional()), (technique,), technique.label)
    if name in (XDIT_ULYSSES, XDIT_RING):  # xDiT chooses its kernel
        return Stack(name, (t.Regional(),), (technique,), technique.label)
    blocks = (t.FusedQKV(), t.FusedGELU(), t.FusedRoPE(), t.Regional())
    if not overlap:
        from dataclasses import replace

        technique = replace(technique, overlap=False)
        name = f"{name}, without overlap"
    return Stack(name, blocks, (technique, t.ModulationAhead()), technique.label)


def at_full_size(
    ways_: list[str], more: list[str], world: int, kind: str, schedule: Technique | None = None
) -> list[Stack]:
    """Everything that is measured at full size: what has the same built in stands together, so it is loaded once.

    Args:
        ways_: names of `WAYS`; the study's all-gather and Ulysses also without overlap.
        more: names of `DIVIDED`, for a torchao kind and under a schedule.
    """
    names = ways(ways_, world)
    found = [way_at_full_size(name, world) for name in names]
    found += [way_at_full_size(name, world, overlap=False) for name in (ALL_GATHER, ULYSSES) if name in names]
    found += [stack for name in more for stack in divided(name, world, kind, schedule)]
    built = [[(one.name, one.settings) for one in stack.built] for stack in found]
    return [found[i] for i in sorted(range(len(found)), key=lambda i: built.index(built[i]))]


def _divided_blocks() -> tuple:
    return (t.FusedGELU(), t.FusedRoPE(), t.Regional())


def _everything() -> tuple:
    return (
        *_divided_blocks(),
        t.ParallelVAE(),
        t.Compiled(),
        t.TextEncoders(record=True),
        t.NoHookSearch(),
        t.BytesOnDevice(),
    )


def _divided_quantized(kind: str) -> tuple:
    return (t.FusedQKV(), t.TorchAO(kind), *_divided_blocks(), t.Compiled())


def _apart() -> tuple:
    return (t.FusedQKV(double=False),)  # keys and values go ahead of the queries


ULYSSES_RECORDED = f"{ULYSSES}, CUDA graph"
DIVIDED: dict[str, tuple[str, Parts]] = {  # the way, and what is built in with it for a torchao kind
    "all-gather, quantized": (ALL_GATHER, _divided_quantized),
    ULYSSES_RECORDED: (ULYSSES, lambda kind: (t.FusedQKV(), *_divided_blocks())),
    "Ulysses, quantized": (ULYSSES, _divided_quantized),
    "pulled, CUDA graph": (PULLED, lambda kind: (t.FusedQKV(), *_divided_blocks())),
    "pulled, quantized": (PULLED, _divided_quantized),
    "pulled, queries apart": (PULLED, lambda kind: (*_apart(), *_divided_blocks())),
    "pulled, queries apart, parallel VAE": (
        PULLED, lambda kind: (*_apart(), *_divided_blocks(), t.ParallelVAE(), t.Compiled()),
    ),
    "pulled, quantized, queries apart, parallel VAE": (
        PULLED, lambda kind: (*_apart(), t.TorchAO(kind), *_divided_blocks(), t.ParallelVAE(), t.Compiled()),
    ),
    "pulled, everything": (PULLED, lambda kind: (*_apart(), *_everything())),
    "pulled, quantized, everything": (PULLED, lambda kind: (*_apart(), t.TorchAO(kind), *_everything())),
}  # fmt: skip


def recorded(quantized: bool, cached: bool = False) -> tuple[str, ...]:
    """Names of the ways of dividing whose kernels are recorded, with or without quantization and a schedule."""
    names = (name for name, (by, _) in DIVIDED.items() if by != ALL_GATHER and ("quantized" in name) == quantized)
    return tuple(f"{name}, cached" if cached else name for name in names)


def divided(name: str, world: int, kind: str, schedule: Technique | None = None) -> list[Stack]:
    """A way of dividing with what else is put into it; a quantized one also under a schedule, if one is given.

    All but all-gather's kernels, which the host sets off, are recorded in a CUDA graph of the blocks.
    """
    by, parts = _of(DIVIDED, name)
    technique, built = WAYS[by](world), parts(kind)
    label = f"{technique.label}{name.removeprefix(by)}".replace("quantized", kind)
    if by == ALL_GATHER:
        return [Stack(name, built, (technique, t.ModulationAhead()), label)]
    built = (*built, technique, t.CudaGraph(blocks=True), t.ModulationAhead())
    label = label if "CUDA graph" in label else f"{label}, CUDA graph"
    found = [Stack(name, built, (), label)]
    if schedule is not None and "quantized" in name:
        found.append(Stack(f"{name}, cached", built, (schedule,), f"{label}, {schedule.label}"))
    return found


# --- the order in which techniques go on ------------------------------------------------------------------------

# Classes. Weights are joined before they are quantized, fused operations look at the format, what is compiled is done
# changing, kernels are recorded as they were compiled; a cache, which skips blocks, is on top.
_order = (
    "DPMSolver", "Attention", "FusedQKV",
    "TorchAO", "SparseInt8", "BitsAndBytes", "GGUF", "Quanto", "SimulatedSVDQuant", "Nunchaku",
    "FusedGELU", "LateScales", "FusedNorm", "FusedRoPE", "FP8Attention", "Regional", "Whole", "TensorRT",
    "ParallelVAE", "Tiled", "Sliced", "ChannelsLast", "Compiled",
    "Replicas", "ContextParallel", "DiffusersParallel", "XDiT", "PipeFusion", "FullyShard",
    "CudaGraph", "TextEncoders", "ModulationAhead", "NoHookSearch", "BytesOnDevice", "ParaAttention", "Cache",
    "Progressive",
)  # fmt: skip


def ordered(parts: Iterable[Technique]) -> tuple[Technique, ...]:
    """The techniques in the order in which they go on; what the order doesn't know comes last."""
    place = {name: i for i, name in enumerate(_order)}
    return tuple(sorted(parts, key=lambda part: place.get(type(part).__name__, len(place))))


def _of(table: dict, name: str):
    if name not in table:
        raise UserError(f"There is no stack {name!r}: choose one of {', '.join(table)}.")
    return table[name]
