"""Recipes: put on a pipeline and taken off, printed as scripts that run, made from rows; the public names."""

import contextlib
import gc
import io
import itertools
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import test_recommend
import torch
from PIL import Image

import fluxnb
from fluxnb import families, findings, rebuilt, recipes, stacks, techniques
from fluxnb.__main__ import main
from fluxnb.cache import Cascade, Either, FirstBlock, Hold, Interval, MagCache, Schedule, Taylor, TeaCache, teacache
from fluxnb.errors import UserError
from fluxnb.findings.rows import is_baseline
from fluxnb.models import embedded, pipelines
from fluxnb.report import front
from fluxnb.report import recipes as writer
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.study import candidate

ROOT = Path(__file__).resolve().parents[1]
Cache, accelerate, plan = fluxnb.Cache, fluxnb.accelerate, fluxnb.plan
MADE = [
    f"{gpu}/{goal}" for gpu, own in recipes.known().items() for goal, r in own["recipes"].items() if type(r) is dict
]
COMMITTED = [c for c in configurations(ROOT) if "single_gpu" in c.folder.parts]


@pytest.fixture(scope="module")
def pipe():
    """A small pipeline, which every test leaves as it found it."""
    pipe = small.load()
    small.image(pipe, steps=1)  # at which diffusers leaves a registry of hooks
    return pipe


@pytest.fixture
def untouched(pipe):
    """The small pipeline; whatever a test put on it has to be gone afterwards, to the last attribute."""
    before = small.state(pipe)
    yield pipe
    assert small.differences(before, pipe) == []


def remade(cache):
    """The recipe of a cache, as if a row of it had been chosen."""
    own = next(iter(r for own in recipes.known().values() for r in own["recipes"].values() if type(r) is dict))
    settings = {"stack": cache.label, "technique": cache.name, "settings": cache.settings, "load": None, "cuda": False}
    return recipes.Recipe(name="cpu/remade", **own | settings)


PLANNED = {"a plan's weights": "embedded", "a planned mask": "flux-dev-random"}


# --- printed ---


def printed(name, *more):
    gpu, goal = name.split("/")
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert main(["recipe", "--gpu", gpu, "--goal", goal, *more]) == 0
    return out.getvalue()


def code_of(text):
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def every_script():
    """The code of every printed script, once -> its name."""
    for name, more in itertools.product(MADE, ([], ["--diffusers"])):
        with contextlib.suppress(UserError):
            yield code_of(recipes.script(recipes.find(name), bool(more))), " ".join([name, *more])


SCRIPTS = dict(sorted(every_script(), key=lambda one: one[1], reverse=True))
SCRIPTS |= {code_of(recipes.script(remade(*stacks.planned(of, 28, [8])))): name for name, of in PLANNED.items()}


def run(text, tmp_path, monkeypatch, *more):
    """The image of a script, run as it is on the embedded model's folder."""
    given = [str(embedded.FOLDER), "--steps", "3", "--size", "64", "64", "--tokens", "24", "--device", "cpu"]
    given += ["--dtype", "float32", "--output", str(tmp_path / "image.png"), *more]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *given])
    exec(compile(text, "recipe.py", "exec"), {"__name__": "__main__"})
    with Image.open(tmp_path / "image.png") as made:
        return made.copy()


@pytest.mark.parametrize("text", SCRIPTS, ids=SCRIPTS.values())
def test_a_printed_script_runs(text, tmp_path, monkeypatch):
    if "ompile" in text:  # what compiles takes minutes, and computes the same
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    steps = ["--steps", "28"] if "1110" in text else []  # a mask is of so many
    try:
        made = run(text, tmp_path, monkeypatch, *steps)
    except UserError as error:
        assert "needs a CUDA GPU" in str(error)  # FP8 has no kernel here
    else:
        assert made.size == (64, 64) and len(made.getcolors(9999)) > 50


