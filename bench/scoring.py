"""Time and memory of scoring: many short utterances, one alignment of an hour's call, resampling; writes bench/results.

    python bench/scoring.py [--out FILE]

Texts are made up, of English words with numbers, contractions, fillers and compounds, and hypotheses of other edits for
each system. Every run is a process of its own on one core. Linux only, for it reads /proc.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arkasr import metrics
from arkasr.evaluate import manifest
from arkasr.evaluate.manifest import Row
from arkasr.evaluate.score import SetScore, score
from arkasr.evaluate.statistics import compare, uncertainty
from arkasr.metrics import align, english, normalize, numbers
from arkasr.train import loop

ROOT = Path(__file__).parents[1]
UTTERANCES, RESAMPLED, LONG_WORDS, SPEAKERS = 100_000, 10_000, 8_000, 200
EDITED = 0.1  # share of words
RUNS = 3
COMMON = """the of and a to in is you that it he was for on are as with his they at be this have from or had by word but
not what all were we when your said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who its now find long down day did get come made may part over new sound take only little work know
place year live me back give most very after thing our just name good sentence man think say great where help through
much before line right too mean old any same tell boy follow came want show also around form three small set put end
does another well large must big even such because turn here why ask went men read need land different home us move try
kind hand picture again change off play spell air away animal house point page letter mother answer found study still
learn should world high every near add food between own below country plant last school father keep tree never start
city earth eye light thought head under story saw left few while along might close something seem next hard open example
begin life always those both paper together got group often run""".split()  # noqa: SIM905 - 270 quoted words are hard to read


# ---- texts ----


def phrases() -> list[tuple[float, list[str]]]:
    """(share, phrases): a quarter of the words are from the normalizer's own tables, which is more than in speech."""
    tables = english.tables()
    counts = [" ".join(pair) for pair in itertools.product(numbers.TENS, numbers.UNITS[:9])]
    counts += [f"{number} hundred and {rest}" for number in numbers.UNITS[:9] for rest in numbers.TENS]
    counts += ["$3,500", "12.5%", "the 21st", "nineteen ninety five", "two point five million", "1,024", "oh seven"]
    contracted = ["don't", "it's", "we're", "they've", "I'll", "can't", "won't", "that's", "you'd", "he's", "let's"]
    return [
        (0.60, COMMON),
        (0.25, [*tables["spelling"], *tables["spelling"].values(), *tables["oal"]["names"]]),
        (0.05, counts),
        (0.05, contracted),
        (0.03, tables["fillers"]["oal"]),
        (0.02, [text for pair in tables["oal"]["compounds"] for text in pair]),
    ]


def texts(rng: random.Random) -> Iterator[str]:
    """Utterances of about ten words with capitals and marks, no two the same."""
    shares, lists = zip(*phrases(), strict=True)
    seen = set()
    while True:
        words = [rng.choice(chosen) for chosen in rng.choices(lists, shares, k=rng.randint(6, 13))]
        words[rng.randrange(len(words))] += ","
        text = " ".join(words).capitalize() + rng.choice(".?!")
        if text not in seen:
            seen.add(text)
            yield text


def heard(text: str, rng: random.Random) -> str:
    """What a recognizer without capitals and marks makes of it."""
    words: list[str] = []
    for word in re.sub(r"[,?!]|\.$", "", text.lower()).split():
        chance = rng.random() / EDITED
        if chance >= 1 / 3:  # the first third is deleted, the second replaced, the last followed by one too many
            words.append(rng.choice(COMMON) if chance < 2 / 3 else word)
        if 2 / 3 <= chance < 1:
            words.append(rng.choice(COMMON))
    return " ".join(words)


def write(path: Path, num_rows: int, *, system: int) -> Path:
    """A manifest; all systems hear the same utterances."""
    made, edits = texts(random.Random(0)), random.Random(1 + system)
    rows = (
        Row(
            f"{number}.flac",
            4.0,
            0.1,
            text,
            heard(text, edits),
            x={"id": f"{number}", "speaker": f"{number % SPEAKERS}"},
        )
        for number, text in enumerate(itertools.islice(made, num_rows))
    )
    path.write_text("".join(f"{manifest.line(row)}\n" for row in rows))
    return path


# ---- what is measured, each in a process of its own ----


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds, and what came out."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def memory_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (most so far) of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])


def without_kaldialign() -> None:
    """As where it is not installed."""
    sys.modules["kaldialign"] = None  # type: ignore[assignment]  # how Python marks what cannot be imported


