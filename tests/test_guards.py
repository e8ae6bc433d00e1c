"""Engines that loop, stop at once or never stop: what comes out is bounded, flagged, and nothing is missing.

And people who repeat themselves keep their words.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arkasr
from arkasr import audio, guards, model, segment
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.config import ModelConfig
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions, Engine, Generation
from arkasr.results import Segment
from arkasr.text import TextRules
from arkasr.transcribe import Transcriber
from conftest import byte_tokenizer
from test_engine import ENGINES, noise, rigged

UNGUARDED = DecodeOptions(guard=False)
DURATIONS_S = (0.3, 1.0, 3.0, 12.0, 30.0, 100.0)
CAUSES = {guards.LOOP, guards.TOO_LONG, guards.TOO_FAST, guards.REPETITIVE, guards.EMPTY}
REMEDIES = {guards.SPLIT, guards.PADDED, guards.SAMPLED, guards.CUT}


# ---- rigged engines ----

Says = Callable[[Waveform, DecodeOptions], tuple[Sequence[int], bool]]
"""Of a clip: tokens, as many as it would ever say, and whether it stops behind them."""


@dataclass
class Rigged:
    """An engine that says what it is told, until `is_over`; remembers the clips it was given, and counts tokens."""

    says: Says
    calls: list[list[int]] = field(default_factory=list)
    num_tokens: int = 0

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        self.calls.append([len(waveform) for waveform in waveforms])
        assert all(audio.HOP_SAMPLES <= n <= segment.MAX_SAMPLES for n in self.calls[-1])
        return [self._one(waveform, options) for waveform in waveforms]

    def _one(self, waveform: Waveform, options: DecodeOptions) -> Generation:
        words, stops = self.says(waveform, options)
        ids: list[int] = []
        for token in words:
            ids.append(token)
            if options.is_over(ids, len(waveform)):
                stops = False
                break
        else:
            assert stops, "an engine that does not stop has too few tokens"
        self.num_tokens += len(ids)
        return Generation(tuple(ids), (-0.1,) * len(ids), -0.1 if stops else None)


Ids = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def ids_of() -> Ids:
    tokenizer = byte_tokenizer()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def heard(
    rules: TextRules, says: Says, duration_s: float, options: DecodeOptions | None = None
) -> tuple[Rigged, tuple[Segment, ...]]:
    """What the Transcriber makes of noise, all of which is taken for speech."""
    engine = Rigged(says)
    waveform = noise(round(duration_s * SAMPLE_RATE))
    transcript = Transcriber(engine, rules).transcribe(
        (waveform, SAMPLE_RATE), options=options or DecodeOptions(), vad=False
    )
    return engine, transcript.segments


def spans_of(duration_s: float) -> list[segment.Span]:
    return list(segment.split([noise(round(duration_s * SAMPLE_RATE))], vad=False))


def assert_whole(segments: Sequence[Segment], duration_s: float) -> None:
    """Nothing is missing: segments cover the audio from its start to its end, without a gap."""
    assert segments[0].start_s == 0
    assert segments[-1].end_s == pytest.approx(duration_s, abs=0.05)
    assert all(left.end_s == pytest.approx(right.start_s, abs=1e-6) for left, right in pairwise(segments))


def assert_bounded(engine: Rigged, duration_s: float) -> None:
    """A span is heard at most once, in two halves, and once with temperature; no clip says more than its cap."""
    spans = spans_of(duration_s)
    audio_samples = sum(len(span.waveform) for span in spans)
    clips = [n for call in engine.calls for n in call]
    assert sum(clips) <= 3 * (audio_samples + 4_800 * len(spans))
    assert len(clips) <= 4 * len(spans)
    assert len(engine.calls) <= 3 * len(spans)
    assert engine.num_tokens <= sum(DecodeOptions().token_cap(n) for n in clips)


# ---- loops ----


@pytest.mark.parametrize("unit", range(1, 9))
@pytest.mark.parametrize("words", ["", "these were said "])
def test_a_loop_is_said_once_and_flagged(rules: TextRules, ids_of: Ids, unit: int, words: str) -> None:
    said, looped = ids_of(words), ids_of(string.ascii_letters[:unit])
    for duration_s in DURATIONS_S:
        engine, segments = heard(rules, lambda *_: ([*said, *islice(cycle(looped), 999)], False), duration_s)
        assert_whole(segments, duration_s)
        assert_bounded(engine, duration_s)
        cap = DecodeOptions().token_cap(round(min(duration_s, 30) * SAMPLE_RATE))
        for one in segments:
            assert len(one.tokens) <= cap
            assert not CAUSES.isdisjoint(one.flags)
            assert set(one.flags) <= CAUSES | REMEDIES | {guards.JOINED}
        if duration_s == 12.0:
            (one,) = segments
            assert {guards.LOOP, guards.CUT} <= set(one.flags)
            assert len(one.tokens) == 8 + 6 * 12 + 4  # ended long before the cap, 128
            assert one.text == rules.to_text([*said, *looped])


def test_what_is_heard_well_in_halves_is_taken(rules: TextRules, ids_of: Ids) -> None:
    def says(waveform: Waveform, _: DecodeOptions) -> tuple[Sequence[int], bool]:
        return (ids_of("ab" * 200), False) if len(waveform) > 8 * SAMPLE_RATE else (ids_of("all is well"), True)

    engine, segments = heard(rules, says, 10.0)
    assert [one.text for one in segments] == ["all is well"] * 2
    assert [one.flags for one in segments] == [(guards.LOOP, guards.REPETITIVE, guards.SPLIT)] * 2
    assert [len(call) for call in engine.calls] == [1, 2]
    assert sum(engine.calls[1]) == engine.calls[0][0]
    assert_whole(segments, 10.0)


def test_what_is_heard_well_with_temperature_is_taken(rules: TextRules, ids_of: Ids) -> None:
    def says(_: Waveform, options: DecodeOptions) -> tuple[Sequence[int], bool]:
        return (ids_of("ab" * 200), False) if options.temperature == 0 else (ids_of("all is well"), True)

    for duration_s in (1.0, 10.0):
        engine, (one,) = heard(rules, says, duration_s)
        assert (one.text, one.temperature) == ("all is well", 0.4)
        assert (one.flags[0], one.flags[-1]) == (guards.LOOP, guards.SAMPLED)
        assert [len(call) for call in engine.calls] == ([1, 1] if duration_s < 2 else [1, 2, 1])
        assert_whole([one], duration_s)


def test_a_doubt_costs_others_nothing(rules: TextRules, ids_of: Ids) -> None:
    """Of three recordings the one that loops is heard again, alone, and the others' text and flags are their own."""

    def says(waveform: Waveform, _: DecodeOptions) -> tuple[Sequence[int], bool]:
        return (ids_of("xy" * 200), False) if len(waveform) < 40_000 else (ids_of("all is well"), True)

    engine = Rigged(says)
    clips = [(noise(n), SAMPLE_RATE) for n in (50_000, 20_000, 60_000)]
    first, second, third = Transcriber(engine, rules).transcribe(clips, vad=False)
    assert first.text == third.text == "all is well"
    assert first.segments[0].flags == third.segments[0].flags == ()
    assert guards.LOOP in second.segments[0].flags
    assert sorted(n for call in engine.calls for n in call if n >= 40_000) == [50_000, 60_000]


