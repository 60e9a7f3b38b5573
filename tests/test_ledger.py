"""The ledger of claims: what was published, which of our rows stand for it, and the verdict."""

from dataclasses import replace

import pytest
from measured import FULL_SIZE, cached, row, stacked

from fluxnb import cache as caching
from fluxnb import families, notebooks, stacks
from fluxnb.findings import ledger, published
from fluxnb.models import embedded
from fluxnb.techniques import peers

PLAIN = "fp8dqrow + fuse_qkv + compile + compiled VAE"
PARTS = {"quantization": "torchao fp8 row", "fused_qkv": True, "compile": "blocks", "vae": "compiled"}
BOTH = "BF16+FA2+FBCache (0.3)"


def entries(rows, **equals):
    """The entries whose claims have these values, by technique."""
    found = ledger.entries(rows)
    return {e.claim.technique: e for e in found if all(getattr(e.claim, k) == v for k, v in equals.items())}


def claim_of(technique, **equals):
    equals |= {"technique": technique}
    return next(c for c in published.claims() if all(getattr(c, k) == v for k, v in equals.items()))


def full(settings=None, speedup=1.0, **changed):
    """A row at full size on an H100, ten rounds, timed with the baseline "b"; without settings that baseline."""
    own = {"notebook": notebooks.FINAL_STACK, "gpu": "h100", "width": 1024, "height": 1024, "n": 10, "session": "s"}
    own |= {"settings": {"dtype": "bfloat16", "inputs": "a"} | (settings or {}), "speedup": speedup}
    own |= {"speedup_ci_low": 0.99 * speedup, "speedup_ci_high": 1.01 * speedup}
    timed = {"id": "b"} if settings is None else {"family": families.STACK.name, "baseline": "b", "label": "ours"}
    return row(**FULL_SIZE | own | timed | changed)


# --- what was published ---


def test_every_published_technique_has_a_claim_and_every_claim_a_verdict():
    claims, table = published.claims(), published.table()
    baselines = {f.over for f in table}
    for technique in {f.technique for f in table} - baselines:
        assert any(c.technique == technique for c in claims), technique
    found = ledger.entries([])
    assert len(found) == len(claims) and {e.verdict for e in found} == {"not run"}
    assert all(e.reason and e.claim.text for e in found)
    assert {f.family for f in table if f.settings} - {""} <= {f.name for f in families.ALL}


def test_a_claim_s_address_is_its_own_whatever_else_is_claimed(monkeypatch):
    ids = [c.id for c in published.claims()]
    assert len(set(ids)) == len(ids)
    every = published.table()
    repeated = {f.repeats.split(" | ")[0] for f in every}
    gone = next(f.source for f in every if f.source not in repeated)
    monkeypatch.setattr(published, "table", lambda: tuple(f for f in every if f.source != gone))
    published.claims.cache_clear()
    fewer = {c.id for c in published.claims()}
    published.claims.cache_clear()
    assert 0 < len(fewer) < len(ids) and fewer <= set(ids)


def test_a_claim_is_a_ratio_over_its_own_baseline():
    assert claim_of("FBCache (0.2)", gpu="H100 80GB").low == pytest.approx(7.18 / 2.57)
    assert claim_of("FBCache (0.2)", gpu="A6000").low == pytest.approx(20.58 / 5.25)
    assert claim_of("compile, ring 4").low == pytest.approx(4.30 / 1.98)  # over one compiled GPU, not an eager one
    assert claim_of("fully optimised").text == "2.71 s"  # without a baseline of its own
    assert claim_of("TorchAO FP8", about=published.MEMORY).text == "-30%"
    assert claim_of("FBCache", about=published.SECONDS).text == "1.7 s to 2.5 s"


def test_every_claim_is_counted_once_and_its_copies_are_told():
    about = [(c.source, c.setting, c.technique, c.over, c.about, c.side) for c in published.claims()]
    assert len(set(about)) == len(about)
    (text,) = claim_of("BF16", gpu="H100 80GB").copies
    assert text == "1.02×, its text"
    (second,) = claim_of("FBCache (0.3)", gpu="H100 80GB").copies
    assert second == "3.44×, its second table"
    assert "as expected" in claim_of("FBCache", side=published.LEAST).copies[0]
    ratio, seconds = claim_of(PLAIN).copies
    assert ratio.startswith("2.17× in plan 2") and seconds.startswith("2.97 s in plan 2")
    assert "it says so of FLUX.1-schnell, 4 steps" in seconds
    assert claim_of("FBCache (0.2)", gpu="A6000").copies == ("4.08× of the first and the second image together",)


