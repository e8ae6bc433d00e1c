"""Runs: honest times, a manifest that a kill cannot change, and systems that hear the same by any way."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from arkasr import audio, load_model, record
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.endpoint import encode
from arkasr.engines import DecodeOptions
from arkasr.errors import ArkASRError, ModelNotFoundError, UsageError
from arkasr.evaluate import manifest
from arkasr.evaluate.datasets import Dataset, open_dataset
from arkasr.evaluate.endpoint import EndpointSystem, Request
from arkasr.evaluate.hf import TransformersSystem
from arkasr.evaluate.run import RunResult, clean_up, run
from arkasr.evaluate.systems import Heard, OwnSystem
from arkasr.metrics.normalize import normalizer
from serving import serve

PACE_S = 0.01


def noise(num_samples: int, seed: int = 0) -> Waveform:
    return (np.random.default_rng(seed).integers(-3000, 3000, num_samples) / 2**15).astype(np.float32)


class Stub:
    """A system whose text is a function of the clip and of the company it is heard in."""

    name = "org/stub"

    def __init__(self, *, pace_s: float = 0.0, **facts: object) -> None:
        self.pace_s, self.given = pace_s, facts
        self.batches: list[list[Waveform]] = []

    def facts(self) -> dict[str, Any]:
        return {"kind": "stub", "revision": None, **self.given}

    def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
        self.batches.append(list(batch))
        time.sleep(self.pace_s)
        company = sum(len(one) for one in batch)
        return [Heard(f"I've {len(one)} of {company}...", self.pace_s / len(batch), ("odd",), 0.5) for one in batch]


def make_set(folder: Path, num_rows: int = 10, *, broken: Sequence[int] = ()) -> Path:
    """A manifest of short clips of different lengths, some of which are no audio."""
    folder.mkdir(exist_ok=True)
    for number in range(num_rows):
        path = folder / f"{number}.wav"
        soundfile.write(path, noise(1600 + 160 * number, number), SAMPLE_RATE, subtype="PCM_16")
        if number in broken:
            path.write_bytes(b"junk")
    records = [{"audio": f"{n}.wav", "text": f"Row {n}", "speaker": f"s{n % 3}"} for n in range(num_rows)]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(place: Path, **options: Any) -> Dataset:
    return open_dataset(place, **{"normalizer": normalizer("oal-d1e99b2"), "name": "org/set", **options})


def ran(place: Path, folder: Path, system: Stub | None = None, **options: Any) -> RunResult:
    return run(opened(place), system or Stub(), folder, **{"batch_size": 4, "warmup_batches": 0, **options})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [row | {"time": None} for row in rows_of(path)]


def entry(result: RunResult) -> dict[str, Any]:
    found = json.loads(result.record.read_text())["sets"][result.manifest.name]
    assert isinstance(found, dict)
    return found


def refusal(call: Callable[[], object], kind: type[ArkASRError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# ---- the manifest ----


def test_a_manifest_has_a_row_for_every_row(tmp_path: Path) -> None:
    result = ran(make_set(tmp_path / "set"), tmp_path / "out")
    assert result.manifest.name == "MODEL_org-stub_DATASET_org-set__test.jsonl"
    read = manifest.read(result.manifest)
    assert not read.problems
    assert [row.text for row in read.rows] == [f"Row {n}" for n in range(10)]
    assert [row.audio_filepath for row in read.rows] == [f"{n}.wav" for n in range(10)]
    first = read.rows[0]
    assert first.pred_text == f"I've 1600 of {1600 + 1760 + 1920 + 2080}"  # without the dots
    assert first.duration == 0.1
    assert first.x["padded_duration"] == 2.0
    assert (first.x["id"], first.x["speaker"], first.x["flags"], first.x["confidence"]) == ("0.wav", "s0", ["odd"], 0.5)
    assert (result.manifest.parent / first.x["audio"]).is_file()
    assert manifest.model_of(result.manifest) == "org/stub"
    assert (result.rows, result.resumed, result.failed) == (10, 0, ())


def test_a_row_whose_audio_fails_is_there_with_its_error(tmp_path: Path) -> None:
    """It has no time, lest a speed is made of it, and the others are heard as if it were not there."""
    system = Stub()
    result = ran(make_set(tmp_path / "set", 6, broken=[1, 4, 5]), tmp_path / "out", system)
    rows = manifest.read(result.manifest).rows
    assert [bool(row.x.get("error")) for row in rows] == [False, True, False, False, True, True]
    assert all((row.pred_text, row.duration, row.time) == ("", None, None) for row in rows if "error" in row.x)
    assert rows[1].text == "Row 1"
    assert [len(batch) for batch in system.batches] == [3]
    assert len(result.failed) == 3
    assert result.failed[0].startswith("1.wav: ")
    assert entry(result)["failed"] == 3


def test_a_system_that_fails_with_a_clip_does_not_end_the_run(tmp_path: Path) -> None:
    class Failing(Stub):
        def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
            return [Heard("half a", 0.5, error="no") if len(one) == 1760 else Heard("yes", 0.5) for one in batch]

    result = ran(make_set(tmp_path / "set"), tmp_path / "out", Failing())
    rows = manifest.read(result.manifest).rows
    assert [row.pred_text for row in rows] == ["yes", "", *["yes"] * 8]
    assert result.failed == ("1.wav: no",)


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("Goodbye...", "Goodbye"),
        ("Goodbye… I’m off", "Goodbye I'm off"),  # noqa: RUF001
        ("wait....what….", "wait what"),
        ("3.5 percent. Yes.", "3.5 percent. Yes."),
        ("he said ‘hello’", "he said ‘hello'"),  # noqa: RUF001
        ("\ud800 x\n y ", "? x y"),
    ],
)
def test_the_clean_up_is_what_it_says(said: str, written: str) -> None:
    assert clean_up(said) == written


@settings(deadline=None)
@given(st.text())
def test_clean_texts_stay_as_they_are(text: str) -> None:
    once = clean_up(text)
    assert clean_up(once) == once
    assert "…" not in once
    assert ".." not in once


# ---- times ----


def test_times_are_of_hearing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding that takes long is not in them; the warm-up hears the first batches and is not in them either."""
    load = audio.load

    def slow(source: audio.AudioSource) -> Waveform:
        time.sleep(0.05)
        return load(source)

    monkeypatch.setattr(audio, "load", slow)
    system = Stub(pace_s=0.02)
    result = ran(make_set(tmp_path / "set"), tmp_path / "out", system, warmup_batches=2)
    assert [len(batch) for batch in system.batches] == [4, 4, 4, 4, 2]
    assert all(np.array_equal(*pair) for pair in zip(system.batches[0], system.batches[2], strict=True))
    assert [row["time"] for row in rows_of(result.manifest)] == [0.005] * 8 + [0.01] * 2


