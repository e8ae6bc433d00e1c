"""Teacher data: speech labelled by a teacher, the doubtful labels left out, as a manifest for training.

    manifests -> what the teacher hears, what a second one hears -> filters -> manifest and report

Unusual: what was heard and what is kept of it are two things. Hearings go into a journal beside the output, and filters
read them there: so a stopped job goes on, other filters cost no second hearing, and the output shows neither.
"""

import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

import arkasr
from arkasr import files, guards, metrics
from arkasr.data import Record, Utterance, path_and_split, read_records
from arkasr.engines import Dtype
from arkasr.errors import AudioError, UsageError
from arkasr.results import SPACELESS
from arkasr.train.hearing import DAMAGED, Failure, Hearing, Teacher, load_teacher
from arkasr.transcribe import MAX_BATCH_SIZE

# Of these a text may be right, and nobody knows; `guards.EMPTY` stays a flag only where nothing was heard at last.
DOUBTS = frozenset({guards.LOOP, guards.TOO_LONG, guards.TOO_FAST, guards.REPETITIVE, guards.EMPTY})
OF_THE_OLD_TEXT = frozenset({"units", "segments", "confidence"})
PROGRESS_EVERY_S = 30.0
SHOWN_FAILURES = 10
LINE_START = b'{"key": ["'


@dataclass(frozen=True)
class Config:
    """One job.

    Attributes:
        teacher: built-in name, folder, or http://HOST/v1#MODEL of an endpoint (its key in ARKASR_API_KEY).
        train: manifests of the speech, each as PATH or PATH:SPLIT; their texts are not needed.
        out: the manifest to write, NAME.jsonl; NAME.report.json and the journal NAME.heard.jsonl lie beside it.
        second: another teacher, which hears what is left and must agree.
        max_disagreement: largest word error rate between the two (characters where a script writes no spaces).
        against_text: largest word error rate between the label and the record's own text, where it has one.
        min_confidence: of a label, 0 to 1.
        min_chars_per_s, max_chars_per_s: characters of a label a second of audio.
        keep_doubtful: also keep labels of loops and whatever else the guards doubt.
        max_failures: share of utterances that may be damaged or unanswered before the job ends.
        batch: pieces that share a pass through a local teacher.
        parallel: requests at a time to an endpoint.
        device, dtype: of a local teacher, as for transcribing.
    """

    teacher: str
    train: tuple[str, ...]
    out: Path
    second: str | None = None
    max_disagreement: float = 0.2
    against_text: float | None = None
    min_confidence: float = 0.0
    min_chars_per_s: float = 0.0
    max_chars_per_s: float = 40.0
    keep_doubtful: bool = False
    max_failures: float = 0.05
    batch: int = 16
    parallel: int = 4
    device: str = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        ranges = {
            "max_disagreement": (0, math.inf), "against_text": (0, math.inf), "min_confidence": (0, 1),
            "min_chars_per_s": (0, math.inf), "max_chars_per_s": (self.min_chars_per_s, math.inf),
            "max_failures": (0, 1), "batch": (1, MAX_BATCH_SIZE), "parallel": (1, 1024),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = vars(self)[name]
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}; give {low} to {high}")
        if self.second is None and self.max_disagreement != Config.max_disagreement:
            raise UsageError("max_disagreement: has nobody to disagree; name a second teacher")
        if self.second == self.teacher:
            raise UsageError(f"second: {self.second} would agree with itself; name another teacher")
        if self.out.suffix != ".jsonl":
            raise UsageError(f"{self.out}: labels are a manifest; call it NAME.jsonl")
        if any(self.out.resolve() == path_and_split(name)[0].resolve() for name in self.train):
            raise UsageError(f"{self.out}: is a manifest to be read; give another --out")


def main(config: Config) -> None:
    """Label, or go on with it, and write manifest and report.

    Raises:
        UsageError: a manifest or teacher cannot be used, or more than `max_failures` of the utterances failed.
    """
    records = [record for name in config.train for record in _records(name)]
    if not records:
        raise UsageError(f"{', '.join(config.train)}: no utterance to label; check the split")
    teacher, second = _teacher(config.teacher, config), _teacher(config.second, config) if config.second else None
    with _Journal(config.out.with_suffix(".heard.jsonl")) as journal:
        labels = _heard(teacher, [record.utterance for record in records], journal, config)
        reasons = [_objection(config, record, label) for record, label in zip(records, labels, strict=True)]
        if second is not None:
            left = [number for number, reason in enumerate(reasons) if reason is None]
            others = _heard(second, [records[number].utterance for number in left], journal, config)
            for number, other in zip(left, others, strict=True):
                reasons[number] = _disagreement(config, labels[number], other)
        _write(config, teacher.name, records, labels, reasons)


