"""What a recognition says, and how it is written: txt, srt, vtt, tsv and json, one function each, in one dict."""

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import Any, Literal, TextIO

from arkasr import layout
from arkasr.errors import UsageError


@dataclass(frozen=True)
class Word:
    """A word, or a character of a script that writes no spaces, and when it was said.

    Attributes:
        start_s: where it begins, in seconds from the start of the audio; words are in order and inside their segment.
        end_s: where it ends.
        text: with its punctuation, without spaces.
        probability: geometric mean of its tokens' probabilities, in [0, 1].
    """

    start_s: float
    end_s: float
    text: str
    probability: float


TimestampSource = Literal["attention", "vad", "none"]


@dataclass(frozen=True)
class Segment:
    """What was said in one span of the audio.

    Attributes:
        start_s: where its speech begins, in seconds from the start of the audio.
        end_s: where its speech ends.
        text: what was said; "" where nothing was, or nothing that could be believed.
        tokens: generated token ids without the stop id, before anything was cut off the text.
        logprobs: natural logarithm of each token's probability among the allowed ones, at temperature 1.
        confidence: geometric mean probability of the tokens and the stop, in [0, 1]; 0 where the engine tells none.
        no_speech_probability: 1 less the probability of speech by the voice activity detector.
        compression_ratio: bytes of the text over those of its zlib stream; repetitive text has much above 2.
        temperature: that it was decoded with.
        flags: what happened, in words of `guards`; empty where all went well.
        words: of the text, with their times; none where none were asked for, or the engine cannot tell.
        timestamp_source: what the best times here are from: "attention" of the decoder where words have some, "vad"
            where only the segment has, by the detector, "none" where not even that is known.
    """

    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    confidence: float = 0.0
    no_speech_probability: float = 0.0
    compression_ratio: float = 0.0
    temperature: float = 0.0
    flags: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    timestamp_source: TimestampSource = "vad"


@dataclass(frozen=True)
class Transcript:
    """The recognition of one recording.

    Attributes:
        source: path or description of the audio.
        segments: in the order of time; they do not overlap.
        duration_s: length of the audio.
        timings_s: wall seconds by stage; the network's stages are shared by the spans of a batch.
    """

    source: str
    segments: tuple[Segment, ...]
    duration_s: float
    timings_s: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All that was said, segments joined by spaces (by nothing between scripts that write none)."""
        return join_texts(segment.text for segment in self.segments)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of all segments."""
        return tuple(token for segment in self.segments for token in segment.tokens)

    @property
    def confidence(self) -> float:
        """Geometric mean of the segments' confidences, each by its number of tokens and the stop; 0 without any."""
        weights = [len(segment.tokens) + 1 for segment in self.segments if segment.confidence > 0]
        logs = [math.log(segment.confidence) for segment in self.segments if segment.confidence > 0]
        total = sum(weight * log for weight, log in zip(weights, logs, strict=True))
        return math.exp(total / sum(weights)) if weights else 0.0


SPACELESS, SPACELESS_CHARACTER = layout.SPACELESS, layout.SPACELESS_CHARACTER


def words(text: str) -> list[str]:
    """Words, and characters of scripts that write no spaces; `join_texts` makes about the text of them again."""
    return re.findall(rf"[{SPACELESS}]|[^{SPACELESS}\s]+", text)


def join_texts(texts: Iterable[str]) -> str:
    """Texts one after the other, with a space between two unless both sides are of a script that writes none."""
    joined = ""
    for text in texts:
        joined += added(joined, text)
    return joined


def added(before: str, text: str) -> str:
    """What `join_texts` puts behind what it has joined before."""
    text = text.strip()
    if not text or not before:
        return text
    spaceless = SPACELESS_CHARACTER.match(before[-1]) and SPACELESS_CHARACTER.match(text[0])
    return text if spaceless else f" {text}"


@dataclass(frozen=True)
class SubtitleOptions:
    """How srt and vtt lay out text, and whether words are written.

    Attributes:
        max_line_width: columns of a line; a wide East Asian character takes two, a combining mark none.
        max_line_count: lines of a cue.
        word_times: whether json has the words of each segment; srt and vtt go by those that there are.
        highlight_words: whether vtt underlines each word while it is said.

    Raises:
        UsageError: one is below 1.
    """

    max_line_width: int = 42
    max_line_count: int = 2
    word_times: bool = False
    highlight_words: bool = False

    def __post_init__(self) -> None:
        if self.max_line_width < 1:
            raise UsageError(f"max_line_width is {self.max_line_width}; give at least 1")
        if self.max_line_count < 1:
            raise UsageError(f"max_line_count is {self.max_line_count}; give at least 1")


DEFAULT_SUBTITLES = SubtitleOptions()

