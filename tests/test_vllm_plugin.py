"""The vLLM plugin below its server: registering, embeddings, shared clips, weights, and texts that come in pieces.

Run by scripts/vllm.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from arkasr import audio, checkpoint, model, text
from arkasr.checkpoint import IGNORED, Checkpoint
from arkasr.config import ModelConfig
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.engines.vllm import VllmEngine
from arkasr.errors import AudioError, CheckpointMismatchError
from conftest import byte_tokenizer, random_network, small_config
from test_engine import clips, noise
from vllm_serving import ENVIRONMENT, need_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> Iterator[None]:
    need_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_PLUGINS", "arkasr")
        yield


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Heads of 32, the smallest of vLLM's on the CPU, and a head of its own."""
    return replace(small_config(byte_tokenizer()), decoder_heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def source(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("random")
    model.save(random_network(config, seed=3), folder, dtype=torch.float32)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return checkpoint.open_checkpoint(folder)


@pytest.fixture(scope="module")
def engine(source: Checkpoint) -> VllmEngine:
    return VllmEngine.load(source, enforce_eager=True)


@pytest.fixture
def plugged(engine: VllmEngine) -> Any:
    """The plugin's model inside of the engine."""
    (inside,) = engine.llm.apply_model(lambda network: network)
    return inside


# ---- registering ----


def alone(program: str, **environment: str) -> dict[str, Any]:
    """What a program prints last, as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_to_register_is_cheap_and_lazy_and_may_be_repeated() -> None:
    told = alone("""
import json, os, sys, time
from vllm import ModelRegistry
import vllm.model_executor.models.config
from importlib.metadata import entry_points
before = dict(os.environ)
started = time.process_time()
(plugin,) = entry_points(group="vllm.general_plugins", name="arkasr")
register = plugin.load()
register(); first = ModelRegistry.models["ArkasrForConditionalGeneration"]; register()
spent_s = time.process_time() - started
from transformers import AutoConfig
print(json.dumps({
    "spent_s": spent_s, "config": AutoConfig.for_model("arkasr").__class__.__name__,
    "same": ModelRegistry.models["ArkasrForConditionalGeneration"] is first,
    "heavy": [name for name in sys.modules if name in ("arkasr.vllm_plugin.model", "arkasr.vllm_plugin.processing")],
    "environment": before == dict(os.environ),
}))""")
    assert told.pop("spent_s") < 0.5
    assert told == {"config": "ArkAsrConfig", "same": True, "heavy": [], "environment": True}


def test_an_unknown_vllm_is_told_and_serves_other_models() -> None:
    told = alone("""
import json, logging, vllm
said = []
handler = logging.Handler(); handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("arkasr").addHandler(handler)
from vllm import ModelRegistry
from arkasr.vllm_plugin import register
vllm.__version__ = "0.40.1"
register()
try:
    ModelRegistry.models["ArkasrForConditionalGeneration"].load_model_cls()
except RuntimeError as error:
    raised = [type(error).__name__, str(error)]
print(json.dumps({"said": said, "raised": raised, "other": "Qwen2ForCausalLM" in ModelRegistry.get_supported_archs()}))
""")
    line = "vLLM 0.40.1: the arkasr plugin knows 0.32 and 0.33; pip install 'arkasr[vllm]' fetches one"
    assert told == {"said": [line], "raised": ["UnknownVllmError", line], "other": True}


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.33.4", True), ("0.33.1.dev3+g1", True), ("0.3.2", False), ("0.34.0", False), ("dev", False)],
)
def test_which_versions_are_known(version: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from arkasr.vllm_plugin import UnknownVllmError, check_version

    monkeypatch.setattr("vllm.__version__", version)
    if known:
        check_version()
    else:
        with pytest.raises(UnknownVllmError, match=r"^vLLM "):
            check_version()


def test_a_hub_ids_token_rules_are_those_of_its_files(source: Checkpoint, tmp_path: Path) -> None:
    """They are read from Hugging Face's cache; there a file is a link to a blob."""
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(folder.name)
    shutil.copy(source.folder / "tokenizer.json", folder.parents[1] / "blobs" / "1234")
    (folder / "tokenizer.json").symlink_to("../../blobs/1234")
    config = source.config
    told = alone(
        f"""
import json
from arkasr.vllm_plugin.processing import _rules
rules = _rules("org/name", None, {config.vocab_size}, {config.eos_token_ids}, {config.audio_token_id})
print(json.dumps({{"prompt": rules.prompt_ids(2), "allowed": rules.allowed_ids.tolist()}}))""",
        HF_HUB_CACHE=str(tmp_path),
    )
    assert told == {"prompt": source.rules.prompt_ids(2), "allowed": source.rules.allowed_ids.tolist()}


# ---- audio ----


def mels(config: ModelConfig) -> list[Tensor]:
    return [torch.from_numpy(audio.log_mel(waveform, config.num_mels)) for waveform in clips()]


def test_embeddings_do_not_depend_on_the_neighbours(plugged: Any, source: Checkpoint, config: ModelConfig) -> None:
    """Alone, beside longer and louder clips, in another order, and as our own network has them."""
    network = model.load(source)
    each = mels(config)
    with torch.inference_mode():
        together = plugged.embed_multimodal(mel=each)
        backwards = plugged.embed_multimodal(mel=each[::-1])[::-1]
        for clip, waveform, one, other in zip(each, clips(), together, backwards, strict=True):
            (alone,) = plugged.embed_multimodal(mel=clip[None])
            ours = network.encode(clip[None], torch.tensor([clip.shape[1]]))[0]
            assert one.shape == ours.shape == (audio.num_audio_tokens(len(waveform)), config.hidden_dim)
            for found in (alone, one, other):
                torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)
    assert plugged.embed_multimodal() == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_clips_that_ranks_share_are_the_same(
    plugged: Any, config: ModelConfig, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's share, one after the other; six clips do not divide by four."""
    inside = sys.modules[type(plugged).__module__]
    each = mels(config)
    whole = plugged.embed_multimodal(mel=each)
    monkeypatch.setattr(plugged, "shares_clips", True)
    monkeypatch.setattr(inside, "get_tensor_model_parallel_world_size", lambda: ranks)
    shares: list[Tensor] = []

    def gather(share: Tensor, dim: int) -> Tensor:
        shares.append(share)
        return torch.cat([*shares, *[torch.zeros_like(share)] * (ranks - len(shares))], dim=dim)

    monkeypatch.setattr(inside, "tensor_model_parallel_all_gather", gather)
    with torch.inference_mode():
        for rank in range(ranks):
            monkeypatch.setattr(inside, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            embeddings = plugged.embed_multimodal(mel=each)
    assert [len(share) for share in shares] == [-(-len(each) // ranks)] * ranks
    for one, other in zip(embeddings, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_what_is_no_clip_is_refused_and_what_is_short_is_filled_up(engine: VllmEngine) -> None:
    """The rest of a long recording may be a few samples; vLLM's own splitting does not ask."""
    with pytest.raises(AudioError, match="480001 samples, over the 30 s"):
        engine.generate([noise(480_001)], DecodeOptions())
    with pytest.raises(AudioError, match="NaN"):
        engine.generate([np.full(16_000, np.nan, np.float32)], DecodeOptions())
    short = noise(3)
    assert engine.generate([short], DecodeOptions())[0].ids == engine.generate(
        [np.pad(short, (0, 157))], DecodeOptions()
    )[0].ids  # fmt: skip


# ---- weights; each test has an engine of its own, and vLLM can use only the last one of a process ----


def load(source: Checkpoint, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> VllmEngine:
    """The engine over changed weights; by vLLM itself, for ours would look at them before."""
    import vllm

    tensors = dict(model.published_tensors(model.load(source), torch.float32))
    change(tensors)
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source.folder / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llm = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**28)
    return VllmEngine(llm, source)


def test_a_copy_that_says_the_same_is_loaded(source: Checkpoint, tmp_path: Path) -> None:
    """Without positions, which RoPE replaces; with a norm that is none, and a head that is the embeddings."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["audio_encoder.whisper.embed_positions.weight"]
        tensors |= {name: torch.ones(source.config.encoder_dim) for name in IGNORED}
        tensors[checkpoint.HEAD] = tensors[checkpoint.EMBEDDINGS].clone()

    said = load(source, tmp_path / "copy", change).generate(clips(), DecodeOptions())
    expected = PyTorchEngine.load(source, device="cpu").generate(clips(), DecodeOptions())
    assert [g.ids for g in said] == [g.ids for g in expected]


def test_a_tokenizer_in_its_older_files_is_the_same(source: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(source.folder, tmp_path / "older")
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in raw["added_tokens"]}))
    older = VllmEngine.load(checkpoint.open_checkpoint(folder), enforce_eager=True)
    expected = PyTorchEngine.load(source, device="cpu").generate(clips(), DecodeOptions())
    assert [g.ids for g in older.generate(clips(), DecodeOptions())] == [g.ids for g in expected]
    for said in expected:
        assert text.clean(older.llm.get_tokenizer().decode(said.ids)) == source.rules.to_text(list(said.ids))


ODD: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "an encoder's is missing": (lambda t: t.pop("audio_encoder.whisper.layers.1.fc1.bias"), "missing .*fc1.bias"),
    "a decoder's is missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing .*up_proj"),
    "two are missing": (lambda t: (t.pop("model.norm.weight"), t.pop(checkpoint.EMBEDDINGS)), "and 1 more"),
    "one is surplus": (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}), "surplus .*layers.2"),
    "a shape is another": (
        lambda t: t.update({"audio_encoder.layer_norm.bias": torch.zeros(7)}), r"layer_norm.bias.* \(7,\), .* \(32,\)",
    ),
    "the tied head is another": (
        lambda t: t.update({checkpoint.HEAD: t[checkpoint.EMBEDDINGS] + 1}), "lm_head.weight differs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_tensors_that_do_not_fit_are_refused(source: Checkpoint, tmp_path: Path, what: str) -> None:
    change, told = ODD[what]
    with pytest.raises(CheckpointMismatchError, match=told) as caught:
        load(source, tmp_path / "odd", change)
    assert "\n" not in str(caught.value)


# ---- text ----

PIECES = st.lists(
    st.sampled_from([*text.CUT_AT, "<", "<|", "|>", "user|>", " ", "  ", "\n", "-", ", ", "word", "a", "語", "<|us"]),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(whole=PIECES, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_deltas_add_up_to_the_text_of_the_whole(whole: str, cuts: list[int]) -> None:
    from arkasr.vllm_plugin.model import CleanDeltas

    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in pairwise(places)] or [""]
    deltas = CleanDeltas()
    told = [deltas.process_delta(piece, number == len(pieces) - 1) for number, piece in enumerate(pieces)]
    assert "".join(told) == text.clean(whole)


def test_deltas_come_as_soon_as_they_are_sure() -> None:
    from arkasr.vllm_plugin.model import CleanDeltas

    deltas = CleanDeltas()
    pieces = [" -one", " two", " <|us", "ed", "<|user|>", "more"]
    assert [deltas.process_delta(piece, False) for piece in pieces] == ["one", " two", "", " <|used", "", ""]
