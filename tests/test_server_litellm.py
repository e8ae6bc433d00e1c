"""LiteLLM in front of `ark-asr serve`: as a library by both of its routes, and as a proxy with deploy/litellm.yaml.

It wants huggingface-hub below 2, and arkasr 2.4 or newer, so it has an environment of its own (750 MB, a minute):

    python -m venv litellm && litellm/bin/pip install 'litellm[proxy]==1.109.1'
    LITELLM_PYTHON=litellm/bin/python python -m pytest -m slow tests/test_server_litellm.py
"""

import io
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx2
import openai
import pytest
import soundfile
from openai.types.audio.transcription_verbose import TranscriptionVerbose

from serving import Server, create_key, free_port, program, serve

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
CLIP_TEXT = "RUBOUT G M E F THREE NINE"
CLIP_S = 4
CLIPS = {
    CLIP: Fraction(CLIP_S),
    CLIP.with_name("an4-patterson.flac"): Fraction("2.8"),
}  # no whole number: nothing rounds it
PRICE = Fraction("0.00001")  # of deploy/litellm.yaml
ROUTES = ("openai/tiny", "hosted_vllm/tiny")
FORMATS = (None, "json", "verbose_json", "text", "srt", "vtt")
START_S = 120
LIBRARY = """
import json, sys, litellm
base, key, clip, routes, formats = json.loads(sys.stdin.read())
def ask(route, kind):
    given = {} if kind is None else {"response_format": kind}
    with open(clip, "rb") as file:
        return litellm.transcription(model=route, file=file, api_base=base, api_key=key, **given).model_dump()
print("ANSWERS" + json.dumps([[ask(route, kind) for kind in formats] for route in routes]))
"""
RECORDER = """
from litellm.integrations.custom_logger import CustomLogger
class Recorder(CustomLogger):
    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        with open("billed", "a") as file:
            print(kwargs.get("response_cost"), file=file)
recorder = Recorder()
"""
# Nothing outside this machine may be asked: the package has a list of prices, and a proxy that is none stops the rest.
ALONE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1", "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}  # fmt: skip