def test_warm_up_is_bounded_by_the_set(tmp_path: Path) -> None:
    system = Stub()
    result = ran(make_set(tmp_path / "set"), tmp_path / "out", system, warmup_batches=10, limit=6)
    assert [len(batch) for batch in system.batches] == [4, 2, 4, 2]
    assert result.rows == 6


def test_own_times_are_the_batchs_in_equal_parts(tiny_system: OwnSystem) -> None:
    clips = [noise(16000, 1), noise(80000, 2), noise(3200, 3)]
    since = time.perf_counter()
    heard = tiny_system.hear(clips)
    whole = time.perf_counter() - since
    assert len({one.seconds for one in heard}) == 1
    assert 0.5 * whole < sum(one.seconds for one in heard) <= whole


# ---- the record ----


def test_a_record_tells_what_a_number_depends_on(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set")
    lines = place.read_text() + '{"audio": "0.wav", "id": "none", "text": "[noise]"}\n'
    place.write_text(lines)
    result = ran(place, tmp_path / "out", Stub(revision="abc"))
    found = entry(result)
    packages = ("transformers", "kaldialign", "num2words", "wetext", "OpenCC", "regex", "unicode", "arkasr", "python")
    assert all(found["versions"][name] for name in packages)
    assert found["versions"]["kaldialign"] == "0.12.0"
    assert re.fullmatch(r"1\d\.\d\.\d", found["versions"]["unicode"])
    assert found["system"]["revision"] == "abc"
    assert found["hardware"]["cores"] >= 1
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["sessions"][0]["git"])
    assert (found["dataset"]["rows"], found["dataset"]["kept"]) == (11, 10)
    assert found["dataset"]["dropped"] == {"empty after oal-d1e99b2": 1}
    assert found["dataset"]["references_sha256"] == opened(place).survey().references_sha256
    assert found["options"]["clean_up"] == ["without_half_characters", "without_ellipses", "with_plain_apostrophes"]
    assert found["complete"]


