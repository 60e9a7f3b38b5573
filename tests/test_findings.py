"""What the rows say in words and tables, on rows made here whose answer is known."""

import math
import re
from dataclasses import replace

import pytest
from PIL import Image

from fluxnb import families, findings, notebooks, stacks
from fluxnb.families import (
    BASELINE,
    CEILING,
    FEWER_STEPS,
    FIRST_BLOCK,
    PARALLEL,
    QUANTIZATION,
    REPLICAS,
    SERVING,
    STACK,
    TEACACHE,
)
from fluxnb.findings import published
from fluxnb.findings.rows import over
from fluxnb.study.row import Row
from fluxnb.technique import ANOTHER, IDENTICAL, ROUNDING


def row(family, label, computed, speedup, psnr, adherence=0.95, threshold=None, identical=0, **other):
    latency = 0.4 / speedup
    steps = computed if family.control else 28
    exact = IDENTICAL if family is BASELINE else ANOTHER
    columns = dict(
        id=f"row {label}",
        family=family.name,
        technique=family.name,
        label=label,
        exact=exact,
        steps=steps,
        settings={} if threshold is None else {"threshold": threshold},
        model="embedded",
        weights="trained",
        status="ok",
        n=10,
        samples=[latency] * 10,
        first_s=0.5,
        latency_p50=latency,
        latency_p90=latency,
        speedup=speedup,
        speedup_ci_low=speedup - 0.1,
        speedup_ci_high=speedup + 0.1,
        computed_steps=float(computed),
        total_steps=steps,
        images=16,
        psnr_db=psnr,
        psnr_min_db=psnr,
        psnr_identical=identical,
        ssim=1.0 if psnr is None else 0.9,
        ssim_min=0.8,
        adherence=adherence,
        adherence_min=adherence,
        session="one",
    )
    return Row(**columns | other)


@pytest.fixture
def rows():
    return [
        row(BASELINE, "28 steps", 28, 1.0, None, identical=16),
        row(FIRST_BLOCK, "FBCache 0", 28, 0.99, None, threshold=0.0, identical=16),
        row(FIRST_BLOCK, "FBCache 0.05", 20, 1.4, 45.0, threshold=0.05),
        row(FIRST_BLOCK, "FBCache 0.2", 10, 2.5, 32.0, threshold=0.2),
        row(FIRST_BLOCK, "FBCache 0.5", 4, 5.0, 24.0, adherence=0.93, threshold=0.5),
        row(FIRST_BLOCK, "FBCache 0.8", 2, 8.0, 18.0, adherence=0.60, threshold=0.8),
        row(FEWER_STEPS, "20 steps", 20, 1.4, 40.0),
        row(FEWER_STEPS, "10 steps", 10, 2.6, 30.0),
        row(FEWER_STEPS, "3 steps", 3, 7.0, 23.0),
    ]


# --- words --------------------------------------------------------------------------------------------------


def test_quality_is_kept_within_five_percent_of_the_baseline():
    baseline = Row(adherence=0.9)
    assert findings.keeps_adherence(Row(adherence=0.856), baseline)
    assert not findings.keeps_adherence(Row(adherence=0.854), baseline)
    assert findings.keeps_adherence(Row(adherence=None), baseline)
    assert findings.keeps_adherence(Row(adherence=0.1), Row(adherence=None))


def test_the_table_has_quality_of_trained_weights_only(rows):
    table = findings.table(rows, findings.CACHE)
    assert list(table.index) == [r.label for r in rows] and table.index.name == "setting"
    assert {"speedup", "computed steps", "mean PSNR", "mean SSIM", "mean adherence"} <= set(table.columns)
    assert not {"first", "second"} & set(table.columns)  # of a loaded pipeline they would mean something else
    random = findings.table([replace(r, weights="random") for r in rows], findings.CACHE)
    assert not [name for name in random if "PSNR" in name or "SSIM" in name or "adherence" in name]


# --- tables -------------------------------------------------------------------------------------------------


def test_a_table_carries_its_units_formats_and_ids(rows):
    table = findings.table(rows, findings.CACHE)
    assert table.attrs["units"] | {"speedup": "×", "worst PSNR": "dB", "low": "×"} == table.attrs["units"]
    assert table.attrs["formats"]["mean adherence"] == ".1%" and "mean PSNR" not in table.attrs["formats"]
    assert list(table["row"]) == table.attrs["ids"] == [r.id for r in rows]
    assert set(table.attrs["units"]) | set(table.attrs["formats"]) <= set(table.columns)


def test_columns_that_say_nothing_are_left_out(rows):
    table = findings.table(rows, findings.LATENCY)
    assert not {"load", "p99", "status", "why not", "session", "its baseline"} & set(table.columns)
    tiny = [replace(r, memory_peak_gib=0.02, id=None) for r in rows]
    assert not {"peak", "row"} & set(findings.table(tiny, findings.LATENCY).columns)
    assert "peak" in findings.table([*tiny, replace(rows[0], memory_peak_gib=0.3)], findings.LATENCY)


def test_rows_of_several_sessions_are_not_mixed_unseen(rows):
    table = findings.table([rows[0], replace(rows[3], session="two", speedup=2.0)], findings.CACHE)
    assert list(table["session"]) == ["one", "two"]
    assert list(table["its baseline"]) == pytest.approx([0.4, 0.32])  # 0.16 s, twice as fast as its own baseline
    assert table.attrs["units"]["its baseline"] == "s" and "earlier format" not in table.attrs["note"]


