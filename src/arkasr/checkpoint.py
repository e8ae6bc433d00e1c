"""A checkpoint on disk: which tensors it must hold, and both names of each.

The one table between the published (Hugging Face) names and ours is `TENSORS`; reading and writing both use it.
Unusual: shapes follow from the config, so every tensor is matched one to one before a byte of weights is read.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 of the files
import numpy as np
from safetensors import SafetensorError, safe_open

from arkasr import config as configs
from arkasr import files, hub, pins, text
from arkasr.config import Heads, ModelConfig
from arkasr.errors import CheckpointMismatchError, ModelNotFoundError, UsageError, quoted

DTYPES = ("F32", "BF16", "F16")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
TABLE_ROWS = 8192  # of the embedding table, which are read at once
# The published 3B has some 900 tensors in 130 kB of header; safetensors itself would read up to 100 MB.
MAX_HEADER_BYTES = 8 * 2**20
# Present in some copies and replaced by an identity there.
IGNORED = ("audio_encoder.whisper.layer_norm.weight", "audio_encoder.whisper.layer_norm.bias")

# Published name, our name, shape in terms of the config. {n} runs over the layers of its part.
_E, _F, _H, _M = "encoder_dim", "encoder_ffn_dim", "hidden_dim", "decoder_ffn_dim"
TENSORS: tuple[tuple[str, str, tuple[str | int, ...]], ...] = (
    ("audio_encoder.whisper.conv1.weight", "encoder.conv1.weight", (_E, "num_mels", 3)),
    ("audio_encoder.whisper.conv1.bias", "encoder.conv1.bias", (_E,)),
    ("audio_encoder.whisper.conv2.weight", "encoder.conv2.weight", (_E, _E, 3)),
    ("audio_encoder.whisper.conv2.bias", "encoder.conv2.bias", (_E,)),
    ("audio_encoder.whisper.embed_positions.weight", "encoder.positions", ("max_encoder_frames", _E)),
    ("audio_encoder.whisper.layers.{n}.self_attn_layer_norm.weight", "encoder.layers.{n}.attention_norm.weight", (_E,)),
    ("audio_encoder.whisper.layers.{n}.self_attn_layer_norm.bias", "encoder.layers.{n}.attention_norm.bias", (_E,)),
    ("audio_encoder.whisper.layers.{n}.self_attn.q_proj.weight", "encoder.layers.{n}.q.weight", (_E, _E)),
    ("audio_encoder.whisper.layers.{n}.self_attn.q_proj.bias", "encoder.layers.{n}.q.bias", (_E,)),
    ("audio_encoder.whisper.layers.{n}.self_attn.k_proj.weight", "encoder.layers.{n}.k.weight", (_E, _E)),
    ("audio_encoder.whisper.layers.{n}.self_attn.v_proj.weight", "encoder.layers.{n}.v.weight", (_E, _E)),
    ("audio_encoder.whisper.layers.{n}.self_attn.v_proj.bias", "encoder.layers.{n}.v.bias", (_E,)),
    ("audio_encoder.whisper.layers.{n}.self_attn.out_proj.weight", "encoder.layers.{n}.out.weight", (_E, _E)),
    ("audio_encoder.whisper.layers.{n}.self_attn.out_proj.bias", "encoder.layers.{n}.out.bias", (_E,)),
    ("audio_encoder.whisper.layers.{n}.final_layer_norm.weight", "encoder.layers.{n}.ffn_norm.weight", (_E,)),
    ("audio_encoder.whisper.layers.{n}.final_layer_norm.bias", "encoder.layers.{n}.ffn_norm.bias", (_E,)),
    ("audio_encoder.whisper.layers.{n}.fc1.weight", "encoder.layers.{n}.fc1.weight", (_F, _E)),
    ("audio_encoder.whisper.layers.{n}.fc1.bias", "encoder.layers.{n}.fc1.bias", (_F,)),
    ("audio_encoder.whisper.layers.{n}.fc2.weight", "encoder.layers.{n}.fc2.weight", (_E, _F)),
    ("audio_encoder.whisper.layers.{n}.fc2.bias", "encoder.layers.{n}.fc2.bias", (_E,)),
    ("audio_encoder.layer_norm.weight", "adapter.norm.weight", (_E,)),
    ("audio_encoder.layer_norm.bias", "adapter.norm.bias", (_E,)),
    ("audio_encoder.adapting.0.weight", "adapter.up.weight", ("adapter_dim", "merged_dim")),
    ("audio_encoder.adapting.0.bias", "adapter.up.bias", ("adapter_dim",)),
    ("audio_encoder.adapting.2.weight", "adapter.down.weight", (_H, "adapter_dim")),
    ("audio_encoder.adapting.2.bias", "adapter.down.bias", (_H,)),
    (EMBEDDINGS, "decoder.embed.weight", ("vocab_size", _H)),
    ("model.layers.{n}.input_layernorm.weight", "decoder.layers.{n}.attention_norm.weight", (_H,)),
    ("model.layers.{n}.self_attn.q_proj.weight", "decoder.layers.{n}.q.weight", (_H, _H)),
    ("model.layers.{n}.self_attn.q_proj.bias", "decoder.layers.{n}.q.bias", (_H,)),
    ("model.layers.{n}.self_attn.k_proj.weight", "decoder.layers.{n}.k.weight", ("kv_dim", _H)),
    ("model.layers.{n}.self_attn.k_proj.bias", "decoder.layers.{n}.k.bias", ("kv_dim",)),
    ("model.layers.{n}.self_attn.v_proj.weight", "decoder.layers.{n}.v.weight", ("kv_dim", _H)),
    ("model.layers.{n}.self_attn.v_proj.bias", "decoder.layers.{n}.v.bias", ("kv_dim",)),
    ("model.layers.{n}.self_attn.o_proj.weight", "decoder.layers.{n}.o.weight", (_H, _H)),
    ("model.layers.{n}.post_attention_layernorm.weight", "decoder.layers.{n}.ffn_norm.weight", (_H,)),
    ("model.layers.{n}.mlp.gate_proj.weight", "decoder.layers.{n}.gate.weight", (_M, _H)),
    ("model.layers.{n}.mlp.up_proj.weight", "decoder.layers.{n}.up.weight", (_M, _H)),
    ("model.layers.{n}.mlp.down_proj.weight", "decoder.layers.{n}.down.weight", (_H, _M)),
    ("model.norm.weight", "decoder.norm.weight", (_H,)),
    (HEAD, "decoder.head.weight", ("vocab_size", _H)),
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its published name, ours, and its shape."""

    hf_name: str
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config, tokenizer and tensor headers agree; weights are read later, memory-mapped.

    An export has no shards: its weights are for the CPU engine alone. The alignment heads are the decoder's whose
    attention tells where a token was heard: those that were chosen, or `config.default_alignment_heads`.
    """

    folder: Path
    config: ModelConfig
    rules: text.TextRules
    shards: tuple[Path, ...]
    alignment_heads: Heads
    alignment_chosen: bool


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor the architecture has, in file order; a tied head is not one of them."""
    derived = {
        "merged_dim": config.merge_factor * config.encoder_dim,
        "adapter_dim": 2 * config.hidden_dim,
        "kv_dim": config.kv_heads * config.decoder_head_dim,
    }
    for hf_name, name, axes in TENSORS:
        if name == "decoder.head.weight" and config.tied_embeddings:
            continue
        shape = tuple(
            axis if isinstance(axis, int) else derived[axis] if axis in derived else _size(config, axis)
            for axis in axes
        )
        if "{n}" not in hf_name:
            yield TensorSpec(hf_name, name, shape)
            continue
        layers = config.encoder_layers if name.startswith("encoder.") else config.decoder_layers
        for n in range(layers):
            yield TensorSpec(hf_name.format(n=n), name.format(n=n), shape)


