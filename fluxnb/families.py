"""The families of techniques: one record each, which charts, explorer, site and glossary read.

A family is what a row's `family` names. What is on a chart's line, which setting is turned on a slider, which colour it
has everywhere: nobody else keeps a list. A gate that can be chosen by hand names its class in `gate`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from fluxnb import notebooks as nb
from fluxnb.errors import UserError

# Predictors of a cache that are chosen by name.
PREDICTORS = ("hold", "Taylor 1", "Taylor 2", "Newton 2", "Hermite 2", "Spectrum", "FreqCa")
BUDCACHE, DPCACHE = "BudCache", "DPCache"  # methods whose masks are searched on a model


@dataclass(frozen=True)
class Family:
    """One family of techniques.

    Args:
        name: the field's standard term; the row's `family`.
        about: what it is, in one plain sentence.
        colour: of its marks in every chart, as #rrggbb (seaborn's palette for the colour-blind).
        marker: matplotlib's sign for its points.
        dial: the setting that is turned to trade speed for quality; "steps" for the number of steps; None for none.
        control: whether it is what the others have to beat, drawn with a dashed line.
        gate: "module:class" of the gate of a cache, built with `Gate.at(value, model)`.
        notebook: that measures it first of all.
    """

    name: str
    about: str
    colour: str = "#949494"
    marker: str = "o"
    dial: str | None = None
    control: bool = False
    gate: str | None = None
    notebook: str = ""

    @property
    def cache(self) -> bool:
        """Whether it is a cache with a gate of its own."""
        return self.gate is not None

    def gate_class(self):
        """The gate's class. Raises UserError for a family without one."""
        if self.gate is None:
            caches = ", ".join(f.name for f in ALL if f.cache)
            raise UserError(f"{self.name} is no cache with a gate: choose one of {caches}.")
        module, name = self.gate.split(":")
        return getattr(importlib.import_module(module), name)


_GATES = "fluxnb.cache.gates"

# fmt: off
BASELINE = Family(
    "baseline", "The pipeline as diffusers makes it, which everything else is compared with.",
    "#444444", "*", notebook=nb.NUMBER_FORMATS,
)
FEWER_STEPS = Family(
    "fewer steps", "The pipeline's own Euler solver with fewer denoising steps: what every technique has to beat.",
    "#8c8c8c", "s", "steps", control=True, notebook=nb.FIRST_BLOCK,
)
SECOND_ORDER = Family(
    "second-order solver", "DPM-Solver++ with fewer denoising steps: the stronger control.",
    "#b07aa1", "x", "steps", control=True, notebook=nb.COMBINED,
)
INTERVAL = Family(
    "fixed interval", "Computes every n-th step whatever the image: the control for caches that look.",
    "#ca9161", "v", "every", gate=f"{_GATES}.interval:Interval", notebook=nb.TEACACHE,
)
FIRST_BLOCK = Family(
    "First Block Cache", "Reuses what the blocks added while the first block's residual has changed little.",
    "#0173b2", "o", "threshold", gate=f"{_GATES}.first_block:FirstBlock", notebook=nb.FIRST_BLOCK,
)
TEACACHE = Family(
    "TeaCache", "Reuses while the accumulated change of the modulated input, rescaled by a polynomial, stays small.",
    "#de8f05", "^", "threshold", gate=f"{_GATES}.teacache:TeaCache", notebook=nb.TEACACHE,
)
MAGCACHE = Family(
    "MagCache", "Reuses while known ratios of the residual's sizes foretell a small error; never looks at the image.",
    "#56b4e9", "p", "threshold", gate=f"{_GATES}.magcache:MagCache", notebook=nb.TEACACHE,
)
SEACACHE = Family(
    "SeaCache", "Reuses while the accumulated change of the modulated input, filtered of noise, stays small.",
    "#bcbd22", ">", "threshold", gate=f"{_GATES}.seacache:SeaCache", notebook=nb.COMBINED,
)
DICACHE = Family(
    "DiCache", "Reuses while the accumulated change behind the first block, a probe, stays small.",
    "#e377c2", "<", "threshold", gate=f"{_GATES}.dicache:DiCache", notebook=nb.COMBINED,
)
COMBINED = Family(
    "combined cache", "TeaCache and First Block Cache on the same steps, by a rule.",
    "#029e73", "P", notebook=nb.COMBINED,
)
SCHEDULE = Family(
    "prescribed schedule", "A cache that computes the steps of a mask: it looks at nothing.",
    "#cc78bc", "D", notebook=nb.FINAL_STACK,
)
LIBRARY = Family(
    "library", "A cache of somebody else's, as its library ships it.",
    "#aa4499", "X", notebook=nb.PEERS,
)
PROGRESSIVE = Family(
    "progressive resolution", "The first steps at half the width and height, where noise hides what is small.",
    "#8c564b", "8", "coarse", notebook=nb.PEERS,
)
NUMBER_FORMAT = Family(
    "number format", "The whole pipeline in another floating-point format.",
    "#56b4e9", notebook=nb.NUMBER_FORMATS,
)
QUANTIZATION = Family(
    "quantization", "Weights, and with some formats activations, in fewer bits.",
    "#d55e00", notebook=nb.QUANTIZATION,
)
ATTENTION = Family(
    "attention kernel", "Another kernel for the same attention.",
    "#e69f00", notebook=nb.ATTENTION,
)
COMPILATION = Family(
    "compilation", "torch.compile, TensorRT or kernels recorded in a CUDA graph.",
    "#009e73", notebook=nb.COMPILATION,
)
FUSION = Family(
    "fused operations", "Operations put together, or ahead of the steps, so that less is moved between them.",
    "#0072b2", notebook=nb.COMPILATION,
)
HOST = Family(
    "host work", "Work that diffusers does on the host for every image, spared.",
    "#f0a3ff", notebook=nb.FINAL_STACK,
)
VAE = Family(
    "VAE", "How latents become pixels.",
    "#a6761d", notebook=nb.VAE,
)
PARALLEL = Family(
    "parallel inference", "One image divided over several GPUs.",
    "#7570b3", notebook=nb.PARALLEL,
)
REPLICAS = Family(
    "replicas", "Every GPU makes images of its own.",
    "#66a61e", notebook=nb.PARALLEL,
)
SERVING = Family(
    "serving", "A server under users or random arrivals.",
    "#1b9e77", notebook=nb.LOAD,
)
CEILING = Family(
    "ceiling", "What the machine reaches with nothing else to do: a product, an attention, a copy.",
    "#999999", notebook=nb.ENVIRONMENT,
)
STACK = Family(
    "stack", "Several techniques together, in the order in which they go on.",
    "#332288", notebook=nb.FINAL_STACK,
)
PUBLISHED = Family(
    "published", "Somebody else's figure.",
    "#d62728", "D", notebook=nb.FINAL_STACK,
)
# fmt: on

ALL = tuple(value for value in vars().copy().values() if isinstance(value, Family))


def named(name: str) -> Family:
    """The family that a row names. Raises UserError for a name that none has."""
    for family in ALL:
        if family.name == name:
            return family
    raise UserError(f"There is no family of techniques {name!r}: choose one of {', '.join(f.name for f in ALL)}.")
