# ruff: noqa: RUF001 - the texts are multilingual
"""Normalizers: the leaderboard's recorded cases, Whisper's program as oracle, and what every normalizer promises."""

import importlib
import json
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.whisper import english_normalizer as oracle

from arkasr.errors import MissingExtraError, UsageError
from arkasr.metrics import english, languages, numbers
from arkasr.metrics.normalize import DEFAULT, NAMES, Normalizer, default_for, hint, normalizer, versions

CASES = json.loads((Path(__file__).parent / "eval" / "normalizer_cases.json").read_text(encoding="utf-8"))
ENGLISH = ("whisper", "oal-d1e99b2", "oal-next")
NUMBERS = oracle.EnglishNumberNormalizer()


# ---- the cases that were recorded from the leaderboard's program ----


@pytest.mark.parametrize(
    ("name", "column"), [("oal-d1e99b2", "expected"), ("oal-next", "expected_next"), ("whisper", "whisper_output")]
)
def test_english_cases(name: str, column: str) -> None:
    text = normalizer(name).text
    wanted = {case["input"]: case.get(column, case["expected"]) for case in CASES["english"]}
    assert len(CASES["english"]) == 147
    assert {case: text(case) for case in wanted} == wanted


def test_multilingual_cases() -> None:
    assert len(CASES["multilingual"]) == 43
    plain = normalizer("multilingual", language="").text
    for case in CASES["multilingual"]:
        spoken = normalizer("multilingual", language=case["lang"]).text
        assert plain(case["input"]) == case["expected_plain"]
        assert spoken(case["input"]) == case["expected_lang"], case["lang"]


def test_multilingual_cases_of_the_later_revision() -> None:
    cases = [case for case in CASES["multilingual"] if case["lang"] != "en"]  # with "en" the name means English's chain
    assert sum("expected_lang_next" in case for case in cases) == 3
    for case in cases:
        wanted = case.get("expected_lang_next", case["expected_lang"])
        assert normalizer("oal-next", language=case["lang"]).text(case["input"]) == wanted


def test_chinese_cases() -> None:
    assert len(CASES["chinese"]) == 40
    oal, ark = normalizer("zh-oal"), normalizer("zh-ark-compat")
    for case in CASES["chinese"]:
        assert oal.text(case["input"]) == case["expected"]
        assert oal.tokens(case["expected"]) == case["tokens"]
        assert ark.text(case["input"]) == case["other"]["ark_clean"]


def test_the_cases_and_tables_are_those_of_the_specification(shared: Path) -> None:
    assert json.loads((shared / "eval" / "normalizer_cases.json").read_text(encoding="utf-8")) == CASES
    given = json.loads((shared / "eval" / "normalizer_tables.json").read_text(encoding="utf-8"))
    ours = english.tables()
    for table in ("compounds", "spelling_removed", "spelling_set", "names"):
        assert ours["oal"][table] == given[table]
    assert ours["fillers"]["oal"] == given["fillers"]
    assert len(ours["spelling"]) == 1739


def test_spelling_and_names_may_be_looked_up_at_once() -> None:
    tables = english.tables()
    spelling, names = {**tables["spelling"], **tables["oal"]["spelling_set"]}, tables["oal"]["names"]
    assert names.keys().isdisjoint([*spelling, *spelling.values()])


# ---- Whisper's English, by transformers ----

