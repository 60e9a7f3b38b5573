"""Trains the probe that reads facts off images: `python -m fluxnb.training.train_probe`, after the embedded model.

It learns what isn't there as well as what is: from drawings, from drawings damaged as a whole (`fluxnb.world.damage`)
or in part (`fluxnb.world.parts`), and from the embedded model's own images. Resumable like `fluxnb.training.train`.

    draw     scenes: as they are, with one part erased, and altered to what the grammar doesn't know
    reader   a first probe from undamaged drawings only: it says which facts a generated image can be trusted to show
    pools    images of the embedded model, drawings through its VAE, and through damaged latents
    probe    all of it
    export   to fluxnb/world/probe.safetensors, in float16; the curve to probe.csv, the settings to probe.json
    evaluate scenes kept out of training, undamaged and damaged, into probe.json; the embedded model's evaluation anew
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluxnb.measure import telemetry
from fluxnb.models import embedded, pipelines
from fluxnb.training import train
from fluxnb.training.loop import OutOfTime, Run, fit
from fluxnb.world import damage, parts, probe, scenes

RUINED, SOUND = 19.0, 28.0  # dB to the drawing: up to here nothing is there, from here on all is; between: left out
FIRST = 3_000_000  # of the held-out scenes that evaluate
COLUMNS = list(probe.ANSWERS)
NOTHING = [len(values) for values in probe.ANSWERS.values()]
OBJECTS = [name[:-1] in ("kind", "colour") for name in COLUMNS]
COLOURS = [name.startswith("colour") or name == "held colour" for name in COLUMNS]
ALWAYS = [name in ("family", "time", "place", "intact") for name in COLUMNS]  # seen even with a box over one thing


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
        few = {"reader_steps": 2, "probe_steps": 3, "batch": 72, "warm_up": 1, "held_out": 4}
        return Settings(scenes=64, pool=8, generated=4, **few)


# --- data -------------------------------------------------------------------------------------------------


def drawings(scene: scenes.Scene, seed: int) -> tuple[list[np.ndarray], list[list[int]]]:
    """As it is, with one part erased, and altered: uint8 images and their labels."""
    part = random.Random(f"part {seed}").choice(list(parts.parts(scene)))
    altered, said = parts.altered(scene, seed)
    images = [parts.drawn(scene, seed), parts.erased(scene, seed, part), altered]
    return images, [probe.labels(scene), parts.lost_labels(scene, part), said]


def _draw_range(arguments) -> np.ndarray:
    path, start, stop = arguments
    pixels, labels = np.load(path, mmap_mode="r+"), []
    for i in range(start, stop):
        pixels[i], said = drawings(scenes.training_scene(i), i)
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
        with ProcessPoolExecutor(run.workers) as pool:
            jobs = [(path, a, b) for a, b in zip(edges, edges[1:], strict=False)]
            np.save(said, np.concatenate(list(pool.map(_draw_range, jobs))))
        run.log("draw", n, 0.0, time.monotonic() - begin)
    pixels = torch.from_numpy(np.load(path)).to(run.device)
    return pixels, torch.from_numpy(np.load(said)).long().to(run.device)


def answers(network: nn.Module, images: Tensor) -> Tensor:
    """The most likely answers (n, answers) for images in [-1, 1]."""
    return torch.stack([scores.argmax(1) for scores in network(images).values()], 1)


@torch.no_grad()
def pools(run: Run, pixels: Tensor, reader: nn.Module) -> dict[str, Tensor]:
    """What the embedded model makes, uint8 images (n, 128, 128, 3) on the device.

    `sound`: the first drawings through its VAE; `latent`: the same through damaged latents; `made` and `made_labels`:
    its own images of training prompts, with the facts on which caption and `reader` agree.
    """
    path, s = run.work / "pools.pt", run.settings
    if path.exists():
        return torch.load(path, map_location=run.device, weights_only=True)
    begin, pipe = time.monotonic(), pipelines.load("embedded", "float32", run.device)
    pipe.set_progress_bar_config(disable=True)
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    model = train.Conditioned(pipe, run).to(run.device)
    model.velocity = pipe.transformer.forward  # no compiling for so few calls
    texts = train.Captions(pipe, [scenes.training_scene(i).caption for i in range(s.pool)], run.device)
    generator = torch.Generator(run.device).manual_seed(s.seed)
    found: dict[str, list[np.ndarray]] = {"sound": [], "latent": [], "made": [], "made_labels": []}
    for start in range(0, s.pool, 250):
        ids = slice(start, min(start + 250, s.pool))
        clean = (pipe.vae.encode(train.to_unit(pixels[ids, 0])).latent_dist.mean - shift) * scale
        n = len(clean)
        strength = torch.rand((n, 1, 1, 1), device=run.device, generator=generator)
        noise = torch.randn(clean.shape, device=run.device, generator=generator)
        t = 0.5 + 0.49 * strength[:, 0]
        noisy = torch.lerp(pipelines.pack(clean), pipelines.pack(noise), t)
        guidance = torch.full((n,), embedded.GUIDANCE, device=run.device)
        velocity = model(noisy, t[:, 0, 0], guidance, *model.text(texts.clip[ids], texts.t5[ids]))
        spoilt = (
            clean + 1.5 * strength * noise,
            torch.lerp(clean, clean.roll(1, 0), 0.15 + 0.35 * strength),
            nn.functional.avg_pool2d(clean, 3, 1, 1, count_include_pad=False) * (1 - 0.5 * strength),
            # one step from noise to image
            pipe._unpack_latents(noisy - t * velocity, scenes.SIZE, scenes.SIZE, pipe.vae_scale_factor),
        )
        bad = torch.stack(spoilt)[torch.arange(n) % len(spoilt), torch.arange(n)]
        for kept, latents in (("sound", clean), ("latent", bad)):
            decoded = pipe.vae.decode(latents / scale + shift).sample
            found[kept].append(damage.to_bytes(decoded / 2 + 0.5))
    for start in range(0, s.generated, 250):
        seeds = list(range(start, min(start + 250, s.generated)))
        chosen = [scenes.training_scene(seed) for seed in seeds]
        images = pipelines.generate(pipe, [x.caption for x in chosen], seeds, model=pipelines.describe("embedded"))
        found["made"].append(np.stack([np.asarray(image) for image in images]))
        read = answers(reader, train.to_unit(torch.from_numpy(found["made"][-1]).to(run.device))).cpu().numpy()
        wanted = np.array([probe.labels(scene) for scene in chosen])
        free = np.array([[n in dict(x.facts) and n not in x.said for n in COLUMNS] for x in chosen])
        agreed = np.where((read == wanted) & ~free, wanted, probe.LEFT_OUT)
        agreed[:, -1] = np.where(((read != wanted) & ~free).any(1), probe.LEFT_OUT, wanted[:, -1])
        found["made_labels"].append(agreed)
    stored = {name: torch.from_numpy(np.concatenate(some)).to(run.device) for name, some in found.items()}
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
        self.size = run.settings.batch
        self.luck: Any = None
        self.nothing, self.colours, self.always, self.objects = (
            torch.tensor(values, device=run.device) for values in (NOTHING, COLOURS, ALWAYS, OBJECTS)
        )
        self.kinds = [kind for kind in damage.WHOLE if kind not in damage.UNSEEN]
        self.contents = [kind for kind in parts.CONTENT if kind not in parts.UNSEEN]

    def __call__(self, generator) -> tuple[Tensor, Tensor]:
        self.luck = self.luck or damage.Luck(random.Random(generator.initial_seed()), generator)
        quarter = self.size // 4
        some = [self.sound(self.size if not self.pooled else quarter)]
        if self.pooled:
            some += [self.altered(quarter // 2), *self.local(quarter), *self.whole(quarter * 3 // 2)]
        images, target = (torch.cat(each) for each in zip(*some, strict=True))
        faint = self.luck.uniform(images, len(images), 1, 1, 1)
        images = images + (0.05 * faint - 0.02).clamp(min=0) * self.luck.normal(images)  # 30 dB at worst
        return images.clamp(0, 1) * 2 - 1, target

    def _some(self, count: int, of: Tensor) -> Tensor:
        return torch.randint(len(of), (count,), device=self.device, generator=self.luck.generator)

    def _shift(self, count: int) -> Tensor:
        return torch.randint(-3, 4, (2, count), device=self.device, generator=self.luck.generator)

    def _others(self, count: int) -> Tensor:
        return shifted(self.pixels[self._some(count, self.pixels), 0], self._shift(count))

    def sound(self, n: int) -> tuple[Tensor, Tensor]:
        index = self._some(n, self.pixels)
        images, target = self.pixels[index, 0], self.labels[index, 0]
        if self.pooled:
            third = n // 3
            back, made = (self._some(third, self.pooled[name]) for name in ("sound", "made"))
            images = torch.cat((self.pooled["sound"][back], self.pooled["made"][made], images[2 * third :]))
            target = torch.cat((self.labels[back, 0], self.pooled["made_labels"][made], target[2 * third :]))
        return shifted(images, self._shift(n)), target

    def altered(self, n: int) -> tuple[Tensor, Tensor]:
        index = self._some(n, self.pixels)
        return shifted(self.pixels[index, 2], self._shift(n)), self.labels[index, 2]

    def local(self, n: int):
        """One part of each destroyed, doubled or given other colours."""
        kinds = [*self.contents, "doubled", "recoloured"]
        for kind, count in zip(kinds, split(n, len(kinds)), strict=True):
            index, shift, rng = self._some(count, self.pixels), self._shift(count), self.luck.rng
            clean, without = (shifted(self.pixels[index, which], shift) for which in (0, 1))
            whole, lost = self.labels[index, 0], self.labels[index, 1]
            carried = whole != lost
            if kind == "doubled":
                images, target = self.doubled(clean, without, whole)
            elif kind == "recoloured":
                other = damage.whole(rng.choice(("swap", "invert", "grey", "tint")), clean, 1.0, self.luck, clean)
                where = parts.region(clean, without, margin=0)
                images = torch.where(where, other, clean)
                error = ((images - clean).pow(2).sum((1, 2, 3)) / (3 * where.sum((1, 2, 3)).clamp(min=1))).sqrt()
                changed = (error > 0.2)[:, None] & self.colours & carried
                target = torch.where(changed, -1 - whole, torch.where(carried, probe.LEFT_OUT, whole))
            else:
                shape = rng.choice(parts.SHAPES)
                images, target = parts.local(kind, clean, without, shape, self.luck, self._others(count)), lost
                if kind in parts.SOFT:
                    target = torch.where(carried & self.colours, probe.LEFT_OUT, target)
                if shape != "outline":
                    target = torch.where(carried | self.always, target, probe.LEFT_OUT)
            spoilt = damage.psnr(images, clean) < 21
            yield images, torch.where(spoilt[:, None] & ~carried, probe.LEFT_OUT, target)

    def doubled(self, clean: Tensor, without: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """An object a second time: another count, if the copy shows and the scene has objects."""
        rng, count = self.luck.rng, COLUMNS.index("count")
        across = rng.choice((-1, 1)) * rng.randint(22, 48)
        images = parts.doubled(clean, without, across, rng.randint(-45, -20) if rng.random() < 0.6 else 0)
        target = torch.where(self.always | ((whole == self.nothing) & ~self.objects), whole, probe.LEFT_OUT)
        target[:, count] = -1 - whole[:, count]
        composed = (whole[:, 0] == 0) & (damage.psnr(images, clean) < 26)
        return images, torch.where(composed[:, None], target, probe.LEFT_OUT)

    def whole(self, n: int):
        """All of each damaged; what counts depends on how far."""
        kinds = [*self.kinds, "latent"]
        for kind, count in zip(kinds, split(n, len(kinds)), strict=True):
            latent = kind == "latent"
            index, shift = self._some(count, self.pooled["latent"] if latent else self.pixels), self._shift(count)
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


def split(n: int, into: int) -> list[int]:
    """n in nearly equal numbers."""
    return [n * (i + 1) // into - n * i // into for i in range(into)]


def learn(run: Run, stage: str, samples: Samples, steps: int) -> nn.Module:
    """A probe trained on `samples`: the moving average of its weights."""
    network = probe.Probe().to(memory_format=torch.channels_last).to(run.device)  # type: ignore[call-overload]
    answer = run.compiled(network.forward)

    def objective(images, target):
        with run.autocast():
            scores = answer(images.contiguous(memory_format=torch.channels_last))
        return probe.loss(scores, target)

    return fit(run, stage, network, samples, objective, steps, run.settings.rate).eval()


# --- evaluation -------------------------------------------------------------------------------------------

ALTERED = {"composed": "object", "portrait": "held", "animal": "sign", "city": "towers"}  # what `parts.altered` alters
SOUND_KINDS = ("none", "shift by 2 pixels", "noise at 30 dB", "through the VAE")


def exchanged(scene: scenes.Scene, seed: int) -> tuple[np.ndarray, str]:
    """The drawing with another value for one fact that the caption states, and the fact's name."""
    rng = random.Random(f"exchanged {seed}")
    name = rng.choice([name for name in scene.said if name not in ("family", "count")] or ["time"])
    values = scenes.OUTDOORS if name == "place" else scenes.FACTS[name]
    return parts.drawn(scene, seed, **{name: rng.choice([v for v in values if v != scene[name]])}), name


