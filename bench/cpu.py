"""Speed, memory and size of every way to run a published size on this CPU, with random weights; writes bench/results.

    python bench/cpu.py SCRATCH [--sizes 0.6b 3b] [--seconds 10 30] [--rounds 3] [--quick] [--avx2]

SCRATCH keeps checkpoints and exports between runs, 12 GB for 0.6b and 14 GB for 3b. Every run is a process of its own,
and the contenders take turns (A B C A B C), so that what else the machine does hits all alike. --avx2 hides AVX512 and
AMX (how: avx2.py), with HIDE_VNNI=1 in the environment AVX-VNNI too. --quick is one round of the shortest clip, written
into SCRATCH. Linux only, for it reads /proc.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from html import escape
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import arkasr  # and no torch up here: it would count as memory of those who need none
import avx2
from arkasr import audio, checkpoint, export
from arkasr.audio import Waveform
from arkasr.engines import DecodeOptions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
STAGES = ("log_mel", "encoder", "prefill", "decode")
TOKENS_PER_S = 4  # 40 for 10 s, 120 for 30 s
STATIC_POSITIONS = 2048
BATCH_CLIPS, BATCH_TOKENS = 32, 24
BASELINE = "transformers float32"
NOTE = (
    "Medians, least and most of fresh processes that take turns, from the page cache; load_s is after all imports, and "
    "a clip of 2 s is run before the measured ones. Every clip is forced to 4 tokens a second. ms_per_token is decode "
    "time a step; the first token is prefill's. peak_bytes is VmHWM, load and shorter clips included. transformers is "
    "Qwen2ForCausalLM with its DynamicCache in a plain greedy loop, and WhisperEncoder's layers at the clip's own "
    "length; they have no RoPE in the encoder, whose cost is negligible, and get arkasr's log-mel. 'onnx static cache' "
    f"is the int8 export with {STATIC_POSITIONS} float32 cache slots that enter and leave session.run at every token, "
    "beside all logits. others_cores is what else the machine computed during the runs."
)

Ids = Sequence[int]
Recognize = Callable[[Waveform, int], tuple[Ids, dict[str, float]]]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Contender:
    """A way to run a checkpoint: what it imports, how it is loaded, which export of arkasr it reads."""

    imports: tuple[str, ...]
    load: Callable[[Path], Recognize]
    precision: export.Precision | None = None


# ---- the ways ----


def load_arkasr(folder: Path, *, engine: str, dtype: str) -> Recognize:
    """One of our engines."""
    transcriber = arkasr.load_model(folder, engine=engine, dtype=dtype, device="cpu")  # type: ignore[arg-type]  # checked there

    def recognize(waveform: Waveform, num_tokens: int) -> tuple[Ids, dict[str, float]]:
        transcript = transcriber.transcribe(
            (waveform, audio.SAMPLE_RATE), options=DecodeOptions(max_new_tokens=num_tokens, guard=False), vad=False
        )
        return transcript.tokens, {stage: transcript.timings_s[stage] for stage in STAGES}

    return recognize


def load_transformers(folder: Path, *, dtype: str) -> Recognize:
    """The published way: Hugging Face's own layers and cache around the checkpoint's tensors."""
    import torch
    import transformers

    source = checkpoint.open_checkpoint(folder)
    encode, decoder = _transformers_modules(source, getattr(torch, dtype))
    merge, rules = source.config.merge_factor, source.rules
    forbidden = torch.from_numpy(~rules.allowed_ids)

    @torch.inference_mode()
    def recognize(waveform: Waveform, num_tokens: int) -> tuple[Ids, dict[str, float]]:
        times = [time.perf_counter()]
        mel = torch.from_numpy(audio.log_mel(waveform, source.config.num_mels))[None].to(decoder.dtype)
        times.append(time.perf_counter())
        encoded = encode(mel)
        times.append(time.perf_counter())
        ids = torch.tensor([rules.prompt_ids(audio.num_audio_tokens(len(waveform), merge))])
        x = decoder.model.embed_tokens(ids)
        x[ids == rules.audio_id] = encoded[0]
        cache = transformers.DynamicCache(config=decoder.config)
        tokens: list[int] = []
        for n in range(num_tokens):
            if n:
                x = decoder.model.embed_tokens(torch.tensor([tokens[-1:]]))
            logits = decoder(inputs_embeds=x, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            tokens.append(int(logits.masked_fill(forbidden, -torch.inf).argmax()))
            if not n:
                times.append(time.perf_counter())
        times.append(time.perf_counter())
        return tokens, _stages(times)

    return recognize


def _transformers_modules(source: checkpoint.Checkpoint, dtype: Any) -> tuple[Callable[[Any], Any], Any]:
    """Encoder with adapter as one function, and the Qwen2 module."""
    import torch
    import torch.nn.functional as F
    import transformers
    from safetensors import safe_open
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    raw = json.loads((source.folder / "config.json").read_text())
    left_out = ("model_type", "architectures", "auto_map", "whisper_config", "torch_dtype")
    settings = {key: value for key, value in raw.items() if key not in left_out}
    tensors = {}
    for shard in source.shards:
        with safe_open(shard, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(shard, framework="pt") as file:  # anew, or its mapped pages would count as memory
                tensors[name] = file.get_tensor(name).to(dtype)
    prefix = "audio_encoder.whisper."
    whisper = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    text = {name: t for name, t in tensors.items() if name.startswith("model.")}
    with torch.device("meta"):
        encoder = WhisperEncoder(transformers.WhisperConfig(**raw["whisper_config"]))
    encoder.load_state_dict(whisper, assign=True, strict=False)  # no positions and no last norm in the file
    decoder = transformers.Qwen2ForCausalLM.from_pretrained(
        None, config=transformers.Qwen2Config(**settings), state_dict=text, dtype=dtype
    )
    norm, up, down = ([tensors[f"audio_encoder.{part}.{kind}"] for kind in ("weight", "bias")] for part in (
        "layer_norm", "adapting.0", "adapting.2",
    ))  # fmt: skip
    merge = source.config.merge_factor
    encoder.eval()
    decoder.eval()

    def encode(mel: Any) -> Any:
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
        for layer in encoder.layers:
            x = layer(x, None)
        x = F.layer_norm(x, x.shape[-1:], norm[0], norm[1])
        x = x[:, : x.shape[1] // merge * merge].reshape(1, -1, merge * x.shape[2])
        return F.linear(F.gelu(F.linear(x, *up)), *down)

    return encode, decoder


def load_static_cache(folder: Path) -> Recognize:
    """The published int8 package's way: a cache of fixed size through session.run, copied at every token."""
    from arkasr.engines.onnx import OnnxEngine

    source = checkpoint.open_checkpoint(folder)
    config, rules = source.config, source.rules
    engine = OnnxEngine.load(source, precision="int8", report=str)
    names = [output.name for output in engine.decoder.get_outputs()]
    shape = (1, config.kv_heads, STATIC_POSITIONS, config.decoder_head_dim)
    forbidden = np.where(rules.allowed_ids, 0, -np.inf).astype(np.float32)

    def recognize(waveform: Waveform, num_tokens: int) -> tuple[Ids, dict[str, float]]:
        times = [time.perf_counter()]
        mel = audio.log_mel(waveform, config.num_mels)
        times.append(time.perf_counter())
        (encoded,) = engine.encoder.run(None, {"mel": mel[None]})
        times.append(time.perf_counter())
        ids = np.array(rules.prompt_ids(audio.num_audio_tokens(len(waveform), config.merge_factor)))
        x = engine.embed(ids)
        x[ids == rules.audio_id] = encoded[0]
        cache = {name: np.zeros(shape, np.float32) for name in names if name.startswith("present_")}
        tokens: list[int] = []
        for n in range(num_tokens):
            if n:
                x = engine.embed(np.array(tokens[-1:]))
            length = len(ids) + n
            feeds = {name.replace("present", "past"): values for name, values in cache.items()}
            feeds |= {"x": x[None], "forbidden": forbidden, "num_positions": np.array([length], np.int32)}
            feeds["last_position"] = np.array([length - 1], np.int32)
            answers = dict(zip(names, engine.decoder.run(None, feeds), strict=True))
            cache = {name: answers[name] for name in cache}
            tokens.append(int(answers["logits"][0].argmax()))
            if not n:
                times.append(time.perf_counter())
        times.append(time.perf_counter())
        return tokens, _stages(times)

    return recognize