def _teacher(name: str, config: Config) -> Teacher:
    return load_teacher(name, device=config.device, dtype=config.dtype, batch=config.batch, parallel=config.parallel)


def _records(name: str) -> Iterator[Record]:
    path, split = path_and_split(name)
    return read_records(path, split=split)


def _heard(
    teacher: Teacher, utterances: Sequence[Utterance | AudioError], journal: "_Journal", config: Config
) -> list[Hearing | Failure]:
    """What a teacher hears in each utterance: from the journal, or into it."""
    keys = [None if isinstance(one, AudioError) else _key(teacher.name, one) for one in utterances]
    wanted = {
        key: one
        for key, one in zip(keys, utterances, strict=True)
        if key is not None and isinstance(one, Utterance) and key not in journal.heard
    }
    damaged = [Failure(DAMAGED, str(one)) for one in utterances if isinstance(one, AudioError)]
    failed: dict[_Key, Failure] = {}
    shown = time.monotonic()
    if damaged:
        _check_failures(config, len(damaged), len(utterances), damaged[-1])
    with closing(teacher.hear(list(wanted.values()))) as outcomes:
        for number, (key, outcome) in enumerate(zip(wanted, outcomes, strict=True), start=1):
            if isinstance(outcome, Hearing):
                journal.add(key, outcome)
            else:
                failed[key] = outcome
                _check_failures(config, len(damaged) + len(failed), len(utterances), outcome)
            if time.monotonic() - shown > PROGRESS_EVERY_S:
                shown = time.monotonic()
                print(f"{teacher.name}: {number} of {len(wanted)} heard", file=sys.stderr)
    at_hand = iter(damaged)
    return [next(at_hand) if key is None else journal.heard.get(key) or failed[key] for key in keys]


def _check_failures(config: Config, num_failed: int, num_all: int, last: Failure) -> None:
    """At each failure and not at the end, for a job of days must not find then that a disk was missing."""
    if num_failed > config.max_failures * num_all:
        raise UsageError(
            f"{num_failed} of {num_all} utterances failed, the last one: {last.why}; "
            "mend that and run again, or raise max_failures"
        )


# ---- filters ----


def _objection(config: Config, record: Record, label: Hearing | Failure) -> str | None:
    """Why a label is not kept, as far as its teacher and record tell."""
    if isinstance(label, Failure):
        return label.reason
    if not metrics.words(label.text):
        return "no words"
    doubts = DOUBTS & set(label.flags)
    if doubts and not config.keep_doubtful:
        return "doubtful: " + ", ".join(sorted(doubts))
    if config.min_confidence and label.confidence is None:
        raise UsageError(f"{config.teacher}: tells no confidence; leave min_confidence at 0 and run again")
    assert isinstance(record.utterance, Utterance)
    text, chars_per_s = record.utterance.text, len(label.text) / label.duration_s
    objections = {
        "low confidence": (label.confidence or 0) < config.min_confidence,
        "too few characters a second": chars_per_s < config.min_chars_per_s,
        "too many characters a second": chars_per_s > config.max_chars_per_s,
        "differs from its text": (
            config.against_text is not None and text != "" and _rate(text, label.text) > config.against_text
        ),
    }
    return next((reason for reason, holds in objections.items() if holds), None)


def _disagreement(config: Config, label: Hearing | Failure, other: Hearing | Failure) -> str | None:
    assert isinstance(label, Hearing)
    if isinstance(other, Failure):
        return f"{other.reason} of the second teacher"
    return "disagreement" if _rate(label.text, other.text) > config.max_disagreement else None


_PIECE = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def _rate(reference: str, hypothesis: str) -> float:
    """Word error rate, in which a character of a script that writes no spaces is a word."""
    ours, theirs = (_PIECE.findall(" ".join(metrics.words(text))) for text in (reference, hypothesis))
    return metrics.count(ours, theirs, merge_compounds=False).rate


