"""URLs against servers on this machine that lie, drip and redirect; names are resolved by the tests, never by DNS."""

import errno
import io
import ipaddress
import random
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arkasr import __version__
from arkasr.errors import ArkASRError, UsageError
from arkasr.server import fetch as fetching
from arkasr.server.fetch import MAX_HEAD_BYTES, UrlError, UrlPolicy, fetch

HERE = "127.0.0.1"
WHERE = "not a public host that can be found; check the name, or upload the file"
FORM = "write it as http"
SOUND = b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nContent-Length: 5\r\n\r\nsound"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# A key that is known to everybody, of a host that cannot exist, until 2120.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjSFABH7MhILabPCJ
sm7jVRYj6eP1Q8E0TAd4IMferaGhRANCAAQ7kSmEIfd3JWf1QY071TxZUYPJkfwS
XIb83PgPkvz7WAJ3/EkUlspiMeN60KvlDL+UnOeCS5uDGy0F+HjpbprD
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBcTCCARagAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxhcmNoaXZl
LnRlc3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDGFyY2hpdmUudGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDuRKYQh
93clZ/VBjTvVPFlRg8mR/BJchvzc+A+S/PtYAnf8SRSWymIx43rQq+UMv5Sc54JL
m4MbLQX4eOlumsOjUTBPMB0GA1UdEQQWMBSCDGFyY2hpdmUudGVzdIcEfwAAATAP
BgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBTDUuD6RWFem+wKQiDe2u1ap9wxczAK
BggqhkjOPQQDAgNJADBGAiEA8CH8VMBZZB1DLqufF0ox9IDyBHOIrHvbm9fVv/pf
lIgCIQDUoaLwJvDuedmRLx0HPzYPsFDGl9lRbCmJ+fJ17PUhng==
-----END CERTIFICATE-----
"""
Answer = bytes | Callable[[socket.socket], None]


class Site:
    """A web server that sends what it is told, byte by byte, and keeps what it was asked."""

    def __init__(
        self, host: str = HERE, *, port: int = 0, tls: ssl.SSLContext | None = None, mute: bool = False
    ) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.names: list[str | None] = []  # by SNI
        self.over = threading.Event()
        self._tls = tls
        self._mute = mute
        self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port: int = self._listener.getsockname()[1]
        if tls:
            tls.sni_callback = lambda _socket, name, _context: self.names.append(name)
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str = "/a.wav", *, host: str = HERE, scheme: str = "") -> str:
        return f"{scheme or ('https' if self._tls else 'http')}://{host}:{self.port}{path}"

    def shut(self) -> None:
        self.over.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with ExitStack() as stack, suppress(OSError):
            stack.enter_context(connection)
            if self._mute:
                self.over.wait()
            if self._tls:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += connection.recv(4096)
                if request.startswith(b"\x16"):  # TLS where none is spoken
                    return
            self.requests.append(request.decode("ascii"))
            answer = self.answers.get(request.split()[1].decode(), SOUND)
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)
                if self._tls:
                    connection.unwrap()  # type: ignore[attr-defined]


@pytest.fixture
def sites() -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:

        def make(host: str = HERE, **options: Any) -> Site:
            site = Site(host, **options)
            stack.callback(site.shut)
            return site

        yield make


@pytest.fixture
def site(sites: Callable[..., Site]) -> Site:
    return sites()


def policy_for(*sites: Site, **changes: Any) -> UrlPolicy:
    """Any host, the ports of these servers, and the two addresses of this machine."""
    networks = (HERE + "/32", "::1/128")
    policy = UrlPolicy(("*",), 1000, 5.0, ports=tuple(site.port for site in sites), private_networks=networks)
    return replace(policy, **changes)


def nobody(host: str) -> list[str]:
    raise AssertionError(f"{host} was resolved")


def here(_host: str) -> list[str]:
    return [HERE]


def get(url: str, policy: UrlPolicy, **options: Any) -> bytes:
    out = io.BytesIO()
    fetch(url, out, policy, **{"resolve": nobody, **options})
    return out.getvalue()


def refusal(url: str, policy: UrlPolicy, **options: Any) -> str:
    with pytest.raises(UrlError) as caught:
        get(url, policy, **options)
    assert isinstance(caught.value, ArkASRError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PUBLIC = UrlPolicy(("*",), 1000, 5.0)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that would have been connected to; nothing is."""
    addresses: list[str] = []

    def connected(_call: object, targets: list[Any], _port: int) -> socket.socket:
        addresses.extend(map(str, targets))
        raise ConnectionError

    monkeypatch.setattr(fetching._Call, "_connected", connected)
    return addresses


