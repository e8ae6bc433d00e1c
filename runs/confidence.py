"""Measures how far cf_voice's confidences can be believed, and fits the numbers of its `CALIBRATIONS`.

    python runs/confidence.py SPEECH_FOLDER [MODEL]

Hears AN4 test, none of whose speakers `tiny` was trained on, under every condition of the standard robustness suite
that this machine can make. The curve of each speaker is fitted on the others, so that no figure is of what was fitted;
the numbers to put into cf_voice.py are of all. FSDD, read English and noises are other domains, and fitted nowhere.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arkasr import cf_voice, checkpoint, endpoint, engines, files, metrics, record
from arkasr.cf_voice import ARKASRBackend, Calibration, STTSegment
from arkasr.data import Utterance, read_records
from arkasr.engines import Dtype
from arkasr.evaluate import resampling, robust
from arkasr.metrics.align import align

ROOT = Path(__file__).parents[1]
BINS = 10
RESAMPLES, SEED = 2000, 20261123
THREADS = 8
STEPS = 30  # of Newton's method; it has converged long before
PARTS = ("all", "clean")
Floats = npt.NDArray[np.float64]

MEMORY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from arkasr.cf_voice import make_ark_backend

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

print(peak())
with make_ark_backend(sys.argv[1]) as backend:
    print(peak())
    clips = [Path(name).read_bytes() for name in sys.argv[2:]]
    backend.transcribe(clips[0])
    print(peak())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(backend.transcribe, clips))
    print(peak())
assert "torch" not in sys.modules
"""


@dataclass(frozen=True)
class Heard:
    """A clip with words: its raw segments, and how many steps of the words' alignment are right."""

    speaker: str
    condition: str
    segments: tuple[STTSegment, ...]
    right: int
    steps: int

    def confidence(self, calibration: Calibration | None = None) -> float:
        """As the backend gives it."""
        if calibration is None:
            return cf_voice.overall(self.segments)
        return cf_voice.overall([replace(s, confidence=calibration(s.confidence)) for s in self.segments])


def clips(manifest: Path) -> list[tuple[Utterance, str]]:
    """The test clips of a set, and who speaks."""
    found = []
    for line in read_records(manifest, split="test"):
        assert isinstance(line.utterance, Utterance)
        found.append((line.utterance, str(line.fields.get("speaker"))))
    return found


def hear(
    backend: ARKASRBackend, spoken: Sequence[tuple[Utterance, str]], conditions: Sequence[robust.Condition]
) -> Iterator[Heard | None]:
    """Every clip under every condition; None where nothing was heard."""
    waveforms = [utterance.waveform() for utterance, _ in spoken]
    with ThreadPoolExecutor(THREADS) as pool:
        for condition in conditions:

            def said(n: int, condition: robust.Condition = condition) -> Heard | None:
                utterance, speaker = spoken[n]
                others = robust.among(waveforms.__getitem__, len(waveforms), this=n)
                harder = robust.perturb(waveforms[n], condition, id=utterance.id, others=others)
                result = backend.transcribe(endpoint.encode(harder, "wav"))
                words = metrics.words(utterance.text), metrics.words(result.text)
                kinds = [edit.kind for edit in align(*words, merge_compounds=False)]
                heard = Heard(speaker, condition.name, tuple(result.segments), kinds.count("equal"), len(kinds))
                return heard if result.text else None

            yield from pool.map(said, range(len(spoken)))


def counts(heard: Sequence[Heard]) -> tuple[Floats, Floats]:
    """Right steps, and all steps, of each clip."""
    return np.array([h.right for h in heard], float), np.array([h.steps for h in heard], float)


def fit(heard: Sequence[Heard]) -> Calibration:
    """The likeliest curve, each step of an alignment an observation; by Newton's method."""
    raw = np.clip([h.confidence() for h in heard], 1e-9, 1 - 1e-9)
    x = np.stack([np.log(raw / (1 - raw)), np.ones(len(raw))], axis=1)
    right, steps = counts(heard)
    weights = np.zeros(2)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-x @ weights))
        weights += np.linalg.solve((x.T * (steps * p * (1 - p))) @ x, x.T @ (right - steps * p))
    return Calibration(slope=round(float(weights[0]), 3), offset=round(float(weights[1]), 3))


