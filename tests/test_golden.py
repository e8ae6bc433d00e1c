"""`pytest -m weights` replays golden files; the rest proves, on random weights, that recording and replaying work."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import golden
from arkasr import audio, checkpoint, model, pins, text
from arkasr.engines import pytorch
from arkasr.errors import ArkASRError, AudioError, CheckpointMismatchError, ModelNotFoundError, UsageError
from conftest import MakeCheckpoint

ROOT = Path(__file__).parents[1]
CLIPS = sorted((ROOT / "examples" / "audio").glob("*.flac"))
FOLDER = Path(os.environ.get("ARKASR_WEIGHTS", golden.GOLDEN))
CACHE = os.environ.get("ARKASR_CACHE")  # of the person who runs this; other tests get an empty one
ARRAYS = ("log_mel", "encoder", "adapter", "logits")
STAGES = ("log-mel", "encoder", "adapter", "logits", "ids", "text")


@pytest.mark.weights
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*.json")) or [None], ids=lambda path: path.stem if path else "none"
)
def test_replay(path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        told = f"{FOLDER}: no golden file; where the weights are, run python scripts/golden.py MODEL CLIP..."
        if "CI" in os.environ or not FOLDER.is_dir():
            pytest.fail(told, pytrace=False)
        pytest.skip(told)
    if CACHE is None:
        monkeypatch.delenv("ARKASR_CACHE", raising=False)
    else:
        monkeypatch.setenv("ARKASR_CACHE", CACHE)
    try:
        differences = golden.replay(path)
    except ArkASRError as error:
        pytest.fail(str(error), pytrace=False)
    if differences:
        pytest.fail("\n".join(map(str, differences)), pytrace=False)


# ---- from here on: does it work? ----


Change = Callable[[dict[str, Any]], object]  # of the parsed record of a clip


@dataclass(frozen=True)
class Record:
    """A golden file of a random model and one clip of noise."""

    path: Path
    model: Path
    clip: Path

    def altered(self, change: Change) -> Path:
        """Another golden file beside it; `change` is called with its first clip."""
        raw = json.loads(self.path.read_bytes())
        change(raw["clips"][0])
        path = self.path.with_name("altered.json")
        path.write_text(json.dumps(raw), encoding="utf-8")
        return path

    def engine(self) -> pytorch.PyTorchEngine:
        return pytorch.PyTorchEngine.load(checkpoint.open_checkpoint(self.model), device="cpu")

    def observed(self) -> golden.Observed:
        return golden.observe(self.engine(), self.clip)


@pytest.fixture
def recorded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Record:
    clip = tmp_path / "noise.wav"
    noise = np.random.default_rng(0).standard_normal(24_080) * np.geomspace(0.3, 0.01, 24_080)
    soundfile.write(clip, noise, 16_000, subtype="FLOAT")
    folder = make_checkpoint(tied_embeddings=False)
    golden.write(golden.record(str(folder), [clip]), tmp_path / "golden.json")
    return Record(tmp_path / "golden.json", folder, clip)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def as_download(folder: Path, cache: Path) -> str:
    """Move a checkpoint to where a download of it would lie; the name of that."""
    commit = "c" * 40
    known = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    lock = {"repo_id": "ORG/NAME", "revision": commit, "files": known}
    (folder / pins.LOCK).write_text(json.dumps(lock))
    target = cache / "models" / "ORG--NAME" / commit
    target.parent.mkdir(parents=True)
    folder.rename(target)
    return f"ORG/NAME@{commit}"


def test_a_record_is_replayed_by_pytest(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """In processes of their own, as people run them: one file is as recorded, one altered, one model damaged since."""
    results = tmp_path / "results"
    results.mkdir()
    name = as_download(make_checkpoint(), tmp_path / "cache")
    environment = {**os.environ, "ARKASR_WEIGHTS": str(results), "ARKASR_CACHE": str(tmp_path / "cache")}
    run = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    recorded = run([sys.executable, "scripts/golden.py", name, *CLIPS, "--output", results / "same.json"])
    assert recorded.returncode == 0, recorded.stderr
    assert [line.split(":")[0] for line in recorded.stdout.splitlines()] == [str(c.relative_to(ROOT)) for c in CLIPS]
    assert {path.name for path in results.iterdir()} == {"same.json"}
    assert golden.read(results / "same.json").model == name
    assert golden.read(results / "same.json").revision == "c" * 40

    raw = json.loads((results / "same.json").read_text())
    raw["clips"][1]["adapter"]["values"][2][1] *= 1.5
    (results / "altered.json").write_text(json.dumps(raw))
    other = make_checkpoint("other")
    assert golden.main([str(other), str(CLIPS[0]), "--output", str(results / "damaged.json")]) == 0
    flip_last_byte(other / "model.safetensors")

    arguments = ["-m", "pytest", "-m", "weights", "-p", "no:cacheprovider", "tests/test_golden.py"]
    replayed = run([sys.executable, *arguments])
    assert replayed.returncode == 1
    assert "2 failed, 1 passed" in replayed.stdout
    assert "examples/audio/an4-rubout.flac: adapter: 1 of 128 values differ, first at frame" in replayed.stdout
    assert "encoder:" not in replayed.stdout
    assert "other: model.safetensors missing or not as when" in replayed.stdout


def test_the_shipped_model(tmp_path: Path) -> None:
    golden.write(golden.record("tiny", CLIPS), tmp_path / "tiny.json")
    assert golden.replay(tmp_path / "tiny.json") == []
    read = golden.read(tmp_path / "tiny.json")
    assert read.model == "tiny"
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(read.model_files) == wanted
    assert {"commit", "arkasr", "torch", "numpy", "python", "dtype"} <= set(read.made_by)
    assert [clip.file for clip in read.clips] == ["examples/audio/an4-patterson.flac", "examples/audio/an4-rubout.flac"]
    assert [clip.text for clip in read.clips] == ["P A T T E R S O N", "RUBOUT G M E F THREE NINE"]
    assert [clip.duration_s for clip in read.clips] == [2.8, 4.0]


def test_without_a_golden_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setitem(globals(), "FOLDER", golden.GOLDEN)
    with pytest.raises(pytest.skip.Exception, match=r"no golden file; .*scripts/golden.py MODEL"):
        test_replay(None, monkeypatch)
    monkeypatch.setitem(globals(), "FOLDER", golden.GOLDEN / "nowhere")
    with pytest.raises(pytest.fail.Exception, match="nowhere: no golden file"):
        test_replay(None, monkeypatch)
    monkeypatch.setitem(globals(), "FOLDER", golden.GOLDEN)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no golden file"):
        test_replay(None, monkeypatch)


def test_a_record_keeps_first_and_last_and_says_where(recorded: Record) -> None:
    clip, observed = golden.read(recorded.path).clips[0], recorded.observed()
    assert len(observed.ids) > 5
    assert len(set(observed.ids)) >= 5
    for kept, array, shape in (
        (clip.log_mel, observed.log_mel, (150, 80)),
        (clip.encoder, observed.encoder, (75, 32)),
        (clip.adapter, observed.adapter, (18, 64)),
    ):
        assert tuple(kept.shape) == array.shape == shape
        assert (len(kept.frames), len(kept.channels)) == (16, 8)
        for at, size in ((kept.frames, shape[0]), (kept.channels, shape[1])):
            assert (at[0], at[-1]) == (0, size - 1)
        np.testing.assert_allclose(kept.values, array[np.ix_(kept.frames, kept.channels)], rtol=1e-8)
    np.testing.assert_array_equal(observed.log_mel.T, audio.log_mel(audio.load(recorded.clip), 80))
    assert len(clip.logits.ids) == 20
    assert clip.logits.ids[0] == observed.logits.argmax()
    assert sorted(clip.logits.values, reverse=True) == clip.logits.values
    assert clip.ids == list(observed.ids)


def test_first_logits_are_those_of_one_plain_forward_pass(recorded: Record) -> None:
    """The hooks read the engine's own run, KV cache and all; the network without one must say the same."""
    engine = recorded.engine()
    waveform = audio.load(recorded.clip)
    prompt = engine.rules.prompt_ids(audio.num_audio_tokens(len(waveform)))
    with torch.inference_mode():
        logits = engine.network(*pytorch.pad_mels([waveform], engine.network), torch.tensor([prompt]))[0, -1]
    np.testing.assert_allclose(recorded.observed().logits, logits.numpy(), rtol=1e-4, atol=1e-5)


