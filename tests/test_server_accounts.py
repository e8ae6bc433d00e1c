"""Keys, limits and usage of the server: exact, under several processes at once, and after kill -9."""

import hashlib
import hmac
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from arkasr.audio import SAMPLE_RATE
from arkasr.errors import UsageError
from arkasr.server import accounts
from arkasr.server.accounts import DATABASE, LEASE_S, Accounts, Admission, LimitError, UsageLine, decimal_text
from arkasr.server.keys import Key, Keyring, Limits, Price, create_key, list_keys, revoke_key

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0
ROUTE = "/v1/audio/transcriptions"
SPAWN = multiprocessing.get_context("spawn")
TIMEOUT_S = 60.0


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, time_s: float = NOON) -> None:
        self.time_s = time_s

    def __call__(self) -> float:
        return self.time_s


def key(limits: Limits = Limits(), *, name: str = "acme") -> Key:  # noqa: B008 - frozen
    return Key(name, hashlib.sha256(name.encode()).hexdigest(), "2026-11-22T00:00:00+00:00", None, limits)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_accounts(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], Accounts]]:
    """Accounts of one folder, each as another process would have them."""
    with ExitStack() as stack:

        def another() -> Accounts:
            made = Accounts(tmp_path / "usage", now=clock)
            stack.callback(made.close)
            return made

        yield another


@pytest.fixture
def books(open_accounts: Callable[[], Accounts]) -> Accounts:
    return open_accounts()


def serve(books: Accounts, whose: Key, request_id: str, seconds: float = 1, *, model: str = "tiny") -> Fraction:
    with books.admit(whose, request_id) as admission:
        admission.reserve(int(seconds * SAMPLE_RATE))
        return admission.finish(int(seconds * SAMPLE_RATE), model=model, route=ROUTE)


def refused(call: Callable[[], object]) -> LimitError:
    with pytest.raises(LimitError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


def query(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        return connection.execute(sql).fetchall()


def in_processes(count: int, work: Callable[..., None], *arguments: object) -> list[Any]:
    """What each of `count` processes sends first when it runs work(pipe, number, ...), all beginning at once."""
    barrier = SPAWN.Barrier(count)
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(count)]
    processes = [SPAWN.Process(target=work, args=(end, n, barrier, *arguments)) for n, (_, end) in enumerate(pipes)]
    for process in processes:
        process.start()
    answers = []
    for receiver, _ in pipes:
        assert receiver.poll(TIMEOUT_S), "a process does not answer"
        answers.append(receiver.recv())
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    return answers


# ---- prices and limits ----


@pytest.mark.parametrize("text", ["0.36/hour", "0.0001/second", "0/hour", "999999999.9999999999/second", "5/hour"])
def test_a_price_is_its_text(text: str) -> None:
    assert str(Price.parse(text)) == text
    assert Price.parse(text) == Price(Decimal(text.partition("/")[0]), Price.parse(text).unit)


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "/hour", "-1/hour", "1/minute", "1/Hour", "1e3/hour", "NaN/hour", "Infinity/hour", "1./hour",
        ".5/hour", "1/hour ", "1/hour\n", "\u0661/hour", "1_0/hour", "1/hour/hour", "1234567890/hour",
        "0.12345678901/hour", "$1/hour",
    ],
)  # fmt: skip
def test_what_is_no_price(text: str) -> None:
    with pytest.raises(UsageError, match="give AMOUNT/second or AMOUNT/hour"):
        Price.parse(text)


@pytest.mark.parametrize("amount", ["NaN", "sNaN", "Infinity", "-1", "1e9", "1e-11"])
def test_an_amount_that_is_none(amount: str) -> None:
    with pytest.raises(UsageError, match="price is"):
        Price(Decimal(amount), "hour")


def test_costs_are_exact() -> None:
    assert Price.parse("0.36/hour").of(SAMPLE_RATE) == Fraction(1, 10_000)
    assert Price.parse("0.0001/second").of(SAMPLE_RATE) == Fraction(1, 10_000)
    assert Price.parse("1/hour").of(1) == Fraction(1, 3600 * SAMPLE_RATE)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, True, "5", 10**12, 0.5, [1]])
@pytest.mark.parametrize("name", ["requests_per_minute", "audio_seconds_per_day", "concurrent_requests"])
def test_absurd_limits(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is .*; give 1 to"):
        Limits(**{name: value})


@pytest.mark.parametrize("name", ["requests_per_minute", "concurrent_requests"])
def test_requests_are_whole(name: str) -> None:
    fraction: Any = 2.5
    with pytest.raises(UsageError, match=name):
        Limits(**{name: fraction})
    assert Limits(audio_seconds_per_day=2.5).samples_per_day == 40_000


@pytest.mark.parametrize("models", [(), ("",), ("a\nb",), ("tiny", " x")])
def test_absurd_models(models: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="models are"):
        Limits(models=models)


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (Fraction(0), "0"), (Fraction(1, 10_000), "0.0001"), (Fraction(1, 3), "0.3333333333"),
        (Fraction(2, 3), "0.6666666667"), (Fraction(1, 10**10), "0.0000000001"), (Fraction(1, 10**11), "0"),
        (Fraction(10), "10"), (Fraction(100, 1), "100"), (Fraction(-5, 4), "-1.25"), (Fraction(10**30), "1" + "0" * 30),
        (Fraction(1999999999999, 10**12), "2"), (Fraction(-1, 10**12), "0"), (Fraction(15, 10**11), "0.0000000002"),
    ],
)  # fmt: skip
def test_decimal_text(cost: Fraction, text: str) -> None:
    assert decimal_text(cost) == text