# ---- nothing, and no end ----


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_silence_of_the_model_is_flagged(rules: TextRules, duration_s: float) -> None:
    engine, segments = heard(rules, lambda *_: ((), True), duration_s)
    assert_whole(segments, duration_s)
    assert_bounded(engine, duration_s)
    assert all(one.text == "" and set(one.flags) - {guards.JOINED} == {guards.EMPTY} for one in segments)
    assert len([n for call in engine.calls for n in call]) == 2 * len(spans_of(duration_s))


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_who_is_silent_once_is_heard_in_silence(rules: TextRules, ids_of: Ids, duration_s: float) -> None:
    def says(waveform: Waveform, _: DecodeOptions) -> tuple[Sequence[int], bool]:
        return ids_of("a b") if not waveform[:1_600].any() else [], True

    engine, segments = heard(rules, says, duration_s)
    assert_whole(segments, duration_s)
    assert_bounded(engine, duration_s)
    assert all(one.flags[:2] == (guards.EMPTY, guards.PADDED) for one in segments)
    assert segments[0].text == "a b"
    assert len(segments) == len(spans_of(duration_s))


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_who_never_stops_is_stopped(rules: TextRules, ids_of: Ids, duration_s: float, spaces: bool) -> None:
    letters = np.random.default_rng(0).choice(list(string.ascii_letters), 999)
    babble = ids_of((" " if spaces else "").join(letters))
    engine, segments = heard(rules, lambda *_: (babble, False), duration_s)
    assert_whole(segments, duration_s)
    assert_bounded(engine, duration_s)
    for one in segments:
        assert guards.TOO_LONG in one.flags
        assert guards.CUT not in one.flags
        assert len(one.tokens) == DecodeOptions().token_cap(round(min(duration_s, 30) * SAMPLE_RATE)) or duration_s > 30


