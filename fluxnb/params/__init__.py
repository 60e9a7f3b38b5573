"""The parameters of a run: params/base.yaml with the values of params/<gpu>.yaml put over it, checked.

Which keys there are and what they may be: `schema`. Nothing here imports torch before `detect_gpu` is called.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
import types
import typing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fluxnb import installed
from fluxnb import notebooks as nb
from fluxnb.errors import UserError
from fluxnb.models import facts
from fluxnb.params import reading
from fluxnb.params.schema import NOTEBOOKS, SCHEMA, FullSize, GpuParams, StudyParams
from fluxnb.recipes import fits
from fluxnb.world import scenes

THOROUGH = "FLUXNB_THOROUGH"  # variable: 1 lays a file's section `thorough` over the others


@dataclass(frozen=True)
class Params:
    """The checked parameters of one GPU configuration, and the model of the user's that they are used for, if any.

    Args:
        more: section -> key -> what a thorough run has instead, in words.
    """

    name: str
    gpu: GpuParams
    study: StudyParams
    notebooks: dict[str, dict]
    model: facts.Facts | None = None
    thorough: bool = False
    more: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def report_dir(self) -> Path:
        """Where the committed reference lies, relative to the project root."""
        if self.gpu.count == 1:
            return Path("reports", "single_gpu", self.name)
        return Path("reports", "multi_gpu", f"{self.gpu.count}gpu", parted(self.name)[0])

    @property
    def own_dir(self) -> Path:
        """Where a user's own run goes, relative to the project root: git ignores it."""
        return Path("reports", "own", *self.report_dir.parts[1:], *([self.model.folder] if self.model else []))

    @property
    def build_dir(self) -> Path:
        """Where what a run leaves for the next one goes, relative to the project root."""
        return Path("build", self.name, *(["models", self.model.folder] if self.model else []))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the resolved parameters: equal when every value is equal."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def resolved(self) -> dict:
        """All sections and values as plain dicts, lists and numbers (a copy)."""
        own = {"model": asdict(self.model)} if self.model else {}
        return {"gpu": asdict(self.gpu), "study": asdict(self.study), **own, **copy.deepcopy(self.notebooks)}

    def for_notebook(self, stem: str) -> dict:
        """What papermill puts into notebook `stem`: the GPU's name; the notebook itself asks for its values."""
        return {"gpu": self.name}

    def added(self, stem: str) -> list[str]:
        """What a thorough run of notebook `stem` has more than a short one, in words."""
        return [words for section in ("study", stem) for words in self.more.get(section, {}).values()]

    def lacks(self, stem: str) -> list[str]:
        """What the page of notebook `stem` leaves out, which a thorough run measures."""
        return [] if self.thorough else self.added(stem)

    def given(self, stem: str) -> types.SimpleNamespace:
        """The values of notebook `stem` (a copy), by name; none where it has no section."""
        return types.SimpleNamespace(**copy.deepcopy(self.notebooks.get(stem, {})))


class KeyDoc(typing.NamedTuple):
    """One line of the documentation of the parameters."""

    path: str
    type: str
    allowed: str
    default: object
    help: str
    thorough: str  # what a thorough run has instead, "" for the same


def find_folder() -> Path:
    """The project's params/ folder. Raises UserError when there is none."""
    return installed.project() / "params"


def parted(name: str) -> tuple[str, int]:
    """A configuration's name, such as h100x2, as that of its GPU and how many there are."""
    found = re.fullmatch(r"(.+?)x(\d{1,2})", name)
    return (found[1], int(found[2])) if found else (name, 1)


def choices(folder: Path | None = None) -> list[str]:
    """The names that `load` accepts: the YAML files of `folder` without base.yaml, x2 before x8."""
    names = [p.stem for p in Path(folder or find_folder()).glob("*.yaml") if p.stem != "base"]
    return sorted(names, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])


