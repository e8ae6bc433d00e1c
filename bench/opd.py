"""Utterances a second of on-policy distillation, by phase, in our way and in the reference's; writes bench/results.

    python bench/opd.py [SPEECH_FOLDER] [--teacher FOLDER] [--threads N]
    python bench/opd.py --full-size SCRATCH [--device cuda]

Both ways have the same models, batches, rollouts and loss, and take turns. Ours is `arkasr.train.distil`. The
reference's (../shared/spec/opd.md, sections 2 and 4) is written here: the audio is encoded again for every rollout, for
the student's scores and for each row of the teacher, every rollout is a row, transcripts are padded to WIDTH columns,
and the logits of all columns are made. Its rollouts are batched; the first figure is of one sequence at a time.

Where the reference is slow for no reason of method, it is spared: its Python loops over positions are tensor operations
here, its batches are our duration buckets, its prompts are padded on the right while it decodes, and it pays no copy of
the weights. It replays our rollouts, so that both score the same; it chooses its own tokens all the same.

SPEECH_FOLDER holds an4/ with its manifest.jsonl. --full-size takes a 0.6B student and a 3B teacher with random weights
and noise, in bfloat16 with float32 master weights; SCRATCH takes 10 GB for the time of the run.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from arkasr import audio, checkpoint, model
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.data import Utterance, read_manifest
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine, pad_mels
from arkasr.model import ArkASR, KVCache
from arkasr.train import batches, loop
from arkasr.train.batches import Augmentation, Batch, Collator, Key
from arkasr.train.distil import Distillation, Heard, Listener, Said, Student, Sums
from arkasr.train.teachers import Scores
from arkasr.train.teachers.ark import ArkTeacher

ROOT = Path(__file__).parents[1]
WIDTH = 64  # columns of a transcript, and most tokens of a rollout: the reference launcher's
BATCH_S, FULL_SIZE_BATCH_S = 48.0, 120.0  # seconds of audio of an update
TOKENS_PER_S = 3.5  # a random model does not stop: its texts are made as long as English ones
TOLERANCE = 1e-3
SHAKEN = 0.1  # `tiny` as its own teacher would leave no loss to compare: noise in its weights, as a part of them

Way = Literal["ours", "one at a time", "batched"]
WAYS: tuple[Way, ...] = ("ours", "one at a time", "batched")
PHASES = ("rollout", "teacher", "student", "update")  # the update is all of it, with the optimizer's step
SHARED = (*PHASES[:-1], "optimizer")
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Limited(Distillation):
    """How to distil, with each utterance's texts cut at `caps[utterance]` tokens."""

    caps: Ids = ()
    guard: bool = True

    def options(self, *, seed: int, step: int, utterance: int) -> list[DecodeOptions]:
        """As `Distillation.options`."""
        drawn = super().options(seed=seed, step=step, utterance=utterance)
        return [replace(each, max_new_tokens=self.caps[utterance], guard=self.guard) for each in drawn]