class Words:
    """Rules by which every token is a word."""

    def to_text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_more_words_than_anybody_says() -> None:
    engine, (one,) = heard(Words(), lambda *_: (range(20), True), 1.5)  # type: ignore[arg-type]
    assert (one.flags, one.text) == ((guards.TOO_FAST,), " ".join(map(str, range(20))))
    assert [len(call) for call in engine.calls] == [1, 1]
    engine, (one,) = heard(Words(), lambda *_: (range(14), True), 1.5)  # type: ignore[arg-type]
    assert (one.flags, len(engine.calls)) == ((), 1)


def test_repetition_that_halves_confirm_is_kept(rules: TextRules, ids_of: Ids) -> None:
    """Twice as many words in the whole as in each half: somebody repeats himself."""

    def says(waveform: Waveform, _: DecodeOptions) -> tuple[Sequence[int], bool]:
        return ids_of(" ".join(["no"] * round(len(waveform) / 8_000))), True

    engine, (one,) = heard(rules, says, 20.0)
    assert one.text == " ".join(["no"] * 40)
    assert one.flags == (guards.REPETITIVE,)
    assert [len(call) for call in engine.calls] == [1, 2]


def test_repetition_that_temperature_confirms_is_kept(rules: TextRules, ids_of: Ids) -> None:
    """Halves may tear a word that is said over and over, and so make a loop of it."""

    def says(waveform: Waveform, options: DecodeOptions) -> tuple[Sequence[int], bool]:
        half = len(waveform) < 12 * SAMPLE_RATE
        return ids_of("no " * (99 if half else 30 if options.temperature == 0 else 28)), not half

    engine, (one,) = heard(rules, says, 20.0)
    assert one.text == "no " * 29 + "no"
    assert one.flags == (guards.REPETITIVE,)
    assert [len(call) for call in engine.calls] == [1, 2, 1]


def test_without_guard_nothing_is_changed(rules: TextRules, ids_of: Ids) -> None:
    rigs: dict[str, Says] = {
        "loop": lambda *_: (ids_of("ab" * 200), False),
        "empty": lambda *_: ((), True),
        "endless": lambda *_: (ids_of(string.printable * 4), False),
        "fast": lambda *_: (ids_of("a b c d " * 3), True),
    }
    for says in rigs.values():
        for duration_s in (1.0, 10.0, 30.0):
            engine, (one,) = heard(rules, says, duration_s, UNGUARDED)
            (raw,) = Rigged(says).generate([noise(round(duration_s * SAMPLE_RATE))], UNGUARDED)
            assert engine.calls == [[round(duration_s * SAMPLE_RATE)]]
            assert (one.tokens, one.text, one.flags) == (raw.ids, rules.to_text(list(raw.ids)), ())
            assert one.confidence == raw.confidence
        engine, segments = heard(rules, says, 100.0, UNGUARDED)
        assert [n for call in engine.calls for n in call] == [len(span.waveform) for span in spans_of(100.0)]
        assert all(set(one.flags) <= {guards.JOINED} for one in segments)


# ---- real engines ----


@pytest.fixture(params=list(ENGINES))
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "cache"))

    def load(network: model.ArkASR) -> Engine:
        model.save(network, tmp_path / "model", dtype=torch.float32)
        byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
        return ENGINES[request.param](tmp_path / "model")

    return load


