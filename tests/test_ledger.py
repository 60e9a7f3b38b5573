"""The ledger of claims: what was published, which of our rows stand for it, and the verdict."""

from dataclasses import replace

import pytest
from measured import FULL_SIZE, cached, row, stacked

from fluxnb import families, notebooks, stacks
from fluxnb.findings import ledger, published

FUSED = "fp8dqrow + fuse_qkv + compile + compiled VAE"


def entries(rows, **equals):
    """The entries whose claims have these values, by technique."""
    found = ledger.entries(rows)
    return {e.claim.technique: e for e in found if all(getattr(e.claim, k) == v for k, v in equals.items())}


# --- what was published ---


def test_every_published_technique_has_a_claim_and_every_claim_a_verdict():
    claims, table = published.claims(), published.table()
    baselines = set(table.over) - {""}
    assert baselines < set(table.technique)
    for technique in set(table.technique) - baselines:
        assert any(c.technique == technique for c in claims), technique
    found = ledger.entries({})
    assert len(found) == len(claims) and {e.verdict for e in found} == {"not run"}
    assert all(e.reason for e in found)


def test_every_source_has_a_title_and_every_family_is_one():
    table = published.table()
    assert set(table.source) == set(published.SOURCES)
    assert set(table.family) - {""} <= {f.name for f in families.ALL}
    for counterpart in published.COUNTERPARTS:
        assert counterpart.source in published.SOURCES and counterpart.ratio() > 0


def test_a_claim_is_a_ratio_over_its_own_baseline():
    found = {(c.technique, c.gpu, c.metric): c.value for c in published.claims()}
    assert found["FBCache (0.2)", "H100 80GB", published.SPEEDUP] == pytest.approx(7.18 / 2.57)
    assert found["FBCache (0.2)", "A6000", published.SPEEDUP] == pytest.approx(20.58 / 5.25)
    assert found["bf16 compile", "H100", published.SPEEDUP] == pytest.approx(1.56, abs=0.01)
    assert found["fully optimised", "H100", published.SPEEDUP] is None


def test_what_a_claim_is_about_stands_in_columns():
    found = {(c.technique, c.gpu): c for c in published.claims()}
    cache = found["FBCache (0.12)", "L20"]
    assert (cache.family, cache.threshold, cache.way) == (families.FIRST_BLOCK.name, 0.12, "")
    both = found["FBCache + TeaCache", "H100 80GB"]
    assert (both.family, both.threshold) == (families.COMBINED.name, None)
    assert found["compile, ring 4", "H100"].way == published.RING
    assert found["FBCache (0.12) + FP8 + compile", "L20"].family == ""  # several techniques together


# --- verdicts ---


@pytest.mark.parametrize(
    ("side", "theirs", "ours", "said"),
    [
        ("", 2.0, 2.29, "reproduced"),
        ("", 2.0, 2.31, "not reproduced"),
        ("", 2.0, 1.69, "not reproduced"),
        ("least", 2.0, 2.0, "reproduced"),
        ("least", 2.0, 1.99, "not reproduced"),
        ("least", 2.0, 9.0, "reproduced"),
        ("most", 0.05, 0.0, "reproduced"),
        ("most", 0.05, 0.06, "not reproduced"),
        ("up to", 3.0, 2.6, "reproduced"),
        ("up to", 3.0, 2.5, "not reproduced"),
        ("up to", 3.0, 5.0, "reproduced"),
    ],
)
def test_the_rule_of_a_verdict(side, theirs, ours, said):
    claim = published.Claim("x", "s", "H100", 1, "m", "measured", published.SPEEDUP, theirs, side)
    assert ledger.verdict(claim, ours) == said


def test_what_the_plans_promise_is_judged_by_the_fastest_setting_that_keeps_adherence():
    rows = [row(notebook=notebooks.FIRST_BLOCK), cached(0.2, 2.5, 30, 8.0), cached(0.8, 4.0, 19, 2.0, adherence=0.9)]
    least, up_to = (entries({"cpu": rows}, side=side) for side in ("least", "up to"))
    assert least["FBCache"].verdict == "reproduced" and least["FBCache"].ours == 2.5
    assert up_to["FBCache"].verdict == "not reproduced"
    assert least["TeaCache"].verdict == "not run"


