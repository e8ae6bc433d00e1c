"""NIST's matched pairs test: do two systems make equally many errors in the stretches where either makes any?

A stretch ends where both got two words or more right, so that errors in different stretches have little to do with each
other; the insertions of a gap between two words belong to the stretch that the gap is in.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from arkasr.evaluate.score import Scored
from arkasr.metrics.align import Edit, align


@dataclass(frozen=True)
class Mapsswe:
    """Matched pairs test over segments: their mean difference in errors; z and p are None where they do not vary."""

    segments: int
    mean: float
    z: float | None
    p: float | None


def mapsswe(first: Sequence[Scored], second: Sequence[Scored], *, merge_compounds: bool) -> Mapsswe:
    """NIST's matched pairs test of rows in the same order.

    Where the pairwise normalization left the two systems different references, the whole utterance is one segment.
    """
    differences: list[int] = []
    for one, other in zip(first, second, strict=True):
        if not (one.counts.errors or other.counts.errors):
            continue
        if one.reference != other.reference:
            differences.append(one.counts.errors - other.counts.errors)
            continue
        edits = [align(row.reference, row.hypothesis, merge_compounds=merge_compounds) for row in (one, other)]
        differences += _segments(*map(_errors_by_place, edits))
    n, mean = len(differences), float(np.mean(differences)) if differences else 0.0
    if n < 2 or len(set(differences)) == 1:
        return Mapsswe(n, mean, None, None)
    z = mean / (float(np.std(differences, ddof=1)) / math.sqrt(n))
    return Mapsswe(n, mean, z, math.erfc(abs(z) / math.sqrt(2)))


def _errors_by_place(edits: Iterable[Edit]) -> list[int]:
    """Errors at each reference word (odd places) and in the gaps before, between and behind the words (even places)."""
    places = [0]
    for edit in edits:
        if edit.kind == "insertion":
            places[-1] += len(edit.hypothesis)
        else:
            wrong = int(edit.kind in ("substitution", "deletion"))
            places += [wrong, 0] * len(edit.reference)
    return places


def _segments(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Differences in errors of the stretches between two or more words that both got right."""
    differences: list[int] = []
    right = 2  # the utterance's ends bound a segment too
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        if one or other:
            if right >= 2:
                differences.append(0)
            right = 0
            differences[-1] += one - other
        else:
            right += place % 2
    return differences
