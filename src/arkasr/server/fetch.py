"""A recording at a URL: fetched from where the operator allows, and from nowhere else.

A URL makes this machine open a connection that its sender could not open: to the machine itself, to its neighbours, to
the cloud's metadata. So a name is resolved once, every address that came back is checked, and the connection goes to
one of those very addresses; a redirect starts over. Unusual: HTTP is read by hand, for the standard clients resolve
again, obey proxies of the environment, and wait without end for a server that drips.
"""

import errno
import io
import re
import selectors
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import count
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin

from arkasr.errors import ArkASRError, UsageError, quoted

Resolver = Callable[[str], Sequence[str]]  # host name -> its addresses; OSError: it has none
_Address = IPv4Address | IPv6Address
_T = TypeVar("_T")

MAX_URL_CHARS = 8192
MAX_HEAD_BYTES = 64 * 1024
_PIECE_BYTES = 64 * 1024
_POLL_S = 0.1  # how late a cancellation may be noticed
_PORTS = {"http": 80, "https": 443}
_INSTEAD = "upload the file instead"
_DAMAGED = f"its answer is not the HTTP that this server reads; {_INSTEAD}"
_REDIRECTS = (301, 302, 303, 307, 308)
_UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK)
# ASCII without space, quotes, <>, backslash, ^, `, {|}. No fragment, for it is never sent, and no userinfo: the host is
# what stands before the first colon or slash, and there is no second reading.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<authority>(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.\-]+)(?::(?P<port>[0-9]{1,5}))?)"
    r"(?P<path>(?:[/?][!$-;=?-Z\[\]_a-z~]*)?)",
    re.IGNORECASE | re.ASCII,  # without ASCII, a long s would be an s
)
_NAME = re.compile(r"(?=.{1,253}\Z)(?!-)[a-z0-9_\-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_\-]{1,63}(?<!-))*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")
_FIELD_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
# binary/ is what object stores send for names they do not know.
_RECORDING = re.compile(r"(?:audio|video)/[!#$&^_.+\-0-9a-z]+|(?:application|binary)/octet-stream|application/ogg")
_UNICAST, _NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")
# What `is_global` of one Python or another lets through: protocol assignments (with Oracle's metadata), 6to4 relays,
# multicast, Azure's host agent; Teredo and other protocol assignments, documentation, 6to4.
_SPECIAL_V4 = ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4", "168.63.129.16/32")
_SPECIAL = [ip_network(one) for one in (*_SPECIAL_V4, "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


class UrlError(ArkASRError, ValueError):
    """A URL that is refused or sends no recording; the message names its host and nothing that is secret in it."""


class _RefusalError(Exception):
    """What is wrong and the remedy, before the host is put in front."""


@dataclass(frozen=True)
class UrlPolicy:
    """Where recordings may be fetched from; UsageError for what is no host or no network.

    A host is "a.org" for that one, ".a.org" for its subdomains too, "*" for any; without hosts, no URL is fetched.
    """

    hosts: tuple[str, ...]
    max_bytes: int
    timeout_s: float  # for all together: resolving, redirects, reading
    max_redirects: int = 3
    ports: tuple[int, ...] = (80, 443)
    private_networks: tuple[str, ...] = ()  # CIDR networks allowed although their addresses are not public

    def __post_init__(self) -> None:
        for host in self.hosts:
            try:
                if host != "*":
                    _host(host.removeprefix("."))
            except _RefusalError:
                raise UsageError(
                    f"{quoted(host)}: no host to fetch from; give example.org, .example.org (with its subdomains) or *"
                ) from None
        for network in self.private_networks:
            try:
                ip_network(network)
            except ValueError as error:
                raise UsageError(f"{quoted(network)}: no network ({error}); write it like 10.20.0.0/16") from None


def _is_listed(host: str | _Address, hosts: tuple[str, ...]) -> bool:
    return any(
        one == "*" or (f".{host}".endswith(one.lower()) if one.startswith(".") else _host(one) == host) for one in hosts
    )


def _is_allowed(address: _Address, private_networks: tuple[str, ...]) -> bool:
    if isinstance(address, IPv6Address) and address.scope_id:
        return False
    return _is_public(address) or any(address in ip_network(network) for network in private_networks)


def _is_public(address: _Address) -> bool:
    """Whether anybody on the internet could open a connection to it."""
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return address in _NAT64 and _is_public(IPv4Address(int(address) % 2**32))
    return address.is_global and not any(address in network for network in _SPECIAL)


def addresses_of(host: str) -> list[str]:
    """The addresses of a host name by the system's resolver; OSError when it has none."""
    found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)  # bytes: IDNA has had its say
    return [str(place[0]) for *_, place in found]


def fetch(
    url: str,
    out: BinaryIO,
    policy: UrlPolicy,
    *,
    resolve: Resolver = addresses_of,
    cancelled: threading.Event | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Write the recording at a URL to `out`, which holds a part of it when this fails.

    Setting `cancelled` ends it within 0.1 s; `tls` stands in for the default context, which trusts the system's
    authorities. Raises UrlError: the URL is refused, cannot be reached, sends no recording, too much or too slowly.
    """
    call = _Call(policy, resolve, tls, cancelled or threading.Event(), monotonic() + policy.timeout_s)
    with closing(call.received(url)) as pieces:
        out.writelines(pieces)


@dataclass(frozen=True)
class _Target:
    """A URL in its one reading."""

    scheme: str
    authority: str  # host and port as they were written
    host: str | _Address
    port: int
    path: str


def _host(text: str) -> str | _Address:
    """A host in its one accepted spelling: what other readers would take for an address is an address, or refused."""
    text = text.lower()
    try:
        if text.startswith("["):
            return IPv6Address(text[1:-1])
        if _NUMBER.fullmatch(text.rpartition(".")[2]):
            return IPv4Address(text)
    except ValueError:
        raise _RefusalError("the host is no address as 192.0.2.1 or [2001:db8::1]; write it so, or as a name") from None
    if not _NAME.fullmatch(text):
        raise _RefusalError("the host is no name; write it in ASCII, without empty parts and without a final dot")
    return text


def _target(url: str) -> _Target:
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if match is None:
        raise _RefusalError(
            f"write it as http(s)://HOST/PATH, in ASCII, without user name, \\ and #, within {MAX_URL_CHARS} characters"
        )
    scheme, host = match["scheme"].lower(), _host(match["host"])
    path = match["path"] if match["path"].startswith("/") else f"/{match['path']}"
    return _Target(scheme, match["authority"], host, int(match["port"] or _PORTS[scheme]), path)


@dataclass(frozen=True)
class _Call:
    """One call of `fetch`: what is allowed, who resolves, and until when."""

    policy: UrlPolicy
    resolve: Resolver
    tls: ssl.SSLContext | None
    cancelled: threading.Event
    end_s: float

    def received(self, url: str) -> Generator[bytes]:
        """The bytes at a URL, wherever it redirects to."""
        place = host = "the URL"
        try:
            target = _target(url)
            place = host = str(target.host)
            for left in count(self.policy.max_redirects, -1):
                with self._opened(target) as stream:
                    status, headers = _head(stream)
                    if status not in _REDIRECTS:
                        yield from _body(stream, status, headers, self.policy.max_bytes)
                        return
                place = f"{host} (redirected)"
                target = self._redirected(target, headers, left)
        except _RefusalError as refusal:
            raise UrlError(f"{place}: {refusal}") from None
        except ssl.SSLCertVerificationError:
            raise UrlError(f"{place}: its certificate is not valid for this name; {_INSTEAD}") from None
        except OSError:
            raise UrlError(f"{place}: cannot be reached, or the connection broke; try again, or {_INSTEAD}") from None

    def _redirected(self, source: _Target, headers: dict[str, str], left: int) -> _Target:
        if left <= 0 or "location" not in headers:
            raise _RefusalError(f"more than {self.policy.max_redirects} times, or nowhere; give the last URL")
        try:
            target = _target(urljoin(f"{source.scheme}://{source.authority}{source.path}", headers["location"]))
        except ValueError:
            raise _RefusalError("to what is no URL; give the last URL") from None
        if (source.scheme, target.scheme) == ("https", "http"):
            raise _RefusalError("from https to http, which anybody on the way could change; give the last URL")
        return target

    @contextmanager
    def _opened(self, target: _Target) -> Iterator[io.BufferedReader]:
        """What the target answers to a GET, if all of the policy allows it."""
        if not self.policy.hosts:
            raise _RefusalError(f"this server fetches no URLs; {_INSTEAD}")
        if not _is_listed(target.host, self.policy.hosts):
            raise _RefusalError(f"not among the hosts that this server fetches from; {_INSTEAD}, or ask the operator")
        if target.port not in self.policy.ports:
            raise _RefusalError(f"port {target.port} is not one that this server fetches from; {_INSTEAD}")
        with ExitStack() as stack:
            connection = stack.enter_context(self._connected(self._addresses(target.host), target.port))
            if target.scheme == "https":
                tls = self.tls or ssl.create_default_context()
                connection = tls.wrap_socket(
                    connection, server_hostname=str(target.host), do_handshake_on_connect=False,
                    suppress_ragged_eofs=False,  # or a file without a length could be cut on the way
                )  # fmt: skip
                stack.enter_context(connection)
            wire = _Wire(connection, self.slice_s)
            wire.send(
                f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: arkasr/{version('arkasr')}\r\n"
                "Accept: audio/*, video/*, */*;q=0.1\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode()
            )
            yield io.BufferedReader(wire, _PIECE_BYTES)

    def _addresses(self, host: str | _Address) -> list[_Address]:
        """Where to connect to, each allowed; whether there is such a name is not told, for those inside are secret."""
        answers: SimpleQueue[list[_Address]] = SimpleQueue()

        def ask() -> None:
            found: list[_Address] = []
            with suppress(OSError, ValueError):
                found = [ip_address(one) for one in (self.resolve(host) if isinstance(host, str) else [host])]
            answers.put(found)

        # A resolver cannot be told when to end; what it says later is dropped.
        threading.Thread(target=ask, name="arkasr-resolve", daemon=True).start()
        while True:
            with suppress(Empty):
                found = answers.get(timeout=self.slice_s())
                if found and all(_is_allowed(one, self.policy.private_networks) for one in found):
                    return found
                raise _RefusalError("not a public host that can be found; check the name, or upload the file")

    def _connected(self, addresses: list[_Address], port: int) -> socket.socket:
        """A connection to the first address that answers; a silent one gets its share of the time."""
        for number, address in enumerate(addresses):
            end_s = monotonic() + (self.end_s - monotonic()) / (len(addresses) - number)
            with ExitStack() as stack, selectors.DefaultSelector() as selector:
                family = socket.AF_INET if address.version == 4 else socket.AF_INET6
                connection = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_WRITE)
                code = connection.connect_ex((str(address), port))
                while code in _UNDER_WAY and monotonic() < end_s:
                    if selector.select(self.slice_s()):
                        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    stack.pop_all()
                    return connection
        raise ConnectionError

    def slice_s(self) -> float:
        """How long to wait before asking again, or the end of waiting."""
        if self.cancelled.is_set():
            raise _RefusalError("cancelled; send the request again")
        left_s = self.end_s - monotonic()
        if left_s <= 0:
            raise _RefusalError(f"took too long; {_INSTEAD}")
        return min(left_s, _POLL_S)


class _Wire(io.RawIOBase):
    """A connection, with TLS or without, on which no wait outlasts the clock."""

    def __init__(self, connection: socket.socket, slice_s: Callable[[], float]) -> None:
        self._connection = connection
        self._slice_s = slice_s

    def send(self, request: bytes) -> None:
        if isinstance(self._connection, ssl.SSLSocket):
            self._patiently(self._connection.do_handshake)
        while request:
            request = request[self._patiently(partial(self._connection.send, request)) :]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._patiently(lambda: self._connection.recv_into(buffer))

    def _patiently(self, step: Callable[[], _T]) -> _T:
        while True:
            self._connection.settimeout(self._slice_s())
            with suppress(TimeoutError):
                return step()


def _head(stream: io.BufferedReader) -> tuple[int, dict[str, str]]:
    """Status and fields, by lower-case name, of an answer; of what comes again, the values joined by commas."""
    lines = _head_lines(stream)
    while status := _STATUS.fullmatch(next(lines)):
        fields: dict[str, str] = {}
        for line in lines:
            if line in {b"\r\n", b"\n"}:
                break
            name, colon, value = line.partition(b":")
            if not colon or not _FIELD_NAME.fullmatch(name):
                raise _RefusalError(_DAMAGED)
            key, text = name.decode("ascii").lower(), value.strip(b" \t\r\n").decode("latin-1")
            fields[key] = f"{fields[key]}, {text}" if key in fields else text
        if int(status[1]) >= 200:  # what comes before is information, and another answer follows
            return int(status[1]), fields
    raise _RefusalError(_DAMAGED)


def _head_lines(stream: io.BufferedReader) -> Iterator[bytes]:
    left = MAX_HEAD_BYTES
    while (line := stream.readline(left)).endswith(b"\n"):
        left -= len(line)
        yield line
    raise _RefusalError(f"its answer has no end of its head, or none within {MAX_HEAD_BYTES} bytes; {_INSTEAD}")


def _body(stream: io.BufferedReader, status: int, headers: dict[str, str], max_bytes: int) -> Iterator[bytes]:
    """The bytes of an answer that is a recording."""
    if status != 200:
        raise _RefusalError(f"it answered with status {status}; try the URL in a browser, or upload the file")
    kind = headers.get("content-type", "application/octet-stream").partition(";")[0].strip()
    if not _RECORDING.fullmatch(kind.lower()):
        raise _RefusalError("what it sends is no audio or video by its Content-Type; give the URL of the file itself")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _RefusalError(f"it sends the file compressed (Content-Encoding), though asked not to; {_INSTEAD}")
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding", "chunked")
    both = {"content-length", "transfer-encoding"} <= headers.keys()
    if both or coding.lower() != "chunked" or not re.fullmatch(r"[0-9]{1,18}", length):
        raise _RefusalError(_DAMAGED)
    too_large = _RefusalError(f"the file has more than {max_bytes / 1e6:g} MB; cut or compress it")
    if int(length) > max_bytes:
        raise too_large
    left = max_bytes
    for piece in _pieces(stream, headers):
        left -= len(piece)
        if left < 0:
            raise too_large
        yield piece


def _pieces(stream: io.BufferedReader, headers: dict[str, str]) -> Iterator[bytes]:
    if "content-length" in headers:
        yield from _exactly(stream, int(headers["content-length"]))
    elif "transfer-encoding" not in headers:
        while piece := stream.read1(_PIECE_BYTES):
            yield piece
    else:
        while chunk := _CHUNK.fullmatch(stream.readline(1024)):
            size = int(chunk[1], 16)
            yield from _exactly(stream, size)
            if size == 0:
                return
            if stream.readline(2) != b"\r\n":
                break
        raise _RefusalError(_DAMAGED)


def _exactly(stream: io.BufferedReader, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        piece = stream.read1(min(num_bytes, _PIECE_BYTES))
        if not piece:
            raise _RefusalError(f"the connection ended before the file did; try again, or {_INSTEAD}")
        num_bytes -= len(piece)
        yield piece
