"""`ark-asr serve` through the clients that people have: OpenAI's SDK, curl, a fuzzer of its schema, and broken sockets.

The SDK builds its objects without looking, so every answer is also validated strictly against the SDK's own types.
All of it holds for a server alone, for one before another of ours (`-m slow`), and before vLLM (`-m vllm`).
"""

import asyncio
import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import av
import httpx2
import numpy as np
import openai
import pytest
import schemathesis
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai.types import ErrorObject, Model
from openai.types.audio import Transcription, TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent
from openai.types.audio.transcription import UsageDuration
from openai.types.audio.transcription_verbose import TranscriptionVerbose
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from schemathesis import checks
from schemathesis.core.result import Ok
from starlette.testclient import TestClient

import serving
from arkasr import model
from arkasr.server import app as application
from arkasr.server import described
from arkasr.server.accounts import Code
from arkasr.server.keys import KEYS, Limits, Price, create_key
from arkasr.server.openai import Parameters
from arkasr.server.settings import Settings
from conftest import byte_tokenizer, random_network, small_config
from serving import Server, program, serve, serve_front
from vllm_serving import need_vllm, serve_vllm

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
CLIP_TEXT = "RUBOUT G M E F THREE NINE"
CLIP_S = 4.0
RATE = 16_000
PRICE_PER_S = Fraction(16, 10)  # so that the cost of any number of samples has few digits
FORMATS = ("json", "verbose_json", "text", "srt", "vtt")
TINY = ROOT / "src" / "arkasr" / "weights" / "tiny"
FREED = {"alone": ("--unload-after-s", 0.3)}


@dataclass(frozen=True)
class Layout:
    """Where the models of a server are, and what it therefore can tell.

    Attributes:
        tokens: which tokens a text has: their ids, number, probabilities, and which are allowed.
        confidence: how sure of a text the model is; else it is 0.
        words: when each word was said.
        both: whether the second model is another than the first; a vLLM has one.
        engine: of `ark-asr transcribe` for the same network.
    """

    tokens: bool
    confidence: bool
    words: bool
    both: bool
    engine: str = "auto"

    @property
    def unequal(self) -> set[str]:
        """Fields of a segment that another layout may have otherwise."""
        return set() if self.tokens else {"tokens", "avg_logprob", "confidence"}


LAYOUTS = {
    "alone": Layout(tokens=True, confidence=True, words=True, both=True),
    "front": Layout(tokens=False, confidence=True, words=False, both=True),
    "vllm": Layout(tokens=False, confidence=False, words=False, both=False, engine="pytorch"),
}
Start = Callable[..., AbstractContextManager[Server]]