@pytest.mark.parametrize(("words", "unit"), [(0, 1), (0, 3), (5, 2), (3, 8)])
def test_engines_end_loops(load: Callable[..., Engine], small: ModelConfig, words: int, unit: int) -> None:
    chain = list(range(65, 65 + words + unit))
    follow: dict[int | None, dict[int, float]] = {None: {chain[0]: 30.0}}
    follow |= {one: {next_: 30.0} for one, next_ in pairwise([*chain, chain[words]])}
    engine = load(rigged(small, follow))
    lengths = (160_000, 16_000, 480_000, 1_600)
    waveforms = [noise(n, seed=n) for n in lengths]
    together = engine.generate(waveforms, DecodeOptions())
    endless = engine.generate(waveforms, UNGUARDED)
    for num_samples, one, other in zip(lengths, together, endless, strict=True):
        expected = [*chain[:words], *islice(cycle(chain[words:]), 999)]
        cap = DecodeOptions().token_cap(num_samples)
        assert (list(other.ids), other.stop_logprob) == (expected[:cap], None)
        assert (list(one.ids), one.stop_logprob) == (expected[: len(one.ids)], None)
        assert len(one.logprobs) == len(one.ids)
        ended = next((n for n in range(cap) if guards.is_loop(expected[:n], num_samples)), cap)
        assert len(one.ids) == ended
    assert (len(together[0].ids), len(endless[0].ids)) == (72, 108)
    assert [engine.generate([waveform], DecodeOptions())[0].ids for waveform in waveforms] == [g.ids for g in together]


# ---- people who repeat themselves ----


@pytest.fixture(scope="module")
def tiny() -> Transcriber:
    return arkasr.load_model("tiny", dtype="int8")


def joined_clips(paths: Sequence[Path], *, pause_s: float) -> Waveform:
    pause = np.zeros(round(pause_s * SAMPLE_RATE), np.float32)
    return np.concatenate([piece for path in paths for piece in (audio.load(path), pause)])


def assert_guards_change_nothing(tiny: Transcriber, waveform: Waveform) -> str:
    guarded, plain = (
        tiny.transcribe((waveform, SAMPLE_RATE), options=DecodeOptions(guard=guard), vad=False)
        for guard in (True, False)
    )
    assert guarded.text == plain.text
    assert guarded.text
    assert guarded.tokens == plain.tokens
    return guarded.text


@pytest.mark.parametrize("digit", ["zero", "two", "five", "nine"])
@pytest.mark.parametrize("pause_s", [0.1, 0.3])
def test_digits_said_four_times(tiny: Transcriber, shared: Path, digit: str, pause_s: float) -> None:
    """By four takes of one speaker, by one take four times, and by several speakers."""
    utterances = [
        u for u in read_manifest(shared / "speech" / "fsdd" / "manifest.jsonl", split="test") if u.text == digit
    ]
    speakers: dict[str, list[Path]] = {}
    for utterance in utterances:
        speakers.setdefault(utterance.audio.parent.name, []).append(utterance.audio)
    everyone = [takes[0] for takes in speakers.values()]
    for takes in speakers.values():
        for chosen in (takes[:4], takes[:1] * 4):
            assert_guards_change_nothing(tiny, joined_clips(chosen, pause_s=pause_s))
    assert_guards_change_nothing(tiny, joined_clips([*islice(cycle(everyone), 4)], pause_s=pause_s))


@pytest.mark.parametrize("times", [2, 4])
def test_sentences_said_again(tiny: Transcriber, shared: Path, times: int) -> None:
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))
    sentences = [u for u in utterances if len(u.text.split()) >= 4 and u.duration_s * times < 28][::12]
    assert len(sentences) >= 5
    for utterance in sentences:
        assert_guards_change_nothing(tiny, joined_clips([utterance.audio] * times, pause_s=0.2))


def test_words_said_eight_times(tiny: Transcriber, shared: Path) -> None:
    """Regression: REPEAT, eight times said and eight times heard, was cut to two."""
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl"))
    words = {u.text: u for u in utterances if len(u.text.split()) == 1}
    assert {"GO", "NO", "REPEAT", "YES"} <= words.keys()
    said = {
        text: assert_guards_change_nothing(tiny, joined_clips([words[text].audio] * 8, pause_s=0.05)) for text in words
    }
    assert said["REPEAT"] == " ".join(["REPEAT"] * 8)


# ---- the rules themselves ----

