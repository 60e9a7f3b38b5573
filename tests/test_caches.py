"""What rows of caches say, on rows that have what real ones have: few rounds, two sessions, figures that saturate."""

import math
from dataclasses import replace

import pytest

from fluxnb import findings
from fluxnb.families import (
    BASELINE,
    COMBINED,
    FEWER_STEPS,
    FIRST_BLOCK,
    INTERVAL,
    SCHEDULE,
    SECOND_ORDER,
    TEACACHE,
)
from fluxnb.findings.caches import UNJUDGED, images_words, met
from fluxnb.study.row import Row


def row(family, label, computed, speedup, worst, n=10, apart=0.1, threshold=None, **other):
    """A setting; `worst` is the PSNR of its worst image, its mean is 2 dB more, and None means identical images."""
    latency, steps = 0.4 / speedup, computed if family.control else 28
    columns = {
        "id": label, "family": family.name, "label": label, "steps": steps, "total_steps": steps, "weights": "trained",
        "settings": {} if threshold is None else {"threshold": threshold}, "model": "embedded", "status": "ok",
        "computed_steps": float(computed), "n": n, "samples": [latency] * n, "latency_p50": latency, "baseline": "b",
        "speedup": speedup, "speedup_ci_low": speedup - apart, "speedup_ci_high": speedup + apart, "session": "one",
        "images": 6, "psnr_db": worst and worst + 2, "psnr_min_db": worst, "psnr_identical": 0 if worst else 6,
        "ssim": 0.9, "adherence": 1.0, "adherence_min": 1.0, "first_s": 0.5, "denoise_s": latency,
    }  # fmt: skip
    return Row(**columns | other)


@pytest.fixture
def rows():
    """Adherence is 100 % everywhere, whatever the images look like: as it was in 477 of 500 rows."""
    return [
        row(BASELINE, "28 steps", 28, 1.0, None, apart=0.02, again=[0.4] * 10),
        row(FIRST_BLOCK, "FBCache 0", 28, 0.99, None, threshold=0.0, apart=0.02),
        row(FIRST_BLOCK, "FBCache 0.05", 20, 1.4, 40.0, threshold=0.05),
        row(FIRST_BLOCK, "FBCache 0.2", 10, 2.5, 30.0, threshold=0.2),
        row(FIRST_BLOCK, "FBCache 0.5", 4, 5.0, 22.0, threshold=0.5),
        row(FEWER_STEPS, "20 steps", 20, 1.4, 36.0),
        row(FEWER_STEPS, "10 steps", 10, 2.8, 28.5),
        row(FEWER_STEPS, "3 steps", 3, 7.0, 16.0),
    ]


def few(rows):
    """The same with three rounds each, whose range is wide."""
    return [replace(r, n=3, samples=r.samples[:3], speedup_ci_low=0.8 * r.speedup) for r in rows]


# --- floors, and noise ---


def test_each_floor_names_the_fastest_whose_worst_image_keeps_it(rows):
    said = findings.cache_sentence(rows, FIRST_BLOCK)
    near, balanced = said.split(". Balanced")
    assert near == (
        "near-lossless (worst image 35 dB or more): FBCache 0.05 **1.40×** (95 % interval [1.30, 1.50], n = 10; 20.0 "
        "of 28 steps computed; worst of 6 images 40.0 dB, mean 42.0 dB). That is as fast within the noise as the "
        "fastest of fewer steps here: 20 steps **1.40×** (95 % interval [1.30, 1.50], n = 10; 20 steps; worst of 6 "
        "images 36.0 dB, mean 38.0 dB)"
    )
    assert "FBCache 0.2 **2.50×**" in balanced
    assert "That is slower than the fastest of fewer steps here: 10 steps **2.80×**" in balanced
    assert "FBCache 0.5" not in said  # 100 % adherence, and a ruin
    equal = ". At equal computed steps its worst image is above that of fewer Euler steps: +3.2 dB on average"
    assert said.endswith(f"{equal} (+1.5 to +4.2 dB, 3 settings).")
    better = [row(SECOND_ORDER, f"DPM-Solver++, {n} steps", n, 1.4, p) for n, p in ((20, 43.0), (10, 33.0))]
    said = findings.cache_sentence([*rows, *better], FIRST_BLOCK)  # what beats one control may lose to the other
    assert said.endswith(
        "; below that of fewer steps of the second-order solver: -3.0 dB on average (-3.0 to -3.0 dB, 2 settings)."
    )


