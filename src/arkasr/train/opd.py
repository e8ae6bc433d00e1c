"""On-policy distillation: the student says what it hears, and a teacher tells it what it would have said instead.

cold start: cross-entropy on teacher data (`ark-asr train teacher-data`), for the first updates
then:       divergence from the teacher at what the student says itself (distil.py)
"""

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from arkasr import checkpoint, model
from arkasr.checkpoint import Checkpoint
from arkasr.data import Utterance
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.train import batches, loop, teachers
from arkasr.train.batches import Augmentation, Batch, Collator, Key
from arkasr.train.distil import REPORTED, Distillation, Listener, Student, Sums
from arkasr.train.loop import Run
from arkasr.train.ranks import Ranks
from arkasr.train.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Config(loop.Settings):
    """One run.

    Attributes:
        teacher: a checkpoint's name or folder, a Qwen3-ASR folder, or http://HOST/v1#MODEL.
        teacher_tokenizer: folder or file of the tokenizer of an endpoint's model.
        teacher_dtype: in which a local teacher computes.
        cold_start: manifest of teacher data, as PATH or PATH:SPLIT, for the first `cold_start_steps` updates.
        cold_start_steps: how many of the steps.
        max_lost: largest share of positions without a teacher's value in an update before the run stops.
    """

    teacher: str
    teacher_tokenizer: Path | None = None
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cold_start: tuple[str, ...] = ()
    cold_start_steps: int = 0
    max_lost: float = 0.5
    distillation: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.cold_start) != (self.cold_start_steps > 0):
            raise UsageError("cold_start and cold_start_steps go together; give both or none")


