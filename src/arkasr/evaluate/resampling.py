"""Resampling utterances or speakers: sums drawn with replacement, and results of two systems exchanged.

Equal units are drawn as one kind with its frequency: the same distribution as drawing them singly, at a fraction of the
cost. All sums are exact and the kinds stand in the order of the rows, so a seed gives the same digits everywhere, and
two systems in the other order the same digits with the other sign.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arkasr.evaluate.manifest import Row
from arkasr.evaluate.score import Scored

RESAMPLES = 10_000
_BLOCK = 1000  # resamples at a time, which bounds memory

Table = npt.NDArray[np.int64]  # [units, columns]: errors and reference words of one system, or of both side by side
Samples = npt.NDArray[np.float64]  # [RESAMPLES]


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of the resamples."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """From end to end."""
        return self.high - self.low


def row_id(row: Row) -> str:
    """By which two systems' rows of an utterance are matched."""
    return str(row.x.get("id", row.audio_filepath))


def speaker_of(row: Row) -> str | None:
    """Who speaks, if the row knows."""
    speaker = row.x.get("speaker")
    return None if speaker in (None, "", "unknown") else str(speaker)


def _cluster(row: Row, index: int) -> tuple[str, str | int]:
    """Speaker, else session, else the row for itself."""
    speaker = speaker_of(row)
    if speaker is not None:
        return "speaker", speaker
    return ("session", row.parent_id) if row.parent_id is not None else ("row", index)


def table(rows: Iterable[Scored]) -> Table:
    """Errors and reference words of each row."""
    return np.array([(row.counts.errors, row.counts.reference_words) for row in rows], np.int64).reshape(-1, 2)


def total(rows: Iterable[Scored]) -> Table:
    """Errors and reference words of all rows."""
    sums: Table = table(rows).sum(axis=0)
    return sums


def by_cluster(table: Table, rows: Sequence[Scored]) -> Table:
    """Sums of each cluster, in the order in which they appear."""
    places: dict[tuple[str, str | int], int] = {}
    of_row = [places.setdefault(_cluster(row.row, n), len(places)) for n, row in enumerate(rows)]
    sums = np.zeros((len(places), table.shape[1]), np.int64)
    np.add.at(sums, of_row, table)
    return sums


def _kinds(table: Table) -> tuple[Table, Table]:
    """Each different unit once, in the order in which they appear, and how many there are of it."""
    _, first, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return table[first[order]], counts[order]


def rate(sums: npt.NDArray[np.float64]) -> Samples:
    """[..., (errors, words)] to rates; nan without words."""
    rates = np.full(sums.shape[:-1], np.nan)
    np.divide(sums[..., 0], sums[..., 1], out=rates, where=sums[..., 1] > 0)
    return rates


def drawn(table: Table, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sums of as many units as there are, drawn with replacement: [RESAMPLES, columns]."""
    kinds, counts = _kinds(table)
    shares, values = counts / len(table), kinds.astype(np.float64)  # floats multiply faster, and such sums are exact
    blocks = range(0, RESAMPLES, _BLOCK)
    return np.concatenate(
        [rng.multinomial(len(table), shares, size=_BLOCK).astype(np.float64) @ values for _ in blocks]
    )


def swapped(table: Table, rng: np.random.Generator) -> Samples:
    """Differences of the rates after each unit's two results were exchanged or not, by a coin."""
    totals = table.sum(axis=0).astype(np.float64)
    kinds, counts = _kinds(table[(table[:, :2] != table[:, 2:]).any(axis=1)])
    gains = (kinds[:, 2:] - kinds[:, :2]).astype(np.float64)  # of the first system, by one exchange
    blocks = range(0, RESAMPLES, _BLOCK)
    gained = np.concatenate(
        [rng.binomial(counts, 0.5, size=(_BLOCK, len(kinds))).astype(np.float64) @ gains for _ in blocks]
    )
    return rate(totals[:2] + gained) - rate(totals[2:] - gained)


def interval(samples: Samples) -> Interval:
    """Resamples without words have no rate and are left out.

    Both ends are samples: an interpolated end would depend in its last digit on the sign.
    """
    kept = np.sort(samples[~np.isnan(samples)])
    cut = len(kept) // 40
    return Interval(float(kept[cut]), float(kept[-1 - cut]))
