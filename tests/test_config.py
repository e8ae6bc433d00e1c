"""config.json: what is needed, what defaults apply, what contradicts."""

import json
from dataclasses import replace
from typing import Any

import pytest

from arkasr import checkpoint, model
from arkasr import config as configs
from arkasr.config import ModelConfig
from arkasr.errors import CheckpointMismatchError
from conftest import MakeCheckpoint, byte_tokenizer, small_config


def test_our_names_are_the_modules(small: ModelConfig) -> None:
    for config in (small, replace(small, tied_embeddings=False, encoder_layers=3)):
        shapes = {name: tuple(tensor.shape) for name, tensor in model.ArkASR(config).state_dict().items()}
        assert {spec.name: spec.shape for spec in checkpoint.tensor_specs(config)} == shapes


def tiny_mapping() -> dict[str, Any]:
    return configs.to_mapping(small_config(byte_tokenizer()))


def test_config_round_trip(small: ModelConfig) -> None:
    several = replace(small, eos_token_ids=(263, 257), use_rope=False, tied_embeddings=False)
    for config in (small, several):
        assert configs.from_mapping(json.loads(json.dumps(configs.to_mapping(config)))) == config
    assert "auto_map" not in configs.to_mapping(small)


def test_absent_keys_have_the_published_defaults(small: ModelConfig) -> None:
    raw = tiny_mapping()
    for key in ("merge_factor", "use_rope", "mlp_adapter_act", "max_whisper_length", "spec_aug", "adapter_type"):
        del raw[key]
    assert configs.from_mapping(raw) == small


def test_rope_theta_of_transformers_5(small: ModelConfig) -> None:
    raw = tiny_mapping()
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    assert configs.from_mapping(raw) == small
    assert configs.from_mapping({**raw, "rope_theta": small.rope_theta}) == small


REQUIRED = [
    *("audio_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size"),
    *("whisper_config", "whisper_config.d_model", "whisper_config.encoder_attention_heads"),
    *("whisper_config.encoder_ffn_dim", "whisper_config.encoder_layers", "whisper_config.max_source_positions"),
    "whisper_config.num_mel_bins",
]


@pytest.mark.parametrize("path", REQUIRED)
@pytest.mark.parametrize("value", ["absent", None, -1, "32", [], {}, 10**400, True], ids=lambda v: str(v)[:8])
def test_needed_keys(path: str, value: object) -> None:
    raw = tiny_mapping()
    *parents, key = path.split(".")
    place = raw[parents[0]] if parents else raw
    place[key] = value
    if value == "absent":
        del place[key]
    with pytest.raises(CheckpointMismatchError) as caught:
        configs.from_mapping(raw)
    message = str(caught.value)
    assert key in message or (value == 10**400 and "vocab_size" in message)
    assert "\n" not in message


CONTRADICTIONS: list[tuple[str, object, str]] = [
    ("hidden_size", 33, "hidden_size"),
    ("hidden_size", 2**60, "hidden_size"),
    ("num_attention_heads", 5, "num_attention_heads"),
    ("num_attention_heads", 64, "width"),
    ("num_key_value_heads", 3, "num_key_value_heads"),
    ("num_key_value_heads", 8, "num_key_value_heads"),
    ("num_key_value_heads", 0, "num_key_value_heads"),
    ("num_hidden_layers", 2**24 - 1, "num_hidden_layers"),
    ("num_hidden_layers", 1.5, "num_hidden_layers"),
    ("head_dim", 8, "head_dim"),
    ("vocab_size", 258, "vocab_size"),
    ("audio_token_id", 276, "vocab_size"),
    ("eos_token_id", [263, 276], "vocab_size"),
    ("eos_token_id", [263, "257"], "eos_token_id"),
    ("eos_token_id", [263, [257]], "eos_token_id"),
    ("rms_norm_eps", 0, "rms_norm_eps"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("rope_theta", float("inf"), "rope_theta"),
    ("rope_parameters", {"rope_theta": 1e4}, "rope_theta"),
    ("rope_parameters", {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}, "rope"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling"),
    ("model_type", "qwen2", "model_type"),
    ("adapter_type", "conv", "adapter_type"),
    ("merge_factor", 0, "merge_factor"),
    ("mlp_adapter_act", "tanh", "mlp_adapter_act"),
    ("max_whisper_length", 3000, "max_whisper_length"),
    ("use_rope", "yes", "use_rope"),
    ("use_rope", 1, "use_rope"),
    ("tie_word_embeddings", 0, "tie_word_embeddings"),
    ("hidden_act", "gelu", "hidden_act"),
    ("use_sliding_window", True, "use_sliding_window"),
    ("whisper_config.d_model", 30, "d_model"),
    ("whisper_config.encoder_attention_heads", 16, "encoder head width"),
    ("whisper_config.encoder_layers", 2**24 - 1, "encoder_layers"),
    ("whisper_config.activation_function", "relu", "activation_function"),
]


@pytest.mark.parametrize(
    ("path", "value", "named"), CONTRADICTIONS, ids=[f"{p}={v}"[:60] for p, v, _ in CONTRADICTIONS]
)
def test_contradictory_config(path: str, value: object, named: str) -> None:
    raw = tiny_mapping()
    *parents, key = path.split(".")
    (raw[parents[0]] if parents else raw)[key] = value
    with pytest.raises(CheckpointMismatchError) as caught:
        configs.from_mapping(raw, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json")
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "raw",
    [b"", b"no json", b"[]", b"[1, 2]", b'"text"', b"null", b'{"hidden_size": ', b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "words", "list", "numbers", "string", "null", "cut", "binary", "nested"],
)
def test_config_that_is_no_json_object(make_checkpoint: MakeCheckpoint, raw: bytes) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointMismatchError, match=r"config\.json"):
        checkpoint.open_checkpoint(folder)
