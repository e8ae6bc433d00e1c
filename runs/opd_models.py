"""Makes the proof's two models out of `tiny`, before their training: a larger teacher and a smaller student.

    python runs/opd_models.py teacher|student TARGET

The teacher has more layers and wider ones, whose outputs are zero at first: it says what `tiny` says. The student keeps
every other layer of `tiny`.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arkasr import checkpoint, files, model
from arkasr.config import ModelConfig

# Layers of `tiny` that the student keeps.
ENCODER_KEPT, DECODER_KEPT = (0, 2, 5), (0, 3)
# What adds to the residual stream: zero where the teacher is larger.
OUTPUTS = ("out.weight", "out.bias", "fc2.weight", "fc2.bias", "o.weight", "down.weight")


def teacher_config(tiny: ModelConfig) -> ModelConfig:
    return replace(
        tiny,
        encoder_layers=10, encoder_ffn_dim=2 * tiny.encoder_ffn_dim,
        decoder_layers=6, decoder_ffn_dim=2 * tiny.decoder_ffn_dim,
    )  # fmt: skip


def student_config(tiny: ModelConfig) -> ModelConfig:
    return replace(tiny, encoder_layers=len(ENCODER_KEPT), decoder_layers=len(DECODER_KEPT))


@torch.no_grad()
def grown(small: model.ArkASR, config: ModelConfig) -> model.ArkASR:
    """A larger model that says the same."""
    torch.manual_seed(0)
    large = model.ArkASR(config)
    state = small.state_dict()
    for name, value in large.state_dict().items():
        if name.endswith(OUTPUTS) and ".layers." in name:
            value.zero_()
        if name in state:
            value[tuple(slice(length) for length in state[name].shape)] = state[name]
    return large


def pruned(large: model.ArkASR, config: ModelConfig) -> model.ArkASR:
    """A model of some of the layers."""
    kept = {"encoder": ENCODER_KEPT, "decoder": DECODER_KEPT}
    state: dict[str, Tensor] = {}
    for name, value in large.state_dict().items():
        part, layers, *rest = name.split(".")
        if layers != "layers":
            state[name] = value
        elif int(rest[0]) in kept[part]:
            state[".".join([part, layers, str(kept[part].index(int(rest[0]))), *rest[1:]])] = value
    small = model.ArkASR(config)
    small.load_state_dict(state)
    return small


def main(which: str, target: Path) -> None:
    source = checkpoint.open_checkpoint("tiny")
    tiny = model.load(source)
    made = grown(tiny, teacher_config(tiny.config)) if which == "teacher" else pruned(tiny, student_config(tiny.config))
    model.save(made, target, dtype=torch.float32)
    shutil.copyfile(source.folder / files.TOKENIZER, target / files.TOKENIZER)
    print(target, sum(p.numel() for p in made.parameters()), "parameters")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
