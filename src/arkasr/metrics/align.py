"""Which words of a hypothesis stand for which of a reference: the cheapest alignment at unit costs (Levenshtein).

Adjacent words of one side may together match one word of the other for nothing ("white paper", "whitepaper"). Among
equally cheap alignments the choices are kaldialign's, so that insertions, deletions and substitutions are, too.
Unusual: of the table of costs only some rows are kept, and those between are worked out again on the way back. Memory
grows with the root of the reference's length: a hundredth of the table for 8 000 by 8 000 words.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import isqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["equal", "substitution", "insertion", "deletion", "compound"]
_Ints = npt.NDArray[np.int32]
_LEAST_BLOCK = 64  # rows: below this, keeping all of them costs less than working some out twice
_UNREACHABLE = 2**30


@dataclass(frozen=True)
class Edit:
    """A step of an alignment; the side that has nothing is (), a compound is two or more words against one."""

    kind: Kind
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


def align(reference: Sequence[str], hypothesis: Sequence[str], *, merge_compounds: bool) -> list[Edit]:
    """The edits that turn reference words (none of them empty) into the hypothesis, in order."""
    table = _Table(reference, hypothesis, merge_compounds=merge_compounds)
    i, j = len(reference), len(hypothesis)
    edits: list[Edit] = []
    for top, rows in table.blocks_backwards():
        while i >= top + table.depth:
            kind, rows_back, columns_back = table.step(rows, i - top, i, j)
            edits.append(Edit(kind, tuple(reference[i - rows_back : i]), tuple(hypothesis[j - columns_back : j])))
            i, j = i - rows_back, j - columns_back
    edits += [Edit("insertion", (), (word,)) for word in reversed(hypothesis[:j])]
    return edits[::-1]


class _Table:
    """Row i, column j: what it costs at least to turn i words of the reference into j of the hypothesis."""

    def __init__(self, reference: Sequence[str], hypothesis: Sequence[str], *, merge_compounds: bool) -> None:
        self._reference, self._hypothesis = reference, hypothesis
        ids: dict[str, int] = {}
        for word in hypothesis:
            ids.setdefault(word, len(ids))
        self._ids = np.array([ids[word] for word in hypothesis], np.int32)
        self._id = [ids.get(word, -1) for word in reference]
        self._columns = np.arange(len(hypothesis) + 1, dtype=np.int32)
        # Where several words of the reference, up to a row, are one of the hypothesis: how many, and in which columns.
        self._runs_to: dict[int, list[tuple[int, _Ints]]] = defaultdict(list)
        # Which of the reference's words several of the hypothesis are: the columns where they end and begin.
        self._whole: dict[str, tuple[_Ints, _Ints]] = {}
        self.depth = 1  # rows above a row that it may be made from
        if merge_compounds:
            self._find_compounds(ids)

    def _find_compounds(self, ids: dict[str, int]) -> None:
        for end, count, word in _runs(self._reference, ids):
            columns = np.flatnonzero(self._ids == ids[word]).astype(np.int32) + 1
            self._runs_to[end].append((count, columns))
            self.depth = max(self.depth, count)
        spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for end, count, word in _runs(self._hypothesis, set(self._reference)):
            spans[word].append((end, end - count))
        for word, pairs in spans.items():
            ends, begins = np.array(pairs, np.int32).T
            self._whole[word] = ends, begins

    def blocks_backwards(self) -> Iterator[tuple[int, _Ints]]:
        """(first row, rows): the table from its end; the first `depth` rows of each belong to the next."""
        num_rows = len(self._reference)
        block = max(_LEAST_BLOCK, self.depth, isqrt(num_rows * self.depth))
        above = np.full((self.depth, len(self._columns)), _UNREACHABLE, np.int32)
        above[-1] = self._columns
        kept = []
        rows = above
        for first in range(1, num_rows + 1, block):
            kept.append((first, above))
            rows = self._fill(above, first, min(first + block, num_rows + 1))
            above = rows[-self.depth :].copy()
        while kept:
            first, above = kept.pop()
            yield first - self.depth, rows
            if kept:
                before, above = kept[-1]
                rows = self._fill(above, before, first)

    def _fill(self, above: _Ints, first: int, last: int) -> _Ints:
        """The rows from `first` to before `last`, behind those above them."""
        rows = np.empty((self.depth + last - first, len(self._columns)), np.int32)
        rows[: self.depth] = above
        for i in range(first, last):
            at = self.depth + i - first
            before, row = rows[at - 1], rows[at]
            np.add(before, 1, out=row)
            np.minimum(row[1:], before[:-1] + (self._ids != self._id[i - 1]), out=row[1:])
            for count, columns in self._runs_to.get(i, ()):
                row[columns] = np.minimum(row[columns], rows[at - count, columns - 1])
            if (whole := self._whole.get(self._reference[i - 1])) is not None:
                ends, begins = whole
                row[ends] = np.minimum(row[ends], before[begins])
            row -= self._columns  # an insertion costs one a column, so it is a running minimum without that slope
            np.minimum.accumulate(row, out=row)
            row += self._columns
        return rows

    def step(self, rows: _Ints, at: int, i: int, j: int) -> tuple[Kind, int, int]:
        """The last edit of row i, which is rows[at], at column j, and how many rows and columns it goes back."""
        if j == 0:
            return "deletion", 1, 0
        same = self._id[i - 1] == self._ids[j - 1]
        replaced = rows[at - 1, j - 1] + (not same)
        deleted, inserted = rows[at - 1, j] + 1, rows[at, j - 1] + 1
        cost = rows[at, j]
        if cost < min(replaced, deleted, inserted):
            count = _run_length(self._reference[:i], self._hypothesis[j - 1])
            if count and rows[at - count, j - 1] == cost:
                return "compound", count, 1
            return "compound", 1, _run_length(self._hypothesis[:j], self._reference[i - 1])
        if replaced < min(deleted, inserted):
            return "equal" if same else "substitution", 1, 1
        return ("deletion", 1, 0) if deleted < inserted else ("insertion", 0, 1)


def _runs(words: Sequence[str], wanted: Collection[str]) -> Iterator[tuple[int, int, str]]:
    """(end, how many, word) of every two or more adjacent words that together are a wanted one."""
    mirrored = sorted(word[::-1] for word in wanted)  # a run grows to the left, and stops when no word ends so
    for end in range(2, len(words) + 1):
        tail = ""
        for count in range(1, end + 1):
            tail += words[end - count][::-1]
            at = bisect_left(mirrored, tail)
            if at == len(mirrored) or not mirrored[at].startswith(tail):
                break
            if count > 1 and mirrored[at] == tail:
                yield end, count, tail[::-1]


def _run_length(words: Sequence[str], wanted: str) -> int:
    """How many of the last words together are the wanted one; 0 if none are, or only one."""
    count, rest = 0, wanted
    while rest and count < len(words) and rest.endswith(words[-1 - count]):
        rest = rest.removesuffix(words[-1 - count])
        count += 1
    return count if count > 1 and not rest else 0


def merge_pair(reference: str, hypothesis: str) -> tuple[str, str]:
    """Both texts with words joined where they differ in spaces only, as multilingual scoring wants them.

    Unlike a compound of `align`, this changes how many words the reference has.
    """
    wanted, got = reference.split(), hypothesis.split()
    merged: tuple[list[str], list[str]] = ([], [])
    # With its shortcut for 200 words and more, which changes what it finds: the leaderboard's texts go through it, too.
    for tag, i, i_end, j, j_end in SequenceMatcher(None, wanted, got).get_opcodes():
        ours, theirs = wanted[i:i_end], got[j:j_end]
        joined = "".join(ours)
        if tag != "equal" and joined == "".join(theirs):
            ours = theirs = [joined]
        merged[0].extend(ours)
        merged[1].extend(theirs)
    return " ".join(merged[0]), " ".join(merged[1])
