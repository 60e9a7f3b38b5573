"""The loop that all stages of training share: resumed where it stopped, on a clock, with a curve and an average."""

from __future__ import annotations

import copy
import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Settings:
    """Everything that determines the training. `small()` is the one that tests use."""

    scenes: int = 200_000
    vae_scenes: int = 100_000
    vae_steps: int = 6_000
    vae_batch: int = 128
    vae_rate: float = 1.6e-3
    l1_weight: float = 0.05
    kl_weight: float = 3e-9
    flow_steps: int = 30_000
    flow_batch: int = 512
    flow_rate: float = 1.2e-3
    distil_steps: int = 7_000
    distil_rate: float = 3e-4
    warm_up: int = 500
    weight_decay: float = 0.01
    ema: float = 0.999
    time_mean: float = 0.3  # of the logit of t
    time_std: float = 1.1
    drop_caption: float = 0.1
    unknown_word: float = 0.05  # captions that get a word nobody knows, so that such words do no harm
    guidance_low: float = 1.0
    guidance_high: float = 5.0
    held_out: int = 500
    seed: int = 0

    @staticmethod
    def small() -> Settings:
        return Settings(
            scenes=96,
            vae_scenes=64,
            vae_steps=3,
            vae_batch=8,
            flow_steps=4,
            flow_batch=8,
            distil_steps=3,
            warm_up=2,
            held_out=4,
        )


class Clock:
    """How much of the time given is left; no limit when `minutes` is None."""

    def __init__(self, minutes: float | None):
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def over(self) -> bool:
        return time.monotonic() > self.end


class OutOfTime(Exception):
    """The time given is used up; the state is saved."""


class Run:
    """One training run: its folder, its settings (a dataclass), its log and its clock."""

    def __init__(self, work: Path, settings: Any, device: str, minutes: float | None, workers: int):
        self.work, self.settings, self.device, self.workers = work, settings, device, workers
        self.clock = Clock(minutes)
        work.mkdir(parents=True, exist_ok=True)
        stored = work / "settings.json"
        if stored.exists() and json.loads(stored.read_text()) != asdict(settings):
            raise SystemExit(f"{work} was begun with other settings: go on with those, or delete the folder")
        stored.write_text(json.dumps(asdict(settings), indent=1))

    def log(self, stage: str, step: int, loss: float, seconds: float) -> None:
        path = self.work / "training.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(("stage", "step", "loss", "seconds"))
            writer.writerow((stage, step, f"{loss:.6g}", f"{seconds:.1f}"))
        print(f"{stage} {step}: loss {loss:.5f}, {seconds:.0f} s", flush=True)

    def check(self) -> None:
        """Between stages: raises OutOfTime when the time given is used up. What was finished is saved."""
        if self.clock.over():
            raise OutOfTime

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.device != "cpu")

    def compiled(self, module_or_function):
        return torch.compile(module_or_function) if self.device != "cpu" else module_or_function


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def fit(run: Run, stage: str, module: Network, sample, objective, steps: int, rate: float) -> Network:
    """Minimises `objective(*sample(generator))` over the parameters of `module`; returns its moving average.

    Resumes from `<work>/<stage>.pt`, saves there every two minutes and when the time is over. On a GPU the
    whole step is one CUDA graph: launching its two thousand small kernels one by one takes 2.6 times as long.
    """
    s = run.settings
    average = copy.deepcopy(module).requires_grad_(False)
    parameters: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad]
    both = zip(average.parameters(), module.parameters(), strict=True)
    averages: list[torch.Tensor] = [a for a, p in both if p.requires_grad]
    cuda = run.device != "cpu"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=torch.tensor(0.0, device=run.device),
        betas=(0.9, 0.95),
        weight_decay=s.weight_decay,
        fused=cuda,
        capturable=cuda,
    )
    path, step, spent = run.work / f"{stage}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    first, begin = step, time.monotonic()
    if step == steps:
        return average
    generator = torch.Generator(run.device).manual_seed(s.seed * 1_000_003 + step)
    rates = [group["lr"] for group in optimizer.param_groups]

    def update(batch):
        optimizer.zero_grad(set_to_none=True)
        loss = objective(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    def save():
        state = {
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict() if step < steps else None,
            "step": step,
            "seconds": spent + time.monotonic() - begin,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    saved, total, counted, replay = begin, torch.zeros((), device=run.device), 0, None
    while step < steps:
        value = learning_rate(step, steps, rate, min(s.warm_up, steps // 4 + 1))
        for group_rate in rates:
            group_rate.fill_(value)
        batch = sample(generator)
        if cuda and step == first + 3:
            replay = capture(update, batch)
        total += replay(batch) if replay else _aside(update, batch) if cuda else update(batch)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(s.ema, (1 + step) / (10 + step)))
        step, counted = step + 1, counted + 1
        if step % 100 == 0 or step == steps:
            run.log(stage, step, total.item() / counted, spent + time.monotonic() - begin)
            total, counted = torch.zeros_like(total), 0
            if run.clock.over() and step < steps:
                save()
                raise OutOfTime
            if time.monotonic() - saved > 120:
                save()
                saved = time.monotonic()
    save()
    return average


def _aside(update, batch):
    """One step on a side stream, as the steps before a capture have to run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = update(batch)
    torch.cuda.current_stream().wait_stream(side)
    return loss


def capture(update, batch):
    """Records `update` as a CUDA graph; returns a function batch -> loss that replays it."""
    static = [tensor.clone() for tensor in batch]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        loss = update(static)

    def replay(batch):
        for own, new in zip(static, batch, strict=True):
            own.copy_(new)
        graph.replay()
        return loss

    return replay
