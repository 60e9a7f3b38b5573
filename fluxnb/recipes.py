"""Recipes: what is recommended for a goal on a GPU, put on a pipeline in one call, or printed as a script.

    undo = accelerate(pipe, "near-lossless")    # the recipe of the GPU that the pipeline is on
    undo = accelerate(pipe, "h100/balanced")    # one by name
    # of few steps, as FLUX.1-schnell: h100/schnell/balanced, or a sentence; of FLUX.2: what fits, and a warning
    undo = accelerate(pipe, Regional(), Cache(FirstBlock(0.1)))    # techniques, which go on in the right order

`recipes.json` is made from the committed rows by `python -m fluxnb site`: a recipe is the stack of a row.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fluxnb import adapters, rebuilt, stacks
from fluxnb.errors import UserError
from fluxnb.models import facts
from fluxnb.technique import Technique, Unavailable, take_all_back
from fluxnb.techniques import kinds

FILE = Path(__file__).with_suffix(".json")
GOAL = "near-lossless"  # where none is given
SCHNELL, FEW = "schnell", "of few steps without guidance, as FLUX.1-schnell"  # in a recipe's name, and in words
OF = {False: "recipes", True: "few_steps"}  # what recipes are of -> where the file has them; True: of few steps


@dataclass(frozen=True)
class Recipe:
    """A recommended row: how to make its stack, for what it was measured, and what came out.

    Args:
        name: configuration and goal: h100/near-lossless; h100/schnell/near-lossless for models of few steps.
        goal: as a reader sees it, with its floor.
        stack: its name in `fluxnb.stacks`; its label where it has none.
        technique, settings: the row's, which the stack is made from.
        steps: asked of the pipeline, where `plain_steps` are asked of the plain one.
        load: the hub id of the model that it stands for; None for a folder.
        speed, quality: what came out, in words.
        rows: ids of the row, of its baseline and of the one that quality is from.
        guided: whether the models that it is for take guidance.
        pipeline: diffusers' class that loads them.
        family, parts: where they are of another family than those measured: its name, and those of `adapters.PARTS`.
    """

    name: str
    goal: str
    stack: str
    technique: str
    settings: dict
    steps: int
    plain_steps: int
    computed_steps: float
    model: str
    load: str | None
    width: int
    height: int
    tokens: int
    dtype: str
    machine: str
    cuda: bool
    speedup: float
    interval: list[float]
    n: int
    speed: str
    quality: str
    rows: list[str]
    guided: bool = True
    pipeline: str = facts.Facts.pipeline
    family: str = ""
    parts: frozenset[str] = frozenset(adapters.PARTS)

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """New ones, in the order in which they go on."""
        return tuple(part for part in self._measured if not part.part or part.part in self.parts)

    @property
    def _measured(self) -> tuple[Technique, ...]:
        made = rebuilt.stack(self.settings, self.technique, self.stack)
        if made is None:
            raise UserError(f"The recipe {self.name} can't be made by this version: run `python -m fluxnb site` again.")
        return made.techniques

    def on(self, adapter: adapters.Adapter | None) -> Recipe:
        """The same for models of another class of transformers: what of it they have something for."""
        if adapter is None or self.pipeline in adapter.pipelines:
            return self
        return replace(self, family=adapter.title, parts=adapter.parts)

    @property
    def elsewhere(self) -> str:
        """Of one that is for another family: what it lacks there, and that nothing was measured."""
        less = "".join(f", without {part.label}" for part in self._measured if part.part not in {"", *self.parts})
        return f"On {self.family}{less}, it wasn't measured: the figures are {adapters.FLUX1.title}'s."

    def asked(self, steps: int | None = None) -> int:
        """Steps to ask of the pipeline in place of `steps`: fewer, where fewer steps are what is recommended."""
        return self.steps if steps is None else max(1, round(steps * self.steps / self.plain_steps))

    def evidence(self, steps: int | None = None) -> list[str]:
        """What it rests on, and what of it wasn't measured at so many steps, in sentences."""
        random = " (random weights of its size)" if self.load not in (None, self.model) else ""
        asked = f"{self.plain_steps} steps{'' if self.guided else ' without guidance'}"
        of = f"`{self.model}`{random} at {self.width}×{self.height}, {asked}, on {self.machine}"
        computed = self.computed_steps or self.steps
        reused = f", {computed:.3g} of them computed" if computed < self.steps else ""
        lines = [f"{self.speed}.", f"Measured on {of}{reused}.", f"Quality: {self.quality}."]
        if steps not in (None, self.plain_steps):
            lines.append(f"{steps} steps weren't measured: the figures are of {self.plain_steps}.")
        lines += [f"Ask the pipeline for {self.asked(steps)} steps."] if self.steps != self.plain_steps else []
        lines += [self.elsewhere] if self.family else []
        return [*lines, f"Rows: {', '.join(self.rows)} (`python -m fluxnb rows ID`)."]


