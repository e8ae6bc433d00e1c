"""LiteLLM in front of `ark-asr serve`: as a library by both of its routes, and as a proxy with deploy/litellm.yaml.

It wants huggingface-hub below 2, and arkasr 2.4 or newer, so it has an environment of its own (750 MB, a minute):

    python -m venv litellm && litellm/bin/pip install 'litellm[proxy]==1.109.1'
    LITELLM_PYTHON=litellm/bin/python python -m pytest -m slow tests/test_server_litellm.py
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.audio.transcription_verbose import TranscriptionVerbose

from serving import Server, create_key, free_port, program, serve

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
CLIP_TEXT = "RUBOUT G M E F THREE NINE"
CLIP_S = 4
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


@pytest.fixture(scope="module")
def gateway(python: Path, server: tuple[Server, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy with our file, changed in the model and the port; its URL."""
    running, key = server
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    config = (ROOT / "deploy" / "litellm.yaml").read_text()
    for before, after in (("hosted_vllm/0.6b", "hosted_vllm/tiny"), ("http://127.0.0.1:8000", running.url)):
        assert before in config
        config = config.replace(before, after)
    (folder / "litellm.yaml").write_text(config)
    command = [python.with_name("litellm"), "--config", folder / "litellm.yaml", "--host", "127.0.0.1", "--port", port]
    settings = {**os.environ, **ALONE, "ARKASR_API_KEY": key, "LITELLM_MASTER_KEY": "sk-master"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=settings, cwd=folder)
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


def test_the_proxy(gateway: str) -> None:
    with openai.OpenAI(base_url=gateway, api_key="sk-master", max_retries=0) as client:
        create = client.audio.transcriptions.with_raw_response.create
        plain = create(file=CLIP, model="ark-asr-0.6b")
        assert json.loads(plain.text)["text"] == CLIP_TEXT
        price = Fraction("0.00001")  # of deploy/litellm.yaml
        assert Fraction(plain.headers["x-litellm-response-cost"]) == CLIP_S * price
        verbose = json.loads(create(file=CLIP, model="ark-asr-0.6b", response_format="verbose_json").text)
        assert verbose["segments"][0]["text"] == CLIP_TEXT
        with pytest.raises(openai.APIStatusError):
            create(file=b"no audio", model="ark-asr-0.6b")
    with (
        openai.OpenAI(base_url=gateway, api_key="sk-other", max_retries=0) as stranger,
        pytest.raises(openai.APIStatusError),
    ):
        stranger.audio.transcriptions.create(file=CLIP, model="ark-asr-0.6b")
