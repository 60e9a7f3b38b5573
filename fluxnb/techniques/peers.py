"""The field's methods side by side (notebook 14): which step is computed and how the others are had, by name.

Importing this imports no PyTorch: the techniques are made when a method is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fluxnb import families
from fluxnb.errors import UserError
from fluxnb.techniques import kinds

# Whose a method is: shipped by a library, published as a formula, of this study.
SHIPPED, PUBLISHED, OWN = "library", "published", "new here"
EQUAL = "equal mask"
PLANNED = "planned mask and weights"


@dataclass(frozen=True)
class Method:
    """A way to compute only some of the steps.

    Args:
        origin: SHIPPED, PUBLISHED or OWN.
        at: (model by name, steps, computed steps) -> its technique; None where it has none of that many.
        looks: whether what it reuses depends on the images made at once, so that each has to be made by itself.
    """

    origin: str
    at: Callable[[str, int, int], Any]
    looks: bool = False


def equal_mask(computed: int, steps: int) -> str:
    """The mask that methods are compared at: half of the computed steps first, the others evenly, the last among them.

    Raises UserError where so many can't be computed.
    """
    if not 2 <= computed <= steps:
        raise UserError(f"{computed} of {steps} steps can't be compared: at least the first and the last, at most all.")
    first = max(1, computed // 2)
    later, rest = computed - first, steps - first
    chosen = {*range(first), *(first - 1 + -(-(i + 1) * rest // later) for i in range(later))}
    return "".join("1" if i in chosen else "0" for i in range(steps))


def _reused(how: Callable[[Any], Any]) -> Callable[[str, int, int], Any]:
    """What is reused by a predictor, at the mask that all have."""

    def at(model: str, steps: int, computed: int):
        from fluxnb import cache

        schedule = cache.Schedule(equal_mask(computed, steps), first_block=False, origin=EQUAL)
        return cache.Cache(schedule, how(cache))

    return at


def _dit(calibrator: str, order: int = 1) -> Callable[[str, int, int], Any]:
    def at(model: str, steps: int, computed: int):
        from fluxnb.techniques.libraries import CacheDiT

        return CacheDiT(mask=equal_mask(computed, steps), calibrator=calibrator, order=order, first=1)

    return at


def _diffusers_mag(model: str, steps: int, computed: int):
    from fluxnb.techniques.libraries import DiffusersCache

    return DiffusersCache(kinds.MAG, mask=equal_mask(computed, steps))


def _diffusers_lite(model: str, steps: int, computed: int):
    from fluxnb.techniques.libraries import DiffusersCache

    # three steps, then every n-th from the fifth step on
    every = next((n for n in range(2, steps) if 3 + len(range(4, steps, n)) == computed), None)
    return every and DiffusersCache(kinds.TAYLOR_LITE, every)


def _even(model: str, steps: int, computed: int):
    from fluxnb import cache

    mask = cache.even_mask(computed, steps)
    return cache.Cache(cache.Schedule(mask, first_block=False, origin="even mask"), cache.Taylor(2))


def _spectrum(model: str, steps: int, computed: int):
    from fluxnb import cache
    from fluxnb.cache import masks

    made = (masks.spectrum(steps, alpha=n / 4) for n in range(1, 21))
    mask = next((mask for mask in made if mask.count("1") == computed), None)
    return mask and cache.Cache(cache.Schedule(mask, first_block=False, origin="Spectrum's mask"), cache.Spectrum())


def _planned(how: Callable[[Any], Any] | None = None, first_block: bool = False) -> Callable[[str, int, int], Any]:
    """The mask planned for a model, with the plan's weights or another predictor; None where it has no plan."""

    def at(model: str, steps: int, computed: int):
        from fluxnb import cache
        from fluxnb.cache import planning

        plan = _plan(model, steps, computed)
        if plan is None or how is None:
            return plan and plan.cache()
        return cache.Cache(planning.Planned(plan.mask, plan.signature, first_block), how(cache))

    return at


def _searched(name: str, how: Callable[[Any], Any]) -> Callable[[str, int, int], Any]:
    """The mask that a published search found on a model when it was planned for; None where it wasn't."""

    def at(model: str, steps: int, computed: int):
        from fluxnb import cache

        plan = _plan(model, steps, computed)
        mask = plan and plan.others.get(name)
        return mask and cache.Cache(cache.Schedule(mask, first_block=False, origin=f"{name}'s mask"), how(cache))

    return at


def _plan(model: str, steps: int, computed: int):
    """A model's plan of so many computed steps; None where it has none."""
    from fluxnb.cache import planning

    try:
        return planning.of(model, steps).get(computed)
    except UserError:  # `unplanned` says it
        return None


def unplanned(model: str, steps: int) -> str:
    """Why a model has no plans of so many steps; "" where it has."""
    from fluxnb.cache import planning

    try:
        planning.of(model, steps)
    except UserError as error:
        return str(error)
    return ""


