"""Manifests, scores, averages, regimes: the leaderboard's format and arithmetic, and what is refused or named."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from arkasr.errors import UsageError
from arkasr.evaluate.manifest import Manifest, Row, file_name, line, merge_chunks, model_of, read
from arkasr.evaluate.references import references
from arkasr.evaluate.score import SetScore, averages, score
from arkasr.evaluate.selfreport import eval_results_yaml
from arkasr.metrics import Counts, normalize, regimes
from arkasr.metrics.normalize import Normalizer
from arkasr.metrics.regimes import REGIMES, EvalSet, set_of

CASES = Path(__file__).with_name("eval") / "normalizer_cases.json"
PLAIN = Normalizer("lower", "word", True, str.lower, str.split)
HERE = Path("predictions.jsonl")
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Any:
    path = CASES if CASES.is_file() else request.getfixturevalue("shared") / "eval" / "normalizer_cases.json"
    return json.loads(path.read_text())


def row(text: str, pred_text: str, **changes: Any) -> Row:
    """A row of its own name."""
    return replace(Row(f"clip{next(NUMBERS)}", 2.0, 0.5, text, pred_text), **changes)


def scored(*rows: Row, name: str = "mine", regime: str | None = "none", normalizer: Normalizer = PLAIN) -> SetScore:
    return score(Manifest(HERE, rows), normalizer, name=name, regime=regime)


def written(folder: Path, *lines: str | bytes, name: str = "predictions.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(part.encode() if isinstance(part, str) else part for part in lines))
    return path


# ---- manifests ----

GOOD = '{"audio_filepath": "a", "duration": 1.5, "time": 0.1, "text": "Ä b", "pred_text": "c"}'


def test_lines_are_the_leaderboards() -> None:
    assert json.loads(line(Row("a", 1.5, None, "Ä", ""))) == {
        "audio_filepath": "a", "duration": 1.5, "time": None, "text": "Ä", "pred_text": "",
    }  # fmt: skip
    assert "Ä" in line(Row("a", 1.5, None, "Ä", ""))
    full = Row("a", 1.5, 0.1, "x", "y", "s", 0, {"id": "1"})
    assert list(json.loads(line(full))) == [
        "audio_filepath", "duration", "time", "text", "pred_text", "parent_id", "chunk_index", "x",
    ]  # fmt: skip


SECONDS = st.none() | st.floats(0, 1e6)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
ROWS = st.builds(
    Row, UNICODE, SECONDS, SECONDS, UNICODE, UNICODE, st.none() | UNICODE, st.none() | st.integers(0, 9),
    st.dictionaries(st.sampled_from(["speaker", "id", "snr"]), UNICODE),
)  # fmt: skip


@given(rows=st.lists(ROWS))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    """Line breaks of other scripts stand inside a text, and do not end a line."""
    path = written(tmp_path_factory.mktemp("manifest"), *map(line, rows))
    assert read(path) == Manifest(path, tuple(rows))


def test_reading_is_lenient(tmp_path: Path) -> None:
    other = '{"pred_text": null, "text": "t", "audio_filepath": "b", "language": "xx", "reference_lists": [["t"]]}\r'
    path = written(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), "", "  \r", other, "")
    assert read(path).rows == (Row("a", 1.5, 0.1, "Ä b", "c"), Row("b", None, None, "t", ""))
    assert read(path).problems == ()
    empty = written(tmp_path)
    assert read(empty) == Manifest(empty, ())


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "not JSON"),
        (b"\xff", "not JSON in UTF-8"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        (GOOD.replace("pred_text", "prediction"), "no column 'pred_text'"),
        (GOOD.replace('"text"', '"reference"'), "no column 'text'"),
        (GOOD.replace("audio_filepath", "file"), "no column 'audio_filepath'"),
        (GOOD.replace('"c"', "3"), "'pred_text' is no text"),
        (GOOD.replace('"Ä b"', "null"), "'text' is no text"),
        (GOOD.replace("1.5", '"1.5"'), "'duration' is no number of seconds"),
        (GOOD.replace("1.5", "NaN"), "'duration' is no number of seconds"),
        (GOOD.replace("1.5", "-1"), "'duration' is no number of seconds"),
        (GOOD.replace("1.5", "1" + "0" * 400), "'duration' is no number of seconds"),
        (GOOD.replace("0.1", "true"), "'time' is no number of seconds"),
        (GOOD.replace("}", ', "chunk_index": 1.5}'), "'chunk_index' is no whole number"),
        (GOOD.replace("}", ', "chunk_index": true}'), "'chunk_index' is no whole number"),
        (GOOD.replace("}", ', "parent_id": 3}'), "'parent_id' is no text"),
        (GOOD.replace("}", ', "x": 3}'), "'x' is no object"),
        (GOOD.replace("}", ', "x": {"padded_duration": "2"}}'), "'padded_duration' is no number"),
        (GOOD.replace("}", ', "x": {"id": []}}'), "'id' is no text"),
        (GOOD.replace("}", ', "x": {"flags": "loop"}}'), "'flags' is no list"),
    ],
)
def test_malformed_lines_are_named_and_counted(tmp_path: Path, bad: str | bytes, why: str) -> None:
    once = read(written(tmp_path, GOOD, "", bad))
    assert len(once.rows) == 1
    (problem,) = once.problems
    assert why in problem
    assert problem.startswith("1 malformed line left out")
    assert problem.endswith(": 3")
    often = read(written(tmp_path, *[bad] * 7, GOOD))
    (problem,) = often.problems
    assert problem.startswith("7 malformed lines left out")
    assert problem.endswith(": 1, 2, 3, 4, 5, ...")
    assert scored_problem(often) == problem


@pytest.mark.parametrize("half", ["\\ud800", "\\uDFFF", "\\udc00\\ud800"])
def test_half_a_character_is_replaced_and_named(tmp_path: Path, half: str) -> None:
    """Left out, such a row made the set incomplete; kept as it is, it broke kaldialign and the report's file."""
    whole, escaped = GOOD.replace("c", "\\ud83d\\ude00"), GOOD.replace("c", r"\\ud800")
    bad = GOOD.replace("c", f"c {half} d").replace("}", f', "x": {{"speaker": ["{half}"], "{half}": 1}}}}')
    found = read(written(tmp_path, whole, bad, escaped, "{"))
    assert [row.pred_text for row in found.rows] == ["😀", f"c {'�' * (len(half) // 6)} d", r"\ud800"]
    assert found.repairs == ("1 line with half a character, read as �: 2",)
    assert len(found.problems) == 1
    for kept in found.rows:
        line(kept).encode()
    apart = replace(found, rows=found.rows[1:2], problems=())
    for name, regime in (("mine", "none"), ("ami_cleaned", "E")):  # of so many rows as it had
        assert score(apart, PLAIN, name=name, regime=regime).notes[0] == found.repairs[0]
    often = read(written(tmp_path, *[bad] * 6))
    assert often.repairs == ("6 lines with half a character, read as �: 1, 2, 3, 4, 5, ...",)


