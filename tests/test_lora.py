"""LoRAs (peft) loaded before, inside and after a technique: the right image, or a sentence before anything changes."""

import copy

import pytest
import small
import torch
from small import CACHES, QUANTIZED, TECHNIQUES, differences, image, lora, state

from fluxnb import techniques as t
from fluxnb.errors import UserError
from fluxnb.technique import Unavailable, applied

# the largest difference from the LoRA's own image: other arithmetic, or another format's as without a LoRA
ROUNDED = 1e-4
FURTHER = {"SVDQuant": 0.6, "NF4": 0.3} | dict.fromkeys((*CACHES, "Progressive"), 1)
LOADED_LATER = tuple(name for name in TECHNIQUES if not name.startswith(("FusedQKV", "Quanto", "SVDQuant")))


@pytest.fixture
def pipe():
    return small.load()


@pytest.fixture(scope="module")
def weights():
    return lora(small.load())


@pytest.fixture(scope="module")
def plain():
    return image(small.load())


@pytest.fixture(scope="module")
def with_lora(plain, weights):
    """Scale -> the image of the LoRA alone."""
    pipe, made = small.load(), {}
    load(pipe, weights)
    for scale in (1.0, 0.5):
        pipe.set_adapters(["style"], [scale])
        made[scale] = image(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), plain)
    assert (made[1.0] - plain).abs().max() > 0.5 and (made[1.0] - made[0.5]).abs().max() > 0.2
    return made


def load(pipe, weights, name="style"):
    pipe.load_lora_weights(dict(weights), adapter_name=name)


def near(name: str, made, expected, plain) -> bool:
    """Whether it is the LoRA's image as far as the technique allows, and not the one without it."""
    most = (
        FURTHER.get(name, 0.2) if name in (*QUANTIZED, *CACHES, "DPMSolver", "Progressive", "FP8Attention") else ROUNDED
    )
    return (made - expected).abs().max() < most and (made - expected).norm() < (made - plain).norm()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_lora_loaded_before_acts_is_scaled_and_comes_off(pipe, plain, weights, with_lora, name):
    load(pipe, weights)
    before = state(pipe)
    if name.startswith("FusedQKV"):
        with pytest.raises(Unavailable, match="^needs layers without a LoRA"):
            TECHNIQUES[name]().apply(pipe)
        assert not differences(before, pipe)
        return
    undo = TECHNIQUES[name]().apply(pipe)
    assert near(name, image(pipe), with_lora[1.0], plain)
    pipe.set_adapters(["style"], [0.5])
    assert near(name, image(pipe), with_lora[0.5], plain)
    undo()
    assert torch.equal(image(pipe), with_lora[0.5])
    undo = TECHNIQUES[name]().apply(pipe)
    pipe.unload_lora_weights()
    unloaded = image(pipe)
    undo()
    assert torch.equal(image(pipe), plain)
    with applied(pipe, TECHNIQUES[name]()):
        assert torch.allclose(unloaded, image(pipe), atol=ROUNDED)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_lora_loaded_inside_acts_or_is_a_sentence(pipe, plain, weights, with_lora, name):
    undo = TECHNIQUES[name]().apply(pipe)
    own, before = image(pipe), state(pipe)
    if name not in LOADED_LATER:
        for target in (lambda: load(pipe, weights), lambda: pipe.transformer.load_lora_adapter(dict(weights))):
            with pytest.raises(UserError, match="take .* off and load it first"):
                target()
        assert not differences(before, pipe)
        assert torch.equal(image(pipe), own)
        undo()
        return
    load(pipe, weights)
    assert near(name, image(pipe), with_lora[1.0], plain)
    pipe.set_adapters(["style"], [0.5])
    assert near(name, image(pipe), with_lora[0.5], plain)
    undo()  # and the LoRA stays
    assert torch.equal(image(pipe), with_lora[0.5])
    pipe.unload_lora_weights()
    with applied(pipe, TECHNIQUES[name]()):
        load(pipe, weights)
        pipe.unload_lora_weights()
        assert torch.equal(image(pipe), own)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_lora_loaded_afterwards_acts(pipe, weights, with_lora, name):
    with applied(pipe, TECHNIQUES[name]()):
        image(pipe, steps=2)
    load(pipe, weights)
    assert torch.equal(image(pipe), with_lora[1.0])


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_lora_fused_into_the_weights_meanwhile_is_there_or_a_sentence(pipe, plain, weights, with_lora, name):
    load(pipe, weights)
    try:
        undo = TECHNIQUES[name]().apply(pipe)
    except Unavailable:
        return
    if name in QUANTIZED:
        made = image(pipe)
        with pytest.raises(UserError, match="can't become part of the weights"):
            pipe.fuse_lora()
        assert torch.equal(image(pipe), made)
    else:
        pipe.fuse_lora()
        assert near(name, image(pipe), with_lora[1.0], plain)
        pipe.unfuse_lora()
    undo()
    assert torch.allclose(image(pipe), with_lora[1.0], atol=ROUNDED)


