"""Predictors: what each is exact on, beside its reference, and in an image."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from fluxnb import rebuilt, recipes
from fluxnb.cache import (
    L2P,
    Aligned,
    Cache,
    FirstBlock,
    FreqCa,
    Hermite,
    Hold,
    Interval,
    Newton,
    Schedule,
    Spectrum,
    Taylor,
    TeaCache,
)
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.technique import SHARED, applied

MASKS = ["1100100001", "1011000100", "1110100100", "1000010010"]
STEPS = 10
ROWS = np.tril(np.random.default_rng(0).normal(size=(STEPS, STEPS)), -1).tolist()
LINEAR = [Hold(), Taylor(1), Taylor(2), Newton(1), Newton(2), Hermite(1), Hermite(), Spectrum(), L2P(ROWS)]
LINEAR += [Spectrum(1.0, 0.0), Spectrum(ridge=0.01, centred=True)]
ALL = [*LINEAR, FreqCa(), Aligned()]
NAMED = {"ids": lambda predictor: predictor.name}


def predicted(predictor, values, mask):
    """Reused step -> (what is predicted, what it is), of a trajectory (steps, ...) of tensors."""
    state, found = predictor.new_state(len(mask)), {}
    for step, computed in enumerate(mask):
        if computed == "1":
            predictor.computed(state, step, values[step])
        else:
            found[step] = (predictor.predict(state, step), values[step])
    return found


def polynomial(degree, steps=STEPS):
    coefficients = torch.randn(degree + 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(degree))
    return torch.stack([sum(c * (step / steps) ** k for k, c in enumerate(coefficients)) for step in range(steps)])


@pytest.mark.parametrize("predictor", LINEAR, **NAMED)
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_predicted_is_the_sum_by_the_weights(predictor, mask):
    values = torch.randn(STEPS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step, (made, _) in predicted(predictor, values, mask).items():
        at = [i for i in range(step) if mask[i] == "1"]
        weights = predictor.weights(at, step, STEPS)
        assert weights.shape == (len(at),) and weights.dtype == np.float64
        assert torch.allclose(made, torch.from_numpy(weights) @ values[at], atol=1e-10)


@pytest.mark.parametrize(
    ("predictor", "degree", "known"),
    [(Hold(), 0, 1), (Taylor(1), 1, 2), (Newton(1), 1, 2), (Newton(2), 2, 3), (Spectrum(1.0, 0.0), 4, 5)],
    ids=["hold", "Taylor 1", "Newton 1", "Newton 2", "Spectrum"],
)
def test_exact_on_polynomials_whatever_the_mask(predictor, degree, known):
    values = polynomial(degree)
    for mask in map("1".__add__, map("".join, itertools.product("01", repeat=STEPS - 1))):
        for step, (made, true) in predicted(predictor, values, mask).items():
            if mask[:step].count("1") >= known:
                assert torch.allclose(made, true, atol=1e-6), (mask, step)


def test_taylor_2_is_exact_on_quadratics_of_neither_even_nor_uneven_masks_and_newton_2_is():
    (taylor, true), (newton, _) = (predicted(p(2), polynomial(2), "1010100000")[6] for p in (Taylor, Newton))
    assert torch.allclose(newton, true) and not torch.allclose(taylor, true, atol=1e-3)


@pytest.mark.parametrize("predictor", [p for p in LINEAR if p.kind != "l2p"], **NAMED)
def test_what_does_not_change_stays_but_for_the_ridge_s_shrinking(predictor):
    at = [0, 1, 2, 4, 5]
    shrinks = isinstance(predictor, Spectrum) and predictor.ridge and not predictor.centred
    total = predictor.weights(at, 8, STEPS).sum()
    assert total < 0.99 if shrinks else total == pytest.approx(1)


# --- beside the references ---


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_diffusers_own(order):
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    theirs = TaylorSeerState(torch.bfloat16, order)
    ours, state = Taylor(order), Taylor(order).new_state()
    for step, computed in enumerate("1101000100"):
        theirs.current_step = step
        residual = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        if computed == "1":
            theirs.update((residual,))
            ours.computed(state, step, residual)
        else:
            (expected,) = theirs.predict()
            assert torch.allclose(ours.predict(state, step).float(), expected.float(), rtol=2e-2, atol=2e-2)


def published_hermite(differences, distance, scale):
    """`hermite_formula` of Tammytcl/FreqCa, flux/.../cache_utils.py, with its recurrence."""
    x, found = distance * scale, differences[0]
    before, now = 1.0, 2 * x
    for k in range(1, len(differences)):
        found = found + differences[k] * now / math.factorial(k) * scale**k
        before, now = now, 2 * x * now - 2 * k * before
    return found


@pytest.mark.parametrize("scale", [0.5, 0.71])
def test_hermite_is_the_published_formula(scale):
    values = torch.randn(STEPS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    predictor, mask, taylor = Hermite(2, scale), "1101000100", Taylor(2)
    state = taylor.new_state()
    for step, computed in enumerate(mask):
        if computed == "1":
            taylor.computed(state, step, values[step])
        else:
            expected = published_hermite(state["derivatives"], step - state["at"], scale)
            assert torch.allclose(predicted(predictor, values, mask)[step][0], expected)


def published_spectrum(at, values, index, steps, blend=0.5, ridge=0.1, degree=4):
    """`ChebyshevForecaster` and `Spectrum` of hanjq17/Spectrum, src/utils/basis_utils.py, at taylor_order 1."""
    taus = (torch.tensor([*at, index], dtype=torch.float64) - 0.5 * steps) * 2.0 / steps
    columns = [torch.ones_like(taus), taus]
    for _ in range(2, degree + 1):
        columns.append(2 * taus * columns[-1] - columns[-2])
    design = torch.stack(columns, 1)
    x, asked = design[:-1], design[-1:]
    factor = torch.linalg.cholesky(x.T @ x + ridge * torch.eye(degree + 1, dtype=torch.float64))
    fitted = asked @ torch.cholesky_solve(x.T @ values, factor)
    line = values[-1]
    if len(at) > 1:
        line = line + (index - at[-1]) / (at[-1] - at[-2]) * (values[-1] - values[-2])
    return (1 - blend) * line + blend * fitted[0]


def test_spectrum_is_the_published_forecaster():
    values = torch.randn(28, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = "1111101010010001000010000100"
    for step, (made, _) in predicted(Spectrum(), values, mask).items():
        at = [i for i in range(step) if mask[i] == "1"]
        assert torch.allclose(made, published_spectrum(at, values[at], step, 28))


def test_l2p_is_the_published_recursion():
    values = torch.randn(STEPS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for mask in MASKS:
        kept = []  # `update_learnable` keeps the predictions of reused steps, too
        for step, computed in enumerate(mask):
            before = torch.tensor(ROWS[step][:step], dtype=torch.float64)
            kept.append(values[step] if computed == "1" else before @ torch.stack(kept))
            if computed == "0":
                assert torch.allclose(predicted(L2P(ROWS), values, mask)[step][0], kept[-1])


def test_l2p_s_weights_of_one_mask_are_those_it_is_made_of():
    predictor = L2P.of({3: {0: 0.25, 2: 0.75}, 4: {2: 2.0, 1: -1.0}}, 5, "planned")
    assert predictor.name == "planned" and predictor.weights([0, 1, 2], 4).tolist() == [0, -1, 2]
    assert predictor.weights([0, 1, 2], 3).tolist() == [0.25, 0, 0.75]


def published_freqca(values, at, index, rows, columns, cutoff=0.1):
    """`decomposition_DCT` and `cache_step` of Tammytcl/FreqCa, flux/.../cache_utils.py."""
    from scipy.fft import dctn, idctn

    down, across = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    radius = np.sqrt(down**2 + across**2)
    low_mask = (radius <= cutoff * radius.max())[None, ..., None]
    parts = []
    for mask, high in ((low_mask, False), (~low_mask, True)):
        taylor = Taylor(2)
        state = taylor.new_state()
        for step in at:
            grid = values[step].numpy().reshape(-1, rows, columns, values.shape[-1])
            part = idctn(dctn(grid, norm="ortho", axes=(1, 2)) * mask, norm="ortho", axes=(1, 2))
            taylor.computed(state, step, torch.from_numpy(part.reshape(values[step].shape)))
        distance = index - state["at"]
        known = state["derivatives"] if high else state["derivatives"][:1]
        parts.append(published_hermite(known, distance, 0.71))
    return parts[0] + parts[1]


@pytest.mark.parametrize("rows, columns", [(8, 8), (6, 10)])
def test_freqca_is_the_published_split(rows, columns):
    values = torch.randn(8, 2, rows * columns, 5, generator=torch.Generator().manual_seed(4))
    ids = torch.stack(torch.meshgrid(*map(torch.arange, (1, rows, columns)), indexing="ij"), -1)
    predictor = FreqCa()
    state = predictor.new_state(8)
    predictor.called(state, {"img_ids": ids.reshape(-1, 3), "hidden_states": values[0]})
    at = [0, 1, 3]
    for step in at:
        predictor.computed(state, step, values[step])
    expected = published_freqca(values, at, 6, rows, columns)
    assert torch.allclose(predictor.predict(state, 6), expected.float(), atol=1e-4)
    assert not torch.allclose(expected.float(), Hold().weights(at, 6)[-1] * values[3], atol=1e-2)


def test_gamma_is_the_published_one_and_stays_on_the_device(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    probes, totals = (torch.randn(4, 1, 6, 8, generator=generator) for _ in range(2))
    probes[3] = probes[0] + 1.3 * (probes[2] - probes[0])
    predictor = Aligned()
    state = predictor.new_state(8)
    for step, k in ((0, 1), (1, 0), (2, 2)):
        predictor.probed(state, probes[k])
        predictor.computed(state, step, totals[k] - probes[k])
    predictor.probed(state, probes[3])
    for read in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, read, lambda *a: pytest.fail("the device was waited for"))
    made = predictor.predict(state, 4)
    monkeypatch.undo()
    moved, before = (probes[3] - probes[0]).abs().mean(), (probes[2] - probes[0]).abs().mean()
    gamma = (moved / before).clip(1, 1.5)
    assert gamma == pytest.approx(1.3, abs=1e-5)
    assert torch.allclose(made + probes[3], totals[0] + gamma * (totals[2] - totals[0]), atol=1e-5)


# --- in an image ---


def latents(pipe, steps=STEPS):
    model = pipelines.describe("embedded")
    return pipelines.generate(pipe, ["a red apple on a table"], [3], model=model, steps=steps, output_type="latent")


class Before:
    """Hold (order 0) and Taylor as they were before predictors had weights: what committed rows were made with."""

    terms, settings, name, probes, whole, keeps = {}, {}, "before", False, False, 3
    called = probed = staticmethod(lambda *a: None)

    def __init__(self, order):
        self.order = order

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


EARLIER = pytest.mark.parametrize(
    "predictor, order", [(Hold(), 0), (Taylor(1), 1), (Taylor(2), 2)], ids=["0", "1", "2"]
)


@EARLIER
def test_hold_and_taylor_give_the_images_that_they_gave(embedded_pipe, predictor, order):
    made = []
    for how in (predictor, Before(order)):
        with applied(embedded_pipe, Cache(Schedule("110100", first_block=False), how)):
            made.append(latents(embedded_pipe, 6))
    assert torch.equal(*made)


@EARLIER
def test_hold_and_taylor_round_as_they_rounded(predictor, order):
    values = torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(6)).bfloat16()
    now, then = (predicted(how, values, "1101001000") for how in (predictor, Before(order)))
    assert all(torch.equal(now[step][0], then[step][0]) for step in now) and len(now) == 6


@pytest.mark.parametrize("predictor", [p for p in (*LINEAR[3:8], LINEAR[-1], FreqCa(), Aligned())], **NAMED)
def test_it_predicts_in_an_image_and_says_what_it_is(embedded_pipe, predictor):
    cache = Cache(Interval(2, first_block=True, warm_up=4), predictor)
    plain = latents(embedded_pipe)
    with applied(embedded_pipe, cache):
        made = latents(embedded_pipe)
    assert cache.trace.mask == "1111101010" and cache.label.endswith(f" + {predictor.name}")
    with applied(embedded_pipe, Cache(Interval(2, first_block=True, warm_up=4))):
        held = latents(embedded_pipe)
    assert not torch.equal(made, held) and (made - plain).abs().mean() < 0.5 * plain.abs().mean()
    found = rebuilt.stack(cache.settings, cache.name, "")
    assert found.built[0].predictor.settings == predictor.settings and found.built[0].label == cache.label


@pytest.mark.parametrize("predictor", [*ALL, Hermite(1, 0.7), FreqCa(order=1)], **NAMED)
def test_a_script_spells_it(predictor):
    import fluxnb

    spelled = recipes.spelled(Cache(FirstBlock(0.2), predictor))
    again = eval(spelled, {name: getattr(fluxnb, name) for name in fluxnb.__all__})
    assert again.settings == Cache(FirstBlock(0.2), predictor).settings and type(again.predictor) is type(predictor)


def test_predictors_that_differ_have_other_settings_and_labels():
    made = [*ALL, Hermite(1, 0.7), Spectrum(0.8), Spectrum(degree=3), FreqCa(0.2), FreqCa(order=1), FreqCa(scale=0.5)]
    made += [L2P(np.zeros((3, 3)).tolist(), "planned")]
    settings, names = [m.settings for m in made], [m.name for m in made]
    assert len(set(names)) == len(names) and all(a != b for a, b in itertools.combinations(settings, 2))
    assert not [name for name in names if re.search("True|False|None|_", name)]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Taylor(3), "order 3"),
        (lambda: Newton(-1), "order -1"),
        (lambda: Newton(True), "order True"),
        (lambda: Hermite(0), "order 0"),
        (lambda: Hermite(2, 0), "scale"),
        (lambda: Spectrum(2), "blend"),
        (lambda: Spectrum(ridge=-0.1), "ridge"),
        (lambda: Spectrum(ridge="much"), "ridge"),
        (lambda: Spectrum(degree=0), "degree"),
        (lambda: FreqCa(cutoff=-1), "cutoff"),
        (lambda: FreqCa(order=5), "order 5"),
        (lambda: L2P([[0.0, 1.0], [1.0, 0.0]]), "before step i"),
        (lambda: L2P([[0.0], [1.0]]), "steps × steps"),
        (lambda: L2P([[math.nan]]), "finite"),
        (lambda: L2P("weights"), "finite"),
        (lambda: L2P.of({2: {3: 1.0}}, 4), "step 2 can't be made of step 3"),
        (lambda: L2P(ROWS).new_state(28), "of 10 steps and the generation has 28"),
        (lambda: L2P(ROWS).weights([0], 12), "of 10 steps"),
        (lambda: Cache(Interval(2), Aligned()), "runs it, such as FirstBlock or DiCache"),
        (lambda: Cache(TeaCache(0.3, (1.0, 0.0)), Aligned()), "runs it, such as FirstBlock or DiCache"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(make, said):
    with pytest.raises(UserError) as refused:
        make()
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_weights_of_other_steps_are_refused_in_an_image(embedded_pipe):
    with applied(embedded_pipe, Cache(Interval(2), L2P(ROWS))), pytest.raises(UserError, match="of 10 steps"):
        latents(embedded_pipe, 4)


def test_what_needs_the_whole_image_is_refused_where_tokens_are_divided_or_two_images(embedded_pipe):
    with applied(embedded_pipe, Cache(Interval(2), FreqCa())):
        setattr(embedded_pipe.transformer, SHARED, object())
        try:
            with pytest.raises(UserError, match="all tokens of an image on one rank"):
                latents(embedded_pipe, 2)
        finally:
            delattr(embedded_pipe.transformer, SHARED)
    state, ids = {}, torch.zeros(8, 3)
    with pytest.raises(UserError, match="8 aren't 1 × 1"):
        FreqCa().called(state, {"img_ids": ids, "hidden_states": torch.zeros(1, 8, 4)})
    assert Cache(FirstBlock(0.1), FreqCa()).predictor.whole
