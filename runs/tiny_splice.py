"""Cuts the AN4 training clips into words and joins words of one speaker anew: real speech that cannot be guessed.

    python runs/tiny_splice.py MANIFEST MODEL TARGET

MODEL is a trained model with its CTC head, which aligns the phones. Writes TARGET/words.jsonl (single words, as pieces
of the AN4 files) and TARGET/spliced.jsonl with its audio. Everything follows from SEED.
"""

import random
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from arkasr import checkpoint
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.data import Utterance, read_manifest
from arkasr.engines.pytorch import pad_mels
from arkasr.train.sft import load_trainee, read_units
from tiny_data import SEED, phrase_units, word_phones, write_manifest

NUM_SPLICED = 6000
FRAME_S = 0.02
FADE_SAMPLES = 160
Word = tuple[str, Waveform]


def best_path(logprobs: npt.NDArray[np.float32], units: list[int]) -> list[int]:
    """Frame at which each unit is most probably emitted: Viterbi over the CTC lattice of logprobs [S, U]."""
    states = [0]
    for unit in units:
        states += [unit, 0]
    labels = np.array(states)
    skip = np.zeros(len(labels), dtype=bool)
    skip[2:] = (labels[2:] != 0) & (labels[2:] != labels[:-2])
    score = np.full(len(labels), -np.inf)
    score[:2] = logprobs[0, labels[:2]]
    back = np.zeros((len(logprobs), len(labels)), dtype=np.int64)
    for t in range(1, len(logprobs)):
        options = np.stack([score, np.roll(score, 1), np.where(skip, np.roll(score, 2), -np.inf)])
        options[1, 0] = -np.inf
        back[t] = options.argmax(axis=0)
        score = options.max(axis=0) + logprobs[t, labels]
    state = len(labels) - 1 if score[-1] > score[-2] else len(labels) - 2
    frames: dict[int, list[int]] = defaultdict(list)
    for t in range(len(logprobs) - 1, -1, -1):
        if labels[state]:
            frames[state // 2].append(t)
        state -= int(back[t, state])
    return [max(frames[n], key=lambda t, n=n: logprobs[t, units[n]]) for n in range(len(units))]  # type: ignore[misc]


def word_times(frames: list[int], counts: list[int], duration_s: float) -> list[tuple[float, float]]:
    """Begin and end of each word: halfway between the last phone of one and the first of the next."""
    edges, at = [max(0.0, frames[0] * FRAME_S - 0.15)], 0
    for count in counts[:-1]:
        at += count
        edges.append((frames[at - 1] + frames[at]) / 2 * FRAME_S)
    edges.append(min(duration_s, frames[-1] * FRAME_S + 0.2))
    return list(pairwise(edges))


def align(utterances: list[Utterance], folder: Path) -> list[list[tuple[float, float]]]:
    """Times of the words of each utterance."""
    units_of_head = read_units(folder)
    unit_ids = {unit: n for n, unit in enumerate(units_of_head, start=1)}
    trainee = load_trainee(checkpoint.open_checkpoint(folder), len(units_of_head))
    times = []
    for utterance in utterances:
        words = utterance.text.split()
        units = [unit_ids[phone] for word in words for phone in word_phones(word)]
        mel, num_frames = pad_mels([utterance.waveform()], trainee.network)
        with torch.inference_mode():
            logprobs = trainee.ctc_logits(trainee.network.encoder(mel, num_frames))[0].log_softmax(-1).numpy()
        counts = [len(word_phones(word)) for word in words]
        times.append(word_times(best_path(logprobs, units), counts, utterance.duration_s))
    return times


def joined(pieces: list[Waveform], room: Waveform, rng: random.Random) -> Waveform:
    """Pieces one after the other, with short fades and now and then a pause of room noise."""
    fade = np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)
    parts = [room[: rng.randint(0, len(room))]]
    for piece in pieces:
        faded = piece.copy()
        faded[:FADE_SAMPLES] *= fade[: len(faded)]
        faded[-FADE_SAMPLES:] *= fade[::-1][-len(faded) :]
        parts.append(faded)
        if rng.random() < 0.3:
            parts.append(room[: rng.randint(0, len(room))])
    return np.concatenate(parts)


def main(manifest: Path, folder: Path, work: Path) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    utterances = list(read_manifest(manifest))
    words: list[dict[str, object]] = []
    by_speaker: dict[str, list[Word]] = defaultdict(list)
    rooms: dict[str, Waveform] = {}
    for utterance, times in zip(utterances, align(utterances, folder), strict=True):
        samples = utterance.waveform()
        speaker = utterance.audio.parent.name
        quiet = samples[: int(times[0][0] * SAMPLE_RATE)]
        if len(quiet) > len(rooms.get(speaker, quiet[:0])):
            rooms[speaker] = quiet[: SAMPLE_RATE // 3]
        for word, (begin_s, end_s) in zip(utterance.text.split(), times, strict=True):
            piece = samples[int(begin_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)]
            if len(piece) < 2 * FADE_SAMPLES:
                continue
            by_speaker[speaker].append((word, piece))
            words.append({
                "audio": str(utterance.audio), "text": word, "units": phrase_units([word]), "language": "en",
                "begin_time": round(begin_s, 3), "end_time": round(end_s, 3), "duration": round(end_s - begin_s, 3),
            })  # fmt: skip
    write_manifest(work / "words.jsonl", words)
    target = work / "spliced"
    target.mkdir(exist_ok=True)
    rng = random.Random(SEED)
    records: list[dict[str, object]] = []
    speakers = sorted(by_speaker)
    for index in range(NUM_SPLICED):
        speaker = rng.choice(speakers)
        chosen = rng.choices(by_speaker[speaker], k=rng.choice([2, 3, 4, 5, 6, 8]))
        samples = joined([piece for _, piece in chosen], rooms[speaker], rng)
        path = target / f"{index:05}.flac"
        soundfile.write(path, samples, SAMPLE_RATE)
        text = [word for word, _ in chosen]
        records.append({
            "audio": str(path.resolve()), "text": " ".join(text), "language": "en", "speaker": speaker,
            "units": phrase_units(text),
            "duration": round(len(samples) / SAMPLE_RATE, 3), "source": "AN4 train, words joined anew",
        })  # fmt: skip
    write_manifest(work / "spliced.jsonl", records)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
