"""Alignment and counts: recorded cases, brute force, kaldialign and NIST's sclite as oracles; size and speed."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkasr import metrics
from arkasr.data import read_manifest
from arkasr.metrics import Counts, corpus_word_errors, count, word_errors, words
from arkasr.metrics import align as aligning
from arkasr.metrics.align import Edit, align, merge_pair

CASES = Path(__file__).with_name("eval") / "normalizer_cases.json"
# Vocabularies whose words are made of each other, so that compounds, and ties between them, are everywhere.
VOCABULARIES = [
    ["a", "b", "ab", "ba", "aab"],
    ["a", "aa", "aaa"],
    ["x", "y", "xy", "z", "zx", "yz", "xyz"],
    ["a", "b", "c", "d", "e", "f"],
    ["état", "é", "tat", "日本", "日", "本"],
]


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Any:
    path = CASES if CASES.is_file() else request.getfixturevalue("shared") / "eval" / "normalizer_cases.json"
    return json.loads(path.read_text())


def needed(name: str, *, found: bool) -> None:
    """A laptop without it skips, CI fails."""
    if not found:
        if "CI" in os.environ:
            pytest.fail(f"{name} is missing, and CI must run these tests")
        pytest.skip(f"{name} is missing")


@pytest.fixture
def kaldialign() -> ModuleType:
    try:
        import kaldialign  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        needed("kaldialign", found=False)
    return kaldialign  # type: ignore[no-any-return]


@pytest.fixture(params=["kaldialign", "own"])
def counter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`count` with kaldialign, and where it is not installed."""
    if request.param == "own":
        monkeypatch.setitem(sys.modules, "kaldialign", None)
    else:
        request.getfixturevalue("kaldialign")
    metrics._kaldialign.cache_clear()
    yield request.param
    metrics._kaldialign.cache_clear()


def counted(edits: list[Edit]) -> tuple[int, int, int]:
    kinds = [edit.kind for edit in edits]
    return kinds.count("insertion"), kinds.count("deletion"), kinds.count("substitution")


def starred(edits: list[Edit]) -> list[tuple[str, str]]:
    return [(" ".join(edit.reference) or "*", " ".join(edit.hypothesis) or "*") for edit in edits]


def random_pair(rng: random.Random, longest: int) -> tuple[list[str], list[str]]:
    vocabulary = rng.choice(VOCABULARIES)
    one, other = ([rng.choice(vocabulary) for _ in range(rng.randrange(longest))] for _ in range(2))
    return one, other


# ---- recorded cases ----


@pytest.mark.usefixtures("counter")
def test_recorded_alignments(cases: Any) -> None:
    assert len(cases["wer_pairs"]) == 21
    for case in cases["wer_pairs"]:
        reference, hypothesis = case["ref"].split(), case["hyp"].split()
        merged, plain = case["merge_compounds"], case["plain"]
        got = count(reference, hypothesis, merge_compounds=True)
        assert got == Counts(merged["ins"], merged["dele"], merged["sub"], merged["ref_len"]), case["name"]
        assert got.rate == float(merged["err_rate"]), case["name"]
        got = count(reference, hypothesis, merge_compounds=False)
        assert got == Counts(plain["ins"], plain["dele"], plain["sub"], len(reference)), case["name"]
        edits = align(reference, hypothesis, merge_compounds=True)
        assert starred(edits) == [tuple(pair) for pair in case["alignment"]], case["name"]


def test_recorded_pairs_that_differ_in_spaces(cases: Any) -> None:
    assert len(cases["compound_pairs"]) == 6
    for case in cases["compound_pairs"]:
        assert merge_pair(case["ref"], case["hyp"]) == (case["out_ref"], case["out_hyp"])


def test_kinds_of_edits() -> None:
    reference, hypothesis = "a white paper was very good x", "the whitepaper was good ok x"
    edits = align(reference.split(), hypothesis.split(), merge_compounds=True)
    assert edits == [
        Edit("substitution", ("a",), ("the",)),
        Edit("compound", ("white", "paper"), ("whitepaper",)),
        Edit("equal", ("was",), ("was",)),
        Edit("deletion", ("very",), ()),
        Edit("equal", ("good",), ("good",)),
        Edit("insertion", (), ("ok",)),
        Edit("equal", ("x",), ("x",)),
    ]


