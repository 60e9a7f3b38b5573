"""The search for the cheapest setting under a floor, against the whole grid."""

import random

import pytest

from fluxnb.study import search


def problem(seed, lines=6, images=3):
    """Lines on which cost and quality fall: (point -> the values of its images, how many points each line has)."""
    draw, values, sizes = random.Random(seed), {}, []
    for n in range(lines):
        sizes.append(draw.randint(1, 9))
        cost, quality = draw.uniform(20, 28), [draw.uniform(35, 60) for _ in range(images)]
        for i in range(sizes[-1]):
            values[n, i] = [(cost, q) for q in quality]
            cost -= draw.uniform(0.5, 3)
            quality = [q - draw.uniform(0, 6) for q in quality]
    return values, sizes


def cheapest_of_all(values, floor):
    kept = [search.overall(own)[0] for own in values.values() if search.overall(own)[1] >= floor]
    return min(kept, default=None)


@pytest.mark.parametrize("floor", [20, 28, 35, 50])
def test_it_finds_the_grid_s_own_cheapest_with_fewer_images_where_lines_fall(floor):
    asked = made = 0
    for seed in range(50):
        values, sizes = problem(seed)
        found = search.cheapest(sizes, lambda p, i, v=values: v[p][i], 3, floor)
        least = cheapest_of_all(values, floor)
        assert (found.best is None) == (least is None)
        if found.best is not None:
            cost, worst = search.overall(values[found.best])
            assert cost == pytest.approx(least) and worst >= floor
        asked, made = asked + found.images, made + 3 * len(values)
    assert asked < 0.5 * made


def test_a_point_is_given_up_at_its_first_image_below_the_floor_and_none_is_made_twice():
    asked = []
    values = {(0, 0): [(9.0, 40.0), (9.0, 20.0), (9.0, 40.0)]}
    found = search.cheapest([1], lambda p, i: asked.append((p, i)) or values[p][i], 3, 30)
    assert found.best is None and asked == [((0, 0), 0), ((0, 0), 1)] and found.images == 2


def test_what_costs_no_less_than_the_best_is_not_made_further():
    values = {(0, 0): [(5.0, 40.0)] * 3, (1, 0): [(6.0, 40.0)] * 3}
    found = search.cheapest([1, 1], lambda p, i: values[p][i], 3, 30)
    assert found.best == (0, 0) and len(found.asked[1, 0]) == 1


def test_of_no_lines_nothing_is_found():
    assert search.cheapest([], lambda p, i: (0.0, 0.0), 3, 30) == search.Found()


def test_front_holds_what_nothing_dominates():
    values = {"a": (1, 5), "b": (2, 6), "c": (2, 5), "d": (3, 1), "e": (1, 5)}
    assert search.front(values) == ["a", "e", "b"]


def test_of_many_points_a_few_are_spread_evenly():
    assert search.spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert search.spread([1, 2], 5) == [1, 2] and search.spread([], 5) == []
