"""Rows of test sets, and the layouts that are text: JSON lines of three dialects, tables, Kaldi folders.

Unusual: a record keeps its place, so that whatever is wrong with it is named by file and line.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from arkasr import audio, data
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.data import Utterance
from arkasr.errors import AudioError, UsageError, quoted
from arkasr.evaluate.manifest import HALF

# The leaderboard's order of the names that a column of references can have, and ours of the others.
TEXT = ("text", "sentence", "normalized_text", "transcript", "transcription")
AUDIO = ("audio", "audio_filepath", "path", "file_name", "file", "wav")
ID, DURATION = ("id", "utt_id", "segment_id", "file_name"), ("audio_length_s", "duration")
SPEAKER, LANGUAGE = ("speaker", "speaker_id", "client_id"), ("language", "locale")
CHUNK = ("parent_id", "chunk_index", "file_name")
_OURS = {*TEXT, *AUDIO, *ID, *DURATION, *SPEAKER, *LANGUAGE, *CHUNK, "split", "x", "begin_time", "end_time", "offset"}
_BESIDE = ("", "audio", "clips", "wavs")  # folders in which the audio of a table is looked for
NUM_NAMED = 3  # of many, how many a message names


@dataclass(frozen=True)
class Item:
    """One row of a test set.

    Attributes:
        id: unique in the set.
        audio: a file or the bytes of one; None where the set has texts alone.
        text: the reference as it was published.
        duration_s: as the set states it.
        begin_s: with `end_s`, the piece of the file that is meant.
        parent_id: the session of which it is chunk number `chunk_index`; then `text` is the whole session's.
        x: what else the set says of it: sex, region, device ...
        change: what is done to its samples before they are heard.
    """

    id: str
    audio: Path | bytes | None
    text: str
    duration_s: float | None = None
    speaker: str | None = None
    language: str | None = None
    begin_s: float | None = None
    end_s: float | None = None
    parent_id: str | None = None
    chunk_index: int | None = None
    x: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Waveform], Waveform] | None = None

    def waveform(self) -> Waveform:
        """The samples as they are heard, [samples] at 16 kHz; raises as `recorded`, and what `change` raises."""
        samples = self.recorded()
        return samples if self.change is None else self.change(samples)

    def recorded(self) -> Waveform:
        """The samples as they were recorded, [samples] at 16 kHz.

        Raises:
            AudioError: there are none, or they cannot be read.
        """
        if self.audio is None:
            raise AudioError(f"{self.id}: no audio in the data; give a set that has it")
        if isinstance(self.audio, bytes):
            return audio.load(self.audio)
        if self.begin_s is None:
            return Utterance(self.id, self.audio, "", 0.0).waveform()
        whole = recording(self.audio)
        end = len(whole) if self.end_s is None else round(self.end_s * SAMPLE_RATE)
        piece = whole[round(self.begin_s * SAMPLE_RATE) : end]
        if len(piece) == 0:
            raise AudioError(f"{self.audio}: nothing between {self.begin_s} and {self.end_s} s; check the times")
        return piece.copy()


@lru_cache(maxsize=1)
def recording(path: Path) -> Waveform:
    """A recording of which pieces are cut one after the other, decoded once for all of them."""
    return Utterance(str(path), path, "", 0.0).waveform()


def named(things: Iterable[str], what: str) -> str:
    """The first few things by name, and how many more there are."""
    listed = list(things)
    more = f" and {len(listed) - NUM_NAMED} more" if len(listed) > NUM_NAMED else ""
    return f"{what} {', '.join(map(quoted, listed[:NUM_NAMED]))}{more}"


def locate(folder: Path, name: str) -> Path:
    """Where the audio is that a table in this folder names; in the folder itself if it is nowhere."""
    paths = [folder / beside / name for beside in _BESIDE]
    try:
        return next((path for path in paths if path.is_file()), paths[0])
    except (OSError, ValueError):  # a name too long, or with a NUL; the loader says it better
        return paths[0]


class Record:
    """The fields of one row, checked; each goes by the first of its names that is there."""

    def __init__(self, place: str, fields: Mapping[str, Any]) -> None:
        self.place, self.fields = place, fields

    def text(self, *names: str) -> str | None:
        """A field that is a text."""
        name, value = self._first(names)
        if value is not None and not _is_text(value):
            raise UsageError(f"{self.place}: {name} is {quoted(value)}; give a text")
        return value  # type: ignore[no-any-return]

    def number(self, *names: str) -> float | None:
        """A field that is a number, or in a table the text of one."""
        name, value = self._first(names)
        if value is None or value == "":
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) < data.MAX_S:
            raise UsageError(f"{self.place}: {name} is {quoted(value)}; give a number")
        return number

    def item(
        self,
        default_id: str,
        source: Path | bytes | None,
        *,
        begin_s: float | None = None,
        end_s: float | None = None,
    ) -> Item:
        """The row with this audio; what is no field of ours goes into `x`.

        Raises:
            UsageError: there is no reference, or a field is not what it should be.
        """
        reference, index, given = self.text(*TEXT), self.number("chunk_index"), self.fields.get("x")
        if reference is None:
            raise UsageError(f"{self.place}: no reference; it goes by {', '.join(TEXT)}")
        others = {key: value for key, value in self.fields.items() if key not in _OURS and _is_plain(value)}
        return Item(
            id=self.text(*ID) or default_id,
            audio=source,
            text=reference,
            duration_s=self.number(*DURATION),
            speaker=self.text(*SPEAKER),
            language=self.text(*LANGUAGE),
            begin_s=begin_s,
            end_s=end_s,
            parent_id=self.text("parent_id"),
            chunk_index=None if index is None else int(index),
            x={**others, **(given if isinstance(given, dict) else {})},
        )

    def _first(self, names: Iterable[str]) -> tuple[str, Any]:
        return next(((name, self.fields[name]) for name in names if self.fields.get(name) is not None), ("", None))


def _is_text(value: object) -> bool:
    """Whether it is one, of whole characters."""
    return isinstance(value, str) and HALF.search(value) is None


def _is_plain(value: object) -> bool:
    """Whether it is one thing that JSON can say."""
    return _is_text(value) or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a text file that is not blank, behind its place.

    Raises:
        UsageError: it cannot be read, or is not text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            number = 0
            while line := file.readline(data.MAX_LINE_CHARS + 1):
                number += 1
                if len(line) > data.MAX_LINE_CHARS:
                    raise UsageError(f"{path}:{number}: over {data.MAX_LINE_CHARS} characters; give a text file")
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error}); give a text file") from None


def json_records(path: Path) -> Iterator[Record]:
    """The objects of a file that has one a line.

    Raises:
        UsageError: a line is none.
    """
    for place, line in lines(path):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON ({error}); one object a line") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{place}: not a JSON object; one object a line")
        yield Record(place, fields)


def jsonl(path: Path) -> Iterator[tuple[Record, Item]]:
    """Rows of a manifest as training has it, and whatever else a test set says of its rows."""
    for record in json_records(path):
        name = _audio_name(record, ("audio", "file_name"))
        begin_s, end_s = record.number("begin_time"), record.number("end_time")
        yield record, _piece(record, name, locate(path.parent, name), begin_s, end_s)


def nemo(path: Path) -> Iterator[tuple[Record, Item]]:
    """Rows of a NeMo manifest: with an offset, the duration is that of the piece."""
    for record in json_records(path):
        name = _audio_name(record, ("audio_filepath",))
        begin_s, length_s = record.number("offset"), record.number("duration")
        end_s = None if begin_s is None or length_s is None else begin_s + length_s
        yield record, _piece(record, name, locate(path.parent, name), begin_s, end_s)


def leaderboard(path: Path) -> Iterator[tuple[Record, Item]]:
    """Rows of somebody's results: texts, whose audio is not there to be heard."""
    for number, record in enumerate(json_records(path)):
        ours = record.fields.get("x")
        own_id = Record(record.place, ours if isinstance(ours, dict) else {}).text("id")
        default = own_id or record.text("audio_filepath") or f"sample_{number}"
        yield record, record.item(default, None)


