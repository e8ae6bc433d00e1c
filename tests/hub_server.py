"""A hub on this machine: the file API that huggingface_hub uses, with faults to order and a log of what was asked.

Two servers run, as in the world: the hub, which lists, describes and sends small files, and a CDN at another origin, to
which it redirects for large ones. Unusual: a fault is matched by the text "METHOD path", and is used up.
"""

import gzip
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

PIECE_BYTES = 64 * 1024
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_RESOLVE_CACHE = re.compile(r"/api/resolve-cache/models/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<name>.+)")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")


@dataclass
class Request:
    """A request as it came, and what was sent for it."""

    server: str  # hub or cdn
    method: str
    path: str  # without the mirror's prefix and the query, unquoted
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    at_s: float
    name: str = ""  # the file it asks for, if any
    status: int = 0
    sent: int = 0  # bytes of body

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" has `match` in it."""

    match: str
    times: int = 1
    server: str | None = None  # hub or cdn; None: either
    status: int | None = None  # answer this, with `headers`
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of the file's bytes, or of a listing
    cut_after: int | None = None  # bytes of body, then the connection ends
    reset: bool = False  # it ends with a reset
    drop: bool = False  # it ends before the headers
    ignore_range: bool = False
    shift_range: int = 0  # answers 206 from so many bytes later than asked, and says so
    endless: bool = False  # zeros for ever after the body
    chunked: bool = False  # no Content-Length
    gzip: bool = False  # compressed, if the client takes that, and then without Content-Length, as the hub sends text
    stall_after: int | None = None  # bytes of body, then wait for `Hub.resume`
    delay_s: float = 0.0


@dataclass
class Repo:
    """Files by commit, which of them are in LFS, and where main is."""

    commits: dict[str, dict[str, bytes]]
    main: str
    lfs: frozenset[str] = frozenset()
    gated: bool = False