# --- URLs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "", "a.org", "//a.org/", "http:a.org", "http:/a.org", "http:///a", "http://", "http://:80/", "http://?x",
        "ftp://a.org/",
        "file:///etc/passwd", "gopher://a.org/", "data:audio/wav;base64,AAAA", "javascript:1",
        "http\u017f://a.org/", "HTTPX://a.org/",
        "http://user@a.org/", "http://user:pass@a.org/", "http://good.org@127.0.0.1/",
        "http://good.org:80@127.0.0.1/",
        "http://127.0.0.1\\@good.org/", "http://good.org\\@127.0.0.1/", "http:\\\\a.org\\",
        "http://a.org\\.good.org/",
        "http://good.org#@127.0.0.1/", "http://a.org/a#t=10", "http://a.org#", " http://a.org/", "http://a.org/ ",
        "http://a.org/a b",
        "http://a.org\t/", "ht\ntp://a.org/", "http://a.org/\r\nX: y", "http://a.org/\0", "http://a.org/\x7f",
        "http://a.org/\n",
        "http://127.0.0.1%2f@good.org/", "http://%31%32%37.0.0.1/", "http://127%2e0.0.1/",
        "http://a.org%00.good.org/",
        "http://\uff11\uff12\uff17.0.0.1/", "http://127\u30020\u30020\u30021/", "http://\u2460.org/",
        "http://b\u00fccher.example/",
        "http://\u212aelvin.org/", "http://a.org/\u00fc", "http://a.org:/", "http://a.org:+80/",
        "http://a.org:8 0/", "http://a.org:0x50/",
        "http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://[::1/", "http://::1/", "http://a.org]/",
        "http://a[.org/",
        "http://a.org/" + "a" * 8192,
    ],
)  # fmt: skip
def test_what_is_no_url(url: str) -> None:
    assert refusal(url, PUBLIC).startswith(f"the URL: {FORM}")


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0177.0.0.1", "0x7f.1", "0x7f000001", "127.1", "127.0.1", "017700000001", "0",
        "00000000.0.0.0", "127.0.0.01",
        "1.2.3.4.5", "256.1.1.1", "1.2.3.0x4", "0x", "a.0x7f", "a.1", "127.0.0.1.", "a.org.", "a..org", ".a.org",
        ".", "-a.org", "a-.org",
        "a" * 64 + ".org", "a." * 127 + "org", "[]", "[1.2.3.4]", "[::1:2:3:4:5:6:7:8]", "[:::]",
        "[0:0:0:0:0:0:0:g]", "[1]", "[::1.2.3.999]",
    ],
)  # fmt: skip
def test_what_is_no_host(host: str, dialled: list[str]) -> None:
    assert refusal(f"http://{host}/", PUBLIC).startswith("the URL: ")
    assert dialled == []


def test_urls_are_off_unless_hosts_are_named() -> None:
    assert (
        refusal("http://a.org/", UrlPolicy((), 1000, 5.0))
        == "a.org: this server fetches no URLs; upload the file instead"
    )


@pytest.mark.parametrize(
    ("hosts", "allowed", "refused"),
    [
        (("a.org",), ["a.org", "A.ORG"], ["b.a.org", "ba.org", "a.org.evil.org", "a.or", "8.8.8.8"]),
        ((".a.org",), ["a.org", "b.a.org", "c.b.A.org"], ["ba.org", "a.org.evil.org", "org"]),
        (("A.org", ".B.org"), ["a.org", "x.b.org"], ["x.a.org"]),
        (("*",), ["a.org", "8.8.8.8", "[2606:4700::1111]", "my_bucket.a.org", "xn--bcher-kva.example"], []),
        (("8.8.8.8", "[2606:4700::1111]"), ["8.8.8.8", "[2606:4700:0::1111]"], ["8.8.4.4", "a.org", "[2606:4700::2]"]),
    ],
)  # fmt: skip
def test_the_list_of_hosts(hosts: tuple[str, ...], allowed: list[str], refused: list[str], dialled: list[str]) -> None:
    policy = replace(PUBLIC, hosts=hosts)
    for host in allowed:
        assert "cannot be reached" in refusal(f"http://{host}/", policy, resolve=lambda _: ["8.8.8.8"])
    assert len(dialled) == len(allowed)
    for host in refused:
        message = refusal(f"http://{host}/", policy)
        assert message.startswith(f"{host.strip('[]')}: not among the hosts that this server fetches from; ")


