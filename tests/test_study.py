"""The study's way to measure, on a small parameter set: rows, resume, reasons, images and traces."""

import dataclasses
import gc
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import small
import torch
from PIL import Image
from safetensors.torch import save_file
from studied import Broken, again_from_the_table

from fluxnb import families, notebooks, params, study
from fluxnb.cache import first_block
from fluxnb.errors import LacksMemory, UserError
from fluxnb.measure import ceilings, load, ranks, telemetry
from fluxnb.models import embedded, full_size, pipelines
from fluxnb.stacks import Stack
from fluxnb.study import by_hand, inferences, kept, soak, subject
from fluxnb.study.candidate import Candidate
from fluxnb.study.comparison import failure
from fluxnb.study.pool import _Held
from fluxnb.study.results import key_of
from fluxnb.study.row import Row
from fluxnb.study.subject import Loaded
from fluxnb.technique import ANOTHER, EXACTNESS, IDENTICAL, ROUNDING, Unavailable, applied
from fluxnb.techniques import attention
from fluxnb.techniques.fused import FusedRoPE
from fluxnb.techniques.modulation import ModulationAhead
from fluxnb.techniques.precision import TorchAO
from fluxnb.techniques.schedulers import DPMSolver

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
PROMISED = (
    "id label mark notebook family technique exact settings model weights use_case gpu gpus width height steps batch"
    " users images_each status n latency_min latency_p25 latency_p50 latency_p90 latency_avg load_s warmup_s first_s"
    " stable text_s denoise_s vae_s images_per_s memory_load_gib memory_peak_gib memory_avg_gib speedup speedup_ci_low"
    " speedup_ci_high computed_steps total_steps images psnr_identical ssim ssim_min adherence adherence_min samples"
    " session host kind versions measured_at run_id"
).split()


def candidates():
    return [study.using(first_block(0.3), STEPS), study.fewer_steps(2)]


def test_a_comparison_gives_complete_rows(begin):
    s, subject = begin()
    rows = s.compare(subject, study.plain(STEPS), candidates())
    families_of = [families.BASELINE, families.FIRST_BLOCK, families.FEWER_STEPS]
    assert [(row.family, row.technique) for row in rows] == [(f.name, f.name) for f in families_of]
    assert [row.label for row in rows] == ["4 steps", "FBCache 0.3", "2 steps"]
    assert [row.mark for row in rows] == ["4", "0.3", "2"]
    assert [row.exact for row in rows] == [IDENTICAL, ANOTHER, ANOTHER]
    for row in rows:
        missing = [name for name in PROMISED if getattr(row, name) is None]
        assert row.status == "ok" and not missing
        assert (row.model, row.weights, row.use_case) == ("embedded", "trained", "txt2img")
        assert (row.width, row.height, row.gpu, row.gpus) == (128, 128, "smoke", 1)
        assert row.n == len(row.samples) == 3 and row.latency_p99 is None and row.images == 2
        assert row.speedup_ci_low <= row.speedup <= row.speedup_ci_high
        assert row.text_s + row.denoise_s + row.vae_s > 0
        assert row.first_s <= row.warmup_s and row.stable in (0, 1)
        assert 0 <= row.adherence_min <= row.adherence <= 1
    baseline, cached, fewer = rows
    assert (baseline.psnr_identical, baseline.psnr_db, baseline.ssim) == (2, None, 1)  # the noise floor
    assert len(baseline.again) == 3 and baseline.again != baseline.samples and baseline.baseline is None
    assert cached.baseline == fewer.baseline == baseline.id and cached.again is None
    assert cached.setting("threshold") == 0.3 and cached.code and baseline.code is None
    assert (cached.total_steps, baseline.computed_steps) == (STEPS, STEPS)
    assert 1 <= cached.computed_steps <= STEPS
    assert (fewer.steps, fewer.computed_steps) == (2, 2)
    assert fewer.psnr_db < 60 and fewer.ssim < 1
    assert baseline.setting("dtype") == "float32"
    assert len({row.session for row in rows}) == len({row.host for row in rows}) == len({r.run_id for r in rows}) == 1
    assert s.results.rows() == rows
    again_from_the_table(rows)


def test_every_speedup_can_be_computed_again_from_the_table(begin, made):
    """Also where the baseline was timed several times: for each group, and again when the notebook goes on."""
    s, subject = begin(group=2)
    s.compare(subject, study.plain(STEPS), [study.fewer_steps(n) for n in (1, 2, 3)])
    s, subject = begin(group=2)
    s.compare(subject, study.plain(STEPS), [study.fewer_steps(n) for n in (2, 3, STEPS)])
    rows = s.results.rows()
    baselines = [row for row in rows if row.family == families.BASELINE.name]
    assert len(baselines) == 3 and len({row.id for row in rows}) == len(rows) == 7
    assert [row.again is not None for row in baselines] == [True, False, True]
    assert [row.speedup is not None for row in rows].count(False) == 1  # a baseline that was timed once
    again_from_the_table(rows)


def test_what_the_gpus_did_meanwhile_is_in_the_row(begin, nvml):
    s, subject = begin()
    baseline = study.plain(STEPS)
    (row,) = s.compare(subject, baseline, [])
    assert row.status == "ok" and row.gpu_util_avg == 60
    assert row.telemetry["power_peak_w"] == 650.5 and row.telemetry["throttle_reasons"]
    (again,) = s.compare(subject, baseline, [])
    assert again == row