def find(goal: str = GOAL, pipe=None, few: bool = False, model=None) -> Recipe:
    """The recipe by name (h100/near-lossless), or for a goal on the GPU that a pipeline is on.

    For a pipeline of few steps without guidance it is one for such models (h100/schnell/near-lossless), or none.

    Args:
        few: without a pipeline, whether it is for such models, as the name may say, too.
        model: without a pipeline, what it is for (`fluxnb.models.facts.of`).

    Raises:
        UserError: there is none; which there are, and what to do.
    """
    place, _, key = goal.rpartition("/")
    named = place.split("/")[-1] == SCHNELL
    gpu = place.removesuffix(SCHNELL).removesuffix("/") if named else place
    few = few or named or (model is not None and model.few) if pipe is None else facts.loaded_takes_few(pipe)
    adapter = facts.adapter_of(pipe) if model is None else model.adapter
    goals = next(iter(known().values()))[OF[few]]
    if key not in goals:
        raise UserError(f"There is no goal {key!r}: choose one of {', '.join(goals)}.")
    if named and not few:
        raise UserError(
            f"{goal} is for models {FEW}, and this pipeline's is none: ask for {f'{gpu}/' * bool(gpu)}{key}."
        )
    name = f"{SCHNELL}/{key}" if few else key
    made = [f"{other}/{name}" for other, own in known().items() if not isinstance(own[OF[few]][key], str)]
    there = f"take one over by its name ({', '.join(made)}), or measure" if made else "measure"
    there += ": `make report MODEL=…`" if few else ": `make report`"
    of = f" for models {FEW}" if few else ""
    if not gpu and pipe is None:
        raise UserError(
            f"Without a pipeline there is no GPU to find a recipe for {name} by: name it "
            f"({', '.join(made or [f'{other}/{name}' for other in known()])})."
        )
    if (gpu := gpu or _on(pipe)) not in known():
        raise UserError(f"There is no recipe{of} for {gpu}: {there}.")
    why = known()[gpu][OF[few]][key]
    if isinstance(why, str) and few and adapter is adapters.FLUX2:  # what leaves every step as it is fits any number
        other = known()[gpu][OF[False]].get(key, "")
        if not isinstance(other, str) and other["computed_steps"] == other["steps"] == other["plain_steps"]:
            name, why = key, other
    if isinstance(why, str):
        raise UserError(f"There is no recipe {gpu}/{name}{of} ({why}): {there}.")
    return Recipe(name=f"{gpu}/{name}", **why).on(adapter)


@functools.cache
def known() -> dict:
    """Configuration -> the words in its GPU's name ("match"), and for each goal a recipe or why there is none.

    The same of models of few steps ("few_steps").
    """
    return json.loads(FILE.read_text(encoding="utf-8"))


def fits(match: str, name: str) -> bool:
    """Whether a configuration's `match` stands in a CUDA device's name as whole words; "cpu" is no device."""
    if "cpu" in (match, name) or match == "any":
        return match in ("any", name)
    return re.search(rf"(?<![a-z0-9]){re.escape(match)}(?![a-z0-9])", name, re.IGNORECASE) is not None


