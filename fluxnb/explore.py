"""The live explorer of explore.ipynb: any use case, gate, threshold, predictor, prompt and seed, on this machine.

    from fluxnb.explore import Explorer
    Explorer()

*Run* generates in the background with a progress bar and a preview of every few steps, *Stop* ends it after the
current step. What was made can be kept and compared. The speed of a threshold that nobody measured is predicted from
the measured ones beside it, and says so.
"""

from __future__ import annotations

import io
import threading
import time
from dataclasses import dataclass, field

import torch
from PIL import Image

from fluxnb import params
from fluxnb.cache import Cache, Cascade, FirstBlock, Hold, Interval, Taylor, TeaCache, teacache
from fluxnb.errors import UserError
from fluxnb.measure import quality
from fluxnb.models import control, material, pipelines
from fluxnb.study.results import Results
from fluxnb.technique import applied

GATES = ("none", "First Block Cache", "TeaCache", "both, one after the other", "fixed interval")
PREDICTORS = {"hold": Hold, "Taylor 1": lambda: Taylor(1), "Taylor 2": lambda: Taylor(2)}
PREVIEW_EVERY = 4  # steps between two previews: decoding one takes about as long as a step


# --- what can be said without running ---------------------------------------------------------------------


def measured(rows: list[dict], technique: str, use_case: str = "txt2img") -> dict[float, float]:
    """Threshold -> measured speedup of a technique that has a threshold and nothing else set, on the embedded model."""
    found: dict[float, list[float]] = {}
    for r in rows:
        plain = set(r["settings"]) <= {"threshold", "dtype", "inputs"} and r["technique"] == technique
        same = r["model"] == "embedded" and r["steps"] == 28 and r["use_case"] == use_case
        if plain and same and r["speedup"]:
            found.setdefault(float(r["settings"]["threshold"]), []).append(r["speedup"])
    return {t: sum(v) / len(v) for t, v in sorted(found.items())}


def predict(points: dict[float, float], threshold: float) -> float | None:
    """The speedup at a threshold, on the straight line between its measured neighbours; None outside of them."""
    import numpy as np

    if len(points) < 2 or not min(points) <= threshold <= max(points):
        return None
    return float(np.interp(threshold, list(points), list(points.values())))


def prediction_error(points: dict[float, float]) -> float | None:
    """Mean relative error of predicting each inner point from the others; None with fewer than three."""
    inner = list(points)[1:-1]
    if not inner:
        return None
    errors = []
    for t in inner:
        others = {k: v for k, v in points.items() if k != t}
        errors.append(abs(predict(others, t) / points[t] - 1))
    return sum(errors) / len(errors)


@dataclass
class Made:
    """One image that was made, and how."""

    label: str
    image: Image.Image
    seconds: float
    computed: int
    total: int


@dataclass(frozen=True)
class Wanted:
    """What decides the baseline image."""

    use_case: str
    prompt: str
    seed: int
    steps: int
    kind: str
    strength: float


@dataclass
class Job:
    """A generation in the background. `stop()` ends it after the current step."""

    stopped: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def stop(self) -> None:
        """Ends it after the current step; nothing is made."""
        self.stopped.set()

    def wait(self, timeout: float = 60.0) -> None:
        """Returns when it has ended."""
        self.thread.join(timeout)


def gate_of(name: str, threshold: float, second: float, every: int, model: str):
    """The gate that the widgets describe; None for none. Raises UserError for values that make no sense."""
    if name == "none":
        return None
    if name == "First Block Cache":
        return FirstBlock(threshold)
    if name == "TeaCache":
        return TeaCache(threshold, teacache.coefficients(model))
    if name == "both, one after the other":
        return Cascade(TeaCache(threshold, teacache.coefficients(model)), FirstBlock(second))
    if name == "fixed interval":
        return Interval(every)
    raise UserError(f"There is no gate {name!r}: choose one of {', '.join(GATES)}.")


# --- the widgets ------------------------------------------------------------------------------------------