@dataclass(frozen=True)
class Site:
    """A server, and the secrets of its keys by name."""

    server: Server
    secrets: dict[str, str] = field(default_factory=dict)

    def client(self, key: str = "ann", *, max_retries: int = 0) -> openai.OpenAI:
        secret = self.secrets.get(key, key)
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=secret, max_retries=max_retries, timeout=60)

    def headers(self, key: str = "ann") -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[key]}"} if self.secrets else {}

    def post(self, path: str, file: Path | bytes = CLIP, *, key: str = "ann", name: str = "file", **data: Any) -> Any:
        content = file if isinstance(file, bytes) else file.read_bytes()
        url, headers = self.server.url + path, self.headers(key)
        return httpx2.post(url, files={name: ("speech", content)}, data=data, headers=headers, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of samples that have these labels."""
        text = httpx2.get(f"{self.server.url}/metrics", headers=self.headers()).raise_for_status().text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert samples
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    def usage(self, key: str) -> dict[str, tuple[int, Fraction, Fraction]]:
        """What `ark-asr usage` says when nothing is in work: model -> requests, seconds, cost."""
        until(lambda: self.metric("arkasr_requests_in_work") == 0)
        rows = [line.split("\t") for line in program("usage", state=self.server.state).splitlines()[1:]]
        return {row[1]: (int(row[2]), Fraction(row[3]), Fraction(row[4])) for row in rows if row[0] == key}

    @contextmanager
    def held(self, key: str = "ann", *, size: int | None = None) -> Iterator[Callable[[], http.client.HTTPResponse]]:
        """A request whose body stops in the middle; what is yielded sends so much of the rest and awaits the answer."""
        parts = [("model", b"tiny"), ("file", CLIP.read_bytes())]
        body = b"".join(
            b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (name.encode(), b'; filename="a"' if name == "file" else b"", value)
            for name, value in parts
        )
        body += b"--x--\r\n"
        before = self.metric("arkasr_requests_in_work")
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)) as connection:
            connection.putrequest("POST", "/v1/audio/transcriptions")
            sent = {"content-type": "multipart/form-data; boundary=x", "content-length": str(len(body))}
            for name, value in (sent | self.headers(key)).items():
                connection.putheader(name, value)
            connection.endheaders()
            connection.send(body[:1000])
            until(lambda: self.metric("arkasr_requests_in_work") > before)

            def finish() -> http.client.HTTPResponse:
                connection.send(body[1000:][:size])
                return connection.getresponse()

            yield finish


def until(happened: Callable[[], object], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def strictly(kind: Any, text: str | bytes) -> Any:
    """JSON as the type that the SDK gives out; a missing field or another type fails."""
    return TypeAdapter(kind).validate_json(text, strict=True)


def refused(response: Any) -> ErrorObject:
    """The error in a response, which has OpenAI's shape."""
    (name,) = response.json()
    assert name == "error"
    error = strictly(ErrorObject, json.dumps(response.json()["error"]))
    assert isinstance(error, ErrorObject)
    assert set(error.to_dict()) == {"message", "type", "param", "code"}
    assert error.message
    return error


# --- what is heard -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recordings:
    """Files of every kind that is heard here, and how long they are."""

    paths: dict[str, Path]
    seconds: dict[str, Fraction]


@pytest.fixture(scope="module")
def recordings(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    lines = (shared / "speech" / "an4" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    ones = [one["audio"] for one in map(json.loads, lines) if one["split"] == "test" and one["duration"] > 2][:18]
    clips = [soundfile.read(shared / "speech" / "an4" / one, dtype="float32")[0] for one in ones]
    joined = np.concatenate([part for clip in clips for part in (clip, np.zeros(RATE, np.float32))])
    assert len(joined) > 60 * RATE
    folder = tmp_path_factory.mktemp("recordings")
    names = (
        "long.flac",
        "hour.flac",
        "silence.wav",
        "stereo8k.wav",
        "speech.opus",
        "video.mp4",
        "damaged.flac",
        "odd.flac",
    )
    paths = {"clip": CLIP, **{Path(name).stem: folder / name for name in names}}
    soundfile.write(paths["long"], joined, RATE)
    soundfile.write(paths["hour"], np.tile(joined, 3), RATE)  # long enough to be caught at work
    soundfile.write(paths["silence"], np.zeros(3 * RATE, np.float32), RATE)
    soundfile.write(paths["odd"], clips[3][: RATE + 3], RATE)
    half = np.stack([clips[1][::2], clips[1][::2] / 2], axis=1)
    soundfile.write(paths["stereo8k"], half, RATE // 2)
    soundfile.write(paths["speech"], clips[2], RATE, format="OGG", subtype="OPUS")
    with av.open(str(paths["video"]), "w") as file:
        stream = file.add_stream("aac", rate=RATE, layout="mono")
        for start in range(0, len(clips[0]), 1024):
            frame = av.AudioFrame.from_ndarray(clips[0][None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    raw = bytearray(paths["long"].read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 20_000] = bytes(20_000)
    paths["damaged"].write_bytes(raw)
    exact = {
        name: Fraction(soundfile.info(paths[name]).frames, RATE) for name in ("long", "hour", "silence", "clip", "odd")
    }
    return Recordings(paths, exact)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model, whose weights are random."""
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("models") / "other"
    model.save(random_network(small_config(tokenizer)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(
    scope="module",
    params=["alone", pytest.param("front", marks=pytest.mark.slow), pytest.param("vllm", marks=pytest.mark.vllm)],
)
def name(request: pytest.FixtureRequest) -> str:
    """Of the layout."""
    return str(request.param)


@pytest.fixture(scope="module")
def layout(name: str) -> Layout:
    return LAYOUTS[name]


@pytest.fixture(scope="module")
def start(name: str, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(state, *flags, models=1) -> a server of that layout, with tiny and perhaps the second model."""
    with ExitStack() as running:
        if name == "alone":
            yield partial(_alone, other)
        elif name == "front":
            state = tmp_path_factory.mktemp("back")
            key = serving.create_key(state, "front")
            back = running.enter_context(serve(state, "--model", other))
            yield partial(_before, f"{back.url}/v1", key)
        else:
            need_vllm()
            url = running.enter_context(serve_vllm(TINY, "--served-model-name", "tiny", "other", "--enforce-eager"))
            yield partial(_before, url, "any")


def _alone(other: Path, state: Path, *flags: object, models: int = 1) -> AbstractContextManager[Server]:
    return serve(state, *(["--model", other] if models == 2 else []), *flags)


def _before(url: str, key: str, state: Path, *flags: object, models: int = 1) -> AbstractContextManager[Server]:
    return serve_front(state, url, *(["--model", "other"] if models == 2 else []), *flags, key=key)


@pytest.fixture
def alone(name: str) -> None:
    """For what a back end has no part in."""
    if name != "alone":
        pytest.skip("for a server with models of its own")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Site]:
    """The server that most tests share, with two models and keys of all kinds."""
    state = tmp_path_factory.mktemp("state")
    price = Price.parse("1.6/second")
    limits = {
        "once": Limits(concurrent_requests=1),
        "few": Limits(requests_per_minute=3, audio_seconds_per_day=1000),
        "short": Limits(audio_seconds_per_day=9),
        "narrow": Limits(models=("tiny",)),
        "alias": Limits(models=("whisper-1",)),
        "bob": Limits(price=Price.parse("0.36/hour")),
        **dict.fromkeys(("sums", "gone", "failing"), Limits(price=price)),
    }
    secrets = {name: create_key(state / KEYS, name, limit)[1] for name, limit in limits.items()}
    secrets["ann"] = serving.create_key(state, "ann", "--price", "1.6/second")
    with start(state, "--alias", "whisper-1=tiny", models=2) as server:
        yield Site(server, secrets)


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with site.client() as made:
        yield made


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, start: Start, name: str) -> Iterator[Site]:
    """A server without keys that has little of everything."""
    flags = ["--max-requests", 1, "--request-timeout-s", 1.5, "--max-upload-mb", 0.2]
    with start(tmp_path_factory.mktemp("tight"), *flags, *FREED.get(name, ())) as server:
        yield Site(server)


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Site]:
    with start(tmp_path_factory.mktemp("keyless")) as server:
        yield Site(server)


# --- the SDK: answers --------------------------------------------------------------------------------------------


def test_json(client: openai.OpenAI) -> None:
    raw = client.audio.transcriptions.with_raw_response.create(file=CLIP, model="tiny")
    answer = strictly(Transcription, raw.text)
    assert answer == raw.parse()
    assert answer.text == CLIP_TEXT
    assert answer.usage.to_dict() == {"type": "duration", "seconds": CLIP_S, "cost": "6.4"}
    assert set(answer.to_dict()) == {"text", "usage"}


def test_verbose_json(client: openai.OpenAI, layout: Layout) -> None:
    raw = client.audio.transcriptions.with_raw_response.create(
        file=CLIP, model="tiny", response_format="verbose_json", timestamp_granularities=["segment"]
    )
    answer = strictly(TranscriptionVerbose, raw.text)
    assert answer == raw.parse()
    assert (answer.text, answer.duration, answer.language) == (CLIP_TEXT, CLIP_S, "und")
    assert answer.model_extra == {"task": "transcribe"}
    (segment,) = answer.segments
    assert segment.text == CLIP_TEXT
    assert 0 < segment.start < segment.end < CLIP_S
    assert segment.seek == int(segment.start * 100)
    assert segment.model_extra.keys() == {"confidence", "flags"}
    assert bool(segment.tokens) == layout.tokens
    if layout.confidence:
        assert -0.1 < segment.avg_logprob < 0
        assert 0.9 < segment.model_extra["confidence"] < 1
    else:
        assert segment.avg_logprob == segment.model_extra["confidence"] == 0
    assert answer.usage.seconds == CLIP_S


@pytest.mark.parametrize(
    ("kind", "media_type", "begin"),
    [("text", "text/plain", CLIP_TEXT), ("srt", "application/x-subrip", "1\n00:00:00,"), ("vtt", "text/vtt", "WEBVTT")],
)
def test_plain_formats(client: openai.OpenAI, kind: Any, media_type: str, begin: str) -> None:
    raw = client.audio.transcriptions.with_raw_response.create(file=CLIP, model="tiny", response_format=kind)
    assert raw.headers["content-type"] == f"{media_type}; charset=utf-8"
    text = client.audio.transcriptions.create(file=CLIP, model="tiny", response_format=kind)
    assert isinstance(text, str)
    assert text == raw.text
    assert text.startswith(begin)
    assert CLIP_TEXT in text


def test_hints_are_named_as_ignored_and_change_nothing(client: openai.OpenAI) -> None:
    vad: Any = {"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 200, "silence_duration_ms": 300}
    raw = client.audio.transcriptions.with_raw_response.create(
        file=CLIP, model="tiny", language="en", languages=["en", "zh"], prompt="Spelled letters.",
        keywords=["RUBOUT", "ENTER"], chunking_strategy=vad, response_format="verbose_json",
    )  # fmt: skip
    ignored = set(raw.headers["x-arkasr-ignored"].split(", "))
    assert ignored == {"language", "languages", "prompt", "keywords", "chunking_strategy"}
    answer = strictly(TranscriptionVerbose, raw.text)
    assert (answer.text, answer.language) == (CLIP_TEXT, "en")
    plain = client.audio.transcriptions.with_raw_response.create(
        file=CLIP, model="tiny", chunking_strategy="auto", temperature=0
    )
    assert "x-arkasr-ignored" not in plain.headers


def test_logprobs(client: openai.OpenAI, layout: Layout) -> None:
    if not layout.tokens:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="does not tell its tokens") as caught:
                client.audio.transcriptions.create(file=CLIP, model="tiny", include=["logprobs"], stream=stream)
            assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "include")
        return
    raw = client.audio.transcriptions.with_raw_response.create(file=CLIP, model="tiny", include=["logprobs"])
    answer = strictly(Transcription, raw.text)
    assert "".join(one.token for one in answer.logprobs).strip() == CLIP_TEXT
    assert bytes(map(int, (byte for one in answer.logprobs for byte in one.bytes))).decode().strip() == CLIP_TEXT
    assert all(-1 < one.logprob <= 0 for one in answer.logprobs)


def test_sampling(client: openai.OpenAI, layout: Layout) -> None:
    def said(temperature: float, **ours: int) -> str:
        create = client.audio.transcriptions.create
        return create(file=CLIP, model="other", temperature=temperature, extra_body=ours).text

    assert said(0, seed=1) == said(0, seed=2)
    assert said(1, seed=1) == said(1, seed=1)
    assert (said(1, seed=1) != said(1, seed=2)) == layout.both  # tiny is too sure to say something else
    few = partial(client.audio.transcriptions.create, file=CLIP, model="tiny", extra_body={"max_new_tokens": 2})
    if layout.tokens:
        words: Any = few(response_format="verbose_json")
        assert [len(segment.tokens) for segment in words.segments] == [2]
    else:
        with pytest.raises(openai.BadRequestError, match="counts its tokens itself") as caught:
            few()
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "max_new_tokens")


def test_many_at_once_by_the_asynchronous_client(site: Site, recordings: Recordings, layout: Layout) -> None:
    async def ask() -> None:
        url = f"{site.server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=site.secrets["ann"], max_retries=0) as client:
            create = client.audio.transcriptions.create
            answers = [create(file=CLIP, model=name) for name in ("tiny", "other", "whisper-1", "tiny")]
            alone, strange, alias, again = (one.text for one in await asyncio.gather(*answers))
            assert alone == alias == again == CLIP_TEXT
            assert (strange != CLIP_TEXT) == layout.both
            stream = await create(file=recordings.paths["long"], model="tiny", stream=True)
            events = [event async for event in stream]
            assert events[-1].type == "transcript.text.done"
            assert "".join(event.delta for event in events[:-1]) == events[-1].text  # type: ignore[union-attr]

    asyncio.run(ask())


def test_models(client: openai.OpenAI) -> None:
    raw = client.models.with_raw_response.list()
    listed = json.loads(raw.text)
    assert listed.keys() == {"object", "data"}
    assert listed["object"] == "list"
    assert [strictly(Model, json.dumps(one)).id for one in listed["data"]] == ["tiny", "other", "whisper-1"]
    assert [one.id for one in client.models.list()] == ["tiny", "other", "whisper-1"]
    for name in ("other", "whisper-1"):
        assert strictly(Model, client.models.with_raw_response.retrieve(name).text).id == name


def test_lists_in_both_spellings_and_as_json(site: Site) -> None:
    path = "/v1/audio/transcriptions"
    clip = base64.b64encode(CLIP.read_bytes()).decode()
    whole: dict[str, Any] = {"model": "tiny", "response_format": "verbose_json", "timestamp_granularities": ["segment"]}
    url, headers = site.server.url + path, site.headers()
    answers = [
        site.post(path, **whole).json(),
        site.post(path, **{name.replace("ies", "ies[]"): value for name, value in whole.items()}).json(),
        httpx2.post(url, headers=headers, json={**whole, "audio": clip}).json(),
        httpx2.post(url, headers=headers, json={**whole, "audio": f"data:audio/flac;base64,{clip}"}).json(),
    ]
    assert answers == [answers[0]] * 4
    assert answers[0]["text"] == CLIP_TEXT


# --- the SDK: words and their times ------------------------------------------------------------------------------

Verbose = Callable[..., TranscriptionVerbose]


@pytest.fixture(scope="module")
def verbose(client: openai.OpenAI, recordings: Recordings) -> Verbose:
    """verbose(*granularities) -> what is said of the long recording, as the SDK's types and our schema have it."""

    @cache
    def ask(*granularities: Any) -> TranscriptionVerbose:
        asked: Any = {"timestamp_granularities": list(granularities)} if granularities else {}
        raw = client.audio.transcriptions.with_raw_response.create(
            file=recordings.paths["long"], model="tiny", response_format="verbose_json", **asked
        )
        described.Verbose.model_validate_json(raw.text, strict=True)
        answer = strictly(TranscriptionVerbose, raw.text)
        assert answer == raw.parse()
        assert isinstance(answer, TranscriptionVerbose)
        return answer

    return ask


def test_words_are_the_text_in_order_inside_their_segments(
    verbose: Verbose, recordings: Recordings, layout: Layout
) -> None:
    if not layout.words:
        with pytest.raises(openai.BadRequestError, match="tells no times of words") as caught:
            verbose("segment", "word")
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "timestamp_granularities")
        return
    answer = verbose("segment", "word")
    words = answer.words or []
    left = iter(words)
    for segment in answer.segments or []:
        own = list(islice(left, len(segment.text.split())))
        assert " ".join(one.word for one in own) == segment.text
        edges = [segment.start, *(edge for one in own for edge in (one.start, one.end)), segment.end]
        assert edges == sorted(edges)
    assert next(left, None) is None
    assert " ".join(one.word for one in words) == answer.text != ""
    assert {tuple(one.model_extra or ()) for one in words} == {("probability",)}
    assert all(0 < (one.model_extra or {})["probability"] <= 1 for one in words)
    # What is loud is in the words, and would not be if they were 0.2 s elsewhere.
    samples, _ = soundfile.read(recordings.paths["long"])
    inside = np.zeros(len(samples), bool)
    for one in words:
        inside[round(one.start * RATE) : round(one.end * RATE)] = True
    assert (samples[inside] ** 2).sum() > 0.98 * (samples**2).sum()
    assert inside.mean() < 0.7


