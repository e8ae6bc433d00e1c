"""API keys: who may use the server, how much, and at what price, in a JSON file that a person can read.

Unusual: only hashes are kept, so nobody can read a key out of the file, and a lost one is replaced, not looked up.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

from arkasr.audio import SAMPLE_RATE
from arkasr.errors import UsageError, quoted
from arkasr.files import PART

KEYS = "keys.json"  # in the folder of the server's state
_PATIENCE_S = 10.0  # for other processes at the same file, each of which is done in milliseconds
_FORMAT = 1
_PRICE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,10})?)/(second|hour)")
_SECONDS = {"second": 1, "hour": 3600}


@dataclass(frozen=True)
class Price:
    """What audio costs, exactly: an amount of no particular currency a second or an hour; its text is "0.36/hour".

    Raises:
        UsageError: negative, not a number, or of more digits than 9 before and 10 behind the point.
    """

    amount: Decimal
    unit: Literal["second", "hour"]

    def __post_init__(self) -> None:
        _parse_price(str(self))

    def __str__(self) -> str:
        return f"{self.amount:f}/{self.unit}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The price that a text means.

        Raises:
            UsageError: it means none.
        """
        amount, unit = _parse_price(text)
        return cls(Decimal(amount), "hour" if unit == "hour" else "second")

    def of(self, num_samples: int) -> Fraction:
        """The exact cost of so many samples at 16 kHz."""
        return Fraction(self.amount) * num_samples / (SAMPLE_RATE * _SECONDS[self.unit])


def _parse_price(text: str) -> tuple[str, str]:
    if found := _PRICE.fullmatch(text):
        return found[1], found[2]
    raise UsageError(f"price is {quoted(text)}; give AMOUNT/second or AMOUNT/hour, as in 0.36/hour")


@dataclass(frozen=True)
class Limits:
    """What a key may do; None is no limit, all models, no price.

    `requests_per_minute` may come at once after a pause, and are then granted anew evenly through the minute.

    Raises:
        UsageError: a limit that is no number, below 1 or absurdly large, or names of models that are none.
    """

    requests_per_minute: int | None = None
    audio_seconds_per_day: float | None = None
    concurrent_requests: int | None = None
    models: tuple[str, ...] | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        for name, value, kinds, most in (
            ("requests_per_minute", self.requests_per_minute, {int}, 1_000_000),
            ("audio_seconds_per_day", self.audio_seconds_per_day, {int, float}, 1_000_000_000),
            ("concurrent_requests", self.concurrent_requests, {int}, 100_000),
        ):
            if value is not None and not (type(value) in kinds and 1 <= value <= most):
                raise UsageError(f"{name} is {quoted(value)}; give 1 to {most}, or leave it out for no limit")
        if self.models is not None and not (self.models and all(map(_is_name, self.models))):
            raise UsageError(f"models are {quoted(self.models)}; name at least one, or leave it out for all")

    @property
    def samples_per_day(self) -> int | None:
        """`audio_seconds_per_day` at 16 kHz."""
        return None if self.audio_seconds_per_day is None else int(self.audio_seconds_per_day * SAMPLE_RATE)


@dataclass(frozen=True)
class Key:
    """An API key without its secret; times are UTC in ISO format.

    Raises:
        UsageError: a name that is empty, over 64 characters, or not printable.
        ValueError: a hash or a time that is none.
    """

    name: str
    sha256: str
    created: str
    revoked: str | None
    limits: Limits

    def __post_init__(self) -> None:
        if not _is_name(self.name):
            raise UsageError(f"name is {quoted(self.name)}; give 1 to 64 printable characters, no space at the ends")
        given = (self.created,) if self.revoked is None else (self.created, self.revoked)
        times = [datetime.fromisoformat(time) for time in given]
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) or any(time.tzinfo is None for time in times):
            raise ValueError(f"the hash or a time of {quoted(self.name)}")


def _is_name(text: str) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 64 and text.isprintable() and text == text.strip()


