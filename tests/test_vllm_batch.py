"""Batches for `vllm run-batch`: each file has its line, each line its text or its error, and vLLM takes them."""

import base64
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arkasr import hub, jobs
from arkasr.errors import ArkASRError, UsageError
from arkasr.jobs import Input
from arkasr.transcribe import load_model
from conftest import Run
from vllm_serving import ENVIRONMENT

ROOT = Path(__file__).parents[1]
CLIPS = sorted((ROOT / "examples" / "audio").glob("*.flac"))


def written(lines: Iterator[str | ArkASRError]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines if isinstance(line, str)]


def said(name: str, text: str) -> dict[str, Any]:
    """A line as run-batch writes it."""
    body = {"text": text, "usage": {"type": "duration", "seconds": 3}}
    response = {"status_code": 200, "request_id": "vllm-batch-0", "body": body}
    return {"id": "vllm-0", "custom_id": name, "response": response, "error": None}


def failed(name: str, error: object) -> dict[str, Any]:
    response = {"status_code": 400, "request_id": "vllm-batch-0", "body": None}
    return {"id": "vllm-0", "custom_id": name, "response": response, "error": error}


def save(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def batch_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return save(folder / "batch", written(jobs.write_batch(Input(str(folder / name), Path(name)) for name in names)))


# ---- what is written ----


def test_a_file_is_in_its_line() -> None:
    inputs = jobs.find([*map(str, CLIPS), str(CLIPS[0])])  # the first is named twice
    lines = written(jobs.write_batch(inputs))
    assert [line["custom_id"] for line in lines] == [str(clip) for clip in CLIPS]
    for line, clip in zip(lines, CLIPS, strict=True):
        assert (line["method"], line["url"]) == ("POST", "/v1/audio/transcriptions")
        head, content = line["body"]["file_url"].split(",")
        assert head.startswith("data:")
        assert head.endswith(";base64")
        assert base64.b64decode(content, validate=True) == clip.read_bytes()


def test_an_address_stands_for_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "é#?.wav").write_bytes(b"x")
    (line,) = written(jobs.write_batch(jobs.find(["a b"], recursive=True), url="https://files.example/x/"))
    assert line["body"] == {"file_url": "https://files.example/x/a%20b/%C3%A9%23%3F.wav"}
    assert line["custom_id"] == "a b/é#?.wav"


def test_what_cannot_be_in_a_batch_is_named(tmp_path: Path) -> None:
    strange = os.fsencode(tmp_path) + b"/\xff.wav"
    Path(os.fsdecode(strange)).write_bytes(b"x")
    names = [str(tmp_path / "absent.wav"), "-", os.fsdecode(strange), str(tmp_path), str(CLIPS[0])]
    lines = list(jobs.write_batch(Input(name, Path("x")) for name in names))
    assert isinstance(lines.pop(), str)
    assert all(isinstance(line, ArkASRError) for line in lines)
    for line, word in zip(lines, ("No such file", "standard input", "not UTF-8", "Is a directory"), strict=True):
        assert word in str(line)
    for url in (None, "https://files.example"):
        (missing,) = jobs.write_batch([Input(names[0], Path("x"))], url=url)
        assert isinstance(missing, ArkASRError)


# ---- what is read ----


@pytest.mark.parametrize("seed", range(20))
def test_each_line_of_the_batch_has_one_answer(seed: int, tmp_path: Path) -> None:
    """In the batch's order, in whatever order the results are; what failed or is not there is named."""
    chance = random.Random(seed)
    fates = {f"{n} é\n.wav": chance.choice(["said", "failed", "lost"]) for n in range(chance.randint(0, 20))}
    records = [said(name, f"text of {n}") for n, name in enumerate(fates) if fates[name] == "said"]
    records += [failed(name, "no") for name in fates if fates[name] == "failed"]
    chance.shuffle(records)
    with_paths = [{"custom_id": name, "body": {}} for name in fates]
    answers = list(jobs.read_batch(save(tmp_path / "batch", with_paths), [save(tmp_path / "results", records)]))
    assert len(answers) == len(fates)
    for n, ((name, fate), answer) in enumerate(zip(fates.items(), answers, strict=True)):
        if fate == "said":
            assert isinstance(answer, str)
            assert json.loads(answer) == {"audio": name, "text": f"text of {n}"}
        else:
            assert isinstance(answer, ArkASRError)
            assert str(answer).startswith(f"{name}: ")
            assert ("not in the results" in str(answer)) == (fate == "lost")


def test_a_second_run_makes_up_for_the_first(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, "a", "b", "c")
    a, b, c = (str(tmp_path / name) for name in "abc")
    first = save(tmp_path / "first", [said(a, "A"), failed(b, {"error": {"message": "too long", "code": 400}})])
    second = save(tmp_path / "second", [said(c, "C"), said(b, "B")])
    for results in ([first, second], [second, first], [first, second, first]):
        texts = [json.loads(line)["text"] for line in jobs.read_batch(batch, results) if isinstance(line, str)]
        assert texts == ["A", "B", "C"]
    _, error, lost = jobs.read_batch(batch, [first])
    assert "too long" in str(error)
    assert "not in the results" in str(lost)


def test_texts_are_cleaned_as_all_are(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, "a")
    results = save(tmp_path / "results", [said(str(tmp_path / "a"), " , so \n it<|im_end|> goes")])
    (line,) = jobs.read_batch(batch, [results])
    assert isinstance(line, str)
    assert json.loads(line)["text"] == "so it"


