"""Named stacks: what stands in them, and in which order they are measured."""

import pytest

from fluxnb import params, rebuilt, recipes, stacks, techniques
from fluxnb.cache import even_mask, prescribed
from fluxnb.errors import UserError
from fluxnb.study import candidate

SCHEDULE = prescribed(even_mask(4, 8), "", first_block=False)


def parts(stack):
    return [t.label for t in stack.techniques]


def test_a_use_case_is_measured_compiled_quantized_and_cached():
    compiled, quantized, other, cached = stacks.of_use_case(["int8", "fp8 row"], SCHEDULE)
    names = [s.name for s in (compiled, quantized, other, cached)]
    assert names == [stacks.CASE_COMPILED, "int8, compiled", "fp8 row, compiled", stacks.CASE_CACHED]
    assert parts(cached) == ["TorchAO INT8", *parts(compiled), SCHEDULE.label] and cached.above == (SCHEDULE,)
    assert quantized.label == "int8, compiled: TorchAO INT8, compiled blocks, VAE compiled"
    eager = stacks.of_use_case(["int8"], SCHEDULE, compiled=False)
    assert [parts(s) for s in eager] == [["TorchAO INT8"], ["TorchAO INT8", SCHEDULE.label]]


def test_at_full_size_what_has_the_same_built_in_stands_together():
    names, more = list(stacks.WAYS), list(stacks.DIVIDED)
    found = stacks.at_full_size(names, more, 4, "fp8 row", SCHEDULE)
    built = [[t.label for t in stack.built] for stack in found]
    changes = sum(a != b for a, b in zip(built, built[1:], strict=False)) + 1
    assert changes == len({tuple(b) for b in built})
    asked = {stack.name for stack in found}
    assert asked >= {*names, *more} and len(asked) == len(found)
    without = {"all-gather, without overlap", "Ulysses, without overlap"}
    assert asked - {*names, *more} == without | set(stacks.recorded(quantized=True, cached=True))
    assert stacks.BOTH not in {s.name for s in stacks.at_full_size(names, [], 2, "fp8 row")}


def test_every_configuration_of_several_gpus_can_make_its_stacks():
    for name in (n for n in params.choices() if params.load(n).gpu.count > 1):
        chosen = params.load(name)
        given = chosen.given("11_parallel")
        made = stacks.at_full_size(
            given.full_size_ways or given.ways, given.stacks, chosen.gpu.count, given.quantization
        )
        assert len({s.name for s in made}) == len(made)


def test_a_stack_that_nobody_defines_is_refused():
    with pytest.raises(UserError, match="There is no stack 'twice': choose one of"):
        stacks.at_full_size(["twice"], [], 2, "fp8 row")


def test_the_shortlist_has_lean_stacks_alone_and_cached_and_those_that_have_everything():
    found = stacks.shortlist(list(stacks.SHORTLIST), "fp8 row", list(stacks.AROUND), 28, [12])
    names = [stack.name for stack in found]
    twice = len(stacks.LEAN) + len(stacks.FEWEST)
    assert len(set(names)) == len(names) == 2 * twice + 2 + len(stacks.AS_PUBLISHED)
    lean = found[: 2 * len(stacks.LEAN)]
    for alone, cached in zip(lean[0::2], lean[1::2], strict=True):
        assert alone.name in stacks.LEAN and parts(cached)[:-1] == parts(alone)
        assert parts(cached)[-1] == stacks.cache(28, 12).label
    around = {part.label for make in stacks.AROUND.values() for part in make()}
    for stack in lean:  # what showed no gain by itself is in none of them
        assert not {"fused QKV", "modulation ahead", "CUDA graph", *around} & set(parts(stack)), stack.name
    assert around and around <= set(parts(found[len(lean) + 1]))
    with pytest.raises(UserError, match="There is no stack 'lean': choose one of"):
        stacks.shortlist(["lean"], "fp8 row", [], 28, [12])


def test_a_lean_stack_comes_with_gentler_caches_where_they_are_asked_for():
    first, other = list(stacks.LEAN)[:2]
    found = stacks.shortlist([first, other], "fp8 row", [], 28, [12, 14, 18], [first])
    assert [stack.name for stack in found] == [
        first, f"{first}, cached", f"{first}, cached, every 3", f"{first}, cached, every 2", other, f"{other}, cached",
    ]  # fmt: skip
    every = [stack.techniques[-1].gate.every for stack in found if stack.above]
    assert every == [4, 3, 2, 4] and len({stack.label for stack in found}) == len(found)
    computed = [recipes.blind(stack.techniques[-1].gate, 28) for stack in found if stack.above]
    assert computed == [12, 14, 18, 12]
    assert len(stacks.caches(4, [12, 14, 18])) == 1  # which come to the same of four steps


