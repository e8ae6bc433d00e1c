"""Conditions of the robustness suite, against independent measurements of what their names promise."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import arkasr
from arkasr import metrics
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.data import read_manifest
from arkasr.errors import AudioError, UsageError
from arkasr.evaluate import codecs, nonspeech, robust
from arkasr.evaluate.effects import active_level
from arkasr.evaluate.robust import CONDITIONS, Condition, condition, perturb

FRAME = 320
Floats = npt.NDArray[np.float64]


def speechlike(duration_s: float = 3.0, *, seed: int = 0, level: float = 0.02) -> Waveform:
    """Syllables of voiced sound with pauses between words, above a faint noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time_s + seed)) / SAMPLE_RATE
    voice = np.sum([np.cos(n * pitch + rng.uniform(0, 6)) / n**0.7 for n in range(1, 30)], axis=0)
    syllables = np.clip(np.sin(2 * np.pi * 3.5 * time_s), 0.05, 1) * ((time_s + seed / 7) % 1.5 < 1)
    samples: Floats = level * (voice * syllables + 1e-3 * rng.standard_normal(len(time_s)))
    return samples.astype(np.float32)


def other(number: int) -> Waveform:
    return talker(number % 35)


@lru_cache(maxsize=35)
def talker(number: int) -> Waveform:
    return speechlike(1 + number % 5, seed=number, level=0.01 * (1 + number % 7))


def perturbed(waveform: Waveform, name: str, *, id: str = "an utterance") -> Waveform:  # noqa: A002
    return perturb(waveform, condition(name), id=id, others=other, recorded=other)


def db(ratio: float) -> float:
    return 10 * math.log10(ratio)


def power(samples: npt.NDArray[np.floating]) -> float:
    return float(np.square(samples.astype(np.float64)).mean())


def p56_level_db(waveform: npt.NDArray[np.floating]) -> float:
    """Active speech level by ITU-T P.56 method B, sample by sample: thresholds an octave apart, interpolated."""
    keep = math.exp(-1 / (SAMPLE_RATE * 0.03))
    envelope = np.zeros(len(waveform))
    once = twice = 0.0
    for n, magnitude in enumerate(np.abs(waveform).tolist()):
        once = keep * once + (1 - keep) * magnitude
        twice = keep * twice + (1 - keep) * once
        envelope[n] = twice
    energy = power(waveform) * len(waveform)
    indices = np.arange(len(waveform))
    before: tuple[float, float] | None = None
    for octave in range(-16, 1):
        threshold = 2.0**octave
        last_above = np.maximum.accumulate(np.where(envelope >= threshold, indices, -SAMPLE_RATE))
        count = int((indices - last_above < 0.2 * SAMPLE_RATE).sum())
        level = db(energy / count) if count else -100.0
        margin = level - 20 * math.log10(threshold)
        if margin <= 15.9:
            assert before is not None
            part = (before[1] - 15.9) / (before[1] - margin)
            return before[0] + part * (level - before[0])
        before = level, margin
    raise AssertionError


# ---- chance ----

DIGEST = """
import sys; sys.path.insert(0, {tests!r})
from test_robust import digest
print(digest())
"""


def digest() -> str:
    """Of a clip under every condition, taken in an order that differs from process to process."""
    found = {}
    for number in sorted(range(len(CONDITIONS)), key=lambda n: hash(str(n))):
        c = CONDITIONS[number]
        if c.codec is None or codecs.why_not(c.codec) is None:
            found[c.name] = hashlib.sha256(perturbed(speechlike(1), c.name).tobytes()).hexdigest()
    return json.dumps(found, sort_keys=True)


def test_the_same_bits_in_every_process_and_order() -> None:
    np.random.default_rng(0).random(7)
    outputs = [digest()]
    for seed in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", DIGEST.format(tests=str(Path(__file__).parent))],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        )
        outputs.append(result.stdout.strip())
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(json.loads(outputs[0])) >= len(CONDITIONS) - 8


@pytest.mark.parametrize(
    "name", ["white 10 dB", "babble 0 dB", "loss 20 % zeroed", "reverb 0.3 s", "pad 2 s noise after"]
)
def test_clips_and_conditions_have_their_own_chance(name: str) -> None:
    x = speechlike()
    assert not np.array_equal(perturbed(x, name, id="a"), perturbed(x, name, id="b"))


