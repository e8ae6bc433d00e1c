"""What quantizing each group of layers costs in accuracy, in the recipes of our exports; writes bench/results.

    python bench/quantization.py SCRATCH SPEECH_FOLDER

Measured are the shipped `tiny` on AN4 test and 0.6b with random weights on noise. SCRATCH keeps the checkpoint and the
whole exports, as for bench/cpu.py, 9 GB; those with one group quantized come and go, 3 GB at a time. SPEECH_FOLDER
holds an4/ with its manifest.jsonl. Takes 4 minutes and 8 GB of memory.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from arkasr import audio, checkpoint, export, metrics, pins
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions, Generation
from arkasr.engines.onnx import OnnxEngine
from arkasr.export import Precision
from arkasr.quantize import RECIPES, Recipe
from arkasr.train import loop
from cpu import RESULTS, noise, prepare

MODELS = ("tiny", "0.6b")
NOISE_CLIPS, NOISE_S, NOISE_TOKENS = 4, 10, 40
ROWS = 8  # that share a decode step
GROUPS = {
    "encoder": ("encoder",),
    "decoder attention": ("attention",),
    "decoder MLP": ("mlp",),
    "table and head": ("table",),
    "all": ("encoder", "attention", "mlp", "table"),
}
FLOAT = RECIPES["float32"]
NOTE = (
    "In each case one group of linear layers, or all of them, is quantized as in the recipes of `precisions`, and the "
    "rest is float32. It is forced through the tokens, the stop token included, that float32 chose. top1_percent: "
    "positions where the likeliest allowed token is float32's; kl_mean, kl_p99: KL(float32 || case) in nats over the "
    "allowed tokens; encoder_error: L2 norm of the change of the encoder's output, relative; null where there is none. "
    "WER is of free greedy decoding. 0.6b has random weights and hears noise, so it has no WER; random weights have no "
    "outliers, so its numbers understate what real weights may lose. Its distributions are nearly flat, too, which "
    "makes KL small and the likeliest token a matter of little: top_prob_mean is that token's mean probability "
    "in float32."
)
Floats = npt.NDArray[np.float32]
Cache = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Variant:
    """A recipe: which group it quantizes, and of which shipped recipes it is a part."""

    group: str
    precisions: tuple[Precision, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Speech:
    """What a model hears, and where that is known what was said."""

    model: str
    source: Checkpoint
    waveforms: Sequence[Waveform]
    texts: Sequence[str] | None
    options: DecodeOptions


@dataclass(frozen=True)
class Reference:
    """The float32 export's encoder, its output [A, H] of each clip, what it chose, and how likely all was."""

    encoder: Any
    encoded: Sequence[Floats]
    chosen: Sequence[Generation]
    logprobs: Sequence[Floats]


# ---- the variants ----


def variants() -> list[Variant]:
    """One for each group and recipe; what two recipes have in common is there once."""
    found: dict[Recipe, Variant] = {}
    for group, fields in GROUPS.items():
        for precision in get_args(Precision):
            recipe = replace(FLOAT, **{field: vars(RECIPES[precision])[field] for field in fields})
            earlier = found.get(recipe, Variant(group, (), recipe))
            found[recipe] = replace(earlier, precisions=(*earlier.precisions, precision))
    del found[FLOAT]  # the reference
    return list(found.values())


@contextmanager
def engine_of(speech: Speech, variant: Variant, reference: Reference, scratch: Path) -> Iterator[OnnxEngine]:
    """An engine over an export. Where the encoder stays float32, it is borrowed, and only one layer written."""
    source = speech.source
    if variant.group == "all":
        folder = export.find_or_write(source, variant.precisions[0], report=print)
        yield OnnxEngine(folder, source.config, source.rules)
        return
    has_encoder = variant.recipe.encoder is not FLOAT.encoder
    written = source if has_encoder else replace(source, config=replace(source.config, encoder_layers=1))
    with TemporaryDirectory(dir=scratch) as folder_name:
        RECIPES["variant"] = variant.recipe
        export.write(written, Path(folder_name), "variant")  # type: ignore[arg-type]  # only here
        engine = OnnxEngine(Path(folder_name), source.config, source.rules)
        if not has_encoder:
            engine.encoder = reference.encoder
        yield engine


