"""Planned caches: which steps are computed and what the others are made of, from a few uncached images of a model.

What a cache keeps is the blocks' residual r_t of each step. How much a wrong one changes the latents follows from the
transformer's last layers, its head: the inner products of head_t(r_j) for all earlier steps j, one Gram matrix for each
step t, give the least error of step t for any set of computed steps, so

- the mask: the set whose errors add up to least, by greedy removal and exchanges, without another image;
- a predicted frontier: that sum in dB, calibrated on what the plans give for the prompts that plan and for as many that
  plan nothing;
- the weights: least squares again, along the cached trajectory itself. Each reused step is fitted to lead back to the
  uncached latents, which takes one cached batch of the same images for each mask.

Source: this study's own; L2P (2026) fits weights to uncached trajectories, DPCache (2026) plans masks by a path's cost.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluxnb import families
from fluxnb.cache import masks
from fluxnb.cache.engine import Cache
from fluxnb.cache.gates.planned import Planned, signature
from fluxnb.cache.gates.schedule import Schedule
from fluxnb.cache.linear import Linear, weighted
from fluxnb.cache.predictors import L2P
from fluxnb.errors import UserError
from fluxnb.measure import quality
from fluxnb.models import folders
from fluxnb.technique import applied

FILE = "plans.json"
LARGEST = 1e6  # of what a file says of weights, which are about 1
# Prompts that the plans of a model of the study's are made from, and of one of yours, which may be large; then those
# that plans are only tried on: what is expected of a mean has to be known of images enough.
PROMPTS, FEW = (24, 24), (4, 2)
BUDGETS = (14, 12, 10, 8, 6)  # of 28
MADE: dict[str, Callable[[], Path]] = {}  # models without a plan beside their weights, and what makes the file of one
REACH = 4  # so many computed steps a reused one is made of
RIDGE = 1e-4  # of the normal equations' mean diagonal, towards what the last computed step added
# How much more an error of the first step counts than one of the last, and how often that falls by e over the steps.
# What is decided early can't be put right later; how far that is so depends on the model and the budget, so the masks
# of all of these are tried. That which fits the images best foretells.
EARLY = ((30.0, 14.0), (8.0, 14.0), (8.0, 7.0), (30.0, 7.0), (100.0, 7.0), (30.0, 4.0))


@dataclass(frozen=True)
class Plan:
    """A mask, the weights that go with it, and the quality to expect.

    Args:
        signature: some of the transformer's weights, by which it is known again.
        mask: one sign for each step: 1 computed, 0 reused.
        weights: reused step -> computed step -> weight.
        predicted_db: mean PSNR to the uncached image, from the Gram matrices, on the line of all numbers of steps.
        each: PSNR of every image that it was tried on, in dB: of those that planned, then of others.
        images: how many planned.
        others: the field's methods that search a mask -> theirs of as many computed steps.
    """

    signature: tuple[float, ...]
    mask: str
    weights: dict[int, dict[int, float]]
    predicted_db: float
    each: tuple[float, ...]
    images: int
    others: dict[str, str] = field(default_factory=dict)

    @property
    def computed(self) -> int:
        """Steps that run the whole transformer."""
        return self.mask.count("1")

    @property
    def differ(self) -> list[float]:
        """PSNR of the images that differ from the uncached ones at all."""
        return [db for db in self.each if db != np.inf]

    def expected(self, images: int) -> tuple[float, float] | None:
        """Two standard errors around what is predicted of the mean of so many others; None where none are known."""
        if len(self.differ) < 2:
            return None
        error = float(np.std(self.differ, ddof=1)) * (1 / len(self.differ) + 1 / images) ** 0.5
        return self.predicted_db - 2 * error, self.predicted_db + 2 * error

    def cache(self, **options) -> Cache:
        """The cache that runs it, with `Cache`'s options: no block is run on a reused step."""
        predictor = L2P.of(self.weights, len(self.mask), origin="planned weights")
        return Cache(Planned(self.mask, self.signature), predictor, **options)


