"""Word times: how far from the truth, and what they cost in time and memory; writes bench/results.

    python bench/words.py SPEECH [--model tiny] [--out FILE]

SPEECH has fsdd/, an4/, long/ and music_nature/. Digits of FSDD's test part are joined with pauses, so that the true
times of words are known; only recordings whose text came out right are counted. The cost is that of the engine and of
the Transcriber on AN4's test clips, with word times and without by turns. Memory is the peak of a process of its own
that transcribes the long file of bench/long.py. Linux only.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import long  # bench/long.py
from arkasr import load_model
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.data import Utterance, read_manifest
from arkasr.engines import DecodeOptions, EngineName
from arkasr.train import loop
from arkasr.transcribe import Transcriber

ROOT = Path(__file__).parents[1]
RECORDINGS, MOST_PAUSE_S, LEVEL, FLOOR = 200, 0.25, 0.3, 3e-4
SEEDS = (0, 1)  # the constants of arkasr.align were chosen on the first
CLIPS, TURNS, BATCH = 30, 20, 16
MINUTES = (10, 60)
PLAIN, ALIGNED = DecodeOptions(), DecodeOptions(align=True)


@dataclass(frozen=True)
class Joined:
    """Words one after the other, with their true begins and ends in seconds."""

    waveform: Waveform
    words: tuple[tuple[float, float, str], ...]


def joined(utterances: Sequence[Utterance], seed: int) -> list[Joined]:
    """Recordings of three to six digits with a floor of noise and pauses between them."""
    random = np.random.default_rng(seed)

    def pause(seconds: float) -> Waveform:
        return random.normal(scale=FLOOR, size=int(seconds * SAMPLE_RATE)).astype(np.float32)

    made = []
    for _ in range(RECORDINGS):
        parts, words, position = [pause(0.2)], [], int(0.2 * SAMPLE_RATE)
        for number in random.choice(len(utterances), int(random.integers(3, 7))):
            clip = utterances[number].waveform()
            clip = clip * (LEVEL / max(float(np.abs(clip).max()), 1e-3))
            words.append((position / SAMPLE_RATE, (position + len(clip)) / SAMPLE_RATE, utterances[number].text))
            parts += [clip, pause(float(random.uniform(0, MOST_PAUSE_S)))]
            position += len(parts[-1]) + len(parts[-2])
        made.append(Joined(np.concatenate([*parts, pause(0.2)]), tuple(words)))
    return made


def accuracy(recordings: Sequence[Joined], name: str, engine: EngineName, seed: int) -> dict[str, Any]:
    """Distances of begins and ends from the true ones, with speech detection and all."""
    model = load_model(name, engine=engine)
    sources = ((one.waveform, SAMPLE_RATE) for one in recordings)
    off_s: list[float] = []
    right = 0
    for one, said in zip(recordings, model.transcribe(sources, options=ALIGNED, batch_size=BATCH), strict=True):
        if said.text.upper() != " ".join(text for *_, text in one.words).upper():
            continue
        right += 1
        heard = [word for segment in said.segments for word in segment.words]
        for word, (start_s, end_s, _) in zip(heard, one.words, strict=True):
            off_s += [abs(word.start_s - start_s), abs(word.end_s - end_s)]
    return {
        "engine": engine, "seed": seed, "recordings": len(recordings), "right": right, "boundaries": len(off_s),
        "median_ms": round(1000 * statistics.median(off_s)), "p95_ms": round(1000 * float(np.percentile(off_s, 95))),
        "largest_ms": round(1000 * max(off_s)), "within_300_ms": round(float(np.mean(np.array(off_s) <= 0.3)), 4),
    }  # fmt: skip


def cost(waveforms: Sequence[Waveform], name: str, engine: EngineName) -> list[dict[str, Any]]:
    """CPU seconds with over without, medians of turns: of the engine alone, and of all from waveform to text."""
    model = load_model(name, engine=engine)

    def alone(options: DecodeOptions) -> None:
        for start in range(0, len(waveforms), BATCH):
            model.engine.generate(waveforms[start : start + BATCH], options)

    def whole(options: DecodeOptions) -> None:
        for _ in Transcriber(model.engine, model.rules).transcribe(
            ((one, SAMPLE_RATE) for one in waveforms), options=options, batch_size=BATCH
        ):
            pass

    rows = []
    for what, run in {"engine": alone, "transcriber": whole}.items():
        ratios = [_spent_s(run, ALIGNED) / _spent_s(run, PLAIN) for _ in range(TURNS)]
        quartiles = [round(value, 3) for value in statistics.quantiles(ratios, n=4)]
        rows.append({"engine": engine, "what": what, "clips": len(waveforms), "ratio_quartiles": quartiles})
    return rows


def _spent_s(run: Callable[[DecodeOptions], None], options: DecodeOptions) -> float:
    since = time.process_time()
    run(options)
    return time.process_time() - since


def memory(speech: Path, name: str) -> list[dict[str, Any]]:
    """Peaks of processes that transcribe a short and a long file: segment by segment, and as one transcript."""
    rows = []
    unit = long.repetition(speech)
    with tempfile.TemporaryDirectory() as scratch:
        for minutes in MINUTES:
            recording = Path(scratch) / f"{minutes}.flac"
            long.write(recording, unit, minutes * 60 * SAMPLE_RATE)
            for how in ("segments", "segments with words", "transcript with words"):
                command = [sys.executable, __file__, str(recording), "--model", name, "--child", how]
                said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                rows.append({"minutes": minutes, "what": how, **said})
            recording.unlink()
    return rows


def child(recording: Path, name: str, how: str) -> dict[str, Any]:
    """Transcribe one file in this process."""
    model = load_model(name, device="cpu")
    options = ALIGNED if "words" in how else PLAIN
    started = time.perf_counter()
    if how.startswith("segments"):
        counts = [(1, len(one.words)) for one in model.segments(recording, options=options)]
    else:
        counts = [(1, len(one.words)) for one in model.transcribe(recording, options=options).segments]
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    num_segments, num_words = (sum(column) for column in zip(*counts, strict=True))
    return {
        "segments": num_segments, "words": num_words, "peak_mb": round(int(found[1]) / 1000, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def main() -> None:
    """Every case once; or be the measured process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", type=Path, help="the folder with fsdd, an4, long and music_nature")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, help="default: bench/results/DATE-cpuN-words.json")
    parser.add_argument("--child", help="SPEECH is a file: transcribe it so in this process")
    asked = parser.parse_args()
    if asked.child is not None:
        print(json.dumps(child(asked.speech, asked.model, asked.child)))
        return
    others_load = round(os.getloadavg()[0], 2)
    digits = list(read_manifest(asked.speech / "fsdd" / "manifest.jsonl", split="test"))
    clips = [one.waveform() for one in read_manifest(asked.speech / "an4" / "manifest.jsonl", split="test")][:CLIPS]
    engines: tuple[EngineName, ...] = ("onnx", "pytorch")
    record = {
        "what": "word times on joined digits, their cost, and the memory that they need",
        "model": asked.model,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": others_load,  # before the first run: what else the machine was doing
        "accuracy": [accuracy(joined(digits, seed), asked.model, engine, seed) for seed in SEEDS for engine in engines],
        "cost": [row for engine in engines for row in cost(clips, asked.model, engine)],
        "memory": memory(asked.speech, asked.model),
    }
    target = asked.out or ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-words.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
