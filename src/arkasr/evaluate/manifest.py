"""Predictions as the leaderboard exchanges them: a JSON line a row, raw texts, a file for each model and set.

What the leaderboard does not know stands under one key, `x`. Reading is lenient where its reader is (blank lines,
unknown fields); a line that cannot be read is left out, half a character is replaced, and the manifest says where.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arkasr.errors import UsageError, quoted

RUN = "run.json"  # beside manifests: what made them
_MAX_S = 1e9
_SHOWN = 5  # numbers of lines in one problem
HALF = re.compile("[\ud800-\udfff]")  # JSON can escape half a surrogate pair, which no file or aligner takes
_NAME = re.compile(r"MODEL_(?P<model>.+?)_DATASET_.+")
# "/" and "-" of a model's id are both "-" in a file's name; of these organisations the first "-" is their own.
_HYPHENATED = ("AutoArk-AI", "abr-ai", "distil-whisper", "ibm-granite", "zai-org")


@dataclass(frozen=True)
class Row:
    """One prediction; chunks of a session have its `parent_id`, their `chunk_index` and all of its text.

    Attributes:
        audio_filepath: name of the audio.
        duration: seconds of audio, unpadded; None if not known.
        time: seconds that recognizing took; None if not measured.
        text: raw reference.
        pred_text: raw hypothesis.
        parent_id: the session.
        chunk_index: from 0.
        x: our extension: "id", "speaker", "language", "set", "padded_duration", "snr", "condition", "audio", "flags",
            "confidence", "error".
    """

    audio_filepath: str
    duration: float | None
    time: float | None
    text: str
    pred_text: str
    parent_id: str | None = None
    chunk_index: int | None = None
    x: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The rows of a file, which of its lines are none, and which are not quite as they were written."""

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


def read(path: Path) -> Manifest:
    """The manifest in a file; its problems and repairs name every kind of line, how many there are, and where.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a manifest of predictions") from None
    rows: list[Row] = []
    malformed: dict[str, list[int]] = defaultdict(list)
    repaired: list[int] = []
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            try:
                record, is_whole = _record(raw)
                rows.append(_row(record))
            except UsageError as error:
                malformed[str(error)].append(number)
            else:
                repaired += [] if is_whole else [number]
    problems = tuple(
        f"{_lines(numbers, 'malformed line')} left out ({why}): {_places(numbers)}"
        for why, numbers in malformed.items()
    )
    repairs = f"{_lines(repaired, 'line')} with half a character, read as \ufffd: {_places(repaired)}"
    return Manifest(path, tuple(rows), problems, (repairs,) if repaired else ())


def _lines(numbers: Sequence[int], what: str) -> str:
    return f"{len(numbers)} {what}{'s'[: len(numbers) > 1]}"


def _places(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")


def _record(raw: bytes) -> tuple[Any, bool]:
    """What a line holds, and whether it does without half characters, in whose places are replacement characters."""
    try:
        record = json.loads(raw.decode())
        if b"\\u" in raw and HALF.search(text := json.dumps(record, ensure_ascii=False)):
            return json.loads(HALF.sub("\ufffd", text)), False
    except (ValueError, RecursionError):
        raise UsageError("not JSON in UTF-8") from None
    return record, True


def _row(record: Any) -> Row:
    """The row of what a line holds."""
    if not isinstance(record, dict):
        raise UsageError("not a JSON object")
    for column in ("audio_filepath", "text", "pred_text"):
        if column not in record:
            raise UsageError(f"no column {column!r}")
    index = record.get("chunk_index")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
        raise UsageError("'chunk_index' is no whole number")
    return Row(
        _string(record, "audio_filepath"), _seconds(record, "duration"), _seconds(record, "time"),
        _string(record, "text"), "" if record["pred_text"] is None else _string(record, "pred_text"),
        None if record.get("parent_id") is None else _string(record, "parent_id"), index, _extension(record),
    )  # fmt: skip


def _string(record: dict[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise UsageError(f"{column!r} is no text")
    return value


def _seconds(record: Mapping[str, Any], column: str) -> float | None:
    value = record.get(column)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_S:
        raise UsageError(f"{column!r} is no number of seconds")
    return value


def _extension(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `x` of a line, with what scoring reads in it checked."""
    x = record.get("x")
    if x is None:
        return {}
    if not isinstance(x, dict):
        raise UsageError("'x' is no object")
    _seconds(x, "padded_duration")
    for name in ("id", "error"):
        if x.get(name) is not None:
            _string(x, name)
    flags = x.get("flags", [])
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        raise UsageError("'flags' is no list of texts")
    return x