def test_what_else_ran_meanwhile_is_in_the_row(begin, made):
    s, subject = begin()
    found = s.compare(subject, study.plain(STEPS), [])[0].telemetry
    assert found["other_load_cores"] >= 0 and 0 <= found["cpu_util_avg"] <= 100 and found["load_average"] >= 0
    alone = s.time("a sum", {}, lambda: sum(range(10**5)), 3)
    held = s.time("a sum", {}, lambda: sum(range(10**5)), 3, held_s=0.05)
    assert found.keys() == alone.telemetry.keys() == held.telemetry.keys()


def test_a_replay_finds_what_was_measured_elsewhere_and_measures_nothing(begin, study_root, monkeypatch):
    elsewhere = {"machine": telemetry.machine() | {"cpu": "another CPU"}, "versions": {"torch": "1.0"}}
    (study_root / "run.json").write_text(json.dumps(elsewhere))
    with monkeypatch.context() as measuring:
        measuring.setattr(telemetry, "machine", lambda: elsewhere["machine"])
        measuring.setattr(telemetry, "versions", lambda *_: elsewhere["versions"])
        s, subject = begin()
        given = subject, study.plain(STEPS), [study.fewer_steps(2)]
        rows, images = s.compare(*given), s.images(subject, study.plain(STEPS))
        failed = s.compare(*given[:2], [study.using(Broken("broken", RuntimeError("no kernel")), STEPS)])
    shutil.copytree(study_root / "reports" / "own", study_root / "committed")  # a replay shows the reference's rows
    shutil.rmtree(study_root / "reports")
    (study_root / "committed").rename(study_root / "reports")
    monkeypatch.setenv(telemetry.REPLAY, str(study_root / "run.json"))
    s, subject = begin()
    table = s.results.path.read_bytes()
    given = subject, study.plain(STEPS), [study.fewer_steps(2)]
    assert s.compare(*given) == rows and s.images(subject, study.plain(STEPS)) == images
    again = s.compare(*given[:2], [study.using(Broken("broken", None), STEPS)])
    assert again[1] == failed[1] and again[1].status == "error"  # shown, not tried again
    assert subject.part(1).for_use_case("img2img").use_case == "img2img"  # names what was measured, loads nothing
    for missing in (  # a row that says so
        s.compare(*given[:2], [study.fewer_steps(3)])[1],
        *s.survey(*given[:2], [study.fewer_steps(3)]),
        s.time("product", {}, lambda: None, 3),
        *s.serve(subject, [study.Load(1, 1, 2)], STEPS),
        *s.spread(subject, [study.stacked(Stack("two", (FusedRoPE(),)), STEPS, gpus=2)]),
    ):
        assert missing.status == "unavailable" and missing.label and "not in the table" in missing.reason
    for measuring in (
        lambda: s.compare(subject, study.plain(STEPS + 1), []),  # nothing can be set beside a baseline that isn't there
        lambda: s.images(subject, study.fewer_steps(3)),
        lambda: s.pipe(subject),
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


def test_a_row_of_fewer_rounds_than_are_asked_for_is_measured_again(begin, made):
    s, subject = begin()
    few = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])
    more = s.compare(dataclasses.replace(subject, rounds=10), study.plain(STEPS), [study.fewer_steps(2)])
    assert [r.n for r in few] == [3, 3] and [r.n for r in more] == [10, 10]
    assert s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)]) == more  # enough for fewer


def test_images_that_were_timed_are_those_that_are_judged(begin, made):
    s, subject = begin()
    (_, fewer) = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])
    assert len([call for call in made if call[2] == 2]) == 2 + 3  # warm-up and rounds, no more
    assert fewer.psnr_db is not None
    made.clear()
    assert s.images(subject, study.fewer_steps(2)) and made == []  # kept


def test_what_is_missing_is_measured_beside_a_baseline_of_its_own(begin, made):
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [study.fewer_steps(3)])
    s, subject = begin()
    made.clear()
    rows = s.compare(subject, study.plain(STEPS), [study.fewer_steps(3), study.fewer_steps(2)])
    old_base, three, base, two = s.results.rows()
    assert rows == [base, three, two] and {call[2] for call in made} == {2, STEPS}
    assert (three.baseline, two.baseline) == (old_base.id, base.id) and old_base.run_id != base.run_id
    assert base.again and len([call for call in made if call[2] == STEPS]) == 2 + 2 * 3  # warm again


def test_a_row_that_was_only_looked_at_is_timed_when_it_is_asked_for(begin, made):
    s, subject = begin()
    (seen,) = s.survey(subject, study.plain(STEPS), [study.fewer_steps(2)])
    assert seen.ok and seen.n is None and seen.latency_p50 is None and seen.psnr_db and seen.images == 2
    assert s.survey(subject, study.plain(STEPS), [study.fewer_steps(2)]) == [seen]
    made.clear()
    timed = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2)])[1]
    assert made and timed.n == 3 and timed.psnr_db == seen.psnr_db
    assert s.survey(subject, study.plain(STEPS), [study.fewer_steps(2)]) == [timed]
    unjudged = s.compare(subject, study.plain(STEPS), [study.fewer_steps(3)], judge=False)[1]
    assert unjudged.ok and unjudged.images is None
    assert s.compare(subject, study.plain(STEPS), [study.fewer_steps(3)])[1].images == 2


