"""One engine for many threads: what they ask for is decoded together, and none waits for another's whole recording.

    caller.generate -> its clips wait -> the fairest next one joins the decoding -> Generation -> the caller goes on

Unusual: fairness is fair queueing over seconds of audio (Demers, Keshav and Shenker, 1989): a caller who comes anew
begins at what each would have got by now had all shared evenly. So it does not wait for all that another has waiting,
and a stream of new callers keeps no old one waiting for ever.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from arkasr.audio import Waveform
from arkasr.engines import Clip, Continuous, DecodeOptions, Engine, Generation
from arkasr.errors import ArkASRError

MAX_BATCH = 8  # clips that an engine gets at once that cannot take new ones while it decodes

Observe = Callable[[Clip, Generation], object]


class EngineClosedError(ArkASRError, RuntimeError):
    """The engine was closed while somebody waited for it."""


class Turns:
    """At most so many threads at work at once, in the order in which they come.

    More threads than cores only take the interpreter's lock from each other, and from the one that runs the network.
    """

    def __init__(self, most: int) -> None:
        self._lock = threading.Lock()
        self._free = most
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        """Wait for a turn."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """End it: the next one's begins."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


class Caller:
    """An `Engine` in the hands of one thread."""

    def __init__(self, shared: "SharedEngine") -> None:
        """Of `SharedEngine.caller`."""
        self._shared = shared
        self.changed = threading.Condition(shared.lock)  # its own, lest every clip that is done wakes every thread
        self.waiting: deque[_Waiting] = deque()
        self.tag = 0.0  # samples of audio that count as served to it; who has the least is next
        self.error: BaseException | None = None

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize clips in turn with those of others; see `Engine.generate`.

        Raises:
            ArkASRError: what `cancel` was given.
            EngineClosedError: the engine was closed.
        """
        clips = [_Waiting(waveform, options, self) for waveform in waveforms]
        for clip in clips:
            self._shared.prepare(clip)
        self._shared.do(self, clips)
        return [clip.said for clip in clips if clip.said is not None]

    def cancel(self, error: ArkASRError) -> None:
        """Give up everything this caller waits for, and will: `generate` raises `error`."""
        self._shared.fail([self], error)


class _Waiting(Clip):
    """A clip and who waits for it."""

    def __init__(self, waveform: Waveform, options: DecodeOptions, caller: Caller) -> None:
        super().__init__(waveform, options)
        self.caller = caller
        self.since = time.perf_counter()
        self.waited_s = 0.0
        self.said: Generation | None = None


class SharedEngine:
    """An engine in a thread of its own, which decodes what its callers wait for until it is closed."""

    def __init__(
        self, engine: Engine, *, turns: Turns | None = None, observe: Observe = lambda _clip, _generation: None
    ) -> None:
        """With `turns`, callers do their own part in turn.

        `observe` is told of each clip that is done; its `timings_s` have "queue", the seconds that it waited.
        """
        self._engine = engine
        self.turns = turns or Turns(sys.maxsize)
        self._observe = observe
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._callers: list[Caller] = []  # those with clips that wait
        self._taken: set[_Waiting] = set()
        self._now = 0.0  # the tag of one who had shared evenly until the clip that was taken last
        self._share = 0.0  # samples of that clip, divided by those who shared then
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="arkasr-engine", daemon=True)
        self._thread.start()

    def caller(self) -> Caller:
        """An engine for one thread."""
        return Caller(self)

    @property
    def num_waiting(self) -> int:
        """Clips that wait and are not being decoded."""
        with self.lock:
            return sum(len(caller.waiting) for caller in self._callers)

    def close(self) -> None:
        """Stop after what is being decoded; all who wait get an `EngineClosedError`."""
        with self.lock:
            self._closed = True
            callers = list(self._callers)
            self._changed.notify()
        self.fail(callers, EngineClosedError("the engine was closed; ask again"))
        self._thread.join()

    def prepare(self, clip: Clip) -> None:
        """Do a caller's own part of the work on its clip, in its thread."""
        if isinstance(self._engine, Continuous):
            with self.turns:
                self._engine.prepare(clip)

    def do(self, caller: Caller, clips: list[_Waiting]) -> None:
        """Wait until a caller's clips have been recognized."""
        with self.lock:
            if self._closed:
                raise EngineClosedError("the engine was closed; ask again")
            if caller.error is None:
                caller.tag = max(caller.tag, self._now)
                caller.waiting.extend(clips)
                self._callers.append(caller)
                self._changed.notify()
                caller.changed.wait_for(
                    lambda: caller.error is not None or all(clip.said is not None for clip in clips)
                )
            if caller.error is not None:
                raise caller.error

    def fail(self, callers: list[Caller], error: BaseException) -> None:
        """Have callers raise an error instead of waiting on."""
        with self.lock:
            for caller in callers:
                caller.error = caller.error or error
                caller.waiting.clear()
                caller.changed.notify()
            self._callers = [caller for caller in self._callers if caller.waiting]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._callers)
                if self._closed:
                    return
            try:
                if isinstance(self._engine, Continuous):
                    self._engine.decode(self)
                else:
                    self._decode_batch()
            except BaseException as error:  # noqa: BLE001 - whoever waits for these clips must hear what became of them
                with self.lock:
                    failed = {clip.caller for clip in self._taken}
                    self._taken.clear()
                self.fail(list(failed), error)

    def _decode_batch(self) -> None:
        """One batch of clips that are decoded alike, for an engine that takes nothing but whole batches."""
        clips: list[Clip] = []
        while len(clips) < MAX_BATCH and (clip := self._next(clips[0].options if clips else None)) is not None:
            clips.append(clip)
        if clips:
            said = self._engine.generate([clip.waveform for clip in clips], clips[0].options)
            for clip, generation in zip(clips, said, strict=True):
                self.give(clip, generation)

    def take(self) -> Clip | None:
        """The next clip of the caller who has been served least; see `Clips`."""
        return self._next(None)

    def _next(self, options: DecodeOptions | None) -> Clip | None:
        """The next clip, if `options` are None or its own."""
        with self.lock:
            if not self._callers or self._closed:
                return None
            caller = min(self._callers, key=lambda caller: (caller.tag, caller.waiting[0].since))
            if options is not None and caller.waiting[0].options != options:
                return None
            clip = caller.waiting.popleft()
            clip.waited_s = time.perf_counter() - clip.since
            self._now = max(self._now + self._share, caller.tag)
            self._share = len(clip.waveform) / len({*self._callers, *(other.caller for other in self._taken)})
            caller.tag += len(clip.waveform)
            if not caller.waiting:
                self._callers.remove(caller)
            self._taken.add(clip)
            return clip

    def wants(self, clip: Clip) -> bool:
        """Whether somebody still waits for a clip; see `Clips`."""
        assert isinstance(clip, _Waiting)
        with self.lock:
            if clip.caller.error is not None:
                self._taken.discard(clip)
            return clip.caller.error is None

    def give(self, clip: Clip, generation: Generation) -> None:
        """Hand a clip's words to who waits for them; see `Clips`."""
        assert isinstance(clip, _Waiting)
        said = replace(generation, timings_s={"queue": clip.waited_s, **generation.timings_s})
        with self.lock:
            self._taken.discard(clip)
            clip.said = said
            clip.caller.changed.notify()
        self._observe(clip, said)
