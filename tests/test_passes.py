"""A new image, its passes and its threads are told apart, whatever calls the transformer."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from fluxnb.cache import (
    Aligned,
    Both,
    Cache,
    Cascade,
    DiCache,
    Either,
    FirstBlock,
    FreqCa,
    Hold,
    Interval,
    MagCache,
    Schedule,
    SeaCache,
    Spectrum,
    Taylor,
    TeaCache,
    first_block,
)
from fluxnb.cache.para_attn import ParaAttention
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques.hook_search import NoHookSearch
from fluxnb.techniques.modulation import ModulationAhead
from fluxnb.techniques.schedulers import DPMSolver

TEA = (0.5, 1.5, 0.02)
STEPS = 7
SIDE = 64


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with a tiny transformer of random weights and without text encoders."""
    parts = pipelines.load("embedded", device="cpu").components
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    texts = {name: None for name in parts if name.startswith(("text_encoder", "tokenizer"))}
    made = FluxPipeline(**parts | texts | {"transformer": transformer})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def words():
    """Embeddings of three prompts, (text, pooled) each: given, they are the same objects in every image."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 8, 24, generator=generator), torch.randn(1, 12, generator=generator)) for _ in range(3)]


def image(pipe, words, steps=STEPS, seed=0, side=SIDE, **more):
    text, pooled = words
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "width": side, "height": side}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**given, num_inference_steps=steps, generator=generator, output_type="latent", **more).images


def stopped(pipe, words, after=3, **more):
    """An image that is interrupted as diffusers does it."""

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step + 1 == after
        return kwargs

    image(pipe, words, callback_on_step_end=stop, **more)


def gates():
    return [
        Interval(3, compute_last=True),
        Interval(2, first_block=True, warm_up=1),
        FirstBlock(0.5),
        TeaCache(0.6, TEA),
        MagCache(0.3),
        Schedule("1010010"),
        Cascade(TeaCache(0.3, TEA), FirstBlock(0.4)),
        Either(TeaCache(0.3, TEA), FirstBlock(0.4)),
        Both(Interval(2), FirstBlock(0.9)),
    ]


def later():
    """Gates and predictors that came later, each once; the other predictors differ in their weights alone."""
    return [
        Cache(SeaCache(0.5)),
        Cache(DiCache(0.5), Aligned()),
        *(Cache(Interval(2), p) for p in (Spectrum(), FreqCa())),
    ]


def techniques():
    """Every gate with every predictor, and everything else that is around an image."""
    made = [Cache(gate, predictor) for gate in gates() for predictor in (Hold(), Taylor(1), Taylor(2))]
    return [*made, *later(), ParaAttention(0.5), ModulationAhead(), NoHookSearch(), DPMSolver()]


EACH = pytest.mark.parametrize("technique", techniques(), ids=lambda t: t.label)


def on(pipe, *techniques):
    try:
        return applied(pipe, *techniques)
    except Unavailable as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def scheduler_of(pipe, scheduler):
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def near(one, other):
    """The same but for rounding: modulations of more steps at once are."""
    return torch.allclose(one, other, atol=1e-4)


# --- properties of every technique ---


@EACH
def test_taken_off_the_image_is_the_plain_one_and_nothing_is_left(pipe, words, technique):
    plain = image(pipe, words[0])
    before = {name: set(vars(part)) for name, part in pipe.components.items() if hasattr(part, "__dict__")}
    with on(pipe, technique):
        image(pipe, words[0])
        stopped(pipe, words[1])
    assert torch.equal(image(pipe, words[0]), plain)
    assert {name: set(vars(part)) for name, part in pipe.components.items() if hasattr(part, "__dict__")} == before


@EACH
def test_an_image_is_the_same_whatever_was_made_before_it(pipe, words, technique):
    with on(pipe, technique):
        expected = image(pipe, words[0])
    other = FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    with on(pipe, technique):
        image(pipe, words[0])
        assert torch.equal(image(pipe, words[0]), expected)
        stopped(pipe, words[0])
        assert torch.equal(image(pipe, words[0]), expected)
        with scheduler_of(pipe, type(pipe.scheduler).from_config(pipe.scheduler.config)):
            assert torch.equal(image(pipe, words[0]), expected)
            stopped(pipe, words[0], after=1)
            assert torch.equal(image(pipe, words[0]), expected)
        if not isinstance(technique, DPMSolver):  # whose solver is the first pipeline's
            for _ in range(2):
                stopped(other, words[0], after=2)
                assert torch.equal(image(other, words[0]), expected)
        with torch.inference_mode():
            assert torch.equal(image(pipe, words[0]), expected)
        assert torch.equal(image(pipe, words[0]), expected)


@EACH
def test_two_threads_make_the_images_that_one_makes(pipe, words, technique):
    others = [FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}) for _ in range(2)]
    plain = image(pipe, words[0])
    made, errors = {}, []

    def work(i):
        others[i].set_progress_bar_config(disable=True)
        try:
            with torch.no_grad():
                made[i] = [image(others[i], words[i], seed=seed) for seed in range(2)]
        except Exception as error:  # noqa: BLE001  a thread has no one else to tell
            errors.append(error)

    with on(others[0], technique):
        if isinstance(technique, DPMSolver):
            others[1].scheduler = copy.deepcopy(others[0].scheduler)
        expected = [[image(others[i], words[i], seed=seed) for seed in range(2)] for i in range(2)]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(torch.equal(a, b) for i in range(2) for a, b in zip(made[i], expected[i], strict=True))
    assert torch.equal(image(pipe, words[0]), plain)


@EACH
def test_a_copy_runs_its_own_weights_or_is_refused(pipe, words, technique):
    with on(pipe, technique):
        expected = image(pipe, words[0])
        try:
            twin = copy.deepcopy(pipe)
        except UserError as error:
            assert "can't be copied" in str(error) and technique.label in str(error)
            with pytest.raises(UserError, match="can't be copied"):
                pickle.dumps(pipe.transformer)
        else:
            assert torch.equal(image(twin, words[0]), expected)
            with torch.no_grad():
                twin.transformer.proj_out.weight.mul_(0)
            assert not torch.equal(image(twin, words[0]), expected)
        assert torch.equal(image(pipe, words[0]), expected)


# --- A: whatever the scheduler ---


@pytest.mark.parametrize("gate", gates(), ids=lambda g: g.label)
def test_a_cache_may_be_put_on_before_another_solver(pipe, words, gate):
    with applied(pipe, DPMSolver(), cache := Cache(gate)):
        expected, mask = image(pipe, words[0]), cache.trace.mask
    with applied(pipe, cache := Cache(gate), DPMSolver()):
        for _ in range(3):
            assert torch.equal(image(pipe, words[0]), expected) and cache.trace.mask == mask


def test_what_is_kept_does_not_grow_with_the_images(pipe, words):
    cache, kept = Cache(Interval(4)), []
    new = cache._new
    cache._new = lambda image: kept.append(image) or new(image)
    with applied(pipe, cache, DPMSolver()):
        for _ in range(3):
            for one in words:
                image(pipe, one, steps=3)
    assert len(kept) == 9 and all(len(image.passes) == 1 for image in kept)


def test_another_number_of_steps_size_and_sigmas(pipe, words):
    sigmas = [1.0, 0.7, 0.4, 0.1]
    for technique in (Cache(Interval(3, compute_last=True), Taylor(2)), ModulationAhead(), first_block(1.5)):
        cases = [{"steps": 5}, {"side": 96}, {"sigmas": sigmas, "steps": 4}, {}]
        expected = []
        for case in cases:
            with applied(pipe, technique):
                expected.append(image(pipe, words[0], **case))
        with applied(pipe, technique):
            for case, wanted in zip(cases, expected, strict=True):
                stopped(pipe, words[0], after=2)
                pipe.scheduler, before = copy.deepcopy(pipe.scheduler), pipe.scheduler
                assert torch.equal(image(pipe, words[0], **case), wanted)
                pipe.scheduler = before


def test_an_image_that_fails_leaves_the_next_one_alone(pipe, words):
    def fail(pipe, step, timestep, kwargs):
        raise RuntimeError("out of paper")

    with applied(pipe, Cache(Interval(4))):
        expected = image(pipe, words[0])
        with scheduler_of(pipe, copy.deepcopy(pipe.scheduler)):
            with pytest.raises(RuntimeError, match="out of paper"):
                image(pipe, words[0], callback_on_step_end=fail)
            assert torch.equal(image(pipe, words[0]), expected)


def test_a_pipeline_of_image_to_image_that_shares_the_transformer(pipe, words):
    other = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    given = {"image": torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), "strength": 0.6}
    with applied(other, cache := Cache(Interval(4, compute_last=True))):
        expected, mask = image(other, words[0], steps=10, **given), cache.trace.mask
    with applied(pipe, cache := Cache(Interval(4, compute_last=True))):
        image(pipe, words[0])
        for _ in range(2):
            assert torch.equal(image(other, words[0], steps=10, **given), expected) and cache.trace.mask == mask
    assert mask == "100011"


def test_hooks_that_come_after_the_search_was_left_out_are_seen(pipe, words):
    def images():
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        try:
            return [image(pipe, one, side=side) for one, side in ((words[0], 64), (words[1], 64), (words[0], 96))]
        finally:
            pipe.transformer.disable_cache()

    expected = images()
    with applied(pipe, NoHookSearch()):
        assert all(map(torch.equal, images(), expected))


def test_a_cache_and_no_search_for_hooks_in_both_orders(pipe, words):
    with applied(pipe, first_block(0.5)):
        expected = image(pipe, words[0])
    for pair in ((first_block(0.5), NoHookSearch()), (NoHookSearch(), first_block(0.5))):
        with applied(pipe, *pair):
            assert all(torch.equal(image(pipe, words[0]), expected) for _ in range(2))


def test_a_solver_chosen_meanwhile_stays(pipe):
    before = pipe.scheduler
    try:
        undo = DPMSolver().apply(pipe)
        pipe.scheduler = chosen = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        undo()
        assert pipe.scheduler is chosen
    finally:
        pipe.scheduler = before


# --- called by hand ---

TIMES = [1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.1]


def call(pipe, x, time, words, guidance=3.5, **more):
    """One call, all of its tensors made anew."""
    text, pooled = (w.clone() for w in words)
    ids = torch.zeros(x.shape[1], 3)
    ids[:, 2] = torch.arange(x.shape[1])
    given = {"timestep": torch.full((len(x),), time), "guidance": torch.full((len(x),), guidance), "img_ids": ids}
    given |= {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(text.shape[1], 3)}
    return pipe.transformer(hidden_states=x, return_dict=False, **given, **more)[0]


def noise(seed=0, tokens=16):
    return torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(pipe, passes, times=TIMES, order=None, pipes=None):
    """An Euler loop of somebody's own: passes are (words, weight, more arguments)."""
    x = noise()
    for i, (time, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        indices = order[i] if order else range(len(passes))
        made = {
            j: passes[j][1] * call(pipes[j] if pipes else pipe, x, time, passes[j][0], **passes[j][2]) for j in indices
        }
        x = x + (after - time) * sum(made[j] for j in sorted(made))
    return x


@pytest.mark.parametrize(
    "technique", [*(Cache(g, Taylor(1)) for g in gates()), ParaAttention(0.5), ModulationAhead()], ids=lambda t: t.label
)
def test_a_loop_by_hand_is_as_new_every_time(pipe, words, technique):
    passes = [(words[0], 1.0, {})]
    plain = by_hand(pipe, passes)
    with on(pipe, technique):
        expected = by_hand(pipe, passes)
    with on(pipe, technique):
        image(pipe, words[0])  # the scheduler's steps are another loop's
        by_hand(pipe, [(words[0], 1.0, {})], TIMES[:3])  # interrupted
        assert torch.equal(by_hand(pipe, passes), expected)
        assert torch.equal(by_hand(pipe, passes), expected)
        pipe_made = image(pipe, words[0])
    with on(pipe, technique):
        assert torch.equal(image(pipe, words[0]), pipe_made)
    assert torch.equal(by_hand(pipe, passes), plain)


def test_the_steps_of_a_loop_by_hand_are_those_of_a_fresh_scheduler(pipe, words):
    passes = [(words[0], 1.0, {})]
    with applied(pipe, cache := Cache(Interval(4, compute_last=True))):
        image(pipe, words[0], steps=3)
        for _ in range(2):
            pipe.scheduler.set_timesteps(sigmas=TIMES, mu=0.0)
            by_hand(pipe, passes, (pipe.scheduler.timesteps / 1000).tolist())
            assert cache.trace.mask == "1000101"
        by_hand(pipe, passes, [1.0, 0.5])  # how many steps there are isn't known, and nothing is made up
        assert cache.trace.mask == "10"


@torch.no_grad()
def test_the_same_call_again_is_computed(pipe, words):
    """Images of one step, one after the other; and two passes that only their image tokens tell apart."""
    xs = [noise(seed) for seed in range(5)]
    exact = [call(pipe, x, 1.0, words[0]) for x in xs]
    with applied(pipe, Cache(Interval(4))):
        assert all(torch.equal(call(pipe, x, 1.0, words[0]), one) for x, one in zip(xs, exact, strict=True))
    calls = [(x, time) for time in TIMES for x in xs[:2]]
    exact = [call(pipe, x, time, words[0]) for x, time in calls]
    with applied(pipe, Cache(Interval(4))):
        made = [call(pipe, x, time, words[0]) for x, time in calls]
    assert all(map(torch.equal, made, exact))


def test_a_schedule_that_is_too_short_says_so(pipe, words):
    never_set = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with scheduler_of(pipe, never_set), applied(pipe, Cache(Schedule("1010"))):
        with pytest.raises(UserError, match="4 steps .* has 5"):
            by_hand(pipe, [(words[0], 1.0, {})])


# --- B: the passes of a step ---


def zero(words):
    return words[0], torch.zeros_like(words[1])


@pytest.mark.parametrize("kind", [FluxPipeline, FluxImg2ImgPipeline])
@pytest.mark.parametrize(
    "technique", [Cache(Interval(3)), Cache(FirstBlock(0.4), Taylor(1)), ParaAttention(0.4), ModulationAhead()],
    ids=lambda t: t.label,
)  # fmt: skip
def test_one_pooled_tensor_for_both_prompts(pipe, words, kind, technique):
    other = kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    pooled = torch.zeros_like(words[0][1])
    given = {"negative_prompt_embeds": words[1][0], "true_cfg_scale": 3.0}
    if kind is FluxImg2ImgPipeline:
        given |= {"image": torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), "strength": 0.8}

    def run(mine, negative):
        return image(other, (words[0][0], mine), negative_pooled_prompt_embeds=negative, **given)

    with on(other, technique):
        apart = run(pooled, pooled.clone())
    with on(other, technique):
        assert torch.equal(run(pooled, pooled), apart)


