"""Starting the server: what may be listened on, worker processes, signals, and clients that never finish a sentence."""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from arkasr.errors import UsageError
from arkasr.server.app import create
from arkasr.server.events import MAX_FRAME_BYTES
from arkasr.server.keys import KEYS, Keyring
from arkasr.server.service import Service
from arkasr.server.settings import Settings
from arkasr.server.telemetry import MULTIPROCESS_DIR

UNREAD_S = 10.0  # in which a client takes the last that a WebSocket says
HEADER_S = 10.0  # in which a connection must bring a whole head of a request
# With a worker that does not answer, as while it loads a large model; the parent does nothing else meanwhile, and waits
# for one that is killed as it asks, too.
PATIENCE_S = 30
# Each of malloc's arenas keeps the most that its threads ever held, and by itself it takes eight for each core: memory
# would grow for a quarter of an hour before it stays.
M_ARENA_MAX, ARENAS = -8, 2  # the first is glibc's name and number
_SETTINGS = "ARKASR_SERVER_SETTINGS_JSON"  # for worker processes


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request begins; uvicorn itself waits forever for a head's end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(None)

    def _watch(self, before: object) -> None:
        """Close if the cycle of before is still the last one, and over."""
        cycle = self.cycle
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        if (cycle is None or cycle.response_complete) and before == (cycle,):
            self.transport.close()
            return
        self.loop.call_later(HEADER_S, self._watch, (cycle,))

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over; a head that is only HTTP's and no WebSocket's would be left without an answer."""
        super().handle_websocket_upgrade(event)
        socket = self.transport.get_protocol()
        assert isinstance(socket, _Socket)
        if not socket.handshake_initiated:
            self.send_400_response("Invalid WebSocket request.")


class _Socket(WebSocketsSansIOProtocol):
    """A WebSocket that ends as the application says, and whose client may wait while nothing is read from it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.logger = self.conn.logger = _socket_log

    def shutdown(self) -> None:
        """Leave open sockets to the application, which was told; uvicorn itself would cut them off here."""
        if not self.handshake_initiated:
            super().shutdown()

    def keepalive_timeout(self) -> None:
        """Nobody is gone whose answer to a ping waits behind audio that is not read yet."""
        self.pong_timer = None
        if self.read_paused:
            self.pending_ping_payload = None
            self.schedule_ping()
        else:
            super().keepalive_timeout()

    def send_receive_event_to_app(self) -> None:
        """Bring text that is no UTF-8 as bytes, for uvicorn itself closes on it."""
        if self.curr_msg_data_type == "text":
            self.frames = [b"".join(self.frames)]
            try:
                self.frames[0].decode()
            except UnicodeDecodeError:
                self.curr_msg_data_type = "bytes"
        super().send_receive_event_to_app()

    async def run_asgi(self) -> None:
        """Serve it; whoever reads nothing then is left."""
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(UNREAD_S, self.transport.abort)


_socket_log = logging.getLogger("uvicorn.error.socket")
_socket_log.setLevel(logging.WARNING)  # below, it has addresses


def serve(settings: Settings) -> None:
    """Run the server until it is told to stop.

    Raises:
        UsageError: strangers could use it without a key; or settings that name nothing.
        ModelNotFoundError: no such model.
    """
    if not settings.is_local and not settings.insecure and Keyring(settings.state / KEYS).is_empty:
        raise UsageError(
            f"host {settings.host} can be reached from other machines and there are no API keys; "
            "run `ark-asr keys create NAME` first, or give --insecure"
        )
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(message)s")
    options: dict[str, Any] = {
        "factory": True,
        "host": settings.host,
        "port": settings.port,
        "http": _Protocol,
        "ws": _Socket,
        "ws_max_size": MAX_FRAME_BYTES,
        "ws_per_message_deflate": False,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_worker_healthcheck": PATIENCE_S,
        "timeout_graceful_shutdown": round(settings.shutdown_s) + 5,
        "h11_max_incomplete_event_size": 64 * 1024,
    }
    if settings.workers == 1:
        uvicorn.Server(uvicorn.Config(lambda: _app(settings), **options)).run()
        return
    Service(settings)  # what is wrong is said here, and not by each worker again and again
    counts = settings.state / f"metrics-{settings.port}"
    shutil.rmtree(counts, ignore_errors=True)  # of one that was killed
    counts.mkdir(parents=True)
    os.environ[MULTIPROCESS_DIR] = str(counts)
    os.environ[_SETTINGS] = settings.model_dump_json()
    try:
        uvicorn.run("arkasr.server.serve:from_environment", workers=settings.workers, **options)
    finally:
        shutil.rmtree(counts, ignore_errors=True)


def from_environment() -> FastAPI:
    """The application of a worker process."""
    settings = Settings.model_validate_json(os.environ[_SETTINGS])
    threading.Thread(target=_end_with_parent, name="arkasr-orphan", daemon=True).start()
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(message)s")
    return _app(settings)


def _end_with_parent() -> None:
    """Die with a parent that was killed: an orphan would keep the port, and nobody could start again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _app(settings: Settings) -> FastAPI:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
    app = create(settings)
    service = app.state.service
    assert isinstance(service, Service)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stopping(service, signal.getsignal(number)))
    return app


def _stopping(service: Service, before: object) -> Callable[[int, FrameType | None], None]:
    """A handler that tells the service before it does what was done before."""

    def handle(number: int, frame: FrameType | None) -> None:
        service.stop_soon()
        if callable(before):
            before(number, frame)

    return handle
