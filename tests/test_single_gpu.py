"""Attention kernels, compilation, the VAE's options and sparsity as reversible changes of a pipeline."""

import pytest
import torch

from fluxnb import attention, compilation, measure, pipelines, sparsity, vae
from fluxnb.cache import first_block
from fluxnb.errors import UserError
from fluxnb.params import TORCHAO
from fluxnb.precision import TorchAO
from fluxnb.technique import Unavailable, applied

MODEL = pipelines.describe("embedded")


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load("embedded", device="cpu")


def latents(pipe, steps=3):
    return pipelines.generate(pipe, ["a red ball"], [1], model=MODEL, steps=steps, output_type="latent")


def backends():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry._active_backend


@pytest.mark.parametrize("kind", ["default", "flash", "math"])
def test_an_attention_kernel_is_chosen_and_given_back(pipe, kind):
    plain, before = latents(pipe), backends()
    with applied(pipe, technique := attention.Attention(kind)):
        chosen = {b.attn.processor._attention_backend.value for b in pipe.transformer.transformer_blocks}
        assert chosen == {technique.proof["attention"]}
        assert backends() is before  # another model's choice stays its own
        assert torch.allclose(latents(pipe), plain, atol=1e-3)
    assert {b.attn.processor._attention_backend for b in pipe.transformer.transformer_blocks} == {None}
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("kind", ["cudnn", "efficient", "flash 3", "flash 4", "sage 1", "sage 2"])
def test_a_kernel_that_cannot_run_says_what_it_needs(pipe, kind):
    with pytest.raises(Unavailable, match="^needs "):
        attention.Attention(kind).apply(pipe)
    with pytest.raises(Unavailable, match="^needs "):
        attention.function(kind)


def test_errors_of_attention_are_those_of_bfloat16():
    shape = (1, 2, 96, 32)
    assert 1e-4 < attention.error("default", shape) < 1e-2
    assert attention.error("math", shape, torch.float32) < 1e-5


def test_an_attention_that_is_not_there():
    with pytest.raises(ValueError, match="choose one of default"):
        attention.Attention("flash 9")


def test_fused_projections_are_the_same_arithmetic(pipe):
    plain = latents(pipe)
    layers = list(pipe.transformer.state_dict())
    with applied(pipe, technique := compilation.FusedQKV()):
        assert pipe.transformer.transformer_blocks[0].attn.fused_projections
        assert not hasattr(pipe.transformer.transformer_blocks[0].attn.to_q, "weight")  # nothing is held twice
        assert torch.allclose(latents(pipe), plain, atol=1e-3)
        assert technique.proof["fused"].startswith("12 ")
    assert list(pipe.transformer.state_dict()) == layers
    assert torch.equal(latents(pipe), plain)


def test_quantizing_fused_projections_quantizes_the_fused_layer(pipe):
    with applied(pipe, compilation.FusedQKV(), technique := TorchAO("int8 weight-only")):
        assert type(pipe.transformer.transformer_blocks[0].attn.to_qkv.weight.data).__name__ == "Int8Tensor"
        assert technique.proof["layers"] < 104  # fewer, larger ones
        latents(pipe, 1)


@pytest.mark.parametrize(
    "technique", [compilation.CudaGraph(), compilation.TensorRT(), compilation.Whole("reduce-overhead")]
)
def test_what_cannot_be_compiled_says_what_it_needs(pipe, technique):
    before = set(vars(pipe.transformer))
    with pytest.raises(Unavailable, match="^needs "):
        technique.apply(pipe)
    assert set(vars(pipe.transformer)) == before


def test_no_cache_goes_into_what_is_compiled_or_recorded_as_a_whole(pipe, monkeypatch):
    with applied(pipe, compilation.Whole()), pytest.raises(UserError, match="compile its blocks instead"):
        first_block(0.1).apply(pipe)
    monkeypatch.setitem(vars(pipe.transformer), compilation.RECORDED, True)
    with pytest.raises(UserError, match="CUDA graph"):
        first_block(0.1).apply(pipe)


def test_counters_count_what_dynamo_compiles():
    def doubled(x):
        return 2 * x

    before = compilation.counters()
    with compilation.fresh():
        compiled = torch.compile(doubled, backend="eager")
        compiled(torch.ones(3))
        compiled(torch.ones(3, dtype=torch.float64))  # another format doesn't fit the first graph
    after = compilation.counters()
    assert after["graphs"] - before["graphs"] == 2
    assert after["recompiles"] - before["recompiles"] == 1


@pytest.mark.parametrize("technique", [vae.ChannelsLast(), vae.Sliced(), vae.Tiled(64)], ids=lambda t: t.label)
def test_vae_options_are_reversible(pipe, technique):
    z = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = vae.decode(pipe, z)
    with applied(pipe, technique):
        changed = vae.decode(pipe, z)
    assert changed.shape == plain.shape == (2, 3, 128, 128)
    difference = (changed - plain).abs().max()
    assert difference > 0.01 if isinstance(technique, vae.Tiled) else difference < 1e-3
    assert torch.equal(vae.decode(pipe, z), plain)


def test_a_tile_as_large_as_the_image_changes_nothing(pipe):
    z = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with applied(pipe, vae.Tiled(128)):
        assert torch.equal(vae.decode(pipe, z), pipe.vae.decoder(z))


def test_a_tile_that_does_not_fit():
    with pytest.raises(ValueError, match="multiple of 16"):
        vae.Tiled(40)


def test_pruning_keeps_the_two_largest_of_four():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.1, 0.2, -0.4, 0.3]])
    kept = torch.tensor([[0.0, -3.0, 2.0, 0.0, 0.0, 0.0, -0.4, 0.3]])
    assert torch.equal(sparsity.pruned(weight), kept)


def test_rows_are_rounded_with_a_scale_of_their_own():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [10.0], [0.1], [0.0]])
    values, scale = sparsity.rounded(x)
    assert values.dtype == torch.int8 and values[:3].abs().amax(1).tolist() == [127] * 3
    assert (values * scale - x).abs().max() <= scale.max() / 2 * 1.001
    assert values[3].abs().max() == 0


def test_sparse_int8_says_what_it_needs(pipe):
    with pytest.raises(Unavailable, match="^needs a CUDA GPU"):
        sparsity.SparseInt8().apply(pipe)


def test_kernels_are_named_by_what_took_longest():
    a = torch.randn(400, 400)
    named = measure.kernels(lambda: [a @ a for _ in range(3)] and a.exp(), top=2)
    assert named[0].startswith("mm ×3 ") and named[0].endswith("%") and len(named) == 2


def test_the_parameters_name_the_kinds_of_torchao():
    assert tuple(TorchAO.KINDS) == TORCHAO