@pytest.mark.parametrize(
    "hosts", ["*.a.org", "http://a.org", "a.org:80", "a.org/", "", ".", "a.org.", "127.1", "\u00fc.org", "::1", "* "]
)
def test_a_policy_with_a_host_that_is_none(hosts: str) -> None:
    with pytest.raises(UsageError, match=r"give example\.org, \.example\.org"):
        UrlPolicy((hosts,), 1, 1.0)


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "intranet", ""])
def test_a_policy_with_a_network_that_is_none(network: str) -> None:
    with pytest.raises(UsageError, match=r"write it like 10\.20\.0\.0/16"):
        UrlPolicy(("*",), 1, 1.0, private_networks=(network,))


@pytest.mark.parametrize("port", [22, 81, 8000, 0, 65536, 99999])
def test_other_ports(port: int) -> None:
    assert refusal(f"http://a.org:{port}/", PUBLIC) == (
        f"a.org: port {port} is not one that this server fetches from; upload the file instead"
    )


# --- addresses ---------------------------------------------------------------------------------------------------

SPECIAL = [
    # this host, private, carrier-grade NAT, loopback, link-local with the clouds' metadata, protocols with Oracle's
    "0.0.0.0",  # noqa: S104 - nobody binds to it
    "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255",
    "127.0.0.1", "127.255.255.254", "169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1",
    "192.0.0.192",
    "192.168.0.1", "168.63.129.16",
    # documentation, 6to4 relays, benchmarking, multicast, reserved, broadcast
    "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255",
    # unspecified, loopback, IPv4-compatible and -mapped, also of public addresses, and translated
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "::ffff:8.8.8.8", "::ffff:0:127.0.0.1",
    # NAT64 of such addresses, its local prefix, discard, Teredo, protocols, ORCHID, documentation, 6to4, routing
    "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::224.0.0.1",
    "64:ff9b:1::8.8.8.8", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1",
    "2001:10::1", "2001:20::1", "2001:1ff::1", "2001:db8::1",
    "2002:7f00:1::1", "2002:a00:1::", "2002:808:808::1", "3fff::1", "5f00::1",
    # unique local with the cloud's metadata, link- and site-local, multicast
    "fc00::1", "fd00:ec2::254", "fdff::1", "fe80::1", "febf::1", "fec0::1", "ff02::1", "ff0e::1",
]  # fmt: skip


@pytest.mark.parametrize("address", SPECIAL)
def test_addresses_that_are_not_public(address: str, dialled: list[str]) -> None:
    literal = f"[{address}]" if ":" in address else address
    canonical = str(ipaddress.ip_address(address))
    assert refusal(f"http://{literal}/", PUBLIC) == f"{canonical}: {WHERE}"
    told = refusal("http://name.test/", PUBLIC, resolve=lambda _: [address])
    assert told == f"name.test: {WHERE}"
    assert refusal("http://name.test/", PUBLIC, resolve=lambda _: ["8.8.8.8", address, "2606:4700::1111"]) == told
    assert dialled == []


@pytest.mark.parametrize("address", ["fe80::1%eth0", "fe80::1%2", "2606:4700::1111%1", "::1%lo"])
def test_addresses_with_a_zone(address: str, dialled: list[str]) -> None:
    policy = replace(PUBLIC, private_networks=("::/0",))
    assert refusal("http://name.test/", policy, resolve=lambda _: [address]) == f"name.test: {WHERE}"
    assert dialled == []


def test_a_name_without_addresses_is_answered_like_one_of_the_inside() -> None:
    def unknown(_host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for resolver in (unknown, lambda _: [], lambda _: ["nonsense"]):
        assert refusal("http://name.test/", PUBLIC, resolve=resolver) == f"name.test: {WHERE}"


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255",
        "172.32.0.0", "192.0.1.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "2606:4700::1111",
        "2001:200::1", "2003::1", "2a00::1", "64:ff9b::8.8.8.8",
    ],
)  # fmt: skip
def test_public_addresses(address: str, dialled: list[str]) -> None:
    assert "cannot be reached" in refusal("http://name.test/", PUBLIC, resolve=lambda _: [address])
    assert dialled == [str(ipaddress.ip_address(address))]


def test_no_address_is_public_that_the_standard_library_knows_as_special() -> None:
    chance = random.Random(0)
    high = [int(ipaddress.ip_address(one)) for one in SPECIAL if ":" in one]
    some: list[Any] = [ipaddress.IPv4Address(chance.getrandbits(32)) for _ in range(20_000)]
    some += [
        ipaddress.IPv6Address(chance.choice(high) ^ chance.getrandbits(chance.randrange(128))) for _ in range(20_000)
    ]
    public = [one for one in some if fetching._is_public(one)]
    assert len(public) > 1000
    for one in public:
        assert one.is_global, one
        assert not (one.is_multicast or one.is_reserved) or one in ipaddress.ip_network("64:ff9b::/96"), one


