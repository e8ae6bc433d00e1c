"""What strangers do to a server: lie about lengths, stall, flood, bombs, forged names and headers, false keys.

All from this machine to this machine. Unusual: the servers run the real command, but with the seconds that they wait
for slow clients cut down, and small buffers, by a `sitecustomize.py` that Python loads first.
"""

import base64
import functools
import gzip
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import uvicorn
from starlette.testclient import TestClient

from arkasr.errors import UsageError
from arkasr.server import app as application
from arkasr.server import serve as starting
from arkasr.server.app import PAGE, PAGE_POLICY, SAFE
from arkasr.server.keys import KEYS, Limits, create_key, revoke_key
from arkasr.server.settings import Settings
from serving import Server, serve

POST = "/v1/audio/transcriptions"
ANYBODY = "0.0.0.0"  # noqa: S104 - what must be refused
CLIP = (Path(__file__).parents[1] / "examples/audio/an4-rubout.flac").read_bytes()
WORDS = "RUBOUT G M E F THREE NINE"
UPLOAD_MB = 8
AUDIO_S = 120
DEADLINE_S = 4.0
PATIENCE_S = 1.0  # with slow clients, instead of 10 s and 15 s
HURRY = f"""
from arkasr.server import serve, uploads
serve.HEADER_S = uploads.GRACE_S = {PATIENCE_S}
made = serve._Protocol.connection_made
def connection_made(self, transport):
    transport.get_extra_info("socket").setsockopt(1, 7, 4096)  # SO_SNDBUF
    transport.set_write_buffer_limits(0)
    made(self, transport)
serve._Protocol.connection_made = connection_made
"""
FORM_TYPE = "Content-Type: multipart/form-data; boundary=b"
DICTATION = "Geheimes-Diktat-4711.flac"
Samples = npt.NDArray[np.int16]


class Site(ThreadingHTTPServer):
    """A web server at an address of this machine that nobody else uses."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.asked: list[str] = []
        host = ".".join(map(str, (127, *random.SystemRandom().choices(range(1, 255), k=3))))
        super().__init__((host, 0), _Page)
        self.host, self.port = host, self.server_port
        self.neighbour = socket.create_server(("127.0.0.1", self.port))  # must never be called
        self.neighbour.setblocking(False)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site = self.server
        assert isinstance(site, Site)
        site.asked.append(self.path)
        if self.path in site.moved:
            self.send_response(302)
            self.send_header("Location", site.moved[self.path])
            self.end_headers()
            return
        data = site.files[self.path]
        self.send_response(200)
        self.send_header("Content-Type", "audio/flac")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:-1000])
        time.sleep(0.2)
        self.wfile.write(data[-1000:])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.shutdown()
    site.server_close()
    site.neighbour.close()


@pytest.fixture(scope="module")
def hurry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH."""
    folder = tmp_path_factory.mktemp("hurry")
    (folder / "sitecustomize.py").write_text(HURRY)
    return os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))


@pytest.fixture(scope="module")
def victim(site: Site, hurry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys."""
    options = (
        "--max-upload-mb", UPLOAD_MB, "--max-audio-s", AUDIO_S, "--request-timeout-s", DEADLINE_S, "--min-upload-rate",
        2000, "--url-host", site.host, "--url-host", "localhost", "--url-host", "redirected.invalid",
        "--url-network", f"{site.host}/32", "--url-port", site.port,
    )  # fmt: skip
    temporary = tmp_path_factory.mktemp("temporary")
    with serve(tmp_path_factory.mktemp("state"), *options, PYTHONPATH=hurry, TMPDIR=str(temporary)) as server:
        for size in (1, 30):  # what is made once: threads, caches, buffers
            form = {"model": "tiny"}, {"file": _wav(np.zeros(16000 * size, np.int16), 16000)}
            assert httpx2.post(server.url + POST, data=form[0], files=form[1]).status_code == 200
        yield server


@pytest.fixture(scope="module")
def secret() -> dict[str, str]:
    """Keys by name, once `guarded` runs."""
    return {}


@pytest.fixture(scope="module")
def guarded(secret: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys."""
    state = tmp_path_factory.mktemp("guarded")
    secret |= {name: create_key(state / KEYS, name, Limits())[1] for name in ("alice", "bob")}
    secret["other"] = create_key(tmp_path_factory.mktemp("other") / KEYS, "alice", Limits())[1]
    revoke_key(state / KEYS, "bob")
    with serve(state) as server:
        yield server


# --- tools -------------------------------------------------------------------------------------------------------


def _wav(samples: Samples, rate: int, *, kind: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


@functools.cache
def _speech(times: int) -> bytes:
    """The clip so often, with a second of silence behind each."""
    samples, rate = soundfile.read(io.BytesIO(CLIP), dtype="int16")
    return _wav(np.tile(np.concatenate([samples, np.zeros(rate, np.int16)]), times), rate, kind="FLAC")


def part(name: str, value: str | bytes, *more: str) -> bytes:
    """A part of a form, `more` behind its name."""
    raw = value.encode() if isinstance(value, str) else value
    head = "; ".join((f'form-data; name="{name}"', *more)).encode("utf-8", "surrogateescape")
    return b"--b\r\nContent-Disposition: " + head + b"\r\n\r\n" + raw + b"\r\n"


def a_file(audio: bytes = CLIP, name: str = 'filename="a.flac"') -> bytes:
    return part("file", audio, name)


END = b"--b--\r\n"
GOOD = part("model", "tiny") + a_file() + END


def head(server: Server, *lines: str, method: str = "POST", path: str = POST) -> bytes:
    host = [] if any(line.lower().startswith("host:") for line in lines) else [f"Host: 127.0.0.1:{server.port}"]
    return "\r\n".join((f"{method} {path} HTTP/1.1", *host, *lines, "", "")).encode("latin-1")


class Wire(socket.socket):
    """A connection to a server."""

    def __init__(self, server: Server, data: bytes = b"", *, wait_s: float = 10.0, small: bool = False) -> None:
        super().__init__()
        if small:
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.settimeout(wait_s)
        self.connect(("127.0.0.1", server.port))
        self.sendall(data)

    def rest(self) -> bytes:
        """All that comes until the end, a reset or too long a silence."""
        data = b""
        with suppress(TimeoutError, ConnectionResetError):
            while piece := self.recv(1 << 16):
                data += piece
        return data

    def reset(self) -> None:
        """Go without a word."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def half_close(self) -> None:
        """Say that there will be no more, and stay."""
        self.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self


def ask(server: Server, data: bytes, *, wait_s: float = 10.0) -> bytes:
    """The raw answer to raw bytes; the connection may end while they are sent."""
    with Wire(server, wait_s=wait_s) as wire:
        with suppress(BrokenPipeError, ConnectionResetError):
            wire.sendall(data)
        return wire.rest()


def statuses(answer: bytes) -> list[int]:
    """Of all answers in raw bytes."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d\d\d) ", answer)]


def post(server: Server, body: bytes, *lines: str, kind: str = FORM_TYPE, wait_s: float = 20) -> bytes:
    """The raw answer to a whole body."""
    return ask(
        server, head(server, kind, f"Content-Length: {len(body)}", "Connection: close", *lines) + body, wait_s=wait_s
    )


