"""Trains the probe that reads facts off images: `python -m fluxnb.training.train_probe`, after the embedded model.

It learns what isn't there as well as what is: from drawings, from drawings damaged as a whole or in part
(`fluxnb.world.damage`), and from the embedded model's own images. Resumable like `fluxnb.training.train`.

    draw     scenes: as they are, with one part erased, and altered to what the grammar doesn't know
    reader   a first probe from undamaged drawings only: it says which facts a generated image can be trusted to show
    pools    images of the embedded model, drawings through its VAE, and through damaged latents
    probe    all of it
    export   to fluxnb/world/probe.safetensors, in float16
    evaluate scenes kept out of training, undamaged and damaged -> probe.json; the embedded models' evaluations anew
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fluxnb.measure import telemetry
from fluxnb.models import embedded, pipelines
from fluxnb.training import train
from fluxnb.training.loop import OutOfTime, Run, fit
from fluxnb.world import damage, probe, scenes

ABOUT = "probe.json"
RUINED, SOUND = 19.0, 28.0  # dB to the drawing: up to here nothing is there, from here on all is; between: left out
FIRST = 3_000_000  # of the held-out scenes that evaluate
NOTHING = [len(values) for values in probe.ANSWERS.values()]
COLUMNS = list(probe.ANSWERS)
OBJECTS = [name[:-1] in ("kind", "colour") for name in COLUMNS]
COLOURS = [name.startswith("colour") or name == "held colour" for name in COLUMNS]
ALWAYS = [
    name in ("family", "time", "place", "intact") for name in COLUMNS
]  # what a box over one thing leaves to be seen


@dataclass(frozen=True)
class Settings:
    """Everything that determines the training. `small()` is the one that tests use."""

    scenes: int = 80_000
    pool: int = 12_000  # drawings through the VAE, and as many through damaged latents
    generated: int = 4_000
    reader_steps: int = 800
    probe_steps: int = 6_000
    batch: int = 512
    rate: float = 1.5e-3
    warm_up: int = 300
    weight_decay: float = 0.02
    ema: float = 0.998
    held_out: int = 1_000
    evaluated: int = 500  # prompts of the embedded model
    seed: int = 0

    @staticmethod
    def small() -> Settings:
        return Settings(
            scenes=64, pool=8, generated=4, reader_steps=2, probe_steps=3, batch=128, warm_up=1, held_out=12
        )


# --- data -------------------------------------------------------------------------------------------------


def drawings(scene: scenes.Scene, seed: int) -> tuple[list[np.ndarray], list[list[int]]]:
    """As it is, with one part erased, and altered: uint8 images and their labels."""
    part = random.Random(f"part {seed}").choice(list(damage.parts(scene)))
    altered, said = damage.altered(scene, seed)
    images = [np.asarray(scenes.draw(scene, seed)), damage.erased(scene, seed, part), altered]
    return images, [probe.labels(scene), damage.lost_labels(scene, part), said]


def _draw_range(arguments) -> np.ndarray:
    path, start, stop = arguments
    pixels, labels = np.load(path, mmap_mode="r+"), []
    for i in range(start, stop):
        images, said = drawings(scenes.training_scene(i), i)
        pixels[i] = images
        labels.append(said)
    return np.array(labels, dtype=np.int8)


def draw(run: Run) -> tuple[Tensor, Tensor]:
    """`drawings` of the training scenes on the device: uint8 (n, 3, 128, 128, 3), and labels int64 (n, 3, answers)."""
    path, said = run.work / "drawings.npy", run.work / "labels.npy"
    if not said.exists():
        begin, n = time.monotonic(), run.settings.scenes
        shape = (n, 3, scenes.SIZE, scenes.SIZE, 3)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
        edges = np.linspace(0, n, 4 * run.workers + 1).astype(int).tolist()
        jobs = [(path, a, b) for a, b in zip(edges, edges[1:], strict=False)]
        with ProcessPoolExecutor(run.workers) as pool:
            labels = np.concatenate(list(pool.map(_draw_range, jobs)))
        np.save(said, labels)
        run.log("draw", n, 0.0, time.monotonic() - begin)
    pixels = torch.from_numpy(np.load(path)).to(run.device)
    return pixels, torch.from_numpy(np.load(said)).long().to(run.device)


def unpack(tokens: Tensor) -> Tensor:
    """FLUX's tokens (n, 64, 64) to latents (n, 16, 16, 16): `pipelines.pack` undone."""
    side = scenes.SIZE // 16
    return tokens.view(-1, side, side, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 2 * side, 2 * side)


