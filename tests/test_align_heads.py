"""Alignment heads found by measurement: what they listen to, how they are compared, and where the choice is written."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from arkasr import audio, checkpoint, export, files, pins, results
from arkasr.audio import SAMPLE_RATE
from arkasr.checkpoint import Checkpoint
from arkasr.config import Heads, ModelConfig
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions, Floats
from arkasr.engines.pytorch import PyTorchEngine, pad_mels
from arkasr.errors import UsageError
from arkasr.text import TextRules
from arkasr.train import align_heads
from arkasr.train.align_heads import Clip, Half, Recording
from conftest import MakeCheckpoint, Run, random_network
from test_alignment_engines import expected, noise

TRUE, EVERYWHERE, BACKWARDS = (0, 0), (0, 1), (1, 0)


def clips(texts: Sequence[str]) -> list[Clip]:
    """Bursts of noise, each of another length, with a little silence around."""
    made = []
    for n, text in enumerate(texts):
        burst = np.random.default_rng(n).uniform(-0.1, 0.1, 4_000 + 700 * n).astype(np.float32)
        made.append(Clip(np.pad(burst, (640, 960)), text, (640, 640 + len(burst))))
    return made


def recordings(rules: TextRules, count: int, seed: int = 0) -> list[Recording]:
    texts = ["one", "twenty two", "Ach, drei!", "天气", "five-a"]
    return list(islice(align_heads.joined(clips(texts), rules, np.random.default_rng(seed)), count))


def pointing(recording: Recording) -> Floats:
    """Rows of a head that listens to the speech of the clip that is being said, and to nothing else."""
    num_tokens = audio.num_audio_tokens(len(recording.waveform))
    rows = np.zeros((len(recording.ids), num_tokens), np.float32)
    middles = (np.arange(num_tokens) + 0.5) * 1_280
    for tokens, owner in zip(recording.word_tokens, recording.owners, strict=True):
        first, last = recording.speech[owner]
        rows[list(tokens)] = (first < middles) & (middles < last)
    shares: Floats = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1)
    return shares


def heads_of(recording: Recording) -> dict[tuple[int, int], Floats]:
    right = pointing(recording)
    return {TRUE: right, EVERYWHERE: np.full_like(right, 1 / right.shape[1]), BACKWARDS: right[:, ::-1].copy()}


# ---- recordings ----


def test_clips_lie_where_a_recording_says(rules: TextRules) -> None:
    made = recordings(rules, 40)
    lengths_s = [len(one.waveform) / SAMPLE_RATE for one in made]
    assert max(lengths_s) <= 30
    assert sum(length_s < 5 for length_s in lengths_s) > 5 < sum(length_s > 12 for length_s in lengths_s)
    by_length = {len(clip.waveform): clip for clip in clips(["one", "twenty two", "Ach, drei!", "天气", "five-a"])}
    for one in made:
        said = []
        end_before = 0
        for (start, end), speech in zip(one.clips, one.speech, strict=True):
            clip = by_length[end - start]
            said.append(clip.text)
            heard = one.waveform[start:end]
            np.testing.assert_allclose(heard, clip.waveform * np.abs(heard).max() / np.abs(clip.waveform).max(), 1e-5)
            assert np.abs(one.waveform[end_before:start]).max(initial=0) < 0.01 < np.abs(heard).max()
            assert (speech[0] - start, speech[1] - start) == clip.speech
            end_before = end
        assert len(said) >= 2
        assert rules.to_text(list(one.ids)) == results.join_texts(said)
        assert list(one.owners) == [n for n, text in enumerate(said) for _ in results.words(text)]
        spelled = [b"".join(rules.token_bytes(one.ids[n]) for n in tokens).decode() for tokens in one.word_tokens]
        assert [word.strip() for word in spelled] == [word for text in said for word in results.words(text)]


def test_recordings_follow_from_the_seed(rules: TextRules) -> None:
    first, again, other = (recordings(rules, 3, seed) for seed in (4, 4, 5))
    assert [one.ids for one in first] == [one.ids for one in again] != [one.ids for one in other]
    np.testing.assert_array_equal(first[0].waveform, again[0].waveform)


def test_clips_that_are_not_heard_as_their_texts_say_are_left_out(
    tiny: Checkpoint, tmp_path: Path, shared: Path
) -> None:
    right = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="train"))[:12]
    soundfile.write(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    soundfile.write(tmp_path / "short.wav", np.zeros(100), SAMPLE_RATE)
    wrong = replace(right[0], text="something else")
    others = [replace(right[0], audio=tmp_path / name, text="") for name in ("silence.wav", "short.wav")]
    engine = PyTorchEngine.load(tiny, device="cpu")
    found = align_heads.heard(engine, [*right, wrong, *others], 1e9)
    texts = [clip.text for clip in found]
    assert len(texts) > 8
    assert texts == [one.text for one in right if one.text in texts]
    without = align_heads.heard(engine, [replace(one, text="") for one in right[:4]], 1e9)
    assert len(without) == 4
    some = align_heads.heard(engine, right, 0.1)
    assert len(some) <= align_heads.BATCH


# ---- heads ----


def test_each_head_is_heard_alone(small: ModelConfig, rules: TextRules) -> None:
    """Against the float64 oracle of the engines' tests, in groups of query heads; the text is the network's own."""
    network = random_network(replace(small, decoder_layers=3))
    engine = PyTorchEngine(network, rules)
    every: Heads = tuple((layer, head) for layer in range(3) for head in range(small.decoder_heads))
    waveform = noise(20_000)
    with torch.inference_mode():
        (said,) = engine.generate([waveform], DecodeOptions(max_new_tokens=9))
        encoded = network.encode(*pad_mels([waveform], network))
        for ids, agreed in ((said.ids, 1.0), ((*said.ids[:4], said.ids[4] ^ 1, *said.ids[5:]), None)):
            one = Recording(waveform, (), (), ids, (), ())
            rows, part = align_heads.listen(engine, one, encoded, every)
            assert agreed is None or part == agreed
            assert part == 1 or ids != said.ids
            assert set(rows) == set(every)
            for head in every:
                oracle = expected(network, rules, (head,), waveform, ids)[:-1]
                assert rows[head].shape == oracle.shape
                assert np.abs(rows[head] - oracle).sum(axis=1).max() < 1e-4
        few, _ = align_heads.listen(engine, one, encoded, ((2, 1),))
    assert list(few) == [(2, 1)]


def test_shares_by_hand() -> None:
    """Two clips of two audio tokens each, the border in the middle of the third; the last id is nobody's."""
    one = Recording(
        np.zeros(5_120, np.float32), ((0, 3_000), (3_000, 5_120)), (), (1, 2, 3, 4), ((0,), (1, 2), (2,)), (0, 0, 1)
    )
    rows = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [1, 0, 0, 0], [0, 0, 0, 1]], np.float32)
    assert align_heads.own_shares(one, rows, 1_280) == pytest.approx([0.3, 0.8])


