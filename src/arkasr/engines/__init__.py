"""What every engine offers: waveforms in, token ids out. Everything before and after is shared by all engines."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from arkasr import guards
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.config import Heads
from arkasr.errors import MissingExtraError, NoAnswerError, UsageError

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
EngineName = Literal["auto", "pytorch", "onnx", "vllm", "openai"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]

MAX_NEW_TOKENS = 256
PARALLEL, ANSWER_S = 8, 600.0  # of an endpoint: clips at a time, and most seconds for each
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30  # beyond, float32 overflows to NaN
# Real speech stays below about 10 tokens a second in all 19 languages; more is a loop.
TOKENS_PER_S = 10
EXTRA_TOKENS = 8


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Attributes:
        max_new_tokens: upper bound of generated tokens a clip; a lower one follows from its duration.
        temperature: 0 is greedy; above it tokens are sampled.
        seed: of the sampling; the same seed gives the same text.
        guard: whether a clip whose tokens run in a loop is ended.
        top_p: sampled are only the likeliest tokens that together reach this probability (arXiv 1904.09751).
        align: whether to tell where in the audio each token was heard, if the engine can; it changes no token.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0
    guard: bool = True
    top_p: float = 1.0
    align: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise UsageError(
                f"temperature is {self.temperature}; give 0 (greedy) or {MIN_TEMPERATURE}..{MAX_TEMPERATURE}"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; give a share above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; give 0..2^63-1")

    def token_cap(self, num_samples: int) -> int:
        """Most tokens that a clip of this length may produce."""
        return min(self.max_new_tokens, EXTRA_TOKENS + math.ceil(TOKENS_PER_S * num_samples / SAMPLE_RATE))

    def is_over(self, ids: Sequence[int], num_samples: int) -> bool:
        """Whether a clip that has not stopped is ended here: by the cap, or as a loop."""
        return len(ids) >= self.token_cap(num_samples) or (self.guard and guards.is_loop(ids, num_samples))


@dataclass(frozen=True)
class Generation:
    """What an engine says about one waveform.

    Attributes:
        ids: generated token ids without the stop id.
        logprobs: natural logarithm of each id's probability among the allowed tokens, at temperature 1.
        stop_logprob: the same of the stop id; None when the token cap or a loop ended the clip.
        timings_s: wall seconds of each stage; of a stage that clips of a batch share, this clip's part.
        text: of an engine that gives text and no ids; it may give the logprobs of that text's own tokens.
        failure: why this clip, and perhaps this one alone, got no answer; engines on this machine always answer.
        attention: [len(ids) + 1, A], where `align` asked and the engine can: for each id and for the stop, how the
            position that predicts it attends to the clip's A audio tokens; each row sums to 1. Of a clip that the
            token cap or a loop ended, no position has predicted a stop: the last row is the last id's once more.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_logprob: float | None
    timings_s: dict[str, float] = field(default_factory=dict)
    text: str | None = None
    failure: NoAnswerError | None = None
    attention: Floats | None = field(default=None, compare=False, repr=False)

    @property
    def confidence(self) -> float:
        """Geometric mean probability of the tokens and the stop, in [0, 1]; 0 where the engine tells none."""
        logprobs = [*self.logprobs, *([] if self.stop_logprob is None else [self.stop_logprob])]
        return math.exp(min(0.0, sum(logprobs) / len(logprobs))) if logprobs else 0.0


class Engine(Protocol):
    """The one seam between recognition and how the network is run."""

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize clips of at least one mel frame and at most 30 s; one Generation each, in order."""
        ...


@dataclass(eq=False)
class Clip:
    """A waveform on its way through a `Continuous` engine.

    Attributes:
        waveform: of at least one mel frame and at most 30 s.
        options: how to decode it.
        mel: its log-mel, once it is prepared.
        encoded: what is sent of it, once it is prepared, by an engine elsewhere.
        timings_s: wall seconds spent on it so far; of a stage that clips share, its part.
    """

    waveform: Waveform
    options: DecodeOptions
    mel: Floats | None = None
    encoded: bytes | None = None
    timings_s: dict[str, float] = field(default_factory=dict)


class Clips(Protocol):
    """Where a `Continuous` engine gets its clips, and where it leaves what they say."""

    def take(self) -> Clip | None:
        """The next clip; None when there is none now."""
        ...

    def wants(self, clip: Clip) -> bool:
        """Whether a clip that was taken shall be decoded on."""
        ...

    def give(self, clip: Clip, generation: Generation) -> None:
        """Deliver what a clip says."""
        ...


@runtime_checkable
class Continuous(Engine, Protocol):
    """An engine that begins with new clips while it decodes others."""

    def prepare(self, clip: Clip) -> None:
        """Do what needs no network, so that a clip's own thread can do it while the network hears others."""
        ...

    def decode(self, clips: Clips) -> None:
        """Recognize clips until nothing is left: none in work, and none to take."""
        ...