def test_private_networks_let_in_nothing_but_themselves(dialled: list[str]) -> None:
    policy = replace(PUBLIC, private_networks=("10.20.0.0/16",))
    embedding = ("::ffff:10.20.30.40", "64:ff9b::10.20.30.40", "::10.20.30.40")
    for address in ("10.20.30.40", "10.21.0.1", "127.0.0.1", "169.254.169.254", *embedding):
        message = refusal("http://name.test/", policy, resolve=lambda _, address=address: [address])
        assert (WHERE in message) == (address != "10.20.30.40")
    assert dialled == ["10.20.30.40"]


def test_the_system_resolver(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = socket.getaddrinfo

    def noted(host: bytes, *arguments: Any, **more: Any) -> Any:
        asked.append(host)
        return real(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    policy = policy_for(site)
    out = io.BytesIO()
    fetch(site.url(host="localhost"), out, policy)
    assert (out.getvalue(), asked) == (b"sound", [b"localhost"])
    with pytest.raises(UrlError, match=WHERE):
        fetch(site.url(host="localhost"), out, replace(policy, private_networks=()))


# --- connections -------------------------------------------------------------------------------------------------


def test_what_is_asked(site: Site) -> None:
    path = "/a%20b/(c).wav?X-Amz-Date=2026&X-Amz-Signature=e3b0~.-_!$'*,;:@[]"
    site.answers[path] = SOUND
    assert get(site.url(path, host="archive.test"), policy_for(site), resolve=here) == b"sound"
    (request,) = site.requests
    assert request == (
        f"GET {path} HTTP/1.1\r\nHost: archive.test:{site.port}\r\nUser-Agent: arkasr/{__version__}\r\n"
        "Accept: audio/*, video/*, */*;q=0.1\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )


@pytest.mark.parametrize(("path", "asked"), [("", "/"), ("?a=b", "/?a=b"), ("/../etc", "/../etc")])
def test_short_paths(path: str, asked: str, site: Site) -> None:
    assert get(site.url(path), policy_for(site)) == b"sound"
    assert site.requests[0].startswith(f"GET {asked} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n")


def test_ipv6(sites: Callable[..., Site]) -> None:
    site = sites("::1")
    assert get(site.url(host="[::1]"), policy_for(site)) == b"sound"
    assert f"\r\nHost: [::1]:{site.port}\r\n" in site.requests[0]
    assert get(site.url(host="archive.test"), policy_for(site), resolve=lambda _: ["::1"]) == b"sound"


def test_a_name_that_is_rebound(site: Site) -> None:
    """A name whose first answer is good and whose second leads inside: the second is never asked for."""
    answers = iter([[HERE], ["127.0.0.2"]])
    assert get(site.url(host="rebind.test"), policy_for(site), resolve=lambda _: next(answers)) == b"sound"
    assert next(answers) == ["127.0.0.2"]
    assert len(site.requests) == 1


def test_a_name_that_is_rebound_for_a_redirect(site: Site) -> None:
    site.answers["/a.wav"] = redirect("/b.wav")
    answers = iter([[HERE], ["127.0.0.2"]])
    message = refusal(site.url(host="rebind.test"), policy_for(site), resolve=lambda _: next(answers))
    assert message == f"rebind.test (redirected): {WHERE}"
    assert len(site.requests) == 1


def test_the_connection_goes_to_the_checked_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(socket, "gethostbyname", nobody)
    assert get(site.url(host="no-such-name.test"), policy_for(site), resolve=here) == b"sound"


def test_the_environment_names_a_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(site.url(), policy_for(site)) == b"sound"


def test_the_next_address_is_tried(site: Site) -> None:
    policy = policy_for(site, private_networks=("127.0.0.0/8",))
    assert get(site.url(host="archive.test"), policy, resolve=lambda _: ["127.0.0.3", HERE]) == b"sound"
    message = refusal(site.url(host="archive.test"), policy, resolve=lambda _: ["127.0.0.3", "127.0.0.4"])
    assert message == "archive.test: cannot be reached, or the connection broke; try again, or upload the file instead"


@pytest.fixture
def full() -> Iterator[socket.socket]:
    """A listener at 127.0.0.2 that answers no more: its queue is full."""
    if sys.platform != "linux":
        pytest.skip("only Linux drops what does not fit into the queue of connections")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
        for _ in range(4):
            visitor = stack.enter_context(socket.socket())
            visitor.setblocking(False)
            visitor.connect_ex(listener.getsockname())
        yield listener


def test_a_silent_address_gets_its_share_of_the_time(full: socket.socket, sites: Callable[..., Site]) -> None:
    site = sites(port=full.getsockname()[1])
    policy = policy_for(site, timeout_s=1.0, private_networks=("127.0.0.0/8",))
    start_s = time.monotonic()
    assert get(site.url(host="archive.test"), policy, resolve=lambda _: ["127.0.0.2", HERE]) == b"sound"
    assert 0.4 < time.monotonic() - start_s < 0.9


# --- redirects ---------------------------------------------------------------------------------------------------


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location", ["/b.wav", "b.wav", "?b", "//archive.test:PORT/b.wav", "http://archive.test:PORT/b.wav"]
)
def test_redirects(status: int, location: str, site: Site) -> None:
    site.answers["/a.wav"] = redirect(location.replace("PORT", str(site.port)), status)
    assert get(site.url(host="archive.test"), policy_for(site), resolve=here) == b"sound"
    assert [one.split()[1] for one in site.requests] == ["/a.wav", "/a.wav?b" if location == "?b" else "/b.wav"]


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://127.0.0.2:PORT/", WHERE), ("http://[::ffff:127.0.0.1]:PORT/", WHERE),
        ("http://169.254.169.254:PORT/", WHERE),
        ("http://inside.test:PORT/", WHERE), ("http://127.1:PORT/", "the host is no address"),
        ("file:///etc/passwd", FORM),
        ("ftp://archive.test/", FORM), ("http://u:p@archive.test:PORT/", FORM),
        ("http://archive.test:1/", "port 1 is not"),
        ("http://evil.test:PORT/", "not among the hosts"), ("/b#c", FORM), ("/b c", FORM), ("\u00fc", FORM),
        ("http://[archive.test/", "no URL"),
        ("", "more than 3 times"), ("/a.wav", "more than 3 times"),
    ],
)  # fmt: skip
def test_redirects_are_checked_in_full(location: str, why: str, site: Site) -> None:
    site.answers["/a.wav"] = redirect(location.replace("PORT", str(site.port)))
    names = {"archive.test": [HERE], "inside.test": [HERE, "10.0.0.7"]}
    hosts = ("archive.test", "inside.test", "127.0.0.2", "[::ffff:127.0.0.1]", "169.254.169.254")
    message = refusal(site.url(host="archive.test"), policy_for(site, hosts=hosts), resolve=names.__getitem__)
    assert message.startswith("archive.test (redirected): ")
    assert why in message
    assert "inside" not in message
    assert "evil" not in message
    assert len(site.requests) == (4 if "times" in why else 1)


