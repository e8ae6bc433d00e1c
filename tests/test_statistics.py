"""Intervals and tests of two systems: what chance gives must not be called a difference, and a difference must."""

import dataclasses
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import kaldialign  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkasr.errors import UsageError
from arkasr.evaluate import resampling, statistics
from arkasr.evaluate.manifest import Manifest, Row
from arkasr.evaluate.mapsswe import mapsswe
from arkasr.evaluate.resampling import Interval
from arkasr.evaluate.score import Scored, SetScore, score
from arkasr.evaluate.statistics import compare, holm, macro_uncertainty, uncertainty, verdict
from arkasr.metrics import Counts
from arkasr.metrics.normalize import normalizer

SC_STATS, SCLITE = Path("/usr/lib/sctk/bin/sc_stats"), Path("/usr/lib/sctk/bin/sclite")
NOTHING = "no difference shown"
Texts = Sequence[tuple[str, str, str, str | None]]  # id, reference, hypothesis, speaker


def scored_set(texts: Texts, name: str = "set") -> SetScore:
    rows = tuple(
        Row(f"{of}.wav", 1.0, None, text, heard, x={"id": of} | ({"speaker": who} if who else {}))
        for of, text, heard, who in texts
    )
    return score(Manifest(Path("m.jsonl"), rows), normalizer("plain"), name=name, regime=None)


def counted_set(errors: Sequence[int], words: Sequence[int], speakers: Sequence[str], name: str = "set") -> SetScore:
    """A set of which only the counts matter; MAPSSWE sees words substituted from the front."""
    rows = []
    for n, (wrong, all_words, speaker) in enumerate(zip(errors, words, speakers, strict=True)):
        reference = tuple(f"w{i}" for i in range(all_words))
        hypothesis = ("x",) * wrong + reference[wrong:]
        row = Row(f"{n}.wav", 1.0, None, " ".join(reference), "", x={"id": f"{n:05}", "speaker": speaker})
        rows.append(Scored(row, reference, hypothesis, Counts(0, 0, wrong, all_words)))
    total = Counts.total(row.counts for row in rows)
    return SetScore(name, "plain", "none", tuple(rows), total, None, None, 0, 0, 0, ())


def simulated(
    rng: np.random.Generator, *, gains: float = 0.0, num_speakers: int = 10, clash: float = 0.0
) -> list[SetScore]:
    """130 utterances of speakers from good to bad; `clash`: how differently the two systems take to a speaker."""
    speaker = rng.integers(0, num_speakers, 130)
    words = rng.integers(1, 20, 130)
    rates = rng.beta(1.5, 8, num_speakers)
    sets = []
    for gain in (gains, 0.0):
        own = np.clip(rates * np.exp(rng.normal(0, clash, num_speakers)) * (1 - gain), 0, 0.95)
        sets.append(counted_set(rng.binomial(words, own[speaker]).tolist(), words.tolist(), [f"s{n}" for n in speaker]))
    return sets


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resamples that suffice for a decision, in a tenth of the time."""
    monkeypatch.setattr(resampling, "RESAMPLES", 1000)


# ---- one system ----


@pytest.mark.usefixtures("fewer")
def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """True rate 0.1, independent utterances: 95 % of the intervals by utterance must hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        words = rng.integers(5, 15, 200)
        found = uncertainty(counted_set(rng.binomial(words, 0.1).tolist(), words.tolist(), [""] * 200).rows)
        assert found is not None
        assert found.by_cluster is None
        held += found.by_utterance.low <= 0.1 <= found.by_utterance.high
    assert 0.91 * 300 <= held <= 0.99 * 300


def test_speakers_of_their_own_rates_widen_the_interval() -> None:
    speakers = [f"s{n // 40}" for n in range(480)]
    errors = [(n // 40) % 4 for n in range(480)]
    found = uncertainty(counted_set(errors, [10] * 480, speakers).rows)
    assert found is not None
    assert found.by_cluster is not None
    assert found.by_cluster.width > 2 * found.by_utterance.width
    assert found.headline == found.by_cluster
    assert (found.utterances, found.clusters, found.note) == (480, 12, "")
    assert found.rate == pytest.approx(0.15)


def test_few_clusters_are_said() -> None:
    speakers = [f"s{n % 6}" for n in range(60)]
    found = uncertainty(counted_set([1] * 60, [5] * 60, speakers).rows)
    assert found is not None
    assert found.note == "6 clusters, interval unreliable"


def test_a_session_stands_for_a_speaker_who_is_not_named() -> None:
    rows = [Row(f"{n}", 1.0, None, "a", "a", parent_id=f"call {n % 3}", x={"speaker": "unknown"}) for n in range(9)]
    scored = [Scored(row, ("a",), ("a",), Counts(0, 0, 0, 1)) for row in rows]
    found = uncertainty(scored)
    assert found is not None
    assert (found.clusters, found.utterances) == (3, 9)


def test_the_same_seed_gives_the_same_digits_in_whatever_company() -> None:
    one = simulated(np.random.default_rng(3))[0]
    assert uncertainty(one.rows) == uncertainty(one.rows)
    assert uncertainty(one.rows) != uncertainty(one.rows, seed=1)
    found = compare([one], [one])
    assert json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))["sets"][0]["verdict"] == NOTHING