@pytest.fixture(scope="module")
def python() -> Path:
    """Of the environment that has LiteLLM."""
    if "LITELLM_PYTHON" not in os.environ:
        pytest.skip("LITELLM_PYTHON is not set; see above")
    return Path(os.environ["LITELLM_PYTHON"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """With a key."""
    state = tmp_path_factory.mktemp("state")
    key = create_key(state, "litellm", "--price", "0.0001/second")
    with serve(state) as running:
        yield running, key


def test_the_library(python: Path, server: tuple[Server, str]) -> None:
    running, key = server
    given = json.dumps([f"{running.url}/v1", key, str(CLIP), ROUTES, FORMATS])
    done = subprocess.run(
        [python, "-c", LIBRARY], input=given, check=True, capture_output=True, text=True, env={**os.environ, **ALONE}
    )
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    for route, of_route in zip(ROUTES, answers, strict=True):
        by_format: dict[str | None, dict[str, Any]] = dict(zip(FORMATS, of_route, strict=True))
        for kind in ("json", "verbose_json", None):
            assert by_format[kind]["text"] == CLIP_TEXT
            assert by_format[kind]["usage"] == {"type": "duration", "seconds": CLIP_S}
        assert ("segments" in by_format[None]) == (route == "openai/tiny")  # which asks for verbose_json by itself
        TranscriptionVerbose.model_validate(by_format["verbose_json"], strict=True)
        assert by_format["verbose_json"]["duration"] == CLIP_S
        assert by_format["text"]["text"] == CLIP_TEXT + "\n"
        assert by_format["srt"]["text"].startswith("1\n00:00:00,320 --> ")
        assert by_format["vtt"]["text"].startswith("WEBVTT\n\n00:00:00.320 --> ")
    num_json = len(ROUTES) * len(FORMATS)
    (row,) = [line.split("\t") for line in program("usage", state=running.state).splitlines()[1:]]
    assert row == ["litellm", "tiny", str(num_json), str(num_json * CLIP_S), "0.0048"]


@contextmanager
def proxied(python: Path, folder: Path, changes: dict[str, str], key: str) -> Iterator[str]:
    """The proxy with our file, changed, and a recorder of what it bills; its URL."""
    port = free_port()
    config = (ROOT / "deploy" / "litellm.yaml").read_text()
    for before, after in changes.items():
        assert before in config
        config = config.replace(before, after)
    (folder / "recorder.py").write_text(RECORDER)
    (folder / "litellm.yaml").write_text(config + "litellm_settings:\n  callbacks: recorder.recorder\n")
    command = [python.with_name("litellm"), "--config", folder / "litellm.yaml", "--host", "127.0.0.1", "--port", port]
    keys = {"ARKASR_API_KEY": key, "VLLM_API_KEY": key, "LITELLM_MASTER_KEY": "sk-master"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, env={**os.environ, **ALONE, **keys}, cwd=folder
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health/readiness", timeout=5).raise_for_status()
                break
            except (httpx2.TransportError, httpx2.HTTPStatusError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def billed(folder: Path, count: int) -> list[Fraction | None]:
    """What the proxy recorded, request by request; it does so after it has answered."""
    deadline = time.monotonic() + 20
    while True:
        path = folder / "billed"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return [None if line == "None" else Fraction(line).limit_denominator(10**9) for line in lines]
        assert time.monotonic() < deadline, lines
        time.sleep(0.1)


@pytest.fixture(scope="module")
def gateway(
    python: Path, server: tuple[Server, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The proxy in front of the server, and its folder."""
    running, key = server
    folder = tmp_path_factory.mktemp("litellm")
    changes = {"hosted_vllm/0.6b": "hosted_vllm/tiny", "http://127.0.0.1:8000": running.url}
    with proxied(python, folder, changes, key) as url:
        yield url, folder


def test_the_proxy(gateway: tuple[str, Path]) -> None:
    url, folder = gateway
    with openai.OpenAI(base_url=url, api_key="sk-master", max_retries=0) as client:
        create = client.audio.transcriptions.with_raw_response.create
        costs = []
        for clip, seconds in CLIPS.items():
            for kind in FORMATS:
                given: Any = {} if kind is None else {"response_format": kind}
                answer = create(file=clip, model="ark-asr-0.6b", **given)
                costs.append(Fraction(answer.headers["x-litellm-response-cost"]).limit_denominator(10**9))
                assert costs[-1] == seconds * PRICE
                if kind == "verbose_json":
                    assert json.loads(answer.text)["segments"]
        assert billed(folder, len(costs)) == costs
        assert json.loads(create(file=CLIP, model="ark-asr-0.6b").text)["text"] == CLIP_TEXT
        with pytest.raises(openai.APIStatusError):
            create(file=b"no audio", model="ark-asr-0.6b")
    with (
        openai.OpenAI(base_url=url, api_key="sk-other", max_retries=0) as stranger,
        pytest.raises(openai.APIStatusError) as refused,
    ):
        stranger.audio.transcriptions.create(file=CLIP, model="ark-asr-0.6b")
    assert refused.value.status_code in {400, 401}


def test_the_proxy_charges_nothing_for_a_file_that_it_cannot_open(gateway: tuple[str, Path]) -> None:
    """A limit of LiteLLM, which docs/deployment.md names: it measures the upload, and does not read `usage`."""
    url, _ = gateway
    upload = ("a.m4a", m4a(CLIP))
    with openai.OpenAI(base_url=url, api_key="sk-master", max_retries=0) as client:
        create = client.audio.transcriptions.with_raw_response.create
        plain = create(file=upload, model="ark-asr-0.6b")
        assert json.loads(plain.text)["usage"]["seconds"] >= CLIP_S  # so it was told
        assert "x-litellm-response-cost" not in plain.headers
        verbose = create(file=upload, model="ark-asr-0.6b", response_format="verbose_json")
        assert Fraction(verbose.headers["x-litellm-response-cost"]) >= CLIP_S * PRICE


def test_the_proxy_does_not_stream(gateway: tuple[str, Path]) -> None:
    """Another limit that docs/deployment.md names: our events arrive as the text of one answer."""
    url, _ = gateway
    answer = httpx2.post(
        f"{url}/audio/transcriptions", headers={"authorization": "Bearer sk-master"}, timeout=60,
        data={"model": "ark-asr-0.6b", "stream": "true"}, files={"file": CLIP.read_bytes()},
    )  # fmt: skip
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["text"].startswith("data: {")


def m4a(path: Path) -> bytes:
    samples, sample_rate = soundfile.read(path, dtype="float32")
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=sample_rate)
        stream.layout = "mono"
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = sample_rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def test_the_fallback(python: Path, server: tuple[Server, str], tmp_path: Path) -> None:
    """A back end that is gone is made up for by the next; the second stands for vLLM here."""
    running, key = server
    changes = {
        "http://127.0.0.1:8000": f"http://127.0.0.1:{free_port()}",
        "http://127.0.0.1:8001": running.url,
        "hosted_vllm/AutoArk-AI/ARK-ASR-0.6B": "hosted_vllm/tiny",
    }
    with (
        proxied(python, tmp_path, changes, key) as url,
        openai.OpenAI(base_url=url, api_key="sk-master", max_retries=0) as client,
    ):
        answer = client.audio.transcriptions.with_raw_response.create(file=CLIP, model="ark-asr-0.6b")
        assert json.loads(answer.text)["text"] == CLIP_TEXT
        assert Fraction(answer.headers["x-litellm-response-cost"]) == CLIP_S * PRICE