def test_what_no_measurement_can_have_given_is_flagged():
    flagged = {(c.technique, c.gpu): c.flag for c in published.claims() if c.flag}
    assert "average of 2.05 s is below its minimum of 2.09 s" in flagged["FBCache (0.3)", "H100 80GB"]
    assert flagged["TorchAO fp8dqrow", "H100 80GB"] == "the same document has 2.17×"  # and 3.4×
    assert sum("impossible" in flag for flag in flagged.values()) == 1
    assert published._impossible({"latency_p50": 2.0, "latency_p90": 1.9}) and not published._impossible({})


def test_flags_that_are_written_down_follow_from_the_table():
    def times(technique, gpu="H100 80GB"):
        own = [f for f in published.table() if (f.technique, f.gpu) == (technique, gpu) and not f.repeats]
        return {f.metric.removeprefix("latency_"): f.value for f in own if f.metric.startswith("latency_")}

    both, copied, alone = times("FBCache+FA2 (0.2)"), times("FBCache (0.15)"), times("FBCache (0.2)")
    assert both["p50"] == pytest.approx(copied["p50"], rel=0.01) and both["p50"] > 1.2 * alone["p50"]
    steady, steadier = times(BOTH), times(f"{BOTH}+TorchAO FP8")
    assert steadier["p99"] / steadier["min"] < steady["p99"] / steady["min"]
    tea, more = times("BF16+FA2+TeaCache (0.6)"), times("BF16+FA2+TeaCache (0.6)+TorchAO FP8")
    gains = [1 - b[m] / a[m] for m in ("p50", "avg") for a, b in ((tea, more), (steady, steadier))]
    assert [round(100 * gain, 1) for gain in gains] == [0.0, 1.5, 3.3, 1.0]
    for threshold in (0.05, 0.1, 0.2, 0.5, 0.8):
        both = times(f"FBCache ({threshold:g})", "A6000")
        assert abs(both["second"] / both["first"] - 1) < 0.005
    for low, high, speedups in ((1.7, 2.5, (3, 2)), (3.1, 3.8, (1.6, 1.3))):
        assert low * speedups[0] == pytest.approx(5, abs=0.15) and high * speedups[1] == pytest.approx(5, abs=0.15)


def test_what_the_plans_say_beside_their_tables_is_in_the_ledger():
    said = {(c.technique, c.text) for c in published.claims()}
    assert {
        ("FBCache", "1.7 s to 2.5 s"),
        ("TeaCache", "3.1 s to 3.8 s"),
        ("FBCache + TeaCache", "1.2 s to 1.5 s"),
        ("uncached", "at least 16 GB of GPU memory"),
        ("ParaAttention", "can be installed and applied"),
        ("second image over the first", "the second is faster"),
        ("TorchAO fp8dqrow", "3.40×"),
        ("TorchAO fp8dqrow", "significant memory reduction"),
        ("INT8, 2:4 sparse", "pays from batches of 16 on"),
        ("FBCache (0.35)", "the best threshold is 0.35"),
        ("FBCache (0.4)", "the best thresholds are 0.35 to 0.4"),
        ("FBCache (0.35)", "First Block Cache is faster than TeaCache"),
        (BOTH, "the most stable"),
        (BOTH, "1.02× to 1.03×"),
        (f"{BOTH}+TorchAO FP8", "1.01× to 1.02×"),
        ("quantization of TeaCache over that of FBCache", "gains more with TeaCache"),
        ("H100 over A100", "2.2 times as fast on average"),
    } <= said
    assert len({(c.source, c.gpu, c.technique, c.over, c.about, c.text) for c in published.claims()}) == len(
        published.claims()
    )


