"""The live explorer: what it foresees, and what running, stopping and keeping do to its widgets."""

import io
import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace

import measured
import pytest
import torch
from PIL import Image

from fluxnb import explore, families, params
from fluxnb.cache import Cascade, FirstBlock, Interval, TeaCache
from fluxnb.errors import UserError
from fluxnb.explore.job import Job, Stopped
from fluxnb.measure import quality
from fluxnb.models import material, pipelines
from fluxnb.study.results import Results

CACHE, COMBINED, INTERVAL = families.FIRST_BLOCK.name, families.COMBINED.name, families.INTERVAL.name
POINTS = {0.0: 1.0, 0.1: 1.4, 0.2: 2.0, 0.4: 2.6}


def test_a_speed_between_measured_ones_is_on_the_line_between_them():
    assert explore.predict(POINTS, 0.15) == pytest.approx(1.7)
    assert explore.predict(POINTS, 0.2) == pytest.approx(2.0)
    assert explore.predict(POINTS, 0.5) is None and explore.predict({0.1: 1.2}, 0.1) is None


def test_the_error_of_a_prediction_is_measured_by_leaving_points_out():
    first = abs(1.5 / 1.4 - 1)
    second = abs((1.4 + (2.6 - 1.4) / 3) / 2.0 - 1)
    assert explore.prediction_error(POINTS) == pytest.approx((first + second) / 2)
    assert explore.prediction_error({0.0: 1.0, 1.0: 2.0}) is None


def row(family, speedup, **settings):
    kept = measured.row(family=family.name, technique=family.name, settings=settings)
    return replace(kept, speedup=speedup)


def test_only_plain_settings_of_the_same_model_and_steps_are_predicted_from():
    tea = families.TEACACHE
    rows = [
        row(tea, 2.0, threshold=0.2, inputs="a"),
        row(tea, 3.0, threshold=0.2, inputs="b", dtype="float32"),
        row(tea, 9.0, threshold=0.4, warm_up=6),
        row(tea, None, threshold=0.6),
        row(families.FIRST_BLOCK, 7.0, threshold=0.2),
        row(families.BASELINE, 1.0),
        row(families.INTERVAL, 1.8, every=2),
        replace(row(tea, 1.5, threshold=0.2), use_case="inpainting"),
        replace(row(tea, 4.0, threshold=0.2), model="another"),
        replace(row(tea, 5.0, threshold=0.2), steps=8),
    ]
    assert explore.measured(rows, tea.name, "embedded", 28) == {0.2: 2.5}
    assert explore.measured(rows, tea.name, "embedded", 28, "inpainting") == {0.2: 1.5}
    assert explore.measured(rows, INTERVAL, "embedded", 28) == {2.0: 1.8}
    assert (
        explore.measured(rows, explore.NONE, "embedded", 28) == explore.measured(rows, COMBINED, "embedded", 28) == {}
    )


def test_every_family_of_caches_with_a_gate_can_be_chosen():
    assert explore.GATES[0] == explore.NONE and explore.GATES[-1] == COMBINED
    assert set(explore.GATES[1:-1]) == {f.name for f in families.ALL if f.cache} > {CACHE, INTERVAL}
    dials = {"threshold": 0.3, "every": 4}
    one, two, three = (explore.gate_of(name, dials, 0.1, "embedded") for name in (CACHE, COMBINED, INTERVAL))
    assert isinstance(one, FirstBlock) and one.threshold == 0.3 and isinstance(three, Interval) and three.every == 4
    first, second = two.gates
    assert isinstance(two, Cascade) and isinstance(first, TeaCache) and isinstance(second, FirstBlock)
    assert (first.threshold, second.threshold) == (0.3, 0.1)
    assert explore.gate_of(explore.NONE, dials, 0.1, "embedded") is None


def test_a_gate_that_is_not_there():
    with pytest.raises(UserError, match="choose one of none, "):
        explore.gate_of("clairvoyance", {"threshold": 0.1, "every": 2}, 0.1, "embedded")


def test_the_rows_of_a_user_come_before_those_of_the_reference(tmp_path):
    gpu = params.load("cpu")
    assert explore.tables(gpu, tmp_path) == {}
    known = {name: value for name, value in measured.row().as_dict().items() if value is not None}
    for folder, speedup in ((gpu.own_dir, 2.0), (gpu.report_dir, 3.0)):
        Results(tmp_path / folder / "results.csv").append({**known, "speedup": speedup})
    found = explore.tables(gpu, tmp_path)
    assert list(found) == ["measured here", "measured for the reference"]
    assert [rows[0].speedup for rows in found.values()] == [2.0, 3.0]


