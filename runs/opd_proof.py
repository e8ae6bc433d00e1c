"""What the proof of distillation found, out of its folder: error rates, what may be said of them, how it was learned.

    python runs/opd_proof.py WORK_FOLDER [TARGET_FOLDER]     # what runs/opd-proof.sh left; bench/results

Seeds are pooled utterance by utterance: three models that hear a clip do not make it three clips, nor its speaker three
speakers. So an interval tells of other speakers, and of these seeds; how seeds differ stands beside it.
"""

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch

from arkasr import checkpoint
from arkasr import config as configs
from arkasr.errors import UsageError
from arkasr.evaluate import statistics, study
from arkasr.evaluate.resampling import row_id
from arkasr.evaluate.score import Scored, SetScore
from arkasr.metrics import Counts, count
from arkasr.metrics.regimes import NONE
from arkasr.model import ArkASR
from arkasr.train import loop

ROOT = Path(__file__).parents[1]
NORMALIZER = "plain"
ALONE = "alone"  # models that have no seeds: the teacher, and the shipped tiny
ARMS = ("base", "sft", "td", "opd1", "opd4", "td_opd4")
BETWEEN = (("opd4", "opd1"), ("td_opd4", "opd4"), ("td_opd4", "td"))
# Of what a training line says: means a rollout, a position (lost), and an utterance (seconds).
SPOKEN = ("tokens", "distinct", "stopped", "empty", "fallback", "lost", "rollout_s", "teacher_s", "student_s")

Facts = dict[str, Any]
Sets = Mapping[str, SetScore]


class Student(NamedTuple):
    """A model by its students' group ("seed", "tiny" or ALONE) and arm."""

    group: str
    arm: str


@dataclass(frozen=True)
class Heard:
    """What the models of WORK/eval made of each set, by student and seed, and what was left out or is odd."""

    scores: Mapping[Student, Mapping[int, Sets]]
    notes: tuple[str, ...]

    def arms(self, group: str) -> list[Student]:
        """Those of a group, in the order of ARMS."""
        return sorted((student for student in self.scores if student.group == group), key=_order)

    def sets(self, student: Student) -> list[str]:
        """The names of those it heard with any seed."""
        return sorted({name for sets in self.scores[student].values() for name in sets})

    def on(self, student: Student, name: str) -> dict[int, SetScore]:
        """Scores on a set, by seed."""
        return {seed: sets[name] for seed, sets in sorted(self.scores[student].items()) if name in sets}

    def shared(self, first: Student, second: Student, name: str) -> tuple[int, ...]:
        """Seeds with which both heard a set; a student without seeds is there for each."""
        ours, theirs = self.on(first, name), self.on(second, name)
        return tuple(seed for seed in ours if seed in theirs or (theirs and second.group == ALONE))


def _order(student: Student) -> tuple[str, int, str]:
    known = student.arm in ARMS
    return student.group, ARMS.index(student.arm) if known else len(ARMS), student.arm


def _placed(name: str) -> tuple[Student, int]:
    """Whose folder "seed2-opd4" or "teacher" is."""
    found = re.fullmatch(r"(seed|tiny)(\d+)-(.+)", name)
    return (Student(found[1], found[3]), int(found[2])) if found else (Student(ALONE, name), 0)


def hearings(work: Path) -> Heard:
    """Score all that `ark-asr eval run` left; a set that was heard in part has no rate.

    Raises:
        UsageError: there is nothing, or what `study.read` refuses.
    """
    scores: dict[Student, dict[int, Sets]] = defaultdict(dict)
    notes: list[str] = []
    folders = sorted(path for path in work.glob("eval/*") if path.is_dir())
    if not folders:
        raise UsageError(f"{work}: no results in eval/; give the working folder of runs/opd-proof.sh")
    for folder in folders:
        read = study.read(folder, normalizer=NORMALIZER, regime=NONE)
        notes += [f"eval/{folder.name} is left out: {note}" for note in read.notes]
        notes += [f"eval/{folder.name}: {one.failed} rows of {one.name} failed" for one in read.scores if one.failed]
        if not read.notes:
            student, seed = _placed(folder.name)
            scores[student][seed] = {one.name: one for one in read.scores}
    for group in sorted({student.group for student in scores} - {ALONE}):
        seeds = sorted({seed for student, of in scores.items() if student.group == group for seed in of})
        expected = [Student(group, arm) for arm in ARMS if (group, arm) != ("tiny", "base")]
        notes += [
            f"{group}{seed}-{student.arm}: not heard"
            for student in expected
            for seed in seeds
            if seed not in scores.get(student, {})
        ]
    return Heard(scores, tuple(notes))


