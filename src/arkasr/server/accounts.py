"""What keys use: limits kept and usage recorded, in one SQLite file that all worker processes share.

Limits and usage go by a key's name, so a key that is replaced under its name keeps both.
Unusual: a running request holds a lease, not a lock. Whoever is killed stops renewing, and nothing needs repair. And a
request's audio counts on the UTC day on which it finishes; until then its reservation counts on whatever day it is.
"""

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from filelock import FileLock, Timeout

from arkasr.audio import SAMPLE_RATE
from arkasr.errors import ArkASRError, UsageError
from arkasr.server.keys import Key, Price

LEASE_S = 15.0
DATABASE = "usage.sqlite3"
_PATIENCE_S = 10.0  # for other processes at the same file, each of which is done in milliseconds
_RETRY_S = 1.0  # when a place will be free is not known
_SECOND_US, _MINUTE_US, _DAY_US = 1_000_000, 60_000_000, 86_400_000_000
_SCHEMA_VERSION = 1
_EPOCH = date(1970, 1, 1).toordinal()
_SCHEMA = """
CREATE TABLE rate (name TEXT PRIMARY KEY, full_at_us INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE spent (name TEXT, day INTEGER, samples INTEGER NOT NULL, PRIMARY KEY (name, day)) WITHOUT ROWID;
CREATE TABLE running (
    name TEXT, request_id TEXT, samples INTEGER NOT NULL, alive_until_us INTEGER NOT NULL,
    PRIMARY KEY (name, request_id)
) WITHOUT ROWID;
CREATE TABLE usage (
    request_id TEXT PRIMARY KEY, finished_us INTEGER NOT NULL, name TEXT NOT NULL, sha256 BLOB NOT NULL,
    model TEXT NOT NULL, route TEXT NOT NULL, samples INTEGER NOT NULL, price TEXT
) WITHOUT ROWID;
"""

Code = Literal["rate_limit_exceeded", "concurrency_limit_exceeded", "audio_quota_exceeded"]


class LimitError(ArkASRError):
    """A request that a key's limits do not allow now."""

    def __init__(self, message: str, *, code: Code, retry_after_s: float, headers: Mapping[str, str]) -> None:
        """`headers` go into the response."""
        super().__init__(message)
        self.code, self.retry_after_s, self.headers = code, retry_after_s, headers


@dataclass(frozen=True)
class UsageLine:
    """What one key used of one model: finished requests, samples at 16 kHz, and their exact cost."""

    key: str
    model: str
    requests: int
    num_samples: int
    cost: Fraction


