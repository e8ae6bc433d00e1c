"""Many threads at one engine: the same words as alone, in fair turns, and nobody waits for what will not come."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from arkasr import engines
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.engines import Clip, DecodeOptions, Engine, Generation
from arkasr.engines.shared import MAX_BATCH, Caller, EngineClosedError, SharedEngine
from arkasr.errors import ArkASRError, UsageError

TIMEOUT_S = 60.0


def second(number: int, seconds: float = 1.0) -> Waveform:
    """Audio that `Slow` knows by its number."""
    return np.full(round(seconds * SAMPLE_RATE), number / 1000, np.float32)


class Gate:
    """An engine of whole batches that says the number of each clip, when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        numbers = [round(float(waveform[0]) * 1000) for waveform in waveforms]
        self.batches.append(numbers)
        self.begun.release()
        assert self.open.acquire(timeout=TIMEOUT_S)
        return [Generation((number,), (-0.1,), -0.1) for number in numbers]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def shared(gate: Gate) -> Iterator[SharedEngine]:
    engine = SharedEngine(gate)
    yield engine
    gate.open.release(10_000)
    engine.close()


class Asking(threading.Thread):
    """A thread that asks for clips by their numbers."""

    def __init__(self, caller: Caller, *clips: Waveform, options: DecodeOptions | None = None) -> None:
        super().__init__(daemon=True)
        self._caller, self._clips, self._options = caller, clips, options or DecodeOptions()
        self.said: list[int] | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.said = [one.ids[0] for one in self._caller.generate(self._clips, self._options)]
        except ArkASRError as error:
            self.error = error

    def done(self) -> "Asking":
        self.join(TIMEOUT_S)
        assert not self.is_alive()
        return self


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_newcomer_is_next_however_much_another_has_waiting(gate: Gate, shared: SharedEngine) -> None:
    long = Asking(shared.caller(), *(second(number) for number in range(1, 41)))
    assert gate.begun.acquire(timeout=TIMEOUT_S)  # eight of its clips are decoded
    short = Asking(shared.caller(), second(500))
    until(lambda: shared.num_waiting == 40 - MAX_BATCH + 1)
    gate.open.release(2)
    assert short.done().said == [500]
    assert 500 in gate.batches[1]
    gate.open.release(100)
    assert long.done().said == list(range(1, 41))


def test_those_who_wait_get_the_same_over_time(gate: Gate, shared: SharedEngine) -> None:
    asking = [Asking(shared.caller(), second(0))]  # holds the engine until all wait
    assert gate.begun.acquire(timeout=TIMEOUT_S)
    asking += [Asking(shared.caller(), *(second(n, seconds) for _ in range(30))) for n, seconds in ((1, 1.0), (2, 3.0))]
    until(lambda: shared.num_waiting == 60)
    gate.open.release(100)
    for one in asking:
        one.done()
    order = [number for batch in gate.batches[1:] for number in batch]
    first = order[: order.index(1) + 24]  # while both wait
    assert 2.0 <= first.count(1) / first.count(2) <= 4.0  # seconds count, not clips


def test_clips_that_are_decoded_otherwise_are_not_decoded_together(gate: Gate, shared: SharedEngine) -> None:
    asking = [Asking(shared.caller(), second(0))]
    assert gate.begun.acquire(timeout=TIMEOUT_S)
    options = [DecodeOptions(), DecodeOptions(temperature=0.5), DecodeOptions(seed=3)]
    asking += [Asking(shared.caller(), second(n), options=options[n % 3]) for n in range(1, 13)]
    until(lambda: shared.num_waiting == 12)
    gate.open.release(100)
    assert [one.done().said for one in asking] == [[n] for n in range(13)]
    assert all(len({number % 3 for number in batch}) == 1 for batch in gate.batches[1:])


def test_who_cancels_waits_no_longer_and_costs_nothing_more(gate: Gate, shared: SharedEngine) -> None:
    other = Asking(shared.caller(), second(1))
    assert gate.begun.acquire(timeout=TIMEOUT_S)
    caller = shared.caller()
    waiting = Asking(caller, *(second(n) for n in range(2, 30)))
    until(lambda: shared.num_waiting == 28)
    caller.cancel(UsageError("gone"))
    assert str(waiting.done().error) == "gone"
    assert shared.num_waiting == 0
    with pytest.raises(UsageError, match="gone"):
        caller.generate([second(3)], DecodeOptions())
    gate.open.release(100)
    assert other.done().said == [1]
    assert gate.batches == [[1]]


