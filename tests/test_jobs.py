"""Many files: which there are, whole outputs whatever stops a job, and no work done twice."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkasr import jobs, results
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions
from arkasr.errors import AudioError, UsageError
from arkasr.jobs import BatchTranscriber, Input, Outputs
from arkasr.results import Segment, SubtitleOptions, Transcript
from arkasr.transcribe import Transcriber, load_model
from conftest import Run
from test_cli import assert_refused, visible

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
FORMATS = ("txt", "srt", "json")
JOURNAL = "arkasr.jobs.jsonl"


# ---- which files ----


def make_tree(folder: Path) -> Path:
    names = ("b.wav", "a.FLAC", "notes.txt", "sub/b.wav", "sub/deep/z.mp3", "sub/cover.jpg", "wav", "é ü/ö.opus")
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_find_in_folders(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "in")
    found = jobs.find([str(folder)], recursive=True)
    assert [str(one.stem) for one in found] == ["a", "b", "sub/b", "sub/deep/z", "é ü/ö"]
    assert [one.name for one in found] == [
        str(folder / name) for name in ("a.FLAC", "b.wav", "sub/b.wav", "sub/deep/z.mp3", "é ü/ö.opus")
    ]


def test_find_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order given, as often as given, there or not; a folder without `recursive` stays a name."""
    monkeypatch.chdir(make_tree(tmp_path))
    names = ["sub/notes.xyz", "-", "b.wav", "b.wav", "sub", "x" * 5000]
    found = jobs.find(names)
    assert [one.name for one in found] == names
    assert [str(one.stem) for one in found[:5]] == ["notes", "stdin", "b", "b", "sub"]
    assert [one.name for one in jobs.distinct(found)] == ["sub/notes.xyz", "-", "b.wav", "sub", "x" * 5000]
    mixed = jobs.find(["b.wav", "sub/deep", "-"], recursive=True)
    assert [(one.name, str(one.stem)) for one in mixed] == [("b.wav", "b"), ("sub/deep/z.mp3", "z"), ("-", "stdin")]
    assert [one.name for one in jobs.find(["."], recursive=True)][:2] == ["a.FLAC", "b.wav"]
    assert jobs.find([]) == []


def test_a_file_that_is_named_and_found_is_done_once(tmp_path: Path) -> None:
    """Regression: a folder and a file in it gave the file twice, and so to two shards."""
    folder = make_tree(tmp_path)
    found = jobs.distinct(jobs.find([str(folder / "b.wav"), str(folder)], recursive=True))
    assert Counter(one.name for one in found).most_common(1)[0][1] == 1
    assert found[0].name == str(folder / "b.wav")


def test_names_that_collide_are_both_named(tmp_path: Path) -> None:
    folder = make_tree(tmp_path)
    (folder / "b.mp3").touch()
    for names in ([str(folder / "b.mp3"), str(folder / "sub" / "b.wav")], [str(folder)]):
        with pytest.raises(UsageError, match="same outputs; rename one") as caught:
            jobs.distinct(jobs.find(names, recursive=True))
        assert str(folder / "b.mp3") in str(caught.value)
        assert "b.wav" in str(caught.value)


@given(st.integers(0, 60), st.integers(1, 70))
def test_every_input_is_in_one_part(num_inputs: int, count: int) -> None:
    inputs = [Input(str(n), Path(str(n))) for n in range(num_inputs)]
    parts = [jobs.shard(inputs, f"{n}/{count}") for n in range(1, count + 1)]
    assert sorted((one for part in parts for one in part), key=inputs.index) == inputs
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(sorted(part, key=inputs.index) == part for part in parts)


@pytest.mark.parametrize(
    "part", ["", "1", "0/1", "2/1", "1/0", "0/0", "-1/2", "1/2/3", "a/b", "1/2 ", "1.5/2", "1" * 50]
)
def test_parts_that_are_none(part: str) -> None:
    with pytest.raises(UsageError, match="i/n") as caught:
        jobs.shard([], part)
    assert repr(part) in str(caught.value)


# ---- outputs and the journal ----


def said(text: str = "hello") -> Transcript:
    return Transcript("a.wav", (Segment(0.0, 1.0, text, flags=("loop", "cut")),), 1.0, {"load": 0.25, "decode": 0.5})


def inputs(*names: str) -> list[Input]:
    return [Input(f"{name}.wav", Path(name)) for name in names]


def opened(folder: Path, formats: Sequence[str] = ("txt",), *, part: str = "1/1", resume: bool = False) -> Outputs:
    return Outputs(folder, formats, SubtitleOptions(), part=part, resume=resume)


def journal(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]


