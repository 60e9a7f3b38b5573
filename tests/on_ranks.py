"""What tests run on ranks: functions that `fluxnb.measure.ranks` finds by name."""

import contextlib
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from ending_ranks import everywhere

from fluxnb.cache import Cache, FirstBlock
from fluxnb.cache.gates import base as gates
from fluxnb.errors import UserError
from fluxnb.measure.ranks import Rank
from fluxnb.models import pipelines
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques import compilation, fused, modulation, symmetric, vae
from fluxnb.techniques.parallel import ContextParallel, FullyShard
from fluxnb.techniques.parallel_vae import ParallelVAE

MODEL = pipelines.describe("embedded")


def latents(pipe, steps=4):
    return pipelines.generate(pipe, ["a red ball"], [1], model=MODEL, steps=steps, output_type="latent")


@dataclass(frozen=True)
class Named(Rank):
    """A rank whose results carry the name of the function that they come from."""

    name: str = ""

    def emit(self, result):
        super().emit({self.name: result})


def in_turn(rank, calls):
    """Functions of this module by name, with their arguments, one after the other: starting ranks takes long."""
    for name, arguments in calls.items():
        globals()[name](Named(**vars(rank), name=name), *arguments)
        torch.compiler.reset()


@contextlib.contextmanager
def own_changes():
    """What each rank's own tokens say whenever all ranks are asked together, in the order of asking."""
    shared, own = gates.read, []

    def reading(measured, group=None):
        if group is not None:
            own.extend(shared(measured))
        return shared(measured, group)

    gates.read = reading
    try:
        yield own
    finally:
        gates.read = shared


def same_decisions(rank, caches, steps):
    """For each cache: its mask on every rank, the mask of one rank alone, and the difference of the latents.

    And for a First Block Cache with a threshold between what the ranks' own tokens say of the first step that could be
    reused: `own` has what each would decide by itself.
    """
    pipe, spread = pipelines.load("embedded", device="cpu"), ContextParallel(gather=rank.world)
    with own_changes() as own, applied(pipe, spread, Cache(FirstBlock(1e-6))):
        latents(pipe, steps)
    first = everywhere(next(change for change in own if change is not None))
    disputed = Cache(FirstBlock((min(first) + max(first)) / 2))
    for cache in [*caches, disputed]:
        with applied(pipe, cache):
            plain, alone = latents(pipe, steps), cache.trace.mask
        with applied(pipe, spread, cache):
            difference = (latents(pipe, steps) - plain).abs().max().item()
        said = {"label": cache.label, "masks": everywhere(cache.trace.mask), "alone": alone, "difference": difference}
        rank.emit(said | ({"own": [change < cache.gate.threshold for change in first]} if cache is disputed else {}))


def composed(rank):
    """Differences of what is put on top of each other."""
    pipe = pipelines.load("embedded", device="cpu")
    plain, spread = latents(pipe), ContextParallel(gather=rank.world)
    with applied(pipe, compilation.FusedQKV(), fused.FusedRoPE(), spread, modulation.ModulationAhead()):
        rank.emit({"label": "fused", "difference": (latents(pipe) - plain).abs().max().item()})
    FullyShard().apply(pipe)
    rank.emit({"label": "sharded weights", "difference": (latents(pipe) - plain).abs().max().item()})


def tiny_pipe(heads=4):
    """A random transformer and inputs for it; the embedded model's five heads can't be divided."""
    from types import SimpleNamespace

    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    given = {
        "hidden_states": torch.randn(2, 32, 8),
        "encoder_hidden_states": torch.randn(2, 16, 24),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.randn(32, 3),
        "txt_ids": torch.zeros(16, 3),
    }
    return SimpleNamespace(transformer=transformer), given


class GlooBoard:
    """A symmetric.Board on a CPU, where there is no peer's memory: the same places filled by a collective."""

    def __init__(self, like, group):
        self.group, self.world = group, dist.get_world_size(group)
        self.full = torch.empty(2, self.world, *like.shape, dtype=like.dtype)

    def begin(self, key, value):
        self.full.fill_(torch.nan)  # of the layer before
        parts = zip(self.full, (key, value), strict=True)
        self.works = [dist.all_gather(list(f), x.contiguous(), self.group, async_op=True) for f, x in parts]

    def end(self):
        for work in self.works:
            work.wait()
        return tuple(part.transpose(0, 1).flatten(1, 2) for part in self.full)


@contextlib.contextmanager
def without_peers():
    before = symmetric.Board, symmetric.check
    symmetric.Board, symmetric.check = GlooBoard, lambda group: None
    try:
        yield
    finally:
        symmetric.Board, symmetric.check = before


