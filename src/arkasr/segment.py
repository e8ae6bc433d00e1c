"""Long audio to spans of speech of at most 30 s, and the words of overlapping spans joined again.

    blocks of samples -> chunks of 32 ms -> probability of speech a chunk -> Span, Span, ...

Spans are cut at pauses, else at the quietest point, else they overlap and `join` finds the words that both heard.
Unusual: Silero VAD runs here as one ONNX graph over hundreds of chunks at once, fifty times as fast as chunk by chunk.
Nothing but the speech that is not cut yet is kept, so memory does not grow with the audio.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from arkasr import pins
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.config import MAX_CLIP_S
from arkasr.results import SPACELESS

VAD = "silero-vad"
CHUNK_SAMPLES = 512
VAD_CONTEXT_SAMPLES = 64  # of the chunk before, in front of each
VAD_FFT_SAMPLES = 256
VAD_INPUT_SAMPLES = VAD_CONTEXT_SAMPLES + CHUNK_SAMPLES + VAD_CONTEXT_SAMPLES  # the last are mirrored
VAD_STATE = 128
BLOCK_CHUNKS = 256

SPEECH, NO_SPEECH = 0.5, 0.35  # speech begins at the one probability and ends below the other
PAUSE_CHUNKS = 13  # 0.42 s: a pause as long as this ends a span
MIN_SPEECH_CHUNKS = 3  # what is shorter is a click
SILENCE_CHUNKS = 16  # around a short recording, of which ...
LOUD, LEAST_PEAK = 0.5, 1e-3  # ... the peak is raised or lowered to the one, where it is above the other
FADING = 0.5 ** (CHUNK_SAMPLES / SAMPLE_RATE / 10)  # a chunk; in 10 s a peak fades to half
PAD_SAMPLES = 6_400  # 0.4 s kept on either side; neighbours may share the silence between them
MAX_SAMPLES = MAX_CLIP_S * SAMPLE_RATE
SEARCH_SAMPLES = 10 * SAMPLE_RATE  # the end of a full span, where a place to cut is looked for
QUIET = 0.1  # a window of less than this part of the span's RMS is between two words
WINDOW_SAMPLES = 800  # 50 ms, whose loudness is measured
OVERLAP_SAMPLES = 4 * SAMPLE_RATE

Probabilities = npt.NDArray[np.float32]
Hear = Callable[[Waveform], Probabilities]


@dataclass(frozen=True)
class Span:
    """A piece of audio to be recognized at once.

    Attributes:
        start: its first sample, from the start of the audio.
        waveform: at most 30 s, with what is heard before and after the speech.
        first: sample where its speech begins, from the start of the audio.
        last: sample behind its speech.
        speech: the highest mean probability of speech of a quarter of a second in it, by the VAD.
        overlap: samples that it shares with the span before, whose words `join` has to find.
    """

    start: int
    waveform: Waveform
    first: int
    last: int
    speech: float
    overlap: int = 0

    @property
    def has_speech(self) -> bool:
        """Whether the VAD found any."""
        return self.last > self.first

    @property
    def end(self) -> int:
        """The sample behind its last."""
        return self.start + len(self.waveform)


@dataclass(frozen=True)
class Ends:
    """Where spans of a stream begin and end.

    Attributes:
        speech: the probability at which one begins.
        pause_samples: without speech, that end it.
        prefix_samples: kept before its speech.
        overlap: whether a span of 30 s that has no quiet point shares its end with the next one, for `join` to find
            the words that both heard; else it is cut where it is least loud.
    """

    speech: float = SPEECH
    pause_samples: int = PAUSE_CHUNKS * CHUNK_SAMPLES
    prefix_samples: int = PAD_SAMPLES
    overlap: bool = True

    @property
    def no_speech(self) -> float:
        """The probability below which speech pauses."""
        return max(self.speech - (SPEECH - NO_SPEECH), 0.01)


@lru_cache(maxsize=1)
def _vad_session() -> Any:
    from arkasr import runtime  # takes half a second, which --help need not wait for

    return runtime.session(pins.SHIPPED / VAD / "vad.onnx", threads=1)  # its matrices are too small for more


class VoiceActivity:
    """Silero VAD over a stream: how probable speech is in each chunk of 512 samples."""

    def __init__(self, *, level: bool = False) -> None:
        """With `level`, each chunk is heard as loud as it were had the loudest of the last seconds a peak of 0.5."""
        self._level = level
        self._peak = LEAST_PEAK
        self._session = _vad_session()
        self._state = [np.zeros((1, 1, VAD_STATE), np.float32) for _ in range(2)]
        self._context = np.zeros(VAD_CONTEXT_SAMPLES, np.float32)

    def __call__(self, waveform: Waveform) -> Probabilities:
        """Probabilities [n] of samples [512 n] that follow those of the last call."""
        waveform = waveform.clip(-1, 1)  # an absurd sample would deafen it for good
        chunks = waveform.reshape(-1, CHUNK_SAMPLES)
        contexts = np.concatenate([self._context, waveform])[: len(waveform)].reshape(-1, CHUNK_SAMPLES)
        mirrored = chunks[:, -2 : -2 - VAD_CONTEXT_SAMPLES : -1]
        x = np.concatenate([contexts[:, :VAD_CONTEXT_SAMPLES], chunks, mirrored], axis=1)
        if self._level:
            x = (x * (LOUD / self._peaks(chunks))[:, None]).clip(-1, 1)
        self._context = waveform[-VAD_CONTEXT_SAMPLES:]
        hidden, cell = self._state
        feeds = {"chunks": x[:, None], "hidden": hidden, "cell": cell}
        speech, *self._state = self._session.run(["speech", "new_hidden", "new_cell"], feeds)
        return speech  # type: ignore[no-any-return]

    def _peaks(self, chunks: Waveform) -> npt.NDArray[np.float32]:
        """The peak [n] of all until each chunk, which fades."""
        peaks = np.empty(len(chunks), np.float32)
        for n, peak in enumerate(np.abs(chunks).max(axis=1).tolist()):
            self._peak = peaks[n] = max(peak, self._peak * FADING, LEAST_PEAK)
        return peaks


def split(blocks: Iterable[Waveform], *, vad: bool = True) -> Iterator[Span]:
    """Spans of speech in a stream of samples, in order; without the VAD everything is taken for speech.

    Audio of at most 30 s is one span, whatever is in it: the network can hear it at once.
    """
    hear = VoiceActivity() if vad else _always
    stream = iter(blocks)
    head: list[Waveform] = []
    while sum(map(len, head)) <= MAX_SAMPLES and (block := next(stream, None)) is not None:
        head.append(block)
    if sum(map(len, head)) <= MAX_SAMPLES:
        if head:
            yield _whole(np.concatenate(head), hear)
        return
    splitter = Splitter(hear)
    for block in chain(head, stream):
        yield from splitter.add(block)
    yield from splitter.end()


def _always(waveform: Waveform) -> Probabilities:
    """All chunks are speech."""
    return np.ones(len(waveform) // CHUNK_SAMPLES, np.float32)


def halves(span: Span) -> tuple[Span, Span]:
    """A span cut in two, at the quietest point of its middle half."""
    start, end = len(span.waveform) // 4, len(span.waveform) * 3 // 4
    cut = start + _quietest(span.waveform[start:end])[0]
    at = span.start + cut
    one = replace(span, waveform=span.waveform[:cut], first=min(span.first, at), last=min(span.last, at))
    other = replace(span, start=at, waveform=span.waveform[cut:], first=max(span.first, at), last=max(span.last, at))
    return one, replace(other, overlap=0)


def _quietest(waveform: Waveform) -> tuple[int, float]:
    """The middle of the 50 ms with the least power, and that power as a part of the mean."""
    squared = np.square(waveform.astype(np.float64))
    power = np.convolve(squared, np.full(WINDOW_SAMPLES, 1 / WINDOW_SAMPLES), "valid")
    at = int(power.argmin())
    return at + WINDOW_SAMPLES // 2, float(power[at] / max(squared.mean(), 1e-20))


def _whole(waveform: Waveform, hear: Hear) -> Span:
    """A short recording as one span; the VAD hears it in silence and loud, which it needs to tell what is speech."""
    loud = waveform * np.float32(LOUD / max(float(np.abs(waveform).max(initial=0)), LEAST_PEAK))
    silence = np.zeros(SILENCE_CHUNKS * CHUNK_SAMPLES, np.float32)
    filling = np.zeros(-len(waveform) % CHUNK_SAMPLES, np.float32)
    speech = hear(np.concatenate([silence, loud, filling, silence]))
    heard = (np.flatnonzero(speech >= SPEECH) - SILENCE_CHUNKS).clip(0) * CHUNK_SAMPLES
    first, last = (int(heard[0]), int(heard[-1]) + CHUNK_SAMPLES) if len(heard) else (0, 0)
    length = len(waveform)
    return Span(0, waveform, min(first, length), min(last, length), _loudest(speech))


def _loudest(speech: Probabilities) -> float:
    """The highest mean probability of speech of a quarter of a second."""
    width = min(8, len(speech))
    return float(np.convolve(speech, np.full(width, 1 / width), "valid").max()) if width else 0.0


class Splitter:
    """Takes samples, and gives spans as soon as their end is known."""

    def __init__(self, hear: Hear, ends: Ends = Ends()) -> None:
        """`hear` tells the probabilities of speech."""
        self._vad, self._ends = hear, ends
        self._samples = np.zeros(0, np.float32)  # from sample _base on
        self._base = 0
        self._unheard = np.zeros(0, np.float32)  # less than a chunk, which the VAD has not had
        self._speech: list[float] = []  # of the chunks from _base on
        self._begin: int | None = None  # first sample of the span in the making; None between spans
        self._first = self._last = 0  # where its speech begins, and ended last
        self._overlap = 0
        self._cut = -1  # sample to which the span before was given, when it was cut for its length

    def add(self, block: Waveform) -> Iterator[Span]:
        """Spans that are complete with these samples."""
        self._unheard = np.concatenate([self._unheard, block])
        for start in range(0, len(self._unheard), BLOCK_CHUNKS * CHUNK_SAMPLES):
            piece = self._unheard[start : start + BLOCK_CHUNKS * CHUNK_SAMPLES]
            piece = piece[: len(piece) // CHUNK_SAMPLES * CHUNK_SAMPLES]
            if len(piece):
                yield from self._hear(piece, self._vad(piece))
        self._unheard = self._unheard[len(self._unheard) // CHUNK_SAMPLES * CHUNK_SAMPLES :]

    def pending(self) -> Span | None:
        """The span in the making, as far as it was heard; None where there is none, or what may be a click."""
        if self._begin is None or not self._is_speech(self._last):
            return None
        return self._span(min(self._last + PAD_SAMPLES, self._base + len(self._samples)), self._last)

    def cut(self) -> Iterator[Span]:
        """The span in the making, which is ended here; the next one shares nothing with it."""
        if self._begin is not None:
            yield from self._spans_to(min(self._last + PAD_SAMPLES, self._base + len(self._samples)), self._last)
        self.clear()

    def clear(self) -> None:
        """Forget all samples so far, but for less than a chunk."""
        self._begin, self._overlap = None, 0
        self._forget(self._base + len(self._samples))

    def end(self) -> Iterator[Span]:
        """The span that the end of the audio ends."""
        rest = len(self._unheard)
        if rest:
            filled = np.concatenate([self._unheard, np.zeros(-rest % CHUNK_SAMPLES, np.float32)])
            yield from self._hear(filled, self._vad(filled))
        length = self._base + len(self._samples) - (-rest % CHUNK_SAMPLES)
        if self._begin is not None:
            yield from self._spans_to(min(self._last + PAD_SAMPLES, length), min(self._last, length))

    def _hear(self, samples: Waveform, speech: Probabilities) -> Iterator[Span]:
        at = self._base + len(self._samples)
        self._samples = np.concatenate([self._samples, samples])
        for probability in speech.tolist():
            self._speech.append(probability)
            following = at + CHUNK_SAMPLES
            if self._begin is None and probability >= self._ends.speech:
                self._begin, self._first = max(at - self._ends.prefix_samples, self._base), at
                self._last = following
            elif self._begin is not None and probability >= self._ends.no_speech:
                self._last = following
            elif self._begin is not None and following - self._last >= self._ends.pause_samples:
                yield from self._spans_to(min(self._last + PAD_SAMPLES, following), self._last)
            at = following
            if self._begin is not None and at - self._begin >= MAX_SAMPLES:
                yield self._full()
        self._forget(at - self._ends.prefix_samples if self._begin is None else self._begin)

    def _spans_to(self, end: int, last: int) -> Iterator[Span]:
        """Everything up to `end`, and begin anew; clicks are left out."""
        assert self._begin is not None
        if self._is_speech(last):
            yield self._span(min(end, self._begin + MAX_SAMPLES), last)
        self._begin, self._overlap = None, 0

    def _is_speech(self, last: int) -> bool:
        """Whether the span in the making, with speech up to `last`, is more than a click or what was given before."""
        assert self._begin is not None
        is_long = last - self._first >= MIN_SPEECH_CHUNKS * CHUNK_SAMPLES
        return last > self._cut and (self._cut >= self._begin or is_long)

    def _full(self) -> Span:
        """The span in the making has 30 s: cut it where that hurts least, and go on behind."""
        assert self._begin is not None
        cut, overlap = self._place_to_cut(self._begin + MAX_SAMPLES)
        span = self._span(cut, cut)
        self._begin = self._first = cut - overlap
        self._last = max(self._last, cut)
        self._overlap, self._cut = overlap, cut
        return span

    def _place_to_cut(self, end: int) -> tuple[int, int]:
        """Where to cut, and how much the next span must share: the longest pause, else a dip, else an overlap."""
        start = end - SEARCH_SAMPLES
        first_chunk = -(-(start - self._base) // CHUNK_SAMPLES)
        speech = np.array(self._speech[first_chunk : (end - self._base) // CHUNK_SAMPLES])
        longest = max(_runs(speech < self._ends.no_speech), key=lambda run: (run[1] - run[0], run[0]), default=(0, 0))
        if longest[1] - longest[0] >= 2:
            return self._base + (first_chunk * 2 + sum(longest)) * CHUNK_SAMPLES // 2, 0
        quietest, power = _quietest(self._samples[start - self._base : end - self._base])
        if power < QUIET**2 or not self._ends.overlap:
            return start + quietest, 0
        return end, OVERLAP_SAMPLES

    def _span(self, end: int, last: int) -> Span:
        assert self._begin is not None
        waveform = self._samples[self._begin - self._base : end - self._base]
        chunks = slice((self._begin - self._base) // CHUNK_SAMPLES, -(-(end - self._base) // CHUNK_SAMPLES))
        speech = _loudest(np.array(self._speech[chunks], np.float32))
        return Span(self._begin, waveform.copy(), self._first, last, speech, self._overlap)

    def _forget(self, before: int) -> None:
        """Drop whole chunks before a sample."""
        chunks = max(before - self._base, 0) // CHUNK_SAMPLES
        del self._speech[:chunks]
        self._samples = self._samples[chunks * CHUNK_SAMPLES :]
        self._base += chunks * CHUNK_SAMPLES


def _runs(marked: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


# ---- words of two spans that overlap ----

# A word, or one character of a script that writes no spaces; with the space before it.
_WORD = re.compile(rf"\s*(?:[{SPACELESS}]|[^\s{SPACELESS}]+)")
DISTANCE_COST = 0.4  # rare words that match, against one more or less in the overlap than its duration lets expect
MOST_WORDS = 4  # in an overlap, besides twice as many as expected


def join(left: str, right: str, *, overlap_of_left: float, overlap_of_right: float) -> tuple[str, str]:
    """The texts of two spans without the words that both heard, and without what the cut made of a word.

    Of all ways to lay the end of the one over the beginning of the other, that with the longest run of equal words
    counts, a frequent word for less than a rare one, and each word that the overlap would hold more or less than its
    duration lets expect at a cost. What stands behind the run on the left and before it on the right is what is left
    of words that were cut.

    Args:
        left: text of the span before.
        right: text of the span behind.
        overlap_of_left: part of the left span that they share, in (0, 1].
        overlap_of_right: part of the right one.
    """
    ours, theirs = spaced_words(left), spaced_words(right)
    ours_plain, theirs_plain = ([plain(word) for word in words] for words in (ours, theirs))
    expected = (len(ours) * overlap_of_left + len(theirs) * overlap_of_right) / 2
    counts = Counter(ours_plain + theirs_plain)
    rarities = [1 - math.log(max(counts[word] / 2, 1)) / math.log(counts.total() + 1) for word in theirs_plain]
    evidence = np.cumsum([0.0, *rarities])
    best, cut_left, cut_right = 0.0, len(ours) - round(len(ours) * overlap_of_left / 2), 0
    cut_right = round(len(theirs) * overlap_of_right / 2)
    for shift in range(max(0, len(ours) - MOST_WORDS - round(2 * expected)), len(ours)):
        shared = min(len(ours) - shift, len(theirs))
        same = np.array([ours_plain[shift + n] == theirs_plain[n] for n in range(shared)], bool)
        for start, end in _runs(same):
            score = evidence[end] - evidence[start] - DISTANCE_COST * abs(len(ours) - shift - expected)
            if score > best:
                best, cut_left, cut_right = score, shift + end, end
    return "".join(ours[:cut_left]).rstrip(), "".join(theirs[cut_right:]).lstrip()


def spaced_words(text: str) -> list[str]:
    """The words of `results.words`, each with the space before it; in a row they are the text."""
    return _WORD.findall(text)


def plain(word: str) -> str:
    """A word without case and punctuation, by which it is recognized."""
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word.strip()
