"""What the rows say in words and tables, on rows made here whose answer is known."""

import math
from dataclasses import replace

import measured
import pytest
from PIL import Image

from fluxnb import families, findings, notebooks, stacks
from fluxnb.families import (
    BASELINE,
    CEILING,
    COMBINED,
    FEWER_STEPS,
    FIRST_BLOCK,
    INTERVAL,
    PARALLEL,
    QUANTIZATION,
    REPLICAS,
    SECOND_ORDER,
    SERVING,
    STACK,
    TEACACHE,
)
from fluxnb.findings import published
from fluxnb.findings.rows import over
from fluxnb.findings.use_cases import of_cases
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


def test_the_control_is_interpolated_between_its_neighbours_only(rows):
    assert findings.control_psnr(rows, "computed_steps", 10) == 30
    assert findings.control_psnr(rows, "computed_steps", 15) == 35
    assert findings.control_psnr(rows, "computed_steps", 2) is None
    assert findings.control_psnr(rows, "computed_steps", 28) is None


def test_the_sentence_names_the_fastest_setting_that_keeps_quality(rows):
    text = findings.cache_sentence(rows, FIRST_BLOCK)
    assert text.startswith(
        "FBCache 0.2 makes an image **2.50 times** faster ([2.40, 2.60], n = 10), computing 10.0 of 28"
    )
    assert "32.0 dB" in text and "95.0% adherence (uncached 95.0%)" in text
    # at 20, 10 and 4 computed steps: +5, +2 and 24 - 24 = 0 dB
    assert "2.3 dB above simply using fewer steps" in text and "(+0.0 to +5.0 dB)" in text


def test_the_sentence_says_so_when_no_setting_keeps_quality(rows):
    poor = [r for r in rows if r.label not in ("FBCache 0", "FBCache 0.05", "FBCache 0.2")]
    text = findings.cache_sentence(poor, FIRST_BLOCK)
    assert text.startswith("FBCache 0.8 makes") and "the fastest setting above 30 dB" not in text


def test_identical_images_are_called_identical(rows):
    only = [r for r in rows if r.label in ("28 steps", "FBCache 0")]
    assert "identical" in findings.cache_sentence(only, FIRST_BLOCK)
    assert "inf" not in findings.cache_sentence(only, FIRST_BLOCK)


def test_presets_follow_from_the_rows(rows):
    table = findings.presets(rows, FIRST_BLOCK)
    assert list(table.index) == ["conservative", "balanced", "aggressive"]
    assert list(table["threshold"]) == [0.05, 0.2, 0.5]  # 0.8 is faster and loses too much adherence
    assert list(table["speedup"]) == [1.4, 2.5, 5.0]
    assert list(table["plan's threshold"]) == [0.05, 0.12, 0.2]
    measured = list(table["measured there"])
    assert measured[0] == 1.4 and measured[2] == 2.5
    assert measured[1] is None or math.isnan(measured[1])  # 0.12 was not measured


def test_a_preset_that_nothing_fits_is_empty(rows):
    table = findings.presets([r for r in rows if r.label in ("28 steps", "FBCache 0.8")], FIRST_BLOCK)
    assert not {"threshold", "speedup", "session"} & set(table) and "note" not in table.attrs
    assert list(table.index) == ["conservative", "balanced", "aggressive"]


def test_agreement_is_in_percentage_points():
    text = findings.agreement_sentence({0.1: 0.5, 0.2: 0.3, 0.9: 1.0}, {0.1: 0.45, 0.2: 0.4})
    assert "computed 50, 30 % at thresholds 0.1, 0.2" in text and "published 45, 40 %" in text
    assert "8 points apart on average, at most 10 (at 0.2)" in text


def test_shares_of_computed_steps(rows):
    shares = findings.computed_shares(findings.of(rows, FIRST_BLOCK))
    assert shares == {0.0: 1, 0.05: 20 / 28, 0.2: 10 / 28, 0.5: 4 / 28, 0.8: 2 / 28}