def post_json(server: Server, value: object, *lines: str) -> bytes:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return post(server, content, *lines, kind="Content-Type: application/json")


def said(answer: bytes) -> dict[str, Any]:
    """The JSON of a good answer."""
    assert statuses(answer) == [200], answer
    record = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert isinstance(record, dict)
    return record


def error_of(answer: bytes | httpx2.Response) -> tuple[int, str]:
    """Status and code of an error, which must be in OpenAI's shape and not the server's fault."""
    raw = answer.content if isinstance(answer, httpx2.Response) else answer.partition(b"\r\n\r\n")[2]
    status = answer.status_code if isinstance(answer, httpx2.Response) else statuses(answer)[0]
    error = json.loads(raw)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert len(error["message"]) < 1000
    assert status < 500, raw
    return status, error["code"]


def memory_mb(server: Server, field: str) -> float:
    """VmRSS: now; VmHWM: at most since `watched` began."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def open_files(server: Server, *, sockets: bool = False) -> list[str]:
    """What the server's descriptors lead to; either connections or the others."""
    found = []
    for file in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(file.readlink()))
    return sorted(one for one in found if one.startswith("socket:") == sockets)


def connections(server: Server) -> int:
    return len(open_files(server, sockets=True))


def on_disk(server: Server) -> list[str]:
    """Files in its temporary and its state folder."""
    environment = Path(f"/proc/{server.process.pid}/environ").read_bytes().decode().split("\0")
    folders = [server.state, *(Path(one.removeprefix("TMPDIR=")) for one in environment if one.startswith("TMPDIR="))]
    return sorted(str(path) for folder in folders for path in folder.rglob("*"))


def metrics(server: Server) -> str:
    return ask(server, head(server, "Connection: close", method="GET", path="/metrics")).decode()


def in_work(server: Server) -> float:
    found = re.search(r"^arkasr_requests_in_work (\S+)$", metrics(server), re.MULTILINE)
    assert found
    return float(found[1])


def faults(server: Server) -> list[str]:
    """The counts of answers that are the server's fault."""
    return re.findall(r'^arkasr_requests_total\{.*status="500"\} .*$', metrics(server), re.MULTILINE)


def until(condition: Callable[[], bool], *, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def watched(server: Server, *, growth_mb: float = 30.0) -> Iterator[None]:
    """Afterwards nothing may be left: no place, descriptor, connection or file; nor may memory have grown much."""
    assert until(lambda: in_work(server) == 0)
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    files, disk, rss, wires = open_files(server), on_disk(server), memory_mb(server, "VmRSS"), connections(server)
    faulty = faults(server)
    yield
    assert until(lambda: in_work(server) == 0), "a place is not freed"
    assert until(lambda: not Counter(open_files(server)) - Counter(files)), f"{open_files(server)} instead of {files}"
    assert until(lambda: connections(server) <= wires), f"{connections(server)} connections instead of {wires}"
    assert on_disk(server) == disk
    assert memory_mb(server, "VmHWM") - rss < growth_mb
    assert faults(server) == faulty
    assert server.process.poll() is None


# --- bodies that are not what they say -----------------------------------------------------------------------------


def test_a_body_that_is_promised_too_large_is_refused_unread(victim: Server) -> None:
    limit = UPLOAD_MB * 10**6 + (1 << 20)
    with watched(victim), Wire(victim, head(victim, FORM_TYPE, f"Content-Length: {limit + 1}") + a_file()) as wire:
        started = time.monotonic()
        answer = wire.rest()
        assert time.monotonic() - started < 2
    assert error_of(answer) == (413, "file_too_large")
    assert b"connection: close" in answer.lower()
    assert error_of(post(victim, b"{" + b" " * 100, "X: y", kind="Content-Type: application/json"))[0] == 400


def test_a_body_whose_size_is_hidden_is_refused_while_it_comes(victim: Server) -> None:
    sent, chunk = 0, b"10000\r\n" + b"\0" * 0x10000 + b"\r\n"
    opening = part("model", "tiny") + a_file(b"")[:-2]
    with watched(victim), Wire(victim, head(victim, FORM_TYPE, "Transfer-Encoding: chunked"), wait_s=0.001) as wire:
        wire.sendall(f"{len(opening):x}\r\n".encode() + opening + b"\r\n")
        answer = b""
        with suppress(ConnectionError):
            while not answer and sent < 10 * UPLOAD_MB * 10**6:
                wire.settimeout(10)
                wire.sendall(chunk)
                sent += 0x10000
                wire.settimeout(0.001)
                with suppress(TimeoutError):
                    answer = wire.recv(1 << 16)
        wire.settimeout(5)
        answer += wire.rest()
    assert error_of(answer) == (413, "file_too_large")
    assert UPLOAD_MB * 10**6 < sent < (UPLOAD_MB + 8) * 10**6


def test_ordinary_clients_hear_why_their_file_is_refused(victim: Server) -> None:
    with watched(victim):
        for size in (UPLOAD_MB * 10**6 + 1, UPLOAD_MB * 10**6 * 5):
            files = {"file": ("a.wav", b"\0" * size)}
            response = httpx2.post(victim.url + POST, data={"model": "tiny"}, files=files, timeout=30)
            assert error_of(response) == (413, "file_too_large")


def test_the_rest_of_a_refused_body_is_no_request(victim: Server, guarded: Server) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for size in (10**12, 10**5):  # refused by the length, and by the type
        request = head(victim, "Content-Type: text/plain", f"Content-Length: {size}") + smuggled * 2
        assert statuses(ask(victim, request, wait_s=0.5)) in ([415], [413])
    request = head(victim, FORM_TYPE, f"Content-Length: {10**12}") + smuggled * 2
    assert statuses(ask(victim, request, wait_s=0.5)) == [413]
    request = head(guarded, FORM_TYPE, "Content-Length: 100000") + smuggled * 2
    assert statuses(ask(guarded, request, wait_s=0.5)) == [401]


def test_a_body_that_ends_early_is_awaited_no_longer_than_a_slow_one(victim: Server) -> None:
    with watched(victim):
        started = time.monotonic()
        answer = ask(victim, head(victim, FORM_TYPE, "Content-Length: 5000") + GOOD[:300])
    assert error_of(answer) == (408, "upload_too_slow")
    assert PATIENCE_S < time.monotonic() - started < PATIENCE_S + 6


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -5",),
        ("Content-Length: +5",),
        ("Content-Length: 5, 6",),
        ("Content-Length: five",),
        ("Content-Length: 0x5",),
        ("Content-Length: 1e3",),
        (f"Content-Length: {10**30}",),
        (f"Content-Length: {'9' * 5000}",),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", " folded: x"),
        ("Content Length: 5",),
    ],
    ids=lambda lines: lines[0][:40],
)
def test_a_length_that_could_be_read_in_two_ways_ends_the_connection(victim: Server, lines: tuple[str, ...]) -> None:
    body = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    answer = ask(victim, head(victim, FORM_TYPE, *lines) + body, wait_s=3)
    assert statuses(answer) in ([400], [501]), answer
    assert b"vram_mb" not in answer


