"""The page of `ark-asr serve` in a real browser, against that server with the model tiny and real speech."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pysubs2
import pytest
import soundfile
import webvtt
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from arkasr import metrics
from page_browser import Page, browser, chromium, downloaded, visit

__all__ = ["chromium"]  # a fixture is used by its name
pytestmark = pytest.mark.browser
CLIP = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
CLIP_TEXT = "RUBOUT G M E F THREE NINE"
PAUSE_S = 2.0
PROGRAM = str(Path(sys.executable).with_name("ark-asr"))


@contextmanager
def ark_asr_serve(state: Path, *flags: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The server as a user starts it: its origin and process."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [PROGRAM, "serve", "--port", str(port), "--model", "tiny", "--state", str(state), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if "running on" in line:
                    break
            else:
                pytest.fail("the server ended")
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ark_asr_serve(tmp_path_factory.mktemp("state")) as (origin, _):
        yield origin


@pytest.fixture
def page(chromium: webdriver.Chrome, origin: str) -> Iterator[Page]:
    with visit(chromium, origin) as page:
        yield page


@pytest.fixture(scope="module")
def interview(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[float]]:
    """Utterances of the AN4 test set one after the other with pauses: the file, their texts, and where they start."""
    lines = (shared / "speech" / "an4" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    ones = [one for one in map(json.loads, lines) if one["split"] == "test" and one["duration"] > 2][:60]
    pieces: list[np.ndarray] = []
    starts: list[float] = []
    at = 0
    for one in ones:
        samples, rate = soundfile.read(shared / "speech" / "an4" / one["audio"])
        assert rate == 16_000
        starts.append(at / rate)
        pieces += [samples, np.zeros(int(PAUSE_S * rate))]
        at += len(samples) + int(PAUSE_S * rate)
    path = tmp_path_factory.mktemp("interview") / "an4 & more.flac"
    soundfile.write(path, np.concatenate(pieces), 16_000)
    return path, [one["text"] for one in ones], starts


def test_a_long_file(page: Page, interview: tuple[Path, list[str], list[float]], tmp_path: Path) -> None:
    path, texts, starts = interview
    page.choose(path)
    page.js("""
      window.seen = [];
      new MutationObserver(() => seen.push([segments.children.length, heard.textContent, go.hidden]))
        .observe(segments, { childList: true });
    """)
    page.until(lambda: page["model"].get_attribute("value") == "tiny")
    page["go"].click()
    page.until(lambda: page["status"].text.startswith("Done"), within_s=120)
    assert page["error"].text == ""

    heard = page.segments
    seen = page.js("return seen")
    assert seen[0][0] < len(heard) / 2  # text was there long before all of it
    assert all(running for _, _, running in seen)
    assert " of " in seen[0][1]

    assert metrics.word_errors(" ".join(texts), " ".join(text for _, text in heard)).rate < 0.1
    times = [sum(int(part) * 60**power for power, part in enumerate(reversed(time.split(":")))) for time, _ in heard]
    # An utterance may have a pause of its own, so there are segments that start elsewhere, too.
    assert all(min(abs(time - start) for time in times) < 1.5 for start in starts)

    page.js("document.querySelectorAll('#segments button')[30].click()")
    page.until(lambda: page.playing == [heard[30][1]])
    assert page.js("return audio.currentTime") == pytest.approx(times[30], abs=1.5)
    page.js("audio.pause()")
    page.js("scrollBy(0, copy.getBoundingClientRect().y - 20); copy.focus()")  # it must not hide under the player
    assert (
        page.js("const { x, y } = copy.getBoundingClientRect(); return document.elementFromPoint(x + 9, y + 9).id")
        == "copy"
    )

    files = downloaded(page, tmp_path)
    whole = " ".join(text for _, text in heard)
    assert files["txt"] == whole + "\n"
    record = json.loads(files["json"])
    assert (record["text"], record["usage"]["seconds"]) == (
        whole,
        pytest.approx(soundfile.info(path).duration, abs=0.01),
    )
    assert [one["text"] for one in record["segments"]] == [text for _, text in heard]
    cues = pysubs2.SSAFile.from_string(files["srt"], format_="srt")
    captions = webvtt.from_string(files["vtt"]).captions
    assert [cue.text for cue in cues] == [caption.text for caption in captions] == [text for _, text in heard]
    for cue, caption, one in zip(cues, captions, record["segments"], strict=True):
        assert cue.start == round(one["start"] * 1000)
        assert cue.end == round(one["end"] * 1000)
        assert caption.start_in_seconds == cue.start // 1000


def test_playing_and_copying(page: Page) -> None:
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.transcribe(CLIP)
    page.until(lambda: page["status"].text == "Done: 0:04 of audio.")
    assert page.segments == [("0:00", CLIP_TEXT)]
    page["segments"].find_element("tag name", "button").click()
    page.until(lambda: page.playing == [CLIP_TEXT])
    page.until(lambda: page.js("return audio.currentTime") > 0.6)
    page["copy"].click()
    page.until(lambda: page["status"].text == "Copied.")
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == CLIP_TEXT


def test_the_microphone(origin: str, tmp_path: Path) -> None:
    samples, rate = soundfile.read(CLIP)
    silence = np.zeros(rate)
    soundfile.write(tmp_path / "said.wav", np.concatenate([silence, samples, silence, silence]), rate)
    flags = (
        "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'said.wav'}%noloop",
    )  # fmt: skip
    with browser(*flags) as driver, visit(driver, origin) as page:
        page.until(lambda: page["model"].text)
        page["record"].click()
        page.until(lambda: page["record"].text == "Stop")
        assert not page["file"].is_enabled()
        page.until(lambda: float(page["level"].get_attribute("value") or 0) > 0.4)
        page.until(lambda: page["elapsed"].text == "0:06")
        page["record"].click()
        page.until(lambda: page["name"].text)
        assert page["name"].text.startswith("recording-")
        assert page["record"].text == "Record"
        page.until(lambda: page.js("return audio.duration") > 5.9)
        page["go"].click()
        page.until(lambda: page["status"].text.startswith("Done"))
        assert " ".join(text for _, text in page.segments) == CLIP_TEXT


def test_a_recorder_that_does_not_load_frees_the_microphone(origin: str) -> None:
    with (
        browser("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as driver,
        visit(driver, origin) as page,
    ):
        page.js("""
          const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
          navigator.mediaDevices.getUserMedia = async (what) => (window.stream = await ask(what));
          AudioWorklet.prototype.addModule = () => Promise.reject(new DOMException("", "NotFoundError"));
        """)
        page["record"].click()
        page.until(lambda: page["error"].text)
        assert page.js("return stream.getTracks().map(({ readyState }) => readyState)") == ["ended"]


def test_what_a_server_refuses(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    command = [PROGRAM, "keys", "create", "clinic", "--requests-per-minute", "1", "--state", str(tmp_path)]
    secret = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    soundfile.write(tmp_path / "large.wav", np.zeros(1_000_000), 16_000)
    with ark_asr_serve(tmp_path, "--max-upload-mb", "1") as (origin, _), visit(chromium, origin) as page:
        page.until(lambda: page["error"].text == "This server asks for an API key.")
        page["key"].send_keys("ark-wrong", Keys.TAB)
        page.until(lambda: page["error"].text.startswith("The API key is refused: "))
        page["key"].clear()
        page["key"].send_keys(secret, Keys.TAB)
        page.transcribe(tmp_path / "large.wav")
        page.finished()
        assert page["error"].text.startswith("The file is too large: ")
        page.transcribe(CLIP)
        page.finished()
        assert page["error"].text.startswith("A limit is reached: ")
        assert page["error"].text.count("try again in ") == 1


def test_what_is_no_audio(page: Page, tmp_path: Path) -> None:
    (tmp_path / "no.wav").write_bytes(b"not audio" * 100)
    page.transcribe(tmp_path / "no.wav")
    page.finished()
    assert page["error"].text.startswith("The audio: not readable as audio")
    assert page["unplayable"].is_displayed()


def test_a_server_that_ends(
    chromium: webdriver.Chrome, interview: tuple[Path, list[str], list[float]], tmp_path: Path
) -> None:
    with ark_asr_serve(tmp_path) as (origin, server), visit(chromium, origin) as page:
        page.transcribe(interview[0])
        page.until(lambda: page.segments)
        server.kill()
        page.finished()
        assert page["error"].text == "The connection broke; the text up to there is kept."
        assert page["status"].text.startswith("Stopped; heard up to ")
        assert page["copy"].is_displayed()
        page["go"].click()
        page.until(lambda: "the server is gone" in page["error"].text)
        page.finished()
