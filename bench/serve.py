"""The server under load: speed against the engine's own, fairness, overload, hours of mixed traffic, kill -9.

    python bench/serve.py SCRATCH SPEECH_FOLDER [load] [fairness] [overload] [soak] [kill] [--minutes 5]

Each part writes a record of its own. Clients are coroutines of this one process, with requests made beforehand, so that
they cost the machine little; what they cost is measured. Each checks its answers against what `Transcriber` says of the
same file. Linux only.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROUTE = "/v1/audio/transcriptions"
START_S = 60.0
ANSWER_S = 120.0  # longer means that the answer was lost
BOUNDARY = "ark-boundary"
Kinds = Sequence[tuple[bytes, Sequence[int]]]  # requests, and the statuses that each may be answered with


@dataclass(frozen=True)
class Clip:
    """A file, what the engine says of it, and its seconds."""

    audio: bytes
    text: str
    seconds: float


@dataclass(frozen=True)
class Reply:
    """An answer and the seconds that it took; `body` is without the chunks' lengths."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def text(self) -> str:
        """Of a JSON answer."""
        return str(json.loads(self.body)["text"])


def form(audio: bytes, *, path: str = ROUTE, key: str = "", name: str = "file", **fields: str) -> bytes:
    """A whole request with a recording."""
    given = fields if path != ROUTE else {"model": "tiny", **fields}
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in given.items()]
    start = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.flac"\r\n\r\n'
    body = "".join(parts).encode() + start.encode() + audio + f"\r\n--{BOUNDARY}--\r\n".encode()
    return request("POST", path, body, key=key, kind=f"multipart/form-data; boundary={BOUNDARY}")


def request(method: str, path: str, body: bytes = b"", *, key: str = "", kind: str = "application/json") -> bytes:
    """A whole request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """One client's connection, opened anew when the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, raw: bytes, *, patience_s: float = ANSWER_S) -> Reply:
        """Send a request and await its answer; a TimeoutError, EOFError or OSError is an answer that was lost."""
        async with asyncio.timeout(patience_s):
            started = time.perf_counter()
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
            reader, writer = self._streams
            try:
                writer.write(raw)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await _body(reader, headers)
            except BaseException:
                self.close()
                raise
            if headers.get("connection") == "close":
                self.close()
            return Reply(int(head[0].split()[1]), headers, body, time.perf_counter() - started)

    async def abandon(self, raw: bytes, *, after_s: float, part: float = 1.0) -> None:
        """Send a part of a request, and go."""
        self.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(raw[: int(part * len(raw))])
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), after_s)
        writer.transport.abort()
        await asyncio.sleep(0)

    def close(self) -> None:
        """Close it; `ask` opens it again."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def once(port: int, raw: bytes, *, patience_s: float = ANSWER_S) -> Reply:
    """The answer to a request on a connection of its own; raises as `Connection.ask`."""
    connection = Connection(port)
    try:
        return await connection.ask(raw, patience_s=patience_s)
    finally:
        connection.close()
        await asyncio.sleep(0)  # in which the transport is closed


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


# ---- the server, and what it uses ----


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    state: Path

    def pids(self) -> list[int]:
        """Of the server and its workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def cpu_s(self) -> float:
        """Seconds of processors, of all its processes."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.pids()]
        return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")

    def resources(self) -> dict[str, float]:
        """Resident bytes, descriptors and threads of the first process."""
        pid = self.process.pid
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return {"rss_mb": int(status["VmRSS"].split()[0]) / 1000, "fds": files, "threads": int(status["Threads"])}

    def kill(self) -> None:
        """Kill -9 of all its processes."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(*arguments: object) -> str:
    """What `ark-asr` prints."""
    command = [str(Path(sys.executable).with_name("ark-asr")), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def serve(state: Path, *arguments: object, port: int = 0, temp: Path | None = None) -> Iterator[Server]:
    """A server that is ready; its log is next to its state."""
    port = port or free_port()
    command = [Path(sys.executable).with_name("ark-asr"), "serve", "--model", "tiny", "--port", port, "--state", state]
    environment = os.environ | ({"TMPDIR": str(temp)} if temp else {})
    with state.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [*map(str, command), *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=environment, start_new_session=True,
        )  # fmt: skip
    server = Server(process, port, state)
    try:
        asyncio.run(_ready(server))
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(START_S)


async def _ready(server: Server) -> None:
    async with asyncio.timeout(START_S):
        while True:
            with suppress(OSError, EOFError):
                if (await once(server.port, request("GET", "/ready"))).status == 200:
                    return
            if server.process.poll() is not None:
                raise RuntimeError(f"the server did not start; see {server.state.with_suffix('.log')}")
            await asyncio.sleep(0.02)


# ---- load ----


@dataclass
class Tally:
    """What clients met."""

    latencies_s: list[float] = field(default_factory=list)  # of good answers
    refused_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    audio_s: float = 0.0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    without_retry_after: int = 0

    def add(self, reply: Reply, clip: Clip) -> None:
        """Count an answer."""
        self.statuses[reply.status] += 1
        if reply.status != 200:
            self.refused_s.append(reply.seconds)
            self.without_retry_after += reply.status in {429, 503} and "retry-after" not in reply.headers
            return
        self.latencies_s.append(reply.seconds)
        self.audio_s += clip.seconds
        if reply.text != clip.text:
            self.wrong.append((clip.text, reply.text))

    def summary(self) -> dict[str, Any]:
        """For the record."""
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "good": quantiles(self.latencies_s), "refused": quantiles(self.refused_s), "wrong": self.wrong[:10],
            "lost": self.lost[:10], "num_wrong": len(self.wrong), "num_lost": len(self.lost),
            "refused_without_retry_after": self.without_retry_after,
        }  # fmt: skip


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the most of latencies, in seconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    found = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)}
    return {name: round(value, 4) for name, value in {**found, "max": ordered[-1]}.items()}


