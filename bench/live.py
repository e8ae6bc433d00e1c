"""Live transcription at the speed of speech: how far text is behind, its errors, memory; writes bench/results.

    python bench/live.py SPEECH [--clips 130] [--hours 2] [--out FILE]

SPEECH has an4/ and long/. A thread brings 0.1 s every 0.1 s, and LiveTranscriber takes what is there. A word of a final
text is behind by the time from its end, as the word times have it, to the first partial text that has it in its place.
Not at the speed of speech: the same clips quieter, with and without the level of the detector. With --hours,
nothing but the memory of a stream of so many is read. Linux only.
"""

import argparse
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from arkasr import load_model, metrics, record, results, segment
from arkasr.audio import SAMPLE_RATE, Waveform, load
from arkasr.data import read_manifest
from arkasr.live import Event, Final, LiveTranscriber, Partial
from arkasr.transcribe import Transcriber

ROOT = Path(__file__).parents[1]
BLOCK = SAMPLE_RATE // 10
PAUSE_S = 1.2
GAINS = (1.0, 0.1, 0.03, 0.01)
Shown = list[tuple[float, Event]]  # with seconds since the stream began


def in_real_time(waveform: Waveform) -> Iterator[Waveform]:
    """What has come since the last was taken, at least a block; from a thread that brings a block in its time."""
    waiting: queue.SimpleQueue[Waveform | None] = queue.SimpleQueue()

    def bring() -> None:
        begun = time.monotonic()
        for at in range(0, len(waveform), BLOCK):
            time.sleep(max(0.0, begun + (at + BLOCK) / SAMPLE_RATE - time.monotonic()))
            waiting.put(waveform[at : at + BLOCK])
        waiting.put(None)

    threading.Thread(target=bring, daemon=True).start()
    while True:
        blocks = [waiting.get()]
        while not waiting.empty():
            blocks.append(waiting.get())
        there = [block for block in blocks if block is not None]
        if there:
            yield np.concatenate(there)
        if blocks[-1] is None:
            return


def shown(live: LiveTranscriber, blocks: Iterator[Waveform]) -> Shown:
    """All events, and when they came."""
    begun = time.monotonic()
    found = [(time.monotonic() - begun, event) for block in blocks for event in live.add(block)]
    return found + [(time.monotonic() - begun, event) for event in live.commit()]


def behind(events: Shown) -> dict[str, Any]:
    """Seconds of words and finals behind the speech."""
    lags: dict[str, list[float]] = {"partial": [], "stable": [], "final": []}
    changed = kept = 0
    partials: list[tuple[float, list[str], list[str]]] = []
    for at_s, event in events:
        if isinstance(event, Partial):
            stable = results.words(event.stable)
            changed += bool(partials) and stable[: len(partials[-1][1])] != partials[-1][1]
            partials.append((at_s, stable, stable + results.words(event.tentative)))
        elif isinstance(event, Final):
            said = results.words(event.segment.text)
            changed += bool(partials) and said[: len(partials[-1][1])] != partials[-1][1]
            kept += "shown" in event.segment.flags
            lags["final"].append(at_s - event.segment.end_s)
            for n, word in enumerate(event.segment.words):
                firsts = {
                    "stable": (at for at, stable, _ in partials if stable[n : n + 1] == said[n : n + 1]),
                    "partial": (at for at, _, all_ in partials if all_[n : n + 1] == said[n : n + 1]),
                }
                for kind, first in firsts.items():
                    lags[kind].append(next(first, at_s) - word.end_s)
            partials = []
    told: dict[str, Any] = {"stable_that_changed": changed, "finals_that_kept_other_words": kept}
    for kind, values in lags.items():
        quantiles = np.quantile(values, (0.5, 0.95, 1.0)) if values else (np.nan,) * 3
        names = ("median_s", "p95_s", "largest_s")
        told[kind] = {"count": len(values), **dict(zip(names, np.round(quantiles, 2).tolist(), strict=True))}
    return told


def finals(events: Shown, start_s: float = 0.0, end_s: float = float("inf")) -> str:
    """The text of the utterances that begin between two times."""
    said = (event.segment for _, event in events if isinstance(event, Final))
    return results.join_texts(one.text for one in said if start_s <= one.start_s < end_s)