def _on(pipe) -> str:
    """The configuration of the GPU that a pipeline is on, or will run on where it is offloaded; else the GPU's name."""
    import torch

    if isinstance(pipe, type) or not hasattr(pipe, "device"):
        raise UserError(
            f"{pipe!r:.80} is no pipeline: give one that is loaded, such as FluxPipeline.from_pretrained does."
        )
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return next((gpu for gpu, own in known().items() if fits(own["match"], name)), name)


# --- put on --------------------------------------------------------------------------------------------------


def accelerate(
    pipe, goal: str | stacks.Stack | Technique = GOAL, *more: Technique, steps: int | None = None,
    plan: str | Path | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Puts a recipe on a pipeline, in place; returns the function that takes all of it off again.

    Whatever fails, nothing stays on. While the returned function is kept, so are the weights that a quantization
    replaced: don't keep it where their memory is wanted, and load the pipeline again to be rid of the recipe.

    Args:
        goal: such as near-lossless, for the GPU that the pipeline is on and a model of as many steps; or a recipe by
            name, a stack, or techniques, which go on in the order of `stacks.ordered`.
        steps: that you ask of the plain pipeline; those that the recipe was measured with by default. A rule such as
            "every 4th step after the first 6" stays what it is, and a recipe of fewer steps says how many to ask for.
        plan: a file that `python -m fluxnb plan` wrote for the pipeline's model: its plan of as many computed steps, or
            of the next more, takes the place of the cache.

    Raises:
        UserError: there is no recipe, or something can't be put on here; the pipeline is as it was.
    """
    recipe, parts = _chosen(pipe, goal, more, steps, plan)
    if recipe and recipe.steps != recipe.plain_steps:
        warnings.warn(f"{recipe.name}: ask the pipeline for {recipe.asked(steps)} steps.", stacklevel=2)
    if recipe and recipe.family:
        warnings.warn(f"{recipe.name}: {recipe.elsewhere}", stacklevel=2)
    on: list[Callable[[], None]] = []
    undo = functools.partial(take_all_back, on)
    for part in parts:
        try:
            on.append(part.apply(pipe))
        except BaseException as error:
            undo()
            if isinstance(error, Unavailable):
                raise UserError(f"{part.label} can't be put on, nothing was changed: it {error}.") from error
            raise
    return undo


def plan(
    pipe, goal: str | stacks.Stack | Technique = GOAL, *more: Technique, steps: int | None = None,
    plan: str | Path | None = None,
) -> str:  # fmt: skip
    """What `accelerate` would do with the same arguments, line by line; nothing is touched.

    Args:
        pipe: None for a recipe by its full name.
    """
    recipe, parts = _chosen(pipe, goal, more, steps, plan)
    lines = [f"{recipe.name}: {recipe.goal}, {recipe.stack}"] if recipe else []
    lines += [f"{i}. {part.label}: {spelled(part)}" for i, part in enumerate(parts, 1)]
    for gate in (part.gate for part in parts if hasattr(part, "gate")):
        of = steps or (recipe.steps if recipe else None)
        if of and (computed := blind(gate, of)) is not None:
            lines.append(f"Computes {computed} of {of} steps.")
    lines += recipe.evidence(steps) if recipe else []
    if any("quantization" in part.settings for part in parts):
        lines.append("The unquantized weights stay in memory for as long as the function that takes it off is kept.")
    return "\n".join(lines)


def _chosen(pipe, goal, more, steps: int | None, plan=None) -> tuple[Recipe | None, tuple[Technique, ...]]:
    """The recipe, if it is one, and the techniques in their order. Raises UserError if they can't be had."""
    recipe = find(goal, pipe) if isinstance(goal, str) else None
    first = recipe.techniques if recipe else goal.techniques if isinstance(goal, stacks.Stack) else (goal,)
    if strange := [one for one in (*first, *more) if not isinstance(one, Technique)]:
        raise UserError(f"{strange[0]!r} can't be put on: give a goal, a recipe's name, a stack or techniques.")
    parts = stacks.ordered((*first, *more))
    if last := [part.name for part in parts if part.name in stacks.FOR_GOOD]:
        raise UserError(f"{last[0]} can't be taken off again, so it is no part of what can be undone: apply it itself.")
    if plan is not None:
        parts = stacks.ordered(_with_plan(parts, plan, steps or (recipe.steps if recipe else None)))
    for gate in (part.gate for part in parts if steps and hasattr(part, "gate")):
        gate.new_state(steps)  # a mask says what it is for
    return recipe, parts


def _with_plan(parts: Sequence[Technique], plan: str | Path, steps: int | None) -> list[Technique]:
    """The techniques with one of a file's plans in place of their cache. Raises UserError where that can't be."""
    from fluxnb.cache import Cache, planning
    from fluxnb.models import folders

    if not isinstance(plan, str | Path):
        raise UserError(f"{plan!r} is no file of plans: give the path of one that `python -m fluxnb plan` wrote.")
    if not (old := [part for part in parts if isinstance(part, Cache)]):
        raise UserError("A plan takes the place of a cache, and there is none here: give a recipe or a stack with one.")
    if steps is None:
        raise UserError("A plan is of a number of steps: say how many you ask of the pipeline, steps=28.")
    plans, computed = planning.read(folders.written(plan), steps), blind(old[0].gate, steps) or 1
    of = min((n for n in plans if n >= computed), default=max(plans))
    return [plans[of].cache() if part is old[0] else part for part in parts]


def blind(gate, steps: int) -> int | None:
    """Steps that a gate computes of so many, whatever the image; None for one that looks at it."""
    from fluxnb.cache import Gate

    if type(gate).measure is not Gate.measure or hasattr(gate, "gates"):
        return None
    state, run, computed = gate.new_state(steps), 0, 0
    for i in range(steps):
        reused = gate.decide(state, i, None) and i > 0 and not gate.forced(i, steps, run)
        run, computed = (run + 1, computed) if reused else (0, computed + 1)
        if not reused:
            gate.computed(state, i, None)
    return computed


# --- printed -------------------------------------------------------------------------------------------------


def spelled(made) -> str:
    """The constructor call that makes a technique, a gate or a predictor again."""
    if made is None or isinstance(made, str | int | float | tuple | list):
        return repr(made)
    if type(getattr(made, "gate", None)).__name__ == "Planned" and "weights" in made.settings:
        held = ", hold_controlnet=True" if made.hold_controlnet else ""
        return f"planned({made.gate.mask!r}, {made.settings['weights']!r}{held})"
    said = []
    for name, parameter in inspect.signature(type(made)).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            said += [f"{option}={value!r}" for option, value in made.options.items()]
        elif parameter.default is parameter.empty:
            said.append(spelled(getattr(made, name)))
        elif (value := getattr(made, name)) != parameter.default and value.__class__.__name__ != "Hold":
            said.append(f"{name}={spelled(value)}")
    return f"{type(made).__name__}({', '.join(said)})"


def script(recipe: Recipe, plain_diffusers=False, coefficients: Sequence[float] | None = None, model=None) -> str:
    """A script that runs as it is: loads a model, puts the recipe on, saves an image; what it rests on as comments.

    Args:
        plain_diffusers: without fluxnb, what diffusers and PyTorch have of it.
        coefficients: of TeaCache's polynomial, where nobody finds those of the model.
        model: that it is for (`fluxnb.models.facts.of`); the one that the recipe stands for by default.

    Raises:
        UserError: they have nothing of it.
    """
    parts = with_coefficients(recipe.techniques, coefficients)
    lines, remarks = _as_diffusers(recipe) if plain_diffusers else (code(parts).splitlines(), [])
    of = model or recipe
    imports = sorted({f"from diffusers import {of.pipeline}", *(line for line in lines if line.startswith("from "))})
    body = "\n".join(line for line in lines if line and not line.startswith("from "))
    comments = [f"{recipe.name}: {recipe.goal}, {', '.join(part.label for part in recipe.techniques) or recipe.stack}."]
    comments += [*recipe.evidence(model and model.steps), *remarks]
    default = f'nargs="?", default="{of.load}", ' if of.load else ""
    device = "cuda" if recipe.cuda else "cpu"
    return (
        "\n".join(textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="#   ") for line in comments)
        + "\nimport argparse\n\nimport torch\n"
        + "".join(f"{line}\n" for line in imports)
        + f"""
parser = argparse.ArgumentParser()
parser.add_argument("model", {default}help="a hub id or a folder")
parser.add_argument("--prompt", default="a red apple on a white table")
parser.add_argument("--output", default="image.png")
parser.add_argument("--steps", type=int, default={recipe.asked(model.steps) if model else recipe.steps})
parser.add_argument("--size", type=int, nargs=2, default=[{of.width}, {of.height}])
parser.add_argument("--tokens", type=int, default={of.tokens}, help="of the prompt")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--dtype", default="{recipe.dtype}")
parser.add_argument("--device", default="{device}")
options = parser.parse_args()

pipe = {of.pipeline}.from_pretrained(options.model, dtype=getattr(torch, options.dtype), use_safetensors=True)
pipe = pipe.to(options.device)
"""
        + body
        + """
image = pipe(
    prompt=options.prompt,
    width=options.size[0],
    height=options.size[1],
    num_inference_steps=options.steps,
"""
        + "    guidance_scale=0.0,\n" * (not of.guided)
        + """    max_sequence_length=options.tokens,
    generator=torch.Generator().manual_seed(options.seed),
).images[0]
image.save(options.output)
"""
    )


