"""A speech-to-text backend for CircuitForge's programs (cf-voice, cf-stt), whose protocol is duck-typed: no dependency.

    bytes -> Transcriber over the one shared engine -> segments -> calibrated confidences -> STTResult

Unusual: a confidence is the probability that a word is right, as measured on recordings that the model never heard; a
model that nobody measured keeps its own, raw one, and says so.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np

from arkasr import audio as sounds
from arkasr import checkpoint, engines, files, guards
from arkasr.audio import AudioSource
from arkasr.checkpoint import Checkpoint
from arkasr.engines import Dtype, Engine
from arkasr.engines.shared import SharedEngine, Turns
from arkasr.errors import AudioError, UsageError, quoted
from arkasr.results import Segment, join_texts
from arkasr.text import TextRules
from arkasr.transcribe import Transcriber

DEFAULT_THRESHOLD = 0.75  # the protocol's own
BATCH_SIZE = 4  # spans that a call asks for at once; the engine fills its rows with those of others
PCM, PCM_BYTES = "<i2", 2
BYTES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}  # of a weight on a GPU
_CONTAINERS = (b"RIFF", b"fLaC", b"OggS", b"ID3")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class STTSegment:
    """What was said from `start_s` to `end_s`, and how probably a word of it is right, in [0, 1]."""

    start_s: float
    end_s: float
    text: str
    confidence: float


@dataclass(frozen=True)
class STTResult:
    """A recording's words; the fields are those of the protocol's own class, in its order.

    Ours even where theirs is installed: nobody there asks for the class, and a result is the same everywhere.

    Attributes:
        text: all that was said; "" where nobody spoke.
        confidence: how probably a word of it is right, in [0, 1]; 0 without words.
        below_threshold: whether the confidence is less than the one that was asked for.
        language: what the caller said it is; it is not detected.
        duration_s: seconds of audio.
        segments: those with words, in the order of time.
        model: name of the backend's model.
        CONFIDENCE_DEFAULT_THRESHOLD: a constant, which there is a field too.
    """

    text: str
    confidence: float
    below_threshold: bool
    language: str | None = None
    duration_s: float | None = None
    segments: list[STTSegment] = field(default_factory=list)
    model: str = ""
    CONFIDENCE_DEFAULT_THRESHOLD: float = DEFAULT_THRESHOLD


@dataclass(frozen=True)
class Calibration:
    """From an engine's confidence c, a mean probability of tokens, to the probability that a word is right.

    Its odds are e^offset (c / (1 - c))^slope: Platt's curve over log-odds, so that 0 stays 0 and 1 stays 1.
    """

    slope: float
    offset: float

    def __call__(self, confidence: float) -> float:
        """The probability, in [0, 1]; it rises with the confidence."""
        right = math.exp(self.offset) * math.pow(confidence, self.slope)
        return right / (right + math.pow(1 - confidence, self.slope))


# By the weights that were measured, so that no other model gets the numbers: runs/confidence.py makes them anew.
CALIBRATIONS = MappingProxyType(
    {
        # tiny; bench/results/2026-11-23-cpu2-confidence.json
        files.Known(5734360, "fabba2fa84b27c26788ba258367e6e600c9fc8d5e35ad8428584e286adccd5c6"): Calibration(
            slope=1.128, offset=-1.184
        ),
    }
)


class ARKASRBackend:
    """ARK-ASR behind `circuitforge_core.stt`'s `STTBackend`.

    The protocol is that of pyr0ball/circuitforge-core at commit 67493048e2617c8915b2e0c6f6dfc77af649d749 (MIT; read,
    not installed: it is in no package index). Audit: no code of a checkpoint is ever downloaded, opened or executed
    (docs/security.md); the model "3b" is pinned to commit 1e28271b79edc97635783bea65abc89195a09ed3 of its hub.

    The model is loaded once, before; calls from any number of threads share it and are decoded together.

    Attributes:
        calibration: what turns the engine's confidences into probabilities; None where they are the raw ones.
    """

    def __init__(
        self,
        engine: Engine,
        rules: TextRules | None,
        *,
        model_name: str,
        vram_mb: int = 0,
        calibration: Calibration | None = None,
        raw_pcm: bool = False,
    ) -> None:
        """Most callers want `make_ark_backend`; with `raw_pcm`, audio is 16-bit mono samples at 16 kHz, else a file."""
        turns = Turns(max(1, (os.cpu_count() or 2) - 1))  # the engine has the other core
        self._shared = SharedEngine(engine, turns=turns)
        self._rules, self._model_name, self._vram_mb, self._raw_pcm = rules, model_name, vram_mb, raw_pcm
        self._told: set[str] = set()
        self.calibration = calibration

    @property
    def model_name(self) -> str:
        """As it was asked for."""
        return self._model_name

    @property
    def vram_mb(self) -> int:
        """MiB of the weights on a GPU; 0 on the processor."""
        return self._vram_mb

    def transcribe(
        self, audio: bytes, *, language: str | None = None, confidence_threshold: float = DEFAULT_THRESHOLD
    ) -> STTResult:
        """The words of a recording of any length; waits its turn.

        Args:
            audio: a file in memory (wav, flac, mp3, ogg and others), or little-endian samples of a `raw_pcm` backend.
            language: cannot be obeyed, for the model hears the language by itself: it is told in the log, and given
                back with the result.
            confidence_threshold: in [0, 1]; below it the result says so.

        Raises:
            AudioError: empty, damaged, or no audio.
            MissingExtraError: the container needs the `av` extra.
            UsageError: no such threshold.
            EngineClosedError: the backend was closed.
        """
        if not 0 <= confidence_threshold <= 1:
            raise UsageError(f"confidence_threshold is {confidence_threshold}; give 0..1")
        if language is not None and language not in self._told:
            self._told.add(language)
            _log.warning("language %s: not obeyed; ARK-ASR hears the language by itself", quoted(language))
        transcriber = Transcriber(self._shared.caller(), self._rules, turns=self._shared.turns)
        heard = transcriber.transcribe(self._source(audio), batch_size=BATCH_SIZE)
        segments = [self._segment(segment) for segment in heard.segments if segment.text]
        confidence = overall(segments)
        return STTResult(
            text=join_texts(segment.text for segment in segments),
            confidence=confidence,
            below_threshold=confidence < confidence_threshold,
            language=language,
            duration_s=heard.duration_s,
            segments=segments,
            model=self._model_name,
        )

    def close(self) -> None:
        """Stop the engine; all who wait, and all who come, get an `EngineClosedError`."""
        self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _source(self, audio: bytes) -> AudioSource:
        """What to recognize: never a name, for that would open a file of this machine."""
        if not isinstance(audio, bytes | bytearray | memoryview):
            raise AudioError(f"audio: {type(audio).__name__}, wanted bytes; read the file first")
        audio = bytes(audio)
        if not self._raw_pcm:
            return audio
        if audio.startswith(_CONTAINERS):
            raise AudioError(f"{sounds.describe(audio)}: a file, wanted bare samples; make a backend without raw_pcm")
        if len(audio) % PCM_BYTES:
            raise AudioError(f"{sounds.describe(audio)}: not a whole number of 16-bit samples; send it whole")
        return np.frombuffer(audio, PCM), sounds.SAMPLE_RATE

    def _segment(self, said: Segment) -> STTSegment:
        confidence = said.confidence if self.calibration is None else self.calibration(said.confidence)
        return STTSegment(said.start_s, said.end_s, said.text, confidence)


def overall(segments: Sequence[STTSegment]) -> float:
    """How probably a word of all segments is right: the mean of their confidences by words; 0 without any."""
    weights = [guards.num_words(segment.text) for segment in segments]
    shares = [weight / sum(weights) for weight in weights]  # 1 of a single one, whose confidence it is to the last bit
    mean = math.fsum(segment.confidence * share for segment, share in zip(segments, shares, strict=True))
    return min(1.0, mean)


def calibration_of(source: Checkpoint) -> Calibration | None:
    """What was measured of exactly these weights; None of others, fine-tuned ones among them, and of exports."""
    if len(source.shards) != 1:
        return None
    (weights,) = source.shards
    if weights.stat().st_size not in {known.size for known in CALIBRATIONS}:
        return None  # spares reading gigabytes
    return CALIBRATIONS.get(files.measure(weights))


def make_ark_backend(
    model: str | Path = "tiny", *, device: str = "cpu", dtype: Dtype = "auto", raw_pcm: bool = False
) -> ARKASRBackend:
    """A loaded backend: on the processor with what `pip install arkasr` brings, no PyTorch.

    Args:
        model: "tiny", "0.6b", "3b", "ORG/NAME@COMMIT" of a hub, or a folder in the published layout.
        device: "cpu", or with the `torch` extra "cuda" or "cuda:N"; not "auto", lest `vram_mb` be a guess.
        dtype: "auto" is int8 on the processor and float32 on a GPU.
        raw_pcm: whether `transcribe` gets bare samples (16 bits, little-endian, mono, 16 kHz) instead of files.

    Raises:
        ModelNotFoundError, CheckpointMismatchError, MissingExtraError, UsageError: as `arkasr.load_model`.
    """
    if device == "auto":
        raise UsageError("device auto: a backend must know its memory beforehand; give cpu, cuda or cuda:N")
    source = checkpoint.open_checkpoint(model)
    engine = engines.load_engine(source, device=device, dtype=dtype)
    vram_mb = 0 if device == "cpu" else _weights_mib(source, dtype)
    return ARKASRBackend(
        engine,
        source.rules,
        model_name=str(model),
        vram_mb=vram_mb,
        calibration=calibration_of(source),
        raw_pcm=raw_pcm,
    )


def _weights_mib(source: Checkpoint, dtype: Dtype) -> int:
    count = sum(math.prod(spec.shape) for spec in checkpoint.tensor_specs(source.config))
    return math.ceil(count * BYTES[dtype] / 2**20)