async def ask_on(
    port: int, clips: Sequence[Clip], tally: Tally, *, first: int, until: Callable[[], bool], key: str = ""
) -> None:
    """One client: a clip after the other, each as soon as the last was answered, until told or the server is gone."""
    connection, raws = Connection(port), [form(clip.audio, key=key) for clip in clips]
    number = first
    try:
        while not until():
            number = (number + 1) % len(clips)
            try:
                tally.add(await connection.ask(raws[number]), clips[number])
            except (TimeoutError, EOFError, OSError) as error:
                tally.lost.append(repr(error))
                await asyncio.sleep(0.05)
    finally:
        connection.close()
        await asyncio.sleep(0)


async def crowd(port: int, clips: Sequence[Clip], *, clients: int, seconds: float, key: str = "") -> Tally:
    """So many clients at once, each beginning with another clip."""
    tally, end = Tally(), time.monotonic() + seconds
    firsts = [number * len(clips) // clients for number in range(clients)]
    await asyncio.gather(
        *(ask_on(port, clips, tally, first=n, until=lambda: time.monotonic() > end, key=key) for n in firsts)
    )
    return tally


def measured(server: Server, clips: Sequence[Clip], *, clients: int, seconds: float) -> tuple[float, dict[str, Any]]:
    """Seconds of audio a second, and the rest, of a crowd."""
    server_s, own_s, started = server.cpu_s(), time.process_time(), time.perf_counter()
    tally = asyncio.run(crowd(server.port, clips, clients=clients, seconds=seconds))
    wall_s = time.perf_counter() - started
    used = {"server_cpu_s": server.cpu_s() - server_s, "clients_cpu_s": time.process_time() - own_s, "wall_s": wall_s}
    rtfx = tally.audio_s / wall_s
    return rtfx, {"rtfx": round(rtfx, 1), **{k: round(v, 2) for k, v in used.items()}, **tally.summary()}


def child(*arguments: object) -> Any:
    """What this program prints as another process."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def load(scratch: Path, workloads: Mapping[str, Path], seconds: float) -> dict[str, Any]:
    """64 clients against the server, and against one with a process for each core; and, by turns, one Transcriber."""
    results: dict[str, Any] = {}
    rounds = 5
    with (
        serve(scratch / "load") as alone,
        serve(scratch / "workers", "--workers", os.cpu_count() or 1) as workers,
    ):
        for number, (name, folder) in enumerate(workloads.items()):
            clips = read_clips(folder)
            share_s = (seconds if number == 0 else seconds / 5) / rounds
            for server in (alone, workers):
                measured(server, clips, clients=64, seconds=2)
            turns = [
                {
                    "server": measured(alone, clips, clients=64, seconds=share_s)[1],
                    "batch": child("--batch", folder, min(20, share_s)),
                    "workers": measured(workers, clips, clients=64, seconds=min(20, share_s))[1],
                }
                for _ in range(rounds)
            ]
            rtfx = {who: statistics.median(turn[who]["rtfx"] for turn in turns) for who in turns[0]}
            results[name] = {
                **{f"{who}_rtfx": round(value, 1) for who, value in rtfx.items()},
                "ratio": round(rtfx["server"] / rtfx["batch"], 3),
                "workers_ratio": round(rtfx["workers"] / rtfx["batch"], 3),
                "turns": turns,
            }
    return results


# ---- fairness ----


async def every_second(port: int, clip: Clip, tally: Tally, until: Callable[[], bool]) -> None:
    """A clip each second, whether the last was answered or not."""

    async def ask() -> None:
        try:
            tally.add(await once(port, form(clip.audio)), clip)
        except (TimeoutError, EOFError, OSError) as error:
            tally.lost.append(repr(error))

    async with asyncio.TaskGroup() as group:
        while not until():
            group.create_task(ask())
            await asyncio.sleep(1)


async def beside(port: int, clip: Clip, hour: Clip) -> dict[str, Any]:
    """Latencies of a short clip each second, alone and while a long recording is heard."""
    alone, company = Tally(), Tally()
    end = time.monotonic() + 20
    await every_second(port, clip, alone, lambda: time.monotonic() > end)
    for _ in range(5):  # for enough of the short ones
        long = asyncio.create_task(once(port, form(hour.audio, response_format="verbose_json"), patience_s=3600))
        await every_second(port, clip, company, long.done)
        reply = await long
    segments = len(json.loads(reply.body)["segments"])
    segment_s = reply.seconds / segments
    return {
        "alone": alone.summary(), "beside": company.summary(), "long_s": round(reply.seconds, 2),
        "long_is_right": reply.text == hour.text, "segments": segments, "segment_s": round(segment_s, 4),
        "p95_in_segments": round(quantiles(company.latencies_s)["p95"] / segment_s, 2),
    }  # fmt: skip


def fairness(scratch: Path, clip: Clip, hour: Clip) -> dict[str, Any]:
    """A short clip each second, beside a long recording."""
    with serve(scratch / "fairness") as server:
        return asyncio.run(beside(server.port, clip, hour))


# ---- overload ----


def overload(scratch: Path, clips: Sequence[Clip], seconds: float, *, places: int = 64) -> dict[str, Any]:
    """As many clients as there are places, then four times as many, who ask again at once whatever they are told."""
    with serve(scratch / "overload", "--max-requests", places) as server:
        measured(server, clips, clients=places, seconds=2)
        before_rtfx, before = measured(server, clips, clients=places, seconds=seconds)
        rtfx, over = measured(server, clips, clients=4 * places, seconds=seconds)
    return {"places": places, "full": before, "overloaded": over, "part_of_full": round(rtfx / before_rtfx, 3)}


# ---- soak ----


def mixture(clips: Sequence[Clip], big: Clip, key: str) -> Kinds:
    """Requests of all kinds, each with the statuses that it may be answered with."""
    import base64

    clip = clips[0].audio
    encoded = json.dumps({"model": "tiny", "audio": base64.b64encode(clip).decode()}).encode()
    good = [form(one.audio, key=key) for one in clips[:40]]
    good += [form(clip, key=key, response_format=kind) for kind in ("json", "text", "srt", "vtt", "verbose_json")]
    good += [form(one.audio, key=key, stream="true") for one in clips[:10]]
    good += [form(clip, key=key, path="/asr"), form(clip, key=key, path="/transcribe", name="audio")]
    good += [form(big.audio, key=key), form(big.audio, key=key, stream="true"), form(clip, key=key, temperature="0.5")]
    good += [request("POST", ROUTE, encoded, key=key)]
    good += [request("GET", path, key=key) for path in ("/", "/health", "/docs", "/metrics", "/v1/models")]
    bad = [
        (form(b"no audio", key=key), [400]), (form(clip, key="ark-wrong"), [401]), (form(clip, key=key, x="1"), [400]),
        (form(clip[: len(clip) // 2], key=key), [400]), (form(clip), [401]), (request("GET", "/none", key=key), [404]),
        (request("POST", ROUTE, b"{", key=key), [400]), (form(b"", key=key), [400]),
    ]  # fmt: skip
    return [*((raw, [200]) for raw in good), *bad]


async def mixed(port: int, kinds: Kinds, seed: int, until: Callable[[], bool]) -> Counter[str]:
    """One client of all kinds, who sometimes goes in the middle; counts of what was and was not as it should be."""
    rng, connection, counts = random.Random(seed), Connection(port), Counter[str]()
    while not until():
        raw, statuses = rng.choice(kinds)
        try:
            if rng.random() < 0.1:
                await connection.abandon(raw, after_s=rng.uniform(0, 0.5), part=rng.choice([0.3, 0.9, 1.0]))
                counts["abandoned"] += 1
                continue
            status = (await connection.ask(raw)).status
            counts["as expected" if status in statuses else f"{status} for {statuses[0]}"] += 1
        except (TimeoutError, EOFError, OSError) as error:
            counts["the server was gone" if until() else f"lost: {error!r}"] += 1
    connection.close()
    await asyncio.sleep(0)
    return counts


async def soaked(server: Server, kinds: Kinds, seconds: float, *, kill: bool) -> dict[str, Any]:
    """Traffic of 16 clients and what the server uses, once in 10 s; a kill at its end, or a rest."""
    end = time.monotonic() + seconds
    samples = [{"at_s": 0.0, **server.resources()}]
    clients = [asyncio.create_task(mixed(server.port, kinds, n, lambda: time.monotonic() > end)) for n in range(16)]
    while time.monotonic() < end:
        await asyncio.sleep(min(10, max(0, end - time.monotonic())))
        samples.append({"at_s": round(seconds - (end - time.monotonic()), 1), **server.resources()})
    if kill:
        server.kill()
    counts = sum(await asyncio.gather(*clients), Counter())
    warm = [s["rss_mb"] for s in samples if s["at_s"] >= min(120, seconds / 3)]
    found = {"counts": dict(counts), "samples": samples, "growth_mb": round(max(warm[-6:]) - max(warm[:6]), 1)}
    if not kill:
        await asyncio.sleep(min(20, seconds / 3))
        found["idle"] = server.resources()
    return found


def soak(scratch: Path, clips: Sequence[Clip], big: Clip, minutes: float) -> dict[str, Any]:
    """All kinds of traffic, with a SIGKILL in the middle of it; what is left in the folders afterwards."""
    state, results = scratch / "soak", []
    key = program("keys", "create", "soak", "--price", "0.36/hour", "--state", state)
    with tempfile.TemporaryDirectory(dir=scratch) as temp:
        for kill in (True, False):
            with serve(state, temp=Path(temp)) as server:
                results.append(asyncio.run(soaked(server, mixture(clips, big, key), 30 * minutes, kill=kill)))
        left = sorted(path.name for path in Path(temp).iterdir())
    return {
        "until_kill": results[0],
        "after": results[1],
        "in_temp": left,
        "in_state": sorted(path.name for path in state.iterdir()),
    }


# ---- kill ----


def recorded(state: Path) -> tuple[int, float]:
    """Requests and seconds of audio in the usage."""
    with sqlite3.connect(f"file:{state}/usage.sqlite3?mode=ro", uri=True) as database:
        count, samples = database.execute("SELECT COUNT(*), COALESCE(SUM(samples), 0) FROM usage").fetchone()
    return count, samples / 16_000


async def until_killed(
    server: Server, clips: Sequence[Clip], key: str, who: str, *, clients: int, after_s: float
) -> Tally:
    """A crowd, a kill -9, and the crowd until it has seen that; then the answers that clients got whole."""
    tally, stop = Tally(), asyncio.Event()
    crowd_of = [
        asyncio.create_task(ask_on(server.port, clips, tally, first=n, until=stop.is_set, key=key))
        for n in range(clients)
    ]
    await asyncio.sleep(after_s)
    stop.set()
    victims = {"all": server.pids(), "parent": server.pids()[:1], "worker": server.pids()[-1:]}[who]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*crowd_of)
    return tally


def killed(
    state: Path, clips: Sequence[Clip], rounds: int, *, who: str, workers: int, clients: int = 32
) -> dict[str, Any]:
    """Kill -9 under load, again and again at one folder; what was recorded against what was answered."""
    key = program("keys", "create", "kill", "--price", "0.36/hour", "--state", state)
    port, results = free_port(), []
    rng = random.Random(0)
    before, before_s = 0, 0.0
    for _ in range(rounds):
        with serve(state, "--workers", workers, port=port) as server:
            started = time.monotonic()
            first = asyncio.run(once(port, form(clips[0].audio, key=key)))
            first_s = time.monotonic() - started
            tally = asyncio.run(until_killed(server, clips, key, who, clients=clients, after_s=rng.uniform(0.5, 2)))
            tally.add(first, clips[0])
            if who == "worker":  # another one takes its place
                asyncio.run(_ready(server))
                tally.add(asyncio.run(once(port, form(clips[0].audio, key=key))), clips[0])
            elif who == "parent":
                server.process.wait()
                time.sleep(1)
        count, audio_s = recorded(state)
        good = tally.statuses[200]
        results.append({
            "answered": good, "recorded": count - before, "unrecorded": good - (count - before),
            "unrecorded_s": round(tally.audio_s - (audio_s - before_s), 4), "wrong": len(tally.wrong),
            "first_s": round(first_s, 3),
        })  # fmt: skip
        before, before_s = count, audio_s
    unrecorded = [one["unrecorded"] for one in results]
    return {
        "clients": clients,
        "fewest_unrecorded": min(unrecorded),
        "most_unrecorded": max(unrecorded),
        "rounds": results,
    }


def kill(scratch: Path, clips: Sequence[Clip], rounds: int) -> dict[str, Any]:
    """One process; a worker of two; the parent of two."""
    cases = (("all", 1, rounds), ("worker", 2, rounds // 4), ("parent", 2, rounds // 4))
    return {
        f"{who} of {workers}": killed(scratch / f"kill-{who}", clips, max(n, 1), who=who, workers=workers)
        for who, workers, n in cases
    }


# ---- clips, and the record ----


def write_clips(folder: Path, speech: Path, least_s: float) -> None:
    """AN4's test clips, joined to recordings of at least so long, with what the engine says of each."""
    import numpy as np
    import soundfile

    import arkasr
    from arkasr import audio
    from arkasr.data import read_manifest

    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Any] = []
    paths: list[Path] = []
    waveforms = [audio.load(u.audio) for u in read_manifest(speech / "an4" / "manifest.jsonl", split="test")]
    while sum(map(len, waveforms)) < least_s * audio.SAMPLE_RATE:
        waveforms *= 2
    for waveform in waveforms:
        parts.append(waveform)
        if sum(map(len, parts)) >= least_s * audio.SAMPLE_RATE:
            paths.append(folder / f"{len(paths):04}.flac")
            soundfile.write(paths[-1], np.concatenate(parts), audio.SAMPLE_RATE)
            parts = []
            if least_s > 1000:
                break
    said = arkasr.load_model("tiny").transcribe(paths)
    facts = [{"file": str(path), "text": t.text, "seconds": t.duration_s} for path, t in zip(paths, said, strict=True)]
    (folder / "clips.json").write_text(json.dumps(facts))


