"""What rows of several use cases say: where something pays differently, what a mask and a condition ask for."""

import math
from dataclasses import replace

import measured
import pytest

from fluxnb import findings
from fluxnb.families import FIRST_BLOCK, TEACACHE
from fluxnb.findings.caches import UNJUDGED
from fluxnb.findings.use_cases import of_cases


def base(**changed):
    return measured.row(**{"again": [0.4] * 10, "n": 10, "speedup_ci_low": 0.99, "speedup_ci_high": 1.01} | changed)


def fast(speedup, apart=0.1, **changed):
    about = {"n": 10, "baseline": "b", "images": 4, "psnr_min_db": 30.0, "psnr_identical": 0}
    ends = {"speedup_ci_low": speedup - apart, "speedup_ci_high": speedup + apart}
    return measured.cached(0.2, speedup, 32.0, 12.0, **about | ends | changed)


def test_one_use_case_pays_more_than_another_only_beyond_the_noise():
    def said(a, b):
        return findings.pays_differently({"a": [base(), a], "b": [base(), b]})

    assert said(fast(3.9), fast(3.2)) == [
        "FBCache 0.2: it pays more in **a, 3.90× (95 % interval [3.80, 4.00], n = 10)** than in **b, 3.20× (95 % "
        "interval [3.10, 3.30], n = 10)**."
    ]
    level = "FBCache 0.2: **3.20× to 3.90×**, and no two use cases can be told apart beyond the noise."
    assert said(fast(3.9, 0.5), fast(3.2, 0.5)) == [level]
    earlier = {"n": 3, "baseline": None}  # a row of an earlier format with three rounds has no interval
    assert said(fast(3.9, **earlier), fast(3.2, **earlier)) == [level]
    few = said(fast(3.9, n=3), fast(3.2, n=3))[0]
    assert "range of three rounds [3.80, 4.00]" in few and "95 %" not in few
    assert findings.pays_differently({"a": [base(), fast(3.4)]}) == []


def test_of_three_the_two_that_are_told_apart_are_named():
    """The extremes overlap, as "1.99x (inpainting) to 2.40x (ControlNet inpainting)" did; two between them don't."""
    cases = {"wide": fast(1.9, 0.6), "low": fast(2.0), "high": fast(2.4)}
    (said,) = findings.pays_differently({case: [base(), r] for case, r in cases.items()})
    assert "more in **high, 2.40×" in said and "than in **low, 2.00×" in said and "wide" not in said


def test_two_sessions_are_not_set_beside_each_other():
    cases = {"a": fast(2.0, session="one"), "b": fast(3.0, session="one"), "c": fast(9.0, session="two")}
    (said,) = findings.pays_differently({case: [base(), r] for case, r in cases.items()})
    assert "9.00" not in said and "more in **b, 3.00×" in said


def test_the_noise_of_either_baseline_counts():
    noisy = base(speedup_ci_low=0.5)
    (said,) = findings.pays_differently({"a": [base(), fast(3.9)], "b": [noisy, fast(3.2)]})
    assert "no two use cases" in said


def test_where_it_is_faster_and_what_its_worst_image_is():
    cases = {
        "txt2img": [base(), fast(2.0, psnr_min_db=36.0)],
        "img2img": [base(), fast(1.1, 0.3)],
        "inpainting": [base(), fast(0.8, psnr_min_db=21.0)],
        "ControlNet": [base(), fast(2.1, status="oom")],
    }
    said = findings.use_cases_sentence(cases, FIRST_BLOCK)
    assert said.startswith(
        "FBCache 0.2 is faster than its baseline in txt2img, within the noise of its baseline in img2img, slower than "
        "its baseline in inpainting; it pays more in **txt2img"
    )
    assert "furthest from the uncached ones in inpainting: worst of 4 images 21.0 dB" in said
    assert (
        "near-lossless (worst image 35 dB or more) in txt2img; balanced (worst image 28 dB or more) in txt2img, img"
        in said
    )
    kept = {case: [base(), fast(2.0, psnr_min_db=36.0)] for case in ("a", "b")}
    assert findings.use_cases_sentence(kept, FIRST_BLOCK).endswith(
        "balanced (worst image 28 dB or more) in all of them."
    )
    ruined = {"a": [base(), fast(2.0, psnr_min_db=16.0, adherence=1.0)]}  # adherence can't tell
    assert findings.use_cases_sentence(ruined, FIRST_BLOCK).endswith("balanced (worst image 28 dB or more) in none.")
    assert findings.use_cases_sentence(cases, TEACACHE) == "TeaCache could not be measured in any use case."


