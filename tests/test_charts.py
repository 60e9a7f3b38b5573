"""The figures, on rows made here whose answer is known."""

import math
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fluxnb import families, notebooks
from fluxnb.findings.rows import BALANCED_DB, NEAR_LOSSLESS_DB
from fluxnb.report import charts, html, labels, series
from fluxnb.report.clean import clean
from fluxnb.study.row import Row

CACHE, FEWER = families.FIRST_BLOCK, families.FEWER_STEPS


def row(family, label, computed, speedup, psnr, identical=0, **settings):
    latency = 0.4 / speedup
    steps = 28 if family not in (FEWER, families.SECOND_ORDER) else computed
    settings |= {"dtype": "float32", "inputs": "258f38ae"}
    mark = str(settings.get(family.dial, steps if family.dial == "steps" else label))
    return Row(
        id=f"{label} {speedup}", label=label, mark=mark, family=family.name, technique=family.name, settings=settings,
        model="embedded", weights="trained", width=128, height=128, steps=steps, status="ok", n=10, session="a",
        latency_p25=latency, latency_p50=latency, latency_p90=latency, samples=[latency] * 10,
        speedup=speedup, speedup_ci_low=speedup - 0.1, speedup_ci_high=speedup + 0.1,
        computed_steps=float(computed), total_steps=steps, images=16, psnr_identical=identical,
        psnr_db=psnr, psnr_min_db=psnr and psnr - 3,
        ssim=1.0 if psnr is None else 0.9, adherence=0.95, memory_peak_gib=1.0,
    )  # fmt: skip


@pytest.fixture
def rows():
    return [
        row(families.BASELINE, "28 steps", 28, 1.0, None, identical=16),
        row(CACHE, "FBCache 0", 28, 0.99, None, identical=16, threshold=0.0),
        row(CACHE, "FBCache 0.05", 20, 1.4, 45.0, threshold=0.05),
        row(CACHE, "FBCache 0.2", 10, 2.5, 32.0, threshold=0.2),
        row(CACHE, "FBCache 0.5", 4, 5.0, 24.0, threshold=0.5),
        row(FEWER, "20 steps", 20, 1.4, 40.0),
        row(FEWER, "10 steps", 10, 2.6, 30.0),
        row(FEWER, "3 steps", 3, 7.0, 23.0),
    ]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(figure):
    """The only axes of a figure, once it was drawn without complaint."""
    figure.canvas.draw()
    (axes,) = figure.axes
    return axes


def line_of(axes, name):
    """The line that the legend calls so."""
    handles, labels = axes.get_legend_handles_labels()
    return handles[labels.index(name)].lines[0]


@pytest.mark.parametrize("quality", ["psnr_min_db", "psnr_db", "ssim", "adherence"])
def test_the_frontier_shows_technique_and_control_on_one_chart(rows, quality):
    axes = drawn(charts.frontier(rows, quality))
    labels = axes.get_legend_handles_labels()[1]
    assert set(labels) == {"baseline, twice", CACHE.name, FEWER.name}
    assert "Speedup" in axes.get_xlabel() and axes.get_ylabel()
    words = {text.get_text() for text in axes.texts}
    assert {"0.05", "0.2", "0.5", "20", "10", "3"} <= words  # thresholds and steps at the points


def test_only_the_families_that_are_asked_for_are_marked(rows):
    at_points = [t for t in drawn(charts.frontier(rows, marks=(FEWER,))).texts if t.get_gid()]
    assert {t.get_text() for t in at_points} == {"20", "10", "3"}
    assert not [t for t in drawn(charts.frontier(rows, x="computed_steps", marks=())).texts if t.get_gid()]


def test_a_frontier_shows_the_worst_image_with_the_mean_above_it_and_the_floors(rows):
    """A floor is asked of the worst image, so a mean above it is no point above it."""
    ruined = [replace(r, psnr_min_db=20.0) if r.label == "FBCache 0.05" else r for r in rows]
    axes = drawn(charts.frontier(ruined))
    assert "worst image" in axes.get_ylabel()
    assert list(line_of(axes, CACHE.name).get_ydata())[1:] == [20.0, 29.0, 21.0]
    means = [dash.get_offsets()[0] for dash in axes.collections if dash.get_gid() == "mean"]
    assert [45.0, 32.0, 24.0, 23.0, 30.0, 40.0] == [y for _, y in means]
    floors = [line.get_ydata()[0] for line in axes.lines if line.get_gid() == "floor"]
    assert floors == [NEAR_LOSSLESS_DB, BALANCED_DB] == [35.0, 28.0]
    assert {"near-lossless: 35 dB", "balanced: 28 dB"} <= {t.get_text() for t in axes.texts}
    for quality in ("ssim", "psnr_db"):
        other = drawn(charts.frontier(rows, quality))
        assert not [line for line in other.lines if line.get_gid() == "floor"]


def test_identical_points_are_drawn_above_all_others(rows):
    axes = drawn(charts.frontier(rows))
    tops = [line.get_ydata().max() for line in axes.lines if len(line.get_ydata()) > 2]
    assert all(math.isfinite(y) for y in tops) and max(tops) > 45.0


