"""Trains the embedded model from nothing: `make train-embedded`, or `python -m fluxnb.training.train`.

Stages, each resumable (`--minutes 9` stops cleanly and the same command goes on where it stopped):

    draw     scenes from the grammar, with their captions and facts
    vae      the autoencoder: mean squared + absolute error, a very small KL term
    flow     transformer and text encoders together: rectified flow (Liu et al., 2022), logit-normal times
             (Esser et al., 2024), captions dropped at random for guidance
    distil   guidance distillation as in FLUX.1-dev: the student learns, at guidance w,
             v(uncond) + w (v(cond) - v(uncond)) of the teacher (Meng et al., 2022)
    export   to fluxnb/models/weights/embedded as an ordinary FluxPipeline folder in float16
    evaluate 500 prompts and seeds kept out of training -> evaluation.csv and a contact sheet

Everything that came out is in fluxnb/models/weights/embedded: settings in training.json, the curve in training.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fluxnb.measure import telemetry
from fluxnb.models import embedded, pipelines
from fluxnb.training.loop import OutOfTime, Run, Settings, fit
from fluxnb.world import probe, scenes

# --- data -------------------------------------------------------------------------------------------------


def _draw_range(arguments) -> None:
    path, total, start, stop = arguments
    pixels = np.load(path, mmap_mode="r+")
    assert len(pixels) == total
    for i in range(start, stop):
        pixels[i] = np.asarray(scenes.draw(scenes.training_scene(i), i))


def draw(work: Path, settings: Settings, workers: int) -> np.ndarray:
    """The training images, uint8 (n, 128, 128, 3), drawn by `workers` processes into a file that stays."""
    path, done = work / "scenes.npy", work / "scenes.done"
    shape = (settings.scenes, scenes.SIZE, scenes.SIZE, 3)
    if not (done.exists() and done.read_text() == str(shape)):
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
        edges = np.linspace(0, settings.scenes, 4 * workers + 1).astype(int).tolist()
        jobs = [(path, settings.scenes, a, b) for a, b in zip(edges, edges[1:], strict=False)]
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(_draw_range, jobs))
        done.write_text(str(shape))
    return np.load(path, mmap_mode="r")


def describe(work: Path, settings: Settings) -> list[str]:
    """Captions of the training scenes, some with a word nobody knows."""
    path = work / "captions.json"
    if path.exists():
        return json.loads(path.read_text())
    captions = [scenes.training_scene(i).caption for i in range(settings.scenes)]
    rng = random.Random(settings.seed)
    for i, caption in enumerate(captions):
        if rng.random() < settings.unknown_word:
            words = caption.split()
            unknown = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))
            words.insert(rng.randint(0, len(words)), unknown)
            captions[i] = " ".join(words)
    path.write_text(json.dumps(captions))
    return captions


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the stages -------------------------------------------------------------------------------------------


def train_vae(run: Run, vae, pixels: torch.Tensor):
    """pixels: uint8 (n, 128, 128, 3) on the device."""
    s = run.settings
    vae = vae.to(run.device, memory_format=torch.channels_last)

    def error(images, noise):
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        decoded = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
        kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).sum((1, 2, 3)).mean()
        difference = decoded - images
        return difference.pow(2).mean() + s.l1_weight * difference.abs().mean() + s.kl_weight * kl

    error = run.compiled(error)

    def sample(generator):
        index = torch.randint(len(pixels), (s.vae_batch,), device=run.device, generator=generator)
        noise = torch.randn((s.vae_batch, 16, 16, 16), device=run.device, generator=generator)
        return pixels[index], noise

    def objective(chosen, noise):
        with run.autocast():
            return error(to_unit(chosen).contiguous(memory_format=torch.channels_last), noise)

    return fit(run, "vae", vae, sample, objective, s.vae_steps, s.vae_rate)


@torch.no_grad()
def encode(run: Run, vae, pixels, batch: int = 500) -> torch.Tensor:
    """Latent means of all scenes, bfloat16 (n, 16, 16, 16) on the device."""
    path = run.work / "latents.pt"
    if path.exists():
        return torch.load(path, map_location=run.device, weights_only=True)
    parts = []
    for start in range(0, len(pixels), batch):
        images = to_unit(torch.from_numpy(np.array(pixels[start : start + batch])).to(run.device))
        with run.autocast():
            parts.append(vae.encode(images).latent_dist.mean.bfloat16())
    latents = torch.cat(parts)
    torch.save(latents, path)
    return latents


class Conditioned(nn.Module):
    """Transformer and text encoders as one module: token ids in, velocity out."""

    def __init__(self, pipe, run: Run):
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        self.velocity = run.compiled(pipe.transformer.forward)
        side = scenes.SIZE // 16
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3)
        self.register_buffer("image_ids", ids.float(), persistent=False)
        self.register_buffer("text_ids", torch.zeros(embedded.TOKENS, 3), persistent=False)

    def text(self, clip_ids, t5_ids):
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids)[0]

    def forward(self, noisy, t, guidance, pooled, words):
        return self.velocity(
            hidden_states=noisy,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]

    def __deepcopy__(self, memo):
        copied = copy.copy(self)
        copied.__dict__ = dict(self.__dict__)
        copied._modules = {k: copy.deepcopy(m, memo) for k, m in self._modules.items()}
        copied.velocity = copied.transformer.forward
        return copied


class Captions:
    """Token ids of all captions on the device, and of the empty one."""

    def __init__(self, pipe, captions: list[str], device: str):
        clip = pipe.tokenizer(captions + [""], padding="max_length", max_length=embedded.CLIP_TOKENS, truncation=True)
        t5 = pipe.tokenizer_2(captions + [""], padding="max_length", max_length=embedded.TOKENS, truncation=True)
        self.clip = torch.tensor(clip.input_ids, device=device)
        self.t5 = torch.tensor(t5.input_ids, device=device)
        self.empty = len(captions)


def noisy_batch(run: Run, latents: torch.Tensor, generator):
    """A batch of the rectified flow: scene indices, x_t (n, 64, 64), its velocity, t in (0, 1)."""
    s = run.settings
    index = torch.randint(len(latents), (s.flow_batch,), device=run.device, generator=generator)
    clean = pipelines.pack(latents[index].float())
    noise = torch.randn(clean.shape, device=run.device, generator=generator)
    logit = torch.randn(s.flow_batch, device=run.device, generator=generator)
    t = torch.sigmoid(s.time_mean + s.time_std * logit)
    return index, torch.lerp(clean, noise, t[:, None, None]), noise - clean, t


def train_flow(run: Run, model: Conditioned, captions: Captions, latents: torch.Tensor) -> Conditioned:
    """latents: normalised, (n, 16, 16, 16)."""
    s = run.settings
    model = model.to(run.device)
    ones = torch.ones(s.flow_batch, device=run.device)

    def sample(generator):
        index, noisy, velocity, t = noisy_batch(run, latents, generator)
        dropped = torch.rand(s.flow_batch, device=run.device, generator=generator) < s.drop_caption
        index = torch.where(dropped, captions.empty, index)
        return captions.clip[index], captions.t5[index], noisy, velocity, t

    def objective(clip_ids, t5_ids, noisy, velocity, t):
        with run.autocast():
            predicted = model(noisy, t, ones, *model.text(clip_ids, t5_ids))
        return (predicted.float() - velocity).pow(2).mean()

    return fit(run, "flow", model, sample, objective, s.flow_steps, s.flow_rate)


def distil(run: Run, model: Conditioned, teacher: Conditioned, captions: Captions, latents) -> Conditioned:
    """The student's text encoders stay the teacher's; only its transformer learns."""
    s = run.settings
    model, teacher = model.to(run.device), teacher.to(run.device).requires_grad_(False)
    teacher.velocity = run.compiled(teacher.transformer.forward)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    ones = torch.ones(s.flow_batch, device=run.device)
    with torch.no_grad(), run.autocast():
        empty = torch.full((s.flow_batch,), captions.empty, device=run.device)
        nothing = teacher.text(captions.clip[empty], captions.t5[empty])

    def sample(generator):
        index, noisy, _, t = noisy_batch(run, latents, generator)
        part = torch.rand(s.flow_batch, device=run.device, generator=generator)
        guidance = s.guidance_low + (s.guidance_high - s.guidance_low) * part
        return captions.clip[index], captions.t5[index], noisy, guidance, t

    def objective(clip_ids, t5_ids, noisy, guidance, t):
        with torch.no_grad(), run.autocast():
            text = teacher.text(clip_ids, t5_ids)
            said = teacher(noisy, t, ones, *text).float()
            unsaid = teacher(noisy, t, ones, *nothing).float()
            target = unsaid + guidance[:, None, None] * (said - unsaid)
        with run.autocast():
            predicted = model(noisy, t, guidance, *text)
        return (predicted.float() - target).pow(2).mean()

    return fit(run, "distil", model, sample, objective, s.distil_steps, s.distil_rate)


def prepare(device: str, seed: int) -> None:
    """What every training begins with."""
    torch.manual_seed(seed)
    if device != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass crashed at this shape on torch 2.11
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def train(run: Run, out: Path) -> None:
    """All stages in turn; raises OutOfTime between or inside them."""
    s = run.settings
    prepare(run.device, s.seed)
    pipe = embedded.build()
    begin, fresh = time.monotonic(), not (run.work / "captions.json").exists()
    pixels = draw(run.work, s, run.workers)
    texts = describe(run.work, s)
    if fresh:
        run.log("draw", s.scenes, 0.0, time.monotonic() - begin)

    some = torch.from_numpy(np.array(pixels[: s.vae_scenes])).to(run.device)
    vae = train_vae(run, pipe.vae, some)
    del some
    run.check()
    latents = encode(run, vae, pixels)
    run.check()
    shift, scale = latents.float().mean().item(), 1 / latents.float().std().item()
    latents = ((latents.float() - shift) * scale).bfloat16()

    captions = Captions(pipe, texts, run.device)
    teacher = train_flow(run, Conditioned(pipe, run), captions, latents)
    for name in ("transformer", "clip", "t5"):  # the student begins as the teacher's moving average
        copy_weights(
            getattr(teacher, name),
            {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2}.get(name, pipe.transformer),
        )
    student = distil(run, Conditioned(pipe, run), teacher, captions, latents)

    copy_weights(student.transformer, pipe.transformer)
    copy_weights(vae, pipe.vae)
    embedded.tie_letter_case(pipe.text_encoder_2)
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    export(run, pipe, out)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the weights of `source`, whatever device either is on."""
    target.load_state_dict({name: w.to(target.device) for name, w in source.state_dict().items()})