@given(st.fractions())
def test_decimal_text_is_near(cost: Fraction) -> None:
    text = decimal_text(cost)
    assert abs(Fraction(text) - cost) <= Fraction(1, 2 * 10**10)
    assert not set(text) - set("-0123456789.")


# ---- keys ----


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


FULL = Limits(60, 3600.5, 4, ("tiny", "0.6b"), Price(Decimal("0.36"), "hour"))


def test_keys_come_back_as_they_were(path: Path) -> None:
    first, secret = create_key(path, "Ärger GmbH", FULL)
    second, other = create_key(path, "acme", Limits())
    assert list_keys(path) == [first, second]
    assert (first.name, first.limits, first.revoked) == ("Ärger GmbH", FULL, None)
    assert datetime.fromisoformat(first.created).utcoffset() is not None
    assert len({secret, other}) == 2
    assert all(one.startswith("ark-") and len(one) == 47 for one in (secret, other))


def test_the_file_holds_no_secret_and_only_its_owner_reads_it(path: Path) -> None:
    modes: list[int] = []
    before = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            dump = json.dump

            def look(value: object, file: Any, **options: Any) -> None:
                modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
                dump(value, file, **options)

            patch.setattr(json, "dump", look)
            patch.setattr(os, "fsync", lambda _file: modes.append(path.exists()))
            _, secret = create_key(path, "acme", FULL)
        revoke_key(path, "acme")
        _, again = create_key(path, "acme", FULL)
    finally:
        os.umask(before)
    assert modes == [0o600, False], "written to be read by others, or renamed before it is on the disk"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {p.name for p in path.parent.iterdir()} <= {"keys.json", "keys.json.lock"}
    for one in path.parent.iterdir():
        for part in (secret, again):
            assert part.removeprefix("ark-").encode() not in one.read_bytes()
    assert hashlib.sha256(again.encode()).hexdigest().encode() in path.read_bytes()


@pytest.mark.parametrize(
    "name", ["", " ", "a" * 65, "a\nb", "a\x00", "a\x1b[1m", " a", "a ", "a\u2028b", "\ud800", "a\u202eb"]
)
def test_names_that_are_none(path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"name is .*; give 1 to 64 printable") as caught:
        create_key(path, name, Limits())
    assert str(caught.value).isprintable()
    assert list_keys(path) == []


def test_a_name_is_taken_until_its_key_is_revoked(path: Path) -> None:
    _, old = create_key(path, "acme", Limits())
    with pytest.raises(UsageError, match=r"keys\.json: has a key 'acme'; choose another"):
        create_key(path, "acme", Limits())
    revoked = revoke_key(path, "acme")
    assert revoked.revoked is not None
    fresh, secret = create_key(path, "acme", FULL)
    assert list_keys(path) == [revoked, fresh]
    ring = Keyring(path)
    assert (ring.find(old), ring.find(secret)) == (None, fresh)
    with pytest.raises(UsageError, match="has a key 'acme'"):
        create_key(path, "acme", Limits())
    revoke_key(path, "acme")
    for name in ("acme", "nobody"):
        with pytest.raises(UsageError, match=f"has no key '{name}' that is not revoked"):
            revoke_key(path, name)


def test_no_file_is_no_keys(path: Path) -> None:
    ring = Keyring(path)
    assert ring.is_empty
    assert ring.find("ark-x") is None
    assert list_keys(path) == []
    assert not path.parent.exists()
    _, secret = create_key(path, "acme", Limits())
    assert not ring.is_empty
    assert ring.find(secret) is not None


def test_create_and_revoke_while_the_server_runs(path: Path) -> None:
    create_key(path, "other", Limits())
    ring = Keyring(path)
    for _ in range(20):
        made, secret = create_key(path, "acme", FULL)
        assert ring.find(secret) == made
        revoke_key(path, "acme")
        assert ring.find(secret) is None
    revoke_key(path, "other")
    assert not ring.is_empty  # or a server without living keys would be open to all


def test_an_unchanged_file_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, secret = create_key(path, "acme", Limits())
    ring = Keyring(path)
    ring.find("")

    def fail(_path: Path) -> bytes:
        raise AssertionError

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert ring.find(secret) == made
    assert ring.find(secret + "x") is None


def damage(path: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    value = json.loads(path.read_bytes())
    change(value)
    return json.dumps(value).encode()


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda v: v.update(format=2),
    "no format": lambda v: v.pop("format"),
    "no keys": lambda v: v.pop("keys"),
    "keys": lambda v: v.update(keys={"a": 1}),
    "keys null": lambda v: v.update(keys=None),
    "twice": lambda v: v["keys"].append(v["keys"][0]),
    "name twice": lambda v: v["keys"].append({**v["keys"][0], "sha256": "0" * 64}),
    "hash twice": lambda v: v["keys"].append({**v["keys"][0], "name": "x"}),
    "key": lambda v: v.update(keys=[["name"]]),
    "key number": lambda v: v.update(keys=[1]),
    "field missing": lambda v: v["keys"][0].pop("revoked"),
    "field unknown": lambda v: v["keys"][0].update(admin=True),
    "limit missing": lambda v: v["keys"][0]["limits"].pop("audio_seconds_per_day"),
    "limit unknown": lambda v: v["keys"][0]["limits"].update(tokens=1),
    "limit negative": lambda v: v["keys"][0]["limits"].update(requests_per_minute=-1),
    "limit NaN": lambda v: v["keys"][0]["limits"].update(audio_seconds_per_day=math.nan),
    "limits": lambda v: v["keys"][0].update(limits=[]),
    "models": lambda v: v["keys"][0]["limits"].update(models="tiny"),
    "models deep": lambda v: v["keys"][0]["limits"].update(models=[["tiny"]]),
    "price": lambda v: v["keys"][0]["limits"].update(price="-1/hour"),
    "price empty": lambda v: v["keys"][0]["limits"].update(price=""),
    "price number": lambda v: v["keys"][0]["limits"].update(price=1),
    "price zero": lambda v: v["keys"][0]["limits"].update(price=0),
    "hash": lambda v: v["keys"][0].update(sha256="00"),
    "hash null": lambda v: v["keys"][0].update(sha256=None),
    "created": lambda v: v["keys"][0].update(created="yesterday"),
    "created null": lambda v: v["keys"][0].update(created=None),
    "created local": lambda v: v["keys"][0].update(created="2026-11-22T00:00:00"),
    "revoked": lambda v: v["keys"][0].update(revoked=False),
    "revoked empty": lambda v: v["keys"][0].update(revoked=""),
    "name": lambda v: v["keys"][0].update(name="a\nb"),
    "name null": lambda v: v["keys"][0].update(name=None),
}


