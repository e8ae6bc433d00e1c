"""Teacher data: labels of local and remote teachers, what is dropped and why, and jobs that are killed."""

import email
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import arkasr
from arkasr import audio, guards
from arkasr import endpoint as asking
from arkasr.audio import SAMPLE_RATE
from arkasr.data import FIELDS, Utterance, read_manifest
from arkasr.errors import ArkASRError, AudioError, UsageError
from arkasr.train import teacher_data
from arkasr.train.teacher_data import Config
from conftest import MakeCheckpoint
from serving import serve

EXAMPLES = Path(__file__).parents[1] / "examples" / "audio"
RUBOUT = EXAMPLES / "an4-rubout.flac"
RUBOUT_TEXT = "RUBOUT G M E F THREE NINE"


# ---- a teacher that says what it is told ----

Answer = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]  # status, JSON or bytes, headers
Said = Callable[[int, int], Answer]  # of the clip's number, asked for the n-th time


def spoken(text: str, avg_logprob: float = -0.1, **segment: object) -> Answer:
    """verbose_json of one segment."""
    said = {"text": text, "avg_logprob": avg_logprob, "tokens": [0] * len(text), **segment}
    return 200, {"task": "transcribe", "language": "und", "text": text, "segments": [said]}


@dataclass
class Endpoint:
    """POST /v1/audio/transcriptions; a clip's number is the level of its samples."""

    say: Said = lambda number, _: spoken(f"clip {number}")
    asked: list[int] = field(default_factory=list)
    forms: list[dict[str, str]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    clips: list[bytes] = field(default_factory=list)
    port: int = 0

    def name(self, model: str = "whisper-1") -> str:
        return f"http://127.0.0.1:{self.port}/v1#{model}"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    told = Endpoint()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
            parts = {
                str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
                for part in email.message_from_bytes(head + body).get_payload()
                if isinstance(part, email.message.Message)
            }
            clip = parts.pop("file")
            assert isinstance(clip, bytes)
            number = round(float(np.mean(soundfile.read(io.BytesIO(clip))[0])) * 1000)
            with lock:
                told.asked.append(number)
                told.clips.append(clip)
                told.keys.append(self.headers["authorization"])
                told.forms.append({name: bytes(value).decode() for name, value in parts.items()})
                times = told.asked.count(number)
            status, said, *headers = told.say(number, times) if self.path == "/v1/audio/transcriptions" else (404, {})
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **(headers[0] if headers else {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits long, or has a key of its surroundings."""
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.001)
    monkeypatch.delenv("ARKASR_API_KEY", raising=False)


# ---- manifests ----


def write_manifest(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(folder: Path, count: int, *, seconds: float = 1.0, **fields: Sequence[object]) -> Path:
    """Clips 1..count, which the endpoint knows; each field has a value a clip."""
    records = []
    for number in range(1, count + 1):
        level = np.full(round(seconds * SAMPLE_RATE), number / 1000)
        soundfile.write(folder / f"{number}.wav", level, SAMPLE_RATE)
        records.append({"audio": f"{number}.wav", **{name: values[number - 1] for name, values in fields.items()}})
    return write_manifest(folder / "speech.jsonl", records)


def job(teacher: str, manifest: Path, **changes: object) -> Config:
    options = {"teacher": teacher, "train": (str(manifest),), "out": manifest.parent / "labels.jsonl", **changes}
    return Config(**options)  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def label(config: Config) -> dict[str, Any]:
    """Run the job; its report."""
    teacher_data.main(config)
    report: dict[str, Any] = json.loads(config.out.with_suffix(".report.json").read_text())
    assert report["utterances"] == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] == len(lines(config.out))
    return report


def texts(config: Config) -> list[str]:
    return [line["text"] for line in lines(config.out)]


# ---- a local teacher ----


def test_labels_are_what_the_teacher_transcribes(tmp_path: Path) -> None:
    outside = {
        "audio": str(RUBOUT),
        "text": "rubbish",
        "language": "en",
        "units": "r u",
        "segments": [],
        "orig": "x.sph",
    }
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "p.flac").write_bytes((EXAMPLES / "an4-patterson.flac").read_bytes())
    manifest = write_manifest(
        tmp_path / "speech.jsonl", [outside, {"audio": "here/p.flac", "id": "p", "confidence": 2}]
    )
    config = job("tiny", manifest)
    assert label(config)["dropped"] == {}
    first, second = lines(config.out)
    wanted = arkasr.load_model("tiny").transcribe(RUBOUT)
    assert wanted.text == RUBOUT_TEXT
    assert first == {
        "audio": str(RUBOUT), "text": wanted.text, "language": "en", "orig": "x.sph", "reference": "rubbish",
        "teacher": first["teacher"], "confidence": round(wanted.confidence, 4),
    }  # fmt: skip
    assert first["teacher"].startswith("tiny@")
    assert (second["audio"], second["id"]) == ("here/p.flac", "p")
    assert "reference" not in second
    assert second["confidence"] < 1
    assert [len(utterance.waveform()) for utterance in read_manifest(config.out)] == [
        len(audio.load(path)) for path in (RUBOUT, EXAMPLES / "an4-patterson.flac")
    ]


def test_a_piece_is_labelled_by_what_is_said_in_it(tmp_path: Path) -> None:
    waveform = audio.load(RUBOUT)
    spans = [(0.0, 2.0), (2.0, None), (1.5, 3.5)]
    transcriber = arkasr.load_model("tiny")
    ends = [len(waveform) if end is None else round(end * SAMPLE_RATE) for _, end in spans]
    pieces = [waveform[round(begin * SAMPLE_RATE) : end] for (begin, _), end in zip(spans, ends, strict=True)]
    wanted = [transcriber.transcribe((piece, SAMPLE_RATE)).text for piece in pieces]
    assert len({RUBOUT_TEXT, *wanted}) == 4
    manifest = write_manifest(
        tmp_path / "speech.jsonl",
        [{"audio": str(RUBOUT), "begin_time": begin, "end_time": end} for begin, end in spans]
        + [{"audio": str(RUBOUT)}],
    )
    config = job("tiny", manifest, keep_doubtful=True)
    label(config)
    assert texts(config) == [*wanted, RUBOUT_TEXT]
    assert [(line.get("begin_time"), line.get("end_time")) for line in lines(config.out)] == [*spans, (None, None)]


def test_a_label_that_a_guard_doubts_is_dropped(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A random network runs in loops; what the guards said of it is the oracle."""
    folder = make_checkpoint()
    transcriber = arkasr.load_model(folder, dtype="float32")
    waveform = audio.load(RUBOUT)
    spans = [(begin / 2, begin / 2 + 1.5) for begin in range(5)]
    flags = [
        {flag for segment in transcriber.transcribe((waveform[int(b * 16_000) : int(e * 16_000)], 16_000)).segments
         for flag in segment.flags}
        for b, e in spans
    ]  # fmt: skip
    doubted = [bool(found & {guards.LOOP, guards.TOO_LONG, guards.TOO_FAST, guards.REPETITIVE}) for found in flags]
    assert any(doubted)
    manifest = write_manifest(
        tmp_path / "speech.jsonl", [{"audio": str(RUBOUT), "begin_time": b, "end_time": e} for b, e in spans]
    )
    config = job(str(folder), manifest, dtype="float32", max_chars_per_s=1e9)
    dropped = label(config)["dropped"]
    assert sum(count for reason, count in dropped.items() if reason.startswith("doubtful")) == sum(doubted)
    kept = label(replace(config, keep_doubtful=True))
    assert not any(reason.startswith("doubtful") for reason in kept["dropped"])


def test_a_checkpoint_that_was_trained_further_is_another_teacher(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The folder's name is the same: labels of two models would be mixed."""
    make_checkpoint()
    manifest = write_manifest(tmp_path / "speech.jsonl", [{"audio": str(RUBOUT), "begin_time": 0, "end_time": 1.5}])
    config = job(str(tmp_path / "model"), manifest, keep_doubtful=True, max_chars_per_s=1e9)
    before = label(config)["teacher"]
    make_checkpoint(rope_theta=1e4)
    assert label(config)["teacher"] != before
    assert len(lines(tmp_path / "labels.heard.jsonl")) == 2
    assert label(replace(config, dtype="float32"))["teacher"].endswith(" float32")
    assert len(lines(tmp_path / "labels.heard.jsonl")) == 3


# ---- stopping and going on ----

KILLED = """
import os, signal, sys
from pathlib import Path
from arkasr import files
from arkasr.train import teacher_data

where, at, out, manifest = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
owner, name = {"fsync": (os, "fsync"), "write": (files, "write_text_atomically"), "replace": (Path, "replace")}[where]
real, calls = getattr(owner, name), []

def counted(*arguments):
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

setattr(owner, name, counted)
teacher_data.main(teacher_data.Config("tiny", (manifest,), out, batch=2, max_failures=0.5))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A manifest of eight pieces and a missing file, and the labels and report of a job that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    records = [{"audio": str(RUBOUT), "begin_time": n / 4, "end_time": n / 4 + 2} for n in range(8)]
    manifest = write_manifest(
        folder / "speech.jsonl", [*records[:3], {"audio": "none.flac", "duration": 2}, *records[3:]]
    )
    config = job("tiny", manifest, batch=2, max_failures=0.5)
    report = label(config)
    assert report["kept"] >= 4
    assert report["dropped"]["damaged audio"] == 1
    return manifest, config.out.read_bytes(), config.out.with_suffix(".report.json").read_bytes()


def test_a_job_that_is_killed_again_and_again_ends_in_the_same_bytes(
    undisturbed: tuple[Path, bytes, bytes], tmp_path: Path
) -> None:
    """Killed with some hearings, with the labels written and not renamed, and with the labels but no report."""
    manifest, labels, report = undisturbed
    out = tmp_path / "labels.jsonl"
    for where, at, heard in (("fsync", 5, 5), ("replace", 1, 8), ("write", 2, 8)):
        command = [sys.executable, "-c", KILLED, where, str(at), str(out), str(manifest)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == -9
        assert len(lines(tmp_path / "labels.heard.jsonl")) == heard
        assert out.exists() == (where == "write")
        assert not (tmp_path / "labels.report.json").exists()
    label(job("tiny", manifest, out=out, batch=2, max_failures=0.5))
    assert out.read_bytes() == labels
    assert (tmp_path / "labels.report.json").read_bytes() == report
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"labels.heard.jsonl", "labels.jsonl", "labels.report.json"}


def test_a_torn_journal_is_mended_and_only_the_rest_is_heard(endpoint: Endpoint, tmp_path: Path) -> None:
    config = job(endpoint.name(), numbered(tmp_path, 6))
    label(config)
    journal = tmp_path / "labels.heard.jsonl"
    whole, labels = journal.read_bytes(), config.out.read_bytes()
    for length in (0, 1, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        journal.write_bytes(whole[:length])
        config.out.unlink()
        endpoint.asked.clear()
        label(config)
        assert sorted(endpoint.asked) == list(range(whole[:length].count(b"\n") + 1, 7))
        assert config.out.read_bytes() == labels
        assert journal.read_bytes() == whole


def test_a_file_that_is_no_journal_is_left_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    config = job(endpoint.name(), numbered(tmp_path, 1))
    journal = tmp_path / "labels.heard.jsonl"
    for content in (
        b"diary",
        b"diary\n",
        b'{"key": 3}\n',
        b'{"key": ["a", "b", null, null, null], "heard": {"text": ""}}\n',
    ):
        journal.write_bytes(content)
        with pytest.raises(UsageError, match=r"labels\.heard\.jsonl: not a journal"):
            teacher_data.main(config)
        assert journal.read_bytes() == content


def test_two_jobs_do_not_write_one_journal(endpoint: Endpoint, tmp_path: Path) -> None:
    config = job(endpoint.name(), numbered(tmp_path, 1))
    with (
        teacher_data._Journal(tmp_path / "labels.heard.jsonl"),
        pytest.raises(UsageError, match="another process is at this job"),
    ):
        teacher_data.main(config)
    label(config)


def test_other_filters_and_more_speech_need_no_second_hearing(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.say = lambda number, _: spoken(f"clip {number}", avg_logprob=-number / 10)
    config = job(endpoint.name(), numbered(tmp_path, 5))
    label(config)
    assert Counter(endpoint.asked) == Counter(range(1, 6))
    assert label(replace(config, min_confidence=float(np.exp(-0.35))))["dropped"] == {"low confidence": 2}
    assert texts(config) == ["clip 1", "clip 2", "clip 3"]
    assert [line["confidence"] for line in lines(config.out)] == [round(float(np.exp(-n / 10)), 4) for n in (1, 2, 3)]
    twice = (str(tmp_path / "speech.jsonl"), str(numbered(tmp_path, 7)))
    label(replace(config, train=twice))
    assert Counter(endpoint.asked) == Counter(range(1, 8))
    assert texts(config) == [f"clip {n}" for n in [*range(1, 8), *range(1, 8)]]


def test_a_disk_that_is_full_is_one_line(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(endpoint.name(), numbered(tmp_path, 2))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match=r"heard\.jsonl: cannot be written \(No space left on device\)"):
            teacher_data.main(config)
    label(config)
    assert texts(config) == ["clip 1", "clip 2"]


# ---- what is dropped ----


def test_each_reason_drops_what_it_says(endpoint: Endpoint, tmp_path: Path) -> None:
    said = {
        1: spoken("well said"),
        2: spoken(""),
        3: spoken(" ... ?"),
        4: spoken("so it goes", flags=["loop", "split"]),
        5: spoken("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"),
        6: spoken("na " * 40),
        7: spoken("who knows", avg_logprob=-2.0),
        8: spoken("a"),
        9: spoken("incomprehensibilities and counterrevolutionaries"),
        10: spoken("another text"),
        11: (422, {"error": {"message": "no such codec"}}),
        12: (200, {"text": "all is well", "segments": [
            {"text": "all", "avg_logprob": -0.1}, {"text": "is well", "avg_logprob": -0.1, "flags": ["padded"]},
        ]}),
        13: spoken("nothing to compare"),
    }  # fmt: skip
    endpoint.say = lambda number, _: said[number]
    references = ["well, SAID!", *["x"] * 8, "some words", "x", "all is", ""]
    references[3:9] = [str(said[n][1]["text"]) for n in range(4, 10)]
    manifest = numbered(tmp_path, 13, seconds=1.2, text=references)
    config = job(
        endpoint.name(), manifest, min_confidence=0.5, min_chars_per_s=2.0, max_chars_per_s=35.0, against_text=0.5,
        max_failures=0.1,
    )  # fmt: skip
    report = label(config)
    assert report["dropped"] == {
        "no words": 2, "doubtful: loop": 1, "doubtful: too_fast": 1, "doubtful: repetitive, too_fast": 1,
        "low confidence": 1, "too few characters a second": 1, "too many characters a second": 1,
        "differs from its text": 1, "no answer": 1,
    }  # fmt: skip
    assert texts(config) == ["well said", "all is well", "nothing to compare"]
    assert [line.get("reference") for line in lines(config.out)] == ["well, SAID!", "all is", None]
    assert report["failures"] == [f"{tmp_path / '11.wav'}: HTTP 422 'no such codec'"]
    assert report["kept_hours"] == round(3 * 1.2 / 3600, 4)
    open_to_all = replace(
        config, min_confidence=0.0, min_chars_per_s=0.0, max_chars_per_s=1e9, against_text=None, keep_doubtful=True
    )
    assert label(open_to_all)["dropped"] == {"no words": 2, "no answer": 1}


def test_a_second_teacher_must_agree_and_hears_only_what_is_left(endpoint: Endpoint, tmp_path: Path) -> None:
    first = {
        1: "one two three four five",
        2: "one two three four five",
        3: "",
        4: "今天天气很好",
        5: "今天天气很好",
        6: "Yes.",
    }
    other = {1: "One, two three four FIVE", 2: "one two free for five", 4: "今天天汽很好", 5: "今天田汽很好", 6: ""}
    endpoint.say = lambda number, times: spoken((first if times == 1 else other)[number])
    config = job(endpoint.name("first"), numbered(tmp_path, 6), second=endpoint.name("second"), parallel=1)
    assert label(config)["dropped"] == {"no words": 1, "disagreement": 3}
    assert texts(config) == [first[1], first[4]]
    assert [form["model"] for form in endpoint.forms] == ["first"] * 6 + ["second"] * 5
    assert endpoint.asked[6:] == [1, 2, 4, 5, 6]
    assert label(replace(config, max_disagreement=0.4))["dropped"] == {"no words": 1, "disagreement": 1}
    assert {line["teacher"] for line in lines(config.out)} == {endpoint.name("first")}
    assert len(endpoint.asked) == 11


def test_a_second_teacher_that_does_not_answer_is_counted(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.say = lambda number, times: (400, {}) if number == 2 and times == 2 else spoken("yes")
    config = job(endpoint.name("a"), numbered(tmp_path, 3), second=endpoint.name("b"), max_failures=0.5)
    assert label(config)["dropped"] == {"no answer of the second teacher": 1}


def test_labels_of_labels_keep_the_first_text(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.say = lambda _, times: spoken(f"hearing {times}")
    config = job(endpoint.name(), numbered(tmp_path, 1, text=["by a person"]))
    label(config)
    again = job(endpoint.name("better"), config.out, out=tmp_path / "again.jsonl")
    label(again)
    assert [(line["text"], line["reference"]) for line in lines(again.out)] == [("hearing 2", "by a person")]


def test_damaged_audio_is_counted_and_ends_only_a_job_that_has_too_much_of_it(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    manifest = numbered(tmp_path, 4)
    (tmp_path / "torn.flac").write_bytes(RUBOUT.read_bytes()[:3000])
    (tmp_path / "no.wav").write_bytes(b"no audio")
    damaged: list[dict[str, object]] = [
        {"audio": "none.wav"}, {"audio": "none.wav", "duration": 1.0}, {"audio": "no.wav"}, {"audio": "torn.flac"},
        {"audio": "1.wav", "begin_time": 9.0}, {"audio": "1.wav", "begin_time": 9.0, "end_time": 10.0},
    ]  # fmt: skip
    write_manifest(manifest, [*damaged[:3], *lines(manifest), *damaged[3:]])
    for teacher, good in ((endpoint.name(), [f"clip {n}" for n in range(1, 5)]), ("tiny", None)):
        config = job(teacher, manifest, out=tmp_path / "some.jsonl", max_failures=0.6, keep_doubtful=True)
        report = label(config)
        assert report["dropped"]["damaged audio"] == 6
        assert len(report["failures"]) == 6
        assert all(" " in why and "\n" not in why for why in report["failures"])
        if good:
            assert texts(config) == good
        with pytest.raises(UsageError, match=r"6 of 10 utterances failed, the last one: .*; mend that and run again"):
            teacher_data.main(replace(config, max_failures=0.5))
    for name in ("none.wav", "no.wav", "torn.flac"):
        soundfile.write(tmp_path / name, np.full(SAMPLE_RATE, 0.004), SAMPLE_RATE)
    mended = job(endpoint.name(), manifest, out=tmp_path / "some.jsonl", max_failures=0.2)
    assert label(mended)["dropped"] == {"damaged audio": 2}


def test_too_many_failures_end_the_job_at_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.say = lambda number, _: (400, {}) if number % 2 else spoken("yes")
    config = job(endpoint.name(), numbered(tmp_path, 60), max_failures=0.05, parallel=2)
    with pytest.raises(UsageError, match=r"4 of 60 utterances failed, the last one: .*7\.wav: HTTP 400"):
        teacher_data.main(config)
    assert len(endpoint.asked) < 20
    assert not config.out.exists()
    endpoint.say = lambda number, _: spoken(f"clip {number}")
    assert label(config)["kept"] == 60
    # What was heard before the end is kept, and nobody is asked for it again.
    assert texts(config) == ["yes" if n in (2, 4, 6) else f"clip {n}" for n in range(1, 61)]


# ---- an endpoint ----


def test_an_endpoint_gets_the_samples_the_language_and_the_key(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = numbered(tmp_path, 2, language=["de", None])
    stereo = np.random.default_rng(0).integers(-(2**15), 2**15, 8000).astype(np.int16)
    soundfile.write(tmp_path / "loud.wav", stereo, SAMPLE_RATE)
    write_manifest(manifest, [*lines(manifest), {"audio": "loud.wav", "begin_time": 0.1, "end_time": 0.3}])
    monkeypatch.setenv("ARKASR_API_KEY", " secret-17\n")
    config = job(endpoint.name("big/model"), manifest, parallel=1)
    label(config)
    wanted = {"model": "big/model", "response_format": "verbose_json", "temperature": "0"}
    assert endpoint.forms == [wanted | {"language": "de"}, wanted, wanted]
    assert endpoint.keys == ["Bearer secret-17"] * 3
    sent, rate = soundfile.read(io.BytesIO(endpoint.clips[2]), dtype="int16")
    assert rate == SAMPLE_RATE
    np.testing.assert_array_equal(sent, stereo[1600:4800])
    written = b"".join(path.read_bytes() for path in tmp_path.glob("labels.*"))
    assert b"secret" not in written
    monkeypatch.delenv("ARKASR_API_KEY")
    label(replace(config, teacher=endpoint.name("other")))
    assert endpoint.keys[3:] == [None] * 3


def test_a_busy_endpoint_is_asked_again_and_order_is_kept(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def waited(wait_s: float) -> None:
        waits.append(wait_s)

    monkeypatch.setattr(asking, "_pause", waited)
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.5)

    def say(number: int, times: int) -> Answer:
        time.sleep(0.03 * (number % 3 == 0))
        if times <= number % 6:
            return 429 if number % 2 else 503, b"later", {"retry-after": "7"} if number == 1 else {}
        return spoken(f"clip {number}")

    endpoint.say = say
    config = job(endpoint.name(), numbered(tmp_path, 12), parallel=5)
    label(config)
    assert texts(config) == [f"clip {n}" for n in range(1, 13)]
    assert Counter(endpoint.asked) == {n: n % 6 + 1 for n in range(1, 13)}
    assert waits.count(7.0) == 1
    rest = sorted(wait_s for wait_s in waits if wait_s != 7.0)
    assert 0.25 <= rest[0] < rest[-1] <= 8
    assert rest[-1] > 4


def test_an_endpoint_that_stays_busy_or_talks_nonsense_does_not_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    answers: list[Answer] = [
        (500, {"error": "no"}), (200, b"<html>"), (200, []), (200, {}), (200, {"text": 3}), (200, b"[" * 100_000),
        (200, {"text": "a", "segments": 3}), (200, {"text": "a", "segments": [{"text": 3}]}), (413, b""),
        (200, {"text": "a", "segments": [{"text": "a", "avg_logprob": "x"}]}),
        (200, {"text": "a\n\ud800  b", "segments": []}),
    ]  # fmt: skip
    endpoint.say = lambda number, _: answers[number - 1]
    config = job(endpoint.name(), numbered(tmp_path, len(answers)), max_failures=1.0)
    assert label(config)["dropped"] == {"no answer": len(answers) - 1}
    assert texts(config) == ["a ? b"]
    assert "confidence" not in lines(config.out)[0]
    assert endpoint.asked.count(1) == asking.TRIES
    assert len(endpoint.asked) == len(answers) - 1 + asking.TRIES
    with pytest.raises(UsageError, match="tells no confidence; leave min_confidence at 0"):
        teacher_data.main(replace(config, min_confidence=0.1))


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_what_no_other_clip_would_be_spared_ends_the_job(endpoint: Endpoint, tmp_path: Path, status: int) -> None:
    endpoint.say = lambda _, __: (status, {"error": {"message": "go away"}}, {"location": "/v1/elsewhere"})
    config = job(endpoint.name(), numbered(tmp_path, 40), max_failures=1.0, parallel=1)
    with pytest.raises(UsageError, match=f"HTTP {status} .*go away.*; check URL, model and ARKASR_API_KEY"):
        teacher_data.main(config)
    assert len(endpoint.asked) < 5


def test_an_endpoint_that_is_down_ends_the_job_and_drops_nothing(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        config = job(f"http://127.0.0.1:{bound.getsockname()[1]}/v1#m", numbered(tmp_path, 3), max_failures=1.0)
        with pytest.raises(UsageError, match=r"nobody answers .*; start it and run again"):
            teacher_data.main(config)
    assert not config.out.exists()


@pytest.mark.slow
def test_our_own_server_labels_as_the_model_does(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    records: list[dict[str, object]] = [
        {"audio": str(RUBOUT)},
        {"audio": str(RUBOUT), "begin_time": 1.0, "end_time": 3.0},
        {"audio": "quiet.wav"},
    ]
    manifest = write_manifest(tmp_path / "speech.jsonl", records)
    soundfile.write(tmp_path / "quiet.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    local = label(job("tiny", manifest, out=tmp_path / "local.jsonl"))
    with serve(tmp_path / "state") as server:
        remote = label(job(f"{server.url}/v1#tiny", manifest, out=tmp_path / "remote.jsonl"))
    assert remote["dropped"] == local["dropped"] == {"no words": 1}
    ours, theirs = lines(tmp_path / "local.jsonl"), lines(tmp_path / "remote.jsonl")
    assert [line["text"] for line in theirs] == [line["text"] for line in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert other["confidence"] == pytest.approx(one["confidence"], abs=2e-4)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_failures": 1.5}, "max_failures is 1.5; give 0 to 1"),
        ({"max_failures": float("nan")}, "max_failures is nan"),
        ({"min_confidence": -0.1}, "min_confidence is -0.1"),
        ({"against_text": -1.0}, "against_text is -1.0"),
        ({"batch": 0}, "batch is 0"),
        ({"parallel": 0}, "parallel is 0"),
        ({"min_chars_per_s": 9.0, "max_chars_per_s": 8.0}, r"max_chars_per_s is 8.0; give 9.0 to inf"),
        ({"max_disagreement": 0.1}, "max_disagreement: has nobody to disagree"),
        ({"second": "tiny"}, "second: tiny would agree with itself"),
        ({"out": Path("labels.json")}, "labels.json: labels are a manifest; call it NAME.jsonl"),
        ({"teacher": "no-such-model"}, "no-such-model"),
        ({"teacher": "http://host/v1"}, "give http://HOST/v1#MODEL, and the key in ARKASR_API_KEY"),
        ({"teacher": "http://user:word@host/v1#m"}, "^host: give http://HOST/v1#MODEL"),
        ({"teacher": "http://host:port/v1#m"}, "no URL"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_heard(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    manifest = write_manifest(tmp_path / "speech.jsonl", [{"audio": str(RUBOUT)}])
    with pytest.raises(ArkASRError, match=message) as caught:
        teacher_data.main(job(**{"teacher": "tiny", "manifest": manifest, **changes}))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_a_manifest_is_not_overwritten_by_its_labels(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "speech.jsonl", [{"audio": str(RUBOUT)}])
    with pytest.raises(UsageError, match="is a manifest to be read; give another --out"):
        job("tiny", manifest, out=tmp_path / ".." / tmp_path.name / "speech.jsonl")
    with pytest.raises(UsageError, match=r"speech\.jsonl:no: no utterance to label; check the split"):
        teacher_data.main(job("tiny", manifest, train=(f"{manifest}:no",)))


def test_records_of_damaged_audio_stop_a_manifest_only_where_they_must(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "none.wav"}, {"audio": str(RUBOUT)}])
    assert {"teacher", "confidence", "reference"} <= FIELDS
    with pytest.raises(AudioError, match=r"none\.wav"):
        list(read_manifest(manifest))
    write_manifest(manifest, [{"audio": str(RUBOUT), "reference": "x", "confidence": 0.5, "teacher": "tiny@0"}])
    [utterance] = read_manifest(manifest)
    assert isinstance(utterance, Utterance)