def test_tokens_with_half_a_character_are_counted() -> None:
    """kaldialign raises a bare TypeError for them."""
    result = scored(row("a \ud800 b", "a \udc00 b c"))
    assert result.counts == Counts(1, 0, 1, 3)


def scored_problem(manifest: Manifest) -> str:
    (note,) = score(manifest, PLAIN, name="mine", regime="none").notes
    return note


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.jsonl: cannot be read"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError, match="no rows to score; 1 malformed line left out"):
        score(read(written(tmp_path, "{")), PLAIN, name="mine", regime="none")


# ---- names ----


def test_names_of_files() -> None:
    assert (
        file_name("nvidia/parakeet-tdt-0.6b-v3", "hf-audio/open-asr-leaderboard", "librispeech", "test.clean")
        == "MODEL_nvidia-parakeet-tdt-0.6b-v3_DATASET_hf-audio-open-asr-leaderboard_librispeech_test.clean.jsonl"
    )
    assert file_name("o/m", "VoiceArena/Monsoon_en_IN_test", "", "test").endswith("-Monsoon_en_IN_test__test.jsonl")


@pytest.mark.parametrize(
    ("model", "read_as"),
    [
        ("openai/whisper-large-v3", "openai/whisper-large-v3"),
        ("AutoArk-AI/ARK-ASR-3B", "AutoArk-AI/ARK-ASR-3B"),
        ("AutoArk/AI-ARK-ASR-3B", "AutoArk-AI/ARK-ASR-3B"),  # as the leaderboard spells it
        ("distil-whisper/distil-large-v3.5", "distil-whisper/distil-large-v3.5"),
        ("own-team/model", "own/team-model"),  # cannot be known
        ("tiny", "tiny"),
    ],
)
def test_whose_predictions_they_are(tmp_path: Path, model: str, read_as: str) -> None:
    path = tmp_path / file_name(model, "d", "", "test")
    assert model_of(path) == read_as
    (tmp_path / "run.json").write_text(json.dumps({"model": model}))
    assert model_of(path) == model
    (tmp_path / "run.json").write_text(json.dumps({"model": "another/one"}))
    assert model_of(path) == read_as
    assert model_of(tmp_path / "predictions.jsonl") == "another/one"
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(UsageError, match=r"run\.json: tells no model"):
        model_of(path)


