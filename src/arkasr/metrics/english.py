"""English text as the Open ASR Leaderboard compares it, in three revisions. Pure Python; needs no other package.

    lower case -> without brackets -> without fillers -> contractions -> symbols -> numbers -> spelling, names, acronyms

The order and the tables decide the score's last digits, so they are kept with all they do oddly ("..." becomes "."):
the cases in tests/eval were recorded from the leaderboard's own program.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from arkasr.metrics.numbers import TENS, UNITS, to_digits

Revision = Literal["whisper", "oal-d1e99b2", "oal-next"]
KEPT = ".%$¢€£"  # marks that numbers need
CACHED_TEXTS = 2**16  # of a corpus's references, which every system is scored against

_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]")
_PARENTHESES = re.compile(r"\([^)]+?\)")
_SPACE_APOSTROPHE = re.compile(r"\s+'")
_COMMA_IN_NUMBER = re.compile(r"(\d),(\d)")
_SPACES = re.compile(r"\s+")
# The earlier revisions take the character behind a mark along, so of two marks in a row only the first goes.
_EARLIER_PERIOD = re.compile(r"\.([^0-9]|$)")
_EARLIER_MARK = re.compile(r"[.$¢€£]([^0-9])")
_EARLIER_PERCENT = re.compile(r"([^0-9])%")
_NEXT_PERIOD = re.compile(r"\.(?![0-9])")
_NEXT_MARK = re.compile(r"[.$¢€£](?![0-9])|(?<![0-9])%")


@lru_cache(maxsize=1)
def tables() -> Any:
    """The tables of english.json; its "source" says where each is from."""
    return json.loads(Path(__file__).with_name("english.json").read_text(encoding="utf-8"))


def without_brackets(text: str) -> str:
    """Without [...] and <...>, whose two brackets need not be of a kind, then without (...)."""
    if "[" in text or "<" in text:
        text = _BRACKETS.sub("", text)
    return _PARENTHESES.sub("", text) if "(" in text else text


def normalizer(revision: Revision) -> Callable[[str], str]:
    """The text of a revision, cached by string."""
    return lru_cache(maxsize=CACHED_TEXTS)(_English(revision))


class _Symbols(dict[int, str]):
    """For `str.translate` of NFKD text: marks and symbols become spaces, accents nothing. Fills itself."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in KEPT:
            result = character
        elif character in tables()["letters"]:
            result = tables()["letters"][character]
        elif category == "Mn":
            result = ""
        else:
            result = " " if category[0] in "MSP" else character
        self[code] = result
        return result


class _English:
    def __init__(self, revision: Revision) -> None:
        data = tables()
        leaderboard = revision != "whisper"
        oal = data["oal"]
        self._next = revision == "oal-next"
        fillers = {"whisper": "whisper", "oal-d1e99b2": "oal", "oal-next": "next"}[revision]
        self._fillers = re.compile(rf"\b(?:{'|'.join(data['fillers'][fillers])})\b")
        self._contractions = list(_contractions(data["contractions"], oal["is_after"] if leaderboard else None))
        self._symbols = _Symbols()
        self._words: dict[str, str] = dict(data["spelling"])
        self._compounds: list[tuple[str, re.Pattern[str], str]] = []
        if leaderboard:
            self._words = _leaderboard_words(self._words, oal)
            self._compounds = [
                (first, re.compile(rf"\b{first}\s+{second}\b"), whole)
                for (first, second), whole in ((parts.split(), whole) for parts, whole in oal["compounds"])
            ]
        self._acronyms = leaderboard

    def __call__(self, text: str) -> str:
        text = without_brackets(text.lower())
        text = self._fillers.sub("", text)
        if "'" in text:
            text = _SPACE_APOSTROPHE.sub("'", text)
        if self._next:
            text = clock_times(text)
        for part, pattern, full in self._contractions:
            if part in text:  # a hundred times as fast as the search that it may save
                text = pattern.sub(full, text)
        if "," in text:
            text = _COMMA_IN_NUMBER.sub(r"\1\2", text)
        if "." in text:
            text = _NEXT_PERIOD.sub(" ", text) if self._next else _EARLIER_PERIOD.sub(r" \1", text)
        text = unicodedata.normalize("NFKD", text).translate(self._symbols)
        for part, pattern, whole in self._compounds:
            if part in text:
                text = pattern.sub(whole, text)
        words = to_digits(text, lone_oh=self._next).split()
        words = [self._words.get(word, word) for word in words]
        text = " ".join(_join_letters(words) if self._acronyms else words)
        return self._without_stray_marks(text)

    def _without_stray_marks(self, text: str) -> str:
        if not any(mark in text for mark in KEPT):
            return text
        if self._next:
            text = _NEXT_MARK.sub(" ", text)
        else:
            text = _EARLIER_PERCENT.sub(r"\1 ", _EARLIER_MARK.sub(r" \1", text))
        return _SPACES.sub(" ", text)


