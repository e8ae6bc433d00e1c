"""What every engine offers: waveforms in, token ids out. Everything before and after is shared by all engines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.errors import MissingExtraError, UsageError

EngineName = Literal["auto", "pytorch", "onnx"]
Dtype = Literal["float32", "bfloat16", "float16"]

MAX_NEW_TOKENS = 256
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
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise UsageError(
                f"temperature is {self.temperature}; give 0 (greedy) or {MIN_TEMPERATURE}..{MAX_TEMPERATURE}"
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; give 0..2^63-1")

    def token_cap(self, num_samples: int) -> int:
        """Most tokens that a clip of this length may produce."""
        return min(self.max_new_tokens, EXTRA_TOKENS + math.ceil(TOKENS_PER_S * num_samples / SAMPLE_RATE))


@dataclass(frozen=True)
class Generation:
    """What an engine says about one waveform.

    Attributes:
        ids: generated token ids without the stop id.
        logprobs: natural logarithm of each id's probability among the allowed tokens, at temperature 1.
        stop_logprob: the same of the stop id; None when the token cap ended the clip.
        timings_s: wall seconds of each stage, shared by the clips of a batch.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_logprob: float | None
    timings_s: dict[str, float] = field(default_factory=dict)

    @property
    def confidence(self) -> float:
        """Geometric mean probability of the tokens and the stop, in [0, 1]."""
        logprobs = [*self.logprobs, *([] if self.stop_logprob is None else [self.stop_logprob])]
        return math.exp(min(0.0, sum(logprobs) / len(logprobs))) if logprobs else 0.0


class Engine(Protocol):
    """The one seam between recognition and how the network is run."""

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize clips of at least one mel frame and at most 30 s; one Generation each, in order."""
        ...


def load_engine(
    source: Checkpoint, *, name: EngineName = "auto", device: str = "auto", dtype: Dtype = "float32"
) -> Engine:
    """The named engine over a checkpoint.

    Raises:
        MissingExtraError: the engine's packages are not installed.
        UsageError: no such engine, device or dtype.
    """
    if name == "onnx":
        raise UsageError("engine onnx: not built yet; use --engine pytorch")
    if name not in ("auto", "pytorch"):
        raise UsageError(f"engine {name!r}: no such engine; use auto or pytorch")
    try:
        from arkasr.engines.pytorch import PyTorchEngine
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("engine pytorch: PyTorch is not installed; pip install 'arkasr[torch]'") from None
    return PyTorchEngine.load(source, device=device, dtype=dtype)
