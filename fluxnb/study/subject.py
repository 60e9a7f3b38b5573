"""What is run: a model with this study's prompts, seeds and size, and the same once it is loaded."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fluxnb.cache import planning, teacache
from fluxnb.measure import latency
from fluxnb.models import control, embedded, material, pipelines, time_only
from fluxnb.models.use_cases import IP_ADAPTER, TIME_ONLY
from fluxnb.params.schema import StudyParams
from fluxnb.study.results import canonical
from fluxnb.technique import Technique, attribute
from fluxnb.world import probe, scenes

Input = tuple[str, int]  # prompt, seed


@dataclass(frozen=True)
class Subject:
    """A model as this study uses it. It holds no weights: `load` gives it with them."""

    model: pipelines.Model
    dtype: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float
    width: int
    height: int
    rounds: int
    built: tuple[Technique, ...] = ()  # what its pipeline has from the moment it is loaded
    use_case: str = "txt2img"  # a key of pipelines.USE_CASES
    kind: str = "edges"  # of a ControlNet's condition
    strength: float = 0.8  # of image-to-image and inpainting
    controlnet: str | None = None  # a hub id or folder instead of the one that belongs to the model
    shown: tuple[str, ...] = ()  # prompts for grids: in no mean
    clip: str | None = None  # a hub id or folder of what judges how images fit their prompts

    def having(self, *techniques: Technique, dtype: str | None = None) -> Subject:
        """The same model in a pipeline of its own, with techniques built in, or in another number format."""
        return replace(self, built=(*self.built, *techniques), dtype=dtype or self.dtype)

    def for_use_case(self, use_case: str, kind: str = "edges", strength: float = 0.8) -> Subject:
        """The same weights in the pipeline of another use case."""
        return replace(self, use_case=use_case, kind=kind, strength=strength)

    def able(self, use_cases: list[str]) -> list[str]:
        """Those of some use cases that the model can be used for."""
        return [case for case in use_cases if not pipelines.lacks(self.model.name, case)]

    def for_time(self, use_case: str) -> Subject:
        """The same weights in a use case that they weren't trained for: images mean nothing, as of random ones."""
        return replace(self, use_case=use_case, model=replace(self.model, weights="random"), rounds=min(3, self.rounds))

    def part(self, prompts: int, rounds: int | None = None) -> Subject:
        """The same with the first few prompts and the first seed, and fewer rounds: for wide surveys."""
        return replace(self, prompts=self.prompts[:prompts], seeds=self.seeds[:1], rounds=rounds or self.rounds)

    @property
    def showing(self) -> Subject:
        """The same with the prompts that grids show, and the first seed: these images are judged by eye alone."""
        return replace(self, prompts=self.shown or self.prompts, seeds=self.seeds[:1])

    def runs(self, steps: int) -> int:
        """How many of `steps` are run: fewer where an image is the start."""
        return pipelines.steps_run(self.use_case, steps, self.strength)

    @property
    def checked(self) -> bool:
        """Whether prompt adherence can be read off the images: the probe knows one world at one size."""
        return self.model.checked and (self.width, self.height) == (self.model.width, self.model.height)

    @property
    def inputs(self) -> list[Input]:
        """Every prompt with every seed, the first seed's first."""
        return [(prompt, seed) for seed in self.seeds for prompt in self.prompts]

    @property
    def pipeline(self) -> str:
        """What tells its pipeline from others: two subjects of one pipeline share what is loaded."""
        controlnet = self.controlnet if pipelines.takes_condition(self.use_case) else None
        techniques = [[t.name, t.settings] for t in self.built]
        return canonical({"of": [self.model.name, self.dtype, self.use_case, controlnet, techniques]})

    @property
    def said(self) -> dict:
        """What a row's settings say of it; of a ControlNet's condition only where it isn't the usual one."""
        other = pipelines.takes_condition(self.use_case) and self.kind != "edges"
        return {"dtype": self.dtype, "inputs": self.digest} | ({"condition": self.kind} if other else {})

    @property
    def shares(self) -> bool:
        """Whether it can have its weights of a text-to-image pipeline that is in use: an IP-Adapter changes them."""
        return not self.built and self.use_case != IP_ADAPTER

    @property
    def digest(self) -> str:
        """Changes when prompts, seeds, guidance, weights, what the use case starts from or a CLIP that judges do."""
        determines = [self.prompts, self.seeds, self.guidance, fingerprint(self.model.name)]
        determines += [self.model.tokens] if self.model.own else []
        if pipelines.takes_condition(self.use_case):
            own = control.FOLDER if self.model.name == embedded.NAME else self.model.name
            determines += [self.kind, fingerprint(str(self.controlnet or own))]
        if pipelines.takes_image(self.use_case):
            determines.append(self.strength)
        if self.clip:
            determines.append(fingerprint(self.clip))
        return hashlib.sha256(json.dumps(determines).encode()).hexdigest()[:8]

    def material(self, prompt: str, seed: int) -> material.Material:
        """What the use case starts from: image, mask, conditions."""
        return _material(prompt, seed, self.width, self.height)

    def load(self, base=None) -> Loaded:
        """The subject with its pipeline, ready to run.

        Args:
            base: a loaded text-to-image pipeline of the same weights that it may share.

        Raises Unavailable if one of `built` can't run here.
        """
        started = time.perf_counter()
        pipe = base or pipelines.load(self.model.name, self.dtype)
        if self.use_case in TIME_ONLY:
            pipe = time_only.made(pipe, self.use_case)
        elif self.use_case != "txt2img":
            pipe = pipelines.as_use_case(pipe, self.use_case, self._load_controlnet())
        for technique in self.built:
            technique.apply(pipe)
        latency.synchronize()
        return Loaded(self, pipe, time.perf_counter() - started, weights_gib(pipe))

    def _load_controlnet(self):
        if not pipelines.takes_condition(self.use_case):
            return None
        return pipelines.load_controlnet(self.model.name, self.dtype, source=self.controlnet)