def test_a_survey_has_a_row_for_what_cannot_run(begin, made):
    s, subject = begin()
    broken = [study.using(Broken(type(e).__name__, e), STEPS) for e in (Unavailable("needs FP8"), RuntimeError("no"))]
    unavailable, error = s.survey(subject, study.plain(STEPS), broken)
    assert (unavailable.status, unavailable.reason) == ("unavailable", "needs FP8")
    assert (error.status, error.reason) == ("error", "RuntimeError: no")


@pytest.mark.parametrize("changed", [{"prompts": ["a red cup"]}, {"seeds": [5]}, {"guidance_scale": 1.5}])
def test_other_inputs_are_measured_anew(begin, made, changed):
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [])
    made.clear()
    s, subject = begin(**changed)
    s.compare(subject, study.plain(STEPS), [])
    assert made
    rows = s.results.rows()
    assert len(rows) == len({key_of(row) for row in rows}) == 2


def test_rows_of_another_machine_or_version_are_not_taken(begin, made, monkeypatch):
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [])
    made.clear()
    s, subject = begin()
    s.host = "another"
    (row,) = s.compare(subject, study.plain(STEPS), [])
    assert made and row.host == "another"
    made.clear()
    monkeypatch.setattr(telemetry, "versions_short", lambda: "torch 0.1")
    s, subject = begin()
    (row,) = s.compare(subject, study.plain(STEPS), [])
    assert made and row.versions == "torch 0.1"


def test_images_of_other_versions_are_not_shown_for_those_that_were_timed(begin, made, monkeypatch):
    s, subject = begin()
    s.images(subject, study.plain(STEPS))
    monkeypatch.setattr(telemetry, "versions_short", lambda: "torch 0.1")
    made.clear()
    assert begin()[0].images(subject, study.plain(STEPS)) and len(made) == 2
    made.clear()
    other, _ = begin(notebooks.TEACACHE)  # another page and another machine's name show the same
    other.host = "another"
    assert other.images(subject, study.plain(STEPS)) and made == []


def test_a_row_of_a_technique_whose_code_has_changed_is_measured_again(begin, made, monkeypatch):
    from fluxnb.study import code

    def found():
        s, subject = begin()
        return s.compare(subject, study.plain(STEPS), [study.using(FusedRoPE(), STEPS), *candidates()])

    monkeypatch.setattr(FusedRoPE, "apply", lambda self, pipe: lambda: None)
    monkeypatch.setattr(first_block(0.3).__class__, "apply", lambda self, pipe: lambda: None)
    _, fused, cached, fewer = found()
    assert fused.code and cached.code and fused.code != cached.code and fewer.code is None
    digest, made[:] = code.digest, []
    changed = lambda modules: "changed" if any("fused" in name for name in modules) else digest(modules)  # noqa: E731
    monkeypatch.setattr(code, "digest", changed)
    _, again, *others = found()
    assert again.id != fused.id and again.code == "changed" and others == [cached, fewer]
    assert {call[2] for call in made} == {STEPS}  # fewer steps weren't
    made.clear()
    assert found()[1:] == [again, cached, fewer] and made == []


def test_images_of_another_size_can_be_compared(begin):
    s, subject = begin(width=112, prompts=["a red cup"])
    (row,) = s.compare(subject, study.plain(2), [])
    assert (row.status, row.width, row.psnr_identical) == ("ok", 112, 1)


def test_other_weights_are_measured_anew(begin, made, monkeypatch):
    s, own = begin()
    s.compare(own, study.plain(STEPS), [])
    made.clear()
    s, own = begin()
    monkeypatch.setattr(subject, "fingerprint", lambda name: "retrained")
    s.compare(own, study.plain(STEPS), [])
    assert made


def test_the_fingerprint_follows_the_files_of_a_folder(tmp_path):
    assert subject.fingerprint("flux-dev-random") == "flux-dev-random"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    one = subject.fingerprint(str(folder))
    (folder / "a.safetensors").write_bytes(b"three")
    assert subject.fingerprint(str(folder)) != one
    assert len(subject.fingerprint("embedded")) == 16


DECIDES = [
    "model_index.json", "transformer/config.json", "transformer/a.safetensors", "transformer/a.bin", "vae/b.gguf",
    "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model", "tokenizer/vocab",
]  # fmt: skip


