"""A rendered report in a headless browser, with no network: nothing is requested, no script complains.

The browser is driven over its DevTools protocol with tornado's websocket client, which Jupyter brings along.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_report import OWN, PROVENANCE, FakeParams, render

from fluxnb.report import html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --no-default-browser-check".split(),
    *"--disable-background-networking --disable-component-update --disable-sync --disable-extensions".split(),
    *"--disable-dev-shm-usage --remote-debugging-port=0 --remote-allow-origins=*".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # what tries to leave this machine fails at once, and is seen to
]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")


class Tab:
    """One page of the browser: its commands, and every event it sends."""

    def __init__(self, socket):
        self.socket, self.number, self.events = socket, 0, []

    async def call(self, method, **params):
        """Send one command and return its result; events that arrive meanwhile are kept."""
        self.number += 1
        await self.socket.write_message(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = await self._next()
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def open(self, address):
        """Load a page and wait until it and everything in it has loaded."""
        self.events.clear()
        await self.call("Page.navigate", url=address)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            await self._next()
        await asyncio.sleep(0.3)  # late requests and console messages
        await self.value("1")

    async def value(self, script):
        """The value of a JavaScript expression in the page."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def _next(self):
        message = json.loads(await asyncio.wait_for(self.socket.read_message(), 120))
        if "method" in message:
            self.events.append(message)
        return message

    def requests(self):
        """Addresses asked for, other than what is inside the page."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self):
        """Failed requests, console warnings and errors, uncaught exceptions."""
        kinds = (
            "Network.loadingFailed",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        )
        return [e for e in self.events if e["method"] in kinds]


@contextlib.contextmanager
def browser(*more):
    """A headless browser with a profile of its own; yields the address of one page's websocket."""
    with tempfile.TemporaryDirectory(prefix="fluxnb-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [BROWSER, *FLAGS, *more, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield _websocket(Path(profile) / "DevToolsActivePort", process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _websocket(port_file, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{BROWSER} ended with status {process.returncode}"
        with contextlib.suppress(OSError, IndexError, StopIteration):
            port = port_file.read_text().split()[0]
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                return next(t["webSocketDebuggerUrl"] for t in json.load(answer) if t["type"] == "page")
        time.sleep(0.1)
    raise AssertionError(f"{BROWSER} didn't open its DevTools port within 60 s")


def drive(steps):
    """Run `await steps(tab)` on a page of a fresh browser."""
    from tornado.websocket import websocket_connect

    async def session(address):
        socket = await websocket_connect(address, max_message_size=256 * 2**20)
        tab = Tab(socket)
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        return await steps(tab)

    with browser() as address:
        return asyncio.run(session(address))


def picture(seed, side=128):
    """A smooth random image."""
    noise = np.random.default_rng(seed).uniform(0, 255, (4, 4, 3)).astype(np.uint8)
    from PIL import Image

    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def chart():
    """A frontier like those in the reports."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    axes.plot([1, 1.4, 2.2, 3.1], [50, 43, 33, 23], marker="o", label="First Block Cache")
    axes.plot([1, 1.5, 2.3, 3.4], [48, 45, 41, 35], marker="s", label="fewer steps")
    axes.set(xlabel="speedup (×)", ylabel="PSNR (dB)")
    axes.legend()
    return figure


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with one of everything, made without running a kernel, beside a failed one."""
    root = tmp_path_factory.mktemp("browser")
    thresholds = ["0", "0.05", "0.1", "0.12", "0.2", "0.3", "0.5", "0.8"]
    prompts = ["A red apple on a white table", "A cute panda holding a sign that says hello world"]
    cells = [[(picture(10 * r + c), f"{1 + c / 3:.2f}× · {50 - 4 * c} dB") for c in range(8)] for r in range(2)]
    cells[1][7] = "out of memory"
    frame = pd.DataFrame(
        {
            "threshold": thresholds,
            "computed steps": [28, 21, 13, 11, 7, 5, 3, 2],
            "latency p50": np.linspace(0.41, 0.07, 8),
            "speedup": 0.41 / np.linspace(0.41, 0.07, 8),
            "PSNR": [float("nan"), 50.7, 42.9, 40.1, 33.2, 28.8, 23.4, 19.96],
        }
    )
    shown = [
        html.callout_html("At threshold `0.2` an image takes **2.2×** less time, at 33.2 dB of PSNR.", "result"),
        html.figure_html(chart(), "PSNR falls as speedup rises; fewer steps fall less", "Speedup against PSNR."),
        html.table_html(frame, "First Block Cache per threshold", units={"latency p50": "s", "PSNR": "dB"}),
        html.image_grid_html(prompts, thresholds, cells, caption="Same seed in a row.", corner="prompt"),
        html.callout_html("LPIPS and CLIP score, because their weights aren't here.", "not-measured"),
    ]
    sections = [
        "## The question\n\nHow much time does it save?",
        "## What it does\n\n### Source\n\nWords.",
        "## Speed",
    ]
    sections += ["## Images\n\n| a | b |\n|---|---|\n| 1 | `2` |", "## When not to use it"]
    notebook = new_notebook(cells=[new_markdown_cell("# First Block Cache\n\nReuse what hardly changes.")])
    for number, (section, markup) in enumerate(zip(sections, shown, strict=True), 1):
        said = {"fluxnb": {"finding": "At threshold 0.2 an image takes 2.2× less time."}} if number == 1 else {}
        output = new_output("display_data", data={"text/html": markup}, metadata=said)
        code = f"# section {number}\nhtml.show({number}, 'text', True)"
        notebook.cells += [new_markdown_cell(section), new_code_cell(code, outputs=[output])]
    failing = new_notebook(cells=[new_markdown_cell("# Baseline"), new_code_cell("boom()")])
    failing.cells[1].outputs = [new_output("error", ename="ValueError", evalue="boom", traceback=["line 1", "boom"])]
    build = root / "build/cpu"
    build.mkdir(parents=True)
    (root / "notebooks").mkdir()
    state = {"seconds": 83, "finished": "2026-11-20T10:05:00+00:00", "provenance": PROVENANCE}
    for stem, content, suffix, status in (
        ("01_baseline", failing, ".failed", "failed"),
        ("05_first_block_cache", notebook, "", "ok"),
    ):
        nbformat.write(content, root / f"notebooks/{stem}.ipynb")
        nbformat.write(content, build / f"{stem}{suffix}.ipynb")
        error = {"failed_cell": 1, "error": "ValueError: boom"} if status == "failed" else {}
        (build / f"{stem}.json").write_text(json.dumps(state | error | {"status": status}))
    folder = root / OWN
    folder.mkdir(parents=True)
    (root / "reports/single_gpu/cpu").mkdir(parents=True)  # a reference beside it
    (root / "reports/single_gpu/cpu/index.html").write_text("")
    (root / "reports/single_gpu/cpu/05_first_block_cache.html").write_text("")
    (folder / "run.json").write_text(json.dumps(PROVENANCE))
    render(FakeParams(), root)
    return folder


def test_reports_request_nothing_and_complain_about_nothing(report):
    async def steps(tab):
        for path in sorted(report.glob("*.html")):
            await tab.open(path.as_uri())
            assert tab.requests() == [path.as_uri()]
            assert tab.complaints() == []
            broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
            assert await tab.value(broken) == 0, path.name

    drive(steps)


def test_the_test_would_notice_a_load_and_a_script_error(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<img alt='a' src='http://example.invalid/a.png'><script>undefinedName()</script>")

    async def steps(tab):
        await tab.open(page.as_uri())
        assert "http://example.invalid/a.png" in tab.requests()
        kinds = {event["method"] for event in tab.complaints()}
        assert {"Network.loadingFailed", "Runtime.exceptionThrown"} <= kinds

    drive(steps)


def test_reports_work_with_the_keyboard_and_on_a_phone(report):
    async def steps(tab):
        await tab.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        for path in sorted(report.glob("*.html")):
            await tab.open(path.as_uri())
            # wide tables scroll inside their own containers, never the page
            assert await tab.value("document.documentElement.scrollWidth") <= 390, path.name
        await tab.open((report / "05_first_block_cache.html").as_uri())
        assert await tab.value("document.querySelectorAll('nav.contents a').length") == 6
        unresolved = "[...document.querySelectorAll('nav.contents a')].filter(a => !document.querySelector(a.hash))"
        assert await tab.value(f"{unresolved}.length") == 0
        assert await tab.value("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == (
            await tab.value("document.querySelectorAll('[id]').length")
        )
        await press(tab, "Tab")
        assert await tab.value("document.activeElement.className") == "skip"
        assert await tab.value("document.activeElement.getBoundingClientRect().left") > 0
        await tab.value("document.querySelector('details.code summary').focus()")
        assert not await tab.value("document.querySelector('details.code').open")
        await press(tab, "Enter", text="\r")
        assert await tab.value("document.querySelector('details.code').open")

    drive(steps)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(report, scheme):
    """WCAG AA: 4.5 for all text of a page, in light and in dark."""

    async def steps(tab):
        await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for path in sorted(report.glob("*.html")):
            await tab.open(path.as_uri())
            await tab.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert json.loads(await tab.value(LOW_CONTRAST)) == [], path.name

    drive(steps)


LOW_CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.body.querySelectorAll('*')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility()) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(e).color)), luminance(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const shown = getComputedStyle(e).opacity < 1 ? 'transparent ' : '';
    if (ratio < 4.5 || shown) low.push(shown + e.tagName + '.' + e.className + ' ' + ratio.toFixed(2));
  }
  return JSON.stringify([...new Set(low)]);
})()
"""


async def press(tab, key, text=""):
    """Press and release one key."""
    code = {"Tab": 9, "Enter": 13}[key]
    named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    await tab.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
    await tab.call("Input.dispatchKeyEvent", type="keyUp", **named)
