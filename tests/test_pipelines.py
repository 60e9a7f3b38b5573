"""Models by name: what can't be loaded says so in a sentence, and random weights are FLUX's in shape."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fluxnb.errors import UserError
from fluxnb.measure import clip
from fluxnb.models import embedded, facts, full_size, pipelines

GATED = "black-forest-labs/FLUX.1-dev"


def sentence(error) -> str:
    """The message of a UserError, checked to be one line that ends like a sentence."""
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "embeded", "flux-dev", "a/b/c"])
def test_an_unknown_name_lists_what_there_is(name, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        pipelines.load(name)
    text = sentence(error)
    for part in (repr(name), "embedded", "flux-dev-random", "flux-schnell-random", "hub id", "local folder"):
        assert part in text


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no_such_folder_here"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(UserError) as error:
        pipelines.check(name)
    assert "is not a model folder" in sentence(error)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError) as error:
            pipelines.load(str(path))
        assert str(path) in sentence(error) and "model_index.json" in str(error.value)


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded model to damage."""
    return shutil.copytree(embedded.FOLDER, tmp_path / "model")


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "transformer/diffusion_pytorch_model.safetensors"),
        lambda folder: truncate(folder / "text_encoder_2/model.safetensors"),
        lambda folder: truncate(folder / "vae/config.json"),
        lambda folder: (folder / "model_index.json").write_text("{}"),
        lambda folder: (folder / "model_index.json").write_text("not JSON"),
        lambda folder: shutil.rmtree(folder / "transformer"),
        lambda folder: shutil.rmtree(folder / "tokenizer_2"),
    ],
    ids=["weights", "text encoder", "config", "empty index", "broken index", "no transformer", "no tokenizer"],
)
def test_a_damaged_folder_is_named(copied, damage):
    damage(copied)
    with pytest.raises(UserError) as error:
        pipelines.load(str(copied))
    text = sentence(error)
    assert str(copied) in text and "copy or save it again" in text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_pickle_is_refused_with_the_way_to_convert_it_even_an_honest_one(copied, part):
    (weights,) = (copied / part).glob("*.safetensors")
    name = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), copied / part / name)
    pipelines.check(str(copied))  # it has both: the pickle isn't read
    weights.unlink()
    for refuses in (pipelines.check, pipelines.load):
        with pytest.raises(UserError) as error:
            refuses(str(copied))
        assert f"{copied / part} has its weights in {name}, a pickle" in sentence(error)
        assert "save_pretrained(…, safe_serialization=True)" in str(error.value)


def test_a_controlnet_and_a_clip_in_a_pickle_are_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    for refuses in (
        lambda: pipelines.load_controlnet("embedded", source=str(tmp_path)),
        lambda: clip.load(str(tmp_path)),
    ):
        with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle"):
            refuses()


def test_nothing_is_loaded_that_may_be_a_pickle():
    for path in (Path(embedded.__file__).parents[1]).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained":
                of = ast.unparse(call.func.value)
                if of.endswith(("Pipeline", "Model")) or "Transformer" in of:
                    assert "SAFE" in (said := ast.unparse(call)) or "use_safetensors=True" in said or "given" in said, (
                        said
                    )


def test_a_transformers_configuration_is_read_without_its_weights(copied):
    for weights in (copied / "transformer").glob("*.safetensors"):
        weights.write_bytes(b"")
    assert pipelines.transformer_config(str(copied)) == pipelines.transformer_config("embedded")
    assert pipelines.transformer_config("flux-schnell-random")["guidance_embeds"] is False
    truncate(copied / "transformer/config.json")
    with pytest.raises(UserError, match="^The transformer's configuration of .* cannot be read"):
        pipelines.transformer_config(str(copied))