def said_twice(claims):
    """Pairs of claims that say the same of the same configuration, whatever they are called."""

    def of(c):
        at = (c.source, c.gpu, c.gpus, c.model, c.steps, c.batch, c.family, c.over_family, c.about, c.side, c.kind)
        return (*at, c.anything, str(c.configuration), str(c.over_configuration))

    known = [c for c in claims if c.configuration is not None]
    return [(a, b) for i, a in enumerate(known) for b in known[:i] if of(a) == of(b)]


def test_a_claim_is_not_counted_twice_under_two_labels():
    assert said_twice(published.claims()) == []
    one = claim_of("TeaCache (0.2)", gpu="H100 80GB")
    assert said_twice([*published.claims(), replace(one, technique="TeaCache at a fifth")]) != []


def test_claims_of_2026_are_not_run_and_name_their_source():
    sources = {e.claim.source: e for e in ledger.entries([]) if e.claim.configuration is None}
    for word in ("Spectrum", "SeaCache", "progressive resolution", "L2P", "DPCache", "BudCache", "cache-dit",
                 "sglang PR 34126", "TheStage"):  # fmt: skip
        assert any(word in source for source in sources), word


def test_that_there_is_no_counterpart_is_not_said_of_what_fluxnb_has():
    has = {*(f.name for f in families.ALL), *peers.METHODS, *peers.SETTINGS, *vars(caching), "cache-dit"}
    for entry in ledger.entries([]):
        claim = entry.claim
        named = [name for name in has if len(name) > 2 and name in claim.technique.split(",")[0]]
        if entry.reason.endswith("no counterpart of it"):
            assert not named, (claim.technique, named)
        elif entry.reason.startswith("fluxnb has"):
            assert claim.family in has, claim.technique


# --- the rule ---


