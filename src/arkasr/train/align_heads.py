"""Alignment heads: which of the decoder's attention heads look where a word is said, found without aligned data.

    clips -> what the model writes of each -> recordings joined of them -> each head's attention to a token's own clip
    -> the best of these heads -> those by which word times come nearest to the borders -> generation_config.json

Unusual: nobody says when a word was said. Clips lie where they were put, and a clip's words lie inside of it. The words
are the model's own, lest it be asked where it hears what it would never write. One half of the clips chooses the heads;
on the other it is measured what they are worth.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkasr import align, audio, checkpoint, engines, files, metrics, pins, results, segment
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.config import MAX_CLIP_S, Heads, ModelConfig
from arkasr.data import Utterance
from arkasr.engines import DecodeOptions, Floats
from arkasr.engines.pytorch import PyTorchEngine, pad_mels
from arkasr.errors import UsageError
from arkasr.text import TextRules
from arkasr.train import batches, loop

KEY = "alignment_heads"
SHORTEST_S, MOST_PAUSE_S, EDGE_S = 1.5, 0.25, 0.2  # of a recording, between two clips, before and behind them all
LONGEST_CLIP_S = (MAX_CLIP_S - 1) / 2  # two and their pauses are a recording
LEVEL, FLOOR = 0.3, 3e-4  # peak of a clip, and standard deviation of the noise in a pause
BATCH = 8
FOLLOWED = 0.75  # part of a recording's tokens that the model itself would say; with less it has lost its place
LEAST = 8  # recordings to choose by, and as many to measure with
MOST_LOST = 6  # times as much audio is joined as is wanted, if the model loses its place so often
NEAR_BEST, CANDIDATES, MOST = 0.5, 16, 8  # part of the best one's share with which a head may be chosen; how many may
FAR_S = 1.0  # wrong is wrong: a border that is missed by more counts no more
GAIN = 0.01  # part of the mean distance that one more head must save, or another choice

Head = tuple[int, int]  # as in `config.Heads`
Rows = Mapping[Head, Floats]  # of one recording: what each head listens to, as in `Generation.attention`


@dataclass(frozen=True, kw_only=True)
class Config:
    """One search.

    Attributes:
        model: built-in name or folder of the checkpoint.
        train: manifests of short clips, each as PATH or PATH:SPLIT; a clip that the model hears otherwise than its
            text says is left out; a text is not needed.
        out: new folder, for a copy of the checkpoint with the choice; without it the choice is only reported.
        write: put the choice into the model's own folder.
        report: file for all that was measured, as JSON.
        minutes: of recordings that are joined and listened to.
        device: where to listen, cpu or cuda.
        threads: of PyTorch, 0 for its own choice.
        seed: of everything.
    """

    model: str
    train: tuple[str, ...]
    out: Path | None = None
    write: bool = False
    report: Path | None = None
    minutes: float = 10.0
    device: str = "cpu"
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise UsageError(f"minutes is {self.minutes}; give more than 0 and at most {24 * 60}")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; give 0 or more")
        if self.out is not None and self.write:
            raise UsageError("write: the choice goes into a copy, --out, or into the model's own folder; give one")
        if self.out is not None and self.out.exists():
            raise UsageError(f"{self.out}: exists; give a new folder")


@dataclass(frozen=True, eq=False)
class Clip:
    """Samples, what the model writes of them, and where their speech begins and ends by the detector."""

    waveform: Waveform
    text: str
    speech: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Recording:
    """Clips one after the other.

    Attributes:
        waveform: at most 30 s.
        clips: where each of them lies: its first sample, and the one behind its last.
        speech: where the speech of each lies.
        ids: of the whole text, without the stop.
        word_tokens: the places of each word's tokens in the ids.
        owners: the number of each word's clip.
    """

    waveform: Waveform
    clips: tuple[tuple[int, int], ...]
    speech: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    word_tokens: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Half:
    """Recordings that the model follows with their audio embeddings [1, A, H], and how many it does not."""

    recordings: Sequence[Recording]
    embeddings: Sequence[Tensor]
    lost: int


@dataclass(frozen=True)
class Distances:
    """Between clips' first and last word and where their speech begins and ends; `mean_ms` counts at most a second."""

    borders: int
    median_ms: float
    p95_ms: float
    mean_ms: float


