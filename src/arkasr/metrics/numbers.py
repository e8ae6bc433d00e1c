"""English number words to digits, as Whisper's normalizer writes them: "two hundred and five pounds" -> "£205".

The rules are Whisper's, its oddities with them ("one twenty" -> "120", "point hundred" loses "point"), for scores are
only comparable digit by digit; tests compare with transformers' program. One reading differs on purpose: a number of
more than 4000 digits, over which Whisper's program stumbles, stays as it is.
"""

import re
from collections.abc import Callable
from fractions import Fraction

_ZEROS = frozenset(("o", "oh", "zero"))
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
         "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_UNITS = {word: n for n, word in enumerate(UNITS, start=1)}
_TENS = {word: 10 * n for n, word in enumerate(TENS, start=2)}
_POWERS = ("thousand", "million", "billion", "trillion", "quadrillion", "quintillion", "sextillion", "septillion",
           "octillion", "nonillion", "decillion")  # fmt: skip
_SCALES = {"hundred": 100} | {word: 1000**power for power, word in enumerate(_POWERS, start=1)}
_IRREGULAR = {"first": (1, "st"), "second": (2, "nd"), "third": (3, "rd"), "fifth": (5, "th"), "twelfth": (12, "th")}
_REGULAR = {
    word + ("h" if word == "eight" else "th"): (n, "th") for word, n in _UNITS.items() if n not in {1, 2, 3, 5, 12}
}
_INFLECTED = (
    {"zeroth": (0, "th")}
    | _IRREGULAR
    | _REGULAR
    | {"sixes" if word == "six" else word + "s": (n, "s") for word, n in _UNITS.items()}
    | {word[:-1] + "ies": (n, "s") for word, n in _TENS.items()}
    | {word[:-1] + "ieth": (n, "th") for word, n in _TENS.items()}
)
_INFLECTED_SCALES = {word + end: (n, end) for word, n in _SCALES.items() for end in ("s", "th")}
_SIGNS = {"minus": "-", "negative": "-", "plus": "+", "positive": "+"}
_MONEY = {
    "pound": "£",
    "pounds": "£",
    "euro": "€",
    "euros": "€",
    "dollar": "$",
    "dollars": "$",
    "cent": "¢",
    "cents": "¢",
}
_DIGIT_WORDS = _ZEROS | _UNITS.keys() | _TENS.keys()
_PREFIXES = frozenset("-+£€$¢")
_LONGEST_DIGITS = 4000  # Python converts at most 4300

_NUMERIC = re.compile(r"\d+(\.\d+)?").fullmatch
_DIGITS = re.compile(r"\d+").fullmatch
_ANY_DIGIT = re.compile(r"\d").search
_AND_A_HALF = re.compile(r"\band\s+a\s+half\b")
_LETTER_DIGIT = re.compile(r"([a-z])(?=[0-9])|([0-9])(?=[a-z])")
_SPACED_ENDING = re.compile(r"([0-9])\s+(st|nd|rd|th|s)\b")
_MONEY_AND_CENTS = re.compile(r"([€£$])([0-9]+) (?:and )?¢([0-9]{1,2})\b")
_NOTHING_AND_CENTS = re.compile(r"[€£$]0.([0-9]{1,2})\b")
_LONE_ONE = re.compile(r"\b1(s?)\b")


def to_digits(text: str, *, lone_oh: bool) -> str:
    """Number words of lower-case text as digits, money signs in front; white space becomes single spaces.

    Args:
        text: lower-case text whose only marks are . % $ ¢ € £.
        lone_oh: "oh" stays a word outside a row of digits (the later revision); else it is always a zero.
    """
    words = text.split()
    if may_skip(text, words):
        return " ".join(words)
    return always_to_digits(text, lone_oh=lone_oh)


def may_skip(text: str, words: list[str]) -> bool:
    """Whether the pass would change nothing but white space. "and" alone is no number; "and a half" can be lost."""
    return _TRIGGERS.isdisjoint(words) and "half" not in text and not _ANY_DIGIT(text)


def always_to_digits(text: str, *, lone_oh: bool) -> str:
    """`to_digits` without its shortcut; tests compare the two."""
    if "half" in text:
        text = _halves(text)
    text = _LETTER_DIGIT.sub(r"\1\2 ", text)
    text = _SPACED_ENDING.sub(r"\1\2", text)
    text = " ".join(_Reader(text.split(), lone_oh=lone_oh).read())
    text = _MONEY_AND_CENTS.sub(lambda match: f"{match[1]}{match[2]}.{int(match[3]):02d}", text)
    text = _NOTHING_AND_CENTS.sub(lambda match: f"¢{int(match[1])}", text)
    return _LONE_ONE.sub(r"one\1", text)


def _halves(text: str) -> str:
    """With "point five" for "and a half" behind a number; "and a half" with nothing before it is lost."""
    *counted, rest = _AND_A_HALF.split(text)
    pieces = []
    for piece in filter(str.strip, counted):
        number = piece.split()[-1] in _DIGIT_WORDS | _SCALES.keys()
        pieces += [piece, "point five" if number else "and a half"]
    return " ".join([*pieces, rest] if rest.strip() else pieces)


def _times(value: str, scale: int) -> int | None:
    """A number's digits times a scale, if that is an integer; None for what is no number (".", "3.4.")."""
    if len(value) > _LONGEST_DIGITS:
        return None
    try:
        product = Fraction(value) * scale
    except ValueError:
        return None
    return product.numerator if product.denominator == 1 else None


