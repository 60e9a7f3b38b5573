"""The notebooks by their file names: the one place in the library that spells them."""

from __future__ import annotations

from pathlib import Path

ENVIRONMENT = "00_environment"
NUMBER_FORMATS = "01_baseline"
ATTENTION = "02_attention"
COMPILATION = "03_compile"
QUANTIZATION = "04_quantization"
FIRST_BLOCK = "05_first_block_cache"
TEACACHE = "06_teacache"
COMBINED = "07_combined_cache"
QUANTIZED_CACHE = "08_quantized_cache"
VAE = "09_vae"
USE_CASES = "10_use_cases"
PARALLEL = "11_parallel"
LOAD = "12_load"
FINAL_STACK = "13_final_stack"
PEERS = "14_peers"
EMBEDDED = "15_embedded_model"
SURVIVAL = "16_survive"

SEVERAL_GPUS = (ENVIRONMENT, PARALLEL, LOAD)  # what a configuration of several GPUs runs; the rest needs only one
JUDGING = (TEACACHE, COMBINED, QUANTIZED_CACHE)  # that ask what becomes of images: nothing, of random weights
OF_EMBEDDED = (EMBEDDED, SURVIVAL)  # about what ships with the study, and no model of anybody else's


def first(gpus: int = 1) -> str:
    """The notebook that a recommendation rests on, which is made before the others."""
    return FINAL_STACK if gpus == 1 else PARALLEL


def sources(root: Path, gpus: int = 1, model: str = "") -> list[Path]:
    """The notebooks that make reports, in reading order; on several GPUs those that use them.

    Args:
        model: of the user's; then those that are about the study's own are left out.
    """
    found = sorted(p for p in (root / "notebooks").glob("*.ipynb") if p.name[:1].isdigit())
    return [p for p in found if (gpus == 1 or p.stem in SEVERAL_GPUS) and not (model and p.stem in OF_EMBEDDED)]