def test_a_row_over_another_baseline_than_the_table_s_says_what_that_took(rows):
    base = rows[0]
    together, later = replace(rows[2], baseline=base.id), replace(rows[3], baseline="later", baseline_p50=0.9)
    assert "its baseline" not in findings.table([base, together], findings.CACHE)
    table = findings.table([base, together, later], findings.CACHE)
    assert table["its baseline"].tolist() == pytest.approx([0.4, 0.4, 0.9]) and "session" not in table


def test_rows_of_an_earlier_format_say_so(rows):
    old = [replace(r, session=None) for r in rows]
    table = findings.table(old, findings.CACHE)
    assert table.attrs["note"].endswith("Rows of an earlier format: their sessions aren't known")
    assert "session" not in table
    assert "session" in findings.table([*old, rows[0]], findings.CACHE)


def test_ends_are_an_interval_a_range_or_none_and_the_table_says_which(rows):
    few = [replace(r, n=3, baseline="b") for r in rows]
    earlier = [replace(r, n=3) for r in rows]  # without its baseline's samples: 75 % at best
    for given, said in (
        (rows, "Low and high: 95 % interval of the speedup"),
        (few, "Low and high: range of the speedup over so few rounds (fewer than 6)"),
        ([rows[0], *few], "Low and high: 95 % interval of the speedup; below n = 6 its range"),
    ):
        table = findings.table(given, findings.CACHE)
        assert said in table.attrs["note"] and table.loc["FBCache 0.2", "low"] == 2.4
    table = findings.table(earlier, findings.CACHE)
    assert not {"low", "high"} & set(table) and "interval" not in table.attrs["note"] and set(table["n"]) == {3}
    assert findings.table([earlier[1], rows[3]], findings.CACHE)["low"].isna().tolist() == [True, False]


def test_a_mean_has_the_worst_image_beside_it_and_earlier_adherence_is_not_shown(rows):
    seen = [replace(r, st_lpips=0.1, st_lpips_max=0.4, flip=0.05, flip_max=0.2) for r in rows]
    titles = list(findings.table(seen, findings.QUALITY))
    for name in ("PSNR", "SSIM", "ST-LPIPS", "FLIP", "adherence"):
        assert titles[titles.index(f"mean {name}") + 1] == f"worst {name}"
    assert findings.table(seen, findings.QUALITY).attrs["units"]["judged"] == "images"
    earlier = findings.table([replace(r, images=None) for r in seen], findings.QUALITY)
    assert "mean PSNR" in earlier and not {"mean adherence", "worst adherence", "judged"} & set(earlier)


def test_few_samples_have_no_percentiles_but_the_median(rows):
    timed = [replace(r, latency_p25=0.1, latency_p90=0.5) for r in rows]
    assert {"p25", "p50", "p90"} <= set(findings.table(timed, findings.LATENCY))
    few = findings.table([replace(r, n=9) for r in timed], findings.LATENCY)
    assert "p50" in few and not {"p25", "p90"} & set(few)


def test_clocks_and_what_held_them_down_stand_in_the_table(rows):
    def held(row, mhz, *reasons, **more):
        return replace(row, telemetry={"sm_clock_avg_mhz": mhz, "power_avg_w": 690, "throttle_reasons": reasons} | more)

    power = "software power cap"
    given = [held(rows[0], 1700, power, power_limited=0.8), held(rows[2], 1600, power), held(rows[3], 1980), rows[4]]
    table = findings.table(given, findings.MATRIX)
    assert table["throttled"].tolist()[:3] == [f"{power}, by power 80%", power, "no"]
    assert table.loc["FBCache 0.05", "SM clock"] == 1600 and table.attrs["units"]["power"] == "W"
    assert "2 of 3 rows ran under the power limit at a mean of 1,650 MHz" in table.attrs["note"]
    assert "warm-up" not in table.attrs["note"].split("2 of 3")[1]
    old = findings.table([replace(r, session=None) for r in given], findings.MATRIX)
    assert "at a mean of 1,650 MHz, warm-up included" in old.attrs["note"]  # which they were watched in
    assert "power limit" not in findings.table(given[2:], findings.MATRIX).attrs["note"]


def test_a_row_that_never_got_steady_is_marked(rows):
    table = findings.table([replace(rows[0], stable=1), replace(rows[2], stable=0), rows[3]], findings.CACHE)
    assert table["steady"].tolist()[:2] == ["yes", "no"] and "Steady: whether warm-up ended" in table.attrs["note"]
    assert "steady" not in findings.table([replace(r, stable=1) for r in rows], findings.CACHE)


def test_a_column_is_an_attribute_a_function_or_values(rows):
    columns = (findings.Column("a", "n"), findings.Column("b", lambda r: r.n + 1), findings.Column("c", [5, 6]))
    table = findings.table(rows[:2], columns, findings.Column("place", ["x", "y"]))
    assert table.loc["y", ["a", "b", "c"]].tolist() == [10, 11, 6] and table.index.name == "place"


def test_what_is_not_a_row_is_listed_too():
    table = findings.listed([{"a": 1, "b": 2.0}, {"a": 3}], "a", {"b": "MiB"})
    assert list(table.index) == [1, 3] and table.attrs["units"] == {"b": "MiB"}
    assert findings.pairs({"torch": "2.13"}, "Package", "Version").loc["torch", "Version"] == "2.13"


# --- caches -------------------------------------------------------------------------------------------------


