"""Many files: which there are, where their texts go, and a journal by which a stopped job goes on.

A file's outputs are written and renamed first, then its line goes into the journal: whatever stops a job, outputs are
whole, and of what the journal does not name at most the file in flight was done.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from arkasr import results
from arkasr.engines import DecodeOptions
from arkasr.errors import ArkASRError, UsageError
from arkasr.files import PART, write_text_atomically
from arkasr.results import SubtitleOptions, Transcript
from arkasr.transcribe import Transcriber, load_model

# What is taken for audio in a folder; a file that is named is taken whatever it is called.
SUFFIXES = frozenset({
    ".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".oga",
    ".ogg", ".opus", ".rf64", ".w64", ".wav", ".webm", ".wma",
})  # fmt: skip
JOURNAL = "arkasr.jobs"
_LINE_START = b'{"audio": "'


@dataclass(frozen=True)
class Input:
    """A file to be transcribed: its name, "-" for standard input, and the path of its outputs without their suffix."""

    name: str
    stem: Path


def find(names: Sequence[str], *, recursive: bool = False) -> list[Input]:
    """The files that are named, and with `recursive` the audio files in folders that are, in the order of their names.

    Raises:
        UsageError: a folder cannot be read, or has no audio files.
    """
    found: list[Input] = []
    for name in names:
        if recursive and os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            inputs = [Input(str(path), path.relative_to(name).with_suffix("")) for path in _audio_files(Path(name))]
            if not inputs:
                raise UsageError(f"{name}: no audio files in it; name the files themselves")
        else:
            inputs = [Input(name, Path("stdin" if name == "-" else Path(name).stem))]
        found += inputs
    return found


def distinct(inputs: Iterable[Input]) -> list[Input]:
    """Each input once.

    Raises:
        UsageError: two would have the same outputs.
    """
    taken: dict[Path, Input] = {}
    for one in inputs:
        other = taken.setdefault(one.stem, one)
        if other.name != one.name:
            raise UsageError(f"{one.name} and {other.name} would have the same outputs; rename one")
    return list(taken.values())


def _audio_files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None

    return sorted(
        Path(where) / name
        for where, _, names in os.walk(folder, onerror=fail)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    )


def shard(inputs: Sequence[Input], part: str) -> list[Input]:
    """The i-th of n parts, written "i/n", of a job that several machines share.

    Raises:
        UsageError: it is not written so, or i is not in 1..n.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"shard is {part!r}; give i/n, the i-th of n parts, as in 1/4")
    return list(inputs[number - 1 :: count])


class Outputs:
    """The folder of a job: outputs of each file in some formats, and the journal of what was done.

    The journal, arkasr.jobs.jsonl (of a shard arkasr.jobs.i-of-n.jsonl), has a line a file: audio, text, duration and
    seconds of work, outputs and flags, or its error.
    """

    def __init__(
        self, folder: Path, formats: Iterable[str], options: SubtitleOptions, *, part: str = "1/1", resume: bool = False
    ) -> None:
        """Begin a job, or with `resume` go on with it.

        Raises:
            UsageError: the folder cannot be written, or another process is at this job.
        """
        self._folder, self._formats, self._options = folder, list(formats), options
        ending = "" if part == "1/1" else "." + part.replace("/", "-of-")
        self.journal = folder / f"{JOURNAL}{ending}.jsonl"
        self._lock = FileLock(folder / f".{self.journal.name}.lock")
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UsageError(f"{folder}: another process is at this job; wait for it or end it") from None
            self._done = _read_journal(self.journal) if resume else {}
            self._file = self.journal.open("ab" if resume else "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        with suppress(OSError):  # of a line that `add` could not write, and said so
            self._file.close()
        self._lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"{str(error.filename or self._folder).removesuffix(PART)}: cannot be written ({error.strerror}); "
                "make room or give another --output-dir"
            ) from None

    def _paths(self, one: Input) -> dict[str, Path]:
        return {name: self._folder / one.stem.with_name(f"{one.stem.name}.{name}") for name in self._formats}

    def is_done(self, one: Input) -> bool:
        """Whether the journal has it without an error, and its outputs are there."""
        return "error" not in self._done.get(one.name, {"error": ""}) and all(
            path.is_file() for path in self._paths(one).values()
        )

    def add(self, one: Input, outcome: Transcript | ArkASRError) -> None:
        """Write a file's outputs, whole, and then its line in the journal.

        Raises:
            UsageError: they cannot be written.
        """
        record: dict[str, Any] = {"audio": one.name}
        with self._writing():
            if isinstance(outcome, Transcript):
                for name, path in self._paths(one).items():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    text = io.StringIO()
                    results.WRITERS[name](outcome, text, self._options)
                    write_text_atomically(path, text.getvalue())
                record |= {
                    "text": outcome.text,
                    "duration": round(outcome.duration_s, 4),
                    "seconds": round(sum(outcome.timings_s.values()), 3),
                    "outputs": [str(path.relative_to(self._folder)) for path in self._paths(one).values()],
                    "flags": sorted({flag for segment in outcome.segments for flag in segment.flags}),
                }
            else:
                record["error"] = str(outcome)
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _read_journal(path: Path) -> dict[str, Mapping[str, Any]]:
    """The last record of each file; a line that a killed process did not finish is cut off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    torn = data[len(whole) :]
    try:
        done = {record["audio"]: record for record in map(json.loads, whole.splitlines())}
    except (ValueError, TypeError, KeyError, RecursionError):
        done = None
    if done is None or torn[: len(_LINE_START)] != _LINE_START[: len(torn)]:
        raise UsageError(f"{path}: not a journal of arkasr; delete it, or give another --output-dir")
    if torn:
        os.truncate(path, len(whole))
    return done


class BatchTranscriber:
    """A callable for `ray.data.Dataset.map_batches` and other pools: columns in, columns out.

    It can be pickled before its first call, at which the model is loaded, once in each process.
    """

    def __init__(self, model: str = "tiny", *, column: str = "audio", options: DecodeOptions = DecodeOptions()) -> None:  # noqa: B008 - frozen
        """`column` has paths, or the bytes of files."""
        self._model, self._column, self._options = model, column, options
        self._transcriber: Transcriber | None = None

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The batch with the columns text, confidence and error ("" where all went well)."""
        if self._transcriber is None:
            self._transcriber = load_model(self._model)
        sources = [bytes(one) if isinstance(one, bytes | bytearray) else str(one) for one in batch[self._column]]
        outcomes = [outcome for _, outcome in self._transcriber.outcomes(sources, options=self._options)]
        rows = [("", 0.0, str(o)) if isinstance(o, ArkASRError) else (o.text, o.confidence, "") for o in outcomes]
        kinds = {"text": str, "confidence": float, "error": str}  # also of no rows
        columns = {name: [row[n] for row in rows] for n, name in enumerate(kinds)}
        return {**batch, **{name: np.array(values, kinds[name]) for name, values in columns.items()}}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_transcriber": None}