@pytest.mark.parametrize("size", [2**28, 10])
def test_every_file_that_decides_an_image_changes_the_fingerprint_however_it_was_put_there(tmp_path, monkeypatch, size):
    monkeypatch.setattr(subject, "_WHOLE", size)  # of small files as of large ones
    folder, elsewhere = tmp_path / "model", tmp_path / "transformer"
    tensors = {name: torch.zeros(4096) for name in ("a", "b", "c")}
    for name in DECIDES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0" * 300_000)
    save_file(tensors, folder / "transformer" / "a.safetensors")
    (folder / "transformer").rename(elsewhere)
    (folder / "transformer").symlink_to(elsewhere, target_is_directory=True)
    before = {subject.fingerprint(str(folder))}
    for path in (folder / name for name in DECIDES):
        stat, data = path.stat(), bytearray(path.read_bytes())
        data[-1 if size > 10 else len(data) // 64 * 32] ^= 1
        (beside := path.with_name("x")).write_bytes(data)
        os.utime(beside, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p and rsync do
        os.replace(beside, path)
        before.add(subject.fingerprint(str(folder)))
    assert len(before) == len(DECIDES) + 1
    tensors["b"][0] = 1
    save_file(tensors, folder / "transformer" / "a.safetensors")
    last = subject.fingerprint(str(folder))
    assert last not in before
    for name in ("README.md", ".gitattributes", "teacache.json"):
        (folder / name).write_text("other")
    assert subject.fingerprint(str(folder)) == last


def test_a_model_of_the_hub_is_another_one_at_another_revision(monkeypatch):
    import huggingface_hub

    commits = iter(["a" * 40, "b" * 40, None])

    def cached(name, file):
        commit = next(commits)
        return commit and f"/cache/models--x--y/snapshots/{commit}/{file}"

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert [subject.fingerprint("x/y") for _ in range(2)] == [f"x/y@{'a' * 12}", f"x/y@{'b' * 12}"]


def test_other_settings_of_a_shipped_model_change_its_fingerprint(tmp_path, monkeypatch):
    names = (embedded.NAME, embedded.SCHNELL)
    before = [subject.fingerprint(name) for name in names]
    weights = shutil.copytree(embedded.FOLDER.parent, tmp_path / "weights")
    folders = {name: weights / embedded.FOLDERS[name].name for name in names}
    monkeypatch.setattr(embedded, "FOLDER", folders[embedded.NAME])
    monkeypatch.setattr(embedded, "FOLDERS", folders)
    assert [subject.fingerprint(name) for name in names] == before
    path = folders[embedded.NAME] / "scheduler" / "scheduler_config.json"  # the other one has its own
    path.write_text(path.read_text().replace("1000", "999"))
    assert [subject.fingerprint(name) == old for name, old in zip(names, before, strict=True)] == [False, True]
    path = folders[embedded.NAME] / "vae" / "config.json"
    path.write_text(path.read_text() + " ")
    assert not set(map(subject.fingerprint, names)) & set(before)


def test_force_measures_again_and_makes_the_images_again(begin, made, monkeypatch):
    s, own = begin()
    first = s.compare(own, study.plain(STEPS), [study.fewer_steps(2)])
    made.clear()
    s, own = begin()
    assert s.compare(own, study.plain(STEPS), [study.fewer_steps(2)]) == first and not made
    monkeypatch.setenv("FLUXNB_AFRESH", str(len(s.results.rows())))
    again = begin()[0].compare(own, study.plain(STEPS), [study.fewer_steps(2)])
    assert made and not {row.id for row in again} & {row.id for row in first}
    made.clear()
    assert begin()[0].compare(own, study.plain(STEPS), [study.fewer_steps(2)]) == again and not made
    monkeypatch.delenv("FLUXNB_AFRESH")
    assert begin()[0].compare(own, study.plain(STEPS), [study.fewer_steps(2)]) == again


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), LacksMemory("too little memory")],
)
def test_the_machines_own_memory_is_a_row_too_and_the_next_is_measured(begin, made, error):
    s, own = begin()
    broken = study.using(Broken("large", error), STEPS)
    _, failed, fewer = s.compare(own, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert failed.status == "oom" and "memory" in failed.reason and fewer.status == "ok"


FULL = torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")


def test_every_technique_that_runs_out_of_memory_is_an_oom_row_and_the_next_is_measured(begin, made, monkeypatch):
    def full(*_, **__):
        raise FULL

    techniques = {name: make() for name, make in (small.TECHNIQUES | small.COMPILED).items()}
    for kind in {type(technique) for technique in techniques.values()}:
        monkeypatch.setattr(kind, "apply", full)
        monkeypatch.setattr(kind, "check", lambda *_: None, raising=False)
    s, own = begin()
    broken = [study.using(technique, STEPS, label=name) for name, technique in techniques.items()]
    baseline, *rows, fewer = s.compare(own, study.plain(STEPS), [*broken, study.fewer_steps(2)])
    assert {row.label: (row.status, row.reason) for row in rows} == dict.fromkeys(techniques, ("oom", str(FULL)))
    assert baseline.status == fewer.status == "ok"


@pytest.mark.parametrize("error", [FULL, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_every_way_to_measure_makes_a_row_of_what_runs_out_of_memory(begin, made, monkeypatch, error):
    def full(*_, **__):
        raise error

    s, own = begin()
    assert s.time("product", {"n": 1}, full, 3).status == "oom"
    assert s.time("product", {"n": 2}, lambda: None, 3).status == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(Loaded, "batch", full)
        rows = s.survey(own, study.plain(STEPS), [study.fewer_steps(2), study.fewer_steps(3)])
        rows += inferences.first_and_second(s, own, [study.plain(STEPS)])
        rows += [soak.soak(s, own, study.plain(STEPS), 1.0)]
    assert [row.status for row in rows] == ["oom"] * 4
    said = "Worker 0 could not start: OutOfMemoryError: CUDA out of memory"
    monkeypatch.setattr(load.Server, "__enter__", lambda _: (_ for _ in ()).throw(UserError(said)))
    assert [(row.status, row.reason) for row in s.serve(own, [study.Load(1, 1, 1)], 1)] == [("oom", said)]


# --- what can't run -----------------------------------------------------------------------------------------


def test_an_unavailable_technique_is_a_row_with_its_reason_and_the_others_go_on(begin, made):
    s, subject = begin()
    broken = study.using(Broken("FP8", Unavailable("needs compute capability 8.9")), STEPS)
    baseline, failed, fewer = s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert (failed.status, failed.reason) == ("unavailable", "needs compute capability 8.9")
    assert failed.speedup is None and failed.samples is None and failed.baseline is None
    assert baseline.status == fewer.status == "ok"
    assert study.need([baseline, failed, fewer]) == [baseline, fewer]
    made.clear()
    s, subject = begin()
    assert s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])[1] == failed
    assert made == []  # the reason is a result: it isn't tried again


def test_what_compiles_for_too_long_is_given_up_until_someone_has_more_patience(begin, made, monkeypatch):
    fast, waits = Loaded.batch, iter([0.5])

    def slow(self, inputs, steps):
        time.sleep(next(waits, 0.0) if steps == 2 else 0.0)
        return fast(self, inputs, steps)

    monkeypatch.setattr(Loaded, "batch", slow)

    def found(patience_s):
        s, subject = begin()
        candidate = dataclasses.replace(study.fewer_steps(2), patience_s=patience_s)
        return s.compare(subject, study.plain(STEPS), [candidate])[1]

    given_up = found(0.2)
    assert (given_up.status, given_up.latency_p50) == ("unavailable", None)
    assert given_up.reason == "no image after 0.2 s, so it was given up; allow it more"
    made.clear()
    assert found(0.1) == found(0.2) == given_up and made == []
    assert found(30).status == "ok" and made
    assert found(0.2).status == "ok"  # what is there is there


def test_out_of_memory_is_a_row_and_the_others_go_on(begin, made):
    s, subject = begin()
    broken = study.using(Broken("large", torch.cuda.OutOfMemoryError("tried to allocate 90 GiB\nmore")), STEPS)
    _, failed, fewer = s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert (failed.status, failed.reason) == ("oom", "tried to allocate 90 GiB")
    assert fewer.status == "ok"


def test_a_rank_that_runs_out_of_memory_is_oom_too():
    said = "Rank 1 of 2 failed: OutOfMemoryError: CUDA out of memory; the others were ended with it."
    assert failure(ranks.RankError(said)) == {"status": "oom", "reason": said}
    assert failure(ranks.RankError("Rank 1 of 2 was killed by signal 9"))["status"] == "error"
    assert failure(RuntimeError(""))["reason"] == "RuntimeError: no message"


def test_a_graph_that_breaks_is_a_reason_and_no_error():
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported) as found:
        torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(1))
    columns = failure(found.value)
    assert columns["status"] == "unavailable" and columns["reason"].startswith("can't be compiled as one graph: ")