@pytest.mark.parametrize(
    ("side", "theirs", "ours", "said"),
    [
        ("", 2.0, (1.86, 2.14), "reproduced"),
        ("", 2.0, (1.8, 2.1), "undecided"),
        ("", 2.0, (1.5, 1.8), "not reproduced"),
        ("", 1.01, (0.88, 0.9), "not reproduced"),  # the other sign
        ("", 1.01, (0.99, 1.03), "undecided"),
        ("", 1.01, (1.03, 1.04), "not reproduced"),
        ("", 1.005, (0.98, 0.999), "not reproduced"),
        ("", 1.0, (0.995, 1.005), "reproduced"),
        ("≥ ", 2.0, (2.0, 9.0), "reproduced"),
        ("≥ ", 2.0, (1.99, 9.0), "undecided"),  # the low end decides
        ("≥ ", 2.0, (1.5, 1.99), "not reproduced"),
        ("up to ", 1.6, (3.8, 3.9), "not reproduced"),
        ("up to ", 1.6, (1.55, 1.65), "reproduced"),
        ("up to ", 1.6, (1.2, 1.3), "not reproduced"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(side, theirs, ours, said):
    claim = replace(claim_of(PLAIN), side=side, low=theirs, high=None if side == "≥ " else theirs)
    assert ledger.verdict(claim, *ours) == said


@pytest.mark.parametrize("name", stacks.AS_PUBLISHED)
def test_a_shortlist_can_have_what_torchao_published(name):
    (stack,) = stacks.shortlist([name], "fp8 row", [], 28, [12])
    settings = {key: value for part in stack.techniques for key, value in part.settings.items()}
    found = [e for e in ledger.entries([full(), full(settings, 1.5, stack=name)]) if "torchao" in e.claim.source]
    told = {e.verdict for e in found if e.row is not None and e.row.stack == name}
    assert told & {"reproduced", "not reproduced"}, found


def test_what_is_alike_in_all_is_judged_on_its_interval():
    rows = [full(), full(PARTS, 2.2)]
    found = entries(rows)[PLAIN]
    assert (found.verdict, found.reason, found.ours) == ("reproduced", "", 2.2)
    assert found.text == "2.20× [2.18, 2.22], n\xa0=\xa010"
    slower = entries([full(), full(PARTS, 1.77)])[PLAIN]
    assert slower.verdict == "not reproduced" and slower.reason.endswith("what agrees with it: 2.03× to 2.40×")
    assert entries([full(), full(PARTS, 2.39)])[PLAIN].verdict == "undecided"  # it reaches across 2.40
    assert ledger.counts(ledger.entries(rows))["reproduced"] == 1
    assert "1 could be put to the test (1 reproduced, 0 not)" in ledger.sentence(ledger.entries(rows))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": "flux-schnell-random"}, "model: FLUX.1-dev, ours FLUX.1-schnell"),
        ({"model": "embedded", "weights": "trained"}, "model: FLUX.1-dev, ours embedded"),
        ({"steps": 4}, "steps: 28, ours 4"),
        ({"gpu": "h200"}, "GPU: H100, ours H200"),
        ({"gpu": "h100x2", "gpus": 2}, "GPUs: 1, ours 2"),
        ({"width": 512, "height": 512}, "size: 1024×1024, ours 512×512"),
        ({"batch": 4}, "batch: 1, ours 4"),
    ],
)
def test_what_differs_in_one_thing_is_not_comparable_and_says_in_which(changed, reason):
    found = entries([full(**changed), full(PARTS, 2.2, **changed)])[PLAIN]
    assert (found.verdict, found.ours) == ("not comparable", 2.2) and reason in found.reason


def test_another_number_format_is_not_comparable():
    found = entries([full(), full(PARTS | {"dtype": "float16"}, 2.2)])[PLAIN]
    assert (found.verdict, found.reason) == ("not comparable", "number format: bfloat16, ours float16")


def test_a_row_with_more_in_it_stands_for_no_plain_claim():
    found = entries([full(), full(PARTS | {"fused_gelu": True, "fused_rope": True}, 2.2, stack=stacks.VAE_COMPILED)])
    assert found[PLAIN].verdict == "not run" and found[PLAIN].ours is None
    assert "compile blocks, fused qkv, quantization torchao fp8 row, vae compiled" in found[PLAIN].reason


def test_three_rounds_decide_nothing():
    found = entries([full(n=3), full(PARTS, 2.2, n=3)])[PLAIN]
    assert found.verdict == "undecided"
    assert found.reason == "n = 3: no verdict rests on fewer than 10 rounds of one session"
    assert found.text == "2.20×, range 2.18 to 2.22, n\xa0=\xa03"
    earlier = full(PARTS, 2.2, n=3, baseline=None, speedup_ci_low=None)
    assert entries([full(n=3), earlier])[PLAIN].text == "2.20×, n\xa0=\xa03"


def test_of_rows_that_are_alike_the_one_of_most_rounds_stands_for_a_claim():
    slow, newest = full(PARTS, 1.7, n=20), full(PARTS, 2.2, n=10, measured_at="2026-12-01T00:00:00+00:00")
    assert entries([full(), newest, slow])[PLAIN].ours == 1.7


def test_a_schedule_made_from_a_published_time_cannot_confirm_it():
    made = {"attention": "flash", "mask": "1000100010001000100010001000"}
    found = entries([full(), full(made, 3.49, stack=BOTH)], about=published.SPEEDUP, over="Baseline (FP16)")[BOTH]
    assert found.verdict == "not comparable" and found.ours == 3.49
    assert "made from the published time at this threshold, so it can't confirm it" in found.reason
    compiled = full(made | {"quantization": "torchao fp8 row", "compile": "blocks"}, 3.5, stack=f"{BOTH}+TorchAO FP8")
    found = entries([full(), compiled], over="Baseline (FP16)")[f"{BOTH}+TorchAO FP8"]
    assert "ours has compile blocks as well" in found.reason
    assert "the source does not say which FP8 format" in found.reason


# --- which row ---


def four(model=embedded.SCHNELL, **changed):
    """A row of four steps: of the distilled stand-in, or at full size."""
    own = {"model": model, "steps": 4, "total_steps": 4, "computed_steps": 4.0, "id": f"{model} plain", "images": 8}
    return row(notebook=notebooks.FIRST_BLOCK) if model is None else replace(full(), **own | changed)


def four_steps(*kept, at=(1.9, 2.6, 3.4), family=families.FIRST_BLOCK, **changed):
    """Rows of four steps: settings of a cache that compute 3, 2, 1 and keep so much, and what as many take."""
    small = {"weights": "trained", "width": 128, "height": 128, "baseline": f"{embedded.SCHNELL} plain"}
    rows = [four(**small | {"baseline": None}), four("flux-schnell-random")]
    for computed, adherence in zip((2.75, 2.0, 1.0), kept, strict=False):
        own = {"family": family.name, "technique": family.name, "settings": {"threshold": 4 - computed}, "id": None}
        own |= {"label": f"{family.name} {4 - computed:g}", "computed_steps": computed, "adherence": adherence}
        rows.append(four(**small | own))
    for mask, speedup in zip(("1110", "1100", "1000"), at, strict=False):
        own = {"family": families.SCHEDULE.name, "id": None, "baseline": "flux-schnell-random plain", "label": mask}
        own |= {"settings": {"dtype": "bfloat16", "mask": mask}, "computed_steps": float(mask.count("1"))}
        own["settings"] |= {"first_block": False} if family is families.TEACACHE else {}
        own |= {"speedup": speedup, "speedup_ci_low": 0.99 * speedup, "speedup_ci_high": 1.01 * speedup}
        rows.append(four("flux-schnell-random", **own | changed))
    return rows


def test_a_claim_of_schnell_is_never_judged_by_28_steps_or_by_a_model_that_was_not_distilled():
    base, few = row(notebook=notebooks.FIRST_BLOCK), {"steps": 4, "total_steps": 4}
    fast = cached(0.8, 3.1, 19, 2.0)
    for rows in ([base, fast], [replace(base, steps=4), replace(fast, **few)]):
        assert not [e for e in ledger.entries(rows) if e.claim.model == ledger.SCHNELL and e.row is not None]


def test_a_mark_of_schnell_is_met_by_the_fastest_four_steps_that_keep_the_quality():
    found = entries(four_steps(1.0, 0.98, 0.6), side=published.LEAST)["FBCache"]
    assert (found.verdict, found.ours) == ("reproduced", 2.6), found
    assert found.reason.startswith("2 of 4 steps computed, as First Block Cache 2 does on embedded-schnell, where")
    slow = entries(four_steps(1.0, 0.98, 0.6, at=(1.1, 1.4, 3.4)), side=published.LEAST)["FBCache"]
    assert (slow.verdict, slow.ours) == ("not reproduced", 1.4)
    ruined = entries(four_steps(0.8, 0.7, 0.6), side=published.LEAST)["FBCache"]
    assert ruined.verdict == "not reproduced" and "adherence loses 40%" in ruined.reason
    seconds = entries(four_steps(1.0, samples=[2.0] * 10, latency_p50=2.0), about=published.SECONDS)["FBCache"]
    assert (seconds.verdict, seconds.ours) == ("reproduced", 2.0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (four_steps(1.0)[:3], "not run"),  # no time
        (four_steps(), "not run"),  # no quality
        (four_steps(1.0, family=families.TEACACHE), "not run"),  # another cache
        (four_steps(1.0, settings={"mask": "1110", "compile": "blocks"}), "not run"),
        (four_steps(1.0, gpu="h200"), "not comparable"),
        (four_steps(1.0, n=3), "undecided"),
    ],
)
def test_a_mark_of_schnell_takes_both_rows_alike_in_all(rows, said):
    assert entries(rows, side=published.LEAST)["FBCache"].verdict == said


