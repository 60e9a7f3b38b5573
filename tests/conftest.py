"""What several test files share: the embedded pipeline, and a copy of the project to run things in."""

import dataclasses
import gc
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Two OpenMP threads that land on one core spin against each other, fifty times slower; waiting asleep is safe.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # its share of the cores for each of the processes that run tests
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

ROOT = Path(__file__).resolve().parents[1]
GPU = {"index": 0, "uuid": "abc", "name": "NVIDIA H200", "memory": 140 * 2**30, "compute_capability": "9.0"}

# The longest files, a minute and more each. They go first, else one process is left alone with one of them in the end;
# and those that start processes of their own go apart, for they watch the clock.
LONGEST = "notebooks survive lora single_gpu parallel study train use_cases load pool own_model".split()


def pytest_collection_modifyitems(items):
    """With --no-loadscope-reorder this is the order in which files are given to the processes that run tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {ROOT / f"tests/test_{name}.py": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
    """What is imported by now is no garbage: to look through it takes half a second whenever the study frees memory."""
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # it stays so: after a comparison the study would let go of that, too


@pytest.fixture(scope="session")
def embedded_pipe():
    """The embedded model in float32 on the CPU. Tests leave it as they found it."""
    from fluxnb.models import pipelines

    return pipelines.load("embedded", "float32", "cpu")


@pytest.fixture(scope="session")
def copy_project():
    """A function folder -> folder: what a fresh clone holds, as far as `make report` needs it."""

    def copy(folder: Path) -> Path:
        skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for name in ("fluxnb", "notebooks", "params", "reports/embedded"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        return folder

    return copy


@pytest.fixture
def user_root(tmp_path, monkeypatch):
    """A project folder with parameters only, as the working directory; nothing of the user's environment."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("FLUXNB_FORCE", "FLUXNB_PROGRESS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """A machine without a hub token and with an empty hub cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


class FakeNvml:
    """As much of pynvml as telemetry asks for; two GPUs, the second without a power sensor."""

    def __init__(self):
        self.opened = 0

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-abc": 0, "GPU-def": 1}[uuid]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=[80, 40][handle])

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=[7, 14][handle] * 2**30, total=140 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle):
        if handle == 1:
            raise RuntimeError("not supported")
        return 650_500

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return [1900, 1700][handle]

    def nvmlDeviceGetTemperature(self, handle, kind):
        return [60, 71][handle]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return [0x1, 0x4 | 0x20][handle]


@pytest.fixture
def nvml(monkeypatch):
    """A machine with two GPUs, as far as NVML tells."""
    from fluxnb.measure import telemetry

    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(telemetry, "_devices", lambda: [GPU, {**GPU, "index": 1, "uuid": "def"}])
    return fake


@pytest.fixture
def study_root(tmp_path):
    """A project's folder as far as the study needs one."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


@pytest.fixture
def begin(study_root, embedded_pipe):
    """A function that opens the study, as a notebook run again does, and its subject with a loaded pipeline."""
    import studied

    from fluxnb import notebooks, params, study
    from fluxnb.study.pool import _Held
    from fluxnb.study.subject import Loaded

    def opened(notebook=notebooks.FIRST_BLOCK, **changed):
        chosen = params.load("smoke", study_root / "params")
        small = {"prompts": ["a red apple on a white table", "a cat"], "rounds": 3, "warmup": 2} | changed
        chosen = dataclasses.replace(chosen, study=dataclasses.replace(chosen.study, **small))
        s = study.Study(chosen, notebook, study_root)
        subject = s.subject("embedded", "float32")
        if study.Subject.load is studied.LOAD:
            loaded = Loaded(subject, embedded_pipe, 0.5, 0.03)
            s.pool._held[subject.pipeline] = _Held(loaded, 0.03, None)
        return s, subject

    return opened


@pytest.fixture
def made(monkeypatch):
    """The (prompt, seed, steps) of every image made from here on; images are noise, made in no time."""
    import studied

    calls: list = []
    monkeypatch.setattr(studied.Loaded, "batch", studied.noise(calls))
    monkeypatch.setattr(studied.Subject, "load", studied.load)
    return calls