def read_clips(folder: Path) -> list[Clip]:
    """What `write_clips` wrote."""
    facts = json.loads((folder / "clips.json").read_text())
    return [Clip(Path(one["file"]).read_bytes(), one["text"], one["seconds"]) for one in facts]


def batch(folder: Path, seconds: float) -> dict[str, float]:
    """Seconds of audio a second of one Transcriber over the files, again and again for so long."""
    import arkasr

    paths = [one["file"] for one in json.loads((folder / "clips.json").read_text())]
    transcriber = arkasr.load_model("tiny")
    list(transcriber.outcomes(paths[:8]))
    cpu_s, started, audio_s = time.process_time(), time.perf_counter(), 0.0
    while time.perf_counter() - started < seconds:
        audio_s += sum(t.duration_s for t in transcriber.transcribe(paths))
    wall_s = time.perf_counter() - started
    return {"rtfx": audio_s / wall_s, "cpu_s": time.process_time() - cpu_s, "wall_s": wall_s, "audio_s": audio_s}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    if sys.argv[1] == "--batch":
        print(json.dumps(batch(Path(sys.argv[2]), float(sys.argv[3]))))
        return
    if sys.argv[1] == "--write":
        write_clips(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
        print("{}")
        return
    parser.add_argument("scratch", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--minutes", type=float, help="of each part, instead of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    folders = {name: asked.scratch / name for name in LENGTHS_S}
    for name, least_s in LENGTHS_S.items():
        if not (folders[name] / "clips.json").exists():
            child("--write", folders[name], asked.speech, least_s)
    from arkasr.train import loop

    for part in asked.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=asked.scratch, prefix=part) as scratch:
            result = PARTS[part](Path(scratch), folders, asked.minutes)
        record = {
            "what": f"serve: the server under load, with model tiny: {part}",
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **loop.provenance(),
            **result,
        }
        target = asked.out / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-serve-{part}.json"
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(result, indent=1), target, sep="\n", flush=True)


LENGTHS_S = {"clips": 0.1, "30 s": 30.0, "2 minutes": 120.0, "hour": 3600.0}
Part = Callable[[Path, Mapping[str, Path], float | None], dict[str, Any]]
PARTS: dict[str, Part] = {
    "load": lambda scratch, folders, minutes: load(
        scratch, {name: folders[name] for name in ("clips", "30 s", "2 minutes")}, 60 * (minutes or 5)
    ),
    "fairness": lambda scratch, folders, _: fairness(
        scratch, read_clips(folders["clips"])[0], read_clips(folders["hour"])[0]
    ),
    "overload": lambda scratch, folders, minutes: overload(scratch, read_clips(folders["clips"]), 60 * (minutes or 1)),
    "soak": lambda scratch, folders, minutes: soak(
        scratch, read_clips(folders["clips"]), read_clips(folders["2 minutes"])[0], minutes or 30
    ),
    "kill": lambda scratch, folders, minutes: kill(scratch, read_clips(folders["clips"]), round(minutes or 20)),
}

if __name__ == "__main__":
    main()