def _size(config: ModelConfig, field: str) -> int:
    value = vars(config)[field]
    assert isinstance(value, int), field
    return value


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Find a model, downloading it if need be, and check its files, config, tokenizer and every tensor's header.

    Raises:
        ModelNotFoundError: no such model, or a file is missing.
        CheckpointMismatchError: a file is damaged, or the parts contradict each other; it, or the tensor, key or
            token, is named.
    """
    folder = hub.pull(model)
    pins.check(folder)
    config = configs.load(folder)
    rules = text.load(
        folder,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        audio_token_id=config.audio_token_id,
    )
    shards = _shards(folder)
    if shards:
        _match(folder, config, shards)
    heads = _alignment_heads(folder, config)
    return Checkpoint(
        folder,
        config,
        rules,
        shards,
        alignment_heads=heads or configs.default_alignment_heads(config),
        alignment_chosen=heads is not None,
    )


def _alignment_heads(folder: Path, config: ModelConfig) -> Heads | None:
    """The heads that generation_config.json names, as Whisper's do: a list of [layer, head]; None where it has none.

    Raises:
        CheckpointMismatchError: they are not heads of this decoder, or one stands twice.
    """
    path = folder / files.GENERATION_CONFIG
    listed = files.read_json(path).get("alignment_heads") if path.exists() else None
    if listed is None:
        return None
    heads: list[tuple[int, int]] = []
    for pair in listed if isinstance(listed, list) else []:
        match pair:
            case [int(layer), int(head)] if not {type(layer), type(head)} & {bool}:
                heads.append((layer, head))
    inside = all(0 <= n < config.decoder_layers and 0 <= head < config.decoder_heads for n, head in heads)
    if not heads or not inside or not len(set(heads)) == len(heads) == len(listed):
        raise CheckpointMismatchError(
            f"{path}: alignment_heads is {quoted(listed)}, wanted different pairs [layer, head] of "
            f"{config.decoder_layers} layers with {config.decoder_heads} heads each"
        )
    return tuple(heads)


def need_weights(source: Checkpoint) -> None:
    """Refuse an export where a checkpoint's own weights are needed.

    Raises:
        UsageError: it is an export.
    """
    if not source.shards:
        raise UsageError(f"{source.folder}: an export, which only the CPU engine can use; give the checkpoint itself")


def _shards(folder: Path) -> tuple[Path, ...]:
    """The weight files: none in an export, one, or those the index names, as plain file names inside the folder."""
    index_path = folder / files.INDEX
    if not index_path.exists():
        if (folder / files.MANIFEST).exists() and not (folder / files.WEIGHTS).exists():
            return ()
        if not (folder / files.WEIGHTS).exists():
            raise ModelNotFoundError(f"{folder}: neither {files.WEIGHTS} nor {files.INDEX}; fetch the weights")
        return (folder / files.WEIGHTS,)
    try:
        names = sorted(set(files.read_json(index_path)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise CheckpointMismatchError(f"{index_path}: not a safetensors index; fetch the file again") from None
    for name in names:
        if not isinstance(name, str) or not files.is_weights(name):
            raise CheckpointMismatchError(f"{index_path}: {quoted(name)} is not a weights file beside the index")
        if not (folder / name).exists():
            raise ModelNotFoundError(f"{folder / name}: missing, {files.INDEX} names it; fetch the weights again")
    return tuple(folder / name for name in names)


def _match(folder: Path, config: ModelConfig, shards: tuple[Path, ...]) -> None:
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        for name, shape in _headers(shard).items():
            if name in found:
                raise CheckpointMismatchError(
                    f"{shard}: tensor {quoted(name)} is also in another shard; fetch the weights again"
                )
            found[name] = shape
    match(found, config, str(folder))


def match(found: Mapping[str, tuple[int, ...]], config: ModelConfig, place: str) -> None:
    """Refuse tensors, by published name and shape, that are not exactly those of a config; `place` names them.

    Raises:
        CheckpointMismatchError: one is missing, surplus or of another shape.
    """
    specs = {spec.hf_name: spec.shape for spec in tensor_specs(config)}
    surplus = found.keys() - specs.keys() - set(IGNORED)
    if config.tied_embeddings and HEAD in surplus:
        specs[HEAD] = (config.vocab_size, config.hidden_dim)
        surplus.remove(HEAD)
    missing = specs.keys() - found.keys()
    if config.use_rope:
        missing.discard("audio_encoder.whisper.embed_positions.weight")
    for kind, names in (("missing", missing), ("surplus", surplus)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointMismatchError(
                f"{place}: {kind} tensor {quoted(min(names))}{more}; not the config's architecture"
            )
    for name, shape in found.items():
        if name in specs and shape != specs[name]:
            raise CheckpointMismatchError(
                f"{place}: tensor {quoted(name)} has shape {quoted(shape)}, config.json says {specs[name]}"
            )


def _headers(shard: Path) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of each tensor in one file, without reading weights."""
    size = files.check(shard)
    try:
        with shard.open("rb") as head:
            header_bytes = int.from_bytes(head.read(8), "little")
        if header_bytes > min(MAX_HEADER_BYTES, size):
            raise CheckpointMismatchError(
                f"{shard}: claims a header of {header_bytes} bytes, which no such model has; fetch it again"
            )
        with safe_open(shard, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            for name, piece in slices.items():
                if piece.get_dtype() not in DTYPES:
                    raise CheckpointMismatchError(
                        f"{shard}: tensor {quoted(name)} is {piece.get_dtype()}; arkasr reads {', '.join(DTYPES)}"
                    )
            return {name: tuple(piece.get_shape()) for name, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointMismatchError(
            f"{shard}: damaged safetensors file ({quoted(str(error))}); fetch it again"
        ) from None


def check_tied_head(source: Checkpoint) -> None:
    """Compare a head that stands beside tied embeddings with them, as stored, some thousand rows at a time.

    Raises:
        CheckpointMismatchError: the head is not a copy.
    """
    if not source.config.tied_embeddings:
        return
    with ExitStack() as stack:
        shards = [stack.enter_context(safe_open(shard, framework="np")) for shard in source.shards]
        tied = [shard.get_slice(name) for shard in shards for name in sorted({HEAD, EMBEDDINGS} & set(shard.keys()))]
        if len(tied) < 2:
            return
        num_rows = source.config.vocab_size
        for start in range(0, num_rows, TABLE_ROWS):
            one, other = (table[start : min(start + TABLE_ROWS, num_rows)] for table in tied)
            if not np.array_equal(one, other):
                raise CheckpointMismatchError(
                    f"{source.folder}: {HEAD} differs from {EMBEDDINGS}, but config.json ties them"
                )
