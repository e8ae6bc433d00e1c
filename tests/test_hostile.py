"""A model folder, manifest or recording that somebody malicious made: refused in one line or its traps ignored.

What could end the process, fill the memory or never return is tried in a forked child whose memory and time are
bounded (`confined`); the rest is tried here.
"""

import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import arkasr
from arkasr import audio, checkpoint, data, files, model, pins
from arkasr.errors import ArkASRError, AudioError, CheckpointMismatchError, ModelNotFoundError
from conftest import byte_tokenizer, random_network, small_config

CONFIG, TOKENIZER, WEIGHTS, INDEX = files.CONFIG, files.TOKENIZER, files.WEIGHTS, files.INDEX
LOCK, STAMPS = pins.LOCK, pins.STAMPS
SHARD = "model-00001-of-00001.safetensors"
POSITIONS = "audio_encoder.whisper.embed_positions.weight"
MIB = 2**20
MAX_MESSAGE_CHARS = 1_000
EDITS = Callable[[dict[str, Any]], object]

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="devices, /proc and limits of Linux"),
]


# ---- a good model, and ways to spoil it ----


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of everything, never changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    tokenizer = byte_tokenizer()
    config = replace(small_config(tokenizer), encoder_layers=1, decoder_layers=1, max_encoder_frames=8)
    model.save(random_network(config), folder)
    tokenizer.save(str(folder / TOKENIZER))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def to_shards(folder: Path) -> None:
    """The same model with its weights behind an index."""
    (folder / WEIGHTS).rename(folder / SHARD)
    header, _ = read_weights(folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header.keys() - {"__metadata__"}, SHARD)}))


def to_three_files(folder: Path) -> None:
    """The same model with the older tokenizer files."""
    raw = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).unlink()
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def lock_of(folder: Path) -> dict[str, Any]:
    """The lock file that an honest download of these files has."""
    known = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    return {"repo_id": "org/name", "revision": "0" * 40, "files": known}


def write_lock(folder: Path) -> None:
    (folder / LOCK).write_text(json.dumps(lock_of(folder)))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    CONFIG: lambda _: None,
    TOKENIZER: lambda _: None,
    WEIGHTS: lambda _: None,
    LOCK: write_lock,
    INDEX: to_shards,
    SHARD: to_shards,
    **dict.fromkeys(("vocab.json", "merges.txt", "added_tokens.json"), to_three_files),
}


def edit(path: Path, change: EDITS) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def read_weights(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: object, tail: bytes = b"") -> bytes:
    """A safetensors file of a header, which may be bytes that are no JSON, and what follows it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + tail


def one_line(error: BaseException | str) -> str:
    """The message of a refusal, after checking that a terminal can show it."""
    message = str(error)
    assert message.isprintable(), message[:MAX_MESSAGE_CHARS]
    assert len(message) < MAX_MESSAGE_CHARS, message[:MAX_MESSAGE_CHARS]
    return message


def refused(folder: Path, *names: str, error: type[ArkASRError] = ArkASRError) -> None:
    """Opening says in one line which file of the folder is bad, and one of the names."""
    with pytest.raises(error) as caught:
        checkpoint.open_checkpoint(folder)
    message = one_line(caught.value)
    assert message.startswith(str(folder))
    assert not names or any(name in message for name in names), message


def opens(folder: Path) -> None:
    model.load(checkpoint.open_checkpoint(folder))


# ---- children with bounded memory and time ----


@dataclass(frozen=True)
class Outcome:
    """What became of an action: its value, or the error; how much the process grew."""

    value: Any
    error: str  # name of the class, "" if none
    message: str
    by_us: bool  # the error is an ArkASRError
    grown_mib: float


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _act(pipe: Connection, action: Callable[..., Any], arguments: tuple[Any, ...], memory_mib: int) -> None:
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + memory_mib * MIB,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _peak_mib()
    try:
        value = action(*arguments)
    except BaseException as error:  # noqa: BLE001 - also a panic, which is no Exception
        ours = isinstance(error, ArkASRError)
        pipe.send(Outcome(None, type(error).__name__, str(error), ours, _peak_mib() - before))
    else:
        pipe.send(Outcome(value, "", "", False, _peak_mib() - before))
    os._exit(0)  # PyTorch takes its time to be dismantled


def confined(
    action: Callable[..., Any],
    *arguments: object,
    memory_mib: int = 2_000,
    limit_mib: float = 300,
    timeout_s: float = 20,
) -> Outcome:
    """Do it in a child that may map memory_mib more, and must not use limit_mib more, crash or hang."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        ["arkasr.engines.pytorch", "arkasr.transcribe", "arkasr.data", "torch._dynamo", "pytest"]
    )
    ours, theirs = forks.Pipe(duplex=False)
    child = forks.Process(target=_act, args=(theirs, action, arguments, memory_mib))
    child.start()
    theirs.close()
    try:
        assert ours.poll(timeout_s), "no answer in time"
        outcome: Outcome = ours.recv()
    except EOFError:
        child.join()
        pytest.fail(f"the process died: exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()
        ours.close()
    assert not outcome.error or outcome.by_us, f"{outcome.error}: {outcome.message[:MAX_MESSAGE_CHARS]}"
    if outcome.by_us:
        one_line(outcome.message)
    assert outcome.grown_mib < limit_mib
    return outcome


def use(folder: Path) -> str:
    """All that a checkpoint's parts take part in: load, transcribe half a second, make a training target."""
    transcriber = arkasr.load_model(folder, device="cpu")
    noise = np.random.default_rng(0).normal(scale=0.1, size=8_000).astype(np.float32)
    transcript = transcriber.transcribe((noise, audio.SAMPLE_RATE))
    assert transcriber.rules is not None
    transcriber.rules.to_text(list(range(256)))
    transcriber.rules.target_ids("some words")
    return transcript.text


def test_confinement_holds(good: Path) -> None:
    """The cell itself: a good model works in it, and hunger, crashes and sleep are noticed."""
    assert confined(use, good).error == ""
    grows, dies, sleeps, fails = bytearray, os._exit, time.sleep, int
    escapes: tuple[tuple[Callable[..., object], object], ...] = (
        *((grows, 350 * MIB), (grows, 3_000 * MIB), (dies, 0), (sleeps, 60), (fails, "no")),
    )
    for escape, argument in escapes:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            confined(escape, argument, timeout_s=1)


# ---- code, pickles and templates ----

PUBLISHED_CODE = ("configuration_arkasr", "modeling_arkasr", "modeling_audio", "processing_arkasr")
SHADOWING = ("sitecustomize", "usercustomize", "conftest", "__init__", "torch", "numpy", "json", "arkasr", "tokenizers")
PICKLES = (
    "pytorch_model.bin",
    "model.pt",
    "model.ckpt",
    "weights.pkl",
    "training_args.bin",
    "optimizer.pth",
    "rng.npy",
)
JINJA = (
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}{% for a in range(10**12) %}{% endfor %}"
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


def booby_trap(folder: Path, marker: Path) -> None:
    """Everything that transformers, torch or Python itself might execute."""
    for name in (*PUBLISHED_CODE, *SHADOWING):
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    (folder / "evil.pth").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--co'\n")
    template = JINJA.replace("MARKER", str(marker))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    auto_map = {"AutoConfig": "configuration_arkasr.A", "AutoModel": "modeling_arkasr.B", "AutoProcessor": "evil--c.D"}
    tokenizer = {"auto_map": auto_map, "chat_template": template, "tokenizer_class": "modeling_arkasr.B"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    edit(folder / CONFIG, lambda raw: raw.update(auto_map=auto_map, custom_pipelines={"asr": {"impl": "modeling.X"}}))


class Opens:
    """The names of the files of a folder that any process opens meanwhile; Python's audit does not see Rust's."""

    IN_OPEN = 0x20

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None)
        self.queue = libc.inotify_init1(os.O_NONBLOCK)
        assert self.queue >= 0
        assert libc.inotify_add_watch(self.queue, os.fsencode(folder), self.IN_OPEN) >= 0

    def names(self) -> set[str]:
        raw, found = b"", set()
        try:
            while chunk := os.read(self.queue, MIB):
                raw += chunk
        except BlockingIOError:
            os.close(self.queue)
        while raw:
            (length,) = struct.unpack_from("I", raw, 12)
            found.add(os.fsdecode(raw[16 : 16 + length].rstrip(b"\0")))
            raw = raw[16 + length :]
        return found - {""}  # the folder itself


AUDITED = """
import os, sys
folder, clip = sys.argv[1:]
seen = []
def hook(event, arguments):
    if event in FORBIDDEN or event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        seen.append(f"{event} {arguments}")
    if event in ("open", "compile", "import", "exec", "os.listdir", "os.scandir"):
        if event == "exec":
            arguments = (getattr(arguments[0], "co_filename", ""),)
        for argument in arguments:
            if isinstance(argument, (str, bytes)) and event != "compile" or event == "compile" and argument is not None:
                path = os.fsdecode(argument) if isinstance(argument, (str, bytes)) else ""
                if path.startswith(folder) and os.path.basename(path) != "config.json" and path != clip:
                    if os.path.basename(path) not in ("tokenizer.json", "model.safetensors"):
                        seen.append(f"{event} {path}")
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pickle.find_class"}
import arkasr, arkasr.engines.pytorch
sys.addaudithook(hook)
print(arkasr.load_model(folder, device="cpu").transcribe(clip).text)
assert not seen, seen
"""


def test_code_pickles_and_templates_are_not_even_opened(folder: Path, tmp_path: Path) -> None:
    """From inside the folder, by the library under an audit and by the program; the kernel lists what was opened."""
    marker = tmp_path / "executed"
    booby_trap(folder, marker)
    pickle.loads((folder / PICKLES[0]).read_bytes())  # noqa: S301 - the traps are armed
    exec((folder / "torch.py").read_text(), {})  # noqa: S102
    assert marker.exists()
    marker.unlink()
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.random.default_rng(0).normal(scale=0.1, size=8_000), audio.SAMPLE_RATE)
    program = str(Path(sys.executable).with_name("ark-asr"))
    env = os.environ | {"ARKASR_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for command in (
        [sys.executable, "-P", "-c", AUDITED, str(folder), str(clip)],
        [program, "transcribe", str(clip), "--model", "."],
    ):
        watched = Opens(folder)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 0, done.stderr
        assert watched.names() == {CONFIG, TOKENIZER, WEIGHTS}
        assert not marker.exists()
    assert not (folder / "__pycache__").exists()


