"""A recognizer behind an OpenAI-compatible endpoint: each clip is encoded once and sent until it is answered.

Unusual: samples become 16-bit FLAC, which is what 16-bit audio at 16 kHz was before it was decoded: such a clip arrives
as it was on the disk.
"""

import io
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2
import numpy as np
import soundfile

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import UsageError, quoted
from arkasr.evaluate.systems import Heard, charged

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
NEVER = frozenset({401, 403, 404, 405})  # what no other clip would be spared
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
FULL_SCALE = 1 << 15


@dataclass(frozen=True)
class Request:
    """How an endpoint is asked.

    Attributes:
        parallel: requests at a time.
        tries: of one clip, at most.
        timeout_s: without a byte, of one request.
        audio_format: of the 16-bit audio that is sent.
        fields: of the form, besides model, response_format and temperature.
    """

    parallel: int = 4
    tries: int = 6
    timeout_s: float = 600.0
    audio_format: Literal["flac", "wav"] = "flac"
    fields: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("parallel", self.parallel), ("tries", self.tries)):
            if value < 1:
                raise UsageError(f"{name} is {value}; give at least 1")


class _GoneError(Exception):
    """Nobody listens at the endpoint."""


class EndpointSystem:
    """An endpoint's model."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        request: Request = Request(),
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """The model of that name below a URL that ends in /v1, or wherever /audio/transcriptions is.

        Args:
            base_url: without user or password.
            model: as the endpoint calls it.
            key_variable: the environment variable that has the API key.
            request: how to ask.
            sleep: waits so many seconds before a clip is sent again.

        Raises:
            UsageError: no such URL, or no such variable.
        """
        try:
            url = httpx2.URL(base_url.rstrip("/") + "/")
        except httpx2.InvalidURL as error:
            raise UsageError(f"{quoted(base_url)}: no URL ({error}); give one such as http://host:8000/v1") from None
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise UsageError(f"{url.host or quoted(base_url)}: give http://HOST/v1 without user, the key by a variable")
        key = os.environ.get(key_variable) if key_variable else None
        if key_variable and not key:
            raise UsageError(f"{key_variable}: not set; put the endpoint's API key into this environment variable")
        self.name, self._request, self._sleep = model, request, sleep
        self._url = url
        self._client = httpx2.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key.strip()}"} if key else {},
            timeout=request.timeout_s,
            limits=httpx2.Limits(max_connections=request.parallel),
        )
        self._pool = ThreadPoolExecutor(request.parallel, thread_name_prefix="arkasr-endpoint")

    def facts(self) -> dict[str, Any]:
        """Where it is, and how it is asked; the key is no part of it."""
        return {
            "kind": "endpoint", "model": self.name, "revision": None, "base_url": str(self._url),
            "parallel": self._request.parallel, "tries": self._request.tries,
            "audio": f"{self._request.audio_format}, 16 bit, {SAMPLE_RATE} Hz",
            "decoding": {**self._form(), **dict(self._request.fields)},
        }  # fmt: skip

    def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
        """One answer a clip; encoding is not timed, waiting for the endpoint is.

        Raises:
            UsageError: nobody listens there, or the key or model is refused.
        """
        encoded = [encode(waveform, self._request.audio_format) for waveform in batch]
        since = time.perf_counter()
        try:
            answers = list(self._pool.map(self._ask, encoded))
        except _GoneError as error:
            raise UsageError(f"{self._url}: nobody answers ({error}); start it, then resume") from None
        return charged(answers, since)

    def close(self) -> None:
        """Give back threads and connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _form(self) -> dict[str, str]:
        return {"model": self.name, "response_format": "json", "temperature": "0"}

    def _ask(self, content: bytes) -> Heard:
        """Send a clip until it is answered, or as often as is allowed."""
        name = f"audio.{self._request.audio_format}"
        why, gone = "", False
        for number in range(self._request.tries):
            wait_s = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * random.uniform(0.5, 1)
            try:
                answer = self._client.post(
                    "audio/transcriptions",
                    data={**self._form(), **dict(self._request.fields)},
                    files={"file": (name, content, f"audio/{self._request.audio_format}")},
                )
            except httpx2.TransportError as error:
                why, gone = f"{type(error).__name__}: {error}", isinstance(error, httpx2.ConnectError)
            else:
                if answer.status_code not in AGAIN:
                    return self._read(answer)
                why, gone = f"HTTP {answer.status_code}{_reason(answer)}", False
                asked_s = _retry_after_s(answer)
                if asked_s is not None and asked_s > LONGEST_WAIT_S:
                    return Heard("", 0.0, error=f"{why}; asked to wait {asked_s:.0f} s")
                wait_s = wait_s if asked_s is None else asked_s
            if number + 1 < self._request.tries:
                self._sleep(wait_s)
        if gone:
            raise _GoneError(why)
        return Heard("", 0.0, error=f"{why}; asked {self._request.tries} times")

    def _read(self, answer: httpx2.Response) -> Heard:
        status = answer.status_code
        if status in NEVER or 300 <= status < 400:
            raise UsageError(f"{self._url}: HTTP {status}{_reason(answer)}; check URL, model and key")
        if status != 200:
            return Heard("", 0.0, error=f"HTTP {status}{_reason(answer)}")
        try:
            record = answer.json()
        except (ValueError, RecursionError):
            return Heard("", 0.0, error=f"the answer is not JSON: {quoted(answer.text)}")
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            return Heard("", 0.0, error=f"the answer has no text: {quoted(record)}")
        return Heard(text, 0.0)


def encode(waveform: Waveform, audio_format: str) -> bytes:
    """16-bit FLAC or WAV; samples that came from 16 bits get their own bits back, and what is too loud is clipped."""
    samples = np.clip(np.rint(waveform * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    out = io.BytesIO()
    soundfile.write(out, samples, SAMPLE_RATE, format=audio_format.upper(), subtype="PCM_16")
    return out.getvalue()


def _reason(answer: httpx2.Response) -> str:
    """What the endpoint says of an error, in OpenAI's shape or whatever else."""
    try:
        record = answer.json()
    except (ValueError, RecursionError):
        return f" {quoted(answer.text)}" if answer.text else ""
    error = record.get("error") if isinstance(record, dict) else None
    return f" {quoted(error.get('message') if isinstance(error, dict) else record)}"


def _retry_after_s(answer: httpx2.Response) -> float | None:
    """Seconds, or until a date; None where nothing, or nothing that can be read, is said."""
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