@pytest.fixture(scope="module")
def explorer():
    made = explore.Explorer()
    made.steps.value = 8
    made.job.wait(300)  # for the model
    assert made.said.value == "ready: press Run"
    return made


def test_each_gate_shows_its_own_settings(explorer):
    shown = {}
    for gate in explore.GATES:
        explorer.gate.value = gate
        widgets = ("threshold", "second", "every", "prompt")
        shown[gate] = {name for name in widgets if getattr(explorer, name).layout.display != "none"}
    explorer.gate.value = CACHE
    assert shown[explore.NONE] == {"prompt"} and shown[CACHE] == {"prompt", "threshold"}
    assert shown[COMBINED] == {"prompt", "threshold", "second"}
    assert shown[INTERVAL] == {"prompt", "every"}


def test_the_first_image_is_there_within_seconds_and_follows_the_threshold(explorer):
    started = time.process_time()
    explorer.threshold.value = 0.3
    explorer.start().wait()
    assert (
        time.process_time() - started < 15
    )  # two images of eight steps; a browser shows the first preview long before
    assert explorer.bar.value == 8 and " of 8 steps" in explorer.said.value and " dB" in explorer.said.value
    first = bytes(explorer.after.value)
    assert first.startswith(b"\x89PNG") and first != bytes(explorer.before.value)
    explorer.threshold.value = 0.0
    explorer.start().wait()
    assert bytes(explorer.after.value) != first and "identical" in explorer.said.value
    assert not explorer.run.disabled and explorer.stop.disabled and not explorer.keep.disabled


@pytest.mark.parametrize("gate", explore.GATES)
@pytest.mark.parametrize("predictor", families.PREDICTORS)
def test_every_choice_runs(explorer, gate, predictor):
    explorer.gate.value, explorer.predictor.value = gate, predictor
    explorer.start().wait()
    assert "Error" not in explorer.said.value and "running" not in explorer.said.value
    explorer.gate.value, explorer.predictor.value = CACHE, "hold"


def test_stop_ends_it_and_the_next_run_is_whole(explorer):
    explorer.steps.value, before = 50, bytes(explorer.after.value)
    explorer.seed.value = 7
    job = explorer.start()
    while explorer.bar.value < 2 or explorer.bar.max != 50:
        time.sleep(0.005)
    explorer.stop.click()
    job.wait()
    assert explorer.said.value == explore.STOPPED and explorer.bar.value < 50
    assert bytes(explorer.after.value) == before and not explorer.run.disabled
    explorer.steps.value, explorer.seed.value = 8, 0
    explorer.start().wait()
    assert "stopped" not in explorer.said.value and explorer.bar.value == 8


@pytest.mark.parametrize("use_case", list(pipelines.USE_CASES))
def test_every_use_case_shows_what_it_starts_from_and_runs(explorer, use_case):
    explorer.use_case.value, explorer.strength.value, explorer.kind.value = use_case, 0.5, "depth"
    explorer.threshold.value = 0.3
    explorer.start().wait()
    shown = {n for n in ("kind", "strength", "beginning") if getattr(explorer, n).layout.display != "none"}
    began = {"strength"} if pipelines.takes_image(use_case) else set()
    steered = {"kind"} if pipelines.takes_condition(use_case) else set()
    assert shown == began | steered | ({"beginning"} if began | steered else set())
    steps = 4 if began else 8
    assert f" of {steps} steps" in explorer.said.value and " dB" in explorer.said.value
    drawn = material.of(explorer.prompt.value, explorer.seed.value)
    if began or steered:
        on_show = Image.open(io.BytesIO(explorer.start_from.value))
        assert quality.psnr(on_show, drawn.image if began else drawn.depth) == math.inf
    explorer.use_case.value = "txt2img"


def test_an_input_that_nothing_can_be_drawn_for(explorer):
    explorer.use_case.value, prompt = "img2img", explorer.prompt.value
    explorer.prompt.value = "colourless green ideas"
    explorer.start()
    assert explorer.said.value.startswith("No picture can be drawn for") and not explorer.run.disabled
    explorer.use_case.value, explorer.prompt.value = "txt2img", prompt