def test_the_table_has_first_and_second_and_quality_of_trained_weights_only(rows):
    table = findings.table(rows, findings.CACHE)
    assert list(table.index) == [r.label for r in rows] and table.index.name == "setting"
    assert table.loc["FBCache 0.2", "second"] == pytest.approx(0.16)
    assert {"first", "second", "speedup", "computed steps", "PSNR", "SSIM", "adherence"} <= set(table.columns)
    random = findings.table([replace(r, weights="random") for r in rows], findings.CACHE)
    assert not {"PSNR", "SSIM", "adherence"} & set(random.columns)


# --- tables -------------------------------------------------------------------------------------------------


def test_a_table_carries_its_units_formats_and_ids(rows):
    table = findings.table(rows, findings.CACHE)
    assert table.attrs["units"] | {"first": "s", "worst": "dB"} == table.attrs["units"]
    assert table.attrs["formats"]["adherence"] == ".1%" and "PSNR" not in table.attrs["formats"]
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
    assert table.attrs["units"]["its baseline"] == "s" and "note" not in table.attrs


def test_rows_of_an_earlier_format_say_so(rows):
    old = [replace(r, session=None) for r in rows]
    table = findings.table(old, findings.CACHE)
    assert table.attrs["note"] == "Rows of an earlier format: their sessions aren't known"
    assert "session" not in table
    assert "session" in findings.table([*old, rows[0]], findings.CACHE)


def test_a_column_is_an_attribute_a_function_or_values(rows):
    columns = (findings.Column("a", "n"), findings.Column("b", lambda r: r.n + 1), findings.Column("c", [5, 6]))
    table = findings.table(rows[:2], columns, findings.Column("place", ["x", "y"]))
    assert table.loc["y", ["a", "b", "c"]].tolist() == [10, 11, 6] and table.index.name == "place"


def test_what_is_not_a_row_is_listed_too():
    table = findings.listed([{"a": 1, "b": 2.0}, {"a": 3}], "a", {"b": "MiB"})
    assert list(table.index) == [1, 3] and table.attrs["units"] == {"b": "MiB"}
    assert findings.pairs({"torch": "2.13"}, "Package", "Version").loc["torch", "Version"] == "2.13"


# --- caches -------------------------------------------------------------------------------------------------


def test_the_cost_of_a_reused_step_is_found():
    """Latency = 0.2 s a computed step, 0.01 s a reused one: a reused one costs 5 % of a computed one."""
    rows = [row(FIRST_BLOCK, str(c), c, 1.0, None, denoise_s=0.2 * c + 0.01 * (28 - c)) for c in (28, 20, 14, 7, 3)]
    text = findings.hit_cost_sentence(rows)
    assert "200 ms" in text and "5.0%" in text
    other = [replace(r, session="two", denoise_s=2 * r.denoise_s) for r in rows[:4]]
    assert findings.hit_cost_sentence([*other, *rows]) == text  # seconds of two sessions aren't mixed
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


def test_quality_is_looked_up_by_what_changes_the_arithmetic(timed, judged):
    found = [findings.quality_of(r, judged) for r in timed]
    assert [f and f.label for f in found] == [None, None, "FP8", "INT8", "NF4", "cache", None]
    assert findings.quality_of_phases(timed, judged) == [None, None, 34.0, 44.0, 21.0, 48.0, None]


def test_recommendations_are_the_best_rows_that_keep_their_quality(timed, judged):
    table = findings.recommendations(timed, judged)
    assert list(table["choose"]) == ["cache", "cache", "+ FP8"]  # NF4 is smallest, but loses adherence
    assert list(table["PSNR"]) == [48.0, 48.0, 34.0]
    assert "fastest, lossless (40 dB or more): cache (2.10×)" in findings.recommendation_sentence(table)
    own = findings.recommendations(judged, judged)
    assert own["choose"].iloc[0] == "cache"


def test_recommendations_name_the_rows_that_they_rest_on(timed, judged):
    table = findings.recommendations(timed, judged)
    assert list(table["row"]) == table.attrs["ids"] == ["row cache", "row cache", "row + FP8"]


