"""Supervised fine-tuning: audio and transcripts in, a checkpoint in the published layout out.

Unusual: an auxiliary CTC head on the encoder, used in training only, may lead for `ctc_only_steps` updates. A decoder
trained from the start learns the language of an hour of speech long before its audio; an encoder that CTC has taught
to hear gives it something to read.
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arkasr import checkpoint, files, metrics, model
from arkasr.audio import HOP_SAMPLES, SAMPLE_RATE
from arkasr.checkpoint import Checkpoint
from arkasr.data import Utterance
from arkasr.engines.pytorch import pad_mels
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.text import TextRules
from arkasr.train import batches, loop, losses
from arkasr.train.batches import Batch, Collator, ctc_units
from arkasr.train.loop import Run
from arkasr.train.ranks import Ranks

CTC_HEAD = "ctc_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Config(loop.Settings):
    """One run.

    Attributes:
        ctc_weight: weight of the auxiliary CTC loss beside the decoder's.
        ctc_only_steps: updates in which the CTC loss alone trains the encoder.
    """

    ctc_weight: float = 0.3
    ctc_only_steps: int = 0


class Trainee(nn.Module):
    """The model under training with its CTC head."""

    def __init__(self, network: ArkASR, num_units: int) -> None:
        super().__init__()
        self.network = network
        self.ctc = nn.Linear(network.config.encoder_dim, num_units + 1)

    def ctc_logits(self, frames: Tensor) -> Tensor:
        """Scores of blank and units [B, S, U] from the encoder's frames [B, S, E]."""
        logits: Tensor = self.ctc(self.network.adapter.norm(frames))
        return logits

    def forward(self, batch: Batch, weights: "Weights") -> tuple[Tensor, Tensor]:
        """Summed CTC and cross-entropy losses of a batch; one without weight is not computed, and 0."""
        network, nothing = self.network, self.ctc.bias.new_zeros(())
        num_frames = model.num_encoder_frames(batch.num_frames)
        frames = network.encoder(batch.mel, batch.num_frames)
        ctc, ce = nothing, nothing
        if weights.ctc:
            ctc = losses.ctc_sum(self.ctc_logits(frames), num_frames, batch.units, batch.num_units)
            ctc = ctc * bool(batch.keys)  # a stand-in has no units, but silence would have a loss
        if weights.ce:
            ce = batch.cross_entropy_sum(network, network.adapter(frames, num_frames))
        return ctc, ce


@dataclass(frozen=True)
class Weights:
    """What each loss counts in one update."""

    ctc: float
    ce: float

    @classmethod
    def at(cls, step: int, config: Config) -> "Weights":
        """CTC alone for the first `ctc_only_steps`, then both."""
        return cls(ctc=1.0, ce=0.0) if step < config.ctc_only_steps else cls(ctc=config.ctc_weight, ce=1.0)


def main(config: Config) -> None:
    """Run, or resume, until `config.steps`.

    Raises:
        UsageError: a manifest is bad, or the folder holds a run of another configuration.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with Ranks.started(config.device) as ranks:
        source = checkpoint.open_checkpoint(config.model)
        utterances = batches.read(config.train, min_s=config.min_duration_s, max_s=config.max_duration_s)
        units = _units(source.folder, utterances) if config.ctc_weight or config.ctc_only_steps else []
        collator = Collator.of(source, units)
        plain = load_trainee(source, len(units)).to(ranks.device)  # for evaluation and the product
        trainee = copy.deepcopy(plain)
        run = Run(config, trainee, ranks)
        pieces = batches.stream(
            utterances, collator, config.augmentation, batch_s=config.batch_s, seed=config.seed, start=run.step,
            workers=config.workers, pieces=config.pieces(ranks),
        )  # fmt: skip
        while run.step < config.steps:
            _update(run, trainee, [next(pieces).to(ranks.device) for _ in range(config.accumulate)], config)
            if config.eval and run.due(config.eval_every):
                run.averaged_into(plain)
                scores = _evaluate(
                    plain, source.rules, collator, config.eval, ranks, write=run.step > config.ctc_only_steps
                )
                run.log(scores)
                if ranks.first:
                    print(f"step {run.step}: {scores}", file=sys.stderr, flush=True)
            if run.due(config.save_every):
                run.save()
        run.averaged_into(plain)
        if ranks.first:
            loop.publish(plain.network, source.folder, config.out / "model")
            if units:
                _save_head(plain, units, config.out / "model")


def _update(run: Run, trainee: Trainee, pieces: Sequence[Batch], config: Config) -> None:
    """One update on this rank's pieces of it."""
    weights = Weights.at(run.step, config)
    own = [float(sum(int(piece.num_units.sum()) for piece in pieces))]
    own += [float(sum(int((piece.labels != losses.IGNORE).sum()) for piece in pieces))]
    num_units, num_targets = run.ranks.sums(own)
    for piece in pieces:
        with run.autocast():
            ctc, ce = trainee(piece, weights)
        # Means over the whole update, so that accumulation 4 x 1 equals 1 x 4.
        run.backward(weights.ctc * ctc / max(num_units, 1) + weights.ce * ce / num_targets)
        run.measure(ctc=(float(ctc.detach()), 0), ce=(float(ce.detach()), 0))
    audio_s = sum(float(piece.num_frames.sum()) for piece in pieces if piece.keys) * HOP_SAMPLES / SAMPLE_RATE
    run.measure(ctc=(0, own[0]), ce=(0, own[1] if weights.ce else 0), audio_s_per_s=(audio_s, run.lap_s()))
    run.update(1.0)