def test_a_file_of_any_name_is_its_own_model(tmp_path: Path) -> None:
    assert model_of(tmp_path / "mine.jsonl") == "mine"


# ---- sessions ----


def rows_of(records: list[dict[str, Any]], folder: Path) -> list[Row]:
    return list(read(written(folder, *map(json.dumps, records))).rows)


def test_recorded_sessions(cases: Any, tmp_path: Path) -> None:
    merged, warnings = merge_chunks(rows_of(cases["chunk_merge"]["rows"], tmp_path))
    assert [json.loads(line(row)) for row in merged] == cases["chunk_merge"]["merged"]
    assert warnings == []


def chunk(parent: str, index: int | None, said: str, **changes: Any) -> Row:
    return row("all of it", said, parent_id=parent, chunk_index=index, **changes)


def test_what_is_odd_in_sessions_is_named() -> None:
    plain = row("a", "b")
    assert merge_chunks([plain]) == ([plain], [])
    last = replace(chunk("s", None, "end"), text="other")
    odd = [chunk("s", 2, "two"), chunk("s", 0, "zero"), last, plain]
    merged, warnings = merge_chunks(odd)
    assert [(r.audio_filepath, r.pred_text, r.text) for r in merged] == [
        (plain.audio_filepath, "b", "a"),
        ("s", "zero two end", "all of it"),
    ]
    assert warnings == [
        "1 of 4 rows have no parent_id, though others are chunks of sessions",
        "session 's': 1 chunks without a chunk_index are taken to be its last",
        "session 's': its chunks are not 0 to 1, but 0, 2",
        "session 's': its chunks have different texts, and the first one's is taken",
    ]
    assert set(warnings) <= set(scored(*odd).notes)


def test_what_chunks_tell_of_a_session() -> None:
    one = chunk("s", 0, "a", x={"id": "s-0", "speaker": "k", "padded_duration": 2.0, "flags": ["loop"], "snr": 1})
    two = chunk("s", 1, "", x={"id": "s-1", "speaker": "k", "padded_duration": 3.0, "error": "too long", "snr": 2})
    ((session,), _) = merge_chunks([two, one])
    assert session.x == {
        "id": "s", "speaker": "k", "padded_duration": 5.0, "flags": ["loop"], "error": "1 of 2 chunks failed: too long",
    }  # fmt: skip
    ((session,), _) = merge_chunks([one, replace(two, x={"id": "s-1"})])
    assert "padded_duration" not in session.x


# ---- scores ----


