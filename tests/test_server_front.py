"""`ark-asr serve --engine openai` before an endpoint that tells text alone, fails in every way, dies and comes back.

The endpoint is a stand-in that does what the name of the model says; tests/test_server_contract.py has real ones.
"""

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import soundfile
from openai.types.audio.transcription_verbose import TranscriptionVerbose
from pydantic import TypeAdapter

from arkasr.server.backend import FRESH_S, BackEnd
from arkasr.server.keys import KEYS, Limits, create_key
from serving import Server, free_port, metric, program, serve, serve_front

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
CLIP_TEXT = "RUBOUT G M E F THREE NINE"
CLIP_S = 4
RATE = 16_000
SECRET, PRIVATE = "key-of-the-back-end", "http://10.1.2.3/private"
PATIENCE_S = 3  # of the front end with a request
PARALLEL = 3
# What the stand-in does, by the model's name; each but the first lets the request fail.
WAYS = ("well", "500", "401", "404", "302", "html", "nothing", "list", "reset", "silent")
FAILING = WAYS[1:]


class Endpoint(ThreadingHTTPServer):
    """A stand-in that counts what it is asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answer)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()  # by model, and requests for the list of models
        self.order: list[str] = []
        self.keys: set[str | None] = set()
        self.now, self.most = Counter[str](), Counter[str]()  # requests of a model at once
        self.warmest = 0.0
        self.listed = 200
        self.failing = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """Clients that go are part of the tests."""


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Endpoint
    counted = ""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked["GET"] += 1
        self.server.keys.add(self.headers["authorization"])
        status = 200 if self.path == "/elsewhere" else self.server.listed
        self._send(status, b'{"object": "list", "data": []}', location="/elsewhere")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        found = re.search(rb'name="model"\r\n\r\n(.*?)\r\n', body)
        assert found
        model, server = found[1].decode(), self.server
        warmth = re.search(rb'name="temperature"\r\n\r\n(.*?)\r\n', body)
        assert warmth
        with server.lock:
            server.keys.add(self.headers["authorization"])
            server.asked[model] += 1
            server.order.append(model)
            server.warmest = max(server.warmest, float(warmth[1]))
            count = server.asked[model]
            server.now[model] += 1
            server.most[model] = max(server.most[model], server.now[model])
        self.counted = model
        self._answer(model, count)
        self._done()

    def _done(self) -> None:
        """Before the answer is sent, for then the next request may be there before this thread goes on."""
        with self.server.lock:
            self.server.now[self.counted] -= 1
            self.counted = ""

    def _answer(self, model: str, count: int) -> None:
        text = json.dumps({"text": f" {model} {count}"}).encode()
        match model:
            case "500":
                self._send(500, json.dumps({"error": {"message": f"see {PRIVATE}"}}).encode())
            case "401" | "404":
                self._send(int(model), json.dumps({"error": {"message": f"{SECRET} at {PRIVATE}"}}).encode())
            case "302":
                self._send(302, b"", location=f"{self.server.url}/models")
            case "html" | "nothing" | "list":
                self._send(200, {"html": b"<p>" + PRIVATE.encode(), "nothing": b"", "list": b'["text"]'}[model])
            case "reset":
                self.connection.shutdown(socket.SHUT_RDWR)
            case "silent":
                time.sleep(PATIENCE_S + 2)
            case "half" if count > 3:
                self._send(401, b"")
            case "again":
                self._send(200, json.dumps({"text": "NO " * 60}).encode())
            case _ if self.server.failing:
                self._send(503, b"")
            case "busy" if count == 1:
                self._send(429, b"", **{"retry-after": "1"})
            case "slow" | "slower":
                time.sleep({"slow": 0.15, "slower": 0.3}[model])
                self._send(200, text)
            case _:
                self._send(200, text)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self._done()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@dataclass(frozen=True)
class Front:
    """A front end, and what its key is sent as."""

    server: Server
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, model: str, file: bytes | None = None, path: str = "/v1/audio/transcriptions", **data: Any) -> Any:
        name = "audio" if path == "/transcribe" else "file"
        fields = {"model": model, **data} if path.startswith("/v1") else data
        files = {name: file or CLIP.read_bytes()}
        return httpx2.post(self.server.url + path, files=files, data=fields, headers=self.headers, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.server, name, headers=self.headers, **labels)


def until(happened: Any, *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def back() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        yield endpoint
        endpoint.shutdown()


MODELS = (*WAYS, "half", "busy", "slow", "slower", "again")


@pytest.fixture(scope="module")
def front(back: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """With little patience."""
    more = [flag for model in MODELS[1:] for flag in ("--model", model)]
    state = tmp_path_factory.mktemp("front")
    flags = [*more, "--request-timeout-s", PATIENCE_S, "--parallel", PARALLEL]
    secret = create_key(state / KEYS, "ann", Limits())[1]
    with serve_front(state, back.url, *flags, key=SECRET, model=MODELS[0]) as server:
        yield Front(server, {"authorization": f"Bearer {secret}"})


@pytest.fixture(scope="module")
def many() -> bytes:
    """A recording of a minute, which has a dozen spans."""
    clip = soundfile.read(CLIP, dtype="float32")[0]
    out = io.BytesIO()
    soundfile.write(out, np.tile(np.concatenate([clip, np.zeros(RATE, np.float32)]), 12), RATE, format="FLAC")
    return out.getvalue()


def events(answer: Any) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


# --- what text alone can tell ------------------------------------------------------------------------------------


def test_text_alone_is_served_in_every_form(front: Front, back: Endpoint) -> None:
    before = back.asked["well"]
    assert front.post("well").json()["text"] == f"well {before + 1}"
    assert back.keys == {f"Bearer {SECRET}"}
    assert front.post("well", response_format="srt").text.startswith("1\n00:00:00,")
    verbose = front.post("well", response_format="verbose_json")
    strict = TypeAdapter(TranscriptionVerbose).validate_json(verbose.text, strict=True)
    (segment,) = strict.segments or []
    assert (segment.tokens, segment.avg_logprob) == ([], 0)
    assert segment.model_extra == {"confidence": 0, "flags": []}
    stt = front.post("well", path="/transcribe", confidence_threshold_override=0).json()
    assert (stt["confidence"], stt["below_threshold"]) == (0, False)
    assert front.post("well", path="/transcribe", confidence_threshold_override=0.01).json()["below_threshold"]
    delta, done = events(front.post("well", stream="true"))
    assert delta["delta"] == done["text"] == f"well {before + 6}"
    assert done["usage"] == {"type": "duration", "seconds": CLIP_S}
    assert front.post("well", path="/asr").json()["prompt_tokens"] is None


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/audio/transcriptions", {"include": "logprobs"}),
        ("/v1/audio/transcriptions", {"include": "logprobs", "stream": "true"}),
        ("/v1/audio/transcriptions", {"max_new_tokens": 2}),
        ("/asr", {"max_new_tokens": 2}),
        ("/asr", {"temperature": 1.5}),
    ],
)
def test_what_it_cannot_do_is_refused_before_it_is_asked_for(
    front: Front, back: Endpoint, path: str, asked: dict[str, Any]
) -> None:
    before = back.asked.total()
    answer = front.post("well", path=path, **asked)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", next(iter(asked)))
    assert "at a back end" in error["message"]
    assert back.asked.total() == before


def test_the_token_mask_is_not_told(front: Front) -> None:
    answer = httpx2.get(f"{front.server.url}/token-mask", headers=front.headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_supported")


# --- what fails --------------------------------------------------------------------------------------------------


def test_a_failure_is_the_back_ends_and_says_nothing_of_it(front: Front, back: Endpoint) -> None:
    """Whatever the endpoint does, a wrong key of the front end's included; other models go on meanwhile."""

    def counts() -> dict[str, tuple[float, float]]:
        names = "arkasr_clips_total", "arkasr_clips_failed_total"
        return {way: (front.metric(names[0], model=way), front.metric(names[1], model=way)) for way in ("html", "well")}

    before, rejected = counts(), front.metric("arkasr_rejected_total", reason="upstream_failed")
    with ThreadPoolExecutor(len(FAILING)) as pool:
        answers = pool.map(front.post, FAILING)
        assert front.post("well").status_code == 200
    for way, answer in zip(FAILING, answers, strict=True):
        assert answer.status_code == 502, way
        assert answer.json()["error"] == {
            "message": "the back end gave no answer; try again", "type": "server_error", "param": None,
            "code": "upstream_failed",
        }, way  # fmt: skip
        assert answer.headers["retry-after"] == "5"
    after = counts()
    assert [now - then for now, then in zip(after["html"], before["html"], strict=True)] == [0, 1]
    assert [now - then for now, then in zip(after["well"], before["well"], strict=True)] == [1, 0]
    assert front.metric("arkasr_rejected_total", reason="upstream_failed") == rejected + len(FAILING)
    assert front.metric("arkasr_tokens_total") == 0
    assert front.metric("arkasr_stage_seconds_count", stage="answer") > 0
    log = front.server.log.read_text()
    for told in (f"HTTP 401 '{SECRET} at {PRIVATE}'", f"HTTP 404 '{SECRET} at {PRIVATE}'", "HTTP 302"):
        assert told in log
    assert "Traceback" not in log
    assert back.asked["401"] == back.asked["404"] == back.asked["302"] == 1  # it is of no use to ask again
    assert back.asked["500"] > 1