@pytest.mark.parametrize("order", [1, -1])
def test_a_length_beside_a_coding_ends_the_connection(victim: Server, order: int) -> None:
    body = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    both = ("Content-Length: 5", "Transfer-Encoding: chunked")[::order]
    answer = ask(victim, head(victim, FORM_TYPE, *both) + body, wait_s=2)
    assert statuses(answer) == [400]
    assert b"vram_mb" not in answer


@pytest.mark.parametrize("size", [b"0x5", b"-1", b"+5", b"5 5", b"f" * 21, b"", b"5;" + b"x" * 200_000])
def test_a_bad_size_of_a_chunk_ends_the_connection(victim: Server, size: bytes) -> None:
    with watched(victim):
        request = head(victim, FORM_TYPE, "Transfer-Encoding: chunked") + size + b"\r\nhello\r\n0\r\n\r\n"
        assert set(statuses(ask(victim, request + head(victim, method="GET", path="/health"), wait_s=3))) <= {400}


# --- clients that stall or go --------------------------------------------------------------------------------------


def test_slow_heads_and_silent_connections_are_closed(victim: Server) -> None:
    with watched(victim), ExitStack() as stack:
        silent = stack.enter_context(Wire(victim))
        kept = stack.enter_context(Wire(victim, head(victim, method="GET", path="/health")))
        slow = stack.enter_context(Wire(victim, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", wait_s=0.05))
        started = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - started < 8:
                slow.sendall(b"x")
                with suppress(TimeoutError):
                    if not slow.recv(100):
                        break
        assert PATIENCE_S * 0.9 < time.monotonic() - started < PATIENCE_S * 2 + 3
        assert silent.rest() == b""
        assert statuses(kept.rest()) == [200]
        assert time.monotonic() - started < 8


def test_idle_connections_keep_nobody_out(victim: Server) -> None:
    with watched(victim, growth_mb=60), ExitStack() as stack:
        for number in range(500):
            begun = (b"", b"GET / HT", head(victim, FORM_TYPE, "Content-Length: 9999"))[
                number % 3 if number < 90 else 0
            ]
            stack.enter_context(Wire(victim, begun))
            if number % 50 == 49:
                started = time.monotonic()
                assert said(post(victim, GOOD))["text"] == WORDS
                assert time.monotonic() - started < 3


def test_a_slow_body_is_refused(victim: Server) -> None:
    with watched(victim), Wire(victim, head(victim, FORM_TYPE, "Content-Length: 100000"), wait_s=0.1) as wire:
        wire.sendall(part("model", "tiny") + a_file(b"")[:-2])
        started, answer = time.monotonic(), b""
        while not answer and time.monotonic() - started < 8:
            wire.sendall(b"x" * 50)  # 500 bytes a second, of 2000
            with suppress(TimeoutError):
                answer = wire.recv(1 << 16)
        assert error_of(answer + wire.rest()) == (408, "upload_too_slow")
        assert PATIENCE_S < time.monotonic() - started < PATIENCE_S + 5


def test_an_upload_just_fast_enough_ends_at_the_deadline(victim: Server) -> None:
    with watched(victim), Wire(victim, head(victim, FORM_TYPE, "Content-Length: 1000000"), wait_s=0.1) as wire:
        wire.sendall(part("model", "tiny") + a_file(b"")[:-2])
        started, answer = time.monotonic(), b""
        while not answer and time.monotonic() - started < DEADLINE_S + 4:
            wire.sendall(b"x" * 500)
            with suppress(TimeoutError):
                answer = wire.recv(1 << 16)
        answer += wire.rest()
    assert statuses(answer) == [504]
    assert b'"request_timeout"' in answer


def test_an_answer_that_nobody_reads_holds_its_place_no_longer_than_a_request_may_take(victim: Server) -> None:
    fields = part("stream", "true") + part("include[]", "logprobs") + part("include[]", "segments")
    body = part("model", "tiny") + fields + a_file(_speech(22)) + END
    request = head(victim, FORM_TYPE, f"Content-Length: {len(body)}") + body
    with watched(victim, growth_mb=60), Wire(victim, request, small=True) as wire:
        assert until(lambda: in_work(victim) == 1)
        assert until(lambda: in_work(victim) == 0, seconds=DEADLINE_S + 8)
        read = wire.rest()
    assert b"text.delta" in read
    assert b"text.done" not in read, "there was room for all of it; nothing was tested"
    assert b'"error"' not in read


def _half_an_upload(server: Server) -> Wire:
    return Wire(server, head(server, FORM_TYPE, "Content-Length: 4000000") + a_file(bytes(2 << 20)))


def _waiting(server: Server) -> Wire:
    body = part("model", "tiny") + a_file(_speech(22)) + END
    wire = Wire(server, head(server, FORM_TYPE, f"Content-Length: {len(body)}") + body)
    assert until(lambda: in_work(server) > 0)
    return wire


def _in_the_stream(server: Server) -> Wire:
    body = part("model", "tiny") + part("stream", "true") + a_file(_speech(22)) + END
    wire = Wire(server, head(server, FORM_TYPE, f"Content-Length: {len(body)}") + body)
    while b"text.delta" not in wire.recv(1 << 16):
        pass
    return wire


@pytest.mark.parametrize("leave", [Wire.reset, Wire.close, Wire.half_close])
@pytest.mark.parametrize(
    "stage",
    [
        _half_an_upload,
        _waiting,
        _in_the_stream,
    ],
)
def test_who_goes_leaves_nothing(
    victim: Server, stage: Callable[[Server], Wire], leave: Callable[[Wire], object]
) -> None:
    with watched(victim, growth_mb=60), ExitStack() as stack:
        wires = [stack.enter_context(stage(victim)) for _ in range(2)]
        time.sleep(0.1)
        for wire in wires:
            leave(wire)
        assert until(lambda: in_work(victim) == 0, seconds=3)


# --- floods --------------------------------------------------------------------------------------------------------


def _pipelined(server: Server, request: bytes, times: int) -> list[int]:
    """Statuses of so many equal requests, some of which are always under way."""
    answer = b""
    with Wire(server, wait_s=20) as wire:
        for _ in range(times // 20):
            wire.sendall(request * 20)
            seen = answer.count(b"HTTP/1.1 ") + 20
            while answer.count(b"HTTP/1.1 ") < seen:
                piece = wire.recv(1 << 16)
                assert piece, answer[-300:]
                answer += piece
    return statuses(answer)


FLOODS = {
    "health": (200, None),
    "no file": (400, part("model", "tiny") + END),
    "0 bytes": (400, part("model", "tiny") + a_file(b"") + END),
    "garbage": (400, part("model", "tiny") + a_file(random.Random(0).randbytes(500)) + END),
    "no form": (400, b"garbage"),
}


@pytest.mark.parametrize("times", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flood", FLOODS)
def test_floods_of_small_requests_leave_nothing(victim: Server, flood: str, times: int) -> None:
    status, body = FLOODS[flood]
    if body is None:
        request = head(victim, method="GET", path="/health")
    else:
        request = head(victim, FORM_TYPE, f"Content-Length: {len(body)}") + body
    assert _pipelined(victim, request, 100) == [status] * 100
    with watched(victim, growth_mb=20):
        started = time.monotonic()
        assert _pipelined(victim, request, times) == [status] * times
        assert time.monotonic() - started < 60


# --- bombs: little that becomes much -------------------------------------------------------------------------------


def _silence(hours: float, kind: str, rate: int, *, subtype: str | None = None) -> bytes:
    out, left, zeros = io.BytesIO(), int(hours * 3600 * rate), np.zeros(1 << 18, np.int16)
    with soundfile.SoundFile(out, "w", rate, 1, format=kind, subtype=subtype) as file:
        while left > 0:
            file.write(zeros[:left])
            left -= len(zeros)
    return out.getvalue()


def _flac_that_claims(samples: int) -> bytes:
    """Two hours, of which the header (the low 36 bits of 8 bytes at 18) says something else."""
    flac = bytearray(_silence(2, "FLAC", 1000))
    (before,) = struct.unpack_from(">Q", flac, 18)
    struct.pack_into(">Q", flac, 18, before >> 36 << 36 | samples)
    return bytes(flac)


def _wav_that_claims(*, rate: int = 16_000, channels: int = 1, data_bytes: int = 1000, there: int = 1000) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2 % 2**32, channels * 2 % 2**16, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", data_bytes)
    return b"RIFF" + struct.pack("<I", min(data_bytes + 36, 2**32 - 1)) + head + bytes(there)


def _av_silence(container: str, codec: str, rate: int) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, 600 * rate, 1 << 14):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1 << 14), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = rate, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "flac of 20 hours": lambda: _silence(20, "FLAC", 1000),
    "flac of hours that claims nothing": lambda: _flac_that_claims(0),
    "flac that claims 18 million hours": lambda: _flac_that_claims(2**36 - 1),
    "opus": lambda: _silence(0.1, "OGG", 8000, subtype="OPUS"),
    "vorbis": lambda: _silence(0.1, "OGG", 8000, subtype="VORBIS"),
    "wav that claims hours": lambda: _wav_that_claims(data_bytes=2**31 - 2**17),
    "wav that claims 4 GiB": lambda: _wav_that_claims(data_bytes=2**32 - 100, there=3_900_000),
    "wav of 1000 channels": lambda: _wav_that_claims(channels=1000, there=100_000),
    "wav of 65535 channels": lambda: _wav_that_claims(channels=65535, there=1_000_000),
    "wav of no channels": lambda: _wav_that_claims(channels=0),
    "wav at 1 Hz": lambda: _wav_that_claims(rate=1),
    "wav at 0 Hz": lambda: _wav_that_claims(rate=0),
    "wav at 2^31 Hz": lambda: _wav_that_claims(rate=2**31),
    "m4a": lambda: _av_silence("mp4", "aac", 8000),
    "webm": lambda: _av_silence("webm", "libopus", 8000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_of_audio_go_out(victim: Server, bomb: str) -> None:
    body = part("model", "tiny") + a_file(BOMBS[bomb]()) + END
    assert len(body) < 4_000_000
    with watched(victim, growth_mb=90):
        started = time.monotonic()
        assert error_of(post(victim, body)) == (400, "invalid_audio")
        assert time.monotonic() - started < 5


def test_a_flac_is_heard_no_longer_than_its_header_says(victim: Server) -> None:
    with watched(victim, growth_mb=60):
        answer = post(victim, part("model", "tiny") + a_file(_flac_that_claims(10_000)) + END)
    assert said(answer)["usage"]["seconds"] <= AUDIO_S


AUDIO = base64.b64encode(CLIP).decode()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model":' * 100_000,
        b'{"model":"tiny","audio":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'"' + b"\\u0000" * 1000 + b'"',
        b"\xff\xfe" + b"\0" * 1000,
        b"",
        b"1" * 100_000,
        b'{"model":"tiny","audio":"' + b"!" * 100_000 + b'"}',
        b'{"model":"tiny","audio":"data:audio/flac;base64"}',
        b'{"model":"tiny","audio":"' + b"A" * 100_001 + b'"}',
        b'{"model":"tiny","audio":"\\ud800"}',
        b'{"model":"\\ud800","audio":"AAAA"}',
        b'{"model":"tiny","\\ud800":1,"audio":"AAAA"}',
        b'{"model":"tiny","seed":NaN,"audio":"AAAA"}',
        b'{"model":"tiny","seed":' + b"9" * 4000 + b',"audio":"AAAA"}',
        b'{"model":"tiny","temperature":1e999,"audio":"AAAA"}',
        b'{"model":null,"audio":"AAAA"}',
        b'{"model":{"$ref":"#"},"audio":"AAAA"}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bad_json_is_refused(victim: Server, body: bytes) -> None:
    with watched(victim):
        assert error_of(post_json(victim, body))[0] == 400


@pytest.mark.parametrize(
    "bomb",
    [
        ",".join(f'"k{number}":1' for number in range(300_000)),
        f'"known_speaker_references":[{",".join("1" * 300_000)}]',
        f'"languages":[{",".join("1" * 600_000)}]',
        f'"prompt":[{",".join(["[]"] * 1_500_000)}]',
    ],
    ids=lambda bomb: bomb[:20],
)
def test_json_of_many_values_stops_nobody(victim: Server, bomb: str) -> None:
    body = f'{{"model":"tiny","audio":"AAAA",{bomb}}}'.encode()
    longest, ended = 0.0, threading.Event()

    def look_on() -> None:
        nonlocal longest
        while not ended.wait(0.01):
            started = time.monotonic()
            ask(victim, head(victim, "Connection: close", method="GET", path="/health"), wait_s=60)
            longest = max(longest, time.monotonic() - started)

    with watched(victim, growth_mb=50), ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look_on)
        time.sleep(0.1)
        assert error_of(post(victim, body, kind="Content-Type: application/json", wait_s=60))[0] == 400
        ended.set()
        looking.result()
    assert longest < 0.5


def test_deep_json_in_a_field_is_refused(victim: Server) -> None:
    for deep in ('{"a":' * 13_000, '{"a":' + "[" * 60_000):
        answer = post(victim, part("model", "tiny") + part("chunking_strategy", deep) + a_file() + END)
        assert error_of(answer) == (400, "invalid_parameter")


def test_a_compressed_body_is_not_unpacked(victim: Server) -> None:
    bomb = gzip.compress(b'{"model":"tiny","audio":"' + bytes(30_000_000) + b'"}')
    with watched(victim):
        assert error_of(post(victim, bomb, "Content-Encoding: gzip", kind="Content-Type: application/json"))[0] == 400


MODEL = part("model", "tiny")
MEGABYTE = b"x" * 10**6


FORMS = {
    "10 000 fields": (b"".join(part(f"f{n}", "1") for n in range(10_000)) + END, FORM_TYPE),
    "10 000 files": (MODEL + a_file() * 1 + a_file(b"x") * 10_000 + END, FORM_TYPE),
    "one field 10 000 times": (part("language", "1") * 10_000 + END, FORM_TYPE),
    "64 KiB of value": (MODEL + part("prompt", MEGABYTE) + a_file() + END, FORM_TYPE),
    "a value of 7 MB": (MODEL + part("prompt", MEGABYTE * 7) + a_file() + END, FORM_TYPE),
    "a name of 7 MB": (MODEL + part("x" * 7_000_000, "1") + a_file() + END, FORM_TYPE),
    "a header of 7 MB": (b"--b\r\nX: " + MEGABYTE * 7 + b"\r\n\r\n\r\n" + GOOD, FORM_TYPE),
    "a header's name of 7 MB": (b"--b\r\n" + MEGABYTE * 7 + b": x\r\n\r\n\r\n" + GOOD, FORM_TYPE),
    "100 000 headers": (b"--b\r\n" + b"X: y\r\n" * 100_000 + b"\r\n\r\n" + GOOD, FORM_TYPE),
    "no boundary": (GOOD, "Content-Type: multipart/form-data"),
    "an empty boundary": (GOOD, "Content-Type: multipart/form-data; boundary="),
    "a boundary of 10 kB": (GOOD, f"Content-Type: multipart/form-data; boundary={'b' * 10_000}"),
    "another boundary": (GOOD, "Content-Type: multipart/form-data; boundary=c"),
    "no end": (GOOD[: -len(END)], FORM_TYPE),
    "a part without a name": (b'--b\r\nContent-Disposition: form-data; filename="x"\r\n\r\nx\r\n' + GOOD, FORM_TYPE),
    "a part without a head": (b"--b\r\n\r\nx\r\n" + GOOD, FORM_TYPE),
    "two files": (MODEL + a_file() + a_file() + END, FORM_TYPE),
    "a file in another field": (MODEL + part("audio", CLIP, 'filename="a"') + END, FORM_TYPE),
    "a file in a field of its own": (MODEL + a_file() + part("prompt", b"x", 'filename="a"') + END, FORM_TYPE),
    "a file without a file's name": (MODEL + part("file", CLIP[:60_000]) + END, FORM_TYPE),
    "nested": (part("m", b"--c\r\n\r\n--c--") + MODEL + END, FORM_TYPE),
    "unknown charset": (MODEL + a_file() + part("x", "1") + END, FORM_TYPE + "; charset=utf-7"),
    "code as charset": (MODEL + part("x", "1") + a_file() + END, FORM_TYPE + "; charset=zlib_codec"),
    "nothing": (b"", FORM_TYPE),
}


TOO_MUCH = {name for name in FORMS if re.match(r"\d|one field|a (value|name|header)", name)}  # for the parser itself


@pytest.mark.parametrize("form", FORMS)
def test_bad_forms_are_refused(victim: Server, form: str) -> None:
    body, kind = FORMS[form]
    with watched(victim):
        started = time.monotonic()
        status, code = error_of(post(victim, body, kind=kind))
        assert status == 400
        assert code == "invalid_body" or form not in TOO_MUCH
        assert time.monotonic() - started < 3


# --- what is said again, and what is written -----------------------------------------------------------------------

NAMES = (
    b'filename="../../etc/passwd"',
    b'filename="/etc/passwd"',
    b'filename="..\\..\\boot.ini"',
    b'filename="a\0b"',
    b'filename="a\r\n\tb"',
    b"filename*=UTF-8''a%0d%0aX-Evil%3A%201",
    b'filename="' + b"n" * 3000 + b'"',
    b'filename="\xff\xfea\0"',
    b'filename="con"',
    b'filename=""',
    b"filename=",
    b'filename="$(touch evil)`touch evil`|evil;evil"',
    b'filename="/dev/fd/0.raw"',
    DICTATION.join(('filename="', '"')).encode(),
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:40]))
def test_names_of_files_are_only_names(victim: Server, name: bytes) -> None:
    before = victim.log.stat().st_size
    with watched(victim):
        for audio in (CLIP, b"garbage", _wav(np.zeros(16_000 * 40, np.int16), 16_000)):
            answer = post(victim, part("model", "tiny") + a_file(audio, name.decode("utf-8", "surrogateescape")) + END)
            assert statuses(answer) in ([200], [400]), answer
            for word in (b"evil", b"passwd", b"boot", b"nnn", DICTATION.encode()):
                assert word not in answer.lower()
                assert word not in victim.log.read_bytes()[before:].lower()


