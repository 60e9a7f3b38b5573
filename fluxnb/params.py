"""Read params/base.yaml and params/<gpu>.yaml, check every key, and say what is wrong and what is allowed.

The schema stands at the top: one dataclass per fixed section, one block of `NOTEBOOKS` per notebook. The
values stand in the YAML files only, so a default is written in one place. Nothing here imports torch before
`detect_gpu` is called.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from fluxnb.errors import UserError


@dataclass(frozen=True)
class Key:
    """What one parameter may be: `type` is int, float, str, bool or a list of one of them, perhaps | None."""

    type: object
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    multiple_of: int | None = None

    @property
    def optional(self) -> bool:
        return isinstance(self.type, types.UnionType)

    @property
    def many(self) -> bool:
        return typing.get_origin(self._bare) is list

    @property
    def item(self) -> type:
        """The type of one value: int for both int and list[int]."""
        return typing.get_args(self._bare)[0] if self.many else self._bare

    @property
    def _bare(self):
        if self.optional:
            return next(t for t in typing.get_args(self.type) if t is not types.NoneType)
        return self.type

    @property
    def type_name(self) -> str:
        name = {int: "int", float: "number", str: "text", bool: "true or false"}[self.item]
        return (f"list of {name}" if self.many else name) + (" or null" if self.optional else "")

    @property
    def allowed(self) -> str:
        """The allowed values in words, fit to follow 'allowed is' in a sentence."""
        if self.choices:
            one = "one of " + ", ".join(map(str, self.choices))
        elif self.item is bool:
            one = "true or false"
        elif self.item is str:
            one = "text that is not empty"
        else:
            one = "a whole number" if self.item is int else "a number"
            if self.low is not None and self.high is not None:
                one += f" from {_number(self.low)} to {_number(self.high)}"
            elif self.low is not None:
                one += f" of at least {_number(self.low)}"
            elif self.high is not None:
                one += f" of at most {_number(self.high)}"
            if self.multiple_of:
                one += f" that is a multiple of {self.multiple_of}"
        if self.many:
            one = f"a list with at least one entry and none twice, each {one}"
        return one + (" or null" if self.optional else "")


def _key(help: str, **limits):
    """A dataclass field that carries the help and limits of its parameter; its type is the annotation."""
    return field(metadata={"help": help, "limits": limits})


@dataclass(frozen=True)
class GpuParams:
    """The machine that a params file is for."""

    match: str = _key("words in the CUDA device name, such as H100; cpu = no CUDA device, any = whatever is there")
    count: int = _key("GPUs that one run uses", low=1, high=64)
    memory_gib: float | None = _key("memory of one GPU in GiB", low=1, high=4096)
    price_per_hour: float | None = _key("US$ per GPU-hour, for the cost figures only", low=0, high=10000)


@dataclass(frozen=True)
class FullSize:
    """How models of FLUX's real size are measured; their weights may be random, so time and memory only."""

    steps: int = _key("denoising steps of one image", low=1, high=200)
    width: int = _key("image width in pixels", low=64, high=4096, multiple_of=16)
    height: int = _key("image height in pixels", low=64, high=4096, multiple_of=16)
    rounds: int = _key("interleaved rounds of one comparison", low=3, high=1000)


@dataclass(frozen=True)
class StudyParams:
    """What every notebook has in common."""

    models: list[str] = _key("models by name: embedded, flux-dev-random, a hub id or a local folder")
    prompts: list[str] = _key("prompts that every technique is shown with")
    seeds: list[int] = _key("seeds; each prompt is drawn once with each of them", low=0, high=2**32 - 1)
    steps: int = _key("denoising steps of one image", low=1, high=200)
    guidance_scale: float = _key("guidance of FLUX.1-dev", low=0, high=30)
    width: int | None = _key("image width in pixels; null = the model's own", low=64, high=4096, multiple_of=16)
    height: int | None = _key("image height in pixels; null = the model's own", low=64, high=4096, multiple_of=16)
    rounds: int = _key("interleaved rounds of one comparison", low=3, high=1000)
    group: int = _key("candidates that share one baseline in a round", low=1, high=100)
    warmup: int = _key("most images made to warm up before a measurement", low=1, high=100)
    full_size: FullSize = field()


