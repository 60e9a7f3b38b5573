"""What notebooks show: captions and alternative texts made from rows, and what is said where nothing was measured."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_charts import CACHE, FEWER, closed, row, rows  # noqa: F401  fixtures

from fluxnb import families
from fluxnb.errors import UserError
from fluxnb.findings.table import CACHE as COLUMNS
from fluxnb.findings.table import EARLIER, Column
from fluxnb.measure import quality, telemetry
from fluxnb.report import html, show
from fluxnb.technique import Unavailable
from fluxnb.world import scenes

PROMPTS = ("a red apple on a white table", "a cat")
JUDGED = ("a blue cube", "a dog")
LAST = ["baseline, where the setting is worst", "the setting's worst"]


@pytest.fixture
def said(monkeypatch):
    """The markup of all that was shown."""
    shown: list[str] = []
    monkeypatch.setattr(html, "_show", lambda markup, *_: shown.append(markup))
    return shown


def alt(markup):
    return re.search(r'alt="([^"]*)"', markup)[1]


def caption(markup):
    return re.search(r"<(?:figcaption|caption)>(.*?)</(?:figcaption|caption)>", markup, re.S)[1]


# --- charts and tables of rows ---


def test_a_caption_says_the_conditions_and_an_alternative_text_the_values(said, rows):  # noqa: F811
    show.frontier(rows)
    words = caption(said[0])
    for part in (
        "<code>embedded</code> (trained weights) at 128×128", "28 steps", "10 samples each", "16 images judged",
        "1 session", "95 % interval", "At the points: threshold (First Block Cache), steps (fewer", "top edge",
        "the worst of the judged images; dashes above them: the mean", "floors, 35 dB for near-lossless, 28 dB for",
    ):  # fmt: skip
        assert part in words
    assert "FBCache 0.05 1.40 times, worst 42.0 dB, mean 45.0 dB" in alt(
        said[0]
    ) and "FBCache 0 0.990 times, identical" in alt(said[0])
    assert f"{FEWER.name}: 3 steps 7.00 times, worst 20.0 dB, mean 23.0 dB; 10 steps" in alt(said[0])


def test_conditions_that_differ_are_ranges_and_old_rows_say_that_they_are(said, rows):  # noqa: F811
    mixed = [replace(rows[1], n=5, images=4, session=None), *rows[2:]]
    assert "5 to 10 samples each, 4 to 16 images judged, some from before sessions were noted" in show.about(mixed)
    assert show.about([replace(r, session=s) for r, s in zip(rows, "abcabcab", strict=True)]).endswith("3 sessions")
    assert "how many images were judged isn't noted" in show.about([replace(r, images=None) for r in rows])
    assert "28 steps, 1 sample each, 1 image judged" in show.about([replace(rows[0], n=1, images=1)])
    random = show.about([replace(rows[0], weights="random", ssim=None, model="big", width=1024, height=1024)])
    assert random == "`big` (random weights) at 1024×1024, 28 steps, 10 samples each, 1 session"


def test_what_was_not_measured_is_named_with_the_reason(said, rows):  # noqa: F811
    failed = replace(rows[3], status="oom", latency_p50=None, label="too large", reason="of memory")
    show.bars([*rows, failed])
    assert "Without too large (oom)." in caption(said[0]) and "too large" not in alt(said[0])
    show.bars([failed])
    assert "fx-not-measured" in said[1] and "too large: of memory" in said[1]
    for display in (show.frontier, show.stages, lambda r: show.waterfall(r, [])):
        display([failed])
    assert all("fx-not-measured" in markup for markup in said[2:]) and len(said) == 5


def test_bars_say_what_their_whiskers_are(said, rows):  # noqa: F811
    show.bars(rows)
    show.bars(rows, "speedup")
    show.bars([replace(r, samples=None) for r in rows])
    assert "slowest of its samples" in caption(said[0]) and "95 % interval of the speedup" in caption(said[1])
    assert "Whiskers" not in caption(said[2])
    show.bars([replace(r, n=3, baseline="b") for r in rows], "speedup")
    show.bars([replace(r, n=3) for r in rows], "speedup")
    assert "Whiskers: range of the speedup over so few rounds" in caption(said[3])
    assert "Whiskers" not in caption(said[4])  # an earlier row's ends cover less than they say
    assert "FBCache 0.5: 0.0800 s" in alt(said[0]) and "Seconds per image (median)" in alt(said[0])


def test_a_column_of_a_table_can_be_a_chart(said, rows):  # noqa: F811
    show.bars(rows, Column("per step", lambda r: 1e3 * r.latency_p50 / r.steps, "ms"))
    assert "Per step (ms)." in caption(said[0]) and "28 steps: 14.3 ms" in alt(said[0])


def test_grouped_bars_are_of_one_unit(said, rows):  # noqa: F811
    more = [replace(r, memory_load_gib=0.5) for r in rows]
    show.grouped(more, {"after load": "memory_load_gib", "peak": "memory_peak_gib"})
    assert "28 steps: after load 0.500 GiB, peak 1.00 GiB" in alt(said[0])
    with pytest.raises(ValueError, match="one axis has one unit"):
        show.grouped(rows, {"time": "latency_p50", "memory": "memory_peak_gib"})


def test_stages_add_up_and_are_named(said, rows):  # noqa: F811
    staged = [replace(r, text_s=0.1, denoise_s=1.0, vae_s=0.2) for r in rows[:2]]
    show.stages([*staged, rows[2]])
    assert "28 steps: text encoding 0.100 s, denoising 1.00 s, VAE decoding 0.200 s" in alt(said[0])
    assert "Without FBCache 0.05 (no such value)." in caption(said[0])


def test_a_waterfall_has_time_memory_and_quality(said, rows, monkeypatch):  # noqa: F811
    monkeypatch.setattr(show.findings, "quality_of_phases", lambda r, judged: [None, 30.0], raising=False)
    show.waterfall(rows[:2], rows)
    assert "28 steps 0.400 s, 1.00 GiB; FBCache 0 0.404 s, 1.00 GiB, 30.0 dB" in alt(said[0])
    assert "PSNR is of trained weights: <code>embedded</code>" in caption(said[0])


def test_a_table_says_the_conditions_and_where_rows_are_old(said, rows):  # noqa: F811
    show.table(rows, COLUMNS, "A note", "Every setting")
    assert caption(said[0]).startswith("<span>Every setting. <code>embedded</code> (trained weights)")
    assert "A note." in caption(said[0]) and "FBCache 0.05" in said[0]
    show.table([replace(r, session=None) for r in rows], COLUMNS)
    assert EARLIER in caption(said[1])
    show.table([], COLUMNS, title="Every setting")
    assert "fx-not-measured" in said[2] and "Every setting was not measured here." in said[2]


def test_a_configuration_without_a_model_of_full_size_says_so(said):
    assert not show.not_measured(["a subject"]) and not said
    assert show.not_measured([]) and show.not_measured([], "The full stack")
    assert "FLUX at its full size was not measured here" in said[0] and "<code>study.models</code>" in said[0]
    assert "The full stack was not measured here" in said[1]


# --- images and traces ---


@dataclass
class Kept:
    """A study that has some images."""

    pictures: dict

    def images(self, subject, candidate):
        found = self.pictures[candidate.meaning["label"]]
        if isinstance(found, Exception):
            raise found
        return found[: len(subject.inputs)]

    def traces(self, subject, candidate):
        self.images(subject, candidate)
        return [{"mask": "101", "indicator": [None, 0.1, 0.2], "threshold": 0.15, "reused_at": [None, "input", None]}]


def candidate(label, mark="", family=CACHE):
    return SimpleNamespace(steps=28, meaning={"label": label, "mark": mark or label, "family": family.name})


def picture(value):
    return Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8))


@pytest.fixture
def subject():
    """Judged on two prompts with two seeds; two others are shown with the first."""
    model = SimpleNamespace(name="embedded", weights="trained")
    about = {"model": model, "width": 32, "height": 32, "checked": False, "use_case": "txt2img", "kind": "edges"}
    inputs = [(prompt, seed) for seed in (3, 4) for prompt in JUDGED]
    shown = SimpleNamespace(prompts=PROMPTS, inputs=[(prompt, 3) for prompt in PROMPTS], **about)
    return SimpleNamespace(prompts=JUDGED, inputs=inputs, showing=shown, **about)


@pytest.fixture
def kept():
    grey = [picture(v) for v in (100, 110, 120, 130)]
    return Kept(
        {
            "28 steps": grey,
            "FBCache 0.05": grey,
            "FBCache 0.2": [picture(v) for v in (90, 90, 105, 90)],
            "broken": Unavailable("needs a GPU"),
        }
    )


BASE = candidate("28 steps", family=families.BASELINE)
SETTINGS = [candidate("FBCache 0.05", "0.05"), candidate("FBCache 0.2", "0.2")]


def heads(markup):
    return re.findall(r'<th scope="col">(.*?)</th>', markup)


def lines_of(markup):
    return re.findall(r'<th scope="row">(.*?)</th>', markup)


def test_a_grid_has_settings_with_their_speedups_over_what_they_are_nearest_to(said, subject, kept, rows):  # noqa: F811
    show.grid(kept, subject, BASE, SETTINGS, rows)
    assert heads(said[0]) == ["prompt \\ threshold", "baseline", "0.05 (1.40×)", "0.2 (2.50×)"]
    assert lines_of(said[0]) == [*PROMPTS, *LAST] and said[0].count(">identical<") == 2 and " dB" in said[0]
    assert "seed 3" in caption(said[0]) and "In the heads: speedup" in caption(said[0])
    assert (
        said[0].count("<img") == 6 + 2
        and said[0].count("all are identical") == 1
        and "ST-LPIPS 0." in said[0]
        and "FLIP 0." in said[0]
    )


def test_a_grid_says_what_it_is_of_and_what_is_in_no_mean(said, subject, kept, rows):  # noqa: F811
    show.grid(kept, subject, BASE, SETTINGS, rows)
    for part in (
        "<code>embedded</code> (trained weights)", "The prompts shown are to be looked at, and counted in no mean",
        "of the 4 that judge it", "1 session", "PSNR, ST-LPIPS and FLIP",
    ):  # fmt: skip
        assert part in caption(said[0])
    subject.showing.prompts = scenes.STUDY_PROMPTS[:2]
    show.grid(kept, subject, BASE, SETTINGS)
    assert "The prompts shown are the documents' own, and counted in no mean" in caption(said[1])
    subject.prompts = subject.showing.prompts
    show.grid(kept, subject, BASE, SETTINGS)
    assert "in no mean" not in caption(said[2])


def test_a_grid_ends_with_the_worst_image_that_was_judged(said, subject, kept):
    show.grid(kept, subject, BASE, SETTINGS[1:], by="setting")
    baseline, setting = re.findall(r"<tr><th scope=\"row\">.*?</tr>", said[0], re.S)
    assert baseline.count("<img") == 2 and setting.count("<img") == 4
    worst = quality.in_words(picture(130), picture(90))  # of 100 and 90, 110 and 90, 120 and 105, 130 and 90
    assert f"{JUDGED[1]}, seed 4" in setting and setting.rindex(worst) > setting.index(JUDGED[1])


def test_a_grid_can_be_turned_and_show_differences(said, subject, kept):
    show.grid(kept, subject, BASE, SETTINGS, by="setting", difference=True)
    assert heads(said[0]) == ["threshold \\ prompt", *PROMPTS, *LAST]
    assert lines_of(said[0]) == ["baseline", "0.05", "0.05: FLIP", "0.2", "0.2: FLIP"]
    assert "In the heads" not in caption(said[0]) and "FLIP: where a person would see" in caption(said[0])
    assert said[0].count("<img") == 2 + 2 + (4 + 3)  # of what is identical there are no heat maps


def test_settings_of_several_families_are_named_by_their_labels(said, subject, kept):
    kept.pictures["14 steps"] = kept.pictures["FBCache 0.2"]
    show.grid(kept, subject, BASE, [SETTINGS[0], candidate("14 steps", "14", FEWER)])
    assert heads(said[0]) == ["prompt \\ setting", "baseline", "FBCache 0.05", "14 steps"]


def test_a_grid_says_why_there_is_no_image(said, subject, kept, rows):  # noqa: F811
    failed = replace(rows[3], status="oom", reason="out of memory")
    show.grid(kept, subject, BASE, [candidate("broken"), SETTINGS[1]], [failed])
    assert said[0].count("unavailable: needs a GPU") == 2 and said[0].count("oom: out of memory") == 2


def test_images_that_a_replay_does_not_have_are_said_to_be_missing(said, subject, kept, monkeypatch, tmp_path):
    kept.pictures["28 steps"] = UserError("A replay makes no images.")
    with pytest.raises(UserError, match="A replay makes"):
        show.grid(kept, subject, BASE, SETTINGS)
    (tmp_path / "run.json").write_text('{"machine": {}}')
    monkeypatch.setenv(telemetry.REPLAY, str(tmp_path / "run.json"))
    show.grid(kept, subject, BASE, SETTINGS)
    show.steps(kept, subject, [BASE])
    show.fired(kept, subject, [BASE])
    assert len(said) == 3 and all("fx-not-measured" in markup and "A replay makes no" in markup for markup in said)


def test_a_use_case_shows_what_it_starts_from(said, subject, kept):
    given = SimpleNamespace(image=picture(1), mask=picture(2), condition=lambda kind: picture(3))
    subject.showing.use_case, subject.showing.material = "ControlNet inpainting", lambda prompt, seed: given
    show.grid(kept, subject, BASE, SETTINGS[:1])
    assert heads(said[0])[1:] == ["input", "mask", "edges", "baseline", "FBCache 0.05"]


def test_traces_are_shown_with_their_masks(said, subject, kept):
    show.steps(kept, subject, SETTINGS)
    show.fired(kept, subject, SETTINGS)
    for markup in said:
        assert "FBCache 0.05, steps 101; FBCache 0.2, steps 101 (1 computed, 0 reused)" in alt(markup)
        assert "seed 3, <code>a blue cube</code>" in caption(markup)
    assert "accumulated" not in caption(said[0])
    show.steps(kept, subject, [candidate("FBCache 0.05", family=families.TEACACHE)])
    assert "accumulated, rescaled change" in caption(said[2])


# --- other charts ---


def test_charts_of_other_figures_say_their_values(said):
    import pandas as pd

    show.shares({0.1: 0.5}, {0.1: 0.4}, "ours", "theirs")
    assert alt(said[0]) == "Share of the uncached run by threshold: 0.1: ours 50 %, published 40 %."
    show.curves(pd.DataFrame({"stage": ["vae"] * 2, "step": [1, 2], "loss": [2.0, 0.5]}), ["vae"], "Losses.")
    assert alt(said[1]) == "Curves of loss: vae from 2.00 to 0.500." and caption(said[1]) == "Losses."
    show.polynomial([0, 1], [0, 1], {"fitted": ([0, 1], [0, 1])}, "A fit.")
    assert alt(said[2]).endswith("at 2 steps, with fitted.")
    show.say("It is so.", "note")
    assert "fx-note" in said[3]
