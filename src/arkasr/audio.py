"""Audio in, log-mel out: the only owner of sample rates, mixing, resampling and frame arithmetic. numpy only.

    samples (16 kHz) --hop 160--> mel frames (100 Hz) --conv stride 2--> encoder frames (50 Hz) --merge 4--> audio
    tokens (12.5 Hz)

Unusual: a clip keeps its own length (no padding to 30 s), and the dynamic range is limited against the clip's own
maximum, never a batch's, so a clip's features do not depend on its neighbours.
"""

import io
import math
import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

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
STFT_FRAMES = 64  # at once: larger pieces leave the cache, and their memory is asked of the system each time
MEL_ROWS = 8  # frames; times 201 times 128 is below OpenBLAS's 2^18
DYNAMIC_RANGE = 8.0  # decades below the clip's maximum

MIN_RATE, MAX_RATE = 1_000, 1_000_000
MAX_CHANNELS = 256
READ_FRAMES = 1 << 18
MAX_SAMPLES = 1 << 28  # of what is held in memory at once: 1 GiB, 4.6 hours
UNKNOWN_FRAMES = 1 << 62  # libsndfile's answer for a stream whose header has no length

# libsndfile's log where a header promises more bytes than the file has; writers to a pipe promise (nearly) 2 or 4 GiB.
_CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED_BYTES = 0x7FFF0000

Waveform = npt.NDArray[np.float32]  # [samples], mono, 16 kHz, nominally in [-1, 1]
Block = npt.NDArray[np.float32]  # [samples, channels], at the file's rate


@runtime_checkable
class Readable(Protocol):
    """A binary file object; only `read()` is called."""

    def read(self, size: int = -1, /) -> bytes:
        """The rest of the file."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Samples that the caller brings in blocks, as `stream` gives them: mono, 16 kHz, finite float32.

    Attributes:
        name: what errors and results call them.
        blocks: taken once, as fast as they are recognized.
    """

    name: str
    blocks: Iterable[Waveform]


AudioSource = str | os.PathLike[str] | bytes | Readable | tuple[npt.NDArray[np.generic], int] | Blocks


@dataclass(frozen=True)
class Limits:
    """What a stranger's audio may ask of us.

    Attributes:
        seconds: of audio, whatever its header says.
        channels: in a file.
        rate: samples a second in a file.
    """

    seconds: float = math.inf
    channels: int = MAX_CHANNELS
    rate: int = MAX_RATE


NO_LIMITS = Limits()

# The first bytes of containers that libsndfile does not read and the `av` extra does.
_AV_CONTAINERS = {"mp4/m4a": (4, b"ftyp"), "webm/matroska": (0, b"\x1aE\xdf\xa3"), "wma/asf": (0, b"0&\xb2u")}
_SDS = b"\xf0~"  # a MIDI sample dump, of whose damages libsndfile prints a line each to stdout
_ADTS = (b"\xff\xf1", b"\xff\xf9")  # raw aac


def describe(source: AudioSource) -> str:
    """How errors and results call a source: its path, or what kind of object it is."""
    if isinstance(source, str | os.PathLike):
        return "standard input" if os.fspath(source) == "-" else os.fspath(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Blocks):
        return source.name
    if isinstance(source, tuple):
        return "<array>"
    return "<file object>"


class _Bytes(io.BytesIO):
    """A whole file in memory: seekable when it came from a pipe, nameless because soundfile trusts a name's `.raw`."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Stay where we are instead of raising: libsndfile seeks before the start of a damaged file."""
        return self.tell() if whence == 0 and offset < 0 else super().seek(offset, whence)


class _File(io.FileIO):
    """An open file, nameless too, for it is opened by its number; read as it is decoded."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As `_Bytes.seek`."""
        return self.tell() if whence == 0 and offset < 0 else super().seek(offset, whence)


