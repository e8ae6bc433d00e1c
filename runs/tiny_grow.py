"""Adds two decoder layers that change nothing yet (their outputs are zero): python runs/tiny_grow.py MODEL TARGET."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from arkasr import checkpoint, model
from arkasr.train.sft import CTC_HEAD


def main(folder: Path, target: Path) -> None:
    before = model.load(checkpoint.open_checkpoint(folder))
    layers = before.config.decoder_layers
    torch.manual_seed(0)
    after = model.ArkASR(replace(before.config, decoder_layers=layers + 2))
    missing, surplus = after.load_state_dict(before.state_dict(), strict=False)
    assert not surplus
    assert all(name.startswith("decoder.layers.") for name in missing)
    with torch.no_grad():
        for layer in list(after.decoder.layers)[layers:]:
            layer.o.weight.zero_()  # type: ignore[union-attr,operator]
            layer.down.weight.zero_()  # type: ignore[union-attr,operator]
    model.save(after, target, dtype=torch.float32)
    for name in ("tokenizer.json", CTC_HEAD):
        shutil.copyfile(folder / name, target / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
