"""Clips through an endpoint: how many a second at so many places, and what the sender spends; writes bench/results.

    python bench/endpoint.py [--out FILE]

The endpoint is a made-up one in a process of its own, which sleeps and answers. So what is measured is this side alone:
speech detection, cutting, FLAC, HTTP, waiting.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from arkasr import audio
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.engines.openai import OpenAIEngine
from arkasr.train import loop
from arkasr.transcribe import Transcriber

ROOT = Path(__file__).parents[1]
CLIPS, PLACES, LATENCY_S = 400, 8, 0.2
SPREADS, BATCHES = (0.0, 0.5), (16, 64)  # of the latency, either way; BATCHES as a Transcriber's
PAUSE_S, HOUR_S = 1.0, 3600


class Sleeper(BaseHTTPRequestHandler):
    """Answers after a while."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body at once, or each answer waits 40 ms for an acknowledgement
    latency_s, spread = 0.0, 0.0

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Nothing."""

    def do_POST(self) -> None:
        """Read, sleep, answer."""
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(self.latency_s * random.uniform(1 - self.spread, 1 + self.spread))
        self.send_response(200)
        body = b'{"text": "so it is"}'
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _serve(told: Connection, latency_s: float, spread: float) -> None:
    Sleeper.latency_s, Sleeper.spread = latency_s, spread
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sleeper)
    told.send(server.server_port)
    server.serve_forever()


@contextmanager
def endpoint(latency_s: float, spread: float) -> Iterator[str]:
    """The base URL of one that sleeps so long."""
    here, there = Pipe()
    process = Process(target=_serve, args=(there, latency_s, spread), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def throughput(spread: float, batch_size: int) -> dict[str, Any]:
    """Recordings of a second, taken for speech, one span each."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=(CLIPS, SAMPLE_RATE)).astype(np.float32)
    with endpoint(LATENCY_S, spread) as url, closing(OpenAIEngine(url, "m", parallel=PLACES)) as engine:
        transcriber = Transcriber(engine)
        since = time.perf_counter()
        sources = ((clip, SAMPLE_RATE) for clip in noise)
        done = sum(1 for _ in transcriber.transcribe(sources, vad=False, batch_size=batch_size))
        spent_s = time.perf_counter() - since
    return {
        "clips": done, "places": PLACES, "latency_s": LATENCY_S, "spread": spread, "batch_size": batch_size,
        "clips_per_s": round(done / spent_s, 1), "endpoint_could": PLACES / LATENCY_S,
    }  # fmt: skip


def cost() -> dict[str, Any]:
    """Seconds of this process's CPU for an hour of speech and pauses, sent by a span."""
    clips = [audio.load(path) for path in sorted((ROOT / "examples" / "audio").glob("*.flac"))]
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)
    round_ = np.concatenate([part for clip in clips for part in (clip, pause)])
    hour: Waveform = np.tile(round_, -(-HOUR_S * SAMPLE_RATE // len(round_)))[: HOUR_S * SAMPLE_RATE]
    with endpoint(0.0, 0.0) as url, closing(OpenAIEngine(url, "m", parallel=PLACES)) as engine:
        since, cpu = time.perf_counter(), time.process_time()
        transcript = Transcriber(engine).transcribe((hour, SAMPLE_RATE), batch_size=8 * PLACES)
        cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - since
    return {
        "audio_s": HOUR_S,
        "segments": len(transcript.segments),
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2),
    }


def main() -> None:
    """Every case once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: bench/results/DATE-cpuN-endpoint.json")
    asked = parser.parse_args()
    others_load = round(os.getloadavg()[0], 2)
    record = {
        "what": "clips through a made-up endpoint that sleeps",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": others_load,  # before the first run: what else the machine was doing
        "throughput": [throughput(spread, batch_size) for spread in SPREADS for batch_size in BATCHES],
        "cost": [cost() for _ in range(3)],
    }
    target = asked.out or ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-endpoint.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
