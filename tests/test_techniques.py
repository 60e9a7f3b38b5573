"""Quantization, solvers and compilation as reversible changes of a pipeline."""

import pytest
import torch

from fluxnb import pipelines, svdquant
from fluxnb.precision import Nunchaku, TorchAOInt4
from fluxnb.schedulers import DPMSolver
from fluxnb.technique import Unavailable, applied

MODEL = pipelines.describe("embedded")


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load("embedded", device="cpu")


def latents(pipe, steps=6):
    return pipelines.generate(pipe, ["a red ball"], [1], model=MODEL, steps=steps, output_type="latent")


def test_rounding_has_fifteen_values_per_group():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    y = svdquant.rounded(x)
    group = y[0, :64] / (x[0, :64].abs().max() / 7)
    assert torch.allclose(group, group.round(), atol=1e-4) and group.abs().max() <= 7.001
    assert (x - y).abs().max() <= x.abs().max() / 14 * 1.001


def test_more_rank_comes_nearer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96)
    x = torch.randn(8, 128)
    with torch.no_grad():
        errors = [(svdquant.SimulatedLinear(linear, rank)(x) - linear(x)).abs().mean() for rank in (1, 32, 96)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4  # everything is in the 16-bit part


def test_simulated_svdquant_is_reversible_and_changes_the_image(pipe):
    plain = latents(pipe)
    technique = svdquant.SimulatedSVDQuant(rank=8)
    with applied(pipe, technique):
        rounded = latents(pipe)
        assert technique.applied_to > 100
        assert not any(type(m) is torch.nn.Linear for m in pipe.transformer.transformer_blocks.modules())
    assert torch.equal(latents(pipe), plain)
    change = (rounded - plain).abs().mean() / plain.abs().mean()
    assert 0.01 < change < 0.6


def test_solver_is_reversible_and_converges_to_the_same_image(pipe):
    before, fine = pipe.scheduler, latents(pipe, 28)
    with applied(pipe, DPMSolver()):
        assert pipe.scheduler is not before
        near, far = latents(pipe, 28), latents(pipe, 6)
    assert pipe.scheduler is before
    assert torch.equal(latents(pipe, 28), fine)
    assert (near - fine).abs().mean() < (far - fine).abs().mean()
    assert (near - fine).abs().mean() < 0.1 * fine.abs().mean()


@pytest.mark.parametrize("technique", [TorchAOInt4(), Nunchaku()])
def test_what_cannot_run_says_what_it_needs(pipe, technique):
    weights = [p.data_ptr() for p in pipe.transformer.parameters()]
    with pytest.raises(Unavailable, match="^needs "):
        technique.apply(pipe)
    assert [p.data_ptr() for p in pipe.transformer.parameters()] == weights