WORDS = (
    *sorted(NUMBERS.words), *(word for word in ("and", "oh", "hundred", "point", "double", "one", "per cent") * 6),
    "the", "cat", "half", "and a half", "a", "i", "x", "12", "3.5", "0", "$5", "£2.50", "¢7", "€0.50", "5%", "2.0.1",
    "1", "1s", "90s", "21 st", "b2b", "half.", "٣", ".5", "5.", "$", "%", ".", "$.5", "1,000", "half%", "and\na half",
)  # fmt: skip
PIECES = (
    "Mr.", "Mrs", "won't", "it's", "John's", "y'all", "i'ma", "ma'am", "'s been", "Dr", "St.", "[x]", "(y)", "<z", "um",
    "Uh-huh", "hmm", "mm", "colour", "theatre", "B.B.C.", "a.m.", "é", "½", "…", "...", "’", "ﬁ", "œ", "ß", "-", "—",
    "\n", "  ", "\u200b", "İ", "'", "o'clock", "OK", "wi-fi", "Stephen", "gonna", "n't", ",", "日本", "\u0301",
)  # fmt: skip


def number_texts(seed: int, count: int) -> Iterator[str]:
    source = random.Random(seed)
    for _ in range(count):
        yield " ".join(source.choices(WORDS, k=source.randint(0, 9)))


def wild_texts(seed: int, count: int) -> Iterator[str]:
    source = random.Random(seed)
    for _ in range(count):
        pieces = source.choices(source.choice([WORDS, PIECES, WORDS + PIECES]), k=source.randint(0, 9))
        text = source.choice(["", " ", " "]).join(pieces)
        yield source.choice([text, text.upper(), text.title()])


def test_number_words_are_read_as_by_the_oracle() -> None:
    assert numbers._READ.keys() == NUMBERS.words
    changed = 0
    for text in number_texts(1, 20_000):
        wanted = NUMBERS(text)
        assert numbers.always_to_digits(text, lone_oh=False) == wanted
        changed += wanted != text
    assert changed > 10_000


@pytest.mark.parametrize("lone_oh", [False, True])
def test_skipping_the_number_pass_changes_nothing(lone_oh: bool) -> None:
    skipped = 0
    for text in [*number_texts(2, 10_000), *wild_texts(3, 10_000)]:
        clean = unicodedata.normalize("NFKD", text.lower())
        wanted = " ".join(numbers.always_to_digits(clean, lone_oh=lone_oh).split())
        assert " ".join(numbers.to_digits(clean, lone_oh=lone_oh).split()) == wanted
        skipped += numbers.may_skip(clean, clean.split())
    assert skipped > 2_000


def test_whispers_whole_chain_is_the_oracles() -> None:
    ours, theirs = normalizer("whisper").text, oracle.EnglishTextNormalizer(english.tables()["spelling"])
    for text in wild_texts(4, 10_000):
        assert ours(text) == theirs(text), repr(text)


def test_every_characters_symbol_is_the_oracles() -> None:
    symbols = english._Symbols()
    for code in [*range(0x3000), *range(0x3000, 0x20000, 7), 0x1F600]:
        if 0xD800 <= code < 0xE000:
            continue
        text = f"a{chr(code)}b"
        wanted = oracle.remove_symbols_and_diacritics(text, keep=english.KEPT)
        assert unicodedata.normalize("NFKD", text).translate(symbols) == wanted, hex(code)


# ---- the leaderboard's own rules, one by one ----


@pytest.mark.parametrize(
    ("text", "pinned", "later"),
    [
        ("four oh one", "401", "401"),  # "oh" behind a number and before one
        ("oh seven nine eight", "0798", "0798"),  # two digits behind it
        ("oh seven", "07", "oh 7"),
        ("two hundred and oh dear", "2000 dear", "200 oh dear"),
        ("plus oh dear", "+0 dear", "+oh dear"),
        ("half past twelve", "half past 12", "12 30"),
        ("a quarter to one", "a quarter to one", "12 45"),
        ("twenty-five minutes before zero", "25 minutes before 0", "23 35"),
        ("ten minutes after thirteen o'clock", "10 minutes after 130 clock", "13 10"),
        ("half past 24", "half past 24", "half past 24"),
        ("half past twenty five", "half past 25", "half past 25"),
        ("seven o’clock", "70 clock", "7"),
        ("03:00 and 7:05", "30 and 75", "3 and 75"),
        ("1:2:30", "one 2 30", "one 2 30"),
        ("uhhh ahem mmkay", "uhhh ahem mmkay", ""),
        ("it's Ann's", "it is anne s", "it is anne s"),
        ("plan b c d", "plan bcd", "plan bcd"),
        ("100%% $$5", "100% $5", "100% $5"),
    ],
)
def test_revisions_differ_where_the_rules_do(text: str, pinned: str, later: str) -> None:
    assert normalizer("oal-d1e99b2").text(text).strip() == pinned
    assert normalizer("oal-next").text(text).strip() == later


