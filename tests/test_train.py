import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import arkasr
from arkasr import audio, checkpoint, model
from arkasr.data import read_manifest
from arkasr.errors import AudioError, UsageError
from arkasr.train import loop, losses, sft
from arkasr.train.batches import Augmentation, Collator, buckets, stream
from conftest import MakeCheckpoint

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


def test_a_resumed_run_makes_the_same_curve_and_weights(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint()
    settings = {"augmentation": ALL_AUGMENTATION, "ctc_only_steps": 3, "eval": str(manifest), "eval_every": 4}
    sft.main(config(folder, manifest, tmp_path / "whole", **settings))

    log = loop.log

    def pulled_plug(out: Path, record: dict[str, float]) -> None:
        if record["step"] == 7:
            raise KeyboardInterrupt
        log(out, record)

    cut = config(folder, manifest, tmp_path / "cut", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "log", pulled_plug)
        with pytest.raises(KeyboardInterrupt):
            sft.main(cut)
    assert curve(tmp_path / "cut")[-1]["step"] == 6
    sft.main(cut)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_accumulation_of_four_clips_equals_one_batch_of_four(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    """A mean of per-batch means would weigh short transcripts more than long ones."""
    folder = make_checkpoint()
    sft.main(config(folder, manifest, tmp_path / "one", batch_s=10.0, accumulate=1))
    sft.main(config(folder, manifest, tmp_path / "four", batch_s=0.1, accumulate=4))
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


def test_the_loss_is_the_mean_over_transcript_tokens(make_checkpoint: MakeCheckpoint, manifest: Path) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    trainee = sft.Trainee(model.load(source), 8)
    collator = Collator.of(source, sorted({c for text in SPOKEN for c in text}))
    clean = Augmentation()
    utterances = list(read_manifest(manifest))
    examples = [collator.example(u, clean, np.random.default_rng(0)) for u in utterances]
    batch = collator.collate(examples)
    total = torch.zeros(())
    count = 0
    for mel, prompt, target, _ in examples:
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


def test_moving_average_swaps_in_and_out() -> None:
    module = torch.nn.Linear(2, 2)
    average = loop.MovingAverage(module, decay=0.5)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    average.update(module, 1000)
    average.swap(module)
    assert torch.allclose(module.weight, before + 0.5)
    average.swap(module)
    assert torch.allclose(module.weight, before + 1)


def test_every_field_of_the_config_is_a_described_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        loop.parse_flags(sft.Config, ["--help"], program="p", about="a")
    shown = capsys.readouterr().out
    for owner in (sft.Config, Augmentation):
        for item in fields(owner):
            assert item.name == "augmentation" or f"--{item.name.replace('_', '-')}" in shown
            assert item.name == "augmentation" or loop._described(owner, item.name), item.name
    argv = ["--model", "m", "--train", "a:x", "--train", "b", "--out", "o", "--lr", "0.5", "--bf16", "--speed", "0.2"]
    parsed = loop.parse_flags(sft.Config, argv, program="p", about="a")
    assert parsed == sft.Config(
        model="m", train=("a:x", "b"), out=Path("o"), lr=0.5, bf16=True, augmentation=Augmentation(speed=0.2)
    )
    assert loop.parse_flags(sft.Config, [*argv, "--dry-run"], program="p", about="a") is None


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
        mel, *_ = Collator.of(source, ["a"]).example(utterance, Augmentation(speed=0.2), np.random.default_rng(seed))
        assert mel.shape[1] <= 3000
        assert mel.shape[1] == 3000 or mel.shape[1] > 2400
    with pytest.raises(UsageError, match="at most 30 s"):
        sft.main(config(source.folder, tmp_path / "m.jsonl", tmp_path / "run", max_duration_s=40))
