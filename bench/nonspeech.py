"""Words that a model prints where nobody speaks, before and after the guards; and what tells speech from the rest.

    python bench/nonspeech.py SPEECH_FOLDER [MODEL]

SPEECH_FOLDER holds esc10/, music_nature/, an4/, fsdd/ and long/ with their manifest.jsonl. MODEL is a name or folder,
`tiny` by default. Before: no VAD and no guards. After: what `transcribe` does. Writes bench/results.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import arkasr
from arkasr import audio, metrics, segment
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.engines import DecodeOptions
from arkasr.evaluate import nonspeech
from arkasr.segment import CHUNK_SAMPLES, NO_SPEECH, SPEECH, Span
from arkasr.train import loop

ROOT = Path(__file__).parents[1]
UNGUARDED = DecodeOptions(guard=False)
TRANSCRIBED = ("an4", "fsdd")
PERCENTILES = (0, 0.5, 1, 2, 5, 10, 25, 50, 75, 90, 95, 98, 99, 100)
# Rules that might decide whether a span is believed: least speech, and least confidence where speech is below `sure`.
RULES = tuple(
    (least, sure, confidence)
    for least in (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)
    for sure in (0.7, 0.8, 0.9, 0.95, 0.99)
    for confidence in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
    if confidence or sure == 0.7
)


@dataclass(frozen=True)
class Clip:
    """Audio without speech, or with the text that is said in it."""

    kind: str
    name: str
    waveform: Waveform
    text: str = ""


@dataclass(frozen=True)
class Heard:
    """A span of a clip: what the VAD and the network say of it, before anything is dropped."""

    clip: int
    start_s: float
    end_s: float
    speech: float
    speech_s: float
    longest_s: float
    confidence: float
    text: str


# ---- clips ----


def recorded(speech: Path, name: str, *, split: str | None = None) -> Iterator[Clip]:
    """The clips of a folder, in pieces of at most 30 s where nobody speaks."""
    manifest = speech / name / "manifest.jsonl"
    for record in map(json.loads, manifest.read_text().splitlines()):  # with fields that training does not know
        if split not in (None, record["split"]):
            continue
        waveform, text = audio.load(manifest.parent / record["audio"]), record["text"]
        most = len(waveform) if text else segment.MAX_SAMPLES
        for start in range(0, len(waveform), most):
            yield Clip(name, f"{record['audio']}+{start / SAMPLE_RATE:g}s", waveform[start : start + most], text)


def made() -> Iterator[Clip]:
    """The clips that evaluation makes."""
    return (Clip(clip.kind, clip.id, clip.waveform) for clip in nonspeech.made())


# ---- measuring ----


def words(transcript: arkasr.Transcript) -> int:
    """How many it prints."""
    return len(metrics.words(transcript.text))


def hear(transcriber: arkasr.Transcriber, clips: list[Clip]) -> list[Heard]:
    """Every span of every clip, with guards but without any being dropped for what the VAD says."""
    spans = [(number, span) for number, clip in enumerate(clips) for span in segment.split([clip.waveform])]
    loud = [(number, span) for number, span in spans if len(span.waveform) >= audio.HOP_SAMPLES]
    sources = ((span.waveform, SAMPLE_RATE) for _, span in loud)
    transcripts = transcriber.transcribe(sources, vad=False)
    return [
        Heard(
            number,
            round(span.start / SAMPLE_RATE, 2),
            round(span.end / SAMPLE_RATE, 2),
            round(span.speech, 4),
            *speech_times_s(span),
            round(transcript.confidence, 4),
            transcript.text,
        )
        for (number, span), transcript in zip(loud, transcripts, strict=True)
    ]


def speech_times_s(span: Span) -> tuple[float, float]:
    """Seconds of chunks with speech, and of the longest run of them."""
    filled = np.pad(span.waveform, (0, -len(span.waveform) % CHUNK_SAMPLES))
    probabilities = segment.VoiceActivity()(filled)
    chunk_s = CHUNK_SAMPLES / SAMPLE_RATE
    longest = run = 0
    for probability in probabilities:
        run = run + 1 if probability >= (NO_SPEECH if run else SPEECH) else 0
        longest = max(longest, run)
    return round(int((probabilities >= SPEECH).sum()) * chunk_s, 3), round(longest * chunk_s, 3)


def before_and_after(transcriber: arkasr.Transcriber, clips: list[Clip]) -> tuple[list[Any], list[Any], list[float]]:
    """Transcripts of both, and the seconds of each."""
    results, seconds = [], []
    for vad, options in ((False, UNGUARDED), (True, DecodeOptions())):
        started = time.perf_counter()
        sources = ((clip.waveform, SAMPLE_RATE) for clip in clips)
        results.append(list(transcriber.transcribe(sources, vad=vad, options=options)))
        seconds.append(round(time.perf_counter() - started, 1))
    return results[0], results[1], seconds


def by_kind(clips: list[Clip], before: list[Any], after: list[Any]) -> list[dict[str, Any]]:
    """A row a kind, and one for all."""
    rows = []
    for kind in [*dict.fromkeys(clip.kind for clip in clips), "all"]:
        chosen = [n for n, clip in enumerate(clips) if kind in (clip.kind, "all")]
        hours = sum(len(clips[n].waveform) for n in chosen) / SAMPLE_RATE / 3600
        row: dict[str, Any] = {"kind": kind, "clips": len(chosen), "hours": round(hours, 4)}
        for name, transcripts in (("before", before), ("after", after)):
            counts = [words(transcripts[n]) for n in chosen]
            row[f"words_{name}"] = sum(counts)
            row[f"words_per_hour_{name}"] = round(sum(counts) / hours)
            row[f"clips_with_words_{name}"] = sum(map(bool, counts))
        rows.append(row)
    return rows


def percentiles(values: Iterable[float]) -> dict[str, float]:
    found = np.percentile(list(values), PERCENTILES)
    return {f"p{p:g}": round(float(value), 4) for p, value in zip(PERCENTILES, found, strict=True)}


def distributions(heard: list[Heard]) -> dict[str, Any]:
    """Of what the VAD and the network say of spans."""
    fields = ("speech", "speech_s", "longest_s", "confidence")
    return {"spans": len(heard)} | {field: percentiles(getattr(h, field) for h in heard) for field in fields}


def error_percent(clips: list[Clip], heard: list[Heard], rule: tuple[float, float, float]) -> float:
    """WER of clips whose spans are dropped by a rule."""
    texts = [""] * len(clips)
    for h in heard:
        if believed(h, rule):
            texts[h.clip] += f" {h.text}"
    pairs = [(clip.text, text) for clip, text in zip(clips, texts, strict=True)]
    return round(100 * metrics.corpus_word_errors(pairs).rate, 3)


def believed(heard: Heard, rule: tuple[float, float, float]) -> bool:
    """Whether a rule of `RULES` lets a span's text stand."""
    least, sure, confidence = rule
    return heard.speech >= least and (heard.speech >= sure or heard.confidence >= confidence)


