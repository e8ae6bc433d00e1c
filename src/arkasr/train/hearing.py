"""What a teacher says of speech: a recognizer on this machine, or one behind an OpenAI-compatible endpoint.

Unusual: a local teacher's name has the hash of its files, for a checkpoint that was trained further is another teacher,
though its folder is the same.
"""

import hashlib
import math
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from arkasr import audio, checkpoint, endpoint, files, guards
from arkasr.audio import SAMPLE_RATE, AudioSource, Waveform
from arkasr.data import Utterance
from arkasr.endpoint import KEY_VARIABLE, Client
from arkasr.engines import Dtype
from arkasr.errors import AudioError, NoAnswerError, quoted
from arkasr.results import Transcript
from arkasr.transcribe import load_model

DAMAGED, NO_ANSWER = "damaged audio", "no answer"


@dataclass(frozen=True)
class Hearing:
    """What a teacher heard in an utterance of so many seconds; confidence is None where it tells none."""

    text: str
    duration_s: float
    confidence: float | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """Why nothing was heard: a reason to count, and the case."""

    reason: str
    why: str


class Teacher(Protocol):
    """Whoever hears utterances; two whose hearings could differ have different names."""

    name: str

    def hear(self, utterances: Sequence[Utterance]) -> Generator[Hearing | Failure]:
        """One outcome an utterance, in order."""
        ...


def load_teacher(name: str, *, device: str, dtype: Dtype, batch: int, parallel: int) -> Teacher:
    """An endpoint, http://HOST/v1#MODEL, or a local recognizer, which is loaded when there is something to hear.

    Args:
        name: an endpoint's, or as `load_model` takes it.
        device: of a local recognizer.
        dtype: of a local recognizer.
        batch: pieces that share a pass through a local recognizer.
        parallel: requests at a time to an endpoint.

    Raises:
        UsageError, ModelNotFoundError, CheckpointMismatchError: there is none of that name.
    """
    if name.startswith(("http://", "https://")):
        return _Endpoint(name, parallel=parallel)
    return _Recognizer(name, device=device, dtype=dtype, batch=batch)


class _Recognizer:
    """A model on this machine; a checkpoint that was trained further is another, though its folder is the same."""

    def __init__(self, name: str, *, device: str, dtype: Dtype, batch: int) -> None:
        digest = hashlib.sha256()
        for path in sorted(checkpoint.open_checkpoint(name).folder.iterdir()):
            if files.is_published(path.name):
                files.check(path)
                digest.update(f"{path.name} {files.sha256(path)}\n".encode())
        how = [asked for asked in (device, dtype) if asked != "auto"]
        self.name = " ".join([f"{name}@{digest.hexdigest()[:12]}", *how])
        self._model, self._device, self._dtype, self._batch = name, device, dtype, batch

    def hear(self, utterances: Sequence[Utterance]) -> Generator[Hearing | Failure]:
        if not utterances:
            return
        transcriber = load_model(
            self._model, device=self._device, dtype=self._dtype, report=lambda line: print(line, file=sys.stderr)
        )
        for _, outcome in transcriber.outcomes(map(_source, utterances), batch_size=self._batch):
            if isinstance(outcome, Transcript):
                yield _hearing(outcome)
            elif isinstance(outcome, AudioError):
                yield Failure(DAMAGED, str(outcome))
            else:
                raise outcome


def _source(utterance: Utterance) -> AudioSource:
    """A whole file by its path, of any length; a piece as samples that are read, or fail, in their turn."""
    if utterance.begin_s is None:
        return utterance.audio

    def samples() -> Iterator[Waveform]:
        yield utterance.waveform()

    return audio.Blocks(str(utterance.audio), samples())


def _hearing(transcript: Transcript) -> Hearing:
    segments = transcript.segments
    # Where silence around it made an empty segment heard, nothing is missing.
    flags = {flag for segment in segments for flag in segment.flags if flag != guards.EMPTY or not segment.text}
    return Hearing(_plain(transcript.text), transcript.duration_s, transcript.confidence, tuple(sorted(flags)))


def _plain(text: str) -> str:
    """On one line, as manifests are read, and without halves of characters, which no file takes."""
    return " ".join(text.encode(errors="replace").decode().split())


class _Endpoint:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, name: str, *, parallel: int) -> None:
        self._url, self._model = endpoint.place(name)
        self.name, self._parallel = name, parallel

    def hear(self, utterances: Sequence[Utterance]) -> Generator[Hearing | Failure]:
        if not utterances:
            return
        with closing(Client(self._url, key_variable=KEY_VARIABLE, parallel=self._parallel)) as client:
            yield from client.each(lambda utterance: self._ask(client, utterance), utterances)

    def _ask(self, client: Client, utterance: Utterance) -> Hearing | Failure:
        try:
            waveform = utterance.waveform()
        except AudioError as error:
            return Failure(DAMAGED, str(error))
        form = {"model": self._model, "response_format": "verbose_json", "temperature": "0"}
        if utterance.language is not None:
            form["language"] = utterance.language
        clip = {"file": ("audio.wav", endpoint.encode(waveform, "wav"), "audio/wav")}
        try:
            record = client.ask(endpoint.TRANSCRIPTIONS, data=form, files=clip)
        except NoAnswerError as error:
            return Failure(NO_ANSWER, f"{utterance.audio}: {error}")
        try:
            return _answered(record, len(waveform))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return Failure(NO_ANSWER, f"{utterance.audio}: the answer is no verbose_json: {quoted(record)}")


def _answered(record: dict[str, Any], num_samples: int) -> Hearing:
    """The hearing in an answer of verbose_json; our server flags what it doubts, texts of others are doubted here."""
    segments = record.get("segments") or []
    texts = [_plain(segment["text"]) for segment in segments] or [_plain(record["text"])]
    flags = {str(flag) for segment in segments for flag in segment.get("flags", ())}
    flags |= {flag for text in texts for flag in guards.doubts(text, (), num_samples, stopped=True)}
    logprobs = [(segment.get("avg_logprob"), len(segment.get("tokens", ())) + 1) for segment in segments]
    confidence = None
    if logprobs and all(logprob is not None for logprob, _ in logprobs):
        total = sum(logprob * weight for logprob, weight in logprobs)  # as `Transcript.confidence`
        confidence = math.exp(min(0.0, total / sum(weight for _, weight in logprobs)))
    return Hearing(_plain(record["text"]), num_samples / SAMPLE_RATE, confidence, tuple(sorted(flags)))
