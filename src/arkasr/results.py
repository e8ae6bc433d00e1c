"""What a recognition says, and how it is written: txt, srt, vtt, tsv and json, one function each, in one dict."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, TextIO

from arkasr.errors import UsageError


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


# Scripts that write no spaces between words: Thai, kana, Han.
SPACELESS = r"\u0e00-\u0e7f\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff65"
SPACELESS_CHARACTER = re.compile(rf"[{SPACELESS}]")


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
    """How srt and vtt lay out text.

    Attributes:
        max_line_width: columns of a line; a wide East Asian character takes two, a combining mark none.
        max_line_count: lines of a cue.

    Raises:
        UsageError: one is below 1.
    """

    max_line_width: int = 42
    max_line_count: int = 2

    def __post_init__(self) -> None:
        if self.max_line_width < 1:
            raise UsageError(f"max_line_width is {self.max_line_width}; give at least 1")
        if self.max_line_count < 1:
            raise UsageError(f"max_line_count is {self.max_line_count}; give at least 1")


DEFAULT_SUBTITLES = SubtitleOptions()

Writer = Callable[[Transcript, TextIO, SubtitleOptions], None]
"""Writes one transcript; only srt and vtt have lines to lay out, the others leave the options alone."""


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
        span = f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}"
        out.write("\n".join((span, *(html.escape(line, quote=False) for line in cue.lines))) + "\n\n")


def write_tsv(transcript: Transcript, out: TextIO, _options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """Whisper's table: a row a segment with text, times in whole milliseconds; tabs and line ends become spaces."""
    segments, texts = _spoken(transcript)
    out.write("start\tend\ttext\n")
    rows = zip(_spans_ms(segments, [1] * len(segments)), texts, strict=True)
    out.writelines(f"{start_ms}\t{end_ms}\t{text}\n" for (start_ms, end_ms), text in rows)