def test_only_the_first_host_is_named(site: Site) -> None:
    site.answers["/a.wav"] = redirect(site.url("/second", host="inside.test"))
    site.answers["/second"] = redirect("http://10.0.0.7/")
    message = refusal(site.url(host="archive.test"), policy_for(site, ports=(site.port, 80)), resolve=here)
    assert message == f"archive.test (redirected): {WHERE}"


def test_a_redirect_without_a_place(site: Site) -> None:
    site.answers["/a.wav"] = b"HTTP/1.1 302 Found\r\n\r\n"
    assert "or nowhere" in refusal(site.url(), policy_for(site))


def test_as_many_redirects_as_allowed(site: Site) -> None:
    for number in range(3):
        site.answers[f"/{number}"] = redirect(f"/{number + 1}")
    assert get(site.url("/0"), policy_for(site)) == b"sound"
    assert "127.0.0.1 (redirected): more than 2 times" in refusal(site.url("/0"), policy_for(site, max_redirects=2))
    assert "more than 0 times" in refusal(site.url("/0"), policy_for(site, max_redirects=0))


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 305, 400, 401, 403, 404, 416, 500, 503])
def test_other_statuses(status: int, site: Site) -> None:
    site.answers["/a.wav"] = SOUND.replace(b"200", str(status).encode())
    assert f"127.0.0.1: it answered with status {status}; " in refusal(site.url(), policy_for(site))


@pytest.mark.parametrize("kind", ["audio/wav", "AUDIO/MPEG", "audio/ogg; codecs=opus", "video/mp4",
                                  "application/octet-stream",
                                  "binary/octet-stream", "application/ogg", "audio/vnd.wave;codec=1",
                                  None])  # fmt: skip
