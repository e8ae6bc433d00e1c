import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import arkasr
from arkasr import audio, checkpoint, model
from arkasr.data import read_manifest
from arkasr.errors import AudioError, CheckpointMismatchError, UsageError
from arkasr.train import flags, loop, losses, sft, states
from arkasr.train.batches import Augmentation, Collator, Key, Pieces, buckets, stream
from arkasr.train.ranks import Ranks
from conftest import MakeCheckpoint, Run

SPOKEN = {"low": 300, "mid": 900, "high": 2500, "low high": 300}
ALL_AUGMENTATION = Augmentation(
    speed=0.1, gain_db=6, noise=1.0, narrow=0.5, tilt=0.5, trim=0.5, pad_s=0.1, time_masks=2, frequency_masks=2
)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four tones of unequal length whose pitch is their text."""
    records = []
    for index, (text, hertz) in enumerate(SPOKEN.items()):
        times = np.arange(8_000 + 1_600 * index) / audio.SAMPLE_RATE
        tone = 0.3 * np.sin(2 * np.pi * hertz * times)
        if text == "low high":
            tone[len(tone) // 2 :] = 0.3 * np.sin(2 * np.pi * 2500 * times[len(tone) // 2 :])
        soundfile.write(tmp_path / f"{index}.wav", tone, audio.SAMPLE_RATE)
        records.append({"audio": f"{index}.wav", "text": text, "duration": len(tone) / audio.SAMPLE_RATE})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(folder: Path, manifest: Path, out: Path, **changes: object) -> sft.Config:
    base = sft.Config(
        model=str(folder), train=(str(manifest),), out=out, steps=8, batch_s=2.0, warmup_steps=2, workers=0,
        save_every=4, log_every=1, max_duration_s=5,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def curve(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in {"time", "audio_s_per_s"}} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    network = model.load(checkpoint.open_checkpoint(out / "model"))
    return dict(model.published_tensors(network, torch.float32))


def test_training_teaches_and_the_product_transcribes_it(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    sft.main(
        config(
            make_checkpoint(), manifest, tmp_path / "run", steps=220, batch_s=4.0, lr=4e-3, warmup_steps=20,
            ctc_only_steps=40, average=0.9, eval=str(manifest), eval_every=110, save_every=1000, log_every=10,
        )
    )  # fmt: skip
    assert curve(tmp_path / "run")[-1]["eval_wer"] == 0
    transcriber = arkasr.load_model(tmp_path / "run" / "model")
    texts = [t.text for t in transcriber.transcribe([tmp_path / f"{i}.wav" for i in range(4)], vad=False)]
    assert texts == list(SPOKEN)


def same(one: Path, other: Path) -> None:
    """Bitwise."""
    assert curve(one) == curve(other)
    before, after = weights(one), weights(other)
    assert all(torch.equal(before[name], after[name]) for name in before)


def cut_after(whole: sft.Config, step: int, out: Path) -> sft.Config:
    """A copy of a run that ended after the checkpoint of an update."""
    shutil.copytree(whole.out, out)
    for later, folder in states.saved_steps(out).items():
        if later > step:
            shutil.rmtree(folder)
    shutil.rmtree(out / "model")
    return replace(whole, out=out)


def test_a_run_resumed_at_any_step_makes_the_same_curve_and_weights(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    """Lines of several updates, the first decoder update, and skipped ones included."""
    whole = config(
        make_checkpoint(), manifest, tmp_path / "whole", augmentation=ALL_AUGMENTATION, ctc_only_steps=3, steps=6,
        eval=str(manifest), eval_every=4, save_every=1, keep=9, log_every=4,
    )  # fmt: skip
    sft.main(whole)
    for step in range(1, 6):
        resumed = cut_after(whole, step, tmp_path / f"after_{step}")
        sft.main(replace(resumed, device="cpu", log_every=4, keep=1))
        same(whole.out, resumed.out)


def _killed_at(number: int, made: sft.Config) -> None:
    """Train until what touches the disk is called for the n-th time."""
    left = number

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    os.fsync = deadly(os.fsync)  # type: ignore[assignment]
    Path.rename = deadly(Path.rename)  # type: ignore[assignment,method-assign]
    os.unlink = deadly(os.unlink)  # type: ignore[assignment]
    sft.main(made)


def killed(made: sft.Config, *, event: int = 0, after_s: float = 0.0) -> bool:
    """Whether a forked training was killed at the n-th event on the disk, or after a time, before it was done."""
    child = multiprocessing.get_context("fork").Process(target=_killed_at, args=(event, made))
    child.start()
    if after_s:
        time.sleep(after_s)
        child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.fixture
def undisturbed(make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path) -> sft.Config:
    """A run of five updates, each saved."""
    made = config(make_checkpoint(), manifest, tmp_path / "whole", steps=5, save_every=1, keep=1, log_every=2)
    sft.main(made)
    return made


@pytest.mark.parametrize("events", [(2, 5, 9, 11, 13, 30), pytest.param(tuple(range(1, 60)), marks=pytest.mark.slow)])
def test_a_kill_while_writing_leaves_what_resumes(
    undisturbed: sft.Config, tmp_path: Path, events: tuple[int, ...]
) -> None:
    """Before each write reaches the disk, before the renaming, and between the files of what is removed."""
    made = replace(undisturbed, out=tmp_path / "cut")
    for number, event in enumerate(events):
        if not killed(made, event=event):
            assert number > 3
            break
        for folder in states.saved_steps(made.out).values():
            assert {path.name for path in folder.iterdir()} == {".metadata", "__0_0.distcp", "facts.json"}
    sft.main(made)
    same(undisturbed.out, made.out)
    assert [path.name for path in (made.out / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.slow
def test_kills_at_any_moment_leave_what_resumes(undisturbed: sft.Config, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = replace(undisturbed, out=tmp_path / "cut")
    while killed(made, after_s=rng.uniform(0.05, 2.0)):
        pass
    same(undisturbed.out, made.out)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    for step, wer in enumerate([0.5, 0.2, 0.3, None, 0.2, 0.4, 0.9, 0.8]):
        states.save(tmp_path, step, {"w": torch.full((2,), step)}, {"eval_wer": wer}, alone)
        states.retain(tmp_path, keep=2)
    assert list(states.saved_steps(tmp_path)) == [4, 6, 7]
    tensors = {"w": torch.zeros(2)}
    assert states.load(states.find(tmp_path, 4), tensors, alone) == {"eval_wer": 0.2}
    assert tensors["w"].tolist() == [4, 4]
    with pytest.raises(UsageError, match="there are of updates 4, 6, 7"):
        states.find(tmp_path, 5)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "facts.json"])
@pytest.mark.parametrize("what", ["gone", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, what: str) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    states.save(tmp_path, 3, {"w": torch.ones(500)}, {"eval_wer": None}, alone)
    file = tmp_path / "checkpoints" / "step-00000003" / name
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointMismatchError, match=r"step-00000003: cannot be loaded \(.+\); remove it"):
        states.load(file.parent, {"w": torch.zeros(500)}, alone)


def linear_run(out: Path, **changes: object) -> tuple[loop.Run, torch.nn.Linear]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    settings = {"model": "m", "train": ("t",), "out": out, "steps": 100, "lr": 0.1, "warmup_steps": 1, "log_every": 3}
    return loop.Run(loop.Settings(**{**settings, **changes}), module, Ranks(0, 1, torch.device("cpu"))), module  # type: ignore[arg-type]


def test_an_update_divides_clips_and_averages(tmp_path: Path) -> None:
    """Against torch's own pieces, put together here."""
    run, module = linear_run(tmp_path, clip=0.3, log_every=1)
    torch.manual_seed(0)
    other = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(
        [{"params": [other.weight], "weight_decay": 0.01}, {"params": [other.bias], "weight_decay": 0}], lr=0.1,
        betas=(0.9, 0.98),
    )  # fmt: skip
    average = other.weight.detach().clone()
    for step in range(4):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
        for row in x:
            run.backward(module(row).square().sum())
        run.update(7.0)
        other(x).square().sum(dim=-1).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        assert curve(tmp_path)[-1]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = run.schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        average += (other.weight.detach() - average) * (1 - (step + 1) / (step + 10))
    assert torch.allclose(module.weight, other.weight, atol=1e-6)
    averaged = torch.nn.Linear(3, 2)
    run.averaged_into(averaged)
    assert torch.allclose(averaged.weight, average, atol=1e-6)
    run.live_into(averaged)
    assert torch.equal(averaged.weight, module.weight)