@torch.no_grad()
def pools(run: Run, pixels: Tensor, labels: Tensor, reader: nn.Module) -> dict[str, Tensor]:
    """What the embedded model makes, uint8 images (n, 128, 128, 3) on the device.

    `sound`: the first drawings through its VAE; `latent`: the same through damaged latents; `made` and `made_labels`:
    its own images of training prompts, with the facts on which caption and `reader` agree.
    """
    path, s = run.work / "pools.pt", run.settings
    if path.exists():
        return torch.load(path, map_location=run.device, weights_only=True)
    begin = time.monotonic()
    pipe = pipelines.load("embedded", "float32", run.device)
    pipe.set_progress_bar_config(disable=True)
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    model = train.Conditioned(pipe, run).to(run.device)
    model.velocity = pipe.transformer.forward  # no compiling for so few calls
    captions = [scenes.training_scene(i).caption for i in range(s.pool)]
    texts = train.Captions(pipe, captions, run.device)
    generator = torch.Generator(run.device).manual_seed(s.seed)
    sound, latent = [], []
    for start in range(0, s.pool, 250):
        chosen = pixels[start : min(start + 250, s.pool), 0]
        clean = (pipe.vae.encode(train.to_unit(chosen)).latent_dist.mean - shift) * scale
        n = len(clean)
        strength = torch.rand((n, 1, 1, 1), device=run.device, generator=generator)
        noise = torch.randn(clean.shape, device=run.device, generator=generator)
        ids = slice(start, start + n)
        t = 0.5 + 0.49 * strength[:, 0, 0, 0]
        noisy = torch.lerp(pipelines.pack(clean), pipelines.pack(noise), t[:, None, None])
        guidance = torch.full((n,), embedded.GUIDANCE, device=run.device)
        velocity = model(noisy, t, guidance, *model.text(texts.clip[ids], texts.t5[ids]))
        unfinished = unpack(noisy - t[:, None, None] * velocity)
        spoilt = (
            clean + 1.5 * strength * noise,
            torch.lerp(clean, clean.roll(1, 0), 0.15 + 0.35 * strength),
            nn.functional.avg_pool2d(clean, 3, 1, 1, count_include_pad=False) * (1 - 0.5 * strength),
            unfinished,  # one step from noise to image
        )
        how = torch.arange(n, device=run.device)[:, None, None, None] % len(spoilt)
        bad = sum(torch.where(how == i, latents, 0.0) for i, latents in enumerate(spoilt))
        for kept, latents in ((sound, clean), (latent, bad)):
            decoded = pipe.vae.decode(latents / scale + shift).sample
            kept.append(((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1))
    made, made_labels = [], []
    for start in range(0, s.generated, 250):
        seeds = list(range(start, min(start + 250, s.generated)))
        chosen_scenes = [scenes.training_scene(seed) for seed in seeds]
        prompts = [scene.caption for scene in chosen_scenes]
        images = pipelines.generate(pipe, prompts, seeds, model=pipelines.describe("embedded"))
        made.append(torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(run.device))
        answers = reader(train.to_unit(made[-1]))
        read = torch.stack([scores.argmax(1) for scores in answers.values()], 1)
        wanted = torch.tensor([probe.labels(scene) for scene in chosen_scenes], device=run.device)
        free = torch.tensor(
            [[n in dict(x.facts) and n not in x.said for n in COLUMNS] for x in chosen_scenes], device=run.device
        )
        agreed = torch.where((read == wanted) & ~free, wanted, probe.LEFT_OUT)
        agreed[:, -1] = torch.where(((read != wanted) & ~free).any(1), probe.LEFT_OUT, wanted[:, -1])
        made_labels.append(agreed)
    found = {"sound": sound, "latent": latent, "made": made, "made_labels": made_labels}
    stored = {name: torch.cat(parts) for name, parts in found.items()}
    torch.save(stored, path)
    disagree = (stored["made_labels"][:, -1] == probe.LEFT_OUT).float().mean().item()
    run.log("pools", 2 * s.pool + s.generated, disagree, time.monotonic() - begin)
    return stored


# --- what the probe is shown --------------------------------------------------------------------------------


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    """uint8 (n, 128, 128, 3) to float (n, 3, 128, 128) in [0, 1], moved by `shift` (2, n) pixels."""
    side = scenes.SIZE
    rows, columns = (torch.arange(side, device=images.device) + shift[..., None]).clamp(0, side - 1)
    at = torch.arange(len(images), device=images.device)[:, None, None]
    return images[at, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255


class Samples:
    """Batches of images in [-1, 1] and their labels, a quarter undamaged, of drawings and pools."""

    def __init__(self, run: Run, pixels: Tensor, labels: Tensor, pooled: dict[str, Tensor] | None = None):
        self.pixels, self.labels, self.pooled, self.device = pixels, labels, pooled or {}, run.device
        self.size, self.rng = run.settings.batch, None
        self.nothing, self.colours, self.always, self.objects = (
            torch.tensor(values, device=run.device) for values in (NOTHING, COLOURS, ALWAYS, OBJECTS)
        )
        self.kinds = [kind for kind in damage.WHOLE if kind not in damage.UNSEEN]
        self.contents = [kind for kind in damage.CONTENT if kind not in damage.UNSEEN_CONTENT]

    def __call__(self, generator) -> tuple[Tensor, Tensor]:
        if self.rng is None:
            self.rng = random.Random(generator.initial_seed())
        self.luck = damage.Luck(self.rng, generator)
        quarter = self.size // 4
        parts = [self.sound(self.size if not self.pooled else quarter)]
        if self.pooled:
            parts += [self.altered(quarter // 2), *self.local(quarter), *self.whole(quarter * 3 // 2)]
        images, target = (torch.cat(some) for some in zip(*parts, strict=True))
        faint = self.luck.uniform(images, len(images), 1, 1, 1)
        images = images + (0.05 * faint - 0.02).clamp(min=0) * self.luck.normal(images)  # 30 dB at worst
        return images.clamp(0, 1) * 2 - 1, target

    def _some(self, count: int, of: int) -> Tensor:
        return torch.randint(of, (count,), device=self.device, generator=self.luck.generator)

    def _shift(self, count: int) -> Tensor:
        return torch.randint(-3, 4, (2, count), device=self.device, generator=self.luck.generator)

    def sound(self, n: int) -> tuple[Tensor, Tensor]:
        index = self._some(n, len(self.pixels))
        images, target = self.pixels[index, 0], self.labels[index, 0]
        if self.pooled:
            third = n // 3
            back, made = self._some(third, len(self.pooled["sound"])), self._some(third, len(self.pooled["made"]))
            images = torch.cat((self.pooled["sound"][back], self.pooled["made"][made], images[2 * third :]))
            target = torch.cat((self.labels[back, 0], self.pooled["made_labels"][made], target[2 * third :]))
        return shifted(images, self._shift(n)), target

    def altered(self, n: int) -> tuple[Tensor, Tensor]:
        index = self._some(n, len(self.pixels))
        return shifted(self.pixels[index, 2], self._shift(n)), self.labels[index, 2]

    def local(self, n: int):
        """One part of each destroyed, doubled or given other colours."""
        kinds = [*self.contents, "doubled", "recoloured"]
        for kind, count in zip(kinds, split(n, len(kinds)), strict=True):
            index, shift, rng = self._some(count, len(self.pixels)), self._shift(count), self.luck.rng
            clean, without = (shifted(self.pixels[index, which], shift) for which in (0, 1))
            whole, lost = self.labels[index, 0], self.labels[index, 1]
            carried = whole != lost
            if kind == "doubled":
                images, target = self.doubled(clean, without, whole)
            elif kind == "recoloured":
                other = damage.whole(rng.choice(("swap", "invert", "grey", "tint")), clean, 1.0, self.luck, clean)
                where = damage.region(clean, without, margin=0)
                images = torch.where(where, other, clean)
                error = ((images - clean).pow(2).sum((1, 2, 3)) / (3 * where.sum((1, 2, 3)).clamp(min=1))).sqrt()
                changed = (error > 0.2)[:, None] & self.colours & carried
                target = torch.where(changed, -1 - whole, torch.where(carried, probe.LEFT_OUT, whole))
            else:
                shape = rng.choice(damage.SHAPES)
                images = damage.local(kind, clean, without, shape, self.luck, self._others(count))
                target = lost
                if kind in damage.SOFT:
                    target = torch.where(carried & self.colours, probe.LEFT_OUT, target)
                if shape != "outline":
                    target = torch.where(carried | self.always, target, probe.LEFT_OUT)
            spoilt = damage.psnr(images, clean) < 21
            yield images, torch.where(spoilt[:, None] & ~carried, probe.LEFT_OUT, target)

    def doubled(self, clean: Tensor, without: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """An object a second time: another count, if the copy shows and the scene has objects."""
        rng, count = self.luck.rng, COLUMNS.index("count")
        across = rng.choice((-1, 1)) * rng.randint(22, 48)
        images = damage.doubled(clean, without, across, rng.randint(-45, -20) if rng.random() < 0.6 else 0)
        target = torch.where(self.always | ((whole == self.nothing) & ~self.objects), whole, probe.LEFT_OUT)
        target[:, count] = -1 - whole[:, count]
        composed = (whole[:, 0] == 0) & (damage.psnr(images, clean) < 26)
        return images, torch.where(composed[:, None], target, probe.LEFT_OUT)

    def _others(self, count: int) -> Tensor:
        index = self._some(count, len(self.pixels))
        return shifted(self.pixels[index, 0], self._shift(count))

    def whole(self, n: int):
        """All of each damaged; what counts depends on how far."""
        kinds = [*self.kinds, "latent"]
        for kind, count in zip(kinds, split(n, len(kinds)), strict=True):
            latent = kind == "latent"
            index = self._some(count, len(self.pooled["latent"]) if latent else len(self.pixels))
            shift = self._shift(count)
            clean = shifted(self.pixels[index, 0], shift)
            if latent:
                images = shifted(self.pooled["latent"][index], shift)
            else:
                images = damage.whole(kind, clean, self._strength(), self.luck, self._others(count))
            if self.luck.rng.random() < 0.25:
                second = self.luck.rng.choice(self.kinds)
                images = damage.whole(second, images, self._strength() / 2, self.luck, self._others(count))
            distance = damage.psnr(images, clean)[:, None]
            target = torch.where(distance >= SOUND, self.labels[index, 0], probe.LEFT_OUT)
            yield images, torch.where(distance <= RUINED, self.nothing, target)

    def _strength(self) -> float:
        """Mostly low: near where an image is just ruined."""
        return self.luck.rng.random() ** self.luck.rng.choice((1, 2, 3))


def split(n: int, parts: int) -> list[int]:
    """n in `parts` nearly equal numbers."""
    return [n * (i + 1) // parts - n * i // parts for i in range(parts)]


def learn(run: Run, stage: str, samples: Samples, steps: int) -> nn.Module:
    """A probe trained on `samples`: the moving average of its weights."""
    network = probe.Probe().to(run.device, memory_format=torch.channels_last)
    answer = run.compiled(network.forward)

    def objective(images, target):
        with run.autocast():
            answers = answer(images.contiguous(memory_format=torch.channels_last))
        return probe.loss(answers, target)

    return fit(run, stage, network, samples, objective, steps, run.settings.rate).eval()


# --- evaluation -------------------------------------------------------------------------------------------


def _held_out(seed: int):
    scene = scenes.held_out_scene(seed)
    stated = [part for part, facts in damage.parts(scene).items() if set(facts) & set(scene.said)]
    part = random.Random(seed).choice(stated or list(damage.parts(scene)))
    seed += 10**9
    altered, said = damage.altered(scene, seed)
    changed = [n for n, a, b in zip(COLUMNS, said, probe.labels(scene), strict=True) if a != b and a >= 0]
    return scene, np.asarray(scenes.draw(scene, seed)), part, damage.erased(scene, seed, part), altered, changed


SOUND_KINDS = ("none", "shift by 2 pixels", "noise at 30 dB", "through the VAE")


def evaluate(network: nn.Module, count: int, first: int = FIRST, pipe=None) -> list[dict]:
    """What the probe says of scenes it has never seen, undamaged and damaged.

    Returns:
        Rows with `damage`, `part` ("" where all of the image is damaged), `trained` (was it trained with this damage?),
        `images`, and `failed`: how many of them lack a stated fact (of all of the image), or the facts of the part.
    """
    held = [_held_out(seed) for seed in range(first, first + count)]
    chosen, clean, chosen_parts, without, altered, changed = zip(*held, strict=True)
    captions, drawn = [scene.caption for scene in chosen], np.stack(clean)
    rows: list[dict] = []

    def add(name, images, which, facts=None, part="", trained=True):
        """`facts`: of each image those that are to be missed; without it, any is enough."""
        said, failed = [captions[i] for i in which], 0
        for at in range(0, len(which), 250):
            some = slice(at, at + 250)
            for number, (right, wrong) in enumerate(probe.check(said[some], images[some], network), at):
                stated = {*right, *wrong}
                gone = {*facts[number]} & stated if facts else stated
                failed += not gone & {*right} if facts else len(right) < 0.95 * len(stated)
        rows.append({"damage": name, "part": part, "trained": trained, "images": len(which), "failed": failed})

    device = next(network.parameters()).device
    everything, pictures = list(range(count)), damage.from_bytes(drawn).to(device)
    others, bare = pictures.roll(1, 0), damage.from_bytes(np.stack(without)).to(device)
    add(SOUND_KINDS[0], drawn, everything)
    moved = nn.functional.pad(pictures, (2, 0, 0, 2), "replicate")[..., 2:, :-2]
    add(SOUND_KINDS[1], damage.to_bytes(moved), everything)
    faint = pictures + 10**-1.5 * damage.Luck.of(first, device).normal(pictures)
    add(SOUND_KINDS[2], damage.to_bytes(faint), everything)
    if pipe is not None:
        with torch.no_grad():
            latents = [pipe.vae.encode(some * 2 - 1).latent_dist.mean for some in pictures.split(250)]
            decoded = torch.cat([pipe.vae.decode(some).sample for some in latents])
        add(SOUND_KINDS[3], damage.to_bytes(decoded / 2 + 0.5), everything)
    for kind in damage.WHOLE:
        images, which = damage.ruined(kind, drawn[:300], first, device)
        if which:
            add(kind, images, which, trained=kind not in damage.UNSEEN)
    for number, content in enumerate(damage.CONTENT):
        for shape in damage.SHAPES if content != "erased" else damage.SHAPES[:1]:
            luck = damage.Luck.of(first + number, device)
            spoilt = damage.to_bytes(damage.local(content, pictures, bare, shape, luck, others))
            lost = [damage.parts(scene)[part] for scene, part in zip(chosen, chosen_parts, strict=True)]
            if content in damage.SOFT:
                lost = [[name for name in names if "colour" not in name] for names in lost]
            for part in sorted({p.partition(" ")[0] for p in chosen_parts}):
                which = [i for i in everything if chosen_parts[i].startswith(part) and {*lost[i]} & {*chosen[i].said}]
                trained = content not in damage.UNSEEN_CONTENT
                add(f"{content}, {shape}", spoilt[which], which, [lost[i] for i in which], part, trained)
    which = [i for i in everything if chosen[i]["family"] == "composed"]
    for across, down in ((40, 0), (-24, -34)):
        twice = damage.to_bytes(damage.doubled(pictures, bare, across, down))[which]
        add(f"doubled, moved by {across}, {down}", twice, which, [["count"]] * len(which), "object")
    for family, part in (("composed", "object"), ("portrait", "held"), ("animal", "sign")):
        which = [i for i in everything if chosen[i]["family"] == family and set(changed[i]) & set(chosen[i].said)]
        add("altered", np.stack(altered)[which], which, [changed[i] for i in which], part)
    return [row for row in rows if row["images"]]


def summary(rows: list[dict]) -> dict[str, float]:
    """Shares of images: undamaged that pass, and damaged that fail, by damages trained with and not."""

    def share(chosen: list[dict]) -> float:
        return sum(row["failed"] for row in chosen) / max(1, sum(row["images"] for row in chosen))

    found = {f"passed: {name}": 1 - share([row for row in rows if row["damage"] == name]) for name in SOUND_KINDS}
    damaged = [row for row in rows if row["damage"] not in SOUND_KINDS]
    for words, trained in (("trained", True), ("not trained", False)):
        kinds = [row for row in damaged if row["trained"] is trained]
        found[f"failed: all of the image, {words}"] = share([row for row in kinds if not row["part"]])
        found[f"failed: a part, {words}"] = share([row for row in kinds if row["part"]])
    return {name: round(value, 5) for name, value in found.items()}


# --- the whole ------------------------------------------------------------------------------------------------


def export(run: Run, network: nn.Module, out: Path) -> None:
    """Writes the probe in float16."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.half().contiguous().cpu() for name, w in network.state_dict().items()}
    origin = {"origin": "trained from nothing by fluxnb.training.train_probe on drawn scenes", "license": "Apache-2.0"}
    save_file(weights, out / probe.FILE, metadata=origin)


def write_about(run: Run, rows: list[dict], out: Path) -> dict[str, float]:
    """probe.json beside the weights: what was measured, with which settings and where; returns the summary."""
    curve = (run.work / "training.csv").read_text().splitlines()[1:]
    about = {
        "summary": summary(rows),
        "ruined_db": damage.RUINED_DB,
        "evaluation": rows,
        "settings": asdict(run.settings),
        "seconds": {line.split(",")[0]: float(line.split(",")[3]) for line in curve},
        "commit": telemetry.commit(),
        "hardware": telemetry.machine(),
        "versions": telemetry.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return about["summary"]


def main(arguments: list[str] | None = None) -> int:
    """Trains, exports and evaluates; 0 also when the time given was used up first."""
    parser = argparse.ArgumentParser(prog="python -m fluxnb.training.train_probe", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="stop cleanly after this long; run again to go on")
    parser.add_argument("--work", type=Path, default=Path("build/train_probe"), help="where the state is kept")
    parser.add_argument("--out", type=Path, default=probe.FOLDER, help="where the probe is written")
    parser.add_argument("--small", action="store_true", help="a few steps only, to try the script")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    settings = Settings.small() if options.small else Settings()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(options.work, settings, device, options.minutes, options.workers)
    torch.manual_seed(settings.seed)
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # see fluxnb.training.train
    try:
        pixels, labels = draw(run)
        reader = learn(run, "reader", Samples(run, pixels, labels), settings.reader_steps)
        pooled = pools(run, pixels, labels, reader)
        run.check()
        network = learn(run, "probe", Samples(run, pixels, labels, pooled), settings.probe_steps)
    except OutOfTime:
        print("time is over: the state is saved; run the same command again to go on")
        return 0
    export(run, network, options.out)
    network.load_state_dict({name: w.half().float() for name, w in network.state_dict().items()})
    pipe = pipelines.load("embedded", "float32", device)
    rows = evaluate(network, settings.held_out, pipe=pipe)
    print(json.dumps(write_about(run, rows, options.out), indent=1), flush=True)
    if options.out.resolve() == probe.FOLDER.resolve():
        figures = train.write_evaluation(embedded.FOLDER, None, settings.evaluated, device)
        print(json.dumps(figures, indent=1), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
