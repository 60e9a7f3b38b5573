"""What is put on a pipeline comes off it again, and only that: whatever came before, meanwhile and in between."""

import copy
import functools
import io
import itertools
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from small import CACHES, COMPILED, QUANTIZED, TECHNIQUES, differences, image, state

import fluxnb
from fluxnb import families, recipes
from fluxnb import techniques as t
from fluxnb.cache import Cache, Interval, first_block
from fluxnb.errors import UserError
from fluxnb.models import pipelines
from fluxnb.stacks import Stack
from fluxnb.study import survival, trials
from fluxnb.study.bench import Bench
from fluxnb.technique import ANOTHER, Technique, Unavailable, applied
from fluxnb.techniques import precision

ALL = TECHNIQUES | COMPILED
ON_WEIGHTS = ("FusedQKV", "FusedQKV of single blocks", "ModulationAhead", "FusedGELU", "FusedRoPE", *QUANTIZED)


@pytest.fixture(scope="module")
def pipe():
    return small.load()


@pytest.fixture(scope="module")
def least():
    return small.load(blocks=1)


@pytest.fixture(scope="module")
def plain(pipe):
    return image(pipe)


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and (error.type is Unavailable or text.endswith(".")), text
    return text


# --- every case of use, as the page has them --------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    return trials.Trials(Bench("cpu", "float32"))


EACH = {stack.name: stack for stack in trials.techniques()}
HERE = [name for name, stack in EACH.items() if not trials.compiles(stack)]


SOME = (  # whose code others of the list have, too, or that hardly touches the transformer: every sixth case
    *("TeaCache 0.6", "MagCache 0.3, at most 3 reused in a row", "TeaCache 0.3 or FBCache 0.4", "schedule 2 of 4"),
    *("TorchAO INT8", "Quanto INT8", "SVDQuant INT4 of rank 4 (simulated)", "SDPA FlashAttention 2"),
    *("VAE sliced", "VAE channels-last", "VAE tiles of 32", "bytes on the device", "no search for hooks"),
)


@pytest.mark.parametrize("name", HERE)
def test_in_every_case_the_image_is_right_or_a_sentence_says_why_not(bench, name):
    first, found = bench.tried(EACH[name], survival.PUT_ON), {}
    cases = survival.CASES[SOME.index(name) % 6 :: 6] if name in SOME else survival.CASES
    if first["status"] != "unavailable":
        found = {case.name: bench.tried(EACH[name], case) for case in cases}
    wrong = {case: cell for case, cell in found.items() if cell["proof"]["verdict"] in (survival.WRONG, survival.RAW)}
    assert not wrong and first["status"] != "error", wrong or first


NAMED = {case.name: case for case in survival.CASES}


def in_turn(lora_first: bool) -> survival.Case:
    """A new scheduler, an interrupt and two threads, one after the other, and a LoRA before them or after."""
    loaded, scaled, removed = NAMED["LoRA"].moments[0], *NAMED["LoRA first"].moments
    meanwhile = [moment for name in ("scheduler", "interrupt", "two threads") for moment in NAMED[name].moments]
    meanwhile = [replace(moment, alone=scaled.state if lora_first else survival.nothing) for moment in meanwhile]
    if lora_first:
        return survival.Case("LoRA before", "", (scaled, *meanwhile, removed), NAMED["LoRA first"].start)
    return survival.Case("LoRA inside", "", (*meanwhile, loaded, replace(removed, alone=survival.nothing)))


IN_TURN = [in_turn(lora_first) for lora_first in (True, False)]
HERE_TOO = [name for name in HERE if type(EACH[name].techniques[0]) in {type(make()) for make in TECHNIQUES.values()}]
PAIRS = list(itertools.permutations(HERE_TOO, 2))


def together(pairs) -> tuple[dict, list[bool]]:
    """What is wrong of pairs, which go on in that order; and whether each was refused as it was put on."""
    bench, wrong, refused = trials.Trials(Bench("cpu", "float32", steps=3)), {}, []
    for first, second in pairs:
        stack = Stack(f"{first}, {second}", (*EACH[first].techniques, *EACH[second].techniques))
        for case in IN_TURN:
            cell = bench.tried(stack, case)
            if cell["status"] == "error":
                wrong[stack.name, case.name] = cell
        refused.append(cell["proof"]["when"] == survival.PUT_ON.name)
    return wrong, refused


@pytest.mark.thorough
@pytest.mark.parametrize("first", HERE_TOO)
def test_every_two_techniques_together_are_right_or_a_sentence_whatever_happens_in_turn(first):
    wrong, refused = together(pair for pair in PAIRS if pair[0] == first)
    assert not wrong, wrong
    assert not all(refused) or EACH[first].techniques[0].family is families.QUANTIZATION


