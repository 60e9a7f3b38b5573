"""Other people's caches as they ship them, to stand beside the study's: those of diffusers and of cache-dit.

Each runs the library's own code on the pipeline's transformer. What is added: the steps are counted, nothing is carried
from one image to the next, and it comes off without a trace. A step counts as reused where the blocks behind those that
decide weren't run; a cache that spares only the attention inside every step computes all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from fluxnb import adapters
from fluxnb.cache.engine import cacheable
from fluxnb.cache.gates.base import RESIDUAL, checked_threshold
from fluxnb.cache.gates.schedule import Schedule
from fluxnb.cache.passes import around
from fluxnb.cache.trace import Step, Trace
from fluxnb.errors import UserError
from fluxnb.families import LIBRARY
from fluxnb.installed import needs
from fluxnb.technique import ANOTHER, CACHED, IDENTICAL, Changes, Technique, Unavailable
from fluxnb.techniques import kinds

On = tuple[Callable[[int | None], None], Callable[[], bool]]  # begins an image of so many steps; whether one was run


class _Library(Technique):
    """A library's cache on a transformer."""

    family = LIBRARY
    package: str
    version: str  # the adapter fits no other one
    mask: str
    reuses: bool

    @property
    def exact(self) -> str:
        return ANOTHER if self.reuses else IDENTICAL

    def apply(self, pipe):
        """Puts the library's cache on the pipeline's transformer; returns the function that takes it off.

        Raises:
            Unavailable: the library isn't installed, or isn't the version that this adapter was written for.
            UserError: the pipeline isn't FLUX, has a cache already, or too few blocks.
        """
        fits(self.package, self.version)
        transformer = cacheable(pipe)
        adapters.check(transformer, adapters.BLOCKS)

        def run(image, mine, given, call):
            if len(image.passes) > 1:
                raise UserError(f"{self.label} makes one pass a step here: leave true guidance off, or take it off.")
            if not mine.sure:
                begin(image.total)
            made = call()
            mine.state.steps.append(Step(mine.step, None if computed() else RESIDUAL))
            return made

        def new(image):
            self.trace = Trace()
            if self.mask:
                Schedule(self.mask).new_state(image.total)
            return self.trace

        self.trace = Trace()
        with Changes(self.label) as changes:
            begin, computed = self._on(pipe, transformer, changes)
            around(pipe, run, new, changes)
            changes.put(transformer, CACHED, self)
        return changes.take_back

    def _on(self, pipe, transformer, changes: Changes) -> On:
        raise NotImplementedError


