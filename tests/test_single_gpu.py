"""Attention kernels, compilation, the VAE's options and sparsity as reversible changes of a pipeline."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fluxnb import techniques
from fluxnb.cache import Cache, Hold, Interval, Schedule, first_block
from fluxnb.errors import UserError
from fluxnb.measure import ceilings, latency
from fluxnb.models import pipelines
from fluxnb.technique import Technique, Unavailable, applied
from fluxnb.techniques import (
    attention,
    compilation,
    fused,
    hook_search,
    kinds,
    modulation,
    precision,
    sparsity,
    vae,
)
from fluxnb.techniques.precision import TorchAO, block_layers

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has some of them")
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


def test_projections_can_be_fused_in_single_blocks_alone(pipe):
    plain, transformer = latents(pipe), pipe.transformer
    with applied(pipe, technique := compilation.FusedQKV(double=False)):
        assert transformer.transformer_blocks[0].attn.to_q.weight.ndim == 2
        assert transformer.single_transformer_blocks[0].attn.fused_projections
        assert torch.allclose(latents(pipe), plain, atol=1e-3)
        assert technique.proof["fused"] == f"{len(transformer.single_transformer_blocks)} attention layers"
    assert compilation.FusedQKV().settings != technique.settings


def test_quantizing_fused_projections_quantizes_the_fused_layer(pipe):
    with applied(pipe, compilation.FusedQKV(), technique := TorchAO("int8 weight-only")):
        assert type(pipe.transformer.transformer_blocks[0].attn.to_qkv.weight.data).__name__ == "Int8Tensor"
        assert technique.proof["layers"] < 104  # fewer, larger ones
        latents(pipe, 1)


@pytest.mark.parametrize(
    "technique",
    [
        compilation.CudaGraph(),
        compilation.CudaGraph(blocks=True),
        compilation.TensorRT(),
        compilation.TextEncoders(record=True),
        compilation.Whole("reduce-overhead"),
    ],
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


@pytest.fixture
def recorder(monkeypatch):
    """What a CUDA graph does, on a CPU: always the same memory, of which the caller has copies only."""
    from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

    def record(function, leaves, form):
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        outputs = tree_map(torch.clone, function(**tree_unflatten(inputs, form)))

        def replay():
            new = tree_leaves(function(**tree_unflatten(inputs, form)))
            for memory, value in zip(tree_leaves(outputs), new, strict=True):
                memory.copy_(value)

        for memory in tree_leaves(outputs):
            memory.fill_(torch.nan)  # a recording computes nothing
        return replay, inputs, outputs

    monkeypatch.setattr(compilation, "_record", record)
    monkeypatch.setattr(compilation, "_check_recordable", lambda transformer: None)


def test_a_recorded_step_is_the_step(pipe, recorder):
    plain = latents(pipe)
    for graph in (compilation.CudaGraph(), compilation.CudaGraph(blocks=True)):
        with applied(pipe, graph, modulation.ModulationAhead()):
            assert torch.allclose(latents(pipe), plain, atol=1e-4), graph.label
            assert graph.proof["recorded"] == "1 graph"
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("cache", [first_block(0.5), Cache(Interval(3)), Cache(Schedule("11010101", False), Hold())])
def test_a_cache_goes_on_top_of_recorded_blocks_and_below_them(pipe, recorder, cache):
    with applied(pipe, cache):
        plain, mask = latents(pipe, 8), cache.trace.mask
    assert "0" in mask
    for chosen in ((compilation.CudaGraph(blocks=True), cache), (cache, compilation.CudaGraph(blocks=True))):
        with applied(pipe, *chosen):
            assert torch.equal(latents(pipe, 8), plain) and cache.trace.mask == mask
    assert not {"transformer_blocks", "forward"} & set(vars(pipe.transformer))


def test_no_blocks_are_recorded_between_which_a_controlnet_adds(recorder):
    controlnet = pipelines.load_controlnet("embedded", device="cpu")
    pipe = pipelines.as_use_case(pipelines.load("embedded", device="cpu"), "ControlNet txt2img", controlnet)
    with pytest.raises(Unavailable, match="^needs a pipeline without ControlNet"):
        compilation.CudaGraph(blocks=True).apply(pipe)


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


@torch._dynamo.config.patch(recompile_limit=1)
def test_one_process_compiles_more_variants_of_a_block_than_pytorch_expects():
    class Block(torch.nn.Module):
        def compile(self, **how):
            super().compile(backend="eager", **how)  # Dynamo's part of it is what counts them

        def forward(self, x):
            return 2 * x

    block = Block()
    tiny = SimpleNamespace(transformer=SimpleNamespace(transformer_blocks=[block], single_transformer_blocks=[]))
    with compilation.fresh(), applied(tiny, compilation.Regional()):
        for dtype in (torch.float32, torch.float64):  # what is compiled for one format doesn't fit the other
            assert block(torch.zeros(3, dtype=dtype)).dtype == dtype


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_made_on_the_device_are_those_made_on_the_host(pipe, dtype):
    pixels = torch.linspace(-1.2, 1.2, 2 * 3 * 64 * 64).view(2, 3, 64, 64).to(dtype)  # every byte, and what is clipped
    convert = pipe.image_processor.postprocess
    plain = [np.asarray(picture) for picture in convert(pixels)]
    with applied(pipe, vae.BytesOnDevice()):
        made = pipe.image_processor.postprocess(pixels)
        numbers = pipe.image_processor.postprocess(pixels, output_type="pt")
    assert [(m.mode, m.size) for m in made] == [("RGB", (64, 64))] * 2
    assert all(np.array_equal(m, p) for m, p in zip(made, plain, strict=True)) and len(np.unique(plain)) == 256
    assert torch.equal(numbers, convert(pixels, output_type="pt"))
    assert pipe.image_processor.postprocess == convert


def test_hooks_are_looked_for_once(pipe, monkeypatch):
    from diffusers.hooks import group_offloading as offloading

    looked, original = [], offloading._get_top_level_group_offload_hook
    monkeypatch.setattr(
        offloading, "_get_top_level_group_offload_hook", lambda module: looked.append(module) or original(module)
    )

    def made():
        looked.clear()
        return pipelines.generate(pipe, ["a red ball"], [1], model=MODEL, steps=2)[0].tobytes()

    plain = made()
    assert pipe.transformer in looked and pipe.text_encoder_2 in looked
    with applied(pipe, technique := hook_search.NoHookSearch()):
        assert made() == plain and looked == [] and technique.proof["without a hook"].startswith("all of ")
        assert pipe._execution_device == torch.device("cpu")
    assert made() == plain and pipe.transformer in looked


def test_hooks_that_are_there_are_looked_for(pipe):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(Unavailable, match="^needs a pipeline without hooks"):
            hook_search.NoHookSearch().apply(pipe)
    finally:
        pipe.transformer.disable_cache()
    with applied(pipe, hook_search.NoHookSearch()):
        pass


def test_compiled_text_encoders_say_the_same(pipe):
    prompt, tokens = ["a red circle"], MODEL.tokens
    technique = compilation.TextEncoders()

    def encoded():
        with torch.no_grad():
            return pipe.encode_prompt(prompt, None, max_sequence_length=tokens)[:2]

    plain = encoded()
    with compilation.fresh():
        before = compilation.counters()
        with applied(pipe, technique):
            compiled = encoded()
        said = {name: count - before[name] for name, count in compilation.counters().items()}
    assert technique.proof == {"text encoders": "4 blocks compiled"}
    # CLIP's block, T5's first, which makes positions, and its others
    assert said["graphs"] == 3 and said["breaks"] == 0
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, compiled, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, encoded(), strict=True))


def test_recorded_text_encoders_say_the_same_for_every_prompt(pipe, recorder):
    technique = compilation.TextEncoders(record=True)

    def encoded(*prompts, tokens=MODEL.tokens):
        with torch.no_grad():
            return pipe.encode_prompt(list(prompts), None, max_sequence_length=tokens)[:2]

    red, blue = "a red circle", "a blue cube"
    asked = [((red,), {}), ((blue,), {}), ((blue, red), {}), ((blue,), {"tokens": 16})]
    plain = [encoded(*prompts, **how) for prompts, how in asked]
    with applied(pipe, technique):
        for (prompts, how), expected in zip(asked, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(encoded(*prompts, **how), expected, strict=True)), prompts
    # CLIP's number of tokens is always the same
    assert technique.proof == {"text_encoder recorded": "2 graphs", "text_encoder_2 recorded": "3 graphs"}
    assert "forward" not in vars(pipe.text_encoder) | vars(pipe.text_encoder_2)


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
    named = latency.kernels(lambda: [a @ a for _ in range(3)] and a.exp(), top=2)
    assert named[0].startswith("mm ×3 ") and named[0].endswith("%") and len(named) == 2


def test_kernels_belong_to_a_kind():
    spent = {"nvjet_sm90_tst": (2e-3, 4), "cudnn_sdpa_fprop": (1e-3, 1), "triton_red_fused": (5e-4, 2), "mm": (1e-3, 1)}
    spent |= {"ncclDevKernel_AllGather": (3e-3, 2), "Memcpy PtoP": (1e-3, 2), "barrier_kernel": (5e-4, 2)}
    assert latency.by_kind(spent) == {
        "communication": 4.5,
        "attention": 1.0,
        "matrix products": 3.0,
        "the rest": 0.5,
    }
    a = torch.randn(300, 300)
    parts = latency.by_kind(latency.kernel_times(lambda: (a @ a).exp()))
    assert parts["matrix products"] > 0 and parts["the rest"] > 0 and parts["attention"] == 0


def test_work_and_limit_of_a_step(pipe):
    work = ceilings.step_work(SimpleNamespace(model=MODEL, width=128, height=128))
    with FlopCounterMode(display=False) as counter:
        pipelines.generate(pipe, ["a cat"], [0], model=MODEL, steps=1)
    counts = counter.get_flop_counts()["FluxTransformer2DModel"]
    assert work.products == sum(flop for op, flop in counts.items() if op.__name__ in ("mm", "addmm"))
    weights = sum(linear.weight.numel() for _, _, linear, modulates in block_layers(pipe.transformer) if not modulates)
    # a weight of a single block meets all 88 tokens, one of a double block 64 or 24 of them
    assert 2 * 24 * weights < work.products < 2 * 88 * weights
    assert work.attention == 4 * 12 * (64 + 24) ** 2 * 160
    reached = ceilings.Ceilings({"float32": 1e9}, 2e9)
    assert reached.step_s(work, "float32") == work.products / 1e9 + work.attention / 2e9
    assert reached.step_s(work, "fp8") is None


def test_the_work_of_a_step_at_full_size():
    work = ceilings.step_work(SimpleNamespace(model=pipelines.describe("flux-dev-random"), width=1024, height=1024))
    assert work.products + work.attention == pytest.approx(74.4e12, rel=0.001)  # FLUX.1-dev's


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_a_product_without_matrix_units_says_so(dtype):
    if torch.cuda.is_available():
        pytest.skip("the GPU has them")
    run, flop = ceilings.matmul(64, dtype)
    assert flop == 2 * 64**3
    with pytest.raises(Unavailable, match="^needs a GPU"):
        run()


def test_every_kind_of_a_technique_has_a_class_that_makes_it():
    made = [(TorchAO, kinds.TORCHAO), (precision.BitsAndBytes, kinds.BITSANDBYTES), (precision.GGUF, kinds.GGUF)]
    made += [(precision.Quanto, kinds.QUANTO), (attention.Attention, kinds.ATTENTION)]
    labels = [make(kind).label for make, names in made for kind in names]
    assert len(set(labels)) == len(labels)
    assert all(issubclass(getattr(techniques, name), Technique) for name in kinds.VAE.values())


# --- GELU fused into its neighbours ---


def test_gelu_in_the_product_is_the_same_arithmetic(pipe):
    plain = latents(pipe)
    with applied(pipe, technique := fused.FusedGELU()):
        assert technique.proof == {"gelu": "of 16 layers in aten::_addmm_activation"}
        assert torch.allclose(latents(pipe), plain, atol=1e-4)
        blocks = [pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[0]]
        for block in blocks:
            block.compile(fullgraph=True)
        before = compilation.counters()
        assert torch.allclose(latents(pipe), plain, atol=1e-4)
        after = compilation.counters()
        assert (after["graphs"] - before["graphs"], after["breaks"] - before["breaks"]) == (2, 0)
        for block in blocks:
            block._compiled_call_impl = None
    assert torch.equal(latents(pipe), plain)


@pytest.fixture
def fp8():
    """The embedded model with torchao's FP8 matrices, put in directly: `quantize_` refuses where they aren't fast."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import (
        Float8Tensor,
        QuantizeTensorToFloat8Kwargs,
    )

    own = pipelines.load("embedded", dtype="bfloat16", device="cpu")
    for _, _, linear, _ in block_layers(own.transformer):
        weight = Float8Tensor.from_hp(
            linear.weight.data,
            granularity=PerRow(),
            mm_config=Float8MMConfig(use_fast_accum=False),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()),
        )
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return own


