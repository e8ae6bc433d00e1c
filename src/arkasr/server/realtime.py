"""The WebSocket /v1/realtime: OpenAI's transcription session, one socket at a time.

    frames -> actions, in order -> a thread that hears them -> events, in order -> frames

Unusual: nothing grows with what a client does. Audio that is not heard yet, events that are not read and actions that
are not done are few, and while they are many, nothing more is read from the socket.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from arkasr.errors import ArkASRError, quoted
from arkasr.results import added
from arkasr.server import events
from arkasr.server.accounts import LimitError
from arkasr.server.events import Append, Bad, ClientEvent, Commit, Session, Update
from arkasr.server.hearing import BYTES_PER_S, Hearing
from arkasr.server.openai import Refusal, refusal_of
from arkasr.server.service import SUBPROTOCOL, Service, Visit, gone, stopped

ROUTE = "realtime"
UNHEARD_BYTES = 30 * BYTES_PER_S
MOST_ACTIONS = 1000
MOST_UNSENT = 100  # events; no more is read from a client that does not read these, ...
MOST_UNSENT_BYTES = 1 << 20  # ... and it is left when what it said before makes so many
UNREAD_S = 20.0  # in which a client must take what is sent
NORMAL, GOING_AWAY, POLICY, INTERNAL = 1000, 1001, 1008, 1011


@dataclass(frozen=True)
class _End:
    """Why a socket is closed; what its client is told before, if it is there."""

    code: int
    error: ArkASRError | None = None


class Socket:
    """An accepted WebSocket."""

    def __init__(self, websocket: WebSocket, service: Service, visit: Visit, session: Session) -> None:
        """`run` does the rest."""
        self._websocket, self._service, self._visit, self._session = websocket, service, visit, session
        self._loop = asyncio.get_running_loop()
        self._hearing: Hearing | None = None
        self._thread: asyncio.Future[object] | None = None
        self._actions: deque[ClientEvent | Bad | _End] = deque()
        self._unheard = 0  # bytes of audio
        self._unsent: deque[tuple[str, int, str]] = deque()  # events, samples paid for, transcripts
        self._unsent_bytes = 0
        self._changed = asyncio.Event()  # one of all these
        self._is_ending = False  # nothing that comes is done any more
        self._cut: _End | None = None  # nothing at all is
        self._answered, self._said = 0, ""

    async def run(self) -> None:
        """Until the client goes, or is told why not on."""
        tasks = [asyncio.create_task(one) for one in (self._send(), self._read(), self._watch())]
        for task in tasks:
            task.add_done_callback(self._check)
        end = _End(INTERNAL, _ours())
        try:
            self._tell_session("created")
            end = await self._work()
        finally:
            if self._hearing is not None:
                self._hearing.cancel(gone())
            if self._thread is not None:
                await asyncio.wait([self._thread])
            await self._close(end, sending=tasks[0])
            for task in tasks:
                task.cancel()
            failed = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Exception)]
            if self._answered:
                assert self._hearing is not None
                await self._service.record(self._visit, self._hearing.model, self._answered, self._said)
        for error in failed:
            raise error

    def _check(self, task: asyncio.Task[None]) -> None:
        """End where a part has failed; `run` raises why."""
        if not task.cancelled() and task.exception() is not None:
            self._break(_End(INTERNAL, _ours()))

    async def _until(self, is_so: Callable[[], object]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    def _stop(self, end: _End) -> None:
        """End when all that came is done."""
        if not self._is_ending:
            self._is_ending = True
            self._actions.append(end)
            self._changed.set()

    def _break(self, end: _End) -> None:
        """End now."""
        self._cut, self._is_ending = self._cut or end, True
        if self._hearing is not None:
            self._hearing.cancel(gone())
        self._changed.set()

    async def _watch(self) -> None:
        """End when it has lasted long enough, or the server is being stopped."""
        ending, settings = self._service.ending, self._service.settings
        with suppress(TimeoutError):
            async with asyncio.timeout(self._visit.deadline - time.monotonic()):
                await ending.wait()
        over = Refusal(400, f"a session lasts {settings.realtime_s:g} s; open another", code="session_expired")
        self._stop(_End(GOING_AWAY, stopped() if ending.is_set() else over))
        await ending.wait()
        await asyncio.sleep(settings.shutdown_s)
        self._break(_End(GOING_AWAY, stopped()))

    # ---- from the client ----

    async def _read(self) -> None:
        idle_s = self._service.settings.realtime_idle_s
        while True:
            await self._until(lambda: self._is_ending or self._has_room())
            try:
                async with asyncio.timeout(None if self._is_ending else idle_s):
                    message = await self._websocket.receive()
            except TimeoutError:
                why = Refusal(408, f"no event for {idle_s:g} s", code="idle_timeout")
                self._stop(_End(GOING_AWAY, why))
                continue
            if message["type"] == "websocket.disconnect":
                self._break(_End(NORMAL))
                return
            if not self._is_ending:
                frame = message.get("text")
                action = events.read(message["bytes"] if frame is None else frame)
                self._unheard += len(action.audio) if isinstance(action, Append) else 0
                self._actions.append(action)
                self._changed.set()

    def _has_room(self) -> bool:
        return self._unheard < UNHEARD_BYTES and len(self._actions) < MOST_ACTIONS and len(self._unsent) < MOST_UNSENT

    # ---- what is done ----

    async def _work(self) -> _End:
        """Do what the client asks for, until an end."""
        async with AsyncExitStack() as held:
            try:
                while True:
                    await self._until(lambda: self._cut or self._actions)
                    if self._cut is not None:
                        return self._cut
                    action = self._actions.popleft()
                    if isinstance(action, _End):
                        await self._finish()
                        return action
                    await self._do(action, held)
            except LimitError as error:
                await self._finish()
                return _End(POLICY, error)
            except ArkASRError as error:
                return self._cut or _End(INTERNAL, error)

    async def _finish(self) -> None:
        if self._hearing is not None:
            await self._in_thread(self._hearing.finish)

    async def _in_thread(self, work: Callable[[], object]) -> None:
        self._thread = self._loop.run_in_executor(None, work)
        await asyncio.shield(self._thread)

    async def _do(self, action: ClientEvent | Bad, held: AsyncExitStack) -> None:
        try:
            if isinstance(action, Bad):
                raise action.refusal
            if isinstance(action, Update):
                await self._update(action.session)
                return
            hearing = self._hearing or await self._begin(held)
            if isinstance(action, Append):
                await self._hear(hearing, action.audio)
            else:
                await self._in_thread(hearing.commit if isinstance(action, Commit) else hearing.clear)
        except Refusal as refusal:
            if self._cut is None:
                self._fail(refusal, action.event_id)

    async def _hear(self, hearing: Hearing, data: bytes) -> None:
        """With all that came behind it, where it is heard at once, and not kept."""
        pieces = [data]
        while hearing.is_listening and self._actions and isinstance(following := self._actions[0], Append):
            pieces.append(following.audio)
            self._actions.popleft()
        data = b"".join(pieces)
        try:
            await self._in_thread(partial(hearing.take, data))
        finally:
            self._unheard -= len(data)
            self._changed.set()

    async def _begin(self, held: AsyncExitStack) -> Hearing:
        """Load the model, which the session has from now on."""
        loaded = await held.enter_async_context(self._service.models.use(self._model(self._session)))
        self._hearing = Hearing(loaded, self._visit, self._service.reserver(self._visit), self._tell)
        if self._cut is not None:
            self._hearing.cancel(gone())
        await self._listen(self._hearing)
        return self._hearing

    async def _listen(self, hearing: Hearing) -> None:
        settings, models = self._service.settings, self._service.models
        partials = settings.realtime_partials or models.is_here(self._model(self._session))
        await self._in_thread(partial(hearing.listen, self._session.live_options(partials=partials)))
        hearing.logprobs = events.LOGPROBS in (self._session.include or ())

    def _model(self, session: Session) -> str:
        """The own name of a session's model, if it may have that."""
        try:
            return self._service.allowed_model(self._visit, session.model or self._service.models.default)
        except Refusal as error:
            raise Refusal(error.status, error.message, code=error.code, param=events.MODEL) from None

    async def _update(self, given: dict[str, Any]) -> None:
        session = events.updated(self._session, given)
        model = self._model(session)
        if self._hearing is not None and model != self._hearing.model:
            message = f"{events.MODEL}: it is set before the first audio; open another session"
            raise Refusal(400, message, code="model_is_set", param=events.MODEL)
        if session.include and not self._service.models.is_here(model):
            message = "session.include: the model runs at a back end, which does not tell its tokens"
            raise Refusal(400, message, code="unsupported_parameter", param="session.include")
        self._session = session
        if self._hearing is not None:
            await self._listen(self._hearing)
        self._tell_session("updated")

    # ---- to the client ----

    def _tell_session(self, how: str) -> None:
        expires_at = time.time() + self._visit.deadline - time.monotonic()
        record = self._session.record(self._visit.id.replace("req", "sess"), expires_at)
        self._tell({"type": f"session.{how}", "session": record}, 0)

    def _fail(self, refusal: Refusal, event_id: str | None) -> None:
        self._service.metrics.rejected.labels(refusal.code).inc()
        self._tell(events.error_event(refusal, event_id), 0)

    def _tell(self, event: Mapping[str, Any], num_samples: int) -> None:
        """Send an event, behind those before; in any thread."""
        told = events.text_of(event), num_samples, event.get("transcript", "")
        with suppress(RuntimeError):  # the loop is closed: nobody is there
            self._loop.call_soon_threadsafe(self._post, told)

    def _post(self, told: tuple[str, int, str]) -> None:
        self._unsent.append(told)
        self._unsent_bytes += len(told[0])
        if self._unsent_bytes > MOST_UNSENT_BYTES:
            self._break(_End(POLICY))
        self._changed.set()

    async def _send(self) -> None:
        while True:
            await self._until(lambda: self._unsent)
            text, num_samples, transcript = self._unsent[0]
            try:
                async with asyncio.timeout(UNREAD_S):
                    await self._websocket.send_text(text)
            except (TimeoutError, WebSocketDisconnect):
                self._break(_End(POLICY))
                return
            self._unsent.popleft()
            self._unsent_bytes -= len(text)
            self._answered += num_samples
            if self._service.settings.log_text:
                self._said += added(self._said, transcript)
            self._changed.set()

    async def _close(self, end: _End, *, sending: asyncio.Task[None]) -> None:
        """Close, after all was sent, if somebody reads it."""
        refusal = None if end.error is None else refusal_of(end.error)
        if refusal is not None:
            self._fail(refusal, None)
        await asyncio.sleep(0)  # until `_post` has it all
        with suppress(TimeoutError, WebSocketDisconnect):
            async with asyncio.timeout(UNREAD_S):
                await self._until(lambda: sending.done() or not self._unsent)
                if not sending.done():
                    await self._websocket.close(end.code, None if refusal is None else refusal.code)