def test_one_who_asks_to_wait_is_waited_for(front: Front) -> None:
    started = time.monotonic()
    assert front.post("busy").json()["text"] == "busy 2"
    assert time.monotonic() - started > 1


def test_a_stream_ends_in_an_error_and_only_what_was_sent_is_charged(front: Front, many: bytes) -> None:
    said = events(front.post("half", many, stream="true", include="segments"))
    assert [one["type"] for one in said] == ["transcript.text.delta"] * 2 + ["error"]  # the third waits for its end
    assert (said[-1]["error"]["code"], said[-1]["error"]["type"]) == ("upstream_failed", "server_error")
    assert front.post("half").status_code == 502
    until(lambda: front.metric("arkasr_requests_in_work") == 0)
    rows = [line.split("\t") for line in program("usage", state=front.server.state).splitlines()[1:]]
    used = {row[1]: (int(row[2]), Fraction(row[3])) for row in rows}
    assert used["half"] == (1, Fraction(str(said[1]["end"])))
    assert not used.keys() & set(FAILING)


def test_what_is_in_doubt_is_heard_again_no_warmer_than_openai_allows(front: Front, back: Endpoint) -> None:
    """It was asked for at 1.8, of which a request that was in order failed."""
    before, back.warmest = back.asked["again"], 0.0
    said = front.post("again", temperature=0.9, response_format="verbose_json").json()
    assert "repetitive" in said["segments"][0]["flags"]
    assert back.asked["again"] > before + 1
    assert back.warmest == 1