def test_some_two_techniques_together_are_right_or_a_sentence_whatever_happens_in_turn():
    wrong, refused = together([*PAIRS[::150], ("fused GELU", "TorchAO INT8")])
    assert not wrong, wrong
    assert not all(refused)


@pytest.mark.parametrize("name", ["Quanto", "GGUF", "NoHookSearch"])
def test_what_is_put_on_many_pipelines_and_never_taken_off_is_no_chain(least, name):
    from accelerate.hooks import AlignDevicesHook, SequentialHook
    from diffusers.hooks import group_offloading as groups
    from peft.tuners.tuners_utils import BaseTuner

    def theirs():
        return (BaseTuner.inject_adapter, AlignDevicesHook.init_hook, SequentialHook.init_hook,
                groups.GroupOffloadingHook.initialize_hook, groups._get_group_onload_device)  # fmt: skip

    for make in (name, "Quanto", "NoHookSearch"):
        TECHNIQUES[make]().apply(copy.deepcopy(least))
    before = theirs()
    TECHNIQUES[name]().apply(copy.deepcopy(least))
    assert theirs() == before


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_layers_whose_tensors_cannot_be_exchanged_refuse_group_offloading_whichever_way_it_comes(pipe, plain, kind):
    from diffusers.hooks import apply_group_offloading

    cpu, options = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    ways = (
        lambda: pipe.enable_group_offload(cpu, cpu, offload_type=kind, **options),
        lambda: pipe.transformer.enable_group_offload(cpu, cpu, offload_type=kind, **options),
        lambda: apply_group_offloading(pipe.transformer, cpu, cpu, offload_type=kind, **options),
        lambda: apply_group_offloading(pipe.transformer.transformer_blocks, cpu, cpu, offload_type=kind, **options),
    )
    with applied(pipe, t.Quanto("int8")):
        on, before = image(pipe), state(pipe)
        for way in ways:
            with pytest.raises(UserError, match="can't be offloaded in groups while Quanto INT8 is on"):
                way()
            assert not differences(before, pipe)
        weight = pipe.transformer.single_transformer_blocks[0].proj_mlp.weight
        inside = weight._data.data_ptr()
        weight.data = weight.data.clone()  # as diffusers would
        assert weight._data.data_ptr() == inside, "it moves now: nothing need be refused"
        assert torch.equal(image(pipe), on)
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", ["FusedQKV", *QUANTIZED])
def test_layers_offloaded_in_groups_already_are_not_exchanged(name):
    pipe, cpu = small.load(1), torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    before = state(pipe)
    with pytest.raises(Unavailable, match="^needs layers that"):
        TECHNIQUES[name]().apply(pipe)
    assert not differences(before, pipe)