@pytest.mark.parametrize(
    "change",
    [
        {"response": None}, {"response": {"status_code": 500, "body": {"text": "x"}}}, {"error": "no"},
        {"response": {"status_code": 200, "body": {"text": None}}}, {"response": {"status_code": 200, "body": None}},
        {"error": {"error": {}}},
    ],
)  # fmt: skip
def test_an_answer_that_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    batch = batch_of(tmp_path, "a")
    results = save(tmp_path / "results", [said(str(tmp_path / "a"), "x") | change])
    (answer,) = jobs.read_batch(batch, [results])
    assert isinstance(answer, ArkASRError)


def test_results_of_something_else(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, "a")
    a = str(tmp_path / "a")
    twice = save(tmp_path / "twice", [{"custom_id": "a"}, {"custom_id": "a"}])
    for records, words in (
        ([said(a, "x"), said(a, "y")], "second, other text"),
        ([said(a, "x"), said("strange", "y")], "'strange' is not in"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            list(jobs.read_batch(batch, [save(tmp_path / "results", records)]))
        assert f"{tmp_path / 'results'}:2: " in str(caught.value)
    with pytest.raises(UsageError, match="has a line already"):
        list(jobs.read_batch(twice, []))
    for content in (b"{", b"[]", b'{"custom_id": 3}', b"null", b"\xff", b"[" * 10**5):
        (tmp_path / "results").write_bytes(content)
        with pytest.raises(UsageError, match="results:1: not a line"):
            list(jobs.read_batch(batch, [tmp_path / "results"]))
    with pytest.raises(UsageError, match="cannot be read"):
        list(jobs.read_batch(batch, [tmp_path / "absent"]))


# ---- the command ----


def test_the_command(tmp_path: Path, run: Run) -> None:
    code, out, err = run("batch", *CLIPS, tmp_path / "absent.wav")
    assert (code, len(out)) == (1, 2)
    assert err == [
        f"ark-asr: {tmp_path / 'absent.wav'}: cannot be read (No such file or directory); check the path",
        "ark-asr: 1 of 3 files failed",
    ]
    batch = save(tmp_path / "batch", [json.loads(line) for line in out])
    results = save(tmp_path / "results", [said(str(CLIPS[1]), "B"), said(str(CLIPS[0]), "A")])
    texts = [{"audio": str(clip), "text": text} for clip, text in zip(CLIPS, "AB", strict=True)]
    assert run("batch", "--read", batch, results) == (0, [json.dumps(text) for text in texts], [])
    parts = [run("batch", "--recursive", CLIPS[0].parent, "--shard", f"{n}/2")[1] for n in (1, 2)]
    assert [json.loads(line)["custom_id"] for part in parts for line in part] == [str(clip) for clip in CLIPS]
    code, _, err = run("batch", "--read", batch, results, "--recursive")
    assert code == 1
    assert "not for --read" in err[0]


# ---- vLLM's own side ----


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its imports'
def test_vllm_takes_each_line(tmp_path: Path) -> None:
    """Its models, strictly its own: a line that it refuses ends a whole run."""
    run_batch = importlib.import_module("vllm.entrypoints.launchers.run_batch")
    (tmp_path / "é \U0001f600\n.wav").write_bytes(b"x")
    for url in (None, "https://files.example"):
        inputs = [*jobs.find([str(tmp_path)], recursive=True), *jobs.find([str(clip) for clip in CLIPS])]
        lines = [line for line in jobs.write_batch(inputs, url=url) if isinstance(line, str)]
        assert len(lines) == 3
        for one, line in zip(inputs, lines, strict=True):
            request = run_batch.BatchRequestInput.model_validate_json(line)
            assert request.custom_id == one.name
            assert type(request.body).__name__ == "BatchTranscriptionRequest"
            assert not request.body.model_extra


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_real_run(tmp_path: Path) -> None:
    """Five clips and two that are none, through vLLM and back."""
    clips = []
    for number in range(5):
        clips.append(tmp_path / f"{number}.flac")
        clips[-1].write_bytes(CLIPS[number % 2].read_bytes())
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    (tmp_path / "large.wav").write_bytes(bytes(26 * 2**20))
    inputs = jobs.find([str(tmp_path)], recursive=True)
    batch = save(tmp_path / "batch.jsonl", written(jobs.write_batch(inputs)))
    command = [
        sys.executable, "-m", "vllm.entrypoints.launchers.run_batch", "-i", batch, "-o", tmp_path / "results.jsonl",
        "--model", hub.find("tiny"), "--enforce-eager", "--max-model-len", "1024",
    ]  # fmt: skip
    alone = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = list(jobs.read_batch(batch, [tmp_path / "results.jsonl"]))
    assert [one.name for one in inputs] == [*map(str, clips), str(tmp_path / "bad.wav"), str(tmp_path / "large.wav")]
    expected = [transcript.text for transcript in load_model("tiny").transcribe(clips)]
    assert [json.loads(line)["text"] for line in answers if isinstance(line, str)] == expected
    bad, large = (str(line) for line in answers if isinstance(line, ArkASRError))
    assert bad.startswith(f"{tmp_path / 'bad.wav'}: vLLM failed (")
    assert "Maximum file size exceeded" in large
