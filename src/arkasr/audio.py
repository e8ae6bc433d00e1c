"""Audio in, log-mel out: the only owner of sample rates, mixing, resampling and frame arithmetic. numpy only.

    samples (16 kHz) --hop 160--> mel frames (100 Hz) --conv stride 2--> encoder frames (50 Hz) --merge 4--> audio
    tokens (12.5 Hz)

Unusual: a clip keeps its own length (no padding to 30 s), and the dynamic range is limited against the clip's own
maximum, never a batch's, so a clip's features do not depend on its neighbours.
"""

import io
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from arkasr.errors import AudioError, MissingExtraError

SAMPLE_RATE = 16_000
FFT_SAMPLES = 400
HOP_SAMPLES = 160
MAX_FREQUENCY_HZ = 8_000.0
LOG_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0  # decades below the clip's maximum

MIN_RATE, MAX_RATE = 1_000, 1_000_000
MAX_CHANNELS = 256
READ_FRAMES = 1 << 18
MAX_VALUES = 1 << 30  # samples times channels: 4 GiB, three hours of 44.1 kHz stereo
UNKNOWN_FRAMES = 1 << 62  # libsndfile's answer for a stream whose header has no length

# libsndfile's log where a header promises more bytes than the file has; writers to a pipe promise (nearly) 2 or 4 GiB.
_CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED_BYTES = 0x7FFF0000

Waveform = npt.NDArray[np.float32]  # [samples], mono, 16 kHz, nominally in [-1, 1]


@runtime_checkable
class Readable(Protocol):
    """A binary file object; only `read()` is called."""

    def read(self, size: int = -1, /) -> bytes:
        """The rest of the file."""
        ...


AudioSource = str | os.PathLike[str] | bytes | Readable | tuple[npt.NDArray[np.generic], int]

# The first bytes of containers that libsndfile does not read and the `av` extra does.
_AV_CONTAINERS = {"mp4/m4a": (4, b"ftyp"), "webm/matroska": (0, b"\x1aE\xdf\xa3"), "wma/asf": (0, b"0&\xb2u")}
_ADTS = (b"\xff\xf1", b"\xff\xf9")  # raw aac


def describe(source: AudioSource) -> str:
    """How errors and results call a source: its path, or what kind of object it is."""
    if isinstance(source, str | os.PathLike):
        return "standard input" if os.fspath(source) == "-" else os.fspath(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, tuple):
        return "<array>"
    return "<file object>"


class _Bytes(io.BytesIO):
    """A whole file in memory: seekable when it came from a pipe, nameless because soundfile trusts a name's `.raw`."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Stay where we are instead of raising: libsndfile seeks before the start of a damaged file."""
        return self.tell() if whence == 0 and offset < 0 else super().seek(offset, whence)


def load(source: AudioSource) -> Waveform:
    """Read audio of any rate, depth and channel count as a mono 16 kHz float32 waveform, [samples].

    Args:
        source: a path, "-" for standard input, the bytes of a file, a binary file object, or (array, sample rate)
            with the array as [samples] or [samples, channels]; integer arrays are scaled by their type's range.

    Raises:
        AudioError: missing, empty, damaged, truncated or non-finite audio.
        MissingExtraError: the container needs the `av` extra.
    """
    place = describe(source)
    if isinstance(source, tuple):
        samples, rate = _from_array(*source, place)
    else:
        samples, rate = _decode(_open(source, place), place)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{place}: sample rate {rate} Hz is outside {MIN_RATE}..{MAX_RATE}; check the file's header")
    if len(samples) == 0:
        raise AudioError(f"{place}: no samples; the recording is empty")
    if not np.isfinite(samples).all():
        where_s = int(np.argmin(np.isfinite(samples).all(axis=1))) / rate
        raise AudioError(f"{place}: NaN or infinite sample at {where_s:.3f} s; write the file again")
    with np.errstate(over="ignore"):
        mono = samples.mean(axis=1, dtype=np.float32)
        if rate != SAMPLE_RATE:
            mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if not np.isfinite(mono).all():
        raise AudioError(f"{place}: samples too large to mix and resample; write the file again")
    return np.ascontiguousarray(mono, dtype=np.float32)