def main(config: Config) -> None:
    """Run, or resume, until `config.steps`.

    Raises:
        UsageError: a manifest is bad, options contradict each other or the teacher, or the folder holds another run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    with Ranks.started(config.device) as ranks:
        source = checkpoint.open_checkpoint(config.model)
        teacher = teachers.load_teacher(
            config.teacher, source.rules, device=str(ranks.device), dtype=config.teacher_dtype,
            tokenizer=config.teacher_tokenizer,
        )  # fmt: skip
        how = config.distillation
        teachers.check(
            teacher.capabilities, support=how.support, top_k=how.top_k, temperature=how.softness, tail=how.tail
        )  # fmt: skip
        plain = model.load(source).to(ranks.device)  # for evaluation and the product
        student = Student(copy.deepcopy(plain).requires_grad_(True), source.rules, how)
        student.network.encoder.positions.requires_grad_(not source.config.use_rope)
        run = Run(config, student, ranks)
        examiner = Examiner(config, source, plain, teacher, ranks) if config.eval else None
        if examiner and run.step == 0:
            examiner.examine(run)
        _train(run, config, student, source, teacher, examiner)
        run.averaged_into(plain, part="network.")
        if ranks.first:
            loop.publish(plain, source.folder, config.out / "model")


def _train(
    run: Run, config: Config, student: Student, source: Checkpoint, teacher: Teacher, examiner: "Examiner | None"
) -> None:
    utterances = batches.read(config.train, min_s=config.min_duration_s, max_s=config.max_duration_s, wordless=True)
    policy = model.load(source, dtype=torch.bfloat16 if config.bf16 else torch.float32).to(run.ranks.device)
    listener = Listener(PyTorchEngine(policy, source.rules), teacher, utterances, config.distillation, seed=config.seed)
    pieces = _pieces(run, config, source, utterances)
    while run.step < config.steps:
        cold = run.step < config.cold_start_steps
        if not cold:
            run.live_into(policy, part="network.")
        listener.step = run.step
        lost = _update(run, student, [next(pieces).to(run.ranks.device) for _ in range(config.accumulate)],
                       None if cold else listener)  # fmt: skip
        if lost > config.max_lost:
            raise UsageError(
                f"update {run.step}: the teacher has no value for {lost:.0%} of the positions; look at its vocabulary "
                "and language, or raise max_lost"
            )
        if examiner and (run.due(config.eval_every) or run.step == config.cold_start_steps):
            examiner.examine(run)
        if run.due(config.save_every):
            run.save()


def _update(run: Run, student: Student, pieces: Sequence[Batch], listener: Listener | None) -> float:
    """One update on this rank's pieces of it, of what the student says, or without a listener of what is written.

    Returns the share of positions for which the teacher had no value.
    """
    sums = Sums()
    started = time.perf_counter()
    for piece in pieces:
        with run.autocast():
            heard = student(piece, listener)
        run.backward(heard.loss)
        sums.add(heard.sums)
        sums["weight"] += heard.weight
        sums["utterances"] += len(piece.keys)
    if listener is None:
        run.measure(ce=(sums["ce"], sums["weight"]))
    else:
        sums["student_s"] = time.perf_counter() - started - sum(listener.seconds.values())
        sums.add({f"{phase}_s": seconds for phase, seconds in listener.seconds.items()})
        listener.seconds.clear()
        run.measure(**{name: (sums[name], sums[under]) for under, names in REPORTED.items() for name in names})
    weight, lost = run.ranks.sums([sums["weight"], sums["lost"]])
    run.update(weight)
    return lost / max(weight + lost, 1)


def _pieces(run: Run, config: Config, source: Checkpoint, utterances: Sequence[Utterance]) -> Iterator[Batch]:
    """Endless pieces of updates: of the cold start first."""
    collator = Collator.of(source, [])
    cold = config.cold_start_steps
    stages = [(utterances, max(run.step - cold, 0), 0)]
    if run.step < cold:
        labelled = batches.read(config.cold_start, min_s=config.min_duration_s, max_s=config.max_duration_s)
        stages.insert(0, (labelled, run.step, (cold - run.step) * config.accumulate))
    for data, start, count in stages:
        stream = batches.stream(
            data, collator, config.augmentation, batch_s=config.batch_s, seed=config.seed, start=start,
            workers=config.workers, pieces=config.pieces(run.ranks),
        )  # fmt: skip
        yield from islice(stream, count or None)


class Examiner:
    """Measures the moving average on the evaluation set: WER, and how far the teacher is from what it says greedily."""

    def __init__(self, config: Config, source: Checkpoint, plain: ArkASR, teacher: Teacher, ranks: Ranks) -> None:
        """`plain` takes the weights that are examined."""
        assert config.eval is not None
        self._source, self._plain, self._ranks = source, plain, ranks
        self._utterances = list(batches.manifest(config.eval))
        self._student = Student(plain, source.rules, config.distillation)
        self._engine, self._teacher = PyTorchEngine(plain, source.rules), teacher

    @torch.no_grad()
    def examine(self, run: Run) -> None:
        """Log WER, divergence, VUSS and overlap; every rank must call it."""
        run.averaged_into(self._plain, part="network.")
        scores = loop.evaluate(self._plain, self._source.rules, self._utterances, self._ranks)
        sums = Sums()
        for group in loop.shares(self._utterances, self._ranks):
            listener = Listener(self._engine, self._teacher, group, self._student.how, seed=None)
            heard = self._student(self._batch(group).to(self._ranks.device), listener)
            sums.add(heard.sums)
            sums["weight"] += heard.weight
        names = ("kl", "vuss", "overlap", "jaccard", "teacher_mass", "student_mass", "student_entropy")
        weight, *values = self._ranks.sums([sums["weight"], *(sums[name] for name in names)])
        scores |= {f"eval_{name}": value / max(weight, 1) for name, value in zip(names, values, strict=True)}
        run.log(scores)
        if self._ranks.first:
            print(f"step {run.step}: {scores}", file=sys.stderr, flush=True)

    def _batch(self, group: Sequence[Utterance]) -> Batch:
        collator = Collator.of(self._source, [])
        examples = [collator.example(utterance, Augmentation(), np.random.default_rng(0)) for utterance in group]
        keys = tuple(Key(0, index, live=True) for index in range(len(group)))
        return replace(collator.collate(examples), keys=keys, waveforms=tuple(e.waveform for e in examples))
