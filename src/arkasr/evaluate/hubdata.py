"""Test sets of a hub: one commit of a dataset repository, of which what is needed is fetched, verified and kept.

Files lie in `$ARKASR_CACHE/datasets/ORG--NAME/COMMIT`, beside the hub's listing of them. Unusual: shards are fetched
one by one, when their rows are wanted; a file bears its name only once its size and hash are those of the listing.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arkasr import files, hub
from arkasr.errors import CheckpointMismatchError, UsageError, quoted
from arkasr.evaluate import parquet
from arkasr.evaluate.rows import Item

LISTING = "arkasr.listing.json"
_ID = re.compile(r"([\w.\-]{1,96}/[\w.\-]{1,96})@([0-9a-f]{40})", re.ASCII)
_PLAIN = re.compile(r"(?!.*(?:^|/)\.)[^\\\x00-\x1f\x7f]{1,1000}", re.ASCII)  # no folder above, nothing hidden


class Repository:
    """A commit of a dataset repository; its files come from the hub only if that is allowed."""

    def __init__(self, place: str, *, allow_download: bool) -> None:
        """The repository ORG/NAME@COMMIT.

        Raises:
            UsageError: it is not written so; what is shorter than a commit can change its meaning.
        """
        found = _ID.fullmatch(place)
        if found is None or ".." in place:
            raise UsageError(f"{place}: give ORG/NAME@COMMIT with the full commit (40 digits 0-9a-f)")
        self.place = place
        self.repo_id, self.commit = found.groups()
        self.folder = hub.cache() / "datasets" / self.repo_id.replace("/", "--") / self.commit
        self._allowed = allow_download

    def rows(self, *, config: str, split: str) -> Callable[[bool], Iterator[Item]]:
        """The rows of a split, with audio or without.

        Raises:
            UsageError: the repository has no such split, or is not on this machine and must not be fetched.
            ModelNotFoundError: there is none, or the hub cannot be reached.
        """
        listing = self._listing()
        names = [name for name in listing if name.endswith(".parquet")]
        chosen = parquet.shards(names, config=config, split=split, place=self.place)
        files_by_end = {end: name for name in listing for end in (name, name.removeprefix("audio/"))}

        def find(name: str) -> Path:
            return self._file(files_by_end.get(name, name), listing)

        def rows(with_audio: bool) -> Iterator[Item]:
            return parquet.read((self._file(name, listing) for name in chosen), find, with_audio=with_audio)

        return rows

    def _refuse(self, what: str) -> None:
        from arkasr import download

        if not self._allowed or download.is_offline():
            how = "allow the download" if not self._allowed else "unset HF_HUB_OFFLINE"
            raise UsageError(f"{self.place}: {what} is not on this machine; {how}, or give a folder that has it")

    def _listing(self) -> dict[str, dict[str, Any]]:
        """Size and hash of each file of the commit."""
        path = self.folder / LISTING
        if path.is_file():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        self._refuse("it")
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        from arkasr import download

        listing: dict[str, dict[str, Any]] = {}
        with download.hub_errors(self.place):
            tree = HfApi().list_repo_tree(self.repo_id, repo_type="dataset", revision=self.commit, recursive=True)
            for entry in tree:
                if isinstance(entry, RepoFile) and _PLAIN.fullmatch(entry.path):
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    listing[entry.path] = {"size": entry.size, "sha256": sha256, "git_sha1": entry.blob_id}
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_text_atomically(path, json.dumps(listing))
        return listing

    def _file(self, name: str, listing: dict[str, dict[str, Any]]) -> Path:
        """One file of the commit, fetched if it is not here yet.

        Raises:
            UsageError: the commit has none of that name, or it may not be fetched.
            CheckpointMismatchError: what came is not what was listed.
        """
        if name not in listing:
            raise UsageError(f"{self.place}: no file {quoted(name)} in it; the set is not complete")
        path = self.folder / name
        if path.is_file() and path.stat().st_size == listing[name]["size"]:
            return path
        self._refuse(name)
        from huggingface_hub import hf_hub_download

        from arkasr import download

        with download.hub_errors(f"{self.place}: {name}"):
            home = self.folder / "fetching"  # where the client keeps, and continues, what is not complete
            came = Path(
                hf_hub_download(
                    self.repo_id, name, repo_type="dataset", revision=self.commit, local_dir=home, force_download=False
                )
            )
            wrong = _difference(came, listing[name])
            if wrong:
                came.unlink()
                raise CheckpointMismatchError(f"{self.place}: {name} has {wrong}; it was deleted, fetch it again")
            path.parent.mkdir(parents=True, exist_ok=True)
            came.replace(path)
        return path


def _difference(path: Path, listed: dict[str, Any]) -> str:
    """What is wrong with a file that came, or nothing."""
    if (size := path.stat().st_size) != listed["size"]:
        return f"{size} bytes, the hub lists {listed['size']}"
    if listed["sha256"] is not None:
        sha256 = files.sha256(path)
        return "" if sha256 == listed["sha256"] else f"SHA-256 {sha256}, the hub lists {listed['sha256']}"
    sha1 = files.git_blob_sha1(path)
    return "" if sha1 == listed["git_sha1"] else f"git SHA-1 {sha1}, the hub lists {listed['git_sha1']}"