def make(
    loaded, inputs: Sequence[tuple[str, int]], steps: int, budgets: Sequence[int] = BUDGETS, early=EARLY,
    annealing: int = 0, besides: Sequence[tuple[str, int]] = (),
) -> list[Plan]:  # fmt: skip
    """A plan for each number of computed steps, from the images of some prompts and seeds, as one batch each.

    Args:
        loaded: a subject with its pipeline, nothing else put on it.
        early: whose masks are tried, as in `EARLY`: each takes a cached batch.
        annealing: of the first so many prompts BudCache's masks are searched, too, which takes hundreds of batches.
        besides: prompts and seeds that plan nothing and that the plans are tried on, too.

    Raises UserError where the pipeline has another solver than Euler's, where its weights aren't all there as they were
    trained, or where a budget isn't one.
    """
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= steps:
            raise UserError(f"{budget!r} of {steps} steps can't be computed: give whole numbers from 1 to {steps}.")
    transformer = loaded.pipe.transformer
    if (own := signature(transformer)) is None:
        raise UserError("A plan is made of a model as it is: load it whole, neither offloaded nor quantized.")
    uncached = _Trajectories.of(loaded, list(inputs), steps)
    products = _grams(uncached, transformer)
    grams = [Gram(products, one) for one in early]
    exact, made = loaded.batch(list(besides), steps) if besides else [], []
    for budget in budgets:
        tried = [_tried(loaded, uncached, list(inputs), mask) for mask in {g.mask(budget): None for g in grams}]
        best = replace(max(tried, key=lambda plan: _mean(plan) + min(plan.each)), signature=own)
        if besides:
            with applied(loaded.pipe, best.cache()):
                more = map(quality.psnr, exact, loaded.batch(list(besides), steps))
                best = replace(best, each=(*best.each, *(round(db, 1) for db in more)))
        others = {families.DPCACHE: programmed(grams[0], budget)}
        if annealing:
            others[families.BUDCACHE] = annealed(loaded, list(inputs)[:annealing], steps, budget)
        made.append(replace(best, others=others))
    foretell = _calibrated(grams, made)
    return [replace(plan, predicted_db=foretell(plan.mask)) for plan in made]


def _mean(plan: Plan) -> float:
    return float(np.mean(plan.differ or [np.inf]))


def _tried(loaded, uncached: _Trajectories, inputs: list, mask: str) -> Plan:
    """The plan of a mask, its weights fitted while the images are made again."""
    fitting = _Fitting(loaded.pipe.transformer, uncached)
    with applied(loaded.pipe, Cache(Schedule(mask, first_block=False), fitting)):
        images = loaded.batch(inputs, len(mask))
    found = tuple(round(quality.psnr(*pair), 1) for pair in zip(uncached.images, images, strict=True))
    return Plan((), mask, fitting.found, 0.0, found, len(images))


def _calibrated(grams: Sequence[Gram], chosen: Sequence[Plan]) -> Callable[[str], float]:
    """What foretells the mean image's decibels of a mask: the Gram matrices by the line through the chosen plans.

    Not through all masks that were tried: those that were chosen are those that came out above that line. It is that of
    images before they are rounded to 8 bits, which alone halves what decibels gain near the top.
    """
    known = [plan for plan in chosen if plan.differ]
    measured = np.interp([_mean(plan) for plan in known], in_8_bits(_LEVELS), _LEVELS)
    fits = []
    for gram in grams if known else ():
        foretold = np.array([gram.db(plan.mask) for plan in known])
        many = len({round(db, 6) for db in foretold}) > 2
        slope, shift = np.polyfit(foretold, measured, 1) if many else (1.0, float((measured - foretold).mean()))
        fits.append((float(np.square(measured - slope * foretold - shift).sum()), slope, shift, gram))
    _, slope, shift, gram = min(fits, key=lambda fit: fit[0], default=(0.0, 1.0, 0.0, grams[0]))
    return lambda mask: float(in_8_bits(slope * gram.db(mask) + shift))


_LEVELS = np.linspace(0, 100, 2001)


