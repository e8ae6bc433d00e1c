"""`ark-asr listen`: real speech through the program as a user starts it, and everything else around a recognizer."""

import ast
import fcntl
import importlib.util
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from arkasr import cli_listen, layout, microphone
from arkasr.audio import Waveform
from arkasr.cli_listen import fitted, heard
from arkasr.errors import AudioError, NoAnswerError
from arkasr.live import Event, Failed, Final, Partial, SpeechStarted, SpeechStopped
from arkasr.microphone import Inbox
from arkasr.results import Segment
from conftest import Run

PROGRAM = Path(sys.executable).with_name("ark-asr")
CLIPS = Path(__file__).parents[1] / "examples" / "audio"
RUBOUT, PATTERSON = "RUBOUT G M E F THREE NINE", "P A T T E R S O N"
PIECE_S = 0.02


def pcm(name: str | Path, rate: int = 16_000) -> bytes:
    """A recording of AN4 as raw PCM."""
    samples, own_rate = soundfile.read(CLIPS / f"an4-{name}.flac" if isinstance(name, str) else name)
    at_rate = soxr.resample(samples, own_rate, rate)
    return bytes((np.clip(at_rate, -1, 1) * 32_767).astype("<i2").tobytes())


def silence(seconds: float, rate: int = 16_000) -> bytes:
    return bytes(2 * round(seconds * rate))


@pytest.fixture(scope="module")
def two() -> bytes:
    """Two utterances, and a pause between them."""
    return pcm("rubout") + silence(0.6) + pcm("patterson")


class FakeLive:
    """Notes what it is asked, and says that; `work` is told how many seconds it hears."""

    def __init__(self, work: Callable[[float], object] = lambda _: None) -> None:
        self.asked: list[str] = []
        self.num_samples = 0
        self._work = work

    def add(self, waveform: Waveform) -> Iterator[Event]:
        self._work(len(waveform) / 16_000)
        self.num_samples += len(waveform)
        if len(waveform):
            self.asked.append(f"add {len(waveform)}")
            yield Partial(0, str(len(waveform)), "")

    def commit(self) -> Iterator[Event]:
        self.asked.append("commit")
        yield Final(0, Segment(0.0, 1.0, "over"))


def given_to(inbox: Inbox, live: FakeLive, **options: Any) -> tuple[list[Event], list[str]]:
    """Events and notes of all that comes."""
    notes: list[str] = []
    return list(heard(live, inbox, note=notes.append, **options)), notes  # type: ignore[arg-type]


# ---- the program ----


def start(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [str(PROGRAM), "listen", "-", "--model", "tiny", *arguments]
    environment = {**os.environ, "COLUMNS": "30", "TERM": "xterm"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, env=environment, bufsize=0
    )


def test_piped_speech_a_stall_and_ctrl_c(two: bytes) -> None:
    """Each line is there when its utterance is over, though the pipe stays open; Ctrl-C finishes the last one."""
    with start() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(two)
        assert process.stdout.readline().decode() == f"{RUBOUT}\n"
        assert process.stdout.readline().decode() == f"{PATTERSON}\n"
        process.stdin.write(pcm("rubout")[:32_000])
        while fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)) != bytes(4):  # bytes that nobody has read
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().decode() == "RUBOUT\n"
        assert process.wait(5) == 0
        assert process.stderr.read() == b""