def test_a_printed_plan_makes_the_image_that_was_measured(embedded_pipe, tmp_path, monkeypatch):
    (cache,) = stacks.planned("embedded", 28, [8])
    text = recipes.script(remade(cache))
    assert "from fluxnb import accelerate, planned\n" in text and f"    planned({cache.gate.mask!r}, '" in text
    made = run(text, tmp_path, monkeypatch, "--steps", "28")
    with fluxnb.applied(embedded_pipe, cache):
        (wanted,) = embedded_pipe(
            "a red apple on a white table", width=64, height=64, num_inference_steps=28, max_sequence_length=24,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    assert made.tobytes() == wanted.tobytes()


def test_a_plans_recipe_on_another_model_or_of_other_steps_is_one_sentence(untouched, monkeypatch):
    (cache,) = stacks.planned("embedded", 28, [8])
    monkeypatch.setattr(recipes, "find", lambda goal, pipe=None: remade(cache))
    with pytest.raises(UserError, match="made for another model: make one for this .* and give its file as `plan=`"):
        accelerate(untouched, "near-lossless")
    with pytest.raises(UserError, match="This plan has 28 steps but the generation has 12: ask for 28"):
        accelerate(untouched, "near-lossless", steps=12)
    settings = cache.settings
    for changed in ({"weights": "00000000"}, {"mask": "1" + settings["mask"][:-1]}):
        with pytest.raises(UserError, match="There is no plan .* in the package or in reports/: make one with"):
            fluxnb.planned(**{name: (settings | changed)[name] for name in ("mask", "weights")})
        assert rebuilt.stack(settings | changed, cache.name, "none") is None


def test_plans_beside_rows_are_found_too(untouched, tmp_path, monkeypatch):
    from fluxnb.cache import planning

    made = planning.Plan(planning.signature(untouched.transformer), "1101", {2: {0: -1.0, 1: 2.0}}, 30.0, (30.0,), 1)
    (folder := tmp_path / "reports" / "single_gpu" / "cpu" / "plans").mkdir(parents=True)
    planning.save([replace(made, mask="11011", weights={2: {1: 1.0}})], folder / "a.json")
    planning.save([made], folder / "b.json")
    monkeypatch.chdir(tmp_path)
    settings = {**made.cache(hold_controlnet=True).settings, "compile": "blocks"}
    again = rebuilt.stack(settings, "prescribed schedule", "mine")
    assert again.techniques[-1].settings == made.cache(hold_controlnet=True).settings
    accelerate(untouched, again.techniques[-1], steps=4)()


def test_diffusers_first_block_cache_makes_the_same_image(tmp_path, monkeypatch):
    own = remade(Cache(FirstBlock(0.2)))
    texts = [recipes.script(own, diffusers) for diffusers in (False, True)]
    assert "fluxnb import" in code_of(texts[0]) and "fluxnb" not in code_of(texts[1])
    plain = re.sub(r"accelerate\(.*?\n\)", "", texts[0], flags=re.S)
    ours, theirs, without = (run(text, tmp_path, monkeypatch, "--steps", "12") for text in [*texts, plain])
    assert ours.tobytes() == theirs.tobytes() != without.tobytes()


@pytest.mark.parametrize("name", MADE)
def test_a_script_says_what_it_rests_on(name):
    recipe, text = recipes.find(name), printed(name)
    for said in (recipe.speed, f"n = {recipe.n}", *recipe.rows, recipe.machine):
        assert said in text.replace("\n#   ", " ")
    assert recipe.n >= 10 and recipe.interval[0] <= recipe.speedup <= recipe.interval[1]
    try:
        lines = printed(name, "--diffusers").replace("\n#   ", " ")
    except AssertionError:  # diffusers has nothing of it, as the next test
        return
    left_out = [part.label for part in recipe.techniques if type(part).__name__ not in recipes._DIFFUSERS]
    assert all(label in lines.split("Without a counterpart in diffusers and PyTorch: ")[1] for label in left_out)
    assert "This script wasn't measured" in lines


def test_what_diffusers_has_nothing_of_is_a_sentence():
    only = recipes.Recipe(
        **recipes.known()["cpu"]["recipes"]["balanced"] | {"name": "x", "settings": {"fused_rope": True}}
    )
    with pytest.raises(
        UserError, match="Without a counterpart in diffusers and PyTorch: fused RoPE; nothing of x is left"
    ):
        recipes.script(only, plain_diffusers=True)


ALIKE = {  # what diffusers computes alike, bit for bit or up to rounding
    "solver": techniques.DPMSolver,
    "kernel": lambda: techniques.Attention("math"),
    "QKV": techniques.FusedQKV,
    "INT8": lambda: techniques.TorchAO("int8"),
    "weight-only": lambda: techniques.TorchAO("int8 weight-only"),
    "FP8": lambda: techniques.TorchAO("fp8 weight-only"),
    "slices": techniques.Sliced,
    "layout": techniques.ChannelsLast,
    "FBCache": lambda: Cache(FirstBlock(0.2)),
    "MagCache": lambda: Cache(MagCache(0.3)),
}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_what_diffusers_has_of_a_technique_is_the_same(make):
    given, pipe = make(), small.load(blocks=1)
    with fluxnb.applied(pipe, given):
        ours = small.image(pipe, steps=12, width=64, height=64, output_type="pt")
    lines = recipes._DIFFUSERS[type(given).__name__](given)
    exec("\n".join(lines), {"pipe": pipe, "torch": torch, "options": SimpleNamespace(steps=12)})
    theirs = small.image(pipe, steps=12, width=64, height=64, output_type="pt")
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_taylorseer_computes_the_first_steps_and_the_last_and_skips_others():
    given, pipe, seen = stacks.cache(12, 9), small.load(blocks=1), []
    exec("\n".join(recipes._cache(given)), {"pipe": pipe, "options": SimpleNamespace(steps=12)})
    hook = pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: seen.append(1))
    small.image(pipe, steps=12, width=64, height=64)
    hook.remove()
    assert given.gate.warm_up < len(seen) < 12