def test_without_reference_words_there_is_no_rate() -> None:
    empty = scored_set([("a", "", "noise", None), ("b", "", "", None)])
    assert uncertainty(empty.rows) is None
    with pytest.raises(UsageError, match="noise set"):
        macro_uncertainty([dataclasses.replace(empty, name="noise set")])
    assert compare([empty], [empty]).without_words == ("set",)


def test_a_set_of_which_most_rows_have_no_reference_has_an_interval() -> None:
    found = uncertainty(scored_set([("a", "one two", "one", None), *((str(n), "", "", None) for n in range(9))]).rows)
    assert found is not None
    assert found.by_utterance == Interval(0.5, 0.5)


def test_the_bootstrap_is_that_of_kaldialign() -> None:
    one = simulated(np.random.default_rng(5))[0]
    theirs = kaldialign.bootstrap_wer_ci([row.reference for row in one.rows], [row.hypothesis for row in one.rows])
    ours = uncertainty(one.rows)
    assert ours is not None
    assert ours.rate == pytest.approx(theirs["wer"], rel=0.01)
    assert ours.by_utterance.low == pytest.approx(theirs["ci95min"], rel=0.05)
    assert ours.by_utterance.high == pytest.approx(theirs["ci95max"], rel=0.05)


def test_kinds_are_drawn_as_units_are() -> None:
    """The trick of drawing equal units at once, against drawing every unit by its number."""
    table = np.random.default_rng(0).integers(0, 4, (50, 2)) + np.array([0, 3])
    rng = np.random.default_rng(9)
    plain = table[rng.integers(0, 50, (resampling.RESAMPLES, 50))].sum(axis=1)
    quick = resampling.drawn(table, np.random.default_rng(8))
    assert np.allclose(
        np.quantile(plain, [0.025, 0.5, 0.975], axis=0), np.quantile(quick, [0.025, 0.5, 0.975], axis=0), atol=2.1
    )
    assert np.allclose(np.cov(plain.T), np.cov(quick.T), rtol=0.06, atol=1)


def test_the_macro_average_is_less_certain_than_its_surest_set() -> None:
    sure = counted_set([1, 0] * 500, [10] * 1000, [""] * 1000, "sure")
    vague = counted_set([5, 0] * 20, [10] * 40, [""] * 40, "vague")
    found, alone = macro_uncertainty([sure, vague]), uncertainty(vague.rows)
    assert alone is not None
    assert found.rate == pytest.approx((0.05 + 0.25) / 2)
    assert found.headline.width == pytest.approx(alone.headline.width / 2, rel=0.05)


# ---- two systems ----


def test_a_system_does_not_differ_from_itself() -> None:
    one = simulated(np.random.default_rng(2))[0]
    (found,) = compare([one], [one]).sets
    assert found.difference.headline == Interval(0.0, 0.0)
    assert (found.difference.delta, found.difference.p, found.p_holm, found.verdict) == (0.0, 1.0, 1.0, NOTHING)
    assert found.difference.probability_below == 0.0
    assert found.mapsswe.p is None


def test_the_other_order_has_the_other_sign_to_the_last_digit() -> None:
    one, other = simulated(np.random.default_rng(4), gains=0.2, clash=0.3)
    ours, theirs = compare([one], [other]).sets[0], compare([other], [one]).sets[0]
    d, e = ours.difference, theirs.difference
    assert d.by_cluster is not None
    assert e.by_cluster is not None
    assert (d.delta, d.headline.low, d.headline.high) == (-e.delta, -e.headline.high, -e.headline.low)
    assert (d.by_cluster.low, d.by_utterance.high) == (-e.by_cluster.high, -e.by_utterance.low)
    assert (d.p, d.p_by_utterance, d.p_by_cluster, d.p_bootstrap) == (
        e.p,
        e.p_by_utterance,
        e.p_by_cluster,
        e.p_bootstrap,
    )
    assert ours.mapsswe.z is not None
    assert theirs.mapsswe.z == -ours.mapsswe.z


