"""Teachers: what a stronger recognizer says of every position of the student's own transcripts.

    rollouts of a batch -> Teacher.score -> log-probabilities of the student's ids, position by position

Unusual: a teacher answers in the student's ids, whatever its own tokenizer is, and says of each position whether it
speaks of the same text as the student. What it cannot say is counted by reason, never left out in silence.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from arkasr import checkpoint, files
from arkasr.audio import Waveform
from arkasr.errors import UsageError
from arkasr.text import TextRules
from arkasr.train.losses import Support, TopK

QWEN = "qwen3_asr"
# Languages that Qwen3-ASR was trained to be told, as it was told them (its technical report, arXiv 2601.21337).
LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "mk": "Macedonian", "ms": "Malay",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "th": "Thai",
    "tr": "Turkish", "vi": "Vietnamese", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a teacher is asked; N counts the tokens of all rollouts, clip by clip, rollout by rollout, token by token.

    Attributes:
        waveforms: [samples] at 16 kHz, one a clip.
        languages: ISO code of each clip's record, or None.
        rollouts: of each clip, the student's ids; the stop id last where the student stopped by itself.
        support: [N, S] student's ids, distinct in a row, that are wanted besides the teacher's own; None: no others.
        top_k: how many of its own most probable ids the teacher gives.
        temperature: by which it divides its logits.
    """

    waveforms: Sequence[Waveform]
    languages: Sequence[str | None]
    rollouts: Sequence[Sequence[tuple[int, ...]]]
    support: Tensor | None
    top_k: int
    temperature: float


@dataclass(frozen=True)
class Scores:
    """What a teacher answers.

    Attributes:
        top: [N, k + S] the teacher's own, most probable first, then the asked ones (valid where they are not among
            the first).
        num_own: k.
        aligned: [N] bool, whether the teacher's distribution follows the same text as the student's.
        drops: reason -> count, of positions that are not aligned and of ids without a counterpart.
    """

    top: TopK
    num_own: int
    aligned: Tensor
    drops: Mapping[str, int]

    @property
    def coverage(self) -> float:
        """Aligned positions as a part of all; 1 of none."""
        return float(self.aligned.float().mean()) if len(self.aligned) else 1.0


@dataclass(frozen=True)
class Capabilities:
    """What a teacher can be asked.

    Attributes:
        any_ids: arbitrary ids, not only its own most probable ones.
        any_temperature: another temperature than 1.
        max_top_k: the most of its own ids it gives.
        exact_vocabulary: its tokenizer is the student's.
    """

    any_ids: bool
    any_temperature: bool
    max_top_k: int
    exact_vocabulary: bool


class Teacher(Protocol):
    """Scores the student's transcripts."""

    capabilities: Capabilities

    def score(self, request: Request) -> Scores:
        """Log-probabilities at every position of every rollout."""
        ...


def check(capabilities: Capabilities, *, support: Support, top_k: int, temperature: float, tail: bool) -> None:
    """Refuse, before the first update, what the teacher cannot answer.

    Raises:
        UsageError: it names the remedy.
    """
    if top_k < 1 or temperature <= 0:
        raise UsageError(f"top_k is {top_k} and temperature {temperature}; give numbers above 0")
    if support != "teacher" and not capabilities.any_ids:
        raise UsageError(f"support {support}: this teacher gives its own ids only; choose support teacher")
    if support == "full" and not capabilities.exact_vocabulary:
        raise UsageError("support full: this teacher has another vocabulary than the student; choose support union")
    if temperature != 1 and not capabilities.any_temperature:
        raise UsageError(f"temperature {temperature}: this teacher answers at 1 only; choose temperature 1")
    if top_k > capabilities.max_top_k and support != "full":
        raise UsageError(f"top_k {top_k}: this teacher gives {capabilities.max_top_k} at most; choose such a top_k")
    if top_k + tail < 2 and support in ("teacher", "student"):
        raise UsageError("top_k 1: one id has nothing to be compared with; choose a larger top_k, or the tail bucket")


def language_name(code: str) -> str:
    """The English name of a language by which Qwen3-ASR is told it ("pt-BR" -> "Portuguese").

    Raises:
        UsageError: it was not trained on any of that code.
    """
    base = code.lower().replace("_", "-").split("-")[0]
    name = LANGUAGES.get("zh" if base == "cmn" else base)
    if name is None:
        raise UsageError(
            f"language {code!r}: the teacher knows {', '.join(sorted(LANGUAGES))}; leave such utterances out"
        )
    return name


def load_teacher(
    name: str,
    student: TextRules,
    *,
    device: str,
    dtype: str,
    tokenizer: Path | None = None,
) -> Teacher:
    """A checkpoint, or a chat endpoint; how much of the two vocabularies is common is told on stderr.

    Args:
        name: an arkasr checkpoint's name or folder, the folder of a Qwen3-ASR checkpoint, or `http://HOST/v1#MODEL`.
        student: whose ids are scored.
        device: where a checkpoint runs.
        dtype: of its weights, by the engine's names (float32, bfloat16).
        tokenizer: of an endpoint's model, a folder with tokenizer.json or the file itself.

    Raises:
        UsageError: an argument that does not go with such a teacher, or the endpoint does not answer as it must.
        ModelNotFoundError, CheckpointMismatchError, MissingExtraError: the teacher cannot be loaded.
    """
    if name.startswith(("http://", "https://")):
        from arkasr.train.teachers.http import HttpTeacher

        if tokenizer is None:
            raise UsageError(f"{name}: give the teacher's tokenizer.json as well, whose ids the endpoint answers in")
        remote = HttpTeacher(name, student, tokenizer)
        remote.probe()
        print(f"{name}: {remote.tokens.report}", file=sys.stderr)
        return remote
    if tokenizer is not None:
        raise UsageError(f"{name}: has its own tokenizer; give one for http://HOST/v1#MODEL only")
    config = Path(name) / files.CONFIG
    if config.is_file() and files.read_json(config).get("model_type") == QWEN:
        from arkasr.train.teachers.qwen import QwenTeacher

        qwen = QwenTeacher.load(Path(name), student, device=device, dtype=dtype)
        print(f"{name}: {qwen.tokens.report}", file=sys.stderr)
        return qwen
    from arkasr.train.teachers.ark import ArkTeacher

    return ArkTeacher.load(checkpoint.open_checkpoint(name), student, device=device, dtype=dtype)