def _audio_name(record: Record, names: tuple[str, ...]) -> str:
    name = record.text(*names)
    if not name:
        raise UsageError(f"{record.place}: no {names[0]}; give the path of a file")
    return name


def _piece(record: Record, name: str, path: Path, begin_s: float | None, end_s: float | None) -> Item:
    """A whole file, or the piece from begin_s on; times that mean nothing, such as -1, are left out."""
    if begin_s is None or begin_s < 0:
        return record.item(name, path)
    if end_s is not None and end_s <= begin_s:
        end_s = None
    default_id = f"{name}@{begin_s:g}-{'' if end_s is None else f'{end_s:g}'}"
    return record.item(default_id, path, begin_s=begin_s, end_s=end_s)


def tsv(path: Path) -> Iterator[tuple[Record, Item]]:
    """Rows of a table: with a line of names, or of two columns, audio and text."""
    names: list[str] = []
    for place, line in lines(path):
        cells = line.split("\t")
        if not names and {*AUDIO} & {*cells} and {*TEXT} & {*cells}:
            names = cells
            continue
        names = names or ["audio", "text"]
        if len(cells) != len(names):
            raise UsageError(f"{place}: {len(cells)} cells of {len(names)} ({', '.join(names)}); check its tabs")
        record = Record(place, dict(zip(names, cells, strict=True)))
        name = _audio_name(record, AUDIO)
        yield record, record.item(name, locate(path.parent, name))


