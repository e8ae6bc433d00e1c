"""Where the errors are: one set cut by duration, noise, language, length, pace, condition, and by speaker.

A cell under LEAST_WORDS reference words shows no rate: it would be mostly chance.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from arkasr.evaluate.manifest import Row
from arkasr.evaluate.resampling import speaker_of
from arkasr.evaluate.score import Scored
from arkasr.evaluate.statistics import Uncertainty, uncertainty
from arkasr.metrics import Counts

LEAST_WORDS = 200
UNKNOWN = "unknown"
DURATIONS_S = (1, 2, 5, 10, 20, 30, 40)  # 2 s is what the reference runner pads to, 40 s where it cuts
SNRS_DB = (0, 5, 10, 20)
LENGTHS_TOKENS = (3, 6, 11, 21, 51)
PACES_TOKENS_PER_S = (1, 2, 3, 4, 6)


@dataclass(frozen=True)
class Cell:
    """Rows that are alike; uncertainty is None under LEAST_WORDS reference words."""

    name: str
    utterances: int
    reference_words: int
    uncertainty: Uncertainty | None


@dataclass(frozen=True)
class Slice:
    """All rows by one property; worst_over_best compares the cells with a rate, None where fewer than two have any."""

    by: str
    cells: tuple[Cell, ...]
    worst_over_best: float | None


@dataclass(frozen=True)
class Speakers:
    """How unequally speakers with at least LEAST_WORDS words fare; the Gini coefficient is 0 when all fare alike."""

    speakers: int
    suppressed: int
    median: float
    p90: float
    worst: float
    worst_speaker: str
    gini: float


def slices(rows: Sequence[Scored]) -> tuple[Slice, ...]:
    """The rows by every property that at least one of them knows."""
    cut: list[tuple[str, Callable[[Scored], float | str | None], tuple[int, ...], str]] = [
        ("duration", lambda s: s.row.duration, DURATIONS_S, "s"),
        ("SNR", lambda s: _number(s.row, "snr"), SNRS_DB, "dB"),
        ("language", lambda s: _text(s.row, "language"), (), ""),
        ("reference length", lambda s: float(len(s.reference)), LENGTHS_TOKENS, "tokens"),
        ("speaking rate", _pace, PACES_TOKENS_PER_S, "tokens/s"),
        ("condition", lambda s: _text(s.row, "condition"), (), ""),
    ]
    found = (_slice(by, [(value(row), row) for row in rows], edges, unit) for by, value, edges, unit in cut)
    return tuple(one for one in found if {cell.name for cell in one.cells} - {UNKNOWN})


def speakers(rows: Sequence[Scored]) -> Speakers | None:
    """The spread of the speakers' rates; None where fewer than two speakers have LEAST_WORDS reference words."""
    by_speaker: dict[str, list[Counts]] = defaultdict(list)
    for scored in rows:
        if (speaker := speaker_of(scored.row)) is not None:
            by_speaker[speaker].append(scored.counts)
    totals = {speaker: Counts.total(counts) for speaker, counts in by_speaker.items()}
    rates = {speaker: total.rate for speaker, total in totals.items() if total.reference_words >= LEAST_WORDS}
    if len(rates) < 2:
        return None
    values = np.array(list(rates.values()))
    worst = max(rates, key=rates.__getitem__)
    return Speakers(
        len(rates),
        len(totals) - len(rates),
        float(np.median(values)),
        float(np.quantile(values, 0.9)),
        rates[worst],
        worst,
        gini(values.tolist()),
    )


def gini(values: Sequence[float]) -> float:
    """Mean difference of all pairs over twice the mean: 0 when all are equal (or all 0)."""
    array = np.sort(np.array(values))
    if not array.sum():
        return 0.0
    weights = 2 * np.arange(1, len(array) + 1) - len(array) - 1
    return float((weights * array).sum() / (len(array) * array.sum()))


def _slice(by: str, valued: Sequence[tuple[float | str | None, Scored]], edges: tuple[int, ...], unit: str) -> Slice:
    cells: dict[tuple[float, str], list[Scored]] = defaultdict(list)
    for value, scored in valued:
        cells[_place(value, edges, unit)].append(scored)
    made = tuple(_cell(name, cells[place, name]) for place, name in sorted(cells))
    rates = [cell.uncertainty.rate for cell in made if cell.uncertainty and cell.name != UNKNOWN]
    ratio = max(rates) / min(rates) if len(rates) > 1 and min(rates) > 0 else None
    return Slice(by, made, ratio)


def _place(value: float | str | None, edges: tuple[int, ...], unit: str) -> tuple[float, str]:
    """Where a row's cell stands in the table, and its name; a bin holds its lower edge."""
    if value is None:
        return float("inf"), UNKNOWN
    if isinstance(value, str):
        return 0, value
    place = int(np.searchsorted(edges, value, side="right"))
    if place == 0:
        return 0, f"< {edges[0]} {unit}"
    if place == len(edges):
        return place, f">= {edges[-1]} {unit}"
    return place, f"{edges[place - 1]}-{edges[place]} {unit}"


def _cell(name: str, rows: Sequence[Scored]) -> Cell:
    words = Counts.total(row.counts for row in rows).reference_words
    return Cell(name, len(rows), words, uncertainty(rows) if words >= LEAST_WORDS else None)


def _number(row: Row, key: str) -> float | None:
    value = row.x.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(row: Row, key: str) -> str | None:
    value = row.x.get(key)
    return str(value) if value not in (None, "") else None


def _pace(scored: Scored) -> float | None:
    """Tokens of the reference a second."""
    return len(scored.reference) / scored.row.duration if scored.row.duration and scored.reference else None