def clips_live(model: Transcriber, clips: Sequence[tuple[Waveform, str]]) -> dict[str, Any]:
    """AN4's clips in one stream, with pauses of their own noise."""
    random = np.random.default_rng(0)
    pieces: list[Waveform] = []
    starts_s = [0.0]
    for clip, _ in clips:
        floor = float(np.quantile(np.abs(clip), 0.1)) + 1e-5
        pieces += [clip, random.normal(scale=floor, size=int(PAUSE_S * SAMPLE_RATE)).astype(np.float32)]
        starts_s.append(starts_s[-1] + (len(pieces[-1]) + len(clip)) / SAMPLE_RATE)
    stream = np.concatenate(pieces)
    spent = time.process_time()
    events = shown(LiveTranscriber(model), in_real_time(stream))
    spent = time.process_time() - spent
    texts = [finals(events, *edges) for edges in pairwise(starts_s)]
    return {
        "stream": "AN4 test", "clips": len(clips), "seconds": round(len(stream) / SAMPLE_RATE, 1),
        "cpu_share": round(spent / (len(stream) / SAMPLE_RATE), 3), **behind(events),
        "wer_live": wer([(text, said) for (_, text), said in zip(clips, texts, strict=True)]),
        "wer_offline": wer([(text, model.transcribe((clip, SAMPLE_RATE)).text) for clip, text in clips]),
    }  # fmt: skip


def wer(pairs: Sequence[tuple[str, str]]) -> float:
    """Word errors in percent, without case."""
    return round(100 * metrics.corpus_word_errors([(a.upper(), b.upper()) for a, b in pairs]).rate, 2)


def quiet(model: Transcriber, clips: Sequence[tuple[Waveform, str]]) -> list[dict[str, Any]]:
    """Word errors of quieter clips, not at the speed of speech, with the level of the detector and without."""
    rows = []
    levelled = segment.VoiceActivity

    class Plain(levelled):  # type: ignore[misc, valid-type]
        def __init__(self, *, level: bool) -> None:
            super().__init__()

    for gain in GAINS:
        for name, detector in (("with", levelled), ("without", Plain)):
            segment.VoiceActivity = detector  # type: ignore[assignment, misc]
            pairs = []
            for clip, text in clips:
                padded = np.pad(clip * np.float32(gain), (0, SAMPLE_RATE))
                blocks = (padded[at : at + BLOCK] for at in range(0, len(padded), BLOCK))
                pairs.append((text, finals(shown(LiveTranscriber(model), blocks))))
            rows.append({"gain": gain, "level": name, "wer": wer(pairs)})
    segment.VoiceActivity = levelled  # type: ignore[misc]
    return rows


def long_live(model: Transcriber, path: Path, seconds: float) -> dict[str, Any]:
    """The beginning of a long recording, of whose words `tiny` knows few."""
    waveform = load(path)[: round(seconds * SAMPLE_RATE)]
    events = shown(LiveTranscriber(model), in_real_time(waveform))
    return {"stream": path.name, "seconds": round(len(waveform) / SAMPLE_RATE, 1), **behind(events)}


def memory(model: Transcriber, clips: Sequence[tuple[Waveform, str]], hours: float) -> dict[str, Any]:
    """Megabytes of the process, read each ten minutes of a stream that comes as fast as it is heard."""
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    stream = np.concatenate([piece for clip, _ in clips for piece in (clip, pause)])
    live, read_mb, num_finals = LiveTranscriber(model), list[float](), 0
    while live.num_samples < hours * 3600 * SAMPLE_RATE:
        for at in range(0, len(stream), BLOCK):
            num_finals += sum(isinstance(event, Final) for event in live.add(stream[at : at + BLOCK]))
            if live.num_samples >= 600 * SAMPLE_RATE * (len(read_mb) + 1):
                found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
                assert found is not None
                read_mb.append(round(int(found[1]) / 1000, 1))
    return {
        "hours": round(live.num_samples / SAMPLE_RATE / 3600, 2),
        "finals": num_finals,
        "rss_mb_each_600_s": read_mb,
    }


def main() -> None:
    """Every case once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", type=Path, help="the folder with an4 and long")
    parser.add_argument("--clips", type=int, default=130)
    parser.add_argument("--long-s", type=float, default=120.0, help="seconds of each long recording")
    parser.add_argument("--hours", type=float, help="do nothing but read the memory of a stream of so many")
    parser.add_argument("--out", type=Path, help="default: bench/results/DATE-cpuN-live.json")
    asked = parser.parse_args()
    others_load = round(os.getloadavg()[0], 2)
    model = load_model("tiny", device="cpu")
    rows = list(read_manifest(asked.speech / "an4" / "manifest.jsonl", split="test"))[: asked.clips]
    clips = [(one.waveform(), one.text) for one in rows]
    if asked.hours is None:
        others = sorted((asked.speech / "long").glob("*.flac"))
        measured: dict[str, Any] = {
            "live": [clips_live(model, clips), *(long_live(model, path, asked.long_s) for path in others)],
            "quiet": quiet(model, clips),
        }
    else:
        measured = {"memory": memory(model, clips, asked.hours)}
    told = {
        "what": "live transcription with tiny",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": record.git_commit(), "versions": record.versions(), "hardware": record.hardware(),
        "others_load": others_load,
        **measured,
    }  # fmt: skip
    target = asked.out or ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-live.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(told, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
