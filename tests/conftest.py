"""Fixtures: a tokenizer and a random two-layer checkpoint made in code, and the way to ../shared."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from arkasr import checkpoint, cli, model, text
from arkasr.checkpoint import Checkpoint
from arkasr.config import ModelConfig
from arkasr.text import TextRules

# No test may use the network or this machine's own downloads; before huggingface_hub reads it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait for each other on a busy machine make tiny layers a hundred times slower.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material; a laptop without it skips, CI fails."""
    if not SHARED.is_dir():
        if "CI" in os.environ:
            pytest.fail(f"{SHARED} is missing, and CI must run these tests")
        pytest.skip(f"{SHARED} is missing")
    return SHARED


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens, without merges, and ARK's added tokens behind them: about 265 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    text.configure_byte_level(tokenizer)
    for token in ("<|endoftext|>", "<|im_start|>", *sorted(text.NEEDED, key=lambda t: t == text.SYSTEM)):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)])
    return tokenizer


def small_config(tokenizer: Tokenizer) -> ModelConfig:
    """Two encoder and two decoder layers, grouped-query attention, a vocabulary padded beyond the tokenizer."""
    vocab = tokenizer.get_vocab()
    return ModelConfig(
        num_mels=80, encoder_dim=32, encoder_layers=2, encoder_heads=4, encoder_ffn_dim=64, max_encoder_frames=1500,
        use_rope=True, merge_factor=4, adapter_activation="gelu", hidden_dim=64, decoder_layers=2, decoder_heads=4,
        kv_heads=2, decoder_ffn_dim=48, vocab_size=tokenizer.get_vocab_size() + 11, tied_embeddings=True,
        rope_theta=1e6, rms_eps=1e-6, audio_token_id=vocab[text.AUDIO], bos_token_id=vocab["<|endoftext|>"],
        eos_token_ids=(vocab[text.IM_END],), pad_token_id=vocab["<|endoftext|>"],
    )  # fmt: skip


def random_network(config: ModelConfig, *, seed: int = 0) -> model.ArkASR:
    """A network whose every weight is random, norms and biases included, with logits far enough apart to compare."""
    generator = torch.Generator().manual_seed(seed)
    network = model.ArkASR(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 0.5 if parameter.ndim > 1 else 0.2
            around = 1.0 if name.endswith("norm.weight") else 0.0
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / fan_in**0.5 + around)
        network.decoder.embed.weight.mul_(3)
    return network.eval()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ARKASR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("models", ...) in this process -> exit code, lines of stdout, lines of stderr."""

    def main(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["ark-asr", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err.splitlines()

    return main


MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(name="model", dtype=float32, **changes of the config) -> folder in the published layout."""

    def make(name: str = "model", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        tokenizer = byte_tokenizer()
        config = replace(small_config(tokenizer), **changes)  # type: ignore[arg-type]
        folder = tmp_path / name
        model.save(random_network(config), folder, dtype=dtype)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """The architecture of the random network."""
    return small_config(byte_tokenizer())


@pytest.fixture(scope="session")
def rules(small: ModelConfig) -> TextRules:
    """Token rules of the random network."""
    return TextRules(byte_tokenizer(), vocab_size=small.vocab_size, eos_token_ids=small.eos_token_ids, place="conftest")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; its folder of exports."""
    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "exports"


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    """The shipped model."""
    return checkpoint.open_checkpoint("tiny")
