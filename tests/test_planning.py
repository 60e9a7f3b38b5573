"""Masks by the field's ways, and plans: what is computed, of what the rest is made, and what to expect."""

import itertools
import json
import random

import numpy as np
import pytest
import small
import torch

from fluxnb.cache import Cache, Hold, Schedule, masks, planning
from fluxnb.cache.gates.schedule import even_mask
from fluxnb.errors import UserError
from fluxnb.params import load
from fluxnb.study.subject import Loaded, given
from fluxnb.technique import applied
from fluxnb.world import scenes

STEPS = 6
INPUTS = [("a red ball", 1), ("a cat", 2)]


# --- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "alpha", "mask"),
    [  # as its authors' code computes them
        (28, 0.75, "1111101010010001000010000100"),
        (28, 3.0, "1111101000010000000100000000"),
        (50, 0.75, "11111010100100010000100001000001000000100000001000"),
        (50, 3.0, "11111010000100000001000000000010000000000000100000"),
    ],
)
def test_spectrums_schedule_is_that_of_its_code(steps, alpha, mask):
    assert masks.spectrum(steps, alpha) == mask
    Schedule(mask)


def test_a_schedule_that_shrinks_makes_no_sense():
    for wrong in ({"steps": 0}, {"alpha": -1}, {"warm_up": 0}, {"interval": 0.5}):
        with pytest.raises(UserError, match="makes no sense"):
            masks.spectrum(**{"steps": 28} | wrong)


def every(computed, steps):
    for chosen in itertools.combinations(range(1, steps), computed - 1):
        yield "".join("1" if i in (0, *chosen) else "0" for i in range(steps))


def test_annealing_finds_the_best_of_all_masks_and_asks_once_for_each():
    wanted, asked = "101000010010", []

    def loss(mask):
        asked.append(mask)
        return sum(a != b for a, b in zip(mask, wanted, strict=True)) / 12

    assert masks.annealed(loss, 12, 4) == wanted
    assert len(asked) == len(set(asked))
    assert all(mask[0] == "1" and mask.count("1") == 4 for mask in asked)
    assert masks.annealed(loss, 12, 4) == masks.annealed(loss, 12, 4)  # drawn from a seed