PARTS = {**small.TECHNIQUES, **small.COMPILED, "MagCache": lambda: Cache(MagCache(0.1)),
         "schedule": lambda: Cache(Schedule("1010", first_block=False)),
         "pair": lambda: Cache(Cascade(TeaCache(0.4), FirstBlock(0.2), warm_up=6), Taylor(2)),
         "held": lambda: Cache(Interval(4, warm_up=6, compute_last=True), Taylor(2), hold_controlnet=True)}  # fmt: skip


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_a_technique_is_spelled_as_a_call_that_makes_it_again(make):
    part, names = make(), {n: getattr(fluxnb, n) for n in fluxnb.__all__} | vars(techniques)
    names |= {"ParaAttention": type(part), "Replicas": type(part)}
    again = eval(recipes.spelled(part), names)
    assert (again.settings, again.label, again.name) == (part.settings, part.label, part.name)


# --- put on and taken off ---


def test_a_recipe_is_put_on_and_taken_off(embedded_pipe):
    def image():  # of as many steps as it was measured with, which a mask needs
        return small.image(embedded_pipe, steps=28, width=64, height=64)

    plain, before = image(), small.state(embedded_pipe)
    undo = accelerate(embedded_pipe)  # the one of the machine that the pipeline is on
    cached = image()
    undo()
    undo()  # again, it does nothing
    assert small.differences(before, embedded_pipe) == []
    with fluxnb.applied(embedded_pipe, *recipes.find("cpu/near-lossless").techniques):
        assert torch.equal(image(), cached) and not torch.equal(plain, cached)
    assert torch.equal(image(), plain)


def test_a_plan_says_what_would_be_done_and_touches_nothing(untouched):
    text = plan(untouched)
    recipe = recipes.find("cpu/near-lossless")
    assert text.startswith("cpu/near-lossless: near-lossless (35 dB)") and recipe.speed in text
    assert all(recipes.spelled(part) in text for part in recipe.techniques) and recipe.rows[0] in text
    assert "8 steps weren't measured: the figures are of 28" in "\n".join(recipe.evidence(8))
    assert "unquantized weights stay" in plan(untouched, techniques.TorchAO("int8"))
    cached = plan(untouched, stacks.cache(28, 12), steps=28)
    assert "Cache(Interval(4, warm_up=6, compute_last=True), predictor=Taylor(2))" in cached
    assert "Computes 12 of 28 steps." in cached


