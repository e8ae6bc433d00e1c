"""Puts a trained model into the package, in bfloat16 and in the published layout.

python runs/tiny_ship.py MODEL   # then put the printed hashes into PINS of src/arkasr/pins.py
python runs/tiny_ship.py         # makes the export of what is shipped
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from arkasr import checkpoint, export, files, model, pins

TARGET = pins.SHIPPED / "tiny"
ALIGNMENT_HEADS = ((1, 0), (1, 1), (1, 2))  # measured with these weights, and to be measured anew with others


def ship(folder: Path) -> None:
    source = checkpoint.open_checkpoint(folder)
    model.save(model.load(source), TARGET, dtype=torch.bfloat16)
    shutil.copyfile(folder / "tokenizer.json", TARGET / "tokenizer.json")
    (eos_id,) = source.config.eos_token_ids
    settings = json.dumps({"eos_token_id": eos_id, "alignment_heads": ALIGNMENT_HEADS}) + "\n"
    files.write_text_atomically(TARGET / files.GENERATION_CONFIG, settings)
    print({path.name: files.sha256(path) for path in sorted(TARGET.iterdir())})


def ship_export() -> None:
    folder = pins.SHIPPED / "tiny-int8"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    export.write(checkpoint.open_checkpoint("tiny"), folder, "int8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ship(Path(sys.argv[1]))
    else:
        ship_export()