def test_the_quality_of_both_caches_is_that_of_settings_as_fast_as_their_mark():
    def quality(*kept, **changed):
        return entries(four_steps(*kept, family=families.COMBINED, **changed), about=published.QUALITY)[
            "FBCache + TeaCache"
        ]

    assert quality(1.0, 1.0, 0.97).verdict == "reproduced" and quality(1.0, 1.0, 0.97).text.startswith("3% lost")
    assert quality(1.0, 1.0, 0.6).verdict == "not reproduced"
    slow = quality(1.0, 1.0, 1.0, at=(1.1, 1.4, 2.0))
    assert slow.verdict == "not reproduced" and slow.reason == "no setting of it is ≥ 3.00×, whatever it keeps"
    for at in ((1.1, 1.4, 2.0), (1.9, 2.6, 3.4)):  # that it is slow, or fast, rests on as many rounds as any time
        few = quality(1.0, 1.0, 1.0, at=at, n=5)
        assert few.verdict == "undecided" and few.reason.endswith("n = 5: no verdict rests on fewer than 10 rounds of "
                                                                  "one session"), few  # fmt: skip


def test_what_is_only_to_be_installed_is_shown_by_a_row():
    own = {"family": families.FIRST_BLOCK.name, "settings": {"threshold": 0.1, "backend": "para-attn"}}
    assert entries([row(**own, gpu="h100")])["ParaAttention"].verdict == "reproduced"
    assert entries([row(**own)])["ParaAttention"].verdict == "not comparable"
    assert entries([row(**own, gpu="h100", status="unavailable")])["ParaAttention"].verdict == "not run"


