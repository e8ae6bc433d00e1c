"""Audio in which nobody speaks, made by formula: what a recognizer should answer with no words at all.

Unusual: one random generator runs through all clips of the first kinds, so a clip of theirs is what it is only in its
place; results of older runs stay comparable as long as new kinds are added behind them, with a generator of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arkasr.audio import SAMPLE_RATE, Waveform

DURATIONS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)
NOISE_DBFS = (-60, -40, -20, -6)
SLOPES = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls with this power of the frequency
LOWEST_HZ = 20  # below it noise is flat
ROOM_DBFS = -55
BEAT_S = 0.5
CHORDS = ((0, 4, 7), (-3, 0, 4), (-7, -3, 0), (-5, -1, 2))  # semitones from middle C: C, a, F, G
MIDDLE_C_HZ = 261.6256

Samples = npt.NDArray[np.float64]
Named = Iterator[tuple[str, str, Samples]]  # kind, name, samples


@dataclass(frozen=True)
class Clip:
    """Audio without speech: an id that no other clip has, its kind, and samples at 16 kHz."""

    id: str
    kind: str
    waveform: Waveform


def made() -> Iterator[Clip]:
    """Silence, noise, tones, hum, clicks, music and the tone of a room, of all durations, the same in every run."""
    first, second = np.random.default_rng(0), np.random.default_rng(1)
    for duration_s in DURATIONS_S:
        time_s = _time_s(duration_s)
        for makers in (
            _silences(len(time_s), first),
            _noises(len(time_s), first),
            _tones(time_s),
            _clicks(time_s, first),
        ):
            yield from (_clip(*named, duration_s) for named in makers)
    for duration_s in DURATIONS_S:
        time_s = _time_s(duration_s)
        yield _clip("music", "four chords", _music(time_s), duration_s)
        yield _clip("room", f"room tone, {ROOM_DBFS} dBFS", _room(time_s, second), duration_s)


def coloured(num_samples: int, slope: float, rng: np.random.Generator) -> Samples:
    """Gaussian noise whose amplitude falls with the frequency to the power `slope`, of no particular loudness."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    frequencies_hz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    shaped: Samples = np.fft.irfft(spectrum / np.maximum(frequencies_hz, LOWEST_HZ) ** slope, num_samples)
    return shaped


def _time_s(duration_s: float) -> Samples:
    return np.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE


def _clip(kind: str, name: str, samples: Samples, duration_s: float) -> Clip:
    return Clip(f"{name}, {duration_s:g} s", kind, samples.astype(np.float32))


def _at(samples: Samples, level_dbfs: float) -> Samples:
    """Noise of a level (root mean square), within full scale."""
    scaled: Samples = samples / np.sqrt(np.square(samples).mean()) * 10 ** (level_dbfs / 20)
    return np.clip(scaled, -1, 1)


def _silences(num_samples: int, rng: np.random.Generator) -> Named:
    yield "silence", "zeros", np.zeros(num_samples)
    yield "silence", "offset of 0.1", np.full(num_samples, 0.1)
    yield "silence", "last bit of 16", rng.integers(-1, 2, num_samples) / 32768


def _noises(num_samples: int, rng: np.random.Generator) -> Named:
    for name, slope in SLOPES.items():
        shaped = coloured(num_samples, slope, rng)
        for level in NOISE_DBFS:
            yield f"{name} noise", f"{name} noise, {level} dBFS", _at(shaped, level)


def _tones(time_s: Samples) -> Named:
    def sine(*frequencies_hz: float) -> Samples:
        return np.mean([np.sin(2 * np.pi * hz * time_s) for hz in frequencies_hz], axis=0)  # type: ignore[no-any-return]

    siren = np.sin(2 * np.pi * (700 * time_s + 60 * np.sin(4 * time_s)))
    for level in (-30, -3):
        gain = 10 ** (level / 20)
        for hz in (100, 440, 1000, 3000):
            yield "tone", f"{hz} Hz, {level} dBFS", sine(hz) * gain
        yield "tone", f"dial tone, {level} dBFS", sine(350, 440) * gain
        yield "tone", f"engaged tone, {level} dBFS", sine(480, 620) * (time_s % 1 < 0.5) * gain
        yield "tone", f"siren, {level} dBFS", siren * gain
        for hz in (50, 60):
            hum: Samples = sum((np.sin(2 * np.pi * hz * n * time_s) / n for n in range(1, 30)), np.zeros(len(time_s)))
            yield "hum", f"hum of {hz} Hz, {level} dBFS", hum / 2 * gain


def _clicks(time_s: Samples, rng: np.random.Generator) -> Named:
    once_a_second = np.zeros(len(time_s))
    once_a_second[800::SAMPLE_RATE] = 0.9
    yield "clicks", "one a second", once_a_second
    yield "clicks", "ten a second at random", np.where(rng.random(len(time_s)) < 10 / SAMPLE_RATE, 0.9, 0.0)
    decay = np.exp(-np.arange(400) / 60) * np.sin(np.arange(400) * 0.9)
    yield "clicks", "knocks, three a second", np.convolve(once_a_second, decay)[: len(time_s)]
    keys = (rng.random(len(time_s)) < 5 / SAMPLE_RATE) * rng.uniform(0.05, 0.5, len(time_s))
    typed = np.convolve(keys, decay)[: len(time_s)] + rng.standard_normal(len(time_s)) * 1e-3
    yield "clicks", "keys, five a second in noise", typed


def _music(time_s: Samples) -> Samples:
    """Plucked chords, one every half second, of notes with eight overtones."""
    beat, since_s = (time_s // BEAT_S).astype(np.int64), time_s % BEAT_S
    semitones = np.array(CHORDS)[beat % len(CHORDS)]  # [samples, notes]
    phases = 2 * np.pi * MIDDLE_C_HZ * 2 ** (semitones / 12) * since_s[:, None]
    notes = sum((np.sin(n * phases) / n for n in range(1, 9)), np.zeros_like(phases))
    return 0.1 * notes.sum(axis=1) * np.exp(-4 * since_s)  # type: ignore[no-any-return]


def _room(time_s: Samples, rng: np.random.Generator) -> Samples:
    """What a quiet office sounds like: rumble, and a hum that is 10 dB weaker."""
    rumble = _at(coloured(len(time_s), SLOPES["brown"], rng), ROOM_DBFS)
    return rumble + np.sin(2 * np.pi * 50 * time_s) * 10 ** ((ROOM_DBFS - 10 + 3) / 20)