@pytest.mark.parametrize("decoy", ["nothing", "index", "pickle under the name"])
def test_a_pickle_alone_is_no_model(folder: Path, tmp_path: Path, decoy: str) -> None:
    booby_trap(folder, tmp_path / "executed")
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    watched = Opens(folder)
    if decoy == "nothing":
        refused(folder, f"neither {WEIGHTS} nor {INDEX}; fetch the weights", error=ModelNotFoundError)
    elif decoy == "index":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
        refused(folder, "'pytorch_model.bin' is not a weights file", error=CheckpointMismatchError)
    else:
        (folder / "pytorch_model.bin").rename(folder / WEIGHTS)
        refused(folder, "claims a header", "damaged", error=CheckpointMismatchError)
    assert watched.names() <= {CONFIG, TOKENIZER, WEIGHTS, INDEX}
    assert not (tmp_path / "executed").exists()


# ---- links, devices, pipes ----


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        one.bind(path.name)
        os.chdir(here)


def link_to(target: str) -> Callable[[Path, Path], object]:
    return lambda path, _: path.symlink_to(target)


def link_to_twin(path: Path, outside: Path) -> None:
    path.symlink_to(outside / path.name)


def link_up(path: Path, outside: Path) -> None:
    path.symlink_to(Path("..") / outside.name / path.name)


def link_through_folder(path: Path, outside: Path) -> None:
    (path.parent / "sub").symlink_to(outside)
    path.symlink_to(Path("sub") / path.name)


def link_twice(path: Path, outside: Path) -> None:
    (path.parent / "hop").symlink_to(outside / path.name)
    path.symlink_to("hop")


def link_to_fifo(path: Path, outside: Path) -> None:
    put_fifo(outside / "fifo")
    path.symlink_to(outside / "fifo")


def link_in_a_circle(path: Path, _: Path) -> None:
    path.symlink_to("hop")
    (path.parent / "hop").symlink_to(path.name)


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "a good file elsewhere": link_to_twin,
    "a good file, relative": link_up,
    "a link to it": link_twice,
    "a linked folder": link_through_folder,
    "passwd": link_to("/etc/passwd"),
    "zero": link_to("/dev/zero"),
    "null": link_to("/dev/null"),
    "stdin": link_to("/dev/stdin"),
    "fifo": link_to_fifo,
    "folder": link_to(".."),
    "nothing": link_to("/nowhere"),
    "circle": link_in_a_circle,
    "proc": link_to("/proc/self/mem"),
    "is fifo": lambda path, _: put_fifo(path),
    "is socket": lambda path, _: put_socket(path),
    "is folder": lambda path, _: path.mkdir(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.timeout(10)
def test_a_file_is_a_file_of_the_folder(folder: Path, tmp_path: Path, name: str, place: str) -> None:
    """A good file elsewhere would work if it were followed; a pipe would wait for ever, /dev/zero never end."""
    LAYOUTS[name](folder)
    opens(folder)
    (folder / STAMPS).unlink(missing_ok=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    PLACES[place](folder / name, outside)
    if place in {"nothing", "circle"} and name == LOCK:
        opens(folder)  # as if there were none
    elif place in {"nothing", "circle"} and name == "added_tokens.json":
        refused(folder, "no token")  # as if there were none
    else:
        refused(folder, name)


def test_honest_links(folder: Path, tmp_path: Path) -> None:
    """The folder itself, one above it, a second name within it, and the hub cache's own layout."""
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "above").symlink_to(tmp_path)
    (folder / WEIGHTS).rename(folder / "w.bin")
    (folder / WEIGHTS).symlink_to("w.bin")
    for way in (tmp_path / "link", tmp_path / "above" / "model", tmp_path / "above" / "link"):
        opens(way)
    snapshot = hub_cache(folder, tmp_path / "hub" / "models--a--b")
    opens(snapshot)
    (tmp_path / "to-snapshot").symlink_to(snapshot)
    opens(tmp_path / "to-snapshot")


def hub_cache(folder: Path, home: Path) -> Path:
    """snapshots/COMMIT/NAME -> ../../blobs/HASH, as huggingface_hub lays a repository out."""
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        shutil.copyfile(folder / name, home / "blobs" / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    return snapshot


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, WEIGHTS])
@pytest.mark.parametrize("way", ["blob leads out", "another repository", "another layout", "blob is a pipe", "deeper"])
def test_the_hub_cache_is_no_way_out(folder: Path, tmp_path: Path, name: str, way: str) -> None:
    home = tmp_path / "hub" / "models--a--b"
    snapshot = hub_cache(folder, home)
    other = hub_cache(folder, tmp_path / "hub" / "models--c--d").parents[1]
    blob = home / "blobs" / f"hash-of-{name}"
    if way == "blob leads out":
        blob.unlink()
        blob.symlink_to(folder / name)
    elif way == "another repository":
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(other / "blobs" / blob.name)
    elif way == "another layout":
        snapshot = (home / "snapshots").rename(home / "models") / snapshot.name
    elif way == "blob is a pipe":
        blob.unlink()
        put_fifo(blob)
    else:
        (home / "blobs" / "sub").mkdir()
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(blob.rename(home / "blobs" / "sub" / name))
    refused(snapshot, name if way != "another layout" else CONFIG, error=CheckpointMismatchError)


