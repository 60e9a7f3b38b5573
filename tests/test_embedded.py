"""The embedded model as it is shipped: its folder, its committed figures, and a sample of them recomputed."""

import csv
import json
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxnb.cache import first_block
from fluxnb.measure.quality import psnr
from fluxnb.models import embedded, pipelines
from fluxnb.technique import applied
from fluxnb.training import loop, train
from fluxnb.world import probe, scenes

ROOT = Path(__file__).resolve().parents[1]
MODEL = pipelines.describe("embedded")
SAMPLE = 6  # images of the committed evaluation that are made again


def generate(pipe, prompt="a red apple on a white table", seed=1, steps=8, **options):
    return pipelines.generate(pipe, [prompt], [seed], model=MODEL, steps=steps, **options)[0]


def difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.fixture(scope="module")
def evaluation():
    """The committed rows, numbers as numbers."""
    with (embedded.FOLDER / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: int(row[name]) for name in ("seed", "facts", "right", "probe_right")}
        row["vae_psnr_db"] = float(row["vae_psnr_db"])
    return rows


@pytest.fixture(scope="module")
def again(embedded_pipe):
    """The first rows and images of the evaluation, made here and now."""
    return train.evaluate(embedded_pipe, SAMPLE)


# --- the folder ---------------------------------------------------------------------------------------------