def test_names_too_long_for_a_head_are_refused(victim: Server) -> None:
    with watched(victim):
        answer = post(victim, part("model", "tiny") + a_file(CLIP, f'filename="{"n" * 100_000}"') + END)
        assert error_of(answer) == (400, "invalid_body")


EVIL = "\r\nX-Evil: 1\r\n\r\n<script>alert(1)</script>\u2028\x1b[31m"


def test_nothing_that_is_said_again_becomes_a_header_or_a_line_of_the_log(victim: Server) -> None:
    before, bodies = victim.log.stat().st_size, []
    for name in ("model", "language", "response_format", "prompt", "temperature", "seed", "stream", EVIL):
        fields = {"model": "tiny", name: EVIL}
        bodies.append(b"".join(part(*field) for field in fields.items()) + a_file() + END)
    bodies.append(
        part("model", "tiny") + part("language", EVIL) + part("response_format", "verbose_json") + a_file() + END
    )
    bodies.append(part("model", "tiny") + part(EVIL.replace("\r\n", "%0d%0a"), CLIP, 'filename="x"') + END)
    with watched(victim):
        for body in bodies:
            answer = post(victim, body, "X-Request-Id: evil\x85evil", "User-Agent: evil", "Referer: evil")
            lines = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
            assert not any(line.startswith((b"x-evil", b"set-cookie")) for line in lines)
            assert b"evil" not in b"".join(line for line in lines if b"x-arkasr" not in line)
            assert b"content-type: application/json" in lines
            assert b"x-content-type-options: nosniff" in lines
            assert b"\x1b" not in answer
    lines = victim.log.read_bytes()[before:].splitlines()
    assert len(lines) == len(bodies)
    assert all(json.loads(line.removeprefix(b"INFO "))["status"] in {200, 400, 404} for line in lines)
    assert b"evil" not in b"".join(lines).lower()