# ---- manifest, report, journal ----


def _write(
    config: Config,
    teacher: str,
    records: Sequence[Record],
    labels: Sequence[Hearing | Failure],
    reasons: Sequence[str | None],
) -> None:
    lines = []
    kept_s = 0.0
    for record, label, reason in zip(records, labels, reasons, strict=True):
        if reason is None and isinstance(label, Hearing) and isinstance(record.utterance, Utterance):
            labelled = _labelled(record.fields, record.utterance, label, teacher, config.out)
            lines.append(json.dumps(labelled, ensure_ascii=False) + "\n")
            kept_s += label.duration_s
    dropped = dict(sorted(Counter(reason for reason in reasons if reason is not None).items()))
    report = {
        "arkasr": arkasr.__version__,
        "teacher": teacher,
        "utterances": len(records),
        "kept": len(lines),
        "kept_hours": round(kept_s / 3600, 4),
        "dropped": dropped,
        "failures": [label.why for label in labels if isinstance(label, Failure)][:SHOWN_FAILURES],
        "config": {**asdict(config), "out": config.out.name},
    }
    text = json.dumps(report, indent=2, ensure_ascii=False, default=str)
    with _writing(config.out):
        files.write_text_atomically(config.out, "".join(lines))
        files.write_text_atomically(config.out.with_suffix(".report.json"), text + "\n")
    why = "".join(f"; {count} dropped: {reason}" for reason, count in dropped.items())
    print(f"{config.out}: {len(lines)} of {len(records)} kept, {kept_s / 3600:.2f} h{why}", file=sys.stderr)


def _labelled(
    fields: Mapping[str, Any], utterance: Utterance, label: Hearing, teacher: str, out: Path
) -> dict[str, Any]:
    """The record with the label as its text; what belonged to the text before is gone."""
    kept = {name: value for name, value in fields.items() if name not in OF_THE_OLD_TEXT}
    path, folder = utterance.audio.absolute(), out.parent.absolute()
    reference = fields.get("reference") or utterance.text  # the first one, which somebody may have written
    return {
        **kept,
        "audio": str(path.relative_to(folder) if path.is_relative_to(folder) else path),
        "text": label.text,
        **({"reference": reference} if reference else {}),
        "teacher": teacher,
        **({} if label.confidence is None else {"confidence": round(label.confidence, 4)}),
    }


_Key = tuple[str, str, float | None, float | None, str | None]


def _key(teacher: str, utterance: Utterance) -> _Key:
    """All that a hearing depends on."""
    return teacher, str(utterance.audio.absolute()), utterance.begin_s, utterance.end_s, utterance.language


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); make room or give another --out") from None


class _Journal:
    """Hearings by key, in memory and on the disk: a line each, written when it is known."""

    def __init__(self, path: Path) -> None:
        """Begin it, or go on with it.

        Raises:
            UsageError: it is no such journal, cannot be written, or another process is at it.
        """
        self._path, self._lock = path, FileLock(path.with_name(f".{path.name}.lock"))
        self.heard: dict[_Key, Hearing] = {}
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UsageError(f"{path}: another process is at this job; wait for it or end it") from None
            if path.exists():
                self._read()
            self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a line that `add` could not write, and said so
            self._file.close()
        self._lock.release()

    def _read(self) -> None:
        """Take what is whole; a line that a killed process did not finish is cut off."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        torn = data[len(whole) :]
        try:
            for line in whole.splitlines():
                record = json.loads(line)
                teacher, path, begin_s, end_s, language = record["key"]
                flags = tuple(record["heard"]["flags"])
                self.heard[teacher, path, begin_s, end_s, language] = Hearing(**{**record["heard"], "flags": flags})
            is_ours = torn.startswith(LINE_START[: len(torn)])
        except (ValueError, TypeError, KeyError, RecursionError):
            is_ours = False
        if not is_ours:
            raise UsageError(f"{self._path}: not a journal of teacher-data; delete it, or give another --out")
        if torn:
            os.truncate(self._path, len(whole))

    def add(self, key: _Key, hearing: Hearing) -> None:
        """Keep a hearing, on the disk before anything else happens.

        Raises:
            UsageError: it cannot be written.
        """
        line = json.dumps({"key": key, "heard": asdict(hearing)})
        with _writing(self._path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.heard[key] = hearing
