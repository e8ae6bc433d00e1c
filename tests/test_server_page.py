"""The page of `ark-asr serve` in a real browser, against a stub whose every answer a test decides.

Unusual: each test also fails when the page asked anything of another origin, or wrote an error to the console.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pysubs2
import pytest
import soundfile
import webvtt
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from page_browser import CUT, Event, Page, Stub, chromium, delta, done, downloaded, refusal, serving, visit

__all__ = ["chromium"]  # a fixture is used by its name
pytestmark = pytest.mark.browser
AXE_VERSION = "4.14.1"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as stub:
        yield stub


@pytest.fixture
def page(chromium: webdriver.Chrome, stub: Stub) -> Iterator[Page]:
    with visit(chromium, stub.origin) as page:
        yield page


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Four seconds that any browser plays."""
    path = tmp_path / "lecture.wav"
    soundfile.write(path, np.zeros(64_000), 16_000)
    return path


# --- against the stub --------------------------------------------------------------------------------------------


def test_text_appears_as_it_is_heard(page: Page, stub: Stub, clip: Path) -> None:
    page.choose(clip)
    page.until(lambda: page["model"].text.split() == ["tiny", "0.6b"])
    page["model"].send_keys("0.6b")
    page["go"].click()
    page.until(lambda: page["status"].text == "Listening")
    stub.say(delta("one two", 0.5, 1.0))
    page.until(lambda: page.segments == [("0:00", "one two")])
    stub.say(delta(" three", 2.0, 3.25))
    page.until(lambda: page.segments == [("0:00", "one two"), ("0:02", "three")])
    assert page["heard"].text == "heard up to 0:03 of 0:04"
    assert float(page["progress"].get_attribute("value") or 0) == pytest.approx(3.25 / 4)
    assert not page["go"].is_displayed()
    stub.say(done("one two three", 4.0))
    page.finished()
    assert (page["status"].text, page["error"].text) == ("Done: 0:04 of audio.", "")
    assert not page["running"].is_displayed()
    headers, body = stub.posts[0]
    assert "Authorization" not in headers
    for name, value in {"model": "0.6b", "response_format": "json", "stream": "true", "include[]": "segments"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body
    assert clip.read_bytes() in body


def test_nothing_heard(page: Page, stub: Stub, clip: Path) -> None:
    stub.say(done("", 4.0))
    page.transcribe(clip)
    page.finished()
    assert (page["status"].text, page.segments) == ("Done: no speech was found.", [])
    assert not page["tools"].is_displayed()


@pytest.mark.parametrize(
    ("status", "headers", "body", "shown"),
    [
        (400, {}, refusal("cannot be read:\n  no format we know"), "Cannot be read: no format we know."),
        (413, {}, refusal("500 MB at most."), "The file is too large: 500 MB at most."),
        (429, {"Retry_After": "1"}, refusal("60 a day"), "A limit is reached: 60 a day; try again in 1 second."),
        (429, {"Retry_After": "5400"}, refusal("60 a day."), "A limit is reached: 60 a day; try again in 90 minutes."),
        (429, {"Retry_After": "9"}, refusal("60; try again in 9 s"), "A limit is reached: 60; try again in 9 s."),
        (503, {"Retry_After": "7200"}, refusal("Busy."), "Busy; try again in 2 hours."),
        (502, {}, b"<h1>Bad Gateway</h1>", "The server answered 502."),
    ],
)  # fmt: skip
def test_refusals(
    page: Page, stub: Stub, clip: Path, status: int, headers: dict[str, str], body: Event | bytes, shown: str
) -> None:
    stub.refuse(status, body, **headers)
    page.transcribe(clip)
    page.finished()
    assert (page["error"].text, page["status"].text, page.segments) == (shown, "Stopped.", [])
    assert page["error"].get_attribute("role") == "alert"
    stub.refusal = None
    stub.say(delta("again", 0, 1), done("again", 4.0))
    page["go"].click()
    page.until(lambda: page["status"].text.startswith("Done"))
    assert page["error"].text == ""


@pytest.mark.parametrize(
    ("last", "shown"),
    [
        ({"type": "error", "error": {"message": "Out of <b>memory</b>."}}, "Out of <b>memory</b>."),
        (CUT, "The answer ended early; the text up to there is kept."),
    ],
)
def test_a_stream_that_fails_keeps_its_text(page: Page, stub: Stub, clip: Path, last: Event, shown: str) -> None:
    stub.say(delta("one", 0.5, 1.0), last)
    page.transcribe(clip)
    page.finished()
    assert (page["error"].text, page["status"].text) == (shown, "Stopped; heard up to 0:01.")
    assert page.segments == [("0:00", "one")]
    assert page["copy"].is_displayed()


def test_a_server_that_is_gone(page: Page, clip: Path) -> None:
    page.until(lambda: page["model"].get_attribute("value"))
    page.cdp("Network.enable")
    page.cdp("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    page.transcribe(clip)
    page.finished()
    page.cdp("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    assert "the server is gone" in page["error"].text


def test_key(page: Page, stub: Stub, clip: Path) -> None:
    stub.key = "sk-right"
    page.driver.refresh()
    page.until(lambda: page["error"].text == "This server asks for an API key.")
    assert page["key"].is_displayed()
    assert page["key"].get_attribute("type") == "password"
    page["key"].send_keys("sk-wrong", Keys.TAB)
    page.until(lambda: page["error"].text == "The API key is refused: Unknown API key.")
    page["key"].send_keys("é")
    page.choose(clip)
    page["go"].click()
    page.until(lambda: page["error"].text == "The API key has characters that no key has; copy it again.")
    page["key"].clear()
    page["key"].send_keys("sk-right", Keys.TAB)
    page.until(lambda: page["model"].text.split() == ["tiny", "0.6b"])
    assert page["error"].text == ""
    stub.say(delta("one", 0, 1), done("one", 4.0))
    page["go"].click()
    page.until(lambda: page["status"].text.startswith("Done"))
    assert stub.posts[-1][0]["Authorization"] == "Bearer sk-right"


def test_a_key_is_remembered_only_if_asked(page: Page) -> None:
    stored = "return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie, location.href])"
    page.js("document.getElementById('access').open = true")
    page["key"].send_keys("sk-secret", Keys.TAB)
    assert "sk-secret" not in page.js(stored)
    page.driver.refresh()
    assert page["key"].get_attribute("value") == ""
    page["access"].click()
    page["key"].send_keys("sk-secret")
    page["remember"].click()
    page.driver.refresh()
    assert page["key"].get_attribute("value") == "sk-secret"
    assert page["remember"].is_selected()
    assert "sk-secret" not in page.js("return JSON.stringify([{...localStorage}, document.cookie, location.href])")
    page["remember"].click()
    assert "sk-secret" not in page.js(stored)
    page.driver.refresh()
    assert page["key"].get_attribute("value") == ""


def test_cancel(page: Page, stub: Stub, clip: Path) -> None:
    page.transcribe(clip)
    stub.say(delta("one", 0.5, 1.0))
    page.until(lambda: page.segments)
    page["cancel"].click()
    page.finished()
    assert (page["status"].text, page["error"].text) == ("Stopped; heard up to 0:01.", "")
    assert page.segments == [("0:00", "one")]
    for _ in range(200):  # a server notices when it writes
        stub.say(delta("two", 2.0, 3.0))
        if stub.left.wait(0.02):
            break
    assert stub.left.is_set()
    assert len(page.segments) == 1
    while not stub.events.empty():
        stub.events.get()
    stub.say(delta("three", 0, 1), done("three", 4.0))
    page["go"].click()
    page.until(lambda: page["status"].text.startswith("Done"))
    assert [text for _, text in page.segments] == ["three"]


def test_progress_of_an_upload(page: Page, stub: Stub, tmp_path: Path) -> None:
    stub.upload_may_go_on.clear()
    (tmp_path / "large.wav").write_bytes(bytes(40_000_000))
    page.transcribe(tmp_path / "large.wav")
    page.until(lambda: page["heard"].text.startswith("sent "))
    page.until(lambda: 40 <= int(page["heard"].text.split()[1]) < 100)
    assert page["status"].text == "Sending"
    assert 0.4 <= float(page["progress"].get_attribute("value") or 0) < 1
    stub.upload_may_go_on.set()
    page.until(lambda: page["status"].text == "Listening")
    assert page["progress"].get_attribute("value") is None or page.js("return progress.position") == -1
    stub.say(done("", 4.0))
    page.finished()


def test_what_others_wrote_is_text(page: Page, stub: Stub, clip: Path) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)<&sol;script>"
    stub.models = (attack,)
    page.driver.refresh()
    named = clip.rename(clip.with_name(f"{attack}.wav"))
    stub.say(delta(attack, 0, 1), {"type": "error", "error": {"message": attack}})
    page.transcribe(named)
    page.finished()
    assert page.segments == [("0:00", attack)]
    assert page["error"].text == page["model"].text == attack
    assert page["name"].text == f"{attack}.wav"
    assert page.js("return document.images.length + document.scripts.length") == 1


def test_a_dropped_file(page: Page, stub: Stub) -> None:
    drop = """
      const data = new DataTransfer();
      for (const name of arguments) data.items.add(new File(["RIFF"], name));
      for (const type of ["dragover", "drop"]) {
        const event = new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
        if (document.querySelector("h1").dispatchEvent(event)) throw new Error(type);
      }"""
    page.js(drop, "a.wav", "b.wav")
    assert page["name"].text == "a.wav"
    assert page["status"].text == "One file at a time: this is the first of 2."
    assert page["drop"].get_attribute("class") == ""
    page.until(lambda: page["model"].text)
    page["go"].click()
    page.js(drop, "c.wav")  # ignored during a job, as the buttons are disabled
    assert page["name"].text == "a.wav"
    stub.say(done("", 1.0))
    page.finished()
    page.js(drop, "c.wav")
    assert page["name"].text == "c.wav"


def test_a_file_the_browser_cannot_play(page: Page, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "odd.wma").write_bytes(b"no audio at all")
    stub.say(delta("one", 0, 1), done("one", 4.0))
    page.transcribe(tmp_path / "odd.wma")
    page.finished()
    assert page["unplayable"].is_displayed()
    assert not page["audio"].is_displayed()
    assert page.js("return [...document.querySelectorAll('#segments button')].map(b => b.disabled)") == [True]
    assert page["heard"].get_attribute("textContent") == "heard up to 0:01"


def test_playing(page: Page, stub: Stub, clip: Path) -> None:
    stub.say(delta("one", 0.4, 1.0), delta(" two", 1.0, 1.6), delta(" three", 2.6, 4.0), done("one two three", 4.0))
    page.transcribe(clip)
    page.finished()
    assert page.playing == []
    page.js("document.querySelectorAll('#segments button')[1].click()")
    page.until(lambda: page.playing == ["two"])
    assert 1.0 <= page.js("return audio.currentTime") < 1.8
    page.until(lambda: page.playing == [])  # the pause between them
    page.until(lambda: page.playing == ["three"])
    page.js("audio.pause()")
    page.js("document.querySelectorAll('#segments button')[0].click()")
    page.until(lambda: page.playing == ["one"])
    assert not page.js("return audio.paused")
    assert page.js("return document.querySelector('[aria-current]').getAttribute('aria-current')") == "true"


def test_formats_of_awkward_text(page: Page, stub: Stub, clip: Path, tmp_path: Path) -> None:
    spoken = ["a < b & c", "7", "x --> y", "zwölf 語 🎵", "late"]
    texts = [*spoken[:4], "  \n ", " la\nte "]
    times = [(0.0004, 0.9), (0.9, 0.9), (0.5, 3600.5), (3600.4, 3725.25), (3726, 3727), (3726, 3727)]
    stub.say(*(delta(text, *span) for text, span in zip(texts, times, strict=True)), done(" ".join(spoken), 3727.0))
    page.transcribe(clip)
    page.finished()
    files = downloaded(page, tmp_path / "out")
    assert files["txt"] == " ".join(spoken) + "\n"
    cues = pysubs2.SSAFile.from_string(files["srt"], format_="srt", keep_html_tags=True)
    shown = ["a < b & c", "7", "x -- > y", "zwölf 語 🎵", "la te"]
    assert [cue.text for cue in cues] == shown
    spans = [(0, 900), (900, 901), (901, 3600400), (3600400, 3725250), (3726000, 3727000)]
    assert [(cue.start, cue.end) for cue in cues] == spans
    assert files["srt"].splitlines()[12:15] == ["4", "01:00:00,400 --> 01:02:05,250", "zwölf 語 🎵"]
    captions = webvtt.from_string(files["vtt"]).captions
    assert [caption.start_in_seconds for caption in captions] == [start // 1000 for start, _ in spans]
    assert files["vtt"].splitlines()[11] == "01:00:00.400 --> 01:02:05.250"
    assert [caption.raw_text for caption in captions][:3] == ["a &lt; b &amp; c", "7", "x -- &gt; y"]
    record = json.loads(files["json"])
    assert [(one["start"], one["end"]) for one in record["segments"]] == times
    assert (record["file"], record["duration"], record["text"]) == (clip.name, 3727.0, " ".join(spoken))


def test_copy(page: Page, stub: Stub, clip: Path) -> None:
    stub.say(delta("one", 0, 1), delta(" two", 2, 3), done("one two", 4.0))
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.transcribe(clip)
    page.finished()
    page["copy"].click()
    page.until(lambda: page["status"].text == "Copied.")
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == "one two"


def test_plain_http(page: Page, stub: Stub, clip: Path) -> None:
    """Without https a browser hides microphone and clipboard from every host but localhost."""
    assert page["record"].is_enabled()
    assert not page["insecure"].is_displayed()
    page.visit(stub.origin.replace("127.0.0.1", "page.test"))
    assert page.js("return isSecureContext") is False
    assert not page["record"].is_enabled()
    assert page["insecure"].is_displayed()
    stub.say(delta("plain", 0, 1), done("plain", 4.0))
    page.transcribe(clip)
    page.finished()
    page.js("addEventListener('copy', e => { window.copied = e.clipboardData.getData('text/plain') })")
    page["copy"].click()
    page.until(lambda: page["status"].text == "Copied.")
    assert page.js("return copied") == "plain"


def test_keyboard_alone(page: Page, stub: Stub, clip: Path) -> None:
    page.until(lambda: page["model"].text)
    order = []
    for _ in range(7):
        page.press(Keys.TAB)
        order.append(page.focus)
        seen = "document.querySelector(':focus-visible:not(#file), #file:focus-visible + label')"
        assert page.js(f"return getComputedStyle({seen}).outlineStyle") == "solid"
        if order[-1] == "API key":
            page.press(Keys.ENTER)
    assert order == ["theme", "file", "record", "model", "API key", "key", "remember"]
    page.choose(clip)
    page["remember"].click()
    page.press(Keys.TAB)
    while page.focus != "go":
        page.press(Keys.TAB)
    page.press(Keys.ENTER)
    page.until(lambda: page["status"].text == "Listening")
    assert page.focus == "cancel"
    stub.say(delta("one", 0.5, 2.0))
    page.until(lambda: page.segments)
    page.press(Keys.SPACE)
    page.finished()
    assert page.focus == "go"
    for name in ("copy", "txt", "srt", "vtt", "json", "0:00"):
        page.press(Keys.TAB)
        assert page.focus == name
    page.press(Keys.ENTER)
    page.until(lambda: page.playing == ["one"])


def prefer(page: Page, **media: str) -> None:
    features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
    page.cdp("Emulation.setEmulatedMedia", features=features)


def brightness(page: Page) -> int:
    """Of the background, 0 to 255."""
    return int(page.js("return getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/)[0]"))


def test_themes(page: Page) -> None:
    for theme, other in (("light", "dark"), ("dark", "light")):
        page.js("sessionStorage.clear()")
        prefer(page, color_scheme=theme)
        page.driver.refresh()
        assert (brightness(page) > 200) == (theme == "light")
        assert page["theme"].get_attribute("aria-pressed") == str(theme == "dark").lower()
        page["theme"].click()
        for _ in range(2):
            assert (brightness(page) > 200) == (other == "light")
            assert page["theme"].get_attribute("aria-pressed") == str(other == "dark").lower()
            page.driver.refresh()  # it stays
    page.js("sessionStorage.clear()")
    page.driver.refresh()
    prefer(page, color_scheme="light")
    page.until(lambda: page["theme"].get_attribute("aria-pressed") == "false")


def test_reduced_motion(page: Page) -> None:
    animated = "running.hidden = false; progress.removeAttribute('value'); return document.getAnimations().length"
    assert page.js(animated) == 1
    prefer(page, reduced_motion="reduce")
    assert page.js(animated) == 0


def test_a_phone(page: Page, stub: Stub, clip: Path) -> None:
    page.cdp("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    stub.models = ("an-organisation/a-model-of-a-very-long-name@0123456789abcdef0123456789abcdef01234567",)
    page.driver.refresh()
    page.js("access.open = true")
    stub.say(delta("Donaudampfschifffahrtsgesellschaft" * 3, 3600, 3605), done("", 4.0))
    page.transcribe(clip.rename(clip.with_name("a_recording_of_a_very_long_name_without_any_space_in_it.wav")))
    page.finished()
    wide = "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 360)"
    assert [element.get_attribute("outerHTML") for element in page.js(wide)] == []
    assert page.js("return document.documentElement.scrollWidth") <= 360
    buttons = page.driver.find_elements("css selector", "button, select, label.button")
    assert all(min(b.size.values()) >= 24 for b in buttons if b.is_displayed())  # WCAG 2.2's least target


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core, which is no dependency of ours."""
    path = Path(os.environ.get("AXE_CORE", "axe.min.js"))
    if not path.is_file():
        pytest.skip(f"AXE_CORE is not the path of axe.min.js: npm pack axe-core@{AXE_VERSION}, and unpack it")
    source = path.read_text(encoding="utf-8")
    assert source.startswith(f"/*! axe v{AXE_VERSION}\n")
    return source


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(page: Page, stub: Stub, clip: Path, axe: str, theme: str) -> None:
    def check() -> None:
        page.js(axe)
        result = page.driver.execute_async_script("axe.run({ resultTypes: ['violations'] }).then(arguments[0])")
        assert len(result["passes"]) > 10
        found = {one["id"]: [node["html"] for node in one["nodes"]] for one in result["violations"]}
        assert found == {}

    prefer(page, color_scheme=theme)
    page.until(lambda: page["model"].text)
    page["access"].click()
    check()
    page.transcribe(clip)
    page.until(lambda: page["status"].text == "Listening")
    check()
    stub.say(delta("one", 0, 1), delta(" two", 1, 4), {"type": "error", "error": {"message": "Out of memory."}})
    page.finished()
    page.js("document.querySelectorAll('#segments button')[1].click()")
    page.until(lambda: page.playing == ["two"])
    check()


def test_a_screen_reader_is_told(page: Page, stub: Stub, clip: Path) -> None:
    """The tree that screen readers get: names of all that can be operated, and what is read out when it changes."""
    stub.say(delta("one", 65, 66), done("one", 4.0))
    page.transcribe(clip)
    page.finished()
    page.cdp("Accessibility.enable")
    nodes = [node for node in page.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes}
    assert {
        ("button", "Choose a file"), ("button", "Record"), ("combobox", "Model"), ("button", "Transcribe"),
        ("button", "Copy"), ("group", "Download"), ("button", "Play from 1:05"), ("heading", "Transcript"),
        ("log", "Text"), ("status", ""), ("alert", ""),
    } <= named  # fmt: skip
    live = {
        node["role"]["value"]: [p["value"]["value"] for p in node["properties"] if p["name"] == "live"]
        for node in nodes
    }
    assert (live["log"], live["status"], live["alert"]) == (["polite"], ["polite"], ["assertive"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("NotAllowedError", "This page may not use the microphone; the browser's settings can allow it."),
        ("NotFoundError", "No microphone was found."),
    ],
)
def test_no_microphone(page: Page, name: str, shown: str) -> None:
    page.js(f"navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', '{name}'))")
    for _ in range(2):  # it can be tried again
        page["record"].click()
        page.until(lambda: page["error"].text == shown)
        assert page["record"].text == "Record"
        assert not page["take"].is_displayed()


def test_a_recording_is_whole(page: Page) -> None:
    """What was said just before "Stop" is in a block that is not full."""
    sent = page.driver.execute_async_script("""
      const finished = arguments[0];
      window.AudioWorkletProcessor = class {
        port = { sent: [], postMessage(block) { this.sent.push(block && [...block]); } };
      };
      window.registerProcessor = (_, Processor) => {
        const one = new Processor();
        for (let i = 0; i < 17; i++) one.process([[new Float32Array(128).fill(i / 8 - 1)]]);
        one.port.onmessage();
        finished(one.port.sent);
      };
      import("/recorder.js");
    """)
    assert [block and len(block) for block in sent] == [2048, 128, None]
    assert (sent[0][:2], sent[0][1024], sent[1][0]) == ([-32767, -32767], 0, 32767)
