"""The CPU engine against the network it was exported from, and the cache of exports against accidents."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from arkasr import audio, checkpoint, engines, export, files, metrics, model, pins
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.config import ModelConfig
from arkasr.data import read_manifest
from arkasr.engines import Clip, DecodeOptions, Generation
from arkasr.engines.onnx import MAX_ROWS, OnnxEngine, _Batch, _Row
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import CheckpointMismatchError, UsageError
from arkasr.export import Precision
from conftest import MakeCheckpoint, byte_tokenizer, random_network

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "int4")
EDGES = (160, 161, 319, 320, 480, 640, 700, 16_000)  # samples; one frame, less than one group, a whole second
LONGEST = 478_400
FORBID_TORCH = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise AssertionError("torch is imported")
sys.meta_path.insert(0, Forbid())
"""


@dataclass(frozen=True)
class Speech:
    """The test clips of AN4 and what is said in them."""

    waveforms: list[Waveform]
    texts: list[str]


@pytest.fixture(scope="module")
def an4(shared: Path) -> Speech:
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))
    assert len(utterances) == 130
    return Speech([audio.load(u.audio) for u in utterances], [u.text for u in utterances])


@pytest.fixture(scope="module")
def said(tiny: Checkpoint, an4: Speech) -> dict[str, list[Generation]]:
    """What each precision says about AN4, 20 clips at a time."""
    return {precision: in_batches(onnx_engine(tiny, precision), an4.waveforms, 20) for precision in PRECISIONS[:2]}


def onnx_engine(source: Checkpoint, precision: Any, *, threads: int = 1) -> OnnxEngine:
    return OnnxEngine.load(source, precision=precision, threads=threads, report=str)


def in_batches(engine: engines.Engine, waveforms: Sequence[Waveform], size: int) -> list[Generation]:
    pieces = [waveforms[i : i + size] for i in range(0, len(waveforms), size)]
    return [generation for piece in pieces for generation in engine.generate(piece, DecodeOptions())]


