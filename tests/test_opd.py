"""On-policy distillation: the step against plain oracles, the program, and the teacher that is a checkpoint."""

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from arkasr import audio, checkpoint, model
from arkasr.checkpoint import Checkpoint
from arkasr.data import Utterance, read_manifest
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.train import opd
from arkasr.train.batches import Augmentation, Batch, Collator, Key
from arkasr.train.distil import Distillation, Listener, Student
from arkasr.train.loop import Run
from arkasr.train.teachers import Request
from arkasr.train.teachers.ark import ArkTeacher
from conftest import MakeCheckpoint, byte_tokenizer, random_network
from test_ranks import spread

TEXTS = ("low", "mid", "low high")
EXACT = Distillation(rollouts=3, greedy=False, temperature=1.0, top_p=1.0, top_k=8, empty="stop")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three noises of unequal length and their texts."""
    rng = np.random.default_rng(0)
    records = []
    for index, text in enumerate(TEXTS):
        soundfile.write(tmp_path / f"{index}.wav", 0.1 * rng.standard_normal(4_000 + 3_000 * index), audio.SAMPLE_RATE)
        records.append({"audio": f"{index}.wav", "text": text, "language": "en"})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def student(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """A random student that says varied things."""
    return checkpoint.open_checkpoint(make_checkpoint())


@pytest.fixture
def teacher(student: Checkpoint, tmp_path: Path) -> Path:
    """A deeper model with the student's tokenizer."""
    folder = tmp_path / "teacher"
    model.save(random_network(replace(student.config, encoder_layers=3, decoder_layers=3), seed=7), folder,
               dtype=torch.float32)  # fmt: skip
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def batch_of(source: Checkpoint, utterances: Sequence[Utterance]) -> Batch:
    collator = Collator.of(source, [])
    examples = [collator.example(u, Augmentation(), np.random.default_rng(0)) for u in utterances]
    keys = tuple(Key(0, index, live=True) for index in range(len(examples)))
    return replace(collator.collate(examples), keys=keys, waveforms=tuple(e.waveform for e in examples))


def hear(
    source: Checkpoint, teacher: ArkTeacher, utterances: Sequence[Utterance], how: Distillation, *, seed: int = 0
) -> tuple[float, float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, weight, gradients and sums of one step over utterances."""
    student = Student(model.load(source).requires_grad_(True), source.rules, how)
    listener = Listener(PyTorchEngine(model.load(source), source.rules), teacher, utterances, how, seed=seed)
    heard = student(batch_of(source, utterances), listener)
    heard.loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return float(heard.loss.detach()), heard.weight, gradients, heard.sums


def load(folder: Path, source: Checkpoint) -> ArkTeacher:
    return ArkTeacher.load(checkpoint.open_checkpoint(folder), source.rules, device="cpu", dtype="float32")


def log_probs(network: ArkASR, source: Checkpoint, waveform: audio.Waveform, ids: Sequence[int]) -> torch.Tensor:
    """Of every token of a text [len(ids), V], by a plain uncached row in float64."""
    prompt = source.rules.prompt_ids(audio.num_audio_tokens(len(waveform), network.config.merge_factor))
    mel = torch.from_numpy(audio.log_mel(waveform, network.config.num_mels))[None]
    with torch.no_grad():
        logits = network(mel, torch.tensor([mel.shape[2]]), torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    forbidden = ~torch.tensor(source.rules.allowed_ids)
    found: torch.Tensor = logits.double().masked_fill(forbidden, -torch.inf)
    return found.log_softmax(-1)


def test_the_step_is_the_mean_over_rollouts_of_a_plain_divergence(
    student: Checkpoint, teacher: Path, manifest: Path
) -> None:
    """Every rollout alone, in its own row, over the whole vocabulary in float64: the packed batch must agree."""
    utterances = list(read_manifest(manifest))
    heard = load(teacher, student)
    how = replace(EXACT, support="full")
    loss, weight, _, sums = hear(student, heard, utterances, how, seed=5)
    network, expected, positions = model.load(student), 0.0, 0
    engine = PyTorchEngine(network, student.rules)
    for index, utterance in enumerate(utterances):
        for options in how.options(seed=5, step=0, utterance=index):
            (said,) = engine.generate([utterance.waveform()], options)
            ids = [*said.ids, *(student.rules.stop_ids[:1] if said.stop_logprob is not None else ())]
            p = log_probs(heard.network, student, utterance.waveform(), ids)
            q = log_probs(network, student, utterance.waveform(), ids)
            expected += float((p.exp() * (p - q)).nan_to_num().sum())
            positions += len(ids)
    assert weight == positions
    assert loss == pytest.approx(expected, rel=1e-4)
    assert sums["rollouts"] == 9
    assert sums["kl"] == pytest.approx(loss, rel=1e-5)


def test_k_rollouts_of_an_utterance_are_k_utterances(
    student: Checkpoint, teacher: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rollouts, all of one clip packed together or each in a batch row of its own."""
    (utterance, *_) = read_manifest(manifest)
    heard = load(teacher, student)
    loss, weight, gradients, sums = hear(student, heard, [utterance], EXACT)
    assert sums["distinct"] == 3
    single = replace(EXACT, rollouts=1)

    drawn = EXACT.options(seed=0, step=0, utterance=0)

    def one_each(_: Distillation, *, utterance: int, **__: int) -> list[DecodeOptions]:
        return [drawn[utterance]]

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "options", one_each)
        apart, weight_apart, gradients_apart, _ = hear(student, heard, [utterance] * 3, single)
    assert weight == weight_apart
    assert loss == pytest.approx(apart, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_apart[name], atol=1e-5, rtol=1e-4)


