"""Words, their tokens and their times: against brute force, planted places, and any attention, bytes and loudness."""

import itertools
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkasr import align, audio, results
from arkasr.align import STEP_SAMPLES
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.text import clean

LETTERS = st.characters(exclude_categories=["Cs"])
ALPHABETS = (
    "abc XYZ.", "ñéüß ", "привет ", "你好世界。、", "カナっー ", "สวัสดี ", "안녕 ", "🇫🇷👍🏽\u200d ",
    "\t\n\u3000 -?!", "\x00\x1b\ufffd",
)  # fmt: skip
SCRIPTS = st.sampled_from(ALPHABETS).flatmap(lambda letters: st.text(letters, max_size=20))
TEXTS = st.lists(SCRIPTS | st.text(LETTERS, max_size=8), max_size=5).map("".join)
Floats = npt.NDArray[np.float32]


@st.composite
def tokens_of(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes cut into tokens anywhere, also inside a character."""
    content = draw(contents)
    cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=len(content))))
    return [content[a:b] for a, b in itertools.pairwise([0, *cuts, len(content)])]


def words_of(text: str, tokens: Sequence[bytes]) -> list[tuple[str, tuple[int, ...]]]:
    return align.words(text, range(len(tokens)), tokens.__getitem__)


# ---- words ----


@settings(deadline=None)
@given(tokens_of(st.binary(max_size=60) | TEXTS.map(str.encode)))
def test_words_are_those_of_the_text_whatever_the_tokens(tokens: list[bytes]) -> None:
    """As an engine's are: bytes to text, cleaned."""
    text = clean(b"".join(tokens).decode(errors="replace"))
    found = words_of(text, tokens)
    assert [word for word, _ in found] == results.words(text)
    assert "".join(word for word, _ in found) == "".join(text.split())
    assert all(places for _, places in found)
    for (_, places), (_, following) in itertools.pairwise(found):
        assert places[-1] <= following[0]


@settings(deadline=None)
@given(tokens_of(TEXTS.map(str.encode)))
def test_the_tokens_of_a_word_spell_it(tokens: list[bytes]) -> None:
    """And without its first or its last one they do not."""
    text = clean(b"".join(tokens).decode())
    for word, places in words_of(text, tokens):
        assert list(places) == list(range(places[0], places[-1] + 1))
        spelled = b"".join(tokens[place] for place in places)
        assert word.encode() in spelled
        for fewer in (places[1:], places[:-1]):
            whole = b"".join(tokens[place] for place in fewer)
            # Unless it stands there twice, as "a" in "a a".
            assert word.encode() not in whole or spelled.count(word.encode()) > 1


@settings(deadline=None)
@given(TEXTS, tokens_of(st.binary(max_size=40)))
def test_words_that_the_tokens_do_not_spell(text: str, tokens: list[bytes]) -> None:
    found = words_of(text, tokens)
    assert [word for word, _ in found] == results.words(text)
    assert all(0 <= place < len(tokens) for _, places in found for place in places)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([b" one", b" tw", b"o"], [("one", (0,)), ("two", (1, 2))]),
        ([b"- ", b"?", b"so", b",", b" a", b" a"], [("so,", (2, 3)), ("a", (4,)), ("a", (5,))]),
        (["今天".encode(), "好".encode()[:2], "好".encode()[2:]], [("今", (0,)), ("天", (0,)), ("好", (1, 2))]),
        ([b"a\xe4", b"\xbd\xa0", b"b"], [("a", (0,)), ("你", (0, 1)), ("b", (2,))]),
        ([b"a", b"\xe4", b" b"], [("a\ufffd", (0, 1, 2)), ("b", (2,))]),
        ([b"a<|us", b"er|>b", b" c"], [("a", (0,))]),
    ],
)  # fmt: skip
def test_words_of_tokens(tokens: list[bytes], found: list[tuple[str, tuple[int, ...]]]) -> None:
    assert words_of(clean(b"".join(tokens).decode(errors="replace")), tokens) == found


