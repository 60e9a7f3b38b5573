import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import GPU

from fluxnb import params
from fluxnb.measure import telemetry


def test_machine_names_the_hardware():
    facts = telemetry.machine()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["ram_gib"] >= 1
    assert 1 <= facts["usable_threads"] <= facts["threads"]
    assert isinstance(facts["gpus"], list)


def test_machine_describes_each_gpu(nvml):
    facts = telemetry.machine()
    assert facts["driver"] == "580.1" and len(facts["gpus"]) == 2
    assert facts["gpus"][0] == {
        "name": "NVIDIA H200",
        "memory_gib": 140.0,
        "compute_capability": "9.0",
        "power_limit_w": 700.0,
        "sm_clock_max_mhz": 1980,
        "memory_clock_max_mhz": 3201,
    }
    assert nvml.opened == 0  # closed again


def test_machine_works_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import pynvml raises ImportError
    monkeypatch.setattr(telemetry, "_devices", lambda: [GPU])
    facts = telemetry.machine()
    assert facts["gpus"][0]["name"] == "NVIDIA H200"
    assert facts["gpus"][0]["power_limit_w"] is None and facts["driver"] is None


def test_versions_name_what_is_installed_only(monkeypatch):
    installed = {"torch": "2.13.0", "diffusers": "0.42.1"}

    def version(package):
        if package not in installed:
            raise telemetry.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(telemetry.metadata, "version", version)
    found = telemetry.versions()
    assert set(found) == {"python", "fluxnb", "torch", "diffusers"}
    assert telemetry.versions_short() == "torch 2.13.0 diffusers 0.42.1"
    del installed["diffusers"]
    assert telemetry.versions_short() == "torch 2.13.0"


def test_provenance_has_no_token(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "PIP_INDEX_URL", "MY_PASSWORD"):
        monkeypatch.setenv(name, "s3cret-value")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    dump = json.dumps(telemetry.provenance(params.load("smoke")))
    assert "s3cret-value" not in dump and "HF_TOKEN" not in dump
    assert json.loads(dump)["environment"]["OMP_NUM_THREADS"] == "2"


def test_provenance_has_the_resolved_parameters_and_the_machine():
    smoke = params.load("smoke")
    found = telemetry.provenance(smoke)
    assert found["params"] == smoke.resolved() and found["params_digest"] == smoke.digest
    assert found["gpu"] == "smoke" and found["machine"] == telemetry.machine()
    assert found["started_at"].endswith("+00:00") and "torch" in found["versions"]


def test_provenance_of_a_replay_is_that_of_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    measured = telemetry.provenance(params.load("smoke")) | {"versions": {"torch": "1.0"}}
    (tmp_path / "run.json").write_text(json.dumps(measured))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv(telemetry.REPLAY, str(tmp_path / "run.json"))
    found = telemetry.provenance(params.load("smoke"))
    assert found["replayed"] and found["versions"] == {"torch": "1.0"} and found["machine"] == measured["machine"]
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_provenance_outside_a_git_checkout(tmp_path):
    found = telemetry.provenance(params.load("smoke"), root=tmp_path)
    assert found["commit"] is None and found["dirty"] is None


def test_provenance_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = telemetry.provenance(params.load("smoke"))
    assert found["commit"] is None and found["dirty"] is None


def test_provenance_says_which_commit_and_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # what a git hook may leave set

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        env = {"PATH": subprocess.os.environ["PATH"], "HOME": str(tmp_path)}
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    smoke = params.load("smoke")
    found = telemetry.provenance(smoke, root=tmp_path)
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "results.csv").write_text("written by the run itself")
    assert telemetry.provenance(smoke, root=tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert telemetry.provenance(smoke, root=tmp_path)["dirty"] is True


def test_sampler_is_none_without_a_gpu(monkeypatch):
    monkeypatch.setattr(telemetry, "_devices", lambda: [])
    with telemetry.Sampler() as sampler:
        pass
    assert sampler.result is None


def test_sampler_is_none_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(telemetry, "_devices", lambda: [GPU])
    with telemetry.Sampler() as sampler:
        pass
    assert sampler.result is None


def test_sampler_averages_over_time_and_gpus(nvml):
    with telemetry.Sampler() as sampler:
        assert nvml.opened == 1
    assert nvml.opened == 0
    assert sampler.result == {
        "samples": 2,
        "gpu_util_avg": 60,
        "gpu_util_peak": 60,
        "gpu_memory_avg_pct": pytest.approx(7.5),
        "gpu_memory_peak_pct": pytest.approx(10.0),
        "memory_avg_gib": 14,
        "memory_peak_gib": 14,
        "sm_clock_avg_mhz": 1800,
        "sm_clock_min_mhz": 1700,
        "power_avg_w": 650.5,
        "power_peak_w": 650.5,
        "temperature_avg_c": 71,
        "temperature_peak_c": 71,
        "throttled": True,
        "throttle_reasons": ["software power cap", "software thermal slowdown"],
        "power_limited": 1.0,
    }


def test_sampler_sees_change_and_an_idle_gpu_is_not_throttled(nvml, monkeypatch):
    used = iter([10, 50])
    monkeypatch.setattr(telemetry, "_devices", lambda: [GPU])
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=next(used))
    with telemetry.Sampler(rate_hz=0.01) as sampler:
        pass
    assert (sampler.result["gpu_util_avg"], sampler.result["gpu_util_peak"]) == (30, 50)
    assert sampler.result["throttled"] is False and sampler.result["throttle_reasons"] == []
    assert sampler.result["power_limited"] == 0


