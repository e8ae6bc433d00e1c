"""An OpenAI-compatible endpoint: asked side by side, and again while that can help. The only owner of how.

    requests -> at most so many at a time -> asked until there is an answer -> its JSON

Unusual: samples are sent with 16 bits, which is what 16-bit audio at 16 kHz was before it was decoded: such a clip
arrives as it was on the disk.
"""

import asyncio
import io
import ipaddress
import json
import math
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
import numpy as np
import soundfile

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import NoAnswerError, UsageError, quoted

KEY_VARIABLE = "ARKASR_API_KEY"
TRANSCRIPTIONS = "audio/transcriptions"
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
BUSY = frozenset({429, 503})
NEVER = frozenset({401, 403, 404, 405})  # what no other request would be spared
LIVING = frozenset({200, 404, 405, 429})  # it lives, though it may not list its models, or not this often
TRIES, TIMEOUT_S = 6, 600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
MAX_ANSWER_BYTES = 1 << 26
FULL_SCALE = 1 << 15

T = TypeVar("T")
R = TypeVar("R")


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


class RefusedError(NoAnswerError):
    """A request that the endpoint does not take as it is."""

    def __init__(self, message: str, param: str | None) -> None:
        """`param` is the parameter at fault, if that was told."""
        super().__init__(message)
        self.param = param


class _AgainError(Exception):
    """One try failed, and another may not."""

    def __init__(self, why: str, *, told_s: float | None = None, busy: bool = False, gone: bool = False) -> None:
        """`told_s` are the seconds after which to ask again; nothing was sent to an endpoint that is `gone`."""
        super().__init__(why)
        self.told_s, self.busy, self.gone = told_s, busy, gone


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: httpx2.Headers
    content: bytes


