"""SeaCache and DiCache beside their published loops, step by step and image by image."""

import pytest
import torch

from fluxnb import families, rebuilt, study
from fluxnb.cache import Aligned, Both, Cache, DiCache, FirstBlock, FreqCa, Interval, SeaCache, Spectrum
from fluxnb.cache.gates.base import INPUT, RESIDUAL
from fluxnb.cache.gates.seacache import filtered
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import SHARED, applied, attribute
from fluxnb.techniques.compilation import Regional

STEPS = 12


def latents(pipe, steps=STEPS, seed=3):
    model = pipelines.describe("embedded")
    return pipelines.generate(pipe, ["a red apple on a table"], [seed], model=model, steps=steps, output_type="latent")


def plain_loop(transformer, between):
    """FLUX's forward with its blocks replaced: `between(tokens, text, more, timestep)` gives the image tokens."""
    t = transformer

    def forward(hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, **rest):
        temb = t.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        more = {"temb": temb, "image_rotary_emb": t.pos_embed(torch.cat([txt_ids, img_ids]))}
        tokens = between(t.x_embedder(hidden_states), t.context_embedder(encoder_hidden_states), more, timestep)
        return (t.proj_out(t.norm_out(tokens, temb)),)

    return attribute(t, "forward", forward)


def all_blocks(transformer, tokens, text, more, skip=0):
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks][skip:]:
        text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, **more)
    return tokens


def relative(now, before):
    return float((now - before).abs().mean() / before.abs().mean())


def published_dicache(transformer, threshold, difference, retention, steps=STEPS):
    """`dicache_forward` of Bujiazi/DiCache, FLUX/run_flux_dicache.py; (what runs the blocks, the mask as it grows)."""
    s = {"total": 0.0, "x": None, "y": None}
    residuals, probes, mask = [], [], []

    def between(x, text, more, timestep):
        count, block = len(mask), transformer.transformer_blocks[0]
        text_then, y = block(hidden_states=x, encoder_hidden_states=text, **more)
        if count <= int(retention * steps) or count == steps - 1:
            compute, s["total"] = True, 0.0
        else:
            dy = relative(y, s["y"])
            s["total"] += abs(dy - relative(x, s["x"])) if difference else dy
            compute = s["total"] >= threshold
            s["total"] *= not compute
        s["x"], s["y"] = x, y
        mask.append("1" if compute else "0")
        if compute:
            made = all_blocks(transformer, y, text_then, more, skip=1)
            residuals.append(made - x)
            probes.append(y - x)
            return made
        if len(residuals) < 2:
            return x + residuals[-1]
        gamma = (y - x - probes[-2]).abs().mean() / (probes[-1] - probes[-2]).abs().mean()
        return x + residuals[-2] + gamma.clip(1, 1.5) * (residuals[-1] - residuals[-2])

    return between, mask


@pytest.mark.parametrize("threshold, difference, retention", [(0.4, False, 0.2), (0.15, False, 0.0), (0.2, True, 0.0)])
def test_dicache_s_steps_and_image_are_those_of_the_published_loop(embedded_pipe, threshold, difference, retention):
    between, mask = published_dicache(embedded_pipe.transformer, threshold, difference, retention)
    with plain_loop(embedded_pipe.transformer, between):
        theirs = latents(embedded_pipe)
    cache = Cache(DiCache(threshold, difference, retention), Aligned())
    with applied(embedded_pipe, cache):
        ours = latents(embedded_pipe)
    assert cache.trace.mask == "".join(mask) and 2 < mask.count("1") < STEPS
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert {step.reused_at for step in cache.trace.steps} == {None, RESIDUAL}


def published_seacache(transformer, threshold, side, power, steps=STEPS):
    """`resolve_gate` of diffusers' hooks/sea_cache.py on FLUX's modulated input, held; with its own filter."""
    from diffusers.hooks.sea_cache import _apply_sea_filter

    s = {"total": 0.0, "before": None, "residual": None}
    mask = []

    def between(x, text, more, timestep):
        modulated = transformer.transformer_blocks[0].norm1(x, emb=more["temb"])[0]
        frames = modulated[0].reshape(1, side, side, -1)  # (T, H, W, C)
        now = _apply_sea_filter(frames, float(timestep[0]), power)
        compute = len(mask) in (0, steps - 1)
        if not compute:
            s["total"] += relative(now, s["before"])
            compute = s["total"] >= threshold
        s["before"], s["total"] = now, s["total"] * (not compute)
        mask.append("1" if compute else "0")
        if compute:
            s["residual"] = all_blocks(transformer, x, text, more) - x
        return x + s["residual"]

    return between, mask


