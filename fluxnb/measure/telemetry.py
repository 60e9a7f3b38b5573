"""What the machine is, and what its GPUs did meanwhile.

NVML (package nvidia-ml-py) is optional: without it, or without a GPU, the GPU figures are None. Nothing here
changes a setting of a GPU, and nothing names the user, the host or a token.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fluxnb import __version__

GIB = 2**30
PACKAGES = (
    "torch diffusers transformers accelerate torchao para-attn bitsandbytes optimum-quanto safetensors"
    " tokenizers numpy pillow pandas matplotlib seaborn papermill nbconvert nvidia-ml-py triton"
).split()
# Variables that change what is measured. Only these are ever recorded; the rest may hold a token or a name.
REPLAY = "FLUXNB_REPLAY"
VARIABLES = (
    "CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING CUDA_DEVICE_ORDER CUBLAS_WORKSPACE_CONFIG NVIDIA_TF32_OVERRIDE"
    " PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TORCH_COMPILE_DISABLE TORCHINDUCTOR_FREEZING"
    " TORCH_ALLOW_TF32_CUBLAS_OVERRIDE OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT"
    " MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_AFFINITY"
    " TOKENIZERS_PARALLELISM HF_HUB_OFFLINE NCCL_NVLS_ENABLE NCCL_P2P_DISABLE NCCL_IB_DISABLE WORLD_SIZE"
).split()
# NVML's clock event reasons; a GPU that idles between two images is not slowed down, so that bit is left out.
THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
POWER = {"software power cap", "hardware power brake"}  # those that the power limit is behind


def replayed() -> dict | None:
    """The run.json of the machine whose rows are shown again (`make report REPLAY=1`); None where one can measure."""
    path = os.environ.get(REPLAY)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def machine() -> dict:
    """The hardware: cpu, cores, threads, usable_threads, ram_gib, os, gpus, driver, cuda.

    `gpus` has one dict per device that torch sees: name, memory_gib, compute_capability, power_limit_w,
    sm_clock_max_mhz, memory_clock_max_mhz (the last three None without NVML).
    """
    import psutil

    if run := replayed():
        return run["machine"]
    facts = {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": os.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / GIB),
        "os": f"{platform.system()} {platform.machine()}",
        "gpus": [],
        "driver": None,
        "cuda": None,
    }
    devices = _devices()
    if not devices:
        return facts
    import torch

    facts["cuda"] = torch.version.cuda
    with _Nvml() as nvml:
        if nvml:
            facts["driver"] = _text(_ask(nvml, "nvmlSystemGetDriverVersion"))
        for device in devices:
            handle = _handle(nvml, device)
            limit = _ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)
            facts["gpus"].append(
                {
                    "name": device["name"],
                    "memory_gib": round(device["memory"] / GIB, 1),
                    "compute_capability": device["compute_capability"],
                    "power_limit_w": None if limit is None else limit / 1000,
                    "sm_clock_max_mhz": _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, 1),
                    "memory_clock_max_mhz": _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, 2),
                }
            )
    return facts


def gpu_uuids() -> list[str]:
    """The UUIDs of the machine's GPUs, all of them where NVML tells, else those that torch sees."""
    with _Nvml() as nvml:
        count = _ask(nvml, "nvmlDeviceGetCount") if nvml else None
        handles = [_ask(nvml, "nvmlDeviceGetHandleByIndex", i) for i in range(count or 0)]
        found = [_text(_ask(nvml, "nvmlDeviceGetUUID", handle)) for handle in handles]
    return [uuid for uuid in found if uuid] or [d["uuid"] for d in _devices() if d["uuid"]]


def commit(root: Path | None = None) -> str | None:
    """The commit that the code is of, its first 10 digits, with + where files differ from it; None without one."""
    found, dirty = _git(root or Path(__file__).resolve().parents[2])
    return found and found[:10] + "+" * bool(dirty)


def versions(packages=PACKAGES) -> dict[str, str]:
    """Versions of Python, of fluxnb and of those of `packages` that are installed."""
    if run := replayed():
        return run["versions"]
    found = {"python": platform.python_version(), "fluxnb": __version__}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def versions_short() -> str:
    """The versions that a measurement depends on most, such as "torch 2.13.0 diffusers 0.42.1"."""
    found = versions(("torch", "diffusers"))
    return " ".join(f"{p} {found[p]}" for p in ("torch", "diffusers") if p in found)


def provenance(params, root: Path | None = None) -> dict:
    """What run.json says of a run: time, commit, versions, hardware, variables, the resolved parameters.

    `root` is the project's folder; outside a git checkout commit and dirty are None. Changed files under
    reports/ don't count as dirty, for every run writes there. Holds plain JSON values and no token.
    """
    commit, dirty = _git(root or Path(__file__).resolve().parents[2])
    return {
        "gpu": params.name,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "replayed": bool(replayed()),
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "machine": machine(),
        "environment": _environment(),
        "params_digest": params.digest,
        "params": params.resolved(),
    }