def test_code_that_is_in_no_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment inside somebody else's repository must not lend us its commit."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "__init__.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.git_commit() is None
    subprocess.run([*git, "add", "__init__.py"], check=True)
    assert (record.git_commit() or "").endswith("-dirty")


def test_sets_of_a_model_share_a_record_and_models_do_not(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set")
    ran(place, tmp_path / "out")
    other = run(opened(place, name="other"), Stub(), tmp_path / "out", batch_size=2, warmup_batches=0)
    assert len(json.loads(other.record.read_text())["sets"]) == 2
    another = Stub()
    another.name = "org/another"
    assert "org/stub, not org/another" in refusal(lambda: ran(place, tmp_path / "out", another))


# ---- stopping and going on ----

CHILD = f"""
import sys
from pathlib import Path
from test_eval_run import Stub, opened, ran
ran(Path(sys.argv[1]), Path(sys.argv[2]), Stub(pace_s={PACE_S}), batch_size=int(sys.argv[3]))
"""


def killed(place: Path, folder: Path, batch_size: int, at_row: int) -> None:
    """A process of its own, killed once so many rows are written."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, place, folder, str(batch_size)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        files = list(folder.glob("MODEL_*"))
        if files and files[0].read_bytes().count(b"\n") >= at_row:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_goes_on_to_the_same_manifest(tmp_path: Path, seed: int) -> None:
    """Also where a text depends on the company of its batch, as it does with many systems."""
    chance = random.Random(seed)
    batch_size = chance.choice([1, 3, 8])
    place = make_set(tmp_path / "set", 40, broken=[5])
    whole = ran(place, tmp_path / "whole", batch_size=batch_size)
    killed(place, tmp_path / "out", batch_size, chance.randint(1, 30))
    result = ran(place, tmp_path / "out", batch_size=batch_size)
    assert 0 < result.resumed < 40 or batch_size == 8
    assert untimed(result.manifest) == untimed(whole.manifest)
    assert result.failed == whole.failed
    assert len(entry(result)["sessions"]) == 2
    assert entry(result)["sessions"][1]["from_row"] == result.resumed


def test_a_run_goes_on_from_any_byte(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set", 11, broken=[2, 9])
    whole = ran(place, tmp_path / "out")
    content, wanted, failed = whole.manifest.read_bytes(), untimed(whole.manifest), whole.failed
    for end in [*random.Random(0).sample(range(len(content)), 40), 0, len(content) - 1]:
        whole.manifest.write_bytes(content[:end])
        system = Stub()
        result = ran(place, tmp_path / "out", system)
        assert result.resumed % 4 == 0
        assert result.resumed == content[:end].count(b"\n") // 4 * 4
        assert untimed(result.manifest) == wanted, end
        assert result.failed == failed
        assert sum(map(len, system.batches)) == 11 - 2 - sum(n not in (2, 9) for n in range(result.resumed))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set")
    content = ran(place, tmp_path / "out").manifest.read_bytes()
    system = Stub()
    result = ran(place, tmp_path / "out", system, warmup_batches=0)
    assert (result.resumed, system.batches) == (10, [])
    assert result.manifest.read_bytes() == content


def test_what_was_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set")
    first = ran(place, tmp_path / "out", limit=6)
    content = first.manifest.read_bytes()
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: ran(place, tmp_path / "out", Stub(revision="new"), limit=6), "system.revision was None and is 'new'"),
        (lambda: ran(place, tmp_path / "out", batch_size=3, limit=6), "options.batch_size was 4 and is 3"),
        (lambda: ran(place, tmp_path / "out", limit=7), "options.limit was 6 and is 7"),
        (lambda: ran(place, tmp_path / "out", warmup_batches=1, limit=6), "options.warmup_batches"),
    ]
    for change, said in changes:
        assert said in refusal(change)
        assert first.manifest.read_bytes() == content
    place.write_text(place.read_text().replace("Row 9", "Row ninety"))
    assert "references_sha256" in refusal(lambda: ran(place, tmp_path / "out", limit=6))
    first.record.unlink()
    assert "does not say" in refusal(lambda: ran(place, tmp_path / "out", limit=6))
    first.record.write_text("{}")
    assert "not a record" in refusal(lambda: ran(place, tmp_path / "out", limit=6))


def test_rows_that_are_not_the_sets_are_found(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set")
    result = ran(place, tmp_path / "out")
    lines = result.manifest.read_text().splitlines(keepends=True)
    result.manifest.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert "has row '1.wav' where the set has '0.wav'" in refusal(lambda: ran(place, tmp_path / "out"))
    result.manifest.write_text("".join([*lines, lines[0]]))
    assert "11 rows, the set has 10" in refusal(lambda: ran(place, tmp_path / "out"))
    result.manifest.write_text("".join(["{}\n", *lines[1:]]))
    assert "damaged" in refusal(lambda: ran(place, tmp_path / "out"))


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    place, started, go_on = make_set(tmp_path / "set"), threading.Event(), threading.Event()

    class Waiting(Stub):
        def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
            started.set()
            go_on.wait(30)
            return super().hear(batch)

    thread = threading.Thread(target=ran, args=[place, tmp_path / "out", Waiting()])
    thread.start()
    started.wait(30)
    try:
        assert "another process" in refusal(lambda: ran(place, tmp_path / "out"))
    finally:
        go_on.set()
        thread.join()
    assert ran(place, tmp_path / "out").resumed == 10


def test_bad_arguments_and_places(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set")
    for options in ({"batch_size": 0}, {"warmup_batches": -1}, {"limit": 0}):
        assert next(iter(options)) in refusal(lambda options=options: ran(place, tmp_path / "out", **options))  # type: ignore[misc]
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(lambda: ran(place, tmp_path / "file"))
    result = ran(place, tmp_path / "out")
    assert "somebody's results" in refusal(lambda: ran(result.manifest, tmp_path / "out2"))


# ---- an endpoint ----


class _Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the library
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            self.server.bodies.append((self.path, dict(self.headers), body))
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
            status, headers, answer = (
                self.server.answers.pop(0) if self.server.answers else (200, {}, b'{"text": "yes"}')
            )
        time.sleep(self.server.pace_s)
        with self.server.lock:
            self.server.at_once -= 1
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Endpoint)
        self.bodies: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.lock, self.pace_s, self.at_once, self.most = threading.Lock(), 0.0, 0, 0


@contextmanager
def endpoint(
    *answers: tuple[int, dict[str, str], bytes], **options: Any
) -> Iterator[tuple[_Server, EndpointSystem, list[float]]]:
    """A server with these answers in store, a system that asks it, and the seconds it would have waited."""
    server, waits = _Server(), list[float]()
    server.answers = list(answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    system = EndpointSystem(f"http://127.0.0.1:{server.server_port}/v1", "m", sleep=waits.append, **options)
    try:
        yield server, system, waits
    finally:
        system.close()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_samples_of_16_bits_arrive_as_they_were(audio_format: str) -> None:
    """All of them."""
    wanted = np.arange(-(2**15), 2**15).astype(np.int16)
    content = encode(audio.load((wanted, SAMPLE_RATE)), audio_format)
    got, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == SAMPLE_RATE
    assert np.array_equal(got, wanted)


def test_what_is_too_loud_is_clipped_and_not_wrapped() -> None:
    got, _ = soundfile.read(io.BytesIO(encode(np.array([3, -3, 1, -1], np.float32), "wav")), dtype="int16")
    assert got.tolist() == [32767, -32768, 32767, -32768]


def test_a_clip_is_encoded_once_and_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    bad = [(503, {}, b""), (429, {"retry-after": "7"}, b"{}"), (500, {}, b"oops"), (0, {}, b"")]
    with endpoint(*bad, key_variable="SOME_KEY", request=Request(fields=(("language", "en"),))) as (
        server,
        system,
        waits,
    ):
        (heard,) = system.hear([noise(1600)])
    assert (heard.text, heard.error) == ("yes", None)
    assert len(server.bodies) == 5
    audios = {body[body.index(b"fLaC") :].split(b"\r\n--")[0] for _, _, body in server.bodies}
    assert len(audios) == 1
    got, _ = soundfile.read(io.BytesIO(audios.pop()), dtype="float32")
    assert np.array_equal(got, noise(1600))
    path, headers, body = server.bodies[0]
    assert path == "/v1/audio/transcriptions"
    assert headers["authorization"] == "Bearer sk-secret"
    for name, value in (("model", "m"), ("response_format", "json"), ("temperature", "0"), ("language", "en")):
        assert re.search(rb'name="%b"\r\n(?:[^\r]+\r\n)*\r\n%b\r\n' % (name.encode(), value.encode()), body), name
    assert waits[1] == 7
    assert 0.25 <= waits[0] <= 0.5
    assert 1 <= waits[2] <= 2
    assert 2 <= waits[3] <= 4
    assert "secret" not in json.dumps(system.facts())


def test_trying_again_has_an_end() -> None:
    with endpoint(*[(503, {}, b"full")] * 9, request=Request(parallel=1, tries=3)) as (server, system, waits):
        one, other = system.hear([noise(1600), noise(3200)])
    assert (len(server.bodies), len(waits)) == (6, 4)
    assert one.error is not None
    assert "503" in one.error
    assert other.text == ""
    with endpoint((429, {"Retry-After": "86400"}, b"{}")) as (server, system, waits):
        (heard,) = system.hear([noise(1600)])
    assert "wait 86400 s" in (heard.error or "")
    assert (len(server.bodies), waits) == (1, [])


def test_retry_after_may_be_a_date() -> None:
    past = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}
    with endpoint((429, past, b"{}"), (429, {"retry-after": "soon"}, b"{}")) as (_, system, waits):
        system.hear([noise(1600)])
    assert waits[0] == 0
    assert waits[1] > 0


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (200, b"<html>", "not JSON"), (200, b"[]", "no text"), (200, b'{"text": null}', "no text"),
        (200, b'{"text": ["a"]}', "no text"), (200, b"", "not JSON"), (200, b'{"a":' * 9999, "not JSON"),
        (400, b'{"error": {"message": "too short"}}', "too short"), (413, b"big", "413"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_the_rows_error(status: int, answer: bytes, said: str) -> None:
    with endpoint((status, {}, answer), request=Request(parallel=1)) as (_, system, _):
        bad, good = system.hear([noise(1600), noise(1600)])
    assert said in (bad.error or "")
    assert (bad.text, good.text, good.error) == ("", "yes", None)


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_what_no_other_row_would_be_spared_ends_the_run(status: int) -> None:
    answer = (status, {"location": "http://127.0.0.1:9/"}, b'{"error": {"message": "no such model"}}')
    with endpoint(answer) as (server, system, _):
        assert "no such model" in refusal(lambda: system.hear([noise(1600)]))
        assert len(server.bodies) == 1


def test_an_endpoint_that_is_away_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    place = make_set(tmp_path / "set", 6)
    with endpoint(request=Request(tries=2)) as (server, system, _):
        dataset = opened(place)

        def stop(done: int, _num_rows: int) -> None:
            if done == 2:
                server.shutdown()
                server.server_close()
                system._client.close()
                system._client = type(system._client)(base_url=f"http://127.0.0.1:{server.server_port}/v1/")

        message = refusal(lambda: run(dataset, system, tmp_path / "out", batch_size=2, warmup_batches=0, report=stop))
        assert "nobody answers" in message
        facts = system.facts()
    (path,) = (tmp_path / "out").glob("MODEL_*")
    assert len(rows_of(path)) == 2
    again = Stub()
    again.name = "m"
    again.facts = lambda: facts  # type: ignore[method-assign]
    assert run(opened(place), again, tmp_path / "out", batch_size=2, warmup_batches=0).resumed == 2


def test_requests_run_side_by_side_and_answers_keep_their_order() -> None:
    answers: list[tuple[int, dict[str, str], bytes]]
    answers = [(200, {}, json.dumps({"text": str(n)}).encode()) for n in range(12)]
    with endpoint(*answers, request=Request(parallel=3)) as (server, system, _):
        server.pace_s = 0.03
        heard = system.hear([noise(1600 + 160 * n) for n in range(12)])
    assert server.most == 3
    lengths = [len(soundfile.read(io.BytesIO(body[body.index(b"fLaC") :]))[0]) for _, _, body in server.bodies]
    assert [one.text for one in heard] == [str(lengths.index(1600 + 160 * n)) for n in range(12)]
    assert sum(one.seconds for one in heard) >= 0.12


def test_places_that_are_no_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    assert "NO_KEY: not set" in refusal(lambda: EndpointSystem("http://h/v1", "m", key_variable="NO_KEY"))
    for url in ("ftp://h/v1", "h:80", "", "http://", "http://[::1/v1"):
        refusal(lambda url=url: EndpointSystem(url, "m"))  # type: ignore[misc]
    message = refusal(lambda: EndpointSystem("http://user:secret@h/v1", "m"))
    assert "secret" not in message
    assert "parallel is 0" in refusal(lambda: Request(parallel=0))


# ---- ours ----


@pytest.fixture(scope="module")
def tiny_system() -> OwnSystem:
    return OwnSystem.load("tiny", batch_size=4)


def test_ours_hears_as_transcribe_does(shared: Path, tiny_system: OwnSystem) -> None:
    """In batches, with silence among them, and where a recording is several spans that overlap."""
    transcriber = load_model("tiny")
    speech = shared / "speech"
    paths = [*sorted((speech / "an4").glob("*/*.flac"))[:6], speech / "misc" / "jfk.flac"]
    clips = [audio.load(path) for path in paths]
    clips += [np.zeros(8000, np.float32), np.concatenate(clips * 3), np.zeros(100, np.float32)]
    heard = tiny_system.hear(clips)
    for clip, one in zip(clips[:-1], heard, strict=False):
        wanted = transcriber.transcribe((clip, SAMPLE_RATE))
        assert (one.text, one.error) == (wanted.text, None)
        assert one.confidence == pytest.approx(wanted.confidence)
        assert set(one.flags) == {flag for segment in wanted.segments for flag in segment.flags}
    assert heard[-1].error is not None
    assert "no_speech" in heard[-3].flags


def test_words_that_two_spans_heard_are_said_once() -> None:
    """Sound without a pause is cut with an overlap."""
    clip = noise(50 * SAMPLE_RATE)
    (heard,) = OwnSystem.load("tiny", batch_size=1, vad=False).hear([clip])
    assert "joined" in heard.flags
    assert heard.text == load_model("tiny").transcribe((clip, SAMPLE_RATE), vad=False).text


def test_ours_says_what_it_is(make_checkpoint: Callable[..., Path]) -> None:
    tiny = OwnSystem.load("tiny", batch_size=4, vad=False, options=DecodeOptions(seed=3))
    facts = tiny.facts()
    assert (tiny.name, facts["vad"], facts["decoding"]["seed"], facts["batch_size"]) == ("tiny", False, 3, 4)
    assert facts["files"]["model.safetensors"].startswith("fabba2fa")
    system = OwnSystem.load(make_checkpoint("one"), engine="pytorch", batch_size=2)
    assert (system.name, system.facts()["engine"]) == ("one", "PyTorchEngine")
    other = OwnSystem.load(make_checkpoint("two", tied_embeddings=False), engine="pytorch", batch_size=2)
    assert other.facts()["files"]["model.safetensors"] != system.facts()["files"]["model.safetensors"]
    json.dumps(facts)
    assert "batch_size is 0" in refusal(lambda: OwnSystem.load("tiny", batch_size=0))


def test_an_endpoint_of_ours_and_the_model_itself_say_the_same(
    shared: Path, tmp_path: Path, tiny_system: OwnSystem
) -> None:
    place = shared / "speech" / "an4"
    dataset = open_dataset(place, normalizer=normalizer("oal-d1e99b2"), name="an4")
    options: dict[str, Any] = {"batch_size": 8, "warmup_batches": 0, "limit": 20}
    local = run(dataset, tiny_system, tmp_path / "local", **options)
    with serve(tmp_path / "state") as server:
        remote_system = EndpointSystem(f"{server.url}/v1", "tiny")
        remote = run(dataset, remote_system, tmp_path / "remote", **options)
        remote_system.close()
    said = [[row["pred_text"] for row in rows_of(result.manifest)] for result in (local, remote)]
    assert said[0] == said[1]
    assert len(set(said[0])) > 10
    assert not remote.failed


# ---- transformers ----


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of two layers with a tokenizer of bytes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel

    folder = tmp_path_factory.mktemp("whisper")
    vocab = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.decoder = ByteLevel()
    tokenizer = transformers.WhisperTokenizerFast(tokenizer_object=raw, pad_token="<|endoftext|>")  # noqa: S106
    size = len(tokenizer)
    config = transformers.WhisperConfig(
        vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=80,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_start_token_id=0, eos_token_id=1,
        pad_token_id=1, bos_token_id=0, suppress_tokens=None, begin_suppress_tokens=None, max_target_positions=32,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)
    network.save_pretrained(folder)
    features = transformers.WhisperFeatureExtractor(feature_size=80)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(folder)
    return folder


def test_a_whisper_of_transformers_is_heard(whisper: Path, tmp_path: Path) -> None:
    """Against the model called by hand; nothing depends on the batch."""
    import torch
    import transformers

    system = TransformersSystem(whisper, max_new_tokens=12)
    clips = [noise(16000 * n, n) for n in (1, 2, 3)]
    together = system.hear(clips)
    network = transformers.WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    processor = transformers.WhisperProcessor.from_pretrained(whisper)
    for clip, one in zip(clips, together, strict=True):
        features = processor(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            ids = network.generate(features, max_new_tokens=12, do_sample=False, num_beams=1)
        assert one.text == processor.batch_decode(ids, skip_special_tokens=True)[0]
    facts = system.facts()
    assert (facts["type"], facts["dtype"], facts["revision"]) == ("whisper", "float32", None)
    assert facts["parameters"] > 10_000
    result = run(opened(make_set(tmp_path / "set", 3)), system, tmp_path / "out", batch_size=2, warmup_batches=1)
    assert result.rows == 3


def test_a_ctc_model_of_transformers_is_heard(tmp_path: Path) -> None:
    import torch
    import transformers

    (tmp_path / "vocab.json").write_text(json.dumps({c: n for n, c in enumerate(["<pad>", "<unk>", "|", *"abcdefgh"])}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    features = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    config = transformers.Wav2Vec2Config(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2, pad_token_id=0,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2Processor(features, tokenizer).save_pretrained(tmp_path)
    assert "is not told any" in refusal(lambda: TransformersSystem(tmp_path, language="en"))
    system = TransformersSystem(tmp_path)
    clips = [noise(16000, 1), noise(24000, 2)]
    alone = [system.hear([clip])[0].text for clip in clips]
    assert [one.text for one in system.hear(clips)] == alone
    assert set("".join(alone)) & set("abcdefgh")


def test_a_qwen3_asr_of_transformers_is_heard(tmp_path: Path) -> None:
    """Its processor writes the prompt, of which nothing comes back; clips of other lengths change nothing."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel

    raw = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.decoder, raw.pre_tokenizer = ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    audio_tokens = {f"audio_{name}token": f"<|audio_{name or 'pad'}|>" for name in ("", "bos_", "eos_")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left",  # noqa: S106
        extra_special_tokens=audio_tokens,
    )  # fmt: skip
    template = (
        "{% for m in messages %}{{ m['role'] }}{% for c in m['content'] %}{% if c['type'] == 'audio' %}"
        "<|audio_bos_|><|audio_pad|><|audio_eos_|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    features = transformers.Qwen3ASRFeatureExtractor()
    transformers.Qwen3ASRProcessor(features, tokenizer, chat_template=template).save_pretrained(tmp_path)
    pad, eos, heard = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<|audio_pad|>"])
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Qwen3ASRConfig(
        audio_config={
            "model_type": "qwen3_asr_encoder", "encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 16,
            "encoder_ffn_dim": 16, "output_dim": 16, "downsample_hidden_size": 8,
        },
        text_config={
            "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048, **small,
        },
        audio_token_id=heard, pad_token_id=pad, eos_token_id=eos,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.Qwen3ASRForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
    network.save_pretrained(tmp_path)
    system = TransformersSystem(tmp_path, max_new_tokens=8)
    clips = [noise(16000 * n, n) for n in (1, 2, 3)]
    texts = [one.text for one in system.hear(clips)]
    assert texts == [system.hear([clip])[0].text for clip in clips]
    assert len(set(texts)) == 3
    assert "user" not in "".join(texts)


def test_models_that_are_not_here_or_not_pinned(whisper: Path, tmp_path: Path) -> None:
    """Nothing of a repository is run: neither its code nor pickled weights."""
    assert "full commit" in refusal(lambda: TransformersSystem("openai/whisper-tiny"))
    assert "full commit" in refusal(lambda: TransformersSystem("openai/whisper-tiny@main"))
    refusal(lambda: TransformersSystem("openai/whisper-tiny@" + "a" * 40), ModelNotFoundError)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refusal(lambda: TransformersSystem(tmp_path), ModelNotFoundError)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    auto = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForSpeechSeq2Seq": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(auto))
    refusal(lambda: TransformersSystem(tmp_path), ModelNotFoundError)
    assert not marker.exists()
    assert "dtype is 'int3'" in refusal(lambda: TransformersSystem(whisper, dtype="int3"))
    import torch

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in whisper.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    refusal(lambda: TransformersSystem(pickled), ModelNotFoundError)
