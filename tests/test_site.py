"""The front page, the ledger, the progress files and the explorer: computed from rows, alike in a browser."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from measured import row
from test_browser import BROWSER, Tab, browser

from fluxnb import params, study
from fluxnb.cache import first_block
from fluxnb.report import disk, explorer, site
from fluxnb.report.render import Page, check_page
from fluxnb.study.results import Results

ROOT = Path(__file__).resolve().parents[1]
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")


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
