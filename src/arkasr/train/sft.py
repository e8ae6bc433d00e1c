"""Supervised fine-tuning: audio and transcripts in, a checkpoint in the published layout out.

Unusual: an auxiliary CTC head on the encoder, used in training only, may lead for `ctc_only_steps` updates. A decoder
trained from the start learns the language of an hour of speech long before its audio; an encoder that CTC has taught
to hear gives it something to read.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arkasr import checkpoint, files, metrics, model
from arkasr.checkpoint import Checkpoint
from arkasr.config import MAX_CLIP_S
from arkasr.data import Utterance, read_manifest
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine, pad_mels
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.text import TextRules
from arkasr.train import loop, losses
from arkasr.train.batches import Augmentation, Batch, Collator, ctc_units, stream

CTC_HEAD = "ctc_head.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        model: built-in name or folder to start from.
        train: manifests, each as PATH or PATH:SPLIT; one named twice counts twice.
        out: folder of the run: config.json, metrics.jsonl, state.pt, and model/ in the published layout.
        eval: manifest whose WER is measured every `eval_every` updates.
        steps: updates in all.
        batch_s: seconds of audio a micro-batch, with padding.
        accumulate: micro-batches an update.
        lr, warmup_steps: peak learning rate, reached linearly; then a cosine down to a twentieth of it.
        weight_decay: of AdamW, on matrices only.
        clip: largest global norm of the gradient.
        ctc_weight: weight of the auxiliary CTC loss beside the decoder's.
        ctc_only_steps: updates in which the CTC loss alone trains the encoder.
        average: decay of the moving average of the weights, which is what is evaluated and saved.
        max_duration_s, min_duration_s: utterances outside are left out (and counted).
        bf16: forward and backward in bfloat16 where autocast sees fit; weights stay float32.
        device: where to train, cpu or cuda.
        threads: of PyTorch, 0 for its own choice.
        workers: processes that prepare batches.
        seed: of everything.
        eval_every, save_every, log_every: updates between evaluations, checkpoints and lines of the metrics file.
    """

    model: str
    train: tuple[str, ...]
    out: Path
    eval: str | None = None
    steps: int = 10_000
    batch_s: float = 24.0
    accumulate: int = 1
    lr: float = 1e-3
    warmup_steps: int = 500
    weight_decay: float = 0.01
    clip: float = 1.0
    ctc_weight: float = 0.3
    ctc_only_steps: int = 0
    average: float = 0.999
    max_duration_s: float = 30.0
    min_duration_s: float = 0.05
    bf16: bool = False
    device: str = "cpu"
    threads: int = 0
    workers: int = 1
    seed: int = 0
    eval_every: int = 1000
    save_every: int = 500
    log_every: int = 50
    augmentation: Augmentation = field(default_factory=Augmentation)


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
        if weights.ce:
            x = network.embed(batch.ids, network.adapter(frames, num_frames))
            hidden = network.decoder(x, torch.arange(batch.ids.shape[1], device=x.device).expand_as(batch.ids))
            trained = batch.labels != losses.IGNORE
            ce = losses.cross_entropy_sum(network.decoder.logits(hidden[trained])[None], batch.labels[trained][None])
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
    if config.max_duration_s > MAX_CLIP_S:
        raise UsageError(f"max_duration_s is {config.max_duration_s}; the encoder takes at most {MAX_CLIP_S} s")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    source = checkpoint.open_checkpoint(config.model)
    utterances = _read(config)
    units = _units(source.folder, utterances)
    device = torch.device(config.device)
    trainee = load_trainee(source, len(units)).to(device).train()
    collator = Collator.of(source, units)
    optimizer = loop.adamw(trainee, weight_decay=config.weight_decay)
    schedule = loop.Schedule(config.lr, config.warmup_steps, config.steps)
    average = loop.MovingAverage(trainee, decay=config.average)
    first = _start(config, trainee, optimizer, average)
    batches = stream(
        utterances, collator, config.augmentation,
        batch_s=config.batch_s, seed=config.seed, start=first * config.accumulate, workers=config.workers,
    )  # fmt: skip

    seen = _Seen()
    for step in range(first, config.steps):
        weights = Weights.at(step, config)
        pieces = [next(batches).to(device) for _ in range(config.accumulate)]
        num_units = sum(int(piece.num_units.sum()) for piece in pieces)
        num_targets = sum(int((piece.labels != losses.IGNORE).sum()) for piece in pieces)
        for piece in pieces:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                ctc, ce = trainee(piece, weights)
            # Means over the whole update, so that accumulation 4 x 1 equals 1 x 4.
            (weights.ctc * ctc / max(num_units, 1) + weights.ce * ce / num_targets).backward()
            seen.add(ctc, ce, piece)
        seen.num_units += num_units
        seen.num_targets += num_targets
        norm = loop.gradient_norm(trainee.parameters(), limit=config.clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        average.update(trainee, step)

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            loop.log(config.out, {"step": done, "lr": schedule.at(step), "grad_norm": round(norm, 3), **seen.means()})
            seen = _Seen()
        if config.eval and (done % config.eval_every == 0 or done == config.steps):
            average.swap(trainee)
            scores = _evaluate(trainee, source.rules, collator, config.eval, write=bool(weights.ce))
            average.swap(trainee)
            loop.log(config.out, {"step": done, **scores})
            print(f"step {done}: {scores}", file=sys.stderr, flush=True)
        if done % config.save_every == 0 or done == config.steps:
            _save(config, done, trainee, optimizer, average, source.folder, units)


@dataclass
class _Seen:
    """Sums between two lines of the metrics file."""

    ctc: float = 0.0
    num_units: int = 0
    ce: float = 0.0
    num_targets: int = 0
    audio_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, ctc: Tensor, ce: Tensor, batch: Batch) -> None:
        self.ctc += float(ctc.detach())
        self.ce += float(ce.detach())
        self.audio_s += float(batch.num_frames.sum()) / 100

    def means(self) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self.started
        return {
            "ctc": round(self.ctc / max(self.num_units, 1), 4),
            "ce": round(self.ce / max(self.num_targets, 1), 4),
            "audio_s_per_s": round(self.audio_s / elapsed_s, 1),
        }


