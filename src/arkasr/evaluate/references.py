"""Published figures of other systems, to stand beside ours: only ever those of the same regime."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_ROWS = Path(__file__).with_name("reference_rows.json")


@dataclass(frozen=True)
class Reference:
    """A published row.

    Attributes:
        regime: a regime's id, or what else makes the rows comparable with each other: "ark-paper", "longform", ...
        normalizer: by which it was scored.
        source: who published it.
        date: year, year-month or day.
        model: the system.
        values: error rates in per cent by the set's name, as far as published.
        average: over the regime's sets, or None.
        rtfx: seconds of audio a second, or None.
        note: what a reader has to know.
    """

    regime: str
    normalizer: str
    source: str
    date: str
    model: str
    values: Mapping[str, float]
    average: float | None = None
    rtfx: float | None = None
    note: str = ""


def references(regime: str) -> tuple[Reference, ...]:
    """The rows of a regime, the best average first; () when none are known."""
    rows = [row for row in _references() if row.regime == regime]
    return tuple(sorted(rows, key=lambda row: (row.average is None, row.average)))


@lru_cache(maxsize=1)
def _references() -> tuple[Reference, ...]:
    return tuple(Reference(**record) for record in json.loads(_ROWS.read_bytes()))
