"""Spans to segments: what the engine says of each, heard again where a guard doubts it, and joined where spans overlap.

Unusual: a doubt proves nothing, for people do repeat themselves. So what a guard doubts is heard again, in pieces or
with temperature, and only what nothing confirms is cut. Nothing disappears without a flag.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from arkasr import align, audio, guards, results, segment
from arkasr.engines import MAX_NEW_TOKENS, DecodeOptions, Engine, Generation
from arkasr.errors import NoAnswerError
from arkasr.results import Segment, Word
from arkasr.segment import Span
from arkasr.text import TextRules

RETRY_TEMPERATURE, WARMEST = 0.4, 1.0  # OpenAI's API takes no more than 1
PADDING_SAMPLES = 4_800  # of silence, around a span of which nothing was heard
CONFIRMING = 0.7  # part of the words that two hearings must share for one to confirm the other
_log = logging.getLogger(__name__)


class Recognizer:
    """An engine with the rules by which its words are believed."""

    def __init__(self, engine: Engine, rules: TextRules | None, options: DecodeOptions, *, vad: bool) -> None:
        """Rules are for engines that give ids; without `vad`, spans are recognized whatever speech is in them."""
        self._engine, self._rules, self._options, self._vad = engine, rules, options, vad

    def segments(self, spans: Sequence[Span]) -> Iterator[tuple[list[Segment], dict[str, float]] | NoAnswerError]:
        """The segments of each span, one but for those heard again in pieces, and its part of the network's time.

        Of a span that got no answer, why.
        """
        spoken = [span for span in spans if not self._vad or span.has_speech]
        said = iter(self._engine.generate([span.waveform for span in spoken], self._options) if spoken else [])
        for span in spans:
            if self._vad and not span.has_speech:
                times_s = span.start / audio.SAMPLE_RATE, span.end / audio.SAMPLE_RATE
                nothing = Segment(*times_s, "", no_speech_probability=1 - span.speech, flags=(guards.NO_SPEECH,))
                yield [nothing], {}
                continue
            generation = next(said)
            heard: tuple[list[Segment], dict[str, float]] | NoAnswerError
            try:
                once = self._segment(span, _answered(generation), self._options)
                said_here = self._believed(span, once, generation) if self._options.guard else [once]
                heard = [self._spoken(segment) for segment in said_here], generation.timings_s
            except NoAnswerError as error:
                heard = error
            yield heard

    def glance(self, span: Span) -> Segment | None:
        """What a span seems to say, heard once; None where that is in doubt, or got no answer."""
        (generation,) = self._engine.generate([span.waveform], self._options)
        if generation.failure is not None:
            return None
        said = self._segment(span, generation, self._options)
        if self._options.guard and self._doubts(said, generation, len(span.waveform)):
            return None
        return self._spoken(said)

    def _spoken(self, said: Segment) -> Segment:
        """The segment, without its text where nobody spoke."""
        speech = 1 - said.no_speech_probability
        confidence = said.confidence or guards.CONFIDENT  # where the engine tells none, the detector decides
        if not self._vad or not said.text or guards.is_spoken(speech, confidence):
            return said
        return replace(_worded(said, ()), text="", flags=(*said.flags, guards.NO_SPEECH))

    def _segment(self, span: Span, generation: Generation, options: DecodeOptions, *flags: str) -> Segment:
        text = self._text(generation.ids) if generation.text is None else generation.text
        said = Segment(
            start_s=span.first / audio.SAMPLE_RATE,
            end_s=span.last / audio.SAMPLE_RATE,
            text=text,
            tokens=generation.ids,
            logprobs=generation.logprobs if generation.text is None else (),
            confidence=generation.confidence,
            no_speech_probability=1 - span.speech,
            compression_ratio=guards.compression_ratio(text),
            temperature=options.temperature,
            flags=flags,
        )
        return _worded(said, self._words(span, generation, generation.ids, text))

    def _words(self, span: Span, generation: Generation, ids: Sequence[int], text: str) -> tuple[Word, ...]:
        """The words of a text of the first of the ids; none where the engine tells nothing of when they were said."""
        if generation.attention is None:
            return ()
        assert self._rules is not None
        said = align.words(text, ids, self._rules.token_bytes)
        first, last = (min(max(edge - span.start, 0), len(span.waveform)) for edge in (span.first, span.last))
        tokens = [places for _, places in said]
        times_s = align.times(generation.attention, tokens, span.waveform, first=first, last=last)
        before_s = span.start / audio.SAMPLE_RATE
        words = tuple(
            Word(before_s + start_s, before_s + end_s, word, _probability([generation.logprobs[n] for n in places]))
            for (word, places), (start_s, end_s) in zip(said, times_s, strict=True)
        )
        return _within(words, span.first / audio.SAMPLE_RATE, span.last / audio.SAMPLE_RATE)

    def _text(self, ids: Sequence[int]) -> str:
        assert self._rules is not None
        return self._rules.to_text(list(ids))

    def _doubts(self, said: Segment, generation: Generation, num_samples: int) -> tuple[str, ...]:
        if not said.text:
            return (guards.EMPTY,)
        asked = self._options.max_new_tokens
        stopped = (
            generation.text is not None
            or generation.stop_logprob is not None
            or (asked < MAX_NEW_TOKENS and len(generation.ids) >= asked)
        )
        return guards.doubts(said.text, generation.ids, num_samples, stopped=stopped)

    def _believed(self, span: Span, said: Segment, generation: Generation) -> list[Segment]:
        """What a span says, heard again where a guard doubts it: in another window, then with temperature."""
        doubts = self._doubts(said, generation, len(span.waveform))
        if not doubts:
            return [said]
        _log.info("%.2f s: %s; trying again", said.start_s, ", ".join(doubts))
        for windows, how in self._other_windows(span, doubts):
            heard = [*map(_answered, self._engine.generate([window.waveform for window in windows], self._options))]
            again = [self._segment(w, g, self._options, *doubts, how) for w, g in zip(windows, heard, strict=True)]
            if doubts == (guards.REPETITIVE,) and _confirms(said.text, results.join_texts(s.text for s in again)):
                return [replace(said, flags=doubts)]
            checked = zip(windows, again, heard, strict=True)
            if not any(self._doubts(s, g, len(window.waveform)) for window, s, g in checked):
                return again
        if doubts == (guards.EMPTY,):
            return [replace(said, flags=doubts)]
        once = self._options.temperature
        warmer = replace(self._options, temperature=max(RETRY_TEMPERATURE, once, min(2 * once, WARMEST)))
        (drawn,) = self._engine.generate([span.waveform], warmer)
        sampled = self._segment(span, _answered(drawn), warmer, *doubts, guards.SAMPLED)
        if not self._doubts(sampled, drawn, len(span.waveform)):
            return [sampled]
        confirmed = doubts == (guards.REPETITIVE,) and _confirms(said.text, sampled.text)
        ids, text = (generation.ids, said.text) if confirmed else self._without_loop(generation)
        cut = (guards.CUT,) if text != said.text else ()
        left = replace(said, text=text, compression_ratio=guards.compression_ratio(text), flags=(*doubts, *cut))
        return [_worded(left, self._words(span, generation, ids, text))]

    def _without_loop(self, generation: Generation) -> tuple[Sequence[int], str]:
        """What is left of the ids, and of the text."""
        if generation.text is None:
            ids = guards.without_loop(generation.ids)
            return ids, self._text(ids)
        words = results.words(generation.text)
        kept = guards.without_loop(words)
        return (), generation.text if len(kept) == len(words) else results.join_texts(kept)

    def _other_windows(self, span: Span, doubts: tuple[str, ...]) -> Iterator[tuple[list[Span], str]]:
        """The span in silence, where nothing was heard in it; else its halves."""
        if doubts == (guards.EMPTY,):
            waveform = np.pad(span.waveform, PADDING_SAMPLES)[: segment.MAX_SAMPLES]
            # It begins in the silence, perhaps before the recording; where the speech is stays as it was.
            yield [replace(span, start=span.start - PADDING_SAMPLES, waveform=waveform)], guards.PADDED
        elif len(span.waveform) >= 2 * audio.SAMPLE_RATE:
            yield list(segment.halves(span)), guards.SPLIT


def _answered(generation: Generation) -> Generation:
    """What an engine said, if it did."""
    if generation.failure is not None:
        raise generation.failure
    return generation


def _worded(said: Segment, words: tuple[Word, ...]) -> Segment:
    """A segment with these words."""
    return replace(said, words=words, timestamp_source="attention" if words else "vad")


def _within(words: Sequence[Word], start_s: float, end_s: float) -> tuple[Word, ...]:
    """Words without what is outside of a segment."""
    return tuple(
        replace(word, start_s=min(max(word.start_s, start_s), end_s), end_s=min(max(word.end_s, start_s), end_s))
        for word in words
    )


def _probability(logprobs: Sequence[float]) -> float:
    """Geometric mean of probabilities; 0 of none."""
    return math.exp(min(0.0, sum(logprobs) / len(logprobs))) if logprobs else 0.0


def _confirms(text: str, other: str) -> bool:
    """Whether two hearings have about as many words."""
    counts = sorted((guards.num_words(text), guards.num_words(other)))
    return counts[0] >= CONFIRMING * counts[1]


def joined(
    held: list[Segment], segments: list[Segment], before: Span, span: Span
) -> tuple[list[Segment], list[Segment]]:
    """Segments of two spans that overlap, without the words that both heard; they meet in the middle of the overlap."""
    left, right = results.join_texts(s.text for s in held), results.join_texts(s.text for s in segments)
    texts = segment.join(
        left,
        right,
        overlap_of_left=span.overlap / len(before.waveform),
        overlap_of_right=span.overlap / len(span.waveform),
    )
    ours, theirs = ([word for one in these for word in one.words] for these in (held, segments))
    dropped = max(0, len(theirs) - len(results.words(texts[1])))
    kept = _ended(ours[: len(results.words(texts[0]))], theirs[:dropped]), theirs[dropped:]
    border_s = _border_s((span.start + span.overlap / 2) / audio.SAMPLE_RATE, *kept)
    merged = [
        replace(
            _worded(together(these), _within(words, *times_s)),
            start_s=times_s[0],
            end_s=times_s[1],
            text=text,
            flags=tuple(dict.fromkeys((*(flag for one in these for flag in one.flags), guards.JOINED))),
        )
        for these, text, words, times_s in zip(
            (held, segments), texts, kept, ((held[0].start_s, border_s), (border_s, segments[-1].end_s)), strict=True
        )
    ]
    return merged[:1], merged[1:]


def together(segments: Sequence[Segment]) -> Segment:
    """Segments in a row as one; what tells of all of them is the first one's."""
    return replace(
        segments[0],
        end_s=segments[-1].end_s,
        text=results.join_texts(one.text for one in segments),
        tokens=tuple(token for one in segments for token in one.tokens),
        logprobs=tuple(logprob for one in segments for logprob in one.logprobs),
        flags=tuple(dict.fromkeys(flag for one in segments for flag in one.flags)),
        words=tuple(word for one in segments for word in one.words),
    )


def _ended(words: list[Word], again: Sequence[Word]) -> list[Word]:
    """Words of a span with the end of the last from the next span, if that heard it again as the last of these.

    Behind it comes the end of its own span, which may have cut it, or left it what was heard of the next word.
    """
    if not words or not again or segment.plain(words[-1].text) != segment.plain(again[-1].text):
        return words
    return [*words[:-1], replace(words[-1], end_s=max(words[-1].start_s, again[-1].end_s))]


def _border_s(middle_s: float, left: Sequence[Word], right: Sequence[Word]) -> float:
    """Where two spans meet: in the middle of their overlap, or as near to it as the words leave room."""
    last_s = left[-1].end_s if left else -math.inf
    first_s = right[0].start_s if right else math.inf
    return min(max(middle_s, last_s), first_s) if last_s <= first_s else (last_s + first_s) / 2
