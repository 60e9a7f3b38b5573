"""One image on several ranks: gloo processes on the CPU, started as a user starts them."""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import on_ranks
import psutil
import pytest
import torch

from fluxnb import families, notebooks, params, study
from fluxnb.cache import Cache, Cascade, FirstBlock, Taylor, TeaCache, teacache
from fluxnb.errors import UserError
from fluxnb.measure import ranks
from fluxnb.technique import ROUNDING, Unavailable
from fluxnb.techniques import symmetric
from fluxnb.techniques.parallel import ContextParallel, FullyShard, Replicas
from fluxnb.techniques.parallel_vae import ParallelVAE
from fluxnb.techniques.xdit import PipeFusion, XDiT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these ranks are CPU processes")


CACHES = [Cache(FirstBlock(t)) for t in (0, 0.12, 0.3)] + [Cache(FirstBlock(0.2), Taylor(2))]
CACHES += [Cache(Cascade(TeaCache(0.2, teacache.coefficients("embedded")), FirstBlock(0.1)))]
GATHERED, SWAPPED = ContextParallel(gather=2), ContextParallel(ulysses=2)
PULLED, WAITING = ContextParallel(gather=2, pull=True), ContextParallel(gather=2, overlap=False)
DIVIDED = {
    2: [SWAPPED, PULLED],
    4: [ContextParallel(*degrees) for degrees in ((4, 1), (2, 2), (1, 4), (1, 4, True))],
}
CALLS = {
    2: {
        "same_decisions": (CACHES, 10),
        "divided": (DIVIDED[2],),
        "order_of_the_blocks": ([GATHERED, SWAPPED, PULLED, WAITING],),
        "composed": (),
        "exact_compiled_picture": (),
        "with_controlnet": (Cache(FirstBlock(0.2), hold_controlnet=True),),
        "pulls_on_a_cpu": (),
        "small_text": (),
    },
    4: {"same_decisions": (CACHES, 10), "divided": (DIVIDED[4],), "exact_picture": ()},
}


@pytest.fixture(scope="module")
def emitted():
    """A function (function of on_ranks, number of ranks) -> what it emits; the same ranks run all of CALLS once."""

    @functools.cache
    def of(world):
        found = {name: [] for name in CALLS[world]}
        try:
            for said in ranks.run("on_ranks:in_turn", world, CALLS[world], limit_s=240):
                ((name, result),) = said.items()
                found[name].append(result)
        except ranks.RankError as error:
            found["error"] = str(error)
        return found

    def by(function, world):
        found = of(world)
        assert "error" not in found or found[function.__name__], found["error"]
        return found[function.__name__]

    return by


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_the_image_and_the_decisions_of_several_ranks_are_those_of_one(emitted, world):
    found = emitted(on_ranks.same_decisions, world)
    assert len(found) == len(CACHES) + 1
    assert len({decided["alone"] for decided in found}) > 2  # the thresholds tell steps apart
    assert found[0]["difference"] < 1e-3 and "0" not in found[0]["alone"]  # nothing is reused: the plain image
    for decided in found:
        assert decided["masks"] == [decided["alone"]] * world and decided["difference"] < 1e-2, decided["label"]
    assert set(found[-1]["own"]) == {True, False}  # by themselves some ranks would reuse what others would compute


@pytest.mark.parametrize("world", [2, 4])
def test_tokens_and_heads_are_exchanged_without_a_difference(emitted, world):
    found = emitted(on_ranks.divided, world)
    assert [made["label"] for made in found] == [way.label for way in DIVIDED[world]]
    for made in found:
        assert made["difference"] < 1e-5 and made["after"], made["label"]
        assert made["divided"] == f"2 attention layers over {world} ranks"


def test_blocks_compute_something_while_tokens_are_on_their_way(emitted):
    gathered, swapped, pulled, waiting = emitted(on_ranks.order_of_the_blocks, 2)
    for made in (gathered, pulled):  # the image's and the text's keys and values go ahead of their queries
        assert shortened(made["double"]) == ["4 product", "sends", "2 product"], made["label"]
        assert shortened(made["single"]) == ["2 product", "sends", "1 product", "1 feeds"], made["label"]
    assert shortened(swapped["double"]) == ["6 product", "sends"]  # queries are exchanged, too
    assert shortened(swapped["single"]) == ["3 product", "sends", "1 feeds"]
    assert shortened(waiting["double"]) == ["6 product", "sends"]
    assert shortened(waiting["single"]) == ["3 product", "1 feeds", "sends"]
    assert waiting["label"] == "all-gather 2, no overlap"


def shortened(order):
    """Runs of the same name as one, with their number; an exchange takes as many lines as it likes."""
    runs = [(name, len(list(same))) for name, same in itertools.groupby(order)]
    return [name if name == "sends" else f"{count} {name}" for name, count in runs]


