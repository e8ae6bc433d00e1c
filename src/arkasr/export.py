"""Checkpoint to export: ONNX graphs of encoder with adapter, and of decoder, and the files they need to be a model.

    mel [1, M, F] -> encoder.onnx -> audio [1, A, H]
    x [B, T, H], KV cache -> decoder.onnx -> token [B], logprob [B], logits [B, V], and the KV cache in place

Letters as in model.py. Of layers with alignment heads the last position's queries [B, 1, N * D], not yet rotated, leave
the decoder, too. Unusual: the graphs are built node by node from ONNX Runtime's fused operators instead of being
traced, so that the weights stream from the checkpoint's file through the quantizer to the export's, one at a time. An
export is made of nothing but numpy, and is a model by itself: its folder loads without the checkpoint.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from safetensors import safe_open

from arkasr import audio, checkpoint, files, hub, pins
from arkasr.checkpoint import TABLE_ROWS, Checkpoint
from arkasr.config import ENCODER_ROPE_THETA, LAYER_NORM_EPS, MAX_CLIP_S, ModelConfig, rope_angles
from arkasr.errors import CheckpointMismatchError, UsageError, quoted
from arkasr.graph import Graph
from arkasr.quantize import RECIPES, Floats, Linear, Recipe, Table

Precision = Literal["float32", "int8", "int4"]
DEFAULT: Precision = "int8"
Progress = Callable[[int, int], object]  # takes weights done, and weights in all

TELL_BYTES = 2**27  # a conversion of more takes seconds, which a person wants explained
MAX_POSITIONS = 2048  # of the decoder: 30 s of audio, prompt, and the most tokens
FORMAT = 3  # of the export; another number makes old exports unfindable and refused
# Configs and tokenizer, in the forms that are read.
COPIED = (files.CONFIG, files.GENERATION_CONFIG, *files.TOKENIZER_FILES)
_AGAIN = "delete the folder, and make or pull it again"
ADAPTER_OPS = {"gelu": "Gelu", "relu": "Relu", "selu": "Selu"}
_log = logging.getLogger(__name__)


class _Weights:
    """The tensors of a checkpoint by our names, each read from its mapped file when it is asked for."""

    def __init__(self, source: Checkpoint, progress: Progress) -> None:
        checkpoint.need_weights(source)
        self._places: dict[str, tuple[Path, str]] = {}
        self._progress = progress
        self._done = 0
        specs = list(checkpoint.tensor_specs(source.config))
        unread = {"encoder.positions"} if source.config.use_rope else set()
        self._total = sum(math.prod(spec.shape) for spec in specs if spec.name not in unread)
        ours = {spec.hf_name: spec.name for spec in specs}
        for shard in source.shards:
            with safe_open(shard, framework="np") as file:
                self._places |= {ours[name]: (shard, name) for name in file.offset_keys() if name in ours}

    def __call__(self, *names: str) -> Floats:
        """One tensor, or several one below the other, as float32."""
        return np.concatenate([piece for name in names for piece in self.pieces(name)])

    def pieces(self, name: str) -> Iterator[Floats]:
        """The rows of a tensor, some thousand at a time, as float32."""
        shard, hf_name = self._places[name]
        with safe_open(shard, framework="np") as file:
            rows = file.get_slice(hf_name)
            num_rows = rows.get_shape()[0]
            for start in range(0, num_rows, TABLE_ROWS):
                piece = rows[start : min(start + TABLE_ROWS, num_rows)].astype(np.float32)
                if not np.isfinite(piece).all():  # quantized, they would pass for numbers
                    raise CheckpointMismatchError(f"{shard}: tensor {hf_name} is not finite; fetch the file again")
                yield piece
                self._done += piece.size
                self._progress(self._done, self._total)


@dataclass(frozen=True)
class Manifest:
    """What an export is, what it was made from, and what its files must be."""

    format: int
    precision: Precision
    source: Mapping[str, object]  # the checkpoint's lock, for people
    table: Table
    files: Mapping[str, files.Known]


# ---- the two graphs ----


def _rope_tables(graph: Graph, num_positions: int, num_dims: int, theta: float) -> list[str]:
    return [graph.weight(table) for table in rope_angles(np.arange(num_positions), num_dims, theta)]


def _encoder(graph: Graph, config: ModelConfig, weights: _Weights, linear: Linear) -> None:
    """Mel [1, M, F] -> adapter output [1, A, H]."""

    def affine(name: str) -> list[str]:
        return [graph.weight(weights(f"{name}.weight")), graph.weight(weights(f"{name}.bias"))]

    x = graph.input("mel", "f4", [1, config.num_mels, "frames"])
    for name, stride in (("encoder.conv1", 1), ("encoder.conv2", 2)):
        x = graph.op("Conv", x, *affine(name), kernel_shape=[3], pads=[1, 1], strides=[stride])
        x = graph.op("Gelu", x)
    x = graph.op("Transpose", x, perm=[0, 2, 1])
    rope: list[str] = []
    if config.use_rope:
        longest = audio.num_encoder_frames(MAX_CLIP_S * audio.SAMPLE_RATE)
        rope = _rope_tables(graph, longest, config.encoder_head_dim // 2, ENCODER_ROPE_THETA)
    else:
        positions = graph.weight(weights("encoder.positions"))
        length = graph.op("Shape", x, start=1, end=2)
        x = graph.op("Add", x, graph.op("Slice", positions, graph.constant(0), length, graph.constant(0)))
    names = [f"encoder.layers.{n}" for n in range(config.encoder_layers)]
    normed = graph.op("LayerNormalization", x, *affine(f"{names[0]}.attention_norm"), axis=-1, epsilon=LAYER_NORM_EPS)
    for name, following in zip(names, [*(f"{n}.attention_norm" for n in names[1:]), "adapter.norm"], strict=True):
        attended = _encoder_attention(graph, config, weights, linear, name, normed, rope)
        normed, x = _skip_norm(graph, attended, x, affine(f"{name}.ffn_norm"))
        inner = graph.op("Gelu", linear(graph, normed, weights(f"{name}.fc1.weight"), weights(f"{name}.fc1.bias")))
        inner = linear(graph, inner, weights(f"{name}.fc2.weight"), weights(f"{name}.fc2.bias"))
        normed, x = _skip_norm(graph, inner, x, affine(following))
    _adapter(graph, config, weights, linear, normed)


def _encoder_attention(
    graph: Graph, config: ModelConfig, weights: _Weights, linear: Linear, name: str, x: str, rope: list[str]
) -> str:
    q_bias = weights(f"{name}.q.bias")
    bias = np.concatenate([q_bias, np.zeros_like(q_bias), weights(f"{name}.v.bias")])
    qkv = linear(graph, x, weights(*(f"{name}.{part}.weight" for part in "qkv")), bias)
    q, k, v = graph.ops("Split", qkv, outputs=3, axis=-1, num_outputs=3)
    if rope:
        heads = {"num_heads": config.encoder_heads, "rotary_embedding_dim": config.encoder_head_dim // 2}
        start = graph.constant(0)
        q, k = (graph.op("RotaryEmbedding", t, start, *rope, interleaved=1, **heads) for t in (q, k))
    attended = graph.op("MultiHeadAttention", q, k, v, num_heads=config.encoder_heads)
    return linear(graph, attended, weights(f"{name}.out.weight"), weights(f"{name}.out.bias"))


def _skip_norm(graph: Graph, x: str, residual: str, affine: list[str]) -> tuple[str, str]:
    """The normed sum, and the sum. The fused operator for both takes a tenth of the encoder's time longer."""
    total = graph.op("Add", x, residual)
    return graph.op("LayerNormalization", total, *affine, axis=-1, epsilon=LAYER_NORM_EPS), total