def test_recorded_pipeline(cases: Any) -> None:
    normalizer = normalize.normalizer("oal-d1e99b2")
    rows = [row(case["ref"], case["hyp"]) for case in cases["pipeline"]]
    result = scored(*rows, normalizer=normalizer)
    assert len(cases["pipeline"]) == 6
    for case, one in zip(cases["pipeline"], result.rows, strict=True):
        assert one.reference == tuple(case["norm_ref"].split())
        assert one.hypothesis == tuple(case["norm_hyp"].split())
        assert one.counts == Counts(case["ins"], case["del"], case["sub"], case["ref_len"])
    total = cases["pipeline_total"]
    assert result.counts == Counts(total["ins"], total["del"], total["sub"], total["ref_len"]) == Counts(3, 1, 2, 22)
    assert result.counts.rate == total["err_rate"]
    assert (result.wer, result.empty_references, result.words_on_empty) == (27.27, 2, 3)


def test_errors_are_summed_before_they_are_divided() -> None:
    result = scored(row("a b c d", "a b c d"), row("e", "x y"), row("", "um"), row("f", ""))
    assert result.counts == Counts(2, 1, 1, 6)
    assert result.wer == 66.67
    assert (result.empty_references, result.words_on_empty, result.failed) == (1, 1, 0)
    assert result.regime == "none"
    assert result.normalizer == "lower"


def test_corners() -> None:
    assert scored(row("", "a b")).wer == math.inf
    silent = scored(row("", ""))
    assert (silent.wer, silent.empty_references, silent.words_on_empty) == (0.0, 1, 0)
    assert scored(row("a b", "")).counts == Counts(0, 2, 0, 2)
    failed = scored(row("a b", "", x={"error": "out of memory"}), row("a", "a"))
    assert (failed.failed, failed.counts.errors) == (1, 2)
    assert scored(row("a", "a", x={"error": None})).failed == 0


def test_the_normalizer_decides_on_compounds_and_pairs() -> None:
    pair = row("White paper", "whitepaper")
    assert scored(pair).counts == Counts(0, 0, 0, 2)
    assert scored(pair, normalizer=replace(PLAIN, merge_compounds=False)).counts == Counts(0, 1, 1, 2)
    pairwise = replace(PLAIN, merge_compounds=False, pairwise=True)
    result = scored(pair, normalizer=pairwise)
    assert result.counts == Counts(0, 0, 0, 1)
    assert result.rows[0].reference == result.rows[0].hypothesis == ("whitepaper",)
    assert scored(row("ab", "ac"), normalizer=replace(PLAIN, tokens=list)).counts == Counts(0, 0, 1, 2)


def test_speed_is_all_audio_over_all_time() -> None:
    clip = row("a", "a", duration=1.0, time=0.5, x={"padded_duration": 2.0})
    long = row("a", "a", duration=30.0, time=1.0, x={"padded_duration": 30.0})
    result = scored(clip, long)
    assert result.rtfx == 31 / 1.5 != (2 + 30) / 2
    assert result.rtfx_padded == 32 / 1.5
    assert result.notes == ()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"duration": None}, "no RTFx: 1 of 3 rows have no duration"),
        ({"duration": 0.0}, "no RTFx: 1 of 3 rows have no duration"),
        ({"time": None}, "no RTFx: 1 of 3 rows have no time"),
        ({"time": 0.0}, "no RTFx: 1 of 3 rows have no time"),
    ],
)
def test_one_row_without_a_time_disables_speed(change: dict[str, Any], note: str) -> None:
    result = scored(row("a", "a"), row("b", "b", **change), row("c", "c"))
    assert (result.rtfx, result.rtfx_padded) == (None, None)
    assert result.notes == (note,)


def test_padding_that_only_some_rows_tell() -> None:
    result = scored(row("a", "a", x={"padded_duration": 2.0}), row("b", "b"))
    assert result.rtfx == 4.0
    assert result.rtfx_padded is None
    assert result.notes == ("no padded RTFx: 1 of 2 rows have no duration",)


# ---- what is refused ----