class _Timed:
    """Adds up the seconds in functions of one text."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def of(self, function: Callable[[str], Any]) -> Callable[[str], Any]:
        """The function, timed."""

        def timed(text: str) -> Any:
            started = time.perf_counter()
            result = function(text)
            self.total_s += time.perf_counter() - started
            return result

        return timed


def many(path: Path) -> dict[str, Any]:
    """Reading and scoring a manifest; then the counting of errors alone, once more."""
    read_s, predictions = seconds(lambda: manifest.read(path))
    rule = normalize.normalizer(normalize.DEFAULT)
    timed = _Timed()
    rule = replace(rule, text=timed.of(rule.text), tokens=timed.of(rule.tokens))
    score_s, scored = seconds(lambda: _score(predictions, rule))
    aligning_s, _ = seconds(
        lambda: [metrics.count(row.reference, row.hypothesis, merge_compounds=True) for row in scored.rows]
    )
    return {
        "utterances": len(scored.rows),
        "distinct_texts": len({text for row in predictions.rows for text in (row.text, row.pred_text)}),
        "words": scored.counts.reference_words,
        "wer_percent": scored.wer,
        "all_s": read_s + score_s,
        "read_s": read_s,
        "score_s": score_s,
        "normalizing_s": timed.total_s,
        "aligning_s": aligning_s,
        "peak_mb": memory_bytes("VmHWM") / 1e6,
    }


def _score(predictions: manifest.Manifest, rule: normalize.Normalizer) -> SetScore:
    return score(predictions, rule, name="made-up", regime=None)


def many_own(path: Path) -> dict[str, Any]:
    """The same by our own aligner."""
    without_kaldialign()
    return many(path)


def long_pair() -> tuple[list[str], list[str]]:
    """A reference and a hypothesis of as many words."""
    made, edits = texts(random.Random(0)), random.Random(1)
    utterances = list(itertools.islice(made, LONG_WORDS))
    rule = normalize.normalizer(normalize.DEFAULT)
    reference = rule.tokens(rule.text(" ".join(utterances[: LONG_WORDS // 5])))
    hypothesis = rule.tokens(rule.text(" ".join(heard(text, edits) for text in utterances[: LONG_WORDS // 5])))
    return reference[:LONG_WORDS], hypothesis[:LONG_WORDS]


def long_own(_: Path) -> dict[str, Any]:
    """One long alignment by our own aligner."""
    pair = long_pair()
    before = memory_bytes("VmRSS")
    align_s, edits = seconds(lambda: align.align(*pair, merge_compounds=True))
    errors = sum(edit.kind not in {"equal", "compound"} for edit in edits)
    return _long(pair, errors, align_s, memory_bytes("VmHWM") - before)


def long_kaldialign(_: Path) -> dict[str, Any]:
    """One long alignment by kaldialign."""
    import kaldialign  # type: ignore[import-untyped, unused-ignore]

    pair = long_pair()
    before = memory_bytes("VmRSS")
    align_s, _edits = seconds(lambda: kaldialign.align(*pair, "*", merge_compounds=True))
    peak = memory_bytes("VmHWM") - before
    return _long(pair, kaldialign.edit_distance(*pair, merge_compounds=True)["total"], align_s, peak)


def _long(pair: tuple[list[str], list[str]], errors: int, align_s: float, peak: int) -> dict[str, Any]:
    lengths = [len(words) for words in pair]
    return {"words": lengths, "errors": errors, "align_s": align_s, "more_memory_mb": peak / 1e6}


def resampling(path: Path) -> dict[str, Any]:
    """Intervals of one system, and two compared, after scoring."""
    rule = normalize.normalizer(normalize.DEFAULT)
    first, second = (_score(manifest.read(path.with_name(f"{name}.jsonl")), rule) for name in ("first", "second"))
    uncertainty_s, sure = seconds(lambda: uncertainty(first.rows))
    compare_s, _ = seconds(lambda: compare([first], [second]))
    return {
        "utterances": len(first.rows),
        "clusters": sure.clusters,
        "uncertainty_s": uncertainty_s,
        "compare_s": compare_s,
        "peak_mb": memory_bytes("VmHWM") / 1e6,
    }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "many": many,
    "many, own aligner": many_own,
    "long": long_own,
    "long, kaldialign": long_kaldialign,
    "resampling": resampling,
}


# ---- the runs ----


def measure(case: str, path: Path) -> dict[str, Any]:
    """Medians of the times, the largest of the memories, and what every run gave."""
    command = [sys.executable, __file__, "--child", case, str(path)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | threads
    runs = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
        for _ in range(RUNS)
    ]
    result = {"case": case, **runs[0]}
    for name in result:
        if name.endswith("_s"):
            result[name] = round(statistics.median(run[name] for run in runs), 3)
        elif name.endswith("_mb"):
            result[name] = round(max(run[name] for run in runs), 1)
    times = [{name: round(value, 3) for name, value in run.items() if name.endswith("_s")} for run in runs]
    print("; ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    return {**result, "runs": times}


def main() -> None:
    """Measure, print, write; or be the measured process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file to write instead of the one of the day in bench/results")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "MANIFEST"), help="one run in this process, as JSON")
    asked = parser.parse_args()
    if asked.child:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(CASES[asked.child[0]](Path(asked.child[1]))))
        return
    others_load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "many.jsonl", UTTERANCES, system=0)
        for system, name in enumerate(("first.jsonl", "second.jsonl")):
            write(path.with_name(name), RESAMPLED, system=system)
        cases = [measure(case, path) for case in CASES]
    record = {
        "what": "scoring: made-up English texts, one core",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **loop.provenance(),
        "others_load": others_load,  # before the first run: what else the machine was doing
        "packages": normalize.versions(),
        "normalizer": normalize.DEFAULT,
        "note": "medians of 3 processes, largest memories; aligning is measured again, after scoring",
        "cases": cases,
    }
    target = asked.out or ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-scoring.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
