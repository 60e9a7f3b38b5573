"""The four-step model as it is shipped: its size, its committed figures, a sample made again, and its export."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from measured import row

from fluxnb import findings, params, study, techniques
from fluxnb.__main__ import main
from fluxnb.cache import teacache
from fluxnb.errors import UserError
from fluxnb.models import embedded, pipelines
from fluxnb.study.results import Results
from fluxnb.study.subject import fingerprint
from fluxnb.techniques import kinds
from fluxnb.training import train, train_schnell
from fluxnb.world import scenes

MODEL = pipelines.describe(embedded.SCHNELL)
SAMPLE = 4  # images of the committed evaluation that are made again
PROMPT, SEED = "a red apple on a white table", 3


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load(embedded.SCHNELL, "float32", "cpu")


@pytest.fixture(scope="module")
def image(pipe):
    return pipelines.generate(pipe, [PROMPT], [SEED], model=MODEL)[0]


@pytest.fixture(scope="module")
def evaluation():
    with (embedded.SCHNELL_FOLDER / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [r | {k: float(r[k]) for k in ("seed", "facts", "right", "psnr_db", "st_lpips")} for r in rows]


@pytest.fixture
def s(tmp_path):
    return study.Study(params.load("h100"), "01_baseline", tmp_path)


# --- what is shipped, and what it was measured to be --------------------------------------------------------


def test_only_transformer_and_scheduler_are_its_own_and_they_are_small():
    files = [path for path in embedded.SCHNELL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert {path.parent.name for path in files} - {embedded.SCHNELL} == {"transformer", "scheduler"}


def test_prompts_kept_out_of_training_are_in_its_images(evaluation):
    figures = train_schnell.summary(evaluation)
    assert figures["images"] == 200 and figures["adherence"] >= 0.95
    assert 0 < figures["st_lpips"] < figures["st_lpips_max"] < 1 and figures["psnr_db"] > 25
    assert [r["prompt"] for r in evaluation] == [scenes.held_out_scene(seed).caption for seed in range(200)]


def test_the_page_of_the_embedded_model_shows_what_the_file_says(evaluation):
    figures = train_schnell.summary(evaluation)
    said = findings.distilled_sentence(figures, {"adherence": 0.5, "all_facts_right": 0.25, "images": 200})
    for part in (
        f"{figures['adherence']:.1%}",
        f"{figures['psnr_min_db']:.1f} dB at worst",
        "its teacher has 50.0% (25.0%)",
    ):
        assert part in said
    assert f"{figures['st_lpips_max']:.3f} at worst" in said
    frame = pd.DataFrame(evaluation)
    frame.loc[7, "right"] -= 2
    worst = findings.worst_distilled(frame, 2)
    assert worst.PSNR.iloc[0] == figures["psnr_min_db"] and worst["ST-LPIPS"].max() == figures["st_lpips_max"]
    assert worst.index[-1] == 7 and len(worst) <= 5 and worst.index.is_unique


def test_images_made_here_show_what_the_committed_evaluation_says(pipe, evaluation):
    rows, _ = train.evaluate(pipe, SAMPLE, steps=embedded.SCHNELL_STEPS)
    assert [(r["facts"], r["right"]) for r in rows] == [(r["facts"], r["right"]) for r in evaluation[:SAMPLE]]


def test_four_steps_are_near_to_its_teachers_28(image, embedded_pipe):
    from fluxnb.measure.quality import psnr

    teacher = pipelines.generate(embedded_pipe, [PROMPT], [SEED], model=pipelines.describe(embedded.NAME))[0]
    assert psnr(np.asarray(teacher), np.asarray(image)) > 25


# --- a model like the others --------------------------------------------------------------------------------


def test_it_says_its_own_number_of_steps_and_that_it_takes_no_guidance(pipe, image):
    assert (MODEL.steps, MODEL.guided, MODEL.weights, MODEL.judged, MODEL.checked) == (4, False, "trained", True, True)
    assert MODEL.small and not MODEL.own and not pipe.transformer.config.guidance_embeds
    given = {"model": MODEL, "steps": 4, "guidance": 9.0}
    assert np.array_equal(pipelines.generate(pipe, [PROMPT], [SEED], **given)[0], image)
    assert pipelines.transformer_config(embedded.SCHNELL)["guidance_embeds"] is False


def test_a_distilled_model_has_no_controlnet():
    with pytest.raises(UserError, match="belongs to embedded, and embedded-schnell is distilled"):
        pipelines.load_controlnet(embedded.SCHNELL, device="cpu")


def test_the_study_runs_four_step_models_beside_the_others(s):
    (small,), (full,) = s.distilled, s.distilled_random
    assert (small.model.name, full.model.name) == (embedded.SCHNELL, "flux-schnell-random")
    assert [s.steps(subject) for subject in (small, full)] == [4, 4] and s.steps(small, 2) == 2
    assert (small.width, full.width, full.model.tokens) == (128, 1024, 256)
    assert small.guidance == full.guidance == 0 and small.rounds == s.subject(embedded.NAME).rounds
    assert not {embedded.SCHNELL, "flux-schnell-random"} & {subject.model.name for subject in s.subjects}
    assert small.checked and not full.checked


def test_own_weights_come_without_the_studys_four_step_models(monkeypatch):
    monkeypatch.setenv("FLUXNB_MODEL", str(embedded.FOLDER))
    assert params.chosen("h100").study.distilled is None


@pytest.fixture
def of_ones_own(tmp_path, monkeypatch):
    """A function (configuration, steps) -> the study of a user's own folder, exported from the four-step model."""
    embedded.export(embedded.SCHNELL, tmp_path / "mine")

    def opened(gpu, steps=""):
        monkeypatch.setenv("FLUXNB_MODEL", str(tmp_path / "mine"))
        monkeypatch.setenv("FLUXNB_STEPS", steps)
        return study.Study(params.chosen(gpu), "06_teacache", tmp_path)

    return opened