def _stages(times: Sequence[float]) -> dict[str, float]:
    """Seconds between five readings of the clock."""
    return {stage: end - start for stage, start, end in zip(STAGES, times, times[1:], strict=False)}


_TORCH, _ONNX = ("torch", "arkasr.engines.pytorch"), ("arkasr.engines.onnx",)
_HF = ("torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.whisper.modeling_whisper")
CONTENDERS = {
    BASELINE: Contender(_HF, partial(load_transformers, dtype="float32")),
    "transformers bfloat16": Contender(_HF, partial(load_transformers, dtype="bfloat16")),
    "arkasr pytorch float32": Contender(_TORCH, partial(load_arkasr, engine="pytorch", dtype="float32")),
    "arkasr onnx float32": Contender(_ONNX, partial(load_arkasr, engine="onnx", dtype="float32"), "float32"),
    "onnx static cache": Contender(_ONNX, load_static_cache, "int8"),
    "arkasr onnx int8": Contender(_ONNX, partial(load_arkasr, engine="onnx", dtype="int8"), "int8"),
    "arkasr onnx int4": Contender(_ONNX, partial(load_arkasr, engine="onnx", dtype="int4"), "int4"),
}
BATCHED = "arkasr onnx int8"
BIG = ("arkasr onnx int8", "arkasr onnx int4")  # of 3b, whose float32 takes 14 GB