def test_what_a_library_refuses_is_a_row_that_is_tried_again(begin, made):
    s, subject = begin()
    refusal = RuntimeError("backend='inductor' raised:\nTypeError: no such kernel\n\nSet TORCH_LOGS")
    broken = study.using(Broken("odd", refusal), STEPS)
    baseline, failed, fewer = s.compare(subject, study.plain(STEPS), [broken, study.fewer_steps(2)])
    assert (failed.status, failed.reason) == ("error", "RuntimeError: TypeError: no such kernel")
    assert baseline.status == fewer.status == "ok"
    s, subject = begin()
    working = study.using(Broken("odd", None), STEPS)
    assert s.compare(subject, study.plain(STEPS), [working])[1].status == "ok"


@pytest.mark.parametrize("weights", ["trained", "random"])
def test_a_baseline_that_runs_out_of_memory_does_not_end_the_notebook(begin, made, monkeypatch, weights):
    s, subject = begin()
    subject = dataclasses.replace(subject, model=dataclasses.replace(subject.model, weights=weights))
    batch = Loaded.batch

    def limited(self, inputs, steps):
        if steps == STEPS:
            raise torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")
        return batch(self, inputs, steps)

    monkeypatch.setattr(Loaded, "batch", limited)
    baseline, *others = s.compare(subject, study.plain(STEPS), [study.fewer_steps(2), study.fewer_steps(3)])
    assert (baseline.status, baseline.reason) == ("oom", "tried to allocate 90 GiB")
    said = "4 steps can't run here, so there is nothing to compare it with: tried to allocate 90 GiB"
    assert [(row.status, row.reason) for row in others] == [("unavailable", said)] * 2
    assert len(s.results.rows()) == 3


def test_any_other_error_is_passed_on_and_leaves_the_pipeline_as_it_was(begin, embedded_pipe):
    s, subject = begin()
    before = set(vars(embedded_pipe.transformer))
    with pytest.raises(ZeroDivisionError):
        s.compare(subject, study.plain(STEPS), [study.using(Broken("bug", ZeroDivisionError()), STEPS)])
    assert set(vars(embedded_pipe.transformer)) == before


def test_candidates_with_the_same_label_keep_their_own_figures(begin, made):
    s, subject = begin()
    named_alike = [dataclasses.replace(study.fewer_steps(n), label="a control") for n in (3, 2)]
    _, three, two = s.compare(subject, study.plain(STEPS), named_alike)
    assert (three.steps, three.computed_steps) == (3, 3)
    assert (two.steps, two.computed_steps) == (2, 2)


def test_what_is_built_in_stays_in(begin):
    s, subject = begin()
    built = subject.having(FusedRoPE(), ModulationAhead())
    gc.collect()
    loaded = s.loaded(built)
    gc.collect()
    transformer = s.pipe(built).transformer
    assert transformer is loaded.pipe.transformer
    assert {type(b.attn.processor).__name__ for b in transformer.transformer_blocks} == {"Processor"}
    assert hasattr(transformer, "_fluxnb_ahead") and loaded.generate("a red ball", 0, 2)