# ---- rates and comparisons ----


def by_character(score: SetScore) -> SetScore:
    """The same texts, compared by character without spaces."""
    rows = tuple(_characters(scored) for scored in score.rows)
    return replace(score, rows=rows, counts=Counts.total(row.counts for row in rows))


def _characters(scored: Scored) -> Scored:
    wanted, heard = (tuple("".join(words)) for words in (scored.reference, scored.hypothesis))
    counts = count(wanted, heard, merge_compounds=False)
    return replace(scored, reference=wanted, hypothesis=heard, counts=counts)


def pooled(scores: Sequence[SetScore]) -> SetScore:
    """One score of a set heard by several models: the tokens and errors of each row are all theirs together.

    Raises:
        UsageError: they heard different rows.
    """
    tables = [{(row_id(scored.row), scored.row.text): scored for scored in score.rows} for score in scores]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise UsageError(f"{scores[0].name}: seeds heard different rows; run `ark-asr eval run` on one set for all")
    rows = []
    for key, first in tables[0].items():
        same = [table[key] for table in tables]
        wanted = tuple(word for scored in same for word in scored.reference)
        heard = tuple(word for scored in same for word in scored.hypothesis)
        rows.append(replace(first, reference=wanted, hypothesis=heard, counts=Counts.total(s.counts for s in same)))
    return replace(scores[0], rows=tuple(rows), counts=Counts.total(row.counts for row in rows))


def rate(seeds: Mapping[int, SetScore]) -> Facts:
    """Error rates in per cent: of each seed, their mean and standard deviation, and all together with an interval."""
    rates = {seed: 100 * score.counts.rate for seed, score in seeds.items()}
    together = pooled(list(seeds.values()))
    sure = statistics.uncertainty(together.rows)
    assert sure is not None, "a set without words"
    return {
        "seeds": {str(seed): round(value, 3) for seed, value in rates.items()},
        "mean": round(fmean(rates.values()), 3),
        "spread": round(stdev(rates.values()), 3) if len(rates) > 1 else None,
        "pooled": round(100 * sure.rate, 3),
        "interval": [round(100 * end, 3) for end in (sure.headline.low, sure.headline.high)],
        "insertions": together.counts.insertions,
        "deletions": together.counts.deletions,
        "substitutions": together.counts.substitutions,
        "reference": together.counts.reference_words,
        "clips": sure.utterances,
        "clusters": sure.clusters,
        "note": sure.note,
    }


def rates(heard: Heard, runs: Mapping[str, Facts]) -> list[Facts]:
    """A row for each student and set."""
    sizes = {_placed(name)[0]: run["parameters"] for name, run in runs.items() if run["parameters"]}
    rows = []
    for student in sorted(heard.scores, key=_order):
        for name in heard.sets(student):
            seeds = heard.on(student, name)
            characters = {seed: by_character(score) for seed, score in seeds.items()}
            rows.append({
                **student._asdict(), "set": name, "parameters": sizes.get(student),
                "wer": rate(seeds), "cer": rate(characters),
            })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Pair:
    """Two students to be compared on a set, of the seeds that both have; `second` may be one without seeds."""

    first: Student
    second: Student
    seeds: tuple[int, ...]
    name: str

    def difference(self, heard: Heard) -> statistics.Difference:
        """Of the first one's rate from the second's."""
        scores = heard.on(self.first, self.name), heard.on(self.second, self.name)
        first, second = (
            pooled([of[0 if student.group == ALONE else seed] for seed in self.seeds])
            for student, of in zip((self.first, self.second), scores, strict=True)
        )
        (found,) = statistics.compare([first], [second]).sets
        return found.difference


