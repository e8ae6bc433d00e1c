"""Ideas that small graphs, or the encoder alone, can judge; and how ideas are measured. The program is ideas.py."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from arkasr import checkpoint, export, quantize, runtime
from arkasr import graph as graph_module
from arkasr.config import LAYER_NORM_EPS
from arkasr.graph import Graph
from cpu import spread

WIDTH, HEADS, HIDDEN, VOCAB = 1280, 20, 896, 151936  # of the 0.6b shape

Floats = npt.NDArray[np.float32]
Ways = Mapping[str, Callable[[], object]]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """Where things lie, and how often to measure."""

    folder: Path
    speech: Path
    tokenizer: Path
    rounds: int
    processes: int


# ---- measuring ----


def race(ways: Ways, *, rounds: int, runs: int = 1) -> dict[str, Numbers]:
    """Milliseconds a run of ways that take turns; each turn begins with a pause and a run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            time.sleep(0.05)  # the threads of the one before spin on for a while
            run()
            started = time.perf_counter()
            for _ in range(runs):
                run()
            times[name].append(1e3 * (time.perf_counter() - started) / runs)
    return {name: spread(values) for name, values in times.items()}


def compared(numbers: Mapping[str, Numbers], unit: str = "ms", **more: Any) -> Numbers:
    """A result of which the first name is the baseline."""
    (baseline, base), *tried = numbers.items()
    return {
        "unit": unit,
        "baseline": {baseline: base},
        "tried": dict(tried),
        "ratio": {name: round(base["median"] / number["median"], 3) for name, number in tried},
        "ratio_of_least": {name: round(base["min"] / number["min"], 3) for name, number in tried},
        **more,
    }


def session(build: Callable[[Graph], object]) -> Any:
    """A small graph, loaded."""
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "small.bin").open("wb") as data:
            graph = Graph("small", data)
            build(graph)
        path = Path(folder, "small.onnx")
        path.write_bytes(graph.serialized())
        return runtime.session(path, threads=0)


def runner(build: Callable[[Graph], object], **feeds: npt.NDArray[Any]) -> Callable[[], list[Floats]]:
    """A call that runs a small graph on fixed inputs."""
    loaded = session(build)
    return lambda: loaded.run(None, feeds)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def difference(wanted: Floats, got: Floats) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def leave(graph: Graph, *names: str) -> None:
    """Let tensors of rank 3 leave a small graph."""
    for n, name in enumerate(names):
        graph.ops("Identity", name, outputs=[f"y{n}"])
        graph.output(f"y{n}", "f4", [1, f"frames{n}", f"width{n}"])


# ---- small graphs ----


def attention(graph: Graph) -> None:
    """What the encoder does now."""
    q, k, v = (graph.input(name, "f4", [1, "frames", WIDTH]) for name in "qkv")
    leave(graph, graph.op("MultiHeadAttention", q, k, v, num_heads=HEADS))


def product_attention(graph: Graph) -> None:
    """Two integer products around a softmax, on operands that are quantized as they come."""
    quantized = []
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        x = graph.op("Reshape", graph.input(name, "f4", [1, "frames", WIDTH]), graph.constant(0, 0, HEADS, -1))
        quantized.append(graph.ops("DynamicQuantizeLinear", graph.op("Transpose", x, perm=perm), outputs=3))
    scores = integer_product(graph, *quantized[:2])
    scores = graph.op("Mul", scores, graph.weight(np.array([(HEADS / WIDTH) ** 0.5], np.float32)))
    probs = graph.ops("DynamicQuantizeLinear", graph.op("Softmax", scores, axis=-1), outputs=3)
    y = graph.op("Transpose", integer_product(graph, probs, quantized[2]), perm=[0, 2, 1, 3])
    leave(graph, graph.op("Reshape", y, graph.constant(0, 0, -1)))


def integer_product(graph: Graph, a: list[str], b: list[str]) -> str:
    """Float product of two tensors, each of codes, scale and zero."""
    y = graph.op("Cast", graph.op("MatMulInteger", a[0], b[0], a[2], b[2]), to=1)
    return graph.op("Mul", y, graph.op("Mul", a[1], b[1]))


def int8_attention(asked: Asked) -> Numbers:
    """Attention of one encoder layer in int8, and by plain products without the flash kernel."""
    parts = {}
    for frames in (500, 1500):
        feeds = {name: normal(1, frames, WIDTH, seed=seed) for seed, name in enumerate("qkv")}
        ways = {"MultiHeadAttention float32": runner(attention, **feeds)}
        with mock.patch.dict(os.environ, {"ORT_DISABLE_FLASH_ATTENTION": "1"}):
            ways["MultiHeadAttention without flash"] = runner(attention, **feeds)
        ways["int8 products"] = runner(product_attention, **feeds)
        wanted = ways["MultiHeadAttention float32"]()[0]
        errors = {name: round(difference(wanted, run()[0]), 5) for name, run in ways.items()}
        parts[f"{frames} frames"] = compared(race(ways, rounds=asked.rounds, runs=5), relative_error=errors)
    return {"parts": parts}


