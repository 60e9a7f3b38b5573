"""What a grid of two caches says: of a search in it, and of what is kept in memory."""

import pytest

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
        "FBCache 0.2, hold",
        "TeaCache 0.1, Taylor 1",
        "TeaCache 0.1 then FBCache 0.2, Taylor 2",
    ]
    here = table["here, float32"].iloc[0] * 2**20
    config = pipelines.transformer_config("embedded")
    assert here == 64 * config["num_attention_heads"] * config["attention_head_dim"] * 4
    assert table["FLUX at 1024², bfloat16"].iloc[0] == 24 and set(table.attrs["units"].values()) == {"MiB"}


def test_blocks_are_counted_without_weights(subject, embedded_pipe):
    transformer = embedded_pipe.transformer
    assert findings.block_count(subject) == len(transformer.transformer_blocks) + len(
        transformer.single_transformer_blocks
    )