@pytest.mark.parametrize("what", [*DAMAGES, "torn", "empty", "binary", "list", "deep"])
def test_a_damaged_file_lets_nobody_in(path: Path, what: str) -> None:
    _, secret = create_key(path, "acme", FULL)
    ring = Keyring(path)
    assert ring.find(secret) is not None
    good = path.read_bytes()
    raw = {"torn": good[:-9], "empty": b"", "binary": bytes(range(256)), "list": b"[1]", "deep": b"[" * 100_000}
    bad = raw[what] if what in raw else damage(path, DAMAGES[what])
    path.write_bytes(bad)
    calls: Sequence[Callable[[], object]] = (
        lambda: ring.find(secret), lambda: ring.find("ark-x"), lambda: ring.is_empty, lambda: list_keys(path),
        lambda: create_key(path, "b", Limits()), lambda: revoke_key(path, "acme"), lambda: Keyring(path).find(secret),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match=r"keys\.json: not a file of keys \(.*put back a copy") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == bad
    path.write_bytes(good)
    assert ring.find(secret) is not None


def test_a_file_that_is_lost_lets_nobody_in(path: Path) -> None:
    _, secret = create_key(path, "acme", Limits())
    ring = Keyring(path)
    assert ring.find(secret) is not None
    path.unlink()
    with pytest.raises(UsageError, match="is gone; put it back"):
        ring.find(secret)
    with pytest.raises(UsageError, match="is gone; put it back"):
        _ = ring.is_empty


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "keys.json").mkdir()
    for path in (tmp_path / "file" / "keys.json", tmp_path / "keys.json"):
        calls: Sequence[Callable[[], object]] = (
            partial(list_keys, path), partial(create_key, path, "a", Limits()), partial(Keyring(path).find, "x"),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(UsageError, match=r"keys\.json: cannot be (read|written) \("):
                call()


def test_a_file_that_another_process_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key(path, "acme", Limits())
    monkeypatch.setattr(accounts, "_PATIENCE_S", 0.05)
    with (
        FileLock(path.with_name("keys.json.lock")),
        pytest.raises(UsageError, match="another process is changing it; try again"),
    ):
        create_key(path, "b", Limits())


def test_the_comparison_takes_no_short_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One constant-time comparison for each stored key, whichever matches, is revoked, or none."""
    made = [create_key(path, f"key {i}", Limits()) for i in range(5)]
    revoke_key(path, "key 2")
    ring = Keyring(path)
    compared: list[tuple[object, object]] = []
    compare = hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    secrets = [secret for _, secret in made]
    for secret in [*secrets, "", "ark-", secrets[0] + "x", secrets[0][:-1], "é", "\ud800", "x" * 100_000]:
        compared.clear()
        found = ring.find(secret)
        expected = next((k for k, s in made if s == secret and k.name != "key 2"), None)
        assert found == expected
        digest = hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()
        assert compared == [(k.sha256, digest) for k, _ in made]


def create_some(pipe: Connection, number: int, barrier: Any, path: Path) -> None:
    barrier.wait(TIMEOUT_S)
    pipe.send([create_key(path, f"key {number}.{i}", Limits())[1] for i in range(10)])


def test_keys_that_are_created_at_once_are_all_there(path: Path) -> None:
    secrets = [secret for some in in_processes(4, create_some, path) for secret in some]
    ring = Keyring(path)
    assert len(secrets) == 40
    assert len({found.name for secret in secrets if (found := ring.find(secret))}) == 40


# ---- requests per minute ----


@pytest.mark.parametrize("rpm", [1, 3, 7, 60, 999, 1_000_000])
def test_retry_after_is_exact(open_accounts: Callable[[], Accounts], clock: Clock, rpm: int) -> None:
    """To the microsecond, also where another process admits next."""
    whose = key(Limits(requests_per_minute=rpm))
    interval_us = -(-60_000_000 // rpm)
    for i in range(min(rpm, 50)):
        open_accounts().admit(whose, f"first {i}")
    if rpm > 50:  # as if the rest had come too
        with open_accounts()._database.transaction() as (connection, now_us):
            connection.execute("UPDATE rate SET full_at_us = ?", (now_us + rpm * interval_us,))
    time_us = round(NOON * 1e6)
    for i in range(5):
        error = refused(partial(open_accounts().admit, whose, f"early {i}"))
        assert error.code == "rate_limit_exceeded"
        assert error.retry_after_s == interval_us / 1e6
        time_us += interval_us
        clock.time_s = (time_us - 1) / 1e6
        last = refused(partial(open_accounts().admit, whose, f"nearly {i}"))
        assert last.retry_after_s == 1e-6
        assert (last.headers["retry-after"], last.headers["retry-after-ms"]) == ("1", "1")
        clock.time_s = time_us / 1e6
        open_accounts().admit(whose, f"then {i}")


def test_a_pause_gives_back_a_minute_and_no_more(books: Accounts, clock: Clock) -> None:
    whose = key(Limits(requests_per_minute=5))
    for _ in range(3):
        for i in range(5):
            serve(books, whose, f"{clock.time_s} {i}")
        refused(lambda: books.admit(whose, "x"))
        clock.time_s += HOUR
    clock.time_s += 30 - HOUR  # half a minute after the last five
    for i in range(2):
        serve(books, whose, f"half {i}")
    refused(lambda: books.admit(whose, "x"))


def test_a_refused_request_uses_up_nothing(books: Accounts) -> None:
    whose = key(Limits(requests_per_minute=60, concurrent_requests=1))
    with books.admit(whose, "a"):
        for i in range(200):
            assert refused(partial(books.admit, whose, f"b{i}")).code == "concurrency_limit_exceeded"
    with books.admit(whose, "c") as admission:
        assert admission.headers["x-ratelimit-remaining-requests"] == "58"


@pytest.mark.parametrize("back_s", [10.0, 30.0, 59.0, 60.0, 1000 * HOUR])
def test_a_clock_that_was_set_back_locks_nobody_out(books: Accounts, clock: Clock, back_s: float) -> None:
    """Regression: a minute that is full in the far future was taken for one that is full a minute from now, always."""
    whose = key(Limits(requests_per_minute=2, concurrent_requests=2))
    for request_id in ("a", "b"):
        books.admit(whose, request_id)
    books._database.running.clear()  # as if their process were killed
    outcomes: list[Admission | LimitError] = []
    while not outcomes or isinstance(outcomes[-1], LimitError):
        clock.time_s = NOON - back_s + len(outcomes)
        try:
            outcomes.append(books.admit(whose, "c"))
        except LimitError as error:
            outcomes.append(error)
        assert int(outcomes[-1].headers["x-ratelimit-remaining-requests"]) in {0, 1}
    seconds_waited = len(outcomes) - 1
    assert seconds_waited == (0 if back_s >= 60 else 30 + back_s)


@pytest.mark.parametrize("back_s", [31.0, 1000 * HOUR])
def test_leases_of_a_clock_that_was_set_back_are_void(books: Accounts, clock: Clock, back_s: float) -> None:
    whose = key(Limits(concurrent_requests=1))
    books.admit(whose, "dead")
    books._database.running.clear()
    clock.time_s = NOON - back_s
    with books.admit(whose, "a"):
        refused(lambda: books.admit(whose, "b"))


def test_names_do_not_share_limits_but_a_replaced_key_keeps_them(books: Accounts) -> None:
    limits = Limits(requests_per_minute=1)
    books.admit(key(limits), "a")
    books.admit(key(limits, name="other"), "b")
    refused(lambda: books.admit(replace(key(limits), sha256="0" * 64), "c"))


# ---- headers ----


def test_no_limits_no_headers(books: Accounts) -> None:
    with books.admit(key(), "a") as admission:
        admission.reserve(10**12)
        assert admission.headers == {}


def test_headers(books: Accounts, clock: Clock) -> None:
    whose = key(Limits(requests_per_minute=50, audio_seconds_per_day=100.5, concurrent_requests=1))
    with books.admit(whose, "a") as admission:
        expected = {
            "x-ratelimit-limit-requests": "50",
            "x-ratelimit-remaining-requests": "49",
            "x-ratelimit-reset-requests": "1.2s",
            "x-ratelimit-limit-audio-seconds": "100.5",
            "x-ratelimit-remaining-audio-seconds": "100.5",
        }
        assert admission.headers == expected
        admission.reserve(8_000)
        expected["x-ratelimit-remaining-audio-seconds"] = "100"
        assert admission.headers == expected
        clock.time_s += 0.2
        error = refused(lambda: books.admit(whose, "b"))
        expected["x-ratelimit-reset-requests"] = "1s"
        assert error.code == "concurrency_limit_exceeded"
        assert error.retry_after_s == 1
        assert error.headers == expected | {"retry-after": "1", "retry-after-ms": "1000"}


# ---- running requests ----


def test_leaving_frees_the_place_once(open_accounts: Callable[[], Accounts]) -> None:
    whose = key(Limits(concurrent_requests=2))
    a, b = open_accounts(), open_accounts()
    first, second = a.admit(whose, "1"), b.admit(whose, "2")
    assert "2 requests are running" in str(refused(lambda: a.admit(whose, "3")))
    with first:
        pass
    third = a.admit(whose, "3")
    with first:  # again: must not free the place of the third
        pass
    refused(lambda: b.admit(whose, "4"))
    with pytest.raises(ZeroDivisionError), second:
        _ = 1 / 0
    fourth = b.admit(whose, "4")
    fourth.finish(1, model="tiny", route=ROUTE)
    with pytest.raises(UsageError, match="request 4: has ended"):
        fourth.reserve(1)
    b.heartbeat()
    with fourth, b.admit(whose, "5"):
        refused(lambda: b.admit(whose, "6"))
    with third:
        pass


def test_leases_of_the_dead_expire_and_heartbeats_renew(
    open_accounts: Callable[[], Accounts], clock: Clock, tmp_path: Path
) -> None:
    whose = key(Limits(concurrent_requests=2, audio_seconds_per_day=10))
    dead, living = open_accounts(), open_accounts()
    dead.admit(whose, "dead").reserve(6 * SAMPLE_RATE)
    mine = living.admit(whose, "living")
    mine.reserve(4 * SAMPLE_RATE)
    clock.time_s = NOON + LEASE_S - 1
    living.heartbeat()
    clock.time_s = NOON + LEASE_S - 1e-6
    assert refused(lambda: living.admit(whose, "early")).code == "audio_quota_exceeded"
    assert refused(lambda: mine.reserve(4 * SAMPLE_RATE + 1)).code == "audio_quota_exceeded"
    clock.time_s = NOON + LEASE_S
    mine.reserve(5 * SAMPLE_RATE)
    with living.admit(whose, "now"):
        assert refused(lambda: living.admit(whose, "third")).code == "concurrency_limit_exceeded"
    living.heartbeat()
    assert query(tmp_path / "usage", "SELECT request_id FROM running") == [("living",)]


def test_a_process_that_stood_still_takes_its_places_back(
    open_accounts: Callable[[], Accounts], clock: Clock, tmp_path: Path
) -> None:
    whose = key(Limits(concurrent_requests=1, audio_seconds_per_day=10))
    asleep, awake = open_accounts(), open_accounts()
    mine = asleep.admit(whose, "mine")
    mine.reserve(6 * SAMPLE_RATE)
    clock.time_s += HOUR
    awake.heartbeat()
    assert query(tmp_path / "usage", "SELECT * FROM running") == []
    asleep.heartbeat()
    assert refused(lambda: awake.admit(whose, "x")).code == "concurrency_limit_exceeded"
    with mine:
        pass
    with awake.admit(whose, "x") as admission:
        admission.reserve(10 * SAMPLE_RATE)


def test_a_request_id_runs_once_at_a_time(books: Accounts) -> None:
    with books.admit(key(), "a"), pytest.raises(UsageError, match="request a: is running already"):
        books.admit(key(), "a")


def test_what_was_not_admitted_is_not_renewed(books: Accounts, tmp_path: Path) -> None:
    whose = key(Limits(concurrent_requests=1))
    with books.admit(whose, "a"):
        refused(lambda: books.admit(whose, "b"))
    books.heartbeat()
    assert query(tmp_path / "usage", "SELECT * FROM running") == []


def test_who_waits_for_the_database_reads_the_clock_when_it_comes_in(
    open_accounts: Callable[[], Accounts], clock: Clock, tmp_path: Path
) -> None:
    """Or its lease would end before those of requests that came in earlier."""
    a, b = open_accounts(), open_accounts()
    b.heartbeat()
    waiting = threading.Thread(target=b.admit, args=(key(), "a"))
    with a._database.transaction():
        waiting.start()
        waiting.join(0.2)
        clock.time_s = NOON + 5
    waiting.join(TIMEOUT_S)
    assert query(tmp_path / "usage", "SELECT alive_until_us FROM running") == [(round((NOON + 5 + LEASE_S) * 1e6),)]


# ---- audio of a day ----


def test_reservations_count_against_each_other(open_accounts: Callable[[], Accounts]) -> None:
    whose = key(Limits(audio_seconds_per_day=10))
    a, b = open_accounts().admit(whose, "a"), open_accounts().admit(whose, "b")
    a.reserve(6 * SAMPLE_RATE)
    a.reserve(2 * SAMPLE_RATE)  # at least: six stay
    b.reserve(4 * SAMPLE_RATE)
    error = refused(lambda: b.reserve(4 * SAMPLE_RATE + 1))
    assert (error.code, error.retry_after_s) == ("audio_quota_exceeded", 12 * HOUR)
    assert error.headers["retry-after"] == str(12 * 3600)
    assert "try again in 43200 s" in str(error)
    b.reserve(4 * SAMPLE_RATE)
    assert refused(lambda: open_accounts().admit(whose, "c")).code == "audio_quota_exceeded"
    a.finish(SAMPLE_RATE, model="tiny", route=ROUTE)  # less than it held
    b.reserve(9 * SAMPLE_RATE)
    refused(lambda: b.reserve(9 * SAMPLE_RATE + 1))
    with b:
        pass
    with open_accounts().admit(whose, "d") as admission:
        assert admission.headers["x-ratelimit-remaining-audio-seconds"] == "9"
        admission.reserve(9 * SAMPLE_RATE)


def test_no_reservation_after_the_end(books: Accounts, tmp_path: Path) -> None:
    """Or a place would be taken that nobody frees."""
    whose = key(Limits(audio_seconds_per_day=10))
    with books.admit(whose, "a") as admission:
        pass
    with pytest.raises(UsageError, match="request a: has ended"):
        admission.reserve(1)
    books.heartbeat()
    assert query(tmp_path / "usage", "SELECT * FROM running") == []


def test_leaving_while_another_thread_reserves(
    books: Accounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the thread put the request back among the running ones, whose leases were then renewed forever."""
    admission = books.admit(key(Limits(audio_seconds_per_day=10)), "a")
    leaving = threading.Thread(target=admission.__exit__, args=(None, None, None))
    check = accounts._Standing.check_audio

    def leave_meanwhile(standing: accounts._Standing, num_samples: int) -> None:
        leaving.start()
        leaving.join(0.2)
        check(standing, num_samples)

    monkeypatch.setattr(accounts._Standing, "check_audio", leave_meanwhile)
    admission.reserve(1)
    leaving.join(TIMEOUT_S)
    books.heartbeat()
    assert query(tmp_path / "usage", "SELECT * FROM running") == []


def test_day_boundary(open_accounts: Callable[[], Accounts], clock: Clock) -> None:
    """A day's usage never exceeds its limit, also when a request runs over midnight."""
    midnight = NOON + 12 * HOUR
    whose = key(Limits(audio_seconds_per_day=10, price=Price.parse("1/second")))
    books = open_accounts()
    clock.time_s = midnight - 1.25
    serve(books, whose, "late", 4)
    over = books.admit(whose, "over")
    over.reserve(6 * SAMPLE_RATE)
    error = refused(lambda: books.admit(whose, "too late"))
    assert error.retry_after_s == 1.25
    assert (error.headers["retry-after"], error.headers["retry-after-ms"]) == ("2", "1250")
    clock.time_s = midnight - 1e-6
    assert refused(lambda: books.admit(whose, "x")).retry_after_s == pytest.approx(1e-6)
    clock.time_s = midnight
    with open_accounts().admit(whose, "early") as early:
        early.reserve(4 * SAMPLE_RATE)
        assert refused(lambda: early.reserve(4 * SAMPLE_RATE + 1)).retry_after_s == 24 * HOUR
        over.finish(6 * SAMPLE_RATE, model="tiny", route=ROUTE)
        early.finish(4 * SAMPLE_RATE, model="tiny", route=ROUTE)
    refused(lambda: books.admit(whose, "y"))
    assert [line.num_samples for line in books.usage(until=date(2026, 11, 22))] == [4 * SAMPLE_RATE]
    assert [line.num_samples for line in books.usage(since=date(2026, 11, 23))] == [10 * SAMPLE_RATE]
    assert [line.num_samples for line in books.usage()] == [14 * SAMPLE_RATE]
    assert books.usage(since=date(2026, 11, 24)) == []
    clock.time_s = midnight - HOUR  # set back: yesterday is as full as it was
    books.admit(whose, "again").reserve(6 * SAMPLE_RATE)


# ---- usage ----


def test_finish_counts_once(open_accounts: Callable[[], Accounts], tmp_path: Path) -> None:
    whose = key(Limits(audio_seconds_per_day=10, price=Price.parse("0.36/hour")))
    with open_accounts().admit(whose, "a") as admission:
        cost = admission.finish(SAMPLE_RATE, model="tiny", route=ROUTE)
        assert admission.finish(5 * SAMPLE_RATE, model="0.6b", route="/other") == cost == Fraction(1, 10_000)
    assert admission.finish(SAMPLE_RATE, model="tiny", route=ROUTE) == cost
    assert serve(open_accounts(), replace(whose, limits=Limits()), "a", 9) == cost  # of another process, dearer
    assert open_accounts().usage() == [UsageLine("acme", "tiny", 1, SAMPLE_RATE, cost)]
    with open_accounts().admit(whose, "b") as admission:
        assert admission.headers["x-ratelimit-remaining-audio-seconds"] == "9"
    rows = query(
        tmp_path / "usage", "SELECT request_id, finished_us, name, sha256, model, route, samples, price FROM usage"
    )
    sha256 = bytes.fromhex(whose.sha256)
    assert rows == [("a", round(NOON * 1e6), "acme", sha256, "tiny", ROUTE, SAMPLE_RATE, "0.36/hour")]


def test_many_threads_finish_the_same_once(books: Accounts) -> None:
    admission = books.admit(key(Limits(price=Price.parse("1/second"))), "a")
    costs: list[Fraction] = []
    threads = [
        threading.Thread(target=lambda n=n: costs.append(admission.finish(n, model="m", route=ROUTE)))
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (line,) = books.usage()
    assert (line.requests, {line.cost}) == (1, set(costs))
    assert len(costs) == 8


def test_a_request_that_failed_is_not_charged(books: Accounts) -> None:
    whose = key(Limits(audio_seconds_per_day=10))
    with suppress(ZeroDivisionError), books.admit(whose, "a") as admission:
        admission.reserve(10 * SAMPLE_RATE)
        _ = 1 / 0
    assert books.usage() == []
    with books.admit(whose, "b") as admission:
        admission.reserve(10 * SAMPLE_RATE)


def test_usage_by_key_and_model_at_the_prices_of_the_time(books: Accounts) -> None:
    cheap, dear = (key(Limits(price=Price.parse(text))) for text in ("0.36/hour", "0.0002/second"))
    serve(books, cheap, "a", 1)
    serve(books, dear, "b", 2)
    serve(books, key(), "c", 4)
    serve(books, cheap, "d", 8, model="0.6b")
    serve(books, key(name="zed"), "e", 0)
    assert books.usage() == [
        UsageLine("acme", "0.6b", 1, 8 * SAMPLE_RATE, Fraction(8, 10_000)),
        UsageLine("acme", "tiny", 3, 7 * SAMPLE_RATE, Fraction(5, 10_000)),
        UsageLine("zed", "tiny", 1, 0, Fraction(0)),
    ]


PRICES = st.one_of(
    st.none(),
    st.builds(
        Price,
        st.decimals(0, 999_999_999, places=10).filter(lambda amount: amount >= 0),
        st.sampled_from(["second", "hour"]),
    ),
)


@given(st.lists(st.tuples(st.integers(0, 2**40), PRICES, st.sampled_from(["tiny", "0.6b"])), max_size=20))
def test_sums_are_exact(requests: list[tuple[int, Price | None, str]]) -> None:
    expected: dict[str, Fraction] = {}
    with tempfile.TemporaryDirectory() as folder, closing(Accounts(Path(folder), now=Clock())) as books:
        books.heartbeat()
        for i, (num_samples, price, model) in enumerate(requests):
            cost = books.admit(key(Limits(price=price)), str(i)).finish(num_samples, model=model, route=ROUTE)
            seconds = {"second": SAMPLE_RATE, "hour": SAMPLE_RATE * 3600}
            assert cost == (Fraction(str(price.amount)) * num_samples / seconds[price.unit] if price else 0)
            expected[model] = expected.get(model, Fraction(0)) + cost
        assert {line.model: line.cost for line in books.usage()} == expected
        assert sum(line.num_samples for line in books.usage()) == sum(n for n, _, _ in requests)


def test_usage_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"usage\.sqlite3: no such file; check the folder"):
        Accounts(tmp_path / "none").usage()
    assert list(tmp_path.iterdir()) == []


def test_usage_is_read_while_a_server_writes(books: Accounts, open_accounts: Callable[[], Accounts]) -> None:
    serve(books, key(), "a")
    with books._database.transaction() as (connection, _):
        connection.execute("DELETE FROM usage")
        assert [line.requests for line in open_accounts().usage()] == [1]
    assert open_accounts().usage() == []


def test_usage_after_the_server_was_closed(books: Accounts, tmp_path: Path) -> None:
    serve(books, key(), "a")
    books.close()
    assert not (tmp_path / "usage" / f"{DATABASE}-wal").exists()
    assert [line.requests for line in Accounts(tmp_path / "usage").usage()] == [1]
    serve(books, key(), "b")
    assert [line.requests for line in books.usage()] == [2]


def test_the_database(books: Accounts, tmp_path: Path) -> None:
    books.heartbeat()
    folder = tmp_path / "usage"
    assert query(folder, "PRAGMA journal_mode") == [("wal",)]
    assert query(folder, "PRAGMA user_version") == [(1,)]
    with books._database.transaction() as (connection, _):
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (10_000,)
    assert {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in folder.glob(f"{DATABASE}*[!k]")} == {0}


def test_a_database_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / DATABASE).write_bytes(bytes(range(256)) * 64)
    newer = Accounts(tmp_path / "newer")
    newer.heartbeat()
    newer.close()
    with closing(sqlite3.connect(tmp_path / "newer" / DATABASE)) as connection:
        connection.execute("PRAGMA user_version = 2")
    (tmp_path / "foreign").mkdir()
    with closing(sqlite3.connect(tmp_path / "foreign" / DATABASE)) as connection:
        connection.execute("CREATE TABLE usage (x)")
    for name in ("file", "noise", "newer", "foreign"):
        books = Accounts(tmp_path / name)
        with pytest.raises(UsageError, match=r"usage\.sqlite3: .*; (check its|give another) folder") as caught:
            books.admit(key(), "a")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be used"):
        Accounts(tmp_path / "noise").usage()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda _path, **options: connect(":memory:", **options))
    with pytest.raises(UsageError, match="not on a local disk"):
        Accounts(tmp_path / "remote").heartbeat()


