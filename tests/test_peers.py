"""What is said of the field's methods at equal computed steps: computed from rows, image by image."""

import random
from dataclasses import replace

import numpy as np
import pytest
from measured import row

from fluxnb import families, findings
from fluxnb.cache import planning
from fluxnb.measure import quality, stats
from fluxnb.report import charts, show
from fluxnb.techniques import peers

COUNTS = (12, 8)
LIBRARY = "cache-dit TaylorSeer 2"
KNOWN = "Taylor 2"
NEW = next(name for name, method in peers.METHODS.items() if method.origin == peers.OWN)


def seen(technique, computed, mean, spread=1.0, images=12, family=families.SCHEDULE, **changed):
    """A row whose images lie around a mean PSNR."""
    draw = random.Random(f"{technique} {computed}")
    psnr = [round(mean + spread * draw.uniform(-1, 1), 3) for _ in range(images)]
    each = {"psnr_db": psnr, "st_lpips": [round(10 ** (-db / 20), 5) for db in psnr]}
    about = {"technique": technique, "label": f"{technique} at {computed}", "family": family.name, "images": images}
    figures = {"psnr_db": float(np.mean(psnr)), "psnr_min_db": min(psnr), "psnr_identical": 0, "session": "s"}
    return row(**about, **figures, computed_steps=float(computed), proof={"each": each}, **changed)


ROWS = [
    seen(NEW, 12, 44), seen(KNOWN, 12, 40), seen(LIBRARY, 12, 38),
    seen(families.FEWER_STEPS.name, 12, 29, family=families.FEWER_STEPS),
    seen(families.SECOND_ORDER.name, 12, 33, family=families.SECOND_ORDER),
    seen(NEW, 8, 30.2), seen(KNOWN, 8, 30), seen(LIBRARY, 8, 27),
]  # fmt: skip


