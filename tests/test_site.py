"""The front page, the ledger, the progress files and the explorer: computed from rows, alike in a browser."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from test_browser import BROWSER, Tab, browser

from fluxnb import params, study
from fluxnb.cache import first_block
from fluxnb.errors import UserError
from fluxnb.findings import ledger, published
from fluxnb.report import analysis, charts, disk, explorer, progress, site
from fluxnb.report.render import Page, check_page
from fluxnb.study.results import Results

ROOT = Path(__file__).resolve().parents[1]
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")


def row(**changed):
    values = {
        "notebook": "07_combined_cache",
        "technique": "baseline",
        "settings": {"dtype": "float32", "inputs": "a"},
        "model": "embedded",
        "weights": "trained",
        "use_case": "txt2img",
        "gpu": "cpu",
        "gpus": 1,
        "width": 128,
        "height": 128,
        "steps": 28,
        "batch": 1,
        "users": 1,
        "images": 1,
        "status": "ok",
        "n": 3,
        "latency_p50": 0.4,
        "speedup": 1.0,
        "speedup_ci_low": 0.9,
        "speedup_ci_high": 1.1,
        "computed_steps": 28.0,
        "total_steps": 28,
        "psnr_db": None,
        "psnr_min_db": None,
        "psnr_identical": 1,
        "ssim": 1.0,
        "adherence": 1.0,
        "memory_peak_gib": 0.1,
        "machine": "m",
        "versions": "v",
        "measured_at": "2026-11-20T00:00:00+00:00",
        "run_id": "r",
        "reason": None,
        "proof": None,
        "memory_load_gib": None,
        "denoise_s": None,
        "gpu_memory_avg_pct": None,
    }
    return {**values, **changed}


def cached(threshold, speedup, psnr, steps, **changed):
    given = {"dtype": "float32", "inputs": "a", "threshold": threshold}
    common = {"technique": "First Block Cache", "settings": given, "speedup": speedup, "psnr_db": psnr}
    return row(**{**common, "computed_steps": steps, "notebook": "05_first_block_cache", **changed})


# --- the ledger ---


def test_every_published_technique_has_a_claim_and_every_claim_a_verdict():
    claims = ledger.claims()
    table = published.table()
    baselines = set(ledger.BASELINES.values())
    for technique in set(table.technique) - baselines:
        assert any(c.technique == technique for c in claims), technique
    entries = ledger.entries({})
    assert len(entries) == len(claims) and {e.verdict for e in entries} == {"not run"}
    assert all(e.reason for e in entries)


def test_a_claim_is_a_ratio_over_its_own_baseline():
    found = {(c.technique, c.gpu, c.metric): c.value for c in ledger.claims()}
    assert found["FBCache (0.2)", "H100 80GB", "ratio"] == pytest.approx(7.18 / 2.57)
    assert found["FBCache (0.2)", "A6000", "ratio"] == pytest.approx(20.58 / 5.25)
    assert found["bf16 compile", "H100", "ratio"] == pytest.approx(1.56, abs=0.01)
    assert found["fully optimised", "H100", "ratio"] is None


@pytest.mark.parametrize(
    ("side", "theirs", "ours", "said"),
    [
        ("", 2.0, 2.29, "reproduced"),
        ("", 2.0, 2.31, "not reproduced"),
        ("", 2.0, 1.69, "not reproduced"),
        ("least", 2.0, 2.0, "reproduced"),
        ("least", 2.0, 1.99, "not reproduced"),
        ("least", 2.0, 9.0, "reproduced"),
        ("most", 0.05, 0.0, "reproduced"),
        ("most", 0.05, 0.06, "not reproduced"),
        ("up to", 3.0, 2.6, "reproduced"),
        ("up to", 3.0, 2.5, "not reproduced"),
        ("up to", 3.0, 5.0, "reproduced"),
    ],
)
def test_the_rule_of_a_verdict(side, theirs, ours, said):
    claim = ledger.Claim("x", "s", "H100", 1, "m", "measured", "ratio", theirs, side)
    assert ledger.verdict(claim, ours) == said


def test_what_the_plans_promise_is_judged_by_the_fastest_setting_that_keeps_adherence():
    rows = [row(notebook="05_first_block_cache"), cached(0.2, 2.5, 30, 8.0), cached(0.8, 4.0, 19, 2.0, adherence=0.9)]
    found = {(e.claim.technique, e.claim.side): e for e in ledger.entries({"cpu": rows})}
    assert found["FBCache", "least"].verdict == "reproduced" and found["FBCache", "least"].ours == 2.5
    assert found["FBCache", "up to"].verdict == "not reproduced"
    assert found["TeaCache", "least"].verdict == "not run"


def test_a_threshold_on_another_model_is_shown_but_not_called_a_reproduction():
    rows = [row(notebook="05_first_block_cache"), cached(0.2, 2.5, 30, 8.0)]
    found = [
        e for e in ledger.entries({"cpu": rows}) if e.claim.technique == "FBCache (0.2)" and e.claim.gpu == "H100 80GB"
    ]
    assert found[0].verdict == "not comparable" and found[0].ours == 2.5 and "8 of 28" in found[0].setting


def test_hardware_ratios_need_alike_hardware():
    full = {"weights": "random", "model": "flux-dev-random"}
    stack = row(notebook="13_final_stack", technique="BF16 compiled", speedup=1.3, **full)

    def verdicts(name):
        found = ledger.entries({name: [stack]})
        return [e.verdict for e in found if e.claim.technique == "diffusers bf16 SDPA compile"]

    assert verdicts("h200") == ["reproduced"] and verdicts("cpu") == ["not run"]


def test_a_claim_of_several_gpus_is_over_one_eager_one():
    common = {"notebook": "11_parallel", "weights": "random", "gpus": 2, "speedup": 1.5}

    def ours(technique, settings, seconds):
        proof = {"alone_s": 5.0, "communication": 0.2}
        return row(**common, technique=technique, settings=settings, latency_p50=seconds, proof=proof)

    two = {"xdit_ulysses": 2, "xdit_ring": 1}
    rows = [
        ours("FSDP", {"fsdp": True}, 7.0),
        ours("xDiT", two, 2.4),
        ours("xDiT", two | {"compile": "blocks"}, 2.0),
        ours("xDiT", {"xdit_ulysses": 1, "xdit_ring": 2}, 4.0),
    ]
    found = {e.claim.technique: e for e in ledger.entries({"h200x2": rows}) if e.claim.gpus > 1}
    assert found["compile, ulysses 2"].ours == 2.5 and found["compile, ulysses 2"].verdict == "reproduced"
    ring = found["compile, ring 2"]
    assert ring.ours == 1.25 and ring.verdict == "not reproduced"
    assert "over one compiled GPU theirs is 1.65×, ours 1.50×, with 20% of a step's kernels" in ring.reason
    assert found["compile, ulysses 4"].reason == "no committed row of 11_parallel on h200x4 or h100x4"
    without = [e for e in ledger.entries({"h200x2": rows[1:], "h200": rows[1:]}) if e.claim.gpus > 1]
    assert {e.verdict for e in without} == {"not run"}
    slow = {"alone_s": 3.9, "communication": 0.1, "steps_ms": {"computed": 80.0}, "step_ms": {"attention": 40.0}}
    four = row(**common, technique="xDiT", settings={"xdit_ulysses": 4}, latency_p50=3.2, proof=slow)
    graph = row(
        **common, technique="context parallel", settings={"ulysses": 4, "cuda_graph": "blocks"}, latency_p50=1.6
    )
    both = {"h200x2": rows, "h200x4": [four, graph]}
    more = {e.claim.technique: e for e in ledger.entries(both) if e.claim.gpus == 4}
    found = more["compile, ulysses 4"]
    assert found.ours == 5.0 / 3.2 and found.setting.endswith("ulysses 4, over one eager GPU of h200x2")
    assert (
        "its kernels take 40 of a step's 80 ms: the GPU waits for its host; the study's own ulysses 4" in found.reason
    )
    assert found.reason.endswith("in a CUDA graph: 3.12×")


def test_a_configuration_of_several_gpus_has_a_name_of_its_own():
    assert ledger.configuration(Path("reports/single_gpu/h200")) == "h200"
    assert ledger.configuration(Path("reports/multi_gpu/2gpu/h200")) == "h200x2"


# --- progress.md ---


def test_progress_is_ticked_by_rows():
    nothing = progress.progress_md("cpu", [], [])
    assert "## Overall progress: 0%" in nothing and "[x]" not in nothing
    rows = [row(notebook="05_first_block_cache")] + [cached(t, 2.5, 30, 8.0) for t in (0.1, 0.2, 0.3)]
    some = progress.progress_md("cpu", rows, [])
    assert "- [x] First Block Cache 2× or more (2.50× with 8 of 28 steps)" in some
    assert "- [ ] TeaCache 1.3× or more" in some
    slow = progress.progress_md("cpu", [rows[0], cached(0.1, 1.9, 30, 8.0)], [])
    assert "- [ ] First Block Cache 2× or more" in slow


def test_progress_names_what_cannot_run():
    rows = [row(technique="TorchAO FP8 per row", status="unavailable", reason="needs a GPU")]
    text = progress.progress_md("cpu", rows, [])
    assert "- [ ] FP8 per row (can't run here: needs a GPU)" in text  # said, not ticked
    ran = progress.progress_md("cpu", [row(technique="TorchAO FP8 per row")], [])
    assert "- [x] FP8 per row (1 row)" in ran
    assert "- TorchAO FP8 per row: needs a GPU" in text


def test_progress_of_several_gpus_is_that_of_their_notebooks():
    common = {"notebook": "11_parallel", "weights": "random", "model": "flux-dev-random", "gpus": 4}
    refused = row(notebook="11_parallel", technique="xDiT", status="unavailable", reason="5 heads")
    rows = [row(**common, technique="context parallel", speedup=2.99), refused]
    text = progress.progress_md("h200x4", rows, [], several=True)
    assert "- [x] Context parallelism (1 row of 11_parallel)" in text and "TeaCache" not in text
    assert "- [ ] 1.75× or more on 2 GPUs, 3× or more on 4" in text and "5 heads" not in text
    decided = [{"decisions": "identical on all ranks"}, {"decisions": ["10", "11"]}]
    rows = [row(**common, technique="context parallel", speedup=3.0)]
    rows += [row(notebook="11_parallel", technique="parallel and cached", proof=decided[0])]
    text = progress.progress_md("h200x4", rows, [], several=True)
    assert "- [x] 1.75× or more on 2 GPUs, 3× or more on 4 and on 8 (3.00× on 4)" in text
    assert "- [ ] Parallel VAE" in text
    assert "- [x] Caches decide alike everywhere (under 1 cache)" in text
    rows += [row(notebook="11_parallel", technique="parallel and cached", proof=decided[1])]
    rows += [row(**common, technique="parallel stack", settings={"vae": ["parallel", "compiled"]})]
    assert "- [x] Parallel VAE (1 row of 11_parallel)" in progress.progress_md("h200x4", rows, [], several=True)
    assert "- [ ] Caches decide alike everywhere" in progress.progress_md("h200x4", rows, [], several=True)


# --- the front page, of what is committed ---


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The project's reports with the pages above them made again."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "reports", root / "reports", ignore=shutil.ignore_patterns("smoke"))
    site.write_site(root)
    return root


def test_committed_front_page_and_ledger_are_what_the_rows_say(committed):
    for found in site.configurations(committed):
        site.write_index(committed, found)
    for name in ("index.html", "ledger.html", "single_gpu/h200/index.html"):
        made = (committed / "reports" / name).read_text(encoding="utf-8")
        check_page(made, name)
        assert made == (ROOT / "reports" / name).read_text(encoding="utf-8"), f"{name} is old: run make render"


def test_the_front_page_links_to_what_is_there(committed):
    import re

    text = (committed / "reports/index.html").read_text(encoding="utf-8")
    linked = {h for h in re.findall(r'href="([^"#]+)"', text) if not h.startswith("data:")}
    assert "ledger.html" in linked and "single_gpu/cpu/index.html" in linked
    for href in linked:
        assert (committed / "reports" / href).is_file(), href


def test_rows_of_two_machines_are_not_mixed():
    old = [row(machine="a"), cached(0.2, 2.5, 30, 8.0, machine="a")]
    new = [row(machine="b", measured_at="2026-11-21T00:00:00+00:00")]
    assert ledger.latest(old + new) == [old[1], new[0]]  # another notebook is still that of the first machine


def test_of_a_stack_built_anew_the_rows_of_before_are_not_shown():
    stack = {"notebook": "13_final_stack", "weights": "random", "model": "flux-dev-random"}
    before = row(**stack, technique="VAE compiled", settings={"vae": "compiled"}, speedup=1.7)
    after = row(**stack, technique="VAE compiled", settings={"vae": "compiled", "fused_rope": True}, speedup=2.0)
    after["measured_at"] = "2026-11-21T00:00:00+00:00"
    others = [row(**stack), row(), row(technique="VAE compiled"), row(**stack, technique="VAE compiled", batch=4)]
    found = ledger.latest([before, after, *others])
    assert found == [after, *others]
    claim = "fp8dqrow + fuse_qkv + compile + compiled VAE"
    said = next(e for e in ledger.entries({"h200": found}) if e.claim.technique == claim and e.claim.gpu == "H100")
    assert (said.ours, said.verdict) == (2.0, "reproduced")


def run_again_here():
    """Whether the tables in this checkout aren't the committed ones: then the README's are older, and rightly so."""
    command = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "reports"]
    return subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.skipif(run_again_here(), reason="the reports were run again in this checkout")
def test_the_table_of_the_readme_is_what_the_rows_say(committed):
    shutil.copy(ROOT / "README.md", committed)
    before = (committed / "README.md").read_text(encoding="utf-8")
    assert site.write_readme(committed)
    assert (committed / "README.md").read_text(encoding="utf-8") == before, "the README's table is old: run make site"
    assert before.count("| h200 |") >= 2 and before.count("| cpu |") >= 2
    assert not site.write_readme(committed / "notebooks")  # no README, no marks


def test_a_stacks_name_leaves_no_technique_out(committed):
    details = {"dtype", "inputs", "predictor", "first_block", "warm_up", "compute_last"}  # of a technique that is said
    rows = [r for c in site.configurations(committed) for r in c.ok if r["notebook"] == "13_final_stack"]
    stacks = [r for r in rows if not r["technique"].startswith("ceiling")]
    assert {name for r in stacks for name in r["settings"]} - details <= set(site._SAID)


def test_of_several_gpus_the_soonest_image_is_said(tmp_path):
    stack = {
        "compile": "blocks",
        "fused_qkv": "single",
        "cuda_graph": "blocks",
        "gather": 2,
        "ulysses": 1,
        "pull": True,
    }
    common = {"notebook": "11_parallel", "technique": "context parallel", "weights": "random", "gpus": 2}
    rows = [
        row(**common, settings={"gather": 2, "ulysses": 1}, latency_p50=2.2, speedup=1.6),
        row(**common, settings=stack, latency_p50=2.0, speedup=1.8),
        row(**common | {"technique": "parallel stack"}, settings={}, latency_p50=0.8, speedup=1.4),
        row(**common | {"weights": "trained"}, settings={}, latency_p50=0.1, speedup=0.9),
    ]
    pages = [Page("11_parallel", "Parallel", "ok", {}, finding="two are faster than one.")]
    found = [site.Configuration("h200x2", tmp_path, {}, pages, rows)]
    (line,) = site.results_table(found).splitlines()[2:]
    assert line == (
        "| h200x2 | one image on 2 GPUs, over the same on one | compiled blocks, fused QKV of single blocks, "
        "CUDA graph of the blocks, keys and values of 2 GPUs gathered, by copy engines | 1.80× | 2.00 s "
        "| same arithmetic | – |"
    )
    assert site.headlines(found) == ["On h200x2: two are faster than one."]


def test_what_only_the_small_model_cannot_have_is_not_said_of_a_gpu(tmp_path):
    failed = {"status": "unavailable", "reason": "needs a number of ranks that divides 5 heads"}
    small = [row(technique="xDiT", **failed), row(technique="FSDP", **failed)]
    large = [row(weights="random", model="flux-dev-random", technique="TensorRT", **failed), row(weights="random")]
    said = [
        "\n".join(site.not_measured([site.Configuration("h200x4", tmp_path, {}, [], rows)]))
        for rows in (small, small + large)
    ]
    assert "can't run FSDP; xDiT:" in said[0] and "can't run TensorRT:" in said[1]


def test_smoke_tests_are_no_results(committed):
    shutil.copytree(committed / "reports/single_gpu/cpu", committed / "reports/single_gpu/smoke", dirs_exist_ok=True)
    assert [c.name for c in site.configurations(committed)].count("smoke") == 0
    shutil.rmtree(committed / "reports/single_gpu/smoke")


# --- analysis ---


def test_configurations_stand_beside_each_other_with_what_an_image_costs(committed):
    pages = analysis.write(committed, ["h200=3.6"])
    check_page(pages[-1].read_text(encoding="utf-8"), "analysis")
    frame = pd.read_csv(committed / "reports/analysis/summary.csv")
    assert {"cpu", "h200"} <= set(frame.configuration)
    own = frame[frame.configuration == "h200"].iloc[0]
    assert own["images per GPU hour"] == pytest.approx(3600 / own.p50)
    assert own["per 1,000 images"] == pytest.approx(1000 * own.p50 / 3600 * 3.6)
    assert frame[frame.configuration == "cpu"]["per 1,000 images"].isna().all()
    before = {path: path.read_bytes() for path in (committed / "reports/analysis/charts").glob("*.svg")}
    analysis.write(committed, ["h200=3.6"])
    assert before and all(path.read_bytes() == drawn for path, drawn in before.items())


def test_one_image_on_more_and_more_gpus(tmp_path):
    def divided(gpus, technique, seconds, **settings):
        proof = {"alone_s": 3.6, "communication": 0.2}
        facts = {"notebook": "11_parallel", "weights": "random", "gpus": gpus, "latency_p50": seconds, "proof": proof}
        own = {"technique": technique, "settings": settings, "images_per_s": gpus / seconds}
        return row(**facts, **own, speedup=3.6 / seconds)

    rows = [
        divided(2, "context parallel", 2.4, cuda_graph="blocks"),
        divided(2, "context parallel", 2.0, cuda_graph="blocks"),
        divided(2, "context parallel", 3.0),
        divided(2, "parallel stack", 1.5, cuda_graph="blocks"),
        divided(2, "parallel stack", 0.9, cuda_graph="blocks", mask="10"),
        divided(2, "parallel stack", 0.1, mask="10"),
        divided(2, "replicas", 3.6) | {"speedup": None},
    ]
    frame = analysis.scaling([site.Configuration("h200x2", tmp_path, {}, [], rows)]).set_index("series")
    assert list(frame.p50) == [2.0, 1.5, 0.9, 3.0] and list(frame.index) == list(analysis.SERIES)
    assert frame.loc["BF16", "efficiency"] == pytest.approx(0.9) and frame.loc["BF16", "replicas"] == 2 / 3.6
    assert analysis.scaling([]).empty
    assert analysis.scaling_sentence(frame.reset_index()) == (
        "An image of one h200 is there sooner on several, in BF16: **1.80×** on 2 (2 s). "
        "Quantizing it, too, gives another 1.33× on 2."
    )
    only = frame.reset_index().query("series == 'quantized'")
    assert analysis.scaling_sentence(only) == "No image was divided with its kernels recorded."
    drawn = charts.scaling(frame.reset_index())
    assert [t.get_text() for t in drawn.axes[0].get_legend().get_texts()] == ["nothing lost", *analysis.SERIES]
    other = pd.concat([frame.reset_index(), only.assign(kind="h100")])
    labels = [t.get_text() for t in charts.scaling(other).axes[0].get_legend().get_texts()]
    assert labels[1] == "h200: BF16" and labels[-1] == "h100: quantized"


@pytest.mark.parametrize("price", ["h200", "h200=cheap", "=3", "h200=-1", "h200=nan"])
def test_a_price_that_is_none(committed, price):
    with pytest.raises(UserError, match="write configuration=price"):
        analysis.write(committed, [price])


def test_a_price_for_what_was_not_measured(committed):
    with pytest.raises(UserError, match="A price for b300, which has no results: there are"):
        analysis.write(committed, ["b300=9"])


# --- clean-caches ---


def test_caches_are_listed_asked_for_and_results_stay(tmp_path, monkeypatch):
    hub, compiled = tmp_path / "hub", tmp_path / "build/torch-compile"
    for folder in (hub / "models--x", compiled, tmp_path / "reports"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 2048)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    assert {c.path: c.size for c in disk.found(tmp_path)} == {hub: 2048, compiled: 2048}
    said, asked = [], []

    def answer(question):
        asked.append(question)
        return "y" if "torch-compile" in question else ""

    assert disk.clean(tmp_path, answer, said.append) == [compiled]
    assert len(asked) == 2 and len(said) == 3 and "1 of 2 deleted" in said[-1]
    assert hub.is_dir() and not compiled.exists() and (tmp_path / "reports/file").is_file()


# --- the explorer ---


@pytest.fixture(scope="module")
def explored(tmp_path_factory, embedded_pipe):
    """A page of a real, small measurement: a baseline and three thresholds on two prompts."""
    root = tmp_path_factory.mktemp("explorer")
    shutil.copytree(ROOT / "params", root / "params")
    import dataclasses

    chosen = params.load("smoke", root / "params")
    small = {"prompts": ["a red apple on a white table", "a cat"], "rounds": 2, "warmup": 2, "steps": 6}
    chosen = dataclasses.replace(chosen, study=dataclasses.replace(chosen.study, **small))
    s = study.Study(chosen, "05_first_block_cache", root)
    subject = s.subject("embedded", "float32")
    subject._pipe = embedded_pipe
    s.compare(
        subject,
        study.plain(6),
        [*(study.using(first_block(t), 6) for t in (0.0, 0.1, 0.5)), study.fewer_steps(3)],
    )
    folder = root / chosen.report_dir
    page = site.write_explorer("smoke", folder, root / "build/smoke")
    return root, s, page


def test_the_explorer_holds_every_measured_setting_and_its_image(explored):
    root, s, page = explored
    rows = Results(page.parent / "results.csv").rows()
    data, figures = explorer.collect(rows, explorer.kept(s.images_dir))
    (case,) = data["cases"]
    assert case["name"] == "txt2img" and len(case["inputs"]) == 2
    methods = {m["name"]: m["points"] for m in case["methods"]}
    assert [p["label"] for p in methods["First Block Cache"]] == ["FBCache 0", "FBCache 0.1", "FBCache 0.5"]
    assert len(methods["fewer steps"]) == 1
    free, last = methods["First Block Cache"][0], methods["First Block Cache"][-1]
    assert free["images"][0]["psnr"] is None and free["images"][0]["mask"] == "111111"
    assert "0" in last["images"][0]["mask"] and len(last["images"][0]["indicator"]) == 6
    assert len(figures) == 2 * 5
    assert page.stat().st_size < 15e6


def test_an_explorer_without_images_is_not_made(tmp_path):
    assert site.write_explorer("smoke", tmp_path, tmp_path) is None
    assert explorer.explorer_html("smoke", [row()], [], []) is None


def test_an_explorer_of_one_setting_is_not_made(explored):
    _, s, page = explored
    rows, images = Results(page.parent / "results.csv").rows(), explorer.kept(s.images_dir)
    assert explorer.explorer_html("smoke", rows[:3], images, []) is not None
    assert explorer.explorer_html("smoke", rows[:2], images, []) is None


def test_rows_of_other_inputs_are_not_mixed(explored):
    _, s, page = explored
    rows = Results(page.parent / "results.csv").rows()
    changed = [{**r, "settings": {**r["settings"], "inputs": "other"}} for r in rows]
    assert explorer.collect(changed, explorer.kept(s.images_dir))[0]["cases"] == []


STATE = """(() => ({
  readout: document.getElementById("readout").textContent,
  image: document.getElementById("image").src.length + document.getElementById("image").src.slice(-99),
  trace: document.querySelectorAll("#trace rect.reused").length,
  chosen: document.querySelector("#frontier .point.chosen title").textContent,
  view: document.querySelector(".stage").dataset.view,
  hash: location.hash,
  grid: document.getElementById("grid").hidden,
}))()"""


async def key(tab, name, code):
    for kind in ("keyDown", "keyUp"):
        await tab.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


async def drag(tab, selector, share):
    """Presses the mouse on a slider at that share of its width."""
    box = json.loads(
        await tab.value(f"JSON.stringify(document.querySelector('{selector}').getBoundingClientRect().toJSON())")
    )
    x, y = box["x"] + 8 + share * (box["width"] - 16), box["y"] + box["height"] / 2
    for kind in ("mousePressed", "mouseReleased"):
        await tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.fixture(scope="module")
def driven(explored):
    """What the explorer showed after each thing that was done to it."""
    if BROWSER is None:
        pytest.skip("no browser")
    from tornado.websocket import websocket_connect

    async def run(address):
        tab, seen = Tab(await websocket_connect(address, max_message_size=2**28)), {}
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        await tab.open(explored[2].as_uri())
        seen["complaints"], seen["requests"] = tab.complaints(), tab.requests()
        seen["start"] = await tab.value(STATE)
        await tab.value("document.getElementById('setting').focus()")
        await key(tab, "ArrowRight", 39)
        seen["key"] = await tab.value(STATE)
        await drag(tab, "#setting", 0.0)
        seen["mouse"] = await tab.value(STATE)
        await tab.value("document.querySelector('#frontier circle:last-of-type').dispatchEvent(new Event('click'))")
        seen["frontier"] = await tab.value(STATE)
        for view in ("wipe", "blink", "difference"):
            await tab.value(f"document.querySelector('[value={view}]').click()")
            seen[view] = await tab.value(STATE)
        await tab.value("document.getElementById('input').value='1'")
        await tab.value("document.getElementById('input').dispatchEvent(new Event('change'))")
        seen["input"] = await tab.value(STATE)
        address_kept = seen["input"]["hash"]
        await tab.open("about:blank")
        await tab.open(explored[2].as_uri() + address_kept)
        seen["again"] = await tab.value(STATE)
        seen["late complaints"] = tab.complaints()
        return seen

    with browser() as address:
        return asyncio.run(run(address))


def test_the_explorer_starts_in_the_middle_and_needs_nothing(driven, explored):
    assert driven["complaints"] == [] and driven["late complaints"] == []
    assert {url.split("#")[0] for url in driven["requests"]} == {explored[2].as_uri()}
    start = driven["start"]
    assert start["readout"].startswith("FBCache 0.1: ") and " of 6 steps" in start["readout"] and start["grid"]


def test_the_keyboard_moves_the_slider_and_everything_follows(driven):
    before, after = driven["start"], driven["key"]
    assert after["readout"].startswith("FBCache 0.5: ") and " dB" in after["readout"]
    assert after["image"] != before["image"]
    assert after["trace"] > before["trace"]
    assert after["chosen"].startswith("FBCache 0.5") and after["hash"] != before["hash"]


def test_the_mouse_moves_the_slider(driven):
    assert driven["mouse"]["readout"].startswith("FBCache 0: ") and "identical" in driven["mouse"]["readout"]
    assert driven["mouse"]["trace"] == 0


def test_a_point_of_the_frontier_can_be_chosen(driven):
    assert "3 steps" in driven["frontier"]["readout"]


def test_views_and_prompts_change_and_the_address_keeps_them(driven):
    assert [driven[v]["view"] for v in ("wipe", "blink", "difference")] == ["wipe", "blink", "difference"]
    assert driven["input"]["image"] != driven["difference"]["image"]
    assert driven["again"] == driven["input"]


LEDGER_STATE = """(() => {
  const rows = [...document.querySelectorAll("#ledger tbody tr")].filter((r) => !r.hidden);
  return [rows.length, rows[0]?.cells[0].textContent, document.getElementById("shown").textContent];
})()"""


@in_a_browser
def test_the_ledger_filters_and_sorts(committed):
    from tornado.websocket import websocket_connect

    async def run(address):
        tab = Tab(await websocket_connect(address, max_message_size=2**28))
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        await tab.open((committed / "reports/ledger.html").as_uri())
        seen = [await tab.value(LEDGER_STATE)]
        await tab.value("document.querySelectorAll('button.sort')[2].click()")
        seen.append(await tab.value("document.querySelector('#ledger tbody tr').cells[2].textContent"))
        await tab.value("document.querySelectorAll('button.sort')[2].click()")
        seen.append(await tab.value("document.querySelector('#ledger tbody tr').cells[2].textContent"))
        await tab.value("document.querySelector('[value=\"not run\"]').click()")
        seen.append(await tab.value(LEDGER_STATE))
        await tab.value("find = document.getElementById('find'); find.value = 'nunchaku'")
        await tab.value("find.dispatchEvent(new Event('input', {bubbles: true}))")
        seen.append(await tab.value(LEDGER_STATE))
        return seen, tab.complaints()

    with browser() as address:
        (start, low, high, some, found), complaints = asyncio.run(run(address))
    assert complaints == []
    assert start[2] == f"{start[0]} of {start[0]} claims"
    assert low == "–" and high == "10.14×"
    assert some[0] < start[0] and 0 < found[0] < some[0]


# --- accessibility ---


@in_a_browser
@pytest.mark.parametrize("name", ["index.html", "ledger.html", "single_gpu/cpu/index.html", "explorer"])
def test_axe_finds_nothing_serious(committed, explored, name):
    """axe-core (Deque), which axe-core-python brings along, in the page; no network."""
    from tornado.websocket import websocket_connect

    axe = Path(importlib.util.find_spec("axe_core_python").origin).with_name("axe.min.js").read_text(encoding="utf-8")
    page = explored[2] if name == "explorer" else committed / "reports" / name

    async def run(address):
        tab = Tab(await websocket_connect(address, max_message_size=2**28))
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        await tab.open(page.as_uri())
        await tab.call("Runtime.evaluate", expression=axe)
        await tab.value("void axe.run().then((r) => { window.found = r; })")
        for _ in range(300):
            if await tab.value("Boolean(window.found)"):
                break
            await asyncio.sleep(0.1)
        return await tab.value(
            "window.found.violations.map((v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 120)])"
        )

    with browser() as address:
        found = asyncio.run(run(address))
    assert [v for v in found if v[0] in ("serious", "critical")] == []
