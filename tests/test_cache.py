"""The caching engine against diffusers' own First Block Cache, and against no cache at all."""

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

from fluxnb import families
from fluxnb.cache import (
    Both,
    Cache,
    Cascade,
    Either,
    FirstBlock,
    Hold,
    Interval,
    Schedule,
    Taylor,
    TeaCache,
    first_block,
    para_attn,
    prescribed,
    teacache,
)
from fluxnb.cache.gates.teacache import PUBLISHED
from fluxnb.cache.para_attn import ParaAttention
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import ANOTHER, IDENTICAL, Unavailable, applied
from fluxnb.techniques.compilation import Regional

MODEL = pipelines.describe("embedded")


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load("embedded", device="cpu")


def latents(pipe, steps=10, prompt="a red apple on a white table", seed=3, **options):
    return pipelines.generate(pipe, [prompt], [seed], model=MODEL, steps=steps, output_type="latent", **options)


@pytest.mark.parametrize("threshold", [0.05, 0.12, 0.3, 0.8])
def test_equals_diffusers_bit_for_bit(pipe, threshold):
    with applied(pipe, cache := first_block(threshold)):
        ours = latents(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        theirs = latents(pipe)
    finally:
        pipe.transformer.disable_cache()
    assert torch.equal(ours, theirs)
    if threshold >= 0.3:  # or the comparison would be of two uncached runs
        assert cache.trace.computed < len(cache.trace.steps)


@pytest.mark.parametrize("threshold", [0, 0.05, 0.12, 0.3, 0.8])
def test_equals_para_attn_bit_for_bit(pipe, threshold):
    pytest.importorskip("para_attn")
    before = {*vars(pipe.transformer), "_diffusers_hook"}  # which diffusers leaves there, after any image
    with applied(pipe, theirs := ParaAttention(threshold)):
        expected = latents(pipe)
    with applied(pipe, ours := first_block(threshold)):
        assert torch.equal(latents(pipe), expected)
    assert theirs.trace.mask == ours.trace.mask and len(ours.trace.steps) == 10
    assert {*vars(pipe.transformer)} == before


def test_para_attn_of_another_version(monkeypatch, pipe):
    monkeypatch.setattr(para_attn.metadata, "version", lambda name: "0.4.0")
    with pytest.raises(Unavailable, match="0.3.38"):
        ParaAttention(0.1).apply(pipe)


def test_threshold_zero_is_off(pipe):
    plain = latents(pipe)
    with applied(pipe, cache := first_block(0)):
        assert torch.equal(latents(pipe), plain)
    assert cache.trace.computed == 10


def test_removal_restores_the_pipeline(pipe):
    before = {name: dict(vars(part)) for name, part in (("t", pipe.transformer), ("s", pipe.scheduler))}
    plain = latents(pipe)
    with applied(pipe, first_block(0.5)):
        cached = latents(pipe)
    assert not torch.equal(cached, plain)
    assert torch.equal(latents(pipe), plain)
    assert vars(pipe.transformer).keys() == before["t"].keys()
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_images_in_a_row_do_not_leak(pipe):
    with applied(pipe, cache := first_block(0.3)):
        first = latents(pipe, seed=1)
        latents(pipe, seed=2, steps=6)
        assert len(cache.trace.steps) == 6
        assert torch.equal(latents(pipe, seed=1), first)


def test_threshold_changes_between_images(pipe):
    with applied(pipe, cache := first_block(0)):
        assert (latents(pipe), cache.trace.computed)[1] == 10
        cache.gate.threshold = 0.8
        assert (latents(pipe), cache.trace.computed)[1] < 10
    with applied(pipe, first_block(0.8)):
        expected = latents(pipe)
    with applied(pipe, cache := first_block(0.1)):
        cache.gate.threshold = 0.8
        assert torch.equal(latents(pipe), expected)


def test_interrupted_generation_leaves_a_clean_pipeline(pipe):
    plain = latents(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 4:
            raise KeyboardInterrupt
        return kwargs

    with applied(pipe, cache := first_block(0.3)):
        expected = latents(pipe)
        with pytest.raises(KeyboardInterrupt):
            pipe(
                "a red apple",
                height=128,
                width=128,
                num_inference_steps=10,
                max_sequence_length=MODEL.tokens,
                callback_on_step_end=stop,
            )
        assert len(pipe.transformer.transformer_blocks) == 4
        assert isinstance(pipe.transformer.transformer_blocks, torch.nn.ModuleList)
        assert torch.equal(latents(pipe), expected)
        assert len(cache.trace.steps) == 10
    assert torch.equal(latents(pipe), plain)


def test_schedule_replays_a_trace(pipe):
    with applied(pipe, cache := first_block(0.3)):
        expected = latents(pipe)
    with applied(pipe, replay := prescribed(cache.trace.mask, "test")):
        assert torch.equal(latents(pipe), expected)
    assert replay.trace.mask == cache.trace.mask


def test_options_of_every_gate(pipe):
    options = {"warm_up": 4, "compute_last": True, "longest_run": 1}
    with applied(pipe, cache := Cache(FirstBlock(50.0, **options))):
        latents(pipe)
    assert cache.trace.mask == "1111010101"  # one hit at most, then a computed step; the last is computed


def test_batch_has_one_decision(pipe):
    with applied(pipe, cache := first_block(0.3)):
        pipelines.generate(pipe, ["a red ball", "a blue cup"], [1, 2], model=MODEL, steps=6, output_type="latent")
    assert len(cache.trace.steps) == 6


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_bad_thresholds(value):
    with pytest.raises(UserError, match="threshold"):
        FirstBlock(value)


@pytest.mark.parametrize("mask", ["", "0111", "1012", "abc"])
def test_bad_masks(mask):
    with pytest.raises(UserError, match="mask"):
        Schedule(mask)


def test_schedule_of_the_wrong_length(pipe):
    with applied(pipe, prescribed("1010", "test")), pytest.raises(UserError, match="4 steps .* has 10"):
        latents(pipe)


def test_two_caches(pipe):
    with applied(pipe, first_block(0.1)), pytest.raises(UserError, match="already"):
        first_block(0.2).apply(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(UserError, match="already"):
            first_block(0.2).apply(pipe)
    finally:
        pipe.transformer.disable_cache()


def test_not_flux():
    class Other:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(UserError, match="FluxTransformer2DModel.*Other has Linear"):
        first_block(0.1).apply(Other())


# --- the other gates, and how they combine -----------------------------------------------------------------

POLYNOMIAL = (0.5, 1.5, 0.02)


def published_rule(changes, threshold, coefficients):
    """TeaCache4FLUX's decisions, transcribed: True where the step is computed."""
    rescale = np.poly1d(coefficients)
    decisions, accumulated = [], 0.0
    for step in range(len(changes) + 1):
        if step in (0, len(changes)):
            decisions.append(True)
            accumulated = 0.0
            continue
        accumulated += rescale(changes[step - 1])
        if accumulated < threshold:
            decisions.append(False)
        else:
            decisions.append(True)
            accumulated = 0.0
    return decisions


@pytest.mark.parametrize("threshold", [0.4, 0.8, 1.2])
def test_teacache_decides_as_published(pipe, threshold):
    with applied(pipe, cache := Cache(TeaCache(threshold, POLYNOMIAL))):
        latents(pipe, steps=14)
    steps = cache.trace.steps
    expected = published_rule([s.indicator for s in steps[1:]], threshold, POLYNOMIAL)
    assert [not s.hit for s in steps] == expected
    assert 1 < cache.trace.computed < 14
    assert {s.reused_at for s in steps if s.hit} == {"input"}


def test_teacache_sees_the_modulated_input(pipe):
    seen = []
    norm = pipe.transformer.transformer_blocks[0].norm1
    with applied(pipe, cache := Cache(TeaCache(0, POLYNOMIAL))):
        hook = norm.register_forward_hook(lambda m, i, o: seen.append(o[0]))
        latents(pipe, steps=4)
        hook.remove()
    assert cache.trace.computed == 4
    assert len(seen) == 8  # once for the gate, once in the block itself
    assert torch.equal(seen[0], seen[1])


def test_teacache_needs_coefficients():
    for bad in ((), (1.0, float("nan"))):
        with pytest.raises(UserError, match="coefficients"):
            TeaCache(0.2, bad)
    with pytest.raises(UserError, match="no coefficients for some/model"):
        teacache.coefficients("some/model")
    assert teacache.coefficients("black-forest-labs/FLUX.1-dev") == teacache.FLUX_DEV


def test_published_polynomial_acts_like_an_interval():
    gate = TeaCache(0.4, teacache.FLUX_DEV)
    least = min(gate.rescaled(x / 1000) for x in range(1000))
    assert least == pytest.approx(0.18, abs=0.002)  # so a threshold bounds the run of reused steps


@pytest.mark.parametrize("first_block", [True, False])
def test_interval(pipe, first_block):
    with applied(pipe, cache := Cache(Interval(3, first_block=first_block))):
        latents(pipe)
    assert cache.trace.mask == "1001001001"
    assert {s.reused_at for s in cache.trace.steps if s.hit} == {"residual" if first_block else "input"}


def test_a_step_reused_at_the_input_runs_no_block(pipe):
    calls = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: calls.append(m))
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)
    ]
    blocks = len(hooks)
    for runs_first, cost in ((False, 0), (True, 1)):
        calls.clear()
        with applied(pipe, Cache(Interval(5, first_block=runs_first))):
            latents(pipe)
        assert len(calls) == 2 * blocks + 8 * cost
    for hook in hooks:
        hook.remove()


