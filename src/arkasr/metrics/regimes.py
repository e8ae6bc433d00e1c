"""The leaderboard's scoring regimes: which sets, of how many rows, by which normalizer. Figures of two never mix.

Row counts are those of the manifests that the leaderboard scores: rows whose normalized reference was empty are not in
them. Where the count is not published it is None, and the rows before that filter are the most there can be.
"""

from dataclasses import dataclass, replace

from arkasr.errors import UsageError, quoted

_ENGLISH = "hf-audio/open-asr-leaderboard"
_ENGLISH_BEFORE = "hf-audio/esb-datasets-test-only-sorted"
_MULTILINGUAL = "hf-audio/open-asr-leaderboard-multilingual-datasets"
_MULTILINGUAL_BEFORE = "nithinraok/asr-leaderboard-datasets"


@dataclass(frozen=True)
class EvalSet:
    """A test set.

    Attributes:
        name: as in reports and on the command line.
        title: as the leaderboard writes it.
        dataset: repository of the data; `before` its earlier names.
        config: configuration within the repository, or "".
        split: which part of it.
        rows: how many a complete manifest has, or None.
        most_rows: how many it has at most, where only that is known.
        sessions: how many units are scored, where rows are chunks of them.
        task: name of its value in a self-report, or None.
    """

    name: str
    title: str
    dataset: str
    config: str
    split: str = "test"
    rows: int | None = None
    most_rows: int | None = None
    sessions: int | None = None
    task: str | None = None
    before: tuple[str, ...] = ()

    def complaint(self, num_rows: int, num_scored: int) -> str | None:
        """What contradicts the table in a manifest of so many rows and, sessions joined, scored units."""
        if self.rows is not None and num_rows != self.rows:
            return f"{num_rows} rows, the set has {self.rows}"
        if self.most_rows is not None and num_rows > self.most_rows:
            return f"{num_rows} rows, the set has at most {self.most_rows}"
        if self.sessions is not None and num_scored != self.sessions:
            return f"{num_scored} sessions, the set has {self.sessions}"
        return None


@dataclass(frozen=True)
class Regime:
    """A way of scoring that was in force at a time.

    Attributes:
        id: as on the command line.
        description: when it was in force and what it changed.
        sets: those in its average.
        normalizer: the default; None where its own is not published, and no figure here can be its.
        aligner: what counts the errors on the leaderboard.
        extra: sets that are scored and not averaged.
    """

    id: str
    description: str
    sets: tuple[EvalSet, ...]
    normalizer: str | None
    aligner: str
    extra: tuple[EvalSet, ...] = ()

    @property
    def label(self) -> str:
        """How reports name it: "OAL-E"."""
        return "not a leaderboard set" if self.id == NONE else f"OAL-{self.id}"

    def find(self, name: str) -> EvalSet:
        """The set of that name, averaged or extra.

        Raises:
            UsageError: it is not of this regime.
        """
        for found in self.sets + self.extra:
            if found.name == name:
                return found
        names = ", ".join(found.name for found in self.sets + self.extra)
        raise UsageError(f"{quoted(name)}: no set of regime {self.id}; it has {names}; others need the regime {NONE!r}")


NONE = "none"


def _of_leaderboard(name: str, title: str, **facts: object) -> EvalSet:
    found = EvalSet(name, title, _ENGLISH, name, before=(_ENGLISH_BEFORE,))
    return replace(found, **facts)  # type: ignore[arg-type]


_AMI = _of_leaderboard("ami", "AMI", rows=11_653, task="ami_wer")
_EARNINGS = _of_leaderboard("earnings22", "Earnings22", rows=2_737, task="earnings22_wer")
_GIGASPEECH = _of_leaderboard("gigaspeech", "GigaSpeech", rows=19_898, task="gigaspeech_wer")
_CLEAN = _of_leaderboard(
    "librispeech_clean", "LibriSpeech clean", config="librispeech", split="test.clean", rows=2_620,
    task="librispeech_clean_wer",
)  # fmt: skip
_OTHER = _of_leaderboard(
    "librispeech_other", "LibriSpeech other", config="librispeech", split="test.other", rows=2_939,
    task="librispeech_other_wer",
)  # fmt: skip
_SPGI = _of_leaderboard("spgispeech", "SPGISpeech", rows=39_341, task="spgispeech_wer")
_TEDLIUM = _of_leaderboard("tedlium", "TED-LIUM")
_VOXPOPULI = _of_leaderboard("voxpopuli", "VoxPopuli", rows=1_842, task="voxpopuli_wer")
_AMI_CLEANED = _of_leaderboard("ami_cleaned", "AMI-Cleaned", most_rows=12_643, task="ami_wer")
_GIGASPEECH_CLEANED = _of_leaderboard(
    "gigaspeech_cleaned", "GigaSpeech-Cleaned", most_rows=19_931, task="gigaspeech_wer"
)
_VOXPOPULI_CLEANED = _of_leaderboard("voxpopuli_cleaned_aa", "VoxPopuli-Cleaned-AA", rows=628, task="voxpopuli_wer")
_EARNINGS_CLEANED = EvalSet(
    "earnings22_cleaned_aa_chunked", "Earnings22-Cleaned-AA-chunked",
    "ArtificialAnalysis/Earnings22-Cleaned-AA-chunked", "", rows=341, sessions=6, task="earnings22_wer",
)  # fmt: skip
_MONSOON = EvalSet(
    "monsoon_en_in", "Monsoon en-IN", "VoiceArena/Monsoon_en_IN_test", "",
    before=("VoiceArena/MonsoonASR-Open-ASR-leaderboard-en-IN",),
)  # fmt: skip

