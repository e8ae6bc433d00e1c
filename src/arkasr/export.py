"""Checkpoint to ONNX graphs: encoder with adapter, and decoder, with weights quantized by a recipe; no torch needed.

    mel [1, M, F] -> encoder.onnx -> audio [1, A, H]
    x [B, T, H], KV cache -> decoder.onnx -> token [B], logprob [B], logits [B, V], and the KV cache in place

Letters as in model.py. Unusual: the graphs are built node by node from ONNX Runtime's fused operators instead of being
traced, so that the weights stream from the checkpoint's file through the quantizer to the export's, one at a time.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from safetensors import safe_open

from arkasr import audio, checkpoint, files, hub, pins
from arkasr.checkpoint import TABLE_ROWS, Checkpoint
from arkasr.config import ENCODER_ROPE_THETA, LAYER_NORM_EPS, MAX_CLIP_S, ModelConfig
from arkasr.errors import CheckpointMismatchError, UsageError
from arkasr.graph import Array, Graph

Precision = Literal["float32", "int8", "int4"]
Floats = npt.NDArray[np.float32]

TELL_BYTES = 2**27  # a conversion of more takes seconds, which a person wants explained
MAX_POSITIONS = 2048  # of the decoder: 30 s of audio, prompt, and the most tokens
FORMAT = 1  # of the export; another number makes old exports unfindable and refused
ADAPTER_OPS = {"gelu": "Gelu", "relu": "Relu", "selu": "Selu"}
_log = logging.getLogger(__name__)


class _Weights:
    """The tensors of a checkpoint by our names, each read from its mapped file when it is asked for."""

    def __init__(self, source: Checkpoint) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        ours = {spec.hf_name: spec.name for spec in checkpoint.tensor_specs(source.config)}
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


# ---- linear layers: x [.., K] times w [N, K] transposed, plus b [N] ----

Linear = Callable[[Graph, str, Floats, Floats | None], str]


def _float(graph: Graph, x: str, w: Floats, b: Floats | None) -> str:
    y = graph.op("MatMul", x, graph.weight(w.T))
    return y if b is None else graph.op("Add", y, graph.weight(b))


def _dynamic_int8(graph: Graph, x: str, w: Floats, b: Floats | None) -> str:
    """Int8 weights with a scale a row; activations are quantized as a whole, at run time. Fast for many positions."""
    scale = np.abs(w).max(axis=1) / 127
    scale[scale == 0] = 1
    inputs = [x, graph.weight(np.rint(w / scale[:, None]).astype(np.int8).T)]
    inputs += [graph.weight(scale), graph.weight(np.zeros(len(w), np.int8))]
    return graph.op("DynamicQuantizeMatMul", *inputs, *([] if b is None else [graph.weight(b)]))


def _blocks(w: Floats, bits: int, block: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Unsigned codes [N, K / block, block * bits / 8] with zero at 2^(bits-1), and a scale [N, K / block] a block.

    The largest value gets the lowest code. With 4 bits a smaller scale, which cuts it off, may serve the others better:
    of a few shrunken scales each block takes that of the least squared error.
    """
    zero = 2 ** (bits - 1)
    blocks = w.reshape(len(w), -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scale = np.where(largest == 0, 1, -largest / zero).astype(np.float32)
    codes = _codes(blocks, scale, zero)
    if bits == 4:
        least = np.square(codes * scale - blocks).sum(axis=-1, keepdims=True)
        for shrunken in (scale * factor for factor in (0.95, 0.9, 0.85, 0.8, 0.75)):
            tried = _codes(blocks, shrunken, zero)
            error = np.square(tried * shrunken - blocks).sum(axis=-1, keepdims=True)
            better = error < least
            codes, scale = np.where(better, tried, codes), np.where(better, shrunken, scale)
            least = np.minimum(error, least)
    unsigned = (codes + zero).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[..., ::2] | unsigned[..., 1::2] << 4
    return unsigned, scale[..., 0]


def _codes(blocks: Floats, scale: Floats, zero: int) -> Floats:
    codes: Floats = np.clip(np.rint(blocks / scale), -zero, zero - 1)
    return codes


def _block_size(num_columns: int, wanted: int) -> int:
    return next(size for size in (wanted, 64, 32, 16) if num_columns % size == 0)


def _nbits(bits: int, wanted_block: int) -> Linear:
    """Block-quantized weights, unpacked as they are read: fastest for few positions, which memory bounds."""

    def linear(graph: Graph, x: str, w: Floats, b: Floats | None) -> str:
        block = _block_size(w.shape[1], wanted_block)
        codes, scale = _blocks(w, bits, block)
        bias = [] if b is None else ["", "", graph.weight(b)]
        return _matmul_nbits(
            graph, x, graph.weight(codes), graph.weight(scale), *bias, shape=w.shape, bits=bits, block=block
        )

    return linear


def _matmul_nbits(graph: Graph, *inputs: str, shape: tuple[int, ...], bits: int, block: int) -> str:
    return graph.op("MatMulNBits", *inputs, N=shape[0], K=shape[1], bits=bits, block_size=block, accuracy_level=4)


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of encoder, decoder attention and decoder MLP are quantized, and table and head."""

    encoder: Linear
    attention: Linear
    mlp: Linear
    table_bits: Literal[8, 32]


RECIPES = {
    "float32": Recipe(_float, _float, _float, 32),
    "int8": Recipe(_dynamic_int8, _nbits(8, 128), _nbits(8, 128), 8),
    "int4": Recipe(_dynamic_int8, _nbits(8, 128), _nbits(4, 32), 8),
}


@dataclass(frozen=True)
class Table:
    """Where decoder.bin holds the embedding table [V, H]: float32 rows, or 8-bit codes with a scale a block."""

    offset: int
    scale_offset: int | None
    block: int


@dataclass(frozen=True)
class Manifest:
    """What an export is, what it was made from, and what its files must be."""

    format: int
    precision: str
    source: str
    table: Table
    files: Mapping[str, files.Known]


# ---- the two graphs ----


def _rope_tables(graph: Graph, num_positions: int, num_dims: int, theta: float) -> list[str]:
    """Cos and sin [num_positions, num_dims / 2], as in model.rope_angles."""
    angles = np.arange(num_positions)[:, None] * theta ** -(np.arange(0, num_dims, 2) / num_dims)
    return [graph.weight(np.cos(angles).astype(np.float32)), graph.weight(np.sin(angles).astype(np.float32))]


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
    """The normed sum, and the sum."""
    normed, _, _, total = graph.ops("SkipLayerNormalization", x, residual, *affine, outputs=4, epsilon=LAYER_NORM_EPS)
    return normed, total


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


def _decoder(graph: Graph, config: ModelConfig, weights: _Weights, recipe: Recipe) -> Table:
    """Embeddings x [B, T, H] and the cache to the next token; rows of a call have the same T, each its own place."""
    heads, kv_heads, head_dim = config.decoder_heads, config.kv_heads, config.decoder_head_dim
    cache: list[int | str] = ["rows", kv_heads, "capacity", head_dim]
    x = graph.input("x", "f4", ["rows", "positions", config.hidden_dim])
    last = graph.input("last_position", "i4", ["rows"])
    total = graph.input("num_positions", "i4", [1])
    rope = _rope_tables(graph, MAX_POSITIONS, head_dim, config.rope_theta)
    names = [f"decoder.layers.{n}" for n in range(config.decoder_layers)]

    def norm(name: str) -> str:
        return graph.weight(weights(f"{name}.weight"))

    normed = graph.op(
        "SimplifiedLayerNormalization", x, norm(f"{names[0]}.attention_norm"), axis=-1, epsilon=config.rms_eps
    )
    for n, name in enumerate(names):
        parts = [f"{name}.{part}" for part in "qkv"]
        bias = weights(*(f"{part}.bias" for part in parts))
        qkv = recipe.attention(graph, normed, weights(*(f"{part}.weight" for part in parts)), bias)
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
    x, inner = (_last_position(graph, t) for t in (x, inner))
    normed, _ = _skip_rms_norm(graph, inner, x, norm("decoder.norm"), config.rms_eps)
    return _head(graph, config, weights, recipe, normed)


def _skip_rms_norm(graph: Graph, x: str, residual: str, scale: str, eps: float) -> tuple[str, str]:
    normed, _, _, total = graph.ops("SkipSimplifiedLayerNormalization", x, residual, scale, outputs=4, epsilon=eps)
    return normed, total


def _last_position(graph: Graph, x: str) -> str:
    """[B, T, H] -> [B, H]: only there a token is chosen."""
    return graph.op("Gather", x, graph.weight(np.array(-1, np.int64)), axis=1)


def _head(graph: Graph, config: ModelConfig, weights: _Weights, recipe: Recipe, normed: str) -> Table:
    """Logits [B, V], the forbidden ones at -inf, their largest [B] and its log-probability [B]."""
    forbidden = graph.input("forbidden", "f4", [config.vocab_size])
    add_table = _float_table if recipe.table_bits == 32 else _int8_table
    table, linear = add_table(graph, config, weights, "decoder.embed.weight")
    if not config.tied_embeddings:
        _, linear = add_table(graph, config, weights, "decoder.head.weight")
    graph.ops("Add", linear(normed), forbidden, outputs=["logits"])
    axis = graph.constant(1)
    graph.ops("ArgMax", "logits", outputs=["token"], axis=1, keepdims=0)
    largest = graph.op("ReduceMax", "logits", axis, keepdims=0)
    graph.ops("Sub", largest, graph.op("ReduceLogSumExp", "logits", axis, keepdims=0), outputs=["logprob"])
    graph.output("token", "i8", ["rows"])
    graph.output("logprob", "f4", ["rows"])
    graph.output("logits", "f4", ["rows", config.vocab_size])
    return table


def _float_table(graph: Graph, config: ModelConfig, weights: _Weights, name: str) -> tuple[Table, Callable[[str], str]]:
    """An embedding table or head as float32 rows."""
    rows = graph.stream(weights.pieces(name), (config.vocab_size, config.hidden_dim), "f4")
    return Table(graph.offsets[rows], None, 0), lambda x: graph.op("Gemm", x, rows, transB=1)


def _int8_table(graph: Graph, config: ModelConfig, weights: _Weights, name: str) -> tuple[Table, Callable[[str], str]]:
    """An embedding table or head in 8-bit blocks."""
    vocab, hidden = config.vocab_size, config.hidden_dim
    block = _block_size(hidden, 128)
    scales: list[Floats] = []

    def codes() -> Iterator[Array]:
        for rows in weights.pieces(name):
            piece, scale = _blocks(rows, 8, block)
            scales.append(scale)
            yield piece

    inputs = [graph.stream(codes(), (vocab, hidden // block, block), "u1")]
    inputs.append(graph.stream(scales, (vocab, hidden // block), "f4"))
    table = Table(graph.offsets[inputs[0]], graph.offsets[inputs[1]], block)
    return table, lambda x: _matmul_nbits(graph, x, *inputs, shape=(vocab, hidden), bits=8, block=block)


# ---- writing and finding ----


def write(source: Checkpoint, folder: Path, precision: str) -> None:
    """Write the export of a checkpoint into an empty folder: two graphs, the weights of each, and a manifest.

    The same checkpoint and precision give the same bytes. One tensor, or a piece of a table, is in memory at a time.
    """
    recipe = RECIPES[precision]
    _check_widths(source)
    checkpoint.check_tied_head(source)
    weights = _Weights(source)
    with (folder / "encoder.bin").open("wb") as data:
        graph = Graph("encoder", data)
        _encoder(graph, source.config, weights, recipe.encoder)
        (folder / "encoder.onnx").write_bytes(graph.serialized())
    with (folder / "decoder.bin").open("wb") as data:
        graph = Graph("decoder", data)
        table = _decoder(graph, source.config, weights, recipe)
        (folder / "decoder.onnx").write_bytes(graph.serialized())
    known = {name: files.Known((folder / name).stat().st_size, files.sha256(folder / name)) for name in files.EXPORTED}
    manifest = Manifest(FORMAT, precision, _identity(source), table, known)
    files.write_text_atomically(folder / files.MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


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


def find_or_write(source: Checkpoint, precision: Precision, *, report: Callable[[str], object] = _log.info) -> Path:
    """The folder of a checkpoint's export: beside the weights, in the cache, or written there now.

    Raises:
        CheckpointMismatchError: the export is damaged; it is named.
        UsageError: the disk is full or the cache cannot be written.
    """
    folder = place(source, precision)
    if (folder / files.MANIFEST).exists():
        return folder
    if sum(path.stat().st_size for path in source.shards) > TELL_BYTES:
        report(f"{source.folder.name}: converting to {precision} for the processor, once")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if (folder / files.MANIFEST).exists():  # another process was first
                return folder
            part = folder.with_name(folder.name + files.PART)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                write(source, part, precision)
                shutil.rmtree(folder, ignore_errors=True)  # one without a manifest
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"{folder.parent}: cannot be written ({error.strerror}); make room or set ARKASR_CACHE to another disk"
        ) from None
    return folder


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export whose files are as it says.

    Raises:
        CheckpointMismatchError: the export is damaged, cut short, or of another version of arkasr; remedy included.
    """
    path = folder / files.MANIFEST
    try:
        raw = files.read_json(path)
        known = {name: files.Known(**raw["files"][name]) for name in files.EXPORTED}
        manifest = Manifest(**{**raw, "table": Table(**raw["table"]), "files": known})
    except (CheckpointMismatchError, KeyError, TypeError) as error:
        raise CheckpointMismatchError(f"{path}: not a manifest of an export ({error}); delete {folder}") from None
    if manifest.format != FORMAT:
        raise CheckpointMismatchError(f"{folder}: an export of format {manifest.format}, not {FORMAT}; delete it")
    pins.check_files(folder, known, remedy="delete the folder, and it is made again")
    return manifest


def _identity(source: Checkpoint) -> str:
    """What the export was made from: hashes where a lock file has them, else names, sizes and times of change."""
    lock = pins.read_lock(source.folder)
    if lock is not None:
        parts = [f"{name} {known.sha256}" for name, known in sorted(lock.files.items())]
    else:
        read = [*source.shards, source.folder / files.CONFIG]
        parts = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in read]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def place(source: Checkpoint, precision: str) -> Path:
    """The folder of an export: shipped beside a shipped model, else in the cache, where other bytes have another."""
    shipped = pins.SHIPPED / f"{source.folder.name}-{precision}"
    if source.folder.parent == pins.SHIPPED and shipped.is_dir():
        return shipped
    return hub.cache() / "exports" / f"{source.folder.name}-{_identity(source)[:16]}-{precision}-{FORMAT}"
