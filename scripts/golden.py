"""Records what a model computes on a few clips, stage by stage, and compares a model with such a record.

    python scripts/golden.py MODEL CLIP... [--output tests/golden/NAME.json]

Run once where the weights are; from then on `pytest -m weights` compares. Clips go one at a time, in float32, on the
CPU: a reference made in bfloat16 or in a batch is less exact.

Unusual: hooks on the network's parts see the engine's own run, so no rule is written a second time here. And a value
may differ by a part of itself and of its stage's *median*: an encoder without a final norm may have a channel
thousands of times larger than the others, and a tolerance relative to the maximum would let those be anything.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from arkasr import audio, checkpoint, files, hub, pins
from arkasr.config import MAX_CLIP_S
from arkasr.engines import DecodeOptions, Dtype
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import ArkASRError, AudioError, CheckpointMismatchError, UsageError
from arkasr.train import loop

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
DTYPE: Dtype = "float32"
NUM_FRAMES, NUM_CHANNELS = 16, 8  # values that are kept of each stage
TOP_LOGITS = 20
LOG_MEL_TOLERANCE = 1e-4  # absolute
# Relative. On random weights of the 0.6B shape another instruction set moved no value by more than 1e-5, and GELU by
# tanh, the smallest fault that was tried, moved some kept value by 9e-4.
TOLERANCE = 2e-4

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Slice:
    """Evenly spaced values of an array [frames, channels], and statistics of the whole of it."""

    shape: Sequence[int]
    frames: Sequence[int]
    channels: Sequence[int]
    values: Sequence[Sequence[float]]
    mean: float
    std: float
    absmax: float

    def __post_init__(self) -> None:
        if np.asarray(self.values, np.float64).shape != (len(self.frames), len(self.channels)):
            raise ValueError("values do not fit frames and channels")
        if max(self.frames) >= self.shape[0] or max(self.channels) >= self.shape[1]:
            raise ValueError("frames and channels do not fit the shape")


@dataclass(frozen=True)
class TopLogits:
    """The largest logits after the prompt, falling, and statistics of all of them."""

    num_logits: int
    ids: Sequence[int]
    values: Sequence[float]
    mean: float
    std: float
    absmax: float

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.values) or max(self.ids) >= self.num_logits:
            raise ValueError("ids do not fit values or the number of logits")


@dataclass(frozen=True)
class Clip:
    """What was recorded of one clip; `file` is relative to the repository where it lies inside."""

    file: str
    sha256: str
    duration_s: float
    log_mel: Slice
    encoder: Slice
    adapter: Slice
    logits: TopLogits
    ids: Sequence[int]
    text: str


@dataclass(frozen=True)
class Golden:
    """One golden file: a model, where and how it was run, and its clips."""

    model: str
    revision: str | None
    model_files: Mapping[str, files.Known]
    made_by: Mapping[str, str]
    clips: Sequence[Clip]

    def __post_init__(self) -> None:
        if not self.clips or not any(map(files.is_weights, self.model_files)):
            raise ValueError("no clips or no weights: it would compare nothing")


@dataclass(frozen=True)
class Observed:
    """All that a model computed on one clip: log-mel [F, M], encoder [S, E], adapter [A, H], logits [V]."""

    log_mel: Array
    encoder: Array
    adapter: Array
    logits: Array
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Difference:
    """A stage of a clip that is not as recorded."""

    clip: str
    stage: str
    what: str

    def __str__(self) -> str:
        return f"{self.clip}: {self.stage}: {self.what}"


def record(model: str, clips: Sequence[Path]) -> Golden:
    """Run a model on clips and keep slices of what it computed.

    Raises:
        ArkASRError: no such model, or a clip is missing, unreadable, too short or too long.
    """
    _refuse_missing(clips)
    folder = hub.find(model)
    engine = _engine(folder)
    lock = pins.read_lock(folder)
    return Golden(
        model=_place(folder) if Path(model).resolve() == folder.resolve() else model,
        revision=lock.revision if lock else None,
        model_files={
            path.name: files.Known(path.stat().st_size, files.sha256(path))
            for path in sorted(folder.iterdir())
            if files.is_published(path.name)
        },
        made_by={**loop.provenance(), "numpy": np.__version__, "dtype": DTYPE},
        clips=[_clip(path, observe(engine, path)) for path in clips],
    )


def replay(path: Path) -> list[Difference]:
    """Run the model that a golden file names on its clips again; the differences, or none.

    Raises:
        CheckpointMismatchError: the model's files are not those that were recorded; they are named.
        ArkASRError: not a golden file, or its model or clips are missing or other ones.
    """
    golden = read(path)
    clips = [ROOT / clip.file for clip in golden.clips]
    _refuse_missing(clips)
    other = [str(file) for file, clip in zip(clips, golden.clips, strict=True) if files.sha256(file) != clip.sha256]
    if other:
        raise AudioError(f"{', '.join(other)}: not the audio that {path} was recorded from; get the same file")
    folder = hub.find(ROOT / golden.model if (ROOT / golden.model).is_dir() else golden.model)
    changed = [name for name, file in golden.model_files.items() if not _is_same(folder / name, file)]
    if changed:
        raise CheckpointMismatchError(
            f"{folder}: {', '.join(changed)} missing or not as when {path} was recorded; get the same weights "
            f"(revision {golden.revision or 'unknown'})"
        )
    engine = _engine(folder)
    return [
        difference
        for clip, file in zip(golden.clips, clips, strict=True)
        for difference in compare(clip, observe(engine, file))
    ]


def observe(engine: PyTorchEngine, path: Path) -> Observed:
    """What an engine computes on one clip, taken from its own run."""
    waveform = audio.load(path)
    if audio.num_mel_frames(len(waveform)) == 0 or len(waveform) > MAX_CLIP_S * audio.SAMPLE_RATE:
        raise AudioError(f"{path}: {len(waveform) / audio.SAMPLE_RATE:.2f} s long; give a clip of 0.01..{MAX_CLIP_S} s")
    network = engine.network
    seen: dict[str, Array] = {}

    def keep(stage: str, batch: Tensor) -> None:
        seen[stage] = batch[0].float().cpu().numpy()

    def on_encoder(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        keep("log_mel", inputs[0].mT)
        keep("encoder", output)

    def on_adapter(_: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        keep("adapter", output)

    def on_decoder(_: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if "logits" not in seen:  # the first call is the prompt
            keep("logits", network.decoder.logits(output[:, -1]))

    with (
        network.encoder.register_forward_hook(on_encoder),
        network.adapter.register_forward_hook(on_adapter),
        network.decoder.register_forward_hook(on_decoder),
    ):
        (generation,) = engine.generate([waveform], DecodeOptions(guard=False))
    return Observed(**seen, ids=generation.ids, text=engine.rules.to_text(list(generation.ids)))


def compare(clip: Clip, observed: Observed) -> list[Difference]:
    """The stages that differ, in the order of computation: the first is where to look."""
    found = {
        "log-mel": _slice_difference(clip.log_mel, observed.log_mel, LOG_MEL_TOLERANCE),
        "encoder": _slice_difference(clip.encoder, observed.encoder),
        "adapter": _slice_difference(clip.adapter, observed.adapter),
        "logits": _logits_difference(clip.logits, observed.logits),
        "ids": _ids_difference(clip.ids, observed.ids),
        "text": None if clip.text == observed.text else f"recorded {clip.text!r}, now {observed.text!r}",
    }
    return [Difference(clip.file, stage, what) for stage, what in found.items() if what]


def _slice_difference(recorded: Slice, array: Array, absolute: float | None = None) -> str | None:
    if tuple(recorded.shape) != array.shape:
        return f"shape [frames, channels] recorded {list(recorded.shape)}, now {list(array.shape)}"
    values = np.asarray(recorded.values, np.float64)
    now = array[np.ix_(recorded.frames, recorded.channels)]
    sizes = np.abs(values)
    allowed = TOLERANCE * (sizes + float(np.median(sizes))) if absolute is None else np.full_like(sizes, absolute)
    bad = ~(np.abs(now - values) <= allowed)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        return (
            f"{bad.sum()} of {bad.size} values differ, first at frame {recorded.frames[row]}, channel "
            f"{recorded.channels[column]}: recorded {values[row, column]:.6g}, now {now[row, column]:.6g} "
            f"(tolerance {allowed[row, column]:.2g})"
        )
    return _statistics_difference(recorded, array, absolute)


def _logits_difference(recorded: TopLogits, logits: Array) -> str | None:
    if logits.shape != (recorded.num_logits,):
        return f"recorded {recorded.num_logits}, now {len(logits)}"
    values = np.asarray(recorded.values, np.float64)
    allowed = TOLERANCE * recorded.std  # only differences between logits mean anything
    # By id, then by rank: an id may take the rank only of one that it ties with.
    for ids in (np.asarray(recorded.ids), _top_ids(logits)):
        bad = ~(np.abs(logits[ids] - values) <= allowed)
        if bad.any():
            rank = int(bad.argmax())
            return (
                f"rank {rank + 1}: recorded id {recorded.ids[rank]} with {values[rank]:.6g}, now id {ids[rank]} with "
                f"{logits[ids[rank]]:.6g} (tolerance {allowed:.2g})"
            )
    return _statistics_difference(recorded, logits)


def _statistics_difference(recorded: Slice | TopLogits, array: Array, absolute: float | None = None) -> str | None:
    """Name and numbers of the first that is off; the mean, which may be near zero, is measured by the deviation."""
    scales = {"mean": recorded.std, "std": recorded.std, "absmax": recorded.absmax}
    for name, now in _statistics(array).items():
        was = vars(recorded)[name]
        allowed = TOLERANCE * scales[name] if absolute is None else absolute
        if not abs(now - was) <= allowed:
            return f"{name} of all values: recorded {was:.6g}, now {now:.6g} (tolerance {allowed:.2g})"
    return None


def _ids_difference(recorded: Sequence[int], ids: Sequence[int]) -> str | None:
    for position, (was, now) in enumerate(zip(recorded, ids, strict=False)):
        if was != now:
            return f"position {position}: recorded {was}, now {now}"
    return None if len(recorded) == len(ids) else f"recorded {len(recorded)} tokens, now {len(ids)}"


def _clip(path: Path, observed: Observed) -> Clip:
    return Clip(
        file=_place(path),
        sha256=files.sha256(path),
        duration_s=audio.duration_s(path),
        log_mel=_slice(observed.log_mel),
        encoder=_slice(observed.encoder),
        adapter=_slice(observed.adapter),
        logits=_top_logits(observed.logits),
        ids=observed.ids,
        text=observed.text,
    )


def _slice(array: Array) -> Slice:
    frames, channels = (
        np.unique(np.linspace(0, size - 1, min(size, wanted)).round().astype(int))
        for size, wanted in zip(array.shape, (NUM_FRAMES, NUM_CHANNELS), strict=True)
    )
    values = [_rounded(row) for row in array[np.ix_(frames, channels)]]
    return Slice(array.shape, frames.tolist(), channels.tolist(), values, **_statistics(array))


def _top_logits(logits: Array) -> TopLogits:
    ids = _top_ids(logits)
    return TopLogits(len(logits), ids.tolist(), _rounded(logits[ids]), **_statistics(logits))


def _statistics(array: Array) -> dict[str, float]:
    exact = array.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity is a difference, not a warning
        return {"mean": float(exact.mean()), "std": float(exact.std()), "absmax": float(np.abs(exact).max())}


def _top_ids(logits: Array) -> npt.NDArray[np.int64]:
    return np.argsort(-logits, kind="stable")[:TOP_LOGITS]


def _rounded(values: Array) -> list[float]:
    """As many digits as float32 has: shorter lines, the same numbers."""
    return [float(f"{value:.9g}") for value in values]


def _engine(folder: Path) -> PyTorchEngine:
    return PyTorchEngine.load(checkpoint.open_checkpoint(folder), device="cpu", dtype=DTYPE)


def _is_same(path: Path, recorded: files.Known) -> bool:
    return path.is_file() and path.stat().st_size == recorded.size and files.sha256(path) == recorded.sha256


def _place(path: Path) -> str:
    """A path as other machines can use it, where that is possible."""
    full = path.resolve()
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else str(full)


def _refuse_missing(clips: Sequence[Path]) -> None:
    missing = [str(clip) for clip in clips if not clip.is_file()]
    if missing:
        raise AudioError(f"{', '.join(missing)}: no such file; check the path")


def write(golden: Golden, path: Path) -> None:
    """One line a list of numbers, so that a new record can be read beside the old one."""
    text = json.dumps(asdict(golden), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)
    files.write_text_atomically(path, text)


def read(path: Path) -> Golden:
    """A golden file.

    Raises:
        UsageError: it is none.
    """
    try:
        raw = json.loads(path.read_bytes())
        clips = [_read_clip(clip) for clip in raw["clips"]]
        weights = {name: files.Known(**file) for name, file in raw["model_files"].items()}
        return Golden(**{**raw, "clips": clips, "model_files": weights})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a golden file ({error}); record it again with scripts/golden.py") from None


def _read_clip(raw: dict[str, Any]) -> Clip:
    slices = {stage: Slice(**raw[stage]) for stage in ("log_mel", "encoder", "adapter")}
    return Clip(**{**raw, **slices, "logits": TopLogits(**raw["logits"])})


def main(argv: Sequence[str]) -> int:
    """Record; users' mistakes become one line on standard error and exit code 1."""
    parser = argparse.ArgumentParser(prog="scripts/golden.py", description="Record what a model computes on clips.")
    parser.add_argument("model", metavar="MODEL", help="a built-in name (best: others can replay it) or a folder")
    parser.add_argument("clips", metavar="CLIP", nargs="+", type=Path, help="audio files, best inside the repository")
    parser.add_argument("--output", type=Path, help="default tests/golden/MODEL.json")
    given = parser.parse_args(argv)
    output = given.output or GOLDEN / f"{Path(given.model).resolve().name.partition('@')[0].lower()}.json"
    try:
        if not output.parent.is_dir():
            raise UsageError(f"{output.parent}: no such folder; give another --output")
        golden = record(given.model, given.clips)
        write(golden, output)
    except ArkASRError as error:
        print(f"golden: {error}", file=sys.stderr)
        return 1
    for clip in golden.clips:
        print(f"{clip.file}: {clip.text}")
    print(f"{output}: {len(golden.clips)} clips", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
