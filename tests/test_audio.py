import contextvars
import io
import math
import random
import struct
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import spectrogram, window_function

from arkasr import audio
from arkasr.errors import ArkASRError, AudioError, MissingExtraError

Samples = npt.NDArray[np.float32]
RATE = 16_000


def noise(num_samples: int, *, seed: int = 0) -> Samples:
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


def tone(rate: int, *, frequency_hz: float = 440, amplitude: float = 0.5, seconds: float = 1) -> Samples:
    time_s = np.arange(int(rate * seconds)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def assert_tone(waveform: Samples, *, amplitude: float, tolerance: float) -> None:
    """The waveform, its ends left out, is a sine of 440 Hz, to 1 Hz, and of this amplitude."""
    middle = waveform[2_000:-2_000].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), n=RATE))
    frequency_hz = int(np.argmax(spectrum))
    angle = 2 * np.pi * frequency_hz * np.arange(len(middle)) / RATE
    parts, *_ = np.linalg.lstsq(np.stack([np.sin(angle), np.cos(angle)], axis=1), middle)
    assert frequency_hz == 440
    assert np.hypot(*parts) == pytest.approx(amplitude, rel=tolerance)


def encoded(samples: npt.NDArray[Any], rate: int = RATE, *, kind: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


def encoded_with_av(samples: Samples | None, rate: int, *, kind: str, codec: str) -> bytes:
    """A mono file of `samples`, or with None a video without sound."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as file:
        if samples is None:
            stream: Any = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            frames: list[Any] = [av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")]
        else:
            stream = file.add_stream(codec, rate=rate, layout="mono")
            whole = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            whole.sample_rate = rate
            fifo = av.AudioFifo()
            fifo.write(whole)
            frames = [*fifo.read_many(stream.codec_context.frame_size), fifo.read(0, partial=True)]
        for frame in [*filter(None, frames), None]:
            file.mux(stream.encode(frame))
    return out.getvalue()


# What a user may hand in by mistake: file name -> (its bytes, what the error must say). Also used by test_cli.
FLAC, WAV = encoded(noise(8_000), kind="FLAC"), encoded(noise(8_000))
BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing.wav": (None, "no such file"),
    "empty.wav": (b"", "empty file"),
    "silent.wav": (encoded(np.zeros(0, np.float32)), "no samples"),
    "nan.wav": (encoded(np.r_[noise(4_000), np.nan, noise(9)], subtype="FLOAT"), r"NaN or infinite sample at 0\.250 s"),
    "inf.wav": (encoded(np.r_[noise(8_000), -np.inf], 8_000, subtype="DOUBLE"), r"NaN or infinite sample at 1\.000 s"),
    "text.wav": (b"These are words, and words are no sound.\n" * 30, "not readable as audio"),
    "zeros.mp3": (bytes(3_000), "not readable as audio"),
    "magic.flac": (FLAC[:4], "not readable as audio"),
    "header.flac": (FLAC[:42], "not readable as audio"),
    "half.flac": (FLAC[: len(FLAC) // 2], "not readable as audio|truncated"),
    "last.flac": (FLAC[:-1], "not readable as audio|truncated"),
    "riff.wav": (WAV[:12], "not readable as audio"),
    "header.wav": (WAV[:44], "no samples|truncated"),
    "half.wav": (WAV[: len(WAV) // 2], "truncated"),
    "half.m4a": (b"\0\0\0\x1cftypM4A " + bytes(400), "damaged mp4"),
    "video.mp4": (encoded_with_av(None, 0, kind="mp4", codec=""), "without an audio track"),
}


def write_bad_file(folder: Path, name: str) -> Path:
    content = BAD_FILES[name][0]
    if content is not None:
        (folder / name).write_bytes(content)
    return folder / name


def whisper_log_mel(waveform: Samples, num_mels: int) -> npt.NDArray[Any]:
    """Transformers' Whisper features at the clip's own length; the class cannot say 'no frames', so we do."""
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    if len(waveform) < 160:
        power = spectrogram(waveform, window_function(400, "hann"), 400, 160, mel_filters=extractor.mel_filters)
        return np.asarray(power)[:, :-1]
    return np.asarray(extractor._np_extract_fbank_features(waveform[None], "cpu")[0])


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 399, 400, 401, 16_000, 479_999, 480_000])
def test_log_mel_is_whispers_at_every_length(num_mels: int, num_samples: int) -> None:
    waveform = noise(num_samples, seed=num_samples)
    ours = audio.log_mel(waveform, num_mels)
    assert ours.shape == (num_mels, num_samples // 160)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, whisper_log_mel(waveform, num_mels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize(
    "waveform",
    [np.zeros(8_000, np.float32), np.sign(tone(RATE) + 1e-6), tone(RATE), np.eye(1, 8_000, 900, np.float32)[0]],
    ids=["silence", "clipped", "tone", "impulse"],
)
def test_log_mel_is_whispers_on_extremes(num_mels: int, waveform: Samples) -> None:
    expected = whisper_log_mel(waveform, num_mels)
    np.testing.assert_allclose(audio.log_mel(waveform, num_mels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("corpus", ["an4", "fsdd", "kerstin_de"])
def test_log_mel_is_whispers_on_speech(shared: Path, num_mels: int, corpus: str) -> None:
    waveform = audio.load(min((shared / "speech" / corpus).rglob("*.flac")))
    expected = whisper_log_mel(waveform, num_mels)
    np.testing.assert_allclose(audio.log_mel(waveform, num_mels), expected, rtol=0, atol=1e-4)


def test_log_mel_knows_no_neighbours() -> None:
    quiet, loud = noise(9_000) * 1e-3, np.sign(noise(20_000))
    alone = audio.log_mel(quiet)
    audio.log_mel(loud)
    audio.log_mel(loud, 80)
    assert (audio.log_mel(quiet) == alone).all()
    assert alone.max() - alone.min() <= 2  # 8 decades below its own maximum, over 4


@pytest.mark.parametrize(
    ("num_samples", "mel", "encoder", "tokens"),
    [
        *[(0, 0, 0, 1), (1, 0, 0, 1), (159, 0, 0, 1), (160, 1, 1, 1), (319, 1, 1, 1), (320, 2, 1, 1), (480, 3, 2, 1)],
        *[(1_120, 7, 4, 1), (2_239, 13, 7, 1), (2_240, 14, 7, 1), (2_400, 15, 8, 2), (16_000, 100, 50, 12)],
        *[(479_839, 2998, 1499, 374), (479_840, 2999, 1500, 375), (479_999, 2999, 1500, 375)],
        (480_000, 3000, 1500, 375),
    ],
)
def test_frame_counts(num_samples: int, mel: int, encoder: int, tokens: int) -> None:
    assert audio.num_mel_frames(num_samples) == mel
    assert audio.num_encoder_frames(num_samples) == encoder
    assert audio.num_audio_tokens(num_samples) == tokens


@given(st.integers(0, 480_000), st.integers(0, 480_000), st.integers(1, 16))
def test_more_samples_never_mean_fewer_tokens(shorter: int, longer: int, merge_factor: int) -> None:
    counts = [audio.num_audio_tokens(n, merge_factor) for n in sorted((shorter, longer))]
    assert 1 <= counts[0] <= counts[1]


CONTAINERS: list[tuple[str, str | None, float]] = [
    ("WAV", "PCM_U8", 2e-2), ("WAV", "PCM_16", 1e-4), ("WAV", "PCM_24", 1e-6), ("WAV", "PCM_32", 1e-6),
    ("WAV", "FLOAT", 1e-7), ("WAV", "DOUBLE", 1e-7), ("WAV", "ULAW", 3e-2), ("WAVEX", "PCM_16", 1e-4),
    ("W64", "PCM_16", 1e-4), ("FLAC", "PCM_16", 1e-4), ("FLAC", "PCM_24", 1e-6), ("AIFF", "PCM_16", 1e-4),
    ("AU", "PCM_16", 1e-4), ("CAF", "PCM_16", 1e-4), ("CAF", "ALAC_16", 1e-4), ("RF64", "PCM_16", 1e-4),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype", "tolerance"), CONTAINERS)
@pytest.mark.parametrize("num_samples", [8_000, 8_001])
def test_sample_formats(kind: str, subtype: str, tolerance: float, num_samples: int) -> None:
    samples = tone(RATE)[:num_samples]
    waveform = audio.load(encoded(samples, kind=kind, subtype=subtype))
    assert waveform.shape == samples.shape
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, samples, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("WAV", "GSM610")])
def test_lossy_formats(kind: str, subtype: str | None) -> None:
    waveform = audio.load(encoded(tone(RATE), kind=kind, subtype=subtype))
    assert abs(len(waveform) - RATE) <= 320
    assert_tone(waveform, amplitude=0.5, tolerance=0.15)


@pytest.mark.parametrize(
    ("kind", "codec"), [("ipod", "aac"), ("mp4", "aac"), ("mov", "aac"), ("webm", "libopus"), ("adts", "aac")]
)
def test_formats_of_the_av_extra(kind: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded_with_av(tone(48_000), 48_000, kind=kind, codec=codec)
    waveform = audio.load(content)
    assert abs(len(waveform) - RATE) <= 1_024
    assert_tone(waveform, amplitude=0.5, tolerance=0.05)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"needs PyAV; pip install 'arkasr\[av\]'"):
        audio.load(content)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_any_rate_and_channel_count(rate: int, channels: int) -> None:
    gains = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    waveform = audio.load(encoded(tone(rate)[:, None] * gains * 0.6, rate, subtype="PCM_24"))
    assert abs(len(waveform) - RATE) <= 1
    assert_tone(waveform, amplitude=0.3, tolerance=1e-3)


SCALED: list[tuple[type[np.generic], float, float]] = [
    (np.int16, 2.0**15, 0), (np.int32, 2.0**31, 0), (np.uint8, 2.0**7, 128), (np.float32, 1, 0), (np.float64, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "scale", "offset"), SCALED)
def test_arrays(dtype: type[np.generic], scale: float, offset: float) -> None:
    left, right = noise(4_000), noise(4_000, seed=1)
    tolerance = max(1.01 / scale, 1e-7)
    both = (np.stack([left, right], axis=1) * scale + offset).astype(dtype)
    np.testing.assert_allclose(audio.load((both[:, 0], RATE)), left, rtol=0, atol=tolerance)
    np.testing.assert_allclose(audio.load((both[:, :1], RATE)), left, rtol=0, atol=tolerance)
    np.testing.assert_allclose(audio.load((both, RATE)), (left + right) / 2, rtol=0, atol=tolerance)


def test_source_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(FLAC)
    expected = audio.load(path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(FLAC))))
    with path.open("rb") as file:
        for source in (str(path), FLAC, file, io.BytesIO(FLAC), "-"):
            assert (audio.load(source) == expected).all()


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_their_cause(tmp_path: Path, name: str) -> None:
    path = write_bad_file(tmp_path, name)
    with pytest.raises(AudioError, match=BAD_FILES[name][1]) as caught:
        audio.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [1, 43, 100, 1_000, len(FLAC) - 100])
def test_flac_cut_anywhere(cut: int) -> None:
    with pytest.raises(AudioError, match=r"not readable as audio|truncated"):
        audio.load(FLAC[:cut])


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "AIFF", "AU", "CAF", "W64"])
@pytest.mark.parametrize("missing", [8, 1_000, 9_000])
def test_pcm_cut_short(kind: str, missing: int) -> None:
    """Regression: libsndfile takes the bytes that are left for the whole recording, and the rest was lost silently."""
    with pytest.raises(AudioError, match=r"truncated|not readable"):
        audio.load(encoded(noise(8_000), kind=kind)[:-missing])


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000])
def test_wav_written_to_a_pipe(size: int) -> None:
    streamed = WAV[:4] + struct.pack("<I", size) + WAV[8:40] + struct.pack("<I", size) + WAV[44:]
    assert (audio.load(streamed) == audio.load(WAV)).all()


def test_name_ending_in_raw(tmp_path: Path) -> None:
    """Regression: soundfile reads the format off a stream's name, and for .raw demands a sample rate."""
    (tmp_path / "a.raw").write_bytes(WAV)
    assert len(audio.load(tmp_path / "a.raw")) == 8_000


@pytest.mark.parametrize("total", [0, 2**36 - 1])
def test_flac_header_with_a_wild_length(total: int) -> None:
    """Regression: 0 (unknown, as written to a pipe) and lengths in the terabytes ended in ValueError, MemoryError."""
    wild = bytearray(FLAC)
    wild[21] = wild[21] & 0xF0 | total >> 32
    wild[22:26] = struct.pack(">I", total & 0xFFFF_FFFF)
    try:
        assert len(audio.load(bytes(wild))) == 8_000
    except AudioError as error:
        assert "not readable" in str(error) or "truncated" in str(error)  # noqa: PT017 - either outcome is honest


@pytest.mark.parametrize("name", [".", "x" * 5_000, "a\0b.wav"], ids=["folder", "long", "nul"])
def test_paths_that_are_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(AudioError, match=r"directory|cannot be read"):
        audio.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("samples", "rate", "cause"),
    [
        *[(np.zeros((1, 16_000)), RATE, "not transposed"), (np.zeros((2, 2, 2)), RATE, "shape"), (noise(9), 0, "rate")],
        *[(noise(9), -RATE, "rate"), (noise(9), 10**9, "rate"), (noise(9), math.nan, "rate")],
        *[
            (np.zeros(0), RATE, "no samples"),
            (np.zeros((9, 0)), RATE, "shape"),
            (np.zeros(9, np.uint16), RATE, "uint16"),
        ],
        *[(np.zeros(9, bool), RATE, "bool"), (np.zeros(9, complex), RATE, "complex"), (np.array(["a"]), RATE, "<U1")],
        *[(np.full(9, np.nan), RATE, "NaN"), (np.full(9, 1e300), RATE, "infinite")],
        (np.tile(np.array([3e38, -3e38], np.float32), 2_000), 44_100, "too large|infinite"),
        (np.full((9, 8), 3e38, np.float32), RATE, "too large|infinite"),
    ],
)
def test_bad_arrays(samples: npt.NDArray[Any], rate: int, cause: str) -> None:
    with pytest.raises(AudioError, match=f"^<array>: .*({cause})"):
        audio.load((samples, rate))


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "m4a"])
def test_mutated_files_are_audio_or_an_error(kind: str) -> None:
    chance = random.Random(kind)
    m4a: Callable[[], bytes] = lambda: encoded_with_av(noise(2_000), RATE, kind="ipod", codec="aac")  # noqa: E731
    original = m4a() if kind == "m4a" else encoded(noise(2_000), kind=kind)
    started = time.perf_counter()
    for _ in range(300):
        mutated = bytearray(original)
        for _ in range(chance.choice([1, 3, 10])):
            at = chance.randrange(chance.choice([len(mutated), 64]))
            mutated[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        try:
            waveform = audio.load(bytes(mutated[: chance.choice([None, chance.randrange(len(mutated))])]))
        except ArkASRError as error:
            assert "\n" not in str(error)  # noqa: PT017 - each outcome is allowed
        else:
            assert waveform.ndim == 1
            assert np.isfinite(waveform).all()
    assert time.perf_counter() - started < 20


# ---- limits, and blocks of others ----


@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        (audio.Limits(seconds=1.9), r"recording: longer than the limit of 1\.9 s"),
        (audio.Limits(channels=2), "recording: 3 channels, over the limit of 2"),
        (audio.Limits(rate=16_000), r"recording: sample rate 44100 Hz is outside 1000\.\.16000"),
    ],
)
def test_limits_are_kept_before_anything_is_decoded(limits: audio.Limits, cause: str) -> None:
    recording = encoded(np.zeros((88_200, 3), np.float32), 44_100, kind="FLAC")
    assert sum(map(len, audio.stream(recording, audio.Limits(2.0, 3, 44_100)))) == 32_000
    blocks = audio.stream(recording, limits, name="recording")
    with pytest.raises(AudioError, match=f"^{cause}"):
        next(blocks)


