"""What people look at, in headless Chromium: the report, and the explorer in JupyterLab."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.conftest import PROJECT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.xdist_group("pipeline"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def test_every_figure_of_the_report_is_drawn(done, browser):
    page = browser.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
    page.goto((done / "results" / "demo" / "report" / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert page.locator("img").count() >= 12
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 100)")
    assert page.locator("math").first.bounding_box()["width"] > 5
    for width in (1280, 480):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not problems
    page.close()


def test_the_slider_moves_the_cut_and_keeps_its_share_when_the_experiment_changes(browser):
    """In the committed report, whose experiments are cut at different shares; its text can be read in the dark."""
    page = browser.new_page(color_scheme="dark")
    page.goto((PROJECT / "results" / "laptop" / "report" / "index.html").as_uri())
    picture, slider, shown = (page.locator(what) for what in ("svg[role=img]", "input[type=range]", "output"))
    slider.fill("0")
    low = picture.inner_html()
    slider.fill(slider.get_attribute("max"))
    whole = picture.inner_html()
    assert whole != low and shown.inner_text() == "100% of the FLOPs"
    page.locator("select").nth(1).select_option("norm")
    assert picture.inner_html() != whole
    slider.fill(str(int(slider.get_attribute("max")) // 3))
    before = int(shown.inner_text().split("%")[0])
    page.locator("select").first.select_option("imagenet-mobilenetv2")
    assert picture.locator("text").first.evaluate("t => getComputedStyle(t).fill") == "rgb(255, 255, 255)"
    assert 31 < before < 99 and abs(int(shown.inner_text().split("%")[0]) - before) <= 1
    page.close()


@pytest.fixture
def lab(done):
    """JupyterLab over the finished project; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    environment = os.environ | {"PYTHONPATH": str(done), "JUPYTERLAB_SETTINGS_DIR": str(done / ".lab")}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=done, env=environment)
    try:
        for _ in range(120):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def test_the_explorer_answers_in_jupyterlab(done, lab, browser):
    """The FLOPs, a tilt and its reset, and a saved network, by keyboard and mouse."""
    from playwright.sync_api import expect

    notebook = done / "notebooks" / "explore.ipynb"
    before = notebook.read_text()
    notebook.write_text(before.replace('scale = \\"laptop\\"', 'scale = \\"demo\\"'))
    page = browser.new_page(viewport={"width": 1300, "height": 1100})
    try:
        page.goto(f"{lab}/lab/tree/notebooks/explore.ipynb?reset", timeout=120_000)
        page.get_by_text("| Idle").wait_for(timeout=120_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        picture, texts, handles = (page.locator(f".widget-{name}") for name in ("image", "html", "slider .noUi-handle"))
        changes, _, verdict, saved = (texts.nth(i) for i in range(4))
        verdict.get_by_text("±").wait_for(timeout=120_000)
        first = picture.get_attribute("src")
        handles.nth(0).press("ArrowRight")
        expect(picture).not_to_have_attribute("src", first, timeout=60_000)
        expect(verdict).to_contain_text("±", timeout=60_000)  # of the new network
        natural, shown = picture.evaluate("image => [image.naturalWidth, image.clientWidth]")
        assert 500 < shown <= natural / 2  # sharp, also where a pixel of the page is four of the screen

        handles.nth(1).press("ArrowLeft")
        expect(changes).to_contain_text(re.compile(r"tilted layers: \d+ \(α × 0\.891"), timeout=60_000)
        expect(verdict).to_contain_text("without the tilts", timeout=60_000)
        page.get_by_role("button", name="reset tilts", exact=True).last.click()
        expect(changes).to_have_text("tilted layers: none", timeout=60_000)
        page.get_by_role("button", name="save network").click()
        expect(saved).to_contain_text("saved: playground/saved/demo-", timeout=180_000)
    finally:
        page.close()
        notebook.write_text(before)
        shutil.rmtree(done / "playground", ignore_errors=True)
