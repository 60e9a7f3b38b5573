"""Which parameters there are: one dataclass per fixed section, one block of `NOTEBOOKS` per notebook.

The values stand in params/*.yaml only, so a default is written in one place; what names a technique, a stack or a use
case is taken from those who define it.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass

from fluxnb import notebooks as nb
from fluxnb import stacks
from fluxnb.families import PREDICTORS
from fluxnb.models.use_cases import CONDITIONS, NUMBER_FORMATS, TIME_ONLY, USE_CASES
from fluxnb.techniques import kinds, peers


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
    def item(self) -> typing.Any:
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


@dataclass(frozen=True)
class FullSize:
    """How models of FLUX's real size are measured: random weights for time and memory only; yours, made as they say."""

    steps: int = _key("denoising steps of one image of random weights", low=1, high=200)
    width: int = _key("image width in pixels, of random weights", low=64, high=4096, multiple_of=16)
    height: int = _key("image height in pixels, of random weights", low=64, high=4096, multiple_of=16)
    rounds: int = _key("interleaved rounds of one comparison", low=3, high=1000)
    judged: int = _key("how many prompts judge the images of weights of yours, with the first seed", low=1, high=1000)
    own: bool = _key("whether weights of yours get compiled stacks too, which take minutes on a CPU")


@dataclass(frozen=True)
class StudyParams:
    """What every notebook has in common."""

    models: list[str] = _key("models by name: embedded, flux-dev-random, a hub id or a local folder")
    distilled: list[str] | None = _key("four-step models: embedded-schnell, flux-schnell-random; null = none")
    prompts: list[str] | None = _key("prompts of yours; null = kept out of the embedded model's training")
    judged: int = _key("how many of them judge images: every mean is over these", low=1, high=500)
    shown: list[str] | None = _key("prompts shown in every grid and counted in no mean; null = the documents' own")
    clip: str | None = _key("a CLIP that judges how images fit their prompts: a hub id or a local folder; null = none")
    seeds: list[int] = _key("seeds; each prompt is drawn once with each of them", low=0, high=2**32 - 1)
    steps: int = _key("denoising steps of one image", low=1, high=200)
    guidance_scale: float = _key("guidance of FLUX.1-dev", low=0, high=30)
    width: int | None = _key("image width in pixels; null = the model's own", low=64, high=4096, multiple_of=16)
    height: int | None = _key("image height in pixels; null = the model's own", low=64, high=4096, multiple_of=16)
    rounds: int = _key("interleaved rounds of one comparison", low=3, high=1000)
    group: int = _key("candidates that share one baseline in a round", low=1, high=100)
    warmup: int = _key("most images made to warm up before a measurement", low=1, high=100)
    full_size: FullSize = _key("how models of FLUX's real size are measured")


_TORCHAO, _USE_CASES, _KERNELS = tuple(kinds.TORCHAO), tuple(USE_CASES), tuple(kinds.ATTENTION)
_COMPILED, _WAYS, _DIVIDED = tuple(stacks.COMPILED), tuple(stacks.WAYS), tuple(stacks.DIVIDED)

