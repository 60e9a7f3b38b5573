"""Adapters: what a cache has to know of a class of transformers, for FLUX.2 and for one that nobody has heard of."""

import contextlib

import pytest
import torch

from fluxnb import adapters
from fluxnb.adapters import ALONE, Adapter, Blocks
from fluxnb.cache import Cache, FirstBlock, Interval, MagCache, Schedule, Taylor, TeaCache, first_block
from fluxnb.errors import UserError
from fluxnb.models import flux2, pipelines
from fluxnb.study import trials
from fluxnb.technique import ANOTHER, IDENTICAL, Unavailable, applied
from fluxnb.techniques import CudaGraph, compilation, precision

TINY = [name for name in flux2.NAMES if name.endswith("tiny")]
STEPS = 4


@pytest.fixture(scope="module")
def pipes():
    return {name: pipelines.load(name, "float32", "cpu") for name in TINY}


@pytest.fixture(params=TINY)
def pipe(pipes, request):
    return pipes[request.param]


def image(pipe, steps=STEPS, seed=1, prompt="a red ball", **more):
    """An image's latents; of the base model in two passes a step."""
    given = {"latents": flux2.noise(pipe, [seed], 64, 64), "max_sequence_length": 16, "guidance_scale": 3.0}
    given |= {"width": 64, "height": 64, "num_inference_steps": steps, "output_type": "latent"} | more
    return pipe(prompt=[prompt], **given).images