def fits(package: str, version: str) -> None:
    """Raises Unavailable unless a package of exactly this version is installed."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise Unavailable(needs(package.replace("-", "_"))) from error
    if found != version:
        raise Unavailable(f"needs {package} {version}, and {found} is installed: the adapter fits that version only")


def _left_behind(transformer, names: tuple[str, ...], changes: Changes) -> None:
    """What a library puts on modules goes with it, also where the library leaves it there."""
    before = {m: {name: vars(m)[name] for name in names if name in vars(m)} for m in transformer.modules()}
    order = list(transformer._modules)  # which others read, and cache-dit changes

    def clean():
        for module, kept in before.items():
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(kept)
        for name in order:
            transformer._modules[name] = transformer._modules.pop(name)

    changes.callback(clean)


# --- diffusers ------------------------------------------------------------------------------------------------


class DiffusersCache(_Library):
    """A cache of diffusers' own, with the settings of its documentation. Source: diffusers 0.42.1, `hooks`.

    Its SeaCache is told by the adapter what FLUX's pipeline doesn't tell it: the step, its sigma and the latents' grid.

    Args:
        kind: a key of `kinds.DIFFUSERS_CACHES`.
        value: a threshold, or every how manyth step is computed; None: as the documentation has it.
        mask: MagCache computes exactly these steps, by ratios made for it: `1` computed, `0` reused.
    """

    package, version = "diffusers", "0.42.1"
    term, KINDS = "diffusers' own caches", tuple(kinds.DIFFUSERS_CACHES)

    def __init__(self, kind: str, value: float | None = None, mask: str = ""):
        if kind not in kinds.DIFFUSERS_CACHES:
            raise UserError(f"diffusers has no cache {kind!r}: choose one of {', '.join(kinds.DIFFUSERS_CACHES)}.")
        self.kind, self.mask, (self.title, usual, every) = kind, mask, kinds.DIFFUSERS_CACHES[kind]
        self.value = usual if value is None else value
        if mask and kind != kinds.MAG:
            raise UserError(f"diffusers' {self.title} takes no mask: only its MagCache can be made to follow one.")
        if mask:
            Schedule(mask)
        elif not every:
            self.value = checked_threshold(self.value)
        elif isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 1:
            raise UserError(f"An interval of {value!r} makes no sense: compute every 1st, 2nd, 3rd … step.")
        self.reuses = "0" in mask if mask else self.value > every
        self.trace = Trace()  # what was decided in the image that began last

    @property
    def name(self) -> str:
        return f"diffusers' {self.title}"

    @property
    def settings(self) -> dict:
        how = {"mask": self.mask} if self.mask else {"value": self.value}
        return {"library": self.package, "cache": self.kind, **how}

    @property
    def label(self) -> str:
        return f"diffusers {self.title} {self.mark}"

    @property
    def mark(self) -> str:
        return Schedule(self.mask).mark if self.mask else f"{self.value:g}"

    def _on(self, pipe, transformer, changes):
        _left_behind(transformer, ("_diffusers_hook", "_cache_config", "forward"), changes)
        changes.callback(lambda: transformer.is_cache_enabled and transformer.disable_cache())
        if self.kind == kinds.SEA:
            changes.put(transformer, "cache_context", _told(pipe, transformer.cache_context))
        transformer.enable_cache(config := self._config(pipe))
        registries = [r for m in transformer.modules() if (r := vars(m).get("_diffusers_hook"))]
        hooks = [hook for registry in registries for hook in registry.hooks.values()]

        def begin(total):
            for hook in hooks:
                if hasattr(hook, "state_manager"):
                    hook.state_manager._state_cache.clear()
                elif hasattr(hook, "state"):
                    hook.state.reset()
            if self.kind == kinds.MAG and total is not None:
                vars(config).update(vars(self._config(pipe, total)))

        return begin, self._computed(transformer)

    def _config(self, pipe, steps: int = 28):
        value: Any = self.value
        from diffusers import hooks
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        at = lambda: pipe.current_timestep  # noqa: E731
        if self.kind == kinds.MAG and self.mask:  # a ratio of 1 foretells no error, one of 10 more than the threshold
            ratios = [1.0 if sign == "0" else 10.0 for sign in self.mask]
            return hooks.MagCacheConfig(0.5, len(ratios), 0.0, len(ratios), ratios)
        if self.kind == kinds.MAG:  # the first ratios of its documentation's limit of three; 0 reuses nothing
            return hooks.MagCacheConfig(value, 3 if value else 0, num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS)
        return {
            kinds.FIRST: lambda: hooks.FirstBlockCacheConfig(value),
            kinds.SEA: lambda: hooks.SeaCacheConfig(value, raw_vision_callback=_latents),
            kinds.TAYLOR: lambda: hooks.TaylorSeerCacheConfig(value),
            kinds.TAYLOR_LITE: lambda: hooks.TaylorSeerCacheConfig(value, use_lite_mode=True),
            kinds.FASTER: lambda: hooks.FasterCacheConfig(
                value, attention_weight_callback=lambda _: 0.3, is_guidance_distilled=True,
                current_timestep_callback=at,
            ),
            kinds.PYRAMID: lambda: hooks.PyramidAttentionBroadcastConfig(value, current_timestep_callback=at),
        }[self.kind]()  # fmt: skip

    def _computed(self, transformer) -> Callable[[], bool]:
        """What tells, behind a step, whether its blocks were run."""
        first, last = transformer.transformer_blocks[0], transformer.proj_out
        holder = last if self.kind == kinds.TAYLOR_LITE else first
        if self.kind in (kinds.TAYLOR, kinds.FASTER, kinds.PYRAMID):
            return lambda: True
        (hook,) = vars(holder)["_diffusers_hook"].hooks.values()

        def told() -> bool:
            state = hook.state_manager.get_state()
            if self.kind == kinds.TAYLOR_LITE:
                return state.last_update_step == state.current_step
            return state.consecutive_cached == 0 if self.kind == kinds.SEA else state.should_compute

        return told


def _told(pipe, original):
    """`cache_context` with the step, its sigma and the number of steps, of the pipeline's scheduler."""

    def cache_context(name, **more):
        scheduler = pipe.scheduler
        begin = scheduler.begin_index or 0
        at = begin if scheduler.step_index is None else scheduler.step_index
        steps = {"step_index": at - begin, "num_inference_steps": len(scheduler.timesteps) - begin}
        return original(name, **{**steps, "sigma": float(scheduler.sigmas[at])} | more)

    return cache_context


def _latents(module, args, kwargs) -> list[torch.Tensor]:
    """The packed latents of each image on their grid, (channels, 1, height, width)."""
    tokens, width = kwargs["hidden_states"], int(kwargs["img_ids"][:, 2].max()) + 1
    return [one.T.reshape(tokens.shape[2], 1, -1, width) for one in tokens]


# --- cache-dit ------------------------------------------------------------------------------------------------

