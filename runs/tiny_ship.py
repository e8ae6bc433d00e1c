"""Puts a trained model into the package, in bfloat16 and in the published layout: python runs/tiny_ship.py MODEL."""

import shutil
import sys
from pathlib import Path

import torch

from arkasr import checkpoint, files, model, pins


def main(folder: Path) -> None:
    target = pins.SHIPPED / "tiny"
    model.save(model.load(checkpoint.open_checkpoint(folder)), target, dtype=torch.bfloat16)
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    print("for PINS in src/arkasr/pins.py:", {path.name: files.sha256(path) for path in sorted(target.iterdir())})
    print(target, sum(path.stat().st_size for path in target.iterdir()), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
