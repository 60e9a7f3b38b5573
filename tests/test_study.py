"""The study's way to measure, on a small parameter set: rows, resume, reasons, images and traces."""

import dataclasses
import gc
import json
import shutil
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fluxnb import params, study
from fluxnb.cache import first_block
from fluxnb.errors import UserError
from fluxnb.measure import ceilings, telemetry
from fluxnb.models import pipelines
from fluxnb.study.results import KEY
from fluxnb.technique import Unavailable, applied
from fluxnb.techniques.fused import FusedRoPE
from fluxnb.techniques.modulation import ModulationAhead
from fluxnb.techniques.precision import TorchAO

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
PROMISED = (
    "notebook technique settings model weights use_case gpu gpus width height steps batch users images status n"
    " latency_min latency_p25 latency_p50 latency_p90 latency_avg load_s warmup_s first_s text_s denoise_s vae_s"
    " images_per_s memory_peak_gib memory_avg_gib speedup speedup_ci_low speedup_ci_high computed_steps"
    " total_steps psnr_identical ssim ssim_min adherence adherence_min samples machine versions measured_at run_id"
).split()


class Broken:
    """A technique whose `apply` raises, or does nothing."""

    settings = {"level": 1}

    def __init__(self, name, error):
        self.name = self.label = name
        self.error = error

    def apply(self, pipe):
        if self.error is None:
            return lambda: None
        raise self.error


@pytest.fixture
def root(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


@pytest.fixture
def begin(root, embedded_pipe):
    """A function that opens the study, as a notebook run again does, and its subject with a loaded pipeline."""

    def opened(notebook="05_first_block_cache", **changed):
        chosen = params.load("smoke", root / "params")
        small = {"prompts": ["a red apple on a white table", "a cat"], "rounds": 3, "warmup": 2} | changed
        chosen = dataclasses.replace(chosen, study=dataclasses.replace(chosen.study, **small))
        s = study.Study(chosen, notebook, root)
        subject = s.subject("embedded", "float32")
        subject._pipe, subject.load_s = embedded_pipe, 0.5
        return s, subject

    return opened


class FakePipe:
    """A pipeline as far as measuring needs one."""

    def __init__(self):
        self.transformer = SimpleNamespace(device=torch.device("cpu"))
        self.vae = SimpleNamespace(encode=lambda: None, decode=lambda: None)
        self.components = {}

    def encode_prompt(self):
        pass


@pytest.fixture
def made(monkeypatch):
    """The (prompt, seed, steps) of every image made from here on; images are noise, made in no time."""
    calls = []

    def one(prompt, seed, steps):
        calls.append((prompt, seed, steps))
        rng = np.random.default_rng(zlib.crc32(f"{prompt} {seed} {steps}".encode()))
        return Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))

    def fake(self, inputs, steps):
        self.pipe.encode_prompt()
        self.pipe.vae.decode()
        return [one(prompt, seed, steps) for prompt, seed in inputs]

    monkeypatch.setattr(study.Subject, "batch", fake)
    monkeypatch.setattr(study.Subject, "pipe", FakePipe())
    return calls


def candidates():
    return [study.using(first_block(0.3), STEPS), study.fewer_steps(2)]


def test_a_comparison_gives_complete_rows(begin):
    s, subject = begin()
    rows = s.compare(subject, study.plain(STEPS), candidates())
    assert [row["technique"] for row in rows] == ["baseline", "First Block Cache", "fewer steps"]
    assert [row["label"] for row in rows] == ["4 steps", "FBCache 0.3", "2 steps"]
    for row in rows:
        missing = [name for name in PROMISED if row[name] is None]
        assert row["status"] == "ok" and not missing
        assert (row["model"], row["weights"], row["use_case"]) == ("embedded", "trained", "txt2img")
        assert (row["width"], row["height"], row["gpu"], row["gpus"]) == (128, 128, "smoke", 1)
        assert row["n"] == len(row["samples"]) == 3 and row["latency_p99"] is None
        assert row["speedup_ci_low"] <= row["speedup"] <= row["speedup_ci_high"]
        assert row["text_s"] + row["denoise_s"] + row["vae_s"] > 0
        assert row["first_s"] <= row["warmup_s"]
        assert 0 <= row["adherence_min"] <= row["adherence"] <= 1
    baseline, cached, fewer = rows
    assert (baseline["psnr_identical"], baseline["psnr_db"], baseline["ssim"]) == (2, None, 1)  # the noise floor
    assert cached["settings"]["threshold"] == 0.3
    assert (cached["total_steps"], baseline["computed_steps"]) == (STEPS, STEPS)
    assert 1 <= cached["computed_steps"] <= STEPS
    assert (fewer["steps"], fewer["computed_steps"]) == (2, 2)
    assert fewer["psnr_db"] < 60 and fewer["ssim"] < 1
    assert baseline["settings"]["dtype"] == "float32"