def load(gpu: str, folder: Path | None = None, thorough: bool = False, random: bool = False) -> Params:
    """The parameters of configuration `gpu`: base.yaml with the values of <gpu>.yaml put over it.

    A thorough run has both files' sections `thorough` on top, one about a model of random weights `random`. Mappings
    are merged, lists are replaced. Raises UserError, naming the file, the key, the value and what is allowed, when
    anything is unknown, missing, of the wrong type or out of range.
    """
    folder = Path(folder) if folder else find_folder()
    names = choices(folder)
    if gpu not in names:
        which = f"choose one of: {', '.join(names)}; `python -m fluxnb params --new NAME` writes one for another GPU"
        raise UserError(f"GPU={gpu} is not known{reading.did_you_mean(gpu, names)}; {which}.")
    base_file, own_file = folder / "base.yaml", folder / f"{gpu}.yaml"
    base, own = _read(base_file), _read(own_file)
    more, brief = (
        [(file, f"{name}.", v.pop(name, {})) for file, v in ((base_file, base), (own_file, own))]
        for name in (reading.THOROUGH, reading.RANDOM)
    )
    layers = [(base_file, "", base), (own_file, "", own), *(brief if random else [])]
    _check_complete(_merged(base, own), SCHEMA, base_file, own_file)
    short, full = (_laid(gpu, found) for found in (layers, layers + more))
    return replace(full if thorough else short, thorough=thorough, more=_more(short, full))


def chosen(gpu: str, folder: Path | None = None) -> Params:
    """The parameters of configuration `gpu`, for the model that `make report MODEL=…` asks for, if it asks for one."""
    model = facts.asked()
    loaded = load(gpu, folder, _asked_thorough(), model is not None and model.random)
    if model is None:
        return loaded
    for name in ("models", "distilled"):  # the study's own
        loaded.more.get("study", {}).pop(name, None)
    return replace(loaded, model=model, study=replace(loaded.study, models=[model.name], distilled=None))


def overridden(chosen: Params, stem: str, given: dict) -> Params:
    """The parameters with some values of notebook `stem` replaced. Raises UserError for what no file could hold."""
    if not given:
        return chosen
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    values = reading.checked(given, NOTEBOOKS.get(stem, {}), f"{stem}.ipynb")
    notebooks = {**chosen.notebooks, stem: {**chosen.notebooks.get(stem, {}), **values}}
    params = replace(chosen, notebooks=notebooks)
    _check_together(params, lambda section, name: f"{stem}.ipynb: {name}")
    return params


def describe(folder: Path | None = None) -> list[KeyDoc]:
    """(key path, type, allowed, default, help) of every parameter; the default is base.yaml's value.

    A key that base.yaml leaves to the GPU files has the default "per GPU".
    """
    base_file = Path(folder or find_folder()) / "base.yaml"
    base = _read(base_file)

    def walk(schema, values, over, path):
        for name, key in schema.items():
            if isinstance(key, dict):
                yield from walk(key, values.get(name, {}), over.get(name, {}), f"{path}{name}.")
            else:
                more, default = str(over.get(name, "")), values.get(name, "per GPU")
                yield KeyDoc(path + name, key.type_name, key.allowed, default, key.help, more)

    return list(walk(SCHEMA, base, base.get(reading.THOROUGH, {}), ""))


