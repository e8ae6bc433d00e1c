"""What is in folders of results: read, scored, and put into tables side by side.

folder of `run` -> Results -> score_table, comparison_table, robustness_tables
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arkasr.errors import UsageError
from arkasr.evaluate import manifest, statistics
from arkasr.evaluate.manifest import Manifest
from arkasr.evaluate.report import Cell, Table
from arkasr.evaluate.score import Average, SetScore, averages, score
from arkasr.evaluate.statistics import Difference
from arkasr.metrics import normalize, regimes
from arkasr.metrics.normalize import Normalizer
from arkasr.metrics.regimes import NONE

CLEAN = "clean"
PARTS = ("system", "options", "hardware", "versions")  # of an entry of run.json, that reports show


@dataclass(frozen=True)
class Results:
    """What one system said, scored.

    Attributes:
        name: of the model.
        facts: what run.json says of it, in words; empty for somebody else's results.
        scores: of sets as they are.
        manifests: of `scores`, by the names of the sets.
        harder: of sets under the conditions of the robustness suite, by set and condition.
        normalizers: those that the sets were scored by.
        notes: of what is not complete.
    """

    name: str
    facts: Mapping[str, str]
    scores: tuple[SetScore, ...]
    manifests: Mapping[str, Manifest]
    harder: Mapping[tuple[str, str], SetScore]
    normalizers: tuple[Normalizer, ...]
    notes: tuple[str, ...]


def read(place: Path, *, normalizer: str | None, regime: str) -> Results:
    """The results in a folder, or in one manifest, scored.

    Args:
        place: a folder of manifests of one model, or a manifest.
        normalizer: by which all sets are scored; None for each language's own.
        regime: of the sets that are the leaderboard's; others are "none".

    Raises:
        UsageError: no manifests, or of several models; or what `score` refuses.
    """
    paths = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    if not paths:
        raise UsageError(f"{place}: no manifests (*.jsonl) in it; name a folder that `ark-asr eval run` wrote")
    models = sorted({manifest.model_of(path) for path in paths})
    if len(models) > 1:
        raise UsageError(f"{place}: results of {', '.join(models)}; one folder for each model")
    scores: list[SetScore] = []
    manifests: dict[str, Manifest] = {}
    harder: dict[tuple[str, str], SetScore] = {}
    by: dict[str, Normalizer] = {}
    hints: list[str] = []
    for path in paths:
        given = _with_audio(manifest.read(path))
        one, condition, normal = _scored(given, normalizer, regime)
        by[normal.name] = normal
        if told := normalize.hint(normal.name, language=_language(given)):
            hints.append(f"{one.name}: {told}")
        if condition is None:
            scores.append(one)
            manifests[one.name] = given
        else:
            harder[one.name, condition] = one
    record = _record(paths[0].parent)
    return Results(
        models[0], _facts(record), tuple(scores), manifests, harder, tuple(by.values()), (*_lacking(record), *hints)
    )


def read_all(places: Sequence[Path], *, normalizer: str | None, regime: str) -> list[Results]:
    """Results at several places; systems of one name are told apart by the names of the places.

    Raises:
        UsageError: as `read`.
    """
    found = [read(place, normalizer=normalizer, regime=regime) for place in places]
    times = Counter(name for name, _ in {(one.name, place) for place, one in zip(places, found, strict=True)})
    return [
        replace(one, name=f"{one.name} ({place.absolute().name})") if times[one.name] > 1 else one
        for place, one in zip(places, found, strict=True)
    ]


def _with_audio(given: Manifest) -> Manifest:
    """The manifest with the places of its audio told from the working folder, and not from its own."""
    folder = given.path.parent
    rows = tuple(
        replace(row, x={**row.x, "audio": str(folder / str(row.x["audio"]))}) if "audio" in row.x else row
        for row in given.rows
    )
    return replace(given, rows=rows)


def _scored(given: Manifest, name: str | None, regime: str) -> tuple[SetScore, str | None, Normalizer]:
    """A manifest's score, the condition under which it was heard, and what normalized it."""
    x: Mapping[str, Any] = given.rows[0].x if given.rows else {}
    language, condition = _language(given), x.get("condition")
    table = regimes.regime(regime)
    known = None if condition else regimes.set_of(given.path.name, table)
    if known is not None:
        normal = normalize.normalizer(name or table.normalizer or normalize.default_for(language), language=language)
        return score(given, normal, name=known.name, regime=regime), None, normal
    normal = normalize.normalizer(name or normalize.default_for(language), language=language)
    title = str(x.get("of") or x.get("set") or given.path.stem.partition("_DATASET_")[2] or given.path.stem)
    return score(given, normal, name=title, regime=NONE), None if condition is None else str(condition), normal


def _language(given: Manifest) -> str:
    return str(given.rows[0].x.get("language", "en")) if given.rows else "en"


def _record(folder: Path) -> dict[str, Any]:
    path = folder / manifest.RUN
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a record of a run ({error}); delete it, or give another folder") from None
    if not _is_record(record):
        raise UsageError(f"{path}: not a record of a run; delete it, or give another folder")
    return record  # type: ignore[no-any-return]


def _is_record(record: object) -> bool:
    sets = record.get("sets", {}) if isinstance(record, dict) else None
    return isinstance(sets, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(part, {}), dict) for part in PARTS)
        for entry in sets.values()
    )