def test_outputs_and_the_line_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with opened(folder, FORMATS) as outputs:
        one, deep, bad = (*inputs("a"), Input("in/sub/b.wav", Path("sub/b")), Input("caf\udcff.wav", Path("caf")))
        outputs.add(one, said())
        assert [line["audio"] for line in journal(folder)] == ["a.wav"]  # at once
        outputs.add(deep, said("good bye"))
        outputs.add(bad, AudioError("caf\udcff.wav: no such file"))
    assert visible(folder) == ["a.json", "a.srt", "a.txt", JOURNAL, "sub"]
    assert visible(folder / "sub") == ["b.json", "b.srt", "b.txt"]
    for name in FORMATS:
        text = io.StringIO()
        results.WRITERS[name](said(), text, SubtitleOptions())
        assert (folder / f"a.{name}").read_text(encoding="utf-8") == text.getvalue()
    first, second, third = journal(folder)
    assert first == {
        "audio": "a.wav", "text": "hello", "duration": 1.0, "seconds": 0.75, "outputs": ["a.txt", "a.srt", "a.json"],
        "flags": ["cut", "loop"],
    }  # fmt: skip
    assert second["outputs"] == ["sub/b.txt", "sub/b.srt", "sub/b.json"]
    assert third == {"audio": "caf\udcff.wav", "error": "caf\udcff.wav: no such file"}


def test_resume_skips_what_is_done(tmp_path: Path) -> None:
    done, failed, lost, never = inputs("done", "failed", "lost", "never")
    with opened(tmp_path) as outputs:
        assert not outputs.is_done(done)
        outputs.add(done, said())
        outputs.add(failed, AudioError("no"))
        outputs.add(lost, said())
    (tmp_path / "lost.txt").unlink()
    (tmp_path / "failed.txt").write_text("of an earlier job")
    with opened(tmp_path, resume=True) as outputs:
        assert [outputs.is_done(one) for one in (done, failed, lost, never)] == [True, False, False, False]
        outputs.add(failed, said("at last"))
    with opened(tmp_path, ("txt", "srt"), resume=True) as outputs:
        assert not outputs.is_done(done)  # has no srt
    with opened(tmp_path, resume=True) as outputs:
        assert outputs.is_done(failed)
    assert [line["audio"] for line in journal(tmp_path)] == ["done.wav", "failed.wav", "lost.wav", "failed.wav"]
    with opened(tmp_path) as outputs:  # anew
        assert not outputs.is_done(done)
    assert journal(tmp_path) == []


def test_a_name_that_is_no_utf8_is_found_again(tmp_path: Path) -> None:
    one = Input("caf\udcff\n\u2028.wav", Path("caf"))
    with opened(tmp_path) as outputs:
        outputs.add(one, said("\u2028 line \x85 separators \\udcff"))
    with opened(tmp_path, resume=True) as outputs:
        assert outputs.is_done(one)


def test_a_journal_cut_anywhere(tmp_path: Path) -> None:
    """What a killed process, or a lost power supply, left of the last line."""
    names = inputs("a", "é", "c")
    with opened(tmp_path / "whole") as outputs:
        for one in names:
            outputs.add(one, said("ü"))
    data = (tmp_path / "whole" / JOURNAL).read_bytes()
    for length in range(len(data) + 1):
        folder = tmp_path / str(length)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / JOURNAL).write_bytes(data[:length])
        whole_lines = data[:length].count(b"\n")
        with opened(folder, resume=True) as outputs:
            assert [outputs.is_done(one) for one in names] == [n < whole_lines for n in range(3)]
            outputs.add(names[2], said())
        assert [line["audio"] for line in journal(folder)] == [one.name for one in [*names[:whole_lines], names[2]]]


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"hello",
        b"[1]\n",
        b"{}\n",
        b"\xff\xfe\n",
        b'{"audio": []}\n',
        b"3\n",
        b'{"audio": "a.wav"}\nx\n',
        b"[" * 9999,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_journal_of_others_is_left_alone(tmp_path: Path, content: bytes) -> None:
    """Regression: a file whose last line has no end was cut before it was read."""
    (tmp_path / JOURNAL).write_bytes(content)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"jobs\.jsonl: not a journal of arkasr; delete it"):
            opened(tmp_path, resume=True)
        assert (tmp_path / JOURNAL).read_bytes() == content