@pytest.mark.parametrize("line", ["Host: evil<script>", "Origin: http://evil.example/<script>", "Origin: evil\t<b>"])
def test_a_forged_host_or_origin_is_only_quoted_in_json(victim: Server, line: str) -> None:
    answer = ask(victim, head(victim, line, "Connection: close", method="GET", path="/"))
    assert error_of(answer)[0] == 403
    assert b"content-type: application/json" in answer.lower()


def test_the_log_keeps_no_words_names_keys_or_audio(guarded: Server, secret: dict[str, str]) -> None:
    headers, before = {"authorization": f"Bearer {secret['alice']}"}, guarded.log.stat().st_size
    files = {"file": (DICTATION, CLIP)}
    for fields in (
        {},
        {"response_format": "verbose_json"},
        {"stream": "true"},
        {"prompt": "Geheimwort"},
        {"x": "Geheimwort"},
    ):
        data = {"model": "tiny", **fields}
        response = httpx2.post(guarded.url + POST, data=data, files=files, headers=headers, timeout=60)
        assert response.status_code == (400 if "x" in fields else 200)
        assert WORDS in response.text or "x" in fields
    body = {"model": "tiny", "audio": AUDIO}
    assert httpx2.post(guarded.url + POST, json=body, headers=headers, timeout=60).json()["text"] == WORDS
    bad = {"authorization": f"Bearer {secret['other']}"}
    assert httpx2.post(guarded.url + POST, json=body, headers=bad, timeout=60).status_code == 401
    log = guarded.log.read_text()[before:]
    assert log.count('"key": "alice"') == 6
    for word in (*WORDS.split()[:1], "THREE", "NINE", "Geheim", "4711", "ark-", *secret.values(), AUDIO[:40]):
        assert word not in log