@pytest.mark.parametrize("name", [*LAYOUTS, STAMPS])
def test_no_file_is_longer_than_an_honest_one(folder: Path, name: str) -> None:
    """Sparse, so that it costs its maker nothing. A damaged list of hashed files only means: hash again."""
    LAYOUTS.get(name, write_lock)(folder)
    opens(folder)
    os.truncate(folder / name, files.max_bytes(name) + 1)
    if name == STAMPS:
        opens(folder)
    else:
        refused(folder, name, error=CheckpointMismatchError)


FILLERS = (b"\0", b" ", b"[", b'{"a":', b"[],", b"9", b"\xff", b'"')


def open_filled(folder: Path, name: str) -> None:
    """Put megabytes of one thing after the other into a file."""
    for filler in FILLERS:
        length = min(files.max_bytes(name), 8 * MIB)
        (folder / name).write_bytes((filler * (length // len(filler) + 1))[:length])
        try:
            checkpoint.open_checkpoint(folder)
        except ArkASRError as error:
            one_line(error)
        else:
            assert name == "merges.txt"


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json", INDEX, LOCK])
def test_the_longest_file_is_bounded(folder: Path, name: str) -> None:
    """Slow parsers and greedy ones, fed as much as is let through or enough to tell."""
    LAYOUTS[name](folder)
    confined(open_filled, folder, name, limit_mib=1_000)


# ---- safetensors ----

TENSOR = "model.norm.weight"
Forge = Callable[[dict[str, Any], bytes], bytes]


def with_tensor(**changes: object) -> Forge:
    """One tensor of a good file described otherwise."""
    return lambda header, tail: packed(header | {TENSOR: header[TENSOR] | changes}, tail)


def with_offsets(change: Callable[[int, int], list[Any]]) -> Forge:
    return lambda header, tail: with_tensor(data_offsets=change(*header[TENSOR]["data_offsets"]))(header, tail)


def with_name(name: str, **changes: object) -> Forge:
    """A surplus tensor."""

    def forge(header: dict[str, Any], tail: bytes) -> bytes:
        extra = {"dtype": "BF16", "shape": [2], "data_offsets": [len(tail), len(tail) + 4]} | changes
        return packed(header | {name: extra}, tail + bytes(4))

    return forge


def with_length(length: int) -> Forge:
    return lambda _, tail: struct.pack("<Q", length) + tail


def with_metadata(value: object) -> Forge:
    return lambda header, tail: packed(header | {"__metadata__": value}, tail)


def without(key: str) -> Forge:
    def forge(header: dict[str, Any], tail: bytes) -> bytes:
        del header[TENSOR][key]
        return packed(header, tail)

    return forge


def with_wrong_length(change: int) -> Forge:
    """The length of the whole file and some more, where that of the header should stand."""
    return lambda header, tail: struct.pack("<Q", len(packed(header, tail)) + change) + packed(header, tail)[8:]


def swapped(header: dict[str, Any], tail: bytes) -> bytes:
    """Two tensors with each other's place, of other length."""
    one, other = header[TENSOR], header["model.embed_tokens.weight"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return packed(header, tail)


def twice(header: dict[str, Any], tail: bytes) -> bytes:
    """A name with two descriptions of the same bytes, the second of another shape."""
    second = json.dumps({TENSOR: header[TENSOR] | {"shape": [1, 32]}})[1:]
    return packed((json.dumps(header)[:-1] + "," + second).encode(), tail)


FORGERIES: dict[str, Forge] = {
    **{f"length {n:#x}": with_length(n) for n in (0, 1, 2**31, 2**63, 2**64 - 1)},
    "length of the file": with_wrong_length(0),
    "length of the rest": with_wrong_length(-8),
    "length of the rest and one": with_wrong_length(-7),
    "header of nothing": lambda _, tail: packed(b"", tail),
    "header is a list": lambda _, tail: packed([], tail),
    "header is not UTF-8": lambda _, tail: packed(b'{"\xff\xfe": 1}', tail),
    "header is UTF-16": lambda header, tail: packed(json.dumps(header).encode("utf-16"), tail),
    "header with NUL": lambda header, tail: packed(json.dumps(header).encode() + b"\0", tail),
    "header twice": lambda header, tail: packed(json.dumps(header).encode() * 2, tail),
    "header 8 MiB of spaces": lambda _, tail: packed(b"{}" + b" " * (8 * MIB - 2), tail),
    "header 9 MiB of spaces": lambda header, tail: packed(json.dumps(header).encode() + b" " * (9 * MIB), tail),
    "nested lists": lambda _, tail: packed(b"[" * 4 * MIB, tail),
    "nested objects": lambda _, tail: packed(b'{"a":' * MIB + b"1" + b"}" * MIB, tail),
    "nested metadata": lambda _, tail: packed(b'{"__metadata__":' + b'{"a":' * MIB + b"1" + b"}" * (MIB + 1), tail),
    **{
        f"metadata {value}": with_metadata(json.loads(value))
        for value in ("[]", '"a"', "7", '{"a": 1}', '{"a": null}', '{"a": {"b": "c"}}')
    },
    **{
        f"offsets {name}": with_offsets(change)
        for name, change in {
            "negative": lambda a, b: [a - 10**6, b], "backwards": lambda a, b: [b, a], "one": lambda a, _: [a],
            "three": lambda a, b: [a, b, b], "empty": lambda *_: [], "2^63": lambda a, _: [a, 2**63],
            "2^64": lambda a, _: [a, 2**64], "wrap": lambda _, b: [2**64 - 1, b], "gap": lambda a, b: [a + 2, b],
            "overlap": lambda a, b: [a - 2, b], "short": lambda a, b: [a, b - 2], "behind": lambda a, b: [a, b + 2],
            "far": lambda a, b: [a + 2**40, b + 2**40], "float": lambda a, b: [a + 0.5, b],
        }.items()
    },
    "offsets swapped": swapped,
    **{
        f"shape {shape}": with_tensor(shape=shape)
        for shape in (
            *([], [0], [-1], [-32], [2**63], [2**64], [2**32, 2**32], [2**63, 2, 0], [0, 2**63], [32, 1], [1.5], [31]),
            *("32", None, [[32]], [True], {"a": 1}),
        )
    },
    "shape of a million axes": with_tensor(shape=[1] * 10**6 + [32]),
    **{f"dtype {d!r}": with_tensor(dtype=d) for d in ("F64", "I16", "Q4", "", "BF\n16", "f16", 7, None, ["F16"])},
    "dtype of 1 MB": with_tensor(dtype="F" * 10**6),
    **{f"no {key}": without(key) for key in ("dtype", "shape", "data_offsets")},
    **{
        f"surplus {name[:12]!r}": with_name(name)
        for name in ("", "a\0b", "a\nb", "/etc/passwd", "../x", "\x1b]0;t\x07", "\u202e", "x" * MIB, "__class__", "a.b")
    },
    "surplus with newline of another dtype": with_name("a\nb", dtype="I8", shape=[4]),
    "surplus with newline behind the end": with_name("a\nb", data_offsets=[9, 0]),
    "surplus of 1 MB behind the end": with_name("x" * MIB, data_offsets=[9, 0]),
    "surplus hundred thousand": lambda header, tail: packed(
        {f"{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)} | header, tail
    ),
    "surplus million": lambda _, tail: packed(
        b"{%s}" % b",".join(b'"%d":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)), tail
    ),
    "name twice": twice,
    "file one byte short": lambda header, tail: packed(header, tail[:-1]),
    "file one byte long": lambda header, tail: packed(header, tail + b"\0"),
    "file without data": lambda header, _: packed(header),
    "file twice": lambda header, tail: packed(header, tail) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers(folder: Path, name: str) -> None:
    path = folder / WEIGHTS
    path.write_bytes(FORGERIES[name](*read_weights(path)))
    before_s = time.process_time()
    refused(folder, error=CheckpointMismatchError)
    assert time.process_time() - before_s < 3


@pytest.mark.parametrize("header_bytes", [2**30, 8 * MIB, 40 * 2**30])
def test_a_giant_header_is_not_read(folder: Path, header_bytes: int) -> None:
    """A sparse file as long as it claims to be; safetensors itself would read 100 MB of it."""
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", header_bytes) + b"{")
        file.truncate(header_bytes + 8)
    outcome = confined(checkpoint.open_checkpoint, folder, memory_mib=50_000, limit_mib=64, timeout_s=5)
    assert outcome.error == "CheckpointMismatchError"
    assert WEIGHTS in outcome.message


# ---- config.json ----

SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("vocab_size", "merge_factor", "rms_norm_eps", "rope_theta", "audio_token_id", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "max_whisper_length", "head_dim", "whisper_config.d_model", "whisper_config.encoder_layers"),
    *("whisper_config.encoder_attention_heads", "whisper_config.encoder_ffn_dim", "whisper_config.num_mel_bins"),
    "whisper_config.max_source_positions",
)  # fmt: skip
ABSURD = (
    *("2e24", "16777215", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e308", "1e999"),
    *(
        "-1e999",
        "-1",
        "0",
        "-0.0",
        "1e-400",
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        '"32"',
        '"\\u001b[31m\\n"',
        "[[32]]",
    ),
    *('{"a": {"b": [1]}}', "9" * 4_000, "9" * 1_000_000, '"' + "x" * 500_000 + '"', "[" + "0," * 400_000 + '"a"]'),
    *("[" * 400 + "]" * 400, "[" * 950 + "]" * 950, "[" * 980 + "]" * 980, "[" * 100_000 + "]" * 100_000),
)


def set_raw(folder: Path, key: str, value: str) -> None:
    """Put JSON text, valid or not, at a key of config.json."""
    *parents, last = key.split(".")
    raw = json.loads((folder / CONFIG).read_text())
    place = raw[parents[0]] if parents else raw
    place[last] = "@@"
    (folder / CONFIG).write_text(json.dumps(raw).replace('"@@"', value))


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: f"{value[:10]}:{len(value)}")
def test_absurd_sizes(folder: Path, good: Path, value: str) -> None:
    """At every key. Where the number is too odd for the config but fits, as an eos id of 0, a model may come of it."""
    for key in SIZES:
        shutil.copyfile(good / CONFIG, folder / CONFIG)
        set_raw(folder, key, value)
        before_s = time.process_time()
        try:
            opens(folder)
        except ArkASRError as error:
            assert str(folder) in one_line(error)  # noqa: PT017 - either outcome is allowed
        else:
            assert key in {"rms_norm_eps", "rope_theta"} or (value == "0" and "token_id" in key), key
        assert time.process_time() - before_s < 2


TEXTUAL = (
    *("model_type", "hidden_act", "adapter_type", "mlp_adapter_act", "rope_scaling", "rope_parameters", "use_rope"),
    *("tie_word_embeddings", "use_sliding_window", "whisper_config", "whisper_config.activation_function"),
)


@pytest.mark.parametrize("key", TEXTUAL)
def test_absurd_words(folder: Path, good: Path, key: str) -> None:
    for value in (
        '"\\u001b[31m\\n"',
        '"' + "x" * 500_000 + '"',
        "[" * 980 + "]" * 980,
        '{"\\n": 1}',
        '"\\ud800"',
        "1e999",
    ):
        shutil.copyfile(good / CONFIG, folder / CONFIG)
        set_raw(folder, key, value)
        refused(folder, CONFIG, error=CheckpointMismatchError)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"\0" + raw,
        lambda raw: raw[:-2] + b"\0}",
        lambda raw: raw.replace(b'"silu"', b'"si\0lu"'),
        lambda raw: raw.replace(b'"silu"', b'"\xed\xa0\x80"'),
        lambda raw: raw.replace(b"{", b'{"hidden_size": 64, ', 1),
        lambda raw: raw.replace(b"{", b'{"whisper_config": {}, ', 1),
        lambda raw: raw.replace(b'"d_model"', b'"d_model": 8, "d_model"'),
        lambda raw: raw + raw,
        lambda raw: b"\xff\xfe" + raw,
        lambda raw: raw[:-1],
        lambda raw: raw.replace(b":", b":" + b"[" * 100_000),
        lambda raw: raw + b" " * MIB,
    ],
    ids=["nul-first", "nul-last", "nul-within", "surrogate", "key-twice", "object-twice", "inner-key-twice", "doubled",
         "utf-16-mark", "cut", "nested", "1-MiB-more"],
)  # fmt: skip
def test_config_bytes(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    (folder / CONFIG).write_bytes(spoil((folder / CONFIG).read_bytes().rstrip()))
    refused(folder, CONFIG, error=CheckpointMismatchError)


def test_a_million_stop_tokens(folder: Path) -> None:
    edit(folder / CONFIG, lambda raw: raw.update(eos_token_id=[263, *[0] * 300_000]))
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()), separators=(",", ":")))
    assert confined(use, folder).error == ""


def grow_positions(folder: Path, positions: int) -> None:
    """Claim positions that no tensor stands for, which RoPE allows."""
    header, tail = read_weights(folder / WEIGHTS)
    begin, end = header.pop(POSITIONS)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [o - (end - begin) * (o >= end) for o in entry["data_offsets"]]
    (folder / WEIGHTS).write_bytes(packed(header, tail[:begin] + tail[end:]))
    edit(folder / CONFIG, lambda raw: raw["whisper_config"].update(max_source_positions=positions))
    edit(folder / CONFIG, lambda raw: raw.update(max_whisper_length=positions))


@pytest.mark.parametrize("positions", [2**24 - 1, 2**16, 2**16 - 1, 3_000])
def test_positions_that_no_tensor_stands_for(folder: Path, positions: int) -> None:
    """Regression: 450 kB of files took 2.3 GB, as zeros were made for 2^24 - 1 positions."""
    grow_positions(folder, positions)
    outcome = confined(use, folder, memory_mib=4_000)
    assert outcome.by_us == (positions >= 2**16)


@pytest.mark.parametrize("num_mels", [2**20, 1023])
def test_mels_beyond_measure(folder: Path, num_mels: int) -> None:
    """A weight of 200 MB, or of nothing where a file system has holes, asked for a spectrogram of gigabytes."""
    header, tail = read_weights(folder / WEIGHTS)
    name = "audio_encoder.whisper.conv1.weight"
    entry = header.pop(name)
    begin, end = entry["data_offsets"]
    for other in header.values():
        if "data_offsets" in other:
            other["data_offsets"] = [o - (end - begin) * (o >= end) for o in other["data_offsets"]]
    kept = tail[:begin] + tail[end:]
    size = 32 * num_mels * 3 * 2
    header[name] = {"dtype": "BF16", "shape": [32, num_mels, 3], "data_offsets": [len(kept), len(kept) + size]}
    whole = packed(header, kept)
    (folder / WEIGHTS).write_bytes(whole)
    os.truncate(folder / WEIGHTS, len(whole) + size)
    edit(folder / CONFIG, lambda raw: raw["whisper_config"].update(num_mel_bins=num_mels))
    outcome = confined(use, folder, memory_mib=4_000)
    assert outcome.by_us == (num_mels > 1023)


# ---- tokenizers ----

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
FLOOD = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * MIB}
SLOW = {"Regex": "(([a-zA-Z ]+)+)+!"}
PREPEND = {"type": "Prepend", "prepend": "x" * MIB}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
PAD = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
CUT = {"direction": "Right", "strategy": "LongestFirst"}


def part(name: str, value: object) -> EDITS:
    return lambda raw: raw.__setitem__(name, value)


def sequence(kind: str, *parts: object) -> dict[str, object]:
    return {"type": "Sequence", kind: list(parts)}


def split(pattern: object) -> dict[str, object]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def vocab(**ids: object) -> EDITS:
    return lambda raw: raw["model"]["vocab"].update(ids)


def add(*tokens: dict[str, object]) -> EDITS:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda raw: raw["added_tokens"].extend(plain | token for token in tokens)


def retype(kind: str, **changes: object) -> EDITS:
    """The vocabulary under another kind of model."""
    return lambda raw: raw.update(model={"type": kind, "vocab": raw["model"]["vocab"], "unk_token": "no", **changes})


def rename_token(raw: dict[str, Any], length: int) -> None:
    raw["model"]["vocab"]["z" * length] = raw["model"]["vocab"].pop("z")


def one_id(raw: dict[str, Any]) -> None:
    """Two turn tokens of one id; every other keeps its own."""
    gone = ("<|im_start|>", "<|user|>")
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in gone]
    raw["model"]["vocab"]["<|user|>"] = 258


REFUSED_TOKENIZERS: dict[str, EDITS] = {
    "pads to gigatokens": part("padding", PAD | {"strategy": {"Fixed": 10**9}}),
    "pads to multiples": part("padding", PAD | {"strategy": "BatchLongest", "pad_to_multiple_of": 2**40}),
    "truncates": part("truncation", CUT | {"max_length": 2, "stride": 0}),
    "truncates and panics": part("truncation", CUT | {"max_length": 2, "stride": 5}),
    "normalizer doubles": part("normalizer", sequence("normalizers", *[DOUBLE] * 40)),
    "normalizer doubles added tokens": lambda raw: (
        part("normalizer", sequence("normalizers", *[DOUBLE] * 40))(raw),
        add({"id": 265, "content": "aaa", "normalized": True, "special": False})(raw),
    ),
    "normalizer floods": part("normalizer", sequence("normalizers", FLOOD, FLOOD)),
    "normalizer prepends": part("normalizer", sequence("normalizers", *[PREPEND] * 9)),
    "normalizer backtracks": part("normalizer", {"type": "Replace", "pattern": SLOW, "content": "x"}),
    "normalizer panics": part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}),
    "normalizer strips": part("normalizer", STRIP),
    "normalizer absent": part("normalizer", None),
    "normalizer unknown": part("normalizer", {"type": "Exec", "command": "touch"}),
    "normalizer nested": part("normalizer", "@@"),
    "normalizer of giant regex": part(
        "normalizer", {"type": "Replace", "pattern": {"Regex": "(((a{1,999}){1,999}){1,999}){1,999}"}, "content": ""}
    ),
    "pre-tokenizer backtracks": part("pre_tokenizer", split(SLOW)),
    "pre-tokenizer with another regex": part(
        "pre_tokenizer", sequence("pretokenizers", split({"Regex": r"\p{L}+"}), BYTES)
    ),
    "pre-tokenizer absent": part("pre_tokenizer", None),
    "post-processor repeats": part(
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**5,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        },
    ),
    "decoder doubles": part(
        "decoder", sequence("decoders", BYTES, DOUBLE | {"pattern": {"Regex": "."}}, *[DOUBLE] * 40)
    ),
    "decoder floods": part("decoder", sequence("decoders", FLOOD, FLOOD)),
    "decoder backtracks": part("decoder", {"type": "Replace", "pattern": SLOW, "content": "x"}),
    "decoder absent": part("decoder", None),
    "model is words": retype("WordLevel"),
    "model is word pieces": retype("WordPiece", continuing_subword_prefix=""),
    "model is unigrams": part("model", {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5, "byte_fallback": True}),
    "model of unigrams of NaN": part("model", {"type": "Unigram", "vocab": [["a", -1e308]] * 999, "unk_id": 0}),
    "unknown key": part("auto_map", {"a": "b.c"}),
    "model unknown": part("model", {"type": "Remote", "url": "http://localhost"}),
    "model absent": part("model", None),
    "model is a list": part("model", []),
    "model at random": lambda raw: raw["model"].update(dropout=0.5),
    "model at random in excess": lambda raw: raw["model"].update(dropout=1e308),
    "model with prefix": lambda raw: raw["model"].update(continuing_subword_prefix="#" * MIB),
    "model with unknown token": lambda raw: raw["model"].update({"unk_token": "no"}),
    "merges unknown": lambda raw: raw["model"].update(merges=[["no", "such"]]),
    "merges odd": lambda raw: raw["model"].update(merges=[7, None, {"a": 1}]),
    "id negative": vocab(P=-1),
    "id 2^64": vocab(P=2**64),
    "id 1e9": vocab(P=1e9),
    "id NaN": vocab(P=float("nan")),
    "id 2^32 - 1": vocab(P=2**32 - 1),
    "id beyond the embeddings": vocab(P=276),
    "id of a token unheard": vocab(z=2**31),
    "id of the audio": vocab(P=258),
    "id of two": one_id,
    "token of 30 MB": lambda raw: rename_token(raw, 30 * 10**6),
    "token of 2 kB": lambda raw: rename_token(raw, 2_000),
    "added id negative": add({"id": -1, "content": "zz"}),
    "added id 2^64": add({"id": 2**64, "content": "zz"}),
    "added id a word": add({"id": "265", "content": "zz"}),
    "added token of 2 kB": add({"id": 265, "content": "\n" * 2_000}),
    "added token in the instruction": add({"id": 276, "content": "Please", "special": False}, *(
        {"id": 265 + i, "content": f"filler {i}"} for i in range(11)), {"id": 276, "content": "transcribe"}),
}  # fmt: skip