def test_a_file_of_plans_takes_the_place_of_the_cache_on_its_own_model(untouched, tmp_path):
    from fluxnb.cache import planning

    own = planning.signature(untouched.transformer)
    made = [
        planning.Plan(own, mask, {i: {0: 1.0} for i in range(6) if mask[i] == "0"}, 30.0, (30.0,), 1)
        for mask in ("110000", "110101")
    ]
    file = planning.save(made, tmp_path / planning.FILE)
    cached = techniques.ModulationAhead(), Cache(Interval(3))  # which computes 2 of 6
    assert "planned: 2 of 6" in plan(untouched, *cached, steps=6, plan=file)
    assert "planned: 4 of 6" in plan(untouched, Cache(Interval(2)), steps=6, plan=str(file))
    accelerate(untouched, *cached, steps=6, plan=file)()
    other = planning.save([replace(made[0], signature=(9.0,) * 16)], tmp_path / "other.json")
    for wrong, said in (
        ({"plan": other, "steps": 6}, "made for another model: make one for this with `python -m fluxnb plan"),
        ({"plan": file, "steps": 8}, "has plans of 6 steps and not of 8"),
        ({"plan": file}, "say how many you ask of the pipeline"),
        ({"plan": tmp_path / "none.json", "steps": 6}, "can't be read"),
        ({"plan": 12, "steps": 6}, "is no file of plans"),
    ):
        with pytest.raises(UserError, match=said):
            accelerate(untouched, Cache(Interval(3)), **wrong)
    with pytest.raises(UserError, match="takes the place of a cache, and there is none"):
        accelerate(untouched, techniques.ModulationAhead(), plan=file, steps=6)


def test_techniques_go_on_in_the_right_order_by_themselves(untouched):
    parts = [Cache(FirstBlock(0.2)), techniques.ModulationAhead(), techniques.TorchAO("int8"), techniques.FusedQKV()]
    undo = accelerate(untouched, *parts)
    made = small.image(untouched)
    undo()
    with fluxnb.applied(untouched, *reversed(parts)):
        assert torch.equal(small.image(untouched), made)
    undo = accelerate(untouched, stacks.Stack("mine", tuple(parts)))
    assert torch.equal(small.image(untouched), made)
    undo()


def test_what_fails_leaves_nothing_on(untouched):
    with pytest.raises(UserError, match="SageAttention 2 can't be put on, nothing was changed: it needs"):
        accelerate(untouched, techniques.DPMSolver(), techniques.FusedQKV(), techniques.Attention("sage 2"))
    with pytest.raises(UserError, match="has a cache already"):
        accelerate(untouched, techniques.FusedQKV(), Cache(FirstBlock(0.1)), Cache(FirstBlock(0.2)))


T = techniques
MIXED = (  # parts that stand on one another, and what goes on top of the lower ones only
    ((T.FusedQKV(), Cache(FirstBlock(0.2))), T.ModulationAhead, "modulation ahead"),
    ((T.FusedQKV(), T.FusedGELU(), T.FusedRoPE(), T.Regional(), T.Tiled(64)), T.FusedRoPE, "fused RoPE"),
    ((T.FusedQKV(), T.FusedGELU(), T.FusedRoPE(), T.Regional()), lambda: T.TorchAO("int8"), "TorchAO INT8"),
    ((T.TorchAO("int8"), T.FusedRoPE(), T.ModulationAhead(), T.Regional()), T.FusedRoPE, "fused RoPE"),
)


@pytest.mark.parametrize("parts, above, said", MIXED)
def test_what_stands_on_top_of_a_part_is_said_and_all_of_the_recipe_stays(untouched, parts, above, said):
    plain = small.state(untouched)
    undo = accelerate(untouched, *parts)
    alone = small.state(untouched)
    off = above().apply(untouched)
    on = small.state(untouched)
    with pytest.raises(UserError, match=f"can't be taken off while {said} is on top"):
        undo()
    assert small.differences(on, untouched) == []
    off()
    assert small.differences(alone, untouched) == []
    undo()
    assert small.differences(plain, untouched) == []


def test_what_cannot_be_taken_off_is_refused_before_anything_changes(untouched):
    with pytest.raises(UserError, match="FSDP can't be taken off again"):
        accelerate(untouched, techniques.FusedQKV(), techniques.FullyShard())
    with pytest.raises(UserError, match="'int8' can't be put on: give a goal"):
        accelerate(untouched, techniques.FusedQKV(), "int8")


def test_unquantized_weights_are_freed_where_nobody_can_take_it_back():
    pipe = small.load(blocks=1)
    weight = weakref.ref(pipe.transformer.transformer_blocks[0].attn.to_q)
    undo = accelerate(pipe, techniques.TorchAO("int8"))
    gc.collect()
    assert weight() is not None
    del undo
    gc.collect()
    assert weight() is None


