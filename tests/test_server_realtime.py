"""The WebSocket /v1/realtime through the real OpenAI SDK; without a network where the SDK is too well-behaved."""

import asyncio
import base64
import difflib
import json
import os
import signal
import socket
import ssl
import statistics
import string
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import soundfile
import soxr
import websockets.sync.client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.resources.realtime.realtime import RealtimeConnection
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from starlette.types import Message
from uvicorn import Config
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed, InvalidStatus

import arkasr
from arkasr import audio
from arkasr.data import read_manifest
from arkasr.engines import Generation
from arkasr.engines.shared import Caller
from arkasr.errors import NoAnswerError
from arkasr.server import app as application
from arkasr.server import hearing, realtime
from arkasr.server import serve as starting
from arkasr.server.accounts import Accounts
from arkasr.server.keys import KEYS, Limits, Price, create_key
from arkasr.server.service import Service
from arkasr.server.settings import Settings
from conftest import MakeCheckpoint
from serving import Server, metric, serve
from test_deploy import caddy_config, free_port, needs, nginx_config
from test_server_fetch import CERTIFICATE, KEY

# The SDK connects in a way that websockets 17 calls old.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")
RATE = 24_000
PLACES = 4
QUIET = bytes(2 * RATE)  # a second
FRAME = 2 * RATE // 20  # bytes of 50 ms
HASTE = 1.1  # seconds from the end of speech to its text, at most, where nothing else is to be done
SPEECH = ("started", "stopped")
BUFFER, TEXT = "input_audio_buffer.", "conversation.item.input_audio_transcription."
STRICT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)


@dataclass(frozen=True)
class Clip:
    """A recording at 24 kHz, and what is said of it without haste."""

    name: str
    pcm: bytes
    text: str


def at_24_khz(waveform: audio.Waveform) -> bytes:
    samples = soxr.resample(waveform, audio.SAMPLE_RATE, RATE, quality="HQ")
    return bytes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def as_floats(pcm: bytes) -> tuple[Any, int]:
    return np.frombuffer(pcm, "<i2"), RATE


@pytest.fixture(scope="module")
def clips(shared: Path) -> list[Clip]:
    paths = [u.audio for u in read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test")][:24]
    pcms = [at_24_khz(audio.load(path)) for path in paths]
    said = arkasr.load_model("tiny").transcribe(map(as_floats, pcms))
    found = [Clip(path.stem, pcm, t.text) for path, pcm, t in zip(paths, pcms, said, strict=True)]
    assert len({clip.text for clip in found}) > 18  # or answers that were mixed up would go unseen
    return found


# ---- the real command and the real SDK ----


@dataclass(frozen=True)
class Site:
    server: Server
    secrets: dict[str, str]

    def client(self, key: str = "ann") -> openai.OpenAI:
        secret = self.secrets.get(key, key)
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=secret, max_retries=0, timeout=60)

    def connect(self, key: str = "ann", **query: str) -> Any:
        query = {"model": "tiny", "intent": "transcription", **query}
        return self.client(key).realtime.connect(model=query.pop("model"), extra_query=query)

    def num_open(self) -> float:
        headers = {"authorization": f"Bearer {self.secrets['ann']}"} if self.secrets else {}
        return metric(self.server, "arkasr_realtime_sockets", headers=headers)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    state = tmp_path_factory.mktemp("realtime")
    limits = {
        "ann": Limits(price=Price.parse("1/second")),
        "bob": Limits(audio_seconds_per_day=6),
        "cy": Limits(models=("nothing",)),
    }
    secrets = {name: create_key(state / KEYS, name, limit)[1] for name, limit in limits.items()}
    with serve(state, "--max-realtime", PLACES, "--alias", "whisper-1=tiny", "--shutdown-s", 5) as server:
        yield Site(server, secrets)


def send(connection: RealtimeConnection, pcm: bytes, *, size: int = FRAME, speed: float = 0.0) -> None:
    """Audio in pieces, as fast as it goes, or at so many times its own speed."""
    begun = time.monotonic()
    for start in range(0, len(pcm), size):
        if speed:
            time.sleep(max(0.0, begun + start / (2 * RATE * speed) - time.monotonic()))
        connection.input_audio_buffer.append(audio=base64.b64encode(pcm[start : start + size]).decode())


def until(connection: RealtimeConnection, *kinds: str) -> list[Any]:
    """Events up to one of these kinds, each of which is as the SDK's types say."""
    events: list[Any] = []
    while not events or not events[-1].type.endswith(kinds):
        events.append(connection.recv())
        STRICT.validate_python(events[-1].to_dict(mode="json"), strict=True)
    return events


def without_detector(**changes: Any) -> Any:
    return {"type": "transcription", "audio": {"input": {"turn_detection": None, **changes}}}


def assert_whole(events: list[Any], before: str | None = None) -> str:
    """Each item's events in order, its deltas in a row its transcript; all transcripts, joined."""
    started: list[str] = []
    deltas: dict[str, str] = {}
    for event in events:
        kind = event.type.rpartition(".")[2]
        if kind == "speech_started":
            assert set(started) == set(deltas), "two utterances at once"
            started.append(event.item_id)
        elif kind == "speech_stopped":
            assert event.item_id == started[-1]
        elif kind == "committed":
            assert event.previous_item_id == before
            before = event.item_id
        elif kind in {"added", "done"}:
            assert event.item.id == before
        elif kind == "delta":
            deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
        elif kind == "completed":
            assert event.item_id == before
            assert deltas.setdefault(event.item_id, "") == event.transcript
        else:
            assert kind in {"created", "updated"}, event
    assert len({event.event_id for event in events}) == len(events)
    return " ".join(filter(None, deltas.values()))


