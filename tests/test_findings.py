"""What the rows say in words, tables and figures, on rows made here whose answer is known."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fluxnb import charts, findings, published

FBC = "First Block Cache"


def row(technique, label, computed, speedup, psnr, adherence=0.95, threshold=None, identical=0, **other):
    latency = 0.4 / speedup
    return {
        "technique": technique,
        "label": label,
        "steps": computed if technique == "fewer steps" else 28,
        "settings": {} if threshold is None else {"threshold": threshold},
        "model": "embedded",
        "weights": "trained",
        "status": "ok",
        "reason": None,
        "n": 10,
        "samples": [latency] * 10,
        "first_s": 0.5,
        "latency_p50": latency,
        "latency_p90": latency,
        "speedup": speedup,
        "speedup_ci_low": speedup - 0.1,
        "speedup_ci_high": speedup + 0.1,
        "computed_steps": float(computed),
        "total_steps": computed if technique == "fewer steps" else 28,
        "psnr_db": psnr,
        "psnr_min_db": psnr,
        "psnr_identical": identical,
        "ssim": 1.0 if psnr is None else 0.9,
        "ssim_min": 0.8,
        "adherence": adherence,
        "adherence_min": adherence,
    } | other


@pytest.fixture
def rows():
    return [
        row("baseline", "28 steps", 28, 1.0, None, identical=16),
        row(FBC, "FBCache 0", 28, 0.99, None, threshold=0.0, identical=16),
        row(FBC, "FBCache 0.05", 20, 1.4, 45.0, threshold=0.05),
        row(FBC, "FBCache 0.2", 10, 2.5, 32.0, threshold=0.2),
        row(FBC, "FBCache 0.5", 4, 5.0, 24.0, adherence=0.93, threshold=0.5),
        row(FBC, "FBCache 0.8", 2, 8.0, 18.0, adherence=0.60, threshold=0.8),
        row("fewer steps", "20 steps", 20, 1.4, 40.0),
        row("fewer steps", "10 steps", 10, 2.6, 30.0),
        row("fewer steps", "3 steps", 3, 7.0, 23.0),
    ]


# --- words --------------------------------------------------------------------------------------------------


def test_quality_is_kept_within_five_percent_of_the_baseline():
    baseline = {"adherence": 0.9}
    assert findings.keeps_adherence({"adherence": 0.856}, baseline)
    assert not findings.keeps_adherence({"adherence": 0.854}, baseline)
    assert findings.keeps_adherence({"adherence": None}, baseline)
    assert findings.keeps_adherence({"adherence": 0.1}, {"adherence": None})


def test_the_control_is_interpolated_between_its_neighbours_only(rows):
    assert findings.control_psnr(rows, "computed_steps", 10) == 30
    assert findings.control_psnr(rows, "computed_steps", 15) == 35
    assert findings.control_psnr(rows, "computed_steps", 2) is None
    assert findings.control_psnr(rows, "computed_steps", 28) is None


def test_the_sentence_names_the_fastest_setting_that_keeps_quality(rows):
    text = findings.cache_sentence(rows, FBC)
    assert text.startswith(
        "FBCache 0.2 makes an image **2.50 times** faster ([2.40, 2.60], n = 10), computing 10.0 of 28"
    )
    assert "32.0 dB" in text and "95.0% adherence (uncached 95.0%)" in text
    # at 20, 10 and 4 computed steps: +5, +2 and 24 - 24 = 0 dB
    assert "2.3 dB above simply using fewer steps" in text and "(+0.0 to +5.0 dB)" in text


def test_the_sentence_says_so_when_no_setting_keeps_quality(rows):
    poor = [r for r in rows if r["label"] not in ("FBCache 0", "FBCache 0.05", "FBCache 0.2")]
    text = findings.cache_sentence(poor, FBC)
    assert text.startswith("FBCache 0.8 makes") and "the fastest setting above 30 dB" not in text


def test_identical_images_are_called_identical(rows):
    only = [r for r in rows if r["label"] in ("28 steps", "FBCache 0")]
    assert "identical" in findings.cache_sentence(only, FBC)
    assert "inf" not in findings.cache_sentence(only, FBC) + findings.frontier_alt(only, FBC)


def test_the_description_of_the_frontier_has_every_point(rows):
    text = findings.frontier_alt(rows, FBC)
    for part in ("FBCache 0.05: 1.40 times, 45.0 dB", "FBCache 0: 0.99 times", "3 steps: 7.00 times, 23.0 dB"):
        assert part in text


def test_presets_follow_from_the_rows(rows):
    table = findings.presets(rows, FBC)
    assert list(table.index) == ["conservative", "balanced", "aggressive"]
    assert list(table["threshold"]) == [0.05, 0.2, 0.5]  # 0.8 is faster and loses too much adherence
    assert list(table["speedup"]) == [1.4, 2.5, 5.0]
    assert list(table["plan's threshold"]) == [0.05, 0.12, 0.2]
    measured = list(table["measured there"])
    assert measured[0] == 1.4 and measured[2] == 2.5
    assert measured[1] is None or math.isnan(measured[1])  # 0.12 was not measured


def test_a_preset_that_nothing_fits_is_empty(rows):
    table = findings.presets([r for r in rows if r["label"] in ("28 steps", "FBCache 0.8")], FBC)
    assert table["threshold"].isna().all()


def test_agreement_is_in_percentage_points():
    text = findings.agreement_sentence({0.1: 0.5, 0.2: 0.3, 0.9: 1.0}, {0.1: 0.45, 0.2: 0.4})
    assert "computed 50, 30 % at thresholds 0.1, 0.2" in text and "published 45, 40 %" in text
    assert "8 points apart on average, at most 10 (at 0.2)" in text


def test_shares_of_computed_steps(rows):
    shares = findings.computed_shares(findings.of(rows, FBC))
    assert shares == {0.0: 1, 0.05: 20 / 28, 0.2: 10 / 28, 0.5: 4 / 28, 0.8: 2 / 28}


def test_the_table_has_first_and_second_and_quality_of_trained_weights_only(rows):
    table = findings.cache_table(rows)
    assert list(table.index) == [r["label"] for r in rows]
    assert table.loc["FBCache 0.2", "second"] == pytest.approx(0.16)
    assert {"first", "second", "speedup", "computed steps", "PSNR", "SSIM", "adherence"} <= set(table.columns)
    random = findings.cache_table([r | {"weights": "random"} for r in rows])
    assert not {"PSNR", "SSIM", "adherence"} & set(random.columns)


def test_the_cost_of_a_reused_step_is_found():
    """Latency = 0.2 s a computed step, 0.01 s a reused one: a reused one costs 5 % of a computed one."""
    rows = [
        row(FBC, str(c), c, 1.0, None)
        | {"latency_p50": 0.2 * c + 0.01 * (28 - c) + 0.5, "denoise_s": 0.2 * c + 0.01 * (28 - c)}
        for c in (28, 20, 14, 7, 3)
    ]
    text = findings.hit_cost_sentence(rows)
    assert "200 ms" in text and "5.0%" in text
    assert findings.hit_cost_sentence(rows[:2]) == ""
    assert findings.hit_cost_sentence(rows[:1] * 3) == ""  # nothing was reused


def test_the_words_under_an_image():
    black, grey = Image.new("RGB", (128, 128)), Image.new("RGB", (128, 128), (10, 10, 10))
    assert findings.under_image(black, black, None) == "identical"
    assert findings.under_image(black, grey, None) == "28.1 dB"  # 20 log10(255 / 10)
    with_prompt = findings.under_image(black, grey, "a red apple on a white table")
    assert with_prompt.startswith("28.1 dB, ") and with_prompt.endswith("%")
    assert findings.under_image(black, grey, "a dragon") == "28.1 dB"
    assert (findings.share(0.5), findings.share(None)) == ("50%", "–")


# --- published ----------------------------------------------------------------------------------------------


def test_the_published_curve_is_that_of_the_experiment():
    shares = published.first_block_shares()
    assert shares[0.0] == 1
    found = [100 * shares[t] for t in (0.05, 0.1, 0.2, 0.5, 0.8)]
    assert found == pytest.approx([72, 45, 25, 14, 10], abs=1)
    assert list(shares) == sorted(shares)


def test_every_published_figure_has_its_source_and_unit():
    table = published.table()
    assert len(table) > 50
    assert table[["source", "metric", "value", "unit"]].notna().all().all()


# --- figures ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(figure):
    """The only axes of a figure, once it was drawn without complaint."""
    figure.canvas.draw()
    (axes,) = figure.axes
    return axes


@pytest.mark.parametrize("quality", ["psnr_db", "ssim", "adherence"])
def test_the_frontier_shows_technique_and_control_on_one_chart(rows, quality):
    axes = drawn(charts.frontier(rows, quality))
    labels = axes.get_legend_handles_labels()[1]
    assert set(labels) == {"baseline, twice", FBC, "fewer steps"}
    assert "Speedup" in axes.get_xlabel() and axes.get_ylabel()
    words = {text.get_text() for text in axes.texts}
    assert {"0.05", "0.2", "0.5", "0.8", "20", "10", "3"} <= words  # thresholds and steps at the points


def test_identical_points_are_drawn_above_all_others(rows):
    axes = drawn(charts.frontier(rows))
    tops = [line.get_ydata().max() for line in axes.lines if len(line.get_ydata()) > 2]
    assert all(math.isfinite(y) for y in tops) and max(tops) > 45.0


def test_the_frontier_of_identical_images_only(rows):
    drawn(charts.frontier([r for r in rows if r["psnr_db"] is None]))
    drawn(charts.frontier(rows[:1]))


def test_every_technique_has_a_colour_of_its_own():
    assert len(set(charts.COLOURS.values())) == len(charts.COLOURS)
    assert charts._colour("unheard of") not in (charts._colour(FBC), charts._colour("fewer steps"))


def test_bars_begin_at_zero_and_say_their_unit():
    axes = drawn(charts.bars(["a", "b"], [1.0, 2.0], "TFLOP/s"))
    assert axes.get_xlim()[0] == 0 and axes.get_xlabel() == "TFLOP/s"
    assert [round(bar.get_width(), 3) for bar in axes.patches] == [1.0, 2.0]


def test_stacked_bars_add_up():
    axes = drawn(charts.stacked(["a", "b"], {"x": [1.0, 2.0], "y": [3.0, 4.0]}, "Seconds"))
    assert axes.get_xlim()[0] == 0
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == 6.0
    assert [text.get_text().strip() for text in axes.texts] == ["4", "6"]


def test_shares_are_beside_each_other():
    axes = drawn(charts.shares({0.1: 0.5, 0.2: 0.25}, {0.1: 0.4, 0.2: 0.3}, "ours", "theirs"))
    assert [list(line.get_ydata()) for line in axes.lines] == [[50, 25], [40, 30]]
    assert axes.get_ylim()[0] == 0


def test_a_trace_has_a_panel_for_each_threshold():
    decisions = [
        ("threshold 0.1", {"mask": "1011", "indicator": [None, 0.05, 0.2, 0.3], "threshold": 0.1}),
        ("threshold 0", {"mask": "1111", "indicator": [None] * 4, "threshold": 0.0}),
    ]
    figure = charts.trace(decisions)
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == [
        "threshold 0.1: 3 of 4 steps computed",
        "threshold 0: 4 of 4 steps computed",
    ]


def test_training_curves_have_a_panel_for_each_stage():
    steps = np.arange(100, 1100, 100)
    frame = pd.concat(pd.DataFrame({"stage": stage, "step": steps, "loss": 10.0 / steps}) for stage in ("vae", "flow"))
    figure = charts.curves(frame, ["vae", "flow"])
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["vae", "flow"]
    assert figure.axes[0].get_yscale() == "log"