@pytest.mark.parametrize("n", [6, 24, 48])  # images that judge on a CPU, and on a GPU with one seed and with two
def test_the_interval_of_a_mean_covers_at_as_many_images_as_judge(n):
    ends = [stats.of_mean(v) for v in np.random.default_rng(n).normal(30, 3, size=(4000, n))]
    assert np.mean([low <= 30 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.015)


def test_few_images_have_a_range_and_the_worst_image_has_no_interval():
    assert stats.of_mean([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert stats.of_mean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((1.5366, 5.4634), abs=3e-3)  # by SciPy
    with pytest.raises(ValueError):
        stats.of_mean([])
    worst = findings.spread_of(ROWS[0], "psnr_db", worst=True)
    assert worst == (worst[0],) * 3 and "[" not in findings.equal_steps_table(ROWS, COUNTS)["worst PSNR"].iloc[0]


def test_every_image_is_noted_beside_the_mean():
    draw = np.random.default_rng(0)
    a, b = (draw.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    found = quality.compare([a, a, b], [b, a, a], each=True)
    psnr, near = found["each"]["psnr_db"], found["each"]["st_lpips"]
    assert (
        psnr[1] is None and near[1] == 0.0 and found["psnr_db"] == pytest.approx(np.mean([psnr[0], psnr[2]]), abs=1e-3)
    )
    assert near[2] > 0 and found["st_lpips"] == pytest.approx(np.mean(near), abs=1e-4)
    assert "each" not in quality.compare([a], [b])


def test_what_is_ahead_is_said_with_what_is_level_and_the_best_library():
    said = findings.equal_steps_sentence(ROWS, COUNTS)
    head, twelve, eight = said.split("\n")  # a line each: a reader compares them
    assert head.endswith("judged on 12 images") and "level within the noise with" in said
    assert twelve.startswith(f"12 steps: {NEW} ({peers.OWN}), mean 4")
    assert f"the best of a library is {LIBRARY}, " in twelve
    assert "level within the noise" not in twelve and eight.startswith("8 steps: ") and KNOWN in eight


def test_whether_what_is_new_helped_is_computed_whichever_way_it_points():
    said = findings.new_here_sentence(ROWS, COUNTS)
    assert said.startswith("What is new here is ahead beyond the noise at 1 of 2 numbers of steps: at 12 steps")
    assert "(within the noise)" in said.split("at 8 steps")[1]
    worse = [seen(NEW, 12, 30), seen(KNOWN, 12, 40)]
    assert "ahead beyond the noise at 0 of 1 number of steps" in findings.new_here_sentence(worse, COUNTS)
    assert "is -" in findings.new_here_sentence(worse, COUNTS)


def test_what_a_plan_predicts_stands_beside_what_was_measured(monkeypatch):
    plans = planning.of("embedded", 28)
    near, far = (
        seen(
            peers.PLANNED, n, plans[n].predicted_db + off, spread=0.5, total_steps=28, settings={"mask": plans[n].mask}
        )
        for n, off in ((12, 1), (8, 5))
    )
    said = findings.predicted_sentence([near, far], COUNTS)
    assert said.startswith(
        "The predicted frontier is within 2 dB of the measured one at 1 of 2 numbers of steps, and what was measured "
        "lies within two standard errors of the mean of as many other images, in brackets, at 1: at 12"
    )
    low, high = plans[8].expected(12)
    assert f"{plans[8].predicted_db:.1f} dB [{low:.1f}, {high:.1f}] predicted, " in said and "inf" not in said
    monkeypatch.setattr(planning, "of", lambda *_: {n: replace(plan, each=(40.0,)) for n, plan in plans.items()})
    unsure = findings.predicted_sentence([near, far], COUNTS)
    assert f"{plans[8].predicted_db:.1f} dB predicted, " in unsure and "in brackets, at 0: at 12" in unsure
    monkeypatch.undo()
    brief = replace(near, settings={**near.settings, "dtype": "bfloat16"})
    assert "rounding" not in said and findings.predicted_sentence([brief, far], COUNTS).endswith(
        "(mean PSNR). These are images of bfloat16, whose rounding no plan foretells."
    )
    assert "no planned cache that there still is was judged" in findings.predicted_sentence(ROWS, COUNTS)
    older = replace(near, settings={"mask": plans[8].mask})  # of a plan that was made anew since
    assert "no planned cache" in findings.predicted_sentence([older], COUNTS)


def test_controls_have_their_place():
    said = findings.controls_sentence(ROWS, COUNTS)
    assert f"at 12 {families.SECOND_ORDER.name} is 4. of 5, " in said and "at 8" not in said


def test_the_table_says_how_far_each_is_behind_and_whether_that_is_noise():
    table = findings.equal_steps_table(ROWS, COUNTS)
    assert list(table["within noise"]) == ["–", "no", "no", "no", "no", "–", "yes", "no"]
    assert list(table["behind the best"])[0] == 0 and table["behind the best"].iloc[1] > 3
    assert list(table["whose"])[:5] == [peers.OWN, peers.PUBLISHED, peers.SHIPPED, "control", "control"]
    assert "[" in table["mean ST-LPIPS"].iloc[0] and table.index[0] == f"12: {NEW}"


def test_settings_stand_where_their_images_put_them():
    gate = seen("SeaCache", 12, 35)
    assert findings.at_steps([replace(gate, computed_steps=11.6)], 12) and not findings.at_steps([gate], 11)


def test_the_chart_draws_controls_and_the_nearest_of_each_origin(monkeypatch):
    more = [seen(name, 12, 20 + i) for i, name in enumerate(n for n in peers.METHODS if n not in (NEW, KNOWN, LIBRARY))]
    drawn = findings.drawn(ROWS + more, COUNTS)
    by = {origin: [n for n in drawn if peers.origin(n) == origin] for origin in (peers.SHIPPED, peers.PUBLISHED, None)}
    assert len(by[peers.SHIPPED]) == len(by[peers.PUBLISHED]) == 3 and KNOWN in drawn and LIBRARY in drawn
    assert set(by[None]) == {families.FEWER_STEPS.name, families.SECOND_ORDER.name}
    shown = []
    monkeypatch.setattr(show.html, "figure", lambda figure, alt, caption: shown.append((figure, alt, caption)))
    show.equal_steps(ROWS, COUNTS)
    ((figure, alt, caption),) = shown
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Mean PSNR (dB)", "Mean ST-LPIPS", "Worst PSNR (dB)", "Worst ST-LPIPS",
    ]  # fmt: skip
    assert KNOWN in alt and "Student's t" in caption
    charts.plt.close(figure)


def test_libraries_are_set_beside_the_studys_own_at_full_size():
    base = row(
        id="b",
        session="s",
        samples=[5.0] * 6,
        again=[5.0] * 6,
        weights="random",
        model="flux-dev-random",
        latency_p50=5.0,
    )
    timed = {"weights": "random", "model": "flux-dev-random", "session": "s", "baseline": "b", "first_s": 9.0}
    ours = replace(base, **timed | {"technique": KNOWN, "family": families.SCHEDULE.name, "label": "ours"},
                   speedup=4.0, speedup_ci_low=3.9, speedup_ci_high=4.1, latency_p50=1.25)  # fmt: skip
    theirs = replace(ours, technique=LIBRARY, label="theirs", family=families.LIBRARY.name, speedup=2.0,
                     speedup_ci_low=1.9, speedup_ci_high=2.1, latency_p50=2.5, first_s=400.0)  # fmt: skip
    lost = replace(theirs, status="error", reason="Unsupported: a graph break", speedup=None, label="broken")
    said = findings.libraries_sentence([base, ours, theirs, lost])
    assert said == (
        "ours takes 1.25 s and theirs 2.5 s: 2.00 times as fast, the first image after 9 s against 400 s; "
        "not to be had: broken."
    )
    assert findings.libraries_sentence([base, ours]).startswith("no library was timed")
