"""The live explorer of notebooks/explore.ipynb: any use case, gate, setting, predictor, prompt and seed, made here.

    from fluxnb.explore import Explorer
    Explorer()

The widgets are there at once, the model follows. *Run* makes baseline and setting in the background, warm and timed
without the previews, *Stop* ends that before the next layer. What was made can be kept, compared and exported with all
that made it. The speed of a threshold that nobody measured is predicted from the measured ones beside it, and the
error of these predictions is shown.
"""

from __future__ import annotations

import csv
import json
import os
import threading
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fluxnb import families, params, recipes
from fluxnb.cache import Cache, Cascade, predictors
from fluxnb.errors import UserError
from fluxnb.explore.job import Job, Stopped
from fluxnb.explore.made import Made, One, Wanted, png, sheet
from fluxnb.families import COMBINED, FIRST_BLOCK, TEACACHE
from fluxnb.installed import need
from fluxnb.models import control, embedded, material, pipelines
from fluxnb.scrub import scrub
from fluxnb.study import Study, fitted
from fluxnb.study.results import Results
from fluxnb.study.row import Row
from fluxnb.technique import applied

GPU = "FLUXNB_GPU"  # the configuration, where it runs by itself
NONE = "none"
GATES = (NONE, *(f.name for f in families.ALL if f.cache), COMBINED.name)  # what can be chosen
PREVIEW_EVERY = 4  # steps between two previews: decoding one takes about as long as a step
MOST_IMAGES = 4  # of one setting, each from a seed of its own
STOPPED = "stopped: nothing was made"
EXPORTS = Path("build") / "explore"  # below the project, where git doesn't look


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
        self.model, self._load = subject.model, lambda: s.pipe(subject)
        self._pipes: dict[str, Any] = {}
        fitted.know(s)
        own = (self.model.name, self.model.width, self.model.height)
        self.tables = {
            whose: [r for r in rows if (r.model, r.width, r.height) == own]
            for whose, rows in tables(chosen, root).items()
        }
        self.full = s.steps(subject)  # what speeds were measured at
        self.kept: list[Made] = []
        self.latest: Made | None = None
        self.missed: list[float] = []  # relative errors of what was predicted here
        self._baselines: dict[Wanted, One] = {}
        self._warm: set[str] = set()  # use cases
        self._busy = threading.Lock()  # held by the job that runs; one that was stopped may be in its last layer
        self._exports = root / EXPORTS

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
        self.images = w.IntSlider(value=1, min=1, max=MOST_IMAGES, description="Images", layout=_wide(), style=style)
        self.steps = w.IntSlider(value=self.full, min=2, max=50, description="Steps", layout=_wide(), style=style)
        self.run = w.Button(description="Run", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.keep = w.Button(description="Keep", disabled=True)
        self.export = w.Button(description="Export", disabled=True)
        self.bar = w.IntProgress(value=0, min=0, max=self.full, layout=w.Layout(width="100%"))
        self.said = w.HTML()
        self.predicted = w.HTML()
        nothing = png(Image.new("RGB", (self.model.width, self.model.height), (128, 128, 128)))

        def picture():
            return w.Image(
                value=nothing, format="png", layout=w.Layout(width="100%", max_width="256px", height="auto", margin="0")
            )

        self.start_from = picture()
        self.pairs = [(picture(), picture()) for _ in range(MOST_IMAGES)]  # baseline, setting
        self.before, self.after = self.pairs[0]
        self.shelf = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        controls = [self.use_case, self.gate, self.threshold, self.second, self.every, self.predictor, self.warm_up]
        controls += [self.kind, self.strength, self.prompt, self.seed, self.images, self.steps, self.predicted]
        buttons = w.HBox([self.run, self.stop, self.keep, self.export], layout=w.Layout(width="20rem"))
        for button in buttons.children:
            button.layout = w.Layout(flex="1 1 0", width="auto", min_width="0")
        self.beginning = _column([w.Label("starts from"), self.start_from])
        named = [("baseline", "this setting")] + [
            (f"baseline, seed + {i}", f"seed + {i}") for i in range(1, MOST_IMAGES)
        ]
        self.lines = [
            w.HBox([_column([w.Label(name), shown]) for name, shown in zip(names, pair, strict=True)])
            for names, pair in zip(named, self.pairs, strict=True)
        ]
        self.lines[0].children = (*self.lines[0].children, self.beginning)
        pictures = w.VBox(
            [self.said, self.bar, *self.lines], layout=w.Layout(flex="1 1 0", min_width="0", overflow="hidden")
        )
        self.box = w.VBox(
            [w.HBox([w.VBox([*controls, buttons], layout=w.Layout(flex="0 0 auto")), pictures]), self.shelf]
        )
        for widget in (self.use_case, self.gate, self.threshold, self.every, self.predictor, self.warm_up, self.images):
            widget.observe(lambda _: self._foresee(), "value")
        self.run.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self._stop())
        self.keep.on_click(lambda _: self._keep())
        self.export.on_click(lambda _: self._export())
        self._foresee()
        self._begin(self._loading, f"loading {self.model.name}")  # widgets first: libraries take seconds

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
            *((line, i < self.images.value) for i, line in enumerate(self.lines)),
        ):
            widget.layout.display = None if shown else "none"
        whose, points = self._points(gate, use_case)
        if (speed := self._speed()) is None:
            self.predicted.value = "no measured settings beside this one"
        elif dial.value in points:
            self.predicted.value = f"{whose}, {self.full} steps: {speed:.2f}×"
        else:
            error = prediction_error(points)
            beside = "" if error is None else f"; left out, measured points are missed by {error:.0%} on average"
            self.predicted.value = (
                f"<em>predicted</em>: {speed:.2f}× (from settings {whose}, {self.full} steps{beside})"
            )

    def _speed(self) -> float | None:
        """The speedup of the setting, measured or on the line between its neighbours; None where nothing says it."""
        dial, (_, points) = self._dial(self.gate.value), self._points(self.gate.value, self.use_case.value)
        if dial is None or self.warm_up.value or self.predictor.value != families.PREDICTORS[0]:
            return None
        return points.get(dial.value, predict(points, dial.value))

    # --- running ---

    def start(self) -> Job:
        """Begins to make the image of the current setting; the baseline first, if this input has none yet."""
        try:
            turned = {f.dial: self.dials.get(f.dial, self.threshold).value for f in families.ALL if f.cache}
            gate = gate_of(self.gate.value, turned, self.second.value, self.model.name)
            wanted = self._wanted()
        except UserError as error:
            self.said.value = escape(scrub(str(error)), quote=False)
            return Job()
        if gate is not None:
            gate.warm_up = self.warm_up.value
        cache = Cache(gate, predictors.named(self.predictor.value)) if gate is not None else None
        each = [replace(wanted, seed=wanted.seed + i) for i in range(self.images.value)]
        foreseen = self._speed() if wanted.steps == self.full else None
        self.run.disabled, self.stop.disabled, self.keep.disabled = True, False, True
        waiting = f"loading {self.model.name}" if not self._pipes else "waiting for the last layer of what was stopped"
        return self._begin(lambda job: self._work(job, cache, each, foreseen), waiting)

    def _begin(self, work, doing: str) -> Job:
        """`work(job)` in the background, after what is running; a line says what it is doing and for how long."""
        job, started = Job(doing), time.perf_counter()
        self.job, self.said.value = job, f"{doing}, 0 s"  # before it may have ended

        def tell():
            while not job.over.wait(0.5):
                self._say(job, f"{job.doing}, {time.perf_counter() - started:.0f} s")

        def run():
            said, before = "", self.latest
            try:
                with self._busy, job.stoppable():
                    said = work(job)
            except Stopped:
                said = STOPPED
            except Exception as error:  # noqa: BLE001  a thread has no one else to tell
                said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                said = escape(said, quote=False)
            finally:
                job.over.set()
                if job.stopped.is_set():
                    self.latest = before
                self._say(job, said, ended=True)

        job.thread = threading.Thread(target=run, daemon=True)
        job.thread.start()
        threading.Thread(target=tell, daemon=True).start()
        return job

    def _say(self, job: Job, words: str, ended: bool = False) -> None:
        """A job's words, unless it was stopped or another began since."""
        if getattr(self, "job", job) is not job or job.stopped.is_set() or (job.over.is_set() and not ended):
            return
        self.said.value = scrub(words)
        if ended:
            self._at_rest()

    def _at_rest(self) -> None:
        self.run.disabled, self.stop.disabled, self.keep.disabled = False, True, self.latest is None

    def _stop(self) -> None:
        """Answers at once: the job itself ends before its next layer, and a new one waits for that."""
        if not self.stop.disabled:
            self.job.stop()
            self.said.value = STOPPED
            self._at_rest()

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
        if not self._pipes:
            self._pipes["txt2img"] = self._load()
        if use_case not in self._pipes:
            controlnet = pipelines.load_controlnet(self.model.name) if pipelines.takes_condition(use_case) else None
            self._pipes[use_case] = pipelines.as_use_case(self._pipes["txt2img"], use_case, controlnet)
        return self._pipes[use_case]

    def _loading(self, job: Job) -> str:
        self.pipe("txt2img")
        return "ready: press Run"

    def _work(self, job: Job, cache: Cache | None, wanted: list[Wanted], foreseen: float | None) -> str:
        """Makes what is missing of the baseline, then the setting's images; what to say of them."""
        own: list[One] = []
        for i, (one, (before, after)) in enumerate(zip(wanted, self.pairs, strict=False)):
            at = f", image {i + 1} of {len(wanted)}" if len(wanted) > 1 else ""
            if one not in self._baselines:
                self._baselines[one] = self._make(job, None, before, f"baseline{at}", one)
            _show(before, self._baselines[one].image)
            if cache is not None:
                own.append(self._make(job, cache, after, f"{cache.label}{at}", one))
            _show(after, (own[-1] if own else self._baselines[one]).image)
        baseline = [self._baselines[one] for one in wanted]
        label, code = (cache.label, recipes.code((cache,))) if cache else ("baseline", "")
        self.latest = made = Made(label, code, wanted[0], own or baseline, baseline)
        if cache is None:
            return f"baseline: {sum(one.seconds for one in baseline) / len(baseline):.2f} s"
        said = f"{label}: {made.words}"
        if foreseen is not None:
            self.missed.append(abs(foreseen / made.speedup - 1))
            said += f"; predicted were {foreseen:.2f}× ({foreseen / made.speedup - 1:+.0%})"
        if len(self.missed) > 1:
            missed = sum(self.missed) / len(self.missed)
            said += f"; the {len(self.missed)} predictions so far missed by {missed:.0%} on average"
        return said

    def _make(self, job: Job, cache: Cache | None, picture, label: str, wanted: Wanted) -> One:
        pipe = self.pipe(wanted.use_case)
        given = {}
        if wanted.use_case != "txt2img":
            drawn = material.of(wanted.prompt, wanted.seed, self.model.width, self.model.height)
            given = drawn.arguments(wanted.kind) | {"strength": wanted.strength}

        def generate(steps, on_step=None):
            return pipelines.generate(
                pipe, [wanted.prompt], [wanted.seed], model=self.model, steps=steps, on_step=on_step, **given
            )[0]

        def runs(steps):
            return pipelines.steps_run(wanted.use_case, steps, wanted.strength)

        least = 1 / wanted.strength if pipelines.takes_image(wanted.use_case) else 1  # of fewer a strength leaves none
        steps, previewed = runs(wanted.steps), 0.0
        with torch.no_grad():
            if wanted.use_case not in self._warm:  # the first image after loading is slower than any other
                job.doing = "warming up"
                generate(next((n for n in range(1, wanted.steps) if n >= least and runs(n)), wanted.steps))
                self._warm.add(wanted.use_case)
            self.bar.max, self.bar.value = steps, 0

            def on_step(step, latents):
                nonlocal previewed
                self.bar.value, job.doing = step + 1, f"{label}: step {step + 1} of {steps}"
                if step % PREVIEW_EVERY == PREVIEW_EVERY - 1 and step + 1 < steps:
                    latents.sum().item()  # a GPU is done with the step before its preview is timed
                    started = time.perf_counter()
                    shown = pipelines.preview(pipe, latents, self.model)
                    if not job.stopped.is_set():
                        _show(picture, shown)
                    previewed += time.perf_counter() - started

            job.doing, started = f"{label}: running", time.perf_counter()
            with applied(pipe, *([cache] if cache else [])):
                image = generate(wanted.steps, on_step)
        seconds = time.perf_counter() - started - previewed
        if job.stopped.is_set():
            raise Stopped
        return One(image, seconds, cache.trace.mask.count("1") if cache else steps, steps)

    # --- what was made ---

    def _keep(self) -> None:
        w = need("ipywidgets", "The live explorer")

        if self.latest is None or self.latest in self.kept:
            return
        made = self.latest
        self.kept.append(made)
        small = [w.Image(format="png", width=128, height=128, value=png(one.image)) for one in made.own]
        words = w.HTML(layout=w.Layout(width="17rem"))
        words.value = "<br>".join(
            map(escape, [made.label, made.words, f"{made.wanted.prompt}, seed {made.wanted.seed}"])
        )
        self.shelf.children = (*self.shelf.children, w.VBox([w.HBox(small), words]))
        self.export.disabled = False

    def _export(self) -> Path:
        """Writes what is kept: a PNG for each, with its settings written under and into it, and a table of them all."""
        folder = self._exports / time.strftime("%Y-%m-%d_%H%M%S")
        folder.mkdir(parents=True, exist_ok=True)
        for i, made in enumerate(self.kept):
            about = PngInfo()
            about.add_itxt("settings", json.dumps(made.about, ensure_ascii=False))
            sheet(made).save(folder / f"{i + 1:02}.png", pnginfo=about)
        with open(folder / "kept.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, [*self.kept[0].about])
            table.writeheader()
            table.writerows(made.about for made in self.kept)
        self.said.value = f"{len(self.kept)} written to {escape(str(folder.relative_to(self._exports.parents[1])))}"
        return folder


def _column(children: list):
    """Widgets below each other in a column that shares a line with others."""
    w = need("ipywidgets", "The live explorer")

    return w.VBox(children, layout=w.Layout(flex="1 1 0", min_width="0", max_width="264px", overflow="hidden"))


def _wide():
    """A layout of its own for each widget: one that is shared would hide them all."""
    w = need("ipywidgets", "The live explorer")

    return w.Layout(width="20rem")


def _show(widget, image: Image.Image) -> None:
    widget.value = png(image)