def test_the_words_under_an_image():
    black, grey = (Image.new("RGB", (128, 128), (n, n, n)) for n in (1, 11))
    assert findings.under_image(black, black, None) == "identical"
    words = findings.under_image(black, grey, None)
    assert re.fullmatch(r"28\.1 dB, ST-LPIPS 0\.\d{3}, FLIP 0\.\d{3}", words)  # 20 log10(255 / 10)
    with_prompt = findings.under_image(black, grey, "a red apple on a white table")
    assert with_prompt.startswith(f"{words}, adherence ") and with_prompt.endswith("%")
    assert findings.under_image(black, grey, "a dragon") == words
    assert (findings.share(0.5), findings.share(None)) == ("50%", "–")


# --- published ----------------------------------------------------------------------------------------------


def test_the_published_curve_is_that_of_the_experiment():
    shares = published.first_block_shares()
    assert shares[0.0] == 1
    found = [100 * shares[t] for t in (0.05, 0.1, 0.2, 0.5, 0.8)]
    assert found == pytest.approx([72, 45, 25, 14, 10], abs=1)
    assert list(shares) == sorted(shares)


def test_every_published_figure_has_its_source_and_what_has_a_number_its_unit():
    table = published.table()
    assert len(table) > 50
    assert all(f.source and f.metric and (f.words if f.value is None else f.unit) for f in table)


# --- techniques of one image -------------------------------------------------------------------------------


def matrix_row(label, speedup, psnr=40.0, peak=20.0, quantization="", computed=28, weights="trained", **other):
    family = BASELINE if speedup == 1.0 else QUANTIZATION if quantization else STACK
    more = {
        "settings": {"dtype": "bfloat16", "compile": "blocks"}
        | ({"quantization": quantization} if quantization else {})
        | ({"every": 4} if computed < 28 else {}),
        "exact": IDENTICAL if family is BASELINE else ANOTHER if quantization or computed < 28 else ROUNDING,
        "weights": weights,
        "batch": 1,
        "denoise_s": 0.3 / speedup,
        "memory_load_gib": peak - 2,
        "memory_peak_gib": peak,
        "proof": {"layers": 494, "of": 494, "weight": "Float8Tensor"} if quantization else None,
    }
    return row(family, label, computed, speedup, psnr, **more | other)


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


def test_a_matrix_has_proofs_and_reasons(timed):
    missing = replace(matrix_row("GGUF", 1.2, weights="random"), latency_p50=None, speedup=None, proof=None)
    missing = replace(missing, status="unavailable", reason="needs the package gguf")
    table = findings.table([*timed, missing], findings.MATRIX)
    assert table.loc["+ FP8", "applied"] == "494 of 494 layers: Float8Tensor"
    assert table.loc["GGUF", "why not"] == "needs the package gguf"
    assert list(table["status"]) == ["ok"] * 7 + ["unavailable"]
    assert table.attrs["units"]["peak"] == "GiB" and "mean PSNR" not in table
    assert not {"status", "why not"} & set(findings.table(timed, findings.MATRIX))
    assert "mean PSNR" in findings.table([matrix_row("FP8", 1.1, 34.0)], findings.MATRIX)


def test_a_matrix_says_how_many_steps_are_computed_where_some_are_not(judged):
    assert "computed steps" not in findings.table(judged[:3], findings.MATRIX)
    assert list(findings.table(judged, findings.MATRIX)["computed steps"]) == [28, 28, 28, 12, 28]


class Reached:
    """A machine that takes 2 ms for a step in FP8, 4 ms in bfloat16."""

    products = {"fp8": 1e6, "bfloat16": 1e5}
    attention = 1e6
    timed_s, clock_mhz, session = 2.0, 1600.0, "one"

    def step_s(self, work, number):
        return {"fp8": 0.002, "bfloat16": 0.004}.get(number)


def test_the_share_of_the_limit_stands_behind_the_time_of_a_step(timed):
    columns = findings.limited(findings.MATRIX, Reached(), work=None)
    table = findings.table([timed[0], timed[2], timed[4]], columns)
    titles = list(table.columns)
    assert titles[titles.index("per step") + 1] == "of the limit" and table.attrs["formats"]["of the limit"] == ".1%"
    assert table.loc["baseline", "of the limit"] == pytest.approx(28 * 0.004 / 0.3)
    assert table.loc["+ FP8", "of the limit"] == pytest.approx(28 * 0.002 * 1.8 / 0.3)
    assert "ceilings held for 2 s each at a mean of 1,600 MHz in session one" in table.attrs["note"]
    assert findings.of_limit(replace(timed[0], batch=4), Reached(), None) is None


def test_products_are_done_in_the_format_of_the_weights_or_of_the_model(timed):
    kinds = ["torchao fp8 row", "torchao int8", "torchao fp8 row, 2:4 sparse", "torchao int8 weight-only", None]
    rows = [replace(timed[0], settings={"dtype": "bfloat16", "quantization": kind}) for kind in kinds]
    assert [findings.number(r) for r in rows] == ["fp8", "int8", None, "bfloat16", "bfloat16"]
    assert findings.number(timed[0]) == "bfloat16"


