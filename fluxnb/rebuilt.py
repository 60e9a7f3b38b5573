"""A stack made again from what a row says of it. Importing this imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from fluxnb import techniques as t
from fluxnb.errors import UserError
from fluxnb.stacks import Stack, ordered, spelled
from fluxnb.technique import Technique

_makers: dict[str, Callable[[dict], Technique]] = {  # the setting that only this technique has
    "scheduler": lambda s: t.DPMSolver(),
    "attention": lambda s: t.Attention(s["attention"]),
    "fused_qkv": lambda s: t.FusedQKV(double=s["fused_qkv"] is True),
    "quantization": lambda s: next(q for q in t.quantizers() if q.settings.items() <= s.items()),
    "fused_gelu": lambda s: t.FusedGELU(),
    "fused_rope": lambda s: t.FusedRoPE(),
    "late_scales": lambda s: t.LateScales(),
    "fused_norm": lambda s: t.FusedNorm(),
    "fp8_attention": lambda s: t.FP8Attention(simulated=s["fp8_attention"] == "simulated"),
    "compile": lambda s: {"blocks": t.Regional, "transformer": t.Whole, "tensorrt": t.TensorRT}[s["compile"]](
        *_given(s, "mode")
    ),
    "vae": lambda s: {"channels-last": t.ChannelsLast, "compiled": t.Compiled, "sliced": t.Sliced, "tiled": t.Tiled}[
        s["vae"]
    ](*_given(s, "vae_mode"), *_given(s, "tile")),
    "cuda_graph": lambda s: t.CudaGraph(blocks=s["cuda_graph"] == "blocks"),
    "text": lambda s: t.TextEncoders(record=s["text"] == "CUDA graph"),
    "modulation": lambda s: t.ModulationAhead(),
    "hooks": lambda s: t.NoHookSearch(),
    "pixels": lambda s: t.BytesOnDevice(),
}


def _given(settings: dict, name: str) -> list:
    return [settings[name]] if name in settings else []


def stack(settings: dict, technique: str, name: str) -> Stack | None:
    """The stack of one GPU that has these settings, all of them; None where they don't say how to make it.

    Args:
        settings: of all techniques, as a row has them.
        technique: the row's: of the last one, which of a cache is its family.
        name: of the stack; a reader's label where it has none.
    """
    try:
        found = [make(settings) for key, make in _makers.items() if key in settings]
        rest = {k: v for k, v in settings.items() if not any(k in part.settings for part in found)}
        found += [_cache(rest, technique)] if rest else []
    except (KeyError, StopIteration, TypeError, ValueError, UserError):
        return None
    said = {key: value for part in found for key, value in part.settings.items()}
    return spelled(name, ordered(found)) if said == settings else None


def _cache(settings: dict, technique: str) -> Technique:
    from fluxnb.cache import Cache, planning, predictors

    held = {"hold_controlnet": True} if settings.pop("hold_controlnet", False) else {}
    if "weights" in settings:
        return planning.planned(settings["mask"], settings["weights"], **held)
    how = predictors.of(settings)
    return Cache(_gate(settings, technique), how, **held)


def _gate(settings: dict, technique: str):
    """The gate that has these settings: which one a setting says that no other has, else the row's technique."""
    from fluxnb import cache, families

    gates = [family.gate_class() for family in families.ALL if family.cache]
    if "rule" in settings:
        pair = [settings[place] for place in ("first", "second")]
        rules = {"Cascade": cache.Cascade, "Either": cache.Either, "Both": cache.Both}
        own = [_gate(_but(one, {"gate"}), one["gate"]) for one in pair]
        return rules[settings["rule"]](*own, **_but(settings, {"rule", "first", "second"}))
    found = {"every": cache.Interval, "mask": cache.Schedule}
    looks = {name: gate for gate in gates for name in (gate.name, gate.family.name)}
    return next((found[key] for key in found if key in settings), looks.get(technique))(**settings)


def _but(settings: dict, names: set[str]) -> dict:
    return {key: value for key, value in settings.items() if key not in names}