def test_utterances_as_the_sdk_hears_them(site: Site, clips: list[Clip]) -> None:
    """What is said behind other speech, and cut at its pauses, may differ from what is said alone."""
    other = []
    with site.connect() as connection:
        (created,) = until(connection, "created")
        assert created.session.type == "transcription"
        assert created.session.audio.input.transcription.model == "tiny"
        previous, at_ms = None, 0.0
        for clip in clips[:12]:
            send(connection, clip.pcm + QUIET)
            connection.input_audio_buffer.commit()  # of nothing: when that is said, all before was
            events = until(connection, "error")[:-1]
            said = assert_whole(events, previous)
            previous = [event.item_id for event in events if event.type.endswith("committed")][-1]
            other += [f"{clip.name}: {said!r}, offline {clip.text!r}"] if said != clip.text else []
            answers = [event for event in events if event.type.endswith("completed")]
            starts_ms = [event.audio_start_ms for event in events if event.type.endswith("started")]
            ends_ms = [event.audio_end_ms for event in events if event.type.endswith("stopped")]
            end_ms = at_ms + len(clip.pcm) * 500 / RATE
            assert at_ms - 40 <= starts_ms[0] < ends_ms[-1] <= end_ms + 40
            for start_ms, stop_ms, answer in zip(starts_ms, ends_ms, answers, strict=True):
                assert answer.usage.type == "duration"
                assert answer.usage.seconds == pytest.approx((stop_ms - start_ms) / 1000, abs=0.002)
                assert float(answer.usage.cost) == answer.usage.seconds
            at_ms = end_ms + 1000
    print(other)
    assert len(other) <= 2, other


def test_what_is_committed_is_an_upload(site: Site, clips: list[Clip], tmp_path: Path) -> None:
    """Long audio, too, which is several segments; and what is kept is only that since the last commit."""
    long = b"".join(clip.pcm for clip in clips)
    client, path = site.client(), tmp_path / "a.wav"
    with site.connect() as connection:
        session = {**without_detector(), "include": ["item.input_audio_transcription.logprobs"]}
        connection.session.update(session=session)
        assert until(connection, "updated")[-1].session.include == session["include"]
        for pcm in (clips[0].pcm, long, clips[1].pcm):
            soundfile.write(path, *as_floats(pcm), subtype="PCM_16")
            uploaded = client.audio.transcriptions.create(model="tiny", file=path, include=["logprobs"])
            send(connection, pcm, size=1 << 18)
            connection.input_audio_buffer.commit()
            events = until(connection, "completed")
            answer = events[-1]
            assert answer.transcript == uploaded.text
            assert answer.usage.seconds == uploaded.usage.seconds  # type: ignore[union-attr]
            assert [one.to_dict() for one in answer.logprobs] == [one.to_dict() for one in uploaded.logprobs or ()]
            deltas = [event.delta for event in events if event.type.endswith("delta")]
            assert "".join(deltas) == answer.transcript
            assert len(deltas) == 1 or pcm is long
        assert len(long) > 60 * 2 * RATE


def test_text_comes_while_somebody_speaks_and_its_end_soon(site: Site, clips: list[Clip]) -> None:
    clip = max(clips[:6], key=lambda clip: len(clip.pcm))
    with site.connect() as connection:
        sending = threading.Thread(target=send, args=[connection, clip.pcm + QUIET], kwargs={"speed": 6})
        sending.start()
        times: dict[str, float] = {}
        while "completed" not in times:
            event = connection.recv()
            times.setdefault(event.type.rpartition(".")[2], time.monotonic())
        sending.join()
    assert times["speech_started"] < times["delta"] < times["speech_stopped"]
    assert times["completed"] - times["speech_stopped"] < HASTE


def test_a_commit_ends_an_utterance_and_a_clear_forgets_it(site: Site, clips: list[Clip]) -> None:
    with site.connect() as connection:
        send(connection, clips[0].pcm)  # without the pause that would end it
        connection.input_audio_buffer.commit(event_id="mine")
        assert assert_whole(until(connection, "completed")) == clips[0].text
        connection.input_audio_buffer.commit(event_id="again")
        error = until(connection, "error")[-1].error
        assert (error.code, error.event_id) == ("input_audio_buffer_commit_empty", "again")
        send(connection, clips[1].pcm)
        connection.input_audio_buffer.clear()
        events = until(connection, "cleared")
        heard = [event.type.rpartition(".")[2] for event in events if event.type != f"{TEXT}delta"]
        assert heard == ["speech_started", "speech_stopped", "cleared"]
        send(connection, clips[2].pcm + QUIET)
        assert until(connection, "completed")[-1].transcript == clips[2].text


def test_places_are_few_and_who_vanishes_leaves_one(site: Site, clips: list[Clip]) -> None:
    held = [site.connect().enter() for _ in range(PLACES)]
    with pytest.raises(InvalidStatus) as refused:
        site.connect().enter()
    response = refused.value.response
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert json.loads(response.body)["error"]["code"] == "server_overloaded"
    assert response.headers["x-request-id"].startswith("req_")
    assert site.num_open() == PLACES
    gone = held.pop()
    send(gone, clips[0].pcm)
    wire = gone._connection.socket
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # it is reset, without a word
    wire.shutdown(socket.SHUT_RDWR)
    assert soon(lambda: site.num_open() == PLACES - 1)
    with site.connect() as connection:
        assert until(connection, "created")
    for connection in held:
        connection.close()
    assert soon(lambda: site.num_open() == 0)