def test_without_oh_the_number_rules_are_one() -> None:
    for text in number_texts(5, 5_000):
        words = text.replace("oh", "zero")
        assert numbers.to_digits(words, lone_oh=True) == numbers.to_digits(words, lone_oh=False)


@pytest.mark.parametrize("name", ENGLISH)
def test_a_hypothesis_that_loops_in_digits_is_no_error(name: str) -> None:
    """Python refuses to read more than 4300 digits; Whisper's program ends with that error."""
    looped = "9" * 5_000
    assert normalizer(name).text(f"{looped} million") == f"{looped} 1000000"
    assert normalizer(name).text("nine " * 5_000) == looped
    assert normalizer(name).text("nine " * 4_290 + "sextillion") == "9" * 4_290 + " 1" + "0" * 21


def test_english_takes_a_seventh_of_a_millisecond() -> None:
    source = random.Random(6)
    common = [case["input"].split() for case in CASES["english"] if case["input"].split()]
    texts = [" ".join(word for _ in range(3) for word in source.choice(common)[:4]) for _ in range(2_000)]
    for name in ENGLISH:
        text = cast("Any", normalizer(name).text).__wrapped__  # without the cache
        start = time.process_time()
        for line in texts:
            text(line)
        assert (time.process_time() - start) / len(texts) < 0.15e-3


# ---- other languages ----


def test_plain_multilingual_is_the_oracles_basic_chain() -> None:
    ours, theirs = normalizer("multilingual", language="").text, oracle.BasicTextNormalizer()
    for text in wild_texts(7, 5_000):
        clean = text.replace("\u200b", "")  # the leaderboard drops it, transformers keeps it
        assert ours(clean) == theirs(clean).strip(), repr(clean)


@pytest.mark.parametrize("language", [*languages.WITHOUT_NUMBERS, "hi", "xx", ""])
def test_digits_stay_where_num2words_has_no_language(language: str) -> None:
    assert normalizer("multilingual", language=language).text("8 a 10 000") == "8 a 10 000"


def test_every_number_of_num2words_is_words_or_its_digits() -> None:
    num2words = importlib.import_module("num2words")  # has no types
    known = sorted({code[:2] for code in num2words.CONVERTER_CLASSES} & num2words.CONVERTER_CLASSES.keys())
    for language in [code for code in known if code not in languages.WITHOUT_NUMBERS]:
        text = normalizer("multilingual", language=language).text
        for digits in (1, 2, 3, 4, 7, 13, 16, 19, 28, 34, 41, 67, 150, 300, 301, 5_000):
            assert text(digits * "8") is not None
        assert text("8" * 301) == "8" * 301
        assert text("8") != "8", language


def test_pairwise_is_for_languages_but_english() -> None:
    assert normalizer("multilingual", language="de").pairwise
    assert normalizer("oal-next", language="hi").pairwise
    assert not any(normalizer(name).pairwise for name in NAMES)


def test_japanese_and_korean() -> None:
    japanese, korean, words = normalizer("ja"), normalizer("ko"), normalizer("ko-words")
    text = japanese.text("「ありがとう」って言った（笑） ｶﾞｷﾞ、コーヒー・ABC　１２")
    assert text == "ありがとうって言ったガギコーヒーabc12"
    assert japanese.tokens("ガギ") == ["ガ", "ギ"]
    decomposed = unicodedata.normalize("NFD", "한국어, 안녕 하세요!")
    assert korean.tokens(korean.text(decomposed)) == list("한국어안녕하세요")
    assert words.tokens(words.text(decomposed)) == ["한국어", "안녕", "하세요"]


