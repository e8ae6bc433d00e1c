"""One commit of a hub repository into a folder: only the published file names, resumed, bounded and verified.

The client is huggingface_hub, with its own settings: HF_ENDPOINT for a mirror, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT.
Unusual: the bytes come through its `http_get`, not `snapshot_download`, whose partial files die with the process: here
a file is NAME.part until its hash is right, and the next process goes on where the last was stopped.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import BufferedWriter, FileIO
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal, cast

import httpx2
from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import hf_raise_for_status, http_backoff  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import silent_tqdm

from arkasr import files
from arkasr.errors import ArkASRError, CheckpointMismatchError, ModelNotFoundError, UsageError

MAX_PAGES = 20  # of a listing, with up to 1000 names each
_AGAIN = "pull again: it goes on from there"
Progress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class _Remote:
    """A file as the hub lists it: large ones by SHA-256, small ones by git's name for their bytes."""

    name: str
    size: int
    sha256: str | None
    git_sha1: str


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids every network call."""
    return constants.is_offline_mode()


def commit_of_main(repo_id: str) -> str:
    """The commit that `main` of a repository is at now.

    Raises:
        ModelNotFoundError: no such repository, or the hub cannot be reached.
    """
    with hub_errors(f"{repo_id} at main"):
        return _commit(repo_id, "main")


def _commit(repo_id: str, revision: str) -> str:
    """The commit of a revision, by its config's header; redirects say it too, and only they when one leads to a CDN."""
    url = hf_hub_url(repo_id, files.CONFIG, revision=revision)
    last = _ask("HEAD", url, timeout_s=constants.HF_HUB_ETAG_TIMEOUT)
    header = constants.HUGGINGFACE_HEADER_X_REPO_COMMIT
    return next((answer.headers[header] for answer in (last, *last.history) if header in answer.headers), "")


def _ask(method: Literal["GET", "HEAD"], url: str, *, timeout_s: float) -> httpx2.Response:
    """One answer of the hub. A busy hub is waited for as long as it asks, a missing or silent one is not."""
    answer = http_backoff(
        method, url, headers=_headers(), timeout=timeout_s, follow_redirects=True, retry_on_exceptions=()
    )
    hf_raise_for_status(answer)
    return answer


def fetch(
    repo_id: str, commit: str, folder: Path, *, sha256: Mapping[str, str], progress: Progress
) -> dict[str, files.Known]:
    """Bring `folder` to hold the published files of a commit, each verified; size and SHA-256 of each.

    Args:
        repo_id: ORG/NAME.
        commit: 40 hexadecimal digits.
        folder: is kept when this fails, and the next call goes on from there.
        sha256: known hashes, which what the hub sends must have.
        progress: takes bytes done and bytes in all.

    Raises:
        ModelNotFoundError: no such commit, no weights in it, or the hub cannot be reached.
        CheckpointMismatchError: what the hub sent is not what it listed, or not what `sha256` says.
        UsageError: no room on the disk.
    """
    place = f"{repo_id}@{commit}"
    with hub_errors(place):
        if (answered := _commit(repo_id, commit)) != commit:
            raise CheckpointMismatchError(f"{place}: the hub answers with commit {answered!r}; check HF_ENDPOINT")
        remotes = _listing(repo_id, commit)
    for name in sha256.keys() - {remote.name for remote in remotes}:
        raise CheckpointMismatchError(f"{place}: the hub lists no {name}, which is pinned; check HF_ENDPOINT")
    for remote in remotes:
        if remote.sha256 is not None and sha256.get(remote.name, remote.sha256) != remote.sha256:
            raise CheckpointMismatchError(
                f"{place}: the hub lists {remote.name} with SHA-256 {remote.sha256}, pinned is {sha256[remote.name]}; "
                "nothing was downloaded; check HF_ENDPOINT"
            )
    total = sum(remote.size for remote in remotes)
    _need_room(folder, total - sum(path.stat().st_size for path in folder.iterdir()))
    known: dict[str, files.Known] = {}
    done = 0
    for remote in remotes:

        def count(now: int, before: int = done) -> None:
            progress(before + now, total)

        known[remote.name] = _fetch_file(repo_id, commit, remote, folder, sha256.get(remote.name), count)
        done += remote.size
    return known


