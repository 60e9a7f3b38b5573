"""What the machine is and has, as tables."""

from __future__ import annotations

from fluxnb.findings.table import listed, pairs
from fluxnb.measure import telemetry

LEAST_MEMORY, LEAST_CAPABILITY = 16, 8.9  # the plans': GiB, and compute capability of FP8 matrix units
ASKED = ("torchao", "para-attn", "bitsandbytes", "optimum-quanto")  # packages that the plans name


def prerequisites():
    """What the plans ask for, what was found, and whether it is there."""
    machine, versions = telemetry.machine(), telemetry.versions()
    first = next(iter(machine["gpus"]), {})
    memory, capability = first.get("memory_gib"), first.get("compute_capability")
    needs = [
        ("Python 3.11 or newer", versions["python"], True),
        ("CUDA device", ", ".join(d["name"] for d in machine["gpus"]) or "no CUDA device", bool(first)),
        (f"{LEAST_MEMORY} GiB of GPU memory", memory, (memory or 0) >= LEAST_MEMORY),
        (
            f"FP8 matrix units (compute capability {LEAST_CAPABILITY:g})",
            capability,
            float(capability or 0) >= LEAST_CAPABILITY,
        ),
        *((f"package {name}", versions.get(name), name in versions) for name in ASKED),
    ]
    titles = ("what the plans ask for", "found", "there")
    return _as_said(listed((dict(zip(titles, need, strict=True)) for need in needs), titles[0]), "found")


def hardware():
    """The machine's facts, and those of each of its GPUs."""
    machine = telemetry.machine()
    facts = {name: value for name, value in machine.items() if name != "gpus"}
    for i, device in enumerate(machine["gpus"]):
        facts |= {f"GPU {i}: {name}": value for name, value in device.items()}
    return _as_said(pairs(facts, "hardware"), "value")


def packages():
    """The installed packages that a measurement depends on."""
    return pairs(telemetry.versions(), "package", "version")


def _as_said(frame, column: str):
    """With values as they are: not rounded to three figures."""
    frame.attrs["formats"] = {column: str}
    return frame