def test_an_open_setting_is_judged_by_the_fastest_lower_end():
    real = {
        "model": "black-forest-labs/FLUX.1-schnell",
        "weights": "trained",
        "steps": 4,
        "notebook": notebooks.COMBINED,
    }
    own = {"family": families.FIRST_BLOCK.name, "technique": families.FIRST_BLOCK.name, **real}
    sure, wide = full({"threshold": 0.2}, 2.1, **own), full({"threshold": 0.3}, 2.4, **own | {"speedup_ci_low": 1.5})
    found = entries([full(**real), sure, wide], side=published.LEAST)["FBCache"]
    assert (found.verdict, found.ours) == ("reproduced", 2.1)
    slow = entries([full(**real), full({"threshold": 0.2}, 1.05, **own)], side=published.LEAST)["FBCache"]
    assert slow.verdict == "not reproduced"


def test_random_weights_stand_for_no_cache():
    own = {"family": families.FIRST_BLOCK.name, "technique": families.FIRST_BLOCK.name, "gpu": "a100"}
    rows = [full(gpu="a100"), full({"threshold": 0.2}, 3.2, **own)]
    assert entries(rows, gpu="A100 80GB")["FBCache (0.2)"].verdict == "not run"


def test_a_threshold_on_another_model_is_shown_but_not_called_a_reproduction():
    slower = cached(0.2, 1.5, 40, 12.0)
    slower = replace(slower, settings=slower.settings | {"warm_up": 6})
    rows = [row(notebook=notebooks.FIRST_BLOCK), slower, cached(0.2, 2.5, 30, 8.0)]
    found = entries(rows, gpu="H100 80GB")["FBCache (0.2)"]
    assert (
        found.verdict == "not comparable"
        and found.ours == 2.5
        and found.setting == "embedded, cpu, 28 steps, FBCache 0.2"
    )


def test_quality_of_a_format_is_that_of_the_distilled_stand_in():
    base, _, cache = four_steps(1.0)[:3]
    lossy = replace(cache, family=families.QUANTIZATION.name, settings={"quantization": "torchao fp8 row"})
    assert entries([base, cache], about=published.QUALITY)["TorchAO fp8dqrow"].verdict == "not run"
    for adherence, said in ((0.96, "reproduced"), (0.9, "not reproduced")):
        rows = [base, replace(lossy, adherence=adherence)]
        found = entries(rows, about=published.QUALITY)["TorchAO fp8dqrow"]
        assert found.verdict == said and found.text.startswith(f"{1 - adherence:.0%} lost"), found


def test_memory_is_that_of_the_row_against_its_own_baseline():
    rows = [full(memory_peak_gib=40.0), full({"quantization": "torchao fp8 row"}, 0.8, memory_peak_gib=26.0)]
    rows[1] = replace(rows[1], family=families.QUANTIZATION.name)
    found = entries(rows, about=published.MEMORY)["TorchAO FP8"]
    assert found.ours == pytest.approx(0.65) and found.text.startswith("-35%")
    asked = entries([full(memory_peak_gib=33.8, steps=4)], about=published.GIB)["uncached"]
    assert asked.verdict == "not run"  # it is said of FLUX.1-schnell
    asked = entries([four("flux-schnell-random", memory_peak_gib=33.8)], about=published.GIB)["uncached"]
    assert asked.text.startswith("33.8 GiB") and asked.verdict == "not reproduced"
    once = entries([four("flux-schnell-random", memory_peak_gib=33.8, n=3)], about=published.GIB)["uncached"]
    assert once.verdict == "not reproduced" and once.reason.startswith("ours lies outside")  # a peak has no rounds