@pytest.mark.parametrize("name", ["ModulationAhead", "Quanto", "SVDQuant", "NF4"])
def test_under_autocast_the_image_is_that_of_autocast(least, name):
    with torch.autocast("cpu", torch.bfloat16):
        plain = image(least)
        with applied(least, TECHNIQUES[name]()):
            made = image(least)
    assert torch.isfinite(made).all() and (made - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weights_of_int8_that_are_unpacked_compile_in_the_format_that_the_model_has_now(monkeypatch, kinds):
    monkeypatch.setattr(precision._Unpacking, "device", "cpu")  # a GPU's way
    pipe = small.load(1)
    pipe.transformer.to(kinds[0])
    with applied(pipe, t.TorchAO("int8 weight-only")), torch.no_grad():
        pipe.transformer.to(kinds[1])
        layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
        x = torch.ones(2, layer.in_features, dtype=kinds[1])
        made = torch.compile(layer._call_impl, fullgraph=True, backend="eager")(x)
        assert made.dtype == kinds[1] and torch.allclose(made, layer(x), rtol=0.05, atol=0.05)


def test_two_threads_leave_the_process_its_choice_of_kernels(pipe, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    from fluxnb.techniques import attention

    def slow(q, k, v):
        time.sleep(0.1)
        return q

    monkeypatch.setattr(attention, "scaled_dot_product_attention", slow)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, key, value, **_: slow(query, key, value)
    )
    made = torch.zeros(1, 1, 1, 8)
    ours = functools.partial(attention.function("math"), made, made, made)
    theirs = functools.partial(dispatch.dispatch_attention_fn, made, made, made, backend="_native_math")
    with applied(pipe, t.Attention("math")):
        for runs in ((ours, ours), (theirs, theirs), (ours, theirs)):
            threads = [threading.Thread(target=run) for run in runs]
            for thread in threads:
                thread.start()
                time.sleep(0.05)  # so that the second begins while the first chooses
            for thread in threads:
                thread.join()
            assert torch.backends.cuda.flash_sdp_enabled(), runs


COMPILING = {**EACH, **{stack.label: stack for gpu in recipes.known() for stack in trials.from_recipes(gpu)}}


def test_a_lora_is_right_or_a_sentence_under_every_recipe_whatever_gpu_it_is_for(bench):
    found = {stack.label: stack for gpu in recipes.known() for stack in trials.recipes_of_others(gpu, False)}
    made = {
        goal["stack"] for own in recipes.known().values() for goal in own["recipes"].values() if isinstance(goal, dict)
    }
    if len(recipes.known()) > 1:
        assert {stack.name for stack in found.values()} == made
    assert not any(map(trials.compiles, found.values()))
    cells = {label: bench.tried(stack, survival.LORA) for label, stack in found.items()}
    assert not {label: cell for label, cell in cells.items() if cell["status"] == "error"}


@pytest.mark.parametrize("name", [name for name, stack in COMPILING.items() if trials.compiles(stack)])
def test_what_compiles_is_right_too_at_another_size(bench, name):
    (size,) = [case for case in survival.CASES if case.name == "size"]
    cell = bench.tried(COMPILING[name], size)
    assert cell["status"] != "error", cell


class Broken(Technique):
    """A technique that goes wrong in a chosen way."""

    name = label = "broken"
    settings, family, exact = {}, families.SCHEDULE, ANOTHER

    def __init__(self, how):
        self.how = how

    def apply(self, pipe):
        def counted(*args, **given):
            calls.append(1)
            made = own(*args, **given)[0]
            if self.how == "raises" and len(calls) > 4:
                raise KeyError("block")
            if self.how == "deaf":
                return (kept.setdefault(len(calls) % 4, made.clone()),)
            return (made * (1 + 1e-3 * (self.how == "remembers" and len(calls) > 4)),)

        calls, kept, own = [], {}, pipe.transformer.forward
        pipe.transformer.forward = counted
        if self.how == "leaves":
            pipe.transformer.proj_out.weight.data.mul_(1.01)
        return lambda: vars(pipe.transformer).pop("forward")


@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("remembers", survival.WRONG),
        ("raises", survival.RAW),
        ("deaf", survival.WRONG),
        ("leaves", survival.WRONG),
        ("fine", survival.RIGHT),
    ],
)
def test_a_technique_that_goes_wrong_is_found(bench, how, verdict):
    (case,) = [case for case in survival.CASES if case.name == "LoRA"]
    cell = bench.tried(Stack(how, (Broken(how),)), case)
    assert cell["proof"]["verdict"] == verdict, cell
    assert (cell["status"] == "error") == (verdict != survival.RIGHT) == bool(cell["reason"])


def test_an_image_that_nothing_can_judge_is_not_called_right(bench):
    class Particular(Broken):
        def apply(self, pipe):
            if getattr(pipe.transformer, "peft_config", None):
                raise Unavailable("needs layers without a LoRA")
            return super().apply(pipe)

    cell = bench.tried(Stack("particular", (Particular("fine"),)), survival.LORA)
    assert (cell["proof"]["verdict"], cell["proof"]["when"]) == (survival.WRONG, "LoRA loaded")
    assert cell["reason"] == "nothing shows that the image is right: put on afterwards, it needs layers without a LoRA"


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "scheduler", "a pipeline"])
def test_a_pipeline_without_a_part_is_as_it_should_be_or_a_sentence(part):
    from diffusers import FluxPipeline

    refused = set()
    for given in (None, "a name", FluxPipeline) if part == "a pipeline" else (bench_parts() | {part: None},):
        pipe = FluxPipeline(**given) if isinstance(given, dict) else given
        for name, make in [*ALL.items(), ("CudaGraph", t.CudaGraph)]:
            try:
                make().apply(pipe)()
            except Unavailable as error:
                refused.add(name)
                assert str(error).startswith("needs ")
        with pytest.raises(UserError):
            fluxnb.accelerate(pipe, "h100/nothing") if isinstance(given, dict) else fluxnb.accelerate(pipe)
    most = {"transformer": "FusedQKV", "vae": "Sliced", "scheduler": "DPMSolver", "a pipeline": "Attention"}
    assert most.get(part, "TextEncoders") in refused


@functools.cache
def bench_parts() -> dict:
    return small.load(1).components