def test_what_the_gpus_did_meanwhile_is_in_the_row(begin, nvml):
    s, subject = begin()
    baseline = study.plain(STEPS)
    (row,) = s.compare(subject, baseline, [])
    assert row["status"] == "ok" and row["gpu_util_avg"] == 60
    assert row["telemetry"]["power_peak_w"] == 650.5 and row["telemetry"]["throttle_reasons"]
    (again,) = s.compare(subject, baseline, [])
    assert again["telemetry"] == row["telemetry"]


def test_a_replay_finds_what_was_measured_elsewhere_and_measures_nothing(begin, root, monkeypatch):
    elsewhere = {"machine": telemetry.machine() | {"cpu": "another CPU"}, "versions": {"torch": "1.0"}}
    (root / "run.json").write_text(json.dumps(elsewhere))
    with monkeypatch.context() as measuring:
        measuring.setattr(telemetry, "machine", lambda: elsewhere["machine"])
        measuring.setattr(telemetry, "versions", lambda: elsewhere["versions"])
        s, subject = begin()
        given = subject, study.plain(STEPS), [study.fewer_steps(2)]
        rows, images = s.compare(*given), s.images(subject, study.plain(STEPS))
        failed = s.compare(*given[:2], [study.using(Broken("broken", RuntimeError("no kernel")), STEPS)])
    table = s.results.path.read_bytes()
    monkeypatch.setenv(telemetry.REPLAY, str(root / "run.json"))
    s, subject = begin()
    given = subject, study.plain(STEPS), [study.fewer_steps(2)]
    assert s.compare(*given) == rows and s.images(subject, study.plain(STEPS)) == images
    again = s.compare(*given[:2], [study.using(Broken("broken", None), STEPS)])
    assert again == failed and again[1]["status"] == "error"  # shown, not tried again
    assert subject.part(1).for_use_case("img2img").use_case == "img2img"  # names what was measured, loads nothing
    for measuring in (
        lambda: s.compare(*given[:2], [study.fewer_steps(3)]),
        lambda: s.survey(*given[:2], study.fewer_steps(3)),
        lambda: s.time("product", {}, lambda: None, 3),
        lambda: s.serve(subject, [study.Load(1, 1, 2)], STEPS),
        lambda: s.spread(subject, [study.on_ranks(subject, 2, FusedRoPE(), steps=STEPS)]),
        lambda: s.images(subject, study.fewer_steps(3)),
        lambda: subject.pipe,
    ):
        with pytest.raises(UserError, match="^A replay .* run this notebook without REPLAY=1"):
            measuring()
    assert s.results.path.read_bytes() == table


def test_a_finished_row_is_not_measured_again(begin, made):
    s, subject = begin()
    first = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2), study.fewer_steps(3)])
    # both inputs: warm-up, judging and three rounds of each, nothing more than that
    assert {call[:2] for call in made} == set(subject.inputs)
    assert {call[2] for call in made} == {2, 3, STEPS}
    before = s.results.path.read_bytes()
    made.clear()
    s, subject = begin()
    again = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2), study.fewer_steps(3)])
    assert made == []
    assert again == first
    assert s.results.path.read_bytes() == before