def test_where_a_step_goes_on_one_gpu(timed):
    class Work:
        products, attention = 1e3, 2e3

    parts = {"matrix products": 4.0, "attention": 2.0, "the rest": 1.0}
    profiled = replace(timed[2], proof={"step_ms": parts})
    table = findings.step_parts([timed[0], profiled], Reached(), Work())
    assert list(table.index) == ["+ FP8"]
    line = table.loc["+ FP8"]
    assert (line["products"], line["products at least"], line["attention at least"]) == (4.0, 1.0, 2.0)
    assert line["one step"] == pytest.approx(1e3 * 0.3 / 1.8 / 28)
    assert line["no kernel"] == 0.0 and set(table.attrs["units"].values()) == {"ms"}
    assert findings.step_parts(timed[:2], Reached(), Work()) is None


def test_what_compilation_changes():
    eager, same, other = (
        matrix_row(n, 1.0 + i, p) for i, (n, p) in enumerate((("eager", None), ("a", None), ("b", 52.0)))
    )
    assert findings.changes_sentence([eager, same]) == "no variant was judged here."  # which isn't identical
    same = replace(same, psnr_identical=16)
    exact = "every variant makes the eager images, to the last bit (16 each)."
    assert findings.changes_sentence([eager, same]) == exact
    assert findings.changes_sentence([eager, same, other]) == (
        "b changes images most, of 2 variants: worst of 16 images 52.0 dB, mean 52.0 dB; the worst of 16 images stays "
        "at 35 dB or more with 2 of 2 and at 28 dB or more with 2 of 2 (adherence 95%)."
    )
    worse = replace(other, psnr_min_db=30.0, adherence=1.0)  # the probe's facts are no floor
    assert findings.changes_sentence([eager, worse]).startswith("b changes images: worst of 16 images 30.0 dB, mean")
    assert "at 35 dB or more with 0 of 1 and at 28 dB or more with 1 of 1" in findings.changes_sentence([eager, worse])
    earlier = replace(other, images=None)
    assert findings.changes_sentence([eager, earlier]).endswith("how many were judged isn't known.")
    missing = Row(label="TensorRT", status="unavailable", reason="needs a package")
    table = findings.table([eager, same, other, missing], findings.QUALITY)
    assert table.loc["b", "mean PSNR"] == 52.0 and table.loc["TensorRT", "why not"] == "needs a package"
    assert findings.changes_sentence([eager, missing]).startswith("no variant")


def test_a_variant_has_its_first_image_cold_and_warm():
    rows = [matrix_row("eager", 1.0), matrix_row("blocks", 1.5, first_s=70.0, proof={"graphs": 2, "breaks": 0})]
    warm = {"blocks": Row(label="blocks", latency_p50=9.0)}
    table = findings.compile_table(rows, warm, Reached(), None)
    assert (table.loc["blocks", "cold"], table.loc["blocks", "warm"], table.loc["blocks", "graphs"]) == (70, 9, 2)
    assert math.isnan(table.loc["eager", "warm"]) and "recompiles" not in table and table.index.name == "variant"
    assert (
        findings.waits_sentence(rows, warm)
        == "the longest wait for a first image is 70 s cold (blocks) and 9 s warm (blocks)."
    )
    assert table.attrs["formats"]["graphs"] == ".0f"  # a count, though another row has none
    assert findings.waits_sentence(rows, {}) == "no wait for a first image was measured here."
    assert findings.baseline_sentence([replace(rows[0], status="oom")]).startswith("no format can run here")


def test_what_the_machine_reaches_by_itself():
    def timed(label, p50, **settings):
        proof, samples = {"timed_s": 2.0}, [p50] * 3
        about = {"settings": settings, "samples": samples, "telemetry": {"sm_clock_avg_mhz": 1650.0}}
        return Row(family=CEILING.name, label=label, status="ok", latency_p50=p50, proof=proof, **about)

    rows = [
        timed("product, fp8", 2e-3, size=1000),
        timed("attention", 4e-3, shape=[1, 2, 1000, 100], kernel="default"),
        timed("copy", 0.5, bytes=10**9),
        Row(label="int8", status="unavailable", reason="needs a GPU", settings={"size": 1000}),
    ]
    table = findings.table(rows, findings.CEILINGS)
    assert table.loc["product, fp8", "arithmetic"] == pytest.approx(1.0)
    assert table.loc["attention", "arithmetic"] == pytest.approx(0.2) and table.loc["copy", "memory"] == pytest.approx(
        2
    )
    assert table.loc["int8", "why not"] == "needs a GPU" and table.loc["copy", "time"] == 500
    said = findings.ceilings_sentence(rows)
    assert "1 TFLOP/s (product, fp8, held for 2 s at 1,650 MHz); memory moves 2 GB/s" in said
    burst = findings.ceilings_sentence([replace(rows[0], proof=None, telemetry=None)])
    assert "(product, fp8, in a burst of milliseconds)" in burst  # rows of an earlier format
    kernel = replace(rows[1], proof={"kernels": ["flash_fwd", "copy"], "error": 1e-3})
    default = "attention runs **flash_fwd** and reaches 0.2 TFLOP/s; "
    assert findings.kernels_sentence([kernel]) == f"{default}none is faster."
    near = replace(kernel, label="near", latency_p50=3.9e-3, samples=[3.7e-3, 3.9e-3, 4.1e-3])
    assert findings.kernels_sentence([kernel, near]) == f"{default}near can not be told from it."
    fast = replace(kernel, label="fast", latency_p50=2e-3, samples=[2e-3] * 3)
    assert findings.kernels_sentence([kernel, near, fast]) == f"{default}the fastest is fast with 0.4 TFLOP/s."
    assert "fast and as fast are equally fast" in findings.kernels_sentence(
        [kernel, fast, replace(fast, label="as fast")]
    )
    table = findings.table([kernel], findings.KERNELS)
    assert table.attrs["formats"]["error"] == ".1e" and table.loc["attention", "what ran"] == "flash_fwd; copy"


