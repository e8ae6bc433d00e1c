"""The files of a checkpoint: which there are, which may be opened; bounded reads, whole writes, hashes.

Unusual: a file of a checkpoint must be a regular file of the checkpoint's own folder. A link that leads out of it is
refused, for it could name a device, a pipe or somebody else's file; only the hub cache's own layout, where
`snapshots/COMMIT/NAME` leads to `blobs/HASH`, is let through.
"""

import hashlib
import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkasr.errors import CheckpointMismatchError, ModelNotFoundError

PART = ".part"  # ends the name of what is not complete yet
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json")  # those that are read
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "arkasr.export.json"
EXPORTED = ("encoder.onnx", "encoder.bin", "decoder.onnx", "decoder.bin")  # beside config, tokenizer and manifest
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MIB, _GIB = 2**20, 2**30
# What a published checkpoint or export may consist of besides shards, and the most bytes of each. Nothing else is ever
# downloaded or opened; above all, no code and no pickles.
_MAX_BYTES = {
    CONFIG: _MIB,
    GENERATION_CONFIG: _MIB,
    WEIGHTS: 50 * _GIB,
    INDEX: 16 * _MIB,
    TOKENIZER: 32 * _MIB,
    "vocab.json": 32 * _MIB,
    "merges.txt": 32 * _MIB,
    "added_tokens.json": 4 * _MIB,
    "tokenizer_config.json": 4 * _MIB,
    "special_tokens_map.json": _MIB,
    "preprocessor_config.json": _MIB,
    "processor_config.json": _MIB,
    "chat_template.jinja": _MIB,
    MANIFEST: _MIB,
    **{name: 16 * _MIB if name.endswith(".onnx") else 50 * _GIB for name in EXPORTED},
}


@dataclass(frozen=True)
class Known:
    """What a file must be: its size in bytes (None: whatever has the hash) and SHA-256."""

    size: int | None
    sha256: str


def is_published(name: str) -> bool:
    """Whether a published checkpoint has a file of this name: the only names that are downloaded or opened."""
    return name in _MAX_BYTES or is_weights(name)


def is_weights(name: str) -> bool:
    """Whether it is the name of a file of weights."""
    return name == WEIGHTS or _SHARD.fullmatch(name) is not None


def max_bytes(name: str) -> int:
    """The most bytes a file of this name can have in an honest checkpoint."""
    return _MAX_BYTES.get(name, _MAX_BYTES[WEIGHTS] if is_weights(name) else _MIB)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename, so that `path` is always complete or as it was."""
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)  # left over, or a link by which we would write somebody else's file
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors writes files that only their owner may read
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of text, as UTF-8; a file's name in it that is none is written with escapes."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def check(path: Path) -> int:
    """Size in bytes of one file of a checkpoint, after checking that it may be opened.

    Raises:
        ModelNotFoundError: it is not there or cannot be looked at.
        CheckpointMismatchError: not a regular file, a link out of its folder, or larger than such a file can be.
    """
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFoundError(f"{path}: cannot be read ({why}); fetch the file again") from None
    folder = path.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.parent not in (folder, blobs):
        raise CheckpointMismatchError(f"{path}: leads out of its folder, to {real}; put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointMismatchError(f"{path}: not a regular file; fetch the file again")
    if status.st_size > max_bytes(path.name):
        raise CheckpointMismatchError(
            f"{path}: {status.st_size} bytes, a {path.name} has at most {max_bytes(path.name)}; fetch the file again"
        )
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ModelNotFoundError, CheckpointMismatchError: as `check`, and when it is not a JSON object.
    """
    check(path)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise ModelNotFoundError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointMismatchError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointMismatchError(f"{path}: not a JSON object; fetch the file again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once: other readers of the same bytes may take the first where we take the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(path: Path) -> Known:
    """What a file is."""
    return Known(path.stat().st_size, sha256(path))


def git_blob_sha1(path: Path) -> str:
    """The name git gives a file of these bytes, by which a hub lists its small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_MIB):
            digest.update(chunk)
    return digest.hexdigest()
