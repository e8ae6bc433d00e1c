# ruff: noqa: RUF001 - full-width signs are what it is about
"""Chinese text as it is compared, character by character.

The leaderboard spells digits out, which charges legal readings as errors (1203 has two); `inverse` writes both sides'
numbers in digits instead. `ark_compat` is the published part of the ARK paper's scorer: without its `text_process`.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from arkasr.metrics.english import CACHED_TEXTS
from arkasr.metrics.languages import package, without_symbols

_FRACTION = re.compile(r"(\d?)([¼-¾⅐-⅞])")  # NFKC alone would make 293/4 of 29¾
_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]")
_FULL_TO_HALF = str.maketrans("０１２３４５６７８９％．－＋＝：／", "0123456789%.-+=:/")
_ARK_DELETES = str.maketrans("", "", "，。！？、,.!?;:\"'（）()【】[]<>《》{}…—-~·`@#$%^&*_+=|\\/")
_NUMERALS = "零一二三四五六七八九十百千万亿两幺"
# Numerals that count nothing, which wetext would write in digits; others (一点, 三中全会, 万一) it leaves by itself.
_GUARDED = re.compile(
    rf"((?<![点分{_NUMERALS}])十分(?![之钟{_NUMERALS}])|十有八九|十之八九|八九不离十|五十步笑百步|四十不惑|三十而立)"
)
_HAS_NUMERAL = re.compile(rf"[{_NUMERALS}]")
_OF_NUMBER = re.compile(r"(?<=\d)[.:/~](?=\d)|(?<=\d)%|[-¥$€£](?=\d)")
# Places in the private use area, through which a number's own marks pass the removal of symbols.
_MARKS = ".:/~%-¥$€£"
_HIDDEN = "".join(chr(0xE000 + n) for n in range(len(_MARKS)))
_HIDE = str.maketrans(_MARKS, _HIDDEN)
_SHOW = str.maketrans(_HIDDEN, _MARKS)


def leaderboard(needed_by: str) -> Callable[[str], str]:
    """The leaderboard's chain: simplified characters, digits spelled out, no symbols. Cached by string.

    Raises:
        MissingExtraError: OpenCC, wetext or regex is not installed.
    """
    prepare, spell = _prepare(needed_by), _wetext("tn", needed_by)
    not_word = package("regex", extra="zh", needed_by=needed_by).compile(r"[^\w\s]")

    @lru_cache(maxsize=CACHED_TEXTS)
    def text_of(text: str) -> str:
        text = spell(prepare(text)).replace("〇", "零")
        return " ".join(not_word.sub(" ", without_symbols(text, keep_marks=True)).split())

    return text_of


def inverse() -> Callable[[str], str]:
    """Numbers in digits, however they were written; single ones in characters. Cached by string.

    Raises:
        MissingExtraError: OpenCC, wetext or regex is not installed.
    """
    prepare, spell, write = _prepare("zh-itn"), _wetext("tn", "zh-itn"), _wetext("itn", "zh-itn")

    @lru_cache(maxsize=CACHED_TEXTS)
    def text_of(text: str) -> str:
        # Spelled out first, so that 5kg and 五千克, 3点30 and 3:30 arrive at the same digits.
        parts = _GUARDED.split(spell(prepare(text)).replace("〇", "零"))
        parts[::2] = [write(part) if _HAS_NUMERAL.search(part) else part for part in parts[::2]]
        text = _OF_NUMBER.sub(lambda match: match[0].translate(_HIDE), "".join(parts).replace("两", "二"))
        return " ".join(without_symbols(text, keep_marks=True).translate(_SHOW).lower().split())

    return text_of


def ark_compat() -> Callable[[str], str]:
    """The ARK scorer's rule: some full-width signs to half, lower case, a list of punctuation deleted. Cached."""

    @lru_cache(maxsize=CACHED_TEXTS)
    def text_of(text: str) -> str:
        return " ".join(text.translate(_FULL_TO_HALF).strip().lower().translate(_ARK_DELETES).split())

    return text_of


def characters(*, extra: str, needed_by: str) -> Callable[[str], list[str]]:
    """The graphemes of a text, without its spaces."""
    return _finder(r"\X", extra, needed_by)


def mixed() -> Callable[[str], list[str]]:
    """Graphemes, but a run of Latin letters is one token."""
    return _finder(r"\p{Latin}[\p{Latin}\p{M}]*|\X", "zh", "zh-mer")


def _finder(pattern: str, extra: str, needed_by: str) -> Callable[[str], list[str]]:
    find = package("regex", extra=extra, needed_by=needed_by).compile(pattern).findall
    return lambda text: [token for word in text.split() for token in find(word)]


def _prepare(needed_by: str) -> Callable[[str], str]:
    simplify = package("opencc", extra="zh", needed_by=needed_by).OpenCC("t2s").convert
    beside_han = package("regex", extra="zh", needed_by=needed_by).compile(r"(?<=\p{Han})\s+|\s+(?=\p{Han})")

    def prepare(text: str) -> str:
        text = unicodedata.normalize("NFKC", _FRACTION.sub(_apart, text))
        text = _BRACKETS.sub("", simplify(text).lower())
        return str(beside_han.sub("", text.replace("(", " ").replace(")", " ")))

    return prepare


def _apart(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[2]).replace("\u2044", "/")
    return f"{match[1]} {fraction}" if match[1] else fraction


def _wetext(operator: str, needed_by: str) -> Callable[[str], str]:
    convert: Any = package("wetext", extra="zh", needed_by=needed_by).Normalizer(lang="zh", operator=operator).normalize

    def converted(text: str) -> str:
        return str(convert(text))

    return converted