def test_a_limit_counts_what_is_there_whatever_the_header_says() -> None:
    raw = bytearray(encoded(np.zeros(16_000 * 60, np.float32)))
    raw[4:8] = raw[40:44] = b"\xff\xff\xff\xff"  # as a writer to a pipe leaves it
    with pytest.raises(AudioError, match="longer than the limit of 30 s"):
        list(audio.stream(bytes(raw), audio.Limits(seconds=30)))
    assert sum(map(len, audio.stream(bytes(raw), audio.Limits(seconds=60)))) == 16_000 * 60


def test_a_stream_may_be_dropped_in_another_context() -> None:
    """numpy's errstate was open across the yield: whoever gave up a stream elsewhere got a traceback on stderr."""
    blocks = audio.stream((np.zeros(1_000_000, np.float32), 16_000))
    assert isinstance(blocks, Generator)
    contextvars.copy_context().run(next, blocks)
    blocks.close()


def test_blocks_of_others_are_taken_as_they_are() -> None:
    blocks = [np.full(n, n / 100, np.float32) for n in (5, 1, 7)]
    source = audio.Blocks("the line", iter(blocks))
    assert audio.describe(source) == "the line"
    assert np.array_equal(audio.load(source), np.concatenate(blocks))


@pytest.mark.parametrize("kind", ["flac", "webm"])
def test_duration_of_a_header_and_of_a_file_without_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"clip.{kind}"
    silence = np.zeros(120_000, np.float32)
    if kind == "flac":
        path.write_bytes(encoded(silence, 48_000, kind="FLAC"))
    else:
        path.write_bytes(encoded_with_av(silence, 48_000, kind="webm", codec="libopus"))
    assert audio.duration_s(path) == pytest.approx(2.5, abs=0.05)
