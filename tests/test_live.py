"""Live transcription: the order of events, what is stable, where utterances end, and what offline hears."""

import json
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arkasr
from arkasr import audio, guards, metrics, segment
from arkasr.audio import SAMPLE_RATE, Pcm16, Waveform
from arkasr.engines import DecodeOptions, Generation
from arkasr.errors import AudioError, NoAnswerError, UsageError
from arkasr.live import Event, Failed, Final, LiveOptions, LiveTranscriber, Partial, SpeechStarted, SpeechStopped
from arkasr.transcribe import Transcriber

BLOCK = SAMPLE_RATE // 10
ONE_TO_TEN = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass
class Saying:
    """An engine that says what a function makes of each waveform, in text."""

    say: Callable[[Waveform], str | NoAnswerError]
    heard: list[Waveform] = field(default_factory=list)

    def generate(self, waveforms: Sequence[Waveform], _options: DecodeOptions) -> list[Generation]:
        self.heard += waveforms
        said = [self.say(waveform) for waveform in waveforms]
        return [
            Generation((), (), None, text="", failure=one) if isinstance(one, NoAnswerError)
            else Generation((), (), None, text=one)
            for one in said
        ]  # fmt: skip


class Loudness:
    """A detector that takes all that is loud for speech."""

    def __init__(self, *, level: bool = False) -> None:
        assert level

    def __call__(self, waveform: Waveform) -> Waveform:
        chunks = waveform.reshape(-1, segment.CHUNK_SAMPLES)
        speech: Waveform = (np.abs(chunks).max(axis=1) > 0.1).astype(np.float32)
        return speech


@pytest.fixture
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "VoiceActivity", Loudness)


def speech(*parts_s: float) -> Waveform:
    """Speech and pauses by turns, of so many seconds."""
    parts = [np.full(round(s * SAMPLE_RATE), 0.5 if n % 2 == 0 else 0.0, np.float32) for n, s in enumerate(parts_s)]
    return np.concatenate(parts)


def events_of(live: LiveTranscriber, waveform: Waveform, *, block: int = BLOCK) -> list[Event]:
    """All of a stream that is cut off at its end."""
    blocks = (waveform[at : at + block] for at in range(0, len(waveform), block))
    return [*(event for one in blocks for event in live.add(one)), *live.commit()]


def live_of(
    say: Callable[[Waveform], str | NoAnswerError], *, pause_s: float = 0.5, partials: bool = True
) -> LiveTranscriber:
    options = LiveOptions(pause_s=pause_s, partials=partials)
    return LiveTranscriber(Transcriber(Saying(say)), options, clock=lambda: 0.0)


def assert_order(events: Sequence[Event]) -> None:
    """Started, Partial*, Stopped, Final or Failed, by utterance; what is stable stays."""
    number, state, stable = 0, "idle", ""
    for event in events:
        assert event.utterance == number
        match event:
            case SpeechStarted():
                assert state == "idle"
                state, stable = "open", ""
            case Partial():
                assert state == "open"
                assert event.stable.startswith(stable)
                stable = event.stable
            case SpeechStopped():
                assert state == "open"
                state = "stopped"
            case Final() | Failed():
                assert state == "stopped"
                if isinstance(event, Final):
                    assert event.segment.text.startswith(stable)
                number, state = number + 1, "idle"
    assert state == "idle"