def test_the_fastest_number_format_is_faster_beyond_the_noise():
    full = row(BASELINE, "float32, 28 steps", 28, 1.002, None, width=256, height=256)
    few = row(BASELINE, "float32, 8 steps", 28, 1.01, None, steps=8)
    half = row(families.NUMBER_FORMAT, "bfloat16, 8 steps", 28, 1.5, 40.0, steps=8)
    said = findings.baseline_sentence([full, few, half])
    assert said == (
        "float32, 28 steps at 256×256 take 0.399 s per image; bfloat16, 8 steps is the fastest, **1.50 times** as fast "
        "as the baseline, “float32, 8 steps” (95 % interval [1.40, 1.60], n = 10), 0.267 s instead of 0.4 s per image. "
        "The baseline over itself, timed twice in turn: 1.010 times (95 % interval [0.91, 1.11], n = 10)."
    )
    within = findings.baseline_sentence([full, few, replace(half, speedup_ci_low=1.05)])
    assert "nothing is faster than the baseline, “float32, 8 steps”, beyond the noise" in within


def test_decoding_is_compared_with_the_first_of_its_size_and_batch():
    def timed(label, p50, peak, width=1024, batch=1, session="one"):
        sizes = {"width": width, "batch": batch, "session": session, "samples": [0.9 * p50, p50, 1.1 * p50], "n": 3}
        return Row(label=label, status="ok", latency_p50=p50, memory_peak_gib=peak, **sizes)

    rows = [
        timed("eager", 0.4, 8.0),
        timed("compiled", 0.2, 8.0),
        timed("eager", 1.6, 8.0, batch=4),
        timed("sliced", 1.6, 4.0, batch=4),
        timed("eager", 2.0, 30.0, width=2048),
        timed("tiled", 4.0, 10.0, width=2048),
        timed("compiled", 0.1, 8.0, session="two"),
    ]
    table = findings.decoding_table(rows)
    assert table["over the first"].tolist() == pytest.approx([1, 2, 1, 1, 1, 0.5, 1])
    said = findings.decoding_sentence(rows)
    assert said == (
        "compiled decodes one image of 1024² fastest, in 200 ms (2.00× eager, n = 3); at 2048² tiled needs least "
        "memory, 10.00 GiB, 20.00 GiB less."
    )
    near = findings.decoding_sentence([rows[0], timed("channels-last", 0.39, 8.0)])
    assert near == "nothing decodes one image of 1024² faster than eager beyond the noise."
    two = findings.decoding_sentence([*rows[:2], timed("both", 0.21, 8.0)])
    assert two.startswith("compiled and both decode one image of 1024² equally fast within the noise, compiled in 200")


# --- several GPUs -------------------------------------------------------------------------------------------


def spread(family, label, p50, speedup=None, images=1, exact=ROUNDING, **other):
    columns = {
        "exact": exact,
        "gpus": 2,
        "latency_p50": p50,
        "speedup": speedup,
        "images_per_s": images / p50,
        "proof": {},
        "memory_load_gib": 34.0,
        "memory_peak_gib": 40.0,
    }
    return replace(row(family, label, 28, speedup or 1.0, None), **columns | other)


def test_where_a_step_goes_on_several_gpus():
    parts = {"attention": 14.0, "matrix products": 43.0, "communication": 12.0, "the rest": 5.0}
    own = spread(PARALLEL, "all-gather 2", 2.24, total_steps=28, proof={"step_ms": parts})
    bound = replace(own, label="FP8", latency_p50=2.8, telemetry={"sm_clock_avg_mhz": 1980})
    table = findings.scaling_parts([spread(REPLICAS, "replicas", 3.6), own, bound])
    assert list(table.index) == ["all-gather 2", "FP8"] and table.loc["FP8", "image / steps"] == pytest.approx(100)
    assert table.loc["all-gather 2", "text, VAE, waiting"] == pytest.approx(6)
    assert table.attrs["units"]["communication"] == "ms" and table.attrs["units"]["SM clock"] == "MHz"
    assert "one step" not in table and "skipped step" not in table  # of earlier runs
    steps = {"computed": 78.0, "computed, set off in": 12.0, "skipped": 5.0, "skipped, set off in": 4.5}
    cached = replace(bound, label="cached", proof={"steps_ms": steps})
    table = findings.scaling_parts([replace(bound, proof={"step_ms": parts, "steps_ms": {"computed": 78.0}}), cached])
    assert table.loc["FP8", "waiting"] == pytest.approx(4)
    assert (table.loc["cached", "skipped step"], table.loc["cached", "it set off in"]) == (5.0, 4.5)
    assert table.loc["cached", "one step"] == 78.0 and math.isnan(table.loc["cached", "waiting"])
    assert findings.scaling_parts([spread(REPLICAS, "replicas", 3.6)]) is None


