"""Prompt adherence: does an image show what its prompt says?

The probe is a small convolutional network that reads the facts off an image: which objects, in which colours and
order, where, when. Every fact can also be answered by "none": what doesn't apply, can't be made out or isn't there is
not found, and an image that isn't intact has no facts at all. It learned that from damaged images
(`fluxnb.world.damage`, `fluxnb.world.parts`); what it fails and passes, of scenes it never saw, stands in probe.json.
`adherence` is the share of the prompt's facts that it finds: the exact, in-domain counterpart of a CLIP score. It
means something for the embedded model only.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fluxnb.world import scenes

FOLDER = Path(__file__).parent
FILE = "probe.safetensors"
ABOUT, CURVE = "probe.json", "probe.csv"  # how it was trained, and what it fails and passes
# What the probe answers: every fact, and whether the image is intact. Each has one answer more than values: none.
ANSWERS: dict[str, tuple[str, ...]] = {**scenes.FACTS, "intact": ("yes",)}
LEFT_OUT = -100  # a label that counts in no loss


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions; halves the sides where it widens."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.down = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.inner = nn.Sequential(
            nn.GroupNorm(8, after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1),
            nn.GroupNorm(8, after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1),
        )

    def forward(self, x):
        x = self.down(x)
        return x + self.inner(x)


class Probe(nn.Module):
    """Images to one score per possible answer to each question.

    Input (n, 3, 128, 128) in [-1, 1]; output: dict of fact name -> logits (n, number of values + 1), the last: none.
    """

    def __init__(self):
        super().__init__()
        widths = (3, 40, 80, 128, 160)
        blocks = [Block(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        last = [nn.GroupNorm(8, 160), nn.SiLU(), nn.Conv2d(160, 48, 1), nn.SiLU(), nn.Flatten()]
        self.trunk = nn.Sequential(*blocks, *last, nn.Linear(48 * 8 * 8, 192), nn.SiLU())
        self.sizes = [len(values) + 1 for values in ANSWERS.values()]
        self.head = nn.Linear(192, sum(self.sizes))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.trunk(images)).split(self.sizes, dim=1)
        return dict(zip(ANSWERS, logits, strict=True))


def labels(scene: scenes.Scene) -> list[int]:
    """The index of each answer for a drawing of the scene; facts that don't apply are answered by none."""
    given = {**dict(scene.facts), "intact": "yes"}
    return [values.index(given[name]) if name in given else len(values) for name, values in ANSWERS.items()]


def loss(logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the answers that count.

    `target` is (n, answers): an index of `labels`, LEFT_OUT, or -1 - v: anything but value v.
    """
    total, counted = torch.zeros((), device=target.device), (target != LEFT_OUT).sum()
    for column, scores in enumerate(logits.values()):
        wanted = target[:, column]
        chances = scores.float().log_softmax(1)
        said = chances.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        unwanted = chances.gather(1, (-1 - wanted).clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
        other = torch.log1p(-unwanted.exp().clamp(max=1 - 1e-6))
        total = total - torch.where(wanted >= 0, said, torch.where(wanted == LEFT_OUT, 0.0, other)).sum()
    return total / counted.clamp(min=1)


def to_tensor(images) -> torch.Tensor:
    """PIL images or uint8 arrays (h, w, 3) to a batch (n, 3, h, w) in [-1, 1]."""
    batch = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


@lru_cache(maxsize=1)
def load(folder: Path = FOLDER) -> Probe:
    """The trained probe that ships with the embedded model, on the CPU in float32."""
    from safetensors.torch import load_file

    weights = load_file(folder / FILE)
    probe = Probe()
    probe.load_state_dict({name: w.float() for name, w in weights.items()})
    return probe.eval()


@torch.no_grad()
def read(images, probe: Probe | None = None) -> list[dict[str, str]]:
    """The facts that the probe finds in each image; an image that isn't intact has none."""
    probe = probe or load()
    device = next(probe.parameters()).device
    answers = torch.stack([scores.argmax(1) for scores in probe(to_tensor(images).to(device)).values()], 1).tolist()
    found = []
    for row in answers:
        seen = {name: values[i] for (name, values), i in zip(ANSWERS.items(), row, strict=True) if i < len(values)}
        found.append(seen if seen.pop("intact", None) else {})
    return found


def check(prompts: list[str], images, probe: Probe | None = None) -> list[tuple[list[str], list[str]]]:
    """For each image, the facts of its prompt that hold and those that don't."""
    results = []
    for prompt, seen in zip(prompts, read(images, probe), strict=True):
        wanted = scenes.parse(prompt)
        right = [name for name, value in wanted.items() if seen.get(name) == value]
        results.append((right, [name for name in wanted if name not in right]))
    return results


def adherence(prompts: list[str], images, probe: Probe | None = None) -> list[float | None]:
    """Share of each prompt's facts found in its image, 0 to 1; None for a prompt that states no known fact.

    Source: checking generated images against structured prompts is GenEval's idea (Ghosh et al., 2023).
    """
    return [
        len(right) / (len(right) + len(wrong)) if right or wrong else None
        for right, wrong in check(prompts, images, probe)
    ]