Writer = Callable[[Transcript, TextIO, SubtitleOptions], None]
"""Writes one transcript; txt and tsv leave the options alone."""


def write_txt(transcript: Transcript, out: TextIO, _options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """The text and a line end."""
    out.write(transcript.text + "\n")


def write_srt(transcript: Transcript, out: TextIO, options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """SubRip cues, nothing for an empty transcript; a text's own <i> stays, for the format cannot escape it."""
    for number, cue in enumerate(_cues(transcript, options), start=1):
        span = f"{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}"
        out.write("\n".join((str(number), span, *cue.lines)) + "\n\n")


def write_vtt(transcript: Transcript, out: TextIO, options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """WebVTT cues, the header alone for an empty transcript."""
    out.write("WEBVTT\n\n")
    for cue in _cues(transcript, options):
        for shown in _highlighted(cue) if options.highlight_words else [_escaped(cue)]:
            span = f"{_clock(shown.start_ms, '.')} --> {_clock(shown.end_ms, '.')}"
            out.write("\n".join((span, *shown.lines)) + "\n\n")


def write_tsv(transcript: Transcript, out: TextIO, _options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """Whisper's table: a row a segment with text, times in whole milliseconds; tabs and line ends become spaces."""
    spoken = _spoken(transcript)
    spans_ms = _spans_ms([(segment.start_s, segment.end_s) for segment, _ in spoken], [1] * len(spoken))
    out.write("start\tend\ttext\n")
    rows = zip(spans_ms, spoken, strict=True)
    out.writelines(f"{start_ms}\t{end_ms}\t{text}\n" for (start_ms, end_ms), (_, text) in rows)


def write_json(transcript: Transcript, out: TextIO, options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """One JSON object on one line: OpenAI's verbose_json with file, confidence, timings and flags, times in seconds."""
    record = {
        "file": transcript.source,
        "task": "transcribe",
        "language": None,  # we do not detect it
        "duration": round(transcript.duration_s, 4),
        "text": transcript.text,
        "segments": [
            segment_record(number, segment) | (word_records(segment) if options.word_times else {})
            for number, segment in enumerate(transcript.segments)
        ],
        "confidence": round(transcript.confidence, 4),
        "timings": {stage: round(seconds, 4) for stage, seconds in transcript.timings_s.items()},
    }
    out.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def segment_record(number: int, segment: Segment) -> dict[str, Any]:
    """OpenAI's segment of verbose_json, times in seconds, with confidence and flags."""
    return {
        "id": number,
        "seek": int(segment.start_s * 100),  # Whisper's frames of 10 ms up to what was decoded together
        "start": round(segment.start_s, 4),
        "end": round(segment.end_s, 4),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": round(math.log(segment.confidence), 4) if segment.confidence > 0 else None,
        "compression_ratio": round(segment.compression_ratio, 4),
        "no_speech_prob": round(segment.no_speech_probability, 4),
        "confidence": round(segment.confidence, 4),
        "flags": list(segment.flags),
    }


def word_records(segment: Segment) -> dict[str, Any]:
    """What a segment has besides when words are asked for: its words as Whisper has them, and where times are from."""
    words = [
        {
            "word": word.text,
            "start": round(word.start_s, 4),
            "end": round(word.end_s, 4),
            "probability": round(word.probability, 4),
        }
        for word in segment.words
    ]
    return {"words": words, "timestamp_source": segment.timestamp_source}


def write_json_error(source: str, message: str, out: TextIO) -> None:
    """The line of a file that failed."""
    out.write(json.dumps({"file": source, "error": message}, ensure_ascii=False) + "\n")


WRITERS: dict[str, Writer] = {
    "txt": write_txt,
    "srt": write_srt,
    "vtt": write_vtt,
    "tsv": write_tsv,
    "json": write_json,
}


@dataclass(frozen=True)
class _Cue:
    """Lines, and of each of their characters but spaces its word, where words have times."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    owners: Sequence[Word] = ()


@dataclass(frozen=True)
class _Piece:
    """Cues that share a time."""

    start_s: float
    end_s: float
    cues: list[tuple[str, ...]]
    owners: Sequence[Word] = ()


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _shown(text: str) -> list[str]:
    """The pieces of a text between its white space and control characters."""
    return _CONTROLS.sub(" ", text).split()


def on_one_line(text: str) -> str:
    """A text without line ends and control characters, of which a terminal would do what they say."""
    return " ".join(_shown(text))


def _spoken(transcript: Transcript) -> list[tuple[Segment, str]]:
    """Segments with text, and their texts on one line each."""
    texts = [on_one_line(segment.text) for segment in transcript.segments]
    return [(segment, text) for segment, text in zip(transcript.segments, texts, strict=True) if text]


def _cues(transcript: Transcript, options: SubtitleOptions) -> Iterator[_Cue]:
    """Cues in the order of time; where words have none, a segment's is shared out by the width of the text."""
    pieces = [piece for segment, text in _spoken(transcript) for piece in _pieces(segment, text, options)]
    spans_ms = _spans_ms([(piece.start_s, piece.end_s) for piece in pieces], [len(piece.cues) for piece in pieces])
    for (start_ms, end_ms), piece in zip(spans_ms, pieces, strict=True):
        widths = [sum(map(layout.columns, "".join(lines))) for lines in piece.cues]
        ends_ms = [start_ms]
        for number, width in enumerate(accumulate(widths), start=1):
            fair = start_ms + round((end_ms - start_ms) * width / max(1, sum(widths)))
            ends_ms.append(max(ends_ms[-1] + 1, min(fair, end_ms - len(piece.cues) + number)))
        for span_ms, lines in zip(pairwise(ends_ms), piece.cues, strict=True):
            yield _Cue(*span_ms, lines, piece.owners)


def _pieces(segment: Segment, text: str, options: SubtitleOptions) -> Iterator[_Piece]:
    """A segment's cues: each from its first word to its last, or all together where words have no times."""
    text = text.replace("-->", "-- >")  # would be read as a line of times, and srt has no escape for it
    owners = [word for word in segment.words for _ in "".join(_shown(word.text))]
    if "".join(text.split()) != "".join(bit for word in segment.words for bit in _shown(word.text)):
        owners = []
    cues = layout.lay_out(text, options.max_line_width, options.max_line_count, _pauses_s(text, owners))
    if not owners:
        yield _Piece(segment.start_s, segment.end_s, cues)
        return
    for lines in cues:
        own = owners[: len("".join("".join(lines).split()))]
        owners = owners[len(own) :]
        yield _Piece(own[0].start_s, own[-1].end_s, [lines], own)


def _pauses_s(text: str, owners: Sequence[Word]) -> dict[int, float]:
    """Seconds between two words, by the place in the text where the later one begins; nothing without owners."""
    places = [place for place, character in enumerate(text) if not character.isspace()][: len(owners)]
    words = zip(owners, owners[1:], places[1:], strict=False)
    return {place: after.start_s - before.end_s for before, after, place in words if before is not after}


def _escaped(cue: _Cue) -> _Cue:
    return replace(cue, lines=tuple(html.escape(line, quote=False) for line in cue.lines))


def _highlighted(cue: _Cue) -> Iterator[_Cue]:
    """A cue as several in a row, escaped, in which each word is underlined while it is said."""
    at_ms, first = cue.start_ms, 0
    for _, group in groupby(cue.owners, key=id):
        own = list(group)
        places = range(first, first + len(own))
        first += len(own)
        begin_ms, end_ms = (min(max(at_ms, round(s * 1000)), cue.end_ms) for s in (own[0].start_s, own[0].end_s))
        if begin_ms > at_ms:
            yield _escaped(replace(cue, start_ms=at_ms, end_ms=begin_ms))
        if end_ms > begin_ms:
            yield replace(cue, start_ms=begin_ms, end_ms=end_ms, lines=_underlined(cue.lines, places))
        at_ms = end_ms
    if at_ms < cue.end_ms:
        yield _escaped(replace(cue, start_ms=at_ms))


def _underlined(lines: Sequence[str], places: range) -> tuple[str, ...]:
    """Lines, escaped, with the characters underlined that have these places among all but spaces."""
    place = -1
    marked_lines = []
    for line in lines:
        marks = []
        for character in line:
            place += not character.isspace()
            marks.append((not character.isspace() and place in places, html.escape(character, quote=False)))
        runs = ((marked, "".join(one for _, one in run)) for marked, run in groupby(marks, key=itemgetter(0)))
        marked_lines.append("".join(f"<u>{run}</u>" if marked else run for marked, run in runs))
    return tuple(marked_lines)


def _spans_ms(spans_s: Sequence[tuple[float, float]], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each span in ms: at least 1 ms for each of its cues, never into the next one."""
    starts_ms: list[int] = []
    free_ms = 0
    for (start_s, _), count in zip(spans_s, counts, strict=True):
        starts_ms.append(max(free_ms, round(start_s * 1000)))
        free_ms = starts_ms[-1] + count
    limits_ms = [*starts_ms, math.inf][1:]
    return [
        (start_ms, int(min(max(start_ms + count, round(end_s * 1000)), limit_ms)))
        for (_, end_s), count, start_ms, limit_ms in zip(spans_s, counts, starts_ms, limits_ms, strict=True)
    ]


def _clock(time_ms: int, separator: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{separator}{milliseconds:03}"
