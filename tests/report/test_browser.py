"""The report in a real browser, opened from disk without a network: what is drawn, what is said, how fast."""

import base64
import contextlib
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
FIGURES, FOLDED = 12, 5
"""Of all figures, so many are in a fold."""
SEEN = """
document.getElementById('figure-0').scrollIntoView();
const figures = [...document.querySelectorAll('.figure')].filter((f) => f.getBoundingClientRect().top < innerHeight);
return figures.length > 1 && figures.every((f) => f.dataset.drawn) && Bokeh.documents.every((d) => d.is_idle);
"""
"""Whether all figures on the screen are drawn, where the first of them is."""
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
    from selenium.common.exceptions import WebDriverException

    deadline, holds = time.monotonic() + 60, False
    while not holds:
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)
        # a page that comes anew in between answers nothing
        with contextlib.suppress(WebDriverException):
            holds = browser.execute_script(condition)


def scroll_through(browser) -> None:
    """As a reader does who opens all, until every figure has been on the screen."""
    browser.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true")
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
    for number in (3, 4, FIGURES - 1):
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
    # a prompt, four texts of each of three prompts, the sample with what it is of, and among the settings the data's
    # path and a version
    assert sum(shown in text for text in texts) == 1 + 4 * 3 + 4 + 2
    written = "return [...document.querySelectorAll('b, i')].filter((e) => e.textContent === 'bold' || e.id).length"
    assert browser.execute_script(written) == 0
    assert complaints(browser) == []


def test_several_runs_are_laid_over_each_other(browser, pages):
    assert pages["three"].stat().st_size < 3e6
    show(browser, pages["three"], PHONE, "dark")
    scroll_through(browser)
    assert complaints(browser) == [] and too_wide(browser) == []
    image = pixels(browser, 0)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x91, 0x70)):
        assert nearest(image, colour).sum() > 30
    names = browser.execute_script("return [...document.querySelectorAll('td label')].map((e) => e.textContent)")
    assert names == ["<i>run</i> 0", "<i>run</i> 1", "<i>run</i> 2"]


def test_a_run_that_is_not_ticked_is_hidden(browser, pages):
    show(browser, pages["three"], WIDE, "light")
    until(browser, SEEN)
    seen = """
        const lines = figures.map((f) => f.model.renderers.filter((r) => r.tags[0] === 1).map((r) => r.visible)).flat();
        const marked = [...document.querySelectorAll('[data-run="1"]')].map((e) => e.checkVisibility());
        return [new Set(lines).size, lines[0], marked.some((m) => m), marked.length > 3];
    """
    assert browser.execute_script(seen) == [1, True, True, True]
    assert nearest(pixels(browser, 0), (0xD5, 0x5E, 0)).sum() > 30
    browser.execute_script("document.querySelectorAll('input.run')[1].click()")
    assert browser.execute_script(seen) == [1, False, False, True]
    time.sleep(0.3)
    assert nearest(pixels(browser, 0), (0xD5, 0x5E, 0)).sum() < 5
    # nor is it in a figure that is drawn later
    scroll_through(browser)
    assert browser.execute_script(seen) == [1, False, False, True] and complaints(browser) == []
    browser.execute_script("document.querySelectorAll('input.run')[1].click()")
    assert browser.execute_script(seen) == [1, True, True, True]


TIP = "const tip = document.getElementById('tip'); return tip.hidden ? null : tip.innerText"


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_token_tells_what_both_models_hold_most_probable(browser, pages, size):
    show(browser, pages["one"], size, "light")
    assert browser.execute_script(TIP) is None
    for place in (0, 1, 44):
        browser.execute_script(
            "const span = document.querySelectorAll('.answer .heat i')[arguments[0]];"
            "span.scrollIntoView({block: 'center'}); span.click()",
            place,
        )
        told = browser.execute_script(TIP)
        assert "KL " in told and "50.0%" in told and "teacher" in told and too_wide(browser) == []
        visible = "const b = tip.getBoundingClientRect(); return b.left >= 0 && b.top >= 0 && b.bottom <= innerHeight"
        assert browser.execute_script(visible)
    browser.execute_script("document.querySelector('h1').click()")
    assert browser.execute_script(TIP) is None and complaints(browser) == []