PASSES = {
    "two prompts": lambda w: [(w[0], 2.0, {}), (w[1], -1.0, {})],
    "one pooled tensor": lambda w: [(zero(w[0]), 2.0, {}), (zero(w[1]), -1.0, {})],
    "one text": lambda w: [(w[0], 2.0, {}), ((w[0][0], w[1][1]), -1.0, {})],
    "another guidance": lambda w: [(w[0], 2.0, {}), (w[0], -1.0, {"guidance": 1.0})],
    "three prompts": lambda w: [(w[0], 1.5, {}), (w[1], 0.5, {}), (w[2], -1.0, {})],
    "the same twice": lambda w: [(w[0], 2.0, {}), (w[0], -1.0, {})],
}


@pytest.mark.parametrize("make", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("gate", [Interval(3), FirstBlock(0.4)], ids=lambda g: g.label)
def test_passes_of_a_step_in_any_order(pipe, words, make, gate):
    passes, plain = make(words), by_hand(pipe, make(words))
    turned = [list(range(len(passes)))[:: 1 if i % 2 else -1] for i in range(len(TIMES))]
    with contextlib.ExitStack() as stack:
        pipes = [copy.copy(pipe) for _ in passes]  # each pass on a transformer of its own: nothing can be mistaken
        for one in pipes:
            one.transformer = copy.deepcopy(pipe.transformer)
            stack.enter_context(applied(one, Cache(copy.deepcopy(gate))))
        alone = by_hand(pipe, passes, pipes=pipes)
    with applied(pipe, Cache(gate)):
        for order in (None, turned):
            made = by_hand(pipe, passes, order=order)
            assert torch.equal(made, plain if make is PASSES["the same twice"] else alone)
    assert not torch.equal(alone, plain)


@torch.no_grad()
def mirrored(pipe, words, times=TIMES):
    """Two passes that only their image tokens tell apart, in another order at every other step."""
    x = noise()
    for i, (time, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        made = {sign: call(pipe, sign * x, time, words) for sign in ((1, -1) if i % 2 else (-1, 1))}
        x = x + (after - time) * (2 * made[1] - made[-1])
    return x


@pytest.mark.parametrize("technique", [Cache(Interval(3)), ParaAttention(0.5)], ids=lambda t: t.label)
def test_passes_that_nothing_tells_apart_are_computed(pipe, words, technique):
    class Mirrored(Loop):
        def __call__(self):
            return mirrored(self.pipe, words[0], (self.scheduler.timesteps / 1000).tolist())

    for run in (lambda: mirrored(pipe, words[0]), Mirrored(pipe)):
        plain = run()
        with on(pipe, technique):
            assert torch.equal(run(), plain) and torch.equal(run(), plain)


def test_a_controlnet_of_single_blocks_in_one_pass_only(pipe, words):
    residuals = [torch.full((1, 16, 32), 0.1)]
    passes = [(words[0], 2.0, {"controlnet_single_block_samples": residuals}), (words[0], -1.0, {})]
    with applied(pipe, cache := Cache(Interval(3))):
        by_hand(pipe, passes, order=[[0, 1], [1, 0]] * 3 + [[0, 1]])
    assert cache.trace.mask == "1001001"


def test_para_attn_with_a_controlnet_is_a_sentence(pipe, words):
    from test_cache import controlnet_pipe

    with pytest.raises(Unavailable, match="^needs a pipeline without ControlNet"):
        ParaAttention(0.1).apply(controlnet_pipe(pipe))
    given = {"controlnet_block_samples": [torch.zeros(1, 16, 32)]}
    with on(pipe, ParaAttention(0.1)), pytest.raises(UserError, match="ControlNet's residuals elsewhere"):
        by_hand(pipe, [(words[0], 1.0, given)])


@pytest.mark.parametrize("technique", [Cache(Interval(3)), ModulationAhead()], ids=lambda t: t.label)
def test_several_images_of_one_prompt_s_embeddings(pipe, words, technique):
    plain = image(pipe, words[0], num_images_per_prompt=2)
    with applied(pipe, Cache(Interval(1)) if isinstance(technique, Cache) else technique):
        assert near(image(pipe, words[0], num_images_per_prompt=2), plain)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_another_solver_in_pipelines_that_begin_with_an_image(pipe, words, strength):
    other = FluxImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    given = {"image": torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), "strength": strength}
    exact, rough = (image(other, words[0], steps=steps, **given) for steps in (60, 12))
    with applied(other, DPMSolver()):
        solved = image(other, words[0], steps=12, **given)
        twin = copy.deepcopy(other)
        assert torch.equal(image(twin, words[0], steps=12, **given), solved)
        with pytest.raises(UserError, match="sigmas of its own"):
            image(other, words[0], steps=3, sigmas=[1.0, 0.9, 0.1], **given)
    assert 0 < (solved - exact).norm() < (rough - exact).norm()


def test_a_pass_that_begins_later_and_one_that_pauses(pipe, words):
    both = [(words[0], 2.0, {}), (words[1], -1.0, {})]
    order = [[0], [0], [0, 1], [0], [0, 1], [0, 1], [0, 1]]
    with applied(pipe, cache := Cache(Interval(3))):
        by_hand(pipe, both, order=order)
        assert [step.index for step in cache.trace.steps] == list(range(7)) and cache.trace.mask == "1001001"


@torch.no_grad()
def test_one_buffer_for_both_prompts(pipe, words):
    """A loop that fills the same tensors for each pass, with grad mode's counters and without."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), applied(pipe, Cache(Interval(3))):
            expected = by_hand(pipe, [(words[0], 2.0, {}), (words[1], -1.0, {})])
            text, pooled = (w.clone() for w in words[0])
            ids = torch.zeros(16, 3)
            ids[:, 2] = torch.arange(16)
            x, guidance = noise(), torch.tensor([3.5])
            for time, after in zip(TIMES, [*TIMES[1:], 0.0], strict=True):
                made = []
                for i in (0, 1):
                    text.copy_(words[i][0])
                    pooled.copy_(words[i][1])
                    made.append(
                        pipe.transformer(
                            x, text, pooled, torch.tensor([time]), ids, torch.zeros(text.shape[1], 3), guidance
                        ).sample
                    )
                x = x + (after - time) * (2.0 * made[0] + -1.0 * made[1])
            assert torch.allclose(x, expected, atol=1e-5)


def test_both_prompts_in_one_batch_and_then_one_after_the_other(pipe, words):
    both = tuple(torch.cat(pair) for pair in zip(words[0], words[1], strict=True))

    @torch.no_grad()
    def run():
        x = noise()
        for i, (time, after) in enumerate(zip(TIMES, [*TIMES[1:], 0.0], strict=True)):
            if i < 4:
                one, other = call(pipe, torch.cat([x, x]), time, both).chunk(2)
            else:
                one, other = call(pipe, x, time, words[0]), call(pipe, x, time, words[1])
            x = x + (after - time) * (2 * one - other)
        return x

    plain = run()
    with applied(pipe, cache := Cache(Interval(2))):
        first = run()
        assert torch.equal(run(), first) and not torch.equal(first, plain)
    with applied(pipe, Cache(FirstBlock(0))):
        assert torch.equal(run(), plain)
    assert cache.trace.mask == "1010101"


def test_equal_prompts_in_a_pipeline_that_does_not_name_its_passes(pipe, words):
    other = FluxImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    given = {"image": torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), "strength": 0.8}
    with applied(other, cache := Cache(Interval(3))):
        single, mask = image(other, words[0], **given), cache.trace.mask
        text, pooled = (w.clone() for w in words[0])
        negative = {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled, "true_cfg_scale": 2.0}
        assert near(image(other, words[0], **given, **negative), single) and cache.trace.mask == mask


def test_no_call_of_a_pipeline_reads_from_the_device(pipe, words, monkeypatch):
    """What the passes are known by is read where a transformer is called by hand only."""
    from fluxnb.cache import passes

    negative = {"negative_prompt_embeds": words[1][0], "negative_pooled_prompt_embeds": words[1][1]}
    with applied(pipe, Cache(Interval(3))):
        image(pipe, words[0])
        monkeypatch.setattr(passes, "_value", lambda timestep: pytest.fail("a timestep was read"))
        monkeypatch.setattr(torch, "equal", lambda one, other: pytest.fail("two tensors were compared"))
        image(pipe, words[0], **negative, true_cfg_scale=2.0)


def test_a_controlnet_pipeline_makes_its_guidance_anew_and_nothing_is_read(pipe, words, monkeypatch):
    from test_cache import controlnet_pipe

    from fluxnb.cache import passes

    made = controlnet_pipe(pipe)
    control = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with applied(made, cache := Cache(Interval(3), hold_controlnet=True)):
        monkeypatch.setattr(passes, "_value", lambda timestep: pytest.fail("a timestep was read"))
        monkeypatch.setattr(torch, "equal", lambda one, other: pytest.fail("two tensors were compared"))
        image(made, words[0], control_image=control)
    assert cache.trace.mask == "1001001"


def test_several_controlnets_are_held_as_one_is(pipe, words):
    from diffusers import FluxControlNetPipeline
    from diffusers.models import FluxMultiControlNetModel
    from test_cache import controlnet_pipe

    single = controlnet_pipe(pipe)
    several = FluxControlNetPipeline(
        **{**single.components, "controlnet": FluxMultiControlNetModel([single.controlnet, single.controlnet])}
    )
    several.set_progress_bar_config(disable=True)
    control = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    runs = []
    handle = single.controlnet.register_forward_hook(lambda *_: runs.append(1))
    given = {"control_image": [control, control], "controlnet_conditioning_scale": [0.5, 0.5]}
    plain = image(several, words[0], **given)
    assert len(runs) == 2 * STEPS
    for gate, computed in ((Interval(3), 3), (Interval(1), STEPS)):
        runs.clear()
        with applied(several, Cache(gate, hold_controlnet=True)):
            assert torch.equal(image(several, words[0], **given), plain) == (computed == STEPS)
        assert len(runs) == 2 * computed
    handle.remove()


class Loop:
    """A pipeline of somebody's own, which sets its scheduler once and never steps it."""

    def __init__(self, pipe):
        self.pipe, self.scheduler = pipe, copy.deepcopy(pipe.scheduler)
        self.scheduler.set_timesteps(sigmas=TIMES, mu=0.0)

    def __call__(self, passes, count=None):
        times = (self.scheduler.timesteps / 1000).tolist()
        return by_hand(self.pipe, passes, times[:count])


def test_a_loop_that_does_not_step_its_scheduler(pipe, words):
    loop, passes = Loop(pipe), [(words[0], 2.0, {}), (words[1], -1.0, {})]
    with applied(pipe, cache := Cache(Interval(4, compute_last=True))):
        expected, mask = loop(passes), cache.trace.mask
        assert torch.equal(loop(passes), expected)
        loop(passes, 3)
        assert torch.equal(loop(passes), expected) and mask == "1000101"
    plain = loop(passes)
    with applied(pipe, ModulationAhead()):
        assert near(loop(passes), plain)


def test_what_is_saved_meanwhile_is_the_model(pipe):
    before = pipe.transformer.state_dict()
    for technique in (ModulationAhead(), Cache(Interval(2)), NoHookSearch()):
        with applied(pipe, technique):
            saved = pipe.transformer.state_dict()
            assert list(saved) == list(before) and all(torch.equal(saved[name], before[name]) for name in before)


def test_what_was_kept_is_freed_at_once(pipe, words):
    import gc
    import weakref

    cache, kept = Cache(Interval(2)), []
    new = cache._new
    cache._new = lambda image: kept.append(weakref.ref(image)) or new(image)
    gc.disable()
    try:
        with applied(pipe, cache):
            image(pipe, words[0])
            image(pipe, words[1])
            assert [ref() is None for ref in kept] == [True, False]
        assert kept[1]() is None
    finally:
        gc.enable()
