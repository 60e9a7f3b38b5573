"""explorer.html: what it is made of, from rows and kept images made here, and how it follows what is done to it."""

import asyncio
import base64
import importlib.util
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_browser import BROWSER, Tab, browser
from test_charts import row as chart_row

from fluxnb import families, notebooks, params, study
from fluxnb.cache import first_block
from fluxnb.models import embedded
from fluxnb.report import explorer, html, show
from fluxnb.study import kept

ROOT = Path(__file__).resolve().parents[1]

INPUTS = [("a red apple on a white table", 0), ("a cat", 0)]
STEPS = 6


def row(family, label, computed, speedup, steps=STEPS, **settings):
    made = chart_row(family, label, computed, speedup, 30.0, **settings)
    mark = label.rsplit(" ", 1)[-1]
    where = {"gpu": "smoke", "use_case": "txt2img", "batch": 1, "baseline": "base", "mark": mark}
    worst = {"psnr_min_db": 24.7, "adherence_min": 0.5, "st_lpips": 0.01, "st_lpips_max": 0.02}
    return replace(made, id=label.replace(" ", "-"), steps=steps, total_steps=steps, **where, **worst)


def keep(folder, row, values, mask=None):
    """Keeps one grey image for each input, with the trace of a mask."""
    images = [Image.fromarray(np.full((64, 64, 3), value, dtype=np.uint8)) for value in values]
    trace = mask and {"mask": mask, "indicator": [None] + [0.1 * i for i in range(1, STEPS)], "threshold": 0.2}
    kept.keep(folder, kept.key_of(row.as_dict(), row.code), row.label, INPUTS, images, [trace] * len(images))


