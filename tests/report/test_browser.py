"""The report in a real browser, opened from disk without a network: what is drawn, what is said, how fast."""

import base64
import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.pages import EVIL, made_up, made_up_examples
from PIL import Image

from litgpt_akl.report.page import Shown, make_page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--proxy-server=127.0.0.1:9"),
)
WIDE, PHONE = (1400, 900), (390, 844)
FIGURES = 18
SEEN = """
const figures = [...document.querySelectorAll('.figure')].filter((f) => f.getBoundingClientRect().top < innerHeight);
return figures.length > 1 && figures.every((f) => f.dataset.drawn) && Bokeh.documents.every((d) => d.is_idle);
"""
"""Whether all figures on the screen are drawn."""
GROUNDS = {"light": (255, 255, 255), "dark": (23, 27, 33)}

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of ten thousand steps: of one run, and of three over each other."""
    directory = tmp_path_factory.mktemp("pages")
    runs = [Shown(made_up(f"<i>run</i> {n}", 10_000, n), made_up_examples(n)) for n in range(3)]
    pages = {"one": runs[:1], "three": runs}
    for name, shown in pages.items():
        (directory / f"{name}.html").write_text(make_page(shown), encoding="utf-8")
    return {name: directory / f"{name}.html" for name in pages}


def show(browser, page: Path, size: tuple[int, int], scheme: str) -> None:
    """Open a page, as on a screen of that size."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    prefer(browser, scheme)
    browser.get(page.as_uri())


def prefer(browser, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def until(browser, condition: str) -> None:
    deadline = time.monotonic() + 60
    while not browser.execute_script(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def scroll_through(browser) -> None:
    """As a reader does, until every figure has been on the screen."""
    for number in range(FIGURES):
        browser.execute_script(f"document.getElementById('figure-{number}')?.scrollIntoView()")
        until(browser, f"const f = document.getElementById('figure-{number}'); return !f || f.dataset.drawn")
    until(browser, "return Bokeh.documents.every((d) => d.is_idle)")


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")]


def pixels(browser, number: int) -> np.ndarray:
    """A figure as it is seen, ``[height, width, 3]``."""
    browser.execute_script(f"document.getElementById('figure-{number}').scrollIntoView()")
    time.sleep(0.1)
    place = browser.execute_script(
        f"const b = document.getElementById('figure-{number}').getBoundingClientRect();"
        "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height, scale: 1}"
    )
    image = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": place})
    return np.asarray(Image.open(BytesIO(base64.b64decode(image["data"]))).convert("RGB")).astype(int)


def nearest(image: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return np.abs(image - colour).sum(axis=-1) < 12


def too_wide(browser) -> list[str]:
    """What reaches out of the screen sideways, and is not in a box of its own that can be scrolled."""
    return browser.execute_script(
        "return [...document.querySelectorAll('body *:not(script)')].filter((e) => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.outerHTML)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_figure_is_drawn_and_nothing_is_complained_of(browser, pages, size, scheme):
    show(browser, pages["one"], size, scheme)
    scroll_through(browser)
    drawn = "return document.querySelectorAll('.figure[data-drawn]').length"
    assert browser.execute_script(drawn) == FIGURES
    assert browser.execute_script("return document.querySelectorAll('.figure').length") == FIGURES
    assert complaints(browser) == []
    assert too_wide(browser) == [] and browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    for number in (0, 4, 9, 12, FIGURES - 1):
        image = pixels(browser, number)
        ground = nearest(image, GROUNDS[scheme])
        line = nearest(image, (0, 0x72, 0xB2))
        # an axis with its labels on the left, a line of the first colour in the rest, and most of it empty
        assert ground.mean() > 0.5 and (~ground[:, :60]).sum() > 100
        assert line.sum() > 100 and line.any(axis=0).mean() > 0.25


def test_figures_follow_when_the_scheme_changes(browser, pages):
    show(browser, pages["one"], WIDE, "light")
    until(browser, SEEN)
    light = pixels(browser, 0)[:, :60]
    prefer(browser, "dark")
    time.sleep(0.3)
    dark = pixels(browser, 0)[:, :60]
    # labels of the axis, and what is between them
    assert nearest(light, (0x5B, 0x65, 0x70)).sum() > 20 and nearest(light, GROUNDS["light"]).mean() > 0.5
    assert nearest(dark, (0x9A, 0xA5, 0xB1)).sum() > 20 and nearest(dark, GROUNDS["dark"]).mean() > 0.5
    assert complaints(browser) == []


def test_ten_thousand_steps_open_at_once(browser, pages):
    assert pages["one"].stat().st_size < 3e6
    seconds = []
    for _ in range(3):
        show(browser, pages["one"], WIDE, "light")
        until(browser, SEEN)
        seconds.append(browser.execute_script("return performance.now()") / 1000)
    print(f"{pages['one'].stat().st_size / 1e6:.2f} MB, open after {min(seconds):.2f} s")
    assert min(seconds) < 2


def test_text_is_shown_as_it_is(browser, pages):
    show(browser, pages["one"], WIDE, "light")
    shown = EVIL.replace("\x1b", "\ufffd").replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    texts = browser.execute_script(
        "return [...document.querySelectorAll('.example pre, dd')].map((e) => e.textContent)"
    )
    assert sum(shown in text for text in texts) == 9  # data, prompt, three answers, and the sample with what it is of
    assert browser.execute_script("return document.querySelectorAll('main b, .card b, .card i').length") == 0
    assert complaints(browser) == []


def test_several_runs_are_laid_over_each_other(browser, pages):
    assert pages["three"].stat().st_size < 3e6
    show(browser, pages["three"], PHONE, "dark")
    scroll_through(browser)
    assert complaints(browser) == [] and too_wide(browser) == []
    image = pixels(browser, 0)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x91, 0x70)):
        assert nearest(image, colour).sum() > 30
    names = browser.execute_script("return [...document.querySelectorAll('h3')].slice(0, 3).map((e) => e.textContent)")
    assert names == ["<i>run</i> 0", "<i>run</i> 1", "<i>run</i> 2"]
