"""FLUX.2 as users have it: folders and hub ids, what their files say, and the recipes of FLUX.1 that fit them."""

import contextlib
import io
import json
import shutil
import sys
import warnings

import pytest
import torch
from PIL import Image

from fluxnb import accelerate, adapters, recipes
from fluxnb.__main__ import main
from fluxnb.cache import Cache, FirstBlock
from fluxnb.errors import UserError
from fluxnb.models import facts, flux2, pipelines
from fluxnb.technique import Unavailable

KLEINS = ("flux2-klein-tiny", "flux2-klein-base-tiny")


@pytest.fixture(scope="module")
def pipes():
    return {name: pipelines.load(name, "float32", "cpu") for name in KLEINS}


@pytest.fixture(scope="module")
def folders(pipes, tmp_path_factory):
    """The models as folders of diffusers' format; FLUX.2-dev's has its settings, and no weights of a text encoder."""
    made = {name: tmp_path_factory.mktemp(name) for name in (*KLEINS, "dev")}
    for name, pipe in pipes.items():
        pipe.save_pretrained(made[name])
    shutil.copytree(made[KLEINS[0]], made["dev"], dirs_exist_ok=True)
    change(made["dev"], "model_index.json", _class_name="Flux2Pipeline", is_distilled=None)
    change(made["dev"], "transformer/config.json", guidance_embeds=True)
    return made


def change(folder, file, **values):
    said = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


def latents(pipe, model):
    given = {"width": 64, "height": 64, "steps": 2, "output_type": "latent"}
    return pipelines.generate(pipe, ["a red ball"], [1], model=model, **given)


# --- what a folder says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, steps, guided, pipeline",
    [
        (KLEINS[0], 4, False, "Flux2KleinPipeline"),
        (KLEINS[1], 50, True, "Flux2KleinPipeline"),
        ("dev", 50, True, "Flux2Pipeline"),
    ],
)
def test_steps_guidance_size_and_tokens_are_read_from_the_folder(folders, name, steps, guided, pipeline):
    found = facts.read(str(folders[name]))
    assert (found.steps, found.guided, found.pipeline, found.tokens) == (steps, guided, pipeline, 512)
    assert (found.width, found.height) == (64, 64)
    model = pipelines.describe(str(folders[name]))
    assert model.own and model.adapter is adapters.FLUX2 and model.few == (steps == 4)
    assert facts.read(str(folders[name]), steps="6", size="96x64", tokens="64").width == 96


def test_a_model_of_the_hub_is_asked_for_its_files_only(folders, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folders[KLEINS[1]] / file))
    found = facts.read("someone/klein-base")
    assert (found.name, found.steps, found.guided) == ("someone/klein-base", 50, True)


def test_a_gated_model_is_a_sentence(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"FLUX.2-dev is gated: accept its licence"):
        facts.read("black-forest-labs/FLUX.2-dev")


@pytest.mark.parametrize("name", KLEINS)
def test_a_folder_makes_the_same_image_as_the_pipeline_that_it_was_saved_from(folders, pipes, name):
    loaded, model = pipelines.load(str(folders[name]), "float32", "cpu"), pipelines.describe(name)
    assert torch.equal(latents(loaded, model), latents(pipes[name], model))


@pytest.mark.parametrize(
    "file, said, part",
    [
        ("vae/config.json", {"sample_size": None}, "doesn't say how large its images are: give SIZE="),
        ("model_index.json", {"_class_name": "Flux2KleinKVPipeline"}, "is of Flux2KleinKVPipeline, not of FLUX.2's"),
        ("model_index.json", {"text_encoder": None}, "has no text_encoder in its model_index.json"),
        ("transformer/config.json", {"_class_name": "Flux3Transformer"}, "has Flux3Transformer, not FLUX.1's"),
        ("transformer/config.json", {"num_layers": 7}, "weights of 2 transformer_blocks in its transformer and"),
        ("text_encoder/config.json", {"num_hidden_layers": 5}, "weights of 28 layers in its text_encoder and"),
    ],
)
def test_what_is_wrong_with_a_folder_is_a_sentence(folders, tmp_path, file, said, part):
    folder = tmp_path / "model"
    shutil.copytree(folders[KLEINS[0]], folder)
    change(folder, file, **said)
    with pytest.raises(UserError, match=part) as error:
        facts.read(str(folder))
        pipelines.load(str(folder), "float32", "cpu")
    assert "\n" not in str(error.value)