# The filter of regime A was another normalizer's, so of its sets only the rows before the filter are known.
_A = (
    replace(_AMI, rows=None, most_rows=12_643),
    replace(_EARNINGS, rows=None, most_rows=2_741),
    replace(_GIGASPEECH, rows=None, most_rows=19_931),
    _CLEAN, _OTHER, _SPGI, _TEDLIUM, _VOXPOPULI,
)  # fmt: skip
_B = (_AMI, _EARNINGS, _GIGASPEECH, _CLEAN, _OTHER, _SPGI, _VOXPOPULI)
_C = (_AMI_CLEANED, _EARNINGS, _GIGASPEECH_CLEANED, _CLEAN, _OTHER, _SPGI, _VOXPOPULI_CLEANED)
_D = (_AMI_CLEANED, _EARNINGS_CLEANED, _GIGASPEECH_CLEANED, _CLEAN, _OTHER, _SPGI, _VOXPOPULI_CLEANED)
_E = (*_D[:-1], _MONSOON, _VOXPOPULI_CLEANED)
_UNCLEANED = (_AMI, _EARNINGS, _GIGASPEECH, _VOXPOPULI)
_UNCLEANED_C = (_AMI, _GIGASPEECH, _VOXPOPULI)
_ROWS_OF_LANGUAGES = {
    "fleurs_de": 862, "fleurs_es": 908, "fleurs_fr": 676, "fleurs_it": 865, "fleurs_pt": 919, "mcv_de": 13_511,
    "mcv_es": 13_221, "mcv_fr": 14_760, "mcv_it": 8_951, "mls_es": 1_527, "mls_fr": 1_449, "mls_it": 657, "mls_pt": 192,
}  # fmt: skip
_LANGUAGES = tuple(
    EvalSet(name, name, _MULTILINGUAL, name, rows=rows, before=(_MULTILINGUAL_BEFORE,))
    for name, rows in _ROWS_OF_LANGUAGES.items()
)
_OAL = "oal-d1e99b2"
_KALDIALIGN = "kaldialign, compounds merged"

REGIMES = {
    regime.id: regime
    for regime in (
        Regime("A", "until about April 2026: eight sets, Whisper's normalizer", _A, "whisper", "jiwer"),
        Regime("A'", "April and May 2026: the sets of A, a normalizer in between", _A, None, "jiwer"),
        Regime("B", "June 2026: without TED-LIUM, compounds merged", _B, _OAL, _KALDIALIGN),
        Regime("C", "from 8 July 2026: AMI, GigaSpeech, VoxPopuli cleaned", _C, _OAL, _KALDIALIGN, _UNCLEANED_C),
        Regime("D", "from 20 August 2026: Earnings22 cleaned, too, by sessions", _D, _OAL, _KALDIALIGN, _UNCLEANED),
        Regime("E", "from about 28 August 2026: D and Monsoon", _E, _OAL, _KALDIALIGN, _UNCLEANED),
        Regime("multilingual", "August 2026: thirteen sets in five languages", _LANGUAGES, "multilingual", _KALDIALIGN),
        Regime(NONE, "not a leaderboard set", (), None, "the normalizer's"),
    )
}  # fmt: skip
DEFAULT = "E"


def regime(id: str) -> Regime:  # noqa: A002  (the field's name)
    """The regime of that id.

    Raises:
        UsageError: there is none.
    """
    if id not in REGIMES:
        raise UsageError(f"{quoted(id)}: no regime; there are {', '.join(REGIMES)}")
    return REGIMES[id]


def set_of(file_name: str, in_regime: Regime) -> EvalSet | None:
    """The set whose predictions a manifest named in the leaderboard's way has; None if no set of the regime."""
    for found in in_regime.sets + in_regime.extra:
        for dataset in (found.dataset, *found.before):
            if file_name.endswith(f"_DATASET_{dataset.replace('/', '-')}_{found.config}_{found.split}.jsonl"):
                return found
    return None
