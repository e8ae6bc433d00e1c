"""What a result may depend on besides model and data: packages, Unicode, machine, and the commit of this code."""

import os
import platform
import shutil
import subprocess
import sys
import unicodedata
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "arkasr", "torch", "onnxruntime", "transformers", "tokenizers", "numpy", "soundfile", "soxr", "pyarrow",
    "kaldialign", "num2words", "wetext", "OpenCC", "regex", "httpx2", "huggingface-hub",
)  # fmt: skip
_GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory")


def versions() -> dict[str, str]:
    """Of each package, "absent" where it is not installed; of Python, and of the Unicode tables that it has."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {**found, "python": platform.python_version(), "unicode": unicodedata.unidata_version}


def hardware() -> dict[str, Any]:
    """The machine: processor, cores that we may use, memory, and NVIDIA's GPUs with driver, power limit and clocks."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30),
        "gpus": _gpus(),
    }


def session() -> dict[str, Any]:
    """When and where a run was begun or gone on with."""
    return {"began": datetime.now(UTC).isoformat(timespec="seconds"), "host": platform.node(), "git": git_commit()}


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where it was changed since; None where it is in no repository."""
    package = Path(__file__).parent
    if _output("git", "-C", str(package), "ls-files", "__init__.py") != "__init__.py":
        return None  # installed into somebody else's repository
    return _output("git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def processor() -> str:
    """Its own name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform == "linux" else 0


def _gpus() -> list[dict[str, str]]:
    said = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader")
    rows = [line.split(", ") for line in (said or "").splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing, or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
