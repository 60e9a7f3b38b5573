"""`make explore` in a real browser: JupyterLab, the notebook, a threshold dragged, an image made, a run stopped."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_browser import BROWSER, Tab, browser

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")
TOKEN = "only-for-this-test"

SEEN = """(() => ({
  images: [...document.querySelectorAll("img.widget-image")].filter((i) => i.offsetParent).map((i) => i.src),
  said: [...document.querySelectorAll(".widget-html-content")].map((h) => h.textContent),
  value: [...document.querySelectorAll(".widget-readout")].map((r) => r.textContent),
  stop: [...document.querySelectorAll("button.widget-button")].map((b) => b.disabled),
}))()"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on a copy of the notebook; yields its address."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("params", "reports/single_gpu/cpu"):
        ignore = shutil.ignore_patterns("*.html")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    (root / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/explore.ipynb", root / "notebooks")
    (root / "fluxnb").symlink_to(ROOT / "fluxnb", target_is_directory=True)
    env = {**os.environ, "PYTHONPATH": str(root), "JUPYTER_RUNTIME_DIR": str(root / "runtime")}
    env |= {"JUPYTER_CONFIG_DIR": str(root / "config"), "HOME": str(root)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    log = (root / "lab.log").open("wb")
    process = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield _address(root / "runtime", process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def _address(runtime, process):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, f"JupyterLab ended with status {process.returncode}"
        for path in runtime.glob("jpserver-*.json"):
            try:
                url = json.loads(path.read_text())["url"].replace("localhost", "127.0.0.1")
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}api", timeout=5)
                return url
            except (OSError, ValueError, KeyError):
                pass
        time.sleep(0.2)
    raise AssertionError("JupyterLab didn't start within 90 s")


async def until(tab, condition, seconds, what):
    """Waits until a JavaScript expression is true; returns how long that took."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if await tab.value(f"Boolean({condition})"):
            return time.monotonic() - started
        await asyncio.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


async def drag(tab, selector, by):
    """Drags the first element that matches by so many pixels to the right."""
    box = json.loads(
        await tab.value(f"JSON.stringify(document.querySelector('{selector}').getBoundingClientRect().toJSON())")
    )
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    await tab.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
    for step in range(1, 9):
        await tab.call(
            "Input.dispatchMouseEvent", type="mouseMoved", x=x + by * step / 8, y=y, button="left", buttons=1
        )
    await tab.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + by, y=y, button="left", clickCount=1)


def button(name):
    return f"[...document.querySelectorAll('button.widget-button')].find((b) => b.textContent.trim() === '{name}')"


@pytest.fixture(scope="module")
def driven(lab):
    from tornado.websocket import websocket_connect

    async def run(address):
        tab, seen = Tab(await websocket_connect(address, max_message_size=2**28)), {}
        for domain in ("Page", "Runtime"):
            await tab.call(f"{domain}.enable")
        await tab.call("Emulation.setDeviceMetricsOverride", width=1500, height=1400, deviceScaleFactor=1, mobile=False)
        await tab.open(f"{lab}lab/tree/notebooks/explore.ipynb?token={TOKEN}")
        panel = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])].find((w) => w.sessionContext)"
        await until(tab, f"{panel}?.context?.isReady", 90, "the notebook opens")
        await until(tab, f"{panel}.sessionContext.session?.kernel?.status === 'idle'", 90, "its kernel starts")
        await tab.value(f"window.jupyterapp.shell.activateById({panel}.id)")
        await tab.value("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        await until(tab, button("Run"), 90, "the widgets show")
        await asyncio.sleep(1)
        seen["start"] = await tab.value(SEEN)
        await tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=1400, deviceScaleFactor=1, mobile=False)
        await asyncio.sleep(1)
        shown = "[...document.querySelectorAll('img.widget-image')].filter((i) => i.offsetParent)"
        seen["boxes"] = await tab.value(
            f"{shown}.map((i) => [i.getBoundingClientRect().x, i.getBoundingClientRect().y])"
        )

        await drag(tab, ".noUi-handle", 80)
        readout = "document.querySelector('.widget-readout').textContent"
        await until(tab, f"{readout} !== '0.12'", 20, "the threshold follows the mouse")
        await until(tab, f"{SEEN}.said[0] !== {json.dumps(seen['start']['said'][0])}", 20, "so does the prediction")
        seen["dragged"] = await tab.value(SEEN)

        first = json.dumps(seen["start"]["images"][0])
        loaded = f"{SEEN}.said.some((text) => text.includes('ready'))"
        await until(tab, loaded, 120, "the model is loaded")
        await tab.value(f"{button('Run')}.click()")
        image = f"document.querySelector('img.widget-image').src !== {first}"
        seen["first image"] = await until(tab, image, 60, "the first image")
        whole = f"{SEEN}.said.some((text) => text.includes('of 28 steps'))"
        await until(tab, f"!{button('Run')}.disabled && {whole}", 60, "a whole image")
        seen["run"] = await tab.value(SEEN)

        await tab.value(f"{button('Run')}.click()")
        await until(tab, f"!{button('Stop')}.disabled", 20, "it can be stopped")
        await tab.value(f"{button('Stop')}.click()")
        await until(tab, f"!{button('Run')}.disabled", 30, "it stops")
        seen["stopped"] = await tab.value(SEEN)
        return seen

    with browser("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") as address:
        return asyncio.run(run(address))


def test_the_widgets_show_and_the_threshold_moves_what_is_predicted(driven):
    assert len(driven["start"]["images"]) == 2 and "0.12" in driven["start"]["value"]
    assert driven["dragged"]["value"] != driven["start"]["value"]
    assert any("predicted" in said or "measured" in said for said in driven["dragged"]["said"])


def test_the_first_image_is_there_within_three_seconds_and_a_run_ends_with_both(driven):
    assert driven["first image"] < 3 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert driven["run"]["images"][0] != driven["run"]["images"][1]
    assert any(" of 28 steps" in said and " dB" in said for said in driven["run"]["said"])


def test_baseline_and_setting_are_side_by_side_at_1280(driven):
    (left, top), (right, beside) = driven["boxes"]
    assert top == beside and left < right < 1280


def test_a_run_can_be_stopped(driven):
    assert "stopped: nothing was made" in driven["stopped"]["said"]
    assert driven["stopped"]["images"][0] == driven["run"]["images"][0]
