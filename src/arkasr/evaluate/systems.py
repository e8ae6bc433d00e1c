"""What is measured: anything that turns waveforms into texts and says of itself what it is. Ours is here.

Unusual: the clock runs from decoded samples to text, as on the Open ASR Leaderboard, and every clip of a batch is
charged the same part of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from arkasr import audio, files, hub, pins, segment
from arkasr.audio import Waveform
from arkasr.engines import DecodeOptions, Dtype, EngineName
from arkasr.errors import NoAnswerError, UsageError
from arkasr.recognize import Recognizer, joined
from arkasr.results import Segment, Transcript
from arkasr.segment import Span
from arkasr.transcribe import MAX_BATCH_SIZE, Transcriber, load_model

__all__ = ["Heard", "OwnSystem", "System", "charged"]


@dataclass(frozen=True)
class Heard:
    """What a system says of one clip.

    Attributes:
        text: as it says it, before any clean-up.
        seconds: the clip's part of the time of its batch.
        flags: what guards said of it.
        confidence: in [0, 1], where the system has one.
        error: why there is no text.
    """

    text: str
    seconds: float
    flags: tuple[str, ...] = ()
    confidence: float | None = None
    error: str | None = None


class System(Protocol):
    """A recognizer to be measured."""

    @property
    def name(self) -> str:
        """The model's name, as results call it: ORG/NAME where it has one."""
        ...

    def facts(self) -> dict[str, Any]:
        """All that the texts may depend on, for the record: JSON; `revision` is that of the model, or None."""
        ...

    def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
        """One answer a clip, in order.

        Raises:
            ArkASRError: nothing can be heard at all; of a single bad clip, `error` tells.
        """
        ...


def charged(batch: Sequence[Heard], since: float) -> list[Heard]:
    """The answers, each charged the same part of the wall time since `time.perf_counter()` was that."""
    share = (time.perf_counter() - since) / max(1, len(batch))
    return [replace(heard, seconds=share) for heard in batch]


class OwnSystem:
    """A `Transcriber`, with all of a batch's spans in one pass where they fit."""

    def __init__(
        self,
        transcriber: Transcriber,
        *,
        name: str,
        facts: dict[str, Any] | None = None,
        batch_size: int,
        vad: bool = True,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
    ) -> None:
        """Most callers want `load`.

        Raises:
            UsageError: the batch size is not one.
        """
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise UsageError(f"batch_size is {batch_size}; give 1..{MAX_BATCH_SIZE}")
        self.name = name
        self._recognizer = Recognizer(transcriber.engine, transcriber.rules, options, vad=vad)
        self._vad, self._batch_size = vad, batch_size
        self._facts: dict[str, Any] = {
            "kind": "arkasr", "model": name, "revision": None, "engine": type(transcriber.engine).__name__,
            **(facts or {}), "batch_size": batch_size, "vad": vad, "decoding": asdict(options),
        }  # fmt: skip

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        engine: EngineName = "auto",
        device: str = "auto",
        dtype: Dtype = "auto",
        batch_size: int,
        vad: bool = True,
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        report: Callable[[str], object] = lambda _line: None,
    ) -> "OwnSystem":
        """A model on this machine; arguments and errors are those of `load_model`."""
        folder = hub.find(model)
        lock = pins.read_lock(folder)
        known = lock.files if lock else {path.name: files.measure(path) for path in _published(folder)}
        name = (lock.repo_id if lock else None) or folder.absolute().name
        facts = {
            "revision": lock.revision if lock else None,
            "files": {file: one.sha256 for file, one in sorted(known.items())},
            "asked": {"engine": engine, "device": device, "dtype": dtype},
        }
        transcriber = load_model(model, engine=engine, device=device, dtype=dtype, report=report)
        return cls(transcriber, name=name, facts=facts, batch_size=batch_size, vad=vad, options=options)

    def facts(self) -> dict[str, Any]:
        """Model, hashes of its files, engine, batch size and decoding parameters."""
        return dict(self._facts)

    def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
        """One answer a clip; a clip of less than one frame is an error."""
        since = time.perf_counter()
        spans = [list(segment.split([w], vad=self._vad)) if len(w) >= audio.HOP_SAMPLES else None for w in batch]
        said = self._segments([span for found in spans if found for span in found])
        return charged([_heard(w, found, said) for w, found in zip(batch, spans, strict=True)], since)

    def _segments(self, spans: Sequence[Span]) -> Iterator[list[Segment] | NoAnswerError]:
        for start in range(0, len(spans), self._batch_size):
            for heard in self._recognizer.segments(spans[start : start + self._batch_size]):
                yield heard if isinstance(heard, NoAnswerError) else heard[0]


def _published(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if files.is_published(path.name)]


def _heard(waveform: Waveform, spans: Sequence[Span] | None, said: Iterator[list[Segment] | NoAnswerError]) -> Heard:
    """What a clip's spans said, words that two of them heard once."""
    if spans is None:
        return Heard("", 0.0, error=f"{len(waveform)} samples, less than one frame of 10 ms; nothing to hear")
    segments: list[Segment] = []
    before: Span | None = None
    held: list[Segment] = []
    answers = [next(said) for _ in spans]
    for span, answer in zip(spans, answers, strict=True):
        if isinstance(answer, NoAnswerError):
            return Heard("", 0.0, error=str(answer))
        now = answer
        if before is not None and span.overlap:
            held, now = joined(held, now, before, span)
        segments += held
        held, before = now, span
    whole = Transcript("", (*segments, *held), len(waveform) / audio.SAMPLE_RATE)
    flags = tuple(dict.fromkeys(flag for one in whole.segments for flag in one.flags))
    return Heard(whole.text, 0.0, flags, whole.confidence)
