"""A recognizer behind an OpenAI-compatible endpoint: each clip is encoded once and sent until it is answered."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.endpoint import TIMEOUT_S, TRANSCRIPTIONS, TRIES, Client, encode
from arkasr.errors import NoAnswerError, UsageError, quoted
from arkasr.evaluate.systems import Heard, charged


@dataclass(frozen=True)
class Request:
    """How an endpoint is asked.

    Attributes:
        parallel: requests at a time.
        tries: of one clip, at most.
        timeout_s: without a byte, of one request.
        audio_format: of the 16-bit audio that is sent.
        fields: of the form, besides model, response_format and temperature.
    """

    parallel: int = 4
    tries: int = TRIES
    timeout_s: float = TIMEOUT_S
    audio_format: Literal["flac", "wav"] = "flac"
    fields: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("parallel", self.parallel), ("tries", self.tries)):
            if value < 1:
                raise UsageError(f"{name} is {value}; give at least 1")


class EndpointSystem:
    """An endpoint's model."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        request: Request = Request(),
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """The model of that name below a URL that ends in /v1, or wherever /audio/transcriptions is.

        Args:
            base_url: without user or password.
            model: as the endpoint calls it.
            key_variable: the environment variable that has the API key.
            request: how to ask.
            sleep: waits so many seconds before a clip is sent again.

        Raises:
            UsageError: no such URL, or no such variable.
        """
        self.name, self._request, self._sleep = model, request, sleep
        self._client = Client(
            base_url,
            key_variable=key_variable,
            needs_key=key_variable is not None,
            parallel=request.parallel,
            timeout_s=request.timeout_s,
        )

    def facts(self) -> dict[str, Any]:
        """Where it is, and how it is asked; the key is no part of it."""
        return {
            "kind": "endpoint", "model": self.name, "revision": None, "base_url": self._client.url,
            "parallel": self._request.parallel, "tries": self._request.tries,
            "audio": f"{self._request.audio_format}, 16 bit, {SAMPLE_RATE} Hz",
            "decoding": self._form(),
        }  # fmt: skip

    def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
        """One answer a clip; encoding is not timed, waiting for the endpoint is.

        Raises:
            UsageError: nobody listens there, or the key or model is refused.
        """
        encoded = [encode(waveform, self._request.audio_format) for waveform in batch]
        since = time.perf_counter()
        return charged(list(self._client.each(self._ask, encoded)), since)

    def close(self) -> None:
        """Give back threads and connections."""
        self._client.close()

    def _form(self) -> dict[str, str]:
        return {"model": self.name, "response_format": "json", "temperature": "0", **dict(self._request.fields)}

    def _ask(self, content: bytes) -> Heard:
        kind = self._request.audio_format
        clip = {"file": (f"audio.{kind}", content, f"audio/{kind}")}
        try:
            record = self._client.ask(
                TRANSCRIPTIONS, tries=self._request.tries, sleep=self._sleep, data=self._form(), files=clip
            )
        except NoAnswerError as error:
            return Heard("", 0.0, error=str(error))
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            return Heard("", 0.0, error=f"the answer has no text: {quoted(record)}")
        return Heard(text, 0.0)
