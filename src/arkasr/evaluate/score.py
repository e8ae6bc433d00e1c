"""Predictions to error rates and speed, as the leaderboard works them out; what is odd is counted, named and kept.

Manifest -> sessions joined -> normalized -> tokens -> Counts a row -> SetScore -> Average over a regime's sets
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from arkasr.errors import UsageError, quoted
from arkasr.evaluate.manifest import Manifest, Row, merge_chunks
from arkasr.metrics import Counts, count, regimes
from arkasr.metrics.align import merge_pair
from arkasr.metrics.normalize import Normalizer
from arkasr.metrics.regimes import NONE


@dataclass(frozen=True)
class Scored:
    """A row (of a chunked set: a session), its tokens after normalization, and what is wrong with them."""

    row: Row
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]
    counts: Counts


@dataclass(frozen=True)
class SetScore:
    """What a system makes of a set.

    Attributes:
        name: of the set.
        normalizer: by which the texts were compared.
        regime: whose set it is; "none" for no leaderboard set.
        rows: all that were scored.
        counts: their sum; a word is a token.
        rtfx: seconds of audio a second of recognition; None when a row lacks either, for which notes have the reason.
        rtfx_padded: with the audio as its system padded it, which only serves to compare with such a system's figure.
        empty_references: rows with nothing to say after normalization; they stay, as on the leaderboard.
        words_on_empty: what was inserted there, which is among the errors, too.
        failed: rows that could not be recognized, and are scored as empty.
        notes: what was odd in reading, joining and timing.
    """

    name: str
    normalizer: str
    regime: str | None
    rows: tuple[Scored, ...]
    counts: Counts
    rtfx: float | None
    rtfx_padded: float | None
    empty_references: int
    words_on_empty: int
    failed: int
    notes: tuple[str, ...]

    @property
    def wer(self) -> float:
        """Errors in per cent of the reference, to two decimals as the leaderboard rounds."""
        return round(100 * self.counts.rate, 2)


def score(manifest: Manifest, normalizer: Normalizer, *, name: str, regime: str | None) -> SetScore:
    """Score the predictions of a set of a regime; the regime None or "none" is for sets that no leaderboard has.

    Raises:
        UsageError: no rows, rows that stand twice, an unknown regime, a set or a number of rows that is not its.
    """
    _refuse_doubles(manifest)
    merged, warnings = merge_chunks(manifest.rows)
    unsure = _check_set(manifest, len(merged), name=name, regime=regime or NONE)
    notes = [*manifest.problems, *manifest.repairs, *warnings, *unsure]
    rows = tuple(_scored(row, normalizer) for row in merged)
    on_empty = [scored.counts.insertions for scored in rows if not scored.reference]
    rtfx, why = _rtfx(merged, lambda row: row.duration)
    padded, why_padded = _rtfx(merged, lambda row: row.x.get("padded_duration"))
    is_padded = any("padded_duration" in row.x for row in merged)
    reasons = [f"no RTFx: {why}" if why else "", f"no padded RTFx: {why_padded}" if why_padded and is_padded else ""]
    return SetScore(
        name, normalizer.name, regime or NONE, rows, Counts.total(scored.counts for scored in rows), rtfx, padded,
        len(on_empty), sum(on_empty), sum(bool(row.x.get("error")) for row in merged),
        (*notes, *filter(None, reasons)),
    )  # fmt: skip


def _scored(row: Row, normalizer: Normalizer) -> Scored:
    wanted, heard = normalizer.text(row.text), normalizer.text(row.pred_text)
    if normalizer.pairwise:
        wanted, heard = merge_pair(wanted, heard)
    reference, hypothesis = normalizer.tokens(wanted), normalizer.tokens(heard)
    counts = count(reference, hypothesis, merge_compounds=normalizer.merge_compounds)
    return Scored(row, tuple(reference), tuple(hypothesis), counts)


def _refuse_doubles(manifest: Manifest) -> None:
    """One utterance scored twice would weigh double; a name of a file alone may belong to two."""
    seen = Counter(_identity(row) for row in manifest.rows)
    doubles = [str(identity[0]) for identity, times in seen.items() if times > 1]
    if doubles:
        raise UsageError(
            f"{manifest.path}: {len(doubles)} rows stand more than once, first {quoted(doubles[0])}; score each once"
        )


def _identity(row: Row) -> tuple[object, ...]:
    if row.parent_id is not None and row.chunk_index is not None:
        return f"{row.parent_id} chunk {row.chunk_index}", "chunk"
    if row.x.get("id") is not None:
        return row.x["id"], "id"
    return row.audio_filepath, row.text, row.duration


def _check_set(manifest: Manifest, num_scored: int, *, name: str, regime: str) -> list[str]:
    """What the table of the regime cannot tell about this manifest."""
    if not manifest.rows:
        raise UsageError("; ".join([f"{manifest.path}: no rows to score", *manifest.problems]))
    if regime == NONE:
        return []
    known = regimes.regime(regime).find(name)
    if complaint := known.complaint(len(manifest.rows), num_scored):
        problems = "".join(f"; {problem}" for problem in manifest.problems)
        raise UsageError(
            f"{manifest.path}: {complaint} ({known.title}, regime {regime}){problems}; "
            f"score the whole set, or part of it under the regime {NONE!r}"
        )
    if known.rows is not None:
        return []
    if manifest.problems:
        raise UsageError(
            f"{manifest.path}: {known.title} is not complete: {'; '.join(manifest.problems)}; run it again"
        )
    return [f"how many rows {known.title} has is not published: {len(manifest.rows)} are taken for all"]


def _rtfx(rows: Sequence[Row], duration: Callable[[Row], float | None]) -> tuple[float | None, str]:
    """All audio over all time, or None and why not: one row without either disables it, as on the leaderboard."""
    for what, values in (("duration", [duration(row) for row in rows]), ("time", [row.time for row in rows])):
        if lacking := sum(not value for value in values):
            return None, f"{lacking} of {len(rows)} rows have no {what}"
    return _speed(rows, duration), ""


def _speed(rows: Sequence[Row], duration: Callable[[Row], float | None]) -> float:
    return sum(duration(row) or 0.0 for row in rows) / sum(row.time or 0.0 for row in rows)


# ---- over the sets of a regime ----


@dataclass(frozen=True)
class Average:
    """The headline of a regime.

    Attributes:
        regime: its id.
        normalizer: by which all sets were scored.
        wer: mean of the sets' two-decimal values, to two decimals; None when there is a reason against it.
        unrounded: the same mean as later leaderboard tables have it.
        rtfx: all audio of the sets over all their time; None when a set has none.
        rtfx_padded: as `SetScore` has it.
        missing: the regime's sets that were not given.
        extra: sets that were given and are not averaged.
        reason: why there is no average, or "".
    """

    regime: str
    normalizer: str
    wer: float | None
    unrounded: float | None
    rtfx: float | None
    rtfx_padded: float | None
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reason: str

    @property
    def label(self) -> str:
        """What has to stand beside the number: "OAL-E/oal-d1e99b2 public-8"."""
        regime = regimes.regime(self.regime)
        return f"{regime.label}/{self.normalizer} public-{len(regime.sets)}" if regime.sets else regime.label


def averages(scores: Sequence[SetScore], regime: str) -> Average:
    """The average over a regime's sets, if the scores are those of all of them, once each, by one normalizer.

    Raises:
        UsageError: there is no such regime.
    """
    table = regimes.regime(regime)
    names = [known.name for known in table.sets]
    chosen = sorted((one for one in scores if one.name in names), key=lambda one: names.index(one.name))
    given = Counter(one.name for one in chosen)
    missing = tuple(name for name in names if name not in given)
    extra = tuple(one.name for one in scores if one.name not in names)
    normalizers = sorted({one.normalizer for one in chosen})
    reasons = [
        *(["sets outside the leaderboard have no average"] if not names else []),
        *(["missing: " + ", ".join(missing)] if missing else []),
        *(f"{name} is given {times} times" for name, times in given.items() if times > 1),
        *(f"{one.name} was scored under regime {one.regime}" for one in chosen if one.regime != regime),
        *(["scored by several normalizers: " + ", ".join(normalizers)] if len(normalizers) > 1 else []),
        *(f"{one.name} has no reference words" for one in chosen if not one.counts.reference_words),
    ]
    normalizer = ", ".join(normalizers)
    if reasons:
        return Average(regime, normalizer, None, None, None, None, missing, extra, "; ".join(reasons))
    mean = sum(one.wer for one in chosen) / len(chosen)
    rows = [scored.row for one in chosen for scored in one.rows]
    timed, timed_padded = (all(values) for values in zip(*((one.rtfx, one.rtfx_padded) for one in chosen), strict=True))
    return Average(
        regime, normalizer, round(mean, 2), mean,
        _speed(rows, lambda row: row.duration) if timed else None,
        _speed(rows, lambda row: row.x.get("padded_duration")) if timed_padded else None,
        missing, extra, "",
    )  # fmt: skip