def held_out(number: int) -> dict[str, Any]:
    """A scene kept out of training: as drawn, without one part, altered, and with another value of a stated fact."""
    scene, seed = scenes.held_out_scene(number), 10**9 + number
    its = parts.parts(scene)
    stated = [name for name, facts in its.items() if {*facts} & {*scene.said}]
    part = random.Random(number).choice(stated or list(its))
    altered, said = parts.altered(scene, seed)
    unlike = [n for n, a, b in zip(COLUMNS, said, probe.labels(scene), strict=True) if a != b and a >= 0]
    found = {"scene": scene, "drawn": parts.drawn(scene, seed), "part": part.partition(" ")[0], "lost": its[part]}
    found |= {"without": parts.erased(scene, seed, part), "altered": altered, "unlike": unlike}
    return found | dict(zip(("exchanged", "fact"), exchanged(scene, seed), strict=True))


def evaluate(network: nn.Module, count: int, first: int = FIRST, pipe=None) -> list[dict]:
    """What the probe says of scenes it has never seen, undamaged and damaged.

    Returns:
        Rows with `damage`, `part` ("" where all of the image is damaged), `trained` (was it trained with this damage?),
        `images`, and `failed`: how many of them lack a stated fact, or of a part all the facts that go with it.
    """
    held = [held_out(number) for number in range(first, first + count)]
    chosen, everything, rows = [h["scene"] for h in held], list(range(count)), []
    drawn, without, altered, other = (
        np.stack([h[n] for h in held]) for n in ("drawn", "without", "altered", "exchanged")
    )

    def add(name, images, which, facts=None, part="", trained=True):
        """`facts`: of each image those that are all to be missed; without it, any one is enough."""
        said, failed = [chosen[i].caption for i in which], 0
        for at in range(0, len(which), 250):
            some = slice(at, at + 250)
            for number, (right, wrong) in enumerate(probe.check(said[some], images[some], network), at):
                failed += not {*facts[number]} & {*right} if facts else bool(wrong)
        rows.append({"damage": name, "part": part, "trained": trained, "images": len(which), "failed": failed})

    def add_parts(name, images, part_of, facts_of, trained=True):
        """A row for each part, of the images whose captions state one of the facts."""
        of = [part_of(i) if {*facts_of(i)} & {*chosen[i].said} else "" for i in everything]
        for part in sorted({*of} - {""}):
            which = [i for i in everything if of[i] == part]
            add(name, images[which], which, [facts_of(i) for i in which], part, trained)

    device = next(network.parameters()).device
    pictures, bare = (damage.from_bytes(images).to(device) for images in (drawn, without))
    add(SOUND_KINDS[0], drawn, everything)
    moved = nn.functional.pad(pictures, (2, 0, 0, 2), "replicate")[..., 2:, :-2]
    add(SOUND_KINDS[1], damage.to_bytes(moved), everything)
    faint = pictures + 10**-1.5 * damage.Luck.of(first, device).normal(pictures)
    add(SOUND_KINDS[2], damage.to_bytes(faint), everything)
    if pipe is not None:
        with torch.no_grad():
            latents = [pipe.vae.encode(some * 2 - 1).latent_dist.mean for some in pictures.split(50)]
            decoded = torch.cat([pipe.vae.decode(some).sample for some in latents])
        add(SOUND_KINDS[3], damage.to_bytes(decoded / 2 + 0.5), everything)
    for kind in damage.WHOLE:
        images, which = damage.ruined(kind, drawn[:300], first, device)
        if which:
            add(kind, images, which, trained=kind not in damage.UNSEEN)
    for number, content in enumerate(parts.CONTENT):
        spoilt, luck = drawn.copy(), damage.Luck.of(first + number, device)
        for start, shape in enumerate(parts.SHAPES):  # a third of the images in each
            here, mix = (some[start::3] for some in (pictures, pictures.roll(1, 0)))
            spoilt[start::3] = damage.to_bytes(parts.local(content, here, bare[start::3], shape, luck, mix))
        soft = content in parts.SOFT
        facts = [[name for name in h["lost"] if not (soft and "colour" in name)] for h in held]
        add_parts(content, spoilt, lambda i: held[i]["part"], facts.__getitem__, content not in parts.UNSEEN)
    twice = [i for i in everything if chosen[i]["family"] == "composed" and held[i]["part"] == "object"]
    for name, by in (("doubled", (-24, -34)), ("in another's place", (40, 0))):
        if twice:
            add(name, damage.to_bytes(parts.doubled(pictures[twice], bare[twice], *by)), twice, part="object")
    add_parts("unknown to the grammar", altered, lambda i: ALTERED[chosen[i]["family"]], lambda i: held[i]["unlike"])
    add_parts("another value", other, lambda i: held[i]["fact"].rstrip("012"), lambda i: [held[i]["fact"]], False)
    return rows