NOTEBOOKS: dict[str, dict[str, Key]] = {
    nb.ENVIRONMENT: {
        "matmul_size": Key(int, "side of the square matrices of the speed ceiling", low=256, high=16384),
        "repeats": Key(int, "how often each ceiling is measured", low=1, high=1000),
    },
    nb.NUMBER_FORMATS: {
        "dtypes": Key(list[str], "number formats compared", choices=NUMBER_FORMATS),
        "full_size_steps": Key(
            int, "steps at which full-size models compare number formats: 28 in FP32 take long", low=1, high=200
        ),
        "patience": Key(float, "seconds until a format's first image, after which it is given up", low=5, high=86400),
    },
    nb.ATTENTION: {
        "tokens": Key(int, "tokens of the kernels' own test; 4608 is FLUX at 1024²", low=64, high=65536),
        "repeats": Key(int, "how often each kernel is timed", low=1, high=1000),
        "steps": Key(int, "steps of an image of the embedded model", low=1, high=200),
        "full_size_steps": Key(int, "steps of an image at full size", low=2, high=200),
        "float16_kinds": Key(
            list[str] | None, "kernels in FP16, over all steps, at full size; null = none", choices=_KERNELS
        ),
    },
    nb.COMPILATION: {
        "variants": Key(list[str], "what is compiled how", choices=_COMPILED),
        "full_size_steps": Key(int, "steps of an image at full size", low=2, high=200),
        "few_step_variants": Key(
            list[str] | None, "what of four-step models is compiled how; null = nothing", choices=_COMPILED
        ),
        "patience": Key(float, "seconds until a variant's first image, after which it is given up", low=10, high=86400),
        "prompts": Key(int, "prompts of the embedded model that quality is judged on", low=1, high=100),
        "quantized": Key(list[str], "torchao kinds compiled too, full size", choices=_TORCHAO),
        "quantized_variants": Key(list[str], "what of these is compiled how", choices=_COMPILED),
    },
    nb.QUANTIZATION: {
        "steps": Key(int, "steps of an image of the embedded model", low=1, high=200),
        "prompts": Key(int, "prompts that quality is judged on", low=1, high=100),
        "full_size_steps": Key(int, "steps of an image at full size", low=2, high=200),
        "compiled": Key(list[str], "torchao kinds that are also measured compiled, full size", choices=_TORCHAO),
        "batches": Key(list[int], "batch sizes of the scaling", low=1, high=64),
        "batch_steps": Key(int, "steps of the images of the batches, of random weights", low=1, high=200),
        "batch_kinds": Key(
            list[str], "kinds whose batches are measured, at full size compiled", choices=(*_TORCHAO, kinds.SPARSE_INT8)
        ),
        "few_step_kinds": Key(list[str], "torchao kinds of four-step models, compiled at full size", choices=_TORCHAO),
    },
    nb.FIRST_BLOCK: {
        "thresholds": Key(list[float], "thresholds of the first block's relative change", low=0),
        "intervals": Key(list[int], "fixed intervals of the control: compute every n-th step", low=1, high=50),
        "fewer_steps": Key(
            list[int], "step counts of the fewer-steps control, each below study.steps", low=1, high=199
        ),
        "grid_thresholds": Key(list[float], "thresholds shown in the image grid, each also in thresholds", low=0),
        "package_thresholds": Key(list[float], "thresholds of ParaAttention's own, those of ours among them", low=0),
        "few_steps_thresholds": Key(list[float], "thresholds of a model of four steps", low=0),
        "inferences": Key(list[float], "thresholds that a first and a second image are made at", low=0),
        "compiled_thresholds": Key(list[float] | None, "thresholds over compiled blocks; null = none", low=0),
    },
    nb.TEACACHE: {
        "thresholds": Key(list[float], "thresholds of the accumulated change", low=0),
        "intervals": Key(list[int], "fixed intervals of the control: compute every n-th step", low=1, high=50),
        "warm_up": Key(int, "steps computed first, of the strategies that have it", low=0, high=50),
        "fewer_steps": Key(list[int], "step counts of the fewer-steps control", low=1, high=199),
        "fit_images": Key(int, "images whose trajectories the polynomial is fitted to", low=1, high=100),
        "mag_thresholds": Key(list[float], "thresholds of MagCache's foretold error", low=0),
        "few_steps_thresholds": Key(list[float], "thresholds of a model of four steps", low=0),
        "compiled_thresholds": Key(list[float] | None, "thresholds over compiled blocks; null = none", low=0),
    },
    nb.COMBINED: {
        "tea_thresholds": Key(list[float], "TeaCache thresholds of the grid", low=0),
        "first_block_thresholds": Key(list[float], "First Block Cache thresholds of the grid", low=0),
        "sea_thresholds": Key(list[float], "SeaCache thresholds of the grid", low=0),
        "di_thresholds": Key(list[float], "DiCache thresholds of the grid", low=0),
        "computed": Key(list[int], "computed steps of the grid's evenly spread masks", low=1, high=199),
        "predictors": Key(list[str], "how what is reused is made, each with every gate", choices=PREDICTORS),
        "warm_up": Key(int, "steps computed before anything is reused", low=0, high=50),
        "survey_prompts": Key(int, "prompts that every setting of the grid is judged on", low=1, high=100),
        "timed": Key(int, "undominated settings of the grid that are timed", low=2, high=100),
        "intervals": Key(list[int], "fixed intervals of the control: compute every n-th step", low=1, high=50),
        "fewer_steps": Key(list[int], "step counts of the fewer-steps controls", low=1, high=199),
        "batches": Key(list[int], "batch sizes whose one decision is compared", low=1, high=64),
        "few_step_tea": Key(list[float], "TeaCache thresholds of a model of four steps, alone and combined", low=0),
        "few_step_first_block": Key(list[float], "First Block Cache thresholds of a model of four steps", low=0),
        "attention": Key(str | None, "an attention kernel below either cache; null = none", choices=_KERNELS),
        "quantization": Key(str | None, "a torchao kind below either cache; null = none", choices=_TORCHAO),
        "full_size_steps": Key(int, "steps at which the engine's cost is measured at full size", low=2, high=200),
    },
    nb.QUANTIZED_CACHE: {
        "thresholds": Key(list[float], "thresholds of the published experiment", low=0),
        "prompts": Key(int, "prompts that quality is judged on", low=1, high=100),
        "rank": Key(int, "rank of SVDQuant's 16-bit part", low=1, high=128),
        "full_size_steps": Key(int, "steps of an image with a 4-bit transformer at full size", low=2, high=200),
    },
    nb.VAE: {
        "sides": Key(list[int], "pixels per side of the decoded images", low=64, high=4096, multiple_of=16),
        "options": Key(
            list[str],
            "what is done to the VAE and what follows it",
            choices=tuple(kinds.VAE),
        ),
        "tiles": Key(list[int], "pixels per side of a tile", low=32, high=2048, multiple_of=16),
        "batch": Key(int, "images decoded at once, for slices", low=2, high=64),
        "repeats": Key(int, "how often each decoding is timed", low=1, high=1000),
        "steps": Key(int, "steps of the images that options are judged on", low=1, high=200),
    },
    nb.USE_CASES: {
        "use_cases": Key(list[str], "use cases, each a pipeline of diffusers", choices=_USE_CASES),
        "full_size_use_cases": Key(list[str], "use cases measured at full size", choices=_USE_CASES),
        "conditions": Key(list[str], "what a ControlNet is given; of random weights the first", choices=CONDITIONS),
        "strength": Key(float, "share of the steps run where a picture is the start", low=0.05, high=1),
        "threshold": Key(float, "threshold of both caches: the balanced preset", low=0),
        "few_steps_threshold": Key(float, "threshold of both caches on a model of four steps", low=0),
        "attention": Key(str | None, "an attention kernel beside the caches; null = none", choices=_KERNELS),
        "quantizations": Key(
            list[str] | None, "torchao kinds, the first also under the schedule; null = no stacks", choices=_TORCHAO
        ),
        "compiled": Key(bool, "whether these stacks are compiled, which takes minutes on a CPU"),
        "computed": Key(int, "steps that the schedule computes", low=1, high=200),
        "prompts": Key(int, "prompts that quality is judged on", low=1, high=100),
        "formats": Key(
            list[str] | None,
            "number formats of the plain pipeline, in every use case; null = none",
            choices=NUMBER_FORMATS,
        ),
        "full_size_formats_steps": Key(int, "steps of an image in these at full size", low=1, high=200),
        "time_only": Key(
            list[str] | None,
            "use cases that are timed only: no model is trained for them; null = none",
            choices=tuple(TIME_ONLY),
        ),
        "time_only_steps": Key(int, "steps of an image in these", low=2, high=200),
    },
    nb.PARALLEL: {
        "ranks": Key(int | None, "processes that share an image; null = gpu.count", low=2, high=64),
        "ways": Key(list[str], "how it is divided", choices=_WAYS),
        "full_size_ways": Key(list[str] | None, "how it is divided at full size; null = as `ways`", choices=_WAYS),
        "stacks": Key(list[str], "with what else the ways are measured at full size", choices=_DIVIDED),
        "quantization": Key(str, "the torchao kind of the fastest stack, full size", choices=_TORCHAO),
        "computed": Key(int, "steps that the schedule computes at full size", low=1, high=200),
        "steps": Key(int, "steps of an image of the embedded model", low=2, high=200),
        "prompts": Key(int, "prompts of the embedded model", low=1, high=100),
        "silence": Key(float, "seconds without a result after which ranks are ended", low=10, high=3600),
    },
    nb.LOAD: {
        "users": Key(list[int], "people who ask at the same time", low=1, high=1000),
        "images": Key(list[int], "images of one request", low=1, high=64),
        "requests": Key(int, "requests of one load, warm-up not counted", low=4, high=100000),
        "arrivals": Key(list[float], "rates of random arrivals, as shares of what all GPUs can make", low=0.05, high=2),
        "batch": Key(int, "waiting requests that are made together; 1 = none", low=1, high=64),
        "use_cases": Key(list[str], "use cases that are served", choices=_USE_CASES),
        "steps": Key(int, "denoising steps of one image of the embedded model", low=1, high=200),
        "full_size_users": Key(list[int], "people who ask at the same time, at full size", low=1, high=1000),
        "full_size_images": Key(list[int], "images of one request at full size", low=1, high=64),
        "full_size_use_cases": Key(list[str], "use cases that are served at full size", choices=_USE_CASES),
        "full_size_requests": Key(int, "requests of one load at full size", low=4, high=100000),
        "full_size_arrivals": Key(list[float], "rates of random arrivals at full size", low=0.05, high=2),
        "soak": Key(
            float | None, "seconds that the recommended stack is run for; null = not at all", low=1, high=86400
        ),
    },
    nb.FINAL_STACK: {
        "quantization": Key(str, "the torchao kind of the stack", choices=_TORCHAO),
        "cache_steps": Key(
            list[int], "computed steps of the stack's caches; all stacks have the first", low=2, high=200
        ),
        "gentler": Key(
            list[str] | None, "lean stacks that get all of these caches; null = none", choices=tuple(stacks.LEAN)
        ),
        "planned_steps": Key(
            list[int] | None, "computed steps of planned caches, which plans are of; null = none", low=2, high=200
        ),
        "rounds": Key(int, "interleaved rounds of the shortlist: what is recommended rests on 10", low=3, high=1000),
        "shortlist": Key(list[str] | None, "stacks of the shortlist; null = none", choices=stacks.SHORTLIST),
        "few_steps": Key(bool, "whether four-step models have a shortlist of their own"),
        "few_step_shortlist": Key(
            list[str] | None, "stacks of the shortlist of four-step models; null = none", choices=stacks.SHORTLIST
        ),
        "fewer_steps": Key(list[int], "step counts of the control in the shortlist", low=1, high=199),
        "solver_steps": Key(list[int], "step counts of the second-order solver in the shortlist", low=1, high=199),
        "first_block_thresholds": Key(list[float], "First Block Cache in the shortlist, on trained weights", low=0),
        "tea_thresholds": Key(list[float], "TeaCache in the shortlist, on trained weights", low=0),
        "few_step_first_block": Key(list[float], "First Block Cache in that of four-step models", low=0),
        "few_step_tea": Key(list[float], "TeaCache in that of four-step models", low=0),
        "phases": Key(bool, "whether each phase and the plan's configurations are measured too: half an hour on a GPU"),
        "around": Key(list[str], "what is spared before and after the steps", choices=tuple(stacks.AROUND)),
    },
    nb.PEERS: {
        "computed": Key(list[int], "numbers of computed steps that methods are compared at", low=2, high=199),
        "methods": Key(list[str], "methods that compute as many steps as they are told", choices=tuple(peers.METHODS)),
        "shipped": Key(
            list[str] | None, "methods that decide for themselves; null = none", choices=tuple(peers.SETTINGS)
        ),
        "settings": Key(int, "settings of each of these, that of its authors first", low=1, high=20),
        "batch": Key(int, "images made at once by methods that don't look at them", low=1, high=64),
        "patience": Key(
            float, "seconds until a first image at full size, after which it is given up", low=10, high=86400
        ),
        "full_size_computed": Key(int, "computed steps at full size", low=2, high=199),
        "full_size_methods": Key(list[str], "methods timed at full size", choices=tuple(peers.METHODS)),
        "quantization": Key(str | None, "torchao kind at full size; null = none", choices=_TORCHAO),
    },
    nb.EMBEDDED: {
        "check_images": Key(int, "committed evaluation images that are recomputed", low=1, high=500),
    },
    nb.SURVIVAL: {
        "steps": Key(int, "denoising steps of an image", low=3, high=50),
        "cases": Key(list[str] | None, "what happens to a pipeline; null = everything"),
        "compiled": Key(list[str] | None, "what happens where something is compiled; null = everything"),
        "kernels": Key(list[str] | None, "of these what is compiled to kernels, not only counted; null = nothing"),
        "left_out": Key(list[str] | None, "techniques that aren't tried, by their labels; null = none"),
    },
}


def _schema(section) -> dict:
    """The keys of a section's dataclass, nested sections as nested dicts."""
    hints = typing.get_type_hints(section)
    return {
        f.name: _schema(hints[f.name])
        if is_dataclass(hints[f.name])
        else Key(hints[f.name], f.metadata["help"], **f.metadata["limits"])
        for f in fields(section)
    }


SCHEMA = {"gpu": _schema(GpuParams), "study": _schema(StudyParams), **NOTEBOOKS}


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
