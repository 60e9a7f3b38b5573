"""One measurement: what was measured, where it comes from, and what came out.

A row carries all that a table, a chart or the ledger needs: nothing is read out of a string again. An empty cell is
None, and means that it wasn't measured or, in a row of an earlier format, that it can't be known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field


def _column(kind: str, help: str, key: bool = False):
    default = {"default_factory": dict} if help.startswith("plain values") else {"default": None}
    return field(metadata={"kind": kind, "help": help, "key": key}, **default)


def _text(help: str, key: bool = False):
    return _column("text", help, key)


def _int(help: str, key: bool = False):
    return _column("int", help, key)


def _float(help: str):
    return _column("float", help)


def _dict(help: str, key: bool = False):
    return _column("dict", help, key)


def _list(help: str):
    return _column("list", help)


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement. The order of the fields is that of the columns in results.csv."""

    id: str | None = _text("permanent: a short hash of what determines the row")
    # meaning
    label: str | None = _text("what a reader sees, with everything that distinguishes it")
    mark: str | None = _text("what a chart writes at its point")
    notebook: str | None = _text("the notebook that measured it", key=True)
    family: str | None = _text("of techniques: fluxnb.families")
    technique: str | None = _text("the field's standard term of what is measured", key=True)
    stack: str | None = _text("its name in fluxnb.stacks, where it has one", key=True)
    exact: str | None = _text("how far its image is from the baseline's: fluxnb.technique.EXACTNESS")
    settings: dict = _dict("plain values of the techniques, of the model and of its inputs", key=True)
    model: str | None = _text("by name", key=True)
    weights: str | None = _text("trained or random", key=True)
    use_case: str | None = _text("a key of fluxnb.models.pipelines.USE_CASES", key=True)
    gpu: str | None = _text("the configuration: a file in params/", key=True)
    gpus: int | None = _int("that it ran on", key=True)
    width: int | None = _int("of the image in pixels", key=True)
    height: int | None = _int("of the image in pixels", key=True)
    steps: int | None = _int("denoising steps asked for", key=True)
    batch: int | None = _int("images made at once", key=True)
    users: int | None = _int("who wait for each answer", key=True)
    images_each: int | None = _int("images of one request", key=True)
    seed: int | None = _int("where one decides", key=True)
    # what came out
    status: str | None = _text("ok, oom, unavailable or error")
    reason: str | None = _text("why it isn't ok")
    n: int | None = _int("latency samples")
    latency_min: float | None = _float("seconds")
    latency_p25: float | None = _float("seconds")
    latency_p50: float | None = _float("seconds")
    latency_p90: float | None = _float("seconds")
    latency_p99: float | None = _float("seconds, from 100 samples on")
    latency_avg: float | None = _float("seconds")
    load_s: float | None = _float("seconds until the pipeline was loaded")
    warmup_s: float | None = _float("seconds of all warm-up images")
    first_s: float | None = _float("seconds of the first image")
    stable: int | None = _int("1: warm-up ended by its rule, 0: by its limit")
    text_s: float | None = _float("median seconds of the text encoders")
    denoise_s: float | None = _float("median seconds of denoising")
    vae_s: float | None = _float("median seconds of the VAE")
    images_per_s: float | None = _float("images per second")
    memory_load_gib: float | None = _float("GiB of the weights")
    memory_avg_gib: float | None = _float("GiB allocated, on average")
    memory_peak_gib: float | None = _float("GiB allocated at the peak")
    gpu_util_avg: float | None = _float("% of the timed window")
    gpu_memory_avg_pct: float | None = _float("% of the card in the timed window")
    speedup: float | None = _float("median of the baseline's time over its own, round by round")
    speedup_ci_low: float | None = _float("lower end of its 95 % interval; of fewer than 6 rounds, of their range")
    speedup_ci_high: float | None = _float("upper end of it")
    baseline_p50: float | None = _float("median seconds of the baseline in the same rounds")
    computed_steps: float | None = _float("denoising steps computed, on average over images")
    total_steps: int | None = _int("denoising steps run")
    images: int | None = _int("images judged")
    psnr_db: float | None = _float("dB against the baseline's image, mean; empty where all are identical")
    psnr_min_db: float | None = _float("dB, worst image")
    psnr_identical: int | None = _int("images identical to the baseline's")
    ssim: float | None = _float("structural similarity, mean")
    ssim_min: float | None = _float("structural similarity, worst image")
    st_lpips: float | None = _float("ST-LPIPS (AlexNet) against the baseline's image, mean: 0 is the same image")
    st_lpips_max: float | None = _float("ST-LPIPS, worst image")
    flip: float | None = _float("FLIP against the baseline's image, mean: 0 is the same image")
    flip_max: float | None = _float("FLIP, worst image")
    clip_score: float | None = _float("cosine of image and prompt in a given CLIP, mean")
    clip_score_min: float | None = _float("cosine of image and prompt in a given CLIP, worst image")
    adherence: float | None = _float("share of the prompt's facts found, mean")
    adherence_min: float | None = _float("share of the prompt's facts found, worst image")
    psnr_inside_db: float | None = _float("dB inside the inpainting mask, against the baseline")
    psnr_outside_db: float | None = _float("dB outside the mask, against the baseline")
    kept_db: float | None = _float("dB outside the mask, against the given image")
    kept_vae_db: float | None = _float("the same of the given image through the VAE alone: no pipeline keeps more")
    agreement: float | None = _float("with the ControlNet's condition")
    telemetry: dict | None = _dict("of the timed window: clocks, power, temperature, throttling, CPU and other load")
    samples: list | None = _list("seconds, in the order in which they were taken")
    again: list | None = _list(
        "of a baseline: seconds of the same a second time, in turn with the first: the noise floor"
    )
    proof: dict | None = _dict("what shows that the technique did something")
    # origin
    baseline: str | None = _text("id of the baseline's row that was timed in turn with it")
    session: str | None = _text("one stay on one machine; only rows of one may be compared second by second")
    host: str | None = _text("unique to a machine", key=True)
    kind: str | None = _text("digest of the machine's specification: what may be compared")
    commit: str | None = _text("of the code, with + where files had changed")
    code: str | None = _text("digest of the techniques' own code")
    versions: str | None = _text("of what a measurement depends on most", key=True)
    measured_at: str | None = _column("time", "ISO 8601")
    run_id: str | None = _text("of the process")

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.status == "ok"

    @property
    def baseline_s(self) -> float | None:
        """Median seconds of the baseline that was timed in turn with it."""
        if self.baseline_p50 is not None or None in (self.speedup, self.latency_p50):
            return self.baseline_p50
        return self.speedup * self.latency_p50  # earlier rows' speedup is the ratio of both medians

    def setting(self, name: str, default=None):
        """One of its settings."""
        return self.settings.get(name, default)

    def shown(self, name: str, default=None):
        """One entry of its proof."""
        return (self.proof or {}).get(name, default)

    def as_dict(self) -> dict:
        """Column -> value, as `Results.append` takes them."""
        return {name: getattr(self, name) for name in COLUMNS}


FIELDS = {f.name: f for f in dataclasses.fields(Row)}
COLUMNS: dict[str, str] = {name: f.metadata["kind"] for name, f in FIELDS.items()}
KEY = tuple(name for name, f in FIELDS.items() if f.metadata["key"])
STATUSES = ("ok", "oom", "unavailable", "error")
FINISHED = ("ok", "oom", "unavailable")  # an "error" row is measured again
WEIGHTS = ("trained", "random")


def row_id(columns: dict) -> str:
    """The permanent id of a row, 10 hex digits: a digest of its key and of when, where and by whom it was measured."""
    determines = [columns.get(name) for name in (*KEY, "session", "commit", "measured_at", "run_id")]
    text = json.dumps(determines, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