def soon(is_so: Callable[[], bool], *, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_a_day_that_is_used_up_ends_the_session_and_what_was_answered_is_charged(site: Site, clips: list[Clip]) -> None:
    with site.connect("bob") as connection:
        answered_s = 0.0
        for clip in clips[:3]:
            send(connection, clip.pcm + QUIET)
        while (event := connection.recv()).type != "error":
            answered_s += event.usage.seconds if event.type == f"{TEXT}completed" else 0
        error = event.error
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert error.code == "audio_quota_exceeded"
        assert error.type == "rate_limit_error"
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert 3 < answered_s <= 6
    assert soon(lambda: used_s(site.server.state, "bob") == pytest.approx(answered_s))
    log = site.server.log.read_text()
    assert '"route": "realtime"' in log
    assert not any(clip.text in log for clip in clips)
    assert "Traceback" not in log


def used_s(state: Path, key: str) -> float:
    return sum(line.num_samples for line in Accounts(state).usage() if line.key == key) / audio.SAMPLE_RATE


# ---- what is no event ----

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
PATHS = (
    "type", "audio", "audio.input", "audio.input.format", "audio.input.format.type", "audio.input.format.rate",
    "audio.input.noise_reduction", "audio.input.transcription", "audio.input.transcription.model", "include",
    "audio.input.transcription.keywords", "audio.input.turn_detection", "audio.input.turn_detection.threshold",
    "audio.input.turn_detection.silence_duration_ms", "audio.output", "nothing.of.the.kind",
)  # fmt: skip


def nested(path: str, value: object) -> dict[str, Any]:
    """A session of which one thing is this; the turn detection's type stands beside."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    turns = value.get("audio", {}).get("input", {}).get("turn_detection") if path.startswith("audio.input.") else None
    if isinstance(turns, dict):
        turns.setdefault("type", "server_vad")
    return {"type": "transcription", **value}


IDS = st.none() | st.text(max_size=20)
CHANGES = st.builds(
    lambda path, value, name: {"type": "session.update", "session": nested(path, value), "event_id": name},
    st.sampled_from(PATHS), JUNK, IDS,
)  # fmt: skip
APPENDS = st.builds(
    lambda audio, name: {"type": "input_audio_buffer.append", "audio": audio, "event_id": name},
    JUNK | st.text(string.ascii_letters + "+/=", max_size=9), IDS,
)  # fmt: skip
EVENTS = st.builds(
    lambda kind, more, name: {**more, "type": kind, "event_id": name},
    st.sampled_from(["response.create", "input_audio_buffer.clear", "conversation.item.create", "", "error"]) | JUNK,
    st.dictionaries(st.sampled_from(["audio", "x", "session"]), JUNK, min_size=1), IDS,
)  # fmt: skip
FRAMES = st.one_of(
    (CHANGES | APPENDS | EVENTS | JUNK).map(json.dumps), st.text(max_size=40), st.binary(min_size=1, max_size=40)
)


class Raw:
    """A connection that sends whatever it is told to."""

    def __init__(self, site: Site) -> None:
        headers = {"authorization": f"Bearer {site.secrets['ann']}"}
        url = f"ws://127.0.0.1:{site.server.port}/v1/realtime?intent=transcription"
        self.wire = websockets.sync.client.connect(url, additional_headers=headers, compression=None, max_size=None)
        assert self.event()["type"] == "session.created"

    def event(self) -> dict[str, Any]:
        event = json.loads(self.wire.recv(timeout=20))
        STRICT.validate_python(event, strict=True)
        assert isinstance(event, dict)
        return event

    def ask(self, frame: str | bytes, *, text: bool | None = None) -> dict[str, Any] | None:
        """The one event, or none, that a frame is answered with."""
        self.wire.send(frame, text=text)
        self.wire.send(json.dumps({"type": "input_audio_buffer.clear"}))
        event = self.event()
        if event["type"] == "input_audio_buffer.cleared":
            return None
        assert self.event()["type"] == "input_audio_buffer.cleared"
        return event

    def assert_lives(self, clip: Clip) -> None:
        self.wire.send(json.dumps({"type": "session.update", "session": without_detector()}))
        self.wire.send(json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(clip.pcm).decode()}))
        self.wire.send(json.dumps({"type": "input_audio_buffer.commit"}))
        while not (event := self.event())["type"].endswith("completed"):
            assert event["type"] != "error", event
        assert event["transcript"] == clip.text
        self.wire.close()


def test_what_is_no_event_is_answered_with_an_error_and_the_session_goes_on(site: Site, clips: list[Clip]) -> None:
    raw = Raw(site)

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(FRAMES)
    def attempt(frame: str | bytes) -> None:
        event = raw.ask(frame)
        try:
            record = json.loads(frame)
        except (ValueError, RecursionError):
            record = None
        fields = record if isinstance(record, dict) else {}
        if event is None or event["type"] == "session.updated":  # what is right, if only just
            assert fields["type"] in {"session.update", "input_audio_buffer.append"}
            return
        error = event["error"]
        assert error["type"] in {"invalid_request_error", "permission_error"}
        assert error["code"]
        assert error["message"]
        assert error["event_id"] == fields.get("event_id")

    attempt()
    raw.assert_lives(clips[0])


DEEP, MANY = "[" * 100_000 + "]" * 100_000, "[" + "{}," * 3_000_000 + "{}]"


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ("{", "invalid_event", None),
        ("[]", "invalid_event", None),
        (b'{"type":"input_audio_buffer.clear"}', "invalid_event", None),
        (DEEP, "invalid_event", None),
        (f'{{"type":"input_audio_buffer.append","audio":{MANY}}}', "invalid_event", None),
        (f'{{"type":"input_audio_buffer.append","audio":{"1" * 9_000_000}}}', "invalid_event", None),
        ("{}", "unknown_event", "type"),
        ('{"type":"response.create"}', "unknown_event", "type"),
        ('{"type":"\\ud800"}', "unknown_event", "type"),
        ('{"type":"input_audio_buffer.append"}', "missing_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"AAA"}', "invalid_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"AA=="}', "invalid_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"A A="}', "invalid_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"\\ud800"}', "invalid_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":["AAA="]}', "invalid_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"","rate":1}', "unknown_parameter", "rate"),
        ('{"type":"input_audio_buffer.clear","event_id":1}', "invalid_parameter", "event_id"),
        (f'{{"type":"input_audio_buffer.clear","event_id":"{"x" * 600}"}}', "invalid_parameter", "event_id"),
        ('{"type":"input_audio_buffer.clear","event_id":"\\ud800"}', "invalid_parameter", "event_id"),
        ('{"type":"input_audio_buffer.clear","\\ud800":1}', "invalid_parameter", ""),
        ('{"type":"input_audio_buffer.commit"}', "input_audio_buffer_commit_empty", None),
        ('{"type":"session.update"}', "missing_parameter", "session"),
        ('{"type":"session.update","session":{}}', "missing_parameter", "session.type"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_errors_by_name(raw: Raw, frame: str | bytes, code: str, param: str | None) -> None:
    event = raw.ask(frame)
    assert event is not None
    assert (event["error"]["code"], event["error"]["param"]) == (code, param)
    assert len(json.dumps(event)) < 1500


@pytest.fixture(scope="module")
def raw(site: Site, clips: list[Clip]) -> Iterator[Raw]:
    raw = Raw(site)
    yield raw
    raw.assert_lives(clips[0])


INPUT = "audio.input."
TURNS = INPUT + "turn_detection"


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("type", "realtime", "unsupported_parameter"),
        ("type", "other", "invalid_parameter"),
        (INPUT + "format.type", "audio/pcmu", "unsupported_parameter"),
        (INPUT + "format.rate", 16_000, "invalid_parameter"),
        (INPUT + "format", None, "invalid_parameter"),
        (TURNS + ".type", "semantic_vad", "unsupported_parameter"),
        (TURNS + ".threshold", 1.5, "invalid_parameter"),
        (TURNS + ".silence_duration_ms", 20, "invalid_parameter"),
        (TURNS + ".prefix_padding_ms", "300", "invalid_parameter"),
        (INPUT + "transcription", None, "invalid_parameter"),
        (INPUT + "transcription.model", "nothing", "model_not_found"),
        (INPUT + "transcription.mode", "x", "unknown_parameter"),
        ("audio.output", {"voice": "x"}, "unknown_parameter"),
        ("include", ["item.other"], "invalid_parameter"),
    ],
)
def test_settings_that_are_refused(raw: Raw, path: str, value: object, code: str) -> None:
    event = raw.ask(json.dumps({"type": "session.update", "session": nested(path, value), "event_id": "e"}))
    assert event is not None
    error = event["error"]
    assert (error["code"], error["event_id"]) == (code, "e")
    assert f"session.{path}".startswith(error["param"].rpartition(".")[0])


def test_settings_are_kept_and_hints_are_named(site: Site) -> None:
    raw = Raw(site)
    hints = {"language": "en", "languages": ["en"], "keywords": ["a"], "prompt": "p", "delay": "low"}
    given = {
        "noise_reduction": {"type": "near_field"},
        "transcription": {"model": "whisper-1", **hints},
        "turn_detection": {"type": "server_vad", "threshold": 0.25, "create_response": False, "idle_timeout_ms": 5000},
    }
    event = raw.ask(json.dumps({"type": "session.update", "session": nested("audio.input", given)}))
    assert event is not None
    session = event["session"]
    assert session["arkasr_ignored"] == [
        "audio.input.noise_reduction", *(f"audio.input.transcription.{name}" for name in hints),
        f"{TURNS}.create_response", f"{TURNS}.idle_timeout_ms",
    ]  # fmt: skip
    assert session["audio"]["input"]["transcription"] == given["transcription"]
    event = raw.ask(json.dumps({"type": "session.update", "session": nested(TURNS + ".silence_duration_ms", 900)}))
    assert event is not None
    turns = event["session"]["audio"]["input"]["turn_detection"]
    assert (turns["threshold"], turns["silence_duration_ms"], turns["prefix_padding_ms"]) == (0.25, 900, 400)
    event = raw.ask(json.dumps({"type": "session.update", "session": nested("audio.input.noise_reduction", None)}))
    assert event is not None
    assert "audio.input.noise_reduction" not in event["session"]["arkasr_ignored"]
    raw.wire.close()


def test_only_a_frame_over_the_limit_closes(site: Site, clips: list[Clip]) -> None:
    raw = Raw(site)
    event = raw.ask(b"\xff\xfe", text=True)  # no UTF-8
    assert event is not None
    assert event["error"]["code"] == "invalid_event"
    raw.assert_lives(clips[0])
    raw = Raw(site)
    largest = base64.b64encode(bytes(12 << 20)).decode()[: (16 << 20) - 64]
    assert raw.ask(f'{{"type":"input_audio_buffer.append","audio":"{largest}"}}') is None
    with pytest.raises(ConnectionClosed) as closed:
        raw.ask("x" * (17 << 20))
    code = closed.value.rcvd and closed.value.rcvd.code  # none, where it was still sending
    assert code in {None, 1009}


@pytest.mark.parametrize(
    "line", ["Content-Length: 5", "Transfer-Encoding: chunked", "X: " + "y" * 20_000, "X: y\r\n" * 200]
)
def test_a_head_that_is_no_websockets_is_answered(site: Site, line: str) -> None:
    """uvicorn left such a connection open for ever."""
    head = (
        "GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{line.strip()}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", site.server.port), timeout=5) as wire:
        wire.sendall(head.encode())
        answer = b"".join(iter(lambda: wire.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")


# ---- without a network ----


class Wire:
    """A WebSocket of which a test sees each message that is taken from it, and may leave unread what it says."""

    def __init__(self, app: Any, query: str = "", headers: dict[str, str] | None = None, protocols: str = "") -> None:
        named = {"host": "127.0.0.1:8000", **(headers or {})}
        self._app, self._scope = app, {
            "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
            "scheme": "ws", "path": "/v1/realtime", "raw_path": b"/v1/realtime", "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in named.items()], "state": {},
            "subprotocols": protocols.split(), "extensions": {"websocket.http.response": {}},
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        self._to_server: asyncio.Queue[Message] = asyncio.Queue()
        self._told: asyncio.Queue[Message] = asyncio.Queue()
        self.is_read = asyncio.Event()
        self.is_read.set()
        self.num_taken = 0

    async def _receive(self) -> Message:
        message = await self._to_server.get()
        self.num_taken += 1
        return message

    async def _send(self, message: Message) -> None:
        await self.is_read.wait()
        self._told.put_nowait(dict(message))

    def __await__(self) -> Any:
        return self._open().__await__()

    async def _open(self) -> Message:
        """What the handshake is answered with."""
        self._to_server.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        answer = await self.told()
        if answer["type"] == "websocket.http.response.start":
            answer["error"] = json.loads((await self.told())["body"])["error"]
            await self.task
        return answer

    async def told(self) -> Message:
        async with asyncio.timeout(10):
            return await self._told.get()

    def say(self, kind: str, **fields: Any) -> None:
        self._to_server.put_nowait({"type": "websocket.receive", "text": json.dumps({"type": kind, **fields})})

    def append(self, pcm: bytes, **fields: Any) -> None:
        self.say(f"{BUFFER}append", audio=base64.b64encode(pcm).decode(), **fields)

    def leave(self) -> None:
        self._to_server.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def event(self, *kinds: str) -> dict[str, Any]:
        """The next event of these kinds."""
        while True:
            message = await self.told()
            event: dict[str, Any] = json.loads(message["text"])
            STRICT.validate_python(event, strict=True)
            if event["type"].endswith(kinds):
                return event

    async def end(self) -> tuple[str | None, int]:
        """The code of the last error, and that of the close."""
        code = None
        while (message := await self.told())["type"] == "websocket.send":
            event = json.loads(message["text"])
            code = event["error"]["code"] if event["type"] == "error" else code
        self.leave()
        await self.task
        return code, message["code"]


Body = Callable[[Service, Any], Any]


@pytest.fixture
def here(tmp_path: Path) -> Callable[..., None]:
    """here(body, **settings): run `await body(service, app)` while the server of an app runs."""

    def run(body: Body, **changes: Any) -> None:
        async def main() -> None:
            app = application.create(Settings(**{"model": ["tiny"], "state": tmp_path, **changes}))
            service = app.state.service
            async with service.running():
                await body(service, app)
                assert metric_of(service, "arkasr_realtime_sockets") == 0

        asyncio.run(main())

    return run


def metric_of(service: Service, name: str) -> float:
    (line,) = [line for line in service.metrics.text().decode().splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


async def opened(app: Any, **fields: Any) -> Wire:
    wire = Wire(app, **fields)
    assert (await wire)["type"] == "websocket.accept"
    await wire.event("session.created")
    return wire


HANDSHAKES = [
    ({}, None, None),
    ({"query": "intent=transcription&model=whisper-1"}, None, None),
    ({"headers": {"origin": "http://127.0.0.1:8000"}}, None, None),
    ({"headers": {"origin": "https://friend.example"}}, None, None),
    ({"query": "intent=conversation"}, 400, "unsupported_parameter"),
    ({"query": "intent=transcription&call_id=1"}, 400, "unknown_parameter"),
    ({"query": "model=nothing"}, 404, "model_not_found"),
    ({"headers": {"origin": "https://evil.example"}}, 403, "wrong_origin"),
    ({"headers": {"origin": "http://127.0.0.1:8001"}}, 403, "wrong_origin"),
    ({"headers": {"host": "evil.example"}}, 403, "wrong_host"),
]


def test_handshakes_without_keys(here: Callable[..., None]) -> None:
    async def body(_service: Service, app: Any) -> None:
        for fields, status, code in HANDSHAKES:
            wire = Wire(app, **fields)  # type: ignore[arg-type]
            answer = await wire
            headers = {name.decode(): value.decode() for name, value in answer["headers"]}
            assert headers["x-request-id"].startswith("req_")
            assert headers["x-content-type-options"] == "nosniff"
            if code is None:
                assert answer["type"] == "websocket.accept", fields
                wire.leave()
                await wire.task
            else:
                assert (answer["status"], answer["error"]["code"]) == (status, code)

    here(body, alias=["whisper-1=tiny"], cors_origin=["https://friend.example"])


def test_keys_come_in_a_header_or_a_subprotocol(here: Callable[..., None], tmp_path: Path) -> None:
    limits = {"ann": Limits(requests_per_minute=3), "cy": Limits(models=("nothing",))}
    secrets = {name: create_key(tmp_path / KEYS, name, limit)[1] for name, limit in limits.items()}

    async def body(_service: Service, app: Any) -> None:
        async def ask(protocols: str = "", key: str | None = None) -> tuple[Any, ...]:
            wire = Wire(app, headers={} if key is None else {"authorization": f"Bearer {key}"}, protocols=protocols)
            answer = await wire
            if answer["type"] == "websocket.accept":
                wire.leave()
                await wire.task
                return "accepted", answer.get("subprotocol")
            return answer["status"], answer["error"]["code"]

        name = "openai-insecure-api-key."
        assert await ask() == (401, "missing_api_key")
        assert await ask("realtime") == (401, "missing_api_key")
        assert await ask(f"realtime {name}") == (401, "missing_api_key")
        assert await ask(f"realtime {name}ark-wrong") == (401, "invalid_api_key")
        assert await ask(f"realtime {name}{secrets['ann']}", "ark-wrong") == (401, "invalid_api_key")
        assert await ask(key=secrets["cy"]) == (403, "model_not_allowed")
        assert await ask(key=secrets["ann"]) == ("accepted", None)
        assert await ask(f"realtime {name}{secrets['ann']} openai-beta.realtime-v1") == ("accepted", "realtime")
        assert await ask(f"{name}{secrets['ann']}") == ("accepted", None)
        assert await ask(key=secrets["ann"]) == (429, "rate_limit_exceeded")

    here(body)


def test_what_is_no_socket_says_so(here: Callable[..., None]) -> None:
    async def body(_service: Service, app: Any) -> None:
        wire = Wire(app)
        wire._scope["path"] = "/v1/audio/transcriptions"
        answer = await wire
        assert (answer["status"], answer["error"]["code"]) == (404, "not_found")
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            reply = await client.get("/v1/realtime")
        assert (reply.status_code, reply.headers["upgrade"]) == (426, "websocket")

    here(body)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"realtime_idle_s": 0.2}, "idle_timeout"), ({"realtime_s": 0.2}, "session_expired"), ({}, "shutting_down")],
)
def test_sessions_end_and_what_is_being_said_is_answered_first(
    here: Callable[..., None], clips: list[Clip], changes: dict[str, float], code: str
) -> None:
    async def body(service: Service, app: Any) -> None:
        wire = await opened(app)
        wire.append(clips[0].pcm)
        assert await wire.event("speech_started")
        if not changes:
            service.stop_soon()
            assert (await Wire(app))["error"]["code"] == "shutting_down"
        assert (await wire.event("completed"))["transcript"] == clips[0].text
        wire.append(clips[1].pcm + QUIET)  # is not heard any more
        assert await wire.end() == (code, 1001)

    here(body, **changes)


def test_who_reads_nothing_is_left_and_costs_little(here: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "UNREAD_S", 0.15)

    async def body(_service: Service, app: Any) -> None:
        wire = await opened(app)
        wire.is_read.clear()
        for _ in range(5000):
            wire.say("nothing")
        await asyncio.sleep(0.1)
        assert wire.num_taken < realtime.MOST_UNSENT + realtime.MOST_ACTIONS + 10
        async with asyncio.timeout(5):
            await asyncio.sleep(0.1)
            for _ in range(5000):
                wire.leave()
            await wire.task

    here(body)


def test_what_is_not_heard_yet_is_little(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, clips: list[Clip]
) -> None:
    """A client in great haste waits, its events keep their order, and in the end all is heard."""
    goes_on, heard, take = threading.Event(), Counter[str](), hearing.Hearing.take

    def slow(self: hearing.Hearing, data: bytes) -> None:
        goes_on.wait(10)
        heard["pieces"] += 1
        heard["bytes"] += len(data)
        take(self, data)

    monkeypatch.setattr(hearing.Hearing, "take", slow)

    async def body(_service: Service, app: Any) -> None:
        for pcm, most in ((bytes(hearing.BYTES_PER_S), 30), (bytes(2), realtime.MOST_ACTIONS)):
            goes_on.clear()
            heard.clear()
            wire = await opened(app)
            taken = wire.num_taken
            for _ in range(2 * most):
                wire.append(pcm)
            wire.append(clips[0].pcm + QUIET)
            await asyncio.sleep(0.1)
            assert most <= wire.num_taken - taken <= most + 2
            goes_on.set()
            assert (await wire.event("completed"))["transcript"] == clips[0].text
            assert heard["bytes"] == 2 * most * len(pcm) + len(clips[0].pcm + QUIET)
            assert heard["pieces"] < 10  # what waits is heard at once
            wire.leave()
            await wire.task

    here(body)


def test_what_is_kept_for_a_commit_has_an_end(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, clips: list[Clip]
) -> None:
    monkeypatch.setattr(hearing, "MOST_KEPT_BYTES", len(clips[0].pcm) + 10)

    async def body(_service: Service, app: Any) -> None:
        wire = await opened(app)
        wire.say("session.update", session=without_detector())
        wire.append(clips[0].pcm)
        wire.append(QUIET, event_id="much")
        error = (await wire.event("error"))["error"]
        assert (error["code"], error["event_id"]) == ("input_audio_buffer_full", "much")
        wire.say(f"{BUFFER}commit")
        assert (await wire.event("completed"))["transcript"] == clips[0].text
        wire.append(clips[1].pcm[: len(clips[0].pcm)])
        wire.say(f"{BUFFER}clear")
        wire.append(bytes(hearing.LEAST_COMMIT_BYTES - 2))
        wire.say(f"{BUFFER}commit")
        assert (await wire.event("error"))["error"]["code"] == "input_audio_buffer_commit_empty"
        wire.append(bytes(2))
        wire.say(f"{BUFFER}commit")
        assert (await wire.event("completed"))["transcript"] == ""
        wire.leave()
        await wire.task

    here(body)


def test_the_turn_detection_may_change_and_no_audio_is_lost(
    here: Callable[..., None], clips: list[Clip], make_checkpoint: MakeCheckpoint
) -> None:
    async def body(_service: Service, app: Any) -> None:
        wire = await opened(app)
        wire.append(clips[0].pcm)  # ended by the update
        wire.say("session.update", session=without_detector())
        assert (await wire.event("completed"))["transcript"] == clips[0].text
        wire.append(clips[1].pcm)  # kept, and found when the detector is on again
        wire.say("session.update", session=nested(TURNS, {"type": "server_vad", "silence_duration_ms": 800}))
        wire.append(QUIET)
        started = await wire.event("speech_started")
        assert started["audio_start_ms"] >= len(clips[0].pcm) * 500 // RATE
        assert (await wire.event("completed"))["transcript"] == clips[1].text
        wire.say("session.update", session=nested("audio.input.transcription.model", "other"))
        error = (await wire.event("error"))["error"]
        assert error["code"] == "model_is_set"
        assert error["param"] == "session.audio.input.transcription.model"
        wire.leave()
        await wire.task

    here(body, model=["tiny", str(make_checkpoint("other"))])


def test_two_models_at_once(here: Callable[..., None], clips: list[Clip], make_checkpoint: MakeCheckpoint) -> None:
    async def body(service: Service, app: Any) -> None:
        first = await opened(app, query="model=whisper-1")
        second = await opened(app)
        second.say("session.update", session=nested("audio.input.transcription.model", "other"))
        second.append(clips[1].pcm[:RATE])
        for clip in clips[:2]:
            first.append(clip.pcm + QUIET)
        second.say("session.update", session=without_detector())
        second.append(clips[1].pcm)
        second.say(f"{BUFFER}commit")
        assert (await second.event("completed"))["transcript"] not in {clip.text for clip in clips}
        assert [(await first.event("completed"))["transcript"] for _ in "ab"] == [clip.text for clip in clips[:2]]
        for wire in (first, second):
            wire.leave()
            await wire.task
        assert 'arkasr_audio_seconds_total{model="other"}' in service.metrics.text().decode()

    here(body, model=["tiny", str(make_checkpoint("other"))], alias=["whisper-1=tiny"])


def test_a_failure_of_one_utterance_is_told_and_the_session_goes_on(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, clips: list[Clip]
) -> None:
    generate = Caller.generate

    def fail(*_: Any) -> list[Generation]:
        return [Generation((), (), None, failure=NoAnswerError("http://10.0.0.1 said no"))]

    async def body(_service: Service, app: Any) -> None:
        wire = await opened(app)
        for session in (nested(TURNS, {"type": "server_vad"}), without_detector()):
            wire.say("session.update", session=session)
            for how, kind in ((fail, "failed"), (generate, "completed")):
                monkeypatch.setattr(Caller, "generate", how)
                wire.append(clips[0].pcm)
                wire.say(f"{BUFFER}commit")
                event = await wire.event("failed", "completed")
                assert event["type"].endswith(kind)
                assert kind == "completed" or event["error"]["code"] == "upstream_failed"
                assert "10.0.0.1" not in json.dumps(event)
        wire.leave()
        await wire.task

    here(body)


def test_a_bug_of_ours_closes_and_is_told(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, clips: list[Clip]
) -> None:
    for place in ("take", "commit"):
        monkeypatch.setattr(hearing.Hearing, place, lambda *_: 1 / 0)

    async def body(_service: Service, app: Any) -> None:
        wire = await opened(app)
        wire.append(clips[0].pcm)
        with pytest.raises(ZeroDivisionError):
            assert await wire.end() == ("internal_error", 1011)

    here(body)


def test_for_who_goes_nothing_more_is_heard_and_no_thread_is_left(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, clips: list[Clip]
) -> None:
    ended, generate = [], Caller.generate

    def endless(self: Caller, *arguments: Any) -> list[Generation]:
        deadline = time.monotonic() + 4
        while self.error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.append(self.error)
        return generate(self, *arguments)

    monkeypatch.setattr(Caller, "generate", endless)

    async def body(_service: Service, app: Any) -> None:
        wire = await opened(app)
        wire.append(clips[0].pcm + QUIET)
        await wire.event("speech_started")
        wire.leave()
        async with asyncio.timeout(3):
            await wire.task
        assert len(ended) == 1

    here(body)


# ---- the process around it ----


def test_a_stopped_server_answers_what_was_committed(tmp_path: Path, clips: list[Clip]) -> None:
    """uvicorn itself closes all WebSockets at once, whatever is being done."""
    with serve(tmp_path / "state") as server:
        with Site(server, {}).connect() as connection:
            connection.session.update(session=without_detector())
            send(connection, b"".join(clip.pcm for clip in clips), size=1 << 18)
            connection.input_audio_buffer.commit()
            until(connection, "committed")
            server.process.send_signal(signal.SIGTERM)
            events = until(connection, "error")
            assert events[-1].error.code == "shutting_down"
            (answer,) = [event for event in events if event.type.endswith("completed")]
            assert answer.transcript == "".join(event.delta for event in events if event.type.endswith("delta"))
            assert clips[-1].text[-5:] in answer.transcript[-20:]
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
        assert server.process.wait(5) in {0, -signal.SIGTERM}


class Transport:
    """Of which nothing is asked but whether it was closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, _data: bytes) -> None:
        pass


