"""What the rows say in words, tables and figures, on rows made here whose answer is known."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fluxnb import findings
from fluxnb.findings import published
from fluxnb.report import charts

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


def matrix_row(label, speedup, psnr=40.0, peak=20.0, quantization="", computed=28, weights="trained", **other):
    more = {
        "settings": {"compile": "blocks"}
        | ({"quantization": quantization} if quantization else {})
        | ({"every": 4} if computed < 28 else {}),
        "weights": weights,
        "denoise_s": 0.3 / speedup,
        "memory_load_gib": peak - 2,
        "memory_peak_gib": peak,
        "gpu_memory_avg_pct": None,
        "proof": {"layers": 494, "of": 494, "weight": "Float8Tensor"} if quantization else None,
    }
    return row("baseline" if speedup == 1.0 else label, label, computed, speedup, psnr, **more) | other


@pytest.fixture
def judged():
    return [
        matrix_row("28 steps", 1.0, None),
        matrix_row("FP8", 1.1, 34.0, quantization="torchao fp8 row"),
        matrix_row("INT8", 1.1, 44.0, quantization="torchao int8"),
        matrix_row("cache", 2.0, 48.0, computed=12),
        matrix_row("NF4", 0.9, 21.0, adherence=0.5, quantization="bitsandbytes nf4"),
    ]


@pytest.fixture
def timed():
    random = {"weights": "random", "psnr": None, "adherence": None}
    return [
        matrix_row("baseline", 1.0, peak=34.0, **random),
        matrix_row("+ compiled blocks", 1.3, peak=33.0, **random),
        matrix_row("+ FP8", 1.8, peak=23.0, quantization="torchao fp8 row", **random),
        matrix_row("+ INT8", 1.7, peak=24.0, quantization="torchao int8", **random),
        matrix_row("NF4", 1.9, peak=15.0, quantization="bitsandbytes nf4", **random),
        matrix_row("cache", 2.1, peak=34.0, computed=12, **random),
        matrix_row("unjudged cache", 3.0, peak=34.0, computed=12, quantization="torchao int8", **random),
    ]


def test_quality_is_looked_up_by_what_changes_the_arithmetic(timed, judged):
    found = [findings.quality_of(r, judged) for r in timed]
    assert [f and f["label"] for f in found] == [None, None, "FP8", "INT8", "NF4", "cache", None]
    assert findings.quality_of_phases(timed, judged) == [None, None, 34.0, 44.0, 21.0, 48.0, None]


def test_recommendations_are_the_best_rows_that_keep_their_quality(timed, judged):
    table = findings.recommendations(timed, judged)
    assert list(table["choose"]) == ["cache", "cache", "+ FP8"]  # NF4 is smallest, but loses adherence
    assert list(table["PSNR"]) == [48.0, 48.0, 34.0]
    assert "fastest, lossless (40 dB or more): cache (2.10×)" in findings.recommendation_sentence(table)
    own = findings.recommendations(judged, judged)
    assert own["choose"].iloc[0] == "cache"


def test_without_trained_weights_what_changes_no_arithmetic_is_recommended(timed):
    table = findings.recommendations(timed, [])
    assert list(table["choose"])[:2] == ["+ compiled blocks"] * 2 and table["PSNR"].isna().all()


def test_another_order_of_operations_is_judged_by_its_worst_part(timed, judged):
    def parts(row, **settings):
        return row | {"settings": row["settings"] | settings}

    fused = [
        parts(matrix_row("fused GELU", 1.0 + 1e-6, 53.0), fused_gelu=True),
        parts(matrix_row("fused RoPE", 1.0 + 1e-6, 39.0), fused_rope=True),
        parts(matrix_row("fused QKV", 1.0 + 1e-6, 30.0), fused_qkv=True),
    ]
    whole = parts(timed[1], fused_gelu=True, fused_rope=True, compile="blocks")
    assert findings.quality_of(whole, judged + fused)["label"] == "fused RoPE"
    assert findings.quality_of(timed[1], judged + fused) is None  # nothing of it was judged
    table = findings.recommendations([timed[0], whole | {"speedup": 9.0}, timed[5]], judged + fused)
    assert list(table["choose"])[:2] == ["cache", "+ compiled blocks"] and table["PSNR"].iloc[1] == 39.0


def test_of_about_as_much_memory_the_fastest_is_recommended(timed, judged):
    little_more = timed[2] | {"label": "faster", "speedup": 1.9, "memory_peak_gib": 23.2}
    assert findings.recommendations([*timed, little_more], judged)["choose"].iloc[2] == "faster"
    much_more = little_more | {"memory_peak_gib": 23.6}
    assert findings.recommendations([*timed, much_more], judged)["choose"].iloc[2] == "+ FP8"


def test_a_matrix_has_proofs_and_reasons(timed):
    missing = matrix_row("GGUF", 1.2, weights="random") | dict.fromkeys(["latency_p50", "speedup", "proof"])
    missing |= {"status": "unavailable", "reason": "needs the package gguf"}
    table = findings.matrix([*timed, missing])
    assert table.loc["+ FP8", "applied"] == "494 of 494 layers: Float8Tensor"
    assert table.loc["GGUF", "why not"] == "needs the package gguf"
    assert table.attrs["units"]["peak"] == "GiB" and "PSNR" not in table
    assert "PSNR" in findings.matrix([matrix_row("FP8", 1.1, 34.0)])


def test_a_matrix_says_how_many_steps_are_computed_where_some_are_not(judged):
    assert "computed" not in findings.matrix(judged[:3])
    assert list(findings.matrix(judged)["computed"]) == [28, 28, 28, 12, 28]


def test_what_compilation_changes():
    eager, same, other = (
        matrix_row(n, 1.0 + i, p) for i, (n, p) in enumerate((("eager", None), ("a", None), ("b", 52.0)))
    )
    assert findings.changes_sentence([eager, same]) == "every variant makes the eager images, to the last bit."
    assert "of 2 variants b changes images most, to 52.0 dB; adherence is kept" in findings.changes_sentence(
        [eager, same, other]
    )
    worse = other | {"adherence": 0.5, "label": "c"}
    assert findings.changes_sentence([eager, worse]).endswith("lost by more than 5% with c.")
    missing = dict.fromkeys(other) | {"label": "TensorRT", "status": "unavailable", "reason": "needs a package"}
    table = findings.changes([eager, same, other, missing])
    assert table.loc["b", "PSNR"] == 52.0 and table.loc["TensorRT", "why not"] == "needs a package"
    assert findings.changes_sentence([eager, missing]).startswith("no variant")


def test_where_a_step_goes_on_several_gpus():
    parts = {"attention": 14.0, "matrix products": 43.0, "communication": 12.0, "the rest": 5.0}
    own = spread("context parallel", "all-gather 2", 2.24, total_steps=28, proof={"step_ms": parts})
    bound = own | {"label": "FP8", "latency_p50": 2.8, "telemetry": {"sm_clock_avg_mhz": 1980}}
    table = findings.scaling_parts([spread("replicas", "replicas", 3.6), own | {"telemetry": None}, bound])
    assert list(table.index) == ["all-gather 2", "FP8"] and table.loc["FP8", "image / steps"] == pytest.approx(100)
    assert table.loc["all-gather 2", "text, VAE, waiting"] == pytest.approx(6)
    assert table.attrs["units"]["communication"] == "ms" and table.attrs["units"]["SM clock"] == "MHz"
    assert "one step" not in table and "skipped step" not in table  # of earlier runs
    steps = {"computed": 78.0, "computed, set off in": 12.0, "skipped": 5.0, "skipped, set off in": 4.5}
    cached = bound | {"label": "cached", "proof": {"steps_ms": steps}}
    table = findings.scaling_parts([bound | {"proof": {"step_ms": parts, "steps_ms": {"computed": 78.0}}}, cached])
    assert table.loc["FP8", "waiting"] == pytest.approx(4)
    assert (table.loc["cached", "skipped step"], table.loc["cached", "it set off in"]) == (5.0, 4.5)
    assert table.loc["cached", "one step"] == 78.0 and math.isnan(table.loc["cached", "waiting"])
    assert findings.scaling_parts([spread("replicas", "replicas", 3.6)]) is None


def test_what_an_image_on_several_gpus_is_made_of():
    alone = {"alone_s": 3.6, "alone_stages": {"text_s": 0.03, "denoise_s": 3.5, "vae_s": 0.04}}
    own = spread("context parallel", "pulled 2", 2.0, 1.8, text_s=0.03, denoise_s=1.75, vae_s=0.02, proof=alone)
    none = own | {"label": "no text", "text_s": None}
    table = findings.scaling_stages([spread("replicas", "replicas", 3.6, denoise_s=3.5, proof=alone), own, none])
    assert list(table.index) == ["pulled 2", "no text"]  # replicas divide nothing
    assert table.loc["pulled 2", "steps divided"] == pytest.approx(2.0)
    assert list(table["the rest"]) == pytest.approx([200, 230])
    assert table.loc["pulled 2", "the rest, alone"] == pytest.approx(30)
    assert table.attrs["units"] | {"text": "ms", "steps divided": "×"} == table.attrs["units"]
    assert findings.scaling_stages([own | {"proof": {"alone_s": 3.6}}]) is None  # of earlier runs


def test_whether_an_acceleration_pays_differently_takes_a_difference_and_no_noise():
    def case(speedup, apart, label="FP8"):
        row = matrix_row("quantized", speedup) | {"technique": "quantized", "label": label}
        return [
            matrix_row("baseline", 1.0),
            row | {"speedup_ci_low": speedup - apart, "speedup_ci_high": speedup + apart},
        ]

    said = findings.pays_differently
    assert said({"a": case(3.9, 0.1), "b": case(3.2, 0.1)}) == ["FP8 pays most in a (3.90×) and least in b (3.20×)."]
    assert said({"a": case(3.9, 0.5), "b": case(3.2, 0.5)})[0].endswith("3.20× to 3.90×, within the noise.")
    assert said({"a": case(3.4, 0.05), "b": case(3.2, 0.05)})[0].endswith("3.20× to 3.40×, less than 15% apart.")
    assert said({"a": case(3.4, 0.1), "b": case(3.2, 0.1, "INT8")})[0].startswith("quantized pays alike")
    assert said({"a": case(3.4, 0.1)}) == []


def test_what_fits_leaves_something_to_spare(timed):
    table = findings.fits(timed)
    assert list(table.loc["+ FP8"]) == ["no", "no", "yes", "yes"]  # 23 GiB don't fit a card of 24
    assert list(table.loc["NF4"]) == ["yes"] * 4


def test_gains_are_over_the_phase_before(timed):
    table = findings.gains(timed[:3])
    assert table["own gain"].iloc[2] == pytest.approx(1.8 / 1.3)
    sentence = findings.stack_sentence(timed[:3])
    assert "1.80×" in sentence and "the largest single step is FP8, 1.38×" in sentence


def test_nothing_is_the_fastest_within_the_noise(timed):
    assert "FP8" in findings.fastest_sentence(timed[:3])
    within = matrix_row("no faster", 1.05, weights="random")
    assert findings.fastest_sentence([timed[0], within]) == "nothing is faster than baseline beyond the noise."


def test_formats_are_ordered_by_what_they_change(judged):
    sentence = findings.quality_sentence([judged[0], *judged[1:3], judged[4]])
    assert "INT8 changes the image least (44.0 dB) and NF4 most (21.0 dB); 2 keep adherence" in sentence


def test_published_ratios_stand_beside_ours(timed):
    ours = matrix_row("BF16 compiled", 1.3, weights="random")
    table = findings.beside_published([timed[0], ours])
    line = table[table["GPU"] == "H200"].loc["BF16 compiled"]
    assert line["published"] == pytest.approx(5.58 / 4.32) and line["ours"] == pytest.approx(1.3)
    assert line["why"] == ""
    far = table[table["GPU"] == "H100"].loc["BF16 compiled"].iloc[0]
    assert far["difference"] < -0.15 and "cuDNN" in far["why"]
    assert table.loc["TorchAO FP8", "why"] == "not run here"


def test_time_shares_are_of_the_uncached_run():
    shares = published.time_shares("TeaCache", "H100 80GB")
    assert list(shares) == [0.2, 0.4, 0.6] and shares[0.6] == pytest.approx(2.69 / 7.18)
    assert published.time_shares("FBCache", "A6000")[0.8] == pytest.approx(2.03 / 20.58)
    with pytest.raises(KeyError, match="nothing is published"):
        published.time_shares("TeaCache", "A6000")


def test_the_figures_of_many_phases_do_not_lie_on_each_other():
    count = 14
    figure = charts.waterfall([f"+ part {i}" for i in range(count)], [2.5] * count, [22.8] * count, [32.1] * count)
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == count
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    plt.close(figure)


def test_waterfall_and_grouped_bars():
    figure = charts.waterfall(["a", "+ b"], [5.0, 2.5], [34.0, 23.0], [None, 34.0])
    assert any("2.00×" in text.get_text() for text in figure.axes[0].texts)
    plt.close(figure)
    figure = charts.grouped(["a", "b"], {"cold": [10.0, 20.0], "warm": [3.0, 4.0]}, "s")
    assert [p.get_width() for p in figure.axes[0].patches] == [10.0, 20.0, 3.0, 4.0]
    plt.close(figure)


def test_a_level_interval_is_called_level(rows):
    fixed = [row("fixed interval", f"every {n}", c, 1.5, p) for n, c, p in ((2, 20, 45.0), (3, 4, 24.0))]
    assert "level with a fixed interval" in findings.interval_sentence(
        [r for r in rows if r["label"] == "FBCache 0.05"] + fixed, FBC
    )
    assert "no setting" in findings.interval_sentence(rows, FBC)


def test_work_counts_the_block_that_a_reused_step_has_run():
    traces = [{"reused_at": [None, "input", "residual", None]}, {"reused_at": [None, None, None, "input"]}]
    assert findings.steps_of_work(traces, 10) == (2.1 + 3) / 2


def spread(technique, label, p50, speedup=None, images=1, **other):
    return {
        **row(technique, label, 28, speedup or 1.0, None),
        "latency_p50": p50,
        "speedup": speedup,
        "images_per_s": images / p50,
        "proof": other.pop("proof", {}),
        "memory_load_gib": 34.0,
        "memory_peak_gib": 40.0,
        **other,
    }


def test_one_image_on_several_gpus_in_words_and_in_a_table():
    rows = [
        spread("replicas", "replicas", 3.6, images=2),
        spread("context parallel", "all-gather 2", 2.1, 1.7, proof={"communication": 0.2, "alone_s": 3.6}),
        spread("context parallel", "Ulysses 2", 2.0, 1.8, proof={"communication": 0.1, "alone_s": 3.6}),
    ]
    said = findings.scaling_sentence(rows, 2)
    assert said.startswith("Ulysses 2 makes one image **1.80 times** as fast as one GPU ([1.70, 1.90], 2 s, 90% of 2")
    assert "with 10% of a step's kernels moving data" in said
    assert "2 replicas make 0.556 images a second, 1.11 times as many: replicas win for many images" in said
    table = findings.scaling_table(rows, 2)
    assert table.loc["Ulysses 2", "efficiency"] == 0.9
    assert table.loc["all-gather 2", "of replicas"] == pytest.approx((1 / 2.1) / (2 / 3.6))
    stacked = [*rows, spread("parallel stack", "Ulysses 2, FP8", 0.8), spread("parallel stack", "FP8", 0.9)]
    assert "there after **0.8 s** (Ulysses 2, FP8)" in findings.scaling_sentence(stacked, 2)
    assert "could be measured" in findings.scaling_sentence([spread("context parallel", "x", 1.0)], 2)


def test_what_recording_does_to_a_divided_image():
    rows = [
        spread("replicas", "replicas", 3.6),
        spread("context parallel", "Ulysses 4", 3.3, 1.1),
        spread("context parallel", "Ulysses 4, CUDA graph", 1.4, 2.6),
        spread("context parallel", "pulled 4, CUDA graph", 1.3, 2.7),
    ]
    assert "one by one: Ulysses 4 3.3 → **1.4 s**." in findings.recorded_sentence(rows)
    assert findings.recorded_sentence(rows[2:]) is None


def test_pictures_of_several_ranks_in_words():
    rows = [
        spread("replicas", "replicas", 3.6),
        spread("context parallel", "all-gather 2", 2.1, psnr_db=95.04, psnr_identical=0),
        spread("FSDP", "FSDP", 2.1, psnr_identical=2),
        spread("PipeFusion", "PipeFusion 2", 2.1, psnr_db=31.2, psnr_identical=0),
        spread("cached", "cached", 2.1, psnr_identical=2, proof={"decisions": "identical on all ranks"}),
        spread("cached", "cached", 2.1, psnr_identical=2, proof={"decisions": ["01", "11"]}),
        spread("xDiT", "xDiT Ulysses 2", 1.0, status="unavailable"),
    ]
    said = findings.same_everywhere_sentence(rows)
    assert said.startswith("4 ways of dividing make the picture of one rank, 3 of them to the last bit and the others")
    assert "within 95.0 dB; under 1 of 2 caches all ranks decided alike" in said
    assert "PipeFusion 2, whose patches see each other a step late, makes another (31.2 dB); 1 could not run" in said


def test_a_load_in_words():
    def load(users, rate, p50, queued, batching=1):
        return {
            "technique": "users",
            "settings": {"batching": batching},
            "users": users,
            "images": 1,
            "images_per_s": rate,
            "latency_p50": p50,
            "latency_avg": p50,
            "proof": {"queued_s": queued},
        }

    said = findings.load_sentence([load(1, 0.5, 2.0, 0.0), load(4, 0.49, 8.0, 6.0), load(4, 0.6, 6.5, 3.0, 4)])
    assert "with 4 users 0.49 images a second are made, 98% of a single user's rate" in said
    assert "longer than **8 s** instead of 2 s, 75% of it in the queue; made 4 together, 1.22 times as many" in said
