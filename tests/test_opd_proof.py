"""What runs/opd_proof.py says of a made-up proof: counts by hand, seeds that are no new clips, and nothing left out."""

import importlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import docs
from arkasr.errors import UsageError
from conftest import MakeCheckpoint

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "runs"))
    proof = importlib.import_module("opd_proof")

CLIPS = {  # id -> speaker, reference
    "a1": ("anna", "ONE TWO THREE FOUR"),
    "a2": ("anna", "GO"),
    "b1": ("bert", "STOP, NOW"),
    "b2": ("bert", "YES YES YES"),
}
Texts = Mapping[str, str]
Clips = Mapping[str, tuple[str, str]]


def hear(work: Path, name: str, texts: Texts, *, clips: Clips = CLIPS, of: str = "an4", **entry: Any) -> None:
    """What `ark-asr eval run` leaves of a model that says `texts`, and elsewhere the reference."""
    folder = work / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"MODEL_{name}_DATASET_{of}__test.jsonl"
    lines = [
        {"audio_filepath": f"{clip}.flac", "duration": 2.0, "time": 0.1, "text": reference,
         "pred_text": texts.get(clip, reference),
         "x": {"id": clip, "set": f"{of}/test", "speaker": speaker, "language": "en"}}
        for clip, (speaker, reference) in clips.items()
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = folder / "run.json"
    sets = json.loads(run.read_text())["sets"] if run.exists() else {}
    sets[path.name] = {"complete": True, "options": {"limit": None}, **entry}
    run.write_text(json.dumps({"format": 1, "model": name, "sets": sets}))


def train(work: Path, name: str, lines: Sequence[Mapping[str, float]], **config: Any) -> None:
    """What a run of training leaves, without its model."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"config": {"steps": 30, **config}, "commit": "abc"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def row(rows: Sequence[Mapping[str, Any]], **wanted: object) -> Mapping[str, Any]:
    (found,) = [one for one in rows if all(one[name] == value for name, value in wanted.items())]
    return found


def only(names: Sequence[str], speakers: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {name: (speaker, "W " * 9 + "W") for name, speaker in zip(names, speakers, strict=True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of two arms and two seeds, whose errors are counted below."""
    work, target = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("results")
    for seed in (1, 2):
        hear(work, f"seed{seed}-sft", {"a1": "one too three", "b2": "yes yes yes yes"})  # 2 + 1 of 10 words
    hear(work, "seed1-opd4", {"b1": "stop"})  # 1
    hear(work, "seed2-opd4", {})  # 0; punctuation and case are no words
    hear(work, "teacher", {"a2": "no"})  # 1
    proof.main(work, target)
    (path,) = target.glob("*-opd-proof.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-cpu\d+-opd-proof.json", path.name)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_rates_are_those_counted_by_hand(made: dict[str, Any]) -> None:
    assert [(one["group"], one["arm"]) for one in made["rates"]] == [
        ("alone", "teacher"), ("seed", "sft"), ("seed", "opd4"),
    ]  # fmt: skip
    sft, opd4 = row(made["rates"], arm="sft"), row(made["rates"], arm="opd4")
    assert sft["wer"]["seeds"] == {"1": 30.0, "2": 30.0}
    assert (sft["wer"]["spread"], sft["wer"]["pooled"]) == (0.0, 30.0)
    assert opd4["wer"]["seeds"] == {"1": 10.0, "2": 0.0}
    assert (opd4["wer"]["mean"], opd4["wer"]["pooled"]) == (5.0, 5.0)
    assert opd4["wer"]["spread"] == round(10 / math.sqrt(2), 3)
    counted = [sft["wer"][name] for name in ("substitutions", "deletions", "insertions", "reference")]
    assert counted == [2, 2, 2, 20]
    assert (sft["wer"]["clips"], sft["wer"]["clusters"]) == (4, 2)
    assert row(made["rates"], arm="teacher")["wer"]["spread"] is None


def test_characters_are_counted_without_spaces(made: dict[str, Any]) -> None:
    # onetwothreefour 15, go 2, stopnow 7, yesyesyes 9; "one too three": a letter wrong, four lost; a "yes" too many
    cer = row(made["rates"], arm="sft")["cer"]
    assert [cer[name] for name in ("substitutions", "deletions", "insertions", "reference")] == [2, 8, 6, 66]
    assert cer["seeds"]["1"] == round(100 * 8 / 33, 3)


def test_the_record_tells_where_it_comes_from_and_what_is_not_there(made: dict[str, Any]) -> None:
    assert made["what"] == "opd-proof"
    assert {"command", "date", "commit", "torch", "processor", "cpus"} <= made.keys()
    assert made["normalizer"] == "plain"
    missing = {f"seed{seed}-{arm}: not heard" for seed in (1, 2) for arm in ("base", "td", "opd1", "td_opd4")}
    assert set(made["notes"]) == missing
    assert [(one["first"], one["second"]) for one in made["comparisons"]] == [("opd4", "sft")]
    assert row(made["comparisons"], first="opd4")["difference"] == -25.0


def many(rng: random.Random, *, share: float, clips: Clips) -> Texts:
    """Of each clip's ten words, a share is wrong."""
    return {name: " ".join("x" if rng.random() < share else "w" for _ in range(10)) for name in clips}


TEN = only([f"c{n}" for n in range(60)], [f"speaker{n % 10}" for n in range(60)])


def test_a_seed_that_says_the_same_makes_nothing_surer(tmp_path: Path) -> None:
    """Clips counted once for each seed made intervals of one speaker narrower by the root of three."""
    rng = random.Random(0)
    one, other = (many(rng, share=share, clips=TEN) for share in (0.3, 0.25))
    for speakers, clips in ((10, TEN), (1, {name: ("same", text) for name, (_, text) in TEN.items()})):
        found = []
        for seeds in (1, 3):
            work = tmp_path / f"{speakers}-{seeds}"
            for seed in range(1, seeds + 1):
                hear(work, f"seed{seed}-sft", one, clips=clips)
                hear(work, f"seed{seed}-td", other, clips=clips)
            record = proof.prove(work)
            (compared,) = record["comparisons"]
            wer = row(record["rates"], arm="td")["wer"]
            assert (wer["clips"], wer["clusters"]) == (60, speakers)
            facts = [compared[name] for name in ("difference", "low", "high", "p", "verdict")]
            found.append([wer["pooled"], *wer["interval"], *facts])
        assert found[0] == found[1]


def test_an_interval_is_of_speakers(tmp_path: Path) -> None:
    """Against resampled speakers, drawn here one by one: one speaker has all the errors."""
    texts = {name: "x " * 10 for name, (speaker, _) in TEN.items() if speaker == "speaker3"}
    for seed in (1, 2):
        hear(tmp_path, f"seed{seed}-sft", texts if seed == 1 else {}, clips=TEN)
    low, high = row(proof.prove(tmp_path)["rates"], arm="sft")["wer"]["interval"]
    rates = np.array([5.0 if speaker == 3 else 0.0 for speaker in range(10)]) * 10  # per cent, both seeds together
    rng = np.random.default_rng(1)
    drawn = rates[rng.integers(0, 10, size=(4000, 10))].mean(axis=1)
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.1)
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.1)


