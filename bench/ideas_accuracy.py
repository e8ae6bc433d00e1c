"""Ideas whose price is accuracy, on the shipped `tiny` and AN4 test. The program is ideas.py."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors import safe_open
from safetensors.numpy import save_file

from arkasr import audio, checkpoint, export, metrics, quantize, runtime
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.data import Utterance, read_manifest
from arkasr.engines import DecodeOptions
from arkasr.engines.onnx import OnnxEngine
from arkasr.export import Precision
from cpu import spread
from ideas_graphs import Asked, Floats, Numbers, compared, difference, head_runner, race


def wer(engine: OnnxEngine, utterances: Sequence[Utterance], waveforms: Sequence[Waveform]) -> float:
    """WER in percent."""
    generations = engine.generate(waveforms, DecodeOptions())
    texts = [engine.rules.to_text(list(generation.ids)) for generation in generations]
    pairs = [(utterance.text, text) for utterance, text in zip(utterances, texts, strict=True)]
    return round(100 * metrics.corpus_word_errors(pairs).rate, 2)


# ---- a head of 4 bits ----


def int4_head(asked: Asked) -> Numbers:
    """The head in 8 bits against 4; and the WER of tiny in float32 whose head, not table, went through 4 or 8 bits."""
    kinds = {"8-bit, block 128": (8, 128), "4-bit, block 32": (4, 32), "4-bit, block 128": (4, 128)}
    ways = {name: head_runner(1, bits=bits, block=block) for name, (bits, block) in kinds.items()}
    errors, source = {}, checkpoint.open_checkpoint("tiny")
    utterances = list(read_manifest(asked.speech / "an4" / "manifest.jsonl", split="test"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export.write(source, folder, "float32")
        engine = OnnxEngine(folder, source.config, source.rules)
        waveforms = [utterance.waveform() for utterance in utterances]
        errors["float32"] = wer(engine, utterances, waveforms)
        offset, size = export.read_manifest(folder).table.offset, (source.config.vocab_size, source.config.hidden_dim)
        rows = np.array(np.memmap(folder / "decoder.bin", np.float32, "r", offset, size))
        engine.embed = rows.__getitem__  # type: ignore[assignment]  # the table as it was
        for name, (bits, block) in kinds.items():
            mapped = np.memmap(folder / "decoder.bin", np.float32, "r+", offset, size)
            mapped[:] = through_bits(rows, bits, block)
            mapped.flush()
            engine.decoder = runtime.session(folder / "decoder.onnx", threads=0)
            errors[name] = wer(engine, utterances, waveforms)
    return compared(race(ways, rounds=asked.rounds, runs=20), tiny_an4_wer_percent=errors)


def through_bits(rows: Floats, bits: int, block: int) -> Floats:
    """What is left of rows [N, K] after quantization in blocks."""
    codes, scales = quantize._blocks(rows, bits, block)  # noqa: SLF001
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], block)
    values: Floats = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(rows.shape)


# ---- columns scaled before quantization ----


def watched(folder: Path) -> Any:
    """An export's encoder whose norms leave the graph, too, in order."""
    model = onnx.load(folder / "encoder.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type.endswith("LayerNormalization"):
            shown = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
            model.graph.output.append(shown)
    onnx.save(model, folder / "watched.onnx")
    return runtime.session(folder / "watched.onnx", threads=0, stop_spinning=True)


def smoothed(source: Checkpoint, largest: Sequence[Floats], power: float, folder: Path) -> Checkpoint:
    """A copy of a checkpoint whose encoder norms share out their columns' range with the layers that follow."""
    names = {spec.name: spec.hf_name for spec in checkpoint.tensor_specs(source.config)}
    with safe_open(source.shards[0], framework="np") as file:
        tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.offset_keys()}
    for n, seen in enumerate(largest[: 2 * source.config.encoder_layers]):
        layer = f"encoder.layers.{n // 2}"
        norm, parts = (f"{layer}.ffn_norm", ["fc1"]) if n % 2 else (f"{layer}.attention_norm", list("qkv"))
        linears = [names[f"{layer}.{part}.weight"] for part in parts]
        widest = np.max([np.abs(tensors[name]).max(axis=0) for name in linears], axis=0)
        scale = np.maximum(seen, 1e-5) ** power / np.maximum(widest, 1e-5) ** (1 - power)
        for kind in ("weight", "bias"):
            tensors[names[f"{norm}.{kind}"]] /= scale
        for name in linears:
            tensors[name] *= scale
    folder.mkdir()
    shutil.copy(source.folder / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return replace(source, folder=folder, shards=(folder / "model.safetensors",))


def smooth_quant(asked: Asked) -> Numbers:
    """Tiny's int8 encoder with the columns of normed frames scaled before export; the decoder stays float32."""
    source = checkpoint.open_checkpoint("tiny")
    train, test = (list(read_manifest(asked.speech / "an4" / "manifest.jsonl", split=s)) for s in ("train", "test"))
    waveforms = [utterance.waveform() for utterance in test]
    mels = [audio.log_mel(waveform, source.config.num_mels)[None] for waveform in waveforms]
    with tempfile.TemporaryDirectory() as scratch:
        plain = export_to(source, Path(scratch, "float32"), "float32")
        engine = OnnxEngine(plain, source.config, source.rules)
        encoder = watched(plain)
        largest: list[Floats] = []
        for utterance in train[::7]:
            mel = audio.log_mel(utterance.waveform(), source.config.num_mels)[None]
            norms = [np.abs(norm).max(axis=(0, 1)) for norm in encoder.run(None, {"mel": mel})[1:]]
            largest = [np.maximum(a, b) for a, b in zip(largest or norms, norms, strict=True)]
        wanted = [engine.encoder.run(None, {"mel": mel})[0] for mel in mels]
        numbers = {"float32 encoder": wer(engine, test, waveforms)}
        errors = {}
        for power in (None, 0.25, 0.5, 0.75):
            name = "int8" if power is None else f"int8, a = {power}"
            made = source if power is None else smoothed(source, largest, power, Path(scratch, f"smooth{power}"))
            path = export_to(made, Path(scratch, name), "int8") / "encoder.onnx"
            engine.encoder = runtime.session(path, threads=0, stop_spinning=True)
            got = [engine.encoder.run(None, {"mel": mel})[0] for mel in mels]
            errors[name] = spread([difference(a, b) for a, b in zip(wanted, got, strict=True)])
            numbers[name] = wer(engine, test, waveforms)
    outliers = [round(float(norm.max() / np.median(norm)), 1) for norm in largest]
    return compared(
        errors, "relative error of the encoder", an4_wer_percent=numbers, largest_over_median_column=outliers
    )


def export_to(source: Checkpoint, folder: Path, precision: Precision) -> Path:
    folder.mkdir()
    export.write(source, folder, precision)
    return folder


# ---- shorter silences ----


def shortened(waveform: Waveform, below_db: float, *, inner: bool, most_s: float = 0.3) -> Waveform:
    """A clip whose silences, 10 ms frames so far below its loud ones, are cut down to `most_s`."""
    hop = audio.HOP_SAMPLES
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10(np.square(frames).mean(axis=1) + 1e-12)
    silent = level < np.percentile(level, 95) - below_db
    borders = [0, *(np.flatnonzero(np.diff(silent)) + 1), len(silent)]
    keep, most = np.ones(len(silent), bool), round(most_s * 100)
    for start, end in pairwise(borders):
        at_edge = start == 0 or end == len(silent)
        if silent[start] and end - start > most and (inner or at_edge):
            left = 0 if start == 0 else most if end == len(silent) else most // 2
            keep[start + left : end - most + left] = False
    return np.concatenate([frames[keep].reshape(-1), waveform[len(frames) * hop :]])


def silence(asked: Asked) -> Numbers:
    """WER of tiny (int8) with long silences shortened, and the share of audio that this removes."""
    source = checkpoint.open_checkpoint("tiny")
    engine = OnnxEngine.load(source, precision="int8", report=str)
    test = list(read_manifest(asked.speech / "an4" / "manifest.jsonl", split="test"))
    waveforms = [utterance.waveform() for utterance in test]
    others = {}
    for name in ("fleurs", "kathleen_arctic", "kerstin_de", "misc"):
        clips = [u.waveform() for u in list(read_manifest(asked.speech / name / "manifest.jsonl"))[:40]]
        others[name] = [removed(clips, [shortened(clip, 35, inner=inner) for clip in clips]) for inner in (False, True)]
    numbers = {"all of it": spread([wer(engine, test, waveforms)])}
    for below_db in (15, 25, 35):
        for inner in (False, True):
            cut = [shortened(waveform, below_db, inner=inner) for waveform in waveforms]
            name = f"-{below_db} dB, {'edges and inside' if inner else 'edges'}"
            numbers[name] = {**spread([wer(engine, test, cut)]), "removed_percent": removed(waveforms, cut)}
    return compared(numbers, "AN4 WER in percent", removed_percent_elsewhere_edges_and_all_35_db=others)


def removed(whole: Sequence[Waveform], cut: Sequence[Waveform]) -> float:
    return round(100 - 100 * sum(map(len, cut)) / sum(map(len, whole)), 1)