def test_a_transformer_of_other_blocks_is_a_sentence(least):
    from types import SimpleNamespace

    from diffusers import SD3Transformer2DModel

    few = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8}
    few |= {"num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "out_channels": 4}
    other = SimpleNamespace(transformer=SD3Transformer2DModel(pooled_projection_dim=64, **few))
    for name in ("FusedQKV", "FusedGELU", "FusedRoPE", "ModulationAhead", "Regional", *QUANTIZED):
        with pytest.raises(Unavailable, match="^needs "):
            ALL[name]().apply(other)
    for name in CACHES:
        with pytest.raises(UserError, match="needs a transformer that it knows"):
            ALL[name]().apply(other)


@pytest.mark.parametrize("name", CACHES)
def test_two_caches_are_a_sentence_whichever_comes_first(least, name):
    from diffusers import FirstBlockCacheConfig

    own = copy.deepcopy(least)  # diffusers' caches leave hooks behind
    with applied(own, TECHNIQUES[name]()), pytest.raises(UserError, match="has a cache already"):
        own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert not own.transformer.is_cache_enabled
    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UserError, match="has a cache already"):
        TECHNIQUES[name]().apply(own)


# --- on and off -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_comes_off_without_a_trace_and_only_once(pipe, plain, name):
    before = state(pipe)
    undo = TECHNIQUES[name]().apply(pipe)
    image(pipe)
    for _ in range(2):
        undo()
        assert not differences(before, pipe)
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", COMPILED)
def test_what_compiles_comes_off_without_a_trace(pipe, name):
    before = state(pipe)
    ALL[name]().apply(pipe)()
    assert not differences(before, pipe)


@pytest.mark.parametrize("first", ALL)
def test_two_techniques_come_off_in_any_order(pipe, plain, first):
    before = state(pipe)
    for second in ALL:
        undo = [ALL[first]().apply(pipe)]
        try:
            on_one = state(pipe)
            try:
                undo.append(ALL[second]().apply(pipe))
            except (Unavailable, UserError):
                assert not differences(on_one, pipe), second
                continue
            on_both = state(pipe)
            try:  # the first comes off alone, or says what is on top of it
                undo[0]()
                if first not in COMPILED and second not in COMPILED:
                    image(pipe, steps=2)
            except UserError as error:
                assert "take that off first" in str(error), second
                assert not differences(on_both, pipe), second
        finally:
            for one in reversed(undo):
                one()
        assert not differences(before, pipe), second
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", ALL)
def test_whatever_fails_half_way_leaves_the_pipeline_as_it_was(least, name):
    pipe = least
    ALL[name]().apply(pipe)()  # what runs in a process once only
    lines = _traced(pipe, name)
    before = state(pipe)
    for line, count in lines.items():
        for nth in {1 if name not in QUANTIZED else count, count}:  # the first and the last time that it runs
            with pytest.raises((_Injected, Unavailable)):
                _failing(lambda: ALL[name]().apply(pipe), line, nth)
            assert not differences(before, pipe), f"{line[0].name}:{line[1]}"


class _Injected(RuntimeError):
    pass


def _traced(pipe, name) -> dict[tuple, int]:
    """(file, line) of fluxnb that runs while a technique is put on -> how often."""
    found: dict[tuple, int] = {}

    def count(line):
        found[line] = found.get(line, 0) + 1

    undo = _tracing(lambda: ALL[name]().apply(pipe), count)
    undo()
    return found


def _failing(function, line, nth):
    left = [nth]

    def fail(at):
        if at == line:
            left[0] -= 1
            if not left[0]:
                raise _Injected

    return _tracing(function, fail)


def _tracing(function, seen):
    def each(frame, event, _):
        path = _own(frame.f_code.co_filename)
        if path is None or frame.f_code.co_name == "__exit__":
            return None
        if event == "line" and not _harmless(path, frame.f_lineno):
            seen((path, frame.f_lineno))
        return each

    before = sys.gettrace()
    sys.settrace(each)
    try:
        return function()
    finally:
        sys.settrace(before)


@functools.cache
def _own(filename: str) -> Path | None:
    path = Path(filename)
    return path if Path(fluxnb.__file__).parent in path.parents else None


@functools.cache
def _harmless(path: Path, line: int) -> bool:
    """Lines that can't fail: the end of a block, which is its first line again, and what is returned behind it."""
    return path.read_text().splitlines()[line - 1].strip().startswith(("return changes.take_back", "with "))