def _environment() -> dict[str, str]:
    if run := replayed():
        return run["environment"]
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


class Ticker:
    """Calls `read()` at `rate_hz` in a thread while the block runs; `readings` has what it returned, `times` when.

    One reading is taken at the start and one at the end, so a short block has some. A reading that raises is
    left out: watching must not end a measurement.
    """

    def __init__(self, read, rate_hz: float = 10.0):
        self.readings: list = []
        self.times: list[float] = []  # of time.perf_counter
        self._read = read
        self._period = 1 / rate_hz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _take(self) -> None:
        with suppress(Exception):
            self.readings.append(self._read())
            self.times.append(time.perf_counter())

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._take()

    def __enter__(self):
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._take()


class Sampler:
    """Watches the GPUs that torch sees, over NVML at 10 Hz: `with Sampler() as s: ...` and then `s.result`.

    `result` is None without a GPU or NVML, else a dict (a figure that the GPU does not report is None):
    samples, gpu_util_avg, gpu_util_peak (%, mean over GPUs), gpu_memory_avg_pct, gpu_memory_peak_pct (%, the peak of
    the fullest), memory_avg_gib, memory_peak_gib (the fullest GPU, all processes), sm_clock_avg_mhz, sm_clock_min_mhz,
    power_avg_w, power_peak_w (W, sum over GPUs), temperature_avg_c, temperature_peak_c (the hottest GPU), throttled
    (bool), throttle_reasons (a sorted list of words) and power_limited (the share of samples in which the power limit
    held a GPU's clock down).
    """

    def __init__(self, rate_hz: float = 10.0):
        self.result: dict | None = None
        self._rate_hz = rate_hz
        self._nvml = _Nvml()
        self._ticker: Ticker | None = None

    def __enter__(self):
        devices = _devices()
        nvml = self._nvml.__enter__() if devices else None
        handles = [h for h in (_handle(nvml, d) for d in devices) if h is not None]
        if handles:
            self._ticker = Ticker(lambda: [_reading(nvml, h) for h in handles], self._rate_hz).__enter__()
        return self

    def __exit__(self, *error):
        if self._ticker:
            self._ticker.__exit__(*error)
            self.result = _aggregate(self._ticker.readings)
        self._nvml.__exit__(*error)

    def within(self, windows: list[tuple[float, float]]) -> dict | None:
        """The result of these windows alone, (start, end) in seconds of time.perf_counter; None without readings."""
        if not self._ticker:
            return None
        taken = zip(self._ticker.times, self._ticker.readings, strict=True)
        return _aggregate([reading for at, reading in taken if any(a <= at <= b for a, b in windows)])