def test_rows_that_stand_twice() -> None:
    one = row("a", "a")
    with pytest.raises(UsageError, match=r"predictions\.jsonl: 1 rows stand more than once, first 'clip"):
        scored(one, row("b", "b"), one)
    assert len(scored(one, replace(one, text="another")).rows) == 2  # only the names of the files are the same
    with pytest.raises(UsageError, match="first 'u1'"):
        scored(row("a", "a", x={"id": "u1"}), row("b", "b", x={"id": "u1"}))
    assert len(scored(replace(one, x={"id": "u1"}), replace(one, x={"id": "u2"})).rows) == 2
    with pytest.raises(UsageError, match="first 's chunk 0'"):
        scored(chunk("s", 0, "a"), chunk("s", 0, "b"))
    assert len(scored(one, replace(one, duration=3.0)).rows) == 2
    assert len(scored(chunk("s", None, "a"), chunk("s", None, "b")).rows) == 1  # no place in it to stand at twice
    assert len(scored(row("a", "a", chunk_index=0), row("a", "a", chunk_index=0)).rows) == 2


def test_unknown_regimes_and_sets() -> None:
    with pytest.raises(UsageError, match="'F': no regime; there are A, A', B, C, D, E, multilingual, none"):
        scored(row("a", "a"), regime="F")
    with pytest.raises(UsageError, match=r"'mine': no set of regime E; it has ami_cleaned, .*; others need .* 'none'"):
        scored(row("a", "a"), regime="E")
    with pytest.raises(TypeError):
        score(Manifest(HERE, (row("a", "a"),)), PLAIN, name="mine")  # type: ignore[call-arg]


def rows_for(known: EvalSet, num_rows: int, text: str = "a b c", said: str = "a b c") -> tuple[Row, ...]:
    return tuple(
        row(text, said, parent_id=f"s{i % (known.sessions or 1)}", chunk_index=i // (known.sessions or 1))
        if known.sessions
        else row(text, said)
        for i in range(num_rows)
    )


def test_a_wrong_number_of_rows() -> None:
    voxpopuli = REGIMES["E"].find("voxpopuli_cleaned_aa")
    assert len(scored(*rows_for(voxpopuli, 628), name=voxpopuli.name, regime="E").rows) == 628
    for wrong in (627, 629):
        with pytest.raises(UsageError, match=f"{wrong} rows, the set has 628 .VoxPopuli-Cleaned-AA, regime E.; score "):
            scored(*rows_for(voxpopuli, wrong), name=voxpopuli.name, regime="E")
    short = Manifest(HERE, rows_for(voxpopuli, 627), ("1 malformed line left out (x): 3",))
    with pytest.raises(UsageError, match=r"627 rows, the set has 628.*1 malformed line left out"):
        score(short, PLAIN, name=voxpopuli.name, regime="E")


def test_sessions_are_counted_and_chunks_too() -> None:
    earnings = REGIMES["E"].find("earnings22_cleaned_aa_chunked")
    result = scored(*rows_for(earnings, 341), name=earnings.name, regime="E")
    assert len(result.rows) == 6
    with pytest.raises(UsageError, match="340 rows, the set has 341"):
        scored(*rows_for(earnings, 340), name=earnings.name, regime="E")
    with pytest.raises(UsageError, match="5 sessions, the set has 6"):
        scored(*rows_for(replace(earnings, sessions=5), 341), name=earnings.name, regime="E")


def test_a_set_whose_size_is_not_published() -> None:
    ami = REGIMES["E"].find("ami_cleaned")
    (note,) = scored(row("a", "a"), name=ami.name, regime="E").notes
    assert note == "how many rows AMI-Cleaned has is not published: 1 are taken for all"
    with pytest.raises(UsageError, match="12644 rows, the set has at most 12643"):
        scored(*rows_for(ami, 12_644), name=ami.name, regime="E")
    damaged = Manifest(HERE, (row("a", "a"),), ("1 malformed line left out (x): 3",))
    with pytest.raises(UsageError, match="AMI-Cleaned is not complete: 1 malformed line"):
        score(damaged, PLAIN, name=ami.name, regime="E")


# ---- averages ----

WERS = (10.0, 33.333, 0.005, 2.675, 1.0, 100.0, 7.77, 3.14)


def set_scores(regime: str, wers: tuple[float, ...] = WERS) -> list[SetScore]:
    """Scores of a regime's sets, with those rates in per cent of 100 000 words."""
    template = scored(row("a", "a", duration=1.0, time=0.5, x={"padded_duration": 2.0}))
    return [
        replace(template, name=known.name, regime=regime, counts=Counts(0, round(wer * 1_000), 0, 100_000))
        for known, wer in zip(REGIMES[regime].sets, wers, strict=False)
    ]


def test_the_average_is_of_rounded_values() -> None:
    """8 values of two decimals each; 2.675 is a little less as a float, and rounds down as Python rounds."""
    scores = set_scores("E")
    assert [one.wer for one in scores] == [10.0, 33.33, 0.01, 2.67, 1.0, 100.0, 7.77, 3.14]
    result = averages(scores, "E")
    assert result.unrounded == pytest.approx(157.92 / 8, abs=1e-12)
    assert result.wer == 19.74
    assert result.label == "OAL-E/lower public-8"
    assert (result.missing, result.extra, result.reason) == ((), (), "")
    assert (result.rtfx, result.rtfx_padded) == (2.0, 4.0)
    assert averages(scores[::-1], "E") == result


def test_long_sets_dominate_the_speed() -> None:
    scores = set_scores("B")
    long = scored(*(row("a", "a", duration=30.0, time=1.0) for _ in range(100)))
    scores[0] = replace(scores[0], rows=long.rows, rtfx=30.0)
    result = averages(scores, "B")
    assert result.rtfx == (3_000 + 6) / (100 + 3)
    first, *others = set_scores("B")
    for lacking, speeds in ((replace(first, rtfx=None), (None, 4.0)), (replace(first, rtfx_padded=None), (2.0, None))):
        result = averages([lacking, *others], "B")
        assert (result.rtfx, result.rtfx_padded) == speeds


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda scores: scores[1:], "missing: ami_cleaned"),
        (lambda scores: [replace(scores[0], name="ami"), *scores[1:]], "missing: ami_cleaned"),
        (lambda scores: [*scores, scores[0]], "ami_cleaned is given 2 times"),
        (lambda scores: [replace(scores[0], regime="C"), *scores[1:]], "ami_cleaned was scored under regime C"),
        (lambda scores: [replace(scores[0], regime="none"), *scores[1:]], "ami_cleaned was scored under regime none"),
        (lambda scores: [replace(scores[0], normalizer="x"), *scores[1:]], "scored by several normalizers: lower, x"),
        (lambda scores: [replace(scores[0], counts=Counts(1, 0, 0, 0)), *scores[1:]], "ami_cleaned has no reference"),
    ],
)
def test_no_average_over_other_sets(change: Any, reason: str) -> None:
    result = averages(change(set_scores("E")), "E")
    assert (result.wer, result.unrounded, result.rtfx, result.rtfx_padded) == (None, None, None, None)
    assert reason in result.reason


