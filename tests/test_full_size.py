"""The published sizes: their tensors, written out from spec/model.md, and a random 0.6B from disk to transcript."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from arkasr import checkpoint
from arkasr import config as configs

PUBLISHED: dict[str, dict[str, Any]] = {
    "0.6b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "3b": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008,
    },
}  # fmt: skip


def published_mapping(size: str) -> dict[str, Any]:
    """config.json of a published model, as the specification describes it."""
    return {
        "model_type": "arkasr", "architectures": ["ArkasrForConditionalGeneration"], "adapter_type": "mlp",
        "merge_factor": 4, "use_rope": True, "max_whisper_length": 1500, "mlp_adapter_act": "gelu", "spec_aug": False,
        "audio_token_id": 151663, "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643,
        "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
        "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": "bfloat16", **PUBLISHED[size],
        "whisper_config": {
            "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "num_mel_bins": 128, "max_source_positions": 1500, "activation_function": "gelu",
        },
    }  # fmt: skip


@pytest.mark.parametrize(("size", "hidden", "billions"), [("0.6b", 896, 1.13), ("3b", 2048, 3.7)])
def test_tensors_of_the_published_models(size: str, hidden: int, billions: float) -> None:
    d = 1280
    expected: dict[str, tuple[int, ...]] = {
        "whisper.conv1.weight": (d, 128, 3), "whisper.conv1.bias": (d,), "whisper.conv2.weight": (d, d, 3),
        "whisper.conv2.bias": (d,), "whisper.embed_positions.weight": (1500, d), "layer_norm.weight": (d,),
        "layer_norm.bias": (d,), "adapting.0.weight": (2 * hidden, 5120), "adapting.0.bias": (2 * hidden,),
        "adapting.2.weight": (hidden, 2 * hidden), "adapting.2.bias": (hidden,),
    }  # fmt: skip
    for n in range(32):
        at = f"whisper.layers.{n}."
        for projection in "qkv":
            expected[f"{at}self_attn.{projection}_proj.weight"] = (d, d)
        expected[f"{at}self_attn.out_proj.weight"] = (d, d)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc2"):
            expected[f"{at}{name}.bias"] = (d,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            expected |= {f"{at}{name}.weight": (d,), f"{at}{name}.bias": (d,)}
        expected |= {f"{at}fc1.weight": (5120, d), f"{at}fc1.bias": (5120,), f"{at}fc2.weight": (d, 5120)}
    expected = {"audio_encoder." + name: shape for name, shape in expected.items()}
    with torch.device("meta"):
        qwen2 = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, tie_word_embeddings=True, **PUBLISHED[size]))
    expected |= {name: tuple(t.shape) for name, t in qwen2.state_dict().items() if name != "lm_head.weight"}

    specs = list(checkpoint.tensor_specs(configs.from_mapping(published_mapping(size))))
    assert {spec.hf_name: spec.shape for spec in specs} == expected
    assert len({spec.name for spec in specs}) == len(specs) == len(expected)
    total = sum(int(np.prod(spec.shape)) for spec in specs)
    assert total / 1e9 == pytest.approx(billions, rel=0.02)


# ---- a random model of the 0.6B shape, sharded bfloat16 on disk ----

SHARD_BYTES = 500_000_000
CHILD = """
import json, resource, sys, time
import numpy as np
import arkasr
started = time.perf_counter()
transcriber = arkasr.load_model(sys.argv[1], dtype=sys.argv[2], device="cpu")
load_s = time.perf_counter() - started
clip = (np.random.default_rng(0).standard_normal(160_000) / 10).astype(np.float32)
started = time.perf_counter()
transcript = transcriber.transcribe((clip, 16_000), options=arkasr.DecodeOptions(max_new_tokens=8))
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({
    "load_s": round(load_s, 2), "transcribe_s": round(time.perf_counter() - started, 2), "peak_rss_gb": rss / 1e9,
    "tokens": transcript.tokens, "text": transcript.text, "duration_s": transcript.duration_s,
    "confidence": transcript.confidence, "timings_s": transcript.timings_s,
}))
"""


@pytest.fixture(scope="module")
def full_size(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the published names, written shard by shard so that one shard at a time is in memory."""
    folder = tmp_path_factory.mktemp("full") / "ark-asr-0.6b"
    folder.mkdir()
    mapping = published_mapping("0.6b")
    (folder / "config.json").write_text(json.dumps(mapping), encoding="utf-8")
    (folder / "tokenizer.json").symlink_to(shared / "tokenizer" / "tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(held, folder / file)
        places.update(dict.fromkeys(held, file))
        held.clear()

    for spec in checkpoint.tensor_specs(configs.from_mapping(mapping)):
        tensor = torch.empty(spec.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        held[spec.hf_name] = tensor + 1 if "norm.weight" in spec.hf_name else tensor
        if sum(t.nbytes for t in held.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    assert len(set(places.values())) > 3
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_full_size_from_disk(full_size: Path, dtype: str) -> None:
    """In a process of its own, so that its peak memory is a reader's and not the writer's."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(full_size), dtype], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    said = json.loads(run.stdout)
    print(f"\n0.6B shape, {dtype}: {said}")
    rules = checkpoint.open_checkpoint(full_size).rules
    assert 0 <= len(said["tokens"]) <= 8
    assert rules.allowed_ids[said["tokens"]].all()
    assert all(token <= 151669 for token in said["tokens"])
    assert said["duration_s"] == 10
    assert 0 <= said["confidence"] <= 1
