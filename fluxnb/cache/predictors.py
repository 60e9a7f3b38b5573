"""How to reuse: a predictor estimates what the skipped blocks would have added to the image tokens.

The text tokens need no estimate: behind the last block FLUX uses the image tokens only.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fluxnb.cache.linear import Linear, differences, units, weighted
from fluxnb.cache.passes import grid
from fluxnb.errors import UserError


class Hold(Linear):
    """Adds what the skipped blocks added at the last computed step. Source: First Block Cache, TeaCache."""

    name = kind = "hold"
    terms = {name: "a reused step adds what the blocks added at the last computed one"}

    @property
    def settings(self):
        return {}

    def weights(self, at, index, total=None):
        return units(at)[-1]


class Taylor(Linear):
    """Extrapolates what the skipped blocks added, as a Taylor series over the step number.

    Derivatives are finite differences of the computed steps, as many as are known so far: the first one holds. They
    are kept instead of what was added, as published, and rounded as the pipeline is.
    Source: TaylorSeer (Liu et al., 2025), there for the output of each module, here for all blocks at once.

    Args:
        order: 1 (linear) or 2 (quadratic).
    """

    kind = "taylor"
    terms = {
        "Taylor 1": "a reused step adds what the last two computed ones say on a straight line",
        "Taylor 2": "the same on a parabola through the last three",
    }

    def __init__(self, order: int):
        self.order = _order(order, "Taylor")
        self.name = f"Taylor {order}"
        self.keeps = order + 1

    def weights(self, at, index, total=None):
        state = self.new_state(total)
        for step, unit in zip(at, units(at), strict=True):
            self.computed(state, step, unit)
        return self.predict(state, index)

    def new_state(self, total=None):
        return {"at": None, "derivatives": []}

    def computed(self, state, index, residual):
        derivatives = [residual]
        if state["at"] is not None:
            gap = index - state["at"]
            for before in state["derivatives"][: self.order]:
                derivatives.append((derivatives[-1] - before) / gap)
        state["at"], state["derivatives"] = index, derivatives

    def predict(self, state, index):
        gap, scale = index - state["at"], 1.0
        result = state["derivatives"][0]
        for i, derivative in enumerate(state["derivatives"][1:], start=1):
            scale *= gap / i
            result = result + scale * derivative
        return result


class Newton(Linear):
    """Extrapolates with the polynomial through the last computed steps, exact whatever the gaps between them.

    Taylor's second difference is that of a quadratic only where steps are even and near; Newton's divided differences
    are so on any mask. As many steps as are known so far: the first one holds. Source: Newton's interpolation; Lagrange
    forecasts in LinCa (2026, arXiv 2608.17973).

    Args:
        order: of the polynomial, 1 or 2; 1 is Taylor's.
    """

    kind = "newton"
    terms = {
        "Newton 1": "a reused step adds what the last two computed ones say on a straight line",
        "Newton 2": "a reused step adds what the parabola through the last three computed ones says",
    }

    def __init__(self, order: int):
        self.order = _order(order, "Newton")
        self.name = f"Newton {order}"
        self.keeps = order + 1

    def weights(self, at, index, total=None):
        found, last = np.zeros(len(at)), range(max(0, len(at) - self.keeps), len(at))
        for k in last:
            found[k] = math.prod((index - at[j]) / (at[k] - at[j]) for j in last if j != k)
        return found


class Hermite(Linear):
    """Taylor's finite differences with scaled Hermite polynomials of the distance in place of its powers.

    What was last added plus, for each order k, the k-th difference times scale^k H_k(scale d) / k!, d steps on, with
    H_1(x) = 2x and H_2(x) = 4x² - 2. Source: HiCache (2025, arXiv 2508.16984), with the scale of
    Archerkattri/hicache-plus-plus.

    Args:
        order: 1 or 2.
        scale: above 0, at most 1: how much the polynomials are contracted.
    """

    kind = "hermite"
    terms = {
        "Hermite 1": "Taylor 1 with HiCache's contracted Hermite polynomial of the distance instead of the distance",
        "Hermite 2": "Taylor 2 with HiCache's contracted Hermite polynomials of the distance instead of its powers",
    }

    def __init__(self, order: int = 2, scale: float = 0.5):
        self.order, self.scale = _order(order, "Hermite"), _share(scale, "The scale of Hermite polynomials")
        self.name = f"Hermite {order}" + (f", scale {scale:g}" if scale != 0.5 else "")
        self.keeps = order + 1

    @property
    def settings(self):
        return {**super().settings, "order": self.order}

    def weights(self, at, index, total=None):
        x = self.scale * (index - at[-1])
        polynomials = 1.0, 2 * x, (4 * x**2 - 2) / 2
        known = differences(at, self.order)
        return sum(polynomials[k] * self.scale**k * weights for k, weights in enumerate(known))


class Spectrum(Linear):
    """Chebyshev polynomials over the whole trajectory, fitted by ridge regression, mixed with a straight line.

    As published for the last block's output, here for what the blocks added. The ridge draws towards nothing; centred,
    what is fitted is the difference to the last computed step, so that it draws towards holding.
    Source: Spectrum (2026, arXiv 2603.01623; hanjq17/Spectrum); `centred` is this study's own.

    Args:
        blend: weight of the fit, 0 to 1; the rest is that of the line through the last two computed steps.
        ridge: 0 or more, what is added to the normal equations' diagonal.
        degree: of the highest polynomial, 1 or more.
        centred: whether the difference to the last computed step is fitted.
    """

    kind = "spectrum"
    terms = {
        "Spectrum": "a reused step adds what Chebyshev polynomials, fitted to all computed ones, and a line say",
        "Spectrum, centred": "the same, where what is fitted is the difference to the last computed step",
    }
    keeps = 100  # all of them
    STEPS = 50  # of the published code, taken where the number isn't known

    def __init__(self, blend: float = 0.5, ridge: float = 0.1, degree: int = 4, centred: bool = False):
        self.blend = _share(blend, "Spectrum's blend", zero=True)
        if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
            raise UserError(f"Spectrum's ridge is {ridge!r}: give a number of 0 or more.")
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise UserError(f"Spectrum's degree is {degree!r}: give a whole number of 1 or more.")
        self.ridge, self.degree, self.centred = ridge, degree, bool(centred)
        others = {"blend": (blend, 0.5), "ridge": (ridge, 0.1), "degree": (degree, 4)}
        said = [f", {name} {value:g}" for name, (value, usual) in others.items() if value != usual]
        self.name = "Spectrum" + ", centred" * self.centred + "".join(said)

    def weights(self, at, index, total=None):
        places = 2 * np.array([*at, index]) / (total or self.STEPS) - 1
        *known, asked = np.polynomial.chebyshev.chebvander(places, self.degree)
        basis = np.array(known)
        normal = basis.T @ basis + self.ridge * np.eye(self.degree + 1)
        fitted = basis @ (np.linalg.pinv(normal, hermitian=True) @ asked)
        if self.centred:
            fitted[-1] += 1 - fitted.sum()
        return self.blend * fitted + (1 - self.blend) * Newton(1).weights(at, index)


class L2P(Linear):
    """Weights of its own for every step, fitted to uncached trajectories of a model: a learned linear predictor.

    A step is a weighted sum of all steps before it; of a reused one its own prediction counts, as published, so the
    same weights serve any mask. Source: L2P (2026, arXiv 2604.26365; Aredstone/L2P-Cache), there for the transformer's
    output, here for what the blocks added.

    Args:
        matrix: steps × steps: row i has the weights of steps 0 to i - 1 for step i, and nothing behind them.
        origin: where they are from, for the label.
    """

    kind = "l2p"
    name = "L2P"
    terms = {name: "a reused step adds a weighted sum of those before it, with weights fitted to the model"}

    def __init__(self, matrix: Sequence[Sequence[float]], origin: str = ""):
        try:
            rows = np.asarray(matrix, dtype=np.float64)
        except (TypeError, ValueError):
            rows = np.full(1, np.nan)
        square = rows.ndim == 2 and rows.shape[0] == rows.shape[1] > 0
        if not square or not np.isfinite(rows).all() or np.triu(rows).any():
            raise UserError(
                "L2P needs steps × steps finite numbers as weights, in row i only those of the steps before step i."
            )
        self.matrix, self.rows = tuple(map(tuple, rows.tolist())), rows
        self.origin, self.keeps = origin, len(rows)
        self.name = origin or self.name

    @classmethod
    def of(cls, weights: Mapping[int, Mapping[int, float]], steps: int, origin: str = "") -> L2P:
        """From what each reused step takes of which step before it. UserError for a step that isn't before it."""
        rows = np.zeros((steps, steps))
        for step, own in weights.items():
            for before, weight in own.items():
                if not 0 <= before < step < steps:
                    raise UserError(f"Of {steps} steps, step {step} can't be made of step {before}.")
                rows[step, before] = weight
        return cls(rows.tolist(), origin)

    @property
    def settings(self):
        digest = hashlib.sha256(json.dumps(self.matrix).encode()).hexdigest()[:8]
        return {"predictor": self.kind, "weights": digest}

    def new_state(self, total=None):
        if total is not None and total != self.keeps:
            raise UserError(
                f"These weights are of {self.keeps} steps and the generation has {total}: fit them to as many."
            )
        return super().new_state(total)

    def weights(self, at, index, total=None):
        if index >= self.keeps:
            self.new_state(index + 1)  # which says so
        own, made = dict(zip(at, units(at), strict=True)), np.zeros((index + 1, len(at)))
        for step in range(index + 1):
            made[step] = own[step] if step in own else self.rows[step, :step] @ made[:step]
        return made[index]