def test_better_is_said_of_the_paired_difference_after_holm(tmp_path: Path) -> None:
    rng = random.Random(1)
    worse = many(rng, share=0.5, clips=TEN)
    for seed in (1, 2, 3):
        for arm in proof.ARMS:
            hear(tmp_path, f"seed{seed}-{arm}", worse if arm == "base" else many(rng, share=0.2, clips=TEN), clips=TEN)
    record = proof.prove(tmp_path)
    assert record["notes"] == []
    asked = {(one["first"], one["second"]): one for one in record["comparisons"]}
    assert len(asked) == len(record["comparisons"]) == 12
    p_values = [one["p"] for one in asked.values()]
    for (_, second), one in asked.items():
        assert one["verdict"] == ("better" if second == "base" else "no difference shown")
        assert (one["comparisons"], one["seeds"]) == (12, [1, 2, 3])
        at_most = sum(p < one["p"] for p in p_values)
        assert one["p_holm"] >= min(1, (12 - at_most) * one["p"]) - 1e-12
    assert min(one["p_holm"] for one in asked.values()) == pytest.approx(12 * min(p_values))


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    hear(tmp_path, "seed1-sft", {"a2": "no"})
    hear(tmp_path, "seed2-sft", {"a1": "", "a2": "", "b1": ""})
    hear(tmp_path, "seed1-td", {"a2": "no"})
    hear(tmp_path, "seed3-td", {"a2": ""})
    record = proof.prove(tmp_path)
    (compared,) = record["comparisons"]
    assert (compared["seeds"], compared["difference"]) == ([1], 0.0)