@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_a_schnell_of_ones_own_is_told_from_its_folder_and_takes_four_steps_without_guidance(of_ones_own, gpu):
    s = of_ones_own(gpu)
    (own,) = s.distilled
    assert s.every == s.judged == s.few_steps == [own] and s.many_steps == s.distilled_random == []
    assert s.first_judged() == own and s.full_size == ([own] if gpu == "h100" else [])
    assert (s.steps(own), own.guidance, own.model.few, own.model.own) == (4, 0, True, True)


def test_more_steps_than_a_few_or_guidance_make_it_no_schnell(of_ones_own, monkeypatch):
    assert of_ones_own("cpu", "8").many_steps == []
    many = of_ones_own("cpu", "20")
    assert many.distilled == [] and many.many_steps == many.judged
    monkeypatch.setenv("FLUXNB_MODEL", str(embedded.FOLDER))  # with guidance
    monkeypatch.setenv("FLUXNB_STEPS", "4")
    guided = study.Study(params.chosen("cpu"), "06_teacache", many.root)
    assert guided.distilled == [] and len(guided.many_steps) == 1


def test_a_polynomial_of_few_steps_is_fitted_to_as_many_images_as_it_needs(of_ones_own):
    (own,) = of_ones_own("smoke").distilled
    assert len(own.inputs) == 1 and len(study.fitted.enough(own, 4, images=1).inputs) == 2
    assert len(study.fitted.enough(own, 28, images=1).inputs) == 1


@pytest.mark.thorough
def test_its_pages_have_the_rows_that_the_shipped_one_has(tmp_path, copy_project):
    root = copy_project(tmp_path / "project")
    embedded.export(embedded.SCHNELL, tmp_path / "mine")

    def rows(*model):
        environment = {n: v for n, v in os.environ.items() if not n.startswith("FLUXNB_")} | {"PYTHONPATH": str(root)}
        only = [part for number in ("05", "06", "07") for part in ("--only", number)]
        command = [sys.executable, "-m", "fluxnb", "report", "--gpu", "smoke", *only, *model]
        subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=900)
        (table,) = (root / "reports/own/single_gpu/smoke").glob("*/results.csv" if model else "results.csv")
        return [r for r in Results(table).rows() if r.ok and r.steps <= 4]

    shipped = {(r.notebook, r.label, r.steps) for r in rows() if r.model == embedded.SCHNELL}
    assert shipped <= {(r.notebook, r.label, r.steps) for r in rows("--model", str(tmp_path / "mine"))}


def test_the_digest_is_of_its_own_transformer_and_of_what_it_shares(s, monkeypatch, tmp_path):
    small = s.distilled[0]
    assert len({small.digest, s.subject(embedded.NAME).digest}) == 2
    before = fingerprint(embedded.SCHNELL)
    whole = shutil.copytree(embedded.FOLDER, tmp_path / "whole")
    monkeypatch.setattr(embedded, "FOLDER", whole)
    (whole / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"another")
    assert fingerprint(embedded.SCHNELL) == before
    (whole / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"another")
    assert fingerprint(embedded.SCHNELL) != before


