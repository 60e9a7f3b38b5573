"""Norm, modulation and rounding to FP8 as one kernel: its arithmetic, and its place in the blocks."""

import os

import pytest
import torch
from peft import LoraConfig
from test_single_gpu import fp8 as fp8_pipe  # noqa: F401 (a fixture)
from test_single_gpu import latents

from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques import FusedGELU, FusedNorm, FusedQKV, FusedRoPE, ModulationAhead, compilation, fused, norms

EPS = 1e-6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def given(text: int, width: int) -> dict:
    """Tokens of two images and their modulation, each a part of something larger, as in the model."""
    gate, scale, shift = drawn(2, 6 * width, seed=1).chunk(6, dim=1)[1:4]
    x, before, added = drawn(2, 12, width)[:, 5:], drawn(2, text, width, seed=2), drawn(2, 9, width, seed=3)[:, 2:]
    return {"x": x, "before": before if text else None, "added": added, "gate": gate, "scale": scale, "shift": shift}


def exact(x, before, scale, shift, added=None, gate=None):
    """The same in float64, rounded where the kernel's results are."""
    if added is not None:
        x = (x.double() + gate.double()[:, None] * added.double()).bfloat16()
    x = (x if before is None else torch.cat([before, x], 1)).double()
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
    rows = (normed * (1 + scale.double()[:, None]) + shift.double()[:, None]).flatten(0, 1).bfloat16().double()
    scales = (rows.abs().amax(1, keepdim=True) / 448).bfloat16().double()
    return (rows / scales).float().to(torch.float8_e4m3fn), scales.float()


def unequal(got, want) -> float:
    return (got.cpu().float() != want.float()).float().mean().item()


@pytest.mark.parametrize("text", [0, 4])
def test_the_operation_is_the_norm_as_its_layers_compute_it_and_torchaos_rounding(text):
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

    t = given(text, 96)
    both = t["x"] if t["before"] is None else torch.cat([t["before"], t["x"]], 1)
    normed = torch.nn.LayerNorm(96, EPS, elementwise_affine=False)(both)
    theirs = Float8Tensor.from_hp((normed * (1 + t["scale"][:, None]) + t["shift"][:, None]).flatten(0, 1), granularity=PerRow())
    rows, scales = norms.norm_round(t["x"], t["before"], t["scale"], t["shift"], EPS)
    assert torch.equal(rows.float(), theirs.qdata.float()) and torch.equal(scales, theirs.scale)
    summed, rows, scales = norms.add_norm_round(t["x"], t["added"], t["gate"], t["scale"], t["shift"], EPS)
    assert torch.equal(summed, t["x"] + t["gate"][:, None] * t["added"])
    assert unequal(rows, exact(t["x"], None, t["scale"], t["shift"], t["added"], t["gate"])[0]) < 0.15


def test_operations_are_declared_as_they_are():
    t = given(4, 96)
    torch.library.opcheck(norms.norm_round, (t["x"], t["before"], t["scale"], t["shift"], EPS))
    torch.library.opcheck(norms.add_norm_round, (t["x"], t["added"], t["gate"], t["scale"], t["shift"], EPS))


def test_a_pipeline_with_fused_norms_gives_the_same_numbers(fp8_pipe):  # noqa: F811
    plain, around = latents(fp8_pipe), (FusedGELU(), FusedNorm())
    with applied(fp8_pipe, FusedGELU(), technique := FusedNorm()):
        assert technique.proof == {"norms": "of 12 blocks in fluxnb::norm_round"}
        assert torch.equal(latents(fp8_pipe), plain)
        with applied(fp8_pipe, FusedRoPE(), ModulationAhead()):
            assert (latents(fp8_pipe) - plain).norm() / plain.norm() < 1e-2
    assert torch.equal(latents(fp8_pipe), plain)
    assert all(type(p).__name__ == "FluxAttnProcessor" for p in fp8_pipe.transformer.attn_processors.values())