METHODS: dict[str, Method] = {  # at a number of computed steps that is asked for
    "cache-dit, held": Method(SHIPPED, _dit("hold")),
    "cache-dit TaylorSeer 1": Method(SHIPPED, _dit(kinds.TAYLOR)),
    "cache-dit TaylorSeer 2": Method(SHIPPED, _dit(kinds.TAYLOR, 2)),
    "cache-dit FoCa": Method(SHIPPED, _dit("foca")),
    "cache-dit DMD": Method(SHIPPED, _dit("dmd")),
    "diffusers MagCache": Method(SHIPPED, _diffusers_mag),
    "diffusers TaylorSeer lite": Method(SHIPPED, _diffusers_lite),
    "held": Method(PUBLISHED, _reused(lambda cache: cache.Hold())),
    "Taylor 1": Method(PUBLISHED, _reused(lambda cache: cache.Taylor(1))),
    "Taylor 2": Method(PUBLISHED, _reused(lambda cache: cache.Taylor(2))),
    "Newton 2": Method(PUBLISHED, _reused(lambda cache: cache.Newton(2))),
    "HiCache": Method(PUBLISHED, _reused(lambda cache: cache.Hermite())),
    "Spectrum's polynomials": Method(PUBLISHED, _reused(lambda cache: cache.Spectrum())),
    "Spectrum centred": Method(OWN, _reused(lambda cache: cache.Spectrum(ridge=0.01, centred=True))),
    "FreqCa": Method(PUBLISHED, _reused(lambda cache: cache.FreqCa())),
    "Spectrum": Method(PUBLISHED, _spectrum),
    "even mask, Taylor 2": Method(PUBLISHED, _even),
    families.BUDCACHE: Method(PUBLISHED, _searched(families.BUDCACHE, lambda cache: cache.Hold())),
    families.DPCACHE: Method(PUBLISHED, _searched(families.DPCACHE, lambda cache: cache.Taylor(1))),
    PLANNED: Method(OWN, _planned()),
    "planned mask, Taylor 2": Method(OWN, _planned(lambda cache: cache.Taylor(2))),
    "planned mask, Spectrum": Method(OWN, _planned(lambda cache: cache.Spectrum())),
    "planned mask, DiCache's probe": Method(OWN, _planned(lambda cache: cache.Aligned(), first_block=True), True),
}


def _of_diffusers(kind: str) -> Callable[[float], Any]:
    def at(value):
        from fluxnb.techniques.libraries import DiffusersCache

        return DiffusersCache(kind, value)

    return at


def _dbcache(threshold: float):
    from fluxnb.techniques.libraries import CacheDiT

    return CacheDiT(threshold)


def _own(make: Callable[[Any, float], Any]) -> Callable[[float], Any]:
    def at(value):
        from fluxnb import cache

        return make(cache, value)

    return at


def _progressive(coarse: float):
    from fluxnb.techniques.progressive import Progressive

    return Progressive(coarse)  # type: ignore[arg-type]


def _para_attn(threshold: float):
    from fluxnb.cache.para_attn import ParaAttention

    return ParaAttention(threshold)


# What decides for itself, as its authors set it: name -> (origin, its technique at a setting, settings: theirs first)
SETTINGS: dict[str, tuple[str, Callable[[float], Any], tuple]] = {
    "diffusers FirstBlockCache": (SHIPPED, _of_diffusers(kinds.FIRST), (0.2, 0.12, 0.3, 0.4, 0.5, 0.8)),
    "diffusers MagCache by threshold": (SHIPPED, _of_diffusers(kinds.MAG), (0.06, 0.12, 0.24, 0.4)),
    "diffusers SeaCache": (SHIPPED, _of_diffusers(kinds.SEA), (0.25, 0.15, 0.4, 0.6)),
    "diffusers TaylorSeer": (SHIPPED, _of_diffusers(kinds.TAYLOR), (5, 3)),
    "diffusers FasterCache": (SHIPPED, _of_diffusers(kinds.FASTER), (2, 3)),
    "diffusers PAB": (SHIPPED, _of_diffusers(kinds.PYRAMID), (2, 3)),
    "cache-dit DBCache": (SHIPPED, _dbcache, (0.08, 0.12, 0.2, 0.3)),
    "para-attn": (SHIPPED, _para_attn, (0.12, 0.2, 0.3, 0.5)),
    "progressive": (PUBLISHED, _progressive, (8, 5, 12)),
    "SeaCache": (PUBLISHED, _own(lambda cache, t: cache.Cache(cache.SeaCache(t))), (0.3, 0.15, 0.5, 0.8)),
    "DiCache": (PUBLISHED, _own(lambda cache, t: cache.Cache(cache.DiCache(t), cache.Aligned())), (0.4, 0.2, 0.6, 0.8)),
}


def at_equal_steps(names: list[str], model: str, steps: int, computed: list[int]) -> dict[str, list]:
    """Name -> its techniques, one for each number of computed steps below all that it has."""
    counts = [count for count in computed if count < steps]
    made = {name: [METHODS[name].at(model, steps, count) for count in counts] for name in names}
    return {name: [technique for technique in found if technique] for name, found in made.items()}


def as_shipped(names: list[str], most: int) -> dict[str, list]:
    """Name -> its techniques at so many of its settings, that of its authors first."""
    return {name: [SETTINGS[name][1](value) for value in SETTINGS[name][2][:most]] for name in names}


def origin(name: str) -> str | None:
    """Whose a method is; None for what is none."""
    return METHODS[name].origin if name in METHODS else SETTINGS[name][0] if name in SETTINGS else None


def at_full_size(names: list[str], model: str, steps: int, computed: int, kind: str | None) -> list[tuple[tuple, dict]]:
    """(what is built in, name -> techniques): eager, over compiled blocks, and quantized under these.

    Hooks inside the blocks break their graphs, so diffusers' caches are tried without graph breaks and with them; its
    First Block Cache, whose decisions mean nothing on random weights, at a threshold that reuses nothing.
    """
    from fluxnb.techniques import Regional, TorchAO

    all_of = at_equal_steps(names, model, steps, [computed])
    hooks = {name: found for name, found in all_of.items() if found and found[0].settings.get("library") == "diffusers"}
    first = {name: [make(0)] for name, (_, make, _) in SETTINGS.items() if name.startswith("diffusers First")}
    found: list[tuple[tuple, dict]] = [((), all_of)]
    for below in ((), (TorchAO(kind),)) if kind else ((),):
        found += [((*below, Regional()), all_of if below else all_of | first)]
        found += [((*below, Regional(breaks=True)), hooks)] if hooks else []
    return found