def ids_of(generations: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [generation.ids for generation in generations]


def noise(num_samples: int, gain: float = 0.1, *, seed: int = 0) -> Waveform:
    values = np.random.default_rng(seed + num_samples).standard_normal(num_samples) * gain
    return values.astype(np.float32)


def load_precision(folder: Path, precision: Any = "int8") -> OnnxEngine:
    return onnx_engine(checkpoint.open_checkpoint(folder), precision)


def run(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Our code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str], *, code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out


# ---- the graphs are the network ----


def engine_logits(engine: OnnxEngine, waveform: Waveform, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Logits [len(ids) + 1, V] after the prompt, and after each id by a decode step."""
    sampled = Clip(waveform, DecodeOptions(temperature=1.0))  # which is what logits leave the graph for
    x = engine._prompt(sampled)
    batch = _Batch(engine, 1, x.shape[1] + len(ids))
    batch.prefill(x, _Row(sampled, x.shape[1], np.random.default_rng(0)))
    logits = [batch._answers[2][0].copy()]
    for token in ids:
        batch._next_ids[0] = token
        batch.step()
        logits.append(batch._answers[2][0].copy())
    return np.array(logits, np.float64)


def network_logits(engine: PyTorchEngine, waveform: Waveform, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """The same by one uncached forward in PyTorch."""
    config = engine.network.config
    prompt = engine.rules.prompt_ids(audio.num_audio_tokens(len(waveform), config.merge_factor))
    mel = torch.from_numpy(audio.log_mel(waveform, config.num_mels))[None]
    with torch.inference_mode():
        logits = engine.network(mel, torch.tensor([mel.shape[2]]), torch.tensor([[*prompt, *ids]]))
    return np.asarray(logits[0, len(prompt) - 1 :].double().numpy())


CONFIGS: dict[str, dict[str, object]] = {
    "as published": {},
    "positions instead of rope": {"use_rope": False},
    "head of its own": {"tied_embeddings": False},
    "relu": {"adapter_activation": "relu"},
    "selu": {"adapter_activation": "selu"},
    "merge 1": {"merge_factor": 1},
    "merge 2": {"merge_factor": 2},
    "merge 3": {"merge_factor": 3},
    "one layer": {"encoder_layers": 1, "decoder_layers": 1},
    "wide heads": {"encoder_heads": 1, "decoder_heads": 1, "kv_heads": 1},
    "narrow encoder heads": {"encoder_heads": 8},
    "encoder of odd width": {"encoder_dim": 24, "encoder_heads": 2},
    "no groups": {"kv_heads": 4},
    "128 mels": {"num_mels": 128},
    "other constants": {"rope_theta": 1e4, "rms_eps": 1e-2},
    "few positions with rope": {"max_encoder_frames": 100},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures("cache")
def test_float32_is_the_network(
    make_checkpoint: MakeCheckpoint, changes: dict[str, object], small: ModelConfig
) -> None:
    """Logits of the prefill and of decode steps, at most 1e-4 apart where they are 1 wide, and the same ids."""
    source = checkpoint.open_checkpoint(make_checkpoint(**changes))
    onnx_, pytorch = onnx_engine(source, "float32"), PyTorchEngine.load(source, device="cpu")
    allowed = source.rules.allowed_ids
    ids = [65, 66, 200, 3, 65, 17, 99, 150]
    for num_samples in (*EDGES, LONGEST):
        waveform = noise(num_samples)
        ours, theirs = (engine_logits(onnx_, waveform, ids), network_logits(pytorch, waveform, ids))
        assert ours.shape == theirs.shape == (9, small.vocab_size)
        assert theirs.std() > 0.3
        assert np.abs(ours - theirs)[:, allowed].max() < 1e-4
        assert np.isneginf(ours[:, ~allowed]).all()
    clips = [noise(n, seed=1) for n in EDGES]
    assert ids_of(onnx_.generate(clips, DecodeOptions())) == ids_of(pytorch.generate(clips, DecodeOptions()))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.usefixtures("cache")
def test_quantized_logits_are_near(make_checkpoint: MakeCheckpoint, precision: str) -> None:
    """Mean squared error as a share of the logits' variance: measured 2e-4 with int8 weights and 2e-3 with int4."""
    source = checkpoint.open_checkpoint(make_checkpoint(tied_embeddings=False))
    quantized, exact = onnx_engine(source, precision), onnx_engine(source, "float32")
    allowed = source.rules.allowed_ids
    for num_samples in (160, 700, 16_000, LONGEST):
        ours, theirs = (engine_logits(e, noise(num_samples), [65, 66, 200])[:, allowed] for e in (quantized, exact))
        error = ((ours - theirs) ** 2).mean() / theirs.var()
        assert 1e-7 < error < {"int8": 4e-4, "int4": 4e-3}[precision]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoder_ffn_dim": 40}, "40"),
        ({"decoder_heads": 8, "kv_heads": 2}, "8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_that_the_operators_lack_are_refused(
    make_checkpoint: MakeCheckpoint, cache: Path, changes: dict[str, object], named: str, precision: str
) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint(**changes))
    with pytest.raises(UsageError, match=f"{named} .*--engine pytorch") as caught:
        onnx_engine(source, precision)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["adapter.down.bias", "decoder.norm.weight", "encoder.conv1.bias", "decoder.layers.0"])
@pytest.mark.usefixtures("cache")
def test_weights_that_are_no_numbers_are_told(tmp_path: Path, small: ModelConfig, precision: str, name: str) -> None:
    network = random_network(small)
    with torch.no_grad():
        parameters = dict(network.named_parameters())
        parameters[f"{name}.o.weight" if name == "decoder.layers.0" else name].view(-1)[3] = torch.nan
    model.save(network, tmp_path / "model", dtype=torch.float32)
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    with pytest.raises(CheckpointMismatchError, match="not finite"):
        load_precision(tmp_path / "model", precision).generate([noise(16_000)], DecodeOptions())


# ---- the shipped model on speech ----


