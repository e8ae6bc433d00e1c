"""Test sets: what is at a place, and what must be true of it before a number may be made of it.

    place -> layout -> Item, Item, ... -> survey: counted, filtered and digested, before any audio is heard

Unusual: a set is read twice. The first pass sees texts alone and refuses what would falsify a number, such as a wrong
count of rows; the second brings the audio, row by row. No network, unless a download is asked for.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arkasr.errors import UsageError
from arkasr.evaluate import rows as layouts
from arkasr.evaluate.manifest import file_name
from arkasr.evaluate.rows import Item, named
from arkasr.metrics import regimes
from arkasr.metrics.normalize import Normalizer
from arkasr.metrics.regimes import EvalSet

Kind = Literal["auto", "jsonl", "nemo", "leaderboard", "kaldi", "tsv", "parquet", "hub"]
KINDS: tuple[Kind, ...] = ("auto", "jsonl", "nemo", "leaderboard", "kaldi", "tsv", "parquet", "hub")
NOT_SCORED = "ignore time segment in scoring"
_HUB = re.compile(r"[^/@]+/[^/@]+@[^/@]*")

__all__ = ["KINDS", "Dataset", "Item", "Kind", "Survey", "open_dataset"]


@dataclass(frozen=True)
class Survey:
    """What the texts of a set say of it.

    Attributes:
        rows: in the data.
        kept: rows that are heard and scored.
        dropped: of the others, how many for which reason.
        references_sha256: of the JSON lines [id, text] of the rows kept.
    """

    rows: int
    kept: int
    dropped: Mapping[str, int]
    references_sha256: str


@dataclass(frozen=True)
class Dataset:
    """A test set, of which little has been read yet.

    Attributes:
        name: in the names of results, as are `config` and `split`.
        kind: its layout.
        language: of rows that state none.
        regime: id of the leaderboard's, of which it is a set, or None.
        expected_rows: how many must be kept, or None where nobody knows.
        revision: the commit of what came from a hub.
        normalizer: decides which references are empty; None keeps every row.
        rows: all its rows, with audio or without.
    """

    name: str
    config: str
    split: str
    place: str
    kind: Kind
    language: str
    regime: str | None
    expected_rows: int | None
    revision: str | None
    normalizer: Normalizer | None
    rows: Callable[[bool], Iterator[Item]]

    @property
    def has_audio(self) -> bool:
        """Whether it can be heard; somebody's results can only be scored."""
        return self.kind != "leaderboard"

    def __iter__(self) -> Iterator[Item]:
        """Rows that are kept, with their audio."""
        layouts.recording.cache_clear()  # a file may have changed since the last time
        return (item for item in self.rows(True) if self._why_not(item) is None)

    def _why_not(self, item: Item) -> str | None:
        """Why the leaderboard would not have this row heard."""
        if self.normalizer is None:
            return None
        if not item.text.strip():
            return "empty reference"
        normalized = self.normalizer.text(item.text).strip()
        if not normalized:
            return f"empty after {self.normalizer.name}"
        return NOT_SCORED if normalized == NOT_SCORED else None

    def survey(self) -> Survey:
        """Read all texts.

        Raises:
            UsageError: no rows, ids that stand twice, a column or reference that is missing, or a wrong count of rows.
        """
        digest, rows, kept, sessions = hashlib.sha256(), 0, 0, set[str]()
        ids: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        for item in self.rows(False):
            rows += 1
            ids[item.id] += 1
            if why := self._why_not(item):
                dropped[why] += 1
                continue
            kept += 1
            sessions.add(item.parent_id or item.id)
            digest.update(json.dumps([item.id, item.text]).encode() + b"\n")
        if twice := [name for name, count in ids.items() if count > 1]:
            raise UsageError(f"{self.place}: more than one row has {named(twice, 'the id')}; rows must be told apart")
        if not kept:
            raise UsageError(f"{self.place}: none of {rows} rows can be scored; check the split and the references")
        wrong = self.listed.complaint(kept, len(sessions)) if self.listed else None
        if self.expected_rows not in (None, kept):
            wrong = f"{kept} rows, the set has {self.expected_rows}"
        if wrong:
            raise UsageError(
                f"{self.place}: {wrong} ({rows} with those left out); this is another set, or a part of it"
            )
        return Survey(rows, kept, dict(dropped), digest.hexdigest())

    @property
    def title(self) -> tuple[str, str, str]:
        """Name, config and split."""
        return self.name, self.config, self.split

    @property
    def listed(self) -> EvalSet | None:
        """What the regime says of this set.

        Raises:
            UsageError: it is none of the regime's sets.
        """
        if self.regime is None or self.regime == regimes.NONE:
            return None
        found = regimes.set_of(file_name("", *self.title), regimes.regime(self.regime))
        if found is None:
            name = "/".join(filter(None, self.title))
            raise UsageError(f"{self.place}: {name} is no set of regime {self.regime}; give another name")
        return found


