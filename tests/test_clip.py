"""CLIP scores, with a CLIP of random weights made here."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fluxnb import study
from fluxnb.errors import UserError
from fluxnb.measure import clip
from fluxnb.models import embedded
from fluxnb.params import load
from fluxnb.study.judging import judge

PROMPTS = ("a red apple on a white table", "a cat")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole CLIP: model, tokenizer, preprocessor."""
    torch.manual_seed(0)
    tokenizer, path = embedded.clip_tokenizer(), tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return str(path)


def test_a_score_is_the_cosine_of_an_image_and_its_own_prompt(folder):
    images = [picture(0), picture(1)]
    found = clip.scores(folder, PROMPTS, images)
    assert all(-1 <= score <= 1 for score in found) and found[0] != found[1]
    assert clip.scores(folder, PROMPTS[1:], images[1:]) == pytest.approx(found[1:], abs=1e-5)
    assert clip.scores(folder, PROMPTS[::-1], images) != pytest.approx(found, abs=1e-5)
    assert clip.scores(folder, ["a cat " * 200], images[:1])  # longer than a CLIP reads


def test_a_judged_row_has_the_mean_and_the_worst_score_where_a_clip_is_given(folder, tmp_path):
    given = load("cpu")
    small = replace(given.study, prompts=list(PROMPTS), seeds=[0], clip=folder)
    own = study.Study(replace(given, study=small), "05_first_block_cache", tmp_path).subject(embedded.NAME)
    images = [picture(0), picture(1)]
    row, scores = judge(own, images, images, [], None), clip.scores(folder, PROMPTS, images)
    assert row["clip_score"] == pytest.approx(sum(scores) / 2) and row["clip_score_min"] == min(scores)
    without = replace(own, clip=None)
    assert "clip_score" not in judge(without, images, images, [], None)
    assert without.digest != own.digest  # rows that another CLIP judged aren't found for these


def test_a_folder_that_is_no_clip_is_named_in_one_sentence(folder, tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 32}))
    without_weights = tmp_path / "half"
    without_weights.mkdir()
    CLIPConfig().save_pretrained(without_weights)
    for source in (tmp_path / "nothing", tmp_path, other, without_weights):
        with pytest.raises(UserError) as said:
            clip.load(str(source))
        assert str(said.value).count("\n") == 0 and "is no CLIP of transformers" in str(said.value)
        assert str(source) in str(said.value) and str(said.value).endswith("or null.")
