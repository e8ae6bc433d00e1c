"""What a run leaves on the disk: metrics, and checkpoints, of which each is complete or not there.

    out/config.json   out/metrics.jsonl   out/tensorboard/   out/checkpoints/step-00001000/   out/model/

All ranks write a checkpoint into a folder whose name ends as incomplete ones do; once everything is on the disk,
rank 0 renames it. What a kill leaves is never read and is removed by the next start. Tensors are saved as they are
spread (torch.distributed.checkpoint), and can be loaded by any number of ranks. Several nodes need one common disk.
"""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from arkasr import files
from arkasr.errors import CheckpointMismatchError, MissingExtraError, UsageError
from arkasr.train.ranks import Ranks

CHECKPOINTS = "checkpoints"
FACTS = "facts.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# Fields that change no update, so that a resumed run may have others.
MAY_DIFFER = {
    "accumulate", "device", "threads", "workers", "eval_every", "save_every", "log_every", "keep", "recompute",
    "max_skipped",
}  # fmt: skip
_NAME = re.compile(r"step-(\d{8,})")


def saved_steps(out: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by their update, ascending."""
    found = {int(named[1]): path for path in (out / CHECKPOINTS).glob("*") if (named := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def save(out: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint; every rank must call it, with its part of the tensors and the same facts."""
    folder = out / CHECKPOINTS / f"step-{step:08d}"
    part = folder.with_name(folder.name + files.PART)
    if ranks.first:
        _remove(part)
        part.mkdir(parents=True)
    ranks.wait()
    with _alone_is_no_mistake():
        state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(part), no_dist=ranks.size == 1)
    if ranks.first:
        with (part / FACTS).open("w", encoding="utf-8") as file:
            json.dump(dict(facts), file)
            file.flush()
            os.fsync(file.fileno())
        _sync(part)
        _remove(folder)
        part.rename(folder)
        _sync(folder.parent)
    ranks.wait()


def load(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Fill tensors by name, and return the facts; every rank must call it.

    Raises:
        CheckpointMismatchError: the checkpoint has no such tensors, or its files are damaged.
    """
    try:
        with _alone_is_no_mistake():
            state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=ranks.size == 1)
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[-1]
        raise CheckpointMismatchError(f"{folder}: cannot be loaded ({why}); remove it to resume before it") from None
    return facts


def names(folder: Path) -> set[str]:
    """Names of the tensors of a checkpoint."""
    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def retain(out: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one with the lowest `eval_wer`."""
    found = saved_steps(out)
    scores = {step: json.loads((path / FACTS).read_text()).get("eval_wer") for step, path in found.items()}
    scored = [(score, -step) for step, score in scores.items() if score is not None]
    kept = {*list(found)[-keep:], *([-min(scored)[1]] if scored else [])}
    for step, path in found.items():
        if step not in kept:
            _remove(path)


def check_same(out: Path, described: Mapping[str, Any]) -> None:
    """Refuse to continue a run under another configuration.

    Raises:
        UsageError: a field that changes updates differs.
    """
    before = json.loads((out / "config.json").read_text())["config"]
    names = (described.keys() | before.keys()) - MAY_DIFFER
    changed = sorted(name for name in names if before.get(name) != described.get(name))
    if changed:
        raise UsageError(f"{out}: holds a run with another {', '.join(changed)}; give a new --out or remove it")


def remove_incomplete(out: Path) -> None:
    """Remove what a kill left."""
    for path in (out / CHECKPOINTS).glob("*" + files.PART):
        shutil.rmtree(path)


def find(out: Path, step: int | None) -> Path:
    """The checkpoint of an update, or the newest.

    Raises:
        UsageError: there is none.
    """
    found = saved_steps(out)
    wanted = max(found, default=-1) if step is None else step
    if wanted not in found:
        there = f"of updates {', '.join(map(str, found))}" if found else "none"
        raise UsageError(f"{out}: no such checkpoint; there are {there}")
    return found[wanted]


def _remove(folder: Path) -> None:
    """Not complete any more before its first file is gone."""
    if folder.exists():
        doomed = folder if folder.suffix == files.PART else folder.with_name(folder.name + files.PART)
        if doomed != folder:
            folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync(folder: Path) -> None:
    """Names reach the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone_is_no_mistake() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class Metrics:
    """Lines of metrics.jsonl, and the same values for TensorBoard."""

    def __init__(self, out: Path, step: int) -> None:
        """Forget what an earlier process wrote of updates after `step`, which will be made again."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("train: tensorboard is not installed; pip install 'arkasr[train]'") from None
        self.path = out / METRICS
        if self.path.exists():
            # A kill may leave half a line.
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
            files.write_text_atomically(self.path, kept)
        self.board = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append values of an update, to six digits."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded, "time": round(time.time(), 1)}) + "\n")
        for name, value in rounded.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
