"""Pareto local search against an exhaustive front."""

import itertools

from fluxnb.study import search


def problem(point):
    """Two ordered axes that trade cost for quality, and a category that is better but dearer."""
    a, b, kind = point
    return 10 - a - b + 2 * kind, 30 - a * a - 0.5 * b * b + 5 * kind


AXES, ORDERED = [list(range(6)), list(range(6)), list(range(2))], [True, True, False]
ALL = {p: problem(p) for p in itertools.product(range(6), range(6), range(2))}


def test_front_holds_what_nothing_dominates():
    values = {"a": (1, 5), "b": (2, 6), "c": (2, 5), "d": (3, 1), "e": (1, 5)}
    assert search.front(values) == ["a", "e", "b"]


def test_search_finds_most_of_the_front_with_fewer_evaluations():
    asked = []
    found = search.pareto_local_search(AXES, ORDERED, lambda p: asked.append(p) or problem(p), limit=len(ALL) // 2)
    assert len(asked) == len(set(asked)) == len(found) <= len(ALL) // 2
    worst = (20.0, -20.0)
    best = search.hypervolume([ALL[p] for p in search.front(ALL)], worst)
    assert search.hypervolume([found[p] for p in search.front(found)], worst) >= 0.95 * best


def test_search_keeps_to_its_limit():
    assert len(search.pareto_local_search(AXES, ORDERED, problem, limit=5)) == 5


def test_search_begins_with_every_category_in_the_middle():
    assert search.starts(AXES, ORDERED) == [(3, 3, 0), (3, 3, 1)]


def test_neighbours_stay_inside():
    assert set(search.neighbours((0, 3, 0), AXES, ORDERED)) == {(1, 3, 0), (0, 2, 0), (0, 4, 0)}


def test_hypervolume_is_an_area():
    assert search.hypervolume([(1.0, 1.0), (2.0, 3.0)], worst=(4.0, 0.0)) == 3 * 1 + 2 * 2
    assert search.hypervolume([(5.0, 9.0)], worst=(4.0, 0.0)) == 0


def test_a_search_that_found_half_of_the_area_reached_half():
    every = {"a": (1.0, 1.0), "b": (2.0, 3.0), "c": (3.0, 0.5)}
    assert search.reached(every, every, worst=(4.0, 0.0)) == 1
    assert search.reached({"a": every["a"], "c": every["c"]}, every, worst=(4.0, 0.0)) == 3 / 7


def test_of_many_points_a_few_are_spread_evenly():
    assert search.spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert search.spread([1, 2], 5) == [1, 2] and search.spread([], 5) == []