def test_what_an_image_on_several_gpus_is_made_of():
    alone = {"alone_s": 3.6, "alone_stages": {"text_s": 0.03, "denoise_s": 3.5, "vae_s": 0.04}}
    own = spread(PARALLEL, "pulled 2", 2.0, 1.8, text_s=0.03, denoise_s=1.75, vae_s=0.02, proof=alone)
    none = replace(own, label="no text", text_s=None)
    table = findings.scaling_stages([spread(REPLICAS, "replicas", 3.6, denoise_s=3.5, proof=alone), own, none])
    assert list(table.index) == ["pulled 2", "no text"]  # replicas divide nothing
    assert table.loc["pulled 2", "steps divided"] == pytest.approx(2.0)
    assert list(table["the rest"]) == pytest.approx([200, 230])
    assert table.loc["pulled 2", "the rest, alone"] == pytest.approx(30)
    assert table.attrs["units"] | {"text": "ms", "steps divided": "×"} == table.attrs["units"]
    assert findings.scaling_stages([replace(own, proof={"alone_s": 3.6})]) is None  # of earlier runs


def test_only_images_over_several_gpus_are_divided():
    own = spread(PARALLEL, "pulled 2", 2.0, 1.8, notebook=notebooks.PARALLEL, weights="random")
    alone = replace(own, family=BASELINE.name, gpus=1)
    others = [replace(own, weights="trained"), replace(own, status="oom"), replace(own, notebook=notebooks.LOAD)]
    assert findings.divided([own, alone, *others]) == [own]


def test_what_fits_leaves_something_to_spare(timed):
    table = findings.fits(timed)
    assert "CUDA's context come on top" in table.attrs["note"]
    table = table.drop(columns=["row", "peak"])
    assert list(table.loc["+ FP8"]) == ["no", "no", "yes", "yes"]  # 23 GiB don't fit a card of 24
    assert list(table.loc["NF4"]) == ["no", "yes", "yes", "yes"]  # nor 15 GiB one of 16
    lacking = findings.fits([replace(row, status="oom", memory_peak_gib=None) for row in timed])
    assert not {"yes", "no"} & set(lacking.to_numpy().ravel())


def test_gains_are_over_the_fastest_phase_before_in_the_same_session(timed):
    table = findings.gains(timed[:3], Reached(), None)
    assert table["own gain"].iloc[2] == pytest.approx(1.8 / 1.3) and math.isnan(table["own gain"].iloc[0])
    assert list(table["beyond the noise"])[1:] == ["yes", "yes"] and "of the limit" in table
    sentence = findings.stack_sentence(timed[:3])
    assert "1.80×" in sentence and "the largest gain of one phase is that of “+ FP8”, 1.38× the fastest" in sentence
    elsewhere = replace(timed[2], session="two")
    assert over(elsewhere, timed[:2]) is None
    assert "“+ compiled blocks”, 1.30×" in findings.stack_sentence([*timed[:2], elsewhere])


def test_no_gain_is_over_a_slowdown(timed):
    slow = replace(timed[1], label="+ eager FP8", speedup=0.8)
    assert over(timed[2], [timed[0], slow]) == 1.8  # not 2.25
    assert "“+ FP8”, 1.80× the fastest before it" in findings.stack_sentence([timed[0], slow, timed[2]])
    apart = [replace(r, session="two") for r in (slow, timed[2])]  # without a baseline's row among them
    assert over(apart[1], apart[:1]) == 1.8


def test_a_gain_within_the_noise_is_no_step(timed):
    last = replace(timed[1], label="+ hooks", speedup=1.34, speedup_ci_low=1.29, speedup_ci_high=1.39)
    table = findings.gains([timed[0], timed[1], last], Reached(), None)
    assert list(table["beyond the noise"])[1:] == ["yes", "no"]
    few = [replace(r, n=3, session=None, baseline=None, again=None) for r in timed[:3]]  # no interval tells them apart
    said = findings.stack_sentence(few)
    assert "(n = 3)" in said and said.endswith("no phase gains anything over the fastest before it beyond the noise.")
    assert findings.stack_sentence(timed[:1]) == "no phase can run here; the table says why."


def test_the_seconds_of_a_sentence_are_those_of_its_ratio(timed):
    last = replace(timed[2], session="two", latency_p50=1.14, speedup=4.43)
    sentence = findings.stack_sentence([replace(timed[0], latency_p50=4.99), last])
    assert "**1.14 s** instead of 5.05 s, 4.43×" in sentence
    replayed = replace(last, computed_steps=12.0)
    said = findings.replay_sentence([timed[0], replayed])
    assert "12 of 28 steps" in said and "takes 1.14 s, where all steps take 5.05 s: **4.43×**" in said


def test_nothing_is_the_fastest_within_the_noise(timed):
    assert "FP8" in findings.fastest_sentence(timed[:3])
    within = matrix_row("no faster", 1.05, weights="random")
    said = "nothing is faster than the baseline, “baseline”, beyond the noise."
    assert findings.fastest_sentence([timed[0], within]) == said
    gone = replace(within, status="unavailable")
    assert findings.fastest_sentence([timed[0], within, gone]) == f"{said} 1 of 2 can't run here; the table says why."


def test_within_the_noise_of_each_other_two_are_equally_fast():
    base = matrix_row("4 steps", 1.0, weights="random", n=3, baseline="b", speedup_ci_low=0.99, speedup_ci_high=1.01)
    one = replace(base, label="fused GELU", speedup=1.63, speedup_ci_low=1.6, speedup_ci_high=1.69, latency_p50=0.51)
    two = replace(one, label="all", speedup=1.6, speedup_ci_low=1.55, speedup_ci_high=1.65)
    slow = replace(one, label="blocks", speedup=1.3, speedup_ci_low=1.25, speedup_ci_high=1.35)
    said = findings.fastest_sentence([base, two, one, slow])
    assert said.startswith(
        "fused GELU and all are equally fast within the noise: fused GELU is **1.63 times** as fast as the baseline, "
        "“4 steps” (range of three rounds [1.60, 1.69]), 0.51 s instead of 0.831 s per image"
    )
    elsewhere = replace(two, label="another", speedup=9.0, speedup_ci_low=8.0, speedup_ci_high=10.0, session="other")
    assert findings.fastest_sentence([base, one, slow, elsewhere]).startswith("fused GELU is the fastest")
    earlier = [replace(r, baseline=None, session=None) for r in (base, one, slow)]
    assert findings.fastest_sentence(earlier) == (
        "whether anything is faster than the baseline, “4 steps”, can't be told: these rows have no interval; the "
        "largest ratio is 1.63 times, of fused GELU (n = 3)."
    )