def test_what_has_fewer_steps_than_the_uncached_image_proves_no_cache():
    few = {"steps": 14, "total_steps": 14}
    rows = [row(notebook=notebooks.FIRST_BLOCK), row(notebook=notebooks.FIRST_BLOCK, **few)]
    found = entries({"cpu": [*rows, cached(0.2, 2.5, 30, 8.0, **few)]}, side="least")
    assert found["FBCache"].verdict == "not run"


def test_the_loss_of_quality_is_that_of_the_fastest_combination():
    combined = {"family": families.COMBINED.name, "psnr_db": 28.0}
    rows = [row(), row(**combined, speedup=2.0, adherence=0.99), row(**combined, speedup=4.0, adherence=0.94)]
    found = entries({"cpu": rows}, source=published.PLAN_CACHES, metric=published.QUALITY)["all"]
    assert found.ours == pytest.approx(0.06) and found.verdict == "not reproduced"
    assert (found.text, found.claim.text) == ("6%", "≤ 5%") and found.setting.endswith("adherence lost at 4.00×")


def test_a_threshold_on_another_model_is_shown_but_not_called_a_reproduction():
    slower = cached(0.2, 1.5, 40, 12.0)
    slower = replace(slower, settings=slower.settings | {"warm_up": 6})
    rows = [row(notebook=notebooks.FIRST_BLOCK), slower, cached(0.2, 2.5, 30, 8.0)]
    found = entries({"cpu": rows}, gpu="H100 80GB")["FBCache (0.2)"]
    assert found.verdict == "not comparable" and found.ours == 2.5 and "8 of 28" in found.setting


def test_a_cache_of_a_4_bit_transformer_is_beside_the_same():
    common = {"notebook": notebooks.QUANTIZED_CACHE}
    first, other = cached(0.2, 2.0, 30, 8.0, **common), cached(0.2, 1.8, 30, 8.0, **common)
    first = replace(first, settings=first.settings | {"quantization": "svdquant int4, simulated", "rank": 16})
    other = replace(other, settings=other.settings | {"quantization": "torchao int4 weight-only"})
    rows = [cached(0.2, 2.5, 30, 8.0), first, other]
    found = entries({"cpu": rows}, source=published.NUNCHAKU)["FBCache (0.2)"]
    assert found.ours == 2.0 and "4-bit" in found.setting


def test_hardware_ratios_need_alike_hardware():
    stack = stacked(stacks.BF16_COMPILED, speedup=1.3)
    claim = "diffusers bf16 SDPA compile"
    assert entries({"h200": [stack]})[claim].verdict == "reproduced"
    assert entries({"cpu": [stack]})[claim].verdict == "not run"
    small = replace(stack, weights="trained", model="embedded")
    assert entries({"h200": [small]})[claim].verdict == "not run"


def test_number_formats_and_kernels_stand_for_their_claims():
    half = row(
        notebook=notebooks.NUMBER_FORMATS, family=families.NUMBER_FORMAT.name, settings={"dtype": "float16"},
        speedup=0.99, **FULL_SIZE,
    )  # fmt: skip
    flash = row(
        notebook=notebooks.ATTENTION, family=families.ATTENTION.name, settings={"attention": "flash"}, speedup=0.9,
        **FULL_SIZE,
    )  # fmt: skip
    found = entries({"h200": [half, flash]}, gpu="H100 80GB")
    assert found["BF16"].ours == pytest.approx(1 / 0.99) and found["FlashAttention2"].ours == 0.9


def test_memory_is_that_of_the_stack_against_the_baseline_of_the_same_machine():
    before, after = stacked(None, family=families.BASELINE.name, memory_peak_gib=40.0), stacked(stacks.VAE_COMPILED)
    after = replace(after, memory_peak_gib=26.0)
    found = entries({"h200": [before, after]}, metric=published.MEMORY)["TorchAO FP8"]
    assert found.ours == pytest.approx(-0.35) and found.verdict == "reproduced"
    assert entries({"h200": [after], "h100": [before]}, metric=published.MEMORY)["TorchAO FP8"].verdict == "not run"


# --- several GPUs ---


def way(stack, seconds, gpus=2, **proof):
    proof = {"alone_s": 5.0, "communication": 0.2} | proof
    return stacked(stack, notebooks.PARALLEL, gpus=gpus, speedup=1.5, latency_p50=seconds, proof=proof)


