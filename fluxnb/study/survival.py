"""What happens to a pipeline in use while a technique is on it: the cases, and what may become of an image.

The right image is that of a fresh pipeline that was brought to the same state first and got the technique then: bit for
bit, so what approximates is checked exactly, too. Taken off again, the technique has to leave the image of a plain
pipeline in that state, bit for bit. `study.trials` judges it.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fluxnb import leftovers
from fluxnb import techniques as t
from fluxnb.models import pipelines
from fluxnb.models.use_cases import CONTROLNET_TXT2IMG, IMG2IMG, TXT2IMG
from fluxnb.study.bench import Ask, Bench, random

RIGHT, RECOMPILED, SENTENCE, WRONG, RAW = "right image", "recompiles", "sentence", "wrong image", "raw error"
VERDICTS = {  # the best first
    RIGHT: "the image that it would be with the technique put on afterwards, bit for bit",
    RECOMPILED: "that image, after something was compiled anew",
    SENTENCE: "what can't work says so before anything changes, and the images before and afterwards are right",
    WRONG: "another image than it should be, and nothing says so",
    RAW: "an error that says nothing to a user",
}
CASE = "case"  # the setting that names what happened


@dataclass(frozen=True)
class Moment:
    """Something that happens to a pipeline with a technique on, and the image that is asked for then.

    Args:
        what: in words, for messages.
        happens: (bench, pipe) changes it; gives the pipeline to ask for the image if that is another one.
        ask: for the image.
        alone: what brings a fresh pipeline to the same state; `happens` by default.
        made: (bench, pipe, ask) makes the image; `right` does on the fresh pipeline.
        apart: the image is of a pipeline that has nothing to do with the first one.
        plain: that one has no technique.
        rounded: what is quantized first is rounded from other numbers, or on another device.
    """

    what: str
    happens: Callable | None = None
    ask: Ask = Ask()
    alone: Callable | None = None
    made: Callable | None = None
    right: Callable | None = None
    apart: bool = False
    plain: bool = False
    rounded: bool = False

    @property
    def state(self) -> Callable:
        """What brings a fresh pipeline there."""
        return self.alone or self.happens or nothing


@dataclass(frozen=True)
class Case:
    """What a user does with a pipeline.

    Args:
        name: as the matrix has it.
        about: what happens, in half a sentence.
        moments: one after the other, an image after each.
        start: (bench, pipe) makes the pipeline that the technique is put on.
        whole: whether it touches more of a pipeline than its transformer.
        needs: the package that it needs.
    """

    name: str
    about: str
    moments: tuple[Moment, ...]
    start: Callable | None = None
    whole: bool = False
    needs: str = ""


# --- what happens -----------------------------------------------------------------------------------------


def nothing(bench: Bench, pipe) -> None:
    """It stays as it is."""


def _lora(bench, pipe):
    pipe.load_lora_weights(bench.lora(1), adapter_name="one")


def _scale(bench, pipe):
    pipe.set_adapters(["one"], [0.5])


def _lora_scaled(bench, pipe):
    _lora(bench, pipe)
    _scale(bench, pipe)


def _swap(bench, pipe):
    _other_lora(bench, pipe)
    pipe.set_adapters(["two"], [1.0])
    pipe.delete_adapters("one")


def _other_lora(bench, pipe):
    pipe.load_lora_weights(bench.lora(2), adapter_name="two")


def _no_lora(bench, pipe):
    pipe.unload_lora_weights()


def _quantized(bench, pipe):
    t.TorchAO("int8 weight-only").apply(pipe)


def _controlnet(bench, pipe):
    return pipelines.as_use_case(pipe, CONTROLNET_TXT2IMG, *bench.controlnets(1))


def _controlnets(bench, pipe):
    from diffusers import FluxMultiControlNetModel

    return pipelines.as_use_case(pipe, CONTROLNET_TXT2IMG, FluxMultiControlNetModel(bench.controlnets(2)))


def _as(name: str, channels: int = 0) -> Callable:
    """Another of diffusers' pipelines of the same parts; with a random transformer of so many channels, if any."""

    def made(bench, pipe):
        if channels:
            sizes = {"in_channels": channels, "out_channels": pipe.transformer.config.in_channels}
            pipe.transformer = random(type(pipe.transformer), pipe, num_layers=1, num_single_layers=1, **sizes)
        return pipelines.of_kind(pipe, name)

    return made


