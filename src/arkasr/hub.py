"""Where weights come from: names, and the cache of downloads.

A model is one of `PINS`, a hub id with its commit ("ORG/NAME@COMMIT"), or a folder. What is downloaded lies in
`$ARKASR_CACHE/models/ORG--NAME/COMMIT` (default ~/.cache/arkasr), beside a lock file with the SHA-256 of each file.
Unusual: a download fills COMMIT.part and one rename at the end makes it COMMIT, so what bears that name is complete.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from arkasr import files, pins
from arkasr.errors import CheckpointMismatchError, ModelNotFoundError, UsageError
from arkasr.pins import PINS

PREFERRED = "0.6b"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The hub's own rules; without its ban of -- two ids could share a folder of the cache.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.|\.git\Z))[A-Za-z0-9](?:[\w.\-]{0,94}\w)?/[A-Za-z0-9](?:[\w.\-]{0,94}\w)?", re.ASCII
)
_log = logging.getLogger(__name__)

Report = Callable[[str], object]  # takes a line that a person should read
Progress = Callable[[int, int], object]  # takes bytes done and bytes in all


@dataclass(frozen=True)
class Model:
    """One line of `ark-asr models list`."""

    name: str
    origin: str
    folder: Path | None
    num_bytes: int
    state: Literal["shipped", "here", "incomplete", "absent"]


@dataclass(frozen=True)
class _Source:
    """A model on a hub, as its name was given."""

    name: str
    repo_id: str
    asked_revision: str | None

    @property
    def home(self) -> Path:
        return cache() / "models" / self.repo_id.replace("/", "--")

    @property
    def resolved(self) -> Path:
        """The file that records what an unpinned built-in name meant at its first pull."""
        return self.home / "resolved"

    @property
    def revision(self) -> str | None:
        """The commit that was asked for or recorded; None before the first pull of an unpinned name."""
        if self.asked_revision is not None or not self.resolved.exists():
            return self.asked_revision
        recorded = self.resolved.read_text(encoding="ascii", errors="replace").strip()
        if not _COMMIT.fullmatch(recorded):
            raise CheckpointMismatchError(f"{self.resolved}: does not hold a commit; delete this file")
        return recorded

    @property
    def folder(self) -> Path | None:
        """The complete folder, if it is on this machine."""
        revision = self.revision
        folder = self.home / revision if revision else None
        return folder if folder and (folder / pins.LOCK).is_file() else None


def cache() -> Path:
    """The folder of everything that was downloaded: `$ARKASR_CACHE`, or else ~/.cache/arkasr."""
    return Path(os.environ.get("ARKASR_CACHE") or Path.home() / ".cache" / "arkasr").expanduser().absolute()


def exports() -> Path:
    """The folder of the exports that were made on this machine, each named after its checkpoint's folder."""
    return cache() / "exports"


def _parse(model: str | Path) -> Path | _Source:
    """The folder or hub source that a model's name means.

    Raises:
        UsageError: a revision that is not a full commit.
        ModelNotFoundError: nothing of that name.
    """
    if isinstance(model, Path):
        if model.is_dir():
            return model
        raise ModelNotFoundError(f"{model}: no such folder; give a checkpoint's folder or one of {', '.join(PINS)}")
    name, at, revision = model.partition("@")
    if name.lower() in PINS:
        return _pinned(name.lower(), at, revision)
    if os.path.isdir(model):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return Path(model)
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"{model}: no such model; give one of {', '.join(PINS)}, a checkpoint's folder, or ORG/NAME@COMMIT of a hub"
        )
    if not at:
        raise ModelNotFoundError(f"{model}: no such folder; if it is a hub id, add its commit: {model}@COMMIT")
    return _Source(model, name, _commit(model, revision))


def _pinned(name: str, at: str, revision: str) -> Path | _Source:
    """What a built-in name means, with the revision that was asked for, if any."""
    pin = PINS[name]
    if pin.repo_id is not None:
        return _Source(
            name + at + revision, pin.repo_id, _commit(name + at + revision, revision) if at else pin.revision
        )
    if at:
        raise UsageError(f"{name}@{revision}: {name} comes with the package and has no revisions; give {name}")
    return pins.SHIPPED / name


