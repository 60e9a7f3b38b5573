"""Minutes on end: a drift, a leak and an image that changes are each found."""

import itertools
import time
from dataclasses import replace

import measured
import pytest
import studied

from fluxnb import findings, study
from fluxnb.study import soak
from fluxnb.study.subject import Loaded, Subject


@pytest.fixture
def run(begin, monkeypatch):
    """A function that soaks a pipeline that makes noise; `takes` has the seconds of each image, `image` changes it."""

    def soaked(takes=lambda i: 0.001, image=lambda i, made: made, memory=lambda i: (0.0, 1.0), seconds=1.0):
        counts, made, held = itertools.count(), studied.noise([]), itertools.count()

        def batch(self, inputs, steps):
            time.sleep(takes(i := next(counts)))
            return [image(i, each) for each in made(self, inputs, steps)]

        monkeypatch.setattr(Subject, "load", studied.load)
        monkeypatch.setattr(Loaded, "batch", batch)
        monkeypatch.setattr(soak, "_memory", lambda device: memory(next(held)))
        s, subject = begin()
        return s, subject, soak.soak(s, subject, study.plain(4), seconds, "asked for")

    return soaked


def test_it_is_one_row_that_says_what_every_tenth_was_like_and_is_found_again(run, nvml):
    s, subject, row = run()
    assert row.ok and row.technique == soak.SOAK and row.setting("soak_s") == 1.0 and row.label.endswith(", 1 s")
    assert row.n == len(row.samples) == sum(part["images"] for part in row.shown("parts"))
    assert sum(row.samples) > 0.2 and row.shown("others") == 0
    assert row.telemetry["throttle_reasons"] and row.gpu_util_avg == 60
    table = findings.soak_table(row)
    assert list(table["images"]) == [part["images"] for part in row.shown("parts")]
    assert set(table["temperature"].dropna()) == {71} and set(table.attrs["units"]) <= set(table.columns)
    assert soak.soak(s, subject, study.plain(4), 1.0) == row
    assert "by software thermal slowdown" in findings.soak_sentence([row])  # which the fake GPU has


def test_what_stays_as_it_was_is_stable(run):
    row = run()[2]
    assert "SM clock" not in findings.soak_table(row) and "GPU" in findings.soak_table(row)
    said = findings.soak_sentence([replace(row, samples=[0.004] * row.n)])  # whatever else the machine is doing
    assert said.startswith("**stable** for") and "of 4 steps, 1 s (asked for)" in said
    assert "grew by less than 0.1 GiB" in said and said.endswith("every image is the same.")


def test_a_planted_drift_is_found(run):
    said = findings.soak_sentence([run(takes=lambda i: 0.001 * (1 + i))[2]])
    assert said.startswith("**not stable**") and "within the noise" not in said and "%)" in said


def test_a_planted_leak_is_found(run):
    said = findings.soak_sentence([run(memory=lambda i: (0.05 * i, 1.0))[2]])
    assert said.startswith("**not stable**") and "memory of the GPU grew by" in said and "the process" not in said


def test_a_planted_change_of_an_image_is_found(run):
    def once(i, made):
        return made.transpose(0) if i == 20 else made

    said = findings.soak_sentence([run(image=once)[2]])
    assert said.startswith("**not stable**") and said.endswith("and 1 of them differs from the first.")


def test_what_cannot_run_is_a_row_that_says_why(run):
    def broken(i):
        raise RuntimeError("no kernel")

    row = run(takes=broken)[2]
    assert row.status == "error" and "no kernel" in findings.soak_sentence([row])


def test_what_is_recommended_is_run_and_where_nothing_is_that_is_said(begin, monkeypatch):
    s, subject = begin()
    candidate, origin = findings.to_soak(s, subject)
    assert candidate == study.plain(s.steps(subject)) and "no rows recommend anything" in origin
    ten = {"n": 10, "samples": [0.4] * 10, "session": "s", "images": 8, "psnr_db": None, "psnr_identical": 8}
    own = {"again": [0.4] * 10, "speedup_ci_low": 1.0, "speedup_ci_high": 1.0}
    base = measured.row(**ten | own | {"id": "b", "notebook": "13_final_stack"})
    fast = measured.cached(
        0.2,
        2.0,
        40.0,
        9.0,
        **ten
        | {
            "samples": [0.2] * 10,
            "baseline": "b",
            "psnr_min_db": 39.0,
            "psnr_identical": 0,
            "st_lpips_max": 0.01,
            "speedup_ci_low": 2.0,
            "speedup_ci_high": 2.0,
            "latency_p50": 0.2,
        },
    )
    for row in (base, fast):
        s.results.append(row.as_dict())
    candidate, origin = findings.to_soak(s, subject)
    assert candidate.settings["threshold"] == 0.2
    assert origin == "recommended as near-lossless (35 dB) by the rows of this run"


@pytest.mark.parametrize("proof", [None, {"parts": [], "others": 0}])
def test_a_soak_of_few_images_tells_nothing_and_without_a_gpu_says_nothing_of_clocks(proof):
    about = {"technique": soak.SOAK, "settings": {"soak_s": 600.0}, "proof": proof}
    few = findings.soak_sentence([measured.row(**about, samples=[0.4] * 2, n=2)])
    assert few == "nothing was run for minutes: 2 of 28 steps are too few images to tell."
    said = findings.soak_sentence([measured.row(**about, samples=[0.4] * 30, n=30)])
    assert "those of the last minute take" in said and "None" not in said and "clocks" not in said
