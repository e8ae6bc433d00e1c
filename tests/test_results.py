# ruff: noqa: RUF001 - the texts are multilingual
"""The writers, whose files are read back by pysubs2, webvtt-py and FFmpeg's own demuxers (by PyAV)."""

import csv
import html
import io
import json
import math
import re
import unicodedata
from itertools import pairwise
from typing import Any, NamedTuple

import av
import pysubs2
import pytest
import regex  # type: ignore[import-untyped]
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st

from arkasr.errors import UsageError
from arkasr.results import WRITERS, Segment, SubtitleOptions, Transcript, Writer, write_json_error

DAY_MS = 24 * 3_600_000
CLOSING = "。、！？」』），：；）》】’”ーっゃょ々ๆะาำ"
OPENING = "「『（《【“‘เแโใไ"

ALPHABETS = (
    "abcdefgh XYZ", "ñéüßøåçœ", "приветмир", "αβγδεζ", "שלוםעולם", "مرحبابالعالم", "नमस्तेदुनिया", "สวัสดีชาวโลกน้ำเแโใไ",
    "你好世界今天天气很好", "こんにちは世界っゃー々か\u3099", "カタカナヴァッー",
    "안녕하세요", "\u1112\u1161\u11ab", "e\u0301a\u0308", "0123456789",
    "👍🏽❤\ufe0f🏿", ".,!?;:…—-'\"()", CLOSING, OPENING, "\u200d\u200c\u200b\ufe0f\U000e0100",
    " \t\n\r\x0b\x0c\x1c\x85\u2028\xa0\u3000",
    "\x00\x07\x1b<>&\\{}",
)  # fmt: skip
TOKENS = (
    "-->", "--->", "--", "<b>", "</i>", "&amp;", "&lt;", "<v Bob>", "NOTE", "STYLE", "WEBVTT", "42", "2024",
    "１２", "٣", "00:00:01,000 --> 00:00:02,000", "00:01.000", "👨‍👩‍👧", "🇫🇷", "1️⃣",
    "Donaudampfschifffahrtsgesellschaft", "\n\n7\n\n",
)  # fmt: skip
BITS = st.sampled_from(TOKENS) | st.sampled_from(ALPHABETS).flatmap(lambda letters: st.text(letters, max_size=30))
TEXTS = st.lists(st.tuples(BITS, st.sampled_from(["", " ", "\n"])), max_size=12).map(
    lambda bits: "".join(bit + gap for bit, gap in bits)
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
WORDS = st.lists(st.text("abcdefg", min_size=1, max_size=10), min_size=1, max_size=60).map(" ".join)
HAN = st.text("今天气很好我们去公园散步", min_size=1, max_size=150)
GRAPHEMES = (
    "天", "か\u3099", "น้ำ", "ที่", "ดี", "葛\U000e0100", "〰\ufe0f", "天\u200d", "天🏽",
    "天\u0903", "👨‍👩‍👧", "👍🏽", "🇫🇷",
)  # fmt: skip
OPTIONS = st.builds(SubtitleOptions, st.integers(1, 60), st.integers(1, 4))
TIMES = st.floats(0, 720_000) | st.integers(0, 5).map(float)


@st.composite
def transcripts(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> Transcript:
    """Up to six segments that touch, overlap, last no time, or lie one inside the other, up to 200 hours."""
    starts = sorted(draw(st.lists(TIMES, max_size=6)))
    lengths = st.sampled_from([0.0, 0.0004, 0.5, 30.0, 1e5])
    ends = [
        draw(st.just(following) | lengths.map(start.__add__)) for start, following in pairwise([*starts, 720_000.0])
    ]
    segments = [Segment(start, end, draw(texts)) for start, end in zip(starts, ends, strict=True)]
    return Transcript("a.wav", tuple(segments), duration_s=720_000.0)


class Cue(NamedTuple):
    start_ms: int
    end_ms: int
    text: str


def written(name: str, transcript: Transcript, options: SubtitleOptions | None = None) -> str:
    out = io.StringIO(newline="")
    WRITERS[name](transcript, out, options or SubtitleOptions())
    return out.getvalue()


def spoken(text: str) -> str:
    """What no writer may lose: all but white space and control characters."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cc")


def columns(text: str) -> int:
    shown = [c for c in text if unicodedata.category(c) not in {"Mn", "Me", "Cf"}]
    return len(shown) + sum(unicodedata.east_asian_width(c) in {"W", "F"} for c in shown)


def of_pysubs2(name: str, content: str) -> list[Cue]:
    parsed = pysubs2.SSAFile.from_string(content, format_=name, keep_html_tags=True)
    return [Cue(event.start, event.end, event.text.replace("\\N", "\n")) for event in parsed]


def of_webvtt(name: str, content: str) -> list[Cue]:
    parsed = webvtt.WebVTT.from_buffer(io.BytesIO(content.encode()), format=name, strict=name == "vtt")
    return [
        Cue(caption.start_time.in_milliseconds(), caption.end_time.in_milliseconds(), caption.raw_text)
        for caption in parsed.captions
    ]


def of_ffmpeg(name: str, content: str) -> list[Cue]:
    with av.open(io.BytesIO(content.encode()), mode="r", format={"srt": "srt", "vtt": "webvtt"}[name]) as container:
        packets = [packet for packet in container.demux() if packet.pts is not None]
    return [Cue(p.pts or 0, (p.pts or 0) + (p.duration or 0), bytes(p).decode()) for p in packets]


def cues_of(name: str, transcript: Transcript, options: SubtitleOptions | None = None) -> list[Cue]:
    """Cues as webvtt-py reads them, without escapes."""
    content = written(name, transcript, options)
    cues = of_webvtt(name, content) if content else []
    return [cue._replace(text=html.unescape(cue.text)) for cue in cues] if name == "vtt" else cues


def lines_of(text: str, options: SubtitleOptions) -> list[list[str]]:
    """Lines of each cue of a text."""
    return [cue.text.split("\n") for cue in cues_of("srt", Transcript("", (Segment(0, 30, text),), 30), options)]


@pytest.mark.parametrize("name", ["srt", "vtt"])
@settings(deadline=None)
@given(transcripts(), OPTIONS)
def test_every_reader_finds_the_same_cues_and_all_text(
    name: str, transcript: Transcript, options: SubtitleOptions
) -> None:
    content = written(name, transcript, options)
    said = spoken("".join(segment.text for segment in transcript.segments))
    if not said:
        assert content == {"srt": "", "vtt": "WEBVTT\n\n"}[name]
        return
    cues = of_webvtt(name, content)
    unescaped = [html.unescape(cue.text) if name == "vtt" else cue.text for cue in cues]
    assert spoken("".join(unescaped)) == said
    assert of_ffmpeg(name, content) == cues
    if re.search(r"\d:\d.*\d:\d", said):
        return  # pysubs2 takes any line with two clocks for one of times
    others = of_pysubs2(name, content)
    # It turns a literal \N into a line end, and knows two digits of an srt's hours.
    without = [[spoken(cue.text.replace("\\N", "")) for cue in found] for found in (others, cues)]
    assert without[0] == without[1]
    turn_ms = 100 * 3_600_000 if name == "srt" else 10_000 * 3_600_000
    assert [cue[:2] for cue in others] == [(cue.start_ms % turn_ms, cue.end_ms % turn_ms) for cue in cues]


@pytest.mark.parametrize("name", ["srt", "vtt"])
@settings(deadline=None)
@given(transcripts(), OPTIONS)
def test_files_keep_to_the_grammar(name: str, transcript: Transcript, options: SubtitleOptions) -> None:
    line = {"srt": r"(?!.*-->)[^\n]*[^\s][^\n]*\n", "vtt": r"(?!.*-->)(?:[^\n&<>]|&(?:amp|lt|gt);)+\n"}[name]
    clock = {"srt": r"\d\d+:[0-5]\d:[0-5]\d,\d\d\d", "vtt": r"\d\d+:[0-5]\d:[0-5]\d\.\d\d\d"}[name]
    number = {"srt": r"\d+\n", "vtt": ""}[name]
    header = {"srt": "", "vtt": "WEBVTT\n\n"}[name]
    cue = rf"{number}{clock} --> {clock}\n(?:{line}){{1,{options.max_line_count}}}\n"
    content = written(name, transcript, options)
    assert re.fullmatch(rf"{header}(?:{cue})*", content)
    if name == "srt":
        numbers = re.findall(rf"^(\d+)\n{clock} --> ", content, re.MULTILINE)
        assert numbers == [str(number + 1) for number in range(len(numbers))]


@pytest.mark.parametrize("name", ["srt", "vtt"])
@settings(deadline=None)
@given(transcripts(), OPTIONS)
def test_cues_last_and_never_run_backwards(name: str, transcript: Transcript, options: SubtitleOptions) -> None:
    cues = cues_of(name, transcript, options)
    assert all(cue.start_ms + 1 <= cue.end_ms for cue in cues)
    assert all(cue.end_ms <= following.start_ms for cue, following in pairwise(cues))


@settings(deadline=None)
@given(st.lists(WORDS | HAN, min_size=1, max_size=4), st.lists(st.floats(2, 90_000), min_size=8, max_size=8), OPTIONS)
def test_time_is_shared_by_the_width_of_the_text(texts: list[str], gaps: list[float], options: SubtitleOptions) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    segments = [Segment(times[2 * i], times[2 * i + 1], text) for i, text in enumerate(texts)]
    cues = cues_of("vtt", Transcript("", tuple(segments), times[-1]), options)
    for segment in segments:
        own, said = [cues.pop(0)], spoken(segment.text)
        while len(said) > sum(len(spoken(cue.text)) for cue in own):
            own.append(cues.pop(0))
        first_ms, last_ms = round(segment.start_s * 1000), round(segment.end_s * 1000)
        assert (own[0].start_ms, own[-1].end_ms) == (first_ms, last_ms)
        assert all(cue.end_ms == following.start_ms for cue, following in pairwise(own))
        total = sum(columns(cue.text.replace("\n", "")) for cue in own)
        for cue in own:
            fair_ms = (last_ms - first_ms) * columns(cue.text.replace("\n", "")) / total
            # 1 ms of rounding at each end, and 1 ms that the shortest cues may take from the others.
            assert abs(cue.end_ms - cue.start_ms - fair_ms) <= 2 + len(own)


def test_an_overlapped_segment_ends_where_the_next_begins() -> None:
    segments = (Segment(0, 100, "outer"), Segment(50, 60, "inner"), Segment(60, 60, "none"), Segment(60, 61, "after"))
    for name in ("srt", "vtt"):
        spans = [cue[:2] for cue in cues_of(name, Transcript("", segments, 100))]
        assert spans == [(0, 50_000), (50_000, 60_000), (60_000, 60_001), (60_001, 61_000)]


@pytest.mark.parametrize(("start_s", "hours"), [(0.0, "00"), (359_999.0, "99"), (360_000.0, "100"), (3.6e7, "10000")])
def test_long_recordings_get_more_digits(start_s: float, hours: str) -> None:
    transcript = Transcript("", (Segment(start_s, start_s + 0.25, "late"),), start_s)
    start_ms = round(start_s * 1000)
    for name, separator in (("srt", ","), ("vtt", ".")):
        content = written(name, transcript)
        assert re.search(rf"^{hours}:\d\d:\d\d\{separator}000 --> {hours}:", content, re.MULTILINE)
        for reader in (of_webvtt, of_ffmpeg):
            assert reader(name, content) == [Cue(start_ms, start_ms + 250, "late")]


@settings(deadline=None)
@given(WORDS, st.integers(10, 60), st.integers(1, 4))
def test_lines_of_words_are_never_too_wide(text: str, width: int, count: int) -> None:
    cues = lines_of(text, SubtitleOptions(width, count))
    assert all(len(line) <= width for cue in cues for line in cue)
    assert all(len(cue) <= count for cue in cues)
    assert " ".join(line for cue in cues for line in cue) == text


@settings(deadline=None)
@given(HAN, st.integers(2, 60), st.integers(1, 4))
def test_lines_of_han_are_never_too_wide(text: str, width: int, count: int) -> None:
    cues = lines_of(text, SubtitleOptions(width, count))
    assert all(columns(line) <= width for cue in cues for line in cue)
    assert all(len(cue) <= count for cue in cues)
    assert "".join(line for cue in cues for line in cue) == text


@settings(deadline=None)
@given(TEXTS, OPTIONS)
def test_a_line_that_is_too_wide_could_not_be_cut(text: str, options: SubtitleOptions) -> None:
    letters = "[\u3042-\u3062\u4e00-\u9fff]"  # without small ones
    for line in (line for cue in lines_of(text, options) for line in cue):
        if columns(line) > options.max_line_width:
            assert " " not in line
            assert not re.search(rf"{letters}{letters}", re.sub("[ぁぃぅぇぉっ]", "", line)), line


@settings(deadline=None)
@given(TEXTS | st.lists(st.sampled_from(GRAPHEMES), max_size=60).map("".join), OPTIONS)
def test_graphemes_stay_whole(text: str, options: SubtitleOptions) -> None:
    """Against the \\X of `regex`, which knows Unicode's tables."""
    words = "".join(c if unicodedata.category(c) != "Cc" else " " for c in text).replace("-->", "-- >").split()
    lines = [line for cue in lines_of(text, options) for line in cue]
    found = [grapheme for line in lines for word in line.split() for grapheme in regex.findall(r"\X", word)]
    assert found == [grapheme for word in words for grapheme in regex.findall(r"\X", word)]


@settings(deadline=None)
@given(st.lists(HAN.map(lambda t: t[:7]) | st.sampled_from(CLOSING + OPENING), max_size=40).map("".join), OPTIONS)
def test_no_line_begins_with_closing_or_ends_with_opening_punctuation(text: str, options: SubtitleOptions) -> None:
    lines = [line for cue in lines_of(text, options) for line in cue]
    assert not any(line[0] in CLOSING for line in lines[1:])
    assert not any(line[-1] in OPENING for line in lines[:-1])


def test_no_line_ends_beside_a_joiner() -> None:
    for joiner in "\u200d\u2060":
        assert lines_of(f"天{joiner}天", SubtitleOptions(2, 1)) == [[f"天{joiner}天"]]


def test_latin_words_inside_han_stay_whole() -> None:
    text = "我喜欢Python编程也喜欢JavaScript和TypeScript的朋友们"
    for width in range(10, 40):
        lines = [line for cue in lines_of(text, SubtitleOptions(width)) for line in cue]
        assert {"Python", "JavaScript", "TypeScript"} <= set(re.findall("[A-Za-z]+", "\n".join(lines)))
        assert all(columns(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Hello there.", ["Hello there."]),
        ("one two three four five six seven eight nine", ["one two three four five", "six seven eight nine"]),
        ("I think we should go, because it is late and dark", ["I think we should go,", "because it is late and dark"]),
        ("We really have to go. It is late and dark now.", ["We really have to go.", "It is late and dark now."]),
        ("今天天气很好，我们一起去公园散步，好吗？大家", ["今天天气很好，", "我们一起去公园散步，好吗？大家"]),
    ],
)  # fmt: skip
def test_lines_are_even_and_end_after_punctuation(text: str, lines: list[str]) -> None:
    assert lines_of(text, SubtitleOptions()) == [lines]


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 9), st.integers(12, 60))
def test_lines_of_equal_words_are_even(words: int, letters: int, width: int) -> None:
    """No line differs from another by more than a word, and there are no more of them than must be."""
    lines = [line for cue in lines_of(" ".join(["x" * letters] * words), SubtitleOptions(width, 1)) for line in cue]
    counts = [len(line.split()) for line in lines]
    assert max(counts) - min(counts) <= 1
    assert len(lines) == math.ceil(words / ((width + 1) // (letters + 1)))


def test_cues_end_after_sentences() -> None:
    sentences = ["This sentence is just as long as one line.", "The other ones are shorter.", "So they share a cue."]
    assert lines_of(" ".join(sentences), SubtitleOptions()) in (
        [sentences[:1], sentences[1:]],
        [sentences[:2], sentences[2:]],
    )


@pytest.mark.parametrize(
    "text", ["42", "hello 42", "100000 200000 300000", "in 2024 2025", "２０２４ 2025", "42 hello", "٣ ٣ ٣"]
)
@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_a_line_of_digits_is_text(name: str, text: str) -> None:
    """pysubs2 takes a last line that is a number for the number of the next cue."""
    transcript = Transcript("", (Segment(0, 1, text), Segment(1, 2, text)), 2)
    content = written(name, transcript, SubtitleOptions(6, 3))
    for reader in (of_pysubs2, of_webvtt, of_ffmpeg):
        assert " ".join(" ".join(cue.text.split("\n")) for cue in reader(name, content)) == f"{text} {text}"


def test_an_arrow_is_no_line_of_times() -> None:
    for name in ("srt", "vtt"):
        for reader in (of_webvtt, of_ffmpeg, of_pysubs2):
            # pysubs2 takes any line with two clocks for one of times.
            clocks = "00:00:01,000 --> 00:00:02,000 " if reader is not of_pysubs2 else ""
            text = f"-->{clocks}--> a-->b ----> <--> -->"
            cues = reader(name, written(name, Transcript("", (Segment(0, 1, text),), 1)))
            assert [spoken(html.unescape(cue.text)) for cue in cues] == [spoken(text)]


@settings(deadline=None)
@given(transcripts())
def test_tsv_is_whispers_table(transcript: Transcript) -> None:
    rows = list(csv.reader(io.StringIO(written("tsv", transcript), newline=""), "excel-tab", quoting=csv.QUOTE_NONE))
    assert rows[0] == ["start", "end", "text"]
    said = [segment.text for segment in transcript.segments if spoken(segment.text)]
    assert [spoken(text) for _, _, text in rows[1:]] == [spoken(text) for text in said]
    times = [int(time) for start, end, _ in rows[1:] for time in (start, end)]
    assert times == sorted(times)
    assert len(written("tsv", transcript).splitlines()) == len(rows)


def test_tsv_keeps_times_that_do_not_overlap() -> None:
    segments = (Segment(0.1, 1.2345, "a\tb\nc"), Segment(1.2345, 2.0, ""), Segment(2.5, 3.0, "d"))
    assert written("tsv", Transcript("", segments, 3)) == "start\tend\ttext\n100\t1234\ta b c\n2500\t3000\td\n"


SEGMENTS = st.builds(
    Segment,
    start_s=TIMES, end_s=TIMES, text=TEXTS, tokens=st.lists(st.integers(0, 151_935), max_size=5).map(tuple),
    confidence=st.floats(0, 1), no_speech_probability=st.floats(0, 1), compression_ratio=st.floats(0, 30),
    temperature=st.sampled_from([0.0, 0.2, 1.0]), flags=st.lists(st.sampled_from(["loop", "silence"])).map(tuple),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(SEGMENTS, max_size=4).map(tuple), st.dictionaries(st.text("abc"), st.floats(0, 1e4), max_size=3))
def test_json_says_everything(segments: tuple[Segment, ...], timings: dict[str, float]) -> None:
    transcript = Transcript("dir/é.wav", segments, duration_s=720_000.5, timings_s=timings)
    content = written("json", transcript)
    assert content.endswith("}\n")
    assert content.count("\n") == 1
    record: dict[str, Any] = json.loads(content)
    fields = "file task language duration text segments confidence timings"
    assert list(record) == fields.split()
    assert (record["file"], record["task"], record["language"]) == ("dir/é.wav", "transcribe", None)
    assert (record["text"], record["duration"]) == (transcript.text, 720_000.5)
    assert record["confidence"] == pytest.approx(transcript.confidence, abs=1e-4)
    assert record["timings"] == pytest.approx(timings, abs=1e-4)
    assert len(record["segments"]) == len(segments)
    for number, (found, segment) in enumerate(zip(record["segments"], segments, strict=True)):
        fields = "id seek start end text tokens temperature avg_logprob compression_ratio no_speech_prob"
        assert list(found) == [*fields.split(), "confidence", "flags"]
        assert (found["id"], found["text"], found["temperature"]) == (number, segment.text, segment.temperature)
        assert (found["tokens"], found["flags"]) == (list(segment.tokens), list(segment.flags))
        for name, value in {
            "start": segment.start_s, "end": segment.end_s, "confidence": segment.confidence,
            "compression_ratio": segment.compression_ratio, "no_speech_prob": segment.no_speech_probability,
        }.items():  # fmt: skip
            assert found[name] == pytest.approx(value, abs=1e-4)
        assert isinstance(found["seek"], int)
        assert 0 <= segment.start_s * 100 - found["seek"] < 1
        if segment.confidence == 0:
            assert found["avg_logprob"] is None
        else:
            assert found["avg_logprob"] == pytest.approx(math.log(segment.confidence), abs=1e-4)


def test_a_segment_without_text_is_in_json_alone() -> None:
    silent = Segment(1, 2, "", confidence=0.3, flags=("silence",))
    transcript = Transcript("", (Segment(0, 1, "a"), silent, Segment(2, 3, " \n"), Segment(3, 4, "b")), 4)
    segments = json.loads(written("json", transcript))["segments"]
    assert [segment["text"] for segment in segments] == ["a", "", " \n", "b"]
    assert segments[1]["flags"] == ["silence"]
    for name in ("srt", "vtt"):
        assert cues_of(name, transcript) == [Cue(0, 1000, "a"), Cue(3000, 4000, "b")]
    assert written("tsv", transcript).splitlines()[1:] == ["0\t1000\ta", "3000\t4000\tb"]
    assert written("txt", transcript) == "a b\n"


def test_json_holds_no_number_that_json_lacks() -> None:
    with pytest.raises(ValueError, match="JSON"):
        written("json", Transcript("", (Segment(0, 1, "a", compression_ratio=math.nan),), 1))


def test_nothing_said() -> None:
    transcript = Transcript("", (), 0)
    found = {name: written(name, transcript) for name in ("txt", "srt", "vtt", "tsv")}
    assert found == {"txt": "\n", "srt": "", "vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n"}
    assert json.loads(written("json", transcript))["segments"] == []
    assert webvtt.WebVTT.from_string(found["vtt"], strict=True).captions == []
    assert [of_ffmpeg(name, found[name]) for name in ("srt", "vtt")] == [[], []]


@settings(deadline=None)
@given(transcripts())
def test_txt_is_the_text(transcript: Transcript) -> None:
    assert written("txt", transcript) == transcript.text + "\n"


def test_options_have_defaults_and_limits() -> None:
    transcript = Transcript("", (Segment(0, 9, "word " * 60),), 9)
    for name, writer in WRITERS.items():
        out = io.StringIO()
        writer(transcript, out, SubtitleOptions(42, 2))
        assert out.getvalue() == written(name, transcript)
    for options in ({"max_line_width": 0}, {"max_line_count": 0}, {"max_line_width": -3}):
        with pytest.raises(
            UsageError, match=f"{next(iter(options))} is {next(iter(options.values()))}; give at least 1"
        ):
            SubtitleOptions(**options)  # type: ignore[arg-type]


def test_a_writer_is_one_function_a_format() -> None:
    writers: dict[str, Writer] = WRITERS
    assert list(writers) == ["txt", "srt", "vtt", "tsv", "json"]


def test_the_line_of_a_file_that_failed() -> None:
    out = io.StringIO()
    write_json_error("a\n.wav", "no such é", out)
    assert json.loads(out.getvalue()) == {"file": "a\n.wav", "error": "no such é"}
    assert out.getvalue().count("\n") == 1