def test_speech_at_the_speed_of_speech_on_a_terminal(shared: Path) -> None:
    """What is stable is never taken back, and the final text replaces it all."""
    terminal, end = pty.openpty()
    shown = io.BytesIO()

    def read() -> None:
        while True:
            try:
                shown.write(os.read(terminal, 4_096))
            except OSError:  # the program has gone
                return

    reader = threading.Thread(target=read)
    with start(stdout=end) as process:
        os.close(end)
        reader.start()
        assert process.stdin is not None
        began_s = time.monotonic()
        data, size = pcm(shared / "speech/an4/mjgm/cen2-mjgm-b.flac"), 2 * round(PIECE_S * 16_000)
        for number, at in enumerate(range(0, len(data), size)):
            time.sleep(max(0.0, began_s + number * PIECE_S - time.monotonic()))
            process.stdin.write(data[at : at + size])
        process.stdin.close()
        assert process.wait(5) == 0
    reader.join(5)
    os.close(terminal)
    text = shown.getvalue().decode()
    assert text.endswith("\r\x1b[KJ O H N\r\n\r\x1b[K")
    drawn = [line.partition("\x1b[2m") for line in text.split("\r\x1b[K") if "\x1b[2m" in line]
    assert len(drawn) >= 2
    stable = [line for line, _, _ in drawn]
    assert all(after.startswith(before) for before, after in pairwise([*stable, "J O H N"]))
    assert any(tentative.removesuffix("\x1b[0m") for _, _, tentative in drawn)


def test_a_reader_that_has_gone(two: bytes) -> None:
    """As `ark-asr listen - | head -1`."""
    with start() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(two)
        process.stdin.close()
        assert process.wait(5) == 1
        assert process.stderr.read() == b""


# ---- what is piped in ----