def test_a_planned_cache_has_a_models_own_weights_or_the_embedded_models_mask_with_taylor_2():
    (own,) = stacks.planned("embedded", 28, [8, 9])  # of nine steps there is no plan
    (other,) = stacks.planned("flux-dev-random", 28, [8])
    assert own.gate.mask == other.gate.mask and recipes.blind(other.gate, 28) == 8
    mask = f"Schedule({own.gate.mask!r}, first_block=False, origin='planned mask')"
    assert recipes.spelled(other) == f"Cache({mask}, predictor=Taylor(2))"
    assert stacks.planned("flux-schnell-random", 4, [2]) == stacks.planned("embedded", 50, [14]) == []
    first, last = list(stacks.LEAN)[:2]
    found = stacks.shortlist([first, last], "fp8 row", [], 28, [12], [first], [other])
    assert [stack.name for stack in found] == [
        first, f"{first}, cached", f"{first}, planned 8 of 28", last, f"{last}, cached",
    ]  # fmt: skip
    for stack in found:  # a row names all that makes it again
        settings = {key: value for part in stack.techniques for key, value in part.settings.items()}
        again = rebuilt.stack(settings, stack.name, stack.name)
        assert {key: value for part in again.techniques for key, value in part.settings.items()} == settings


@pytest.mark.parametrize("steps, computed", [(4, 3), (8, 5), (9, 8), (28, 12), (50, 13)])
def test_the_stacks_cache_reuses_something_at_any_number_of_steps(steps, computed):
    assert recipes.blind(stacks.cache(steps, 12).gate, steps) == computed


def test_everything_is_what_its_word_says():
    """The word says what is in it, and not what that gains."""
    said, inside = stacks.TERMS["everything"], parts(stacks.divided("pulled, everything", 2, "fp8 row")[0])
    for words, technique in (
        ("compiled blocks", "compiled blocks"), ("fused", "fused GELU"), ("rows divided", "parallel VAE"),
        ("and compiled", "VAE compiled"), ("text encoders recorded", "text encoders, CUDA graph"),
        ("no search for hooks", "no search for hooks"), ("bytes on the device", "bytes on the device"),
    ):  # fmt: skip
        assert words in said and any(technique in part for part in inside), (words, inside)
    assert "gain" not in said


def test_a_label_leaves_no_technique_out():
    around, schedule = list(stacks.AROUND), stacks.cache(28, 12).label
    found = [*stacks.phases("fp8 row", around), *stacks.cached("fp8 row", around, 28, 12)]
    found += [
        *stacks.advanced(28, around, 0.4, 0.3),
        *stacks.shortlist(list(stacks.SHORTLIST), "int8", around, 28, [12]),
    ]
    for stack in found:
        assert stack.label.endswith(", ".join(parts(stack))), stack.name
    assert "every 4th step after the first 6, and the last + Taylor 2" in schedule


def of_one_gpu():
    """Every named stack of one GPU."""
    around = list(stacks.AROUND)
    found = [*stacks.phases("fp8 row", around), *stacks.cached("fp8 row", around, 28, 12)]
    found += [*stacks.advanced(28, around, 0.4, 0.3), *stacks.of_use_case(["int8"], SCHEDULE)]
    found += stacks.shortlist(list(stacks.SHORTLIST), "int8", around, 28, [12, 14, 18], list(stacks.LEAN))
    return [*found, *(stacks.compiled(name, kind) for name in stacks.COMPILED for kind in (None, "int8"))]


def test_the_order_knows_every_technique_and_is_that_of_every_named_stack():
    assert set(stacks._order) == {*techniques.__all__, "ParaAttention", "Cache"}
    for stack in of_one_gpu():
        assert stacks.ordered(reversed(stack.techniques)) == stacks.ordered(stack.techniques) == stack.techniques


def test_a_stack_is_made_again_from_the_settings_of_its_row():
    for stack in of_one_gpu():
        made = candidate.stacked(stack, 28)
        again = rebuilt.stack(made.settings, made.meaning["technique"], stack.name)
        assert [(t.name, t.settings) for t in again.techniques] == [(t.name, t.settings) for t in stack.techniques]
        assert again.name == stack.name


@pytest.mark.parametrize(
    "settings, technique",
    [
        ({"magic": 1}, "magic"),
        ({"quantization": "torchao int3"}, "TorchAO"),
        ({"vae": "compiled + parallel"}, "VAE"),
        ({"threshold": 0.2}, "stack"),  # of which gate?
        ({"every": 4, "order": 2}, "fixed interval"),  # of which predictor?
        ({"batching": 4, "fused_rope": True}, "users"),
    ],
    ids=str,
)
def test_settings_that_do_not_say_how_make_nothing(settings, technique):
    assert rebuilt.stack(settings, technique, "x") is None