@dataclass(frozen=True)
class Models:
    """What both ways train, ask and roll out."""

    student: Student
    policy: PyTorchEngine
    teacher: ArkTeacher
    optimizer: torch.optim.Optimizer
    bf16: bool

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.policy.network.decoder.embed.weight.device

    def finish(self, weight: float) -> None:
        """What an update does with the gradients of a sum."""
        trained = [p for p in self.student.parameters() if p.grad is not None]
        torch._foreach_div_([p.grad for p in trained if p.grad is not None], weight)
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def autocast(self) -> torch.autocast:
        """Of the student's pass with gradient."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


class Work(NamedTuple):
    """A batch and what the student says of it: of each clip K texts, the first of them greedy."""

    batch: Batch
    utterances: Sequence[Utterance]
    texts: list[list[Ids]]


class Passed(NamedTuple):
    """A forward and backward pass: its summed loss, positions, and greedy tokens (equal to ours, all)."""

    loss: float
    weight: float
    greedy: tuple[int, int]


class Clock:
    """Wall seconds by phase, each ended after the device has done its work."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, Sums()
        self._last = self.now()

    def now(self) -> float:
        """Seconds after all that was asked of the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        """Give the seconds since the last lap to a phase, and to the update."""
        before, self._last = self._last, self.now()
        for name in (phase, "update"):
            self.seconds[name] += self._last - before


# ---- our way ----


class TimedListener(Listener):
    """A `Listener` whose phases begin when the device has done what was asked before; it keeps what was said."""

    clock: Clock
    said: Said

    def roll(self, batch: Batch, embeddings: Tensor) -> Said:
        """As `Listener.roll`."""
        self.clock.now()
        self.said = super().roll(batch, embeddings)
        return self.said

    def score(self, batch: Batch, said: Said, top: Tensor) -> Scores:
        """As `Listener.score`."""
        self.clock.now()
        return super().score(batch, said, top)


def ours(models: Models, batch: Batch, utterances: Sequence[Utterance], clock: Clock) -> tuple[Heard, Said]:
    """`distil`, as `ark-asr train opd` does it; encoding is the student's, and so is the copy of the weights."""
    with torch.no_grad():
        for target, value in zip(models.policy.network.parameters(), models.student.network.parameters(), strict=True):
            target.copy_(value)
    listener = TimedListener(models.policy, models.teacher, utterances, models.student.how, seed=0)
    listener.clock = clock
    with models.autocast():
        heard = models.student(batch, listener)
    torch.autograd.backward(heard.loss)
    clock.lap("student")
    for phase, seconds in listener.seconds.items():
        clock.seconds[phase] += seconds
        clock.seconds["student"] -= seconds
    return heard, listener.said


def worked(models: Models, batch: Batch, utterances: Sequence[Utterance]) -> Work:
    """A batch with the rollouts that our way makes of it."""
    _, said = ours(models, batch, utterances, Clock(models.device))
    models.optimizer.zero_grad()
    texts = [
        [text for text, weight in zip(those, weights, strict=True) for _ in range(int(weight))]
        for those, weights in zip(said.texts, said.weights, strict=True)
    ]
    return Work(batch, utterances, texts)


# ---- the reference's ----


def reference(models: Models, work: Work, clock: Clock, *, batched: bool) -> Passed:
    """The specification's step with one consistent score of the teacher (its section 2.8: the intended objective)."""
    rules, network = models.policy.rules, models.student.network
    merge = network.config.merge_factor
    clips = [clip for clip, texts in enumerate(work.texts) for _ in texts]
    texts = [text for those in work.texts for text in those]
    how = models.student.how
    options = [each for key in work.batch.keys for each in how.options(seed=0, step=0, utterance=key.utterance)]
    prompts = [rules.prompt_ids(audio.num_audio_tokens(len(work.batch.waveforms[clip]), merge)) for clip in clips]
    mel, num_frames = work.batch.mel[clips], work.batch.num_frames[clips]
    k, allowed = how.top_k, models.student.allowed
    with torch.no_grad():
        groups = [slice(None)] if batched else [slice(row, row + 1) for row in range(len(clips))]
        said = []
        for rows in groups:
            width = int(num_frames[rows].max())
            encoded = models.policy.network, mel[rows, :, :width], num_frames[rows]
            said.append(say(*encoded, prompts[rows], texts[rows], options[rows], allowed, k))
        own = torch.cat([top for top, *_ in said])
        clock.lap("rollout")
        waveforms = [work.batch.waveforms[clip] for clip in clips]
        ids, valid, scores = asked(models.teacher.network, waveforms, prompts, texts, allowed, own)
        clock.lap("teacher")
    with models.autocast():
        logits = transcript_logits(network, network.encode(mel, num_frames), prompts, texts, WIDTH)
        values = divergence(scores, logits.gather(-1, ids), valid)
    loss = values.sum()
    torch.autograd.backward(loss)
    clock.lap("student")
    return Passed(float(loss.detach()), float(len(ids)), (sum(n for _, n, _ in said), sum(n for *_, n in said)))


