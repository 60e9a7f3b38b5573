"""Rows of measurements that tests make up."""

from fluxnb import families, notebooks
from fluxnb.study.row import Row

FULL_SIZE = {"weights": "random", "model": "flux-dev-random"}


def row(**changed) -> Row:
    """A baseline of the embedded model on a laptop, changed."""
    values = {
        "notebook": notebooks.COMBINED, "family": families.BASELINE.name, "technique": families.BASELINE.name,
        "label": "28 steps", "settings": {"dtype": "float32", "inputs": "a"}, "model": "embedded",
        "weights": "trained", "use_case": "txt2img", "gpu": "cpu", "gpus": 1, "width": 128, "height": 128, "steps": 28,
        "batch": 1, "users": 1, "images_each": 1, "status": "ok", "n": 3, "latency_p50": 0.4, "speedup": 1.0,
        "speedup_ci_low": 0.9, "speedup_ci_high": 1.1, "computed_steps": 28.0, "total_steps": 28, "images": 1,
        "psnr_identical": 1, "ssim": 1.0, "adherence": 1.0, "memory_peak_gib": 0.1, "host": "m", "kind": "k",
        "versions": "v", "measured_at": "2026-11-20T00:00:00+00:00", "run_id": "r",
    }  # fmt: skip
    return Row(**values | changed)


def cached(threshold: float, speedup: float, psnr: float, computed: float, **changed) -> Row:
    """A setting of First Block Cache."""
    family = families.FIRST_BLOCK.name
    own = {"notebook": notebooks.FIRST_BLOCK, "family": family, "technique": family, "label": f"FBCache {threshold:g}"}
    own |= {"settings": {"dtype": "float32", "inputs": "a", "threshold": threshold}, "computed_steps": computed}
    return row(**own | {"speedup": speedup, "psnr_db": psnr} | changed)


def stacked(stack: str, notebook: str = notebooks.FINAL_STACK, **changed) -> Row:
    """A stack at full size."""
    about = {"notebook": notebook, "stack": stack, "label": stack, "family": families.STACK.name, "technique": stack}
    return row(**about | FULL_SIZE | changed)
