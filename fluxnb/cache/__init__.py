"""The caching engine: *when* to reuse the last step's result (gates) and *how* (predictors).

cache = Cache(FirstBlock(0.12), Hold())     # First Block Cache
undo = cache.apply(pipe)
pipe("a red apple on a white table")
cache.trace.computed                        # 11 of 28 steps
cache.gate.threshold = 0.2                  # the next image uses it
undo()
"""

from fluxnb import families
from fluxnb.cache.engine import Cache, first_block, prescribed
from fluxnb.cache.gates.base import Gate
from fluxnb.cache.gates.pairs import Both, Cascade, Either
from fluxnb.cache.gates.schedule import Schedule, even_mask
from fluxnb.cache.linear import Linear
from fluxnb.cache.predictors import L2P, Aligned, FreqCa, Hermite, Hold, Newton, Spectrum, Taylor
from fluxnb.cache.trace import Step, Trace

__all__ = [
    "L2P",
    "Aligned",
    "Both",
    "Cache",
    "Cascade",
    "Either",
    "FreqCa",
    "Gate",
    "Hermite",
    "Hold",
    "Linear",
    "Newton",
    "Schedule",
    "Spectrum",
    "Step",
    "Taylor",
    "Trace",
    "even_mask",
    "first_block",
    "prescribed",
]


def __getattr__(name: str):
    """The gates that `fluxnb.families` names: FirstBlock, TeaCache, Interval …"""
    for family in families.ALL:
        if family.gate is not None and family.gate.endswith(f":{name}"):
            return family.gate_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")
