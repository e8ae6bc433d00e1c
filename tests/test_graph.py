"""The ONNX writer: the onnx package, which arkasr does without, is the oracle."""

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from arkasr import files, pins, runtime
from arkasr.graph import INLINE_BYTES, PAGE_BYTES, Graph


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_package_reads_and_writes_the_same_bytes(part: str) -> None:
    """A field of a wrong number or kind would be lost, moved or refused."""
    ours = (pins.SHIPPED / "tiny-int8" / f"{part}.onnx").read_bytes()
    model = onnx.load_model_from_string(ours)
    assert model.SerializeToString(deterministic=True) == ours
    assert len(model.graph.node) > 40
    assert {tensor.external_data[0].value for tensor in model.graph.initializer if tensor.external_data} == {
        f"{part}.bin"
    }
    assert f"{part}.bin" in files.EXPORTED


def test_every_kind_of_field() -> None:
    data = io.BytesIO()
    graph = Graph("small", data)
    x = graph.input("x", "f4", ["rows", 3, "long name of a length"])
    short = np.array([[1.5, -2.0]], np.float32)
    weight, numbers = graph.weight(short), graph.constant(-1, 0, 2**62)
    (y,) = graph.ops("Anything", x, "", weight, outputs=["y"], f=0.1, i=-7, s="ü", ints=[3, -1])
    graph.ops("QuickGelu", y, numbers, outputs=2)
    graph.output(y, "i8", [2])
    model = onnx.load_model_from_string(graph.serialized())
    one, two = model.graph.node
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in one.attribute}
    assert values == {"f": pytest.approx(0.1), "i": -7, "s": "ü".encode(), "ints": [3, -1]}
    assert (one.op_type, one.domain, list(one.input)) == ("Anything", "", ["x", "", weight])
    assert (two.op_type, two.domain, len(two.output)) == ("QuickGelu", "com.microsoft", 2)
    assert model.graph.input[0] == helper.make_tensor_value_info("x", 1, ["rows", 3, "long name of a length"])
    assert model.graph.output[0] == helper.make_tensor_value_info("y", 7, [2])
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), short)
    assert numpy_helper.to_array(model.graph.initializer[1]).tolist() == [-1, 0, 2**62]
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert not data.getvalue()


@pytest.mark.parametrize("dtype", ["f4", "u1", "i1", "i4", "i8"])
def test_weights_beside_the_graph(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = [rng.integers(-9 if dtype[0] != "u" else 0, 9, (size, 7)).astype(dtype) for size in (500, 3, 900)]
    with (tmp_path / "graph.bin").open("wb") as data:
        graph = Graph("graph", data)
        names = [graph.stream([tables[0][:100], tables[0][100:]], (500, 7), dtype)]
        names += [graph.weight(table) for table in tables[1:]]
        for n, name in enumerate(names):
            graph.ops("Identity", name, outputs=[f"table_{n}"])
            graph.output(f"table_{n}", dtype, [len(tables[n]), 7])
        (tmp_path / "graph.onnx").write_bytes(graph.serialized())
    onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)
    assert tables[1].nbytes <= INLINE_BYTES
    assert graph.offsets.keys() == {names[0], names[2]}
    assert all(offset % PAGE_BYTES == 0 for offset in graph.offsets.values())
    session = runtime.session(tmp_path / "graph.onnx", threads=1)
    for table, read in zip(tables, session.run(None, {}), strict=True):
        np.testing.assert_array_equal(table, read)