def test_other_sets_stay_out_of_the_average() -> None:
    scores = set_scores("E")
    stray = replace(scores[0], name="ami", counts=Counts(9, 0, 0, 9))
    result = averages([stray, *scores, stray], "E")
    assert result.extra == ("ami", "ami")
    assert result.wer == averages(scores, "E").wer
    nothing = averages([scored(row("a", "a"))], "none")
    assert (nothing.wer, nothing.reason) == (None, "sets outside the leaderboard have no average")
    assert nothing.label == "not a leaderboard set"
    with pytest.raises(UsageError, match="no regime"):
        averages(scores, "F")


# ---- regimes ----


def test_sets_of_the_regimes() -> None:
    assert {regime_id: len(regime.sets) for regime_id, regime in REGIMES.items()} == {
        "A": 8, "A'": 8, "B": 7, "C": 7, "D": 7, "E": 8, "multilingual": 13, "none": 0,
    }  # fmt: skip
    assert sum(known.rows or 0 for known in REGIMES["B"].sets) == 81_030
    assert sum(known.rows or 0 for known in REGIMES["multilingual"].sets) == 58_498
    for regime in REGIMES.values():
        names = [known.name for known in regime.sets + regime.extra]
        assert len(set(names)) == len(names)
        assert regime.normalizer is None or regime.normalizer in normalize.NAMES
        assert regime.id == regimes.regime(regime.id).id
    assert {known.name for known in REGIMES["E"].sets} - {known.name for known in REGIMES["D"].sets} == {
        "monsoon_en_in"
    }