def _lacking(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Which sets were not heard as a whole, by accident or by --limit."""
    notes = []
    for name, entry in record.get("sets", {}).items():
        if not entry.get("complete"):
            notes.append(f"{name}: not heard to its end; run it again")
        elif (limit := entry.get("options", {}).get("limit")) is not None:
            notes.append(f"{name}: only the first {limit} rows were asked for, which is no score of the set")
    return tuple(notes)


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What run.json says of the first set, which the others share, a line each."""
    entries = list(record.get("sets", {}).values())
    if not entries:
        return {}
    flat = {key: entries[0].get(key, {}) for key in PARTS}
    lines = {
        f"{part}: {name}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for part, facts in flat.items()
        for name, value in facts.items()
        if name != "files"
    }
    return {key: value for key, value in lines.items() if value not in ("null", "{}", "[]")}


# ---- tables ----


def label(one: SetScore | Average) -> str:
    """What has to stand beside a number."""
    if isinstance(one, Average):
        return one.label
    return f"{regimes.regime(one.regime or NONE).label}, normalizer {one.normalizer}"


def score_table(results: Sequence[Results], regime: str) -> Table:
    """A row for each set of each system, and one for the regime's average where there is one."""
    columns = ("System", "Set", "Rows", "Words", "WER or CER %", "95 % from", "to", "RTFx", "Failed", "Scored as")
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for system in results:
        for one in system.scores:
            sure = statistics.uncertainty(one.rows)
            notes += [f"{system.name}, {one.name}: {sure.note}"] if sure and sure.note else []
            low, high = (100 * end for end in (sure.headline.low, sure.headline.high)) if sure else (None, None)
            wer = one.wer if one.counts.reference_words else None
            counted = (len(one.rows), one.counts.reference_words, wer, low, high, one.rtfx, one.failed)
            rows.append((system.name, one.name, *counted, label(one)))
        average = averages(system.scores, regime)
        if average.wer is not None:
            macro = statistics.macro_uncertainty([one for one in system.scores if one.name not in average.extra])
            ends = (100 * macro.headline.low, 100 * macro.headline.high)
            rows.append((
                system.name, "public macro", None, None, average.wer, *ends, average.rtfx, None, average.label
            ))  # fmt: skip
    notes += [f"{system.name}: no average, {reason}" for system in results if (reason := no_average(system, regime))]
    return Table("Scores", columns, tuple(rows), "regime and normalizer in each row", "; ".join(notes))


def no_average(system: Results, regime: str) -> str:
    """Why there is none over the sets of a regime, some of which were heard; "" where nobody would expect it."""
    if all(one.regime == NONE for one in system.scores):
        return ""
    return averages(system.scores, regime).reason


def comparison_table(first: Results, second: Results) -> Table:
    """Set by set and on average, in the only words that may be used.

    Raises:
        UsageError: a set was scored in two ways, or has other references for the one than for the other.
    """
    found = statistics.compare(first.scores, second.scores)
    rows: list[tuple[Cell, ...]] = [
        (one.name, *_difference(one.difference), _p(one.p_holm), _p(one.mapsswe.p), one.verdict) for one in found.sets
    ]
    if found.macro is not None and len(found.sets) > 1:
        rows.append(("mean of the sets", *_difference(found.macro), _p(found.macro.p), "", found.macro_verdict))
    notes = [f"{one.name}: {one.difference.note}" for one in found.sets if one.difference.note]
    for who, names in ((first, found.only_first), (second, found.only_second)):
        notes += [f"only {who.name} has {', '.join(names)}"] if names else []
    for one in found.sets:
        for who, ids in ((first, one.only_first), (second, one.only_second)):
            notes += [f"{one.name}: {len(ids)} rows that only {who.name} has are left out"] if ids else []
    notes += [f"{name}: no reference words" for name in found.without_words]
    ours, theirs = (f"{name} %" for name in (first.name, second.name))
    return Table(
        f"{first.name} against {second.name}",
        ("Set", ours, theirs, "Difference", "95 % from", "to", "p (Holm)", "p (MAPSSWE)", f"{first.name} is"),
        tuple(rows),
        f"paired, normalizer {', '.join(sorted({one.normalizer for one in found.sets}))}",
        "; ".join(notes),
    )


def robustness_tables(results: Sequence[Results]) -> list[Table]:
    """For each set its error rate under each condition, and what that adds to the clean set's, paired."""
    tables = []
    for name in dict.fromkeys(one for system in results for one, _ in system.harder):
        rows: list[tuple[Cell, ...]] = []
        for system in results:
            conditions = {condition: one for (of, condition), one in system.harder.items() if of == name}
            clean = conditions.get(CLEAN)
            rows += [
                (system.name, condition, one.wer, *_added(one, clean), _per_cent_of_words(one))
                for condition, one in conditions.items()
            ]
        labels = {label(one) for system in results for (of, _), one in system.harder.items() if of == name}
        columns = ("System", "Condition", "WER or CER %", "Added", "95 % from", "to", "Inserted %")
        tables.append(Table(f"{name} under conditions", columns, tuple(rows), "; ".join(sorted(labels))))
    return tables


def _added(one: SetScore, clean: SetScore | None) -> tuple[float | None, float | None, float | None]:
    if clean is None or one is clean:
        return None, None, None
    (found,) = statistics.compare([one], [clean]).sets
    _, _, delta, low, high = _difference(found.difference)
    return delta, low, high


def _per_cent_of_words(one: SetScore) -> float | None:
    return 100 * one.counts.insertions / one.counts.reference_words if one.counts.reference_words else None


def _difference(one: Difference) -> tuple[float, float, float, float, float]:
    values = (one.rate_first, one.rate_second, one.delta, one.headline.low, one.headline.high)
    first, second, delta, low, high = (100 * value for value in values)
    return first, second, delta, low, high


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
