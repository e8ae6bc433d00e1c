"""ONNX Runtime, the only place that imports it, and told to keep to itself.

Official builds from 1.31 on send usage events to Microsoft unless ORT_DISABLE_TELEMETRY is set before they are
imported. So this module breaks the rule that none of ours changes the environment: it sets it, unless the user has.
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from arkasr.errors import CheckpointMismatchError

__all__ = ["OrtValue", "onnxruntime", "session"]  # the second is for benchmarks

onnxruntime.disable_telemetry_events()  # for a process that had imported it before

# They have no base but Exception.
_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)
OrtValue = onnxruntime.OrtValue


def session(path: Path, *, threads: int, stop_spinning: bool = False) -> Any:
    """A graph, ready to run on the CPU.

    Args:
        path: of its file.
        threads: 0 is one for each core.
        stop_spinning: whether they rest at once after a run, and leave the cores to others.

    Raises:
        CheckpointMismatchError: it is damaged, or this version cannot run it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", str(int(stop_spinning)))
    options.log_severity_level = 3  # its warnings are for those who build graphs
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except _ERRORS as error:
        raise CheckpointMismatchError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot run it ({str(error).splitlines()[0]}); "
            "update onnxruntime, or delete the folder to have it made again"
        ) from None