def given(model: pipelines.Model, dtype: str, study: StudyParams) -> Subject:
    """A model with the prompts, seeds and size that a configuration has for models like it."""
    full, small = study.full_size, model.small
    size = model if model.judged else full
    prompts = study.prompts or []
    return Subject(
        model=model,
        dtype=dtype,
        prompts=tuple(prompts[: full.judged] if model.own else prompts if model.judged else scenes.PROMPTS),
        seeds=tuple(study.seeds[:1] if model.own else study.seeds),
        guidance=study.guidance_scale if model.guided else 0.0,
        width=(study.width if small else None) or size.width,
        height=(study.height if small else None) or size.height,
        rounds=study.rounds if small else full.rounds,
        shown=tuple(study.shown or ()),
        clip=study.clip,
    )


@dataclass(frozen=True)
class Loaded:
    """A subject with its pipeline."""

    subject: Subject
    pipe: Any  # of diffusers
    load_s: float
    load_gib: float  # memory of its weights

    @property
    def inputs(self) -> list[Input]:
        """The subject's."""
        return self.subject.inputs

    def generate(self, prompt: str, seed: int, steps: int) -> Image.Image:
        """One image."""
        return self.batch([(prompt, seed)], steps)[0]

    def batch(self, inputs: list[Input], steps: int, output_type: str = "pil") -> Any:
        """One image for each prompt and seed, made at once; or their latents, (n, tokens, channels), with "latent"."""
        own = self.subject
        prompts, seeds = map(list, zip(*inputs, strict=True))
        if own.use_case in TIME_ONLY:
            return self._for_time(prompts, seeds, steps)
        return pipelines.generate(
            self.pipe,
            prompts,
            seeds,
            model=own.model,
            steps=steps,
            guidance=own.guidance,
            width=own.width,
            height=own.height,
            output_type=output_type,
            **self._start(inputs),
        )

    def _for_time(self, prompts: list[str], seeds: list[int], steps: int) -> list[Image.Image]:
        own, found = self.subject, [self.subject.material(*given) for given in zip(prompts, seeds, strict=True)]
        images, masks = [m.image for m in found], [m.mask for m in found]
        return self.pipe(
            width=own.width, height=own.height, num_inference_steps=steps, guidance_scale=own.guidance,
            max_sequence_length=own.model.tokens,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **time_only.given(self.pipe, own.use_case, prompts, own.model.tokens, images, masks),
        ).images  # fmt: skip

    def _start(self, inputs: list[Input]) -> dict:
        own = self.subject
        if own.use_case == "txt2img":
            return {}
        found = [own.material(prompt, seed) for prompt, seed in inputs]
        return {
            "image": [m.image for m in found],
            "mask": [m.mask for m in found],
            "condition": [m.condition(own.kind) for m in found],
            "kind": own.kind,
            "strength": own.strength,
        }

    def transformer_inputs(self, batch: int) -> dict:
        """What the pipeline gives its transformer at the first of two steps, as keyword arguments."""
        transformer = self.pipe.transformer
        original, given = transformer.forward, dict[str, Any]()

        def note(*args, **kwargs):
            assert not args, "diffusers' FLUX pipelines name every argument"
            given.update({} if given else kwargs)
            return original(**kwargs)

        with attribute(transformer, "forward", note):
            self.batch(list(itertools.islice(itertools.cycle(self.inputs), batch)), 2)
        return given