@pytest.mark.parametrize("threshold, power", [(0.3, 2.0), (0.8, 2.0), (0.5, 3.0)])
def test_seacache_s_steps_and_image_are_those_of_diffusers_rule(embedded_pipe, threshold, power):
    between, mask = published_seacache(embedded_pipe.transformer, threshold, 8, power)
    with plain_loop(embedded_pipe.transformer, between):
        theirs = latents(embedded_pipe)
    cache = Cache(SeaCache(threshold, power))
    with applied(embedded_pipe, cache):
        ours = latents(embedded_pipe)
    assert cache.trace.mask == "".join(mask) and 2 < mask.count("1") < STEPS
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert {step.reused_at for step in cache.trace.steps} == {None, INPUT}


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.05, 0.0])
def test_its_filter_is_diffusers_own_on_one_frame(sigma):
    from diffusers.hooks.sea_cache import _apply_sea_filter

    seen = torch.randn(2, 6, 10, 5, generator=torch.Generator().manual_seed(0))
    ours = filtered(seen, torch.tensor(sigma), 2.0)
    for own, one in zip(ours, seen, strict=True):
        assert torch.allclose(own, _apply_sea_filter(one[None], sigma, 2.0)[0], atol=1e-4)


def test_of_pure_noise_the_filter_keeps_the_mean_alone_and_of_an_image_everything():
    seen = torch.randn(1, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    kept = filtered(seen, torch.tensor(1.0), 2.0)
    mean = seen.mean((1, 2), keepdim=True)
    assert torch.allclose(kept / 64, mean.expand_as(kept), atol=1e-3)  # the gains' mean is 1, all in one of 64
    assert torch.allclose(filtered(seen, torch.tensor(0.0), 2.0), seen, atol=1e-3)


@pytest.mark.parametrize("gate", [SeaCache(0), DiCache(0)], ids=lambda g: g.name)
def test_a_threshold_of_nothing_changes_nothing(embedded_pipe, gate):
    plain = latents(embedded_pipe, 5)
    with applied(embedded_pipe, cache := Cache(gate)):
        assert torch.equal(latents(embedded_pipe, 5), plain)
    assert cache.trace.mask == "11111" and cache.exact == "identical"


SAID = [
    (SeaCache(0.3), "SeaCache 0.3", families.SEACACHE),
    (SeaCache(0.3, 3.0, warm_up=2), "SeaCache 0.3, power 3, first 2 computed", families.SEACACHE),
    (DiCache(0.4), "DiCache 0.4", families.DICACHE),
    (DiCache(0.08, True, 0.0), "DiCache 0.08, against the input, first 0% computed", families.DICACHE),
    (DiCache(0.08, longest_run=2), "DiCache 0.08, at most 2 reused in a row", families.DICACHE),
]


@pytest.mark.parametrize("gate, label, family", SAID, ids=[label for _, label, _ in SAID])
def test_a_row_says_what_it_is_and_how_to_make_it_again(gate, label, family):
    cache = Cache(gate)
    meaning = study.using(cache, 28).meaning
    assert (meaning["label"], meaning["family"]) == (label, family.name)
    assert rebuilt.stack(cache.settings, cache.name, "").built[0].label == label


def test_what_makes_no_sense_is_one_sentence():
    for make in (
        lambda: SeaCache(-1),
        lambda: SeaCache(0.3, 0),
        lambda: SeaCache(0.3, "two"),
        lambda: DiCache(0.4, retention=2),
        lambda: DiCache("much"),
        lambda: Both(DiCache(0.4), FirstBlock(0.1)),
    ):
        with pytest.raises(UserError) as refused:
            make()
        assert "\n" not in str(refused.value)


def test_divided_tokens_are_refused_by_what_needs_the_grid(embedded_pipe):
    with applied(embedded_pipe, Cache(SeaCache(0.3))), attribute(embedded_pipe.transformer, SHARED, object()):
        with pytest.raises(UserError, match="all tokens of an image on one rank"):
            latents(embedded_pipe, 2)


def test_two_images_in_a_row_do_not_leak(embedded_pipe):
    for gate, how in ((SeaCache(0.5), None), (DiCache(0.3), Aligned())):
        with applied(embedded_pipe, Cache(gate, how)):
            first = latents(embedded_pipe, 8)
            latents(embedded_pipe, 6, seed=4)
            assert torch.equal(latents(embedded_pipe, 8), first)


def test_over_compiled_blocks_without_graph_breaks_the_image_is_the_same(embedded_pipe):
    """Blocks are traced by themselves, `fullgraph`, so a break is an error; what is around them stays as it is."""
    caches = [
        Cache(SeaCache(0.5)),
        Cache(DiCache(0.3), Aligned()),
        *(Cache(Interval(2), p) for p in (Spectrum(), FreqCa())),
    ]
    eager = []
    for cache in caches:
        with applied(embedded_pipe, cache):
            eager.append((latents(embedded_pipe, 6), cache.trace.mask))
    with torch.compiler.set_stance(force_backend="eager"), applied(embedded_pipe, Regional()):
        for cache, (image, mask) in zip(caches, eager, strict=True):
            with applied(embedded_pipe, cache):
                assert torch.allclose(latents(embedded_pipe, 6), image, atol=1e-4)
            assert cache.trace.mask == mask and "0" in mask
