"""What kind of errors, what nobody said, and where: each number on texts of which it is known."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkasr.evaluate import slices
from arkasr.evaluate.analysis import Anatomy, Change, Mark, WordClass, anatomy, is_cased, orthography, sensitivity
from arkasr.evaluate.hallucination import SCRIPTS, OnSpeech, has_loop, on_nonspeech, on_speech, produced_language
from arkasr.evaluate.manifest import Manifest, Row
from arkasr.evaluate.score import Scored, SetScore, score
from arkasr.evaluate.slices import Cell, Slice, gini, speakers
from arkasr.metrics import Counts
from arkasr.metrics.normalize import normalizer


def row(text: str, heard: str, duration: float | None = 4.0, **x: Any) -> Row:
    return Row("a.wav", duration, None, text, heard, x=x)


def scored(*rows: Row, name: str = "plain") -> SetScore:
    numbered = tuple(dataclasses.replace(one, x={"id": str(n), **one.x}) for n, one in enumerate(rows))
    return score(Manifest(Path("m"), numbered), normalizer(name), name="set", regime=None)


def spoken(*rows: Row, name: str = "plain") -> OnSpeech:
    found = on_speech(scored(*rows, name=name))
    assert found is not None
    return found


def checked(*rows: Row, name: str = "plain") -> dict[str, tuple[str, ...]]:
    return {check.name: check.ids for check in spoken(*rows, name=name).checks}


# ---- anatomy ----


def classes(found: Anatomy) -> dict[str, tuple[int, int]]:
    return {one.name: (one.reference_words, one.errors) for one in found.classes}


def test_errors_by_kind() -> None:
    found = anatomy(scored(row("a b c d", "a x c d e"), row("a b c d", "a x d"), row("a b", "a b")))
    assert (found.insertion_rate, found.deletion_rate, found.substitution_rate) == (0.1, 0.1, 0.2)
    assert found.sentence_error_rate == pytest.approx(2 / 3)
    assert found.confusions == (Change("b", "x", 2),)
    assert found.insertions == (Change("", "e", 1),)
    assert found.deletions == (Change("c", "", 1),)
    assert found.character_error_rate == pytest.approx(4 / 10)


def test_compounds_are_no_errors_by_word_or_by_character() -> None:
    found = anatomy(scored(row("the white paper", "the whitepaper"), name="oal-d1e99b2"))
    assert found.compounds == (Change("white paper", "whitepaper", 1),)
    assert (found.substitution_rate, found.character_error_rate) == (0.0, 0.0)
    assert classes(found)["last"] == (1, 0)


def test_classes_of_words() -> None:
    texts = [("call 555 now", "call 500 now"), ("call 555 now please", "fall 555 now"), ("call it now", "call now now")]
    found = classes(anatomy(scored(*(row(*pair) for pair in texts))))
    assert found == {"digits": (2, 1), "first": (3, 1), "last": (3, 1), "rare": (2, 2)}


def test_proper_nouns_are_what_a_cased_reference_capitalizes_inside_a_sentence() -> None:
    cased = row(
        "Then Peter met Mary. He's fine, I think, said NASA.", "then peter met marie he's fine i think said nasa"
    )
    lower = row(cased.text.lower(), cased.pred_text)
    assert classes(anatomy(scored(cased)))["proper nouns"] == (2, 1)
    assert "proper nouns" not in classes(anatomy(scored(lower)))
    assert "proper nouns" not in classes(anatomy(scored(dataclasses.replace(cased, x={"language": "de"}))))


def test_a_set_without_words_has_counts_but_no_rates() -> None:
    found = anatomy(scored(row("", "noise")))
    assert (found.insertion_rate, found.character_error_rate, found.classes) == (None, None, ())
    assert found.insertions == (Change("", "noise", 1),)


def test_sessions_too_long_for_characters_have_none() -> None:
    long = " ".join(f"word{n}" for n in range(2000))
    assert anatomy(scored(row(long, long[:-1]))).character_error_rate is None


@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("abc ", max_size=12)), min_size=1, max_size=6))
def test_the_parts_are_the_whole(pairs: list[tuple[str, str]]) -> None:
    whole = scored(*(row(*pair) for pair in pairs))
    found = anatomy(whole)
    for kind in ("insertions", "deletions", "substitutions"):
        changes: tuple[Change, ...] = {"substitutions": found.confusions}.get(kind, ()) or (
            found.insertions if kind == "insertions" else found.deletions if kind == "deletions" else ()
        )
        counted = {"insertions": whole.counts.insertions, "deletions": whole.counts.deletions}
        assert sum(change.count for change in changes) == counted.get(kind, whole.counts.substitutions)


def test_the_same_texts_under_other_normalizers() -> None:
    rows = (row("The colour is O.K., Mr. Smith's", "the color is okay mister smiths", language="en"),)
    found = {one.normalizer: one.errors for one in sensitivity(Manifest(Path("m"), rows))}
    assert list(found) == ["plain", "whisper", "oal-d1e99b2", "oal-next"]
    assert found["oal-d1e99b2"] < found["whisper"] < found["plain"]
    german = sensitivity(Manifest(Path("m"), (row("Das ist gut.", "das ist gut"),)), language="de-DE")
    assert [one.normalizer for one in german] == ["plain", "multilingual", "oal-next"]
    assert {one.rate for one in german} == {0.0}


# ---- spelling ----


def test_punctuation_and_case_against_a_reference_that_has_them() -> None:
    found = orthography([row("Hello, Peter. It cost 3.5 dollars?", "Hello Peter. it cost, 3.5 dollars?")])
    assert found is not None
    assert (found.cased, found.punctuated) == (True, True)
    marks = {mark.mark: mark for mark in found.punctuation}
    assert marks == {",": Mark(",", 1, 1, 0, 0.0), ".": Mark(".", 1, 1, 1, 1.0), "?": Mark("?", 1, 1, 1, 1.0)}
    assert found.punctuation_f1 == pytest.approx(2 / 3)
    assert found.casing_accuracy == pytest.approx(4 / 5)  # 3.5 has no case
    assert found.rate == pytest.approx(3 / 6)


def test_marks_count_at_words_that_were_misheard_and_not_where_none_stands() -> None:
    found = orthography([row("One two. Three.", "One too. Three four.")])
    assert found is not None
    assert found.punctuation == (Mark(".", 2, 2, 1, 0.5),)


def test_ideographic_marks_are_marks() -> None:
    found = orthography([row("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d,\u4e16\u754c")])
    assert found is not None
    assert (found.cased, found.casing_accuracy) == (False, None)
    assert {mark.mark: (mark.reference, mark.both) for mark in found.punctuation} == {",": (1, 1), ".": (1, 0)}


@pytest.mark.parametrize("text", ["YES NO", "yes no", ""])
def test_references_without_spelling_show_none(text: str) -> None:
    assert orthography([row(text, "Yes, no.")]) is None
    assert not is_cased([row(text, "Yes, No.")])


def test_published_references(shared: Path) -> None:
    """FLEURS and AN4 have neither case nor marks, the German sentences both; a perfect answer has no fault."""
    spelled = {}
    for name in ("an4", "fleurs", "kerstin_de"):
        lines = (shared / "speech" / name / "manifest.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        spelled[name] = orthography([row(text, text) for text in texts])
    assert spelled["an4"] is spelled["fleurs"] is None
    german = spelled["kerstin_de"]
    assert german is not None
    assert (german.rate, german.casing_accuracy, german.punctuation_f1) == (0.0, 1.0, 1.0)


# ---- hallucination ----


def test_output_on_non_speech() -> None:
    rows = (row("", "Thank you.", 30.0), row("", "...", 30.0), row("", "Thank you.", 60.0), row(" ", "", 60.0))
    found = on_nonspeech(scored(*rows, row("words", "words")).rows)
    assert found is not None
    assert (found.clips, found.with_output, found.share, found.words_per_minute) == (4, 2, 0.5, 4 / 3)
    assert [(one.text, one.count) for one in found.commonest] == [("Thank you.", 2)]
    assert on_nonspeech(scored(row("words", "")).rows) is None


def test_a_filler_is_speech_though_nothing_is_left_of_it() -> None:
    assert on_nonspeech(scored(row("uh", "uh huh okay"), name="oal-d1e99b2").rows) is None


SPOKEN = "one two three four five six seven eight nine ten eleven twelve"


def test_what_was_inserted() -> None:
    four, five = "one two a b c d three", "one two a b c d e three"
    texts = [SPOKEN.replace("one two three", four), SPOKEN.replace("one two three", five)]
    scattered = SPOKEN.replace("two", "a two").replace("four", "b four").replace("six", "c six")
    scattered = scattered.replace("eight", "d eight").replace("ten", "e ten")
    found = checked(*(row(SPOKEN, text) for text in [*texts, scattered]))
    assert found == {"hallucinated": ("1",)}
    assert checked(row("yes", "yes i do think"))["hallucinated"] == ("0",)
    assert "hallucinated" not in checked(row("yes", "yes i do"))


def test_rates_are_with_and_without_what_was_found() -> None:
    found = spoken(row(SPOKEN, SPOKEN, 60.0), row(SPOKEN, "one two three", 60.0))
    assert [(check.name, check.rate_without) for check in found.checks] == [("collapsed", 0.0)]
    assert (found.rate, found.inserted_per_hour) == (9 / 24, 0.0)
    assert spoken(row("yes", "yes oh my", 3600.0)).inserted_per_hour == 2
    assert spoken(row("yes", "yes oh my", None)).inserted_per_hour is None
    assert on_speech(scored(row("", "a"))) is None


@pytest.mark.parametrize("unit", [1, 2, 5, 20])
def test_loops(unit: int) -> None:
    words = [f"w{n}" for n in range(unit)]
    repeats = max(4, math.ceil(10 / unit))
    assert has_loop(["a", *words * repeats, "b"])
    assert not has_loop(["a", *(words * repeats)[:-1], "b"])


def test_longer_units_and_honest_texts_are_no_loops() -> None:
    assert not has_loop([f"w{n % 21}" for n in range(84)])
    assert not has_loop(random.Random(0).choices("ab", k=30))
    assert not has_loop([])


@given(st.lists(st.sampled_from("ab"), max_size=60))
def test_loops_are_what_the_definition_says(tokens: list[str]) -> None:
    def repeats_at(at: int, unit: int) -> int:
        count = 1
        while tokens[at + count * unit :][:unit] == tokens[at:][:unit]:
            count += 1
        return count

    whole = any(
        (n := repeats_at(at, unit)) >= 4 and n * unit >= 10
        for unit in range(1, 21)
        for at in range(len(tokens) - unit + 1)
    )
    assert not whole or has_loop(tokens)
    if has_loop(tokens):  # a last repetition may be cut off
        assert any(repeats_at(at, unit) >= 4 for unit in range(1, 21) for at in range(len(tokens) - unit + 1))


def test_what_the_reference_repeats_is_no_fault() -> None:
    same = "nine " * 40
    assert checked(row(same, same, 60.0)) == {}
    assert set(checked(row(SPOKEN, same, 60.0))) == {"hallucinated", "loop", "repetitive", "too long"}


def test_flags_and_pace() -> None:
    found = checked(row(SPOKEN, SPOKEN + " now", 2.0, flags=["too_long", "padded"]), row(SPOKEN, SPOKEN, 1.0))
    assert found == {"not ended": ("0",), "too fast": ("0",), "flag too_long": ("0",), "flag padded": ("0",)}


CHINESE, KOREAN = "\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\uc548\ub155\ud558\uc138\uc694"
JAPANESE = "\u4eca\u65e5\u306f\u6674\u308c\u3067\u3059"


@pytest.mark.parametrize(
    ("text", "language"),
    [(CHINESE, "zh or ja"), (JAPANESE, "ja"), (KOREAN, "ko"), ("\u0160koda \u0142\u00f3d\u017a", "Latin script"),
     ("\u041f\u0440\u0438\u0432\u0435\u0442", "Cyrillic script"), ("12, 3.", "nothing"),
     ("\uff21\uff22", "Latin script")],
)  # fmt: skip
def test_the_language_that_a_script_tells(text: str, language: str) -> None:
    assert produced_language(text) == language


def test_the_wrong_script_is_found_and_a_foreign_name_is_not() -> None:
    rows = [
        row(CHINESE, "the weather is fine", language="zh"),
        row(f"\u6211\u7528 iPhone {CHINESE}", f"\u6211\u7528 iPhone {CHINESE}", language="zh"),
        row("okay", "okay", language="zh"),
        row("guten tag", CHINESE, language="de"),
        row("welcome", KOREAN, language="xx"),
    ]
    found = spoken(*rows)
    assert checked(*rows)["foreign script"] == ("0", "3")
    assert [(one.expected, one.produced, one.utterances) for one in found.produced] == [
        ("de", "zh or ja", 1), ("zh", "Latin script", 2), ("zh", "zh or ja", 1)
    ]  # fmt: skip
    assert found.foreign_share == pytest.approx((16 + 6 + 4 + 6) / (16 + 6 + 8 + 4 + 6))
    assert found.foreign_share_of_references == pytest.approx((6 + 4) / (6 + 6 + 8 + 4 + 8))


def test_the_scripts_of_all_nineteen_languages(shared: Path) -> None:
    names = "en zh ja ko de fr es it pt nl pl ro hu cs fi hr sk sl et lt"
    assert sorted(SCRIPTS) == sorted(names.split())
    for name in ("fleurs", "misc", "synthetic_azure", "kerstin_de", "nathalie_nl"):
        lines = map(json.loads, (shared / "speech" / name / "manifest.jsonl").read_text().splitlines())
        known = [row(r["text"], r["text"], language=r["language"]) for r in lines if r["language"] in SCRIPTS]
        assert spoken(*(r for r in known if r.text)).foreign_share == pytest.approx(0.0, abs=0.01), name


def test_characters_speak_twice_as_fast_as_words() -> None:
    said = [row(CHINESE[:3], CHINESE * 2 + CHINESE[:n], 1.05) for n in (0, 1)]
    assert checked(*said, name="zh-oal")["too fast"] == ("1",)


# ---- slices ----


def counted(errors: int, words: int, duration: float | None = 3.0, **x: Any) -> Scored:
    one = Row("a", duration, None, "t", "t", x=x)
    return Scored(one, ("w",) * words, (), Counts(errors, 0, 0, words))


def cut(by: str, *rows: Scored) -> Slice:
    return next(one for one in slices.slices(rows) if one.by == by)


def test_bins_hold_their_lower_edge() -> None:
    rows = [counted(1, 300, seconds) for seconds in (0.5, 1.0, 1.99, 2.0, 40.0, None)]
    found = cut("duration", *rows)
    cells = [(cell.name, cell.utterances) for cell in found.cells]
    assert cells == [("< 1 s", 1), ("1-2 s", 2), ("2-5 s", 1), (">= 40 s", 1), ("unknown", 1)]
    noisy = cut("SNR", *(counted(1, 300, snr=snr) for snr in (-5, 0, 5.0, 20)))
    assert [cell.name for cell in noisy.cells] == ["< 0 dB", "0-5 dB", "5-10 dB", ">= 20 dB"]


def test_small_cells_show_no_rate_and_are_not_compared() -> None:
    rows = [*(counted(n % 3, 20, language="de") for n in range(30)), counted(10, 400, language="en")]
    found = cut("language", *rows, counted(199, 199, language="fr"), counted(190, 250))
    sure = {cell.name: cell.uncertainty.rate if cell.uncertainty else None for cell in found.cells}
    assert sure == {"de": 0.05, "en": 0.025, "fr": None, "unknown": 0.76}
    assert found.worst_over_best == pytest.approx(2)
    german = found.cells[0].uncertainty
    assert german is not None
    assert german.headline.low < 0.05 < german.headline.high


def test_what_no_row_knows_is_no_slice() -> None:
    assert [one.by for one in slices.slices([counted(0, 5, None)])] == ["reference length"]
    assert {one.by for one in slices.slices([counted(0, 5, condition="white")])} == {
        "duration", "reference length", "speaking rate", "condition"
    }  # fmt: skip


def test_every_row_is_in_one_cell_of_every_slice() -> None:
    rng = random.Random(1)
    rows = [
        counted(1, rng.randrange(1, 60), rng.choice([None, rng.random() * 50]), snr=rng.choice([None, 7]))
        for _ in range(99)
    ]
    for one in slices.slices(rows):
        assert sum(cell.utterances for cell in one.cells) == 99
        assert sum(cell.reference_words for cell in one.cells) == sum(len(scored.reference) for scored in rows)


def test_speakers() -> None:
    rows = [counted(errors, 250, speaker=f"s{n}") for n, errors in enumerate([5, 5, 10, 50])]
    found = speakers([*rows, counted(100, 100, speaker="short"), counted(100, 300, speaker="unknown")])
    assert found is not None
    assert (found.speakers, found.suppressed, found.worst_speaker) == (4, 1, "s3")
    assert (found.median, found.worst) == (0.03, 0.2)
    assert found.p90 == pytest.approx(0.04 + 0.7 * 0.16)
    assert speakers(rows[:1]) is None


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30))
def test_gini_is_half_the_relative_mean_difference(values: list[int]) -> None:
    mean = sum(values) / len(values)
    differences = sum(abs(a - b) for a in values for b in values) / len(values) ** 2
    assert gini(values) == pytest.approx(differences / (2 * mean) if mean else 0.0)


def test_all_results_are_json() -> None:
    whole = scored(row("Hello you.", "hello", speaker="a", language="en"), row("", "x"))
    found: list[Any] = [anatomy(whole), on_speech(whole), on_nonspeech(whole.rows), orthography([whole.rows[0].row])]
    found += slices.slices(whole.rows)
    for one in found:
        assert one is not None
        text = json.dumps(dataclasses.asdict(one), allow_nan=False)
        assert isinstance(json.loads(text), dict)
    assert isinstance(slices.slices(whole.rows)[0].cells[0], Cell)
    assert all(isinstance(one, WordClass) for one in anatomy(whole).classes)
