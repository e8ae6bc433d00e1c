"""What happens to speech on its way to a recognizer, in numpy: noise, rooms, tempo, levels, losses.

Every effect takes samples [n] at 16 kHz and what it may draw from, and gives float64 samples, as many unless it is
about time. Loudness is `active_level`: the RMS of the parts where somebody speaks, after ITU-T P.56's method B with its
margin of 15.9 dB and hangover of 200 ms, but gated on frames of 20 ms instead of a smoothed envelope.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import soxr

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import UsageError
from arkasr.evaluate.nonspeech import SLOPES, Samples, coloured

FRAME_SAMPLES = SAMPLE_RATE // 50  # 20 ms
HANGOVER_FRAMES = 10
MARGIN = 10 ** (15.9 / 10)  # of power, from the threshold of activity up to the active level
NOMINAL_LEVEL = 10 ** (-26 / 20)  # P.56's own: where nobody speaks, noise is as loud as if somebody did
AUDIBLE = 1e-4
MAX_DRAWS = 20
TALKERS = 6
DIRECT_TO_REVERBERANT = 1.0  # energy: as much from the mouth as from the walls
REVERB_END = 1.2  # RT60s after which a response is cut, at -72 dB
FILTER_TAPS = 1001
BLOCK_SAMPLES = 1 << 17  # of a convolution
WSOLA_SAMPLES, WSOLA_SEARCH = 800, 200  # a window of 50 ms, moved by up to 12.5 ms to where it fits best
LEAST_ENERGY = 1e-12  # of a window; what is quieter is no better a match
PAUSE_SAMPLES = 800

Drawn = Callable[[int], Waveform]


@dataclass(frozen=True)
class Chance:
    """What an effect may draw from.

    Attributes:
        rng: seeded by the clip's id and the condition's name.
        others: another utterance for any integer from 0 to 2^31 - 1.
        recorded: the same for recordings of noise, if there are any.
    """

    rng: np.random.Generator
    others: Drawn
    recorded: Drawn | None = None


# ---- loudness ----


def active_level(waveform: npt.NDArray[np.floating]) -> float:
    """RMS of speech while it is active; 0 in silence."""
    starts = np.arange(0, len(waveform), FRAME_SAMPLES)
    counts = np.diff(starts, append=len(waveform))
    energies = np.add.reduceat(np.square(waveform.astype(np.float64)), starts)
    active = np.ones(len(starts), bool)
    while True:
        power = energies[active].sum() / counts[active].sum()
        loud = energies / counts >= power / MARGIN
        still = np.convolve(loud, np.ones(HANGOVER_FRAMES + 1))[: len(loud)] > 0.5
        if (still == active).all():
            return math.sqrt(power)
        active = still  # a part of what was active before, and louder, so that this ends


def _mixed(waveform: Samples, noise: Samples, *, snr_db: float, noise_level: float) -> Samples:
    level = active_level(waveform) or NOMINAL_LEVEL
    return waveform + noise * (level / noise_level * 10 ** (-snr_db / 20))


def _rms(samples: Samples) -> float:
    return math.sqrt(np.square(samples).mean())


# ---- added sound ----


def noise(waveform: Samples, chance: Chance, *, colour: Literal["white", "pink"], snr_db: float) -> Samples:
    """Stationary noise under the whole clip."""
    added = coloured(len(waveform), SLOPES[colour], chance.rng)
    return _mixed(waveform, added, snr_db=snr_db, noise_level=_rms(added))


def babble(waveform: Samples, chance: Chance, *, snr_db: float) -> Samples:
    """Six equally loud talkers of other utterances, each from a random point and over again."""
    talkers = [_piece(chance.others, chance.rng, len(waveform), over_again=True) for _ in range(TALKERS)]
    added = np.sum([talker / active_level(talker) for talker in talkers], axis=0)
    return _mixed(waveform, added, snr_db=snr_db, noise_level=max(_rms(added), AUDIBLE))  # single samples may cancel


def recorded_noise(waveform: Samples, chance: Chance, *, snr_db: float) -> Samples:
    """A recording of noise, from a random point and over again.

    Raises:
        UsageError: there are no recordings.
    """
    if chance.recorded is None:
        raise UsageError("recorded noise: no recordings are given; name a folder of them")
    added = _piece(chance.recorded, chance.rng, len(waveform), over_again=True)
    return _mixed(waveform, added, snr_db=snr_db, noise_level=_rms(added))


def second_talker(waveform: Samples, chance: Chance, *, snr_db: float) -> Samples:
    """One other talker, weaker by `snr_db` of active level: a piece of a longer utterance, a shorter one somewhere."""
    added = _piece(chance.others, chance.rng, len(waveform), over_again=False)
    return _mixed(waveform, added, snr_db=snr_db, noise_level=active_level(added))


def _piece(drawn: Drawn, rng: np.random.Generator, num_samples: int, *, over_again: bool) -> Samples:
    """A random piece of what is drawn, once or over again; drawn anew where nothing is to be heard."""
    for _ in range(MAX_DRAWS):
        source = drawn(int(rng.integers(2**31))).astype(np.float64)
        if len(source) == 0:
            continue
        if not over_again:
            spare = max(num_samples - len(source), 0)
            before = int(rng.integers(spare + 1))
            source = np.pad(source, (before, spare - before))
        start = int(rng.integers(len(source) if over_again else len(source) - num_samples + 1))
        piece = source[(start + np.arange(num_samples)) % len(source)]
        if _rms(piece) >= AUDIBLE:
            return piece
    raise UsageError(f"other talkers or noise: {MAX_DRAWS} clips drawn, all silent; give some that can be heard")


# ---- rooms and filters ----


def reverb(waveform: Samples, chance: Chance, *, rt60_s: float) -> Samples:
    """A made room: the direct sound, and noise as strong that decays by 60 dB in `rt60_s`; its last tail is cut."""
    time_s = np.arange(1, round(REVERB_END * rt60_s * SAMPLE_RATE)) / SAMPLE_RATE
    walls = chance.rng.standard_normal(len(time_s)) * 10 ** (-3 * time_s / rt60_s)
    walls /= math.sqrt(np.square(walls).sum() * DIRECT_TO_REVERBERANT)
    return _convolved(waveform, np.concatenate([[1.0], walls]))[: len(waveform)]


def low_pass(waveform: Samples, _: Chance, *, hz: float, rate: int = SAMPLE_RATE) -> Samples:
    """Nothing above a frequency; no delay."""
    cut = 2 * hz / rate
    taps = cut * np.sinc(cut * (np.arange(FILTER_TAPS) - FILTER_TAPS // 2)) * np.hamming(FILTER_TAPS)
    return _convolved(waveform, taps / taps.sum())[FILTER_TAPS // 2 :][: len(waveform)]


def high_pass(waveform: Samples, chance: Chance, *, hz: float, rate: int = SAMPLE_RATE) -> Samples:
    """Nothing below a frequency; no delay."""
    return waveform - low_pass(waveform, chance, hz=hz, rate=rate)


def _convolved(waveform: Samples, response: Samples) -> Samples:
    """The whole convolution, block by block: an hour at once would take gigabytes."""
    whole = np.zeros(len(waveform) + len(response) - 1)
    for start in range(0, len(waveform), BLOCK_SAMPLES):
        block = waveform[start : start + BLOCK_SAMPLES]
        num_samples = len(block) + len(response) - 1
        size = 1 << (num_samples - 1).bit_length()
        product = np.fft.rfft(block, size) * np.fft.rfft(response, size)
        whole[start : start + num_samples] += np.fft.irfft(product, size)[:num_samples]
    return whole


# ---- time ----


def speed(waveform: Samples, _: Chance, *, factor: float) -> Samples:
    """Played faster, so that pitch and formants move too."""
    played = soxr.resample(waveform, SAMPLE_RATE * factor, SAMPLE_RATE)
    return fitted(played, max(round(len(waveform) / factor), 1))


def tempo(waveform: Samples, _: Chance, *, factor: float) -> Samples:
    """Spoken faster at the same pitch, by WSOLA: windows overlap where they best continue what was heard."""
    num_samples, hop = max(round(len(waveform) / factor), 1), WSOLA_SAMPLES // 2
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WSOLA_SAMPLES) / WSOLA_SAMPLES)
    margin = WSOLA_SAMPLES + WSOLA_SEARCH
    num_frames = -(-num_samples // hop) + 1
    padded = np.pad(waveform, (margin, margin + math.ceil(2 * hop * factor) + WSOLA_SAMPLES))
    longer = np.zeros((num_frames + 1) * hop)
    place = margin - hop  # the first window's middle is the first sample
    for n in range(num_frames):
        if n:
            place = _continued(padded, place + hop, margin - hop + round(n * hop * factor))
        longer[n * hop :][:WSOLA_SAMPLES] += padded[place : place + WSOLA_SAMPLES] * window
    return longer[hop:][:num_samples]


def _continued(padded: Samples, natural: int, wanted: int) -> int:
    """The place near `wanted` whose window is most like the natural continuation."""
    target = padded[natural : natural + WSOLA_SAMPLES]
    first = wanted - WSOLA_SEARCH
    searched = padded[first : wanted + WSOLA_SEARCH + WSOLA_SAMPLES]
    sums = np.cumsum(np.square(np.pad(searched, (1, 0))))
    energies = sums[WSOLA_SAMPLES:] - sums[:-WSOLA_SAMPLES]
    likeness = np.correlate(searched, target, "valid") / np.sqrt(np.maximum(energies, LEAST_ENERGY))
    return first + int(np.argmax(likeness))


def start_cut(waveform: Samples, _: Chance, *, seconds: float) -> Samples:
    """A recording that began too late; at most half of it is lost."""
    return waveform[min(round(seconds * SAMPLE_RATE), len(waveform) // 2) :]


def fitted(samples: Samples, num_samples: int) -> Samples:
    """Cut, or filled with silence, to a length."""
    return np.pad(samples[:num_samples], (0, max(num_samples - len(samples), 0)))


# ---- levels and losses ----


def gain(waveform: Samples, _: Chance, *, db: float) -> Samples:
    """Louder or softer; what is louder than full scale is cut off, as a converter does."""
    return np.clip(waveform * 10 ** (db / 20), -1, 1)


def clip(waveform: Samples, _: Chance, *, share: float) -> Samples:
    """A share of the samples that are not zero, the loudest ones, cut off at the loudest of the rest."""
    magnitudes = np.sort(np.abs(waveform[waveform != 0]))
    if len(magnitudes) == 0:
        return waveform
    limit = magnitudes[math.ceil((1 - share) * len(magnitudes)) - 1]
    return np.clip(waveform, -limit, limit)


def offset(waveform: Samples, _: Chance, *, by: float) -> Samples:
    """A constant added."""
    return waveform + by


def loss(waveform: Samples, chance: Chance, *, share: float, repeated: bool) -> Samples:
    """A share of the frames of 20 ms lost: filled with zeros, or with the last frame that came."""
    num_frames = -(-len(waveform) // FRAME_SAMPLES)
    num_lost = math.floor(share * num_frames + chance.rng.random())  # right on the average, for short clips too
    lost = chance.rng.permutation(num_frames)[:num_lost]
    frames = fitted(waveform, num_frames * FRAME_SAMPLES).reshape(num_frames, FRAME_SAMPLES)
    sources = np.arange(num_frames)
    sources[lost] = -1
    received = np.maximum.accumulate(sources) if repeated else sources
    filled = np.where(received[:, None] >= 0, frames[received], 0)
    return filled.reshape(-1)[: len(waveform)]


# ---- padding ----

Where = Literal["before", "after", "inside"]


def padding(waveform: Samples, chance: Chance, *, seconds: float, snr_db: float | None, where: Where) -> Samples:
    """Seconds of silence, or of pink noise by `snr_db` below the speech, around it or in its quietest middle pause."""
    added = np.zeros(round(seconds * SAMPLE_RATE))
    if snr_db is not None:
        added = coloured(len(added), SLOPES["pink"], chance.rng)
        added *= (active_level(waveform) or NOMINAL_LEVEL) / _rms(added) * 10 ** (-snr_db / 20)
    at = {"before": 0, "after": len(waveform), "inside": _pause(waveform)}[where]
    return np.concatenate([waveform[:at], added, waveform[at:]])


def _pause(waveform: Samples) -> int:
    """The middle of the quietest 50 ms of the middle half."""
    start, end = len(waveform) // 4, len(waveform) * 3 // 4
    if end - start <= PAUSE_SAMPLES:
        return len(waveform) // 2
    sums = np.cumsum(np.square(waveform[start:end]))
    return start + int((sums[PAUSE_SAMPLES:] - sums[:-PAUSE_SAMPLES]).argmin()) + PAUSE_SAMPLES // 2