def test_float32_says_what_pytorch_says(tiny: Checkpoint, an4: Speech, said: dict[str, list[Generation]]) -> None:
    expected = in_batches(PyTorchEngine.load(tiny, device="cpu"), an4.waveforms, 16)
    assert ids_of(said["float32"]) == ids_of(expected)
    for ours, theirs in zip(said["float32"], expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert ours.stop_logprob == pytest.approx(theirs.stop_logprob, abs=1e-3)


def test_int8_is_as_good(tiny: Checkpoint, an4: Speech, said: dict[str, list[Generation]]) -> None:
    """Word error rate within 0.3 points of float32, and the same text nearly everywhere: measured 129 of 130 clips."""
    rates = {}
    for precision, generations in said.items():
        texts = [tiny.rules.to_text(list(g.ids)) for g in generations]
        rates[precision] = metrics.corpus_word_errors(zip(an4.texts, texts, strict=True)).rate
    assert rates["float32"] < 0.06
    assert rates["int8"] <= rates["float32"] + 0.003
    same = sum(a == b for a, b in zip(*map(ids_of, said.values()), strict=True))
    assert 127 <= same < 130


@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_speech_does_not_depend_on_its_batch(
    tiny: Checkpoint, an4: Speech, said: dict[str, list[Generation]], precision: str
) -> None:
    """To the last bit: alone, in tens, backwards, and beside clips that are longer and louder by far."""
    engine = onnx_engine(tiny, precision)
    loud = [noise(n, 1.0) for n in (LONGEST, 160, 100_000)]
    alone = in_batches(engine, an4.waveforms, 1)
    assert ids_of(alone) == ids_of(said[precision])
    backwards = in_batches(engine, an4.waveforms[::-1], MAX_ROWS + 3)[::-1]
    assert ids_of(alone) == ids_of(backwards)
    beside = engine.generate([*loud, *an4.waveforms[:9], *loud], DecodeOptions())[3:12]
    assert ids_of(beside) == ids_of(alone[:9])
    for others in (said[precision], backwards, beside):
        for one, other in zip(alone, others, strict=False):
            assert other.logprobs == one.logprobs
            assert other.stop_logprob == one.stop_logprob


def test_threads_change_nothing(tiny: Checkpoint, an4: Speech, said: dict[str, list[Generation]]) -> None:
    for threads in (2, 4):
        engine = onnx_engine(tiny, "int8", threads=threads)
        assert ids_of(in_batches(engine, an4.waveforms[:20], 20)) == ids_of(said["int8"][:20])


def test_two_engines_and_two_threads_at_once(tiny: Checkpoint, an4: Speech, said: dict[str, list[Generation]]) -> None:
    first, second = onnx_engine(tiny, "int8"), onnx_engine(tiny, "int8")
    half = MAX_ROWS + 2
    results: dict[int, list[Generation]] = {}

    def work(number: int, engine: OnnxEngine, start: int) -> None:
        results[number] = engine.generate(an4.waveforms[start : start + half], DecodeOptions())

    jobs = [(0, first, 0), (1, first, half), (2, second, 0)]  # two share an engine
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, _, start in jobs:
        assert ids_of(results[number]) == ids_of(said["int8"][start : start + half])


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("num_clips", [300, pytest.param(2_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(tiny: Checkpoint, an4: Speech, num_clips: int) -> None:
    engine = onnx_engine(tiny, "int8")
    in_batches(engine, an4.waveforms[:100], 20)
    before = resident_mb()
    for start in range(0, num_clips, 100):
        in_batches(engine, [an4.waveforms[(start + i) % 130] for i in range(100)], 20)
    assert resident_mb() - before < 20


# ---- what is written ----


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bytes_twice_and_from_shards(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, precision: Precision
) -> None:
    folder = make_checkpoint(tied_embeddings=False, use_rope=False)
    source = checkpoint.open_checkpoint(folder)
    written = [tmp_path / name for name in ("one", "two", "shards")]
    for target in written[:2]:
        target.mkdir()
        export.write(source, target, precision)
    tensors = load_file(folder / files.WEIGHTS)
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / files.INDEX).write_text(json.dumps(index))
    (folder / files.WEIGHTS).unlink()
    written[2].mkdir()
    export.write(checkpoint.open_checkpoint(folder), written[2], precision)
    for name in files.EXPORTED:
        assert len({(target / name).read_bytes() for target in written}) == 1
    assert (written[0] / files.MANIFEST).read_bytes() == (written[1] / files.MANIFEST).read_bytes()
    assert {path.name for path in written[0].iterdir()} == {
        *files.EXPORTED,
        files.MANIFEST,
        files.CONFIG,
        files.TOKENIZER,
    }


def test_the_shipped_export_is_of_the_shipped_model(tiny: Checkpoint, tmp_path: Path) -> None:
    shipped = pins.SHIPPED / "tiny-int8"
    assert export.place(tiny, "int8") == shipped
    export.write(tiny, tmp_path, "int8")
    assert {path.name for path in shipped.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (shipped / path.name).read_bytes(), path.name


def test_the_package_ships_nothing_by_accident() -> None:
    assert {path.name for path in pins.SHIPPED.iterdir()} == {"silero-vad", "tiny", "tiny-int8"}


PEAK_MEMORY = (
    FORBID_TORCH
    + """
from pathlib import Path
from arkasr import checkpoint, export
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
source = checkpoint.open_checkpoint(sys.argv[1])
Path(sys.argv[2]).mkdir()
before = peak()
export.write(source, Path(sys.argv[2]), sys.argv[3])
print(peak() - before)
"""
)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory, small: ModelConfig) -> Path:
    """A checkpoint of 44 million weights, half in layers and half in the table."""
    folder = tmp_path_factory.mktemp("medium")
    config = replace(
        small, hidden_dim=256, decoder_layers=25, decoder_ffn_dim=1024, vocab_size=80_000, tied_embeddings=True
    )
    network = model.ArkASR(config)
    model.save(network, folder, dtype=torch.bfloat16)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_stream(medium: Path, tmp_path: Path, precision: str) -> None:
    """The export's peak, mapped pages included, is a part of the weights' size."""
    float_bytes = 2 * (medium / files.WEIGHTS).stat().st_size
    assert float_bytes > 160e6
    grown = int(output(run(PEAK_MEMORY, medium, tmp_path / "export", precision)))
    assert grown < 0.45 * float_bytes, (grown, float_bytes)


# ---- the cache ----


def manifests(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"*/{files.MANIFEST}"))


def test_an_export_is_written_once(
    make_checkpoint: MakeCheckpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is told of where it takes more than a moment."""
    source = checkpoint.open_checkpoint(make_checkpoint())
    lines: list[str] = []
    OnnxEngine.load(source, precision="float32", threads=1, report=lines.append)
    assert lines == []
    shutil.rmtree(export.place(source, "float32"))
    monkeypatch.setattr(export, "TELL_BYTES", 1_000)
    for _ in range(2):
        OnnxEngine.load(source, precision="int8", threads=1, report=lines.append)
        (manifest,) = manifests(cache)
        times = {path.name: path.stat().st_mtime_ns for path in manifest.parent.iterdir()}
        OnnxEngine.load(source, precision="int8", threads=1, report=lines.append)
        assert times == {path.name: path.stat().st_mtime_ns for path in manifest.parent.iterdir()}
    assert len(lines) == 1
    assert "model" in lines[0]
    assert "int8" in lines[0]
    OnnxEngine.load(source, precision="int4", threads=1, report=lines.append)
    assert len(manifests(cache)) == len(lines) == 2


def test_other_weights_have_another_place(make_checkpoint: MakeCheckpoint, cache: Path, small: ModelConfig) -> None:
    first, second = make_checkpoint("one/model"), make_checkpoint("two/model")
    places = {export.place(checkpoint.open_checkpoint(folder), "int8") for folder in (first, second)}
    assert len(places) == 2
    before = load_precision(first, "float32").generate([noise(16_000)], DecodeOptions())
    model.save(random_network(small, seed=7), first, dtype=torch.float32)
    assert export.place(checkpoint.open_checkpoint(first), "int8") not in places
    after = load_precision(first, "float32").generate([noise(16_000)], DecodeOptions())
    assert ids_of(before) != ids_of(after)
    config = json.loads((first / files.CONFIG).read_text())
    (first / files.CONFIG).write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    again = load_precision(first, "float32").generate([noise(16_000)], DecodeOptions())
    assert again[0].logprobs != after[0].logprobs
    assert len(manifests(cache)) == 3


SLOW_WRITE = """
import sys, time
from arkasr import checkpoint, export
write = export.write
def slowly(*arguments, **options):
    print("written", flush=True)
    time.sleep(1)
    write(*arguments, **options)
export.write = slowly
source = checkpoint.open_checkpoint(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
folder = export.find_or_write(source, "int8", report=str)
export.read_manifest(folder)
"""


def test_two_processes_write_once(make_checkpoint: MakeCheckpoint, cache: Path) -> None:
    folder = make_checkpoint()
    arguments = [sys.executable, "-c", SLOW_WRITE, str(folder)]
    processes = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs: list[str] = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert sorted(outputs) == ["", "written\n"]
    assert len(manifests(cache)) == 1


KILLED = """
import os, signal, sys
from arkasr import checkpoint, export
decoder = export._decoder
def killed(*arguments):
    decoder(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
export._decoder = killed
export.find_or_write(checkpoint.open_checkpoint(sys.argv[1]), "int8")
"""


def test_a_killed_export_looks_incomplete(make_checkpoint: MakeCheckpoint, cache: Path) -> None:
    folder = make_checkpoint()
    output(run(KILLED, folder), code=-signal.SIGKILL)
    source = checkpoint.open_checkpoint(folder)
    assert not export.place(source, "int8").exists()
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [files.PART]
    onnx_engine(source, "int8").generate([noise(16_000)], DecodeOptions())
    assert [path for path in cache.iterdir() if path.is_dir()] == [export.place(source, "int8")]


FULL = """
import resource, sys
from arkasr import checkpoint, engines, errors
source = checkpoint.open_checkpoint(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    engines.load_engine(source, device="cpu")
except errors.UsageError as error:
    print(error)
"""


@pytest.mark.parametrize("max_bytes", [0, 1_000, 60_000])
def test_a_full_disk_is_one_line(make_checkpoint: MakeCheckpoint, cache: Path, max_bytes: int) -> None:
    folder = make_checkpoint()
    (line,) = output(run(FULL, folder, max_bytes)).splitlines()
    assert str(cache) in line
    assert "ARKASR_CACHE" in line
    assert not [path for path in cache.iterdir() if path.is_dir()]
    load_precision(folder)


@pytest.mark.parametrize("where", ["under a file", "in /proc"])
def test_a_cache_that_cannot_be_written_is_one_line(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Root may write into any read-only folder, so these stand for one."""
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "cache" if where == "under a file" else Path("/proc/arkasr")
    folder = make_checkpoint()
    monkeypatch.setenv("ARKASR_CACHE", str(place))
    with pytest.raises(UsageError, match="ARKASR_CACHE") as caught:
        load_precision(folder)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_an_export_stays_usable_where_nothing_can_be_written(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    export.find_or_write(source, "int8")

    def refuse(path: Path, _: Callable[[Path], object]) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "write_atomically", refuse)
    assert onnx_engine(source, "int8").generate([noise(16_000)], DecodeOptions())


# ---- damage ----


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / files.MANIFEST
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-2])


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


ACCIDENTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"{name} cut short": (name, partial(cut, name=name)) for name in files.EXPORTED},
    **{f"{name} flipped": (name, partial(flip, name=name)) for name in files.EXPORTED},
    **{f"{name} missing": (name, partial(remove, name=name)) for name in files.EXPORTED},
    "wrong hash": (
        "encoder.bin",
        lambda f: edit_manifest(f, lambda raw: raw["files"]["encoder.bin"].update(sha256="0" * 64)),
    ),
    "wrong size": (
        "decoder.onnx",
        lambda f: edit_manifest(f, lambda raw: raw["files"]["decoder.onnx"].update(size=7)),
    ),
    "other format": ("format 1", lambda f: edit_manifest(f, lambda raw: raw.update(format=1))),
    "other precision": ("int9", lambda f: edit_manifest(f, lambda raw: raw.update(precision="int9"))),
    "a file elsewhere": (
        "../secret",
        lambda f: edit_manifest(f, lambda raw: raw["files"].update({"../secret": raw["files"]["encoder.bin"]})),
    ),
    f"{files.TOKENIZER} changed": (files.TOKENIZER, lambda f: (f / files.TOKENIZER).write_text("{}")),
    "garbage": (files.MANIFEST, lambda f: (f / files.MANIFEST).write_bytes(b"\x00garbage")),
    "cut manifest": (files.MANIFEST, partial(cut, name=files.MANIFEST)),
    "empty": (files.MANIFEST, lambda f: (f / files.MANIFEST).write_text("{}")),
    "list": (files.MANIFEST, lambda f: (f / files.MANIFEST).write_text("[]")),
    "no files": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw.pop("files"))),
    "files a list": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw.update(files=[1, 2]))),
    "no table": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw.pop("table"))),
    "another key": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw.update(more=1))),
    "table elsewhere": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw["table"].update(offset=10**12))),
    "table before": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw["table"].update(offset=-4096))),
    "table a word": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw["table"].update(offset="x"))),
    "no block": (files.MANIFEST, lambda f: edit_manifest(f, lambda raw: raw["table"].update(block=0))),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.usefixtures("cache")