class FreqCa(Linear):
    """Holds the low spatial frequencies of what the blocks added and extrapolates the others.

    The residual's 2-D cosine transform over the tokens' grid is divided at a share of the largest radius: below it the
    last computed step is held, above it Hermite polynomials of order 2 extrapolate. Source: FreqCa (Liu
    et al., 2025, arXiv 2510.08669; Tammytcl/FreqCa), there for the sum of all blocks' residuals too.

    Args:
        cutoff: share of the largest radius of frequencies that is low.
        order, scale: of the Hermite polynomials.
    """

    kind = "freqca"
    terms = {"FreqCa": "low spatial frequencies are held, the others extrapolated with Hermite polynomials"}
    whole = True

    def __init__(self, cutoff: float = 0.1, order: int = 2, scale: float = 0.71):
        self.cutoff, self.high = _share(cutoff, "FreqCa's cutoff", zero=True), Hermite(order, scale)
        self.order, self.scale = order, scale
        others = {"cutoff": (cutoff, 0.1), "order": (order, 2), "scale": (scale, 0.71)}
        said = [f", {name} {value:g}" for name, (value, usual) in others.items() if value != usual]
        self.name, self.keeps = "FreqCa" + "".join(said), order + 1

    def weights(self, at, index, total=None):
        """Those of the high frequencies; the low ones are Hold's."""
        return self.high.weights(at, index, total)

    def called(self, state, given):
        if "low" not in state:
            low = _low_frequencies(*grid(given, self.name), self.cutoff)
            state["low"] = torch.from_numpy(low).to(given["hidden_states"].device, torch.float32)

    def predict(self, state, index):
        high, low = self.weights(state["at"], index), Hold().weights(state["at"], index)
        residuals = [residual.float() for residual in state["residuals"]]
        apart = state["low"] @ (state["low"].T @ weighted(residuals, high - low))
        return (weighted(residuals, high) - apart).to(state["residuals"][-1].dtype)