def test_a_mean_above_the_floor_keeps_no_floor(rows):
    good_mean = replace(rows[4], psnr_db=60.0, psnr_min_db=20.0, label="one ruin among five")
    assert "one ruin" not in findings.cache_sentence([*rows, good_mean], FIRST_BLOCK)
    assert "one ruin" not in findings.criteria_sentence([*rows, good_mean])


def test_what_is_as_fast_within_the_noise_and_nearer_is_named_and_chosen(rows):
    luckier = row(FIRST_BLOCK, "FBCache 0.21", 10, 2.55, 28.1, threshold=0.21)
    said = findings.cache_sentence([*rows, luckier], FIRST_BLOCK)
    assert "mean 30.1 dB); FBCache 0.2 as fast within the noise, worst of 6 images 30.0 dB, mean 32.0 dB." in said
    assert list(findings.presets([*rows, luckier], FIRST_BLOCK)["threshold"]) == [0.05, 0.2, 0.5]


def test_what_is_said_of_two_settings_holds_for_the_two_that_are_named(rows):
    """Each within the noise of the next, the ends apart: as three rounds on a busy machine had it."""
    chain = [
        row(FIRST_BLOCK, "FBCache 0.12", 14, 1.6, 39.0, threshold=0.12, speedup_ci_high=1.77, speedup_ci_low=1.56),
        row(FIRST_BLOCK, "FBCache 0.2", 9, 1.95, 35.5, threshold=0.2, speedup_ci_high=2.16, speedup_ci_low=1.71),
        row(SECOND_ORDER, "DPM-Solver++, 8 steps", 8, 2.59, 36.0, speedup_ci_high=3.31, speedup_ci_low=2.31),
        row(FEWER_STEPS, "14 steps", 14, 1.73, 36.5, speedup_ci_high=2.4, speedup_ci_low=1.38),
    ]
    said = findings.cache_sentence([rows[0], *chain], FIRST_BLOCK)
    assert said.count("(worst image") == said.count("FBCache 0.2 **1.95×**") == 2
    assert said.count("That is slower than the fastest of fewer steps here: DPM-Solver++, 8 steps **2.59×**") == 2


def test_nothing_is_fast_that_the_noise_hides(rows):
    hidden = [rows[0], replace(rows[2], speedup_ci_low=0.9), replace(rows[5], speedup_ci_low=0.9)]
    said = findings.cache_sentence(hidden, FIRST_BLOCK)
    nothing = "no setting of First Block Cache here is that near and faster than the baseline beyond the noise; "
    assert said.count(f"{nothing}no fewer steps timed here (20 steps) are, either") == 2
    assert f"{nothing}fewer steps are: 20 steps" in findings.cache_sentence([*hidden[:2], rows[5]], FIRST_BLOCK)
    assert findings.cache_sentence(hidden[:2], FIRST_BLOCK).count(f"{nothing}fewer steps weren't timed here") == 2
    said = findings.cache_sentence([rows[0], rows[2], hidden[2]], FIRST_BLOCK)  # which were tried, stands beside it
    assert said.count("; no fewer steps timed here (20 steps) are that near and faster beyond the noise") == 2


def test_three_rounds_are_a_range_and_no_interval(rows):
    said = findings.cache_sentence(few(rows), FIRST_BLOCK)
    assert "range of three rounds [2.00, 2.60]" in said and "95 %" not in said
    assert "as fast within the noise as the fastest of fewer steps here: 10 steps" in said  # 2.5 and 2.8 overlap now


def test_rows_that_do_not_say_how_many_images_were_judged_decide_nothing(rows):
    old = [replace(r, images=None, session=None, baseline=None, again=None, n=3) for r in rows]
    for said in (findings.cache_sentence(old, FIRST_BLOCK), findings.criteria_sentence(old)):
        assert said == UNJUDGED
    assert findings.combined_sentence(old) == findings.strategies_sentence(old) == UNJUDGED
    assert "speedup" not in findings.presets(old, FIRST_BLOCK)


