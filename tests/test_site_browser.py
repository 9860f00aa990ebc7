"""The built site in a real browser, opened from the disk. Skipped where Chromium or its driver is not installed."""

import json
import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from common.results import claims, tables

SLUGS = claims.slugs()
SHOWN = """
const done = arguments[0], rows = document.querySelectorAll("table.claims tbody tr");
setTimeout(() => done([...rows].filter((row) => !row.hidden).map((row) => EACH)));  // after what a click put off
"""


@pytest.fixture(scope="session")
def browser():
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip(f"needs {'Chromium' if not chromium else 'chromedriver'}, which is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--window-size=1440,900", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as started:
        yield started


@pytest.fixture
def visit(browser, site):
    """visit(page name, width, height, scheme, scripts) opens a page of the site and returns the browser."""

    def go(name: str = "index", width: int = 1440, height: int = 900, scheme: str = "light", scripts: bool = True):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # scrolling is over when a click comes
        ]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        url = (site / f"{name}.html").as_uri()
        browser.get("about:blank")  # so that what is complete below is the new page, not the last one
        browser.get(url)  # on a busy machine this may come back before the whole page is read
        loaded = "return [location.href, document.readyState]"
        WebDriverWait(browser, timeout=60).until(lambda page: page.execute_script(loaded) == [url, "complete"])
        return browser

    yield go
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def shown_rows(page, each: str) -> list:
    """A JavaScript expression of every `row` that is shown, from the top."""
    return page.execute_async_script(SHOWN.replace("EACH", each))


def column(page, name: str) -> list[str]:
    """The texts of a column's cells, of the rows that are shown, from the top."""
    return shown_rows(page, f"row.querySelector('.{name}').textContent.trim()")


def sort_by(page, name: str):
    header = page.find_element(By.CSS_SELECTOR, f"table.claims thead th.{name}")
    header.find_element(By.TAG_NAME, "button").click()
    return header.get_attribute("aria-sort")


@pytest.mark.parametrize("name", ["index", *SLUGS])
def test_no_error_no_request_and_no_sideways_scroll(visit, name, site):
    for width, height in ((360, 740), (800, 900), (1280, 900)):
        page = visit(name, width, height)
        size = page.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
        assert size[0] <= size[1] <= width, f"{width} pixels wide"
    missing = "return [...document.images].filter((i) => !i.alt).map((i) => i.src)"
    assert page.execute_script(missing) == []
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert f"{site.as_uri()}/style.css" in asked
    assert not {url for url in asked if not url.startswith((f"{site.as_uri()}/", "data:"))}


def test_sorting_orders_numbers_as_numbers_and_keeps_every_row(visit):
    page = visit()
    before = column(page, "claim")
    Select(page.find_element(By.NAME, "paper")).select_by_visible_text("condensenet")
    for name in ("reproduced", "reported"):
        for direction in ("ascending", "descending"):
            assert sort_by(page, name) == direction
            kinds, texts = column(page, "kind"), column(page, name)
            costs = [text for kind, text in zip(kinds, texts, strict=True) if kind == "cost" and text]
            numbers = [float(re.match(r"-?[\d,.]+(e-?\d+)?", text)[0].replace(",", "")) for text in costs]
            assert numbers == sorted(numbers, reverse=direction == "descending") != [], name
            assert "" not in texts[: len(costs)], "what has no number is last"
            if name == "reproduced":
                empty = texts.index("")
                assert set(texts[empty:]) == {""}
    assert len(page.find_elements(By.CSS_SELECTOR, "table.claims [aria-sort]")) == 1
    page.find_element(By.CSS_SELECTOR, "form.filters button[type=reset]").click()
    assert sort_by(page, "claim") == "ascending"
    after = column(page, "claim")
    assert after != before
    assert sorted(after) == sorted(before)


