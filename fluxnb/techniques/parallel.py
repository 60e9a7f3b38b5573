"""One image on several GPUs: its tokens, its weights or its pixels divided over the ranks of a process group.

    context parallelism   every rank has all weights and some of the tokens; attention exchanges what it needs
        all-gather        keys and values of all tokens come to every rank (Llama 3's way; any number of heads),
                          by NCCL or pulled by copy engines
        Ulysses           tokens are exchanged for heads, there and back (DeepSpeed-Ulysses, 2023)
        both              Ulysses inside groups, all-gather between them (USP, Fang & Zhao, 2024)
    FSDP                  every rank has some of the weights and fetches each block's before it runs (FSDP2)
    VAE rows              every rank decodes some rows of the picture, exactly (`fluxnb.techniques.parallel_vae`)
    replicas              every rank makes an image of its own: nothing is divided

Techniques, applied on every rank alike; `fluxnb.measure.ranks` starts the ranks. Caches compose: the engine averages
what its gates measure over the ranks that share an image, so no rank can decide otherwise than the others.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fluxnb import adapters
from fluxnb.errors import UserError
from fluxnb.families import PARALLEL, REPLICAS
from fluxnb.technique import IDENTICAL, ROUNDING, SHARED, Changes, Technique, Unavailable
from fluxnb.techniques.processor import Exchange, fill
from fluxnb.techniques.symmetric import Pulled


@dataclass(frozen=True)
class Replicas(Technique):
    """Every rank makes images of its own: nothing is divided, nothing is sooner. Source: the usual control."""

    family, exact = REPLICAS, IDENTICAL
    needed = ()
    name = label = "replicas"
    settings = {"replicas": True}

    def apply(self, pipe):
        """Nothing."""
        return lambda: None


@dataclass
class ContextParallel(Technique):
    """The tokens of one image divided over the ranks; attention exchanges what it needs.

    Args:
        ulysses: ranks that exchange tokens for heads; divides the heads.
        gather: groups of such ranks, between which keys and values are gathered.
        pull: keys and values are fetched from the other GPUs' memory by copy engines instead of sent by NCCL
            (`fluxnb.techniques.symmetric`); for `gather` alone.
        overlap: blocks that can (`FusedGELU`'s) compute their feed-forward part while tokens are on their
            way; False waits for them first.

    The product of the degrees is the number of ranks. Text tokens and image tokens are divided each for itself, so both
    have to be divisible by it. Source: Llama 3's training (2024); DeepSpeed-Ulysses (2023); USP (Fang & Zhao, 2024).
    """

    family, exact = PARALLEL, ROUNDING
    name = "context parallel"
    terms = {
        "all-gather": "the keys and values of all tokens come to every GPU",
        "Ulysses": "GPUs exchange tokens for heads before attention, and back after it",
        "pulled": "all-gather by copy engines, which fetch from the other GPUs' memory while these compute",
        "no overlap": "keys and values are waited for before anything else is computed",
        "both": "Ulysses inside groups of GPUs, all-gather between them",
    }

    ulysses: int = 1
    gather: int = 1
    pull: bool = False
    overlap: bool = True

    @property
    def label(self) -> str:
        degrees = degrees_label({"Ulysses": self.ulysses, "pulled" if self.pull else "all-gather": self.gather})
        return degrees if self.overlap else f"{degrees}, no overlap"

    @property
    def settings(self) -> dict:
        settings = {"ulysses": self.ulysses, "gather": self.gather}
        return settings | ({"pull": True} if self.pull else {}) | ({} if self.overlap else {"overlap": False})

    def apply(self, pipe):
        """Divides from the next call on; returns the function that undoes it."""
        transformer, degree = pipe.transformer, self.ulysses * self.gather
        adapters.check(transformer, adapters.BLOCKS)
        check_group(degree, self.label)
        check_heads(transformer, self.ulysses)
        if self.pull and (self.ulysses > 1 or not self.overlap):
            raise UserError("What is pulled is gathered and overlaps: give `gather` alone with it.")
        mesh = _mesh(transformer.device.type, self.gather, self.ulysses)
        ulysses, gather = (mesh[name].get_group() if mesh[name].size() > 1 else None for name in ("ulysses", "gather"))
        exchange = Exchange()
        if self.pull and gather:
            exchange = Pulled(gather)
        elif degree > 1:
            exchange = _OverRanks(ulysses and Group.of(ulysses), gather and Group.of(gather), self.overlap)
        with Changes(self.label) as changes:
            count = divide(transformer, exchange, changes)
            self.proof = {"divided": f"{count} attention layers over {degree} ranks"}
        return changes.take_back


def degrees_label(degrees: dict[str, int]) -> str:
    """`Ulysses 2 × ring 2` of {"Ulysses": 2, "ring": 2}."""
    return " × ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one rank"


def check_group(degree: int, label: str) -> None:
    """Raises Unavailable without ranks, UserError if there are not as many as `degree`."""
    if not dist.is_initialized():
        raise Unavailable(f"needs {degree} ranks, started by fluxnb.measure.ranks")
    if dist.get_world_size() != degree:
        raise UserError(
            f"{label} is for {degree} ranks and there are {dist.get_world_size()}: choose degrees with that product."
        )


def check_heads(transformer, ulysses: int) -> None:
    """Raises Unavailable if so many ranks can't have equal shares of the heads."""
    heads = transformer.config.num_attention_heads
    if heads % ulysses:
        raise Unavailable(f"needs a number of ranks that divides {heads} heads, and Ulysses is {ulysses}")


@functools.lru_cache
def _mesh(device: str, outer: int, ulysses: int, name: str = "gather"):
    """Neighbouring ranks are a Ulysses group. Kept: a process group can't be taken down while others use it."""
    return dist.device_mesh.init_device_mesh(device, (outer, ulysses), mesh_dim_names=(name, "ulysses"))


# --- what is divided --------------------------------------------------------------------------------------

# argument of the transformer -> dimension of the tokens
_TOKENS = {"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": 0, "txt_ids": 0}
_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")


def divide(transformer, exchange, changes: Changes) -> int:
    """Gives every rank its share of the tokens, from the next call on.

    Args:
        exchange: an Exchange that attends over the tokens of all ranks.

    Returns:
        The number of attention layers.
    """
    count = fill(transformer, "_exchange", exchange, changes)
    everyone = Group.of(dist.group.WORLD)
    changes.wrap(transformer, functools.partial(_divided, transformer, everyone, dist.get_rank()))
    changes.put(transformer, SHARED, dist.group.WORLD)
    return count


def _divided(transformer, group, rank: int, original):
    """The transformer's forward on this rank's share of the tokens; every rank has the whole output."""
    from torch._inductor import config as inductor

    world = group.world
    # blocks are compiled when they are first called; Inductor would move what is computed meanwhile next to its use
    in_order = inductor.patch(reorder_for_peak_memory=False, reorder_for_locality=False)
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]

    def share(tensor, dim):
        return tensor.chunk(world, dim)[rank]

    @functools.wraps(original)
    def forward(*args, **given):
        given = {**dict(zip(names, args, strict=False)), **given}
        text, image = given["encoder_hidden_states"].shape[1], given["hidden_states"].shape[1]
        if text % world or image % world:
            raise UserError(
                f"{image} image tokens and {text} text tokens can't be divided by {world} ranks: choose a size and a "
                "max_sequence_length that can, or another number of ranks."
            )
        given |= {name: share(given[name], dim) for name, dim in _TOKENS.items()}
        for name in _RESIDUALS:
            if given.get(name) is not None:
                given[name] = _Shares(given[name], share)
        with contextlib.nullcontext() if torch.compiler.is_compiling() else in_order:
            out = original(**given)
        (whole,) = (_of_all(x, group) for x in group.gather(out[0]))
        return (whole, *out[1:]) if isinstance(out, tuple) else type(out)(sample=whole)

    return forward