def test_two_sessions_are_not_ranked_together(rows):
    other = replace(rows[3], label="of another day", session="two", speedup=9.0, speedup_ci_low=8.9, psnr_min_db=39.0)
    for said in (findings.cache_sentence([*rows, other], FIRST_BLOCK), findings.criteria_sentence([*rows, other])):
        assert "another day" not in said
    older = replace(rows[0], session="two", speedup_ci_high=9.0)  # another session's noise is not this one's
    assert findings.cache_sentence([older, *rows], FIRST_BLOCK) == findings.cache_sentence(rows, FIRST_BLOCK)


def test_images_in_words(rows):
    assert images_words(rows[0]) == "6 images identical"
    judged = replace(rows[3], images=1, st_lpips=0.01, st_lpips_max=0.1234)
    assert images_words(judged) == "worst of 1 image 30.0 dB, mean 32.0 dB, ST-LPIPS 0.12 at worst, mean 0.01"
    some = replace(judged, images=6, psnr_identical=2, st_lpips=None)  # a mean of those that differ
    assert images_words(some) == "worst of 6 images (2 identical) 30.0 dB, mean 32.0 dB"
    assert images_words(replace(rows[3], psnr_db=None, psnr_min_db=None)) == "images not judged"
    assert "6 images identical" in findings.cache_sentence(
        [rows[0], replace(rows[1], speedup=1.5, speedup_ci_low=1.4)], FIRST_BLOCK
    )


# --- presets and criteria ---


def test_presets_follow_from_the_rows(rows):
    table = findings.presets(rows, FIRST_BLOCK)
    assert list(table.index) == ["conservative", "balanced", "aggressive"]
    assert list(table["threshold"]) == [0.05, 0.2, 0.5] and list(table["speedup"]) == [1.4, 2.5, 5.0]
    assert list(table["worst PSNR"]) == [40.0, 30.0, 22.0] and list(table["plan's threshold"]) == [0.05, 0.12, 0.2]
    assert list(table["worst image at least"])[:2] == [35.0, 28.0] and math.isnan(table["worst image at least"].iloc[2])
    there = list(table["measured there"])
    assert there[0] == 1.4 and math.isnan(there[1]) and there[2] == 2.5  # 0.12 was not measured
    assert list(table["expected there"].dropna()) == ["can't be told"] * 2  # 1.3 to 1.5, asked 1.5


def test_a_preset_that_nothing_fits_is_empty(rows):
    table = findings.presets([rows[0], rows[4]], FIRST_BLOCK)
    assert math.isnan(table["threshold"].iloc[0]) and table["threshold"].iloc[2] == 0.5
    none = findings.presets([rows[0], rows[1]], FIRST_BLOCK)
    assert not {"threshold", "speedup", "session"} & set(none) and len(none) == 3


@pytest.mark.parametrize(
    ("low", "high", "n", "verdict"),
    [
        (2.1, 2.4, 10, "met"),
        (1.5, 1.9, 10, "not met"),
        (1.9, 2.4, 10, "can't be told"),
        (2.1, 2.4, 3, "can't be told"),
        (None, None, 10, "can't be told"),
    ],
)
def test_a_mark_is_reached_by_all_of_the_interval_of_ten_rounds(low, high, n, verdict):
    assert met(Row(n=n, speedup_ci_low=low, speedup_ci_high=high, baseline="b"), 2.0) == verdict


