"""Text that nobody spoke, and speech that got no text: on non-speech, and on speech by its reference.

What the reference does too (a digit said ten times, a name in another script) is not held against a system. Languages
of one script are not told apart: that would take texts of all of them to learn from, which are not here.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from arkasr.evaluate.resampling import row_id
from arkasr.evaluate.score import Scored, SetScore
from arkasr.evaluate.statistics import normalizer_of
from arkasr.guards import LOOP, MAX_COMPRESSION_RATIO, TOO_LONG, compression_ratio, num_words
from arkasr.metrics import Counts
from arkasr.metrics.align import align

NUM_COMMONEST = 20
INSERTED_RUN = 5
LEAST_INSERTED, INSERTED_SHARE = 3, 0.5
COLLAPSED_SHARE = 0.3
MAX_UNIT, MIN_REPEATS, MIN_COVERED = 20, 4, 10  # of a loop, in tokens
MAX_TOKENS_PER_S = {"word": 6.0, "character": 12.0}  # two characters are about a word
MAX_LENGTH_RATIO = 3
FOREIGN_SHARE = 0.5
_LATIN = "en de fr es it pt nl pl ro hu cs fi hr sk sl et lt"
SCRIPTS = {language: frozenset({"Latin"}) for language in _LATIN.split()} | {
    "zh": frozenset({"Han"}),
    "ja": frozenset({"Han", "Kana"}),
    "ko": frozenset({"Hangul"}),
}
# By the first word of a letter's name in Unicode.
_SCRIPT_OF_NAME = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


@dataclass(frozen=True)
class Common:
    """A text and how often it came."""

    text: str
    count: int


@dataclass(frozen=True)
class NonSpeech:
    """What came of clips in which nobody speaks; words_per_minute is None where a clip's duration is not known."""

    clips: int
    with_output: int
    share: float
    words: float
    words_per_minute: float | None
    commonest: tuple[Common, ...]


@dataclass(frozen=True)
class Check:
    """Utterances that are not to be trusted for one reason, and the error rate of the others (None without any)."""

    name: str
    utterances: int
    share: float
    rate_without: float | None
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Produced:
    """How many utterances of a language got text of a kind: as far as the script tells, the language."""

    expected: str
    produced: str
    utterances: int


@dataclass(frozen=True)
class OnSpeech:
    """Rates are errors per reference word; foreign shares are of the letters of rows whose language is in SCRIPTS."""

    utterances: int
    rate: float
    inserted_per_hour: float | None
    checks: tuple[Check, ...]
    foreign_share: float | None
    foreign_share_of_references: float | None
    produced: tuple[Produced, ...]


def on_nonspeech(rows: Iterable[Scored]) -> NonSpeech | None:
    """Of the rows whose published reference is empty; None where there are none."""
    silent = [scored for scored in rows if not scored.row.text.strip()]
    if not silent:
        return None
    loud = [scored for scored in silent if scored.hypothesis]
    texts = Counter(scored.row.pred_text.strip() for scored in loud)
    words = sum(num_words(scored.row.pred_text) for scored in loud)
    minutes = _seconds(silent) / 60
    return NonSpeech(
        len(silent),
        len(loud),
        len(loud) / len(silent),
        words,
        words / minutes if minutes else None,
        tuple(Common(*pair) for pair in texts.most_common(NUM_COMMONEST)),
    )


def on_speech(score: SetScore) -> OnSpeech | None:
    """Of the rows with reference words; None where there are none."""
    rows = [scored for scored in score.rows if scored.reference]
    if not rows:
        return None
    normalizer = normalizer_of(score)
    found: dict[str, list[Scored]] = {}
    for scored in rows:
        for name in _faults(scored, unit=normalizer.unit, merge_compounds=normalizer.merge_compounds):
            found.setdefault(name, []).append(scored)
    told = [scored for scored in rows if _language(scored) in SCRIPTS]
    hours = _seconds(rows) / 3600
    produced = Counter((_language(scored), produced_language(scored.row.pred_text)) for scored in told)
    total = Counts.total(scored.counts for scored in rows)
    return OnSpeech(
        len(rows),
        total.rate,
        total.insertions / hours if hours else None,
        tuple(_check(name, found[name], rows) for name in sorted(found)),
        _share_of(told, lambda scored: scored.row.pred_text),
        _share_of(told, lambda scored: scored.row.text),
        tuple(Produced(*pair, count) for pair, count in sorted(produced.items())),
    )