TORCHAO = (
    "fp8 row",
    "fp8 tensor",
    "fp8 weight-only",
    "int8",
    "int8 weight-only",
    "int4 weight-only",
    "fp8 row, 2:4 sparse",
)  # the kinds of fluxnb.techniques.precision.TorchAO, which isn't imported here: it imports torch

USE_CASES = (
    "txt2img",
    "img2img",
    "inpainting",
    "ControlNet txt2img",
    "ControlNet img2img",
    "ControlNet inpainting",
)  # the keys of fluxnb.models.pipelines.USE_CASES

WAYS = (
    "replicas",
    "all-gather",
    "Ulysses",
    "pulled",
    "both",
    "diffusers Ulysses",
    "diffusers ring",
    "xDiT Ulysses",
    "xDiT ring",
    "PipeFusion",
    "FSDP",
    "parallel VAE",
)  # the ways of notebook 11

STACKS = (
    "all-gather, quantized",
    "Ulysses",
    "Ulysses, quantized",
    "pulled",
    "pulled, quantized",
    "pulled, queries apart",
    "pulled, queries apart, parallel VAE",
    "pulled, quantized, queries apart, parallel VAE",
    "pulled, everything",
    "pulled, quantized, everything",
)  # notebook 11: ways with what is built in with them

COMPILED = (
    "blocks",
    "fused QKV",
    "fused GELU",
    "fused RoPE",
    "modulation ahead",
    "text encoders",
    "text encoders, CUDA graph",
    "CUDA graph",
    "all",
    "max-autotune",
    "transformer",
    "transformer, CUDA graphs",
    "transformer, max-autotune",
    "TensorRT",
)  # the variants of notebook 03

