"""Text of other languages as it is compared: the leaderboard's multilingual chain, Japanese, Korean."""

import importlib
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from arkasr.errors import MissingExtraError, UsageError
from arkasr.metrics.english import CACHED_TEXTS, without_brackets

# num2words has none of the first three, and needs an age for the last; their digits stay digits.
WITHOUT_NUMBERS = ("zh", "et", "hr", "am")
_MOST_DIGITS = 300  # of a number that is spelled out; languages end before or soon after
# Written with vowel signs that Unicode counts as marks: the pinned chain makes spaces of them.
NEEDS_MARKS = ("ar", "bn", "fa", "gu", "he", "hi", "km", "kn", "lo", "ml", "mr", "my", "ne", "or", "pa", "si", "ta",
               "te", "th", "ur")  # fmt: skip
# What num2words raises for a number beyond a language's names: there is no one error for it.
_TOO_LARGE = (OverflowError, NotImplementedError, KeyError)
_SAME = {"cmn": "zh", "yue": "zh", "eng": "en", "jpn": "ja", "kor": "ko"}
_CODE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]+)*")
_GROUP = re.compile(r"(\d)\s+(\d{3})\b")
_NUMBER = re.compile(r"\d+")


def package(module: str, *, extra: str, needed_by: str) -> Any:
    """An optional package, imported.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{needed_by} needs {module} ({error}): pip install 'arkasr[{extra}]'") from None


def base_language(code: str) -> str:
    """The language of a code without region and script ("pt_BR" -> "pt"; "cmn_hans_cn" -> "zh"); "" stays "".

    Raises:
        UsageError: it is no language code.
    """
    if code and not _CODE.fullmatch(code.lower()):
        raise UsageError(f"language {code!r}: not a language code; give one such as de or pt-BR")
    base = re.split("[-_]", code.lower())[0]
    return _SAME.get(base, base)


def without_symbols(text: str, *, keep_marks: bool) -> str:
    """NFKC, with symbols and punctuation as spaces; combining marks as well, unless they are kept."""
    return unicodedata.normalize("NFKC", text).translate(_KEEPING if keep_marks else _REMOVING)


class _Symbols(dict[int, str]):
    """For `str.translate`: characters of some of Unicode's major categories become spaces. Fills itself."""

    def __init__(self, categories: str) -> None:
        super().__init__()
        self._categories = categories

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character)[0] in self._categories else character
        return self[code]


_REMOVING, _KEEPING = _Symbols("MSP"), _Symbols("SP")


def multilingual(language: str, *, keep_marks: bool, needed_by: str) -> Callable[[str], str]:
    """The leaderboard's chain for languages but English and Chinese, cached by string; "" leaves digits as they are.

    Raises:
        MissingExtraError: regex or num2words is not installed.
    """
    not_word = package("regex", extra="eval", needed_by=needed_by).compile(r"[^\w\s]")
    to_words = _number_words(language, needed_by)

    @lru_cache(maxsize=CACHED_TEXTS)
    def text_of(text: str) -> str:
        text = without_symbols(without_brackets(text.lower()), keep_marks=keep_marks).lower()
        text = " ".join(not_word.sub("", text).split())
        if to_words is not None and _NUMBER.search(text):
            text = _NUMBER.sub(to_words, _GROUP.sub(r"\1\2", text))
        return text

    return text_of


def _number_words(language: str, needed_by: str) -> Callable[[re.Match[str]], str] | None:
    if not language or language in WITHOUT_NUMBERS:
        return None
    num2words = package("num2words", extra="eval", needed_by=needed_by)
    if language not in num2words.CONVERTER_CLASSES:
        return None

    def words(match: re.Match[str]) -> str:
        if len(match[0]) > _MOST_DIGITS:
            return match[0]
        try:
            spelled: str | None = num2words.num2words(int(match[0]), lang=language)
        except _TOO_LARGE:
            return match[0]
        return spelled or ""  # Vietnamese gives None for what it cannot say

    return words


def spaceless() -> Callable[[str], str]:
    """Japanese: NFKC, lower case, no annotations in brackets, no punctuation, no spaces. Cached by string."""

    @lru_cache(maxsize=CACHED_TEXTS)
    def text_of(text: str) -> str:
        return "".join(_words(text))

    return text_of


def spaced() -> Callable[[str], str]:
    """Korean: as Japanese, with the spaces. Cached by string."""

    @lru_cache(maxsize=CACHED_TEXTS)
    def text_of(text: str) -> str:
        return " ".join(_words(text))

    return text_of


def _words(text: str) -> list[str]:
    # NFKC comes first: half-width and full-width brackets are one, and decomposed syllables are whole.
    return without_symbols(without_brackets(unicodedata.normalize("NFKC", text).lower()), keep_marks=True).split()