def test_a_damaged_export_is_refused(make_checkpoint: MakeCheckpoint, accident: str) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    folder = export.find_or_write(source, "int8")
    named, harm = ACCIDENTS[accident]
    harm(folder)
    with pytest.raises(CheckpointMismatchError) as caught:
        onnx_engine(source, "int8")
    message = str(caught.value)
    assert "\n" not in message
    assert named in message
    assert str(folder) in message
    assert "delete" in message


@pytest.mark.parametrize("name", files.EXPORTED)
@pytest.mark.usefixtures("cache")
def test_damage_after_a_first_load_is_refused(make_checkpoint: MakeCheckpoint, name: str) -> None:
    """Hashes are taken again when a file's time of change is another."""
    source = checkpoint.open_checkpoint(make_checkpoint())
    folder = export.find_or_write(source, "int8")
    onnx_engine(source, "int8")
    flip(folder, name)
    os.utime(folder / name, ns=(0, 1))
    with pytest.raises(CheckpointMismatchError, match=name):
        onnx_engine(source, "int8")


@pytest.mark.usefixtures("cache")
def test_an_export_without_its_manifest_is_made_again(make_checkpoint: MakeCheckpoint) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    (export.find_or_write(source, "int8") / files.MANIFEST).unlink()
    assert onnx_engine(source, "int8").generate([noise(16_000)], DecodeOptions())


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("change", ["unknown operator", "later opset", "no graph at all"])
@pytest.mark.usefixtures("cache")
def test_a_graph_that_cannot_be_run_is_one_line(make_checkpoint: MakeCheckpoint, name: str, change: str) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    folder = export.find_or_write(source, "int8")
    graph = onnx.load(folder / name, load_external_data=False)
    if change == "unknown operator":
        graph.graph.node[0].op_type = "NoSuchOperator"
    else:
        graph.opset_import[0].version = 999
    data = b"\xff" * 100 if change == "no graph at all" else graph.SerializeToString()
    (folder / name).write_bytes(data)
    known = {"size": len(data), "sha256": files.sha256(folder / name)}
    edit_manifest(folder, lambda raw: raw["files"].update({name: known}))
    with pytest.raises(CheckpointMismatchError, match="onnxruntime") as caught:
        onnx_engine(source, "int8")
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- choosing an engine ----


