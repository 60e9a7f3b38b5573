"""Every technique in every case of `study.survival`, on a small pipeline of random weights, and what became of it."""

from __future__ import annotations

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from fluxnb import families, recipes
from fluxnb import techniques as t
from fluxnb.errors import UserError
from fluxnb.measure import telemetry
from fluxnb.stacks import Stack
from fluxnb.study.bench import SIDE, Bench
from fluxnb.study.candidate import stacked
from fluxnb.study.loop import Task
from fluxnb.study.row import Row
from fluxnb.study.study import Study
from fluxnb.study.survival import (
    CASE,
    CASES,
    LORA,
    PUT_ON,
    RAW,
    RECOMPILED,
    RIGHT,
    SENTENCE,
    WRONG,
    Case,
    Moment,
    nothing,
)
from fluxnb.technique import ANOTHER, IDENTICAL, ROUNDING, Unavailable, least_exact
from fluxnb.techniques import compilation

LEAST = 16  # units in the last place, of an image's norm, that rounding elsewhere may be off
ONE_LEVEL = 2e-3  # of a picture's norm: some of its bytes are rounded to their neighbours then


class Wrong(Exception):
    """An image isn't the right one: which, and by how much."""


def compiles(stack: Stack) -> bool:
    """Whether torch.compile is part of it."""
    kinds = (t.Regional, t.Whole, t.TensorRT, t.Compiled)
    return any(isinstance(p, kinds) or (isinstance(p, t.TextEncoders) and not p.record) for p in stack.techniques)


class Trials:
    """Techniques in cases, on one bench; the right images are kept, as many cells share them."""

    def __init__(self, bench: Bench):
        self.bench, self._right = bench, dict[tuple, torch.Tensor]()

    def tried(self, stack: Stack, case: Case, real: bool = False) -> dict:
        """The columns of a cell's row: what became of the image.

        Args:
            real: what compiles is compiled to kernels; otherwise Dynamo alone says what would be compiled anew.
        """
        bench = self.bench
        bench.pixels = any(part.family in (families.VAE, families.HOST) for part in stack.techniques)
        bench.texts = any(isinstance(part, t.TextEncoders) for part in stack.techniques)
        self.real, self.spent, self.at = compiles(stack) and real, {"recompiles": 0, "lost_s": 0.0}, PUT_ON.name
        if case.needs and importlib.util.find_spec(case.needs) is None:
            why = f"needs the package {case.needs}: `pip install {case.needs}`"
            return {"status": "unavailable", "reason": why, "proof": {"verdict": SENTENCE, "when": self.at}}
        with warnings.catch_warnings(action="ignore"), _compiling(compiles(stack), real), torch.no_grad():
            try:
                said = self._tried(stack, case)
                verdict = SENTENCE if said else RECOMPILED if self.spent["recompiles"] else RIGHT
            except Wrong as error:
                verdict, said = WRONG, str(error)
            except Exception as error:  # noqa: BLE001  what a user would see
                verdict, said = RAW, f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"
        status = {SENTENCE: "unavailable", WRONG: "error", RAW: "error"}.get(verdict, "ok")
        spent = {name: value for name, value in self.spent.items() if value and (self.real or name != "lost_s")}
        return {"status": status, "reason": said, "proof": {"verdict": verdict, "when": self.at, **spent}}

    def _tried(self, stack: Stack, case: Case) -> str | None:
        """The sentence that says what doesn't go, if one does. Raises Wrong, and whatever is raised."""
        pipe, on = self._started(case), contextlib.ExitStack()
        good, other, said = None, pipe, None  # the last moment with the right image, and the pipeline of it
        try:
            put_on(stack, pipe, on)
            for moment in (Moment(self.at), *case.moments):
                self.at = moment.what
                now = (moment.happens and moment.happens(self.bench, pipe)) or pipe
                self._check(
                    stack, case, moment, self._watched(moment, now, compiles(stack) and good), type(now) is type(pipe)
                )
                if not moment.apart:
                    good, other = moment, now
        except (UserError, Unavailable) as error:
            said = _sentence(error)
            if good:
                self._check(stack, case, good, self._made(good, other), False)
        try:
            on.close()
        except UserError as error:
            return said or _sentence(error)
        good = good or Moment("")
        self._same(self._made(good, other), self._right_image(None, case, good), "taken off, the image")
        return said

    def _started(self, case: Case):
        pipe = self.bench.fresh(case.whole)
        return (case.start and case.start(self.bench, pipe)) or pipe

    def _made(self, moment: Moment, pipe) -> torch.Tensor:
        return (moment.made or Bench.image)(self.bench, pipe, moment.ask)

    def _watched(self, moment: Moment, pipe, counted) -> torch.Tensor:
        """The image; what is compiled for it after the first one is counted."""
        before, began = compilation.counters()["graphs"], time.perf_counter()
        made = self._made(moment, pipe)
        took, new = time.perf_counter() - began, compilation.counters()["graphs"] - before
        if counted and new:
            began = time.perf_counter()
            self._made(moment, pipe)
            self.spent["recompiles"] += new
            self.spent["lost_s"] += max(0.0, took - (time.perf_counter() - began))
        return made

    def _right_image(self, stack: Stack | None, case: Case, moment: Moment) -> torch.Tensor:
        """That of a fresh pipeline. Raises UserError or Unavailable if the technique can't be put on in that state."""
        make = moment.right or moment.made or Bench.image
        of = stack and (stack.name, self.real)
        key = (of, case.start, moment.state, make, moment.ask, moment.plain, self.bench.pixels, self.bench.texts)
        if key not in self._right:
            pipe = self._started(case)
            pipe = moment.state(self.bench, pipe) or pipe
            if stack and not moment.plain:
                put_on(stack, pipe, contextlib.ExitStack())
            self._right[key] = make(self.bench, pipe, moment.ask)
        return self._right[key]

    def _check(self, stack: Stack, case: Case, moment: Moment, made: torch.Tensor, alike: bool) -> None:
        """Raises Wrong unless it is the right image, and as near to the plain one as the technique says."""
        plain = self._right_image(None, case, moment)
        exact = IDENTICAL if moment.plain else least_exact(*stack.techniques)
        compiled = self.real and exact != IDENTICAL  # another graph rounds elsewhere, and takes long
        if not (compiled and exact == ROUNDING):
            rounds = compiled or any(part.exact == ROUNDING for part in stack.techniques)
            try:
                self._same(made, self._right_image(stack, case, moment), "the image", moment.rounded or rounds)
            except (UserError, Unavailable) as error:
                if exact == ANOTHER:  # else the plain image judges it
                    raise Wrong(f"nothing shows that the image is right: put on afterwards, it {error}") from error
        if exact in (IDENTICAL, ROUNDING):
            self._same(made, plain, "the image that is the same without it", exact == ROUNDING)
        elif alike and moment.state is not nothing and not self.bench.pixels:  # a tile changes more than a LoRA
            before = self._right_image(None, case, Moment("", ask=replace(moment.ask, picture=False)))
            if before.shape == plain.shape and _apart(made, plain) >= _apart(made, before) and _apart(plain, before):
                raise Wrong("it has no effect")

    def _same(self, made: torch.Tensor, right: torch.Tensor, what: str, rounded: bool = False) -> None:
        if made.shape != right.shape or not torch.isfinite(made).all():
            raise Wrong(f"{what} is of {tuple(made.shape)} numbers, finite: {bool(torch.isfinite(made).all())}")
        coarser = max(torch.finfo(kind).eps for kind in (made.dtype, self.bench.dtype))  # of two: one was converted
        most = max(LEAST * coarser, ONE_LEVEL if self.bench.pixels else 0.0)
        if (by := _apart(made, right)) > (most if rounded else 0.0):
            raise Wrong(f"{what} is {by:.2g} of its norm off")


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def put_on(stack: Stack, pipe, on: contextlib.ExitStack) -> None:
    """Puts techniques on in their order; where one is refused those before it come off."""
    try:
        for technique in stack.techniques:
            on.callback(technique.apply(pipe))
    except BaseException:
        on.close()
        raise