def kaldi(folder: Path) -> Iterator[tuple[Record, Item]]:
    """Utterances of a Kaldi folder, in the order of `segments`, or else of wav.scp; a pipe is refused."""
    recordings = _kaldi_map(folder / "wav.scp")
    for name, source in recordings.items():
        if source.endswith("|") or source.startswith("|"):
            raise UsageError(f"{folder / 'wav.scp'}: {quoted(name)} is a pipe, which is never run; make files of it")
    texts = _kaldi_map(folder / "text")
    speakers, languages = (_kaldi_map(folder / file, needed=False) for file in ("utt2spk", "utt2lang"))
    segments = _kaldi_map(folder / "segments", needed=False) or {name: name for name in recordings}
    if missing := [name for name in segments if name not in texts]:
        raise UsageError(f"{folder / 'text'}: {named(missing, 'no reference of')}; a number would leave them out")
    if missing := [name for name in texts if name not in segments]:
        raise UsageError(f"{folder}: {named(missing, 'no audio of')}; add it, or remove them from text")
    for name, segment in segments.items():
        place = f"{folder}: {name}"
        source, *times = segment.split()
        if source not in recordings or len(times) not in (0, 2):
            raise UsageError(f"{place}: its segment is {quoted(segment)}; give a recording, begin and end")
        fields = {"text": texts[name], "speaker": speakers.get(name), "language": languages.get(name), "id": name}
        record = Record(place, fields | dict(zip(("begin_time", "end_time"), times, strict=False)))
        path = locate(folder, recordings[source])
        path = path if path.is_file() else Path(recordings[source])
        yield record, _piece(record, name, path, record.number("begin_time"), record.number("end_time"))


def _kaldi_map(path: Path, *, needed: bool = True) -> dict[str, str]:
    """The lines of a Kaldi file: a name, and what is behind it."""
    if not needed and not path.exists():
        return {}
    found: dict[str, str] = {}
    for place, line in lines(path):
        name, *rest = line.split(None, 1)
        if name in found:
            raise UsageError(f"{place}: {quoted(name)} stands twice; rows must be told apart")
        found[name] = rest[0].strip() if rest else ""
    return found


READERS: dict[str, Callable[[Path], Iterator[tuple[Record, Item]]]] = {
    "jsonl": jsonl, "nemo": nemo, "leaderboard": leaderboard, "tsv": tsv, "kaldi": kaldi
}  # fmt: skip


def of_split(found: Iterable[tuple[Record, Item]], *, split: str, place: Path) -> Iterator[Item]:
    """Rows that name this split, or none.

    Raises:
        UsageError: there are only others.
    """
    others: set[str] = set()
    empty = True
    for record, item in found:
        own = record.text("split")
        if own and own != split:
            others.add(own)
        else:
            empty = False
            yield item
    if empty and others:
        raise UsageError(f"{place}: no row of split {split!r}; it has {', '.join(sorted(others))}")