@pytest.mark.parametrize("name", ["FusedQKV", *QUANTIZED])
def test_a_lora_that_is_part_of_the_weights_is_put_under_anything(plain, weights, with_lora, name):
    pipe = small.load()
    load(pipe, weights)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = image(pipe)
    assert torch.allclose(fused, with_lora[1.0], atol=ROUNDED)
    with applied(pipe, TECHNIQUES[name]()):
        assert near(name, image(pipe), with_lora[1.0], plain)
    assert torch.equal(image(pipe), fused)


def _adapters() -> dict:
    """Kinds of peft's adapters and options of a LoRA -> their configuration."""
    from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    some = {"target_modules": ["to_q", "proj_mlp", "net.0.proj", "norm1.linear"]}
    low = {**some, "r": 4}
    return {
        "DoRA": LoraConfig(**low, use_dora=True, init_lora_weights=False),
        "rank-stabilised": LoraConfig(**low, use_rslora=True, init_lora_weights=False),
        "bias": LoraConfig(**low, lora_bias=True, init_lora_weights=False),
        "embedders": LoraConfig(r=4, target_modules=["x_embedder", "linear_1", "norm_out.linear"]),
        "saved layers": LoraConfig(**low, modules_to_save=["proj_out"]),
        "LoHa": LoHaConfig(**low, init_weights=False),
        "LoKr": LoKrConfig(**low, init_weights=False),
        "IA3": IA3Config(**some, feedforward_modules=[]),
        "OFT": OFTConfig(r=0, oft_block_size=4, **some),
        "BOFT": BOFTConfig(boft_block_size=4, **some),
    }


def _add(pipe, kind: str) -> None:
    torch.manual_seed(0)
    pipe.transformer.add_adapter(_adapters()[kind], adapter_name="other")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipe.transformer.named_parameters():
        if ".other" in name and "magnitude" not in name and "modules_to_save" not in name:  # diffusers leaves those
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    pipe.transformer.eval()


ALIKE = (
    "rank-stabilised",
    "bias",
    "embedders",
    "saved layers",
    "LoHa",
    "LoKr",
    "IA3",
    "OFT",
    "BOFT",
)  # of what the others show already


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.thorough) if kind in ALIKE else kind for kind in _adapters()]
)
def test_every_kind_of_adapter_acts_or_is_a_sentence(plain, kind):
    pipe = small.load()
    _add(pipe, kind)
    expected = image(pipe)
    for name in ("FusedGELU", "ModulationAhead", "Interval", "TorchAO int8", "NF4", "GGUF"):
        pipe, first = small.load(), small.load()
        _add(first, kind)
        before, right = state(first), expected
        try:
            undo = TECHNIQUES[name]().apply(first)
            right = image(first)
            undo()
            assert torch.equal(image(first), expected), name
        except Unavailable as error:
            assert str(error).startswith("needs ")
            assert not differences(before, first), name
        with applied(pipe, TECHNIQUES[name]()):
            own, before = image(pipe), state(pipe)
            try:
                _add(pipe, kind)
                # a DoRA's magnitudes are those of the weights that it finds
                most = 0.05 if kind == "DoRA" and name in QUANTIZED else 1e-3
                assert (image(pipe) - right).abs().max() < most and not torch.equal(image(pipe), own), name
                pipe.unload_lora_weights()
            except UserError as error:
                assert "can't go around layers that are" in str(error)
                assert not differences(before, pipe), name
            left = ROUNDED if kind == "saved layers" else 0  # around which diffusers leaves peft's wrapper
            assert torch.allclose(image(pipe), own, rtol=0, atol=left), name
        assert torch.equal(image(pipe), plain), name