def detect_gpu() -> tuple[str, int]:
    """(CUDA device name, number of CUDA devices), or ("cpu", 0) where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu", 0
    return torch.cuda.get_device_name(0), torch.cuda.device_count()


def check_gpu(params: Params, detected_name: str, force: bool = False, detected_count: int | None = None) -> None:
    """Raises UserError when the detected device is not the one that the parameters are for, unless `force`.

    `gpu.match` has to stand in the name as whole words, in any case: A100 fits "NVIDIA A100-SXM4-80GB" and
    not "RTX A1000". More GPUs than `gpu.count` are fine, fewer are not.
    """
    enough = detected_count is None or params.gpu.match in ("cpu", "any") or detected_count >= params.gpu.count
    if force or (fits(params.gpu.match, detected_name) and enough):
        return
    wanted = {"cpu": "no CUDA device", "any": "any device"}.get(
        params.gpu.match,
        f"{params.gpu.count} CUDA device{'s' * (params.gpu.count > 1)} named {params.gpu.match}",
    )
    found = "no CUDA device" if detected_name == "cpu" else detected_name
    if detected_name != "cpu" and detected_count is not None:
        found = f"{detected_count} × {found}"
    fitting = [n for n in _fitting(detected_name, detected_count) if n != params.name]
    use = (
        f"use GPU={' or GPU='.join(fitting)}, or set"
        if fitting
        else "add a params file for it (`python -m fluxnb params --new NAME`), or set"
    )
    raise UserError(f"GPU={params.name} is for {wanted} but this machine has {found}: {use} FORCE=1 to go on anyway.")


def _fitting(name: str, count: int | None) -> list[str]:
    """Configurations of the project that fit the detected device, for the hint of `check_gpu`."""
    try:
        loaded = [load(n) for n in choices()]
    except UserError:  # a broken neighbour file must not hide the message this hint is for
        return []
    fitting = [p for p in loaded if p.gpu.match != "any" and fits(p.gpu.match, name)]
    return [p.name for p in fitting if name == "cpu" or p.gpu.count <= (count or 1)]


def _asked_thorough() -> bool:
    if (given := os.environ.get(THOROUGH, "").strip()) not in ("", "0", "1"):
        raise UserError(f"THOROUGH={given} isn't allowed: give 1 for all that the study measures, or leave it out.")
    return given == "1"


def _laid(name: str, layers: list[tuple[Path, str, dict]]) -> Params:
    """The parameters of layers, each put over those before: (its file, the path of its sections there, its values)."""

    def where(section, key):
        found = ((file, path) for file, path, values in reversed(layers) if key in values.get(section, {}))
        file, path = next(found, layers[0][:2])
        return f"{reading.file_name(file)}: {path}{section}.{key}"

    params = _build(name, functools.reduce(_merged, (values for _, _, values in layers)))
    _check_together(params, where)
    return params


def _more(short: Params, full: Params) -> dict[str, dict[str, str]]:
    """Section -> key -> what of a thorough run's values a short one lacks, in words."""

    def walk(schema, ours, theirs, path=""):
        for name, key in schema.items():
            if isinstance(key, dict):
                yield from walk(key, ours[name], theirs[name], f"{name}.")
            elif ours[name] != theirs[name]:
                yield path + name, f"{key.help} (`{path}{name}`): {reading.lacking(ours[name], theirs[name])}"

    both = short.resolved(), full.resolved()
    found = {name: dict(walk(keys, *(values[name] for values in both))) for name, keys in SCHEMA.items()}
    return {name: lines for name, lines in found.items() if lines}


def _check_complete(values: dict, schema: dict, base_file: Path, own_file: Path, path: str = "") -> None:
    for name, key in schema.items():
        if isinstance(key, dict):
            _check_complete(values.get(name, {}), key, base_file, own_file, f"{path}{name}.")
        elif name not in values:
            files = f"{reading.file_name(base_file)} and {reading.file_name(own_file)}"
            raise UserError(f"{path}{name} is missing in {files}; allowed is {key.allowed} ({key.help}).")


def _check_together(params: Params, where) -> None:
    """What no single value can show: values that contradict each other. `where(section, name)` says who has it."""
    suffix = re.search(r"x(\d{1,2})$", params.name)
    if suffix and int(suffix[1]) != params.gpu.count:
        raise UserError(
            f"{where('gpu', 'count')} is {params.gpu.count}; allowed is {suffix[1]}, as the file's name says."
        )
    cache = params.notebooks[nb.FIRST_BLOCK]
    for threshold in cache["grid_thresholds"]:
        if threshold not in cache["thresholds"]:
            raise UserError(
                f"{where(nb.FIRST_BLOCK, 'grid_thresholds')} has {threshold:g}; allowed are values"
                f" of thresholds: {', '.join(f'{t:g}' for t in cache['thresholds'])}."
            )
    for steps in cache["fewer_steps"]:
        if steps >= params.study.steps:
            raise UserError(
                f"{where(nb.FIRST_BLOCK, 'fewer_steps')} has {steps}; allowed are whole numbers"
                f" below study.steps, which is {params.study.steps}."
            )


def _build(name: str, values: dict) -> Params:
    study = dict(values["study"], full_size=FullSize(**values["study"]["full_size"]))
    own, judged = study["prompts"], study["judged"]
    study["prompts"] = own[:judged] if own else list(scenes.judging(judged))
    study["shown"] = study["shown"] or (own[: len(scenes.STUDY_PROMPTS)] if own else list(scenes.STUDY_PROMPTS))
    notebooks = {stem: values[stem] for stem in NOTEBOOKS}
    return Params(name, GpuParams(**values["gpu"]), StudyParams(**study), notebooks)


def _read(file: Path) -> dict:
    return reading.checked(reading.read(file), reading.FILE, reading.file_name(file))


def _merged(base: dict, own: dict) -> dict:
    both = {k: _merged(base[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **own, **both}