@pytest.mark.parametrize("clash", [0.0, 0.5])
@pytest.mark.usefixtures("fewer")
def test_chance_is_not_called_a_difference(clash: float) -> None:
    """Also where either system takes to some speakers by chance, which a test by utterance alone takes for skill."""
    assert false_alarms(100, seed=10, clash=clash) <= 9  # 5 % would be 5 +- 2


@pytest.mark.slow
@pytest.mark.parametrize("clash", [0.0, 0.5])
@pytest.mark.usefixtures("fewer")
def test_chance_is_not_called_a_difference_in_a_thousand_pairs(clash: float) -> None:
    assert false_alarms(1000, seed=11, clash=clash) <= 50


def false_alarms(pairs: int, *, seed: int, clash: float) -> int:
    rng = np.random.default_rng(seed)
    sets = (simulated(rng, clash=clash) for _ in range(pairs))
    return sum(compare([one], [other]).sets[0].verdict != NOTHING for one, other in sets)


@pytest.mark.usefixtures("fewer")
def test_a_clash_of_speakers_would_fool_a_test_by_utterance() -> None:
    rng = np.random.default_rng(12)
    found = [compare([one], [two]).sets[0].difference for one, two in (simulated(rng, clash=0.5) for _ in range(40))]
    by_utterance = sum(one.p_by_utterance < 0.05 for one in found)
    assert by_utterance >= 6  # of 40, where 2 are due
    assert sum(one.p < 0.05 for one in found) <= by_utterance / 2


@pytest.mark.usefixtures("fewer")
def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(13)
    said = [compare([one], [two]).sets[0].verdict for one, two in (simulated(rng, gains=0.5) for _ in range(30))]
    assert said.count("better") >= 24
    assert "worse" not in said


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_only_raises_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    assert min(corrected) == min(1.0, len(p_values) * min(p_values))
    places = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[n] for n in places] == sorted(corrected)


def test_what_may_be_said() -> None:
    below, above, around = Interval(-0.2, -0.1), Interval(0.1, 0.2), Interval(-0.1, 0.1)
    assert verdict(below, 0.01) == "better"
    assert verdict(above, 0.01) == "worse"
    assert {verdict(around, 0.01), verdict(below, 0.05), verdict(above, 0.2), verdict(Interval(-1, 0), 0.0)} == {
        NOTHING
    }


def test_nobody_else_says_better() -> None:
    folder = Path(statistics.__file__).parent
    holders = {path.name for path in folder.glob("*.py") if re.search(r"return \"(better|worse)\"", path.read_text())}
    assert holders == {"statistics.py"}


def test_what_one_set_shows_many_sets_need_not() -> None:
    """Each set alone has p of about 0.03; eight of them do not."""
    rng = np.random.default_rng(0)
    pairs = (simulated(rng, gains=0.3) for _ in range(100))
    one, other = next(p for p in pairs if 0.02 < compare([p[0]], [p[1]]).sets[0].p_holm < 0.04)
    assert compare([one], [other]).sets[0].verdict == "better"
    names = [f"set {n}" for n in range(8)]
    same = [dataclasses.replace(other, name=name) for name in names[1:]]
    found = compare(
        [dataclasses.replace(one, name=names[0]), *same], [dataclasses.replace(other, name=names[0]), *same]
    )
    assert found.sets[0].p_holm > 0.15
    assert {each.verdict for each in found.sets} == {NOTHING}
    assert found.macro is not None
    assert found.macro.delta == pytest.approx(found.sets[0].difference.delta / 8)


def test_rows_that_only_one_system_has_are_named() -> None:
    one = scored_set([("b", "x y", "x y", None), ("a", "x y", "x", None), ("c", "x", "x", None)])
    other = scored_set([("a", "x y", "x y", None), ("b", "x y", "x y", None), ("d", "x", "", None)])
    (found,) = compare([one, dataclasses.replace(one, name="mine")], [other]).sets
    assert (found.only_first, found.only_second) == (("c",), ("d",))
    assert (found.difference.utterances, found.difference.rate_first, found.difference.rate_second) == (2, 0.25, 0.0)
    assert compare([one, dataclasses.replace(one, name="mine")], [other]).only_first == ("mine",)


