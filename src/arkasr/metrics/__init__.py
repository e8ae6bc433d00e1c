"""Texts in, numbers out: normalizers, alignment, word and character error rates.

Counts are kaldialign's for short texts where it is installed, else our own aligner's (`align`); they are equal.
`words` is the plain rule by which training and benches compare texts; leaderboards have their own, in `normalize`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from arkasr.metrics.align import align as _align

# Cells of a table above which our own aligner is quicker, and needs a hundredth of the memory (bench/scoring.py).
_SHORT_CELLS = 100_000
_Distance = Callable[[Sequence[str], Sequence[str], bool], dict[str, int] | None]


@dataclass(frozen=True)
class Counts:
    """Edits of one alignment, or sums over a corpus; words are tokens, which may be characters."""

    insertions: int
    deletions: int
    substitutions: int
    reference_words: int

    @property
    def errors(self) -> int:
        """Insertions, deletions and substitutions together."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """Errors per reference word, possibly above 1; with no reference words 0 or infinity."""
        if self.reference_words:
            return self.errors / self.reference_words
        return float("inf") if self.errors else 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.substitutions + other.substitutions,
            self.reference_words + other.reference_words,
        )

    @classmethod
    def total(cls, counts: Iterable["Counts"]) -> "Counts":
        """Their sum."""
        return sum(counts, cls(0, 0, 0, 0))


@lru_cache(maxsize=1)
def _kaldialign() -> _Distance | None:
    """The edit distance of kaldialign, which gives None for what it cannot take; None where it is not installed."""
    try:
        from kaldialign import edit_distance  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None

    def distance(reference: Sequence[str], hypothesis: Sequence[str], merge: bool) -> dict[str, int] | None:
        try:
            return edit_distance(reference, hypothesis, merge_compounds=merge)  # type: ignore[no-any-return]
        except TypeError:  # it takes no half of a surrogate pair, our own aligner does
            return None

    return distance


def count(reference: Sequence[str], hypothesis: Sequence[str], *, merge_compounds: bool) -> Counts:
    """Fewest edits that turn the reference into the hypothesis, and which they are.

    With `merge_compounds`, words of one side that together are one word of the other match it for nothing.
    """
    if len(reference) == len(hypothesis) and all(a == b for a, b in zip(reference, hypothesis, strict=True)):
        return Counts(0, 0, 0, len(reference))
    short = len(reference) * len(hypothesis) <= _SHORT_CELLS
    distance = _kaldialign() if short else None
    if distance is not None and (found := distance(reference, hypothesis, merge_compounds)) is not None:
        return Counts(found["ins"], found["del"], found["sub"], len(reference))
    kinds = [edit.kind for edit in _align(reference, hypothesis, merge_compounds=merge_compounds)]
    return Counts(kinds.count("insertion"), kinds.count("deletion"), kinds.count("substitution"), len(reference))


def words(text: str) -> list[str]:
    """Case-folded words; punctuation other than an apostrophe inside a word separates."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold())


def word_errors(reference: str, hypothesis: str) -> Counts:
    """Edits between the `words` of two texts."""
    return count(words(reference), words(hypothesis), merge_compounds=False)


def corpus_word_errors(pairs: Iterable[tuple[str, str]]) -> Counts:
    """Sums over (reference, hypothesis) pairs."""
    return Counts.total(word_errors(reference, hypothesis) for reference, hypothesis in pairs)
