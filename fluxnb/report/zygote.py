"""A process that has imported what every notebook imports, and forks each notebook's kernel from itself.

So a kernel is a fresh process as ever, without the seconds of importing. The zygote does nothing else: CUDA and pools
of threads don't survive a fork, and notebooks must not share more than code. Where it can't fork, kernels are started
the ordinary way.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from fluxnb.scrub import scrub_file

FLAGS = ("-Xfrozen_modules=off",)  # of the interpreter of every kernel
IMPORTED = ["ipykernel.kernelapp", "fluxnb.findings", "fluxnb.report.show"]
FOR_MODELS = ["diffusers.pipelines.flux.pipeline_flux"]  # with all that it loads; beside a GPU it asks what that can do
GPUS = ("/dev/nvidia", "/dev/kfd", "/dev/dxg")
READY_S = 300.0
ENDED = "the process that imports for all of them ended (see build/imports.log)"


class Zygote:
    """The zygote of a run, as the run sees it; it ends with the run, and its kernels with it.

    Args:
        root: the project's folder, which kernels run in.
        environment: variables of all of them, beside this process's.
    """

    def __init__(self, root: Path, environment: dict[str, str]):
        self.environment = environment
        # why it can't fork, empty if it can; None while it imports
        self.unfit = None if sys.platform == "linux" else "only Linux forks a process that has loaded these libraries"
        self.process: subprocess.Popen | None = None
        if self.unfit is None:
            self.pipe, theirs = Pipe()
            beside_gpu = any(f"/dev/{name}".startswith(GPUS) for name in os.listdir("/dev"))
            program = (
                f"from fluxnb.report import zygote; exec(zygote.serve({IMPORTED + FOR_MODELS * (not beside_gpu)}))"
            )
            self.log = root / "build" / "imports.log"
            with theirs, open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, *FLAGS, "-c", program], stdin=theirs.fileno(), stdout=log, stderr=log,
                    cwd=root, env=os.environ | environment, start_new_session=True,
                )  # fmt: skip

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_) -> None:
        if self.process:
            self.pipe.close()
            if self.unfit is None:  # it imports, and wouldn't notice
                self.process.kill()
            self.process.wait()
            scrub_file(self.log)

    def trouble(self) -> str:
        """Why kernels are started the ordinary way, empty if they are forked; waits until all is imported."""
        if self.unfit is None:
            try:
                self.unfit = self.pipe.recv() if self.pipe.poll(READY_S) else f"after {READY_S:.0f} s it still imports"
            except (EOFError, OSError):
                self.unfit = ENDED
        return self.unfit

    def ask(self, *what):
        """Its answer; None if it is no more."""
        try:
            self.pipe.send(what)
            return self.pipe.recv()
        except (EOFError, OSError):
            self.unfit = ENDED
            return None

    def provide(self, name: str) -> None:
        """Make the kernels come from here whose kernelspec has a provisioner of that name."""
        from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

        zygote = self

        class Forking(LocalProvisioner):
            async def launch_kernel(self, cmd, **given):
                code, *arguments = cmd[cmd.index("-c") + 1 :]
                folder = given.get("cwd") or os.getcwd()
                pid = None if zygote.trouble() else zygote.ask("fork", code, arguments, given["env"], folder)
                if pid is None:
                    return await super().launch_kernel(cmd, **given)
                self.process, self.pid, self.pgid = Kernel(zygote, pid), pid, pid
                return self.connection_info

        here = SimpleNamespace(load=lambda: Forking)  # as an entry point of an installed package is
        KernelProvisionerFactory.instance().provisioners[name] = here  # type: ignore[assignment]


class Kernel:
    """A forked kernel, with what Jupyter uses of a subprocess.Popen."""

    stdin = stdout = stderr = None

    def __init__(self, zygote: Zygote, pid: int):
        self.zygote, self.pid = zygote, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, None while it runs; killed, where the zygote is no more, which it doesn't outlive."""
        if self.returncode is None:
            status = self.zygote.ask("poll", self.pid)
            self.returncode = -signal.SIGKILL if self.zygote.unfit else status
        return self.returncode

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        while (status := self.poll()) is None:
            time.sleep(0.02)
        return status

    def send_signal(self, signum: int) -> None:
        """As os.kill does."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    terminate = kill


# --- in the zygote ----------------------------------------------------------------------------------------


def serve(modules: list[str]) -> str:
    """Imports, then forks when it is asked to; returns in a forked process only: the program that this is to run."""
    pipe = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # ipykernel reads it when it is imported, and sets the next later
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in modules:
        with contextlib.suppress(Exception):  # a notebook that needs it says what is wrong
            importlib.import_module(name)
    gc.freeze()  # what is there stays: to look through it takes long, and copies what all could share
    pipe.send(_unfit())
    kernels: set[int] = set()
    while True:
        try:
            what, *given = pipe.recv()
        except (EOFError, OSError):
            for pid in kernels:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        if what == "poll":
            ended, status = os.waitpid(given[0], os.WNOHANG)
            kernels.discard(ended)
            pipe.send(os.waitstatus_to_exitcode(status) if ended else None)
        elif pid := os.fork():
            kernels.add(pid)
            pipe.send(pid)
        else:
            pipe.close()
            return _become(*given)


def _unfit() -> str:
    """What an import has begun that a fork would lose or share; empty if nothing."""
    if not (pid := os.fork()):  # a pool that stands it (OpenBLAS's) is gone after one
        os._exit(0)
    os.waitpid(pid, 0)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    if used := [path for path in opened if path.startswith(GPUS)]:
        return f"an import has opened {used[0]}"
    threads = len(os.listdir("/proc/self/task"))
    return f"imports have left {threads} threads running" if threads > 1 else ""


def _become(code: str, arguments: list[str], environment: dict[str, str], folder: str) -> str:
    """Make a forked process what `python -c code arguments` is; gives the code."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | {"JPY_PARENT_PID": str(os.getppid())})
    sys.argv[1:] = arguments
    if "torch" in sys.modules:  # importing seeds; Python's own generator sees to that itself
        sys.modules["numpy"].random.seed()
        sys.modules["torch"].default_generator.seed()
    return code
