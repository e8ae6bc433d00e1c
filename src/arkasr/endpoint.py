"""An OpenAI-compatible endpoint: asked side by side, and again while that can help. The only owner of how.

    requests -> at most so many at a time -> asked until there is an answer -> its JSON, in the requests' order

Unusual: samples are sent with 16 bits, which is what 16-bit audio at 16 kHz was before it was decoded: such a clip
arrives as it was on the disk.
"""

import io
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
import numpy as np
import soundfile

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import ArkASRError, UsageError, quoted

KEY_VARIABLE = "ARKASR_API_KEY"
TRANSCRIPTIONS = "audio/transcriptions"
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
NEVER = frozenset({401, 403, 404, 405})  # what no other request would be spared
TRIES, TIMEOUT_S = 6, 600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
FULL_SCALE = 1 << 15

T = TypeVar("T")
R = TypeVar("R")


class NoAnswerError(ArkASRError):
    """One request got no answer that can be read; others may get theirs."""


def encode(waveform: Waveform, audio_format: str) -> bytes:
    """16-bit FLAC or WAV; samples that came from 16 bits get their own bits back, and what is too loud is clipped."""
    samples = np.clip(np.rint(waveform * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    out = io.BytesIO()
    soundfile.write(out, samples, SAMPLE_RATE, format=audio_format.upper(), subtype="PCM_16")
    return out.getvalue()


def place(name: str) -> tuple[str, str]:
    """The base URL and the model of a name such as http://HOST/v1#MODEL.

    Raises:
        UsageError: it is none.
    """
    address, _, model = name.partition("#")
    wanted = f"http://HOST/v1#MODEL, and the key in {KEY_VARIABLE}"
    url = _checked(address, wanted)
    if not model:
        raise UsageError(f"{url}: no model; give {wanted}")
    return url, model


def _checked(address: str, wanted: str) -> str:
    """A base URL with a slash at its end; no message shows a password."""
    shown = quoted(address.rpartition("@")[2])
    try:
        url = httpx2.URL(address.rstrip("/") + "/")
    except httpx2.InvalidURL as error:
        raise UsageError(f"{shown}: no URL ({error}); give {wanted}") from None
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise UsageError(f"{url.host or shown}: give {wanted}; no user, no query")
    return str(url)


class Client:
    """Connections to one endpoint, to be closed."""

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str | None = None,
        needs_key: bool = False,
        parallel: int = 4,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Below a base URL; its key, if any, is in an environment variable; the time-out is without a byte.

        Raises:
            UsageError: no such URL, or no key where one is needed.
        """
        self.url = _checked(base_url, "http://HOST/v1, and the key by an environment variable")
        key = os.environ.get(key_variable, "").strip() if key_variable else ""
        if needs_key and not key:
            raise UsageError(f"{key_variable}: not set; put the endpoint's API key into this environment variable")
        if not (key.isascii() and key.isprintable()):  # httpx2 would quote it
            raise UsageError(f"{key_variable}: has characters that no API key has; set it again")
        self._key, self._parallel = key_variable or "key", parallel
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=parallel),
        )
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="arkasr-endpoint")
        self._closed = threading.Event()

    def close(self) -> None:
        """Give back threads and connections; who waits to ask again gives up."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def each(self, answer: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
        """What a function that asks says of each item, in order; no more are begun than are soon needed."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(answer, item))
                if len(waiting) > 2 * self._parallel:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def ask(
        self, path: str, *, tries: int = TRIES, sleep: Callable[[float], object] | None = None, **content: Any
    ) -> Any:
        """The JSON that is answered to a POST of such content, as httpx2 takes it; `sleep` waits between tries.

        Raises:
            NoAnswerError: none, or none that can be read.
            UsageError: nobody listens there, or key, model or URL are refused.
        """
        why, gone, asked = "", False, 0
        while asked < tries:
            wait_s = min(FIRST_WAIT_S * 2**asked, LONGEST_WAIT_S) * random.uniform(0.5, 1)
            asked += 1
            try:
                answer = self._client.post(path, **content)
            except httpx2.RequestError as error:
                why = f"{type(error).__name__}: {quoted(str(error))}"
                gone = isinstance(error, httpx2.ConnectError)
            else:
                if answer.status_code not in AGAIN:
                    return self._read(answer)
                why, gone = f"HTTP {answer.status_code}{_reason(answer)}", False
                told_s = _retry_after_s(answer)
                if told_s is not None and told_s > LONGEST_WAIT_S:
                    raise NoAnswerError(f"{why}; asked to wait {told_s:.0f} s")
                wait_s = wait_s if told_s is None else told_s
            if asked < tries:
                (sleep or self._closed.wait)(wait_s)
            if self._closed.is_set():
                break
        why = f"asked {asked} times, {why}"
        if gone:
            raise UsageError(f"{self.url}: nobody answers ({why}); start it and run again")
        raise NoAnswerError(why)

    def _read(self, answer: httpx2.Response) -> Any:
        status = answer.status_code
        if status in NEVER or 300 <= status < 400:
            raise UsageError(f"{self.url}: HTTP {status}{_reason(answer)}; check URL, model and {self._key}")
        if status != 200:
            raise NoAnswerError(f"HTTP {status}{_reason(answer)}")
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise NoAnswerError(f"the answer is not JSON: {quoted(answer.text)}") from None


def _reason(answer: httpx2.Response) -> str:
    """What the endpoint says of an error, in OpenAI's shape or whatever else."""
    try:
        record = answer.json()
    except (ValueError, RecursionError):
        return f" {quoted(answer.text)}" if answer.text else ""
    error = record.get("error") if isinstance(record, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f" {quoted(message if isinstance(message, str) else record)}"


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
