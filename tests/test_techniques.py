"""Quantization, solvers and compilation as reversible changes of a pipeline."""

import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fluxnb.cache import first_block
from fluxnb.models import embedded, pipelines
from fluxnb.study import Subject
from fluxnb.study.pool import Pool
from fluxnb.technique import Unavailable, applied, attribute
from fluxnb.techniques import precision, svdquant
from fluxnb.techniques.precision import GGUF, BitsAndBytes, Nunchaku, Quanto, TorchAO, block_layers, gguf_blocks
from fluxnb.techniques.schedulers import DPMSolver

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


def test_a_large_matrix_is_decomposed_nearly_as_well_in_less_time(monkeypatch):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    up, down = svdquant.low_rank(weight, 8)
    exact = (weight - up @ down).norm()
    monkeypatch.setattr(svdquant, "EXACT", 64)
    before = torch.random.get_rng_state()
    up, down = svdquant.low_rank(weight, 8)
    assert (weight - up @ down).norm() < 1.01 * exact < 0.99 * weight.norm()
    assert up.shape == (96, 8) and down.shape == (8, 256)
    assert torch.equal(svdquant.low_rank(weight, 8)[0], up)  # the same every time
    assert torch.equal(torch.random.get_rng_state(), before)  # and no noise of an image is another


def test_simulated_svdquant_is_reversible_and_changes_the_image(pipe):
    plain = latents(pipe)
    technique = svdquant.SimulatedSVDQuant(rank=8)
    with applied(pipe, technique):
        rounded = latents(pipe)
        assert technique.proof["layers"] == technique.proof["of"] > 100
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


def test_the_solver_takes_the_fixed_shift_of_flux_schnell(pipe):
    """FLUX's pipelines give a shift to every scheduler, also to one that has its own."""
    schnell = FlowMatchEulerDiscreteScheduler(**embedded.SCHNELL_SCHEDULER)
    with attribute(pipe, "scheduler", schnell), applied(pipe, DPMSolver()):
        found = latents(pipe, 2)
        assert torch.isfinite(found).all() and pipe.scheduler.config.flow_shift == schnell.config.shift


ON_A_CPU = [  # and the largest relative error of a layer's output
    (TorchAO("int8"), 0.03),
    (TorchAO("int8 weight-only"), 0.02),
    (TorchAO("fp8 weight-only"), 0.04),
    (GGUF("Q8_0"), 0.01),
    (GGUF("Q5_0"), 0.06),
    (GGUF("Q4_0"), 0.12),
    (Quanto("int8"), 0.02),
    (Quanto("fp8"), 0.04),
    (Quanto("int4"), 0.25),
    (BitsAndBytes("nf4"), 0.12),
    (BitsAndBytes("fp4"), 0.15),
]


@pytest.mark.parametrize(("technique", "most"), ON_A_CPU, ids=lambda value: getattr(value, "label", ""))
def test_quantizing_is_applied_and_reversible(pipe, technique, most):
    plain = latents(pipe, 3)
    weights = [p.data_ptr() for p in pipe.transformer.parameters()]
    layers = block_layers(pipe.transformer)
    with applied(pipe, technique):
        assert technique.proof["layers"] >= 80 and technique.proof["weight"] not in ("Linear", "Parameter")
        rounded = latents(pipe, 3)
        generator = torch.Generator().manual_seed(0)
        for parent, name, linear, _ in layers:
            x = torch.randn(2, 24, linear.in_features, generator=generator)
            with torch.no_grad():
                error = (getattr(parent, name)(x) - linear(x)).norm() / linear(x).norm()
            assert error < most
    assert [p.data_ptr() for p in pipe.transformer.parameters()] == weights
    assert torch.equal(latents(pipe, 3), plain)
    assert (rounded - plain).norm() > 0


