"""Writes a random bf16 checkpoint of a published shape in the published layout: for speed, memory and round trips.

    python scripts/random_checkpoint.py SIZE FOLDER [--seed N] [--tokenizer DIR] [--shard-gb X]

SIZE is 0.6b or 3b. Weights go to the file in small pieces, so that 7 GB of them take some MB of memory. A tensor's
numbers follow from the seed and its name alone: the same at every run, on every machine, in any number of files.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arkasr import config as configs
from arkasr import files
from arkasr.checkpoint import tensor_specs
from arkasr.errors import ArkASRError, ModelNotFoundError, UsageError

TOKENIZER = Path(__file__).parents[2] / "shared" / "tokenizer"
SHARD_BYTES = 5_000_000_000  # where transformers 4, which wrote the published files, starts the next shard
SCALE = 0.02  # standard deviation of the weights: activations stay finite through 32 + 36 layers
CHUNK = 2**18  # values at a time; they stay in the processor's cache

SIZES: dict[str, dict[str, int]] = {
    "0.6b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "3b": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008,
    },
}  # fmt: skip

Shape = tuple[int, ...]
Fill = Callable[[BinaryIO, str, Shape], None]


def published_config(size: str) -> dict[str, Any]:
    """config.json of a published model. It points at remote code, as the published one does; arkasr never looks."""
    return {
        "model_type": "arkasr", "architectures": ["ArkasrForConditionalGeneration"], "adapter_type": "mlp",
        "auto_map": {
            "AutoConfig": "configuration_arkasr.ArkasrConfig",
            "AutoModel": "modeling_arkasr.ArkasrForConditionalGeneration",
            "AutoProcessor": "processing_arkasr.ArkasrProcessor",
        },
        "merge_factor": 4, "use_rope": True, "max_whisper_length": 1500, "mlp_adapter_act": "gelu", "spec_aug": False,
        "audio_token_id": 151663, "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643,
        "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
        "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": "bfloat16", **SIZES[size],
        "whisper_config": {
            "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "num_mel_bins": 128, "max_source_positions": 1500, "activation_function": "gelu",
        },
    }  # fmt: skip


def write(
    config: Mapping[str, Any],
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: Path = TOKENIZER,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write the checkpoint of a config.json into a new or empty folder; returns its weight files.

    Raises:
        ModelNotFoundError: no tokenizer.json in the folder `tokenizer`.
        UsageError: `folder` holds something already.
        CheckpointMismatchError: not a config of this architecture.
    """
    source = tokenizer / files.TOKENIZER
    if not source.is_file():
        raise ModelNotFoundError(f"{source}: missing; give the folder of the published tokenizer with --tokenizer")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: not an empty folder; give a new one")
    shapes = {spec.hf_name: spec.shape for spec in tensor_specs(configs.from_mapping(config))}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(folder / files.TOKENIZER, lambda part: shutil.copyfile(source, part))
    write_json(folder / files.CONFIG, config)
    for name, content in plain_files(config).items():
        write_json(folder / name, content)
    return write_weights(folder, shapes, fill=partial(fill_random, seed=seed), shard_bytes=shard_bytes)


def plain_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The small published files whose content is known; arkasr reads none but generation_config.json."""
    return {
        "generation_config.json": {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        "special_tokens_map.json": {
            "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 30, "hop_length": 160, "n_fft": 400,
            "feature_size": config["whisper_config"]["num_mel_bins"], "sampling_rate": 16000,
        },
    }  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON file, complete or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    files.write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_weights(folder: Path, shapes: Mapping[str, Shape], *, fill: Fill, shard_bytes: int) -> list[Path]:
    """model.safetensors, or shards and then their index; `fill` writes the bytes of one tensor."""
    shards = plan(shapes, shard_bytes)
    count = len(shards)
    paths = [folder / f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        paths = [folder / files.WEIGHTS]
    for path, shard in zip(paths, shards, strict=True):
        files.write_atomically(path, partial(write_shard, shapes=shard, fill=fill))
    if count > 1:
        index = {
            "metadata": {"total_size": sum(map(num_bytes, shapes.values()))},
            "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
        }
        write_json(folder / files.INDEX, index)
    return paths


def plan(shapes: Mapping[str, Shape], shard_bytes: int) -> list[dict[str, Shape]]:
    """The tensors of each shard: in order, a new shard where the next tensor would be too much."""
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + num_bytes(shape) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += num_bytes(shape)
    return shards


def num_bytes(shape: Shape) -> int:
    """Size of a bf16 tensor."""
    return 2 * math.prod(shape)


def write_shard(path: Path, *, shapes: Mapping[str, Shape], fill: Fill) -> None:
    """One safetensors file: the header's length, the header, the tensors one after another."""
    with path.open("wb") as file:
        file.write(header(shapes))
        for name, shape in shapes.items():
            fill(file, name, shape)
        file.truncate()  # a fill that only seeks leaves holes; so that the last one counts too


def header(shapes: Mapping[str, Shape]) -> bytes:
    """What stands before the tensors, padded so that they start at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + num_bytes(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fill_random(file: BinaryIO, name: str, shape: Shape, *, seed: int) -> None:
    """Random weights around 0, those of norms around 1; bf16 is the upper half of a float32."""
    # Uniform and not normal: five times as fast, and no machine's logarithm takes part.
    generator = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    around = 1.0 if name.endswith("norm.weight") else 0.0
    width = SCALE * math.sqrt(12)
    values = np.empty(CHUNK, np.float32)
    for start in range(0, math.prod(shape), CHUNK):
        chunk = values[: math.prod(shape) - start]
        generator.random(out=chunk, dtype=np.float32)
        chunk -= 0.5
        chunk *= width
        chunk += around
        file.write((chunk.view(np.uint32) >> 16).astype("<u2").tobytes())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder of the published tokenizer.json")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="largest weight file")
    asked = parser.parse_args()
    if asked.seed < 0 or not asked.shard_gb > 0:
        parser.error("--seed must not be negative, --shard-gb must be positive")
    started = time.perf_counter()
    try:
        paths = write(
            published_config(asked.size),
            asked.folder,
            seed=asked.seed,
            tokenizer=asked.tokenizer,
            shard_bytes=int(asked.shard_gb * 1e9),
        )
    except ArkASRError as error:
        raise SystemExit(str(error)) from None
    elapsed_s = time.perf_counter() - started
    total = sum(path.stat().st_size for path in paths)
    each = " + ".join(f"{path.stat().st_size / 1e9:.2f}" for path in paths)
    print(f"{asked.folder}: {asked.size}, {each} GB, {elapsed_s:.1f} s, {total / 1e6 / elapsed_s:.0f} MB/s")


if __name__ == "__main__":
    main()
