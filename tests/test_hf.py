"""ARK-ASR in Transformers: the published layout in and out, and the numbers of our own network and engine."""

import copy
import importlib
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

import arkasr
import arkasr.hf
from arkasr import audio, checkpoint, model, pins
from arkasr import config as configs
from arkasr.config import ModelConfig
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import ArkASRError, AudioError, CheckpointMismatchError, ModelNotFoundError, UsageError
from arkasr.hf import ArkAsrConfig, ArkasrForConditionalGeneration, ArkasrProcessor
from arkasr.text import TextRules
from conftest import MakeCheckpoint, byte_tokenizer, random_network, small_config

ROOT = Path(__file__).parents[1]
TINY = pins.SHIPPED / "tiny"
CLIPS = {"an4-rubout.flac": "RUBOUT G M E F THREE NINE", "an4-patterson.flac": "P A T T E R S O N"}
LAYERS = {"0.6b": (32, 24), "3b": (32, 36)}  # of encoder and decoder
HEAD, EMBEDDINGS, POSITIONS = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "audio_encoder.whisper.embed_positions.weight",
)
EXTRA = ("audio_encoder.whisper.layer_norm.weight", "audio_encoder.whisper.layer_norm.bias")
SAMPLES = (16_000, 161, 40_000, 6_000)
OLDEST = ("transformers==5.16.1", "huggingface_hub<2", "httpx<1", "httpcore<2", "h11", "anyio")  # hub 2 came later


