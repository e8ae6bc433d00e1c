"""What /openapi.json says: bodies as a form and as JSON, and every status with the type and the shape of its answer."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_JSON = "application/json"
SHARED = (401, 403, 500)  # of every route that needs a key
AUDIO = (400, 401, 403, 408, 413, 415, 429, 500, 502, 503, 504)  # of every route that hears audio


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Exact):
    """What went wrong."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str


class Failure(_Exact):
    """The body of every error."""

    error: Error


class Usage(_Exact):
    """Seconds of audio, and their cost where the key has a price."""

    type: Literal["duration"]
    seconds: float
    cost: str = Field(pattern=r"^[0-9]+(\.[0-9]+)?$", default="")


class Logprob(_Exact):
    """A token."""

    token: str
    bytes: list[int]
    logprob: float


class Whole(_Exact):
    """json."""

    text: str
    usage: Usage
    logprobs: list[Logprob] = []


class Heard(_Exact):
    """A segment of verbose_json."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    confidence: float
    flags: list[str]


class Said(_Exact):
    """A word of verbose_json."""

    word: str
    start: float
    end: float
    probability: float


class Verbose(_Exact):
    """verbose_json; segments, words or both, as the request's granularities say."""

    task: Literal["transcribe"]
    language: str
    duration: float
    text: str
    segments: list[Heard] = []
    words: list[Said] = []
    usage: Usage


class Model(_Exact):
    """A name to give as `model`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Exact):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Asr(_Exact):
    """/asr."""

    text: str
    latency_s: float
    prompt_tokens: int | None


class SttSegment(_Exact):
    """A segment of /transcribe."""

    start_s: float
    end_s: float
    text: str
    confidence: float


class Stt(_Exact):
    """/transcribe."""

    text: str
    confidence: float
    below_threshold: bool
    language: str | None
    duration_s: float
    segments: list[SttSegment]
    model: str


class Ready(_Exact):
    """/ready."""

    ready: bool
    models: dict[str, Literal["ready", "unloaded", "unreachable"]]


def answers(*statuses: int, kind: Any = None, text: tuple[str, ...] = ()) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: a model for 200 as JSON, other media types of it that are text, and errors."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Failure, "description": HTTPStatus(status).phrase} for status in statuses
    }
    content = {media: {"schema": {"type": "string"}} for media in text}
    if kind is not None:
        found[200] = {"model": kind, "description": "The answer", "content": content}
    elif content:
        found[200] = {"description": "The answer", "content": content}
    return found


def body(model: type[BaseModel], *, name: str = "file") -> dict[str, Any]:
    """A body as a form with a file of that name, and as JSON with the recording in it or a URL."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    fields = {one: _inlined(field, definitions) for one, field in schema["properties"].items()}
    file = {name: {"type": "string", "format": "binary", "description": "the recording"}}
    others = {
        "url": {"type": "string", "description": "where to fetch it from, if the server allows that"},
        "audio": {"type": "string", "description": "the recording in base64, or as a data URL"},
    }
    required = schema.get("required", [])

    def closed(properties: Mapping[str, Any], needed: list[str]) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}

    content = {
        "multipart/form-data": {"schema": closed({**file, **fields}, [name, *required])},
        _JSON: {"schema": closed({**others, **fields}, required)},
    }
    return {"requestBody": {"required": True, "content": content}}


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:
    """References replaced by what they name, for pydantic's definitions do not reach the components."""
    if isinstance(value, list):
        return [_inlined(one, definitions) for one in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(one, definitions) for name, one in value.items()}
