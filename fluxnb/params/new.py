"""A file in params/ for a GPU that has none: written from the card that is here, or from what is said of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from fluxnb import params
from fluxnb.errors import UserError
from fluxnb.params.reading import plain

FULL_SIZE_GIB = 40  # of a card: FLUX's full size in bfloat16 with its text encoders and one image takes 38
_MAKERS = re.compile(
    r"^(NVIDIA|AMD|Intel\(R\)|GeForce|Radeon|Tesla|Quadro|Instinct|\s)+|\s*\d+ ?GB.*$|-\d+GB.*$|-(SXM|PCIE?).*$", re.I
)


def write(name: str, match: str | None, memory: float | None, folder: Path) -> Path:
    """Writes params/<name>.yaml and gives its path; `load` has taken it.

    Args:
        name: such as 4090, or 4090x2 for two of them.
        match: words of the card's name; None: of the card that is here.
        memory: GiB of one; None: of the card that is here.

    Raises UserError for a name that can't be one or is taken, for figures that can't be, and where neither a card nor
    the figures are there.
    """
    if not re.fullmatch(r"(?!.*x0+$)[a-z0-9][a-z0-9_-]{0,30}", name):
        raise UserError(f"GPU={plain(name)} can't be a file's name: use small letters and digits, such as 4090.")
    if (path := folder / f"{name}.yaml").exists():
        raise UserError(f"params/{name}.yaml is there already: `make report GPU={name}` uses it; edit it as you like.")
    base, times = params.parted(name)
    asks = f'`python -m fluxnb params --new {name} --match "RTX 4090" --memory 24`'
    if match is None or memory is None:
        card, size, count = found()
        if not card:
            raise UserError(f"No GPU is here to ask: give words of its name and its memory in GiB, as in {asks}.")
        bare = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in (base, card)]
        if bare[0] not in bare[1]:
            raise UserError(
                f"The GPU here is {count} × {plain(card)}, no {name}: choose a part of its name, or give words of the "
                f"other's and its memory in GiB, as in {asks}."
            )
        if count < times:
            raise UserError(
                f"{count} GPU{'s' * (count > 1)} of that name are here, and {name} is for {times}: name it {base}."
            )
        match, memory = match or _MAKERS.sub("", card).strip() or card, memory or size
    many = f"{times} ×" if times > 1 else "One"
    lines = [f"# {many} {plain(match)} ({memory:.0f} GB).", "gpu:", f"  match: {json.dumps(match)}"]
    lines += [f"  count: {times}"] * (times > 1) + [f"  memory_gib: {memory:g}", ""]
    if memory >= FULL_SIZE_GIB:
        lines += [
            "study:",
            "  models: [embedded, flux-dev-random]",
            "  distilled: [embedded-schnell, flux-schnell-random]",
        ]
    else:
        lines += ["# FLUX's full size in bfloat16 doesn't fit: only the embedded models are measured."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        params.load(name, folder)
    except UserError:
        path.unlink()
        raise
    return path


def found() -> tuple[str, float, int]:
    """(name, memory in GiB, how many of that name) of the first GPU, by nvidia-smi or else torch; ("", 0, 0): none."""
    ask = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30)
        lines = [line.rpartition(",") for line in said.stdout.splitlines()] if said.returncode == 0 else []
        if lines:
            name = lines[0][0].strip()
            return name, round(float(lines[0][2]) / 1024), sum(line[0].strip() == name for line in lines)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        pass
    name, count = params.detect_gpu()
    if not count:
        return "", 0.0, 0
    import torch

    return name, round(torch.cuda.get_device_properties(0).total_memory / 2**30), count