def main(speech: Path, model: str) -> None:
    """Measure, print, write."""
    transcriber = arkasr.load_model(model)
    clips = [*recorded(speech, "esc10"), *recorded(speech, "music_nature"), *made()]
    before, after, seconds = before_and_after(transcriber, clips)
    kinds = by_kind(clips, before, after)
    for row in kinds:
        print(
            "{kind:12} {clips:4} clips, {hours:.3f} h: words an hour {words_per_hour_before} -> "
            "{words_per_hour_after}, clips with words {clips_with_words_before} -> "
            "{clips_with_words_after}".format_map(row)
        )
    heard = hear(transcriber, clips)
    spoken = {
        "an4": [*recorded(speech, "an4", split="test")],
        "fsdd": [*recorded(speech, "fsdd", split="test")],
        "long": [*recorded(speech, "long")],
    }
    spoken_heard = {name: hear(transcriber, said) for name, said in spoken.items()}
    rules = [
        {
            "speech_at_least": rule[0],
            "sure_from": rule[1],
            "else_confidence_at_least": rule[2],
            "clips_with_words": len({h.clip for h in heard if metrics.words(h.text) and believed(h, rule)}),
            "clips_with_words_made": len({
                h.clip for h in heard if metrics.words(h.text) and believed(h, rule)
                and clips[h.clip].kind not in ("esc10", "music_nature")
            }),
            **{f"{name}_wer_percent": error_percent(spoken[name], spoken_heard[name], rule) for name in TRANSCRIBED},
            "long_spans_dropped": sum(not believed(h, rule) for h in spoken_heard["long"]),
        }
        for rule in RULES
    ]  # fmt: skip
    still = [
        asdict(h) | {"clip": clips[h.clip].name, "kind": clips[h.clip].kind}
        for h in heard
        if words(after[h.clip]) and h.text
    ]
    for h in still:
        print(
            "  {clip}: speech {speech} for {speech_s} s ({longest_s} s), confidence {confidence}: {text}".format_map(h)
        )
    record = {
        "what": "words printed where nobody speaks, and what tells speech from the rest",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        **{name: version(name) for name in ("numpy", "onnxruntime", "tokenizers")},
        "model": model,
        "seconds_before_and_after": seconds,
        "kinds": kinds,
        "still_speaking": still,
        "spans": {
            "esc10 and music": distributions([h for h in heard if clips[h.clip].kind in ("esc10", "music_nature")]),
            "made": distributions([h for h in heard if clips[h.clip].kind not in ("esc10", "music_nature")]),
            **{name: distributions(spans) for name, spans in spoken_heard.items()},
        },
        "rules": rules,
    }
    target = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-nonspeech.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tiny")
