"""What OpenAI's realtime API says and expects in a transcription session: client events, the session, an item's events.

Facts are those of the `openai` client's types. Unusual: a hint that this recognizer cannot use is named in the
session's `arkasr_ignored`, an extension; what asks for another kind of answer is refused.
"""

import binascii
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from arkasr.errors import UsageError, quoted
from arkasr.live import LiveOptions
from arkasr.server.openai import Refusal, Text

RATE = 24_000
SAMPLE_BYTES = 2
MAX_FRAME_BYTES = 16 << 20
SHORT_CHARS = 1 << 16  # all events but those with audio are shorter, and those have few values
FEW_VALUES = 64
MAX_ID_CHARS = 512
LOGPROBS = "item.input_audio_transcription.logprobs"
MODEL = "session.audio.input.transcription.model"
TRANSCRIPTION = "conversation.item.input_audio_transcription"
_DEFAULTS = LiveOptions()
_SECONDS = {"pause_s": "silence_duration_ms / 1000", "prefix_s": "prefix_padding_ms / 1000"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# ---- what clients send ----


def _pcm(audio: object) -> object:
    if not isinstance(audio, str):
        raise ValueError("give base64 text")  # noqa: TRY004 - pydantic's
    data = binascii.a2b_base64(audio, strict_mode=True)
    if len(data) % SAMPLE_BYTES:
        raise ValueError("half a sample at the end; audio is 16-bit")
    return data


class _ClientEvent(_Strict):
    event_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None


class Update(_ClientEvent):
    """New settings; what is left out stays as it is."""

    type: Literal["session.update"]
    session: dict[str, Any]


class Append(_ClientEvent):
    """More audio: 16-bit little-endian mono samples."""

    type: Literal["input_audio_buffer.append"]
    audio: Annotated[bytes, BeforeValidator(_pcm)]


class Commit(_ClientEvent):
    """The audio so far is an item."""

    type: Literal["input_audio_buffer.commit"]


class Clear(_ClientEvent):
    """The audio so far is forgotten."""

    type: Literal["input_audio_buffer.clear"]


@dataclass(frozen=True)
class Bad:
    """What is no event of a client, and why."""

    event_id: str | None
    refusal: Refusal


ClientEvent = Update | Append | Commit | Clear
_CLIENT_EVENT: TypeAdapter[ClientEvent] = TypeAdapter(Annotated[ClientEvent, Field(discriminator="type")])


def read(frame: str | bytes) -> ClientEvent | Bad:
    """The event of a frame."""
    try:
        record = _parsed(frame)
    except Refusal as refusal:
        return Bad(None, refusal)
    try:
        return _validated(_CLIENT_EVENT, record)
    except Refusal as refusal:
        return Bad(_told_again(record.get("event_id")), refusal)


def _told_again(event_id: object) -> str | None:
    """An event's id, unless it is none; half of a character could not be sent."""
    if not isinstance(event_id, str) or len(event_id) > MAX_ID_CHARS:
        return None
    return event_id if event_id == event_id.encode(errors="ignore").decode() else None


def _parsed(frame: str | bytes) -> dict[str, Any]:
    if isinstance(frame, bytes):
        raise Refusal(400, "a frame that is no text in UTF-8; send events as JSON", code="invalid_event")
    # An event of millions of values would take all memory and hold up the other clients.
    if len(frame) > SHORT_CHARS and sum(map(frame.count, "[{,")) > FEW_VALUES:
        raise Refusal(400, f"an event of {len(frame)} characters has too many values", code="invalid_event")
    try:
        record: object = json.loads(frame)
    except (ValueError, RecursionError):
        raise Refusal(400, "a frame that is no JSON; send events as JSON objects", code="invalid_event") from None
    if not isinstance(record, dict):
        raise Refusal(400, f"events are JSON objects; got {quoted(record)}", code="invalid_event")
    return record


Read = TypeVar("Read")


def _validated(adapter: TypeAdapter[Read], record: Mapping[str, Any], path: Sequence[str] = ()) -> Read:
    """The record as its type; the first of its mistakes is a Refusal."""
    try:
        return adapter.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        kind, given = first["type"], quoted(first["input"])
        if kind.startswith("union_tag"):
            message = f"type: no event of a transcription session; got {quoted(record.get('type'))}"
            raise Refusal(400, message, code="unknown_event", param="type") from None
        own = first["loc"] if path else first["loc"][1:]  # the other begins with the event's type
        param = ".".join(map(str, [*path, *own])).encode("ascii", "backslashreplace").decode()[:200]
        if kind == "extra_forbidden":
            message = f"Unrecognized request argument: {quoted(param)}"
            raise Refusal(400, message, code="unknown_parameter", param=param) from None
        if kind == "missing":
            raise Refusal(400, f"{param}: this parameter is required", code="missing_parameter", param=param) from None
        raise Refusal(400, f"{param}: {first['msg']}; got {given}", code="invalid_parameter", param=param) from None


# ---- the session ----


class _Format(_Strict):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[24_000] = 24_000


class _NoiseReduction(_Strict):
    type: Literal["near_field", "far_field"] | None = None
    strength: float | None = None


class _Transcription(_Strict):
    model: Text | None = None
    language: Text | None = None
    languages: Annotated[list[Text], Field(max_length=1000)] | None = None
    keywords: Annotated[list[Text], Field(max_length=1000)] | None = None
    prompt: Text | None = None
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] | None = None


