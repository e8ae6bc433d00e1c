"""Word times: how far from the truth, and what they cost; writes bench/results.

    python bench/words.py SPEECH [--out FILE]

SPEECH has fsdd/ and an4/ with manifests. Digits of FSDD's test part are joined with pauses, so that the true times of
words are known; only recordings whose text came out right are counted. The cost is that of the engine and of the
Transcriber on AN4's test clips, with word times and without by turns.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

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


def accuracy(recordings: Sequence[Joined], engine: EngineName, seed: int) -> dict[str, Any]:
    """Distances of begins and ends from the true ones, with speech detection and all."""
    model = load_model("tiny", engine=engine)
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


def cost(waveforms: Sequence[Waveform], engine: EngineName) -> list[dict[str, Any]]:
    """CPU seconds with over without, medians of turns: of the engine alone, and of all from waveform to text."""
    model = load_model("tiny", engine=engine)

    def alone(options: DecodeOptions) -> None:
        for start in range(0, len(waveforms), BATCH):
            model.engine.generate(waveforms[start : start + BATCH], options)

    def whole(options: DecodeOptions) -> None:
        for _ in Transcriber(model.engine, model.rules).transcribe(
            ((one, SAMPLE_RATE) for one in waveforms), options=options, batch_size=BATCH
        ):
            pass

    rows = []
    for name, run in {"engine": alone, "transcriber": whole}.items():
        ratios = [_spent_s(run, ALIGNED) / _spent_s(run, PLAIN) for _ in range(TURNS)]
        quartiles = [round(value, 3) for value in statistics.quantiles(ratios, n=4)]
        rows.append({"engine": engine, "what": name, "clips": len(waveforms), "ratio_quartiles": quartiles})
    return rows


def _spent_s(run: Callable[[DecodeOptions], None], options: DecodeOptions) -> float:
    since = time.process_time()
    run(options)
    return time.process_time() - since


def main() -> None:
    """Every case once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", type=Path, help="the folder with fsdd and an4")
    parser.add_argument("--out", type=Path, help="default: bench/results/DATE-cpuN-words.json")
    asked = parser.parse_args()
    others_load = round(os.getloadavg()[0], 2)
    digits = list(read_manifest(asked.speech / "fsdd" / "manifest.jsonl", split="test"))
    clips = [one.waveform() for one in read_manifest(asked.speech / "an4" / "manifest.jsonl", split="test")][:CLIPS]
    engines: tuple[EngineName, ...] = ("onnx", "pytorch")
    record = {
        "what": "word times of tiny on joined digits, and their cost",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": others_load,  # before the first run: what else the machine was doing
        "accuracy": [accuracy(joined(digits, seed), engine, seed) for seed in SEEDS for engine in engines],
        "cost": [row for engine in engines for row in cost(clips, engine)],
    }
    target = asked.out or ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-words.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
