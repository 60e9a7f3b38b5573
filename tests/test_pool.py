"""Pipelines that don't fit together on a card of a pretended size: freed, loaded again, taken in turns."""

import dataclasses
import gc
import weakref

import pytest
import studied
import torch
from studied import Broken, again_from_the_table

from fluxnb import families, study
from fluxnb.models import pipelines
from fluxnb.study import pool as pools
from fluxnb.study.pool import Pool
from fluxnb.study.subject import Loaded
from fluxnb.technique import Unavailable
from fluxnb.techniques.fused import FusedRoPE
from fluxnb.techniques.precision import TorchAO

STEPS = 4
FULL = torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")
ONE = pipelines.weights_gib("embedded", "float32") / (1 - pools.SPARE)  # GiB of a card that has room for one of these


@pytest.fixture
def alone(monkeypatch):
    """The pipelines loaded from here on, as weak references; no two are there at once, or the test fails."""
    load, loaded = study.Subject.load, []

    def noted(self, base=None):
        gc.collect()
        assert not [ref for ref in loaded if ref() is not None], "another pipeline is still loaded"
        found = load(self, base)
        loaded.append(weakref.ref(found.pipe))
        return found

    monkeypatch.setattr(study.Subject, "load", noted)
    return loaded


def small_card(s, gib=1.5 * ONE):
    s.pool = Pool(capacity_gib=gib)
    return s.pool


def held(pool):
    return len(pool._held)


# --- comparisons --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidate, size",  # float64: some processors take minutes for what they have no arithmetic for
    [
        pytest.param(study.in_format("float64", 2), 2.5, id="another format", marks=pytest.mark.thorough),
        pytest.param(study.built(FusedRoPE(), steps=2), 1.3, id="built in"),
    ],
)
def test_pipelines_that_do_not_fit_together_take_turns(begin, alone, candidate, size, monkeypatch):
    monkeypatch.setitem(pipelines.DTYPES, "float64", torch.float64)
    s, subject = begin(rounds=5)
    small_card(s, size * ONE)
    assert not s.pool.fit([subject, candidate.of(subject)])
    baseline, row = s.compare(subject, study.plain(2), [candidate])
    assert baseline.ok and row.ok and held(s.pool) == 1
    assert len(alone) == 3  # the baseline, the candidate, the baseline again
    floor, timed, measured = s.results.rows()
    assert (baseline, row) == (floor, measured) and timed.family == families.BASELINE.name
    assert row.baseline == timed.id and row.n == timed.n == baseline.n == 5
    assert row.images == 2 and row.psnr_db is not None or row.psnr_identical == 2
    assert len(floor.again) == 5 and floor.speedup is not None and timed.speedup is None
    again_from_the_table(s.results.rows())


def test_what_fits_together_is_timed_together(begin, made):
    s, subject = begin()
    small_card(s, 3.5 * ONE)
    names = ["a", "b", "c", "d"]
    rows = s.compare(subject, study.plain(2), [study.built(Broken(name, None), steps=2) for name in names])
    assert [row.technique for row in rows] == [families.BASELINE.name, *names] and all(row.ok for row in rows)
    by_baseline = [row.baseline for row in rows[1:]]
    assert by_baseline[0] == by_baseline[1] != by_baseline[2] == by_baseline[3]  # two at once beside the baseline
    assert by_baseline[0] == rows[0].id and rows[0].again
    assert held(s.pool) <= 3
    again_from_the_table(s.results.rows())


def test_candidates_of_the_same_pipeline_share_it(begin, made):
    s, subject = begin()
    small_card(s, 2.5 * ONE)
    own = Broken("a", None)
    both = [study.built(own, steps=2), study.built(own, steps=2, above=(Broken("on top", None),))]
    rows = s.compare(subject, study.plain(2), both)
    assert all(row.ok for row in rows) and len({row.baseline for row in rows[1:]}) == 1 and held(s.pool) == 2


def crowded(pool, monkeypatch, fails):
    """`Loaded.batch` and `Subject.load` that lack memory where `fails(what, subject, pipelines beside it)`."""
    batch, load = Loaded.batch, study.Subject.load

    def beside(subject):
        return sum(name != subject.pipeline for name in pool._held)

    def limited_batch(self, inputs, steps):
        if fails("batch", self.subject, beside(self.subject)):
            raise FULL
        return batch(self, inputs, steps)

    def limited_load(self, base=None):
        if fails("load", self, beside(self)):
            raise FULL
        return load(self, base)

    monkeypatch.setattr(Loaded, "batch", limited_batch)
    monkeypatch.setattr(study.Subject, "load", limited_load)