def test_a_database_that_stays_locked(
    books: Accounts, open_accounts: Callable[[], Accounts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "_PATIENCE_S", 0.05)
    other = open_accounts()
    other.heartbeat()
    with books._database.transaction(), pytest.raises(UsageError, match="database is locked"):
        other.admit(key(), "a")
    with (
        FileLock(books._database.path.with_name(f"{DATABASE}.lock")),
        pytest.raises(UsageError, match="another process"),
    ):
        open_accounts().heartbeat()


def test_a_row_of_usage_is_small(books: Accounts, tmp_path: Path) -> None:
    whose = key(FULL)
    for i in range(300):
        whose = replace(whose, limits=replace(FULL, requests_per_minute=None, audio_seconds_per_day=None))
        serve(books, whose, hashlib.sha256(bytes(i)).hexdigest()[:32], 5)
    books.close()
    assert (tmp_path / "usage" / DATABASE).stat().st_size < 300 * 250 + 6 * 4096
    assert query(tmp_path / "usage", "SELECT COUNT(*) FROM running") == [(0,)]
    assert query(tmp_path / "usage", "SELECT COUNT(*) FROM spent") == [(1,)]


# ---- several processes, and kill -9 ----


def hammer(pipe: Connection, number: int, barrier: Any, folder: Path, whose: Key) -> None:
    """Ask forty times at the same moment, hold every place until all have asked."""
    books = Accounts(folder, now=Clock())
    barrier.wait(TIMEOUT_S)
    codes: list[str] = []
    with ExitStack() as held:
        for i in range(40):
            try:
                admission = held.enter_context(books.admit(whose, f"{number}.{i}"))
                admission.reserve(SAMPLE_RATE)
                codes.append("served")
            except LimitError as error:
                codes.append(error.code)
        barrier.wait(TIMEOUT_S)
    pipe.send(codes)


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(requests_per_minute=50), "rate_limit_exceeded"),
        (Limits(concurrent_requests=50), "concurrency_limit_exceeded"),
        (Limits(audio_seconds_per_day=50), "audio_quota_exceeded"),
    ],
)
def test_processes_that_hammer_get_the_limit_and_no_more(tmp_path: Path, limits: Limits, code: str) -> None:
    codes = [code for some in in_processes(4, hammer, tmp_path, key(limits)) for code in some]
    assert len(codes) == 160
    assert codes.count("served") == 50
    assert codes.count(code) == 110