def heads_by_layer(heads: Heads) -> dict[int, npt.NDArray[np.int64]]:
    """The heads of each layer that has some."""
    return {layer: np.array([head for n, head in heads if n == layer]) for layer in sorted({n for n, _ in heads})}


def attention(queries: Floats, keys: Floats, *, num_ids: int) -> Floats:
    """What `Generation.attention` is, [num_ids + 1, A]: the softmax over the audio alone, its mean over heads.

    Args:
        queries: [C, n, D] of C heads at the positions that predicted the ids, and the stop if there was one; rotated.
        keys: [C, A, D] of what these heads attend to at the audio tokens; rotated.
        num_ids: how many ids there are.
    """
    scores = queries @ keys.transpose(0, 2, 1) / np.float32(keys.shape[-1] ** 0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    rows: Floats = weights.mean(axis=0)
    return rows if len(rows) > num_ids else np.concatenate([rows, rows[-1:]])


def load_engine(
    source: Checkpoint,
    *,
    name: EngineName = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
    report: Callable[[str], object] = _log.info,
) -> Engine:
    """The named engine over a checkpoint; "auto" is pytorch on CUDA and for 16-bit floats; else, and for exports, onnx.

    Args:
        source: the checkpoint.
        name: "auto", "onnx", "pytorch" or "vllm".
        device: "auto", "cpu", "cuda" or "cuda:N"; onnx runs on the CPU.
        dtype: "auto" is int8, or whatever an export is, for onnx, float32 for pytorch, and as vLLM's
            engine says for vllm.
        report: takes a line when something takes long, such as the first conversion for onnx.

    Raises:
        MissingExtraError: the engine's packages are not installed.
        UsageError: no such engine, device or dtype, or they do not go together.
    """
    if name == "openai":
        raise UsageError("engine openai has no checkpoint; give a base URL: Transcriber(OpenAIEngine(URL, MODEL))")
    if name not in ("auto", "onnx", "pytorch", "vllm"):
        raise UsageError(f"engine {name!r}: no such engine; use auto, onnx, pytorch, vllm or openai")
    if name == "auto":
        name = "pytorch" if source.shards and _is_for_pytorch(device, dtype) else "onnx"
    if name == "onnx":
        return _load_onnx(source, device=device, dtype=dtype, report=report)
    if name == "vllm":
        from arkasr.engines.vllm import VllmEngine

        return VllmEngine.load(source, device=device, dtype=dtype)
    try:
        from arkasr.engines.pytorch import PyTorchEngine
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("engine pytorch: PyTorch is not installed; pip install 'arkasr[torch]'") from None
    return PyTorchEngine.load(source, device=device, dtype="float32" if dtype == "auto" else dtype)


def _is_for_pytorch(device: str, dtype: str) -> bool:
    """Whether only PyTorch does what is asked, or a CUDA device is there; torch is imported only where that may be."""
    if device not in ("auto", "cpu") or dtype in ("bfloat16", "float16"):
        return True
    if device == "cpu" or dtype in ("int8", "int4") or not Path("/dev/nvidiactl").exists():
        return False
    try:
        from arkasr.engines import pytorch
    except ImportError:
        return False
    return pytorch.has_cuda()


def _load_onnx(source: Checkpoint, *, device: str, dtype: Dtype, report: Callable[[str], object]) -> Engine:
    from arkasr.engines.onnx import OnnxEngine

    if device not in ("auto", "cpu"):
        raise UsageError(f"engine onnx runs on the CPU, not on device {device}; use --engine pytorch")
    if dtype not in ("auto", "float32", "int8", "int4"):
        raise UsageError(f"engine onnx has no dtype {dtype}; use float32, int8 or int4, or --engine pytorch")
    return OnnxEngine.load(source, precision=None if dtype == "auto" else dtype, report=report)
