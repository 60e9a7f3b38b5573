"""The front page, the ledger and the README's table: computed from rows, and read in a browser."""

import asyncio
import importlib.util
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import test_recommend
from measured import cached, row, stacked
from test_browser import BROWSER, Tab, browser, drive, press

from fluxnb import families, notebooks, stacks
from fluxnb.findings import documents
from fluxnb.findings.ledger import latest
from fluxnb.findings.recommend import GOALS, choices, references
from fluxnb.findings.rows import unlike_itself, worst_db
from fluxnb.report import disk, front, publish, readme, unrun
from fluxnb.report.audit import check_page
from fluxnb.report.configurations import Configuration, configurations
from fluxnb.report.pages import Page

ROOT = Path(__file__).resolve().parents[1]
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")


def configuration(name, rows, *pages):
    return Configuration(name, Path(f"/reports/single_gpu/{name}"), {}, list(pages), rows)


# --- of what is committed ---


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The project's reports with the pages above them made again."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "reports", root / "reports", ignore=shutil.ignore_patterns("smoke", "own"))
    shutil.copy(ROOT / "README.md", root)
    shutil.copytree(ROOT / "params", root / "params")
    publish.site(root)
    return root


def test_committed_front_page_and_ledger_are_what_the_rows_say(committed):
    pages = "index.html ledger.html single_gpu/h200/index.html".split()
    pages += [f"single_gpu/{gpu}/explorer.html" for gpu in ("cpu", "h100")]
    for name in pages:
        made = (committed / "reports" / name).read_text(encoding="utf-8")
        check_page(made, name)
        assert made == (ROOT / "reports" / name).read_text(encoding="utf-8"), f"{name} is old: run make site"