def test_one_process_at_a_job(tmp_path: Path, run: Run) -> None:
    code = (
        "import sys, time; from pathlib import Path; from arkasr.jobs import Outputs, SubtitleOptions\n"
        "with Outputs(Path(sys.argv[1]), ['txt'], SubtitleOptions()): print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        asked = ["transcribe", CLIP, "--model", "tiny", "--output-dir", tmp_path]
        assert_refused(run(*asked), str(tmp_path), "another process is at this job")
        assert_refused(run(*asked, "--resume"), "another process is at this job")
        with opened(tmp_path, part="1/2"), opened(tmp_path, part="2/2"):  # other parts are other jobs
            assert {"arkasr.jobs.1-of-2.jsonl", "arkasr.jobs.2-of-2.jsonl"} < {*visible(tmp_path)}
        process.kill()
    with opened(tmp_path, resume=True), pytest.raises(UsageError, match="another process"):
        opened(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path, run: Run) -> None:
    """Regression: closing the journal failed once more, and that was a traceback."""
    (tmp_path / JOURNAL).symlink_to("/dev/full")
    outcome = run("transcribe", CLIP, "--model", "tiny", "--output-dir", tmp_path)
    assert_refused(outcome, str(tmp_path), "cannot be written (No space left on device); make room")
    assert (tmp_path / "an4-rubout.txt").read_text() == "RUBOUT G M E F THREE NINE\n"


def limit_files_to_nothing() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_disk_that_takes_no_output(tmp_path: Path, run: Run) -> None:
    assert run("transcribe", CLIP, "--model", "tiny")[0] == 0  # exported, if it was not
    done = subprocess.run(
        [*PROGRAM, CLIP, "--output-dir", tmp_path], capture_output=True, preexec_fn=limit_files_to_nothing, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"ark-asr: {tmp_path}")
    assert "cannot be written (File too large)" in line
    assert visible(tmp_path) == [JOURNAL]
    assert journal(tmp_path) == []


def test_folders_that_cannot_be_written(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out" / JOURNAL).mkdir(parents=True)
    asked = ["transcribe", CLIP, "--model", "tiny", "--output-dir"]
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "out", tmp_path / ("x" * 300)):
        assert_refused(run(*asked, folder), str(folder), "cannot be written", "--output-dir")
    if os.geteuid() != 0:
        (tmp_path / "shut").mkdir(mode=0o500)
        assert_refused(run(*asked, tmp_path / "shut"), "cannot be written (Permission denied)")


# ---- a job that is stopped ----

# SIGINT does what it does in a terminal; a shell's background jobs, such as CI may be, and their children ignore it.
CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from arkasr.cli import main
main()
"""
PROGRAM: list[str | Path] = [sys.executable, "-c", CODE, "transcribe", "--model", "tiny"]
AS_ALL = [word for name in FORMATS for word in ("--format", name)]


def make_clips(shared: Path, folder: Path, count: int) -> Path:
    """Letters and numbers that are spelled, in folders of 25."""
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))
    for number, utterance in enumerate(islice(cycle(utterances), count)):
        target = folder / f"{number // 25}" / f"{number:03}.flac"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(utterance.audio, target)
    return folder


def start(clips: Path, out: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = [*PROGRAM, clips, "--recursive", "--output-dir", out, *AS_ALL, *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = process.communicate(timeout=200)
    assert out == b""
    return process.returncode, err.decode()


def written(folder: Path) -> dict[str, bytes]:
    """Contents of all outputs by name, of json without its timings; nothing else may be there but journal and lock."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in {JOURNAL, f".{JOURNAL}.lock"}:
            continue
        assert path.suffix in {f".{suffix}" for suffix in FORMATS}, name
        contents[name] = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(contents[name])
            assert record.pop("timings")
            contents[name] = json.dumps(record).encode()
    return contents


def done_lines(folder: Path) -> list[bytes]:
    path = folder / JOURNAL
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def wait_for_lines(process: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(done_lines(folder)) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def inodes(folder: Path) -> dict[str, int]:
    """Of the outputs of files that the journal names; a file that is written anew gets another."""
    records = [json.loads(line) for line in done_lines(folder)]
    return {name: (folder / name).stat().st_ino for record in records for name in record["outputs"]}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(
    ("count", "kills"), [(40, 4), pytest.param(200, 12, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_job_that_is_killed_again_and_again(shared: Path, tmp_path: Path, count: int, kills: int) -> None:
    clips = make_clips(shared, tmp_path / "clips", count)
    assert finish(start(clips, tmp_path / "calm", "--batch-size", "1")) == (0, "")
    expected = written(tmp_path / "calm")
    assert len(expected) == 3 * count
    assert sum(len(content) > 1 for name, content in expected.items() if name.endswith("txt")) > 0.9 * count
    chance, out = random.Random(count), tmp_path / "out"
    for kill in range(kills):
        before, known = len(done_lines(out)), inodes(out)
        process = start(clips, out, "--resume", "--batch-size", str(chance.choice([1, 2, 7, 16])))
        if kill:  # the first is killed while it starts
            wait_for_lines(process, out, before + chance.randint(1, max(1, (count - before) // 3)))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was at work
        assert known.items() <= inodes(out).items()  # what was done stays as it was
        for line in done_lines(out):
            assert all((out / name).is_file() for name in json.loads(line)["outputs"])
    before = len(done_lines(out))
    assert before > 0
    code, err = finish(start(clips, out, "--resume"))
    assert (code, err) == (0, f"ark-asr: {before} of {count} files are done already\n")
    assert written(out) == expected
    assert Counter(record["audio"] for record in journal(out)) == Counter(
        dict.fromkeys((one.name for one in jobs.find([str(clips)], recursive=True)), 1)
    )
    stamp = inodes(out)
    assert finish(start(clips, out, "--resume")) == (0, f"ark-asr: {count} of {count} files are done already\n")
    assert inodes(out) == stamp


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_an_interrupted_job_keeps_what_is_done(shared: Path, tmp_path: Path) -> None:
    clips, out = make_clips(shared, tmp_path / "clips", 30), tmp_path / "out"
    process = start(clips, out, "--batch-size", "4")
    wait_for_lines(process, out, 3)
    process.send_signal(signal.SIGINT)
    code, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    lines = journal(out)
    assert 3 <= len(lines) < 30
    contents = written(out)
    assert all(name in contents for line in lines for name in line["outputs"])  # type: ignore[attr-defined]
    assert len(contents) <= 3 * len(lines) + 3
    assert finish(start(clips, out, "--resume"))[0] == 0
    assert len(journal(out)) == 30


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_an_interrupt_while_standard_input_is_open() -> None:
    """Regression: the thread that read it was waited for."""
    with subprocess.Popen(
        [*PROGRAM, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=8)
        finally:
            process.kill()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        assert process.returncode == 130


def test_parts_make_the_whole(shared: Path, tmp_path: Path, run: Run) -> None:
    clips = make_clips(shared, tmp_path / "clips", 7)
    asked = ["transcribe", clips, "--recursive", "--model", "tiny", *AS_ALL, "--output-dir"]
    assert run(*asked, tmp_path / "whole") == (0, [], [])
    for part in ("2/3", "3/3", "1/3"):
        assert run(*asked, tmp_path / "parts", "--shard", part) == (0, [], [])
    whole, parts = (
        {path.relative_to(folder) for path in folder.rglob("*.*") if not path.name.startswith((".", "arkasr"))}
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert parts == whole
    for name in whole:
        if name.suffix != ".json":
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [(tmp_path / "parts" / f"arkasr.jobs.{n}-of-3.jsonl").read_text().count("\n") for n in (1, 2, 3)]
    assert lines == [3, 2, 2]


# ---- pools ----


@pytest.fixture(scope="module")
def tiny() -> Transcriber:
    return load_model("tiny")


def column(*values: object) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_columns_in_columns_out(tiny: Transcriber) -> None:
    worker = BatchTranscriber("tiny", column="sound", options=DecodeOptions(seed=3))
    content = CLIP.read_bytes()
    batch = {"sound": column(str(CLIP), "absent.wav", content, bytearray(content)), "id": np.arange(4)}
    out = worker(batch)
    expected = tiny.transcribe(CLIP)
    assert out.keys() == {"sound", "id", "text", "confidence", "error"}
    assert out["text"].tolist() == [expected.text, "", expected.text, expected.text]
    assert out["confidence"].tolist() == [expected.confidence, 0.0, expected.confidence, expected.confidence]
    assert out["error"].tolist() == ["", "absent.wav: no such file; check the path", "", ""]
    assert out["sound"] is batch["sound"]
    assert worker({"sound": np.array([str(CLIP)])})["text"].tolist() == [expected.text]
    both = column({"bytes": content, "path": "absent.wav"}, {"bytes": None, "path": str(CLIP)})  # as data sets have it
    assert worker({"sound": both})["text"].tolist() == [expected.text] * 2


def test_no_rows_have_the_same_columns() -> None:
    """Regression: the text of no rows was a column of floats, which a pool cannot join to the others."""
    worker = BatchTranscriber()
    assert {name: values.dtype.kind for name, values in worker({"audio": column()}).items() if name != "audio"} == {
        "text": "U", "confidence": "f", "error": "U",
    }  # fmt: skip


def test_a_worker_is_pickled_before_and_after_its_first_call() -> None:
    worker = BatchTranscriber("tiny", options=DecodeOptions(max_new_tokens=100))
    batch = {"audio": column(str(CLIP))}
    copy = pickle.loads(pickle.dumps(worker))  # noqa: S301 - our own
    texts = [one(batch)["text"].tolist() for one in (worker, copy)]
    loaded = pickle.dumps(worker)
    assert len(loaded) < 1_000  # without the model
    again = pickle.loads(loaded)  # noqa: S301 - our own
    assert [*texts, again(batch)["text"].tolist()] == [["RUBOUT G M E F THREE NINE"]] * 3


def test_a_worker_runs_the_engine_it_is_told() -> None:
    with pytest.raises(UsageError, match="engine 'strange'"):
        BatchTranscriber("tiny", engine="strange")({"audio": column(str(CLIP))})  # type: ignore[arg-type]
