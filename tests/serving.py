"""A live server for tests: the real command in a process of its own, on a free port of this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

START_S = 60.0
BACK_END_KEY = "TEST_BACK_END_KEY"


@dataclass(frozen=True)
class Server:
    """A running server; its log grows in `log`."""

    process: subprocess.Popen[bytes]
    port: int
    state: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(*arguments: object, state: Path) -> str:
    """What `ark-asr ... --state` prints."""
    command = [str(Path(sys.executable).with_name("ark-asr")), *map(str, arguments), "--state", str(state)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def create_key(state: Path, name: str, *arguments: object) -> str:
    """A new key's secret."""
    return program("keys", "create", name, *arguments, state=state).strip()


@contextmanager
def serve(
    state: Path, *arguments: object, model: str = "tiny", port: int | None = None, **environment: str
) -> Iterator[Server]:
    """A server that is ready, and is stopped as a service manager would; at any free port if none is given."""
    port = port or free_port()
    state.mkdir(parents=True, exist_ok=True)
    log = state / "log.txt"
    command = [Path(sys.executable).with_name("ark-asr"), "serve", "--model", model, "--port", port, "--state", state]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*map(str, command), *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    server = Server(process, port, state, log)
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(START_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def serve_front(
    state: Path, back_end: str, *arguments: object, key: str = "any", model: str = "tiny"
) -> AbstractContextManager[Server]:
    """A server whose models are at an endpoint, http://HOST:PORT/v1."""
    flags = ["--engine", "openai", "--base-url", back_end, "--api-key-env", BACK_END_KEY]
    return serve(state, *flags, *arguments, model=model, port=None, **{BACK_END_KEY: key})


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx2.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the server did not start: {server.log.read_text()}")


def metric(server: Server, name: str, *, headers: Mapping[str, str] | None = None, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    total = 0.0
    for line in httpx2.get(f"{server.url}/metrics", headers=headers).raise_for_status().text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? ([^ ]+)", line)
        if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
            total += float(found[2])
    return total
