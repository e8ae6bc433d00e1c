"""One system over one test set: a manifest as the Open ASR Leaderboard has it, and a record of how it came about.

    survey -> warm-up -> batches: decode (not timed), hear (timed), write -> run.json says that it is complete

A line is on the disk before the next batch is heard. Unusual: a run that was stopped goes on at the beginning of the
batch it was in, so that each batch has the company it would have had: the finished manifest is that of a run without
a pause, but for the times.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Self

from filelock import FileLock, Timeout

from arkasr import record
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import AudioError, UsageError, quoted
from arkasr.evaluate import manifest
from arkasr.evaluate.datasets import Dataset, Survey
from arkasr.evaluate.rows import Item
from arkasr.evaluate.systems import Heard, System
from arkasr.files import write_text_atomically

FORMAT = 1
PADDED_S = 2.0  # ARK's runner counts a shorter clip as this long; for comparison alone
_ELLIPSES = re.compile(r"…[.…]*|\.[.…]+")

Progress = Callable[[int, int], object]  # takes rows done and rows in all


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        manifest: its results.
        record: run.json beside it.
        rows: in the manifest.
        resumed: of them, how many an earlier run had written.
        failed: "ID: why" of each row that could not be heard, which counts as all deletions.
        survey: of the set, with what was left out of it.
    """

    manifest: Path
    record: Path
    rows: int
    resumed: int
    failed: tuple[str, ...]
    survey: Survey


def without_ellipses(text: str) -> str:
    """The text without "…" and runs of dots, which the leaderboard's normalizer would make words of."""
    return " ".join(_ELLIPSES.sub(" ", text).split())


def with_plain_apostrophes(text: str) -> str:
    """The text with ' for ’, without which contractions are not known; ‘ would glue a quotation to the word before."""  # noqa: RUF002
    return text.replace("’", "'")  # noqa: RUF001