def _sentence(error: Exception) -> str:
    """Its text. Raises it again if it is no sentence."""
    text = str(error)
    if "\n" in text or not text:
        raise RuntimeError(f"{type(error).__name__} without a sentence: {text[:200]!r}")
    return text


@contextlib.contextmanager
def _compiling(anything: bool, real: bool) -> Iterator[None]:
    """Nothing that was compiled before is found inside."""
    if not anything:
        yield
        return
    with contextlib.ExitStack() as stack:
        if real:
            stack.enter_context(compilation.fresh())
        else:
            torch.compiler.reset()
            stack.enter_context(torch.compiler.set_stance(force_backend="eager"))
        yield


def techniques() -> list[Stack]:
    """Every technique by itself, as a stack, at a setting that does something in a few steps."""
    from fluxnb.cache import Cache, Either, FirstBlock, Interval, MagCache, Schedule, Taylor, TeaCache
    from fluxnb.cache.para_attn import ParaAttention

    polynomial = (0.5, 1.5, 0.02)
    caches = (
        Cache(Interval(2), Taylor(1)),
        Cache(FirstBlock(0.5)),
        Cache(TeaCache(0.6, polynomial)),
        Cache(MagCache(0.3)),
        Cache(Either(TeaCache(0.3, polynomial), FirstBlock(0.4))),
        Cache(Schedule("1010")),
        ParaAttention(0.5),
    )
    own = (
        t.DPMSolver(), *caches,
        t.FusedQKV(), t.FusedGELU(), t.LateScales(), t.FusedNorm(), t.FusedRoPE(), t.ModulationAhead(),
        t.TorchAO("int8 weight-only"), t.TorchAO("int8"), t.TorchAO("fp8 row"), t.SparseInt8(), t.BitsAndBytes("nf4"),
        t.GGUF("Q8_0"), t.Quanto("int8"), t.SimulatedSVDQuant(4), t.Nunchaku(),
        t.Attention("math"), t.Attention("flash"), t.FP8Attention(), t.FP8Attention(simulated=True),
        t.Regional(), t.Whole(), t.CudaGraph(), t.CudaGraph(blocks=True), t.TensorRT(), t.TextEncoders(),
        t.TextEncoders(record=True), t.Compiled(),
        t.Progressive(1), t.ChannelsLast(), t.Sliced(), t.Tiled(SIDE // 2), t.BytesOnDevice(), t.NoHookSearch(),
        t.Replicas(), t.ContextParallel(gather=2), t.ParallelVAE(), t.FullyShard(), t.DiffusersParallel(ulysses=2),
        t.XDiT(ulysses=2), t.PipeFusion(2),
    )  # fmt: skip
    return [Stack(part.label, (part,)) for part in own]


def from_recipes(gpu: str) -> list[Stack]:
    """The stacks of a configuration's recipes, each once, under the name of the first recipe that it is of."""
    found: dict[str, Stack] = {}
    for few, of in recipes.OF.items():
        for goal, made in recipes.known().get(gpu, {of: {}})[of].items():
            if not isinstance(made, str):
                recipe = recipes.find(f"{gpu}/{goal}", few=few)
                label = f"recipe {recipe.name}: {', '.join(part.label for part in recipe.techniques)}"
                found.setdefault(str(recipe.settings), Stack(recipe.stack, recipe.techniques, label=label))
    return list(found.values())


def recipes_of_others(gpu: str, compiled: bool) -> list[Stack]:
    """The stacks of the other configurations' recipes, for what a LoRA does to them.

    Args:
        compiled: whole; otherwise without what is compiled or recorded, whose arithmetic is the same.
    """
    found: dict[str, Stack] = {}
    for other in recipes.known():
        for stack in from_recipes(other) if other != gpu else ():
            parts = tuple(part for part in stack.techniques if compiled or not compiles(Stack("", (part,))))
            less = f", without compiling: {', '.join(part.label for part in parts)}"
            label = stack.label + (less if parts != stack.techniques else "")
            if parts:
                found[label] = Stack(stack.name, parts, label=label)
    return list(found.values())


# --- rows ---------------------------------------------------------------------------------------------------


Names = list[str] | None


def tried(
    s: Study, steps: int, cases: Names = None, compiled: Names = None, kernels: Names = None, left_out: Names = None
) -> list[Row]:
    """A row for every technique, and recipe of the configuration, in every case; for what can't run one that says why.

    The other configurations' recipes are tried with LoRAs: whole where that is compiled to kernels, else uncompiled.

    Args:
        steps: of an image.
        cases: what happens; everything by default.
        compiled: what of it happens where something is compiled; everything by default.
        kernels: where that is compiled to kernels; nowhere by default, then Dynamo alone says what is compiled anew.
        left_out: labels of what isn't tried.

    Raises UserError for a name that there isn't.
    """
    others = {stack.label: stack for stack in recipes_of_others(s.params.name, LORA.name in (kernels or ()))}
    own = (*from_recipes(s.params.name), *techniques())
    known = {stack.label or stack.name: stack for stack in (*own, *others.values())}
    _check_known("technique", left_out, known)
    for names in (cases, compiled, kernels):
        _check_known("case", names, [case.name for case in CASES])
    found: list[Row] = []
    trials: list[Trials] = []

    def rows(stack: Stack, chosen: list[Case]) -> list[Row]:
        real = {case.name: compiles(stack) and case.name in (kernels or ()) for case in chosen}
        tasks = {_task(s, stack, case, steps, real[case.name]): case for case in chosen}

        def timer(due: list[Task]) -> None:
            if not trials:
                trials.append(Trials(Bench(steps=steps)))
            for task in due:
                s.append(task, trials[0].tried(stack, tasks[task], real[tasks[task].name]))

        return s.measured(list(tasks), timer)

    for stack in (stack for name, stack in known.items() if name not in (left_out or ())):
        (first,) = rows(stack, [PUT_ON])
        lists = [names for names in (cases, compiled if compiles(stack) else None) if names is not None]
        lists += [[LORA.name]] if stack.label in others else []
        chosen = [case for case in CASES if all(case.name in names for names in lists)]
        found += [first, *(rows(stack, chosen) if first.status != "unavailable" else ())]
    return found


def _task(s: Study, stack: Stack, case: Case, steps: int, real: bool) -> Task:
    candidate = stacked(stack, steps)
    meaning = {**candidate.meaning, "mark": case.name}
    settings = {**candidate.settings, CASE: case.name} | ({"kernels": True} if real else {})
    key = {"notebook": s.notebook, "technique": meaning["technique"], "stack": meaning["stack"], "settings": settings}
    key |= {"weights": "random", "gpu": s.params.name, "gpus": 1, "width": SIDE, "height": SIDE, "steps": steps}
    key |= {"batch": 1, "host": s.host, "versions": telemetry.versions_short()}
    return Task(key, meaning, candidate.code)


def _check_known(what: str, given: Names, known: Iterable[str]) -> None:
    """Raises UserError for a name that there isn't."""
    if strange := [name for name in given or () if name not in known]:
        raise UserError(f"There is no {what} {strange[0]!r}: choose one of {', '.join(known)}.")