class Explorer:
    """The widgets, shown when the object is the last of a cell.

    Args:
        model: a model by name.
        gpu: the configuration whose rows predictions are made from.
    """

    def __init__(self, model: str = "embedded", gpu: str = "cpu"):
        import ipywidgets as w

        chosen, root = params.load(gpu), params.find_folder().parent
        self.model, self._pipes = pipelines.describe(model), {"txt2img": pipelines.load(model)}
        table = root / chosen.report_dir / "results.csv"
        self.rows = [r for r in Results(table).rows() if r["status"] == "ok"] if table.is_file() else []
        self.kept: list[Made] = []
        self.latest: Made | None = None
        self.job: Job | None = None
        self._baselines: dict[tuple, Made] = {}

        style = {"description_width": "7rem"}
        self.use_case = w.Dropdown(
            options=list(pipelines.USE_CASES), description="Use case", layout=_wide(), style=style
        )
        self.kind = w.Dropdown(options=list(control.MODES), description="Condition", layout=_wide(), style=style)
        self.strength = w.FloatSlider(
            value=0.8, min=0.1, max=1, step=0.05, description="Strength", layout=_wide(), style=style
        )
        self.gate = w.Dropdown(
            options=GATES, value="First Block Cache", description="Gate", layout=_wide(), style=style
        )
        self.threshold = w.FloatSlider(
            value=0.12,
            min=0,
            max=1,
            step=0.01,
            description="Threshold",
            layout=_wide(),
            style=style,
            continuous_update=True,
        )
        self.second = w.FloatSlider(
            value=0.1, min=0, max=1, step=0.01, description="and after block 1", layout=_wide(), style=style
        )
        self.every = w.IntSlider(value=3, min=1, max=8, description="Every n-th step", layout=_wide(), style=style)
        self.predictor = w.Dropdown(options=list(PREDICTORS), description="Reuse", layout=_wide(), style=style)
        self.warm_up = w.IntSlider(value=0, min=0, max=12, description="Computed first", layout=_wide(), style=style)
        self.prompt = w.Combobox(
            value=chosen.study.prompts[0], options=list(chosen.study.prompts), description="Prompt", layout=_wide(),
            style=style,
        )  # fmt: skip
        self.seed = w.IntText(value=0, description="Seed", layout=_wide(), style=style)
        self.steps = w.IntSlider(value=28, min=2, max=50, description="Steps", layout=_wide(), style=style)
        self.run = w.Button(description="Run", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.keep = w.Button(description="Keep", icon="bookmark", disabled=True)
        self.bar = w.IntProgress(value=0, min=0, max=28, layout=_wide())
        self.said = w.HTML()
        self.predicted = w.HTML()
        nothing = _png(Image.new("RGB", (self.model.side, self.model.side), (128, 128, 128)))
        self.start_from, self.before, self.after = (
            w.Image(value=nothing, format="png", width=256, height=256) for _ in range(3)
        )
        self.shelf = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        controls = [self.use_case, self.gate, self.threshold, self.second, self.every, self.predictor, self.warm_up]
        controls += [self.kind, self.strength, self.prompt, self.seed, self.steps, self.predicted]
        controls.append(w.HBox([self.run, self.stop, self.keep]))
        self.beginning = w.VBox([w.Label("starts from"), self.start_from])
        pictures = w.HBox(
            [
                w.VBox([w.Label("baseline"), self.before]),
                w.VBox([w.Label("this setting"), self.after]),
                self.beginning,
            ],
            layout=w.Layout(flex_flow="row wrap"),
        )
        self.box = w.VBox([w.HBox([w.VBox(controls), w.VBox([pictures, self.bar, self.said])]), self.shelf])
        for widget in (self.use_case, self.gate, self.threshold):
            widget.observe(lambda _: self._foresee(), "value")
        self.run.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.job and self.job.stop())
        self.keep.on_click(lambda _: self._keep())
        self._foresee()

    def _repr_mimebundle_(self, **kwargs):
        return self.box._repr_mimebundle_(**kwargs)

    # --- what is foreseen ---

    def _foresee(self) -> None:
        name, threshold, use_case = self.gate.value, self.threshold.value, self.use_case.value
        for widget, shown in (
            (self.threshold, name in GATES[1:4]),
            (self.second, name in GATES[3:4]),
            (self.every, name in GATES[4:]),
            (self.kind, pipelines.takes_condition(use_case)),
            (self.strength, pipelines.takes_image(use_case)),
            (self.beginning, use_case != "txt2img"),
        ):
            widget.layout.display = None if shown else "none"
        points = measured(self.rows, name, use_case)
        if threshold in points:
            self.predicted.value = f"measured at this threshold: {points[threshold]:.2f}×"
        elif (speed := predict(points, threshold)) is not None:
            error = prediction_error(points)
            beside = "" if error is None else f" (left out, measured points are missed by {error:.0%} on average)"
            self.predicted.value = f"<em>predicted</em>: {speed:.2f}×{beside}"
        else:
            self.predicted.value = "no measured thresholds beside this one"

    # --- running ---

    def start(self) -> Job:
        """Begins to make the image of the current setting; the baseline first, if this input has none yet."""
        try:
            gate = gate_of(self.gate.value, self.threshold.value, self.second.value, self.every.value, self.model.name)
            wanted = self._wanted()
        except UserError as error:
            self.said.value = str(error)
            return Job()
        if gate is not None:
            gate.warm_up = self.warm_up.value
        cache = Cache(gate, PREDICTORS[self.predictor.value]()) if gate is not None else None
        self.run.disabled, self.stop.disabled, self.keep.disabled = True, False, True
        self.job = job = Job()
        job.thread = threading.Thread(target=self._work, args=(job, cache, wanted), daemon=True)
        job.thread.start()
        return job

    def _wanted(self) -> Wanted:
        """What the widgets ask for, and the picture it starts from on show."""
        use_case, prompt, seed = self.use_case.value, self.prompt.value, self.seed.value
        wanted = Wanted(use_case, prompt, seed, self.steps.value, self.kind.value, self.strength.value)
        if use_case != "txt2img":
            given = material.of(prompt, seed, self.model.side, self.model.side)
            picture = given.image if pipelines.takes_image(use_case) else given.condition(wanted.kind)
            _show(self.start_from, picture)
        return wanted

    def pipe(self, use_case: str):
        """The pipeline of a use case; they share their weights."""
        if use_case not in self._pipes:
            controlnet = pipelines.load_controlnet(self.model.name) if pipelines.takes_condition(use_case) else None
            self._pipes[use_case] = pipelines.as_use_case(self._pipes["txt2img"], use_case, controlnet)
        return self._pipes[use_case]

    def _work(self, job: Job, cache: Cache | None, wanted: Wanted) -> None:
        try:
            if wanted not in self._baselines:
                if (made := self._make(job, None, self.before, "baseline", wanted)) is None:
                    return
                self._baselines[wanted] = made
            baseline = self._baselines[wanted]
            _show(self.before, baseline.image)
            if cache is None:
                self.latest = baseline
                _show(self.after, baseline.image)
                self.said.value = f"baseline: {baseline.seconds:.2f} s"
                return
            made = self._make(job, cache, self.after, cache.label, wanted)
            if made is None:
                return
            self.latest = made
            decibels = quality.format_psnr(quality.psnr(baseline.image, made.image))
            speed = baseline.seconds / made.seconds
            self.said.value = (
                f"{made.label}: {speed:.2f}×, {made.computed} of {made.total} steps, {decibels}, {made.seconds:.2f} s"
            )
            points = measured(self.rows, self.gate.value, wanted.use_case)
            if (foreseen := predict(points, self.threshold.value)) is not None:
                self.said.value += f"; predicted were {foreseen:.2f}× ({foreseen / speed - 1:+.0%})"
        except Exception as error:  # noqa: BLE001  a thread has no one else to tell
            self.said.value = f"{type(error).__name__}: {error}"
        finally:
            if job.stopped.is_set():
                self.said.value = "stopped: nothing was made"
            self.run.disabled, self.stop.disabled, self.keep.disabled = False, True, self.latest is None

    def _make(self, job: Job, cache: Cache | None, picture, label: str, wanted: Wanted):
        pipe, steps = self.pipe(wanted.use_case), pipelines.steps_run(wanted.use_case, wanted.steps, wanted.strength)
        self.bar.max, self.bar.value, self.said.value = steps, 0, f"{label}: running"

        def on_step(step, latents):
            self.bar.value = step + 1
            if job.stopped.is_set():
                pipe._interrupt = True
            elif step % PREVIEW_EVERY == PREVIEW_EVERY - 1 and step + 1 < steps:
                _show(picture, pipelines.preview(pipe, latents, self.model))

        given = {}
        if wanted.use_case != "txt2img":
            drawn = material.of(wanted.prompt, wanted.seed, self.model.side, self.model.side)
            given = drawn.arguments(wanted.kind) | {"strength": wanted.strength}
        started = time.perf_counter()
        with applied(pipe, *([cache] if cache else [])), torch.no_grad():
            (image,) = pipelines.generate(
                pipe, [wanted.prompt], [wanted.seed], model=self.model, steps=wanted.steps, on_step=on_step, **given
            )
        if job.stopped.is_set():
            return None
        _show(picture, image)
        computed = cache.trace.mask.count("1") if cache else steps
        return Made(label, image, time.perf_counter() - started, computed, steps)

    def _keep(self) -> None:
        import ipywidgets as w

        if self.latest is None or self.latest in self.kept:
            return
        self.kept.append(self.latest)
        small = w.Image(format="png", width=128, height=128, value=_png(self.latest.image))
        words = w.HTML(f"{self.latest.label}<br>{self.latest.computed} of {self.latest.total} steps")
        self.shelf.children = (*self.shelf.children, w.VBox([small, words]))


def _wide():
    """A layout of its own for each widget: one that is shared would hide them all."""
    import ipywidgets as w

    return w.Layout(width="26rem")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _show(widget, image: Image.Image) -> None:
    widget.value = _png(image)