HARMLESS_TOKENIZERS: dict[str, EDITS] = {
    "as it was": lambda _: None,
    "other offsets": lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(trim_offsets=False),
    "post-processor of offsets": part(
        "post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    ),
    "empty affixes": lambda raw: raw["model"].update(continuing_subword_prefix="", end_of_word_suffix=""),
    "added id 4e9": add({"id": 4 * 10**9, "content": "zz"}),
    "added token of nothing": add({"id": 265, "content": ""}),
    "added token thrice": add(*[{"id": 265, "content": "zz"}] * 3),
    "many added tokens": add(*[{"id": 265 + i, "content": f"zz{i}", "special": i % 2 == 0} for i in range(50_000)]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TOKENIZERS)
def test_hostile_tokenizers(folder: Path, name: str) -> None:
    """Regressions: several of these ended the process from within the tokenizers library, others never came back."""
    edit(folder / TOKENIZER, REFUSED_TOKENIZERS[name])
    if name == "normalizer nested":
        path = folder / TOKENIZER
        path.write_text(path.read_text().replace('"@@"', '{"a":' * 900 + "1" + "}" * 900))
    outcome = confined(use, folder)
    assert outcome.by_us, f"gave {outcome.value!r}"
    assert TOKENIZER in outcome.message


@pytest.mark.parametrize("name", HARMLESS_TOKENIZERS)
def test_odd_but_harmless_tokenizers(good: Path, folder: Path, name: str) -> None:
    edit(folder / TOKENIZER, HARMLESS_TOKENIZERS[name])
    outcome = confined(use, folder)
    assert not outcome.error, outcome.message
    if name == "as it was":
        assert outcome.value == confined(use, good).value


OLDER: dict[str, tuple[str, str]] = {
    "ids of words": ("vocab.json", '{"a": "b"}'), "ids below zero": ("vocab.json", '{"a": -1}'),
    "vocab of a list": ("vocab.json", "[1]"), "vocab beyond": ("vocab.json", '{"a": 4294967295}'),
    "merges of three": ("merges.txt", "#version: 0.2\na b c\n"), "merges of unknown": ("merges.txt", "q\n"),
    "merges not UTF-8": ("merges.txt", "\udcff\udcfe"), "added of words": ("added_tokens.json", '{"a": "b", "c": 1}'),
    "added at odds": ("added_tokens.json", '{"\\n\\u001b[31m": 7}'),
    "added of lists": ("added_tokens.json", '{"a": []}'),
    "added of nothing": ("added_tokens.json", '{"": 256}'), "added floats": ("added_tokens.json", '{"a": 256.5}'),
    "added beyond": ("added_tokens.json", '{"a": 1e999}'),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_hostile_older_files(folder: Path, name: str) -> None:
    to_three_files(folder)
    file, content = OLDER[name]
    (folder / file).write_bytes(content.encode(errors="surrogateescape"))
    refused(folder, "vocab.json", "added_tokens.json", file, error=CheckpointMismatchError)


def test_thirty_thousand_added_tokens(folder: Path) -> None:
    """Regression: they were added one by one, each time searching all; 4 MB of them would have taken a day."""
    to_three_files(folder)
    edit(folder / "added_tokens.json", lambda raw: raw.update({f"zz{i}": 265 + i for i in range(30_000)}))
    assert confined(checkpoint.open_checkpoint, folder, timeout_s=15).error in {"", "CheckpointMismatchError"}


# ---- the index and the lock ----


@pytest.mark.parametrize(
    "name",
    [
        *(f"{WEIGHTS}/", f"./{WEIGHTS}", f"..\\{WEIGHTS}", f"C:{WEIGHTS}", f"~/{WEIGHTS}", f"http://h/{WEIGHTS}"),
        *(f"{WEIGHTS}\0", f"{WEIGHTS}\n", f"\x1b[2J{WEIGHTS}", "model-1-of-1.safetensors", "x.py", CONFIG),
        *("file:///etc/passwd", "x" * MIB, ".", LOCK, f"{SHARD}.part", WEIGHTS.upper(), None, 7, [], {}, [WEIGHTS]),
    ],
    ids=lambda name: repr(name)[:40],
)  # fmt: skip
def test_names_in_the_index(folder: Path, name: object) -> None:
    to_shards(folder)
    edit(folder / INDEX, lambda raw: raw["weight_map"].update({TENSOR: name}))
    refused(folder, INDEX, error=CheckpointMismatchError)


def test_an_index_of_a_million_entries(folder: Path) -> None:
    to_shards(folder)
    entries = {f"t{i}": SHARD for i in range(280_000)}  # as many as its bound lets through
    (folder / INDEX).write_text(json.dumps({"weight_map": entries}))
    opens(folder)  # what the index says of single tensors is not used
    for number in range(10**5):
        entries[f"t{number}"] = f"model-{number:05}-of-99999.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": entries}))
    refused(folder, "missing", error=ModelNotFoundError)


