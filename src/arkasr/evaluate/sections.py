"""The parts of a report that are worked out of results: errors, slices, what nobody said, robustness, speed, rivals."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arkasr.errors import UsageError
from arkasr.evaluate import analysis, hallucination, references, slices, statistics, study
from arkasr.evaluate.report import Cell, Plot, Report, Section, Series, System, Table
from arkasr.evaluate.score import SetScore, averages
from arkasr.evaluate.study import Results, label
from arkasr.metrics.regimes import NONE

MOST_CELLS = 40  # of a plot; a set has more speakers than anybody reads
MOST_WORDS = 12  # of a list of confusions
_SNR = re.compile(r"(.+) (-?\d+) dB")


@dataclass(frozen=True)
class _Studied:
    """A set of a system with all that is worked out of it, once for all sections."""

    system: Results
    score: SetScore
    anatomy: analysis.Anatomy
    orthography: analysis.Orthography | None
    cuts: tuple[slices.Slice, ...]
    speakers: slices.Speakers | None
    nonspeech: hallucination.NonSpeech | None
    speech: hallucination.OnSpeech | None

    @classmethod
    def of(cls, system: Results, score: SetScore) -> "_Studied":
        rows, spelled = score.rows, analysis.orthography([scored.row for scored in score.rows])
        return cls(
            system, score, analysis.anatomy(score), spelled, slices.slices(rows), slices.speakers(rows),
            hallucination.on_nonspeech(rows), hallucination.on_speech(score),
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """Everything, for those who read JSON."""
        parts = (self.anatomy, self.orthography, self.speakers, self.nonspeech, self.speech)
        names = ("anatomy", "orthography", "speakers", "nonspeech", "speech")
        found = {name: asdict(part) for name, part in zip(names, parts, strict=True) if part is not None}
        return {**found, "slices": [asdict(one) for one in self.cuts]}


def report(title: str, results: Sequence[Results], regime: str, *, speeds: Sequence[Results] = ()) -> Report:
    """All that can be said of one system, or of two.

    Args:
        title: of the report.
        results: of the systems.
        regime: of their leaderboard sets.
        speeds: of further runs of the first system, with other batch sizes.

    Raises:
        UsageError: two systems were not scored alike.
    """
    studied = [_Studied.of(system, score) for system in results for score in system.scores]
    spoken = [one for one in studied if one.score.counts.reference_words]
    made = [
        _comparison(results),
        _average(results, regime),
        _errors(spoken),
        _slices(spoken),
        _unsaid(studied),
        _robustness(results),
        _speed(results, speeds),
        _published(regime),
    ]
    notes = [f"{system.name}: {note}" for system in results for note in system.notes]
    for system in results:
        if reason := study.no_average(system, regime):
            notes += [f"{system.name}: no average over the sets of regime {regime}: {reason}"]
    kept = tuple(section for section in made if section is not None and (section.tables or section.plots))
    analyses = {
        system.name: {one.score.name: one.plain() for one in studied if one.system is system} for system in results
    }
    systems = tuple(_system(system, studied) for system in results)
    return Report(title, systems, kept, tuple(notes), analyses)


def _system(system: Results, studied: Sequence[_Studied]) -> System:
    intervals: dict[str, tuple[float, float]] = {}
    flags: dict[tuple[str, str], tuple[str, ...]] = {}
    for one in studied:
        if one.system is not system:
            continue
        if sure := statistics.uncertainty(one.score.rows):
            intervals[one.score.name] = (100 * sure.headline.low, 100 * sure.headline.high)
        for check in one.speech.checks if one.speech else ():
            for name in check.ids:
                flags[one.score.name, name] = (*flags.get((one.score.name, name), ()), check.name)
    return System(system.name, system.facts, system.scores, system.normalizers, intervals, flags)


def _comparison(results: Sequence[Results]) -> Section | None:
    if len(results) != 2:
        return None
    text = "Better or worse is said only where the paired interval excludes 0 and p (after Holm) is below 0.05."
    return Section("Comparison", text, (study.comparison_table(*results),))


def _average(results: Sequence[Results], regime: str) -> Section | None:
    """Over all sets of the regime, where all are there."""
    found = [(one.name, averages(one.scores, regime)) for one in results]
    rows = tuple((name, one.wer, one.rtfx, one.rtfx_padded, one.label) for name, one in found if one.wer is not None)
    columns = ("System", "Average %", "RTFx", "RTFx, short clips counted as 2 s", "Scored as")
    table = Table(f"Average over the sets of regime {regime}", columns, rows, "regime and normalizer in each row")
    return Section("Average", "", (table,)) if rows else None


def _per_cent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _labels(studied: Iterable[_Studied]) -> str:
    return "; ".join(sorted({label(one.score) for one in studied}))


# ---- errors ----


def _errors(studied: Sequence[_Studied]) -> Section:
    kinds: list[tuple[Cell, ...]] = []
    others: list[tuple[Cell, ...]] = []
    tables: list[Table] = []
    for one in studied:
        found, who = one.anatomy, (one.system.name, one.score.name)
        rates = (
            found.insertion_rate, found.deletion_rate, found.substitution_rate, found.sentence_error_rate,
            found.character_error_rate,
        )  # fmt: skip
        kinds.append((*who, *map(_per_cent, rates)))
        language = str(next((scored.row.x.get("language", "en") for scored in one.score.rows), "en"))
        others += [
            (*who, by.normalizer, _per_cent(by.rate), by.errors, by.reference_words)
            for by in analysis.sensitivity(one.system.manifests[one.score.name], language=language)
        ]
        tables += [_changes(one), _classes(one)]
    rates_of = ("Inserted %", "Deleted %", "Substituted %", "Sentences with errors %", "CER %")
    first = Table("Kinds of errors", ("System", "Set", *rates_of), tuple(kinds), _labels(studied))
    columns = ("System", "Set", "Normalizer", "WER or CER %", "Errors", "Words")
    second = Table("The same texts under other normalizers", columns, tuple(others), "normalizer in each row")
    return Section("Errors", "", tuple(table for table in (first, second, *tables) if table.rows))


def _changes(one: _Studied) -> Table:
    found = one.anatomy
    rows: list[tuple[Cell, ...]] = []
    for kind, changes in (
        ("substituted", found.confusions),
        ("inserted", found.insertions),
        ("deleted", found.deletions),
        ("written together or apart", found.compounds),
    ):
        rows += [(kind, change.reference, change.hypothesis, change.count) for change in changes[:MOST_WORDS]]
    title = f"{one.system.name}, {one.score.name}: what goes wrong most"
    return Table(title, ("Kind", "Reference", "Hypothesis", "Times"), tuple(rows), label(one.score))


def _classes(one: _Studied) -> Table:
    rows = tuple((kind.name, kind.reference_words, kind.errors, 100 * kind.rate) for kind in one.anatomy.classes)
    title = f"{one.system.name}, {one.score.name}: classes of words"
    return Table(title, ("Words that are", "Words", "Wrong", "Wrong %"), rows, label(one.score))


# ---- slices ----


def _slices(studied: Sequence[_Studied]) -> Section:
    """For each set and property, a plot of cells with their intervals."""
    cells: dict[tuple[str, str, str], list[Series]] = {}
    spread: list[tuple[Cell, ...]] = []
    for one in studied:
        for cut in one.cuts:
            shown = [cell for cell in cut.cells if cell.uncertainty is not None][:MOST_CELLS]
            if len(cut.cells) < 2 or not shown:
                continue
            sure = [cell.uncertainty for cell in shown if cell.uncertainty is not None]
            series = Series(
                one.system.name,
                tuple(f"{cell.name} ({cell.utterances})" for cell in shown),
                tuple(100 * cell.rate for cell in sure),
                tuple(100 * cell.headline.low for cell in sure),
                tuple(100 * cell.headline.high for cell in sure),
            )
            cells.setdefault((one.score.name, cut.by, label(one.score)), []).append(series)
        if found := one.speakers:
            median, p90, worst = (100 * rate for rate in (found.median, found.p90, found.worst))
            who = (one.system.name, one.score.name, found.speakers)
            spread.append((*who, median, p90, worst, found.worst_speaker, found.gini))
    note = f"in brackets the utterances; cells under {slices.LEAST_WORDS} reference words are left out"
    plots = tuple(
        Plot("points", f"{name} by {by}", by, "WER or CER %", tuple(series), of, note=note)
        for (name, by, of), series in cells.items()
    )
    columns = ("System", "Set", "Speakers", "Median %", "90 % of them below %", "Worst %", "Worst speaker", "Gini")
    table = Table("Speakers", columns, tuple(spread), _labels(studied))
    return Section("Where the errors are", "", (table,) if spread else (), plots)


# ---- what nobody said ----


def _unsaid(studied: Sequence[_Studied]) -> Section:
    silent: list[tuple[Cell, ...]] = []
    spoken: list[tuple[Cell, ...]] = []
    for one in studied:
        who = (one.system.name, one.score.name)
        if quiet := one.nonspeech:
            texts = ", ".join(f"{text.text!r} ({text.count})" for text in quiet.commonest[:3])
            silent.append((*who, quiet.clips, quiet.with_output, 100 * quiet.share, quiet.words_per_minute, texts))
        spoken += [
            (*who, check.name, check.utterances, 100 * check.share, _per_cent(check.rate_without))
            for check in (one.speech.checks if one.speech else ())
        ]
    columns: tuple[str, ...] = ("System", "Set", "Clips", "With words", "With words %", "Words a minute", "Commonest")
    nobody = Table("Words where nobody speaks", columns, tuple(silent), "any output at all; no reference words")
    columns = ("System", "Set", "Fault", "Utterances", "Of all %", "WER or CER % of the others")
    somebody = Table(
        "Utterances not to be trusted", columns, tuple(spoken), _labels(one for one in studied if one.speech)
    )
    return Section("What nobody said", "", tuple(table for table in (nobody, somebody) if table.rows))


# ---- robustness, speed, others ----


def _robustness(results: Sequence[Results]) -> Section:
    curves: dict[tuple[str, str], list[Series]] = {}
    for one in results:
        for name in dict.fromkeys(of for of, _ in one.harder):
            ladders: dict[str, list[tuple[float, SetScore]]] = {}
            for (of, condition), score in one.harder.items():
                if of == name and (found := _SNR.fullmatch(condition)) and not found[1].startswith(("gain", "second")):
                    ladders.setdefault(found[1], []).append((float(found[2]), score))
            for noise, ladder in ladders.items():
                if len(ladder) > 1:
                    key = name, label(ladder[0][1])
                    curves.setdefault(key, []).append(_curve(_named(one, noise, results), ladder))
    plots = tuple(
        Plot("curves", f"{name} in noise", "SNR, dB", "WER or CER %", tuple(series[:6]), of)
        for (name, of), series in curves.items()
    )
    return Section("Robustness", "", tuple(study.robustness_tables(results)), plots)


def _named(one: Results, noise: str, results: Sequence[Results]) -> str:
    return noise if len(results) == 1 else f"{one.name}, {noise}"


def _curve(name: str, ladder: Sequence[tuple[float, SetScore]]) -> Series:
    steps = sorted(ladder, key=lambda step: step[0])
    sure = [statistics.uncertainty(score.rows) for _, score in steps]
    return Series(
        name,
        tuple(snr for snr, _ in steps),
        tuple(score.wer for _, score in steps),
        tuple(None if one is None else 100 * one.headline.low for one in sure),
        tuple(None if one is None else 100 * one.headline.high for one in sure),
    )


def _speed(results: Sequence[Results], others: Sequence[Results]) -> Section | None:
    if not others:
        return None
    points: dict[str, list[tuple[float, float]]] = {}
    rows: list[tuple[Cell, ...]] = []
    for one in (*results[:1], *others):
        size = one.facts.get("options: batch_size", "")
        if not size.isdecimal():
            raise UsageError(f"speed of {one.name}: its run.json names no batch size; give a folder of `eval run`")
        for score in one.scores:
            if score.rtfx is not None:
                rows.append((one.name, score.name, int(size), score.rtfx, score.rtfx_padded))
                points.setdefault(score.name, []).append((float(size), score.rtfx))
    series = tuple(_speeds(name, found) for name, found in list(points.items())[:6])
    timed = _hardware(results[0].facts)
    plot = Plot("curves", "Speed against batch size", "clips in a batch", "RTFx", series, timed, log_x=True)
    columns = ("System", "Set", "Batch size", "RTFx", "RTFx, short clips counted as 2 s")
    return Section("Speed", "", (Table("Speed", columns, tuple(rows), timed),), (plot,))


def _speeds(name: str, points: Sequence[tuple[float, float]]) -> Series:
    steps = sorted(points)
    return Series(name, tuple(size for size, _ in steps), tuple(rtfx for _, rtfx in steps))


def _hardware(facts: Mapping[str, str]) -> str:
    found = [value for key, value in facts.items() if key.startswith("hardware: ")]
    return "timed as the leaderboard times, on " + (", ".join(found) or "unknown hardware")


def _published(regime: str) -> Section | None:
    known = references.references(regime) if regime != NONE else ()
    rows = tuple((one.model, one.average, one.rtfx, one.normalizer, one.source, one.date, one.note) for one in known)
    columns = ("Model", "Average %", "RTFx", "Normalizer", "Source", "Date", "Note")
    table = Table(f"Regime {regime}, published by others", columns, rows, f"regime {regime}")
    return Section("Published figures", "Only rows of the same regime may be compared.", (table,)) if rows else None