def summary(rows: list[dict]) -> dict[str, float]:
    """Shares of images: undamaged that pass, and damaged that fail, by damages trained with and not."""

    def share(chosen: list[dict]) -> float:
        return sum(row["failed"] for row in chosen) / max(1, sum(row["images"] for row in chosen))

    found = {f"passed: {row['damage']}": 1 - share([row]) for row in rows if row["damage"] in SOUND_KINDS}
    damaged = [row for row in rows if row["damage"] not in SOUND_KINDS]
    for words, trained in (("trained", True), ("not trained", False)):
        kinds = [row for row in damaged if row["trained"] is trained]
        found[f"failed: all of the image, {words}"] = share([row for row in kinds if not row["part"]])
        found[f"failed: a part, {words}"] = share([row for row in kinds if row["part"]])
    return {name: round(value, 5) for name, value in found.items()}


# --- the whole ------------------------------------------------------------------------------------------------


def export(run: Run, network: nn.Module, out: Path) -> None:
    """Writes the probe in float16, its curve and its settings."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.half().contiguous().cpu() for name, w in network.state_dict().items()}
    origin = {"origin": "trained from nothing by fluxnb.training.train_probe on drawn scenes", "license": "Apache-2.0"}
    save_file(weights, out / probe.FILE, metadata=origin)
    (out / probe.CURVE).write_text((run.work / "training.csv").read_text())
    about = {"commit": telemetry.commit(), **train.about(run)}
    (out / probe.ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def write_evaluation(folder: Path, count: int, device: str) -> dict[str, float]:
    """Evaluates the exported probe; adds that to its probe.json; returns the summary."""
    pipe = pipelines.load("embedded", "float32", device)
    rows = evaluate(copy.deepcopy(probe.load(folder)).to(device), count, pipe=pipe)
    about = json.loads((folder / probe.ABOUT).read_text())
    about |= {"summary": summary(rows), "ruined_db": damage.RUINED_DB, "evaluation": rows}
    (folder / probe.ABOUT).write_text(json.dumps(about, indent=1) + "\n")
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
    train.prepare(device, settings.seed)
    try:
        pixels, labels = draw(run)
        reader = learn(run, "reader", Samples(run, pixels, labels), settings.reader_steps)
        pooled = pools(run, pixels, reader)
        run.check()
        network = learn(run, "probe", Samples(run, pixels, labels, pooled), settings.probe_steps)
    except OutOfTime:
        print("time is over: the state is saved; run the same command again to go on")
        return 0
    export(run, network, options.out)
    print(json.dumps(write_evaluation(options.out, settings.held_out, device), indent=1), flush=True)
    if options.out.resolve() == probe.FOLDER.resolve():
        print(json.dumps(train.write_evaluation(embedded.FOLDER, None, settings.evaluated, device), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
