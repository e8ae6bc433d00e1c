"""A checkpoint that is known to be worse: the weights of another with noise on them, the same in every run.

python runs/worse.py MODEL FOLDER --noise 0.2   # of each tensor's own standard deviation
"""

import argparse
import shutil
from pathlib import Path

import torch

from arkasr import checkpoint, model


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--noise", type=float, required=True)
    asked = parser.parse_args()
    source = checkpoint.open_checkpoint(asked.model)
    worse = model.load(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in worse.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise, alpha=asked.noise * float(tensor.std()))
    model.save(worse, asked.folder, dtype=torch.float32)
    shutil.copyfile(source.folder / "tokenizer.json", asked.folder / "tokenizer.json")


if __name__ == "__main__":
    main()