def test_pipelines_of_ones_own_are_compared_like_any_other(begin, embedded_pipe):
    s, subject = begin()
    small = study.built(TorchAO("int8 weight-only"), steps=2)
    missing = study.built(TorchAO("int4 weight-only"), steps=2)
    rows = s.compare(subject, study.plain(2), [small, missing, study.fewer_steps(1)])
    assert [r.label for r in rows] == ["2 steps", "TorchAO INT8 weight-only", "TorchAO INT4 weight-only", "1 steps"]
    assert [r.status for r in rows] == ["ok", "ok", "unavailable", "ok"]
    assert rows[1].family == families.QUANTIZATION.name and rows[1].exact == ANOTHER
    assert rows[1].shown("weight") == "Int8Tensor" and rows[1].memory_load_gib < 0.03
    assert s.pipe(subject) is embedded_pipe
    again_from_the_table(rows)


def test_a_batch_is_one_measurement_of_several_images_and_each_is_judged(begin, made):
    s, subject = begin()
    row = s.compare(subject, study.plain(STEPS, batch=3), [])[0]
    assert row.batch == 3 and row.images_per_s == pytest.approx(3 * row.n / sum(row.samples))
    assert len(made) % 3 == 0 and row.psnr_identical == row.images == len(subject.inputs)
    made.clear()
    assert s.compare(subject, study.plain(STEPS, batch=3), []) == [row] and made == []


def test_a_function_by_itself_is_a_row_with_what_it_proves(begin):
    s, _ = begin()
    calls = []
    proof = {"proof": {"error": 0.5}}
    row = s.time("product", {"size": 3}, lambda: calls.append("run"), 2, also=lambda: proof, warm=False)
    assert calls == ["run"] * 2 and row.proof == {"error": 0.5} and row.n == 2 and row.stable is None
    assert (row.family, row.label) == (families.CEILING.name, "product")
    again = s.time("product", {"size": 3}, lambda: calls.append("run"), 2, before=lambda: calls.append("before"))
    assert calls == ["run"] * 2 and again == row


def test_a_corrupted_table_is_a_sentence(begin):
    s, subject = begin()
    s.results.path.parent.mkdir(parents=True)
    s.results.path.write_text("notebook,technique\n1,2\n")
    with pytest.raises(UserError, match=r"results\.csv line 1 .* restore it from git"):
        s.compare(subject, study.plain(STEPS), [])
    assert s.results.path.read_text() == "notebook,technique\n1,2\n"


def test_nothing_to_report_is_a_sentence():
    with pytest.raises(UserError, match="No finished measurement"):
        study.need([Row(status="error", technique="x")])
    oom = Row(status="oom", technique="x")
    assert study.need([oom]) == [oom]  # which is what there is to report
    ok = Row(status="ok", technique="x")
    assert study.need([ok, Row(status="ok", technique="y")], technique="x") == [ok]


# --- candidates of other kinds ------------------------------------------------------------------------------


def test_another_number_format_is_compared_with_the_reference(begin, embedded_pipe, monkeypatch):
    monkeypatch.setitem(pipelines.DTYPES, "float64", torch.float64)  # bfloat16 takes minutes on some processors
    s, subject = begin(notebooks.NUMBER_FORMATS)
    other = study.in_format("float64", STEPS)
    reference, row = s.compare(subject, study.plain(STEPS, label="float32"), [other])
    assert (reference.setting("dtype"), row.setting("dtype")) == ("float32", "float64")
    assert (row.family, row.label, row.mark, row.exact) == (
        families.NUMBER_FORMAT.name, "float64, 4 steps", "float64", ANOTHER,
    )  # fmt: skip
    assert reference.setting("inputs") == row.setting("inputs") and reference.label == "float32"
    assert row.load_s > 0 and row.psnr_db > 10
    assert s.pipe(other.of(subject)).transformer.dtype == torch.float64
    assert s.pipe(subject) is embedded_pipe and embedded_pipe.transformer.dtype == torch.float32


def test_images_that_mean_nothing_are_not_judged(begin):
    s, subject = begin()
    loaded = s.loaded(subject)
    random = dataclasses.replace(subject.model, name="flux-dev-random", weights="random")
    subject = dataclasses.replace(subject, model=random)
    s.pool._held[subject.pipeline] = _Held(dataclasses.replace(loaded, subject=subject), 0.03, None)
    rows = s.compare(subject, study.plain(STEPS), candidates())
    for row in rows:
        assert row.weights == "random" and row.status == "ok" and row.images is None
        assert all(getattr(row, name) is None for name in ("psnr_db", "psnr_identical", "ssim", "adherence"))
    assert 1 <= rows[1].computed_steps <= STEPS  # from the trace all the same