def test_settings_that_no_image_shows_do_not_keep_quality_from_being_found(timed, judged):
    eager = [replace(r, settings={k: v for k, v in r.settings.items() if k != "compile"}) for r in judged]
    assert [(f := findings.quality_of(r, eager)) and f.label for r in timed] == [
        None, None, "FP8", "INT8", "NF4", "cache", None,
    ]  # fmt: skip
    recorded = replace(timed[2], settings={**timed[2].settings, "cuda_graph": "blocks", "vae": "compiled"})
    assert findings.quality_of(recorded, eager).label == "FP8"
    assert findings.quality_of(replace(recorded, settings={**recorded.settings, "vae": "tiled"}), eager) is None


def test_the_same_stack_is_judged_first_and_only_with_the_same_number_format(timed, judged):
    whole = replace(timed[2], stack="+ everything", settings={**timed[2].settings, "steps": "1010"})
    stacked = replace(judged[1], stack="+ everything", label="stack", settings={"quantization": "torchao fp8 row"})
    assert findings.quality_of(whole, [*judged, stacked]).label == "stack"
    other = replace(stacked, settings={"quantization": "torchao int8"})
    assert findings.quality_of(whole, [other]) is None


def test_controls_are_nobodys_quality(timed, judged):
    fewer = row(FEWER_STEPS, "14 steps", 14, 2.0, 50.0, settings={})
    bare = replace(timed[1], settings={"dtype": "bfloat16"})
    assert findings.quality_of(bare, [*judged, fewer]) is None


def test_without_trained_weights_what_changes_no_arithmetic_is_recommended(timed):
    table = findings.recommendations(timed, [])
    assert list(table["choose"])[:2] == ["+ compiled blocks"] * 2 and "PSNR" not in table


def test_a_row_whose_exactness_is_not_known_is_not_recommended_without_a_judge(timed):
    unknown = [timed[0], replace(timed[1], exact=None)]
    assert list(findings.recommendations(unknown, [])["choose"])[:2] == ["baseline"] * 2


def test_another_order_of_operations_is_judged_by_its_worst_part(timed, judged):
    def parts(row, **settings):
        return replace(row, settings=row.settings | settings)

    fused = [
        parts(matrix_row("fused GELU", 1.0 + 1e-6, 53.0), fused_gelu=True),
        parts(matrix_row("fused RoPE", 1.0 + 1e-6, 39.0), fused_rope=True),
        parts(matrix_row("fused QKV", 1.0 + 1e-6, 30.0), fused_qkv=True),
    ]
    whole = parts(timed[1], fused_gelu=True, fused_rope=True, compile="blocks")
    assert findings.quality_of(whole, judged + fused).label == "fused RoPE"
    assert findings.quality_of(timed[1], judged + fused) is None  # nothing of it was judged
    table = findings.recommendations([timed[0], replace(whole, speedup=9.0), timed[5]], judged + fused)
    assert list(table["choose"])[:2] == ["cache", "+ compiled blocks"] and table["PSNR"].iloc[1] == 39.0


def test_of_about_as_much_memory_the_fastest_is_recommended(timed, judged):
    little_more = replace(timed[2], label="faster", speedup=1.9, memory_peak_gib=23.2)
    assert findings.recommendations([*timed, little_more], judged)["choose"].iloc[2] == "faster"
    much_more = replace(little_more, memory_peak_gib=23.6)
    assert findings.recommendations([*timed, much_more], judged)["choose"].iloc[2] == "+ FP8"


def test_a_matrix_has_proofs_and_reasons(timed):
    missing = replace(matrix_row("GGUF", 1.2, weights="random"), latency_p50=None, speedup=None, proof=None)
    missing = replace(missing, status="unavailable", reason="needs the package gguf")
    table = findings.table([*timed, missing], findings.MATRIX)
    assert table.loc["+ FP8", "applied"] == "494 of 494 layers: Float8Tensor"
    assert table.loc["GGUF", "why not"] == "needs the package gguf"
    assert list(table["status"]) == ["ok"] * 7 + ["unavailable"]
    assert table.attrs["units"]["peak"] == "GiB" and "PSNR" not in table
    assert not {"status", "why not"} & set(findings.table(timed, findings.MATRIX))
    assert "PSNR" in findings.table([matrix_row("FP8", 1.1, 34.0)], findings.MATRIX)


