"""Sound while it is made: PCM16 from a microphone or a pipe, which a thread of its own brings.

    microphone or pipe -> its thread -> Inbox -> whoever listens takes all that is there

Unusual: a pipe waits while the inbox is full, so nothing is lost however fast it is; a microphone cannot wait, so its
inbox holds ten minutes, and a listener that is further behind has lost.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from arkasr.audio import SAMPLE_RATE, Pcm16
from arkasr.errors import ArkASRError, AudioError, MissingExtraError, UsageError

SAMPLE_BYTES = 2
PIPE_S, MICROPHONE_S = 30, 600  # most audio that waits
READ_BYTES = 1 << 16
_CONTAINERS = (b"RIFF", b"fLaC", b"OggS", b"ID3")  # as samples they would be a loud crack, and then noise


class Inbox:
    """PCM16, little-endian and mono, between the thread that brings it and the one that takes it; it holds so much.

    Attributes:
        name: of the source, as errors call it.
        pcm: makes waveforms of what is taken.
        overflows: how often the source told that it had lost samples before they came here.
        error: why there is no more of it, if that was not its end.
    """

    def __init__(self, name: str, rate: int, *, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Room for `most_s` seconds of a rate; an AudioError where nothing can be of such a rate."""
        self.name, self.pcm = name, Pcm16(rate, name=name)
        self.overflows = 0
        self.error: ArkASRError | None = None
        self._most_bytes = int(most_s * rate) * SAMPLE_BYTES
        self._clock = clock
        self._held, self._since = bytearray(), 0.0
        self._ended = False
        self._changed = threading.Condition()  # its lock may be taken twice: a signal's handler may call `end`

    @property
    def is_over(self) -> bool:
        """Whether all was taken, and nothing more will come."""
        with self._changed:
            return self._ended and not self._held

    def put(self, block: bytes, *, wait: bool) -> bool:
        """Add bytes, or say that there is no room, or no end to wait for any; waiting is for room."""
        with self._changed:
            while wait and not self._ended and len(self._held) >= self._most_bytes:
                self._changed.wait()
            if self._ended or len(self._held) >= self._most_bytes:
                return False
            if not self._held:
                self._since = self._clock()
            self._held += block
            self._changed.notify_all()
            return True

    def end(self, error: ArkASRError | None = None) -> None:
        """Take nothing more, and say why; the first reason counts."""
        with self._changed:
            if not self._ended:
                self._ended, self.error = True, error
            self._changed.notify_all()

    def take(self, wait_s: float) -> tuple[bytes, float]:
        """All that is there, after a wait for some or for the end, and how many seconds the oldest of it has waited."""
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._ended, wait_s)
            taken, self._held = bytes(self._held), bytearray()
            self._changed.notify_all()
            return taken, self._clock() - self._since if taken else 0.0


def pipe(rate: int) -> AbstractContextManager[Inbox]:
    """Standard input, which is read from when it is entered.

    Raises:
        AudioError: nothing can be of such a rate, or it is closed; what fails while it is read is the inbox's error.
        UsageError: it is a terminal.
    """
    inbox = Inbox("standard input", rate, most_s=PIPE_S)
    if sys.stdin is None:
        raise AudioError(f"{inbox.name}: closed; pipe raw PCM into it")
    if sys.stdin.isatty():
        raise UsageError(f"{inbox.name}: a terminal; pipe raw PCM into it, such as that of `arecord -t raw`")
    # Not through its buffer, whose lock the thread would hold when the program ends.
    return _piped(sys.stdin.buffer.raw.read, inbox)  # type: ignore[union-attr]


@contextmanager
def _piped(read: Callable[[int], bytes | None], inbox: Inbox) -> Iterator[Inbox]:
    threading.Thread(target=_read, args=(read, inbox), name="arkasr-pipe", daemon=True).start()
    try:
        yield inbox
    finally:
        inbox.end()


def _read(read: Callable[[int], bytes | None], inbox: Inbox) -> None:
    """Put into the inbox what comes, until the end."""
    nothing = AudioError(f"{inbox.name}: empty (0 bytes); see whether its writer works")
    error: AudioError | None = nothing
    try:
        while (block := read(READ_BYTES)) != b"":
            if block is None:  # somebody set it not to wait
                time.sleep(0.01)
                continue
            if error is nothing and block.startswith(_CONTAINERS):
                error = AudioError(
                    f"{inbox.name}: an audio file, not raw PCM; hear it with `ark-asr transcribe -`, or have its "
                    "writer send samples without a header, as `arecord -t raw` and `ffmpeg -f s16le` do"
                )
                break
            error = None
            if not inbox.put(block, wait=True):
                break
    except OSError as failure:
        error = AudioError(f"{inbox.name}: cannot be read ({failure.strerror}); pipe raw PCM into it")
    inbox.end(error)


