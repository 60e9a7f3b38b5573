"""What can be asked of a model: the names of use cases and number formats. It imports no PyTorch."""

from __future__ import annotations

TXT2IMG, IMG2IMG, INPAINTING = "txt2img", "img2img", "inpainting"
CONTROLNET_TXT2IMG = f"ControlNet {TXT2IMG}"
CONTROLNET_IMG2IMG = f"ControlNet {IMG2IMG}"
CONTROLNET_INPAINTING = f"ControlNet {INPAINTING}"

USE_CASES = {  # name -> diffusers' pipeline
    TXT2IMG: "FluxPipeline",
    IMG2IMG: "FluxImg2ImgPipeline",
    INPAINTING: "FluxInpaintPipeline",
    CONTROLNET_TXT2IMG: "FluxControlNetPipeline",
    CONTROLNET_IMG2IMG: "FluxControlNetImg2ImgPipeline",
    CONTROLNET_INPAINTING: "FluxControlNetInpaintPipeline",
}
KONTEXT, FILL, CONTROL, REDUX, IP_ADAPTER = "Kontext", "Fill", "Control", "Redux", "IP-Adapter"
TIME_ONLY = {  # that no model here is trained for -> diffusers' pipeline
    KONTEXT: "FluxKontextPipeline",
    FILL: "FluxFillPipeline",
    CONTROL: "FluxControlPipeline",
    REDUX: "FluxPipeline",
    IP_ADAPTER: "FluxPipeline",
}
CONDITIONS = ("edges", "depth")  # that a ControlNet may be given
NUMBER_FORMATS = ("float32", "float16", "bfloat16")


def takes_image(use_case: str) -> bool:
    """Whether a use case starts from an image."""
    return use_case not in TIME_ONLY and not use_case.endswith(TXT2IMG)


def takes_condition(use_case: str) -> bool:
    """Whether a use case has a ControlNet."""
    return use_case in (CONTROLNET_TXT2IMG, CONTROLNET_IMG2IMG, CONTROLNET_INPAINTING)


def steps_run(use_case: str, steps: int, strength: float) -> int:
    """How many of `steps` are run, counted as diffusers counts: fewer where an image is the start."""
    return steps - int(max(steps - min(steps * strength, steps), 0)) if takes_image(use_case) else steps