def read_units(folder: Path) -> list[str]:
    """The units, from id 1 on, of the CTC head beside a model."""
    with safe_open(folder / CTC_HEAD, framework="pt") as file:
        units: list[str] = json.loads(file.metadata()["units"])
    return units


def _units(folder: Path, utterances: Sequence[Utterance]) -> list[str]:
    """CTC units: those of the starting checkpoint's head, else all that the data has."""
    needed = {unit for utterance in utterances for unit in ctc_units(utterance)}
    if (folder / CTC_HEAD).exists():
        units = read_units(folder)
        if needed <= set(units):
            return units
        raise UsageError(
            f"{folder / CTC_HEAD}: knows no CTC unit {min(needed - set(units))!r}; remove it to start afresh"
        )
    return sorted(needed)


def load_trainee(source: Checkpoint, num_units: int) -> Trainee:
    """The checkpoint's network in float32, all of it to be trained, and its CTC head, if units are and it has one."""
    trainee = Trainee(model.load(source), num_units)
    trainee.requires_grad_(True)
    trainee.network.encoder.positions.requires_grad_(not source.config.use_rope)
    if num_units and (source.folder / CTC_HEAD).exists():
        trainee.ctc.load_state_dict(load_file(source.folder / CTC_HEAD))
    return trainee


def _save_head(trainee: Trainee, units: Sequence[str], folder: Path) -> None:
    head = {name: value.detach().cpu().contiguous() for name, value in trainee.ctc.state_dict().items()}
    files.write_atomically(folder / CTC_HEAD, lambda part: save_file(head, part, {"units": json.dumps(list(units))}))


@torch.inference_mode()
def _evaluate(
    trainee: Trainee, rules: TextRules, collator: Collator, manifest: str, ranks: Ranks, *, write: bool
) -> dict[str, float]:
    """Unit error rate of the CTC head, where there is one, and, once the decoder is trained, WER of the recognizer."""
    trainee.eval()
    utterances = list(batches.manifest(manifest))
    if not collator.unit_ids:
        return loop.evaluate(trainee.network, rules, utterances, ranks)
    names = {number: unit for unit, number in collator.unit_ids.items()}
    pairs: list[tuple[str, str]] = []

    def look(group: Sequence[Utterance], frames: Tensor, num_frames: Tensor) -> None:
        paths = losses.ctc_greedy(trainee.ctc_logits(frames), model.num_encoder_frames(num_frames))
        for utterance, path in zip(group, paths, strict=True):
            pairs.append((" ".join(ctc_units(utterance)), " ".join(names[number] for number in path)))

    scores: dict[str, float] = {}
    if write:
        scores = loop.evaluate(trainee.network, rules, utterances, ranks, look=look)
    else:
        for group in loop.shares(utterances, ranks):
            mel, num_frames = pad_mels([utterance.waveform() for utterance in group], trainee.network)
            look(group, trainee.network.encoder(mel, num_frames), num_frames)
    counts = metrics.corpus_word_errors(pairs)
    errors, total = ranks.sums([counts.errors, counts.reference_words])
    return {"eval_units": errors / max(total, 1), **scores}