def duration_s(path: Path) -> float:
    """Seconds of a file, from its header where libsndfile reads it, else by decoding."""
    try:
        return soundfile.info(path).duration  # type: ignore[no-any-return]
    except (soundfile.LibsndfileError, TypeError, ValueError):  # a name in .raw; a name that cannot be encoded
        return len(load(path)) / SAMPLE_RATE


def _open(source: str | os.PathLike[str] | bytes | Readable, place: str) -> BinaryIO:
    if isinstance(source, bytes):
        return _Bytes(source)
    if not isinstance(source, str | os.PathLike):
        return _Bytes(source.read())
    if os.fspath(source) == "-":
        return _Bytes(sys.stdin.buffer.read())
    try:
        path = Path(source)
        device = path.is_char_device() or path.is_block_device()  # without an end
        return _Bytes(b"" if device else path.read_bytes())
    except FileNotFoundError:
        raise AudioError(f"{place}: no such file; check the path") from None
    except IsADirectoryError:
        raise AudioError(f"{place}: is a directory; name the audio files in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"{place}: cannot be read ({reason}); check its name and permissions") from None


def _decode(stream: BinaryIO, place: str) -> tuple[npt.NDArray[np.float32], int]:
    """Decode a whole file to [samples, channels] and its rate."""
    with stream:
        head = stream.read(16)
        if not head:
            raise AudioError(f"{place}: empty file (0 bytes); record or copy it again")
        stream.seek(0)
        try:
            with soundfile.SoundFile(stream) as file:
                return _read_samples(file, place), file.samplerate
        except soundfile.LibsndfileError as error:
            container = _av_container(head)
            if container is None:
                raise AudioError(
                    f"{place}: not readable as audio ({error.error_string.strip(' .')}); convert it to wav or flac"
                ) from None
        stream.seek(0)
        return _decode_with_av(stream, place, container)


def _read_samples(file: soundfile.SoundFile, place: str) -> npt.NDArray[np.float32]:
    """All samples, [samples, channels], in blocks: a damaged or streamed header's length is no size to allocate."""
    blocks = []
    while len(block := file.read(READ_FRAMES, dtype="float32", always_2d=True)):
        blocks.append(block)
        _check_size(sum(map(len, blocks)) * file.channels, place)
    samples = np.concatenate(blocks or [np.zeros((0, 1), np.float32)])
    if len(samples) < file.frames < UNKNOWN_FRAMES:
        raise AudioError(f"{place}: truncated, {len(samples)} of {file.frames} samples could be read; copy it again")
    for promised, there in _CUT_SHORT.findall(file.extra_info):
        if int(there) < int(promised) < _STREAMED_BYTES:
            raise AudioError(f"{place}: truncated, {there} of {promised} bytes of samples are there; copy it again")
    return samples


def _check_size(num_values: int, place: str) -> None:
    """Stop decoding what a few bytes were blown up to: a megabyte of FLAC can stand for 80 GB of silence."""
    if num_values > MAX_VALUES:
        raise AudioError(f"{place}: over {MAX_VALUES} samples in all channels; cut it into pieces")


def _av_container(head: bytes) -> str | None:
    for name, (offset, magic) in _AV_CONTAINERS.items():
        if head[offset : offset + len(magic)] == magic:
            return name
    return "aac" if head[:2] in _ADTS else None


def _decode_with_av(stream: BinaryIO, place: str, container: str) -> tuple[npt.NDArray[np.float32], int]:
    try:
        import av
    except ImportError:
        raise MissingExtraError(f"{place}: {container} needs PyAV; pip install 'arkasr[av]'") from None
    try:
        with av.open(stream, mode="r", metadata_errors="ignore") as file:
            if not file.streams.audio:
                raise AudioError(f"{place}: {container} without an audio track; nothing to transcribe")
            if file.streams.audio[0].codec_context is None:
                raise AudioError(f"{place}: {container} with an unknown audio codec; convert it to wav or flac")
            rate = file.streams.audio[0].rate
            resampler = av.AudioResampler(format="fltp")
            frames, num_values = [], 0
            for frame in file.decode(audio=0):
                frames += resampler.resample(frame)
                num_values += frame.samples * frame.layout.nb_channels
                _check_size(num_values, place)
            frames += resampler.resample(None)
    except av.FFmpegError as error:
        raise AudioError(f"{place}: damaged {container} ({error.strerror}); convert it to wav or flac") from None
    blocks = [frame.to_ndarray().T.astype(np.float32) for frame in frames]  # [samples, channels]
    return np.concatenate(blocks or [np.zeros((0, 1), np.float32)]), rate


def _from_array(samples: npt.NDArray[np.generic], rate: int, place: str) -> tuple[npt.NDArray[np.float32], int]:
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] == 0:
        raise AudioError(f"{place}: array of shape {samples.shape}, wanted [samples] or [samples, channels]")
    if samples.shape[1] > MAX_CHANNELS:
        raise AudioError(f"{place}: {samples.shape[1]} channels; give the array as [samples, channels], not transposed")
    kinds = (np.floating, np.signedinteger, np.uint8)
    if not any(np.issubdtype(samples.dtype, kind) for kind in kinds):
        raise AudioError(f"{place}: array of {samples.dtype}, wanted floats, signed integers or uint8")
    with np.errstate(over="ignore"):  # infinity is refused with its place
        values = samples.astype(np.float32)
    if np.issubdtype(samples.dtype, np.floating):
        return values, rate
    if samples.dtype == np.uint8:
        return (values - np.float32(128)) / np.float32(128), rate
    return values / np.float32(2 ** (8 * samples.dtype.itemsize - 1)), rate


