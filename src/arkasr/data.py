"""Utterances and the JSONL manifests they come from, shared by evaluation and training.

One JSON object a line. `audio` is a path relative to the manifest; `text` the transcript; `begin_time` and `end_time`
(seconds) select a piece of the file; `units` are the space-separated targets of the auxiliary CTC head. An unknown
field is an error, because a misspelt one would otherwise be lost without a word.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkasr import audio
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import AudioError, UsageError

FIELDS = {
    "audio", "text", "task", "begin_time", "end_time", "language", "duration", "id", "units",
    "source", "speaker", "license", "split", "sample_rate", "orig", "note", "segments",
}  # fmt: skip


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
        samples = audio.load(self.audio)
        if self.begin_s is None:
            return samples
        end = len(samples) if self.end_s is None else round(self.end_s * SAMPLE_RATE)
        piece = samples[round(self.begin_s * SAMPLE_RATE) : end]
        if len(piece) == 0:
            raise AudioError(f"{self.audio}: nothing between begin_time {self.begin_s} and end_time {self.end_s}")
        return piece


def read_manifest(path: Path, *, split: str | None = None) -> Iterator[Utterance]:
    """Utterances of a JSONL manifest, in order; with `split`, only records of that split.

    Raises:
        UsageError: the file is missing, or a line is not a valid record; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a JSONL manifest") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{place}: not JSON ({error}); one object a line") from None
        if not isinstance(record, dict):
            raise UsageError(f"{place}: not a JSON object; one object a line")
        if split is None or record.get("split") == split:
            yield _utterance(record, path.parent, place)


def _utterance(record: dict[str, Any], folder: Path, place: str) -> Utterance:
    def typed(key: str, kind: type | tuple[type, ...], default: object) -> Any:
        value = record.get(key, default)
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"{place}: {key} is {value!r}; see the manifest's fields in docs/training.md")
        return value

    unknown = record.keys() - FIELDS
    if unknown:
        raise UsageError(f"{place}: unknown field {min(unknown)!r}; rename or remove it")
    if not typed("audio", str, None):
        raise UsageError(f"{place}: no audio; give the path of a file")
    if typed("task", str, "asr").lower() != "asr":
        raise UsageError(f"{place}: task is {record['task']!r}; only asr is known")
    number = (int, float)
    begin_s, end_s, duration_s = (typed(key, number, None) for key in ("begin_time", "end_time", "duration"))
    if begin_s is not None and begin_s < 0:
        begin_s = None
    if begin_s is None or (end_s is not None and end_s <= begin_s):
        end_s = None
    path = folder / record["audio"]
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
