"""The wait for the first image: each candidate in a compile cache of its own, and again with what that left."""

import contextlib
from types import SimpleNamespace

import pytest

from fluxnb import families, stacks, study
from fluxnb.study import starts
from fluxnb.study.row import Row

BLOCKS, GELU, *_ = stacks.COMPILED


class Watched:
    """A study that notes what is asked of it."""

    def __init__(self, fails=()):
        self.did, self.fails, self.pool = [], fails, SimpleNamespace(release=lambda own: self.note("release"))

    def note(self, *what):
        self.did.append(what if len(what) > 1 else what[0])

    def compare(self, subject, baseline, candidates, profile):
        assert profile
        labels = [c.meaning["label"] for c in candidates]
        self.note("compare", *labels)
        rows = [Row(label=label, status="oom" if label in self.fails else "ok") for label in labels]
        return [Row(label="eager", status="ok"), *rows]

    def loaded(self, own):
        self.note("loaded")
        return SimpleNamespace(pipe=None, generate=lambda *given: self.note("image", *given))

    def time(self, technique, settings, run, repeats, *, before, warm, label, family, **columns):
        assert (repeats, warm, family) == (1, False, families.COMPILATION)
        before()
        self.note("timed")
        run()
        return Row(label=label, technique=technique, settings=settings, latency_p50=1.0, **columns)


@pytest.fixture
def subject():
    own = SimpleNamespace(model=SimpleNamespace(name="m", weights="random"), inputs=[("a cat", 3)])
    own.having = lambda *techniques, dtype: own
    return own


@pytest.fixture
def caches(monkeypatch):
    """What happens to the compile cache, in the order of everything else."""

    def into(s):
        @contextlib.contextmanager
        def fresh():
            s.note("fresh")
            yield
            s.note("gone")

        monkeypatch.setattr(starts.compilation, "fresh", fresh)
        monkeypatch.setattr(starts.torch.compiler, "reset", lambda: s.note("reset"))
        return s

    return into


def candidates():
    return [study.stacked(stacks.compiled(name), 4) for name in (BLOCKS, GELU)]


def test_each_candidate_has_a_cache_of_its_own_and_starts_again_with_what_it_left(subject, caches):
    s = caches(Watched())
    rows, warm = starts.compare_starts(s, subject, study.plain(4), candidates(), profile=True)
    assert [r.label for r in rows] == ["eager", BLOCKS, GELU] and list(warm) == [BLOCKS, GELU]
    first = ("image", "a cat", 3, 4)
    own = ["loaded", first, "reset", "release", "loaded", "timed", "loaded", first, "release", "gone"]
    assert s.did == ["fresh", ("compare", BLOCKS), *own, "fresh", ("compare", GELU), *own]


def test_the_row_of_a_warm_start_says_of_what_it_is(subject, caches):
    row = starts.warm_start(caches(Watched()), subject, candidates()[0])
    assert row.settings == {"variant": BLOCKS, "steps": 4} and row.technique == starts.WARM
    assert row.label == f"{BLOCKS}: {starts.WARM}" and (row.model, row.weights) == ("m", "random")


def test_what_does_not_run_has_no_warm_start_but_frees_its_memory(subject, caches):
    s = caches(Watched(fails=[BLOCKS]))
    rows, warm = starts.compare_starts(s, subject, study.plain(4), candidates()[:1], profile=True)
    assert rows[1].status == "oom" and warm == {} and s.did[-2:] == ["release", "gone"]


def test_without_a_candidate_there_is_the_baselines_row(subject, caches):
    rows, warm = starts.compare_starts(caches(Watched()), subject, study.plain(4), [], profile=True)
    assert [r.label for r in rows] == ["eager"] and warm == {}
