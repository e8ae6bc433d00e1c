"""Test sets that are made: a set under the conditions of the robustness suite, and audio in which nobody speaks."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import soundfile

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import AudioError, UsageError
from arkasr.evaluate import nonspeech, robust
from arkasr.evaluate.datasets import Dataset
from arkasr.evaluate.effects import Drawn
from arkasr.evaluate.robust import Condition
from arkasr.evaluate.rows import Item

NONSPEECH = "nonspeech"  # what the made clips are called where a place is asked for


def under(dataset: Dataset, conditions: Sequence[Condition], *, recorded: Dataset | None = None) -> list[Dataset]:
    """A set as it sounds under each condition: the same rows, whose audio is changed when it is read.

    All rows are held in memory, with their audio where the set keeps it within itself, for babble is made of others.

    Raises:
        UsageError: the set has one row, and the condition needs others.
    """
    items = list(dataset)
    noises = list(recorded) if recorded is not None else []
    return [_under(dataset, items, condition, noises) for condition in conditions]


def _under(dataset: Dataset, items: Sequence[Item], condition: Condition, noises: Sequence[Item]) -> Dataset:
    of = "/".join(filter(None, dataset.title))

    def rows(_audio: bool) -> Iterator[Item]:
        for number, item in enumerate(items):
            change = partial(_changed, condition, item.id, _others(items, number), _drawn(noises))
            yield replace(item, change=change, x={**item.x, "of": of, "condition": condition.name})

    config = "+".join(filter(None, (dataset.config, re.sub(r"[^\w.+-]+", "-", condition.name))))
    return replace(dataset, config=config, regime=None, expected_rows=len(items), rows=rows)


def _changed(condition: Condition, name: str, others: Drawn, recorded: Drawn | None, waveform: Waveform) -> Waveform:
    return robust.perturb(waveform, condition, id=name, others=others, recorded=recorded)


def _others(items: Sequence[Item], this: int) -> Drawn:
    if len(items) < 2:
        return _nobody
    return robust.among(lambda number: _readable(items, number, this=this), len(items), this=this)


def _nobody(_drawn: int) -> Waveform:
    raise UsageError("other talkers: the set has one row; take two or more, or leave the condition out")


def _drawn(noises: Sequence[Item]) -> Drawn | None:
    return (lambda drawn: _readable(noises, drawn % len(noises))) if noises else None


def _readable(items: Sequence[Item], start: int, *, this: int | None = None) -> Waveform:
    """The audio of the first row from `start` on, in a circle, that has any: a bad file is no fault of other rows."""
    for step in range(len(items)):
        number = (start + step) % len(items)
        if number != this:
            with suppress(AudioError):
                return items[number].recorded()
    raise UsageError("nothing to mix in: no other row can be read; check the paths, or leave the condition out")


def made_nonspeech() -> Dataset:
    """Silence, noise, tones, hum, clicks and music by formula, as a set without a word."""

    def rows(_audio: bool) -> Iterator[Item]:
        for clip in nonspeech.made():
            file = io.BytesIO()
            soundfile.write(file, clip.waveform, SAMPLE_RATE, format="WAV", subtype="FLOAT")
            yield Item(clip.id, file.getvalue(), "", language="zxx", x={"kind": clip.kind})

    return Dataset(NONSPEECH, "", "made", NONSPEECH, "jsonl", "zxx", None, None, None, None, rows)
