"""Load time, memory and transcription time of both published sizes with random weights; writes bench/results.

    python bench/full_size.py SCRATCH

SCRATCH is a folder for the checkpoints, 8 GB at most; each is removed after its runs. Every run is a process of its
own: `python bench/full_size.py --child FOLDER DTYPE` does one and prints it as JSON, which the slow tests use too.
Linux only, for it reads /proc. The weights have just been written, so they come from the page cache and not the disk.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import arkasr
from arkasr.checkpoint import tensor_specs
from arkasr.config import load as load_config
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import DTYPES
from arkasr.train import loop

ROOT = Path(__file__).parents[1]
CASES = {"0.6b": ("bfloat16", "float32"), "3b": ("bfloat16",)}
RUNS = 3
NEW_TOKENS = 8
CLIP_S = 10


def memory_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (most so far) of this process; what getrusage tells survives exec, so includes parents."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])


def child(folder: Path, dtype: str) -> dict[str, Any]:
    """Load a checkpoint and transcribe one clip twice; the first time also reads mapped weights."""
    baseline = memory_bytes("VmRSS")  # the interpreter and its libraries: all imports are done
    started = time.perf_counter()
    transcriber = arkasr.load_model(folder, engine="pytorch", dtype=dtype, device="cpu")  # type: ignore[arg-type]  # checked there
    load_s = time.perf_counter() - started
    after_load = memory_bytes("VmHWM")
    clip = (np.random.default_rng(0).standard_normal(CLIP_S * 16_000) / 10).astype(np.float32)
    options = DecodeOptions(max_new_tokens=NEW_TOKENS, guard=False)
    transcripts, seconds = [], []
    for _ in range(2):
        started = time.perf_counter()
        transcripts.append(transcriber.transcribe((clip, 16_000), options=options, vad=False))
        seconds.append(round(time.perf_counter() - started, 3))
    first, again = transcripts
    return {
        "weights_bytes": weight_values(folder) * DTYPES[dtype].itemsize,
        "baseline_bytes": baseline,
        "peak_after_load_bytes": after_load,
        "peak_bytes": memory_bytes("VmHWM"),
        "load_s": round(load_s, 3),
        "transcribe_s": seconds,
        "timings_s": {name: round(value, 3) for name, value in again.timings_s.items()},
        "threads": torch.get_num_threads(),
        "repeats": first.tokens == again.tokens,
        "tokens": first.tokens,
        "text": first.text,
        "duration_s": first.duration_s,
        "confidence": first.confidence,
    }


def weight_values(folder: Path) -> int:
    """How many numbers the checkpoint holds."""
    return sum(math.prod(spec.shape) for spec in tensor_specs(load_config(folder)))


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Medians of the times and the largest peaks of fresh processes."""
    command = [sys.executable, __file__, "--child", str(folder), dtype]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(RUNS)]
    first = runs[0]
    gigabytes = {
        f"{name}_gb": round(max(run[f"{name}_bytes"] for run in runs) / 1e9, 3)
        for name in ("weights", "baseline", "peak_after_load", "peak")
    }
    return {
        "dtype": dtype,
        **gigabytes,
        "load_s": statistics.median(run["load_s"] for run in runs),
        "transcribe_first_s": statistics.median(run["transcribe_s"][0] for run in runs),
        "transcribe_again_s": statistics.median(run["transcribe_s"][1] for run in runs),
        "stages_again_s": {
            name: statistics.median(run["timings_s"][name] for run in runs) for name in first["timings_s"]
        },
        "tokens": len(first["tokens"]),
        "torch_threads": first["threads"],
        "runs": [{"load_s": run["load_s"], "transcribe_s": run["transcribe_s"]} for run in runs],
    }


def measure_size(size: str, scratch: Path) -> list[dict[str, Any]]:
    """Write one checkpoint, measure it in each dtype, remove it."""
    folder = scratch / f"random-{size}"
    script = ROOT / "scripts" / "random_checkpoint.py"
    try:
        written = subprocess.run(
            [sys.executable, str(script), size, str(folder)], check=True, capture_output=True, text=True
        )
        print(written.stdout.strip())
        results = []
        for dtype in CASES[size]:
            result = {"size": size, **measure(folder, dtype)}
            print(
                "{size} {dtype}: load {load_s:.2f} s, clip {transcribe_first_s:.2f} then {transcribe_again_s:.2f} s, "
                "peak {peak_after_load_gb:.2f} GB after load, {peak_gb:.2f} GB in all; weights {weights_gb:.2f} GB, "
                "interpreter {baseline_gb:.2f} GB".format_map(result)
            )
            results.append(result)
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure, print, write; or be the measured process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path, nargs="?", help="where the checkpoints go for the time of the runs")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "DTYPE"), help="one run in this process, as JSON")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(Path(asked.child[0]), asked.child[1])))
        return
    if asked.scratch is None:
        parser.error("give SCRATCH or --child")
    record = {
        "what": "full-size: random weights of the published shapes, from the page cache",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": round(os.getloadavg()[0], 2),  # before the first run: what else the machine was doing
        **{name: version(name) for name in ("numpy", "safetensors", "tokenizers")},
        "clip_s": CLIP_S,
        "new_tokens": NEW_TOKENS,
        "note": "medians of 3 processes, largest peaks; load_s is load_model after all imports",
        "cases": [result for size in CASES for result in measure_size(size, asked.scratch)],
    }
    target = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-full-size.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