def without_half_characters(text: str) -> str:
    """The text with ? for half a surrogate pair, which no file in UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()


CLEAN_UP: tuple[Callable[[str], str], ...] = (without_half_characters, without_ellipses, with_plain_apostrophes)


def clean_up(text: str) -> str:
    """A hypothesis as it is written into a manifest."""
    for step in CLEAN_UP:
        text = step(text)
    return text


def run(
    dataset: Dataset,
    system: System,
    output_folder: Path,
    *,
    batch_size: int,
    warmup_batches: int = 10,
    limit: int | None = None,
    report: Progress = lambda _done, _all: None,
) -> RunResult:
    """Have a set heard, or go on where an earlier run was stopped.

    Args:
        dataset: what is heard; rows without readable audio are written with an error and no text.
        system: who hears it.
        output_folder: of one model; gets the manifest and run.json.
        batch_size: clips that are heard together.
        warmup_batches: the first batches are heard so many times before the clock runs.
        limit: rows to hear, the first ones; None for all.
        report: takes rows done and rows in all, after each batch.

    Raises:
        UsageError: the set cannot be scored, what is in the folder came about otherwise, or it cannot be written.
    """
    _check(dataset, batch_size, warmup_batches, limit)
    survey = dataset.survey()
    num_rows = survey.kept if limit is None else min(limit, survey.kept)
    options = {
        "batch_size": batch_size, "warmup_batches": warmup_batches, "limit": limit,
        "clean_up": [step.__name__ for step in CLEAN_UP], "timing": "batch time / batch size, without file decoding",
    }  # fmt: skip
    asked = {
        "system": system.facts(), "dataset": _facts(dataset, survey), "options": options,
        "versions": record.versions(), "hardware": record.hardware(),
    }  # fmt: skip
    with _Output(output_folder, manifest.file_name(system.name, *dataset.title), system.name, asked) as output:
        resumed = output.begin(num_rows, batch_size, dataset)
        if resumed < num_rows:
            _warm_up(dataset, system, min(num_rows, warmup_batches * batch_size), batch_size)
        done = 0
        for batch in _batches(islice(dataset, num_rows), batch_size):
            if done < resumed:
                output.compare(done, batch)
            else:
                output.add([_row(dataset, output_folder, *heard) for heard in _hear(system, batch)])
            done += len(batch)
            report(done, num_rows)
        if done != num_rows:
            raise UsageError(f"{dataset.place}: {done} rows now, {num_rows} a moment ago; leave the set alone")
        output.finish()
        return RunResult(output.path, output.record, done, resumed, tuple(output.failed), survey)


def _check(dataset: Dataset, batch_size: int, warmup_batches: int, limit: int | None) -> None:
    if not dataset.has_audio:
        raise UsageError(f"{dataset.place}: somebody's results, without audio; score them with `ark-asr eval score`")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("warmup_batches", warmup_batches, 0),
        ("limit", limit, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}; give at least {least}")


def _facts(dataset: Dataset, survey: Survey) -> dict[str, Any]:
    return {
        "name": dataset.name, "config": dataset.config, "split": dataset.split, "kind": dataset.kind,
        "language": dataset.language, "regime": dataset.regime, "revision": dataset.revision,
        "normalizer": dataset.normalizer.name if dataset.normalizer else None, "rows": survey.rows, "kept": survey.kept,
        "dropped": dict(survey.dropped), "references_sha256": survey.references_sha256,
    }  # fmt: skip


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _decode(item: Item) -> Waveform | AudioError:
    try:
        return item.waveform()
    except AudioError as error:  # what no row could be spared, as a condition that cannot be made, ends the run
        return error


def _hear(system: System, batch: Sequence[Item]) -> list[tuple[Item, Waveform | AudioError, Heard]]:
    """Each row with its audio and what is heard in it; a row whose audio fails has no part in the batch."""
    decoded = [_decode(item) for item in batch]
    sound = [waveform for waveform in decoded if not isinstance(waveform, AudioError)]
    answers = iter(system.hear(sound) if sound else [])
    heard = [Heard("", 0.0, error=str(one)) if isinstance(one, AudioError) else next(answers) for one in decoded]
    assert next(answers, None) is None
    return list(zip(batch, decoded, heard, strict=True))


def _warm_up(dataset: Dataset, system: System, num_rows: int, batch_size: int) -> None:
    """Hear the first batches, for nothing."""
    for batch in _batches(islice(dataset, num_rows), batch_size):
        _hear(system, batch)


def _row(dataset: Dataset, folder: Path, item: Item, waveform: Waveform | AudioError, heard: Heard) -> manifest.Row:
    """A line of the manifest, whose audio is told from its folder.

    Without audio it has neither time nor duration, so nobody makes a speed of it.
    """
    duration_s = None if isinstance(waveform, AudioError) else len(waveform) / SAMPLE_RATE
    ours: dict[str, Any] = {
        "id": item.id, "set": "/".join(filter(None, dataset.title)), "speaker": item.speaker,
        "language": item.language or dataset.language,
        "audio": os.path.relpath(item.audio, folder) if isinstance(item.audio, Path) else None,
        "padded_duration": None if duration_s is None else max(duration_s, PADDED_S),
        "flags": list(heard.flags) or None, "confidence": heard.confidence, "error": heard.error,
    }  # fmt: skip
    return manifest.Row(
        audio_filepath=PurePosixPath(item.id).name or item.id,
        duration=duration_s,
        time=None if duration_s is None else heard.seconds,
        text=item.text,
        pred_text="" if heard.error else clean_up(heard.text),
        parent_id=item.parent_id,
        chunk_index=item.chunk_index,
        x={**item.x, **{key: value for key, value in ours.items() if value is not None}},
    )


class _Output:
    """The manifest and its entry in run.json, of which one process at a time may write."""

    def __init__(self, folder: Path, file_name: str, model: str, asked: Mapping[str, Any]) -> None:
        self.path, self.record = folder / file_name, folder / manifest.RUN
        self.failed: list[str] = []
        self._model, self._asked = model, json.loads(json.dumps(asked))
        self._lock = FileLock(folder / f".{manifest.RUN}.lock")
        self._rows: list[dict[str, Any]] = []
        self._entry: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UsageError(
                    f"{self.path.parent}: another process is at work here; wait for it or end it"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be written ({error.strerror}); make room, or give another folder"
            ) from None

    def begin(self, num_rows: int, batch_size: int, dataset: Dataset) -> int:
        """Record what was asked for; how many rows are there already.

        Raises:
            UsageError: what is there is of another model, set or option.
        """
        whole = self._read_record()
        if whole.get("model", self._model) != self._model:
            raise UsageError(f"{self.record}: of {whole['model']}, not {self._model}; give another folder")
        earlier = whole.get("sets", {}).get(self.path.name)
        sessions = []
        if self.path.exists():
            if earlier is None:
                raise UsageError(f"{self.path}: {manifest.RUN} does not say how it came about; move it away")
            if changed := _difference({key: earlier.get(key) for key in self._asked}, self._asked):
                raise UsageError(f"{self.path}: cannot be gone on with, {changed}; give another folder, or delete it")
            sessions = earlier.get("sessions", [])
            self._read_rows(num_rows, batch_size)
        session = {**record.session(), "place": dataset.place, "from_row": len(self._rows)}
        self._entry = {**self._asked, "num_rows": num_rows, "complete": False, "sessions": [*sessions, session]}
        self._write_record()
        return len(self._rows)

    def _read_record(self) -> dict[str, Any]:
        if not self.record.exists():
            return {}
        try:
            whole = json.loads(self.record.read_bytes())
            if whole["format"] == FORMAT and isinstance(whole["model"], str) and isinstance(whole["sets"], dict):
                return whole  # type: ignore[no-any-return]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        raise UsageError(f"{self.record}: not a record of arkasr; move it away, or give another folder")

    def _read_rows(self, num_rows: int, batch_size: int) -> None:
        """Take whole batches of what is there; what a killed process wrote of another one is cut off."""
        content = self.path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if len(lines) < num_rows:
            del lines[len(lines) // batch_size * batch_size :]
        try:
            self._rows = [json.loads(line) for line in lines]
            self.failed = [f"{row['x']['id']}: {row['x']['error']}" for row in self._rows if "error" in row["x"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UsageError(f"{self.path}: damaged; delete it, and run again") from None
        if len(lines) > num_rows:
            raise UsageError(f"{self.path}: {len(lines)} rows, the set has {num_rows}; delete it, and run again")
        with self._writing():
            os.truncate(self.path, sum(map(len, lines)))

    def compare(self, start: int, batch: Sequence[Item]) -> None:
        """Check that the rows there, from `start` on, are those of these items.

        Raises:
            UsageError: they are not.
        """
        for row, item in zip(self._rows[start : start + len(batch)], batch, strict=True):
            if (row["x"]["id"], row["text"]) != (item.id, item.text):
                raise UsageError(
                    f"{self.path}: has row {quoted(row['x']['id'])} where the set has {quoted(item.id)}; delete it, "
                    "and run again"
                )

    def add(self, rows: Sequence[manifest.Row]) -> None:
        """Write the lines of a batch."""
        with self._writing(), self.path.open("ab") as file:
            for row in rows:
                file.write(manifest.line(row).rstrip("\n").encode("utf-8", "backslashreplace") + b"\n")
                file.flush()
                if "error" in row.x:
                    self.failed.append(f"{row.x['id']}: {row.x['error']}")
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Record that nothing is missing."""
        self._entry |= {"complete": True, "failed": len(self.failed)}
        self._write_record()

    def _write_record(self) -> None:
        whole = self._read_record() or {"format": FORMAT, "model": self._model, "sets": {}}
        whole["sets"][self.path.name] = self._entry
        with self._writing():
            write_text_atomically(self.record, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def _difference(was: object, now: object, name: str = "") -> str:
    """The first thing by which two records differ, in words; "" if they do not."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            if said := _difference(was.get(key), now.get(key), f"{name}.{key}" if name else key):
                return said
        return ""
    return "" if was == now else f"{name} was {quoted(was)} and is {quoted(now)}"
