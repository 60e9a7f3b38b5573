"""The live explorer of notebooks/explore.ipynb: any use case, gate, setting, predictor, prompt and seed, made here.

    from fluxnb.explore import Explorer
    Explorer()

*Run* generates in the background with a progress bar and a preview of every few steps, *Stop* ends it after the
current step. What was made can be kept and compared. The speed of a threshold that nobody measured is predicted from
the measured ones beside it, and says so.
"""

from __future__ import annotations

import io
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from fluxnb import families, params
from fluxnb.cache import Cache, Cascade, predictors
from fluxnb.errors import UserError
from fluxnb.families import COMBINED, FIRST_BLOCK, TEACACHE
from fluxnb.installed import need
from fluxnb.measure import quality
from fluxnb.models import control, embedded, material, pipelines
from fluxnb.study import Study, fitted
from fluxnb.study.results import Results
from fluxnb.study.row import Row
from fluxnb.technique import applied

GPU = "FLUXNB_GPU"  # the configuration, where it runs by itself
NONE = "none"
GATES = (NONE, *(f.name for f in families.ALL if f.cache), COMBINED.name)  # what can be chosen
PREVIEW_EVERY = 4  # steps between two previews: decoding one takes about as long as a step


# --- what can be said without running ---------------------------------------------------------------------


def measured(rows: list[Row], gate: str, model: str, steps: int, use_case: str = "txt2img") -> dict[float, float]:
    """Place on the dial -> measured speedup of a family by name, where nothing else is set, of one model."""
    found: dict[float, list[float]] = {}
    dial = families.named(gate).dial if gate != NONE else None
    for r in rows:
        plain = dial in r.settings and set(r.settings) <= {dial, "dtype", "inputs"} and r.family == gate
        same = (r.model, r.steps, r.use_case) == (model, steps, use_case)
        if plain and same and r.speedup:
            found.setdefault(float(r.setting(dial)), []).append(r.speedup)
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


def gate_of(name: str, dials: dict[str, float], second: float, model: str):
    """The gate that the widgets describe; None for none. Raises UserError for values that make no sense.

    Args:
        name: one of `GATES`.
        dials: a family's dial -> where its widget stands.
        second: threshold of the second gate of the combined cache, after the first block.
    """
    if name not in GATES:
        raise UserError(f"There is no gate {name!r}: choose one of {', '.join(GATES)}.")
    if name == NONE:
        return None
    first = TEACACHE if name == COMBINED.name else families.named(name)
    gate = first.gate_class().at(dials[first.dial], model)
    return Cascade(gate, FIRST_BLOCK.gate_class().at(second, model)) if name == COMBINED.name else gate


def tables(gpu: params.Params, root: Path) -> dict[str, list[Row]]:
    """The measured rows of a configuration, whose they are -> rows: the user's own first, then the reference's."""
    folders = {"measured here": gpu.own_dir, "measured for the reference": gpu.report_dir}
    found = {whose: root / folder / "results.csv" for whose, folder in folders.items()}
    return {whose: [r for r in Results(path).rows() if r.ok] for whose, path in found.items() if path.is_file()}


# --- the widgets ------------------------------------------------------------------------------------------


