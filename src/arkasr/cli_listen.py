"""`ark-asr listen`: what is said, while it is said, from the microphone or from raw PCM on standard input.

    microphone or pipe -> Inbox -> LiveTranscriber -> events -> lines, a line that is redrawn, or JSON

Promise: standard output has text only. Where it is no terminal, a line appears when its utterance is over.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from itertools import accumulate
from types import FrameType
from typing import Annotated, Any, Protocol, TextIO

import typer

from arkasr import layout, microphone, results
from arkasr.audio import SAMPLE_RATE
from arkasr.cli_models import DeviceOption, DtypeChoice, DtypeOption, ModelOption, OfflineOption, chosen, report
from arkasr.errors import AudioError, UsageError
from arkasr.live import Event, Failed, Final, LiveOptions, LiveTranscriber, Partial, SpeechStarted, SpeechStopped
from arkasr.microphone import Inbox
from arkasr.transcribe import load_model

STALL_S = 1.0  # without any input; what was being said is over then
BEHIND_S = 5.0
AGAIN_S = 0.3  # one Ctrl-C can come twice: of the terminal, and of a program that started this one and passes it on
_ERASE, _DIM, _PLAIN = "\r\x1b[K", "\x1b[2m", "\x1b[0m"
_CONTROLS = re.compile(r"[\x7f-\x9f]")  # which JSON does not escape

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class EngineChoice(StrEnum):
    """Names of --engine."""

    AUTO = "auto"
    PYTORCH = "pytorch"
    ONNX = "onnx"


class FormatChoice(StrEnum):
    """Names of --format."""

    TXT = "txt"
    JSONL = "jsonl"


@app.command()
def listen(
    source: Annotated[
        str | None, typer.Argument(metavar="-", help="- is raw PCM on standard input: 16 bits, little-endian, mono.")
    ] = None,
    rate: Annotated[
        int | None, typer.Option(help=f"Samples a second of standard input.  [default: {SAMPLE_RATE}]")
    ] = None,
    device_name: Annotated[
        str | None,
        typer.Option("--microphone", metavar="NAME|INDEX", help="Which one.  [default: the system's default]"),
    ] = None,
    list_microphones: Annotated[
        bool, typer.Option("--list-microphones", help="Print number, own rate and name of each, and stop.")
    ] = False,
    model: ModelOption = None,
    offline: OfflineOption = False,
    engine: Annotated[EngineChoice, typer.Option(help="What runs the network.")] = EngineChoice.AUTO,
    device: DeviceOption = "auto",
    dtype: DtypeOption = DtypeChoice.AUTO,
    pause_s: Annotated[float, typer.Option(help="Seconds of silence that end an utterance.")] = LiveOptions.pause_s,
    partials: Annotated[
        bool | None,
        typer.Option(
            "--partials/--no-partials",
            help="Show an utterance before it ends.  [default: on a terminal, and in jsonl]",
        ),
    ] = None,
    output: Annotated[
        FormatChoice, typer.Option("--format", help="txt, or jsonl: an object a line for all that happens.")
    ] = FormatChoice.TXT,
) -> None:
    """Transcribe the microphone, or raw PCM from standard input, while somebody speaks; Ctrl-C ends it."""
    if list_microphones:
        for each in microphone.microphones():
            print(f"{each.index}\t{each.rate} Hz\t{each.name}")
        return
    if source not in (None, "-"):
        raise UsageError(f"{source}: listen takes - or nothing; for files there is `ark-asr transcribe`")
    if (source == "-" and device_name is not None) or (source is None and rate is not None):
        raise UsageError("--microphone and --rate: the one is for a microphone, the other for standard input, -")
    screen = _screen(output)
    if partials and isinstance(screen, _Lines):
        raise UsageError("--partials: these lines have final texts only; use --format jsonl, or a terminal")
    options = LiveOptions(pause_s=pause_s, partials=not isinstance(screen, _Lines) if partials is None else partials)
    opened = _opened(source, device_name, SAMPLE_RATE if rate is None else rate)
    folder = chosen(model, offline=offline)
    transcriber = load_model(folder, engine=engine.value, device=device, dtype=dtype.value, report=report)
    live, failed = LiveTranscriber(transcriber, options), 0
    try:
        with opened as inbox, _until_interrupted(inbox):
            if source is None:
                screen.note(f"listening to {inbox.name}; Ctrl-C ends it")
            for event in heard(live, inbox, note=screen.note):
                screen.show(event)
                failed += isinstance(event, Failed)
    finally:
        screen.close()
    if failed:
        raise typer.Exit(1)


def _opened(source: str | None, name: str | None, rate: int) -> AbstractContextManager[Inbox]:
    """Where sound will come from; what is wrong with it is told before a model is fetched and loaded."""
    return microphone.record(microphone.find_microphone(name)) if source is None else microphone.pipe(rate)


@contextmanager
def _until_interrupted(inbox: Inbox) -> Iterator[None]:
    """The first Ctrl-C ends the input, and what came is heard; the second one ends the program, as everywhere."""
    ended_s = math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended_s
        now_s = time.monotonic()
        if now_s - ended_s > AGAIN_S:
            signal.default_int_handler(number, frame)
        ended_s = min(ended_s, now_s)
        inbox.end()

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's, of a program in the background
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def heard(
    live: LiveTranscriber,
    inbox: Inbox,
    *,
    note: Callable[[str], object],
    stall_s: float = STALL_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """What is said in what comes, until its end.

    Args:
        live: hears it.
        inbox: where it comes.
        note: takes a line for the person, such as that the model is too slow.
        stall_s: without any input, after which an utterance is over.
        clock: gives seconds.

    Raises:
        AudioError: the input ended in an error; after the events of all that was said.
    """
    lag = _Lag(inbox, note, clock)
    is_settled = True
    while not inbox.is_over:
        data, waited_s = inbox.take(stall_s)
        if data:
            lag.tell(waited_s, live.num_samples)
            yield from live.add(inbox.pcm.add(data))
        elif not is_settled:
            yield from live.commit()
        is_settled = not data
    error = inbox.error
    try:
        yield from live.add(inbox.pcm.end())
    except AudioError as cut:
        error = error or cut
    yield from live.commit()
    if error is not None:
        raise error


class _Lag:
    """Tells once that samples were lost, and once that the model is too slow."""

    def __init__(self, inbox: Inbox, note: Callable[[str], object], clock: Callable[[], float]) -> None:
        self._inbox, self._note, self._clock = inbox, note, clock
        self._begun_s: float | None = None
        self._is_lossy = self._is_behind = False

    def tell(self, waited_s: float, num_samples: int) -> None:
        """After these seconds of waiting the next sample is heard, behind so many."""
        if self._inbox.overflows and not self._is_lossy:
            self._is_lossy = True
            self._note(f"{self._inbox.name}: samples were lost; this machine has too much to do")
        now_s = self._clock()
        if self._begun_s is None:
            self._begun_s = now_s
        # A file that comes faster than anybody speaks waits, too.
        is_slow = num_samples / SAMPLE_RATE < now_s - self._begun_s
        if is_slow and waited_s > BEHIND_S and not self._is_behind:
            self._is_behind = True
            self._note(f"the model is {waited_s:.0f} s behind what is said; use a smaller one, or --no-partials")


class _Screen(Protocol):
    """Where events are shown."""

    def show(self, event: Event) -> None:
        """What happened."""
        ...

    def note(self, line: str) -> None:
        """What is no result."""
        ...

    def close(self) -> None:
        """Leave nothing behind that is not final."""
        ...


def _screen(output: FormatChoice) -> _Screen:
    if output is FormatChoice.JSONL:
        return _Records()
    can_redraw = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return _Terminal(sys.stdout) if can_redraw else _Lines()


class _Lines:
    """A line for each final text."""

    def show(self, event: Event) -> None:
        text = _told(event)
        if text:
            print(text, flush=True)

    def note(self, line: str) -> None:
        report(line)

    def close(self) -> None:
        pass


def _told(event: Event) -> str:
    """The final text of an utterance, on one line; why there is none goes to standard error."""
    if isinstance(event, Failed):
        report(f"utterance {event.utterance}: {event.error}")
    return results.on_one_line(event.segment.text) if isinstance(event, Final) else ""


class _Records:
    """A JSON object for each event."""

    def show(self, event: Event) -> None:
        text = json.dumps(record(event), ensure_ascii=False, allow_nan=False)
        print(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)

    def note(self, line: str) -> None:
        report(line)

    def close(self) -> None:
        pass


def record(event: Event) -> dict[str, Any]:
    """An event for programs; times in seconds from the first sample."""
    match event:
        case SpeechStarted(utterance, start_s):
            return {"type": "speech_started", "utterance": utterance, "start": round(start_s, 4)}
        case Partial(utterance, stable, tentative):
            return {"type": "partial", "utterance": utterance, "stable": stable, "tentative": tentative}
        case SpeechStopped(utterance, end_s):
            return {"type": "speech_stopped", "utterance": utterance, "end": round(end_s, 4)}
        case Final(utterance, segment):
            told = results.segment_record(utterance, segment) | results.word_records(segment)
            return {"type": "final", "utterance": utterance, "segment": told}
        case Failed(utterance, error):
            return {"type": "failed", "utterance": utterance, "error": str(error)}


class _Terminal:
    """A line for each final text, and below them the utterance in the making: what may change is dim."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._stable = self._tentative = ""

    def show(self, event: Event) -> None:
        if isinstance(event, Partial):
            self._stable, tentative = results.on_one_line(event.stable), results.on_one_line(event.tentative)
            self._tentative = results.added(self._stable, tentative)
            self._draw()
        elif isinstance(event, Final | Failed):
            self._stable = self._tentative = ""
            self._draw()
            text = _told(event)
            self._write(text + "\n" if text else "")

    def note(self, line: str) -> None:
        self._write(_ERASE)
        report(line)
        self._draw()

    def close(self) -> None:
        self._write(_ERASE)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1  # in the last one, some terminals go on to the next line
        stable, tentative = fitted(self._written(self._stable), self._written(self._tentative), width)
        self._write(f"{_ERASE}{stable}{_DIM}{tentative}{_PLAIN}" if stable or tentative else _ERASE)

    def _written(self, text: str) -> str:
        """What a terminal gets that lacks some of the characters; it may be longer."""
        encoding = self._out.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def fitted(stable: str, tentative: str, width: int) -> tuple[str, str]:
    """As much of the end of both together as a line has columns for."""
    text = stable + tentative
    widths = [layout.columns(character) for character in text]
    first = len(text) - sum(total <= width for total in accumulate(reversed(widths)))
    while first < len(text) and widths[first] == 0:  # a mark whose letter is cut off
        first += 1
    return stable[first:], tentative[max(0, first - len(stable)) :]
