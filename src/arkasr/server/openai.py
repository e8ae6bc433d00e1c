"""What OpenAI's audio API says and expects: parameters, responses, stream events, errors. The only owner of its shapes.

Facts are those of the `openai` client's types. Unusual: nothing is silently ignored. A hint that this recognizer cannot
use is named in the response header `x-arkasr-ignored`; what asks for another kind of answer is refused.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from arkasr import audio
from arkasr.engines import MAX_NEW_TOKENS, DecodeOptions, EngineName
from arkasr.engines.shared import EngineClosedError
from arkasr.errors import ArkASRError, AudioError, MissingExtraError, NoAnswerError, quoted
from arkasr.results import DEFAULT_SUBTITLES, WRITERS, Segment, Transcript, added, segment_record, word_records
from arkasr.server.accounts import LimitError, decimal_text
from arkasr.server.telemetry import log
from arkasr.text import TextRules

IGNORED = "x-arkasr-ignored"
RETRY_AFTER = {"retry-after": "5"}


class Refusal(ArkASRError):  # noqa: N818 - what the server does, not what went wrong
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def refusal_of(error: ArkASRError) -> Refusal:
    """How an error of ours is answered."""
    match error:
        case Refusal():
            return error
        case LimitError():
            wait = {"retry-after": str(math.ceil(error.retry_after_s))}
            return Refusal(429, str(error), code=error.code, headers={**error.headers, **wait})
        case AudioError() | MissingExtraError():
            return Refusal(400, str(error), code="invalid_audio", param="file")
        case EngineClosedError():
            return Refusal(503, str(error), code="shutting_down")
        case NoAnswerError():
            log.error("back end: %s", error)  # it may name the address, and quote what it said: not for strangers
            return Refusal(502, "the back end gave no answer; try again", code="upstream_failed", headers=RETRY_AFTER)
        case _:
            log.error("%s", error)
            return Refusal(500, "the server cannot do this now; its log says why", code="server_error")


def _listed(value: object) -> object:
    """One value for a list of them, as forms send it."""
    return [value] if isinstance(value, str) else value


def _parsed(value: object) -> object:
    """An object that a form sends as JSON."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _drawable(temperature: float) -> float:
    if 0 < temperature < 1e-6:
        raise ValueError("give 0, or at least 1e-6")
    return temperature


Temperature = Annotated[float, AfterValidator(_drawable)]
Fields = TypeVar("Fields", bound=BaseModel)
Text = Annotated[str, Field(max_length=4096)]
Texts = Annotated[list[Text], BeforeValidator(_listed), Field(max_length=1000)]
ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt", "diarized_json"]