def with_coefficients(parts: tuple[Technique, ...], coefficients: Sequence[float] | None) -> tuple[Technique, ...]:
    """The parts, in which every TeaCache without a polynomial of its own has got this one; as they are for None."""
    for gate in (part.gate for part in parts if coefficients and hasattr(part, "gate")):
        for one in (gate, *getattr(gate, "gates", ())):
            if getattr(one, "coefficients", one) is None:
                one.coefficients = tuple(map(float, coefficients or ()))
    return parts


def code(parts: Sequence[Technique]) -> str:
    """The lines that put techniques on a pipeline `pipe`; "" without any."""
    calls = [spelled(part) for part in parts]
    names = sorted({"accelerate", *re.findall(r"\b([A-Z]\w*|planned)\(", " ".join(calls))})
    lines = [f"from fluxnb import {', '.join(names)}", "", "accelerate(", *(f"    {c}," for c in ("pipe", *calls)), ")"]
    return "\n".join(lines) if calls else ""


# --- in plain diffusers --------------------------------------------------------------------------------------

_QUANTIZED = {  # torchao's configuration of a kind, as it is written
    "fp8 row": "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())",
    "fp8 tensor": "Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())",
    "fp8 weight-only": "Float8WeightOnlyConfig()",
    "int8": "Int8DynamicActivationInt8WeightConfig()",
    "int8 weight-only": "Int8WeightOnlyConfig()",
}


