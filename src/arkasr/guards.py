"""What a recognizer must never print: loops, text faster than anybody speaks, words where nobody spoke.

The rules are here, for all engines; engines ask `is_loop` while they decode, and `transcribe` tries again.
"""

import zlib
from collections.abc import Hashable, Sequence
from typing import TypeVar

from arkasr.audio import SAMPLE_RATE
from arkasr.results import SPACELESS_CHARACTER

T = TypeVar("T", bound=Hashable)

# Flags of a segment: why its text was doubted ...
LOOP, TOO_LONG, TOO_FAST, REPETITIVE, EMPTY = "loop", "too_long", "too_fast", "repetitive", "empty"
# ... and what was done.
SPLIT, PADDED, SAMPLED, CUT = "split", "padded", "sampled", "cut"
NO_SPEECH, JOINED = "no_speech", "joined"
SHOWN = "shown"  # while it was said, and kept though the last hearing says otherwise

# More tokens a second than this, which all repeat, are a loop and not somebody who repeats himself.
FAST_TOKENS_PER_S = 6
EXTRA_TOKENS = 8
MAX_UNIT, MIN_REPEATS = 32, 4
MAX_WORDS_PER_S = 7.0
EXTRA_WORDS = 4
MAX_COMPRESSION_RATIO = 2.4  # as whisper has it
CHECK_EVERY = 4
# Chosen with `tiny` on AN4, FSDD and the noises of bench/nonspeech.py.
SURE_SPEECH, LEAST_SPEECH, CONFIDENT = 0.9, 0.5, 0.8


def is_loop(ids: Sequence[int], num_samples: int) -> bool:
    """Whether tokens so far are more than can have been said, and end in the same few over and over.

    People do say the same over and over, but not faster than they can speak.
    """
    too_many = EXTRA_TOKENS + FAST_TOKENS_PER_S * num_samples / SAMPLE_RATE
    return len(ids) > too_many and len(ids) % CHECK_EVERY == 0 and _repeated_tail(ids) is not None


def _repeated_tail(ids: Sequence[Hashable]) -> tuple[int, int] | None:
    """Where the tail that repeats one unit begins, and the unit's length; the unit counts that leaves the least."""
    tails = []
    for unit in range(1, min(MAX_UNIT, len(ids) // MIN_REPEATS) + 1):
        start = len(ids) - unit
        while start > 0 and ids[start - 1] == ids[start - 1 + unit]:
            start -= 1
        if len(ids) - start >= unit * MIN_REPEATS:
            tails.append((start, unit))
    return min(tails, key=sum, default=None)


def without_loop(ids: Sequence[T]) -> list[T]:
    """The tokens, or words, with a repeated tail said once."""
    tail = _repeated_tail(ids)
    return list(ids) if tail is None else list(ids[: sum(tail)])


def doubts(text: str, ids: Sequence[int], num_samples: int, *, stopped: bool) -> tuple[str, ...]:
    """What speaks against a text; nothing of it is a proof.

    Args:
        text: what the model said.
        ids: its tokens.
        num_samples: length of the audio at 16 kHz.
        stopped: whether the model ended by itself.
    """
    found = []
    if not stopped:
        found.append(LOOP if _repeated_tail(ids) else TOO_LONG)
    if num_words(text) > EXTRA_WORDS + MAX_WORDS_PER_S * num_samples / SAMPLE_RATE:
        found.append(TOO_FAST)
    if compression_ratio(text) > MAX_COMPRESSION_RATIO:
        found.append(REPETITIVE)
    return tuple(found)


def is_spoken(speech: float, confidence: float) -> bool:
    """Whether somebody spoke: the detector is sure, or it is not sure and the network's words are."""
    return speech >= SURE_SPEECH or (speech >= LEAST_SPEECH and confidence >= CONFIDENT)


def num_words(text: str) -> float:
    """Words; two characters of a script without spaces count as one."""
    spaceless = len(SPACELESS_CHARACTER.findall(text))
    return len(SPACELESS_CHARACTER.sub(" ", text).split()) + spaceless / 2


def compression_ratio(text: str) -> float:
    """Bytes of the text over those of its zlib stream; 0 of an empty text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
