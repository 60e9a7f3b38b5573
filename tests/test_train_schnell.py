"""The four-step model's training: the student begins as its teacher, and learns where the teacher's images end."""

import json

import pytest
import torch

from fluxnb.models import embedded, folders, pipelines
from fluxnb.training import train, train_schnell
from fluxnb.training.loop import Run
from fluxnb.world import scenes

SMALL = train_schnell.Settings.small()


@pytest.fixture(scope="module")
def teacher():
    return pipelines.load(embedded.NAME, device="cpu")


def test_without_its_guidance_embedding_the_transformer_is_the_one_at_guidance_3_5(teacher):
    bare = train_schnell.without_guidance(teacher.transformer)
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(2, 64, 64, generator=generator),
        "encoder_hidden_states": torch.randn(2, embedded.TOKENS, 128, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
        "timestep": torch.tensor([1.0, 0.25]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(embedded.TOKENS, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        own = bare(**given)[0]
        guided = teacher.transformer(**given, guidance=torch.full((2,), embedded.GUIDANCE))[0]
    assert not bare.config.guidance_embeds
    torch.testing.assert_close(own, guided, atol=1e-5, rtol=1e-5)


def test_the_students_times_are_those_of_flux_schnell():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**embedded.SCHNELL_SCHEDULER)
    assert train_schnell.sigmas(scheduler, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_paths_end_where_the_pipeline_ends_and_are_straight_between_its_steps(teacher, tmp_path):
    run = Run(tmp_path, SMALL, "cpu", None, 1)
    texts = [scenes.training_scene(i).caption for i in range(SMALL.paths)]
    conditioned = train.Conditioned(teacher, run).requires_grad_(False)
    before = train_schnell.sigmas(teacher.scheduler, SMALL.teacher_steps)
    middle = (before[1] + before[2]) / 2
    times = [1.0, before[1], middle, before[2], 0.0]
    states = train_schnell.paths(run, conditioned, train.Captions(teacher, texts, "cpu"), before, times)
    start, first, between, second, end = states[:2].float().unbind(1)
    made = teacher(
        texts[:2], latents=start, num_inference_steps=SMALL.teacher_steps, guidance_scale=embedded.GUIDANCE,
        width=128, height=128, max_sequence_length=embedded.TOKENS, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(end, made, atol=0.1, rtol=0.1)  # states are kept in bfloat16
    assert (end - start).abs().mean() > 0.5
    torch.testing.assert_close(between, (first + second) / 2, atol=0.05, rtol=0.05)


def test_the_script_makes_a_transformer_that_the_embedded_model_takes_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--small", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert train_schnell.main([*arguments, "--minutes", "0"]) == 0
    assert "run the same command again" in capsys.readouterr().out
    assert train_schnell.main(arguments) == 0
    figures = json.loads("{" + capsys.readouterr().out.split("{", 1)[1])
    assert figures["images"] == SMALL.held_out and 0 < figures["st_lpips"] < 1
    pipe = folders.load(tmp_path / "out", torch.float32, embedded.FOLDER)
    assert not pipe.transformer.config.guidance_embeds and pipe.scheduler.config.shift == 1.0
    about = json.loads((tmp_path / "out/training.json").read_text())
    assert about["settings"]["rollout_steps"] == SMALL.rollout_steps
    teacher = pipelines.load(embedded.NAME, device="cpu")
    first = train_schnell.without_guidance(teacher.transformer).state_dict()
    assert any(not torch.equal(w.half(), first[name].half()) for name, w in pipe.transformer.state_dict().items())