def test_how_long_the_power_limit_held_the_clocks_down_is_a_share(nvml):
    bits = iter([0x4, 0x20])  # the power limit, then heat
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: next(bits) if handle == 0 else 0
    with telemetry.Sampler(rate_hz=0.01) as sampler:
        pass
    assert sampler.result["power_limited"] == 0.5


def test_sampler_stops_and_closes_after_an_error(nvml):
    with pytest.raises(MemoryError):
        with telemetry.Sampler() as sampler:
            raise MemoryError
    assert nvml.opened == 0 and sampler.result["samples"] == 2


def test_ticker_reads_while_the_block_runs():
    with telemetry.Ticker(lambda: 1, rate_hz=200) as ticker:
        deadline = time.monotonic() + 5
        while len(ticker.readings) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    taken = len(ticker.readings)
    assert taken >= 6
    time.sleep(0.03)
    assert len(ticker.readings) == taken  # the thread has ended


def test_ticker_waits_for_a_reading_that_is_under_way():
    reading = threading.Event()
    begun = iter([False, True, False])

    def read():
        if next(begun):
            reading.set()
            time.sleep(0.2)

    with telemetry.Ticker(read, rate_hz=1000) as ticker:
        assert reading.wait(5)
    assert not ticker._thread.is_alive()  # so that NVML is not closed under it
    assert len(ticker.readings) == 3


def test_ticker_leaves_out_a_reading_that_fails():
    with telemetry.Ticker(lambda: 1 / 0, rate_hz=1) as ticker:
        pass
    assert ticker.readings == []


def test_a_window_has_what_was_read_in_it_alone(nvml):
    temperatures = iter(range(60, 100))
    nvml.nvmlDeviceGetTemperature = lambda handle, kind: next(temperatures)
    windows = []
    with telemetry.Sampler(rate_hz=0.01) as sampler:
        for _ in range(2):
            start = time.perf_counter()
            sampler._ticker._take()
            windows.append((start, time.perf_counter()))
    assert sampler.result["samples"] == 4 and sampler.result["temperature_peak_c"] == 67
    assert sampler.within(windows)["samples"] == 2 and sampler.within(windows)["temperature_peak_c"] == 65
    assert sampler.within(windows[:1])["temperature_peak_c"] == 63
    assert sampler.within([(0, 0)]) is None  # a window too short to have a reading


def test_no_window_has_figures_without_a_gpu(monkeypatch):
    monkeypatch.setattr(telemetry, "_devices", lambda: [])
    with telemetry.Sampler() as sampler:
        pass
    assert sampler.within([(0, time.perf_counter())]) is None


def test_load_of_other_processes_is_counted_while_the_blocks_run(monkeypatch):
    seconds = iter([(10.0, 1.0, 100.0), (14.0, 2.0, 102.0), (50.0, 2.0, 110.0), (50.0, 2.0, 112.0)])
    monkeypatch.setattr(telemetry.Host, "_read", lambda self: next(seconds))
    host = telemetry.Host()
    assert host.result == {}
    for _ in range(2):
        with host.during():
            pass
    assert host.result["other_load_cores"] == 3 / 4


def test_a_process_that_works_beside_this_one_is_other_load_unless_it_is_a_part_of_it():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside, server = telemetry.Host(), telemetry.Host(os.getpid())
        with beside.during(), server.during():
            time.sleep(1.0)
        assert beside.result["other_load_cores"] > 0.2
        assert server.result["other_load_cores"] < beside.result["other_load_cores"] - 0.1
    finally:
        busy.kill()
        busy.wait()


def test_a_commit_is_short_and_says_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "_git", lambda root: ("0123456789abcdef", False))
    assert telemetry.commit(tmp_path) == "0123456789"
    monkeypatch.setattr(telemetry, "_git", lambda root: ("0123456789abcdef", True))
    assert telemetry.commit(tmp_path) == "0123456789+"
    monkeypatch.setattr(telemetry, "_git", lambda root: (None, None))
    assert telemetry.commit(tmp_path) is None