def length_in_words(waveform: Waveform) -> str:
    """A word for each second of speech that has begun."""
    num_spoken = int((np.abs(waveform) > 0.1).sum())
    return " ".join(ONE_TO_TEN[: -(-num_spoken // SAMPLE_RATE)])


@pytest.mark.usefixtures("loudness")
def test_an_utterance_grows_and_ends() -> None:
    events = events_of(live_of(length_in_words), speech(4, 1))
    assert_order(events)
    assert isinstance(events[0], SpeechStarted)
    assert events[0].start_s == 0
    partials = [event for event in events if isinstance(event, Partial)]
    assert partials[0] == Partial(0, "", "one")
    assert partials[-1].stable == "one two three four"
    assert events[-2] == SpeechStopped(0, 4.0)
    assert isinstance(events[-1], Final)
    assert events[-1].segment.text == "one two three four"
    assert (events[-1].segment.start_s, events[-1].segment.end_s) == (0, 4.0)


@pytest.mark.usefixtures("loudness")
def test_the_last_word_is_not_stable_while_somebody_speaks() -> None:
    events = events_of(live_of(lambda _: "yes no"), speech(3, 1))
    during = [event for event in events if isinstance(event, Partial)]
    assert during[0] == Partial(0, "", "yes no")
    assert during[1] == Partial(0, "yes", "no")
    assert isinstance(events[-1], Final)
    assert events[-1].segment.text == "yes no"


@pytest.mark.usefixtures("loudness")
def test_the_length_of_the_pause_that_ends() -> None:
    for pause_s, count in ((0.3, 3), (0.7, 2), (1.2, 1)):
        events = events_of(live_of(length_in_words, pause_s=pause_s), speech(1, 0.5, 1, 1, 1, 2))
        assert_order(events)
        assert sum(isinstance(event, Final) for event in events) == count


@pytest.mark.usefixtures("loudness")
def test_a_click_is_no_utterance() -> None:
    assert events_of(live_of(length_in_words), speech(0, 1, 0.05, 2)) == []


@given(st.data())
def test_what_is_stable_never_changes(data: st.DataObject) -> None:
    """Whatever the network says from hearing to hearing, in scripts with spaces and without."""
    word = st.sampled_from(["yes", "Yes,", "no", "no.", "我", "在", "2024", "年", "a"])
    spaced = st.lists(st.tuples(word, st.sampled_from([" ", " ", ""])), max_size=6)

    def say(_: Waveform) -> str:
        return "".join("".join(pair) for pair in data.draw(spaced)).strip()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segment, "VoiceActivity", Loudness)
        options = LiveOptions(decode=DecodeOptions(guard=False))
        assert_order(
            events_of(LiveTranscriber(Transcriber(Saying(say)), options, clock=lambda: 0.0), speech(2.5, 0.7, 1))
        )


@pytest.mark.usefixtures("loudness")
def test_a_final_keeps_the_spaces_of_its_text() -> None:
    """ "我在2024年来" was once told with spaces around the number, and a stable beginning was none."""
    events = events_of(live_of(lambda waveform: "我在2024年来"[: len(waveform) // 8000]), speech(4, 1))
    assert_order(events)
    assert isinstance(events[-1], Final)
    assert events[-1].segment.text == "我在2024年来"
    assert events[-1].segment.flags == ()


@pytest.mark.usefixtures("loudness")
def test_what_was_shown_stays_and_is_flagged() -> None:
    """The last hearing says another first word: the text goes on behind what was shown."""

    def say(waveform: Waveform) -> str:
        is_last = len(waveform) > 3.2 * SAMPLE_RATE
        return "jes two three four" if is_last else "yes two three"

    final = events_of(live_of(say), speech(3, 1))[-1]
    assert isinstance(final, Final)
    assert final.segment.text == "yes two three four"
    assert final.segment.flags == (guards.SHOWN,)


@pytest.mark.usefixtures("loudness")
def test_a_loop_is_never_shown() -> None:
    events = events_of(live_of(lambda _: "you " * 60), speech(3, 1))
    assert_order(events)
    assert not [event for event in events if isinstance(event, Partial)]
    assert isinstance(events[-1], Final)
    assert events[-1].segment.text.count("you") < 3


@pytest.mark.usefixtures("loudness")
def test_an_answer_that_fails_ends_its_utterance_alone() -> None:
    failing = NoAnswerError("no")

    def say(waveform: Waveform) -> str | NoAnswerError:
        return failing if (np.abs(waveform) > 0.1).sum() > 1.5 * SAMPLE_RATE else "yes"

    events = events_of(live_of(say), speech(1, 1, 2, 1, 1, 1))
    assert_order(events)
    assert [type(event) for event in events if isinstance(event, Final | Failed)] == [Final, Failed, Final]


@pytest.mark.usefixtures("loudness")
def test_more_than_the_network_hears_at_once_is_cut() -> None:
    engine = Saying(lambda _: "word")
    events = events_of(LiveTranscriber(Transcriber(engine), clock=lambda: 0.0), speech(70, 1))
    assert_order(events)
    finals = [event.segment for event in events if isinstance(event, Final)]
    assert len(finals) == 3
    assert max(map(len, engine.heard)) <= segment.MAX_SAMPLES
    assert all(a.end_s <= b.start_s for a, b in pairwise(finals))


@pytest.mark.usefixtures("loudness")
def test_commit_ends_and_clear_forgets() -> None:
    engine = Saying(length_in_words)
    live = LiveTranscriber(Transcriber(engine), clock=lambda: 0.0)
    begun = list(live.add(speech(1.5)))
    committed = list(live.commit())
    assert_order([*begun, *committed])
    assert isinstance(committed[-1], Final)
    assert committed[-1].segment.end_s == pytest.approx(1.5, abs=0.04)
    assert list(live.commit()) == []
    again = list(live.add(speech(1.2)))
    assert [type(event) for event in live.clear()] == [SpeechStopped]
    assert again[0].utterance == 1
    after = events_of(live, speech(1, 1))
    assert after[0].utterance == 2
    assert isinstance(after[0], SpeechStarted)
    assert after[0].start_s == pytest.approx(2.7, abs=0.07)  # nothing of what was before
    assert len(engine.heard[-1]) < 1.5 * SAMPLE_RATE
    assert live.num_samples == len(speech(1.5, 0, 1.2, 0, 1, 1))


@pytest.mark.usefixtures("loudness")
def test_partials_take_at_most_half_of_the_time() -> None:
    """A network of a second for each hearing: it rests as long before it hears a partial again."""
    now = [0.0]

    def say(_: Waveform) -> str:
        now[0] += 1.0
        return "yes"

    engine = Saying(say)
    live = LiveTranscriber(Transcriber(engine), clock=lambda: now[0])
    for _ in range(200):
        list(live.add(speech(0.1)))
        now[0] += 0.1
    assert 9 <= len(engine.heard) <= now[0] / 2 + 1


@pytest.mark.usefixtures("loudness")
def test_what_comes_at_once_is_heard_once() -> None:
    engine = Saying(length_in_words)
    live = LiveTranscriber(Transcriber(engine))
    assert_order(events_of(live, speech(*[1.0] * 20), block=10**9))
    assert len(engine.heard) == 10


@pytest.mark.usefixtures("loudness")
def test_memory_does_not_grow() -> None:
    """Nothing but the utterance in the making is kept."""
    live = live_of(length_in_words, partials=False)
    piece = speech(3, 1, 2, 2)

    def minutes(count: int) -> None:
        for _ in range(count * 60 // 8):
            for at in range(0, len(piece), BLOCK):
                list(live.add(piece[at : at + BLOCK]))

    engine = live._recognizer._engine
    assert isinstance(engine, Saying)
    minutes(1)
    engine.heard.clear()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        minutes(10)
        engine.heard.clear()
        assert tracemalloc.get_traced_memory()[0] - before < 300_000
    finally:
        tracemalloc.stop()


def test_options_out_of_range_are_named() -> None:
    for name, value in (("pause_s", 0.0), ("threshold", 1.0), ("prefix_s", -1.0), ("step_s", float("nan"))):
        with pytest.raises(UsageError, match=f"{name} is "):
            LiveOptions(**{name: value})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clips(shared: Path) -> list[tuple[Waveform, str]]:
    """Every eighth of AN4's test clips with its text."""
    rows = map(json.loads, (shared / "speech" / "an4" / "manifest.jsonl").read_text().splitlines())
    test = [row for row in rows if row["split"] == "test"][::8]
    return [(audio.load(shared / "speech" / "an4" / row["audio"]), row["text"]) for row in test]


def test_tiny_hears_live_what_it_hears_offline(clips: list[tuple[Waveform, str]]) -> None:
    model = arkasr.load_model("tiny")
    said = {"live": list[tuple[str, str]](), "offline": list[tuple[str, str]]()}
    for clip, text in clips:
        live = LiveTranscriber(model, clock=lambda: 0.0)
        quiet = np.zeros(SAMPLE_RATE, np.float32)
        events = events_of(live, np.concatenate([clip, quiet]))
        assert_order(events)
        finals = [event.segment for event in events if isinstance(event, Final)]
        for one in finals:
            assert [word.text for word in one.words] == one.text.split()
            assert all(one.start_s <= word.start_s <= word.end_s <= one.end_s for word in one.words)
        said["live"].append((text, " ".join(one.text for one in finals)))
        said["offline"].append((text, model.transcribe((clip, SAMPLE_RATE)).text))
    rates = {how: metrics.corpus_word_errors(pairs).rate for how, pairs in said.items()}
    assert rates["live"] <= rates["offline"] + 0.01


def test_a_quiet_microphone_is_heard(clips: list[tuple[Waveform, str]]) -> None:
    """Thirty decibels down, the detector alone missed more than every fifth word."""
    model = arkasr.load_model("tiny")
    clip = max((clip for clip, _ in clips), key=len)
    texts = [
        [event.segment.text for event in events_of(live_of_model, clip * gain) if isinstance(event, Final)]
        for gain in (1.0, 0.03)
        for live_of_model in [LiveTranscriber(model, LiveOptions(partials=False))]
    ]
    assert texts[0]
    assert metrics.word_errors(" ".join(texts[0]), " ".join(texts[1])).rate <= 0.1


@given(st.binary(max_size=400), st.lists(st.integers(0, 50), max_size=20), st.sampled_from([8_000, 16_000, 24_000]))
def test_pcm16_in_any_pieces(data: bytes, sizes: list[int], rate: int) -> None:
    data = data[: len(data) // 2 * 2]
    whole, pieces = Pcm16(rate), Pcm16(rate)
    expected = np.concatenate([whole.add(data), whole.end()])
    parts = []
    for size in sizes:
        parts.append(pieces.add(data[:size]))
        data = data[size:]
    found = np.concatenate([*parts, pieces.add(data), pieces.end()])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pcm16_is_resampled_and_a_cut_is_told() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000) * 16_384
    pcm = Pcm16(24_000, name="standard input")
    heard = np.concatenate([pcm.add(tone.astype("<i2").tobytes()), pcm.end()])
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) * 0.5
    assert len(heard) == 16_000
    np.testing.assert_allclose(heard[500:-500], expected[500:-500], atol=1e-3)
    pcm = Pcm16(16_000, name="standard input")
    pcm.add(b"\0\0\0")
    with pytest.raises(AudioError, match="standard input: ended in the middle of a sample"):
        pcm.end()
    with pytest.raises(AudioError, match="sample rate 12 Hz"):
        Pcm16(12)
