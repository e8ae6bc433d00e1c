"""Audio to text: stream, split, generate, to_text, Transcript. The one place where the stages meet.

    sources -> spans (decoded, heard and cut in a thread that runs ahead) -> batches -> segments, in order

Unusual: a batch is whatever spans are there, of one recording or of several: the first span is recognized at once, the
later ones in company. No number depends on the company.
"""

import atexit
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, overload

import numpy as np

from arkasr import audio, checkpoint, engines, segment
from arkasr.audio import AudioSource, Readable, Waveform
from arkasr.engines import DecodeOptions, Dtype, Engine, EngineName
from arkasr.engines.shared import Turns
from arkasr.errors import ArkASRError, AudioError, NoAnswerError, UsageError
from arkasr.recognize import Recognizer, joined
from arkasr.results import Segment, Transcript
from arkasr.segment import Span
from arkasr.text import TextRules

BATCH_SIZE = 16
LONGEST_TURN_S = 0.05  # hours of silence are one piece
ALONE = 3  # takes that need no thread: a short recording is its span, its end, and the end of all
MAX_BATCH_SIZE = 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _End:
    """Of a recording: seconds of audio, and of work to decode and cut it."""

    duration_s: float
    load_s: float


@dataclass(frozen=True)
class _Piece:
    """A span of a recording, its end, or why there is no more of it."""

    source: AudioSource
    content: Span | _End | ArkASRError