@pytest.mark.parametrize("what", ["batch", "load"])
def test_what_lacks_memory_beside_others_is_measured_alone(begin, made, monkeypatch, what):
    s, subject = begin()
    large, small = Broken("large", None), Broken("small", None)
    crowded(s.pool, monkeypatch, lambda at, own, others: at == what and large in own.built and others)
    rows = s.compare(subject, study.plain(2), [study.built(large, steps=2), study.built(small, steps=2)])
    assert [(row.technique, row.status) for row in rows] == [
        (families.BASELINE.name, "ok"), ("large", "ok"), ("small", "ok"),
    ]  # fmt: skip
    assert rows[1].n == rows[2].n == 3 and rows[1].baseline != rows[2].baseline
    assert not any(row.status == "oom" for row in s.results.rows())
    again_from_the_table(s.results.rows())


@pytest.mark.thorough
def test_what_lacks_memory_while_all_are_timed_is_measured_alone(begin, made, monkeypatch):
    s, subject = begin()
    large, count = Broken("large", None), iter(range(100))
    # two warm-up images fit, and the first that is timed doesn't
    crowded(
        s.pool, monkeypatch, lambda at, own, n: at == "batch" and n and large in own.built and next(count) == 2
    )  # fmt: skip
    rows = s.compare(subject, study.plain(2), [study.built(large, steps=2), study.fewer_steps(1)])
    assert [row.status for row in rows] == ["ok"] * 3 and rows[0].again and rows[1].baseline != rows[2].baseline
    again_from_the_table(s.results.rows())


@pytest.mark.parametrize("what", ["batch", "load"])
def test_what_lacks_memory_alone_is_oom_and_the_next_candidate_is_measured(begin, made, monkeypatch, what):
    s, subject = begin()
    large, small = Broken("large", None), Broken("small", None)
    crowded(s.pool, monkeypatch, lambda at, own, others: at == what and large in own.built)
    rows = s.compare(subject, study.plain(2), [study.built(large, steps=2), study.built(small, steps=2)])
    assert [row.status for row in rows] == ["ok", "oom", "ok"] and rows[1].reason == "tried to allocate 90 GiB"
    made.clear()
    again = s.compare(subject, study.plain(2), [study.built(large, steps=2), study.built(small, steps=2)])
    assert again == rows and made == []  # it is a result
    again_from_the_table(s.results.rows())


@pytest.mark.thorough
def test_a_quantization_that_lacks_memory_beside_others_is_not_unavailable(begin, embedded_pipe, monkeypatch):
    s, subject = begin(prompts=["a cat"])
    quantize, tries = TorchAO.convert, []

    def convert(self, linear, modulation):
        if s.pool.beside(subject.having(self)):
            tries.append("beside")
            raise FULL
        return quantize(self, linear, modulation)

    monkeypatch.setattr(TorchAO, "convert", convert)
    row = s.compare(subject, study.plain(2), [study.built(TorchAO("int8 weight-only"), steps=2)])[1]
    assert row.ok and row.shown("weight") == "Int8Tensor" and tries == ["beside"]


def test_what_lacks_memory_in_turns_is_oom_and_the_next_candidate_is_measured(begin, made, monkeypatch):
    s, subject = begin()
    small_card(s)
    large, small = Broken("large", None), Broken("small", None)
    crowded(s.pool, monkeypatch, lambda at, own, others: large in own.built)
    rows = s.compare(subject, study.plain(2), [study.built(large, steps=2), study.built(small, steps=2)])
    assert [row.status for row in rows] == ["ok", "oom", "ok"]
    again_from_the_table(s.results.rows())


def test_what_an_earlier_comparison_left_there_is_in_no_baselines_way(begin, made, monkeypatch):
    s, subject = begin()
    s.pipe(subject.having(Broken("earlier", None)))
    crowded(s.pool, monkeypatch, lambda at, own, others: not own.built and others)
    assert s.compare(subject, study.plain(2), [study.fewer_steps(1)])[1].ok and held(s.pool) == 1


