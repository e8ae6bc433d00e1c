"""The recognition of one request: a thread that decodes and cuts audio, and an engine shared with others.

file -> blocks (counted, cut, reserved against the key's quota) -> Transcriber over a Caller -> segments -> the loop
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from arkasr import audio
from arkasr.audio import Waveform
from arkasr.engines import DecodeOptions
from arkasr.errors import ArkASRError
from arkasr.results import Segment, Transcript
from arkasr.server.models import Loaded
from arkasr.transcribe import Transcriber

PATIENCE_S = 15.0  # proxies cut connections of which they hear nothing for a minute
NAME = "the audio"  # what errors call an upload, whose own name is not to be trusted


@dataclass(frozen=True)
class Task:
    """What is to be recognized.

    Attributes:
        source: a file in memory, or the path of one.
        options: how to decode.
        limits: of the file.
        begin_s: where in it to begin.
        end_s: where to end.
        reserve: is told the samples that the recognition will take at least, before it takes them; may raise.
    """

    source: bytes | str
    options: DecodeOptions
    limits: audio.Limits
    begin_s: float = 0.0
    end_s: float = float("inf")
    reserve: Callable[[int], None] = lambda _num_samples: None


class Recognition:
    """A task at work in a thread."""

    def __init__(self, task: Task, loaded: Loaded) -> None:
        """Begin at once, in a thread of the running loop's executor."""
        self._task, self._loaded = task, loaded
        self._caller = loaded.shared.caller()
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Segment | BaseException | None] = asyncio.Queue()
        self._cancelled: ArkASRError | None = None
        self._segments: list[Segment] = []
        self.num_samples = 0
        self._ended = self._loop.run_in_executor(None, self._run)

    async def segments(self) -> AsyncIterator[Segment | None]:
        """Segments as they are known, and None whenever there was none for a while.

        Raises:
            ArkASRError: the audio is bad, or what `cancel` was given.
        """
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    item = await self._items.get()
            except TimeoutError:
                yield None
                continue
            if self._cancelled is not None:
                raise self._cancelled  # and do not hand out what came before: nobody who could be charged gets it
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            self._segments.append(item)
            yield item

    async def whole(self) -> Transcript:
        """All that was heard; raises as `segments`."""
        async for _ in self.segments():
            pass
        return self.transcript

    @property
    def transcript(self) -> Transcript:
        """What was awaited of `segments`."""
        return Transcript(NAME, tuple(self._segments), self.num_samples / audio.SAMPLE_RATE)

    def cancel(self, error: ArkASRError) -> None:
        """Stop soon; `segments` raises the error unless it has ended."""
        self._cancelled = self._cancelled or error
        self._caller.cancel(self._cancelled)

    async def ended(self) -> None:
        """Wait until the thread needs the audio no more."""
        await self._ended

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            loaded, options = self._loaded, self._task.options
            transcriber = Transcriber(self._caller, loaded.rules, turns=loaded.shared.turns)
            with contextlib.closing(self._blocks()) as blocks:  # with the file, and not when garbage is collected
                source = audio.Blocks(NAME, blocks)
                for segment in transcriber.segments(source, options=options, batch_size=loaded.batch_size):
                    self._put(segment)
        except BaseException as error:  # noqa: BLE001 - the request that awaits the segments must hear of it
            last = error
        self._put(last)

    def _put(self, item: Segment | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def _blocks(self) -> Generator[Waveform]:
        """The audio that was asked for, counted and paid for before it is heard."""
        task = self._task
        first, last = task.begin_s * audio.SAMPLE_RATE, task.end_s * audio.SAMPLE_RATE
        if isinstance(task.source, str):
            promised = audio.duration_s(Path(task.source), task.limits, name=NAME) * audio.SAMPLE_RATE
            task.reserve(max(0, int(min(promised, last) - first)))
        position = 0
        with contextlib.closing(audio.stream(task.source, task.limits, name=NAME)) as stream:
            for block in stream:
                if self._cancelled is not None:
                    raise self._cancelled
                begin, end = max(0, int(first) - position), int(min(max(0, last - position), len(block)))
                position += len(block)
                if begin < end:
                    self.num_samples += end - begin
                    task.reserve(self.num_samples)
                    yield block[begin:end]
                if position >= last:
                    return
