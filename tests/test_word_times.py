"""Word times from engine to file: heard again, joined, written; and on digits whose true times are known."""

import html
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st

import arkasr
from arkasr import audio, guards, recognize, results
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions, Generation
from arkasr.recognize import Recognizer
from arkasr.results import WRITERS, Segment, SubtitleOptions, Transcript, Word
from arkasr.segment import CHUNK_SAMPLES, Span
from arkasr.text import TextRules
from arkasr.transcribe import Transcriber
from conftest import Run, byte_tokenizer
from test_results import HAN, TEXTS, WORDS, columns, spoken, transcripts

ALIGNED = DecodeOptions(align=True)
WORD_SAMPLES = 6_000
LOUDNESS = 0.02  # from one letter to the next
Answer = Callable[[Waveform, DecodeOptions], str]


def said_at(letters: str, gap_samples: int, shift: int) -> tuple[Waveform, list[tuple[float, float]]]:
    """Words, each as loud as its letter says, with silence between them; and when they begin and end."""
    pieces, times_s, at = [np.zeros(shift, np.float32)], [], shift
    for letter in letters:
        level = np.float32(0.2 + LOUDNESS * (ord(letter) - ord("a")))
        pieces += [np.full(WORD_SAMPLES, level), np.zeros(gap_samples, np.float32)]
        times_s.append((at / SAMPLE_RATE, (at + WORD_SAMPLES) / SAMPLE_RATE))
        at += WORD_SAMPLES + gap_samples
    return np.concatenate(pieces), times_s