def locked(change: dict[str, Any]) -> EDITS:
    """Entries of a lock file's `files`, or of one of these."""
    return lambda raw: raw["files"].update(change)


def drop(key: str) -> EDITS:
    return lambda raw: raw.pop(key)


def locked_config(**changes: object) -> EDITS:
    return lambda raw: raw["files"][CONFIG].update(changes)


LOCKS: dict[str, EDITS] = {
    **{
        f"name {name[-20:]!r}": locked({name: {"size": 6, "sha256": "0" * 64}})
        for name in (
            *("../secret", "../../../../../../../../etc/passwd", "/etc/passwd", "sub/config.json", "..", ".", ""),
            *("a\nb", "a\0b", "\x1b[2J", "\ud800", "x" * 10**5, LOCK, STAMPS, "modeling_arkasr.py", "~/.bashrc"),
        )
    },
    **{
        f"size {size:.20}": locked_config(size=json.loads(size))
        for size in ("-1", "0", f"{2**64}", "1e308", "Infinity", "NaN", '"1"', "null", "[]", "{}", "9" * 4_000, "true")
    },
    **{
        f"hash {sha256!r:.20}": locked_config(sha256=sha256)
        for sha256 in ("", "0" * 64, "0\n1", "\x1b[2J", "x" * 10**5, "A" * 64)
    },
    **{f"hash {sha256}": locked_config(sha256=json.loads(sha256)) for sha256 in ("null", "7", "[]")},
    **{f"entry {entry}": locked({CONFIG: json.loads(entry)}) for entry in ("[]", "null", "7", '"x"', "{}")},
    **{f"files {entry}": part("files", json.loads(entry)) for entry in ("[]", "null", "7", '"x"', "{}")},
    **{f"no {key}": drop(key) for key in ("files", "repo_id", "revision")},
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKS)
def test_hostile_locks(folder: Path, name: str) -> None:
    """Regression: names that lead out of the folder had the files there hashed, and the message told the hash."""
    (folder.parent / "secret").write_text("secret")
    lock = lock_of(folder)
    LOCKS[name](lock)
    (folder / LOCK).write_text(json.dumps(lock))
    with pytest.raises(CheckpointMismatchError) as caught:
        checkpoint.open_checkpoint(folder)
    message = one_line(caught.value)
    assert str(folder) in message
    assert not re.search("[0-9a-f]{64}", message) or name.startswith("hash")
    with pytest.raises(CheckpointMismatchError):
        pins.verify(folder)