BASE = replace(row(families.BASELINE, "6 steps", STEPS, 1.0), id="base", baseline=None)
CACHED = [
    row(families.FIRST_BLOCK, f"FBCache {t:g}", c, s, threshold=t)
    for t, c, s in ((0, 6, 1), (0.1, 4, 1.4), (0.5, 2, 2))
]
FEWER = row(families.FEWER_STEPS, "3 steps", 3, 1.9, steps=3)
WARM = row(families.FIRST_BLOCK, "FBCache 0.5, 2 steps computed", 3, 1.7, threshold=0.5, warm_up=2)
RULE = row(families.COMBINED, "TeaCache 0.1 then FBCache 0.1", 3, 1.6, rule="Cascade")
OTHER = row(families.QUANTIZATION, "INT8", 6, 1.1, quantization="torchao int8")
ROWS = [BASE, *CACHED, WARM, RULE, FEWER, OTHER]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What was kept: a value of grey for each row, the first threshold's like the baseline's."""
    folder = tmp_path_factory.mktemp("images")
    masks = {"FBCache 0": "111111", "FBCache 0.1": "110101", "FBCache 0.5": "100100"}
    for i, one in enumerate(ROWS):
        values = (100, 100) if one in (BASE, CACHED[0]) else (100 + i, 90 - i)
        keep(folder, one, values, masks.get(one.label))
    return kept.every(folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(explorer.explorer_html("smoke", [BASE, *CACHED, FEWER], images, []), encoding="utf-8")
    return path


def test_the_explorer_holds_every_measured_setting_and_its_image(images):
    data, figures = explorer.collect(ROWS, images)
    (case,) = data["cases"]
    assert case["name"] == "txt2img" and case["inputs"] == INPUTS
    methods = {m["name"]: m for m in case["methods"]}
    assert list(methods) == [
        "First Block Cache", "First Block Cache, other settings", "combined cache", "fewer steps", "quantization",
    ]  # fmt: skip
    points = methods["First Block Cache"]["points"]
    assert [p["mark"] for p in points] == ["0", "0.1", "0.5"] and [p["dial"] for p in points] == [0, 0.1, 0.5]
    assert [m["joined"] for m in methods.values()] == [True, False, False, True, False]
    free, last = points[0], points[-1]
    assert free["images"][0]["psnr"] is None and free["images"][0]["mask"] == "111111"
    assert free["images"][0]["flip"] == 0 < last["images"][0]["flip"] < 1
    assert last["images"][0]["heat"].startswith("data:image/webp") and len(last["images"][0]["heat"]) < 4000
    assert last["psnr"] == 24.7  # of the worst image, as floors are
    assert last["images"][0]["psnr"] > 20 and "0" in last["images"][0]["mask"]
    assert len(last["images"][0]["indicator"]) == STEPS and last["id"] == "FBCache-0.5"
    assert (
        len(figures) == 2 * (len(ROWS) - 1) + explorer.INPUTS_BESIDE
        and methods["quantization"]["points"][0]["label"] == "INT8"
    )
    assert "Cache(FirstBlock(0.5))" in last["how"] and "python -m fluxnb rows FBCache-0.5" in last["how"]
    assert "TorchAO('int8')" in methods["quantization"]["points"][0]["how"]
    assert {f["alt"] for f in figures} >= {"a cat, seed 0: baseline", "a cat, seed 0: FBCache 0.1"}


def test_a_setting_of_two_notebooks_is_one_point_and_the_newest_counts(images):
    again = replace(CACHED[1], notebook="07_combined_cache", id="again", host="another", speedup=1.5)
    (case,) = explorer.collect([*ROWS, again], images)[0]["cases"]
    assert [p["speedup"] for p in case["methods"][0]["points"]] == [1.0, 1.5, 2.0]


def test_several_models_are_cases_of_their_own(images, tmp_path):
    both = [BASE, *CACHED, *(replace(r, model="another", id=f"{r.id}, too") for r in (BASE, CACHED[1]))]
    both[-1] = replace(both[-1], baseline="base, too")
    for one in both[-2:]:
        keep(tmp_path, one, (1, 2))
    cases = explorer.collect(both, images + kept.every(tmp_path))[0]["cases"]
    assert [c["name"] for c in cases] == ["embedded, txt2img", "another, txt2img"]


def test_any_prompt_can_stand_in_the_page(tmp_path, monkeypatch):
    odd = [("<!--<script> </script> ]]> &amp; \u2028 'a\"", 0), ("a cat", 0)]
    monkeypatch.setitem(globals(), "INPUTS", odd)
    for one in (BASE, *CACHED):
        keep(tmp_path, one, (1, 2))
    page = explorer.explorer_html("smoke", [BASE, *CACHED], kept.every(tmp_path), [])
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert "<" not in data
    assert [tuple(i) for i in json.loads(data)["cases"][0]["inputs"]] == odd
    assert page.count("<!--") == 0


def test_an_explorer_without_images_is_not_made():
    assert explorer.explorer_html("smoke", [], [], []) is None
    assert explorer.explorer_html("smoke", ROWS, [], []) is None


def test_an_explorer_of_one_setting_is_not_made(images):
    assert explorer.explorer_html("smoke", [BASE, *CACHED[:2]], images, []) is not None
    assert explorer.explorer_html("smoke", [BASE, CACHED[0]], images, []) is None


def test_rows_of_other_inputs_or_of_another_baseline_are_not_mixed(images):
    changed = [replace(r, settings={**r.settings, "inputs": "other"}) for r in ROWS]
    assert explorer.collect(changed, images)[0]["cases"] == []
    lost = [replace(r, baseline="one that is gone") for r in ROWS]
    assert explorer.collect(lost, images)[0]["cases"] == []


def test_the_page_has_the_first_of_many_inputs_and_says_no_figure_that_earlier_rows_lack(tmp_path):
    many = [(f"{prompt}, {i}", 0) for i in range(4) for prompt, _ in INPUTS]
    few = [replace(r, images=None) for r in (BASE, *CACHED)]
    for one in few:
        images = [Image.fromarray(np.full((320, 320, 3), i, dtype=np.uint8)) for i in range(len(many))]
        kept.keep(tmp_path, kept.key_of(one.as_dict(), one.code), one.label, many, images, [None] * len(many))
    (case,), figures = (found := explorer.collect(few, kept.every(tmp_path)))[0]["cases"], found[1]
    assert case["inputs"] == many[: explorer.INPUTS] and len(figures) == 4 * explorer.INPUTS
    assert {f["size"] for f in figures} == {(256, 256)} and case["methods"][0]["points"][0]["quality"] == ""


def test_rows_that_were_not_timed_are_left_out(images):
    assert explorer.collect([BASE, replace(CACHED[1], speedup=None), replace(FEWER, status="error")], images) == (
        {"cases": [], "floors": {"near-lossless": 35.0, "balanced": 28.0}}, [],
    )  # fmt: skip


def test_what_a_study_kept_is_found_by_its_rows_and_can_be_shown(tmp_path, monkeypatch):
    root = tmp_path
    shutil.copytree(ROOT / "params", root / "params")
    chosen = params.load("smoke", root / "params")
    small = {"prompts": [prompt for prompt, _ in INPUTS], "seeds": [0], "rounds": 2, "warmup": 2, "steps": STEPS}
    s = study.Study(replace(chosen, study=replace(chosen.study, **small)), notebooks.FIRST_BLOCK, root)
    subject, plain = s.subject(embedded.NAME, "float32"), study.plain(STEPS)
    cached = [study.using(first_block(t), STEPS) for t in (0.0, 0.5)]
    rows = s.compare(subject, plain, [*cached, study.fewer_steps(3)])
    found = kept.every(s.images_dir)
    (case,) = explorer.collect(s.results.rows(), found)[0]["cases"]
    assert [(m["name"], [p["label"] for p in m["points"]]) for m in case["methods"]] == [
        ("First Block Cache", [c.meaning["label"] for c in cached]), ("fewer steps", ["3 steps"]),
    ]  # fmt: skip
    free, last = case["methods"][0]["points"]
    assert free["images"][0]["psnr"] is None and free["images"][0]["mask"] == "111111"
    assert "0" in last["images"][0]["mask"] and len(last["images"][0]["indicator"]) == STEPS
    assert explorer.explorer_html("smoke", rows, found, []).count("<img") > 2 * 4
    shown = []
    monkeypatch.setattr(html, "_show", lambda markup, *_: shown.append(markup))
    show.grid(s, subject, plain, cached, rows)
    show.steps(s, subject, cached)
    show.frontier(rows)
    assert (
        shown[0].count("<img") == 3 * len(subject.showing.prompts) + 2
        and "identical" in shown[0]
        and f"({rows[2].speedup:.2f}×)" in shown[0]
    )
    assert "1 session" in shown[2] and "2 images judged" in shown[2]


# --- in a browser ---

STATE = """(() => ({
  readout: document.getElementById("readout").textContent,
  labels: [...document.querySelectorAll("#labels li")].map((item) => item.textContent),
  own: document.getElementById("own").textContent,
  how: document.getElementById("how").textContent,
  legend: [...document.querySelectorAll("#legend button")].map((b) => b.textContent),
  every: [...document.querySelectorAll("#every button")].filter((b) => b.offsetParent).map((b) => b.textContent),
  gone: document.getElementById("gone").textContent,
  image: document.getElementById("image").src.length + document.getElementById("image").src.slice(-99),
  heat: document.getElementById("heat").src.slice(-99),
  apart: document.getElementById("apart").textContent,
  quality: document.getElementById("quality").textContent,
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


async def turn(tab, control, value, event):
    at = f"document.getElementById('{control}')"
    await tab.value(f"{at}.value = '{value}'")
    await tab.value(f"{at}.dispatchEvent(new Event('{event}'))")


AT_3_STEPS = "[...document.querySelectorAll('#frontier .point')].find((p) => p.textContent.startsWith('3 steps'))"


async def accessibility(tab, scheme="light"):
    """What axe-core (Deque), which axe-core-python brings along, finds in the page; no network."""
    axe = Path(importlib.util.find_spec("axe_core_python").origin).with_name("axe.min.js").read_text(encoding="utf-8")
    await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await tab.call("Runtime.evaluate", expression=axe)
    await tab.value("window.found = null; void axe.run().then((r) => { window.found = r; })")
    for _ in range(300):
        if await tab.value("Boolean(window.found)"):
            break
        await asyncio.sleep(0.1)
    return await tab.value("window.found.violations.map((v) => [v.impact, v.id, v.nodes[0].html.slice(0, 120)])")


@pytest.fixture(scope="module")
def driven(page):
    """What the explorer showed after each thing that was done to it."""
    if BROWSER is None:
        pytest.skip("no browser")
    from tornado.websocket import websocket_connect

    async def run(address):
        tab, seen = Tab(await websocket_connect(address, max_message_size=2**28)), {}
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        size = {"width": 1280, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
        await tab.call("Emulation.setDeviceMetricsOverride", **size)  # all that is pressed is in sight
        await tab.open(page.as_uri())
        seen["complaints"], seen["requests"] = tab.complaints(), tab.requests()
        seen["start"] = await tab.value(STATE)
        await tab.value("document.getElementById('setting').focus()")
        await key(tab, "ArrowRight", 39)
        seen["key"] = await tab.value(STATE)
        await drag(tab, "#setting", 0.0)
        for _ in range(50):
            if await tab.value("document.getElementById('setting').value === '0'"):
                break
            await asyncio.sleep(0.1)
        seen["mouse"] = await tab.value(STATE)
        await tab.value(f"{AT_3_STEPS}.dispatchEvent(new Event('click'))")
        seen["frontier"] = await tab.value(STATE)
        await tab.value("document.querySelector('#frontier [aria-checked=true]').focus()")
        await key(tab, "ArrowLeft", 37)
        seen["chart key"] = await tab.value(STATE)
        seen["focus"] = await tab.value("document.activeElement.getAttribute('aria-label')")
        await tab.value("document.querySelector('[value=grid]').click()")
        seen["every"] = await tab.value(STATE)
        await tab.value("document.querySelectorAll('#every button')[2].click()")
        seen["of every"] = await tab.value(STATE)
        await tab.value("document.querySelector('[value=beside]').click()")
        await tab.value("document.getElementById('swap').click()")
        await tab.value(f"{AT_3_STEPS}.dispatchEvent(new Event('click'))")
        await asyncio.sleep(0.5)
        seen["against"] = await tab.value(STATE)
        await tab.value(
            "HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href]; }"
        )
        await tab.value("document.getElementById('export').click()")
        for _ in range(50):
            if await tab.value("Boolean(window.saved)"):
                break
            await asyncio.sleep(0.1)
        seen["saved"] = await tab.value("window.saved")
        await turn(tab, "zoom", "4", "input")
        await tab.value("document.querySelector('.stage').focus()")
        await key(tab, "ArrowRight", 39)
        moved = "document.querySelector('.stage').style.getPropertyValue('--x')"
        seen["zoom"] = await tab.value(f"getComputedStyle(document.getElementById('image')).transform + {moved}")
        await turn(tab, "against", "", "change")
        for view in ("wipe", "blink"):
            await tab.value(f"document.querySelector('[value={view}]').click()")
            seen[view] = await tab.value(STATE)
        await turn(tab, "input", "1", "change")
        seen["input"] = await tab.value(STATE)
        address_kept = seen["input"]["hash"]
        await tab.open("about:blank")
        await tab.open(page.as_uri() + address_kept)
        seen["again"] = await tab.value(STATE)
        await tab.open("about:blank")
        await tab.open(page.as_uri() + "#row=gone&i=99&view=upside-down")
        seen["strange"] = await tab.value(STATE)
        await tab.open("about:blank")
        await tab.open(
            page.as_uri() + "#row=of-an-earlier-run&case=txt2img&set=3+steps&prompt=a+cat&seed=0&with=FBCache+0.1"
        )
        seen["measured anew"] = await tab.value(STATE)
        seen["dark axe"] = await accessibility(tab, "dark")
        seen["late complaints"] = tab.complaints()
        seen["axe"] = await accessibility(tab)
        return seen

    with browser() as address:
        return asyncio.run(run(address))


def test_the_explorer_starts_in_the_middle_and_needs_nothing(driven, page):
    assert driven["complaints"] == [] and driven["late complaints"] == []
    assert {url.split("#")[0] for url in driven["requests"]} == {page.as_uri()}
    start = driven["start"]
    assert start["readout"].startswith("FBCache 0.1: ") and " of 6 steps" in start["readout"] and start["grid"]
    assert start["labels"] == ["0", "0.1", "0.5"]


def test_the_keyboard_moves_the_slider_and_everything_follows(driven):
    before, after = driven["start"], driven["key"]
    assert after["readout"].startswith("FBCache 0.5: ") and " dB" in after["own"]
    assert after["image"] != before["image"]
    assert after["trace"] > before["trace"]
    assert after["chosen"].startswith("FBCache 0.5") and after["hash"].startswith(
        "#row=FBCache-0.5&case=txt2img&set=FBCache+0.5&prompt=a+red+apple"
    )


def test_the_heat_map_and_the_figures_of_all_images_follow_the_slider(driven):
    assert driven["key"]["heat"] != driven["start"]["heat"] != driven["mouse"]["heat"]
    assert driven["mouse"]["apart"].startswith("FLIP 0.000") and not driven["key"]["apart"].startswith("FLIP 0.000")
    assert driven["start"]["quality"] == (
        "All 16 images: PSNR mean 30.0 dB, worst 24.7 dB; ST-LPIPS mean 0.010, worst 0.020; "
        "adherence mean 95%, worst 50%"
    )


def test_the_mouse_moves_the_slider(driven):
    assert (
        driven["mouse"]["readout"].startswith("FBCache 0: ")
        and driven["mouse"]["own"] == "This image against the baseline: identical"
    )
    assert driven["mouse"]["trace"] == 0


def test_a_point_of_the_frontier_can_be_chosen(driven):
    assert driven["frontier"]["readout"].startswith("3 steps") and driven["frontier"]["chosen"].startswith("3 steps")


def test_views_and_prompts_change_and_the_address_keeps_them(driven):
    assert [driven[v]["view"] for v in ("wipe", "blink")] == ["wipe", "blink"]
    assert driven["input"]["image"] != driven["blink"]["image"]
    assert driven["again"] == driven["input"]


def test_an_address_of_a_row_that_is_gone_shows_the_beginning_and_says_so(driven):
    assert driven["strange"]["readout"].startswith("FBCache 0.1: ") and driven["strange"]["view"] == "beside"
    assert driven["strange"]["gone"] == "Row gone isn't among the settings of this page any more: here is another."


def test_an_address_outlives_its_row_where_the_setting_was_measured_anew(driven):
    anew = driven["measured anew"]
    assert anew["readout"].startswith("3 steps: ") and anew["gone"] == "" and "&prompt=a+cat&" in anew["hash"]
    assert "between both" in anew["apart"] or anew["apart"] == ""


def test_the_chart_has_a_legend_and_answers_to_the_keyboard(driven):
    assert driven["start"]["legend"] == ["First Block Cache", "fewer steps"]
    assert driven["chart key"]["readout"].startswith("FBCache 0.1: ")  # the next slower
    assert driven["focus"].startswith("FBCache 0.1: ")


def test_all_settings_of_a_method_are_seen_at_once_and_one_is_chosen_there(driven):
    assert [words.split(":")[0] for words in driven["every"]["every"]] == [
        "baseline", "FBCache 0", "FBCache 0.1", "FBCache 0.5",
    ]  # fmt: skip
    assert " dB" in driven["every"]["every"][3] and "×" in driven["every"]["every"][3]
    assert driven["of every"]["readout"].startswith("FBCache 0.1: ") and driven["start"]["every"] == []


def test_any_two_settings_are_compared(driven):
    against = driven["against"]
    assert "with=FBCache+0.1" in against["hash"] and against["readout"].startswith("3 steps: ")
    assert " dB between both" in against["apart"] and against["heat"] != driven["frontier"]["heat"]


def test_what_is_seen_is_saved_as_a_picture(driven):
    name, address = driven["saved"]
    assert name == "3-steps.png"
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 5


def test_images_are_enlarged_and_moved_by_the_keyboard(driven):
    assert driven["zoom"].startswith("matrix(4") and driven["zoom"].endswith("60%")


def test_the_page_says_how_to_make_a_setting(driven):
    assert "Cache(FirstBlock(0.5))" in driven["key"]["how"] and "fluxnb rows FBCache-0.5" in driven["key"]["how"]
    assert "num_inference_steps=3" in driven["frontier"]["how"]


def test_axe_finds_nothing_serious_in_the_explorer(driven):
    for scheme in ("axe", "dark axe"):
        assert [v for v in driven[scheme] if v[0] in ("serious", "critical")] == []


# --- a page carries its images on ---


def test_a_page_is_made_again_without_the_kept_images_and_new_rows_join_it(images, page):
    rows = [BASE, *CACHED, FEWER]
    before = explorer.earlier([page.read_text(encoding="utf-8")], rows)
    again = explorer.explorer_html("smoke", rows, [], [], before)
    assert again == page.read_text(encoding="utf-8")
    anew = replace(CACHED[1], id="anew", host="another", speedup=1.5)
    (case,) = explorer.collect([*rows, anew], [], before)[0]["cases"]
    assert [p["id"] for p in case["methods"][0]["points"]] == ["FBCache-0", "anew", "FBCache-0.5"]
    joined = explorer.collect([*rows, RULE], [k for k in images if k.label in ("6 steps", RULE.label)], before)[0]
    assert "combined cache" in [m["name"] for m in joined["cases"][0]["methods"]]


def test_a_page_whose_rows_are_gone_or_that_is_none_carries_nothing(page):
    assert explorer.earlier([page.read_text(encoding="utf-8"), "<p>", ""], []).images == {}


def test_a_page_has_as_few_prompts_as_fit(images, monkeypatch):
    monkeypatch.setattr(explorer, "ROOM", 1)
    text = explorer.explorer_html("smoke", ROWS, images, [])
    assert text.count("<h3>") == 1