def test_images_of_random_weights_decide_no_claim_of_quality():
    judged = {"family": families.QUANTIZATION.name, "baseline": "flux-schnell-random plain", "id": None}
    judged |= {"settings": {"dtype": "bfloat16", "quantization": "torchao fp8 row"}, "images": 48, "ssim_min": 0.99}
    rows = [four("flux-schnell-random"), four("flux-schnell-random", **judged)]
    assert entries(rows, about=published.QUALITY)["TorchAO fp8dqrow"].verdict == "not run"


def test_a_number_format_is_over_another_one():
    ends = {"speedup_ci_low": 0.98, "speedup_ci_high": 0.99}
    half = full({"dtype": "float16"}, 0.985, family=families.NUMBER_FORMAT.name, **ends)
    found = entries([full(), half], gpu="H100 80GB")["BF16"]
    assert found.verdict == "reproduced" and found.figure == pytest.approx((1 / 0.985, 1 / 0.99, 1 / 0.98))
    low = replace(half, speedup=1.1, speedup_ci_low=1.09, speedup_ci_high=1.11)
    assert entries([full(), low], gpu="H100 80GB")["BF16"].verdict == "not reproduced"  # the other sign


def test_what_is_on_top_of_another_technique_is_compared_in_one_session():
    own = {"model": "FLUX.1-dev", "weights": "trained", "family": families.FIRST_BLOCK.name}
    rows = [full(**own | {"family": families.BASELINE.name})]
    rows += [full({"threshold": t, "dtype": "float16"}, s, **own) for t, s in ((0.3, 3.4), (0.35, 3.9))]
    found = entries(rows, over="FBCache (0.3)", gpu="H100 80GB")["FBCache (0.35)"]
    assert found.ours == pytest.approx(3.9 / 3.4) and found.verdict == "reproduced"
    other = replace(rows[1], baseline="c")
    apart = entries([*rows[:1], full(id="c", session="t"), other, rows[2]], over="FBCache (0.3)")["FBCache (0.35)"]
    assert apart.verdict == "not run" and "beside FBCache (0.3) in one session" in apart.reason


def test_on_several_gpus_ours_is_over_the_same_on_one():
    parts = {"compile": "blocks", "xdit_ulysses": 2, "xdit_ring": 1}
    way = full(parts, 1.6, gpu="h100x2", gpus=2, notebook=notebooks.PARALLEL, stack=stacks.XDIT_ULYSSES)
    found = entries([way])["compile, ulysses 2"]
    assert (found.verdict, found.ours) == ("reproduced", 1.6)
    other = entries([replace(way, gpu="h200x2")])["compile, ulysses 2"]
    assert (other.verdict, other.reason) == ("not comparable", "GPU: H100, ours H200")


def rows_of(claim):
    """Rows of real weights on an H100 that have exactly what a claim and what it is over name, and their baseline."""
    at = {"model": claim.model, "weights": "trained", "steps": claim.steps, "batch": claim.batch, "gpus": claim.gpus}
    at |= {"gpu": "h100" if claim.gpus == 1 else f"h100x{claim.gpus}", "memory_peak_gib": 20.0, "samples": [2.0] * 10}
    at |= {"images": 8, "ssim_min": 0.99}
    over, own = claim.over_configuration or {}, claim.configuration or {}
    base = full({"dtype": over.get("dtype", "bfloat16")}, family=families.BASELINE.name, id="b", baseline=None, **at)
    made = [base]
    for settings, family, speedup in ((over, claim.over_family, 1.5), (own, claim.family, 1.6)):
        if settings.keys() - {"dtype"} or settings.get("dtype", "bfloat16") != base.setting("dtype") or claim.anything:
            made.append(full(settings, speedup, family=family or families.STACK.name, **at))
    return made


def test_every_claim_of_an_h100_can_be_judged_by_rows_of_an_h100():
    for claim in published.claims():
        if not claim.gpu.startswith("H100") or claim.configuration is None:
            continue
        found = next(e for e in ledger.entries(rows_of(claim)) if e.claim == claim)
        open_to = claim.unstated and found.reason == f"the source does not say {claim.unstated}"
        assert found.verdict in ("reproduced", "not reproduced", "undecided") or open_to, (claim.technique, found)


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
    assert ledger.latest([before, after, *others]) == [after, *others]


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
