"""The routes that recognize speech: OpenAI's, the reference's, cf-stt's; each from request to answer in one piece."""

import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from arkasr import audio
from arkasr.engines import MAX_NEW_TOKENS, DecodeOptions
from arkasr.errors import ArkASRError
from arkasr.server import openai
from arkasr.server.described import AUDIO, SHARED, Asr, Model, ModelList, Stt, Verbose, Whole, answers, body
from arkasr.server.models import Loaded
from arkasr.server.openai import Events, Parameters, Refusal, refusal_of
from arkasr.server.recognition import Recognition
from arkasr.server.service import Service, Visit

router = APIRouter()


class Answer(Response):
    """A response that is made while it is sent, so that what it needs is held no longer than that."""

    def __init__(self, answer: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and end it when its place is free, for then the client's next request comes on this connection."""
        await self._answer(receive, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def service_of(request: Request) -> Service:
    """The service of the app."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def _send_whole(send: Send, visit: Visit, text: str, media_type: str) -> None:
    response = Response(text, media_type=media_type, headers=visit.headers)
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})


# ---- OpenAI ----


_TEXTS = ("text/plain", "application/x-subrip", "text/vtt", "text/event-stream")


@router.post(
    "/v1/audio/transcriptions",
    summary="Transcribe a recording",
    responses=answers(404, *AUDIO, kind=Whole | Verbose, text=_TEXTS),
    openapi_extra=body(Parameters),
)
async def transcriptions(request: Request) -> Response:
    """Text, subtitles or JSON of a recording; or server-sent events with the text as it is heard."""
    return Answer(partial(_transcribe, request))


async def _transcribe(request: Request, receive: Receive, send: Send) -> None:
    service = service_of(request)
    async with service.visit(request, "transcriptions") as visit:
        with await service.upload(visit, request) as upload:
            parameters = openai.read_parameters(upload.fields)
            model = service.allowed_model(visit, parameters.model)
            openai.refuse_untold(service.settings.engine, parameters.options, parameters.include)
            if parameters.ignored:
                visit.headers[openai.IGNORED] = ", ".join(parameters.ignored)
            recognition = service.recognition(visit, upload, receive, model=model, options=parameters.options)
            async with recognition as (heard, loaded):
                if parameters.stream:
                    await _send_events(service, visit, send, heard, parameters, loaded)
                else:
                    transcript = await heard.whole()
                    bill = visit.bill(heard.num_samples)
                    await _send_whole(send, visit, *openai.body(transcript, parameters, bill, loaded.rules))
                    await service.charge(visit, model, heard)


async def _send_events(
    service: Service, visit: Visit, send: Send, heard: Recognition, parameters: Parameters, loaded: Loaded
) -> None:
    """Events as segments are known; before the first, an error is a response like any other.

    Who goes in the middle pays for what was sent.
    """
    headers = Headers({**visit.headers, "content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})
    events, sent_s, begun = Events(parameters, loaded.rules), 0.0, False

    async def send_event(event: str) -> None:
        nonlocal begun
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": headers.raw})
            begun = True
        if event:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})

    try:
        async for segment in heard.segments():
            await send_event(": still listening\n\n" if segment is None else events.delta(segment))
            sent_s = segment.end_s if segment else sent_s
    except ArkASRError as error:
        if not begun:
            raise
        await send_event(Events.failed(refusal_of(error)))
        sent = min(heard.num_samples, round(sent_s * audio.SAMPLE_RATE))
        await service.charge(visit, loaded.name, heard, num_samples=sent)
        return
    await send_event(events.done(heard.transcript, visit.bill(heard.num_samples)))
    await service.charge(visit, loaded.name, heard)


@router.post(
    "/v1/audio/translations",
    status_code=404,
    summary="Not offered: the models transcribe only",
    responses=answers(403, 404, 500),
)
async def translations() -> Response:
    """A clean 404."""
    raise Refusal(404, "translations: ARK-ASR transcribes only; use /v1/audio/transcriptions", code="not_supported")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "arkasr"}


@router.get("/v1/models", summary="The models of this server", responses=answers(*SHARED, kind=ModelList))
async def models(request: Request) -> dict[str, Any]:
    """Names to give as `model`."""
    service = service_of(request)
    service.authenticate(request)
    return {"object": "list", "data": [_model(name) for name in service.models.names]}


_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


@router.get(
    "/v1/models/{name:path}",  # noqa: FAST003 - as an argument, it would be said to give 422
    summary="One model",
    responses=answers(404, *SHARED, kind=Model),
    openapi_extra={"parameters": [_NAME]},
)
async def model(request: Request) -> dict[str, Any]:
    """Whether there is such a model."""
    service, name = service_of(request), request.path_params["name"]
    service.authenticate(request)
    service.models.resolve(name)
    return _model(name)


# ---- the reference's service ----


class AsrFields(BaseModel):
    """Fields of /asr; a negative time is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    begin_time: float = Field(-1, ge=-1e9, le=1e9, description="seconds; where to begin")
    end_time: float = Field(-1, ge=-1e9, le=1e9, description="seconds; where to end, if after begin_time")
    max_new_tokens: int = Field(MAX_NEW_TOKENS, ge=1, le=2**31, description="most tokens of a segment")
    temperature: openai.Temperature = Field(0, ge=0, le=2, description="0 is greedy")
    seed: int = Field(0, ge=0, lt=2**63, description="of the sampling")


@router.post(
    "/asr",
    summary="The route of the reference service",
    responses=answers(*AUDIO, kind=Asr),
    openapi_extra=body(AsrFields),
)
async def asr(request: Request) -> Response:
    """Text, latency and prompt tokens, as the service of open-audio-opd answers; for audio of any length."""
    return Answer(partial(_asr, request))


async def _asr(request: Request, receive: Receive, send: Send) -> None:
    started = time.perf_counter()
    service = service_of(request)
    async with service.visit(request, "asr") as visit:
        with await service.upload(visit, request) as upload:
            fields = openai.validated(AsrFields, upload.fields)
            model = service.allowed_model(visit, service.models.default)
            options = DecodeOptions(fields.max_new_tokens, fields.temperature, fields.seed)
            openai.refuse_untold(service.settings.engine, options)
            begin_s = max(0.0, fields.begin_time)
            recognition = service.recognition(
                visit, upload, receive, model=model, options=options,
                begin_s=begin_s, end_s=fields.end_time if 0 <= begin_s < fields.end_time else float("inf"),
            )  # fmt: skip
            async with recognition as (heard, loaded):
                transcript = await heard.whole()
                num_tokens = audio.num_audio_tokens(heard.num_samples)
                record = {
                    "text": transcript.text,
                    "latency_s": time.perf_counter() - started,
                    "prompt_tokens": loaded.rules and len(loaded.rules.prompt_ids(num_tokens)),
                }
                await _send_whole(send, visit, json.dumps(record, ensure_ascii=False), "application/json")
                await service.charge(visit, model, heard)


@router.get("/token-mask", summary="Which tokens may be generated", responses=answers(404, *SHARED, 503))
async def token_mask(request: Request) -> dict[str, Any]:
    """Counts of the default model's vocabulary, and what becomes of ARK's special tokens."""
    service = service_of(request)
    service.authenticate(request)
    async with service.models.use(service.models.default) as loaded:
        if loaded.rules is None:
            message = "token-mask: the model runs at a back end, which does not tell its tokens"
            raise Refusal(404, message, code="not_supported")
        allowed = loaded.rules.allowed_ids
        states = {
            token: {"id": token_id, "blocked": not allowed[token_id], "allowed": bool(allowed[token_id])}
            for token, token_id in loaded.rules.special_ids.items()
        }
        return {
            "allowed_count": int(allowed.sum()),
            "blocked_count": int((~allowed).sum()),
            "eos_token_ids": list(loaded.rules.stop_ids),
            "tokens": states,
        }


# ---- cf-stt ----


class SttFields(BaseModel):
    """Fields of /transcribe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    language: str | None = Field(None, max_length=64, description="named as ignored; the model hears it by itself")
    confidence_threshold_override: float = Field(0.75, ge=0, le=1, description="below it the answer says so")


@router.post(
    "/transcribe",
    summary="The route of cf-stt services",
    responses=answers(*AUDIO, kind=Stt),
    openapi_extra=body(SttFields, name="audio"),
)
async def transcribe(request: Request) -> Response:
    """Text with confidences, as circuitforge's speech services answer."""
    return Answer(partial(_stt, request))


async def _stt(request: Request, receive: Receive, send: Send) -> None:
    service = service_of(request)
    async with service.visit(request, "transcribe") as visit:
        with await service.upload(visit, request, field="audio") as upload:
            fields = openai.validated(SttFields, upload.fields)
            model = service.allowed_model(visit, service.models.default)
            if fields.language is not None:
                visit.headers[openai.IGNORED] = "language"
            recognition = service.recognition(visit, upload, receive, model=model, options=DecodeOptions())
            async with recognition as (heard, _):
                transcript = await heard.whole()
                record = {
                    "text": transcript.text,
                    "confidence": transcript.confidence,
                    "below_threshold": transcript.confidence < fields.confidence_threshold_override,
                    "language": fields.language,
                    "duration_s": transcript.duration_s,
                    "segments": [
                        {"start_s": s.start_s, "end_s": s.end_s, "text": s.text, "confidence": s.confidence}
                        for s in transcript.segments
                        if s.text
                    ],
                    "model": model,
                }
                await _send_whole(send, visit, json.dumps(record, ensure_ascii=False), "application/json")
                await service.charge(visit, model, heard)