# --- what happens in between ------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [("bfloat16", "float32"), ("float16", "float32")])  # one move alone is a case above
@pytest.mark.parametrize("name", [*ON_WEIGHTS, "First Block Cache", "ChannelsLast"])
def test_a_pipeline_that_was_converted_meanwhile_is_the_one_that_was_converted(name, moves):
    expected, pipe = small.load(), small.load()
    undo = TECHNIQUES[name]().apply(pipe)
    image(pipe, steps=2)
    for kind in moves:
        try:
            pipe.to(getattr(torch, kind))
        except UserError as error:
            assert "take that off, convert" in str(error)
            break
        image(pipe, steps=2)
        expected.to(getattr(torch, kind))
    undo()
    assert torch.equal(image(pipe), image(expected))
    assert pipe.transformer.dtype == expected.transformer.dtype == pipe.vae.dtype


def test_built_in_layers_free_the_originals():
    import weakref

    pipe = small.load()
    layers = [weakref.ref(block.proj_mlp) for block in pipe.transformer.single_transformer_blocks]
    undo = t.TorchAO("int8 weight-only").apply(pipe)
    assert all(layer() is not None for layer in layers)
    del undo  # as the study does that builds it in
    assert all(layer() is None for layer in layers)
    image(pipe)


def _offloaded(pipe):
    """accelerate's hook as diffusers' model offloading puts it on and, behind every image, on again."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    def again():
        remove_hook_from_module(pipe.transformer, recurse=True)
        cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))

    pipe.maybe_free_model_hooks = again
    again()


@pytest.mark.parametrize("name", [*CACHES, "ModulationAhead", "FusedQKV", "TorchAO int8", "GGUF"])
def test_offloading_hooks_that_were_there_leave_a_technique_on(name, plain):
    pipe, reference = small.load(), small.load()
    with applied(reference, TECHNIQUES[name]()):
        expected = image(reference)
    _offloaded(pipe)
    undo = TECHNIQUES[name]().apply(pipe)
    for _ in range(3):
        assert torch.equal(image(pipe), expected)
    undo()
    assert torch.equal(image(pipe), plain)
    assert hasattr(pipe.transformer, "_hf_hook")


def test_a_cache_under_diffusers_hooks_stays_on_when_they_come_off(plain):
    from diffusers.hooks import HookRegistry, ModelHook

    pipe = small.load()
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(ModelHook(), "theirs")
    cache = Cache(Interval(2))
    undo = cache.apply(pipe)
    image(pipe)
    registry.remove_hook("theirs")
    assert cache.trace.computed < 4
    image(pipe)
    assert cache.trace.computed < 4
    undo()
    assert torch.equal(image(pipe), plain)


def test_what_the_user_wraps_around_a_cache_has_to_come_off_first(pipe, plain):
    undo = first_block(0.1).apply(pipe)
    own = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(UserError, match="what has changed its forward since is on top"):
        undo()
    pipe.transformer.forward = own
    undo()
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["FusedGELU", "FusedRoPE", "ModulationAhead", "FusedQKV"])
def test_group_offloading_that_comes_and_goes_leaves_a_technique_on(name, kind, plain):
    pipe, cpu = small.load(), torch.device("cpu")
    undo = TECHNIQUES[name]().apply(pipe)
    on = image(pipe)
    pipe.transformer.enable_group_offload(
        cpu, cpu, offload_type=kind, **({"num_blocks_per_group": 1} if "b" in kind else {})
    )
    assert torch.allclose(image(pipe), on, atol=1e-5)
    for module in pipe.transformer.modules():
        for hook in list(getattr(vars(module).get("_diffusers_hook"), "hooks", ())):
            module._diffusers_hook.remove_hook(hook, recurse=False)
    assert torch.allclose(image(pipe), on, atol=1e-5)
    undo()
    assert torch.equal(image(pipe), plain)


def test_layers_offloaded_one_by_one_are_called_under_fused_rope():
    from accelerate import cpu_offload

    pipe = small.load()
    with applied(pipe, t.FusedRoPE()):
        on = image(pipe)
        cpu_offload(pipe.transformer, torch.device("cpu"))
        assert torch.allclose(image(pipe), on, atol=1e-5)


@pytest.mark.parametrize("name", ["FusedQKV", "NF4", "GGUF", "Quanto"])
def test_layers_that_cannot_be_taken_apart_say_so_whichever_way_accelerate_comes(pipe, plain, name):
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    cpu, (block, *_) = torch.device("cpu"), pipe.transformer.transformer_blocks
    ways = (
        lambda: pipe.enable_sequential_cpu_offload(device="cpu"),
        lambda: cpu_offload(pipe.transformer, cpu),
        lambda: cpu_offload(block, cpu),
        lambda: add_hook_to_module(pipe.transformer, AlignDevicesHook(cpu, offload=True, place_submodules=True)),
    )
    with applied(pipe, TECHNIQUES[name]()):
        on, before = image(pipe), state(pipe)
        for way in ways:
            with pytest.raises(UserError, match="offload whole models"):
                way()
            assert not differences(before, pipe)
        cpu_offload_with_hook(pipe.transformer, cpu)
        with pytest.raises(UserError, match="offload whole models"):
            cpu_offload(pipe.transformer, cpu)
        assert hasattr(pipe.transformer, "_hf_hook") and torch.equal(image(pipe), on)
        remove_hook_from_module(pipe.transformer)
        assert torch.equal(image(pipe), on)
        cpu_offload(pipe.vae, cpu)  # which is none of its business
        remove_hook_from_module(pipe.vae, recurse=True)
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", ["TorchAO int8 weight-only", "SVDQuant"])
def test_layers_taken_apart_meanwhile_come_off_when_accelerates_hooks_have(name, plain):
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    cpu = torch.device("cpu")
    for way in (
        lambda pipe: cpu_offload(pipe.transformer, cpu),
        lambda pipe: add_hook_to_module(pipe.transformer, AlignDevicesHook(cpu, offload=True, place_submodules=True)),
    ):
        pipe = small.load()
        undo = TECHNIQUES[name]().apply(pipe)
        on = image(pipe)
        way(pipe)
        with pytest.raises(UserError, match="layers one by one is on top of it"):
            undo()
        assert torch.equal(image(pipe), on)
        remove_hook_from_module(pipe.transformer, recurse=True)
        undo()
        assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", ["DPMSolver", "FusedQKV", "FusedGELU", "GGUF", "Interval"])
@pytest.mark.parametrize("putting", [True, False])
def test_what_another_thread_does_during_an_image_works_or_is_a_sentence(pipe, plain, name, putting):
    """In the middle of a block, as threads that don't wait for one another would meet there."""
    undo, said, calls = [], [], []

    def change():
        try:
            undo.append(TECHNIQUES[name]().apply(pipe)) if putting else undo[0]()
        except UserError as error:
            said.append(str(error))

    def meanwhile(*_):
        calls.append(1)
        if len(calls) == 2:
            thread = threading.Thread(target=change)
            thread.start()
            thread.join(0.2)  # what waits for this call goes on behind it

    if not putting:
        undo.append(TECHNIQUES[name]().apply(pipe))
    hook = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(meanwhile)
    assert torch.isfinite(image(pipe)).all()
    hook.remove()
    assert name not in ("DPMSolver", "FusedQKV", "GGUF") or "wait until that is done." in said[0]
    for off in undo:
        off()
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("putting", [True, False])
def test_a_solver_that_a_callback_exchanges_is_a_sentence(pipe, plain, putting):
    words = [torch.ones(1, 8, pipe.transformer.config.joint_attention_dim)]
    words.append(torch.ones(1, pipe.transformer.config.pooled_projection_dim))
    undo = None if putting else t.DPMSolver().apply(pipe)

    def callback(pipe, *_):
        (undo or (lambda: t.DPMSolver().apply(pipe)))()
        return {}

    with pytest.raises(UserError, match="wait until that is done"):
        pipe(prompt_embeds=words[0], pooled_prompt_embeds=words[1], width=64, height=64, num_inference_steps=2,
             callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])  # fmt: skip
    if undo:
        undo()
    assert torch.equal(image(pipe), plain)