class Aligned(Linear):
    """DiCache's predictor: how far the first block has moved says how far along their line the last two steps are.

    The older of the last two computed steps plus γ times the change to the newer, γ = mean |p - p_older| /
    mean |p_newer - p_older| of what the first block added, within 1 and 1.5. γ stays on the device. It needs a gate
    that runs the first block. Source: DiCache (ICLR 2026, arXiv 2508.17356; Bujiazi/DiCache).
    """

    kind = "aligned"
    name = "aligned"
    terms = {name: "a reused step adds what the last two computed ones say, as far on as the first block has moved"}
    keeps = 4  # both of the last two steps
    probes = True

    def new_state(self, total=None):
        return {"kept": [], "probe": None}

    def probed(self, state, first):
        state["probe"] = first

    def computed(self, state, index, residual):
        state["kept"] = [*state["kept"], (residual + state["probe"], state["probe"])][-2:]

    def predict(self, state, index):
        if len(state["kept"]) < 2:
            return state["kept"][-1][0] - state["probe"]
        (older, older_probe), (newer, newer_probe) = state["kept"]
        moved = torch.stack([(p - older_probe).abs().mean(dtype=torch.float32) for p in (state["probe"], newer_probe)])
        if self.group is not None:
            torch.distributed.all_reduce(moved, group=self.group)
        gamma = (moved[0] / moved[1]).nan_to_num(nan=1.0).clamp(1.0, 1.5).to(older.dtype)
        return older + gamma * (newer - older) - state["probe"]