def test_conditions_of_one_kind_do_not_share_their_noise() -> None:
    x = speechlike()
    one, other_one = (perturbed(x, f"white {snr_db} dB").astype(np.float64) - x for snr_db in (10, 0))
    assert abs(np.corrcoef(one, other_one)[0, 1]) < 0.05


def test_no_pair_of_id_and_condition_shares_a_seed() -> None:
    named = [(clip, name) for clip in ("a", "a w", "a white", "ä") for name in ("w 5", "5", "white 5 dB", "hite 5 dB")]
    assert len({robust._seed(*pair) for pair in named}) == len(named)


# ---- loudness and noise ----


@pytest.mark.parametrize("seed", range(4))
def test_active_level_is_that_of_p56(seed: int) -> None:
    x = speechlike(4, seed=seed)
    padded = np.pad(x, (2 * SAMPLE_RATE, 3 * SAMPLE_RATE))
    assert abs(20 * math.log10(active_level(x)) - p56_level_db(x)) < 0.5
    assert abs(20 * math.log10(active_level(padded)) - p56_level_db(padded)) < 0.5


def test_active_level_is_that_of_p56_on_recordings(shared: Path) -> None:
    for utterance in islice(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"), 12):
        x = utterance.waveform()
        assert abs(20 * math.log10(active_level(x)) - p56_level_db(x)) < 1, utterance.id


def test_active_level_ignores_silence_and_keeps_short_pauses() -> None:
    tone = (0.1 * np.sin(np.arange(SAMPLE_RATE) * 0.3)).astype(np.float32)
    alone = active_level(tone)
    assert alone == pytest.approx(0.1 / math.sqrt(2), rel=1e-3)
    silence = np.zeros(SAMPLE_RATE, np.float32)
    assert active_level(np.concatenate([silence, silence, tone])) == pytest.approx(alone, rel=1e-6)
    hung = active_level(np.concatenate([tone, silence]))  # 0.2 s of hangover are part of the speech
    assert db(hung**2 / alone**2) == pytest.approx(db(1 / 1.2), abs=0.01)
    assert active_level(silence) == 0


@pytest.mark.parametrize("kind", ["white", "pink", "babble", "recorded"])
@pytest.mark.parametrize("snr_db", [20, 10, 5, 0, -5])
def test_noise_has_the_ratio_that_its_name_says(kind: str, snr_db: int) -> None:
    x = np.pad(speechlike(), (SAMPLE_RATE, SAMPLE_RATE))
    y = perturbed(x, f"{kind} {snr_db} dB")
    assert y.shape == x.shape
    assert db(active_level(x) ** 2 / power(y.astype(np.float64) - x)) == pytest.approx(snr_db, abs=0.2)


@pytest.mark.parametrize("snr_db", [10, 0])
@pytest.mark.parametrize("duration_s", [0.7, 8])
def test_a_second_talker_is_as_much_softer_as_its_name_says(snr_db: int, duration_s: float) -> None:
    x = speechlike(duration_s)
    added = perturbed(x, f"second talker +{snr_db} dB").astype(np.float64) - x
    assert 20 * math.log10(active_level(x) / active_level(added)) == pytest.approx(snr_db, abs=0.2)


@pytest.mark.parametrize("name", ["white -5 dB", "babble -5 dB", "second talker +0 dB", "reverb 1 s"])
def test_what_leaves_full_scale_is_made_softer_as_a_whole(name: str) -> None:
    """Else systems that write 16 bits would hear clipping, and others not."""
    x = speechlike()
    soft, loud = perturbed(x, name).astype(np.float64), perturbed(x * np.float32(0.99 / np.abs(x).max()), name)
    assert np.abs(loud).max() == 1
    np.testing.assert_allclose(loud, soft / np.abs(soft).max(), atol=1e-5)


def test_white_is_flat_and_pink_falls_by_three_decibels_an_octave() -> None:
    silence = np.zeros(30 * SAMPLE_RATE, np.float32)
    octaves = [(125 * 2**n, 250 * 2**n) for n in range(6)]
    for colour, per_octave in (("white", 3), ("pink", 0)):
        spectrum = np.abs(np.fft.rfft(perturbed(silence, f"{colour} 10 dB"))) ** 2
        hz = np.fft.rfftfreq(len(silence), 1 / SAMPLE_RATE)
        bands = [db(spectrum[(hz >= low) & (hz < high)].sum()) for low, high in octaves]
        np.testing.assert_allclose(np.diff(bands), per_octave, atol=0.35)


def test_babble_is_of_six_other_talkers() -> None:
    asked: list[int] = []

    def drawn(number: int) -> Waveform:
        asked.append(number)
        return other(number)

    perturb(speechlike(), condition("babble 5 dB"), id="x", others=drawn)
    assert len(set(asked)) == 6
    assert all(0 <= number < 2**31 for number in asked)


def test_silent_others_are_drawn_again_and_only_silent_ones_refused() -> None:
    silence = np.zeros(SAMPLE_RATE, np.float32)
    x = speechlike()
    y = perturb(x, condition("babble 5 dB"), id="x", others=lambda n: silence if n % 2 else other(n))
    assert db(active_level(x) ** 2 / power(y.astype(np.float64) - x)) == pytest.approx(5, abs=0.2)
    for others in (lambda _: silence, lambda _: silence[:0]):
        with pytest.raises(UsageError, match="all silent"):
            perturb(x, condition("second talker +0 dB"), id="x", others=others)
    with pytest.raises(UsageError, match="no recordings"):
        perturb(x, condition("recorded 5 dB"), id="x", others=other)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_among_gives_all_others_and_never_the_clip_itself(count: int) -> None:
    clips = [np.full(1, n, np.float32) for n in range(count)]
    for this in range(count):
        drawn = robust.among(clips.__getitem__, count, this=this)
        assert {int(drawn(n)[0]) for n in range(100)} == set(range(count)) - {this}
    with pytest.raises(UsageError, match="one utterance"):
        robust.among(clips.__getitem__, 1, this=0)


# ---- rooms and filters ----


@pytest.mark.parametrize("rt60_s", [0.3, 0.6, 1.0])
def test_a_room_decays_in_its_time(rt60_s: float) -> None:
    """By Schroeder's backward integration of what a click leaves, from -5 to -35 dB."""
    click = np.zeros(2 * SAMPLE_RATE, np.float32)
    click[0] = 0.1
    heard = np.square(perturbed(click, f"reverb {rt60_s:g} s").astype(np.float64))
    left_db = 10 * np.log10(np.cumsum(heard[::-1])[::-1] / heard.sum() + 1e-30)
    place = np.flatnonzero((left_db < -5) & (left_db > -35))
    slope = np.polyfit(place / SAMPLE_RATE, left_db[place], 1)[0]
    assert -60 / slope == pytest.approx(rt60_s, rel=0.1)
    assert db(heard[0] / heard[1:].sum()) == pytest.approx(0, abs=0.1)


def test_a_room_is_linear_across_the_blocks_of_its_convolution() -> None:
    x = np.zeros(400_000, np.float32)
    x[100], x[131_071], x[262_144] = 0.1, 0.2, -0.15
    response = perturbed(np.eye(1, 9_000, dtype=np.float32)[0] * np.float32(0.1), "reverb 0.3 s") * 10
    y = perturbed(x, "reverb 0.3 s")
    wanted = sum(np.pad(response, (at, 400_000 - at - 9_000)) * x[at] for at in (100, 131_071, 262_144))
    short = round(0.3 * 1.2 * SAMPLE_RATE)
    np.testing.assert_allclose(y[: 100 + short], wanted[: 100 + short], atol=1e-6)
    np.testing.assert_allclose(y[131_071:][:short], wanted[131_071:][:short], atol=1e-6)
    np.testing.assert_allclose(y[262_144:][:short], wanted[262_144:][:short], atol=1e-6)


def gain_db(name: str, hz: float) -> float:
    tone = (0.1 * np.sin(2 * np.pi * hz * np.arange(SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)
    middle = slice(SAMPLE_RATE // 4, -SAMPLE_RATE // 4)
    return db(power(perturbed(tone, name)[middle]) / power(tone[middle]) + 1e-20)


@pytest.mark.parametrize(
    ("name", "through", "stopped"),
    [
        ("high-pass 400 Hz", [500, 1000, 7000], [50, 300]),
        ("low-pass 4 kHz", [100, 1000, 3900], [4100, 7000]),
        ("low-pass 2 kHz", [100, 1900], [2100, 6000]),
        ("telephone mu-law", [500, 1000, 3000], [50, 200, 3600, 5000]),
        ("telephone a-law", [500, 1000, 3000], [50, 200, 3600, 5000]),
    ],
)
def test_filters_pass_their_band_only(name: str, through: list[float], stopped: list[float]) -> None:
    for hz in through:
        assert gain_db(name, hz) == pytest.approx(0, abs=0.3), hz
    for hz in stopped:
        assert gain_db(name, hz) < -30, hz


# ---- telephones and codecs ----


def test_g711_has_the_values_of_its_tables() -> None:
    def mu(*pcm: int) -> list[object]:
        return list(codecs.mu_law_codes(np.array(pcm)))

    def a(*pcm: int) -> list[object]:
        return list(codecs.a_law_codes(np.array(pcm)))

    assert mu(0, 32767, -32768, 4, 8031 * 4, 1000, -1000) == [0xFF, 0x80, 0x00, 0xFE, 0x80, 0xCE, 0x4E]
    assert a(0, -1, 32767, -32768, 16, 1000, -1000) == [0xD5, 0x55, 0xAA, 0x2A, 0xD4, 0xFA, 0x7A]

    def mu_back(*code: int) -> list[object]:
        return list(codecs.mu_law_expanded(np.array(code, np.uint8)))

    def a_back(*code: int) -> list[object]:
        return list(codecs.a_law_expanded(np.array(code, np.uint8)))

    assert mu_back(0xFF, 0x7F, 0x80, 0x00, 0xFE, 0xF0, 0xEF) == [0, 0, 32124, -32124, 8, 120, 132]
    assert a_back(0xD5, 0x55, 0xAA, 0x2A, 0xD4, 0xC5) == [8, -8, 32256, -32256, 24, 264]


@pytest.mark.parametrize("law", ["mu", "a"])
def test_g711_agrees_with_libsndfile(law: str) -> None:
    encode, expand = (
        (codecs.mu_law_codes, codecs.mu_law_expanded) if law == "mu" else (codecs.a_law_codes, codecs.a_law_expanded)
    )
    subtype = "ULAW" if law == "mu" else "ALAW"
    every = np.arange(256, dtype=np.uint8)
    table, _ = soundfile.read(
        io.BytesIO(every.tobytes()), format="RAW", subtype=subtype, samplerate=8000, channels=1, dtype="int16"
    )
    np.testing.assert_array_equal(expand(every), table)
    zeros = {0x7F, 0xFF} if law == "mu" else set()
    assert {c for c in every.tolist() if encode(expand(np.array([c], np.uint8)))[0] != c} <= zeros

    pcm = np.arange(-32768, 32768)
    file = io.BytesIO()
    soundfile.write(file, pcm.astype(np.int16), 8000, format="RAW", subtype=subtype)
    theirs = np.frombuffer(file.getvalue(), np.uint8)
    np.testing.assert_array_equal(encode(pcm[pcm >= 0]), theirs[pcm >= 0])
    # Of negative samples it takes the two's complement, which G.711 does not: theirs is one unit of 16 bits larger.
    np.testing.assert_array_equal(encode(pcm[(pcm < 0)] - 1)[1:], theirs[pcm < 0][1:])


AVAILABLE = [c for c in CONDITIONS if c.codec is not None and codecs.why_not(c.codec) is None]


def test_libsndfile_has_all_codecs_here() -> None:
    assert [c.name for c in AVAILABLE] == [c.name for c in CONDITIONS if c.codec is not None]


@pytest.mark.parametrize("c", AVAILABLE, ids=lambda c: c.name)
def test_codecs_neither_delay_nor_lose_the_speech(c: Condition) -> None:
    x = speechlike()
    y = perturbed(x, c.name).astype(np.float64)
    assert y.shape == x.shape
    size = 2 * len(x)
    correlation = np.fft.irfft(np.fft.rfft(y, size) * np.fft.rfft(x, size).conj(), size)
    lag = (int(correlation.argmax()) + len(x)) % size - len(x)
    assert abs(lag) <= 8  # half a millisecond
    assert correlation.max() / (len(x) * math.sqrt(power(x) * power(y))) > 0.85
    assert not np.allclose(y, x, atol=1e-5)


@pytest.mark.parametrize("c", AVAILABLE, ids=lambda c: c.name)
def test_codecs_have_the_bit_rate_of_their_name(c: Condition) -> None:
    codec = c.codec
    assert codec is not None
    file = io.BytesIO()
    mode = "CONSTANT" if codec.constant else None
    noise = 0.05 * np.random.default_rng(0).standard_normal(10 * codec.rate)
    with soundfile.SoundFile(
        file, "w", codec.rate, 1, format=codec.format, subtype=codec.subtype,
        compression_level=codec.compression, bitrate_mode=mode,
    ) as sound:  # fmt: skip
        sound.write(noise)
    kbps = len(file.getvalue()) * 8 / 1000 / 10
    assert kbps == pytest.approx(int(c.name.split()[1]), rel=0.25)  # with the container; Opus varies


def test_a_missing_encoder_is_named_and_its_condition_skipped() -> None:
    lacking = codecs.Codec("amr 12 k", "AMR", "NB", SAMPLE_RATE)
    lost = Condition("amr 12 k", "codec", lambda x, chance: codecs.coded(x, chance, codec=lacking), lacking)
    with pytest.raises(UsageError, match=r"amr 12 k: libsndfile .* cannot encode"):
        perturb(speechlike(), lost, id="x", others=other)
    kept, notes = robust.runnable([robust.CLEAN, lost, condition("recorded 5 dB")], recorded=False)
    assert kept == (robust.CLEAN,)
    assert any("amr 12 k" in note for note in notes)
    assert any("recorded 5 dB" in note for note in notes)
    kept, notes = robust.runnable(robust.suite("all"), recorded=True)
    assert len(kept) == len(CONDITIONS)
    assert [note for note in notes if "AMR" in note] == list(notes)


# ---- time ----


def pitch_hz(waveform: Waveform) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 1 << 18))
    return float(spectrum.argmax() * SAMPLE_RATE / (1 << 18))


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
@pytest.mark.parametrize("num_samples", [1, 7, 777, 48_001])
def test_speed_and_tempo_change_the_duration(factor: float, num_samples: int) -> None:
    x = speechlike()[:1].repeat(num_samples)
    for name in ("speed", "tempo"):
        assert len(perturbed(x, f"{name} {factor:g}")) == max(round(num_samples / factor), 1)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_moves_the_pitch_and_tempo_keeps_it(factor: float) -> None:
    tone = (0.1 * np.sin(2 * np.pi * 311 * np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)
    faster, denser = perturbed(tone, f"speed {factor:g}"), perturbed(tone, f"tempo {factor:g}")
    assert pitch_hz(faster) == pytest.approx(311 * factor, rel=0.003)
    assert pitch_hz(denser) == pytest.approx(311, rel=0.003)
    middle = slice(SAMPLE_RATE // 2, -SAMPLE_RATE // 2)
    assert db(power(denser[middle]) / power(tone[middle])) == pytest.approx(0, abs=0.2)
    assert np.abs(denser[middle]).max() < 0.105  # windows that meet out of step would beat


@pytest.mark.parametrize("name", ["speed 0.8", "tempo 0.8", "tempo 1.1", "tempo 1.25", "speed 1.1"])
def test_what_is_said_stays_in_its_place(name: str) -> None:
    factor = float(name.split()[1])
    rng = np.random.default_rng(0)
    x = np.zeros(5 * SAMPLE_RATE, np.float32)
    for start in (1, 2, 4):
        x[start * SAMPLE_RATE :][: SAMPLE_RATE // 2] = 0.1 * rng.standard_normal(SAMPLE_RATE // 2)
    y = perturbed(x, name)
    for start in (1, 2, 4):
        near = np.abs(y[round((start - 0.3) / factor * SAMPLE_RATE) : round((start + 0.3) / factor * SAMPLE_RATE)])
        begin_s = (start - 0.3) / factor + int((near > 0.03).argmax()) / SAMPLE_RATE
        assert begin_s == pytest.approx(start / factor, abs=0.03)


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.5])
def test_the_start_is_cut_but_never_more_than_half(seconds: float) -> None:
    x = speechlike()
    np.testing.assert_array_equal(perturbed(x, f"start cut {seconds:g} s"), x[round(seconds * SAMPLE_RATE) :])
    np.testing.assert_array_equal(perturbed(x[:101], f"start cut {seconds:g} s"), x[50:101])


@pytest.mark.parametrize("seconds", [2, 5, 10])
@pytest.mark.parametrize("filling", ["silence", "noise"])
@pytest.mark.parametrize("where", ["before", "after", "inside"])
def test_padding_leaves_the_speech_and_finds_a_pause(seconds: int, filling: str, where: str) -> None:
    x = speechlike()
    x[20_000:22_000] *= 1e-3
    y = perturbed(x, f"pad {seconds} s {filling} {where}")
    count = seconds * SAMPLE_RATE
    at = int(np.append(y[: len(x)] != x, [True]).argmax())
    np.testing.assert_array_equal(np.delete(y, slice(at, at + count)), x)
    if where == "inside":
        assert 20_000 <= at <= 22_000
    else:
        assert at == (0 if where == "before" else len(x))
    level = power(y[at : at + count])
    if filling == "silence":
        assert level == 0
    else:
        assert db(active_level(x) ** 2 / level) == pytest.approx(20, abs=0.2)


# ---- levels and losses ----


@pytest.mark.parametrize("gain", [-40, -30, -20, 10])
def test_gain(gain: int) -> None:
    x = speechlike(level=0.2)
    np.testing.assert_allclose(perturbed(x, f"gain {gain:+} dB"), np.clip(x * 10 ** (gain / 20), -1, 1), atol=1e-7)


@pytest.mark.parametrize("percent", [1, 5, 25])
def test_the_share_of_clipped_samples(percent: int) -> None:
    x = np.pad(speechlike(), (0, 100 * SAMPLE_RATE))  # digital silence counts for nothing
    y = perturbed(x, f"clip {percent} %")
    changed = y != x
    assert changed.sum() == pytest.approx(percent / 100 * 3 * SAMPLE_RATE, abs=2)
    assert np.unique(np.abs(y[changed])).tolist() == [np.abs(y).max()]


def test_an_offset_is_added() -> None:
    x = speechlike()
    np.testing.assert_allclose(perturbed(x, "dc 0.1"), x + np.float32(0.1), atol=1e-7)


@pytest.mark.parametrize("percent", [1, 5, 10, 20])
@pytest.mark.parametrize("repeated", [False, True])
def test_lost_frames(percent: int, repeated: bool) -> None:
    x = speechlike(20) + np.float32(1e-4)
    y = perturbed(x, f"loss {percent} % {'repeated' if repeated else 'zeroed'}")
    sent, received = x.reshape(-1, FRAME), y.reshape(-1, FRAME)
    lost = (sent != received).any(axis=1)
    assert lost.sum() == percent / 100 * len(lost)
    for n in np.flatnonzero(lost):
        wanted = received[n - 1] if repeated and n else np.zeros(FRAME)
        np.testing.assert_array_equal(received[n], wanted)


def test_short_clips_lose_as_much_on_the_average() -> None:
    x = np.full(5 * FRAME + 20, 0.1, np.float32)
    lost = [
        (np.add.reduceat(perturbed(x, "loss 10 % zeroed", id=str(n)) == 0, np.arange(0, len(x), FRAME)) > 0).sum()
        for n in range(500)
    ]
    assert 0.08 < sum(lost) / (6 * 500) < 0.12


# ---- whatever comes ----


def odd_clips() -> list[Waveform]:
    rng = np.random.default_rng(0)
    clips = [speechlike()[:n] for n in (1, 2, 3, 159, 160, 161, 320, 321, 799, 3000)]
    return [
        *clips,
        np.zeros(1, np.float32),
        np.zeros(5000, np.float32),
        np.full(5000, 1e-40, np.float32),
        np.where(rng.random(5000) < 0.5, -1, 1).astype(np.float32),
        np.eye(1, 4000, 2000, dtype=np.float32)[0],
        np.full(4000, -1, np.float32),
    ]


@pytest.mark.parametrize("c", CONDITIONS, ids=lambda c: c.name)
def test_odd_clips_stay_finite_and_within_full_scale(c: Condition) -> None:
    if c.codec is not None and codecs.why_not(c.codec) is not None:
        pytest.skip(f"no {c.name} in this libsndfile")
    for x in odd_clips():
        original = x.copy()
        y = perturbed(x, c.name)
        assert y.dtype == np.float32
        assert y.flags.c_contiguous
        assert len(y) > 0
        assert np.isfinite(y).all()
        assert np.abs(y).max() <= 1
        np.testing.assert_array_equal(x, original)  # the caller's samples are left alone
        huge = perturbed(np.float32(3e38) * x, c.name)
        assert np.isfinite(huge).all()
        assert c is robust.CLEAN or np.abs(huge).max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    c=st.sampled_from([c for c in CONDITIONS if c.codec is None and c.family != "padding"]),
    samples=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=700),
)
def test_any_samples(c: Condition, samples: list[float]) -> None:
    y = perturbed(np.array(samples, np.float32), c.name)
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= 1


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 3)), np.array([0.0, np.nan]), np.array([np.inf])])
def test_what_is_no_waveform_is_one_clear_error(bad: Floats) -> None:
    for c in CONDITIONS:
        with pytest.raises(AudioError, match=r"^clip 7: .*wanted|^clip 7: .*write the file again"):
            perturb(bad.astype(np.float32), c, id="clip 7", others=other)


