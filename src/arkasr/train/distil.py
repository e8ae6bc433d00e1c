"""One step of on-policy distillation: what the student says, and how far the teacher is from it at every place.

    batch -> encode -> K rollouts -> student's scores -> support -> teacher's scores -> divergence

Unusual: the audio is encoded once, for the rollouts and for the gradient; rollouts that are equal are scored once and
count as often as they were said; where both have one tokenizer, nothing that is said goes through text.
"""

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from arkasr import audio
from arkasr.data import Utterance
from arkasr.engines import DecodeOptions, Generation
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.text import TextRules
from arkasr.train import losses
from arkasr.train.batches import Batch
from arkasr.train.losses import IGNORE, Divergence, Support, TopK
from arkasr.train.packed import pack
from arkasr.train.teachers import Request, Scores, Teacher, spans

# What a line of the metrics says, by what it is divided by.
REASONS = {re.sub(r"\W+", "_", f"dropped {reason}"): reason for reason in spans.REASONS}
REPORTED = {
    "weight": (
        "kl", "vuss", "overlap", "jaccard", "teacher_mass", "student_mass", "student_entropy", "teacher_entropy",
    ),
    "positions": ("lost", *REASONS),
    "rollouts": ("tokens", "stopped", "empty", "fallback", "distinct"),
    "utterances": ("rollout_s", "teacher_s", "student_s"),
}  # fmt: skip
CHUNK = 2**26  # logits that are in memory at once; more positions are done in turn, and again in the backward pass


@dataclass(frozen=True)
class Distillation:
    """How a student is compared with its teacher.

    Attributes:
        rollouts: what the student says of each utterance and update, K.
        temperature, top_p: how rollouts are sampled.
        greedy: the first of the K is not sampled but greedy.
        empty: what becomes of a rollout without words: "reference" puts the record's text in its place, where it has
            one; "stop" lets the teacher judge its first place.
        divergence: forward (teacher first, the paper's), reverse or jsd.
        beta: the teacher's share of the mixture of jsd.
        support: ids on which both are compared: union of both top-k, teacher, student, or full.
        top_k: ids of each.
        softness: temperature of both distributions in the loss, which is multiplied by its square.
        tail: compare what lies outside the support too, as one more id.
    """

    rollouts: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    greedy: bool = True
    empty: Literal["reference", "stop"] = "reference"
    divergence: Divergence = "forward"
    beta: float = 0.5
    support: Support = "union"
    top_k: int = 32
    softness: float = 1.0
    tail: bool = False

    def __post_init__(self) -> None:
        if self.rollouts < 1:
            raise UsageError(f"rollouts is {self.rollouts}; give at least 1")
        if self.rollouts > 1 and self.temperature == 0:
            raise UsageError(f"rollouts is {self.rollouts} at temperature 0, all of them equal; give a temperature")

    def options(self, *, seed: int, step: int, utterance: int) -> list[DecodeOptions]:
        """How the K rollouts of an utterance in an update are decoded; each has its own random numbers."""
        options = []
        for k in range(self.rollouts):
            own = int(np.random.SeedSequence((seed, step, utterance, k)).generate_state(1)[0])
            options.append(DecodeOptions(temperature=self.temperature, top_p=self.top_p, seed=own))
        return [DecodeOptions(), *options[1:]] if self.greedy else options


