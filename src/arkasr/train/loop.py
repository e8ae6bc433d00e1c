"""What every training program shares: its settings, and the run that turns losses into weights and survives a kill.

    run = Run(config, trainee, ranks)            # spread, resumed
    while run.step < config.steps:
        run.backward(loss); ...                  # sums over this rank's pieces of the update
        run.measure(loss=(sum, count))
        run.update(total)                        # gradients / total, clipped; weights, average, metrics
        if run.due(config.save_every): run.save()

Everything but the time of a line follows from the configuration and the number of updates made, so that a resumed run
continues bit by bit.
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import arkasr
from arkasr import files, metrics, model, record
from arkasr.checkpoint import open_checkpoint
from arkasr.config import MAX_CLIP_S
from arkasr.data import Utterance
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.text import TextRules
from arkasr.train import states
from arkasr.train.batches import Augmentation, Pieces
from arkasr.train.ranks import Ranks, layers, local

COPIED = (*files.TOKENIZER_FILES, "tokenizer_config.json", files.GENERATION_CONFIG)  # training changes none of them
EVAL_CLIPS = 16  # heard together


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every program shares.

    Attributes:
        model: built-in name or folder to start from.
        train: manifests, each as PATH or PATH:SPLIT; one named twice counts twice.
        out: folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end model/.
        eval: manifest whose WER is measured every `eval_every` updates.
        steps: updates in all.
        batch_s: seconds of audio an update, with padding, over all processes and micro-batches.
        accumulate: micro-batches into which each process divides its part of an update.
        lr, warmup_steps: peak learning rate, reached linearly; then a cosine down to a twentieth of it.
        weight_decay: of AdamW, on matrices only.
        clip: largest global norm of the gradient.
        average: decay of the moving average of the weights, which is what is evaluated and saved.
        max_duration_s, min_duration_s: utterances outside are left out (and counted).
        bf16: forward and backward in bfloat16 where autocast sees fit; weights stay float32.
        recompute: compute each layer again in the backward pass instead of keeping it: slower, less memory.
        device: where to train, cpu or cuda.
        threads: of PyTorch, 0 for its own choice.
        workers: processes that prepare batches.
        seed: of everything.
        eval_every, save_every, log_every: updates between evaluations, checkpoints and lines of the metrics file.
        keep: newest checkpoints that are kept, besides the one with the lowest WER.
        max_skipped: updates in a row without a finite gradient after which the run gives up.
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
    average: float = 0.999
    max_duration_s: float = 30.0
    min_duration_s: float = 0.05
    bf16: bool = False
    recompute: bool = False
    device: str = "cpu"
    threads: int = 0
    workers: int = 1
    seed: int = 0
    eval_every: int = 1000
    save_every: int = 500
    log_every: int = 50
    keep: int = 3
    max_skipped: int = 20
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.max_duration_s > MAX_CLIP_S:
            raise UsageError(f"max_duration_s is {self.max_duration_s}; the encoder takes at most {MAX_CLIP_S} s")
        for name in ("steps", "accumulate", "eval_every", "save_every", "log_every", "keep", "max_skipped"):
            if vars(self)[name] < 1:
                raise UsageError(f"{name} is {vars(self)[name]}; give at least 1")

    def pieces(self, ranks: Ranks) -> Pieces:
        """What this rank makes of every update."""
        return Pieces(ranks.rank * self.accumulate, self.accumulate, ranks.size * self.accumulate)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `lr`, then cosine down to `lr * floor` at `steps`."""

    lr: float
    warmup_steps: int
    steps: int
    floor: float = 0.05

    def at(self, step: int) -> float:
        """Learning rate of update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(trained: Sequence[nn.Parameter], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over float32 master weights, its moments made at once; vectors (norms and biases) are not decayed."""
    assert all(p.dtype == torch.float32 for p in trained), "master weights must be float32"
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    for p in trained:
        moments = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