def alone(pipe, gate):
    with applied(pipe, cache := Cache(gate)):
        latents(pipe)
    return cache.trace


def schedules(rule, first, second, **points):
    return rule(Schedule(first, **points), Schedule(second, **points))


@pytest.mark.parametrize(("rule", "mask"), [(Cascade, "1000110101"), (Either, "1000110101"), (Both, "1110111111")])
def test_pairs_of_schedules(pipe, rule, mask):
    first, second = "1010111111", "1100110101"
    for points in ({"first_block": True}, {"first_block": False}):
        assert alone(pipe, schedules(rule, first, second, **points)).mask == mask
    mixed = rule(Schedule(first, first_block=False), Schedule(second, first_block=True))
    assert alone(pipe, mixed).mask == mask


def test_cascade_says_which_gate_fired(pipe):
    trace = alone(pipe, Cascade(Schedule("1010111111", first_block=False), Schedule("1100110101")))
    assert [s.reused_at for s in trace.steps[:4]] == [None, "input", "residual", "input"]
    assert trace.steps[1].said == (True, None)
    assert trace.steps[2].said == (False, True)


def test_combined_cache_between_its_gates(pipe):
    tea, first = TeaCache(0.2, POLYNOMIAL), FirstBlock(0.3)
    together = {rule: alone(pipe, rule(tea, first)).computed for rule in (Cascade, Either, Both)}
    singles = [alone(pipe, tea).computed, alone(pipe, first).computed]
    assert together[Both] >= max(singles)
    assert together[Cascade] <= max(singles)
    assert together[Either] <= max(singles)