@pytest.mark.parametrize("how", ["loss", "gradient", "nothing", "total"])
def test_what_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path, how: str) -> None:
    run, module = linear_run(tmp_path, max_skipped=3, log_every=1)
    run.backward(module(torch.ones(3)).sum())
    run.update(1.0)
    before = {name: value.clone() for name, value in run._tensors().items()}
    for _ in range(2):
        loss = module(torch.ones(3)).sum()
        if how == "loss":  # its gradient is finite
            loss = loss + torch.inf
        elif how == "gradient":  # its value is finite
            loss = loss + (module.weight * 0).sqrt().sum()
        run.backward(loss)
        run.update({"nothing": 0.0, "total": float("nan")}.get(how, 1.0))
    assert all(torch.equal(value, before[name]) for name, value in run._tensors().items())
    assert (run.step, run.skipped, curve(tmp_path)[-1]["skipped"]) == (3, 2, 2)
    run.backward(module(torch.ones(3)).sum())
    run.update(1.0)
    assert run.skipped == 2
    assert not torch.equal(run._tensors()["live/weight"], before["live/weight"])
    for _ in range(2):
        run.backward(module(torch.ones(3)).sum() * torch.nan)
        run.update(1.0)
    run.backward(module(torch.ones(3)).sum() * torch.nan)
    with pytest.raises(UsageError, match="update 7: 3 in a row"):
        run.update(1.0)