class _Reader:
    """One pass over words. `value` is the number read so far: an int while it can grow, else its digits."""

    def __init__(self, words: list[str], *, lone_oh: bool) -> None:
        self._words = words
        self._lone_oh = lone_oh
        self._at = 0
        self._out: list[str] = []
        self._value: int | str | None = None
        self._prefix = ""

    def read(self) -> list[str]:
        """The words with numbers as digits."""
        while self._at < len(self._words):
            word = self._words[self._at]
            has_prefix = word[0] in _PREFIXES
            if _NUMERIC(word[has_prefix:]):
                self._digits(word, has_prefix=has_prefix)
            else:
                _READ.get(word, _Reader._plain)(self, word)
            self._at += 1
        self._flush()
        return self._out

    def _peek(self, ahead: int) -> str:
        at = self._at + ahead
        return self._words[at] if 0 <= at < len(self._words) else ""

    def _number_follows(self) -> bool:
        following = self._peek(1)
        return following in _READ or _NUMERIC(following) is not None

    def _write(self, token: str) -> None:
        self._out.append(self._prefix + token)
        self._value, self._prefix = None, ""

    def _flush(self) -> None:
        if self._value is not None:
            self._write(str(self._value))

    def _as_text(self) -> str:
        return str(self._value or "")

    def _plain(self, word: str) -> None:
        self._flush()
        self._write(word)

    def _digits(self, word: str, *, has_prefix: bool) -> None:
        if isinstance(self._value, str) and self._value.endswith("."):
            self._value += word
            return
        self._flush()
        if has_prefix:
            self._prefix = word[0]
        number = word[has_prefix:]
        whole = _times(number, 1)
        self._value = number if whole is None else whole

    def _zero(self, word: str) -> None:
        if word == "oh" and self._lone_oh and not self._in_row():
            self._plain(word)
        else:
            self._value = self._as_text() + "0"

    def _in_row(self) -> bool:
        """Whether "oh" is read with digits: one behind it and a number before it, or two behind it."""
        follow = [word in _DIGIT_WORDS or _DIGITS(word) is not None for word in (self._peek(1), self._peek(2))]
        return follow[0] and (self._value is not None or follow[1])

    def _joined(self, number: int) -> int | str:
        """The number so far and one more: added where it has room ("twenty" + 3), else written behind it."""
        value, before = self._value, self._peek(-1)
        if value is None:
            return number
        if isinstance(value, str):
            if before in _TENS and number < 10:
                return value[:-1] + str(number)
        elif not (number < 20 and before in _UNITS) and value % (10 if number < 10 else 100) == 0:
            return value + number
        return f"{value}{number}"

    def _count(self, word: str) -> None:
        self._value = self._joined(_COUNTS[word])

    def _inflected(self, word: str) -> None:
        number, ending = _INFLECTED[word]
        self._write(f"{self._joined(number)}{ending}")

    def _scale(self, word: str) -> None:
        self._value = self._scaled(_SCALES[word])

    def _inflected_scale(self, word: str) -> None:
        scale, ending = _INFLECTED_SCALES[word]
        self._write(f"{self._scaled(scale)}{ending}")

    def _scaled(self, scale: int) -> int:
        value = self._value
        if isinstance(value, int):
            return value // 1000 * 1000 + value % 1000 * scale
        if value is None:
            return scale
        product = _times(value, scale)
        if product is None:
            self._flush()
            return scale
        return product

    def _sign(self, word: str) -> None:
        self._flush()
        if self._number_follows():
            self._prefix = _SIGNS[word]
        else:
            self._write(word)

    def _money(self, word: str) -> None:
        if self._value is None:
            self._write(word)
        else:
            self._prefix = _MONEY[word]
            self._flush()

    def _percent(self, word: str) -> None:
        if self._value is None or (word == "per" and self._peek(1) != "cent"):
            self._plain(word)
        else:
            self._write(f"{self._value}%")
            self._at += word == "per"

    def _and(self, word: str) -> None:
        if not (self._number_follows() and self._peek(-1) in _SCALES):
            self._plain(word)

    def _repeated(self, word: str) -> None:
        following = self._peek(1)
        if following in _ZEROS or following in _UNITS:
            self._value = self._as_text() + str(_UNITS.get(following, 0)) * (2 if word == "double" else 3)
            self._at += 1
        else:
            self._plain(word)

    def _point(self, word: str) -> None:
        following = self._peek(1)
        if following in _DIGIT_WORDS or _NUMERIC(following):
            self._value = self._as_text() + "."
        elif not self._number_follows():
            self._plain(word)


_COUNTS = _UNITS | _TENS
_READ: dict[str, Callable[[_Reader, str], None]] = {
    **dict.fromkeys(_ZEROS, _Reader._zero),  # noqa: SLF001 - the table of the class's own readings
    **dict.fromkeys(_COUNTS, _Reader._count),  # noqa: SLF001
    **dict.fromkeys(_INFLECTED, _Reader._inflected),  # noqa: SLF001
    **dict.fromkeys(_SCALES, _Reader._scale),  # noqa: SLF001
    **dict.fromkeys(_INFLECTED_SCALES, _Reader._inflected_scale),  # noqa: SLF001
    **dict.fromkeys(_SIGNS, _Reader._sign),  # noqa: SLF001
    **dict.fromkeys(_MONEY, _Reader._money),  # noqa: SLF001
    **dict.fromkeys(("per", "percent"), _Reader._percent),  # noqa: SLF001
    **dict.fromkeys(("double", "triple"), _Reader._repeated),  # noqa: SLF001
    "and": _Reader._and,  # noqa: SLF001
    "point": _Reader._point,  # noqa: SLF001
}
_TRIGGERS = _READ.keys() - {"and"}