@torch.inference_mode()
def main(config: Config) -> None:
    """Search, report, and write the choice where that is asked for.

    Raises:
        UsageError: nothing can be written there, or the model follows too few recordings.
        AudioError: a clip cannot be read.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    source = checkpoint.open_checkpoint(config.model)
    checkpoint.need_weights(source)
    if config.write and pins.read_lock(source.folder) is not None:
        raise UsageError(
            f"write: {source.folder} is pinned, and a changed file in it would be taken for damage; give --out FOLDER "
            "for a copy with the choice"
        )
    utterances = batches.read(config.train, min_s=0.05, max_s=LONGEST_CLIP_S, wordless=True)
    rng = np.random.default_rng(config.seed)
    shuffled = [utterances[n] for n in rng.permutation(len(utterances))]
    engine = PyTorchEngine.load(source, device=config.device)
    clips = heard(engine, shuffled, 60 * config.minutes)
    halves = [followed(engine, clips[n::2], 30 * config.minutes, rng) for n in (0, 1)]
    found = search(engine, *halves)
    choice = found["choice"]
    about = {
        "what": "alignment heads", "model": str(source.folder), "train": config.train, "minutes": config.minutes,
        "seed": config.seed, **loop.provenance(), "chosen_before": source.alignment_chosen, "clips": len(clips),
    }  # fmt: skip
    try:
        if config.report is not None:
            files.write_text_atomically(config.report, json.dumps(about | found, indent=1) + "\n")
        if config.out is not None:
            copy(source.folder, config.out, choice)
        elif config.write:
            write(source.folder, choice)
    except OSError as error:
        raise UsageError(f"cannot be written: {error}") from None
    print(json.dumps({KEY: choice}))


# ---- recordings with known borders ----


def heard(engine: PyTorchEngine, utterances: Sequence[Utterance], seconds: float) -> list[Clip]:
    """So many seconds of clips, or all there are, in which there is speech that the model hears as their text says."""
    clips: list[Clip] = []
    for start in range(0, len(utterances), BATCH):
        read = [(utterance.text, utterance.waveform()) for utterance in utterances[start : start + BATCH]]
        read = [(text, w) for text, w in read if audio.HOP_SAMPLES <= len(w) <= LONGEST_CLIP_S * SAMPLE_RATE]
        said = engine.generate([waveform for _, waveform in read], DecodeOptions()) if read else []
        for (expected, waveform), generation in zip(read, said, strict=True):
            text = engine.rules.to_text(list(generation.ids))
            right = not expected or metrics.word_errors(expected, text).errors == 0
            (span,) = segment.split([waveform])
            if text and right and span.has_speech and generation.stop_logprob is not None:
                clips.append(Clip(waveform, text, (span.first, span.last)))
        if sum(len(clip.waveform) for clip in clips) >= seconds * SAMPLE_RATE:
            break
    if len(clips) < 4:
        raise UsageError(f"the model hears {len(clips)} of {len(utterances)} clips as their texts say; give others")
    return clips


def joined(clips: Sequence[Clip], rules: TextRules, rng: np.random.Generator) -> Iterator[Recording]:
    """Recordings without end, of two clips up to 30 s: many short ones, for some models follow no others."""
    while True:
        wanted = SAMPLE_RATE * SHORTEST_S * (MAX_CLIP_S / SHORTEST_S) ** rng.random()
        parts, inside, starts = [_pause(EDGE_S, rng)], list[Clip](), list[int]()
        while True:
            clip, pause = clips[int(rng.integers(len(clips)))], _pause(rng.uniform(0, MOST_PAUSE_S), rng)
            at = sum(map(len, parts))
            if len(inside) >= 2 and at + len(clip.waveform) + len(pause) > wanted - EDGE_S * SAMPLE_RATE:
                break
            inside.append(clip)
            starts.append(at)
            parts += [clip.waveform * np.float32(LEVEL / max(float(np.abs(clip.waveform).max()), 1e-3)), pause]
        text = results.join_texts(clip.text for clip in inside)
        ids = rules.target_ids(text)[:-1]
        yield Recording(
            np.concatenate([*parts, _pause(EDGE_S, rng)]),
            clips=tuple((at, at + len(clip.waveform)) for at, clip in zip(starts, inside, strict=True)),
            speech=tuple((at + clip.speech[0], at + clip.speech[1]) for at, clip in zip(starts, inside, strict=True)),
            ids=tuple(ids),
            word_tokens=tuple(tokens for _, tokens in align.words(text, ids, rules.token_bytes)),
            owners=tuple(n for n, clip in enumerate(inside) for _ in results.words(clip.text)),
        )


def _pause(seconds: float, rng: np.random.Generator) -> Waveform:
    return rng.normal(scale=FLOOR, size=int(seconds * SAMPLE_RATE)).astype(np.float32)


def followed(engine: PyTorchEngine, clips: Sequence[Clip], seconds: float, rng: np.random.Generator) -> Half:
    """So many seconds in which the model does not lose its place: where it does, no head tells anything."""
    recordings, embeddings, lost = list[Recording](), list[Tensor](), list[Recording]()
    for recording in joined(clips, engine.rules, rng):
        encoded = engine.network.encode(*pad_mels([recording.waveform], engine.network))
        _, agreed = listen(engine, recording, encoded, ())
        if agreed >= FOLLOWED:
            recordings.append(recording)
            embeddings.append(encoded)
        else:
            lost.append(recording)
        kept_s, lost_s = (sum(len(one.waveform) for one in ones) / SAMPLE_RATE for ones in (recordings, lost))
        if kept_s >= seconds or kept_s + lost_s >= MOST_LOST * seconds:
            break
    if len(recordings) < LEAST:
        raise UsageError(
            f"the model follows {len(recordings)} of {len(recordings) + len(lost)} recordings, {LEAST} are needed; "
            "give clips that it recognizes, or more --minutes"
        )
    return Half(recordings, embeddings, len(lost))


# ---- heads ----


class _Keys:
    """In place of a KV cache: of each layer's keys and queries it keeps what some heads listen to, and nothing else."""

    def __init__(self, config: ModelConfig, heads: Heads, *, audio_places: slice, asking: slice, capacity: int) -> None:
        self.rows: dict[Head, Floats] = {}
        self.capacity = capacity
        self._heads = engines.heads_by_layer(heads)
        self._group = config.decoder_heads // config.kv_heads
        self._audio, self._asking = audio_places, asking
        self._queries = torch.empty(0)

    def see(self, _layer: int, q: Tensor) -> None:
        self._queries = q[0, :, self._asking]

    def put(self, layer: int, _positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = self._queries, k[0, :, self._audio]
        for head in self._heads.get(layer, np.empty(0, np.int64)).tolist():
            told, heard = (x.float().cpu().numpy() for x in (queries[head][None], keys[head // self._group][None]))
            self.rows[layer, head] = engines.attention(told, heard, num_ids=queries.shape[1])[: queries.shape[1]]
        return k, v


def listen(engine: PyTorchEngine, recording: Recording, embeddings: Tensor, heads: Heads) -> tuple[Rows, float]:
    """What heads listen to while the model is made to say a text, and the part of it that it would have said itself."""
    prompt = engine.rules.prompt_ids(embeddings.shape[1])
    first = prompt.index(engine.rules.audio_id)
    ids = torch.tensor([[*prompt, *recording.ids]], device=embeddings.device)
    asking = slice(len(prompt) - 1, ids.shape[1] - 1)
    keys = _Keys(
        engine.network.config, heads, audio_places=slice(first, first + embeddings.shape[1]), asking=asking,
        capacity=ids.shape[1],
    )  # fmt: skip
    decoder = engine.network.decoder
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = decoder(engine.network.embed(ids, embeddings), positions, keys, see=keys.see)
    forbidden = torch.from_numpy(~engine.rules.allowed_ids).to(ids.device)
    likeliest = decoder.logits(hidden[0, asking]).masked_fill(forbidden, -torch.inf).argmax(dim=-1)
    return keys.rows, float((likeliest == ids[0, len(prompt) :]).float().mean())


def attention(engine: PyTorchEngine, half: Half, heads: Heads) -> Iterator[Rows]:
    """What heads listen to in each recording."""
    for recording, embeddings in zip(half.recordings, half.embeddings, strict=True):
        yield listen(engine, recording, embeddings, heads)[0]


def own_shares(recording: Recording, rows: Floats, token_samples: int) -> list[float]:
    """Of each token of one clip's words: the share of its attention to audio tokens whose middle is in that clip."""
    middles = (np.arange(rows.shape[1]) + 0.5) * token_samples
    owners: dict[int, set[int]] = {}
    for tokens, owner in zip(recording.word_tokens, recording.owners, strict=True):
        for token in tokens:
            owners.setdefault(token, set()).add(owner)
    inside = [(middles >= start) & (middles < end) for start, end in recording.clips]
    return [float(rows[token][inside[min(own)]].sum()) for token, own in owners.items() if len(own) == 1]


def distances(recordings: Sequence[Recording], told: Sequence[Rows], heads: Heads) -> Distances:
    """How far the word times that some heads tell are from the borders of speech."""
    off_s: list[float] = []
    for recording, rows in zip(recordings, told, strict=True):
        mean = np.mean([rows[head] for head in heads], axis=0)
        times_s = align.times(mean, recording.word_tokens, recording.waveform)
        for clip, (start, end) in enumerate(recording.speech):
            own = [time_s for time_s, owner in zip(times_s, recording.owners, strict=True) if owner == clip]
            off_s += [abs(own[0][0] - start / SAMPLE_RATE), abs(own[-1][1] - end / SAMPLE_RATE)]
    off_ms = 1000 * np.array(off_s)
    figures = np.median(off_ms), np.percentile(off_ms, 95), np.minimum(off_ms, 1000 * FAR_S).mean()
    return Distances(len(off_s), *(round(float(figure), 2) for figure in figures))


def choose(recordings: Sequence[Recording], told: Sequence[Rows], candidates: Sequence[Head]) -> Heads:
    """Heads, each of which brought word times nearest to the borders beside those before it, while that helped."""
    chosen: Heads = ()
    least = math.inf
    while len(chosen) < min(MOST, len(candidates)):
        left = [head for head in candidates if head not in chosen]
        means = {head: distances(recordings, told, (*chosen, head)).mean_ms for head in left}
        best = min(left, key=means.__getitem__)
        if means[best] >= least * (1 - GAIN):
            break
        chosen, least = (*chosen, best), means[best]
    return tuple(sorted(chosen))


def search(engine: PyTorchEngine, choosing: Half, measuring: Half) -> dict[str, Any]:
    """All that was measured, and the choice: what was found if it is nearer on both halves, else what stood."""
    config, stood = engine.network.config, engine.alignment_heads
    every = tuple((layer, head) for layer in range(config.decoder_layers) for head in range(config.decoder_heads))
    told: dict[Head, list[float]] = {head: [] for head in every}
    alike: list[float] = []  # of a head that would listen to everything
    token_samples = config.merge_factor * align.STEP_SAMPLES
    for recording, rows in zip(choosing.recordings, attention(engine, choosing, every), strict=True):
        for head in every:
            told[head] += own_shares(recording, rows[head], token_samples)
        alike += own_shares(recording, np.full_like(rows[every[0]], 1 / rows[every[0]].shape[1]), token_samples)
    chance, shares = float(np.mean(alike)), {head: float(np.mean(told[head])) for head in every}
    ranked = sorted(every, key=lambda head: -shares[head])
    print(f"{len(choosing.recordings)} recordings to choose by, {len(measuring.recordings)} to measure with; in "
          f"{choosing.lost + measuring.lost} more the model loses its place", file=sys.stderr)  # fmt: skip
    best = " ".join(f"{layer}.{head} {shares[layer, head]:.2f}" for layer, head in ranked[:CANDIDATES])
    print(f"attention to the own clip, by layer and head: {best} (chance {chance:.2f})", file=sys.stderr)
    candidates = [head for head in ranked[:CANDIDATES] if shares[head] >= NEAR_BEST * shares[ranked[0]]]
    tried = list(attention(engine, choosing, tuple({*candidates, *stood})))
    found = choose(choosing.recordings, tried, candidates)
    held_out = list(attention(engine, measuring, tuple({*found, *stood})))
    measured: dict[str, Any] = {}
    for name, heads in (("stood", stood), ("found", found)):
        here, there = distances(choosing.recordings, tried, heads), distances(measuring.recordings, held_out, heads)
        measured[name] = {"heads": heads, "chosen_by": asdict(here), "held_out": asdict(there)}
        print(f"{name} {json.dumps(heads)}: median {there.median_ms:.0f} ms, 95 % {there.p95_ms:.0f} ms, mean "
              f"{there.mean_ms:.1f} ms of {there.borders} borders held out", file=sys.stderr)  # fmt: skip
    halves = ("chosen_by", "held_out")
    ratios = [measured["found"][half]["mean_ms"] / max(measured["stood"][half]["mean_ms"], 1e-9) for half in halves]
    nearer = all(ratio < 1 - GAIN for ratio in ratios)
    return {
        "recordings": [len(choosing.recordings), len(measuring.recordings)], "lost": [choosing.lost, measuring.lost],
        "share_by_chance": round(chance, 4), "shares": [[*head, round(shares[head], 4)] for head in ranked],
        **measured, "choice": found if nearer else stood,
    }  # fmt: skip


# ---- writing ----


def write(folder: Path, heads: Heads) -> None:
    """Put a choice into a folder's generation_config.json, and keep whatever else it says."""
    path = folder / files.GENERATION_CONFIG
    said = files.read_json(path) if path.exists() else {}
    files.write_text_atomically(path, json.dumps({**said, KEY: heads}, indent=2) + "\n")


def copy(source: Path, target: Path, heads: Heads) -> None:
    """Copy a checkpoint's files, and no lock with them, into a new folder that has this choice."""
    part = target.with_name(target.name + files.PART)
    part.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if files.is_published(path.name):
            shutil.copyfile(path, part / path.name)
    write(part, heads)
    part.rename(target)