def _adapter(graph: Graph, config: ModelConfig, weights: _Weights, linear: Linear, x: str) -> None:
    """Normed frames [1, S, E], filled up with zeros to one group, to [1, A, H]."""
    merge = graph.constant(config.merge_factor)
    zero, one = graph.constant(0), graph.constant(1)
    lacking = graph.op("Max", graph.op("Sub", merge, graph.op("Shape", x, start=1, end=2)), zero)
    x = graph.op("Pad", x, graph.op("Concat", graph.constant(0, 0, 0, 0), lacking, zero, axis=0))
    groups = graph.op("Div", graph.op("Shape", x, start=1, end=2), merge)
    x = graph.op("Slice", x, zero, graph.op("Mul", groups, merge), one)
    x = graph.op("Reshape", x, graph.constant(1, -1, config.merge_factor * config.encoder_dim))
    x = linear(graph, x, weights("adapter.up.weight"), weights("adapter.up.bias"))
    x = graph.op(ADAPTER_OPS[config.adapter_activation], x)
    x = linear(graph, x, weights("adapter.down.weight"), weights("adapter.down.bias"))
    graph.ops("Identity", x, outputs=["audio"])
    graph.output("audio", "f4", [1, "audio_tokens", config.hidden_dim])


def _decoder(graph: Graph, source: Checkpoint, weights: _Weights, recipe: Recipe) -> Table:
    """Embeddings x [B, T, H] and the cache to the next token; rows of a call have the same T, each its own place."""
    config, aligned = source.config, {layer for layer, _ in source.alignment_heads}
    heads, kv_heads, head_dim = config.decoder_heads, config.kv_heads, config.decoder_head_dim
    cache: list[int | str] = ["rows", kv_heads, "capacity", head_dim]
    x = graph.input("x", "f4", ["rows", "positions", config.hidden_dim])
    last = graph.input("last_position", "i4", ["rows"])
    total = graph.input("num_positions", "i4", [1])
    rope = _rope_tables(graph, MAX_POSITIONS, head_dim, config.rope_theta)
    names = [f"decoder.layers.{n}" for n in range(config.decoder_layers)]
    last_queries = [graph.constant(*part) for part in ((-1, 0), (MAX_POSITIONS, heads * head_dim), (1, 2))]

    def norm(name: str) -> str:
        return graph.weight(weights(f"{name}.weight"))

    normed = graph.op(
        "SimplifiedLayerNormalization", x, norm(f"{names[0]}.attention_norm"), axis=-1, epsilon=config.rms_eps
    )
    for n, name in enumerate(names):
        parts = [f"{name}.{part}" for part in "qkv"]
        bias = weights(*(f"{part}.bias" for part in parts))
        qkv = recipe.attention(graph, normed, weights(*(f"{part}.weight" for part in parts)), bias)
        if n in aligned:  # one node and no more, for it runs whoever asks
            graph.ops("Slice", qkv, *last_queries, outputs=[f"queries_{n}"])
            graph.output(f"queries_{n}", "f4", ["rows", 1, heads * head_dim])
        past = [graph.input(f"past_{kind}_{n}", "f4", cache) for kind in ("keys", "values")]
        present = [f"present_{kind}_{n}" for kind in ("keys", "values")]
        attended, *_ = graph.ops(
            "GroupQueryAttention", qkv, "", "", *past, last, total, *rope, outputs=[f"attended_{n}", *present],
            num_heads=heads, kv_num_heads=kv_heads, do_rotary=1,
        )  # fmt: skip
        for kind in present:
            graph.output(kind, "f4", cache)
        attended = recipe.attention(graph, attended, weights(f"{name}.o.weight"), None)
        normed, x = _skip_rms_norm(graph, attended, x, norm(f"{name}.ffn_norm"), config.rms_eps)
        gate_up = recipe.mlp(graph, normed, weights(f"{name}.gate.weight", f"{name}.up.weight"), None)
        gate, up = graph.ops("Split", gate_up, outputs=2, axis=-1, num_outputs=2)
        inner = graph.op("Mul", graph.op("QuickGelu", gate, alpha=1.0), up)  # alpha 1 makes it SiLU
        inner = recipe.mlp(graph, inner, weights(f"{name}.down.weight"), None)
        if n + 1 < len(names):
            normed, x = _skip_rms_norm(graph, inner, x, norm(f"{names[n + 1]}.attention_norm"), config.rms_eps)
    newest = graph.weight(np.array(-1, np.int64))
    x, inner = (graph.op("Gather", t, newest, axis=1) for t in (x, inner))  # [B, H]: only there a token is chosen
    normed, _ = _skip_rms_norm(graph, inner, x, norm("decoder.norm"), config.rms_eps)
    return _head(graph, config, weights, recipe, normed)


