"""Image-to-image, inpainting and ControlNet on the embedded model: what is asked for, and every technique on it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fluxnb.cache import Cache, FirstBlock, Hold, Interval, Schedule, Taylor, TeaCache, even_mask, teacache
from fluxnb.errors import UserError
from fluxnb.measure import latency, quality
from fluxnb.models import control, material, pipelines
from fluxnb.technique import applied, networks
from fluxnb.techniques import compilation, vae
from fluxnb.techniques.attention import Attention
from fluxnb.techniques.compilation import Regional
from fluxnb.techniques.precision import TorchAO, block_layers
from fluxnb.world import scenes

MODEL = pipelines.describe("embedded")
PROMPT, SEED, STEPS = "a blue cube left of a yellow ball on grass at sunset", 3, 10
RUNS = {"img2img": 8, "inpainting": 8, "ControlNet img2img": 8, "ControlNet inpainting": 8}  # at a strength of 0.8
every_use_case = pytest.mark.parametrize("use_case", pipelines.USE_CASES)


@pytest.fixture(scope="module")
def base():
    return pipelines.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def controlnet():
    return pipelines.load_controlnet("embedded", device="cpu")


@pytest.fixture(scope="module")
def pipes(base, controlnet):
    return {name: pipelines.as_use_case(base, name, controlnet) for name in pipelines.USE_CASES}


@pytest.fixture(scope="module")
def drawn():
    return material.of(PROMPT, SEED)


def make(pipe, drawn, **changed):
    given = {"image": drawn.image, "mask": drawn.mask, "condition": drawn.edges, "steps": STEPS, "strength": 0.8}
    return pipelines.generate(pipe, [PROMPT], [SEED], model=MODEL, **(given | changed))[0]


def apart(a, b):
    """PSNR of two images in dB, inf if they are equal."""
    return quality.psnr(a, b)


# --- the pipelines ---


@every_use_case
def test_components_are_shared_not_copied(pipes, base, use_case):
    assert type(pipes[use_case]).__name__ == pipelines.USE_CASES[use_case]
    assert pipes[use_case].transformer is base.transformer and pipes[use_case].vae is base.vae


@every_use_case
def test_an_image_depends_on_its_seed_alone(pipes, drawn, use_case):
    torch.manual_seed(1)
    one = make(pipes[use_case], drawn, steps=3)
    torch.manual_seed(2)
    given = {"image": [drawn.image] * 2, "mask": [drawn.mask] * 2, "condition": [drawn.edges] * 2, "steps": 3}
    both = pipelines.generate(pipes[use_case], [PROMPT] * 2, [SEED + 1, SEED], model=MODEL, **given)
    assert apart(one, both[1]) > 45
    assert apart(one, both[0]) < 40


@every_use_case
def test_size_of_another_model_is_checked_first(pipes, drawn, use_case):
    with pytest.raises(UserError, match="use multiples of 16"):
        make(pipes[use_case], drawn, width=120, height=128)


# --- caching ---


def gates():
    coefficients = teacache.coefficients("embedded")
    return [FirstBlock(0.0), TeaCache(0.0, coefficients)]


@every_use_case
def test_a_threshold_of_0_is_no_cache_bit_for_bit(pipes, drawn, use_case):
    plain = make(pipes[use_case], drawn)
    for gate in gates():
        for hold in (False, True):
            with applied(pipes[use_case], cache := Cache(gate, hold_controlnet=hold)):
                assert apart(make(pipes[use_case], drawn), plain) == math.inf
            assert cache.trace.mask == "1" * RUNS.get(use_case, STEPS)
    assert apart(make(pipes[use_case], drawn), plain) == math.inf


@every_use_case
def test_reused_steps_are_counted_among_the_steps_that_run(pipes, drawn, use_case):
    plain, runs = make(pipes[use_case], drawn), RUNS.get(use_case, STEPS)
    mask = even_mask(runs // 2, runs)
    with applied(pipes[use_case], cache := Cache(Schedule(mask, False), hold_controlnet=True)):
        assert apart(make(pipes[use_case], drawn), plain) > 15
    assert cache.trace.mask == mask
    with applied(pipes[use_case], cache := Cache(Interval(2, warm_up=4, compute_last=True), Taylor(2))):
        assert apart(make(pipes[use_case], drawn), plain) > 20
    assert cache.trace.mask.startswith("1111") and cache.trace.mask.endswith("1") and "0" in cache.trace.mask


@pytest.mark.parametrize("use_case", [name for name in pipelines.USE_CASES if name.startswith("ControlNet")])
@pytest.mark.parametrize("gate", [FirstBlock(0.3), TeaCache(0.3, teacache.coefficients("embedded")), Interval(2)])
def test_a_controlnet_is_left_out_on_reused_steps(pipes, controlnet, drawn, use_case, gate):
    ran = []
    handle = controlnet.time_text_embed.register_forward_hook(lambda *_: ran.append(1))
    try:
        with applied(pipes[use_case], cache := Cache(gate)):
            every = make(pipes[use_case], drawn)
        assert len(ran) == len(cache.trace.mask) and "0" in cache.trace.mask
        ran.clear()
        with applied(pipes[use_case], held := Cache(gate, hold_controlnet=True)):
            image = make(pipes[use_case], drawn)
        assert len(ran) == held.trace.mask.count("1") and held.trace.mask == cache.trace.mask
    finally:
        handle.remove()
    # this ControlNet adds nothing behind the last block, so nothing of it is missed
    assert apart(image, every) == math.inf


def test_residuals_behind_the_last_block_are_those_of_the_last_computed_step(base, drawn):
    from diffusers import FluxControlNetModel

    config = {k: v for k, v in base.transformer.config.items() if not k.startswith("_") and k != "out_channels"}
    torch.manual_seed(0)
    network = FluxControlNetModel(**{**config, "num_layers": 1, "num_single_layers": 8}).eval()
    for part in (network.controlnet_x_embedder, *network.controlnet_blocks, *network.controlnet_single_blocks):
        torch.nn.init.normal_(part.weight, std=0.02)
    pipe = pipelines.as_use_case(base, "ControlNet txt2img", network)
    plain, found = make(pipe, drawn, output_type="latent"), {}
    for hold in (False, True):
        with applied(pipe, Cache(Interval(2, warm_up=4), hold_controlnet=hold)):
            found[hold] = make(pipe, drawn, output_type="latent")
    error = (found[False] - plain).abs().mean()
    assert 0 < (found[True] - found[False]).abs().mean() < error


def test_diffusers_own_cache_is_wrong_under_a_controlnet(pipes, drawn):
    """It skips the blocks between which ControlNet residuals are added, but not the additions."""
    from diffusers.hooks import FirstBlockCacheConfig

    pipe = pipes["ControlNet txt2img"]
    plain = make(pipe, drawn)
    with applied(pipe, ours := Cache(FirstBlock(0.2), Hold())):
        our_image = make(pipe, drawn)
    assert "0" in ours.trace.mask
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    try:
        with pipe.transformer.cache_context("cond"):
            theirs = make(pipe, drawn)
    finally:
        pipe.transformer.disable_cache()
    assert apart(our_image, plain) > apart(theirs, plain) + 1
    assert apart(make(pipe, drawn), plain) == math.inf


# --- other techniques ---


@every_use_case
def test_blocks_compile_without_breaks_and_without_compiling_again(pipes, drawn, use_case):
    pipe = pipes[use_case]
    plain = make(pipe, drawn, steps=4)
    with applied(pipe, technique := Regional()):
        count = 12 + (2 if use_case.startswith("ControlNet") else 0)
        assert technique.proof == {"compiled": f"{count} blocks"}
        assert apart(make(pipe, drawn, steps=4), plain) > 45
        before = compilation.counters()
        with applied(pipe, Cache(Interval(2), hold_controlnet=True)):
            make(pipe, drawn, steps=4)
        assert compilation.counters() == before
    assert apart(make(pipe, drawn, steps=4), plain) == math.inf


@every_use_case
def test_transformer_and_controlnet_are_quantized(pipes, drawn, use_case):
    pipe = pipes[use_case]
    plain = make(pipe, drawn, steps=4)
    with applied(pipe, technique := TorchAO("int8 weight-only"), Cache(FirstBlock(0.0))):
        layers = sum(len(block_layers(network)) for network in networks(pipe))
        assert technique.proof["layers"] == technique.proof["of"] == layers
        assert 25 < apart(make(pipe, drawn, steps=4), plain) < math.inf
    assert apart(make(pipe, drawn, steps=4), plain) == math.inf


@every_use_case
def test_the_attention_kernel_is_chosen_in_transformer_and_controlnet(pipes, drawn, use_case):
    pipe = pipes[use_case]
    plain = make(pipe, drawn, steps=4)
    processors = [m.processor for network in networks(pipe) for m in network.modules() if hasattr(m, "processor")]
    with applied(pipe, Attention("flash")):
        assert all("flash" in p._attention_backend.value for p in processors)
        assert apart(make(pipe, drawn, steps=4), plain) > 45
    assert {p._attention_backend for p in processors} == {None}


@pytest.mark.parametrize("technique", [vae.ChannelsLast(), vae.Sliced()], ids=lambda t: t.label)
def test_the_vae_encodes_under_its_options(pipes, drawn, technique):
    plain = make(pipes["img2img"], drawn, steps=4)
    with applied(pipes["img2img"], technique):
        assert apart(make(pipes["img2img"], drawn, steps=4), plain) > 45


@every_use_case
def test_stages_have_the_vaes_encoding_apart_from_denoising(pipes, drawn, use_case):
    pipe = pipes[use_case]
    original, slow = pipe.vae.encode, 1.0

    def encode(*args, **kwargs):
        import time

        time.sleep(slow)
        return original(*args, **kwargs)

    pipe.vae.encode = encode
    try:
        with latency.stages(pipe) as stages:
            make(pipe, drawn, steps=2)
    finally:
        del pipe.vae.encode
    assert (stages.vae_s > slow) == (use_case != "txt2img")
    assert stages.text_s + stages.denoise_s + stages.vae_s <= stages.total_s + 1e-6


# --- what is made ---


@pytest.mark.parametrize("use_case", ["inpainting", "ControlNet inpainting"])
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_outside_the_mask_changes_beyond_the_vae(pipes, drawn, use_case, cached):
    pipe, techniques = pipes[use_case], [Cache(FirstBlock(0.2), Hold())] if cached else []
    with applied(pipe, *techniques):
        image = make(pipe, drawn)
    inside, outside = np.asarray(drawn.mask) > 127, drawn.outside()
    assert not (inside & outside).any() and outside.mean() > 0.4
    alone = pipelines.through_vae(pipe, drawn.image)
    assert quality.psnr(image, drawn.image, outside) > quality.psnr(alone, drawn.image, outside) - 0.5
    assert quality.psnr(image, drawn.image, inside) < 20  # there it was repainted


def test_a_lower_strength_stays_nearer_to_the_image(pipes, drawn):
    near, far = (make(pipes["img2img"], drawn, strength=s) for s in (0.3, 1.0))
    assert apart(near, drawn.image) > apart(far, drawn.image) + 3


@pytest.mark.parametrize("kind", control.MODES)
def test_the_controlnet_makes_images_follow_their_condition(pipes, base, kind):
    """Prompts kept out of training; the same prompts and seeds without it for comparison."""
    followed, free = [], []
    for seed in range(6):
        scene = scenes.held_out_scene(5000 + seed)
        picture = scenes.draw(scene, seed)
        condition = control.edges(picture) if kind == "edges" else scenes.depth(scene, seed)
        given = {"model": MODEL, "steps": 14}
        made = pipelines.generate(
            pipes["ControlNet txt2img"], [scene.caption], [seed], condition=condition, kind=kind, **given
        )[0]
        plain = pipelines.generate(base, [scene.caption], [seed], **given)[0]
        followed.append(control.agreement(made, condition, kind))
        free.append(control.agreement(plain, condition, kind))
    assert np.mean(followed) > np.mean(free) + 0.08
    assert np.mean(followed) > 0.7


def test_plain_diffusers_loads_the_controlnet():
    from diffusers import FluxControlNetModel

    network = FluxControlNetModel.from_pretrained(control.FOLDER)
    assert network.config.num_mode == len(control.MODES)
    assert sum(path.stat().st_size for path in control.FOLDER.rglob("*")) < 8e6


# --- material ---


def test_material_is_of_one_size_and_the_same_again(drawn):
    again = material.of(PROMPT, SEED)
    for name in ("image", "mask", "edges", "depth"):
        assert getattr(drawn, name).size == (128, 128)
        assert getattr(drawn, name).tobytes() == getattr(again, name).tobytes()
    wide = material.of(PROMPT, SEED, 256, 192)
    assert {wide.image.size, wide.mask.size, wide.edges.size, wide.depth.size} == {(256, 192)}


@pytest.mark.parametrize("prompt", scenes.STUDY_PROMPTS)
def test_the_mask_covers_what_is_wrong(prompt):
    found = material.of(prompt, 0)
    wanted = scenes.draw(scenes.complete(prompt, 0), 0)
    differs = np.abs(np.asarray(wanted, dtype=int) - np.asarray(found.image, dtype=int)).max(-1) > 8
    inside = np.asarray(found.mask) > 127
    assert differs.any() and not (differs & ~inside).any() and inside.mean() < 0.5


def test_no_picture_of_another_world():
    with pytest.raises(UserError, match="use words of the embedded world"):
        material.of("quantum chromodynamics", 0)


def test_depth_knows_what_is_in_front():
    scene = scenes.complete(PROMPT, SEED)
    depth = np.asarray(scenes.depth(scene, SEED).convert("L"))
    assert depth[2].max() < 20 < depth[80].min()  # sky, ground
    assert depth.max() > depth[100, 64]  # things stand before the ground between them


def test_agreement_of_a_picture_with_its_own_edges_and_with_others(drawn):
    other = material.of("a pink star on a beach at noon", 1)
    wanted = scenes.draw(scenes.complete(PROMPT, SEED), SEED)
    assert control.agreement(wanted, drawn.edges, "edges") == 1.0
    assert control.agreement(wanted, drawn.depth, "depth") > 0.8
    assert control.agreement(other.image, drawn.edges, "edges") < 0.6
    nothing = Image.new("RGB", (128, 128))
    assert control.agreement(nothing, drawn.edges, "edges") == 0.0
    assert control.agreement(nothing, nothing, "edges") == 1.0


# --- bad input: one sentence, before the model runs ---


@pytest.mark.parametrize(
    ("use_case", "changed", "said"),
    [
        ("img2img", {"strength": 0}, "allowed is more than 0 up to 1"),
        ("img2img", {"strength": 1.5}, "allowed is more than 0 up to 1"),
        ("inpainting", {"strength": math.nan}, "allowed is more than 0 up to 1"),
        ("inpainting", {"strength": 0.05}, "leaves none of 10 steps: use at least 0.1"),
        ("img2img", {"image": None}, "img2img needs an image: give a PIL image"),
        ("inpainting", {"mask": None}, "inpainting needs a mask"),
        ("inpainting", {"mask": Image.new("L", (64, 64))}, "The mask is 64×64 pixels and what is made 128×128"),
        ("img2img", {"image": [Image.new("RGB", (128, 128))] * 3}, "3 images for 1 prompts"),
        ("ControlNet txt2img", {"condition": None}, "A ControlNet needs a condition"),
        ("ControlNet img2img", {"kind": "pose"}, "choose one of edges, depth"),
        ("ControlNet txt2img", {"condition": Image.new("RGB", (128, 128), "red")}, "has no colours"),
        ("ControlNet txt2img", {"condition": Image.new("RGB", (128, 128), "grey")}, "Edges are white lines on black"),
        ("ControlNet inpainting", {"condition": Image.new("RGB", (256, 128))}, "of one size"),
    ],
)
def test_what_a_use_case_is_not_given_right(pipes, drawn, use_case, changed, said, monkeypatch):
    monkeypatch.setattr(pipes[use_case].transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=said) as error:
        make(pipes[use_case], drawn, **changed)
    assert str(error.value).count("\n") == 0


def test_a_use_case_that_is_not_there_or_lacks_its_controlnet(base, tmp_path):
    with pytest.raises(UserError, match="choose one of txt2img"):
        pipelines.as_use_case(base, "outpainting")
    with pytest.raises(UserError, match="needs a ControlNet"):
        pipelines.as_use_case(base, "ControlNet txt2img")
    with pytest.raises(UserError, match="cannot be read"):
        pipelines.load_controlnet("embedded", device="cpu", source=tmp_path)
    with pytest.raises(UserError, match="in one size"):
        control.agreement(Image.new("RGB", (32, 32)), Image.new("RGB", (64, 32)), "edges")