def _commit(model: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    raise UsageError(
        f"{model}: {revision!r} is not a full commit (40 digits 0-9a-f), and anything shorter can change its meaning; "
        "take the commit from the model's page"
    )


def find(model: str | Path) -> Path:
    """The folder of a model that is on this machine; never uses the network.

    Raises:
        ModelNotFoundError: it is not here, or there is nothing of that name.
        UsageError: its revision is not a full commit.
    """
    source = _parse(model)
    folder = source if isinstance(source, Path) else source.folder
    if folder is None:
        raise ModelNotFoundError(f"{model}: not on this machine; run `ark-asr models pull {model}`")
    return folder


def default_model() -> str:
    """The model of a command that names none: 0.6b when it was downloaded, else tiny."""
    source = _parse(PREFERRED)
    return PREFERRED if isinstance(source, _Source) and source.folder else "tiny"


def pull(
    model: str | Path,
    *,
    offline: bool = False,
    report: Report = _log.info,
    progress: Progress = lambda _done, _all: None,
) -> Path:
    """The folder of a model, downloaded first if it is not on this machine; an interrupted download is continued.

    Args:
        model: built-in name, "ORG/NAME@COMMIT", or folder.
        offline: make no network call; HF_HUB_OFFLINE in the environment says the same.
        report: takes each line a person should read.
        progress: takes bytes done and bytes in all.

    Raises:
        ModelNotFoundError: there is none of that name, here or on the hub, or the hub cannot be reached.
        CheckpointMismatchError: what the hub sent is not what it listed or what is pinned.
        UsageError: the revision is not a full commit, or the disk is full.
    """
    source = _parse(model)
    if isinstance(source, Path):
        return source
    if folder := source.folder:
        return folder
    from arkasr import download  # here, as the hub's client takes 0.2 s to import

    if offline or download.is_offline():
        raise ModelNotFoundError(f"{model}: not on this machine, and offline; run `ark-asr models pull {model}` online")
    with _alone(source, waiting=report), download.hub_errors(source.name):
        return source.folder or _download(source, report, progress)


def _download(source: _Source, report: Report, progress: Progress) -> Path:
    from arkasr import download

    revision = source.revision
    if revision is None:
        revision = download.commit_of_main(source.repo_id)
        if not _COMMIT.fullmatch(revision):
            raise CheckpointMismatchError(f"{source.repo_id}: main is at {revision!r}, not a commit; check HF_ENDPOINT")
        files.write_text_atomically(source.resolved, revision + "\n")
        report(f"{source.name}: main of {source.repo_id} is at {revision}; recorded, and used from now on")
    part = source.home / (revision + files.PART)
    folder = source.home / revision
    if folder.exists():  # without its lock file: its files are checked like any that came before
        if part.exists():
            shutil.rmtree(part)
        folder.rename(part)
    part.mkdir(exist_ok=True)
    pinned = pins.pinned_sha256(source.repo_id, revision)
    known = download.fetch(source.repo_id, revision, part, sha256=pinned, progress=progress)
    lock = pins.Lock(source.repo_id, revision, known)
    pins.write_lock(part, lock)
    part.rename(folder)
    if source.name in PINS and known.keys() != pinned.keys():
        report(f"{source.name}: to pin what was downloaded for everyone, put this line into PINS of arkasr/pins.py:")
        report(pins.pin_line(source.name, lock))
    return folder


@contextmanager
def _alone(source: _Source, *, waiting: Report | None = None) -> Iterator[None]:
    """One process at a time for each repository; the system drops the lock of a killed one.

    Raises:
        UsageError: the cache cannot be written, or another process is at work and nobody listens to `waiting`.
    """
    try:
        source.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(source.home / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise UsageError(
                    f"{source.name}: another process is downloading it; try again when it is done"
                ) from None
            waiting(f"{source.name}: another process is downloading it; waiting")
            lock.acquire()
    except OSError as error:
        raise UsageError(
            f"{source.home}: cannot be written ({error.strerror}); set ARKASR_CACHE to a folder of yours"
        ) from None
    try:
        yield
    finally:
        lock.release()


def models() -> list[Model]:
    """The built-in names, then whatever else was downloaded."""
    listed = [_model(name) for name in PINS]
    homes = sorted(path for path in (cache() / "models").glob("*--*") if path.is_dir())
    for home in homes:
        repo_id = home.name.replace("--", "/", 1)
        for folder in sorted(home.iterdir()) if _HUB_ID.fullmatch(repo_id) else ():
            commit = folder.name.removesuffix(files.PART)
            name = f"{repo_id}@{commit}"
            if _COMMIT.fullmatch(commit) and folder.is_dir() and folder not in {model.folder for model in listed}:
                listed.append(_model(name))
    return listed


def _model(name: str) -> Model:
    source = _parse(name)
    if isinstance(source, Path):
        return Model(name, "shipped with arkasr", source, _num_bytes(source), "shipped")
    origin = f"{source.repo_id}@{source.revision or 'not resolved yet'}"
    if folder := source.folder:
        return Model(name, origin, folder, _num_bytes(folder), "here")
    part = source.home / f"{source.revision}{files.PART}"
    if part.is_dir():
        return Model(name, origin, part, _num_bytes(part), "incomplete")
    return Model(name, origin, None, 0, "absent")


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(model: str | Path) -> int:
    """Delete a downloaded model, complete or not, its exports, and what its name was resolved to; bytes freed.

    Raises:
        ModelNotFoundError: there is nothing of it to delete.
        UsageError: it is the shipped model or a folder of yours, or is being downloaded now.
    """
    source = _parse(model)
    if isinstance(source, Path):
        raise UsageError(f"{model}: {source} was not downloaded by arkasr; delete it yourself if you want to")
    if source.revision is None or _model(source.name).state == "absent":
        raise ModelNotFoundError(f"{model}: not on this machine; nothing to remove")
    with _alone(source):
        part = source.home / (source.revision + files.PART)
        if folder := source.folder:
            folder.replace(part)  # so that half of it never bears the complete name
        folders = [part, *exports().glob(f"{source.revision}-*")]
        freed = sum(map(_num_bytes, folders))
        for unwanted in folders:
            shutil.rmtree(unwanted)
        if source.asked_revision is None:
            source.resolved.unlink(missing_ok=True)
    return freed