def num_mel_frames(num_samples: int) -> int:
    """Mel frames of a clip, 100 a second."""
    return num_samples // HOP_SAMPLES


def num_encoder_frames(num_samples: int) -> int:
    """Encoder frames of a clip, 50 a second."""
    return (num_mel_frames(num_samples) + 1) // 2


def num_audio_tokens(num_samples: int, merge_factor: int = 4) -> int:
    """Embeddings a clip puts into the decoder's prompt: 12.5 a second, at least one."""
    return max(num_encoder_frames(num_samples) // merge_factor, 1)


def log_mel(waveform: Waveform, num_mels: int = 128) -> npt.NDArray[np.float32]:
    """Whisper's log-mel spectrogram of one clip at its own length, [num_mels, samples // 160].

    Centred, reflect-padded STFT (400 samples, periodic Hann, hop 160) without its last frame; power; slaney mels over
    0..8 kHz; log10, limited to 8 decades below the clip's maximum; (x + 4) / 4.
    """
    num_frames = num_mel_frames(len(waveform))
    if num_frames == 0:
        return np.zeros((num_mels, 0), np.float32)
    padded = np.pad(waveform.astype(np.float64), FFT_SAMPLES // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT_SAMPLES)[::HOP_SAMPLES][:num_frames]
    spectrum = np.fft.rfft(frames * _hann(), axis=1)
    power = spectrum.real**2 + spectrum.imag**2  # [frames, 201]
    log_power = np.log10(np.maximum(power @ mel_filters(num_mels), LOG_FLOOR))
    limited = np.maximum(log_power, log_power.max() - DYNAMIC_RANGE)
    return np.ascontiguousarray(((limited + 4) / 4).T, dtype=np.float32)


@lru_cache(maxsize=1)
def _hann() -> npt.NDArray[np.float64]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SAMPLES) / FFT_SAMPLES)


@lru_cache(maxsize=4)
def mel_filters(num_mels: int) -> npt.NDArray[np.float64]:
    """Triangular filters on Slaney's mel scale (linear to 1 kHz, then logarithmic), unit area, [201, num_mels]."""
    hz_per_mel, break_mel, log_step = 200 / 3, 15.0, np.log(6.4) / 27
    top = break_mel + np.log(MAX_FREQUENCY_HZ / 1000) / log_step
    mels = np.linspace(0, top, num_mels + 2)
    edges_hz = np.where(mels < break_mel, mels * hz_per_mel, 1000 * np.exp(log_step * (mels - break_mel)))
    bins_hz = np.linspace(0, SAMPLE_RATE / 2, FFT_SAMPLES // 2 + 1)
    rising = (bins_hz[:, None] - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz[:, None]) / (edges_hz[2:] - edges_hz[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling))
    filters: npt.NDArray[np.float64] = triangles * (2 / (edges_hz[2:] - edges_hz[:-2]))
    return filters