def consume(pipe: Connection, number: int, barrier: Any, folder: Path, whose: Key, inside: Any) -> None:
    """Take seconds of audio until the day is full; how many, and how many requests were ever inside at once."""
    books = Accounts(folder, now=Clock())
    barrier.wait(TIMEOUT_S)
    taken = most = i = 0
    while True:
        i += 1
        try:
            with books.admit(whose, f"{number}.{i}") as admission:
                with inside.get_lock():
                    inside.value += 1
                    most = max(most, inside.value)
                try:
                    admission.reserve(SAMPLE_RATE)
                    if i % 3:
                        admission.reserve(2 * SAMPLE_RATE)
                    with inside.get_lock():
                        inside.value -= 1
                    admission.finish((2 if i % 3 else 1) * SAMPLE_RATE, model="tiny", route=ROUTE)
                    taken += 2 if i % 3 else 1
                except LimitError:
                    with inside.get_lock():
                        inside.value -= 1
        except LimitError as error:
            if error.code == "audio_quota_exceeded" and books.usage()[0].num_samples == 200 * SAMPLE_RATE:
                break
    books.close()
    pipe.send((taken, most))


def test_processes_that_finish_fill_the_day_exactly(tmp_path: Path) -> None:
    whose = key(Limits(audio_seconds_per_day=200, concurrent_requests=2, price=Price.parse("1/second")))
    answers = in_processes(4, consume, tmp_path, whose, SPAWN.Value("i", 0))
    assert sum(taken for taken, _ in answers) == 200
    assert max(most for _, most in answers) <= 2
    (line,) = Accounts(tmp_path).usage()
    assert (line.num_samples, line.cost) == (200 * SAMPLE_RATE, Fraction(200))