def pairs(heard: Heard, group: str) -> Iterator[tuple[Student, Student]]:
    """What is asked: against training on the transcripts, arms against each other, and against the beginning."""
    arms = heard.arms(group)
    shipped = Student(ALONE, "tiny")
    if group == "tiny":
        yield from ((arm, shipped) for arm in arms if shipped in heard.scores)
        return
    asked = [(arm.arm, "sft") for arm in arms if arm.arm not in ("base", "sft")]
    asked += [*BETWEEN, *((arm.arm, "base") for arm in arms if arm.arm != "base")]
    for first, second in asked:
        pair = Student(group, first), Student(group, second)
        if all(student in arms for student in pair):
            yield pair


def comparisons(heard: Heard) -> list[Facts]:
    """All pairs, seeds together, and each seed of the tiny ones alone; Holm's correction is over a list and set."""
    lists: dict[tuple[str, str, bool], list[Pair]] = defaultdict(list)
    for group in ("seed", "tiny"):
        for first, second in pairs(heard, group):
            for name in heard.sets(first):
                if seeds := heard.shared(first, second, name):
                    lists[group, name, False].append(Pair(first, second, seeds, name))
                    if group == "tiny" and len(seeds) > 1:
                        lists[group, name, True] += [Pair(first, second, (seed,), name) for seed in seeds]
    return [row for key, asked in lists.items() for row in compared(heard, asked, alone=key[2])]


def compared(heard: Heard, asked: Sequence[Pair], *, alone: bool) -> Iterator[Facts]:
    """A row for each of a list of pairs, in percentage points; below 0 the first is better."""
    differences = [pair.difference(heard) for pair in asked]
    corrected = statistics.holm([difference.p for difference in differences])
    for pair, found, p in zip(asked, differences, corrected, strict=True):
        low, high = found.headline.low, found.headline.high
        yield {
            "group": pair.first.group, "set": pair.name, "first": pair.first.arm, "second": pair.second.arm,
            "seeds": list(pair.seeds), "by_seed": alone,
            **{
                name: round(100 * value, 3)
                for name, value in (("first_wer", found.rate_first), ("second_wer", found.rate_second),
                                    ("difference", found.delta), ("low", low), ("high", high))
            },
            "p": found.p, "p_holm": p, "comparisons": len(asked),
            "verdict": statistics.verdict(found.headline, p), "note": found.note,
        }  # fmt: skip


# ---- what the runs wrote of themselves ----


def runs_of(work: Path) -> tuple[dict[str, Facts], list[str]]:
    """What each run of training tells, by the name it is heard under, and what is odd."""
    found: dict[str, Facts] = {"tiny": {"parameters": parameters(checkpoint.open_checkpoint("tiny").folder)}}
    notes = []
    updates: dict[str, set[int]] = defaultdict(set)
    for pattern in ("teacher", "seed*/*", "tiny*/*"):
        for path in sorted(work.glob(f"{pattern}/metrics.jsonl")):
            name = "-".join(path.parent.relative_to(work).parts)
            run = found[name] = told(path.parent)
            notes += [f"{name}: {run['done']} of {run['steps']} updates made"] if run["done"] != run["steps"] else []
            student, _ = _placed(name)
            updates[student.group] |= {run["steps"]} if student.arm != "base" else set()
    for group in ("seed", "tiny"):
        if len(updates[group]) > 1:
            notes.append(f"{group}: arms of unequal length, {sorted(updates[group])} updates")
    return found, notes


