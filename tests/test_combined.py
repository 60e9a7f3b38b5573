"""What a grid of two caches says: of a search in it, and of what is kept in memory."""

import math
from dataclasses import replace

import pytest
from measured import cached, row

from fluxnb import families, findings, study
from fluxnb.cache import (
    Aligned,
    Cache,
    Cascade,
    FirstBlock,
    FreqCa,
    Newton,
    Spectrum,
    Taylor,
    TeaCache,
    predictors,
    space,
)
from fluxnb.errors import UserError
from fluxnb.findings import combined
from fluxnb.models import pipelines
from fluxnb.study import search
from fluxnb.study.subject import Subject


@pytest.fixture
def subject():
    model = pipelines.describe("embedded")
    return Subject(model, "float32", ("a red apple",), (0,), 3.5, 128, 128, 3)


def searched(*values, best=(0, 0)):
    """What a search of one line says that asked for one image of each point."""
    line = [study.using(Cache(FirstBlock((i + 1) / 10)), 28) for i in range(len(values))]
    own = {(0, i): value for i, value in enumerate(values)}
    found = search.Found(best, {point: value[:1] for point, value in own.items()})
    return combined.Searched([line], own, {35.0: found})


def test_the_search_says_of_how_many_images_it_found_what_the_grid_has():
    one, two = [(12.0, 41.0), (14.0, 36.0)], [(8.0, 39.0), (8.0, 30.0)]
    said = findings.search_sentence(searched(one, two))
    assert said == (
        "A search for the cheapest setting whose worst image of 2 keeps a floor: at 35 dB 2 of the grid's 4 images "
        "(50%) found FBCache 0.1 (13.0 steps of work, 36.0 dB at worst), and the whole grid has nothing cheaper."
    )
    missed = findings.search_sentence(searched(one, [(8.0, 39.0), (8.0, math.inf)]))
    assert missed.endswith("36.0 dB at worst), where the grid has FBCache 0.2 (8.0 steps of work, 39.0 dB at worst).")
    assert "found nothing, where the grid has FBCache 0.1" in findings.search_sentence(searched(one, best=None))
    assert "no setting keeps it" in findings.search_sentence(searched(two, best=None))
    assert "identical" in findings.search_sentence(searched([(28.0, math.inf)]))
    assert "no setting" in findings.search_sentence(searched())


def test_every_line_turns_one_dial_and_every_predictor_is_on_every_gate():
    dials = {"tea": [0.1, 0.2], "first_block": [0.2, 0.1], "sea": [0.3], "di": [0.4, 0.1], "computed": [4, 12, 8]}
    lines = space.lines("embedded", 10, families.PREDICTORS, 6, intervals=[3, 2], **dials)
    labels = [cache.label for line in lines for cache in line]
    assert len(set(labels)) == len(labels) and [] not in lines
    assert len(lines) == 2 + len(families.PREDICTORS) * (3 * 2 + 4)
    masks = [[c.gate.mark for c in line] for line in lines if line[0].family is families.SCHEDULE]
    assert masks == [["8 of 10", "4 of 10"]] * (1 + len(families.PREDICTORS))
    assert {type(line[0].predictor) for line in lines} >= {FreqCa, Spectrum, Aligned, Newton}
    assert tuple(predictors.USUAL) == families.PREDICTORS
    planned = [line for line in space.lines("embedded", 28, ["Taylor 2"], 6, intervals=[3], **dials)
               if line[0].gate.label.startswith("planned")]  # fmt: skip
    assert [[c.gate.mark for c in line] for line in planned] == [["12 of 28", "8 of 28"]] * 2
    assert [line[0].predictor.name for line in planned] == ["planned weights", "Taylor 2"]
    with pytest.raises(UserError, match="no predictor 'Newton 5': choose one of hold, "):
        predictors.named("Newton 5")


def test_each_point_and_each_order_keeps_a_tensor(subject):
    tea, first = TeaCache(0.1, (1.0,)), FirstBlock(0.2)
    caches = [Cache(first), Cache(tea, Taylor(1)), Cache(Cascade(tea, first), Taylor(2))]
    table = findings.kept_table(caches, subject)
    assert list(table["kept tensors"]) == [1, 2, 6]
    assert list(table.index) == [
        "FBCache, hold",
        "TeaCache, Taylor 1",
        "TeaCache then FBCache, Taylor 2",
    ]
    here = table["here, float32"].iloc[0] * 2**20
    config = pipelines.transformer_config("embedded")
    assert here == 64 * config["num_attention_heads"] * config["attention_head_dim"] * 4
    assert table["FLUX at 1024², bfloat16"].iloc[0] == 24 and set(table.attrs["units"].values()) == {"MiB"}


def test_what_a_cache_takes_at_the_peak_stands_beside_what_it_keeps(subject):
    caches = [Cache(FirstBlock(0.2)), Cache(FirstBlock(0.2), Taylor(2))]
    gpu = [row(memory_peak_gib=33.75), row(memory_peak_gib=33.8125), row(memory_peak_gib=33.875)]
    assert list(findings.kept_table(caches, subject, gpu)["peak over uncached, measured"]) == [64, 128]
    cpu = [row(memory_peak_gib=None)] * 3
    assert "peak over uncached, measured" not in findings.kept_table(caches, subject, cpu)


def test_a_batch_has_time_hit_rate_and_images_beside_single_ones():
    rows = [row(images=6, psnr_identical=6), cached(0.2, 2.0, 33.0, 11.0, images_per_s=5.0, images=6, psnr_min_db=30.0)]
    rows += [replace(r, batch=8, images_per_s=9.0, speedup=r.speedup - 0.5, computed_steps=14.0) for r in rows]
    table = findings.one_decision_table(rows)
    assert list(table["batch"]) == [1, 1, 8, 8] and table["hit rate"].iloc[1] == pytest.approx(1 - 11 / 28)
    assert list(table["worst PSNR"].dropna()) == [30, 30] and {"images/s", "speedup"} <= set(table)
    said = findings.one_decision_sentence(rows)
    assert said.startswith("FBCache 0.2 in batches of 8: 14.0 of 28 steps computed, 9 images/s, **1.50×**")
    assert "; one at a time: 11.0 of 28 steps computed, 5 images/s, **2.00×**" in said
    assert findings.one_decision_sentence(rows[:2]) == "batches of one size only were timed here."


def test_blocks_are_counted_without_weights(subject, embedded_pipe):
    transformer = embedded_pipe.transformer
    assert findings.block_count(subject) == len(transformer.transformer_blocks) + len(
        transformer.single_transformer_blocks
    )
