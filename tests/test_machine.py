"""What a page says of the machine: what the plans ask for, its facts, its ceilings."""

import time
from dataclasses import dataclass, field, replace

import measured
import pytest

from fluxnb import families, findings
from fluxnb.findings import machine as of_machine
from fluxnb.measure import ceilings, telemetry
from fluxnb.study import comparison
from fluxnb.study.row import Row
from fluxnb.techniques import attention, kinds, quantizers

H200 = {"name": "NVIDIA H200", "memory_gib": 139.8, "compute_capability": "9.0"}


@pytest.fixture
def machine(monkeypatch):
    def having(*gpus):
        monkeypatch.setattr(telemetry, "machine", lambda: {"cpu": "a CPU", "cores": 4, "driver": None, "gpus": gpus})
        monkeypatch.setattr(telemetry, "versions", lambda: {"python": "3.12.1", "torchao": "0.18"})

    return having


def test_what_the_plans_ask_for_is_there_or_not(machine):
    machine()
    there = findings.prerequisites()["there"]
    assert there["Python 3.11 or newer"] and there["package torchao"] and there.sum() == 2
    machine(H200)
    found = findings.prerequisites()
    assert list(found["there"][:4]) == [True] * 4 and found["found"]["CUDA device"] == "NVIDIA H200"
    assert not found["there"]["package para-attn"]
    machine({**H200, "memory_gib": 12.0, "compute_capability": "8.6"})
    assert list(findings.prerequisites()["there"][:4]) == [True, True, False, False]


def test_the_facts_of_every_gpu_stand_among_the_machines(machine):
    machine(H200, H200)
    facts = findings.hardware()["value"]
    assert facts["cpu"] == "a CPU" and facts["GPU 1: memory_gib"] == 139.8 and "gpus" not in facts
    assert findings.packages()["version"]["torchao"] == "0.18"


@dataclass
class Timed:
    """A study that runs everything once and calls it a second."""

    rows: list = field(default_factory=list)

    def time(self, technique, settings, run, repeats, *, family=families.CEILING, label="", also=None, held_s=0.0):
        about = {"technique": technique, "settings": settings, "family": family.name, "label": label, "session": "one"}
        about |= {"proof": {"timed_s": held_s}, "telemetry": {"sm_clock_avg_mhz": 1600 + 10 * len(self.rows)}}
        self.rows.append(Row(status="ok", latency_p50=1.0, latency_min=0.5, n=repeats, **about))
        return self.rows[-1]


def test_every_ceiling_has_a_row_that_says_what_it_is(machine):
    machine()
    rows = ceilings.sweep(Timed(), 1024, 3)
    labels = [r.label for r in rows]
    assert "matrix product 1024³, bfloat16" in labels and "matrix product 1024³, float16" not in labels
    assert labels[-2:] == ["attention, math, float32", "copy in device memory"]
    assert rows[-1].settings == {"bytes": 2**30} and rows[-2].setting("shape") == list(ceilings.ONE_HEAD)
    machine(H200)
    rows = ceilings.sweep(Timed(), 8192, 3)  # nothing is allocated before it runs
    assert "matrix product 8192³, float16" in [r.label for r in rows] and rows[-1].settings == {"bytes": 2**33}


def test_what_is_set_against_the_limit_is_the_median_under_load_and_says_where_it_is_from(machine):
    machine()
    reached = ceilings.measured(Timed())
    assert reached.products == dict.fromkeys(("float32", "fp8", "int8"), 2 * 1024**3)
    _, heads, tokens, width = ceilings.ONE_HEAD
    assert reached.attention == 4 * heads * tokens**2 * width
    assert findings.ceilings_words(reached) == "ceilings held for 0.1 s each at a mean of 1,615 MHz in session one"
    machine(H200)
    assert ceilings.measured(Timed()).timed_s == 2.0
    nothing = Timed()
    nothing.time = lambda *given, **more: Row(status="unavailable", settings=given[1])
    reached = ceilings.measured(nothing)  # as in a replay of rows that have none
    assert not reached.products and reached.step_s(None, "fp8") is None and findings.ceilings_words(reached) == ""


def test_a_ceiling_is_held_for_as_long_as_it_was_warmed_up(nvml):
    calls = []

    def run():
        calls.append(time.perf_counter())
        time.sleep(0.001)

    columns = comparison.by_itself(run, 4, None, None, True, held_s=0.1)
    assert columns["n"] == 4 and columns["latency_p50"] == pytest.approx(0.001, rel=0.5)
    assert 0.05 < columns["proof"]["timed_s"] < 0.3 and columns["telemetry"]["sm_clock_avg_mhz"] == 1800
    assert calls[-1] - calls[0] > 0.15  # warm-up and samples
    slow = comparison.by_itself(lambda: time.sleep(0.02), 100, None, None, True, held_s=0.02)
    assert slow["n"] == 3  # of what takes long no more is asked than a median needs


def test_every_kernel_has_a_row_of_its_own(machine):
    rows = attention.timed(Timed(), 64, 2)
    assert [r.setting("kernel") for r in rows] == list(kinds.ATTENTION)
    assert {tuple(r.setting("shape")) for r in rows} == {(1, 24, 64, 128)} and rows[0].n == 2
    assert {r.family for r in rows} == {families.ATTENTION.name} and rows[1].label == kinds.ATTENTION["cudnn"][0]