def test_the_plans_criteria_are_met_or_not_or_not_to_be_told(rows):
    tea = row(TEACACHE, "TeaCache 0.2", 20, 1.2, 36.0, apart=0.05)
    both = row(COMBINED, "Cascade", 9, 3.0, 30.0)
    said = findings.criteria_sentence([*rows, tea, both])
    assert "First Block Cache (asked: 2×): met; FBCache 0.2 **2.50×**" in said
    assert "TeaCache (asked: 1.3×): not met; TeaCache 0.2 **1.20×**" in said
    assert "Combined cache (asked: 3×): can't be told; Cascade **3.00×**" in said
    assert "on `embedded` over 28 steps" in said and "A verdict takes" not in said
    wide = replace(tea, label="TeaCache 0.3", speedup=1.19, speedup_ci_high=1.4, speedup_ci_low=1.1)
    assert "TeaCache (asked: 1.3×): can't be told" in findings.criteria_sentence([*rows, tea, wide])
    assert "no setting here is that near" in findings.criteria_sentence(rows)
    assert findings.criteria_sentence(few(rows)).endswith("A verdict takes 10 rounds, and these have 3.")


# --- caches against each other ---


def test_the_control_is_interpolated_between_its_neighbours_only(rows):
    assert findings.control_psnr(rows, 10) == 28.5
    assert findings.control_psnr(rows, 15) == pytest.approx(32.25)
    assert findings.control_psnr(rows, 2) is None and findings.control_psnr(rows, 28) is None
    only = [r for r in rows if r.label == "10 steps"]  # one row has no neighbour
    assert findings.control_psnr(only, 10) is None


def test_a_level_interval_is_called_level(rows):
    fixed = [row(INTERVAL, f"every {n}", c, 1.5, p) for n, c, p in ((2, 20, 40.0), (3, 4, 22.0))]
    own = [r for r in rows if r.label == "FBCache 0.05"]
    assert "is level with that of a fixed interval" in findings.interval_sentence([*own, *fixed], FIRST_BLOCK)
    assert "no setting" in findings.interval_sentence(rows, FIRST_BLOCK)
    below = row(FIRST_BLOCK, "worse", 20, 1.4, 35.0)
    mixed = findings.interval_sentence([*rows[3:5], below, *fixed], FIRST_BLOCK)
    assert "above at some settings and below at others" not in findings.interval_sentence([below, *fixed], FIRST_BLOCK)
    assert "below that of a fixed interval, which does not look: -5.0 dB (1 setting)" in findings.interval_sentence(
        [below, *fixed], FIRST_BLOCK
    )
    assert "above at some settings and below at others, compared with that of a fixed interval" in mixed


def test_work_counts_the_block_that_a_reused_step_has_run():
    traces = [{"reused_at": [None, "input", "residual", None]}, {"reused_at": [None, None, None, "input"]}]
    assert findings.steps_of_work(traces, 10) == (2.1 + 3) / 2


def test_combining_pays_only_beyond_the_noise_of_each_cache_alone(rows):
    both, alone = row(COMBINED, "Cascade 0.2/0.2", 9, 3.5, 36.0), "over either cache alone, as they are timed here"
    said = findings.combined_sentence([*rows, both])
    assert said.count(f"combining pays {alone}: Cascade") == 2 and "fewer steps: 10 steps **2.80×**" in said
    tea = row(TEACACHE, "TeaCache 0.2", 9, 3.6, 36.0)
    equal = "whether combining pays can't be told, one cache alone is as fast within the noise"
    assert findings.combined_sentence([*rows, both, tea]).count(equal) == 2
    faster = replace(tea, speedup=4.0, speedup_ci_low=3.9)
    assert findings.combined_sentence([*rows, both, faster]).count("combining doesn't pay") == 2
    none = findings.combined_sentence(rows)
    assert (
        none.count("no combination timed here is that near and faster beyond the noise; First Block Cache: FBCache")
        == 2
    )
    assert "whether combining pays" in findings.combined_sentence(few([*rows, row(COMBINED, "Either", 9, 2.6, 30.0)]))


def test_what_a_combination_can_not_be_told_from_stands_beside_it_though_the_noise_hides_its_own_gain(rows):
    """An H100's 07: every 2nd step was nearer and as fast, of a wide interval that reached the baseline's."""
    own = [rows[0], row(COMBINED, "Both 0.2/0.1", 16, 1.4, 42.7), row(FIRST_BLOCK, "FBCache 0.1", 15, 1.5, 30.0)]
    wide = row(INTERVAL, "every 2nd", 18, 1.42, 45.1, speedup_ci_low=1.01, speedup_ci_high=1.6)
    near, balanced = findings.combined_sentence([*own, wide]).split(". Balanced")
    assert "alone, as they are timed here (it is no faster, beyond the noise, than fixed interval): Both" in near
    assert near.endswith("; fixed interval: every 2nd **1.42×** [1.01, 1.60], worst 45.1 dB")
    assert "one cache alone is as fast within the noise (it is no faster, beyond the noise, than fixed" in balanced


