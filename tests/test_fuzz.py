"""Damaged recordings, any arrays and any texts, from decoding to writing: a result or an ArkASRError, in bounded time.

Files are decoded in a child (`Child`), for a hang, a crash or a flood inside the decoders' C code would take the tests
along. A case is its seed: `attempt(17)` in a shell repeats case 17.
"""

import ctypes
import io
import json
import math
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import arkasr
from arkasr import results, segment
from arkasr.audio import HOP_SAMPLES, SAMPLE_RATE, AudioSource
from arkasr.engines import MAX_NEW_TOKENS, DecodeOptions, Generation
from arkasr.errors import ArkASRError
from arkasr.results import Segment, SubtitleOptions, Transcript
from arkasr.text import TextRules
from arkasr.transcribe import Transcriber
from conftest import SHARED, byte_tokenizer, small_config
from test_audio import encoded, encoded_with_av

CASES, CASES_BY_DEFAULT, CASES_A_TEST = 20_000, 1_000, 1_000
LIMIT_S, LIMIT_MIB, MAPPED_MIB = 10.0, 500, 4_000
REAL_ENGINE_EVERY, NO_VAD_EVERY = 100, 4
MIB = 2**20
MAX_MESSAGE_CHARS = 500
PRELOAD = [
    "arkasr.engines.onnx",
    "arkasr.model",
    "transformers.models.whisper.feature_extraction_whisper",
    "hypothesis",
]

Bytes = bytes | bytearray
Any_ = npt.NDArray[Any]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("shared"),
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and limits of Linux"),
]


# ---- an engine that may say anything ----


class RandomEngine:
    """Says for each clip what a network could: nothing, anything, too much, the same over and over."""

    def __init__(self, rules: TextRules, seed: int) -> None:
        self._allowed = np.flatnonzero(rules.allowed_ids)
        self._rng = np.random.default_rng(seed)

    def generate(self, waveforms: Sequence[Any_], options: DecodeOptions) -> list[Generation]:
        for waveform in waveforms:
            assert waveform.dtype == np.float32
            assert waveform.ndim == 1
            assert HOP_SAMPLES <= len(waveform) <= segment.MAX_SAMPLES
            assert np.isfinite(waveform).all()
        return [self._generation(options.token_cap(len(waveform))) for waveform in waveforms]

    def _generation(self, cap: int) -> Generation:
        rng = self._rng
        unit = rng.choice(self._allowed, rng.integers(0, 40))
        ids = np.tile(unit, rng.choice([1, 1, 10]))[: rng.integers(cap + 1)].tolist()
        logprobs = -rng.exponential(rng.choice([1e-3, 1, 1e4]), len(ids))
        stop = None if rng.random() < 0.2 else -float(rng.exponential())
        return Generation(tuple(ids), tuple(logprobs.tolist()), stop, {"decode": 0.1})


@lru_cache(maxsize=1)
def byte_rules() -> TextRules:
    config = small_config(byte_tokenizer())
    return TextRules(
        byte_tokenizer(), vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids, place="test_fuzz"
    )


@lru_cache(maxsize=1)
def real_transcriber() -> Transcriber:
    return arkasr.load_model("tiny", device="cpu")


def transcriber(seed: int) -> Transcriber:
    return Transcriber(RandomEngine(byte_rules(), seed), byte_rules())


def check(transcript: Transcript, options: SubtitleOptions | None = None) -> None:
    """A transcript is in the order of time, within the audio, and every format holds it."""
    assert math.isfinite(transcript.duration_s)
    before_s = 0.0
    for one in transcript.segments:
        assert before_s <= one.start_s <= one.end_s <= transcript.duration_s + 1e-9, one
        assert 0 <= one.no_speech_probability <= 1, one
        assert 0 <= one.confidence <= 1, one
        before_s = one.start_s
    write(transcript, options)


def write(transcript: Transcript, options: SubtitleOptions | None = None) -> None:
    for name, writer in results.WRITERS.items():
        out = io.StringIO()
        writer(transcript, out, options or SubtitleOptions())
        out.getvalue().encode("utf-8", "backslashreplace")  # as files.write_text_atomically
        if name == "json":
            json.loads(out.getvalue())


def check_error(error: ArkASRError) -> None:
    message = str(error)
    assert message.isprintable(), repr(message)
    assert 0 < len(message) <= MAX_MESSAGE_CHARS, message