def test_every_format_is_measured_once():
    names = [q.settings["quantization"] for q in quantizers()]
    assert len(set(names)) == len(names) and all(q.family is families.QUANTIZATION for q in quantizers())
    for own in (kinds.TORCHAO, kinds.BITSANDBYTES, kinds.GGUF, kinds.QUANTO):
        assert sum(any(name.endswith(f" {kind}") for kind in own) for name in names) >= len(own)


# --- compilation ---


def variant(label, speedup, first_s):
    about = {"status": "ok", "label": label, "first_s": first_s, "family": families.COMPILATION.name, "n": 3}
    low, high = speedup - 0.05, speedup + 0.05
    return Row(speedup=speedup, speedup_ci_low=low, speedup_ci_high=high, baseline="b", session="one", **about)


def test_the_plainest_variant_stands_beside_the_fastest():
    eager = variant("eager", 1.0, 2.0)
    rows = [eager, variant("plain", 1.3, 20.0), variant("all of it", 1.5, 40.0)]
    plain = "plain: 1.30× (range of three rounds [1.25, 1.35]) after a first image in 20 s; "
    assert findings.plainest_sentence(rows) == (
        f"{plain}faster beyond the noise, all of it: 1.50× (range of three rounds [1.45, 1.55]) after a first image in "
        "40 s."
    )
    alone = f"{plain}no other variant is faster than that beyond the noise."  # it is faster than the baseline itself
    assert findings.plainest_sentence(rows[:2]) == alone
    near = replace(rows[2], speedup=1.35, speedup_ci_low=1.3, speedup_ci_high=1.4)
    assert findings.plainest_sentence([*rows[:2], near]) == alone
    slow = replace(rows[1], speedup=1.0, speedup_ci_low=0.9, speedup_ci_high=1.1)
    assert findings.plainest_sentence([eager, slow]).endswith(
        "no variant is faster than the baseline beyond the noise."
    )
    gone = Row(label="gone", status="unavailable", reason="needs a GPU")
    assert findings.plainest_sentence([eager, gone]).startswith("no variant can run here")


# --- what is out of the ordinary ---


def timed(**changed):
    """A row of a session with nothing odd about it."""
    own = {"session": "s", "samples": [1.0] * 10, "n": 10, "stable": 1, "baseline": "b", "id": "a", "warmup_s": 3.0}
    own |= {"speedup": 1.5, "speedup_ci_low": 1.45, "speedup_ci_high": 1.55, "family": families.FIRST_BLOCK.name}
    own["telemetry"] = {"sm_clock_avg_mhz": 1900, "throttle_reasons": [], "power_limited": 0.1, "other_load_cores": 0.1}
    return measured.row(**own | changed)


def noted(**changed):
    return timed(telemetry=timed().telemetry | changed, id="odd")


@pytest.mark.parametrize(
    ("odd", "what", "most"),
    [
        (timed(speedup_ci_low=1.2, id="odd"), "wide interval", "1.20× to 1.55×"),
        (timed(speedup=0.9, speedup_ci_low=0.88, speedup_ci_high=0.92, id="odd"), "slower", "0.90×"),
        (timed(stable=0, id="odd"), "unsteady", "3 s of warm-up"),
        (noted(throttle_reasons=["hardware slowdown"]), "throttled", "hardware slowdown"),
        (noted(power_limited=0.8), "power limit", "80% of the samples"),
        (noted(sm_clock_avg_mhz=1600), "low clock", "1,600 MHz"),
        (noted(other_load_cores=1.25), "other load", "1.2 cores"),
    ],
)
def test_what_is_out_of_the_ordinary_is_found_by_rule(odd, what, most):
    found = of_machine.anomalies([timed(), odd, timed()])
    assert list(found.index) == [what] and what in of_machine.RULES
    assert dict(found.iloc[0]) == {
        "notebook": odd.notebook, "session": "s", "rows": 1, "most": most, "of": odd.label, "row": "odd",
    }  # fmt: skip


def test_a_baseline_that_takes_another_time_in_another_session_has_drifted():
    base = timed(family=families.BASELINE.name, speedup=1.0, speedup_ci_low=0.99, speedup_ci_high=1.01, latency_p50=4.0)
    later = replace(base, session="t", latency_p50=4.4, id="later")
    (found,) = of_machine.anomalies([base, later]).itertuples()
    assert (found.Index, found.most, found.row) == ("drift", "4 s and 4.4 s", "later")
    assert of_machine.anomalies([base, replace(later, latency_p50=4.1)]) is None
    assert of_machine.anomalies([base, replace(later, steps=4)]) is None  # another baseline


def test_rows_that_show_nothing_odd_have_no_table():
    for rows in ([], [timed()], [timed(stable=0, session=None)], [timed(stable=0, status="oom")], [timed(samples=None)],
                 [timed(telemetry=None, speedup=None, speedup_ci_low=None, stable=None)]):  # fmt: skip
        assert of_machine.anomalies(rows) is None


def test_of_what_is_odd_several_times_the_furthest_is_shown():
    rows = [noted(other_load_cores=load) for load in (1.0, 3.0)]
    (found,) = of_machine.anomalies(rows).itertuples()
    assert (found.rows, found.most) == (2, "3 cores")