def test_gelu_in_the_rounding_is_the_arithmetic_of_torchao(fp8):
    plain = latents(fp8)
    with applied(fp8, technique := fused.FusedGELU()):
        assert technique.proof == {"gelu": "of 16 layers in fluxnb::gelu_round"}
        assert torch.equal(latents(fp8), plain)
    assert torch.equal(latents(fp8), plain)


def test_rows_are_rounded_as_torchao_rounds_them():
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

    generator = torch.Generator().manual_seed(0)
    plain, mlp = (torch.randn(5, n, generator=generator).bfloat16() for n in (48, 96))
    rounded, scale = fused.gelu_round(plain, mlp)
    both = torch.cat([plain, torch.nn.functional.gelu(mlp, approximate="tanh")], 1)
    theirs = Float8Tensor.from_hp(both, granularity=PerRow())
    assert torch.equal(rounded.float(), theirs.qdata.float()) and torch.equal(scale, theirs.scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for a GPU")
@pytest.mark.parametrize("n", [0, 3072])
def test_the_kernel_rounds_as_pytorch_does(n):
    plain, mlp = torch.randn(64, n).bfloat16(), 3 * torch.randn(64, 12288).bfloat16()
    rounded, scale = fused.gelu_round(plain, mlp)
    on_gpu, scale_on_gpu = (t.cpu() for t in fused.gelu_round(plain.cuda(), mlp.cuda()))
    assert torch.allclose(scale_on_gpu, scale, rtol=0.01)
    # a GELU one bfloat16 step away may round to the next FP8 value
    assert (on_gpu.float() != rounded.float()).float().mean() < 0.02


# --- norm and rotary positions in one kernel, modulations ahead ---


def test_norm_and_positions_in_one_kernel_are_the_same_arithmetic(pipe):
    plain = latents(pipe)
    kinds = {type(m.processor).__name__ for m in pipe.transformer.modules() if hasattr(m, "processor")}
    with applied(pipe, technique := fused.FusedRoPE()):
        assert technique.proof == {"norm and rope": "of 12 layers in fluxnb::norm_rope"}
        assert torch.equal(latents(pipe), plain)
        with applied(pipe, attention.Attention("math")):
            assert torch.allclose(latents(pipe), plain, atol=1e-3)
    with applied(pipe, compilation.FusedQKV(), fused.FusedRoPE()):
        assert torch.allclose(latents(pipe), plain, atol=1e-3)
    with applied(pipe, fused.FusedRoPE(), compilation.Regional()):
        breaks = compilation.counters()["breaks"]
        assert torch.allclose(latents(pipe), plain, atol=1e-3)
        assert compilation.counters()["breaks"] == breaks
    assert {type(m.processor).__name__ for m in pipe.transformer.modules() if hasattr(m, "processor")} == kinds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for a GPU")
@pytest.mark.parametrize("text", [0, 64])
def test_the_kernel_norms_and_turns_as_pytorch_does(text):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    qkv, tokens = drawn(2, 96, 3 * 24 * 128), 96 + text
    x = qkv.chunk(3, dim=-1)[1].unflatten(-1, (24, 128))  # a part of a fused projection, as in the model
    given = [x, drawn(128), drawn(2, text, 24, 128) if text else None, drawn(128) if text else None]
    given += [torch.randn(tokens, 128, generator=generator) for _ in range(2)]
    exact = fused.norm_rope(*given, 1e-6)
    on_gpu = fused.norm_rope(*(None if t is None else t.cuda() for t in given), 1e-6).cpu()
    assert on_gpu.shape == (2, tokens, 24, 128)
    assert torch.allclose(on_gpu.float(), exact.float(), rtol=0.02, atol=0.02)
    assert (on_gpu != exact).float().mean() < 0.05  # a norm one bfloat16 step away


def test_modulations_ahead_are_those_of_every_step(pipe):
    plain, layers = latents(pipe, 6), list(pipe.transformer.state_dict())
    with applied(pipe, technique := modulation.ModulationAhead()):
        assert technique.proof == {"modulations": "of 17 layers, all steps at once"}
        assert torch.allclose(latents(pipe, 6), plain, atol=1e-4)
        assert torch.allclose(latents(pipe, 3), latents(pipe, 3)) and torch.allclose(latents(pipe, 6), plain, atol=1e-4)
        with pytest.raises(UserError, match="^The modulations are computed ahead already"):
            modulation.ModulationAhead().apply(pipe)
    assert list(pipe.transformer.state_dict()) == layers and torch.equal(latents(pipe, 6), plain)


def test_each_modulation_is_read_once_per_image(pipe, monkeypatch):
    read, seen, plain = [], [], torch.nn.functional.linear
    linear = pipe.transformer.single_transformer_blocks[0].norm.linear

    def product(x, weight, bias=None):
        read.extend([len(x)] if weight is linear.weight else [])
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    handle = linear.register_forward_hook(lambda m, given, out: seen.append(len(out)))
    with applied(pipe, modulation.ModulationAhead()):
        latents(pipe, 5)
    handle.remove()
    assert read == [5] and seen == [1] * 5  # a hook of the user's sees every step


@pytest.mark.thorough
def test_modulations_ahead_under_caches_compilation_and_batches(pipe):
    prompts, seeds = ["a red ball", "a blue cup", "a cat"], [1, 2, 3]

    def batch():
        return pipelines.generate(pipe, prompts, seeds, model=MODEL, steps=5, output_type="latent")

    plain = batch()
    with applied(pipe, cache := first_block(0.1)):
        cached, mask = batch(), cache.trace.mask
    with applied(pipe, modulation.ModulationAhead()):
        assert torch.allclose(batch(), plain, atol=1e-4)
        with applied(pipe, cache := first_block(0.1)):
            assert torch.allclose(batch(), cached, atol=1e-4) and cache.trace.mask == mask
    with applied(pipe, compilation.Regional(), modulation.ModulationAhead()):
        assert torch.allclose(batch(), plain, atol=1e-3) and latents(pipe).isfinite().all()


def test_a_transformer_called_by_itself_computes_its_modulations(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, given: seen.append(given), with_kwargs=True)
    latents(pipe, 3)
    handle.remove()
    with torch.no_grad():
        exact = [pipe.transformer(**given)[0] for given in seen]
        with applied(pipe, modulation.ModulationAhead()):
            for given, one in zip(reversed(seen), reversed(exact), strict=True):
                assert torch.allclose(pipe.transformer(**given)[0], one, atol=1e-4)
            latents(pipe, 3)
            strange = {**seen[1], "timestep": seen[1]["timestep"] * 0.9}
            assert pipe.transformer(**strange)[0].isfinite().all()


def test_modulations_ahead_do_not_go_into_a_recording_or_a_whole_graph(pipe):
    with applied(pipe, modulation.ModulationAhead()), pytest.raises(Unavailable, match="^needs a transformer without"):
        compilation.Whole().apply(pipe)
    with applied(pipe, compilation.Whole()), pytest.raises(Unavailable, match="^needs the blocks compiled"):
        modulation.ModulationAhead().apply(pipe)


def test_gelu_is_not_fused_into_what_has_no_kernel_for_it(pipe):
    with applied(pipe, TorchAO("int8 weight-only")), pytest.raises(Unavailable, match="^needs unquantized matrices"):
        fused.FusedGELU().apply(pipe)