def test_students_that_begin_from_tiny_are_compared_with_it_alone_and_together(tmp_path: Path) -> None:
    hear(tmp_path, "tiny", {"a1": "one"})
    for seed, texts in ((1, {}), (2, {"a1": "one two"}), (3, {"b1": "halt now"})):
        hear(tmp_path, f"tiny{seed}-opd4", texts)
        hear(tmp_path, f"tiny{seed}-opd4", texts, of="fsdd")  # which the shipped model has not heard
    record = proof.prove(tmp_path)
    found = {(one["by_seed"], *one["seeds"]): one["difference"] for one in record["comparisons"]}
    assert found == {(False, 1, 2, 3): -20.0, (True, 1): -30.0, (True, 2): -10.0, (True, 3): -20.0}
    assert {one["second"] for one in record["comparisons"]} == {"tiny"}
    assert [one["comparisons"] for one in record["comparisons"]] == [1, 3, 3, 3]
    assert {(one["arm"], one["set"]) for one in record["rates"]} == {
        ("tiny", "an4/test"), ("opd4", "an4/test"), ("opd4", "fsdd/test"),
    }  # fmt: skip
    assert row(record["rates"], arm="tiny")["parameters"] > 1e6


def test_half_a_set_has_no_rate(tmp_path: Path) -> None:
    hear(tmp_path, "seed1-sft", {})
    hear(tmp_path, "seed1-td", {}, options={"limit": 2})
    hear(tmp_path, "seed1-opd1", {}, complete=False)
    record = proof.prove(tmp_path)
    assert [one["arm"] for one in record["rates"]] == ["sft"]
    left_out = [note for note in record["notes"] if "is left out" in note]
    assert len(left_out) == 2
    assert {"seed1-td: not heard", "seed1-opd1: not heard"} <= set(record["notes"])