def test_who_goes_is_not_asked_for_any_more(front: Front, back: Endpoint, many: bytes) -> None:
    before = back.asked["slower"]
    request = httpx2.Request("POST", front.server.url, files={"file": many}, data={"model": "slower"})
    with closing(http.client.HTTPConnection("127.0.0.1", front.server.port)) as connection:
        sent = {"content-type": request.headers["content-type"], **front.headers}
        connection.request("POST", "/v1/audio/transcriptions", request.read(), sent)
        until(lambda: back.asked["slower"] > before)
    until(lambda: front.metric("arkasr_requests_in_work") == 0, seconds=2)
    asked = back.asked["slower"]
    time.sleep(0.7)
    assert back.asked["slower"] == asked < before + 2 * PARALLEL


# --- sharing -----------------------------------------------------------------------------------------------------


def test_spans_are_asked_for_side_by_side_and_the_short_go_before_the_rest_of_the_long(
    front: Front, back: Endpoint, many: bytes
) -> None:
    back.order = []
    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(front.post, "slow", many) for _ in range(2)]
        until(lambda: len(back.order) > 4)
        short = front.post("slow")
        so_far = len(back.order)
        assert {one.result().status_code for one in long} == {short.status_code} == {200}
    assert back.most["slow"] == PARALLEL
    assert len(back.order) == 2 * 12 + 1
    assert so_far < 2 * 12


# --- readiness ---------------------------------------------------------------------------------------------------


def lives(back_end: BackEnd) -> bool:
    with closing(back_end.engine("m")):
        return asyncio.run(back_end.lives())