def test_foreign_names_are_quoted(folder: Path) -> None:
    write_lock(folder)
    (folder / "\x1b[2J\n").touch()
    opens(folder)
    with pytest.raises(CheckpointMismatchError) as caught:
        pins.verify(folder)
    one_line(caught.value)


@pytest.mark.parametrize("name", [STAMPS, STAMPS + files.PART])
@pytest.mark.parametrize(
    "kind", ["link", "dangling link", "hard link", "fifo", "folder", "link to fifo", "link to zero"]
)
@pytest.mark.timeout(10)
def test_loading_writes_to_nothing_but_the_stamps(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Regression: through a link of the temporary name, loading a model overwrote any file of the user's."""
    write_lock(folder)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    precious.chmod(0o600)
    put: dict[str, Callable[[Path], object]] = {
        "link": lambda path: path.symlink_to(precious),
        "dangling link": lambda path: path.symlink_to(tmp_path / "new"),
        "hard link": lambda path: path.hardlink_to(precious),
        "fifo": put_fifo,
        "folder": Path.mkdir,
        "link to fifo": lambda path: link_to_fifo(path, tmp_path),
        "link to zero": lambda path: path.symlink_to("/dev/zero"),
    }
    put[kind](folder / name)
    opens(folder)
    assert precious.read_text() == "precious"
    assert precious.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "new").exists()
    if name != STAMPS and kind != "folder":
        assert (folder / STAMPS).is_file()  # what was left over hinders nobody


