"""What is compared when a transcript is scored: the normalizers by name.

A rate is only comparable with rates of the same normalizer, to the version of its packages (`versions`).
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Literal

from arkasr import metrics
from arkasr.errors import UsageError
from arkasr.metrics import chinese, english, languages

# No "zh-qwen2audio": its chain needs a number grammar (cn_tn) that no package holds.
NAMES = ("plain", "whisper", "oal-d1e99b2", "oal-next", "multilingual", "zh-oal", "zh-mer", "zh-itn", "zh-ark-compat",
         "ja", "ko", "ko-words")  # fmt: skip
DEFAULT = "oal-d1e99b2"
_PACKAGES = ("kaldialign", "num2words", "transformers", "regex", "wetext", "OpenCC")


@dataclass(frozen=True)
class Normalizer:
    """How texts become the tokens that are aligned."""

    name: str
    unit: Literal["word", "character"]
    merge_compounds: bool  # words written together on one side only are no errors
    text: Callable[[str], str]
    tokens: Callable[[str], list[str]]  # of the normalized text
    pairwise: bool = False  # both texts of a pair go through `merge_pair` before `tokens`


def default_for(language: str) -> str:
    """The normalizer that a language is scored with.

    Raises:
        UsageError: it is no language code.
    """
    return {"en": DEFAULT, "zh": "zh-oal", "ja": "ja", "ko": "ko"}.get(
        languages.base_language(language), "multilingual"
    )


@lru_cache(maxsize=64)  # so that texts cached by one are found by the next
def normalizer(name: str, *, language: str = "en") -> Normalizer:
    """The normalizer of a name.

    Args:
        name: one of `NAMES`.
        language: the text's language; only "multilingual" and "oal-next" are for several, and "" keeps their digits.

    Raises:
        UsageError: no such name or language, or a normalizer of another language.
        MissingExtraError: it needs a package that is not installed.
    """
    if name not in NAMES:
        raise UsageError(f"normalizer {name!r}: there is none of that name; take one of {', '.join(NAMES)}")
    base = languages.base_language(language)
    own = name.split("-", maxsplit=1)[0]
    if own in {"zh", "ja", "ko"} and base not in {own, "en", ""}:
        raise UsageError(f"normalizer {name}: is for {own}, not for {language}; take {default_for(language)}")
    if name in {"whisper", "oal-d1e99b2"} and base not in {"en", ""}:
        raise UsageError(f"normalizer {name}: is for en, not for {language}; take {default_for(language)}")
    if name == "multilingual" or (name == "oal-next" and base not in {"en", ""}):
        text = languages.multilingual(base, keep_marks=name == "oal-next", needed_by=name)
        return Normalizer(name, "word", True, text, str.split, pairwise=base != "en")
    return _BUILD[name](name)


def _plain(name: str) -> Normalizer:
    return Normalizer(name, "word", False, lambda text: " ".join(metrics.words(text)), str.split)


def _whisper(name: str) -> Normalizer:
    return Normalizer(name, "word", False, english.normalizer("whisper"), str.split)


def _pinned(name: str) -> Normalizer:
    return Normalizer(name, "word", True, english.normalizer("oal-d1e99b2"), str.split)


def _next(name: str) -> Normalizer:
    return Normalizer(name, "word", True, english.normalizer("oal-next"), str.split)


def _chinese(name: str) -> Normalizer:
    if name == "zh-ark-compat":
        return Normalizer(name, "character", False, chinese.ark_compat(), _letters)
    if name == "zh-mer":
        return Normalizer(name, "word", False, chinese.leaderboard(name), chinese.mixed())
    text = chinese.inverse() if name == "zh-itn" else chinese.leaderboard(name)
    return Normalizer(name, "character", False, text, chinese.characters(extra="zh", needed_by=name))


def _letters(text: str) -> list[str]:
    return [letter for letter in text if letter != " "]


def _japanese(name: str) -> Normalizer:
    return Normalizer(name, "character", False, languages.spaceless(), chinese.characters(extra="eval", needed_by=name))


def _korean(name: str) -> Normalizer:
    if name == "ko-words":
        return Normalizer(name, "word", False, languages.spaced(), str.split)
    return Normalizer(name, "character", False, languages.spaceless(), chinese.characters(extra="eval", needed_by=name))


_BUILD: dict[str, Callable[[str], Normalizer]] = {
    "plain": _plain,
    "whisper": _whisper,
    "oal-d1e99b2": _pinned,
    "oal-next": _next,
    **dict.fromkeys(("zh-oal", "zh-mer", "zh-itn", "zh-ark-compat"), _chinese),
    "ja": _japanese,
    **dict.fromkeys(("ko", "ko-words"), _korean),
}


def hint(name: str, *, language: str) -> str | None:
    """What a reader should know of a normalizer on a language: where it does not do what one expects."""
    base = languages.base_language(language)
    if name == "multilingual" and base in languages.NEEDS_MARKS:
        return f"multilingual makes spaces of the vowel signs of {base}; oal-next keeps them"
    if name in {"multilingual", "oal-next"} and base in languages.WITHOUT_NUMBERS:
        return f"num2words has no {base}: digits stay digits on both sides"
    return None


def versions() -> dict[str, str]:
    """The versions on which normalized texts and counts depend; "absent" for what is not installed."""
    return {name: _version(name) for name in _PACKAGES} | {"unicode": unicodedata.unidata_version}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
