"""What a grid of two caches says: of a search in it, and of what is kept in memory."""

from dataclasses import replace

import pytest
from measured import cached, row

from fluxnb import findings
from fluxnb.cache import Cache, Cascade, FirstBlock, Taylor, TeaCache
from fluxnb.models import pipelines
from fluxnb.study.subject import Subject


@pytest.fixture
def subject():
    model = pipelines.describe("embedded")
    return Subject(model, "float32", ("a red apple",), (0,), 3.5, 128, 128, 3)


def test_the_search_says_how_much_of_the_grids_front_it_has():
    every = {"a": (1.0, 1.0), "b": (2.0, 3.0), "c": (3.0, 0.5), "d": (3.5, 4.0)}
    said = findings.search_sentence({"a": every["a"], "b": every["b"]}, every, 4, 2)
    assert said.startswith("The search evaluated 2 of 4 settings (50%), each judged on 2 images, and reached ")
    assert said.endswith("% of the full grid's front (hypervolume), 2 of its 3 settings.")


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
