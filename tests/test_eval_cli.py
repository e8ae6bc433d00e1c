"""`ark-asr eval`, as it is typed: real clips to manifests, and manifests to tables, comparisons and reports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from serving import serve
from test_cli import assert_refused
from test_report import Parsed

CLIPS = Path(__file__).parents[1] / "examples" / "audio"
SPOKEN = {"an4-rubout.flac": "RUBOUT G M E F THREE NINE", "an4-patterson.flac": "P A T T E R S O N"}
NO_SET = "not a leaderboard set"
CLEAN_LIBRISPEECH = "MODEL_org-big_DATASET_hf-audio-open-asr-leaderboard_librispeech_test.clean.jsonl"
FAST = ("--warmup", "0")
PROGRAM = str(Path(sys.executable).with_name("ark-asr"))
Rows = list[dict[str, Any]]


def manifests(folder: Path) -> list[Rows]:
    paths = sorted(folder.glob("*.jsonl"))
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]


def rows_of(folder: Path) -> Rows:
    (rows,) = manifests(folder)
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def untimed(folder: Path) -> list[Rows]:
    """Every row without what may differ between runs: its time, and where its audio is from there."""
    found = manifests(folder)
    return [[{**row, "time": row["time"] > 0, "x": {**row["x"], "audio": ""}} for row in rows] for rows in found]


def told(outcome: tuple[int, list[str], list[str]], *, code: int = 0) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the tables on standard output, where nothing but tables and their notes is, and standard error."""
    found, out, err = outcome
    assert found == code, err
    assert all(line.startswith("ark-asr: ") for line in err)
    cells = [[cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in out if line[:1] == "|"]
    head, rows = [""], list[dict[str, str]]()
    for line, after in pairwise([*cells, [""]]):
        if after[0] == "---":
            head = line
        elif line[0] != "---":
            rows.append(dict(zip(head, line, strict=True)))
    others = [line for line in out if line and line[0] != "|"]
    assert sum(line.startswith("**") for line in others) >= len(others) / 2
    assert not any(line.startswith("ark-asr") for line in others)
    return rows, err


def word_error_rate(rows: Rows) -> float:
    """The textbook's: edit distance over words in capitals, in per cent."""
    errors = words = 0
    for row in rows:
        wanted, heard = row["text"].upper().split(), row["pred_text"].upper().split()
        line = list(range(len(heard) + 1))
        for number, word in enumerate(wanted, 1):
            before, line = line, [number]
            for place, other in enumerate(heard, 1):
                line.append(min(line[-1] + 1, before[place] + 1, before[place - 1] + (word != other)))
        errors, words = errors + line[-1], words + len(wanted)
    return 100 * errors / words


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A test set of the two clips in examples/."""
    rows = [{"audio": str(CLIPS / name), "text": text} for name, text in SPOKEN.items()]
    return write(tmp_path / "shipped.jsonl", rows)


@pytest.fixture(scope="module")
def an4(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve utterances of each of ten speakers of AN4's test part."""
    folder = shared / "speech" / "an4"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows = sorted((row for row in rows if row["split"] == "test"), key=lambda row: str(row["speaker"]))
    few = [row for _, own in groupby(rows, lambda row: row["speaker"]) for row in list(own)[:12]]
    kept = [{"id": row["audio"], **row, "audio": str(folder / row["audio"])} for row in few]
    return write(tmp_path_factory.mktemp("an4") / "an4.jsonl", kept)


@pytest.fixture(scope="module")
def heard(an4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the installed program made of it; do not change it."""
    folder = tmp_path_factory.mktemp("heard") / "tiny"
    command: list[str | Path] = [PROGRAM, "eval", "run", an4, "-o", folder, "--name", "an4", *FAST]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ((row,), err) = told((0, done.stdout.splitlines(), done.stderr.splitlines()))
    assert (row["Set"], row["Failed"], len(err)) == ("an4/test", "0", 1)
    return folder


@pytest.fixture(scope="module")
def worse(heard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's manifest, of whose rows every third is nonsense."""
    rows = [row if n % 3 else {**row, "pred_text": "QUITE ANOTHER THING"} for n, row in enumerate(rows_of(heard))]
    return write(tmp_path_factory.mktemp("worse") / "MODEL_worse_DATASET_an4__test.jsonl", rows)


# ---- run and score ----


def test_the_shipped_clips_are_heard(run: Run, shipped: Path, tmp_path: Path) -> None:
    (row,), _ = told(run("eval", "run", shipped, "-o", tmp_path / "out", *FAST))
    assert (row["System"], row["Set"], row["Rows"], row["Words"]) == ("tiny", "shipped/test", "2", "4")
    assert (row["WER or CER %"], row["Failed"]) == ("0.00", "0")
    assert row["Scored as"] == f"{NO_SET}, normalizer oal-d1e99b2"
    assert {row["audio_filepath"]: row["pred_text"] for row in rows_of(tmp_path / "out")} == SPOKEN
    assert told(run("eval", "run", shipped, "-o", tmp_path / "out", *FAST))[0] == [row]  # time, too: not heard again


def test_scores_are_the_textbooks(run: Run, heard: Path, worse: Path) -> None:
    rows, err = told(run("eval", "score", heard, worse, "--normalizer", "plain"))
    assert err == []
    assert [row["System"] for row in rows] == ["tiny", "worse"]
    assert all(row["Scored as"] == f"{NO_SET}, normalizer plain" for row in rows)
    for row, folder in zip(rows, (heard, worse.parent), strict=True):
        assert float(row["WER or CER %"]) == pytest.approx(word_error_rate(rows_of(folder)), abs=0.006)
        assert float(row["95 % from"]) < float(row["WER or CER %"]) < float(row["to"])
    others = [told(run("eval", "score", heard, *more))[0] for more in ((), ("--normalizer", "whisper"))]
    assert [row["Scored as"].rpartition(" ")[2] for (row,) in others] == ["oal-d1e99b2", "whisper"]


def test_a_manifest_of_the_leaderboard_is_its_whole_set_or_none(run: Run, tmp_path: Path) -> None:
    line = {"audio_filepath": "", "duration": 2.0, "time": 0.5, "text": "ONE TWO", "pred_text": "one two"}
    rows = [{**line, "audio_filepath": f"sample_{n}"} for n in range(2_620)]
    path = write(tmp_path / CLEAN_LIBRISPEECH, rows[:-1])
    assert_refused(run("eval", "score", path), CLEAN_LIBRISPEECH, "2619 rows", "2620", "regime E")
    (row,), _ = told(run("eval", "score", path, "--regime", "none"))
    assert (row["Rows"], row["Scored as"]) == ("2,619", f"{NO_SET}, normalizer oal-d1e99b2")
    write(path, rows)
    for regime, normalizer in (("E", "oal-d1e99b2"), ("A", "whisper")):
        (row,), _ = told(run("eval", "score", path, "--regime", regime))
        assert (row["System"], row["Set"], row["RTFx"]) == ("org/big", "librispeech_clean", "4.00")
        assert row["Scored as"] == f"OAL-{regime}, normalizer {normalizer}"
    assert "missing: ami" in "".join(run("eval", "score", path)[1]).replace("\\", "")
    assert_refused(run("eval", "score", path, "--regime", "Z"), "'Z'", "multilingual")
    assert_refused(run("eval", "score", path, "--normalizer", "kind"), "'kind'", "whisper")
    assert_refused(run("eval", "run", path, "-o", tmp_path / "out"), CLEAN_LIBRISPEECH, "without audio")


def test_silence_has_no_words(run: Run, tmp_path: Path) -> None:
    """Of the made clips those of up to 3 s, and silence of 10 s."""
    asked = ("eval", "run", "nonspeech", "--keep-empty", "-o", tmp_path / "out", "--name=quiet", *FAST)
    code, out, err = run(*asked, "--limit=151")
    assert (code, out, "no score" in err[-1]) == (0, [], True)
    rows = rows_of(tmp_path / "out")
    silent = [row for row in rows if row["x"]["kind"] == "silence"]
    assert [row["duration"] for row in silent] == [0.1] * 3 + [0.3] * 3 + [1.0] * 3 + [3.0] * 3 + [10.0] * 3
    assert all((row["text"], row["pred_text"]) == ("", "") for row in silent)
    (row,), err = told(run("eval", "score", tmp_path / "out"))
    assert (row["Set"], row["Rows"], row["Words"]) == ("quiet/made", "151", "0")
    assert row["Scored as"].startswith(f"{NO_SET}, normalizer ")
    assert any("first 151 rows" in line for line in err)


def test_empty_references(run: Run, shipped: Path, tmp_path: Path) -> None:
    """They are left out as the leaderboard does, by name; or kept, and every word on them is an error."""
    rows = [json.loads(line) for line in shipped.read_text().splitlines()]
    write(shipped, [rows[0], {**rows[1], "text": ""}])
    (row,), err = told(run("eval", "run", shipped, "-o", tmp_path / "out", *FAST))
    assert (row["Rows"], row["WER or CER %"]) == ("1", "0.00")
    assert "1 left out: empty reference" in err[0]
    (row,), _ = told(run("eval", "run", shipped, "-o", tmp_path / "kept", "--keep-empty", *FAST))
    assert (row["Rows"], row["Words"]) == ("2", "3")
    assert row["WER or CER %"] == "33.33"  # one word where none was


def test_files_that_cannot_be_heard_are_all_wrong(run: Run, shipped: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in shipped.read_text().splitlines()]
    (tmp_path / "junk.flac").write_bytes(b"fLaC" + bytes(100))
    bad = [{"audio": str(tmp_path / name), "text": "YES NO"} for name in ("junk.flac", "missing.flac")]
    write(shipped, [rows[0], *bad, rows[1]])
    (row,), err = told(run("eval", "run", shipped, "-o", tmp_path / "out", "--normalizer", "plain", *FAST), code=1)
    words = sum(len(text.split()) for text in SPOKEN.values())
    assert (row["Rows"], row["Words"], row["Failed"], row["RTFx"]) == ("4", str(words + 4), "2", "–")  # noqa: RUF001
    assert float(row["WER or CER %"]) == pytest.approx(100 * 4 / (words + 4), abs=0.006)
    for name in ("junk.flac", "missing.flac"):
        assert sum("counted as all wrong" in line and f"{tmp_path / name}: " in line for line in err) == 1
    assert any("no RTFx" in line for line in err)
    said = [row["pred_text"] for row in rows_of(tmp_path / "out")]
    assert said == [SPOKEN["an4-rubout.flac"], "", "", SPOKEN["an4-patterson.flac"]]


GOOD: dict[str, Any] = {"audio": "b.flac", "text": "YES"}


@pytest.mark.parametrize(
    ("second", "options", "said"),
    [
        *[({**GOOD, "audio": "a.flac"}, "", "more than one row"), ({**GOOD, "text": 3}, "", ":2: text is 3")],
        *[({"audio": "b.flac"}, "", ":2: no reference"), ({"text": "YES"}, "", ":2: no audio")],
        *[(GOOD, "--rows 3", "2 rows, the set has 3"), (GOOD, "--model nope", "nope: no such model")],
        *[
            (GOOD, "--base-url http://[::1]/v1 --transformers", "--base-url and --transformers"),
            (GOOD, "--base-url ftp://127.0.0.1", "http"),
            (GOOD, "--base-url http://[::1]/v1 --dtype int8", "--dtype: does nothing"),
            (GOOD, "--transformers --no-vad", "--no-vad: does nothing"),
        ],
        *[(GOOD, "--limit 0", "limit is 0"), (GOOD, "--batch-size 0", "batch_size is 0")],
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, second: dict[str, Any], options: str, said: str) -> None:
    for name in "ab":
        shutil.copyfile(CLIPS / "an4-rubout.flac", tmp_path / f"{name}.flac")
    place = write(tmp_path / "set.jsonl", [{"audio": "a.flac", "text": "NO"}, second])
    assert_refused(run("eval", "run", place, "-o", tmp_path / "out", *FAST, *options.split()), said)
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_results_that_do_not_belong_together(run: Run, heard: Path, shipped: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(heard, tmp_path / "mixed"))
    write(mixed / "MODEL_org-other_DATASET_an4__test.jsonl", rows_of(heard))
    assert_refused(run("eval", "score", mixed), str(mixed), "org/other, tiny", "one folder")
    (tmp_path / "empty").mkdir()
    assert_refused(run("eval", "score", tmp_path / "empty"), "no manifests")
    assert_refused(run("eval", "run", shipped, shipped, "--name", "a", "-o", tmp_path / "out"), "--name and --rows")
    assert_refused(run("eval", "run", shipped, "-o", shipped, *FAST), str(shipped), "cannot be written")


@pytest.mark.parametrize(
    "content",
    [
        *["{", "[]", "3", "", "{}", '{"model": 3}', '{"model": "tiny", "sets": []}', "[" * 100_000],
        *['{"model": "tiny", "sets": {"a": 3}}', '{"model": "tiny", "sets": {"a": {"system": [1]}}}'],
    ],
)
def test_a_damaged_record_is_one_line(run: Run, heard: Path, an4: Path, tmp_path: Path, content: str) -> None:
    """Regression: whatever was JSON, but no record, ended in a traceback."""
    damaged = Path(shutil.copytree(heard, tmp_path / "damaged"))
    (damaged / "run.json").write_text(content)
    assert_refused(run("eval", "score", damaged), str(damaged / "run.json"))
    assert_refused(run("eval", "run", an4, "-o", damaged, "--name", "an4", *FAST), str(damaged / "run.json"))


def test_a_killed_run_goes_on(run: Run, an4: Path, heard: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / next(heard.glob("*.jsonl")).name
    asked = ["eval", "run", str(an4), "-o", str(out), "--name", "an4", *FAST]
    with subprocess.Popen([PROGRAM, *asked], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (path.is_file() and path.stat().st_size):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    os.truncate(path, path.stat().st_size - 10)  # as if it had been killed within a line, which is rare
    begun = path.read_bytes().count(b"\n")
    assert 0 < begun < len(rows_of(heard))
    assert any("not heard to its end" in line for line in told(run("eval", "score", out))[1])
    told(run(*asked))
    (entry,) = json.loads((out / "run.json").read_text())["sets"].values()
    assert [session["from_row"] for session in entry["sessions"]] == [0, begun // 16 * 16]
    assert untimed(out) == untimed(heard)
    assert told(run("eval", "score", out))[1] == []


def test_an_endpoint_says_what_the_model_says(run: Run, an4: Path, heard: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(an4.read_text().splitlines(keepends=True)[:24]))
    with serve(tmp_path / "state") as server:
        (row,), _ = told(run("eval", "run", few, "-o", tmp_path / "out", "--base-url", f"{server.url}/v1", *FAST))
    assert (row["Rows"], row["Failed"]) == ("24", "0")
    said = [[row["pred_text"] for row in rows_of(folder)[:24]] for folder in (tmp_path / "out", heard)]
    assert said[0] == said[1]
    assert len(set(said[0])) > 10


# ---- robust ----

HARD = ("clean", "babble 10 dB", "white -5 dB", "white 20 dB")
CONDITIONS = [f"--condition={name}" for name in HARD]


def test_conditions_are_the_same_in_every_run(run: Run, an4: Path, heard: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(an4.read_text().splitlines(keepends=True)[:24]))
    outcome = run("eval", "robust", few, "-o", tmp_path / "a", *CONDITIONS)
    assert f"({NO_SET}, normalizer oal-d1e99b2)" in outcome[1][0]
    rows, err = told(outcome)
    found = {row["Condition"]: row for row in rows}
    assert ({*found}, len(err)) == ({*HARD}, 4)
    wer = {name: float(row["WER or CER %"]) for name, row in found.items()}
    assert wer["white -5 dB"] > max(wer["white 20 dB"], wer["clean"]) + 20
    assert found["clean"]["Added"] == "–"  # noqa: RUF001
    added = {key: float(found["white -5 dB"][key]) for key in ("Added", "95 % from", "to")}
    assert added["Added"] == pytest.approx(wer["white -5 dB"] - wer["clean"], abs=0.011)
    assert 0 < added["95 % from"] < added["Added"] < added["to"]
    told(run("eval", "robust", few, "-o", tmp_path / "b", *CONDITIONS[::-1]))
    first = untimed(tmp_path / "a")
    assert first == untimed(tmp_path / "b")
    assert {manifest[0]["x"]["condition"] for manifest in first} == {*HARD}
    assert all({row["x"]["of"] for row in manifest} == {"few/test"} for manifest in first)
    clean = next(manifest for manifest in first if manifest[0]["x"]["condition"] == "clean")
    assert [row["pred_text"] for row in clean] == [row["pred_text"] for row in rows_of(heard)[:24]]


def test_conditions_that_cannot_be(run: Run, shipped: Path, tmp_path: Path) -> None:
    """Regression: a set of one row had nobody to babble, which was scored as 100 % errors of the system."""
    asked = ("eval", "robust", shipped, "-o", tmp_path / "out")
    assert_refused(run(*asked, "--condition", "wite 5 dB"), "'wite 5 dB'", "'white 5 dB'")
    assert_refused(run(*asked, "--suite", "worst"), "'worst'", "standard")
    _, err = told(run(*asked, "--suite", "recorded"))
    assert sum("skipped" in line and "no recordings of noise" in line for line in err) == 5
    write(shipped, [json.loads(shipped.read_text().splitlines()[0])])
    assert_refused(run(*asked[:-1], tmp_path / "one", "--condition", "babble 5 dB"), "one row")


def test_a_bad_file_is_no_babble(run: Run, shipped: Path, tmp_path: Path) -> None:
    """Regression: a row whose neighbour could not be read was not heard, either."""
    rows = [json.loads(line) for line in shipped.read_text().splitlines()]
    write(shipped, [*rows, *({"audio": f"missing-{n}.flac", "text": "YES"} for n in range(4))])
    _, err = told(run("eval", "robust", shipped, "-o", tmp_path / "out", *CONDITIONS[:2]), code=1)
    for manifest in manifests(tmp_path / "out"):
        assert ["error" in row["x"] for row in manifest] == [False] * 2 + [True] * 4
    assert sum("counted as all wrong" in line for line in err) == 8


# ---- compare and report ----


def test_only_a_worse_manifest_is_worse(run: Run, heard: Path, worse: Path) -> None:
    outcome = run("eval", "compare", heard, heard)
    (row,), _ = told(outcome)
    assert (row["Set"], row["Difference"], row["tiny is"]) == ("an4/test", "0.00", "no difference shown")
    assert "normalizer oal-d1e99b2" in outcome[1][0]
    (row,), err = told(run("eval", "compare", heard, worse, "--normalizer", "plain"))
    assert (row["Set"], row["tiny is"], err) == ("an4/test", "better", [])
    rates = [word_error_rate(rows_of(folder)) for folder in (heard, worse.parent)]
    assert [float(row["tiny %"]), float(row["worse %"])] == pytest.approx(rates, abs=0.006)
    assert float(row["Difference"]) == pytest.approx(rates[0] - rates[1], abs=0.011)
    assert float(row["95 % from"]) < float(row["Difference"]) < float(row["to"]) < 0
    assert float(row["p (Holm)"]) < 0.05
    (row,), _ = told(run("eval", "compare", worse, heard))
    assert row["worse is"] == "worse"


def test_only_the_same_rows_are_compared(run: Run, heard: Path, tmp_path: Path) -> None:
    """Regression: rows of one system alone were left out without a word, and sets in common were not missed."""
    rows = rows_of(heard)
    other = tmp_path / "MODEL_other_DATASET_an4__test.jsonl"
    write(other, [{**rows[0], "text": "NOT AT ALL"}, *rows[1:]])
    assert_refused(run("eval", "compare", heard, other), "an4/test: 1 references differ", str(rows[0]["x"]["id"]))
    write(other, rows[:-7])
    told(run("eval", "compare", heard, other))
    assert "7 rows that only tiny has are left out" in "".join(run("eval", "compare", heard, other)[1])
    write(other, [{**row, "x": {**row["x"], "set": "another"}} for row in rows])
    assert_refused(run("eval", "compare", heard, other), "no set", "only tiny has an4/test", "only other has another")
    write(other, [*rows, rows[3]])
    assert_refused(run("eval", "compare", heard, other), "more than once", str(rows[3]["x"]["id"]))


def reported(run: Run, *asked: Path | str, output: Path) -> tuple[Parsed, str, dict[str, Any]]:
    code, out, err = run("eval", "report", *asked, "-o", output)
    assert (code, out, len(err)) == (0, [], 1), err
    html, everything, text = (path.read_text(encoding="utf-8") for path in sorted(output.iterdir()))
    page = Parsed(html)
    urls = [value or "" for _, has in page.elements for name, value in has.items() if name in {"src", "href", "action"}]
    assert all(url.startswith(("#", "data:")) for url in urls), urls
    assert NO_SET in page.text
    assert "oal-d1e99b2" in page.text
    return page, text.replace("\\", ""), json.loads(everything)


def test_a_report_of_one_system(run: Run, an4: Path, heard: Path, tmp_path: Path) -> None:
    (row,), _ = told(run("eval", "score", heard))
    told(run("eval", "run", an4, "-o", tmp_path / "three", "--name=an4", "--batch-size=3", *FAST))
    asked = (heard, "--title=Of tiny", f"--speed={tmp_path / 'three'}")
    page, text, everything = reported(run, *asked, output=tmp_path / "report")
    assert all("Of tiny" in shown and "Speed against batch size" in shown for shown in (page.text, text))
    assert row["WER or CER %"] in page.text
    speed = next(section for section in everything["sections"] if section["title"] == "Speed")
    assert [line[2] for line in speed["tables"][0]["rows"]] == [16, 3]
    assert len(everything["utterances"]["rows"]) == int(row["Rows"])


def test_a_report_of_two_systems(run: Run, heard: Path, worse: Path, tmp_path: Path) -> None:
    page, text, everything = reported(run, heard, worse, output=tmp_path / "report")
    assert everything["utterances"]["systems"] == ["tiny", "worse"]
    assert all("tiny against worse" in shown and "better" in shown for shown in (page.text, text))
    comparison = next(section for section in everything["sections"] if section["title"] == "Comparison")
    assert [line[-1] for line in comparison["tables"][0]["rows"]] == ["better"]
    assert_refused(run("eval", "report", heard, worse, heard, "-o", tmp_path / "three"), "3 systems")
    assert_refused(run("eval", "report", heard, "-o", worse), str(worse), "cannot be written")