def test_steps_other_than_the_measured_ones(untouched, monkeypatch):
    with pytest.raises(UserError, match="The schedule has 4 steps but the generation has 8"):
        accelerate(untouched, Cache(Schedule("1010")), steps=8)
    own = recipes.known()["cpu"]
    half = own["recipes"]["balanced"] | {"settings": {}, "steps": 14, "stack": "14 steps"}
    monkeypatch.setattr(recipes, "known", lambda: {"cpu": own | {"recipes": own["recipes"] | {"balanced": half}}})
    with pytest.warns(UserWarning, match="cpu/balanced: ask the pipeline for 25 steps"):
        accelerate(untouched, "balanced", steps=50)()
    assert "Ask the pipeline for 14 steps." in plan(untouched, "balanced")
    assert "accelerate" not in code_of(recipes.script(recipes.find("cpu/balanced")))


@pytest.mark.parametrize(
    "gate",
    [Interval(3, warm_up=2, compute_last=True), MagCache(0.2), Schedule("11010010")],
    ids=lambda gate: type(gate).__name__,
)
def test_what_looks_at_nothing_says_how_many_steps_it_computes(untouched, gate):
    with fluxnb.applied(untouched, cache := Cache(gate)):
        small.image(untouched, steps=8)
    assert recipes.blind(gate, 8) == cache.trace.computed < 8
    assert recipes.blind(FirstBlock(0.1), 8) is recipes.blind(Either(MagCache(0.1), FirstBlock(0.1)), 8) is None


# --- which one ---


