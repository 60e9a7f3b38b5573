"""Images and traces kept beside the rows, so that a page shows the ones that were judged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fluxnb.scrub import scrubbed
from fluxnb.study.results import canonical
from fluxnb.study.row import KEY, Row
from fluxnb.study.subject import Input

ABOUT, TRACES = "about.json", "traces.json"
# What of a row's key doesn't decide its images: the page and the machine that they were made for.
_WHEREVER = ("notebook", "gpu", "stack", "host")


@dataclass(frozen=True)
class Kept:
    """The images of one candidate: one for each input, with what its cache decided."""

    key: dict
    label: str
    inputs: list[Input]
    folder: Path
    traces: list[dict | None]

    @property
    def name(self) -> str:
        """As `digest` gives it for the row."""
        return self.folder.name

    def image(self, i: int) -> Image.Image:
        """The i-th image as it was made."""
        with Image.open(self.folder / f"{i}.png") as image:
            return image.convert("RGB")


def key_of(columns: dict, code: str | None) -> dict:
    """What decides the images of a row with these columns, made by techniques whose code has this digest."""
    key = {name: columns.get(name) for name in KEY if name not in _WHEREVER}
    return scrubbed({name: value for name, value in key.items() if value is not None}) | {"code": code}


def digest(row: Row) -> str:
    """The name of the folder that a row's images are in."""
    return _name(key_of(row.as_dict(), row.code))


def _name(key: dict) -> str:
    return hashlib.sha256(canonical(key).encode()).hexdigest()[:16]


def folder(images_dir: Path, key: dict) -> Path:
    """Where what has this key is kept."""
    return images_dir / _name(key)


def find(images_dir: Path, key: dict) -> Kept | None:
    """What was kept under this key, None if it isn't whole."""
    return _read(folder(images_dir, key))


def every(images_dir: Path) -> list[Kept]:
    """Everything that was kept below a folder."""
    found = (_read(path.parent) for path in sorted(images_dir.glob(f"*/{ABOUT}")))
    return [kept for kept in found if kept is not None]


def keep(images_dir: Path, key: dict, label: str, inputs: list[Input], images: list, traces: list) -> None:
    """Writes images and traces; the traces last, so that what is half written isn't found."""
    folder = images_dir / _name(key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRACES).unlink(missing_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    (folder / ABOUT).write_text(json.dumps(scrubbed({"key": key, "label": label, "inputs": inputs})))
    (folder / TRACES).write_text(json.dumps(scrubbed(traces)))


def _read(folder: Path) -> Kept | None:
    try:
        about = json.loads((folder / ABOUT).read_text())
        traces = json.loads((folder / TRACES).read_text())
        inputs = [(prompt, seed) for prompt, seed in about["inputs"]]
        return Kept(about["key"], about["label"], inputs, folder, traces)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