# ---- real recordings in every container ----

SOUNDFILE_KINDS = (
    ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
    ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAV", "GSM610"), ("WAVEX", "PCM_16"),
    ("RF64", "PCM_16"), ("W64", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("AU", "ALAW"),
    ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("NIST", "PCM_16"), ("VOC", "PCM_16"), ("SVX", "PCM_16"), ("PAF", "PCM_16"),
    ("IRCAM", "PCM_16"), ("MAT5", "FLOAT"), ("HTK", "PCM_16"), ("PVF", "PCM_16"), ("XI", "DPCM_16"), ("SDS", "PCM_16"),
    ("AVR", "PCM_16"), ("MPC2K", "PCM_16"),
)  # fmt: skip
AV_KINDS = (
    ("mp4", "aac"), ("matroska", "libopus"), ("webm", "libopus"), ("adts", "aac"), ("mp3", "libmp3lame"),
    ("mov", "alac"),
)  # fmt: skip
# What people have counts twice.
KINDS = SOUNDFILE_KINDS + AV_KINDS + SOUNDFILE_KINDS[:23] + AV_KINDS
CLIPS = 12
MONO_ONLY = {"SVX", "HTK", "XI", "SDS"}


@lru_cache(maxsize=1)
def clips() -> tuple[tuple[Any_, int], ...]:
    """Words and sentences of 0.3 to 5 s at 8 and 16 kHz."""
    speech = SHARED / "speech"
    chosen = []
    for name, count in (("an4", CLIPS * 2 // 3), ("fsdd", CLIPS // 3)):
        lines = [
            json.loads(line) for line in (speech / name / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        short = [line for line in lines if line["duration"] <= 5]
        chosen += [speech / name / line["audio"] for line in random.Random(name).sample(short, count)]
    return tuple(soundfile.read(path, dtype="float32") for path in chosen)


@cache
def original(clip: int, kind: tuple[str, str], channels: int) -> bytes:
    samples, rate = clips()[clip]
    container, codec = kind
    if kind in AV_KINDS:
        wide = np.ascontiguousarray(soxr.resample(samples, rate, 48_000), np.float32)
        try:
            return encoded_with_av(wide, 48_000, kind=container, codec=codec)
        except (ValueError, OSError):  # a build of PyAV without this codec, or which wants other samples
            return encoded(samples, rate)
    if container not in MONO_ONLY and codec != "GSM610":
        samples = np.stack([samples] * channels, axis=1)
    return encoded(samples, rate, kind=container, subtype=codec)


# ---- mutations ----


def flip_bits(data: bytearray, rng: random.Random, _: bytes) -> None:
    for _n in range(2 ** rng.randrange(8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def spoil_header(data: bytearray, rng: random.Random, _: bytes) -> None:
    start, width = rng.randrange(min(len(data), 200)), rng.choice([1, 2, 4, 8])
    data[start : start + width] = bytes([rng.choice([0, 1, 127, 128, 255])]) * len(data[start : start + width])


def spoil_number(data: bytearray, rng: random.Random, _: bytes) -> None:
    """A field of the header becomes a number on some border."""
    number = rng.choice([0, 1, 2, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
    start = rng.randrange(0, min(len(data), 120), 2)
    field = struct.pack(rng.choice("<>") + "I", number)
    data[start : start + 4] = field[: len(data) - start]


def cut_end(data: bytearray, rng: random.Random, _: bytes) -> None:
    del data[rng.randrange(1, len(data)) if rng.random() < 0.5 else rng.randrange(1, min(len(data), 400)) :]


def cut_out(data: bytearray, rng: random.Random, _: bytes) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 2, 7, 512, 5_000])]


def put_in(data: bytearray, rng: random.Random, _: bytes) -> None:
    start, size = rng.randrange(len(data)), rng.choice([1, 2, 7, 512, 5_000])
    data[start:start] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])


def duplicate(data: bytearray, rng: random.Random, _: bytes) -> None:
    start, size = rng.randrange(len(data)), rng.choice([4, 64, 1_024, 20_000])
    chunk = bytes(data[start : start + size]) * rng.choice([1, 1, 5])
    at = rng.randrange(len(data))
    data[at:at] = chunk


def overwrite(data: bytearray, rng: random.Random, _: bytes) -> None:
    start, size = rng.randrange(len(data)), rng.choice([16, 256, 4_096])
    data[start : start + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])


def swap_halves(data: bytearray, rng: random.Random, _: bytes) -> None:
    at = rng.choice([len(data) // 2, rng.randrange(len(data))])
    data[:] = data[at:] + data[:at]


def append(data: bytearray, rng: random.Random, other: bytes) -> None:
    data += rng.choice([other, bytes(data), other[: len(other) // 2]])


def graft(data: bytearray, rng: random.Random, other: bytes) -> None:
    """The header of the one and the rest of the other."""
    at = rng.randrange(1, 200)
    data[:] = data[:at] + other[rng.choice([at, rng.randrange(len(other))]) :]


MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    flip_bits, spoil_header, spoil_number, cut_end, cut_out, put_in, duplicate, overwrite, swap_halves, append, graft,
)  # fmt: skip


def mutated(seed: int) -> bytes:
    """The file of a case: a real recording after one to three mutations."""
    rng = random.Random(seed)

    def drawn() -> bytes:
        return original(rng.randrange(CLIPS), rng.choice(KINDS), rng.choice([1, 1, 2]))

    data, other = bytearray(drawn()), drawn()
    for mutate in rng.choices(MUTATIONS, k=rng.choice([1, 1, 2, 3])):
        if len(data) > 1:
            mutate(data, rng, other)
    return bytes(data)


# ---- a child that decodes, hears and writes ----


def attempt(seed: int) -> str:
    """One case from file to formats: "" where there is a transcript, else the message of an ArkASRError."""
    data = mutated(seed)
    how = random.Random(f"how {seed}")
    recognizer = transcriber(seed) if seed % REAL_ENGINE_EVERY else real_transcriber()
    with tempfile.NamedTemporaryFile(suffix=how.choice([".wav", ".mp3", ".flac", ".raw", ""])) as file:
        file.write(data)
        file.flush()
        sources: list[AudioSource] = [data, io.BytesIO(data), Path(file.name), file.name]
        source = how.choice(sources)
        with_vad = seed % NO_VAD_EVERY != 1
        ((same, outcome),) = recognizer.outcomes([source], vad=with_vad, batch_size=how.choice([1, 2, 16]))
    assert same is source
    if isinstance(outcome, ArkASRError):
        check_error(outcome)
        results.write_json_error("fuzz", str(outcome), io.StringIO())
        return str(outcome)
    check(outcome, SubtitleOptions(how.randrange(1, 60), how.randrange(1, 4)))
    return ""


def memory_mib(name: str) -> float:
    """VmRSS, or the peak VmHWM, of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def serve(pipe: Any, action: Callable[[Any], object]) -> None:
    """Answer each argument with (what went wrong, MiB that it took for a while)."""
    warnings.simplefilter("error")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libsndfile's and libmpg123's remarks
    said = os.memfd_create("stdout")
    os.dup2(said, 1)
    flush = ctypes.CDLL(None).fflush
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if action is attempt:
        attempt(0)  # loads all there is to load
    virtual = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MAPPED_MIB * MIB,) * 2)
    pipe.send("ready")
    while (argument := pipe.recv()) is not None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
        before = memory_mib("VmRSS")
        wrong = ""
        try:
            action(argument)
        except ArkASRError as error:
            check_error(error)
        except BaseException as error:  # noqa: BLE001 - also a panic, which is no Exception
            at = error.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            where = f" at {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else ""
            wrong = f"{type(error).__name__}: {str(error)[:300]}{where}"
        flush(None)
        if os.fstat(said).st_size:
            wrong = wrong or "wrote to stdout"
            os.ftruncate(said, 0)
            os.lseek(said, 0, os.SEEK_SET)
        pipe.send((wrong, memory_mib("VmHWM") - before))
    os._exit(0)


class Child:
    """A process that does one thing after the other, each within the limits; it is made anew after one that was not."""

    def __init__(self, action: Callable[[Any], object]) -> None:
        self._action = action
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(PRELOAD)

    def __enter__(self) -> Self:
        self._pipe, theirs = self._forks.Pipe()
        self._process = self._forks.Process(target=serve, args=(theirs, self._action))
        self._process.start()
        theirs.close()
        assert self._pipe.poll(120), "the child did not begin"
        assert self._pipe.recv() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def run(self, argument: object) -> str:
        """What went wrong: "" if nothing did."""
        self._pipe.send(argument)
        try:
            if not self._pipe.poll(LIMIT_S):
                wrong = f"no end after {LIMIT_S} s"
            else:
                wrong, grown_mib = self._pipe.recv()
                if not wrong and grown_mib > LIMIT_MIB:
                    wrong = f"{grown_mib:.0f} MiB"
                return str(wrong)
        except (EOFError, ConnectionResetError):
            self._process.join()
            wrong = f"the process died: exit code {self._process.exitcode}"
        self.__exit__()
        self.__enter__()
        return wrong


def misbehave(how: str) -> None:
    match how:
        case "raise":
            raise KeyError(how)
        case "sleep":
            time.sleep(60)
        case "die":
            os.kill(os.getpid(), 11)
        case "eat":
            np.ones(200 * MIB // 8)
        case "flood":
            np.ones(MAPPED_MIB * MIB)
        case "print":
            ctypes.CDLL(None).puts(b"from C")


def test_the_child_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself: errors, hangs, crashes and floods are told apart, and do not stop those behind them."""
    monkeypatch.setitem(globals(), "LIMIT_S", 2.0)
    monkeypatch.setitem(globals(), "LIMIT_MIB", 100)
    found = {}
    with Child(misbehave) as child:
        for how in ("raise", "fine", "sleep", "die", "eat", "flood", "print", "good"):
            found[how] = child.run(how)
    assert found["raise"].startswith("KeyError")
    assert "no end" in found["sleep"]
    assert "exit code -11" in found["die"]
    assert "MiB" in found["eat"]
    assert "MemoryError" in found["flood"]
    assert "stdout" in found["print"]
    assert found["fine"] == found["good"] == ""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[] if first < CASES_BY_DEFAULT else pytest.mark.slow)
        for first in range(0, CASES, CASES_A_TEST)
    ],
)
def test_damaged_files(first: int) -> None:
    """Real recordings in 42 containers and codecs, damaged by seed."""
    with Child(attempt) as child:
        wrong = {seed: child.run(seed) for seed in range(first, first + CASES_A_TEST)}
    assert {seed: what for seed, what in wrong.items() if what} == {}


def surround(layout: str) -> bytes:
    """A second of noise in an m4a of many channels."""
    out = io.BytesIO()
    channels = av.AudioLayout(layout).nb_channels
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("aac", rate=48_000, layout=layout)
        for seed in range(47):
            noise = np.random.default_rng(seed).normal(0, 0.1, (1, 1_024 * channels)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(noise, format="flt", layout=layout)
            frame.sample_rate = 48_000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def load_surround(layout: str) -> None:
    assert len(arkasr.audio.load(surround(layout))) == pytest.approx(SAMPLE_RATE, abs=700)


def test_surround_sound() -> None:
    """Regression: PyAV's `to_ndarray` reads behind the planes of 8 channels and more, and the process died of it."""
    with Child(load_surround) as child:
        assert {layout: child.run(layout) for layout in ("5.1", "7.1")} == {"5.1": "", "7.1": ""}


# ---- arrays ----

FLOATS = (np.float16, np.float32, np.float64, np.longdouble)
DTYPES = (
    *FLOATS, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint64, np.bool_, np.complex64, np.object_,
    "S4", "U2", "M8[s]", "m8[s]", ">i2", ">f4", ">f8", "i4,f4",
)  # fmt: skip
RATES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([16_000, 16_000, 8_000, 44_100, 48_000, 22_050, 96_000, 1_000, 1_000_000]),
    st.sampled_from([0, -1, 1, 999, 1_000_001, 2**31, 2**63, 10**30, math.nan, math.inf, 16_000.0, 22_050.5]),
    st.integers(1_000, 200_000),
    st.sampled_from([np.int64(16_000), np.float32(8_000), np.uint16(44_100)]),
)
PEAKS = (0.0, 1e-45, 1e-38, 1e-10, 0.1, 1.0, 100.0, 1e10, 1e30, 3e38, 1e300, math.inf, math.nan)
MAX_S = 70


def some_audio(seed: int, length: int, content: str, peak: float) -> Any_:
    """Silence, sparse clicks, noise or speech, float64."""
    rng = np.random.default_rng(seed)
    samples = np.zeros(length)
    with np.errstate(over="ignore", invalid="ignore"):
        if length and content == "sparse":
            samples[rng.integers(0, length, 20)] = peak * rng.choice([-1, 1, 0.5], 20)
        elif length and content == "noise":
            samples = rng.uniform(-1, 1, length) * peak
        elif length and content == "steady":
            samples[:] = peak
        elif length and content == "speech":
            speech = np.concatenate([clip for clip, _ in clips()])
            samples = np.resize(speech, length) * (peak * 3)
        if length and content == "one":
            samples[rng.integers(length)] = peak
    return samples


@st.composite
def arrays(draw: st.DrawFn) -> tuple[Any_, Any]:
    rate = draw(RATES)
    usual = min(float(rate), 48_000.0) if 1_000 <= rate <= 1_000_000 else SAMPLE_RATE
    seconds = draw(st.one_of(st.floats(0, 2), st.floats(0, 2), st.floats(0, MAX_S), st.sampled_from([0, 30, 60])))
    length = draw(st.one_of(st.just(int(seconds * usual)), st.integers(0, 700)))
    content = draw(st.sampled_from(["sparse", "noise", "speech", "one", "steady"]))
    samples = some_audio(draw(st.integers(0, 99)), length, content, draw(st.sampled_from(PEAKS)))
    dtype = np.dtype(draw(st.one_of(st.sampled_from(FLOATS), st.sampled_from(DTYPES))))
    with np.errstate(all="ignore"):
        if dtype.kind in "iu":
            info: Any = np.iinfo(dtype)
            samples = np.nan_to_num(samples).clip(-1, 1) * (info.max / 2)
        cast = samples.astype(dtype) if dtype.kind != "V" else np.zeros(length, dtype)
    shape = draw(st.sampled_from(["mono"] * 5 + ["channels", "transposed", "reversed", "strided", "3d", "0d", "none"]))
    match shape:
        case "channels":
            cast = np.stack([cast] * draw(st.integers(1, 3)), axis=1)
        case "transposed":
            cast = np.stack([cast, cast])
        case "reversed":
            cast = cast[::-1]
        case "strided":
            cast = cast[::3]
        case "3d":
            cast = cast[:, None, None]
        case "0d":
            cast = np.zeros((), dtype)
        case "none":
            cast = np.zeros((length, 0), dtype)
    return cast, rate


@given(source=arrays(), seed=st.integers(0, 1_000), vad=st.sampled_from([True, True, False]))
@example(source=(np.ones(SAMPLE_RATE, "m8[s]"), SAMPLE_RATE), seed=0, vad=False)  # numpy takes it for an integer
@settings(max_examples=200, deadline=10_000, suppress_health_check=list(HealthCheck))
def test_any_array(source: tuple[Any_, Any], seed: int, vad: bool) -> None:
    try:
        transcript = transcriber(seed).transcribe(source, vad=vad)
    except ArkASRError as error:
        check_error(error)
        return
    check(transcript)
    assert source[0].dtype.kind in "fi" or source[0].dtype == np.uint8
    if len(source[0]):
        assert transcript.duration_s == pytest.approx(len(source[0]) / float(source[1]), abs=0.01)


# ---- blocks ----


def blocks_of(samples: Any_, sizes: Sequence[int]) -> Iterator[Any_]:
    at, turn = 0, 0
    while at < len(samples):
        size = sizes[turn % len(sizes)]
        yield samples[at : at + size]
        at, turn = at + size, turn + 1


@given(
    sizes=st.lists(st.sampled_from([0, 1, 159, 511, 512, 513, 4_000, 2**17 - 1, 2**18, 2**21]), min_size=1, max_size=6),
    seconds=st.one_of(st.floats(0, 3), st.floats(29.9, 30.1), st.floats(30, MAX_S)),
    content=st.sampled_from(["sparse", "noise", "speech", "one", "steady"]),
    peak=st.sampled_from([p for p in PEAKS if p < 1e39]),
    seed=st.integers(0, 99),
    vad=st.booleans(),
)
@example(sizes=[2**18], seconds=61, content="steady", peak=3e38, seed=0, vad=True)
@settings(max_examples=60, deadline=10_000, suppress_health_check=list(HealthCheck))
def test_blocks_of_any_size(sizes: list[int], seconds: float, content: str, peak: float, seed: int, vad: bool) -> None:
    """Spans are pieces of the audio in order, at most 30 s long, with a probability of speech that is one."""
    sizes = [*sizes, 2_000]  # an end, were all others 0 or 1
    samples = some_audio(seed, int(seconds * SAMPLE_RATE), content, peak)
    samples = np.nan_to_num(samples).clip(-3.4e38, 3.4e38).astype(np.float32)
    if sum(sizes) / len(sizes) < 2_000:
        samples = samples[: 40 * SAMPLE_RATE // 100]
    before = 0
    for span in segment.split(blocks_of(samples, sizes), vad=vad):
        assert np.array_equal(span.waveform, samples[span.start : span.end])
        assert 0 <= len(span.waveform) <= segment.MAX_SAMPLES
        assert 0 <= span.overlap <= segment.OVERLAP_SAMPLES
        assert before <= span.start + span.overlap + segment.PAD_SAMPLES
        assert span.first <= span.last
        if span.has_speech:
            assert span.start <= span.first <= span.last <= span.end
        assert 0 <= span.speech <= 1
        if len(span.waveform) > 2 * SAMPLE_RATE:
            one, other = segment.halves(span)
            assert span.first <= one.first <= one.last <= other.first <= other.last <= span.last or not span.has_speech
            assert len(one.waveform) + len(other.waveform) == len(span.waveform)
        before = span.end


@pytest.mark.parametrize("silence_first", [True, False])
def test_halves_of_which_one_has_no_speech(silence_first: bool) -> None:
    """Regression: speech of one half ended before it began, and so did its segment."""
    speech, silence = clips()[0][0], np.zeros(20 * SAMPLE_RATE, np.float32)
    (span,) = segment.split([silence, speech] if silence_first else [speech, silence])
    assert span.has_speech
    one, other = segment.halves(span)
    assert one.start <= one.first <= one.last <= one.end == other.start <= other.first <= other.last <= other.end
    assert one.has_speech != other.has_speech


def test_the_vad_hears_again_after_a_moment_of_huge_samples() -> None:
    """A click of 3e38 must not make all speech behind it inaudible."""
    speech = np.concatenate([clip for clip, rate in clips() if rate == SAMPLE_RATE])
    samples = np.resize(speech, 70 * SAMPLE_RATE).astype(np.float32)
    heard = [span for span in segment.split([samples]) if span.has_speech]
    samples[5 * SAMPLE_RATE] = 3e38
    spoilt = [span for span in segment.split([samples]) if span.has_speech]
    assert all(math.isfinite(span.speech) for span in spoilt)
    assert spoilt[-1].last == pytest.approx(heard[-1].last, abs=SAMPLE_RATE)


# ---- texts ----

NAMES = st.text(st.characters(exclude_categories=[]), max_size=30)  # also halves of surrogates, as of a broken name
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_NEW_TOKENS)
HARD = st.text(
    "\u200d\u0301\u0e33\u0e38\uff9e\U0001f3fb\U0001f1e6ก、。漢 \t\n\r\x0b\x1c\x85\u2028-->&<\"'1\u0661\x00\ufffe",
    max_size=300,
)


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    parts = draw(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 40), TEXTS | HARD), max_size=4))
    unit = st.floats(0, 1)
    segments = [
        Segment(
            start_s,
            start_s + length_s,
            text,
            tokens=(1,) * draw(st.integers(0, 3)),
            confidence=draw(unit),
            no_speech_probability=draw(unit),
            compression_ratio=draw(st.floats(0, 1e4)),
        )
        for start_s, length_s, text in sorted(parts)
    ]
    return Transcript(draw(NAMES), tuple(segments), draw(st.floats(0, 1e7)), {"load": draw(st.floats(0, 1e7))})


@given(transcript=transcripts(), width=st.integers(1, 100), count=st.integers(1, 5))
@settings(max_examples=300, deadline=10_000, suppress_health_check=list(HealthCheck))
def test_any_text_in_all_formats(transcript: Transcript, width: int, count: int) -> None:
    write(transcript, SubtitleOptions(width, count))


@given(left=TEXTS | HARD, right=TEXTS | HARD, parts=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
@settings(max_examples=300, deadline=10_000, suppress_health_check=list(HealthCheck))
def test_any_texts_join(left: str, right: str, parts: tuple[float, float]) -> None:
    segment.join(left, right, overlap_of_left=parts[0], overlap_of_right=parts[1])
