"""How sure a rate or a difference is: resampling, tests of two systems, and the one place that says "better".

Rates are errors per reference word, not percent. Utterances of one speaker err together, so all is also done with
whole speakers (or sessions, where no speaker is named) as units, and the less certain answer is the headline. A seed
gives the same digits everywhere, and two systems in the other order the same digits with the other sign.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from arkasr.errors import UsageError, quoted
from arkasr.evaluate import resampling
from arkasr.evaluate.mapsswe import Mapsswe, mapsswe
from arkasr.evaluate.resampling import Interval, Samples
from arkasr.evaluate.score import Scored, SetScore
from arkasr.metrics.normalize import Normalizer, normalizer

SEED = 20260828
ALPHA = 0.05
FEW_CLUSTERS = 10
LEAST_CLUSTERS = 6  # swapping five whole clusters has 32 outcomes, of which two are always as extreme: p >= 0.06
_SAME = 1e-12  # of two rates: their last digits depend on the order of a subtraction

Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Uncertainty:
    """A rate and its intervals; by_cluster is None where no row shares a speaker or session with another."""

    rate: float
    headline: Interval
    by_utterance: Interval
    by_cluster: Interval | None
    utterances: int
    clusters: int
    note: str


@dataclass(frozen=True)
class Difference:
    """Rate of the first system minus that of the second: below 0 the first is better.

    p is what decides: the larger p-value of approximate randomization by utterance and by cluster. p_by_cluster is None
    with fewer than LEAST_CLUSTERS clusters.
    """

    rate_first: float
    rate_second: float
    delta: float
    headline: Interval
    by_utterance: Interval
    by_cluster: Interval | None
    probability_below: float
    p_bootstrap: float
    p_by_utterance: float
    p_by_cluster: float | None
    p: float
    utterances: int
    clusters: int
    note: str


@dataclass(frozen=True)
class SetComparison:
    """Two systems on the rows of one set that both have; rows that only one has are named."""

    name: str
    normalizer: str
    difference: Difference
    mapsswe: Mapsswe
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    p_holm: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Two systems on the sets that both have; the macro average is over these; sets without words are left out."""

    sets: tuple[SetComparison, ...]
    macro: Difference | None
    macro_verdict: Verdict | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    without_words: tuple[str, ...]


def verdict(interval: Interval, p: float) -> Verdict:
    """What may be said of the first system: the interval of the difference must exclude 0, and p be below ALPHA."""
    if p < ALPHA and interval.high < 0:
        return "better"
    if p < ALPHA and interval.low > 0:
        return "worse"
    return "no difference shown"


def uncertainty(rows: Sequence[Scored], *, seed: int = SEED) -> Uncertainty | None:
    """Intervals of the error rate of these rows; None without reference words."""
    if not sum(row.counts.reference_words for row in rows):
        return None
    return _summed_up([_Bootstrap.of(rows, np.random.default_rng(seed))])


def macro_uncertainty(scores: Sequence[SetScore], *, seed: int = SEED) -> Uncertainty:
    """Intervals of the mean of the sets' rates, each set resampled by itself.

    Raises:
        UsageError: no set, or one without reference words.
    """
    empty = [score.name for score in scores if not score.counts.reference_words]
    if empty or not scores:
        raise UsageError(f"macro average: no reference words in {', '.join(empty) or 'no set'}; leave it out")
    rng = np.random.default_rng(seed)
    return _summed_up([_Bootstrap.of(score.rows, rng) for score in scores])