@dataclass
class Listening:
    """An engine that hears words of `said_at`, attends to them, and says "heard", "", or anything else over and over.

    Of words cut by an edge it says those of which nine tenths are there.
    """

    answer: Answer = lambda _waveform, _options: "heard"
    attends: bool = True
    logprob: float = -0.1
    clips: list[int] = field(default_factory=list)

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        self.clips += map(len, waveforms)
        return [self._one(waveform, options) for waveform in waveforms]

    def _one(self, waveform: Waveform, options: DecodeOptions) -> Generation:
        answer = self.answer(waveform, options)
        if answer not in ("heard", ""):
            return self._loop(answer, waveform, options)
        levels = np.where(waveform > 0.1, np.round((waveform - 0.2) / LOUDNESS), -1).astype(int)
        edges = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
        runs = [(levels[a], a, b) for a, b in pairwise(edges) if levels[a] >= 0 and b - a > 0.9 * WORD_SAMPLES]
        num_tokens = audio.num_audio_tokens(len(waveform))
        text = ""
        rows: list[npt.NDArray[np.float32]] = []
        for level, start, end in runs if answer else []:
            word = " " * bool(text) + 3 * chr(ord("a") + level)
            row = np.zeros(num_tokens, np.float32)
            row[start // 1_280 : -(-end // 1_280)] = 1
            text, rows = text + word, [*rows, *[row / row.sum()] * len(word)]
        rows.append(np.full(num_tokens, 1 / num_tokens, np.float32))
        return self._generation(text, np.stack(rows), options)

    def _loop(self, unit: str, waveform: Waveform, options: DecodeOptions) -> Generation:
        text = ""
        while not options.is_over(text.encode(), len(waveform)):
            text += unit[len(text) % len(unit)]
        num_tokens = audio.num_audio_tokens(len(waveform))
        rows = np.full((len(text) + 1, num_tokens), 1 / num_tokens, np.float32)
        return replace(self._generation(text, rows, options), stop_logprob=None)

    def _generation(self, text: str, rows: npt.NDArray[np.float32], options: DecodeOptions) -> Generation:
        ids = tuple(byte_tokenizer().encode(text, add_special_tokens=False).ids)
        assert len(rows) == len(ids) + 1
        logprobs = (self.logprob,) * len(ids)
        attention = rows if options.align and self.attends else None
        return Generation(ids, logprobs, self.logprob, attention=attention)


def transcribed(
    rules: TextRules, engine: Listening, waveform: Waveform, options: DecodeOptions = ALIGNED
) -> Transcript:
    return Transcriber(engine, rules).transcribe((waveform, SAMPLE_RATE), options=options, vad=False)


def words_of(transcript: Transcript) -> list[Word]:
    return [word for segment in transcript.segments for word in segment.words]


def assert_words(transcript: Transcript) -> None:
    """Of the text, in order, inside of their segment, never negative; and the source says so."""
    for segment in transcript.segments:
        assert [word.text for word in segment.words] == results.words(segment.text)
        edges_s = [edge for word in segment.words for edge in (word.start_s, word.end_s)]
        assert edges_s == sorted(edges_s)
        assert all(segment.start_s <= edge <= segment.end_s for edge in edges_s)
        assert segment.timestamp_source == ("attention" if segment.words else "vad")
        assert all(0 <= word.probability <= 1 for word in segment.words)
    for left, right in pairwise(transcript.segments):
        assert left.end_s <= right.start_s


def assert_times(transcript: Transcript, letters: str, times_s: list[tuple[float, float]], *, off_s: float) -> None:
    words = words_of(transcript)
    assert [word.text for word in words] == [3 * letter for letter in letters]
    found = np.array([(word.start_s, word.end_s) for word in words])
    assert np.abs(found - times_s).max() <= off_s


# ---- heard, and heard again ----


def test_words_where_they_are(rules: TextRules) -> None:
    waveform, times_s = said_at("abcb", 4_000, 5_000)
    transcript = transcribed(rules, Listening(), waveform)
    assert_words(transcript)
    assert_times(transcript, "abcb", times_s, off_s=0.021)
    assert [word.probability for word in words_of(transcript)] == pytest.approx([np.exp(-0.1)] * 4)


def test_the_text_is_the_same_without(rules: TextRules) -> None:
    waveform, _ = said_at("abcb", 4_000, 5_000)
    plain, aligned = (transcribed(rules, Listening(), waveform, options) for options in (DecodeOptions(), ALIGNED))
    (one,), (other,) = plain.segments, aligned.segments
    assert one == replace(other, words=(), timestamp_source="vad")


def test_an_engine_that_cannot_tell_has_the_detectors_times(rules: TextRules) -> None:
    waveform, _ = said_at("abc", 4_000, 0)
    transcript = transcribed(rules, Listening(attends=False), waveform)
    assert transcript.text == "aaa bbb ccc"
    assert [(segment.words, segment.timestamp_source) for segment in transcript.segments] == [((), "vad")]


def test_padding_moves_no_word(rules: TextRules) -> None:
    waveform, times_s = said_at("abc", 4_000, 1_000)
    engine = Listening(lambda heard, _: "heard" if len(heard) > len(waveform) else "")
    transcript = transcribed(rules, engine, waveform)
    assert transcript.segments[0].flags == (guards.EMPTY, guards.PADDED)
    assert_words(transcript)
    assert_times(transcript, "abc", times_s, off_s=0.021)


def test_halves_have_their_own_words(rules: TextRules) -> None:
    waveform, times_s = said_at("abcdef", 4_000, 1_000)
    engine = Listening(lambda heard, _: "xyz" if len(heard) == len(waveform) else "heard")
    transcript = transcribed(rules, engine, waveform)
    assert [segment.flags[-1] for segment in transcript.segments] == [guards.SPLIT] * 2
    assert_words(transcript)
    assert_times(transcript, "abcdef", times_s, off_s=0.03)  # a last step has up to 40 ms


def test_what_was_sampled_has_words(rules: TextRules) -> None:
    waveform, times_s = said_at("abc", 4_000, 1_000)
    transcript = transcribed(rules, Listening(lambda _, options: "heard" if options.temperature else "xyz"), waveform)
    assert guards.SAMPLED in transcript.segments[0].flags
    assert_words(transcript)
    assert_times(transcript, "abc", times_s, off_s=0.021)


@pytest.mark.parametrize("unit", ["ab cd ", "x", "天", "天气"])
def test_what_was_cut_has_the_words_that_stayed(rules: TextRules, unit: str) -> None:
    loop = "".join(map(chr, unit.encode())) if unit.isascii() else unit
    waveform, _ = said_at("abcdefgh", 4_000, 0)

    class Looping(Listening):
        def _loop(self, unit: str, waveform: Waveform, options: DecodeOptions) -> Generation:
            repeated = loop * 40
            rows = np.full((len(repeated.encode()) + 1, audio.num_audio_tokens(len(waveform))), 0.01, np.float32)
            return replace(self._generation(repeated, rows, options), stop_logprob=None)

    transcript = transcribed(rules, Looping(lambda *_: "loop"), waveform)
    assert guards.CUT in transcript.segments[0].flags
    assert transcript.text == unit.strip()
    assert_words(transcript)


def test_what_nobody_said_has_no_words(rules: TextRules) -> None:
    waveform, _ = said_at("abc", 4_000, 0)
    span = Span(0, waveform, 0, len(waveform), speech=0.6)
    for logprob, text in ((-0.1, "aaa bbb ccc"), (-1.0, "")):
        (heard,) = Recognizer(Listening(logprob=logprob), rules, ALIGNED, vad=True).segments([span])
        assert not isinstance(heard, Exception)
        transcript = Transcript("", tuple(heard[0]), 3.0)
        assert transcript.text == text
        assert_words(transcript)


def test_words_are_inside_of_what_the_detector_took_for_speech(rules: TextRules) -> None:
    """Even if that is too little; also to the last bit, which sums of seconds do not all keep."""
    waveform, _ = said_at("abc", 4_000, 0)
    edges = ((0, len(waveform)), (7_000, 20_000), (12_000, 12_500), (12_000, 12_001))
    for (first, last), start in product(edges, (0, 32_000, 8047, 98_765_431)):
        span = Span(start, waveform, start + first, start + last, speech=1.0)
        (heard,) = Recognizer(Listening(), rules, ALIGNED, vad=True).segments([span])
        assert not isinstance(heard, Exception)
        transcript = Transcript("", tuple(heard[0]), 9.0)
        assert transcript.text == "aaa bbb ccc"
        assert_words(transcript)
        if last - first > 3 * 320:
            assert all(word.end_s - word.start_s > 0.019 for word in words_of(transcript))


# ---- spans that overlap ----


def test_joining_moves_no_word(rules: TextRules) -> None:
    """Speech without a dip: spans overlap, words cut by an edge are left out; times are right to an audio token."""
    shuffled = np.random.default_rng(2).permutation(list("abcdefghijklmnopqrstuvwxyz" * 8)).tolist()
    letters = "".join(letter for letter, following in pairwise(shuffled) if letter != following)
    for shift in range(0, WORD_SAMPLES, 1_100):
        waveform, times_s = said_at(letters, 0, shift)
        transcript = transcribed(rules, Listening(), waveform, DecodeOptions(align=True, guard=False))
        assert sum(guards.JOINED in segment.flags for segment in transcript.segments) >= 2
        assert_words(transcript)
        assert_times(transcript, letters, times_s, off_s=0.08)


def test_joining_words_that_disagree_keeps_them_in_order() -> None:
    """One says that its last word ends late, the other that its first one began early."""
    word = np.full(30 * SAMPLE_RATE, 0.3, np.float32)
    before = Span(0, word, 0, len(word), 1.0)
    span = Span(26 * SAMPLE_RATE, word, 26 * SAMPLE_RATE, 56 * SAMPLE_RATE, 1.0, overlap=4 * SAMPLE_RATE)
    left = Segment(0, 30, "one two", words=(Word(1, 2, "one", 1), Word(28, 30, "two", 1)))
    right = Segment(26, 56, "three four", words=(Word(26, 29, "three", 1), Word(50, 51, "four", 1)))
    for held, now in (([left], [right]), ([left], [replace(right, text="", words=())])):
        merged = [*map(tuple, recognize.joined(held, now, before, span))]
        segments = tuple(replace(one, timestamp_source="attention" if one.words else "vad") for (one,) in merged)
        assert_words(Transcript("", segments, 56))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, st.integers(0, 99)), min_size=2, max_size=4), st.floats(1, 4))