class Transcriber:
    """A recognizer: an engine and the token rules of its checkpoint, if it gives ids."""

    def __init__(self, engine: Engine, rules: TextRules | None = None, *, turns: Turns | None = None) -> None:
        """Most callers want `load_model`; with `turns`, audio is decoded and cut in turn with others."""
        self.engine = engine
        self.rules = rules
        self._turns = turns or Turns(sys.maxsize)

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # a path is also an iterable of characters
        self, audio: AudioSource, *, options: DecodeOptions = ..., vad: bool = ..., batch_size: int = ...
    ) -> Transcript: ...
    @overload
    def transcribe(
        self, audio: Iterable[AudioSource], *, options: DecodeOptions = ..., vad: bool = ..., batch_size: int = ...
    ) -> Iterator[Transcript]: ...

    def transcribe(
        self,
        audio: AudioSource | Iterable[AudioSource],
        *,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        vad: bool = True,
        batch_size: int = BATCH_SIZE,
    ) -> Transcript | Iterator[Transcript]:
        """Transcribe one recording of any length, or lazily each of an iterable, in order.

        Args:
            audio: a path, "-", bytes, a binary file object or (array, sample rate); or an iterable of these.
            options: how to decode.
            vad: whether a voice activity detector says where speech is; without, all audio is taken for speech.
            batch_size: spans that share a pass through the network; the text does not depend on it.

        Raises:
            AudioError: a recording cannot be read.
            NoAnswerError: an endpoint did not answer to a part of it.
        """
        if isinstance(audio, str | os.PathLike | bytes | Readable) or _is_array(audio):
            return next(self._transcripts([audio], options, vad, batch_size))  # type: ignore[list-item]
        return self._transcripts(audio, options, vad, batch_size)  # type: ignore[arg-type]

    def _transcripts(
        self, sources: Iterable[AudioSource], options: DecodeOptions, vad: bool, batch_size: int
    ) -> Iterator[Transcript]:
        for _, outcome in self.outcomes(sources, options=options, vad=vad, batch_size=batch_size):
            if isinstance(outcome, ArkASRError):
                raise outcome
            yield outcome

    def outcomes(
        self,
        sources: Iterable[AudioSource],
        *,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        vad: bool = True,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[tuple[AudioSource, Transcript | ArkASRError]]:
        """Each source with its transcript, or with the error that a bad one met; lazily and in order."""
        said: list[Segment] = []
        timings_s: dict[str, float] = {}
        for source, content in self._heard(sources, options, vad, batch_size):
            if isinstance(content, tuple):
                segments, spent_s = content
                said += segments
                timings_s |= {stage: timings_s.get(stage, 0.0) + seconds for stage, seconds in spent_s.items()}
                continue
            if isinstance(content, _End):
                load_s = {"load": content.load_s}
                yield source, Transcript(audio.describe(source), tuple(said), content.duration_s, load_s | timings_s)
            else:
                yield source, content
            said, timings_s = [], {}

    def segments(
        self,
        source: AudioSource,
        *,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        vad: bool = True,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[Segment]:
        """The segments of one recording, each as soon as it is known.

        Raises:
            AudioError: it cannot be read, or not to its end.
            NoAnswerError: an endpoint did not answer to a part of it.
        """
        for _, content in self._heard([source], options, vad, batch_size):
            if isinstance(content, ArkASRError):
                raise content
            if isinstance(content, tuple):
                yield from content[0]

    def _heard(
        self, sources: Iterable[AudioSource], options: DecodeOptions, vad: bool, batch_size: int
    ) -> Iterator[tuple[AudioSource, tuple[list[Segment], dict[str, float]] | _End | ArkASRError]]:
        """Of each source its segments in order, with the seconds spent; then its end, or its error."""
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise UsageError(f"batch_size is {batch_size}; give 1..{MAX_BATCH_SIZE}")
        recognizer = Recognizer(self.engine, self.rules, options, vad=vad)
        before: Span | None = None
        held: list[Segment] = []  # the last segment: words of a span that overlaps may yet be cut off it
        lost = False  # whether one of its spans got no answer: that was told, and the rest of it is dropped
        with _Ahead(_pieces(sources, vad, self._turns), size=2 * batch_size) as ahead:
            while pieces := ahead.take(batch_size):
                if lost:  # no more is asked of it
                    left = (n for n, piece in enumerate(pieces) if not isinstance(piece.content, Span))
                    pieces = pieces[next(left, len(pieces)) :]
                heard = recognizer.segments([piece.content for piece in pieces if isinstance(piece.content, Span)])
                for piece in pieces:
                    content = next(heard) if isinstance(piece.content, Span) else piece.content
                    if lost:
                        lost = isinstance(piece.content, Span)
                        continue
                    if isinstance(content, tuple):
                        assert isinstance(piece.content, Span)
                        segments, spent_s = content
                        if before is not None and piece.content.overlap:
                            held, segments = joined(held, segments, before, piece.content)
                        yield piece.source, (held, spent_s)
                        held, before = segments, piece.content
                        continue
                    if held:
                        yield piece.source, (held, {})
                    held, before = [], None
                    if isinstance(piece.content, Span):
                        lost, first_s = True, piece.content.start / audio.SAMPLE_RATE
                        content = NoAnswerError(f"{audio.describe(piece.source)}: from {first_s:.2f} s: {content}")
                    yield piece.source, content


def _pieces(sources: Iterable[AudioSource], vad: bool, turns: Turns) -> Iterator[_Piece]:
    """Every source decoded and cut; errors stand in their places."""
    for source in sources:
        clock = _Clock(turns)
        try:
            for span in segment.split(clock.blocks(audio.stream(source)), vad=vad):
                clock.pause()
                if len(span.waveform) >= audio.HOP_SAMPLES:
                    yield _Piece(source, span)
                clock.go_on()
            clock.pause()
            if clock.num_samples < audio.HOP_SAMPLES:
                raise AudioError(
                    f"{audio.describe(source)}: {clock.num_samples} samples at 16 kHz, less than one 10 ms frame; "
                    "nothing to transcribe"
                )
            yield _Piece(source, _End(clock.num_samples / audio.SAMPLE_RATE, clock.spent_s))
        except ArkASRError as error:
            clock.pause()
            yield _Piece(source, error)
        finally:
            clock.pause()


class _Clock:
    """Counts samples, and seconds of its turns while it is not paused."""

    def __init__(self, turns: Turns) -> None:
        self.num_samples = 0
        self.spent_s = 0.0
        self._turns = turns
        self._since: float | None = None
        self.go_on()

    def go_on(self) -> None:
        self._turns.acquire()
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.spent_s += time.perf_counter() - self._since
            self._since = None
            self._turns.release()

    def blocks(self, blocks: Iterable[Waveform]) -> Iterator[Waveform]:
        for block in blocks:
            self.num_samples += len(block)
            yield block
            if self._since is not None and time.perf_counter() - self._since > LONGEST_TURN_S:
                self.pause()
                self.go_on()


class _Ahead:
    """Runs an iterator, after its first items in a thread, some items ahead of those who take them."""

    def __init__(self, items: Iterator[_Piece], *, size: int) -> None:
        self._items = items
        self._queue: queue.Queue[_Piece | BaseException | None] = queue.Queue(size)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._ended = False
        self._num_alone = 0
        self._thread = threading.Thread(target=self._run, name="arkasr-ahead", daemon=True)

    def __enter__(self) -> Self:
        atexit.register(self.__exit__)  # of a generator that is never closed; the network must not run into the exit
        return self

    def __exit__(self, *_: object) -> None:
        atexit.unregister(self.__exit__)
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(1)  # it may wait for a pipe, and somebody may have pressed Ctrl-C for that

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - whatever the caller's own iterable raises is the caller's
            last = error
        self._put(last)

    def _put(self, item: _Piece | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def take(self, most: int) -> list[_Piece]:
        """What is there, at least one item; none at the end."""
        if self._num_alone < ALONE:
            self._num_alone += 1
            first = next(self._items, None)
            self._ended = first is None
            return [] if first is None else [first]
        if self._thread.ident is None and not self._ended:
            self._thread.start()
        taken: list[_Piece] = []
        while len(taken) < most and not self._ended:
            try:
                item = self._queue.get(block=not taken)
            except queue.Empty:
                break
            if isinstance(item, _Piece):
                taken.append(item)
                continue
            self._ended, self._error = True, item
        if not taken and self._error is not None:
            raise self._error
        return taken


def _is_array(source: object) -> bool:
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray)


def load_model(
    model: str | Path = "tiny",
    *,
    engine: EngineName | Engine = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
    report: Callable[[str], object] = _log.info,
) -> Transcriber:
    """A recognizer from a built-in name or a checkpoint's folder.

    Args:
        model: "tiny", "0.6b", "3b", "ORG/NAME@COMMIT" of a hub, or a folder in the published layout.
        engine: a name, or any object with the Engine protocol.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (int8 on a CPU), "float32", "int8", "int4", "bfloat16" or "float16".
        report: takes a line when something takes long, such as the first conversion for the CPU.

    Raises:
        ModelNotFoundError: no such model.
        CheckpointMismatchError: the checkpoint is damaged or contradicts itself.
        MissingExtraError: the engine's packages are not installed.
    """
    source = checkpoint.open_checkpoint(model)
    if isinstance(engine, str):
        engine = engines.load_engine(source, name=engine, device=device, dtype=dtype, report=report)
    return Transcriber(engine, source.rules)