def test_what_was_not_judged_or_not_timed_is_not_drawn_as_identical(rows):
    unjudged = replace(rows[3], psnr_db=None, psnr_min_db=None, images=None, psnr_identical=None, weights="random")
    untimed = replace(rows[3], speedup=None)
    failed = replace(rows[3], status="oom")
    assert charts.on_frontier([*rows, unjudged, untimed, failed]) == rows
    assert charts.on_frontier([replace(rows[3], ssim=None)], quality="ssim") == []


def test_the_frontier_of_identical_images_only(rows):
    drawn(charts.frontier([r for r in rows if r.psnr_db is None]))
    drawn(charts.frontier(rows[:1]))


def test_a_line_follows_its_dial_where_noise_turns_the_speeds_around(rows):
    noisy = [replace(r, speedup=0.9) if r.setting("threshold") == 0.05 else r for r in rows]
    line = line_of(drawn(charts.frontier(noisy)), CACHE.name)
    assert list(line.get_xdata()) == [0.99, 0.9, 2.5, 5.0]  # thresholds 0, 0.05, 0.2, 0.5
    steps = line_of(drawn(charts.frontier(noisy)), FEWER.name)
    assert list(steps.get_xdata()) == [7.0, 2.6, 1.4] and steps.get_linestyle() == "--"  # 3, 10, 20 steps


def test_points_without_a_dial_are_not_joined():
    rules = [row(families.COMBINED, f"rule {i}", 28 - i, 1 + i, 40.0 - i, rule=str(i)) for i in range(3)]
    line = line_of(drawn(charts.frontier(rules)), families.COMBINED.name)
    assert line.get_linestyle() == "None" and len(line.get_xdata()) == 3


def test_what_sets_more_than_the_dial_is_another_line():
    tea = families.TEACACHE
    plain = [row(tea, f"TeaCache {t}", 20, 1.5, 40.0, threshold=t) for t in (0.2, 0.4)]
    other = [row(tea, f"TeaCache {t}, published", 20, 1.6, 39.0, threshold=t, rescaled="published") for t in (0.2, 0.4)]
    alone = [row(tea, "TeaCache 0.4, warm-up 6", 22, 1.3, 42.0, threshold=0.4, warm_up=6)]
    labels = drawn(charts.frontier(plain + other + alone)).get_legend_handles_labels()[1]
    assert labels == ["TeaCache", "TeaCache, rescaled published", "TeaCache, other settings"]
    lines = series.lines(plain + other + alone)
    assert [words for _, words in lines] == ["", "rescaled published", "warm up 6"]
    assert lines[tea, ""] == plain


def test_what_all_of_a_family_share_makes_no_other_line():
    solver = [row(families.SECOND_ORDER, f"{n}", n, 2.0, 30.0, scheduler="dpm-solver++ 2M") for n in (14, 8)]
    (((family, words), line),) = series.lines(solver).items()
    assert (family, words) == (families.SECOND_ORDER, "") and [r.steps for r in line] == [8, 14]


def test_bars_begin_at_zero_and_say_their_unit():
    axes = drawn(charts.bars(["a", "b"], [1.0, 2.0], "TFLOP/s"))
    assert axes.get_xlim()[0] == 0 and axes.get_xlabel() == "TFLOP/s"
    assert [round(bar.get_width(), 3) for bar in axes.patches] == [1.0, 2.0]


def test_bars_of_one_name_are_two_bars_in_their_families_colours():
    axes = drawn(charts.bars(["a", "a"], [1.0, 2.0], "s", [CACHE, FEWER], [[0.1, 0.1], [0.2, 0.2]]))
    assert [bar.get_y() for bar in axes.patches] == [-0.4, 0.6]
    assert [plt.matplotlib.colors.to_hex(bar.get_facecolor()) for bar in axes.patches] == [CACHE.colour, FEWER.colour]


def test_stacked_bars_add_up():
    axes = drawn(charts.stacked(["a", "b"], {"x": [1.0, 2.0], "y": [3.0, 4.0]}, "Seconds"))
    assert axes.get_xlim()[0] == 0
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == 6.0
    assert [text.get_text().strip() for text in axes.texts] == ["4", "6"]


def test_grouped_bars_leave_out_what_is_not_there():
    axes = drawn(charts.grouped(["a", "b"], {"cold": [10.0, 20.0], "warm": [3.0, 4.0]}, "s"))
    assert [p.get_width() for p in axes.patches] == [10.0, 20.0, 3.0, 4.0]
    axes = drawn(charts.grouped(["a", "b"], {"cold": [10.0, None], "warm": [None, None]}, "s"))
    assert [p.get_width() for p in axes.patches] == [10.0]


def test_shares_are_beside_each_other():
    axes = drawn(charts.shares({0.1: 0.5, 0.2: 0.25}, {0.1: 0.4, 0.2: 0.3}, "ours", "theirs", CACHE))
    assert [list(line.get_ydata()) for line in axes.lines] == [[50, 25], [40, 30]]
    assert axes.get_ylim()[0] == 0


