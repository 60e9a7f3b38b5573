"""Norm, modulation and rounding to FP8 as one kernel: its arithmetic, and its place in the blocks."""

import functools
import importlib
import os

import pytest
import torch
from peft import LoraConfig
from test_single_gpu import fp8 as fp8_pipe  # noqa: F401 (a fixture)
from test_single_gpu import latents

from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques import (
    FusedGELU,
    FusedNorm,
    FusedRoPE,
    LateScales,
    ModulationAhead,
    compilation,
    fused,
    norms,
    rounded,
)

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
    theirs = Float8Tensor.from_hp(
        (normed * (1 + t["scale"][:, None]) + t["shift"][:, None]).flatten(0, 1), granularity=PerRow()
    )
    rows, scales = norms.norm_round(t["x"], t["before"], t["scale"], t["shift"], EPS)
    assert torch.equal(rows.float(), theirs.qdata.float()) and torch.equal(scales, theirs.scale)
    summed, rows, scales = norms.add_norm_round(t["x"], t["added"], t["gate"], t["scale"], t["shift"], EPS)
    assert torch.equal(summed, t["x"] + t["gate"][:, None] * t["added"])
    assert unequal(rows, exact(t["x"], None, t["scale"], t["shift"], t["added"], t["gate"])[0]) < 0.15


def test_operations_are_declared_as_they_are():
    t = given(4, 96)
    torch.library.opcheck(norms.norm_round, (t["x"], t["before"], t["scale"], t["shift"], EPS))
    torch.library.opcheck(norms.add_norm_round, (t["x"], t["added"], t["gate"], t["scale"], t["shift"], EPS))
    torch.library.opcheck(norms.round_rows, (t["x"],))


def test_a_pipeline_with_fused_norms_gives_the_same_numbers(fp8_pipe):  # noqa: F811
    plain = latents(fp8_pipe)
    with applied(fp8_pipe, FusedGELU(), technique := FusedNorm()):
        assert technique.proof == {"norms": "of 12 blocks in fluxnb::norm_round"}
        assert torch.equal(latents(fp8_pipe), plain)
        with applied(fp8_pipe, FusedRoPE(), ModulationAhead()):
            assert (latents(fp8_pipe) - plain).norm() / plain.norm() < 1e-2
    assert torch.equal(latents(fp8_pipe), plain)
    assert all(type(p).__name__ == "FluxAttnProcessor" for p in fp8_pipe.transformer.attn_processors.values())


def test_fused_norms_are_compiled_without_breaks(fp8_pipe):  # noqa: F811
    plain = latents(fp8_pipe)
    with applied(fp8_pipe, FusedGELU(), FusedNorm(), FusedRoPE()):
        blocks = [fp8_pipe.transformer.transformer_blocks[0], fp8_pipe.transformer.single_transformer_blocks[0]]
        for block in blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        before = compilation.counters()
        assert (latents(fp8_pipe) - plain).norm() / plain.norm() < 1e-2
        after = compilation.counters()
        assert (after["graphs"] - before["graphs"], after["breaks"] - before["breaks"]) == (2, 0)
        for block in blocks:
            block._compiled_call_impl = None


def test_a_layer_with_a_lora_around_it_is_given_what_it_reads(fp8_pipe):  # noqa: F811
    transformer = fp8_pipe.transformer
    with applied(fp8_pipe, FusedGELU(), FusedNorm()):
        plain = latents(fp8_pipe)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp", "add_q_proj"], init_lora_weights=False))
        assert not torch.allclose(latents(fp8_pipe), plain)
        transformer.delete_adapters("default")
        assert torch.equal(latents(fp8_pipe), plain)