@dataclass(frozen=True)
class Microphone:
    """An input of this machine.

    Attributes:
        index: by which PortAudio knows it.
        name: as the system calls it, and what of the system offers it.
        rate: that it uses by itself, in Hz.
    """

    index: int
    name: str
    rate: int


def microphones() -> list[Microphone]:
    """All there are.

    Raises:
        MissingExtraError: sounddevice or PortAudio is not installed.
    """
    sounddevice = _sounddevice()
    return [_microphone(sounddevice, each) for each in sounddevice.query_devices() if each["max_input_channels"] > 0]


def find_microphone(name: str | None = None) -> Microphone:
    """The microphone of this number, or of which this is a part of the name; without, the system's default.

    Raises:
        MissingExtraError: sounddevice or PortAudio is not installed.
        AudioError: there is no default.
        UsageError: none has the name, or several have.
    """
    sounddevice = _sounddevice()
    if name is None:
        try:
            return _microphone(sounddevice, sounddevice.query_devices(kind="input"))
        except (sounddevice.PortAudioError, ValueError):
            raise AudioError("no microphone was found; plug one in, or pipe raw PCM into `ark-asr listen -`") from None
    try:
        found = sounddevice.query_devices(int(name) if name.isdecimal() else name, "input")
    except (sounddevice.PortAudioError, ValueError) as error:
        why = str(error).split(":\n")[0]  # what follows are the names of several
        raise UsageError(f"--microphone {name}: {why}; see `ark-asr listen --list-microphones`") from None
    return _microphone(sounddevice, found)


def _microphone(sounddevice: Any, device: Any) -> Microphone:
    offered_by = sounddevice.query_hostapis(device["hostapi"])["name"]
    return Microphone(device["index"], f"{device['name']} ({offered_by})", round(device["default_samplerate"]))


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise MissingExtraError("the microphone needs sounddevice; pip install 'arkasr[mic]'") from None
    except OSError as error:
        raise MissingExtraError(
            f"the microphone needs PortAudio ({error}); apt install libportaudio2, or what your system calls it"
        ) from None
    return sounddevice


@contextmanager
def record(microphone: Microphone) -> Iterator[Inbox]:
    """What a microphone hears, at 16 kHz if it can, else at its own rate.

    Raises:
        AudioError: it cannot be opened, or gives nothing; what fails while it is heard is the inbox's error.
    """
    sounddevice = _sounddevice()
    stream, inbox = _opened(sounddevice, microphone)
    try:
        stream.start()
        yield inbox
    except sounddevice.PortAudioError as error:
        raise AudioError(f"microphone {microphone.name}: {error}") from None
    finally:
        inbox.end()
        stream.close()


def _opened(sounddevice: Any, microphone: Microphone) -> tuple[Any, Inbox]:
    """A stream that is not started, and where it will put what it hears."""
    why = ""
    for rate in dict.fromkeys((SAMPLE_RATE, microphone.rate)):
        inbox = Inbox(f"microphone {microphone.name}", rate, most_s=MICROPHONE_S)
        try:
            stream = sounddevice.RawInputStream(
                samplerate=rate,
                device=microphone.index,
                channels=1,
                dtype="int16",
                callback=_callback(sounddevice, inbox),
                finished_callback=_finished(inbox),
            )
        except sounddevice.PortAudioError as error:
            why = str(error)
        else:
            return stream, inbox
    raise AudioError(f"microphone {microphone.name}: cannot be opened ({why}); see whether another program has it")


def _callback(sounddevice: Any, inbox: Inbox) -> Callable[[Any, int, Any, Any], None]:
    def take(samples: Any, _num_frames: int, _times: Any, status: Any) -> None:
        """Runs in a thread of PortAudio's, and may not wait: the next samples would be lost."""
        inbox.overflows += bool(status.input_overflow)
        if not inbox.put(bytes(samples), wait=False):
            inbox.end(
                AudioError(
                    f"{inbox.name}: {MICROPHONE_S // 60} minutes of it wait to be heard, and no more fits in; "
                    "use a smaller model, or --no-partials"
                )
            )
            raise sounddevice.CallbackAbort

    return take


def _finished(inbox: Inbox) -> Callable[[], None]:
    return lambda: inbox.end(AudioError(f"{inbox.name}: gave no more; see whether it is still plugged in"))
