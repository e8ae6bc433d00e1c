"""Word error rate of transcripts. Pure Python.

The text is compared as words after case folding and removal of punctuation; the leaderboard's normalisers come with
the evaluation issue and will replace `words`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class WordErrors:
    """Counts of one alignment, or sums over a corpus; `rate` may exceed 1."""

    errors: int
    reference_words: int

    @property
    def rate(self) -> float:
        """Errors per reference word; with no reference words 0 or infinity."""
        if self.reference_words:
            return self.errors / self.reference_words
        return float("inf") if self.errors else 0.0


def words(text: str) -> list[str]:
    """Case-folded words; punctuation other than an apostrophe inside a word separates."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold())


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Fewest substitutions, insertions and deletions that turn the reference into the hypothesis (Levenshtein)."""
    wanted, got = words(reference), words(hypothesis)
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(got, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return WordErrors(row[-1], len(wanted))


def corpus_word_errors(pairs: Iterable[tuple[str, str]]) -> WordErrors:
    """Sums over (reference, hypothesis) pairs."""
    counts = [word_errors(reference, hypothesis) for reference, hypothesis in pairs]
    return WordErrors(sum(c.errors for c in counts), sum(c.reference_words for c in counts))