def test_what_fused_norms_need_is_said_before_anything_changes(fp8_pipe):  # noqa: F811
    plain = pipelines.load("embedded", device="cpu")
    for pipe, before in ((plain, ()), (plain, (FusedGELU(),)), (fp8_pipe, ())):
        with applied(pipe, *before):
            kinds = {type(module) for module in pipe.transformer.modules()}
            with pytest.raises(Unavailable, match="^needs TorchAO FP8 per row and the fused GELU before it"):
                FusedNorm().apply(pipe)
            assert {type(module) for module in pipe.transformer.modules()} == kinds
    with applied(fp8_pipe, FusedGELU(), FusedNorm()):
        with pytest.raises(UserError, match="Layers can't be offloaded one by one while fused norm is on"):
            fp8_pipe.enable_sequential_cpu_offload(device="cpu")


def test_scales_applied_late_are_the_same_product(fp8_pipe):  # noqa: F811
    linear = fp8_pipe.transformer.single_transformer_blocks[0].proj_out
    rows, scales = rounded.rows(drawn(8, linear.in_features))
    exact = (rows.double() * scales) @ (linear.weight.qdata.double() * linear.weight.scale).T + linear.bias.double()
    for late in (False, True):
        found = rounded.product(rows, scales, linear, late)
        assert found.dtype == torch.bfloat16 and (found - exact).norm() / exact.norm() < 4e-3
    with pytest.raises(Unavailable, match="^needs TorchAO FP8 per row and the fused GELU before it"):
        LateScales().apply(fp8_pipe)
    made: list = []  # by the first block, whose input is the same: after it roundings differ, and add up
    fp8_pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda *given: made.append(torch.cat(given[-1], 1))
    )
    with applied(fp8_pipe, FusedGELU()):
        plain = latents(fp8_pipe)
        with applied(fp8_pipe, technique := LateScales(), FusedNorm()):
            assert technique.proof == {"scales": "of 16 products applied after them"}
            count = len(made)
            assert not torch.equal(latents(fp8_pipe), plain)
        assert 0 < (made[count] - made[0]).norm() / made[0].norm() < 5e-3
        assert torch.equal(latents(fp8_pipe), plain)


# --- the kernels ---


def _to_nearest(original, values, kind, target, rounding):
    """Triton's interpreter (3.6) cuts float32 off where a GPU rounds to the nearest, and loses what it carries."""
    formats = {"bf16": (torch.bfloat16, torch.int16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8)}
    if str(kind) != "fp32" or str(target) not in formats:
        return original(values, kind, target, rounding)
    rounded, bits = formats[str(target)]
    found = torch.tensor(values.view("float32").clip(-448, 448) if "8" in str(target) else values.view("float32"))
    return found.to(rounded).view(bits).numpy().view(f"uint{8 * found.to(rounded).itemsize}")


@pytest.fixture
def kernels(monkeypatch):
    """The module of kernels, run by Triton's interpreter; tests below run them on a GPU."""
    why = "needs Triton, and TRITON_INTERPRET=1 from the start: its interpreter runs kernels on a CPU"
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason=why)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(why)
    monkeypatch.setattr(interpreter, "_convert_float", functools.partial(_to_nearest, interpreter._convert_float))
    return importlib.import_module("fluxnb.techniques.triton_kernels")


@pytest.mark.parametrize(("text", "width"), [(0, 96), (4, 384), (4, 3072)])
def test_the_kernel_is_the_exact_norm_rounded_once(kernels, text, width):
    t = given(text, width)
    before, x, scale, shift = t["before"], t["x"], t["scale"], t["shift"]
    _, rows, scales = kernels.norm_round(x, before, None, None, scale, shift, EPS)
    wanted, sizes = exact(x, before, scale, shift)
    assert unequal(rows, wanted) < 0.005 and torch.allclose(scales, sizes, rtol=0.005)
    summed, rows, scales = kernels.norm_round(x, None, t["added"], t["gate"], scale, shift, EPS)
    wanted, sizes = exact(x, None, scale, shift, t["added"], t["gate"])
    assert torch.equal(summed.double(), (x.double() + t["gate"].double()[:, None] * t["added"]).bfloat16().double())
    assert unequal(rows, wanted) < 0.005 and torch.allclose(scales, sizes, rtol=0.005)
    _, rows, scales = kernels.norm_round(x, None, None, None, None, None, EPS)
    assert unequal(rows, norms.round_rows(x)[0]) < 0.005 and torch.equal(scales, norms.round_rows(x)[1])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("text", [0, 4])