def test_a_matrix_says_how_many_steps_are_computed_where_some_are_not(judged):
    assert "computed steps" not in findings.table(judged[:3], findings.MATRIX)
    assert list(findings.table(judged, findings.MATRIX)["computed steps"]) == [28, 28, 28, 12, 28]


class Reached:
    """A machine that takes 2 ms for a step in FP8, 4 ms in bfloat16."""

    products = {"fp8": 1e6, "bfloat16": 1e5}
    attention = 1e6

    def step_s(self, work, number):
        return {"fp8": 0.002, "bfloat16": 0.004}.get(number)


def test_the_share_of_the_limit_stands_behind_the_time_of_a_step(timed):
    columns = findings.limited(findings.MATRIX, Reached(), work=None)
    table = findings.table([timed[0], timed[2], timed[4]], columns)
    titles = list(table.columns)
    assert titles[titles.index("per step") + 1] == "of the limit" and table.attrs["formats"]["of the limit"] == ".1%"
    assert table.loc["baseline", "of the limit"] == pytest.approx(28 * 0.004 / 0.3)
    assert table.loc["+ FP8", "of the limit"] == pytest.approx(28 * 0.002 * 1.8 / 0.3)
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
    assert findings.changes_sentence([eager, same]) == "every variant makes the eager images, to the last bit."
    assert "of 2 variants b changes images most, to 52.0 dB; adherence is kept" in findings.changes_sentence(
        [eager, same, other]
    )
    worse = replace(other, adherence=0.5, label="c")
    assert findings.changes_sentence([eager, worse]).endswith("lost by more than 5 % with c.")
    missing = Row(label="TensorRT", status="unavailable", reason="needs a package")
    table = findings.table([eager, same, other, missing], findings.CHANGES)
    assert table.loc["b", "PSNR"] == 52.0 and table.loc["TensorRT", "why not"] == "needs a package"
    assert findings.changes_sentence([eager, missing]).startswith("no variant")


def test_a_variant_has_its_first_image_cold_and_warm():
    rows = [matrix_row("eager", 1.0), matrix_row("blocks", 1.5, first_s=70.0, proof={"graphs": 2, "breaks": 0})]
    warm = {"blocks": Row(label="blocks", latency_p50=9.0)}
    table = findings.compile_table(rows, warm, Reached(), None)
    assert (table.loc["blocks", "cold"], table.loc["blocks", "warm"], table.loc["blocks", "graphs"]) == (70, 9, 2)
    assert math.isnan(table.loc["eager", "warm"]) and "recompiles" not in table and table.index.name == "variant"
    assert (
        findings.waits_sentence(rows, warm) == "the longest wait for a first image is 70 s cold (blocks) and 9 s warm."
    )


def test_what_the_machine_reaches_by_itself():
    def timed(label, p50, **settings):
        return Row(family=CEILING.name, label=label, status="ok", latency_p50=p50, settings=settings)

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
    assert "1 TFLOP/s (product, fp8); memory moves 2 GB/s" in said
    kernel = replace(rows[1], proof={"kernels": ["flash_fwd", "copy"], "error": 1e-3})
    assert "attention runs **flash_fwd** and reaches 0.2 TFLOP/s; the fastest is" in findings.kernels_sentence([kernel])
    table = findings.table([kernel], findings.KERNELS)
    assert table.attrs["formats"]["error"] == ".1e" and table.loc["attention", "what ran"] == "flash_fwd; copy"


def test_the_fastest_number_format_is_faster_beyond_the_noise():
    full = row(BASELINE, "float32, 28 steps", 28, 1.002, None, width=256, height=256)
    few = row(BASELINE, "float32, 8 steps", 28, 1.01, None, steps=8)
    half = row(families.NUMBER_FORMAT, "bfloat16, 8 steps", 28, 1.5, 40.0, steps=8)
    said = findings.formats_sentence([full, few, half])
    assert said.startswith(
        "float32, 28 steps at 256×256 take 0.399 s per image. The fastest format is bfloat16, 8 steps"
    )
    assert "1.50 times float32, 8 steps" in said and said.endswith("differ by 0.2%.")
    assert "No other number format" in findings.formats_sentence([full, few, replace(half, speedup_ci_low=1.05)])