def by_hand(pipe, computed: str, seed=1):
    """The latents that a plain loop gives which adds the last residual of the blocks where a step isn't computed."""
    transformer, kept = pipe.transformer, {}
    forward = type(transformer).forward

    def call(hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance=None, **_):
        at = pipe.scheduler.step_index or 0
        given = (encoder_hidden_states, img_ids, txt_ids)
        seen = {}
        hooks = [
            transformer.x_embedder.register_forward_hook(lambda m, i, o: seen.update(before=o)),
            transformer.norm_out.register_forward_pre_hook(lambda m, args: seen.update(after=args[0], temb=args[1])),
        ]
        try:  # every block is run, whatever is thrown away of it
            out = forward(transformer, hidden_states, given[0], timestep, *given[1:], guidance, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        which = id(encoder_hidden_states)
        if computed[at] == "1":
            kept[which] = seen["after"] - seen["before"]
            return out
        return (transformer.proj_out(transformer.norm_out(kept[which] + seen["before"], seen["temb"])),)

    transformer.forward = call
    try:
        return image(pipe, len(computed), seed)
    finally:
        del transformer.forward


def test_a_cache_that_never_reuses_gives_the_plain_image_bit_for_bit(pipe):
    plain = image(pipe)
    for cache in (first_block(0), Cache(TeaCache(0, (1.0, 0.0))), Cache(MagCache(0))):
        with applied(pipe, cache):
            assert torch.equal(image(pipe), plain), cache.label
    assert torch.equal(image(pipe), plain), "something was left behind"


@pytest.mark.parametrize(
    "gate, mask", [(Schedule("1011", False), "1011"), (Interval(2), "1010"), (Schedule("1000", False), "1000")]
)
def test_what_is_reused_is_what_a_plain_loop_adds(pipe, gate, mask):
    cache = Cache(gate)
    with applied(pipe, cache):
        made = image(pipe)
    assert cache.trace.computed == mask.count("1")
    assert torch.equal(made, by_hand(pipe, mask)) and not torch.equal(made, image(pipe))


def test_behind_the_first_block_a_step_is_reused_too(pipe):
    plain, cache = image(pipe), first_block(1e9)
    with applied(pipe, cache):
        assert not torch.equal(image(pipe), plain)
    assert cache.trace.computed == 1


def test_two_images_and_a_new_scheduler_have_nothing_of_each_other(pipe):
    cache = Cache(Interval(2), Taylor(1))
    with applied(pipe, cache):
        first, second = image(pipe), image(pipe, seed=2, prompt="a blue cube")
    with applied(pipe, cache):
        assert torch.equal(image(pipe, seed=2, prompt="a blue cube"), second)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert torch.equal(image(pipe), first)
        both = image(pipe, latents=flux2.noise(pipe, [1, 2], 64, 64), num_images_per_prompt=2)
    assert torch.allclose(both[:1], first, atol=1e-4)


def test_the_blocks_are_compiled_without_a_break_and_under_a_cache_no_more_often(pipes):
    pipe, cache = pipes["flux2-klein-tiny"], Cache(Interval(2))
    plain, counters = image(pipe), torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance(force_backend="eager"), applied(pipe, compilation.Whole()):
        assert torch.equal(image(pipe), plain) and counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance(force_backend="eager"), applied(pipe, compilation.Regional()):
        assert torch.equal(image(pipe), plain)
        compiled = counters["stats"]["unique_graphs"]
        with applied(pipe, cache):
            made = image(pipe)
        assert counters["stats"]["unique_graphs"] == compiled > 0 and not counters["graph_break"]
    with applied(pipe, cache):
        assert torch.equal(image(pipe), made)


def test_the_matrices_of_the_blocks_are_in_fp8_and_no_others(pipes):
    pipe = pipes["flux2-klein-tiny"]
    plain, layers = image(pipe), {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    with applied(pipe, precision.TorchAO("fp8 weight-only")):
        made = image(pipe)
        now = dict(pipe.transformer.named_modules())
        changed = {
            name for name in layers if type(now[name].weight) is not torch.nn.Parameter or now[name] is not layers[name]
        }
    assert changed == {name for name in layers if "blocks" in name}
    assert 0 < (made - plain).norm() / plain.norm() < 0.1
    with pytest.raises(Unavailable, match="compute capability 8.9"):  # whose products have kernels there only
        precision.TorchAO("fp8 row").apply(pipe)
    assert torch.equal(image(pipe), plain)


def test_recorded_blocks_give_the_same_image_with_a_cache_and_without(pipe, monkeypatch):
    monkeypatch.setattr(compilation, "_check_recordable", lambda transformer: None)
    replayed = []

    def record(function, leaves, form):
        from torch.utils._pytree import tree_unflatten

        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        outputs = torch.full_like(function(**tree_unflatten(inputs, form)), torch.nan)  # a recording computes nothing

        def replay():
            replayed.append(1)
            outputs.copy_(function(**tree_unflatten(inputs, form)))

        return replay, inputs, outputs

    monkeypatch.setattr(compilation, "_record", record)
    plain, cache = image(pipe), Cache(Interval(2))
    with applied(pipe, cache):
        cached = image(pipe)
    with applied(pipe, CudaGraph(blocks=True)):
        assert torch.equal(image(pipe), plain) and replayed
        with applied(pipe, cache):
            assert torch.equal(image(pipe), cached)


def test_every_technique_works_on_flux_2_or_says_in_a_sentence_why_it_cannot(pipes):
    pipe = pipes["flux2-klein-tiny"]
    plain = image(pipe, output_type="pt")
    on_gpus = ("CUDA", "ranks", "GPU", "torch-tensorrt", "Nunchaku")  # what this machine lacks, whatever the model
    worked = set()
    for stack in trials.techniques():
        (technique,) = stack.techniques
        try:
            undo = technique.apply(pipe)
        except (UserError, Unavailable) as error:
            said = str(error)
            assert "Flux2Transformer2DModel" in said or any(word in said for word in on_gpus), said
            continue
        torch.compiler.reset()
        with torch.compiler.set_stance(force_backend="eager"):
            made = image(pipe, output_type="pt")
        undo()
        worked.add(technique.name)
        apart = (made - plain).abs().mean()
        assert made.isfinite().all() and apart < {IDENTICAL: 1e-12, ANOTHER: 0.3}.get(technique.exact, 1e-5), stack.name
        assert torch.equal(image(pipe, output_type="pt"), plain), f"{stack.name} left something behind"
    assert {"torch.compile", "fused QKV", "First Block Cache", "TeaCache", "MagCache"} <= worked


def test_a_pipeline_that_keeps_its_references_keys_is_refused_in_a_sentence(pipes):
    pipe = pipes["flux2-klein-tiny"]
    with applied(pipe, first_block(0.1)), pytest.raises(UserError, match="keys and values of its reference"):
        zeros = torch.zeros(1, 4, 128)
        given = {"encoder_hidden_states": torch.zeros(1, 4, 96), "timestep": torch.ones(1), "kv_cache_mode": "extract"}
        pipe.transformer(zeros, img_ids=torch.zeros(4, 4), txt_ids=torch.zeros(4, 4), **given)


def test_other_use_cases_and_what_nobody_knows_are_a_sentence(pipes):
    with pytest.raises(UserError, match="FLUX.2 has txt2img here"):
        pipelines.as_use_case(pipes["flux2-klein-tiny"], "img2img")
    assert "FLUX.2" in pipelines.lacks_controlnet("flux2-klein-random")

    class Wan:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"\(FluxTransformer2DModel or Flux2.*and Wan has Linear: another one takes"):
        first_block(0.1).apply(Wan())


@pytest.mark.parametrize("name", TINY)
def test_a_random_model_makes_an_image_by_its_name(name, pipes):
    model = pipelines.describe(name)
    (made,) = pipelines.generate(pipes[name], ["a red ball"], [1], model=model, width=64, height=64, steps=2)
    assert made.size == (64, 64) and not model.judged and model.tokens == 512


def test_the_published_sizes():
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def count(module):
        return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())

    with torch.device("meta"):
        klein, dev = (
            count(Flux2Transformer2DModel(**flux2.SIZES[f"flux2-{kind}-random"].config)) for kind in ("klein", "dev")
        )
        qwen, vae = count(Qwen3ForCausalLM(Qwen3Config(**flux2.QWEN3_4B))), count(AutoencoderKLFlux2())
    assert (klein / 1e9, dev / 1e9, qwen / 1e9) == (
        pytest.approx(3.9, 0.02),
        pytest.approx(32.2, 0.02),
        pytest.approx(4.02, 0.01),
    )
    assert flux2.SIZES["flux2-klein-random"].numbers == pytest.approx(klein + qwen + vae, rel=0.02)