# ---- Chinese ----


@pytest.mark.parametrize(
    "readings",
    [
        ("房间号是1203", "房间号是一二零三", "房间号是一千二百零三"),
        ("三点三十分", "3:30", "3点30分"),
        ("重量5kg", "重量五千克"),
        ("2007年3月15日", "二零零七年三月十五日", "二〇〇七年三月十五日", "2007-03-15"),
        ("涨了百分之五十", "涨了50%", "漲了百分之五十"),
        ("二分之一", "1/2", "½"),
        ("两百二十人", "220人", "二百二十人"),
        ("两个人", "2个人", "二个人"),
        ("零下-5度", "零下负五度"),
        ("我有一点累", "我 有 一点累。"),
    ],
)
def test_inverse_normalization_unites_readings(readings: tuple[str, ...]) -> None:
    text = normalizer("zh-itn").text
    assert len({text(reading) for reading in readings}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("一共12.5元", "一共125元"),
        ("涨了50%", "涨了50"),
        ("负五度", "五度"),
        ("3:30出发", "330出发"),
        ("¥99", "99"),
        ("二分之一", "十二"),
    ],
)
def test_inverse_normalization_keeps_numbers_apart(one: str, other: str) -> None:
    text = normalizer("zh-itn").text
    assert text(one) != text(other)


# wetext keeps the first seven by itself, the others are ours.
IDIOMS = ("我有一点累", "三中全会", "百分之几", "千万别去", "万一下雨", "不管三七二十一", "成千上万",
          "十分好", "十有八九", "十之八九", "八九不离十", "五十步笑百步", "四十不惑", "三十而立")  # fmt: skip


@pytest.mark.parametrize("idiom", IDIOMS)
def test_inverse_normalization_leaves_idioms(idiom: str) -> None:
    assert normalizer("zh-itn").text(idiom) == idiom


def test_the_guard_of_an_idiom_leaves_times_and_fractions() -> None:
    text = normalizer("zh-itn").text
    assert [text(line) for line in ("三点十分", "十分之一", "五十分")] == ["3:10", "1/10", "50分"]


def test_latin_words_count_once_in_mixed_error_rate() -> None:
    mixed = normalizer("zh-mer")
    assert mixed.tokens(mixed.text("深度 learning 模型3个, café!")) == [
        "深",
        "度",
        "learning",
        "模",
        "型",
        "三",
        "个",
        "café",
    ]
    assert mixed.text("Wi-Fi 好") == normalizer("zh-oal").text("Wi-Fi 好")


# ---- what every normalizer promises ----

ANY_TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("aßé .,'$%1２百点はか한[]<>()\u0301")), max_size=40
)


def every() -> list[Normalizer]:
    return [normalizer(name) for name in NAMES] + [normalizer("multilingual", language="de")]