@pytest.mark.usefixtures("alone")
def test_granularities_say_what_has_times(verbose: Verbose, client: openai.OpenAI, recordings: Recordings) -> None:
    words, segments = verbose("word"), verbose("segment")
    assert (words.segments, segments.words) == (None, None)
    assert verbose("segment", "word").to_dict() == words.to_dict() | segments.to_dict()
    assert verbose() == segments
    silence = client.audio.transcriptions.create(
        file=recordings.paths["silence"], model="tiny", response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert (silence.text, silence.words, silence.segments) == ("", [], None)


@pytest.mark.usefixtures("alone")
def test_deltas_of_a_stream_have_their_times(verbose: Verbose, client: openai.OpenAI, recordings: Recordings) -> None:
    def deltas(**asked: Any) -> list[dict[str, Any]]:
        stream: Any = client.audio.transcriptions.create(
            file=recordings.paths["long"], model="tiny", stream=True, **asked
        )
        *said, last = [json.loads(event.to_json()) for event in stream]
        assert last.keys() == {"type", "text", "usage"}
        return [strictly(TranscriptionTextDeltaEvent, json.dumps(one)).to_dict() for one in said]

    words, segments = (
        deltas(response_format="verbose_json", timestamp_granularities=[one]) for one in ("word", "segment")
    )
    assert segments == deltas(extra_body={"include": ["segments"]})
    assert {tuple(sorted(one)) for one in words} == {("delta", "type", "words")}
    for one in words:
        assert " ".join(word["word"] for word in one["words"]) == one["delta"].strip()
    assert [word for one in words for word in one["words"]] == [one.to_dict() for one in verbose("word").words or []]


@pytest.mark.parametrize(("engine", "where"), [("openai", "at a back end"), ("vllm", "in vLLM")])
def test_an_engine_without_word_times_is_not_even_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, where: str
) -> None:
    """Nobody listens at the back end, and there need be no vLLM: a request that came so far would fail otherwise."""
    base_url = f"http://127.0.0.1:{serving.free_port()}/v1" if engine == "openai" else None
    given: dict[str, Any] = {"model": ["tiny"], "state": tmp_path, "engine": engine, "base_url": base_url}
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda _name: object())
        client = TestClient(application.create(Settings(**given)), base_url="http://127.0.0.1:8000")
    asked = {"model": "tiny", "response_format": "verbose_json", "timestamp_granularities[]": ["segment", "word"]}
    for stream in ("false", "true"):
        data = {**asked, "stream": stream}
        answer = client.post("/v1/audio/transcriptions", data=data, files={"file": CLIP.read_bytes()})
        error = refused(answer)
        assert (answer.status_code, error.code) == (400, "unsupported_parameter")
        assert error.param == "timestamp_granularities"
        assert f"{where}, which tells no times of words" in error.message


