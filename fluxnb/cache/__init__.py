"""The caching engine: *when* to reuse the last step's result (gates) and *how* (predictors).

cache = Cache(FirstBlock(0.12), Hold())     # First Block Cache
undo = cache.apply(pipe)
pipe("a red apple on a white table")
cache.trace.computed                        # 11 of 28 steps
cache.gate.threshold = 0.2                  # the next image uses it
undo()
"""

from fluxnb.cache.engine import Cache, first_block, prescribed
from fluxnb.cache.gates import Both, Cascade, Either, FirstBlock, Gate, Interval, Schedule, TeaCache, even_mask
from fluxnb.cache.predictors import Hold, Taylor
from fluxnb.cache.trace import Step, Trace

__all__ = [
    "Both",
    "Cache",
    "Cascade",
    "Either",
    "FirstBlock",
    "Gate",
    "Hold",
    "Interval",
    "Schedule",
    "Step",
    "Taylor",
    "TeaCache",
    "Trace",
    "even_mask",
    "first_block",
    "prescribed",
]
