"""Other people's caches as techniques: on, counted, and off again without a trace."""

from itertools import product

import pytest
import small
import torch

from fluxnb import families
from fluxnb.cache import Cache, Hold, Schedule, Taylor
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import ANOTHER, IDENTICAL, Unavailable, applied
from fluxnb.techniques import kinds, libraries, peers
from fluxnb.techniques.libraries import CacheDiT, DiffusersCache

MASK = "111100110101"


@pytest.fixture(scope="module")
def pipe():
    return small.load(4)


@pytest.fixture(scope="module")
def plain(pipe):
    return small.image(pipe, 12)


# --- diffusers ---

COUNTED = {  # what the library's own rule computes of twelve steps
    kinds.MAG: "110101000101", kinds.TAYLOR_LITE: "111010000100", kinds.TAYLOR: "1" * 12, kinds.FASTER: "1" * 12,
    kinds.PYRAMID: "1" * 12,
}  # fmt: skip


@pytest.mark.parametrize("kind", kinds.DIFFUSERS_CACHES)
def test_a_cache_of_diffusers_goes_on_is_counted_and_comes_off_bit_for_bit(pipe, plain, kind):
    cache = DiffusersCache(kind, 0.9) if kind in (kinds.FIRST, kinds.SEA) else DiffusersCache(kind)
    before, order = small.state(pipe), list(pipe.transformer.state_dict())
    with applied(pipe, cache):
        image = small.image(pipe, 12)
        mask = cache.trace.mask
        assert torch.equal(small.image(pipe, 12), image)  # nothing is left of the one before
    assert not torch.equal(image, plain)
    assert mask == COUNTED[kind] if kind in COUNTED else 0 < cache.trace.computed < 12
    assert len(mask) == 12 and mask[0] == "1"
    assert torch.equal(small.image(pipe, 12), plain)
    assert list(pipe.transformer.state_dict()) == order
    # an image of another cache may leave diffusers' own registry on the transformer
    assert not [name for name in small.differences(before, pipe) if name != "transformer"]


@pytest.mark.parametrize("kind", kinds.DIFFUSERS_CACHES)
def test_a_cache_of_diffusers_that_reuses_nothing_makes_the_plain_image(pipe, plain, kind):
    cache = DiffusersCache(kind, kinds.DIFFUSERS_CACHES[kind][2])
    assert cache.exact == IDENTICAL
    with applied(pipe, cache):
        assert torch.equal(small.image(pipe, 12), plain)
    assert cache.trace.mask == "1" * 12


def test_magcache_can_be_told_its_steps(pipe):
    """Its ratios are made so; the image is that of the study's own schedule that holds the residual."""
    with applied(pipe, theirs := DiffusersCache(kinds.MAG, mask=MASK)):
        image = small.image(pipe, 12)
    assert theirs.trace.mask == MASK
    with applied(pipe, Cache(Schedule(MASK, first_block=False), Hold())):
        assert torch.allclose(small.image(pipe, 12), image, atol=1e-4)


def test_an_image_that_was_broken_off_leaves_nothing_to_the_next(pipe):
    def stop(*_):
        raise KeyboardInterrupt

    with applied(pipe, DiffusersCache(kinds.FIRST, 0.9)):
        image = small.image(pipe, 6)
        with pytest.raises(KeyboardInterrupt):
            small.image(pipe, 6, on_step=stop)
        assert torch.equal(small.image(pipe, 6), image)


# --- cache-dit ---


@pytest.mark.parametrize("calibrator", kinds.CALIBRATORS)
def test_cache_dit_follows_a_mask_and_comes_off_bit_for_bit(pipe, plain, calibrator):
    pytest.importorskip("cache_dit")
    cache = CacheDiT(mask=MASK, calibrator=calibrator, first=1)
    before, order = small.state(pipe), list(pipe.transformer.state_dict())
    with applied(pipe, cache):
        image = small.image(pipe, 12)
        assert cache.trace.mask == MASK
        assert torch.equal(small.image(pipe, 12), image)
        with pytest.raises(UserError, match="12 steps but the generation has 6"):
            small.image(pipe, 6)
    assert not torch.equal(image, plain) and cache.exact == ANOTHER
    assert torch.equal(small.image(pipe, 12), plain)
    assert list(pipe.transformer.state_dict()) == order
    assert not [name for name in small.differences(before, pipe) if name != "transformer"]


@pytest.mark.parametrize(
    "theirs, ours",
    [({}, Hold()), *(({"calibrator": kinds.TAYLOR, "order": order}, Taylor(order)) for order in (1, 2))],
    ids=lambda one: getattr(one, "name", ""),
)
def test_cache_dit_makes_the_image_that_the_studys_cache_makes_at_the_same_mask(pipe, theirs, ours):
    pytest.importorskip("cache_dit")
    mask = "111110010101"  # its derivatives begin with the fourth and the fifth computed step
    with applied(pipe, CacheDiT(mask=mask, first=1, **theirs)):
        theirs = small.image(pipe, 12)
    with applied(pipe, Cache(Schedule(mask), ours)):
        assert torch.allclose(small.image(pipe, 12), theirs, atol=1e-4)