def has_loop(tokens: Sequence[str]) -> bool:
    """Whether some tokens come over and over: up to MAX_UNIT of them, MIN_REPEATS times, MIN_COVERED in all."""
    for unit in range(1, min(MAX_UNIT, len(tokens) // MIN_REPEATS) + 1):
        same = (tokens[n] == tokens[n + unit] for n in range(len(tokens) - unit))
        longest = max((sum(1 for _ in run) for equal, run in groupby(same) if equal), default=0)
        if longest >= unit * (MIN_REPEATS - 1) and longest + unit >= MIN_COVERED:
            return True
    return False


def produced_language(text: str) -> str:
    """The language of a text as far as its script tells it, or the commonest script."""
    scripts = _scripts(text)
    if scripts["Kana"] and scripts["Kana"] + scripts["Han"] > scripts.total() / 2:
        return "ja"
    if not scripts:
        return "nothing"
    commonest = max(scripts, key=scripts.__getitem__)
    return {"Han": "zh or ja", "Hangul": "ko", "Latin": "Latin script"}.get(commonest, f"{commonest} script")


def _faults(scored: Scored, *, unit: str, merge_compounds: bool) -> list[str]:
    reference, hypothesis, duration = scored.reference, scored.hypothesis, scored.row.duration
    flags = [str(flag) for flag in scored.row.x.get("flags", ())]
    spoken, written = scored.row.text, scored.row.pred_text
    too_fast = MAX_TOKENS_PER_S[unit] * duration if duration else float("inf")
    foreign = _foreign(scored, written) - _foreign(scored, spoken) if _language(scored) in SCRIPTS else 0.0
    faults = {
        "hallucinated": _hallucinated(scored, merge_compounds=merge_compounds),
        "collapsed": len(hypothesis) < COLLAPSED_SHARE * len(reference),
        "loop": has_loop(hypothesis) and not has_loop(reference),
        "repetitive": compression_ratio(written) > max(MAX_COMPRESSION_RATIO, compression_ratio(spoken)),
        "not ended": LOOP in flags or TOO_LONG in flags,
        "too fast": len(hypothesis) > max(too_fast, len(reference)),
        "too long": len(hypothesis) > MAX_LENGTH_RATIO * len(reference),
        "foreign script": foreign > FOREIGN_SHARE,
    }
    return [name for name, wrong in faults.items() if wrong] + [f"flag {flag}" for flag in dict.fromkeys(flags)]


def _hallucinated(scored: Scored, *, merge_compounds: bool) -> bool:
    """Many words in a row that were not spoken, or many for so short a reference."""
    inserted = scored.counts.insertions
    if inserted >= max(LEAST_INSERTED, INSERTED_SHARE * len(scored.reference)):
        return True
    if inserted < INSERTED_RUN:
        return False
    edits = align(scored.reference, scored.hypothesis, merge_compounds=merge_compounds)
    runs = (sum(1 for _ in run) for kind, run in groupby(edit.kind for edit in edits) if kind == "insertion")
    return max(runs, default=0) >= INSERTED_RUN


def _check(name: str, rows: Sequence[Scored], of: Sequence[Scored]) -> Check:
    wrong = {id(scored) for scored in rows}
    others = Counts.total(scored.counts for scored in of if id(scored) not in wrong)
    rate = others.rate if others.reference_words else None
    return Check(name, len(rows), len(rows) / len(of), rate, tuple(row_id(scored.row) for scored in rows))


def _seconds(rows: Iterable[Scored]) -> float:
    """Their duration; 0 where one is not known."""
    durations = [scored.row.duration for scored in rows]
    return sum(d for d in durations if d is not None) if None not in durations else 0.0


def _language(scored: Scored) -> str:
    return str(scored.row.x.get("language", ""))


# ---- scripts ----


@lru_cache(maxsize=65536)
def _script(character: str) -> str | None:
    """Of a letter; None of anything else, and of letters of no script."""
    if not unicodedata.category(character).startswith("L") or character in "ªº":
        return None
    first = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    return _SCRIPT_OF_NAME.get(first, first.capitalize())


def _scripts(text: str) -> Counter[str]:
    """How many letters of each script; compatibility forms count as what they stand for."""
    found = Counter(map(_script, unicodedata.normalize("NFKC", text)))
    return Counter({script: count for script, count in found.items() if script})


def _outside(scored: Scored, text: str) -> tuple[int, int]:
    """Letters outside the scripts of the row's language, and all letters."""
    scripts = _scripts(text)
    own = SCRIPTS[_language(scored)]
    return sum(count for script, count in scripts.items() if script not in own), scripts.total()


def _foreign(scored: Scored, text: str) -> float:
    outside, letters = _outside(scored, text)
    return outside / letters if letters else 0.0


def _share_of(rows: Iterable[Scored], text: Callable[[Scored], str]) -> float | None:
    """Letters outside the language's scripts, of all letters of some rows' texts; None without letters."""
    counts = [_outside(scored, text(scored)) for scored in rows]
    letters = sum(count for _, count in counts)
    return sum(outside for outside, _ in counts) / letters if letters else None
