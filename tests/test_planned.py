"""What the plans ask of caches in so many words: four steps, the package's own, two images and memory."""

from dataclasses import replace

import pytest
from test_caches import few, row

from fluxnb import findings, study
from fluxnb.cache import first_block
from fluxnb.families import BASELINE, COMBINED, FEWER_STEPS, FIRST_BLOCK, TEACACHE
from fluxnb.findings import published
from fluxnb.study.inferences import both_images


def of_four(family, label, computed, speedup, worst, **other):
    """A setting of a model of four steps."""
    return row(family, label, computed, speedup, worst, steps=4, total_steps=4, model="embedded-schnell", **other)


@pytest.fixture
def four():
    return [
        of_four(BASELINE, "4 steps", 4, 1.0, None, apart=0.02, again=[0.4] * 10),
        of_four(FIRST_BLOCK, "FBCache 0.3", 4, 0.99, None, threshold=0.3, apart=0.02),
        of_four(FIRST_BLOCK, "FBCache 0.5", 3, 1.3, 29.0, threshold=0.5, apart=0.02),
        of_four(FIRST_BLOCK, "FBCache 0.8", 2, 1.9, 22.0, threshold=0.8, apart=0.02),
        of_four(FEWER_STEPS, "3 steps", 3, 1.35, 31.0, apart=0.02),
        of_four(FEWER_STEPS, "2 steps", 2, 2.0, 26.0, apart=0.02),
    ]


def test_at_four_steps_what_skips_stands_beside_fewer_of_them_and_the_plans_speedup(four):
    assert findings.skipping_sentence(four, FIRST_BLOCK) == (
        "of 3 settings of First Block Cache, 2 skip some of 4 steps, and the fastest that keeps a worst image of 28 dB "
        "is FBCache 0.5 **1.30×** [1.28, 1.32], worst 29.0 dB, 100% of the prompts' facts found (all steps: 100%); "
        "that is slower than fewer steps, 3 steps **1.35×** [1.33, 1.37], worst 31.0 dB. Where it computes as many "
        "steps, its worst image is below that of fewer steps: -3.0 dB on average (-4.0 to -2.0 dB, 2 settings). "
        "The plan's 2× at 28 dB: not met."
    )


def test_a_negative_answer_is_said(four):
    ruined = [replace(r, psnr_min_db=20.0) if r.label == "FBCache 0.5" else r for r in four]
    said = findings.skipping_sentence(ruined, FIRST_BLOCK)
    assert (
        "2 skip some of 4 steps, but none that does keeps a worst image of 28 dB and is faster beyond the noise" in said
    )
    assert "; nearest is FBCache 0.8, 1.90× at worst of 6 images 22.0 dB" in said
    assert "; fewer steps do both, 3 steps **1.35×**" in said
    assert "2 steps" not in findings.skipping_sentence(four[:2], FIRST_BLOCK)
    assert findings.skipping_sentence(four[:2], FIRST_BLOCK).endswith(
        "skips any of 4 steps (FBCache 0.3), so none gains a thing."
    )
    assert findings.skipping_sentence(four, TEACACHE) == "no setting of TeaCache was timed and judged here."


def test_one_setting_is_no_choice_of_several(four):
    one = [four[0], *(r for r in four if r.label in ("FBCache 0.8", "3 steps"))]
    said = findings.skipping_sentence(one, FIRST_BLOCK)
    assert said.startswith("the one setting of First Block Cache here skips some of 4 steps, but none that does keeps")


def test_three_rounds_are_no_verdict(four):
    said = findings.skipping_sentence(few(four), FIRST_BLOCK)
    assert said.endswith("The plan's 2× at 28 dB: can't be told. A verdict takes 10 rounds, and these have 3.")


def test_the_packages_own_is_set_beside_ours_at_the_same_threshold(four):
    own = of_four(FIRST_BLOCK, "para-attn FBCache 0.5", 3, 1.2, 29.0, apart=0.02)
    own = replace(own, settings={"threshold": 0.5, "backend": "para-attn"})
    said = findings.package_sentence([*four, own])
    assert "at 1 of 1 thresholds; it is slower than ours at 1 (para-attn FBCache 0.5 **1.20×**, ours 1.30×)" in said
    assert "at 0 of 1" in findings.package_sentence([*four, replace(own, psnr_min_db=27.0)])
    lacking = replace(own, status="unavailable", reason="needs para-attn", speedup=None)
    assert findings.package_sentence([*four, lacking]).endswith("can't be set beside ours: needs para-attn.")


def test_memory_is_what_the_peak_has_over_the_uncached_one(four):
    uncached, cached = replace(four[0], memory_peak_gib=33.0), replace(four[1], memory_peak_gib=33.0 + 48 / 1024)
    assert findings.memory_sentence([uncached, cached]).endswith("33 GiB: FBCache 0.3 +48 MiB.")
    assert "was not measured here" in findings.memory_sentence([replace(uncached, memory_peak_gib=None), cached])


def test_every_published_pair_is_read():
    found = published.inference_seconds()
    assert list(found) == [0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8] and found[0.1]["latency_total"] == 18.53


def test_a_combination_has_a_criterion_of_its_own(four):
    both = replace(four[2], family=COMBINED.name, label="both")
    assert findings.skipping_sentence([*four, both], COMBINED).endswith("The plan's 3× at 28 dB: not met.")


def test_two_images_after_loading_are_timed_kept_and_alike(begin):
    s, subject = begin()
    rows = study.first_and_second(s, subject, [study.plain(4), study.using(first_block(0.9), 4)], anew=False)
    assert [r.status for r in rows] == ["ok", "ok"] and all(len(r.samples) == 2 and r.speedup is None for r in rows)
    assert rows[1].computed_steps < rows[0].computed_steps == 4
    assert all(r.shown("both alike") for r in rows) and [len(both_images(s, r)) for r in rows] == [2, 2]
    frame = findings.inferences_table(rows)
    assert frame["total"].iloc[1] == pytest.approx(sum(rows[1].samples)) and frame["time left"].iloc[0] == 1
    assert "both are the same image at 2 of them" in findings.inferences_sentence(rows)
    again = study.first_and_second(s, subject, [study.plain(4)], anew=False)
    assert again[0].id == rows[0].id  # found, not made again
