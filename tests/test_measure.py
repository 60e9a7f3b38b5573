import math
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from fluxnb.measure import latency


class Clock:
    """A clock that moves only when told to; calls of `synchronize` are counted."""

    def __init__(self):
        self.now = 100.0
        self.synchronized = 0

    def __call__(self):
        return self.now

    def synchronize(self):
        self.synchronized += 1

    def work(self, seconds):
        def run(*args, **kwargs):
            self.now += seconds
            return seconds

        return run

    def works(self, seconds):
        """A run that takes the next of `seconds` at each call."""
        left = iter(seconds)

        def run():
            self.now += next(left)

        return run


def test_interleave_draws_the_order_of_every_round():
    order = []
    clock = Clock()
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    latency.interleave(runs, 60, clock.synchronize, clock)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 180, 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) == 6 and max(map(rounds.count, rounds)) < 25  # every order, none of them nearly always
    first = sum(one.index("a") < one.index("b") for one in rounds)
    assert 15 < first < 45  # neither is always the one that finds the machine warm
    again: list[str] = []
    latency.interleave({n: (lambda n=n: again.append(n)) for n in "abc"}, 60, clock.synchronize, clock)
    assert again == order  # ranks that wait for each other draw the same


def test_interleave_gives_each_run_its_own_times_in_the_order_of_the_rounds():
    clock = Clock()
    runs = {"slow": clock.works([3, 4]), "fast": clock.works([1, 2])}
    seen = []

    def progress(name, i):
        clock.now += 1000  # what happens between two runs must not count
        seen.append((name, i))

    assert latency.interleave(runs, 2, clock.synchronize, clock, progress) == {"slow": [3, 4], "fast": [1, 2]}
    assert sorted(seen[:2]) == [("fast", 0), ("slow", 0)] and sorted(seen[2:]) == [("fast", 1), ("slow", 1)]
    assert clock.synchronized == 8  # before and after each run


def test_what_a_run_is_made_inside_takes_no_time_of_it():
    clock = Clock()

    @contextmanager
    def ready():
        clock.now += 1000
        yield
        clock.now += 1000

    runs = {"plain": clock.works([1, 1]), "switched on": clock.works([2, 2])}
    taken = latency.interleave(runs, 2, clock.synchronize, clock, around={"switched on": ready})
    assert taken == {"plain": [1, 1], "switched on": [2, 2]}


def test_a_time_ends_when_the_device_is_done():
    clock = Clock()
    pending = []

    def synchronize():
        clock.now += sum(pending)
        pending.clear()

    pending.append(50)  # left over from before: not part of this run
    assert latency.timed(lambda: pending.append(7), synchronize, clock) == 7


def test_interleave_passes_on_what_a_run_raises():
    def run():
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        latency.interleave({"a": run}, 1)
    with pytest.raises(ValueError, match="rounds"):
        latency.interleave({}, 0)


@pytest.mark.parametrize(
    "seconds, kwargs, count, stable",
    [
        ([5, 1, 1.01], {}, 3, True),
        ([1, 1, 1], {}, 3, True),  # two alike are not enough, three is the least
        ([5, 2, 1, 1.1, 1.11], {}, 5, True),
        ([5, 1, 1.021, 1.0, 1.019], {}, 5, True),
        ([8, 7, 6, 5, 4, 3, 2, 1], {}, 8, False),
        ([5, 3, 2], {"limit": 3}, 3, False),
        ([5, 3, 2.9], {"tolerance": 0.05}, 3, True),
        ([1], {"limit": 1}, 1, False),
        ([1, 1], {"least": 1}, 2, True),
        ([35, 4, 4], {"enough_s": 20, "least": 2}, 3, True),  # the first compiled, and warms nothing else
        ([35, 4], {"enough_s": 20, "limit": 2}, 2, False),
        ([42, 41.9, 42], {"enough_s": 20}, 2, True),  # an image of over 20 s: two are enough
        ([42, 30, 30], {"enough_s": 20}, 2, False),  # and say whether they were alike
        ([42, 42], {"enough_s": 20, "limit": 1}, 1, False),
    ],
)
def test_warm_up_ends_when_two_calls_in_a_row_agree(seconds, kwargs, count, stable):
    clock = Clock()
    done = latency.warm_up(clock.works(seconds), clock.synchronize, clock=clock, **kwargs)
    assert (done.count, done.stable) == (count, stable)
    assert done.first_s == pytest.approx(seconds[0])
    assert done.total_s == pytest.approx(sum(seconds[:count]))


def test_a_kernel_s_name_has_no_hash_in_it():
    assert latency._short_kernel("## Call CompiledFxGraph f74ebnu7fz6sleajuds6 ##") == "a compiled graph"
    assert latency._short_kernel("void at::native::gelu<float>(int)") == "at::native::gelu"


def test_warm_up_needs_one_call():
    with pytest.raises(ValueError, match="limit"):
        latency.warm_up(lambda: None, limit=0)


class Pipe:
    """A pipeline whose stages take known times on a fake clock."""

    class Vae:
        def __init__(self, clock):
            self.clock = clock

        def encode(self, image):
            self.clock.now += 3
            return "latents of the image"

        def decode(self, latents, return_dict=True):
            self.clock.now += 5
            return "image" if not return_dict else {"sample": "image"}

    def __init__(self, clock):
        self.clock, self.vae = clock, Pipe.Vae(clock)

    def encode_prompt(self, prompt):
        self.clock.now += 2
        return f"embedding of {prompt}"

    def __call__(self, decode=True, encodings=1, fail=None, first=False, image=False):
        self.clock.now += 0.25  # checks of the inputs
        if first:
            self.vae.encode("image")
        for _ in range(encodings):
            assert self.encode_prompt("cat") == "embedding of cat"
        if image:
            self.vae.encode("image")
        if fail == "denoise":
            raise RuntimeError("a broken step")
        self.clock.now += 10
        image = self.vae.decode("latents", return_dict=False) if decode else "latents"
        self.clock.now += 0.5  # to PIL
        return image


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pipe(clock):
    return Pipe(clock)


