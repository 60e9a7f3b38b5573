"""Prompt adherence: does an image show what its prompt says?

The probe is a small convolutional network, trained on drawn scenes, that reads the facts off an image:
which objects, in which colours and order, where, when. `adherence` is the share of the prompt's facts that it
finds: the exact, in-domain counterpart of a CLIP score. It means something for the embedded model only.
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


class Probe(nn.Module):
    """Images to one score per possible value of each fact.

    Input (n, 3, 128, 128) in [-1, 1]; output: dict of fact name -> logits (n, number of values).
    """

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        layers += [nn.Conv2d(128, 64, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.sizes = [len(values) for values in scenes.FACTS.values()]
        self.head = nn.Linear(128, sum(self.sizes))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.trunk(images)).split(self.sizes, dim=1)
        return dict(zip(scenes.FACTS, logits, strict=True))


def labels(scene: scenes.Scene) -> list[int]:
    """The index of each fact's value, -100 for facts that don't apply (cross entropy ignores them)."""
    facts = dict(scene.facts)
    return [values.index(facts[name]) if name in facts else -100 for name, values in scenes.FACTS.items()]


def loss(logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the facts that apply; `target` is (n, number of facts) from `labels`."""
    total = torch.zeros((), device=target.device)
    for column, scores in enumerate(logits.values()):
        total = total + nn.functional.cross_entropy(
            scores.float(), target[:, column], reduction="sum", ignore_index=-100
        )
    return total / (target != -100).sum()


def to_tensor(images) -> torch.Tensor:
    """PIL images or uint8 arrays (h, w, 3) to a batch (n, 3, h, w) in [-1, 1]."""
    batch = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


@lru_cache(maxsize=1)
def load(folder: Path = FOLDER) -> Probe:
    """The trained probe that ships with the embedded model, on the CPU in float32."""
    from safetensors.torch import load_file

    probe = Probe()
    probe.load_state_dict({name: w.float() for name, w in load_file(folder / FILE).items()})
    return probe.eval()


@torch.no_grad()
def read(images, probe: Probe | None = None) -> list[dict[str, str]]:
    """What the probe sees in each image: every fact's most likely value, whether or not it applies."""
    probe = probe or load()
    device = next(probe.parameters()).device
    logits = probe(to_tensor(images).to(device))
    found = {name: scores.argmax(1).tolist() for name, scores in logits.items()}
    return [{name: scenes.FACTS[name][found[name][i]] for name in found} for i in range(len(images))]


def check(prompts: list[str], images, probe: Probe | None = None) -> list[tuple[list[str], list[str]]]:
    """For each image, the facts of its prompt that hold and those that don't."""
    results = []
    for prompt, seen in zip(prompts, read(images, probe), strict=True):
        wanted = scenes.parse(prompt)
        right = [name for name, value in wanted.items() if seen[name] == value]
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