# --- keys ----------------------------------------------------------------------------------------------------------


def _with(server: Server, authorization: bytes, method: str = "GET", path: str = "/v1/models") -> bytes:
    opening = head(server, "Connection: close", "Content-Length: 0", method=method, path=path)[:-2]
    return ask(server, opening + b"Authorization: " + authorization + b"\r\n\r\n")


def test_the_right_key_opens(guarded: Server, secret: dict[str, str]) -> None:
    key = secret["alice"].encode()
    for value in (b"Bearer " + key, b"bearer " + key, b"BEARER " + key, b"Bearer   " + key + b" "):
        assert statuses(_with(guarded, value)) == [200]


def test_other_keys_do_not_open(guarded: Server, secret: dict[str, str]) -> None:
    key = secret["alice"].encode()
    wrong = (
        b"", b"Bearer", b"Bearer ", key, b"Basic " + key, b"Basic " + base64.b64encode(b"alice:" + key),
        b"Token " + key,
        b"Bearer " + key[:-1], b"Bearer " + key + b"x", b"Bearer " + key.swapcase(), b"Bearer x" + key,
        b"Bearer " + secret["bob"].encode(), b"Bearer " + secret["other"].encode(), b"Bearer alice", b"Bearer *",
        b"Bearer \xe4\xf6\xff\xc3", b"Bearer " + "\u00fc".encode(), b"Bearer null", b"Bearer " + b"k" * 30_000,
        b"Bearer " + (guarded.state / KEYS).read_bytes().split(b'"sha256": "')[1][:64],
        b"Bearer " + key + b", Bearer " + key, b"Bearer;" + key, b"Bearer\t" + key, b"' OR 1=1 --",
    )  # fmt: skip
    for value in wrong:
        status, code = error_of(answer := _with(guarded, value))
        assert status == 401, value
        assert code in {"missing_api_key", "invalid_api_key"}
        assert b"www-authenticate: bearer" in answer.lower()
        assert key not in answer
        assert secret["bob"].encode() not in answer
    assert set(statuses(_with(guarded, b"Bearer " + b"k" * 2**20))) <= {400, 431}


ROUTES = (
    f"POST {POST}", "POST /asr", "POST /transcribe", "GET /v1/models", "GET /v1/models/tiny", "GET /metrics",
    "GET /token-mask",
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_opens_without_a_key(guarded: Server, secret: dict[str, str], route: str) -> None:
    method, path = route.split()
    assert error_of(_with(guarded, b"", method, path)) == (401, "missing_api_key")
    assert error_of(_with(guarded, b"Bearer " + secret["bob"].encode(), method, path)) == (401, "invalid_api_key")
    for elsewhere in (f"?api_key={secret['alice']}", f"?key={secret['alice']}", f"?access_token={secret['alice']}"):
        assert error_of(_with(guarded, b"", method, path + elsewhere)) == (401, "missing_api_key")
    for line in (
        f"X-Api-Key: {secret['alice']}",
        f"Cookie: key={secret['alice']}",
        f"Proxy-Authorization: Bearer {secret['alice']}",
    ):
        answer = ask(guarded, head(guarded, line, "Connection: close", "Content-Length: 0", method=method, path=path))
        assert error_of(answer) == (401, "missing_api_key")


def test_a_key_is_refused_as_soon_as_it_is_revoked(guarded: Server) -> None:
    for _ in range(3):
        _, key = create_key(guarded.state / KEYS, "dave", Limits())
        assert statuses(_with(guarded, b"Bearer " + key.encode())) == [200]
        revoke_key(guarded.state / KEYS, "dave")
        assert error_of(_with(guarded, b"Bearer " + key.encode())) == (401, "invalid_api_key")


def test_a_lost_file_of_keys_opens_nothing(guarded: Server, secret: dict[str, str]) -> None:
    path = guarded.state / KEYS
    aside = path.rename(path.with_suffix(".aside"))
    try:
        for value in (b"", b"Bearer x", b"Bearer " + secret["alice"].encode()):
            assert statuses(_with(guarded, value))[0] >= 400
        path.write_text("{}")
        assert statuses(_with(guarded, b"Bearer " + secret["alice"].encode()))[0] >= 400
    finally:
        aside.replace(path)
    assert statuses(_with(guarded, b"Bearer " + secret["alice"].encode())) == [200]


def test_the_time_of_a_refusal_tells_nothing_of_a_key(guarded: Server, secret: dict[str, str]) -> None:
    key = secret["alice"]
    guesses = {"far": "ark-" + "x" * (len(key) - 4), "as far": "ark-" + "y" * (len(key) - 4), "near": key[:-1] + "!"}
    seconds: dict[str, list[float]] = {kind: [] for kind in guesses}
    with httpx2.Client() as client:
        for number in range(450):
            kind = list(guesses)[number % 3]
            started = time.perf_counter()
            answer = client.get(f"{guarded.url}/v1/models", headers={"authorization": f"Bearer {guesses[kind]}"})
            seconds[kind].append(time.perf_counter() - started)
            assert answer.status_code == 401
    far, as_far, near = (statistics.median(sorted(seconds[kind])[:75]) for kind in guesses)
    noise = abs(far - as_far)
    if noise > 1e-4:
        pytest.skip(f"this machine is too busy: equal guesses differ by {noise * 1e6:.0f} us")
    assert abs(near - far) < 3e-4


# --- other sites ---------------------------------------------------------------------------------------------------

MakeClient = Callable[..., TestClient]


def settings_of(**given: Any) -> Settings:
    return Settings(**given)


@pytest.fixture
def client(tmp_path: Path) -> MakeClient:
    """client(keys=False, **settings): of an app that no network reaches."""

    def make(*, keys: bool = False, **settings: Any) -> TestClient:
        if keys:
            create_key(tmp_path / KEYS, "alice", Limits())
        app = application.create(settings_of(model=["tiny"], state=tmp_path, **settings))
        return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    return make


HERE = ("127.0.0.1:8000", "localhost:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "[::1]")
ELSEWHERE = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io:8000", "127.0.0.2", ANYBODY,
    "192.168.0.1", "[::ffff:127.0.0.1]", "[", "[::1", "", " ", "localhost:8000.evil.example@evil.example",
    "2130706433", "127.1",
)  # fmt: skip


def test_without_keys_only_this_machine_s_names_are_answered_to(client: MakeClient) -> None:
    here = client(allowed_host=["speech.lan"])
    for host in (*HERE, "speech.lan", "speech.lan:8000"):
        assert here.get("/v1/models", headers={"host": host}).status_code == 200, host
    for host in ELSEWHERE:
        for path in ("/", "/v1/models", "/metrics", "/health", "/nothing"):
            assert error_of(here.get(path, headers={"host": host})) == (403, "wrong_host"), host
        assert error_of(here.post(POST, headers={"host": host})) == (403, "wrong_host")


def test_without_keys_pages_of_other_sites_are_not_answered(client: MakeClient) -> None:
    here = client()
    origins = (
        "https://evil.example", "null", "http://127.0.0.1:3000", "http://localhost:8000", "http://127.0.0.1",
        "file://", "", "127.0.0.1:8000", "http://127.0.0.1:8000.evil.example", "http://evil@127.0.0.1:8000",
    )  # fmt: skip
    for origin in origins:
        for send in (here.get, here.post):
            assert error_of(send(POST, headers={"origin": origin})) == (403, "wrong_origin"), origin
    assert error_of(here.post(POST, headers={"sec-fetch-site": "cross-site"})) == (403, "wrong_origin")
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert here.get("/", headers=link).status_code == 200  # a link to the page
    form = {**link, "origin": "https://evil.example"}
    assert error_of(here.post(POST, headers=form)) == (403, "wrong_origin")
    for headers in (
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {},
    ):
        assert here.get("/v1/models", headers=headers).status_code == 200
        assert error_of(here.post(POST, headers=headers)) == (415, "unsupported_media_type")


def test_an_origin_that_is_none_is_refused(client: MakeClient) -> None:
    assert error_of(client().get("/v1/models", headers={"origin": "http://["})) == (403, "wrong_origin")


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize(
    ("allowed", "origin", "answer"),
    [
        ([], "https://a.example", None),
        (["https://a.example"], "https://a.example", "https://a.example"),
        (["https://a.example"], "https://b.example", None),
        (["https://a.example"], "https://a.example.evil.example", None),
        (["https://a.example"], "http://a.example", None),
        (["https://a.example"], "null", None),
        (["*"], "https://b.example", "*"),
    ],
)
def test_other_sites_may_read_what_is_configured_and_no_more(
    client: MakeClient, keys: bool, allowed: list[str], origin: str, answer: str | None
) -> None:
    here = client(keys=keys, cors_origin=allowed)
    preflight = here.options(POST, headers={"origin": origin, **PREFLIGHT})
    got = [here.get("/health", headers={"origin": origin}), here.post(POST, headers={"origin": origin}), preflight]
    for response in got:
        assert response.headers.get("access-control-allow-origin") == answer
        assert "access-control-allow-credentials" not in response.headers
        assert response.status_code < 500
    assert (preflight.status_code == 200) == (answer is not None)
    if not keys:
        assert (got[0].status_code == 200) == (answer is not None)
    with_cookie = here.get("/health", headers={"origin": origin, "cookie": "a=b"})
    assert "access-control-allow-credentials" not in with_cookie.headers


def test_the_page_gets_what_it_needs_and_nothing_from_elsewhere(client: MakeClient) -> None:
    for here in (client(), client(keys=True)):
        for file in sorted(PAGE.iterdir()):
            headers = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}
            response = here.get("/" if file.name == "index.html" else f"/{file.name}", headers=headers)
            assert response.content == file.read_bytes()
            assert response.headers["content-security-policy"] == PAGE_POLICY
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
        assert here.get("/docs").headers["content-security-policy"] == PAGE_POLICY
        for path in ("/health", "/v1/models", "/nothing", "/openapi.json", "/metrics"):
            response = here.get(path)
            assert {name: response.headers[name] for name in SAFE} == SAFE