def load(source: AudioSource) -> Waveform:
    """Read audio of any rate, depth and channel count as a mono 16 kHz float32 waveform, [samples].

    Args:
        source: a path, "-" for standard input, the bytes of a file, a binary file object, or (array, sample rate)
            with the array as [samples] or [samples, channels]; integer arrays are scaled by their type's range.

    Raises:
        AudioError: missing, empty, damaged, truncated, huge or non-finite audio.
        MissingExtraError: the container needs the `av` extra.
    """
    blocks: list[Waveform] = []
    for block in stream(source):
        blocks.append(block)
        if sum(map(len, blocks)) > MAX_SAMPLES:
            raise AudioError(f"{describe(source)}: over {MAX_SAMPLES} samples; cut it into pieces")
    return np.concatenate(blocks)


def stream(source: AudioSource, limits: Limits = NO_LIMITS, *, name: str | None = None) -> Generator[Waveform]:
    """The samples of `load`, in blocks of some seconds as they are decoded; memory does not grow with the audio.

    Args:
        source: as `load`.
        limits: of what comes from strangers.
        name: what errors call it, if not by its path.

    Raises:
        AudioError, MissingExtraError: as `load`, and beyond the limits; what is found behind the start, after the
            blocks before.
    """
    place = name or describe(source)
    if isinstance(source, Blocks):
        yield from source.blocks
        return
    if isinstance(source, tuple):
        rate, blocks = _from_array(*source, place)
        yield from _mono(blocks, rate, place, limits)
        return
    with _open(source, place) as file:
        rate, blocks = _decode(file, place, limits)
        yield from _mono(blocks, rate, place, limits)


def _check(place: str, limits: Limits, *, channels: int, seconds: float) -> None:
    if channels > limits.channels:
        raise AudioError(f"{place}: {channels} channels, over the limit of {limits.channels}; mix it down")
    if seconds > limits.seconds:
        raise AudioError(f"{place}: longer than the limit of {limits.seconds:g} s; cut it into pieces")


def _mono(blocks: Iterable[Block], rate: int, place: str, limits: Limits) -> Iterator[Waveform]:
    """Blocks [samples, channels] of a rate, mixed and resampled."""
    if not MIN_RATE <= rate <= limits.rate:
        raise AudioError(f"{place}: sample rate {rate} Hz is outside {MIN_RATE}..{limits.rate}; check its header")
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    num_read = 0
    for samples in blocks:
        if not np.isfinite(samples).all():
            where_s = (num_read + int(np.argmin(np.isfinite(samples).all(axis=1)))) / rate
            raise AudioError(f"{place}: NaN or infinite sample at {where_s:.3f} s; write the file again")
        num_read += len(samples)
        _check(place, limits, channels=samples.shape[1], seconds=num_read / rate)
        with np.errstate(over="ignore"):
            mono = samples.mean(axis=1, dtype=np.float32)
            whole = mono if rate == SAMPLE_RATE else resampler.resample_chunk(mono)
        yield _finite(whole, place)  # outside: numpy's state belongs to a context, and who reads on may be in another
    if num_read == 0:
        raise AudioError(f"{place}: no samples; the recording is empty")
    if rate != SAMPLE_RATE:
        with np.errstate(over="ignore"):
            whole = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        yield _finite(whole, place)


def _finite(waveform: Waveform, place: str) -> Waveform:
    if not np.isfinite(waveform).all():
        raise AudioError(f"{place}: samples too large to mix and resample; write the file again")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def duration_s(path: Path, limits: Limits = NO_LIMITS, *, name: str | None = None) -> float:
    """Seconds of a file, from its header where libsndfile reads it, else by decoding; errors are those of `stream`."""
    with suppress(soundfile.LibsndfileError, TypeError, ValueError):  # a name in .raw; a name that cannot be encoded
        promised = soundfile.info(path)
        if promised.frames < UNKNOWN_FRAMES:
            return promised.duration  # type: ignore[no-any-return]
    return sum(map(len, stream(path, limits, name=name))) / SAMPLE_RATE