def isotonic(train: Sequence[Heard], test: Sequence[Heard]) -> Floats:
    """The rising steps that fit best, for comparison: neighbours that fall are pooled."""
    pools: list[list[float]] = []  # highest confidence, right, steps
    for h in sorted(train, key=Heard.confidence):
        pools.append([h.confidence(), h.right, h.steps])
        while len(pools) > 1 and pools[-2][1] * pools[-1][2] >= pools[-1][1] * pools[-2][2]:
            highest, right, steps = pools.pop()
            pools[-1] = [highest, pools[-1][1] + right, pools[-1][2] + steps]
    ends, rates = np.array([p[0] for p in pools]), np.array([p[1] / p[2] for p in pools])
    places = np.searchsorted(ends, [h.confidence() for h in test])
    return rates[np.minimum(places, len(rates) - 1)]


def bins_of(p: Floats, right: Floats, steps: Floats) -> list[dict[str, float]]:
    """What was promised and what was right, by tenths of the confidence."""
    tenth = np.minimum((p * BINS).astype(int), BINS - 1)
    rows = []
    for n in range(BINS):
        there = tenth == n
        total = steps[there].sum()
        if total:
            promised, got = (p[there] * steps[there]).sum() / total, right[there].sum() / total
            rows.append({"from": n / BINS, "clips": int(there.sum()), "steps": int(total),
                         "promised": round(float(promised), 3), "right": round(float(got), 3)})  # fmt: skip
    return rows


def errors(p: Floats, right: Floats, steps: Floats) -> tuple[float, float]:
    """Expected calibration error over `BINS` bins, and Brier score, each step of an alignment counted once."""
    tenth = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = np.bincount(tenth, weights=p * steps - right, minlength=BINS)
    brier = right * (1 - p) ** 2 + (steps - right) * p**2
    return float(np.abs(gaps).sum() / steps.sum()), float(brier.sum() / steps.sum())


def report(p: Floats, heard: Sequence[Heard], *, intervals: bool) -> dict[str, Any]:
    """Of confidences: errors, curve, and what the protocol's threshold lets through."""
    right, steps = counts(heard)
    ece, brier = errors(p, right, steps)
    passed = p >= cf_voice.DEFAULT_THRESHOLD
    report: dict[str, Any] = {
        "clips": len(heard), "steps": int(steps.sum()), "right": round(right.sum() / steps.sum(), 3),
        "mean": round(float((p * steps).sum() / steps.sum()), 3), "ece": round(ece, 4), "brier": round(brier, 4),
        "passed": round(float(passed.mean()), 3),
        "right_of_passed": round(right[passed].sum() / steps[passed].sum(), 3) if passed.any() else None,
        "bins": bins_of(p, right, steps),
    }  # fmt: skip
    if intervals:
        speakers = sorted({h.speaker for h in heard})
        of = np.array([speakers.index(h.speaker) for h in heard])
        rng, samples = np.random.default_rng(SEED), []
        for _ in range(RESAMPLES):
            times = np.bincount(rng.integers(len(speakers), size=len(speakers)), minlength=len(speakers))[of]
            samples.append(errors(p, right * times, steps * times))
        for name, values in zip(("ece", "brier"), np.array(samples).T, strict=True):
            report[f"{name}_95"] = [round(end, 4) for end in asdict(resampling.interval(values)).values()]
    return report


def reliability(heard: Sequence[Heard]) -> dict[str, Any]:
    """Of AN4: raw, calibrated on the other speakers, and by isotonic steps of the other speakers."""
    raw = np.array([h.confidence() for h in heard])
    ours, steps, fits = np.zeros(len(heard)), np.zeros(len(heard)), {}
    for speaker in sorted({h.speaker for h in heard}):
        train = [h for h in heard if h.speaker != speaker]
        held = np.array([h.speaker == speaker for h in heard])
        test = [h for h in heard if h.speaker == speaker]
        fits[speaker] = fit(train)
        ours[held] = [h.confidence(fits[speaker]) for h in test]
        steps[held] = isotonic(train, test)
    parts: dict[str, Any] = {}
    for part in PARTS:
        kept = np.array([part in {"all", h.condition} for h in heard])
        there = [h for h in heard if part in {"all", h.condition}]
        methods = {"raw": raw, "calibrated": ours, "isotonic": steps}
        parts[part] = {name: report(p[kept], there, intervals=True) for name, p in methods.items()}
    return {**parts, "fitted_without": {speaker: asdict(curve) for speaker, curve in fits.items()}}