@given(ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_tokens_rebuild_the_text(text: str) -> None:
    for each in every():
        normal = each.text(text)
        tokens = each.tokens(normal)
        assert "".join(tokens) == "".join(normal.split())
        assert not any(token == "" or token.isspace() for token in tokens)
        assert each.text(text) == normal


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_what_is_normalized_stays_so(text: str) -> None:
    """Not so in English: "one 2" is "12" the second time; nor where numbers are words or digits."""
    for name, language in [("plain", "en"), ("multilingual", ""), ("zh-ark-compat", "zh")]:
        normal = normalizer(name, language=language)
        once = normal.text(text)
        assert normal.text(once) == once, name


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_of_nothing(name: str) -> None:
    each = normalizer(name)
    assert each.name == name
    assert each.tokens(each.text("")) == each.tokens(each.text(" \n ")) == []
    assert each.unit == ("character" if name in {"zh-oal", "zh-itn", "zh-ark-compat", "ja", "ko"} else "word")
    assert each.merge_compounds == (name in {"oal-d1e99b2", "oal-next", "multilingual"})


def test_texts_are_cached_and_the_cache_has_a_bound() -> None:
    for each in every():
        if each.name != "plain":
            assert cast("Any", each.text).cache_info().maxsize == english.CACHED_TEXTS
    assert normalizer(DEFAULT) is normalizer(DEFAULT)


# ---- names, languages, packages ----


@pytest.mark.parametrize("name", ["", "oal", "OAL-d1e99b2", "zh-qwen2audio"])
def test_unknown_names_are_told_the_known(name: str) -> None:
    with pytest.raises(UsageError, match="take one of plain, whisper, oal-d1e99b2"):
        normalizer(name)


@pytest.mark.parametrize(
    ("name", "language", "remedy"),
    [
        ("whisper", "de", "take multilingual"),
        ("oal-d1e99b2", "zh-CN", "take zh-oal"),
        ("zh-oal", "ja", "take ja"),
        ("ko", "de", "take multilingual"),
        ("multilingual", "german", "language code"),
        ("plain", "d", "language code"),
    ],
)
def test_a_normalizer_of_another_language_is_refused(name: str, language: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy) as caught:
        normalizer(name, language=language)
    assert "\n" not in str(caught.value)


def test_defaults_by_language() -> None:
    given = ("en", "EN-us", "zh", "cmn_hans_cn", "yue", "ja_jp", "ko", "de", "pt_BR", "et", "hi")
    wanted = (DEFAULT, DEFAULT, "zh-oal", "zh-oal", "zh-oal", "ja", "ko", *["multilingual"] * 4)
    assert tuple(map(default_for, given)) == wanted
    assert normalizer("multilingual", language="pt_BR").text("19") == "dezanove"  # European, as on the leaderboard


def test_hints() -> None:
    assert "oal-next" in str(hint("multilingual", language="hi"))
    assert "oal-next" in str(hint("multilingual", language="th"))
    assert "digits" in str(hint("multilingual", language="hr_hr"))
    assert hint("oal-next", language="hi") is None
    assert hint("multilingual", language="de") is None


@pytest.mark.parametrize(
    ("name", "language", "module", "extra"),
    [
        ("multilingual", "de", "regex", "eval"),
        ("multilingual", "de", "num2words", "eval"),
        ("oal-next", "hi", "regex", "eval"),
        ("zh-oal", "zh", "opencc", "zh"),
        ("zh-oal", "zh", "wetext", "zh"),
        ("zh-mer", "zh", "regex", "zh"),
        ("zh-itn", "zh", "wetext", "zh"),
        ("ja", "ja", "regex", "eval"),
        ("ko", "ko", "regex", "eval"),
    ],
)
def test_missing_packages_are_named(
    name: str, language: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    normalizer.cache_clear()
    with pytest.raises(MissingExtraError, match=rf"{name} needs {module}.*pip install 'arkasr\[{extra}\]'") as caught:
        normalizer(name, language=language)
    assert "\n" not in str(caught.value)


def test_english_and_plain_need_no_package() -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('regex', 'transformers', 'num2words', 'opencc', 'wetext', 'torch')))\n"
        "from arkasr.metrics.normalize import normalizer\n"
        "for name in ('plain', 'whisper', 'oal-d1e99b2', 'oal-next', 'zh-ark-compat', 'ko-words'):\n"
        "    assert normalizer(name).tokens(normalizer(name).text('Words,  words')), name\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert found["num2words"] == "0.5.14"
    assert found["unicode"] == unicodedata.unidata_version
    assert found.keys() == {"kaldialign", "num2words", "transformers", "regex", "wetext", "OpenCC", "unicode"}

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert set(versions().values()) == {"absent", unicodedata.unidata_version}