def test_pairs_do_not_nest():
    pair = Cascade(FirstBlock(0.1), Interval(2))
    with pytest.raises(UserError, match="two at a time"):
        Either(pair, FirstBlock(0.1))


@pytest.mark.parametrize(
    "gate", [TeaCache(0.2, POLYNOMIAL), FirstBlock(0.3), Either(TeaCache(0.2, POLYNOMIAL), FirstBlock(0.3))]
)
def test_one_synchronisation_per_step(pipe, gate, monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or original(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("a second way to read"))
    with applied(pipe, Cache(gate)):
        image_tokens, pooled = torch.zeros(1, 64, 64), torch.zeros(1, 64)
        ids = torch.zeros(64, 3), torch.zeros(24, 3)
        for t in (0.9, 0.8, 0.7):
            pipe.transformer(
                hidden_states=image_tokens + t,
                encoder_hidden_states=torch.zeros(1, 24, 128),
                pooled_projections=pooled,
                timestep=torch.tensor([t]),
                guidance=torch.tensor([3.5]),
                img_ids=ids[0],
                txt_ids=ids[1],
            )
    assert len(reads) == 2  # nothing to compare with at the first step


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_exact_for_polynomials_of_degree_one(order):
    predictor = Taylor(order)
    state = predictor.new_state()
    for index in (0, 2, 5):
        predictor.computed(state, index, torch.tensor([3.0 + 2.0 * index]))
    assert predictor.predict(state, 7) == pytest.approx(17.0)


def test_taylor_follows_its_definition():
    predictor = Taylor(2)
    state = predictor.new_state()
    values = {0: 1.0, 3: 2.0, 5: 6.0}
    for index, value in values.items():
        predictor.computed(state, index, torch.tensor([value]))
    slope_before, slope = (2.0 - 1.0) / 3, (6.0 - 2.0) / 2
    curvature = (slope - slope_before) / 2
    assert predictor.predict(state, 8) == pytest.approx(6.0 + 3 * slope + 9 / 2 * curvature)


def test_taylor_holds_until_it_knows_more():
    predictor = Taylor(2)
    state = predictor.new_state()
    predictor.computed(state, 0, torch.tensor([4.0]))
    assert predictor.predict(state, 1) == 4.0
    with pytest.raises(UserError, match="order"):
        Taylor(3)


def test_extrapolating_comes_nearer_than_holding(pipe):
    exact = latents(pipe, steps=28)
    errors = {}
    for predictor in (Hold(), Taylor(1)):
        with applied(pipe, Cache(Interval(2, warm_up=8), predictor)):
            errors[predictor.name] = (latents(pipe, steps=28) - exact).abs().mean()
    assert errors["Taylor 1"] < errors["hold"]


# --- what a row takes from it ---

DEFAULT, MODEL_NAME = (1.0, 0.0), "embedded"
SAID = [  # cache, label, mark
    (first_block(0.12), "FBCache 0.12", "0.12"),
    (first_block(0.2, warm_up=6, longest_run=2), "FBCache 0.2, first 6 computed, at most 2 reused in a row", "0.2"),
    (first_block(0.2, warm_up=1, compute_last=True), "FBCache 0.2, first and the last computed", "0.2"),
    (
        Cache(Interval(4, warm_up=6, compute_last=True), Taylor(2)),
        "every 4th step after the first 6, and the last + Taylor 2",
        "4",
    ),
    (Cache(Interval(2, first_block=True)), "every 2nd step, first block run", "2"),
    (Cache(Interval(1)), "every step", "1"),
    (Cache(TeaCache(0.4, DEFAULT, warm_up=6), Taylor(1)), "TeaCache 0.4, first 6 computed + Taylor 1", "0.4"),
    (Cache(TeaCache(0.4, DEFAULT, PUBLISHED)), "TeaCache 0.4, published polynomial", "0.4"),
    (Cache(TeaCache(0.4, DEFAULT), hold_controlnet=True), "TeaCache 0.4, ControlNet held", "0.4"),
    (
        Cache(Cascade(TeaCache(0.1, DEFAULT), FirstBlock(0.2), warm_up=6)),
        "TeaCache 0.1 then FBCache 0.2, first 6 computed",
        "0.1/0.2",
    ),
    (Cache(Either(TeaCache(0.1, DEFAULT), FirstBlock(0.2))), "TeaCache 0.1 or FBCache 0.2", "0.1/0.2"),
    (Cache(Both(TeaCache(0.1, DEFAULT), FirstBlock(0.2))), "TeaCache 0.1 and FBCache 0.2", "0.1/0.2"),
    (prescribed("1010", "as published"), "as published: 2 of 4", "2 of 4"),
    (prescribed("1010", "as published", first_block=False), "as published: 2 of 4, no block run", "2 of 4"),
    (Cache(Schedule("110")), "schedule 2 of 3", "2 of 3"),
]


@pytest.mark.parametrize("cache, label, mark", SAID, ids=[label for _, label, _ in SAID])
def test_a_label_says_all_that_distinguishes_a_cache_and_its_mark_where_it_is_turned(cache, label, mark):
    assert (cache.label, cache.mark) == (label, mark)


def test_caches_that_differ_have_other_settings():
    settings = [cache.settings for cache, *_ in SAID]
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])
    assert "origin" not in prescribed("1010", "as published").settings


