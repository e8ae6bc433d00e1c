"""The robustness suite: named conditions that make the same harder audio of a clip for every system, in every run.

    perturb(waveform, condition("white 10 dB"), id="1089-134686-0000", others=...) -> waveform

The seed is a hash of the clip's id and the condition's name, so neither order nor process nor the other conditions
matter. Unusual: what would leave full scale is made softer as a whole, for clipping is a condition of its own.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import AudioError, UsageError, quoted
from arkasr.evaluate import codecs, effects
from arkasr.evaluate.effects import Chance, Drawn
from arkasr.evaluate.nonspeech import Samples

SNRS_DB = (20, 10, 5, 0, -5)
RATES = (0.8, 0.9, 1.1, 1.25)
PADDED_NOISE_DB = 20  # below the speech
MAX_S = 24 * 3600
RECORDED = "recorded"


@dataclass(frozen=True)
class Condition:
    """One way to make speech harder to recognize.

    Attributes:
        name: in reports and on the command line, and part of the seed.
        family: under which reports put it.
        effect: what it does to samples at 16 kHz.
        codec: the encoder that it needs.
    """

    name: str
    family: str
    effect: Callable[[Samples, Chance], Samples]
    codec: codecs.Codec | None = None


def _unchanged(waveform: Samples, _: Chance) -> Samples:
    return waveform


def _noises() -> Iterable[Condition]:
    for snr_db in SNRS_DB:
        yield Condition(f"white {snr_db} dB", "noise", partial(effects.noise, colour="white", snr_db=snr_db))
        yield Condition(f"pink {snr_db} dB", "noise", partial(effects.noise, colour="pink", snr_db=snr_db))
        yield Condition(f"babble {snr_db} dB", "noise", partial(effects.babble, snr_db=snr_db))
        yield Condition(f"{RECORDED} {snr_db} dB", RECORDED, partial(effects.recorded_noise, snr_db=snr_db))
    for snr_db in (10, 0):
        yield Condition(f"second talker +{snr_db} dB", "talker", partial(effects.second_talker, snr_db=snr_db))


def _channels() -> Iterable[Condition]:
    for rt60_s in (0.3, 0.6, 1.0):
        yield Condition(f"reverb {rt60_s:g} s", "reverb", partial(effects.reverb, rt60_s=rt60_s))
    yield Condition("telephone mu-law", "telephone", partial(codecs.telephone, law="mu"))
    yield Condition("telephone a-law", "telephone", partial(codecs.telephone, law="a"))
    for codec in (
        codecs.GSM, codecs.G721, codecs.G723, codecs.mp3(16), codecs.mp3(32),
        codecs.opus(6), codecs.opus(12), codecs.opus(24),
    ):  # fmt: skip
        yield Condition(codec.name, "codec", partial(codecs.coded, codec=codec), codec)
    yield Condition("high-pass 400 Hz", "filter", partial(effects.high_pass, hz=400))
    yield Condition("low-pass 4 kHz", "filter", partial(effects.low_pass, hz=4_000))
    yield Condition("low-pass 2 kHz", "filter", partial(effects.low_pass, hz=2_000))


def _levels() -> Iterable[Condition]:
    for factor in RATES:
        yield Condition(f"speed {factor:g}", "speed", partial(effects.speed, factor=factor))
        yield Condition(f"tempo {factor:g}", "tempo", partial(effects.tempo, factor=factor))
    for db in (-40, -30, -20, 10):
        yield Condition(f"gain {db:+} dB", "gain", partial(effects.gain, db=db))
    for percent in (1, 5, 25):
        yield Condition(f"clip {percent} %", "clip", partial(effects.clip, share=percent / 100))
    yield Condition("dc 0.1", "dc", partial(effects.offset, by=0.1))
    for percent in (1, 5, 10, 20):
        for repeated, filling in ((False, "zeroed"), (True, "repeated")):
            effect = partial(effects.loss, share=percent / 100, repeated=repeated)
            yield Condition(f"loss {percent} % {filling}", "loss", effect)
    for seconds in (0.1, 0.2, 0.5):
        yield Condition(f"start cut {seconds:g} s", "start cut", partial(effects.start_cut, seconds=seconds))


def _paddings() -> Iterable[Condition]:
    wheres: tuple[effects.Where, ...] = ("before", "after", "inside")
    for seconds in (2, 5, 10):
        for filling, snr_db in (("silence", None), ("noise", PADDED_NOISE_DB)):
            for where in wheres:
                effect = partial(effects.padding, seconds=seconds, snr_db=snr_db, where=where)
                yield Condition(f"pad {seconds} s {filling} {where}", "padding", effect)


CLEAN = Condition("clean", "clean", _unchanged)  # padding of 0 s, too
CONDITIONS: tuple[Condition, ...] = (CLEAN, *_noises(), *_channels(), *_levels(), *_paddings())
_BY_NAME = {condition.name: condition for condition in CONDITIONS}

STANDARD = (
    "clean", "white 10 dB", "pink 5 dB", "babble 10 dB", "babble 0 dB", "second talker +10 dB", "reverb 0.6 s",
    "telephone mu-law", "telephone a-law", "gsm 13 k", "mp3 16 k", "opus 6 k", "low-pass 4 kHz", "speed 0.9",
    "speed 1.1", "tempo 0.8", "tempo 1.25", "gain -30 dB", "clip 5 %", "dc 0.1", "loss 5 % zeroed",
    "loss 10 % repeated", "start cut 0.2 s",
)  # fmt: skip
SUITES = ("standard", "noise", RECORDED, "padding", "all")


def condition(name: str) -> Condition:
    """The condition of a name.

    Raises:
        UsageError: there is none; the nearest is named.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, 1, cutoff=0)[0]
        raise UsageError(f"{quoted(name)}: no such condition; did you mean {quoted(near)}?")
    return _BY_NAME[name]