# ---- one process ----


def noise(seconds: float, seed: int = 0) -> Waveform:
    """A clip; with random weights it does not matter which."""
    samples = round(seconds * audio.SAMPLE_RATE)
    return (np.random.default_rng(seed).standard_normal(samples) / 10).astype(np.float32)


def peak_bytes() -> int:
    """The most memory this process has held; what getrusage tells survives exec, so includes parents."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def run_clips(folder: Path, name: str, clip_seconds: Sequence[int]) -> dict[str, Any]:
    """Load one contender and recognize one clip of each length, the shortest first."""
    contender = CONTENDERS[name]
    started = time.perf_counter()
    for module in contender.imports:
        import_module(module)
    imported = time.perf_counter()
    recognize = contender.load(folder)
    loaded = time.perf_counter()
    after_load = peak_bytes()
    recognize(noise(2), 4)
    clips = []
    for clip_s in sorted(clip_seconds):
        num_tokens = TOKENS_PER_S * clip_s
        began = time.perf_counter()
        ids, stages = recognize(noise(clip_s), num_tokens)
        total_s = time.perf_counter() - began
        assert len(ids) == num_tokens, f"{name}: {len(ids)} tokens and not {num_tokens}: the stop token came"
        clips.append({
            "clip_s": clip_s, "stages_s": stages, "total_s": total_s, "rtfx": clip_s / total_s,
            "ms_per_token": 1e3 * stages["decode"] / (num_tokens - 1),
            "first_token_s": sum(stages[stage] for stage in STAGES[:3]), "peak_bytes": peak_bytes(), "ids": list(ids),
        })  # fmt: skip
    return {
        "import_s": imported - started,
        "load_s": loaded - imported,
        "peak_after_load_bytes": after_load,
        "avx512_used": avx2.avx512_used(),
        "clips": clips,
    }


def run_export(folder: Path, precision: export.Precision) -> dict[str, Any]:
    """Convert a checkpoint."""
    source = checkpoint.open_checkpoint(folder)
    started = time.perf_counter()
    export.find_or_write(source, precision)
    return {"export_s": round(time.perf_counter() - started, 1), "export_peak_bytes": peak_bytes()}


def run_batched(folder: Path) -> dict[str, Any]:
    """Many clips of 2 to 8 s, one at a time and as one batch."""
    lengths = np.random.default_rng(1).uniform(2, 8, BATCH_CLIPS)
    clips = [(noise(length, seed), audio.SAMPLE_RATE) for seed, length in enumerate(lengths)]
    transcriber = arkasr.load_model(folder, engine="onnx", dtype="int8")
    options = DecodeOptions(max_new_tokens=BATCH_TOKENS, guard=False)
    transcriber.transcribe(clips[0], options=options, vad=False)
    result: dict[str, Any] = {"audio_s": float(lengths.sum())}
    for batch_size in (1, BATCH_CLIPS):
        started = time.perf_counter()
        transcripts = list(transcriber.transcribe(clips, options=options, vad=False, batch_size=batch_size))
        elapsed_s = time.perf_counter() - started
        assert all(len(transcript.tokens) == BATCH_TOKENS for transcript in transcripts)
        result[f"batch_{batch_size}"] = {
            "total_s": elapsed_s,
            "rtfx": result["audio_s"] / elapsed_s,
            "peak_bytes": peak_bytes(),
        }
    result["avx512_used"] = avx2.avx512_used()
    return result


# ---- all of them ----


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, as they are written down."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def in_process(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a fresh process of this file says, and how many cores others kept busy meanwhile."""
    command = [sys.executable, __file__, *arguments]
    started, before = time.perf_counter(), _others_cpu_s()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    others = (_others_cpu_s() - before) / (time.perf_counter() - started)
    return {**json.loads(done.stdout), "others_cores": max(0.0, others)}


