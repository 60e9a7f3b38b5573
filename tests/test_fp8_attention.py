"""Attention whose products are in FP8: its arithmetic, its place in the transformer, and the package it comes from."""

import sys
import types

import pytest
import torch
from test_single_gpu import latents

from fluxnb.models import pipelines
from fluxnb.technique import Changes, Unavailable, applied
from fluxnb.techniques import attention, compilation, fp8_attention, fused, processor


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load("embedded", device="cpu")


def drawn_heads(width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 96, 3, width, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("width", [32, 128])
def test_fp8_attention_is_attention_up_to_its_rounding(width):
    q, k, v = drawn_heads(width)
    exact = attention._exact(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    error = (fp8_attention.simulated(q, k, v) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.08
    v[:, :, 1] *= 1000  # a head far larger than the others costs them nothing
    apart = fp8_attention.simulated(q, k, v)[:, :, [0, 2]] - exact[:, :, [0, 2]]
    assert apart.norm() / exact[:, :, [0, 2]].norm() < 0.08


def test_flash_attention_3_is_given_narrow_heads_with_zeros_beside_them():
    q, k, v = drawn_heads(32, torch.bfloat16)
    given = {}

    def attend(query, key, value, softmax_scale, v_descale):
        given.update(shape=tuple(query.shape), formats={x.dtype for x in (query, key, value)}, scale=softmax_scale)
        x = (t.float().transpose(1, 2) for t in (query, key, value))
        q, k, v = x
        out = (q @ k.mT * softmax_scale).softmax(-1) @ v * v_descale[:, :, None, None]
        return out.transpose(1, 2).to(torch.bfloat16), None

    out = fp8_attention.by_flash_3(attend, q, k, v)
    assert given == {"shape": (2, 96, 3, 64), "formats": {torch.float8_e4m3fn}, "scale": 32**-0.5}
    error = (out.float() - fp8_attention.simulated(q, k, v).float()).norm() / out.float().norm()
    assert out.shape == v.shape and out.dtype == torch.bfloat16 and error < 0.03  # of the weights, left unrounded here


def test_fp8_attention_is_put_on_compiled_and_taken_off(pipe):
    plain = latents(pipe)
    with applied(pipe, technique := fp8_attention.FP8Attention(simulated=True)):
        assert technique.proof == {"attention": "of 12 layers in FP8 by PyTorch"}
        rounded = latents(pipe)
        assert 1e-3 < (rounded - plain).norm() / plain.norm() < 0.3
        with applied(pipe, fused.FusedRoPE()):  # which leaves the rounding of query and key to the attention
            assert (latents(pipe) - rounded).norm() / plain.norm() < 0.05
        with applied(pipe, compilation.Regional()):
            breaks = compilation.counters()["breaks"]
            assert (latents(pipe) - rounded).norm() / plain.norm() < 0.1
            assert compilation.counters()["breaks"] == breaks
    assert torch.equal(latents(pipe), plain)


def test_fp8_attention_takes_no_mask_and_no_exchange(pipe):
    attn = pipe.transformer.single_transformer_blocks[0].attn
    hidden = torch.randn(1, 8, attn.inner_dim)
    with applied(pipe, fp8_attention.FP8Attention(simulated=True)):
        with pytest.raises(ValueError, match="takes no mask"):
            attn(hidden_states=hidden, attention_mask=torch.ones(1, 1, 8, 8))
        with Changes("spread") as changes, pytest.raises(Unavailable, match="needs a whole sequence on each"):
            processor.fill(pipe.transformer, "_exchange", processor.Exchange(), changes)
    with Changes("spread") as changes:
        processor.fill(pipe.transformer, "_exchange", processor.Exchange(), changes)
        with pytest.raises(Unavailable, match="needs a whole sequence on each"):
            fp8_attention.FP8Attention(simulated=True).apply(pipe)
        changes.take_back()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a Hopper GPU has it")
def test_fp8_attention_says_what_it_needs(pipe):
    with pytest.raises(Unavailable, match=r"^needs a Hopper GPU \(H100, H200\); `simulated=True`"):
        fp8_attention.FP8Attention().apply(pipe)


def test_flash_attention_3_comes_from_either_package(monkeypatch):
    with pytest.raises(Unavailable, match="flash_attn_interface or fa3_fwd_interface: `pip install --no-deps fa3-fwd`"):
        attention.flash_3()
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", there := types.ModuleType("fa3_fwd_interface"))
    assert attention.flash_3() is there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for a GPU")
def test_flash_attention_3_in_fp8_is_the_simulated_arithmetic():
    for width in (32, 128):
        q, k, v = (x.cuda() for x in drawn_heads(width, torch.bfloat16))
        out = fp8_attention._flash_3()(q, k, v).float()
        ours = fp8_attention.simulated(q, k, v).float()
        assert (out - ours).norm() / ours.norm() < 0.02