def _read(config: Config) -> list[Utterance]:
    utterances: list[Utterance] = []
    for name in config.train:
        utterances += _manifest(name)
    kept = [u for u in utterances if config.min_duration_s <= u.duration_s <= config.max_duration_s and u.text]
    if not kept:
        raise UsageError(f"{', '.join(config.train)}: no utterance to train on; check split and durations")
    print(f"{len(kept)} utterances, {sum(u.duration_s for u in kept) / 60:.1f} min; "
          f"{len(utterances) - len(kept)} left out by duration or empty text", file=sys.stderr)  # fmt: skip
    return kept


def _manifest(name: str) -> Iterator[Utterance]:
    path, _, split = name.partition(":")
    return read_manifest(Path(path), split=split or None)


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
    """The checkpoint's network in float32, all of it to be trained, and the CTC head that lies beside it, if any."""
    trainee = Trainee(model.load(source), num_units)
    trainee.requires_grad_(True)
    trainee.network.encoder.positions.requires_grad_(not source.config.use_rope)
    if (source.folder / CTC_HEAD).exists():
        trainee.ctc.load_state_dict(load_file(source.folder / CTC_HEAD))
    return trainee


def _start(config: Config, trainee: Trainee, optimizer: torch.optim.Optimizer, average: loop.MovingAverage) -> int:
    """Resume the run in config.out, or begin it; returns the number of updates already made."""
    config.out.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps({**asdict(config), "out": "."}, default=str))
    state = loop.load_state(config.out)
    if state is None:
        text = json.dumps({"config": described, **loop.provenance()}, indent=2)
        files.write_atomically(config.out / "config.json", lambda part: part.write_text(text + "\n"))
        loop.forget_metrics_after(config.out, 0)
        return 0
    before = json.loads((config.out / "config.json").read_text())["config"]
    may_differ = {"device", "threads", "workers", "eval_every", "save_every", "log_every"}
    changed = sorted(key for key in described if key not in may_differ and before.get(key) != described[key])
    if changed:
        raise UsageError(f"{config.out}: holds a run with another {', '.join(changed)}; give a new --out or remove it")
    trainee.load_state_dict(state["trainee"])
    optimizer.load_state_dict(state["optimizer"])
    for value, saved in zip(average.values, state["average"].values(), strict=True):
        value.copy_(saved)
    loop.forget_metrics_after(config.out, state["step"])
    return int(state["step"])


def _save(
    config: Config,
    step: int,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    average: loop.MovingAverage,
    origin: Path,
    units: Sequence[str],
) -> None:
    folder = config.out / "model"
    average.swap(trainee)
    model.save(trainee.network, folder, dtype=torch.float32)
    head = {name: value.detach().cpu().contiguous() for name, value in trainee.ctc.state_dict().items()}
    files.write_atomically(folder / CTC_HEAD, lambda part: save_file(head, part, {"units": json.dumps(list(units))}))
    average.swap(trainee)
    for name in TOKENIZER_FILES:
        if (origin / name).exists():
            shutil.copyfile(origin / name, folder / name)
    state: dict[str, Any] = {
        "step": step,
        "trainee": trainee.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state(),
    }
    loop.save_state(config.out, state)


@torch.inference_mode()
def _evaluate(
    trainee: Trainee, rules: TextRules, collator: Collator, manifest: str, *, write: bool
) -> dict[str, float]:
    """Unit error rate of the CTC head and, once the decoder is trained, WER of the recognizer."""
    trainee.eval()
    engine = PyTorchEngine(trainee.network, rules)
    utterances = sorted(_manifest(manifest), key=lambda u: u.duration_s)
    pairs: list[tuple[str, str]] = []
    unit_pairs: list[tuple[str, str]] = []
    names = {number: unit for unit, number in collator.unit_ids.items()}
    for begin in range(0, len(utterances), 16):
        group = utterances[begin : begin + 16]
        waveforms = [utterance.waveform() for utterance in group]
        mel, num_frames = pad_mels(waveforms, trainee.network)
        frames = trainee.network.encoder(mel, num_frames)
        paths = losses.ctc_greedy(trainee.ctc_logits(frames), model.num_encoder_frames(num_frames))
        for utterance, path in zip(group, paths, strict=True):
            unit_pairs.append((" ".join(ctc_units(utterance)), " ".join(names[number] for number in path)))
        if write:
            for utterance, generation in zip(group, engine.generate(waveforms, DecodeOptions()), strict=True):
                pairs.append((utterance.text, rules.to_text(list(generation.ids))))
    trainee.train()
    scores = {"eval_units": round(metrics.corpus_word_errors(unit_pairs).rate, 4)}
    if write:
        scores["eval_wer"] = round(metrics.corpus_word_errors(pairs).rate, 4)
    return scores