def test_a_cache_of_diffusers_own_goes_on_fused_blocks(pipe, plain):
    from diffusers import FirstBlockCacheConfig

    with applied(pipe, t.FusedGELU()):
        on = image(pipe)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
        assert torch.equal(image(pipe), on)
        pipe.transformer.disable_cache()
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", ["FusedQKV", "FusedGELU", "FusedRoPE", "ModulationAhead", "First Block Cache"])
def test_the_gradient_of_a_picture_goes_through_what_is_exact(pipe, name):
    config, words = pipe.transformer.config, torch.ones(1, 8, pipe.transformer.config.joint_attention_dim)
    pooled, start = torch.ones(1, config.pooled_projection_dim), torch.ones(1, 4, config.in_channels)
    guidance = torch.tensor([3.5]) if config.guidance_embeds else None

    def gradient():
        x = start.clone().requires_grad_()
        made = pipe.transformer(x, words, pooled, torch.tensor([0.5]), torch.zeros(4, 3), torch.zeros(8, 3), guidance)
        return torch.autograd.grad(made.sample.square().sum(), x)[0]

    expected = gradient()
    with applied(pipe, TECHNIQUES[name]()):
        assert torch.allclose(gradient(), expected, rtol=1e-3, atol=1e-4)


# --- what is the user's own -------------------------------------------------------------------------------


