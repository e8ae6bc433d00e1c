"""What is trusted: the pin table, the lock files beside downloads, and the checks of a folder against them.

Unusual: a folder's hashes are taken at its first load, and again only when a file's size or time of change differs
from what it was then; sizes are compared at every load.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arkasr import files
from arkasr.errors import CheckpointMismatchError, ModelNotFoundError, quoted

SHIPPED = Path(__file__).parent / "weights"
LOCK = "arkasr.lock.json"
STAMPS = "arkasr.checked.json"
PULL_AGAIN = "remove the model and pull it again"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """What a built-in name stands for: a hub id (None: shipped with the package), a commit, and known SHA-256."""

    repo_id: str | None
    revision: str | None
    sha256: Mapping[str, str]


# The one table of what arkasr trusts. The commit of 0.6B is not public: the first pull resolves and records it, and
# prints the line that belongs here. Hashes that are not here yet are recorded, at the first pull, in the lock file.
PINS: dict[str, Pin] = {
    "0.6b": Pin("AutoArk-AI/ARK-ASR-0.6B", None, {}),
    "3b": Pin("AutoArk-AI/ARK-ASR-3B", "1e28271b79edc97635783bea65abc89195a09ed3", {}),
    "tiny": Pin(
        None,
        None,
        {
            "config.json": "3e250f1466b13b8a13a08e4debc6a516fbb99855c5d4dddcec84fd3324c8a066",
            files.GENERATION_CONFIG: "fb812f645d07f21aade33015319c44e9f1265c6815f765938e18bc9b20079522",
            "model.safetensors": "fabba2fa84b27c26788ba258367e6e600c9fc8d5e35ad8428584e286adccd5c6",
            "tokenizer.json": "b3bfb2e8b99b21cdc2f37c4a889011d783b01934b9db0f7d65a1f03d5f21ba4b",
        },
    ),
}


@dataclass(frozen=True)
class Lock:
    """What a folder must hold; made by a download, or of `PINS` for the shipped model."""

    repo_id: str | None
    revision: str | None
    files: Mapping[str, files.Known]


def pinned_sha256(repo_id: str | None, revision: str | None) -> Mapping[str, str]:
    """The hashes that `PINS` knows of a commit."""
    known = [pin.sha256 for pin in PINS.values() if (pin.repo_id, pin.revision) == (repo_id, revision)]
    return known[0] if known else {}


def pin_line(name: str, lock: Lock) -> str:
    """The line of `PINS` that a finished download stands for."""
    hashes = {file: known.sha256 for file, known in sorted(lock.files.items())}
    return f'    "{name}": Pin("{lock.repo_id}", "{lock.revision}", {json.dumps(hashes)}),'


def read_lock(folder: Path) -> Lock | None:
    """What `folder` must hold by `PINS` or its lock file; None where neither speaks of it.

    Raises:
        CheckpointMismatchError: the lock file is damaged or contradicts `PINS`.
    """
    if folder.parent == SHIPPED and folder.name in PINS:
        return Lock(None, None, {name: files.Known(None, sha256) for name, sha256 in PINS[folder.name].sha256.items()})
    path = folder / LOCK
    if not path.exists():
        return None
    raw = files.read_json(path)
    try:
        lock = Lock(str(raw["repo_id"]), str(raw["revision"]), known_files(raw["files"]))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise CheckpointMismatchError(f"{path}: damaged lock file; {PULL_AGAIN}") from None
    for name, sha256 in pinned_sha256(lock.repo_id, lock.revision).items():
        if name not in lock.files or lock.files[name].sha256 != sha256:
            raise CheckpointMismatchError(f"{path}: contradicts what is pinned for {name}; {PULL_AGAIN}")
    return lock


def known_files(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, files.Known]:
    """The files of a lock file or manifest; a name that is no checkpoint's could lead us to hash any file there is.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: they are not a list of files.
    """
    known = {}
    for name, entry in entries.items():
        size, sha256 = entry["size"], entry["sha256"]
        if not (files.is_published(name) and isinstance(size, int) and 0 <= size < 2**63 and _SHA256.fullmatch(sha256)):
            raise ValueError(f"{quoted(name)} cannot be one of its files")
        known[name] = files.Known(size, sha256)
    return known


def check(folder: Path) -> None:
    """Check a folder before it is loaded: its files' sizes always, their hashes if one is not as it was last hashed.

    A folder that is neither shipped nor has a lock file is let through: nothing is known of it.

    Raises:
        CheckpointMismatchError: files are damaged, missing or not of the locked download; they are named.
    """
    lock = read_lock(folder)
    if lock is None:
        return
    wrong = [f"{name} is not of this download" for name in _others(folder, lock) if files.is_published(name)]
    if wrong:
        raise _damaged(folder, wrong)
    check_files(folder, lock.files)


def check_files(
    folder: Path, known: Mapping[str, files.Known], *, hashes: bool = False, remedy: str = PULL_AGAIN
) -> None:
    """Compare files with what they must be: sizes always, hashes if asked or if one is not as it was last hashed.

    Raises:
        CheckpointMismatchError: files are damaged or missing; they are named.
    """
    seen = {} if hashes or folder.parent == SHIPPED else _read_stamps(folder)
    unchanged = all(seen.get(name) == stamp for name, stamp in _stamps(folder, known).items())
    wrong = _differences(folder, known, hashes=not unchanged)
    if wrong:
        raise _damaged(folder, wrong, remedy)
    if not unchanged:
        _remember(folder, known)


def verify(folder: Path) -> Lock | None:
    """Hash every file of a folder; what it was compared with, None if nothing is known of it.

    Raises:
        CheckpointMismatchError: files are damaged, missing or foreign; they are named.
    """
    lock = read_lock(folder)
    if lock is None:
        return None
    wrong = _differences(folder, lock.files, hashes=True) + [
        f"{quoted(name)} is foreign" for name in _others(folder, lock)
    ]
    if wrong:
        raise _damaged(folder, wrong)
    _remember(folder, lock.files)
    return lock


def _damaged(folder: Path, wrong: list[str], remedy: str = PULL_AGAIN) -> CheckpointMismatchError:
    return CheckpointMismatchError(f"{folder}: {'; '.join(wrong)}; {remedy}")


def _differences(folder: Path, all_known: Mapping[str, files.Known], *, hashes: bool) -> list[str]:
    """What is wrong with each file, by size alone or by hash too."""
    wrong = []
    for name, known in all_known.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif known.size not in (None, size := files.check(path)):
            wrong.append(f"{name} has {size} bytes, not {known.size}")
        elif hashes and (sha256 := files.sha256(path)) != known.sha256:
            wrong.append(f"{name} has SHA-256 {sha256}, not {known.sha256}")
    return wrong


def _others(folder: Path, lock: Lock) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in (*lock.files, LOCK, STAMPS))


def _stamps(folder: Path, known: Mapping[str, files.Known]) -> dict[str, list[int]]:
    """Size and time of change of each file: while they stay, the bytes need not be hashed again."""
    status = {name: (folder / name).stat() for name in known if (folder / name).is_file()}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in status.items()}


def _read_stamps(folder: Path) -> dict[str, Any]:
    try:
        return files.read_json(folder / STAMPS)
    except (ModelNotFoundError, CheckpointMismatchError):  # none yet, or damaged: hash again
        return {}


def write_lock(folder: Path, lock: Lock) -> None:
    """Write the lock file of a download whose files have just been hashed."""
    files.write_text_atomically(folder / LOCK, json.dumps(asdict(lock), indent=2) + "\n")
    _remember(folder, lock.files)


def _remember(folder: Path, known: Mapping[str, files.Known]) -> None:
    """Note that the files were hashed as they are now; a folder that cannot be written is hashed at each load."""
    if folder.parent == SHIPPED:
        return
    text = json.dumps({**_read_stamps(folder), **_stamps(folder, known)})
    try:
        files.write_atomically(folder / STAMPS, lambda part: part.write_text(text))
    except OSError as error:
        _log.info("%s: cannot be written (%s); the model is hashed at each load", folder, error.strerror)
