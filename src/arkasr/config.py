"""The architecture of one checkpoint, read from its config.json; a missing or contradictory value is an error.

The keys are those of the published files: a Qwen2 text config whose `whisper_config` describes the encoder. What is
unusual: `rope_theta` may stand at the top level (transformers 4) or in `rope_parameters` (transformers 5), and some
published copies lack the adapter's keys, for which the published defaults apply.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arkasr import files
from arkasr.errors import CheckpointMismatchError, ModelNotFoundError, quoted

# Fixed by the architecture: one pass of the encoder, its RoPE, and the epsilon of its norms.
MAX_CLIP_S = 30
ARCHITECTURE = "ArkasrForConditionalGeneration"  # by which config.json names the network
ENCODER_ROPE_THETA = 10_000.0
LAYER_NORM_EPS = 1e-5
# Beyond these a config is damaged or hostile, and building the table of its tensors would take the memory.
MAX_SIZE, MAX_LAYERS, MAX_NUMBER = 2**24, 1024, 1e30
# These two cost memory that no weights in the file stand for.
MAX_MELS, MAX_POSITIONS = 1024, 2**16
ADAPTER_ACTIVATIONS = ("gelu", "relu", "selu")

Heads = tuple[tuple[int, int], ...]  # of the decoder: layer, and head of that layer, both from 0
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of an ARK-ASR model."""

    num_mels: int
    encoder_dim: int
    encoder_layers: int
    encoder_heads: int
    encoder_ffn_dim: int
    max_encoder_frames: int
    use_rope: bool
    merge_factor: int
    adapter_activation: str
    hidden_dim: int
    decoder_layers: int
    decoder_heads: int
    kv_heads: int
    decoder_ffn_dim: int
    vocab_size: int
    tied_embeddings: bool
    rope_theta: float
    rms_eps: float
    audio_token_id: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def encoder_head_dim(self) -> int:
        """Width of one encoder attention head."""
        return self.encoder_dim // self.encoder_heads

    @property
    def decoder_head_dim(self) -> int:
        """Width of one decoder attention head."""
        return self.hidden_dim // self.decoder_heads