def test_projections_fused_twice_stay_right_whichever_comes_off(pipe, plain):
    for order in ((0, 1), (1, 0)):
        undo = [t.FusedQKV().apply(pipe), t.FusedQKV().apply(pipe)]
        for i in order:
            undo[i]()
            assert torch.allclose(image(pipe), plain, atol=1e-4)
        assert torch.equal(image(pipe), plain)


def test_the_users_own_fused_projections_are_kept(plain):
    pipe = small.load()
    with torch.no_grad():
        pipe.transformer.fuse_qkv_projections()
    fused = image(pipe)
    with applied(pipe, t.FusedQKV()):
        image(pipe)
    assert all(block.attn.fused_projections for block in pipe.transformer.transformer_blocks)
    assert torch.equal(image(pipe), fused)


def test_fusing_by_hand_meanwhile_is_a_sentence(pipe, plain):
    with applied(pipe, t.FusedQKV()):
        for method in (pipe.transformer.fuse_qkv_projections, pipe.transformer.unfuse_qkv_projections):
            with pytest.raises(UserError, match="fused by fused QKV"):
                method()
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_projections_are_not_fused_by_hand(pipe, plain, name):
    with applied(pipe, TECHNIQUES[name]()):
        on = image(pipe)
        with pytest.raises(UserError, match="can't be fused or separated"):
            pipe.transformer.fuse_qkv_projections()
        assert torch.equal(image(pipe), on)
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_weights_loaded_meanwhile_are_there_afterwards_or_a_sentence(name):
    pipe, other = small.load(), small.load()
    weights = {key: 1.1 * tensor for key, tensor in other.transformer.state_dict().items()}
    undo = TECHNIQUES[name]().apply(pipe)
    try:
        pipe.transformer.load_state_dict(weights)
        other.transformer.load_state_dict(weights)
    except UserError as error:
        assert "take that off, load them" in str(error)
    undo()
    assert torch.equal(image(pipe), image(other))


def test_a_forward_that_was_deleted_is_no_reason_to_stay(pipe, plain):
    for technique in (t.ModulationAhead(), first_block(0.5)):
        undo = technique.apply(pipe)
        image(pipe)
        del pipe.transformer.forward
        assert torch.equal(image(pipe), plain)
        undo()
        assert torch.equal(image(pipe), plain)