def test_types_of_recordings(kind: str | None, site: Site) -> None:
    field = f"Content-Type: {kind}\r\n" if kind else ""
    site.answers["/a.wav"] = f"HTTP/1.1 200 OK\r\n{field}Content-Length: 5\r\n\r\nsound".encode()
    assert get(site.url(), policy_for(site)) == b"sound"


@pytest.mark.parametrize("kind", ["text/html", "text/plain; audio/wav", "application/json", "image/png", "audio",
                                  "audio/", "xaudio/wav",
                                  "", "multipart/mixed", "application/ogg2", "audio/wav, text/html"])  # fmt: skip
def test_other_types(kind: str, site: Site) -> None:
    site.answers["/a.wav"] = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: 5\r\n\r\nsound".encode()
    assert "no audio or video by its Content-Type" in refusal(site.url(), policy_for(site))


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "identity, gzip", "x"])
def test_compressed_answers(coding: str, site: Site) -> None:
    site.answers["/a.wav"] = SOUND.replace(b"\r\n", f"\r\nContent-Encoding: {coding}\r\n".encode(), 1)
    assert "compressed (Content-Encoding)" in refusal(site.url(), policy_for(site))


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nsound", b"sound"), (b"HTTP/1.1 200\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nsound", b"so"),
        (b"HTTP/1.1 200 OK\r\nContent-Length:5\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\nsound, and more", b"sound"),
        (b"HTTP/1.1 200 OK\r\nX: \xff\xfe\r\ncontent-ENCODING: Identity\r\n\r\nsound", b"sound"),
        (b"HTTP/1.1 103 Early Hints\r\nContent-Type: text/html\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + SOUND, b"sound"),
        (CHUNKED + b"2\r\nso\r\n003;x=y\r\nund\r\n0\r\nTrailer: x\r\n\r\n", b"sound"), (CHUNKED + b"0\r\n\r\n", b""),
        (CHUNKED.replace(b"chunked", b"Chunked") + b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    ],
)  # fmt: skip
def test_answers(answer: bytes, body: bytes, site: Site) -> None:
    site.answers["/a.wav"] = answer
    assert get(site.url(), policy_for(site)) == body


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"sound", b"HTTP/1.1", b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav",
        b"HTTP/1.1 200 OK\r\nno field\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nX: y\r\n folded\r\n\r\nx", b"HTTP/1.1 200 OK\r\nContent-Encoding : gzip\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\n: x\r\n\r\nx",
        *(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\nsound" % length for length in
          (b"", b"-5", b"+5", b"5_0", b"0x5", b"5.0", b"five", b"5, 5", b"9" * 5000, b"\xb2",
          b"5\r\nContent-Length: 6")),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nsound\r\n0\r\n\r\n",
        *(CHUNKED + chunks for chunks in
          (b"", b"\r\n", b"-1\r\nsound", b"-5\r\nsound", b"0x5\r\nsound", b"+5\r\nsound", b"5 sound",
          b"5\r\nsoundX\r\n0\r\n\r\n", b"5\r\nsoundXY0\r\n\r\n", b"5\r\nsound",
           b"5\r\nsound\r\n", b"\n", b"5;" + b"x" * 2000 + b"\r\nsound\r\n0\r\n\r\n", b"f" * 16 + b"\r\nsound")),
    ],
)  # fmt: skip
def test_damaged_answers(answer: bytes, site: Site) -> None:
    site.answers["/a.wav"] = answer
    message = refusal(site.url(), policy_for(site))
    assert "not the HTTP that this server reads" in message or "no end of its head" in message


@pytest.mark.parametrize(
    "answer", [SOUND.replace(b"5", b"6"), CHUNKED + b"6\r\nsound", CHUNKED + b"5\r\nsou"]
)  # fmt: skip
def test_answers_that_end_early(answer: bytes, site: Site) -> None:
    site.answers["/a.wav"] = answer
    assert "the connection ended before the file did" in refusal(site.url(), policy_for(site))


@pytest.mark.parametrize("field", [b"", b"X: y\r\n", b"\r\nHTTP/1.1 100 Go on\r\n"])
def test_a_head_without_end(field: bytes, site: Site) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 100 Go on\r\n")
        while not site.over.is_set():
            connection.sendall(field * 1000 or b"X" * 1000)

    site.answers["/a.wav"] = endless
    assert f"within {MAX_HEAD_BYTES} bytes" in refusal(site.url(), policy_for(site))


def test_a_reset(site: Site) -> None:
    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(SOUND[:-2])

    site.answers["/a.wav"] = reset
    assert "cannot be reached, or the connection broke" in refusal(site.url(), policy_for(site))