def test_a_page_follows_its_run_until_it_is_finished(browser, tmp_path):
    """It comes anew by itself, where its reader was, with the folds that were open, and then stops."""
    shown, path = Shown(made_up("run", 50), made_up_examples()), tmp_path / "report.html"
    page = make_page([shown], goes_on=True)
    path.write_text(page.replace("EVERY = 15", "EVERY = 2"))
    show(browser, path, WIDE, "light")
    browser.execute_script("document.getElementById('more-curves').open = true; scrollTo(0, 1500)")
    path.write_text(f"{page}<i id='second'></i>")
    until(browser, "return document.getElementById('second') !== null")
    until(browser, "return Math.abs(scrollY - 1500) < 60 && document.getElementById('more-curves').open")
    path.write_text(make_page([shown]) + "<i id='third'></i>")
    browser.execute_script("follow()")
    until(browser, "return document.getElementById('third') !== null")
    assert browser.execute_script("window.stays = true; return document.querySelector('.live')") is None
    time.sleep(1)
    assert browser.execute_script("return window.stays") and complaints(browser) == []


def test_a_page_is_not_followed_by_who_does_not_want_to_or_without_news(browser, tmp_path):
    path = tmp_path / "report.html"
    page = make_page([Shown(made_up("run", 50), made_up_examples())], goes_on=True)
    for change, act in (
        (page, "document.getElementById('follow').click()"),
        (page.replace("patience: 600", "patience: -1"), ""),
        (page, "document.querySelector('.answer .heat i').click()"),
    ):
        path.write_text(change)
        show(browser, path, WIDE, "light")
        browser.execute_script(f"window.stays = true; {act}; follow()")
        time.sleep(0.5)
        assert browser.execute_script("return window.stays"), act
    assert "Last news less than a minute ago" in browser.execute_script("return document.body.innerText")
    browser.execute_script("document.querySelector('h1').click(); follow()")
    until(browser, "return window.stays === undefined")


CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const over = (top, ground) => { const a = top[3] ?? 1; return [0, 1, 2].map((n) => a * top[n] + (1 - a) * ground[n]); };
const luminance = (colour) => {
  const linear = colour.map((part) => part / 255).map((p) => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const ground = (element) => {
  const own = numbers(getComputedStyle(element).backgroundColor);
  if (element === document.documentElement) return over(own, [255, 255, 255]);
  return (own[3] ?? 1) === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
};
const found = {};
for (const element of document.querySelectorAll("body *")) {
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!hasText || !element.checkVisibility() || element.closest("script, .bk-Figure")) continue;
  const [high, low] = [ground(element), over(numbers(getComputedStyle(element).color), ground(element))]
    .map(luminance).sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) found[`${element.tagName} ${element.className} ${element.dataset.k ?? ""}`] = ratio;
}
return [found, document.querySelectorAll("[data-k]").length];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "three"])
def test_every_text_stands_out_from_what_is_behind_it(browser, pages, name, scheme):
    show(browser, pages[name], WIDE, scheme)
    browser.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true")
    browser.execute_script("document.querySelector('.answer .heat i').click()")
    low, marked = browser.execute_script(CONTRAST)
    assert low == {} and marked > 100


GRIDS = """
((figure) => {
  const {canvas} = figure.canvas_view.primary;
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const count = (colour) => {
    let found = 0;
    for (let i = 0; i < data.length; i += 4) {
      found += data[i + 3] > 200 && colour.every((c, n) => Math.abs(c - data[i + n]) < 5);
    }
    return found;
  };
  return [count([0xd9, 0xde, 0xe4]), count([0x33, 0x3b, 0x45])];
})
"""
"""How many pixels of a figure have the colours of grid lines on white and in the dark."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_prints_on_white_with_all_figures_and_settings(browser, pages, scheme):
    show(browser, pages["one"], WIDE, scheme)
    until(browser, f"return document.querySelectorAll('.figure[data-drawn]').length === {FIGURES - FOLDED}")
    browser.execute_script(
        "addEventListener('beforeprint', () => {"
        "window.printed = document.documentElement.outerHTML; window.grids = figures.map(arguments[0]) })".replace(
            "arguments[0]", GRIDS
        )
    )
    page = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert page.startswith(b"%PDF") and 3 < page.count(b"/Type /Page\n") < 30
    printed, grids = browser.execute_script("return [window.printed, window.grids]")
    assert len(grids) == FIGURES - FOLDED and all(light > 500 and dark == 0 for light, dark in grids), grids
    assert "data-printed" in printed and 'id="settings-0" class="card" open' in printed
    # and the screen is as it was
    after = "return [document.documentElement.dataset.printed, document.getElementById('settings-0').open]"
    assert browser.execute_script(after) == [None, False]
    # but for advice on reading a canvas often
    assert [text for text in complaints(browser) if "willReadFrequently" not in text] == []