class Client:
    """Connections to one endpoint, to be closed; any thread may ask."""

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str | None = None,
        needs_key: bool = False,
        parallel: int = 4,
        timeout_s: float = TIMEOUT_S,
        budget_s: float = math.inf,
    ) -> None:
        """Below a base URL; its key, if any, is in an environment variable; the time-out is without a byte.

        Once a request would exceed the budget of seconds of audio that are sent, no more are sent.

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
        self._budget_s = self._left_s = budget_s
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=parallel + 1),  # one more to see whether it lives
        )
        self._places = asyncio.Semaphore(parallel)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="arkasr-endpoint")
        self._lock, self._closed = threading.Lock(), False
        self._begun: set[Any] = set()
        # Only a loop can end an exchange in time that is kept alive by a byte now and then, or that nobody wants.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="arkasr-endpoint-loop", daemon=True)
        self._thread.start()

    @property
    def notice(self) -> str | None:
        """That what is sent leaves this machine, and whether others can read it on its way; None where it does not."""
        url = httpx2.URL(self.url)
        try:
            is_here = ipaddress.ip_address(url.host).is_loopback
        except ValueError:
            is_here = url.host == "localhost"
        if is_here:
            return None
        readable = "" if url.scheme == "https" else ", which others on the way can read, as they can the key: no https"
        return f"audio leaves this machine, for {url.host}{readable}"

    def close(self) -> None:
        """Give back threads and connections; who waits for an answer gives up."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._pool.shutdown(cancel_futures=True)

    async def _end(self) -> None:
        # Only what was begun here: what a library has begun beneath it, and not started, would never be awaited.
        asking = [task for task in asyncio.all_tasks() if task.get_coro() in self._begun]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await self._client.aclose()

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
        """The JSON that is answered to a POST of such content, as httpx2 takes it; `sleep` stands in for waiting.

        Raises:
            NoAnswerError: none, or none that can be read.
            UsageError: nobody listens there, or key, model or URL are refused.
        """
        try:
            return self._begin(self._answer(path, content, tries=tries, sleep=sleep)).result()
        except CancelledError:
            raise NoAnswerError(f"{self.url}: closed while it was asked") from None

    def begin(
        self, path: str, *, read: Callable[[Any], R], answer_s: float, audio_s: float, **content: Any
    ) -> Future[R]:
        """Begin to ask as `ask` does, but until a time: for what `read` makes of the JSON that is answered.

        What `read` refuses with a `NoAnswerError` is asked for again, and an endpoint that is busy as long as there is
        time. Who cancels the future gives up; closing cancels all.

        Args:
            path: below the URL.
            read: what reads the JSON.
            answer_s: most wall seconds that the answer takes, all tries and waits included, once one of the `parallel`
                places is free.
            audio_s: seconds of audio in it, which are taken from the budget with each try that finds somebody there.
            content: as httpx2 takes it.
        """
        return self._begin(self._answer(path, content, read=read, answer_s=answer_s, audio_s=audio_s))

    def why_silent(self, path: str, *, patience_s: float) -> str | None:
        """Why a GET, which is not tried again, gets no answer in this time, or is refused; None where it is answered.

        Raises:
            NoAnswerError: the client is closed.
        """
        try:
            return self._begin(self._look(path, patience_s)).result()
        except CancelledError:
            raise NoAnswerError(f"{self.url}: closed while it was asked") from None

    async def _look(self, path: str, patience_s: float) -> str | None:
        try:
            async with asyncio.timeout(patience_s), self._client.stream("GET", path) as answer:
                return None if answer.status_code in LIVING else f"HTTP {answer.status_code}"
        except TimeoutError:
            return f"no answer in {patience_s:g} s"
        except httpx2.RequestError as error:
            return f"{type(error).__name__}: {quoted(str(error))}"

    def _begin(self, answer: Coroutine[Any, Any, R]) -> Future[R]:
        with self._lock:
            if self._closed:
                answer.close()
                raise NoAnswerError(f"{self.url}: closed before it was asked")
            self._begun.add(answer)
            future = asyncio.run_coroutine_threadsafe(answer, self._loop)
        future.add_done_callback(lambda _: self._begun.discard(answer))
        return future

    async def _answer(
        self,
        path: str,
        content: dict[str, Any],
        *,
        tries: int = TRIES,
        sleep: Callable[[float], object] | None = None,
        read: Callable[[Any], Any] | None = None,
        answer_s: float = math.inf,
        audio_s: float = 0.0,
    ) -> Any:
        asked, failed, why = 0, 0, ""
        in_time = math.isfinite(answer_s)
        async with self._places:
            end = self._loop.time() + answer_s
            while True:
                self._charge(audio_s)
                backoff_s = min(FIRST_WAIT_S * 2.0 ** min(asked, 20), LONGEST_WAIT_S) * random.uniform(0.5, 1)
                asked += 1
                try:
                    async with asyncio.timeout_at(end if in_time else None):
                        return await self._once(path, content, read)
                except TimeoutError:
                    raise NoAnswerError(f"no answer in {answer_s:g} s, asked {asked} times{why}") from None
                except _AgainError as error:
                    again, why = error, f", {error}"
                self._left_s += audio_s if again.gone else 0.0
                failed += not (in_time and again.busy)
                wait_s = _wait_s(again, backoff_s, left_s=end - self._loop.time())
                if failed >= tries or wait_s is None:
                    tried = f"asked {asked} times{why}"
                    if again.gone:
                        raise UsageError(f"{self.url}: nobody answers ({tried}); start it and run again")
                    raise NoAnswerError(tried)
                await (_pause(wait_s) if sleep is None else _called(sleep, wait_s))

    def _charge(self, audio_s: float) -> None:
        """Take seconds from the budget; once they do not fit, nothing does."""
        if audio_s > self._left_s:
            self._left_s = -math.inf
            raise NoAnswerError(
                f"the budget of {self._budget_s:g} s of audio, all tries counted, is spent; give more and run again"
            )
        self._left_s -= audio_s

    async def _once(self, path: str, content: dict[str, Any], read: Callable[[Any], Any] | None) -> Any:
        try:
            answer = await self._post(path, content)
        except httpx2.RequestError as error:
            gone = isinstance(error, httpx2.ConnectError)
            raise _AgainError(f"{type(error).__name__}: {quoted(str(error))}", gone=gone) from None
        if answer.status in AGAIN:
            told_s = _retry_after_s(answer.headers)
            told = "" if told_s is None else f"; told to wait {told_s:.0f} s"
            why = f"HTTP {answer.status}{_reason(answer)}{told}"
            raise _AgainError(why, told_s=told_s, busy=answer.status in BUSY)
        self._check(answer)
        try:
            record = _parsed(answer)
            return record if read is None else read(record)
        except NoAnswerError as error:
            if read is None:
                raise
            raise _AgainError(str(error)) from None

    async def _post(self, path: str, content: dict[str, Any]) -> _Answer:
        async with self._client.stream("POST", path, **content) as answer:
            body = bytearray()
            async for block in answer.aiter_bytes():
                body += block
                if len(body) > MAX_ANSWER_BYTES:
                    raise NoAnswerError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
            return _Answer(answer.status_code, answer.headers, bytes(body))

    def _check(self, answer: _Answer) -> None:
        status = answer.status
        if status in NEVER or 300 <= status < 400:
            raise UsageError(f"{self.url}: HTTP {status}{_reason(answer)}; check URL, model and {self._key}")
        if status != 200:
            raise RefusedError(f"HTTP {status}{_reason(answer)}", _at_fault(answer))


_pause = asyncio.sleep


async def _called(sleep: Callable[[float], object], wait_s: float) -> None:
    sleep(wait_s)


def _wait_s(again: _AgainError, backoff_s: float, *, left_s: float) -> float | None:
    """Seconds until the next try; None where there is no time for them."""
    if math.isinf(left_s):
        wait_s = backoff_s if again.told_s is None else again.told_s
        return wait_s if wait_s <= LONGEST_WAIT_S else None
    wait_s = max(backoff_s, again.told_s or 0.0)
    return wait_s if wait_s < left_s else None


def _parsed(answer: _Answer) -> Any:
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError):
        raise NoAnswerError(f"the answer is not JSON: {quoted(_text(answer))}") from None


def _text(answer: _Answer) -> str:
    return answer.content.decode(errors="replace")


def _reason(answer: _Answer) -> str:
    """What the endpoint says of an error, in OpenAI's shape or whatever else."""
    try:
        record = json.loads(answer.content)
    except (ValueError, RecursionError):
        return f" {quoted(_text(answer))}" if answer.content else ""
    match record:
        case {"error": {"message": str(message)}}:
            return f" {quoted(message)}"
    return f" {quoted(record)}"


def _at_fault(answer: _Answer) -> str | None:
    """The parameter that OpenAI's shape of an error names."""
    try:
        record = json.loads(answer.content)
    except (ValueError, RecursionError):
        return None
    match record:
        case {"error": {"param": str(param)}}:
            return param
    return None


def _retry_after_s(headers: httpx2.Headers) -> float | None:
    """Seconds, or until a date; None where nothing, or nothing that can be read, is said."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
