"""Speech as it comes to text as it comes: where utterances begin and end, what is said so far, and what was said.

    blocks of samples -> SpeechStarted -> Partial, Partial, ... -> SpeechStopped -> Final

Unusual: an utterance is heard again and again while it grows, and what two hearings in a row agree on is stable: it is
shown and never changes (local agreement; Macháček, Dabre and Bojar, arXiv 2307.14743). Word times tell which words end
so near to the last sample that the next hearing may yet change them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from arkasr import guards, results, segment
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.engines import DecodeOptions
from arkasr.errors import NoAnswerError, UsageError
from arkasr.recognize import Recognizer, together
from arkasr.results import Segment, Word
from arkasr.segment import Ends, Span
from arkasr.transcribe import Transcriber

MOST_PAUSE_S = 10.0
# Chosen on AN4's training part; see docs/live.md.
FRESH_S = 0.2  # before the last sample, where words are not yet what they will be


@dataclass(frozen=True)
class LiveOptions:
    """How to listen.

    Attributes:
        decode: how to decode; word times are always asked for.
        pause_s: of silence, that end an utterance.
        threshold: the probability of speech at which an utterance begins.
        prefix_s: of audio, kept before its speech.
        step_s: of new audio between two hearings of an utterance in the making.
        partials: whether it is heard before it ends.

    Raises:
        UsageError: one is out of its range.
    """

    decode: DecodeOptions = DecodeOptions()  # noqa: RUF009 - frozen
    pause_s: float = 0.5
    threshold: float = 0.5
    prefix_s: float = 0.4
    step_s: float = 0.3
    partials: bool = True

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("pause_s", self.pause_s, 0.1, MOST_PAUSE_S),
            ("threshold", self.threshold, 0.01, 0.99),
            ("prefix_s", self.prefix_s, 0.0, MOST_PAUSE_S),
            ("step_s", self.step_s, 0.05, MOST_PAUSE_S),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} is {value}; give {least:g}..{most:g}")


@dataclass(frozen=True)
class SpeechStarted:
    """Somebody speaks, since `start_s` seconds from the first sample; utterances count from 0."""

    utterance: int
    start_s: float


@dataclass(frozen=True)
class Partial:
    """What an utterance says so far.

    Attributes:
        utterance: its number.
        stable: with what all its later texts begin.
        tentative: what was heard behind that, and may change.
    """

    utterance: int
    stable: str
    tentative: str


@dataclass(frozen=True)
class SpeechStopped:
    """Nobody speaks, since `end_s` seconds from the first sample; or the utterance has its 30 s."""

    utterance: int
    end_s: float


@dataclass(frozen=True)
class Final:
    """What an utterance says; its text is "" where that cannot be believed."""

    utterance: int
    segment: Segment


@dataclass(frozen=True)
class Failed:
    """Why there is no final text of an utterance; the stream goes on."""

    utterance: int
    error: NoAnswerError


Event = SpeechStarted | Partial | SpeechStopped | Final | Failed


class LiveTranscriber:
    """One stream of speech, for one thread at a time.

    Whoever feeds it collects what comes while it works, and gives all of that at once: it leaves out hearings rather
    than fall behind, and partial texts never take more than half of its time.
    """

    def __init__(
        self,
        transcriber: Transcriber,
        options: LiveOptions = LiveOptions(),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives seconds, by which hearings are rationed."""
        self._options, self._clock = options, clock
        self._splitter = segment.Splitter(
            segment.VoiceActivity(level=True),
            Ends(
                options.threshold, round(options.pause_s * SAMPLE_RATE), round(options.prefix_s * SAMPLE_RATE),
                overlap=False,
            ),
        )  # fmt: skip
        decode = replace(options.decode, align=True)
        self._recognizer = Recognizer(transcriber.engine, transcriber.rules, decode, vad=True)
        self._rested_at = clock()
        self._number = -1
        self._next()
        self.num_samples = 0

    def _next(self) -> None:
        """Go on to the next utterance, which has not started."""
        self._number += 1
        self._is_open = False
        self._heard_to: int | None = None  # sample to which it was heard last
        self._shown = _Shown()

    def add(self, waveform: Waveform) -> Iterator[Event]:
        """What becomes known with these samples of 16 kHz; to be consumed before anything else is asked.

        Raises:
            UsageError: the engine at an endpoint cannot be asked at all.
        """
        self.num_samples += len(waveform)
        yield from self._ended(self._splitter.add(waveform))
        span = self._splitter.pending()
        if span is not None:
            yield from self._started(span)
            if self._is_due(span):
                yield from self._hear(span)

    def commit(self) -> Iterator[Event]:
        """End the utterance in the making here, if there is one; to be consumed, and raises, as `add`."""
        yield from self._ended(self._splitter.cut())

    def clear(self) -> Iterator[Event]:
        """Forget the utterance in the making; it gets no final text."""
        span = self._splitter.pending()
        self._splitter.clear()
        if self._is_open and span is not None:
            number = self._number
            self._next()
            yield SpeechStopped(number, span.last / SAMPLE_RATE)

    def _started(self, span: Span) -> Iterator[Event]:
        if not self._is_open:
            self._is_open = True
            yield SpeechStarted(self._number, span.first / SAMPLE_RATE)

    def _ended(self, spans: Iterator[Span]) -> Iterator[Event]:
        ended = list(spans)
        heard = self._recognizer.segments(ended)  # all at once, when the first is asked for
        for span in ended:
            yield from self._started(span)
            yield SpeechStopped(self._number, span.last / SAMPLE_RATE)
            outcome = next(heard)
            number, shown = self._number, self._shown
            self._next()
            if isinstance(outcome, NoAnswerError):
                yield Failed(number, outcome)
            else:
                yield Final(number, shown.settled(together(outcome[0])))

    def _is_due(self, span: Span) -> bool:
        """Whether to hear an utterance in the making: there is more of it, and time for it."""
        if not self._options.partials or self._clock() < self._rested_at:
            return False
        heard_to = span.first if self._heard_to is None else self._heard_to
        step = round(self._options.step_s * SAMPLE_RATE)
        return span.end - heard_to >= step and heard_to < span.last + round(FRESH_S * SAMPLE_RATE)

    def _hear(self, span: Span) -> Iterator[Event]:
        begun = self._clock()
        said = self._recognizer.glance(span)
        now = self._clock()
        self._rested_at = now + (now - begun)
        self._heard_to = span.end
        if said is not None and self._shown.add(said, span.end / SAMPLE_RATE):
            yield Partial(self._number, self._shown.stable, self._shown.tentative)