def test_joining_any_words(parts: list[tuple[str, int]], overlap_s: float) -> None:
    held: list[Segment] = []
    segments: list[Segment] = []
    before: Span | None = None
    for number, (text, seed) in enumerate(parts):
        start_s = number * (30 - overlap_s)
        start = round(start_s * SAMPLE_RATE)
        span = Span(start, np.zeros(480_000, np.float32), start, start + 480_000, 1.0, round(overlap_s * SAMPLE_RATE))
        said = text.split()
        edges_s = start / SAMPLE_RATE + np.sort(np.random.default_rng(seed).random(2 * len(said))) * 30
        words = tuple(Word(float(edges_s[2 * n]), float(edges_s[2 * n + 1]), word, 0.5) for n, word in enumerate(said))
        now = [Segment(start / SAMPLE_RATE, start / SAMPLE_RATE + 30, text, words=words, timestamp_source="attention")]
        if before is not None:
            held, now = recognize.joined(held, now, before, span)
        segments += held
        held, before = now, span
    assert_words(Transcript("", (*segments, *held), 120))


# ---- written ----


def spread(segment: Segment, gaps: Sequence[float]) -> Segment:
    """The segment with words in it, and pauses between them as long as said."""
    texts = results.words(segment.text)
    steps = np.cumsum([0.0, *(step for n in range(len(texts)) for step in (1.0, gaps[n % len(gaps)]))])
    edges_s = segment.start_s + steps * ((segment.end_s - segment.start_s) / max(float(steps[-1]), 1))
    edges_s = np.minimum(edges_s, segment.end_s)
    words = tuple(Word(float(edges_s[2 * n]), float(edges_s[2 * n + 1]), text, 0.5) for n, text in enumerate(texts))
    return replace(segment, words=words, timestamp_source="attention" if words else "vad")