def test_the_kernel_of_norm_and_positions_gives_what_the_layers_do(kernels, text, rounded):
    heads = [drawn(2, 6, 3 * 128).unflatten(-1, (3, 128)), drawn(128), None, None]
    if text:
        heads[2:] = drawn(2, text, 3 * 128, seed=1).unflatten(-1, (3, 128)), drawn(128, seed=2)
    angles = [drawn(6 + text, 128, seed=i).float() for i in (3, 4)]
    found = kernels.norm_rope(*heads, *angles, EPS, rounded)
    # in FP8 the layers round twice, to bfloat16 first
    assert unequal(found, fused.norm_rope(*heads, *angles, EPS, rounded)) < (0.05 if rounded else 0.01)


@pytest.mark.parametrize(("add", "norm"), [(True, True), (False, True), (False, False)])
def test_the_kernel_compiles_for_a_hopper_gpu_where_there_is_none(add, norm):
    """To machine code, with the GPU's own conversion to FP8."""
    why = "needs Triton, which compiles for a GPU without one (and doesn't under TRITON_INTERPRET=1)"
    triton = pytest.importorskip("triton", reason=why)
    if "nvidia" not in getattr(triton.backends, "backends", {}) or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(why)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = importlib.import_module("fluxnb.techniques.triton_kernels")._norm_round
    fixed = {"ADD": add, "NORM": norm, "WIDTH": 4096}
    formats = {"rounded": "*fp8e4nv", "scales": "*fp32", "eps": "fp32", "limit": "fp32"}
    formats |= dict.fromkeys(("before", "x", "added", "gate", "scale", "shift", "summed"), "*bf16")
    signature = {name: "constexpr" if name in fixed else formats.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"] and "e4m3x2" in made.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for a GPU")
@pytest.mark.parametrize(("text", "width"), [(0, 96), (4, 384), (4, 3072)])
def test_the_kernel_does_the_same_on_a_gpu(text, width):
    t = given(text, width)
    on = {name: None if x is None else x.cuda() for name, x in t.items()}
    rows, scales = norms.norm_round(on["x"], on["before"], on["scale"], on["shift"], EPS)
    wanted, sizes = exact(t["x"], t["before"], t["scale"], t["shift"])
    assert unequal(rows, wanted) < 0.005 and torch.allclose(scales.cpu(), sizes, rtol=0.005)
    summed, rows, scales = norms.add_norm_round(on["x"], on["added"], on["gate"], on["scale"], on["shift"], EPS)
    wanted, sizes = exact(t["x"], None, t["scale"], t["shift"], t["added"], t["gate"])
    assert torch.allclose(summed.cpu().float(), t["x"] + t["gate"].float()[:, None] * t["added"], rtol=0.01, atol=1e-3)
    assert unequal(rows, wanted) < 0.005 and torch.allclose(scales.cpu(), sizes, rtol=0.005)
    rows, scales = norms.round_rows(on["x"])
    assert unequal(rows, norms.round_rows(t["x"])[0]) < 0.005 and torch.equal(scales.cpu(), norms.round_rows(t["x"])[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for a GPU")
@pytest.mark.parametrize("text", [0, 64])
def test_norm_and_positions_are_rounded_to_fp8_on_a_gpu(text):
    heads = [drawn(2, 96, 3 * 24 * 128).chunk(3, -1)[1].unflatten(-1, (24, 128)), drawn(128), None, None]
    if text:
        heads[2:] = drawn(2, text, 24 * 128, seed=1).unflatten(-1, (24, 128)), drawn(128, seed=2)
    angles = [drawn(96 + text, 128, seed=i).float() for i in (3, 4)]
    on = [None if x is None else x.cuda() for x in (*heads, *angles)]
    assert unequal(fused.norm_rope(*on, EPS, True), fused.norm_rope(*heads, *angles, EPS, True)) < 0.05