def test_equal_rollouts_are_scored_once_and_count_as_often_as_they_were_said(
    student: Checkpoint, teacher: Path, manifest: Path
) -> None:
    utterances = list(read_manifest(manifest))
    heard = load(teacher, student)
    greedy = Distillation(rollouts=1, top_k=8, empty="stop")
    cold = replace(greedy, rollouts=4, temperature=1e-9)  # as good as greedy
    once, weight, gradients, _ = hear(student, heard, utterances, greedy)
    fourfold, weights, more, sums = hear(student, heard, utterances, cold)
    assert (sums["rollouts"], sums["distinct"]) == (12, 3)
    assert weights == 4 * weight
    assert fourfold == pytest.approx(4 * once, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(more[name], 4 * gradient, atol=1e-5, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student: Checkpoint, manifest: Path) -> None:
    heard = load(student.folder, student)
    for support in ("union", "teacher", "student", "full"):
        how = replace(EXACT, support=support)
        loss, weight, gradients, sums = hear(student, heard, list(read_manifest(manifest)), how)
        assert abs(loss) / weight < 1e-5
        assert max(float(g.abs().max()) for g in gradients.values()) / weight < 1e-4
        assert sums["overlap"] == pytest.approx(weight)
        assert sums["vuss"] == pytest.approx(weight * (8 if support != "full" else student.rules.allowed_ids.sum()))


def test_vocabulary_in_chunks_changes_nothing(
    student: Checkpoint, teacher: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterances, heard = list(read_manifest(manifest)), load(teacher, student)
    loss, weight, gradients, sums = hear(student, heard, utterances, EXACT)
    monkeypatch.setattr("arkasr.train.distil.CHUNK", 5 * student.rules.vocab_size)
    monkeypatch.setattr("arkasr.train.teachers.ark.CHUNK", 7)
    chunked, chunked_weight, more, chunked_sums = hear(student, heard, utterances, EXACT)
    assert chunked_weight == weight > 7
    assert chunked == pytest.approx(loss, rel=1e-5)
    assert chunked_sums == pytest.approx(sums, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(more[name], gradient, atol=1e-5, rtol=1e-4)


def rigged_to_stop(source: Checkpoint, folder: Path) -> Checkpoint:
    """A student that says nothing, whatever it hears."""
    network = random_network(replace(source.config, tied_embeddings=False))
    assert network.decoder.head is not None
    with torch.no_grad():
        network.decoder.head.weight.zero_()
        network.decoder.norm.weight.zero_()
        network.decoder.norm.weight[0] = 1
        network.decoder.embed.weight[:, 0] = 100
        network.decoder.head.weight[source.rules.stop_ids[0], 0] = 100
    model.save(network, folder, dtype=torch.float32)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize("empty", ["reference", "stop"])
def test_a_student_that_says_nothing_is_told_so_and_counted(
    student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path, empty: Literal["reference", "stop"]
) -> None:
    """W8: a stop at once is no text; the reference takes its place only where that is asked, and is counted."""
    silent = rigged_to_stop(student, tmp_path / "silent")
    utterances = list(read_manifest(manifest))
    how = replace(EXACT, rollouts=2, empty=empty)
    _, weight, gradients, sums = hear(silent, load(teacher, student), utterances, how)
    assert (sums["rollouts"], sums["empty"], sums["stopped"], sums["tokens"]) == (6, 6, 6, 0)
    assert sums["fallback"] == (6 if empty == "reference" else 0)
    lengths = [len(student.rules.target_ids(text)) for text in TEXTS]
    assert weight == 2 * (sum(lengths) if empty == "reference" else 3)
    assert any(float(g.abs().max()) > 0 for g in gradients.values())
    wordless = [replace(utterance, text="") for utterance in utterances]
    assert hear(silent, load(teacher, student), wordless, how)[3]["fallback"] == 0


def test_rollouts_follow_from_seed_step_and_utterance() -> None:
    how = Distillation(rollouts=4)
    seeds = [options.seed for seed in (0, 1) for step in (0, 1) for utterance in (0, 1)
             for options in how.options(seed=seed, step=step, utterance=utterance)[1:]]  # fmt: skip
    assert len(set(seeds)) == len(seeds) == 24
    first = how.options(seed=0, step=3, utterance=2)
    assert first == how.options(seed=0, step=3, utterance=2)
    assert first[0].temperature == 0
    assert all(options.top_p == 0.95 for options in first[1:])


def test_a_stand_in_takes_part_and_adds_nothing(student: Checkpoint, teacher: Path, manifest: Path) -> None:
    """With several ranks every one must run the network, also one that has no utterance."""
    utterances = list(read_manifest(manifest))
    how = EXACT
    network = Student(model.load(student).requires_grad_(True), student.rules, how)
    listener = Listener(PyTorchEngine(model.load(student), student.rules), load(teacher, student), utterances, how,
                        seed=0)  # fmt: skip
    heard = network(batch_of(student, utterances).without_targets(), listener)
    heard.loss.backward()
    assert (float(heard.loss.detach()), heard.weight) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in network.network.decoder.layers.parameters())


def test_a_teacher_with_another_tokenizer_is_refused_as_a_checkpoint(student: Checkpoint) -> None:
    with pytest.raises(UsageError, match="tokenizer is not the student's"):
        ArkTeacher.load(checkpoint.open_checkpoint("tiny"), student.rules, device="cpu", dtype="float32")


def test_the_teachers_own_ids_come_first_and_asked_ones_behind(
    student: Checkpoint, teacher: Path, manifest: Path
) -> None:
    (utterance, *_) = read_manifest(manifest)
    heard = load(teacher, student)
    ids = (10, 20, 30, student.rules.stop_ids[0])
    asked = torch.tensor([[11, 12]] * 4)
    scores = heard.score(Request([utterance.waveform()], ["en"], [[ids]], asked, 3, 2.0))
    plain = log_probs(heard.network, student, utterance.waveform(), ids) / 2
    expected = plain.log_softmax(-1)
    assert scores.top.ids.shape == (4, 5)
    assert scores.num_own == 3
    assert scores.aligned.all()
    best = expected.topk(3).indices
    assert torch.equal(scores.top.ids[:, :3], best)
    for row in range(4):
        for column in range(5):
            if scores.top.valid[row, column]:
                token = int(scores.top.ids[row, column])
                assert float(scores.top.logprobs[row, column]) == pytest.approx(float(expected[row, token]), abs=1e-4)
    duplicates = (asked[:, :, None] == best[:, None, :]).any(-1)
    assert torch.equal(scores.top.valid[:, 3:], ~duplicates)


# ---- the program ----


def config(student: Path, teacher: Path, manifest: Path, out: Path, **changes: object) -> opd.Config:
    base = opd.Config(
        model=str(student), teacher=str(teacher), train=(str(manifest),), out=out, steps=6, batch_s=1.0, warmup_steps=2,
        workers=0, save_every=2, log_every=1, eval=str(manifest), eval_every=3, lr=1e-3,
        distillation=Distillation(rollouts=2, top_k=8, temperature=0.8),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def lines(out: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.endswith("_s")} for line in read]


def test_the_student_comes_nearer_to_its_teacher(
    student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path
) -> None:
    settings = config(student.folder, teacher, manifest, tmp_path / "run", steps=40, eval_every=20, average=0.5)
    opd.main(settings)
    curve = [line for line in lines(tmp_path / "run") if "eval_kl" in line]
    assert [line["step"] for line in curve] == [0, 20, 40]
    assert curve[-1]["eval_kl"] < 0.6 * curve[0]["eval_kl"]
    assert curve[-1]["eval_overlap"] > curve[0]["eval_overlap"]
    trained = checkpoint.open_checkpoint(tmp_path / "run" / "model")
    assert trained.rules.same_tokens(student.rules)


def test_an_interrupted_run_continues_bit_by_bit_through_its_cold_start(
    student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"cold_start": (str(manifest),), "cold_start_steps": 3}
    opd.main(config(student.folder, teacher, manifest, tmp_path / "whole", **settings))
    update = Run.update
    for stop in (2, 5):

        def plug(self: Run, total: float, stop: int = stop) -> None:
            if self.step == stop:
                raise KeyboardInterrupt
            update(self, total)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "update", plug)
            with pytest.raises(KeyboardInterrupt):
                opd.main(config(student.folder, teacher, manifest, tmp_path / "cut", **settings))
    opd.main(config(student.folder, teacher, manifest, tmp_path / "cut", **settings))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    whole, cut = (model.load(checkpoint.open_checkpoint(tmp_path / name / "model")) for name in ("whole", "cut"))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), cut.parameters(), strict=True))
    assert "ce" in lines(tmp_path / "whole")[1]
    assert "kl" in lines(tmp_path / "whole")[-2]