# ---- running them ----


def encode(engine: OnnxEngine, waveforms: Sequence[Waveform]) -> list[Floats]:
    """The encoder's output [A, H] of each clip."""
    mels = (audio.log_mel(waveform, engine.config.num_mels) for waveform in waveforms)
    return [engine.encoder.run(["audio"], {"mel": mel[None]})[0][0] for mel in mels]


def prompt(engine: OnnxEngine, encoded: Floats) -> Floats:
    """Embeddings [T, H] of a clip's prompt."""
    ids = np.array(engine.rules.prompt_ids(len(encoded)))
    x = engine.embed(ids)
    x[ids == engine.rules.audio_id] = encoded
    return x


def run(engine: OnnxEngine, x: Floats, lengths: Sequence[int], cache: Cache) -> tuple[Floats, Cache]:
    """Log-probabilities of the allowed tokens after x [B, T, H] of rows that then have `lengths`; and the cache."""
    feeds = {f"past_{name}": values for name, values in cache.items()}
    feeds |= {"x": x, "forbidden": engine.forbidden.numpy(), "num_positions": np.array([max(lengths)], np.int32)}
    feeds["last_position"] = np.array(lengths, np.int32) - 1
    logits, *present = engine.decoder.run(["logits", *(f"present_{name}" for name in cache)], feeds)
    logits = logits[:, engine.rules.allowed_ids].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logprobs.astype(np.float32), dict(zip(cache, present, strict=True))


def force(engine: OnnxEngine, encoded: Sequence[Floats], chosen: Sequence[Generation]) -> list[Floats]:
    """Log-probabilities [positions, allowed] of each clip where its chosen tokens, and the stop token, were chosen."""
    config = engine.config
    done: list[Floats] = []
    for first in range(0, len(encoded), ROWS):
        rows = chosen[first : first + ROWS]
        prompts = [prompt(engine, clip) for clip in encoded[first : first + ROWS]]
        positions = [len(row.ids) + (row.stop_logprob is not None) for row in rows]
        capacity = max(map(len, prompts)) + max(positions)
        empty = np.zeros((1, config.kv_heads, capacity, config.decoder_head_dim), np.float32)
        names = [f"{kind}_{n}" for n in range(config.decoder_layers) for kind in ("keys", "values")]
        prefilled = [run(engine, x[None], [len(x)], dict.fromkeys(names, empty)) for x in prompts]
        steps = [np.concatenate([logprobs for logprobs, _ in prefilled])]
        cache = {name: np.concatenate([filled[name] for _, filled in prefilled]) for name in names}
        for n in range(max(positions) - 1):
            ids = np.array([row.ids[n] if n < len(row.ids) else 0 for row in rows])  # 0: the row has ended
            logprobs, cache = run(engine, engine.embed(ids)[:, None], [len(x) + n + 1 for x in prompts], cache)
            steps.append(logprobs)
        done += [np.stack([step[row] for step in steps[:count]]) for row, count in enumerate(positions)]
    return done


# ---- measuring ----


def refer(speech: Speech) -> Reference:
    """What the float32 export says."""
    folder = export.find_or_write(speech.source, "float32", report=print)
    engine = OnnxEngine(folder, speech.source.config, speech.source.rules)
    encoded = encode(engine, speech.waveforms)
    chosen = engine.generate(speech.waveforms, speech.options)
    return Reference(engine.encoder, encoded, chosen, force(engine, encoded, chosen))


def compare(engine: OnnxEngine, speech: Speech, reference: Reference) -> dict[str, Any]:
    """How far an engine is from the reference."""
    error, encoded = None, reference.encoded
    if engine.encoder is not reference.encoder:
        encoded = encode(engine, speech.waveforms)
        changes = np.concatenate(encoded) - np.concatenate(reference.encoded)
        error = float(np.linalg.norm(changes) / np.linalg.norm(np.concatenate(reference.encoded)))
    same, divergences = [], []
    for wanted, got in zip(reference.logprobs, force(engine, encoded, reference.chosen), strict=True):
        same.append(wanted.argmax(axis=1) == got.argmax(axis=1))
        p, q = wanted.astype(np.float64), got.astype(np.float64)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
    kl = np.concatenate(divergences)
    return {
        "positions": len(kl),
        "top1_percent": round(100 * float(np.concatenate(same).mean()), 2),
        "kl_mean": float(f"{kl.mean():.3g}"),
        "kl_p99": float(f"{np.percentile(kl, 99):.3g}"),
        "encoder_error": None if error is None else float(f"{error:.3g}"),
    }