def test_images_that_were_timed_are_those_that_are_judged(begin, made):
    s, subject = begin()
    (_, fewer) = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])
    assert len([call for call in made if call[2] == 2]) == 2 + 3  # warm-up and rounds, no more
    assert fewer["psnr_db"] is not None
    made.clear()
    assert s.images(subject, study.fewer_steps(2)) and made == []  # kept


def test_only_what_is_missing_is_measured(begin, made):
    s, subject = begin()
    first = s.compare(subject, study.plain(STEPS), [])
    s, subject = begin()
    rows = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])
    assert rows[0] == first[0]
    assert len(s.results.rows()) == 2


@pytest.mark.parametrize("changed", [{"prompts": ["a red cup"]}, {"seeds": [5]}, {"guidance_scale": 1.5}])
def test_other_inputs_are_measured_anew(begin, made, changed):
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [])
    made.clear()
    s, subject = begin(**changed)
    s.compare(subject, study.plain(STEPS), [])
    assert made
    rows = s.results.rows()
    assert len(rows) == len({json.dumps([row[name] for name in KEY]) for row in rows}) == 2


def test_rows_of_another_machine_or_version_are_not_taken(begin, made):
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [])
    for name in ("machine", "versions"):
        made.clear()
        s, subject = begin()
        setattr(s, name, "another")
        (row,) = s.compare(subject, study.plain(STEPS), [])
        assert made and row[name] == "another"


def test_images_of_another_size_can_be_compared(begin):
    s, subject = begin(width=112, prompts=["a red cup"])
    (row,) = s.compare(subject, study.plain(2), [])
    assert (row["status"], row["width"], row["psnr_identical"]) == ("ok", 112, 1)


def test_other_weights_are_measured_anew(begin, made):
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [])
    made.clear()
    s, subject = begin()
    subject.fingerprint = "retrained"
    s.compare(subject, study.plain(STEPS), [])
    assert made


def test_the_fingerprint_follows_the_files_of_a_folder(tmp_path):
    assert study._fingerprint("flux-dev-random") == "flux-dev-random"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    one = study._fingerprint(str(folder))
    (folder / "a.safetensors").write_bytes(b"two")
    assert study._fingerprint(str(folder)) != one
    assert len(study._fingerprint("embedded")) == 16


# --- what can't run -----------------------------------------------------------------------------------------


def test_an_unavailable_technique_is_a_row_with_its_reason_and_the_others_go_on(begin, made):
    s, subject = begin()
    broken = study.using(Broken("FP8", Unavailable("needs compute capability 8.9")), STEPS)
    baseline, failed, fewer = s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert (failed["status"], failed["reason"]) == ("unavailable", "needs compute capability 8.9")
    assert failed["speedup"] is None and failed["samples"] is None
    assert baseline["status"] == fewer["status"] == "ok"
    assert study.need([baseline, failed, fewer]) == [baseline, fewer]
    made.clear()
    s, subject = begin()
    assert s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])[1] == failed
    assert made == []  # the reason is a result: it isn't tried again


def test_what_compiles_for_too_long_is_given_up_until_someone_has_more_patience(begin, made, monkeypatch):
    fast, waits = study.Subject.batch, iter([0.5])

    def slow(self, inputs, steps):
        time.sleep(next(waits, 0.0) if steps == 2 else 0.0)
        return fast(self, inputs, steps)

    monkeypatch.setattr(study.Subject, "batch", slow)

    def found(patience_s):
        s, subject = begin()
        candidate = dataclasses.replace(study.fewer_steps(2), patience_s=patience_s)
        return s.compare(subject, study.plain(STEPS), [candidate])[1]

    given_up = found(0.2)
    assert (given_up["status"], given_up["latency_p50"]) == ("unavailable", None)
    assert given_up["reason"] == "no image after 0.2 s, so its compilation was given up; allow it more"
    made.clear()
    assert found(0.1) == found(0.2) == given_up and made == []
    assert found(30)["status"] == "ok" and made
    assert found(0.2)["status"] == "ok"  # what is there is there


