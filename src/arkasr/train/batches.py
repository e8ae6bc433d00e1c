"""Utterances to padded tensors and label masks, in duration buckets, with augmentation.

Unusual: what a batch holds depends only on (seed, epoch, utterance), never on a worker's or an earlier batch's state,
so that a resumed run sees exactly the batches of an undisturbed one. An update's utterances are chosen for all ranks
and micro-batches together, then dealt out: their number changes nothing else.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import soxr
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arkasr import audio
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.config import MAX_CLIP_S
from arkasr.data import Utterance, path_and_split, read_manifest
from arkasr.engines.pytorch import stack_mels
from arkasr.errors import ArkASRError, AudioError, UsageError
from arkasr.model import ArkASR
from arkasr.text import TextRules
from arkasr.train import losses
from arkasr.train.losses import IGNORE


class Key(NamedTuple):
    """An utterance of the stream: epoch and index; `live` unless it only stands in where a piece has none."""

    epoch: int
    utterance: int
    live: bool


@dataclass(frozen=True)
class Example:
    """One utterance, augmented.

    Attributes:
        waveform, mel: [samples] and [M, F].
        num_audio_tokens: `<|audio|>` places in the prompt.
        prompt, target, units: ids.
    """

    waveform: Waveform
    mel: npt.NDArray[np.float32]
    num_audio_tokens: int
    prompt: list[int]
    target: list[int]
    units: list[int]


@dataclass(frozen=True)
class Augmentation:
    """How clips are varied; each part is off at 0.

    Attributes:
        speed: largest relative change of speed (pitch and duration together), 0.1 for 0.9..1.1.
        gain_db: largest change of level.
        noise: share of clips that get coloured noise at 5 to 40 dB SNR.
        narrow: share of clips that lose everything above 4 kHz, as telephone speech has.
        tilt: largest coefficient of a first-order filter x[n] + a x[n-1], which weakens or lifts what hisses.
        trim: share of clips whose weak edges are cut off, as recorders with a voice switch do.
        pad_s: most silence put before and after half of the clips, each.
        time_masks, frequency_masks: SpecAugment masks a clip (arXiv 1904.08779), at most 80 ms per second and 1/6 of
            the mels wide.
    """

    speed: float = 0.0
    gain_db: float = 0.0
    noise: float = 0.0
    narrow: float = 0.0
    tilt: float = 0.0
    trim: float = 0.0
    pad_s: float = 0.0
    time_masks: int = 0
    frequency_masks: int = 0

    def waveform(self, samples: Waveform, rng: np.random.Generator) -> Waveform:
        """A varied copy of samples, [samples]."""
        if self.speed:
            factor = 1 + rng.uniform(-self.speed, self.speed)
            samples = soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE, quality="LQ")
        if self.noise and rng.random() < self.noise:
            samples = samples + _noise(samples, rng.uniform(5, 40), rng)
        if self.narrow and rng.random() < self.narrow:
            low = soxr.resample(samples, SAMPLE_RATE, SAMPLE_RATE // 2, quality="HQ")
            samples = soxr.resample(low, SAMPLE_RATE // 2, SAMPLE_RATE, quality="HQ")
        if self.tilt:
            samples = samples + np.float32(rng.uniform(-self.tilt, self.tilt)) * np.pad(samples[:-1], (1, 0))
        if self.trim and rng.random() < self.trim:
            samples = _trimmed(samples, rng.uniform(0.01, 0.15))
        if self.pad_s and rng.random() < 0.5:
            before, after = (int(rng.uniform(0, self.pad_s) * SAMPLE_RATE) for _ in range(2))
            samples = np.pad(samples, (before, after))
        if self.gain_db:
            samples = samples * np.float32(10 ** (rng.uniform(-self.gain_db, self.gain_db) / 20))
        clipped: Waveform = np.clip(samples, -1, 1).astype(np.float32)
        return clipped

    def mel(self, mel: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Mel [M, F] with masked bands set to the clip's mean."""
        num_mels, num_frames = mel.shape
        mean = mel.mean()
        for _ in range(self.frequency_masks):
            width = rng.integers(0, num_mels // 6 + 1)
            start = rng.integers(0, num_mels - width + 1)
            mel[start : start + width] = mean
        for _ in range(self.time_masks):
            width = rng.integers(0, num_frames // 12 + 1)
            start = rng.integers(0, num_frames - width + 1)
            mel[:, start : start + width] = mean
        return mel


def _noise(samples: Waveform, snr_db: float, rng: np.random.Generator) -> Waveform:
    """Noise whose spectrum falls by 0 to 6 dB an octave, at snr_db below the clip's power."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples), dtype=np.float32))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, n=len(samples))
    power = max(float(np.mean(samples**2)), 1e-8)
    scale = np.sqrt(power / 10 ** (snr_db / 10) / max(float(np.mean(noise**2)), 1e-12))
    return np.asarray(noise * scale, dtype=np.float32)


def _trimmed(samples: Waveform, threshold: float) -> Waveform:
    """Samples between the first and the last 20 ms whose level is above `threshold` of the loudest."""
    length = SAMPLE_RATE // 50
    levels = np.sqrt(np.mean(samples[: len(samples) // length * length].reshape(-1, length) ** 2, axis=1))
    loud = np.flatnonzero(levels > threshold * levels.max(initial=0))
    return samples[loud[0] * length : (loud[-1] + 1) * length] if len(loud) else samples


@dataclass(frozen=True)
class Batch:
    """Padded tensors of several utterances; see model.py for the axes.

    Attributes:
        mel, num_frames: [B, M, F] and [B].
        ids, labels: prompt and target ids [B, T]; labels [B, T] hold the next id where it is a target, else IGNORE.
        units, num_units: CTC targets [B, L] and [B].
        num_audio_tokens: `<|audio|>` places of each prompt.
        keys: epoch and index of each utterance; empty for a stand-in, of which nothing may be trained.
        waveforms: what the mels were made of, [samples] each.
    """

    mel: Tensor
    num_frames: Tensor
    ids: Tensor
    labels: Tensor
    units: Tensor
    num_units: Tensor
    num_audio_tokens: tuple[int, ...] = ()
    keys: tuple[Key, ...] = ()
    waveforms: tuple[Waveform, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; its waveforms stay."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def cross_entropy_sum(self, network: ArkASR, embeddings: Tensor) -> Tensor:
        """Summed negative log-likelihood of the targets after the audio's embeddings [B, A, H]."""
        x = network.embed(self.ids, embeddings)
        hidden = network.decoder(x, torch.arange(self.ids.shape[1], device=x.device).expand_as(self.ids))
        trained = self.labels != IGNORE
        return losses.cross_entropy_sum(network.decoder.logits(hidden[trained])[None], self.labels[trained][None])

    def without_targets(self) -> "Batch":
        """The same audio with nothing to train: what a rank computes that must take part but has no utterance."""
        return replace(
            self, labels=torch.full_like(self.labels, IGNORE), units=torch.zeros_like(self.units[:, :1]),
            num_units=torch.zeros_like(self.num_units), keys=(),
        )  # fmt: skip


@dataclass(frozen=True)
class Collator:
    """Turns utterances into a Batch by the rules of one checkpoint; `unit_ids` maps CTC units to ids from 1."""

    rules: TextRules
    unit_ids: dict[str, int]
    num_mels: int
    merge_factor: int

    @classmethod
    def of(cls, source: Checkpoint, units: Sequence[str]) -> "Collator":
        """The collator of a checkpoint and its CTC units."""
        unit_ids = {unit: number for number, unit in enumerate(units, start=1)}
        return cls(source.rules, unit_ids, source.config.num_mels, source.config.merge_factor)

    def example(self, utterance: Utterance, augmentation: Augmentation, rng: np.random.Generator) -> Example:
        """One augmented utterance; its log-mel is [M, F].

        Raises:
            AudioError: the audio cannot be read or is longer than the encoder takes, whatever the manifest says.
        """
        clean = utterance.waveform()
        longest = MAX_CLIP_S * SAMPLE_RATE
        if len(clean) > longest:
            raise AudioError(
                f"{utterance.audio}: {len(clean) / SAMPLE_RATE:.1f} s, its record says {utterance.duration_s}"
            )
        samples = augmentation.waveform(clean, rng)
        if len(samples) > longest:  # slowed or padded beyond the limit: cutting it would leave text without audio
            samples = clean
        samples = np.pad(samples, (0, max(0, audio.HOP_SAMPLES - len(samples))))
        mel = augmentation.mel(audio.log_mel(samples, self.num_mels), rng)
        num_audio_tokens = audio.num_audio_tokens(len(samples), self.merge_factor)
        prompt = self.rules.prompt_ids(num_audio_tokens)
        units = [self.unit_ids[unit] for unit in ctc_units(utterance)] if self.unit_ids else []
        return Example(samples, mel, num_audio_tokens, prompt, self.rules.target_ids(utterance.text), units)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad to the longest of the batch, on the right."""
        rows = len(examples)
        mels, num_frames = stack_mels([example.mel for example in examples])
        lengths = [len(example.prompt) + len(example.target) for example in examples]
        num_units = torch.tensor([len(example.units) for example in examples])
        ids = torch.full((rows, max(lengths)), self.rules.stop_ids[0])
        labels = torch.full((rows, max(lengths)), IGNORE)
        units = torch.zeros(rows, max(int(num_units.max()), 1), dtype=torch.long)
        for row, example in enumerate(examples):
            ids[row, : lengths[row]] = torch.tensor(example.prompt + example.target)
            labels[row, len(example.prompt) - 1 : lengths[row] - 1] = torch.tensor(example.target)
            units[row, : len(example.units)] = torch.tensor(example.units, dtype=torch.long)
        num_audio_tokens = tuple(example.num_audio_tokens for example in examples)
        return Batch(mels, num_frames, ids, labels, units, num_units, num_audio_tokens)


def read(names: Sequence[str], *, min_s: float, max_s: float, wordless: bool = False) -> list[Utterance]:
    """The utterances of manifests that can be trained on; what is left out is told on standard error.

    Those without text are among them where `wordless` says so.

    Raises:
        UsageError: a manifest is bad, or nothing is left to train on.
    """
    utterances = [utterance for name in names for utterance in manifest(name)]
    kept = [u for u in utterances if min_s <= u.duration_s <= max_s and (u.text or wordless)]
    if not kept:
        raise UsageError(f"{', '.join(names)}: no utterance to train on; check split and durations")
    why = "duration" if wordless else "duration or empty text"
    print(f"{len(kept)} utterances, {sum(u.duration_s for u in kept) / 60:.1f} min; "
          f"{len(utterances) - len(kept)} left out by {why}", file=sys.stderr)  # fmt: skip
    return kept


def manifest(name: str) -> Iterator[Utterance]:
    """Utterances of PATH or PATH:SPLIT."""
    path, split = path_and_split(name)
    return read_manifest(path, split=split)


def ctc_units(utterance: Utterance) -> Sequence[str]:
    """Targets of the auxiliary CTC head: the record's units, else the characters of its text."""
    return list(utterance.text.lower()) if utterance.units is None else utterance.units


def buckets(durations_s: Sequence[float], *, batch_s: float, seed: int, epoch: int) -> list[list[int]]:
    """Batches of utterance indices, similar durations together, each at most batch_s seconds with its padding.

    Every utterance is in exactly one batch; order and grouping vary with (seed, epoch).
    """
    rng = np.random.default_rng((seed, epoch))
    jittered = np.asarray(durations_s) * rng.uniform(0.9, 1.1, len(durations_s))
    batches: list[list[int]] = [[]]
    for index in np.argsort(jittered, kind="stable").tolist():
        batch = [*batches[-1], index]
        if len(batch) > 1 and max(durations_s[i] for i in batch) * len(batch) > batch_s:
            batches.append([index])
        else:
            batches[-1] = batch
    return [batches[i] for i in rng.permutation(len(batches))]


Made = tuple[Key, Example | ArkASRError]


class _Examples(Dataset[Made]):
    """Examples by key. An error is returned, not raised, because a worker's traceback is no one-line message."""

    def __init__(
        self, utterances: Sequence[Utterance], collator: Collator, augmentation: Augmentation, seed: int
    ) -> None:
        self.utterances, self.collator, self.augmentation, self.seed = utterances, collator, augmentation, seed

    def __getitem__(self, key: Key) -> Made:
        rng = np.random.default_rng((self.seed, key.epoch, key.utterance))
        try:
            return key, self.collator.example(self.utterances[key.utterance], self.augmentation, rng)
        except ArkASRError as error:
            return key, error

    def collate(self, made: Sequence[Made]) -> Batch | ArkASRError:
        examples = []
        for _, example in made:
            if isinstance(example, ArkASRError):
                return example
            examples.append(example)
        keys, waveforms = tuple(key for key, _ in made), tuple(example.waveform for example in examples)
        batch = replace(self.collator.collate(examples), keys=keys, waveforms=waveforms)
        return batch if keys[0].live else batch.without_targets()


@dataclass(frozen=True)
class Pieces:
    """Which parts of every update's utterances are made here: `count` from `first` on, among `of`."""

    first: int = 0
    count: int = 1
    of: int = 1

    def deal(self, batch: Sequence[int], epoch: int) -> Iterator[list[Key]]:
        """Keys of each of our pieces; a piece without utterances gets the update's first as a stand-in."""
        for piece in range(self.first, self.first + self.count):
            dealt = batch[piece :: self.of]
            yield [Key(epoch, index, live=True) for index in dealt] or [Key(epoch, batch[0], live=False)]


WHOLE = Pieces()


@dataclass(frozen=True)
class _Keys:
    """The endless order of pieces, from a given update on."""

    durations_s: Sequence[float]
    batch_s: float
    seed: int
    start: int
    pieces: Pieces

    def __iter__(self) -> Iterator[list[Key]]:
        skip, epoch = self.start, 0
        while True:
            batches = buckets(self.durations_s, batch_s=self.batch_s, seed=self.seed, epoch=epoch)
            for batch in batches[skip:]:
                yield from self.pieces.deal(batch, epoch)
            skip = max(0, skip - len(batches))
            epoch += 1


def stream(
    utterances: Sequence[Utterance],
    collator: Collator,
    augmentation: Augmentation,
    *,
    batch_s: float,
    seed: int,
    start: int,
    workers: int,
    pieces: Pieces = WHOLE,
) -> Iterator[Batch]:
    """Endless `pieces.count` batches an update, from update number `start` on, made by `workers` processes.

    Raises:
        AudioError: an utterance cannot be read.
    """
    examples = _Examples(utterances, collator, augmentation, seed)
    durations_s = [utterance.duration_s for utterance in utterances]
    loader = DataLoader(
        examples,
        batch_sampler=_Keys(durations_s, batch_s, seed, start, pieces),
        collate_fn=examples.collate,
        num_workers=workers,
    )
    for batch in loader:
        if isinstance(batch, ArkASRError):
            raise batch
        yield batch