def line(row: Row) -> str:
    """The row as a JSON line, without a line break."""
    record: dict[str, Any] = {
        "audio_filepath": row.audio_filepath, "duration": row.duration, "time": row.time,
        "text": row.text, "pred_text": row.pred_text,
    }  # fmt: skip
    optional = {"parent_id": row.parent_id, "chunk_index": row.chunk_index, "x": dict(row.x) or None}
    record |= {name: value for name, value in optional.items() if value is not None}
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def merge_chunks(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows with chunks joined to sessions, sorted by their names, and warnings of what is odd.

    Rows without a session stay as they are, before the sessions.
    """
    whole = [row for row in rows if row.parent_id is None]
    sessions: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.parent_id is not None:
            sessions[row.parent_id].append(row)
    warnings = []
    if whole and sessions:
        warnings.append(f"{len(whole)} of {len(rows)} rows have no parent_id, though others are chunks of sessions")
    for parent_id, chunks in sorted(sessions.items()):
        warnings += [f"session {quoted(parent_id)}: {oddity}" for oddity in _oddities(chunks)]
    return whole + [_session(parent_id, chunks) for parent_id, chunks in sorted(sessions.items())], warnings


def _oddities(chunks: Sequence[Row]) -> list[str]:
    indices = sorted(chunk.chunk_index for chunk in chunks if chunk.chunk_index is not None)
    oddities = []
    if len(indices) < len(chunks):
        oddities.append(f"{len(chunks) - len(indices)} chunks without a chunk_index are taken to be its last")
    if indices != list(range(len(indices))):
        shown = ", ".join(map(str, indices[:20])) + (", ..." if len(indices) > 20 else "")
        oddities.append(f"its chunks are not 0 to {len(indices) - 1}, but {shown}")
    if len({chunk.text for chunk in chunks}) > 1:
        oddities.append("its chunks have different texts, and the first one's is taken")
    return oddities


def _session(parent_id: str, chunks: Sequence[Row]) -> Row:
    chunks = sorted(chunks, key=lambda chunk: math.inf if chunk.chunk_index is None else chunk.chunk_index)
    heard = [stripped for chunk in chunks if (stripped := chunk.pred_text.strip())]
    first = chunks[0]
    x = {key: value for key, value in first.x.items() if all(chunk.x.get(key) == value for chunk in chunks)}
    x.pop("padded_duration", None)
    padded = _sum([chunk.x.get("padded_duration") for chunk in chunks])
    flags = sorted({flag for chunk in chunks for flag in chunk.x.get("flags", ())})
    errors = [str(chunk.x["error"]) for chunk in chunks if chunk.x.get("error")]
    if any(chunk.x.get("id") is not None for chunk in chunks):
        x["id"] = parent_id
    if padded is not None:
        x["padded_duration"] = padded
    if flags:
        x["flags"] = flags
    if errors:
        x["error"] = f"{len(errors)} of {len(chunks)} chunks failed: {errors[0]}"
    durations, times = ([chunk.duration for chunk in chunks], [chunk.time for chunk in chunks])
    return Row(parent_id, _sum(durations), _sum(times), first.text, " ".join(heard), x=x)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def file_name(model: str, dataset: str, config: str, split: str) -> str:
    """The leaderboard's name of a manifest; a set without configurations has the config ""."""
    return f"MODEL_{model}_DATASET_{dataset}_{config}_{split}.jsonl".replace("/", "-")


def model_of(path: Path) -> str:
    """Whose predictions a manifest has: by the run.json beside it, else by its name as far as that tells.

    Raises:
        UsageError: the run.json is none.
    """
    named = _NAME.match(path.name)
    run = path.parent / RUN
    if run.is_file():
        try:
            model = json.loads(run.read_bytes())["model"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{run}: tells no model ({error!r}); remove it or put it right") from None
        if not isinstance(model, str):
            raise UsageError(f"{run}: its model is {quoted(model)}, no name; remove it or put it right")
        if named is None or named["model"] == model.replace("/", "-"):
            return model  # another model's manifest may have been put beside
    if named is None:
        return path.stem
    model = named["model"]
    organisation = next((o for o in _HYPHENATED if model.startswith(f"{o}-")), model.partition("-")[0])
    return f"{organisation}/{model[len(organisation) + 1 :]}" if "-" in model else model