@dataclass
class Host:
    """What the machine's CPU did while the blocks `during` were run.

    Args:
        top: the process whose children's work is no other load: of a server's or of ranks.
    """

    top: int | None = None
    busy_s: float = 0.0  # CPU seconds of all processes
    own_s: float = 0.0  # of them, this one's
    wall_s: float = 0.0
    clocks: list[float] = field(default_factory=list)  # MHz, before and after each block

    @contextmanager
    def during(self):
        """Adds what happens inside."""
        before = self._read()
        yield
        busy, own, wall = (after - b for after, b in zip(self._read(), before, strict=True))
        self.busy_s, self.own_s, self.wall_s = self.busy_s + busy, self.own_s + own, self.wall_s + wall

    @property
    def result(self) -> dict:
        """other_load_cores, cpu_util_avg (% of all its threads), cpu_clock_avg_mhz, load_average (of the last minute).

        Empty before the first block; a figure that the system doesn't tell is None.
        """
        if not self.wall_s:
            return {}
        return {
            "other_load_cores": round(max(0.0, self.busy_s - self.own_s) / self.wall_s, 2),
            "cpu_util_avg": round(min(100.0, 100 * self.busy_s / self.wall_s / (os.cpu_count() or 1)), 1),
            "cpu_clock_avg_mhz": round(sum(self.clocks) / len(self.clocks)) if self.clocks else None,
            "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        }

    def _read(self) -> tuple[float, float, float]:
        """(CPU seconds of all processes, of this one and what `top` began, wall-clock seconds), since some moment."""
        import psutil

        with suppress(Exception):  # no such file, or none that psutil can read
            self.clocks += [clock.current] if (clock := psutil.cpu_freq()) and clock.current else []
        everyone, times = psutil.cpu_times(), os.times()
        busy = sum(getattr(everyone, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        own = times.user + times.system
        for child in psutil.Process(self.top).children(recursive=True) if self.top else ():
            with suppress(psutil.Error):
                own += sum(child.cpu_times()[:2]) if child.pid != os.getpid() else 0.0
        return busy, own, time.perf_counter()


class _Nvml:
    """NVML opened and closed again; gives the module, or None where it is missing or finds no driver."""

    def __init__(self):
        self._module = None

    def __enter__(self):
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # not installed, no driver, a driver that doesn't fit: all mean no figures
            return None
        self._module = pynvml
        return pynvml

    def __exit__(self, *_):
        if self._module:
            _ask(self._module, "nvmlShutdown")
            self._module = None


def _devices() -> list[dict]:
    """The CUDA devices that torch sees: index, uuid, name, memory (bytes), compute_capability."""
    import torch

    if not torch.cuda.is_available():
        return []
    devices = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "index": i,
                "uuid": str(getattr(facts, "uuid", "")),
                "name": facts.name,
                "memory": facts.total_memory,
                "compute_capability": f"{facts.major}.{facts.minor}",
            }
        )
    return devices


def _handle(nvml, device: dict):
    """NVML's handle of a torch device, by UUID (CUDA_VISIBLE_DEVICES may have renumbered them), or None."""
    if not nvml:
        return None
    if not device["uuid"]:
        return _ask(nvml, "nvmlDeviceGetHandleByIndex", device["index"])
    uuid = device["uuid"]
    return _ask(nvml, "nvmlDeviceGetHandleByUUID", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _reading(nvml, handle) -> dict:
    util = _ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    power = _ask(nvml, "nvmlDeviceGetPowerUsage", handle)
    return {
        "util": util.gpu if util else None,
        "memory_gib": memory.used / GIB if memory else None,
        "memory_pct": 100 * memory.used / memory.total if memory else None,
        "sm_clock": _ask(nvml, "nvmlDeviceGetClockInfo", handle, 1),  # 1: the SM clock
        "power": None if power is None else power / 1000,
        "temperature": _ask(nvml, "nvmlDeviceGetTemperature", handle, 0),  # 0: the GPU's own sensor
        "throttle": _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle),
    }


def _aggregate(readings: list[list[dict]]) -> dict | None:
    """Averages and peaks of [sample][gpu] readings."""
    if not readings:
        return None

    def per_sample(name, combine) -> list[float]:
        found = ([gpu[name] for gpu in sample if gpu[name] is not None] for sample in readings)
        return [combine(values) for values in found if values]

    def average(values) -> float | None:
        return sum(values) / len(values) if values else None

    util = per_sample("util", average)
    memory = per_sample("memory_gib", max)
    clock = per_sample("sm_clock", average)
    power = per_sample("power", sum)
    temperature = per_sample("temperature", max)
    told = [[_reasons(gpu["throttle"]) for gpu in sample] for sample in readings]
    reasons = sorted(set().union(*(words for sample in told for words in sample)))
    return {
        "samples": len(readings),
        "gpu_util_avg": average(util),
        "gpu_util_peak": max(util, default=None),
        "gpu_memory_avg_pct": average(per_sample("memory_pct", average)),
        "gpu_memory_peak_pct": max(per_sample("memory_pct", max), default=None),
        "memory_avg_gib": average(memory),
        "memory_peak_gib": max(memory, default=None),
        "sm_clock_avg_mhz": average(clock),
        "sm_clock_min_mhz": min(per_sample("sm_clock", min), default=None),
        "power_avg_w": average(power),
        "power_peak_w": max(power, default=None),
        "temperature_avg_c": average(temperature),
        "temperature_peak_c": max(temperature, default=None),
        "throttled": bool(reasons),
        "throttle_reasons": reasons,
        "power_limited": average([any(POWER & words for words in sample) for sample in told]),
    }


def _reasons(bits: int | None) -> set[str]:
    return {word for bit, word in THROTTLE_REASONS.items() if (bits or 0) & bit}


def _ask(nvml, call: str, *args):
    """The result of an NVML call; None when package, driver or GPU can't answer it, or the handle is None."""
    try:
        return None if None in args else getattr(nvml, call)(*args)
    except Exception:
        return None


def _text(value) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    if platform.system() == "Darwin":
        model = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if model:
            return model
    return platform.processor() or platform.machine()


def _git(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether the files differ from it).

    Outside a checkout or without git: what FLUXNB_COMMIT says (for a copy of a clean checkout), else None.
    """
    commit = _output(["git", "rev-parse", "--verify", "HEAD"], root)
    if not commit:
        stated = os.environ.get("FLUXNB_COMMIT", "")
        return (stated, False) if re.fullmatch(r"[0-9a-f]{7,40}", stated) else (None, None)
    status = _output(["git", "status", "--porcelain", "--", ".", ":(exclude)reports"], root)
    return commit, None if status is None else bool(status)


def _output(command: list[str], folder: Path | None = None) -> str | None:
    """What a command prints, None when it fails or is missing."""
    # A git hook sets GIT_DIR and its kin, which would answer for another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