def test_the_page_s_policy_allows_only_its_own() -> None:
    rules = dict(rule.split(" ", 1) for rule in PAGE_POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == rules["worker-src"] == "'self'"
    assert rules["img-src"] == "'self' data:"
    assert rules["media-src"] == "'self' blob:"
    for file in PAGE.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|[\"'(]//", text), file
        assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), (
            file
        )
    markup = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)|<base|<iframe|<object", markup)


# --- URLs ----------------------------------------------------------------------------------------------------------


def test_a_url_of_an_allowed_host_is_heard(victim: Server, site: Site) -> None:
    site.files["/clip.flac"] = CLIP
    site.moved |= {"/moved": "/clip.flac"}
    with watched(victim):
        for path in ("/clip.flac", "/moved"):
            assert (
                said(post_json(victim, {"model": "tiny", "url": f"http://{site.host}:{site.port}{path}"}))["text"]
                == WORDS
            )


def test_a_large_recording_at_a_url_is_heard_to_its_end(victim: Server, site: Site) -> None:
    """The last 1000 bytes come alone, so that a writer would keep them in its buffer."""
    site.files["/large.wav"] = _wav(np.tile(soundfile.read(io.BytesIO(CLIP), dtype="int16")[0], 12), 16_000)
    with watched(victim, growth_mb=60):
        heard = post_json(victim, {"model": "tiny", "url": f"HTTP://{site.host}:{site.port}/large.wav"})
        assert said(heard)["usage"]["seconds"] == 48


def test_no_other_url_is_asked(victim: Server, site: Site) -> None:
    a, b, c, d = map(int, site.host.split("."))
    base = f"{site.host}:{site.port}"
    number = a << 24 | b << 16 | c << 8 | d
    site.files["/clip.flac"] = CLIP
    site.moved |= {
        "/to-the-server": f"{victim.url}/health",
        "/to-loopback": f"http://127.0.0.1:{site.port}/clip.flac",
        "/to-a-file": "file:///etc/passwd",
        "/to-metadata": "http://169.254.169.254/latest/meta-data",
        "/to-itself": "/to-itself",
    }
    asked = list(site.asked)
    spelled = (
        number, f"{number:#x}", f"0{number:o}", f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
        f"{a}.{number & 0xFFFFFF}", f"[::ffff:{site.host}]", f"[::{site.host}]", f"[64:ff9b::{site.host}]",
        f"[::ffff:{number >> 16:x}:{number & 65535:x}]", f"{site.host}.", f"{site.host}.nip.io", f"user@{site.host}",
        f"evil.example@{site.host}", f"{site.host}@127.0.0.1", f"{site.host}%00.evil.example", "localhost", "127.0.0.1",
        f"{site.host}\\@127.0.0.1", f"{site.host}#@127.0.0.1", "[::1]", "0", "[::]", "redirected.invalid", "",
        "169.254.169.254", "\u0661\u0662\u0667.1",
    )  # fmt: skip
    never = [
        *(f"http://{host}:{site.port}/clip.flac" for host in spelled),
        f"http://{site.host}/clip.flac", f"http://{site.host}:{victim.port}/health", f"http://{site.host}:22/", "",
        f"https://127.0.0.1:{victim.port}/", f"http:{base}", f"http:///{base}", f" http://{base}/clip.flac",
        f"//{base}",
        f"http://{base}/\r\nX-Evil: 1", f"jar:http://{base}!/", "file:///etc/passwd", "gopher://127.0.0.1:6379/_INFO",
        "ftp://127.0.0.1/", "/etc/passwd", "data:audio/wav,x", "x" * 100_000,
    ]  # fmt: skip
    with watched(victim):
        for url in never:
            assert error_of(post_json(victim, {"model": "tiny", "url": url})) == (400, "url_failed"), url
        assert site.asked == asked
        for path in [path for path in site.moved if path.startswith("/to-")]:
            response = post_json(victim, {"model": "tiny", "url": f"http://{site.host}:{site.port}{path}"})
            assert error_of(response) == (400, "url_failed"), path
            assert b"root:" not in response
    assert set(site.asked[len(asked) :]) == {path for path in site.moved if path.startswith("/to-")}
    with pytest.raises(BlockingIOError):
        site.neighbour.accept()
    value: object
    for value in (1, None, [f"http://{site.host}/clip.flac"], {}, True):
        assert error_of(post_json(victim, {"model": "tiny", "url": value}))[0] == 400
    assert error_of(post_json(victim, {"model": "tiny", "url": f"http://{base}/", "audio": AUDIO}))[0] == 400