def test_what_cannot_be_compared_is_refused() -> None:
    one = scored_set([("a", "x y", "x y", None)])
    with pytest.raises(UsageError, match="scored with plain and with whisper"):
        compare([one], [dataclasses.replace(one, normalizer="whisper")])
    with pytest.raises(UsageError, match="1 references differ, first that of 'a'"):
        compare([one], [scored_set([("a", "x z", "x y", None)])])
    with pytest.raises(UsageError, match="no utterance in common"):
        compare([one], [scored_set([("b", "x y", "x y", None)])])


# ---- MAPSSWE ----


def segments(reference: str, first: str, second: str, merge: bool = False) -> list[float]:
    ours, theirs = scored_set([("a", reference, first, None)]), scored_set([("a", reference, second, None)])
    found = mapsswe(ours.rows, theirs.rows, merge_compounds=merge)
    return [found.segments, found.mean * found.segments]


def test_segments_end_where_both_got_two_words_right() -> None:
    assert segments("a b c d e f g h", "x b c d e f g y", "a b c d e f g h") == [2, 2]
    assert segments("a b c d e", "x b c d e", "a b y d e") == [1 + 0, 0] or segments("a b c", "x b c", "a b y") == [
        1,
        0,
    ]
    assert segments("a b c d", "x b c y", "a b c d") == [2, 2]  # two right between
    assert segments("a b c", "x b y", "a b c") == [1, 2]  # one right between
    assert segments("a b c d", "a b z c d", "a b c d") == [1, 1]  # a word between two pairs
    assert segments("a b c d", "a z b c y d", "a b c d") == [2, 2]
    assert segments("a b", "a b", "a b") == [0, 0]


@pytest.mark.skipif(not SC_STATS.exists(), reason="Debian's sctk is not installed")
@pytest.mark.parametrize("gain", [0.0, 0.35])
def test_segments_and_decision_are_those_of_nist(shared: Path, tmp_path: Path, gain: float) -> None:
    rng = np.random.default_rng(7)
    lines = (shared / "speech" / "an4" / "manifest.jsonl").read_text().splitlines()
    texts = [(r["audio"], r["text"].lower(), r["speaker"]) for r in map(json.loads, lines)]
    vocabulary = sorted({word for _, text, _ in texts for word in text.split()})
    sides = [
        [(of, text, spoil(text, vocabulary, rng, 0.2 * (1 - g)), who) for of, text, who in texts] for g in (gain, 0.0)
    ]
    ours = mapsswe(*(scored_set(side).rows for side in sides), merge_compounds=False)
    counted, z = nist(sides, tmp_path)
    assert ours.segments == pytest.approx(counted, rel=0.01)
    assert ours.z is not None
    assert ours.z == pytest.approx(z, abs=0.1)
    assert (abs(ours.z) > 1.96) == (abs(z) > 1.96) == (gain > 0)


def spoil(text: str, vocabulary: Sequence[str], rng: np.random.Generator, rate: float) -> str:
    words: list[str] = []
    for word in text.split():
        draw = rng.random() / rate
        other = str(rng.choice(vocabulary))
        words += {0: [other], 1: [], 2: [word, other]}.get(int(3 * draw), [word])
    return " ".join(words)


def nist(sides: Sequence[Texts], folder: Path) -> tuple[int, float]:
    """Segments and z of NIST's program."""

    def trn(name: str, pairs: list[tuple[str, str]]) -> None:
        (folder / name).write_text("".join(f"{text} ({of})\n" for of, text in pairs))

    ids = [f"{who}-{n:04}" for n, (_, _, _, who) in enumerate(sides[0])]
    trn("ref", [(of, text) for of, (_, text, _, _) in zip(ids, sides[0], strict=True)])
    sgml = b""
    for name, side in zip(("one", "two"), sides, strict=True):
        trn(name, [(of, heard) for of, (_, _, heard, _) in zip(ids, side, strict=True)])
        command = [str(SCLITE), "-r", "ref", "trn", "-h", name, "trn", name, "-i", "spu_id", "-o", "sgml", "stdout"]
        sgml += subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
    told = subprocess.run(
        [str(SC_STATS), "-p", "-t", "mapsswe", "-v", "-n", "report"],
        cwd=folder,
        input=sgml,
        check=True,
        capture_output=True,
    )
    text = told.stdout.decode() + "".join(path.read_text() for path in folder.glob("report*"))
    found = re.search(r"systems: one two\) \(# segs: (\d+)\).*\(Z Stat: (\S+)\)", text)
    assert found is not None, text
    return int(found[1]), float(found[2])