def open_dataset(
    place: str | Path,
    *,
    normalizer: Normalizer | None,
    kind: Kind = "auto",
    config: str = "",
    split: str = "test",
    name: str | None = None,
    language: str = "en",
    regime: str | None = None,
    expected_rows: int | None = None,
    allow_download: bool = False,
) -> Dataset:
    """The test set at a place: a manifest, a table, a folder, or ORG/NAME@COMMIT of a hub.

    Args:
        place: the file or folder, or the hub's id with its full commit.
        normalizer: rows whose reference it empties are left out, as the leaderboard does; None keeps every row.
        kind: the layout, where the place does not tell it.
        config: the part of a parquet folder or hub repository.
        split: rows of other splits are left out, where rows or files name one.
        name: in results; the place's own name if none is given.
        language: of rows that state none.
        regime: id of the leaderboard's, of which it is a set, and whose count of rows it must then have.
        expected_rows: how many rows must be kept, where no regime says it.
        allow_download: whether what is not on this machine may be fetched from the hub.

    Raises:
        UsageError: there is no such place, or it is in no known layout.
    """
    found, path = _kind(str(place), split) if kind == "auto" else kind, Path(place)
    own_name, revision = path.absolute().name if path.is_dir() else path.stem, None
    rows: Callable[[bool], Iterator[Item]]
    if found == "parquet":
        from arkasr.evaluate import parquet

        rows = parquet.in_folder(path, config=config, split=split)
    elif found == "hub":
        from arkasr.evaluate import hubdata

        repository = hubdata.Repository(str(place), allow_download=allow_download)
        own_name, revision = repository.repo_id, repository.commit
        rows = repository.rows(config=config, split=split)
    elif found in layouts.READERS:
        file = path if found == "kaldi" else _only_file(path, split, (".tsv",) if found == "tsv" else (".jsonl",))

        def rows(_audio: bool) -> Iterator[Item]:
            return layouts.of_split(layouts.READERS[found](file), split=split, place=file)
    else:
        raise UsageError(f"kind is {found!r}; give one of {', '.join(KINDS)}")
    return Dataset(
        name or own_name, config, split, str(place), found, language, regime, expected_rows, revision, normalizer, rows
    )


def _kind(place: str, split: str) -> Kind:
    path = Path(place)
    if path.is_file() and path.suffix in (".tsv", ".parquet"):
        return "tsv" if path.suffix == ".tsv" else "parquet"
    if path.is_file():
        record = next(layouts.json_records(path), None)
        fields = record.fields if record else {}
        return "leaderboard" if "pred_text" in fields else "nemo" if "audio_filepath" in fields else "jsonl"
    if path.is_dir():
        if (path / "wav.scp").is_file():
            return "kaldi"
        if any(path.glob("*.jsonl")) or any(path.glob("*.tsv")):
            return _kind(str(_only_file(path, split, (".jsonl", ".tsv"))), split)
        if any(path.rglob("*.parquet")):
            return "parquet"
        raise UsageError(f"{place}: neither wav.scp nor a .jsonl, .tsv or .parquet in it; name the test set's file")
    if _HUB.fullmatch(place):
        return "hub"
    raise UsageError(f"{place}: no such file or folder; give a test set, or ORG/NAME@COMMIT of a hub")


def _only_file(place: Path, split: str, suffixes: tuple[str, ...]) -> Path:
    """The place, or the manifest or table in it: that of the split, if there is one, else the only one."""
    if not place.is_dir():
        return place
    for name in ("manifest", split):
        for suffix in suffixes:
            if (place / (name + suffix)).is_file():
                return place / (name + suffix)
    found = sorted(path for path in place.iterdir() if path.suffix in suffixes)
    if len(found) != 1:
        raise UsageError(f"{place}: {len(found)} files {' or '.join(suffixes)} in it; name the one that is meant")
    return found[0]