def test_urls_are_not_fetched_unless_that_is_allowed(guarded: Server, site: Site, secret: dict[str, str]) -> None:
    asked, headers = list(site.asked), {"authorization": f"Bearer {secret['alice']}"}
    body = {"model": "tiny", "url": f"http://{site.host}:{site.port}/clip.flac"}
    assert error_of(httpx2.post(guarded.url + POST, json=body, headers=headers)) == (400, "url_not_allowed")
    assert site.asked == asked


# --- paths, methods, heads -----------------------------------------------------------------------------------------

PATHS = (
    "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//evil.example", "//evil.example/%2f..",
    "/page.js/..", "/page.js/../../app.py", "/./", "/.%00/", "/page.js%00.html", "/page.js%0d%0aX-Evil:%201",
    "/static/../app.py",
    "/app.py", "/keys.json", "/__init__.py", "/.env", "/v1/models/..", "/v1/models/../../metrics", "/v1/models/%00",
    "/v1/models/" + "x" * 50_000, "/" + "x" * 50_000, "/%ff%fe", "/v1/models/%ed%a0%80", "/?" + "a=b&" * 10_000, "*",
    "http://evil.example/health", "/v1/models/%0d%0aX-Evil:%201", "/v1/audio", "/v1/audio/transcriptions/", "/%", "/;/",
)  # fmt: skip


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "BREW", "get"]
)
def test_strange_paths_and_methods_find_nothing(victim: Server, method: str) -> None:
    with watched(victim):
        for path in (*PATHS, "/", POST, "/v1/models", "/metrics", "/health"):
            answer = ask(victim, head(victim, "Connection: close", "Content-Length: 0", method=method, path=path))
            first, *lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
            assert int(first.split()[1]) < 500, (path[:80], answer[-300:])
            assert not any(line.lower().startswith(b"x-evil") for line in lines)
            for word in (b"root:x:", b"import annotations", b"def create(", b"sha256"):
                assert word not in answer
            if path.startswith("/v1/") and statuses(answer)[0] >= 400 and method != "HEAD":
                error_of(answer)


def test_models_with_strange_names_do_not_exist(victim: Server) -> None:
    for name in ("..", "tiny/..", "../tiny", "TINY", "tiny%00", "tiny ", "%2e%2e%2ftiny", "<script>", "x" * 10_000):
        answer = ask(
            victim, head(victim, "Connection: close", method="GET", path=f"/v1/models/{name.replace(' ', '%20')}")
        )
        assert error_of(answer) == (404, "model_not_found"), name


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.99\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 10**6 + b"\r\n\r\n",
        b"GET /" + b"x" * 10**6 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n: x\r\n\r\n",
        b"\r\n" * 50_000,
    ],
    ids=lambda data: repr(data[:50]),
)
def test_what_is_no_http_is_refused(victim: Server, data: bytes) -> None:
    with watched(victim):
        answer = ask(victim, data, wait_s=4)
        assert set(statuses(answer)) <= {400, 403, 431}
        assert b"Traceback" not in answer


def test_many_headers_and_ranges_are_harmless(victim: Server) -> None:
    with watched(victim):
        many = [f"X-{number}: {number}" for number in range(1000)]
        assert statuses(ask(victim, head(victim, *many, "Connection: close", method="GET", path="/health"))) == [200]
        for ranges in (
            ",".join(["0-"] * 5000),
            ",".join(f"{n}-{n}" for n in range(0, 8000, 2)),
            "-0",
            "9-1",
            "x" * 9999,
        ):
            request = head(victim, f"Range: bytes={ranges}", "Connection: close", method="GET", path="/page.js")
            answer = ask(victim, request)
            assert statuses(answer)[0] < 500
            assert len(answer) < 2_000_000
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13")
        assert 101 not in statuses(ask(victim, head(victim, *upgrade, method="GET", path="/v1/realtime"), wait_s=1))


# --- the machine ---------------------------------------------------------------------------------------------------


def test_a_kill_in_an_upload_leaves_no_file(tmp_path: Path) -> None:
    temporary, state = tmp_path / "temporary", tmp_path / "state"
    temporary.mkdir()
    with serve(state, TMPDIR=str(temporary)) as server, ExitStack() as stack:
        disk = on_disk(server)
        stack.enter_context(Wire(server, head(server, FORM_TYPE, f"Content-Length: {10**8}") + a_file(bytes(20 << 20))))
        folder = Path(f"/proc/{server.process.pid}/fd")

        def uploads() -> list[os.stat_result]:
            return [one.stat() for one in folder.iterdir() if str(temporary) in str(one.readlink())]

        assert until(lambda: any(one.st_size > 19 << 20 for one in uploads()))
        assert all(one.st_nlink == 0 for one in uploads()), "a kill would leave it"
        assert on_disk(server) == disk
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        assert sorted(map(str, [*temporary.rglob("*"), *state.rglob("*")])) == disk


@pytest.mark.parametrize(
    "host", [ANYBODY, "::", "", "192.0.2.1", "example.org", "127.0.0.1.nip.io", "2130706433", "localhost.example"]
)
def test_strangers_are_not_served_without_keys(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: ran.append(server.config.host))
    open_to_all = settings_of(host=host, state=tmp_path, model=["tiny"])
    assert not open_to_all.is_local
    with pytest.raises(UsageError, match="no API keys"):
        starting.serve(open_to_all)
    assert ran == []
    starting.serve(open_to_all.model_copy(update={"insecure": True}))
    create_key(tmp_path / KEYS, "alice", Limits())
    starting.serve(open_to_all)
    assert ran == [host, host]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "localhost", "0:0:0:0:0:0:0:1"])
def test_this_machine_is_served_without_keys(host: str, tmp_path: Path) -> None:
    assert settings_of(host=host, state=tmp_path).is_local


def test_the_command_refuses_to_listen_to_strangers(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("ark-asr"), "serve", "--model", "tiny", "--host", ANYBODY]
    arguments = [*map(str, command), "--port", "0", "--state", str(tmp_path)]
    refused = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0
    assert "keys create" in refused.stderr
    assert "Traceback" not in refused.stderr
