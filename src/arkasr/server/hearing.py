"""What a realtime session hears: its audio to the events of its items, by the voice activity detector or by commits.

Audio is PCM at 24 kHz. Found by the detector, an utterance goes through a `LiveTranscriber`; what a client commits goes
the way of an upload, and says the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from arkasr import audio, live
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import ArkASRError, NoAnswerError
from arkasr.live import LiveOptions, LiveTranscriber
from arkasr.results import Segment, added
from arkasr.server import openai
from arkasr.server.accounts import LimitError
from arkasr.server.events import RATE, SAMPLE_BYTES, Item
from arkasr.server.models import Loaded
from arkasr.server.openai import Refusal, refusal_of
from arkasr.server.service import Visit
from arkasr.transcribe import Transcriber

BYTES_PER_S = RATE * SAMPLE_BYTES
LEAST_COMMIT_BYTES = BYTES_PER_S // 10
MOST_KEPT_BYTES = 600 * BYTES_PER_S
STEP_SAMPLES = 10 * SAMPLE_RATE  # in which a key's day is reserved
Tell = Callable[[Mapping[str, Any], int], None]


class Hearing:
    """The audio of a session and what is said in it, for one thread at a time."""

    def __init__(self, loaded: Loaded, visit: Visit, reserve: Callable[[int], None], tell: Tell) -> None:
        """`tell` is given events for the client, and the samples at 16 kHz that are paid for with each."""
        self._caller = loaded.shared.caller()
        self._transcriber = Transcriber(self._caller, loaded.rules, turns=loaded.shared.turns)
        self._loaded, self._visit, self._reserve, self._tell = loaded, visit, reserve, tell
        self._options: LiveOptions | None = None
        self._live: LiveTranscriber | None = None  # of what came since the turn detection was set or audio cleared
        self._pcm = audio.Pcm16(RATE)
        self._begin_s = 0.0  # of `_live`, in the session
        self._num_bytes = 0  # of the session
        self._kept = bytearray()  # for the next commit, where the client tells where utterances end
        self._item = Item()
        self._before: str | None = None  # id of the item before
        self._started_s = self._stopped_s = 0.0  # of the utterance in the making, if there is one
        self._open = False
        self._answered = self._reserved = 0  # samples at 16 kHz
        self.logprobs = False

    @property
    def model(self) -> str:
        """The own name of its model."""
        return self._loaded.name

    @property
    def is_listening(self) -> bool:
        """Whether audio is heard as it comes, and not kept for a commit."""
        return self._options is not None

    def cancel(self, error: ArkASRError) -> None:
        """Have the thread that hears raise an error; in any thread, and for good."""
        self._caller.cancel(error)

    def listen(self, options: LiveOptions | None) -> None:
        """Find utterances so from now on, or not at all; what is being said ends here."""
        if options == self._options:
            return
        self.finish()
        self._live, self._options = None, options
        if options is not None and self._kept:
            kept, self._kept = bytes(self._kept), bytearray()
            self._hear(kept)

    def take(self, data: bytes) -> None:
        """Hear audio, or keep it for a commit.

        Raises:
            Refusal: as much is kept as may be.
            LimitError: the key's day is used up.
        """
        if self._options is None and len(self._kept) + len(data) > MOST_KEPT_BYTES:
            message = f"{MOST_KEPT_BYTES // BYTES_PER_S} s of audio wait for a commit; commit or clear them"
            raise Refusal(400, message, code="input_audio_buffer_full", param="audio")
        self._num_bytes += len(data)
        if self._options is None:
            self._kept += data
        else:
            self._hear(data)

    def commit(self) -> None:
        """End the utterance in the making, or recognize what was kept.

        Raises:
            Refusal: there is nothing.
        """
        if self._options is not None:
            if not self.finish():
                raise _empty("nobody speaks, or what was said is committed")
        elif len(self._kept) < LEAST_COMMIT_BYTES:
            raise _empty(f"{1000 * len(self._kept) // BYTES_PER_S} ms of audio; give at least 100 ms")
        else:
            self._recognize()

    def finish(self) -> bool:
        """End the utterance in the making; whether there was one."""
        before = self._before
        if self._live is not None:
            rest, self._pcm = self._pcm.end(), audio.Pcm16(RATE)
            self._say(self._live.add(rest))
            self._say(self._live.commit())
        return self._before != before

    def clear(self) -> None:
        """Forget the utterance in the making, and what was kept."""
        if self._live is not None:
            for event in self._live.clear():
                assert isinstance(event, live.SpeechStopped)
                self._tell(self._edge("stopped", "end", event.end_s), 0)
        self._live, self._open, self._kept = None, False, bytearray()
        self._tell({"type": "input_audio_buffer.cleared"}, 0)

    def _hear(self, data: bytes) -> None:
        if self._live is None:
            self._live, self._pcm = (
                LiveTranscriber(self._transcriber, self._options or LiveOptions()),
                audio.Pcm16(RATE),
            )
            self._begin_s = (self._num_bytes - len(data)) / BYTES_PER_S
        begun = self._live.num_samples - round(self._started_s * SAMPLE_RATE) if self._open else 0
        try:
            self._hold(begun + len(data) // SAMPLE_BYTES * SAMPLE_RATE // RATE)  # for all of it may be speech
        except LimitError:
            if len(data) <= LEAST_COMMIT_BYTES:
                raise
            middle = len(data) // 4 * SAMPLE_BYTES
            self._hear(data[:middle])
            self._hear(data[middle:])
            return
        self._say(self._live.add(self._pcm.add(data)))

    def _hold(self, num_samples: int) -> None:
        """Reserve so many samples more than were answered, and some, if the day has them."""
        needed = self._answered + num_samples
        if needed <= self._reserved:
            return
        more = math.ceil(needed / STEP_SAMPLES) * STEP_SAMPLES
        try:
            self._reserve(more)
        except LimitError:
            self._reserve(needed)
            more = needed
        self._reserved = more

    def _say(self, events: Iterator[live.Event]) -> None:
        for event in events:
            match event:
                case live.SpeechStarted():
                    self._item, self._open, self._started_s = Item(), True, event.start_s
                    self._tell(self._edge("started", "start", event.start_s), 0)
                case live.Partial():
                    self._tell_all(self._item.delta(event.stable))
                case live.SpeechStopped():
                    self._open, self._stopped_s = False, event.end_s
                    self._tell(self._edge("stopped", "end", event.end_s), 0)
                    self._commit_item()
                case live.Final():
                    self._tell_all(self._item.delta(event.segment.text))
                    self._answer([event.segment], round((self._stopped_s - self._started_s) * SAMPLE_RATE))
                case live.Failed():
                    self._tell(self._item.failed(refusal_of(event.error)), 0)

    def _edge(self, kind: str, name: str, time_s: float) -> dict[str, Any]:
        time_ms = round((self._begin_s + time_s) * 1000)
        return {"type": f"input_audio_buffer.speech_{kind}", f"audio_{name}_ms": time_ms, "item_id": self._item.id}

    def _tell_all(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._tell(event, 0)

    def _commit_item(self) -> None:
        self._tell_all(self._item.committed(self._before))
        self._before = self._item.id

    def _answer(self, segments: list[Segment], num_samples: int) -> None:
        logprobs = openai.logprobs(segments, self._loaded.rules) if self.logprobs else None
        self._answered += num_samples
        self._tell(self._item.completed(self._visit.bill(num_samples).by_duration(), logprobs), num_samples)

    def _recognize(self) -> None:
        """Answer what was kept, exactly as if it had been uploaded."""
        kept, self._kept, self._item, num_samples = self._kept, bytearray(), Item(), 0
        self._hold(len(kept) // SAMPLE_BYTES * SAMPLE_RATE // RATE + 1)
        self._commit_item()

        def blocks() -> Iterator[Waveform]:
            nonlocal num_samples
            pcm = audio.Pcm16(RATE)
            for start in range(0, len(kept), BYTES_PER_S):
                waveform = pcm.add(bytes(kept[start : start + BYTES_PER_S]))
                num_samples += len(waveform)
                yield waveform
            waveform = pcm.end()
            num_samples += len(waveform)
            yield waveform

        segments, source = [], audio.Blocks("the audio", blocks())
        try:
            for segment in self._transcriber.segments(source, batch_size=self._loaded.batch_size):
                segments.append(segment)
                self._tell_all(self._item.delta(self._item.transcript + added(self._item.transcript, segment.text)))
        except NoAnswerError as error:
            self._tell(self._item.failed(refusal_of(error)), 0)
        else:
            self._answer(segments, num_samples)


def _empty(why: str) -> Refusal:
    return Refusal(400, f"commit: {why}", code="input_audio_buffer_commit_empty")