def _contractions(rows: list[list[str]], is_after: list[str] | None) -> Iterable[tuple[str, re.Pattern[str], str]]:
    """What the text must hold, the pattern and its replacement; 's is "is" only after some words, if they are given."""
    for part, full in rows:
        if part == "'s" and is_after is not None:
            yield part, re.compile(rf"\b({'|'.join(is_after)})'s\b"), r"\1 is"
        else:
            before = "" if part.startswith("'") or part == "n't" else r"\b"
            yield part, re.compile(rf"{before}{part}\b"), full


def _leaderboard_words(spelling: dict[str, str], oal: Any) -> dict[str, str]:
    """Spelling and names as one table: no word's spelling is a name that has another."""
    kept = {word: to for word, to in spelling.items() if word not in oal["spelling_removed"]}
    return {**kept, **oal["spelling_set"], **oal["names"]}


def _join_letters(words: list[str]) -> list[str]:
    """Runs of single letters or digits as one word: "b b c" -> "bbc"; with "a" or "i" in it only if three or more."""
    joined: list[str] = []
    run: list[str] = []
    for word in [*words, "  "]:
        if len(word) == 1 and word.isalnum():
            run.append(word)
            continue
        if run:
            least = 3 if "a" in run or "i" in run else 2
            joined += ["".join(run)] if len(run) >= least else run
            run = []
        joined.append(word)
    return joined[:-1]


# ---- clock times of the later revision: "half past three" -> "3:30" ----

_CLOCK_WORDS = {"zero": 0} | {word: n for n, word in enumerate(UNITS, start=1)}
_CLOCK_WORDS |= {word: 10 * n for n, word in enumerate(TENS[:4], start=2)}
_CLOCK_NUMBER = rf"(?:[0-9]{{1,2}}|(?:{'|'.join(TENS[:4])})(?:[\s-]+(?:{'|'.join(UNITS[:9])}))?|{'|'.join(UNITS)}|zero)"
_OCLOCK = r"\s+o\s*['\u2019]?\s*clock"
_RELATIVE = re.compile(
    rf"(?<![\w.:])(half|(?:a\s+)?quarter|{_CLOCK_NUMBER}\s+minutes?)\s+(past|after|to|before)\s+({_CLOCK_NUMBER})"
    rf"(?:{_OCLOCK})?\b"
)
_FULL_HOUR = re.compile(rf"(?<![\w.:])({_CLOCK_NUMBER}){_OCLOCK}\b")
_WRITTEN = re.compile(r"(?<![\w:./])([01]?[0-9]|2[0-3]):([0-5][0-9])(?![\w:]|\.[0-9])")


def clock_times(text: str) -> str:
    """Spoken and written times of day as hour:minute, full hours as the hour alone."""
    if "half" in text or "quarter" in text or "minute" in text:
        text = _RELATIVE.sub(_relative, text)
    if "clock" in text:
        text = _FULL_HOUR.sub(lambda match: f"{n}:00" if (n := _clock_number(match[1])) < 24 else match[0], text)
    if ":" in text:
        text = _WRITTEN.sub(
            lambda match: str(int(match[1])) if int(match[2]) == 0 else f"{int(match[1])}:{match[2]}", text
        )
    return text


def _clock_number(text: str) -> int:
    return int(text) if text.isdigit() else sum(_CLOCK_WORDS[word] for word in re.split(r"[\s-]+", text))


def _relative(match: re.Match[str]) -> str:
    amount, relation = match[1].split(), match[2]
    hour = _clock_number(match[3])
    if amount[-1].startswith("minute"):
        minute = _clock_number(" ".join(amount[:-1]))
    else:
        minute = 30 if amount == ["half"] else 15
    if hour > 23 or minute > 59:
        return match[0]
    if relation in {"to", "before"} and minute:
        hour = (hour - 2) % 12 + 1 if 1 <= hour <= 12 else (hour - 1) % 24
        minute = 60 - minute
    return f"{hour}:{minute:02d}"