@pytest.fixture
def piped(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str], list[str]]]:
    """piped(bytes, options...) -> exit code, lines of stdout, lines of stderr; in this process."""

    def listen(content: bytes, *options: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
        return run("listen", "-", "--model", "tiny", *options)

    return listen


Piped = Callable[..., tuple[int, list[str], list[str]]]


def test_several_at_once(piped: Piped, two: bytes) -> None:
    assert piped(two) == (0, [RUBOUT, PATTERSON], [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates(piped: Piped, rate: int) -> None:
    code, out, err = piped(pcm("patterson", rate), "--rate", str(rate))
    assert (code, err) == (0, [])
    assert out == [PATTERSON] or rate == 8_000  # which tiny was not made for
    assert len(out) == 1


def test_half_a_sample_at_the_end(piped: Piped) -> None:
    code, out, err = piped(pcm("patterson") + b"\x01")
    assert (code, out, len(err)) == (1, [PATTERSON], 1)
    assert err[0].startswith("ark-asr: standard input: ended in the middle of a sample")


def test_nobody_speaks(piped: Piped) -> None:
    noise = np.random.default_rng(0).normal(0, 30, 48_000).astype("<i2").tobytes()
    assert piped(silence(2) + noise) == (0, [], [])
    assert piped(b"\0\0") == (0, [], [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty (0 bytes)"),
        *[(magic + bytes(100), "an audio file, not raw PCM") for magic in (b"RIFF", b"fLaC", b"OggS", b"ID3")],
    ],
)
def test_what_is_no_pcm(piped: Piped, content: bytes, said: str) -> None:
    code, out, err = piped(content)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith(f"ark-asr: standard input: {said}")


def test_events_as_json(piped: Piped, two: bytes) -> None:
    code, out, err = piped(two, "--format", "jsonl")
    assert (code, err) == (0, [])
    events = [json.loads(line) for line in out]
    kinds = [(event["type"], event["utterance"]) for event in events if event["type"] != "partial"]
    assert kinds == [(kind, n) for n in range(2) for kind in ("speech_started", "speech_stopped", "final")]
    finals = [event["segment"] for event in events if event["type"] == "final"]
    assert [final["text"] for final in finals] == [RUBOUT, PATTERSON]
    clip_s = len(pcm("rubout")) / 32_000
    assert 0 < finals[0]["start"] < finals[0]["end"] <= clip_s < clip_s + 0.6 < finals[1]["start"]
    for event, final in zip([event for event in events if "start" in event], finals, strict=True):
        assert event["start"] == pytest.approx(final["start"], abs=0.05)
        assert [word["word"] for word in final["words"]] == final["text"].split()
        assert all(final["start"] <= word["start"] <= word["end"] <= final["end"] for word in final["words"])
    only_finals = [line for line in piped(two, "--format", "jsonl", "--no-partials")[1] if '"partial"' in line]
    assert only_finals == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("some.wav",), "some.wav: listen takes - or nothing; for files there is `ark-asr transcribe`"),
        (("-", "--microphone", "0"), "--microphone and --rate"),
        (("--rate", "8000"), "--microphone and --rate"),
        (("-", "--partials"), "--partials: these lines have final texts only"),
        (("-", "--pause-s", "0"), "pause_s is 0.0"),
        (("-", "--rate", "10"), "standard input: sample rate 10 Hz is outside"),
    ],
)
def test_options_that_do_not_fit(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("listen", *arguments)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith(f"ark-asr: {said}")


def test_nothing_to_read_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for stdin, said in ((None, "closed"), (SimpleNamespace(isatty=lambda: True), "a terminal")):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = run("listen", "-")
        assert (code, out, len(err)) == (1, [], 1)
        assert err[0].startswith(f"ark-asr: standard input: {said}; pipe raw PCM into it")


def test_a_pipe_that_fails_tells_so_after_the_text() -> None:
    """As a directory does, or a disk; and a pipe that somebody set not to wait gives nothing now and then."""
    blocks = iter([bytes(640), None, bytes(320)])

    def read(_: int) -> bytes | None:
        block = next(blocks, b"")
        if block == b"":
            raise OSError(5, "Input/output error")
        return block

    inbox, live = Inbox("standard input", 16_000, most_s=1), FakeLive()
    microphone._read(read, inbox)
    with pytest.raises(AudioError, match=r"^standard input: cannot be read \(Input/output error\)"):
        given_to(inbox, live)
    assert (live.num_samples, live.asked[-1]) == (480, "commit")


# ---- between the thread that brings it and the one that hears it ----


@given(st.lists(st.binary(max_size=300), max_size=30), st.integers(1, 200))
def test_a_fast_writer_waits_and_nothing_is_lost(blocks: list[bytes], most: int) -> None:
    inbox = Inbox("it", 16_000, most_s=most / 16_000)

    def write() -> None:
        for block in blocks:
            assert inbox.put(block, wait=True)
        inbox.end()

    writer = threading.Thread(target=write)
    writer.start()
    taken = []
    while not inbox.is_over:
        taken.append(inbox.take(1)[0])
        assert len(taken[-1]) < 2 * most + 300
    writer.join()
    assert b"".join(taken) == b"".join(blocks)
    assert not inbox.put(b"more", wait=True)


def test_who_waits_for_room_is_let_go_at_the_end() -> None:
    inbox = Inbox("it", 16_000, most_s=0.01)
    outcomes: list[bool] = []
    writer = threading.Thread(target=lambda: outcomes.extend(inbox.put(bytes(320), wait=True) for _ in range(2)))
    writer.start()
    while not outcomes:
        time.sleep(0.001)
    inbox.end()
    writer.join(5)
    assert outcomes == [True, False]
    assert (inbox.take(0)[0], inbox.is_over) == (bytes(320), True)


def test_a_stall_ends_an_utterance_once_and_listening_goes_on() -> None:
    inbox, live = Inbox("it", 16_000, most_s=1), FakeLive()
    events = heard(live, inbox, note=pytest.fail, stall_s=0.02)  # type: ignore[arg-type]
    for _ in range(2):
        inbox.put(bytes(100), wait=False)
        assert next(events) == Partial(0, "50", "")
        assert isinstance(next(events), Final)
    threading.Timer(0.1, inbox.end).start()
    assert len(list(events)) == 1
    assert live.asked == ["add 50", "commit", "add 50", "commit", "commit"]


@pytest.mark.parametrize(("work_s", "notes"), [(0.9, []), (2.0, ["the model is 7 s behind what is said"])])
def test_a_model_that_is_too_slow_is_told_of_once(work_s: float, notes: list[str]) -> None:
    """Each second of speech comes when it was said, and takes some time to hear."""
    now_s = said_s = 0.0

    def work(seconds: float) -> None:
        nonlocal now_s, said_s
        until_s = max(now_s + work_s * seconds, said_s + 1)  # who is done waits for the next second
        while said_s + 1 <= until_s:
            now_s = said_s = said_s + 1
            inbox.put(silence(1), wait=False)
        now_s = until_s
        if now_s > 60:
            inbox.end()

    inbox = Inbox("it", 16_000, most_s=600, clock=lambda: now_s)
    inbox.put(silence(1), wait=False)
    told = given_to(inbox, FakeLive(work), stall_s=0, clock=lambda: now_s)[1]
    assert [line.partition(";")[0] for line in told] == notes


def test_only_who_is_slower_than_speech_is_behind() -> None:
    for hearing_s, told in ((12.0, True), (9.0, False)):
        now_s = 0.0

        def clock() -> float:
            return now_s  # noqa: B023 - of this round

        inbox = Inbox("it", 16_000, most_s=10, clock=clock)
        notes: list[str] = []
        events = heard(FakeLive(), inbox, note=notes.append, clock=clock)  # type: ignore[arg-type]
        for _ in range(9):  # a file: ten seconds are there as soon as there is room
            inbox.put(silence(10), wait=False)
            now_s += hearing_s
            next(events)
        assert len(notes) == told
        assert not told or notes[0].startswith("the model is 12 s behind what is said")


def test_a_second_ctrl_c_ends_the_program_and_one_that_comes_twice_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox("it", 16_000, most_s=1)
    with cli_listen._until_interrupted(inbox):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert inbox.is_over
        monkeypatch.setattr(cli_listen, "AGAIN_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_in_the_background_leaves_ctrl_c_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cli_listen._until_interrupted(Inbox("it", 16_000, most_s=1)):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---- what is shown ----

HOSTILE = "a\x1b[2Jb\x9bc\x00\r\nd\x85\x7f"


class Out(io.TextIOWrapper):
    """A terminal's end of a text, in memory."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")

    @property
    def text(self) -> str:
        """All that was written."""
        self.flush()
        written: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return written.decode(self.encoding)


def shown(*events: Event, encoding: str = "utf-8") -> str:
    out = Out(encoding)
    terminal = cli_listen._Terminal(out)
    for event in events:
        terminal.show(event)
    return out.text


def final(text: str) -> Final:
    return Final(0, Segment(0.0, 1.0, text))


def test_no_control_of_the_text_reaches_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(Partial(0, HOSTILE, HOSTILE), final(HOSTILE))
    clean = "a [2Jb c d"
    assert text == f"\r\x1b[K{clean}\x1b[2m {clean}\x1b[0m\r\x1b[K{clean}\n"
    cli_listen._Lines().show(final(HOSTILE))
    assert capsys.readouterr().out == f"{clean}\n"
    cli_listen._Records().show(final(HOSTILE))
    line = capsys.readouterr().out
    assert re.search(r"[\x00-\x1f\x7f-\x9f]", line.removesuffix("\n")) is None
    assert json.loads(line)["segment"]["text"] == HOSTILE


def test_the_end_of_a_long_line_is_shown_and_all_of_the_final_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    text = shown(
        Partial(0, "one two three", "four five"), Partial(0, "東京の天気", "は晴れ"), final("one two three four")
    )
    assert text == ("\r\x1b[Ke\x1b[2m four five\x1b[0m\r\x1b[K天気\x1b[2mは晴れ\x1b[0m\r\x1b[Kone two three four\n")


def test_a_terminal_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "15")
    assert shown(Partial(0, "naïve", "東京"), encoding="ascii") == "\r\x1b[Ke\x1b[2m \\u6771\\u4eac\x1b[0m"


def test_lines_for_the_person_stand_above_the_one_in_the_making(capsys: pytest.CaptureFixture[str]) -> None:
    out = Out()
    terminal = cli_listen._Terminal(out)
    terminal.show(Partial(0, "one", ""))
    terminal.note("too slow")
    terminal.show(Failed(0, NoAnswerError("nobody there")))
    terminal.close()
    line = "\r\x1b[Kone\x1b[2m\x1b[0m"
    assert out.text == f"{line}\r\x1b[K{line}\r\x1b[K\r\x1b[K"
    assert capsys.readouterr().err == "ark-asr: too slow\nark-asr: utterance 0: nobody there\n"


letters = st.text(st.sampled_from("ab 東\u0301\u200d"), max_size=30)


@given(letters, letters, st.integers(0, 30))
def test_as_much_of_the_end_as_fits(stable: str, tentative: str, width: int) -> None:
    kept = "".join(fitted(stable, tentative, width))
    text = stable + tentative
    assert text.endswith(kept)
    assert sum(map(layout.columns, kept)) <= width
    assert not kept or layout.columns(kept[0]) > 0
    left = text.removesuffix(kept).rstrip("\u0301\u200d")
    assert not left or sum(map(layout.columns, left[-1] + kept)) > width
    first, second = fitted(stable, tentative, width)
    assert stable.endswith(first)
    assert tentative.endswith(second)


def test_what_is_told_of_each_event() -> None:
    told = [
        cli_listen.record(event)
        for event in (
            SpeechStarted(3, 1.23456),
            Partial(3, "a", "b"),
            SpeechStopped(3, 2),
            Failed(3, NoAnswerError("no")),
        )
    ]
    assert told == [
        {"type": "speech_started", "utterance": 3, "start": 1.2346},
        {"type": "partial", "utterance": 3, "stable": "a", "tentative": "b"},
        {"type": "speech_stopped", "utterance": 3, "end": 2},
        {"type": "failed", "utterance": 3, "error": "no"},
    ]


# ---- the microphone ----


class PortAudioError(Exception):
    """As sounddevice's."""


class CallbackAbort(Exception):  # noqa: N818 - its name there
    """As sounddevice's."""


class FakeStream:
    """A microphone that hears what it is given, as fast as it is taken, in a thread as PortAudio's."""

    def __init__(self, device: Any, callback: Callable[..., None], finished_callback: Callable[[], None]) -> None:
        self._device, self._callback, self._finished = device, callback, finished_callback
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        if self._device.broken:
            raise PortAudioError("Error starting stream: Device unavailable [PaErrorCode -9985]")
        self._thread.start()

    def _run(self) -> None:
        for at in range(0, len(self._device.hears), 1_024):
            block = memoryview(self._device.hears)[at : at + 1_024]
            status = SimpleNamespace(input_overflow=self._device.overflows)
            try:
                self._callback(block, len(block) // 2, SimpleNamespace(), status)
            except CallbackAbort:
                self._device.num_aborted += 1
                break
        if not self._device.is_unplugged:
            self._device.then()
            self._closed.wait(20)
        self._finished()

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(5)


class FakeSounddevice(ModuleType):
    """The part of sounddevice that is used, with devices of our own."""

    PortAudioError, CallbackAbort = PortAudioError, CallbackAbort

    def __init__(self, *names: str) -> None:
        super().__init__("sounddevice")
        self.names, self.rates = names, {16_000, 44_100}
        self.hears, self.overflows, self.broken, self.is_unplugged = b"", False, False, False
        self.then: Callable[[], object] = lambda: None
        self.num_aborted = 0
        self.opened: list[tuple[int, int, int, str]] = []

    def query_devices(self, device: int | str | None = None, kind: str | None = None) -> Any:
        every: list[dict[str, Any]] = [
            {
                "name": name,
                "index": n,
                "hostapi": 0,
                "max_input_channels": name != "Speaker",
                "default_samplerate": 44_100.0,
            }
            for n, name in enumerate(self.names)
        ]
        if device is None and kind is None:
            return tuple(every)
        if device is None:
            device = 1 if len(every) > 1 else -1
        if isinstance(device, int):
            if not 0 <= device < len(every):
                raise PortAudioError(f"Error querying device {device}")
            if not every[device]["max_input_channels"]:
                raise ValueError(f"Not an input device: {every[device]['name']!r}")
            return every[device]
        found = [each for each in every if device.lower() in each["name"].lower() and each["max_input_channels"]]
        if not found:
            raise ValueError(f"No input device matching {device!r}")
        if len(found) > 1:
            raise ValueError(f"Multiple input devices found for {device!r}:\n[1] one\n[2] other")
        return found[0]

    def query_hostapis(self, index: int | None = None) -> Any:
        return {"name": "ALSA"}

    def RawInputStream(  # noqa: N802 - its name there
        self, *, samplerate: int, device: int, channels: int, dtype: str,
        callback: Callable[..., None], finished_callback: Callable[[], None],
    ) -> FakeStream:  # fmt: skip
        if samplerate not in self.rates:
            raise PortAudioError("Error opening RawInputStream: Invalid sample rate [PaErrorCode -9997]")
        self.opened.append((samplerate, device, channels, dtype))
        return FakeStream(self, callback, finished_callback)


@pytest.fixture(name="device")
def _device(monkeypatch: pytest.MonkeyPatch) -> FakeSounddevice:
    """A machine with a loudspeaker and two microphones; the first of them is the default."""
    fake = FakeSounddevice("Speaker", "USB Mic", "Webcam Mic")
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def test_the_stand_in_is_called_as_the_real_one() -> None:
    """Read, and not imported: that needs PortAudio."""
    found = importlib.util.find_spec("sounddevice")
    if found is None or found.origin is None:
        if "CI" in os.environ:
            pytest.fail("sounddevice is missing, and CI must run this test")
        pytest.skip("sounddevice is missing")
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    parts = {part.name: part for part in tree.body if isinstance(part, ast.ClassDef | ast.FunctionDef)}
    opener = next(part for part in parts["RawInputStream"].body if getattr(part, "name", "") == "__init__")
    assert isinstance(opener, ast.FunctionDef)
    names = {argument.arg for argument in opener.args.args}
    assert names >= {"samplerate", "device", "channels", "dtype", "callback", "finished_callback"}
    queries = [parts["query_devices"], parts["query_hostapis"]]
    asked = [[argument.arg for argument in query.args.args] for query in queries if isinstance(query, ast.FunctionDef)]
    assert asked == [["device", "kind"], ["index"]]
    assert {"PortAudioError", "CallbackAbort", "CallbackFlags"} <= parts.keys()


def interrupt() -> None:
    """Ctrl-C, once somebody listens."""
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_microphone_until_ctrl_c(run: Run, device: FakeSounddevice, two: bytes) -> None:
    device.hears, device.then = two, interrupt
    code, out, err = run("listen", "--model", "tiny")
    assert (code, out) == (0, [RUBOUT, PATTERSON])
    assert err == ["ark-asr: listening to microphone USB Mic (ALSA); Ctrl-C ends it"]
    assert device.opened == [(16_000, 1, 1, "int16")]


def test_a_microphone_that_refuses_16_khz_and_is_unplugged(run: Run, device: FakeSounddevice) -> None:
    device.rates, device.hears, device.is_unplugged = {44_100}, pcm("patterson", 44_100), True
    code, out, err = run("listen", "--model", "tiny", "--microphone", "webcam")
    assert (code, out) == (1, [PATTERSON])
    assert err[1:] == ["ark-asr: microphone Webcam Mic (ALSA): gave no more; see whether it is still plugged in"]
    assert device.opened == [(44_100, 2, 1, "int16")]


def test_samples_that_were_lost_are_told_of_once(run: Run, device: FakeSounddevice) -> None:
    device.hears, device.overflows, device.then = silence(3), True, interrupt
    code, out, err = run("listen", "--model", "tiny", "--microphone", "1")
    assert (code, out) == (0, [])
    assert err[1:] == ["ark-asr: microphone USB Mic (ALSA): samples were lost; this machine has too much to do"]


def test_a_microphone_that_is_ten_minutes_ahead_ends_in_an_error(device: FakeSounddevice) -> None:
    device.hears = silence(700)
    with microphone.record(microphone.find_microphone()) as inbox:
        while inbox.error is None:
            time.sleep(0.001)
        taken, _ = inbox.take(0)
    assert 600 <= len(taken) / 32_000 < 601
    assert (inbox.is_over, device.num_aborted) == (True, 1)
    assert str(inbox.error).startswith("microphone USB Mic (ALSA): 10 minutes of it wait to be heard")


@pytest.mark.usefixtures("device")
def test_microphones_are_listed(run: Run) -> None:
    expected = ["1\t44100 Hz\tUSB Mic (ALSA)", "2\t44100 Hz\tWebcam Mic (ALSA)"]
    assert run("listen", "--list-microphones") == (0, expected, [])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("9", "Error querying device 9"),
        ("0", "Not an input device: 'Speaker'"),
        ("radio", "No input device matching 'radio'"),
        ("mic", "Multiple input devices found for 'mic'"),
    ],
)
@pytest.mark.usefixtures("device")
def test_no_such_microphone(run: Run, name: str, why: str) -> None:
    said = f"ark-asr: --microphone {name}: {why}; see `ark-asr listen --list-microphones`"
    assert run("listen", "--microphone", name) == (1, [], [said])


def test_microphones_that_cannot_be_used(run: Run, device: FakeSounddevice) -> None:
    device.broken = True
    code, out, err = run("listen", "--model", "tiny")
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith("ark-asr: microphone USB Mic (ALSA): Error starting stream: Device unavailable")
    device.rates = set()
    code, out, err = run("listen", "--model", "tiny")
    assert (code, out, len(err)) == (1, [], 1)
    assert "cannot be opened (Error opening RawInputStream: Invalid sample rate" in err[0]
    device.names = ()
    assert run("listen")[2] == [
        "ark-asr: no microphone was found; plug one in, or pipe raw PCM into `ark-asr listen -`"
    ]


def test_what_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert run("listen") == (1, [], ["ark-asr: the microphone needs sounddevice; pip install 'arkasr[mic]'"])
    monkeypatch.delitem(sys.modules, "sounddevice")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = run("listen", "--list-microphones")
    assert (code, out, len(err)) == (1, [], 1)
    assert "PortAudio (PortAudio library not found); apt install libportaudio2" in err[0]


@pytest.mark.slow
@pytest.mark.skipif(find_library("portaudio") is None, reason="PortAudio is not installed")
def test_the_real_sounddevice(tmp_path: Path) -> None:
    """ALSA plays a file as its microphone, then silence, as fast as both are taken: ten minutes are there at once."""
    (tmp_path / "speech.raw").write_bytes(pcm("rubout"))
    (tmp_path / "asound.conf").write_text(
        f'pcm.!default {{ type file slave.pcm null file /dev/null infile "{tmp_path}/speech.raw" format raw }}\n'
        "pcm.null { type null }\nctl.!default { type null }\n"
    )
    environment = {**os.environ, "ALSA_CONFIG_PATH": str(tmp_path / "asound.conf")}
    done = subprocess.run(
        [PROGRAM, "listen", "--model", "tiny"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f"{RUBOUT}\n"
    told = done.stderr.splitlines()
    assert told[0] == "ark-asr: listening to microphone default (ALSA); Ctrl-C ends it"
    assert "10 minutes of it wait to be heard" in told[-1]
    assert done.returncode == 1