def test_a_claim_of_several_gpus_is_over_one_eager_one():
    ulysses, ring = stacks.XDIT_ULYSSES, stacks.XDIT_RING
    rows = [way(stacks.FSDP, 7.0), way(ulysses, 2.4), way(ulysses, 2.0), way(ring, 4.0)]
    found = entries({"h200x2": rows}, source=published.XDIT)
    assert found["compile, ulysses 2"].ours == 2.5 and found["compile, ulysses 2"].verdict == "reproduced"
    other = found["compile, ring 2"]
    assert other.ours == 1.25 and other.verdict == "not reproduced"
    assert "over one compiled GPU theirs is 1.65×, ours 1.50×, with 20% of a step's kernels" in other.reason
    assert found["compile, ulysses 4"].reason == "no committed row of 11_parallel on h200x4 or h100x4"
    without = [e for e in ledger.entries({"h200x2": rows[1:], "h200": rows[1:]}) if e.claim.gpus > 1]
    assert {e.verdict for e in without} == {"not run"}


def test_one_eager_gpu_may_be_of_another_machine_of_its_kind():
    slow = way(
        stacks.XDIT_ULYSSES, 3.2, gpus=4, alone_s=3.9, communication=0.1, steps_ms={"computed": 80.0},
        step_ms={"attention": 40.0},
    )  # fmt: skip
    graph = way(stacks.ULYSSES_RECORDED, 1.6, gpus=4)
    found = entries({"h200x2": [way(stacks.FSDP, 7.0)], "h200x4": [slow, graph]}, gpus=4)["compile, ulysses 4"]
    assert found.ours == 5.0 / 3.2
    assert found.setting.endswith(f"{stacks.XDIT_ULYSSES}, over one eager GPU of h200x2")
    assert (
        "its kernels take 40 of a step's 80 ms: the GPU waits for its host; the study's own ulysses 4" in found.reason
    )
    assert found.reason.endswith("in a CUDA graph: 3.12×")


# --- which rows a reader finds ---


def test_rows_of_two_machines_are_not_mixed():
    old = [row(host="a"), cached(0.2, 2.5, 30, 8.0, host="a")]
    new = [row(host="b", measured_at="2026-11-21T00:00:00+00:00")]
    assert ledger.latest(old + new) == [old[1], new[0]]  # another notebook is still that of the first machine


def test_rows_of_the_earlier_format_count_as_one_host_of_their_kind():
    old = [row(host=None, steps=n) for n in (28, 14)]
    assert ledger.latest(old) == old
    other = replace(old[0], kind="another", measured_at="2026-11-21T00:00:00+00:00")
    assert ledger.latest([*old, other]) == [other]


def test_of_a_stack_built_anew_the_rows_of_before_are_not_shown():
    before = stacked(stacks.VAE_COMPILED, settings={"vae": "compiled"}, speedup=1.7)
    after = replace(before, settings={"vae": "compiled", "fused_rope": True}, speedup=2.0)
    after = replace(after, measured_at="2026-11-21T00:00:00+00:00")
    others = [row(**FULL_SIZE), row(), row(stack=stacks.VAE_COMPILED), replace(before, batch=4)]
    found = ledger.latest([before, after, *others])
    assert found == [after, *others]
    said = entries({"h200": found}, gpu="H100")[FUSED]
    assert (said.ours, said.verdict) == (2.0, "reproduced")


def test_a_stack_that_has_no_name_any_more_is_not_shown():
    judged = row(family=families.STACK.name, label="what quality is looked up in")
    assert ledger.latest([stacked(None, label="cache, 12 of 28"), judged]) == [judged]


def test_of_what_was_measured_again_the_newest_is_shown_unless_it_failed():
    later = {"measured_at": "2026-11-21T00:00:00+00:00"}
    first, again = cached(0.2, 2.5, 30, 8.0), cached(0.2, 2.6, 30, 8.0, **later)
    assert ledger.latest([first, again]) == [again]
    assert ledger.latest([first, replace(again, status="error")]) == [first]


def test_a_baseline_stays_while_rows_were_timed_with_it():
    later = {"measured_at": "2026-11-21T00:00:00+00:00"}
    rows = [row(id="1"), row(id="2", **later), cached(0.2, 2.5, 30, 8.0, notebook=notebooks.COMBINED, baseline="1")]
    assert ledger.latest(rows) == rows
    assert ledger.latest([rows[0], rows[1], replace(rows[2], baseline="2")])[0].id == "2"