def say(
    network: ArkASR, mel: Tensor, num_frames: Tensor, prompts: Sequence[list[int]], texts: Sequence[Ids],
    options: Sequence[DecodeOptions], allowed: Tensor, k: int,
) -> tuple[Tensor, int, int]:  # fmt: skip
    """Decode rows with a KV cache, each to the end of its text, with the batch until the longest is done.

    Returns the ids of the k largest logits before each token [N, k], and of the greedy tokens how many were those of
    the texts, and how many there were.
    """
    device, lengths = mel.device, torch.tensor([len(prompt) for prompt in prompts], device=mel.device)
    widest, filler = int(lengths.max()), prompts[0][0]
    ids = torch.tensor([[*prompt, *[filler] * (widest - len(prompt))] for prompt in prompts], device=device)
    like = network.decoder.embed.weight
    x = network.embed(ids, network.encode(mel.to(like.dtype), num_frames))
    cache = KVCache(network.config, len(ids), widest + WIDTH, x)
    hidden = network.decoder(x, torch.arange(widest, device=device).expand_as(ids), cache)
    logits = network.decoder.logits(hidden[torch.arange(len(ids), device=device), lengths - 1])
    tops: list[Tensor] = []
    equal = greedy = 0
    for step in range(max(map(len, texts))):
        if step:
            fed = torch.tensor([text[step - 1] if step <= len(text) else filler for text in texts], device=device)
            hidden = network.decoder(network.decoder.embed(fed[:, None]), (lengths + step - 1)[:, None], cache)
            logits = network.decoder.logits(hidden[:, 0])
        logits = logits.masked_fill(~allowed, -torch.inf)
        tops.append(logits.topk(k).indices)
        for token, text, how in zip(chosen(logits, options), texts, options, strict=True):
            counted = how.temperature == 0 and step < len(text)
            greedy += counted
            equal += counted and token == text[step]
    stacked = torch.stack(tops, dim=1)  # [R, steps, k]
    return torch.cat([row[: len(text)] for row, text in zip(stacked, texts, strict=True)]), equal, greedy


def chosen(logits: Tensor, options: Sequence[DecodeOptions]) -> list[int]:
    """The next token of every row of logits [R, V]: the largest, or drawn from the nucleus."""
    best = logits.argmax(-1)
    sampled = torch.tensor([each.temperature > 0 for each in options], device=logits.device)
    if bool(sampled.any()):
        temperatures = torch.tensor([each.temperature or 1.0 for each in options], device=logits.device)
        top_p = torch.tensor([each.top_p for each in options], device=logits.device)
        falling, order = (logits.float() / temperatures[:, None]).softmax(-1).sort(-1, descending=True)
        kept = falling.where(falling.cumsum(-1) - falling < top_p[:, None], 0)
        best = torch.where(sampled, order.gather(-1, torch.multinomial(kept, 1))[:, 0], best)
    tokens: list[int] = best.tolist()
    return tokens