# --- recipes --------------------------------------------------------------------------------------------------


def printed(*given):
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert main(["recipe", *given]) == 0
    return out.getvalue()


@pytest.mark.parametrize("goal", ["near-lossless", "smallest-memory-balanced"])
@pytest.mark.parametrize("model", [name for name in flux2.NAMES if name.endswith("random")])
def test_each_model_has_a_recipe_that_says_what_was_not_measured(model, goal):
    text = printed("--gpu", "h100", "--goal", goal, "--model", model)
    size = flux2.SIZES[model]
    for said in (size.pipeline, facts.STAND_FOR[model], f"default={size.steps})", "default=512"):
        assert said in text
    said = text.replace("\n#   ", " ")
    assert "it wasn't measured: the figures are FLUX.1's." in said and "without fused RoPE" in said
    assert ("guidance_scale=0.0" in text) == size.distilled and "FusedRoPE" not in text and "FusedGELU" not in text
    compile(text, "recipe.py", "exec")


def test_a_printed_script_runs(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # which takes minutes, and computes the same
    for name, goal in ((KLEINS[0], "smallest-memory-near-lossless"), (KLEINS[1], "near-lossless")):
        text = printed("--gpu", "h100", "--goal", goal, "--model", str(folders[name]))
        given = ["--steps", "2", "--tokens", "24", "--device", "cpu", "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", ["recipe.py", *given, "--output", str(tmp_path / "image.png")])
        with warnings.catch_warnings(action="ignore"):
            exec(compile(text, "recipe.py", "exec"), {"__name__": "__main__"})
        with Image.open(tmp_path / "image.png") as made:
            assert made.size == (64, 64)


def test_a_recipe_is_put_on_in_one_call_and_says_what_it_left_out(pipes):
    pipe, model = pipes[KLEINS[1]], pipelines.describe(KLEINS[1])
    plain = latents(pipe, model)
    with pytest.warns(UserWarning, match="On FLUX.2, without fused .*, it wasn't measured: the figures are FLUX.1's"):
        undo = accelerate(pipe, "h100/lossless")
    undo()
    assert torch.equal(latents(pipe, model), plain)
    found = recipes.find("h100/near-lossless", pipe)
    assert [part.label for part in found.techniques] == ["compiled blocks", "VAE compiled"]
    assert recipes.plan(pipe, "h100/near-lossless").count("without fused RoPE") == 1


def test_a_model_of_few_steps_has_those_that_leave_every_step_as_it_is(pipes):
    pipe = pipes[KLEINS[0]]
    assert facts.loaded_takes_few(pipe) and not facts.loaded_takes_few(pipes[KLEINS[1]])
    assert recipes.find("h100/lossless", pipe).computed_steps == recipes.find("h100/lossless", pipe).steps
    with pytest.raises(UserError, match="no recipe cpu/schnell/near-lossless"):  # a cache over 28 steps
        accelerate(pipe, "near-lossless")


def test_where_the_adapters_end_is_one_sentence():
    class Flux3:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(UserError) as error:
        accelerate(Flux3(), Cache(FirstBlock(0.2)))
    said = str(error.value)
    assert said.count(". ") == 0 and "Linear" in said and "fluxnb.adapters" in said
    with pytest.raises(Unavailable, match="needs a transformer of FluxTransformer2DModel or Flux2"):
        adapters.of(torch.nn.Linear(2, 2))