def test_out_of_memory_is_a_row_and_the_others_go_on(begin, made):
    s, subject = begin()
    broken = study.using(Broken("large", torch.cuda.OutOfMemoryError("tried to allocate 90 GiB\nmore")), STEPS)
    _, failed, fewer = s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert (failed["status"], failed["reason"]) == ("oom", "tried to allocate 90 GiB")
    assert fewer["status"] == "ok"


def test_what_a_library_refuses_is_a_row_that_is_tried_again(begin, made):
    s, subject = begin()
    refusal = RuntimeError("backend='inductor' raised:\nTypeError: no such kernel\n\nSet TORCH_LOGS")
    broken = study.using(Broken("odd", refusal), STEPS)
    baseline, failed, fewer = s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert (failed["status"], failed["reason"]) == ("error", "RuntimeError: TypeError: no such kernel")
    assert baseline["status"] == fewer["status"] == "ok"
    s, subject = begin()
    working = study.using(Broken("odd", None), STEPS)
    assert s.compare(subject, study.plain(STEPS), [working])[1]["status"] == "ok"


@pytest.mark.parametrize("weights", ["trained", "random"])
def test_a_baseline_that_runs_out_of_memory_does_not_end_the_notebook(begin, made, monkeypatch, weights):
    s, subject = begin()
    subject.model = dataclasses.replace(subject.model, weights=weights)
    batch = study.Subject.batch

    def limited(self, inputs, steps):
        if steps == STEPS:
            raise torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")
        return batch(self, inputs, steps)

    monkeypatch.setattr(study.Subject, "batch", limited)
    baseline, fewer = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])
    assert baseline["status"] == "oom"
    assert fewer["status"] != "ok"  # there is nothing to compare it with


def test_any_other_error_is_passed_on_and_leaves_the_pipeline_as_it_was(begin, embedded_pipe):
    s, subject = begin()
    before = set(vars(embedded_pipe.transformer))
    with pytest.raises(ZeroDivisionError):
        s.compare(subject, study.plain(STEPS), [study.using(Broken("bug", ZeroDivisionError()), STEPS)])
    assert set(vars(embedded_pipe.transformer)) == before


def test_candidates_with_the_same_label_keep_their_own_figures(begin, made):
    s, subject = begin()
    named_alike = [study.plain(n, "fewer steps", "a control") for n in (3, 2)]
    _, three, two = s.compare(subject, study.plain(STEPS), named_alike)
    assert (three["steps"], three["computed_steps"]) == (3, 3)
    assert (two["steps"], two["computed_steps"]) == (2, 2)


def test_what_is_built_in_stays_in(begin):
    s, subject = begin()
    built = subject.having(FusedRoPE(), ModulationAhead())
    gc.collect()
    _ = built.pipe
    gc.collect()
    transformer = built.pipe.transformer
    assert {type(b.attn.processor).__name__ for b in transformer.transformer_blocks} == {"Processor"}
    assert hasattr(transformer, "_fluxnb_ahead") and built.generate("a red ball", 0, 2)
    built.release()


def test_pipelines_built_for_one_measurement_are_freed_after_it(begin, embedded_pipe):
    s, subject = begin()
    small = study.built(subject, TorchAO("int8 weight-only"), steps=2)
    missing = study.built(subject, TorchAO("int4 weight-only"), steps=2)
    rows = s.compare_built(subject, study.plain(2), [small, missing, study.fewer_steps(1)])
    assert [r["label"] for r in rows] == ["2 steps", "TorchAO INT8 weight-only", "TorchAO INT4 weight-only", "1 steps"]
    assert [r["status"] for r in rows] == ["ok", "ok", "unavailable", "ok"]
    assert rows[1]["proof"]["weight"] == "Int8Tensor" and rows[1]["memory_load_gib"] < 0.03
    assert small.subject._pipe is None and subject.pipe is embedded_pipe