GAPS = st.lists(st.sampled_from([0.0, 0.1, 1.0, 9.0]), min_size=1, max_size=5)
WORDED = st.builds(
    lambda transcript, gaps: replace(transcript, segments=tuple(spread(one, gaps) for one in transcript.segments)),
    transcripts(TEXTS | WORDS | HAN),
    GAPS,
)


def written(name: str, transcript: Transcript, options: SubtitleOptions) -> str:
    out = io.StringIO(newline="")
    WRITERS[name](transcript, out, options)
    return out.getvalue()


def captions(content: str) -> list[tuple[int, int, str]]:
    read = webvtt.WebVTT.from_string(content, strict=True).captions
    return [(one.start_time.in_milliseconds(), one.end_time.in_milliseconds(), one.raw_text) for one in read]


@settings(deadline=None, max_examples=40)
@given(WORDED)
def test_json_has_words_where_they_are_asked_for(transcript: Transcript) -> None:
    plain = json.loads(written("json", transcript, SubtitleOptions()))
    record = json.loads(written("json", transcript, SubtitleOptions(word_times=True)))
    for segment, without, with_words in zip(transcript.segments, plain["segments"], record["segments"], strict=True):
        found = with_words.pop("words")
        assert with_words.pop("timestamp_source") == ("attention" if found else "vad")
        assert with_words == without
        assert [list(word) for word in found] == [["word", "start", "end", "probability"]] * len(found)
        assert [word["word"] for word in found] == results.words(segment.text)
        for word, said in zip(found, segment.words, strict=True):
            assert (word["start"], word["end"]) == pytest.approx((said.start_s, said.end_s), abs=1e-4)
            assert with_words["start"] <= word["start"] <= word["end"] <= with_words["end"]