def test_every_committed_speedup_follows_from_committed_rounds():
    def between(ratios):  # the narrowest order statistics that hold the median with 95 %, counted anew
        n, ordered = len(ratios), sorted(ratios)
        held = [k for k in range(n // 2) if sum(math.comb(n, i) for i in range(k + 1, n - k)) >= 0.95 * 2**n]
        return statistics.median(ordered), ordered[max(held, default=0)], ordered[-1 - max(held, default=0)]

    seen = 0
    for c in configurations(ROOT):
        by_id = {r.id: r for r in c.ok}
        for r in (r for r in latest(c.ok) if r.session and r.speedup is not None):
            base = r if r.again else by_id[r.baseline]
            ratios = [b / s for b, s in zip(base.samples, r.again or r.samples, strict=True)]
            assert (r.speedup, r.speedup_ci_low, r.speedup_ci_high) == pytest.approx(between(ratios)), (c.name, r.id)
            assert (base.session, base.model, base.host) == (r.session, r.model, r.host)
            assert r.latency_p50 == pytest.approx(statistics.median(r.samples))
            seen += 1
    assert seen > 200


def test_committed_recommendations_keep_their_floors_and_floors_refuse_something():
    every = {c.name: c for c in configurations(ROOT)}
    for c in every.values():
        for choice in (choice for base in references(c.rows) for choice in choices(c.rows, base)):
            assert choice.seen is None or worst_db(choice.seen) >= choice.goal.floor_db, (c.name, choice.goal)
            assert choice.row.n >= 10 and choice.row.commit == choice.base.commit and "+" not in choice.row.commit
            base = choice.base
            assert not unlike_itself(base) and (choice.row.id == base.id or not unlike_itself(choice.row, base))
    judged = [r for r in latest(every["cpu"].ok) if r.images and r.psnr_min_db is not None]
    for floor in sorted({goal.floor_db for goal in GOALS}):
        below = [r for r in judged if r.psnr_min_db < floor]
        assert below and len(below) < len(judged), floor


def test_the_front_page_links_to_what_is_there(committed):
    text = (committed / "reports/index.html").read_text(encoding="utf-8")
    linked = {h for h in re.findall(r'href="([^"#]+)"', text) if not h.startswith("data:")}
    assert "ledger.html" in linked and "single_gpu/cpu/index.html" in linked
    for href in linked:
        assert (committed / "reports" / href).is_file(), href


def test_the_table_of_the_readme_is_what_the_rows_say(committed):
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (committed / "README.md").read_text(encoding="utf-8") == before, "the README's table is old: run make site"
    assert "| h200 |" in before and "| cpu |" in before
    assert not readme.write(committed / "notebooks")  # no README, no marks


def test_what_was_not_run_has_a_page_that_says_so_and_the_command(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    ran = tmp_path / "reports/single_gpu/h100"
    ran.mkdir(parents=True)
    (ran / "results.csv").write_text("id\n")
    made = {str(path.parent.relative_to(tmp_path / "reports")): path for path in unrun.write(tmp_path)}
    assert {"single_gpu/a100", "single_gpu/a6000", "multi_gpu/2gpu/h100", "multi_gpu/8gpu/a100"} <= set(made)
    assert not {"single_gpu/h100", "single_gpu/smoke", "single_gpu/base"} & set(made)
    text = made["multi_gpu/4gpu/h100"].read_text(encoding="utf-8")
    assert "make report GPU=h100x4" in text and "no machine with so many H100s" in text
    assert 'href="../../../index.html"' in text and "no rows of it yet" in made["multi_gpu/2gpu/h100"].read_text()


def test_the_tree_of_results_is_the_one_that_the_plan_draws(committed):
    drawn = {line.by for line in documents.lines() if line.part == "Results storage"}
    assert len(drawn) == 7 and all((ROOT / folder).is_dir() and any((ROOT / folder).iterdir()) for folder in drawn)
    made = {path.name for path in (committed / "reports/analysis/summaries").iterdir()}
    assert {"summary.csv", "documents.csv", "documents.html"} <= made
    for name in ("documents.csv", "documents.html"):
        both = [(root / "reports/analysis/summaries" / name).read_text(encoding="utf-8") for root in (committed, ROOT)]
        assert both[0] == both[1], f"{name} is old: run make site"


def test_the_marks_of_schnell_stand_in_the_readme(committed):
    text = (committed / "README.md").read_text(encoding="utf-8").split(readme.MARKS["schnell"][0])[1]
    assert "| FBCache: ≥ 2.00× | plan 1 |" in text and "| FBCache + TeaCache: ≥ 3.00× | plan 1 |" in text


def test_every_row_of_the_final_stack_has_a_label_of_its_own(committed):
    for c in configurations(committed):
        timed_again = (families.CEILING.name, families.BASELINE.name)  # a baseline with every group
        rows = [r for r in c.ok if r.notebook == notebooks.FINAL_STACK and r.family not in timed_again]
        places = [(r.model, r.use_case, r.width, r.height, r.steps, r.batch, r.label) for r in rows]
        assert all(r.label for r in rows) and len(set(places)) == len(places), c.name


# --- of rows made up here ---


def divided(n):
    """Images over two GPUs at full size, as many rounds each, and one of the small model."""
    pulled, common = stacks.recorded(quantized=False)[-1], {"notebook": notebooks.PARALLEL, "gpus": 2, "n": n}
    return [
        stacked(stacks.ULYSSES, **common, latency_p50=2.2, speedup=1.6),
        stacked(pulled, **common | {"label": "pulled, recorded", "id": "abc"}, latency_p50=2.0, speedup=1.8),
        stacked(stacks.recorded(quantized=True)[-1], **common, latency_p50=0.8, speedup=1.4),
        stacked(pulled, **common | {"weights": "trained"}, latency_p50=0.1, speedup=0.9),
    ]


def test_of_several_gpus_the_soonest_image_is_said():
    found = [configuration("h200x2", divided(10), Page(notebooks.PARALLEL, "Parallel", "ok", {}))]
    (line,) = readme.results_table(found, Path("/")).splitlines()[2:]
    sure = "1.80× (95 % interval [0.90, 1.10], n = 10)"
    goal = "one image on 2 GPUs, over the same on one"
    assert line == f"| h200x2 | {goal} | pulled, recorded | {sure} | 2 s | 0.1 GiB | – | `abc` |"
    (said,) = front.headlines(found)
    assert said.startswith("On h200x2: one image on 2 GPUs with pulled, recorded: **1.80×** the same on one of them")


@pytest.mark.parametrize("n", [3, 6])
def test_few_rounds_are_no_headline(n):
    several = configuration("h200x2", divided(n), Page(notebooks.PARALLEL, "Parallel", "ok", {}))
    rows = [row(notebook=notebooks.FINAL_STACK, n=n), stacked(stacks.BF16_STACK, n=n, speedup=1.4)]
    one = configuration("h200", rows, Page(notebooks.FINAL_STACK, "The final stack", "ok", {}))
    assert front.headlines([several, one]) == []
    lines = readme.results_table([several, one], Path("/")).splitlines()[2:]
    said = f"no headline: n = {n}, and 10 rounds in one session are needed"
    for line, name, page in zip(lines, ("h200x2", "h200"), (notebooks.PARALLEL, notebooks.FINAL_STACK), strict=True):
        where = f"reports/single_gpu/{name}/{page}.html"
        assert line.startswith(f"| {name} | {said} | [what was measured]({where}) |")
    (block,) = front.front(Path("/reports"), [one])["configurations"][0]["blocks"]
    assert f"No headline: n = {n}" in block and f'href="single_gpu/h200/{notebooks.FINAL_STACK}.html"' in block


def test_what_to_choose_stands_on_the_front_page_and_in_the_readme():
    page = Page(notebooks.FINAL_STACK, "The final stack", "ok", {})
    c = configuration("h200", [*test_recommend.TIMED, *test_recommend.SEEN], page)
    (said,) = front.headlines([c])
    assert "near-lossless (35 dB), balanced (28 dB): lean, cached, **3.30×** (95 % interval" in said
    table = readme.results_table([c], Path("/"))
    assert len(table.splitlines()) == 2 + 6 + 2 and "39.9 dB, ST-LPIPS 0.02 (of 24)" in table
    assert table.endswith("a stand-in whose order of methods is a hypothesis about FLUX.")
    (block, *_) = front.front(Path("/reports"), [c])["configurations"][0]["blocks"]
    assert "What to choose on h200, by goal: time and memory are of random weights" in block


def test_speed_stands_against_quality_where_all_caches_were_compared():
    settings = ((0.1, 1.8, 45.0), (0.3, 2.6, 30.0))
    caches = [cached(t, s, p, 9, notebook=notebooks.COMBINED, psnr_min_db=p - 4) for t, s, p in settings]
    fewer = {"family": families.FEWER_STEPS.name, "label": "12 steps", "psnr_db": 28.0, "psnr_min_db": 9.0}
    fewer = row(steps=12, speedup=2.2, **fewer)
    c = configuration("cpu", [row(), *caches, fewer])
    assert "FBCache 0.3 2.60 times, worst 26.0 dB, mean 30.0 dB" in front.frontier(c)
    assert "12 steps 2.20 times, worst 9.00 dB, mean 28.0 dB" in front.frontier(c)
    assert front.frontier(configuration("cpu", [row()])) is None


def test_what_only_the_small_model_cannot_have_is_not_said_of_a_gpu():
    failed = {"status": "unavailable", "reason": "needs a number of ranks that divides 5 heads", "stack": None}
    one, other = ({"family": families.PARALLEL.name, "technique": name, **failed} for name in ("xDiT", "FSDP"))
    small = [row(**one), row(**other)]
    at_full = {"weights": "random", "model": "flux-dev-random"}
    large = [row(**at_full, **one | {"technique": "TensorRT"}), row(**at_full)]
    kernel = row(**one | {"technique": "a kernel by itself", "model": None})
    said = [
        "\n".join(front.not_measured([configuration("h200x4", rows)])) for rows in ([*small, kernel], small + large)
    ]
    several = configuration("h200x4", large)
    several.pages = [Page(n, f"{n}: what?", "missing", problem="not run yet") for n in ("One", "Two")]
    assert "h200x4, not run yet: One, Two." in front.not_measured([several])  # not a line each
    assert "can't run FSDP; xDiT:" in said[0] and "can't run TensorRT:" in said[1]


def test_a_users_own_front_page_has_the_reference_beside_it():
    values = front.front(Path("/reports/own"), [], [configuration("cpu", [row()])])
    (theirs,) = values["reference"]
    assert (theirs["name"], theirs["href"], theirs["rows"]) == ("cpu", "../single_gpu/cpu/index.html", 1)
    assert values["ledger"] == "../ledger.html" and values["configurations"] == []


# --- clean-caches ---


def test_caches_are_listed_asked_for_and_results_stay(tmp_path, monkeypatch):
    root, hub, compiled = tmp_path / "project", tmp_path / "hub", tmp_path / "torch-compile"
    for folder in (hub / "models--x", compiled, root / "reports", root / "build/torch-compile"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 2048)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    assert {c.path: c.size for c in disk.found(root)} == {hub: 2048, compiled: 2048}
    said, asked = [], []

    def answer(question):
        asked.append(question)
        return "y" if "torch-compile" in question else ""

    assert disk.clean(root, answer, said.append) == [compiled]
    assert len(asked) == 2 and len(said) == 3 and "1 of 2 deleted" in said[-1]
    assert hub.is_dir() and not compiled.exists() and (root / "reports/file").is_file()


@pytest.mark.parametrize("place", ["project", "project/reports", "project/build/torch-compile", ".", "home", "linked"])
def test_no_folder_of_the_project_and_none_around_it_is_a_cache(tmp_path, monkeypatch, place):
    for folder in ("project/reports", "project/build/torch-compile", "home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "project", target_is_directory=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / place))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "linked" / place))
    assert disk.found(tmp_path / "project") == []


# --- in a browser ---


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
        await tab.value("find = document.getElementById('find'); find.value = 'teacache'")
        await tab.value("find.dispatchEvent(new Event('input', {bubbles: true}))")
        seen.append(await tab.value(LEDGER_STATE))
        return seen, tab.complaints()

    with browser() as address:
        (start, low, high, some, found), complaints = asyncio.run(run(address))
    assert complaints == []
    assert start[2] == f"{start[0]} of {start[0]} claims"
    assert not low[0].isdigit() and high.startswith("10.14×")  # what is said in words comes first
    assert some[0] < start[0] and 0 < found[0] < some[0]


ASKED = {  # a question -> how its first answer begins
    "what for an H100, lossless?": "H100, lossless",
    "what does FBCache 0.12 cost?": "FBCache 0.12 on ",
    "does TeaCache's 1.3× hold?": "TeaCache: ≥ 1.30×: ",
    "how do I run it on my weights?": "On your own weights",
    "is FP8 worth it on two GPUs?": "torchao fp8 row on 2 GPUs",
    "what is ST-LPIPS": "ST-LPIPS: ",
    "what is a gate": "gate: ",
    "what are predictors?": "predictor: ",
    "ꟻLIP": "ꟻLIP: ",
    "what is First Block Cache": "First Block Cache: ",
    "modulation ahead": "modulation ahead: ",
    "schnell": "embedded-schnell: ",
    "LoRA": "LoRA: ",
}


@in_a_browser
def test_the_front_page_fits_answers_in_place_and_asks_nobody(committed):
    page, seen = committed / "reports/index.html", {}

    async def steps(tab):
        for width, height in ((1440, 900), (1280, 800), (390, 844)):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            await tab.open(page.as_uri())
            root = "document.documentElement"
            seen[width] = await tab.value(f"[{root}.scrollWidth - {root}.clientWidth, {root}.scrollHeight / {height}]")
        assert all(url.startswith("file:") for url in tab.requests()) and tab.complaints() == []
        shown = "[...document.querySelectorAll('.goal')].filter((p) => p.offsetHeight).map((p) => p.id)"
        first = await tab.value(shown)
        await tab.value("location.hash = '#cpu-balanced'")
        second = await tab.value(shown)
        await tab.value("document.querySelector('#cpu .option + details a[data-option]').click()")
        option = await tab.value("document.querySelectorAll('#cpu .option.chosen pre').length")
        found = []
        for asked in ASKED:
            await tab.value(f"document.getElementById('ask').value = {json.dumps(asked)}; search()")
            found.append(await tab.value("document.getElementById('found').firstElementChild?.textContent ?? ''"))
        await tab.call("Emulation.setScriptExecutionDisabled", value=True)
        await tab.open(page.as_uri())
        return first, second, option, found, await tab.value("document.querySelector('.goal.first').offsetHeight")

    first, second, option, found, _ = drive(steps)
    assert all(over == 0 for over, _ in seen.values()), seen
    assert seen[1440][1] <= 3 and seen[390][1] <= 5, seen
    assert len(first) == 1 and second == ["cpu-balanced"] and option == 1
    for (asked, begins), answer in zip(ASKED.items(), found, strict=True):
        assert answer.strip().startswith(begins), (asked, answer[:80])


AT_A_ROW = """(() => {
  const row = document.querySelector(":target"), other = row && [...row.parentElement.rows].find((r) => r !== row);
  const { top, bottom } = row?.getBoundingClientRect() ?? {};
  const ground = (r) => getComputedStyle(r.cells[r.cells.length - 1]).backgroundColor;
  return row && [top >= 0 && bottom <= innerHeight && row.checkVisibility(), ground(row) !== ground(other)];
})()"""


@in_a_browser
def test_what_leads_to_a_row_scrolls_to_its_line_and_marks_it(committed):
    """From the front page's answer, its switches, what was asked and the ledger; also into a part that is closed."""
    reports, asked = committed / "reports", "what does FBCache 0.12 cost?"
    starts = [
        ("index.html", ".goal.first .quiet a"),
        ("index.html", ".switches a"),
        ("index.html", "#found a"),
        ("index.html", '#every a[href*="07_combined_cache"]'),
        ("ledger.html", "#ledger a"),
    ]

    async def steps(tab):
        seen = []
        await tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        for start, within in starts:
            await tab.open((reports / start).as_uri())
            if within.startswith("#found"):
                await tab.value(f"document.getElementById('ask').value = '{asked}'; search()")
            selector = json.dumps(within + '[href*="#row-"]')
            links = await tab.value(f"[...document.querySelectorAll({selector})].map((a) => a.href)")
            assert links, within
            for link in links[:2]:
                await tab.open("about:blank")
                await tab.open(link)
                await asyncio.sleep(0.2)
                seen.append((link, await tab.value(AT_A_ROW)))
        await tab.open((reports / "ledger.html").as_uri())
        await tab.value("document.querySelectorAll('#ledger .here')[40].click()")  # a line of the same page
        await asyncio.sleep(0.2)
        return [*seen, ("a claim", await tab.value(AT_A_ROW))]

    assert [link for link, found in drive(steps) if found != [True, True]] == []


# --- every page ---

SOME = (
    "index.html ledger.html analysis/index.html single_gpu/cpu/index.html single_gpu/cpu/explorer.html "
    "single_gpu/cpu/05_first_block_cache.html single_gpu/h100/13_final_stack.html single_gpu/h200/02_attention.html"
).split()
READY = """(() => {
  const [loaded] = performance.getEntriesByType("navigation");
  const painted = performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? 0;
  return Math.max(loaded.domContentLoadedEventEnd, painted) / 1000;
})()"""
CUT_OFF = """[...document.querySelectorAll("main table")].filter((table) => {
  const box = table.closest(".fx-scroll, .shown") ?? table;
  return table.checkVisibility() && Math.max(box.scrollWidth, table.offsetWidth) > box.clientWidth + 2;
}).map((table) => `${table.caption?.textContent.slice(0, 60)}: ${table.offsetWidth}`)"""
IDS = "[...document.querySelectorAll('[id]')].map((e) => e.id).filter((id, i, all) => all.indexOf(id) < i)"
COLOURS = "{ runOnly: ['color-contrast'], resultTypes: ['violations'] }"
FAULTS = "window.found.violations.map((v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 120)])"


async def _seen(tab, axe, page):
    """What is wrong with a page: a list of sentences, empty where nothing is."""

    async def width(pixels):
        await tab.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1, mobile=False
        )

    async def scheme(name):
        await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    async def serious(options="{ resultTypes: ['violations'] }"):
        await tab.value("window.found = null")
        await tab.value(f"void axe.run({options}).then((r) => {{ window.found = r; }})")
        for _ in range(600):
            if await tab.value("Boolean(window.found)"):
                break
            await asyncio.sleep(0.05)
        return [v for v in await tab.value(FAULTS) if v[0] in ("serious", "critical")]

    wrong, seconds = [], 9.0
    await scheme("light")
    await width(1280)
    for _ in range(3):  # a machine that is busy with something else isn't the page's fault
        await tab.open(page.as_uri())
        seconds = await tab.value(READY)
        if seconds <= 2:
            break
    if seconds > 2:
        wrong.append(f"it is there after {seconds:.1f} s")
    wrong += [f"asks for {url}" for url in tab.requests() if url != page.as_uri()]
    wrong += [f"complains: {e['params']}" for e in tab.complaints()]
    wrong += [f"a table is cut off: {said}" for said in await tab.value(CUT_OFF)]
    wrong += [f"two of id {name}" for name in await tab.value(IDS)]
    for pixels in (1440, 1280, 390):
        await width(pixels)
        await asyncio.sleep(0.05)
        if (wide := await tab.value("document.documentElement.scrollWidth")) > pixels:
            wrong.append(f"it is {wide} pixels wide at {pixels}")
    await width(1280)
    await tab.call("Runtime.evaluate", expression=axe)
    wrong += [f"axe: {v}" for v in await serious()]
    await scheme("dark")
    wrong += [f"axe, dark: {v}" for v in await serious(COLOURS)]
    return wrong


def _all_seen(root, names):
    """Page -> what is wrong with it; one browser for all."""
    axe = Path(importlib.util.find_spec("axe_core_python").origin).with_name("axe.min.js").read_text(encoding="utf-8")

    async def steps(tab):
        return {name: wrong for name in names if (wrong := await _seen(tab, axe, root / "reports" / name))}

    return drive(steps)


@in_a_browser
def test_pages_are_whole_at_every_width_and_axe_finds_nothing_serious(committed):
    """axe-core (Deque), which axe-core-python brings along, in the page; no network."""
    assert _all_seen(committed, SOME) == {}


@pytest.mark.thorough
@in_a_browser
def test_so_are_all_other_pages(committed):
    every = {path.relative_to(committed / "reports").as_posix() for path in (committed / "reports").rglob("*.html")}
    assert len(every) > len(SOME) and _all_seen(committed, sorted(every - set(SOME))) == {}


@in_a_browser
def test_the_test_of_pages_would_notice(tmp_path):
    page = tmp_path / "reports" / "bad.html"
    page.parent.mkdir()
    page.write_text(
        "<!DOCTYPE html><title>t</title><main><p style='color:#ccc'>faint</p><p id=a></p><p id=a></p><img src='x.png'>"
        "<div class='fx-scroll'><table style='width:1400px'><tr><td>a</td></tr></table></div>"
    )
    (wrong,) = _all_seen(tmp_path, ["bad.html"]).values()
    for said in (
        "cut off",
        "two of id a",
        "pixels wide at 390",
        "x.png",
        "color-contrast",
        "image-alt",
        "html-has-lang",
    ):
        assert any(said in words for words in wrong), said


TABLE = """(() => {
  const table = document.querySelector("table[data-dressed]:has(.fx-why)");
  const lines = [...table.tBodies[0].rows];
  const said = lines.map((r) => (r.matches(".fx-why") ? "why" : r.cells[0].textContent));
  const head = table.tHead.rows[0].cells;
  return { said, sorted: [...head].map((h) => h.getAttribute("aria-sort")), stuck: getComputedStyle(head[0]).position };
})()"""


@in_a_browser
def test_a_table_is_sorted_by_key_with_reasons_beneath_their_rows_and_leads_to_its_rows(committed):
    page = committed / "reports/single_gpu/h100/13_final_stack.html"

    async def steps(tab):
        await tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        await tab.open(page.as_uri())
        seen = [await tab.value(TABLE)]
        for _ in range(2):
            await tab.value("document.querySelectorAll('table:has(.fx-why) button.sort')[2].focus()")
            await press(tab, "Enter", text="\r")
            seen.append(await tab.value(TABLE))
        row = await tab.value("document.querySelector('tr[id^=row-]:nth-child(9)').id")
        await tab.open("about:blank")  # or it only scrolls, and nothing is loaded
        await tab.open(f"{page.as_uri()}#{row}")
        seen.append(await tab.value(f"document.getElementById('{row}').matches(':target')"))
        count = "document.querySelectorAll('table:has(.fx-why) thead th:not([hidden])').length"
        some = await tab.value(count)
        await tab.value("document.querySelectorAll('button.fx-more:not([hidden])').forEach((b) => b.click())")
        return *seen, (some, await tab.value(count))

    start, up, down, led, (some, every) = drive(steps)
    assert start["stuck"] == "sticky" and set(start["sorted"]) == {None}
    assert up["sorted"][2] == "ascending" and down["sorted"][2] == "descending"
    assert sorted(start["said"]) == sorted(up["said"]) == sorted(down["said"])
    names = [[name for name in table["said"] if name != "why"] for table in (up, down)]
    assert names[0] != names[1] and start["said"][0] != "why" and up["said"][0] != "why"
    after = [{a for a, b in zip(t["said"], t["said"][1:], strict=False) if b == "why"} for t in (start, up, down)]
    assert after[0] == after[1] == after[2] != set()
    assert led and some < every