def test_as_many_pipelines_are_compared_at_once_as_there_is_room_for(begin, made, monkeypatch):
    s, subject = begin()
    subject = dataclasses.replace(subject, model=pipelines.describe("flux-dev-random"), dtype="bfloat16")
    one, two, three = (study.built(subject, Broken(name, None), steps=2, name=name) for name in ("a", "b", "c"))
    more = study.on_top(two, Broken("on top", None))  # in the pipeline of the one before
    happened, compare = [], study.Study.compare

    def noted(self, subject, baseline, candidates, *rest):
        happened.append([c.name for c in candidates])
        return compare(self, subject, baseline, candidates, *rest)

    monkeypatch.setattr(study.Study, "compare", noted)
    monkeypatch.setattr(study.Study, "_room_beside", lambda self, subject: 2)
    monkeypatch.setattr(study.Subject, "release", lambda self: happened.append(self.built[0].name))
    rows = s.compare_built(subject, study.plain(2), [one, two, more, three])
    assert [r["technique"] for r in rows] == ["baseline", "a", "b", "on top", "c"]
    assert happened == [["a", "b", "on top"], "a", "b", ["c"], "c"]
    happened.clear()
    monkeypatch.setattr(study.Study, "_room_beside", lambda self, subject: 1)
    s.results.path.unlink()
    again = study.Study(s.params, s.notebook, s.root)
    again.compare_built(subject, study.plain(2), [one, two, more, three])
    assert happened == [["a"], "a", ["b", "on top"], "b", ["c"], "c"]
    wide = dataclasses.replace(one, subject=dataclasses.replace(one.subject, dtype="float32"))
    assert [len(part) for part in study._in_parts([wide, two, three], 2)] == [1, 2]  # twice as large
    assert [len(part) for part in study._in_parts([wide, two, three], 1)] == [1, 1, 1]


def test_a_batch_is_one_measurement_of_several_images(begin, made):
    s, subject = begin()
    row = s.compare(subject, study.plain(STEPS, batch=3), [])[0]
    assert row["batch"] == 3 and row["images_per_s"] == pytest.approx(3 * row["n"] / sum(row["samples"]))
    assert len(made) % 3 == 0 and row["psnr_identical"] is None  # quality is judged one image at a time


def test_a_function_by_itself_is_a_row_with_what_it_proves(begin):
    s, _ = begin()
    calls = []
    row = s.time("product", {"size": 3}, lambda: calls.append("run"), 2, lambda: {"proof": {"error": 0.5}}, warm=False)
    assert calls == ["run"] * 2 and row["proof"] == {"error": 0.5} and row["n"] == 2
    again = s.time("product", {"size": 3}, lambda: calls.append("run"), 2, before=lambda: calls.append("before"))
    assert calls == ["run"] * 2 and again == row


def test_a_corrupted_table_is_a_sentence(begin):
    s, subject = begin()
    s.results.path.parent.mkdir(parents=True)
    s.results.path.write_text("notebook,technique\n1,2\n")
    with pytest.raises(UserError, match=r"results\.csv line 1 .* restore it from git"):
        s.compare(subject, study.plain(STEPS), [])
    assert s.results.path.read_text() == "notebook,technique\n1,2\n"


def test_nothing_to_report_is_a_sentence(begin):
    with pytest.raises(UserError, match="No finished measurement"):
        study.need([{"status": "oom", "technique": "x"}])
    ok = {"status": "ok", "technique": "x"}
    assert study.need([ok, {"status": "ok", "technique": "y"}], technique="x") == [ok]


# --- candidates of other kinds ------------------------------------------------------------------------------


def test_another_number_format_is_compared_with_the_reference(begin, embedded_pipe):
    s, subject = begin("01_baseline")
    other = s.subject("embedded", "bfloat16")
    reference, row = s.compare(
        subject,
        study.plain(STEPS, label="float32"),
        [study.Candidate("number format", "bfloat16", STEPS, subject=other)],
    )
    assert (reference["settings"]["dtype"], row["settings"]["dtype"]) == ("float32", "bfloat16")
    assert reference["settings"]["inputs"] == row["settings"]["inputs"]
    assert row["load_s"] > 0 and row["psnr_db"] > 10
    assert other.pipe.transformer.dtype == torch.bfloat16
    other.release()
    assert other._pipe is None and embedded_pipe.transformer.dtype == torch.float32