@pytest.mark.parametrize("technique", [TorchAO("int8 weight-only"), TorchAO("int8"), GGUF("Q8_0")])
def test_a_cache_on_a_quantized_transformer(pipe, technique):
    with applied(pipe, technique):
        uncached = latents(pipe, 12)
        with applied(pipe, first_block(0)):
            assert torch.equal(latents(pipe, 12), uncached)
        with applied(pipe, cache := first_block(0.3)):
            cached = latents(pipe, 12)
    assert 1 <= cache.trace.computed < 12
    assert 0 < (cached - uncached).norm() / uncached.norm() < 0.5


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_gguf_blocks_are_those_of_the_gguf_package(kind):
    import gguf

    weight = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    weight[3], weight[5, :40] = 0, 0.25
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(gguf_blocks(weight, kind), torch.from_numpy(theirs))


@pytest.mark.parametrize("make", [TorchAO, BitsAndBytes, GGUF, Quanto])
def test_unknown_kinds(make):
    with pytest.raises(ValueError, match="choose"):
        make("int3")


@pytest.mark.parametrize(
    "technique", [TorchAO("fp8 row"), TorchAO("int4 weight-only"), BitsAndBytes("int8"), Nunchaku()]
)
def test_what_cannot_run_says_what_it_needs(pipe, technique):
    weights = [p.data_ptr() for p in pipe.transformer.parameters()]
    with pytest.raises(Unavailable, match="^needs "):
        technique.apply(pipe)
    assert [p.data_ptr() for p in pipe.transformer.parameters()] == weights


class _Engine:
    """Stands in for the Nunchaku package, which has no build for this machine."""

    class NunchakuFluxTransformer2dModel:
        device = torch.device("cpu")

        @classmethod
        def from_pretrained(cls, path, torch_dtype):
            made = cls()
            made.path, made.dtype = path, torch_dtype
            return made

        def to(self, device):
            return self

    @staticmethod
    def get_precision():
        return "int4"


def test_nunchaku_takes_the_transformer_of_its_makers(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "nunchaku", _Engine)
    monkeypatch.setitem(sys.modules, "nunchaku.utils", _Engine)
    with pytest.raises(Unavailable, match="FLUX.1-dev"):  # the embedded model isn't one of theirs
        Nunchaku().apply(pipe)
    before = pipe.config["_name_or_path"]
    pipe.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    transformer = pipe.transformer
    try:
        undo = Nunchaku().apply(pipe)
        assert pipe.transformer.path == "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
        undo()
        assert pipe.transformer is transformer
    finally:
        pipe.transformer = transformer
        pipe.register_to_config(_name_or_path=before)


def test_the_other_nunchaku_is_not_mistaken_for_it(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "nunchaku", type(sys)("nunchaku"))
    with pytest.raises(Unavailable, match="of that name here is another one"):
        Nunchaku().apply(pipe)


def test_built_in_techniques_have_a_pipeline_of_their_own():
    plain, pool = Subject(MODEL, "float32", ("a red ball",), (0,), 3.5, 128, 128, 3), Pool()
    quantized = pool.get(plain.having(TorchAO("int8 weight-only")))
    assert quantized.pipe is not pool.get(plain).pipe
    assert quantized.load_gib < pool.get(plain).load_gib
    missing = plain.having(TorchAO("int4 weight-only"))
    for _ in range(2):  # the second time without loading it again
        with pytest.raises(Unavailable, match="^needs "):
            pool.get(missing)


def test_a_kernel_for_matrices_gets_one_whatever_the_shape(monkeypatch):
    layer, x, given = precision._OfMatrices(8, 4), torch.randn(2, 3, 8), []
    plain = torch.nn.functional.linear
    expected = plain(x, layer.weight, layer.bias)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: given.append(x.shape) or plain(x, *rest))
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert given == [(6, 8)]


@pytest.mark.parametrize("device, replaced", [("another", 1), ("cpu", 0)])
def test_compiled_weight_only_int8_is_a_usual_product(monkeypatch, device, replaced):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(precision._Unpacking, "device", device)  # where Inductor's own kernel is kept away
    linear = torch.nn.Linear(64, 128, dtype=torch.bfloat16)
    layer = TorchAO("int8 weight-only").convert(linear, False)
    x = torch.randn(1, 7, 64, dtype=torch.bfloat16)
    torch.compiler.reset()
    before = counters["inductor"]["woq_matcher_count"]
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(x)
        assert (compiled - linear(x)).abs().max() < 0.05
    assert counters["inductor"]["woq_matcher_count"] - before == replaced