def test_formats_are_ordered_by_what_they_change(judged):
    sentence = findings.quality_sentence([judged[0], *judged[1:3], judged[4]])
    assert (
        "INT8 changes images least (worst of 16 images 44.0 dB, mean 44.0 dB) and NF4 most (worst of 16 images"
        in sentence
    )
    assert "at 35 dB or more with 1 of 3 and at 28 dB or more with 2 of 3 (adherence 50% to 95%)" in sentence
    spoilt = replace(judged[2], psnr_min_db=15.0)  # the best mean, with one ruin in it
    assert "NF4 changes images least" in findings.quality_sentence([judged[0], spoilt, judged[4]])
    unjudged = replace(judged[1], psnr_db=None, psnr_identical=None, psnr_min_db=None)
    assert findings.quality_sentence([judged[0], unjudged]) == "no quantized format was judged here."
    assert findings.quality_sentence(judged[:2]).startswith("FP8 changes images least (worst of 16 images 34.0 dB")
    failed = replace(unjudged, status="unavailable")
    assert findings.quality_sentence([judged[0], failed]) == "no quantized format can run here; the table says why."


def test_published_ratios_stand_beside_ours_with_the_ledgers_verdict(timed):
    full_size = {"weights": "random", "model": "flux-dev-random", "width": 1024, "height": 1024, "steps": 28}
    full_size |= {"use_case": "txt2img", "gpu": "h200", "gpus": 1, "batch": 1}
    base = replace(timed[0], **full_size, settings={"dtype": "bfloat16"})
    ours = matrix_row("compiled", 1.3, stack=stacks.BF16_COMPILED)
    ours = replace(ours, **full_size)
    table = findings.beside_published([base, ours])
    line = table[table["GPU"] == "H200"].iloc[0]
    assert line["theirs"] == "1.29×" and line["ours"].startswith("1.30×") and line["row"] == "row compiled"
    assert line["verdict"] == "undecided"
    assert set(table[table["GPU"] == "H100"]["why"]) == {"GPU: H100, ours H200"}
    assert "no row has" in findings.beside_published([base]).iloc[0]["why"]


def test_time_shares_are_of_the_uncached_run():
    shares = published.time_shares(TEACACHE, "H100 80GB")
    assert list(shares) == [0.2, 0.4, 0.6] and shares[0.6] == pytest.approx(2.69 / 7.18)
    assert published.time_shares(FIRST_BLOCK, "A6000")[0.8] == pytest.approx(2.03 / 20.58)
    with pytest.raises(KeyError, match="nothing is published"):
        published.time_shares(TEACACHE, "A6000")


def test_one_image_on_several_gpus_in_words_and_in_a_table():
    rows = [
        spread(REPLICAS, "replicas", 3.6, images=2),
        spread(PARALLEL, "all-gather 2", 2.1, 1.7, proof={"communication": 0.2, "alone_s": 3.6}),
        spread(PARALLEL, "Ulysses 2", 2.0, 1.8, proof={"communication": 0.1, "alone_s": 3.6}),
    ]
    said = findings.scaling_sentence(rows)
    assert said.startswith(
        "Ulysses 2 makes one image **1.80 times** as fast as one GPU (95 % interval [1.70, 1.90], n = 10; 2 s instead "
        "of 3.6 s, 90% of 2×)"
    )
    assert "with 10% of a step's kernels moving data" in said
    assert "2 replicas make 0.556 images a second, 1.11 times as many: replicas win for many images" in said
    table = findings.scaling_table(rows)
    assert table.loc["Ulysses 2", "efficiency"] == 0.9 and table.loc["Ulysses 2", "alone"] == pytest.approx(3.6)
    assert table.loc["all-gather 2", "of replicas"] == pytest.approx((1 / 2.1) / (2 / 3.6))
    alone = replace(rows[1], family=BASELINE.name, label="one of the GPUs alone", gpus=1, latency_p50=0.1)
    quantized = (spread(STACK, name, s, exact=ANOTHER) for name, s in (("Ulysses 2, FP8", 0.8), ("FP8", 0.9)))
    assert "there after **0.8 s** (Ulysses 2, FP8)" in findings.scaling_sentence([*rows, *quantized, alone])
    assert "could be measured" in findings.scaling_sentence([spread(PARALLEL, "x", 1.0)])
    stale = spread(PARALLEL, "PipeFusion 2", 1.0, 3.0, exact=ANOTHER)
    assert findings.scaling_sentence([*rows, stale]).startswith("Ulysses 2 makes one image")
    noisy = [replace(r, samples=[r.latency_p50 * f for f in (0.9, 1.0, 1.1)], n=3, baseline="b") for r in rows]
    said = findings.scaling_sentence(noisy)
    assert "(range of three rounds [1.70, 1.90]; 2 s" in said and "within the noise of all-gather 2" in said
    assert "1.11 times as many" in said and "win for many images" not in said
    built = replace(rows[0], family=STACK.name, stack=stacks.REPLICAS)  # at full size they have more built in
    assert findings.scaling_sentence([built, *rows[1:]]) == findings.scaling_sentence(rows)
    assert findings.scaling_table([built, *rows[1:]])["of replicas"].iloc[0] == 1
    older = findings.scaling_sentence([replace(rows[0], latency_p50=3.8), *rows[1:]])
    assert "(of another stack: alone it takes 3.8 s, this one 3.6 s)" in older
    other = replace(rows[2], label="elsewhere", latency_p50=0.1, speedup=30.0, session="two")
    assert "elsewhere" not in findings.scaling_sentence([*rows, other])