def _flux2(bench, pipe):
    return bench.flux2()


def _as_txt2img(bench, pipe):
    return pipelines.as_use_case(pipe, TXT2IMG)


def _as_img2img(bench, pipe):
    return pipelines.as_use_case(pipe, IMG2IMG)


def _ip_adapter(bench, pipe):
    pipe.load_ip_adapter(bench.ip_adapter(), weight_name="", image_encoder_pretrained_model_name_or_path=None)


def _no_ip_adapter(bench, pipe):
    pipe.unload_ip_adapter()


def _interrupt(bench, pipe):
    def stop(pipe, step, *_):
        pipe._interrupt = step == 1
        return {}

    bench.image(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=[])


def _offload(bench, pipe):
    if bench.device.type == "cuda":
        pipe.enable_model_cpu_offload()
        return
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    def again():  # as diffusers does it after every image; it asks for an accelerator before it begins
        remove_hook_from_module(pipe.transformer, recurse=True)
        cpu_offload_with_hook(pipe.transformer, bench.device)

    pipe.maybe_free_model_hooks = again
    again()


def _offload_groups(bench, pipe):
    pipe.transformer.enable_group_offload(onload_device=bench.device, offload_type="leaf_level")


def _convert(bench, pipe):
    pipe.to(torch.bfloat16 if bench.dtype == torch.float32 else torch.float32)


def _move(bench, pipe):
    pipe.to("cpu")
    pipe.to(bench.device)


def _change(bench, pipe):
    pipe.transformer.proj_out.weight.data.mul_(0.5)


def _copy(bench, pipe):
    twin = copy.deepcopy(pipe)
    _change(bench, twin)
    return twin


def _copy_beside(bench, pipe):
    _copy(bench, pipe)


def _save(bench, pipe):
    from diffusers import FluxTransformer2DModel

    made = bench.fresh()
    with leftovers.folder("saved") as folder:
        pipe.transformer.save_pretrained(folder)
        made.transformer.load_state_dict(
            FluxTransformer2DModel.from_pretrained(folder, use_safetensors=True).state_dict()
        )
    return made


def _schedule_anew(bench, pipe):
    bench.earlier, pipe.scheduler = pipe.scheduler, type(pipe.scheduler).from_config(pipe.scheduler.config)


def _schedule_as_before(bench, pipe):
    pipe.scheduler = bench.earlier


def _inferring(bench, pipe, ask):
    with torch.inference_mode():
        return bench.image(pipe, ask)


def _beside(bench, pipe):
    """(run, run): two pipelines of the same parts with schedulers of their own, an image each."""
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return [functools.partial(bench.image, one, Ask(which=i)) for i, one in enumerate((pipe, other))]


def _in_turn(bench, pipe, ask):
    return torch.cat([run() for run in _beside(bench, pipe)])


