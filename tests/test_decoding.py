"""The VAE by itself: which rows there are, what they say, and that a row that is there loads nothing."""

from types import SimpleNamespace

import pytest

from fluxnb import families
from fluxnb.study import decoding
from fluxnb.study.row import Row
from fluxnb.techniques import vae

OPTIONS = vae.chosen(["channels-last", "compiled", "sliced", "tiled", "bytes"], [64, 128])
ASKED = "technique settings width batch".split()


class Watched:
    """A study that notes what it is asked to time, and times it once."""

    def __init__(self, pipe=None):
        self.loaded = pipe

    def pipe(self, subject):
        return self.loaded

    def time(self, technique, settings, run, repeats, *, before, also, family, **columns):
        proved = {}
        if self.loaded is not None:
            before()
            run()
            proved = also()
        return Row(label=technique, technique=technique, settings=settings, family=family.name, **columns, **proved)


@pytest.fixture
def subject():
    return SimpleNamespace(model=SimpleNamespace(name="embedded", weights="trained"))


def test_options_are_chosen_by_name_and_tiles_by_side():
    assert [o.label for o in OPTIONS] == [
        "VAE channels-last", "VAE compiled", "VAE sliced", "VAE tiles of 64", "VAE tiles of 128", "bytes on the device",
    ]  # fmt: skip
    with pytest.raises(KeyError):
        vae.chosen(["mirrored"], [])


def test_nothing_is_cut_that_is_whole_and_one_shape_is_compiled(subject):
    rows = decoding.decodings(Watched(), subject, OPTIONS, [128, 256], 2, 3)
    made = {}
    for r in rows:
        made.setdefault((r.width, r.batch), []).append(r.label.removeprefix("VAE "))
    assert made == {
        (128, 1): ["eager", "channels-last", "compiled", "tiles of 64"],
        (128, 2): ["eager", "channels-last", "sliced", "tiles of 64"],
        (256, 1): ["eager", "channels-last", "tiles of 64", "tiles of 128"],
        (256, 2): ["eager", "channels-last", "sliced", "tiles of 64", "tiles of 128"],
    }
    assert rows[0].settings == {"vae": "eager", "side": 128} and rows[0].model == "embedded"
    assert {r.family for r in rows} == {families.VAE.name}


def test_pictures_are_made_with_and_without_what_changes_them(subject):
    rows = decoding.conversions(Watched(), subject, OPTIONS, [128], 3)
    assert [r.settings["pixels"] for r in rows] == ["numbers to the host", "bytes on the device"]
    assert {r.family for r in rows} == {families.HOST.name}
    assert decoding.conversions(Watched(), subject, vae.chosen(["sliced"], []), [128], 3) == []


def test_what_is_timed_decodes_with_the_option_on_and_leaves_the_pipeline_as_it_was(subject, embedded_pipe):
    before = embedded_pipe.vae.use_tiling
    rows = decoding.decodings(Watched(embedded_pipe), subject, vae.chosen(["tiled"], [64]), [128], 2, 1)
    assert [(r.batch, bool(r.proof["kernels"])) for r in rows] == [(1, True), (1, True), (2, True), (2, True)]
    assert embedded_pipe.vae.use_tiling == before
    (numbers, _) = decoding.conversions(Watched(embedded_pipe), subject, OPTIONS, [128], 1)
    assert numbers.width == numbers.height == 128 and numbers.batch is None