tokens = st.lists(st.integers(0, 5), max_size=80)
units = st.lists(st.integers(0, 300), min_size=1, max_size=guards.MAX_UNIT)
lengths = st.integers(160, 480_000)


@given(tokens, units, lengths)
def test_every_loop_is_found_soon(before: list[int], unit: list[int], num_samples: int) -> None:
    allowed = guards.EXTRA_TOKENS + guards.FAST_TOKENS_PER_S * num_samples / SAMPLE_RATE
    soon = max(int(allowed) + 1, len(before) + guards.MIN_REPEATS * len(unit)) + guards.CHECK_EVERY
    ids = [*before, *islice(cycle(unit), soon)][:soon]
    ended = next(n for n in range(1, soon + 1) if guards.is_loop(ids[:n], num_samples))
    assert ended > allowed
    assert ended % guards.CHECK_EVERY == 0


@given(lengths, st.integers(0, 600), st.randoms())
def test_different_tokens_are_no_loop(num_samples: int, count: int, random: "np.random.Generator") -> None:
    ids = list(range(count))
    random.shuffle(ids)
    assert not any(guards.is_loop(ids[:n], num_samples) for n in range(count))
    assert guards.without_loop(ids) == ids


@given(tokens, units, st.integers(0, 6))
def test_only_what_is_said_already_is_cut(before: list[int], unit: list[int], times: int) -> None:
    ids = before + unit * times
    kept = guards.without_loop(ids)
    assert kept == ids[: len(kept)]
    assert bool(kept) == bool(ids)
    periods = range(1, guards.MAX_UNIT + 1)
    assert kept == ids or any(
        all(a == b for a, b in zip(ids[len(kept) - n :], ids[len(kept) :], strict=False)) for n in periods
    )
    if times >= guards.MIN_REPEATS:
        assert len(kept) <= len(before) + len(unit)
    if times < guards.MIN_REPEATS and len(set(ids)) == len(ids):
        assert kept == ids


@given(st.text(), tokens, lengths, lengths, st.booleans())
def test_doubts(text: str, ids: list[int], num_samples: int, more_samples: int, stopped: bool) -> None:
    found = guards.doubts(text, ids, num_samples, stopped=stopped)
    assert len(set(found)) == len(found)
    assert set(found) <= CAUSES - {guards.EMPTY}
    assert len({guards.LOOP, guards.TOO_LONG} & set(found)) == (0 if stopped else 1)
    longer = guards.doubts(text, ids, num_samples + more_samples, stopped=stopped)
    assert set(longer) <= set(found)


@given(st.text(), st.text())
def test_words_add_up(left: str, right: str) -> None:
    assert guards.num_words(f"{left} {right}") == guards.num_words(left) + guards.num_words(right)
    assert guards.num_words(left) >= 0
    assert (guards.num_words(left) > 0) == bool(left.strip(string.whitespace) and left.split())


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("one two", 2), ("今天天气", 2), ("ok 今天 bye", 3), ("สวัสดี", 3), ("한국어 좋아요", 2)]
)
def test_words_of_scripts(text: str, count: float) -> None:
    assert guards.num_words(text) == count


@given(st.text(min_size=1))
def test_compression_of_anything(text: str) -> None:
    assert guards.compression_ratio("") == 0
    assert 0 < guards.compression_ratio(text) < 1100  # deflate's own limit is 1032
    assert guards.compression_ratio(text * 200) > guards.compression_ratio(text)


@given(st.text(alphabet=string.ascii_letters + " ", max_size=16))
def test_short_text_is_never_repetitive(text: str) -> None:
    assert guards.compression_ratio(text) < guards.MAX_COMPRESSION_RATIO


def test_repetitive_text_is_told_from_speech() -> None:
    """What whisper's limit was made for."""
    speech = (
        "And so, my fellow Americans, ask not what your country can do for you; ask what you can do for your country. "
        "The quick brown fox jumps over the lazy dog, and then the lazy dog gets up and runs after the fox."
    )
    assert guards.compression_ratio(speech) < guards.MAX_COMPRESSION_RATIO
    assert guards.compression_ratio("thank you. " * 20) > guards.MAX_COMPRESSION_RATIO
    options = replace(DecodeOptions(), max_new_tokens=10)
    assert options.is_over(range(10), 480_000)
    assert not options.is_over(range(9), 480_000)
