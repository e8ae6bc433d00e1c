"""Parquet shards as hubs have them: which belong to a split, and their rows, a few at a time.

A shard is named SPLIT-00000-of-00002.parquet, SPLIT.parquet, or lies in a folder SPLIT; a config is a folder above it.
Unusual: the first pass over a set reads all columns but the audio, which is a hundredth of the bytes.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from arkasr.errors import ArkASRError, MissingExtraError, UsageError
from arkasr.evaluate.rows import AUDIO, TEXT, Item, Record, locate, named

ROWS = 32  # at once: a row has up to a megabyte of audio
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")


def in_folder(place: Path, *, config: str, split: str) -> Callable[[bool], Iterator[Item]]:
    """Rows of a folder's shards, or of the one file.

    Raises:
        UsageError: it has none of this config and split, or not all of them.
    """
    if place.is_file():
        folder, names = place.parent, [place.name]
    else:
        found = [str(path.relative_to(place).as_posix()) for path in sorted(place.rglob("*.parquet"))]
        folder, names = place, shards(found, config=config, split=split, place=str(place))

    def rows(with_audio: bool) -> Iterator[Item]:
        return read([folder / name for name in names], lambda name: locate(folder, name), with_audio=with_audio)

    return rows


def shards(names: Sequence[str], *, config: str, split: str, place: str) -> list[str]:
    """Those of the paths, relative to a repository, that hold this split, in order.

    Raises:
        UsageError: there are none, those of several configs, or some are missing.
    """
    chosen = [name for name in names if _split_of(PurePosixPath(name)) == split]
    if config:
        chosen = [name for name in chosen if config in PurePosixPath(name).parts[:-1]]
    homes = sorted({str(PurePosixPath(name).parent) for name in chosen})
    if not chosen:
        raise UsageError(f"{place}: no parquet of {f'config {config!r} and ' if config else ''}split {split!r} in it")
    if len(homes) > 1:
        raise UsageError(f"{place}: {named(homes, 'split ' + repr(split) + ' is in')}; give the config")
    numbered = [found for name in chosen if (found := _NUMBERED.fullmatch(PurePosixPath(name).stem))]
    if numbered and len(chosen) != int(numbered[0]["count"]):
        raise UsageError(
            f"{place}: {len(chosen)} of {int(numbered[0]['count'])} shards of split {split!r}; get them all"
        )
    return sorted(chosen)


def _split_of(path: PurePosixPath) -> str:
    if found := _NUMBERED.fullmatch(path.stem):
        return found["split"]
    return path.parent.name if path.stem.isdigit() else path.stem


def read(paths: Iterator[Path] | Sequence[Path], find: Callable[[str], Path], *, with_audio: bool) -> Iterator[Item]:
    """The rows of shards, numbered through; `find` says where a file is that a row names.

    Raises:
        MissingExtraError: pyarrow is not installed.
        UsageError: a shard is damaged, or has no column of audio or references.
    """
    try:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtraError("parquet: pyarrow is not installed; pip install 'arkasr[eval]'") from None
    number = 0
    for path in paths:
        try:
            with ParquetFile(path, pre_buffer=False) as file:
                source, is_heavy = _source(file.schema_arrow, str(path))
                wanted = [name for name in file.schema_arrow.names if with_audio or not is_heavy or name != source]
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(ROWS, row_groups=[group], columns=wanted):
                        for fields in batch.to_pylist():
                            yield _item(Record(f"{path}: row {number}", fields), number, source, find, with_audio)
                            number += 1
        except ArkASRError:  # of `find`, and some are OSErrors too
            raise
        except (pa.ArrowException, OSError) as error:
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"{path}: not readable as parquet ({why}); get the file again") from None


def _source(schema: Any, place: str) -> tuple[str, bool]:
    """The column of audio, and whether it has the audio itself, and not a file's name."""
    source = next((name for name in AUDIO if name in schema.names), None)
    if source is None or not {*TEXT} & {*schema.names}:
        what = "audio" if source is None else "references"
        raise UsageError(f"{place}: no column of {what}, of {', '.join(schema.names)}; give another config or split")
    return source, str(schema.field(source).type) not in ("string", "large_string")


def _item(record: Record, number: int, column: str, find: Callable[[str], Path], with_audio: bool) -> Item:
    """A row; its audio is bytes, {bytes, path}, or the name of a file. Without a name it is called as elsewhere."""
    value = record.fields.get(column)
    if isinstance(value, str):
        return record.item(value, find(value) if with_audio else None)
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    default = f"sample_{number}"
    if isinstance(content, bytes) or not with_audio:
        return record.item(default, content)
    return record.item(default, find(name) if isinstance(name, str) and name else None)
