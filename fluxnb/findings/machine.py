"""What the machine is and has, and what of its rows was out of the ordinary, as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from fluxnb.findings.rows import ends, is_baseline
from fluxnb.findings.table import listed, pairs
from fluxnb.measure import telemetry
from fluxnb.study.results import canonical
from fluxnb.study.row import Row

LEAST_MEMORY, LEAST_CAPABILITY = 16, 8.9  # the plans': GiB, and compute capability of FP8 matrix units
WIDE, DRIFT, LOW_CLOCK, OTHER_LOAD, HELD = 0.2, 0.05, 0.9, 0.5, 0.5  # see `RULES`
RULES = (
    f"wide interval: more than {WIDE:.0%} of the speedup; unsteady: warm-up ended by its limit; slower: all of its "
    "interval lies below its baseline; throttled: for another reason than the power limit; power limit: it held the "
    f"clocks down in {HELD:.0%} of the samples or more; low clock: below {LOW_CLOCK:.0%} of the median of the same "
    f"notebook, model and session; other load: {OTHER_LOAD:g} cores or more; drift: the same baseline's medians in two "
    f"sessions differ by more than {DRIFT:.0%}"
).replace("%", "\N{NO-BREAK SPACE}%")
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


def anomalies(rows: Iterable[Row]):
    """What was out of the ordinary by the rules, a line for each kind, notebook and session; None where nothing was.

    Args:
        rows: of one configuration; rows of an earlier format, which know no session, are left out.
    """
    ok = [r for r in rows if r.ok and r.session and r.samples]
    found: dict[tuple, list[tuple[float, str, Row]]] = defaultdict(list)
    for kind, size, said, row in (*_odd(ok), *_drifted(ok)):
        found[kind, row.notebook, row.session].append((size, said, row))
    lines = []
    for (kind, notebook, session), hits in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        _, said, worst = max(hits, key=lambda hit: hit[0])
        of = {"rows": len(hits), "most": said, "of": worst.label, "row": worst.id}
        lines.append({"what": kind, "notebook": notebook, "session": session, **of})
    return listed(lines, "what") if lines else None


def _odd(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, Row]]:
    """(kind, how much, the same in words, row) of what a row shows by itself or beside its session's."""
    clocks: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        clocks[row.notebook, row.session, row.model].append((row.telemetry or {}).get("sm_clock_avg_mhz") or 0)
    for row in rows:
        noted, within = row.telemetry or {}, ends(row)
        if within and row.speedup and not is_baseline(row):
            width = (within[1] - within[0]) / row.speedup
            if width > WIDE:
                yield "wide interval", width, f"{within[0]:.2f}× to {within[1]:.2f}×", row
            if within[1] < 1:
                yield "slower", -row.speedup, f"{row.speedup:.2f}×", row
        if row.stable == 0:
            yield "unsteady", row.warmup_s or 0, f"{row.warmup_s or 0:.3g} s of warm-up", row
        if others := [reason for reason in noted.get("throttle_reasons") or () if reason not in telemetry.POWER]:
            yield "throttled", len(others), ", ".join(others), row
        if (held := noted.get("power_limited") or 0) >= HELD:
            yield "power limit", held, f"{held:.0%} of the samples", row
        usual = statistics.median(clocks[row.notebook, row.session, row.model])
        clock = noted.get("sm_clock_avg_mhz")
        if clock and clock < LOW_CLOCK * usual:
            yield "low clock", usual - clock, f"{clock:,.0f} MHz", row
        if (load := noted.get("other_load_cores") or 0) >= OTHER_LOAD:
            yield "other load", load, f"{load:.2g} cores", row


def _drifted(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, Row]]:
    """The same for baselines that took another time in another session."""
    same: dict[tuple, list[Row]] = defaultdict(list)
    for row in filter(is_baseline, rows):
        at = (row.model, row.use_case, row.gpus, row.width, row.height, row.steps, row.batch, row.host, row.versions)
        same[canonical(row.settings), *at].append(row)
    for own in same.values():
        first, last = (pick(own, key=lambda r: r.latency_p50) for pick in (min, max))
        apart = last.latency_p50 / first.latency_p50 - 1
        if apart > DRIFT and first.session != last.session:
            yield "drift", apart, f"{first.latency_p50:.3g} s and {last.latency_p50:.3g} s", last


def _as_said(frame, column: str):
    """With values as they are: not rounded to three figures."""
    frame.attrs["formats"] = {column: str}
    return frame