class _TurnDetection(_Strict):
    type: Literal["server_vad", "semantic_vad"]
    threshold: float = _DEFAULTS.threshold
    prefix_padding_ms: int = round(_DEFAULTS.prefix_s * 1000)
    silence_duration_ms: int = round(_DEFAULTS.pause_s * 1000)
    create_response: bool | None = None
    interrupt_response: bool | None = None
    idle_timeout_ms: int | None = None
    eagerness: Literal["low", "medium", "high", "auto"] | None = None


class _Input(_Strict):
    format: _Format = _Format()
    noise_reduction: _NoiseReduction | None = None
    transcription: _Transcription = _Transcription()
    turn_detection: _TurnDetection | None = _TurnDetection(type="server_vad")


class _Audio(_Strict):
    input: _Input = _Input()


class Session(_Strict):
    """The settings of a session, all of them."""

    type: Literal["transcription", "realtime", "translation"]
    audio: _Audio = _Audio()
    include: list[Literal["item.input_audio_transcription.logprobs"]] | None = None

    @property
    def model(self) -> str | None:
        """The name of its model; None for the server's first."""
        return self.audio.input.transcription.model

    @property
    def ignored(self) -> list[str]:
        """What was given and changes nothing."""
        given = self.audio.input
        hints = {
            "transcription": ("language", "languages", "keywords", "prompt", "delay"),
            "turn_detection": ("create_response", "interrupt_response", "idle_timeout_ms"),
        }
        kept = given.model_dump(exclude_none=True)
        found = [f"{part}.{name}" for part, names in hints.items() for name in names if name in kept.get(part, ())]
        return [f"audio.input.{name}" for name in (["noise_reduction"] if given.noise_reduction else []) + found]

    def live_options(self, *, partials: bool) -> LiveOptions | None:
        """How to listen; None where the client tells where utterances end."""
        turns = self.audio.input.turn_detection
        if turns is None:
            return None
        return LiveOptions(
            threshold=turns.threshold,
            prefix_s=turns.prefix_padding_ms / 1000,
            pause_s=turns.silence_duration_ms / 1000,
            partials=partials,
        )

    def record(self, session_id: str, expires_at: float) -> dict[str, Any]:
        """What a client is told of it."""
        given = self.audio.input
        nothing = {"noise_reduction": None, "turn_detection": None}
        return {
            "id": session_id,
            "object": "realtime.transcription_session",
            "type": self.type,
            "audio": {"input": {**nothing, **given.model_dump(exclude_none=True)}},
            "include": self.include,
            "expires_at": int(expires_at),
            "arkasr_ignored": self.ignored,
        }