def test_images_that_mean_nothing_are_not_judged(begin):
    s, subject = begin()
    subject.model = dataclasses.replace(subject.model, name="flux-dev-random", weights="random")
    rows = s.compare(subject, study.plain(STEPS), candidates())
    for row in rows:
        assert row["weights"] == "random" and row["status"] == "ok"
        assert all(row[name] is None for name in ("psnr_db", "psnr_identical", "ssim", "adherence"))
    assert 1 <= rows[1]["computed_steps"] <= STEPS  # from the trace all the same


def test_a_subject_follows_the_parameters(begin):
    s, _ = begin(width=64, height=96, seeds=[3, 4])
    small, full = s.subject("embedded"), s.subject("flux-dev-random")
    assert (small.width, small.height, small.rounds) == (64, 96, 3)
    assert (full.width, full.height, full.rounds) == (256, 256, 3)
    assert (s.steps(small), s.steps(full)) == (8, 2)
    assert small.inputs == [
        ("a red apple on a white table", 3),
        ("a cat", 3),
        ("a red apple on a white table", 4),
        ("a cat", 4),
    ]


def test_a_ceiling_is_a_row_that_is_found_again(begin):
    s, _ = begin("00_environment")
    calls = []
    row = s.time("ceiling: test", {"size": 2}, lambda: calls.append(1), repeats=4)
    assert row["status"] == "ok" and row["n"] == 4 and row["latency_p50"] >= 0
    assert row["model"] is None and row["weights"] == "random"
    assert len(calls) >= 5  # warm-up too
    calls.clear()
    assert begin("00_environment")[0].time("ceiling: test", {"size": 2}, lambda: calls.append(1), 4) == row
    assert calls == []

    def unavailable():
        raise Unavailable("needs a GPU")

    row = s.time("ceiling: other", {}, unavailable, repeats=4)
    assert (row["status"], row["reason"]) == ("unavailable", "needs a GPU")


# --- images, traces, progress -------------------------------------------------------------------------------


def test_images_are_kept_and_made_again_when_they_are_gone(begin, made):
    s, subject = begin()
    fewer = study.fewer_steps(2)
    images = s.images(subject, fewer)
    assert [image.size for image in images] == [(128, 128)] * 2
    assert [call[:2] for call in made] == subject.inputs
    assert images[0].tobytes() == subject.generate(*subject.inputs[0], 2).tobytes()
    made.clear()
    kept = begin()[0].images(subject, fewer)
    assert made == [] and [i.tobytes() for i in kept] == [i.tobytes() for i in images]
    shutil.rmtree(s.images_dir)
    again = s.images(subject, fewer)
    assert len(made) == 2 and [i.tobytes() for i in again] == [i.tobytes() for i in images]


def test_an_interrupted_set_of_images_does_not_count(begin, made):
    s, subject = begin()
    s.images(subject, study.fewer_steps(2))
    (done,) = s.images_dir.rglob("traces.json")
    done.unlink()
    Image.new("RGB", (1, 1)).save(done.with_name("0.png"))
    made.clear()
    assert [i.size for i in s.images(subject, study.fewer_steps(2))] == [(128, 128)] * 2
    assert len(made) == 2


def test_traces_say_what_the_cache_decided(begin):
    s, subject = begin()
    traces = s.traces(subject, study.using(first_block(0.3), STEPS))
    assert len(traces) == 2
    for trace in traces:
        assert len(trace["mask"]) == len(trace["indicator"]) == STEPS and trace["threshold"] == 0.3
        assert trace["mask"][0] == "1" and trace["indicator"][0] is None
        for computed, seen in zip(trace["mask"][1:], trace["indicator"][1:], strict=True):
            assert (seen < 0.3) == (computed == "0")
    assert s.traces(subject, study.fewer_steps(2)) == [None, None]


def test_progress_ends_with_all_rows_done(begin, made, tmp_path, monkeypatch):
    events = tmp_path / "progress.jsonl"
    monkeypatch.setenv("FLUXNB_PROGRESS", str(events))
    for new in (True, False):
        events.unlink(missing_ok=True)
        s, subject = begin()
        s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        assert lines[-1]["notebook"] == "05_first_block_cache"
        assert lines[-1]["done"] == lines[-1]["total"] == 2
        assert [line["done"] for line in lines] == ([1, 2] if new else [2])


