"""Checkpoints on disk: round trips, shards, every way to be damaged or contradictory, and nothing in them executed."""

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import arkasr
from arkasr import checkpoint, model
from arkasr.errors import ArkASRError, CheckpointMismatchError, ModelNotFoundError
from conftest import MakeCheckpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POSITIONS = "audio_encoder.whisper.embed_positions.weight"
EMBEDDING = "model.embed_tokens.weight"


def state_of(folder: Path) -> dict[str, Tensor]:
    return model.load(checkpoint.open_checkpoint(folder)).state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(folder: Path, error: type[ArkASRError] = CheckpointMismatchError) -> str:
    """The one line that opening the folder fails with."""
    with pytest.raises(error) as caught:
        checkpoint.open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of model.safetensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Replace model.safetensors by shards, every part-th tensor in each, and their index; returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        names = sorted(tensors)[part::parts]
        save_file({name: tensors[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    write_index(folder, places)
    return places


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


# ---- round trips ----


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": False, "eos_token_ids": (263, 257), "adapter_activation": "relu", "use_rope": False}],
    ids=["tied", "untied"],
)
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_round_trip_is_byte_identical(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stored: torch.dtype, loaded: torch.dtype, changes: dict[str, Any]
) -> None:
    first = make_checkpoint(dtype=stored, **changes)
    network = model.load(checkpoint.open_checkpoint(first), dtype=loaded)
    assert {parameter.dtype for parameter in network.parameters()} == {loaded}
    assert not network.training
    again = tmp_path / "again"
    model.save(network, again, dtype=stored)
    for file in (WEIGHTS, "config.json"):
        assert (again / file).read_bytes() == (first / file).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == ["config.json", WEIGHTS]


def test_saved_files_are_as_readable_as_any(make_checkpoint: MakeCheckpoint) -> None:
    """A model that root installed once could be read by nobody else."""
    folder = make_checkpoint()
    (folder / "other").touch()
    assert (
        (folder / WEIGHTS).stat().st_mode
        == (folder / "config.json").stat().st_mode
        == (folder / "other").stat().st_mode
    )


def test_shards_load_as_one_file_does(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(tied_embeddings=False)
    whole = state_of(folder)
    shard(folder)
    assert len(checkpoint.open_checkpoint(folder).shards) == 3
    assert same(state_of(folder), whole)


# ---- tensors against the config ----


def test_each_missing_tensor_is_named(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(tied_embeddings=False, use_rope=False)
    tensors = load_file(folder / WEIGHTS)
    for name in tensors:
        save_file({other: tensors[other] for other in tensors if other != name}, folder / WEIGHTS)
        assert name in refused(folder)


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("surplus.weight", True),
        ("audio_encoder.whisper.layers.2.fc1.weight", True),
        ("model.layers.0.self_attn.o_proj.bias", True),
        ("audio_encoder.whisper.layers.0.self_attn.k_proj.bias", False),
        ("audio_encoder.whisper.layer_norm.scale", True),
    ],
)
def test_a_surplus_tensor_is_named(make_checkpoint: MakeCheckpoint, name: str, tied: bool) -> None:
    folder = make_checkpoint(tied_embeddings=tied)
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    assert name in refused(folder)


def test_each_misshapen_tensor_is_named(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(tied_embeddings=False)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        wrong = (*tensor.shape[:-1], tensor.shape[-1] + 1)
        save_file(tensors | {name: torch.zeros(wrong)}, folder / WEIGHTS)
        message = refused(folder)
        assert name in message
        assert str(wrong) in message


@pytest.mark.parametrize("wrong", [(32, 276), (276 * 32,), (1, 276, 32), ()])
def test_the_shape_counts_not_the_size(make_checkpoint: MakeCheckpoint, wrong: tuple[int, ...]) -> None:
    folder = make_checkpoint()
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(wrong)}))
    assert EMBEDDING in refused(folder)


def test_a_tensor_in_two_shards_is_named(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    places = shard(folder)
    name = next(name for name, file in places.items() if file.startswith("model-00001"))
    second = folder / "model-00002-of-00003.safetensors"
    save_file(load_file(second) | {name: load_file(folder / places[name])[name]}, second)
    assert name in refused(folder)


def test_tolerated_tensors_change_nothing(make_checkpoint: MakeCheckpoint) -> None:
    """A tied model's copy of the head, the tower's unused norm, and positions that RoPE does without."""
    folder = make_checkpoint()
    before = state_of(folder)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        tensors |= {f"audio_encoder.whisper.layer_norm.{part}": torch.ones(32) for part in ("weight", "bias")}
        del tensors[POSITIONS]

    rewrite(folder, change)
    after = state_of(folder)
    assert "decoder.head.weight" not in after
    assert not after.pop("encoder.positions").any()
    del before["encoder.positions"]
    assert same(after, before)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(276, 31)}))
    assert "lm_head.weight" in refused(folder)