def default_alignment_heads(config: ModelConfig) -> Heads:
    """The heads that tell where a token was heard, where nobody chose some: all of the layer at a quarter of the depth.

    It is layer 1, where there is one, of fewer than eight layers: there `tiny` tells it best, and layer 0 hardly.
    """
    layer = min(max(1, config.decoder_layers // 4), config.decoder_layers - 1)
    return tuple((layer, head) for head in range(config.decoder_heads))


def rope_angles(positions: npt.NDArray[np.int64], num_dims: int, theta: float) -> tuple[Floats, Floats]:
    """Cos and sin [n, num_dims / 2] of positions [n], as in model.rope_angles."""
    angles = positions[:, None] * theta ** -(np.arange(0, num_dims, 2) / num_dims)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def load(folder: Path) -> ModelConfig:
    """Read `folder/config.json`.

    Raises:
        ModelNotFoundError: there is no config.json.
        CheckpointMismatchError: it is no file of its own folder, not JSON, lacks a key, or contradicts itself.
    """
    path = folder / files.CONFIG
    if not path.exists():
        raise ModelNotFoundError(f"{folder}: no {files.CONFIG}; give a folder in the published layout")
    return from_mapping(files.read_json(path), str(path))


def from_mapping(raw: Mapping[str, Any], place: str = "config.json") -> ModelConfig:
    """Build and check a config from the parsed JSON object; `place` names it in errors."""
    read = _Reader(raw, place)
    whisper = _Reader(read.mapping("whisper_config"), f"{place}: whisper_config")
    theta = read
    if raw.get("rope_parameters") is not None:
        theta = _Reader(read.mapping("rope_parameters"), f"{place}: rope_parameters")
        theta.fixed("rope_type", "default")
        theta.fixed("rope_theta", raw.get("rope_theta", theta.raw.get("rope_theta")))
    read.fixed("rope_scaling", None)
    read.fixed("model_type", "arkasr")
    read.fixed("adapter_type", "mlp")
    read.fixed("hidden_act", "silu")
    read.fixed("use_sliding_window", False)
    whisper.fixed("activation_function", "gelu")
    config = ModelConfig(
        num_mels=whisper.size("num_mel_bins", limit=MAX_MELS),
        encoder_dim=whisper.size("d_model"),
        encoder_layers=whisper.size("encoder_layers", limit=MAX_LAYERS),
        encoder_heads=whisper.size("encoder_attention_heads"),
        encoder_ffn_dim=whisper.size("encoder_ffn_dim"),
        max_encoder_frames=whisper.size("max_source_positions", limit=MAX_POSITIONS),
        use_rope=read.flag("use_rope", True),
        merge_factor=read.size("merge_factor", 4),
        adapter_activation=read.text("mlp_adapter_act", "gelu"),
        hidden_dim=read.size("hidden_size"),
        decoder_layers=read.size("num_hidden_layers", limit=MAX_LAYERS),
        decoder_heads=read.size("num_attention_heads"),
        kv_heads=read.size("num_key_value_heads"),
        decoder_ffn_dim=read.size("intermediate_size"),
        vocab_size=read.size("vocab_size"),
        tied_embeddings=read.flag("tie_word_embeddings", True),
        rope_theta=theta.positive("rope_theta"),
        rms_eps=read.positive("rms_norm_eps"),
        audio_token_id=read.token("audio_token_id"),
        bos_token_id=read.token("bos_token_id"),
        eos_token_ids=read.tokens("eos_token_id"),
        pad_token_id=read.token("pad_token_id"),
    )
    _check(config, raw, place)
    return config


def _check(config: ModelConfig, raw: Mapping[str, Any], place: str) -> None:
    def must(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointMismatchError(f"{place}: {what}; the file is not an ARK-ASR config")

    must(
        config.encoder_dim % config.encoder_heads == 0,
        f"d_model {config.encoder_dim} is not a multiple of encoder_attention_heads {config.encoder_heads}",
    )
    must(
        config.encoder_head_dim % 4 == 0,
        f"encoder head width {config.encoder_head_dim} is not a multiple of 4, which RoPE on half of it needs",
    )
    must(
        config.hidden_dim % config.decoder_heads == 0,
        f"hidden_size {config.hidden_dim} is not a multiple of num_attention_heads {config.decoder_heads}",
    )
    must(config.decoder_head_dim % 2 == 0, f"decoder head width {config.decoder_head_dim} is odd")
    must(
        config.decoder_heads % config.kv_heads == 0,
        f"num_attention_heads {config.decoder_heads} is not a multiple of num_key_value_heads {config.kv_heads}",
    )
    must(
        raw.get("head_dim") in (None, config.decoder_head_dim),
        f"head_dim {quoted(raw.get('head_dim'))} contradicts hidden_size / num_attention_heads = "
        f"{config.decoder_head_dim}",
    )
    must(
        raw.get("max_whisper_length", config.max_encoder_frames) == config.max_encoder_frames,
        f"max_whisper_length {quoted(raw.get('max_whisper_length'))} contradicts max_source_positions "
        f"{config.max_encoder_frames}",
    )
    must(
        config.adapter_activation in ADAPTER_ACTIVATIONS,
        f"mlp_adapter_act {quoted(config.adapter_activation)} is none of {', '.join(ADAPTER_ACTIVATIONS)}",
    )
    must(
        config.use_rope or config.max_encoder_frames >= MAX_CLIP_S * 50,
        f"max_source_positions {config.max_encoder_frames} is too few for {MAX_CLIP_S} s without use_rope",
    )
    for key in ("audio_token_id", "bos_token_id", "pad_token_id", "eos_token_id"):
        ids = config.eos_token_ids if key == "eos_token_id" else (vars(config)[key],)
        must(max(ids) < config.vocab_size, f"{key} {quoted(max(ids))} is outside vocab_size {config.vocab_size}")


def to_mapping(config: ModelConfig) -> dict[str, Any]:
    """The published config.json of this architecture, without `auto_map`: nothing in it points at code."""
    eos = config.eos_token_ids
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "arkasr",
        "adapter_type": "mlp",
        "audio_token_id": config.audio_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.decoder_ffn_dim,
        "max_whisper_length": config.max_encoder_frames,
        "merge_factor": config.merge_factor,
        "mlp_adapter_act": config.adapter_activation,
        "num_attention_heads": config.decoder_heads,
        "num_hidden_layers": config.decoder_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "spec_aug": False,
        "tie_word_embeddings": config.tied_embeddings,
        "use_rope": config.use_rope,
        "vocab_size": config.vocab_size,
        "whisper_config": {
            "activation_function": "gelu",
            "d_model": config.encoder_dim,
            "encoder_attention_heads": config.encoder_heads,
            "encoder_ffn_dim": config.encoder_ffn_dim,
            "encoder_layers": config.encoder_layers,
            "max_source_positions": config.max_encoder_frames,
            "num_mel_bins": config.num_mels,
        },
    }


@dataclass(frozen=True)
class _Reader:
    """Typed access to one JSON object; every error names the key and the file."""

    raw: Mapping[str, Any]
    place: str

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key, default)
        if value is None:
            raise CheckpointMismatchError(f"{self.place}: no {key!r}; the file is not a complete ARK-ASR config")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointMismatchError:
        return CheckpointMismatchError(f"{self.place}: {key} is {quoted(value)}, wanted {wanted}")

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def size(self, key: str, default: int | None = None, *, limit: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < limit:
            raise self._wrong(key, value, f"a positive whole number below {limit}")
        return value

    def token(self, key: str) -> int:
        return self._one_token(key, self._get(key))

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self._get(key)
        ids = value if isinstance(value, list) else [value]
        if not ids:
            raise self._wrong(key, value, "at least one token id")
        return tuple(self._one_token(key, item) for item in ids)

    def _one_token(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a token id")
        return value

    def positive(self, key: str) -> float:
        value = self._get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MAX_NUMBER:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a word")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def fixed(self, key: str, only: object) -> None:
        value = self.raw.get(key, only)
        if value != only:
            raise self._wrong(key, value, f"{only!r}, the only kind arkasr runs")