def _open(source: str | os.PathLike[str] | bytes | Readable, place: str) -> BinaryIO:
    if isinstance(source, bytes):
        return _Bytes(source)
    if not isinstance(source, str | os.PathLike):
        return _Bytes(source.read())
    if os.fspath(source) == "-":
        # Not through its buffer, whose lock a thread that waits here would hold when Ctrl-C ends the program.
        return _Bytes(sys.stdin.buffer.raw.read())  # type: ignore[union-attr]
    try:
        path = Path(source)
        if path.is_file():
            return _File(os.open(path, os.O_RDONLY))
        device = path.is_char_device() or path.is_block_device()  # without an end
        return _Bytes(b"" if device else path.read_bytes())
    except FileNotFoundError:
        raise AudioError(f"{place}: no such file; check the path") from None
    except IsADirectoryError:
        raise AudioError(f"{place}: is a directory; name the audio files in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"{place}: cannot be read ({reason}); check its name and permissions") from None


def _decode(file: BinaryIO, place: str, limits: Limits) -> tuple[int, Iterator[Block]]:
    """The sample rate of an encoded file, and its samples in blocks [samples, channels]."""
    try:
        head = file.read(16)
    except OSError as error:  # of a disk, or of what is no file, such as /proc/self/mem
        raise AudioError(f"{place}: cannot be read ({error.strerror}); check its name and permissions") from None
    if not head:
        raise AudioError(f"{place}: empty file (0 bytes); record or copy it again")
    if head.startswith(_SDS):
        raise AudioError(f"{place}: not readable as audio (MIDI sample dump); convert it to wav or flac")
    file.seek(0)
    try:
        decoded = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        container = _av_container(head)
        if container is None:
            raise AudioError(
                f"{place}: not readable as audio ({error.error_string.strip(' .')}); convert it to wav or flac"
            ) from None
        file.seek(0)
        return _decode_with_av(file, place, container)
    promised_s = decoded.frames / decoded.samplerate if decoded.frames < UNKNOWN_FRAMES else 0.0
    _check(place, limits, channels=decoded.channels, seconds=promised_s)
    return decoded.samplerate, _blocks(decoded, place)


def _blocks(file: soundfile.SoundFile, place: str) -> Iterator[Block]:
    """All samples: a damaged or streamed header's length is no size to allocate, nor to believe."""
    num_read = 0
    with file:
        try:
            while len(block := file.read(READ_FRAMES, dtype="float32", always_2d=True)):
                num_read += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{place}: not readable as audio ({error.error_string.strip(' .')}); convert it to wav or flac"
            ) from None
        if num_read < file.frames < UNKNOWN_FRAMES:
            raise AudioError(f"{place}: truncated, {num_read} of {file.frames} samples could be read; copy it again")
        for promised, there in _CUT_SHORT.findall(file.extra_info):
            if int(there) < int(promised) < _STREAMED_BYTES:
                raise AudioError(f"{place}: truncated, {there} of {promised} bytes of samples are there; copy it again")


def _av_container(head: bytes) -> str | None:
    for name, (offset, magic) in _AV_CONTAINERS.items():
        if head[offset : offset + len(magic)] == magic:
            return name
    return "aac" if head[:2] in _ADTS else None


def _decode_with_av(file: BinaryIO, place: str, container: str) -> tuple[int, Iterator[Block]]:
    try:
        import av
    except ImportError:
        raise MissingExtraError(f"{place}: {container} needs PyAV; pip install 'arkasr[av]'") from None
    try:
        opened = av.open(file, mode="r", metadata_errors="ignore")
        if not opened.streams.audio:
            raise AudioError(f"{place}: {container} without an audio track; nothing to transcribe")
        if opened.streams.audio[0].codec_context is None:
            raise AudioError(f"{place}: {container} with an unknown audio codec; convert it to wav or flac")
    except av.FFmpegError as error:
        raise AudioError(f"{place}: damaged {container} ({error.strerror}); convert it to wav or flac") from None
    return opened.streams.audio[0].rate, _av_blocks(opened, place, container)


def _av_blocks(opened: Any, place: str, container: str) -> Iterator[Block]:
    """All samples; packed, because PyAV reads planes behind the last of 8 channels and more, and the process dies."""
    import av

    rate = opened.streams.audio[0].rate
    kind: object = None
    resampler: Any = None
    try:
        with opened:
            for frame in chain(opened.decode(audio=0), [None]):
                # In damaged files all three may change; of HE-AAC the header's rate can be half of the frames'.
                if frame and kind != (kind := (frame.format.name, frame.layout.name, frame.sample_rate)):
                    resampler = av.AudioResampler(format="flt", rate=rate)
                for piece in resampler.resample(frame) if resampler else ():
                    packed = np.frombuffer(piece.planes[0], np.float32, piece.samples * piece.layout.nb_channels)
                    yield packed.reshape(piece.samples, -1)  # [samples, channels]
    except av.FFmpegError as error:
        raise AudioError(f"{place}: damaged {container} ({error.strerror}); convert it to wav or flac") from None


