"""`make analysis`: configurations side by side, from their tables."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from measured import row, stacked

from fluxnb import notebooks, stacks
from fluxnb.errors import UserError
from fluxnb.report import analysis, charts
from fluxnb.report.audit import check_page
from fluxnb.report.configurations import Configuration, configurations, name_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The project's reports."""
    root = tmp_path_factory.mktemp("analysis")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "reports", root / "reports", ignore=shutil.ignore_patterns("smoke", "own", "analysis"))
    return root


def test_a_configuration_of_several_gpus_has_a_name_of_its_own():
    assert name_of(Path("reports/single_gpu/h200")) == "h200"
    assert name_of(Path("reports/multi_gpu/2gpu/h200")) == "h200x2"


def test_smoke_tests_and_a_users_own_runs_are_no_reference(committed, tmp_path):
    root, cpu = tmp_path, committed / "reports/single_gpu/cpu"
    shutil.copytree(committed / "notebooks", root / "notebooks")
    for name in ("single_gpu/cpu", "single_gpu/smoke", "single_gpu/a100", "own/single_gpu/a6000"):
        shutil.copytree(cpu, root / "reports" / name)
    assert [c.name for c in configurations(root)] == ["a100", "cpu"]  # the CPU last
    assert [c.name for c in configurations(root, own=True)] == ["a6000"]


def test_configurations_stand_beside_each_other_with_what_an_image_costs(committed):
    pages = analysis.write(committed, ["h200=3.6"])
    check_page(pages[-1].read_text(encoding="utf-8"), "analysis")
    frame = pd.read_csv(committed / "reports/analysis/summaries/summary.csv")
    assert {"cpu", "h200"} <= set(frame.configuration)
    own = frame[frame.configuration == "h200"].iloc[0]
    assert own["images per GPU hour"] == pytest.approx(3600 / own.p50)
    assert own.weights == "random" and set(frame[frame.configuration == "cpu"].weights) == {"trained"}
    assert frame[frame.configuration == "cpu"]["images per GPU hour"].isna().all()  # it has none
    assert not frame.technique.str.contains("text encoders compiled").any()  # which is no part of the stack any more
    page = pages[-1].read_text(encoding="utf-8")
    assert "random weights show time and memory only" in page and "prescribed there, not decided" in page
    assert own["per 1,000 images"] == pytest.approx(1000 * own.p50 / 3600 * 3.6)
    assert frame[frame.configuration == "cpu"]["per 1,000 images"].isna().all()
    before = {path: path.read_bytes() for path in (committed / "reports/analysis/charts").glob("*.svg")}
    analysis.write(committed, ["h200=3.6"])
    assert before and all(path.read_bytes() == drawn for path, drawn in before.items())


def test_of_a_gpu_only_what_it_made_at_full_size_is_compared(tmp_path):
    rows = [stacked(stacks.QUANTIZED), stacked(stacks.QUANTIZED, batch=4), row(notebook=notebooks.FINAL_STACK)]
    rows += [stacked(stacks.BF16_STACK, status="oom", latency_p50=None), row(), stacked("+ a part of earlier days")]
    rows += [stacked(None, family="baseline", label="28 steps"), stacked(None, label="cache, 12 of 28")]
    rows += [stacked(f"{stacks.SHORTLIST[0]}, cached", computed_steps=28 / 3)]
    frame = analysis.table([Configuration("h200", tmp_path, {}, [], rows)], {})
    assert list(frame.technique) == [stacks.QUANTIZED, "28 steps", rows[-1].label] and frame.computed[2] == "9.33 of 28"
    assert frame["images per GPU hour"].isna().all()
    small = analysis.table([Configuration("cpu", tmp_path, {}, [], [rows[2]])], {})
    assert list(small.model) == ["embedded"]


def test_phases_stand_apart_from_what_is_measured_by_itself_and_single_settings_are_sorted(tmp_path):
    phases = [stack.name for stack in stacks.phases("fp8 row", list(stacks.AROUND))][:3]
    alone = [stacked(name, speedup=x) for name, x in ((stacks.BF16_STACK, 1.4), (stacks.SHORTLIST[0], 1.9))]
    rows = [stacked(name, speedup=2.0 - i / 10) for i, name in enumerate(phases)] + alone
    frame = analysis.table([Configuration("h200", tmp_path, {}, [], rows)], {"h200": 3.6})
    assert list(frame.part) == [analysis.CUMULATIVE] * 3 + [analysis.ALONE] * 2
    assert list(frame["per 1,000 images"]) == pytest.approx([1000 * 0.4 / 3600 * 3.6] * 5)
    said = {part: analysis._panel(part, own)[1] for part, own in frame.groupby("part")}
    assert said[analysis.CUMULATIVE].index(phases[0]) < said[analysis.CUMULATIVE].index(phases[2])
    assert said[analysis.ALONE].index(" 1.90×") < said[analysis.ALONE].index(" 1.40×")  # the fastest first