class Hub:
    """The repositories, the faults in store, and the log."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.listed: dict[str, dict[str, Any]] = {}  # by file name, what the listing says instead
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.prefix = ""
        self.page_entries = 1000
        self.resolve_cache = False  # send small files from another path of this host, as the public hub does
        self.stalled = threading.Event()
        self.resume = threading.Event()
        self._lock = threading.Lock()
        self.servers = {name: _Server(self, name) for name in ("hub", "cdn")}

    @property
    def url(self) -> str:
        return self.origin("hub") + self.prefix

    def origin(self, server: str) -> str:
        return f"http://127.0.0.1:{self.servers[server].server_port}"

    def add(self, repo_id: str, commit: str, files: Mapping[str, bytes], *, lfs: frozenset[str] = frozenset()) -> Repo:
        """Publish files as a commit, and move main to it."""
        repo = self.repos.setdefault(repo_id, Repo({}, commit))
        repo.commits[commit] = dict(files)
        repo.main, repo.lfs = commit, lfs
        return repo

    def fault(self, match: str, **what: Any) -> Fault:
        self.faults.append(Fault(match, **what))
        return self.faults[-1]

    def take_fault(self, request: Request) -> Fault:
        """The first fault that fits, or one without effect."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.match in request.line and fault.server in {None, request.server}:
                    fault.times -= 1
                    return fault
        return Fault("")

    def gets(self, name: str) -> list[Request]:
        """Each GET that was answered with bytes of this file, or with an error instead of them."""
        return [r for r in self.log if r.method == "GET" and r.name == name and r.status not in {302, 307}]

    def bytes_sent(self, name: str) -> int:
        return sum(request.sent for request in self.gets(name))

    def names(self) -> set[str]:
        """Every file that was asked for."""
        return {request.name for request in self.log if request.name}

    def shut(self) -> None:
        self.resume.set()
        for server in self.servers.values():
            server.shut()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub and its CDN, each on a free port of 127.0.0.1."""
    hub = Hub()
    for server in hub.servers.values():
        server.thread.start()
    try:
        yield hub
    finally:
        hub.shut()
    assert not [error for server in hub.servers.values() for error in server.errors]


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        self.errors: list[BaseException] = []
        self.open: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # a client may go away
            self.errors.append(error)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def shut(self) -> None:
        """End at once, connections included: who asks now is refused."""
        self.shutdown()
        self.thread.join()
        self.server_close()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _HungUpError(ConnectionError):
    """The server itself ended the connection."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the library
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        path = unquote(parts.path).removeprefix(hub.prefix if self.server.name == "hub" else "")
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(parts.query)
        self.request_ = Request(self.server.name, self.command, path, query, headers, time.monotonic())
        found = _RESOLVE.fullmatch(path) or _RESOLVE_CACHE.fullmatch(path)
        self.request_.name = found["name"] if found else path.rpartition("/")[2] if self.server.name == "cdn" else ""
        hub.log.append(self.request_)
        self.fault = hub.take_fault(self.request_)
        time.sleep(self.fault.delay_s)
        if self.fault.drop:
            self._hang_up()
        if self.fault.status is not None:
            self._send(self.fault.status, self.fault.headers, self.fault.body or b"")
        elif self.server.name == "cdn":
            self._cdn(path)
        elif tree := _TREE.fullmatch(path):
            self._tree(tree["repo"], tree["revision"])
        elif found:
            self._resolve(found["repo"], found["revision"], found["name"])
        else:
            self._refuse(404, "EntryNotFound")

    def _commit(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and commit that are meant; None when the answer is already sent."""
        hub = self.server.hub
        if new := hub.renamed.get(repo_id):
            # as the hub does: to the same host, by path
            to = hub.prefix + self.request_.path.replace(repo_id, new)
            query = urlsplit(self.path).query
            self._send(307, {"Location": quote(to) + ("?" + query if query else "")}, b"")
        elif repo_id not in hub.repos:
            self._refuse(401, "RepoNotFound")
        elif hub.repos[repo_id].gated and self.request_.headers.get("authorization") != "Bearer hf_right":
            self._refuse(403 if "authorization" in self.request_.headers else 401, "GatedRepo")
        else:
            repo = hub.repos[repo_id]
            commit = repo.main if revision == "main" else revision
            if commit in repo.commits:
                return repo, commit
            self._refuse(404, "RevisionNotFound")
        return None

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        hub, (repo, commit) = self.server.hub, found
        headers = {"X-Repo-Commit": commit}
        if name not in repo.commits[commit]:
            self._refuse(404, "EntryNotFound", headers)
            return
        body = repo.commits[commit][name]
        if name not in repo.lfs and hub.resolve_cache and "resolve-cache" not in self.request_.path:
            to = f"{hub.prefix}/api/resolve-cache/models/{repo_id}/{commit}/{quote(name)}"
            self._send(307, {**headers, "Location": to}, b"")
            return
        if name not in repo.lfs:
            self._send_file(body, {**headers, "ETag": f'"{git_sha1(body)}"'})
            return
        location = f"{hub.origin('cdn')}/{repo_id}/{commit}/{quote(name)}?signature=abc"
        linked = {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"'}
        self._send(302, {**headers, **linked, "Location": location}, b"")

    def _cdn(self, path: str) -> None:
        org, repo, commit, name = path.removeprefix("/").split("/", 3)
        self._send_file(self.server.hub.repos[f"{org}/{repo}"].commits[commit][name], {"ETag": '"cdn"'})

    def _tree(self, repo_id: str, revision: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        hub, (repo, commit) = self.server.hub, found
        recursive = self.request_.query.get("recursive", ["false"])[0].lower() == "true"
        entries = list(_entries(repo, commit, hub.listed, recursive=recursive))
        start = int(self.request_.query.get("cursor", ["0"])[0])
        stop = start + hub.page_entries
        headers = {"Content-Type": "application/json"}
        if stop < len(entries):
            url = f"{hub.url}/api/models/{repo_id}/tree/{revision}?recursive={recursive}&cursor={stop}"
            headers["Link"] = f'<{url}>; rel="next"'
        headers.update(self.fault.headers)
        body = json.dumps(entries[start:stop]).encode() if self.fault.body is None else self.fault.body
        self._send(200, headers, body)

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": f"{code} it is", "Content-Type": "application/json"}
        self._send(status, {**(headers or {}), **said}, json.dumps({"error": f"{code} it is"}).encode())

    def _send_file(self, body: bytes, headers: Mapping[str, str]) -> None:
        """The whole file, or the end of it that Range asks for."""
        body = body if self.fault.body is None else self.fault.body
        asked = re.fullmatch(r"bytes=(\d+)-", self.request_.range or "")
        if asked is None or self.fault.ignore_range:
            self._send(200, {**headers, "Accept-Ranges": "bytes"}, body)
            return
        start = int(asked[1]) + self.fault.shift_range
        if start >= len(body):
            self._send(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            return
        content_range = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self._send(206, {**headers, **content_range}, body[start:])

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.request_.status = status
        self.send_response(status)
        chunked = self.fault.endless or self.fault.chunked
        if self.fault.gzip and "gzip" in self.request_.headers.get("accept-encoding", ""):
            headers, body, chunked = {**headers, "Content-Encoding": "gzip"}, gzip.compress(body), True
        for name, value in headers.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in self._pieces(body):
            framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
            self.wfile.write(framed)
            self.request_.sent += len(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _pieces(self, body: bytes) -> Iterator[bytes]:
        fault, end = self.fault, len(body)
        stops = {at for at in (fault.cut_after, fault.stall_after) if at is not None}
        marks = sorted({0, end, *range(0, end, PIECE_BYTES), *(at for at in stops if at <= end)})
        for start, stop in zip(marks, [*marks[1:], end], strict=True):
            if start == fault.stall_after:
                self.server.hub.stalled.set()
                self.server.hub.resume.wait(60)
            if start == fault.cut_after:
                self._hang_up()
            if start < stop:
                yield body[start:stop]
        while fault.endless:
            yield bytes(PIECE_BYTES)

    def _hang_up(self) -> None:
        if self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
        raise _HungUpError


def git_sha1(body: bytes) -> str:
    """The name git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def _entries(
    repo: Repo, commit: str, listed: Mapping[str, Mapping[str, Any]], *, recursive: bool
) -> Iterator[dict[str, Any]]:
    """The listing as the hub gives it: folders at the top unless `recursive`."""
    folders = set()
    for name, body in repo.commits[commit].items():
        folder, slash, _ = name.partition("/")
        if slash and folder != ".." and not recursive:
            if folder not in folders:
                folders.add(folder)
                yield {"type": "directory", "oid": git_sha1(folder.encode()), "size": 0, "path": folder}
            continue
        entry: dict[str, Any] = {"type": "file", "oid": git_sha1(body), "size": len(body), "path": name}
        if name in repo.lfs:
            sha256 = hashlib.sha256(body).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(body)}\n".encode()
            entry["oid"] = git_sha1(pointer)
            entry["lfs"] = {"oid": sha256, "size": len(body), "pointerSize": len(pointer)}
        yield entry | dict(listed.get(name, {}))