def test_what_recording_does_to_a_divided_image():
    ulysses, pulled = {"ulysses": 4, "gather": 1}, {"gather": 4, "pull": True}
    rows = [
        spread(REPLICAS, "replicas", 3.6, settings={"replicas": True}),
        spread(PARALLEL, "Ulysses 4", 3.3, 1.1, settings=ulysses),
        spread(STACK, "Ulysses 4, recorded", 1.4, 2.6, settings=ulysses | {"cuda_graph": "blocks"}),
        spread(STACK, "pulled 4, recorded", 1.3, 2.7, settings=pulled | {"cuda_graph": "blocks"}),
    ]
    assert "one by one: Ulysses 4 3.3 → **1.4 s**." in findings.recorded_sentence(rows)
    assert findings.recorded_sentence(rows[2:]) is None
    assert findings.recorded_sentence([rows[1], replace(rows[2], session="two")]) is None


def test_pictures_of_several_ranks_in_words():
    rows = [
        spread(REPLICAS, "replicas", 3.6),
        spread(PARALLEL, "all-gather 2", 2.1, psnr_db=95.04, psnr_identical=0),
        spread(PARALLEL, "FSDP", 2.1, psnr_identical=2),
        spread(PARALLEL, "PipeFusion 2", 2.1, psnr_db=31.2, psnr_identical=0, settings={"pipefusion": 2}),
        spread(STACK, "cached", 2.1, psnr_identical=2, proof={"decisions": "identical on all ranks"}),
        spread(STACK, "cached", 2.1, psnr_identical=2, proof={"decisions": ["01", "11"]}),
        spread(PARALLEL, "xDiT Ulysses 2", 1.0, status="unavailable"),
    ]
    said = findings.same_everywhere_sentence(rows)
    assert said.startswith("4 ways of dividing make the picture of one rank (one compared), 3 of them to the last")
    assert findings.same_everywhere_sentence(rows[1:2]) == (
        "1 way of dividing makes the picture of one rank (one compared), within 95.0 dB."
    )
    assert "within 95.0 dB; under 1 of 2 caches all ranks decided alike" in said
    assert "PipeFusion 2, whose patches see each other a step late, makes another (31.2 dB); 1 could not run" in said


def test_a_load_in_words_and_in_a_table():
    def load(users, rate, p50, queued, batching=1, **other):
        proof = {"queued_s": queued, "service_s": p50 - queued, "batch": 3.2 if batching > 1 else 1.0}
        columns = {"settings": {"batching": batching}, "users": users, "images_each": 1, "images_per_s": rate}
        columns |= {
            "latency_p50": p50,
            "latency_avg": p50,
            "proof": proof,
            "label": f"{users} users, {batching}",
            "n": 100,
        }
        return Row(family=SERVING.name, status="ok", **columns | other)

    rows = [load(1, 0.5, 2.0, 0.0), load(4, 0.49, 8.0, 6.0), load(4, 0.6, 6.5, 3.0, 4)]
    arrivals = load(1, 0.1, 9.0, 1.0, settings={"batching": 1, "arrivals": 0.5})
    assert findings.load_sentence([*rows, arrivals]) == (
        "4 users get 0.49 images a second (100 requests, once), 98% of what 1 user gets, and half of the requests take "
        "longer than **8 s** instead of 2 s, 75% of it in the queue; made up to 4 together (3.2 on average), 1.22 "
        "times as many images are made."
    )
    few = [replace(r, n=8) for r in rows]
    said = findings.load_sentence(few)
    assert "a request takes **8 s on average** instead of 2 s" in said.replace(
        "**8 s** on average", "**8 s on average**"
    )
    assert "(too few for percentiles, and the queue is filling for the first 4)" in said and "half of" not in said
    one = replace(rows[2], proof=rows[2].proof | {"batch": 1.0})
    said = findings.load_sentence([*rows[:2], one])
    assert said.endswith("allowed to make up to 4 together, the server made one at a time (1.00 on average).")
    assert findings.load_sentence(rows[:1]).startswith("1 user get")
    elsewhere = replace(rows[0], session="two")
    assert "instead of 3 s" in findings.load_sentence([load(1, 0.5, 3.0, 0.0), elsewhere, *rows[1:]])
    assert not {"p50", "p90"} & set(findings.table(few, findings.LOAD, "load").columns)
    table = findings.table(rows, findings.LOAD, "load")
    assert list(table["queued"]) == [0, 6, 3] and table.attrs["units"]["queued"] == "s"
    assert table["together"].tolist()[2] == 3.2 and math.isnan(table["together"].iloc[0])
    assert not {"refused", "failed", "p99"} & set(table.columns)