# --- limits ------------------------------------------------------------------------------------------------------

TOO_LARGE = "127.0.0.1: the file has more than 0.001 MB; cut or compress it"


def test_a_length_above_the_limit_is_refused_unread(site: Site) -> None:
    site.answers["/a.wav"] = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"  # and nothing more, but the connection stays
    )
    out = io.BytesIO()
    with pytest.raises(UrlError, match=TOO_LARGE):
        fetch(site.url(), out, policy_for(site))
    assert out.getvalue() == b""


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", CHUNKED])
def test_a_file_without_end(head: bytes, site: Site) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(head)
        while not site.over.is_set():
            connection.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")

    site.answers["/a.wav"] = endless
    out = io.BytesIO()
    with pytest.raises(UrlError, match=TOO_LARGE):
        fetch(site.url(), out, policy_for(site))
    assert len(out.getvalue()) <= 1000


@pytest.mark.parametrize("size", [1000, 1001])
def test_the_last_byte_that_is_allowed(size: int, site: Site) -> None:
    for head in (b"Content-Length: %d\r\n\r\n" % size, b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size):
        site.answers["/a.wav"] = (
            b"HTTP/1.1 200 OK\r\n" + head + b"x" * size + (b"\r\n0\r\n\r\n" if b"chunked" in head else b"")
        )
        if size == 1000:
            assert get(site.url(), policy_for(site)) == b"x" * 1000
        else:
            assert refusal(site.url(), policy_for(site)) == TOO_LARGE


def drip(site: Site, head: bytes, piece: bytes) -> Answer:
    """Send `head`, then `piece` again and again, slowly."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while not site.over.wait(0.02):
            connection.sendall(piece)

    return answer


SLOW = [
    (b"", b""), (b"HTTP/1.1 200 ", b"x"), (b"HTTP/1.1 200 OK\r\nX: ", b"y"), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"x"),
    (b"HTTP/1.1 200 OK\r\n\r\n", b"x"), (CHUNKED, b"1\r\nx\r\n"), (CHUNKED, b"0"),
]  # fmt: skip


def wait_for(url: str, policy: UrlPolicy, cancel: bool, **options: Any) -> float:
    """Seconds until it ends, by its own limit of 0.25 s or by a cancellation after as long."""
    cancelled = threading.Event()
    threading.Timer(0.25, cancelled.set if cancel else lambda: None).start()
    start_s = time.monotonic()
    message = refusal(url, replace(policy, timeout_s=60.0 if cancel else 0.25), cancelled=cancelled, **options)
    assert ("cancelled; send" if cancel else "took too long; upload") in message
    return time.monotonic() - start_s


@pytest.mark.parametrize("cancel", [False, True])
def test_servers_that_drip(site: Site, *, cancel: bool) -> None:
    site.answers = {f"/{number}": drip(site, *how) for number, how in enumerate(SLOW)}
    with ThreadPoolExecutor(len(SLOW)) as pool:
        waits = pool.map(lambda path: wait_for(site.url(path), policy_for(site), cancel), site.answers)
    assert all(0.2 < wait_s < 1 for wait_s in waits)


@pytest.mark.parametrize("cancel", [False, True])
def test_redirects_share_the_time(site: Site, *, cancel: bool) -> None:
    def slow(connection: socket.socket) -> None:
        time.sleep(0.1)
        connection.sendall(redirect("/a.wav"))

    site.answers["/a.wav"] = slow
    assert 0.2 < wait_for(site.url(), policy_for(site, max_redirects=99), cancel) < 1


@pytest.mark.parametrize("cancel", [False, True])
def test_a_silent_resolver(site: Site, *, cancel: bool) -> None:
    def resolve(_host: str) -> list[str]:
        site.over.wait(5)
        return [HERE]

    assert 0.2 < wait_for(site.url(host="archive.test"), policy_for(site), cancel, resolve=resolve) < 1


@pytest.mark.parametrize("cancel", [False, True])
def test_a_silent_address(full: socket.socket, *, cancel: bool) -> None:
    port = full.getsockname()[1]
    policy = UrlPolicy(("*",), 9, 1.0, ports=(port,), private_networks=("127.0.0.0/8",))
    cancelled = threading.Event()
    threading.Timer(0.25, cancelled.set if cancel else lambda: None).start()
    start_s = time.monotonic()
    refusal(f"http://127.0.0.2:{port}/", replace(policy, timeout_s=60.0 if cancel else 0.25), cancelled=cancelled)
    assert 0.2 < time.monotonic() - start_s < 1


def test_what_cannot_be_written_is_not_the_servers_fault(site: Site) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def writelines(self, lines: Any) -> None:
            for line in lines:
                self.write(line)

    with pytest.raises(OSError, match="No space left"):
        fetch(site.url(), Full(), policy_for(site))


def test_what_comes_is_written_at_once(site: Site) -> None:
    came = threading.Event()

    class Noted(io.BytesIO):
        def writelines(self, lines: Any) -> None:
            for line in lines:
                self.write(line)
                came.set()

    def wait(connection: socket.socket) -> None:
        connection.sendall(SOUND[:-2])
        if came.wait(5):
            connection.sendall(SOUND[-2:])

    site.answers["/a.wav"] = wait
    fetch(site.url(), Noted(), policy_for(site))


def test_a_request_that_goes_out_in_pieces() -> None:
    sent = bytearray()

    class Narrow:
        def settimeout(self, _seconds: float) -> None:
            """Never slow."""

        def send(self, data: bytes) -> int:
            sent.extend(data[:3])
            return len(data[:3])

    fetching._Wire(Narrow(), lambda: 1.0).send(b"GET / HTTP/1.1")  # type: ignore[arg-type]
    assert sent == b"GET / HTTP/1.1"


def test_messages_keep_secrets(site: Site) -> None:
    site.answers["/s3cret?s3cret"] = redirect("http://user:s3cret@s3cret.test/s3cret?s3cret")
    site.answers["/?s3cret"] = SOUND.replace(b"audio", b"s3cret")
    urls = [
        "http://user:s3cret@archive.test/", "http://s3cret@archive.test/", "s3cret://archive.test/",
        "http://archive.test/#s3cret",
        "http://archive.test:1/?s3cret", "http://other.test/?s3cret", site.url("/s3cret?s3cret", host="archive.test"),
        site.url("/?s3cret", host="archive.test"),
    ]  # fmt: skip
    policy = policy_for(site, hosts=("archive.test",))
    for url in urls:
        assert "s3cret" not in refusal(url, policy, resolve=here)


# --- TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    """A server's context, with a certificate for archive.test and 127.0.0.1 that nobody signed."""
    (tmp_path / "pem").write_text(KEY + CERTIFICATE)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "pem")
    return context