def published_search(loss, steps, nfe, seed):
    """BudCache's stage1_search_flux.py, written out: lists of cached steps, its draws in its order."""
    rng, prefix, known = random.Random(seed), max(1, nfe // 4), {}

    def of(cache):
        if (key := tuple(sorted(cache))) not in known:
            known[key] = loss("".join("0" if i in cache else "1" for i in range(steps)))
        return known[key]

    def cache_of(compute):
        return [i for i in range(1, steps) if i not in set(compute)]

    def candidate(cache):
        compute = sorted(set(range(steps)) - set(cache))
        movable, targets = [c for c in compute if c >= prefix], [c for c in cache if c >= prefix]
        if rng.random() < 0.9 or len(movable) < 2 or len(targets) < 2:
            src = rng.choice(movable)
            if rng.random() < 0.7:
                local = [t for t in targets if abs(t - src) <= 3]
                dst = rng.choice(local) if local else rng.choice(targets)
            else:
                dst = rng.choice(targets)
            srcs, dsts = [src], [dst]
        else:
            srcs, dsts = rng.sample(movable, 2), rng.sample(targets, 2)
        return cache_of((set(compute) - set(srcs)) | set(dsts))

    def neighbours(cache):
        compute, found = [i for i in range(steps) if i not in cache], []
        for p, k in enumerate(compute):
            for j in range(max(prefix, k - 3), min(steps - 1, k + 3) + 1) if k >= prefix else ():
                if j not in compute:
                    found.append(sorted([*compute[:p], j, *compute[p + 1 :]]))
        slots = list(range(prefix, steps))
        for p, k in enumerate(compute):
            for _ in range(2 if k >= prefix else 0):
                if (target := rng.choice(slots)) not in compute:
                    found.append(sorted([*compute[:p], target, *compute[p + 1 :]]))
        return [cache_of(compute) for compute in dict.fromkeys(map(tuple, found))]

    chosen = set(range(prefix)) | set(rng.sample(list(range(prefix, steps)), nfe - prefix))
    now = [i for i in range(steps) if i not in chosen]
    least, best, now_loss = float("inf"), [], of(now)
    for it in range(200):
        temp = 0.05 * (1e-5 / 0.05) ** (it / 200)
        other = candidate(now)
        delta = of(other) - now_loss
        if delta < 0 or rng.random() < np.exp(-delta / temp):
            now, now_loss = other, of(other)
            if now_loss < least:
                least, best = now_loss, now
    for _ in range(20):
        local, local_loss = None, now_loss
        for other in neighbours(now):
            if of(other) < local_loss:
                local, local_loss = other, of(other)
        if local is None:
            break
        now, now_loss = local, local_loss
        if now_loss < least:
            least, best = now_loss, now
    return "".join("0" if i in best else "1" for i in range(steps)), len(known)


@pytest.mark.parametrize("steps, computed", [(12, 4), (28, 8), (28, 14)])
def test_annealing_is_the_published_search_draw_by_draw(steps, computed):
    height = np.random.default_rng(1).random((steps, steps)) / 20

    def loss(mask):
        asked.append(mask)
        at = [i for i, sign in enumerate(mask) if sign == "1"]
        return float(sum(height[a, b] for a, b in itertools.pairwise(at)))

    for seed in range(5):
        asked: list[str] = []
        ours = masks.annealed(loss, steps, computed, seed), len(asked)
        assert ours == published_search(loss, steps, computed, seed)


@pytest.mark.parametrize("computed", [1, 12])
def test_annealing_has_nothing_to_move_at_the_ends(computed):
    assert masks.annealed(lambda mask: 0.0, 12, computed).count("1") == computed


def test_the_programme_finds_the_least_cost_of_all_paths():
    cost = np.random.default_rng(0).random((8, 8, 8))

    def total(mask):
        at = [0, *(i for i, sign in enumerate(mask) if sign == "1"), 7]
        return sum(cost[at[n - 1], at[n], at[n + 1]] for n in range(1, len(at) - 1))

    for computed in (1, 3, 5, 7):
        assert masks.programmed(cost, computed) == min(every(computed, 7), key=total)


@pytest.mark.parametrize("computed", [0, 8])
def test_a_budget_that_there_is_none_of_is_refused(computed):
    for search in (lambda: masks.programmed(np.zeros((8, 8, 8)), computed), lambda: masks.annealed(len, 7, computed)):
        with pytest.raises(UserError, match="of 7 steps can't be computed"):
            search()


# --- plans ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return Loaded(given(small.MODEL, "float32", load("smoke").study), small.load(), 0.0, 0.0)


@pytest.fixture(scope="module")
def plans(loaded):
    return planning.make(loaded, INPUTS, STEPS, (STEPS, 4, 2), besides=[("a dog", 3)])


def test_a_plan_computes_its_budget_and_weighs_computed_steps_alone(plans):
    assert [plan.computed for plan in plans] == [STEPS, 4, 2]
    for plan in plans:
        assert plan.mask[0] == "1" and len(plan.mask) == STEPS and plan.images == len(INPUTS)
        assert [plan.mask[step] for step in plan.weights] == ["0"] * (STEPS - plan.computed)
        assert all(plan.mask[at] == "1" and at < step for step, own in plan.weights.items() for at in own)


def test_more_computed_steps_promise_a_better_image(plans):
    whole, more, less = plans
    assert more.predicted_db > less.predicted_db and not whole.differ


def test_a_plan_leads_nearer_to_the_uncached_image_than_holding_on_its_own_mask(loaded, plans):
    exact = small.image(loaded.pipe, STEPS, 7)
    for plan in plans[1:]:
        with applied(loaded.pipe, cache := plan.cache()):
            planned = small.image(loaded.pipe, STEPS, 7)
        assert cache.trace.mask == plan.mask
        with applied(loaded.pipe, Cache(Schedule(plan.mask, first_block=False), Hold())):
            held = small.image(loaded.pipe, STEPS, 7)
        assert (planned - exact).norm() < 0.9 * (held - exact).norm()


def test_rounding_to_8_bits_is_foretold_of_errors_of_any_size():
    draw = np.random.default_rng(0)
    exact = draw.uniform(60, 190, 200_000)
    for db in (25, 45, 65):
        off = exact + draw.normal(0, 255 * 10 ** (-db / 20), exact.size)
        measured = 20 * np.log10(255 / np.sqrt(np.mean((exact.round() - off.round()) ** 2)))
        assert planning.in_8_bits(db) == pytest.approx(measured, abs=0.2)


def test_what_is_foretold_lies_on_the_line_of_the_plans():
    gram = planning.Gram([np.eye(t + 1)[None] * (1 + t) for t in range(STEPS)])
    other = planning.Gram([np.ones((1, t + 1, t + 1)) * (1 + t) for t in range(STEPS)])
    tried = [
        planning.Plan((), mask, {}, 0.0, (float(planning.in_8_bits(2 * gram.db(mask) + 30)),), 1)
        for mask in every(4, STEPS)
    ]
    foretell = planning._calibrated([other, gram], tried)
    assert all(foretell(plan.mask) == pytest.approx(plan.each[0], abs=0.05) for plan in tried)
    alone = planning._calibrated([gram], tried[:1])  # of one mask its own
    assert alone(tried[0].mask) == pytest.approx(tried[0].each[0], abs=0.05)


def test_what_was_chosen_because_it_came_out_well_is_foretold_as_well_as_it_came_out(loaded):
    """Six masks of each number of steps are tried; the line is through the best ones, at few steps and at many."""
    made = planning.make(loaded, INPUTS, STEPS, (5, 4, 3, 2), besides=[("a dog", 3), ("a blue cube", 4)])
    for plan in made:
        assert len(plan.each) == 4 and plan.images == 2
        assert plan.predicted_db == pytest.approx(np.mean(plan.differ), abs=planning.in_8_bits(60) / 40)


def test_what_is_expected_of_a_mean_narrows_with_the_images():
    draw = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        own = draw.normal(40, 4, 48)
        plan = planning.Plan((), "10", {}, own.mean(), tuple(own), 24)
        covered += [low <= draw.normal(40, 4, 6).mean() <= high for low, high in [plan.expected(6)]]
    assert 0.92 < np.mean(covered) < 0.98
    widths = [high - low for low, high in map(plan.expected, (6, 24, 48))]
    assert widths == sorted(widths, reverse=True)
    assert planning.Plan((), "10", {}, 40.0, (40.0,), 1).expected(6) is None


def test_prompts_that_plan_are_of_the_families_that_judge_and_none_of_them():
    planned, judged = scenes.planning(24), scenes.judging(24)
    every = scenes.planning(sum(planning.PROMPTS))
    assert every[:24] == planned and len({*every}) == len(every) and not {*every} & {*scenes.judging(100)}
    family = lambda prompts: [scenes.parse(prompt)["family"] for prompt in prompts]  # noqa: E731
    assert family(planned) == family(judged)


def test_the_programmes_mask_is_the_best_of_all_for_a_straight_line():
    draw = np.random.default_rng(3)
    moved = draw.normal(size=(2, STEPS, 40)).cumsum(1)
    gram = planning.Gram([moved[:, : t + 1] @ moved[:, : t + 1].transpose(0, 2, 1) for t in range(STEPS)])

    def error(mask):
        at, total = [0, 0], 0.0
        for t, sign in enumerate(mask):
            if sign == "1":
                at = [at[1] if t else t, t]
            else:
                i, j = at
                line = moved[:, j] + (moved[:, j] - moved[:, i]) * ((t - j) / (j - i) if j > i else 0)
                size = np.sum([g[:, -1, -1] for g in gram.grams], axis=0)
                scale = gram.grams[t][:, -1, -1] / np.square(moved[:, t]).sum(1)
                total += float(np.mean(np.square(line - moved[:, t]).sum(1) * scale / size))
        return total

    for computed in (2, 4):
        assert planning.programmed(gram, computed) == min(every(computed, STEPS), key=error)


def test_annealing_asks_for_the_last_latents_of_cached_images(loaded):
    mask = planning.annealed(loaded, INPUTS[:1], 4, 2)
    assert mask in {*every(2, 4)}


def test_planning_leaves_the_pipeline_as_it_was(loaded):
    before = small.state(loaded.pipe)
    planning.make(loaded, INPUTS[:1], 3, (2,))
    assert not small.differences(before, loaded.pipe)


def test_what_steps_are_exact_combinations_of_costs_nothing_to_leave_out():
    """Residuals of rank 2: any two computed steps give all others, so one step's error is that of a single one."""
    moved = np.random.default_rng(0).normal(size=(3, 1, 2)) * np.ones((1, STEPS, 1))
    moved = np.concatenate([moved, np.ones((3, STEPS, 1)) * np.arange(STEPS)[:, None]], axis=2)
    gram = planning.Gram([moved[:, : t + 1] @ moved[:, : t + 1].transpose(0, 2, 1) for t in range(STEPS)])
    first = gram.mask(2)
    assert first.startswith("11")  # after two of them all is known
    assert gram.db(first) > gram.db("100100") + 20


def test_the_search_is_as_good_as_all_masks_of_a_small_image(loaded):
    uncached = planning._Trajectories.of(loaded, INPUTS, STEPS)
    gram = planning.Gram(planning._grams(uncached, loaded.pipe.transformer))
    for computed in (2, 3, 5):
        assert gram.db(gram.mask(computed)) == pytest.approx(max(map(gram.db, every(computed, STEPS))))


def test_a_plan_is_saved_and_read_back(plans, tmp_path):
    path = planning.save(plans[1:], tmp_path / planning.FILE)
    assert planning.read(path, STEPS) == {plan.computed: plan for plan in plans[1:]}


def test_a_plan_of_another_model_or_number_of_steps_is_one_sentence(loaded, plans, tmp_path):
    cache = plans[1].cache()
    with applied(loaded.pipe, cache), pytest.raises(UserError, match="has 6 steps but the generation has 5"):
        small.image(loaded.pipe, 5)
    with torch.no_grad():
        loaded.pipe.transformer.proj_out.weight.mul_(1.5)
    try:
        with pytest.raises(UserError, match="made for another model: make one"):
            cache.apply(loaded.pipe)
    finally:
        loaded.pipe.transformer.proj_out.weight.data.div_(1.5)
    path = planning.save(plans[1:], tmp_path / planning.FILE)
    with pytest.raises(UserError, match="plans of 6 steps and not of 28: make it with `--steps 28`"):
        planning.read(path, 28)
    with pytest.raises(UserError, match="There is no plan of another/model: make one with `python -m fluxnb plan"):
        planning.of("another/model", 28)


@pytest.mark.parametrize("wrong", ["", "{}", "[1]", '[{"mask": "10"}]', "null", "mask", "weights", "value", "others"])
def test_a_file_that_holds_no_plan_is_one_sentence(plans, tmp_path, wrong):
    path = planning.save(plans[1:2], tmp_path / planning.FILE)
    if wrong in ("mask", "weights", "value", "others"):
        (one,) = json.loads(path.read_text())
        one |= {
            "mask": {"mask": even_mask(4, 7)}, "weights": {"weights": {}}, "value": {"predicted_db": "good"},
            "others": {"others": {"another": even_mask(3, STEPS)}},
        }[wrong]  # fmt: skip
        wrong = json.dumps([one])
    path.write_text(wrong)
    with pytest.raises(UserError, match="holds no plans|has plans of no steps"):
        planning.read(path, STEPS)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="make it with `python -m fluxnb plan`"):
        planning.read(tmp_path / "none.json", 28)


@pytest.mark.parametrize("budget", [0, 7, 2.5, True])
def test_a_budget_that_is_none_is_refused_before_an_image(loaded, budget):
    with pytest.raises(UserError, match="give whole numbers from 1 to 6"):
        planning.make(loaded, INPUTS, STEPS, (budget,))


def test_the_embedded_models_plans_are_its_own_and_promise_less_the_less_they_compute(embedded_pipe):
    plans = planning.of("embedded", 28)
    assert sorted(plans, reverse=True) == list(planning.BUDGETS)
    promised = [plans[budget].predicted_db for budget in planning.BUDGETS]
    assert promised == sorted(promised, reverse=True)
    for plan in plans.values():
        plan.cache().gate.meet(embedded_pipe)  # or it says that they are another model's
