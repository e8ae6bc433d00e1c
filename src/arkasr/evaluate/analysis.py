"""What kind of errors: rates by kind, the words that go wrong, classes of words, other normalizers, and spelling.

All rates are errors per reference token, not percent. Hallucination and slices have their own modules.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from arkasr.evaluate.manifest import Manifest, Row
from arkasr.evaluate.score import Scored, SetScore, score
from arkasr.evaluate.statistics import normalizer_of
from arkasr.metrics import Counts, count, languages
from arkasr.metrics.align import Edit, align
from arkasr.metrics.normalize import normalizer

NUM_TOP = 20
RARE = 1  # a word that comes no more often than this in the references of the set
MAX_CELLS = 10**8  # of a table of characters against characters; sessions of an hour have 25 times more
SPELLED_SHARE = 0.2  # of the references that must have marks, or capitals, before these count as part of the task
ENGLISH, OTHER = ("plain", "whisper", "oal-d1e99b2", "oal-next"), ("plain", "multilingual", "oal-next")
CAPITALIZING = ("de",)  # languages in which a capital letter does not tell a name


@dataclass(frozen=True)
class Change:
    """Words of the reference, what was written instead, and how often; "" where there is nothing."""

    reference: str
    hypothesis: str
    count: int


@dataclass(frozen=True)
class WordClass:
    """Reference words of one kind, and how many of them were not recognized; insertions belong to no class."""

    name: str
    reference_words: int
    errors: int
    rate: float


@dataclass(frozen=True)
class Anatomy:
    """Rates are None without reference words; characters too where an utterance is too long to align by character."""

    insertion_rate: float | None
    deletion_rate: float | None
    substitution_rate: float | None
    sentence_error_rate: float | None
    character_error_rate: float | None
    confusions: tuple[Change, ...]
    insertions: tuple[Change, ...]
    deletions: tuple[Change, ...]
    compounds: tuple[Change, ...]
    classes: tuple[WordClass, ...]


@dataclass(frozen=True)
class Normalized:
    """The error rate under one normalizer; None without reference words."""

    normalizer: str
    errors: int
    reference_words: int
    rate: float | None


@dataclass(frozen=True)
class Mark:
    """A punctuation mark: how often the reference has it, the hypothesis, and both at the same word."""

    mark: str
    reference: int
    hypothesis: int
    both: int
    f1: float


@dataclass(frozen=True)
class Orthography:
    """Texts compared as they are written; None is what the references do not show."""

    cased: bool
    punctuated: bool
    rate: float
    punctuation: tuple[Mark, ...]
    punctuation_f1: float | None
    casing_accuracy: float | None


def anatomy(scored: SetScore) -> Anatomy:
    """What the errors of a set consist of."""
    edits = [_edits(row, merge_compounds=normalizer_of(scored).merge_compounds) for row in scored.rows]
    changes = Counter((edit.kind, (" ".join(edit.reference), " ".join(edit.hypothesis))) for edit in chain(*edits))

    def top(kind: str) -> tuple[Change, ...]:
        found = [Change(*words, n) for (of, words), n in changes.items() if of == kind]
        return tuple(sorted(found, key=lambda change: (-change.count, change.reference, change.hypothesis))[:NUM_TOP])

    counts, tokens = scored.counts, scored.counts.reference_words
    return Anatomy(
        counts.insertions / tokens if tokens else None,
        counts.deletions / tokens if tokens else None,
        counts.substitutions / tokens if tokens else None,
        sum(row.counts.errors > 0 for row in scored.rows) / len(scored.rows) if scored.rows else None,
        _character_error_rate(scored.rows),
        top("substitution"),
        top("insertion"),
        top("deletion"),
        top("compound"),
        _classes(scored, edits),
    )


def sensitivity(manifest: Manifest, *, language: str = "en") -> tuple[Normalized, ...]:
    """The error rate of the same texts under other normalizers.

    Raises:
        MissingExtraError: a normalizer needs a package that is not installed.
    """
    found = []
    for name in ENGLISH if languages.base_language(language) == "en" else OTHER:
        counts = score(manifest, normalizer(name, language=language), name=name, regime=None).counts
        rate = counts.rate if counts.reference_words else None
        found.append(Normalized(name, counts.errors, counts.reference_words, rate))
    return tuple(found)


def orthography(rows: Sequence[Row]) -> Orthography | None:
    """Punctuation, case and words as written; None where the references have neither marks nor case."""
    cased, punctuated = is_cased(rows), _share(rows, _MARK_BEHIND_WORD.search) >= SPELLED_SHARE
    if not (cased or punctuated):
        return None
    counts = Counts.total(count(r.text.split(), r.pred_text.split(), merge_compounds=False) for r in rows)
    marks: list[Counter[str]] = [Counter(), Counter(), Counter()]  # of the reference, the hypothesis, and both
    letters = right = 0
    for row in rows:
        for wanted, got in _pairs(_spelled(row.text), _spelled(row.pred_text)):
            for counter, found in zip(marks, (wanted[1], got[1], wanted[1] & got[1]), strict=True):
                counter.update(found)
            if wanted[0].casefold() == got[0].casefold() and wanted[0].upper() != wanted[0].lower():
                letters, right = letters + 1, right + (wanted[0] == got[0])
    per_mark = tuple(_mark(mark, *(found[mark] for found in marks)) for mark in sorted(marks[0] | marks[1]))
    overall = _mark("", *(found.total() for found in marks))
    return Orthography(
        cased,
        punctuated,
        counts.rate,
        per_mark if punctuated else (),
        overall.f1 if punctuated else None,
        right / letters if cased and letters else None,
    )


def is_cased(rows: Sequence[Row]) -> bool:
    """Whether the references have capitals and small letters."""
    return _share(rows, lambda text: text.upper() != text != text.lower()) >= SPELLED_SHARE


def _share(rows: Sequence[Row], has: Callable[[str], object]) -> float:
    """Of the references, those that have something."""
    texts = [row.text for row in rows if row.text.strip()]
    return sum(bool(has(text)) for text in texts) / len(texts) if texts else 0.0


# ---- words that go wrong ----


def _edits(row: Scored, *, merge_compounds: bool) -> list[Edit]:
    if row.reference == row.hypothesis:
        return [Edit("equal", (word,), (word,)) for word in row.reference]
    return align(row.reference, row.hypothesis, merge_compounds=merge_compounds)


def _character_error_rate(rows: Iterable[Scored]) -> float | None:
    """Of the normalized texts without their spaces, so that words written together cost nothing here either."""
    texts = [("".join(row.reference), "".join(row.hypothesis)) for row in rows]
    if any(len(reference) * len(hypothesis) > MAX_CELLS for reference, hypothesis in texts):
        return None
    total = Counts.total(count(*pair, merge_compounds=False) for pair in texts)
    return total.rate if total.reference_words else None


def _classes(scored: SetScore, edits: Sequence[Sequence[Edit]]) -> tuple[WordClass, ...]:
    """How the words of each class fared; a class that no reference has is left out."""
    frequency = Counter(word for row in scored.rows for word in row.reference)
    names = _names(scored)
    totals, errors = Counter[str](), Counter[str]()
    for row, steps in zip(scored.rows, edits, strict=True):
        wrong = [
            edit.kind in ("substitution", "deletion") for edit in steps for _ in edit.reference
        ]  # of each reference word
        for place, (word, is_wrong) in enumerate(zip(row.reference, wrong, strict=True)):
            classes = {
                "digits": any(map(str.isdecimal, word)),
                "rare": frequency[word] <= RARE,
                "first": place == 0,
                "last": place == len(row.reference) - 1,
                "proper nouns": word in names.get(id(row), ()),
            }
            found = [name for name, belongs in classes.items() if belongs]
            totals.update(found)
            errors.update(found if is_wrong else ())
    return tuple(WordClass(name, n, errors[name], errors[name] / n) for name, n in sorted(totals.items()))


def _names(scored: SetScore) -> dict[int, set[str]]:
    """For each row (by its identity), the normalized words that its reference capitalizes inside a sentence."""
    rows = [row for row in scored.rows if row.row.x.get("language") not in CAPITALIZING]
    if not is_cased([row.row for row in rows]):
        return {}
    text = normalizer_of(scored).text
    return {id(row): set(chain(*map(str.split, map(text, _capitalized(row.row.text))))) for row in rows}


def _capitalized(text: str) -> Iterator[str]:
    """Words with a capital first letter only that do not begin a sentence."""
    begins = True
    for word, marks in _spelled(text):
        if not begins and len(word) > 1 and word[0].isupper() and word[1:].islower() and "'" not in word[:2]:
            yield word
        begins = bool(marks & _ENDS)


# ---- spelling ----

_MARKS = {
    **{mark: mark for mark in ".,?!;:"},
    "\u3002": ".",
    "\u3001": ",",
    "\uff0c": ",",
    "\uff1f": "?",
    "\uff01": "!",
    "\uff1b": ";",
    "\uff1a": ":",
    "\u2026": "...",
}
_ENDS = {".", "?", "!", "...", ":"}
_SIGNS = re.escape("".join(_MARKS))
_MARK_BEHIND_WORD = re.compile(rf"\w[{_SIGNS}](?!\w)")
# A character of a script without spaces is a word; elsewhere signs inside a word, as in "3.5" or "it's", belong to it.
_SPELLED = re.compile(
    rf"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
    rf"(?:[.,':\-]\w+)*)[\"\u201d\u00bb)]*([{_SIGNS}]*)"
)


def _spelled(text: str) -> list[tuple[str, set[str]]]:
    """Words as written, each with the marks behind it."""
    found = (match.groups() for match in _SPELLED.finditer(text.replace("...", "\u2026").replace("\u2019", "'")))
    return [(word, {_MARKS[sign] for sign in signs}) for word, signs in found]


def _pairs(
    reference: Sequence[tuple[str, set[str]]], hypothesis: Sequence[tuple[str, set[str]]]
) -> Iterator[tuple[tuple[str, set[str]], tuple[str, set[str]]]]:
    """Words that stand for each other; ("", set()) for none."""
    nothing: tuple[str, set[str]] = ("", set())
    wanted, got = iter(reference), iter(hypothesis)
    folded = [[word.casefold() for word, _ in side] for side in (reference, hypothesis)]
    for edit in align(*folded, merge_compounds=False):
        yield (next(wanted) if edit.reference else nothing, next(got) if edit.hypothesis else nothing)


def _mark(mark: str, reference: int, hypothesis: int, both: int) -> Mark:
    total = reference + hypothesis
    return Mark(mark, reference, hypothesis, both, 2 * both / total if total else 1.0)