def fused_qkv(asked: Asked) -> Numbers:
    """One product for q, k and v, split afterwards (as now), against three."""
    linear = quantize.RECIPES["int8"].encoder

    def build(graph: Graph, pieces: int) -> None:
        x, w = graph.input("x", "f4", [1, "frames", WIDTH]), normal(3 * WIDTH, WIDTH)
        products = [linear(graph, x, rows, rows[:, 0]) for rows in np.split(w, pieces)]
        leave(graph, *(products if pieces == 3 else graph.ops("Split", *products, outputs=3, axis=-1, num_outputs=3)))

    parts = {}
    for frames in (200, 500, 1500):
        x = normal(1, frames, WIDTH)
        ways = {name: runner(partial(build, pieces=n), x=x) for name, n in (("fused", 1), ("three", 3))}
        parts[f"{frames} frames"] = compared(race(ways, rounds=asked.rounds, runs=10))
    return {"parts": parts}


def head(graph: Graph, *, vocab: int, bits: int, block: int) -> None:
    """The end of the decoder: logits of x [B, H], the best token and its log-probability."""
    x, forbidden = graph.input("x", "f4", ["rows", HIDDEN]), graph.input("forbidden", "f4", [vocab])
    codes = np.random.default_rng(0).integers(0, 256, (vocab, HIDDEN // block, block * bits // 8), np.uint8)
    inputs = [x, graph.weight(codes), graph.weight(np.full((vocab, HIDDEN // block), 0.01, np.float32))]
    product = quantize._matmul_nbits(graph, *inputs, shape=(vocab, HIDDEN), bits=bits, block=block)  # noqa: SLF001
    logits = graph.op("Add", product, forbidden)
    graph.ops("ArgMax", logits, outputs=["token"], axis=1, keepdims=0)
    largest = graph.op("ReduceMax", logits, graph.constant(1), keepdims=0)
    total = graph.op("ReduceLogSumExp", logits, graph.constant(1), keepdims=0)
    graph.ops("Sub", largest, total, outputs=["logprob"])
    graph.output("token", "i8", ["rows"])
    graph.output("logprob", "f4", ["rows"])


def head_runner(rows: int, *, vocab: int = VOCAB, bits: int = 8, block: int = 128) -> Callable[[], object]:
    build = partial(head, vocab=vocab, bits=bits, block=block)
    return runner(build, x=normal(rows, HIDDEN), forbidden=np.zeros(vocab, np.float32))


def head_subset(asked: Asked) -> Numbers:
    """The head over all rows of the table against 32000 of them."""
    ways = {f"{vocab} rows": head_runner(1, vocab=vocab) for vocab in (VOCAB, 32000)}
    return compared(race(ways, rounds=asked.rounds, runs=20))


# ---- the encoder of the 0.6b shape ----


def padding(asked: Asked) -> Numbers:
    """The encoder on 4 s at its own length against filled up to 30 s."""
    source = checkpoint.open_checkpoint(asked.folder)
    path = export.place(source, "int8") / "encoder.onnx"
    loaded = runtime.session(path, threads=0, stop_spinning=True)
    mels = {seconds: {"mel": normal(1, 128, 100 * seconds)} for seconds in (4, 30)}
    ways = {"filled up to 30 s": partial(loaded.run, None, mels[30]), "4 s": partial(loaded.run, None, mels[4])}
    return compared(race(ways, rounds=asked.processes))


def fused_skip_norm(graph: Graph, x: str, residual: str, affine: list[str]) -> tuple[str, str]:
    """Takes export._skip_norm's place."""
    normed, _, _, total = graph.ops("SkipLayerNormalization", x, residual, *affine, outputs=4, epsilon=LAYER_NORM_EPS)
    return normed, total


def encoder_graph(asked: Asked) -> Numbers:
    """The encoder's sums and norms as two operators, as now, against ONNX Runtime's fused SkipLayerNormalization."""
    source = checkpoint.open_checkpoint(asked.folder)
    now = export._skip_norm  # noqa: SLF001
    loaded = {}
    for name, norm in (("Add and LayerNormalization", now), ("SkipLayerNormalization", fused_skip_norm)):
        weights = export._Weights(source, lambda _done, _all: None)  # noqa: SLF001
        with (
            mock.patch.object(graph_module, "CONTRIB_OPS", graph_module.CONTRIB_OPS | {"SkipLayerNormalization"}),
            mock.patch.object(export, "_skip_norm", norm),
            tempfile.TemporaryDirectory(dir=asked.folder.parent) as folder,
        ):
            path = Path(folder, "encoder.onnx")
            with path.with_suffix(".bin").open("wb") as data:
                graph = Graph("encoder", data)
                export._encoder(graph, source.config, weights, quantize.RECIPES["int8"].encoder)  # noqa: SLF001
            path.write_bytes(graph.serialized())
            loaded[name] = runtime.session(path, threads=0, stop_spinning=True)
    parts = {}
    for seconds in (4, 10, 30):
        mel = {"mel": normal(1, 128, 100 * seconds)}
        ways = {name: partial(encoder.run, None, mel) for name, encoder in loaded.items()}
        parts[f"{seconds} s"] = compared(race(ways, rounds=asked.processes))
    return {"parts": parts}
