"""What drives the page of `ark-asr serve`: a server whose answers a test decides, and a browser without a screen."""

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

import arkasr.server

PAGE = Path(arkasr.server.__file__).parent / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CUT = {"type": "cut"}  # instead of an event: the connection ends here

Event = dict[str, Any]


def delta(text: str, start: float, end: float) -> Event:
    return {"type": "transcript.text.delta", "delta": text, "segment_id": "0", "start": start, "end": end}


def done(text: str, seconds: float) -> Event:
    return {"type": "transcript.text.done", "text": text, "usage": {"type": "tokens", "seconds": seconds}}


def refusal(message: str, code: str | None = None) -> Event:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


@dataclass
class Stub:
    """Serves the page; a transcription streams what is put into `events`, until done, error or CUT."""

    origin: str = ""
    key: str | None = None
    models: tuple[str, ...] = ("tiny", "0.6b")
    refusal: tuple[int, dict[str, str], bytes] | None = None  # the answer instead of a stream
    upload_may_go_on: threading.Event = field(default_factory=threading.Event)
    events: "queue.Queue[Event]" = field(default_factory=queue.Queue)
    posts: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a browser went away in the middle of a stream

    def refuse(self, status: int, body: Event | bytes, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.refusal = (status, {name.replace("_", "-"): value for name, value in headers.items()}, data)

    def say(self, *events: Event) -> None:
        for event in events:
            self.events.put(event)


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "arkasr"} for name in stub.models]
                self.answer(200, {}, json.dumps({"object": "list", "data": models}).encode())
                return
            path = PAGE / (self.path[1:] or "index.html")
            self.answer(200, {"Content-Type": TYPES[path.suffix], "Content-Security-Policy": CSP}, path.read_bytes())

        def do_POST(self) -> None:
            length, body = int(self.headers["Content-Length"]), bytearray()
            while len(body) < length:
                if len(body) > length // 2:
                    stub.upload_may_go_on.wait()
                body += self.rfile.read(min(65536, length - len(body)))
            stub.posts.append((dict(self.headers), bytes(body)))
            if stub.refusal is not None:
                self.answer(*stub.refusal)
                return
            self.answer(200, {"Content-Type": "text/event-stream"}, b"")
            while (event := stub.events.get()) is not CUT:
                try:
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\r\n\r\n")
                except OSError:
                    stub.left.set()
                    return
                if event["type"] in {"transcript.text.done", "error"}:
                    return

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            if self.path.startswith("/v1") and stub.key and self.headers["Authorization"] != f"Bearer {stub.key}":
                status, headers, body = 401, {}, json.dumps(refusal("Unknown API key.", "invalid_api_key")).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Stub]:
    """A stub that runs."""
    stub = Stub()
    stub.upload_may_go_on.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub)) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stub.origin = f"http://127.0.0.1:{server.server_port}"
        yield stub
        stub.say(CUT)
        server.shutdown()


class Page:
    """The page in a browser, by the ids of its elements."""

    def __init__(self, driver: webdriver.Chrome, origin: str) -> None:
        self.driver = driver
        self.origins: list[str] = []
        self.get_log("browser")
        self.get_log("performance")
        self.visit(origin)

    def visit(self, origin: str) -> None:
        self.origins.append(origin)
        self.driver.get(origin)

    def get_log(self, kind: str) -> list[dict[str, Any]]:
        """What came since the last call."""
        return list(self.driver.get_log(kind))  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **parameters: object) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def until(self, true: Callable[[], object], *, within_s: float = 20) -> None:
        end = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < end, (self["status"].text, self["error"].text, self.segments)
            time.sleep(0.02)

    def choose(self, path: Path) -> None:
        self["file"].send_keys(str(path))
        self.until(lambda: self["name"].text)

    def transcribe(self, path: Path) -> None:
        self.choose(path)
        self.until(lambda: self["model"].get_attribute("value"))
        self["go"].click()

    def finished(self) -> None:
        self.until(self["go"].is_displayed)

    @property
    def segments(self) -> list[tuple[str, str]]:
        """Time and text of each."""
        return [(time, text) for time, text in self.js(
            "return [...document.querySelectorAll('#segments li')].map(li => [...li.children].map(e => e.innerText))"
        )]  # fmt: skip

    @property
    def playing(self) -> list[str]:
        return list(self.js("return [...document.querySelectorAll('[aria-current]')].map(e => e.lastChild.innerText)"))

    @property
    def focus(self) -> str:
        """Id, or else text, of what has the focus."""
        element = self.driver.switch_to.active_element
        return element.get_attribute("id") or element.text

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def check(self) -> None:
        """Fail for requests elsewhere, violations of the CSP and errors of the scripts."""
        for entry in self.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                ours = (f"{scheme}{origin}/" for origin in self.origins for scheme in ("", "blob:"))
                assert url.startswith((*ours, "data:", "about:")), url
        # Chromium reports each answer of 400 and above as an error of the network; those are the tests' own.
        assert [entry for entry in self.get_log("browser") if entry["source"] != "network"] == []


def needed(program: str) -> str:
    """Its path; a laptop without it skips, CI fails."""
    path = shutil.which(program)
    if path is None:
        if "CI" in os.environ:
            pytest.fail(f"{program} is missing, and CI must run these tests")
        pytest.skip(f"{program} is missing: apt-get install chromium chromium-driver")
    return path


@contextmanager
def browser(*flags: str) -> Iterator[webdriver.Chrome]:
    """Chromium without a screen; it knows no host but this one, which it also calls page.test."""
    options = webdriver.ChromeOptions()
    options.binary_location = needed("chromium")
    rules = "MAP page.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking",
        "--window-size=1000,1000", f"--host-resolver-rules={rules}", *flags,
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(needed("chromedriver"))
    driver = webdriver.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()


def downloaded(page: Page, folder: Path) -> dict[str, str]:
    """What the four buttons save, by ending."""
    page.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    contents = {}
    stem = Path(page["name"].text).stem
    for ending in ("txt", "srt", "vtt", "json"):
        page["downloads"].find_element("css selector", f"[value={ending}]").click()
        path = folder / f"{stem}.{ending}"
        page.until(path.exists)
        contents[ending] = path.read_text(encoding="utf-8")
    return contents


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    with browser() as driver:
        yield driver


@contextmanager
def visit(driver: webdriver.Chrome, origin: str) -> Iterator[Page]:
    """The page of a server; fails at the end as `Page.check` does."""
    page = Page(driver, origin)
    yield page
    page.check()
    driver.get("about:blank")
    for command in ("Emulation.clearDeviceMetricsOverride", "Emulation.setEmulatedMedia"):
        page.cdp(command)