def _ours() -> Refusal:
    return Refusal(500, "an error of the server's own; its log has more", code="internal_error")


async def realtime(websocket: WebSocket) -> None:
    """A transcription session, or a response that says why there is none."""
    service = websocket.app.state.service
    assert isinstance(service, Service)
    standing: dict[str, str] = {}
    try:
        async with service.visit(websocket, ROUTE, live=True) as visit:
            standing = visit.headers
            session = _asked(websocket, service, visit)
            headers = [(name.encode(), value.encode()) for name, value in standing.items()]
            await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in websocket.scope["subprotocols"] else None, headers)
            await Socket(websocket, service, visit, session).run()
    except ArkASRError as error:
        if websocket.application_state is not WebSocketState.CONNECTING:
            raise
        refusal = refusal_of(error)
        await refuse(websocket, service, refusal, standing)


async def refuse(websocket: WebSocket, service: Service, refusal: Refusal, headers: Mapping[str, str]) -> None:
    """Answer a handshake with an error."""
    service.metrics.rejected.labels(refusal.code).inc()
    response = JSONResponse(refusal.body, refusal.status, headers={**headers, **refusal.headers})
    await websocket.send_denial_response(response)


def _asked(websocket: WebSocket, service: Service, visit: Visit) -> Session:
    """The session that an address asks for.

    Raises:
        Refusal: there is no such.
    """
    query = websocket.query_params
    if unknown := sorted(set(query) - {"intent", "model"}):
        name = unknown[0][:200]
        raise Refusal(400, f"Unrecognized request argument: {quoted(name)}", code="unknown_parameter", param=name)
    if (intent := query.get("intent", "transcription")) != "transcription":
        message = f"intent: this server only transcribes; got {quoted(intent)}"
        raise Refusal(400, message, code="unsupported_parameter", param="intent")
    name = query.get("model") or service.models.default
    service.allowed_model(visit, name)
    return events.new_session(name)
