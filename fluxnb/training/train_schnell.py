"""Distils the embedded model to four steps without guidance: `python -m fluxnb.training.train_schnell`.

It is to the embedded model what FLUX.1-schnell is to FLUX.1-dev. Only the transformer learns; VAE and text encoders
stay the teacher's. Resumable like `fluxnb.training.train`; the settings are in training.json.

    paths    from noise, where the teacher's 28 steps at guidance 3.5 lead: its states at the student's times
    secant   from each state the student goes straight to the next one (progressive distillation, Salimans and Ho, 2022)
    rollout  the student's own four steps, end to end, go where the teacher's 28 went
    export   to fluxnb/models/weights/embedded-schnell in float16: transformer and scheduler
    evaluate prompts kept out of training: facts in the image, distance to the teacher's image of the same seed
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fluxnb.measure import perceptual, quality
from fluxnb.models import embedded, folders, pipelines
from fluxnb.training import train
from fluxnb.training.loop import OutOfTime, Run, fit
from fluxnb.world import scenes


@dataclass(frozen=True)
class Settings:
    """Everything that determines the training. `small()` is the one that tests use."""

    paths: int = 200_000
    path_batch: int = 500
    teacher_steps: int = 28
    secant_steps: int = 8_000
    secant_batch: int = 512
    secant_rate: float = 5e-4
    rollout_steps: int = 2_000
    rollout_batch: int = 512  # as secant's: one compiled forward pass serves both
    rollout_rate: float = 5e-5
    warm_up: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    held_out: int = 200
    seed: int = 0

    @staticmethod
    def small() -> Settings:
        return Settings(
            paths=6,
            path_batch=3,
            teacher_steps=5,
            secant_steps=3,
            secant_batch=2,
            rollout_steps=2,
            rollout_batch=2,
            warm_up=1,
            held_out=2,
        )


def without_guidance(transformer) -> nn.Module:
    """The same transformer without a guidance embedding: what guidance 3.5 adds goes into a bias of the time's."""
    from diffusers import FluxTransformer2DModel

    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    made: Any = FluxTransformer2DModel(**{**config, "guidance_embeds": False})
    embed, bias = transformer.time_text_embed, "time_text_embed.timestep_embedder.linear_2.bias"
    weights = {k: w.clone() for k, w in transformer.state_dict().items() if "guidance_embedder" not in k}
    with torch.no_grad():
        scaled = torch.tensor([1000 * embedded.GUIDANCE], device=transformer.device)
        weights[bias] += embed.guidance_embedder(embed.time_proj(scaled).to(transformer.dtype))[0]
    made.load_state_dict(weights)
    return made.to(transformer.device)


def sigmas(scheduler, steps: int) -> list[float]:
    """The noise levels of an image of the embedded model's size, from 1 to 0, steps + 1 of them."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, tokens = scheduler.config, (scenes.SIZE // 16) ** 2
    ends = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    mu = calculate_shift(tokens, *ends) if config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def paths(run: Run, teacher, captions: train.Captions, before: list[float], times: list[float]) -> torch.Tensor:
    """The teacher's states at the student's times, bfloat16 (paths, len(times), 64, 64); path i is of scene i.

    Args:
        teacher: of fluxnb.training.train.Conditioned.
        before: noise levels of the teacher's steps; between two of them its path is straight.
        times: noise levels at which states are kept, from 1 to 0.
    """
    s, path = run.settings, run.work / "paths.pt"
    if path.exists():
        return torch.load(path, map_location=run.device, weights_only=True)
    kept = torch.empty((s.paths, len(times), 64, 64), dtype=torch.bfloat16, device=run.device)
    guidance = torch.full((s.path_batch,), embedded.GUIDANCE, device=run.device)
    generator = torch.Generator(run.device).manual_seed(s.seed)
    for start in range(0, s.paths, s.path_batch):
        own = slice(start, start + s.path_batch)
        with run.autocast():
            text = teacher.text(captions.clip[:-1][own], captions.t5[:-1][own])
        state = torch.randn((s.path_batch, 64, 64), device=run.device, generator=generator)
        for high, low in zip(before, before[1:], strict=False):
            with run.autocast():
                velocity = teacher(state, torch.full_like(guidance, high), guidance, *text).float()
            for i, time in enumerate(times):
                if low <= time <= high:
                    kept[own, i] = (state + (time - high) * velocity).bfloat16()
            state = state + (low - high) * velocity
        run.check()
    torch.save(kept, path)
    return kept


def learn(run: Run, student, teacher, captions: train.Captions, states: torch.Tensor, times: list[float]) -> nn.Module:
    """Both stages; the moving average of the student's transformer.

    Args:
        student, teacher: of fluxnb.training.train.Conditioned; only the student's transformer learns.
        states: of `paths`, at `times`.
    """
    s, at = run.settings, torch.tensor(times, device=run.device)
    steps = len(times) - 1  # states need gradients in both stages, else the forward pass is compiled twice

    def chosen(count: int, generator):
        index = torch.randint(len(states), (count,), device=run.device, generator=generator)
        return index, captions.clip[index], captions.t5[index]

    def text(clip_ids, t5_ids):
        with torch.no_grad(), run.autocast():
            return teacher.text(clip_ids, t5_ids)

    def secants(generator):
        index, *ids = chosen(s.secant_batch, generator)
        step = torch.randint(steps, (s.secant_batch,), device=run.device, generator=generator)
        here, there = states[index, step].float(), states[index, step + 1].float()
        return *ids, here, (there - here) / (at[step + 1] - at[step])[:, None, None], at[step]

    def straight(clip_ids, t5_ids, here, velocity, t):
        words = text(clip_ids, t5_ids)
        with run.autocast():
            predicted = student(here.detach().requires_grad_(), t, None, *words)
        return (predicted.float() - velocity).pow(2).mean()

    def ends(generator):
        index, *ids = chosen(s.rollout_batch, generator)
        return *ids, states[index, 0].float(), states[index, -1].float()

    def rolled_out(clip_ids, t5_ids, state, end):
        words, state = text(clip_ids, t5_ids), state.detach().requires_grad_()
        for step in range(steps):
            with run.autocast():
                velocity = student(state, at[step].repeat(len(state)), None, *words)
            state = state + (at[step + 1] - at[step]) * velocity.float()
        return (state - end).pow(2).mean()

    average = fit(run, "secant", student, secants, straight, s.secant_steps, s.secant_rate)
    train.copy_weights(average.transformer, student.transformer)
    return fit(run, "rollout", student, ends, rolled_out, s.rollout_steps, s.rollout_rate).transformer


def distil(run: Run, pipe, out: Path) -> None:
    """All stages in turn; raises OutOfTime between or inside them.

    Args:
        pipe: the embedded model in float32 on the run's device.
        out: where transformer, scheduler, curve and settings are written.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = run.settings
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**embedded.SCHNELL_SCHEDULER)
    times = sigmas(scheduler, embedded.SCHNELL_STEPS)
    captions = train.Captions(pipe, [scenes.training_scene(i).caption for i in range(s.paths)], run.device)
    teacher = train.Conditioned(pipe, run).to(run.device).requires_grad_(False)
    states = paths(run, teacher, captions, sigmas(pipe.scheduler, s.teacher_steps), times)
    pipe.transformer = without_guidance(pipe.transformer).requires_grad_(True)
    student = train.Conditioned(pipe, run).to(run.device)  # its encoders are the teacher's, which don't learn
    transformer: Any = learn(run, student, teacher, captions, states, times)
    transformer.to("cpu", torch.float16).save_pretrained(out / "transformer", safe_serialization=True)
    scheduler.save_pretrained(out / "scheduler")
    train.write_about(run, out)