def finish_forever(pipe: Connection, folder: Path, whose: Key, seed: int) -> None:
    """Two threads that serve, and write down each request after its end, until somebody kills them."""
    books = Accounts(folder, now=Clock())
    lock = threading.Lock()

    def work(number: int) -> None:
        for i in range(1_000_000):
            with books.admit(whose, f"{seed}.{number}.{i}") as admission:
                admission.reserve(i + 1)
                admission.finish(i + 1, model="tiny", route=ROUTE)
                with lock:
                    pipe.send((f"{seed}.{number}.{i}", i + 1))

    for number in range(2):
        threading.Thread(target=work, args=(number,)).start()


def killed(process: Any, receiver: Any, *, after: int) -> list[Any]:
    """What a process had sent when it was killed, which was after so many messages."""
    sent = []
    for _ in range(after):
        assert receiver.poll(TIMEOUT_S), "the process sends nothing"
        sent.append(receiver.recv())
    os.kill(process.pid, signal.SIGKILL)
    process.join(TIMEOUT_S)
    try:
        while True:
            sent.append(receiver.recv())
    except EOFError:
        return sent


@pytest.mark.parametrize("after", [1, 7, 40, 150])
def test_after_kill_9_usage_is_what_was_finished(tmp_path: Path, after: int) -> None:
    whose = key(Limits(10**6, 10**9, 1000, None, Price.parse("1/second")))
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=finish_forever, args=(sender, tmp_path, whose, after))
    process.start()
    sender.close()
    sent: dict[str, int] = dict(killed(process, receiver, after=after))
    recorded: dict[str, int] = dict(query(tmp_path, "SELECT request_id, samples FROM usage"))
    assert query(tmp_path, "PRAGMA integrity_check") == [("ok",)]
    assert sent.items() <= recorded.items()
    unsent = [request_id.split(".")[1] for request_id in recorded.keys() - sent.keys()]
    assert len(unsent) == len(set(unsent)), "more than one request of a thread was recorded and not written down"
    (line,) = Accounts(tmp_path).usage()
    assert (line.requests, line.num_samples) == (len(recorded), sum(recorded.values()))
    assert line.cost == Fraction(sum(recorded.values()), SAMPLE_RATE)
    assert query(tmp_path, "SELECT samples FROM spent") == [(sum(recorded.values()),)]
    left = query(tmp_path, "SELECT samples FROM running")
    assert len(left) <= 2


