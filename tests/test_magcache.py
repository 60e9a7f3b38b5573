"""MagCache's gate: beside diffusers' own, step by step and image by image."""

import pytest
import torch

from fluxnb import families, study
from fluxnb.cache import Cache
from fluxnb.cache.gates.magcache import FLUX_RATIOS, MagCache
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import applied

PROMPT = "a red apple on a white table"


def latents(pipe, steps):
    given = {"prompt": PROMPT, "width": 128, "height": 128, "num_inference_steps": steps, "guidance_scale": 3.5}
    generator = torch.Generator().manual_seed(0)
    tokens = pipelines.describe("embedded").tokens
    return pipe(**given, generator=generator, output_type="latent", max_sequence_length=tokens).images


def expected(threshold, steps, ratios=FLUX_RATIOS, longest=3, retention=0.2):
    """The loop of diffusers' MagCacheHeadHook, written down."""
    from diffusers.hooks.mag_cache import nearest_interp

    scale = nearest_interp(torch.tensor(ratios), steps).tolist()
    product, error, run, mask = 1.0, 0.0, 0, ""
    for step in range(steps):
        compute = True
        if step >= int(retention * steps + 0.5):
            product, run = product * scale[step], run + 1
            error += abs(1 - product)
            compute = error > threshold or run > longest
            if compute:
                product, error, run = 1.0, 0.0, 0
        mask += "1" if compute else "0"
    return mask


@pytest.mark.parametrize(("threshold", "steps"), [(0.06, 28), (0.24, 28), (0.06, 12), (0.5, 20)])
def test_it_computes_the_steps_that_the_published_loop_does(embedded_pipe, threshold, steps):
    cache = Cache(MagCache(threshold))
    with applied(embedded_pipe, cache):
        latents(embedded_pipe, steps)
    assert cache.trace.mask == expected(threshold, steps)
    assert 0 < cache.trace.mask.count("0") < steps


def test_its_image_is_that_of_diffusers(embedded_pipe):
    from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache

    with applied(embedded_pipe, Cache(MagCache(0.24))):
        ours = latents(embedded_pipe, 12)
    pipe = pipelines.load("embedded", "float32", "cpu")
    apply_mag_cache(pipe.transformer, MagCacheConfig(0.24, num_inference_steps=12, mag_ratios=list(FLUX_RATIOS)))
    assert torch.allclose(ours, latents(pipe, 12), atol=1e-4)


def test_a_threshold_of_nothing_changes_nothing(embedded_pipe):
    plain = latents(embedded_pipe, 8)
    cache = Cache(MagCache(0))
    with applied(embedded_pipe, cache):
        assert torch.equal(latents(embedded_pipe, 8), plain)
    assert cache.trace.mask == "1" * 8


def test_what_makes_no_sense_is_said():
    for wrong in ({"threshold": -1}, {"threshold": 0.1, "ratios": ()}, {"threshold": 0.1, "retention": 2}):
        with pytest.raises(UserError):
            MagCache(**wrong)


def test_its_family_builds_it_and_its_row_says_what_it_is():
    gate = families.MAGCACHE.gate_class().at(0.12, "embedded")
    candidate = study.using(Cache(gate), 28)
    assert candidate.meaning["label"] == "MagCache 0.12, at most 3 reused in a row"
    assert (candidate.meaning["mark"], candidate.meaning["family"]) == ("0.12", families.MAGCACHE.name)