def write_json(transcript: Transcript, out: TextIO, _options: SubtitleOptions = DEFAULT_SUBTITLES) -> None:
    """One JSON object on one line: OpenAI's verbose_json with file, confidence, timings and flags, times in seconds."""
    record = {
        "file": transcript.source,
        "task": "transcribe",
        "language": None,  # we do not detect it
        "duration": round(transcript.duration_s, 4),
        "text": transcript.text,
        "segments": [segment_record(number, segment) for number, segment in enumerate(transcript.segments)],
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
    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _spoken(transcript: Transcript) -> tuple[list[Segment], list[str]]:
    """Segments with text, and their texts on one line each."""
    texts = [" ".join(_CONTROLS.sub(" ", segment.text).split()) for segment in transcript.segments]
    spoken = [segment for segment, text in zip(transcript.segments, texts, strict=True) if text]
    return spoken, [text for text in texts if text]


def _cues(transcript: Transcript, options: SubtitleOptions) -> Iterator[_Cue]:
    """Cues in the order of time; a segment's time is shared out among its cues by the width of their text."""
    segments, texts = _spoken(transcript)
    # An arrow in the text would be read as a line of times, and srt has no escape for it.
    layouts = [_lay_out(text.replace("-->", "-- >"), options) for text in texts]
    spans_ms = _spans_ms(segments, [len(layout) for layout in layouts])
    for (start_ms, end_ms), layout in zip(spans_ms, layouts, strict=True):
        widths = [sum(map(_columns, "".join(lines))) for lines in layout]
        ends_ms = [start_ms]
        for number, width in enumerate(accumulate(widths), start=1):
            fair = start_ms + round((end_ms - start_ms) * width / max(1, sum(widths)))
            ends_ms.append(max(ends_ms[-1] + 1, min(fair, end_ms - len(layout) + number)))
        for span_ms, lines in zip(pairwise(ends_ms), layout, strict=True):
            yield _Cue(*span_ms, lines)


def _spans_ms(segments: Sequence[Segment], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each segment in ms: at least 1 ms for each of its cues, never into the next one."""
    starts_ms: list[int] = []
    free_ms = 0
    for segment, count in zip(segments, counts, strict=True):
        starts_ms.append(max(free_ms, round(segment.start_s * 1000)))
        free_ms = starts_ms[-1] + count
    limits_ms = [*starts_ms, math.inf][1:]
    return [
        (start_ms, int(min(max(start_ms + count, round(segment.end_s * 1000)), limit_ms)))
        for segment, count, start_ms, limit_ms in zip(segments, counts, starts_ms, limits_ms, strict=True)
    ]


def _clock(time_ms: int, separator: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{separator}{milliseconds:03}"


def _columns(character: str) -> int:
    """Columns that a character takes on a screen."""
    if unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# Besides what categories tell: small kana, Thai vowels behind their consonant, skin tones; Thai vowels before theirs.
_NEVER_FIRST = frozenset("ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶ～ฯะาำๅ🏻🏼🏽🏾🏿")  # noqa: RUF001
_NEVER_LAST = frozenset("เแโใไ\"'")
_WORD_KINDS = frozenset(("Lu", "Ll", "Nd"))  # wide digits and letters make numbers and words, too


def _may_end_line(text: str, cut: int) -> bool:
    """Whether a line may end before text[cut]: after a space, or beside a character of a script without spaces."""
    before, after = text[cut - 1], text[cut]
    if " " in {before, after}:
        return before == " "
    kinds = unicodedata.category(before), unicodedata.category(after)
    return (
        bool(SPACELESS_CHARACTER.match(before) or SPACELESS_CHARACTER.match(after))
        and not _WORD_KINDS.issuperset(kinds)
        # Marks and joiners belong to the character before them, and a joiner takes the one after it, too.
        and kinds[0] not in {"Cf", "Ps", "Pi"}
        and kinds[1] not in {"Cf", "Mn", "Mc", "Me", "Lm", "Pd", "Pe", "Pf", "Po"}
        and before not in _NEVER_LAST
        and after not in _NEVER_FIRST
    )


# What a break costs after a sentence, after other punctuation, at a space, and between two characters; the
# scale is that of an empty line, 1.
_LINE_BREAK_COSTS = (0.0, 0.05, 0.15, 0.4)
_CUE_BREAK_COSTS = (0.3, 0.4, 0.7, 1.0)
_SENTENCE_ENDS = tuple(".!?…。！？؟۔।")  # noqa: RUF001
_CLOSERS = "\"'”’」』）)]】》"  # noqa: RUF001


def _rank(text: str, cut: int) -> int:
    """Which of the break costs it is."""
    before = text[max(0, cut - 4) : cut].rstrip(" ")
    if before.rstrip(_CLOSERS).endswith(_SENTENCE_ENDS):
        return 0
    if unicodedata.category(before[-1]).startswith("P"):
        return 1
    return 2 if text[cut - 1] == " " else 3


def _lay_out(text: str, options: SubtitleOptions) -> list[tuple[str, ...]]:
    """Lines of each cue: the cheapest layout, which is even, ends lines after punctuation, and has few lines and cues.

    A line wider than allowed is one that may not be cut anywhere.
    """
    cuts = [0, *(cut for cut in range(1, len(text)) if _may_end_line(text, cut)), len(text)]
    ranks = [0, *(_rank(text, cut) for cut in cuts[1:])]
    columns = [0, *accumulate(map(_columns, text))]
    # best[cut][row]: least cost of the text up to there, its last line being number `row` of its cue; where this
    # line starts, and the row of the line above.
    best: list[dict[int, tuple[float, int, int]]] = [{-1: (0.0, 0, -1)}]
    for end in range(1, len(cuts)):
        rows: dict[int, tuple[float, int, int]] = {}
        for start in reversed(range(end)):
            line = text[cuts[start] : cuts[end]].rstrip(" ")
            width = columns[cuts[start] + len(line)] - columns[cuts[start]]
            if width > options.max_line_width and start < end - 1:
                break
            slack = max(0, 1 - width / options.max_line_width) ** 2
            for above, (cost, _, _) in best[start].items():
                new_cue = (cost + slack + _CUE_BREAK_COSTS[ranks[start]], start, above)
                rows[0] = min(rows.get(0, new_cue), new_cue)
                # A number alone below other text would be taken for the next cue's.
                if above + 1 < options.max_line_count and not line.isdigit():
                    new_line = (cost + slack + _LINE_BREAK_COSTS[ranks[start]], start, above)
                    rows[above + 1] = min(rows.get(above + 1, new_line), new_line)
        best.append(rows)
    end = len(cuts) - 1
    row = min(best[end], key=lambda row: best[end][row])
    cues: list[tuple[str, ...]] = [()]
    while end:
        _, start, above = best[end][row]
        cues[0] = (text[cuts[start] : cuts[end]].rstrip(" "), *cues[0])
        if row == 0 and start:
            cues.insert(0, ())
        end, row = start, above
    return cues
