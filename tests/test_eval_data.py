"""Test sets: every layout gives the same rows, nothing is lost without a word, and a wrong set is refused."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import pytest
import soundfile
from huggingface_hub import close_session, constants

import hub_server
from arkasr import audio
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.errors import ArkASRError, AudioError, CheckpointMismatchError, UsageError
from arkasr.evaluate import hubdata, parquet
from arkasr.evaluate.datasets import Dataset, open_dataset
from arkasr.metrics.normalize import normalizer
from hub_server import Hub

ENGLISH = normalizer("oal-d1e99b2")
TEXTS = {"a": "Hello there", "b": "  It's  Fine ", "c": "três 数字"}  # kept as they are
REPO, COMMIT = "some-org/some.set", "c0ffee" + "0" * 34


def noise(num_samples: int, seed: int = 0) -> Waveform:
    whole = np.random.default_rng(seed).integers(-3000, 3000, num_samples)
    return (whole / 2**15).astype(np.float32)  # exact in 16 bits


def encoded(waveform: Waveform) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, (waveform * 2**15).astype(np.int16), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return out.getvalue()


SOUND = {name: noise(800 + 160 * number, number) for number, name in enumerate(TEXTS)}


def write_audio(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, waveform in SOUND.items():
        (folder / f"{name}.wav").write_bytes(encoded(waveform))
    return folder


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def opened(place: Path | str, **options: Any) -> Dataset:
    return open_dataset(place, **{"normalizer": None, **options})


def refusal(call: Callable[[], object], kind: type[ArkASRError] = UsageError) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# ---- layouts ----


def as_jsonl(folder: Path) -> Path:
    write_audio(folder)
    records = [{"audio": f"{n}.wav", "text": t, "id": n, "speaker": "s", "language": "xx"} for n, t in TEXTS.items()]
    return write_lines(folder / "manifest.jsonl", *records)


def as_nemo(folder: Path) -> Path:
    write_audio(folder / "audio")
    records = [
        {"audio_filepath": f"{n}.wav", "text": t, "id": n, "speaker": "s", "language": "xx"} for n, t in TEXTS.items()
    ]
    return write_lines(folder / "any.json", *records)


def as_kaldi(folder: Path) -> Path:
    write_audio(folder)
    for file, value in (("text", None), ("utt2spk", "s"), ("utt2lang", "xx"), ("wav.scp", ".wav")):
        said = {n: t if value is None else n + value if file == "wav.scp" else value for n, t in TEXTS.items()}
        (folder / file).write_text("".join(f"{n} {v}\n" for n, v in said.items()))
    return folder


def as_tsv(folder: Path) -> Path:
    write_audio(folder / "clips")
    rows = [f"{n}.wav\t{t}\ts\txx\t{n}" for n, t in TEXTS.items()]
    (folder / "test.tsv").write_text("\n".join(["path\tsentence\tclient_id\tlocale\tid", *rows]) + "\r\n")
    (folder / "train.tsv").write_text("path\tsentence\n")
    return folder


def as_parquet(folder: Path) -> Path:
    for number, name in enumerate(TEXTS):
        row = {"id": name, "audio": {"bytes": encoded(SOUND[name]), "path": "x.wav"}, "text": TEXTS[name]}
        write_parquet(
            folder / "data" / f"test-{number:05}-of-00003.parquet", [row | {"speaker_id": "s", "language": "xx"}]
        )
    return folder


@pytest.mark.parametrize("make", [as_jsonl, as_nemo, as_kaldi, as_tsv, as_parquet])
def test_every_layout_has_the_same_rows(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    dataset = opened(make(tmp_path / "set"))
    assert dataset.kind == make.__name__.removeprefix("as_")
    items = list(dataset)
    wanted = {n: t.strip() for n, t in TEXTS.items()} if make is as_kaldi else TEXTS  # its texts begin behind a space
    assert {item.id: item.text for item in items} == wanted
    assert all((item.speaker, item.language) == ("s", "xx") for item in items)
    for item in items:
        assert np.array_equal(item.waveform(), SOUND[item.id])
    survey = dataset.survey()
    assert (survey.rows, survey.kept, survey.dropped) == (3, 3, {})
    hashed = "".join(json.dumps([item.id, item.text]) + "\n" for item in items)
    assert survey.references_sha256 == hashlib.sha256(hashed.encode()).hexdigest()


def test_our_own_manifests_can_be_read(shared: Path) -> None:
    dataset = opened(shared / "speech" / "an4")
    items = list(dataset)
    assert len(items) == 130 == dataset.survey().rows
    assert all(item.speaker and item.language == "en" for item in items)
    assert items[0].duration_s == pytest.approx(len(items[0].waveform()) / SAMPLE_RATE, abs=0.01)


def test_pieces_are_those_of_the_file(tmp_path: Path) -> None:
    """JSON lines have begin and end, NeMo offset and duration, Kaldi segments; -1 is no time."""
    whole = noise(4 * SAMPLE_RATE)
    (tmp_path / "whole.wav").write_bytes(encoded(whole))
    jsonl = write_lines(
        tmp_path / "a.jsonl",
        {"audio": "whole.wav", "text": "x", "begin_time": 0.5, "end_time": 1.25},
        {"audio": "whole.wav", "text": "x", "begin_time": 2},
        {"audio": "whole.wav", "text": "x", "begin_time": -1, "end_time": -1},
    )
    nemo = write_lines(
        tmp_path / "b.jsonl",
        {"audio_filepath": "whole.wav", "text": "x", "offset": 0.5, "duration": 0.75},
        {"audio_filepath": "whole.wav", "text": "x", "offset": 2, "duration": 2},
        {"audio_filepath": "whole.wav", "text": "x", "duration": 4},
    )
    (tmp_path / "wav.scp").write_text(f"rec {tmp_path / 'whole.wav'}\n")
    (tmp_path / "text").write_text("u1 x\nu2 x\nu3 x\n")
    (tmp_path / "segments").write_text("u1 rec 0.5 1.25\nu2 rec 2 -1\nu3 rec 0 4\n")
    for place, kind in ((jsonl, "jsonl"), (nemo, "nemo"), (tmp_path, "kaldi")):
        dataset = opened(place, kind=kind)
        dataset.survey()  # ids differ
        found = [item.waveform() for item in dataset]
        for one, (begin, end) in zip(found, [(8000, 20000), (32000, 64000), (0, 64000)], strict=True):
            assert np.array_equal(one, whole[begin:end]), kind
        assert found[0].flags.owndata  # who writes into a piece does not change the next


def test_a_piece_behind_the_end_is_an_error_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "w.wav").write_bytes(encoded(noise(1600)))
    path = write_lines(tmp_path / "m.jsonl", {"audio": "w.wav", "text": "x", "begin_time": 7, "end_time": 8})
    (item,) = opened(path)
    assert "between 7" in refusal(item.waveform, AudioError)


def test_a_recording_is_read_anew_in_each_pass(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", {"audio": "w.wav", "text": "x", "begin_time": 0, "end_time": 0.05})
    for seed in range(2):
        (tmp_path / "w.wav").write_bytes(encoded(noise(1600, seed)))
        (item,) = opened(path)
        assert np.array_equal(item.waveform(), noise(1600, seed)[:800])


def test_a_recording_of_many_pieces_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.wav").write_bytes(encoded(noise(16000)))
    records = [{"audio": "w.wav", "text": "x", "begin_time": n / 10, "end_time": n / 10 + 0.1} for n in range(9)]
    loads: list[object] = []
    load = audio.load

    def counted(source: audio.AudioSource) -> Waveform:
        loads.append(source)
        return load(source)

    monkeypatch.setattr(audio, "load", counted)
    for item in opened(write_lines(tmp_path / "m.jsonl", *records)):
        item.waveform()
    assert len(loads) == 1


def test_chunks_of_sessions_and_whatever_else_a_set_says(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{n}.wav", "transcription": "all of it", "parent_id": "call", "chunk_index": n,
         "device": "phone", "age": 40, "weight": float("nan"), "tags": ["x"]}
        for n in range(2)
    ]  # fmt: skip
    write_parquet(tmp_path / "test.parquet", rows)
    (tmp_path / "audio").mkdir()
    for n in range(2):
        (tmp_path / "audio" / f"{n}.wav").write_bytes(encoded(noise(800, n)))
    items = list(opened(tmp_path))
    assert [(i.id, i.parent_id, i.chunk_index, i.text) for i in items] == [
        ("0.wav", "call", 0, "all of it"), ("1.wav", "call", 1, "all of it")
    ]  # fmt: skip
    assert items[0].x == {"device": "phone", "age": 40}
    assert np.array_equal(items[1].waveform(), noise(800, 1))


def test_somebodys_results_are_texts_alone(tmp_path: Path) -> None:
    row = {"audio_filepath": "a.wav", "duration": 2.5, "time": 1, "text": "hello", "pred_text": "hallo", "odd": 1}
    dataset = opened(write_lines(tmp_path / "m.jsonl", row, row | {"x": {"id": "far/b"}}))
    assert dataset.kind == "leaderboard"
    assert not dataset.has_audio
    assert [(item.id, item.duration_s) for item in dataset] == [("a.wav", 2.5), ("far/b", 2.5)]
    assert "no audio" in refusal(next(iter(dataset)).waveform, AudioError)


# ---- what is left out ----


def test_rows_are_left_out_as_the_leaderboard_does_and_counted(tmp_path: Path) -> None:
    texts = ["yes", "", " ", "uh, um!", "Ignore time segment in scoring.", "[noise]", "no"]
    records = [{"audio": f"{n}.wav", "text": text} for n, text in enumerate(texts)]
    path = write_lines(tmp_path / "m.jsonl", *records)
    survey = opened(path, normalizer=ENGLISH).survey()
    assert (survey.rows, survey.kept) == (7, 2)
    assert survey.dropped == {
        "empty reference": 2, "empty after oal-d1e99b2": 2, "ignore time segment in scoring": 1,
    }  # fmt: skip
    assert [item.text for item in opened(path, normalizer=ENGLISH)] == ["yes", "no"]
    assert opened(path).survey().kept == 7


def test_only_the_split_is_taken(tmp_path: Path) -> None:
    records = [
        {"audio": f"{n}.wav", "text": "x", **({"split": n} if n != "none" else {})} for n in ("test", "train", "none")
    ]
    path = write_lines(tmp_path / "m.jsonl", *records)
    assert [item.id for item in opened(path)] == ["test.wav", "none.wav"]
    assert [item.id for item in opened(path, split="train")] == ["train.wav", "none.wav"]
    only = write_lines(tmp_path / "n.jsonl", *records[:2])
    assert "'dev'" in refusal(lambda: opened(only, split="dev").survey())
    assert "test, train" in refusal(lambda: opened(only, split="dev").survey())


# ---- what is refused ----


def test_a_wrong_count_of_rows_is_refused(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    assert opened(path, expected_rows=3).survey().kept == 3
    assert re.search(r"3 rows, the set has 4\b", refusal(lambda: opened(path, expected_rows=4).survey()))


def test_a_set_of_a_regime_has_the_regimes_count(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    options = {"name": "hf-audio/open-asr-leaderboard", "config": "librispeech", "split": "test.clean"}
    assert "2620" in refusal(lambda: opened(path, regime="E", **options).survey())
    assert "no set of regime E" in refusal(lambda: opened(path, regime="E", name="mine").survey())
    assert opened(path, regime="none", name="mine").survey().kept == 3


def test_ids_that_stand_twice_are_named_and_counted(tmp_path: Path) -> None:
    records = [{"audio": "a.wav", "text": "x", "id": name} for name in "aabbccddef"]
    message = refusal(opened(write_lines(tmp_path / "m.jsonl", *records)).survey)
    assert "'a', 'b', 'c' and 1 more" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"audio": "a.wav", "txt": "x"}', "no reference"),
        ('{"audio": "a.wav"}', "no reference"),
        ('{"text": "x"}', "no audio"),
        ('{"audio": "a.wav", "text": 5}', "text is 5"),
        ('{"audio": "a.wav", "text": "\\ud800"}', "text is"),
        ('{"audio": "a.wav", "text": "x", "duration": true}', "duration is True"),
        ('{"audio": "a.wav", "text": "x", "begin_time": NaN}', "begin_time is nan"),
        ('{"audio": "a.wav", "text": "x", "begin_time": 1e999}', "begin_time is inf"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"a":' * 3000, "not JSON"),
        ("\x00" * (2**20 + 2), "over"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"audio": "a.wav", "text": "x"}\n\n' + line + "\n")
    message = refusal(lambda: opened(path).survey())
    assert message.startswith(f"{path}:3: ")
    assert said in message


def test_a_pipe_of_kaldi_is_never_run(tmp_path: Path) -> None:
    folder = as_kaldi(tmp_path)
    for command in (f"touch {tmp_path / 'ran'} |", f"| touch {tmp_path / 'ran'}"):
        (folder / "wav.scp").write_text(f"a a.wav\nb {command}\nc c.wav\n")
        message = refusal(lambda: opened(folder).survey())
        assert "'b' is a pipe" in message
    assert not (tmp_path / "ran").exists()


def test_kaldi_names_what_has_no_counterpart(tmp_path: Path) -> None:
    folder = as_kaldi(tmp_path)
    (folder / "text").write_text("a x\nb y\n")
    assert "no reference of 'c'" in refusal(lambda: opened(folder).survey())
    (folder / "text").write_text("a x\nb y\nc z\nd z\n")
    assert "no audio of 'd'" in refusal(lambda: opened(folder).survey())
    (folder / "text").write_text("a x\nb y\nc z\nc z\n")
    assert "'c' stands twice" in refusal(lambda: opened(folder).survey())


def test_a_table_names_the_line_that_is_short(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("path\ttext\tage\na.wav\tx\t5\nb.wav\ty\n")
    assert f"{path}:3" in refusal(lambda: opened(path).survey())
    path.write_text("a.wav\tjust two columns\n")
    assert [(item.id, item.text) for item in opened(path)] == [("a.wav", "just two columns")]


def test_places_that_are_no_sets(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "neither" in refusal(lambda: opened(tmp_path / "empty"))
    assert "no such file" in refusal(lambda: opened(tmp_path / "absent"))
    assert "none of 0 rows" in refusal(lambda: opened(write_lines(tmp_path / "m.jsonl")).survey())
    write_lines(tmp_path / "n.jsonl")
    assert "2 files" in refusal(lambda: opened(tmp_path))
    assert "kind is 'odd'" in refusal(lambda: opened(tmp_path, kind="odd"))


# ---- parquet ----


def test_which_shards_are_a_splits() -> None:
    def chosen(*names: str, config: str = "", split: str = "test") -> list[str]:
        return parquet.shards(names, config=config, split=split, place="P")

    two = ["librispeech/test.clean-00000-of-00001.parquet", "librispeech/test.other-00000-of-00001.parquet"]
    assert chosen(*two, config="librispeech", split="test.clean") == two[:1]
    assert chosen("a/test/0001.parquet", "a/test/0000.parquet", "a/train/0000.parquet") == [
        "a/test/0000.parquet", "a/test/0001.parquet"
    ]  # fmt: skip
    assert chosen("test.parquet", "train.parquet") == ["test.parquet"]
    assert chosen("data/test-00000-of-00001-0123abcd.parquet") == ["data/test-00000-of-00001-0123abcd.parquet"]
    assert "'a', 'b'" in refusal(lambda: chosen("a/test.parquet", "b/test.parquet"))
    assert chosen("a/test.parquet", "b/test.parquet", config="b") == ["b/test.parquet"]
    assert "1 of 2 shards" in refusal(lambda: chosen("test-00001-of-00002.parquet"))
    assert "split 'dev'" in refusal(lambda: chosen("test.parquet", split="dev"))


def test_columns_go_by_the_leaderboards_order_of_names(tmp_path: Path) -> None:
    row = {"audio": b"", "transcription": "5", "transcript": "4", "normalized_text": "3", "sentence": "2", "text": "1"}
    for number, name in enumerate(["text", "sentence", "normalized_text", "transcript", "transcription"], start=1):
        write_parquet(tmp_path / "test.parquet", [row])
        assert [item.text for item in opened(tmp_path)] == [str(number)]
        del row[name]
    write_parquet(tmp_path / "test.parquet", [row])
    assert "no column of references" in refusal(opened(tmp_path).survey)
    write_parquet(tmp_path / "test.parquet", [{"text": "x"}])
    assert "no column of audio" in refusal(opened(tmp_path).survey)


@pytest.mark.parametrize(
    "fields",
    [
        {"audio": {"bytes": b"RIFF", "path": "same.wav"}}, {"audio": {"bytes": b"RIFF", "path": "same.wav"}, "id": "N"},
        {"audio": b"RIFF"}, {"audio": b"RIFF", "file_name": "N.wav"}, {"path": "N.wav"}, {"file_name": "N.wav"},
    ],
)  # fmt: skip
def test_both_passes_have_the_same_ids(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A row is called by its id or file name, else by its number, for many sets call every file the same."""
    rows = [
        {name: value.replace("N", str(n)) if isinstance(value, str) else value for name, value in fields.items()}
        | {"text": "x"}
        for n in range(3)
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    dataset = opened(tmp_path)
    ids = [item.id for item in dataset.rows(False)]
    assert ids == [item.id for item in dataset.rows(True)]
    form = "{}" if "id" in fields else "{}.wav" if {"path", "file_name"} & {*fields} else "sample_{}"
    assert ids == [form.format(n) for n in range(3)]


def test_a_missing_reference_or_damaged_shard_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test.parquet", [{"audio": b"", "text": "x"}, {"audio": b"", "text": None}])
    assert "row 1: no reference" in refusal(opened(tmp_path).survey)
    content = path.read_bytes()
    for damaged in (content[:-20], b"", b"PAR1" * 10):
        path.write_bytes(damaged)
        assert str(path) in refusal(opened(tmp_path).survey)


def test_a_row_without_audio_is_an_error_of_that_row(tmp_path: Path) -> None:
    good = encoded(SOUND["a"])
    rows = [
        {"audio": {"bytes": content, "path": None}, "text": "x"} for content in (good, None, b"", good[:300], b"junk")
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    items = list(opened(tmp_path))
    assert [item.id for item in items] == [f"sample_{n}" for n in range(5)]
    assert np.array_equal(items[0].waveform(), SOUND["a"])
    for item in items[1:]:
        refusal(item.waveform, AudioError)


def test_the_first_pass_reads_no_audio_and_no_pass_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set of 20 row groups, at no time are more than a few rows there."""
    rows = [{"id": str(n), "audio": {"bytes": os.urandom(200_000), "path": "x"}, "text": "t"} for n in range(100)]
    write_parquet(tmp_path / "test.parquet", rows, row_group_size=5)
    before = pa.total_allocated_bytes()
    dataset = opened(tmp_path)
    read: list[set[str]] = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, size: int, **options: Any) -> Any:
        read.append(set(options["columns"]))
        return original(self, size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    dataset.survey()
    assert all("audio" not in columns for columns in read)
    most = max(pa.total_allocated_bytes() - before for _ in dataset)
    assert most < 30 * 200_000


# ---- a hub's ----


@dataclass(frozen=True)
class _Set:
    hub: Hub
    files: dict[str, bytes]


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Set]:
    """A hub with a dataset of two shards, at the paths that datasets have."""
    for name, known in (("_RESOLVE", hub_server._RESOLVE), ("_TREE", hub_server._TREE)):
        changed = re.sub(r"^/(api/models)?", lambda found: "/api/datasets" if found[1] else "/datasets/", known.pattern)
        monkeypatch.setattr(hub_server, name, re.compile(changed))
    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    folder = as_parquet(tmp_path / "made")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    files["evil.py"] = b"raise SystemExit"
    with hub_server.running() as server:
        server.add(REPO, COMMIT, files, lfs=frozenset(sorted(files)[:2]))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield _Set(server, files)
        close_session()


def test_a_set_of_a_hub_is_fetched_only_when_allowed(on_hub: _Set) -> None:
    place = f"{REPO}@{COMMIT}"
    assert "not on this machine" in refusal(lambda: opened(place))
    assert not on_hub.hub.log
    dataset = opened(place, allow_download=True)
    assert (dataset.name, dataset.revision) == (REPO, COMMIT)
    assert not on_hub.hub.names()  # the listing alone
    first = next(iter(dataset))
    assert {Path(name).name for name in on_hub.hub.names()} == {
        "test-00000-of-00003.parquet"
    }  # a shard is fetched when its rows are wanted
    assert np.array_equal(first.waveform(), SOUND["a"])
    assert [item.text for item in dataset] == list(TEXTS.values())
    asked = len(on_hub.hub.log)
    assert opened(place).survey().kept == 3  # from now on it is here
    assert len(on_hub.hub.log) == asked
    assert "evil.py" not in on_hub.hub.names()


def test_a_hub_that_sends_something_else_is_caught(on_hub: _Set) -> None:
    shard = min(on_hub.files)
    on_hub.hub.fault(Path(shard).name, times=9, server="cdn", body=on_hub.files[shard][:-1] + b"!")
    dataset = opened(f"{REPO}@{COMMIT}", allow_download=True)
    assert "SHA-256" in refusal(lambda: list(dataset), CheckpointMismatchError)
    on_hub.hub.faults.clear()
    assert len(list(dataset)) == 3


def test_a_hub_that_is_away_is_one_line(on_hub: _Set) -> None:
    dataset = opened(f"{REPO}@{COMMIT}", allow_download=True)
    on_hub.hub.fault("resolve", times=99, status=404)
    assert REPO in refusal(lambda: list(dataset), ArkASRError)


def test_audio_beside_the_shards_is_fetched_row_by_row(on_hub: _Set, tmp_path: Path) -> None:
    """As of the leaderboard's Earnings22, whose rows name files below audio/."""
    rows = [{"file_name": f"{name}.wav", "text": "all", "parent_id": "call", "chunk_index": n}
            for n, name in enumerate(SOUND)]  # fmt: skip
    shard = write_parquet(tmp_path / "made" / "test.parquet", rows).read_bytes()
    sounds = {f"audio/{name}.wav": encoded(waveform) for name, waveform in SOUND.items()}
    on_hub.hub.add(REPO, COMMIT, {"test.parquet": shard, **sounds})
    dataset = opened(f"{REPO}@{COMMIT}", allow_download=True)
    assert dataset.survey().kept == 3
    assert on_hub.hub.names() == {"test.parquet"}
    assert np.array_equal(next(iter(dataset)).waveform(), SOUND["a"])
    assert on_hub.hub.names() == {"test.parquet", "audio/a.wav"}
    on_hub.hub.fault("audio/b.wav", times=99, status=404)
    message = refusal(lambda: list(dataset), ArkASRError)
    assert "audio/b.wav" in message
    assert "parquet (" not in message


def test_a_short_revision_is_refused() -> None:
    for place in (f"{REPO}@main", f"{REPO}@", f"{REPO}@{COMMIT[:-1]}"):
        assert "full commit" in refusal(lambda place=place: opened(place))  # type: ignore[misc]
    assert "full commit" in refusal(lambda: hubdata.Repository(f"../..@{COMMIT}", allow_download=True))


def test_a_listing_cannot_lead_out_of_the_cache(on_hub: _Set, tmp_path: Path) -> None:
    content = next(iter(on_hub.files.values()))
    on_hub.hub.add(REPO, COMMIT, {"../../../test.parquet": content, "data/test.parquet": content})
    assert len(list(opened(f"{REPO}@{COMMIT}", allow_download=True))) == 1
    assert not list(tmp_path.rglob("cache/**/../test.parquet"))
    assert {path.name for path in tmp_path.glob("*")} == {"cache", "made"}