def test_without_an_interval_nothing_is_faster_and_without_images_it_is_time_only():
    own = {"n": 3, "baseline": None, "stack": "cached", "images": None, "ssim": None, "psnr_min_db": None}
    full = {case: [base(), fast(3.0, **own)] for case in ("a", "b")}
    said = findings.use_cases_sentence(full, "cached")
    assert said.startswith(
        "cached is without an interval, so not told from its baseline, in a and b; **3.00× to 3.00×**"
    )
    assert said.endswith("This is time only.")
    old = {"a": [base(), fast(3.0, images=None)]}
    assert findings.use_cases_sentence(old, FIRST_BLOCK).endswith(UNJUDGED)


def test_a_use_case_has_its_own_baseline_and_speedups():
    cases = {
        "txt2img": [base(latency_p50=0.4), fast(2.0, stack="cached")],
        "img2img": [base(latency_p50=0.3), fast(1.5, status="oom")],
    }
    table = findings.use_case_table(cases)
    assert list(table["baseline"]) == [0.4, 0.3] and table.attrs["units"]["baseline"] == "s"
    assert table.loc["txt2img", "cached"] == 2.0 and math.isnan(table.loc["img2img", "cached"])


def test_a_cache_is_one_acceleration_whether_or_not_a_controlnet_is_held():
    own = {"threshold": 0.2, "inputs": "b"}
    held = fast(1.8, label="held", settings=own | {"hold_controlnet": True})
    every = fast(1.4, label="every step", settings=own)
    cases = {"txt2img": [base(), fast(2.0, settings=own | {"inputs": "a"})], "ControlNet": [base(), held, every]}
    table = findings.use_case_table(cases)
    assert list(table["FBCache 0.2"]) == [2.0, 1.8] and table.loc["ControlNet", "every step"] == 1.4
    assert findings.use_cases_sentence(cases, FIRST_BLOCK).startswith(
        "First Block Cache is faster than its baseline in txt2img and ControlNet"
    )


def test_what_lies_outside_the_mask_stands_beside_the_vae_alone():
    kept = base(kept_db=39.8, kept_vae_db=40.0, psnr_inside_db=30.0)
    lost = replace(kept, label="cached", kept_db=35.0)
    assert "kept at 39.8 dB where most is lost (28 steps)" in findings.kept_sentence({"inpainting": [kept]})
    said = findings.kept_sentence({"inpainting": [kept, lost]})
    assert "35.0 dB where most is lost (cached)" in said and said.endswith("the VAE alone keeps 40.0 dB: -5.0 dB.")
    assert findings.kept_sentence({"txt2img": [base()]}) == "Nothing was inpainted here."
    table = of_cases({"inpainting": [kept, replace(lost, status="oom")]}, findings.MASK)
    assert table.loc["inpainting: 28 steps", "inside"] == 30.0 and table.loc["inpainting: cached", "status"] == "oom"
    assert table.attrs["units"]["VAE alone"] == "dB"


@pytest.mark.parametrize(
    ("accelerated", "end"),
    [
        (0.75, "of the accelerated ones FBCache 0.2 agrees least, to 75%."),
        (0.798, "none of the accelerated ones agrees less."),  # 80 % of 80 %
        (None, "a ControlNet."),
    ],
)
def test_agreement_with_a_condition_in_words(accelerated, end):
    cases = {"ControlNet txt2img": [base(agreement=0.8), fast(2.0, agreement=accelerated)]}
    said = findings.agreement_with_condition(cases, {"embedded": 0.3}, "edges")
    assert said.startswith("ControlNet txt2img: images agree with the given edges to 80%, to 30% without a ControlNet")
    assert said.endswith(end)
    assert "without" not in findings.agreement_with_condition(cases, {}, "edges")