_SESSION = TypeAdapter(Session)


def new_session(model: str) -> Session:
    """A session as it begins."""
    return Session(type="transcription", audio=_Audio(input=_Input(transcription=_Transcription(model=model))))


def updated(session: Session, given: dict[str, Any]) -> Session:
    """A session with new settings.

    Raises:
        Refusal: one is unknown or bad, or asks for what this server does not do.
    """
    if "type" not in given:
        raise Refusal(400, "session.type: this parameter is required", code="missing_parameter", param="session.type")
    new = _validated(_SESSION, _merged(session.model_dump(), given), ["session"])
    turns = new.audio.input.turn_detection
    for param, refused, message in (
        ("type", new.type != "transcription", "this server only transcribes; give transcription"),
        ("audio.input.format", new.audio.input.format.type != "audio/pcm", "give audio/pcm at 24000 Hz"),
        ("audio.input.turn_detection.type", turns and turns.type == "semantic_vad", "give server_vad, or null"),
        ("audio.input.turn_detection.eagerness", turns and turns.eagerness, "only semantic_vad has one"),
    ):
        if refused:
            place = f"session.{param}"
            raise Refusal(400, f"{place}: {message}", code="unsupported_parameter", param=place)
    try:
        new.live_options(partials=True)
    except UsageError as error:
        message, param = str(error), "session.audio.input.turn_detection"
        for name, ours in _SECONDS.items():
            message = message.replace(name, ours)
        raise Refusal(400, f"{param}: {message}", code="invalid_parameter", param=param) from None
    return new


def _merged(before: object, given: object) -> Any:
    if isinstance(before, dict) and isinstance(given, dict):
        return before | {name: _merged(before.get(name), value) for name, value in given.items()}
    return given


# ---- what clients are told ----


def new_id(kind: str) -> str:
    """An id unlike all others."""
    return f"{kind}_{secrets.token_hex(12)}"


def text_of(event: Mapping[str, Any]) -> str:
    """An event as it is sent."""
    return json.dumps({"event_id": new_id("event"), **event}, ensure_ascii=False, allow_nan=False)


def error_event(refusal: Refusal, event_id: str | None) -> dict[str, Any]:
    """What a client is told of its mistake, or of ours."""
    return {"type": "error", "error": {**refusal.body["error"], "event_id": event_id}}


@dataclass
class Item:
    """An utterance, or the audio of a commit; its deltas in a row are its transcript."""

    id: str = field(default_factory=lambda: new_id("item"))
    transcript: str = ""

    def committed(self, previous: str | None) -> list[dict[str, Any]]:
        """That its audio is complete."""
        content = [{"type": "input_audio", "transcript": None}]
        item = {
            "id": self.id, "object": "realtime.item", "type": "message", "status": "completed", "role": "user",
            "content": content,
        }  # fmt: skip
        return [
            {"type": "input_audio_buffer.committed", "item_id": self.id, "previous_item_id": previous},
            {"type": "conversation.item.added", "item": item, "previous_item_id": previous},
            {"type": "conversation.item.done", "item": item, "previous_item_id": previous},
        ]

    def delta(self, transcript: str) -> list[dict[str, Any]]:
        """What its transcript has more than before."""
        assert transcript.startswith(self.transcript), "what was said to be stable has changed"
        more, self.transcript = transcript[len(self.transcript) :], transcript
        return [self._event("delta", delta=more)] if more else []

    def completed(self, usage: Mapping[str, Any], logprobs: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """That its transcript is."""
        told = {} if logprobs is None else {"logprobs": logprobs}
        return self._event("completed", transcript=self.transcript, usage=usage, **told)

    def failed(self, refusal: Refusal) -> dict[str, Any]:
        """That it has none."""
        return self._event("failed", error=refusal.body["error"])

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"{TRANSCRIPTION}.{kind}", "item_id": self.id, "content_index": 0, **fields}