def named(name: str) -> Linear:
    """A usual predictor by its name. Raises UserError for a name that none has."""
    if name not in USUAL:
        raise UserError(f"There is no predictor {name!r}: choose one of {', '.join(USUAL)}.")
    return copy.copy(USUAL[name])


def of(settings: dict) -> Linear | None:
    """The predictor that a cache's settings name, whose keys are taken out of them; None where they name none.

    Raises KeyError, TypeError or UserError for one that settings can't say.
    """
    if "predictor" not in settings:
        return None
    made = KINDS[settings.pop("predictor")]
    return made(**{name: settings.pop(name) for name in inspect.signature(made).parameters if name in settings})


def _order(order: int, name: str) -> int:
    if isinstance(order, bool) or order not in (1, 2):
        raise UserError(f"A {name} predictor of order {order!r} doesn't exist here: choose 1 or 2.")
    return int(order)


def _share(value: float, what: str, zero: bool = False) -> float:
    """A number above 0, or 0 where that is allowed, and at most 1. Raises UserError for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value <= 1) or (value == 0 and not zero):
        raise UserError(f"{what} is {value!r}: give a number {'of 0 or more' if zero else 'above 0'} and at most 1.")
    return value


@functools.lru_cache(maxsize=4)
def _low_frequencies(height: int, width: int, cutoff: float) -> np.ndarray:
    """The low ones of the orthonormal 2-D cosines on a grid of tokens: (tokens, as many as are low)."""

    def cosines(n: int) -> np.ndarray:
        found = np.cos(np.pi / n * (np.arange(n) + 0.5) * np.arange(n)[:, None]) * np.sqrt(2 / n)
        found[0] /= np.sqrt(2)
        return found

    radius = np.hypot(*np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    down, across = np.nonzero(radius <= cutoff * radius.max())
    return np.einsum("ky,kx->yxk", cosines(height)[down], cosines(width)[across]).reshape(height * width, -1)


USUAL = {p.name: p for p in (Hold(), Taylor(1), Taylor(2), Newton(2), Hermite(), Spectrum(), FreqCa())}  # by name
KINDS = {made.kind: made for made in (Taylor, Newton, Hermite, Spectrum, L2P, FreqCa, Aligned)}