# --- the SDK: errors ---------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[openai.APIStatusError], int, str, str | None]] = [
    ({"model": "whisper-9"}, openai.NotFoundError, 404, "model_not_found", "model"),
    ({"file": b"no audio"}, openai.BadRequestError, 400, "invalid_audio", "file"),
    ({"file": b""}, openai.BadRequestError, 400, "invalid_audio", "file"),
    ({"extra_body": {"best_of": 5}}, openai.BadRequestError, 400, "unknown_parameter", "best_of"),
    ({"response_format": "xml"}, openai.BadRequestError, 400, "invalid_parameter", "response_format"),
    ({"response_format": "diarized_json"}, openai.BadRequestError, 400, "unsupported_parameter", "response_format"),
    ({"temperature": 2}, openai.BadRequestError, 400, "invalid_parameter", "temperature"),
    (
        {"response_format": "verbose_json", "timestamp_granularities": ["syllable"]},
        openai.BadRequestError, 400, "invalid_parameter", "timestamp_granularities",
    ),
    *(
        (
            {"response_format": kind, "timestamp_granularities": [granularity], "stream": stream},
            openai.BadRequestError, 400, "unsupported_parameter", "timestamp_granularities",
        )
        for kind, granularity, stream in (("json", "segment", False), ("json", "word", True), ("vtt", "word", False))
    ),
    ({"response_format": "text", "include": ["logprobs"]}, openai.BadRequestError, 400, "unsupported_parameter",
     "include"),
    ({"extra_body": {"include": ["segments"]}}, openai.BadRequestError, 400, "unsupported_parameter", "include"),
    ({"response_format": "srt", "stream": True}, openai.BadRequestError, 400, "unsupported_parameter", "stream"),
    ({"chunking_strategy": {"type": "other"}}, openai.BadRequestError, 400, "invalid_parameter", "chunking_strategy"),
    (
        {"known_speaker_names": ["ann"]},
        openai.BadRequestError, 400, "unsupported_parameter", "known_speaker_names",
    ),
    ({"key": "nonsense"}, openai.AuthenticationError, 401, "invalid_api_key", None),
    ({"key": "narrow", "model": "other"}, openai.PermissionDeniedError, 403, "model_not_allowed", "model"),
    ({"key": "alias"}, openai.PermissionDeniedError, 403, "model_not_allowed", "model"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "status", "code", "param"), BAD, ids=[f"{one[3]}-{one[0]}" for one in BAD])
def test_refusals(
    site: Site, given: dict[str, Any], kind: type[openai.APIStatusError], status: int, code: str, param: str | None
) -> None:
    asked = {"file": CLIP, "model": "tiny", **{name: value for name, value in given.items() if name != "key"}}
    with site.client(given.get("key", "failing")) as client, pytest.raises(kind) as caught:
        client.audio.transcriptions.create(**asked)
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert refused(error.response).type == {
        401: "authentication_error", 403: "permission_error",
    }.get(status, "invalid_request_error")  # fmt: skip
    assert error.response.headers["content-type"] == "application/json"


