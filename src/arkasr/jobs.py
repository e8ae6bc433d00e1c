"""Many files: which there are, where their texts go, a journal by which a stopped job goes on, batches for others.

A file's outputs are written and renamed first, then its line goes into the journal: whatever stops a job, outputs are
whole, and of what the journal does not name at most the file in flight was done.
"""

import base64
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
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from arkasr import results
from arkasr.engines import DecodeOptions, EngineName
from arkasr.errors import ArkASRError, AudioError, NoAnswerError, UsageError, quoted
from arkasr.files import PART, write_text_atomically
from arkasr.results import SubtitleOptions, Transcript
from arkasr.text import clean
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


def write_batch(inputs: Iterable[Input], *, url: str | None = None) -> Iterator[str | ArkASRError]:
    """A line of JSON for `vllm run-batch` of each file, which is named once, or why there is none; lazily.

    Args:
        inputs: the files; the name of each is the id of its line.
        url: the address below which vLLM finds the files by their names; without, their bytes are in the lines.
    """
    for one in dict.fromkeys(inputs):
        try:
            yield _request(one.name, url)
        except OSError as error:
            yield AudioError(f"{one.name}: cannot be read ({error.strerror}); check the path")
        except AudioError as error:
            yield error


def _request(name: str, url: str | None) -> str:
    if name == "-":
        raise AudioError("-: standard input has no name to know its text by; give files")
    try:
        name.encode()
    except UnicodeEncodeError:  # vLLM reads no line of a batch with such a name in it
        raise AudioError(f"{name}: the name is not UTF-8; rename the file") from None
    with Path(name).open("rb") as file:
        content = "" if url is not None else base64.b64encode(file.read()).decode()
    where = f"data:audio/*;base64,{content}" if url is None else f"{url.rstrip('/')}/{quote(name.lstrip('/'))}"
    request = {"custom_id": name, "method": "POST", "url": "/v1/audio/transcriptions", "body": {"file_url": where}}
    return json.dumps(request)


def read_batch(batch: Path, results: Iterable[Path]) -> Iterator[str | ArkASRError]:
    """A line of JSON, with audio and text, of each line of a batch, in its order, or why there is no text.

    A text in one of several files of results, as of a second run for what failed, makes up for errors in others.

    Raises:
        UsageError: a file cannot be read or is not what it should be; or has a strange or a second, other text.
    """
    answers: dict[str, str | ArkASRError] = {}
    for place, name, _ in _records(batch):
        if name in answers:
            raise UsageError(f"{place}: {quoted(name)} has a line already; give what `ark-asr batch` wrote")
        answers[name] = NoAnswerError(f"{name}: not in the results; run it again")
    for path in results:
        for place, name, record in _records(path):
            if name not in answers:
                raise UsageError(f"{place}: {quoted(name)} is not in {batch}; give that batch's results")
            before, answer = answers[name], _answer(name, record)
            if isinstance(before, str) and isinstance(answer, str) and before != answer:
                raise UsageError(f"{place}: a second, other text of {quoted(name)}; leave one of these results out")
            answers[name] = before if isinstance(before, str) else answer
    for name, answer in answers.items():
        yield json.dumps({"audio": name, "text": answer}, ensure_ascii=False) if isinstance(answer, str) else answer


def _records(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Place, id and object of each line of a batch, or of its results."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield place, *_record(line, place)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _record(line: bytes, place: str) -> tuple[str, Mapping[str, Any]]:
    try:
        record = json.loads(line)
        name = record["custom_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        name = None
    if not isinstance(name, str):
        raise UsageError(f"{place}: not a line with a custom_id; give a batch, or its results")
    return name, record


def _answer(name: str, record: Mapping[str, Any]) -> str | ArkASRError:
    """The text of a line of vLLM's results; its errors are a message, or OpenAI's object around one."""
    match record:
        case {"error": None, "response": {"status_code": 200, "body": {"text": str(text)}}}:
            return clean(text)
        case {"error": {"error": {"message": message}}} | {"error": message}:
            return NoAnswerError(f"{name}: vLLM failed ({quoted(message)}); run it again")
    return NoAnswerError(f"{name}: the line of the results has neither text nor error; run it again")


class BatchTranscriber:
    """A callable for `ray.data.Dataset.map_batches` and other pools: columns in, columns out.

    It can be pickled before its first call, at which the model is loaded, once in each process.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        column: str = "audio",
        options: DecodeOptions = DecodeOptions(),  # noqa: B008 - frozen
        engine: EngineName = "auto",
    ) -> None:
        """`column` has paths, the bytes of files, or, as in Hugging Face's data sets, {"bytes": ..., "path": ...}."""
        self._model, self._column, self._options, self._engine = model, column, options, engine
        self._transcriber: Transcriber | None = None

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The batch with the columns text, confidence and error ("" where all went well)."""
        if self._transcriber is None:
            self._transcriber = load_model(self._model, engine=self._engine)
        values = (one["bytes"] or one["path"] if isinstance(one, Mapping) else one for one in batch[self._column])
        sources = [bytes(one) if isinstance(one, bytes | bytearray) else str(one) for one in values]
        outcomes = [outcome for _, outcome in self._transcriber.outcomes(sources, options=self._options)]
        rows = [("", 0.0, str(o)) if isinstance(o, ArkASRError) else (o.text, o.confidence, "") for o in outcomes]
        kinds = {"text": str, "confidence": float, "error": str}  # also of no rows
        columns = {name: [row[n] for row in rows] for n, name in enumerate(kinds)}
        return {**batch, **{name: np.array(values, kinds[name]) for name, values in columns.items()}}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_transcriber": None}