def test_a_trace_has_a_panel_for_each_threshold():
    decisions = [
        ("threshold 0.1", {"mask": "1011", "indicator": [None, 0.05, 0.2, 0.3], "threshold": 0.1}),
        ("threshold 0", {"mask": "1111", "indicator": [None] * 4, "threshold": 0.0}),
    ]
    figure = charts.trace(decisions, families.TEACACHE)
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == [
        "threshold 0.1: 3 of 4 steps computed",
        "threshold 0: 4 of 4 steps computed",
    ]
    assert {line.get_color() for line in figure.axes[1].lines} == {families.TEACACHE.colour}


def test_training_curves_have_a_panel_for_each_stage():
    steps = np.arange(100, 1100, 100)
    frame = pd.concat(pd.DataFrame({"stage": stage, "step": steps, "loss": 10.0 / steps}) for stage in ("vae", "flow"))
    figure = charts.curves(frame, ["vae", "flow"])
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["vae", "flow"]
    assert figure.axes[0].get_yscale() == "log"


def test_the_figures_of_many_phases_do_not_lie_on_each_other():
    count = 14
    figure = charts.waterfall(
        [f"+ part {i}" for i in range(count)], [2.5] * count, ["", *["≈ 1.00×"] * 13], [22.8] * count, [32.1] * count
    )
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == count
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_waterfall_says_what_each_phase_gains_and_makes_nothing_of_what_is_not_known():
    figure = charts.waterfall(["a", "+ b"], [5.0, 2.5], ["", "2.00×"], [34.0, None], [None, 34.0])
    assert any("2.00×" in text.get_text() for text in figure.axes[0].texts)
    assert [p.get_height() for p in figure.axes[1].patches] == [34.0]


def test_every_family_of_a_frontier_has_a_colour_of_its_own():
    shown = [f for f in families.ALL if f.dial or f in (families.BASELINE, families.COMBINED, families.PUBLISHED)]
    assert len({f.colour for f in shown}) == len(shown)
    assert not {families.Family("unheard of", "").colour} & {f.colour for f in shown}


# --- words on charts ---


def apart(figure):
    """The pairs of texts that lie on each other."""
    figure.canvas.draw()
    renderer, shown = figure.canvas.get_renderer(), []
    for axes in figure.axes:
        legend = axes.get_legend().get_texts() if axes.get_legend() else []
        ticks = [t.label1 for axis in (axes.xaxis, axes.yaxis) for t in axis.get_major_ticks()]
        shown += [t for t in (*axes.texts, *legend, *ticks, axes.xaxis.label, axes.yaxis.label) if t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]


def test_no_word_of_a_chart_lies_on_another_however_many_points_there_are(rows):
    crowd = [replace(r, id=f"{i} {r.id}", speedup=r.speedup + 0.01 * i) for r in rows for i in range(6)]
    for figure in (charts.frontier(crowd), charts.frontier(rows, x="computed_steps"), charts.frontier(rows[:1])):
        assert apart(figure) == []
    frame = pd.DataFrame(
        [("h200", n, f"way {i}", n * 0.9 + 0.01 * i, 1.0, 8.0) for i in range(6) for n in (2, 4, 8)],
        columns=["kind", "GPUs", "series", "speedup", "low", "high"],
    )
    assert apart(charts.scaling(frame)) == []


@pytest.mark.parametrize("table", sorted(Path(__file__).parents[1].glob("reports/single_gpu/h*/results.csv")), ids=str)
def test_nor_does_one_on_the_charts_of_committed_rows(table):
    from fluxnb.study.results import Results

    rows = [r for r in Results(table).rows() if r.use_case in (None, "txt2img")]
    shown = charts.on_frontier([r for r in rows if r.notebook == notebooks.COMBINED])
    assert not shown or apart(charts.frontier(shown)) == []


def test_words_are_dark_enough_to_be_read_on_white():
    for family in families.ALL:
        light = labels._luminance([int(labels.ink(family.colour)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert 1.05 / (light + 0.05) >= 4.4, family.name


def test_the_points_of_a_frontier_say_what_they_are_where_they_are(rows):
    """Under a pointer and the keyboard's focus."""
    markup = html.figure_html(charts.frontier(rows), "a frontier")
    points = re.findall(
        r'<span class="fx-point" role="img" tabindex="0" data-at="([\d.]+) ([\d.]+)" aria-label="(.*?)"', markup
    )
    assert len(points) == len(rows) and clean(markup) == markup
    (left, top, said), *_ = [p for p in points if p[2].startswith("FBCache 0.2;")]
    assert "Speedup over the baseline 2.5 times" in said and "29 dB" in said and "32 dB" in said
    other = next(p for p in points if p[2].startswith("FBCache 0.5;"))
    assert 0 < float(left) < float(other[0]) < 100 and 0 < float(top) < float(other[1]) < 100  # faster, and worse
    assert "None" not in markup and "data-at" not in html.figure_html(plt.figure(), "nothing")