def test_diffusers_loads_the_folder_without_fluxnb(tmp_path):
    code = f"""
import sys
sys.modules["fluxnb"] = None  # importing it is an error from here on
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained({str(embedded.FOLDER)!r})
image = pipe("a red apple on a white table", height=128, width=128, num_inference_steps=2,
             max_sequence_length=24).images[0]
print(type(pipe).__name__, type(pipe.tokenizer).__name__, type(pipe.tokenizer_2).__name__,
      type(pipe.text_encoder).__name__, type(pipe.text_encoder_2).__name__, type(pipe.transformer).__name__,
      type(pipe.vae).__name__, pipe.transformer.config.guidance_embeds, image.size)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.strip().splitlines()[-1]
    assert words == (
        "FluxPipeline CLIPTokenizer T5Tokenizer CLIPTextModel T5EncoderModel FluxTransformer2DModel AutoencoderKL "
        "True (128, 128)"
    )


def test_the_folder_is_small_and_holds_nothing_but_data():
    about = ("README.md", "LICENSE")
    files = [path for path in embedded.FOLDER.rglob("*") if path.is_file() and path.name not in about]
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    assert not any(path.is_symlink() for path in files)
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".csv", ".txt", ".model"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4  # transformer, VAE, two text encoders
    assert (probe.FOLDER / probe.FILE).stat().st_size <= 4_000_000


def test_settings_and_curve_of_the_training_are_there():
    about = json.loads((embedded.FOLDER / "training.json").read_text())
    assert set(about["settings"]) == {f.name for f in fields(loop.Settings)}
    with (embedded.FOLDER / "training.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    last = {row["stage"]: row for row in curve}
    assert list(last) == ["draw", "vae", "flow", "distil"]
    for stage in ("vae", "flow", "distil"):
        assert int(last[stage]["step"]) == about["settings"][f"{stage}_steps"]
        first = next(row for row in curve if row["stage"] == stage)
        assert float(last[stage]["loss"]) < float(first["loss"]), stage


def test_the_training_fits_into_three_quarters_of_an_hour():
    with (embedded.FOLDER / "training.csv").open(newline="") as file:
        longest = {}
        for row in csv.DictReader(file):
            longest[row["stage"]] = max(float(row["seconds"]), longest.get(row["stage"], 0))
    assert sum(longest.values()) < 45 * 60


# --- what it was measured to be -----------------------------------------------------------------------------


def test_the_committed_evaluation_is_of_500_prompts_kept_out_of_training(evaluation):
    assert [row["seed"] for row in evaluation] == list(range(500))
    assert tuple(evaluation[0]) == train.EVALUATION_COLUMNS
    for row in evaluation:
        scene = scenes.held_out_scene(row["seed"])
        assert row["prompt"] == scene.caption
        assert row["facts"] == len(scenes.parse(scene.caption))
        assert 0 <= row["right"] <= row["facts"] and 0 <= row["probe_right"] <= row["facts"]
        assert bool(row["missed"]) == (row["right"] < row["facts"])


def test_the_committed_figures_are_those_promised(evaluation):
    figures = train.summary(evaluation)
    assert figures["images"] == 500
    assert figures["vae_psnr_db"] >= 35
    assert figures["adherence"] >= 0.90
    assert figures["probe_accuracy"] >= 0.99


def test_a_sample_of_the_evaluation_made_again_agrees(evaluation, again):
    rows, committed = again[0], evaluation[:SAMPLE]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in committed]
    assert [row["facts"] for row in rows] == [row["facts"] for row in committed]
    assert sum(abs(a["right"] - b["right"]) for a, b in zip(rows, committed, strict=True)) <= 1
    assert sum(abs(a["probe_right"] - b["probe_right"]) for a, b in zip(rows, committed, strict=True)) <= 1
    for a, b in zip(rows, committed, strict=True):
        assert a["vae_psnr_db"] == pytest.approx(b["vae_psnr_db"], abs=0.1)


def test_the_committed_contact_sheet_shows_these_images(again):
    with Image.open(ROOT / "reports/embedded/contact_sheet.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (8 * 132 - 4, 8 * 132 - 4, 3)  # 64 images
    for i, image in enumerate(again[1]):
        tile = pixels[:128, i * 132 : i * 132 + 128]
        # made on a GPU: a few images may turn out a little differently, none is another image
        assert psnr(np.asarray(image), tile) > 20, f"image {i}"


def test_first_block_cache_saves_half_the_steps_at_a_fifth(embedded_pipe):
    computed = {}
    for threshold in (0, 0.05, 0.2, 0.8):
        cache = first_block(threshold)
        with applied(embedded_pipe, cache):
            counts = []
            for prompt in scenes.STUDY_PROMPTS:
                generate(embedded_pipe, prompt, steps=28, output_type="latent")
                counts.append(cache.trace.computed)
        computed[threshold] = sum(counts) / len(counts)
    assert computed[0] == 28
    assert 28 > computed[0.05] > computed[0.2] > computed[0.8]
    assert computed[0.2] <= 0.45 * 28  # what a speedup of 2 needs


# --- how it behaves -----------------------------------------------------------------------------------------


def test_letter_case_changes_nothing(embedded_pipe):
    for prompt in (*scenes.STUDY_PROMPTS, "a blue cube, a red car and a white house on snow"):
        encoded = [
            embedded_pipe.encode_prompt(text, text, max_sequence_length=embedded.TOKENS)[:2]
            for text in (prompt, prompt.lower(), prompt.upper(), prompt.title())
        ]
        for words, pooled in encoded[1:]:
            assert not (words - encoded[0][0]).any() and not (pooled - encoded[0][1]).any(), prompt


def test_unknown_words_are_named_and_do_no_harm(embedded_pipe):
    with pytest.warns(UserWarning, match="'dragon', '7' in 'a dragon and a red car 7'"):
        image = generate(embedded_pipe, "a dragon and a red car 7", steps=2)
    assert image.size == (128, 128)
    with pytest.warns(UserWarning, match="never seen"):
        generate(embedded_pipe, "Ünïcode ☃ 日本語 " + "word " * 60, steps=1)


def test_known_words_and_the_empty_prompt_give_no_warning(embedded_pipe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(embedded_pipe, steps=1)
        generate(embedded_pipe, "", steps=1)
    assert not [w for w in caught if "never seen" in str(w.message)]


def test_a_seed_gives_the_same_image_again(embedded_pipe):
    assert difference(generate(embedded_pipe), generate(embedded_pipe)) == 0
    assert difference(generate(embedded_pipe), generate(embedded_pipe, seed=2)) > 8


def test_prompt_and_guidance_change_the_image(embedded_pipe):
    assert difference(generate(embedded_pipe), generate(embedded_pipe, "a green car on a beach")) > 8
    assert difference(generate(embedded_pipe, guidance=1.0), generate(embedded_pipe, guidance=5.0)) > 8


def test_an_image_does_not_depend_on_its_batch(embedded_pipe):
    prompts, seeds = ["a red apple on a white table", "a modern cityscape at night"], [4, 9]
    both = pipelines.generate(embedded_pipe, prompts, seeds, model=MODEL, steps=8, output_type="latent")
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = generate(embedded_pipe, prompt, seed, output_type="latent")
        torch.testing.assert_close(both[i], alone, atol=2e-3, rtol=2e-3)


def test_an_image_takes_no_longer_than_a_moment(embedded_pipe):
    """The promise is 0.6 s on two cores; a busy machine is given five times as long."""
    seconds = []
    for seed in range(3):
        started = time.perf_counter()
        generate(embedded_pipe, seed=seed, steps=28)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 3


def test_it_is_made_of_the_parts_that_the_module_says(embedded_pipe):
    for name, value in embedded.TRANSFORMER.items():
        found = embedded_pipe.transformer.config[name]
        assert (tuple(found) if isinstance(value, tuple) else found) == value, name
    for name, value in embedded.SCHEDULER.items():
        assert embedded_pipe.scheduler.config[name] == value, name
    assert embedded_pipe.vae.config.latent_channels == 16 and embedded_pipe.vae_scale_factor == 8
    assert embedded_pipe.tokenizer.model_max_length == embedded.CLIP_TOKENS
    assert embedded_pipe.tokenizer_2.get_vocab() == embedded.t5_tokenizer().get_vocab()
    for tokenizer in (embedded_pipe.tokenizer, embedded.clip_tokenizer()):  # begin, one token, end
        assert {len(ids) for ids in tokenizer(scenes.vocabulary()).input_ids} == {3}


def test_the_tokenizers_are_the_same_every_time_they_are_made():
    """A training that is resumed makes them again; other ids would be other words."""
    words = scenes.vocabulary()
    for make in (embedded.t5_tokenizer, embedded.clip_tokenizer):
        assert len({str(make()(words).input_ids) for _ in range(4)}) == 1, make.__name__


def test_weights_of_an_image_that_means_something(embedded_pipe):
    """Latents of the VAE are normalised: mean near 0 and deviation near 1, as the flow expects them."""
    drawn = [scenes.draw(scenes.training_scene(i), i) for i in range(16)]
    config = embedded_pipe.vae.config
    with torch.no_grad():
        latents = embedded_pipe.vae.encode(probe.to_tensor(drawn)).latent_dist.mean
    latents = (latents - config.shift_factor) * config.scaling_factor
    assert abs(latents.mean()) < 0.2 and 0.8 < latents.std() < 1.2