def divided(stack, seconds, **changed):
    proof = {"alone_s": 3.6, "communication": 0.2}
    facts = {"gpus": 2, "latency_p50": seconds, "proof": proof, "images_per_s": 2 / seconds, "speedup": 3.6 / seconds}
    facts |= {"session": "one"}
    return stacked(stack, notebooks.PARALLEL, **facts | changed)


def test_one_image_on_more_and_more_gpus(tmp_path):
    rows = [
        divided(stacks.ULYSSES_RECORDED, 2.4),
        divided("pulled, everything", 2.0),
        divided(stacks.ULYSSES, 3.0),
        divided("pulled, quantized", 1.5),
        divided("pulled, quantized, cached", 0.9),
        divided("all-gather, quantized", 0.1),  # its kernels aren't recorded
        divided(stacks.XDIT_ULYSSES, 0.1),  # another's
        divided(stacks.REPLICAS, 3.6, speedup=None),
    ]
    folder = tmp_path / "2gpu" / "h200"
    frame = analysis.scaling([Configuration("h200x2", folder, {}, [], rows)]).set_index("series")
    assert list(frame.p50) == [2.0, 1.5, 0.9, 3.0] and list(frame.index) == list(analysis.SERIES)
    assert frame.loc["BF16", "efficiency"] == pytest.approx(0.9)
    assert frame.loc["BF16", "images/s of copies"] == 2 / 3.6
    assert pd.isna(frame.loc[analysis.FP8, "images/s of copies"])
    assert analysis.scaling([]).empty
    priced = analysis.scaling([Configuration("h200x2", folder, {}, [], rows)], {"h200x2": 3.6})
    assert priced["per 1,000 images"][0] == pytest.approx(1000 * 2.0 * 2 / 3600 * 3.6)  # of both GPUs
    assert analysis.scaling_sentence(frame.reset_index()) == (
        "An image of one h200 is there sooner on several, in BF16: **1.80×** on 2 (2 s, n = 3). "
        "Quantized, too, it is there sooner by another 1.33× on 2, in the same session. "
        "Of fewer than 10 rounds (n) that is no result yet."
    )
    slower = frame.reset_index().assign(p50=[2.0, 2.5, 0.9, 3.0])
    assert "Quantized, too, it is there no sooner on 2 (0.80×), in the same session." in analysis.scaling_sentence(
        slower
    )
    apart = frame.reset_index().assign(session=["a", "b", "c", "d"])
    assert "Quantized" not in analysis.scaling_sentence(apart)
    assert frame[["low", "high"]].isna().all(axis=None)  # of three rounds without their baseline's
    only = frame.reset_index().query("series == @analysis.FP8")
    assert analysis.scaling_sentence(only) == "No image was divided with its kernels recorded."
    drawn = charts.scaling(frame.reset_index())
    assert [t.get_text() for t in drawn.axes[0].get_legend().get_texts()] == ["nothing lost", *analysis.SERIES]
    other = pd.concat([frame.reset_index(), only.assign(kind="h100")])
    labels = [t.get_text() for t in charts.scaling(other).axes[0].get_legend().get_texts()]
    assert labels[1] == "h200: BF16" and labels[-1] == f"h100: {analysis.FP8}"


def test_every_series_is_of_stacks_that_there_are():
    known = {*stacks.WAYS, *stacks.DIVIDED, *(f"{name}, cached" for name in stacks.DIVIDED)}
    for names in analysis.SERIES.values():
        assert names and set(names) <= known


@pytest.mark.parametrize("price", ["h200", "h200=cheap", "=3", "h200=-1", "h200=nan"])
def test_a_price_that_is_none(committed, price):
    with pytest.raises(UserError, match="write configuration=price"):
        analysis.write(committed, [price])


def test_a_price_for_what_was_not_measured(committed):
    with pytest.raises(UserError, match="A price for b300, which has no results: there are"):
        analysis.write(committed, ["b300=9"])
