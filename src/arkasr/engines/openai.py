"""The engine elsewhere: an OpenAI-compatible endpoint that gets each clip in a request of its own, so many at a time.

    clip -> FLAC, in its own thread -> a free place -> asked until it is answered or its time is over -> text

Unusual: an endpoint may fail with one clip and answer the next. So a clip without an answer is no error that is
raised, but a `Generation` that says why; only what no other clip would be spared is raised.
"""

import math
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.endpoint import TRANSCRIPTIONS, Client, RefusedError, encode
from arkasr.engines import ANSWER_S, MAX_NEW_TOKENS, PARALLEL, Clip, Clips, DecodeOptions, Generation
from arkasr.engines.shared import EngineClosedError
from arkasr.errors import NoAnswerError, UsageError, quoted
from arkasr.text import clean

TRIES_IN_TIME = 3  # an endpoint without a sign of life is asked so often within a clip's time
LOOK_S = 0.01  # until it is looked whether there are new clips, and whether the old ones are still wanted
CLOSED = "the engine was closed; ask again"
MAX_CHARACTERS = 10_000  # of 30 s; nobody says a tenth of it


class OpenAIEngine:
    """A model behind a URL; text and no ids. To be closed."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        parallel: int = PARALLEL,
        answer_s: float = ANSWER_S,
        budget_s: float = math.inf,
    ) -> None:
        """The model of that name below a URL that ends in /v1, or wherever /audio/transcriptions is.

        Args:
            base_url: without user or password.
            model: as the endpoint calls it.
            key_variable: the environment variable that has the API key.
            parallel: clips that are asked for at a time.
            answer_s: most wall seconds from asking for a clip to its text, all tries and waits included.
            budget_s: most seconds of audio that are sent, again and again included; then no more are.

        Raises:
            UsageError: no such URL, no such variable, or a number that is none.
        """
        if not model:
            raise UsageError("no model; give its name as the endpoint calls it")
        if parallel < 1:
            raise UsageError(f"parallel is {parallel}; give at least 1")
        if not 0 < answer_s < math.inf:
            raise UsageError(f"answer_s is {answer_s:g}; give seconds above 0")
        if not budget_s > 0:
            raise UsageError(f"budget_s is {budget_s:g}; give seconds above 0")
        self._model, self._parallel, self._answer_s = model, parallel, answer_s
        self._include: dict[str, str] = {"include[]": "logprobs"}  # until the endpoint refuses it
        self._client = Client(
            base_url,
            key_variable=key_variable,
            needs_key=key_variable is not None,
            parallel=parallel,
            timeout_s=answer_s / TRIES_IN_TIME,
            budget_s=budget_s,
        )

    @property
    def notice(self) -> str | None:
        """That audio leaves this machine, for people to know; None where it does not."""
        return self._client.notice

    def why_silent(self, patience_s: float) -> str | None:
        """Why the endpoint does not answer so soon, nor take the key; None where it does."""
        return self._client.why_silent("models", patience_s=patience_s)

    def close(self) -> None:
        """Give back threads and connections; who waits for an answer gets an `EngineClosedError`."""
        self._client.close()

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Ask for clips side by side; see `Engine.generate`.

        Raises:
            EngineClosedError: the engine was closed.
            UsageError: nobody listens there, key, model or URL are refused, or an option cannot be passed on.
        """
        clips = [Clip(waveform, options) for waveform in waveforms]
        batch = _Batch(clips, self.prepare)
        self.decode(batch)
        return [batch.said[clip] for clip in clips]

    def prepare(self, clip: Clip) -> None:
        """Encode what is sent.

        Raises:
            UsageError: an option cannot be passed on.
        """
        if clip.options.top_p != 1:
            raise UsageError(f"top_p is {clip.options.top_p:g}: OpenAI's API has none to pass it on by; leave it at 1")
        if clip.options.max_new_tokens != MAX_NEW_TOKENS:
            raise UsageError(
                f"max_new_tokens is {clip.options.max_new_tokens}: OpenAI's API has none to pass it on by; "
                f"leave it at {MAX_NEW_TOKENS}"
            )
        since = time.perf_counter()
        clip.encoded = encode(clip.waveform, "flac")
        clip.timings_s["encode"] = time.perf_counter() - since

    def decode(self, clips: Clips) -> None:
        """Ask for clips until none is left, each as soon as a place is free; see `Continuous.decode`.

        Raises:
            EngineClosedError: the engine was closed.
            UsageError: nobody listens there, or key, model or URL are refused.
        """
        asked: dict[Future[Generation], tuple[Clip, float, dict[str, str]]] = {}
        done: queue.SimpleQueue[Future[Generation]] = queue.SimpleQueue()

        def ask(clip: Clip) -> None:
            include = self._include
            future = self._begin(clip, include)
            asked[future] = clip, time.perf_counter(), include
            future.add_done_callback(done.put)

        try:
            while True:
                while len(asked) < self._parallel and (clip := clips.take()) is not None:
                    ask(clip)
                if not asked:
                    return
                answered = _next(done)
                if answered is not None and answered in asked:
                    clip, since, include = asked.pop(answered)
                    if include and _refuses(answered, include):
                        self._include = {}
                        ask(clip)
                        continue
                    clip.timings_s["answer"] = time.perf_counter() - since
                    said = replace(_said(answered), timings_s=clip.timings_s)
                    if clips.wants(clip):
                        clips.give(clip, said)
                for unwanted in [future for future, (clip, *_) in asked.items() if not clips.wants(clip)]:
                    asked.pop(unwanted)
                    unwanted.cancel()
        finally:
            for future in asked:
                future.cancel()

    def _begin(self, clip: Clip, include: dict[str, str]) -> Future[Generation]:
        options = clip.options
        form = {"model": self._model, "response_format": "json", "temperature": str(options.temperature), **include}
        if options.seed:  # OpenAI's API has none; who asks for one shall get it, or be told
            form["seed"] = str(options.seed)
        assert clip.encoded is not None
        try:
            return self._client.begin(
                TRANSCRIPTIONS,
                read=_read,
                answer_s=self._answer_s,
                audio_s=len(clip.waveform) / SAMPLE_RATE,
                data=form,
                files={"file": ("audio.flac", clip.encoded, "audio/flac")},
                headers={"idempotency-key": str(uuid.uuid4())},  # its tries are one request to whoever heeds that
            )
        except NoAnswerError:
            raise EngineClosedError(CLOSED) from None


