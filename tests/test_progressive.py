"""The first steps at half size: against the paper's loop written out, with a cache, and where it can't be."""

import numpy as np
import pytest
import scipy.fft
import small
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image

from fluxnb import cache, techniques
from fluxnb.cache import Cache, Taylor, first_block
from fluxnb.cache.predictors import L2P
from fluxnb.errors import UserError
from fluxnb.models import embedded, pipelines
from fluxnb.technique import Unavailable, applied, attribute
from fluxnb.techniques.progressive import Progressive, _packed, _unpacked, activation, cosine

STEPS = 5


@pytest.fixture(scope="module")
def pipe():
    return small.load()


def dct(x, back=False):
    kind = scipy.fft.idctn if back else scipy.fft.dctn
    return torch.from_numpy(kind(x.numpy(), axes=(-2, -1), norm="ortho"))


def written_out(pipe, coarse):
    """dct_rewind with the high frequencies of the whole image's noise as the noise that is added."""
    noise = pipelines.noise(pipe, [1], small.MODEL.width, small.MODEL.height)
    side = int(noise.shape[1] ** 0.5)
    given = []
    forward = pipe.transformer.forward
    with attribute(pipe.transformer, "forward", lambda **kwargs: given.append(kwargs) or forward(**kwargs)):
        small.image(pipe, STEPS)
    sigmas = pipe.scheduler.sigmas.tolist()
    spectrum = dct(_unpacked(noise, side, side))
    x, rows = dct(spectrum[..., :side, :side], back=True), side // 2
    for step in range(STEPS):
        now, after, own = sigmas[step], sigmas[step + 1], dict(given[step])
        if step == coarse:
            larger = spectrum * now
            larger[..., :side, :side] = dct(x)
            x, rows = dct(larger, back=True) * 2 / (1 + now), side
            now = 2 * now / (1 + now)
            own["timestep"] = torch.full_like(own["timestep"], now)
        ids = [[0.0, row, column] for row in range(rows) for column in range(rows)]
        own |= {"hidden_states": _packed(x), "img_ids": torch.tensor(ids), "return_dict": False}
        with torch.no_grad():
            x = x + (after - now) * _unpacked(forward(**own)[0], rows, rows)
    return _packed(x)


@pytest.mark.parametrize("coarse", [1, 3])
def test_equals_the_papers_loop_written_out(pipe, coarse):
    with applied(pipe, Progressive(coarse)):
        ours = small.image(pipe, STEPS)
    assert torch.allclose(ours, written_out(pipe, coarse), atol=2e-4)
    assert not torch.allclose(ours, small.image(pipe, STEPS), atol=1e-2)