def test_heads_that_bring_words_nearer_are_chosen(rules: TextRules) -> None:
    made = recordings(rules, 12)
    told = [heads_of(one) for one in made]
    right, wrong = (align_heads.distances(made, told, (head,)) for head in (TRUE, BACKWARDS))
    assert right.borders == 2 * sum(len(one.clips) for one in made)
    assert right.median_ms <= 20 < right.p95_ms <= 200
    assert right.mean_ms < 40
    assert wrong.mean_ms > 400
    for order in ((TRUE, EVERYWHERE, BACKWARDS), (BACKWARDS, EVERYWHERE, TRUE)):
        assert align_heads.choose(made, told, order) == (TRUE,)
    assert align_heads.choose(made, told, (BACKWARDS,)) == (BACKWARDS,)


def test_heads_that_complete_each_other_are_both_chosen(rules: TextRules) -> None:
    """One tells of every second clip, the other of the rest."""
    made = recordings(rules, 12)
    told = []
    for one in made:
        rows = pointing(one)
        odd = np.zeros(len(rows), bool)
        for tokens, owner in zip(one.word_tokens, one.owners, strict=True):
            odd[list(tokens)] = owner % 2
        flat = np.full_like(rows, 1 / rows.shape[1])
        told.append({(1, 1): np.where(odd[:, None], rows, flat), (0, 3): np.where(odd[:, None], flat, rows)})
    assert align_heads.choose(made, told, ((1, 1), (0, 3))) == ((0, 3), (1, 1))