def hold_forever(pipe: Connection, folder: Path, whose: Key) -> None:
    books = Accounts(folder, now=Clock())
    held = [books.admit(whose, f"held {i}") for i in range(3)]
    for admission in held:
        admission.reserve(SAMPLE_RATE)
    pipe.send("all")
    threading.Event().wait()


def test_after_kill_9_places_are_free_within_the_lease(tmp_path: Path) -> None:
    whose = key(Limits(audio_seconds_per_day=4, concurrent_requests=3))
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=hold_forever, args=(sender, tmp_path, whose))
    process.start()
    sender.close()
    assert killed(process, receiver, after=1) == ["all"]
    clock = Clock(NOON + LEASE_S - 1e-6)
    assert LEASE_S <= 15
    with closing(Accounts(tmp_path, now=clock)) as books:
        assert refused(lambda: books.admit(whose, "early")).code == "concurrency_limit_exceeded"
        clock.time_s = NOON + LEASE_S
        with ExitStack() as held:
            first = held.enter_context(books.admit(whose, "now 0"))
            first.reserve(3 * SAMPLE_RATE)
            for i in (1, 2):
                held.enter_context(books.admit(whose, f"now {i}"))
            refused(lambda: books.admit(whose, "now 3"))
        books.heartbeat()
        assert query(tmp_path, "SELECT * FROM running") == []
        assert books.usage() == []


def begin(pipe: Connection, number: int, barrier: Any, folder: Path) -> None:
    barrier.wait(TIMEOUT_S)
    serve(Accounts(folder), key(), str(number))
    pipe.send(number)


def test_processes_that_begin_at_once_make_one_database(tmp_path: Path) -> None:
    in_processes(6, begin, tmp_path / "new" / "folder")
    assert [line.requests for line in Accounts(tmp_path / "new" / "folder").usage()] == [6]