def test_cache_dit_at_a_threshold_of_nothing_makes_the_plain_image(pipe, plain):
    pytest.importorskip("cache_dit")
    with applied(pipe, cache := CacheDiT(0.0, first=1)):
        assert torch.equal(small.image(pipe, 12), plain)
    assert cache.trace.mask == "1" * 12 and cache.exact == IDENTICAL
    with applied(pipe, looks := CacheDiT(5.0, first=1, warm_up=3)):
        small.image(pipe, 12)
    assert looks.trace.mask == "111" + "0" * 9


# --- what makes no sense, or isn't there ---


@pytest.mark.parametrize("package", ["diffusers", "cache-dit"])
def test_a_library_of_another_version_is_one_sentence(monkeypatch, pipe, package):
    monkeypatch.setattr(libraries.metadata, "version", lambda name: "9.9")
    cache = {"diffusers": DiffusersCache(kinds.FIRST), "cache-dit": CacheDiT(first=1)}[package]
    with pytest.raises(Unavailable, match=f"needs {package} .*, and 9.9 is installed: the adapter fits that version"):
        cache.apply(pipe)


def test_a_library_that_is_missing_says_how_to_install_it(monkeypatch, pipe):
    def missing(name):
        raise libraries.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libraries.metadata, "version", missing)
    with pytest.raises(Unavailable, match="needs the package cache-dit, of the extra reference"):
        CacheDiT(first=1).apply(pipe)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DiffusersCache("teacache"), "no cache 'teacache': choose one of"),
        (lambda: DiffusersCache(kinds.FIRST, -1), "threshold"),
        (lambda: DiffusersCache(kinds.TAYLOR, 0), "interval of 0"),
        (lambda: DiffusersCache(kinds.TAYLOR, 2.5), "interval of 2.5"),
        (lambda: DiffusersCache(kinds.FIRST, mask="10"), "takes no mask"),
        (lambda: DiffusersCache(kinds.MAG, mask="012"), "not a mask"),
        (lambda: CacheDiT(calibrator="magic"), "no calibrator 'magic': choose one of"),
        (lambda: CacheDiT(mask="01"), "not a mask"),
        (lambda: CacheDiT(first=0), "F0B0 makes no sense"),
        (lambda: CacheDiT(float("nan")), "threshold"),
        (lambda: peers.equal_mask(1, 28), "1 of 28 steps can't be compared"),
        (lambda: peers.equal_mask(29, 28), "29 of 28 steps can't be compared"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_more_blocks_at_every_step_than_there_are_is_one_sentence(pipe):
    pytest.importorskip("cache_dit")
    with pytest.raises(UserError, match="runs 9 blocks at every step, and this transformer has 8"):
        CacheDiT(first=8, last=1).apply(pipe)


def test_a_mask_of_another_length_is_one_sentence_and_two_caches_do_not_share(pipe):
    with applied(pipe, DiffusersCache(kinds.MAG, mask=MASK)):
        with pytest.raises(UserError, match="12 steps but the generation has 4"):
            small.image(pipe, 4)
        with pytest.raises(UserError, match="has a cache already"):
            DiffusersCache(kinds.FIRST).apply(pipe)


# --- the methods that are compared ---


def test_the_mask_that_methods_are_compared_at_computes_as_many_steps_as_it_is_told():
    for steps, computed in product(range(2, 51), range(2, 51)):
        if computed <= steps:
            mask = peers.equal_mask(computed, steps)
            assert (len(mask), mask.count("1"), mask[0], mask[-1]) == (steps, computed, "1", "1")
            assert mask.startswith("1" * (computed // 2))


@pytest.mark.parametrize("name", peers.METHODS)
def test_every_method_computes_as_many_steps_as_it_is_told_or_has_none(name):
    made = [peers.METHODS[name].at("embedded", 28, computed) for computed in (14, 12, 10, 8, 6)]
    unmade = name == "BudCache"  # its search is a command of its own, which the shipped plans were made without
    assert any(made) or peers.METHODS[name].origin == peers.OWN or unmade  # a model without a plan
    for computed, technique in zip((14, 12, 10, 8, 6), made, strict=True):
        if technique and technique.family is families.LIBRARY and (mask := technique.mask):
            assert mask.count("1") == computed
        if isinstance(technique, Cache):
            assert technique.gate.mask.count("1") == computed
            assert technique.family is families.SCHEDULE


@pytest.mark.parametrize("name", peers.SETTINGS)
def test_what_decides_for_itself_has_its_authors_setting_first(name):
    (own,) = peers.as_shipped([name], 1)[name]
    more = peers.as_shipped([name], 3)[name]
    assert own.label == more[0].label and len({one.label for one in more}) == len(more) > 1
    if isinstance(own, DiffusersCache) and own.kind != kinds.FIRST:
        assert own.value == DiffusersCache(own.kind).value


def test_lite_counts_as_many_steps_as_it_is_asked_for():
    pipe = pipelines.load("embedded", device="cpu")
    technique = peers.METHODS["diffusers TaylorSeer lite"].at("embedded", 12, 7)
    with applied(pipe, technique):
        small.image(pipe, 12)
    assert technique.trace.computed == 7
    assert peers.METHODS["diffusers TaylorSeer lite"].at("embedded", 28, 14) is None