def _skip_rms_norm(graph: Graph, x: str, residual: str, scale: str, eps: float) -> tuple[str, str]:
    normed, _, _, total = graph.ops("SkipSimplifiedLayerNormalization", x, residual, scale, outputs=4, epsilon=eps)
    return normed, total


def _head(graph: Graph, config: ModelConfig, weights: _Weights, recipe: Recipe, normed: str) -> Table:
    """Logits [B, V], the forbidden ones at -inf, their largest [B] and its log-probability [B]."""
    forbidden = graph.input("forbidden", "f4", [config.vocab_size])
    shape = config.vocab_size, config.hidden_dim
    table, linear = recipe.table(graph, weights.pieces("decoder.embed.weight"), shape)
    if not config.tied_embeddings:
        _, linear = recipe.table(graph, weights.pieces("decoder.head.weight"), shape)
    graph.ops("Add", linear(normed), forbidden, outputs=["logits"])
    axis = graph.constant(1)
    graph.ops("ArgMax", "logits", outputs=["token"], axis=1, keepdims=0)
    largest = graph.op("ReduceMax", "logits", axis, keepdims=0)
    graph.ops("Sub", largest, graph.op("ReduceLogSumExp", "logits", axis, keepdims=0), outputs=["logprob"])
    graph.output("token", "i8", ["rows"])
    graph.output("logprob", "f4", ["rows"])
    graph.output("logits", "f4", ["rows", config.vocab_size])
    return table