# ---- times ----


def planted(spans: Sequence[tuple[int, int]], num_tokens: int) -> Floats:
    """A row a word that attends evenly to its audio tokens, and one of a stop."""
    rows = np.zeros((len(spans) + 1, num_tokens), np.float32)
    for row, (start, end) in zip(rows, spans, strict=False):
        row[start:end] = 1 / (end - start)
    rows[-1] = 1 / num_tokens
    return rows


@st.composite
def heard(draw: st.DrawFn) -> tuple[Floats, list[tuple[int, ...]], Waveform, int, int]:
    """Any attention, words and waveform: zeros, one place for all words, more words than audio, silence."""
    num_samples = draw(st.sampled_from([160, 161, 320, 1_279, 1_281, 5_000, 16_000, 40_000]))
    shape = draw(st.integers(1, 30)), audio.num_audio_tokens(num_samples)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    attentions = [
        np.zeros(shape),
        np.full(shape, 1 / shape[1]),
        np.eye(1, shape[1], shape[1] - 1).repeat(shape[0], 0),
        np.eye(*shape)[:, ::-1],
        rng.dirichlet(np.full(shape[1], 0.1), shape[0]),
        rng.random(shape) * 1e-38,
    ]
    attention = attentions[draw(st.integers(0, 5))].astype(np.float32)
    noise = rng.normal(size=num_samples)
    waveforms = [np.zeros(num_samples), np.ones(num_samples), noise, noise * (np.arange(num_samples) // 3_000 % 2)]
    waveform = waveforms[draw(st.integers(0, 3))].astype(np.float32)
    tokens = st.lists(st.integers(0, shape[0] - 1), max_size=3).map(sorted).map(tuple)
    words = draw(st.lists(tokens, max_size=40))
    first = draw(st.integers(0, num_samples))
    return attention, words, waveform, first, draw(st.integers(first, num_samples))


@settings(deadline=None, max_examples=150)
@given(heard())
def test_times_are_in_order_inside_and_never_negative(
    given_: tuple[Floats, list[tuple[int, ...]], Waveform, int, int],
) -> None:
    attention, words, waveform, first, last = given_
    for within in ({}, {"first": first, "last": last}):
        times = align.times(attention, words, waveform, **within)
        assert len(times) == len(words)
        edges_s = [edge for span in times for edge in span]
        assert edges_s == sorted(edges_s)
        begin, end = within.get("first", 0), within.get("last", len(waveform))
        assert all(begin / SAMPLE_RATE - 1e-9 <= edge <= end / SAMPLE_RATE + 1e-9 for edge in edges_s)
        if len(words) <= (end - begin) // STEP_SAMPLES:
            assert all(end_s - start_s > 0.02 - 1e-9 for start_s, end_s in times)


def test_planted_words_are_found_where_they_are() -> None:
    """With loudness to the step; in steady noise, of which it tells nothing, to the audio token."""
    spans = [(3, 5), (5, 6), (9, 14), (20, 21), (24, 30)]
    num_samples = 36 * 1_280
    noise = np.random.default_rng(0).normal(scale=0.1, size=num_samples).astype(np.float32)
    spoken = np.zeros(num_samples, bool)
    truth = [((start * 1_280 + 300) / SAMPLE_RATE, (end * 1_280 - 300) / SAMPLE_RATE) for start, end in spans]
    for start_s, end_s in truth:
        spoken[round(start_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)] = True
    quiet = noise * np.where(spoken, 1, 0.003).astype(np.float32)
    for waveform, tolerance_s in ((quiet, 0.021), (noise, 0.05)):
        times = align.times(planted(spans, 36), [(n,) for n in range(len(spans))], waveform)
        assert np.abs(np.array(times) - truth).max() <= tolerance_s


def test_times_do_not_depend_on_how_loud_the_recording_is() -> None:
    rng = np.random.default_rng(3)
    attention = rng.dirichlet(np.full(37, 0.1), 9).astype(np.float32)
    quiet = np.where(np.arange(48_000) // 3_000 % 2, 1, 0.05)
    waveform = (rng.normal(scale=0.1, size=48_000) * quiet).astype(np.float32)
    words = [(n,) for n in range(8)]
    assert align.times(attention, words, waveform * np.float32(0.25)) == align.times(attention, words, waveform)


def test_words_of_one_token_share_its_time_evenly() -> None:
    """Two Chinese characters are often one token."""
    waveform = np.random.default_rng(0).normal(size=20 * 1_280).astype(np.float32)
    times = align.times(planted([(2, 5), (10, 16)], 20), [(0,), (1,), (1,), (1,)], waveform)
    lengths = [end - start for start, end in times[1:]]
    assert lengths == pytest.approx([lengths[0]] * 3)
    assert (times[1][1], times[2][1]) == (times[2][0], times[3][0])
    assert (times[1][0], times[3][1]) == pytest.approx((0.8, 1.28), abs=0.021)


def test_a_clip_with_more_tokens_to_a_second() -> None:
    """The length of an audio token follows from their number."""
    waveform = np.random.default_rng(0).normal(size=32_000).astype(np.float32)
    for merge_factor in (1, 2, 4, 8):
        num_tokens = audio.num_audio_tokens(len(waveform), merge_factor)
        start, end = num_tokens // 2, num_tokens // 2 + 8 // merge_factor
        ((start_s, end_s),) = align.times(planted([(start, end)], num_tokens), [(0,)], waveform)
        token_s = 0.02 * merge_factor
        assert (start_s, end_s) == pytest.approx((start * token_s, end * token_s), abs=0.021)


def places_by_force(scores: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], least: Sequence[int]) -> float:
    """The best sum of all ways to place units in order."""
    num_steps = scores.shape[1]
    best = -np.inf
    for cuts in itertools.combinations_with_replacement(range(num_steps + 1), 2 * len(least)):
        spans = list(zip(cuts[::2], cuts[1::2], strict=True))
        if all(end - begin >= count for (begin, end), count in zip(spans, least, strict=True)):
            best = max(best, total(scores, edges, spans))
    return best


def total(scores: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], spans: Sequence[tuple[int, int]]) -> float:
    return float(sum(row[b:e].sum() + edges[b] + edges[e] for row, (b, e) in zip(scores, spans, strict=True)))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9_999), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 3))
