"""A real vLLM that serves one model on the CPU, in a process of its own and with this interpreter."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest

# Unless its cache's size is said, vLLM asks for nearly all memory. Nothing is fetched, and no other plugin loaded.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "arkasr",
    "VLLM_NO_USAGE_STATS": "1",
}
PATIENCE_S = 240.0


def need_vllm() -> None:
    """Skip where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed; scripts/vllm builds an environment that has it, and runs these tests there")


@contextmanager
def serve_vllm(model: str | Path, *arguments: str, **environment: str) -> Iterator[str]:
    """The base URL, http://127.0.0.1:PORT/v1, of a vLLM that serves a folder or hub id as the model "ark"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "ark", *arguments]
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        # A session of its own, so that its engine and workers can be stopped with it, whatever state it is in.
        process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", Path(log.name))
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _wait(process: "subprocess.Popen[bytes]", health: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx2.RequestError):
            if httpx2.get(health, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise VllmFailedError(log.read_text(errors="replace"))


class VllmFailedError(Exception):
    """vLLM did not start; the message is its log."""


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number in (15, 9):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