def test_teacaches_polynomial_is_fitted_to_its_own_four_steps(pipe):
    own = teacache.coefficients(embedded.SCHNELL)
    assert own != teacache.coefficients(embedded.NAME) and teacache.of(pipe) == own
    assert teacache.coefficients("flux-schnell-random") == teacache.FLUX_DEV


# --- the whole model as a folder ----------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["fluxnb"] = None  # importing it is an error from here on
import numpy, torch
from diffusers import FluxPipeline
folder, prompt, seed, tokens, out = sys.argv[1:]
image = FluxPipeline.from_pretrained(folder)(
    prompt, generator=torch.Generator().manual_seed(int(seed)), width=128, height=128, num_inference_steps=4,
    guidance_scale=0.0, max_sequence_length=int(tokens),
).images[0]
numpy.save(out, numpy.asarray(image))
"""


def test_diffusers_alone_makes_the_same_image_from_what_was_exported(tmp_path, capsys, image):
    assert main(["export", embedded.SCHNELL, str(tmp_path / "model")]) == 0
    assert "num_inference_steps=4" in capsys.readouterr().out
    given = [str(tmp_path / "model"), PROMPT, str(SEED), str(embedded.TOKENS), str(tmp_path / "image.npy")]
    command = [sys.executable, "-I", "-c", WITHOUT, *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "image.npy"), np.asarray(image))


def test_the_embedded_model_is_exported_file_by_file_into_an_empty_folder(tmp_path):
    embedded.export(embedded.NAME, tmp_path)
    whole = {p.relative_to(embedded.FOLDER): p for p in embedded.FOLDER.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()} == set(whole)
    assert all((tmp_path / name).read_bytes() == path.read_bytes() for name, path in whole.items())


@pytest.mark.parametrize(
    "name, place, said",
    [
        ("embeded", "new", "There is no model 'embeded' to export: choose embedded or embedded-schnell"),
        (embedded.NAME, "full", "is there already and is no empty folder"),
        (embedded.NAME, "full/file", "is there already and is no empty folder"),
        (embedded.NAME, "nowhere/new", "nowhere is no folder: make it first"),
        (embedded.NAME, "full/file/new", "file is no folder"),
        (embedded.NAME, "/proc/new", "can't be written"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_sentence(tmp_path, capsys, name, place, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", name, str(tmp_path / place)]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_half_of_a_model(tmp_path, capsys, monkeypatch, there):
    copied, target = [], tmp_path / "model"
    if there:
        target.mkdir()

    def copyfile(path, copy):
        copied.append(copy)
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        copy.touch()

    monkeypatch.setattr(embedded.shutil, "copyfile", copyfile)
    assert main(["export", embedded.SCHNELL, str(target)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == ([target] if there else [])


# --- what its rows say --------------------------------------------------------------------------------------


def test_a_few_steps_are_set_beside_the_many_with_what_both_show():
    seen = {"images": 6, "psnr_identical": 6, "adherence": 0.975, "adherence_min": 0.8, "session": "a"}
    many = row(**seen)
    few = replace(many, model=embedded.SCHNELL, steps=4, latency_p50=many.latency_p50 / 5)
    said = findings.few_steps_sentence([few], [many])
    assert "`embedded-schnell` takes" in said and "in 4 steps (98% of the prompts' facts, 80% in the worst of 6" in said
    assert "`embedded` takes" in said and said.endswith("5 times as long, not timed in turn.")
    assert "can't be said" in findings.few_steps_sentence([replace(few, status="oom")], [many])


def test_the_batch_that_makes_most_images_is_set_beside_the_smallest_of_its_format():
    one = row(batch=1, images_per_s=2.0, label="blocks", session="a")
    rows = [one, replace(one, label="int8", images_per_s=2.5), replace(one, batch=4, images_per_s=5.0)]
    told = [replace(r, samples=[s * r.batch / r.images_per_s for s in (0.99, 1.0, 1.01)]) for r in rows]
    said = findings.batches_sentence(told)
    assert "from blocks 4 at once, 5, 2.50 times as many as 1 at once" in said and "noise" not in said
    near = replace(told[2], batch=8, images_per_s=4.98, samples=[8 / 4.98 * s for s in (0.99, 1.0, 1.01)])
    said = findings.batches_sentence([*told, near])
    assert "from blocks 4 at once, 5 (no more, beyond the noise, than from blocks 8)" in said


def test_sparse_products_are_batched_like_dense_ones():
    assert techniques.matrix(kinds.SPARSE_INT8).settings == {"quantization": "int8, 2:4 sparse"}
    assert techniques.matrix("int8") == techniques.TorchAO("int8")