# ---- two thousand mutations ----

EXTREMES = (
    "0",
    "-1",
    "1e999",
    "NaN",
    "18446744073709551616",
    "4294967295",
    "1e-5",
    "true",
    "null",
    '"a"',
    "[]",
    "{}",
    "65536",
)


def mutate_bytes(raw: bytes, chance: random.Random) -> bytes:
    """Flip bits, insert, delete, repeat or swap numbers, mostly where a header would be."""
    mutated = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(chance.choice([len(mutated), min(len(mutated), 4_000), 16]))
        kind = chance.randrange(5)
        if kind == 0:
            mutated[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            mutated[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 2:
            del mutated[at : at + chance.randrange(1, 9)]
        elif kind == 3:
            mutated[at:at] = mutated[at : at + chance.randrange(1, 64)]
        elif numbers := list(re.finditer(rb"\d+", mutated[:100_000])):
            number = chance.choice(numbers)
            mutated[number.start() : number.end()] = chance.choice(EXTREMES).encode()
        if not mutated:
            mutated += b"{"
    return bytes(mutated)


def mutate_tree(value: Any, chance: random.Random) -> Any:
    """JSON with one node replaced, dropped, doubled or wrapped."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        mutated = dict(value)
        match chance.randrange(8):
            case 0:
                del mutated[key]
            case 1:
                mutated[chance.choice(["", "\n", "a" * 2_000, "__class__", key.upper()])] = mutated.pop(key)
            case _:
                mutated[key] = mutate_tree(value[key], chance)
        return mutated
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutate_tree(value[at], chance), *value[at + chance.randrange(2) :]]
    return chance.choice([json.loads(chance.choice(EXTREMES)), [value], {"a": value}, str(value) + "\n", value])


def mutate(name: str, raw: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return mutate_bytes(raw, chance)
    if name not in {WEIGHTS, SHARD}:
        return json.dumps(mutate_tree(json.loads(raw), chance)).encode()
    (length,) = struct.unpack("<Q", raw[:8])
    return packed(mutate_tree(json.loads(raw[8 : 8 + length]), chance), raw[8 + length :])


def mutations(folder: Path, name: str, seeds: Sequence[int]) -> tuple[list[str], float, int]:
    """What went wrong, the slowest of them in seconds of work, and how many could be used after all."""
    path = folder / name
    raw = path.read_bytes()
    wrong, slowest_s, usable = [], 0.0, 0
    opens(folder)  # imports
    for seed in seeds:
        path.write_bytes(mutate(name, raw, random.Random(f"{name} {seed}")))
        (folder / STAMPS).unlink(missing_ok=True)
        before_s = time.process_time()
        try:
            source = checkpoint.open_checkpoint(folder)
            model.load(source)
            source.rules.prompt_ids(3)
            source.rules.to_text(list(range(256)))
            usable += 1
        except ArkASRError as error:
            if not str(error).isprintable() or len(str(error)) > MAX_MESSAGE_CHARS:
                wrong.append(f"{seed}: {str(error)[:200]!r}")
        except BaseException as error:  # noqa: BLE001 - also a panic
            wrong.append(f"{seed}: {type(error).__name__}: {str(error)[:200]!r}")
        slowest_s = max(slowest_s, time.process_time() - before_s)
    path.write_bytes(raw)
    return wrong, slowest_s, usable


@pytest.mark.parametrize(
    ("name", "count"),
    [(WEIGHTS, 600), (SHARD, 100), (CONFIG, 600), (TOKENIZER, 300), (INDEX, 150), (LOCK, 150), ("vocab.json", 50),
     ("added_tokens.json", 50)],
)  # fmt: skip
def test_mutations(folder: Path, name: str, count: int) -> None:
    """Each opens and loads, or is refused in one line: within a second, in bounded memory."""
    LAYOUTS[name](folder)
    outcome = confined(mutations, folder, name, range(count), timeout_s=55)
    wrong, slowest_s, usable = outcome.value
    assert not wrong
    assert slowest_s < 1
    assert usable < count


# ---- manifests and recordings ----


def read_all(path: Path) -> list[int]:
    """Length of each utterance of a manifest."""
    return [len(utterance.waveform()) for utterance in data.read_manifest(path)]


def manifest(folder: Path, line: bytes | str | dict[str, Any]) -> Path:
    soundfile.write(folder / "ok.wav", np.zeros(8_000), audio.SAMPLE_RATE)
    raw = json.dumps({"audio": "ok.wav"} | line).encode() if isinstance(line, dict) else line
    path = folder / "m.jsonl"
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


@pytest.mark.parametrize(
    "line",
    [
        *("[" * 100_000, '{"audio":' * 5_000, b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"\0\0", '{"audio": "a"} {}'),
        *("9" * 5_000, {"text": 7}, {"id": []}, {"units": 7}, {"a\n": 1}, {"x" * 10**5: 1}, {"duration": [[]]}),
        *({"duration": float("nan")}, {"duration": float("inf")}, {"duration": 10**400}, {"duration": "x" * 10**5}),
        *({"begin_time": float("nan")}, {"begin_time": float("inf")}, {"begin_time": 1e308}, {"begin_time": 10**400}),
        *({"begin_time": 0, "end_time": float("nan")}, {"begin_time": 0, "end_time": 1e999}, {"begin_time": 1e8}),
        *({"audio": "a\0b"}, {"audio": "\ud800"}, {"audio": "no\n.wav"}, {"audio": "\x1b[2J"}, {"audio": "x" * 500}),
        *({"audio": "/dev/zero"}, {"audio": "/dev/zero", "duration": 1}, {"audio": "/proc/self/mem"}, {"audio": "."}),
        *({"audio": ".", "duration": 1}, {"audio": "m.jsonl"}, {"audio": "/etc/passwd"}, {"audio": "fifo"}),
        *({"audio": "fifo", "duration": 1}, {"audio": "socket"}, {"audio": "loop"}, {"audio": "x.raw"}),
    ],
    ids=lambda line: repr(line)[:50],
)  # fmt: skip
def test_hostile_manifests(tmp_path: Path, line: bytes | str | dict[str, Any]) -> None:
    """Regressions: null, NaN, nesting and other encodings ended in tracebacks; devices and pipes never ended."""
    put_fifo(tmp_path / "fifo")
    put_socket(tmp_path / "socket")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "x.raw").write_bytes(bytes(8))
    outcome = confined(read_all, manifest(tmp_path, line), limit_mib=64, timeout_s=5)
    assert outcome.error in {"UsageError", "AudioError"}, outcome


@pytest.mark.parametrize(
    "line",
    [
        {"text": None, "task": None, "units": None, "id": None, "duration": None},
        {"text": "a\u2028\x85\x0bb"},
        "",
        "\n \n",
    ],
    ids=["null", "odd line ends", "empty", "blank"],
)
def test_odd_but_honest_manifests(tmp_path: Path, line: str | dict[str, Any]) -> None:
    """Regression: a line ended at U+2028 within its text."""
    path = manifest(tmp_path, line)
    if isinstance(line, dict):
        path.write_text(json.dumps({"audio": "ok.wav"} | line, ensure_ascii=False), encoding="utf-8")
    assert read_all(path) == ([8_000] if isinstance(line, dict) else [])


@pytest.mark.parametrize("filler", [b"\0", b" ", b"["])
def test_a_manifest_line_of_a_gigabyte(tmp_path: Path, filler: bytes) -> None:
    path = manifest(tmp_path, filler * (4 * MIB))
    os.truncate(path, 2**30)
    outcome = confined(read_all, path, memory_mib=4_000, limit_mib=64, timeout_s=10)
    assert "a line of over" in outcome.message


def wav(
    *, channels: int = 1, rate: int = 16_000, bits: int = 16, kind: int = 1, claimed_bytes: int | None = None
) -> bytes:
    """A thousand bytes of silence under any header."""
    body = bytes(1_024)
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * frame % 2**32, frame % 2**16, bits)
    length = len(body) if claimed_bytes is None else claimed_bytes
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", length) + body
    return b"RIFF" + struct.pack("<I", min(36 + length, 2**32 - 1)) + chunks


def aiff(*, channels: int, frames: int) -> bytes:
    rate = b"\x40\x0c\xfa\0\0\0\0\0\0\0"
    common = b"COMM" + struct.pack(">IhIh", 18, channels, frames, 16) + rate
    sound = b"SSND" + struct.pack(">III", 2**31 - 9, 0, 0) + bytes(1_024)
    return b"FORM" + struct.pack(">I", 2**31 - 1) + b"AIFF" + common + sound


RECORDINGS: dict[str, bytes] = {
    **{f"{rate} Hz": wav(rate=rate) for rate in (0, 1, 999, 1_000_001, 2**31 - 1, 2**32 - 1)},
    **{f"{channels} channels": wav(channels=channels) for channels in (0, 1_025, 2**15, 2**16 - 1)},
    **{f"{bits} bits": wav(bits=bits) for bits in (0, 1, 7, 65_535)},
    **{f"{size:#x} bytes": wav(claimed_bytes=size) for size in (2**30, 2**31 - 2**20)},
    **{f"{size:#x} bytes in 1024 channels": wav(claimed_bytes=size, channels=1_024) for size in (2**30, 2**31 - 2**20)},
    "aiff of 2^32 - 1 frames": aiff(channels=1, frames=2**32 - 1),
    "aiff of 2^15 channels": aiff(channels=2**15 - 1, frames=2**31),
    "au of anything": b".snd" + struct.pack(">IIIII", 24, 2**32 - 2, 3, 2**32 - 1, 1_024) + bytes(1_024),
    "flac of nothing": b"fLaC\x80\xff\xff\xff" + bytes(64),
    "ogg of nothing": b"OggS" + b"\xff" * 1_024,
    "mp3 with a tag of 256 MB": b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(1_024),
    "webm of nothing": b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xfe" + bytes(1_024),
    "mp4 with a box of 2^64": b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42\0\0\0\x01moov" + b"\xff" * 8 + bytes(1_024),
    "m3u8 of files": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
    "sdp of a network": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_that_claim_too_much(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.wav").write_bytes(RECORDINGS[name])
    outcome = confined(audio.load, tmp_path / "x.wav", memory_mib=4_000, limit_mib=64, timeout_s=10)
    assert outcome.by_us or len(outcome.value) <= 2_048


def test_a_recording_that_unfolds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of FLAC can stand for 80 GB of silence; decoding stops at a bound."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((2**16, 8), np.int16), 16_000, format="FLAC")
    assert len(buffer.getvalue()) < 10_000
    assert len(audio.load(buffer.getvalue())) == 2**16
    monkeypatch.setattr(audio, "MAX_SAMPLES", 2**15)
    with pytest.raises(AudioError, match="over 32768 samples"):
        audio.load(buffer.getvalue())


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full"])
@pytest.mark.parametrize("source", [str, Path])
def test_devices_are_no_recordings(device: str, source: Callable[[str], str | Path]) -> None:
    assert confined(audio.load, source(device), limit_mib=64, timeout_s=5).error == "AudioError"