def test_what_counts_as_living(back: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key goes nowhere else, and an endpoint that does not list its models may yet serve them."""
    monkeypatch.setenv("A_KEY", SECRET)
    found = {}
    try:
        for back.listed in (200, 302, 401, 403, 404, 405, 429, 500, 503):
            asked = back.asked["GET"]
            found[back.listed] = lives(BackEnd(back.url, key_variable="A_KEY"))
            assert back.asked["GET"] == asked + 1
    finally:
        back.listed = 200
    assert {status for status, lives in found.items() if lives} == {200, 404, 405, 429}
    assert not lives(BackEnd(f"http://127.0.0.1:{free_port()}/v1"))


def test_ready_when_the_back_end_is(front: Front, back: Endpoint) -> None:
    def ready() -> tuple[int, set[str]]:
        answer = httpx2.get(f"{front.server.url}/ready")
        assert answer.json()["ready"] == (answer.status_code == 200)
        return answer.status_code, set(answer.json()["models"].values())

    try:
        back.listed = 401
        until(lambda: ready() == (503, {"unreachable"}), seconds=5)
        assert httpx2.get(f"{front.server.url}/health").status_code == 200
        assert front.post("again").status_code == 200  # it is tried nevertheless
    finally:
        back.listed = 200
    until(lambda: ready()[0] == 200, seconds=5)
    before, since = back.asked["GET"], time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert {one[0] for one in pool.map(lambda _: ready(), range(40))} == {200}
    assert back.asked["GET"] - before <= 1 + (time.monotonic() - since) / FRESH_S  # however many ask


# --- death -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_back_end_that_is_killed_and_started_again_is_not_seen(tmp_path: Path, many: bytes) -> None:
    """Requests in the middle of it are asked for again, and the front end is the same process."""
    port = free_port()
    with ExitStack() as stack:
        first = stack.enter_context(serve(tmp_path / "back", port=port))
        front = Front(stack.enter_context(serve_front(tmp_path / "front", f"{first.url}/v1")))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        alone = front.post("tiny", many).json()["text"]
        assert alone.count(CLIP_TEXT) == 12
        before = front.metric("arkasr_clips_total")
        asked = [pool.submit(front.post, "tiny", many) for _ in range(4)]
        until(lambda: front.metric("arkasr_clips_total") > before + 2)
        first.process.kill()
        first.process.wait()
        assert not any(one.done() for one in asked)
        until(lambda: httpx2.get(f"{front.server.url}/ready").status_code == 503, seconds=5)
        stack.enter_context(serve(tmp_path / "back", port=port))
        assert [one.result().json()["text"] for one in asked] == [alone] * 4
        until(lambda: httpx2.get(f"{front.server.url}/ready").status_code == 200, seconds=5)
        assert front.post("tiny").json()["text"] == CLIP_TEXT


def test_a_back_end_that_stays_dead_is_told_and_needs_no_restart_of_the_front(tmp_path: Path, many: bytes) -> None:
    port = free_port()
    with ExitStack() as stack:
        first = stack.enter_context(serve(tmp_path / "back", port=port))
        flags = ["--request-timeout-s", 2]
        front = Front(stack.enter_context(serve_front(tmp_path / "front", f"{first.url}/v1", *flags)))
        client = stack.enter_context(openai.OpenAI(base_url=f"{front.server.url}/v1", api_key="none", max_retries=0))
        create = client.audio.transcriptions.create
        heard = create(file=many, model="tiny", stream=True)
        assert next(iter(heard)).type == "transcript.text.delta"
        first.process.kill()
        first.process.wait()
        with pytest.raises(openai.APIError) as cut:
            list(heard)
        assert cut.value.code == "upstream_failed"
        with pytest.raises(openai.InternalServerError) as caught:
            create(file=CLIP, model="tiny")
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_failed")
        assert str(port) not in caught.value.response.text
        assert f"127.0.0.1:{port}" in front.server.log.read_text()
        stack.enter_context(Endpoint(port))
        assert create(file=CLIP, model="tiny").text == "tiny 1"


def balanced(folder: Path, port: int, back_ports: list[int]) -> list[str]:
    """The command of an nginx with our file, changed in ports."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    site = (ROOT / "deploy" / "back-ends.nginx.conf").read_text()
    changes = {"127.0.0.1:8200;": f"127.0.0.1:{port};"}
    site = site.replace("fail_timeout=5s", "fail_timeout=1s")
    changes |= {f"10.0.0.1{n}:8000": f"127.0.0.1:{back}" for n, back in enumerate(back_ports, start=1)}
    for before, after in changes.items():
        assert site.count(before) == 1
        site = site.replace(before, after)
    (folder / "site").write_text(site)
    kinds = ("proxy", "fastcgi", "uwsgi", "scgi", "client_body")
    folders = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "config").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\npid {folder}/pid;\nerror_log stderr error;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{folders}include {folder}/site;\n}}\n"
    )
    return [program, "-p", str(folder), "-c", str(folder / "config")]


@pytest.mark.slow
def test_several_back_ends_behind_nginx(tmp_path: Path, many: bytes) -> None:
    """One of two is dead at first: nobody sees it, and it gets its part when it is there."""
    port, dead = free_port(), free_port()
    with ExitStack() as stack:
        living = stack.enter_context(Endpoint())
        process = stack.enter_context(subprocess.Popen(balanced(tmp_path, port, [living.server_port, dead])))
        stack.callback(process.terminate)
        front = Front(stack.enter_context(serve_front(tmp_path / "state", f"http://127.0.0.1:{port}/v1", model="slow")))
        text = front.post("slow", many).json()["text"]
        assert sorted(map(int, text.replace("slow", "").split())) == [
            *range(1, 13)
        ]  # none is lost, and none is doubled
        second = stack.enter_context(Endpoint(dead))
        until(lambda: front.post("slow").status_code == 200 and second.asked["slow"] > 3)
        living.failing = True
        assert front.post("slow", many).status_code == 200


@pytest.mark.slow
def test_what_a_front_end_costs(back: Endpoint, many: bytes, tmp_path: Path) -> None:
    """Seconds of CPU for an hour of audio, with decoding, finding speech and encoding; -s prints it."""
    hour = 3600 / (12 * (CLIP_S + 1))
    with serve_front(tmp_path, back.url, model="well") as server:
        front = Front(server)
        front.post("well", many)

        def cpu_s() -> float:
            fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = cpu_s()
        for _ in range(10):
            assert front.post("well", many).status_code == 200
        spent_s = (cpu_s() - before) / 10 * hour
    print(f"a front end spends {spent_s:.1f} s of CPU on an hour of audio")
    assert spent_s < 180