def test_seeds_that_heard_other_clips_are_refused(tmp_path: Path) -> None:
    hear(tmp_path, "seed1-sft", {})
    hear(tmp_path, "seed2-sft", {}, clips={name: CLIPS[name] for name in ("a1", "b1")})
    with pytest.raises(UsageError, match="an4/test: seeds heard different rows"):
        proof.prove(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results in eval/"):
        proof.prove(tmp_path)


# ---- what the runs tell ----


def spoken(step: int, time: float, **changes: float) -> dict[str, float]:
    return {"step": step, "time": time, "lr": 0.1, "skipped": 0, "kl": 0.5,
            **dict.fromkeys(proof.SPOKEN, 0.0), **changes}  # fmt: skip


def seen(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "time": 1000.0, **{f"eval_{name}": value for name, value in values.items()}}


def learned(work: Path) -> None:
    """Two seeds with teacher data first, and one arm of plain training."""
    hear(work, "seed1-td_opd4", {})
    for seed, kl in ((1, 0.4), (2, 0.2)):
        lines = [
            seen(0, wer=0.5, kl=2 * kl, vuss=40.0),
            {"step": 5, "time": 0.0, "lr": 0.1, "skipped": 0, "ce": 1.0},
            {"step": 10, "time": 1.0, "lr": 0.1, "skipped": 0, "ce": 1.0},
            seen(10, wer=0.4, kl=kl, vuss=38.0),
            spoken(15, 50.0, tokens=6.0, rollout_s=0.01),
            spoken(20, 60.0, tokens=8.0, rollout_s=0.03, skipped=2),
            spoken(25, 80.0, tokens=7.0, rollout_s=0.02),
            spoken(30, 95.0, tokens=7.0, rollout_s=0.02),
            seen(30, wer=0.3, kl=kl / 2, vuss=36.0),
        ]
        train(work, f"seed{seed}/td_opd4", lines, cold_start_steps=10, distillation={"rollouts": 4})
    lines = [{"step": 20, "time": 0.0, "lr": 0.1, "ce": 1.0}, {"step": 25, "time": 4.0, "lr": 0.1, "ce": 1.0}]
    train(work, "seed1/sft", lines)
    with (work / "seed1/sft/metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lr"')  # killed while it wrote


def test_what_was_learned_is_told_before_between_and_after(tmp_path: Path) -> None:
    learned(tmp_path)
    record = proof.prove(tmp_path)
    arm = row(record["learning"], arm="td_opd4")
    assert arm["seeds"] == [1, 2]
    assert arm["rollouts"] == 4
    assert {when: values["kl"] for when, values in arm["seen"].items()} == pytest.approx(
        {"start": 0.6, "cold start": 0.3, "end": 0.15}
    )
    assert [values["vuss"] for values in arm["seen"].values()] == [40.0, 38.0, 36.0]
    assert (arm["spoken"]["tokens"], arm["spoken"]["rollout_s"]) == pytest.approx((7.0, 0.02))
    assert arm["update_s"] == 3.0  # of 10, 20 and 15 s for five; the cold start's updates and evaluations are no part
    assert record["runs"]["seed1-td_opd4"]["seen"]["start"]["kl"] == 0.8
    assert record["runs"]["seed1-td_opd4"]["skipped"] == 2
    assert record["runs"]["seed1-td_opd4"]["commit"] == "abc"
    plain = row(record["learning"], arm="sft")
    assert (plain["update_s"], plain["spoken"], plain["seen"], plain["rollouts"]) == (0.8, {}, {}, None)


def test_runs_that_are_not_alike_are_named(tmp_path: Path) -> None:
    learned(tmp_path)
    notes = proof.prove(tmp_path)["notes"]
    assert "seed1-sft: 25 of 30 updates made" in notes
    assert not any("unequal" in note for note in notes)
    train(tmp_path, "seed2/sft", [{"step": 40, "time": 0.0, "lr": 0.1}], steps=40)
    train(tmp_path, "seed2/base", [{"step": 50, "time": 0.0, "lr": 0.1}], steps=50)  # what all begin from
    assert "seed: arms of unequal length, [30, 40] updates" in proof.prove(tmp_path)["notes"]


def test_parameters_are_those_in_the_file(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    hear(tmp_path, "seed1-sft", {})
    train(tmp_path, "seed1/sft", [{"step": 30, "time": 0.0, "lr": 0.1}])
    folder = make_checkpoint("seed1/sft/model")
    with safe_open(folder / "model.safetensors", framework="np") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert row(proof.prove(tmp_path)["rates"], arm="sft")["parameters"] == stored


# ---- the tables ----


def test_the_pages_show_every_arm_and_only_what_may_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Any]
) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    tables: Callable[[], str] = docs.opd_proof_tables
    (results / "2026-01-01-cpu2-opd-proof.json").write_text(json.dumps(made))
    page = tables()
    assert "| half of `tiny` | opd4 | unknown | an4/test | 10.00, 0.00 | 7.07 | 5.00 [" in page
    assert "| half of `tiny` | an4/test | 1, 2 | opd4 | sft | -25.00 [" in page
    assert "better" not in page
    assert "- seed1-td: not heard" in page
    assert "an4/test: 2 clusters, interval unreliable." in page
    learned(tmp_path)
    (results / "2026-01-02-cpu2-opd-proof.json").write_text(json.dumps(whole(proof.prove(tmp_path))))
    page = tables()
    assert "| half of `tiny` | td_opd4 | cold start | 40.00 | 0.3 | 38 |" in page
    assert "| half of `tiny` | td_opd4 | 3.00 s | 20, 0, 0 | 4 | 7.0 | 0.0 % |" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def whole(record: dict[str, Any]) -> dict[str, Any]:
    """With the figures that a real evaluation has besides."""
    others = dict.fromkeys(("overlap", "jaccard", "teacher_mass", "student_mass", "student_entropy"), 0.5)
    for arm in record["learning"]:
        for values in arm["seen"].values():
            values.update(others)
    return record