def _sha256(secret: str) -> str:
    # One fast round is enough: a secret has 256 random bits, which nobody can guess from its hash. A slow hash is for
    # passwords, and would let strangers make the server work.
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def create_key(path: Path, name: str, limits: Limits) -> tuple[Key, str]:
    """A new key and its secret, which is stored nowhere.

    The name of a revoked key may be used again: so a secret is replaced. Limits and usage of that name go on.

    Raises:
        UsageError: a name that is taken or unusable, or the file is damaged or cannot be written.
    """
    secret = "ark-" + secrets.token_urlsafe(32)
    key = Key(name, _sha256(secret), _utc_now(), None, limits)
    with _changing(path) as keys:
        if any(other.name == name and other.revoked is None for other in keys):
            raise UsageError(f"{path}: has a key {name!r}; choose another name, or revoke that key first")
        keys.append(key)
    return key, secret


def revoke_key(path: Path, name: str) -> Key:
    """The key, which from now on opens nothing.

    Raises:
        UsageError: no such key, or revoked before, or the file is damaged or cannot be written.
    """
    with _changing(path) as keys:
        for i, key in enumerate(keys):
            if key.name == name and key.revoked is None:
                keys[i] = replace(key, revoked=_utc_now())
                return keys[i]
        raise UsageError(f"{path}: has no key {name!r} that is not revoked; list the keys to see their names")


def list_keys(path: Path) -> list[Key]:
    """All keys, revoked ones too, in the order of their creation; none where there is no file.

    Raises:
        UsageError: the file is damaged or cannot be read.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        return []


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys, written back if nothing is raised; one process at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock"), timeout=_PATIENCE_S):
            keys = list_keys(path)
            yield keys
            _write(path, keys)
    except Timeout:
        raise UsageError(f"{path}: another process is changing it; try again") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); check its folder") from None


def _write(path: Path, keys: list[Key]) -> None:
    listed = [
        asdict(key) | {"limits": asdict(key.limits) | {"price": key.limits.price and str(key.limits.price)}}
        for key in keys
    ]
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)
    # Not `files.write_atomically`: others must not read it even while it is written.
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "keys": listed}, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(path: Path) -> list[Key]:
    try:
        return _parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            f"{path}: not a file of keys ({error}); put back a copy, or delete it and create keys"
        ) from None


def _parse(value: dict[str, Any]) -> list[Key]:
    if value["format"] != _FORMAT:
        raise ValueError("it is of another version of arkasr")
    keys = [_from_json(one) for one in value["keys"]]
    live = [key.name for key in keys if key.revoked is None]
    if len(set(live)) < len(live) or len({key.sha256 for key in keys}) < len(keys):
        raise ValueError("a key stands there twice")
    return keys


def _from_json(one: dict[str, Any]) -> Key:
    limits = one["limits"]
    for given, kind in (one, Key), (limits, Limits):
        if set(given) != {field.name for field in fields(kind)}:
            raise ValueError(f"fields {quoted(sorted(given))}")
    models, price = limits["models"], limits["price"]
    if not isinstance(models, list | None):
        raise TypeError(f"models {quoted(models)}")
    limits |= {
        "models": models if models is None else tuple(models),
        "price": None if price is None else Price.parse(price),
    }
    return Key(**one | {"limits": Limits(**limits)})


class Keyring:
    """The keys of a file, read anew when the file changes, so that keys come and go while a server runs."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path = path
        self._known: tuple[tuple[int, int, int], list[Key]] | None = None

    def _keys(self) -> list[Key]:
        known = self._known
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
            if known is None or known[0] != stamp:
                self._known = known = stamp, _read(self._path)
        except FileNotFoundError:
            if known is None:
                return []
            # Whoever serves without keys where there are none must not begin to when the file is lost.
            raise UsageError(f"{self._path}: is gone; put it back, or restart the server without keys") from None
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be read ({error.strerror}); check its permissions") from None
        return known[1]

    @property
    def is_empty(self) -> bool:
        """Whether no key was ever created; false when all are revoked.

        Raises:
            UsageError: the file is damaged, cannot be read, or is gone.
        """
        return not self._keys()

    def find(self, secret: str) -> Key | None:
        """The key of this secret, in a time that tells nothing of it; None if there is none or it is revoked.

        Raises:
            UsageError: the file is damaged, cannot be read, or is gone.
        """
        sha256 = _sha256(secret)
        matches = [key for key in self._keys() if hmac.compare_digest(key.sha256, sha256)]
        return matches[0] if matches and matches[0].revoked is None else None
