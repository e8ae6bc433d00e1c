"""Linear layers and embedding tables in the graphs of an export, with weights quantized by a recipe.

Encoder layers are bound by arithmetic and take `DynamicQuantizeMatMul`; decoder layers are bound by memory and take
`MatMulNBits`, which quantizes activations block by block, so that a row never depends on its neighbours.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arkasr.graph import Array, Graph

Floats = npt.NDArray[np.float32]

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


# ---- the embedding table [V, H], which is also the head where they are tied ----


@dataclass(frozen=True)
class Table:
    """Where decoder.bin holds the embedding table [V, H]: float32 rows, or 8-bit codes with a scale a block."""

    offset: int
    scale_offset: int | None
    block: int


# Of a graph, the rows in pieces, and [V, H]: where the table lies, and the product of x [B, H] with it.
Tables = Callable[[Graph, Iterable[Floats], tuple[int, int]], tuple[Table, Callable[[str], str]]]


def _float_table(graph: Graph, pieces: Iterable[Floats], shape: tuple[int, int]) -> tuple[Table, Callable[[str], str]]:
    rows = graph.stream(pieces, shape, "f4")
    return Table(graph.offsets[rows], None, 0), lambda x: graph.op("Gemm", x, rows, transB=1)


def _int8_table(graph: Graph, pieces: Iterable[Floats], shape: tuple[int, int]) -> tuple[Table, Callable[[str], str]]:
    vocab, hidden = shape
    block = _block_size(hidden, 128)
    scales: list[Floats] = []

    def codes() -> Iterator[Array]:
        for rows in pieces:
            piece, scale = _blocks(rows, 8, block)
            scales.append(scale)
            yield piece

    inputs = [graph.stream(codes(), (vocab, hidden // block, block), "u1")]
    inputs.append(graph.stream(scales, (vocab, hidden // block), "f4"))
    table = Table(graph.offsets[inputs[0]], graph.offsets[inputs[1]], block)
    return table, lambda x: _matmul_nbits(graph, x, *inputs, shape=shape, bits=8, block=block)


# ---- recipes ----


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of encoder, decoder attention and decoder MLP are quantized, and table and head."""

    encoder: Linear
    attention: Linear
    mlp: Linear
    table: Tables


_int8 = _nbits(8, 128)
RECIPES = {
    "float32": Recipe(_float, _float, _float, _float_table),
    "int8": Recipe(_dynamic_int8, _int8, _int8, _int8_table),
    "int4": Recipe(_dynamic_int8, _int8, _nbits(4, 32), _int8_table),
}