def test_decoding_is_compared_with_the_first_of_its_size_and_batch():
    def timed(label, p50, peak, width=1024, batch=1, session="one"):
        sizes = {"width": width, "batch": batch, "session": session}
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
        "compiled decodes 1024² fastest, in 200 ms (2.00× eager); at 2048² tiled needs least memory, 10.00 GiB, "
        "20.00 GiB less."
    )


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


def test_whether_an_acceleration_pays_differently_takes_a_difference_and_no_noise():
    def case(speedup, apart, label="FP8", stack=None):
        own = matrix_row(label, speedup, quantization="torchao fp8 row", stack=stack)
        return [
            matrix_row("baseline", 1.0),
            replace(own, speedup_ci_low=speedup - apart, speedup_ci_high=speedup + apart),
        ]

    said = findings.pays_differently
    assert said({"a": case(3.9, 0.1), "b": case(3.2, 0.1)}) == ["FP8 pays most in a (3.90×) and least in b (3.20×)."]
    assert said({"a": case(3.9, 0.5), "b": case(3.2, 0.5)})[0].endswith("3.20× to 3.90×, within the noise.")
    assert said({"a": case(3.4, 0.05), "b": case(3.2, 0.05)})[0].endswith("3.20× to 3.40×, less than 15% apart.")
    same = {"a": case(3.4, 0.1, "12 of 28 steps", "quantized"), "b": case(3.2, 0.1, "10 of 22 steps", "quantized")}
    assert said(same)[0].startswith("quantized pays alike")
    assert said({"a": case(3.4, 0.1)}) == []


def test_a_use_case_has_its_own_baseline_and_speedups():
    cases = {
        "txt2img": [matrix_row("28 steps", 1.0), matrix_row("FBCache 0.2", 2.0, computed=12, stack="cached")],
        "img2img": [
            matrix_row("22 steps", 1.0, latency_p50=0.3),
            replace(matrix_row("FBCache 0.2", 1.5), status="oom"),
        ],
    }
    table = findings.use_case_table(cases)
    assert list(table["baseline"]) == [0.4, 0.3] and table.attrs["units"]["baseline"] == "s"
    assert table.loc["txt2img", "cached"] == 2.0 and math.isnan(table.loc["img2img", "cached"])
    said = findings.use_cases_sentence(cases, "cached")
    assert said.startswith("cached: from **2.00×** (txt2img)") and said.endswith("image in all of them.")
    assert findings.use_cases_sentence(cases, TEACACHE) == "TeaCache could not be measured in any use case."
    lost = {"txt2img": [cases["txt2img"][0], replace(cases["txt2img"][1], adherence=0.5)]}
    assert "lost by more than 5 % in txt2img" in findings.use_cases_sentence(lost, "cached")
    slow = {"a": [cases["txt2img"][0], replace(cases["txt2img"][1], speedup=0.9)]}
    assert findings.use_cases_sentence(slow, "cached").startswith("cached doesn't pay in every use case")


def test_a_cache_is_one_acceleration_whether_or_not_a_controlnet_is_held():
    def case(*found):
        own = (measured.cached(0.2, speedup, 30.0, 12.0, label=label, settings=of) for label, speedup, of in found)
        return [measured.row(), *own]

    own = {"threshold": 0.2, "inputs": "b"}
    cases = {
        "txt2img": case(("FBCache 0.2", 2.0, {"threshold": 0.2, "inputs": "a"})),
        "ControlNet": case(("held", 1.8, own | {"hold_controlnet": True}), ("every step", 1.4, own)),
    }
    table = findings.use_case_table(cases)
    assert list(table["FBCache 0.2"]) == [2.0, 1.8] and table.loc["ControlNet", "every step"] == 1.4
    said = findings.use_cases_sentence(cases, FIRST_BLOCK)
    assert said.startswith("First Block Cache makes every one of 2 use cases faster")