def test_who_is_not_read_from_may_be_late_to_answer_a_ping() -> None:
    """A client whose audio waits was taken for dead: its answer waits behind the audio."""

    async def main() -> None:
        config = Config(lambda: None, ws=starting._Socket, log_config=None)
        config.load()
        for is_waiting in (True, False):
            wire = starting._Socket(config, ServerState(), {})
            wire.transport = transport = Transport()  # type: ignore[assignment]
            wire.read_paused = is_waiting
            wire.keepalive_timeout()
            assert transport.is_closed is not is_waiting
            assert (wire.ping_timer is not None) is is_waiting
            wire.stop_keepalive()

    asyncio.run(main())


@pytest.mark.slow
def test_sixteen_speak_at_once(tmp_path: Path, clips: list[Clip]) -> None:
    """At the speed of speech, each another clip three times over: all of it, nobody else's text, and soon."""
    voices = [clip for clip in clips if len(clip.text.split()) > 2][:16]
    assert len({clip.text for clip in voices}) == 16
    with serve(tmp_path / "state", "--max-realtime", 16) as server, ThreadPoolExecutor(16) as pool:
        site = Site(server, {})
        spoken = list(pool.map(lambda clip: speak(site, clip), voices))
        assert site.num_open() == 0
    late_s = [one for _, late in spoken for one in late]
    print(f"late: median {statistics.median(late_s):.2f} s, most {max(late_s):.2f} s of {len(late_s)}")
    for clip, (said, _) in zip(voices, spoken, strict=True):
        nearest = max(voices, key=lambda other: difflib.SequenceMatcher(None, 3 * f"{other.text} ", said).ratio())
        assert nearest is clip, f"{clip.name}: {said!r}, offline {clip.text!r}"
    # Behind the last sound, of which half a second is what the detector waits for.
    assert statistics.median(late_s) < 1
    assert max(late_s) < 3