def test_places_are_the_best_of_all(seed: int, least: list[int], more: int) -> None:
    rng = np.random.default_rng(seed)
    num_steps = sum(least) + more
    scores, edges = rng.normal(size=(len(least), num_steps)), rng.normal(size=num_steps + 1)
    spans = align._places(scores, edges, least)
    flat = [edge for span in spans for edge in span]
    assert flat == sorted(flat)
    assert all(end - begin >= count for (begin, end), count in zip(spans, least, strict=True))
    assert total(scores, edges, spans) == pytest.approx(places_by_force(scores, edges, least))


@pytest.mark.parametrize(("duration_s", "num_words", "limit_ms"), [(3, 8, 0.5), (30, 100, 10.0)])
def test_times_cost_little(duration_s: int, num_words: int, limit_ms: float) -> None:
    """The limit is for a quiet machine; a busy one, whose caches are others', gets four times as much."""
    rng = np.random.default_rng(0)
    num_samples = duration_s * SAMPLE_RATE
    attention = rng.random((3 * num_words + 1, audio.num_audio_tokens(num_samples)), np.float32)
    waveform = rng.random(num_samples, np.float32)
    words = [(3 * n, 3 * n + 1, 3 * n + 2) for n in range(num_words)]
    spent_s = []
    for _ in range(10):
        started = time.process_time()
        align.times(attention, words, waveform)
        spent_s.append(time.process_time() - started)
    assert min(spent_s) * 1000 <= 4 * limit_ms