def _others_cpu_s() -> float:
    """CPU seconds of this machine so far that were not of our ended processes."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    mine = os.times()
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - mine.children_user - mine.children_system - mine.user - mine.system


def prepare(size: str, scratch: Path, precisions: Sequence[export.Precision]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint and its exports, made where they are missing; folder, and bytes and seconds of each."""
    folder = scratch / f"random-{size}"
    if not folder.exists():
        script = ROOT / "scripts" / "random_checkpoint.py"
        subprocess.run([sys.executable, str(script), size, str(folder)], check=True)
    source = checkpoint.open_checkpoint(folder)
    made: dict[str, Any] = {"checkpoint": {"disk_bytes": warm(folder)}}
    for precision in precisions:
        fresh = not export.place(source, precision).exists()
        cost = in_process(["--child", str(folder), f"export {precision}"], dict(os.environ)) if fresh else {}
        exported = export.place(source, precision)
        export.read_manifest(exported)  # hashes it, once
        made[precision] = {"disk_bytes": warm(exported), **cost}
    return folder, made


def warm(folder: Path) -> int:
    """Read a folder's files into the page cache; returns their bytes."""
    total = 0
    for path in folder.iterdir():
        with path.open("rb") as file:
            while piece := file.read(2**24):
                total += len(piece)
    return total