def told(run: Path) -> Facts:
    """Config and metrics of one run.

    `seen` has the evaluations before the first update, after the cold start and after the last update; `spoken` means
    over the lines of on-policy training; `update_s` is the median wall time of an update, an on-policy one if any is.
    """
    facts = json.loads((run / "config.json").read_text())
    config = facts["config"]
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    seen = {line["step"]: _evaluation(line) for line in lines if "eval_wer" in line}
    cold, steps = config.get("cold_start_steps", 0), config["steps"]
    moments = {"start": 0, **({"cold start": cold} if cold else {}), "end": steps}
    spoken = [line for line in lines if "kl" in line]
    gaps = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in pairwise(lines)
        if "lr" in before and "lr" in after and (not spoken or ("kl" in before and "kl" in after))
    ]
    return {
        "commit": facts["commit"],
        "parameters": parameters(run / "model") if (run / "model" / "config.json").exists() else None,
        "steps": steps,
        "done": max((line["step"] for line in lines), default=0),
        "skipped": max((line.get("skipped", 0) for line in lines), default=0),
        "rollouts": config["distillation"]["rollouts"] if "distillation" in config else None,
        "update_s": round(median(gaps), 3) if gaps else None,
        "seen": {moment: seen[step] for moment, step in moments.items() if step in seen},
        "spoken": {name: fmean(line[name] for line in spoken) for name in SPOKEN} if spoken else {},
    }


def _evaluation(line: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}


def parameters(folder: Path) -> int:
    """Of the model whose config.json is in a folder."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in ArkASR(configs.load(folder)).parameters())


def learning(runs: Mapping[str, Facts]) -> list[Facts]:
    """What the runs of each arm tell, as means over its seeds."""
    arms: dict[Student, dict[int, Facts]] = defaultdict(dict)
    for name, run in runs.items():
        student, seed = _placed(name)
        if student.group != ALONE:
            arms[student][seed] = run
    rows = []
    for student in sorted(arms, key=_order):
        of = list(arms[student].values())
        moments = {moment for run in of for moment in run["seen"]}
        times = [run["update_s"] for run in of if run["update_s"] is not None]
        rows.append({
            **student._asdict(), "seeds": sorted(arms[student]), "rollouts": of[0]["rollouts"],
            "update_s": round(fmean(times), 3) if times else None,
            "seen": {
                moment: _means([run["seen"][moment] for run in of if moment in run["seen"]])
                for moment in ("start", "cold start", "end") if moment in moments
            },
            "spoken": _means([run["spoken"] for run in of if run["spoken"]]),
        })  # fmt: skip
    return rows


def _means(of: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(f"{fmean(one[name] for one in of):.6g}") for name in (of[0] if of else ())}


# ---- the record ----


def prove(work: Path) -> Facts:
    """The record of all that is in a working folder."""
    heard = hearings(work)
    runs, notes = runs_of(work)
    return {
        "what": "opd-proof",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "normalizer": NORMALIZER,
        "notes": [*heard.notes, *notes],
        "rates": rates(heard, runs),
        "comparisons": comparisons(heard),
        "learning": learning(runs),
        "runs": runs,
    }


def show(record: Facts) -> None:
    """Print rates, what may be said of them, and what is odd."""
    for row in record["rates"]:
        wer, cer, size = row["wer"], row["cer"], row["parameters"]
        ends = "[{:.2f}, {:.2f}]".format(*wer["interval"])
        seeds = " ".join(f"{value:.2f}" for value in wer["seeds"].values())
        print(f"{row['group']:5} {row['arm']:8} {row['set']:10} {size or 'unknown':>9} parameters: "
              f"WER {wer['pooled']:6.2f} % {ends}, of seeds {seeds}; CER {cer['pooled']:6.2f} %")  # fmt: skip
    for row in record["comparisons"]:
        seeds = ",".join(map(str, row["seeds"]))
        print(f"{row['group']:5} {row['set']:10} seeds {seeds:5} {row['first']:>8} against {row['second']:5}: "
              f"{row['difference']:+6.2f} [{row['low']:+.2f}, {row['high']:+.2f}] p {row['p']:.4f} "
              f"Holm {row['p_holm']:.4f}: {row['verdict']}")  # fmt: skip
    for note in record["notes"]:
        print(f"note: {note}", file=sys.stderr)


def main(work: Path, target: Path) -> None:
    record = prove(work)
    show(record)
    path = target / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-opd-proof.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "bench" / "results")
