"""What every training program shares: flags, optimizer, schedule, moving average, resume, metrics file."""

import argparse
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

import arkasr
from arkasr import record
from arkasr.files import write_atomically

STATE = "state.pt"
METRICS = "metrics.jsonl"


ConfigT = TypeVar("ConfigT")


def parse_flags(config: type[ConfigT], argv: Sequence[str], *, program: str, about: str) -> ConfigT | None:
    """A program's Config from its command line: one flag a field, described by the class's docstring.

    Fields of a nested dataclass are flags of their own. With --dry-run the flags are checked and None is returned.
    """
    parser = argparse.ArgumentParser(prog=program, description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="check the flags and stop")
    _add_flags(parser, config)
    given = vars(parser.parse_args(argv))
    dry_run = given.pop("dry_run")
    made = _build(config, given)
    return None if dry_run else made


def _add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    hints = get_type_hints(config)
    for item in fields(config):
        hint = hints[item.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            _add_flags(parser, hint)
            continue
        flag, about = "--" + item.name.replace("_", "-"), _described(config, item.name)
        many = hint == tuple[str, ...]
        kind = str if many else next((k for k in (bool, int, float, Path) if k in (hint, *get_args(hint))), str)
        default = _default(item)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=about)
            continue
        about = about if default in (MISSING, None) else f"{about} (default {default})"
        required, shown = default is MISSING, None if default is MISSING else default
        parser.add_argument(
            flag, type=kind, action="append" if many else "store", required=required, default=shown, help=about,
            metavar=kind.__name__.upper(),
        )  # fmt: skip


def _default(item: "Field[Any]") -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _described(config: type[Any], name: str) -> str:
    """The line(s) of a field in the class's Attributes, names that share a line included."""
    found = re.search(
        rf"^ +(?:\w+, )*{name}(?:, \w+)*: ((?:.+\n?)(?:^ {{12,}}.+\n?)*)", config.__doc__ or "", re.MULTILINE
    )
    return " ".join(found[1].split()).rstrip(".").replace("%", "%%") if found else ""


def _build(config: type[ConfigT], given: Mapping[str, Any]) -> ConfigT:
    hints = get_type_hints(config)
    values = {}
    for item in fields(config):  # type: ignore[arg-type]
        hint = hints[item.name]
        value = _build(hint, given) if is_dataclass(hint) else given[item.name]  # type: ignore[arg-type]
        values[item.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `lr`, then cosine down to `lr * floor` at `steps`."""

    lr: float
    warmup_steps: int
    steps: int
    floor: float = 0.05

    def at(self, step: int) -> float:
        """Learning rate of update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(module: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over float32 master weights; vectors (norms and biases) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained), "master weights must be float32"
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


class MovingAverage:
    """Exponential moving average of a module's trained weights, with a warm-up so that early noise is forgotten."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        """Starts at the module's present weights."""
        self.decay = decay
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights after update number `step`."""
        live = [p.detach() for p in module.parameters() if p.requires_grad]
        torch._foreach_lerp_(self.values, live, 1 - min(self.decay, (step + 1) / (step + 10)))

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the average with the module's weights; twice is as before."""
        for value, p in zip(self.values, (p for p in module.parameters() if p.requires_grad), strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name."""
        return dict(zip(self.names, self.values, strict=True))


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the training state atomically."""
    write_atomically(folder / STATE, lambda part: torch.save(dict(state), part))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The training state of an earlier run in this folder; None when there is none."""
    path = folder / STATE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def log(folder: Path, record: Mapping[str, Any]) -> None:
    """Append one line to the run's metrics."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record, "time": round(time.time(), 1)}) + "\n")


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drop the metrics of updates that a resumed run will make again."""
    path = folder / METRICS
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        write_atomically(path, lambda part: part.write_text("".join(line + "\n" for line in kept)))


def provenance() -> dict[str, str]:
    """Commit, versions and hardware, written beside every run."""
    return {
        "commit": record.git_commit() or "not in a git checkout",
        "arkasr": arkasr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": record.processor(),
        "cpus": str(os.cpu_count()),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def gradient_norm(parameters: Iterable[Tensor], *, limit: float) -> float:
    """Clip the global gradient norm to `limit`; returns it as it was before."""
    return float(nn.utils.clip_grad_norm_(list(parameters), limit))