@pytest.mark.parametrize(
    "candidate, meant",
    [
        (study.plain(28), (families.BASELINE, "28 steps", "28", None, IDENTICAL)),
        (study.plain(28, (FusedRoPE(),)), (families.BASELINE, "28 steps, fused RoPE", "28", None, None)),
        (study.fewer_steps(9), (families.FEWER_STEPS, "9 steps", "9", None, ANOTHER)),
        (study.fewer_steps(9, DPMSolver()), (families.SECOND_ORDER, "DPM-Solver++, 9 steps", "9", None, ANOTHER)),
        (study.fewer_steps(9, DPMSolver(), on=Stack("one", (FusedRoPE(),), (first_block(0.1),))),
         (families.SECOND_ORDER, "fused RoPE, FBCache 0.1, DPM-Solver++, 9 steps", "9", None, ANOTHER)),
        (study.using(first_block(0.1), 28), (families.FIRST_BLOCK, "FBCache 0.1", "0.1", None, ANOTHER)),
        (study.using(first_block(0.0), 28), (families.FIRST_BLOCK, "FBCache 0", "0", None, IDENTICAL)),
        (study.using(first_block(0.1), 28, (Broken("VAE", None),)),
         (families.FIRST_BLOCK, "FBCache 0.1, VAE", "0.1", None, ANOTHER)),
        (study.stacked(Stack("two", (Broken("a", None),), (first_block(0.1),)), 28),
         (families.STACK, "two", "two", "two", ANOTHER)),
        (study.stacked(Stack("one", (FusedRoPE(),), label="fused"), 28), (None, "fused", "one", "one", ROUNDING)),
        (study.in_format("bfloat16", 28), (families.NUMBER_FORMAT, "bfloat16, 28 steps", "bfloat16", None, ANOTHER)),
    ],
)  # fmt: skip
def test_a_candidate_says_itself_what_it_is(candidate, meant):
    family, label, mark, stack, exact = meant
    found = candidate.meaning
    assert (found["label"], found["mark"], found["stack"]) == (label, mark, stack)
    assert found["family"] == (family or FusedRoPE().family).name and found["exact"] in EXACTNESS
    assert exact in (None, found["exact"])


def test_a_subject_follows_the_parameters(begin):
    s, _ = begin(width=64, height=96, seeds=[3, 4])
    small, full = s.subject("embedded"), s.subject("flux-dev-random")
    assert (small.width, small.height, small.rounds) == (64, 96, 3)
    assert (full.width, full.height, full.rounds) == (256, 256, 5)
    assert (s.steps(small), s.steps(full)) == (8, 2)
    assert small.inputs == [
        ("a red apple on a white table", 3),
        ("a cat", 3),
        ("a red apple on a white table", 4),
        ("a cat", 4),
    ]


def test_a_ceiling_is_a_row_that_is_found_again(begin):
    s, _ = begin(notebooks.ENVIRONMENT)
    calls = []
    row = s.time("ceiling: test", {"size": 2}, lambda: calls.append(1), repeats=4)
    assert row.status == "ok" and row.n == 4 and row.latency_p50 >= 0 and row.stable in (0, 1)
    assert row.model is None and row.weights == "random"
    assert len(calls) >= 5  # warm-up too
    calls.clear()
    assert begin(notebooks.ENVIRONMENT)[0].time("ceiling: test", {"size": 2}, lambda: calls.append(1), 4) == row
    assert calls == []

    def unavailable():
        raise Unavailable("needs a GPU")

    row = s.time("ceiling: other", {}, unavailable, repeats=4)
    assert (row.status, row.reason) == ("unavailable", "needs a GPU")


# --- images, traces, progress -------------------------------------------------------------------------------


def test_images_are_kept_and_made_again_when_they_are_gone(begin, made):
    s, subject = begin()
    fewer = study.fewer_steps(2)
    images = s.images(subject, fewer)
    assert [image.size for image in images] == [(128, 128)] * 2
    assert [call[:2] for call in made] == subject.inputs
    assert images[0].tobytes() == s.loaded(subject).generate(*subject.inputs[0], 2).tobytes()
    made.clear()
    found = begin()[0].images(subject, fewer)
    assert made == [] and [i.tobytes() for i in found] == [i.tobytes() for i in images]
    shutil.rmtree(s.images_dir)
    again = s.images(subject, fewer)
    assert len(made) == 2 and [i.tobytes() for i in again] == [i.tobytes() for i in images]


def test_what_was_kept_is_found_by_the_row_that_it_belongs_to(begin, made):
    s, subject = begin()
    broken = study.using(Broken("cached", None), STEPS)
    first = s.images(subject, broken)
    row = s.compare(subject, study.plain(STEPS), [broken])[1]
    own = {found.name: found for found in kept.every(s.images_dir)}[kept.digest(row)]
    assert (own.label, own.inputs, own.key["technique"]) == ("cached", subject.inputs, "cached")
    assert own.image(0).tobytes() == first[0].tobytes() and len(kept.every(s.images_dir)) == 2


def test_an_interrupted_set_of_images_does_not_count(begin, made):
    s, subject = begin()
    s.images(subject, study.fewer_steps(2))
    (done,) = s.images_dir.rglob("traces.json")
    done.unlink()
    Image.new("RGB", (1, 1)).save(done.with_name("0.png"))
    made.clear()
    assert kept.every(s.images_dir) == []
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


def test_progress_counts_every_row_once_and_ends_with_all_done(begin, made, tmp_path, monkeypatch):
    events = tmp_path / "progress.jsonl"
    monkeypatch.setenv("FLUXNB_PROGRESS", str(events))
    for done in ([(1, 0), (2, 0), (3, 0), (4, 0)], [(4, 4)]):
        events.unlink(missing_ok=True)
        s, subject = begin(group=1)  # a baseline for each of the candidates
        s.compare(subject, study.plain(STEPS), [study.fewer_steps(n) for n in (1, 2, 3)])
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        assert lines[-1]["notebook"] == notebooks.FIRST_BLOCK
        assert [(line["done"], line["found"]) for line in lines] == done
        assert {line["total"] for line in lines} == {4}