def test_lines_hold_quotients_of_sums_and_tensorboard_the_same(tmp_path: Path) -> None:
    """A process that was killed leaves lines and points of updates that are made again."""
    for begin, end in ((0, 8), (5, 12)):
        run, module = linear_run(tmp_path, log_every=2)
        assert run.step == begin
        for step in range(begin, end):
            run.measure(kl=(step, 2), empty=(0, 0))
            run.measure(kl=(1, 1))
            run.backward(module(torch.ones(3)).sum())
            run.update(1.0)
            if step == 4:  # between two lines
                run.save()
        if end == 8:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "k')
    lines = curve(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["kl"] for line in lines] == pytest.approx([(2 * n + 3) / 6 for n in range(0, 12, 2)], rel=1e-5)
    assert all("empty" not in line for line in lines)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == lines[0].keys() - {"step"}
    for name in lines[0].keys() - {"step"}:
        points = board.Scalars(name)
        assert [point.step for point in points] == [line["step"] for line in lines]
        assert [point.value for point in points] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_recomputing_layers_changes_no_bit(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {True: 0, False: 0}
    kept = config(make_checkpoint(), manifest, tmp_path / "kept", steps=3, augmentation=ALL_AUGMENTATION)
    attend = model.DecoderLayer.attend
    for recompute in (False, True):

        def counted(self: model.DecoderLayer, *args: Any, recompute: bool = recompute) -> Any:
            calls[recompute] += 1
            return attend(self, *args)

        monkeypatch.setattr(model.DecoderLayer, "attend", counted)
        sft.main(replace(kept, out=kept.out if not recompute else tmp_path / "made", recompute=recompute))
    same(kept.out, tmp_path / "made")
    assert calls == {False: 3 * 2, True: 2 * 3 * 2}


def test_export_publishes_the_average_or_the_live_weights(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path, run: Run
) -> None:
    made = config(make_checkpoint(), manifest, tmp_path / "run", steps=3, save_every=2, average=0.5)
    sft.main(made)
    code, out, _ = run("train", "export", made.out, tmp_path / "product")
    assert (code, out) == (0, [str(tmp_path / "product")])
    exported = dict(
        model.published_tensors(model.load(checkpoint.open_checkpoint(tmp_path / "product")), torch.float32)
    )
    assert all(torch.equal(value, exported[name]) for name, value in weights(made.out).items())
    [text] = arkasr.load_model(tmp_path / "product").transcribe([tmp_path / "0.wav"], vad=False)
    assert text.segments

    live = {}
    for step in (2, 3):
        code, *_ = run("train", "export", made.out, tmp_path / f"live_{step}", "--step", str(step), "--live")
        assert code == 0
        source = checkpoint.open_checkpoint(tmp_path / f"live_{step}")
        live[step] = dict(model.published_tensors(model.load(source), torch.float32))
    name = next(name for name, value in exported.items() if value.ndim == 2 and not torch.equal(value, live[3][name]))
    assert not torch.equal(live[2][name], live[3][name])
    for arguments, complaint in (
        ((made.out, tmp_path / "product"), "exists"),
        ((made.out, tmp_path / "new", "--step", "7"), "there are of updates 2, 3"),
        ((tmp_path, tmp_path / "new"), "not a run"),
    ):
        code, _, err = run("train", "export", *arguments)
        assert code == 1
        assert complaint in err[-1]


def test_accumulation_of_four_clips_equals_one_batch_of_four(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    """A mean of per-batch means would weigh short transcripts more than long ones."""
    folder = make_checkpoint()
    sft.main(config(folder, manifest, tmp_path / "one", batch_s=10.0, accumulate=1))
    sft.main(config(folder, manifest, tmp_path / "four", batch_s=10.0, accumulate=4))
    for whole, pieces in zip(curve(tmp_path / "one"), curve(tmp_path / "four"), strict=True):
        assert pieces == pytest.approx(whole, abs=2e-3)
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    # Adam turns rounding of a tiny gradient into a whole step of it, hence not 1e-7; the weights moved by up to 4e-3.
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 3e-4


def test_a_run_of_another_configuration_is_not_continued(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    first = config(make_checkpoint(), manifest, tmp_path / "run", steps=4)
    sft.main(first)
    with pytest.raises(UsageError, match="another lr;"):
        sft.main(replace(first, lr=0.5))
    sft.main(replace(first, workers=1, accumulate=2, keep=1, recompute=True))
    with pytest.raises(UsageError, match="accumulate is 0"):
        replace(first, accumulate=0)


def test_the_loss_is_the_mean_over_transcript_tokens(make_checkpoint: MakeCheckpoint, manifest: Path) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    trainee = sft.Trainee(model.load(source), 8)
    collator = Collator.of(source, sorted({c for text in SPOKEN for c in text}))
    clean = Augmentation()
    utterances = list(read_manifest(manifest))
    examples = [collator.example(u, clean, np.random.default_rng(0)) for u in utterances]
    batch = replace(collator.collate(examples), keys=(Key(0, 0, live=True),))
    total = torch.zeros(())
    count = 0
    for example in examples:
        mel, prompt, target = example.mel, example.prompt, example.target
        logits = trainee.network(
            torch.from_numpy(mel)[None], torch.tensor([mel.shape[1]]), torch.tensor([prompt + target])
        )
        logprobs = logits[0].log_softmax(-1)
        for offset, token in enumerate(target):
            total = total - logprobs[len(prompt) - 1 + offset, token]
            count += 1
    with torch.no_grad():
        _, ce = trainee(batch, sft.Weights(ctc=0.0, ce=1.0))
    assert int((batch.labels != losses.IGNORE).sum()) == count
    assert float(ce) == pytest.approx(float(total.detach()), rel=1e-5)


def test_ctc_counts_every_alignment() -> None:
    """Against the sum over all paths of a case small enough to enumerate."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 3, generator=generator)
    probs = logits[0].softmax(-1)
    total = 0.0
    for path in np.ndindex(3, 3, 3, 3):
        folded = [unit for n, unit in enumerate(path) if unit and (n == 0 or path[n - 1] != unit)]
        if folded == [1, 2]:
            total += float(np.prod([float(probs[t, unit]) for t, unit in enumerate(path)]))
    loss = losses.ctc_sum(logits, torch.tensor([4]), torch.tensor([[1, 2]]), torch.tensor([2]))
    assert float(loss) == pytest.approx(-np.log(total), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("batch_s", [0.5, 6.0, 24.0])
def test_buckets_hold_everyone_once_within_the_budget(seed: int, batch_s: float) -> None:
    durations_s = np.random.default_rng(seed).uniform(0.3, 7, 200).tolist()
    batches = buckets(durations_s, batch_s=batch_s, seed=seed, epoch=3)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(durations_s[i] for i in batch) <= batch_s
    assert batches == buckets(durations_s, batch_s=batch_s, seed=seed, epoch=3)
    assert batches != buckets(durations_s, batch_s=batch_s, seed=seed, epoch=4)


def test_buckets_waste_little_on_padding() -> None:
    durations_s = np.random.default_rng(0).uniform(0.5, 7, 800).tolist()
    padded = sum(len(b) * max(durations_s[i] for i in b) for b in buckets(durations_s, batch_s=24, seed=0, epoch=0))
    assert padded < 1.15 * sum(durations_s)


def test_the_stream_continues_where_it_is_told_to(make_checkpoint: MakeCheckpoint, manifest: Path) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    utterances = list(read_manifest(manifest))
    collator = Collator.of(source, sorted({c for text in SPOKEN for c in text}))

    def mels(start: int, count: int) -> Sequence[torch.Tensor]:
        batches = stream(utterances, collator, ALL_AUGMENTATION, batch_s=1.0, seed=5, start=start, workers=0)
        return [next(batches).mel for _ in range(count)]

    for later, resumed in zip(mels(0, 9)[5:], mels(5, 4), strict=True):
        assert torch.equal(later, resumed)


@pytest.mark.parametrize(("size", "accumulate"), [(1, 4), (2, 2), (2, 1), (3, 4)])
def test_ranks_and_micro_batches_divide_the_same_updates(size: int, accumulate: int) -> None:
    settings = loop.Settings(model="m", train=(), out=Path("o"), accumulate=accumulate)
    batch = [5, 2, 9, 4, 7]
    pieces = [
        keys for rank in range(size) for keys in settings.pieces(Ranks(rank, size, torch.device("cpu"))).deal(batch, 6)
    ]
    assert len(pieces) == size * accumulate
    assert sorted(key.utterance for keys in pieces for key in keys if key.live) == sorted(batch)
    assert all(keys == [Key(6, 5, live=False)] for keys in pieces if not keys[0].live)
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_a_stand_in_trains_nothing(make_checkpoint: MakeCheckpoint, manifest: Path) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    utterances = list(read_manifest(manifest))[:1]
    collator = Collator.of(source, sorted(set(utterances[0].text)))
    pieces = stream(
        utterances,
        collator,
        Augmentation(),
        batch_s=9,
        seed=0,
        start=0,
        workers=0,
        pieces=Pieces(first=0, count=2, of=2),
    )
    real, idle = next(pieces), next(pieces)
    trainee = sft.load_trainee(source, len(collator.unit_ids))
    sum(trainee(real, sft.Weights(ctc=1.0, ce=1.0))).backward()
    assert sum(float(p.grad.abs().sum()) for p in trainee.parameters() if p.grad is not None) > 1
    gradients = {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}
    losses_of_idle = trainee(idle, sft.Weights(ctc=1.0, ce=1.0))
    assert [float(loss.detach()) for loss in losses_of_idle] == [0, 0]
    sum(losses_of_idle).backward()
    for name, p in trainee.named_parameters():
        assert p.grad is None or torch.equal(p.grad, gradients[name])


def test_evaluation_encodes_a_clip_once_and_ranks_share_it(make_checkpoint: MakeCheckpoint, manifest: Path) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    collator = Collator.of(source, sorted({c for text in SPOKEN for c in text}))
    trainee = sft.load_trainee(source, len(collator.unit_ids))
    encoded: list[int] = []
    trainee.network.encoder.register_forward_hook(lambda _, given, __: encoded.append(len(given[0])))
    alone = Ranks(0, 1, torch.device("cpu"))
    for write in (True, False):
        scores = sft._evaluate(trainee, source.rules, collator, str(manifest), alone, write=write)
        assert scores.keys() == ({"eval_units", "eval_wer"} if write else {"eval_units"})
        assert sum(encoded) == len(SPOKEN)
        encoded.clear()
    utterances = list(read_manifest(manifest)) * 30
    shared = [list(loop.shares(utterances, Ranks(rank, 3, alone.device))) for rank in range(3)]
    assert sorted(u.id for groups in shared for group in groups for u in group) == sorted(u.id for u in utterances)
    assert all(1 <= len(group) <= loop.EVAL_CLIPS for groups in shared for group in groups)


def test_augmentation_keeps_the_clip_a_clip() -> None:
    rng = np.random.default_rng(0)
    samples = (0.5 * np.sin(np.arange(16_000) / 5)).astype(np.float32)
    for _ in range(20):
        varied = ALL_AUGMENTATION.waveform(samples, rng)
        assert varied.dtype == np.float32
        assert np.isfinite(varied).all()
        assert np.abs(varied).max() <= 1
        assert 16_000 * 0.9 <= len(varied) <= 16_000 * 1.12 + 3_200
    assert np.array_equal(Augmentation().waveform(samples, rng), samples)


def test_schedule() -> None:
    schedule = loop.Schedule(lr=1.0, warmup_steps=10, steps=110, floor=0.1)
    rates = [schedule.at(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_every_field_of_the_config_is_a_described_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        flags.parse_flags(sft.Config, ["--help"], program="p", about="a")
    shown = capsys.readouterr().out
    for owner in (sft.Config, loop.Settings, Augmentation):
        for item in fields(owner):
            assert item.name == "augmentation" or f"--{item.name.replace('_', '-')}" in shown
            assert item.name == "augmentation" or flags.described(owner, item.name), item.name
    argv = ["--model", "m", "--train", "a:x", "--train", "b", "--out", "o", "--lr", "0.5", "--bf16", "--speed", "0.2"]
    parsed = flags.parse_flags(sft.Config, argv, program="p", about="a")
    assert parsed == sft.Config(
        model="m", train=("a:x", "b"), out=Path("o"), lr=0.5, bf16=True, augmentation=Augmentation(speed=0.2)
    )
    assert flags.parse_flags(sft.Config, [*argv, "--dry-run"], program="p", about="a") is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"text": "a"}', "no audio"),
        ('{"audio": 3}', "audio is 3"),
        ('{"audio": "a.wav", "txt": "a"}', "unknown field 'txt'"),
        ('{"audio": "a.wav", "duration": "long"}', "duration is 'long'"),
        ('{"audio": "a.wav", "duration": 1, "task": "translate"}', "only asr"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"audio": "ok.wav", "text": "a", "duration": 1}\n' + line + "\n")
    with pytest.raises(UsageError, match=complaint) as caught:
        list(read_manifest(path))
    assert f"{path}:2" in str(caught.value)


@pytest.mark.usefixtures("manifest")
def test_begin_and_end_select_a_piece(tmp_path: Path) -> None:
    piece = {"audio": "0.wav", "text": "a", "begin_time": 0.1, "end_time": 0.35}
    rest = {"audio": "0.wav", "text": "a", "begin_time": 0.1, "end_time": 0.05, "duration": 0.4}
    whole = {"audio": "0.wav", "text": "a", "begin_time": -1}
    path = tmp_path / "pieces.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (piece, rest, whole)))
    utterances = list(read_manifest(path))
    assert [len(u.waveform()) for u in utterances] == [4_000, 6_400, 8_000]
    assert [u.duration_s for u in utterances] == [pytest.approx(0.25), 0.4, 0.5]


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_that_cannot_be_read_stops_training_with_one_line(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "2.wav").write_bytes(b"RIFF")
    with pytest.raises(AudioError, match=r"2\.wav") as caught:
        sft.main(config(make_checkpoint(), manifest, tmp_path / "run", workers=workers))
    assert "\n" not in str(caught.value)


def test_a_slowed_clip_keeps_its_end(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A 30 s clip that augmentation made longer once lost its last words, but not their labels."""
    source = checkpoint.open_checkpoint(make_checkpoint())
    soundfile.write(tmp_path / "long.wav", np.zeros(30 * audio.SAMPLE_RATE), audio.SAMPLE_RATE)
    (tmp_path / "m.jsonl").write_text('{"audio": "long.wav", "text": "a"}')
    [utterance] = read_manifest(tmp_path / "m.jsonl")
    for seed in range(4):
        collator = Collator.of(source, ["a"])
        mel = collator.example(utterance, Augmentation(speed=0.2), np.random.default_rng(seed)).mel
        assert mel.shape[1] <= 3000
        assert mel.shape[1] == 3000 or mel.shape[1] > 2400
    with pytest.raises(UsageError, match="at most 30 s"):
        sft.main(config(source.folder, tmp_path / "m.jsonl", tmp_path / "run", max_duration_s=40))


def test_without_ctc_the_units_of_a_head_do_not_matter(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    """Teacher data has no phones, and the model that it adapts may have a head for them."""
    records = [json.loads(line) | {"units": "a b"} for line in manifest.read_text().splitlines()]
    phones = manifest.with_name("phones.jsonl")
    phones.write_text("".join(json.dumps(record) + "\n" for record in records))
    heard = config(make_checkpoint(), phones, tmp_path / "heard", steps=2)
    sft.main(heard)
    adapted = config(heard.out / "model", manifest, tmp_path / "adapted", steps=2, ctc_weight=0.0, eval=str(manifest))
    sft.main(adapted)
    assert "eval_wer" in curve(adapted.out)[-1]
    assert "ctc" not in curve(adapted.out)[0]
    assert not (adapted.out / "model" / sft.CTC_HEAD).exists()
    with pytest.raises(UsageError, match="knows no CTC unit"):
        sft.main(replace(adapted, ctc_weight=0.3, out=tmp_path / "other"))