@settings(deadline=None, max_examples=40)
@given(WORDED, st.integers(5, 60), st.integers(1, 3))
def test_highlighting_adds_nothing_but_underlines(transcript: Transcript, width: int, count: int) -> None:
    """Cues with the same text in a row are one that lasts; the words underlined are the words that were said."""
    options = SubtitleOptions(width, count)
    plain = captions(written("vtt", transcript, options))
    shown = captions(written("vtt", transcript, replace(options, highlight_words=True)))
    assert all(start_ms < end_ms for start_ms, end_ms, _ in shown)
    for start_ms, end_ms, text in plain:
        own = [cue for cue in shown if start_ms <= cue[0] < end_ms]
        assert (own[0][0], own[-1][1]) == (start_ms, end_ms)
        assert all(left[1] == right[0] for left, right in pairwise(own))
        assert {re.sub("</?u>", "", cue[2]) for cue in own} == {text}
    said = "".join(spoken(word.text) for segment in transcript.segments for word in segment.words)
    at = 0
    for _, _, text in shown:
        mark = html.unescape("".join(re.findall("<u>(.*?)</u>", text)))
        assert mark in said[at:]
        at = said.index(mark, at) + len(mark)


@settings(deadline=None, max_examples=40)
@given(WORDS | HAN, st.lists(st.floats(0.3, 2), min_size=3, max_size=9), st.integers(8, 60), st.integers(1, 3))
def test_cues_begin_and_end_with_their_words(text: str, gaps: list[float], width: int, count: int) -> None:
    segment = spread(Segment(3.0, 900.0, text), gaps)
    waiting = list(segment.words)
    for name in ("srt", "vtt"):
        content = written(name, Transcript("", (segment,), 900), SubtitleOptions(width, count))
        cues = captions(content if name == "vtt" else "WEBVTT\n\n" + content.replace(",", "."))
        waiting = list(segment.words)
        for start_ms, end_ms, lines in cues:
            own = [waiting.pop(0)]
            while len("".join(word.text for word in own)) < len("".join(lines.split())):
                own.append(waiting.pop(0))
            assert "".join(word.text for word in own) == "".join(lines.split())
            assert (start_ms, end_ms) == (round(own[0].start_s * 1000), round(own[-1].end_s * 1000))
            pauses_s = [right.start_s - left.end_s for left, right in pairwise(own)]
            assert all(pause_s < 1 + 1e-9 for pause_s in pauses_s)
            assert len(lines.split("\n")) <= count
            widest = max(columns(word.text) for word in own)
            assert all(columns(line) <= max(width, widest) for line in lines.split("\n"))
        assert not waiting


def test_a_line_ends_in_a_pause() -> None:
    """Where even lines would not end: a pause of 0.4 s is worth a sentence's end."""
    texts = ["we", "went", "home", "and", "then", "we", "slept"]
    gap_s = {3: 0.4}
    words, at_s = [], 0.0
    for number, text in enumerate(texts):
        words.append(Word(at_s, at_s + 0.2, text, 1))
        at_s += 0.2 + gap_s.get(number, 0.0)
    segment = Segment(0, at_s, " ".join(texts), words=tuple(words))
    for one, lines in ((segment, "we went home and\nthen we slept"), (replace(segment, words=()), None)):
        ((_, _, text),) = captions(written("vtt", Transcript("", (one,), 9), SubtitleOptions(24, 2)))
        assert lines in (None, text)


def test_words_that_are_not_the_texts_are_left_alone() -> None:
    segment = Segment(1, 2, "one two", words=(Word(1.2, 1.5, "three", 1),))
    content = written("vtt", Transcript("", (segment,), 2), SubtitleOptions(highlight_words=True))
    assert captions(content) == [(1000, 2000, "one two")]


def test_highlighted() -> None:
    words = (Word(0.5, 0.75, "a<b", 1), Word(0.75, 0.75, "never", 1), Word(1, 1.5, "天", 1))
    segment = Segment(0.25, 2, "a<b never天", words=words)
    content = written("vtt", Transcript("", (segment,), 2), SubtitleOptions(highlight_words=True))
    assert captions(content) == [
        (500, 750, "<u>a&lt;b</u> never天"),
        (750, 1000, "a&lt;b never天"),
        (1000, 1500, "a&lt;b never<u>天</u>"),
    ]


