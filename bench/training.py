"""How fast `ark-asr train sft` goes through audio, and in how much memory; writes bench/results.

    python bench/training.py SPEECH_FOLDER [MODEL ...] [--batch-s 24] [--updates 4] [-- FLAG ...]

SPEECH_FOLDER holds an4/ with its manifest.jsonl. MODEL is a name or folder, `tiny` by default. What stands behind --
goes to the program. Every model is trained in a process of its own, at the rate of its last updates: the first pays for
the start.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from arkasr import checkpoint
from arkasr.train import loop

ROOT = Path(__file__).parents[1]


def trained(model: str, speech: Path, wanted: argparse.Namespace, flags: list[str]) -> dict[str, object]:
    """Train a model for a few updates."""
    with tempfile.TemporaryDirectory() as name:
        settings = {
            "model": model, "train": f"{speech / 'an4' / 'manifest.jsonl'}:train", "out": name, "lr": 1e-6,
            "steps": wanted.updates, "batch-s": wanted.batch_s, "ctc-weight": 0, "log-every": wanted.updates // 2,
        }  # fmt: skip
        arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        program = Path(sys.executable).with_name("ark-asr")
        subprocess.run([str(program), "train", "sft", *arguments, *flags], check=True)
        lines = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
    config = checkpoint.open_checkpoint(model).config
    return {
        "model": Path(model).name,
        "decoder": f"{config.decoder_layers} x {config.hidden_dim}",
        "encoder": f"{config.encoder_layers} x {config.encoder_dim}",
        "audio_s_per_s": lines[-1]["audio_s_per_s"],
        "peak_mb_so_far": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("speech", type=Path)
    parser.add_argument("models", nargs="*", default=["tiny"], help="smallest first: memory is a peak of all so far")
    parser.add_argument("--batch-s", type=float, default=24.0)
    parser.add_argument("--updates", type=int, default=4)
    wanted, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    record = {
        "what": "training: seconds of audio a second of supervised fine-tuning",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": round(os.getloadavg()[0], 2),
        "batch_s": wanted.batch_s,
        "updates": wanted.updates,
        "flags": flags,
        "models": [trained(model, wanted.speech, wanted, flags) for model in wanted.models],
    }
    print(json.dumps(record["models"], indent=1))
    target = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-training.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
