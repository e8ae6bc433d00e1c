"""What all routes share, and the way of a request through it: place, key, limits, upload, recognition, bill.

    arrive -> 503 when full -> 401, 403 -> 429 -> body -> model -> segments -> answer -> usage is recorded

A WebSocket goes the same way, with places of its own.
Unusual: usage is recorded after the answer was sent, so that a kill never charges for what nobody got.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import Gauge
from starlette.requests import HTTPConnection, Request
from starlette.types import Receive

from arkasr.engines import DecodeOptions
from arkasr.errors import ArkASRError, UsageError
from arkasr.server import uploads
from arkasr.server.accounts import Accounts, Admission
from arkasr.server.keys import KEYS, Key, Keyring
from arkasr.server.models import Loaded, Models
from arkasr.server.openai import RETRY_AFTER, Bill, Refusal
from arkasr.server.recognition import Recognition, Task
from arkasr.server.settings import Settings
from arkasr.server.telemetry import Metrics, log
from arkasr.server.uploads import Upload

HEARTBEAT_S = 4.0
TICK_S = 1.0
SUBPROTOCOL, KEY_SUBPROTOCOL = "realtime", "openai-insecure-api-key."  # browsers set no headers of a WebSocket
REFUSAL_S = 1.0  # that a client waits to hear that the server is full, lest those who ask again at once fill the time


@dataclass
class Visit:
    """A request that has a place.

    Attributes:
        id: ours, unique forever.
        key: None where no key is needed.
        headers: that its response shall have, such as those of limits.
        num_samples: of audio at 16 kHz, once it was heard.
        text: what was said, if the log shall have it.
    """

    id: str
    route: str
    key: Key | None
    admission: Admission | None
    deadline: float
    headers: dict[str, str] = field(default_factory=dict)
    num_samples: int = 0
    text: str | None = None

    def bill(self, num_samples: int) -> Bill:
        """For so much audio at 16 kHz."""
        price = self.key.limits.price if self.key else None
        return Bill(num_samples, price.of(num_samples) if price else None)


class _Places:
    """So many connections at once."""

    def __init__(self, most: int, gauge: Gauge) -> None:
        self._most, self._gauge, self._taken = most, gauge, 0

    @property
    def are_full(self) -> bool:
        return self._taken >= self._most

    def __enter__(self) -> None:
        self._taken += 1
        self._gauge.set(self._taken)

    def __exit__(self, *_: object) -> None:
        self._taken -= 1
        self._gauge.set(self._taken)


class Service:
    """A server without its routes."""

    def __init__(self, settings: Settings) -> None:
        """Find models and keys; no weights are loaded yet.

        Raises:
            UsageError: a damaged file of keys, or a setting that names nothing.
            ModelNotFoundError: no such model.
            CheckpointMismatchError: a damaged one.
        """
        self.settings = settings
        self.url_policy = settings.url_policy  # which refuses what is no host and no network
        self.keyring = Keyring(settings.state / KEYS)
        self.needs_key = not self.keyring.is_empty
        self.accounts = Accounts(settings.state)
        self.metrics = Metrics()
        self.models = Models(settings, self.metrics.observer)
        self.stopping = False
        self.ending = asyncio.Event()  # that it is, for those who wait for it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_work: set[Recognition] = set()
        self._reading: set[asyncio.Timeout] = set()
        self._places = _Places(settings.max_requests, self.metrics.in_work)
        self._live_places = _Places(settings.max_realtime, self.metrics.live)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Threads, heartbeat and the first model, while the server runs."""
        self._loop = loop = asyncio.get_running_loop()
        most = 2 * self.settings.max_requests + self.settings.max_realtime + 8
        pool = ThreadPoolExecutor(most, thread_name_prefix="arkasr-request")
        loop.set_default_executor(pool)
        if self.needs_key:
            self.accounts.heartbeat()  # also that a folder which cannot be written fails here
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=[ended], name="arkasr-heartbeat", daemon=True)
        heart.start()
        tasks = [asyncio.create_task(self._load_first()), asyncio.create_task(self._tick())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            ended.set()
            heart.join()
            await asyncio.to_thread(self.models.close)
            self.accounts.close()

    async def _load_first(self) -> None:
        try:
            async with self.models.use(self.models.default):
                pass
        except ArkASRError as error:
            log.error("%s", error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self.models.unload_idle()

    def _beat(self, ended: threading.Event) -> None:
        """Renew leases, in a thread of its own: late, other processes would take ours for dead."""
        while self.needs_key and not ended.wait(HEARTBEAT_S):
            try:
                self.accounts.heartbeat()
            except UsageError as error:
                log.error("%s", error)

    async def ready(self) -> tuple[bool, dict[str, str]]:
        """Whether requests are taken and the first model is in memory, or its back end answers; and models' states."""
        states = await self.models.state()
        return not self.stopping and (
            states[self.models.default] == "ready" or self.settings.unload_after_s > 0
        ), states

    def stop_soon(self) -> None:
        """Take no more requests; those that run have `shutdown_s` left. May be called by a signal's handler."""
        self.stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.ending.set)
            self._loop.call_soon_threadsafe(self._loop.call_later, self.settings.shutdown_s, self._stop_recognitions)

    def _stop_recognitions(self) -> None:
        for recognition in self._in_work:
            recognition.cancel(stopped())
        for reading in self._reading:
            reading.reschedule(0)

    def authenticate(self, connection: HTTPConnection) -> Key | None:
        """The key of a request; None where none is needed.

        Raises:
            Refusal: no key, or a wrong one.
        """
        if not self.needs_key:
            return None
        scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            offered = [name for name in connection.scope.get("subprotocols", []) if name.startswith(KEY_SUBPROTOCOL)]
            secret = offered[0].removeprefix(KEY_SUBPROTOCOL) if offered else ""
        if not secret.strip():
            raise Refusal(
                401, "no API key; send it as `Authorization: Bearer KEY`", code="missing_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        key = self.keyring.find(secret.strip())
        if key is None:
            raise Refusal(
                401, "this API key is not valid; ask who runs the server for another", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return key

    @asynccontextmanager
    async def visit(self, connection: HTTPConnection, route: str, *, live: bool = False) -> AsyncIterator[Visit]:
        """A place for a request, or for a live connection, as long as it lasts.

        Raises:
            Refusal: the server is full or stopping, or the key is wrong.
            LimitError: a limit of the key is reached.
        """
        if self.stopping:
            raise Refusal(503, "the server is being stopped", code="shutting_down", headers=RETRY_AFTER)
        places = self._live_places if live else self._places
        if places.are_full:
            await asyncio.sleep(REFUSAL_S)
        if places.are_full:
            raise Refusal(503, "the server is full; try again", code="server_overloaded", headers=RETRY_AFTER)
        with places:
            key = self.authenticate(connection)
            longest_s = self.settings.realtime_s if live else self.settings.request_timeout_s
            visit = Visit(connection.scope["state"]["id"], route, key, None, time.monotonic() + longest_s)
            connection.scope["state"]["visit"] = visit
            if key is None:
                yield visit
                return
            visit.admission = await asyncio.to_thread(self.accounts.admit, key, visit.id)
            try:
                visit.headers.update(visit.admission.headers)
                yield visit
            finally:
                await asyncio.to_thread(visit.admission.__exit__, None, None, None)

    async def upload(self, visit: Visit, request: Request, *, field: str = "file") -> Upload:
        """What a visit brings, unless its deadline or the end of the server comes first; see `uploads.read`."""
        left_s = visit.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)) as reading:
                self._reading.add(reading)
                return await uploads.read(request, self.settings, self.url_policy, field=field)
        except TimeoutError:
            raise stopped() if self.stopping and time.monotonic() < visit.deadline else _late() from None
        finally:
            self._reading.discard(reading)

    def allowed_model(self, visit: Visit, name: str) -> str:
        """The own name of a model that a visit asks for.

        Raises:
            Refusal: there is no such model, or not for this key.
        """
        own = self.models.resolve(name)
        models = visit.key.limits.models if visit.key else None
        if models is not None and not {own, name} & set(models):
            raise Refusal(403, f"this API key may not use {name!r}", code="model_not_allowed", param="model")
        return own

    @asynccontextmanager
    async def recognition(
        self,
        visit: Visit,
        upload: Upload,
        receive: Receive,
        *,
        model: str,
        options: DecodeOptions,
        begin_s: float = 0.0,
        end_s: float = float("inf"),
    ) -> AsyncIterator[tuple[Recognition, Loaded]]:
        """A recognition that ends when the client goes, the deadline comes, or the block is left."""
        task = Task(upload.source, options, self.settings.limits, begin_s, end_s, self.reserver(visit))
        async with self.models.use(model) as loaded:
            recognition = Recognition(task, loaded)
            self._in_work.add(recognition)
            timer = asyncio.get_running_loop().call_later(
                max(0.0, visit.deadline - time.monotonic()), recognition.cancel, _late()
            )
            watcher = asyncio.create_task(_cancel_when_gone(recognition, receive))
            try:
                yield recognition, loaded
            finally:
                timer.cancel()
                watcher.cancel()
                recognition.cancel(gone())
                # The audio's file must not be closed, and its number given to another, while the thread reads it.
                await asyncio.shield(recognition.ended())
                self._in_work.discard(recognition)

    def reserver(self, visit: Visit) -> Callable[[int], None]:
        """What holds so many samples at 16 kHz, all of a visit together, against its key's day; see `Admission`."""
        if visit.admission is None or visit.key is None or visit.key.limits.audio_seconds_per_day is None:
            return lambda _num_samples: None
        return visit.admission.reserve

    async def charge(self, visit: Visit, model: str, heard: Recognition, *, num_samples: int | None = None) -> None:
        """Record what a visit used, after it was sent: all that was heard, or so many samples at 16 kHz."""
        num_samples = heard.num_samples if num_samples is None else num_samples
        await self.record(visit, model, num_samples, heard.transcript.text)

    async def record(self, visit: Visit, model: str, num_samples: int, text: str) -> None:
        """Record that a visit used so many samples at 16 kHz, and what was said."""
        self.metrics.heard(model, num_samples)
        visit.num_samples = num_samples
        if self.settings.log_text:
            visit.text = text
        if visit.admission is not None:
            finish = visit.admission.finish
            await asyncio.to_thread(finish, num_samples, model=model, route=visit.route)


# Made anew each time: an error that is raised keeps, in its traceback, all that it came through.
def stopped() -> Refusal:
    """That the server ends."""
    return Refusal(503, "the server is being stopped; ask again", code="shutting_down")


def _late() -> Refusal:
    return Refusal(504, "the request took too long; cut the audio", code="request_timeout")


def gone() -> Refusal:
    """That nobody waits any more."""
    return Refusal(499, "the client has gone", code="client_gone")


async def _cancel_when_gone(recognition: Recognition, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    recognition.cancel(gone())