class _Shown:
    """What of an utterance was shown, and what of that will not change."""

    def __init__(self) -> None:
        self._stable: list[str] = []  # words with the space before them, also below
        self._words: tuple[Word, ...] | None = ()  # of the stable ones; None where there are no times
        self._rest: list[str] = []  # what the last hearing said behind them

    @property
    def stable(self) -> str:
        return "".join(self._stable)

    @property
    def tentative(self) -> str:
        return "".join(self._rest).strip()

    def add(self, said: Segment, heard_to_s: float) -> bool:
        """Take a hearing of all up to a time; whether that changes what is shown."""
        before = self.stable, self.tentative
        known, rest = _behind(self._stable, segment.spaced_words(said.text))
        agreed = 0
        while agreed < min(len(rest), len(self._rest)) and rest[agreed] == self._rest[agreed]:
            agreed += 1
        if said.words:
            settled_s = heard_to_s - FRESH_S
            agreed = min(agreed, sum(word.end_s <= settled_s for word in said.words[known:]))
        elif said.end_s > heard_to_s - FRESH_S:
            agreed = min(agreed, max(0, len(rest) - 1))
        self._stable += rest[:agreed]
        self._rest = rest[agreed:]
        self._keep(said.words, known, known + agreed)
        return before != (self.stable, self.tentative)

    def _keep(self, words: Sequence[Word], start: int, end: int) -> None:
        """The times of words that became stable, unless an engine, or a hearing, had none."""
        if end > start and (self._words is None or not words):
            self._words = None
        elif self._words is not None:
            self._words += tuple(words[start:end])

    def settled(self, said: Segment) -> Segment:
        """What the utterance says at last: what is stable, and behind it what the last hearing says."""
        words = segment.spaced_words(said.text)
        if words[: len(self._stable)] == self._stable:
            return said
        known, rest = _behind(self._stable, words)
        text = "".join([*self._stable, *rest])
        timed = self._timed(said, known)
        return replace(
            said,
            text=text,
            words=timed,
            timestamp_source="attention" if timed else "vad",
            compression_ratio=guards.compression_ratio(text),
            flags=(*said.flags, guards.SHOWN),
        )

    def _timed(self, said: Segment, known: int) -> tuple[Word, ...]:
        """The words with their times, in order; none where some have none."""
        if self._words is None or bool(said.words) != bool(said.text):
            return ()
        end_s = self._words[-1].end_s if self._words else said.start_s
        later = (replace(w, start_s=max(w.start_s, end_s), end_s=max(w.end_s, end_s)) for w in said.words[known:])
        inside = (*self._words, *later)
        return tuple(replace(w, start_s=min(w.start_s, said.end_s), end_s=min(w.end_s, said.end_s)) for w in inside)


def _behind(stable: Sequence[str], words: Sequence[str]) -> tuple[int, list[str]]:
    """How many of the words are the stable ones, and those behind them."""
    known = _covered(stable, words)
    rest = list(words[known:])
    if rest and not known:  # the first of the text has no space before it
        rest[0] = results.added("".join(stable), rest[0])
    return known, rest


def _covered(stable: Sequence[str], words: Sequence[str]) -> int:
    """How many of the words are the stable ones: where they differ, by the least edits, then the nearest count."""
    plain, said = [segment.plain(word) for word in stable], [segment.plain(word) for word in words]
    if said[: len(plain)] == plain:
        return len(plain)
    costs = list(range(len(said) + 1))  # of all stable words so far against the first n
    for number, word in enumerate(plain, start=1):
        above, costs[0] = costs[0], number
        for n, other in enumerate(said, start=1):
            above, costs[n] = costs[n], min(above + (word != other), costs[n] + 1, costs[n - 1] + 1)
    return min(range(len(said) + 1), key=lambda n: (costs[n], abs(n - len(plain))))