def test_a_layer_that_is_pulled_writes_where_the_layer_before_did_not(monkeypatch):
    board, said = object.__new__(symmetric.Board), []
    board.rank, board.world, board.others, board.theirs = 0, 2, [], {}
    board.full = torch.zeros(2, 2, 2, 1, 4, 1, 2)
    board.shared = SimpleNamespace(barrier=lambda channel: said.append(channel))
    board.side, board.came, board.place, board.recording = MagicMock(), None, 0, False
    recording = iter([False, False, True, True, True, False])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(recording))
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    waits, places = [], []
    for i in range(6):
        said.clear()
        board.begin(torch.full((1, 4, 1, 2), float(i)), torch.zeros(1, 4, 1, 2))
        waits, places = [*waits, len(said)], [*places, board.place]
        key, _ = board.end()
        assert key.shape == (1, 8, 1, 2) and (key[:, :4] == i).all()
    assert waits == [2, 2, 2, 1, 1, 2]  # before it is overwritten: only in a recording is it known what came before
    assert places == [1, 0, 1, 0, 1, 0]


def test_it_composes_with_fused_parts_and_sharded_weights(emitted):
    fused, sharded = emitted(on_ranks.composed, 2)
    for made in (fused, sharded):
        assert made["difference"] < 1e-3, made["label"]


def test_it_composes_with_compiled_blocks(emitted):
    for made in emitted(on_ranks.order_of_the_blocks, 2):
        assert made["difference"] < 1e-5 and made["after"] and made["breaks"] == 0, made["label"]


def test_a_divided_decoder_makes_the_picture_of_a_whole_one(emitted):
    (made,) = emitted(on_ranks.exact_picture, 4)
    assert made["difference"] < 1e-4 and made["after"] and made["decoded"] == "25 convolutions in 4 shares of the rows"


def test_a_divided_decoder_can_be_compiled(emitted):
    (made,) = emitted(on_ranks.exact_compiled_picture, 2)
    assert made["difference"] < 1e-5 and made["breaks"] == 0


def test_a_controlnet_s_residuals_are_divided_too(emitted):
    plain, cached = emitted(on_ranks.with_controlnet, 2)
    assert plain["difference"] < 1e-3 and cached["difference"] < 1e-3


# --- what goes wrong ---


@pytest.mark.parametrize("technique", [ContextParallel(gather=2), FullyShard(), ParallelVAE(), XDiT(2), PipeFusion(2)])
def test_without_ranks_it_says_what_it_needs(technique):
    from fluxnb.models import pipelines

    with pytest.raises(Unavailable, match="^needs .* ranks, started by fluxnb.measure.ranks$"):
        technique.apply(pipelines.load("embedded", device="cpu"))


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are several GPUs")
def test_pulling_needs_gpus_that_read_each_other_s_memory(emitted):
    (said,) = emitted(on_ranks.pulls_on_a_cpu, 2)
    assert said == {"unavailable": "needs 2 CUDA GPUs in one machine", "both": "give `gather` alone with it."}


def test_tokens_that_cannot_be_divided(emitted):
    (made,) = emitted(on_ranks.small_text, 2)
    for said in made["said"]:
        assert "64 image tokens and 23 text tokens can't be divided by 2 ranks" in said


def test_a_rank_that_fails_ends_the_run_with_its_message(tmp_path, monkeypatch):
    heard, log, temporary = [], tmp_path / "a" / "ranks.log", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(ranks.RankError, match="^Rank 1 of 2 failed: ValueError: no such thing; the others were ended"):
        for result in ranks.run("ending_ranks:fails", 2, limit_s=60, log=log):
            heard.append(result)
    assert heard == [{"began": True}]  # what was said before is kept
    assert 'raise ValueError("no such thing")' in log.read_text()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("leaves", "ended before its work was done"),
        ("exits", "failed: SystemExit: 3"),
        ("dies", "was killed by signal 9"),
    ],
)
def test_the_rank_that_fails_first_is_named(function, said):
    with pytest.raises(ranks.RankError, match=f"^Rank 1 of 2 {said}; the others were ended with it"):
        list(ranks.run(f"ending_ranks:{function}", 2, limit_s=120))


def test_what_a_rank_has_started_ends_with_it(monkeypatch):
    marks, kill_all = [], ranks._kill_all

    def kills(mark):
        marks.append((mark, sleeping(mark)))
        kill_all(mark)

    monkeypatch.setattr(ranks, "_kill_all", kills)
    assert list(ranks.run("ending_ranks:starts_another", 2, limit_s=120)) == [{"began": True}]
    ((mark, before),) = marks
    assert len(before) == 1 and not sleeping(mark)