def test_a_good_folder_loads_and_makes_the_same_image(copied, embedded_pipe):
    pipe = pipelines.load(str(copied), device="cpu")
    made = [
        pipelines.generate(p, ["a red cup"], [1], model=pipelines.describe("embedded"), steps=2, output_type="latent")
        for p in (pipe, embedded_pipe)
    ]
    assert torch.equal(*made)


def test_an_unknown_number_format_lists_the_choices():
    with pytest.raises(UserError) as error:
        pipelines.load("embedded", dtype="float8")
    assert "float8" in sentence(error)
    assert all(name in str(error.value) for name in ("float32", "float16", "bfloat16"))


# --- the hub ------------------------------------------------------------------------------------------------


def test_a_gated_model_without_a_token_says_what_to_set_and_where_to_agree(no_hub):
    for ask in (pipelines.check, pipelines.load):
        with pytest.raises(UserError) as error:
            ask(GATED)
        text = sentence(error)
        assert "HF_TOKEN" in text and f"https://huggingface.co/{GATED}" in text and "licence" in text


def test_with_a_token_or_a_copy_the_check_passes(no_hub, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "hub" / f"models--{GATED.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    pipelines.check(GATED)
    shutil.rmtree(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    pipelines.check(GATED)


def hub_error(kind, message):
    """An error as huggingface_hub raises it, without the answer of a server."""
    error = kind.__new__(kind)
    OSError.__init__(error, message)
    return error


def test_what_the_hub_answers_becomes_a_sentence(no_hub, monkeypatch):
    import diffusers
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(facts, "config", lambda *_, **__: {"_class_name": "FluxPipeline"})  # of the model's index
    wrapped = OSError("cannot reach it")
    wrapped.__cause__ = hub_error(GatedRepoError, "403")
    answers = [
        (hub_error(GatedRepoError, "403"), "is gated"),
        (wrapped, "is gated"),
        (hub_error(RepositoryNotFoundError, "404"), "check the id"),
        (OSError("no connection\nmore"), "no connection"),
        (ValueError("odd"), "check the id and the connection"),
    ]
    for raised, part in answers:

        def fail(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", fail)
        with pytest.raises(UserError) as error:
            pipelines.load("someone/flux")
        assert part in sentence(error)
        assert "someone/flux" in str(error.value) and "hf_secret" not in str(error.value)


# --- random weights -----------------------------------------------------------------------------------------

TINY = {
    "TRANSFORMER": {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 48,
        "axes_dims_rope": (4, 6, 6),
    },
    "VAE": full_size.VAE | {"block_out_channels": (32,) * 4, "layers_per_block": 1, "sample_size": 64},
    "T5_XXL": full_size.T5_XXL | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "CLIP_L": full_size.CLIP_L
    | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.fixture
def tiny(monkeypatch):
    for name, config in TINY.items():
        assert config.keys() == getattr(full_size, name).keys()
        monkeypatch.setattr(full_size, name, config)


@pytest.mark.parametrize("name", pipelines.RANDOM)
def test_random_models_make_finite_images(tiny, name):
    pipe = pipelines.load(name, "float32", "cpu")
    model = pipelines.describe(name)
    assert (model.weights, model.judged, model.checked) == ("random", False, False)
    options = {"model": model, "steps": 2, "width": 64, "height": 64}
    latents = pipelines.generate(pipe, ["a red apple"], [0], output_type="latent", **options)
    assert torch.isfinite(latents).all() and 0.1 < latents.std() < 100
    (image,) = pipelines.generate(pipe, ["a red apple"], [0], **options)
    assert image.size == (64, 64)


def test_dev_takes_guidance_and_schnell_does_not(tiny):
    dev, schnell = (pipelines.load(name, "float32", "cpu") for name in pipelines.RANDOM)
    assert dev.transformer.config.guidance_embeds and not schnell.transformer.config.guidance_embeds
    assert dev.scheduler.config.use_dynamic_shifting and not schnell.scheduler.config.use_dynamic_shifting
    assert [pipelines.describe(name).tokens for name in pipelines.RANDOM] == [512, 256]
    assert dev.tokenizer.model_max_length == 77


def test_a_seed_gives_the_same_weights(tiny):
    def weights(seed):
        pipe = pipelines.load("flux-dev-random", "float32", "cpu", seed=seed)
        parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        return torch.cat([p.flatten() for part in parts for p in part.parameters()])

    one = weights(1)
    assert torch.equal(one, weights(1))
    assert not torch.equal(one, weights(2))


def test_the_number_format_is_the_one_asked_for_and_the_default_stays(tiny):
    pipe = pipelines.load("flux-dev-random", "bfloat16", "cpu")
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not part.training
    assert torch.get_default_dtype() == torch.float32


def test_random_models_have_the_size_of_flux():
    """Parameters of FLUX.1-dev, FLUX.1-schnell, their VAE, T5-XXL's encoder and CLIP-L's text model."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    def size(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert size(FluxTransformer2DModel(**full_size.TRANSFORMER, guidance_embeds=True)) == 11_901_408_320
        assert size(FluxTransformer2DModel(**full_size.TRANSFORMER, guidance_embeds=False)) == 11_891_178_560
        assert size(AutoencoderKL(**full_size.VAE)) == 83_819_683
        assert size(T5EncoderModel(T5Config(**full_size.T5_XXL))) == 4_762_310_656
        assert size(CLIPTextModel(CLIPTextConfig(**full_size.CLIP_L))) == 123_060_480


def test_activations_stay_sane_through_all_57_blocks():
    from diffusers import FluxTransformer2DModel

    deep = TINY["TRANSFORMER"] | {"num_layers": 19, "num_single_layers": 38}
    transformer = FluxTransformer2DModel(**deep, guidance_embeds=True).to(torch.bfloat16).eval()
    full_size.randomize(transformer, 0)
    inside = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_hook(lambda _, __, out: inside.append(out[-1].float().std().item()))
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    with torch.no_grad():
        velocity = transformer(
            hidden_states=randn(1, 16, 64),
            encoder_hidden_states=randn(1, 8, 32),
            pooled_projections=randn(1, 48),
            timestep=torch.tensor([0.5]).bfloat16(),
            guidance=torch.tensor([3.5]).bfloat16(),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
        ).sample
    assert len(inside) == 57
    assert torch.isfinite(velocity).all() and 0.01 < velocity.float().std() < 100
    assert max(inside) < 1000 and min(inside) > 0.1


def test_randomize_scales_by_fan_in():
    module = torch.nn.Sequential(torch.nn.Linear(400, 300), torch.nn.LayerNorm(300), torch.nn.Conv2d(16, 64, 3))
    full_size.randomize(module, 0)
    linear, norm, conv = module
    assert linear.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert conv.weight.std().item() == pytest.approx((16 * 9) ** -0.5, rel=0.05)
    assert (norm.weight == 1).all()
    assert not any(part.bias.any() for part in module)


# --- noise --------------------------------------------------------------------------------------------------


def test_noise_depends_on_the_seed_alone(embedded_pipe):
    both = pipelines.noise(embedded_pipe, [3, 8], 128, 128)
    assert both.shape == (2, 64, 64)
    assert torch.equal(both[:1], pipelines.noise(embedded_pipe, [3], 128, 128))
    assert torch.equal(both[1:], pipelines.noise(embedded_pipe, [8], 128, 128))
    assert not torch.equal(both[0], both[1])
    assert abs(both.mean()) < 0.05 and both.std().item() == pytest.approx(1, abs=0.05)


def test_noise_of_another_number_format_is_the_same_noise(tiny, embedded_pipe):
    half = pipelines.load("flux-dev-random", "bfloat16", "cpu")
    expected = pipelines.noise(embedded_pipe, [3], 128, 64).bfloat16()
    assert torch.equal(pipelines.noise(half, [3], 128, 64), expected)


def test_packing_is_that_of_diffusers():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(pipelines.pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