_LEFT = (
    "_context_manager", "_context_names", "_is_cached", "_is_patched", "_original_forward", "_forward_pattern",
    "_has_separate_cfg", "_context_kwargs", "_cached_steps", "_residual_diffs", "forward",
)  # fmt: skip


class CacheDiT(_Library):
    """cache-dit's DBCache: decides behind the first blocks, or follows a mask (SCM), and reuses by a calibrator.

    Source: vipshop/cache-dit 1.5.3.

    Args:
        threshold: of the first blocks' relative change; of no account where there is a mask.
        mask: steps that are computed, `1`, and reused, `0` (its policy `static`).
        calibrator: a key of `kinds.CALIBRATORS`.
        order: of TaylorSeer's.
        first: blocks that are run at every step, and decide.
        last: blocks at the end that are run at every step.
        warm_up: steps computed before anything is reused.
    """

    package, version, term = "cache-dit", "1.5.3", "cache-dit's DBCache and SCM"
    terms = {
        "F1B0": "of cache-dit: the first block is run at every step, and no last one",
        "SCM": "cache-dit's mask of the steps that are computed",
    }

    def __init__(
        self, threshold: float = 0.08, mask: str = "", calibrator: str = "hold", order: int = 1, first: int = 8,
        last: int = 0, warm_up: int = 8,
    ):  # fmt: skip
        if calibrator not in kinds.CALIBRATORS:
            raise UserError(
                f"cache-dit has no calibrator {calibrator!r}: choose one of {', '.join(kinds.CALIBRATORS)}."
            )
        if first < 1 or last < 0 or warm_up < 0:
            raise UserError(f"F{first}B{last} makes no sense: cache-dit runs one first block or more at every step.")
        if mask:
            Schedule(mask)
        self.threshold, self.mask, self.calibrator, self.order = checked_threshold(threshold), mask, calibrator, order
        self.first, self.last, self.warm_up = first, last, warm_up
        self.reuses = "0" in mask if mask else self.threshold > 0
        self.trace = Trace()

    @property
    def name(self) -> str:
        how = kinds.CALIBRATORS[self.calibrator].format(self.order)
        return f"cache-dit {'SCM' if self.mask else 'DBCache'}" + (f" + {how}" if how else "")

    @property
    def settings(self) -> dict:
        how = {"mask": self.mask} if self.mask else {"threshold": self.threshold, "warm_up": self.warm_up}
        order = {"order": self.order} if self.calibrator == kinds.TAYLOR else {}
        blocks = {"first": self.first, "last": self.last}
        return {"library": self.package, "calibrator": self.calibrator, **blocks, **how, **order}

    @property
    def label(self) -> str:
        return f"{self.name} {self.mark}, F{self.first}B{self.last}"

    @property
    def mark(self) -> str:
        return Schedule(self.mask).mark if self.mask else f"{self.threshold:g}"

    def _on(self, pipe, transformer, changes):
        cache_dit = _quiet()
        blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
        if self.first + self.last > blocks:
            raise UserError(
                f"{self.label} runs {self.first + self.last} blocks at every step, and this transformer has {blocks}: "
                "choose fewer (first, last)."
            )
        _left_behind(transformer, _LEFT, changes)
        changes.callback(cache_dit.disable_cache, transformer)
        cache_dit.enable_cache(transformer, **self._configs(28))
        context = lambda: transformer._context_manager.get_context(transformer._context_names[-1])  # noqa: E731

        def begin(total):
            cache_dit.refresh_context(transformer, **self._configs(total or len(self.mask) or 28))

        return begin, lambda: context().get_current_step() not in context().get_cached_steps()[-1:]

    def _configs(self, steps: int) -> dict:
        cache_dit = _quiet()
        settings: dict[str, Any] = {
            "Fn_compute_blocks": self.first,
            "Bn_compute_blocks": self.last,
            "num_inference_steps": steps,
        }
        if self.mask:
            ahead = len(self.mask) - len(self.mask.lstrip("1"))
            settings |= {"steps_computation_mask": [int(sign) for sign in self.mask], "max_warmup_steps": ahead}
            settings |= {"steps_computation_policy": "static", "residual_diff_threshold": math.inf}
        else:
            settings |= {"max_warmup_steps": self.warm_up, "residual_diff_threshold": self.threshold}
        calibrator = {
            "hold": lambda: None,
            kinds.TAYLOR: lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order),
            "foca": cache_dit.FoCaCalibratorConfig,
            "dmd": cache_dit.DMDCalibratorConfig,
        }[self.calibrator]()
        return {"cache_config": cache_dit.DBCacheConfig(**settings), "calibrator_config": calibrator}


def _quiet():
    """The package cache-dit, which otherwise logs a dozen lines for each image."""
    import cache_dit

    for name in logging.root.manager.loggerDict:
        if name.lower().startswith("cache_dit"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return cache_dit