def _torchao(part) -> list[str] | None:
    if (config := _QUANTIZED.get(part.kind)) is None:
        return None
    which = 'isinstance(layer, torch.nn.Linear) and "blocks" in name'
    which += ' and "norm" not in name' if part.kind in part.ROWS else ""
    names = ", ".join(["quantize_", *re.findall(r"[A-Z]\w+", config)])
    return [
        f"from torchao.quantization import {names}",
        f"quantize_(pipe.transformer, {config}, filter_fn=lambda layer, name: {which})",
    ]


def _cache(part) -> list[str] | None:
    """diffusers' own configuration of a cache, where it has one with these options."""
    from fluxnb.cache import FirstBlock, Hold, Interval, MagCache, Taylor
    from fluxnb.cache.gates.magcache import FLUX_RATIOS

    gate, how = part.gate, part.predictor
    if isinstance(gate, Interval) and isinstance(how, Taylor) and not gate.first_block and not gate.longest_run:
        last = ", disable_cache_after_step=options.steps - 1" if gate.compute_last else ""
        name, given = "TaylorSeerCacheConfig", f"cache_interval={gate.every}, max_order={how.order}, use_lite_mode=True"
        given += f", disable_cache_before_step={max(1, gate.warm_up)}{last}"
    elif not isinstance(how, Hold) or gate.warm_up or gate.compute_last:
        return None
    elif isinstance(gate, FirstBlock) and not gate.longest_run:
        name, given = "FirstBlockCacheConfig", f"threshold={gate.threshold!r}"
    elif isinstance(gate, MagCache) and gate.ratios == FLUX_RATIOS:
        name, more = "MagCacheConfig", f", max_skip_steps={gate.longest_run}, retention_ratio={gate.retention!r}"
        given = f"threshold={gate.threshold!r}{more}, num_inference_steps=options.steps, mag_ratios=FLUX_MAG_RATIOS"
    else:
        return None
    ratios = ["from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS"] if isinstance(gate, MagCache) else []
    return [f"from diffusers import {name}", *ratios, f"pipe.transformer.enable_cache({name}({given}))"]


