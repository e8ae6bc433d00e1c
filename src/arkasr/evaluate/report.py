"""A measurement as one HTML file that needs nothing else, with Markdown and JSON beside it.

    Report (systems, sections of tables and plots) -> write -> report.html, report.md, report.json

Sections are drawn as they come; what this module knows of are scores and utterances. Whatever somebody else wrote
(references, hypotheses, names) enters the page escaped or as JSON that scripts read, and the page's policy lets run
only the one script whose hash it names. Equal input gives equal bytes: nothing in a report tells when it was written.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from arkasr.errors import UsageError, quoted
from arkasr.evaluate.page import tables
from arkasr.evaluate.page.plots import Plot, Series, draw, shown
from arkasr.evaluate.page.sounds import Sounds
from arkasr.evaluate.page.tables import Cell, Table, plain
from arkasr.evaluate.resampling import row_id
from arkasr.evaluate.score import Scored, SetScore
from arkasr.files import write_text_atomically
from arkasr.metrics.align import Edit, align
from arkasr.metrics.normalize import Normalizer
from arkasr.metrics.regimes import NONE

__all__ = ["Cell", "Plot", "Report", "Section", "Series", "System", "Table", "write"]

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Section:
    """A part of the report under its own heading, as "Robustness" or "Comparison"."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class System:
    """What is reported of one system.

    Attributes:
        name: model and engine, as tables call it.
        facts: of run.json: versions, hardware, options, clean-up of the texts.
        scores: of its sets.
        normalizers: those by which the sets were scored.
        intervals: ends of the 95 % interval of a set's error rate, in percent, by its name.
        flags: what analysis found of an utterance ("loop", "collapse"), by set and id, beside the manifest's own flags.
    """

    name: str
    facts: Mapping[str, str]
    scores: tuple[SetScore, ...]
    normalizers: tuple[Normalizer, ...]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    flags: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def normalizer(self, score: SetScore) -> Normalizer:
        """The normalizer of one of its sets."""
        return next(one for one in self.normalizers if one.name == score.normalizer)


@dataclass(frozen=True)
class Report:
    """One system, or two to compare; `analysis` is anything JSON can hold and goes into report.json only."""

    title: str
    systems: tuple[System, ...]
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()
    analysis: Mapping[str, Any] = field(default_factory=dict)