def speak(site: Site, clip: Clip) -> tuple[str, list[float]]:
    """What is said of a clip, three times over, and how late behind the end of each utterance."""
    with site.connect() as connection:
        begun, said, late_s = time.monotonic(), "", []
        ends: dict[str, float] = {}
        pcm = (clip.pcm + QUIET) * 3
        sending = threading.Thread(target=speak_all, args=[connection, pcm])
        sending.start()
        while (event := connection.recv()).type != "error":
            if event.type.endswith("speech_stopped"):
                ends[event.item_id] = begun + event.audio_end_ms / 1000
            if event.type.endswith("completed"):
                late_s.append(time.monotonic() - ends.pop(event.item_id))
                said += event.transcript + " "
        sending.join()
        assert event.error.code == "input_audio_buffer_commit_empty"
    return said, late_s


def speak_all(connection: RealtimeConnection, pcm: bytes) -> None:
    send(connection, pcm, speed=1)
    connection.input_audio_buffer.commit()  # of nothing: that is the last that is said


@pytest.mark.slow
def test_many_processes_and_patience(tmp_path: Path, clips: list[Clip]) -> None:
    """Places are each process's own; and an open socket is no idle connection, which is closed after 10 s."""
    with serve(tmp_path / "state", "--workers", 2, "--max-realtime", 1) as server:
        site = Site(server, {})
        held: list[RealtimeConnection] = []

        def two_are_open() -> bool:
            try:
                held.append(site.connect().enter())
            except InvalidStatus:
                time.sleep(0.05)
            return len(held) == 2

        assert soon(two_are_open, seconds=30)
        assert soon(lambda: site.num_open() == 2)
        time.sleep(starting.HEADER_S + 2)
        for connection, clip in zip(held, clips, strict=False):
            send(connection, clip.pcm + QUIET)
            assert until(connection, "completed")[-1].transcript == clip.text
            connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_through_a_proxy(name: str, site: Site, clips: list[Clip], tmp_path: Path) -> None:
    """With the files of deploy/, as tests/test_deploy.py changes them."""
    program, port, config = needs(name), free_port(), tmp_path / "config"
    (tmp_path / "chain").write_text(CERTIFICATE)
    (tmp_path / "key").write_text(KEY)
    if name == "nginx":
        config.write_text(nginx_config(tmp_path, port, free_port(), site.server.port))
        command = [program, "-p", str(tmp_path), "-c", str(config)]
    else:
        config.write_text(caddy_config(tmp_path, port, site.server.port))
        command = [program, "run", "--adapter", "caddyfile", "--config", str(config)]
    home = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert soon(lambda: is_open(port), seconds=10)
            client = openai.OpenAI(base_url=f"https://127.0.0.1:{port}/v1", api_key=site.secrets["ann"])
            secure = ssl.create_default_context(cadata=CERTIFICATE)
            options: Any = {"ssl": secure}
            with client.realtime.connect(model="tiny", websocket_connection_options=options) as connection:
                send(connection, clips[0].pcm + QUIET)
                assert until(connection, "completed")[-1].transcript == clips[0].text
        finally:
            process.kill()


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