# --- a class of one's own, by the four steps of `fluxnb.adapters` -------------------------------------------


class OwnBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixes = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, hidden_states, encoder_hidden_states, shift):
        return hidden_states + torch.tanh(self.mixes(self.norm(hidden_states) + shift)) * encoder_hidden_states.mean()


class OwnTransformer(torch.nn.Module):
    """One list of blocks that give the image's tokens alone and are called with places, not names."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(OwnBlock() for _ in range(3))

    @contextlib.contextmanager
    def cache_context(self, name):
        yield

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, timestep)
        return hidden_states


class OwnPipeline:
    scheduler = None

    def __init__(self):
        self.transformer = OwnTransformer().eval()

    def image(self, reused=()):
        """Four steps by hand; in `reused` ones the last computed step's residual is added."""
        x, kept = torch.linspace(-1, 1, 32).reshape(1, 4, 8), None
        text = torch.linspace(0, 1, 16).reshape(1, 2, 8)
        for step in range(4):
            if step in reused:
                made = kept + x
            else:
                made = self.transformer(x, torch.tensor(1 - step / 4), text)
                kept = made - x
            x = x + 0.5 * made
        return x


def own_modulated(block, hidden_states, given):
    return block.norm(hidden_states) + given["shift"]


@torch.no_grad()
def test_the_steps_of_add_a_model_give_a_cache_to_a_class_of_ones_own(monkeypatch):
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    torch.manual_seed(0)
    pipe = OwnPipeline()
    with pytest.raises(UserError, match="OwnPipeline has OwnTransformer: another one takes an adapter"):
        Cache(Interval(2)).apply(pipe)
    adapters.add(Adapter("OwnTransformer", "a model of mine", (Blocks("blocks", ALONE),), own_modulated))
    plain = pipe.image()
    for cache in (first_block(0), Cache(TeaCache(0, (1.0, 0.0)))):
        with applied(pipe, cache):
            assert torch.equal(pipe.image(), plain)
    with applied(pipe, Cache(Interval(2))):
        made = pipe.image()
    assert torch.equal(made, pipe.image(reused={1, 3})) and not torch.equal(made, plain)
    with applied(pipe, cache := Cache(FirstBlock(1e9))):
        assert not torch.equal(pipe.image(), plain)
    assert cache.trace.computed < 4
    with pytest.raises(Unavailable, match=r"needs FLUX.1's blocks, which a model of mine \(OwnTransformer\)"):
        adapters.check(pipe.transformer, adapters.BLOCKS)
    assert torch.equal(pipe.image(), plain)


def test_a_stack_for_flux_2_has_what_fits_and_none_twice():
    from fluxnb import stacks, study

    named = stacks.shortlist(["BF16, lean", "FP8, lean"], "fp8 row", [], 4, [12])
    klein, dev = (pipelines.describe(name) for name in ("flux2-klein-random", "flux-dev-random"))
    assert study.fitting(named, dev) == named
    made = study.fitting(named, klein)
    assert [stack.name for stack in made] == [stack.name for stack in named]
    assert made[0].label == "compiled blocks, VAE compiled" and "fused" not in " ".join(stack.label for stack in made)
    phases = study.fitting(stacks.phases("fp8 row", ["hooks"]), klein)
    assert len(phases) < len(stacks.phases("fp8 row", ["hooks"])) and len({stack.label for stack in phases}) == len(
        phases
    )


def test_a_random_model_may_be_asked_for_by_name(monkeypatch):
    from fluxnb import params
    from fluxnb.models import facts

    for variable in facts.GIVEN:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(facts.MODEL, "flux2-klein-random")
    chosen = params.chosen("h100")
    assert chosen.study.models == ["flux2-klein-random"] and chosen.study.distilled is None
    assert chosen.own_dir.as_posix() == "reports/own/single_gpu/h100/flux2-klein-random"
    assert pipelines.describe("flux2-klein-random").few
    monkeypatch.setenv(facts.STEPS, "50")
    assert pipelines.describe("flux2-klein-random").steps == 50 and not pipelines.describe("flux2-klein-random").few
    monkeypatch.setenv(facts.SIZE, "512")
    with pytest.raises(UserError, match="flux2-klein-random has a size and tokens of its own: leave SIZE out"):
        facts.asked()


def test_the_work_of_a_step_of_flux_2_is_counted():
    from types import SimpleNamespace

    from fluxnb.measure import ceilings

    work = ceilings.step_work(SimpleNamespace(model=pipelines.describe("flux2-klein-random"), width=1024, height=1024))
    assert work.products == pytest.approx(28.3e12, 0.01) and work.attention == 4 * 25 * 4608**2 * 3072