def test_where_nothing_was_timed_it_is_not_the_judging_that_lacks(rows):
    for said in (findings.cache_sentence(rows[:1], FIRST_BLOCK), findings.combined_sentence(rows[:1])):
        assert said == "no setting was timed here, so nothing is chosen."
    assert findings.criteria_sentence([rows[0], replace(rows[2], status="oom", speedup=None)]).startswith("no setting")


def test_caches_stand_beside_both_solvers_at_equal_steps(rows):
    second = row(SECOND_ORDER, "DPM-Solver++, 10 steps", 10, 2.5, 31.0)
    better_mean = row(FIRST_BLOCK, "a better mean", 9, 2.5, 29.0, psnr_db=50.0)
    table = findings.best_at_equal_steps([*rows, second, better_mean])
    assert list(table.index) == [20, 10] and table.loc[10, "best cache"] == "FBCache 0.2"
    assert table.loc[10, "gain, mean"] == table.loc[10, "gain, worst"] == 1.5
    assert table.loc[10, "DPM-Solver++ worst PSNR"] == 31.0 and math.isnan(table.loc[20, "DPM-Solver++ mean PSNR"])
    assert table.attrs["units"]["gain, mean"] == "dB" and table.loc[10, "row"] == "FBCache 0.2"


def test_the_nearest_strategy_is_named_beside_those_that_compute_no_more(rows):
    hold, taylor = row(TEACACHE, "hold", 10, 2.0, 30.0), row(TEACACHE, "Taylor 1", 12, 1.9, 36.0)
    fewer = row(TEACACHE, "limit", 9, 2.1, 31.0)
    said = findings.strategies_sentence([rows[0], hold, taylor])
    assert said.startswith("nearest to the uncached image at its worst is Taylor 1 **1.90×**")
    assert "of those that compute no more steps than hold, none is nearer than it: hold **2.00×**" in said
    said = findings.strategies_sentence([rows[0], hold, taylor, fewer])
    assert "no more steps than hold, limit **2.10×**" in said and "; hold itself: hold **2.00×**" in said
    assert "of those" not in findings.strategies_sentence([rows[0], taylor, hold])


# --- what a step costs ---


def test_the_cost_of_a_reused_step_is_found():
    """Latency = 0.2 s a computed step, 0.01 s a reused one: a reused one costs 5 % of a computed one."""
    rows = [row(FIRST_BLOCK, str(c), c, 1.0, None, denoise_s=0.2 * c + 0.01 * (28 - c)) for c in (28, 20, 14, 7, 3)]
    text = findings.hit_cost_sentence(rows)
    assert "200 ms" in text and "5.0%" in text
    other = [replace(r, session="two", denoise_s=2 * r.denoise_s) for r in rows[:4]]
    assert findings.hit_cost_sentence([*other, *rows]) == text  # seconds of two sessions aren't mixed
    assert findings.hit_cost_sentence(rows[:2]) == findings.hit_cost_sentence([]) == ""
    assert findings.hit_cost_sentence(rows[:1] * 3) == ""  # nothing was reused
    assert findings.hit_cost_sentence([replace(r, session=None) for r in rows]) == ""  # of any number of sessions
    assert findings.hit_cost_sentence([replace(r, denoise_s=None) for r in rows]) == ""