class Explorer:
    """The widgets, shown when the object is the last of a cell.

    Args:
        model: a model by name; that of `make explore MODEL=…` by default, or else the embedded one.
        gpu: the configuration whose rows predictions are made from; that of `make explore GPU=…` by default.
    """

    def __init__(self, model: str | None = None, gpu: str | None = None):
        w = need("ipywidgets", "The live explorer")

        chosen, root = params.chosen(gpu or os.environ.get(GPU, "cpu")), params.find_folder().parent
        s = Study(chosen, "explore", root)
        subject = s.subject(model or (chosen.model.name if chosen.model else embedded.NAME))
        self.model, self._pipes = subject.model, {"txt2img": s.pipe(subject)}
        fitted.know(s)
        self.tables = tables(chosen, root)
        self.full = s.steps(subject)  # what speeds were measured at
        self.kept: list[Made] = []
        self.latest: Made | None = None
        self.job: Job | None = None
        self._baselines: dict[Wanted, Made] = {}

        style = {"description_width": "7rem"}
        self.use_case = w.Dropdown(
            options=list(pipelines.USE_CASES), description="Use case", layout=_wide(), style=style
        )
        self.kind = w.Dropdown(options=list(control.MODES), description="Condition", layout=_wide(), style=style)
        self.strength = w.FloatSlider(
            value=0.8, min=0.1, max=1, step=0.05, description="Strength", layout=_wide(), style=style
        )
        self.gate = w.Dropdown(options=GATES, value=FIRST_BLOCK.name, description="Gate", layout=_wide(), style=style)
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
        self.dials = {families.INTERVAL.dial: self.every}  # dial -> its widget; any other dial is the threshold's
        self.predictor = w.Dropdown(options=families.PREDICTORS, description="Reuse", layout=_wide(), style=style)
        self.warm_up = w.IntSlider(value=0, min=0, max=12, description="Computed first", layout=_wide(), style=style)
        self.prompt = w.Combobox(
            value=chosen.study.prompts[0], options=list(chosen.study.prompts), description="Prompt", layout=_wide(),
            style=style,
        )  # fmt: skip
        self.seed = w.IntText(value=0, description="Seed", layout=_wide(), style=style)
        self.steps = w.IntSlider(value=self.full, min=2, max=50, description="Steps", layout=_wide(), style=style)
        self.run = w.Button(description="Run", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.keep = w.Button(description="Keep", icon="bookmark", disabled=True)
        self.bar = w.IntProgress(value=0, min=0, max=self.full, layout=_wide())
        self.said = w.HTML()
        self.predicted = w.HTML()
        nothing = _png(Image.new("RGB", (self.model.width, self.model.height), (128, 128, 128)))
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
        for widget in (self.use_case, self.gate, self.threshold, self.every):
            widget.observe(lambda _: self._foresee(), "value")
        self.run.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.job and self.job.stop())
        self.keep.on_click(lambda _: self._keep())
        self._foresee()

    def _repr_mimebundle_(self, **kwargs):
        return self.box._repr_mimebundle_(**kwargs)

    # --- what is foreseen ---

    def _dial(self, gate: str):
        """The widget that a gate's dial is on; None for none."""
        if gate == NONE:
            return None
        family = TEACACHE if gate == COMBINED.name else families.named(gate)
        return self.dials.get(family.dial, self.threshold)

    def _points(self, gate: str, use_case: str) -> tuple[str, dict[float, float]]:
        """(whose they are, measured points) of the first table that has two to predict from, else of any."""
        found = {
            whose: measured(rows, gate, self.model.name, self.full, use_case) for whose, rows in self.tables.items()
        }
        return max(found.items(), key=lambda item: min(len(item[1]), 2), default=("", {}))

    def _foresee(self) -> None:
        gate, use_case = self.gate.value, self.use_case.value
        dial = self._dial(gate)
        for widget, shown in (
            (self.threshold, dial is self.threshold),
            (self.second, gate == COMBINED.name),
            (self.every, dial is self.every),
            (self.kind, pipelines.takes_condition(use_case)),
            (self.strength, pipelines.takes_image(use_case)),
            (self.beginning, use_case != "txt2img"),
        ):
            widget.layout.display = None if shown else "none"
        whose, points = self._points(gate, use_case)
        if dial is not None and dial.value in points:
            self.predicted.value = f"{whose}, {self.full} steps: {points[dial.value]:.2f}×"
        elif dial is not None and (speed := predict(points, dial.value)) is not None:
            error = prediction_error(points)
            beside = "" if error is None else f"; left out, measured points are missed by {error:.0%} on average"
            self.predicted.value = (
                f"<em>predicted</em>: {speed:.2f}× (from settings {whose}, {self.full} steps{beside})"
            )
        else:
            self.predicted.value = "no measured settings beside this one"

    # --- running ---

    def start(self) -> Job:
        """Begins to make the image of the current setting; the baseline first, if this input has none yet."""
        try:
            turned = {f.dial: self.dials.get(f.dial, self.threshold).value for f in families.ALL if f.cache}
            gate = gate_of(self.gate.value, turned, self.second.value, self.model.name)
            wanted = self._wanted()
        except UserError as error:
            self.said.value = str(error)
            return Job()
        if gate is not None:
            gate.warm_up = self.warm_up.value
        cache = Cache(gate, predictors.named(self.predictor.value)) if gate is not None else None
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
            given = material.of(prompt, seed, self.model.width, self.model.height)
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
            apart = quality.in_words(baseline.image, made.image)
            speed = baseline.seconds / made.seconds
            self.said.value = (
                f"{made.label}: {speed:.2f}×, {made.computed} of {made.total} steps, {apart}, {made.seconds:.2f} s"
            )
            dial, (_, points) = self._dial(self.gate.value), self._points(self.gate.value, wanted.use_case)
            if (foreseen := predict(points, dial.value)) is not None:
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
            drawn = material.of(wanted.prompt, wanted.seed, self.model.width, self.model.height)
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
        w = need("ipywidgets", "The live explorer")

        if self.latest is None or self.latest in self.kept:
            return
        self.kept.append(self.latest)
        small = w.Image(format="png", width=128, height=128, value=_png(self.latest.image))
        words = w.HTML(f"{self.latest.label}<br>{self.latest.computed} of {self.latest.total} steps")
        self.shelf.children = (*self.shelf.children, w.VBox([small, words]))


def _wide():
    """A layout of its own for each widget: one that is shared would hide them all."""
    w = need("ipywidgets", "The live explorer")

    return w.Layout(width="26rem")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _show(widget, image: Image.Image) -> None:
    widget.value = _png(image)