# adapter -> quantizers that it can't go around: those that are there, and in the order that is put on first
_OWN = ("Quanto", "SVDQuant")  # none can
REFUSED = {
    "DoRA": (("GGUF", *_OWN), ("GGUF",)),
    "bias": (("TorchAO int8", *_OWN), ()),
    "saved layers": (("TorchAO int8", "GGUF", "NF4", *_OWN), ()),
    "LoHa": (("GGUF", "NF4", *_OWN), ("GGUF", "NF4")),
    "LoKr": (("GGUF", "NF4", *_OWN), ("GGUF", "NF4")),
    "OFT": (("TorchAO int8", *_OWN), ()),
    "BOFT": (("TorchAO int8", *_OWN), ()),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("IA3", "OFT") else pytest.mark.thorough) for kind in _adapters()],
)
def test_an_adapter_is_refused_by_those_quantizers_only_whose_layers_it_cannot_go_around(kind):
    pipe = small.load(1)
    own, plain = pipe.transformer, image(pipe, steps=2)
    pipe.transformer = copy.deepcopy(own)
    _add(pipe, kind)
    expected = image(pipe, steps=2)
    for name in ("TorchAO int8", "GGUF", "NF4", *_OWN):
        pipe.transformer = own
        with applied(pipe, TECHNIQUES[name]()):
            rounded = (image(pipe, steps=2) - plain).norm()
        later, before = REFUSED.get(kind, (_OWN, ()))
        for first in (True, False):
            pipe.transformer = copy.deepcopy(own)
            refused = name in (before if first else later)
            try:
                _add(pipe, kind) if first else None
                undo = TECHNIQUES[name]().apply(pipe)
                None if first else _add(pipe, kind)
            except (Unavailable, UserError):
                assert refused, (name, first)
                continue
            assert not refused, (name, first)
            assert (image(pipe, steps=2) - expected).norm() < 8 * rounded + 1e-3, (name, first)
            undo()
            assert torch.equal(image(pipe, steps=2), expected) or not first, name


def test_an_adapter_that_nobody_tried_is_a_sentence_that_says_so():
    from peft import HRAConfig

    pipe = small.load(1)
    with applied(pipe, TECHNIQUES["NF4"]()), pytest.raises(UserError, match="peft's HRA wasn't tried around layers"):
        pipe.transformer.add_adapter(HRAConfig(r=4, target_modules=["to_q"]))
    pipe.transformer.add_adapter(HRAConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(Unavailable, match="were tried around its layers, and finds HRA"):
        TECHNIQUES["NF4"]().apply(pipe)


@pytest.mark.parametrize("name", ["GGUF", "NF4", "TorchAO int8", "ModulationAhead"])
def test_a_lora_that_brings_norms_acts_and_leaves(pipe, plain, weights, name):
    """As the files of FLUX's own control LoRAs do."""
    norms = {f"transformer.{k}": 2 * v for k, v in pipe.transformer.state_dict().items() if ".norm_q." in k}
    load(pipe, weights | norms)
    expected = image(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), plain)
    with applied(pipe, TECHNIQUES[name]()):
        own = image(pipe)
        load(pipe, weights | norms)
        assert near(name, image(pipe), expected, plain)
        pipe.unload_lora_weights()
        assert torch.equal(image(pipe), own)
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("name", ["NF4", "GGUF", "TorchAO int8", "Quanto"])
def test_a_loras_own_matrices_are_left_in_their_format(pipe, plain, name, rank):
    weights = lora(pipe, rank)
    load(pipe, weights)
    expected = image(pipe)
    with applied(pipe, TECHNIQUES[name]()):
        kinds = {
            type(m) for path, m in pipe.transformer.named_modules() if path.endswith(("lora_A.style", "lora_B.style"))
        }
        assert kinds == {torch.nn.Linear}
        assert near(name, image(pipe), expected, plain)


def test_two_loras_at_once_under_modulations_and_gelu(pipe, plain, weights):
    load(pipe, weights)
    load(pipe, lora(pipe, 8, seed=2), "other")
    pipe.set_adapters(["style", "other"], [0.5, 0.7])
    both = image(pipe)
    with applied(pipe, t.FusedGELU(), t.FusedRoPE(), t.ModulationAhead()):
        assert near("", image(pipe), both, plain)
        pipe.delete_adapters("other")
        one = image(pipe)
    assert torch.allclose(image(pipe), one, atol=ROUNDED)