@without_peers()
@torch.no_grad()
def divided(rank, ways):
    """For each way of dividing: the difference to one rank, while it lasts and afterwards."""
    pipe, given = tiny_pipe()
    plain = pipe.transformer(**given).sample
    for way in ways:
        with applied(pipe, way):
            difference = (pipe.transformer(**given).sample - plain).abs().max().item()
        after = torch.equal(pipe.transformer(**given).sample, plain)
        rank.emit({"label": way.label, "difference": difference, "after": after, **way.proof})


def pulls_on_a_cpu(rank):
    pipe, _ = tiny_pipe()
    said = {}
    try:
        ContextParallel(gather=2, pull=True).apply(pipe)
    except Unavailable as reason:
        said["unavailable"] = str(reason)
    try:
        ContextParallel(ulysses=2, pull=True).apply(pipe)
    except UserError as error:
        said["both"] = str(error)[-len("give `gather` alone with it.") :]
    rank.emit(said)


@without_peers()
@torch.no_grad()
def order_of_the_blocks(rank, ways):
    """For each way: in the code compiled for a block, what comes when: `sends`, `waits` and the products in between.

    And the difference to one rank without compilation, also afterwards, and graph breaks.

    A block of two streams has separate layers, so its products are all of one size; a single block's feed-forward part
    has another.
    """
    from torch._inductor.utils import run_and_get_code

    pipe, given = tiny_pipe()
    width = pipe.transformer.transformer_blocks[0].ff.net[0].proj.out_features
    wanted = {
        "sends": "all_gather_into|all_to_all|pull.default",
        "feeds": rf"addmm.*(\({width}, 64\)|\(64, {width}\))",
        "product": r"addmm.*\(64, 64\)",
        "waits": "wait_|attend_pulled.default",
    }
    plain = pipe.transformer(**given).sample
    for way in ways:
        before = compilation.counters()["breaks"]
        with applied(pipe, fused.FusedGELU(), fused.FusedRoPE(), way, compilation.Regional()):
            made, codes = run_and_get_code(lambda: pipe.transformer(**given))
        said = {"label": way.label, "difference": (made.sample - plain).abs().max().item()}
        said |= {"after": torch.equal(pipe.transformer(**given).sample, plain)}
        said["breaks"] = compilation.counters()["breaks"] - before
        found = []
        for code in codes:
            lines = code[code.index("def call") :].splitlines()
            order = [name for line in lines for name, pattern in wanted.items() if re.search(pattern, line)]
            found.append(order[: order.index("waits")])
        rank.emit(said | {"double": found[0], "single": found[1]})


def exact_picture(rank):
    """The decoder divided over ranks: its difference to one rank's, also afterwards."""
    pipe = pipelines.load("embedded", device="cpu")
    given = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = pipe.vae.decode(given).sample
        with applied(pipe, spread := ParallelVAE()):
            divided = pipe.vae.decode(given).sample
        after = pipe.vae.decode(given).sample
    rank.emit({"difference": (divided - plain).abs().max().item(), "after": torch.equal(after, plain), **spread.proof})


def exact_compiled_picture(rank):
    """A small decoder divided over ranks and compiled: its difference to one rank's, and graph breaks."""
    from types import SimpleNamespace

    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    pipe = SimpleNamespace(vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval())
    given, before = torch.randn(1, 4, 8, 8), compilation.counters()["breaks"]
    with torch.no_grad():
        plain = pipe.vae.decode(given).sample
        with applied(pipe, ParallelVAE(), vae.Compiled()):
            difference = (pipe.vae.decode(given).sample - plain).abs().max().item()
    rank.emit({"difference": difference, "breaks": compilation.counters()["breaks"] - before})


def with_controlnet(rank, cache):
    """A ControlNet's residuals under context parallelism, with and without a cache that holds them."""
    pipe = pipelines.as_use_case(
        pipelines.load("embedded", device="cpu"), "ControlNet txt2img", pipelines.load_controlnet("embedded")
    )
    from fluxnb.models import material

    given = material.of("a red ball on grass", 0).arguments("edges")

    def made():
        return pipelines.generate(
            pipe, ["a red ball on grass"], [1], model=MODEL, steps=6, output_type="latent", **given
        )

    for techniques in ((), (cache,)):
        with applied(pipe, *techniques):
            plain = made()
        with applied(pipe, ContextParallel(gather=rank.world), *techniques):
            rank.emit({"difference": (made() - plain).abs().max().item()})


def small_text(rank):
    """What the divided transformer says to a number of text tokens that can't be divided."""
    pipe = pipelines.load("embedded", device="cpu")
    try:
        with applied(pipe, ContextParallel(gather=rank.world)):
            pipe("a cat", max_sequence_length=23, num_inference_steps=1, width=128, height=128)
    except UserError as error:
        rank.emit({"said": everywhere(str(error))})
