"""Trains the embedded ControlNet: `python -m fluxnb.training.train_control`, after the embedded model.

A `FluxControlNetModel` begins as the transformer's first blocks and learns, with the transformer frozen, what edges
(Canny) and depth (the renderer's) say about a scene. The objective is the flow's: the velocity from the noised scene,
given its caption at a random guidance scale. Resumable like `fluxnb.training.train`; the settings are in training.json.

    draw     scenes, their edges and their depth, encoded by the embedded VAE
    control  the ControlNet, the transformer frozen
    export   to fluxnb/models/weights/controlnet in float16, as diffusers saves it
    evaluate prompts kept out of training: agreement with the condition, with the ControlNet and without
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fluxnb.models import control, embedded, pipelines
from fluxnb.training.loop import OutOfTime, Run, fit
from fluxnb.training.train import Captions, prepare, to_unit, write_about
from fluxnb.world import probe, scenes

LAYERS, SINGLE_LAYERS = 2, 0  # as in the newer published ones: double blocks only


@dataclass(frozen=True)
class Settings:
    """Everything that determines the training. `small()` is the one that tests use."""

    scenes: int = 40_000
    control_steps: int = 12_000
    control_batch: int = 256
    control_rate: float = 5e-4
    warm_up: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    time_mean: float = 0.3  # of the logit of t, as the embedded model was trained
    time_std: float = 1.1
    drop_caption: float = 0.1
    guidance_low: float = 1.0
    guidance_high: float = 5.0
    held_out: int = 40
    seed: int = 0

    @staticmethod
    def small() -> Settings:
        return Settings(scenes=16, control_steps=3, control_batch=4, warm_up=1, held_out=2)


def build(transformer) -> nn.Module:
    """The untrained ControlNet: copies of the transformer's first blocks, and projections that are zero."""
    from diffusers import FluxControlNetModel

    config = {**dict(transformer.config), "num_layers": LAYERS, "num_single_layers": SINGLE_LAYERS}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    config.pop("out_channels", None)
    model: Any = FluxControlNetModel(**config, num_mode=len(control.MODES))
    for name in ("time_text_embed", "context_embedder", "x_embedder"):
        getattr(model, name).load_state_dict(getattr(transformer, name).state_dict())
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for own, theirs in zip(getattr(model, name), getattr(transformer, name), strict=False):
            own.load_state_dict(theirs.state_dict())
    nn.init.normal_(model.controlnet_mode_embedder.weight, std=0.02)
    return model


@torch.no_grad()
def draw(run: Run, vae) -> tuple[torch.Tensor, list[str]]:
    """Normalised latents (scenes, 1 + modes, 16, 16, 16) of pictures and their conditions, and the captions."""
    path, count = run.work / "conditions.pt", run.settings.scenes
    captions = [scenes.training_scene(i).caption for i in range(count)]
    if path.exists():
        return torch.load(path, map_location=run.device, weights_only=True), captions
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    vae = vae.to(memory_format=torch.channels_last)
    parts = []
    for start in range(0, count, 100):
        pixels = []
        for i in range(start, min(start + 100, count)):
            scene = scenes.training_scene(i)
            picture = scenes.draw(scene, i)
            pixels += [np.asarray(im) for im in (picture, control.edges(picture), scenes.depth(scene, i))]
        images = to_unit(torch.from_numpy(np.stack(pixels)).to(run.device))
        images = images.contiguous(memory_format=torch.channels_last)
        latents = (vae.encode(images).latent_dist.mean - shift) * scale
        parts.append(latents.unflatten(0, (-1, 1 + len(control.MODES))).bfloat16())
        run.check()
    latents = torch.cat(parts)
    torch.save(latents, path)
    return latents, captions


class Controlled(nn.Module):
    """ControlNet and frozen transformer as one module: noisy tokens, their condition and caption in, velocity out."""

    def __init__(self, controlnet, pipe):
        super().__init__()
        self.controlnet = controlnet
        self.frozen = (pipe.transformer.requires_grad_(False), pipe.text_encoder, pipe.text_encoder_2)
        side = scenes.SIZE // 16
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3)
        self.register_buffer("image_ids", ids.float(), persistent=False)
        self.register_buffer("text_ids", torch.zeros(embedded.TOKENS, 3), persistent=False)

    def text(self, clip_ids, t5_ids):
        with torch.no_grad():
            return self.frozen[1](clip_ids).pooler_output, self.frozen[2](t5_ids)[0]

    def forward(self, noisy, condition, mode, t, guidance, pooled, words):
        given = {
            "hidden_states": noisy,
            "encoder_hidden_states": words,
            "pooled_projections": pooled,
            "timestep": t,
            "guidance": guidance,
            "img_ids": self.image_ids,
            "txt_ids": self.text_ids,
            "return_dict": False,
        }
        double, single = self.controlnet(controlnet_cond=condition, controlnet_mode=mode, **given)
        return self.frozen[0](**given, controlnet_block_samples=double, controlnet_single_block_samples=single)[0]