PHASES = {
    "rollout": (Listener, "roll"),
    "teacher": (ArkTeacher, "score"),
    "backward": (Run, "backward"),
    "update": (torch.optim.AdamW, "step"),
    "saving": (FileSystemWriter, "write_data"),
    "before it is renamed": (Path, "rename"),
}


def _killed_in(owner: type, name: str, calls: int, made: opd.Config) -> None:
    inner, done = getattr(owner, name), itertools.count(1)

    def last(*arguments: object, **named: object) -> object:
        if next(done) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **named)

    setattr(owner, name, last)
    opd.main(made)


def test_a_kill_in_any_phase_leaves_what_resumes(
    student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path
) -> None:
    """SIGKILL of a real process; what is continued ends as what was never disturbed, bit by bit."""
    whole = config(student.folder, teacher, manifest, tmp_path / "whole", eval=None, steps=4, save_every=1)
    opd.main(whole)
    expected = model.load(checkpoint.open_checkpoint(whole.out / "model"))
    for phase, (owner, name) in PHASES.items():
        cut = replace(whole, out=tmp_path / f"killed in {phase}")
        context = multiprocessing.get_context("fork")
        for calls in (1, 3):
            child = context.Process(target=_killed_in, args=(owner, name, calls, cut))
            child.start()
            child.join(60)
            assert child.exitcode == -signal.SIGKILL, phase
        opd.main(cut)
        assert lines(cut.out) == lines(whole.out), phase
        made = model.load(checkpoint.open_checkpoint(cut.out / "model"))
        assert all(map(torch.equal, made.parameters(), expected.parameters())), phase