NOTEBOOKS: dict[str, dict[str, Key]] = {
    "00_environment": {
        "matmul_size": Key(int, "side of the square matrices of the speed ceiling", low=1024, high=16384),
        "repeats": Key(int, "how often each ceiling is measured", low=1, high=1000),
    },
    "01_baseline": {
        "dtypes": Key(list[str], "number formats compared", choices=("float32", "float16", "bfloat16")),
        "full_size_steps": Key(
            int, "steps at which full-size models compare number formats: 28 in FP32 take long", low=1, high=200
        ),
    },
    "02_attention": {
        "tokens": Key(int, "tokens of the kernels' own test; 4608 is FLUX at 1024²", low=64, high=65536),
        "repeats": Key(int, "how often each kernel is timed", low=1, high=1000),
        "steps": Key(int, "steps of an image of the embedded model", low=1, high=200),
        "full_size_steps": Key(int, "steps of an image at full size", low=2, high=200),
    },
    "03_compile": {
        "variants": Key(list[str], "what is compiled how", choices=COMPILED),
        "full_size_steps": Key(int, "steps of an image at full size", low=2, high=200),
        "patience": Key(float, "seconds until a variant's first image, after which it is given up", low=10, high=86400),
        "prompts": Key(int, "prompts of the embedded model that quality is judged on", low=1, high=100),
        "quantized": Key(list[str], "torchao kinds compiled too, full size", choices=TORCHAO),
        "quantized_variants": Key(list[str], "what of these is compiled how", choices=COMPILED),
    },
    "04_quantization": {
        "steps": Key(int, "steps of an image of the embedded model", low=1, high=200),
        "prompts": Key(int, "prompts that quality is judged on", low=1, high=100),
        "full_size_steps": Key(int, "steps of an image at full size", low=2, high=200),
        "compiled": Key(list[str], "torchao kinds that are also measured compiled, full size", choices=TORCHAO),
        "batches": Key(list[int], "batch sizes of the scaling, full size", low=1, high=64),
        "batch_steps": Key(int, "steps of the images of the batches", low=1, high=200),
        "batch_kinds": Key(list[str], "torchao kinds whose batches are measured, compiled", choices=TORCHAO),
    },
    "05_first_block_cache": {
        "thresholds": Key(list[float], "thresholds of the first block's relative change", low=0),
        "intervals": Key(list[int], "fixed intervals of the control: compute every n-th step", low=1, high=50),
        "fewer_steps": Key(
            list[int], "step counts of the fewer-steps control, each below study.steps", low=1, high=199
        ),
        "grid_thresholds": Key(list[float], "thresholds shown in the image grid, each also in thresholds", low=0),
    },
    "06_teacache": {
        "thresholds": Key(list[float], "thresholds of the accumulated change", low=0),
        "intervals": Key(list[int], "fixed intervals of the control: compute every n-th step", low=1, high=50),
        "warm_up": Key(int, "steps computed first, of the strategies that have it", low=0, high=50),
        "fewer_steps": Key(list[int], "step counts of the fewer-steps control", low=1, high=199),
        "fit_images": Key(int, "images whose trajectories the polynomial is fitted to", low=1, high=100),
    },
    "07_combined_cache": {
        "tea_thresholds": Key(list[float], "TeaCache thresholds of the grid", low=0),
        "first_block_thresholds": Key(list[float], "First Block Cache thresholds of the grid", low=0),
        "warm_up": Key(int, "steps computed before anything is reused", low=0, high=50),
        "survey_prompts": Key(int, "prompts that every setting of the grid is judged on", low=1, high=100),
        "fewer_steps": Key(list[int], "step counts of the fewer-steps controls", low=1, high=199),
        "batches": Key(list[int], "batch sizes whose one decision is compared", low=1, high=64),
        "full_size_steps": Key(int, "steps at which the engine's cost is measured at full size", low=2, high=200),
    },
    "08_quantized_cache": {
        "thresholds": Key(list[float], "thresholds of the published experiment", low=0),
        "rank": Key(int, "rank of SVDQuant's 16-bit part", low=1, high=128),
        "full_size_steps": Key(int, "steps of an image with a 4-bit transformer at full size", low=2, high=200),
    },
    "09_vae": {
        "sides": Key(list[int], "pixels per side of the decoded images", low=64, high=4096, multiple_of=16),
        "options": Key(
            list[str],
            "what is done to the VAE and what follows it",
            choices=("channels-last", "compiled", "sliced", "tiled", "bytes"),
        ),
        "tiles": Key(list[int], "pixels per side of a tile", low=32, high=2048, multiple_of=16),
        "batch": Key(int, "images decoded at once, for slices", low=2, high=64),
        "repeats": Key(int, "how often each decoding is timed", low=1, high=1000),
    },
    "10_use_cases": {
        "use_cases": Key(list[str], "use cases, each a pipeline of diffusers", choices=USE_CASES),
        "condition": Key(str, "what the ControlNet is given", choices=("edges", "depth")),
        "strength": Key(float, "share of the steps run where a picture is the start", low=0.05, high=1),
        "threshold": Key(float, "threshold of both caches: the balanced preset", low=0),
        "quantization": Key(str, "the torchao kind whose quality is judged", choices=TORCHAO),
        "full_quantization": Key(str, "the torchao kind at full size, compiled", choices=TORCHAO),
        "computed": Key(int, "steps that the schedule computes at full size", low=1, high=200),
        "prompts": Key(int, "prompts that quality is judged on", low=1, high=100),
    },
    "11_parallel": {
        "ranks": Key(int | None, "processes that share an image; null = gpu.count", low=2, high=64),
        "ways": Key(list[str], "how it is divided", choices=WAYS),
        "full_size_ways": Key(list[str] | None, "how it is divided at full size; null = as `ways`", choices=WAYS),
        "stacks": Key(list[str], "with what else the ways are measured at full size", choices=STACKS),
        "quantization": Key(str, "the torchao kind of the fastest stack, full size", choices=TORCHAO),
        "computed": Key(int, "steps that the schedule computes at full size", low=1, high=200),
        "prompts": Key(int, "prompts of the embedded model", low=1, high=100),
        "silence": Key(float, "seconds without a result after which ranks are ended", low=10, high=3600),
    },
    "12_load": {
        "users": Key(list[int], "people who ask at the same time", low=1, high=1000),
        "images": Key(list[int], "images of one request", low=1, high=64),
        "requests": Key(int, "requests of one load, warm-up not counted", low=4, high=100000),
        "arrivals": Key(list[float], "rates of random arrivals, as shares of what all GPUs can make", low=0.05, high=2),
        "batch": Key(int, "waiting requests that are made together; 1 = none", low=1, high=64),
        "use_cases": Key(list[str], "use cases that are served", choices=USE_CASES),
        "steps": Key(int, "denoising steps of one image of the embedded model", low=1, high=200),
        "full_size_users": Key(list[int], "people who ask at the same time, at full size", low=1, high=1000),
        "full_size_requests": Key(int, "requests of one load at full size", low=4, high=100000),
        "full_size_arrivals": Key(list[float], "rates of random arrivals at full size", low=0.05, high=2),
    },
    "13_final_stack": {
        "quantization": Key(str, "the torchao kind of the stack", choices=TORCHAO),
        "cache_steps": Key(int, "computed steps of the stack's cache", low=2, high=200),
        "prompts": Key(int, "prompts that quality is judged on", low=1, high=100),
        "around": Key(list[str], "what is spared before and after the steps", choices=("hooks", "bytes")),
    },
    "14_embedded_model": {
        "check_images": Key(int, "committed evaluation images that are recomputed", low=1, high=500),
    },
}