@pytest.mark.parametrize(
    "gpu, found",
    [
        ("NVIDIA H100 80GB HBM3", "h100/lossless"),
        (
            "NVIDIA H200",
            r"There is no recipe h200/lossless \(no headline: n = 3, .*\): take one over by its name \(h100",
        ),
        (
            "NVIDIA GeForce RTX 4090",
            r"There is no recipe for NVIDIA GeForce RTX 4090: take one over by its name \(h100/",
        ),
        ("cpu", r"There is no recipe cpu/lossless \(28 steps as they are: nothing "),
    ],
)
def test_the_configuration_is_that_of_the_pipelines_gpu(gpu, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    pipe = SimpleNamespace(_execution_device="cpu" if gpu == "cpu" else "cuda:0", device="cpu")  # offloaded
    if found in MADE:
        assert recipes.find("lossless", pipe).name == found
    else:
        with pytest.raises(UserError, match=found):
            recipes.find("lossless", pipe)


def test_what_is_misspelled_is_a_sentence(capsys):
    for goal, said in (
        ("fast", "There is no goal 'fast': choose one of lossless, near-lossless, balanced, smallest-memory-lossless"),
        ("a100/balanced", "There is no recipe for a100: take one over by its name"),
        ("balanced", "Without a pipeline there is no GPU to find a recipe for balanced by: name it"),
    ):
        with pytest.raises(UserError, match=said):
            recipes.find(goal)
    assert main(["recipe", "--gpu", "h200", "--goal", "balanced"]) == 2
    assert capsys.readouterr().err.startswith("fluxnb: There is no recipe h200/balanced (no headline: n = 3")


# --- from rows ---


@pytest.mark.parametrize("c", COMMITTED, ids=lambda c: c.name)
def test_recipes_are_what_the_committed_rows_say(c):
    assert writer.of(c) == recipes.known()[c.name], "recipes.json is old: run make site"
    assert set(recipes.known()) == {c.name for c in COMMITTED}


@pytest.mark.parametrize("c", COMMITTED, ids=lambda c: c.name)
def test_every_row_of_one_image_says_how_to_make_its_stack(c):
    served, several = families.SERVING.name, ("gather", "ulysses", "ranks")
    bases = {r.id: r for r in c.ok if is_baseline(r)}
    rows = [(r, bases[r.baseline]) for r in c.ok if r.baseline in bases and r.family != served]
    rows = [(r, b) for r, b in rows if r.gpus == 1 and not set(several) & set(r.settings) and r.stack is not None]
    for row, base in rows:
        stack = findings.stack_of(row, base)
        assert stack is not None, (row.id, row.label, row.settings)
        made = candidate.stacked(stack, row.steps)
        assert {**base.settings, **made.settings, **row.settings} == row.settings


def test_what_cannot_be_made_again_is_not_recommended():
    rows = [*test_recommend.TIMED, *test_recommend.SEEN]
    assert findings.choices(rows, test_recommend.BASE)[0].label == "lean"
    unknown = [test_recommend.replace(r, settings=r.settings | {"magic": 1}) if "lean" in r.label else r for r in rows]
    assert not {"lean", "lean, cached"} & {c.label for c in findings.choices(unknown, test_recommend.BASE)}


def test_the_front_page_has_the_call_beside_what_it_recommends():
    found = findings.choices([*test_recommend.TIMED, *test_recommend.SEEN], test_recommend.BASE)
    text = front.snippet("h200", found, own=False)
    assert 'undo = accelerate(pipe, "h200/near-lossless")' in text and "recipe --gpu h200 --goal near-lossless" in text
    mine = front.snippet("h200", found, own=True)  # which the package has no recipe of
    assert "h200/" not in mine.split("<pre>")[1] and "Cache(Interval(4, warm_up=6, compute_last=True)" in mine
    assert front.snippet("h200", [c for c in found if is_baseline(c.row)], own=False) == ""


def four_steps():
    """A plain baseline of a model of four steps, and what is faster and the same up to rounding."""
    four = test_recommend.plain(**test_recommend.SCHNELL, label="4 steps", seconds=0.8, seed=80)
    return [four, test_recommend.timed("lean, four", 1.4, test_recommend.BLOCKS, four, **test_recommend.SCHNELL)]


def test_models_of_few_steps_have_recipes_of_their_own():
    both = Configuration("h200", ROOT, {}, [], [*four_steps(), *test_recommend.TIMED, *test_recommend.SEEN])
    assert [front.has_recipes(both, found) for found in front.answers(both)] == [True, True]
    first, second = front.headlines([both])
    assert "at 28 steps (`flux-dev-random`): " in first and "at 4 steps (`flux-schnell-random`): " in second
    for few, model in ((False, "flux-dev-random"), (True, "flux-schnell-random")):
        assert {choice.row.model for choice in front.named(both, few)} == {model}
    three = [test_recommend.plain(n=3, seed=40), *four_steps()]  # too few rounds of 28 steps
    few = Configuration("h200", ROOT, {}, [], three)
    assert front.named(few) == [] and [front.has_recipes(few, found) for found in front.answers(few)] == [True]
    text = front.snippet("h200", front.answers(few)[0], own=False)
    assert 'accelerate(pipe, "h200/schnell/near-lossless")' in text and "--goal near-lossless --schnell" in text


@pytest.fixture
def measured_schnell(monkeypatch):
    """The recipes of an H200 on which nothing but four steps was measured."""
    made = writer.of(Configuration("h200", ROOT, {}, [], four_steps()))
    monkeypatch.setattr(
        recipes, "known", lambda: {"h200": made, "cpu": recipes.json.loads(recipes.FILE.read_text())["cpu"]}
    )
    return made


@pytest.fixture(scope="module")
def schnell():
    return pipelines.load(embedded.SCHNELL, "float32", "cpu")


def test_a_pipeline_of_few_steps_gets_their_recipe_by_goal_or_name_and_never_one_of_28(schnell, measured_schnell):
    assert measured_schnell["recipes"]["lossless"] == "no shortlist of one was timed"
    for name in ("h200/lossless", "h200/schnell/lossless"):
        found = recipes.find(name, schnell)
        assert (found.name, found.steps, found.guided) == ("h200/schnell/lossless", 4, False)
    assert {"FusedQKV", "TorchAO", "Cache"}.isdisjoint(type(part).__name__ for part in found.techniques)
    text = plan(schnell, "h200/lossless")
    assert "h200/schnell/lossless" in text and "4 steps without guidance" in text and "Cache(" not in text
    with pytest.raises(UserError, match="no recipe cpu/schnell/near-lossless for models of few .*no shortlist of one"):
        accelerate(schnell, "near-lossless")
    with pytest.raises(
        UserError, match=r"cpu/schnell/balanced for models .*\(h200/schnell/balanced\), or measure: `make"
    ):
        accelerate(schnell, "cpu/balanced")


def test_a_recipe_of_few_steps_is_printed_without_guidance_and_refused_by_another_model(
    untouched, measured_schnell, capsys
):
    for name in (["--goal", "lossless", "--schnell"], ["--goal", "schnell/lossless"]):
        assert main(["recipe", "--gpu", "h200", *name]) == 0
        text = capsys.readouterr().out
        assert "guidance_scale=0.0" in text and "default=4" in text and "FLUX.1-schnell" in text
    assert "guidance_scale" not in recipes.script(recipes.find("cpu/near-lossless"))
    with pytest.raises(UserError, match="is for models of few steps .* is none: ask for h200/lossless"):
        accelerate(untouched, "h200/schnell/lossless")
    assert main(["recipe", "--gpu", "h200", "--goal", "lossless"]) == 2
    assert "There is no recipe h200/lossless (no shortlist of one was timed)" in capsys.readouterr().err


# --- TeaCache's coefficients ---


def test_teacache_finds_the_coefficients_of_the_model_that_it_is_put_on(embedded_pipe):
    def mask(gate):
        with fluxnb.applied(embedded_pipe, cache := Cache(gate)):
            small.image(embedded_pipe, steps=10, width=64, height=64)
        return cache.trace.mask

    own = teacache.coefficients("embedded")
    assert mask(TeaCache(0.6)) == mask(TeaCache(0.6, own)) != mask(TeaCache(0.6, teacache.FLUX_DEV))
    assert mask(Cascade(TeaCache(0.6), FirstBlock(0.2))) == mask(Cascade(TeaCache(0.6, own), FirstBlock(0.2)))


def test_teacache_knows_flux_dev_by_its_architecture_and_says_how_to_fit_others():
    from fluxnb.models import full_size

    def transformer(**config):
        return SimpleNamespace(transformer=SimpleNamespace(config=config), config={"_name_or_path": "my/flux"})

    dev = {**full_size.TRANSFORMER, "guidance_embeds": True}
    gate = TeaCache(0.4)
    gate.meet(transformer(**dev | {"axes_dims_rope": [16, 56, 56]}))  # a file has lists
    assert gate.rescaled(0.1) == TeaCache(0.4, teacache.FLUX_DEV).rescaled(0.1)
    with pytest.raises(UserError, match="was put on another model before: make a TeaCache for each model"):
        gate.meet(transformer(_name_or_path=str(embedded.FOLDER / "transformer")))
    for strange in (dev | {"guidance_embeds": False}, dev | {"in_channels": 384}):
        with pytest.raises(
            UserError, match="no coefficients for my/flux: fit them with .* fit-teacache --model my/flux"
        ):
            TeaCache(0.4).meet(transformer(**strange))


# --- the public names ---


def test_importing_fluxnb_imports_no_pytorch():
    asked = (
        "import sys, fluxnb; dir(fluxnb); assert 'torch' not in sys.modules; from fluxnb import accelerate, TeaCache"
    )
    subprocess.run([sys.executable, "-c", asked], check=True, cwd=ROOT, timeout=120)


def test_the_public_names_are_all_that_a_user_puts_on():
    on_several = {"Replicas", "ContextParallel", "FullyShard", "DiffusersParallel", "ParallelVAE", "XDiT", "PipeFusion"}
    assert set(techniques.__all__) - on_several <= set(fluxnb.__all__)
    gates = {family.gate_class() for family in families.ALL if family.cache}
    assert {*gates, Hold, Taylor, Schedule, Cascade} <= {getattr(fluxnb, name) for name in fluxnb.__all__}
    for name in fluxnb.__all__:
        made = getattr(fluxnb, name)
        assert made.__name__ == name and made.__module__ == fluxnb._OWNERS[name] and made.__doc__, name
    with pytest.raises(AttributeError, match="fluxnb has no accelerated; it has"):
        fluxnb.accelerated  # noqa: B018


def test_what_the_readme_says_of_ones_own_pipeline_runs(monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"## In your own pipeline\n\n```python\n(.*?)```", text, re.S)
    assert len(lines.splitlines()) <= 12
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(lines, names)
    assert names["image"].size == (128, 128) and "cpu/near-lossless" in capsys.readouterr().out
