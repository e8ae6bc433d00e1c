"""An export as a model: it needs no checkpoint, is pulled and checked like one, and says what it cannot do."""

import json
import os
from pathlib import Path

import onnx
import pytest

import arkasr
from arkasr import audio, checkpoint, engines, export, files
from arkasr.checkpoint import Checkpoint
from arkasr.engines import DecodeOptions
from arkasr.errors import CheckpointMismatchError
from arkasr.export import Precision
from conftest import MakeCheckpoint, Run

CLIP = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "int4")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_export_is_a_model(tiny: Checkpoint, tmp_path: Path, precision: Precision) -> None:
    """Without the checkpoint, in any place, it says what the checkpoint says."""
    folder = export.find_or_write(tiny, precision, folder=tmp_path / "elsewhere" / "here")
    assert [path.name for path in folder.parent.iterdir()] == ["here"]
    opened = checkpoint.open_checkpoint(folder)
    assert export.find_or_write(opened) == folder == export.find_or_write(opened, precision)
    options = DecodeOptions()
    waveforms = [audio.load(CLIP)]
    ours = engines.load_engine(tiny, name="onnx", dtype=precision).generate(waveforms, options)
    assert engines.load_engine(opened).generate(waveforms, options)[0].ids == ours[0].ids
    assert arkasr.load_model(folder).transcribe(CLIP).text == "RUBOUT G M E F THREE NINE"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("transcribe CLIP --model EXPORT --engine pytorch", "only the CPU engine"),
        ("transcribe CLIP --model EXPORT --device cuda", "cuda"),
        ("transcribe CLIP --model EXPORT --dtype float32", "an export in int4"),
        ("export EXPORT", "an export in int4"),
        ("export EXPORT --output NEW", "only the CPU engine"),
        ("export tiny --output EXPORT", "exists already"),
        ("export tiny --output CLIP/below", "cannot be written"),
    ],
)
def test_what_an_export_cannot_do(run: Run, tiny: Checkpoint, tmp_path: Path, flags: str, told: str) -> None:
    folder = export.find_or_write(tiny, "int4", folder=tmp_path / "export")
    names = {
        "EXPORT": str(folder),
        "CLIP": str(CLIP),
        "NEW": str(tmp_path / "new"),
        "NONE": str(tmp_path / "none.jsonl"),
    }
    arguments = flags
    for name, value in names.items():
        arguments = arguments.replace(name, value)
    code, out, err = run(*arguments.split())
    assert (code, out) == (1, [])
    (line,) = [line for line in err if not line.startswith("model tiny")]
    assert told in line
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_export_commands(run: Run, cache: Path, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = str(make_checkpoint())
    code, (line,), err = run("export", source)
    in_cache = Path(line)
    assert (code, err, in_cache.parent) == (0, [], cache)
    assert run("export", source) == (0, [line], [])
    folder = tmp_path / "new"
    assert run("export", source, "--precision", "int8", "--output", folder) == (0, [str(folder)], [])
    for path in folder.iterdir():
        assert path.read_bytes() == (in_cache / path.name).read_bytes()
    _, (line,), _ = run("models", "verify", folder)
    assert line.startswith(f"{folder}: 6 files have their SHA-256")
    status = (folder / "decoder.bin").stat()
    data = bytearray((folder / "decoder.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "decoder.bin").write_bytes(data)
    os.utime(folder / "decoder.bin", ns=(status.st_atime_ns, status.st_mtime_ns))  # only a hash finds it
    code, _, (line,) = run("models", "verify", folder)
    assert code == 1
    assert "decoder.bin has SHA-256" in line


def test_a_graph_cannot_read_other_files(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = export.find_or_write(tiny, folder=tmp_path / "export")
    (folder / "encoder.bin").rename(tmp_path / "encoder.bin")
    (folder / "encoder.bin").write_bytes(b"")
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../encoder.bin"
    (folder / "encoder.onnx").write_bytes(graph.SerializeToString())
    manifest = json.loads((folder / files.MANIFEST).read_text())
    for name in ("encoder.onnx", "encoder.bin"):
        manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
    (folder / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatchError, match=r"encoder\.onnx: ONNX Runtime .* cannot run it"):
        arkasr.load_model(folder)


def test_progress_ends_at_all(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    source = checkpoint.open_checkpoint(make_checkpoint())
    export.find_or_write(source, folder=tmp_path / "new", progress=lambda done, total: said.append((done, total)))
    assert said == sorted(said)
    assert said[-1][0] == said[-1][1]
    assert said[-1][0] > 50_000