def test_stages_splits_one_call(clock, pipe):
    with latency.stages(pipe, clock.synchronize, clock) as times:
        assert pipe() == "image"
    assert times == latency.Stages(text_s=2, denoise_s=10, vae_s=5, total_s=17.75)
    assert clock.synchronized == 6  # the borders: two of each stage, and of the block


def test_stages_adds_up_two_encodings_of_guidance(clock, pipe):
    with latency.stages(pipe, clock.synchronize, clock) as times:
        pipe(encodings=2)
    assert (times.text_s, times.denoise_s, times.vae_s) == (4, 10, 5)


@pytest.mark.parametrize("first", [False, True])
def test_stages_count_the_encoding_of_an_image_to_the_vae(clock, pipe, first):
    with latency.stages(pipe, clock.synchronize, clock) as times:
        pipe(first=first, image=not first)
    assert (times.text_s, times.denoise_s, times.vae_s) == (2, 10, 8)
    assert "encode" not in vars(pipe.vae)


def test_stages_without_decoding_or_encoding(clock, pipe):
    with latency.stages(pipe, clock.synchronize, clock) as times:
        pipe(decode=False)
    assert times.vae_s is None and times.denoise_s == 10.5
    with latency.stages(pipe, clock.synchronize, clock) as times:
        pipe(encodings=0)
    assert times.text_s is None and times.denoise_s == 10.25


def test_stages_restores_the_pipe(clock, pipe):
    with latency.stages(pipe, clock.synchronize, clock):
        assert "encode_prompt" in vars(pipe) and "decode" in vars(pipe.vae)
        pipe()
    assert "encode_prompt" not in vars(pipe) and "decode" not in vars(pipe.vae)


def test_stages_restores_the_pipe_after_an_error(clock, pipe):
    mine = pipe.encode_prompt = lambda prompt: f"embedding of {prompt}"  # a technique's own hook stays
    with pytest.raises(RuntimeError, match="a broken step"):
        with latency.stages(pipe, clock.synchronize, clock) as times:
            pipe(fail="denoise")
    assert pipe.encode_prompt is mine and "decode" not in vars(pipe.vae)
    assert times == latency.Stages()  # half a measurement is none


def test_stages_refuses_a_second_call(clock, pipe):
    with pytest.raises(RuntimeError, match="one pipeline call"):
        with latency.stages(pipe, clock.synchronize, clock):
            pipe()
            pipe()
    assert "encode_prompt" not in vars(pipe)


def test_stages_restores_a_torch_module():
    torch = pytest.importorskip("torch")

    class Vae(torch.nn.Module):
        def encode(self, image):
            return image

        def decode(self, latents):
            return latents

    class TorchPipe:
        vae = Vae()

        def encode_prompt(self):
            pass

    pipe = TorchPipe()
    with latency.stages(pipe) as times:
        pipe.encode_prompt()
        pipe.vae.decode(1)
    assert "decode" not in vars(pipe.vae) and pipe.vae.decode(2) == 2
    assert times.total_s >= times.vae_s >= 0 and times.denoise_s >= 0


def test_memory_on_a_cpu_sees_what_is_held():
    with latency.memory("cpu") as use:
        held = bytearray(b"x") * (128 * 2**20)
    assert use.device == "cpu" and use.reserved_gib is None
    assert 0.11 <= use.peak_gib <= 0.5
    assert 0 <= use.average_gib <= use.peak_gib
    del held


def test_memory_is_filled_in_after_an_error():
    with pytest.raises(MemoryError):
        with latency.memory("cpu") as use:
            raise MemoryError
    assert use.peak_gib is not None and use.average_gib is not None


# --- patience -----------------------------------------------------------------------------------------------


def stubborn():
    """Takes for ever, and catches what it can, as compilers do."""
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def test_what_takes_too_long_is_given_up():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(latency.TooLate, match="^not done after 0.2 s"), latency.limited(0.2):
        stubborn()
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(ZeroDivisionError), latency.limited(60):
        raise ZeroDivisionError
    with latency.limited(math.inf):
        assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_only_the_first_call_of_a_warm_up_has_to_be_there_in_time():
    with pytest.raises(latency.TooLate):
        latency.warm_up(stubborn, patience_s=0.2)
    waits = iter([0.0, 0.4, 0.0])
    warm = latency.warm_up(lambda: time.sleep(next(waits)), limit=3, patience_s=0.2)
    assert warm.count == 3


def test_the_steps_of_one_image(clock, monkeypatch):
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    step = lambda: "latents"  # noqa: E731
    pipe = SimpleNamespace(transformer=SimpleNamespace(device="cpu"), scheduler=SimpleNamespace(step=step))

    def run():
        for seconds in (9, 2, 0.5):
            clock.now += seconds
            assert pipe.scheduler.step() == "latents"

    times = latency.step_times(pipe, run)  # the first has in it what comes before the steps
    assert times == [latency.StepTime(2000, 2000), latency.StepTime(500, 500)]
    assert pipe.scheduler.step is step
