"""The training script with a few steps: it makes a folder that loads, and it goes on where it stopped."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fluxnb.models import pipelines
from fluxnb.training import loop, train, train_probe
from fluxnb.world import probe, scenes

ROOT = Path(__file__).resolve().parents[1]
SMALL = loop.Settings.small()


def run(folder, minutes=None, settings=SMALL):
    return loop.Run(folder, settings, "cpu", minutes, workers=1)


# --- the whole ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the script was run twice: once from nothing, once more, in a process that has imported all."""
    root = tmp_path_factory.mktemp("train")
    given = {"--workers": 1, "--work": root / "work", "--out": root / "out", "--sheet": root / "a.webp"}
    arguments = ["--small", *(str(part) for option in given.items() for part in option)]
    command = [sys.executable, "-m", "fluxnb.training.train", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before = {path.name: path.read_bytes() for path in (root / "out/transformer").iterdir()}
    assert train.main(arguments) == 0
    return root, before


def test_the_script_makes_a_model_that_loads(trained):
    root, _ = trained
    pipe = pipelines.load(str(root / "out"), device="cpu")
    (image,) = pipelines.generate(pipe, ["a red cup"], [0], model=pipelines.describe("embedded"), steps=1)
    assert image.size == (128, 128)
    assert pipe.vae.config.shift_factor != 0 and pipe.vae.config.scaling_factor != 1  # from the latents


def test_the_script_leaves_its_settings_curve_and_evaluation(trained):
    root, _ = trained
    about = json.loads((root / "out/training.json").read_text())
    assert about["settings"] == dataclasses.asdict(SMALL)
    assert about["hardware"]["cpu"] and about["versions"]["torch"]
    with (root / "out/training.csv").open(newline="") as file:
        assert {row["stage"] for row in csv.DictReader(file)} == {"draw", "vae", "flow", "distil"}
    with (root / "out/evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == train.EVALUATION_COLUMNS
    assert [row["prompt"] for row in rows] == [scenes.held_out_scene(i).caption for i in range(SMALL.held_out)]
    with Image.open(root / "a.webp") as sheet:
        assert sheet.size == (8 * 132 - 4, 128)


def test_a_finished_training_run_again_trains_nothing(trained):
    root, before = trained
    assert {path.name: path.read_bytes() for path in (root / "out/transformer").iterdir()} == before
    with (root / "out/training.csv").open(newline="") as file:
        stages = [row["stage"] for row in csv.DictReader(file)]
    assert stages.count("vae") == stages.count("flow") == stages.count("distil") == 1


def test_the_time_of_drawing_is_kept_when_the_script_goes_on(trained):
    with (trained[0] / "out/training.csv").open(newline="") as file:
        drawing = [row for row in csv.DictReader(file) if row["stage"] == "draw"]
    assert len(drawing) == 1  # else the last one, of no time at all, is what the notebook adds up


def test_the_drawn_scenes_are_those_of_the_training_set(trained):
    root, _ = trained
    drawn = np.load(root / "work/scenes.npy")
    assert drawn.shape == (SMALL.scenes, 128, 128, 3) and drawn.dtype == np.uint8
    for i in (0, 50, SMALL.scenes - 1):
        assert (drawn[i] == np.asarray(scenes.draw(scenes.training_scene(i), i))).all()


def test_upper_case_words_get_the_embedding_of_their_lower_case(trained):
    pipe = pipelines.load(str(trained[0] / "out"), device="cpu")
    table = pipe.text_encoder_2.get_input_embeddings().weight
    ids = pipe.tokenizer_2.convert_tokens_to_ids(["▁red", "▁Red", "▁RED", "▁blue"])
    assert torch.equal(table[ids[0]], table[ids[1]]) and torch.equal(table[ids[0]], table[ids[2]])
    assert not torch.equal(table[ids[0]], table[ids[3]])


# --- stop and go on -----------------------------------------------------------------------------------------


class Toy:
    """Learns to multiply by 3, and counts the steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.module, self.count = nn.Linear(1, 1), 0

    def sample(self, generator):
        return (torch.randn(16, 1, generator=generator),)

    def objective(self, x):
        self.count += 1
        return (self.module(x) - 3 * x).pow(2).mean()

    def fit(self, folder, steps, minutes=None):
        return loop.fit(run(folder, minutes), "toy", self.module, self.sample, self.objective, steps, 0.05)


def stored(folder):
    return torch.load(folder / "toy.pt", weights_only=True)


def test_a_stopped_stage_goes_on_where_it_stopped(tmp_path):
    counts = []
    for expected in (100, 200):
        toy = Toy()
        with pytest.raises(loop.OutOfTime):
            toy.fit(tmp_path, 250, minutes=0)
        counts.append(toy.count)
        assert stored(tmp_path)["step"] == expected
        assert stored(tmp_path)["optimizer"]["state"][0]["step"] == expected
        assert torch.equal(stored(tmp_path)["module"]["weight"], toy.module.weight.detach())
    toy = Toy()
    average = toy.fit(tmp_path, 250, minutes=0)  # the last steps are done, whatever the clock says
    assert [*counts, toy.count] == [100, 100, 50]
    assert stored(tmp_path)["step"] == 250 and stored(tmp_path)["optimizer"] is None
    assert abs(average.weight.item() - 3) < 0.5
    assert torch.equal(stored(tmp_path)["average"]["weight"], average.weight)
    with (tmp_path / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [100, 200, 250]
    losses, seconds = ([float(row[name]) for row in rows] for name in ("loss", "seconds"))
    assert losses == sorted(losses, reverse=True) and seconds == sorted(seconds)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first = Toy().fit(tmp_path, 20)
    toy = Toy()
    again = toy.fit(tmp_path, 20)
    assert toy.count == 0 and torch.equal(again.weight, first.weight)


def test_an_interrupted_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    with pytest.raises(loop.OutOfTime):
        Toy().fit(tmp_path, 250, minutes=0)

    def broken(state, path):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError):
        Toy().fit(tmp_path, 250, minutes=0)
    assert stored(tmp_path)["step"] == 100


def test_the_average_follows_slowly(tmp_path):
    toy = Toy()
    before = toy.module.weight.item()
    average = toy.fit(tmp_path, 30)
    assert min(before, 3) < average.weight.item() < toy.module.weight.item()
    assert not average.weight.requires_grad


def test_other_settings_do_not_go_on_with_a_training(tmp_path):
    run(tmp_path)
    run(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, settings=dataclasses.replace(SMALL, seed=1))
    text = str(stopped.value.code)
    assert str(tmp_path) in text and "other settings" in text and "delete the folder" in text


def test_the_clock():
    assert loop.Clock(0).over() and not loop.Clock(None).over() and not loop.Clock(5).over()


# --- parts --------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    rates = [loop.learning_rate(step, 1000, 2.0, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[100] == 2.0
    assert all(a <= b for a, b in zip(rates[:100], rates[1:100], strict=False))
    assert all(a >= b for a, b in zip(rates[100:], rates[101:], strict=False))
    assert rates[550] == pytest.approx(1.0) and rates[-1] < 1e-4


def test_the_flow_goes_straight_from_image_to_noise(tmp_path):
    latents = torch.randn(10, 16, 16, 16)
    generator = torch.Generator().manual_seed(0)
    index, noisy, velocity, t = train.noisy_batch(run(tmp_path), latents, generator)
    clean = pipelines.pack(latents[index])
    assert ((t > 0) & (t < 1)).all()
    torch.testing.assert_close(noisy, clean + t[:, None, None] * velocity, atol=1e-5, rtol=1e-5)


def test_captions_belong_to_the_scenes(tmp_path):
    settings = dataclasses.replace(SMALL, unknown_word=0.0)
    captions = train.describe(tmp_path, settings)
    assert captions == [scenes.training_scene(i).caption for i in range(SMALL.scenes)]
    assert train.describe(tmp_path, settings) == captions


def test_some_captions_get_a_word_that_nobody_knows(tmp_path):
    captions = train.describe(tmp_path, dataclasses.replace(SMALL, unknown_word=0.5))
    strange = [bool(scenes.unknown_words(caption)) for caption in captions]
    assert 0.3 < sum(strange) / len(strange) < 0.7


def test_the_summary_of_an_evaluation():
    rows = [
        {"facts": 4, "right": 4, "probe_right": 4, "vae_psnr_db": 36.0},
        {"facts": 6, "right": 3, "probe_right": 5, "vae_psnr_db": 40.0},
    ]
    assert train.summary(rows) == {
        "images": 2,
        "adherence": 0.75,
        "all_facts_right": 0.5,
        "probe_accuracy": 0.9,
        "probe_all_right": 0.5,
        "vae_psnr_db": 38.0,
        "vae_psnr_min_db": 36.0,
    }


def test_a_contact_sheet_has_every_image_in_its_place():
    images = [Image.new("RGB", (128, 128), (i, i, i)) for i in range(10)]
    sheet = train.contact_sheet(images, columns=4)
    assert sheet.size == (4 * 132 - 4, 3 * 132 - 4)
    assert sheet.getpixel((132 * 1 + 5, 132 * 2 + 5)) == (9, 9, 9)
    assert sheet.getpixel((129, 5)) == (255, 255, 255)


@pytest.mark.thorough
def test_the_probes_script_leaves_a_probe_that_loads_with_its_settings_curve_and_evaluation(tmp_path):
    small = train_probe.Settings.small()
    arguments = ["--small", "--workers", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert train_probe.main(arguments) == 0
    before = load_file(tmp_path / "out" / probe.FILE)
    answers = probe.load(tmp_path / "out")(torch.zeros(1, 3, 128, 128))
    assert {name: scores.shape[1] - 1 for name, scores in answers.items()} == {
        name: len(values) for name, values in probe.ANSWERS.items()
    }
    about = json.loads((tmp_path / "out" / probe.ABOUT).read_text())
    assert about["settings"] == dataclasses.asdict(small) and about["summary"]
    assert str(tmp_path) not in json.dumps(about)
    with (tmp_path / "out" / probe.CURVE).open(newline="") as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["draw", "reader", "pools", "probe"]
    assert train_probe.main(arguments) == 0  # nothing is trained a second time
    again = load_file(tmp_path / "out" / probe.FILE)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)