def _listing(repo_id: str, commit: str) -> list[_Remote]:
    """The published files of a commit, small ones first.

    Raises:
        ModelNotFoundError: no config or no weights among them.
        CheckpointMismatchError: the listing has no end, or a file has an absurd size.
    """
    place = f"{repo_id}@{commit}"
    remotes: list[_Remote] = []
    url = f"{constants.ENDPOINT}/api/models/{repo_id}/tree/{commit}"
    for _ in range(MAX_PAGES):
        page = _ask("GET", url, timeout_s=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        for entry in page.json():
            if entry["type"] == "file" and files.is_published(entry["path"]):
                large = entry.get("lfs") or {}
                remotes.append(_Remote(entry["path"], int(entry["size"]), large.get("oid"), str(entry["oid"])))
        if "next" not in page.links:
            break
        url = page.links["next"]["url"]
        if not url.startswith(constants.ENDPOINT + "/"):  # the token goes nowhere else
            raise CheckpointMismatchError(f"{place}: the listing goes on at another host; check HF_ENDPOINT")
    else:
        raise CheckpointMismatchError(f"{place}: the listing has more than {MAX_PAGES} pages; check HF_ENDPOINT")
    names = {remote.name for remote in remotes}
    if files.MANIFEST not in names:  # graphs of somebody else's
        remotes = [remote for remote in remotes if remote.name not in files.EXPORTED]
    if files.CONFIG not in names or not any(files.is_weights(name) or name == files.MANIFEST for name in names):
        raise ModelNotFoundError(
            f"{place}: lists no {files.CONFIG} with {files.WEIGHTS} or {files.MANIFEST}; not an ARK-ASR checkpoint"
        )
    for remote in remotes:
        if not 0 <= remote.size <= files.max_bytes(remote.name):
            raise CheckpointMismatchError(
                f"{place}: {remote.name} is listed with {remote.size} bytes; check HF_ENDPOINT"
            )
    return sorted(remotes, key=lambda remote: (remote.size, remote.name))


def _fetch_file(
    repo_id: str, commit: str, remote: _Remote, folder: Path, pinned: str | None, progress: Callable[[int], object]
) -> files.Known:
    """One file, continued where an earlier process left it; renamed only when its hash is right."""
    target = folder / remote.name
    part = folder / (remote.name + files.PART)
    if target.exists():  # finished by an earlier process, and perhaps damaged since
        target.replace(part)
    resumed = part.exists() and part.stat().st_size > 0
    _receive(repo_id, commit, remote, part, progress)
    wrong = _difference(part, remote, pinned)
    if wrong and resumed:  # the piece on the disk may have been damaged: once more from the start
        part.unlink()
        _receive(repo_id, commit, remote, part, progress)
        wrong = _difference(part, remote, pinned)
    if wrong:
        part.unlink()
        raise CheckpointMismatchError(f"{repo_id}@{commit}: {remote.name} has {wrong}; it was deleted, pull again")
    part.replace(target)
    progress(remote.size)
    return files.Known(remote.size, pinned or remote.sha256 or files.sha256(target))


def _difference(part: Path, remote: _Remote, pinned: str | None) -> str:
    """What is wrong with a received file, or nothing."""
    if (size := part.stat().st_size) != remote.size:
        return f"{size} bytes, the hub lists {remote.size}"
    if remote.sha256 is None and (sha1 := files.git_blob_sha1(part)) != remote.git_sha1:
        return f"git SHA-1 {sha1}, the hub lists {remote.git_sha1}"
    expected = pinned or remote.sha256
    if expected is not None and (sha256 := files.sha256(part)) != expected:
        return f"SHA-256 {sha256}, {'pinned is' if pinned else 'the hub lists'} {expected}"
    return ""


class _Part(BufferedWriter):
    """A file being received, which refuses bytes beyond the listed size and tells how many it has."""

    def __init__(self, path: Path, size: int, progress: Callable[[int], object]) -> None:
        super().__init__(FileIO(path, "ab"))
        self._left = size - self.tell()
        self._size = size
        self._progress = progress

    def write(self, chunk: Any) -> int:
        self._left -= len(chunk)
        if self._left < 0:
            raise _TooLongError
        written = super().write(chunk)
        self._progress(self._size - self._left)
        return written

    def truncate(self, pos: int | None = None) -> int:
        kept = super().truncate(pos)
        self._left = self._size - kept
        return kept


class _TooLongError(Exception):
    """More bytes came than were listed."""


def _receive(repo_id: str, commit: str, remote: _Remote, part: Path, progress: Callable[[int], object]) -> None:
    """Append to `part` until it has the listed size; cuts of the connection are resumed."""
    place = f"{repo_id}@{commit}: {remote.name}"
    if part.exists() and part.stat().st_size > remote.size:
        part.unlink()
    try:
        with hub_errors(place), _Part(part, remote.size, progress) as file:
            http_get(
                hf_hub_url(repo_id, remote.name, revision=commit),
                file,
                resume_size=file.tell(),
                headers=_headers(),
                expected_size=remote.size,
                displayed_filename=remote.name,
                tqdm_class=cast("Any", silent_tqdm),  # `_Part` counts what is written
            )
            file.flush()
            os.fsync(file.fileno())
    except _TooLongError:
        part.unlink()
        raise CheckpointMismatchError(
            f"{place} is longer than the {remote.size} bytes the hub lists; it was deleted, pull again"
        ) from None


def _headers() -> dict[str, str]:
    token = get_token()
    ours = {"user-agent": f"arkasr/{version('arkasr')}", "accept-encoding": "identity"}  # for whole and part alike
    return ours | ({"authorization": f"Bearer {token}"} if token else {})


def _need_room(folder: Path, num_bytes: int) -> None:
    free = disk_usage(folder).free
    if num_bytes > free:
        raise _no_room(f"{folder}: needs {num_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")


def _no_room(what: str) -> ArkASRError:
    return UsageError(f"{what}; make room or set ARKASR_CACHE to another disk, then pull again: it goes on from there")


def _refusal(error: HfHubHTTPError) -> str:
    """Why the hub says no, and the remedy."""
    if isinstance(error, GatedRepoError):
        return "gated; accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository at {constants.ENDPOINT}; check the name, and HF_TOKEN if it is private"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such commit; check it on the model's page"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the hub has no such file; without {files.CONFIG} it is not an ARK-ASR checkpoint"
    return f"{constants.ENDPOINT} answered HTTP {error.response.status_code}; {_AGAIN}"


@contextmanager
def hub_errors(place: str) -> Iterator[None]:
    """Turn the client's errors, and those of writing, into one line with a remedy."""
    try:
        yield
    except ArkASRError:  # said already; some are OSErrors or ValueErrors too
        raise
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"{place}: {_refusal(error)}") from None
    except httpx2.HTTPError as error:
        raise ModelNotFoundError(
            f"{place}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}); check the network, "
            f"then {_AGAIN}"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_room(f"{place}: {error.strerror}") from None
        if error.errno is None:  # http_get: the connection ended early, and would not again
            raise ModelNotFoundError(f"{place}: the connection ended early; {_AGAIN}") from None
        raise UsageError(
            f"{place}: cannot be written ({error.strerror}); set ARKASR_CACHE to a folder of yours"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointMismatchError(
            f"{place}: {constants.ENDPOINT} sent no answer of a hub ({type(error).__name__}); check HF_ENDPOINT"
        ) from None