@dataclass(frozen=True)
class _Standing:
    """How a key stands against its limits at one moment, apart from the request that asks."""

    key: Key
    now_us: int
    full_us: int  # until all requests of a minute are granted again
    num_running: int
    taken_samples: int  # of today, finished or reserved

    @classmethod
    def of(cls, connection: sqlite3.Connection, key: Key, request_id: str, now_us: int) -> Self:
        # What ends too far ahead, a lease or a full minute, was written before the clock was set back, and is void.
        row = connection.execute(
            """SELECT (SELECT full_at_us FROM rate WHERE name = :name),
                      (SELECT samples FROM spent WHERE name = :name AND day = :day), COUNT(*), SUM(samples)
               FROM running
               WHERE name = :name AND request_id <> :id AND alive_until_us > :now AND alive_until_us < :far""",
            {
                "name": key.name, "id": request_id, "day": now_us // _DAY_US,
                "now": now_us, "far": now_us + int(2 * LEASE_S * _SECOND_US),
            },
        ).fetchone()  # fmt: skip
        full_at_us, spent, num_running, reserved = (value or 0 for value in row)
        full_us = full_at_us - now_us
        return cls(key, now_us, full_us if 0 < full_us < 2 * _MINUTE_US else 0, num_running, spent + reserved)

    @property
    def interval_us(self) -> int:
        """Between requests that come evenly; rounded so that never more are granted."""
        return -(-_MINUTE_US // (self.key.limits.requests_per_minute or _MINUTE_US))

    @property
    def burst_us(self) -> int:
        return self.interval_us * (self.key.limits.requests_per_minute or 0)

    @property
    def headers(self) -> dict[str, str]:
        found = {}
        if self.key.limits.requests_per_minute is not None:
            found["x-ratelimit-limit-requests"] = str(self.key.limits.requests_per_minute)
            found["x-ratelimit-remaining-requests"] = str(max(0, self.burst_us - self.full_us) // self.interval_us)
            found["x-ratelimit-reset-requests"] = decimal_text(Fraction(-(-self.full_us // 1000), 1000)) + "s"
        most = self.key.limits.samples_per_day
        if most is not None:
            left = max(0, most - self.taken_samples)
            found["x-ratelimit-limit-audio-seconds"] = _seconds(most)
            found["x-ratelimit-remaining-audio-seconds"] = _seconds(left)
        return found

    def check_place(self) -> None:
        """Raise a LimitError unless one more request may begin."""
        limits, wait_us = self.key.limits, self.full_us - (self.burst_us - self.interval_us)
        if limits.requests_per_minute is not None and wait_us > 0:
            what = f"{limits.requests_per_minute} requests per minute are used up"
            raise self._refusal("rate_limit_exceeded", what, wait_us / _SECOND_US)
        if limits.concurrent_requests is not None and self.num_running >= limits.concurrent_requests:
            what = f"{self.num_running} requests are running, and no more may at once"
            raise self._refusal("concurrency_limit_exceeded", what, _RETRY_S)

    def check_audio(self, num_samples: int) -> None:
        """Raise a LimitError unless so many samples fit into what the day has left."""
        most = self.key.limits.samples_per_day
        if most is not None and self.taken_samples + num_samples > most:
            what = f"{_seconds(self.taken_samples)} of {_seconds(most)} seconds of audio per day are used or reserved"
            wait_us = _DAY_US - self.now_us % _DAY_US
            raise self._refusal("audio_quota_exceeded", what, wait_us / _SECOND_US)

    def _refusal(self, code: Code, what: str, wait_s: float) -> LimitError:
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
        message = f"key {self.key.name!r}: {what}; try again in {math.ceil(wait_s)} s"
        return LimitError(message, code=code, retry_after_s=wait_s, headers=self.headers | headers)


def _seconds(num_samples: int) -> str:
    return decimal_text(Fraction(num_samples, SAMPLE_RATE))


class _Database:
    """The file, and which requests run in this process."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self.path = path
        self.running: dict[tuple[str, str], int] = {}  # name and request id to reserved samples
        self._now = now
        self.lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """Alone among all threads and processes, with the time in microseconds; kept only if nothing is raised."""
        with self.lock, self.errors():
            if self._connection is None:
                self._connection = self._open()
            with self._connection as connection:
                connection.execute("BEGIN IMMEDIATE")
                # Read now and not before, or a process that waited would bring an earlier time than what it finds.
                yield connection, round(self._now() * _SECOND_US)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except Timeout:
            raise UsageError(f"{self.path}: another process is at it; try again") from None
        except (sqlite3.Error, OSError) as error:
            raise UsageError(
                f"{self.path}: cannot be used ({error}); check its folder, or move the file away"
            ) from None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=_PATIENCE_S), ExitStack() as undo:
            self.path.touch(mode=0o600)
            connection = sqlite3.connect(self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
            undo.callback(connection.close)
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            # What is committed lies in the system's cache, which outlives a killed process. When the power fails, what
            # was committed since the last checkpoint (1000 pages) may be gone, but what is left is whole.
            connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if mode != "wal" or version not in (0, _SCHEMA_VERSION):
                raise UsageError(f"{self.path}: of a newer arkasr, or not on a local disk; give another folder")
            if version == 0:
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
            undo.pop_all()
        return connection

    def close(self) -> None:
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class Admission:
    """A request's place; leaving the `with` block frees it, and so does `finish`."""

    def __init__(self, database: _Database, request_id: str, standing: _Standing) -> None:
        """Made by `Accounts.admit`."""
        self._database, self._request_id, self._standing = database, request_id, standing
        self._name = standing.key.name, request_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        with self._database.lock:  # or `reserve` in another thread could put it back
            ended = self._database.running.pop(self._name, None) is None
        if not ended:
            with self._database.transaction() as (connection, _):
                connection.execute("DELETE FROM running WHERE name = ? AND request_id = ?", self._name)

    @property
    def headers(self) -> Mapping[str, str]:
        """How the key stands, in OpenAI's names; nothing where there is no limit."""
        return self._standing.headers

    def reserve(self, num_samples: int) -> None:
        """Hold so many samples at 16 kHz, all of this request together, against the day's limit.

        Raises:
            LimitError: with what else is used and reserved they exceed it; what was held before stays held.
            UsageError: the request has ended, or the database cannot be used.
        """
        with self._database.transaction() as (connection, now_us):
            if self._name not in self._database.running:
                raise UsageError(f"request {self._request_id}: has ended; reserve before")
            if num_samples <= self._database.running[self._name]:
                return
            standing = _Standing.of(connection, self._standing.key, self._request_id, now_us)
            standing.check_audio(num_samples)
            _renew(connection, {self._name: num_samples}, now_us)
            self._database.running[self._name] = num_samples
            self._standing = replace(standing, taken_samples=standing.taken_samples + num_samples)

    def finish(self, num_samples: int, *, model: str, route: str) -> Fraction:
        """Record what was used, in samples at 16 kHz, and free the place; the exact cost.

        What was recorded for this request id before stays as it was, and its cost is returned.

        Raises:
            UsageError: the database cannot be used; try again, nothing was recorded.
        """
        assert num_samples >= 0, num_samples
        key = self._standing.key
        price = key.limits.price and str(key.limits.price)
        with self._database.transaction() as (connection, now_us):
            row = (self._request_id, now_us, key.name, bytes.fromhex(key.sha256), model, route, num_samples, price)
            added = connection.execute("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
            if added.rowcount:
                connection.execute(
                    "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET samples = samples + excluded.samples",
                    (key.name, now_us // _DAY_US, num_samples),
                )
            connection.execute("DELETE FROM running WHERE name = ? AND request_id = ?", self._name)
            recorded = connection.execute("SELECT samples, price FROM usage WHERE request_id = ?", row[:1]).fetchone()
            self._database.running.pop(self._name, None)
        return _cost(*recorded)


def _cost(num_samples: int, price: str | None) -> Fraction:
    return Fraction(0) if price is None else Price.parse(price).of(num_samples)


def _renew(connection: sqlite3.Connection, running: Mapping[tuple[str, str], int], now_us: int) -> None:
    """Leases from now on, also for requests whose lease ran out while their process stood still."""
    until_us = now_us + int(LEASE_S * _SECOND_US)
    connection.executemany(
        "INSERT OR REPLACE INTO running VALUES (?, ?, ?, ?)",
        [(name, request_id, samples, until_us) for (name, request_id), samples in running.items()],
    )


class Accounts:
    """Limits and usage in a folder, for all threads of a process and all processes of a machine.

    A process that was forked needs its own. Nothing is opened before the first call that writes.
    """

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        """`now` gives seconds since 1970, UTC."""
        self._database = _Database(folder / DATABASE, now)

    def admit(self, key: Key, request_id: str) -> Admission:
        """A place for a request, if the limits of its key allow it; what is refused uses up nothing.

        Args:
            key: whose limits and price are those of the whole request.
            request_id: unique forever, so never one that a client has chosen.

        Raises:
            LimitError: a limit is reached.
            UsageError: a request of this id is running, or the database cannot be used.
        """
        name = key.name, request_id
        with self._database.transaction() as (connection, now_us):
            if name in self._database.running:
                raise UsageError(f"request {request_id}: is running already; give each request an id of its own")
            standing = _Standing.of(connection, key, request_id, now_us)
            standing.check_audio(1)
            standing.check_place()
            if key.limits.requests_per_minute is not None:
                standing = replace(standing, full_us=standing.full_us + standing.interval_us)
                connection.execute("INSERT OR REPLACE INTO rate VALUES (?, ?)", (key.name, now_us + standing.full_us))
            _renew(connection, {name: 0}, now_us)
        self._database.running[name] = 0
        return Admission(self._database, request_id, standing)

    def heartbeat(self) -> None:
        """Renew the leases of this process and forget those that have ended; due every few seconds.

        Raises:
            UsageError: the database cannot be used.
        """
        with self._database.transaction() as (connection, now_us):
            _renew(connection, self._database.running.copy(), now_us)
            connection.execute(
                "DELETE FROM running WHERE alive_until_us <= ? OR alive_until_us >= ?",
                (now_us, now_us + int(2 * LEASE_S * _SECOND_US)),
            )

    def usage(self, *, since: date | None = None, until: date | None = None) -> list[UsageLine]:
        """What was used from the day `since` to the day `until`, both included, UTC, by key and model.

        Raises:
            UsageError: nothing was ever recorded in this folder, or the database cannot be read.
        """
        path = self._database.path
        if not path.exists():
            raise UsageError(f"{path}: no such file; check the folder, or serve first")
        first, last = ((day or other).toordinal() - _EPOCH for day, other in ((since, date.min), (until, date.max)))
        with self._database.errors(), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute(
                """SELECT name, model, price, COUNT(*), SUM(samples) FROM usage
                   WHERE finished_us >= ? AND finished_us < ? GROUP BY name, model, price ORDER BY name, model""",
                (first * _DAY_US, (last + 1) * _DAY_US),
            ).fetchall()
        lines: dict[tuple[str, str], UsageLine] = {}
        for name, model, price, requests, samples in rows:
            line = lines.get((name, model), UsageLine(name, model, 0, 0, Fraction(0)))
            lines[name, model] = replace(
                line,
                requests=line.requests + requests,
                num_samples=line.num_samples + samples,
                cost=line.cost + _cost(samples, price),
            )
        return list(lines.values())

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        self._database.close()


def decimal_text(cost: Fraction) -> str:
    """A number with at most 10 places, rounded half to even, without an exponent or trailing zeros."""
    scaled = round(cost * 10**10)
    whole, rest = divmod(abs(scaled), 10**10)
    return ("-" if scaled < 0 else "") + f"{whole}.{rest:010}".rstrip("0").rstrip(".")
