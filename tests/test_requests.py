"""What is asked of a pipeline and what a folder has: looked at before anything runs or is loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxnb.errors import UserError
from fluxnb.models import control, embedded, pipelines

MODEL = pipelines.describe("embedded")


def make(pipe, **changed):
    given = {"prompts": ["a red ball"], "seeds": [1], "model": MODEL, "steps": 2, "output_type": "latent"} | changed
    return pipelines.generate(pipe, given.pop("prompts"), given.pop("seeds"), **given)


def picture(mode="RGB", side=128):
    grey = np.zeros((side, side), np.uint8)
    grey[32:96, 32:96] = 255
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 0}, {"steps": -1}, {"steps": 2.5}, {"steps": "2"}, {"steps": True},
        {"width": -16}, {"height": 0}, {"width": 100}, {"width": 64.0}, {"height": "128"},
        {"prompts": []}, {"prompts": "a red ball"}, {"prompts": [None]}, {"prompts": [["a"]]},
        {"seeds": []}, {"seeds": [1, 2]}, {"seeds": 1}, {"seeds": ["1"]}, {"seeds": [1.5]},
        {"prompts": ["a cup"] * 3, "seeds": [1, 2]}, {"prompts": ["a cup"] * 2, "seeds": [1]},
        {"guidance": float("nan")}, {"guidance": None}, {"guidance": "3.5"}, {"output_type": "jpeg"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_made_is_a_sentence(embedded_pipe, changed):
    with pytest.raises(UserError) as error:
        make(embedded_pipe, **changed)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_numpy_s_numbers_and_tuples_are_taken(embedded_pipe):
    plain = make(embedded_pipe)
    assert torch.equal(make(embedded_pipe, prompts=("a red ball",), seeds=(np.int64(1),), steps=np.int32(2)), plain)


@pytest.mark.parametrize("strength", ["0.5", None, float("nan"), 0, -1, 2, 0.1])
def test_a_strength_that_leaves_no_step_is_a_sentence(embedded_pipe, strength):
    pipe = pipelines.as_use_case(embedded_pipe, "img2img")
    with pytest.raises(UserError, match="^A strength of"):
        make(pipe, image=picture(), strength=strength)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "LA", "CMYK"])
def test_any_kind_of_picture_is_taken(embedded_pipe, mode):
    net = pipelines.load_controlnet("embedded", device="cpu")
    for case in ("img2img", "inpainting", "ControlNet img2img"):
        pipe = pipelines.as_use_case(embedded_pipe, case, net)
        given = {"image": "image", "mask": "mask", "condition": "condition"}
        made = [make(pipe, **dict.fromkeys(given, picture(kind))) for kind in (mode, "RGB")]
        assert torch.allclose(*made, atol=1e-2 if mode == "CMYK" else 0), case


@pytest.mark.parametrize("wrong", [np.zeros((128, 128, 3)), torch.zeros(3, 128, 128), "picture.png"], ids=type)
def test_what_is_no_picture_is_a_sentence(embedded_pipe, wrong):
    with pytest.raises(UserError, match="give a PIL image"):
        make(pipelines.as_use_case(embedded_pipe, "img2img"), image=[wrong])


def test_a_pipeline_of_another_use_case_is_a_sentence(embedded_pipe):
    from diffusers import FluxControlPipeline, FluxKontextPipeline

    for kind in (FluxKontextPipeline, FluxControlPipeline):
        parts = {k: v for k, v in embedded_pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
        with pytest.raises(UserError, match="isn't a pipeline of these use cases"):
            make(kind(**parts))


@pytest.mark.parametrize("case", ["ControlNet txt2img", "ControlNet img2img", "ControlNet inpainting"])
def test_several_controlnets_take_a_condition_each(embedded_pipe, case):
    from diffusers import FluxMultiControlNetModel

    net = pipelines.load_controlnet("embedded", device="cpu")
    one = pipelines.as_use_case(embedded_pipe, case, net)
    several = pipelines.as_use_case(embedded_pipe, case, FluxMultiControlNetModel([net]))
    two = pipelines.as_use_case(embedded_pipe, case, FluxMultiControlNetModel([net, net]))
    edges = control.edges(picture())
    given = {"image": picture(), "mask": picture(), "kind": "edges"}
    assert torch.isfinite(make(two, condition=[edges, picture()], **(given | {"kind": ["edges", "depth"]}))).all()
    single = make(one, condition=edges, **given)
    assert torch.allclose(make(several, condition=[edges], **given), single, atol=1e-4)
    for wrong in (edges, [edges], [edges] * 3):
        with pytest.raises(UserError, match="ControlNets: give a list"):
            make(two, condition=wrong, **given)
    if case != "ControlNet txt2img":
        with pytest.raises(UserError, match="one prompt at a time"):
            make(two, condition=[edges, edges], prompts=["a cup"] * 2, seeds=[1, 2], **given)


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(embedded.FOLDER, tmp_path / "model")


def sentence(folder) -> str:
    with pytest.raises(UserError) as error:
        pipelines.load(str(folder), device="cpu")
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and str(folder) in text
    return text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_weights_are_named(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors, key=lambda name: tensors[name].numel())[-4:]
    save_file({k: v for k, v in tensors.items() if k not in names}, file, metadata={"format": "pt"})
    said = sentence(folder)
    assert part in said and "has no weights for" in said and "and 1 more" in said


def test_a_controlnets_missing_weights_are_named(tmp_path):
    folder = shutil.copytree(control.FOLDER, tmp_path / "controlnet")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"has no weights for {gone}"):
        pipelines.load_controlnet("embedded", device="cpu", source=str(folder))


@pytest.mark.parametrize("channels", [384, 128])
def test_weights_of_fill_and_control_are_a_sentence(folder, channels):
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"in_channels": channels, "out_channels": 64}
    path.write_text(json.dumps(config))
    assert f"takes {channels} channels and gives 64" in sentence(folder)
    with pytest.raises(UserError, match="Fill and Control"):
        pipelines.check(str(folder))


def test_another_model_is_a_sentence(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "SD3Transformer2DModel" in sentence(folder)


@pytest.mark.parametrize("parts", [("transformer", "vae", "text_encoder", "text_encoder_2"), ("transformer",)])
def test_a_folder_of_a_variant_loads(folder, parts, embedded_pipe):
    for part in parts:
        for file in list((folder / part).glob("*.safetensors")):
            file.rename(file.with_suffix(".fp16.safetensors"))
    pipe = pipelines.load(str(folder), "float32", "cpu")
    assert torch.equal(make(pipe), make(embedded_pipe))


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "images", "least"), [(0, 4, 3), (1, 4, 3), (5, 1, 6)])
def test_a_polynomial_of_too_few_steps_is_a_sentence(steps, images, least):
    from types import SimpleNamespace

    from fluxnb.cache import teacache

    with pytest.raises(UserError, match=f"to {steps} steps of {images} images: give {least} steps or more.$"):
        teacache.fit(SimpleNamespace(inputs=[("a cat", i) for i in range(images)]), steps)