def test_a_survey_has_no_more_loaded_than_fits(begin, alone, monkeypatch):
    monkeypatch.setitem(pipelines.DTYPES, "float64", torch.float64)
    s, subject = begin(prompts=["a cat"])
    small_card(s, 2.5 * ONE)
    (row,) = s.survey(subject, study.plain(2), [study.in_format("float64", 2)])
    assert row.ok and (row.psnr_identical or row.psnr_db > 10) and len(alone) == 2


# --- the pool -----------------------------------------------------------------------------------------------


@pytest.fixture
def subject(begin, made):
    return begin()[1]


def test_a_pipeline_is_loaded_once_and_the_one_used_longest_ago_is_freed(subject):
    pool = Pool(capacity_gib=2.5 * ONE)
    a, b, c = (subject.having(Broken(name, None)) for name in "abc")
    first = pool.get(a)
    assert pool.get(a).pipe is first.pipe and pool.get(a.part(1)).pipe is first.pipe
    assert pool.get(a.part(1)).subject == a.part(1)  # the pipeline of both, the inputs of one
    pool.get(b)
    pool.get(a)  # used last
    pool.get(c)
    assert list(pool._held) == [a.pipeline, c.pipeline]
    assert pool.beside(a) and pool.beside(b)
    pool.release_others(c)
    assert list(pool._held) == [c.pipeline] and not pool.beside(c)
    pool.release(c)
    pool.release(c)
    assert not pool._held


def test_what_is_held_is_not_freed(subject):
    pool = Pool(capacity_gib=1.5 * ONE)
    a, b = (subject.having(Broken(name, None)) for name in "ab")
    kept = pool.get(a).pipe
    with pool.holding([a]):
        pool.get(b)
        assert held(pool) == 2 and pool.get(a).pipe is kept
    pool.get(subject)
    assert list(pool._held) == [subject.pipeline]


def test_what_is_freed_is_gone(subject):
    pool = Pool(capacity_gib=1.5 * ONE)
    first = weakref.ref(pool.get(subject).pipe)
    pool.get(subject.having(Broken("other", None)))
    assert first() is None


def test_a_pipeline_that_cannot_be_had_is_asked_for_once_and_leaves_nothing_behind(subject, monkeypatch):
    tried, load = [], studied.load

    def noted(self, base=None):
        pipe = studied.FakePipe()
        tried.append(weakref.ref(pipe))
        return load(self)  # with `pipe` in this frame

    monkeypatch.setattr(study.Subject, "load", noted)
    pool, broken = Pool(capacity_gib=9), subject.having(Broken("FP8", Unavailable("needs a newer GPU")))
    for _ in range(2):
        with pytest.raises(Unavailable, match="^needs a newer GPU$"):
            pool.get(broken)
    gc.collect()
    assert len(tried) == 1 and tried[0]() is None and not pool._held


def test_weights_of_a_use_case_are_those_of_the_model_where_it_is_loaded(subject, monkeypatch):
    bases, load = [], studied.load

    def noted(self, base=None):
        bases.append(base)
        return load(self)

    monkeypatch.setattr(study.Subject, "load", noted)
    pool, other = Pool(capacity_gib=1.5 * ONE), subject.for_use_case("img2img")
    plain = pool.get(subject).pipe
    pool.get(other)
    assert bases == [None, plain] and held(pool) == 2  # they share what is large
    pool.get(other.having(Broken("built", None)))  # which changes what they would share
    assert bases[2] is None and held(pool) == 1
    pool.release()
    pool.get(other)
    assert bases[3] is None
    pool.get(subject)
    pool.release(subject)
    assert not pool._held or list(pool._held) == [other.pipeline]


@pytest.mark.parametrize("card, together", [(140, True), (80, True), (64, False), (48, False)])
def test_two_of_full_size_are_held_by_one_card_if_it_is_large_enough(subject, card, together):
    full = dataclasses.replace(subject, model=pipelines.describe("flux-dev-random"), dtype="bfloat16")
    pool = Pool(capacity_gib=card)
    assert pool.fit([full]) and pool.fit([full, full.part(1)])
    assert pool.fit([full, full.having(Broken("a", None))]) == together
    assert pool.fit([full, full.having(dtype="float32")]) == (card > 100)  # on smaller ones they take turns


def test_the_memory_of_a_machine_without_a_gpu_is_its_own(monkeypatch):
    import psutil

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Pool().capacity_gib == pytest.approx(psutil.virtual_memory().total / 2**30)