def add(stage: str, key: str, amount: float) -> Change:
    def change(clip: dict[str, Any]) -> None:
        clip[stage][key] += amount

    return change


def set_value(stage: str, value: Callable[[float], float]) -> Change:
    def change(clip: dict[str, Any]) -> None:
        row = clip[stage]["values"][5]
        row[3] = value(row[3])

    return change


def put(stage: str, key: str, at: int, value: Any) -> Change:
    def change(clip: dict[str, Any]) -> None:
        (clip[stage][key] if key else clip[stage])[at] = value

    return change


ALTERED: dict[str, tuple[Change, str, str]] = {
    "log-mel": (
        set_value("log_mel", lambda v: v + 2e-4), "log-mel", "1 of 128 values differ, first at frame 50, channel 34:",
    ),
    "log-mel mean": (add("log_mel", "mean", 2e-4), "log-mel", "mean of all values"),
    "log-mel shape": (
        put("log_mel", "shape", 0, 151), "log-mel", "shape [frames, channels] recorded [151, 80], now [150, 80]",
    ),
    "encoder": (set_value("encoder", lambda v: -v), "encoder", "1 of 128 values differ, first at frame 25, channel 13"),
    "encoder not a number": (set_value("encoder", lambda _: float("nan")), "encoder", "values differ"),
    "encoder std": (add("encoder", "std", 0.01), "encoder", "std of all values"),
    "adapter": (set_value("adapter", lambda v: -v), "adapter", "1 of 128 values differ, first at frame 6, channel 27:"),
    "adapter absmax": (add("adapter", "absmax", 0.1), "adapter", "absmax of all values"),
    "logits": (put("logits", "values", 4, 0.0), "logits", "rank 5: recorded id"),
    "logits id": (put("logits", "ids", 0, 3), "logits", "rank 1: recorded id 3 with"),
    "logits mean": (add("logits", "mean", 0.1), "logits", "mean of all values"),
    "logits count": (lambda clip: clip["logits"].update(num_logits=999), "logits", "recorded 999, now 276"),
    "ids": (put("ids", "", 3, 9999), "ids", "position 3: recorded 9999, now"),
    "one id more": (lambda clip: clip["ids"].append(7), "ids", "tokens, now"),
    "one id less": (lambda clip: clip["ids"].pop(), "ids", "tokens, now"),
    "text": (lambda clip: clip.update(text="hullo"), "text", "recorded 'hullo', now '"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_record_fails_at_just_its_stage(recorded: Record, name: str) -> None:
    change, stage, said = ALTERED[name]
    (difference,) = golden.replay(recorded.altered(change))
    assert (difference.clip, difference.stage) == (str(recorded.clip), stage)
    assert said in str(difference)


def test_tolerances_are_as_stated(recorded: Record) -> None:
    """1e-4 for log-mel; 2e-4 of value plus median for encoder and adapter, of the deviation for logits."""
    clip, observed = golden.read(recorded.path).clips[0], recorded.observed()
    for stage, (factor, bad) in product(ARRAYS, ((0.9, 0), (1.1, 1))):
        kept, array = vars(clip)[stage], vars(observed)[stage].copy()
        if stage == "logits":
            array[kept.ids[2]] += factor * 2e-4 * kept.std
        else:
            values = np.abs(kept.values)
            allowed = 1e-4 if stage == "log_mel" else 2e-4 * (values[1, 2] + np.median(values))
            array[kept.frames[1], kept.channels[2]] += factor * allowed
        assert len(golden.compare(clip, dataclasses.replace(observed, **{stage: array}))) == bad, stage


def test_tolerances_of_statistics(recorded: Record) -> None:
    """1e-4 for log-mel; 2e-4 of the deviation, and of itself for the largest value, elsewhere."""
    clip, observed = golden.read(recorded.path).clips[0], recorded.observed()
    for stage, name, (factor, bad) in product(ARRAYS, ("mean", "std", "absmax"), ((0.9, 0), (1.1, 1))):
        kept = vars(clip)[stage]
        allowed = 1e-4 if stage == "log_mel" else 2e-4 * (kept.absmax if name == "absmax" else kept.std)
        off = dataclasses.replace(kept, **{name: vars(kept)[name] + factor * allowed})
        differences = golden.compare(dataclasses.replace(clip, **{stage: off}), observed)
        assert [difference.stage for difference in differences] == [stage.replace("_", "-")] * bad, (stage, name)


def test_the_first_of_many_differences_is_named(recorded: Record) -> None:
    clip, observed = golden.read(recorded.path).clips[0], recorded.observed()
    kept, array = clip.encoder, observed.encoder.copy()
    array[kept.frames[3] :] += 1
    (difference,) = golden.compare(clip, dataclasses.replace(observed, encoder=array))
    assert f"104 of 128 values differ, first at frame {kept.frames[3]}, channel 0:" in str(difference)


def test_ids_may_change_rank_only_when_they_tie() -> None:
    logits = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    top = np.argsort(-logits)
    logits[top[4:6]] = logits[top[4]] + np.array([1e-4, 0], np.float32)
    recorded = golden._top_logits(logits)

    swapped = logits.copy()
    swapped[top[4:6]] = swapped[top[5:3:-1]]
    assert golden._top_ids(swapped).tolist() != recorded.ids
    assert golden._logits_difference(recorded, swapped) is None
    newcomer = logits.copy()  # an id that was not among the recorded ones, beside the last of them
    newcomer[top[20]] = newcomer[top[19]] + 1e-4
    assert top[20] in golden._top_ids(newcomer)
    assert golden._logits_difference(recorded, newcomer) is None

    apart = logits.copy()
    apart[top[[0, 1]]] = apart[top[[1, 0]]]
    assert f"rank 1: recorded id {top[0]} with" in str(golden._logits_difference(recorded, apart))
    for rank in (0, 19):
        intruder = logits.copy()
        intruder[top[200]] = intruder[top[rank]] + 1e-3
        told = f"rank {rank + 1}: recorded id {top[rank]} with {logits[top[rank]]:.6g}, now id {top[200]} with"
        assert told in str(golden._logits_difference(recorded, intruder))


def test_a_bad_number_is_seen_wherever_it_is(recorded: Record) -> None:
    clip, observed = golden.read(recorded.path).clips[0], recorded.observed()
    for stage, value, at in product(ARRAYS, (np.nan, np.inf, 1e6), (0, 1)):  # 0 is kept, 1 is not
        array = vars(observed)[stage].copy()
        array[(at,) * array.ndim] = value
        (difference,) = golden.compare(clip, dataclasses.replace(observed, **{stage: array}))
        assert difference.stage == stage.replace("_", "-")


def test_one_huge_channel_does_not_hide_the_others(recorded: Record) -> None:
    """A tolerance relative to the maximum lets every other channel of such an encoder be anything."""
    engine = recorded.engine()
    with torch.no_grad():
        network = dict(engine.network.named_parameters())
        network["encoder.layers.0.fc2.bias"][0] += 5000  # channel 0 is among those that are kept
    observed = golden.observe(engine, recorded.clip)
    golden.write(
        dataclasses.replace(golden.read(recorded.path), clips=[golden._clip(recorded.clip, observed)]), recorded.path
    )
    wrong = observed.encoder.copy()
    wrong[:, 1:] *= 1.05
    assert np.abs(wrong - observed.encoder).max() < 1e-3 * np.abs(observed.encoder).max()
    (difference,) = golden.compare(golden.read(recorded.path).clips[0], dataclasses.replace(observed, encoder=wrong))
    assert difference.stage == "encoder"


Break = Callable[[pytest.MonkeyPatch, pytorch.PyTorchEngine], object]
_log_mel, _step, _prompt_ids = audio.log_mel, pytorch._Rows.step, text.TextRules.prompt_ids
_to_text = text.TextRules.to_text


def rotate_first_half_in_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    num_dims = 2 * cos.shape[-1]
    return torch.cat((model.rotate_halves(x[..., :num_dims], cos, sin), x[..., num_dims:]), dim=-1)


def step_in_one_place(rows: pytorch._Rows, ids: torch.Tensor) -> torch.Tensor:
    logits = _step(rows, ids)
    rows.positions = rows.positions - 1
    return logits


def short_prompt_ids(rules: text.TextRules, num_audio_tokens: int) -> list[int]:
    ids = _prompt_ids(rules, num_audio_tokens)
    return ids[:-2] + ids[-1:]  # the full stop of the instruction is missing


def round_weights(_: pytest.MonkeyPatch, engine: pytorch.PyTorchEngine) -> None:
    engine.network.bfloat16().float()


BROKEN: dict[str, tuple[Break, str]] = {
    "symmetric Hann": (lambda patch, _: patch.setattr(audio, "_hann", lambda: np.hanning(400)), "log-mel"),
    "one frame late": (
        lambda patch, _: patch.setattr(audio, "log_mel", lambda w, m: np.roll(_log_mel(w, m), 1, axis=1)), "log-mel",
    ),
    "another dynamic range": (lambda patch, _: patch.setattr(audio, "DYNAMIC_RANGE", 1.0), "log-mel"),
    "bfloat16": (lambda _, engine: engine.network.bfloat16(), "log-mel"),
    "weights rounded to bfloat16": (round_weights, "encoder"),
    "RoPE in halves": (
        lambda patch, _: patch.setattr(model, "rotate_interleaved", rotate_first_half_in_halves), "encoder",
    ),
    "RoPE on all dimensions": (
        lambda patch, engine: patch.setattr(engine.network.encoder, "rope_dims", 8), "encoder",
    ),
    "RoPE of another theta": (lambda patch, _: patch.setattr(model, "ENCODER_ROPE_THETA", 1e6), "encoder"),
    "no RoPE": (lambda patch, engine: patch.setattr(engine.network.encoder, "use_rope", False), "encoder"),
    "tanh GELU": (lambda patch, _: patch.setattr(F, "gelu", partial(F.gelu, approximate="tanh")), "encoder"),
    "other activation": (lambda patch, engine: patch.setattr(engine.network.adapter, "activation", "relu"), "adapter"),
    "no norm": (lambda patch, engine: patch.setattr(engine.network.adapter, "norm", torch.nn.Identity()), "adapter"),
    "decoder's RoPE interleaved": (
        lambda patch, _: patch.setattr(model, "rotate_halves", model.rotate_interleaved), "logits",
    ),
    "decoder's theta": (lambda patch, engine: patch.setattr(engine.network.decoder, "rope_theta", 1e4), "logits"),
    "another prompt": (lambda patch, _: patch.setattr(text.TextRules, "prompt_ids", short_prompt_ids), "logits"),
    "untied head": (lambda patch, engine: patch.setattr(engine.network.decoder, "head", None), "logits"),
    "cache overwritten": (lambda patch, _: patch.setattr(pytorch._Rows, "step", step_in_one_place), "ids"),
    "text with something before it": (
        lambda patch, _: patch.setattr(text.TextRules, "to_text", lambda *given: "x" + _to_text(*given)), "text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_caught_where_it_is_broken(
    recorded: Record, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    breaks, stage = BROKEN[name]
    engine = recorded.engine()
    breaks(monkeypatch, engine)
    differences = golden.compare(golden.read(recorded.path).clips[0], golden.observe(engine, recorded.clip))
    assert differences
    assert differences[0].stage == stage
    order = [STAGES.index(difference.stage) for difference in differences]
    assert order == sorted(order)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_checkpoint_is_named(recorded: Record, name: str) -> None:
    path = recorded.model / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        CheckpointMismatchError, match=rf"{recorded.model}: {name} missing or not as when .*golden\.json"
    ):
        golden.replay(recorded.path)
    path.unlink()
    with pytest.raises(CheckpointMismatchError, match=rf": {name} missing or not as when"):
        golden.replay(recorded.path)


def test_only_files_of_a_checkpoint_are_recorded_and_all_that_changed_are_named(recorded: Record) -> None:
    assert set(golden.read(recorded.path).model_files) == {"config.json", "model.safetensors", "tokenizer.json"}
    (recorded.model / "modeling.py").write_text("raise SystemExit\n")
    assert set(golden.record(str(recorded.model), [recorded.clip]).model_files) == {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    for name in ("config.json", "model.safetensors"):  # of the same size
        flip_last_byte(recorded.model / name)
    with pytest.raises(CheckpointMismatchError, match=r"config\.json, model\.safetensors missing or not as when"):
        golden.replay(recorded.path)


def test_clips_and_models_that_are_gone_or_other_ones_are_named(recorded: Record) -> None:
    recorded.clip.write_bytes(recorded.clip.read_bytes() + b"\0\0")
    with pytest.raises(AudioError, match=r"noise\.wav: not the audio that .*golden\.json was recorded from"):
        golden.replay(recorded.path)
    recorded.clip.unlink()
    with pytest.raises(AudioError, match=r"noise\.wav: no such file"):
        golden.replay(recorded.path)
    with pytest.raises(AudioError, match=r"a\.wav, .*b\.wav: no such file"):
        golden.record("tiny", [Path("a.wav"), CLIPS[0], Path("b.wav")])
    soundfile.write(recorded.clip, np.zeros(16_000), 16_000)
    recorded.model.rename(recorded.model.with_name("moved"))
    with pytest.raises((ModelNotFoundError, AudioError), match=r"model|noise"):
        golden.replay(recorded.path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"clips": [{}]}'])
def test_a_file_that_is_no_golden_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.json: not a golden file"):
        golden.replay(tmp_path / "x.json")
    with pytest.raises(UsageError, match=r"not a golden file .*Is a directory"):
        golden.replay(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda clip: clip["encoder"]["frames"].pop(), "values do not fit"),
        (put("encoder", "frames", 3, 999), "do not fit the shape"),
        (put("adapter", "channels", 7, 64), "do not fit the shape"),
        (put("logits", "ids", 3, 276), "ids do not fit"),
        (lambda clip: clip["logits"]["ids"].pop(), "ids do not fit"),
    ],
)
def test_what_fits_no_array_is_no_golden_file(recorded: Record, change: Change, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        golden.replay(recorded.altered(change))


@pytest.mark.parametrize(("key", "empty"), [("clips", []), ("model_files", {}), ("model_files", None)])
def test_a_file_that_would_compare_nothing_is_refused(recorded: Record, key: str, empty: object) -> None:
    raw = json.loads(recorded.path.read_bytes())
    if empty is None:
        del raw[key]["model.safetensors"]
    recorded.path.write_text(json.dumps({**raw, key: raw[key] if empty is None else empty}), encoding="utf-8")
    with pytest.raises(UsageError, match="it would compare nothing"):
        golden.replay(recorded.path)


def test_a_folder_is_recorded_so_that_it_is_found_from_anywhere(
    recorded: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert golden.read(recorded.path).model == str(recorded.model)
    monkeypatch.chdir(tmp_path)
    outside = golden.record("model", [Path("noise.wav")])
    assert (outside.model, outside.clips[0].file) == (str(recorded.model), str(recorded.clip))

    monkeypatch.setattr(golden, "ROOT", tmp_path)  # as if they lay in the repository
    inside = golden.record(str(recorded.model), [recorded.clip])
    assert (inside.model, inside.clips[0].file) == ("model", "noise.wav")
    monkeypatch.chdir("/")
    golden.write(inside, recorded.path)
    assert golden.replay(recorded.path) == []


def test_a_new_record_takes_the_old_one_s_place_at_once(
    recorded: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a rename: who has the old file open reads it to its end. And one line holds one row of numbers."""
    folder = tmp_path / "golden"
    folder.mkdir()
    monkeypatch.setattr(golden, "GOLDEN", folder)
    (tmp_path / "old").write_text("old")
    (folder / "model.json").hardlink_to(tmp_path / "old")
    assert golden.main([str(recorded.model), str(recorded.clip)]) == 0
    assert (tmp_path / "old").read_text() == "old"
    assert golden.replay(folder / "model.json") == []
    lines = (folder / "model.json").read_text(encoding="utf-8").splitlines()
    assert sum(line.count(",") == 8 and line.startswith("     [ ") for line in lines) == 3 * 15
    assert len(lines) < 150

    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "cache"))
    assert golden.main([as_download(recorded.model, tmp_path / "cache"), str(recorded.clip)]) == 0
    assert {path.name for path in folder.iterdir()} == {"model.json", "name.json"}


def test_mistakes_are_one_line_and_leave_the_old_file(
    recorded: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = recorded.path.read_bytes()
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * 16_000), 16_000)
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16_000)
    output = ["--output", str(recorded.path)]
    for arguments, said in (
        (["nowhere", str(recorded.clip), *output], "nowhere: no such model"),
        ([str(recorded.model), "a.wav", "b.wav", *output], "a.wav, b.wav: no such file"),
        (
            [str(recorded.model), str(recorded.clip), str(tmp_path / "long.wav"), *output],
            "long.wav: 31.00 s long; give",
        ),
        ([str(recorded.model), str(tmp_path / "short.wav"), *output], "short.wav: 0.01 s long; give a clip of"),
        ([str(recorded.model), str(recorded.clip), "--output", str(tmp_path / "no" / "x.json")], "no: no such folder"),
    ):
        assert golden.main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert said in printed.err
    assert recorded.path.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
