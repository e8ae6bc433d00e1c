"""Asking an endpoint: side by side and in order, until it is closed, and what no message may show.

How its answers are read, and when it is asked again, is tested by those who ask: test_remote, test_eval_run,
test_teacher_data and test_teachers.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from arkasr import endpoint
from arkasr.endpoint import Client, place
from arkasr.errors import NoAnswerError, UsageError


class Server(ThreadingHTTPServer):
    """Answers each POST with the same, and counts them."""

    answer: tuple[int, dict[str, str], bytes] = (200, {}, b'"yes"')
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass

    def do_POST(self) -> None:
        self.server.asked += 1
        status, headers, content = self.server.answer
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    told = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=told.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield told
    told.shutdown()
    thread.join()
    told.server_close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1/", "http://127.0.0.1:9/v1//"])
def test_a_name_is_an_address_and_a_model(url: str) -> None:
    assert place(f"{url}#ORG/NAME#2") == ("http://127.0.0.1:9/v1/", "ORG/NAME#2")


@pytest.mark.parametrize(
    "name",
    ["http://h/v1", "http://h/v1#", "http://u:word@h/v1#m", "u:word@h#m", "http://u:word@h:x/v1#m", "ftp://h/v1#m",
     "#m", "http://#m", "http://h/v1?key=word#m"],
)  # fmt: skip
def test_a_name_that_is_none_is_refused_without_its_secret(name: str) -> None:
    with pytest.raises(UsageError, match=r"give http://HOST/v1#MODEL, and the key in ARKASR_API_KEY") as caught:
        place(name)
    assert "word" not in str(caught.value)


def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx2 would end in a traceback, or quote it."""
    for key in ("sk-word\nsk-other", "sk-wörd", "sk-word\x7f"):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(UsageError, match=r"^SOME_KEY: has characters") as caught:
            Client("http://h/v1", key_variable="SOME_KEY")
        assert "sk-" not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", " ")
    Client("http://h/v1", key_variable="SOME_KEY").close()
    with pytest.raises(UsageError, match=r"^SOME_KEY: not set"):
        Client("http://h/v1", key_variable="SOME_KEY", needs_key=True)


def test_answers_keep_their_order_and_no_more_is_begun_than_is_soon_needed() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    def answer(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    with closing(Client("http://h/v1", parallel=3)) as client:
        answers = client.each(answer, items())
        assert taken == []
        assert next(answers) == 0
        assert len(taken) <= 2 * 3 + 1
        assert list(answers) == [number * number for number in range(1, 40)]


def test_after_an_error_nothing_more_is_asked() -> None:
    begun = []

    def answer(number: int) -> None:
        begun.append(number)
        time.sleep(0.02)
        if number == 0:
            raise UsageError("away")

    with closing(Client("http://h/v1", parallel=1)) as client:
        with pytest.raises(UsageError, match="away"):
            list(client.each(answer, range(3)))
        assert list(client.each(lambda number: number, [7])) == [7]
    assert len(begun) <= 2  # the second may have begun before the first was looked at


def test_closing_ends_the_waiting(server: Server) -> None:
    """A busy endpoint would otherwise hold the end of a program up for minutes."""
    server.answer = (503, {"retry-after": "60"}, b"")
    client = Client(server.url, parallel=2)
    answers = client.each(lambda _: client.ask("x"), range(2))
    with ThreadPoolExecutor(1) as elsewhere:
        first = elsewhere.submit(next, answers)
        while server.asked < 2:
            time.sleep(0.005)
        client.close()
        with pytest.raises(NoAnswerError, match=r"closed while it was asked"):
            first.result(timeout=20)
    assert server.asked == 2


def test_an_answer_that_cannot_be_unpacked_is_asked_for_again(server: Server) -> None:
    server.answer = (200, {"content-encoding": "gzip"}, b"not gzip")
    waits: list[float] = []
    with closing(Client(server.url)) as client, pytest.raises(NoAnswerError, match=r"^asked 3 times, DecodingError: "):
        client.ask("x", tries=3, sleep=waits.append)
    assert server.asked == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"error": {"message": "no\\nluck"}}', r" 'no\\nluck'"),
        (b'{"error": {"message": 3}}', r" \{'error': \{'message': 3\}\}"),
        (b'{"detail": "no"}', r" \{'detail': 'no'\}"),
        (b"<p>no\nluck</p>", r" '<p>no\\nluck</p>'"),
        (b"", ""),
        (b"[" * 100_000, r" '\[\[\[.*'"),
    ],
)
def test_what_an_endpoint_says_of_an_error_is_told_in_one_short_line(server: Server, content: bytes, said: str) -> None:
    server.answer = (422, {}, content)
    with closing(Client(server.url)) as client, pytest.raises(NoAnswerError, match=f"^HTTP 422{said}$") as caught:
        client.ask("x")
    assert len(str(caught.value)) < 300
    server.answer = (403, {}, content)
    with closing(Client(server.url)) as client, pytest.raises(UsageError, match=f"HTTP 403{said}; check URL, model"):
        client.ask("x")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    with closing(Client("http://127.0.0.1:9/v1")) as client, pytest.raises(UsageError) as caught:
        client.ask("x", tries=3)
    assert str(caught.value).startswith("http://127.0.0.1:9/v1/: nobody answers (asked 3 times, ConnectError: ")