def test_the_update_does_not_depend_on_how_it_is_divided(
    student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path
) -> None:
    """Accumulation 3 x 1 equals 1 x 3, rollouts included, for they follow from the utterance."""
    for name, pieces in (("one", 1), ("three", 3)):
        opd.main(config(student.folder, teacher, manifest, tmp_path / name, batch_s=9.0, accumulate=pieces, steps=3))
    for one, three in zip(lines(tmp_path / "one"), lines(tmp_path / "three"), strict=True):
        assert three == pytest.approx(one, rel=2e-3, abs=2e-3)


def test_two_ranks_make_the_updates_of_one(student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path) -> None:
    """Four pieces of three clips: one of them is a stand-in. The cold start too."""
    settings = {"batch_s": 9.0, "steps": 4, "cold_start": (str(manifest),), "cold_start_steps": 1, "eval_every": 4}
    alone = config(student.folder, teacher, manifest, tmp_path / "alone", **settings)
    opd.main(alone)
    two = replace(alone, out=tmp_path / "two", accumulate=2)
    assert spread(2, lambda: opd.main(two)) == []
    for line, same in zip(lines(alone.out), lines(two.out), strict=True):
        assert same == pytest.approx(line, rel=2e-3, abs=2e-3)
    assert lines(two.out)[-2]["vuss"] > 8


def test_speech_without_transcripts_will_do(student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    wordless = manifest.with_name("wordless.jsonl")
    wordless.write_text("".join(json.dumps(record | {"text": ""}) + "\n" for record in records))
    for name, texts in (("with", manifest), ("without", wordless)):
        opd.main(config(student.folder, teacher, texts, tmp_path / name, eval=None, steps=2))
    assert lines(tmp_path / "with") == lines(tmp_path / "without")
    with pytest.raises(UsageError, match="no utterance to train on"):
        opd.main(config(student.folder, teacher, wordless, tmp_path / "cold", cold_start=(str(wordless),),
                        cold_start_steps=1))  # fmt: skip


def test_a_teacher_without_values_stops_the_run(
    student: Checkpoint, teacher: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W4: positions that the teacher lost are told, not averaged away."""
    score = ArkTeacher.score

    def deaf(self: ArkTeacher, request: Request) -> object:
        scores = score(self, request)
        return replace(scores, aligned=torch.zeros_like(scores.aligned))

    monkeypatch.setattr(ArkTeacher, "score", deaf)
    with pytest.raises(UsageError, match=r"no value for 100% of the positions.*max_lost"):
        opd.main(config(student.folder, teacher, manifest, tmp_path / "run", eval=None))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cold_start_steps": 3}, "cold_start"),
        ({"distillation": {"rollouts": 0}}, "rollouts is 0"),
        ({"distillation": {"rollouts": 4, "temperature": 0.0}}, "all of them equal"),
    ],
)
def test_contradicting_options_are_refused(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    how = changes.pop("distillation", {})
    assert isinstance(how, dict)
    with pytest.raises(UsageError, match=named):
        config(tmp_path, tmp_path, tmp_path, tmp_path, **changes, distillation=Distillation(**how))
