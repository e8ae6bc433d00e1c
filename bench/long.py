"""Hours of audio: memory, time to the first segment, whether the same speech gives the same text; writes bench/results.

    python bench/long.py SCRATCH SPEECH_FOLDER [--hours 3] [--model tiny]

The long file repeats speech/long's recordings with pauses, hum and music between, and begins with the end of one, for
the voice activity detector remembers music for long. Each repetition is a multiple of its 32 ms, so that all meet the
same chunks. Each file is transcribed by a process of its own. Linux only.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

import arkasr
from arkasr import audio
from arkasr.segment import CHUNK_SAMPLES

ROOT = Path(__file__).parents[1]
MUSIC = "Kevin_MacLeod_-_Vibe_Ace.flac"
PAUSE_S = 5
LEAD_S = 25  # music and a pause


def repetition(speech: Path) -> npt.NDArray[np.float32]:
    """One round of recordings, pauses, hum and music."""
    rng = np.random.default_rng(0)
    pause = (1e-4 * rng.standard_normal(PAUSE_S * audio.SAMPLE_RATE)).astype(np.float32)
    hum = (0.05 * np.sin(2 * np.pi * 50 * np.arange(PAUSE_S * audio.SAMPLE_RATE) / audio.SAMPLE_RATE)).astype(
        np.float32
    )
    parts = [pause]
    for path in sorted((speech / "long").glob("*.flac")):
        parts += [audio.load(path), pause, hum, audio.load(speech / "music_nature" / MUSIC), pause]
    joined = np.concatenate(parts)
    return np.concatenate([joined, np.zeros(-len(joined) % CHUNK_SAMPLES, np.float32)])


def write(target: Path, unit: npt.NDArray[np.float32], num_samples: int) -> None:
    """The end of a repetition and repetitions, so many samples in all, as FLAC."""
    lead = unit[-LEAD_S * audio.SAMPLE_RATE :]
    with soundfile.SoundFile(target, "w", audio.SAMPLE_RATE, 1, format="FLAC") as file:
        file.write(lead)
        left = num_samples - len(lead)
        while left > 0:
            file.write(unit[:left])
            left -= len(unit)


def child(path: Path, model: str) -> dict[str, Any]:
    """Transcribe one file in this process."""
    transcriber = arkasr.load_model(model, device="cpu")
    started = time.perf_counter()
    first_s, said = None, []
    for segment in transcriber.segments(path):
        first_s = first_s or time.perf_counter() - started
        said.append((segment.start_s, segment.end_s, segment.text, segment.flags))
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    total_s = time.perf_counter() - started
    return {"first_segment_s": first_s, "total_s": total_s, "peak_bytes": 1024 * int(found[1]), "said": said}


def rounds(said: list[Any], unit_s: float, length_s: float) -> Iterator[list[Any]]:
    """The segments of each whole repetition, timed from its start."""
    for number in range(int((length_s - LEAD_S) / unit_s)):
        start_s = LEAD_S + number * unit_s
        yield [
            [round(begin - start_s, 3), round(end - start_s, 3), text]
            for begin, end, text, _ in said
            if start_s <= begin < start_s + unit_s
        ]


def main() -> None:
    """Measure, print, write; or be the measured process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--hours", type=float, default=3)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--child", action="store_true", help="SCRATCH is a file: transcribe it in this process")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.scratch, asked.model)))
        return
    from arkasr.train import loop

    asked.scratch.mkdir(parents=True, exist_ok=True)
    unit = repetition(asked.speech)
    results: dict[str, dict[str, Any]] = {}
    lengths_s = {"1 minute": 60.0, f"{asked.hours:g} hours": 3600 * asked.hours}
    for name, length_s in lengths_s.items():
        target = asked.scratch / f"{length_s:.0f}s.flac"
        write(target, unit, round(length_s * audio.SAMPLE_RATE))
        command = [sys.executable, __file__, str(target), str(asked.speech), "--model", asked.model, "--child"]
        results[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        results[name]["rtfx"] = round(length_s / results[name]["total_s"], 1)
        target.unlink()
    (_, short), (_, long) = results.items()
    said = list(rounds(long.pop("said"), len(unit) / audio.SAMPLE_RATE, 3600 * asked.hours))
    short["segments"] = len(short.pop("said"))
    record = {
        "what": "long: hours of audio against a minute",
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "model": asked.model,
        "files": results,
        "more_memory_bytes": long["peak_bytes"] - short["peak_bytes"],
        "repetitions": len(said),
        "segments_of_each": [len(one) for one in said],
        "repetitions_unlike_the_first": [
            number for number, one in enumerate(said, start=1) if [s[2] for s in one] != [s[2] for s in said[0]]
        ],
    }
    target = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-long.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    print(target)


if __name__ == "__main__":
    main()
