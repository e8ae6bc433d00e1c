"""Speech through a telephone or a codec and back, aligned and as long as before.

G.711 is here by its formula; the others are libsndfile's encoders, which a build of it may lack. The same bits come
out only of the same libsndfile, so its version belongs into a report.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from arkasr.audio import SAMPLE_RATE
from arkasr.errors import UsageError
from arkasr.evaluate.effects import Chance, fitted, high_pass, low_pass
from arkasr.evaluate.nonspeech import Samples

TELEPHONE_RATE = 8_000
TELEPHONE_BAND_HZ = (300.0, 3400.0)
LEAST_S = 0.1  # what is shorter is filled up, for some encoders need more than a sample
NO_ENCODER = "AMR: libsndfile has no encoder, and ffmpeg is not used; not measured"

Pcm = npt.NDArray[np.int64]  # of 16 bits
Codes = npt.NDArray[np.uint8]
Law = Literal["mu", "a"]


@dataclass(frozen=True)
class Codec:
    """One of libsndfile's encoders.

    Attributes:
        name: what errors call it.
        format, subtype: libsndfile's names.
        rate: samples a second that it is given.
        compression: from 0 to 1, which sets the bit rate of MP3 and Opus.
        constant: whether the bit rate must not vary.
        delay_samples: by which its output comes late.
    """

    name: str
    format: str
    subtype: str
    rate: int
    compression: float | None = None
    constant: bool = False
    delay_samples: int = 0


def mp3(kbps: int) -> Codec:
    """MPEG-2 layer III; libsndfile spreads 160 to 8 kbit/s over the compression, and its output starts 1105 late."""
    return Codec(f"mp3 {kbps} k", "MP3", "MPEG_LAYER_III", SAMPLE_RATE, (160 - kbps) / 152, True, 576 + 529)


def opus(kbps: int) -> Codec:
    """Opus in Ogg at a variable rate; libsndfile spreads 256 to 6 kbit/s over the compression."""
    return Codec(f"opus {kbps} k", "OGG", "OPUS", SAMPLE_RATE, (256 - kbps) / 250)


GSM = Codec("gsm 13 k", "WAV", "GSM610", TELEPHONE_RATE)
G721 = Codec("g721 32 k", "AU", "G721_32", TELEPHONE_RATE)
G723 = Codec("g723 24 k", "AU", "G723_24", TELEPHONE_RATE)


def coded(waveform: Samples, _: Chance, *, codec: Codec) -> Samples:
    """Encoded and decoded.

    Raises:
        UsageError: this libsndfile lacks the encoder or its decoder.
    """
    narrow = soxr.resample(waveform, SAMPLE_RATE, codec.rate)
    num_samples = len(narrow)
    heard = _through(fitted(narrow, max(num_samples, round(LEAST_S * codec.rate))), codec)
    heard = fitted(heard[codec.delay_samples :], num_samples)
    return fitted(soxr.resample(heard, codec.rate, SAMPLE_RATE), len(waveform))


@lru_cache(maxsize=32)
def why_not(codec: Codec) -> str | None:
    """Why this machine cannot use a codec, found by trying it; None where it can."""
    try:
        _through(np.zeros(codec.rate), codec)
    except UsageError as error:
        return str(error)
    return None


def _through(waveform: Samples, codec: Codec) -> Samples:
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(
            buffer, "w", codec.rate, 1, format=codec.format, subtype=codec.subtype,
            compression_level=codec.compression, bitrate_mode="CONSTANT" if codec.constant else None,
        ) as file:  # fmt: skip
            file.write(np.clip(waveform, -1, 1))
        buffer.seek(0)
        heard, _ = soundfile.read(buffer, dtype="float64")
    except (soundfile.LibsndfileError, ValueError) as error:  # ValueError: a format that soundfile does not know
        raise UsageError(
            f"{codec.name}: libsndfile {soundfile.__libsndfile_version__} cannot encode and decode it ({error}); "
            "install a soundfile whose library can, or leave the condition out"
        ) from None
    return heard  # type: ignore[no-any-return]


def telephone(waveform: Samples, chance: Chance, *, law: Law) -> Samples:
    """A line of 8 kHz from 300 to 3400 Hz, with G.711's 8 bits a sample."""
    narrow = soxr.resample(waveform, SAMPLE_RATE, TELEPHONE_RATE)
    lowest, highest = TELEPHONE_BAND_HZ
    narrow = low_pass(narrow, chance, hz=highest, rate=TELEPHONE_RATE)
    narrow = high_pass(narrow, chance, hz=lowest, rate=TELEPHONE_RATE)
    pcm = np.clip(np.rint(narrow * 32768), -32768, 32767).astype(np.int64)
    heard = mu_law_expanded(mu_law_codes(pcm)) if law == "mu" else a_law_expanded(a_law_codes(pcm))
    return fitted(soxr.resample(heard / 32768, TELEPHONE_RATE, SAMPLE_RATE), len(waveform))


# ---- G.711: a sign, three bits of segment, four bits of step ----


def mu_law_codes(pcm: Pcm) -> Codes:
    """14 bits to 8, all inverted on the line; the segments are powers of two once 33 steps are added."""
    magnitude = np.minimum((_magnitude(pcm) >> 2) + 33, 8191)
    segment = _top_bit(magnitude) - 5
    step = (magnitude >> (segment + 1)) & 15
    codes: Codes = (~(_sign(pcm < 0) | segment << 4 | step) & 0xFF).astype(np.uint8)
    return codes


def mu_law_expanded(codes: Codes) -> Pcm:
    """The 16-bit samples that codes stand for: the middles of their steps."""
    inverted = 255 - codes.astype(np.int64)
    magnitude = (((inverted & 15) * 2 + 33 << (inverted >> 4 & 7)) - 33) * 4
    return np.where(inverted & 0x80, -magnitude, magnitude)


def a_law_codes(pcm: Pcm) -> Codes:
    """13 bits to 8, every other one inverted on the line; the first two segments have the same step."""
    magnitude = _magnitude(pcm) >> 4
    segment = np.maximum(_top_bit(np.maximum(magnitude, 1)) - 3, 0)
    step = (magnitude >> np.maximum(segment - 1, 0)) & 15
    codes: Codes = ((_sign(pcm >= 0) | segment << 4 | step) ^ 0x55).astype(np.uint8)
    return codes


def a_law_expanded(codes: Codes) -> Pcm:
    """The 16-bit samples that codes stand for: the middles of their steps."""
    plain = codes.astype(np.int64) ^ 0x55
    segment = plain >> 4 & 7
    magnitude: Pcm = ((plain & 15) * 2 + 1 + 32 * (segment > 0) << np.maximum(segment - 1, 0)) * 8
    return np.where(plain & 0x80, magnitude, -magnitude)


def _magnitude(pcm: Pcm) -> Pcm:
    """As G.711's own arithmetic has it, by the ones' complement: -1 is a negative zero."""
    return np.where(pcm < 0, ~pcm, pcm)


def _sign(negative: npt.NDArray[np.bool_]) -> Pcm:
    return np.where(negative, 0x80, 0)


def _top_bit(values: Pcm) -> Pcm:
    """The place of the highest bit that is set."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