def compare(first: Sequence[SetScore], second: Sequence[SetScore], *, seed: int = SEED) -> Comparison:
    """Two systems set by set and on the macro average, p-values of the sets corrected after Holm.

    Raises:
        UsageError: a set was scored in two ways, or the two have no row in common.
    """
    ours, theirs = ({score.name: score for score in scores} for scores in (first, second))
    matched = [_Matched.of(ours[name], theirs[name]) for name in ours if name in theirs]
    with_words = [pair for pair in matched if all(resampling.total(rows)[1] for rows in (pair.first, pair.second))]
    rng = np.random.default_rng(seed)
    trials = [_Trials.of(pair, rng) for pair in with_words]
    differences = [_difference([trial]) for trial in trials]
    corrected = holm([difference.p for difference in differences])
    macro = _difference(trials) if trials else None
    return Comparison(
        tuple(
            SetComparison(
                pair.name,
                pair.normalizer.name,
                difference,
                mapsswe(pair.first, pair.second, merge_compounds=pair.normalizer.merge_compounds),
                pair.only_first,
                pair.only_second,
                p,
                verdict(difference.headline, p),
            )
            for pair, difference, p in zip(with_words, differences, corrected, strict=True)
        ),
        macro,
        verdict(macro.headline, macro.p) if macro else None,
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
        tuple(pair.name for pair in matched if pair not in with_words),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, step by step from the smallest."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = corrected[place] = max(least, min((len(p_values) - rank) * p_values[place], 1.0))
    return corrected


def normalizer_of(score: SetScore) -> Normalizer:
    """The normalizer of a set; what it does to digits may differ, for the set's language is not known here."""
    return normalizer(score.normalizer, language="")


@dataclass(frozen=True)
class _Bootstrap:
    """Resampled rates of one set; by cluster the same as by utterance where there are no clusters."""

    rate: float
    by_utterance: Samples
    by_cluster: Samples
    utterances: int
    clusters: int

    @classmethod
    def of(cls, rows: Sequence[Scored], rng: np.random.Generator) -> "_Bootstrap":
        table = resampling.table(rows)
        clustered = resampling.by_cluster(table, rows)
        by_utterance = resampling.rate(resampling.drawn(table, rng))
        by_cluster = by_utterance if len(clustered) == len(table) else resampling.rate(resampling.drawn(clustered, rng))
        rate = float(resampling.rate(table.sum(axis=0).astype(np.float64)))
        return cls(rate, by_utterance, by_cluster, len(table), len(clustered))


def _summed_up(sets: Sequence[_Bootstrap]) -> Uncertainty:
    """The intervals of the mean of some sets' rates."""
    by_utterance = resampling.interval(np.mean([one.by_utterance for one in sets], axis=0))
    by_cluster = resampling.interval(np.mean([one.by_cluster for one in sets], axis=0)) if _clustered(sets) else None
    return Uncertainty(
        float(np.mean([one.rate for one in sets])),
        _wider(by_utterance, by_cluster),
        by_utterance,
        by_cluster,
        sum(one.utterances for one in sets),
        sum(one.clusters for one in sets),
        _note(sets),
    )


def _clustered(sets: "Sequence[_Bootstrap | _Trials]") -> bool:
    return any(one.clusters < one.utterances for one in sets)


def _wider(one: Interval, other: Interval | None) -> Interval:
    return other if other is not None and other.width > one.width else one


def _note(sets: "Sequence[_Bootstrap | _Trials]") -> str:
    """A warning of the set with the fewest clusters, if they are few."""
    fewest = min(one.clusters for one in sets)
    return f"{fewest} cluster{'s' * (fewest > 1)}, interval unreliable" if fewest < FEW_CLUSTERS else ""


# ---- two systems ----


@dataclass(frozen=True)
class _Matched:
    """Rows of two systems by id, in the order of the ids."""

    name: str
    normalizer: Normalizer
    first: tuple[Scored, ...]
    second: tuple[Scored, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @classmethod
    def of(cls, first: SetScore, second: SetScore) -> "_Matched":
        if first.normalizer != second.normalizer:
            raise UsageError(
                f"{first.name}: scored with {first.normalizer} and with {second.normalizer}; score both with one"
            )
        ours, theirs = _by_id(first), _by_id(second)
        ids = sorted(ours.keys() & theirs.keys())
        if not ids:
            raise UsageError(f"{first.name}: the two systems have no utterance in common; are the ids of one data set?")
        other_text = [name for name in ids if ours[name].row.text.strip() != theirs[name].row.text.strip()]
        if other_text:
            raise UsageError(
                f"{first.name}: {len(other_text)} references differ, first that of {quoted(other_text[0])}; "
                "score both systems against the same references"
            )
        return cls(
            first.name,
            normalizer_of(first),
            tuple(ours[name] for name in ids),
            tuple(theirs[name] for name in ids),
            tuple(sorted(ours.keys() - theirs.keys())),
            tuple(sorted(theirs.keys() - ours.keys())),
        )


def _by_id(score: SetScore) -> dict[str, Scored]:
    """Rows by id, and with their text where several have one id, as names of files in different folders may."""
    times = Counter(resampling.row_id(scored.row) for scored in score.rows)
    names = ((resampling.row_id(scored.row), scored) for scored in score.rows)
    rows = {name if times[name] == 1 else f"{name}: {scored.row.text.strip()}": scored for name, scored in names}
    if len(rows) < len(score.rows):
        raise UsageError(f"{score.name}: {len(score.rows) - len(rows)} rows cannot be told apart; give each its own id")
    return rows


@dataclass(frozen=True)
class _Trials:
    """Resampled and exchanged differences of one set; by cluster as by utterance where clusters are none or too few."""

    rates: npt.NDArray[np.float64]  # of the first and the second system
    by_utterance: Samples
    by_cluster: Samples
    swapped: Samples
    swapped_by_cluster: Samples
    utterances: int
    clusters: int

    @classmethod
    def of(cls, pair: _Matched, rng: np.random.Generator) -> "_Trials":
        table = np.concatenate([resampling.table(pair.first), resampling.table(pair.second)], axis=1)
        clustered = resampling.by_cluster(table, pair.first)
        alone = len(clustered) == len(table)
        by_utterance, swapped = _deltas(resampling.drawn(table, rng)), resampling.swapped(table, rng)
        return cls(
            resampling.rate(table.sum(axis=0).astype(np.float64).reshape(2, 2)),
            by_utterance,
            by_utterance if alone else _deltas(resampling.drawn(clustered, rng)),
            swapped,
            swapped if alone or len(clustered) < LEAST_CLUSTERS else resampling.swapped(clustered, rng),
            len(table),
            len(clustered),
        )


def _deltas(sums: npt.NDArray[np.float64]) -> Samples:
    return resampling.rate(sums[:, :2]) - resampling.rate(sums[:, 2:])


def _difference(sets: Sequence[_Trials]) -> Difference:
    """Of the mean of some sets' rates."""
    first, second = np.mean([one.rates for one in sets], axis=0).tolist()
    delta = float(np.mean([one.rates[0] - one.rates[1] for one in sets]))
    samples, clustered = (
        np.mean([one.by_utterance for one in sets], axis=0),
        np.mean([one.by_cluster for one in sets], axis=0),
    )
    by_utterance, by_cluster = (
        resampling.interval(samples),
        resampling.interval(clustered) if _clustered(sets) else None,
    )
    headline = _wider(by_utterance, by_cluster)
    decisive = samples if headline == by_utterance else clustered
    p_by_utterance = _p(np.mean([one.swapped for one in sets], axis=0), delta)
    testable = any(LEAST_CLUSTERS <= one.clusters < one.utterances for one in sets)
    p_by_cluster = _p(np.mean([one.swapped_by_cluster for one in sets], axis=0), delta) if testable else None
    return Difference(
        first,
        second,
        delta,
        headline,
        by_utterance,
        by_cluster,
        float(np.mean(decisive < 0)),
        min(1.0, 2 * min(_share(decisive <= 0), _share(decisive >= 0))),
        p_by_utterance,
        p_by_cluster,
        max(p_by_utterance, p_by_cluster or 0.0),
        sum(one.utterances for one in sets),
        sum(one.clusters for one in sets),
        _note(sets),
    )


def _p(samples: Samples, observed: float) -> float:
    """How often chance alone gives a difference at least as large, in either direction."""
    return _share(np.abs(samples) >= abs(observed) - _SAME)


def _share(happened: npt.NDArray[np.bool_]) -> float:
    """The observed result counts as one of the trials, so that no p-value is 0."""
    return (int(happened.sum()) + 1) / (len(happened) + 1)
