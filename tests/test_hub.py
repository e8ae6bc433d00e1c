"""Names, downloads and the cache of models, against a hub on this machine that the real client talks to."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants
from hypothesis import given
from hypothesis import strategies as st

import hub_server
from arkasr import cli_models, download, export, files, hub, load_model, model, pins
from arkasr.checkpoint import open_checkpoint
from arkasr.errors import ArkASRError, CheckpointMismatchError, ModelNotFoundError, UsageError
from arkasr.pins import LOCK, PINS, STAMPS, Pin
from conftest import Run, byte_tokenizer, random_network, small_config
from hub_server import Hub
from test_audio import encoded, noise
from test_cli import FEW, assert_refused

REPO, C1, C2 = "some-org/tiny_asr.v1", "c1" * 20, "c2" * 20
NAME = f"{REPO}@{C1}"
REPO_06B = "AutoArk-AI/ARK-ASR-0.6B"
REPO_3B = "AutoArk-AI/ARK-ASR-3B"
COMMIT_3B = "1e28271b79edc97635783bea65abc89195a09ed3"
WEIGHTS, TOKENIZER, CONFIG, EXPORTED = files.WEIGHTS, files.TOKENIZER, files.CONFIG, files.EXPORTED
LFS = frozenset({WEIGHTS, TOKENIZER, "pytorch_model.bin", *EXPORTED})
CHUNK_BYTES = 10 * 2**20  # what the client holds back before it writes

Snapshot = dict[str, bytes]


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.marker), "w")


def checkpoint_files(folder: Path, *, seed: int = 0, vocab_size: int | None = None) -> Snapshot:
    """What a published checkpoint consists of, as bytes."""
    tokenizer = byte_tokenizer()
    config = small_config(tokenizer)
    config = replace(config, vocab_size=vocab_size or config.vocab_size)
    model.save(random_network(config, seed=seed), folder, dtype=torch.float32)
    tokenizer.save(str(folder / TOKENIZER))
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "generation_config.json": b'{"temperature": 0.0}\n',
        "chat_template.jinja": b"{% for message in messages %}{% endfor %}\n" * 40,
    }


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that exists once any code of a repository has run."""
    return tmp_path_factory.mktemp("marker") / "code ran"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return checkpoint_files(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return checkpoint_files(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The same with weights of 27 MB, three of the client's chunks."""
    return checkpoint_files(tmp_path_factory.mktemp("large"), vocab_size=210_000)


@pytest.fixture(scope="module")
def traps(marker: Path) -> Snapshot:
    """What must never be asked for: code, pickles, and names that lead elsewhere."""
    code = f"open({str(marker)!r}, 'w').close()\n".encode()
    names = (
        "modeling_arkasr.py", "configuration_arkasr.py", "processing_arkasr.py", "model.safetensors.py",
        "config.json.py", "CONFIG.PY", "tokenizer.json.Py", "model-00001-of-00002.safetensors.py", "inner/config.json",
        "inner/modeling.py", "../../evil.json", "..\\config.json", "/etc/config.json", "config.json\n", "config.json ",
        "Config.json", "./config.json", "model-1-of-2.safetensors", ".gitattributes", "arkasr.lock.json",
        "arkasr.checked.json", "model.safetensors.part",
    )  # fmt: skip
    return dict.fromkeys(names, code) | {
        "pytorch_model.bin": pickle.dumps(_Bomb(marker)),
        "README.md": b"# a model\n",
    }


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache and a home of the test's own, without anybody's token."""
    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Send this process's client, and child processes, to `url`."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good: Snapshot, traps: Snapshot, marker: Path
) -> Iterator[Hub]:
    """A hub with one good checkpoint, full of traps; at the end nothing but published names was asked for or kept."""
    with hub_server.running() as server:
        server.add(REPO, C1, {**traps, **good}, lfs=LFS)
        use(monkeypatch, server.url)
        yield server
        close_session()
    asked = server.names()
    assert all(files.is_published(name) for name in asked), asked
    assert not [name for name in asked - {*EXPORTED} if name.lower().endswith((".py", ".bin")) or "/" in name]
    assert not marker.exists()
    kept = {path.name.removesuffix(files.PART) for path in (tmp_path / "cache" / "models").rglob("*") if path.is_file()}
    assert all(files.is_published(name) or name in {LOCK, STAMPS, ".lock", "resolved"} for name in kept), kept
    assert not [path for path in tmp_path.rglob("*evil*") if path.is_file()]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the models of REPO lie."""
    return tmp_path / "cache" / "models" / REPO.replace("/", "--")


def child(code: str, **environment: str) -> "subprocess.Popen[str]":
    """A process of its own that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child_cli(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    argv = ["ark-asr", *arguments]
    return child(f"import sys; sys.argv = {argv!r}; from arkasr.cli import main; main()", **environment)


def outcome(process: "subprocess.Popen[str]") -> tuple[int, list[str], list[str]]:
    with process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out.splitlines(), err.splitlines()


def wait_until(true: Callable[[], bool], what: str, *, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def assert_holds(folder: Path, snapshot: Snapshot) -> None:
    """The published files with the right bytes, the two notes of arkasr, and nothing else."""
    assert {path.name for path in folder.iterdir()} == {*snapshot, LOCK, STAMPS}
    assert {name: (folder / name).read_bytes() for name in snapshot} == snapshot


def assert_incomplete(name: str, home: Path, run: Run) -> None:
    """Nothing takes it for a model."""
    assert [m.state for m in hub.models() if m.name == name] == ["incomplete"]
    assert not (home / C1).exists()
    with pytest.raises(ModelNotFoundError, match=r"not on this machine; run `ark-asr models pull"):
        hub.find(name)
    assert_refused(run("models", "path", name), "not on this machine")
    assert_refused(run("models", "verify", name), "not on this machine")
    assert_refused(run("models", "pull", name, "--offline"), "offline")


def pull_error(name: str = NAME) -> str:
    """The one line that a failing pull says."""
    with pytest.raises(ArkASRError) as caught:
        hub.pull(name)
    line = str(caught.value)
    assert "\n" not in line
    return line


def leave_piece(server: Hub, good: Snapshot, name: str, num_bytes: int) -> None:
    """A pull that fails and leaves exactly so many bytes of a file behind."""
    server.fault(name, server="cdn", body=good[name][:num_bytes], chunked=True)
    assert "the connection ended early; pull again: it goes on from there" in pull_error()


# --- what a name means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "revision",
    ["", "main", "v1", "abc1234", "AB" * 20, "ab" * 20 + "c", "ab" * 19, "refs/pr/1", "g" * 40, "ab" * 20 + "\n",
     "\u0661" * 40, "../" + "ab" * 20],
)  # fmt: skip
def test_a_revision_that_is_no_full_commit_is_refused_before_any_request(server: Hub, revision: str) -> None:
    for name in ("0.6b", "3b", REPO):
        for call in (hub.pull, hub.find, hub.remove, open_checkpoint):
            with pytest.raises(UsageError, match="not a full commit"):
                call(f"{name}@{revision}")
    assert server.log == []


def test_a_hub_id_needs_its_commit(server: Hub) -> None:
    for call in (hub.pull, hub.find, hub.remove, load_model):
        with pytest.raises(ModelNotFoundError, match=f"add its commit: {REPO}@COMMIT"):
            call(REPO)
    assert server.log == []


@pytest.mark.parametrize(
    "name",
    ["nonsense", "a/b/c", "../x", "-a/b", "a/.b", "a b/c", f"nonsense@{C1}", f"a/../b@{C1}", f"a/b/c@{C1}",
     f"a\\b@{C1}", f"ä/b@{C1}", f"a/b\n@{C1}", f"@{C1}", "https://huggingface.co/a/b", "x\0y", "x" * 5000],
)  # fmt: skip
def test_what_is_no_name_is_refused_before_any_request(server: Hub, name: str, run: Run) -> None:
    for call in (hub.pull, hub.find, hub.remove):
        if not {"\0", "\n"} & {*name}:
            assert_refused(run("models", call.__name__.replace("find", "path"), "--", name))
        with pytest.raises(ModelNotFoundError):
            call(name)
    assert server.log == []


@pytest.mark.parametrize("name", ["a--b/c", "a/b--c", "a/b.git", "a/b..c", "a/b-", "a/b.", f"a/{'b' * 100}"])
def test_an_id_that_no_hub_can_have_is_refused_before_any_request(server: Hub, name: str, run: Run) -> None:
    """The client raised its own error for these, and `a--b/c` shared a folder with `a/b--c`."""
    assert_refused(run("models", "pull", f"{name}@{C1}"))
    assert server.log == []


def test_the_shipped_model_has_no_revision_and_needs_no_cache(server: Hub) -> None:
    with pytest.raises(UsageError, match="comes with the package"):
        hub.pull(f"tiny@{C1}")
    assert hub.pull("tiny") == hub.find("TINY") == pins.SHIPPED / "tiny"
    with pytest.raises(UsageError, match="was not downloaded"):
        hub.remove("tiny")
    assert server.log == []
    assert not hub.cache().exists()


def test_a_folder_is_itself(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a").mkdir()
    assert hub.pull(tmp_path / "a@b") == hub.find(tmp_path / "a@b") == tmp_path / "a@b"
    assert hub.find(str(tmp_path / "a@b")) == tmp_path / "a@b"
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        hub.find(tmp_path / "absent")
    with pytest.raises(UsageError, match="was not downloaded"):
        hub.remove(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    assert server.log == []


@given(
    st.one_of(st.sampled_from([CONFIG, WEIGHTS, "model-00001-of-00002.safetensors"]), st.text()),
    st.sampled_from([".py", ".PY", ".Py", ".pY"]),
)
def test_no_name_of_code_is_published(stem: str, suffix: str) -> None:
    assert not files.is_published(stem + suffix)


@given(
    st.one_of(st.sampled_from([CONFIG, WEIGHTS, "model-00001-of-00002.safetensors"]), st.text(max_size=5)),
    st.one_of(st.sampled_from([CONFIG, WEIGHTS, "model-00001-of-00002.safetensors"]), st.text(max_size=5)),
    st.sampled_from("/\\\0\n\r\t :"),
)
def test_no_name_that_leads_elsewhere_is_published(before: str, after: str, between: str) -> None:
    assert not files.is_published(before + between + after)


# --- a pull that goes well ---------------------------------------------------------------------------------------


def test_a_pull_by_commit(server: Hub, good: Snapshot, home: Path) -> None:
    heard: list[str] = []
    seen: list[tuple[int, int]] = []
    folder = hub.pull(NAME, report=heard.append, progress=lambda done, total: seen.append((done, total)))
    assert folder == home / C1 == hub.find(NAME)
    assert_holds(folder, good)
    assert heard == []
    total = sum(map(len, good.values()))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {name: (len(server.gets(name)), server.bytes_sent(name)) for name in good} == {
        name: (1, len(body)) for name, body in good.items()
    }
    assert all("/main" not in request.path for request in server.log)
    assert all("authorization" not in request.headers for request in server.log)
    lock = json.loads((folder / LOCK).read_text())
    assert lock == {
        "repo_id": REPO,
        "revision": C1,
        "files": {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in good.items()},
    }
    assert sorted(path.name for path in home.iterdir() if path.name != ".lock") == [C1]
    before = len(server.log)
    assert hub.pull(NAME) == folder
    assert open_checkpoint(NAME).folder == folder
    assert len(server.log) == before


def test_an_export_is_pulled_like_weights(server: Hub, good: Snapshot, tmp_path: Path, run: Run) -> None:
    """With its own graphs and nothing else; hashed at the first load and not again, and gone with the model."""
    for name, data in good.items():
        (tmp_path / "good").mkdir(exist_ok=True)
        (tmp_path / "good" / name).write_bytes(data)
    folder = export.find_or_write(open_checkpoint(tmp_path / "good"), "int4", folder=tmp_path / "export")
    snapshot = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.add(REPO, C2, {"modeling_arkasr.py": b"raise SystemExit", **snapshot}, lfs=LFS)
    name = f"{REPO}@{C2}"
    pulled = hub.pull(name)
    assert_holds(pulled, snapshot)
    assert server.names() == {*snapshot}
    transcriber = load_model(name, device="cpu")
    assert transcriber.transcribe((noise(16_000), 16_000), vad=False).tokens
    hashed: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sha256", hashed.append)
        load_model(name, device="cpu")
    assert hashed == []
    _, (line,), _ = run("models", "verify", name)
    assert f"{len(snapshot)} files have their SHA-256" in line
    (pulled / "decoder.bin").write_bytes(snapshot["decoder.bin"][:-1])
    assert_refused(run("models", "verify", name), "decoder.bin has")


def test_graphs_without_our_manifest_are_somebody_elses(server: Hub, good: Snapshot) -> None:
    server.add(REPO, C2, {**good, **dict.fromkeys(EXPORTED, b"a graph")}, lfs=LFS)
    assert_holds(hub.pull(f"{REPO}@{C2}"), good)


def test_load_model_pulls_and_transcribes(server: Hub) -> None:
    clip = (noise(4_000), 16_000)
    transcriber = load_model(NAME)
    asked = len(server.log)
    assert asked > 0
    assert transcriber.transcribe(clip) is not None
    load_model(NAME)
    assert len(server.log) == asked


def test_0_6b_is_resolved_once_and_printed_for_the_pin_table(
    server: Hub, good: Snapshot, traps: Snapshot, other: Snapshot, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO_06B, C1, {**traps, **good}, lfs=LFS)
    code, out, err = run("models", "pull", "0.6b")
    folder = hub.cache() / "models" / "AutoArk-AI--ARK-ASR-0.6B" / C1
    assert (code, out, len(err)) == (0, [str(folder)], 3)
    assert err[0] == f"ark-asr: 0.6b: main of {REPO_06B} is at {C1}; recorded, and used from now on"
    assert "put this line into PINS" in err[1]
    printed = eval("{" + err[2].removeprefix("ark-asr: ") + "}", {"Pin": Pin})  # noqa: S307 - our own line
    expected = Pin(REPO_06B, C1, {n: hashlib.sha256(b).hexdigest() for n, b in good.items()})
    assert printed == {"0.6b": expected}
    assert (folder.parent / "resolved").read_text() == C1 + "\n"

    asked = len(server.log)
    server.add(REPO_06B, C2, other, lfs=LFS)  # main moves
    assert run("models", "pull", "0.6B") == (0, [str(folder)], [])
    assert run("models", "path", f"0.6b@{C1}") == (0, [str(folder)], [])
    assert len(server.log) == asked
    assert_holds(folder, good)

    # somebody else, with that line in the table, gets the same without a word and without main
    monkeypatch.setitem(PINS, "0.6b", expected)
    monkeypatch.setenv("ARKASR_CACHE", str(hub.cache().with_name("cache2")))
    code, out, err = run("models", "pull", "0.6b")
    assert (code, err) == (0, [])
    assert_holds(Path(out[0]), good)
    assert not [request for request in server.log[asked:] if "main" in request.path]


def test_an_interrupted_first_pull_of_0_6b_keeps_its_commit(
    server: Hub, good: Snapshot, other: Snapshot, run: Run
) -> None:
    server.add(REPO_06B, C1, good, lfs=LFS)
    server.fault(WEIGHTS, server="cdn", status=500)
    code, out, err = run("models", "pull", "0.6b")
    assert (code, out) == (1, [])
    assert "HTTP 500" in err[-1]
    server.add(REPO_06B, C2, other, lfs=LFS)
    code, out, err = run("models", "pull", "0.6b")
    assert (code, len(err)) == (0, 2), err  # the line for PINS
    assert Path(out[0]).name == C1
    assert_holds(Path(out[0]), good)


def test_3b_is_its_pinned_commit(server: Hub, good: Snapshot, other: Snapshot) -> None:
    server.add(REPO_3B, COMMIT_3B, good, lfs=LFS)
    server.add(REPO_3B, C2, other, lfs=LFS)
    heard: list[str] = []
    folder = hub.pull("3b", report=heard.append)
    assert folder.name == COMMIT_3B
    assert_holds(folder, good)
    assert not [request for request in server.log if "main" in request.path]
    assert eval("{" + heard[1] + "}", {"Pin": Pin})["3b"].revision == COMMIT_3B  # noqa: S307 - our own line


def test_shards_come_too(server: Hub, good: Snapshot) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = {name: good[WEIGHTS] + bytes([i]) for i, name in enumerate(names)}
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    rest = {name: body for name, body in good.items() if name != WEIGHTS}
    server.add(REPO, C2, {**rest, **shards, files.INDEX: index}, lfs=frozenset(names))
    assert_holds(hub.pull(f"{REPO}@{C2}"), {**rest, **shards, files.INDEX: index})


def test_a_listing_in_pages(server: Hub, good: Snapshot) -> None:
    server.page_entries = 2
    assert_holds(hub.pull(NAME), good)
    assert sum("/tree/" in request.path for request in server.log) > 5


def test_a_renamed_repository_is_followed(server: Hub, good: Snapshot) -> None:
    server.renamed["old-org/old"] = REPO
    folder = hub.pull(f"old-org/old@{C1}")
    assert_holds(folder, good)
    assert folder.parent.name == "old-org--old"
    assert 307 in {request.status for request in server.log}


def test_small_files_from_another_path_of_the_hub(server: Hub, good: Snapshot) -> None:
    server.resolve_cache = True
    assert_holds(hub.pull(NAME), good)
    assert any("resolve-cache" in request.path for request in server.log)


def test_nothing_else_is_asked_and_nothing_written_elsewhere(server: Hub, good: Snapshot, tmp_path: Path) -> None:
    """The client's metadata calls also fetched /api/agent-harnesses, and kept it in its own cache."""
    assert outcome(child_cli("models", "pull", NAME))[0] == 0
    paths = [request.path for request in server.log if request.server == "hub"]
    assert {*paths} == {f"/api/models/{REPO}/tree/{C1}", *(f"/{REPO}/resolve/{C1}/{name}" for name in good)}
    assert not (tmp_path / "hf").exists()


def test_text_that_is_sent_compressed(server: Hub, good: Snapshot) -> None:
    """The hub compresses text files for clients that take it, and then tells no length."""
    for name in ("chat_template.jinja", CONFIG):
        server.fault(f"GET /{REPO}/resolve/{C1}/{name}", gzip=True)
    assert_holds(hub.pull(NAME), good)


def test_a_mirror_below_a_path(server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    server.prefix, server.page_entries = "/mirror/of hf".replace(" ", "-"), 3
    use(monkeypatch, server.url)
    assert server.url.endswith("/mirror/of-hf")
    code, out, err = outcome(child_cli("models", "pull", NAME))
    assert (code, err) == (0, [])
    assert_holds(Path(out[0]), good)


def test_the_token_goes_to_the_hub_and_no_further(server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server.repos[REPO].gated = True
    assert_holds(hub.pull(NAME), good)
    sent = {server_: {r.headers.get("authorization") for r in server.log if r.server == server_} for server_ in
            ("hub", "cdn")}  # fmt: skip
    assert sent == {"hub": {"Bearer hf_right"}, "cdn": {None}}


def test_the_token_does_not_reach_the_cdn_after_a_cut_either(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server.fault(WEIGHTS, server="cdn", cut_after=1000)
    hub.pull(NAME)
    cdn = [request for request in server.log if request.server == "cdn"]
    assert len(cdn) == 3
    assert not [request for request in cdn if "authorization" in request.headers]
    assert "hf_right" not in repr([(r.path, r.query, dict(r.headers)) for r in cdn])


def test_the_token_does_not_follow_a_listing_to_another_host(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    link = f'<{server.origin("cdn")}/more>; rel="next"'
    server.fault("/tree/", headers={"Link": link})
    server.fault("/more", status=404)
    pull_error()
    assert not [r for r in server.log if r.server == "cdn" and "authorization" in r.headers]


def test_every_request_names_the_program(server: Hub) -> None:
    hub.pull(NAME)
    ours = [request for request in server.log if request.name]
    assert all(request.headers["user-agent"].startswith("arkasr/") for request in ours if request.method == "GET")


# --- what is cut off is continued --------------------------------------------------------------------------------


def test_a_cut_is_resumed_within_the_pull(
    server: Hub,
    good: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing received is sent again, wherever the cut is; the client writes in chunks of `DOWNLOAD_CHUNK_SIZE`."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)
    size = len(good[TOKENIZER])
    for gap in (0, 1, size // 2, size - 2 - size // 2):  # cuts after 0, 1, half and all but one byte
        server.fault(TOKENIZER, server="cdn", cut_after=gap)
    assert_holds(hub.pull(NAME), good)
    gets = server.gets(TOKENIZER)
    assert [request.range for request in gets] == [
        None, None, "bytes=1-", f"bytes={1 + size // 2}-", f"bytes={size - 1}-"
    ]  # fmt: skip
    assert [request.status for request in gets] == [200, 200, 206, 206, 206]
    assert server.bytes_sent(TOKENIZER) == size


@pytest.mark.parametrize("where", ["0", "1", "middle", "last"])
def test_a_cut_is_resumed_by_the_next_pull(server: Hub, good: Snapshot, where: str, home: Path, run: Run) -> None:
    size = len(good[TOKENIZER])
    had = {"0": 0, "1": 1, "middle": size // 2, "last": size - 1}[where]
    leave_piece(server, good, TOKENIZER, had)
    assert_incomplete(NAME, home, run)
    before = len(server.log)
    assert_holds(hub.pull(NAME), good)
    (again,) = [request for request in server.log[before:] if request.server == "cdn" and request.name == TOKENIZER]
    assert (again.range, again.sent) == (f"bytes={had}-" if had else None, size - had)
    # what was complete is not asked for again
    assert {r.name for r in server.log[before:] if r.method == "GET" and r.name} == {TOKENIZER, WEIGHTS}


def test_a_reset_connection(server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch, home: Path, run: Run) -> None:
    """The client does not retry it; the next pull goes on."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.fault(WEIGHTS, server="cdn", cut_after=300_000, reset=True)
    error = pull_error()
    assert "cannot be reached" in error
    assert "pull again: it goes on from there" in error
    assert_incomplete(NAME, home, run)
    had = (home / (C1 + files.PART) / (WEIGHTS + files.PART)).stat().st_size  # what the reset let through
    assert_holds(hub.pull(NAME), good)
    assert server.gets(WEIGHTS)[-1].range == (f"bytes={had}-" if had else None)


def test_a_connection_that_always_ends_early_is_given_up(server: Hub, home: Path, run: Run) -> None:
    server.fault(TOKENIZER, times=99, server="cdn", cut_after=10)
    assert "cannot be reached" in pull_error()
    assert len(server.gets(TOKENIZER)) == 6
    assert_incomplete(NAME, home, run)


def test_a_hub_that_ignores_range(server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.fault(WEIGHTS, server="cdn", cut_after=200_000)  # within the pull
    server.fault(WEIGHTS, server="cdn", ignore_range=True)
    assert_holds(hub.pull(NAME), good)
    assert [(r.status, r.sent) for r in server.gets(WEIGHTS)] == [(200, 200_000), (200, len(good[WEIGHTS]))]

    hub.remove(NAME)  # by the next pull
    leave_piece(server, good, WEIGHTS, 200_000)
    server.fault(WEIGHTS, server="cdn", ignore_range=True)
    assert_holds(hub.pull(NAME), good)


def test_a_hub_that_answers_another_range(server: Hub, good: Snapshot) -> None:
    leave_piece(server, good, WEIGHTS, 200_000)
    server.fault(WEIGHTS, server="cdn", shift_range=-100_000)
    assert "longer than" in pull_error()
    assert_holds(hub.pull(NAME), good)
    assert server.gets(WEIGHTS)[-1].range is None


def test_a_damaged_piece_on_the_disk_is_fetched_again_from_the_start(server: Hub, good: Snapshot, home: Path) -> None:
    leave_piece(server, good, WEIGHTS, 200_000)
    piece = home / (C1 + files.PART) / (WEIGHTS + files.PART)
    piece.write_bytes(bytes(200_000))
    assert_holds(hub.pull(NAME), good)
    assert [request.range for request in server.gets(WEIGHTS)] == [None, "bytes=200000-", None]


@pytest.mark.parametrize("surplus", [0, 1], ids=["as long as it should be", "too long"])
def test_a_piece_on_the_disk_that_is_complete_but_wrong(server: Hub, good: Snapshot, home: Path, surplus: int) -> None:
    part = home / (C1 + files.PART)
    part.mkdir(parents=True)
    (part / (WEIGHTS + files.PART)).write_bytes(bytes(len(good[WEIGHTS]) + surplus))
    assert_holds(hub.pull(NAME), good)
    assert [request.range for request in server.gets(WEIGHTS)] == [None]


def test_a_finished_file_that_was_damaged_before_the_pull_went_on(server: Hub, good: Snapshot, home: Path) -> None:
    """It was believed because it bore its name, and the lock file then vouched for the damage."""
    server.fault(WEIGHTS, server="cdn", status=500)
    pull_error()
    finished = home / (C1 + files.PART) / TOKENIZER
    finished.write_bytes(bytes(len(good[TOKENIZER])))
    assert_holds(hub.pull(NAME), good)
    assert len(server.gets(TOKENIZER)) == 2


# --- what is wrong is not kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, CONFIG, "chat_template.jinja"])
def test_wrong_bytes(server: Hub, good: Snapshot, name: str, home: Path, run: Run) -> None:
    wrong = bytearray(good[name])
    wrong[len(wrong) // 2] ^= 1
    fault = server.fault(name, times=99, body=bytes(wrong))
    fault.match = f"{C1}/{name}"
    error = pull_error()
    said = "SHA-256" if name in LFS else "git SHA-1"
    assert f"{name} has {said} " in error
    assert "it was deleted, pull again" in error
    assert_incomplete(NAME, home, run)
    assert not list(home.rglob(f"{name}*"))
    fault.times = 0
    assert_holds(hub.pull(NAME), good)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_shorter_file_than_listed(server: Hub, good: Snapshot, name: str, home: Path, run: Run) -> None:
    server.fault(f"{C1}/{name}", times=99, body=good[name][:-1])
    assert "ended early" in pull_error() or "416" in pull_error()
    assert_incomplete(NAME, home, run)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("how", ["one byte", "endless", "chunked"])
def test_a_longer_file_than_listed(server: Hub, good: Snapshot, name: str, how: str, home: Path, run: Run) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "one byte": {"body": good[name] + b"x"},
        "endless": {"endless": True},
        "chunked": {"body": good[name] + b"x" * 2**20, "chunked": True},
    }
    server.fault(f"GET /{REPO}/", times=0)
    server.fault(f"{C1}/{name}", times=99, server="cdn" if name in LFS else None, **kinds[how])
    largest = 0

    def watch(_done: int, _all: int) -> None:
        nonlocal largest
        largest = max([largest, *(path.stat().st_size for path in home.rglob("*") if path.name.startswith(name))])

    with pytest.raises(CheckpointMismatchError, match=f"longer than the {len(good[name])} bytes"):
        hub.pull(NAME, progress=watch)
    assert largest <= len(good[name])
    assert not list(home.rglob(f"{name}*"))
    assert server.bytes_sent(name) < 64 * 2**20
    assert_incomplete(NAME, home, run)


def test_an_endless_file_never_fills_more_of_the_disk_than_is_listed(
    server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.fault(WEIGHTS, server="cdn", endless=True)
    sizes: list[int] = []
    with pytest.raises(CheckpointMismatchError, match="longer than"):
        hub.pull(NAME, progress=lambda *_: sizes.extend(p.stat().st_size for p in home.rglob(f"{WEIGHTS}*")))
    assert 0 < max(sizes) <= len(good[WEIGHTS])
    assert not list(home.rglob(f"{WEIGHTS}*"))


def test_a_hash_other_than_pinned_is_refused_before_anything_is_downloaded(
    server: Hub, good: Snapshot, other: Snapshot, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """One commit, two contents: this hub is not the one that was pinned."""
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in good.items()}
    monkeypatch.setitem(PINS, "0.6b", Pin(REPO, C1, hashes))
    server.add(REPO, C1, {**good, WEIGHTS: other[WEIGHTS]}, lfs=LFS)
    assert "pinned is" in pull_error("0.6b")
    assert not [request for request in server.log if request.method == "GET" and request.name]
    assert_refused(run("models", "pull", "0.6b"), WEIGHTS, "nothing was downloaded", "HF_ENDPOINT")

    del server.repos[REPO].commits[C1][WEIGHTS]  # and one that hides a pinned file
    server.repos[REPO].commits[C1]["model-00001-of-00001.safetensors"] = good[WEIGHTS]
    assert f"lists no {WEIGHTS}, which is pinned" in pull_error("0.6b")
    assert not [request for request in server.log if request.method == "GET" and request.name]


def test_a_small_file_other_than_pinned(
    server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in good.items()}
    monkeypatch.setitem(PINS, "0.6b", Pin(REPO, C1, hashes))
    server.add(REPO, C1, {**good, CONFIG: good[CONFIG].replace(b"32", b"64")}, lfs=LFS)
    assert re.search(rf"{CONFIG} has SHA-256 \w+, pinned is {hashes[CONFIG]}", pull_error("0.6b"))
    assert not list(home.rglob(f"{CONFIG}*"))


@pytest.mark.usefixtures("server")
def test_what_is_pinned_and_right_is_pulled(good: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in good.items()}
    monkeypatch.setitem(PINS, "0.6b", Pin(REPO, C1, hashes))
    heard: list[str] = []
    assert_holds(hub.pull("0.6b", report=heard.append), good)
    assert heard == []


@pytest.mark.parametrize(
    ("name", "size"), [(CONFIG, 2**21), (WEIGHTS, 51 * 2**30), (TOKENIZER, -1), (CONFIG, None), (CONFIG, "x")]
)
def test_an_absurd_size_in_the_listing(server: Hub, name: str, size: object) -> None:
    server.listed[name] = {"size": size}
    assert "HF_ENDPOINT" in pull_error()
    assert not [request for request in server.log if request.method == "GET" and request.name]


@pytest.mark.parametrize(
    "body",
    [b"<html>welcome to the hotel</html>", b"", b"{}", b"[1]", b'[{"type": "file"}]', b"null", b"[null]",
     b'[{"type": "file", "path": "config.json", "oid": "x", "size": Infinity}]',
     b'[{"type": "file", "path": 5, "oid": "x", "size": 1}]',
     b'[{"type": "file", "path": ["config.json"], "oid": "x", "size": 1}]',
     b"[" * 100_000, b"\xff\xfe"],
)  # fmt: skip
def test_what_is_no_listing(server: Hub, body: bytes) -> None:
    server.fault("/tree/", body=body)
    assert re.search("check HF_ENDPOINT|not an ARK-ASR checkpoint", pull_error())


def test_pages_without_end(server: Hub) -> None:
    """A listing whose every page is empty and has a next one."""
    server.fault(
        "/tree/", times=200, body=b"[]", headers={"Link": f'<{server.url}/api/models/{REPO}/tree/{C1}>; rel="next"'}
    )
    pull_error()
    assert sum("/tree/" in request.path for request in server.log) < 200


def test_a_repository_that_holds_no_checkpoint(server: Hub, good: Snapshot) -> None:
    server.add(REPO, C2, {name: body for name, body in good.items() if name != WEIGHTS}, lfs=LFS)
    assert "not an ARK-ASR checkpoint" in pull_error(f"{REPO}@{C2}")
    server.add(REPO, C2, {name: body for name, body in good.items() if name != CONFIG}, lfs=LFS)
    assert "not an ARK-ASR checkpoint" in pull_error(f"{REPO}@{C2}")
    assert not [request for request in server.log if request.method == "GET" and request.name]


def test_a_hub_that_answers_with_another_commit(server: Hub, good: Snapshot) -> None:
    server.fault("HEAD", status=200, headers={"X-Repo-Commit": C2})
    assert "answers with commit" in pull_error()
    server.fault("HEAD", status=200)
    assert "answers with commit ''" in pull_error()
    server.add(REPO_06B, C1, good, lfs=LFS)
    server.fault("HEAD", status=200, headers={"X-Repo-Commit": "v1"})
    assert "main is at 'v1', not a commit" in pull_error("0.6b")
    assert not list(hub.cache().rglob("resolved"))
    assert not [request for request in server.log if request.method == "GET"]


# --- a hub that says no, or nothing ------------------------------------------------------------------------------


def test_no_such_repository_or_commit(server: Hub, run: Run) -> None:
    assert_refused(run("models", "pull", f"some-org/nothing@{C1}"), "no such repository", server.url)
    assert_refused(run("models", "pull", f"{REPO}@{C2}"), "no such commit")
    assert_refused(run("models", "pull", "0.6b"), "no such repository")
    assert [request.status for request in server.log] == [401, 404, 401]


def test_a_gated_repository(server: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].gated = True
    assert_refused(run("models", "pull", NAME), "gated; accept its terms", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_refused(run("models", "pull", NAME), "gated; accept its terms", "HF_TOKEN")
    assert [request.status for request in server.log] == [401, 403]


@pytest.mark.parametrize("match", ["HEAD", "/tree/", f"GET /{REPO}/resolve/{C1}/{CONFIG}"], ids=["head", "tree", "get"])
def test_a_hub_that_asks_to_wait_is_obeyed(server: Hub, good: Snapshot, match: str) -> None:
    server.fault(match, status=429, headers={"Retry-After": "1"})
    assert_holds(hub.pull(NAME), good)
    refused, again = [request for request in server.log if match in request.line][:2]
    assert (refused.status, again.status) == (429, 200)
    assert 1.0 <= again.at_s - refused.at_s < 6.0


def test_a_busy_hub_is_asked_again(server: Hub, good: Snapshot) -> None:
    server.fault("HEAD", status=503)
    server.fault("/tree/", status=503)
    assert_holds(hub.pull(NAME), good)
    assert [request.status for request in server.log[:4]] == [503, 200, 503, 200]


@pytest.mark.parametrize("status", [400, 403, 410, 500, 503])
def test_a_hub_that_fails_while_it_sends(server: Hub, good: Snapshot, status: int) -> None:
    server.fault(WEIGHTS, server="cdn", status=status)
    error = pull_error()
    assert f"HTTP {status}" in error
    assert "it goes on from there" in error
    before = len(server.log)
    assert_holds(hub.pull(NAME), good)
    assert {r.name for r in server.log[before:] if r.method == "GET" and r.name} == {WEIGHTS}


@pytest.mark.parametrize("body", [b"[]", b"5", b"<html>", b"\xff", b'{"error": {"a": 1}}'])
def test_an_error_with_an_odd_body(server: Hub, body: bytes) -> None:
    """The client reads the body of an error, and stumbled over JSON that is no object."""
    server.fault(WEIGHTS, server="cdn", status=403, headers={"Content-Type": "application/json"}, body=body)
    pull_error()


def test_a_refused_connection_fails_soon_and_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use(monkeypatch, url)
    for name in (NAME, "0.6b"):
        started = time.monotonic()
        assert_refused(outcome(child_cli("models", "pull", name)), url, "cannot be reached")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("url", ["localhost:1", "ftp://127.0.0.1", "http://[", "http://a b", "http://127.0.0.1:99999"])
def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    use(monkeypatch, url)
    pull_error()


@pytest.mark.usefixtures("server")
def test_errors_are_one_line_on_stderr() -> None:
    """In a process of its own, where the client's own log would show."""
    assert_refused(outcome(child_cli("models", "pull", f"{REPO}@{C2}")), "no such commit")


def test_a_hub_that_falls_silent(server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait is without end: HF_HUB_DOWNLOAD_TIMEOUT holds for the listing too, and silence within a file is a cut."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    server.fault(WEIGHTS, server="cdn", stall_after=1000)
    assert_holds(hub.pull(NAME), good)
    assert len(server.gets(WEIGHTS)) == 2

    hub.remove(NAME)
    server.fault("/tree/", times=99, delay_s=5.0)
    started = time.monotonic()
    assert "cannot be reached" in pull_error()
    assert time.monotonic() - started < 4


# --- processes ---------------------------------------------------------------------------------------------------


def test_two_processes_at_once(server: Hub, good: Snapshot) -> None:
    server.fault(WEIGHTS, server="cdn", stall_after=100_000)
    first = child_cli("models", "pull", NAME)
    assert server.stalled.wait(30)
    second = child_cli("models", "pull", NAME)
    assert second.stderr is not None
    assert second.stderr.readline() == f"ark-asr: {NAME}: another process is downloading it; waiting\n"
    with pytest.raises(UsageError, match="another process is downloading it"):
        hub.remove(NAME)
    server.resume.set()
    outcomes = [outcome(first), outcome(second)]
    folder = hub.find(NAME)
    assert outcomes == [(0, [str(folder)], [])] * 2
    assert_holds(folder, good)
    assert {name: len(server.gets(name)) for name in good} == dict.fromkeys(good, 1)


def test_killed_in_the_middle(server: Hub, large: Snapshot, home: Path, run: Run) -> None:
    """SIGKILL: the folder never looks complete, and what had come is not sent again."""
    server.add(REPO, C1, large, lfs=LFS)
    assert len(large[WEIGHTS]) > 2 * CHUNK_BYTES + 2**20
    server.fault(WEIGHTS, server="cdn", stall_after=2 * CHUNK_BYTES + 2**20)
    process = child_cli("models", "pull", NAME)
    piece = home / (C1 + files.PART) / (WEIGHTS + files.PART)
    wait_until(lambda: piece.exists() and piece.stat().st_size >= 2 * CHUNK_BYTES, "two chunks on the disk")
    process.send_signal(signal.SIGKILL)
    assert outcome(process) == (-signal.SIGKILL, [], [])
    server.resume.set()
    assert piece.stat().st_size == 2 * CHUNK_BYTES
    assert_incomplete(NAME, home, run)
    with pytest.raises(ModelNotFoundError, match=r"neither|no config"):
        open_checkpoint(piece.parent)  # even its folder, given as one
    before = len(server.log)
    assert open_checkpoint(NAME).folder == home / C1  # loading goes on with the download
    assert_holds(home / C1, large)
    (again,) = [request for request in server.log[before:] if request.server == "cdn"]
    assert (again.range, again.sent) == (f"bytes={2 * CHUNK_BYTES}-", len(large[WEIGHTS]) - 2 * CHUNK_BYTES)


@pytest.mark.parametrize("when", ["before the lock file", "after the lock file"])
def test_killed_between_the_last_file_and_the_rename(
    server: Hub, good: Snapshot, home: Path, run: Run, when: str
) -> None:
    process = child(
        f"""
import os
from arkasr import hub, pins
write_lock = pins.write_lock
def write_and_die(*arguments):
    if {when!r} == "after the lock file":
        write_lock(*arguments)
    os.kill(os.getpid(), 9)
pins.write_lock = write_and_die
hub.pull({NAME!r})
"""
    )
    assert outcome(process)[0] == -signal.SIGKILL
    assert {path.name for path in (home / (C1 + files.PART)).iterdir()} >= set(good)
    assert_incomplete(NAME, home, run)
    before = len(server.log)
    assert_holds(hub.pull(NAME), good)
    assert not [request for request in server.log[before:] if request.method == "GET" and request.name]


@pytest.mark.usefixtures("server")
def test_killed_in_the_middle_of_a_removal(good: Snapshot, home: Path, run: Run) -> None:
    """What is left never bears the name of a complete model, and a damaged rest of it is not believed."""
    folder = hub.pull(NAME)
    (folder / TOKENIZER).write_bytes(bytes(len(good[TOKENIZER])))
    process = child(
        f"""
import os, pathlib, shutil
from arkasr import hub
def rmtree(folder):
    (pathlib.Path(folder) / {WEIGHTS!r}).unlink()
    os.kill(os.getpid(), 9)
shutil.rmtree = rmtree
hub.remove({NAME!r})
"""
    )
    assert outcome(process)[0] == -signal.SIGKILL
    assert_incomplete(NAME, home, run)
    assert_holds(hub.pull(NAME), good)


# --- a full disk, a disk that cannot be written ------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_fetched(
    server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(hub.cache().parent)
    monkeypatch.setattr(download, "disk_usage", lambda _: usage._replace(free=sum(map(len, good.values())) - 1))
    assert "make room or set ARKASR_CACHE" in pull_error()
    assert not [request for request in server.log if request.method == "GET" and request.name]
    monkeypatch.setattr(download, "disk_usage", lambda _: usage._replace(free=sum(map(len, good.values()))))
    assert_holds(hub.pull(NAME), good)


def test_room_is_counted_without_what_is_already_here(
    server: Hub, good: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault(WEIGHTS, server="cdn", status=500)
    pull_error()
    usage = shutil.disk_usage(hub.cache())
    monkeypatch.setattr(download, "disk_usage", lambda _: usage._replace(free=len(good[WEIGHTS])))
    assert_holds(hub.pull(NAME), good)


def test_a_disk_that_fills_up_while_a_file_comes(server: Hub, good: Snapshot, home: Path, run: Run) -> None:
    limited = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["ark-asr", "models", "pull", {NAME!r}]
from arkasr.cli import main
main()
"""
    assert_refused(outcome(child(limited)), WEIGHTS, "make room or set ARKASR_CACHE")
    assert_incomplete(NAME, home, run)
    had = (home / (C1 + files.PART) / (WEIGHTS + files.PART)).stat().st_size
    assert had <= 100_000
    assert_holds(hub.pull(NAME), good)
    assert server.gets(WEIGHTS)[-1].range == f"bytes={had}-"


@pytest.mark.parametrize("what", ["lock", "resolved"])
def test_a_disk_that_is_full_when_a_note_is_written(server: Hub, good: Snapshot, what: str) -> None:
    """The notes are a few bytes, and failed with a traceback."""
    server.add(REPO_06B, C1, good, lfs=LFS)
    limited = f"""
import resource, sys
from arkasr import download, hub, pins
def limit(_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
if {what!r} == "lock":
    hub.pins.write_lock = lambda *a, inner=pins.write_lock: (limit(a), inner(*a))
else:
    download.commit_of_main = lambda r, inner=download.commit_of_main: (inner(r), limit(r))[0]
sys.argv = ["ark-asr", "models", "pull", "0.6b"]
from arkasr.cli import main
main()
"""
    code, out, err = outcome(child(limited))
    assert (code, out) == (1, [])
    assert "make room or set ARKASR_CACHE" in err[-1]
    assert_holds(hub.pull("0.6b"), good)


def test_a_cache_that_cannot_be_made(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "file" / "cache"))
    assert_refused(run("models", "pull", NAME), "cannot be written", "set ARKASR_CACHE")
    assert server.log == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_read_only_cache(server: Hub, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator pulled; everybody else loads, and is told when they cannot pull."""
    monkeypatch.setenv("ARKASR_CACHE", str(open_folder))
    folder = hub.pull(NAME)
    (folder / STAMPS).unlink()
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    lines = f"""
import os
from arkasr import checkpoint, download, errors, hub, pins
if {root}:
    os.setgid(65534)
    os.setuid(65534)
assert hub.pull({NAME!r}) == checkpoint.open_checkpoint({NAME!r}).folder
pins.verify(hub.find({NAME!r}))
for call, name in ((hub.pull, "{REPO}@{C2}"), (hub.remove, {NAME!r})):
    try:
        call(name)
    except errors.ArkASRError as error:
        print(error)
"""
    asked = len(server.log)
    try:
        code, out, err = outcome(child(lines))
    finally:
        for path in (open_folder, *open_folder.rglob("*")):
            path.chmod(0o755)
    assert (code, len(out), err) == (0, 2, [])
    assert all("cannot be written" in line and "set ARKASR_CACHE to a folder of yours" in line for line in out)
    assert len(server.log) == asked
    assert not (folder / STAMPS).exists()


# --- without a network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE"])
def test_offline_there_is_no_request(
    server: Hub, monkeypatch: pytest.MonkeyPatch, run: Run, how: str, tmp_path: Path
) -> None:
    folder = hub.pull(NAME)
    asked = len(server.log)
    option = ["--offline"] if how == "--offline" else []
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def refuse(*_: object) -> None:
        pytest.fail("a connection was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    clip = tmp_path / "clip.wav"
    clip.write_bytes(encoded(noise(4_000)))
    assert run("models", "pull", NAME, *option) == (0, [str(folder)], [])
    code, out, err = run("transcribe", clip, "--model", NAME, *FEW, *option)
    assert (code, len(out), err) == (0, 1, [])
    for absent in ("0.6b", "3b", f"{REPO}@{C2}"):
        assert_refused(run("models", "pull", absent, *option), "not on this machine, and offline")
        assert_refused(run("transcribe", clip, "--model", absent, *option), "not on this machine, and offline")
    for words in (("list",), ("verify",), ("path", NAME)):
        assert run("models", *words)[0] == 0
    assert run("models", "remove", NAME)[0] == 0
    assert len(server.log) == asked
    if how == "HF_HUB_OFFLINE":
        with pytest.raises(ModelNotFoundError, match="offline"):
            load_model(NAME)


def test_offline_by_environment_in_a_process_of_its_own(server: Hub) -> None:
    assert_refused(outcome(child_cli("models", "pull", NAME, HF_HUB_OFFLINE="1")), "not on this machine, and offline")
    assert server.log == []


# --- what lies on the disk is checked ----------------------------------------------------------------------------


def flip(path: Path, *, same_time: bool = False) -> None:
    """Change one byte in the middle; with `same_time`, the time of change is put back."""
    status = path.stat()
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(bytes(body))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if same_time else 1_000_000)))


@pytest.mark.parametrize("same_time", [False, True], ids=["time changed", "time put back"])
@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, CONFIG, "chat_template.jinja"])
@pytest.mark.usefixtures("server")
def test_a_flipped_byte(name: str, run: Run, *, same_time: bool) -> None:
    folder = hub.pull(NAME)
    flip(folder / name, same_time=same_time)
    if not same_time:  # a load hashes again what looks changed
        with pytest.raises(CheckpointMismatchError, match=rf"{re.escape(name)} has SHA-256"):
            open_checkpoint(NAME)
    with pytest.raises(CheckpointMismatchError, match=rf"{re.escape(name)} has SHA-256"):
        pins.verify(folder)
    assert_refused(run("models", "verify", NAME), f"{name} has SHA-256", "remove the model and pull it again")
    if not same_time:  # and again, as nothing was remembered of a failure
        with pytest.raises(CheckpointMismatchError, match=rf"{re.escape(name)} has SHA-256"):
            open_checkpoint(NAME)
    hub.remove(NAME)
    open_checkpoint(NAME)


@pytest.mark.usefixtures("server")
def test_hashes_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.pull(NAME)
    hashed: list[str] = []
    sha256 = files.sha256

    def count(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(files, "sha256", count)
    pins.check(folder)
    assert hashed == []
    (folder / STAMPS).write_text("{damaged")
    pins.check(folder)
    assert len(hashed) == len(pins.read_lock(folder).files)  # type: ignore[union-attr]
    hashed.clear()
    pins.check(folder)
    assert hashed == []


@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.usefixtures("server")
def test_a_cut_or_missing_file_is_found_at_every_load(good: Snapshot, *, stamps: bool) -> None:
    folder = hub.pull(NAME)
    status = (folder / WEIGHTS).stat()
    (folder / WEIGHTS).write_bytes(good[WEIGHTS][:-1])
    os.utime(folder / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    if stamps:  # that even agree with the damage
        lock = pins.read_lock(folder)
        assert lock is not None
        (folder / STAMPS).write_text(json.dumps(pins._stamps(folder, lock.files)))
    size = len(good[WEIGHTS])
    for check in (open_checkpoint, pins.check, pins.verify):
        with pytest.raises(CheckpointMismatchError, match=f"{WEIGHTS} has {size - 1} bytes, not {size}"):
            check(folder)
    (folder / WEIGHTS).unlink()
    (folder / "chat_template.jinja").unlink()
    for check in (open_checkpoint, pins.check, pins.verify):
        with pytest.raises(CheckpointMismatchError, match=f"chat_template.jinja is missing; {WEIGHTS} is missing"):
            check(folder)


@pytest.mark.usefixtures("server")
def test_a_foreign_file(run: Run) -> None:
    """One that a checkpoint could hold would change what is loaded; any other one is only odd."""
    folder = hub.pull(NAME)
    (folder / "notes.txt").write_text("mine")
    (folder / "modeling.py").write_text("")
    open_checkpoint(NAME)
    assert_refused(run("models", "verify", NAME), "'modeling.py' is foreign", "'notes.txt' is foreign")
    for name in ("notes.txt", "modeling.py"):
        (folder / name).unlink()
    assert run("models", "verify", NAME)[0] == 0
    for name in ("vocab.json", "model-00001-of-00001.safetensors", files.INDEX):
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointMismatchError, match=f"{re.escape(name)} is not of this download"):
            open_checkpoint(NAME)
        with pytest.raises(CheckpointMismatchError, match=f"{re.escape(repr(name))} is foreign"):
            pins.verify(folder)
        (folder / name).unlink()


@pytest.mark.usefixtures("server")
def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = hub.pull(NAME)
    (tmp_path / "mine").write_bytes((folder / CONFIG).read_bytes())
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(tmp_path / "mine")
    for check in (open_checkpoint, pins.verify):
        with pytest.raises(CheckpointMismatchError, match="leads out of its folder"):
            check(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"files": []}', '{"files": {"config.json": 5}}', "\xff",
     '{"repo_id": "a/b", "revision": "c", "files": {"config.json": {"size": "x", "sha256": "y"}}}',
     '{"repo_id": "a/b", "revision": "c", "files": {"config.json": {"size": null, "sha256": "y"}}}',
     '{"repo_id": "a/b", "revision": "c", "files": {"config.json": {"size": 1e999, "sha256": "y"}}}',
     '{"repo_id": "a/b", "revision": "c", "files": {"config.json": {"sha256": "y"}}}', "[" * 100_000],
)  # fmt: skip
@pytest.mark.usefixtures("server")
def test_a_damaged_lock_file(text: str, run: Run) -> None:
    folder = hub.pull(NAME)
    (folder / LOCK).write_text(text, encoding="latin-1")
    for check in (open_checkpoint, pins.check, pins.verify):
        with pytest.raises(CheckpointMismatchError, match=re.escape(LOCK)):
            check(folder)
    assert_refused(run("models", "verify", NAME), LOCK)
    assert run("models", "list")[0] == 0
    assert run("models", "remove", NAME)[0] == 0


@pytest.mark.usefixtures("server")
def test_a_lock_that_contradicts_the_pin_table(good: Snapshot, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    folder = hub.pull(NAME)
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in good.items()}
    monkeypatch.setitem(PINS, "0.6b", Pin(REPO, C1, hashes))
    assert open_checkpoint("0.6b").folder == folder
    monkeypatch.setitem(PINS, "0.6b", Pin(REPO, C1, {**hashes, WEIGHTS: "0" * 64}))
    for name in ("0.6b", NAME):
        with pytest.raises(CheckpointMismatchError, match=f"contradicts what is pinned for {WEIGHTS}"):
            open_checkpoint(name)
    assert_refused(run("models", "verify", "0.6b"), "contradicts", WEIGHTS)
    monkeypatch.setitem(PINS, "0.6b", Pin(REPO, C1, {**hashes, "vocab.json": "0" * 64}))
    with pytest.raises(CheckpointMismatchError, match=r"contradicts what is pinned for vocab\.json"):
        open_checkpoint("0.6b")


@pytest.mark.usefixtures("server")
def test_a_folder_of_yours_is_let_through(good: Snapshot, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, body in good.items():
        (folder / name).write_bytes(body)
    assert pins.verify(folder) is None
    open_checkpoint(folder)
    code, out, err = run("models", "verify", folder)
    assert (code, err) == (0, [])
    assert "no lock file" in out[0]
    assert not (folder / STAMPS).exists()


def test_the_shipped_model_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pins.SHIPPED / "tiny", tmp_path / "weights" / "tiny")
    monkeypatch.setattr(pins, "SHIPPED", tmp_path / "weights")
    open_checkpoint("tiny")
    flip(tmp_path / "weights" / "tiny" / WEIGHTS, same_time=True)
    with pytest.raises(CheckpointMismatchError, match=f"{WEIGHTS} has SHA-256"):
        open_checkpoint("tiny")
    assert not (tmp_path / "weights" / "tiny" / STAMPS).exists()


def test_a_damaged_record_of_main(server: Hub, good: Snapshot, run: Run) -> None:
    server.add(REPO_06B, C1, good, lfs=LFS)
    folder = hub.pull("0.6b")
    for text in ("", "main\n", C1[:-1], C1.upper(), "../" + C1):
        (folder.parent / "resolved").write_text(text)
        for words in (("pull", "0.6b"), ("path", "0.6b"), ("list",)):
            assert_refused(run("models", *words), "resolved", "delete this file")
    (folder.parent / "resolved").unlink()
    assert hub.pull("0.6b") == folder


@pytest.mark.usefixtures("server")
def test_a_complete_folder_whose_lock_file_was_deleted(good: Snapshot, run: Run) -> None:
    """It could neither be pulled again (the rename failed with a traceback) nor removed."""
    folder = hub.pull(NAME)
    (folder / LOCK).unlink()
    with pytest.raises(ModelNotFoundError):
        hub.find(NAME)
    assert run("models", "pull", NAME) == (0, [str(folder)], [])
    assert_holds(folder, good)


# --- removal -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_remove_takes_the_exports_along(run: Run, tmp_path: Path) -> None:
    made = [export.find_or_write(open_checkpoint(NAME), precision) for precision in ("int8", "int4")]
    assert {path.parent for path in made} == {tmp_path / "cache" / "exports"}
    assert run("models", "remove", NAME)[0] == 0
    assert not any(path.exists() for path in made)


@pytest.mark.usefixtures("server")
def test_remove_a_complete_model(run: Run, home: Path) -> None:
    folder = hub.pull(NAME)
    mb = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    assert run("models", "remove", NAME) == (0, [], [f"ark-asr: {NAME} removed, {mb:.0f} MB freed"])
    assert [path.name for path in home.iterdir()] == [".lock"]
    assert_refused(run("models", "remove", NAME), "not on this machine; nothing to remove")
    assert_refused(run("models", "path", NAME), "not on this machine")


def test_remove_an_incomplete_model(server: Hub, run: Run, home: Path) -> None:
    server.fault(WEIGHTS, server="cdn", status=500)
    pull_error()
    assert run("models", "remove", NAME)[0] == 0
    assert [path.name for path in home.iterdir()] == [".lock"]


def test_remove_0_6b_forgets_its_commit(server: Hub, good: Snapshot, other: Snapshot, run: Run) -> None:
    assert_refused(run("models", "remove", "0.6b"), "nothing to remove")
    server.add(REPO_06B, C1, good, lfs=LFS)
    hub.pull("0.6b")
    server.add(REPO_06B, C2, other, lfs=LFS)
    assert run("models", "remove", "0.6b")[0] == 0
    assert [(m.state, m.origin) for m in hub.models() if m.name == "0.6b"] == [
        ("absent", f"{REPO_06B}@not resolved yet")
    ]
    assert_holds(hub.pull("0.6b"), other)


def test_remove_what_arkasr_did_not_download(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("tiny", tmp_path / "mine"):
        assert_refused(run("models", "remove", name), "was not downloaded by arkasr")
    assert (tmp_path / "mine").is_dir()


# --- the command line --------------------------------------------------------------------------------------------


def test_list_path_verify(server: Hub, good: Snapshot, traps: Snapshot, run: Run) -> None:
    server.add(REPO_06B, C1, {**traps, **good}, lfs=LFS)
    server.add(REPO, C2, {**traps, **good}, lfs=LFS)
    code, out, err = run("models", "list")
    assert (code, err, [line.split()[:2] for line in out]) == (
        0, [], [["0.6b", "absent"], ["3b", "absent"], ["tiny", "shipped"]]
    )  # fmt: skip
    folders = {name: hub.pull(name) for name in ("0.6b", NAME)}
    server.fault(WEIGHTS, server="cdn", status=500)
    pull_error(f"{REPO}@{C2}")
    code, out, err = run("models", "list")
    assert (code, err) == (0, [])
    assert [line.split()[:2] for line in out] == [
        ["0.6b", "here"], ["3b", "absent"], ["tiny", "shipped"], [NAME, "here"], [f"{REPO}@{C2}", "incomplete"],
    ]  # fmt: skip
    assert f"{REPO_06B}@{C1}" in out[0]
    for name, folder in folders.items():
        assert run("models", "path", name) == (0, [str(folder)], [])
    code, out, err = run("models", "verify")
    assert (code, err, [line.split(":")[0] for line in out]) == (0, [], ["0.6b", "tiny", NAME])
    assert all("files have their SHA-256; config, tokenizer and tensors fit" in line for line in out)

    flip(folders["0.6b"] / WEIGHTS, same_time=True)
    code, out, err = run("models", "verify")
    assert (code, len(out), len(err)) == (1, 2, 1)
    assert f"{WEIGHTS} has SHA-256" in err[0]
    assert run("models", "verify", NAME, "tiny")[0] == 0


@pytest.mark.usefixtures("server")
def test_a_listed_name_is_a_name(run: Run) -> None:
    hub.pull(NAME)
    for line in run("models", "list")[1]:
        name, state = line.split()[:2]
        assert run("models", "path", name)[0] == (0 if state in {"here", "shipped"} else 1)


@pytest.mark.usefixtures("server")
def test_a_stray_folder_does_not_spoil_the_list(run: Run, home: Path) -> None:
    hub.pull(NAME)
    for stray in ("-x--y", "--", "a--b--c", ".x--y"):
        (home.parent / stray / C1).mkdir(parents=True)
    (home / "abc").mkdir()
    code, out, err = run("models", "list")
    assert (code, err) == (0, [])
    assert any(line.startswith(f"{NAME} ") for line in out)


def test_pull_checks_what_it_pulled(server: Hub, good: Snapshot, run: Run) -> None:
    """A download can be right, byte for byte, and no checkpoint that arkasr reads."""
    server.add(REPO, C2, {**good, CONFIG: b'{"model_type": "bert"}'}, lfs=LFS)
    code, out, err = run("models", "pull", f"{REPO}@{C2}")
    assert (code, out, len(err)) == (1, [], 1)


def test_the_default_model_is_0_6b_once_it_is_here(server: Hub, good: Snapshot, tmp_path: Path, run: Run) -> None:
    server.add(REPO_06B, C1, good, lfs=LFS)
    clip = tmp_path / "clip.wav"
    clip.write_bytes(encoded(noise(4_000)))
    tokens: dict[str, list[int]] = {}
    for model_name in ("tiny", "0.6b"):
        code, out, err = run("transcribe", clip, "--format", "json", *FEW)
        assert (code, len(out), err) == (0, 1, [cli_models.TINY_NOTICE] if model_name == "tiny" else [])
        tokens["default"] = [token for one in json.loads(out[0])["segments"] for token in one["tokens"]]
        code, out, err = run("transcribe", clip, "--format", "json", *FEW, "--model", model_name)
        assert (code, len(out), err) == (0, 1, [])
        assert json.loads(out[0])["segments"][0]["tokens"] == tokens["default"]
        tokens[model_name] = tokens["default"]
        if model_name == "tiny":
            assert server.log == []
            server.fault(WEIGHTS, server="cdn", status=500)
            pull_error("0.6b")
            assert hub.default_model() == "tiny"  # incomplete does not count
            hub.pull("0.6b")
            asked = len(server.log)
    assert tokens["tiny"] != tokens["0.6b"]
    assert len(server.log) == asked