def test_what_a_key_may_use_by_its_names(site: Site) -> None:
    for key, name in (("narrow", "tiny"), ("narrow", "whisper-1"), ("alias", "whisper-1")):
        with site.client(key) as client:
            assert client.audio.transcriptions.create(file=CLIP, model=name).text == CLIP_TEXT


def test_other_errors(site: Site, client: openai.OpenAI) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"), pytest.raises(openai.NotFoundError) as caught:
        client.audio.translations.create(file=CLIP, model="tiny")
    assert (caught.value.code, refused(caught.value.response).type) == ("not_supported", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("whisper-9")
    assert caught.value.code == "model_not_found"
    url = site.server.url
    for path in ("/v1/models", "/v1/models/tiny", "/token-mask", "/metrics"):
        answer = httpx2.get(url + path)
        assert (answer.status_code, refused(answer).code) == (401, "missing_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path, method, status in (("/nothing", "GET", 404), ("/asr", "PUT", 405)):
        answer = httpx2.request(method, url + path)
        assert (answer.status_code, refused(answer).type) == (status, "invalid_request_error")
    answer = httpx2.post(f"{url}/asr", headers=site.headers(), content=b"x")
    assert (answer.status_code, refused(answer).code) == (415, "unsupported_media_type")
    answer = httpx2.post(f"{url}/asr", headers=site.headers(), json={"url": "https://example.org/a.flac"})
    assert (answer.status_code, refused(answer).code) == (400, "url_not_allowed")


def test_requests_have_ids(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(file=b"", model="tiny")
    ids = [client.audio.transcriptions.create(file=CLIP, model="tiny")._request_id for _ in range(2)]
    ids += [caught.value.request_id, site.post("/asr").headers["x-request-id"]]
    assert len(set(ids)) == 4
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", one or "") for one in ids)
    assert str(ids[0]) in site.server.log.read_text()


def test_what_is_refused_early_has_an_id(site: Site) -> None:
    answers = [httpx2.get(site.server.url + path) for path in ("/v1/models", "/nothing", "/health")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


# --- limits ------------------------------------------------------------------------------------------------------


def test_the_sdk_waits_until_a_place_is_free(site: Site) -> None:
    refusals = site.metric("arkasr_rejected_total", reason="concurrency_limit_exceeded")
    with site.held("once") as finish, site.client("once", max_retries=2) as patient:
        with site.client("once") as hasty, pytest.raises(openai.RateLimitError) as caught:
            hasty.audio.transcriptions.create(file=CLIP, model="tiny")
        assert refused(caught.value.response).type == "rate_limit_error"
        assert caught.value.code == "concurrency_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        timer = threading.Timer(0.3, lambda: finish().read())
        timer.start()
        started = time.monotonic()
        assert patient.audio.transcriptions.create(file=CLIP, model="tiny").text == CLIP_TEXT
        assert 1 <= time.monotonic() - started < 4
        timer.join()
    assert site.metric("arkasr_rejected_total", reason="concurrency_limit_exceeded") == refusals + 2


def test_requests_a_minute(site: Site) -> None:
    with site.client("few") as client:
        started = time.monotonic()
        answers = [client.audio.transcriptions.with_raw_response.create(file=CLIP, model="tiny") for _ in range(2)]
        with pytest.raises(openai.BadRequestError) as bad:  # which is one of them, too
            client.audio.transcriptions.create(file=b"", model="tiny")
        with pytest.raises(openai.RateLimitError) as caught:
            client.audio.transcriptions.create(file=CLIP, model="tiny")
        passed_s = time.monotonic() - started
    headers = [*(one.headers for one in answers), bad.value.response.headers]
    assert [one["x-ratelimit-remaining-requests"] for one in headers] == ["2", "1", "0"]
    assert [one["x-ratelimit-remaining-audio-seconds"] for one in headers] == ["1000", "996", "992"]
    assert {one["x-ratelimit-limit-requests"] for one in headers} == {"3"}
    assert {one["x-ratelimit-limit-audio-seconds"] for one in headers} == {"1000"}
    assert headers[0]["x-ratelimit-reset-requests"] == "20s"
    refusal = caught.value.response.headers
    assert caught.value.code == "rate_limit_exceeded"
    assert 20 - passed_s <= int(refusal["retry-after"]) <= 20
    assert int(refusal["retry-after"]) - 1 <= int(refusal["retry-after-ms"]) / 1000 <= int(refusal["retry-after"])
    assert refusal["x-ratelimit-remaining-requests"] == "0"


def test_seconds_a_day(site: Site) -> None:
    with site.client("short") as client:
        left = [
            client.audio.transcriptions.with_raw_response.create(file=CLIP, model="tiny").headers[
                "x-ratelimit-remaining-audio-seconds"
            ]
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError) as caught:
            client.audio.transcriptions.create(file=CLIP, model="tiny")
    assert left == ["9", "5"]
    assert caught.value.code == "audio_quota_exceeded"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 86_400
    assert site.usage("short")["tiny"][:2] == (2, Fraction(8))


def test_full(tight: Site) -> None:
    with tight.held() as finish, tight.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.audio.transcriptions.create(file=CLIP, model="tiny")
        assert (caught.value.status_code, caught.value.code) == (503, "server_overloaded")
        assert refused(caught.value.response).type == "server_error"
        assert caught.value.response.headers["retry-after"] == "5"
        answer = finish()
        assert (answer.status, json.loads(answer.read())["text"]) == (200, CLIP_TEXT)


def test_too_large(tight: Site) -> None:
    with tight.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.audio.transcriptions.create(file=bytes(200_001), model="tiny")
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (413, "file_too_large", "file")
    refused(caught.value.response)


def test_too_late(tight: Site) -> None:
    with tight.held() as finish:
        time.sleep(1.6)
        answer = finish()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (504, "request_timeout")


def test_too_late_while_it_is_sent(tight: Site) -> None:
    started = time.monotonic()
    with tight.held(size=0) as finish:
        answer = finish()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (504, "request_timeout")
    assert 1.5 <= time.monotonic() - started < 10


@pytest.mark.usefixtures("alone")
def test_a_model_that_nobody_uses_is_freed_and_comes_back(tight: Site) -> None:
    def state() -> Any:
        answer = httpx2.get(f"{tight.server.url}/ready")
        return answer.status_code, answer.json()["models"]["tiny"]

    with tight.client() as client:
        for _ in range(2):
            assert client.audio.transcriptions.create(file=CLIP, model="tiny").text == CLIP_TEXT
            until(lambda: state() == (200, "unloaded"))


# --- the same as the command line --------------------------------------------------------------------------------

KINDS = ("clip", "long", "silence", "stereo8k", "speech", "video")


@pytest.fixture(scope="module")
def transcribed(recordings: Recordings, layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `ark-asr transcribe` writes of all recordings."""
    out = tmp_path_factory.mktemp("transcribed")
    command: list[Any] = [
        Path(sys.executable).with_name("ark-asr"), "transcribe", "--model", "tiny", "--output-dir", out,
        "--engine", layout.engine,
    ]  # fmt: skip
    formats = [flag for kind in ("txt", "srt", "vtt", "json") for flag in ("--format", kind)]
    subprocess.run([*command, *formats, *(recordings.paths[kind] for kind in KINDS)], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_command_line_says_it(
    site: Site, recordings: Recordings, transcribed: Path, layout: Layout, kind: str
) -> None:
    path = recordings.paths[kind]

    def served(response_format: str) -> httpx2.Response:
        answer = site.post("/v1/audio/transcriptions", path, model="tiny", response_format=response_format)
        assert isinstance(answer, httpx2.Response)
        return answer.raise_for_status()

    def written(ending: str) -> bytes:
        return (transcribed / f"{path.stem}.{ending}").read_bytes()

    for response_format, ending in (("text", "txt"), ("srt", "srt"), ("vtt", "vtt")):
        assert served(response_format).content == written(ending)
    ours, theirs = served("verbose_json").json(), json.loads(written("json"))
    strictly(TranscriptionVerbose, json.dumps(ours))
    spoken = [segment for segment in theirs["segments"] if segment["text"]]
    for field_name in layout.unequal:
        for segment in (*spoken, *ours["segments"]):
            del segment[field_name]
    assert ours["segments"] == [{**one, "id": number} for number, one in enumerate(spoken)]
    assert (ours["text"], round(ours["duration"], 4)) == (theirs["text"], theirs["duration"])
    assert ours["text"] == written("txt").decode()[:-1]
    assert bool(ours["text"]) == (kind != "silence")


# --- streams -----------------------------------------------------------------------------------------------------


def test_a_stream(client: openai.OpenAI, recordings: Recordings, layout: Layout) -> None:
    create = client.audio.transcriptions.create
    whole = create(file=recordings.paths["long"], model="tiny", response_format="verbose_json")
    raw = client.audio.transcriptions.with_raw_response.create(
        file=recordings.paths["long"], model="tiny", stream=True,
        extra_body={"include": ["segments", "logprobs"] if layout.tokens else ["segments"]},
    )  # fmt: skip
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [line.removeprefix("data: ") for line in raw.http_response.iter_lines() if line.startswith("data: ")]
    deltas = [strictly(TranscriptionTextDeltaEvent, event) for event in events[:-1]]
    last = json.loads(events[-1])
    used = last["usage"] if layout.tokens else last.pop("usage")
    done = strictly(TranscriptionTextDoneEvent, json.dumps(last))
    assert "".join(delta.delta for delta in deltas) == done.text == whole.text
    times = [(round(one.model_extra["start"], 4), round(one.model_extra["end"], 4)) for one in deltas]
    assert times == [(segment.start, segment.end) for segment in whole.segments or []]
    assert [delta.segment_id for delta in deltas] == [str(number) for number in range(len(deltas))]
    assert Fraction(str(used["seconds"])) == recordings.seconds["long"]
    if not layout.tokens:
        assert strictly(UsageDuration, json.dumps(used)).model_extra.keys() == {"cost"}
        return
    assert [one.to_dict() for delta in deltas for one in delta.logprobs] == [one.to_dict() for one in done.logprobs]
    tokens = [token for segment in whole.segments or [] for token in segment.tokens]
    assert len(done.logprobs) == len(tokens) == done.usage.output_tokens
    assert done.usage.input_token_details.audio_tokens == done.usage.input_tokens > 60 * 12
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert done.usage.model_extra.keys() == {"seconds", "cost"}


def test_a_stream_of_silence(client: openai.OpenAI, recordings: Recordings) -> None:
    stream = client.audio.transcriptions.create(file=recordings.paths["silence"], model="tiny", stream=True)
    assert [(event.type, event.text) for event in stream] == [("transcript.text.done", "")]  # type: ignore[union-attr]


def test_text_comes_while_the_rest_is_being_heard(site: Site, recordings: Recordings) -> None:
    before = site.metric("arkasr_clips_total", model="tiny")
    with site.client() as client:
        stream = client.audio.transcriptions.create(file=recordings.paths["hour"], model="tiny", stream=True)
        assert next(iter(stream)).type == "transcript.text.delta"
        at_first = site.metric("arkasr_clips_total", model="tiny") - before
        assert sum(event.type == "transcript.text.delta" for event in stream) > 50
    assert at_first < (site.metric("arkasr_clips_total", model="tiny") - before) / 2


def test_what_is_no_recording_is_refused_before_a_stream_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not readable as audio") as caught:
        client.audio.transcriptions.create(file=("x.wav", b"no audio at all"), model="tiny", stream=True)
    assert caught.value.code == "invalid_audio"


def test_a_stream_of_a_damaged_recording_ends_in_an_error(site: Site, recordings: Recordings) -> None:
    heard: list[Any] = []
    with site.client("failing") as client:
        stream = client.audio.transcriptions.create(
            file=recordings.paths["damaged"], model="tiny", stream=True, extra_body={"include": ["segments"]}
        )
        with pytest.raises(openai.APIError, match="not readable as audio") as caught:
            heard.extend(stream)
    strictly(ErrorObject, json.dumps(caught.value.body))
    assert (caught.value.code, caught.value.type) == ("invalid_audio", "invalid_request_error")
    assert {event.type for event in heard} == {"transcript.text.delta"}
    last_s = Fraction(str(heard[-1].end))
    # The refusals of other tests are no requests that were answered, and cost nothing.
    assert site.usage("failing") == {"tiny": (1, last_s, last_s * PRICE_PER_S)}


# --- usage -------------------------------------------------------------------------------------------------------


def test_usage_is_the_sum_of_what_answers_said(site: Site, recordings: Recordings) -> None:
    said = [
        json.loads(site.post("/v1/audio/transcriptions", recordings.paths[kind], key="sums", model="tiny").text)[
            "usage"
        ]
        for kind in ("clip", "odd", "silence")
    ]
    for one, kind in zip(said, ("clip", "odd", "silence"), strict=True):
        assert Fraction(str(one["seconds"])) == recordings.seconds[kind]
        assert Fraction(one["cost"]) == recordings.seconds[kind] * PRICE_PER_S
    with site.client("sums") as client:
        stream = client.audio.transcriptions.create(file=recordings.paths["long"], model="whisper-1", stream=True)
        said.append([event for event in stream][-1].usage.to_dict())  # type: ignore[union-attr]  # noqa: C416
    assert Fraction(site.post("/transcribe", key="sums", name="audio").json()["duration_s"]) == CLIP_S
    assert site.post("/asr", key="sums", begin_time=1, end_time=3.5).json()["text"]
    seconds = sum(Fraction(str(one["seconds"])) for one in said) + Fraction(CLIP_S) + Fraction(5, 2)
    assert site.usage("sums") == {"tiny": (6, seconds, seconds * PRICE_PER_S)}


def test_a_cost_has_ten_places(site: Site, recordings: Recordings) -> None:
    answer = site.post("/v1/audio/transcriptions", recordings.paths["odd"], key="bob", model="tiny").json()
    exact = Fraction(RATE + 3, RATE) * Fraction(36, 100) / 3600
    assert exact * 10**10 != round(exact * 10**10)
    assert Fraction(answer["usage"]["cost"]) == Fraction(round(exact * 10**10), 10**10)


def test_usage_with_several_processes(tmp_path: Path, start: Start) -> None:
    secrets = {"ann": create_key(tmp_path / KEYS, "ann", Limits(price=Price.parse("1.6/second")))[1]}
    with start(tmp_path, "--workers", 2) as server:
        site = Site(server, secrets)
        answers = [site.post("/v1/audio/transcriptions", model="tiny") for _ in range(8)]
        assert {answer.json()["text"] for answer in answers} == {CLIP_TEXT}
        assert len({answer.headers["x-request-id"] for answer in answers}) == 8
        assert site.usage("ann") == {"tiny": (8, Fraction(32), 32 * PRICE_PER_S)}
        assert site.metric("arkasr_audio_seconds_total", model="tiny") == 32
        assert site.metric("arkasr_requests_total", route="transcriptions", status="200") == 8
        with site.held() as finish:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert json.loads(finish().read())["text"] == CLIP_TEXT
        server.process.wait(10)


def begin(site: Site, recording: Path, **fields: str) -> http.client.HTTPConnection:
    """A request that was sent in full, over a connection that can be broken."""
    request = httpx2.Request("POST", site.server.url, files={"file": recording.read_bytes()}, data=fields)
    connection = http.client.HTTPConnection("127.0.0.1", site.server.port, timeout=60)
    headers = {"content-type": request.headers["content-type"], **site.headers("gone")}
    connection.request("POST", "/v1/audio/transcriptions", request.read(), headers)
    return connection


def test_who_goes_in_the_middle_of_a_stream_pays_for_what_was_sent(site: Site, recordings: Recordings) -> None:
    with closing(begin(site, recordings.paths["hour"], model="tiny", stream="true", include="segments")) as connection:
        answer = connection.getresponse()
        lines = [answer.readline()]
        connection.sock.shutdown(1)  # as a client that is killed: it sends no more, and what is on the way still comes
        try:
            lines += answer.read().splitlines()
        except http.client.IncompleteRead as broken:
            lines += broken.partial.splitlines()
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ") and b"}" in line]
    seconds = site.usage("gone")["tiny"][1]
    whole = site.post(
        "/v1/audio/transcriptions", recordings.paths["hour"], model="tiny", response_format="verbose_json"
    )
    ends = [Fraction(str(segment["end"])) for segment in whole.json()["segments"]]
    last = ends.index(Fraction(str(events[-1]["end"])))
    assert 0 < seconds <= ends[last + 1] < recordings.seconds["hour"] / 2  # one may be lost between the server and here
    assert site.usage("gone") == {"tiny": (1, seconds, seconds * PRICE_PER_S)}


def test_who_goes_before_the_answer_pays_nothing(site: Site, recordings: Recordings) -> None:
    before = site.usage("gone")
    clips = site.metric("arkasr_clips_total", model="tiny")
    with closing(begin(site, recordings.paths["hour"], model="tiny")):
        until(lambda: site.metric("arkasr_clips_total", model="tiny") > clips)
    until(lambda: site.metric("arkasr_requests_in_work") == 0, seconds=2)  # nobody listens, so nothing is heard
    assert site.usage("gone") == before
    assert site.metric("arkasr_rejected_total", reason="client_gone") >= 1


# --- an end ------------------------------------------------------------------------------------------------------


def test_a_running_request_ends_and_no_other_begins(tmp_path: Path, start: Start) -> None:
    with start(tmp_path) as server:
        site = Site(server)
        with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as before, site.held() as finish:
            before.request("GET", "/ready")
            assert json.loads(before.getresponse().read())["ready"]
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "Waiting for connections" in server.log.read_text())
            with site.client() as client, pytest.raises(openai.APIConnectionError):
                client.audio.transcriptions.create(file=CLIP, model="tiny")
            assert before.sock.recv(1) == b""  # also a connection from before is of no more use
            answer = finish()
            assert (answer.status, json.loads(answer.read())["text"]) == (200, CLIP_TEXT)
        assert server.process.wait(10) == -signal.SIGTERM
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_outlasts_the_end(tmp_path: Path, recordings: Recordings, start: Start, *, stream: bool) -> None:
    with start(tmp_path, "--shutdown-s", 0.2) as server, Site(server).client() as client:

        def stop() -> None:
            until(lambda: Site(server).metric("arkasr_clips_total") > 3)
            server.process.send_signal(signal.SIGTERM)

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(openai.APIError) as caught:
            list(client.audio.transcriptions.create(file=recordings.paths["hour"], model="tiny", stream=stream))
        stopper.join()
        assert caught.value.code == "shutting_down"
        if not stream:
            assert isinstance(caught.value, openai.InternalServerError)
            assert caught.value.status_code == 503
        assert server.process.wait(10) == -signal.SIGTERM


def test_an_upload_that_outlasts_the_end(tmp_path: Path, start: Start) -> None:
    with start(tmp_path, "--shutdown-s", 0.2) as server, Site(server).held() as finish:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "Waiting for connections" in server.log.read_text())
        time.sleep(0.4)
        answer = finish()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "shutting_down")


# --- the other routes --------------------------------------------------------------------------------------------


def test_the_references_routes(site: Site, layout: Layout) -> None:
    answer = site.post("/asr").json()
    assert answer.keys() == {"text", "latency_s", "prompt_tokens"}
    assert answer["text"] == CLIP_TEXT
    assert 0 < answer["latency_s"] < 60
    part = site.post("/asr", begin_time=0, end_time=2).json()
    out = io.BytesIO()
    soundfile.write(out, soundfile.read(CLIP, dtype="int16")[0][: 2 * RATE], RATE, format="FLAC")
    assert part["text"] == site.post("/asr", out.getvalue()).json()["text"] != CLIP_TEXT
    said = httpx2.get(f"{site.server.url}/token-mask", headers=site.headers())
    if not layout.tokens:
        assert answer["prompt_tokens"] is part["prompt_tokens"] is None
        assert (said.status_code, refused(said).code) == (404, "not_supported")
        return
    assert answer["prompt_tokens"] - part["prompt_tokens"] == 25
    mask = said.json()
    assert mask.keys() == {"allowed_count", "blocked_count", "eos_token_ids", "tokens"}
    assert mask["tokens"]["<|im_end|>"] == {"id": mask["eos_token_ids"][0], "blocked": False, "allowed": True}
    assert mask["tokens"]["<|audio|>"]["blocked"]


def test_the_route_of_cf_stt(site: Site, layout: Layout) -> None:
    answer = site.post("/transcribe", name="audio", language="en", confidence_threshold_override=1)
    assert answer.headers["x-arkasr-ignored"] == "language"
    record = answer.json()
    (segment,) = record.pop("segments")
    assert segment.keys() == {"start_s", "end_s", "text", "confidence"}
    assert (segment["text"], segment["confidence"]) == (record["text"], record["confidence"])
    assert (0.9 if layout.confidence else -1) < record.pop("confidence") < (1 if layout.confidence else 1e-9)
    assert record == {
        "text": CLIP_TEXT, "below_threshold": True, "language": "en", "duration_s": CLIP_S, "model": "tiny",
    }  # fmt: skip
    lower = site.post("/transcribe", name="audio", confidence_threshold_override=0.5).json()
    assert lower["below_threshold"] != layout.confidence  # what nobody is sure of is not passed
    assert refused(site.post("/transcribe", name="file")).code == "invalid_body"


# --- what is written about it ------------------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "serving.md").read_text()
SERVER = ROOT / "src" / "arkasr" / "server"
OURS_IN_JSON = {"file", "audio", "url"}


def curl(text: str, site: Site) -> list[str]:
    """What the marked lines of a document print, sent to a site."""
    (section,) = re.findall(r"<!-- curl.*?-->\n```bash\n(.*?)```\n<!-- end of curl -->", text, re.DOTALL)
    said = []
    for line in section.splitlines():
        assert "http://127.0.0.1:8000/" in line
        command = ["bash", "-c", line.replace("http://127.0.0.1:8000", site.server.url)]
        said.append(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return said


def test_the_readmes_lines_for_curl(keyless: Site) -> None:
    whole, events = curl((ROOT / "README.md").read_text(), keyless)
    assert json.loads(whole) == {"text": CLIP_TEXT, "usage": {"type": "duration", "seconds": 4.0}}
    assert json.loads(events.split("\n\n")[-2][6:])["text"] == CLIP_TEXT


@pytest.mark.usefixtures("alone")
def test_the_guides_lines_for_curl(keyless: Site) -> None:
    said = curl(GUIDE, keyless)
    plain, srt, events, as_json, part, stt, mask, names, ready = said
    assert json.loads(plain) == json.loads(as_json)
    assert CLIP_TEXT == json.loads(plain)["text"] == json.loads(stt)["text"]
    assert srt.endswith(f"{CLIP_TEXT}\n\n")
    assert [json.loads(one[6:])["type"] for one in events.split("\n\n")[:-1]] == [
        "transcript.text.delta", "transcript.text.done",
    ]  # fmt: skip
    assert json.loads(part)["text"]
    assert json.loads(mask)["allowed_count"]
    assert json.loads(names)["data"][0]["id"] == "tiny"
    assert json.loads(ready) == {"ready": True, "models": {"tiny": "ready"}}


def test_the_guide_names_all_there_is(site: Site) -> None:
    parameters = GUIDE.partition("## Parameters")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in parameters.splitlines() if line.startswith("| `")]
    assert {
        name for row in rows for name in re.findall(r"`(\w+)`", row)
    } == OURS_IN_JSON | Parameters.model_fields.keys()
    source = "".join(path.read_text() for path in SERVER.glob("*.py"))
    codes = {*re.findall(r'code="(\w+)"', source), *get_args(Code), "file_too_large"} - {"client_gone"}
    errors = GUIDE.partition("## Errors")[2].partition("\n## ")[0]
    assert codes <= set(re.findall(r"`(\w+)`", errors))
    text = httpx2.get(f"{site.server.url}/metrics", headers=site.headers()).text
    assert set(re.findall(r"arkasr_\w+", GUIDE)) - {"arkasr_ignored"} == {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }


def test_the_example(keyless: Site) -> None:
    command: list[Any] = [sys.executable, ROOT / "examples" / "serve_client.py", CLIP, f"{keyless.server.url}/v1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole, streamed, number, clock, cue, empty, segment = done.stdout.splitlines()
    assert [whole, streamed, number, cue, empty] == [CLIP_TEXT, CLIP_TEXT, "1", CLIP_TEXT, ""]
    assert clock.startswith("00:00:00,")
    assert CLIP_TEXT in segment


def fuzz(site: Site, *, headers: dict[str, str]) -> Counter[int]:
    """Requests as /openapi.json allows and forbids, each answered as it says; how often with which status."""
    found: Counter[int] = Counter()
    clip = CLIP.read_bytes()
    conforms = [
        checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_headers_conformance, checks.response_schema_conformance,
    ]  # fmt: skip

    def send(case: Any, *, speaks: bool) -> None:
        if speaks and isinstance(case.body, dict):  # or no recording would ever be one
            names = {"file": clip, "audio": clip if "multipart" in case.media_type else base64.b64encode(clip).decode()}
            case.body |= {name: value for name, value in names.items() if name in case.body} | {"model": "tiny"}
            case.body.pop("url", None)
        answer = case.call(base_url=site.server.url, headers=headers)
        found[answer.status_code] += 1
        case.validate_response(answer, checks=conforms)

    schema = schemathesis.openapi.from_url(f"{site.server.url}/openapi.json")
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:
            test = given(case=operation.as_strategy(generation_mode=mode), speaks=st.booleans())(send)
            quiet = settings(
                max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            quiet(test)()
    return found


def test_the_server_does_as_its_schema_says(site: Site, keyless: Site) -> None:
    assert {200, 400, 404} <= fuzz(keyless, headers={}).keys()
    assert {200, 400, 404} <= fuzz(site, headers=site.headers()).keys()
    assert fuzz(site, headers={}).keys() == {200, 401, 404}