def test_an_engine_that_fails_tells_those_it_was_working_for_and_goes_on() -> None:
    class Fails:
        def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
            if waveforms[0][0] > 0.5:
                raise ZeroDivisionError("a bug")
            return [Generation((1,), (-0.1,), -0.1) for _ in waveforms]

    shared = SharedEngine(Fails())
    with pytest.raises(ZeroDivisionError):
        shared.caller().generate([second(900)], DecodeOptions())
    assert shared.caller().generate([second(1)], DecodeOptions())[0].ids == (1,)
    shared.close()


def test_closing_ends_what_is_decoded_and_fails_what_waits(gate: Gate) -> None:
    shared = SharedEngine(gate)
    decoded = Asking(shared.caller(), second(1))
    assert gate.begun.acquire(timeout=TIMEOUT_S)
    waiting = Asking(shared.caller(), second(2))
    until(lambda: shared.num_waiting == 1)
    closing = threading.Thread(target=shared.close)
    closing.start()
    assert isinstance(waiting.done().error, EngineClosedError)
    gate.open.release()
    closing.join(TIMEOUT_S)
    assert decoded.done().said == [1]
    with pytest.raises(EngineClosedError):
        shared.caller().generate([second(3)], DecodeOptions())


# ---- with the real engine, which takes clips in while it decodes others ----


@pytest.fixture(scope="module")
def onnx(tiny: Checkpoint) -> Engine:
    return engines.load_engine(tiny, name="onnx")


def noises(count: int) -> list[Waveform]:
    rng = np.random.default_rng(5)
    return [rng.normal(0, 0.1, rng.integers(2_000, 60_000)).astype(np.float32) for _ in range(count)]


def words(generations: Sequence[Generation]) -> list[tuple[object, ...]]:
    return [(one.ids, one.logprobs, one.stop_logprob) for one in generations]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_in_company_everyone_hears_the_same_to_the_bit(onnx: Engine, temperature: float) -> None:
    clips = noises(24)
    options = [DecodeOptions(temperature=temperature if n % 2 else 0.0, seed=n, guard=False) for n in range(len(clips))]
    alone = [words(onnx.generate([clip], how)) for clip, how in zip(clips, options, strict=True)]
    shared = SharedEngine(onnx)
    with ThreadPoolExecutor(len(clips)) as pool:
        asked = [pool.submit(shared.caller().generate, [c], how) for c, how in zip(clips, options, strict=True)]
        together = [words(one.result(TIMEOUT_S)) for one in asked]
    shared.close()
    assert together == alone


def test_clips_that_nobody_wants_leave_the_decoding(onnx: Engine) -> None:
    """And the others are not disturbed."""
    endless = DecodeOptions(guard=False, temperature=2.0)
    clips = noises(6)
    expected = words(onnx.generate(clips, DecodeOptions(guard=False)))
    rng = random.Random(3)
    shared = SharedEngine(onnx)
    with ThreadPoolExecutor(16) as pool:
        kept = pool.submit(shared.caller().generate, clips, DecodeOptions(guard=False))
        for _ in range(30):
            caller = shared.caller()
            left = pool.submit(caller.generate, clips[:2], endless)
            time.sleep(rng.random() * 0.01)
            caller.cancel(UsageError("gone"))
            assert left.exception(TIMEOUT_S) is None or isinstance(left.exception(), UsageError)
        assert words(kept.result(TIMEOUT_S)) == expected
    assert words(shared.caller().generate(clips, DecodeOptions(guard=False))) == expected
    shared.close()


def test_what_is_observed_has_each_stage_and_the_wait(onnx: Engine) -> None:
    seen: list[tuple[Clip, Generation]] = []
    shared = SharedEngine(onnx, observe=lambda clip, generation: seen.append((clip, generation)))
    (said,) = shared.caller().generate(noises(1), DecodeOptions())
    until(lambda: bool(seen))
    shared.close()
    assert seen[0][1] == said
    assert said.timings_s.keys() == {"queue", "log_mel", "encoder", "prefill", "decode"}
    assert words([replace(said, timings_s={})]) == words(onnx.generate(noises(1), DecodeOptions()))
