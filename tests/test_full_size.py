"""The published sizes: every tensor by name and shape, and random checkpoints of full size from disk to transcript.

`published/*.tsv` lists the tensors of both published checkpoints, one a line: name, tab, shape. The lists were made by
`from_the_specification` below, out of spec/model.md and transformers' Qwen2, not out of the package's own table.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import arkasr
import random_checkpoint
from arkasr import checkpoint, text
from arkasr import config as configs
from arkasr.config import ModelConfig
from arkasr.errors import ArkASRError, CheckpointMismatchError, ModelNotFoundError, UsageError
from conftest import byte_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = (sys.executable, str(ROOT / "scripts" / "random_checkpoint.py"))
SIZES = ("0.6b", "3b")
QWEN2 = {
    "0.6b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "3b": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008,
    },
}  # fmt: skip
WHISPER_LAYERS = 32
POSITIONS = "audio_encoder.whisper.embed_positions.weight"
OPTIONAL = ("audio_encoder.whisper.layer_norm.weight", "audio_encoder.whisper.layer_norm.bias")

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


# ---- every tensor of the published checkpoints ----


def manifest(size: str) -> Shapes:
    """The committed list."""
    lines = (Path(__file__).parent / "published" / f"{size}.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def from_the_specification(size: str) -> Shapes:
    """Sections 2 and 3 of spec/model.md, written out; the decoder's names and shapes are transformers' own."""
    d, hidden = 1280, QWEN2[size]["hidden_size"]
    tensors: Shapes = {
        "whisper.conv1.weight": (d, 128, 3), "whisper.conv1.bias": (d,), "whisper.conv2.weight": (d, d, 3),
        "whisper.conv2.bias": (d,), "whisper.embed_positions.weight": (1500, d), "layer_norm.weight": (d,),
        "layer_norm.bias": (d,), "adapting.0.weight": (2 * hidden, 5120), "adapting.0.bias": (2 * hidden,),
        "adapting.2.weight": (hidden, 2 * hidden), "adapting.2.bias": (hidden,),
    }  # fmt: skip
    for n in range(WHISPER_LAYERS):
        at = f"whisper.layers.{n}."
        for projection in "qkv":
            tensors[f"{at}self_attn.{projection}_proj.weight"] = (d, d)
        tensors[f"{at}self_attn.out_proj.weight"] = (d, d)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc2"):
            tensors[f"{at}{name}.bias"] = (d,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors |= {f"{at}{name}.weight": (d,), f"{at}{name}.bias": (d,)}
        tensors |= {f"{at}fc1.weight": (5120, d), f"{at}fc1.bias": (5120,), f"{at}fc2.weight": (d, 5120)}
    tensors = {"audio_encoder." + name: shape for name, shape in tensors.items()}
    with torch.device("meta"):
        qwen2 = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, tie_word_embeddings=True, **QWEN2[size]))
    return tensors | {name: tuple(t.shape) for name, t in qwen2.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize(("size", "billions"), [("0.6b", 1.13), ("3b", 3.7)])
def test_tensors_of_the_published_models(size: str, billions: float) -> None:
    """The committed list, the specification and the package's table are the same, one to one."""
    listed = manifest(size)
    assert list(listed) == sorted(listed)
    assert listed == from_the_specification(size)
    specs = list(checkpoint.tensor_specs(configs.from_mapping(random_checkpoint.published_config(size))))
    assert {spec.hf_name: spec.shape for spec in specs} == listed
    assert len({spec.name for spec in specs}) == len(specs) == len(listed)
    assert sum(int(np.prod(shape)) for shape in listed.values()) / 1e9 == pytest.approx(billions, rel=0.02)


# ---- checkpoints of full size without their weights ----


def leave_a_hole(file: BinaryIO, _name: str, shape: Shape) -> None:
    """Room for a tensor that takes no disk."""
    file.seek(random_checkpoint.num_bytes(shape), os.SEEK_CUR)


def put_sparse(folder: Path, shapes: Shapes, *, shard_bytes: int = 10**12) -> None:
    """Weight files of these tensors, one if not told otherwise, whose every weight is a hole."""
    for path in folder.glob("model*"):
        path.unlink()
    random_checkpoint.write_weights(folder, shapes, fill=leave_a_hole, shard_bytes=shard_bytes)