# --- opening ------------------------------------------------------------------------------------------------


def test_a_notebook_opens_the_study_around_it(user_root, monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))
    s = study.begin("smoke", "01_baseline")
    assert s.root == user_root
    assert s.results.path == user_root / "reports/single_gpu/smoke/results.csv"
    with pytest.raises(UserError, match="FORCE=1"):
        study.begin("h100", "01_baseline")
    monkeypatch.setenv("FLUXNB_FORCE", "1")
    assert study.begin("h100", "01_baseline").params.name == "h100"


def test_a_notebook_that_judges_images_says_that_it_needs_trained_weights(user_root, monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))
    s = study.begin("smoke", "07_combined_cache")
    s.params.study.models[:] = ["flux-dev-random", "embedded"]
    assert s.first_judged().model.name == "embedded"
    s.params.study.models.pop()
    with pytest.raises(UserError, match="^07_combined_cache judges images, and no model .* in params/smoke.yaml"):
        s.first_judged()


# --- techniques and ceilings --------------------------------------------------------------------------------


class Note:
    """A technique that notes when it comes and goes."""

    settings = {}

    def __init__(self, name, log):
        self.name = self.label = name
        self.log = log

    def apply(self, pipe):
        self.log.append(f"+{self.name}")
        return lambda: self.log.append(f"-{self.name}")


def test_techniques_are_taken_back_in_reverse_whatever_happens():
    log = []
    with applied(None, Note("a", log), Note("b", log)):
        log.append("run")
    assert log == ["+a", "+b", "run", "-b", "-a"]
    log.clear()
    with pytest.raises(ZeroDivisionError), applied(None, Note("a", log)):
        raise ZeroDivisionError
    assert log == ["+a", "-a"]
    log.clear()
    with pytest.raises(Unavailable), applied(None, Note("a", log), Broken("b", Unavailable("no"))):
        pass
    assert log == ["+a", "-a"]


def test_ceilings_count_the_work_they_do():
    run, flop = ceilings.matmul(64, "float32")
    assert flop == 2 * 64**3 and run().shape == (64, 64)
    run, flop = ceilings.attention((1, 2, 32, 16), "float32", "default")
    run()
    assert flop == 4 * 1 * 2 * 32 * 32 * 16  # two products of 2 FLOP each
    run, moved = ceilings.copy(1 / 1024)
    run()
    assert moved == 2 * 2**20
    assert (
        ceilings.FLUX_ATTENTION[1] * ceilings.FLUX_ATTENTION[3]
        == pipelines._FLUX_TRANSFORMER["attention_head_dim"] * pipelines._FLUX_TRANSFORMER["num_attention_heads"]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_an_attention_backend_that_is_missing_is_unavailable():
    run, _ = ceilings.attention((1, 1, 16, 8), "float32", "cudnn")
    with pytest.raises(Unavailable, match="needs a GPU"):
        run()


@pytest.mark.parametrize(
    "make", [lambda: ceilings.matmul(64, "fp8"), lambda: ceilings.attention((1, 1, 16, 8), "float32", "math")]
)
def test_no_memory_for_the_operands_of_a_ceiling_is_not_a_missing_kernel(monkeypatch, make):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError

    run, _ = make()
    monkeypatch.setattr(ceilings, "device", lambda: "cuda")
    monkeypatch.setattr(torch, "randn", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run()


def test_two_techniques_that_set_the_same_are_told_apart_from_one():
    first, second = (SimpleNamespace(name=n, label=n, settings={"vae": n}) for n in ("parallel", "compiled"))
    together = study.on_ranks(None, 2, first, second, steps=1).settings
    assert together == {"vae": "parallel + compiled"} and study.on_ranks(None, 2, second, steps=1).settings != together
    assert study.on_top(study.on_ranks(None, 2, first, steps=1), second).settings == together