def test_what_lies_outside_the_mask_is_compared_with_the_vae_alone():
    kept = matrix_row("28 steps", 1.0, kept_db=39.8, kept_vae_db=40.0, psnr_inside_db=30.0)
    lost = replace(kept, label="cached", kept_db=35.0)
    assert findings.kept_sentence({"inpainting": [kept]}).endswith("nothing but the VAE's own error.")
    assert "35.0 dB at worst (cached)" in findings.kept_sentence({"inpainting": [kept, lost]})
    assert findings.kept_sentence({"txt2img": [matrix_row("28 steps", 1.0)]}) == "Nothing was inpainted here."
    table = of_cases({"inpainting": [kept, replace(lost, status="oom")]}, findings.MASK)
    assert table.loc["inpainting: 28 steps", "inside"] == 30.0 and len(table) == 1
    assert table.attrs["units"]["VAE alone"] == "dB"


def test_agreement_with_a_condition_in_words():
    rows = [matrix_row("28 steps", 1.0, agreement=0.8), matrix_row("cached", 2.0, computed=12, agreement=0.75)]
    said = findings.agreement_with_condition({"ControlNet": rows}, {"embedded": 0.3}, "edges")
    assert said == (
        "images agree with the given edges to 80%, to 30% without a ControlNet; of the accelerated ones cached agrees "
        "least, to 75%."
    )
    assert "without" not in findings.agreement_with_condition({"ControlNet": rows}, {}, "edges")


def test_what_fits_leaves_something_to_spare(timed):
    table = findings.fits(timed)
    table = table.drop(columns="row")
    assert list(table.loc["+ FP8"]) == ["no", "no", "yes", "yes"]  # 23 GiB don't fit a card of 24
    assert list(table.loc["NF4"]) == ["yes"] * 4


def test_gains_are_over_the_fastest_phase_before_in_the_same_session(timed):
    table = findings.gains(timed[:3])
    assert table["own gain"].iloc[2] == pytest.approx(1.8 / 1.3) and math.isnan(table["own gain"].iloc[0])
    assert "of the limit" in findings.gains(timed[:3], Reached(), None) and "of the limit" not in table
    sentence = findings.stack_sentence(timed[:3])
    assert "1.80×" in sentence and "the largest single step is “+ FP8”, 1.38× the fastest before it" in sentence
    elsewhere = replace(timed[2], session="two")
    assert over(elsewhere, timed[:2]) is None
    assert "“+ compiled blocks”, 1.30×" in findings.stack_sentence([*timed[:2], elsewhere])


def test_no_gain_is_over_a_slowdown(timed):
    slow = replace(timed[1], label="+ eager FP8", speedup=0.8)
    assert over(timed[2], [timed[0], slow]) == 1.8  # not 2.25
    assert "“+ FP8”, 1.80× the fastest before it" in findings.stack_sentence([timed[0], slow, timed[2]])


def test_the_seconds_of_a_sentence_are_those_of_its_ratio(timed):
    last = replace(timed[2], session="two", latency_p50=1.14, speedup=4.43)
    sentence = findings.stack_sentence([replace(timed[0], latency_p50=4.99), last])
    assert "**1.14 s** instead of 5.05 s, 4.43×" in sentence
    replayed = replace(last, computed_steps=12.0)
    said = findings.replay_sentence([timed[0], replayed])
    assert said.startswith("computing 12 of 28 steps takes 1.14 s, where all of them take 5.05 s: **4.43×**")


def test_nothing_is_the_fastest_within_the_noise(timed):
    assert "FP8" in findings.fastest_sentence(timed[:3])
    within = matrix_row("no faster", 1.05, weights="random")
    said = "nothing is faster than the baseline, baseline, beyond the noise."
    assert findings.fastest_sentence([timed[0], within]) == said
    gone = replace(within, status="unavailable")
    assert findings.fastest_sentence([timed[0], within, gone]) == f"{said} 1 of 2 can't run here; the table says why."


def test_formats_are_ordered_by_what_they_change(judged):
    sentence = findings.quality_sentence([judged[0], *judged[1:3], judged[4]])
    assert "INT8 changes the image least (44.0 dB) and NF4 most (21.0 dB); 2 keep adherence within 5 %" in sentence