# ---- lists ----


def test_names_and_suites() -> None:
    assert len({c.name for c in CONDITIONS}) == len(CONDITIONS)
    for name in robust.SUITES:
        chosen = robust.suite(name)
        assert chosen[0] is robust.CLEAN
        assert set(chosen) <= set(CONDITIONS)
    assert set(robust.suite("all")) == set(CONDITIONS)
    ladder = [f"{kind} {snr} dB" for kind in ("babble", "pink", "white") for snr in (20, 10, 5, 0, -5)]
    assert {c.name for c in robust.suite("noise")} == {"clean", *ladder}
    assert len(robust.suite("padding")) == 19
    x = speechlike()
    np.testing.assert_array_equal(perturbed(x, "clean"), x)
    with pytest.raises(UsageError, match="white 10 dB"):
        condition("white 10")
    with pytest.raises(UsageError, match="standard, noise"):
        robust.suite("loud")


# ---- nobody speaks ----


def test_made_clips_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonspeech, "DURATIONS_S", (0.1, 3.0))
    clips = {clip.id: clip for clip in nonspeech.made()}
    again = list(nonspeech.made())
    assert list(clips) == [clip.id for clip in again]  # no id stands twice
    for clip in again:
        np.testing.assert_array_equal(clip.waveform, clips[clip.id].waveform)
        assert clip.waveform.dtype == np.float32
        assert np.abs(clip.waveform).max() <= 1
        assert len(clip.waveform) == round(float(clip.id.split(", ")[-1].removesuffix(" s")) * SAMPLE_RATE)
    noises = {f"{colour} noise" for colour in ("white", "pink", "brown")}
    assert {clip.kind for clip in again} == noises | {"silence", "tone", "hum", "clicks", "music", "room"}
    assert not clips["zeros, 3 s"].waveform.any()
    assert 20 * math.log10(math.sqrt(power(clips["pink noise, -40 dBFS, 3 s"].waveform))) == pytest.approx(-40, abs=0.1)
    assert pitch_hz(clips["440 Hz, -30 dBFS, 3 s"].waveform) == pytest.approx(440, abs=1)
    assert pitch_hz(clips["hum of 50 Hz, -30 dBFS, 3 s"].waveform) == pytest.approx(50, abs=1)
    music = clips["four chords, 3 s"].waveform
    assert pitch_hz(music[: SAMPLE_RATE // 2]) in (
        pytest.approx(261.63, rel=0.02), pytest.approx(329.63, rel=0.02), pytest.approx(392, rel=0.02),
    )  # fmt: skip
    assert power(clips["room tone, -55 dBFS, 3 s"].waveform) == pytest.approx(10**-5.5, rel=0.3)


# ---- a recognizer ----


def test_the_shipped_model_hears_less_in_noise(shared: Path) -> None:
    utterances = list(islice(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"), 15))
    waveforms = [utterance.waveform() for utterance in utterances]
    transcriber = arkasr.load_model("tiny")

    def rate(name: str) -> float:
        heard = []
        for n, (utterance, waveform) in enumerate(zip(utterances, waveforms, strict=True)):
            others = robust.among(waveforms.__getitem__, len(waveforms), this=n)
            noisy = perturb(waveform, condition(name), id=utterance.id, others=others)
            heard.append((utterance.text, transcriber.transcribe((noisy, SAMPLE_RATE)).text))
        return metrics.corpus_word_errors(heard).rate

    assert rate("clean") < rate("white -5 dB")