def test_a_lora_of_single_blocks_alone_has_an_effect_under_fused_gelu(pipe, plain):
    load(pipe, lora(pipe, targets=["proj_out", "proj_mlp"]))
    expected = image(pipe)
    assert (expected - plain).abs().max() > 0.05
    with applied(pipe, t.FusedGELU()):
        assert near("", image(pipe), expected, plain)


def test_a_recording_is_made_anew_when_a_lora_comes_or_weights_move(pipe, weights):
    from fluxnb.technique import Changes
    from fluxnb.techniques.compilation import _Recorded

    recorded = _Recorded(lambda: None, {})
    with Changes("CUDA graph") as changes:
        recorded.follow(pipe, pipe.transformer, changes)
    for change in (
        lambda: load(pipe, weights),
        lambda: pipe.set_adapters(["style"], [0.5]),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unfuse_lora(),
        lambda: pipe.unload_lora_weights(),
        lambda: pipe.transformer.to("cpu"),
    ):
        recorded.graphs["shape"] = ()
        change()
        assert not recorded.graphs
    changes.take_back()
    assert not {"load_lora_adapter", "_apply"} & set(vars(pipe.transformer))


def test_a_lora_that_cannot_be_traced_breaks_the_compiled_transformer_instead_of_the_image():
    pipe, eager = small.load(1), small.load(1)
    weights = lora(pipe)

    @torch.compiler.disable
    def untraced(x):
        return 2 * x

    with applied(pipe, t.Whole()), torch.compiler.set_stance(force_backend="eager"):
        plain = image(pipe, steps=2)
        for own in (pipe, eager):
            load(own, weights)
            layer = own.transformer.single_transformer_blocks[0].proj_mlp.lora_B["style"]
            layer.forward = lambda x, plain=layer.forward: untraced(plain(x))
        expected = image(eager, steps=2)
        assert (expected - plain).norm() > 0.01
        assert torch.allclose(image(pipe, steps=2), expected, atol=ROUNDED)
        pipe.unload_lora_weights()
        assert torch.equal(image(pipe, steps=2), plain)
    with applied(eager, t.Whole()), torch.compiler.set_stance(force_backend="eager"):
        assert torch.allclose(image(eager, steps=2), expected, atol=ROUNDED)


@pytest.mark.parametrize("name", ["FusedQKV", "SVDQuant", "Quanto"])
def test_peft_s_own_way_in_is_a_sentence_until_the_technique_is_off(pipe, name):
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=["proj_mlp", "to_q"])
    undo = TECHNIQUES[name]().apply(pipe)
    before = state(pipe)
    for way in (
        lambda: inject_adapter_in_model(config, pipe.transformer),
        lambda: get_peft_model(pipe.transformer, config),
    ):
        with pytest.raises(UserError, match="take .* off and load it first"):
            way()
    assert not differences(before, pipe)
    with applied(small.load(), TECHNIQUES[name]()):
        undo()
        inject_adapter_in_model(config, pipe.transformer)


def test_a_loras_weights_and_scales_compile_nothing_again_once_its_kind_was_seen():
    """Of one stack; whatever the backend, it is Dynamo that decides."""
    from fluxnb.cache import Cache, Interval, Taylor
    from fluxnb.techniques.compilation import counters

    pipe, eager = small.load(1), small.load(1)
    one, other = lora(pipe), lora(pipe, seed=5)
    stack = (t.FusedGELU(), t.ModulationAhead(), Cache(Interval(2), Taylor(1)))

    def graphs(change) -> int:
        before = counters()["graphs"]
        for own in (pipe, eager):
            change(own)
        assert torch.allclose(image(pipe), image(eager), atol=ROUNDED)
        return counters()["graphs"] - before

    with applied(pipe, *stack), applied(eager, *stack):
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.compile(backend="eager", fullgraph=True)
        assert graphs(lambda own: None) == 2  # one of each kind of block
        assert graphs(lambda own: load(own, one)) == 2
        assert graphs(lambda own: own.set_adapters(["style"], [0.5])) <= 2  # a scale becomes a variable
        assert graphs(lambda own: own.set_adapters(["style"], [0.7])) == 0
        graphs(lambda own: own.unload_lora_weights())
        assert graphs(lambda own: load(own, other)) == 0
        assert graphs(lambda own: own.load_lora_weights(dict(one), adapter_name="style", hotswap=True)) == 0