class _Shares:
    """A ControlNet's residuals, each divided when it is asked for: they may not have been worked out before."""

    def __init__(self, residuals, share):
        self.residuals, self.share = residuals, share

    def __len__(self) -> int:
        return len(self.residuals)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.share(self.residuals[i], 1)


# --- what attention exchanges -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A process group as operations inside a compiled block take it."""

    name: str
    world: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Group:
        return cls(group.group_name, dist.get_world_size(group))

    def gather(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor of every rank, one behind the other in dimension 0; there after `wait`."""
        return _ops.all_gather_into_tensor_coalesced([x.contiguous() for x in tensors], self.world, self.name)

    def swap(self, x: torch.Tensor) -> torch.Tensor:
        """Sends the i-th of x's equal parts in dimension 0 to rank i; what the ranks sent is there after `wait`."""
        sizes = [x.shape[0] // self.world] * self.world
        return _ops.all_to_all_single(x.contiguous(), sizes, sizes, self.name)


_ops = torch.ops._c10d_functional  # torch's functional collectives wait at once where they are compiled, these don't
wait = _ops.wait_tensor


class _OverRanks(Exchange):
    """Attention over the tokens of all ranks.

    Args:
        ulysses: ranks that exchange tokens for heads, None for no such exchange.
        gather: ranks that gather keys and values, None for no such exchange.
        overlap: `begin` sends, rather than `end`.

    Tokens come in another order than on one GPU, which attention does not depend on.
    """

    def __init__(self, ulysses: Group | None, gather: Group | None, overlap: bool):
        self.ulysses, self.gather, self.overlap = ulysses, gather, overlap

    def begin(self, query, key, value):
        return self._send(query, key, value) if self.overlap else (query(), key, value)

    def end(self, attend, backend, *sent):
        if not self.overlap:
            query, *others = sent
            sent = self._send(lambda: query, *others)
        if self.ulysses is None:
            query, *sent = sent
            return attend(query, *(_of_all(x, self.gather) for x in sent))
        query, key, value = _with_heads(sent[0], self.ulysses).unbind(2)
        if self.gather is not None:
            key, value = (_of_all(x, self.gather) for x in self.gather.gather(key, value))
        return _to_tokens(attend(query, key, value), self.ulysses)

    def _send(self, query, key, value) -> tuple:
        if self.ulysses is None:
            coming = self.gather.gather(key, value)
            return query(), *coming
        return (_to_heads(torch.stack([query(), key, value], 2), self.ulysses),)


def _to_heads(x, group):
    """(batch, tokens, parts, heads, width) sent to the ranks that get their share of the heads; for `_with_heads`."""
    return group.swap(x.unflatten(3, (group.world, -1)).permute(3, 0, 1, 2, 4, 5).flatten(0, 1))


def _with_heads(came, group):
    """(batch, tokens of the group, parts, heads of this rank, width) of what `_to_heads` sent."""
    return wait(came).unflatten(0, (group.world, -1)).transpose(0, 1).flatten(1, 2)


def _to_tokens(x, group):
    """(batch, tokens of the group, heads of this rank, width) back to this rank's tokens with all heads."""
    parts = x.unflatten(1, (group.world, -1)).transpose(0, 1).flatten(0, 1)
    came = wait(group.swap(parts)).unflatten(0, (group.world, -1))
    return came.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _of_all(came, group):
    """(batch, tokens of the group, …) of what was gathered."""
    return wait(came).unflatten(0, (group.world, -1)).transpose(0, 1).flatten(1, 2)


# --- weights divided --------------------------------------------------------------------------------------


@dataclass
class FullyShard(Technique):
    """Every rank keeps a share of the weights and fetches each block's when it runs (FSDP2).

    For memory, not for speed: every image of every rank waits for weights. It can't be taken back. Source: PyTorch's
    `fully_shard`.
    """

    family, exact = PARALLEL, ROUNDING
    name = label = "FSDP"
    settings = {"fsdp": True}

    def apply(self, pipe):
        """Divides the weights; what it returns raises, because torch can't put them together again in place."""
        from torch.distributed.fsdp import fully_shard

        if not dist.is_initialized() or dist.get_world_size() < 2:
            raise Unavailable("needs at least 2 ranks, started by fluxnb.measure.ranks")
        transformer, world = pipe.transformer, dist.get_world_size()
        mesh = dist.device_mesh.init_device_mesh(transformer.device.type, (world,))
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(transformer, mesh=mesh)
        self.proof = {"sharded": f"{len(blocks)} blocks over {world} ranks"}

        def undo():
            raise UserError("FSDP can't be taken off a pipeline: load it again.")

        return undo


# --- diffusers' own ---------------------------------------------------------------------------------------


@dataclass
class DiffusersParallel(Technique):
    """diffusers' own context parallelism, to compare with. Source: diffusers' ContextParallelConfig.

    Args:
        ulysses, ring: degrees; their product is the number of ranks. Its ring gathers all keys and values at first
            and attends to one rank's after the other.
    """

    family, exact = PARALLEL, ROUNDING
    name = "diffusers' context parallel"
    terms = {"ring": "keys and values of the GPUs are attended to one GPU's after the other's"}

    ulysses: int = 1
    ring: int = 1

    @property
    def label(self) -> str:
        return "diffusers " + degrees_label({"Ulysses": self.ulysses, "ring": self.ring})

    @property
    def settings(self) -> dict:
        return {"diffusers_ulysses": self.ulysses, "diffusers_ring": self.ring}

    def apply(self, pipe):
        """Divides from the next call on; returns the function that undoes it, which diffusers has none for."""
        from diffusers import ContextParallelConfig
        from diffusers.hooks.context_parallel import remove_context_parallel

        transformer = pipe.transformer
        check_group(self.ulysses * self.ring, self.label)
        if transformer.device.type != "cuda":
            raise Unavailable("needs GPUs: diffusers' context parallelism looks for an accelerator")
        check_heads(transformer, self.ulysses)
        processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
        chosen = {getattr(p._attention_backend, "value", p._attention_backend) for p in processors}
        if self.ring > 1 and chosen & {None, "native"}:
            raise Unavailable("needs an attention kernel that gives the softmax's sums: put Attention('cudnn') first")
        mesh = _mesh(transformer.device.type, self.ring, self.ulysses, "ring")
        config = ContextParallelConfig(ulysses_degree=self.ulysses, ring_degree=self.ring, mesh=mesh)
        with Changes(self.label) as changes:
            for owner in (transformer, *processors):
                changes.put(
                    owner, "_parallel_config", None, yields=True
                )  # diffusers sets it, and takes no notice later
                changes.callback(setattr, owner, "_parallel_config", None)
            changes.callback(remove_context_parallel, transformer, transformer._cp_plan)
            transformer.enable_parallelism(config=config)
            changes.put(transformer, SHARED, dist.group.WORLD)
            self.proof = {"divided": f"{len(processors)} attention layers over {self.ulysses * self.ring} ranks"}
        return changes.take_back