def asked(
    teacher: ArkASR, waveforms: Sequence[Waveform], prompts: Sequence[list[int]], texts: Sequence[Ids],
    allowed: Tensor, own: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The union of the teacher's top-k and the student's own [N, k]: ids, whether each counts, the teacher's logits."""
    embeddings = teacher.encode(*pad_mels(waveforms, teacher))
    logits = transcript_logits(teacher, embeddings, prompts, texts, max(map(len, texts)))
    logits = logits.masked_fill(~allowed, -torch.inf)
    top = logits.topk(own.shape[-1]).indices
    new = ~(own[:, :, None] == top[:, None, :]).any(-1)
    ids = torch.cat([top, own], -1)
    return ids, torch.cat([torch.ones_like(new), new], -1), logits.gather(-1, ids)


def transcript_logits(
    network: ArkASR, embeddings: Tensor, prompts: Sequence[list[int]], texts: Sequence[Ids], width: int
) -> Tensor:
    """Logits [N, V] before each token of the texts, of those [R, P + width, V] of all columns.

    Prompts are padded on the left to the widest, P, and texts on the right to `width`; each row is a rollout.
    """
    widest, device = max(map(len, prompts)), embeddings.device
    ids = torch.full((len(prompts), widest + width), prompts[0][0])
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        begin, end = widest - len(prompt), widest + len(text)
        ids[row, begin:end] = torch.tensor([*prompt, *text])
        real[row, begin:end] = True
    ids, real = ids.to(device), real.to(device)
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    itself = torch.eye(ids.shape[1], dtype=torch.bool, device=device)  # padding that saw nothing would be NaN
    mask = (earlier & real[:, None, :]) | itself
    hidden = network.decoder(network.embed(ids, embeddings), (real.cumsum(1) - 1).clamp(min=0), mask=mask[:, None])
    return network.decoder.logits(hidden)[:, widest - 1 : -1][real[:, widest:]]


def divergence(teacher: Tensor, student: Tensor, valid: Tensor) -> Tensor:
    """Forward KL [N] of logits [N, S], renormalised on the valid ids (specification, 2.8, at temperature 1)."""
    p, q = (logits.float().masked_fill(~valid, -1e9).log_softmax(-1) for logits in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


# ---- measuring ----


def one_pass(way: Way, models: Models, work: Work, clock: Clock) -> Passed:
    """One way's forward and backward pass over a batch."""
    if way != "ours":
        return reference(models, work, clock, batched=way == "batched")
    heard, _ = ours(models, work.batch, work.utterances, clock)
    return Passed(float(heard.loss.detach()), heard.weight, (0, 0))


def check(models: Models, works: Sequence[Work]) -> dict[str, float]:
    """Largest relative differences of the reference's loss and gradient from ours, on the same rollouts.

    Raises:
        SystemExit: more than TOLERANCE, or another greedy token.
    """
    differences = {"loss": 0.0, "gradient": 0.0}
    for work in works:
        passed, gradients = {}, {}
        for way in WAYS:
            passed[way] = one_pass(way, models, work, Clock(models.device))
            found = [p.grad.flatten() for p in models.student.parameters() if p.grad is not None]
            gradients[way] = torch.cat(found)
            models.optimizer.zero_grad()
        loss, weight, _ = passed["ours"]
        for way in WAYS[1:]:
            other = passed[way]
            apart = {
                "loss": abs(other.loss - loss) / abs(loss),
                "gradient": float((gradients[way] - gradients["ours"]).norm() / gradients["ours"].norm()),
            }
            differences = {name: max(differences[name], value) for name, value in apart.items()}
            fine = other.weight == weight and other.greedy[0] == other.greedy[1]
            if not (fine and max(apart.values()) <= TOLERANCE):  # also where one is NaN
                raise SystemExit(f"not the same: {way} {other}, ours {passed['ours']}; relative differences {apart}")
    return differences


def measure(models: Models, works: Sequence[Work], runs: int) -> dict[str, Any]:
    """Medians of utterances a second over runs in which the ways take turns, batch by batch."""
    seconds: dict[Way, list[Sums]] = {way: [] for way in WAYS}
    for run in range(-1, runs):  # the first warms up
        spent = {way: Sums() for way in WAYS}
        for number, work in enumerate(works):
            for turn in range(len(WAYS)):
                way = WAYS[(turn + number + run) % len(WAYS)]
                clock = Clock(models.device)
                models.finish(one_pass(way, models, work, clock).weight)
                clock.lap("optimizer")
                spent[way].add(clock.seconds)
        for way in WAYS if run >= 0 else ():
            seconds[way].append(spent[way])
    utterances = sum(len(work.texts) for work in works)
    rows: dict[Way, dict[str, Any]] = {}
    for way, those in seconds.items():
        median = {phase: statistics.median(run[phase] for run in those) for phase in those[0]}
        rows[way] = {
            "utterances_per_s": {phase: round(utterances / median[phase], 3) for phase in PHASES},
            "share_percent": {phase: round(100 * median[phase] / median["update"], 1) for phase in SHARED},
            "runs_s": [{phase: round(s, 4) for phase, s in run.items()} for run in those],
        }
    times: dict[Way, dict[str, float]] = {}
    for way in WAYS[1:]:
        pairs = list(zip(seconds["ours"], seconds[way], strict=True))
        times[way] = {phase: round(statistics.median(b[phase] / a[phase] for a, b in pairs), 2) for phase in PHASES}
    return {"ways": rows, "times_as_long": times}


def prepared(student: Checkpoint, teacher: Checkpoint, how: Distillation, *, device: str, shaken: bool) -> Models:
    """Both models in float32; `shaken` puts noise into the teacher's weights."""
    torch.backends.cudnn.allow_tf32 = False  # the check is of float32
    network = model.load(student, device=device).requires_grad_(True)
    network.encoder.positions.requires_grad_(not student.config.use_rope)
    heard = ArkTeacher.load(teacher, student.rules, device=device, dtype="float32")
    if shaken:
        torch.manual_seed(0)
        with torch.no_grad():
            for value in heard.network.parameters():
                value.mul_(1 + SHAKEN * torch.randn_like(value))
    policy = PyTorchEngine(copy.deepcopy(network).requires_grad_(False), student.rules)
    # The arithmetic of an update without its effect: every run is of the same models.
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    return Models(Student(network, student.rules, how).to(device), policy, heard, optimizer, bf16=False)


def halved(models: Models) -> Models:
    """The same in bfloat16, but for the master weights."""
    for network in (models.policy.network, models.teacher.network):
        network.bfloat16()
    return replace(models, bf16=True)


def collated(
    source: Checkpoint, utterances: Sequence[Utterance], updates: int, device: torch.device, batch_s: float = BATCH_S
) -> list[Batch]:
    """The first batches of an epoch."""
    collator = Collator.of(source, [])
    made = []
    durations_s = [utterance.duration_s for utterance in utterances]
    for indices in batches.buckets(durations_s, batch_s=batch_s, seed=0, epoch=0)[:updates]:
        rng = np.random.default_rng(0)
        examples = [collator.example(utterances[index], Augmentation(), rng) for index in indices]
        keys = tuple(Key(0, index, live=True) for index in indices)
        waveforms = tuple(example.waveform for example in examples)
        made.append(replace(collator.collate(examples), keys=keys, waveforms=waveforms).to(device))
    return made


def case(
    student: Checkpoint, teacher: Checkpoint, utterances: Sequence[Utterance], rollouts: int, wanted: argparse.Namespace
) -> dict[str, Any]:
    """Check, then measure, one set of utterances with one number of rollouts."""
    full = wanted.full_size is not None
    caps = tuple(min(WIDTH, round(TOKENS_PER_S * each.duration_s)) if full else WIDTH for each in utterances)
    how = Limited(rollouts=rollouts, empty="stop", caps=caps, guard=not full)
    models = prepared(student, teacher, how, device=wanted.device, shaken=wanted.teacher is None and not full)
    batch_s = FULL_SIZE_BATCH_S if full else BATCH_S
    made = collated(student, utterances, wanted.updates, models.device, batch_s)
    # In float32 the reference's rows of the full size need more memory than there is, so that two clips must do.
    probes = collated(student, utterances[:2], 1, models.device) if full else made
    differences = check(models, [worked(models, batch, utterances) for batch in probes])
    if full:
        models = halved(models)
    works = [worked(models, batch, utterances) for batch in made]
    texts = [text for work in works for those in work.texts for text in those]
    result = {
        "rollouts": rollouts,
        "utterances": sum(len(work.texts) for work in works),
        "updates": len(works),
        "audio_s": round(sum(len(wave) for work in works for wave in work.batch.waveforms) / SAMPLE_RATE, 1),
        "tokens": sum(map(len, texts)),
        "distinct_rollouts": sum(len(set(those)) for work in works for those in work.texts),
        "relative_differences": differences,
        **measure(models, works, wanted.runs),
    }
    for way, row in result["ways"].items():
        print(f"K {rollouts}, {way}: utterances/s {row['utterances_per_s']}, % {row['share_percent']}", flush=True)
    print(f"  times as long as ours: {result['times_as_long']}; differences {differences}", flush=True)
    return result


def noises(folder: Path, count: int) -> list[Utterance]:
    """Clips of 5 to 15 s, whose sound a random model does not mind."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        samples = (0.1 * rng.standard_normal(int(rng.uniform(5, 15) * SAMPLE_RATE))).astype(np.float32)
        path = folder / f"{number}.wav"
        soundfile.write(path, samples, SAMPLE_RATE)
        made.append(Utterance(str(number), path, "", len(samples) / SAMPLE_RATE))
    return made


def full_size(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Write both checkpoints for the time of the runs, and measure."""
    wanted.full_size.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wanted.full_size) as name:
        folders = {size: Path(name) / size for size in ("0.6b", "3b")}
        script = ROOT / "scripts" / "random_checkpoint.py"
        for seed, (size, folder) in enumerate(folders.items()):
            command = [sys.executable, str(script), size, str(folder), "--seed", str(seed)]
            subprocess.run([*command, "--tokenizer", str(wanted.tokenizer)], check=True)
        student, teacher = (checkpoint.open_checkpoint(str(folder)) for folder in folders.values())
        utterances = noises(Path(name), wanted.clips)
        return [{"set": "noise", **case(student, teacher, utterances, k, wanted)} for k in (1, 4)]


def small(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure `tiny` on each set."""
    student = checkpoint.open_checkpoint("tiny")
    teacher = checkpoint.open_checkpoint(wanted.teacher or "tiny")
    examples = sorted((ROOT / "examples" / "audio").glob("*.flac"))
    clips = [(path, len(audio.load(path)) / SAMPLE_RATE) for path in examples]
    sets = {"examples": [Utterance(path.stem, path, "", s) for path, s in clips for _ in range(8 // len(clips))]}
    if wanted.speech is not None:
        sets["an4 test"] = list(read_manifest(wanted.speech / "an4" / "manifest.jsonl", split="test"))
    results = []
    for name, utterances in sets.items():
        print(name)
        results += [{"set": name, **case(student, teacher, utterances, k, wanted)} for k in (1, 4)]
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("speech", type=Path, nargs="?", help="folder with an4/manifest.jsonl")
    parser.add_argument("--teacher", help="instead of tiny with noise in its weights; of its tokenizer, and not itself")
    parser.add_argument("--full-size", type=Path, metavar="SCRATCH", help="measure 0.6B and 3B, written there")
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT.parent / "shared" / "tokenizer", help="for --full-size, its folder"
    )
    parser.add_argument("--clips", type=int, default=8, help="of --full-size; fewer take less memory")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--updates", type=int, default=4, help="batches of a set that are measured")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the file to write instead of the one of the day in bench/results")
    wanted = parser.parse_args()
    if wanted.full_size is not None and (wanted.speech or wanted.teacher):
        parser.error("--full-size takes neither speech nor a teacher")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    others_load = round(os.getloadavg()[0], 2)
    full = wanted.full_size is not None
    cases = full_size(wanted) if full else small(wanted)
    record = {
        "what": "opd: utterances a second by phase, our way and the reference's",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": others_load,  # before the first run: what else the machine was doing
        "torch_threads": torch.get_num_threads(),
        "device": wanted.device,
        "student": "0.6B, random" if full else "tiny",
        "teacher": "3B, random" if full else wanted.teacher or f"tiny, weights shaken by {SHAKEN:.0%}",
        "dtype": "bfloat16, master weights float32" if full else "float32",
        "note": "medians of runs in turns; times_as_long are medians of each run's quotient; encoding counts as the "
        "student's in ours, as the rollout's, the student's and the teacher's in the reference",
        "cases": cases,
    }
    machine = f"cpu{os.cpu_count()}" if wanted.device == "cpu" else "cuda"
    name = f"{datetime.now(UTC):%Y-%m-%d}-{machine}-opd{'-3b' if full else ''}.json"
    target = wanted.out or ROOT / "bench" / "results" / name
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