def export(run: Run, pipe, out: Path) -> None:
    """Writes the pipeline in float16, the training curve and the settings."""
    pipe.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
    for part in ("text_encoder", "text_encoder_2"):  # or transformers loads these in half precision, diffusers not
        config = out / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    write_about(run, out)


def about(run: Run) -> dict:
    """With which settings, where and when something was trained."""
    where = {"hardware": telemetry.machine(), "versions": telemetry.versions()}
    return {"settings": asdict(run.settings), **where, "date": time.strftime("%Y-%m-%d")}


def write_about(run: Run, out: Path) -> None:
    """Beside exported weights: the training curve, the settings, where and when they were made."""
    (out / "training.csv").write_text((run.work / "training.csv").read_text())
    (out / "training.json").write_text(json.dumps(about(run), indent=1) + "\n")


# --- evaluation -------------------------------------------------------------------------------------------

EVALUATION_COLUMNS = ("seed", "prompt", "facts", "right", "missed", "probe_right", "vae_psnr_db")


def evaluate(pipe, count: int, guidance: float = embedded.GUIDANCE, batch=50, steps: int = 28):
    """Generates `count` held-out prompts in so many steps and checks them.

    Returns:
        (rows, images): rows as dicts with EVALUATION_COLUMNS (`facts` the prompt states, how many the image
        got `right`, which were `missed`; `probe_right`: how many the probe finds in the *drawn* scene;
        `vae_psnr_db` of the drawn scene through the VAE), images as PIL.
    """
    from fluxnb.measure.quality import psnr

    rows, images = [], []
    device, dtype = pipe.vae.device, pipe.vae.dtype
    checker = copy.deepcopy(probe.load()).to(device)
    for start in range(0, count, batch):
        seeds = list(range(start, min(start + batch, count)))
        chosen = [scenes.held_out_scene(seed) for seed in seeds]
        prompts = [scene.caption for scene in chosen]
        model = pipelines.describe(embedded.NAME)
        made = pipelines.generate(pipe, prompts, seeds, model=model, steps=steps, guidance=guidance)
        drawn = [scenes.draw(scene, 10**9 + seed) for scene, seed in zip(chosen, seeds, strict=True)]
        with torch.no_grad():
            pixels = probe.to_tensor(drawn).to(device, dtype)
            back = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample.float()
        back = ((back + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        checked, control = probe.check(prompts, made, checker), probe.check(prompts, drawn, checker)
        for i, seed in enumerate(seeds):
            right, missed = checked[i]
            rows.append(
                {
                    "seed": seed,
                    "prompt": prompts[i],
                    "facts": len(right) + len(missed),
                    "right": len(right),
                    "missed": "; ".join(missed),
                    "probe_right": len(control[i][0]),
                    "vae_psnr_db": round(psnr(np.asarray(drawn[i]), back[i]), 3),
                }
            )
        images += made
    return rows, images


def contact_sheet(images, columns: int = 8):
    """A sheet of all images, 4 pixels apart."""
    from PIL import Image

    step = scenes.SIZE + 4
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * step - 4, rows * step - 4), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * step, (i // columns) * step))
    return sheet


def write_evaluation(folder: Path, sheet: Path | None, count: int, device: str) -> dict:
    """Evaluates the exported model; writes evaluation.csv and, if it has a path, the sheet; returns the summary."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows, images = evaluate(pipe, count)
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, EVALUATION_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images[:64]).save(sheet, lossless=True)
    return summary(rows)


def summary(rows: list[dict]) -> dict[str, float]:
    """The figures of an evaluation: means over images, 0 to 1 or dB."""
    n = len(rows)
    return {
        "images": n,
        "adherence": sum(r["right"] / r["facts"] for r in rows) / n,
        "all_facts_right": sum(r["right"] == r["facts"] for r in rows) / n,
        "probe_accuracy": sum(r["probe_right"] for r in rows) / sum(r["facts"] for r in rows),
        "probe_all_right": sum(r["probe_right"] == r["facts"] for r in rows) / n,
        "vae_psnr_db": sum(r["vae_psnr_db"] for r in rows) / n,
        "vae_psnr_min_db": min(r["vae_psnr_db"] for r in rows),
    }


def main(arguments: list[str] | None = None) -> int:
    """Trains, exports and evaluates; 0 also when the time given was used up first."""
    parser = argparse.ArgumentParser(prog="python -m fluxnb.training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="stop cleanly after this long; run again to go on")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="where the state is kept")
    parser.add_argument("--out", type=Path, default=embedded.FOLDER, help="where the model is written")
    parser.add_argument("--sheet", type=Path, default=Path("reports/embedded/contact_sheet.webp"))
    parser.add_argument("--small", action="store_true", help="a few steps only, to try the script")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    for name, default in (("flow-steps", None), ("vae-steps", None), ("distil-steps", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings.small() if options.small else Settings()
    chosen = {k: getattr(options, k) for k in ("flow_steps", "vae_steps", "distil_steps") if getattr(options, k)}
    settings = replace(settings, **chosen)
    run = Run(options.work, settings, device, options.minutes, options.workers)
    try:
        train(run, options.out)
    except OutOfTime:
        print("time is over: the state is saved; run the same command again to go on")
        return 0
    print(json.dumps(write_evaluation(options.out, options.sheet, settings.held_out, device), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