@functools.lru_cache(maxsize=64)
def _material(prompt: str, seed: int, width: int, height: int) -> material.Material:
    return material.of(prompt, seed, width, height)


def fingerprint(name: str) -> str:
    """What identifies a model: a digest of the files of a folder, the hub's revision, the name of anything else."""
    folder = embedded.FOLDERS.get(name) or Path(os.path.expanduser(name))
    if not folder.is_dir():
        return name + _revision(name)
    if name not in embedded.FOLDERS:  # how a model is put together counts as much; what the study fits to it doesn't
        # a part may be a link to another folder
        folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")]
        files = sorted(path for place in folders for path in place.iterdir() if path.is_file() and path.name[0] != ".")
        fitted = (teacache.FILE, planning.FILE)
        files = [path for path in files if path.suffix not in _ASIDE and path.name not in fitted]
        return _digest_of(_states(files, [path.relative_to(folder).as_posix() for path in files]))
    whole = sorted(embedded.FOLDER.rglob("*.safetensors"))
    shared = [path for path in whole if not (folder / path.relative_to(embedded.FOLDER)).is_file()]
    # the probe's weights say what is in its images
    weights = _digest_of(_states([probe.FOLDER / probe.FILE, *sorted(folder.rglob("*.safetensors")), *shared]))
    parts = {p.relative_to(of).as_posix(): p for of in (embedded.FOLDER, folder) for p in of.glob("*/*.json")}
    settings = _digest_of(_states([parts[name] for name in sorted(parts)], sorted(parts)))
    return weights if settings == _SETTINGS.get(name) else _digest_text(weights + settings)


_ASIDE = (".md", ".png", ".jpg", ".jpeg", ".webp")  # files of a model that decide nothing
_WHOLE = 2**28  # bytes of a file that is read as a whole
# of the shipped models' settings and tokenizers, as their rows were measured with: others give another fingerprint
_SETTINGS = {embedded.NAME: "304405bb267fffc0", embedded.SCHNELL: "7d148b258ce37136"}


def _revision(name: str) -> str:
    """The commit of a hub's model that is on this machine, as "@" and its digits; "" for anything else."""
    import huggingface_hub

    if name.count("/") != 1:
        return ""
    for file in ("transformer/config.json", "config.json", "model_index.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return f"@{found.split('snapshots/')[-1].split('/')[0][:12]}"
    return ""


def _states(files: list[Path], called: list[str] | None = None) -> tuple:
    """What a digest of files is kept under: their paths, what they are called in it, and how they were changed last."""
    called = called or [path.name for path in files]
    states = [path.stat() for path in files]
    return tuple(
        (str(path), name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
        for path, name, state in zip(files, called, states, strict=True)
    )


@functools.lru_cache(maxsize=16)
def _digest_of(files: tuple[tuple, ...]) -> str:
    digest = hashlib.sha256()
    for path, called, size, *_ in files:
        digest.update(called.encode())
        with open(path, "rb") as file:
            if size < _WHOLE:
                digest.update(file.read())
                continue
            digest.update(str(size).encode())
            for place, count in _samples(file, size):  # reading 34 GB takes minutes
                file.seek(place)
                digest.update(file.read(count))
    return digest.hexdigest()[:16]


def _samples(file, size: int) -> list[tuple[int, int]]:
    """(place, bytes) of a large file: the header of safetensors and a part of every tensor; else 64 parts of it."""
    evenly = [(place, 2**16) for place in range(0, size, size // 64)]
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length) if length < 2**26 else "")
        offsets = [tensor["data_offsets"] for key, tensor in header.items() if key != "__metadata__"]
        starts = [(8 + length + start + part, 2**12) for start, end in offsets for part in (0, (end - start) // 2)]
        return [(0, 8 + length), *starts, *evenly]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return evenly


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_gib(pipe) -> float:
    """Memory of a pipeline's weights in GiB."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(t): t for part in parts for t in itertools.chain(part.parameters(), part.buffers())}
    return sum(map(_bytes, tensors.values())) / latency.GIB


def _bytes(tensor: torch.Tensor) -> int:
    """What a tensor holds in memory; a quantized one holds it in the tensors that it is made of."""
    if hasattr(tensor, "to_local"):  # a share of a tensor that is divided over ranks
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