def test_without_rope_positions_are_needed(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(use_rope=False)
    rewrite(folder, lambda tensors: tensors.pop(POSITIONS))
    assert POSITIONS in refused(folder)


# ---- damaged, missing and hostile files ----


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw[:100],
        lambda raw: raw[:3],
        lambda _: b"",
        lambda _: b"\xff" * 4096,
        lambda raw: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + raw[8:],
        lambda raw: raw[:8] + b"x" + raw[9:],
    ],
    ids=["half", "one-byte-short", "header-cut", "3-bytes", "empty", "garbage", "endless-header", "header-not-json"],
)
def test_damaged_weights(make_checkpoint: MakeCheckpoint, damage: Callable[[bytes], bytes], sharded: bool) -> None:
    folder = make_checkpoint()
    if sharded:
        shard(folder)
    victim = max(folder.glob("*.safetensors"))
    victim.write_bytes(damage(victim.read_bytes()))
    assert victim.name in refused(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", "pytorch_model.bin", "x.py", 7]
)
def test_the_index_stays_in_its_folder(make_checkpoint: MakeCheckpoint, name: object) -> None:
    folder = make_checkpoint()
    tensors = load_file(folder / WEIGHTS)
    for place in (folder.parent / "x.safetensors", folder / "sub" / "x.safetensors"):
        place.parent.mkdir(exist_ok=True)
        save_file(tensors, place)
    write_index(folder, {**dict.fromkeys(tensors, WEIGHTS), EMBEDDING: name})
    message = refused(folder)
    assert INDEX in message
    assert not isinstance(name, str) or repr(name) in message


@pytest.mark.parametrize("raw", ["", "[]", "{}", "no json", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_damaged_index(make_checkpoint: MakeCheckpoint, raw: str) -> None:
    folder = make_checkpoint()
    (folder / INDEX).write_text(raw)
    assert INDEX in refused(folder)


def test_missing_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    places = shard(folder)
    (folder / places[EMBEDDING]).unlink()
    assert places[EMBEDDING] in refused(folder, ModelNotFoundError)
    (folder / INDEX).unlink()
    assert WEIGHTS in refused(folder, ModelNotFoundError)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(folder, ModelNotFoundError)
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder, ModelNotFoundError)
    assert str(tmp_path / "absent") in refused(tmp_path / "absent", ModelNotFoundError)


def test_unknown_names_list_what_there_is() -> None:
    message = refused(Path("huge"), ModelNotFoundError)
    assert "tiny" in message
    for name in ("0.6b", "3B"):  # huggingface_hub is told to stay offline
        with pytest.raises(ModelNotFoundError, match=f"{name}: not on this machine, and offline"):
            arkasr.load_model(name)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


OPENED: list[str] = []
WATCHING: list[bool] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if WATCHING and event == "open":
        OPENED.append(str(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that Python opens meanwhile. An audit hook cannot be removed; it sleeps afterwards."""
    sys.addaudithook(watch)
    WATCHING.append(True)
    yield OPENED
    WATCHING.clear()
    OPENED.clear()


def test_pickles_and_remote_code_are_never_touched(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, opened: list[str]
) -> None:
    folder = make_checkpoint()
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)  # noqa: S301 - the trap is armed
    assert marker.exists()
    marker.unlink()
    traps = ["pytorch_model.bin", "model.pt", "optimizer.pkl"]
    for name in traps:
        (folder / name).write_bytes(bomb)
    for name in ("configuration_arkasr", "modeling_arkasr", "processing_arkasr", "sitecustomize", "conftest"):
        traps.append(f"{name}.py")
        (folder / traps[-1]).write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "configuration_arkasr.A", "AutoModel": "modeling_arkasr.B"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: "pytorch_model.bin"}}))
    opened.clear()
    transcript = arkasr.load_model(folder).transcribe((np.zeros(8_000, np.float32), 16_000))
    assert isinstance(transcript, arkasr.Transcript)
    assert str(folder / "config.json") in opened
    assert not [path for path in opened if Path(path).name in traps]
    (folder / WEIGHTS).unlink()
    refused(folder, ModelNotFoundError)
    assert not [path for path in opened if Path(path).name in traps]
    assert not marker.exists()


def test_a_head_that_is_no_copy_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """A tied config with a head of its own would be decoded with the wrong matrix in silence."""
    folder = make_checkpoint()
    rewrite(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointMismatchError, match=r"lm_head\.weight differs"):
        arkasr.load_model(folder)


def test_whole_number_tensors_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "'model.norm.weight' is I8" in refused(folder)


def test_weights_that_are_not_numbers_give_an_error_not_text(make_checkpoint: MakeCheckpoint) -> None:
    """NaN logits once gave token 0 with confidence 1."""
    folder = make_checkpoint()
    rewrite(folder, lambda state: state["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointMismatchError, match="not finite"):
        arkasr.load_model(folder).transcribe((np.zeros(8_000, np.float32), 16_000))