@pytest.mark.parametrize("dtype", ["auto", "float32", "int8", "int4"])
@pytest.mark.parametrize("name", ["auto", "onnx"])
def test_the_cpu_runs_onnx(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: Any, dtype: Any) -> None:
    asked: list[Precision] = []
    find_or_write = export.find_or_write

    def watched(source: Checkpoint, precision: Precision, **options: Any) -> Path:
        asked.append(precision)
        return find_or_write(source, precision, **options)

    monkeypatch.setattr(export, "find_or_write", watched)
    assert isinstance(engines.load_engine(tiny, name=name, device="cpu", dtype=dtype), OnnxEngine)
    assert asked == [None if dtype == "auto" else dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_floats_run_pytorch(tiny: Checkpoint, dtype: Any) -> None:
    assert isinstance(engines.load_engine(tiny, device="cpu", dtype=dtype), PyTorchEngine)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--engine onnx --dtype bfloat16", ("bfloat16", "int8", "pytorch")),
        ("--engine onnx --dtype float16", ("float16", "int8", "pytorch")),
        ("--engine pytorch --dtype int8 --device cpu", ("int8", "float32")),
        ("--engine pytorch --dtype int4 --device cpu", ("int4", "float32")),
        ("--engine onnx --device cuda", ("cuda", "pytorch")),
        ("--engine onnx --device cuda:0", ("cuda:0", "pytorch")),
        ("--engine onnx --device gpu", ("gpu",)),
    ],
)
def test_what_does_not_go_together_is_refused(flags: str, told: tuple[str, ...]) -> None:
    code = "from arkasr import cli; cli.main()"
    process = run(code, "transcribe", CLIP, "--model", "tiny", *flags.split())
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    (line,) = err.splitlines()
    assert all(word in line for word in told)


def test_speech_on_the_cpu_needs_no_torch(tmp_path: Path) -> None:
    code = FORBID_TORCH + "from arkasr import cli; cli.main()"
    for flags in ((), ("--dtype", "int4"), ("--engine", "onnx", "--dtype", "float32")):
        out = output(
            run(code, "transcribe", CLIP, "--model", "tiny", "--device", "cpu", *flags, ARKASR_CACHE=str(tmp_path))
        )
        assert out == "RUBOUT G M E F THREE NINE\n"
    assert len(manifests(tmp_path / "exports")) == 2  # tiny's int8 is shipped