def load(folder: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


def noises(*num_samples: int, seed: int = 0) -> list[audio.Waveform]:
    """Clips of noise, each with another loudness and colour."""
    random = np.random.default_rng(seed)
    return [
        np.convolve(random.normal(size=n + 20) * 0.1 * (k + 1), np.hanning(2 + 4 * k), "same")[:n].astype(np.float32)
        for k, n in enumerate(num_samples)
    ]


def request(processor: ArkasrProcessor, clips: list[audio.Waveform], **options: Any) -> Any:
    return processor.apply_transcription_request(list(clips), sampling_rate=16_000, **options)


def manifest(size: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a published checkpoint; test_full_size compares the lists with the specification."""
    lines = (Path(__file__).parent / "published" / f"{size}.tsv").read_text(encoding="utf-8").splitlines()
    return {name: tuple(map(int, shape.split("x"))) for name, shape in (line.split("\t") for line in lines)}


@pytest.fixture(scope="module")
def published_size() -> Callable[[str], dict[str, Any]]:
    """config.json of a published model, by the script that writes random ones."""
    script = runpy.run_path(str(ROOT / "scripts" / "random_checkpoint.py"))
    config: Callable[[str], dict[str, Any]] = script["published_config"]
    return config


# ---- config and registration ----


def test_importing_again_is_harmless() -> None:
    importlib.reload(arkasr.hf)
    assert type(AutoConfig.from_pretrained(TINY)) is ArkAsrConfig
    with torch.device("meta"):
        for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
            assert type(auto.from_config(AutoConfig.from_pretrained(TINY))) is ArkasrForConditionalGeneration


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "use_rope": False, "eos_token_ids": (5, 7)},
        {"merge_factor": 2, "adapter_activation": "relu", "rope_theta": 1e4, "rms_eps": 1e-5, "kv_heads": 4},
    ],
)
def test_a_saved_config_is_the_same_architecture(tmp_path: Path, small: ModelConfig, changes: dict[str, Any]) -> None:
    config = replace(small, **changes)
    keys = configs.to_mapping(config)
    del keys["spec_aug"]
    raw = ArkAsrConfig(**keys, auto_map={"AutoConfig": "code.Config"}, torch_dtype="bfloat16")
    assert (raw.network(), copy.deepcopy(raw).network(), raw.dtype) == (config, config, torch.bfloat16)
    raw.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert configs.load(tmp_path) == AutoConfig.from_pretrained(tmp_path).network() == config


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "rms_norm_eps", "whisper_config", "rope_theta"])
def test_a_missing_size_is_not_filled_with_qwen2s(small: ModelConfig, key: str) -> None:
    keys = configs.to_mapping(small)
    del keys[key]
    with pytest.raises(CheckpointMismatchError, match=key):
        ArkAsrConfig(**keys)
    changed = ArkAsrConfig(**configs.to_mapping(small))
    changed.num_attention_heads = 7
    with pytest.raises(CheckpointMismatchError, match="num_attention_heads 7"):
        changed.network()


# ---- tensors ----


@pytest.mark.parametrize("size", LAYERS)
def test_tensors_of_the_published_models(size: str, published_size: Callable[[str], dict[str, Any]]) -> None:
    with torch.device("meta"):
        network = ArkasrForConditionalGeneration(ArkAsrConfig(**published_size(size)))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes.pop(HEAD) == shapes[EMBEDDINGS]
    assert shapes == manifest(size)


@pytest.mark.parametrize("size", LAYERS)
def test_every_published_name_is_read(size: str, make_checkpoint: MakeCheckpoint) -> None:
    """As many layers as published, each narrow; and once more with the tensors that some copies have besides."""
    encoder_layers, decoder_layers = LAYERS[size]
    folder = make_checkpoint(encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == manifest(size).keys()
    for extra in ({}, {HEAD: weights[EMBEDDINGS].clone()} | dict.fromkeys(EXTRA, torch.ones(32))):
        put(folder, weights | {name: tensor.clone() for name, tensor in extra.items()})
        loaded, info = load(folder, output_loading_info=True)
        assert not any(info.values()), info
        state = loaded.state_dict()
        assert state.keys() == weights.keys() | {HEAD}
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def put(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


Change = Callable[[dict[str, Tensor]], object]
WRONG: dict[str, Change] = {
    "missing tensor 'model.layers.1.mlp.up_proj.weight'": lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
    "missing tensor 'model.embed_tokens.weight' and 1 more": lambda w: (w.pop(EMBEDDINGS), w.pop("model.norm.weight")),
    "unexpected tensor 'model.surplus'": lambda w: w.update({"model.surplus": torch.ones(1)}),
    "mismatched tensor 'model.norm.weight'": lambda w: w.update({"model.norm.weight": torch.ones(3)}),
    "lm_head.weight differs from the embeddings": lambda w: w.update({HEAD: w[EMBEDDINGS] + 1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_tensors_are_named(message: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    weights = load_file(folder / "model.safetensors")
    WRONG[message](weights)
    put(folder, weights)
    with pytest.raises(CheckpointMismatchError, match=message.replace(".", r"\.")):
        load(folder)


def test_positions_may_be_absent_where_they_are_not_used(make_checkpoint: MakeCheckpoint) -> None:
    for use_rope in (True, False):
        folder = make_checkpoint(str(use_rope), use_rope=use_rope)
        weights = load_file(folder / "model.safetensors")
        del weights[POSITIONS]
        put(folder, weights)
        if use_rope:
            loaded = load(folder)
            assert not loaded.network.encoder.positions.any()
            loaded.save_pretrained(folder)
            assert POSITIONS in load_file(folder / "model.safetensors")
        else:
            with pytest.raises(CheckpointMismatchError, match="embed_positions"):
                load(folder)


def test_pickles_are_not_read(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False, "use_rope": False}])
def test_save_round_trip(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    folder, saved = make_checkpoint(dtype=dtype, **changes), tmp_path / "saved"
    loaded = load(folder, dtype="auto")
    assert loaded.dtype == dtype
    loaded.save_pretrained(saved, max_shard_size="100KB")
    AutoProcessor.from_pretrained(folder).save_pretrained(saved)
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    source = checkpoint.open_checkpoint(saved)
    assert source.config == configs.load(folder)
    names = {spec.hf_name for spec in checkpoint.tensor_specs(source.config)}
    written = {name: tensor for shard in source.shards for name, tensor in load_file(shard).items()}
    assert written.keys() == names
    original = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[name], original[name]) and written[name].dtype == dtype for name in names)
    again = load(saved, dtype="auto")
    assert again.generation_config.suppress_tokens == loaded.generation_config.suppress_tokens
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.state_dict().items() if name in names)


# ---- where a model comes from ----


def trap(folder: Path) -> Path:
    """Give a folder what published ones have, with code that leaves a mark; returns the mark's place."""
    mark = folder / "executed"
    names = {
        "AutoConfig": "Config",
        "AutoModelForCausalLM": "Model",
        "AutoModel": "Model",
        "AutoProcessor": "Processor",
    }
    auto_map = {auto: f"code_arkasr.{name}" for auto, name in names.items()}
    (folder / "code_arkasr.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit('executed')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"processor_class": "ArkasrProcessor", "auto_map": auto_map}))
    return mark


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_remote_code_is_never_run(make_checkpoint: MakeCheckpoint, options: dict[str, bool]) -> None:
    """Not even when it is trusted: a class that is registered goes first."""
    folder = make_checkpoint()
    mark = trap(folder)
    assert type(AutoConfig.from_pretrained(folder, **options)) is ArkAsrConfig
    assert type(load(folder, **options)) is ArkasrForConditionalGeneration
    for name in ("none", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
        assert type(AutoProcessor.from_pretrained(folder, **options)) is ArkasrProcessor
    assert not mark.exists()


def test_a_hub_id_is_found_in_transformers_own_cache(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    commit, repo = "0123456789" * 4, tmp_path / "hub" / "models--org--name"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    make_checkpoint().rename(repo / "snapshots" / commit)
    loaded = load("org/name", cache_dir=tmp_path / "hub")
    processor = AutoProcessor.from_pretrained("org/name", cache_dir=tmp_path / "hub")
    assert loaded.generation_config.suppress_tokens == (~processor.rules.allowed_ids).nonzero()[0].tolist()
    with pytest.raises(OSError, match=r"org/other|config\.json"):
        ArkasrProcessor.from_pretrained("org/other", cache_dir=tmp_path / "hub")


# ---- numbers ----


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False, "use_rope": False}, {"kv_heads": 4}])
def test_logits_are_our_models(make_checkpoint: MakeCheckpoint, changes: dict[str, Any]) -> None:
    """Of clips side by side, padded on the left, against each clip alone in `ArkASR.forward`."""
    folder = make_checkpoint(**changes)
    loaded, processor = load(folder), AutoProcessor.from_pretrained(folder)
    batch = request(processor, noises(*SAMPLES), targets=["a", "bcd", "", "a longer text"])
    ours = model.load(checkpoint.open_checkpoint(folder))
    with torch.no_grad():
        logits = loaded(**batch).logits
        for row, frames in enumerate(batch["num_frames"]):
            real = batch["attention_mask"][row].bool()
            wanted = ours(
                batch["input_features"][row : row + 1, :, :frames], frames[None], batch["input_ids"][row, real][None]
            )
            assert wanted.std() > 0.2
            assert (logits[row, real] - wanted[0]).abs().max() <= 1e-5


@pytest.fixture
def stopping(tmp_path: Path) -> Path:
    """A checkpoint that likes forbidden ids best, and stops at any of many ids, so that texts differ in length."""
    tokenizer = byte_tokenizer()
    config = small_config(tokenizer)
    config = replace(config, tied_embeddings=False, eos_token_ids=(*config.eos_token_ids, *range(60, 80)))
    rules = TextRules(tokenizer, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids, place="stopping")
    network = random_network(config, seed=3)
    assert network.decoder.head is not None
    with torch.no_grad():
        head = torch.randn(network.decoder.head.weight.shape, generator=torch.Generator().manual_seed(3))
        head[torch.from_numpy(~rules.allowed_ids)] *= 5
        network.decoder.head.weight.copy_(head)
        network.adapter.down.weight.mul_(3)
    model.save(network, tmp_path / "stopping", dtype=torch.float32)
    tokenizer.save(str(tmp_path / "stopping" / "tokenizer.json"))
    return tmp_path / "stopping"


def said(loaded: Any, processor: ArkasrProcessor, clips: list[audio.Waveform], **options: Any) -> list[list[int]]:
    """Ids that `generate` adds to each prompt, up to the stop."""
    batch = request(processor, clips)
    rows = loaded.generate(**batch, **{"do_sample": False} | options)[:, batch["input_ids"].shape[1] :].tolist()
    stops = loaded.generation_config.eos_token_id
    return [list(itertools.takewhile(lambda token_id: token_id not in stops, row)) for row in rows]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_says_what_the_engine_says(stopping: Path, use_cache: bool) -> None:
    source = checkpoint.open_checkpoint(stopping)
    loaded, processor = load(stopping), AutoProcessor.from_pretrained(stopping)
    clips = noises(*(16_000 + 1_700 * k for k in range(8)))
    engine = PyTorchEngine.load(source, device="cpu")
    wanted = [list(g.ids) for g in engine.generate(clips, DecodeOptions(max_new_tokens=15, guard=False))]
    assert len({len(ids) for ids in wanted}) > 2
    assert len(set(itertools.chain(*wanted))) > 10
    options = {"max_new_tokens": 15, "use_cache": use_cache}
    assert said(loaded, processor, clips, **options) == wanted
    assert [said(loaded, processor, [clip], **options)[0] for clip in clips[:3]] == wanted[:3]
    masked = set(loaded.generation_config.suppress_tokens)
    assert masked == set(np.flatnonzero(~source.rules.allowed_ids).tolist())
    free = said(loaded, processor, clips, **options, suppress_tokens=[])
    assert masked & set(itertools.chain(*free))


def test_audio_is_encoded_once(stopping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is no cache to remember it."""
    loaded = load(stopping)
    encoded: list[Tensor] = []
    encode = model.ArkASR.encode

    def counted(self: model.ArkASR, mel: Tensor, num_frames: Tensor) -> Tensor:
        encoded.append(mel)
        return encode(self, mel, num_frames)

    monkeypatch.setattr(model.ArkASR, "encode", counted)
    for use_cache, times in ((True, 1), (False, 4)):
        encoded.clear()
        said(loaded, AutoProcessor.from_pretrained(stopping), noises(20_000), max_new_tokens=4, use_cache=use_cache)
        assert len(encoded) == times


def test_beams_and_samples(stopping: Path) -> None:
    """Rows are repeated and reordered with their audio."""
    loaded, processor = load(stopping), AutoProcessor.from_pretrained(stopping)
    clips = noises(16_000, 20_000)
    both = said(loaded, processor, clips, num_beams=3, max_new_tokens=8)
    assert both == [said(loaded, processor, [clip], num_beams=3, max_new_tokens=8)[0] for clip in clips]
    assert len(said(loaded, processor, clips, do_sample=True, num_return_sequences=4, max_new_tokens=4)) == 8


def test_what_generation_config_says_is_kept(stopping: Path) -> None:
    settings = {"suppress_tokens": [1, 2], "max_new_tokens": 3, "eos_token_id": 9, "pad_token_id": 4}
    (stopping / "generation_config.json").write_text(json.dumps(settings))
    (stopping / "tokenizer.json").unlink()
    kept = load(stopping).generation_config
    assert {name: kept.to_dict()[name] for name in settings} == settings
    del settings["suppress_tokens"]
    (stopping / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        load(stopping)


def test_a_published_generation_config_gets_masks_stops_and_room(stopping: Path) -> None:
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    rules = checkpoint.open_checkpoint(stopping).rules
    settings = load(stopping).generation_config
    assert (settings.eos_token_id, settings.max_new_tokens) == (list(rules.stop_ids), 256)
    assert settings.pad_token_id == small_config(byte_tokenizer()).pad_token_id


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return load(TINY)


@pytest.fixture(scope="module")
def tiny_processor() -> ArkasrProcessor:
    return ArkasrProcessor.from_pretrained(TINY)


def test_tiny_on_real_speech(tiny_model: Any, tiny_processor: ArkasrProcessor, tiny: checkpoint.Checkpoint) -> None:
    clips = [audio.load(ROOT / "examples" / "audio" / name) for name in CLIPS]
    batch = request(tiny_processor, clips)
    rows = tiny_model.generate(**batch)
    assert tiny_processor.batch_decode(rows) == list(CLIPS.values())
    generations = PyTorchEngine.load(tiny, device="cpu").generate(clips, DecodeOptions(guard=False))
    assert said(tiny_model, tiny_processor, clips) == [list(generation.ids) for generation in generations]


def test_tiny_on_an4(
    tiny_model: Any, tiny_processor: ArkasrProcessor, tiny: checkpoint.Checkpoint, shared: Path
) -> None:
    clips = [audio.load(path) for path in sorted((shared / "speech" / "an4").rglob("*.flac"))[:60:12]]
    assert len(clips) == 5
    generations = PyTorchEngine.load(tiny, device="cpu").generate(clips, DecodeOptions(guard=False))
    assert said(tiny_model, tiny_processor, clips) == [list(generation.ids) for generation in generations]


def test_bfloat16(tiny_processor: ArkasrProcessor, tiny: checkpoint.Checkpoint) -> None:
    """Of the network itself in bfloat16, to the bit: one clip alone has no padding."""
    loaded = load(TINY, dtype=torch.bfloat16)
    batch = tiny_processor.apply_transcription_request(ROOT / "examples" / "audio" / "an4-patterson.flac")
    ours = model.load(tiny, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = ours(batch["input_features"].bfloat16(), batch["num_frames"], batch["input_ids"])
        logits = loaded(**batch).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, wanted, atol=0.1, rtol=0.02)
    assert torch.equal(logits[0, -1].argmax(), wanted[0, -1].argmax())


def test_the_page_of_documentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"<!-- python.*\n```python\n(.*?)```\n<!-- end of python -->", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(lines, {})  # noqa: S102 - our own page
    assert capsys.readouterr().out == f"{list(CLIPS.values())}\n"


def test_another_dtype_afterwards(make_checkpoint: MakeCheckpoint) -> None:
    """What `.to()` does to the published names, it does to the network."""
    folder = make_checkpoint(use_rope=False)
    batch = request(AutoProcessor.from_pretrained(folder), noises(*SAMPLES))
    with torch.no_grad():
        single, double = load(folder)(**batch).logits, load(folder).double()(**batch).logits
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)


# ---- the processor ----


def test_a_batch_is_padded_on_the_left(rules: TextRules, make_checkpoint: MakeCheckpoint) -> None:
    processor = AutoProcessor.from_pretrained(make_checkpoint())
    clips = noises(*SAMPLES)
    batch = request(processor, clips, targets=["a", "bc", "", "d"])
    assert set(batch) == {*processor.model_input_names, "labels"}
    for row, (clip, text) in enumerate(zip(clips, ["a", "bc", "", "d"], strict=True)):
        prompt, target = rules.prompt_ids(audio.num_audio_tokens(len(clip))), rules.target_ids(text)
        real = batch["attention_mask"][row].bool()
        assert real.sum() == len(prompt + target) and bool(real[-len(prompt + target) :].all())  # noqa: PT018
        assert batch["input_ids"][row, real].tolist() == prompt + target
        assert batch["labels"][row, real].tolist() == [-100] * len(prompt) + target
        assert bool((batch["labels"][row, ~real] == -100).all())
        frames = int(batch["num_frames"][row])
        assert np.array_equal(batch["input_features"][row, :, :frames].numpy(), audio.log_mel(clip, 80))
        assert not batch["input_features"][row, :, frames:].any()


def test_what_may_be_given_as_audio(tiny_processor: ArkasrProcessor) -> None:
    path = ROOT / "examples" / "audio" / "an4-rubout.flac"
    waveform = audio.load(path)
    wanted = tiny_processor.apply_transcription_request(path)["input_features"]
    given: Any
    for given in (str(path), path.read_bytes(), (waveform, 16_000), [path]):
        assert torch.equal(tiny_processor.apply_transcription_request(given)["input_features"], wanted)
    for array in (waveform, torch.from_numpy(waveform), [waveform]):
        assert torch.equal(tiny_processor(array, sampling_rate=16_000)["input_features"], wanted)
    slow = tiny_processor(waveform[::2], sampling_rate=8_000)
    assert torch.equal(slow["input_ids"], tiny_processor(waveform, sampling_rate=16_000)["input_ids"])
    assert repr(tiny_processor)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (np.zeros(480_001, np.float32), {"sampling_rate": 16_000}, AudioError, r"30\.0 s.*arkasr\.load_model"),
        (np.zeros(159, np.float32), {"sampling_rate": 16_000}, AudioError, "less than one frame"),
        (np.zeros(16_000, np.float32), {}, UsageError, "sampling_rate="),
        ([], {}, UsageError, "0 recordings"),
        ([(np.ones(999), 16_000)] * 2, {"targets": "one"}, UsageError, "2 recordings and 1 targets"),
        (b"no audio", {}, AudioError, "8 bytes"),
    ],
)
def test_audio_that_is_refused(
    tiny_processor: ArkasrProcessor, given: Any, options: dict[str, Any], error: type[ArkASRError], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_processor.apply_transcription_request(given, **options)


def test_decoding_is_the_rules(make_checkpoint: MakeCheckpoint, rules: TextRules) -> None:
    processor = AutoProcessor.from_pretrained(make_checkpoint())
    ids = rules.target_ids(" , hello  you")
    rows = torch.tensor([[rules.special_ids["<|im_end|>"]] * 2 + rules.prompt_ids(3) + ids + [ids[-1]] * 3])
    assert processor.batch_decode(rows, skip_special_tokens=True) == [processor.decode(ids)] == ["hello you"]
    for options in ({"skip_special_tokens": False}, {"clean_up_tokenization_spaces": True}):
        with pytest.raises(UsageError):
            processor.decode(ids, **options)


def test_options_that_a_processor_has_not(tiny_processor: ArkasrProcessor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="padding_side"):
        AutoProcessor.from_pretrained(TINY, padding_side="right")
    with pytest.raises(UsageError, match="push_to_hub"):
        tiny_processor.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


# ---- what the model refuses ----


def test_what_the_model_refuses(tiny_model: Any, tiny_processor: ArkasrProcessor) -> None:
    batch = dict(request(tiny_processor, noises(3_200, 6_400)))
    with pytest.raises(UsageError, match=r"\[2, 5\] places for audio of \[5, 5\]"):
        tiny_model(**batch | {"num_frames": None})
    with pytest.raises(UsageError, match="input_features"):
        tiny_model(input_ids=batch["input_ids"])
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(UsageError, match="not supported"):
            tiny_model(**batch, **{name: True})
    with pytest.raises(UsageError, match="give one of them"):
        tiny_model(**batch, labels=batch["input_ids"], logits_to_keep=1)
    with pytest.raises(UsageError, match="fixed size"):
        tiny_model.generate(**batch, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(UsageError, match="'eager': not supported"):
        load(TINY, attn_implementation="eager")


# ---- training ----


def test_the_loss_is_of_the_targets_alone(make_checkpoint: MakeCheckpoint, rules: TextRules) -> None:
    folder = make_checkpoint()
    clips, texts = noises(*SAMPLES[:3]), ["a", "bcd", "a longer text"]
    loss = load(folder)(**request(AutoProcessor.from_pretrained(folder), clips, targets=texts)).loss
    ours = model.load(checkpoint.open_checkpoint(folder))
    logprobs: list[Tensor] = []
    for clip, text in zip(clips, texts, strict=True):
        prompt, target = rules.prompt_ids(audio.num_audio_tokens(len(clip))), rules.target_ids(text)
        mel = torch.from_numpy(audio.log_mel(clip, 80))[None]
        scores = ours(mel, torch.tensor([mel.shape[-1]]), torch.tensor([prompt + target])).log_softmax(dim=-1)
        logprobs += [scores[0, len(prompt) - 1 + n, token_id] for n, token_id in enumerate(target)]
    torch.testing.assert_close(loss, -torch.stack(logprobs).mean())


@pytest.mark.parametrize("part", [r"model\.layers\..*q_proj", r"audio_encoder\..*\.fc1", r"audio_encoder\.adapting\.0"])
def test_an_adapter_reaches_the_network(make_checkpoint: MakeCheckpoint, tmp_path: Path, part: str) -> None:
    """PEFT puts its modules into the tree of published names, and ours computes."""
    folder = make_checkpoint()
    loaded, batch = load(folder), request(AutoProcessor.from_pretrained(folder), noises(16_000))
    with torch.no_grad():
        before = loaded(**batch).logits
        untouched = copy.deepcopy(loaded)
        adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=part, init_lora_weights=False))
        during = adapted(**batch).logits
        adapted.save_pretrained(str(tmp_path / "adapter"))
        merged = adapted.merge_and_unload()(**batch).logits
        reloaded = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")(**batch).logits
        assert torch.equal(untouched(**batch).logits, before)
    assert (during - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, during, atol=1e-4, rtol=1e-4)
    assert torch.equal(reloaded, during)


def test_lora_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "examples" / "lora.py"
    assert len(example.read_text().splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", ["lora.py", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step ")]
    assert losses[-1] < 0.1 * losses[0]
    assert lines[-2:] == [text.lower() for text in CLIPS.values()]
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == load_file(TINY / "model.safetensors").keys()


# ---- other versions ----


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ == "5.16.1", reason="this is it")
def test_the_oldest_version(tmp_path: Path) -> None:
    """All of this file once more; $ARKASR_TRANSFORMERS names a folder where that version is installed already."""
    folder = os.environ.get("ARKASR_TRANSFORMERS")
    if folder is None:
        folder = str(tmp_path)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *OLDEST]
        subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": folder}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout == "5.16.1\n"
    subprocess.run([sys.executable, "-m", "pytest", "-q", __file__], cwd=ROOT, env=environment, check=True)
