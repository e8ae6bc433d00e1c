"""The server with many clients, with too many, beside long recordings, and killed: bench/serve.py in short."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import arkasr
import serve as bench
from arkasr import audio
from arkasr.data import read_manifest

ENDED_S = 30.0  # in which every answer is there, on a busy machine


@pytest.fixture(scope="module")
def clips(shared: Path) -> list[bench.Clip]:
    """Short recordings of different texts, and what the engine says of each by itself."""
    paths = [u.audio for u in read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test")][:48]
    said = arkasr.load_model("tiny").transcribe(paths)
    found = [bench.Clip(p.read_bytes(), t.text, t.duration_s) for p, t in zip(paths, said, strict=True)]
    assert len({clip.text for clip in found}) > 30  # or answers that were mixed up would go unseen
    return found


def joined(shared: Path, target: Path, seconds: float) -> bench.Clip:
    paths = [u.audio for u in read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test")]
    waveform = np.concatenate([audio.load(path) for path in paths])[: round(seconds * audio.SAMPLE_RATE)]
    soundfile.write(target, waveform, audio.SAMPLE_RATE)
    said = arkasr.load_model("tiny").transcribe(target)
    return bench.Clip(target.read_bytes(), said.text, said.duration_s)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bench.Server]:
    with bench.serve(tmp_path_factory.mktemp("load") / "state", "--max-requests", 64) as server:
        yield server


def assert_right(tally: bench.Tally) -> None:
    assert tally.lost == []
    assert tally.wrong == []
    assert tally.latencies_s


def test_as_many_clients_as_places_get_all_their_own_answers(server: bench.Server, clips: list[bench.Clip]) -> None:
    """A client whose answer was there asked again before its place was free, and was told that the server is full."""
    tally = asyncio.run(bench.crowd(server.port, clips, clients=64, seconds=2))
    assert_right(tally)
    assert set(tally.statuses) == {200}
    assert max(tally.latencies_s) < ENDED_S


async def long_among_short(port: int, long: bench.Clip, clips: list[bench.Clip]) -> tuple[float, bench.Tally]:
    """Seconds until the long one is done, and its greedy company."""
    tally, end = bench.Tally(), time.monotonic() + ENDED_S
    asked = asyncio.create_task(bench.once(port, bench.form(long.audio)))
    crowd = [
        bench.ask_on(port, clips, tally, first=2 * n, until=lambda: asked.done() or time.monotonic() > end)
        for n in range(24)
    ]
    await asyncio.gather(*crowd)
    assert asked.done(), "it never got its turn"
    reply = await asked
    assert reply.text == long.text
    return reply.seconds, tally


def test_a_long_recording_is_not_kept_waiting_by_those_who_come_anew(
    shared: Path, tmp_path: Path, server: bench.Server, clips: list[bench.Clip]
) -> None:
    """Every short clip is a caller of its own who comes anew, and each of them was served before the long one's rest;
    of the short ones the longest waited for all shorter ones.
    """
    long = joined(shared, tmp_path / "long.flac", 60)
    _, tally = asyncio.run(long_among_short(server.port, long, clips))
    assert_right(tally)
    median_s = sorted(tally.latencies_s)[len(tally.latencies_s) // 2]
    assert max(tally.latencies_s) < 6 * median_s + 1


async def short_among_long(port: int, clip: bench.Clip, long: bench.Clip) -> tuple[bench.Tally, float]:
    """Latencies of a short clip while three long ones are heard, and the seconds of those."""
    tally = bench.Tally()
    asked = [asyncio.create_task(bench.once(port, bench.form(long.audio))) for _ in range(3)]
    while not all(one.done() for one in asked):
        tally.add(await bench.once(port, bench.form(clip.audio)), clip)
        await asyncio.sleep(0.05)
    replies = await asyncio.gather(*asked)
    assert all(reply.text == long.text for reply in replies)
    return tally, max(reply.seconds for reply in replies)


def test_a_short_recording_does_not_wait_for_long_ones(
    shared: Path, tmp_path: Path, server: bench.Server, clips: list[bench.Clip]
) -> None:
    long = joined(shared, tmp_path / "long.flac", 300)
    tally, long_s = asyncio.run(short_among_long(server.port, clips[0], long))
    assert_right(tally)
    assert len(tally.latencies_s) >= 3
    assert bench.quantiles(tally.latencies_s)["p95"] < long_s / 3


def test_with_four_times_too_many_clients_everyone_is_answered(tmp_path: Path, clips: list[bench.Clip]) -> None:
    with bench.serve(tmp_path / "state", "--max-requests", 8) as server:
        full = asyncio.run(bench.crowd(server.port, clips, clients=8, seconds=2))
        over = asyncio.run(bench.crowd(server.port, clips, clients=32, seconds=3))
    assert_right(full)
    assert_right(over)
    assert set(full.statuses) == {200}
    assert set(over.statuses) == {200, 503}
    assert over.without_retry_after == 0
    assert max(over.latencies_s + over.refused_s) < ENDED_S
    assert (
        over.audio_s / 3 > full.audio_s / 2 / 3
    )  # what is refused takes the time of what is not; bench has the figure


def assert_accounted(found: dict[str, object], clients: int) -> None:
    rounds = found["rounds"]
    assert isinstance(rounds, list)
    for one in rounds:
        assert one["wrong"] == 0
        assert 0 <= one["unrecorded"] <= clients
        assert one["unrecorded_s"] >= -1e-6
        assert one["answered"] > clients
        assert one["first_s"] < ENDED_S


def test_a_kill_charges_nobody_for_what_he_did_not_get(tmp_path: Path, clips: list[bench.Clip]) -> None:
    assert_accounted(bench.killed(tmp_path / "state", clips, 2, who="all", workers=1, clients=8), 8)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "worker", "parent"])
def test_a_kill_of_any_of_several_processes(tmp_path: Path, clips: list[bench.Clip], who: str) -> None:
    assert_accounted(bench.killed(tmp_path / "state", clips, 4, who=who, workers=2, clients=16), 16)


def soaked(tmp_path: Path, clips: list[bench.Clip], big: bench.Clip, minutes: float) -> dict[str, object]:
    (tmp_path / "scratch").mkdir()
    found = bench.soak(tmp_path / "scratch", clips, big, minutes)
    assert set(found["until_kill"]["counts"]) <= {"as expected", "abandoned", "the server was gone"}
    assert set(found["after"]["counts"]) == {"as expected", "abandoned"}
    assert set(found["in_temp"]) <= {".ses"}  # ONNX Runtime's own, one for ever
    kept = {"keys.json", "keys.json.lock", "usage.sqlite3", "usage.sqlite3.lock"}
    assert set(found["in_state"]) - {"usage.sqlite3-wal", "usage.sqlite3-shm"} <= kept
    before, idle = found["after"]["samples"][0], found["after"]["idle"]
    assert idle["fds"] <= before["fds"] + 2  # the database, which is opened when it is needed
    return found


def test_requests_of_all_kinds_and_a_kill_leave_nothing_behind(
    shared: Path, tmp_path: Path, clips: list[bench.Clip]
) -> None:
    soaked(tmp_path, clips, joined(shared, tmp_path / "big.flac", 60), 0.05)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_requests_of_all_kinds_for_minutes_take_no_more_memory(
    shared: Path, tmp_path: Path, clips: list[bench.Clip]
) -> None:
    found = soaked(tmp_path, clips, joined(shared, tmp_path / "big.flac", 120), 12)
    for part in ("until_kill", "after"):
        assert found[part]["growth_mb"] < 20  # type: ignore[index]


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """They went on answering at a port that no new server could have."""
    with bench.serve(tmp_path / "state", "--workers", 2) as server:
        port = server.port
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + ENDED_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except ConnectionRefusedError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with bench.serve(tmp_path / "state", "--workers", 2, port=port):
        pass