def test_filters_leave_exactly_the_right_rows(visit):
    page = visit()
    identity = "row.dataset.paper, row.querySelector('.claim code').textContent"
    every = shown_rows(page, f"[{identity}, row.dataset.verdict]")  # test_site.py holds these against tables.py

    def shown():
        rows = shown_rows(page, f"[{identity}]")
        count = page.find_element(By.CSS_SELECTOR, "form.filters output").text
        assert count == f"{len(rows)} of {len(every)} claims"
        return {tuple(row) for row in rows}

    assert len(shown()) == len(every)
    kinds = [kind for kinds in tables.GROUPS.values() for kind in kinds]
    for kind in kinds:
        Select(page.find_element(By.NAME, "verdict")).select_by_visible_text(kind)
        assert shown() == {(slug, claim) for slug, claim, verdict in every if verdict == kind}, kind
    page.find_element(By.CSS_SELECTOR, "a[data-show='did not']").click()
    fell = {(slug, claim) for slug, claim, verdict in every if verdict in tables.GROUPS["did not"]}
    assert shown() == fell != set()
    Select(page.find_element(By.NAME, "paper")).select_by_visible_text("blockdrop")
    assert shown() == {pair for pair in fell if pair[0] == "blockdrop"} != set()
    page.find_element(By.CSS_SELECTOR, "form.filters button[type=reset]").click()
    page.find_element(By.NAME, "text").send_keys("CENTERNET-52 ap50")
    assert {pair[0] for pair in shown()} == {"centernet"}
    page.find_element(By.NAME, "text").send_keys(" nosuchword")
    assert shown() == set()


def test_keyboard_and_names(visit):
    page = visit("hpm")
    unnamed = "return [...document.querySelectorAll('input, select')].filter((field) => !field.labels.length).length"
    assert page.execute_script(unnamed) == 0
    page.find_element(By.CSS_SELECTOR, "form.filters button").send_keys(Keys.TAB)
    focused = page.switch_to.active_element
    assert (focused.tag_name, focused.text.split()[0]) == ("button", "Claim")
    focused.send_keys(Keys.ENTER)
    assert page.find_element(By.CSS_SELECTOR, "th.claim").get_attribute("aria-sort") == "ascending"
    assert column(page, "claim") != []
    page.execute_script("document.querySelector('tbody tr:nth-child(40)').scrollIntoView({behavior: 'instant'})")
    top = page.execute_script("return document.querySelector('table.claims thead th').getBoundingClientRect().top")
    assert 0 <= top < 2, "the header stays"


def test_without_scripts_the_whole_table_is_there(visit):
    page = visit(scripts=False)
    rows = page.find_elements(By.CSS_SELECTOR, "table.claims tbody tr")
    assert len(rows) == sum(len(claims.load_paper(claims.PAPERS / slug).claims) for slug in SLUGS)
    assert rows[0].is_displayed()
    assert rows[-1].is_displayed()
    assert not page.find_element(By.CSS_SELECTOR, "form.filters").is_displayed()
    assert not page.find_elements(By.CSS_SELECTOR, "thead button")


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
const light = (colour) => { const [r, g, b] = channels(colour); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return colour !== "rgba(0, 0, 0, 0)" ? colour : behind(e.parentElement);
};
return [light(behind(document.body)), Object.fromEntries(arguments[0].map((selector) => {
  const e = document.querySelector(selector);
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
  return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
}))];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(visit, scheme):
    """Every text colour has the contrast that WCAG 2 asks of small text: 4.5."""
    page = visit(scheme=scheme)
    badges = [f".badge.{name.replace(' ', '-')}" for name in tables.GROUPS]
    tiles = [f".tiles .{name.replace(' ', '-')} {part}" for name in tables.GROUPS for part in ("strong", ".says")]
    background, found = page.execute_script(CONTRAST, ["h1", ".lead", "td.claim, td.kind", "td a", *badges, *tiles])
    assert background < 0.05 if scheme == "dark" else background > 0.9
    assert {selector: ratio for selector, ratio in found.items() if ratio < 4.5} == {}