def in_8_bits(db: float | np.ndarray) -> np.ndarray:
    """PSNR of two images rounded to 8 bits whose difference before was normal and of so many decibels.

    A difference of n + f levels becomes n or n + 1, as the steps happen to lie, f of the time the larger. So one far
    below a level counts with its size, not with its square: 65 dB become 57.5.
    """
    z = np.linspace(-6, 6, 601)
    normal = np.exp(-z * z / 2)
    size = np.abs(np.multiply.outer(255 * 10 ** (-np.asarray(db) / 20), z))
    whole = np.floor(size)
    squares = whole**2 + (size - whole) * (2 * whole + 1)
    return 20 * np.log10(255) - 10 * np.log10(squares @ normal / normal.sum())


class Gram:
    """The least error of any set of computed steps.

    Args:
        grams: for each step t the inner products of what the head makes of the residuals of steps 0 to t, times the
            squared change of the noise level there: (images, t + 1, t + 1), float64.
        early: how errors of the first steps count, as in EARLY.
    """

    def __init__(self, grams: Sequence[np.ndarray], early: tuple[float, float] = EARLY[0]):
        size = np.sum([own[:, -1, -1] for own in grams], axis=0)[:, None, None]
        self.grams, self.steps = [own / size for own in grams], len(grams)
        most, falls = early
        self.counts = 1 + most * np.exp(-np.arange(self.steps) * falls / self.steps)
        self._error = functools.lru_cache(maxsize=None)(self._least)
        self._cost = functools.lru_cache(maxsize=None)(self._total)

    def _least(self, step: int, of: tuple[int, ...]) -> np.ndarray:
        """(images,): the squared error of a step that is made of others by the same weights for all images."""
        own, used = self.grams[step], list(of)
        among, across = own[:, used][:, :, used], own[:, used, step]
        weights = solve(among.mean(0), across.mean(0))
        return np.einsum("j,njk,k->n", weights, among, weights) - 2 * across @ weights + own[:, step, step]

    def _total(self, mask: str) -> float:
        errors, computed = np.zeros(len(self.grams[0])), list[int]()
        for step, sign in enumerate(mask):
            if sign == "1":
                computed.append(step)
            else:
                errors = errors + self.counts[step] * self._error(step, tuple(computed[-REACH:])).clip(0)
        return float(np.log(errors.clip(1e-30)).mean())

    def db(self, mask: str) -> float:
        """How small the errors are, in decibels; only differences between masks mean something."""
        return -10 / np.log(10) * self._cost(mask)

    def mask(self, computed: int) -> str:
        """The mask of least error: steps are taken away one by one, then moved as long as that is better."""
        mask = "1" * self.steps
        while mask.count("1") > computed:
            mask = min((_with(mask, {i: "0"}) for i in range(1, self.steps) if mask[i] == "1"), key=self._cost)
        while True:
            ones, zeros = ([i for i in range(1, self.steps) if mask[i] == sign] for sign in "10")
            other = min((_with(mask, {i: "0", j: "1"}) for i in ones for j in zeros), key=self._cost, default=mask)
            if self._cost(other) >= self._cost(mask):
                return mask
            mask = other


def programmed(gram: Gram, computed: int) -> str:
    """DPCache's mask: the path of least cost, each reused step a straight line through the last two computed ones.

    Source: DPCache (2026), its path-aware cost, here of what the head makes of the residuals.
    """
    steps = gram.steps
    cost = np.zeros((steps + 1,) * 3)
    for i, j in itertools.combinations_with_replacement(range(steps), 2):
        for t in range(j + 1, steps):
            ahead = (t - j) / (j - i) if j > i else 0.0
            weights = np.zeros(t + 1)
            weights[i], weights[j], weights[t] = weights[i] - ahead, weights[j] + 1 + ahead, -1
            cost[i, j, t + 1 :] += float(np.mean(weights @ gram.grams[t] @ weights))
    return masks.programmed(cost, computed)


def annealed(loaded, inputs: Sequence[tuple[str, int]], steps: int, computed: int) -> str:
    """BudCache's mask, which takes a few hundred cached images of each of the prompts and seeds.

    Source: BudCache (2026): the mean squared error of the last latents where what was computed last is held, of one
    prompt in its authors' configuration.
    """

    def latents(*on: Cache) -> torch.Tensor:
        with applied(loaded.pipe, *on):
            return loaded.batch(list(inputs), steps, "latent").float()

    wanted = latents()

    def loss(mask: str) -> float:
        return float((latents(Cache(Schedule(mask, first_block=False))) - wanted).square().mean())

    return masks.annealed(loss, steps, computed)