def test_a_replayed_schedule_is_named_as_one_with_the_seconds_of_its_own_ratio(rows):
    timed = row(SCHEDULE, "12 of 28", 12, 4.43, None, n=3, weights="random", latency_p50=1.14, session="two")
    said = findings.replay_sentence([rows[0], timed, replace(timed, computed_steps=14.0, speedup=4.5)])
    assert said.startswith(
        "a prescribed schedule of 12 of 28 steps (random weights, so time only) takes 1.14 s, where all steps take "
        "5.05 s: **4.43×** (range of three rounds [4.33, 4.53])."
    )
    earlier = replace(timed, baseline=None)
    assert "**4.43×** (n = 3)." in findings.replay_sentence([earlier])
    assert findings.replay_sentence(rows[:1]) == "no prescribed schedule was timed here."


def test_what_the_engine_costs(rows):
    speeds = ((0.8, 1.0), (0.84, 0.95), (0.17, 4.7), (0.107, 7.5))
    timed = [
        replace(rows[0], steps=8, denoise_s=s, speedup=x, speedup_ci_low=x - 0.01, speedup_ci_high=x + 0.01)
        for s, x in speeds
    ]
    said = findings.engine_sentence(timed)
    assert said.startswith("a computed step takes 100 ms; looking at it costs +5.0%")
    assert "with the first block 10.0%, without any block 1.0% of it" in said
    noisy = [replace(r, speedup_ci_high=1.1) for r in timed[:2]] + timed[2:]
    assert "looking at it costs nothing beyond the noise (×0.950 as fast" in findings.engine_sentence(noisy)
    for broken in (replace(timed[2], session="two"), replace(timed[2], status="oom", denoise_s=None)):
        assert "can't be told" in findings.engine_sentence([*timed[:2], broken, timed[3]])
    assert "can't be told" in findings.engine_sentence([replace(r, session=None) for r in timed])


# --- what gates decide ---


def test_a_gate_that_decides_alike_is_told_by_its_masks():
    traces = {"FBCache 0.2": [{"mask": "1100"}, {"mask": "1010"}], "every 2": [{"mask": "1010"}] * 2}
    assert findings.spread_sentence(traces) == (
        "over 2 images, FBCache 0.2: hit rate 50%, 2 computed, 2 different masks; every 2: hit rate 50%, 2 computed, "
        "one mask for all."
    )
    assert findings.spread_sentence({"a": [{"mask": "10"}]}).startswith("over 1 image, ")
    ours, theirs = findings.beside({0.1: 0.5, 0.2: 0.4}, {0.2: 0.3, 0.9: 0.1})
    assert (ours, theirs) == ({0.2: 0.4}, {0.2: 0.3})


def test_our_shares_stand_beside_every_published_one(rows):
    """TeaCache 0.2 computes 28 % of the steps here; on an H100 76 % of the time was left (the audit's figures)."""
    tea = [row(TEACACHE, f"TeaCache {t:g}", c, 1.5, 30.0, threshold=t) for t, c in ((0.2, 7.84), (0.6, 3.92), (0.9, 3))]
    table = findings.shares_table(tea)
    assert list(table.index) == [0.2, 0.2, 0.6, 0.6] and set(table["published for"]) == {"A100 80GB", "H100 80GB"}
    far = table[table["published for"] == "H100 80GB"].loc[0.2]
    assert far["steps computed here"] == pytest.approx(0.28) and far["time left here"] == pytest.approx(1 / 1.5)
    assert far["steps here − time published"] == pytest.approx(100 * (0.28 - 5.48 / 7.18))
    said = findings.shares_sentence(tea)
    assert "another share than was published: furthest apart at 0.2, where **28%** of the steps" in said
    assert "**76%** of the time was left on H100 80GB, 48 points; 0 of 4 published shares are within 10" in said
    assert list(findings.shares_table(rows[1:5], "A6000")["published for"]) == ["A6000"] * 3  # not 0: nothing is reused
    alike = [row(FIRST_BLOCK, "FBCache 0.2", 28 * 0.26, 2.0, 30.0, threshold=0.2)]
    assert "leaves about the same share" in findings.shares_sentence(alike, "A6000")
    assert findings.shares_sentence(tea[2:]) == "no threshold of this page was published with its time."


def test_shares_of_computed_steps(rows):
    shares = findings.computed_shares(findings.of(rows, FIRST_BLOCK))
    assert shares == {0.0: 1, 0.05: 20 / 28, 0.2: 10 / 28, 0.5: 4 / 28}