@pytest.fixture
def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=CERTIFICATE)


def test_tls(sites: Callable[..., Site], tls: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    site = sites(tls=tls)
    site.answers["/long"] = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000
    policy = policy_for(site, max_bytes=1_000_000)
    assert get(site.url("/long", host="archive.test"), policy, resolve=here, tls=trusting) == b"x" * 1_000_000
    assert get(site.url(), policy, tls=trusting) == b"sound"
    assert site.names == ["archive.test", None]
    assert f"\r\nHost: archive.test:{site.port}\r\n" in site.requests[0]


def test_certificates_are_verified(sites: Callable[..., Site], tls: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    site = sites(tls=tls)
    policy = policy_for(site)
    why = "its certificate is not valid for this name; upload the file instead"
    assert refusal(site.url(host="archive.test"), policy, resolve=here) == f"archive.test: {why}"
    assert refusal(site.url(host="other.test"), policy, resolve=here, tls=trusting) == f"other.test: {why}"
    assert site.requests == []


def test_redirects_between_http_and_https(
    sites: Callable[..., Site], tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    plain, secret = sites(), sites(tls=tls)
    plain.answers["/up"] = redirect(secret.url(host="archive.test"))
    secret.answers["/down"] = redirect(plain.url(host="archive.test"))
    policy = policy_for(plain, secret)
    assert get(plain.url("/up", host="archive.test"), policy, resolve=here, tls=trusting) == b"sound"
    assert "from https to http" in refusal(secret.url("/down", host="archive.test"), policy, resolve=here, tls=trusting)
    assert len(plain.requests) == 1


def test_an_answer_that_is_cut_under_tls(
    sites: Callable[..., Site], tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    site = sites(tls=tls)
    site.answers["/a.wav"] = lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nsou")  # and no farewell
    assert "the connection broke" in refusal(site.url(), policy_for(site), tls=trusting)


def test_no_tls_at_all(site: Site) -> None:
    assert "cannot be reached, or the connection broke" in refusal(site.url(scheme="https"), policy_for(site))


@pytest.mark.parametrize("cancel", [False, True])
def test_a_handshake_without_end(sites: Callable[..., Site], *, cancel: bool) -> None:
    site = sites(mute=True)
    assert 0.2 < wait_for(site.url(scheme="https"), policy_for(site), cancel) < 1
