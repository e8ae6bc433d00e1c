"""An engine elsewhere: whatever its endpoint does, each clip gets its own text or a reason, once, in bounded time."""

import asyncio
import gc
import gzip
import io
import json
import math
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from arkasr import Transcriber, endpoint, guards, hub, load_model, segment
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.data import read_manifest
from arkasr.engines import Clip, DecodeOptions, Engine, Generation
from arkasr.engines.openai import MAX_CHARACTERS, OpenAIEngine
from arkasr.engines.shared import EngineClosedError, SharedEngine
from arkasr.errors import ArkASRError, NoAnswerError, UsageError
from arkasr.results import Transcript
from arkasr.segment import Span
from conftest import Run
from serving import serve

PIECE = 1_600  # samples of a span of a numbered recording
Answer = Callable[["Handler", int], None]


def clip(number: int, num_samples: int = PIECE) -> Waveform:
    """Audio that `Endpoint` knows by its number."""
    return np.full(num_samples, number / endpoint.FULL_SCALE, np.float32)


def number_of(waveform: Waveform) -> int:
    return round(float(waveform[0]) * endpoint.FULL_SCALE)


class Endpoint(ThreadingHTTPServer):
    """Answers with the number of each clip, or as it is told to; keeps what it was sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.answer: Answer = Handler.say
        self.asked: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.forms: list[dict[str, str]] = []
        self.audio_s, self.at_once, self.most = 0.0, 0, 0
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        assert isinstance(sys.exc_info()[1], OSError | ValueError)  # who asks, or the connection, may be gone


class Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body at once, or each answer waits 40 ms for an acknowledgement

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        body = self.rfile.read(length)
        if len(body) < length:  # who asked has gone
            self.close_connection = True
            return
        sound, rate = soundfile.read(io.BytesIO(body[body.index(b"fLaC") :]), dtype="float32")
        assert rate == SAMPLE_RATE
        form = dict(re.findall(r'name="([^"]+)"\r\n(?:[^\r]+\r\n)*\r\n([^\r]*)\r\n', body.decode("latin-1")))
        number = number_of(sound)
        with self.server.lock:
            self.server.asked.append(number)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.forms.append(form)
            self.server.audio_s += len(sound) / SAMPLE_RATE
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        try:
            self.server.answer(self, number)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def say(self, number: int) -> None:
        self.send(said(number))

    def reset(self) -> None:
        """End the connection as a machine that dies does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def trickle(self, content: bytes, head: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n") -> None:
        self.wfile.write(head)
        for byte in content:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.stopped.wait(0.05):
                break
        self.close_connection = True


def said(number: int) -> bytes:
    return json.dumps({"text": f" number\n {number} "}).encode()


def half(handler: Handler, number: int) -> None:
    handler.send(said(number)[:9], content_length=str(len(said(number))))
    handler.reset()


def hang(handler: Handler, _: int) -> None:
    handler.server.stopped.wait(20)
    handler.close_connection = True


def soon(handler: Handler, number: int) -> None:
    time.sleep(0.05)
    handler.say(number)


def told(content: bytes, status: int = 200, **headers: str) -> Answer:
    return lambda handler, _: handler.send(content, status, **headers)


# What can be asked for again, and what cannot.
PASSING: dict[str, Answer] = {
    "reset": lambda handler, _: handler.reset(),
    "half": half,
    "429": told(b"{}", 429),
    "429 soon": told(b"{}", 429, retry_after="0"),
    "500": told(b"oops", 500),
    "503": told(b'{"error": {"message": "loading"}}', 503),
    "cut": told(b'{"text": "num'),
    "html": told(b"<html>bad gateway</html>", content_type="text/html"),
    "no text": told(b'{"text": null}'),
    "list": told(b"[1]"),
    "texts": told(b'{"text": ["yes"]}'),
    "nothing": told(b""),
    "deep": told(b"[" * 100_000),
    "long": told(json.dumps({"text": "x" * (MAX_CHARACTERS + 1)}).encode()),
    "logprobs": told(b'{"text": "yes", "logprobs": [{"token": "yes"}]}'),
    "NaN": told(b'{"text": "yes", "logprobs": [{"logprob": NaN}]}'),
    "no gzip": told(b"no gzip", content_encoding="gzip"),
}
LASTING: dict[str, Answer] = {
    "400": told(b'{"error": {"message": "too short"}}', 400),
    "413": told(b"", 413),
    "later": told(b"{}", 429, retry_after="86400"),
    "hang": hang,
    "trickle": lambda handler, number: handler.trickle(said(number) * 100),
    "trickling head": lambda handler, number: handler.trickle(said(number) * 100, head=b"HTTP/1.1 200 OK\r\nx: "),
}


@pytest.fixture
def server() -> Iterator[Endpoint]:
    there = Endpoint()
    thread = threading.Thread(target=there.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield there
    there.stopped.set()
    there.shutdown()
    thread.join()
    there.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited between tries."""
    waited: list[float] = []

    async def pause(wait_s: float) -> None:
        waited.append(wait_s)
        await asyncio.sleep(0.002)

    monkeypatch.setattr(endpoint, "_pause", pause)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    return waited


def texts(generations: Sequence[Generation]) -> list[str | None]:
    return [one.text if one.failure is None else None for one in generations]


# ---- one clip ----


def test_what_is_sent(server: Endpoint, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    server.answer = lambda handler, number: handler.say(number) if len(server.asked) > 2 else handler.reset()
    with closing(OpenAIEngine(server.url, "m", key_variable="SOME_KEY")) as engine:
        assert texts(engine.generate([clip(7)], DecodeOptions())) == ["number 7"]
        assert texts(engine.generate([clip(8)], DecodeOptions(temperature=0.4, seed=3, guard=False))) == ["number 8"]
    assert server.asked == [7, 7, 7, 8]
    first = {"model": "m", "response_format": "json", "include[]": "logprobs", "temperature": "0.0"}
    forms = [{name: value for name, value in form.items() if name != "file"} for form in server.forms]
    assert forms == [first, first, first, first | {"temperature": "0.4", "seed": "3"}]
    assert all(headers["authorization"] == "Bearer sk-secret" for headers in server.headers)
    names = [headers["idempotency-key"] for headers in server.headers]
    assert len(set(names[:3])) == 1 != len(set(names))
    assert len(waits) == 2


@pytest.mark.parametrize("param", ["include", "include[]"])
def test_an_endpoint_that_refuses_logprobs_is_asked_without_them(server: Endpoint, param: str) -> None:
    """As our own server does in front of an endpoint that tells none."""
    refusal = json.dumps({"error": {"message": "not here", "type": "invalid_request_error", "param": param}}).encode()

    def refuse(handler: Handler, number: int) -> None:
        form = server.forms[len(server.asked) - 1 - server.asked[::-1].index(number)]
        handler.send(refusal, 400) if "include[]" in form else handler.say(number)

    server.answer = refuse
    with closing(OpenAIEngine(server.url, "m", parallel=2)) as engine:
        heard = engine.generate([clip(n) for n in range(1, 8)], DecodeOptions())
        assert texts(heard) == [f"number {n}" for n in range(1, 8)]
        assert max(Counter(server.asked).values()) == 2
        assert server.asked.count(7) == 1
        engine.generate([clip(9)], DecodeOptions())
    assert "include[]" not in server.forms[-1]


@pytest.mark.parametrize("options", [DecodeOptions(top_p=0.9), DecodeOptions(max_new_tokens=20)])
def test_an_option_that_cannot_be_passed_on_is_refused(server: Endpoint, options: DecodeOptions) -> None:
    with closing(OpenAIEngine(server.url, "m")) as engine:
        with pytest.raises(UsageError, match="OpenAI's API has none"):
            engine.generate([clip(7)], options)
        with pytest.raises(UsageError, match="OpenAI's API has none"):
            engine.prepare(Clip(clip(7), options))
    assert server.asked == []


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_asked_for_again_and_has_an_end(
    server: Endpoint, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: Counter[int] = Counter()

    def answer(handler: Handler, number: int) -> None:
        with server.lock:
            tried[number] += 1
        if number == 2 or tried[number] < endpoint.TRIES:
            PASSING[fault](handler, number)
        else:
            handler.say(number)

    server.answer = answer
    monkeypatch.setattr(endpoint, "LONGEST_WAIT_S", 0.5)
    with closing(OpenAIEngine(server.url, "m", answer_s=1.0)) as engine:
        got = engine.generate([clip(1), clip(2), clip(3)], DecodeOptions())
    assert texts(got) == ["number 1", None, "number 3"]
    assert re.match(rf"asked {tried[2]} times, ", str(got[1].failure))
    assert len(str(got[1].failure)) < 400
    if re.match("429|503", fault):  # it is busy, and is asked while there is time
        assert tried[2] > endpoint.TRIES
    else:
        assert tried[2] == endpoint.TRIES


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("fault", LASTING)
def test_what_will_not_pass_is_the_clips_own_failure_in_time(server: Endpoint, fault: str) -> None:
    server.answer = lambda handler, number: LASTING[fault](handler, number) if number == 2 else handler.say(number)
    with closing(OpenAIEngine(server.url, "m", answer_s=0.6)) as engine:
        since = time.monotonic()
        got = engine.generate([clip(1), clip(2), clip(3)], DecodeOptions())
        assert time.monotonic() - since < 1.5
    assert texts(got) == ["number 1", None, "number 3"]
    assert isinstance(got[1].failure, NoAnswerError)
    assert server.asked.count(2) in ((2, 3) if fault == "hang" else (1,))  # a silent one is asked again, in time


def test_an_endpoint_is_obeyed_when_it_says_when_to_ask_again(server: Endpoint, waits: list[float]) -> None:
    server.answer = lambda handler, number: (
        told(b"", 429, retry_after="90")(handler, number) if len(server.asked) < 9 else handler.say(number)
    )
    with closing(OpenAIEngine(server.url, "m", answer_s=100)) as engine:
        assert texts(engine.generate([clip(1)], DecodeOptions())) == ["number 1"]
        assert waits == [90.0] * 8
    with closing(OpenAIEngine(server.url, "m", answer_s=80)) as engine:
        server.asked.clear()
        (late,) = engine.generate([clip(1)], DecodeOptions())
    assert server.asked == [1]
    assert "HTTP 429; told to wait 90 s" in str(late.failure)


def test_an_answer_that_grows_is_not_read_to_its_end(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 1 << 20)
    server.answer = told(gzip.compress(b'{"text": "' + b" " * (1 << 24) + b'"}'), content_encoding="gzip")
    with closing(OpenAIEngine(server.url, "m")) as engine:
        (one,) = engine.generate([clip(1)], DecodeOptions())
    assert "the answer has more than 1048576 bytes" in str(one.failure)


def test_confidence_is_that_of_the_tokens_that_are_told(server: Endpoint) -> None:
    record: dict[str, Any] = {"text": "a \ud800b<|im_end|>c", "logprobs": [{"logprob": -0.5}, {"logprob": -1}]}
    server.answer = told(json.dumps(record).encode())
    with closing(OpenAIEngine(server.url, "m")) as engine:
        (one,) = engine.generate([clip(1)], DecodeOptions())
        assert (one.text, one.ids) == ("a ?b", ())
        assert one.confidence == pytest.approx(math.exp(-0.75))
        for none in ("null", "[]"):
            server.answer = told(b'{"text": "a", "logprobs": %b}' % none.encode())
            (one,) = engine.generate([clip(1)], DecodeOptions())
            assert (one.text, one.confidence) == ("a", 0.0)


# ---- what no other clip would be spared ----


@pytest.mark.parametrize("status", [401, 403, 404, 308])
def test_a_wrong_key_model_or_url_ends_all_at_once(server: Endpoint, status: int) -> None:
    server.answer = told(b'{"error": {"message": "no such model"}}', status, location="http://127.0.0.1:9/")
    with closing(OpenAIEngine(server.url, "m", parallel=2)) as engine:
        with pytest.raises(UsageError, match=rf"HTTP {status} 'no such model'; check URL, model and key"):
            engine.generate([clip(n) for n in range(1, 100)], DecodeOptions())
        time.sleep(0.05)
        assert len(server.asked) <= 4


@pytest.mark.usefixtures("waits")
def test_nobody_listens_and_nothing_is_charged() -> None:
    with closing(OpenAIEngine("http://127.0.0.1:9/v1", "m", budget_s=0.1)) as engine:
        with pytest.raises(UsageError, match=r"nobody answers \(asked 6 times, ConnectError"):
            engine.generate([clip(1)], DecodeOptions())
        with pytest.raises(UsageError, match="nobody answers"):
            engine.generate([clip(1)], DecodeOptions())


@pytest.mark.parametrize(
    "wrong",
    [{"base_url": "ftp://h"}, {"model": ""}, {"parallel": 0}, {"answer_s": 0.0}, {"answer_s": math.inf},
     {"answer_s": math.nan}, {"budget_s": 0.0}, {"budget_s": math.nan}, {"key_variable": "NO_SUCH_KEY"}],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_asked(wrong: dict[str, Any]) -> None:
    before = threading.active_count()
    with pytest.raises(UsageError):
        OpenAIEngine(**{"base_url": "http://127.0.0.1:9/v1", "model": "m"} | wrong)
    assert threading.active_count() == before


# ---- many clips, and an endpoint that does its worst ----


def hostile(server: Endpoint, seed: int, faults: Sequence[Answer], share: float) -> None:
    rng = random.Random(seed)

    def answer(handler: Handler, number: int) -> None:
        with server.lock:
            fault = rng.choice(faults) if rng.random() < share else Handler.say
        fault(handler, number)

    server.answer = answer


def check_hostile(server: Endpoint, seed: int, *, clips: int, answer_s: float, budget_s: float) -> None:
    """Eight threads at one engine."""
    hostile(server, seed, [*PASSING.values(), *LASTING.values(), soon, soon], 0.4)
    threads = set(threading.enumerate())
    engine = OpenAIEngine(server.url, "m", parallel=8, answer_s=answer_s, budget_s=budget_s)
    shared, callers = SharedEngine(engine), 8

    def ask(caller: int) -> list[Generation]:
        numbers = range(1 + caller, 1 + clips, callers)
        return shared.caller().generate([clip(n) for n in numbers], DecodeOptions())

    since = time.monotonic()
    with ThreadPoolExecutor(callers) as pool:
        got = list(pool.map(ask, range(callers)))
    spent_s = time.monotonic() - since
    shared.close()
    engine.close()
    server.stopped.set()
    answered = 0
    for caller, generations in enumerate(got):
        for n, one in zip(range(1 + caller, 1 + clips, callers), generations, strict=True):
            assert (one.text is None) != (one.failure is None)
            assert one.text in (None, f"number {n}")
            answered += one.text is not None
    assert answered > 0
    assert spent_s < answer_s * (clips / 8 + 1)  # had every clip taken all its time
    assert server.audio_s <= budget_s
    left = set(threading.enumerate()) - threads
    assert not [thread for thread in left if thread.name.startswith(("arkasr", "asyncio"))]
    if budget_s < math.inf:
        failures = [str(one.failure) for generations in got for one in generations if one.failure]
        assert any(f"the budget of {budget_s:g} s" in failure for failure in failures)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(("seed", "budget_s"), [(0, math.inf), (1, 3.0)])
def test_each_clip_gets_its_own_text_or_a_failure(server: Endpoint, seed: int, budget_s: float) -> None:
    check_hostile(server, seed, clips=48, answer_s=0.4, budget_s=budget_s)


@pytest.mark.usefixtures("waits")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_each_of_many_clips_gets_its_own_text_or_a_failure(server: Endpoint, seed: int) -> None:
    check_hostile(server, seed, clips=400, answer_s=1.0, budget_s=math.inf if seed % 2 else 20.0)


# ---- who takes turns ----


def test_each_place_takes_the_next_clip_as_soon_as_it_is_free(server: Endpoint) -> None:
    """One slow clip holds up no other, and never are more asked for than there are places."""
    finish = threading.Event()

    def answer(handler: Handler, number: int) -> None:
        assert number != 1 or finish.wait(20)
        soon(handler, number)

    server.answer = answer
    with closing(OpenAIEngine(server.url, "m", parallel=3)) as engine, ThreadPoolExecutor(1) as pool:
        all_said = pool.submit(engine.generate, [clip(n) for n in range(1, 21)], DecodeOptions())
        until(lambda: len(server.asked) == 20 and server.at_once == 1)
        finish.set()
        assert texts(all_said.result(20)) == [f"number {n}" for n in range(1, 21)]
    assert server.most == 3


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_clip_joins_those_that_are_asked_for_and_who_has_gone_leaves_a_place(server: Endpoint) -> None:
    finish = threading.Event()

    def answer(handler: Handler, number: int) -> None:
        assert number >= 10 or finish.wait(20)
        handler.say(number)

    server.answer = answer
    engine = OpenAIEngine(server.url, "m", parallel=2)
    shared = SharedEngine(engine)
    gone, stays = shared.caller(), shared.caller()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gone.generate, [clip(1), clip(2), clip(3)], DecodeOptions())
        until(lambda: sorted(server.asked) == [1, 2])
        second = pool.submit(stays.generate, [clip(10), clip(11)], DecodeOptions())
        until(lambda: shared.num_waiting == 3)
        gone.cancel(UsageError("gone"))
        with pytest.raises(UsageError, match="gone"):
            first.result(20)
        assert texts(second.result(20)) == ["number 10", "number 11"]
    assert sorted(server.asked) == [1, 2, 10, 11]
    finish.set()
    shared.close()
    engine.close()


def test_closing_ends_all_that_is_under_way(server: Endpoint) -> None:
    server.answer = hang
    engine = OpenAIEngine(server.url, "m", parallel=4)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, [clip(n) for n in range(1, 9)], DecodeOptions())
        until(lambda: len(server.asked) == 4)
        since = time.monotonic()
        engine.close()
        engine.close()
        with pytest.raises(EngineClosedError):
            waiting.result(20)
        assert time.monotonic() - since < 2
    with pytest.raises(EngineClosedError):
        engine.generate([clip(1)], DecodeOptions())
    assert len(server.asked) == 4


def test_closing_at_any_moment_leaves_nothing_that_nobody_awaits(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled with the others, a connection that its library had begun, and not started, was never awaited."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    server.answer = hang
    for moment in range(150):
        client = endpoint.Client(server.url, parallel=4)
        for _ in range(4):
            client.begin("x", read=str, answer_s=5, audio_s=0, data={})
        time.sleep(0.0001 * (moment % 100))
        client.close()
    gc.collect()
    assert not told


@pytest.mark.usefixtures("waits")
def test_a_budget_is_spent_to_its_end_and_no_further(server: Endpoint) -> None:
    server.answer = lambda handler, number: handler.reset() if len(server.asked) == 2 else handler.say(number)
    with closing(OpenAIEngine(server.url, "m", parallel=1, budget_s=0.5)) as engine:
        got = engine.generate([clip(n) for n in range(1, 8)], DecodeOptions())
        assert texts(got) == [f"number {n}" if n < 5 else None for n in range(1, 8)]
        assert "budget of 0.5 s of audio, all tries counted, is spent; give more" in str(got[-1].failure)
        (shorter,) = engine.generate([clip(9, 160)], DecodeOptions())
        assert shorter.failure is not None
    assert server.asked == [1, 2, 2, 3, 4]


# ---- through the transcriber ----


class Scripted:
    """Says the number of each clip; gives no answer to some, at once or when they are heard again."""

    def __init__(self, lost: set[int], looping: frozenset[int] = frozenset()) -> None:
        self.lost, self.looping = lost, looping
        self.asked: list[int] = []

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        numbers = [number_of(one) for one in waveforms]
        self.asked += numbers
        return [self._say(number) for number in numbers]

    def _say(self, number: int) -> Generation:
        if number in self.lost and (number not in self.looping or self.asked.count(number) > 1):
            return Generation((), (), None, failure=NoAnswerError(f"no answer to {number}"))
        if number in self.looping:
            return Generation((), (), None, text="so it was that " + "we went home " * 60)
        return Generation((), (-0.1,), None, text=f"number {number}")


def in_pieces(blocks: Iterator[Waveform], *, vad: bool) -> Iterator[Span]:  # noqa: ARG001 - what it stands in for has it
    """Cuts recordings after each tenth of a second."""
    whole = np.concatenate(list(blocks))
    for start in range(0, len(whole), PIECE):
        yield Span(start, whole[start : start + PIECE], start, start + PIECE, 1.0)


def recording(numbers: Sequence[int]) -> tuple[Waveform, int]:
    return np.concatenate([clip(number) for number in numbers]), SAMPLE_RATE


def outcomes(engine: Engine, recordings: Sequence[Sequence[int]], batch_size: int) -> list[Transcript | ArkASRError]:
    sources = [recording(numbers) for numbers in recordings]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segment, "split", in_pieces)
        got = list(Transcriber(engine).outcomes(sources, batch_size=batch_size))
    assert [id(source) for source, _ in got] == [id(source) for source in sources]
    return [outcome for _, outcome in got]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_span_without_an_answer_costs_its_own_recording_alone(
    lengths: list[int], batch_size: int, rng: random.Random
) -> None:
    """Whichever span it is, and wherever batches end."""
    numbers = iter(range(1, 100))
    recordings = [[next(numbers) for _ in range(length)] for length in lengths]
    lost = {n for one in recordings for n in one if rng.random() < 0.2}
    engine = Scripted(lost)
    got = outcomes(engine, recordings, batch_size)
    for one, outcome in zip(recordings, got, strict=True):
        first = next((n for n in one if n in lost), None)
        if first is None:
            assert isinstance(outcome, Transcript)
            assert [said.text for said in outcome.segments] == [f"number {n}" for n in one]
        else:
            assert isinstance(outcome, NoAnswerError)
            assert str(outcome).endswith(f"from {0.1 * one.index(first):.2f} s: no answer to {first}")
    assert max(Counter(engine.asked).values()) == 1


def test_a_recording_that_lost_a_span_is_asked_for_no_further() -> None:
    engine = Scripted({2})
    got = outcomes(engine, [list(range(1, 40)), [50]], batch_size=4)
    assert isinstance(got[0], NoAnswerError)
    assert isinstance(got[1], Transcript)
    assert len(engine.asked) <= 1 + 4 + 1


def test_what_was_heard_before_a_lost_span_is_there_for_who_listens() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segment, "split", in_pieces)
        heard = Transcriber(Scripted({3})).segments(recording([1, 2, 3, 4]))
        assert [next(heard).text, next(heard).text] == ["number 1", "number 2"]
        with pytest.raises(NoAnswerError, match=r"from 0\.20 s: no answer to 3"):
            next(heard)


def test_an_endpoints_loop_is_heard_again_and_cut() -> None:
    """It gives no tokens to see a loop in; its words show it."""
    (got,) = outcomes(Scripted(set(), frozenset({2})), [[1, 2, 3]], batch_size=8)
    assert isinstance(got, Transcript)
    assert [said.text for said in got.segments] == ["number 1", "so it was that we went home", "number 3"]
    assert got.segments[1].flags == (guards.TOO_FAST, guards.REPETITIVE, guards.CUT)


def test_a_hearing_again_without_an_answer_is_told_as_such() -> None:
    got = outcomes(Scripted({2}, frozenset({2})), [[1, 2, 3], [4]], batch_size=8)
    assert "no answer to 2" in str(got[0])
    assert isinstance(got[1], Transcript)


def test_hearing_again_is_no_warmer_than_the_api_allows(server: Endpoint) -> None:
    server.answer = told(json.dumps({"text": "we went home " * 60}).encode())
    for temperature, again in ((0.0, "0.4"), (0.3, "0.6"), (0.7, "1.0")):
        server.forms.clear()
        with closing(OpenAIEngine(server.url, "m")) as engine:
            options = DecodeOptions(temperature=temperature)
            Transcriber(engine).transcribe((clip(1, 8_000), SAMPLE_RATE), options=options, vad=False)
        assert [form["temperature"] for form in server.forms] == [str(temperature), again]


# ---- the command ----

THERE = ["--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m"]
CLIP = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"


def test_the_command_sends_and_prints(server: Endpoint, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And pulls no model, and says nothing: what it sends stays on this machine."""
    monkeypatch.setattr(hub, "pull", lambda *_, **__: pytest.fail("a model was pulled"))
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    server.answer = told(b'{"text": "rubout"}')
    there = ["--engine", "openai", "--base-url", server.url, "--model", "ORG/m"]
    assert run("transcribe", CLIP, *there, "--api-key-env", "SOME_KEY") == (0, ["rubout"], [])
    assert server.forms[0]["model"] == "ORG/m"
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    server.answer = told(b"", 413)
    code, out, err = run("transcribe", CLIP, CLIP, *there, "--format", "json")
    assert (code, len(out)) == (1, 2)
    assert re.fullmatch(r"ark-asr: .*an4-rubout\.flac: from 0\.\d\d s: asked 1 times?, HTTP 413|.*HTTP 413", err[0])
    code, _, err = run("transcribe", CLIP, *there, "--budget-s", "0.5")
    assert (code, len(server.asked)) == (1, 3)
    assert "the budget of 0.5 s" in err[0]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--base-url", "http://127.0.0.1:9/v1"], "--base-url does not go with --engine auto"),
        (["--engine", "onnx", "--api-key-env", "X"], "--api-key-env does not go with --engine onnx"),
        (["--parallel", "2"], "--parallel does not go"), (["--answer-s", "2"], "--answer-s does not go"),
        (["--budget-s", "2"], "--budget-s does not go"),
        (["--engine", "openai"], "give --base-url"), (["--engine", "openai", "--model", "m"], "give --base-url"),
        (["--engine", "openai", "--base-url", "http://127.0.0.1:9/v1"], "--model"),
        ([*THERE, "--device", "cpu"], "--device does not go"),
        ([*THERE, "--dtype", "int8"], "--dtype does not go"),
        ([*THERE, "--offline"], "--offline does not go"),
        ([*THERE, "--max-new-tokens", "9"], "max_new_tokens"),
        (["--engine", "openai", "--base-url", "127.0.0.1:9", "--model", "m"], "http://HOST/v1"),
        ([*THERE, "--api-key-env", "NO_SUCH"], "NO_SUCH"),
        ([*THERE, "--parallel", "0"], "parallel is 0"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(run: Run, flags: list[str], why: str) -> None:
    code, out, err = run("transcribe", CLIP, *flags)
    assert (code, out, len(err)) == (1, [], 1)
    assert why in err[0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:8000/v1", None), ("http://localhost/v1", None), ("https://[::1]/v1", None),
        ("https://asr.example/v1", "audio leaves this machine, for asr.example"),
        ("http://10.0.0.7:8000/v1", "audio leaves this machine, for 10.0.0.7, which others on the way can read"),
    ],
)  # fmt: skip
def test_audio_that_leaves_the_machine_is_announced(url: str, said: str | None) -> None:
    with closing(OpenAIEngine(url, "m")) as engine:
        assert (engine.notice is None) if said is None else str(engine.notice).startswith(said)


# ---- our own server, and vLLM ----


def speech(shared: Path, most: int) -> list[Waveform]:
    utterances = read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test")
    return [utterance.waveform() for utterance, _ in zip(utterances, range(most), strict=False)]


def test_our_own_server_says_what_its_model_says_here(shared: Path, tmp_path: Path) -> None:
    clips = speech(shared, 10)
    long = np.concatenate([*clips, np.zeros(SAMPLE_RATE, np.float32)])
    here = load_model("tiny", dtype="int8")
    wanted = [here.transcribe((one, SAMPLE_RATE)) for one in clips]
    with serve(tmp_path / "state") as server:
        engine = OpenAIEngine(f"{server.url}/v1", "tiny", parallel=4)
        got = list(Transcriber(engine).transcribe([(one, SAMPLE_RATE) for one in clips]))
        assert [one.text for one in got] == [one.text for one in wanted]
        for ours, theirs in zip(wanted, got, strict=True):  # what the end of a text is worth is not told
            for one, other in zip(ours.segments, theirs.segments, strict=True):
                assert other.confidence == pytest.approx(Generation(one.tokens, one.logprobs, None).confidence)
        assert Transcriber(engine).transcribe((long, SAMPLE_RATE)).text == here.transcribe((long, SAMPLE_RATE)).text
        together = SharedEngine(engine)

        def ask(number: int) -> list[str]:
            ours = Transcriber(together.caller())
            return [ours.transcribe((clips[n % 10], SAMPLE_RATE)).text for n in range(number, number + 4)]

        with ThreadPoolExecutor(8) as pool:
            for number, heard in enumerate(pool.map(ask, range(8))):
                assert heard == [wanted[n % 10].text for n in range(number, number + 4)]
        together.close()
        engine.close()
        with closing(OpenAIEngine(f"{server.url}/v1", "x")) as unknown, pytest.raises(UsageError, match="HTTP 404"):
            unknown.generate([clips[0]], DecodeOptions())


@pytest.mark.vllm
def test_vllm_says_what_its_model_says_here(shared: Path) -> None:
    from vllm_serving import need_vllm, serve_vllm

    need_vllm()
    clips = speech(shared, 30)
    here = load_model("tiny", engine="pytorch")
    wanted = [here.transcribe((one, SAMPLE_RATE)).text for one in clips]
    with serve_vllm(hub.find("tiny"), "--enforce-eager") as url, closing(OpenAIEngine(url, "ark")) as engine:
        there = Transcriber(engine)
        for batch_size in (1, 16):
            got = there.transcribe([(one, SAMPLE_RATE) for one in clips], batch_size=batch_size)
            assert [one.text for one in got] == wanted
        long = np.concatenate([*clips[:12], np.zeros(SAMPLE_RATE, np.float32)] * 3)
        assert there.transcribe((long, SAMPLE_RATE)).text == here.transcribe((long, SAMPLE_RATE)).text
        with closing(OpenAIEngine(url, "x")) as unknown, pytest.raises(UsageError, match="HTTP 404"):
            unknown.generate([clips[0]], DecodeOptions())
