"""Keys and values of all ranks without NCCL: each rank writes its own where the others can read, copy engines fetch.

NCCL moves data by kernels, which take multiprocessors from what is computed meanwhile: a matrix product that fills the
GPU has to wait for them. Copy engines take none. Source: PyTorch's symmetric memory (2024), after its low-contention
all-gather.

Attention is part of the second operation: nobody else gets hold of the memory that the next layer writes to.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from fluxnb.technique import Unavailable
from fluxnb.techniques.processor import Exchange


class Pulled(Exchange):
    """Gathers keys and values through `Board`s while something else is computed.

    Args:
        group: the process group whose ranks share the tokens.
    """

    def __init__(self, group: dist.ProcessGroup):
        check(group)
        self.name = group.group_name
        _groups[self.name] = group

    def begin(self, query, key, value):
        sent = pull(key, value, self.name)
        return query(), sent

    def end(self, attend, backend, query, sent):
        return attend_pulled(query, sent, self.name, "" if backend is None else backend.value)


def check(group: dist.ProcessGroup) -> None:
    """Raises Unavailable unless all ranks have GPUs of this machine that can read each other's memory."""
    count = dist.get_world_size(group)
    if not torch.cuda.is_available() or torch.cuda.device_count() < count:
        raise Unavailable(f"needs {count} CUDA GPUs in one machine")
    here = torch.cuda.current_device()
    if not all(torch.cuda.can_device_access_peer(here, other) for other in range(count) if other != here):
        raise Unavailable("needs GPUs that can read each other's memory")


class Board:
    """One rank's memory for the keys and values of all, (2 places, 2, ranks, batch, tokens of a rank, heads, width).

    All ranks make theirs at the same time, and keep it. A layer writes to the place that the layer before left alone,
    which everyone has read by the time that the layer before is there. In a recording, that is: outside of it nobody
    knows what has run before (a replay, say), and everyone is waited for.
    """

    def __init__(self, like: torch.Tensor, group: dist.ProcessGroup):
        from torch.distributed import _symmetric_memory as symmetric

        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        shape = (2, 2, self.world, *like.shape)
        self.full = symmetric.empty(shape, dtype=like.dtype, device=like.device)
        self.shared = symmetric.rendezvous(self.full, group)
        self.others = [(self.rank + i) % self.world for i in range(1, self.world)]  # not all from the same one at once
        self.theirs = {other: self.shared.get_buffer(other, shape, like.dtype) for other in self.others}
        self.side = torch.cuda.Stream()
        self.came: torch.cuda.Event | None = None
        self.place, self.recording = 0, False

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Shows this rank's keys and values and sets off the others'."""
        before, self.recording = self.recording, torch.cuda.is_current_stream_capturing()
        if not (before and self.recording):
            self.shared.barrier(channel=0)  # everyone has read what is overwritten now
        self.place = 1 - self.place
        full = self.full[self.place]
        for mine, part in zip(full[:, self.rank], (key, value), strict=True):
            mine.copy_(part)
        self.shared.barrier(channel=1)  # everyone's are there
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for other in self.others:
                for i in range(2):
                    full[i, other].copy_(self.theirs[other][self.place, i, other], non_blocking=True)
            self.came = self.side.record_event()

    def end(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all ranks, each (batch, all tokens, heads, width), until the layer after the next."""
        torch.cuda.current_stream().wait_event(self.came)
        key, value = (part.transpose(0, 1).flatten(1, 2) for part in self.full[self.place])
        return key, value


_groups: dict[str, dist.ProcessGroup] = {}
_boards: dict[tuple, Board] = {}


def _board(like: torch.Tensor, group: str) -> Board:
    place = (group, like.shape, like.dtype)
    if place not in _boards:
        _boards[place] = Board(like, _groups[group])
    return _boards[place]


@torch.library.custom_op("fluxnb::pull", mutates_args=())
def pull(key: torch.Tensor, value: torch.Tensor, group: str) -> torch.Tensor:
    """Sets off the keys and values of all ranks of a group.

    Args:
        key, value: (batch, tokens of this rank, heads, width).
        group: the name of a process group that a `Pulled` is for.

    Returns:
        What `attend_pulled` is given, so that it comes afterwards.
    """
    _board(key, group).begin(key, value)
    return key.new_empty(1)


@pull.register_fake
def _(key, value, group):
    return key.new_empty(1)


@torch.library.custom_op("fluxnb::attend_pulled", mutates_args=())
def attend_pulled(query: torch.Tensor, sent: torch.Tensor, group: str, backend: str) -> torch.Tensor:
    """Attention of this rank's queries over the keys and values that `pull` has set off.

    Args:
        query: (batch, tokens of this rank, heads, width).
        backend: a name among diffusers' attention backends, "" for PyTorch's choice.

    Returns:
        As `query`, contiguous.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.transformers import transformer_flux

    key, value = _board(query, group).end()
    chosen = AttentionBackendName(backend) if backend else None
    return transformer_flux.dispatch_attention_fn(query, key, value, backend=chosen).contiguous()


@attend_pulled.register_fake
def _(query, sent, group, backend):
    return torch.empty_like(query, memory_format=torch.contiguous_format)