class Sums(dict[str, float]):
    """Named numbers to be added up; 0 where none is yet."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, others: Mapping[str, float]) -> None:
        """Add what others have, name by name."""
        for name, value in others.items():
            self[name] += value


class Said(NamedTuple):
    """The rollouts of a batch.

    texts: of each clip its distinct rollouts, with the stop id where the student stopped.
    weights: how often each was said.
    sums: what to report of them.
    """

    texts: list[list[tuple[int, ...]]]
    weights: list[list[int]]
    sums: dict[str, float]


class Heard(NamedTuple):
    """What came of a batch: the sum to be minimised, the summed weights of its positions, and sums to report."""

    loss: Tensor
    weight: float
    sums: dict[str, float]


class Listener:
    """Who is asked in an update: a policy for the rollouts, and the teacher for its word on them."""

    def __init__(
        self,
        policy: PyTorchEngine,
        teacher: Teacher,
        utterances: Sequence[Utterance],
        how: Distillation,
        *,
        seed: int | None,
    ) -> None:
        """`policy` runs a copy of the student; batches name `utterances`; without a seed rollouts are greedy."""
        self._policy, self._teacher, self._utterances, self._how = policy, teacher, utterances, how
        self._seed = seed
        self.step = 0
        self.seconds = Sums()

    def roll(self, batch: Batch, embeddings: Tensor) -> Said:
        """What the student says of each clip, of embeddings [B, A, H] of their audio."""
        if not batch.keys:  # a stand-in, of which nothing may be trained
            return Said([[] for _ in batch.waveforms], [[] for _ in batch.waveforms], {})
        started = time.perf_counter()
        options = [
            [DecodeOptions()]
            if self._seed is None
            else self._how.options(seed=self._seed, step=self.step, utterance=key.utterance)
            for key in batch.keys
        ]
        like = self._policy.network.decoder.embed.weight
        num_samples = [len(waveform) for waveform in batch.waveforms]
        said = self._said(batch, self._policy.continuations(embeddings.to(like.dtype), num_samples, options))
        self.seconds["rollout"] += time.perf_counter() - started
        return said

    def _said(self, batch: Batch, generations: Sequence[Sequence[Generation]]) -> Said:
        rules, sums = self._policy.rules, dict.fromkeys(("rollouts", "tokens", "stopped", "empty", "fallback"), 0.0)
        texts: list[list[tuple[int, ...]]] = []
        weights: list[list[int]] = []
        for key, those in zip(batch.keys, generations, strict=True):
            reference = self._utterances[key.utterance].text
            counted: Counter[tuple[int, ...]] = Counter()
            for said in those:
                stopped, empty = said.stop_logprob is not None, not rules.to_text(list(said.ids))
                fallback = empty and self._how.empty == "reference" and reference != ""
                ids = (*said.ids, *rules.stop_ids[:1]) if stopped else said.ids
                counted[tuple(rules.target_ids(reference)) if fallback else ids] += 1
                for name, value in zip(sums, (1, len(said.ids), stopped, empty, fallback), strict=True):
                    sums[name] += value
            texts.append(list(counted))
            weights.append(list(counted.values()))
        return Said(texts, weights, sums | {"distinct": float(sum(map(len, texts)))})

    def score(self, batch: Batch, said: Said, top: Tensor) -> Scores:
        """The teacher's word on what was said, of the student's likeliest ids [N, k] as well where they are wanted."""
        started = time.perf_counter()
        support = self._how.support
        scores = self._teacher.score(
            Request(
                waveforms=batch.waveforms,
                languages=[self._utterances[key.utterance].language for key in batch.keys],
                rollouts=said.texts,
                support=top if support in ("union", "student") else None,
                top_k=self._policy.rules.vocab_size if support == "full" else self._how.top_k,
                temperature=self._how.softness,
            )
        )
        self.seconds["teacher"] += time.perf_counter() - started
        return replace(scores, top=scores.top.to(top.device), aligned=scores.aligned.to(top.device))


class Student(nn.Module):
    """The model under training, and what is asked of it."""

    def __init__(self, network: ArkASR, rules: TextRules, how: Distillation) -> None:
        super().__init__()
        self.network = network
        self.rules, self.how = rules, how
        self.allowed: Tensor
        self.register_buffer("allowed", torch.tensor(rules.allowed_ids), persistent=False)

    def forward(self, batch: Batch, listener: Listener | None) -> Heard:
        """The divergence from a teacher at what the student says itself; without a listener the cross-entropy."""
        if listener is None:
            loss = batch.cross_entropy_sum(self.network, self.network.encode(batch.mel, batch.num_frames))
            return Heard(loss, float((batch.labels != IGNORE).sum()), {"ce": float(loss.detach())})
        embeddings = self.network.encode(batch.mel, batch.num_frames)
        said = listener.roll(batch, embeddings.detach())
        merge = self.network.config.merge_factor
        prompts = [self.rules.prompt_ids(audio.num_audio_tokens(len(each), merge)) for each in batch.waveforms]
        packed = pack(prompts, said.texts, padding=self.rules.stop_ids[0], device=batch.mel.device)
        hidden = packed.hidden(self.network, embeddings)
        if not len(packed.targets):
            return Heard(hidden.sum(), 0.0, said.sums)
        parts = torch.split(hidden, max(1, CHUNK // self.rules.vocab_size))
        with torch.no_grad():
            top = torch.cat([losses.top_k_ids(self._log_probs(part), self.how.top_k) for part in parts])
        return self._compared(parts, top, listener.score(batch, said, top), said)

    def _compared(self, parts: Sequence[Tensor], top: Tensor, scores: Scores, said: Said) -> Heard:
        """The summed divergence of states [n, H] in parts, whose likeliest ids are top [N, k], from the teacher."""
        weights = torch.tensor(
            [float(weight) for texts, those in zip(said.texts, said.weights, strict=True)
             for text, weight in zip(texts, those, strict=True) for _ in text],
            device=top.device,
        )  # fmt: skip
        teacher = scores.top.among(top) if self.how.support == "student" else scores.top
        mask = scores.aligned & losses.is_usable(teacher, self.how.tail)
        own = scores.top.first(scores.num_own)
        loss = top.new_zeros((), dtype=torch.float32)
        sums, begin = Sums(said.sums), 0
        for part in parts:
            piece = slice(begin, begin + len(part))
            begin += len(part)
            arguments = part, teacher.rows(piece), own.rows(piece), top[piece], weights[piece], mask[piece]
            one, figures = (
                self._divergence(*arguments)
                if len(parts) == 1
                else recomputed(self._divergence, *arguments, use_reentrant=False)
            )
            loss = loss + one
            sums.add(figures)
        sums["lost"], sums["positions"] = float(weights[~mask].sum()), float(weights.sum())
        sums.update({name: float(scores.drops.get(reason, 0)) for name, reason in REASONS.items()})
        return Heard(loss, float(weights[mask].sum()), dict(sums))

    def _divergence(
        self, hidden: Tensor, teacher: TopK, own: TopK, top: Tensor, weights: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        how, logprobs = self.how, self._log_probs(hidden)
        values = losses.divergence(
            logprobs, teacher, kind=how.divergence, beta=how.beta, temperature=how.softness, tail=how.tail
        )
        figures = losses.diagnose(
            logprobs, teacher, own=own, student_ids=top, values=values, weights=weights, mask=mask
        )
        return losses.weighted_sum(values, weights, mask), {name: float(value) for name, value in figures.items()}

    def _log_probs(self, hidden: Tensor) -> Tensor:
        return losses.log_probs(self.network.decoder.logits(hidden), self.allowed, self.how.softness)