# ---- properties ----

TEXTS = st.sampled_from(VOCABULARIES).flatmap(
    lambda vocabulary: st.tuples(*[st.lists(st.sampled_from(vocabulary), max_size=9)] * 2)
)


def cheapest(reference: list[str], hypothesis: list[str], *, merge: bool) -> int:
    """The cost by trying everything."""

    @cache
    def cost(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        ways = [cost(i - 1, j) + 1, cost(i, j - 1) + 1, cost(i - 1, j - 1) + (reference[i - 1] != hypothesis[j - 1])]
        if merge:
            ways += [cost(i - k, j - 1) for k in range(2, i + 1) if "".join(reference[i - k : i]) == hypothesis[j - 1]]
            ways += [cost(i - 1, j - k) for k in range(2, j + 1) if "".join(hypothesis[j - k : j]) == reference[i - 1]]
        return min(ways)

    return cost(len(reference), len(hypothesis))


@given(texts=TEXTS, merge=st.booleans())
def test_an_alignment_is_one_and_the_cheapest(texts: tuple[list[str], list[str]], merge: bool) -> None:
    reference, hypothesis = texts
    edits = align(reference, hypothesis, merge_compounds=merge)
    assert [word for edit in edits for word in edit.reference] == reference
    assert [word for edit in edits for word in edit.hypothesis] == hypothesis
    shapes = {"equal": (1, 1), "substitution": (1, 1), "insertion": (0, 1), "deletion": (1, 0)}
    for edit in edits:
        shape = len(edit.reference), len(edit.hypothesis)
        if edit.kind == "compound":
            assert merge
            assert min(shape) == 1 < max(shape)
        else:
            assert shape == shapes[edit.kind]
        same = "".join(edit.reference) == "".join(edit.hypothesis)
        assert same == (edit.kind in {"equal", "compound"})
    assert sum(counted(edits)) == cheapest(reference, hypothesis, merge=merge)


@given(texts=TEXTS, merge=st.booleans())
def test_counts_do_not_depend_on_what_is_installed(texts: tuple[list[str], list[str]], merge: bool) -> None:
    reference, hypothesis = texts
    got = count(reference, hypothesis, merge_compounds=merge)
    own = counted(align(reference, hypothesis, merge_compounds=merge))
    assert got == Counts(*own, len(reference))
    assert count(reference, reference, merge_compounds=merge) == Counts(0, 0, 0, len(reference))


@given(texts=TEXTS)
def test_merging_a_pair_moves_only_spaces(texts: tuple[list[str], list[str]]) -> None:
    pair = " ".join(texts[0]), " ".join(texts[1])
    merged = merge_pair(*pair)
    assert [text.replace(" ", "") for text in merged] == [text.replace(" ", "") for text in pair]
    assert all(len(new.split()) <= len(old.split()) for new, old in zip(merged, pair, strict=True))


def test_long_pairs_are_merged_by_difflib_with_its_shortcut() -> None:
    """The leaderboard uses it as it comes: in hypotheses of 200 words, frequent ones are no anchors.

    So "of" does not part the two compounds here, and the region between rare words has other characters.
    """
    reference, hypothesis = "r1 white paper of black board q r2", "r1 whitepaper of blackboard r2"
    assert merge_pair(reference, hypothesis)[0] == "r1 whitepaper of black board q r2"
    many = " of" * 200
    assert merge_pair(reference + many, hypothesis + many)[0].startswith("r1 white paper of black board q r2")


# ---- kaldialign ----


def test_equal_to_kaldialign_on_ten_thousand_pairs(kaldialign: ModuleType) -> None:
    """Totals, their split and the very alignment, with compounds and without."""
    rng = random.Random(0)
    compounds = 0
    for _ in range(10_000):
        reference, hypothesis = random_pair(rng, rng.choice([4, 9, 25]))
        for merge in (True, False):
            edits = align(reference, hypothesis, merge_compounds=merge)
            theirs = kaldialign.edit_distance(reference, hypothesis, merge_compounds=merge)
            assert counted(edits) == (theirs["ins"], theirs["del"], theirs["sub"]), (reference, hypothesis, merge)
            assert starred(edits) == kaldialign.align(reference, hypothesis, "*", merge_compounds=merge)
            compounds += any(edit.kind == "compound" for edit in edits)
    assert compounds > 2_000


@pytest.mark.parametrize("block", [1, 2, 3, 7, 10_000])
def test_blocks_of_rows_make_no_difference(kaldialign: ModuleType, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Rows are worked out twice, from the kept ones; compounds reach over several rows, and so over the kept ones."""
    monkeypatch.setattr(aligning, "_LEAST_BLOCK", block)
    monkeypatch.setattr(aligning, "isqrt", lambda _: 1)
    rng = random.Random(block)
    for longest in [3] * 50 + [30] * 50 + [150] * 6:
        reference, hypothesis = random_pair(rng, longest)
        edits = align(reference, hypothesis, merge_compounds=True)
        assert starred(edits) == kaldialign.align(reference, hypothesis, "*", merge_compounds=True)


def test_a_long_word_of_many_words(kaldialign: ModuleType) -> None:
    """A compound reaches further back than a block of rows is long."""
    reference = ["x", *["ab", "a", "b"] * 40, "y"]
    hypothesis = ["x", "abab" * 40, "z"]
    edits = align(reference, hypothesis, merge_compounds=True)
    assert [edit.kind for edit in edits] == ["equal", "compound", "substitution"]
    assert starred(edits) == kaldialign.align(reference, hypothesis, "*", merge_compounds=True)
    assert counted(align(hypothesis, reference, merge_compounds=True)) == (0, 0, 1)


# ---- size and speed ----


def long_pair(num_words: int) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 8))) for _ in range(3_000)]
    vocabulary += [one + other for one, other in zip(vocabulary[:500], vocabulary[500:1_000], strict=True)]
    reference = rng.choices(vocabulary, k=num_words)
    heard = [rng.choice(vocabulary) if rng.random() < 0.1 else word for word in reference if rng.random() > 0.05]
    return reference, [*heard, *rng.choices(vocabulary, k=num_words)][:num_words]


@pytest.mark.parametrize("merge", [True, False])
def test_eight_thousand_words(merge: bool) -> None:
    """A call of an hour is one alignment: 13 MB and 1.4 s on one core of the machine where this was written."""
    reference, hypothesis = long_pair(8_000)
    tracemalloc.start()
    started = time.process_time()
    edits = align(reference, hypothesis, merge_compounds=merge)
    elapsed_s, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed_s < 15
    assert peak < 40e6
    assert sum(map(len, (edit.reference for edit in edits))) == 8_000
    errors = sum(counted(edits))
    assert 1_000 < errors < 2_000
    assert count(reference, hypothesis, merge_compounds=merge).errors == errors


def test_many_short_utterances(kaldialign: ModuleType) -> None:
    """100 000 of 10 words in a second or so: here a twentieth, with room for a busy machine."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(1_000)]
    references = [rng.choices(vocabulary, k=10) for _ in range(5_000)]
    hypotheses = [[word if rng.random() > 0.1 else "x" for word in said] for said in references]
    started = time.process_time()
    total = Counts.total(
        count(one, other, merge_compounds=True) for one, other in zip(references, hypotheses, strict=True)
    )
    assert time.process_time() - started < 1
    theirs = kaldialign.batch_error_rate(references, hypotheses, merge_compounds=True)
    assert total == Counts(theirs["ins"], theirs["del"], theirs["sub"], theirs["ref_len"])


# ---- numbers ----


@pytest.mark.usefixtures("counter")
def test_counts_add_up() -> None:
    one, other = Counts(1, 2, 3, 10), Counts(4, 0, 0, 0)
    assert (one.errors, one.rate, other.rate, Counts(0, 0, 0, 0).rate) == (6, 0.6, float("inf"), 0.0)
    assert Counts.total([one, other]) == one + other == Counts(5, 2, 3, 10)
    assert Counts.total([]) == Counts(0, 0, 0, 0)
    assert count([], ["a", "b"], merge_compounds=True) == Counts(2, 0, 0, 0)
    assert count(["a", "b"], [], merge_compounds=True) == Counts(0, 2, 0, 2)
    assert count([], [], merge_compounds=True) == Counts(0, 0, 0, 0)


@pytest.mark.usefixtures("counter")
def test_words_of_training() -> None:
    assert words("It's  ONE-two, «three»!") == ["it's", "one", "two", "three"]
    assert word_errors("a b c", "A x c d.") == Counts(1, 0, 1, 3)
    assert corpus_word_errors([("a b", "a"), ("", "x"), ("c", "c")]) == Counts(1, 1, 0, 3)


# ---- sclite ----


def sclite(folder: Path, pairs: list[tuple[list[str], list[str]]]) -> list[tuple[int, int, int, int]]:
    """Correct, substituted, deleted and inserted words of each pair, by NIST's program."""
    program = shutil.which("sctk")
    if program is None:
        pytest.skip("Debian's sctk is not installed")
    for name, side in (("ref", 0), ("hyp", 1)):
        lines = [f"{' '.join(pair[side])} (s_{number:05})" for number, pair in enumerate(pairs)]
        (folder / name).write_text("\n".join(lines) + "\n")
    command = [
        str(program), "sclite", "-r", str(folder / "ref"), "trn", "-h", str(folder / "hyp"), "trn", "-i", "rm",
        "-o", "pra", "stdout",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    found = re.findall(r"id: \(s_(\d+)\)\nScores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    scores = {int(number): tuple(map(int, counts)) for number, *counts in found}
    assert sorted(scores) == list(range(len(pairs)))
    return [(c, s, d, i) for c, s, d, i in (scores[number] for number in range(len(pairs)))]


def an4(shared: Path) -> list[list[str]]:
    return [
        words(utterance.text) for utterance in read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test")
    ]


def edited(reference: list[str], vocabulary: list[str], share: float, rng: random.Random) -> list[str]:
    heard: list[str] = []
    for word in reference:
        chance = rng.random() / share
        if chance < 1 / 3:
            continue
        heard.append(rng.choice(vocabulary) if chance < 2 / 3 else word)
        if 2 / 3 <= chance < 1:
            heard.append(rng.choice(vocabulary))
    return heard


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_as_many_errors_as_sclite_finds(shared: Path, tmp_path: Path, share: float) -> None:
    """On all AN4 test utterances with random edits.

    sclite weighs a substitution 4 and the others 3, so what is cheapest for it may have more edits; at these shares of
    wrong words, it has not.
    """
    rng = random.Random(7)
    references = an4(shared)
    vocabulary = sorted({word for reference in references for word in reference})
    pairs = [(reference, edited(reference, vocabulary, share, rng)) for reference in references]
    theirs = sclite(tmp_path, pairs)
    ours = [count(*pair, merge_compounds=False) for pair in pairs]
    total = Counts.total(ours)
    assert total.reference_words == sum(c + s + d for c, s, d, _ in theirs) == 773
    assert total.errors == sum(s + d + i for _, s, d, i in theirs) > 0.8 * share * 773
    for one, (_, s, d, i) in zip(ours, theirs, strict=True):
        assert one.insertions - one.deletions == i - d
        assert one.errors <= s + d + i


def test_sclite_never_finds_fewer(shared: Path, tmp_path: Path) -> None:
    """On unrelated texts the two differ, but only where its own weights excuse it."""
    rng = random.Random(8)
    references = an4(shared)
    pairs = list(zip(references, rng.sample(references, len(references)), strict=True))
    differing = 0
    for pair, (_, s, d, i) in zip(pairs, sclite(tmp_path, pairs), strict=True):
        one = count(*pair, merge_compounds=False)
        assert one.errors <= s + d + i
        if one.errors != s + d + i:
            differing += 1
            assert 4 * s + 3 * (d + i) <= 4 * one.substitutions + 3 * (one.deletions + one.insertions)
    assert differing < len(pairs) / 10


def test_sclite_agrees_on_what_the_model_hears(shared: Path, tmp_path: Path) -> None:
    import arkasr

    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))[:40]
    transcripts = arkasr.load_model("tiny").transcribe([utterance.audio for utterance in utterances])
    pairs = [(words(u.text), words(t.text)) for u, t in zip(utterances, transcripts, strict=True)]
    total = Counts.total(count(*pair, merge_compounds=False) for pair in pairs)
    theirs = sclite(tmp_path, pairs)
    assert total.errors == sum(s + d + i for _, s, d, i in theirs) > 0
    assert total.reference_words == sum(c + s + d for c, s, d, _ in theirs) > 200