def test_manifests_tell_their_set_by_name() -> None:
    for regime in REGIMES.values():
        for known in regime.sets + regime.extra:
            for dataset in (known.dataset, *known.before):
                assert set_of(file_name("o/m", dataset, known.config, known.split), regime) == known
    assert set_of(file_name("o/m", "distil-whisper/earnings22", "chunked", "test"), REGIMES["B"]) is None
    assert set_of(file_name("o/m", "hf-audio/asr-leaderboard-longform", "earnings22", "test"), REGIMES["B"]) is None


def test_published_rows() -> None:
    """Each average is that of its values, where a row has all of them; A's with TED-LIUM."""
    assert [row.model for row in references("B")][:1] == ["asr_consilium"]
    assert references("B")[1].values["gigaspeech"] == 6.98
    assert len(references("A")) == 17
    assert references("E")[0].average == 3.81
    assert references("A'") == references("nothing") == ()
    for regime in REGIMES.values():
        names = {known.name for known in regime.sets}
        for published in references(regime.id):
            assert set(published.values) <= names
            if set(published.values) == names:
                mean = sum(published.values.values()) / len(names)
                assert published.average == pytest.approx(mean, abs=0.0101), published.model
    paper = {row.model: row for row in references("ark-paper")}
    assert paper["ARK-ASR-0.6B"].values["aishell1"] == 1.95


# ---- self-report ----


def test_self_report() -> None:
    scores = set_scores("B")
    average = averages(scores, "B")
    text = eval_results_yaml(scores, average, date="2026-09-01", source="https://example.org/runs?a=1#b")
    entries = yaml.safe_load(text)
    assert {entry["dataset"]["id"] for entry in entries} == {"hf-audio/open-asr-leaderboard"}
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries} == {
        "mean_wer": average.wer, "rtfx": 2.0, "ami_wer": 10.0, "earnings22_wer": 33.33, "gigaspeech_wer": 0.01,
        "librispeech_clean_wer": 2.67, "librispeech_other_wer": 1.0, "spgispeech_wer": 100.0, "voxpopuli_wer": 7.77,
    }  # fmt: skip
    source = {"url": "https://example.org/runs?a=1#b", "name": "OAL-B/lower public-7"}
    assert all(entry["source"] == source and entry["date"] == "2026-09-01" for entry in entries)


def test_only_what_has_a_name_there_is_reported() -> None:
    """Monsoon has none; and values are rounded as the leaderboard rounds, the date written as it writes it."""
    scores = set_scores("E")
    long = scored(row("a", "a", duration=1.0, time=3.0))
    scores[0] = replace(scores[0], rows=long.rows, rtfx=1 / 3)
    average = averages(scores, "E")
    entries = yaml.safe_load(eval_results_yaml(scores, average, date="20260901", source="https://x"))
    values = {entry["dataset"]["task_id"]: entry["value"] for entry in entries}
    assert sorted(values) == [
        "ami_wer", "earnings22_wer", "gigaspeech_wer", "librispeech_clean_wer", "librispeech_other_wer", "mean_wer",
        "rtfx", "spgispeech_wer", "voxpopuli_wer",
    ]  # fmt: skip
    assert (values["mean_wer"], values["rtfx"]) == (average.wer, 1.23) != (average.unrounded, average.rtfx)
    assert {entry["date"] for entry in entries} == {"2026-09-01"}
    untimed = replace(average, rtfx=None)
    assert "rtfx" not in eval_results_yaml(scores, untimed, date="20260901", source="https://x")


def test_no_self_report_without_an_average() -> None:
    scores = set_scores("B")
    with pytest.raises(UsageError, match="no self-report: missing: ami; score every set of regime B"):
        eval_results_yaml(scores[1:], averages(scores[1:], "B"), date="2026-09-01", source="https://x")
    for date, source in (("yesterday", "https://x"), ("2026-09-01", "here"), ("2026-09-01", "https://x\n- y")):
        with pytest.raises(UsageError, match=r"no date|no address"):
            eval_results_yaml(scores, averages(scores, "B"), date=date, source=source)