def sleeping(mark):
    """The processes of a run that a rank has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(ranks.MARK) == mark and "sleep" in process.cmdline():
                found.append(process.pid)
    return found


def test_a_run_that_hangs_is_ended_and_nothing_is_left(monkeypatch):
    pids = []

    def fast():  # once they hang
        return time.monotonic() * (100 if pids else 1)

    monkeypatch.setattr(ranks, "time", SimpleNamespace(sleep=time.sleep, monotonic=fast))
    with pytest.raises(ranks.RankError, match="^The 2 ranks said nothing for 300 s and were ended"):
        for result in ranks.run("ending_ranks:hangs", 2, limit_s=300):  # also until they are up
            pids += result["pids"]
            hanging = time.monotonic()
    assert time.monotonic() - hanging < 60 and len(pids) == 2
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_a_caller_that_stops_listening_ends_the_run():
    run_ = ranks.run("ending_ranks:hangs", 2, limit_s=300)
    pids = next(run_)["pids"]
    run_.close()
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="^4 GPUs are asked for and 2 are here"):
        next(ranks.run("ending_ranks:hangs", 4))


# --- measuring ---


@pytest.fixture
def begun(tmp_path):
    s = study.Study(params.load("cpu"), notebooks.PARALLEL, tmp_path)
    return s, dataclasses.replace(s.subject("embedded"), prompts=("a red ball", "a blue cup"), seeds=(0,), rounds=3)


def candidate(*techniques, gpus=2):
    return study.Candidate(3, techniques, gpus=gpus)


def test_spreading_is_measured_beside_one_rank_alone(begun):
    s, subject = begun
    candidates = [
        candidate(Replicas()),
        candidate(ContextParallel(gather=2)),
        candidate(ContextParallel(gather=2), Cache(FirstBlock(0.5))),
        candidate(ContextParallel(ulysses=2)),
        candidate(XDiT(ulysses=2)),
    ]
    replicas, spread, cached, heads, xdit = s.spread(subject, candidates, limit_s=200)
    assert replicas.gpus == spread.gpus == 2 and replicas.ok and spread.ok
    assert (replicas.family, spread.family, spread.exact) == (families.REPLICAS.name, families.PARALLEL.name, ROUNDING)
    assert replicas.images_per_s == pytest.approx(2 * 3 / sum(replicas.samples))
    assert replicas.speedup is None and replicas.baseline is None  # each image takes as long as it does alone
    alone = {row.id: row for row in s.results.rows()}
    for row in (spread, cached):  # what was timed in turn with it, at one rank
        base = alone[row.baseline]
        rounds = [alone / together for alone, together in zip(base.samples, row.samples, strict=True)]
        assert row.speedup == pytest.approx(statistics.median(rounds), rel=1e-6)
        assert row.shown("alone_s") == base.latency_p50 and len(base.samples) == len(row.samples) == 3
    assert (
        alone[cached.baseline].computed_steps < 3 == alone[spread.baseline].computed_steps
    )  # with the cache, alone too
    assert spread.stable in (0, 1) and spread.warmup_s > spread.first_s > 0 and alone[spread.baseline].first_s > 0
    assert spread.baseline_p50 == alone[spread.baseline].latency_p50  # of the same rounds
    assert spread.psnr_identical or spread.psnr_db > 45
    assert 0 < spread.shown("communication") < 1
    assert set(spread.shown("steps_ms")) == {"computed", "computed, set off in"}
    stages = ("text_s", "denoise_s", "vae_s")
    assert 0 < sum(getattr(spread, name) for name in stages) < max(spread.samples)
    assert spread.shown("alone_stages") == {name: getattr(alone[spread.baseline], name) for name in stages}
    assert spread.shown("alone_steps_ms")["computed"] > 0 and cached.shown("alone_steps_ms")["skipped"] > 0
    assert cached.shown("steps_ms")["skipped"] > 0
    assert cached.shown("decisions") == "identical on all ranks" and cached.computed_steps < 3
    assert (heads.status, heads.reason[:28]) == ("unavailable", "needs a number of ranks that")
    assert (xdit.status, xdit.label, xdit.reason[:11]) == ("unavailable", "xDiT Ulysses 2", "needs GPUs:")
    again = s.spread(subject, candidates, limit_s=1e-3)  # nothing is measured twice
    assert again == [replicas, spread, cached, heads, xdit]


def test_a_failing_rank_is_a_row_and_the_next_candidate_is_tried(begun):
    s, subject = begun
    wrong = [candidate(ContextParallel(gather=3)), candidate(ContextParallel(gather=5))]
    for row, degree in zip(s.spread(subject, wrong, limit_s=120), (3, 5), strict=True):
        assert row.status == "error" and f"for {degree} ranks and there are 2: choose degrees" in row.reason
