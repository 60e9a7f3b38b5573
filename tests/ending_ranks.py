"""What ranks run that fail, die or hang: functions that `fluxnb.measure.ranks` finds by name; they load no model."""

import os
import signal
import time

import torch.distributed as dist


def everywhere(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def fails(rank):
    rank.emit({"began": True})
    dist.barrier()
    if rank.rank == 1:
        raise ValueError("no such thing")
    dist.barrier()


def dies(rank):
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs(rank):
    rank.emit({"pids": everywhere(os.getpid())})
    time.sleep(600)