def test_times_are_those_of_the_recognizer(tiny: Checkpoint) -> None:
    """The mean over single heads is what the engine tells of them all."""
    waveform = audio.load(Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac")
    engine = PyTorchEngine.load(tiny, device="cpu")
    (said,) = engine.generate([waveform], DecodeOptions(align=True))
    with torch.inference_mode():
        encoded = engine.network.encode(*pad_mels([waveform], engine.network))
        one = Recording(waveform, (), (), said.ids, (), ())
        rows, _ = align_heads.listen(engine, one, encoded, tiny.alignment_heads)
    assert said.attention is not None
    np.testing.assert_allclose(np.mean([*rows.values()], axis=0), said.attention[:-1], atol=1e-5)


# ---- the program ----


def locked_copy(tiny: Checkpoint, folder: Path, heads: object) -> Path:
    """Of the shipped model, as if it came from a hub: with other heads and a lock file."""
    shutil.copytree(tiny.folder, folder)
    (folder / files.GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": 561, "alignment_heads": heads}))
    known = {path.name: files.measure(path) for path in folder.iterdir()}
    pins.write_lock(folder, pins.Lock("ORG/NAME", "0" * 40, known))
    return folder


def test_it_finds_the_heads_of_tiny(
    run: Run, tiny: Checkpoint, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a bad choice, into a copy; the pinned checkpoint stays as it was."""
    monkeypatch.setattr(align_heads, "MAX_CLIP_S", 6)  # most of what is longer it does not follow
    source = locked_copy(tiny, tmp_path / "hub", [[3, 0]])
    made, report = tmp_path / "new" / "made", tmp_path / "report.json"
    code, out, err = run(
        "train", "align-heads", "--model", source, "--train", f"{shared}/speech/fsdd/manifest.jsonl:train",
        "--out", made, "--report", report, "--minutes", "1.5",
    )  # fmt: skip
    assert code == 0, err
    choice = json.loads(out[-1])["alignment_heads"]
    assert {layer for layer, _ in choice} == {1}
    opened = checkpoint.open_checkpoint(made)
    assert [list(head) for head in opened.alignment_heads] == choice
    assert opened.alignment_chosen
    assert json.loads((made / files.GENERATION_CONFIG).read_text())["eos_token_id"] == 561
    assert (made / files.WEIGHTS).read_bytes() == (tiny.folder / files.WEIGHTS).read_bytes()
    assert sorted(path.name for path in made.parent.iterdir()) == ["made"]
    assert pins.read_lock(made) is None
    assert pins.verify(source) is not None
    measured = json.loads(report.read_text())
    assert {layer for layer, _, _ in measured["shares"][:4]} == {1}
    assert measured["share_by_chance"] < measured["shares"][0][2] / 2
    assert measured["stood"]["heads"] == [[3, 0]]
    for half in ("chosen_by", "held_out"):
        assert measured["found"][half]["mean_ms"] < measured["stood"][half]["mean_ms"] / 2
    assert measured["found"]["held_out"]["median_ms"] < 40


Found = dict[str, Heads]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    """A search that takes no time, and what it finds."""
    made: Found = {"choice": ((0, 3), (1, 1))}
    monkeypatch.setattr(align_heads, "heard", lambda *_: [])
    monkeypatch.setattr(align_heads, "followed", lambda *_: Half([], [], 0))
    monkeypatch.setattr(align_heads, "search", lambda *_: made)
    return made


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A line."""
    soundfile.write(tmp_path / "clip.wav", noise(16_000), SAMPLE_RATE)
    path = tmp_path / "clips.jsonl"
    path.write_text(json.dumps({"audio": "clip.wav", "text": "x"}) + "\n")
    return path


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("content", [None, {"temperature": 0.5, "alignment_heads": [[0, 0]], "eos_token_id": [1, 2]}])
def test_the_choice_is_written_where_that_is_asked(
    make_checkpoint: MakeCheckpoint, manifest: Path, run: Run, content: dict[str, object] | None
) -> None:
    folder = make_checkpoint()
    path = folder / files.GENERATION_CONFIG
    if content is not None:
        path.write_text(json.dumps(content))
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    common = ["train", "align-heads", "--model", folder, "--train", manifest]
    code, out, _ = run(*common)
    assert (code, json.loads(out[-1])) == (0, {"alignment_heads": [[0, 3], [1, 1]]})
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before
    code, _, _ = run(*common, "--write")
    assert code == 0
    assert json.loads(path.read_text()) == {**(content or {}), "alignment_heads": [[0, 3], [1, 1]]}
    assert checkpoint.open_checkpoint(folder).alignment_heads == ((0, 3), (1, 1))
    after = {each.name: each.read_bytes() for each in folder.iterdir() if each != path}
    assert after == {name: data for name, data in before.items() if name != path.name}


@pytest.mark.usefixtures("found")
def test_a_pinned_checkpoint_is_never_changed(tiny: Checkpoint, manifest: Path, run: Run, tmp_path: Path) -> None:
    for folder in (locked_copy(tiny, tmp_path / "hub", [[1, 0]]), tiny.folder):
        code, out, err = run("train", "align-heads", "--model", folder, "--train", manifest, "--write")
        assert (code, out) == (1, [])
        assert "is pinned" in err[-1]
        assert "--out FOLDER" in err[-1]
        assert pins.verify(folder) is not None


@pytest.mark.usefixtures("found", "cache")
def test_what_cannot_be_done_is_one_line(make_checkpoint: MakeCheckpoint, manifest: Path, run: Run) -> None:
    folder = make_checkpoint()
    exported = export.find_or_write(checkpoint.open_checkpoint(folder), "float32")
    (manifest.parent / "file").write_text("")
    nowhere = manifest.parent / "file" / "new"
    cases: dict[str, list[str | Path]] = {
        "exists; give a new folder": ["--out", folder],
        "give one": ["--out", "new", "--write"],
        "minutes is 0.0": ["--minutes", "0"],
        "minutes is nan": ["--minutes", "nan"],
        "seed is -1": ["--seed", "-1"],
        "an export": ["--model", exported],
        "nothing: no such model": ["--model", "nothing"],
        "no utterance": ["--train", f"{manifest}:dev"],
        "cannot be read": ["--train", "missing.jsonl"],
        "cannot be written": ["--report", nowhere],
        "file/new": ["--out", nowhere],
    }
    for message, flags in cases.items():
        manifests: list[str | Path] = [] if "--train" in flags else ["--train", manifest]
        code, _, err = run("train", "align-heads", "--model", folder, *manifests, *flags)
        assert code == 1, message
        assert message in err[-1]


def test_a_model_that_hears_nothing_is_told_so(make_checkpoint: MakeCheckpoint, manifest: Path, run: Run) -> None:
    code, _, err = run("train", "align-heads", "--model", make_checkpoint(), "--train", manifest)
    assert code == 1
    assert "the model hears 0 of 1 clips as their texts say" in err[-1]


def test_a_model_that_loses_its_place_is_told_so(small: ModelConfig, rules: TextRules) -> None:
    engine = PyTorchEngine(random_network(small), rules)
    with torch.inference_mode(), pytest.raises(UsageError, match=r"follows 0 of \d+ recordings, 8 are needed"):
        align_heads.followed(engine, clips(["one", "two"]), 1.0, np.random.default_rng(0))


def test_what_is_not_nearer_on_both_halves_is_not_chosen(
    small: ModelConfig, rules: TextRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's heads are the right ones; then they are not, but only where heads were chosen."""
    made = recordings(rules, 6)
    halves = [Half(made[:3], [torch.zeros(1, 1, 1)] * 3, 0), Half(made[3:], [torch.zeros(1, 1, 1)] * 3, 0)]
    every = [(layer, head) for layer in range(2) for head in range(4)]
    lying: list[Recording] = []

    def told(_engine: PyTorchEngine, half: Half, heads: Heads) -> list[dict[tuple[int, int], Floats]]:
        rows = []
        for one in half.recordings:
            right = pointing(one)
            flat = right[:, ::-1]
            good = {TRUE: flat, BACKWARDS: right} if one in lying else {TRUE: right, BACKWARDS: flat}
            rows.append({head: good.get(head, flat) for head in every if head in heads})
        return rows

    monkeypatch.setattr(align_heads, "attention", told)
    network = random_network(small)
    for stood, now_lying, choice in (
        ((TRUE,), [], (TRUE,)),
        ((BACKWARDS,), [], (TRUE,)),
        ((TRUE,), made[:3], (TRUE,)),
        ((TRUE,), made, (BACKWARDS,)),
    ):
        lying[:] = now_lying
        found = align_heads.search(PyTorchEngine(network, rules, alignment_heads=stood), *halves)
        assert found["choice"] == choice