def test_published_ratios_stand_beside_ours(timed):
    ours = matrix_row(
        "compiled", 1.3, weights="random", stack=stacks.BF16_COMPILED, latency_p50=9.0
    )  # paired all the same
    table = findings.beside_published([timed[0], ours])
    line = table[table["GPU"] == "H200"].loc[stacks.BF16_COMPILED]
    assert line["published"] == pytest.approx(5.58 / 4.32) and line["ours"] == pytest.approx(1.3)
    assert line["why"] == "" and line["row"] == "row compiled"
    far = table[table["GPU"] == "H100"].loc[stacks.BF16_COMPILED].iloc[0]
    assert far["difference"] < -0.15 and "cuDNN" in far["why"]
    assert table.loc["TorchAO FP8", "why"] == "not run here"


def test_time_shares_are_of_the_uncached_run():
    shares = published.time_shares(TEACACHE, "H100 80GB")
    assert list(shares) == [0.2, 0.4, 0.6] and shares[0.6] == pytest.approx(2.69 / 7.18)
    assert published.time_shares(FIRST_BLOCK, "A6000")[0.8] == pytest.approx(2.03 / 20.58)
    with pytest.raises(KeyError, match="nothing is published"):
        published.time_shares(TEACACHE, "A6000")


# --- caches against each other ------------------------------------------------------------------------------


def test_a_level_interval_is_called_level(rows):
    fixed = [row(INTERVAL, f"every {n}", c, 1.5, p) for n, c, p in ((2, 20, 45.0), (3, 4, 24.0))]
    assert "level with a fixed interval" in findings.interval_sentence(
        [r for r in rows if r.label == "FBCache 0.05"] + fixed, FIRST_BLOCK
    )
    assert "no setting" in findings.interval_sentence(rows, FIRST_BLOCK)


def test_work_counts_the_block_that_a_reused_step_has_run():
    traces = [{"reused_at": [None, "input", "residual", None]}, {"reused_at": [None, None, None, "input"]}]
    assert findings.steps_of_work(traces, 10) == (2.1 + 3) / 2


def test_combining_pays_only_if_nothing_else_is_as_fast(rows):
    both = row(COMBINED, "Cascade 0.2/0.2", 9, 2.7, 36.0)
    said = findings.combined_sentence([*rows, both])
    assert said.startswith("combining pays: above 35 dB, Cascade 0.2/0.2 is the fastest combination with **2.70×**")
    assert "First Block Cache 1.40× (FBCache 0.05)" in said and "fewer steps 1.40× (20 steps)" in said
    fewer = row(FEWER_STEPS, "9 steps", 9, 3.0, 36.0)
    assert findings.combined_sentence([*rows, both, fewer]).startswith(
        "combining beats either cache alone, and fewer steps beats it"
    )
    tea = row(TEACACHE, "TeaCache 0.2", 9, 3.0, 36.0)
    assert findings.combined_sentence([*rows, both, tea]).startswith("combining doesn't pay")
    assert findings.combined_sentence(rows) == "No combined setting stays above 35 dB."


def test_the_plans_criteria_are_met_or_not(rows):
    said = findings.criteria_sentence([*rows, row(TEACACHE, "TeaCache 0.2", 20, 1.2, 40.0)])
    assert "First Block Cache 5.00× (asked: 2×, met; FBCache 0.5, 24.0 dB)" in said
    assert "TeaCache 1.20× (asked: 1.3×, not met" in said
    assert "combined cache: no setting keeps adherence within 5 %" in said


def test_caches_stand_beside_both_solvers_at_equal_steps(rows):
    second = row(SECOND_ORDER, "DPM-Solver++, 10 steps", 10, 2.5, 33.0)
    table = findings.best_at_equal_steps([*rows, second])
    assert list(table.index) == [20, 10, 3] and table.loc[3, "best cache"] == "FBCache 0.8"
    assert table.loc[10, "best cache"] == "FBCache 0.2" and table.loc[10, "gain"] == 2.0
    assert table.loc[10, "DPM-Solver++ PSNR"] == 33.0 and math.isnan(table.loc[20, "DPM-Solver++ PSNR"])
    assert table.attrs["units"]["gain"] == "dB" and table.loc[10, "row"] == "row FBCache 0.2"


