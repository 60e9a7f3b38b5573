"""Named stacks: what stands in them, and in which order they are measured."""

import pytest

from fluxnb import params, stacks
from fluxnb.cache import even_mask, prescribed
from fluxnb.errors import UserError

SCHEDULE = prescribed(even_mask(4, 8), "", first_block=False)


def parts(stack):
    return [t.label for t in stack.techniques]


def test_a_use_case_is_measured_compiled_quantized_and_cached():
    compiled, quantized, cached = stacks.of_use_case("int8", SCHEDULE)
    assert [s.name for s in (compiled, quantized, cached)] == [
        stacks.CASE_COMPILED, stacks.CASE_QUANTIZED, stacks.CASE_CACHED,
    ]  # fmt: skip
    assert parts(cached) == ["TorchAO INT8", *parts(compiled), SCHEDULE.label] and cached.above == (SCHEDULE,)
    assert quantized.label == "quantized, compiled: TorchAO INT8, compiled blocks, VAE compiled"


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
