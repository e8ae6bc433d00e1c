"""The Ray example on a local Ray, in the environment of scripts/ray: each recording once, if a worker dies, too."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from arkasr import pins
from arkasr.data import read_manifest
from arkasr.errors import ArkASRError
from arkasr.transcribe import Transcriber, load_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "ray_batch.py"
CLIPS = sorted((ROOT / "examples" / "audio").glob("*.flac"))
WORKER = b"ray::MapWorker(MapBatches(BatchTranscriber))"
# Half a CPU each: a machine of two has one left for what reads and writes.
TWO_WORKERS = ("--workers", "2", "--cpus", "0.5")


@pytest.fixture(scope="module")
def tiny() -> Transcriber:
    return load_model("tiny")


def start(*arguments: object) -> subprocess.Popen[str]:
    """The example; Ray is told to stay alone, and to say nothing about itself to anybody."""
    alone = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    alone.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)], env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 0, log
    return log


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def descendants(pid: int) -> Iterator[int]:
    """Children, their children and so on: none but what the test started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            yield int(path.parent.name)
            yield from descendants(int(path.parent.name))


def num_lines(folder: Path) -> int:
    """The last line of a file may be half there."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.json"))


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Those that have a model, by their titles."""
    found = []
    for pid in descendants(process.pid):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(WORKER):
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def fill(folder: Path, clips: list[Path], count: int) -> dict[str, Path]:
    """So many recordings under names of their own, and which clip each is."""
    folder.mkdir()
    made = {}
    for number, clip in enumerate(islice(cycle(clips), count)):
        path = folder / f"{number:04}{clip.suffix}"
        shutil.copy(clip, path)
        made[str(path)] = clip
    return made


def assert_complete(found: list[dict[str, Any]], made: dict[str, Path], tiny: Transcriber) -> None:
    """Each recording once, with what the transcriber says to it here."""
    assert Counter(row["path"] for row in found) == Counter(dict.fromkeys(made, 1))
    clips = sorted(set(made.values()))
    expected = {clip: (said.text, said.confidence) for clip, said in zip(clips, tiny.transcribe(clips), strict=True)}
    for row in found:
        text, confidence = expected[made[row["path"]]]
        assert (row["text"], row["error"]) == (text, "")
        assert row["confidence"] == pytest.approx(confidence, abs=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL and /proc")
@pytest.mark.parametrize("count", [60, 1000])
def test_a_worker_is_killed_in_the_middle(
    count: int, tmp_path: Path, tiny: Transcriber, request: pytest.FixtureRequest
) -> None:
    clips = CLIPS
    if count == 1000:
        speech = request.getfixturevalue("shared") / "speech"
        corpora = (read_manifest(speech / name / "manifest.jsonl", split="test") for name in ("an4", "fsdd"))
        clips = [Path(utterance.audio) for utterances in corpora for utterance in utterances]
        assert len(clips) == 630
    made = fill(tmp_path / "in", clips, count)
    began_s = time.monotonic()
    process = start(tmp_path / "in", tmp_path / "out", "--jsonl", *TWO_WORKERS, "--batch-size", "4")
    try:
        while (written := num_lines(tmp_path / "out")) < count // 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        before = workers(process)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        killed_s = time.monotonic() - began_s
        others: set[int] = set()
        while process.poll() is None:
            others |= set(workers(process)) - set(before)
            time.sleep(0.05)
        finish(process)
    finally:
        process.kill()
        process.wait()
    print(f"{written} of {count} were written when, after {killed_s:.0f} s, a worker of two was killed")
    print(f"{time.monotonic() - began_s:.0f} s in all")
    assert written < count
    assert others  # it was started anew
    assert_complete(rows(tmp_path / "out"), made, tiny)


@pytest.mark.parametrize("is_data_set", [False, True])
def test_parquet(is_data_set: bool, tmp_path: Path, tiny: Transcriber) -> None:
    """Bytes of files in a column, or in structs; a damaged one has an error in its row, its neighbours their texts."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    contents = [*(clip.read_bytes() for clip in CLIPS), b"no audio"]
    (tmp_path / "in").mkdir()
    for number in range(4):
        names = [f"{number}-{n}" for n in range(len(contents))]
        sounds = [{"bytes": content, "path": "x.flac"} for content in contents] if is_data_set else contents
        parquet.write_table(arrow.table({"id": names, "sound": sounds}), tmp_path / "in" / f"{number}.parquet")
    finish(start(tmp_path / "in", tmp_path / "out", "--column", "sound", *TWO_WORKERS))
    found = parquet.read_table(tmp_path / "out").to_pylist()
    assert {tuple(row) for row in found} == {("id", "text", "confidence", "error")}
    texts = [*(one.text for one in tiny.transcribe(CLIPS)), ""]
    [(_, error)] = tiny.outcomes([contents[-1]])
    assert isinstance(error, ArkASRError)
    errors = ["" for _ in CLIPS] + [str(error)]
    assert sorted((row["id"], row["text"], row["error"]) for row in found) == [
        (f"{number}-{n}", *both) for number in range(4) for n, both in enumerate(zip(texts, errors, strict=True))
    ]


def test_a_second_run_adds_nothing(tmp_path: Path) -> None:
    """Regression: Ray's own default is to write more files beside those that are there, and so each row twice."""
    fill(tmp_path / "in", CLIPS, 2)
    finish(start(tmp_path / "in", tmp_path / "out", "--jsonl"))
    before = rows(tmp_path / "out")
    again = start(tmp_path / "in", tmp_path / "out", "--jsonl")
    log, _ = again.communicate(timeout=300)
    assert again.returncode == 1
    assert "exists" in log
    assert rows(tmp_path / "out") == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_the_configuration_of_ray_serve_llm() -> None:
    """Ray's own models take it; nothing is served, for that needs a GPU and vLLM's build for it."""
    text = (ROOT / "deploy" / "ray-serve-llm.yaml").read_text()
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    (application,) = schema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "ray.serve.llm:build_openai_app"
    made = importlib.import_module("ray.llm._internal.serve.core.configs.llm_config").LLMConfig
    (config,) = (made.model_validate(one) for one in application.args["llm_configs"])
    assert config.model_id == "0.6b"
    assert config.model_loading_config.model_source == pins.PINS["0.6b"].repo_id
    assert config.engine_kwargs["trust_remote_code"] is False