def train_control(run: Run, controlnet, pipe, latents: torch.Tensor, captions: list[str]) -> nn.Module:
    """Returns the moving average of the ControlNet's weights."""
    s = run.settings
    texts = Captions(pipe, captions, run.device)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.to(run.device)
    model = Controlled(controlnet, pipe).to(run.device)

    def sample(generator):
        def drawn(*shape):
            return torch.rand(shape, device=run.device, generator=generator)

        n = s.control_batch
        index = torch.randint(len(latents), (n,), device=run.device, generator=generator)
        mode = torch.randint(len(control.MODES), (n,), device=run.device, generator=generator)
        clean = pipelines.pack(latents[index, 0].float())
        condition = pipelines.pack(latents[index, 1 + mode].float())
        noise = torch.randn(clean.shape, device=run.device, generator=generator)
        t = torch.sigmoid(s.time_mean + s.time_std * torch.randn(n, device=run.device, generator=generator))
        guidance = s.guidance_low + (s.guidance_high - s.guidance_low) * drawn(n)
        said = torch.where(drawn(n) < s.drop_caption, texts.empty, index)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        return texts.clip[said], texts.t5[said], noisy, condition, mode[:, None], t, guidance, noise - clean

    def objective(clip_ids, t5_ids, noisy, condition, mode, t, guidance, velocity):
        with run.autocast():
            predicted = model(noisy, condition, mode, t, guidance, *model.text(clip_ids, t5_ids))
        return (predicted.float() - velocity).pow(2).mean()

    return fit(run, "control", model, sample, objective, s.control_steps, s.control_rate).controlnet


def evaluate(controlnet, count: int) -> list[dict]:
    """Agreement with the condition, with the ControlNet and without, for prompts kept out of training."""
    base = pipelines.load("embedded", device="cpu")
    pipe = pipelines.as_use_case(base, "ControlNet txt2img", controlnet)
    rows = []
    for seed in range(count):
        scene = scenes.held_out_scene(seed)
        picture = scenes.draw(scene, 10**9 + seed)
        given = {"edges": control.edges(picture), "depth": scenes.depth(scene, 10**9 + seed)}
        free = pipelines.generate(base, [scene.caption], [seed], model=pipelines.describe("embedded"))[0]
        for kind, condition in given.items():
            made = pipelines.generate(
                pipe,
                [scene.caption],
                [seed],
                model=pipelines.describe("embedded"),
                condition=condition,
                kind=kind,
            )[0]
            rows.append(
                {
                    "seed": seed,
                    "prompt": scene.caption,
                    "kind": kind,
                    "agreement": round(control.agreement(made, condition, kind), 4),
                    "agreement_without": round(control.agreement(free, condition, kind), 4),
                    "adherence": probe.adherence([scene.caption], [made])[0],
                }
            )
    return rows


def export(run: Run, controlnet, out: Path) -> None:
    """Writes the ControlNet in float16 as diffusers saves it, the training curve and the settings."""
    controlnet.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
    write_about(run, out)


def main(arguments: list[str] | None = None) -> int:
    """Trains, exports and evaluates; 0 also when the time given was used up first."""
    parser = argparse.ArgumentParser(
        prog="python -m fluxnb.training.train_control", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, help="stop cleanly after this long; run again to go on")
    parser.add_argument("--work", type=Path, default=Path("build/train_control"), help="where the state is kept")
    parser.add_argument("--out", type=Path, default=control.FOLDER, help="where the model is written")
    parser.add_argument("--small", action="store_true", help="a few steps only, to try the script")
    for name in ("scenes", "control-steps", "control-batch"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args(arguments)
    settings = Settings.small() if options.small else Settings()
    chosen = ("scenes", "control_steps", "control_batch")
    settings = replace(settings, **{k: getattr(options, k) for k in chosen if getattr(options, k)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(options.work, settings, device, options.minutes, torch.get_num_threads())
    prepare(device, settings.seed)
    pipe = pipelines.load("embedded", "float32", device)
    try:
        latents, captions = draw(run, pipe.vae)
        controlnet = train_control(run, build(pipe.transformer), pipe, latents, captions)
    except OutOfTime:
        print("time is over: the state is saved; run the same command again to go on")
        return 0
    export(run, controlnet, options.out)
    print(json.dumps(write_evaluation(options.out, settings.held_out), indent=1))
    return 0


def write_evaluation(folder: Path, count: int) -> dict[str, float]:
    """Evaluates the exported ControlNet; writes evaluation.csv beside it; returns the summary."""
    rows = evaluate(pipelines.load_controlnet("embedded", "float32", "cpu", source=folder), count)
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return summary(rows)


def summary(rows: list[dict]) -> dict[str, float]:
    """Means of an evaluation, for each kind of condition."""
    found = {}
    for kind in control.MODES:
        own = [r for r in rows if r["kind"] == kind]
        for name in ("agreement", "agreement_without"):
            found[f"{kind} {name}"] = sum(r[name] for r in own) / len(own)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
