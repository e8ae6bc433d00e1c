"""The web application: routes, errors in OpenAI's shape, headers that keep browsers safe, metrics and the log.

Unusual: without API keys the server trusts the programs of its machine, so it must not trust pages in a browser there:
requests that another site makes, or that come under another host's name, are refused.
"""

import asyncio
import html
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from arkasr import __version__
from arkasr.errors import ArkASRError
from arkasr.server import realtime, routes
from arkasr.server.described import SHARED, Ready, answers
from arkasr.server.openai import Refusal, refusal_of
from arkasr.server.service import Service, Visit
from arkasr.server.settings import Settings
from arkasr.server.telemetry import CONTENT_TYPE, Metrics, log_request

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_DOCS_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>arkasr API</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/page.css"></head>
<body><main class="docs"><h1>arkasr API</h1>
<p>For programs: <a href="/openapi.json">/openapi.json</a>. To try it: <a href="/">the page</a>.</p>"""
_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "Not yet, or no more"}}
UNREAD_S = 5.0  # behind its deadline, in which a client must take what is sent
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def create(settings: Settings) -> FastAPI:
    """The application; see `Service` for what it raises."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="arkasr", version=__version__, summary="Speech to text with ARK-ASR, after OpenAI's API",
        lifespan=lifespan, docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    app.include_router(routes.router)
    _add_pages(app, service)
    _add_sockets(app, service)
    _add_errors(app, service.metrics)
    app.add_middleware(_Front, service=service)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    """What is no recognition: the page, health, metrics, docs."""

    def add(path: str, file: Path) -> None:
        async def send_file() -> Response:
            return FileResponse(file, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"})

        app.add_api_route(path, send_file, include_in_schema=False)

    for file in PAGE.iterdir():
        add("/" if file.name == "index.html" else f"/{file.name}", file)

    @app.get("/health", summary="Whether the process lives", responses=answers(403, 500))
    async def health() -> dict[str, Any]:
        """Always ok; and the default model, as cf-stt services answer."""
        return {"status": "ok", "model": service.models.default, "vram_mb": 0}

    @app.get(
        "/ready", summary="Whether requests are answered at once", responses=answers(403, 500, kind=Ready) | _NOT_READY
    )
    async def ready() -> Response:
        """503 while the first model is being loaded, its back end does not answer, or the server is being stopped."""
        is_ready, models = await service.ready()
        return JSONResponse({"ready": is_ready, "models": models}, 200 if is_ready else 503)

    @app.get("/metrics", summary="Prometheus metrics", responses=answers(*SHARED, text=("text/plain",)))
    async def metrics(request: Request) -> Response:
        """Requests, audio, tokens, queue and latencies; needs a key where there are keys."""
        service.authenticate(request)
        service.metrics.waiting.set(service.models.num_waiting())
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_docs(app.openapi()), headers={"content-security-policy": PAGE_POLICY})


def _add_sockets(app: FastAPI, service: Service) -> None:
    """The WebSocket, and what is said where it is missed."""
    app.add_api_websocket_route("/v1/realtime", realtime.realtime)

    @app.get("/v1/realtime", include_in_schema=False)
    async def no_socket() -> Response:
        message = "this is a WebSocket; a proxy must pass on the headers Upgrade and Connection"
        headers = {"upgrade": "websocket", "connection": "upgrade"}
        raise Refusal(426, message, code="upgrade_required", headers=headers)

    async def nowhere(websocket: WebSocket) -> None:
        refusal = Refusal(404, f"{websocket.url.path[:200]}: no WebSocket; there is /v1/realtime", code="not_found")
        await realtime.refuse(websocket, service, refusal, {})

    app.add_api_websocket_route("/{path:path}", nowhere)