class ServerVad(BaseModel):
    """OpenAI's parameters of its voice activity detector; ours has its own, so they are named as ignored."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["server_vad"]
    threshold: float | None = Field(None, ge=0, le=1)
    prefix_padding_ms: int | None = Field(None, ge=0)
    silence_duration_ms: int | None = Field(None, ge=0)


class Parameters(BaseModel):
    """Fields of /v1/audio/transcriptions besides the audio; lists may be sent as `x` or `x[]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Text = Field(description="name of a model of /v1/models")
    response_format: ResponseFormat = "json"
    temperature: Temperature = Field(0.0, ge=0, le=1, description="0: greedy; doubtful spans are heard again")
    stream: bool = Field(False, description="server-sent events, text as soon as it is known")
    timestamp_granularities: Annotated[
        list[Literal["word", "segment"]], BeforeValidator(_listed), Field(max_length=2)
    ] = Field([], description="verbose_json only, where none is segment; in a stream, with each delta")
    include: Annotated[list[Literal["logprobs", "segments"]], BeforeValidator(_listed), Field(max_length=2)] = Field(
        [], description="logprobs of tokens (json only); segments: ours, start and end with each delta of a stream"
    )
    chunking_strategy: Annotated[Literal["auto"] | ServerVad | None, BeforeValidator(_parsed)] = None
    language: Text | None = Field(None, description="experimental: named as ignored; the model hears it by itself")
    languages: Texts = Field([], description="experimental: named as ignored")
    prompt: Text | None = Field(None, description="experimental: named as ignored")
    keywords: Texts = Field([], description="experimental: named as ignored")
    known_speaker_names: Texts = Field([], description="refused: speakers are not told apart")
    known_speaker_references: Annotated[list[str], BeforeValidator(_listed)] = Field(
        [], description="refused: speakers are not told apart"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="ours: of the sampling above temperature 0")
    max_new_tokens: int | None = Field(None, ge=1, le=2**31, description="ours: most tokens of a segment")

    @property
    def ignored(self) -> list[str]:
        """Parameters that were given and change nothing."""
        names = ["language", "languages", "prompt", "keywords"]
        given = [name for name in names if name in self.model_fields_set]
        return given + (["chunking_strategy"] if isinstance(self.chunking_strategy, ServerVad) else [])

    @property
    def options(self) -> DecodeOptions:
        """How to decode."""
        align = "word" in self.timestamp_granularities
        return DecodeOptions(self.max_new_tokens or MAX_NEW_TOKENS, self.temperature, self.seed, align=align)


def read_parameters(fields: Mapping[str, object]) -> Parameters:
    """Parameters from fields of a form or of a JSON object.

    Raises:
        Refusal: an unknown or bad one, or one that asks for what this server does not do.
    """
    parameters = validated(Parameters, _folded(fields))
    _refuse_unsupported(parameters)
    return parameters


def validated(model: type[Fields], fields: Mapping[str, object]) -> Fields:
    """Fields as a model says.

    Raises:
        Refusal: one is unknown, bad or missing.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "body"
        if first["type"] == "extra_forbidden":
            raise Refusal(
                400, f"Unrecognized request argument: {quoted(name)}", code="unknown_parameter", param=name[:200]
            ) from None
        if first["type"] == "missing":
            raise Refusal(400, f"{name}: this parameter is required", code="missing_parameter", param=name) from None
        raise Refusal(
            400, f"{name}: {first['msg']}; got {quoted(first['input'])}", code="invalid_parameter", param=name
        ) from None


_NESTED = re.compile(r"(\w+)\[(\w*)\]")


def _folded(fields: Mapping[str, object]) -> dict[str, object]:
    """`x[]` as x, and `x[y]` as an entry of the object x."""
    folded: dict[str, object] = {}
    for name, value in fields.items():
        nested = _NESTED.fullmatch(name)
        if not nested:
            folded[name] = value
            continue
        inner = folded.setdefault(nested[1], {} if nested[2] else [])
        if nested[2] and isinstance(inner, dict):
            inner[nested[2]] = value
        else:
            folded[nested[1]] = [*(inner if isinstance(inner, list) else [inner]), *_many(value)]
    return folded


def _many(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _refuse_unsupported(parameters: Parameters) -> None:
    def refuse(param: str, message: str) -> None:
        raise Refusal(400, message, code="unsupported_parameter", param=param)

    kind = parameters.response_format
    if kind == "diarized_json":
        refuse("response_format", "diarized_json: this server does not tell speakers apart; use verbose_json")
    if parameters.known_speaker_names or parameters.known_speaker_references:
        refuse("known_speaker_names", "known_speaker_*: this server does not tell speakers apart")
    if parameters.timestamp_granularities and kind != "verbose_json":
        refuse("timestamp_granularities", "timestamp_granularities: set response_format to verbose_json")
    if "logprobs" in parameters.include and kind != "json":
        refuse("include", "logprobs: set response_format to json")
    if "segments" in parameters.include and not parameters.stream:
        refuse("include", "segments: only in a stream; use response_format verbose_json")
    if parameters.stream and kind in {"srt", "vtt"}:
        refuse("stream", f"stream: events are no {kind}; leave response_format out, or stream")


def refuse_untold(engine: EngineName, options: DecodeOptions, include: Sequence[str] = ()) -> None:
    """Raise a Refusal of what the server's engine cannot be asked for."""
    asked = {
        "include": "logprobs" in include,
        "max_new_tokens": options.max_new_tokens != MAX_NEW_TOKENS,
        "temperature": options.temperature > 1,
        "timestamp_granularities": options.align,
    }
    for param, why in _UNTOLD.get(engine, {}).items():
        if asked[param]:
            raise Refusal(400, f"{param}: the model runs {why}", code="unsupported_parameter", param=param)


_UNTOLD: Mapping[EngineName, Mapping[str, str]] = {
    "openai": {
        "include": "at a back end, which does not tell its tokens; leave logprobs out",
        "max_new_tokens": "at a back end, which counts its tokens itself; leave it out",
        "temperature": "at a back end, which takes 0 to 1",
        "timestamp_granularities": "at a back end, which tells no times of words; leave word out",
    },
    "vllm": {"timestamp_granularities": "in vLLM, which tells no times of words; leave word out"},
}


@dataclass(frozen=True)
class Bill:
    """What a request used.

    Attributes:
        num_samples: of audio at 16 kHz.
        cost: at the key's price; None without a price.
    """

    num_samples: int
    cost: Fraction | None

    @property
    def seconds(self) -> float:
        """Of audio; exact, for 16 000 ths of a second have few digits."""
        return self.num_samples / audio.SAMPLE_RATE

    def by_duration(self) -> dict[str, Any]:
        """OpenAI's usage by duration, with the cost."""
        return {"type": "duration", "seconds": self.seconds, **self._cost()}

    def by_tokens(self, transcript: Transcript) -> dict[str, Any]:
        """OpenAI's usage by tokens, with seconds and cost; audio tokens are those of the whole recording."""
        heard, said = audio.num_audio_tokens(self.num_samples), len(transcript.tokens)
        return {
            "type": "tokens",
            "input_tokens": heard,
            "output_tokens": said,
            "total_tokens": heard + said,
            "input_token_details": {"audio_tokens": heard, "text_tokens": 0},
            "seconds": self.seconds,
            **self._cost(),
        }

    def _cost(self) -> dict[str, str]:
        return {} if self.cost is None else {"cost": decimal_text(self.cost)}


def body(transcript: Transcript, parameters: Parameters, bill: Bill, rules: TextRules | None) -> tuple[str, str]:
    """A whole response in the format that was asked for, and its media type."""
    match parameters.response_format:
        case "json":
            record: dict[str, Any] = {"text": transcript.text, "usage": bill.by_duration()}
            if "logprobs" in parameters.include:
                record["logprobs"] = logprobs(transcript.segments, rules)
            return _json(record), "application/json"
        case "verbose_json":
            spoken = [segment for segment in transcript.segments if segment.text]
            record = {
                "task": "transcribe",
                "language": parameters.language or "und",  # it is not detected; the client's type wants a string
                "duration": bill.seconds,
                "text": transcript.text,
                "usage": bill.by_duration(),
            }
            granularities = parameters.timestamp_granularities or ["segment"]
            if "segment" in granularities:
                record["segments"] = [_segment(number, segment) for number, segment in enumerate(spoken)]
            if "word" in granularities:
                record["words"] = [word for segment in spoken for word in word_records(segment)["words"]]
            return _json(record), "application/json"
        case other:
            out = io.StringIO()
            WRITERS["txt" if other == "text" else other](transcript, out, DEFAULT_SUBTITLES)
            media = {"srt": "application/x-subrip", "vtt": "text/vtt"}.get(other, "text/plain")
            return out.getvalue(), f"{media}; charset=utf-8"


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    record = segment_record(number, segment)
    return {**record, "avg_logprob": record["avg_logprob"] or 0.0}  # the client's type wants a number


def logprobs(segments: Iterable[Segment], rules: TextRules | None) -> list[dict[str, Any]]:
    """Each generated token with its bytes and the natural logarithm of its probability."""
    assert rules is not None, "refused before"
    tokens = ((token, logprob) for s in segments for token, logprob in zip(s.tokens, s.logprobs, strict=True))
    spelled = ((rules.token_bytes(token), logprob) for token, logprob in tokens)
    return [{"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob} for raw, logprob in spelled]


class Events:
    """The server-sent events of one transcription."""

    def __init__(self, parameters: Parameters, rules: TextRules | None) -> None:
        """Without rules, usage is seconds, for nobody knows the tokens."""
        self._parameters, self._rules = parameters, rules
        self._text = ""
        self._number = 0

    def delta(self, segment: Segment) -> str:
        """The event of a segment, "" for one without text; deltas in a row are the text."""
        delta = added(self._text, segment.text)
        if not delta:
            return ""
        event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta}
        self._text += delta
        if "logprobs" in self._parameters.include:
            event["logprobs"] = logprobs([segment], self._rules)
        granularities = self._parameters.timestamp_granularities
        if "segments" in self._parameters.include or "segment" in granularities:
            event |= {"segment_id": str(self._number), "start": segment.start_s, "end": segment.end_s}
        if "word" in granularities:
            event["words"] = word_records(segment)["words"]
        self._number += 1
        return _event(event)

    def done(self, transcript: Transcript, bill: Bill) -> str:
        """The last event."""
        event: dict[str, Any] = {"type": "transcript.text.done", "text": transcript.text}
        if "logprobs" in self._parameters.include:
            event["logprobs"] = logprobs(transcript.segments, self._rules)
        usage = bill.by_duration() if self._rules is None else bill.by_tokens(transcript)
        return _event({**event, "usage": usage})

    @staticmethod
    def failed(refusal: Refusal) -> str:
        """The event that ends a stream in an error; clients of OpenAI raise it."""
        return _event({"type": "error", **refusal.body})


def _event(event: dict[str, Any]) -> str:
    return f"data: {_json(event)}\n\n"


def _json(record: Mapping[str, Any] | Sequence[Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)