def _with(mask: str, signs: dict[int, str]) -> str:
    return "".join(signs.get(i, sign) for i, sign in enumerate(mask))


def solve(among: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Weights by least squares, drawn a little towards the last one alone: (steps, steps), (steps,) -> (steps,)."""
    hold = np.eye(len(among))[-1]
    ridge = RIDGE * max(np.trace(among), 1e-30) / len(among) * np.eye(len(among))
    return hold + np.linalg.solve(among + ridge, across - among @ hold)


@dataclass
class _Trajectories:
    """A batch's steps, uncached ones unless the pipeline has a cache."""

    latents: list[torch.Tensor]  # before each step and behind the last, (n, tokens, channels)
    residuals: list[torch.Tensor]  # (n, tokens, width)
    heads: list[tuple[torch.Tensor, torch.Tensor]]  # what norm_out is given: image tokens, embedded time and prompt
    changes: list[float]  # of the noise level
    images: list[Any]

    @classmethod
    @torch.no_grad()
    def of(cls, loaded, inputs, steps: int) -> _Trajectories:
        from diffusers import FlowMatchEulerDiscreteScheduler

        pipe, transformer = loaded.pipe, loaded.pipe.transformer
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            raise UserError(
                f"A plan is made along Euler's steps, and the pipeline has {type(pipe.scheduler).__name__}: take that "
                "solver off first."
            )
        seen: list[tuple] = []
        heads: list[tuple] = []
        outputs: list[torch.Tensor] = []
        hooks = [
            transformer.x_embedder.register_forward_hook(lambda _, x, y: seen.append((x[0], y))),
            transformer.norm_out.register_forward_pre_hook(lambda _, x: heads.append(x)),
            transformer.proj_out.register_forward_hook(lambda _, x, y: outputs.append(y)),
        ]
        try:
            images = loaded.batch(inputs, steps)
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != steps:
            raise UserError(
                f"A plan needs one pass a step, and {steps} steps made {len(outputs)}: use no true guidance."
            )
        changes = pipe.scheduler.sigmas.diff().tolist()  # type: ignore[attr-defined]
        latents = [before for before, _ in seen]
        residuals = [head[0] - embedded for head, (_, embedded) in zip(heads, seen, strict=True)]
        return cls([*latents, latents[-1] + changes[-1] * outputs[-1]], residuals, heads, changes, images)


def _head(transformer, embedded: torch.Tensor):
    """What the transformer makes of image tokens behind its blocks."""
    return lambda tokens: transformer.proj_out(transformer.norm_out(tokens, embedded))


@torch.no_grad()
def _changes(transformer, tokens, embedded, residuals) -> torch.Tensor:
    """How its output changes with each residual: (n, residuals, tokens x channels), float32."""
    head = _head(transformer, embedded)
    return torch.stack([torch.func.jvp(head, (tokens,), (r,))[1].flatten(1).float() for r in residuals], dim=1)


def _grams(uncached: _Trajectories, transformer) -> list[np.ndarray]:
    found = []
    for step, (tokens, embedded) in enumerate(uncached.heads):
        moved = _changes(transformer, tokens, embedded, uncached.residuals[: step + 1])
        found.append((moved @ moved.mT).double().cpu().numpy() * uncached.changes[step] ** 2)
    return found


class _Fitting(Linear):
    """Fits the weights of each reused step, while a batch is made, so that its next latents are the uncached ones."""

    kind = name = "fitting"
    keeps = REACH

    def __init__(self, transformer, uncached: _Trajectories):
        self.transformer, self.uncached = transformer, uncached
        self.found: dict[int, dict[int, float]] = {}

    def called(self, state, given):
        state["latents"] = given["hidden_states"]

    def predict(self, state, index):
        uncached, residuals, latents = self.uncached, state["residuals"], state["latents"]
        embedded = uncached.heads[index][1]
        wanted = (uncached.latents[index + 1] - latents).float() / uncached.changes[index]
        before = self.transformer.x_embedder(latents)
        weights = np.eye(len(residuals))[-1]
        for _ in range(2):  # the head is linear but for its norm
            tokens = before + weighted(residuals, weights)
            left = (wanted - _head(self.transformer, embedded)(tokens).float()).flatten(1)
            moved = _changes(self.transformer, tokens, embedded, residuals)
            size = moved.square().sum((1, 2)).clamp_min(1e-30)  # every image counts alike
            among = ((moved @ moved.mT) / size[:, None, None]).mean(0).double().cpu().numpy()
            across = ((moved @ left[..., None])[..., 0] / size[:, None]).mean(0).double().cpu().numpy()
            ridge = RIDGE * np.trace(among) / len(among) * np.eye(len(among))
            weights = weights + np.linalg.solve(among + ridge, across)
        self.found[index] = {at: float(f"{w:.6g}") for at, w in zip(state["at"], weights, strict=True)}
        return weighted(residuals, weights)


def save(plans: Sequence[Plan], path: Path) -> Path:
    """Writes plans of one model and number of steps where `read` finds them."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps([asdict(plan) for plan in plans]) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def read(path: Path, steps: int) -> dict[int, Plan]:
    """The plans of a file by their number of computed steps.

    Raises UserError for a file that holds none, or those of another number of steps.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise OSError(errno.EINVAL, "it is no file")
        plans = [_plan(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): make it with `python -m fluxnb plan`.") from error
    except (UserError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} holds no plans: make it anew with `python -m fluxnb plan`.") from error
    found = {plan.computed: plan for plan in plans if len(plan.mask) == steps}
    if not found:
        said = ", ".join(str(n) for n in sorted({len(plan.mask) for plan in plans})) or "no"
        raise UserError(f"{path} has plans of {said} steps and not of {steps}: make it with `--steps {steps}`.")
    return found


def _plan(signature, mask, weights, predicted_db, each, images, others=()) -> Plan:
    plan = Plan(
        tuple(map(float, signature)),
        mask,
        {int(step): {int(at): float(w) for at, w in own.items()} for step, own in weights.items()},
        float(predicted_db),
        tuple(map(float, each)),
        int(images),
        {str(name): Schedule(other).mask for name, other in dict(others).items()},
    )
    Schedule(mask)
    if {(len(one), one.count("1")) for one in plan.others.values()} - {(len(mask), plan.computed)}:
        raise ValueError("masks of others of another number of steps")
    if sorted(plan.weights) != [i for i, sign in enumerate(mask) if sign == "0"]:
        raise ValueError("weights of other steps than those that are reused")
    if len(plan.signature) != 16:
        raise ValueError("no signature")
    numbers = [*plan.signature, *(w for own in plan.weights.values() for w in own.values())]
    if not all(abs(number) <= LARGEST for number in numbers):  # nor is NaN
        raise ValueError("a number with which no image is made")
    plan.cache()
    return plan


def of(model: str, steps: int) -> dict[int, Plan]:
    """The plans of a model by name or folder: those beside its weights, else those that a study makes of it.

    Raises UserError where there are none of `steps`.
    """
    from fluxnb.models import embedded

    path = (embedded.FOLDERS.get(model) or folders.written(model)) / FILE
    if not path.is_file() and model in MADE:
        path = MADE[model]()
    elif not path.is_file():
        raise UserError(f"There is no plan of {model}: make one with `python -m fluxnb plan --model {model}`.")
    return read(path, steps)


def planned(mask: str, weights: str, **options) -> Cache:
    """The planned cache of a mask whose weights have a digest, as rows name it, with `Cache`'s options.

    Its plan lies beside a model's weights in the package, or beside rows in `reports/`.

    Raises UserError where none has these.
    """
    from fluxnb.models import embedded

    beside = [path for folder in embedded.FOLDERS.values() if (path := folder / FILE).is_file()]
    for path in (*beside, *sorted(Path("reports").glob("**/plans/*.json"))):
        with suppress(UserError):  # of another number of steps
            plan = read(path, len(mask)).get(mask.count("1"))
            made = plan.cache(**options) if plan and plan.mask == mask else None
            if made and made.settings["weights"] == weights:
                return made
    raise UserError(
        f"There is no plan {mask} with the weights {weights} in the package or in reports/: make one with "
        "`python -m fluxnb plan --model …`, and give its file as `plan=`."
    )