@dataclass(frozen=True)
class Params:
    """The checked parameters of one GPU configuration."""

    name: str
    gpu: GpuParams
    study: StudyParams
    notebooks: dict[str, dict]

    @property
    def report_dir(self) -> Path:
        """Where the reports go, relative to the project root."""
        if self.gpu.count == 1:
            return Path("reports", "single_gpu", self.name)
        return Path("reports", "multi_gpu", f"{self.gpu.count}gpu", re.sub(r"x\d+$", "", self.name))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the resolved parameters: equal when every value is equal."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def resolved(self) -> dict:
        """All sections and values as plain dicts, lists and numbers (a copy)."""
        return {"gpu": asdict(self.gpu), "study": asdict(self.study), **copy.deepcopy(self.notebooks)}

    def for_notebook(self, stem: str) -> dict:
        """The flat values that papermill puts into notebook `stem`; the GPU alone when it has no section."""
        return {"gpu": self.name, **copy.deepcopy(self.notebooks.get(stem, {}))}


class KeyDoc(typing.NamedTuple):
    """One line of the documentation of the parameters."""

    path: str
    type: str
    allowed: str
    default: object
    help: str


def find_folder() -> Path:
    """The params/ folder of the project around the working directory, else the one beside this package.

    Raises UserError when there is none.
    """
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (root / "params" / "base.yaml").is_file():
            return root / "params"
    raise UserError("There is no params/base.yaml here: run from the folder that the project was cloned into.")


def choices(folder: Path | None = None) -> list[str]:
    """The names that `load` accepts: the YAML files of `folder` without base.yaml, x2 before x8."""
    names = [p.stem for p in Path(folder or find_folder()).glob("*.yaml") if p.stem != "base"]
    return sorted(names, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])


def load(gpu: str, folder: Path | None = None) -> Params:
    """The parameters of configuration `gpu`: base.yaml with the values of <gpu>.yaml put over it.

    Mappings are merged, lists are replaced. Raises UserError, naming the file, the key, the value and what is
    allowed, when anything is unknown, missing, of the wrong type or out of range.
    """
    folder = Path(folder) if folder else find_folder()
    names = choices(folder)
    if gpu not in names:
        raise UserError(f"GPU={gpu} is not known{_did_you_mean(gpu, names)}; choose one of: {', '.join(names)}.")
    base_file, own_file = folder / "base.yaml", folder / f"{gpu}.yaml"
    base = _checked(_read(base_file), _SCHEMA, base_file)
    own = _checked(_read(own_file), _SCHEMA, own_file)
    values = _merged(base, own)
    _check_complete(values, _SCHEMA, base_file, own_file)
    params = _build(gpu, values)
    _check_together(params, own, base_file, own_file)
    return params