# --- number formats ---


def quantized(kind, speedup, **changed):
    """Compiled, in a torchao kind, or in none."""
    own = {"quantization": f"torchao {kind}"} if kind else {}
    about = {
        "label": f"{kind or 'not quantized'}, compiled",
        "family": "stack",
        "technique": "stack",
        "exact": "another image",
    }
    settings = {"dtype": "float32", "inputs": "a", "compile": "blocks", **own}
    return fast(
        speedup,
        0.05,
        **about | {"settings": settings, "computed_steps": 28.0, "id": kind} | {"st_lpips_max": 0.01} | changed,
    )


def test_the_best_quantization_reaches_the_floor_and_within_the_noise_is_the_simplest():
    def chosen(*others):
        return {line["goal"].split()[0]: line["choose"] for line in findings.best_formats({"a": [base(), *others]}, {})}

    compiled = quantized(None, 1.3, exact="rounding", psnr_min_db=50.0)
    far, near = quantized("int8", 2.0, psnr_min_db=20.0), quantized("fp8 row", 1.6, psnr_min_db=36.0)
    best = {"lossless": compiled.label, "near-lossless": near.label, "balanced": near.label}
    assert chosen(compiled, far, near) == best
    assert chosen(compiled, far, replace(near, speedup=1.32, speedup_ci_low=1.25)) == dict.fromkeys(
        best, compiled.label
    )
    assert chosen(far, replace(near, status="oom")) == dict.fromkeys(best, "28 steps, as it is")
    cached = replace(near, label="cached", speedup=9.0, speedup_ci_low=8.9, speedup_ci_high=9.1, computed_steps=12.0)
    bare = base(speedup=None, speedup_ci_low=None, speedup_ci_high=None)
    assert {line["choose"] for line in findings.best_formats({"a": [bare, near]}, {})} == {"28 steps, as it is"}
    assert findings.best_formats({"a": [replace(bare, status="oom"), near]}, {}) == []
    assert chosen(compiled, cached, near) == best  # what skips steps is no number format


def test_at_full_size_quality_is_that_of_the_very_same_on_trained_weights():
    random = {"weights": "random", "model": "flux-dev-random", "images": None, "psnr_min_db": None, "ssim": None}
    full = {"a": [base(**random), quantized("int8", 2.0, **random), quantized("fp8 row", 1.5, **random)]}
    judged = [base(), quantized("int8", 1.0, psnr_min_db=20.0), quantized("fp8 row", 0.9, psnr_min_db=30.0)]
    lines = findings.best_formats(full, {"a": judged})
    assert [line["choose"] for line in lines] == ["28 steps, as it is", "28 steps, as it is", "fp8 row, compiled"]
    assert lines[-1]["speedup"] == 1.5 and lines[-1]["worst PSNR"] == 30.0 and lines[-1]["judged"] == 4
    said = findings.best_formats_sentence(lines)
    assert said.startswith("**lossless (40 dB), near-lossless (35 dB)**: 28 steps, as it is in every use case. ")
    assert said.endswith("**balanced (28 dB)**: fp8 row, compiled in every use case.")
    assert findings.best_formats(full, {})[-1]["choose"] == "28 steps, as it is"  # nobody looked
    table = findings.best_formats_table([line | {"n": 5} for line in lines])
    assert "10 rounds, and here are 5" in table.attrs["note"] and len(table) == 3


def test_a_slower_number_format_is_said_to_take_longer_and_three_images_are_a_range():
    slow = fast(0.125, 0.005, n=3, label="float32", family="number format")
    cases = {"a": [base(), slow], "b": [base(), replace(slow, status="oom", reason="memory", speedup=None)]}
    said = findings.formats_sentence(cases)
    range_ = "float32 takes **8.00 times** as long as 28 steps (3 images of each: a range, not an interval)"
    assert said == f"{range_}; float32 can't be measured in b (memory)."
    table = of_cases(cases, findings.FORMATS)
    assert table.loc["b: float32", "why not"] == "memory" and "below n = 6 its range" in table.attrs["note"]
    assert findings.formats_sentence({"a": [base()]}) == "no other number format was measured here."