def _from_array(samples: npt.NDArray[np.generic], rate: int, place: str) -> tuple[int, Iterator[Block]]:
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] == 0:
        raise AudioError(f"{place}: array of shape {samples.shape}, wanted [samples] or [samples, channels]")
    if samples.shape[1] > MAX_CHANNELS:
        raise AudioError(f"{place}: {samples.shape[1]} channels; give the array as [samples, channels], not transposed")
    if samples.dtype.kind not in "fi" and samples.dtype != np.uint8:  # numpy's timedelta is a signedinteger
        raise AudioError(f"{place}: array of {samples.dtype}, wanted floats, signed integers or uint8")
    starts = range(0, len(samples), READ_FRAMES)
    return rate, (_as_floats(samples[start : start + READ_FRAMES]) for start in starts)


def _as_floats(samples: npt.NDArray[np.generic]) -> Block:
    with np.errstate(over="ignore"):  # infinity is refused with its place
        values = samples.astype(np.float32)
    if np.issubdtype(samples.dtype, np.floating):
        return values
    if samples.dtype == np.uint8:
        return (values - np.float32(128)) / np.float32(128)
    return values / np.float32(2 ** (8 * samples.dtype.itemsize - 1))


class Pcm16:
    """16-bit little-endian mono samples as they come, at any rate, to waveforms."""

    def __init__(self, rate: int, *, name: str = "audio") -> None:
        """Raise an AudioError, which calls the audio by its name, where nothing can be of such a rate."""
        if not MIN_RATE <= rate <= MAX_RATE:
            raise AudioError(f"{name}: sample rate {rate} Hz is outside {MIN_RATE}..{MAX_RATE}")
        self._name, self._rest = name, b""
        self._resampler = (
            None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        )

    def add(self, data: bytes) -> Waveform:
        """The samples that these bytes complete; the resampler keeps some hundredths of a second."""
        data = self._rest + data
        whole = len(data) - len(data) % 2
        self._rest = data[whole:]
        return self._at_16_khz(_as_floats(np.frombuffer(data[:whole], "<i2")))

    def end(self) -> Waveform:
        """What was kept.

        Raises:
            AudioError: half a sample is left over.
        """
        if self._rest:
            raise AudioError(f"{self._name}: ended in the middle of a sample; something cut it")
        return self._at_16_khz(np.zeros(0, np.float32), last=True)

    def _at_16_khz(self, samples: Waveform, *, last: bool = False) -> Waveform:
        if self._resampler is None:
            return samples
        resampled: Waveform = self._resampler.resample_chunk(samples, last=last)
        return resampled


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
    power = np.empty((num_frames, num_mels))
    for start in range(0, num_frames, STFT_FRAMES):
        piece = slice(start, start + STFT_FRAMES)
        spectrum = np.fft.rfft(frames[piece] * _hann(), axis=1)  # [frames, 201]
        power[piece] = _weighed(spectrum.real**2 + spectrum.imag**2, mel_filters(num_mels))
    log_power = np.log10(np.maximum(power, LOG_FLOOR))
    limited = np.maximum(log_power, log_power.max() - DYNAMIC_RANGE)
    return np.ascontiguousarray(((limited + 4) / 4).T, dtype=np.float32)


def _weighed(power: npt.NDArray[np.float64], filters: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The product [frames, num_mels], in pieces that numpy's BLAS takes for too small to share among threads.

    Its threads go on spinning afterwards, which costs a short clip several times what the product does.
    """
    num_frames, num_bins = power.shape
    pieces = np.zeros((-(-num_frames // MEL_ROWS), MEL_ROWS, num_bins))
    pieces.reshape(-1, num_bins)[:num_frames] = power
    return (pieces @ filters).reshape(-1, filters.shape[1])[:num_frames]


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