def pickled(part):
    """Through torch.save: plain pickle can't read float8 tensors back, whoever made them."""
    torch.save(part, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_copies_of_a_block_and_of_a_transformer_run_on_their_own_or_are_a_sentence(pipe, plain, name):
    with applied(pipe, TECHNIQUES[name]()):
        on, made = image(pipe), []
        for part in (pipe.transformer, pipe.transformer.single_transformer_blocks[0]):
            try:
                made += [copy.deepcopy(part), pickled(part)]
            except UserError as error:
                assert "can't be copied or pickled" in str(error)
        with torch.no_grad():
            for tensor in (x for part in made for x in part.parameters() if type(x.data) is torch.Tensor):
                tensor.zero_()
        assert torch.equal(image(pipe), on)
    assert torch.equal(image(pipe), plain)


def test_the_users_own_compilation_is_kept_before_and_after(pipe):
    (block, *_) = pipe.transformer.transformer_blocks
    for technique in (t.Regional(), t.Regional("default")):
        block.compile()
        own = block._compiled_call_impl
        undo = technique.apply(pipe)
        assert block._compiled_call_impl is not own
        undo()
        assert block._compiled_call_impl is own
        undo = technique.apply(pipe)
        block.compile()
        later = block._compiled_call_impl
        undo()
        assert block._compiled_call_impl is later
        del block._compiled_call_impl


def test_another_scheduler_chosen_meanwhile_is_kept(pipe):
    before = pipe.scheduler
    undo = t.DPMSolver().apply(pipe)
    pipe.scheduler = chosen = type(before).from_config(before.config)
    undo()
    assert pipe.scheduler is chosen
    pipe.scheduler = before


def test_a_channels_last_vae_of_the_users_stays_so(pipe):
    pipe.vae.to(memory_format=torch.channels_last)
    try:
        with applied(pipe, t.ChannelsLast()):
            pass
        assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    finally:
        pipe.vae.to(memory_format=torch.contiguous_format)


def test_no_cache_goes_under_a_transformer_compiled_as_a_whole(pipe):
    for name in CACHES:
        with applied(pipe, TECHNIQUES[name]()):
            with pytest.raises(Unavailable, match="^needs a transformer without a cache"):
                t.Whole().apply(pipe)
            with pytest.raises(UserError, match="compile its blocks"):
                pipe.transformer.compile(fullgraph=True)


def test_a_transformer_in_training_is_a_sentence(pipe):
    pipe.transformer.train()
    try:
        for name in (*CACHES, "ModulationAhead"):
            with applied(pipe, TECHNIQUES[name]()), pytest.raises(UserError, match="can't be trained"):
                pipe.transformer(torch.zeros(1))
    finally:
        pipe.transformer.eval()


@pytest.mark.parametrize("name", ["FusedQKV", "FusedGELU", *QUANTIZED])
def test_layers_stored_in_fp8_are_a_sentence_or_right(name):
    pipe = small.load()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    cast = image(pipe)
    before = state(pipe)
    with pytest.raises(Unavailable, match="^needs .*layerwise casting"):
        TECHNIQUES[name]().apply(pipe)
    assert not differences(before, pipe) and torch.equal(image(pipe), cast)


def test_layers_of_a_package_that_cannot_be_cast_say_so_whichever_way_it_comes(pipe, plain):
    from diffusers.hooks import apply_layerwise_casting

    with applied(pipe, t.Quanto("int8")):
        before = state(pipe)
        for cast in (
            pipe.transformer.enable_layerwise_casting,
            functools.partial(apply_layerwise_casting, pipe.transformer),
        ):
            with pytest.raises(UserError, match="can't be cast one by one while Quanto INT8 is on"):
                cast(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
            assert not differences(before, pipe)
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_frozen_and_not_trained(least, name):
    with applied(least, TECHNIQUES[name]()):
        whole, (block, *_) = least.transformer, least.transformer.single_transformer_blocks
        for part in (whole, whole.single_transformer_blocks, block, block.proj_mlp):
            part.requires_grad_(False)
            try:
                part.requires_grad_(True)
            except UserError as error:
                assert "can't be trained while its layers are" in str(error)
                assert not any(parameter.requires_grad for parameter in part.parameters())
    least.transformer.requires_grad_(True)


@pytest.mark.parametrize("name", ["FusedQKV", "Quanto"])
def test_a_lora_that_widens_the_model_is_a_sentence_whichever_pipeline_loads_it(bench, name):
    pipe = bench.bench.fresh()
    other, inner = pipelines.of_kind(pipe, "FluxControlPipeline"), pipe.transformer.inner_dim
    weights = bench.bench.lora(1)
    for kind, shape in (("A", (4, 128)), ("B", (inner, 4))):
        weights[f"transformer.x_embedder.lora_{kind}.weight"] = torch.ones(shape)
    with applied(pipe, TECHNIQUES[name]()):
        before = state(pipe)
        with pytest.raises(UserError, match="can't be loaded while .* is on"):
            other.load_lora_weights(weights)
        assert not differences(before, pipe)
    other.load_lora_weights(weights)
    assert pipe.transformer.x_embedder.in_features == 128


@pytest.mark.parametrize("name", ["FusedQKV", "FusedGELU", "FusedRoPE", "ModulationAhead", *CACHES])
def test_layers_stored_in_fp8_afterwards_make_the_image_that_they_make_without_a_technique(name):
    pipe, other = small.load(), small.load()
    with applied(other, TECHNIQUES[name]()):
        on = image(other)
    TECHNIQUES[name]().apply(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    other.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    cast = image(other)
    assert (image(pipe) - on).norm() < 3 * (cast - on).norm() + 1e-3


def test_not_a_number_is_warned_of_whoever_makes_bytes(pipe):
    broken = torch.full((1, 3, 16, 16), torch.nan)
    with applied(pipe, t.BytesOnDevice()), pytest.warns(RuntimeWarning, match="invalid value"):
        pipe.image_processor.postprocess(broken, "pil")


def test_several_controlnets_are_looked_at_one_by_one(pipe):
    from diffusers import FluxControlNetModel, FluxMultiControlNetModel

    nets = [pipelines.load_controlnet("embedded", device="cpu") for _ in range(2)]
    assert isinstance(nets[0], FluxControlNetModel)
    many = pipelines.as_use_case(pipe, "ControlNet txt2img", FluxMultiControlNetModel(nets))
    before = state(many)
    for name in ("Regional", "TorchAO int8", "Attention", "GGUF", "FusedQKV"):
        with applied(many, ALL[name]()):
            pass
        assert not differences(before, many), name


def test_every_technique_is_tried():
    tried = {type(make()).__name__ for make in ALL.values()}
    gpu = {"CudaGraph", "TensorRT", "Nunchaku", "SparseInt8", "FusedNorm", "LateScales"}
    ranks = {"ContextParallel", "FullyShard", "DiffusersParallel", "ParallelVAE", "XDiT", "PipeFusion"}
    assert set(t.__all__) - gpu - ranks <= tried
    assert set(t.__all__) <= {type(stack.techniques[0]).__name__ for stack in EACH.values()}