def test_a_notebook_run_by_hand_shows_how_far_it_is_in_one_line_of_its_cell(begin, monkeypatch):
    import IPython.display

    class Handle:
        update = staticmethod(lambda data, raw: said.append(data["text/plain"]))

    def display(data, raw, display_id):
        begun.append(data["text/plain"])
        return Handle

    class Shell:
        kernel, execution_count = object(), 3

    said, begun = [], []
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell)
    monkeypatch.setattr(by_hand, "EVERY_S", 0.0)
    monkeypatch.delenv(by_hand.PROGRESS, raising=False)
    s, subject = begin()
    s.compare(subject, study.plain(STEPS), [study.fewer_steps(1)])
    assert len(begun) == 1 and begun[0].startswith("0 of 2 rows")  # before anything is loaded
    for words in ("warming up", f"timing {study.fewer_steps(1).meaning['label']}, round 1 of", "judging"):
        assert any(words in line for line in said), words
    assert said[-1].startswith("2 of 2 rows")
    Shell.execution_count = 4
    s.compare(subject, study.plain(STEPS), [study.fewer_steps(1)])
    assert len(begun) == 2 and begun[1].startswith("4 of 4 rows, 2 of them from before")
    monkeypatch.setenv(by_hand.PROGRESS, "/dev/null")
    Shell.execution_count = 5
    s.compare(subject, study.plain(STEPS), [study.fewer_steps(1)])
    assert len(begun) == 2  # a run tells its console


# --- opening ------------------------------------------------------------------------------------------------


def test_a_notebook_opens_the_study_around_it(user_root, monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))
    s = study.begin("smoke", notebooks.NUMBER_FORMATS)
    assert s.root == user_root
    assert s.results.path == user_root / "reports/own/single_gpu/smoke/results.csv"
    with pytest.raises(UserError, match="FORCE=1"):
        study.begin("h100", notebooks.NUMBER_FORMATS)
    monkeypatch.setenv("FLUXNB_FORCE", "1")
    assert study.begin("h100", notebooks.NUMBER_FORMATS).params.name == "h100"


def test_a_notebook_that_judges_images_says_that_it_needs_trained_weights(user_root, monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))
    s = study.begin("smoke", notebooks.COMBINED)
    s.params.study.models[:] = ["flux-dev-random", "embedded"]
    assert [subject.model.name for subject in s.judged] == ["embedded"]
    assert [subject.model.name for subject in s.full_size] == ["flux-dev-random"]
    assert s.first_judged().model.name == "embedded"
    s = study.begin("smoke", notebooks.COMBINED)
    s.params.study.models[:] = ["flux-dev-random"]
    with pytest.raises(UserError, match="^07_combined_cache judges images, and no model .* in params/smoke.yaml"):
        s.first_judged()


def test_a_notebook_has_its_own_parameters_checked(user_root, monkeypatch):
    monkeypatch.setattr(params, "detect_gpu", lambda: ("cpu", 0))
    s = study.begin("smoke", notebooks.FIRST_BLOCK, thresholds=[0, 0.1, 0.5, 0.6])
    assert s.given.thresholds == [0, 0.1, 0.5, 0.6] and vars(study.begin("smoke", notebooks.FIRST_BLOCK).given) != vars(
        s.given
    )
    with pytest.raises(UserError, match="thresholds"):
        study.begin("smoke", notebooks.FIRST_BLOCK, thresholds=["a"])
    with pytest.raises(UserError, match="no_such"):
        study.begin("smoke", notebooks.FIRST_BLOCK, no_such=1)


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
        == full_size.TRANSFORMER["attention_head_dim"] * full_size.TRANSFORMER["num_attention_heads"]
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


def test_no_memory_for_an_attention_is_not_a_missing_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")

    run, _ = ceilings.attention((1, 1, 16, 8), "float32", "math")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run()
    own = attention.function("math")
    monkeypatch.setattr(attention, "scaled_dot_product_attention", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        own(*[torch.zeros(1, 1, 16, 8)] * 3)


def test_two_techniques_that_set_the_same_are_told_apart_from_one():
    first, second = (Broken(name, None) for name in ("parallel", "compiled"))
    first.settings, second.settings = {"vae": "parallel"}, {"vae": "compiled"}
    together = study.built(first, second, steps=1).settings
    assert together == {"vae": "parallel + compiled"} and study.built(second, steps=1).settings != together
    assert study.built(first, steps=1, above=(second,)).settings == together
    assert Candidate(1, (second,), (first,)).settings == together


def test_comments_and_docstrings_are_not_what_techniques_do(tmp_path, monkeypatch):
    from fluxnb.study import code

    monkeypatch.setattr(code, "ROOT", tmp_path)
    folder = tmp_path / "techniques"
    folder.mkdir()

    def digest(own, other="SIZE = 1"):
        (folder / "own.py").write_text(own)
        (folder / "other.py").write_text(other)
        code.digest.cache_clear()
        code._read.cache_clear()
        return code.digest(("fluxnb.techniques.own",))

    body = "from fluxnb.techniques import other\n\ndef f(x):\n    {}return x + 1\n"
    try:
        plain = digest(body.format(""))
        assert (
            plain
            == digest(body.format('"""It adds."""\n    '))
            == digest('"""A room."""\n' + body.format("# one\n    "))
        )
        assert plain != digest(body.format("").replace("+ 1", "+ 2"))
        assert plain != digest(body.format(""), "SIZE = 2")  # what it imports counts
        assert digest(body.format(""), "# size\nSIZE = 1") == plain
        assert code.digest(("tests.test_study",)) is None
    finally:
        code.digest.cache_clear()
