"""Utterances and the JSONL manifests they come from, shared by evaluation and training.

One JSON object a line. `audio` is a path relative to the manifest; `text` the transcript; `begin_time` and `end_time`
(seconds) select a piece of the file; `units` are the space-separated targets of the auxiliary CTC head. Where a teacher
wrote the text, `teacher` names it, `confidence` is its own, and `reference` is the text that stood there before. An
unknown field is an error, because a misspelt one would otherwise be lost without a word.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkasr import audio
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import AudioError, UsageError, quoted

FIELDS = {
    "audio", "text", "task", "begin_time", "end_time", "language", "duration", "id", "units",
    "source", "speaker", "license", "split", "sample_rate", "orig", "note", "segments",
    "teacher", "confidence", "reference",
}  # fmt: skip

MAX_LINE_CHARS = 2**20
MAX_S = 1e9
_PATH = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,4096}")


@dataclass(frozen=True)
class Utterance:
    """A piece of audio and its transcript."""

    id: str
    audio: Path
    text: str
    duration_s: float
    language: str | None = None
    begin_s: float | None = None
    end_s: float | None = None
    units: tuple[str, ...] | None = None

    def waveform(self) -> Waveform:
        """The samples, [samples] at 16 kHz.

        Raises:
            AudioError: the file cannot be read, or begin_time lies behind its end.
        """
        _check_file(self.audio)
        samples = audio.load(self.audio)
        if self.begin_s is None:
            return samples
        end = len(samples) if self.end_s is None else round(self.end_s * SAMPLE_RATE)
        piece = samples[round(self.begin_s * SAMPLE_RATE) : end]
        if len(piece) == 0:
            raise AudioError(f"{self.audio}: nothing between begin_time {self.begin_s} and end_time {self.end_s}")
        return piece


@dataclass(frozen=True)
class Record:
    """A line of a manifest: all its fields, and its utterance, or why its audio has none."""

    fields: Mapping[str, Any]
    utterance: Utterance | AudioError


def path_and_split(name: str) -> tuple[Path, str | None]:
    """Of a manifest that is named PATH or PATH:SPLIT."""
    path, _, split = name.partition(":")
    return Path(path), split or None


def read_manifest(path: Path, *, split: str | None = None) -> Iterator[Utterance]:
    """Utterances of a JSONL manifest, in order; with `split`, only records of that split.

    Raises:
        UsageError: the file is missing, or a line is not a valid record; the line is named.
        AudioError: the audio of a record cannot be read for its duration.
    """
    for record in read_records(path, split=split):
        if isinstance(record.utterance, AudioError):
            raise record.utterance
        yield record.utterance


def read_records(path: Path, *, split: str | None = None) -> Iterator[Record]:
    """As `read_manifest`, with whatever else a line says; audio that cannot be read stops nothing.

    Raises:
        UsageError: as `read_manifest`.
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON ({error}); one object a line") from None
        if not isinstance(record, dict):
            raise UsageError(f"{place}: not a JSON object; one object a line")
        if split is None or record.get("split") == split:
            try:
                utterance: Utterance | AudioError = _utterance(record, path.parent, place)
            except AudioError as error:
                utterance = error
            yield Record(record, utterance)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(MAX_LINE_CHARS + 1):
                if len(line) > MAX_LINE_CHARS:
                    raise UsageError(f"{path}: a line of over {MAX_LINE_CHARS} characters; give a JSONL manifest")
                yield line
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a JSONL manifest") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error}); give a JSONL manifest") from None


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # the loader says it better
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise AudioError(f"{path}: a device or pipe; name an audio file")


def _utterance(record: dict[str, Any], folder: Path, place: str) -> Utterance:
    def typed(key: str, kind: type | tuple[type, ...], default: object) -> Any:
        value = record.get(key, default)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, int | float) and not -MAX_S < value < MAX_S):
            raise UsageError(f"{place}: {key} is {quoted(value)}; see the manifest's fields in docs/training.md")
        return value

    unknown = record.keys() - FIELDS
    if unknown:
        raise UsageError(f"{place}: unknown field {quoted(min(unknown))}; rename or remove it")
    if not typed("audio", str, None) or not _PATH.fullmatch(record["audio"]):
        raise UsageError(f"{place}: no audio, or one that is no path; give the path of a file")
    if typed("task", str, "asr").lower() != "asr":
        raise UsageError(f"{place}: task is {quoted(record['task'])}; only asr is known")
    number = (int, float)
    begin_s, end_s, duration_s = (typed(key, number, None) for key in ("begin_time", "end_time", "duration"))
    if begin_s is not None and begin_s < 0:
        begin_s = None
    if begin_s is None or (end_s is not None and end_s <= begin_s):
        end_s = None
    path = folder / record["audio"]
    _check_file(path)
    if duration_s is None:
        duration_s = end_s - begin_s if begin_s is not None and end_s is not None else audio.duration_s(path)
    units = typed("units", str, None)
    return Utterance(
        id=typed("id", str, None) or record["audio"],
        audio=path,
        text=" ".join(typed("text", str, "").split()),
        duration_s=float(duration_s),
        language=typed("language", str, None),
        begin_s=begin_s,
        end_s=end_s,
        units=None if units is None else tuple(units.split()),
    )