@pytest.mark.parametrize(
    "off, on",
    [
        (FirstBlock(0), FirstBlock(0.1)),
        (TeaCache(0, DEFAULT), TeaCache(0.1, DEFAULT)),
        (Interval(1), Interval(2)),
        (Schedule("111"), Schedule("101")),
        (Both(FirstBlock(0), Interval(2)), Both(FirstBlock(0.1), Interval(2))),
        (Either(FirstBlock(0), Interval(1)), Either(FirstBlock(0), Interval(2))),
    ],
)
def test_a_cache_that_can_never_reuse_is_identical(off, on):
    assert (Cache(off).exact, Cache(on).exact) == (IDENTICAL, ANOTHER)


@pytest.mark.parametrize("family", [family for family in families.ALL if family.cache], ids=lambda f: f.name)
def test_a_family_s_gate_is_made_at_a_value_of_its_dial(family):
    kind = family.gate_class()
    gate = kind.at(2.0, MODEL_NAME, warm_up=3)
    cache = Cache(gate)
    assert type(gate) is kind and cache.family is family and cache.name == family.name
    assert cache.settings == {family.dial: 2, "warm_up": 3} and cache.mark == "2"


def test_gates_are_found_by_the_names_in_families():
    import fluxnb.cache

    assert fluxnb.cache.FirstBlock is families.FIRST_BLOCK.gate_class()
    with pytest.raises(AttributeError, match="has no attribute LastBlock"):
        _ = fluxnb.cache.LastBlock