def noises(folder: Path) -> list[tuple[Utterance, str]]:
    """Recordings of no words."""
    return [(Utterance(path.name, path, "", 0.0), "nobody") for path in sorted(folder.rglob("*.flac"))]


def elsewhere(
    backend: ARKASRBackend, spoken: Sequence[tuple[Utterance, str]], calibration: Calibration
) -> dict[str, Any]:
    """A set that nothing was fitted on."""
    heard = [h for h in hear(backend, spoken, [robust.CLEAN]) if h is not None]
    how = {"raw": [h.confidence() for h in heard], "calibrated": [h.confidence(calibration) for h in heard]}
    return {"without_text": len(spoken) - len(heard)} | {
        name: report(np.array(p), heard, intervals=False) for name, p in how.items()
    }


def measured(speech: Path, model: str) -> dict[str, Any]:
    """Everything."""
    source = checkpoint.open_checkpoint(model)
    spoken = clips(speech / "an4" / "manifest.jsonl")
    conditions, notes = robust.runnable(robust.suite("standard"), recorded=False)

    def backend(dtype: Dtype) -> ARKASRBackend:
        engine = engines.load_engine(source, device="cpu", dtype=dtype)
        return ARKASRBackend(engine, source.rules, model_name=model)

    with backend("auto") as raw, backend("float32") as exact:
        everything = list(hear(raw, spoken, conditions))
        heard = [h for h in everything if h is not None]
        shipped = fit(heard)
        in_float = [h for h in hear(exact, spoken, conditions) if h is not None]
        curve = np.array([h.confidence(shipped) for h in in_float])
        return {
            "weights": {path.name: asdict(files.measure(path)) for path in source.shards},
            "calibration": asdict(shipped),
            "an4_test": {
                "conditions": [c.name for c in conditions], "notes": notes,
                "heard": len(everything), "without_text": len(everything) - len(heard),
                "of_several_segments": sum(len(h.segments) > 1 for h in heard), **reliability(heard),
            },
            "an4_test_float32_same_numbers": report(curve, in_float, intervals=False),
            **{name: elsewhere(raw, clips(speech / name / "manifest.jsonl"), shipped)
               for name in ("fsdd", "kathleen_arctic")},
            "esc10": elsewhere(raw, noises(speech / "esc10"), shipped),
        }  # fmt: skip


def memory(speech: Path, model: str) -> dict[str, int]:
    """Peak resident MiB of a fresh process: imported, loaded, after one clip, after 64 of eight threads."""
    names = [str(utterance.audio) for utterance, _ in clips(speech / "an4" / "manifest.jsonl")[:64]]
    done = subprocess.run([sys.executable, "-c", MEMORY, model, *names], capture_output=True, text=True, check=True)
    return dict(zip(("imported", "loaded", "one_clip", "eight_threads"), map(int, done.stdout.split()), strict=True))


def main(speech: Path, model: str) -> None:
    """Measure, print, write."""
    head = {
        "what": "confidence", "command": " ".join(["python", *sys.argv]), **record.session(),
        "hardware": record.hardware(), "versions": record.versions(),
    }  # fmt: skip
    result = {**head, "peak_rss_mib": memory(speech, model), **measured(speech, model)}
    for part in PARTS:
        for how, got in result["an4_test"][part].items():
            print(f"an4 {part}, {how}: ECE {got['ece']} {got['ece_95']}, Brier {got['brier']} {got['brier_95']}")
    print(f"calibration: {result['calibration']}; peak RSS: {result['peak_rss_mib']} MiB")
    of = "" if model == "tiny" else f"-{Path(model).name}"
    target = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-confidence{of}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tiny")
