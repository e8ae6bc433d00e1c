"""Audio to text: load, generate, to_text, Transcript. The one place where the stages meet."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np

from arkasr import audio, checkpoint, engines
from arkasr.audio import AudioSource, Readable, Waveform
from arkasr.config import MAX_CLIP_S
from arkasr.engines import DecodeOptions, Dtype, Engine, EngineName, Generation
from arkasr.errors import ArkASRError, AudioError, UsageError
from arkasr.results import Transcript
from arkasr.text import TextRules

BATCH_SIZE = 16
MAX_BATCH_SIZE = 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Clip:
    """A source and its samples, or why there are none."""

    source: AudioSource
    waveform: Waveform | None
    error: ArkASRError | None
    load_s: float


class Transcriber:
    """A recognizer: an engine and the token rules of its checkpoint."""

    def __init__(self, engine: Engine, rules: TextRules) -> None:
        """Most callers want `load_model`."""
        self.engine = engine
        self.rules = rules

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # a path is also an iterable of characters
        self, audio: AudioSource, *, options: DecodeOptions = ..., batch_size: int = ...
    ) -> Transcript: ...
    @overload
    def transcribe(
        self, audio: Iterable[AudioSource], *, options: DecodeOptions = ..., batch_size: int = ...
    ) -> Iterator[Transcript]: ...

    def transcribe(
        self,
        audio: AudioSource | Iterable[AudioSource],
        *,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        batch_size: int = BATCH_SIZE,
    ) -> Transcript | Iterator[Transcript]:
        """Transcribe one clip, or lazily each clip of an iterable, in order.

        Args:
            audio: a path, "-", bytes, a binary file object or (array, sample rate); or an iterable of these.
            options: how to decode.
            batch_size: clips that share a pass through the network; the text does not depend on it.

        Raises:
            AudioError: a clip cannot be read or is longer than 30 s.
        """
        if isinstance(audio, str | os.PathLike | bytes | Readable) or _is_array(audio):
            return next(self._transcripts([audio], options, batch_size))  # type: ignore[list-item]
        return self._transcripts(audio, options, batch_size)  # type: ignore[arg-type]

    def _transcripts(
        self, sources: Iterable[AudioSource], options: DecodeOptions, batch_size: int
    ) -> Iterator[Transcript]:
        for _, outcome in self.outcomes(sources, options=options, batch_size=batch_size):
            if isinstance(outcome, ArkASRError):
                raise outcome
            yield outcome

    def outcomes(
        self,
        sources: Iterable[AudioSource],
        *,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[tuple[AudioSource, Transcript | ArkASRError]]:
        """Each source with its transcript, or with the error that a bad clip met; lazily and in order."""
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise UsageError(f"batch_size is {batch_size}; give 1..{MAX_BATCH_SIZE}")
        remaining = iter(sources)
        while sources_of_batch := list(islice(remaining, batch_size)):
            clips = [self._load(source) for source in sources_of_batch]
            waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
            generations = iter(self.engine.generate(waveforms, options) if waveforms else [])
            for clip in clips:
                if clip.waveform is None:
                    assert clip.error is not None
                    yield clip.source, clip.error
                else:
                    yield clip.source, self._transcript(clip, clip.waveform, next(generations))

    def _load(self, source: AudioSource) -> _Clip:
        started = time.perf_counter()
        try:
            waveform = audio.load(source)
            _check_length(waveform, audio.describe(source))
        except ArkASRError as error:
            return _Clip(source, None, error, 0.0)
        return _Clip(source, waveform, None, time.perf_counter() - started)

    def _transcript(self, clip: _Clip, waveform: Waveform, generation: Generation) -> Transcript:
        started = time.perf_counter()
        text = self.rules.to_text(list(generation.ids))
        return Transcript(
            source=audio.describe(clip.source),
            text=text,
            tokens=generation.ids,
            duration_s=len(waveform) / audio.SAMPLE_RATE,
            confidence=generation.confidence,
            complete=generation.stop_logprob is not None,
            timings_s={"load": clip.load_s, **generation.timings_s, "text": time.perf_counter() - started},
        )


def _is_array(source: object) -> bool:
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray)


def _check_length(waveform: Waveform, place: str) -> None:
    samples = len(waveform)
    if samples < audio.HOP_SAMPLES:
        raise AudioError(f"{place}: {samples} samples at 16 kHz, less than one 10 ms frame; nothing to transcribe")
    if samples > MAX_CLIP_S * audio.SAMPLE_RATE:
        raise AudioError(
            f"{place}: {samples / audio.SAMPLE_RATE:.1f} s long, and clips over {MAX_CLIP_S} s are not supported yet; "
            "cut it at pauses"
        )


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