def suite(name: str) -> tuple[Condition, ...]:
    """A list of conditions, clean first: "standard", "noise" (three ladders of SNR), "recorded", "padding" or "all".

    Raises:
        UsageError: no such suite.
    """
    if name == "standard":
        return tuple(map(condition, STANDARD))
    if name not in SUITES:
        raise UsageError(f"{quoted(name)}: no such suite; there are {', '.join(SUITES)}")
    return tuple(c for c in CONDITIONS if name in {"all", c.family} or c is CLEAN)


def runnable(conditions: Iterable[Condition], *, recorded: bool) -> tuple[tuple[Condition, ...], tuple[str, ...]]:
    """Those that can be measured here, and a note for each that is skipped, to be shown.

    Args:
        conditions: of a suite.
        recorded: whether there are recordings of noise.
    """
    kept: list[Condition] = []
    notes: list[str] = []
    for c in conditions:
        why = codecs.why_not(c.codec) if c.codec else None
        if c.family == RECORDED and not recorded:
            why = f"{c.name}: no recordings of noise are given"
        if why is None:
            kept.append(c)
        else:
            notes.append(f"skipped: {why}")
    if any(c.codec for c in kept):
        notes.append(f"skipped: {codecs.NO_ENCODER}")
    return tuple(kept), tuple(notes)


def perturb(
    waveform: Waveform,
    condition: Condition,
    *,
    id: str,  # noqa: A002
    others: Drawn,
    recorded: Drawn | None = None,
) -> Waveform:
    """A clip under a condition, [samples] at 16 kHz: finite and within full scale; "clean" gives it back as it is.

    Args:
        waveform: [samples] at 16 kHz.
        condition: one of `CONDITIONS`.
        id: the utterance's, by which the same chance befalls it in every run.
        others: another utterance of the corpus for any integer from 0 to 2^31 - 1, as `among` gives.
        recorded: the same for recordings of noise.

    Raises:
        AudioError: empty, too long, not one-dimensional, or not finite.
        UsageError: the condition needs what this machine, or the caller, does not have.
    """
    if waveform.ndim != 1 or not 0 < len(waveform) <= MAX_S * SAMPLE_RATE:
        raise AudioError(f"{id}: waveform of shape {waveform.shape}, wanted [samples], from one to {MAX_S // 3600} h")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{id}: NaN or infinite sample; write the file again")
    if condition == CLEAN:
        return waveform.astype(np.float32)
    chance = Chance(np.random.default_rng(_seed(id, condition.name)), others, recorded)
    changed = condition.effect(_within(waveform.astype(np.float64)), chance)
    return np.ascontiguousarray(_within(changed), np.float32)


def among(load: Callable[[int], Waveform], count: int, *, this: int) -> Drawn:
    """`others` of utterance number `this`, of a corpus of `count` that `load` reads by their numbers; never itself.

    Raises:
        UsageError: there is no other.
    """
    if count < 2:
        raise UsageError("other talkers: the corpus has one utterance; take two or more, or leave the condition out")
    return lambda drawn: load((this + 1 + drawn % (count - 1)) % count)


def _within(samples: Samples) -> Samples:
    """Made softer as a whole where a sample is beyond full scale."""
    return samples / max(np.abs(samples).max(), 1)  # type: ignore[no-any-return]


def _seed(clip: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([clip, name]).encode()).digest())
