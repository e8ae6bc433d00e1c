"""An ONNX graph in the making: nodes, inputs, outputs, and weights that go at once to a file beside it.

Unusual: the ONNX file is written here, field by field, in protobuf's wire format. The `onnx` package would do it, too,
but takes 34 MB of every install for the dozen kinds of field that a graph of ours has; the tests compare with it.
Field numbers are those of onnx.proto (ONNX IR version 10).
"""

import math
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Attribute = int | float | str | list[int]
Shape = list[int | str]

CONTRIB = "com.microsoft"
CONTRIB_OPS = {
    "DynamicQuantizeMatMul", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
    "RotaryEmbedding", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
PAGE_BYTES = 4096  # weights begin at pages, so that they can be mapped
INLINE_BYTES = 1024
_DTYPES = {np.dtype("f4"): 1, np.dtype("u1"): 2, np.dtype("i1"): 3, np.dtype("i4"): 6, np.dtype("i8"): 7}
_EXTERNAL = 1
_FLOAT, _INT, _STRING, _INTS = 1, 2, 3, 7  # kinds of attribute


class Graph:
    """Collects nodes and weights; `serialized` gives the ONNX file."""

    def __init__(self, name: str, data: BinaryIO) -> None:
        """`data` is open for writing and becomes NAME.bin beside the graph's file."""
        self.name = name
        self.offsets: dict[str, int] = {}
        self._data = data
        self._nodes: list[bytes] = []
        self._weights: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []

    def op(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        """Append a node with one output, and name that."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int | list[str], **attributes: Attribute) -> list[str]:
        """Append a node with several outputs, and name them."""
        if isinstance(outputs, int):
            outputs = [f"{kind}_{len(self._nodes)}_{i}" for i in range(outputs)]
        node = _texts(1, inputs) + _texts(2, outputs) + _text(4, kind)
        node += b"".join(_bytes(5, _attribute(name, value)) for name, value in attributes.items())
        if kind in CONTRIB_OPS:
            node += _text(7, CONTRIB)
        self._nodes.append(node)
        return outputs

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        """Declare an input; a word in the shape is a length that may vary."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: Shape) -> None:
        """Declare that a node's output of this name leaves the graph."""
        self._outputs.append(_value_info(name, dtype, shape))

    def constant(self, *values: int) -> str:
        """A short vector of int64."""
        return self.weight(np.array(values, np.int64))

    def weight(self, array: Array) -> str:
        """A weight: in the graph if it is short, else in the file."""
        if array.nbytes > INLINE_BYTES:
            return self.stream([array], array.shape, array.dtype)
        return self._add(array.shape, array.dtype, _bytes(9, np.ascontiguousarray(array).tobytes()))

    def stream(self, pieces: Iterable[Array], shape: tuple[int, ...], dtype: npt.DTypeLike) -> str:
        """A weight in the file, written piece by piece."""
        self._data.write(b"\0" * (-self._data.tell() % PAGE_BYTES))
        offset = self._data.tell()
        for piece in pieces:
            self._data.write(np.ascontiguousarray(piece, dtype).data)
        length = self._data.tell() - offset
        assert length == math.prod(shape) * np.dtype(dtype).itemsize
        place = {"location": f"{self.name}.bin", "offset": str(offset), "length": str(length)}
        entries = [_bytes(13, _text(1, key) + _text(2, value)) for key, value in place.items()]
        name = self._add(shape, dtype, b"".join(entries) + _number(14, _EXTERNAL))
        self.offsets[name] = offset
        return name

    def _add(self, shape: tuple[int, ...], dtype: npt.DTypeLike, content: bytes) -> str:
        name = f"weight_{len(self._weights)}"
        head = b"".join(_number(1, size) for size in shape) + _number(2, _DTYPES[np.dtype(dtype)]) + _text(8, name)
        self._weights.append(head + content)
        return name

    def serialized(self) -> bytes:
        """The ONNX file (ModelProto)."""
        graph = b"".join(_bytes(1, node) for node in self._nodes) + _text(2, self.name)
        for number, parts in ((5, self._weights), (11, self._inputs), (12, self._outputs)):
            graph += b"".join(_bytes(number, part) for part in parts)
        opsets = [_text(1, domain) + _number(2, version) for domain, version in (("", OPSET), (CONTRIB, CONTRIB_OPSET))]
        model = _number(1, IR_VERSION) + _text(2, "arkasr") + _bytes(7, graph)
        return model + b"".join(_bytes(8, opset) for opset in opsets)


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        kind, content = _FLOAT, _key(2, 5) + np.float32(value).tobytes()
    elif isinstance(value, int):
        kind, content = _INT, _number(3, value)
    elif isinstance(value, str):
        kind, content = _STRING, _text(4, value)
    else:
        kind, content = _INTS, b"".join(_number(8, item) for item in value)
    return _text(1, name) + content + _number(20, kind)


def _value_info(name: str, dtype: str, shape: Shape) -> bytes:
    sizes = [_text(2, size) if isinstance(size, str) else _number(1, size) for size in shape]
    tensor = _number(1, _DTYPES[np.dtype(dtype)]) + _bytes(2, b"".join(_bytes(1, size) for size in sizes))
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


# ---- protobuf's wire format ----


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers are written as two's complement
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _bytes(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _text(number: int, content: str) -> bytes:
    return _bytes(number, content.encode())


def _texts(number: int, contents: Iterable[str]) -> bytes:
    return b"".join(_text(number, content) for content in contents)
