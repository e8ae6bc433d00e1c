"""Keep AVX512 and AMX from this benchmark's processes, to learn how fast a CPU of the AVX2 class is; Linux, x86-64.

glibc, PyTorch, oneDNN, MKL, OpenBLAS and NumPy have switches in the environment. ONNX Runtime has none: a copy of it is
made whose cpuid instructions are ud2, and avx2.c answers for them. `avx512_used` is the proof: the kernel notes when it
last saved AVX512 registers of a thread.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

STARTED = time.monotonic()
HIDDEN = "BENCH_AVX2"  # in the environment of processes that shall not use AVX512
HOW = (
    "Switches: GLIBC_TUNABLES, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS, OPENBLAS_CORETYPE, "
    "NPY_DISABLE_CPU_FEATURES. ONNX Runtime: a copy whose {cpuids} cpuid instructions are ud2, which bench/avx2.c "
    "answers with the AVX512 and AMX bits cleared. Every measured process read /proc/self/task/*/arch_status after its "
    "clips and would have failed, had the kernel seen a thread with AVX512 registers in use since the process began."
)
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"


def hide(scratch: Path) -> tuple[dict[str, str], str, str]:
    """The environment of processes without AVX512 (HIDE_VNNI in ours: nor AVX-VNNI), its name, and how it is done."""
    folder = (scratch / "avx2").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    preload = folder / "avx2.so"
    source = str(Path(__file__).with_suffix(".c"))
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(preload), source], check=True)
    cpuids = _copy_onnxruntime(folder)
    vnni = "HIDE_VNNI" not in os.environ
    dispatched = import_module("numpy._core._multiarray_umath").__cpu_dispatch__
    groups = [name for name in dispatched if name.startswith(("AVX512", "X86_V4"))]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        HIDDEN: "1",
        "LD_PRELOAD": str(preload),
        "PYTHONPATH": os.pathsep.join(paths),
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI" if vnni else "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": " ".join(groups),
    }
    _check(environment, folder)
    return environment, "AVX2-VNNI" if vnni else "AVX2", HOW.format(cpuids=cpuids)


def _copy_onnxruntime(folder: Path) -> int:
    """The installed package, copied into `folder` with ud2 in place of cpuid; returns how many."""
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    copy = folder / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("libonnxruntime.so*", "__pycache__"))
    (library,) = (copy / "capi").glob("onnxruntime_pybind11_state*.so")
    listing = ["objdump", "--disassemble", "--wide", "--no-show-raw-insn", "--section=.text", str(library)]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, text=True) as objdump:
        assert objdump.stdout is not None
        places = [int(line.split(":")[0], 16) for line in objdump.stdout if "\tcpuid" in line]
    assert places, f"{library}: objdump found no cpuid"
    headers = subprocess.run(["objdump", "-h", str(library)], check=True, capture_output=True, text=True).stdout
    text = re.search(r" \.text +\w+ +(\w+) +\w+ +(\w+) ", headers)
    assert text is not None
    address, offset = (int(number, 16) for number in text.groups())
    content = bytearray(library.read_bytes())
    for place in places:
        at = place - address + offset
        assert content[at : at + 2] == CPUID, f"{library}: no cpuid at {place:x}"
        content[at : at + 2] = UD2
    library.write_bytes(content)
    return len(places)


def _check(environment: dict[str, str], folder: Path) -> None:
    """That libraries see what they shall."""
    ask = "import onnxruntime, torch; print(onnxruntime.__file__, torch.backends.cpu.get_cpu_capability())"
    told = subprocess.run([sys.executable, "-c", ask], env=environment, check=True, capture_output=True, text=True)
    wanted = f"{folder / 'onnxruntime' / '__init__.py'} AVX2"
    if told.stdout.strip() != wanted:
        sys.exit(f"--avx2 does not work on this machine: {told.stdout.strip()}, and not {wanted}")


def avx512_used() -> bool:
    """Whether the kernel saw a living thread of this process with AVX512 registers in use since this file's import."""
    ages_ms = []
    for status in Path("/proc/self/task").glob("*/arch_status"):
        found = re.search(r"AVX512_elapsed_ms:\s+(-?\d+)", status.read_text())
        ages_ms += [int(found[1])] if found else []  # none: a CPU without AVX512
    mine_ms = 1e3 * (time.monotonic() - STARTED)
    return any(0 <= age < mine_ms for age in ages_ms)