class _Batch:
    """Clips of one caller; see `Clips`."""

    def __init__(self, clips: Sequence[Clip], prepare: Callable[[Clip], None]) -> None:
        self._waiting, self._prepare = iter(clips), prepare
        self.said: dict[Clip, Generation] = {}

    def take(self) -> Clip | None:
        clip = next(self._waiting, None)
        if clip is not None:
            self._prepare(clip)  # while others are being answered
        return clip

    def wants(self, clip: Clip) -> bool:
        return True

    def give(self, clip: Clip, generation: Generation) -> None:
        self.said[clip] = generation


def _next(done: queue.SimpleQueue[Future[Generation]]) -> Future[Generation] | None:
    try:
        return done.get(timeout=LOOK_S)
    except queue.Empty:
        return None


def _refuses(future: Future[Generation], include: dict[str, str]) -> bool:
    """Whether the endpoint, as some do, takes all but what was asked for besides the text."""
    error = None if future.cancelled() else future.exception()
    return (
        isinstance(error, RefusedError)
        and error.param in {name.removesuffix("[]") for name in include} | include.keys()
    )


def _said(future: Future[Generation]) -> Generation:
    try:
        return future.result()
    except NoAnswerError as error:
        return Generation((), (), None, failure=error)
    except CancelledError:
        raise EngineClosedError(CLOSED) from None


def _read(record: Any) -> Generation:
    """The text in an answer, with the logprobs of its tokens if they are told.

    Raises:
        NoAnswerError: it has no text, or one that nobody can have said.
    """
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise NoAnswerError(f"the answer has no text: {quoted(record)}")
    if len(text) > MAX_CHARACTERS:
        raise NoAnswerError(f"the answer has {len(text)} characters, of 30 s of audio at most")
    try:
        logprobs = tuple(float(token["logprob"]) for token in record.get("logprobs") or ())
    except (TypeError, ValueError, KeyError, OverflowError):
        raise NoAnswerError(f"the answer's logprobs are none: {quoted(record['logprobs'])}") from None
    if not all(map(math.isfinite, logprobs)):
        raise NoAnswerError("the answer's logprobs are not finite")
    return Generation((), logprobs, None, text=clean(text.encode(errors="replace").decode()))  # no half characters