def test_the_widgets_are_there_before_the_model_and_say_what_they_wait_for():
    code = """
import time
from fluxnb.explore import Explorer
made = Explorer()
print(time.process_time(), made.said.value, made._repr_mimebundle_() is not None, sep="|", flush=True)
import os
os._exit(0)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    seconds, words, shown = said.stdout.strip().split("|")
    assert float(seconds) < 7, said.stderr  # of a processor; kernel and browser take a few more
    assert words.startswith("loading embedded, ") and shown == "True"


def test_stop_answers_at_once_and_ends_within_a_layer(explorer, monkeypatch):
    blocks = explorer.pipe("txt2img").transformer.transformer_blocks
    slow = blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
    explorer.steps.value, explorer.seed.value, before = 20, 8, explorer.latest
    job = explorer.start()
    while explorer.bar.value < 1 or explorer.bar.max != 20:
        time.sleep(0.005)
    started = time.perf_counter()
    explorer.stop.click()
    assert explorer.said.value == explore.STOPPED and not explorer.run.disabled and explorer.stop.disabled
    assert time.perf_counter() - started < 0.3
    again = explorer.start()  # which waits for the other's last layer
    job.wait()
    slow.remove()
    again.wait()
    assert time.perf_counter() - started < 60 and explorer.latest is not before
    assert explorer.latest.wanted.seed == 8 and " of 20 steps" in explorer.said.value
    explorer.steps.value, explorer.seed.value = 8, 0


def test_a_job_ends_before_the_next_layer_of_its_own_thread_only():
    job, layer = Job(), torch.nn.Linear(1, 1)
    job.stop()
    with job.stoppable():
        with pytest.raises(Stopped):
            layer(torch.zeros(1))
        other = threading.Thread(target=lambda: made.append(layer(torch.zeros(1))))
        made = []
        other.start()
        other.join()
    assert len(made) == 1 and layer(torch.zeros(1)) is not None


def test_the_first_image_is_warm_and_previews_are_not_timed(explorer, monkeypatch):
    calls, preview = [], pipelines.preview
    real = pipelines.generate
    monkeypatch.setattr(pipelines, "preview", lambda *a: time.sleep(0.5) or preview(*a))
    monkeypatch.setattr(pipelines, "generate", lambda *a, **k: calls.append(k["steps"]) or real(*a, **k))
    explorer._warm.clear()
    explorer.seed.value, started = 11, time.perf_counter()
    explorer.start().wait()
    assert calls == [1, 8, 8]  # warm-up, baseline, setting
    seconds = explorer.latest.own[0].seconds + explorer.latest.baseline[0].seconds
    assert time.perf_counter() - started - seconds > 1.0  # one preview of each
    explorer.seed.value = 0


def test_several_images_are_made_from_seeds_of_their_own_and_meant(explorer):
    explorer.threshold.value, explorer.images.value = 0.3, 2
    assert [line.layout.display for line in explorer.lines] == [None, None, "none", "none"]
    explorer.start().wait()
    made = explorer.latest
    assert len(made.own) == len(made.baseline) == 2 and "× of 2 images, " in explorer.said.value
    assert "mean " in explorer.said.value and "(worst " in explorer.said.value
    assert bytes(explorer.pairs[0][1].value) != bytes(explorer.pairs[1][1].value)
    explorer.images.value = 1


def test_what_was_made_can_be_kept_once_and_exported_with_all_that_made_it(explorer, tmp_path):
    explorer._exports = tmp_path / explore.EXPORTS
    explorer.threshold.value = 0.3
    explorer.start().wait()
    explorer.keep.click()
    explorer.keep.click()
    assert len(explorer.kept) == len(explorer.shelf.children) == 1
    words = explorer.shelf.children[0].children[1].value
    assert all(part in words for part in (" dB", "ST-LPIPS", "×", explorer.prompt.value, "seed 0", "FBCache 0.3"))
    explorer.export.click()
    assert explorer.said.value.startswith("1 written to build/explore/")
    (picture,) = tmp_path.rglob("01.png")
    with Image.open(picture) as image:
        about = json.loads(image.text["settings"])
    assert about["prompt"] == explorer.prompt.value and about["seed"] == 0 and about["speedup"] > 0
    assert about["psnr_db"] > 10 and about["st_lpips"] > 0 and "Cache(FirstBlock(0.3))" in about["code"]
    (table,) = tmp_path.rglob("kept.csv")
    assert table.read_text(encoding="utf-8").startswith("setting,use_case,prompt,seed,")


def test_no_secret_and_no_markup_is_shown_or_exported(explorer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    explorer._exports, explorer.prompt.value = tmp_path / explore.EXPORTS, "a red ball hf_secretsecretsecret"
    explorer.start().wait()
    explorer.keep.click()
    explorer.export.click()
    (picture,), (table,) = tmp_path.rglob("01.png"), tmp_path.rglob("kept.csv")
    assert b"secretsecret" not in picture.read_bytes() and "a red ball [HF_TOKEN]" in table.read_text(encoding="utf-8")

    def fails(*_):
        raise RuntimeError("<img src=x onerror=alert(1)> of hf_secretsecretsecret")

    monkeypatch.setattr(explorer, "_work", fails)
    explorer.start().wait()
    assert explorer.said.value == "RuntimeError: &lt;img src=x onerror=alert(1)&gt; of [HF_TOKEN]"


def test_the_error_of_predictions_made_here_is_shown(explorer):
    rows = [row(families.FIRST_BLOCK, v, threshold=t) for t, v in POINTS.items()]
    explorer.tables, full, explorer.full = {"measured here": rows}, explorer.full, explorer.steps.value
    explorer.tables["measured here"] = [replace(r, steps=explorer.full) for r in rows]
    explorer.missed.clear()
    for threshold in (0.15, 0.3):
        explorer.threshold.value = threshold
        explorer.start().wait()
    assert "; predicted were 2.30× (" in explorer.said.value
    assert "; the 2 predictions so far missed by " in explorer.said.value and len(explorer.missed) == 2
    explorer.warm_up.value = 3  # nobody measured that
    assert "no measured" in explorer.predicted.value
    explorer.start().wait()
    assert "predicted were" not in explorer.said.value
    explorer.warm_up.value, explorer.full = 0, full


def test_rows_of_other_models_or_sizes_foretell_nothing(monkeypatch):
    rows = [row(families.FIRST_BLOCK, 2.0, threshold=t) for t in (0.1, 0.2)]
    rows = [replace(r, width=128, height=128) for r in rows]
    others = [replace(r, **other) for r in rows for other in ({"model": "another"}, {"width": 256})]
    monkeypatch.setattr(explore, "tables", lambda *_: {"measured here": others + rows[:1]})
    monkeypatch.setattr(explore.Explorer, "_loading", lambda *_: "")
    assert explore.Explorer().tables == {"measured here": rows[:1]}


def test_settings_that_were_measured_say_so_and_others_are_predicted(explorer):
    rows = [row(families.FIRST_BLOCK, v, threshold=t) for t, v in POINTS.items()]
    rows += [row(families.INTERVAL, v, every=n) for n, v in ((2, 1.8), (4, 3.0))]
    explorer.tables = {"measured for the reference": rows}
    explorer.threshold.value = 0.2
    assert explorer.predicted.value == "measured for the reference, 28 steps: 2.00×"
    explorer.threshold.value = 0.3
    assert explorer.predicted.value.startswith(
        "<em>predicted</em>: 2.30× (from settings measured for the reference, 28"
    )
    explorer.threshold.value = 0.9
    assert "no measured" in explorer.predicted.value
    explorer.gate.value, explorer.every.value = INTERVAL, 3
    assert explorer.predicted.value.startswith("<em>predicted</em>: 2.40×")
    explorer.every.value = 4
    assert explorer.predicted.value == "measured for the reference, 28 steps: 3.00×"
    explorer.gate.value = COMBINED
    assert "no measured" in explorer.predicted.value
    explorer.gate.value, explorer.threshold.value = CACHE, 0.2
    explorer.tables = {"measured here": rows[:2], "measured for the reference": rows}
    explorer.threshold.value = 0.1
    assert explorer.predicted.value == "measured here, 28 steps: 1.40×"
    explorer.tables = {"measured here": rows[:1], "measured for the reference": rows}
    explorer.threshold.value = 0.2
    assert explorer.predicted.value == "measured for the reference, 28 steps: 2.00×"
