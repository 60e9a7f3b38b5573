"""What ranks run that fail, die or hang: functions that `fluxnb.measure.ranks` finds by name; they load no model."""

import os
import signal
import subprocess
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


def leaves(rank):
    """Rank 1 goes, without a word and as if all were well."""
    if rank.rank == 1:
        os._exit(0)
    dist.barrier()


def exits(rank):
    if rank.rank == 1:
        raise SystemExit(3)
    dist.barrier()


def starts_another(rank):
    """A process that nobody waits for, in a session of its own."""
    if rank.rank == 1:
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    everywhere(1)
    if rank.rank == 0:
        rank.emit({"began": True})


def hangs(rank):
    rank.emit({"pids": everywhere(os.getpid())})
    time.sleep(600)
