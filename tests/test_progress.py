"""progress.md: boxes are ticked by rows."""

from measured import cached, row, stacked

from fluxnb import families, notebooks, stacks
from fluxnb.report import progress

FP8 = {"family": families.QUANTIZATION.name, "technique": "TorchAO FP8 per row"}
FP8 |= {"settings": {"quantization": "torchao fp8 row"}, "notebook": notebooks.QUANTIZATION}
ANY_ROW = (
    notebooks.ENVIRONMENT, notebooks.NUMBER_FORMATS, notebooks.ATTENTION, notebooks.FIRST_BLOCK, notebooks.TEACACHE,
    notebooks.COMBINED, notebooks.VAE, notebooks.USE_CASES, notebooks.LOAD, notebooks.FINAL_STACK,
)  # fmt: skip


def test_progress_is_ticked_by_rows():
    nothing = progress.progress_md("cpu", [], [])
    assert "## Overall progress: 0%" in nothing and "[x]" not in nothing
    rows = [row(notebook=notebooks.FIRST_BLOCK)] + [cached(t, 2.5, 30, 8.0) for t in (0.1, 0.2, 0.3)]
    some = progress.progress_md("cpu", rows, [])
    assert "- [x] First Block Cache tested (3 rows of 05_first_block_cache)" in some
    assert "- [ ] TeaCache tested" in some


def test_a_pass_mark_of_the_plans_is_ticked_by_the_ledgers_rules():
    own = {"notebook": notebooks.FIRST_BLOCK, "gpu": "h100", "n": 10, "steps": 4, "width": 1024, "height": 1024}
    own |= {"model": "black-forest-labs/FLUX.1-schnell", "settings": {"dtype": "bfloat16"}}
    first = {"family": families.FIRST_BLOCK.name, "baseline": "b", "speedup": 2.5, "speedup_ci_low": 2.3}
    first |= {"settings": {"dtype": "bfloat16", "threshold": 0.3}, "label": "FBCache 0.3"}
    mark = "FBCache: ≥ 2.00× (FLUX.1-schnell, 4 steps, H100 80GB)"
    met = progress.progress_md("h100", [row(**own, id="b"), row(**own | first)], [])
    assert f"- [x] {mark} (2.50× [2.3" in met
    few = progress.progress_md("h100", [row(**own, id="b"), row(**own | first | {"n": 3})], [])
    assert f"- [ ] {mark} (undecided: n = 3" in few
    small = progress.progress_md("cpu", [row(notebook=notebooks.FIRST_BLOCK), cached(0.1, 2.5, 30, 8.0)], [])
    assert f"- [ ] {mark} (not run: it takes a row of FLUX.1-schnell, 4 steps" in small
    assert "TeaCache: ≥ 1.30×" in small and "- [x] FBCache: ≥ 2" not in small


def test_every_item_of_the_checklists_can_be_ticked():
    def of(notebook, family=families.BASELINE, **changed):
        return row(notebook=notebook, family=family.name, **changed)

    rows = [of(name) for name in ANY_ROW for _ in range(6)]
    rows += [cached(t, 2.5, 30, 8.0) for t in (0.1, 0.2, 0.3)]
    rows += [of(notebooks.TEACACHE, families.TEACACHE, speedup=1.5) for _ in range(3)]
    rows += [of(notebooks.COMBINED, families.COMBINED, speedup=3.5) for _ in range(10)]
    rows += [of(notebooks.QUANTIZED_CACHE, families.FIRST_BLOCK)]
    rows += [row(**FP8 | {"technique": name}) for name in ("a", "b", "c")]
    rows += [row(**FP8 | {"settings": {"quantization": "int8, 2:4 sparse"}, "batch": 4})]
    rows += [stacked(None, family=families.BASELINE.name, memory_load_gib=31.0)]
    rows += [stacked(stacks.QUANTIZED, memory_load_gib=20.0), of(notebooks.COMPILATION, families.COMPILATION)]
    text = progress.progress_md("h200", rows, [])
    assert "[ ]" not in text.split("### What the plans ask for")[0]
    assert "- [x] Several formats tested (4 formats in 04_quantization)" in text
    assert "- [x] Memory measured (20 GiB loaded, 31 before)" in text
    assert "- [x] Batch sizes tested (batches of 1, 4)" in text


def test_progress_names_what_cannot_run():
    rows = [row(**FP8, status="unavailable", reason="needs a GPU")]
    text = progress.progress_md("cpu", rows, [])
    assert "- [ ] FP8 per row (can't run here: needs a GPU)" in text  # said, not ticked
    ran = progress.progress_md("cpu", [row(**FP8)], [])
    assert "- [x] FP8 per row (1 row)" in ran
    assert "- TorchAO FP8 per row: needs a GPU" in text


def test_a_stack_that_cannot_run_is_called_by_its_name():
    failed = {"status": "oom", "reason": "too little memory"}
    rows = [stacked(stacks.BF16_STACK, technique="no search for hooks", **failed), row(technique="no search for hooks")]
    assert progress.cannot_run(rows) == {stacks.BF16_STACK: "too little memory"}
    assert progress.cannot_run([*rows, stacked(stacks.BF16_STACK)]) == {}


def test_progress_of_several_gpus_is_that_of_their_notebooks():
    xdit = {"family": families.PARALLEL.name, "technique": "xDiT", "stack": stacks.XDIT_RING}
    refused = row(notebook=notebooks.PARALLEL, **xdit, status="unavailable", reason="5 heads")
    rows = [stacked(stacks.ULYSSES, notebooks.PARALLEL, gpus=4, speedup=2.99), refused]
    text = progress.progress_md("h200x4", rows, [], several=True)
    assert "- [x] Context parallelism (1 row of 11_parallel)" in text and "TeaCache" not in text
    assert "5 heads" not in text and "What the plans ask for" not in text
    decided = [{"decisions": "identical on all ranks"}, {"decisions": ["10", "11"]}]
    rows = [stacked(stacks.ULYSSES_RECORDED, notebooks.PARALLEL, gpus=4, speedup=3.0)]
    rows += [row(notebook=notebooks.PARALLEL, proof=decided[0])]
    text = progress.progress_md("h200x4", rows, [], several=True)
    assert "- [ ] Parallel VAE" in text
    assert "- [x] Caches decide alike everywhere (under 1 cache)" in text
    rows += [row(notebook=notebooks.PARALLEL, proof=decided[1])]
    rows += [stacked("pulled, everything", notebooks.PARALLEL, gpus=4, settings={"vae": "parallel + compiled"})]
    text = progress.progress_md("h200x4", rows, [], several=True)
    assert "- [x] Parallel VAE (1 row of 11_parallel)" in text
    assert "- [ ] Caches decide alike everywhere" in text
