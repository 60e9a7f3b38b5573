"""A server under load: what becomes of every request, and how its time is counted."""

import collections
import dataclasses
import os
import signal
import threading
import time

import hostile
import pytest

from fluxnb import families, findings, notebooks, params, study
from fluxnb.errors import UserError
from fluxnb.measure import load

FAILING = 2**70  # a seed that no generator takes


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    given = study.Study(params.load("cpu"), notebooks.LOAD, tmp_path_factory.mktemp("load")).subject("embedded")
    return dataclasses.replace(given, prompts=("a red ball", "a blue cup"), seeds=(0,), width=64, height=64)


@pytest.fixture(scope="module")
def server(subject):
    with load.Server(subject, queue=32, batch=2) as server:
        yield server


def test_an_image_of_the_server_is_that_of_the_pipeline(server, subject):
    request = server.ask("a red ball", 3, 2, images=2).wait(60)
    assert request.state == "done" and len(request.result) == 2
    assert [image.tobytes() for image in request.result] == [
        image.tobytes() for image in subject.load().batch([("a red ball", 3), ("a red ball", 4)], 2)
    ]
    assert request.asked <= request.begun <= request.ended
    assert request.latency_s == pytest.approx(request.queued_s + request.service_s)


def test_of_many_requests_none_is_lost(server):
    """8 users, 5 % cancelled as soon as they have asked, 2 % made to fail."""
    numbers, made, lock = iter(range(200)), [], threading.Lock()

    def user():
        while True:
            with lock:
                n = next(numbers, None)
            if n is None:
                return
            request = server.ask("a red ball", FAILING if n % 50 == 0 else n, 1)
            taken_back = n % 20 == 7 and server.cancel(request)
            made.append((n, taken_back, request.wait(120)))

    users = [threading.Thread(target=user) for _ in range(8)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert sorted(n for n, *_ in made) == list(range(200))
    for n, taken_back, request in made:
        expected = "failed" if n % 50 == 0 else "cancelled" if taken_back else "done"
        assert request.state == expected, (n, request.error)
        assert (request.result is not None) == (expected == "done")
    assert sum(taken_back for _, taken_back, _ in made) > 5
    assert {r.batch for _, _, r in made if r.state == "done"} == {1, 2}
    failed = next(r for _, _, r in made if r.state == "failed")
    assert "Error" in failed.error


def test_a_full_queue_refuses_at_once_and_a_cancelled_request_frees_its_place(subject):
    with load.Server(subject, queue=2) as small:
        first = small.ask("a red ball", 0, 40)
        while first.state == "waiting":
            time.sleep(0.005)
        waiting = [small.ask("a red ball", n, 1) for n in (1, 2)]
        started = time.perf_counter()
        with pytest.raises(load.QueueFull, match="^All 2 places of the queue are taken: ask again later"):
            small.ask("a red ball", 3, 1)
        assert time.perf_counter() - started < 0.1
        assert small.cancel(waiting[0]) and not small.cancel(waiting[0]) and not small.cancel(first)
        third = small.ask("a red ball", 4, 1)
        assert [r.wait(60).state for r in (first, waiting[1], third)] == ["done", "done", "done"]
        refused = load.open_loop(small, rate=1000, total=12, steps=10)
        states = {r.state for r in refused}
        assert states == {"done", "refused"} and len(refused) == 12
    with pytest.raises(UserError, match="^The server is closed"):
        small.ask("a red ball", 0, 1)


def test_a_process_that_dies_takes_only_its_own_request_along(subject):
    with load.Server(subject) as fragile:
        doomed, next_one = fragile.ask("a red ball", 0, 100), fragile.ask("a red ball", 1, 1)
        while doomed.state == "waiting":
            time.sleep(0.005)
        fragile._workers[0].process.kill()
        assert doomed.wait(60).state == "failed" and "ended (-9); another one is in its place" in doomed.error
        assert next_one.wait(60).state == "done"


def test_closing_cancels_what_waits_and_ends_the_process(subject):
    with load.Server(subject) as brief:
        running, waiting = brief.ask("a red ball", 0, 8), brief.ask("a red ball", 1, 1)
        while running.state == "waiting":
            time.sleep(0.005)
        process = brief._workers[0].process
    assert (running.state, waiting.state) == ("done", "cancelled") and not process.is_alive()


@pytest.mark.parametrize("given", hostile.WRONG_REQUESTS)
def test_a_malformed_request_is_refused_in_a_sentence(given):
    server = load.Server(hostile.Misbehaving())  # not open: nothing of it reaches a process
    with pytest.raises(UserError, match="give (a|seconds)"):
        server.ask(*given)
    assert not server._waiting


def attacked(total, queue=64):
    """Requests of 8 users to two workers: 5 % cancelled, 2 % failing, 1 % malformed, kills, one worker stopped."""
    numbers, made, refused, lock = iter(range(total)), [], [], threading.Lock()
    with load.Server(hostile.Misbehaving(), workers=2, queue=queue, batch=3) as server:

        def user():
            while True:
                with lock:
                    n = next(numbers, None)
                if n is None:
                    return
                if n % 100 == 99:
                    server._workers[n // 100 % 2].process.kill()
                if n == total // 2:
                    os.kill(server._workers[0].process.pid, signal.SIGSTOP)
                if n % 100 == 50:
                    with pytest.raises(UserError):
                        server.ask(*hostile.WRONG_REQUESTS[n // 100 % len(hostile.WRONG_REQUESTS)])
                    refused.append(n)
                    continue
                request = server.ask("raise" if n % 50 == 1 else "a red ball", n, 1, images=1 + n % 2)
                made.append((n, n % 20 == 7 and server.cancel(request), request.wait(90)))

        users = [threading.Thread(target=user) for _ in range(8)]
        for thread in users:
            thread.start()
        for thread in users:
            thread.join()
        last = [server.ask("a red ball", n, 1) for n in range(4)]  # some run and some wait when it is closed
        begun = time.monotonic()
    return made, refused, last, time.monotonic() - begun


def check_attacked(total):
    made, refused, last, closing = attacked(total)
    assert sorted([n for n, *_ in made] + refused) == list(range(total))
    states = collections.Counter(request.state for *_, request in made)
    assert set(states) <= {"done", "failed", "cancelled"} and all(request.over.is_set() for request in last)
    for n, taken_back, request in made:
        if taken_back:
            assert request.state == "cancelled"
        elif n % 50 == 1:
            assert request.state == "failed"
        elif request.state == "failed":  # alone in a process that was killed or stopped under it
            assert "another one is in its place" in request.error
        else:
            assert request.state == "done" and len(request.result) == request.images
    assert states["failed"] <= total // 50 + 6 * (total // 100 + 1)
    assert closing < load.CLOSE_S
    return states, closing


def test_none_of_a_hundred_requests_is_lost_while_workers_are_killed_and_stopped():
    check_attacked(120)


@pytest.mark.soak
def test_none_of_a_thousand_requests_is_lost_while_workers_are_killed_and_stopped():
    print(*check_attacked(1000))


@pytest.mark.parametrize("wrong", ["hang", "stop"])
def test_a_server_is_closed_within_ten_seconds_whatever_its_worker_does(wrong):
    with load.Server(hostile.Misbehaving(), limit_s=60) as server:
        answers = {name: server.ask(name, 0, 1).wait(60) for name in ("raise", "unwritable", "too few", "a red ball")}
        stuck, waiting = server.ask(wrong, 0, 1), server.ask("a red ball", 0, 1)
        while stuck.state == "waiting":
            time.sleep(0.01)
        begun = time.monotonic()
    assert time.monotonic() - begun < load.CLOSE_S and stuck.state in ("failed", "cancelled")
    assert waiting.state == "cancelled" and not server._workers[0].process.is_alive()
    assert [answers[name].state for name in answers] == ["failed", "failed", "failed", "done"]
    assert "something else than 1 images" in answers["too few"].error


def test_a_worker_that_says_nothing_for_too_long_is_replaced():
    with load.Server(hostile.Misbehaving(), limit_s=1) as server:
        hanging, after = server.ask("hang", 0, 1).wait(60), server.ask("a red ball", 0, 1).wait(60)
        assert hanging.state == "failed" and "said nothing for 1 s, and was ended" in hanging.error
        assert after.state == "done"


def test_users_wait_for_each_other_and_not_for_the_clock(server):
    requests = load.closed_loop(server, users=4, total=12, steps=2)
    found = load.figures(requests)
    assert len(requests) == found["n"] == 12 and found["latency_p99"] is None
    assert found["images_per_s"] > 0 and found["proof"]["queued_s"] > 0
    alone = load.figures(load.closed_loop(server, users=1, total=6, steps=2))
    assert alone["proof"]["queued_s"] < found["proof"]["queued_s"]
    assert alone["latency_p50"] == pytest.approx(alone["proof"]["service_s"], rel=0.5)


def test_arrivals_at_random_are_counted_from_when_they_were_due(server):
    requests = load.open_loop(server, rate=50, total=10, steps=2, seed=1)
    gaps = [b.asked - a.asked for a, b in zip(requests, requests[1:], strict=False)]
    assert all(gap > 0 for gap in gaps) and max(gaps) > 3 * min(gaps)
    assert {r.state for r in requests} == {"done"}


def test_nothing_done_has_no_figures():
    refused = load.Request("a", 0, 1)
    refused._end("refused", error="full")
    with pytest.raises(UserError, match="^None of 1 requests was done: full"):
        load.figures([refused])


SHARES = [(1, 3, [3]), (1, 5, [4, 1]), (2, 5, [3, 1, 1]), (4, 3, [1] * 3)]


@pytest.mark.parametrize(("workers", "waiting", "taken"), SHARES)
def test_a_process_takes_no_more_than_its_share_of_what_waits(subject, workers, waiting, taken):
    server = load.Server(subject, workers, batch=4)  # not started: nothing is served
    for n in range(waiting):
        server.ask("a red ball", n, 1)
    assert [len(server._next()) for _ in taken] == taken and not server._waiting


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"queue": 0}, {"batch": 0}])
def test_a_server_of_nothing(subject, wrong):
    with pytest.raises(UserError, match="each has to be 1 or more"):
        load.Server(subject, **wrong)


def test_a_server_that_cannot_start_says_why(subject):
    broken = dataclasses.replace(subject, dtype="float7")
    with (
        pytest.raises(UserError, match="^Worker 0 could not start: float7 is not a number format here"),
        load.Server(broken),
    ):
        pass


def test_a_load_is_a_row_that_is_found_again(tmp_path, subject, nvml):
    s = study.Study(params.load("cpu"), notebooks.LOAD, tmp_path)
    loads = [study.Load(1, 1, 4), study.Load(2, 1, 6), study.Load(1, 1, 4, arrivals=0.5)]
    alone, two, arriving = rows = s.serve(subject, loads, 1)
    assert [(r.technique, r.users, r.n, r.images_each) for r in rows] == [
        ("users", 1, 4, 1),
        ("users", 2, 6, 1),
        ("arrivals", 1, 4, 1),
    ]
    assert {(r.family, r.images, r.speedup) for r in rows} == {(families.SERVING.name, None, None)}
    assert len({r.session for r in rows}) == 1 and [r.mark for r in rows] == ["1", "2", "50%"]
    assert two.shown("queued_s") > alone.shown("queued_s") and arriving.setting("arrivals") == 0.5
    assert alone.gpu_util_avg == 60 and alone.telemetry["power_peak_w"] == 650.5
    assert (
        alone.label == "1 user, 1 image each"
        and arriving.label == "arrivals at 50% of what the process makes, 1 image each"
    )
    again = study.Study(params.load("cpu"), notebooks.LOAD, tmp_path)
    assert again.serve(subject, loads, 1) == rows
    (fewer,) = again.serve(subject, [study.Load(1, 1, 3)], 1)
    (more,) = again.serve(subject, [study.Load(1, 1, 5)], 1)
    assert fewer.n == 4 and more.n == 5 and more.shown("requests") == 5
    together = study.Load(2, 1, 4).row(again.key(subject, study.Candidate(1, gpus=2)), 4)
    assert together[1]["label"] == "2 users, 1 image each, up to 4 made together"
    assert together[0]["settings"]["batching"] == 4 and together[0]["settings"]["taken"] == "in shares"


@pytest.mark.thorough
def test_arrivals_are_a_share_of_what_all_processes_make(tmp_path, subject, monkeypatch):
    one = params.load("cpu")
    both = dataclasses.replace(one, gpu=dataclasses.replace(one.gpu, count=2))
    s, rates = study.Study(both, notebooks.LOAD, tmp_path), []
    arrive = load.open_loop
    monkeypatch.setattr(load, "open_loop", lambda server, rate, *more: rates.append(rate) or arrive(server, 9, *more))
    user, arriving = s.serve(subject, [study.Load(1, 2, 2), study.Load(1, 2, 2, arrivals=0.5)], 1)
    assert rates == [pytest.approx(0.5 * 2 * user.images_per_s / 2)]
    assert arriving.setting("arrivals_of") == "all processes"
    assert arriving.label == "arrivals at 50% of what all 2 processes make, 2 images each"


def test_a_caption_says_which_percentiles_so_few_requests_have():
    rows = [study.Row(status="ok", n=n) for n in (100, 12, 8)] + [study.Row(status="oom")]
    said = findings.percentiles_words
    needs = "Percentiles need 10 requests, the 99th 100"
    assert said(rows[:1]) == needs
    assert said(rows) == f"{needs}: 2 of these loads had time for 8 to 12, and have no p99"
    assert said(rows[1:2]) == f"{needs}: these loads had time for 12, and have no p99"