def write(report: Report, folder: Path, *, embed_audio: bool = False) -> None:
    """Write report.html, report.md and report.json; each is complete or as it was.

    Args:
        report: what to show.
        folder: made if it is not there; players get paths relative to it where the audio lies in it.
        embed_audio: put clips of at most 1 MiB, up to 64 MiB of them, into the page itself.

    Raises:
        UsageError: not one or two systems; a number without regime or normalizer; sets of one name that two systems
            were scored on differently; the folder cannot be written.
    """
    _check(report)
    utterances = _utterances(report, Sounds(folder, embed=embed_audio))
    everything = {
        "title": report.title,
        "notes": report.notes,
        "systems": [_described(system) for system in report.systems],
        "sections": [asdict(section) for section in report.sections],
        "analysis": report.analysis,
        "utterances": utterances,
    }
    contents = {
        "report.html": _html(report, utterances),
        "report.md": _markdown(report),
        "report.json": _json(everything) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            write_text_atomically(folder / name, text)
    except OSError as error:
        raise UsageError(f"{folder}: the report cannot be written ({error.strerror}); choose another folder") from None


def _check(report: Report) -> None:
    if not 1 <= len(report.systems) <= 2:
        raise UsageError(f"report {report.title!r}: {len(report.systems)} systems; a report shows one or compares two")
    _check_labels(report)
    labels: dict[str, str] = {}
    for system in report.systems:
        names = [score.name for score in system.scores]
        if len(set(names)) < len(names):
            raise UsageError(f"report of {system.name}: a set stands twice among {quoted(names)}; report each once")
        for score in system.scores:
            place = f"report of {system.name}, set {score.name}"
            if not score.regime:
                raise UsageError(f'{place}: no regime; score it with one, or with "none" outside the leaderboard')
            if score.normalizer not in {one.name for one in system.normalizers}:
                raise UsageError(
                    f"{place}: no normalizer {quoted(score.normalizer)} was given; report those it was scored by"
                )
            if labels.setdefault(score.name, _label(score)) != _label(score):
                raise UsageError(f"{place}: {_label(score)} against {labels[score.name]}; score both systems alike")


def _check_labels(report: Report) -> None:
    labels = [(table.title, table.label) for section in report.sections for table in section.tables]
    labels += [(plot.title, plot.label) for section in report.sections for plot in section.plots]
    for title, label in labels:
        if not label:
            raise UsageError(f"{title!r}: no label; name the regime and normalizer of its numbers")


def _regime(score: SetScore) -> str:
    return "not a leaderboard set" if score.regime == NONE else f"regime {score.regime}"


def _label(score: SetScore) -> str:
    return f"{_regime(score)}, normalizer {score.normalizer}"


# ---- utterances ----


def _utterances(report: Report, sounds: Sounds) -> dict[str, Any]:
    """What the page's list is made of: sets, and for each utterance what each system made of it, or None."""
    sets: dict[str, dict[str, str]] = {}
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for number, system in enumerate(report.systems):
        for score in system.scores:
            normalizer = system.normalizer(score)
            sets[score.name] = {"name": score.name, "label": _label(score), "rate": _rate_name(normalizer)}
            place, seen = list(sets).index(score.name), Counter[str]()
            for scored in score.rows:
                name = row_id(scored.row)
                key = (score.name, name, seen[name])  # one file may hold several utterances that have no ids
                seen[name] += 1
                if key not in rows:
                    x = scored.row.x
                    rows[key] = {
                        "set": place, "id": name, "speaker": str(x.get("speaker") or ""),
                        "duration": scored.row.duration, "reference": scored.row.text,
                        "audio": sounds.find(x.get("audio")),
                        "systems": [None] * len(report.systems),
                    }  # fmt: skip
                rows[key]["systems"][number] = _heard(scored, normalizer, system.flags.get(key[:2], ()))
    names = [system.name for system in report.systems]
    return {"systems": names, "sets": list(sets.values()), "rows": list(rows.values())}


def _aligned(scored: Scored, normalizer: Normalizer) -> list[Edit]:
    if scored.reference == scored.hypothesis:  # many are, and aligning is half of the time a report takes
        return [Edit("equal", scored.reference, scored.hypothesis)] if scored.reference else []
    return align(scored.reference, scored.hypothesis, merge_compounds=normalizer.merge_compounds)


def _heard(scored: Scored, normalizer: Normalizer, found: tuple[str, ...]) -> dict[str, Any]:
    """One system's text of one utterance; an edit is a run of equal tokens or [kind, reference, hypothesis]."""
    edits: list[str | list[str]] = []
    compounds = 0
    for edit in _aligned(scored, normalizer):
        reference, hypothesis = " ".join(edit.reference), " ".join(edit.hypothesis)
        if edit.kind != "equal":
            edits.append([edit.kind[0], reference, hypothesis])
            compounds += edit.kind == "compound"
        elif edits and isinstance(edits[-1], str):
            edits[-1] += " " + reference
        else:
            edits.append(reference)
    given = scored.row.x.get("flags")
    own = tuple(map(str, given)) if isinstance(given, (list, tuple)) else ()
    error = scored.row.x.get("error")
    return {
        "words": scored.counts.reference_words, "ins": scored.counts.insertions, "del": scored.counts.deletions,
        "sub": scored.counts.substitutions, "compounds": compounds, "edits": edits, "text": scored.row.pred_text,
        "flags": list(dict.fromkeys((*own, *found, *(("failed",) if error else ())))),
        "error": str(error) if error else "",
    }  # fmt: skip


# ---- tables that are made here ----


def _rate_name(normalizer: Normalizer) -> str:
    return "WER" if normalizer.unit == "word" else "CER"


def _summary(report: Report) -> Table:
    columns = (
        "Set", "System", "Measure", "%", "95 % interval", "Regime", "Normalizer", "Ins %", "Del %", "Sub %", "RTFx",
        "Ref. tokens", "Utterances", "Failed", "Empty refs", "Words on empty", "RTFx padded",
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys(score.name for system in report.systems for score in system.scores):
        for system in report.systems:
            for score in (score for score in system.scores if score.name == name):
                counts, ends = score.counts, system.intervals.get(name)
                parts = (counts.insertions, counts.deletions, counts.substitutions)
                rows.append((
                    name, system.name, _rate_name(system.normalizer(score)), score.wer,
                    f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else None,
                    _regime(score), score.normalizer,
                    *(100 * n / counts.reference_words if counts.reference_words else None for n in parts), score.rtfx,
                    counts.reference_words, len(score.rows), score.failed, score.empty_references, score.words_on_empty,
                    score.rtfx_padded,
                ))  # fmt: skip
    note = "Intervals are of the error rate. Rows of different regimes or normalizers must not be compared."
    return Table("Error rates by set", columns, tuple(rows), "regime and normalizer in each row", note)


def _rates(report: Report) -> list[Plot]:
    """Error rates by set, one plot for what may be compared."""
    groups = dict.fromkeys(
        (_label(score), _rate_name(system.normalizer(score))) for system in report.systems for score in system.scores
    )
    plots = []
    for label, rate in groups:
        series = []
        for system in report.systems:
            scores = [s for s in system.scores if (_label(s), _rate_name(system.normalizer(s))) == (label, rate)]
            ends = [system.intervals.get(score.name, (None, None)) for score in scores]
            x, y = tuple(score.name for score in scores), tuple(score.wer for score in scores)
            series.append(Series(system.name, x, y, tuple(end[0] for end in ends), tuple(end[1] for end in ends)))
        plots.append(Plot("points", f"{rate} by set", "Set", f"{rate} in percent", tuple(series), label))
    return plots


def _numbers(plot: Plot) -> Table:
    """The numbers of a plot, for those who cannot see it."""
    columns = ("Series", plot.x_label, plot.y_label, "Low", "High")
    rows = tuple((series.name, *point) for series in plot.series for point in series.points)
    return Table(plot.title, columns, rows, plot.label, plot.note)


def _notes(report: Report) -> list[str]:
    """What was odd: of the report, and of the sets of each system."""
    sets = [(system, score) for system in report.systems for score in system.scores]
    return [*report.notes, *(f"{system.name}, {score.name}: {note}" for system, score in sets for note in score.notes)]


# ---- files ----


def _html(report: Report, utterances: dict[str, Any]) -> str:
    style, script, template = (
        (PAGE / f"report.{ending}").read_text(encoding="utf-8") for ending in ("css", "js", "html")
    )
    summary = Section("Summary", "", (_summary(report),), tuple(_rates(report)))
    sections = (summary, *report.sections)
    titles = [section.title for section in sections] + ["Systems", "Utterances"]
    return Template(template).substitute(
        title=shown(report.title),
        systems=" against ".join(f"<bdi>{shown(system.name)}</bdi>" for system in report.systems),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        links="".join(f'<li><a href="#part-{n}">{shown(title)}</a></li>' for n, title in enumerate(titles)),
        sections="".join(_section(section, n) for n, section in enumerate(sections)),
        systems_part=f"part-{len(sections)}",
        utterances_part=f"part-{len(sections) + 1}",
        facts="".join(map(_facts, report.systems)),
        notes="".join(f"<li>{shown(note)}</li>" for note in _notes(report)) or "<li>Nothing odd was met.</li>",
        # In a script element only "<" can end or open anything; the line separators are for older readers of JSON.
        data=re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", _json(utterances)),
    )


def _hash(text: str) -> str:
    """The name of an inline style or script in the page's policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(section: Section, number: int) -> str:
    text = f"<p>{shown(section.text)}</p>" if section.text else ""
    shown_tables = "".join(map(tables.html, section.tables))
    plots = "".join(map(_figure, section.plots))
    heading = f'<h2 id="part-{number}">{shown(section.title)}</h2>'
    inner = f'{heading}{text}{shown_tables}<div class="plots">{plots}</div>'
    return f'<section aria-labelledby="part-{number}">{inner}</section>'


def _figure(plot: Plot) -> str:
    caption = f'<figcaption>{shown(plot.title)} <small class="label">{shown(plot.label)}</small></figcaption>'
    numbers = f"<details><summary>Numbers of this plot</summary>{tables.html(_numbers(plot))}</details>"
    return f"<figure>{caption}{draw(plot)}{numbers}</figure>"


def _facts(system: System) -> str:
    facts = "".join(f"<div><dt>{shown(name)}</dt><dd>{shown(value)}</dd></div>" for name, value in system.facts.items())
    return f"<div><h3><bdi>{shown(system.name)}</bdi></h3><dl>{facts}</dl></div>"


def _markdown(report: Report) -> str:
    lines = [f"# {plain(report.title)}", ""]
    for section in (Section("Summary", "", (_summary(report),)), *report.sections):
        lines += [f"## {plain(section.title)}", "", *([plain(section.text), ""] if section.text else [])]
        for table in (*section.tables, *map(_numbers, section.plots)):
            lines += tables.markdown(table)
    for system in report.systems:
        lines += [
            f"## {plain(system.name)}",
            "",
            *(f"- {plain(k)}: {plain(v)}" for k, v in system.facts.items()),
            "",
        ]
    lines += ["## Notes", "", *(f"- {plain(note)}" for note in _notes(report) or ["Nothing odd was met."])]
    return "\n".join(lines) + "\n"


def _described(system: System) -> dict[str, Any]:
    """A system for report.json; its utterances stand elsewhere."""
    sets = [
        {
            "name": score.name, "regime": score.regime, "normalizer": score.normalizer,
            "measure": _rate_name(system.normalizer(score)), "percent": score.wer,
            "interval": system.intervals.get(score.name), "counts": asdict(score.counts), "utterances": len(score.rows),
            "rtfx": score.rtfx, "rtfx_padded": score.rtfx_padded, "failed": score.failed,
            "empty_references": score.empty_references, "words_on_empty": score.words_on_empty, "notes": score.notes,
        }
        for score in system.scores
    ]  # fmt: skip
    return {"name": system.name, "facts": dict(system.facts), "sets": sets}


def _json(value: object) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: object) -> object:
    """The value with null for what JSON has no number for: the rate of a set without reference words, say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