def _docs(schema: Mapping[str, Any]) -> str:
    """The API's schema as a page that needs nothing from anywhere else."""
    parts = [_DOCS_HEAD]
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(route['summary'])}. {html.escape(route.get('description', ''))}</p>")
            content = route.get("requestBody", {}).get("content", {})
            fields = {n: f for one in content.values() for n, f in one["schema"]["properties"].items()}
            rows = [
                f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(field.get('description', ''))}</td>"
                f"<td>{html.escape(str(field.get('default', '')))}</td></tr>"
                for name, field in fields.items()
            ]
            if rows:
                head = "<tr><th>field</th><th>meaning</th><th>default</th></tr>"
                parts.append(f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
    return "\n".join(parts) + "</main></body></html>"


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(refusal: Refusal, request: Request) -> Response:
        visit = request.scope["state"].get("visit")
        standing = visit.headers if isinstance(visit, Visit) else {}
        metrics.rejected.labels(refusal.code).inc()
        return JSONResponse(refusal.body, refusal.status, headers={**standing, **refusal.headers})

    @app.exception_handler(ArkASRError)
    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, ArkASRError)
        return answer(refusal_of(error), request)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _error: Exception) -> Response:
        return answer(Refusal(499, "the client has gone", code="client_gone"), request)

    @app.exception_handler(RequestValidationError)
    async def bad(request: Request, _error: Exception) -> Response:
        return answer(Refusal(400, "the request is not as /openapi.json says", code="invalid_request"), request)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        if error.status_code == 405:
            return answer(Refusal(405, message, code="method_not_allowed", headers=error.headers), request)
        return answer(Refusal(error.status_code, message, code="not_found", headers=error.headers), request)

    @app.exception_handler(Exception)
    async def ours_to_mend(request: Request, _error: Exception) -> Response:
        refusal = Refusal(500, "an error of the server's own; its log has more", code="internal_error")
        response = answer(refusal, request)
        response.headers.update({**SAFE, "x-request-id": request.scope["state"]["id"]})  # it is made outside _Front
        return response


def _parts(url: str) -> SplitResult:
    """The parts of a URL that a client sent; all empty if it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _ambiguous(headers: Headers) -> Refusal | None:
    """Why a body of which proxies and we might see different ends is not read; h11 takes it by the coding."""
    if not {"content-length", "transfer-encoding"} <= set(headers.keys()):
        return None
    message = "send Content-Length or Transfer-Encoding, not both"
    return Refusal(400, message, code="invalid_body", headers={"connection": "close"})


class _Front:
    """Around all routes: an id, safe headers, metrics and a log line for each request; strange pages are kept out."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        settings = service.settings
        self._hosts = {*LOCAL_HOSTS, settings.host, *settings.allowed_host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        started, status, unread = time.perf_counter(), 499, False
        state: dict[str, Any] = scope.setdefault("state", {})
        scope["state"] = state = {**state, "id": "req_" + secrets.token_hex(12)}
        is_socket = scope["type"] == "websocket"

        async def send_safely(message: Message) -> None:
            nonlocal status, unread
            kind = message["type"].removeprefix("websocket.")
            if kind in {"http.response.start", "accept"}:
                status = message.get("status", 101)
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = state["id"]
            if is_socket:  # which has patience of its own
                await send(message)
                return
            visit = state.get("visit")
            left_s = visit.deadline - time.monotonic() if isinstance(visit, Visit) else 0.0
            try:
                async with asyncio.timeout(max(0.0, left_s) + UNREAD_S):
                    if not unread:
                        await send(message)
            except TimeoutError:  # nobody reads it; as for a client that has gone, the rest is dropped
                unread = True

        try:
            refusal = _ambiguous(Headers(scope=scope)) or self._stranger(Headers(scope=scope))
            if refusal is None:
                await self._app(scope, receive, send_safely)
            else:
                self._service.metrics.rejected.labels(refusal.code).inc()
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send_safely)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _stranger(self, headers: Headers) -> Refusal | None:
        """Why a browser's request for another site is not answered; without keys only."""
        settings = self._service.settings
        if self._service.needs_key or settings.insecure:
            return None
        host = headers.get("host", "")
        if _parts(f"//{host}").hostname not in self._hosts:
            return Refusal(403, f"host {host[:200]!r} is not this server; see --allowed-host", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and _parts(origin).netloc.lower() != host.lower():
            if not {origin, "*"} & set(settings.cors_origin):
                return Refusal(403, f"origin {origin[:200]!r} may not ask; see --cors-origin", code="wrong_origin")
        elif headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return Refusal(403, "another site may not ask; see --cors-origin", code="wrong_origin")
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        visit = scope["state"].get("visit")
        route = visit.route if isinstance(visit, Visit) else "other"
        metrics = self._service.metrics
        metrics.requests.labels(route, str(status)).inc()
        if not isinstance(visit, Visit):
            return
        metrics.request_s.labels(route).observe(seconds)
        log_request(
            request=visit.id,
            route=route,
            status=status,
            seconds=round(seconds, 4),
            audio_seconds=visit.bill(visit.num_samples).seconds,
            key=visit.key.name if visit.key else None,
            text=visit.text,
        )