# ---- writing and finding ----


def write(
    source: Checkpoint, folder: Path, precision: Precision, *, progress: Progress = lambda _done, _all: None
) -> None:
    """Write the export of a checkpoint into an empty folder.

    It holds two graphs, the weights of each, copies of config and tokenizer, and a manifest. The same checkpoint and
    precision give the same bytes. One tensor, or a piece of a table, is in memory at a time.

    Raises:
        UsageError: the checkpoint is itself an export, or has widths that the operators lack.
        CheckpointMismatchError: a weight is not finite, or a head differs from the embeddings it is tied to.
    """
    recipe = RECIPES[precision]
    weights = _Weights(source, progress)
    _check_widths(source)
    checkpoint.check_tied_head(source)
    with (folder / "encoder.bin").open("wb") as data:
        graph = Graph("encoder", data)
        _encoder(graph, source.config, weights, recipe.encoder)
        (folder / "encoder.onnx").write_bytes(graph.serialized())
    with (folder / "decoder.bin").open("wb") as data:
        graph = Graph("decoder", data)
        table = _decoder(graph, source, weights, recipe)
        (folder / "decoder.onnx").write_bytes(graph.serialized())
    for name in COPIED:
        if (source.folder / name).exists():
            shutil.copyfile(source.folder / name, folder / name)
    known = {path.name: files.measure(path) for path in sorted(folder.iterdir())}
    manifest = Manifest(FORMAT, precision, asdict(_made_from(source)), table, known)
    files.write_text_atomically(folder / files.MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def _made_from(source: Checkpoint) -> pins.Lock:
    """The lock of a checkpoint, or for one that has none the hashes of weights and config."""
    read = [source.folder / files.CONFIG, *source.shards]
    return pins.read_lock(source.folder) or pins.Lock(None, None, {path.name: files.measure(path) for path in read})


def _check_widths(source: Checkpoint) -> None:
    """Fused attention and block-wise weights come in sixteens, as the published widths do."""
    config = source.config
    widths = {
        "decoder head width": config.decoder_head_dim,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.decoder_ffn_dim,
    }
    for name, width in widths.items():
        if width % 16:
            raise UsageError(f"{source.folder}: {name} {width} is not a multiple of 16; use --engine pytorch")


def find_or_write(
    source: Checkpoint,
    precision: Precision | None = None,
    *,
    folder: Path | None = None,
    report: Callable[[str], object] = _log.info,
    progress: Progress = lambda _done, _all: None,
) -> Path:
    """The folder of a checkpoint's export: itself, beside the weights, in the cache, or written there now.

    Args:
        source: a checkpoint, or an export.
        precision: None is int8, or whatever an export is.
        folder: where to write instead; there must be nothing yet.
        report: takes a line when the conversion takes long.
        progress: takes weights done and weights in all.

    Raises:
        CheckpointMismatchError: the export is damaged; it is named.
        UsageError: the disk is full, the cache cannot be written, `folder` holds something, or `source` is an export of
            another precision.
    """
    if folder is not None:
        if folder.exists():
            raise UsageError(f"{folder}: exists already; give a new folder")
        _write_whole(source, folder, precision or DEFAULT, progress, alone=nullcontext())
        return folder
    if not source.shards:
        made = _parse_manifest(source.folder).precision
        if precision not in (None, made):
            raise UsageError(f"{source.folder}: an export in {made}; {precision} needs the checkpoint it was made from")
        return source.folder
    folder = place(source, precision or DEFAULT)
    if not (folder / files.MANIFEST).exists():
        if sum(path.stat().st_size for path in source.shards) > TELL_BYTES:
            report(f"{source.folder.name}: converting to {precision or DEFAULT} for the processor, once")
        alone = FileLock(folder.with_name(f".{folder.name}.lock"))
        _write_whole(source, folder, precision or DEFAULT, progress, alone=alone)
    return folder


def _write_whole(
    source: Checkpoint, folder: Path, precision: Precision, progress: Progress, *, alone: AbstractContextManager[object]
) -> None:
    """`write` into a folder that appears when it is complete; one that is not is replaced."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone:
            if (folder / files.MANIFEST).exists():  # another process was first
                return
            part = folder.with_name(folder.name + files.PART)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                write(source, part, precision, progress=progress)
                shutil.rmtree(folder, ignore_errors=True)  # one without a manifest
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"{folder.parent}: cannot be written ({error.strerror}); make room, or choose another disk by ARKASR_CACHE "
            "or --output"
        ) from None


def read_manifest(folder: Path, *, hashes: bool = False) -> Manifest:
    """The manifest of an export whose files are as it says; hashed anew where asked, else as `pins.check_files` does.

    Raises:
        CheckpointMismatchError: the export is damaged, cut short, or of another version of arkasr; remedy included.
    """
    manifest = _parse_manifest(folder)
    pins.check_files(folder, manifest.files, hashes=hashes, remedy=_AGAIN)
    return manifest


def _parse_manifest(folder: Path) -> Manifest:
    path = folder / files.MANIFEST
    try:
        raw = files.read_json(path)
        if raw["format"] == FORMAT:
            known = pins.known_files(raw["files"])
            manifest = Manifest(**{**raw, "table": Table(**raw["table"]), "files": known})
            _ = RECIPES[manifest.precision], [known[name] for name in files.EXPORTED]
            return manifest
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointMismatchError(f"{path}: not a manifest of an export ({error}); {_AGAIN}") from None
    raise CheckpointMismatchError(f"{folder}: an export of format {quoted(raw['format'])}, not {FORMAT}; {_AGAIN}")


def _identity(source: Checkpoint) -> str:
    """What the export is made from: hashes where a lock file has them, else names, sizes and times of change."""
    lock = pins.read_lock(source.folder)
    if lock is not None:
        parts = [f"{name} {known.sha256}" for name, known in sorted(lock.files.items())]
    else:
        read = [*source.shards, *(path for name in COPIED if (path := source.folder / name).exists())]
        parts = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in read]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def place(source: Checkpoint, precision: Precision) -> Path:
    """The folder of an export: shipped beside a shipped model, else in the cache, where other bytes have another."""
    shipped = pins.SHIPPED / f"{source.folder.name}-{precision}"
    if source.folder.parent == pins.SHIPPED and shipped.is_dir():
        return shipped
    return hub.exports() / f"{source.folder.name}-{_identity(source)[:16]}-{precision}-{FORMAT}"