# ---- the command ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--highlight-words", "--format", "vtt"], "needs --word-timestamps"),
        (["--highlight-words", "--word-timestamps", "--format", "srt"], "--format vtt"),
        (["--word-timestamps"], "--format json, srt or vtt"),
        (["--word-timestamps", "--format", "json", "--engine", "openai"], "engine openai tells no times"),
        (["--word-timestamps", "--format", "json", "--engine", "vllm"], "engine vllm tells no times"),
    ],
)
def test_the_command_refuses_what_would_be_ignored(run: Run, flags: list[str], message: str) -> None:
    code, out, err = run("transcribe", "nothing.wav", *flags)
    assert (code, out) == (1, [])
    assert message in err[-1]


@dataclass(frozen=True)
class Joined:
    """Digits said in a row: their samples, and when each was said."""

    waveform: Waveform
    text: str
    times_s: list[tuple[float, float]]


@pytest.fixture(scope="module")
def digits(shared: Path) -> list[Joined]:
    """Three to six recordings of FSDD's test part each, with pauses of up to 0.25 s between them."""
    rng = np.random.default_rng(7)
    utterances = list(read_manifest(shared / "speech" / "fsdd" / "manifest.jsonl", split="test"))
    joined = []
    for _ in range(60):
        pieces, times_s, texts = [np.zeros(3_200)], [], []
        for index in rng.choice(len(utterances), int(rng.integers(3, 7))):
            waveform = utterances[index].waveform()
            at = sum(map(len, pieces))
            times_s.append((at / SAMPLE_RATE, (at + len(waveform)) / SAMPLE_RATE))
            texts.append(utterances[index].text.upper())
            pause = rng.normal(scale=3e-4, size=int(rng.uniform(0, 0.25) * SAMPLE_RATE))
            pieces += [waveform * (0.3 / np.abs(waveform).max()), pause]
        pieces.append(np.zeros(3_200))
        joined.append(Joined(np.concatenate(pieces).astype(np.float32), " ".join(texts), times_s))
    return joined


def test_digits_are_where_they_were_said(tiny: Checkpoint, digits: list[Joined]) -> None:
    """The whole way, detector included, with the shipped model: of the clips whose text is right."""
    transcriber = arkasr.load_model(tiny.folder)
    sources = [(one.waveform, SAMPLE_RATE) for one in digits]
    off_s = []
    for one, transcript in zip(digits, transcriber.transcribe(sources, options=ALIGNED), strict=True):
        assert_words(transcript)
        if transcript.text == one.text:
            found = np.array([(word.start_s, word.end_s) for word in words_of(transcript)])
            off_s += np.abs(found - one.times_s).ravel().tolist()
    assert len(off_s) > 150
    assert np.median(off_s) <= 0.04
    assert np.percentile(off_s, 95) <= 0.15
    assert max(off_s) <= 0.3


@pytest.mark.parametrize("name", ["kathleen_arctic_joined_en", "kerstin_joined_de"])
def test_words_of_long_recordings_are_inside_their_utterances(tiny: Checkpoint, shared: Path, name: str) -> None:
    """Six minutes, of which it is known when somebody spoke; `tiny` writes nonsense of them, but while they speak.

    The detector, inside of whose times all words are, tells them in chunks of 32 ms.
    """
    records = map(json.loads, (shared / "speech" / "long" / "manifest.jsonl").read_text().splitlines())
    (record,) = (one for one in records if one["audio"] == f"{name}.flac")
    transcript = arkasr.load_model(tiny.folder).transcribe(
        shared / "speech" / "long" / record["audio"], options=ALIGNED
    )
    assert_words(transcript)
    chunks_s = 2 * CHUNK_SAMPLES / SAMPLE_RATE
    spoken_s = [(one["start"] - chunks_s, one["end"] + chunks_s) for one in record["segments"]]
    owners = []
    for word in words_of(transcript):
        (owner,) = (n for n, (start, end) in enumerate(spoken_s) if start <= word.start_s <= word.end_s <= end)
        owners.append(owner)
    assert len(owners) > 600
    assert owners == sorted(owners)
    assert len(set(owners)) > 0.9 * len(spoken_s)