def measure_size(
    size: str, scratch: Path, asked: argparse.Namespace, environment: dict[str, str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rounds over the contenders of one size; a case for each contender and clip, and what lies on the disk."""
    names = [name for name in (BIG if size == "3b" else CONTENDERS) if not asked.only or name in asked.only]
    precisions = list(dict.fromkeys(c.precision for name in names if (c := CONTENDERS[name]).precision))
    if size == "0.6b" and not asked.skip_batched and not asked.quick and "int8" not in precisions:
        precisions.append("int8")
    folder, made = prepare(size, scratch, precisions)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(asked.rounds):
        for name in names:
            warm(folder if CONTENDERS[name].precision is None else _export_folder(folder, name))
            seconds = [str(clip_s) for clip_s in asked.seconds]
            run = in_process(["--child", str(folder), name, "--seconds", *seconds], environment)
            runs[name].append(run)
            said = ", ".join(f"{c['clip_s']} s: {c['total_s']:.2f} s, RTFx {c['rtfx']:.2f}" for c in run["clips"])
            others = f"others {run['others_cores']:.2f} cores"
            print(f"round {turn + 1}, {size} {name}: load {run['load_s']:.2f} s, {said}; {others}", flush=True)
    cases = [
        {"size": size, "contender": name, **summary(runs[name], clip), **_disk(made, name)}
        for clip in range(len(asked.seconds))
        for name in names
    ]
    for case in cases:
        base = next((c for c in cases if c["contender"] == BASELINE and c["clip_s"] == case["clip_s"]), None)
        if base is not None:
            case["times_faster"] = round(base["total_s"]["median"] / case["total_s"]["median"], 2)
            case["part_of_peak"] = round(case["peak_bytes"]["median"] / base["peak_bytes"]["median"], 3)
    return cases, made


def _export_folder(folder: Path, name: str) -> Path:
    precision = CONTENDERS[name].precision
    assert precision is not None
    return export.place(checkpoint.open_checkpoint(folder), precision)


def _disk(made: dict[str, Any], name: str) -> dict[str, int]:
    """Bytes of the files that a contender reads."""
    return {"disk_bytes": made[CONTENDERS[name].precision or "checkpoint"]["disk_bytes"]}


def summary(runs: Sequence[dict[str, Any]], clip: int) -> dict[str, Any]:
    """What the runs of one contender say about one clip length."""
    clips = [run["clips"][clip] for run in runs]
    return {
        "clip_s": clips[0]["clip_s"],
        "tokens": len(clips[0]["ids"]),
        **{
            key: spread([run[key] for run in runs])
            for key in ("import_s", "load_s", "peak_after_load_bytes", "others_cores")
        },
        "stages_s": {stage: spread([c["stages_s"][stage] for c in clips]) for stage in STAGES},
        **{
            key: spread([c[key] for c in clips])
            for key in ("ms_per_token", "first_token_s", "total_s", "rtfx", "peak_bytes")
        },
        "avx512_used": any(run["avx512_used"] for run in runs),
        "repeats": all(c["ids"] == clips[0]["ids"] for c in clips),
        "ids": clips[0]["ids"],
    }


def measure_batched(folder: Path, rounds: int, environment: dict[str, str]) -> dict[str, Any]:
    """Files through one batch against one at a time."""
    runs = [in_process(["--child", str(folder), "batched"], environment) for _ in range(rounds)]
    result: dict[str, Any] = {
        "contender": BATCHED, "size": "0.6b", "clips": BATCH_CLIPS, "tokens": BATCH_TOKENS,
        "audio_s": round(runs[0]["audio_s"], 1),
    }  # fmt: skip
    for size in (f"batch_{n}" for n in (1, BATCH_CLIPS)):
        result[size] = {key: spread([run[size][key] for run in runs]) for key in ("total_s", "rtfx", "peak_bytes")}
    ratio = [run["batch_1"]["total_s"] / run[f"batch_{BATCH_CLIPS}"]["total_s"] for run in runs]
    result["times_faster"] = spread(ratio)
    print(f"{BATCH_CLIPS} clips: batched {result['times_faster']['median']:.2f} times as fast as one at a time")
    return result


def chart(record: dict[str, Any]) -> str:
    """RTFx of every contender as bars, an SVG."""
    cases = record["cases"]
    top = max(case["rtfx"]["max"] for case in cases)
    row, left, width = 18, 190, 420
    parts, y = [], 30
    for size, clip_s in dict.fromkeys((case["size"], case["clip_s"]) for case in cases):
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(size)}, clip of {clip_s} s</text>')
        for case in cases:
            if (case["size"], case["clip_s"]) != (size, clip_s):
                continue
            y += row
            rtfx = case["rtfx"]
            ours = "#2a6f97" if case["contender"].startswith("arkasr") else "#adb5bd"
            low, high = (left + width * rtfx[key] / top for key in ("min", "max"))
            bar = width * rtfx["median"] / top
            parts += [
                f'<text x="{left - 6}" y="{y}" text-anchor="end">{escape(case["contender"])}</text>',
                f'<rect x="{left}" y="{y - 11}" width="{bar:.1f}" height="13" fill="{ours}"/>',
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y - 4.5}" y2="{y - 4.5}" stroke="black"/>',
                f'<text x="{high + 5:.1f}" y="{y}">{rtfx["median"]:.2f}</text>',
            ]
        y += 2 * row
    where = escape("{cpus} cores ({processor}), {instructions}".format_map(record))
    parts.append(f'<text x="8" y="{y}">Seconds of audio a second (RTFx), {where}; lines: least and most</text>')
    size_of = f'width="{left + width + 60}" height="{y + 12}"'
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size_of} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All sizes, then batches."""
    scratch: Path = asked.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["ARKASR_CACHE"] = str((scratch / "cache").resolve())
    environment, instructions, how = dict(os.environ), "all instructions", None
    if asked.avx2:
        environment, instructions, how = avx2.hide(scratch)
    others_load = round(os.getloadavg()[0], 2)  # before the first run: what else the machine was doing
    from arkasr.train import loop

    cases, made = [], {}
    for size in asked.sizes:
        of_size, made[size] = measure_size(size, scratch, asked, environment)
        cases += of_size
    with_batches = "0.6b" in asked.sizes and not asked.quick and not asked.skip_batched
    batched = measure_batched(scratch / "random-0.6b", asked.rounds, environment) if with_batches else None
    return {
        "what": "cpu: random weights of the published shapes, every way to run them",
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": others_load,
        **{name: version(name) for name in ("onnxruntime", "onnx", "transformers", "numpy")},
        "openvino": version("openvino") if importlib.util.find_spec("openvino") else "not installed, not measured",
        "instructions": instructions,
        "hidden_how": how,
        "rounds": asked.rounds,
        "note": NOTE,
        "files": made,
        "cases": cases,
        "batched": batched,
    }


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path, nargs="?", help="where checkpoints and exports are kept")
    parser.add_argument("--sizes", nargs="+", choices=("0.6b", "3b"), default=["0.6b"])
    parser.add_argument("--seconds", nargs="+", type=int, default=[10, 30], help="lengths of the clips")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="leave the other contenders out")
    parser.add_argument("--skip-batched", action="store_true", help="leave the batches of short clips out")
    parser.add_argument("--quick", action="store_true", help="one round of the shortest clip, written into SCRATCH")
    parser.add_argument("--avx2", action="store_true", help="hide AVX512 and AMX from every library")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WHAT"), help="one run in this process, as JSON")
    return parser


def main() -> None:
    """Measure, print, write; or be the measured process."""
    parser = arguments()
    asked = parser.parse_args()
    if asked.child:
        folder, what = Path(asked.child[0]), asked.child[1]
        if what.startswith("export "):
            print(json.dumps(run_export(folder, what.removeprefix("export "))))
            return
        result = run_batched(folder) if what == "batched" else run_clips(folder, what, asked.seconds)
        if result["avx512_used"] and avx2.HIDDEN in os.environ:
            sys.exit(f"{what} used AVX512 although it is hidden")
        print(json.dumps(result))
        return
    if asked.scratch is None:
        parser.error("give SCRATCH or --child")
    if asked.quick:
        asked.rounds, asked.seconds = 1, [min(asked.seconds)]
    asked.seconds.sort()
    record = measure(asked)
    kind = ("-avx2" if asked.avx2 else "") + ("-3b" if asked.sizes == ["3b"] else "")
    folder = asked.scratch if asked.quick else RESULTS
    target = folder / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}{kind}-cpu.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    target.with_suffix(".svg").write_text(chart(record), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