def word_errors(speech: Speech, reference: Reference, heard: Sequence[Generation]) -> dict[str, Any]:
    """WER of what was recognized, and how many transcripts are not those of the reference; of speech only."""
    if speech.texts is None:
        return {"wer_percent": None}
    texts, before = ([speech.source.rules.to_text(list(g.ids)) for g in said] for said in (heard, reference.chosen))
    errors = metrics.corpus_word_errors(zip(speech.texts, texts, strict=True))
    return {
        "wer_percent": round(100 * errors.rate, 2),
        "errors": errors.errors,
        "words": errors.reference_words,
        "changed_transcripts": sum(a != b for a, b in zip(texts, before, strict=True)),
    }


def measure(speech: Speech, scratch: Path) -> list[dict[str, Any]]:
    """A case for float32 and for each variant."""
    reference = refer(speech)
    label: dict[str, Any] = {"model": speech.model, "group": "none", "precisions": ["float32"]}
    top_probs = np.exp(np.concatenate([logprobs.max(axis=1) for logprobs in reference.logprobs]))
    unquantized = label | {"positions": len(top_probs), "top_prob_mean": float(f"{top_probs.mean():.3g}")}
    cases = [unquantized | word_errors(speech, reference, reference.chosen)]
    show(cases[0])
    for variant in variants():
        with engine_of(speech, variant, reference, scratch) as engine:
            case = label | {"group": variant.group, "precisions": list(variant.precisions)}
            case |= compare(engine, speech, reference)
            heard = [] if speech.texts is None else engine.generate(speech.waveforms, speech.options)
            cases.append(case | word_errors(speech, reference, heard))
            show(cases[-1])
    return cases


def show(case: Mapping[str, Any]) -> None:
    """One line of the table."""
    columns = ("top1_percent", "kl_mean", "kl_p99", "encoder_error", "wer_percent", "changed_transcripts")
    if case["group"] == "none":
        print(" " * 36, *(f"{name:>19}" for name in columns))
    numbers = (f"{'' if case.get(name) is None else case[name]:>19}" for name in columns)
    print(f"{case['model']:6}{case['group']:19}{' '.join(case['precisions']):11}", *numbers, flush=True)


def speech_of(model: str, scratch: Path, speech_folder: Path) -> Speech:
    """A model with its clips; the random checkpoint is made where it is missing."""
    if model == "tiny":
        utterances = list(read_manifest(speech_folder / "an4" / "manifest.jsonl", split="test"))
        waveforms, texts = [u.waveform() for u in utterances], [u.text for u in utterances]
        return Speech(model, checkpoint.open_checkpoint(pins.SHIPPED / model), waveforms, texts, DecodeOptions())
    folder, _ = prepare(model, scratch, ())
    waveforms = [noise(NOISE_S, seed) for seed in range(NOISE_CLIPS)]
    options = DecodeOptions(max_new_tokens=NOISE_TOKENS)
    return Speech(model, checkpoint.open_checkpoint(folder), waveforms, None, options)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path, help="where checkpoints and exports are kept")
    parser.add_argument("speech", type=Path, help="folder with an4/")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["ARKASR_CACHE"] = str((asked.scratch / "cache").resolve())
    cases, clips = [], {}
    for model in MODELS:
        speech = speech_of(model, asked.scratch, asked.speech)
        audio_s = sum(map(len, speech.waveforms)) / audio.SAMPLE_RATE
        clips[model] = {"clips": len(speech.waveforms), "audio_s": round(audio_s, 1)}
        cases += measure(speech, asked.scratch)
    record = {
        "what": "quantization: what each group of layers costs in accuracy",
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        **{name: version(name) for name in ("onnxruntime", "numpy")},
        "note": NOTE,
        "clips": clips,
        "cases": cases,
    }
    target = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-quantization.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