def describe(folder: Path | None = None) -> list[KeyDoc]:
    """(key path, type, allowed, default, help) of every parameter; the default is base.yaml's value.

    A key that base.yaml leaves to the GPU files has the default "per GPU".
    """
    base_file = Path(folder or find_folder()) / "base.yaml"
    base = _checked(_read(base_file), _SCHEMA, base_file)

    def walk(schema, values, path):
        for name, key in schema.items():
            if isinstance(key, dict):
                yield from walk(key, values.get(name, {}), f"{path}{name}.")
            else:
                yield KeyDoc(path + name, key.type_name, key.allowed, values.get(name, "per GPU"), key.help)

    return list(walk(_SCHEMA, base, ""))


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
    if force or (_fits(params.gpu.match, detected_name) and enough):
        return
    wanted = {"cpu": "no CUDA device", "any": "any device"}.get(
        params.gpu.match,
        f"{params.gpu.count} CUDA device{'s' * (params.gpu.count > 1)} named {params.gpu.match}",
    )
    found = "no CUDA device" if detected_name == "cpu" else detected_name
    if detected_name != "cpu" and detected_count is not None:
        found = f"{detected_count} × {found}"
    fitting = [n for n in _fitting(detected_name, detected_count) if n != params.name]
    use = f"use GPU={' or GPU='.join(fitting)}, or set" if fitting else "add a params file for it, or set"
    raise UserError(f"GPU={params.name} is for {wanted} but this machine has {found}: {use} FORCE=1 to go on anyway.")


def _fits(match: str, name: str) -> bool:
    if match == "any":
        return True
    if match == "cpu" or name == "cpu":
        return match == name
    return re.search(rf"(?<![a-z0-9]){re.escape(match)}(?![a-z0-9])", name, re.IGNORECASE) is not None


def _fitting(name: str, count: int | None) -> list[str]:
    """Configurations of the project that fit the detected device, for the hint of `check_gpu`."""
    try:
        loaded = [load(n) for n in choices()]
    except UserError:  # a broken neighbour file must not hide the message this hint is for
        return []
    fitting = [p for p in loaded if p.gpu.match != "any" and _fits(p.gpu.match, name)]
    return [p.name for p in fitting if name == "cpu" or p.gpu.count <= (count or 1)]


def _schema(section) -> dict:
    """The keys of a section's dataclass, nested sections as nested dicts."""
    hints = typing.get_type_hints(section)
    return {
        f.name: _schema(hints[f.name])
        if is_dataclass(hints[f.name])
        else Key(hints[f.name], f.metadata["help"], **f.metadata["limits"])
        for f in fields(section)
    }


_SCHEMA = {"gpu": _schema(GpuParams), "study": _schema(StudyParams), **NOTEBOOKS}


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this loader refuses them."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} stands there twice", key_node.start_mark
                )
            seen.add(name if isinstance(name, str) else None)
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise UserError(f"{_name(file)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{_name(file)} is not UTF-8 text: save it as UTF-8.") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: an impossible date, for instance
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{_name(file)}{line} is not valid YAML: {what}; correct that line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{_name(file)} holds {_shown(values)} where sections are allowed: {', '.join(_SCHEMA)}.")
    return values


def _checked(values: dict, schema: dict, file: Path, path: str = "") -> dict:
    """`values` with every key known and every value of its type and in range; numbers become int or float."""
    checked = {}
    for name, value in values.items():
        if name not in schema:
            raise UserError(f"{_name(file)}: {_unknown(name, schema, path)}")
        key = schema[name]
        if not isinstance(key, dict):
            checked[name] = _checked_value(value, key, f"{_name(file)}: {path}{name}")
        elif isinstance(value, dict) or value is None:  # a section whose lines are all commented out is None
            checked[name] = _checked(value or {}, key, file, f"{path}{name}.")
        else:
            raise UserError(
                f"{_name(file)}: {path}{name} is {_shown(value)}; allowed is a section with {', '.join(key)}."
            )
    return checked


def _unknown(name, schema: dict, path: str) -> str:
    what = f"{path}{name} is not a known {'key' if path else 'section'}"
    for section, keys in _SCHEMA.items():
        if schema is not keys and name in keys:
            return f"{what}; it belongs into the section {section}."
    return f"{what}{_did_you_mean(name, schema)}; allowed here: {', '.join(schema)}."