# --- composition -------------------------------------------------------------------------------------------


def test_compiles_without_breaks_or_recompiles(pipe):
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    cache = Cache(Cascade(TeaCache(0.2, POLYNOMIAL), FirstBlock(0.3)), Taylor(1))
    with applied(pipe, cache):
        expected = latents(pipe)
    mask = cache.trace.mask
    with applied(pipe, Regional()):
        latents(pipe)
        uncached = dynamo.utils.counters["stats"]["unique_graphs"]
        with applied(pipe, cache):
            compiled = latents(pipe)
            assert cache.trace.mask == mask
            assert "0" in mask
            cache.gate.gates[1].threshold = 0.1
            latents(pipe, seed=5)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == uncached  # the cache adds no graph
    assert not dynamo.utils.counters["graph_break"]
    assert (compiled - expected).abs().max() < 1e-2
    assert all(block._compiled_call_impl is None for block in pipe.transformer.transformer_blocks)


def controlnet_pipe(pipe):
    """The embedded pipeline with a small random ControlNet whose residuals are not zero."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    torch.manual_seed(0)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_") and k != "out_channels"}
    controlnet = FluxControlNetModel(**{**config, "num_layers": 2, "num_single_layers": 2}).eval()
    with torch.no_grad():
        for part in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
            torch.nn.init.normal_(part.weight, std=0.05)
        torch.nn.init.normal_(controlnet.controlnet_x_embedder.weight, std=0.05)
    made = FluxControlNetPipeline(**pipe.components, controlnet=controlnet)
    made.set_progress_bar_config(disable=True)
    return made


def controlled(pipe, steps=8):
    from PIL import Image

    return pipe(
        "a red apple on a white table",
        control_image=Image.linear_gradient("L").resize((128, 128)).convert("RGB"),
        width=128,
        height=128,
        num_inference_steps=steps,
        max_sequence_length=MODEL.tokens,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def test_controlnet_residuals_are_applied_once(pipe):
    made = controlnet_pipe(pipe)
    plain = controlled(made)
    with applied(made, first_block(0)):
        assert torch.equal(controlled(made), plain)
    # A step reused with unchanged inputs gives what computing it gives: nothing is added twice or left out.
    transformer, seen = made.transformer, []
    original = transformer.forward
    with applied(made, cache := Cache(Schedule("1" + "0" * 7))):
        calls = []
        inner = transformer.forward

        def twice(*args, **kwargs):
            if not calls:
                calls.append((args, kwargs))
                seen.append(inner(*args, **kwargs)[0])
                made.scheduler._step_index = 1  # as if it had been stepped
                seen.append(inner(*args, **kwargs)[0])
                return (seen[0],)
            raise StopIteration

        vars(transformer)["forward"] = twice
        with pytest.raises(StopIteration):
            controlled(made)
        vars(transformer)["forward"] = inner
        assert [s.hit for s in cache.trace.steps] == [False, True]
    assert torch.allclose(seen[0], seen[1], atol=1e-5)
    assert transformer.forward == original


def test_img2img_and_inpainting(pipe):
    from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline
    from PIL import Image

    image = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (32, 32, 96, 96))
    for kind, extra in ((FluxImg2ImgPipeline, {}), (FluxInpaintPipeline, {"mask_image": mask})):
        made = kind(**pipe.components)
        made.set_progress_bar_config(disable=True)

        def run(made=made, extra=extra):
            return made(
                "a red apple",
                image=image,
                strength=0.6,
                num_inference_steps=10,
                width=128,
                height=128,
                max_sequence_length=MODEL.tokens,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                **extra,
            ).images

        plain = run()
        with applied(made, cache := first_block(0)):
            assert torch.equal(run(), plain)
            assert len(cache.trace.steps) == 6
            cache.gate.threshold = 0.5
            assert not torch.equal(run(), plain)
            assert cache.trace.computed < 6
        with applied(made, cache := Cache(FirstBlock(50.0, compute_last=True))):
            run()
        assert cache.trace.mask == "100001"  # the last step that is run, not the last of the schedule


def test_passes_of_true_guidance_are_kept_apart(pipe):
    def run():
        return pipe(
            "a red apple",
            negative_prompt="a blue cup",
            true_cfg_scale=2.0,
            num_inference_steps=6,
            width=128,
            height=128,
            max_sequence_length=MODEL.tokens,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    plain = run()
    cache, kept = first_block(0), []
    new = cache._new
    cache._new = lambda image: kept.append(new(image)) or kept[-1]
    with applied(pipe, cache):
        assert torch.equal(run(), plain)
        assert [len(state["trace"].steps) for state in kept] == [6, 6]


RANKS = """
import sys, torch
from fluxnb.cache.gates.base import RESIDUAL
from fluxnb.cache.gates.first_block import FirstBlock
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
gate = FirstBlock(0.15)
gate.share(torch.distributed.group.WORLD)
state = gate.new_state()
gate.computed(state, 0, torch.ones(1, 4, 8))
own = torch.full((1, 4, 8), 1.1 if sys.argv[1] == "0" else 1.3)  # alone, one rank would reuse and one compute
alone = (own - 1).abs().mean().item() < 0.15
print(alone, gate.ask(state, 1, RESIDUAL, own), round(state["indicator"], 4))
"""


def test_ranks_cannot_disagree(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-c", RANKS]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert [alone for alone, _, _ in said] == ["True", "False"]
    assert said[0][1:] == said[1][1:] == ["False", "0.2"]