def _at_once(bench, pipe, ask):
    made: dict[int, torch.Tensor | Exception] = {}

    def work(i: int, run) -> None:
        try:
            with torch.no_grad():
                made[i] = run()
        except Exception as error:  # noqa: BLE001  raised again below: a thread has no one else to tell
            made[i] = error

    threads = [threading.Thread(target=work, args=each) for each in enumerate(_beside(bench, pipe))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in sorted(made):
        if isinstance(made[i], Exception):
            raise made[i]
    return torch.cat([made[i] for i in sorted(made)])


_inpainting, _kontext, _control_img2img = (
    _as(f"Flux{kind}Pipeline") for kind in ("Inpaint", "Kontext", "ControlImg2Img")
)
BACK = Moment("as before")
PUT_ON = Case("put on", "it is put on, an image is made, and it is taken off", ())
LORA = Case("LoRA", "a LoRA is loaded, scaled, swapped for another and removed", (
    Moment("LoRA loaded", _lora), Moment("LoRA scaled", _scale, alone=_lora_scaled),
    Moment("LoRA swapped", _swap, alone=_other_lora), Moment("LoRA removed", _no_lora, alone=nothing),
), needs="peft")  # fmt: skip
CASES = (
    LORA,
    Case("LoRA first", "it is put on with a LoRA there, which is then scaled and removed", (
        Moment("LoRA scaled", _scale), Moment("LoRA removed", _no_lora),
    ), _lora, needs="peft"),
    Case("LoRA, quantized", "it is put on with INT8 weights there; then a LoRA is loaded and removed", (
        Moment("LoRA loaded", _lora), Moment("LoRA removed", _no_lora, alone=nothing),
    ), _quantized, needs="peft"),
    Case("size", "an image of another size, and one of the first size again", (
        Moment("another size", ask=Ask(width=96, height=48)), BACK,
    )),
    Case("batch", "two prompts at once, and one again", (Moment("two prompts", ask=Ask(batch=2)), BACK)),
    Case("several images", "two images of a prompt, and one again", (Moment("two images", ask=Ask(each=2)), BACK)),
    Case("true guidance", "a negative prompt (CFG), and none again", (Moment("CFG", ask=Ask(true=2.0)), BACK)),
    Case("ControlNet", "another condition; then txt2img from the same parts", (
        Moment("another condition", ask=Ask(which=1)), Moment("txt2img", _as_txt2img, apart=True),
    ), _controlnet),
    Case("two ControlNets", "another pair of conditions; then txt2img from the same parts", (
        Moment("other conditions", ask=Ask(which=1)), Moment("txt2img", _as_txt2img, apart=True),
    ), _controlnets),
    Case("IP-Adapter", "an IP-Adapter is loaded, used and removed", (
        Moment("IP-Adapter", _ip_adapter, Ask(picture=True)), Moment("removed", _no_ip_adapter, alone=nothing),
    )),
    Case("img2img", "img2img from the same parts at two strengths, and txt2img again", (
        Moment("strength 0.75", _as_img2img), Moment("strength 0.5", _as_img2img, Ask(strength=0.5)), BACK,
    )),
    Case("inpainting", "inpainting from the same parts, another picture and mask, and txt2img again", (
        Moment("inpainting", _inpainting), Moment("another picture", _inpainting, Ask(which=1)), BACK,
    )),
    Case("Kontext", "Kontext from the same parts, and txt2img again", (Moment("Kontext", _kontext), BACK)),
    Case("Fill", "Fill's transformer; another picture and mask, and another size", (
        Moment("another picture", ask=Ask(which=1)), Moment("another size", ask=Ask(width=96, height=48)), BACK,
    ), _as("FluxFillPipeline", 384)),
    Case("Control", "Control's transformer; another condition, then as img2img", (
        Moment("another condition", ask=Ask(which=1)), Moment("img2img", _control_img2img, apart=True), BACK,
    ), _as("FluxControlPipeline", 128)),
    Case("Redux", "prompts with a picture's tokens behind them, and without them again", (
        Moment("with a picture", ask=Ask(seen=9)), Moment("another picture", ask=Ask(which=1, seen=9)),
        Moment("under CFG", ask=Ask(true=2.0, seen=9)), BACK,
    )),
    Case("FLUX.2", "FLUX.2-klein's pipeline instead of FLUX.1's; put on and taken off", (), _flux2),
    Case("interrupt", "an image is interrupted; then the same, and one of fewer steps", (
        Moment("interrupted", _interrupt, alone=nothing), Moment("with fewer steps", _interrupt, Ask(fewer=1), nothing),
        BACK,
    )),
    Case("scheduler", "a new scheduler of the same kind, and the one before again", (
        Moment("new scheduler", _schedule_anew, alone=nothing),
        Moment("scheduler as before", _schedule_as_before, alone=nothing),
    )),
    Case("model offload", "diffusers' model offloading; two images", (
        Moment("offloaded", _offload, rounded=True), BACK,
    ), whole=True),
    Case("group offload", "diffusers' group offloading, layer by layer", (
        Moment("offloaded", _offload_groups, alone=nothing),
    )),
    Case("inference_mode", "an image under torch.inference_mode, and one without", (
        Moment("inference_mode", made=_inferring, right=Bench.image), BACK,
    )),
    Case("dtype", "the pipeline is converted to another number format", (
        Moment("converted", _convert, rounded=True),
    ), whole=True),
    Case("device", "the pipeline is moved to the CPU and back", (Moment("moved", _move, alone=nothing),), whole=True),
    Case("deepcopy", "it is copied, and the copy's weights are changed", (
        Moment("copied", _copy_beside, alone=nothing), Moment("the copy", _copy, alone=_change, apart=True),
    )),
    Case("save", "the transformer is saved and loaded again", (
        Moment("loaded again", _save, alone=nothing, apart=True, plain=True), BACK,
    )),
    Case("two threads", "two pipelines with the same parts at the same time", (
        Moment("two threads", made=_at_once, right=_in_turn), BACK,
    )),
)  # fmt: skip