# --- evaluation -------------------------------------------------------------------------------------------

COLUMNS = ("seed", "prompt", "facts", "right", "missed", "psnr_db", "st_lpips")


def evaluate(student, teacher, count: int) -> list[dict]:
    """What prompts kept out of training show, and how far that is from the teacher's 28 steps from the same noise.

    Args:
        student, teacher: pipelines.

    Returns:
        A row for each image, with COLUMNS.
    """
    rows, images = train.evaluate(student, count, steps=embedded.SCHNELL_STEPS)
    originals = train.evaluate(teacher, count)[1]
    distances = perceptual.st_lpips(*([np.asarray(image) for image in kind] for kind in (originals, images)))
    for row, original, image, distance in zip(rows, originals, images, distances, strict=True):
        row["psnr_db"] = round(quality.psnr(np.asarray(original), np.asarray(image)), 3)
        row["st_lpips"] = round(distance, 5)
    return [{name: row[name] for name in COLUMNS} for row in rows]


def summary(rows: list[dict]) -> dict[str, float]:
    """The figures of an evaluation: shares of facts and images, and distances to the teacher's images."""
    n = len(rows)
    return {
        "images": n,
        "adherence": sum(r["right"] for r in rows) / sum(r["facts"] for r in rows),
        "all_facts_right": sum(r["right"] == r["facts"] for r in rows) / n,
        "psnr_db": sum(r["psnr_db"] for r in rows) / n,
        "psnr_min_db": min(r["psnr_db"] for r in rows),
        "st_lpips": sum(r["st_lpips"] for r in rows) / n,
        "st_lpips_max": max(r["st_lpips"] for r in rows),
    }


def write_evaluation(folder: Path, count: int, device: str) -> dict[str, float]:
    """Evaluates the exported model; writes evaluation.csv beside it; returns the summary."""
    teacher = pipelines.load(embedded.NAME, "float32", device)
    rows = evaluate(folders.load(folder, torch.float32, embedded.FOLDER).to(device), teacher, count)
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return summary(rows)


def main(arguments: list[str] | None = None) -> int:
    """Distils, exports and evaluates; 0 also when the time given was used up first."""
    parser = argparse.ArgumentParser(
        prog="python -m fluxnb.training.train_schnell", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, help="stop cleanly after this long; run again to go on")
    parser.add_argument("--work", type=Path, default=Path("build/train_schnell"), help="where the state is kept")
    parser.add_argument("--out", type=Path, default=embedded.SCHNELL_FOLDER, help="where the model is written")
    parser.add_argument("--small", action="store_true", help="a few steps only, to try the script")
    options = parser.parse_args(arguments)
    settings = Settings.small() if options.small else Settings()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(options.work, settings, device, options.minutes, torch.get_num_threads())
    train.prepare(device, settings.seed)
    try:
        distil(run, pipelines.load(embedded.NAME, "float32", device), options.out)
    except OutOfTime:
        print("time is over: the state is saved; run the same command again to go on")
        return 0
    print(json.dumps(write_evaluation(options.out, settings.held_out, device), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
