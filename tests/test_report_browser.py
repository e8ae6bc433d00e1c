"""The report in a real browser, opened as the file it is.

Unusual: each test also fails when the page asked anything of elsewhere, or wrote an error to the console.
"""

import csv
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from arkasr.evaluate.report import Report, write
from page_browser import chromium
from test_report import HOSTILE, LETTERS, ROWS, many, row, scored, small, system
from test_server_page import axe

__all__ = ["axe", "chromium"]  # fixtures are used by their names
pytestmark = pytest.mark.browser


class Page:
    """A report in a browser, by the ids of its elements."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, report: Report, **options: bool) -> None:
        write(report, self.folder, **options)
        self.driver.get((self.folder / "report.html").as_uri())

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **parameters: object) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def until(self, true: Callable[[], object], *, within_s: float = 10) -> None:
        end = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < end, self["status"].text
            time.sleep(0.02)

    def set(self, name: str, value: str) -> None:
        self.js(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', { bubbles: true })); e.dispatchEvent(new Event('change'))",
            name,
            value,
        )

    def sort(self, name: str) -> None:
        self.js(
            "[...document.querySelectorAll('#rows thead button')].find(b => b.textContent === arguments[0]).click()",
            name,
        )

    @property
    def ids(self) -> list[str]:
        return list(self.js("return [...document.querySelectorAll('#rows tbody th bdi')].map(e => e.textContent)"))

    def reset(self) -> None:
        self["filters"].find_element("css selector", "[type=reset]").click()
        self.until(lambda: re.match(r"([\d,]+) of \1 ", self["status"].text))

    def check(self) -> None:
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                assert message["params"]["request"]["url"].startswith(("file:///", "data:", "blob:", "about:"))
        assert self.driver.get_log("browser") == []  # type: ignore[no-untyped-call]


@pytest.fixture
def page(chromium: webdriver.Chrome, tmp_path: Path) -> Iterator[Page]:
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # type: ignore[no-untyped-call]
    page = Page(chromium, tmp_path)
    yield page
    page.check()
    for command in ("Emulation.clearDeviceMetricsOverride", "Emulation.setEmulatedMedia"):
        page.cdp(command)
    chromium.get("about:blank")


def pair() -> Report:
    others = [
        replace(ROWS[0], pred_text="the cat sat"),
        ROWS[1],
        replace(ROWS[3], pred_text="all is"),
        row("z", "x", "y"),
    ]
    numbers = scored([row("n1", "one", "two"), row("n2", "one", "one")], "numbers")
    return replace(small(), systems=(system(scored(ROWS), numbers), system(scored(others), name="other")))


def test_filters(page: Page) -> None:
    page.open(pair())
    assert page.ids == ["a", "b", "c", "d", "e", "n1", "n2", "z"]
    for name, value, left in (
        ("set", "1", ["n1", "n2"]), ("speaker", "s1", ["a", "c"]), ("flag", "loop", ["b"]), ("flag", "failed", ["e"]),
        ("errors", "ins", ["b"]), ("errors", "del", ["c", "d", "e"]), ("errors", "sub", ["a", "n1", "z"]),
        ("errors", "compounds", ["c"]), ("errors", "none", ["a", "d", "n2"]),
        ("errors", "some", ["a", "b", "c", "d", "e", "n1", "z"]), ("text", "WHITEpaper", ["c"]), ("text", "n2", ["n2"]),
        ("difference", "differ", ["a", "d"]), ("difference", "first", ["d"]), ("difference", "second", ["a"]),
    ):  # fmt: skip
        page.set(name, value)
        assert page.ids == left, (name, value)
        assert page["status"].text.startswith(
            f"{len(left)} of 8 utterances; WER (not a leaderboard set, normalizer plain)"
        )
        page.reset()
    page.set("speaker", "s1")
    page.set("errors", "compounds")
    assert page.ids == ["c"]
    assert "ark 0.6b 25.00 %, other –." in page["status"].text  # noqa: RUF001
    page.set("text", "nowhere")
    assert (page.ids, page["status"].text) == ([], "0 of 8 utterances.")


def test_no_rate_over_different_protocols(page: Page) -> None:
    letters = scored([row("n1", "one", "two")], "letters", normalizer=LETTERS)
    page.open(Report("Mixed", (system(scored(ROWS), letters),)))
    assert page["status"].text == "6 of 6 utterances; no rate over sets of different protocols."
    page.set("set", "1")
    assert page["status"].text == (
        "1 of 6 utterances; CER (not a leaderboard set, normalizer letters): ark 0.6b 100.00 %."
    )


def test_sorting(page: Page) -> None:
    rows = [replace(one, duration=d) for one, d in zip(ROWS, (3.0, None, 20.0, 1.0, 3.0), strict=True)]
    page.open(
        Report("Sorted", (system(scored([replace(rows[1], x={"id": "b10"}), *rows[2:], rows[0], row("b9", "", "")])),))
    )
    for name, up, down in (
        ("Utterance", ["a", "b9", "b10", "c", "d", "e"], ["e", "d", "c", "b10", "b9", "a"]),
        ("Seconds", ["d", "b9", "e", "a", "c", "b10"], ["c", "e", "a", "b9", "d", "b10"]),
        ("Error rate %", ["d", "c", "b10", "a", "e", "b9"], ["e", "b10", "a", "c", "d", "b9"]),
    ):
        orders = []
        for _ in range(2):
            page.sort(name)
            (head,) = page.driver.find_elements("css selector", "th[aria-sort]")
            orders.append((head.get_attribute("aria-sort"), page.ids))
            assert head.text.startswith(name)
        wanted = [("ascending", up), ("descending", down)]
        assert orders == (wanted if name == "Utterance" else wanted[::-1])


def test_an_alignment_is_marked_by_more_than_colour(page: Page) -> None:
    page.open(pair())
    shown = page.js("""
        return [...document.querySelectorAll('#rows tbody')].slice(0, 3).map(body =>
            [...body.querySelector('.aligned').children].map(t => [...t.children].map(e => e.textContent)))
    """)
    assert shown[0] == [["the", "the"], ["cat", "bat", "S"], ["sat", "sat"]]
    assert [t for t in shown[1] if len(t) > 2] == [["", "the", "I"]]
    assert shown[2] == [["white paper", "whitepaper", "C"], ["here", "here"], ["now", "", "D"]]
    assert "1 of 3 wrong: substitution cat as bat." in page.js(
        "return document.querySelector('.pair .unseen').textContent"
    )
    (first, second) = page.js(
        "return [...document.querySelector('#rows .pair').children].map(e => e.firstChild.textContent)"
    )
    assert (first, second) == ("ark 0.6b", "other")
    assert "not in this system's predictions" in page.js(
        "return document.querySelectorAll('#rows .pair')[2].textContent"
    )
    assert "Failed: the decoder failed" in page["rows"].text


def test_hostile_text_does_nothing(page: Page) -> None:
    page.open(
        Report(HOSTILE, (system(scored([row(HOSTILE, HOSTILE, HOSTILE, speaker=HOSTILE, flags=[HOSTILE])], HOSTILE)),))
    )
    assert len(page.ids) == 1
    assert page.js("return document.querySelectorAll('img').length + document.scripts.length") == 2
    assert "[U+202E]turned" in page["rows"].text
    assert not re.search("[\u202e\u0007]", page.js("return document.body.innerText"))
    page.js("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    assert page.js("return window.ran") is None
    (entry,) = page.driver.get_log("browser")  # type: ignore[no-untyped-call]
    assert "Content Security Policy" in entry["message"]


def download(page: Page, name: str, button: str) -> str:
    page.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(page.folder))
    page[button].click()
    page.until((page.folder / name).exists)
    return (page.folder / name).read_bytes().decode("utf-8")


def test_exports(page: Page) -> None:
    rows = [*ROWS[:3], row("f,\"'\n", "=1+1", '@x\u202e, "y"'), row("zh", "你 好 吗", "你 a 吗")]
    page.open(Report("Exports", (system(scored(rows)),)))
    lines = list(csv.DictReader(io.StringIO(download(page, "utterances.csv", "csv"), newline="")))
    assert [line["id"] for line in lines] == ["a", "b", "c", "f,\"'\n", "zh"]
    assert [lines[0][f"{what} (ark 0.6b)"] for what in ("ref_tokens", "ins", "del", "sub")] == ["3", "0", "0", "1"]
    assert (lines[3]["reference"], lines[3]["hypothesis (ark 0.6b)"]) == ("'=1+1", '\'@x\u202e, "y"')
    assert {line["protocol"] for line in lines} == {"WER, not a leaderboard set, normalizer plain"}
    page.set("errors", "sub")
    blocks = download(page, "alignments.txt", "pra").split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["id: (a)", "id: (f,\"' )", "id: (zh)"]
    assert blocks[0].splitlines()[3:] == [
        "Scores: (#C #S #D #I) 2 1 0 0", "REF:  the CAT sat", "HYP:  the BAT sat", "Eval:     S",
    ]  # fmt: skip
    assert blocks[2].splitlines()[4:] == ["REF:  你 好 吗", "HYP:  你 A  吗", "Eval:    S"]


def test_sound(page: Page, tmp_path: Path) -> None:
    for path in ("in side#.wav", "other.wav"):
        soundfile.write(tmp_path / path, np.zeros(16_000), 16_000)
    (tmp_path / "broken.wav").write_text("no sound")
    names = ("in side#.wav", str(tmp_path / "other.wav"), "gone.wav", "broken.wav")
    for embed in (False, True):
        page.open(
            Report("Sound", (system(scored([row(name, "x", "x", audio=name) for name in names])),)), embed_audio=embed
        )
        cells = (
            "return [...document.querySelectorAll('#rows tbody tr:first-child td:last-child')].map(e => e.textContent)"
        )
        assert page.js(cells) == ["Play", "Play", "no file gone.wav", "Play"]
        for button in page.driver.find_elements("css selector", "#rows td button"):
            button.click()
        page.until(lambda: page.js("return [...document.querySelectorAll('audio')].map(e => e.duration)") == [1, 1])
        assert page.js(cells)[3] == "the file cannot be played, or is gone"
        assert (
            all(page.js("return [...document.querySelectorAll('audio')].map(e => e.src.startsWith('data:'))")) == embed
        )


def test_a_keyboard_is_enough(page: Page) -> None:
    page.open(pair())

    def press(*keys: str) -> None:
        webdriver.ActionChains(page.driver).send_keys(*keys).perform()

    def focus() -> str:
        return str(page.js("return document.activeElement.id || document.activeElement.textContent"))

    press(Keys.TAB, Keys.ENTER)  # past the plots
    press(Keys.TAB)
    assert focus() == "text"
    press("white")
    assert page.ids == ["c"]
    reached = []
    for _ in range(16):
        press(Keys.TAB)
        reached.append(focus())
    for wanted in ("set", "speaker", "errors", "flag", "difference", "Reset", "csv", "pra", "Utterance", "Seconds"):
        assert wanted in reached
    page["text"].clear()
    page["filters"].find_element("id", "errors").send_keys("ins")
    assert page.ids == ["b"]
    page.reset()
    page.driver.find_element("css selector", "#rows thead button").send_keys(Keys.SPACE, Keys.SPACE)
    assert page.ids[0] == "z"


def test_pages_of_forty_thousand(page: Page) -> None:
    small_report = many(4000, 1, errors=0.005)
    rows = small_report.systems[0].scores[0].rows
    more = tuple(
        replace(one, row=replace(one.row, x={**one.row.x, "id": f"{n}-{one.row.x['id']}"}))
        for n in range(10)
        for one in rows
    )
    score = replace(small_report.systems[0].scores[0], rows=more)
    page.open(Report("Many", (replace(small_report.systems[0], scores=(score,)),)))
    assert (len(page.ids), page["pages"].text) == (25, "of 1,600")
    start = time.monotonic()
    page.set("text", "utt-0123")
    assert page["status"].text.startswith("100 of 40,000 ")
    page.reset()
    page.sort("Error rate %")
    assert time.monotonic() - start < 8
    first = page.ids
    page["next"].click()
    second = page.ids
    assert not set(first) & set(second)
    page["previous"].click()
    assert page.ids == first
    assert not page["previous"].is_enabled()
    page.set("page", "99999")
    assert page["page"].get_attribute("value") == "1600"
    assert not page["next"].is_enabled()
    page.set("size", "100")
    assert (len(page.ids), page["pages"].text) == (100, "of 400")


def test_a_session_of_ten_thousand_words(page: Page) -> None:
    words = " ".join(["word"] * 10_000)
    page.open(Report("Long", (system(scored([row("call", words, words)])),)))
    assert page.js("return document.querySelectorAll('.aligned .t').length") == 400
    page.driver.find_element("css selector", "#rows button:not(thead button)").click()
    assert page.js("return document.querySelectorAll('.aligned .t').length") == 10_000


def brightness(page: Page) -> int:
    return int(page.js("return getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/)[0]"))


def test_themes_and_paper(page: Page) -> None:
    for theme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        page.open(small())
        assert (brightness(page) > 200) == (theme == "light")
        assert page["theme"].get_attribute("aria-pressed") == str(theme == "dark").lower()
        page["theme"].click()
        assert (brightness(page) > 200) == (theme == "dark")
        assert page["theme"].get_attribute("aria-pressed") == str(theme == "light").lower()
    page.cdp("Emulation.setEmulatedMedia", media="print")
    assert not page["filters"].is_displayed()
    assert page["rows"].is_displayed()


def test_without_scripts_tables_and_plots_remain(page: Page) -> None:
    page.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(small())
        shown = page.driver.find_element("tag name", "main").text
    finally:
        page.cdp("Emulation.setScriptExecutionDisabled", value=False)
    assert "33.33" in shown
    assert "needs JavaScript" in shown
    assert len(page.driver.find_elements("css selector", "figure svg")) == 2


def test_a_phone(page: Page) -> None:
    page.cdp("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    page.open(pair())
    wide = page.js("""
        return [...document.querySelectorAll('body *')].filter(e => !e.parentElement.closest('.wide, .unseen, svg'))
            .filter(e => e.getBoundingClientRect().right > 360).map(e => e.outerHTML.slice(0, 200))
    """)
    assert wide == []
    assert page.js("return document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(page: Page, axe: str, theme: str) -> None:
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    page.open(pair())
    page.sort("Utterance")
    page.js("for (const one of document.querySelectorAll('details')) one.open = true")
    page.js(axe)
    result = page.driver.execute_async_script("axe.run({ resultTypes: ['violations'] }).then(arguments[0])")
    found = {one["id"]: [node["html"][:200] for node in one["nodes"]][:4] for one in result["violations"]}
    assert found == {}
    assert len(result["passes"]) > 10
    if "REPORT_SCREENSHOT" in os.environ:
        page.driver.save_screenshot(f"{os.environ['REPORT_SCREENSHOT']}-{theme}.png")


def test_a_screen_reader_is_told(page: Page) -> None:
    page.open(pair())
    page.sort("Seconds")
    page.cdp("Accessibility.enable")
    nodes = [node for node in page.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes}
    plot = "Speed: RTFx, one H200; the numbers are in the table below"
    assert {
        ("navigation", "Parts of the report"), ("main", ""), ("region", "Summary"), ("region", "Utterances"),
        ("image", plot), ("searchbox", "Text or id"), ("combobox", "Errors"), ("status", ""), ("button", "Next"),
        ("group", "Export what is listed"), ("spinbutton", "Page"), ("columnheader", "Seconds"),
    } <= named  # fmt: skip
