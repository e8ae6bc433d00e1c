"""WER of a model on AN4 test and FSDD test, and the time of a cold start; prints them and writes bench/results.

    python bench/tiny.py SPEECH_FOLDER [MODEL]

SPEECH_FOLDER holds an4/ and fsdd/ with their manifest.jsonl. MODEL is a name or folder, `tiny` by default.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import arkasr
from arkasr import metrics
from arkasr.data import read_manifest
from arkasr.train import loop

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"  # 4.0 s


def score(transcriber: arkasr.Transcriber, manifest: Path) -> dict[str, object]:
    """WER and speed over the test split, with what went wrong."""
    utterances = list(read_manifest(manifest, split="test"))
    started = time.perf_counter()
    transcripts = list(transcriber.transcribe([utterance.audio for utterance in utterances]))
    elapsed_s = time.perf_counter() - started
    pairs = [(u.text, t.text) for u, t in zip(utterances, transcripts, strict=True)]
    errors = metrics.corpus_word_errors(pairs)
    return {
        "set": manifest.parent.name,
        "utterances": len(pairs),
        "words": errors.reference_words,
        "errors": errors.errors,
        "wer_percent": round(100 * errors.rate, 2),
        "rtfx": round(sum(t.duration_s for t in transcripts) / elapsed_s, 1),
        "wrong": [pair for pair in pairs if metrics.word_errors(*pair).errors],
    }


def cold_start_s(model: str, runs: int = 5) -> list[float]:
    """Wall seconds of `ark-asr transcribe` of a 4 s clip in fresh processes."""
    program = Path(sys.executable).with_name("ark-asr")
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([str(program), "transcribe", str(CLIP), "--model", model], check=True, capture_output=True)
        times.append(round(time.perf_counter() - started, 2))
    return times


def main(speech: Path, model: str) -> None:
    """Measure, print, write."""
    transcriber = arkasr.load_model(model)
    sets = [score(transcriber, speech / name / "manifest.jsonl") for name in ("an4", "fsdd")]
    for result in sets:
        print(
            "{set}: WER {wer_percent} % ({errors} of {words} words, {utterances} clips), RTFx {rtfx}".format_map(result)
        )
    cold = cold_start_s(model)
    print(f"cold start, 4 s clip: median {statistics.median(cold)} s of {cold}")
    record = {
        "what": "tiny",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        **{name: version(name) for name in ("numpy", "tokenizers")},
        "sets": sets,
        "cold_start_s": cold,
    }
    target = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-tiny.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tiny")