def _mode(part) -> str:
    return f", mode={part.mode!r}" if part.mode else ""


_LAID_OUT = "pipe.vae.to(memory_format=torch.channels_last)"
_SOLVER = "DPMSolverMultistepScheduler"
_DIFFUSERS: dict[str, Callable] = {  # class -> lines that do what its techniques do; None where there are none
    "DPMSolver": lambda part: [
        f"from diffusers import {_SOLVER}",
        f"pipe.scheduler = {_SOLVER}.from_config(pipe.scheduler.config, solver_order=2, use_flow_sigmas=True, "
        'prediction_type="flow_prediction", algorithm_type="dpmsolver++")',
    ],
    "Attention": lambda part: (  # FlashAttention 3 it finds in one of the two packages only
        (backend := kinds.ATTENTION[part.kind][1])
        and part.kind != "flash 3"
        and [f"pipe.transformer.set_attention_backend({backend!r})"]
        or None
    ),
    "FusedQKV": lambda part: ["pipe.transformer.fuse_qkv_projections()"] if part.double else None,
    "TorchAO": _torchao,
    "Regional": lambda part: [f"pipe.transformer.compile_repeated_blocks(fullgraph=True{_mode(part)})"],
    "Whole": lambda part: [f"pipe.transformer.compile(fullgraph=True{_mode(part)})"],
    "Sliced": lambda part: ["pipe.vae.enable_slicing()"],
    "ChannelsLast": lambda part: [_LAID_OUT],
    "Compiled": lambda part: [_LAID_OUT, f"pipe.vae.decoder.compile(fullgraph=True{_mode(part)})"],
    "TextEncoders": lambda part: (
        None if part.record else ["pipe.text_encoder.compile()", "pipe.text_encoder_2.compile()"]
    ),
    "Cache": _cache,
}


def _as_diffusers(recipe: Recipe) -> tuple[list[str], list[str]]:
    """(lines that put it on, remarks). Raises UserError if nothing of the recipe is left."""
    found: list[str] = []
    missing: list[str] = []
    slow = any(getattr(part, "kind", None) == "int8 weight-only" for part in recipe.techniques)
    for part in recipe.techniques:
        name, why = type(part).__name__, ""
        looped = slow and "compile" in part.settings  # pytorch/pytorch #159325, #161680
        lines = _DIFFUSERS[name](part) if name in _DIFFUSERS else None
        if looped:
            lines, why = None, " (PyTorch compiles the product of these weights to a plain loop on GPUs)"
        found += lines or []
        missing += [part.label + why] if lines is None else []
    none = f"Without a counterpart in diffusers and PyTorch: {', '.join(missing)}"
    if missing and not found:
        raise UserError(f"{none}; nothing of {recipe.name} is left, so leave out --diffusers.")
    remarks = [f"{none}; left out here."] if missing else []
    if any("TaylorSeer" in line for line in found):
        remarks.append("TaylorSeer extrapolates every block's output by itself, not of all together, at other steps.")
    return found, [*remarks, "This script wasn't measured: the figures are those of fluxnb's own techniques."]