def _checked_value(value, key: Key, where: str):
    if value is None and key.optional:
        return None
    if not key.many:
        return _checked_item(value, key, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {_shown(value)}; allowed is {key.allowed}.")
    items = [_checked_item(v, key, f"{where}[{i}]") for i, v in enumerate(value)]
    for i, item in enumerate(items):
        if item in items[:i]:
            raise UserError(f"{where}[{i}] repeats {_shown(item)}; allowed is {key.allowed}.")
    return items


def _checked_item(value, key: Key, where: str):
    right_type = {
        bool: isinstance(value, bool),
        str: isinstance(value, str) and bool(value.strip()),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf,
    }[key.item]
    in_range = right_type and (
        (not key.choices or value in key.choices)
        and (key.low is None or value >= key.low)
        and (key.high is None or value <= key.high)
        and (not key.multiple_of or value % key.multiple_of == 0)
    )
    if not in_range:
        raise UserError(f"{where} is {_shown(value)}; allowed is {key.allowed}{_yaml_trap(value, key)}.")
    return float(value) if key.item is float else value


def _yaml_trap(value, key: Key) -> str:
    """Why a value that looks right in the file arrived as something else, or nothing."""
    if isinstance(value, str) and key.item in (int, float):
        try:
            number = float(value)
        except ValueError:
            return _did_you_mean(value, key.choices)
        if "e" in value.lower() and math.isfinite(number):
            mantissa, exponent = value.lower().split("e")
            return f" (YAML reads {value} as text: write {float(mantissa)}e{int(exponent):+d})"
        return " (it is text: take the quotes away)"
    if isinstance(value, bool) and key.item is str:
        return " (YAML reads on, off, yes and no as true or false: put quotes around it)"
    if isinstance(value, int | float | dict) and key.item is str:
        return " (put quotes around it to make it text)"
    return _did_you_mean(value, key.choices) if isinstance(value, str) else ""


def _check_complete(values: dict, schema: dict, base_file: Path, own_file: Path, path: str = "") -> None:
    for name, key in schema.items():
        if isinstance(key, dict):
            _check_complete(values.get(name, {}), key, base_file, own_file, f"{path}{name}.")
        elif name not in values:
            files = f"{_name(base_file)} and {_name(own_file)}"
            raise UserError(f"{path}{name} is missing in {files}; allowed is {key.allowed} ({key.help}).")


def _check_together(params: Params, own: dict, base_file: Path, own_file: Path) -> None:
    """What no single value can show: values that contradict each other."""

    def where(section: str, name: str) -> str:
        return f"{_name(own_file if name in own.get(section, {}) else base_file)}: {section}.{name}"

    suffix = re.search(r"x(\d+)$", params.name)
    if suffix and int(suffix[1]) != params.gpu.count:
        raise UserError(
            f"{where('gpu', 'count')} is {params.gpu.count}; allowed is {suffix[1]}, as the file's name says."
        )
    cache = params.notebooks["05_first_block_cache"]
    for threshold in cache["grid_thresholds"]:
        if threshold not in cache["thresholds"]:
            raise UserError(
                f"{where('05_first_block_cache', 'grid_thresholds')} has {threshold:g}; allowed are values"
                f" of thresholds: {', '.join(f'{t:g}' for t in cache['thresholds'])}."
            )
    for steps in cache["fewer_steps"]:
        if steps >= params.study.steps:
            raise UserError(
                f"{where('05_first_block_cache', 'fewer_steps')} has {steps}; allowed are whole numbers"
                f" below study.steps, which is {params.study.steps}."
            )


def _build(name: str, values: dict) -> Params:
    study = dict(values["study"], full_size=FullSize(**values["study"]["full_size"]))
    notebooks = {stem: values[stem] for stem in NOTEBOOKS}
    return Params(name, GpuParams(**values["gpu"]), StudyParams(**study), notebooks)


def _merged(base: dict, own: dict) -> dict:
    both = {k: _merged(base[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **own, **both}


def _did_you_mean(name, known) -> str:
    close = difflib.get_close_matches(str(name).lower(), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value) -> str:
    """A value as short text; text in quotes, null and true as YAML writes them."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError):  # a list that holds itself, a key that is a date
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