class Run:
    """A trainee on its way: optimizer, schedule, moving average, metrics and checkpoints.

    Attributes:
        step: updates made.
        skipped: how many of them changed nothing, because there was no finite gradient or nothing to train.
    """

    def __init__(self, config: Settings, trainee: nn.Module, ranks: Ranks) -> None:
        """Spread the trainee over the ranks, and begin config.out or continue what is there.

        Raises:
            UsageError: the folder holds a run of another configuration.
        """
        self.config, self.ranks = config, ranks
        trainee.to(ranks.device).train()
        if config.recompute:
            for layer in layers(trainee):
                layer.forward = partial(  # type: ignore[method-assign]
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
        ranks.shard(trainee, bf16=config.bf16)
        self.trained = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
        self.optimizer = adamw(list(self.trained.values()), weight_decay=config.weight_decay)
        self.schedule = Schedule(config.lr, config.warmup_steps, config.steps)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.step = self.skipped = 0
        self._skipped_in_a_row = 0
        self._not_finite = 0.0
        self._measured: dict[str, tuple[float, float]] = {}
        self._eval_wer: float | None = None
        self._lap = time.perf_counter()
        self._metrics: states.Metrics | None = None
        self._begin_or_resume()

    def autocast(self) -> torch.autocast:
        """For the forward pass of a loss."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.bf16)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a sum over this rank's micro-batch; every rank calls it as often."""
        self._not_finite += float(not math.isfinite(float(loss.detach())))
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, total: float) -> None:
        """Divide gradients by total, clip their norm and change the weights; count it if there is no finite gradient.

        Args:
            total: weights of all that was trained, of every rank.

        Raises:
            UsageError: `max_skipped` updates in a row were skipped.
        """
        # FSDP2 has divided the sum over ranks by their number.
        divisor = total / self.ranks.size
        gradients = [local(p.grad) for p in self.trained.values() if p.grad is not None]
        usable = total > 0 and math.isfinite(total)
        norm = 0.0
        if usable:
            torch._foreach_div_(gradients, divisor)
            own = float(nn.utils.get_total_norm(gradients))
            # A gradient that is not finite makes the sum so, on every rank.
            squares, not_finite = self.ranks.sums([own**2, self._not_finite])
            norm = math.sqrt(squares)
            usable = math.isfinite(norm) and not not_finite
        if usable:
            torch._foreach_mul_(gradients, float((self.config.clip / (torch.tensor(norm) + 1e-6)).clamp(max=1.0)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.at(self.step)
            self.optimizer.step()
            decay = min(self.config.average, (self.step + 1) / (self.step + 10))  # early noise is forgotten
            averages = [local(value) for value in self.average.values()]
            torch._foreach_lerp_(averages, [local(p.detach()) for p in self.trained.values()], 1 - decay)
        self.optimizer.zero_grad()
        self._not_finite = 0.0
        self._count(skipped=not usable)
        self.step += 1
        if self.due(self.config.log_every):
            self._log_measured(norm)

    def _count(self, *, skipped: bool) -> None:
        self.skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == self.config.max_skipped:
            raise UsageError(
                f"update {self.step + 1}: {self._skipped_in_a_row} in a row had no finite gradient, or nothing to "
                "train; lower lr, or look at the data"
            )

    def measure(self, **sums: tuple[float, float]) -> None:
        """Add to a line's quotients: numerator and denominator of this rank; every rank gives the same names."""
        for name, (numerator, denominator) in sums.items():
            before = self._measured.get(name, (0.0, 0.0))
            self._measured[name] = before[0] + numerator, before[1] + denominator

    def lap_s(self) -> float:
        """Seconds since it was last asked, of one of `size` ranks: what audio or tokens a second are counted by."""
        before, self._lap = self._lap, time.perf_counter()
        return (self._lap - before) / self.ranks.size

    def log(self, values: Mapping[str, float]) -> None:
        """Write a line of the present step now: metrics.jsonl and TensorBoard, on rank 0.

        The last `eval_wer` that is logged decides which checkpoint is the best.
        """
        self._eval_wer = values.get("eval_wer", self._eval_wer)
        if self._metrics is not None:
            self._metrics.write(self.step, values)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many updates, and after the last, happens now."""
        return self.step % every == 0 or self.step == self.config.steps

    def averaged_into(self, target: nn.Module, *, part: str = "") -> None:
        """Copy the moving average of what is trained into a plain module of the same names; every rank calls it.

        With `part`, such as "network.", only what begins with it, into a module that has the rest of the name.
        """
        self.ranks.copy_full(self.average, target, part=part)

    def live_into(self, target: nn.Module, *, part: str = "") -> None:
        """Copy the present weights likewise."""
        self.ranks.copy_full(self.trained, target, part=part)

    def save(self) -> None:
        """Write a checkpoint, and remove those that are neither new nor the best; every rank calls it."""
        sums = self._summed()
        facts = {
            "step": self.step, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row,
            "measured": sums, "eval_wer": self._eval_wer,
        }  # fmt: skip
        states.save(self.config.out, self.step, self._tensors(), facts, self.ranks)
        if self.ranks.first:
            states.retain(self.config.out, keep=self.config.keep)

    def _tensors(self) -> dict[str, Tensor]:
        """All that an update changes, by name."""
        tensors = {f"live/{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, p in self.trained.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    def _begin_or_resume(self) -> None:
        out = self.config.out
        described = json.loads(json.dumps({**asdict(self.config), "out": "."}, default=str))
        found = states.saved_steps(out)
        if found:
            states.check_same(out, described)
            newest = max(found)
            facts = states.load(found[newest], self._tensors(), self.ranks)
            self.step, self.skipped = facts["step"], facts["skipped"]
            self._skipped_in_a_row, self._eval_wer = facts["skipped_in_a_row"], facts["eval_wer"]
            if self.ranks.first:  # they are sums over the ranks
                self._measured = {name: (sums[0], sums[1]) for name, sums in facts["measured"].items()}
        if self.ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            states.remove_incomplete(out)
            if not found:
                text = json.dumps({"config": described, **provenance()}, indent=2) + "\n"
                files.write_text_atomically(out / "config.json", text)
            self._metrics = states.Metrics(out, self.step)
        self.ranks.wait()

    def _summed(self) -> dict[str, tuple[float, float]]:
        """What was measured since the last line, over all ranks."""
        names = sorted(self._measured)
        flat = self.ranks.sums([value for name in names for value in self._measured[name]])
        return {name: (flat[2 * n], flat[2 * n + 1]) for n, name in enumerate(names)}

    def _log_measured(self, norm: float) -> None:
        means = {name: over / under for name, (over, under) in self._summed().items() if under}
        self._measured = {}
        rate = self.schedule.at(self.step - 1)
        self.log({"lr": rate, "grad_norm": norm, "skipped": self.skipped, **means})


Look = Callable[[Sequence[Utterance], Tensor, Tensor], None]


@torch.inference_mode()
def evaluate(
    network: ArkASR, rules: TextRules, utterances: Sequence[Utterance], ranks: Ranks, *, look: Look | None = None
) -> dict[str, float]:
    """WER of a plain network: each rank hears its share, every rank must call it and gets the whole result.

    `look` gets each group of utterances with their encoder frames [B, S, E] and mel frame counts [B].
    """
    engine = PyTorchEngine(network, rules)
    errors = words = 0.0
    for group in shares(utterances, ranks):
        heard: list[Tensor] = []
        with network.encoder.register_forward_hook(lambda _, given, frames, h=heard: h.extend([frames, given[1]])):
            generations = engine.generate([utterance.waveform() for utterance in group], DecodeOptions())
        if look is not None:
            look(group, heard[0], heard[1])
        pairs = [(u.text, rules.to_text(list(g.ids))) for u, g in zip(group, generations, strict=True)]
        counts = metrics.corpus_word_errors(pairs)
        errors, words = errors + counts.errors, words + counts.reference_words
    errors, words = ranks.sums([errors, words])
    return {"eval_wer": errors / max(words, 1)}


def shares(utterances: Sequence[Utterance], ranks: Ranks) -> Iterator[Sequence[Utterance]]:
    """This rank's groups of clips of similar duration."""
    own = sorted(utterances, key=lambda u: u.duration_s)[ranks.rank :: ranks.size]
    return (own[begin : begin + EVAL_CLIPS] for begin in range(0, len(own), EVAL_CLIPS))


def publish(network: ArkASR, origin: Path, folder: Path) -> None:
    """Write a network in the published layout, in float32, with the tokenizer of the folder that it began from."""
    model.save(network, folder, dtype=torch.float32)
    for name in COPIED:
        if (origin / name).exists():
            shutil.copyfile(origin / name, folder / name)


def export(out: Path, folder: Path, *, step: int | None = None, live: bool = False) -> None:
    """Publish the moving average, or the live weights, of a run's newest checkpoint or of one update.

    Raises:
        UsageError: no such run or checkpoint, or the folder exists.
    """
    if not (out / "config.json").is_file():
        raise UsageError(f"{out}: not a run; give the --out of one")
    if folder.exists():
        raise UsageError(f"{folder}: exists; give a new folder")
    source = open_checkpoint(json.loads((out / "config.json").read_text())["config"]["model"])
    network = model.load(source)
    prefix = ("live" if live else "average") + "/network."
    saved = states.find(out, step)
    names = [name for name in states.names(saved) if name.startswith(prefix)]
    tensors = {name: network.get_parameter(name.removeprefix(prefix)).detach() for name in names}
    states.load(saved, tensors, Ranks(0, 1, torch.device("cpu")))
    publish(network, source.folder, folder)


def provenance() -> dict[str, str]:
    """Commit, versions and hardware, written beside every run."""
    return {
        "commit": record.git_commit() or "not in a git checkout",
        "arkasr": arkasr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": record.processor(),
        "cpus": str(os.cpu_count()),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