def test_packing_is_the_pipelines_own(pipe):
    latents = torch.randn(2, 16, 8, 12)
    packed = _packed(latents)
    assert torch.equal(packed, pipe._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(_unpacked(packed, 4, 6), latents)


def test_the_cosine_transform_is_scipys_and_keeps_white_noise_white():
    x = torch.randn(3, 8, 12)
    assert torch.allclose(cosine(x), dct(x), atol=1e-5)
    assert torch.allclose(cosine(cosine(x), back=True), x, atol=1e-5)
    low = cosine(cosine(torch.randn(512, 16, 16))[..., :8, :8], back=True)
    assert abs(low.std() - 1) < 0.02


def test_a_quarter_of_the_tokens_is_seen_at_first_and_everything_is_put_back(pipe):
    before, seen = small.state(pipe), []
    with applied(pipe, Progressive(2)):
        hook = pipe.transformer.norm_out.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
        small.image(pipe, STEPS)
        hook.remove()
    tokens = (small.MODEL.width // 16) ** 2
    assert seen == [tokens // 4] * 2 + [tokens] * 3
    assert not small.differences(before, pipe)


def test_a_cache_keeps_the_small_steps_apart(pipe):
    with applied(pipe, own := Cache(cache.Interval(3), Taylor(1)), Progressive(4)):
        small.image(pipe, 9)
    assert own.trace.mask == "100110100"  # the fourth is the first large one
    with applied(pipe, Progressive(2)), pytest.raises(UserError, match="put the cache on first"):
        first_block(0.1).apply(pipe)


def test_weights_of_a_whole_trajectory_do_not_go_with_two_sizes(pipe):
    planned = Cache(cache.Schedule("11010", first_block=False), L2P.of({2: {1: 1.0}, 4: {3: 1.0}}, 5))
    with applied(pipe, planned), pytest.raises(UserError, match="of steps at both sizes"):
        Progressive(2).apply(pipe)


def test_true_guidance_goes_on_at_both_sizes(pipe):
    options = {"prompt": "a red ball", "negative_prompt": "a cat", "true_cfg_scale": 2.0, "output_type": "latent"}
    options |= {"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 24}
    with applied(pipe, Progressive(2)):
        one, other = (pipe(**options, generator=torch.manual_seed(0)).images for _ in range(2))
    assert torch.equal(one, other) and one.isfinite().all()


def test_the_noise_level_gives_as_many_small_steps_as_sglang_states():
    """FLUX.1-dev, 1024², 50 steps: 18 small ones at a loss of 0.01, 28 at 0.05 (sgl-project/sglang, pull 27524)."""
    scheduler = FlowMatchEulerDiscreteScheduler(**embedded.SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=1.15)
    for delta, coarse in ((0.01, 18), (0.05, 28)):
        assert (scheduler.sigmas > activation(delta, 128)).sum() == coarse
    for wrong in (0, -1, 2):
        with pytest.raises(UserError, match="makes no sense"):
            activation(wrong, 128)


@pytest.mark.parametrize("coarse", [0, -1, 1.5, True, "2"])
def test_a_number_of_steps_that_is_none_is_refused(coarse):
    with pytest.raises(UserError, match="whole number of 1 or more"):
        Progressive(coarse)


def test_where_it_can_not_run_it_says_why(pipe):
    with pytest.raises(UserError, match="use it with text-to-image"):
        Progressive(2).apply(pipelines.as_use_case(pipe, "img2img"))
    with applied(pipe, techniques.DPMSolver()), pytest.raises(UserError, match="take that solver off"):
        Progressive(2).apply(pipe)
    with applied(pipe, techniques.ModulationAhead()), pytest.raises(Unavailable, match="without modulation ahead"):
        Progressive(2).apply(pipe)
    with applied(pipe, Progressive(2)):
        for steps in (1, 2):
            with pytest.raises(UserError, match="leave none of"):
                small.image(pipe, steps)
        with pytest.raises(UserError, match="can't be halved: give a width and height that 32 pixels divide"):
            small.image(pipe, STEPS, width=112, height=128)
        with pytest.raises(UserError, match="at half size already"):
            Progressive(3).apply(pipe)
        with applied(pipe, techniques.DPMSolver()), pytest.raises(UserError, match="take that solver off"):
            small.image(pipe, STEPS)
        other = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()})
        with pytest.raises(UserError, match="loop of the pipeline that it is on"):
            other("a cat", image=Image.new("RGB", (128, 128)), num_inference_steps=4, max_sequence_length=24)


@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_a_pipeline_of_the_same_parts_that_begins_with_an_image_is_a_sentence(pipe, kind):
    other, picture = pipelines.of_kind(pipe, kind), Image.new("RGB", (128, 128))
    given = {"mask_image": Image.new("L", (128, 128), 255)} if "Inpaint" in kind else {}
    with applied(pipe, Progressive(1)), pytest.raises(UserError, match=f"{kind} begins with or follows an image"):
        other("a cat", image=picture, num_inference_steps=4, strength=0.6, max_sequence_length=24, **given)


def test_a_cache_of_diffusers_own_has_to_see_one_size(pipe):
    config = FirstBlockCacheConfig(threshold=0.1)
    with applied(pipe, Progressive(1)), pytest.raises(UserError, match="take one of them off"):
        pipe.transformer.enable_cache(config)
    pipe.transformer.enable_cache(config)
    try:
        with pytest.raises(Unavailable, match="^needs the transformer without a cache of diffusers'"):
            Progressive(1).apply(pipe)
    finally:
        pipe.transformer.disable_cache()