def test_right_words_are_inside_their_own_utterance(tiny: Checkpoint, shared: Path) -> None:
    """AN4's test clips with 0.6 s between them: of the words that come out right it is known whose they are."""
    clips = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))[:40:2]
    pieces, owners, clips_s = list[Waveform](), list[int](), list[tuple[float, float]]()
    for n, clip in enumerate(clips):
        at = sum(map(len, pieces))
        pieces += [clip.waveform(), np.zeros(9_600, np.float32)]
        clips_s.append((at / SAMPLE_RATE, (at + len(pieces[-2])) / SAMPLE_RATE))
        owners += [n] * len(results.words(clip.text))
    expected = results.words(" ".join(clip.text for clip in clips))
    source = (np.concatenate(pieces), SAMPLE_RATE)
    words = words_of(arkasr.load_model(tiny.folder).transcribe(source, options=ALIGNED))
    blocks = SequenceMatcher(None, expected, [word.text for word in words], autojunk=False).get_matching_blocks()
    right = [(owners[block.a + n], words[block.b + n]) for block in blocks for n in range(block.size)]
    assert len(right) > 0.8 * len(expected) > 40
    for owner, word in right:
        assert clips_s[owner][0] <= word.start_s <= word.end_s <= clips_s[owner][1]


def test_times_are_the_same_in_one_span_and_in_two_that_overlap(tiny: Checkpoint, digits: list[Joined]) -> None:
    """A word that the first one's end cuts ends where the second heard it end: one in 18 was too short, or too long.

    They agree within an audio token where the text does, but for the neighbours of words that one of the spans missed.
    """
    engine = arkasr.load_model(tiny.folder).engine
    recognizer = Recognizer(engine, tiny.rules, ALIGNED, vad=False)

    def words(*edges: tuple[int, int]) -> list[Word]:
        spans = [Span(a, one.waveform[a:b], a, b, 1.0) for a, b in edges]
        spans[1:] = [replace(now, overlap=before.end - now.start) for before, now in pairwise(spans)]
        said: list[Segment] = []
        held: list[Segment] = []
        for n, (span, heard) in enumerate(zip(spans, recognizer.segments(spans), strict=True)):
            assert not isinstance(heard, Exception)
            held, now = recognize.joined(held, heard[0], spans[n - 1], span) if n else ([], heard[0])
            said, held = [*said, *held], now
        transcript = Transcript("", (*said, *held), len(one.waveform) / SAMPLE_RATE)
        assert_words(transcript)
        return words_of(transcript)

    off_s: list[float] = []
    for one in digits[:30]:
        length = len(one.waveform)
        if length < 40_000:
            continue
        whole = words((0, length))
        for cut in np.linspace(0.5, 0.8, 4) * length:
            parts = words((0, int(cut)), (int(cut) - 20_000, length))
            if [word.text for word in parts] == [word.text for word in whole]:
                pairs = zip(parts, whole, strict=True)
                off_s += [max(abs(a.start_s - b.start_s), abs(a.end_s - b.end_s)) for a, b in pairs]
    assert len(off_s) > 150
    assert np.mean(np.array(off_s) <= 0.0801) > 0.98


def test_the_command_writes_words(run: Run, tmp_path: Path, digits: list[Joined]) -> None:
    import soundfile

    recording = tmp_path / "digits.wav"
    soundfile.write(recording, digits[0].waveform, SAMPLE_RATE)
    common = ["transcribe", recording, "--model", "tiny", "--output-dir", tmp_path / "out", "--format", "json"]
    code, _, _ = run(*common, "--format", "vtt", "--word-timestamps", "--highlight-words")
    assert code == 0
    record = json.loads((tmp_path / "out" / "digits.json").read_text())
    said = [word["word"] for segment in record["segments"] for word in segment["words"]]
    assert " ".join(said) == record["text"] != ""
    shown = re.findall("<u>(.*?)</u>", (tmp_path / "out" / "digits.vtt").read_text())
    assert shown == said
    code, _, _ = run(*common)
    assert code == 0
    assert "words" not in json.loads((tmp_path / "out" / "digits.json").read_text())["segments"][0]