def test_the_nearest_strategy_is_named_beside_the_first(rows):
    hold, taylor = row(TEACACHE, "hold", 10, 2.0, 30.0), row(TEACACHE, "Taylor 1", 12, 1.9, 36.0)
    said = findings.strategies_sentence([rows[0], hold, taylor])
    assert said == (
        "nearest to the uncached image is **Taylor 1** (36.0 dB at 12.0 steps, 1.90×); hold reaches 30.0 dB at 10.0 "
        "steps, 2.00×."
    )
    assert findings.strategies_sentence([rows[0], taylor, hold]).startswith("nearest to the uncached image is **Taylor")


def test_what_the_engine_costs(rows):
    timed = [replace(rows[0], steps=8, denoise_s=s) for s in (0.8, 0.84, 0.17, 0.107)]
    said = findings.engine_sentence(timed)
    assert said.startswith("a computed step takes 100 ms; looking at it costs +5.0%")
    assert "with the first block 10.0%, without any block 1.0% of a computed one" in said


def test_a_gate_that_decides_alike_is_told_by_its_masks():
    traces = {"FBCache 0.2": [{"mask": "1100"}, {"mask": "1010"}], "every 2": [{"mask": "1010"}] * 2}
    assert findings.spread_sentence(traces) == (
        "over 2 images, FBCache 0.2: hit rate 50%, 2 computed, 2 different masks; every 2: hit rate 50%, 2 computed, "
        "one mask for all."
    )
    ours, theirs = findings.beside({0.1: 0.5, 0.2: 0.4}, {0.2: 0.3, 0.9: 0.1})
    assert (ours, theirs) == ({0.2: 0.4}, {0.2: 0.3})


def test_one_image_on_several_gpus_in_words_and_in_a_table():
    rows = [
        spread(REPLICAS, "replicas", 3.6, images=2),
        spread(PARALLEL, "all-gather 2", 2.1, 1.7, proof={"communication": 0.2, "alone_s": 3.6}),
        spread(PARALLEL, "Ulysses 2", 2.0, 1.8, proof={"communication": 0.1, "alone_s": 3.6}),
    ]
    said = findings.scaling_sentence(rows)
    assert said.startswith("Ulysses 2 makes one image **1.80 times** as fast as one GPU ([1.70, 1.90], 2 s, 90% of 2")
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
    assert said.startswith("4 ways of dividing make the picture of one rank, 3 of them to the last bit and the others")
    assert "within 95.0 dB; under 1 of 2 caches all ranks decided alike" in said
    assert "PipeFusion 2, whose patches see each other a step late, makes another (31.2 dB); 1 could not run" in said


def test_a_load_in_words_and_in_a_table():
    def load(users, rate, p50, queued, batching=1, **other):
        proof = {"queued_s": queued, "service_s": p50 - queued, "batch": 3.2 if batching > 1 else 1.0}
        columns = {"settings": {"batching": batching}, "users": users, "images_each": 1, "images_per_s": rate}
        columns |= {"latency_p50": p50, "latency_avg": p50, "proof": proof, "label": f"{users} users, {batching}"}
        return Row(family=SERVING.name, status="ok", **columns | other)

    rows = [load(1, 0.5, 2.0, 0.0), load(4, 0.49, 8.0, 6.0), load(4, 0.6, 6.5, 3.0, 4)]
    arrivals = load(1, 0.1, 9.0, 1.0, settings={"batching": 1, "arrivals": 0.5})
    said = findings.load_sentence([*rows, arrivals])
    assert "with 4 users 0.49 images a second are made, 98% of a single user's rate" in said
    assert "longer than **8 s** instead of 2 s, 75% of it in the queue" in said
    assert said.endswith("; made up to 4 together (3.2 on average), 1.22 times as many images are made.")
    elsewhere = replace(rows[0], session="two")
    assert "instead of 3 s" in findings.load_sentence([load(1, 0.5, 3.0, 0.0), elsewhere, *rows[1:]])
    table = findings.table(rows, findings.LOAD, "load")
    assert list(table["queued"]) == [0, 6, 3] and table.attrs["units"]["queued"] == "s"
    assert table["together"].tolist()[2] == 3.2 and math.isnan(table["together"].iloc[0])
    assert not {"refused", "failed", "p99"} & set(table.columns)