@pytest.fixture(scope="module", params=SIZES)
def sparse(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named after a published size, with its config and tokenizer and, as yet, no weights."""
    folder = tmp_path_factory.mktemp("sparse") / str(request.param)
    folder.mkdir()
    random_checkpoint.write_json(folder / "config.json", random_checkpoint.published_config(request.param))
    shutil.copyfile(shared / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def opened(sparse: Path) -> checkpoint.Checkpoint:
    """The folder opened with weight files as published; once, for the published tokenizer takes most of a second."""
    put_sparse(sparse, manifest(sparse.name), shard_bytes=random_checkpoint.SHARD_BYTES)
    assert sum(path.stat().st_blocks for path in sparse.glob("model*.safetensors")) * 512 < 1e7
    return checkpoint.open_checkpoint(sparse)


def test_published_headers_match(opened: checkpoint.Checkpoint) -> None:
    count = {"0.6b": 1, "3b": 2}[opened.folder.name]
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert [path.name for path in opened.shards] == (names if count > 1 else ["model.safetensors"])
    assert opened.rules.audio_id == 151663


def test_tensors_that_may_be_there(
    sparse: Path, opened: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "load", lambda _folder, **_sizes: opened.rules)
    listed = manifest(sparse.name)
    copy = {"lm_head.weight": listed["model.embed_tokens.weight"]}
    put_sparse(sparse, listed | copy | dict.fromkeys(OPTIONAL, (1280,)))
    checkpoint.open_checkpoint(sparse)


def one_of_each(shapes: Shapes) -> list[str]:
    """One tensor of every kind: of those that layers repeat, the first layer's, a middle one's or the last one's."""
    kinds: dict[str, list[str]] = {}
    for name in shapes:
        kinds.setdefault(re.sub(r"layers\.\d+\.", "layers.{n}.", name), []).append(name)
    chosen = []
    for n, names in enumerate(kinds.values()):
        names.sort(key=lambda name: (len(name), name))  # layer 2 before layer 10
        chosen.append(names[(0, len(names) // 2, -1)[n % 3]])
    return chosen


Damage = Callable[[Shapes, str], str]


def rename(shapes: Shapes, name: str) -> str:
    """As a careless converter does: the file's name for it, in another style."""
    shapes[name.upper()] = shapes.pop(name)
    # Positions may be absent, since they are unused with RoPE; their new name is then one too many.
    return f"surplus tensor '{name.upper()}'" if name == POSITIONS else f"missing tensor '{name}'"


def omit(shapes: Shapes, name: str) -> str:
    del shapes[name]
    return "" if name == POSITIONS else f"missing tensor '{name}'"


def add(shapes: Shapes, name: str) -> str:
    """A layer more, or something beside the tensor."""
    extra = re.sub(r"layers\.\d+\.", "layers.36.", name) if "layers." in name else name + "_scale"
    shapes[extra] = shapes[name]
    return f"surplus tensor '{extra}'"


def reshape(shapes: Shapes, name: str) -> str:
    shape = shapes[name]
    shapes[name] = shape[::-1] if shape[::-1] != shape else (*shape[:-1], shape[-1] + 1)
    return f"tensor '{name}' has shape {shapes[name]}"


@pytest.mark.parametrize("damage", [rename, omit, add, reshape])
def test_one_wrong_tensor_is_named(
    sparse: Path, opened: checkpoint.Checkpoint, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "load", lambda _folder, **_sizes: opened.rules)
    listed = manifest(sparse.name)
    sample = one_of_each(listed)
    assert len(sample) == len(checkpoint.TENSORS) - 1  # the tied head is none
    for name in sample:
        shapes = dict(listed)
        complaint = damage(shapes, name)
        put_sparse(sparse, shapes)
        if not complaint:
            checkpoint.open_checkpoint(sparse)
            continue
        with pytest.raises(CheckpointMismatchError) as caught:
            checkpoint.open_checkpoint(sparse)
        assert complaint in str(caught.value)


# ---- the writer of random checkpoints, on a small shape ----

SHARD_BYTES = 20_000  # less than the largest tensor, which then stands alone
# What seed 0 gives for the embedding below. Other bytes mean that numpy's stream or our arithmetic changed.
EMBEDDING_SHA256 = "2b64f2da3187a3ea4cb6309d7cdc4517a3fc0292b2951fbf365384ed7e805970"


@pytest.fixture
def write_small(small: ModelConfig, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """write_small(name, **options of write): the content of each file of a small random checkpoint."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    byte_tokenizer().save(str(tokenizer / "tokenizer.json"))

    def write_one(name: str, **options: Any) -> dict[str, bytes]:
        folder = tmp_path / name
        paths = random_checkpoint.write(configs.to_mapping(small), folder, tokenizer=tokenizer, **options)
        assert {path.name for path in paths} == {path.name for path in folder.glob("*.safetensors")}
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return write_one


def test_random_weights_are_the_same_every_time(write_small: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    one = write_small("one")
    assert sorted(one) == [
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "special_tokens_map.json", "tokenizer.json",
    ]  # fmt: skip
    assert write_small("two") == one
    assert write_small("other", seed=1)["model.safetensors"] != one["model.safetensors"]
    state = load_file(tmp_path / "one" / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    assert hashlib.sha256(embedding.view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest() == EMBEDDING_SHA256
    assert float(embedding.float().std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(embedding.float().mean())) < 0.001
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        around = 1 if name.endswith("norm.weight") else 0
        assert float((tensor.float() - around).abs().max()) < 0.05, name


def test_shards_hold_the_same_weights(write_small: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    write_small("one")
    index = json.loads(write_small("many", shard_bytes=SHARD_BYTES)["model.safetensors.index.json"])
    whole = load_file(tmp_path / "one" / "model.safetensors")
    shards = {path.name: load_file(path) for path in sorted((tmp_path / "many").glob("*.safetensors"))}
    assert list(shards) == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    assert len(shards) > 5
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SHARD_BYTES
        assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in tensors.items())
    assert not whole
    clip = (np.zeros(8_000, np.float32), 16_000)
    one, many = (arkasr.load_model(tmp_path / name).transcribe(clip, vad=False) for name in ("one", "many"))
    assert one.tokens == many.tokens != ()


def test_writing_takes_little_memory(tmp_path: Path) -> None:
    shapes = {"a.weight": (40_000, 512), "norm.weight": (512,)}
    tracemalloc.start()
    random_checkpoint.write_weights(
        tmp_path, shapes, fill=lambda *tensor: random_checkpoint.fill_random(*tensor, seed=0), shard_bytes=10**9
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.safetensors").stat().st_size > 40e6
    assert peak < 8e6


def test_writing_refuses_what_it_cannot_do(small: ModelConfig, tmp_path: Path) -> None:
    config = configs.to_mapping(small)
    cases: list[tuple[Path, Path, type[ArkASRError]]] = [
        (tmp_path / "new", tmp_path, ModelNotFoundError),
        (tmp_path / "full", tmp_path / "full", UsageError),
        (tmp_path / "full" / "tokenizer.json", tmp_path / "full", UsageError),
    ]
    (tmp_path / "full").mkdir()
    byte_tokenizer().save(str(tmp_path / "full" / "tokenizer.json"))
    for folder, tokenizer, error in cases:
        with pytest.raises(error, match=str(folder) if error is UsageError else r"tokenizer\.json: missing"):
            random_checkpoint.write(config, folder, tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    command = [*SCRIPT, "0.6b", str(tmp_path / "new"), "--tokenizer", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"{tmp_path / 'tokenizer.json'}: missing")
    assert run.stderr.count("\n") == 1


# ---- random checkpoints of full size, from disk to transcript ----


@pytest.fixture(scope="module")
def full_size(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights of the size in request.param; 2.3 or 7.5 GB that are removed afterwards."""
    folder = tmp_path_factory.mktemp("full") / str(request.param)
    arguments = [str(request.param), str(folder), "--tokenizer", str(shared / "tokenizer")]
    try:
        run = subprocess.run([*SCRIPT, *arguments], check=True, capture_output=True, text=True)
        print("\n" + run.stdout.strip())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from Linux's /proc")
@pytest.mark.parametrize(
    ("full_size", "dtype"),
    [("0.6b", "bfloat16"), ("0.6b", "float32"), ("3b", "bfloat16")],
    indirect=["full_size"],
)
def test_full_size_from_disk(full_size: Path, dtype: str) -> None:
    """In a process of its own, so that its peak memory is a reader's and not pytest's.

    The bound is 1.15 times the weights in the asked dtype, plus what the interpreter takes after its imports. It
    holds for loading and for transcribing too, since mapped bf16 weights come in only when they are used.
    """
    child = [sys.executable, "-W", "error", str(ROOT / "bench" / "full_size.py"), "--child", str(full_size), dtype]
    run = subprocess.run(child, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    said = json.loads(run.stdout)
    print(f"\n{full_size.name} {dtype}: {said}")
    rules = checkpoint.open_checkpoint(full_size).rules
    assert 0 <= len(said["tokens"]) <= 8
    assert rules.allowed_ids[said["tokens"]].all()
    assert all(token <= 151669 for token in said["tokens"])
    assert said["repeats"]
    assert said["duration_s"] == 10
    assert 0 <= said["confidence"] <= 1
    values = sum(int(np.prod(shape)) for shape in manifest(full_size.name).values())
    assert said["weights_bytes"] == values * {"bfloat16": 2, "float32": 4}[dtype]
    assert said["peak_after_load_bytes"] <= said["baseline_bytes"] + 1.15 * said["weights_bytes"]
    assert said["peak_bytes"] <= said["baseline_bytes"] + 1.15 * said["weights_bytes"]
    if full_size.name == "3b":
        assert said["peak_bytes"] <= 9e9
