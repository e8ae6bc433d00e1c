"""The endpoint behind a server that runs no network itself: whether it answers, and its failures as one kind of error.

    clip -> an OpenAI-compatible endpoint -> Generation | NoAnswerError -> 502, without a word of the endpoint's

Unusual: a front end is ready when its back end is, so that a gateway sends requests elsewhere. But it tries those that
come anyhow, and so needs nobody to restart it when the back end is there again.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from arkasr.audio import Waveform
from arkasr.engines import ANSWER_S, PARALLEL, Clip, Clips, DecodeOptions, Generation
from arkasr.errors import NoAnswerError, UsageError
from arkasr.server.telemetry import log

if TYPE_CHECKING:
    from arkasr.engines.openai import OpenAIEngine

IN_TIME = 0.8  # of a request's time for a span, so that a client hears why there is no answer
PATIENCE_S = 2.0  # with an endpoint that shall say whether it lives
FRESH_S = 1.0  # for which what it said holds, however many ask


class BackEnd:
    """An OpenAI-compatible endpoint that recognizes for this server."""

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str | None = None,
        parallel: int | None = None,
        request_s: float = math.inf,
    ) -> None:
        """At a base URL, with its key in an environment variable, if it has one; so many requests at once, or 8.

        Requests that need it have so many seconds, of which their spans get a part.
        """
        self._url, self._key_variable, self._parallel, self._request_s = base_url, key_variable, parallel, request_s
        self._engine: OpenAIEngine | None = None
        self._lock = asyncio.Lock()
        self._asked_at = -FRESH_S
        self._lives = True

    def engine(self, model: str) -> "RemoteEngine":
        """Its model of that name; nothing is asked yet.

        Raises:
            UsageError: no such URL, or no key in the variable.
        """
        from arkasr.engines.openai import OpenAIEngine  # with its HTTP client, which no other server needs

        parallel, answer_s = self._parallel or PARALLEL, min(ANSWER_S, IN_TIME * self._request_s)
        engine = OpenAIEngine(self._url, model, key_variable=self._key_variable, parallel=parallel, answer_s=answer_s)
        if engine.notice is not None:
            log.warning("model %s: %s", model, engine.notice)
        self._engine = engine
        return RemoteEngine(engine, parallel)

    async def lives(self) -> bool:
        """Whether it answers, and takes the key; asked anew when that was not known a moment ago."""
        async with self._lock:
            if self._engine is not None and time.monotonic() >= self._asked_at + FRESH_S:
                why = await asyncio.to_thread(self._engine.why_silent, PATIENCE_S)
                if why is not None and self._lives:
                    log.error("%s: the back end does not answer (%s); requests will fail", self._url, why)
                if why is None and not self._lives:
                    log.info("the back end answers again")
                self._lives, self._asked_at = why is None, time.monotonic()
            return self._lives


class RemoteEngine:
    """A `Continuous` engine at an endpoint, where a refused key, too, is no mistake of the client's."""

    def __init__(self, engine: "OpenAIEngine", parallel: int) -> None:
        """Of `BackEnd.engine`."""
        self._engine, self.parallel = engine, parallel

    def close(self) -> None:
        """Give back threads and connections."""
        self._engine.close()

    def prepare(self, clip: Clip) -> None:
        """See `Continuous`."""
        self._engine.prepare(clip)

    def decode(self, clips: Clips) -> None:
        """See `Continuous`.

        Raises:
            NoAnswerError: the endpoint answers nobody.
        """
        try:
            self._engine.decode(clips)
        except UsageError as error:
            raise NoAnswerError(str(error)) from None

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """See `Engine`; raises as `decode`."""
        try:
            return self._engine.generate(waveforms, options)
        except UsageError as error:
            raise NoAnswerError(str(error)) from None
